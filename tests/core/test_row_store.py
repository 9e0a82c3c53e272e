"""Numbers by row on disk and in memory: the same, in whatever batches they come."""

import os

import numpy as np
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.row_store import RowStore

SPECIAL = [np.nan, -0.0, np.inf, -np.inf, 1e-320, 0.1, 3.0]


def filled(folder):
    store = RowStore(9, folder)
    store.put([5, 6, 2], {"a": np.array(SPECIAL[:3]), "b": np.array([1.0, 2.0, 3.0])})
    store.put(np.array([0, 1, 8, 7]), {"b": np.arange(4.0), "a": np.array(SPECIAL[3:])})
    return store


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "on disk"])
def test_rows_come_back_bit_for_bit_where_they_belong(tmp_path, kept):
    store = filled(tmp_path / "not" / "there" if kept else None)
    whole = store.take(0, 9)
    assert list(whole) == store.names == ["a", "b"]
    by_hand = [-np.inf, 1e-320, np.inf, 0.0, 0.0, np.nan, -0.0, 3.0, 0.1]
    assert whole["a"].view(np.int64).tolist() == np.array(by_hand).view(np.int64).tolist()
    assert whole["b"].tolist() == [0, 1, 3, 0, 0, 1, 2, 3, 2]
    for first, last in ((0, 0), (3, 5), (5, 9)):
        part = store.take(first, last, ["b"])
        assert list(part) == ["b"] and part["b"].tolist() == whole["b"][first:last].tolist()
    assert list(store.parts(4)) == [(0, 4), (4, 8), (8, 9)]


def test_the_file_has_no_name(tmp_path):
    filled(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_with_its_remedy(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiagnosticsError, match=r"No space left.*Make room or choose another"):
        filled(tmp_path)


def test_a_store_that_nobody_filled_has_no_columns():
    assert RowStore(3).names == [] and RowStore(3).take(0, 3) == {}
