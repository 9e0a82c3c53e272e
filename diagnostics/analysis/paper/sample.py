"""The positions and outcomes of the controlled statistics, and how each is estimated.

    checkpoint   forward_kl - forward_kl_after, the gain of the trained student in nats
    context      context_gain, the probe's held-out gain less that of a permuted teacher, in nats

Where the table knows which prompts a checkpoint was trained on (`seen`), positions of the others
count alone, for both outcomes. Scores and quadrants are normalized and cut over the whole table,
and thirds, quarters and pairs are made among the positions that count; all of it anew in every draw
of prompts (`cuts`), and without each step where there are folds (`step_batches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import cuts
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.paper.bank import column_at
from diagnostics.analysis.robustness import BASE_K, known_k
from diagnostics.analysis.splits import Split
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import step_count
from diagnostics.core.schema import require_columns

Outcome = Literal["checkpoint", "context"]
CHECKPOINT_GAIN = "checkpoint_gain"
COLUMNS: dict[str, str] = {"checkpoint": CHECKPOINT_GAIN, "context": "context_gain"}
"""Column of each outcome in the table of a sample."""
KEYS = ("row", "quantity", "k", "budget")
LONG = [*KEYS, "estimate", "low", "high", "n"]
"""Columns of every table of the paper, released or controlled."""
Key = tuple[str, str, float, float]
NEEDED = ("context_id", "prompt_id", "position", "response_length", "student_entropy", "forward_kl")
"""Columns without which no table of the paper can be made."""


def reasons(tokens: pd.DataFrame) -> dict[str, str]:
    """By outcome why a token table lacks it; outcomes that it has are not among the keys."""
    found = {}
    if "forward_kl_after" not in tokens:
        found["checkpoint"] = (
            "there is no trained student: run `opd-diagnostics score --after CHECKPOINT`, or"
            " `opd-diagnostics paper --train`"
        )
    elif step_count(tokens) > 1 and "student_entropy_after" not in tokens:
        # `core.folds.combine` writes forward_kl_after from the probe's own gains.
        found["checkpoint"] = (
            "forward_kl_after is the probe's own: run `opd-diagnostics score --after CHECKPOINT`"
        )
    if "context_gain" not in tokens:
        found["context"] = "there is no probe with a permuted teacher: run `opd-diagnostics probe`"
    elif step_count(tokens) < 2 and not _has_split(tokens):
        found["context"] = "the probe has no folds, so no context gain is held out"
    return found


def _has_split(tokens: pd.DataFrame) -> bool:
    return "split" in tokens and {"step", "held_out"} <= set(tokens["split"])


@dataclass(frozen=True)
class Sample:
    """Positions with the outcomes that are estimated on them.

    Attributes:
        tokens: Token table of N rows, with the column of each outcome.
        mask: [N] the positions that count.
        outcomes: Names of the outcomes.
        kind: `unseen`, `seen` or `all`: what the checkpoint's training knows of the positions;
            `held_out` where one step left them out.
    """

    tokens: pd.DataFrame
    mask: np.ndarray
    outcomes: tuple[str, ...]
    kind: str = "all"

    @property
    def columns(self) -> list[str]:
        """Column of each outcome."""
        return [COLUMNS[name] for name in self.outcomes]

    def split(self, tokens: pd.DataFrame, bootstrap: Bootstrap) -> Split:
        """The positions as a population of a table of the same rows."""
        prompts = PromptClusters(tokens["prompt_id"][self.mask], bootstrap=bootstrap)
        return Split(self.kind, self.mask, prompts)


def sample(tokens: pd.DataFrame, outcome: str) -> Sample:
    """The positions on which one outcome is estimated.

    Args:
        tokens: A token table, one row per response position.
        outcome: `checkpoint` or `context`.

    Raises:
        DiagnosticsError: If the outcome is unknown, the table lacks it or a column that every table
            of the paper needs, or no row is left.
    """
    if outcome not in get_args(Outcome):
        raise DiagnosticsError(
            f"An outcome of the paper's controlled tables is one of {', '.join(get_args(Outcome))};"
            f" got {outcome!r}. Name one of them."
        )
    require_columns(tokens, NEEDED, what="The paper's controlled statistics")
    why = reasons(tokens).get(outcome)
    if why:
        raise DiagnosticsError(f"The outcome {outcome!r} is not in this table: {why}.")
    if outcome == "checkpoint":
        before, after = (
            tokens[name].to_numpy(dtype=np.float64) for name in ("forward_kl", "forward_kl_after")
        )
        tokens = tokens.assign(**{CHECKPOINT_GAIN: before - after})
    mask, kind = _counted(tokens, outcome)
    return Sample(tokens, mask, (outcome,), kind)


def samples(tokens: pd.DataFrame) -> list[Sample]:
    """One sample per set of positions, with every outcome that the table has."""
    lacking = reasons(tokens)
    made = [sample(tokens, name) for name in get_args(Outcome) if name not in lacking]
    if len(made) == 2 and np.array_equal(made[0].mask, made[1].mask):
        return [replace(made[0], outcomes=(*made[0].outcomes, *made[1].outcomes))]
    return made


def _counted(tokens: pd.DataFrame, outcome: str) -> tuple[np.ndarray, str]:
    """The positions that count [N], and which they are."""
    if outcome == "context" and step_count(tokens) < 2:
        return (tokens["split"] == "held_out").to_numpy(dtype=bool), "held_out"
    everywhere = np.ones(len(tokens), dtype=bool)
    if "seen" not in tokens:
        return everywhere, "all"
    seen = tokens["seen"].to_numpy(dtype=bool)
    return (everywhere, "seen") if seen.all() else (~seen, "unseen")


# --- supports


def supports(
    tokens: pd.DataFrame, ks: Iterable[int] | None, names: Iterable[str] = ("compatibility",)
) -> list[int]:
    """The K at which a table has a column; those of `ks`, or all, in ascending order."""
    names = list(names)
    written = {known_k(tokens) or BASE_K}
    for column in map(str, tokens.columns):
        base, _, number = column.rpartition("_k")
        if base in names and number.isdigit():
            written.add(int(number))
    wanted = written if ks is None else {int(k) for k in ks} & written
    return sorted(k for k in wanted if any(column_at(tokens, name, k) in tokens for name in names))


# --- estimates


@dataclass(frozen=True)
class Part:
    """One number of a draw, with what it is computed from.

    Attributes:
        key: Outcome's column, row, quantity, K and budget.
        value: The number.
        n: Positions or pairs.
        groups: Row numbers of the positions of each group that is compared.
    """

    key: tuple
    value: float
    n: int
    groups: tuple[np.ndarray, ...]

    def prompts(self, prompt: np.ndarray) -> int:
        """Number of prompts of the smallest group, given the prompt of each position."""
        return min((len(np.unique(prompt[rows])) for rows in self.groups), default=0)


Statistic = Callable[[Drawn], Iterator[Part]]


def estimates(
    sample: Sample, statistic: Statistic, needs: Iterable[str], bootstrap: Bootstrap
) -> dict[tuple, Estimate]:
    """Estimate every part of a statistic, with everything in it made anew in each draw.

    Args:
        sample: The positions and outcomes.
        statistic: Yields the same parts in the same order for every draw.
        needs: Columns that it reads.
        bootstrap: How the intervals are made.

    Returns:
        Estimates by the parts' keys.
    """
    needs = list(dict.fromkeys(needs))

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        split = sample.split(tokens, settings)
        drawn = cuts.whole(tokens, [split], needs, sample.columns)
        parts = list(statistic(drawn))
        found = cuts.redrawn(
            lambda each: np.array([part.value for part in statistic(each)]),
            tokens,
            [split],
            needs,
            sample.columns,
        )
        return {
            part.key: replace(estimate, positions=part.n, prompts=part.prompts(drawn.prompt))
            for part, estimate in zip(parts, found, strict=True)
        }

    return over_steps(make, sample.tokens, bootstrap, whole=True)


def long_table(
    found: dict[tuple, Estimate], level: float, outcome: str | None = None
) -> pd.DataFrame:
    """Estimates of one outcome in the long form of the paper's tables.

    Args:
        found: Estimates by outcome's column, row, quantity, K and budget.
        level: Coverage of the intervals.
        outcome: The outcome whose estimates are wanted; None takes them all.

    Returns:
        The columns `LONG`, and `prompts`, the number of prompts of each estimate.
    """
    rows = []
    for (column, *key), estimate in found.items():
        if outcome is None or column == COLUMNS[outcome]:
            low, high = estimate.interval(level)
            rows.append((*key, estimate.value, low, high, estimate.positions, estimate.prompts))
    table = pd.DataFrame(rows, columns=[*LONG, "prompts"])
    numbers = ["k", "budget", "estimate", "low", "high"]
    return table.astype(dict.fromkeys(numbers, float))


def mean_of(values: np.ndarray) -> float:
    """Mean of the finite values; NaN without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def finite(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Those of the row numbers at which a value [n] is finite."""
    return rows[np.isfinite(values[rows])]


def outcomes_of(drawn: Drawn) -> Iterator[tuple[str, np.ndarray]]:
    """Column and values [n] of each outcome of a draw."""
    for (_, column), values in drawn.values.items():
        yield column, values


def fine_order(drawn: Drawn, name: str) -> np.ndarray:
    """[n] scores of a criterion in which equals are ordered by its unclipped form.

    They are numbers of blocks of equals in ascending order, NaN where the score is undefined.
    """
    score, raw = (each[: len(drawn.prompt)] for each in registry.score_pairs(drawn.tokens, name))
    raw = np.where(np.isfinite(raw), raw, -np.inf)
    order = np.lexsort((raw, score))
    new = np.zeros(len(order), dtype=bool)
    for key in (score[order], raw[order]):
        new[1:] |= key[1:] != key[:-1]
    found = np.empty(len(order))
    found[order] = np.cumsum(new)
    return np.where(np.isfinite(score), found, np.nan)
