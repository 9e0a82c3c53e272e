"""`python -m diagnostics`."""

import sys

from diagnostics.pipeline.cli import main

sys.exit(main())
