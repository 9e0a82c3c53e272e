"""What a run found, in sentences: tables and a manifest in, plain text out.

Every number comes from a table or the manifest, every claim from an interval, never from a point: a
criterion is said to lead another only where a paired interval, or two intervals that do not meet,
say so. Both gains are always named side by side, since the order of criteria can turn over between
them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import claims as claim_tests
from diagnostics.core.types import Bank

WORDS = {"gain": "gain in nats", "relative_gain": "relative gain"}
NOT_SIGNALS = ("random", "full")
"""Criteria that hold no signal of the teacher; they never lead a ranking."""
ENOUGH_CELLS = 6
"""Trainings below which a rank agreement is left to its table: three of them are in order by chance
once in six.
"""
REFERENCE = "teachability"
"""The criterion under test (arXiv 2605.26844); always named beside the leader."""


@dataclass(frozen=True)
class RunResults:
    """What a run directory holds."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    tokens: pd.DataFrame | None = None
    bank: Bank | None = None
    tops: pd.DataFrame | None = None
    """Both models' likeliest tokens, see `tokenview.show`."""
    cautions: tuple[str, ...] = ()
    """What was left out or is in no record, in sentences."""

    def table(self, name: str) -> pd.DataFrame | None:
        """The table of that name where the run has one with rows."""
        table = self.tables.get(name)
        return None if table is None or table.empty else table

    def _repr_html_(self) -> str:
        """What was found, the verdicts, and what there is to look at."""
        shown, _ = claims(self)
        columns = [name for name in ("claim", "outcome", "verdict") if name in shown]
        found = "".join(
            f"<p><b>{question}</b> {html.escape(text)}</p>"
            for question, text in answer(self).items()
        )
        names = ", ".join(f"{name} ({len(table):,})" for name, table in self.tables.items())
        kept = [
            f"{len(self.tokens):,} positions" if self.tokens is not None else "",
            f"{len(self.bank):,} contexts" if self.bank is not None else "",
        ]
        return (
            f"<h4>{html.escape(title(self))}</h4>{found}{shown[columns].to_html(index=False) if len(shown) else ''}"
            f"<p>{html.escape('; '.join([*filter(None, kept), f'tables (rows): {names}']))}</p>"
        )

    def stage(self, name: str) -> dict[str, Any]:
        """Settings and facts of a stage in one dictionary; facts win."""
        stage = self.manifest.get("stages", {}).get(name, {})
        return {**stage.get("settings", {}), **(stage.get("facts") or {})}

    @property
    def level(self) -> float:
        """Level of the intervals."""
        return float(self.stage("analyze").get("level", 0.95))


def models(material: RunResults) -> dict[str, str]:
    """Names of the pair, the student and the teacher, as far as the manifest has them."""
    facts = {**material.stage("score"), **material.stage("rollout")}
    names = {}
    for role in ("pair", "student", "teacher"):
        value = facts.get(role)
        value = value.get("name") if isinstance(value, dict) else value
        if value:
            names[role] = str(value)
    return names


def title(material: RunResults) -> str:
    """One line that names the pair."""
    names = models(material)
    if names.get("pair") not in (None, "custom"):
        return (
            f"The {names['pair']} pair: which of the teacher's signals can the student learn from?"
        )
    if "student" in names and "teacher" in names:
        return f"Which of {names['teacher']}'s signals can {names['student']} learn from?"
    return "Which of the teacher's signals can the student learn from?"


def answer(material: RunResults) -> dict[str, str]:
    """The finding as a handful of questions, each with a short answer in numbers; what the run has
    no table for is left out.
    """
    parts = {
        "What was done?": (setup,),
        "Which signals were learnable?": (signals,),
        "Which criterion, at which budget?": (budget,),
        "Which claims hold?": (judged, q3),
        "What did training say?": (trained, foreseen),
        "How sure, and what would change it?": (certainty,),
    }
    said = {
        question: " ".join(text for part in answers if (text := part(material)))
        for question, answers in parts.items()
    }
    return {question: text for question, text in said.items() if text}


def number(value: float, digits: int = 2) -> str:
    """Significant digits without exponent where that stays short; an en dash for what is
    undefined.
    """
    if not np.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def signed(value: float) -> str:
    """A correlation with its sign and two decimals."""
    return "–" if not np.isfinite(value) else f"{value:+.2f}".replace("-", "−")


def between(value: float, low: float, high: float, *, show=number) -> str:
    """A value with its interval in brackets."""
    return f"{show(value)} ({show(low)} to {show(high)})"


def setup(material: RunResults) -> str:
    """What was done: loss, optimiser, prompts, positions, and what the step did to its own loss."""
    step, table = material.stage("probe"), material.table("correlations")
    if not step and table is None:
        return ""
    optimizer = {"adamw": "AdamW's first step", "sgd": "one gradient step"}.get(
        step.get("optimizer"), "one step"
    )
    loss = f" of the {words(step['loss'])} loss" if "loss" in step else ""
    text = f"The student took {optimizer}{loss}"
    if table is not None:
        text += " on " + " and was re-scored there and on ".join(_halves(table))
    if {"loss_before", "realised_drop", "predicted_drop"} <= step.keys():
        before, drop = step["loss_before"], step["realised_drop"]
        text += (
            f"; its loss of {number(before, 3)} nats a position {'fell' if drop >= 0 else 'rose'}"
            f" by {number(abs(drop))}"
        )
        text += (
            f", {drop / step['predicted_drop']:.0%} of the first-order prediction"
            if step["predicted_drop"]
            else ""
        )
    return text + "."


def _halves(table: pd.DataFrame) -> Iterator[str]:
    names = {"step": "step prompts", "held_out": "held-out prompts"}
    both = {"step", "held_out"} <= set(table.split)
    for split, rows in sorted(table.groupby("split"), key=lambda item: item[0] != "step"):
        if split == "all" and both:
            continue
        yield (
            f"{int(rows.prompts.max()):,} {names.get(split, 'prompts')}"
            f" ({int(rows.positions.max()):,} positions)"
        )


def preferred_split(table: pd.DataFrame) -> str:
    """Held-out positions where there are any: they never carried the loss."""
    return "held_out" if (table.split == "held_out").any() else str(table.split.iloc[0])


def ranked(material: RunResults, outcome: str) -> pd.DataFrame:
    """Spearman rows of one outcome on the preferred split, best first, without criteria that hold
    no signal.
    """
    table = material.table("correlations")
    if table is None:
        return pd.DataFrame()
    rows = table[
        (table.method == "spearman")
        & (table.outcome == outcome)
        & ~table.criterion.isin(NOT_SIGNALS)
    ]
    if rows.empty:
        return rows
    rows = rows[rows.split == preferred_split(rows)].dropna(subset=["estimate"])
    return rows.sort_values("estimate", ascending=False, kind="stable", ignore_index=True)


def signals(material: RunResults) -> str:
    """Which criterion follows each gain best, what teachability reaches, and whether both gains
    agree.
    """
    tables = {outcome: table for outcome in WORDS if not (table := ranked(material, outcome)).empty}
    if not tables:
        return ""
    leaders = [_leader(material, table, outcome) for outcome, table in tables.items()]
    parts = [_sentence("; ".join(leaders)), _reference(tables), _turnover(tables)]
    return " ".join(part for part in parts if part)


def _leader(material: RunResults, rows: pd.DataFrame, outcome: str) -> str:
    first = rows.iloc[0]
    where = {"held_out": "on held-out positions ", "step": "on step positions "}.get(
        first.split, ""
    )
    interval = f"{material.level:.0%} interval {signed(first.low)} to {signed(first.high)}"
    return (
        f"{WORDS[outcome]} {where}follows {_name(first.criterion)} best (Spearman"
        f" {signed(first.estimate)}, {interval}, placebo {signed(first.placebo)};"
        f" {_challengers(material, rows, outcome)})"
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _name(criterion: str) -> str:
    return words(criterion)


def words(name: str) -> str:
    """A column's, loss's or criterion's name in a sentence."""
    return re.sub(
        r"\b(kl|js|jsd|tip)\b", lambda match: match.group(0).upper(), str(name).replace("_", " ")
    )


def _reference(tables: Mapping[str, pd.DataFrame]) -> str:
    """Where teachability stands, wherever it does not lead both."""
    found = {outcome: rows[rows.criterion == REFERENCE] for outcome, rows in tables.items()}
    if any(rows.empty for rows in found.values()) or all(
        rows.index[0] == 0 for rows in found.values()
    ):
        return ""
    rows = {outcome: found[outcome].iloc[0] for outcome in tables}
    parts = []
    for outcome, row in rows.items():
        interval = f"{signed(row.low)} to {signed(row.high)}; placebo {signed(row.placebo)}"
        parts.append(f"{signed(row.estimate)} ({interval}) with {WORDS[outcome]}")
    return f"{REFERENCE.capitalize()} reaches {' and '.join(parts)}."


def _challengers(material: RunResults, rows: pd.DataFrame, outcome: str) -> str:
    """Who cannot be told apart from the leader: by paired differences where the run has them, else
    by intervals.
    """
    first, rest = rows.iloc[0], rows.iloc[1:]
    paired = material.table("differences")
    if paired is None:
        close, alone = (
            rest[rest.high >= first.low].criterion.tolist(),
            "no other interval reaches it",
        )
    else:
        close, alone = (
            _not_apart(paired, first, rest.criterion, outcome),
            "ahead of every other in paired draws",
        )
    if not close:
        return alone
    shown = ", ".join(map(_name, close[:3])) + (
        f" and {len(close) - 3} more" if len(close) > 3 else ""
    )
    return f"not told apart from {shown}"


def _not_apart(paired: pd.DataFrame, first, names: Iterable[str], outcome: str) -> list[str]:
    """Those of `names` over which the leader's lead has an interval with zero in it, or none."""
    same = paired[
        (paired.outcome == outcome)
        & (paired.split == first.split)
        & (paired.method == first.method)
    ]
    ahead = set(same.other[(same.criterion == first.criterion) & (same.low > 0)])
    ahead |= set(same.criterion[(same.other == first.criterion) & (same.high < 0)])
    return [name for name in names if name not in ahead]


def _turnover(tables: Mapping[str, pd.DataFrame]) -> str:
    """Whether both gains agree on who leads."""
    if len(tables) < 2:
        return ""
    orders = [table.criterion.tolist() for table in tables.values()]
    first, second = orders[0][0], orders[1][0]
    if first == second:
        return (
            f"Both gains put {_name(first)} first, so the choice does not hinge on how gain is"
            " defined."
        )
    return (
        f"The order turns over with the definition of gain: {_name(first)} is"
        f" {_place(orders[1], first)} in relative terms, {_name(second)}"
        f" {_place(orders[0], second)} in nats."
    )


def _place(order: list[str], name: str) -> str:
    if name not in order:
        return "unranked"
    place = order.index(name) + 1
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending} of {len(order)}"


def budget(material: RunResults, share: float = 0.05) -> str:
    """What the best criterion and teachability capture of each gain at one budget, against random
    and the oracle.
    """
    table = material.table("selection_curves")
    if table is None:
        return ""
    rows = table[
        np.isclose(table.budget, share)
        & table.outcome.isin(list(WORDS))
        & table.captured_share.notna()
    ]
    if rows.empty:
        return ""
    rows = rows[rows.split == preferred_split(rows)]
    parts = [
        _captured(rows[rows.outcome == outcome], outcome)
        for outcome in WORDS
        if (rows.outcome == outcome).any()
    ]
    return f"With {share:.0%} of the positions, " + "; ".join(parts) + "."


def _captured(rows: pd.DataFrame, outcome: str) -> str:
    best = rows[~rows.criterion.isin(NOT_SIGNALS)].sort_values(
        "captured_share", ascending=False, kind="stable"
    )
    if best.empty:
        return f"no criterion is defined for the {WORDS[outcome]}"
    first, reference = best.iloc[0], best[best.criterion == REFERENCE]
    text = (
        f"{_name(first.criterion)} captures {first.captured_share:.1%} of the {WORDS[outcome]}"
        f" ({first.low:.1%} to {first.high:.1%}; random {first.random_low:.1%} to"
        f" {first.random_high:.1%}, oracle {first.oracle:.1%})"
    )
    if first.criterion != REFERENCE and len(reference):
        text += f", {REFERENCE} {reference.captured_share.iloc[0]:.1%}"
    return text.replace("-", "−")


def q3(material: RunResults) -> str:
    """The contrast of compatible against incompatible positions where the student is confident and
    wrong.
    """
    table = material.table("q3_contrast")
    if table is None:
        return ""
    rows = table[
        (table.score == "compatibility")
        & table.outcome.isin(list(WORDS))
        & (table.groups == "tertile")
    ]
    if rows.empty:
        return ""
    rows = rows[rows.split == preferred_split(rows)]
    parts = [
        _q3_part(rows[rows.outcome == outcome].iloc[0], outcome)
        for outcome in WORDS
        if (rows.outcome == outcome).any()
    ]
    return (
        "Among confident, wrong positions (Q3), the third with the highest compatibility gained"
        f" {' and '.join(parts)} than the third with the lowest."
    )


def _q3_part(row, outcome: str) -> str:
    unit = " nats" if outcome == "gain" else " of their divergence"
    direction = "more" if row.difference >= 0 else "less"
    clear = "" if row.low > 0 or row.high < 0 else ", which leaves the sign open"
    return (
        f"{number(abs(row.difference))}{unit} {direction} ({number(row.low)} to"
        f" {number(row.high)}{clear})"
    )


MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "accuracy": "accuracy",
    "accuracy_greedy": "greedy accuracy",
}


def judged(material: RunResults) -> str:
    """What became of each claim, by each gain and each measure of training."""
    table, _ = claims(material)
    if not {"claim", "outcome", "verdict"} <= set(table.columns):
        return ""
    named = WORDS | MEASURES
    counted = {outcome: _counted(rows) for outcome, rows in table.groupby("outcome", sort=False)}
    parts = [
        f"by {named[outcome]}, {text}{_refuted_by(material, outcome)}"
        for outcome, text in counted.items()
        if outcome in named and text
    ]
    return _sentence("; ".join(parts)) if parts else ""


def _counted(rows: pd.DataFrame) -> str:
    """`C1 and C2 are supported, C4 is refuted`; claims at other budgets than their own are left to
    the cards.
    """
    own = rows[~rows.claim.astype(str).str.contains(" at ")]
    groups = [
        (verdict, own.claim[own.verdict == verdict].drop_duplicates().tolist())
        for verdict in ("supported", "refuted", "inconclusive")
    ]
    return ", ".join(
        f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"
        f" {'is' if len(names) == 1 else 'are'} {verdict}"
        for verdict, names in groups
        if names
    )


def _refuted_by(material: RunResults, measure: str) -> str:
    """The rivals that teachability falls short of at the claim's own budget: one of them is enough
    to refute C5.
    """
    table = material.table("validation_verdicts")
    if table is None:
        return ""
    ahead = table.rival[
        (table.claim == "C5")
        & (table.measure == measure)
        & (table.rival != "all")
        & (table.verdict == "refuted")
    ]
    return f" (by {' and '.join(map(_name, ahead))})" if len(ahead) else ""


def trained(material: RunResults, share: float = 0.05) -> str:
    """What trainings gained over the untouched student, or how one training went."""
    table = material.table("validation_outcomes")
    if table is None:
        return _one_training(material)
    parts = [
        f"in {words} {_gains(table[table.measure == measure], share)}"
        for measure, words in MEASURES.items()
        if measure in ("forward_kl", "accuracy") and (table.measure == measure).any()
    ]
    if not parts:
        return ""
    rows, steps = table[table.criterion != "untouched"], material.stage("validate").get("steps")
    length = f"{steps} steps with" if steps else "Trainings with"
    return (
        f"{length} {int(rows.seeds.max())} seeds, judged on {int(rows.prompts.max()):,} held-out"
        f" prompts, gained over the untouched student {'; '.join(parts)}."
    )


def _gains(rows: pd.DataFrame, share: float) -> str:
    """Full, then at the budget nearest to `share` the best criterion, teachability and random."""
    shown = [
        f"{_gain(row)} on all positions" for row in rows[rows.criterion == "full"].itertuples()
    ]
    share = min(
        rows.budget[rows.criterion == REFERENCE],
        key=lambda budget: abs(budget - share),
        default=share,
    )
    there = rows[
        np.isclose(rows.budget, share) & ~rows.criterion.isin(("full", "untouched"))
    ].dropna(subset=["gain"])
    ranked = there.sort_values("gain", ascending=False, kind="stable")
    first = ranked.head(1).criterion.tolist()
    for name in dict.fromkeys([*first, REFERENCE, "random"]):
        best = " (the most there)" if [name] == first else ""
        shown += [
            f"{_gain(row)} at {share:.0%} by {_name(name)}{best}"
            for row in ranked[ranked.criterion == name].itertuples()
        ]
    return ", ".join(shown)


def _gain(row) -> str:
    return (
        between(row.gain, row.gain_low, row.gain_high)
        if np.isfinite(row.gain_low)
        else number(row.gain)
    )


def _one_training(material: RunResults) -> str:
    """First and last evaluation of a single training."""
    table = material.table("evaluations")
    if table is None or table.step.nunique() < 2:
        return ""
    first, last = (
        table[table.step == step].set_index("measure")
        for step in (table.step.min(), table.step.max())
    )
    parts = [
        f"{words} from {number(first.loc[name, 'mean'])} to"
        f" {between(*last.loc[name, ['mean', 'low', 'high']])}"
        for name, words in MEASURES.items()
        if name in first.index and name in last.index
    ]
    return (
        f"Over {int(table.step.max()):,} steps of training, held-out prompts show "
        + ", ".join(parts)
        + "."
        if parts
        else ""
    )


def foreseen(material: RunResults) -> str:
    """Which offline answer ranked the trainings most as their outcome did, and how far the usual
    ones do.
    """
    table = material.table("validation_agreement")
    if table is None:
        return ""
    rows = (
        table[(table.scope == "within_budget") & (table.y == "trained_forward_kl")]
        .dropna(subset=["kendall"])
        .sort_values("kendall", ascending=False, kind="stable")
    )
    if rows.empty or rows.cells.max() < ENOUGH_CELLS:
        return ""
    usual = rows[
        rows.x.isin(
            ("one_step_gain", "captured_gain", "captured_relative_gain", "intervention_forward_kl")
        )
    ]
    shown = pd.concat([rows.head(1), usual]).drop_duplicates("x")
    parts = [
        f"{words(row.x)} {between(row.kendall, row.low, row.high, show=signed)}"
        for row in shown.itertuples()
    ]
    return (
        f"How far an answer ranked those {int(rows.cells.max())} trainings, each among those of its"
        f" budget, as their gain in forward KL did (Kendall τ): {'; '.join(parts)}."
    )


def training_claims(material: RunResults) -> pd.DataFrame:
    """Claim C5 as rows of verdicts; empty where the verdicts hold it already, or no grid was
    trained.
    """
    table, known = material.table("validation_verdicts"), material.table("verdicts")
    if table is None or (known is not None and known.claim.str.startswith("C5").any()):
        return pd.DataFrame()
    return claim_tests.of_training(table)


def claims(material: RunResults) -> tuple[pd.DataFrame, bool]:
    """Primary verdicts with those of training, and whether the table has others."""
    table = material.table("verdicts")
    table = (
        pd.DataFrame() if table is None or not {"claim", "verdict"} <= set(table.columns) else table
    )
    shown = table[table.primary.fillna(True).astype(bool)] if "primary" in table else table
    trained = training_claims(material)
    return pd.concat(
        [part for part in (shown, trained) if len(part)] or [shown], ignore_index=True
    ), len(shown) < len(table)


def certainty(material: RunResults) -> str:
    """What the intervals rest on and what would change the answer."""
    rows = ranked(material, "gain")
    if rows.empty:
        return _certainty_of_trainings(material)
    half = float(((rows.high - rows.low) / 2).median())
    chosen = material.table("calibration")
    step = ""
    if chosen is not None and chosen.chosen.astype(bool).any():
        step = f" (here {number(float(chosen[chosen.chosen.astype(bool)].step_size.iloc[0]))})"
    return (
        f"The correlations' intervals come from resampling {int(rows.prompts.max()):,} prompts and"
        f" typically reach {number(half, 1)} to either side, so smaller differences stay open;"
        f" another loss, optimiser or step size{step}, another split or more prompts could change"
        " the order, and one step is not a training run."
    )


def _certainty_of_trainings(material: RunResults) -> str:
    table = material.table("validation_outcomes")
    rows = (
        pd.DataFrame()
        if table is None
        else table[(table.measure == "forward_kl") & table.gain_low.notna()]
    )
    if rows.empty:
        return ""
    half = float(((rows.gain_high - rows.gain_low) / 2).median())
    return (
        f"Intervals cross {int(rows.seeds.max())} seeds with {int(rows.prompts.max()):,} prompts"
        f" and typically reach {number(half, 1)} nats to either side of a gain in forward KL;"
        " differences between two trainings are paired, in the table validation_outcomes. Other"
        " steps, learning rates, losses or pairs could change the order."
    )
