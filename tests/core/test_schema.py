"""The schema of the token table, and the checks that a table passes."""

import numpy as np
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, column, read_parquet, support_column, validate_tokens
from tests.factories import keys


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


def test_what_was_measured_again_finds_its_schema():
    assert column("compatibility_k8_after") is SCHEMA["compatibility_after"]
    assert support_column("compatibility_after", 8) == "compatibility_k8_after"
    assert support_column("compatibility_after", None) == "compatibility_after"
    entry = column("bhattacharyya_k8_after")
    assert entry.stage == "after" and entry.by_support and entry.name == "bhattacharyya_after"
    for name in ("gain_after", "mine_after", "forward_kl_k8_after", "token_after", "_after"):
        assert column(name) is None, name


def test_what_was_measured_again_has_types_and_an_order():
    frame = keys(
        gain=[1, 2],
        bhattacharyya_k8_after=[1, 0],
        top1_match_after=[1, 0],
        compatibility_k8_after=[1, 0],
        compatibility_after=[1, 0],
        student_entropy_after=[0, 1],
        seen=[1, 0],
    )
    tokens = validate_tokens(frame)
    assert tokens["seen"].dtype == "bool" and tokens["top1_match_after"].dtype == "bool"
    assert [name for name in tokens if name.endswith("_after") or name == "gain"] == [
        "student_entropy_after",
        "compatibility_after",
        "compatibility_k8_after",
        "gain",
        "bhattacharyya_k8_after",
        "top1_match_after",
    ]


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
