"""Readable names for columns, criteria and outcomes, as figures and sentences write them.

This module also holds the choice of the split that a figure or a sentence shows where it has room
for one. It needs no matplotlib, so that the summary loads quickly.
"""

from __future__ import annotations

import re

import pandas as pd

OUTCOMES = {
    "gain": "gain",
    "relative_gain": "relative gain",
    "reverse_gain": "reverse gain",
    "positive_gain": "positive gain",
    "relative_gain_released": "relative gain, released form",
    "first_order_gain": "first-order gain",
}
"""Readable name of each form of the gain."""
UNITS = {
    "gain": "nats",
    "relative_gain": "of D",
    "reverse_gain": "nats",
    "positive_gain": "nats",
    "first_order_gain": "nats",
}
"""Unit of each form of the gain; D is the forward KL before the step."""
MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "accuracy": "accuracy",
    "accuracy_greedy": "greedy accuracy",
}
"""Readable name of what an evaluation on held-out prompts measures."""


def readable(name: str) -> str:
    """A column's, loss's or criterion's name as a reader should see it."""
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


def preferred_split(table: pd.DataFrame) -> str:
    """The split to show where there is room for one.

    Held-out positions come first, because they never carried the loss; then all positions; then
    whichever split the table begins with.
    """
    return next(
        (name for name in ("held_out", "all") if (table.split == name).any()),
        str(table.split.iloc[0]),
    )
