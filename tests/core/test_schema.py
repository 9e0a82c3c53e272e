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
