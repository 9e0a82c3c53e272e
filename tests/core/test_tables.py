"""Tables as files: equal content gives equal bytes, and formulas of a spreadsheet are text."""

import pandas as pd
import pyarrow.parquet as pq
import pytest

from diagnostics.core import tables
from diagnostics.core.tables import read_csv, write_csv, write_parquet

TEXTS = ["=1+1", "+1", "-x", "@sum(a)", "\tx", "'=1", "''-", "'plain", "it's", "", "a=b", "−1"]


def test_texts_that_begin_a_formula_are_guarded_and_come_back(tmp_path):
    frame = pd.DataFrame({"token": TEXTS, "=gain": [-0.5] * len(TEXTS)})
    content = write_csv(tmp_path / "a.csv", frame).read_text()
    begun = [cell for line in content.splitlines() for cell in line.replace('"', "").split(",")]
    formulas = [cell for cell in begun if cell.startswith(("=", "+", "@", "-", "\t"))]
    assert set(formulas) == {"-0.5"}
    back = read_csv(tmp_path / "a.csv")
    assert list(back) == ["token", "=gain"]
    assert back["token"].fillna("").tolist() == TEXTS and (back["=gain"] == -0.5).all()


@pytest.mark.parametrize("values", [[1, -2], [0.5, None], ["a", None], [True, False], []])
def test_other_columns_are_written_as_pandas_writes_them(tmp_path, values):
    frame = pd.DataFrame({"a": values})
    content = write_csv(tmp_path / "a.csv", frame).read_bytes()
    assert content == frame.to_csv(index=False).encode()


def test_half_a_surrogate_pair_is_written_out(tmp_path):
    frame = pd.DataFrame({"a": pd.Series(["\ud800"], dtype=object)})
    assert b"\\ud800" in write_csv(tmp_path / "a.csv", frame).read_bytes()


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame([["=a", "b"]], columns=["x", "x"])])
def test_tables_of_an_odd_shape_are_written(tmp_path, frame):
    content = write_csv(tmp_path / "a.csv", frame).read_text()
    assert content.strip() in ("", "x,x\n'=a,b")


def test_equal_tables_give_equal_bytes(tmp_path):
    frame = pd.DataFrame({"x": [0.1, 2.0], "name": ["a", "b"]})
    for write_table in (write_parquet, write_csv):
        first, second = (
            write_table(tmp_path / "1", frame).read_bytes(),
            write_table(tmp_path / "2", frame.copy()).read_bytes(),
        )
        assert first == second


def test_a_long_table_is_written_in_groups_of_rows_and_comes_back(tmp_path, monkeypatch):
    frame = pd.DataFrame({"a": range(7), "token": list("abcdefg")})
    monkeypatch.setattr(tables, "ROWS_TOGETHER", 3)
    path = write_parquet(tmp_path / "a.parquet", frame)
    assert pq.read_metadata(path).num_row_groups == 3
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
