"""Tables as files: equal content gives equal bytes, and formulas of a spreadsheet are text."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagnostics.core import tables
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet_parts
from diagnostics.core.tables import read_csv, write_csv, write_parquet, write_parquet_parts

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


PARTS = pd.DataFrame({"a": [1, 2, 3, 4], "ids": [[], [5], [], [6, 7]], "b": [None, None, "x", "y"]})


def test_a_table_in_one_part_has_the_bytes_of_the_whole_table(tmp_path):
    frame = PARTS.assign(x=[0.1, None, -0.0, float("inf")])
    frame.attrs["scored"] = {"student": "abc", "batch_tokens": 3}
    whole = write_parquet(tmp_path / "whole.parquet", frame).read_bytes()
    types = {"ids": pa.list_(pa.int64()), "b": pa.string()}
    assert write_parquet_parts(tmp_path / "p.parquet", [frame], types=types).read_bytes() == whole


def test_every_part_is_a_row_group_that_can_be_read_by_itself(tmp_path):
    path, types = tmp_path / "p.parquet", {"ids": pa.list_(pa.int64()), "b": pa.large_string()}
    parts = [PARTS[:1], PARTS[1:3], PARTS[3:]]
    write_parquet_parts(path, parts, types=types)
    assert pq.read_metadata(path).num_row_groups == 3
    read = list(read_parquet_parts(path))
    assert [part["a"].tolist() for part in read] == [[1], [2, 3], [4]]
    for part in (pd.concat(read), pd.read_parquet(path)):
        assert [list(ids) for ids in part["ids"]] == PARTS["ids"].tolist()
        assert part["b"].isna().tolist() == [True, True, False, False]
    again = tmp_path / "again.parquet"
    assert write_parquet_parts(again, parts, types=types).read_bytes() == path.read_bytes()


def test_parts_of_other_columns_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "p.parquet"
    with pytest.raises(DiagnosticsError, match="other columns than its first part: c"):
        write_parquet_parts(path, [PARTS, PARTS.assign(c=1)])
    with pytest.raises(DiagnosticsError, match="without any part"):
        write_parquet_parts(path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_breaks_off_leaves_the_old_file(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", PARTS)
    before = path.read_bytes()

    def broken():
        yield PARTS
        raise MemoryError

    with pytest.raises(MemoryError):
        write_parquet_parts(path, broken(), types={})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
