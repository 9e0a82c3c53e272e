"""The probe's one step beside the steps of the decision, and which conclusion rests on which.

The probe's size is calibrated, so that the loss falls nearly as predicted; the decision's rate is a
training's. For pairs without a rate of their own the two can differ by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from diagnostics.report.naming import decisive_horizon, readable
from diagnostics.report.run_tables import RunTables

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
"""Optimizers as a reader should see them."""
PROBE, DECISION = "probe", "decision"
RESTS = {
    PROBE: "correlations, captured shares, claims",
    DECISION: "which criterion to train with",
}
"""What is concluded from each."""


def two_steps(run: RunTables) -> pd.DataFrame:
    """What the probe's step and the decision's steps were.

    Args:
        run: The tables and the manifest.

    Returns:
        At most two rows, the probe's first, with the columns step (whose), rests_on_it, optimizer,
        learning_rate, steps (the probe takes one per fold), contexts (that carry loss in a step),
        update_norm and relative_norm (of the whole update, all steps together, for the decision
        in the mean of the selections; in weights, and as a share of the weights' norm; NaN where
        it was not recorded). A row that the manifest does not record is left out.
    """
    rows = [row for row in (_probe(run), _decision(run)) if row]
    columns = ["step", "rests_on_it", "optimizer", "learning_rate", "steps", "contexts"]
    return pd.DataFrame(rows, columns=[*columns, "update_norm", "relative_norm"])


def _probe(run: RunTables) -> dict[str, Any]:
    facts = run.stage("probe")
    if not isinstance(facts.get("step_size"), int | float):
        return {}
    return _row(PROBE, facts) | {
        "learning_rate": _rate_of_one_step(facts),
        "steps": 1,
        "contexts": _contexts_of_a_fold(run, facts),
        "update_norm": facts.get("update_norm", math.nan),
        "relative_norm": facts.get("relative_norm", math.nan),
    }


def _rate_of_one_step(facts: Mapping[str, Any]) -> float:
    """AdamW's size is its rate; SGD's is the norm of the update, the rate times the gradient's."""
    if facts.get("optimizer") != "sgd":
        return float(facts["step_size"])
    norm = facts.get("gradient_norm") or math.nan
    return float(facts["step_size"] / norm)


def _contexts_of_a_fold(run: RunTables, facts: Mapping[str, Any]) -> float:
    contexts = run.stage("rollout").get("contexts")
    folds = facts.get("folds")
    whole = isinstance(contexts, int) and isinstance(folds, int) and folds > 0
    return round(contexts / folds) if whole else math.nan


def _decision(run: RunTables) -> dict[str, Any]:
    table, facts = run.table("decision"), run.stage("intervene")
    if table is None or not {"horizon", "measure"} <= set(table.columns) or not facts:
        return {}
    horizon = decisive_horizon(table)
    if horizon == 0:
        return _probe(run) | _row(DECISION, facts)
    return (
        _row(DECISION, {"optimizer": "adamw"})
        | {
            "learning_rate": facts.get("horizon_rate", math.nan),
            "steps": horizon,
            "contexts": facts.get("minibatch", math.nan),
        }
        | _norms(run, horizon)
    )


NORM_COLUMNS = {"criterion", "budget", "horizon", "update_norm"}


def _norms(run: RunTables, horizon: int) -> dict[str, float]:
    """How far the decision's steps led, in weights and as a share of the norm of the weights."""
    table = run.table("intervention")
    if table is None or not set(table.columns) >= NORM_COLUMNS:
        return {}
    taken = table[table["horizon"] == horizon].drop_duplicates(["criterion", "budget"])
    norm = float(taken["update_norm"].mean())
    probe = run.stage("probe")
    share = probe.get("relative_norm", math.nan) / (probe.get("update_norm") or math.nan)
    return {"update_norm": norm, "relative_norm": norm * share}


def _row(step: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = str(facts.get("optimizer", ""))
    name = OPTIMIZERS.get(optimizer, readable(optimizer))
    return {"step": step, "rests_on_it": RESTS[step], "optimizer": name}


def meaning(table: pd.DataFrame) -> str:
    """Which conclusion rests on which step, and how far apart their rates are, in one sentence.

    Args:
        table: As `two_steps` returns it.

    Returns:
        The sentence; empty unless both rows are there.
    """
    if len(table) < 2:
        return ""
    probe, decision = table.to_dict("records")
    if decision["steps"] == 1 and decision["update_norm"] == probe["update_norm"]:
        return (
            "Both rest on one step of the same norm, which does not foresee training: the decision"
            " needs steps over a horizon."
        )
    return (
        "Correlations, captured shares and claims say what the probe’s one step does; which"
        f" criterion to train with rests on the other {decision['steps']:.0f}"
        f" step{'s' if decision['steps'] != 1 else ''}{_apart(probe, decision)}."
    )


def _apart(probe: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """How many times the rates differ, where both are of one optimizer; what follows from it."""
    if decision["optimizer"] != probe["optimizer"]:
        return ", of another optimizer, so that neither foresees the other"
    ratio = probe["learning_rate"] / decision["learning_rate"]
    if not math.isfinite(ratio) or ratio <= 0:
        return ""
    times, lower = (ratio, "lower") if ratio > 1 else (1 / ratio, "higher")
    if times < 1.05:
        return ", at the same rate"
    times = float(f"{times:.2g}")
    return f", at a rate {times:,g} times {lower}, so that the one need not foresee the other"


def in_short(table: pd.DataFrame, chosen_by: str | None = None) -> str:
    """Both kinds of steps in a line for the terminal; empty where neither is recorded.

    Args:
        table: As `two_steps` returns it.
        chosen_by: What chose the decision's rate, as `lead.rate` says it.
    """
    said = {row["step"]: row for row in table.to_dict("records")}
    parts = []
    if DECISION in said:
        row = said[DECISION]
        each = "" if math.isnan(row["contexts"]) else f", {row['contexts']:.0f} contexts each"
        taken = f"{row['steps']:.0f} of {row['optimizer']}{_at(row)}{_default(chosen_by)}{each}"
        parts.append(f"the decision rests on {taken}")
    if PROBE in said:
        row = said[PROBE]
        parts.append(f"correlations and claims on the probe's one of {row['optimizer']}{_at(row)}")
    return "; ".join(parts)


def _at(row: Mapping[str, Any]) -> str:
    rate = row["learning_rate"]
    return "" if math.isnan(rate) else f" at rate {rate_words(rate)}"


def rate_words(rate: float) -> str:
    """A learning rate with an exponent, so that two of them can be compared at a glance."""
    return f"{rate:.1e}".replace(".0e", "e")


def in_words(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The steps side by side as text: a property and what it is for each row of the table.

    Args:
        table: As `two_steps` returns it.
    """
    rows = table.to_dict("records")
    return [(name, [say(row) for row in rows]) for name, say in PROPERTIES.items()]


def _count(row: Mapping[str, Any]) -> str:
    return "1 on each fold" if row["step"] == PROBE else f"{row['steps']:.0f}"


def _contexts(row: Mapping[str, Any]) -> str:
    if math.isnan(row["contexts"]):
        return "not recorded"
    fold = " (a whole fold)" if row["step"] == PROBE else ""
    return f"{row['contexts']:.0f}{fold}"


def _size(row: Mapping[str, Any]) -> str:
    """The norm of the update, also as a share of that of the weights."""
    if math.isnan(row["update_norm"]):
        return "not recorded"
    several = row["step"] == DECISION and row["steps"] > 1
    of_all = " in the mean of the selections" if several else ""
    share = f" ({100 * row['relative_norm']:.2g} % of the weights’)"
    known = "" if math.isnan(row["relative_norm"]) else share
    return f"{row['update_norm']:.2g}{known}{of_all}"


PROPERTIES = {
    "rests on it": lambda row: row["rests_on_it"],
    "optimizer": lambda row: row["optimizer"],
    "learning rate": lambda row: (
        "not recorded" if math.isnan(row["learning_rate"]) else rate_words(row["learning_rate"])
    ),
    "steps": _count,
    "contexts in a step": _contexts,
    "norm of the update": _size,
}
"""Property -> what it is for a row of `two_steps`, as text."""
OF = {PROBE: "the probe’s step", DECISION: "the decision’s steps"}
"""Whose a row is, as a heading."""


def _default(chosen_by: str | None) -> str:
    """That a default rate is small, as its effects are, and which flag sets another."""
    return (
        " (training's default, small as its effects; set yours: --learning-rate)"
        if chosen_by == "the default"
        else ""
    )
