"""Work shared out among copies of a process: nothing is lost, and nobody is left over."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diagnostics.core import processes
from diagnostics.core.errors import DiagnosticsError

NAMES = [f"name {number}" for number in range(9)]


def test_every_name_is_done_once_whatever_the_number_of_processes():
    for workers in (1, 2, 3, 20):
        done = processes.share_out(NAMES, str.upper, workers)
        assert done == {name: name.upper() for name in NAMES} and list(done) == NAMES
    assert processes.share_out([], str.upper, 2) == {}


def test_what_a_killed_copy_took_is_done_here():
    here = os.getpid()

    def work(name):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    assert processes.share_out(NAMES, work, 3) == {name: name for name in NAMES}


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
        processes.share_out(NAMES, work, 2)
    assert copies
    for copy in copies:
        with pytest.raises(ChildProcessError):
            os.waitpid(copy, os.WNOHANG)


def test_what_is_taken_is_told_and_adds_up():
    """The one who waits sees all names pass, whichever process takes them."""
    for workers in (1, 2):
        told = []
        processes.share_out(list("abcdef"), str.upper, workers, tell=told.append)
        assert sum(told) == 6 and min(told) >= 0


def test_this_process_makes_no_copies_where_others_use_the_cores(monkeypatch):
    monkeypatch.setattr(processes, "_most", 4)
    monkeypatch.setattr(processes, "may_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: range(3))
    assert processes.usable() == 3
    processes.leave_cores_to_others()
    assert processes.usable() == 1


def test_what_is_shared_out_already_is_not_shared_out_again(monkeypatch):
    monkeypatch.setattr(processes, "may_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: range(2))
    assert set(processes.share_out(NAMES, lambda name: processes.usable()).values()) == {1}
    assert set(processes.share_out(NAMES, lambda name: processes.usable(), 1).values()) == {2}


KILLED = """
import os, time
from diagnostics.core.processes import share_out

def work(name):
    if os.getpid() == here:
        time.sleep(1)
        os.kill(here, 9)
    os.write(1, str(os.getpid()).encode())
    time.sleep(60)

here = os.getpid()
share_out(list("ab"), work, 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a report has one process")
def test_a_copy_ends_with_the_process_that_made_it():
    run = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL
    for _ in range(100):
        if not os.path.exists(f"/proc/{int(run.stdout)}"):
            return
        time.sleep(0.1)
    pytest.fail("the copy outlived its parent")
