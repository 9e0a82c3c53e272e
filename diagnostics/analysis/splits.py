"""The populations of a token table, their outcomes, scores and controls, and rows of results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import OWN, step_count
from diagnostics.core.schema import column, require_columns
from diagnostics.core.settings import with_settings
from diagnostics.criteria import normalize, relative_position

NULL_OUTCOME = "gain_permuted"
"""The gain after a step towards a permuted teacher, which tables show beside the gain."""
STUDY_OUTCOMES = ("context_gain", "gain", "reverse_gain", "relative_gain")
"""Outcomes of the study: nats first; the relative gain is there for comparison."""
STATED_GAIN = "relative_gain_released"
"""The gain of the released scripts' own tables."""
HELD_COLUMNS = ("student_entropy", "forward_kl", "position", "response_length")


@dataclass(frozen=True)
class Split:
    """A population of positions with the draws of their prompts.

    Attributes:
        name: `held_out`, `step` or `all`.
        mask: [N] the positions, over the whole table.
        prompts: The prompts of the population's n positions.
        prefix: What the names of its outcome columns begin with: `own_` for the positions that
            carried loss in a fold table.
    """

    name: str
    mask: np.ndarray
    prompts: PromptClusters
    prefix: str = ""

    def values(self, tokens: pd.DataFrame, name: str) -> np.ndarray:
        """[n] a column on the population as float64; NaN where it is not finite or is missing."""
        entry = column(name)
        if entry is not None and entry.stage == "outcome" and not name.startswith(self.prefix):
            name = self.prefix + name
        if name not in tokens:
            return np.full(int(self.mask.sum()), np.nan)
        values = tokens[name].to_numpy(dtype=np.float64)[self.mask]
        return np.where(np.isfinite(values), values, np.nan)


@with_settings(bootstrap=Bootstrap)
def splits(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> Iterator[Split]:
    """Divide a token table into its populations, the primary one first.

    Args:
        tokens: A token table, one row per response position, with `prompt_id`.
        bootstrap: Draws, level and seed; every population has draws of its own.

    Yields:
        For a fold table, `held_out` (every position, after the steps on other folds) and `step`
        (every position, after the step on its own fold). For a table of one step, the positions
        that the column `split` names `held_out` and `step`; `all` where it has not both.

    Raises:
        DiagnosticsError: If the table has no row, or a row has no prompt_id.
    """
    _require_prompts(tokens)
    everywhere = np.ones(len(tokens), dtype=bool)
    if step_count(tokens) > 1:
        populations = {"held_out": (everywhere, ""), "step": (everywhere, OWN)}
    elif "split" in tokens and {"step", "held_out"} <= set(tokens["split"]):
        held_out = (tokens["split"] == "held_out").to_numpy(dtype=bool)
        on_step = (tokens["split"] == "step").to_numpy(dtype=bool)
        populations = {"held_out": (held_out, ""), "step": (on_step, "")}
    else:
        populations = {"all": (everywhere, "")}
    for name, (mask, prefix) in populations.items():
        prompts = PromptClusters(tokens["prompt_id"][mask], bootstrap=bootstrap)
        yield Split(name, mask, prompts, prefix)


def _require_prompts(tokens: pd.DataFrame) -> None:
    require_columns(tokens, ["prompt_id"], what="the analysis")
    if not len(tokens):
        raise DiagnosticsError(
            "The token table has no rows, so there is nothing to analyze. Score a bank with"
            " responses."
        )
    nameless = int(tokens["prompt_id"].isna().sum())
    if nameless:
        raise DiagnosticsError(
            f"{nameless} positions have no prompt_id, so their cluster is not known. Fill it in, or"
            " drop them."
        )


def outcomes(tokens: pd.DataFrame) -> list[str]:
    """Names of the outcomes that the table holds.

    A released relative gain, which has no floor, counts where there is no other outcome: a table of
    other programs may state nothing else.

    Raises:
        DiagnosticsError: If it holds none.
    """
    present = [name for name in STUDY_OUTCOMES if name in tokens]
    present = present or [name for name in (STATED_GAIN,) if name in tokens]
    if not present:
        raise DiagnosticsError(
            f"The analysis needs an outcome, one of {', '.join(STUDY_OUTCOMES)}; the table has "
            f"{', '.join(map(str, tokens.columns[:40]))}. Run the probe on it first."
        )
    return present


def outcomes_and_null(tokens: pd.DataFrame) -> list[str]:
    """Names of the outcomes that the table holds, with the permuted gain right after the gain.

    Raises:
        DiagnosticsError: If it holds none.
    """
    found = outcomes(tokens)
    if NULL_OUTCOME in tokens:
        found.insert(found.index("gain") + 1 if "gain" in found else len(found), NULL_OUTCOME)
    return found


def same_positions(parts: Iterable[Split]) -> Iterator[list[Split]]:
    """Populations that hold the same positions, and so the same prompts and draws, together."""
    groups: dict[bytes, list[Split]] = {}
    for split in parts:
        groups.setdefault(np.packbits(split.mask).tobytes(), []).append(split)
    yield from groups.values()


def scores(
    tokens: pd.DataFrame, names: Iterable[str] | None = None, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Score every position of a table with each criterion.

    Args:
        tokens: A token table with N rows.
        names: Criteria; None takes the usual ones that the table's columns allow, except those of
            kind *all*, because a constant correlates with nothing.
        seed: Seed of the criterion `random`.

    Returns:
        Scores [N] by criterion.
    """
    if names is None:
        names = [name for name in registry.usual(tokens) if registry.find(name).kind != "all"]
    return {name: registry.score_criterion(tokens, name, seed=seed) for name in names}


def controls(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """The covariates that partial correlations and matching hold fixed.

    Returns:
        [N] each: the normalized student entropy h, the normalized forward KL d, and t/(T - 1).

    Raises:
        DiagnosticsError: If a column for one of them is missing.
    """
    require_columns(tokens, HELD_COLUMNS, what="Holding entropy, divergence and position fixed")
    h, d = (normalize(tokens[name]) for name in ("student_entropy", "forward_kl"))
    return {"student_entropy": h, "forward_kl": d, "position": relative_position(tokens)}


def row(estimate: Estimate, level: float, *, named: str = "estimate", **more) -> dict:
    """Make a row of a results table from an estimate.

    Args:
        estimate: The estimate.
        level: Coverage of its interval.
        named: Name of the column that holds the value.
        more: Further columns, placed between the interval and the counts.

    Returns:
        The value, low, high, whatever is in `more`, positions, prompts and steps.
    """
    low, high = estimate.interval(level)
    return (
        {named: estimate.value, "low": low, "high": high}
        | more
        | {
            "positions": estimate.positions,
            "prompts": estimate.prompts,
            "steps": estimate.steps,
        }
    )


def table(
    found: Mapping[tuple, Estimate],
    names: Iterable[str],
    level: float,
    *,
    named: str = "estimate",
    tested: bool = False,
    more: Mapping[tuple, dict] | None = None,
) -> pd.DataFrame:
    """Make a table of results, one row per estimate.

    Args:
        found: Estimates by key.
        names: Columns that hold the parts of a key.
        level: Coverage of the intervals.
        named: Name of the column that holds the values.
        tested: Whether the two-sided p value against 0 is a column.
        more: Further columns by key, placed between the interval and the counts.

    Returns:
        The key's columns, then those of `row`.
    """
    names = tuple(names)
    rows = []
    for key, estimate in found.items():
        further = {"p_value": estimate.p_value} if tested else {}
        further |= (more or {}).get(key, {})
        rows.append(
            dict(zip(names, key, strict=True)) | row(estimate, level, named=named, **further)
        )
    return pd.DataFrame(rows)
