"""The first screen: which criterion to train with, how sure that is, and the command that comes
next.

A run without a decision says what to run; it is not answered by correlations.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping

import pandas as pd

from diagnostics.analysis.config import FEWEST_PROMPTS
from diagnostics.analysis.decision import (
    MARGIN,
    NO_CELLS,
    decision_sentence,
    registered_sentence,
)
from diagnostics.report.naming import (
    SPLITS,
    TRUE,
    decisive_horizon,
    preferred_split,
    readable,
    steps_of,
)
from diagnostics.report.other_measures import other_measures
from diagnostics.report.run_tables import RunTables
from diagnostics.report.two_steps import DECISION, PROBE, rate_words, two_steps

PROGRAM = "opd-diagnostics"
HERE = "DIR"
"""What stands in a command for the run's directory, since a page does not depend on its place."""
SHORT_FILE = 128
"""Prompts below which a file is divided by a flag: trainings hold its last 64 out by default."""
UNDECIDED = (
    "Not answered: this run holds no steps on selected positions over a horizon; the correlations"
    " and captured shares below do not stand in for it."
)
"""What stands in the place of the decision where there is no decision table."""


def decided(run: RunTables) -> str:
    """Which criterion to train with at which budget, or that this cannot be said."""
    table = run.table("decision")
    if table is not None:
        measured = decisive_horizon(table)
        other = (
            f" The registered horizon of {run.horizon} steps was not measured: exploratory."
            if "primary" in run.manifest and measured != run.horizon
            else ""
        )
        said = " ".join(filter(None, [decision_sentence(table), _registered(run, table)]))
        return _in_words(said, table) + other
    return UNDECIDED if _probed(run) else ""


def registered_cell(run: RunTables) -> tuple[str, float] | None:
    """Criterion and budget that were registered before the probe; None where none were."""
    choices = (run.manifest.get("primary") or {}).get("choices", {})
    named = isinstance(choices.get("criterion"), str) and "budget" in choices
    return (choices["criterion"], float(choices["budget"])) if named else None


def _registered(run: RunTables, table: pd.DataFrame) -> str:
    """What the registered cell did, where the decision does not name it."""
    cell = registered_cell(run)
    return registered_sentence(table, *cell) if cell else ""


def _in_words(sentence: str, table: pd.DataFrame) -> str:
    """The sentence with the criteria's readable names."""
    names = sorted(table["criterion"].astype(str).unique(), key=len, reverse=True)
    known = "|".join(map(re.escape, names))
    return re.sub(rf"\b({known})\b", lambda found: readable(found[0]), sentence)


def _probed(run: RunTables) -> bool:
    return any(run.table(name) is not None for name in ("correlations", "intervention"))


def judged_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The cells that a decision is about, by their lower bound over random."""
    primary = table["primary"].isin(TRUE) & ~table["criterion"].isin(["random", *NO_CELLS])
    return table[primary].sort_values("over_random_low", ascending=False, kind="stable")


def strength(judged: pd.DataFrame) -> dict[str, object]:
    """How sure the ranking of a decision is.

    A design is strong enough where it shows, with 80 % power, a difference of MARGIN of what random
    positions do, which is the difference within which two criteria are called level. Both numbers
    are those of the recommended cell, and the medians of the cells where none is recommended.

    Args:
        judged: The judged cells of a decision table.

    Returns:
        folds, prompts (held out), word (not judged, weak, sufficient), sentence and, where it was
        judged, detail (what the word rests on).
    """
    folds, prompts = (int(judged[name].max()) for name in ("steps", "prompts"))
    found: dict[str, object] = {"folds": folds, "prompts": prompts}
    basis = f"{folds} fold{'s' if folds != 1 else ''}, {prompts} prompts a side"
    if (judged["verdict"] == "not judged").all():
        few = f" ({FEWEST_PROMPTS} are needed)" if prompts < FEWEST_PROMPTS else ""
        return found | {"word": "not judged", "sentence": f"{basis}{few}: not judged"}
    named = judged[judged["recommended"].isin(TRUE)] if "recommended" in judged else judged[:0]
    least, margin = (
        (named if len(named) else judged)[name].median()
        for name in ("smallest_detectable", "margin")
    )
    word = "sufficient" if least <= margin else "weak"
    shows = f"it shows differences from {least:.2g} nats on" if math.isfinite(least) else ""
    level = f"{100 * MARGIN:.0f} % of random's effect is {margin:.2g}" if margin > 0 else ""
    detail = "; ".join(filter(None, [shows, level]))
    return found | {
        "word": word,
        "sentence": f"{basis}: {word}" + (f" ({detail})" if detail else ""),
        "detail": detail,
    }


def sure(run: RunTables) -> str:
    """The strength of the decision as a sentence; empty where a table has no column for it."""
    table = run.table("decision")
    needs = {"primary", "prompts", "steps", "smallest_detectable", "margin", "verdict"}
    if table is None or not needs <= set(table.columns) or judged_cells(table).empty:
        return ""
    found = strength(judged_cells(table))
    sentence = str(found["sentence"])
    if found.get("detail") and f"{found['prompts']} prompts, " in decision_sentence(table):
        sentence = f"{found['word']}: {found['detail']}"  # the decision names prompts and folds
    parts = [sentence[:1].upper() + sentence[1:] + ".", by_other_measures(run), taken_at(run)]
    return " ".join(filter(None, parts))


def by_other_measures(run: RunTables) -> str:
    """Whether the cell that a reader looks for does the same by other divergences; or nothing."""
    table = run.table("decision")
    if table is None or not {"primary", "measure", "verdict"} <= set(table.columns):
        return ""
    return _in_words(other_measures(table, registered_cell(run)), table)


def rate(run: RunTables) -> tuple[float, str] | None:
    """The learning rate of the steps that a decision rests on, and whose it is.

    Returns:
        The rate and what chose it: `asked for`, `the pair's`, or `the default`, which is that of a
        training without a rate of its own. None where no trajectory is recorded.
    """
    for stage in ("intervene", "probe"):
        facts = run.stage(stage)
        if isinstance(found := facts.get("horizon_rate"), int | float):
            named = run.stage("rollout").get("pair") or facts.get("pair")
            whose = "the pair’s" if named not in (None, "custom") else "the default"
            return float(found), "asked for" if facts.get("learning_rate") else whose
    return None


def taken_at(run: RunTables) -> str:
    """At which learning rate the steps were taken, as a sentence; empty where none is recorded."""
    found = rate(run)
    if found is None:
        return ""
    value, whose = found
    text = f"Learning rate {rate_words(value)}{_of_the_probe(run)}"
    if whose == "the default":
        return f"{text}, training's default: small, so effects are too; `--learning-rate` sets it."
    return f"{text}."


def _of_the_probe(run: RunTables) -> str:
    """The rate of the probe's step in brackets, where another one than the decision's is known."""
    rows = {row["step"]: row for row in two_steps(run).to_dict("records")}
    if set(rows) != {PROBE, DECISION}:
        return ""
    own, other = (rows[name]["learning_rate"] for name in (PROBE, DECISION))
    return f" (the probe's: {rate_words(own)})" if math.isfinite(own) and own != other else ""


def next_command(run: RunTables) -> str:
    """The command that comes next, in backticks, DIR being this directory."""
    table = run.table("decision")
    if table is None:
        return (
            f"`{PROGRAM} intervene --horizon 1,5,20 --output-dir {HERE}`, then `{PROGRAM} compare"
            f" --output-dir {HERE}` and `{PROGRAM} report {HERE}`."
            if _probed(run)
            else ""
        )
    if "primary" not in table or judged_cells(table).empty:
        return ""
    next_one = command(judged_cells(table), HERE, PROGRAM, pair_flags(run))
    return f"`{' '.join(next_one.split())}`"


def pair_flags(run: RunTables) -> str:
    """Flags that name the pair of a run again."""
    settings = run.manifest.get("stages", {}).get("rollout", {}).get("settings", {})
    named = [(name, settings.get(name)) for name in ("pair", "student", "teacher", "prompts")]
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in named if value)


def command(judged: pd.DataFrame, folder: str, program: str, pair: str) -> str:
    """What to run after a decision: a check by training, more prompts, or other criteria.

    Args:
        judged: The judged cells of a decision table.
        folder: The run's directory, quoted for a shell.
        program: How this program is called.
        pair: Flags that name the pair.
    """
    chosen = judged[judged["recommended"].isin(TRUE)]
    if len(chosen):
        row = chosen.iloc[0]
        return (
            f"{program} validate --against {folder} --criteria {row['criterion']},random,full"
            f" --budgets {row['budget']:g}{_held_out(judged, pair)} --output-dir {folder}-training"
        )
    more = _prompts_needed(judged)
    if not more:
        return f"{program} intervene --criteria NAMES --output-dir {folder}"
    return f"{program} run {pair} --contexts {more} --output-dir {folder}-{more}"


def _held_out(judged: pd.DataFrame, pair: str) -> str:
    """The flag that leaves prompts to train on, where a short file gives both kinds."""
    prompts = int(judged["prompts"].max())
    if "--pair" in pair or prompts >= SHORT_FILE:
        return ""
    return f" --eval-contexts {max(1, prompts // 4)}"


def _prompts_needed(judged: pd.DataFrame) -> int:
    """Prompts of a design that would tell; 0 where none is known."""
    needed = pd.to_numeric(judged.get("prompts_needed", pd.Series(dtype=float)), errors="coerce")
    needed = needed[(judged["over_random"] > 0) & (needed > judged["prompts"])]
    more = int(needed.min()) if len(needed) and math.isfinite(needed.min()) else 0
    if (judged["verdict"] == "not judged").all():
        more = max(more, 2 * FEWEST_PROMPTS)
    return more


def population(run: RunTables, table: pd.DataFrame) -> str:
    """The one population that the page speaks of: the registered one where the table has it."""
    choices: Mapping = (run.manifest.get("primary") or {}).get("choices", {})
    registered = choices.get("population")
    return str(registered) if (table["split"] == registered).any() else preferred_split(table)


def where(run: RunTables) -> str:
    """The sentence that names this population, with its size."""
    table = run.table("correlations")
    if table is None:
        return ""
    rows = table[table["split"] == population(run, table)]
    name = SPLITS.get(population(run, table), population(run, table))
    folds = steps_of(rows) or 1
    taken = f", {folds} folds" if folds > 1 else ""
    return (
        f"{name[:1].upper()}{name[1:]} ({int(rows['positions'].max()):,},"
        f" {int(rows['prompts'].max()):,} prompts{taken}), unless a sentence names others."
    )
