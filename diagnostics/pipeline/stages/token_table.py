"""The token table: the files that hold its columns, joined to `tokens.parquet`."""

from __future__ import annotations

from diagnostics.core.joined_parts import joined_parts
from diagnostics.core.tables import write_parquet_parts
from diagnostics.pipeline.run import Run

GAIN_KEYS = ("context_id", "position")
ADDED = ("gains.parquet", "first_order.parquet", "training_gains.parquet")
"""Files whose columns the token table has beside those of the scores."""


def join_tokens(run: Run) -> None:
    """Join the files that hold its columns to tokens.parquet."""
    scores = run.require("scores.parquet")

    def written(name: str) -> bool:
        return run.path(name).exists() and run.as_written(name)

    added = [run.path(name) for name in ADDED if written(name)]
    after = run.path("after.parquet") if written("after.parquet") else None
    with run.joining("tokens.parquet"):
        write_parquet_parts(run.path("tokens.parquet"), joined_parts(scores, added, after=after))
