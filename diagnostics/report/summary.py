"""The findings of a run in sentences: tables and a manifest in, plain text out.

Every number comes from a table or the manifest. Every claim comes from an interval, never from a
point: a criterion is said to lead another only where a paired interval, or two intervals that do
not overlap, say so, and none is said to be best that does not beat random. The decision comes
first. The context gain, what a permuted teacher does not give, leads the gain itself; tables
without a permuted teacher show gain and relative gain, and say that nothing is controlled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from diagnostics.analysis import claims as claim_tests
from diagnostics.analysis.config import FEWEST_PROMPTS
from diagnostics.analysis.step_batches import pooled_drops
from diagnostics.analysis.warnings import EXPLAINED
from diagnostics.criteria import AMBIGUOUS
from diagnostics.report import lead, sources
from diagnostics.report.lead import population
from diagnostics.report.naming import (
    MEASURES,
    TRUE,
    preferred_split,
    readable,
    shown_outcomes,
    steps,
    steps_of,
)
from diagnostics.report.run_tables import RunTables

WORDS = {
    "context_gain": "context gain",
    "gain": "gain in nats",
    "relative_gain": "relative gain",
    "reverse_gain": "reverse gain",
}
NOT_SIGNALS = ("random", "full")
"""Criteria that hold no signal of the teacher; they never lead a ranking."""
ENOUGH_CELLS = 6
"""Number of trainings from which a rank agreement is stated; three of them are in the right order
by chance once in six times.
"""
DECISION = "Which criterion to train with?"
CLAIMS = "Which claims hold?"
FIRST = {
    DECISION: (lead.decided,),
    "How sure?": (lead.sure,),
    "What next?": (lead.next_command,),
}
"""The questions that the page answers before its first figure."""
REFERENCE = "teachability"
"""The criterion under test (arXiv 2605.26844); always named beside the leader."""


def models(run: RunTables) -> dict[str, str]:
    """Names of the pair, the student and the teacher, as far as the manifest has them: what pages
    are to call a model, or else the last part of its path.
    """
    facts: dict = {}
    for name in ("validate", "train", "probe", "score", "rollout"):
        facts |= {key: value for key, value in run.stage(name).items() if value is not None}
    names = {}
    for role in ("pair", "student", "teacher"):
        value = facts.get(role)
        value = value.get("name") if isinstance(value, dict) else value
        value = run.manifest.get("names", {}).get(role, value)
        if value:
            names[role] = str(value)
    return names


def title(run: RunTables) -> str:
    """One line that names the pair."""
    names = models(run)
    trained = not run.stage("probe") and (run.stage("validate") or run.stage("train"))
    if names.get("pair") not in (None, "custom"):
        pair = f"The {names['pair']} pair: "
        return pair + ("what training gave" if trained else f"which of the teacher's {_ASKED}")
    if pair := pair_in_words(run):
        return f"{pair}: " + (
            "what training gave" if trained else f"which of the teacher's {_ASKED}"
        )
    if "student" in names and "teacher" in names and not _only_roles(names):
        if trained:
            return f"{names['student']} trained with {names['teacher']} as its teacher"
        return f"Which of {names['teacher']}'s signals can {names['student']} learn from?"
    return "What training gave" if trained else f"Which of the teacher's {_ASKED}"


def _only_roles(names: Mapping[str, str]) -> bool:
    """Whether the names of student and teacher tell a pair from no other."""
    told = {role: names.get(role) for role in ("student", "teacher")}
    return told["student"] == told["teacher"] or all(told[role] == role for role in told)


def pair_in_words(run: RunTables) -> str:
    """Kind and size of both models, for a pair whose names say no more than their roles.

    Empty for a named pair, where the names tell pairs apart, and where the manifest records no
    kind.
    """
    names = models(run)
    if names.get("pair") not in (None, "custom") or not _only_roles(names):
        return ""
    kinds = {role: kind(identity(run, role)) for role in ("student", "teacher")}
    return f"Student {kinds['student']}, teacher {kinds['teacher']}" if all(kinds.values()) else ""


def identity(run: RunTables, role: str) -> Mapping:
    """What the manifest records of a model; empty where it records a name alone."""
    found = [run.stage(name).get(role) for name in ("rollout", "score", "validate", "train")]
    return next((value for value in found if isinstance(value, Mapping)), {})


def kind(facts: Mapping) -> str:
    """`Llama 1.0 M` of a model's architecture and number of parameters."""
    size, kind = facts.get("parameters"), str(facts.get("architecture", ""))
    if not kind or not isinstance(size, int) or size <= 0:
        return ""
    unit, letter = (1e9, "B") if size >= 1e9 else (1e6, "M")
    return f"{kind.split('For')[0]} {number(size / unit)} {letter}"


_ASKED = "signals can the student learn from?"


def answer(run: RunTables) -> dict[str, str]:
    """The findings as a few questions, each with a short answer in numbers.

    Args:
        run: The tables and the manifest; a question whose tables are missing is left out.

    Returns:
        The answers by question, in the order of the page.
    """
    parts = {
        **FIRST,
        "On what?": (lead.where,),
        "What was done?": (setup,),
        "Which criterion follows the gain?": (signals,),
        "What would a selection capture?": (budget,),
        CLAIMS: (judged,),
        "What of confident errors?": (q3,),
        "Where does a gain come from?": (attributed,),
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
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return minus(f"{mantissa}e{int(power)}")
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def minus(text: str) -> str:
    """Text in which a hyphen before a number that no word or number precedes is a minus sign."""
    return re.sub(r"(?<![\w.)\-])-(?=\.?\d)|(?<=\de)-0?(?=\d)", "−", text)


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
        return _trainings(run)
    optimizer = {"adamw": "AdamW's first step", "sgd": "one gradient step"}.get(
        step.get("optimizer"), "one step"
    )
    loss = f" of the {readable(step['loss'])} loss" if "loss" in step else ""
    narrow = step.get("gradient_precision", "full") != "full"
    text = f"The student took {optimizer}{loss}"
    text += f", whose gradient was taken in {step['gradient_precision']}" if narrow else ""
    if table is not None:
        text += _where_measured(table)
    together = _drop_of_folds(run)
    if together:
        return f"{text}; {together}"
    if {"loss_before", "realised_drop", "predicted_drop"} <= step.keys():
        before, drop = step["loss_before"], step["realised_drop"]
        text += f"; its loss of {number(before, 3)} nats per position {_fell(drop)}"
        text += (
            f", {drop / step['predicted_drop']:.0%} of the first-order prediction"
            if step["predicted_drop"]
            else ""
        )
    return text + "."


def _fell(drop: float) -> str:
    return f"{'fell' if drop >= 0 else 'rose'} by {number(abs(drop))}"


def _drop_of_folds(run: RunTables) -> str:
    """What the steps of several folds did to their losses together; empty where one was taken."""
    folds = chosen_folds(run)
    if len(folds) < 2:
        return ""
    row = pooled_drops(folds).iloc[0]
    low, high = folds["ratio"].min(), folds["ratio"].max()
    share = (
        f", {row.ratio:.0%} of the first-order prediction (fold by fold {low:.0%} to {high:.0%})"
        if np.isfinite(row.ratio) and not no_signal(run)
        else ""
    )
    mean = f"their losses {_fell(row.realised_drop)} nats per position in the mean of the folds"
    return f"{mean}{share}."


def chosen_folds(run: RunTables) -> pd.DataFrame:
    """The calibration's rows at the chosen size, one per fold; empty without folds."""
    table = run.table("calibration")
    if table is None or not {"fold", "chosen", "ratio", "realised_drop"} <= set(table.columns):
        return pd.DataFrame()
    return table[table["chosen"].isin(TRUE)].reset_index(drop=True)


def _trainings(run: RunTables) -> str:
    """What was trained, in a run that holds trainings alone."""
    facts = run.stage("validate")
    if not facts.get("loss") or not facts.get("steps"):
        return ""
    rate = facts.get("learning_rate")
    at = f" at a learning rate of {rate:g}" if isinstance(rate, (int, float)) else ""
    return (
        f"Each training took {facts['steps']} steps of the {readable(facts['loss'])} loss{at}, on"
        " the positions that its criterion selects."
    )


def _where_measured(table: pd.DataFrame) -> str:
    """On which prompts the steps were taken, and where they were read."""
    batches = steps_of(table) or 1
    if batches > 1:
        rows = table[table.split == preferred_split(table)]
        return (
            f", once for each of {batches} folds of {int(rows.prompts.max()):,} prompts, and every"
            f" position ({int(rows.positions.max()):,}) was re-scored after each: the other folds'"
            " steps are held out for it"
        )
    return " on " + " and was re-scored there and on ".join(_halves(table))


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
    rows = rows[rows.split == population(run, rows)].dropna(subset=["estimate"])
    return rows.sort_values("estimate", ascending=False, kind="stable", ignore_index=True)


def signals(run: RunTables) -> str:
    """Which criterion follows the context gain and the gain best, what a permuted teacher gives of
    it, and what teachability reaches; gain and relative gain in a run without a permuted teacher.
    """
    table = run.table("correlations")
    if table is None:
        return ""
    if no_signal(run):
        return f"Not judged. {EXPLAINED['no_signal']}"
    outcomes = sorted(shown_outcomes(table), key=list(WORDS).index)
    tables = {name: rows for name in outcomes if not (rows := ranked(run, name)).empty}
    if not tables:
        return ""
    few = _too_few(next(iter(tables.values())))
    if few:
        return few
    null = ranked(run, "gain_permuted").drop_duplicates("criterion")
    null = null.set_index("criterion") if len(null) else null
    leaders = [_leader(run, rows, outcome, null) for outcome, rows in tables.items()]
    parts = [_sentence("; ".join(leaders)), _reference(tables, null), _turnover(tables)]
    if "context_gain" not in tables:
        parts.append(
            "No step towards a permuted teacher was taken, so nothing says how much of this needs a"
            " signal about the position."
        )
    return " ".join(part for part in parts if part)


def no_signal(run: RunTables) -> bool:
    """Whether the models differ by rounding alone, as the table of warnings has it."""
    table = run.table("warnings")
    return table is not None and "code" in table and bool((table["code"] == "no_signal").any())


def _too_few(rows: pd.DataFrame) -> str:
    """Why nothing is said of a ranking; empty where there are prompts enough."""
    prompts = int(rows["prompts"].max()) if "prompts" in rows and len(rows) else FEWEST_PROMPTS
    return (
        f"Not judged: {prompts} prompt{'s' if prompts != 1 else ''} a side, of at least"
        f" {FEWEST_PROMPTS}."
        if prompts < FEWEST_PROMPTS
        else ""
    )


def _leader(run: RunTables, rows: pd.DataFrame, outcome: str, null: pd.DataFrame) -> str:
    first = rows.iloc[0]
    where = {"held_out": "on held-out positions ", "step": "on step positions "}.get(
        first.split, ""
    )
    if not first.low > 0:
        return (
            f"no criterion follows the {WORDS[outcome]} {where}more than random does (the highest"
            f" Spearman is {readable(first.criterion)}'s, {_interval(run, first)})"
        )
    return (
        f"{WORDS[outcome]} {where}follows {readable(first.criterion)} best (Spearman"
        f" {_interval(run, first)}{_of_null(null, first, outcome)};"
        f" {_challengers(run, rows, outcome)})"
    )


def _interval(run: RunTables, row) -> str:
    ends = f"{signed(row.low)} to {signed(row.high)}"
    return f"{signed(row.estimate)}, {run.level:.0%} interval {ends}"


def _of_null(null: pd.DataFrame, row, outcome: str) -> str:
    """The same correlation after a step towards a permuted teacher, beside that of the gain."""
    if outcome != "gain" or row.criterion not in null.index:
        return ""
    return f"; with a permuted teacher {signed(null.loc[row.criterion].estimate)}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _reference(tables: Mapping[str, pd.DataFrame], null: pd.DataFrame) -> str:
    """The correlations of teachability, unless it leads by both gains and so was named already."""
    found = {outcome: rows[rows.criterion == REFERENCE] for outcome, rows in tables.items()}
    if any(rows.empty for rows in found.values()) or all(
        rows.index[0] == 0 for rows in found.values()
    ):
        return ""
    rows = {outcome: found[outcome].iloc[0] for outcome in tables}
    parts = []
    for outcome, row in rows.items():
        interval = f"{signed(row.low)} to {signed(row.high)}{_of_null(null, row, outcome)}"
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
    """Whether both gains agree on who leads; nothing where no criterion leads by one of them."""
    if len(tables) < 2 or any(not rows.low.iloc[0] > 0 for rows in tables.values()):
        return ""
    orders = [table.criterion.tolist() for table in tables.values()]
    first, second = orders[0][0], orders[1][0]
    words = [WORDS[outcome] for outcome in tables]
    if first == second:
        return f"Both put {readable(first)} first."
    return (
        f"The order turns over between them: {readable(first)} is {_place(orders[1], first)} by"
        f" {words[1]}, {readable(second)} {_place(orders[0], second)} by {words[0]}."
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
    if table is None or no_signal(run):
        return ""
    outcomes = sorted(shown_outcomes(table), key=list(WORDS).index)
    rows = table[
        np.isclose(table.budget, share)
        & table.outcome.isin(outcomes)
        & table.captured_share.notna()
    ]
    if rows.empty:
        return ""
    rows = rows[rows.split == population(run, rows)]
    if _too_few(rows):
        return ""
    parts = [
        _captured(rows[rows.outcome == outcome], outcome)
        for outcome in outcomes
        if (rows.outcome == outcome).any()
    ]
    return f"With {share:.0%} of the positions, " + "; ".join(parts) + "."


def _captured(rows: pd.DataFrame, outcome: str) -> str:
    best = rows[~rows.criterion.isin(NOT_SIGNALS)].sort_values(
        "captured_share", ascending=False, kind="stable"
    )
    if "ambiguous" in best:
        best = best[~(best.ambiguous > AMBIGUOUS)]
    if best.empty:
        return (
            f"no share of the {WORDS[outcome]} is defined, for it does not sum to more than zero or"
            " ties decide every selection"
        )
    first, reference = best.iloc[0], best[best.criterion == REFERENCE]
    if not np.isfinite(first.low):
        return _mean_selected(best, outcome)
    random = f"random {first.random_low:.1%} to {first.random_high:.1%}"
    if not first.low > first.random_high:
        return (
            f"no criterion is shown to capture more of the {WORDS[outcome]} than random positions"
            f" ({random}; the highest share is {readable(first.criterion)}'s,"
            f" {first.captured_share:.1%}, {first.low:.1%} to {first.high:.1%})"
        ).replace("-", "−")
    text = (
        f"{readable(first.criterion)} captures {first.captured_share:.1%} of the {WORDS[outcome]}"
        f" ({first.low:.1%} to {first.high:.1%}; {random}, oracle {first.oracle:.1%})"
    )
    if first.criterion != REFERENCE and len(reference):
        text += f", {REFERENCE} {reference.captured_share.iloc[0]:.1%}"
    return text.replace("-", "−")


def _mean_selected(rows: pd.DataFrame, outcome: str) -> str:
    """The largest mean of an outcome whose shares have no interval."""
    rows = rows[rows.mean_low.notna()] if "mean_low" in rows else rows[:0]
    if rows.empty:
        return f"no mean of the {WORDS[outcome]} has an interval"
    first = rows.sort_values("mean", ascending=False, kind="stable").iloc[0]
    return (
        f"the selection with the largest mean {WORDS[outcome]} is {readable(first.criterion)}'s:"
        f" {first['mean']:.2g} per position ({first.mean_low:.2g} to {first.mean_high:.2g})"
    ).replace("-", "−")


def q3(run: RunTables) -> str:
    """The contrast of compatible against incompatible positions where the student is confident and
    wrong.
    """
    table = run.table("q3_contrast")
    if table is None or no_signal(run):
        return ""
    outcomes = sorted(shown_outcomes(table), key=list(WORDS).index)
    rows = table[
        (table.score == "compatibility")
        & table.outcome.isin(outcomes)
        & (table.groups == "tertile")
    ]
    if rows.empty:
        return ""
    rows = rows[rows.split == population(run, rows)]
    if _too_few(rows):
        return ""
    parts = [
        _q3_part(rows[rows.outcome == outcome].iloc[0], outcome)
        for outcome in outcomes
        if (rows.outcome == outcome).any()
    ]
    where = {"held_out": "held-out ", "step": "step "}.get(rows.split.iloc[0], "")
    return (
        f"Among confident, wrong {where}positions (Q3), the third with the highest compatibility"
        f" gained {' and '.join(parts)} than the third with the lowest."
    )


def _q3_part(row, outcome: str) -> str:
    unit = {
        "relative_gain": " of their divergence",
        "context_gain": " nats of context gain",
    }.get(outcome, " nats")
    direction = "more" if row.difference >= 0 else "less"
    clear = "" if row.low > 0 or row.high < 0 else ", which leaves the sign open"
    return (
        f"{number(abs(row.difference))}{unit} {direction} ({number(row.low)} to"
        f" {number(row.high)}{clear})"
    )


def attributed(run: RunTables) -> str:
    """Whose losses a gain comes from, and whose help others; that it cannot be told where not."""
    parts = {"kernel_shares": sources.shares_said, "lift": sources.lift_said}
    tables = {name: run.table(name) for name in parts}
    said = [parts[name](table) for name, table in tables.items() if table is not None]
    return " ".join(filter(None, said))


KINDS = {"controlled": "with controls, by ", "paper": "as the paper has it, by "}
"""Words for each kind of a claim's statistic, the one that conclusions are about first."""


def judged(run: RunTables) -> str:
    """The verdict on each claim, controlled and as the paper has it, by each outcome and each
    measure of training.
    """
    table, _ = claims(run)
    if not {"claim", "outcome", "verdict"} <= set(table.columns):
        return ""
    named = WORDS | MEASURES
    kinds = pd.Series("", index=table.index)
    if "kind" in table:
        kinds = table["kind"].astype(object).fillna("")
    parts = []
    for kind in [*KINDS, *(name for name in kinds.unique() if name not in KINDS)]:
        rows = table[kinds == kind]
        parts += [
            f"{'after training, by ' if outcome in MEASURES else KINDS.get(kind, 'by ')}"
            f"{named[outcome]}, {text}{_refuted_by(run, outcome)}"
            for outcome, part in rows.groupby("outcome", sort=False)
            if outcome in named and (text := _counted(part))
        ]
    return _sentence("; ".join(parts)) if parts else ""


VERDICTS = ("supported", "refuted", "inconclusive", "not identified", "not judged")


def _counted(rows: pd.DataFrame) -> str:
    """`C1 and C2 are supported, C4 is refuted`.

    Only the cards name claims at budgets other than their own.
    """
    own = rows[~rows.claim.astype(str).str.contains(" at ")]
    groups = [
        (verdict, own.claim[own.verdict == verdict].drop_duplicates().tolist())
        for verdict in VERDICTS
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
    own = run.measure if (table.measure == run.measure).any() else "forward_kl"
    parts = [
        f"in {words} {_gains(table[table.measure == measure], share)}"
        for measure, words in MEASURES.items()
        if measure in (own, "accuracy") and (table.measure == measure).any()
    ]
    if not parts:
        return ""
    rows, length = table[table.criterion != "untouched"], run.stage("validate").get("steps")
    length = f"{length} steps with" if length else "Trainings with"
    fresh = (
        f"{length} {int(rows.seeds.max())} seeds, judged on {int(rows.prompts.max()):,} held-out"
        f" prompts, gained over the untouched student {'; '.join(parts)}."
    )
    return " ".join(text for text in (fresh, _over_random_on_the_bank(table, own, share)) if text)


def _over_random_on_the_bank(table: pd.DataFrame, own: str, share: float) -> str:
    """The best criterion and teachability over random positions, on text that all students share.

    Their own new responses differ from student to student, and so compare them less sharply.
    """
    if "minus_random" not in table:
        return ""
    share, parts = _budget_nearest(table, share), []
    for measure in dict.fromkeys((own, "reverse_kl", "forward_kl")):
        rows = table[(table.measure == f"bank_{measure}") & np.isclose(table.budget, share)]
        ranked = rows.dropna(subset=["minus_random"]).sort_values(
            "minus_random", ascending=False, kind="stable"
        )
        shown = pd.concat([ranked.head(1), ranked[ranked.criterion == REFERENCE]])
        each = [
            f"{readable(row.criterion)} {_signed_over_random(row)}"
            for row in shown.drop_duplicates("criterion").itertuples()
        ]
        parts += [f"{MEASURES[measure]} {' and '.join(each)}"] if each else []
    return (
        "On the untouched student's responses, which compare students more sharply than what each"
        f" now writes, over random positions at {share:.0%} (the best and {REFERENCE}): in"
        f" {'; in '.join(parts)}."
        if parts
        else ""
    )


def _signed_over_random(row) -> str:
    values = row.minus_random, row.minus_random_low, row.minus_random_high
    return between(*values, show=_with_sign) if np.isfinite(values[1]) else _with_sign(values[0])


def _with_sign(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _budget_nearest(rows: pd.DataFrame, share: float) -> float:
    """The budget of teachability's trainings that is nearest to a share."""
    budgets = rows.budget[rows.criterion == REFERENCE]
    return min(budgets, key=lambda budget: abs(budget - share), default=share)


def _gains(rows: pd.DataFrame, share: float) -> str:
    """The gain on all positions, then, at the budget nearest to `share`, the gains of the best
    criterion, teachability and random selection.
    """
    shown = [
        f"{_gain(row)} on all positions" for row in rows[rows.criterion == "full"].itertuples()
    ]
    share = _budget_nearest(rows, share)
    there = rows[
        np.isclose(rows.budget, share) & ~rows.criterion.isin(("full", "untouched"))
    ].dropna(subset=["gain"])
    ranked = there.sort_values("gain", ascending=False, kind="stable")
    first = ranked.head(1).criterion.tolist()
    for name in dict.fromkeys([*first, REFERENCE, "random"]):
        shown += [
            f"{_gain(row)} at {share:.0%} by {readable(name)}"
            f"{_most(row) if [name] == first and name != 'random' else ''}"
            for row in ranked[ranked.criterion == name].itertuples()
        ]
    return ", ".join(shown)


def _most(row) -> str:
    """What may be said of the largest gain: that it is more than random's only by its interval."""
    if getattr(row, "minus_random_low", np.nan) > 0:
        return " (the most there, and more than random)"
    return " (the most there, not shown to be more than random)"


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


USUAL_ANSWERS = re.compile(
    r"one_step_gain|captured_(context_|relative_)?gain|intervention_(h\d+_)?(forward|reverse)_kl"
)
"""Offline answers that are always named beside the best."""


def foreseen(run: RunTables) -> str:
    """The offline answers' rank agreement with the trainings, with the p value of exchanging the
    criteria, and how often the horizon's sign was right.
    """
    return " ".join(text for text in (_agreement(run), _signs(run)) if text)


def _trained_measure(run: RunTables, names: Iterable[str]) -> str:
    """The divergence of the trainings' loss where the table has it, else forward KL."""
    return run.measure if f"trained_{run.measure}" in set(names) else "forward_kl"


def _agreement(run: RunTables) -> str:
    table = run.table("validation_agreement")
    if table is None:
        return ""
    measure = _trained_measure(run, table.y)
    rows = (
        table[(table.scope == "within_budget") & (table.y == f"trained_{measure}")]
        .dropna(subset=["kendall"])
        .sort_values("kendall", ascending=False, kind="stable")
    )
    if rows.empty or rows.cells.max() < ENOUGH_CELLS:
        return ""
    ours = rows.x.map(lambda name: bool(USUAL_ANSWERS.fullmatch(name)))
    ours &= ~rows.x.str.contains("_kl") | rows.x.str.endswith(measure)
    shown = pd.concat([rows.head(1), rows[ours]]).drop_duplicates("x")
    parts = [f"{readable(row['x'])} {_tau(row)}" for row in shown.to_dict("records")]
    return (
        f"How far an answer ranked those {int(rows.cells.max())} trainings, each among those of its"
        f" budget, as their gain in {MEASURES[measure]} did (Kendall τ): {'; '.join(parts)}."
    )


def _tau(row: Mapping) -> str:
    """Kendall's tau with its interval and its permutation p, as far as the table has them."""
    known = np.isfinite(row["low"])
    text = between(row["kendall"], row["low"], row["high"], show=signed)
    text = text if known else signed(row["kendall"])
    return text + (
        f", {claim_tests.p_words(row['p_permutation'])}" if "p_permutation" in row else ""
    )


def _signs(run: RunTables) -> str:
    """In how many settled cells each horizon had training's sign over random."""
    table = run.table("foresight_signs")
    if table is None or not {"horizon", "measure", "agrees"} <= set(table.columns):
        return ""
    measure = run.measure if (table.measure == run.measure).any() else str(table.measure.iloc[0])
    rows = table[(table.measure == measure) & table.agrees.notna()]
    parts = [
        f"{steps(horizon)} in {int(part.agrees.isin(TRUE).sum())} of {len(part)}"
        for horizon, part in rows.groupby("horizon")
    ]
    return (
        f"Sign of the difference to random in {readable(measure)}, where training settled it:"
        f" right after {'; '.join(parts)} cells."
        if parts
        else ""
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
    """The verdicts to show, with those of training, and whether the table has others.

    Those are the primary rows and, on the same population, the paper's statistics of the paper's
    own gain.
    """
    table = run.table("verdicts")
    table = (
        pd.DataFrame() if table is None or not {"claim", "verdict"} <= set(table.columns) else table
    )
    primary = table["primary"].isin(TRUE) if "primary" in table else pd.Series(True, table.index)
    if {"kind", "population"} <= set(table.columns) and primary.any():
        where = table.population.isin(table.population[primary].unique())
        primary |= where & (table.kind == "paper") & (table.outcome == "gain")
    shown, trained = _judgeable(table[primary]), training_claims(run)
    return pd.concat(
        [part for part in (shown, trained) if len(part)] or [shown], ignore_index=True
    ), len(shown) < len(table)


def _judgeable(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts, of which those on too few prompts are none."""
    if "prompts" not in table or not (table["prompts"] < FEWEST_PROMPTS).any():
        return table
    few = table["prompts"] < FEWEST_PROMPTS
    why = table["prompts"].map(lambda n: f"{n:.0f} prompts a side, of at least {FEWEST_PROMPTS}")
    table = table.reindex(columns=[*dict.fromkeys([*table, "reason", "sentence"])])
    text = {"verdict": "not judged", "reason": why, "sentence": ""}
    columns = {name: table[name].astype(object).mask(few, words) for name, words in text.items()}
    return table.assign(**columns)


def verdict_class(verdict: str) -> str:
    """The class of a verdict on a page; of one that is unknown, that of an inconclusive one."""
    return (verdict if verdict in VERDICTS else "inconclusive").replace(" ", "-")


def registered(run: RunTables) -> str:
    """The primary choices as they were registered before the probe; empty where none were."""
    choices = run.manifest.get("primary")
    if not isinstance(choices, Mapping):
        return ""
    digest = str(choices.get("sha256", ""))
    choices = choices.get("choices", choices)
    named = [f"{readable(name)} {readable(str(value))}" for name, value in choices.items()]
    named = [text for text in named if not text.startswith("sha256")]
    seal = f" (sha256 {digest[:12]}…)" if digest else ""
    return f"Registered before the probe{seal}: {', '.join(named)}. Anything else is exploratory."


def certainty(run: RunTables) -> str:
    """What the intervals rest on, and what could change the answer."""
    found = {name: rows for name in WORDS if not (rows := ranked(run, name)).empty}
    if not found:
        return _certainty_of_trainings(run)
    outcome, rows = next(iter(found.items()))
    if _too_few(rows):
        return ""
    half = float(((rows.high - rows.low) / 2).median())
    chosen = run.table("calibration")
    step = ""
    if chosen is not None and chosen.chosen.astype(bool).any():
        step = f" (here {number(float(chosen[chosen.chosen.astype(bool)].step_size.iloc[0]))})"
    batches = steps_of(rows)
    over = f" and {batches} step batches" if (batches or 1) > 1 else ""
    alone = "" if (batches or 2) > 1 else " alone, for there is one step batch,"
    return (
        f"The intervals of correlations with the {WORDS[outcome]} are over"
        f" {int(rows.prompts.max()):,} prompts{over}{alone} and"
        f" typically reach {number(half, 1)} to either side, so smaller differences stay open;"
        f" another loss, optimizer or step size{step} or other prompts could change the order, and"
        " one step is not a training run."
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
