"""The findings of a run in sentences: tables and a manifest in, plain text out.

Every number comes from a table or the manifest. Every claim comes from an interval, never from a
point: a criterion is said to lead another only where a paired interval, or two intervals that do
not overlap, say so. Both gains are always named side by side, since the order of criteria can
differ between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from diagnostics.analysis import claims as claim_tests
from diagnostics.report.naming import MEASURES, preferred_split, readable
from diagnostics.report.run_tables import RunTables

WORDS = {"gain": "gain in nats", "relative_gain": "relative gain"}
NOT_SIGNALS = ("random", "full")
"""Criteria that hold no signal of the teacher; they never lead a ranking."""
ENOUGH_CELLS = 6
"""Number of trainings from which a rank agreement is stated; three of them are in the right order
by chance once in six times.
"""
REFERENCE = "teachability"
"""The criterion under test (arXiv 2605.26844); always named beside the leader."""


def models(run: RunTables) -> dict[str, str]:
    """Names of the pair, the student and the teacher, as far as the manifest has them."""
    facts = {**run.stage("score"), **run.stage("rollout")}
    names = {}
    for role in ("pair", "student", "teacher"):
        value = facts.get(role)
        value = value.get("name") if isinstance(value, dict) else value
        if value:
            names[role] = str(value)
    return names


def title(run: RunTables) -> str:
    """One line that names the pair."""
    names = models(run)
    if names.get("pair") not in (None, "custom"):
        return (
            f"The {names['pair']} pair: which of the teacher's signals can the student learn from?"
        )
    if "student" in names and "teacher" in names:
        return f"Which of {names['teacher']}'s signals can {names['student']} learn from?"
    return "Which of the teacher's signals can the student learn from?"


def answer(run: RunTables) -> dict[str, str]:
    """The findings as a few questions, each with a short answer in numbers.

    Args:
        run: The tables and the manifest; a question whose tables are missing is left out.

    Returns:
        The answers by question, in the order of the page.
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
        question: " ".join(text for part in answers if (text := part(run)))
        for question, answers in parts.items()
    }
    return {question: text for question, text in said.items() if text}


def number(value: float, digits: int = 2) -> str:
    """A number with that many significant digits, without an exponent where it stays short.

    An undefined value becomes an en dash.
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


def setup(run: RunTables) -> str:
    """What was done: loss, optimizer, prompts, positions, and the change of the step's own loss."""
    step, table = run.stage("probe"), run.table("correlations")
    if not step and table is None:
        return ""
    optimizer = {"adamw": "AdamW's first step", "sgd": "one gradient step"}.get(
        step.get("optimizer"), "one step"
    )
    loss = f" of the {readable(step['loss'])} loss" if "loss" in step else ""
    text = f"The student took {optimizer}{loss}"
    if table is not None:
        text += " on " + " and was re-scored there and on ".join(_halves(table))
    if {"loss_before", "realised_drop", "predicted_drop"} <= step.keys():
        before, drop = step["loss_before"], step["realised_drop"]
        text += (
            f"; its loss of {number(before, 3)} nats per position {'fell' if drop >= 0 else 'rose'}"
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


def ranked(run: RunTables, outcome: str) -> pd.DataFrame:
    """Spearman rows of one outcome on the preferred split, best first, without criteria that hold
    no signal.
    """
    table = run.table("correlations")
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


def signals(run: RunTables) -> str:
    """Which criterion follows each gain best, what teachability reaches, and whether both gains
    agree.
    """
    tables = {outcome: table for outcome in WORDS if not (table := ranked(run, outcome)).empty}
    if not tables:
        return ""
    leaders = [_leader(run, table, outcome) for outcome, table in tables.items()]
    parts = [_sentence("; ".join(leaders)), _reference(tables), _turnover(tables)]
    return " ".join(part for part in parts if part)


def _leader(run: RunTables, rows: pd.DataFrame, outcome: str) -> str:
    first = rows.iloc[0]
    where = {"held_out": "on held-out positions ", "step": "on step positions "}.get(
        first.split, ""
    )
    interval = f"{run.level:.0%} interval {signed(first.low)} to {signed(first.high)}"
    return (
        f"{WORDS[outcome]} {where}follows {readable(first.criterion)} best (Spearman"
        f" {signed(first.estimate)}, {interval}, placebo {signed(first.placebo)};"
        f" {_challengers(run, rows, outcome)})"
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _reference(tables: Mapping[str, pd.DataFrame]) -> str:
    """The correlations of teachability, unless it leads by both gains and so was named already."""
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


def _challengers(run: RunTables, rows: pd.DataFrame, outcome: str) -> str:
    """The criteria that cannot be told apart from the leader.

    Paired differences decide where the run has them, because they are sharper; otherwise the
    intervals do.
    """
    first, rest = rows.iloc[0], rows.iloc[1:]
    paired = run.table("differences")
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
    shown = ", ".join(map(readable, close[:3])) + (
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
            f"Both gains put {readable(first)} first, so the choice does not hinge on how gain is"
            " defined."
        )
    return (
        f"The order turns over with the definition of gain: {readable(first)} is"
        f" {_place(orders[1], first)} in relative terms, {readable(second)}"
        f" {_place(orders[0], second)} in nats."
    )


def _place(order: list[str], name: str) -> str:
    if name not in order:
        return "unranked"
    place = order.index(name) + 1
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending} of {len(order)}"


def budget(run: RunTables, share: float = 0.05) -> str:
    """The share of each gain that the best criterion and teachability capture at one budget, with
    random and the oracle for comparison.
    """
    table = run.table("selection_curves")
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
        f"{readable(first.criterion)} captures {first.captured_share:.1%} of the {WORDS[outcome]}"
        f" ({first.low:.1%} to {first.high:.1%}; random {first.random_low:.1%} to"
        f" {first.random_high:.1%}, oracle {first.oracle:.1%})"
    )
    if first.criterion != REFERENCE and len(reference):
        text += f", {REFERENCE} {reference.captured_share.iloc[0]:.1%}"
    return text.replace("-", "−")


def q3(run: RunTables) -> str:
    """The contrast of compatible against incompatible positions where the student is confident and
    wrong.
    """
    table = run.table("q3_contrast")
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


def judged(run: RunTables) -> str:
    """The verdict on each claim, by each gain and each measure of training."""
    table, _ = claims(run)
    if not {"claim", "outcome", "verdict"} <= set(table.columns):
        return ""
    named = WORDS | MEASURES
    counted = {outcome: _counted(rows) for outcome, rows in table.groupby("outcome", sort=False)}
    parts = [
        f"by {named[outcome]}, {text}{_refuted_by(run, outcome)}"
        for outcome, text in counted.items()
        if outcome in named and text
    ]
    return _sentence("; ".join(parts)) if parts else ""


def _counted(rows: pd.DataFrame) -> str:
    """`C1 and C2 are supported, C4 is refuted`.

    Only the cards name claims at budgets other than their own.
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


def _refuted_by(run: RunTables, measure: str) -> str:
    """The rivals that beat teachability at the claim's own budget; one of them refutes C5."""
    table = run.table("validation_verdicts")
    if table is None:
        return ""
    ahead = table.rival[
        (table.claim == "C5")
        & (table.measure == measure)
        & (table.rival != "all")
        & (table.verdict == "refuted")
    ]
    return f" (by {' and '.join(map(readable, ahead))})" if len(ahead) else ""


def trained(run: RunTables, share: float = 0.05) -> str:
    """The gains of trainings over the untouched student, or the course of a single training."""
    table = run.table("validation_outcomes")
    if table is None:
        return _one_training(run)
    parts = [
        f"in {words} {_gains(table[table.measure == measure], share)}"
        for measure, words in MEASURES.items()
        if measure in ("forward_kl", "accuracy") and (table.measure == measure).any()
    ]
    if not parts:
        return ""
    rows, steps = table[table.criterion != "untouched"], run.stage("validate").get("steps")
    length = f"{steps} steps with" if steps else "Trainings with"
    return (
        f"{length} {int(rows.seeds.max())} seeds, judged on {int(rows.prompts.max()):,} held-out"
        f" prompts, gained over the untouched student {'; '.join(parts)}."
    )


def _gains(rows: pd.DataFrame, share: float) -> str:
    """The gain on all positions, then, at the budget nearest to `share`, the gains of the best
    criterion, teachability and random selection.
    """
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
            f"{_gain(row)} at {share:.0%} by {readable(name)}{best}"
            for row in ranked[ranked.criterion == name].itertuples()
        ]
    return ", ".join(shown)


def _gain(row) -> str:
    return (
        between(row.gain, row.gain_low, row.gain_high)
        if np.isfinite(row.gain_low)
        else number(row.gain)
    )


def _one_training(run: RunTables) -> str:
    """First and last evaluation of a single training."""
    table = run.table("evaluations")
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


def foreseen(run: RunTables) -> str:
    """The offline answer whose ranking of the trainings agrees most with their outcome, and the
    agreement of the usual answers.
    """
    table = run.table("validation_agreement")
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
        f"{readable(row.x)} {between(row.kendall, row.low, row.high, show=signed)}"
        for row in shown.itertuples()
    ]
    return (
        f"How far an answer ranked those {int(rows.cells.max())} trainings, each among those of its"
        f" budget, as their gain in forward KL did (Kendall τ): {'; '.join(parts)}."
    )


def training_claims(run: RunTables) -> pd.DataFrame:
    """Claim C5 as rows of verdicts.

    Empty where the verdicts hold it already, or no grid was trained.
    """
    table, known = run.table("validation_verdicts"), run.table("verdicts")
    if table is None or (known is not None and known.claim.str.startswith("C5").any()):
        return pd.DataFrame()
    return claim_tests.of_training(table)


def claims(run: RunTables) -> tuple[pd.DataFrame, bool]:
    """Primary verdicts with those of training, and whether the table has others."""
    table = run.table("verdicts")
    table = (
        pd.DataFrame() if table is None or not {"claim", "verdict"} <= set(table.columns) else table
    )
    shown = table[table.primary.fillna(True).astype(bool)] if "primary" in table else table
    trained = training_claims(run)
    return pd.concat(
        [part for part in (shown, trained) if len(part)] or [shown], ignore_index=True
    ), len(shown) < len(table)


def certainty(run: RunTables) -> str:
    """What the intervals rest on, and what could change the answer."""
    rows = ranked(run, "gain")
    if rows.empty:
        return _certainty_of_trainings(run)
    half = float(((rows.high - rows.low) / 2).median())
    chosen = run.table("calibration")
    step = ""
    if chosen is not None and chosen.chosen.astype(bool).any():
        step = f" (here {number(float(chosen[chosen.chosen.astype(bool)].step_size.iloc[0]))})"
    return (
        f"The correlations' intervals come from resampling {int(rows.prompts.max()):,} prompts and"
        f" typically reach {number(half, 1)} to either side, so smaller differences stay open;"
        f" another loss, optimiser or step size{step}, another split or more prompts could change"
        " the order, and one step is not a training run."
    )


def _certainty_of_trainings(run: RunTables) -> str:
    table = run.table("validation_outcomes")
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
