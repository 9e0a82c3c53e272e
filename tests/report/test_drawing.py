"""Figures of a report: the same bytes for any number of processes, and nothing lost with one."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import drawing
from diagnostics.report.run_results import read_run
from tests import study_tables

NAMES = [f"name {number}" for number in range(9)]


def test_every_name_is_done_once_whatever_the_number_of_processes():
    for workers in (1, 2, 3, 20):
        done = drawing.share_out(NAMES, str.upper, workers)
        assert done == {name: name.upper() for name in NAMES} and list(done) == NAMES
    assert drawing.share_out([], str.upper, 2) == {}


def test_what_a_killed_copy_took_is_done_here():
    here = os.getpid()

    def work(name):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    assert drawing.share_out(NAMES, work, 3) == {name: name for name in NAMES}


def test_an_error_in_a_copy_is_raised_here_and_no_process_is_left(monkeypatch):
    fork, copies = os.fork, []

    def forked():
        copies.append(fork())
        return copies[-1]

    monkeypatch.setattr(os, "fork", forked)

    def work(name):
        if name == NAMES[-1]:
            raise DiagnosticsError("said")
        return name

    with pytest.raises(DiagnosticsError, match=r"^said$"):
        drawing.share_out(NAMES, work, 2)
    assert copies
    for copy in copies:
        with pytest.raises(ChildProcessError):
            os.waitpid(copy, os.WNOHANG)


def test_a_report_s_drawings_are_the_same_for_one_and_for_two_processes(tmp_path):
    directory = study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())
    run = read_run(directory)
    one, two = (drawing.draw_all(run, workers=workers) for workers in (1, 2))
    assert one == two and one[0]
    assert all(each.pdf is None for each in one[0].values())


def test_what_is_taken_is_told_and_adds_up():
    """The one who waits sees all names pass, whichever process draws them."""
    for workers in (1, 2):
        told = []
        drawing.share_out(list("abcdef"), str.upper, workers, tell=told.append)
        assert sum(told) == 6 and min(told) >= 0


def test_other_parts_of_a_page_are_made_beside_the_figures_and_are_not_counted_as_such(
    tmp_path, monkeypatch
):
    counted = []

    class Bar:
        def update(self, count):
            counted.append(count)

    @contextlib.contextmanager
    def seen(total, description, unit):
        counted.append(-total)
        yield Bar()

    monkeypatch.setattr(drawing, "progress", seen)
    directory = study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())
    run = read_run(directory)
    others = {"sum": lambda: 3 + 4, "word": lambda: "seven"}
    for workers in (1, 2):
        del counted[:]
        drawn, left_out, made = drawing.draw_beside(run, others, workers=workers)
        assert made == {"sum": 7, "word": "seven"} and list(made) == list(others)
        assert drawn and not set(others) & {*drawn, *left_out}
        assert sum(counted) == 0 and min(counted[1:]) >= 0


def test_what_a_page_needs_is_loaded_without_a_model_library_or_the_parts_of_scipy():
    code = (
        "import sys, diagnostics.report.page;"
        "print([name for name in ('torch', 'scipy.special', 'scipy.spatial', 'scipy.stats')"
        " if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
