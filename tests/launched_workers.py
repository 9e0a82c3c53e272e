"""Work for the workers of test_workers.py, and a process that has two of them: `python -m
tests.launched_workers` prints their ids.
"""

import os
import time

from diagnostics.core.errors import DiagnosticsError
from diagnostics.training.workers import share_out


def double(task):
    return 2 * task, os.environ.get("OF_THE_WORKER"), os.getpid()


def fail(task):
    if task == "wrong":
        raise DiagnosticsError("That was wrong.")
    if task == "memory":
        raise MemoryError("too much\nof it")
    if task == "disk":
        raise OSError(28, "No space left on device", "a.parquet")
    if task == "odd":
        return {}["nothing"]
    os._exit(7)


def stay(task):
    with open(task, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(3600)


if __name__ == "__main__":
    import signal
    import sys

    # A shell starts what runs in its background with SIGINT ignored, and Python leaves that so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    list(share_out(stay, sys.argv[1:], [{}, {}]))
