"""What a run found, in sentences: tables and a manifest in, plain text out.

Every number comes from a table or the manifest, every claim from an interval, never from a point: a
criterion is said to lead another only where a paired interval, or two intervals that do not meet, say so.
Both gains are always named side by side, since the order of criteria can turn over between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

WORDS = {"gain": "gain in nats", "relative_gain": "relative gain"}
NOT_SIGNALS = ("random", "full")
"""Criteria that hold no signal of the teacher; they never lead a ranking."""
REFERENCE = "teachability"
"""The criterion under test (arXiv 2605.26844); always named beside the leader."""


@dataclass(frozen=True)
class Material:
    """What a run directory holds."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tokens: pd.DataFrame | None = None

    def table(self, name: str) -> pd.DataFrame | None:
        """The table of that name where the run has one with rows."""
        table = self.tables.get(name)
        return None if table is None or table.empty else table

    def stage(self, name: str) -> dict[str, Any]:
        """Settings and facts of a stage in one dictionary; facts win."""
        stage = self.manifest.get("stages", {}).get(name, {})
        return {**stage.get("settings", {}), **(stage.get("facts") or {})}

    @property
    def level(self) -> float:
        """Level of the intervals."""
        return float(self.stage("analyze").get("level", 0.95))


def models(material: Material) -> dict[str, str]:
    """Names of the pair, the student and the teacher, as far as the manifest has them."""
    facts = {**material.stage("score"), **material.stage("rollout")}
    names = {}
    for role in ("pair", "student", "teacher"):
        value = facts.get(role)
        value = value.get("name") if isinstance(value, dict) else value
        if value:
            names[role] = str(value)
    return names


def title(material: Material) -> str:
    """One line that names the pair."""
    names = models(material)
    if names.get("pair") not in (None, "custom"):
        return f"The {names['pair']} pair: which of the teacher's signals can the student learn from?"
    if "student" in names and "teacher" in names:
        return f"Which of {names['teacher']}'s signals can {names['student']} learn from?"
    return "Which of the teacher's signals can the student learn from?"


def answer(material: Material) -> list[str]:
    """The finding in about five sentences with numbers: what was done, what led, Q3, how sure, what would change it."""
    sentences = [setup(material), *(leader(material, outcome) for outcome in WORDS), turnover(material), q3(material), certainty(material)]
    return [sentence for sentence in sentences if sentence]


def number(value: float, digits: int = 2) -> str:
    """Significant digits without exponent where that stays short; an en dash for what is undefined."""
    if not np.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def signed(value: float) -> str:
    """A correlation with its sign and two decimals."""
    return "–" if not np.isfinite(value) else f"{value:+.2f}".replace("-", "−")


def setup(material: Material) -> str:
    """What was done: loss, optimiser, prompts, positions, and what the step did to its own loss."""
    step, table = material.stage("probe"), material.table("correlations")
    if not step and table is None:
        return ""
    optimizer = {"adamw": "AdamW's first step", "sgd": "one gradient step"}.get(step.get("optimizer"), "one step")
    loss = f" of the {str(step['loss']).replace('_', ' ')} loss" if "loss" in step else ""
    text = f"The student took {optimizer}{loss}"
    if table is not None:
        text += " on " + " and was re-scored there and on ".join(_halves(table))
    if {"loss_before", "realised_drop", "predicted_drop"} <= step.keys():
        share = step["realised_drop"] / step["predicted_drop"] if step["predicted_drop"] else float("nan")
        text += (f"; its loss fell from {number(step['loss_before'], 3)} to {number(step['loss_before'] - step['realised_drop'], 3)} nats a position"
                 + (f", {share:.0%} of the first-order prediction" if np.isfinite(share) else ""))
    return text + "."


def _halves(table: pd.DataFrame) -> Iterator[str]:
    names = {"step": "step prompts", "held_out": "held-out prompts"}
    both = {"step", "held_out"} <= set(table.split)
    for split, rows in sorted(table.groupby("split"), key=lambda item: item[0] != "step"):
        if split == "all" and both:
            continue
        yield f"{int(rows.prompts.max()):,} {names.get(split, 'prompts')} ({int(rows.positions.max()):,} positions)"


def preferred_split(table: pd.DataFrame) -> str:
    """Held-out positions where there are any: they never carried the loss."""
    return "held_out" if (table.split == "held_out").any() else str(table.split.iloc[0])


def ranked(material: Material, outcome: str) -> pd.DataFrame:
    """Spearman rows of one outcome on the preferred split, best first, without criteria that hold no signal."""
    table = material.table("correlations")
    if table is None:
        return pd.DataFrame()
    rows = table[(table.method == "spearman") & (table.outcome == outcome) & ~table.criterion.isin(NOT_SIGNALS)]
    if rows.empty:
        return rows
    rows = rows[rows.split == preferred_split(rows)].dropna(subset=["estimate"])
    return rows.sort_values("estimate", ascending=False, kind="stable", ignore_index=True)


def leader(material: Material, outcome: str) -> str:
    """Which criterion follows one gain best, beside teachability and the placebo."""
    rows = ranked(material, outcome)
    if rows.empty:
        return ""
    first = rows.iloc[0]
    where = "held-out " if first.split == "held_out" else ""
    text = f"By {WORDS[outcome]}, {_name(first.criterion)} follows the {where}positions best: Spearman {_interval(first, material.level)}, placebo {signed(first.placebo)}"
    others = rows[rows.criterion == REFERENCE]
    if first.criterion != REFERENCE and len(others):
        other = others.iloc[0]
        text += f"; {REFERENCE} reaches {_interval(other, None)}, placebo {signed(other.placebo)}"
    return f"{text}; {_challengers(material, rows, outcome)}."


def _name(criterion: str) -> str:
    return str(criterion).replace("_", " ")


def _interval(row, level: float | None) -> str:
    what = "" if level is None else f"{level:.0%} interval "
    return f"{signed(row.estimate)} ({what}{signed(row.low)} to {signed(row.high)})"


def _challengers(material: Material, rows: pd.DataFrame, outcome: str) -> str:
    """Who cannot be told apart from the leader: by paired differences where the run has them, else by intervals."""
    first, rest = rows.iloc[0], rows.iloc[1:]
    paired = material.table("differences")
    if paired is None:
        close, alone = rest[rest.high >= first.low].criterion.tolist(), "no other criterion's interval reaches it"
    else:
        close, alone = _not_apart(paired, first, rest.criterion, outcome), "in paired draws it leads every other criterion"
    if not close:
        return alone
    shown = ", ".join(map(_name, close[:3])) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
    return f"not told apart from it: {shown}"


def _not_apart(paired: pd.DataFrame, first, names: Iterable[str], outcome: str) -> list[str]:
    """Those of `names` over which the leader's lead has an interval with zero in it, or none."""
    same = paired[(paired.outcome == outcome) & (paired.split == first.split) & (paired.method == first.method)]
    ahead = set(same.other[(same.criterion == first.criterion) & (same.low > 0)])
    ahead |= set(same.criterion[(same.other == first.criterion) & (same.high < 0)])
    return [name for name in names if name not in ahead]


def turnover(material: Material) -> str:
    """Whether both gains agree on the order, seen from raw divergence and teachability."""
    tables = [ranked(material, outcome) for outcome in WORDS]
    if any(table.empty for table in tables):
        return ""
    first, second = (table.criterion.iloc[0] for table in tables)
    places = [{name: i + 1 for i, name in enumerate(table.criterion)} for table in tables]
    if first == second:
        return f"Both gains put {_name(first)} first, so the recommendation does not hinge on how gain is defined."
    return (f"The order turns over with the definition of gain: {_name(first)} is first of {len(places[0])} in nats and "
            f"{_ordinal(places[1].get(first))} in relative terms, {_name(second)} first in relative terms and {_ordinal(places[0].get(second))} in nats.")


def _ordinal(place: int | None) -> str:
    if place is None:
        return "absent"
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def q3(material: Material) -> str:
    """The contrast of compatible against incompatible positions where the student is confident and wrong."""
    table = material.table("q3_contrast")
    if table is None:
        return ""
    rows = table[(table.score == "compatibility") & table.outcome.isin(list(WORDS)) & (table.groups == "tertile")]
    if rows.empty:
        return ""
    rows = rows[rows.split == preferred_split(rows)]
    parts = [_q3_part(rows[rows.outcome == outcome].iloc[0], outcome) for outcome in WORDS if (rows.outcome == outcome).any()]
    return "Among confident, wrong positions (Q3), the third with the highest compatibility gained " + ", and ".join(parts) + "."


def _q3_part(row, outcome: str) -> str:
    unit = " nats" if outcome == "gain" else " of the divergence"
    direction = "more" if row.difference >= 0 else "less"
    clear = "" if row.low > 0 or row.high < 0 else ", which leaves the sign open"
    return (f"{number(abs(row.difference))}{unit} {direction} than the third with the lowest "
            f"({number(row.low)} to {number(row.high)}{clear})")


def certainty(material: Material) -> str:
    """What the intervals rest on and what would change the answer."""
    rows = ranked(material, "gain")
    if rows.empty:
        return ""
    half = float(((rows.high - rows.low) / 2).median())
    chosen = material.table("calibration")
    step = ""
    if chosen is not None and chosen.chosen.astype(bool).any():
        step = f" (here {number(float(chosen[chosen.chosen.astype(bool)].step_size.iloc[0]))})"
    return (f"The correlations' intervals come from resampling {int(rows.prompts.max()):,} prompts and typically reach {number(half, 1)} to either side, "
            f"so smaller differences stay open; another loss, optimiser or step size{step}, another split or more prompts could change "
            "the order, and one step is not a training run.")
