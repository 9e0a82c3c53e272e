"""The token table: the files that hold its columns, joined to `tokens.parquet`."""

from __future__ import annotations

from diagnostics.core.checkpoint import join_checkpoint
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_parquet
from diagnostics.pipeline.run import Run

GAIN_KEYS = ("context_id", "position")


def join_tokens(run: Run) -> None:
    """Join the files that hold its columns to tokens.parquet."""
    tokens = read_parquet(run.require("scores.parquet"))
    for name in ("gains.parquet", "first_order.parquet", "training_gains.parquet"):
        if run.path(name).exists() and run.as_written(name):
            added = read_parquet(run.path(name))
            added = added.drop(columns=[column for column in added if column.endswith("_step_0")])
            tokens = tokens.merge(added, on=list(GAIN_KEYS), how="left", validate="one_to_one")
    if run.path("after.parquet").exists() and run.as_written("after.parquet"):
        tokens = join_checkpoint(tokens, read_parquet(run.path("after.parquet")))
    with run.joining("tokens.parquet"):
        write_parquet(run.path("tokens.parquet"), validate_tokens(tokens))
