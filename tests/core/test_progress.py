"""Progress on terminals, and shards that an interrupted stage takes up again."""

import io
import os

import numpy as np
import pandas as pd
import pytest

from diagnostics.core import progress
from diagnostics.core.progress import Shards


def test_shards_give_back_what_was_kept_in_the_order_asked(tmp_path, at_once):
    first = Shards(tmp_path / "pass")
    first.add([4, 2], {"x": np.array([0.1, -0.0]), "y": np.array([np.nan, np.inf])})
    first.add([7], {"x": np.array([1e-300]), "y": np.array([-np.inf])})
    again = Shards(tmp_path / "pass")
    assert again.take([2, 7, 4]).x.tolist() == [-0.0, 1e-300, 0.1] and np.signbit(
        again.take([2]).x.iloc[0]
    )
    assert again.take([7, 4]).y.iloc[0] == -np.inf and np.isnan(again.take([7, 4]).y.iloc[1])
    assert again.take([2, 3]) is None and Shards(tmp_path / "other").take([2]) is None


def test_a_damaged_shard_is_left_out(tmp_path, at_once, caplog):
    shards = Shards(tmp_path)
    shards.add([0], {"x": np.array([1.0])})
    shards.add([1], {"x": np.array([2.0])})
    path = next(path for path in tmp_path.iterdir() if pd.read_parquet(path).row[0] == 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = Shards(tmp_path)
    assert again.take([0]).x.tolist() == [1.0] and again.take([1]) is None
    assert f"{path} is damaged and left out" in caplog.text


def test_shards_wait_until_a_write_is_worth_it(tmp_path):
    shards = Shards(tmp_path)
    shards.add([0], {"x": np.array([1.0])})
    assert os.listdir(tmp_path) == []
    shards._since -= progress.SHARD_SECONDS
    shards.add([1], {"x": np.array([2.0])})
    assert len(os.listdir(tmp_path)) == 1 and Shards(tmp_path).take([0, 1]).x.tolist() == [1.0, 2.0]


def test_a_full_disk_does_not_stop_a_stage_that_could_end(tmp_path, at_once, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    Shards(tmp_path).add([0], {"x": np.array([1.0])})
    assert (
        "cannot be written (No space left on device): a killed run would do this part again"
        in caplog.text
    )
    assert os.listdir(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, quiet, shown",
    [(Terminal, False, True), (io.StringIO, False, False), (Terminal, True, False)],
)
def test_progress_is_for_terminals_and_not_for_logs(stream, quiet, shown, monkeypatch):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_quiet", False)
    progress.set_quiet(quiet)
    with progress.progress(total=40, description="score") as bar:
        bar.update(10)
        bar.refresh()
        text = bar.format_dict | {"rate": 5.0, "elapsed": 2.0}
        line = (
            bar.format_meter(**{key: value for key, value in text.items() if key != "ncols"})
            if shown
            else ""
        )
    assert bool(stderr.getvalue()) == shown
    assert ("10/40 [00:02<00:06,  5.00 positions/s]" in line) == shown
