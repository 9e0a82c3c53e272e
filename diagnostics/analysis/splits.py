"""Step and held-out parts of a table, and what a row of a results table says about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.criteria import normalize, relative_position

OUTCOMES = ("gain", "relative_gain", "reverse_gain")
HELD_COLUMNS = ("student_entropy", "forward_kl", "position", "response_length")


@dataclass(frozen=True)
class Split:
    """Some positions of a table with their prompts' draws."""

    name: str
    mask: np.ndarray
    prompts: PromptClusters

    def values(self, tokens: pd.DataFrame, name: str) -> np.ndarray:
        """A column on the split as float64, NaN where it is not finite or the table lacks it."""
        if name not in tokens:
            return np.full(int(self.mask.sum()), np.nan)
        values = tokens[name].to_numpy(dtype=np.float64)[self.mask]
        return np.where(np.isfinite(values), values, np.nan)


def splits(tokens: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> Iterator[Split]:
    """`all`, then `step` and `held_out` where the table has both."""
    require_columns(tokens, ["prompt_id"], what="the analysis")
    if not len(tokens):
        raise DiagnosticsError(
            "The token table has no rows, so there is nothing to analyse. Score a bank with"
            " responses."
        )
    nameless = int(tokens["prompt_id"].isna().sum())
    if nameless:
        raise DiagnosticsError(
            f"{nameless} positions have no prompt_id, so their cluster is not known. Fill it in, or"
            " drop them."
        )
    names = ["all"]
    if "split" in tokens and {"step", "held_out"} <= set(tokens["split"]):
        names += ["step", "held_out"]
    for name in names:
        mask = (
            np.ones(len(tokens), dtype=bool)
            if name == "all"
            else (tokens["split"] == name).to_numpy(dtype=bool)
        )
        yield Split(name, mask, PromptClusters(tokens["prompt_id"][mask], draws=draws, seed=seed))


def outcomes(tokens: pd.DataFrame) -> list[str]:
    """The outcomes that the table holds. Raises DiagnosticsError where it holds none."""
    present = [name for name in OUTCOMES if name in tokens]
    if not present:
        raise DiagnosticsError(
            f"The analysis needs an outcome, one of {', '.join(OUTCOMES)}; the table has "
            f"{', '.join(map(str, tokens.columns[:40]))}. Run the probe on it first."
        )
    return present


def scores(
    tokens: pd.DataFrame, names: Iterable[str] | None = None, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores [N] by criterion over the whole table; all that its columns allow where `names` is
    None.

    `full` is left out then: a constant correlates with nothing.
    """
    if names is None:
        names = [name for name in registry.available(tokens) if registry.find(name).kind != "all"]
    return {name: registry.score_criterion(tokens, name, seed=seed) for name in names}


def controls(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """What partial correlations and matching hold fixed: h, d and t/(T - 1), each [N]."""
    require_columns(tokens, HELD_COLUMNS, what="Holding entropy, divergence and position fixed")
    h, d = (normalize(tokens[name]) for name in ("student_entropy", "forward_kl"))
    return {"student_entropy": h, "forward_kl": d, "position": relative_position(tokens)}


def row(estimate: Estimate, level: float, *, named: str = "estimate", **more) -> dict:
    """Value, interval, whatever is in `more`, and counts, as a table's row."""
    low, high = estimate.interval(level)
    return (
        {named: estimate.value, "low": low, "high": high}
        | more
        | {"positions": estimate.positions, "prompts": estimate.prompts}
    )
