"""Rows of JSONL, parquet and CSV files keep their values as the file has them."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import keep_whole_numbers, missing, read_rows, require_unicode


@pytest.mark.parametrize("value", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_a_gap_is_missing(value):
    assert missing(value)


@pytest.mark.parametrize("value", [0, 0.0, "", "NA", "None", False, [], np.float64(1)])
def test_a_value_is_not_missing(value):
    assert not missing(value)


def test_text_stays_as_it_is_written(tmp_path):
    (tmp_path / "a.csv").write_text("id,answer\n007,NA\n8,1.50\n")
    written = read_rows(tmp_path / "a.csv", text=True)
    assert written.to_dict("list") == {"id": ["007", "8"], "answer": ["NA", "1.50"]}
    numbers = read_rows(tmp_path / "a.csv")
    assert numbers["id"].tolist() == [7, 8] and np.isnan(numbers["answer"][0])


def test_whole_numbers_with_a_gap_stay_whole():
    frame = keep_whole_numbers(pd.DataFrame({"a": [1.0, np.nan], "b": [1.5, np.nan]}))
    assert frame["a"].tolist() == [1, None] and type(frame["a"][0]) is int
    assert frame["b"][0] == 1.5 and np.isnan(frame["b"][1])


def test_floats_beyond_two_to_the_53_are_not_taken_for_whole_numbers():
    frame = keep_whole_numbers(pd.DataFrame({"a": [2.0**53, np.nan]}))
    assert frame["a"].dtype == "float64"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x", r"ends in '\.txt'; prompt files are \.jsonl, \.parquet or \.csv\."),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"\(line 2 holds a list, not an object\)"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"\(line 3 is not JSON: "),
        ("a.jsonl", "\n", r"a\.jsonl holds no rows\. Give a file with at least one prompt\."),
    ],
)
def test_what_cannot_be_read_names_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DiagnosticsError, match=message):
        read_rows(tmp_path / name)


def test_half_a_surrogate_pair_is_refused_at_its_place():
    require_unicode("pair 😀")
    with pytest.raises(DiagnosticsError, match=r"half a surrogate pair at character 2"):
        require_unicode("ab\ud83d")
