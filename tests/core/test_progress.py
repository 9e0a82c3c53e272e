"""Progress on terminals, and shards that an interrupted stage takes up again."""

import io
import os
import sys

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


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def spoken(monkeypatch):
    """The lines that progress logs, and a clock for stages of the given names on a stream."""
    lines = []
    monkeypatch.setattr(progress, "_quiet", False)
    monkeypatch.setattr(progress.log, "info", lambda text, *args: lines.append(text % args))

    def begin(names, out):
        clock = Clock()
        stages = progress.Stages(names, out=out, clock=clock)
        monkeypatch.setattr(progress, "_stages", stages)
        return stages, clock

    return lines, begin


def test_a_log_has_a_line_every_half_minute_and_one_at_the_end_of_each_stage(spoken):
    lines, begin = spoken
    stages, clock = begin(["score", "probe"], io.StringIO())
    with stages.stage("probe"):
        progress.expect(1000)
        for _ in range(65):  # one position a second
            clock.now += 1
            progress.worked(10)
    assert lines == [
        "stage 2 of 2 (probe), 30 %, about 70 s left",
        "stage 2 of 2 (probe), 60 %, about 40 s left",
        "stage 2 of 2 (probe): done in 65 s",
    ]
    assert stages.out.getvalue() == ""


def test_a_terminal_has_one_line_that_is_written_anew_and_removed(spoken):
    lines, begin = spoken
    stages, clock = begin(["score", "probe"], Terminal())
    with stages.stage("probe"):
        with progress.progress(total=200, description="after the step on fold 1") as bar:
            clock.now += 60
            bar.update(50)
        shown = stages.out.getvalue().rsplit("\r", 1)[1].rstrip()
        stages.clear()
    assert (
        shown
        == ("████░░░░░░░░░░ stage 2 of 2 (probe), 25 %, about 3 min left: after the step on"[:79])
    )
    assert "\n" not in stages.out.getvalue() and stages.out.getvalue().endswith(" \r")
    assert lines == ["stage 2 of 2 (probe): done in 60 s"]


def test_a_stage_of_unknown_length_says_how_long_it_has_taken(spoken):
    lines, begin = spoken
    stages, clock = begin(["report"], io.StringIO())
    with stages.stage("report"):
        clock.now += 31
        stages.tick()
    assert lines[0] == "stage 1 of 1 (report), 31 s so far"


def test_no_share_reaches_the_whole_before_the_end(spoken):
    _, begin = spoken
    stages, _ = begin(["probe"], io.StringIO())
    with stages.stage("probe"):
        progress.expect(10)
        progress.worked(25)
        assert stages.share() == 0.99


def test_passes_of_a_stage_add_up_to_what_it_expects(spoken):
    _, begin = spoken
    stages, _ = begin(["probe"], io.StringIO())
    with stages.stage("probe"):
        progress.expect(40)
        assert list(progress.progress([1, 2, 3, 4], total=4, description="x")) == [1, 2, 3, 4]
        progress.worked(6)
        assert stages.share() == 0.25


def test_quiet_stages_say_nothing_on_the_way(spoken):
    _, begin = spoken
    stages, clock = begin(["probe"], Terminal())
    progress.set_quiet(True)
    with stages.stage("probe"):
        clock.now += 100
        progress.worked(1)
    assert stages.out.getvalue() == ""


def test_outside_a_command_nothing_is_expected():
    progress.expect(10)
    progress.worked(5)
    progress.clear_line()
    assert progress._stages is None


def test_stages_end_where_the_block_ends(monkeypatch):
    monkeypatch.setattr(progress, "_quiet", True)
    with (
        pytest.raises(ValueError, match="no"),
        progress.in_stages(["a"]) as stages,
        stages.stage("a"),
    ):
        raise ValueError("no")
    assert progress._stages is None


@pytest.mark.parametrize("seconds, said", [(8.4, "8 s"), (99.4, "99 s"), (150, "2 min")])
def test_a_time_is_said_as_people_say_it(seconds, said):
    assert progress.duration(seconds) == said and progress.duration(5940) == "1.6 h"


def test_a_notebook_shows_bars_that_need_no_widgets(monkeypatch, capsys):
    class ZMQInteractiveShell:
        pass

    class IPython:
        get_ipython = staticmethod(ZMQInteractiveShell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_quiet", False)
    assert progress.in_notebook()
    with progress.progress(total=4, description="score") as bar:
        assert not bar.disable
        bar.update(2)
        bar.refresh()
    assert "score" in capsys.readouterr().err
    progress.set_quiet(True)
    assert progress.progress(total=4, description="score").disable
