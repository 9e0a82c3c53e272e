import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.training.workers import share_out
from tests.launched_workers import double, fail, stay


def test_tasks_are_shared_out_and_each_worker_has_its_environment():
    found = list(share_out(double, range(7), [{"OF_THE_WORKER": "a"}, {"OF_THE_WORKER": "b"}]))
    assert sorted(value for value, *_ in found) == [0, 2, 4, 6, 8, 10, 12] and {
        name for _, name, _ in found
    } == {"a", "b"}
    assert len({process for *_, process in found}) == 2 and os.getpid() not in {
        process for *_, process in found
    }


@pytest.mark.parametrize(
    "task, kind, message",
    [
        ("wrong", DiagnosticsError, r"^That was wrong\.$"),
        ("memory", MemoryError, r"^too much$"),
        ("disk", OSError, r"No space left on device: 'a\.parquet'$"),
        ("odd", RuntimeError, r"^'nothing'\n.*KeyError"),
        (
            "gone",
            DiagnosticsError,
            (
                r"^A worker ended in the middle of gone \(exit code 7\).*Give the same command"
                r" again, with fewer --workers\.$"
            ),
        ),
    ],
)
def test_an_error_in_a_worker_is_one_here(task, kind, message):
    with pytest.raises(kind, match=f"(?s){message}"):
        list(share_out(fail, [task], [{}]))


def there(process: int) -> bool:
    """The process lives; one that has ended and was not yet collected does not."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition):
    """Until it holds, or the test has waited a minute on a busy machine."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them"
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, how):
    files = [tmp_path / "a", tmp_path / "b"]
    main = subprocess.Popen(
        [sys.executable, "-m", "tests.launched_workers", *map(str, files)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        workers = [int(file.read_text()) for file in files]
        assert all(map(there, workers))
        main.send_signal(how)
        main.wait(60)
        assert wait_for(lambda: not any(map(there, workers)))
    finally:
        main.kill()


def test_a_worker_looks_for_its_parent_where_the_system_does_not_tell(tmp_path):
    """The thread that asks, alone: a process whose parent is another one than it was told ends
    itself.
    """
    code = (
        "import time; from diagnostics.training.workers import _watch; _watch(1 if"
        " __import__('os').getppid() != 1 else 2); time.sleep(3600)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], timeout=60, cwd=Path(__file__).parents[2]
        ).returncode
        == 1
    )


@pytest.mark.slow
def test_whoever_stops_listening_ends_the_workers(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    shared = share_out(stay, [str(tmp_path / "a")], [{}])
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 8)
        with pytest.raises(KeyboardInterrupt):
            next(shared)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / "a").exists() or not there(int((tmp_path / "a").read_text()))
