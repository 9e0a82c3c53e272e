"""Readable names for columns, criteria and outcomes, as figures and sentences write them.

This module also holds the choice of the split that a figure or a sentence shows where it has room
for one. It needs no matplotlib, so that the summary loads quickly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import pandas as pd

OUTCOMES = {
    "gain": "gain",
    "relative_gain": "relative gain",
    "reverse_gain": "reverse gain",
    "positive_gain": "positive gain",
    "relative_gain_released": "relative gain, released form",
    "first_order_gain": "first-order gain",
    "gain_permuted": "gain, permuted teacher",
    "context_gain": "context gain",
}
"""Readable name of each form of the gain."""
UNITS = {
    "gain": "nats",
    "relative_gain": "of D",
    "reverse_gain": "nats",
    "positive_gain": "nats",
    "first_order_gain": "nats",
    "gain_permuted": "nats",
    "context_gain": "nats",
}
"""Unit of each form of the gain; D is the forward KL before the step."""
MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "accuracy": "accuracy",
    "accuracy_greedy": "greedy accuracy",
}
"""Readable name of what an evaluation on held-out prompts measures."""


LABELS: ContextVar[Mapping[str, str]] = ContextVar("labels", default=MappingProxyType({}))
"""Names that the reader of the current figure asked to see in other words."""


def labelled(name: str, words: str) -> str:
    """The words for a name, or what the reader asked to see in their place."""
    return str(LABELS.get().get(name, words))


def readable(name: str) -> str:
    """A column's, loss's or criterion's name as a reader should see it."""
    if name in LABELS.get():
        return str(LABELS.get()[name])
    text = OUTCOMES.get(name, str(name).replace("_", " "))
    text = re.sub(r"\b(kl|js|tip|jsd|q[1-4])\b", lambda match: match.group(0).upper(), text)
    return (
        text.replace("topk", "top-K")
        .replace("jaccard", "Jaccard")
        .replace("bhattacharyya", "Bhattacharyya")
    )


def with_unit(outcome: str) -> str:
    """The readable name of an outcome, followed by its unit in brackets."""
    return f"{readable(outcome)} ({UNITS[outcome]})" if outcome in UNITS else readable(outcome)


CONTROLLED = ("gain", "context_gain")
"""The two outcomes that stand side by side: the gain, and what of it a permuted teacher does not
give.
"""
BOTH = ("gain", "relative_gain")
"""What stands side by side in a table without a permuted teacher."""


def shown_outcomes(table: pd.DataFrame, outcomes: Sequence[str] | None = None) -> list[str]:
    """The outcomes to show: those that are asked for; otherwise gain and context gain, or gain and
    relative gain where the table has no context gain.
    """
    if outcomes is not None:
        return list(outcomes)
    controlled = "outcome" in table and (table.outcome == "context_gain").any()
    return list(CONTROLLED if controlled else BOTH)


SPLITS = {
    "held_out": "held-out positions",
    "step": "positions that carried the loss",
    "all": "all positions",
    "fresh": "fresh responses",
}
"""Readable name of each population."""


def steps_of(table: pd.DataFrame) -> int | None:
    """Number of step batches behind a table's intervals; None where it does not say."""
    known = table["steps"].dropna() if "steps" in table else ()
    return int(max(known)) if len(known) else None


def steps(horizon: float) -> str:
    """A horizon in words: 0 is the one step whose norm is the same for every criterion."""
    count = int(horizon)
    return "one matched step" if count == 0 else f"{count} step{'s' if count != 1 else ''}"


TRUE = (True, "True")
"""A true cell, as a table in memory and as one read from a file has it."""


def decisive_horizon(table: pd.DataFrame) -> int:
    """The horizon at which the cells of a decision are judged: the one that its column primary
    marks, otherwise the largest that is not overfitted in every cell, otherwise the smallest.
    """
    chosen = table.horizon[table.primary.isin(TRUE)] if "primary" in table else ()
    if len(chosen):
        return int(max(chosen))
    over = table.overfitted.isin(TRUE) if "overfitted" in table else table.horizon != table.horizon
    usable = table.horizon[~over]
    return int(usable.max() if len(usable) else table.horizon.min())


def decisive_measure(table: pd.DataFrame) -> str:
    """The divergence by which the cells of a decision are judged: the one that its column primary
    marks, otherwise the table's first.
    """
    chosen = table.measure[table.primary.isin(TRUE)] if "primary" in table else ()
    return str(chosen.iloc[0] if len(chosen) else table.measure.iloc[0])


def of_all_rollouts(table: pd.DataFrame) -> pd.DataFrame:
    """The rows over all rollouts, where a verifier split others into right and wrong ones."""
    return table[table.rollouts == "all"] if "rollouts" in table else table


def preferred_split(table: pd.DataFrame) -> str:
    """The split to show where there is room for one.

    Held-out positions come first, because they never carried the loss; then all positions; then
    whichever split the table begins with.
    """
    return next(
        (name for name in ("held_out", "all") if (table.split == name).any()),
        str(table.split.iloc[0]),
    )
