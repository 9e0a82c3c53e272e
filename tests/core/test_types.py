import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import diagnostics
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, column, read_parquet, support_column, validate_tokens
from diagnostics.core.types import Bank, Context, read_bank
from tests.conftest import make_bank


def keys(**changes):
    row = dict(
        context_id=["c", "c"],
        prompt_id=["p", "p"],
        position=[0, 1],
        response_length=[2, 2],
        token_id=[5, 6],
        token=["a", "b"],
    )
    return pd.DataFrame(row | changes)


def test_bank_survives_the_table():
    bank = make_bank([3, 1])
    assert Bank.from_frame(bank.to_frame()) == bank
    assert bank.positions == 4 and bank[0].ids == bank[0].prompt_ids + bank[0].response_ids


def test_a_bank_shows_a_summary_and_escapes_its_text():
    one = Context("c0", "p0", "<b>why</b>", (0, 5), "because <i>", (6, 7, 1), True)
    text = Bank((one, Context("c1", "p0", "x", (0,), "y", (4,), False)))._repr_html_()
    assert (
        text == "<p>2 contexts of 1 prompts, 4 response positions, 1 ended by themselves.</p>"
        "<p>c0: <i>&lt;b&gt;why&lt;/b&gt;</i> because &lt;i&gt;</p>"
    )
    assert Bank(())._repr_html_() == "<p>A bank without contexts.</p>"


def test_bank_survives_parquet(tmp_path):
    bank = make_bank([3, 1])
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet", index=False)
    assert read_bank(tmp_path / "contexts.parquet") == bank


@pytest.mark.parametrize("value", [np.array([]), [True], "False", None, float("nan"), pd.NA, 2])
def test_finished_is_true_or_false(value):
    frame = make_bank([3]).to_frame().astype({"finished": object})
    frame.at[0, "finished"] = value
    with pytest.raises(
        DiagnosticsError, match=r"^A context is finished or not: true or false; found "
    ):
        Bank.from_frame(frame)
    for known in (True, np.True_, 1, 1.0, False, np.False_, 0):
        frame.at[0, "finished"] = known
        assert Bank.from_frame(frame)[0].finished is bool(known)


def test_repeated_context_is_refused():
    frame = pd.concat([make_bank([2]).to_frame()] * 2)
    with pytest.raises(
        DiagnosticsError,
        match=r"^context_id 'c0' appears more than once\. Give every context its own id\.$",
    ):
        Bank.from_frame(frame)


def test_missing_column_names_what_is_there():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^a token table needs the column token; this one has context_id, .*Write the missing"
            r" ones"
        ),
    ):
        validate_tokens(keys().drop(columns="token"))


def test_tokens_take_the_schemas_order_and_types():
    frame = keys(gain=[1, 2], mine=[3, 4], forward_kl=[0.5, np.nan], compatibility_k8=[1, 0])
    tokens = validate_tokens(frame)
    assert list(tokens.columns)[-4:] == ["forward_kl", "compatibility_k8", "gain", "mine"]
    assert tokens["gain"].dtype == "float64" and tokens["position"].dtype == "int32"


def test_a_position_stands_once():
    with pytest.raises(
        DiagnosticsError, match=r"^Position 0 of context 'c' appears more than once\."
    ):
        validate_tokens(keys(position=[0, 0]))


def test_a_column_that_cannot_be_cast_is_refused():
    with pytest.raises(DiagnosticsError, match=r"^Column gain should hold float64, and holds "):
        validate_tokens(keys(gain=["x", "y"]))


def test_support_columns_find_their_schema():
    assert column("compatibility_k8") is SCHEMA["compatibility"]
    assert column("forward_kl_k8") is None and column("mine") is None
    assert (
        support_column("compatibility", 8) == "compatibility_k8"
        and support_column("compatibility", None) == "compatibility"
    )


def test_every_kl_says_its_direction():
    for name, entry in SCHEMA.items():
        if "kl" in name and entry.stage != "outcome":
            assert "KL(" in entry.meaning or "the same" in entry.meaning, name


def test_damaged_parquet_is_one_paragraph(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(
        DiagnosticsError, match=r"x\.parquet cannot be read as parquet \(.*\)\. Check the path"
    ):
        read_parquet(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "first",
    [
        "diagnostics",
        "diagnostics.probing.one_step, diagnostics.criteria, diagnostics.analysis.rank_agreement",
    ],
)
def test_functions_named_like_their_module_can_be_called_again_and_again(first):
    """`dx.probe` is a function until something imports the module of that name, which then stands
    in its place.
    """
    code = (
        f"import {first}; import diagnostics as dx; print(len(dx.list_criteria()) == len(dx.list_criteria())"
        " > 10)\nfor f in (dx.probe, dx.probe, dx.agreement, dx.agreement):\n    try: f()\n   "
        " except TypeError as e: print('missing' in str(e))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
        ).stdout.split()
        == ["True"] * 5
    )


def test_import_is_light():
    code = "import sys, diagnostics; print('torch' in sys.modules, 'pandas' in sys.modules)"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        diagnostics.nothing
