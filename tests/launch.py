"""Commands that tests start in several processes."""

import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path

SECONDS = 300
"""Longest wait for a process to end."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forked(processes, work, *arguments):
    """Do work in several copies of this process, which has loaded torch, and return their exit
    codes. As under torchrun, all are ended as soon as one has failed.
    """
    launched = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def copy(rank):
        settings = {**launched, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in settings.items()})
        work(*arguments)
        os._exit(0)  # nothing of the tests' own process is ended here

    context = multiprocessing.get_context("fork")
    copies = [context.Process(target=copy, args=(rank,)) for rank in range(processes)]
    for each in copies:
        each.start()
    while running := [each for each in copies if each.exitcode is None]:
        if any(each.exitcode for each in copies):  # also one that failed before the first wait
            for each in running:
                each.kill()
        if not connection.wait([each.sentinel for each in running], timeout=SECONDS):
            for each in running:
                each.kill()
            raise TimeoutError(f"{len(running)} of {processes} copies did not end in {SECONDS} s")
    return [each.exitcode for each in copies]


def torchrun(processes, *arguments, seconds=SECONDS):
    """Run a module in several processes of this repository, and return what they said.

    A process that is aborted says where each of its threads was.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        f"--master-port={port}",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        timeout=seconds,
    )


def require_success(done):
    """Fail with what the processes said first: torchrun's own account comes after it."""
    said = done.stderr
    short = said if len(said) < 12_000 else f"{said[:9_000]}\n[…]\n{said[-3_000:]}"
    assert done.returncode == 0, short
