"""Command lines one after the other, in each of the processes that torchrun starts: `launched_stages.py JSON`."""

import json
import sys

from diagnostics import parallel
from diagnostics.cli import main

for arguments in json.loads(sys.argv[1]):
    if main(arguments):
        sys.exit(1)
    parallel.barrier()
