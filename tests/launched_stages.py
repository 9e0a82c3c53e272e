"""Command lines one after the other, in each of the processes that torchrun starts:
`launched_stages.py JSON [FOLDER RANKS]`.

Every finished batch is on disk at once, so that there is something to go on from. With a folder of
kept batches and some ranks (`scores 0,1`) those processes kill themselves once they have written
their first batch there."""

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


run_directory.SHARD_SECONDS = 0.0
if len(sys.argv) > 2:
    die_in(sys.argv[2], sys.argv[3].split(","))
for arguments in json.loads(sys.argv[1]):
    if main(arguments):
        sys.exit(1)
    distributed.barrier()
