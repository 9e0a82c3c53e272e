"""The token table: the files that hold its columns, joined to `tokens.parquet`."""

from __future__ import annotations

import pandas as pd

from diagnostics.core.joined_parts import joined_parts
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_parquet_parts
from diagnostics.core.types import Bank, read_bank
from diagnostics.pipeline.run import Run

GAIN_KEYS = ("context_id", "position")
"""What rows of the files are joined by."""
ADDED = ("gains.parquet", "first_order.parquet", "training_gains.parquet")
"""Files whose columns the token table has beside those of the scores."""


def scored_bank(run: Run) -> tuple[Bank, pd.DataFrame]:
    """The frozen contexts of a run, and the scores of their positions."""
    bank = read_bank(run.path("contexts.parquet"))
    return bank, validate_tokens(read_parquet(run.path("scores.parquet")))


def join_tokens(run: Run) -> None:
    """Join the files that hold its columns to tokens.parquet."""
    scores = run.require("scores.parquet")

    def written(name: str) -> bool:
        return run.path(name).exists() and run.as_written(name)

    added = [run.path(name) for name in ADDED if written(name)]
    after = run.path("after.parquet") if written("after.parquet") else None
    with run.joining("tokens.parquet"):
        write_parquet_parts(run.path("tokens.parquet"), joined_parts(scores, added, after=after))
