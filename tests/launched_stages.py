"""Command lines one after the other, in each of several processes: `do` where they are copies of
the tests' own process, `launched_stages.py JSON` where torchrun starts them.

Every finished batch is on disk at once, so that there is something to go on from. With a folder of
kept batches and the ranks of some processes, these kill themselves once they have written their
first batch there."""

import json
import os
import signal
import sys

from diagnostics.core import distributed
from diagnostics.core import progress as run_directory
from diagnostics.pipeline.cli import main


def die_in(folder, ranks):
    write = run_directory.Shards._write

    def write_and_die(shards):
        write(shards)
        if shards.folder.name.startswith(folder) and str(distributed.rank()) in ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    run_directory.Shards._write = write_and_die


def do(commands, folder="", ranks=""):
    """Do the commands in this process, and end it where one fails."""
    run_directory.SHARD_SECONDS = 0.0
    if folder:
        die_in(folder, ranks)
    for arguments in commands:
        if main(arguments):
            sys.exit(1)
        distributed.barrier()


if __name__ == "__main__":
    do(json.loads(sys.argv[1]))
