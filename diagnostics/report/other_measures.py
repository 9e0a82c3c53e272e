"""What the cell of a decision does by the divergences that the decision does not rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis.decision import MEASURE_WORDS, OF_REGISTERED, named_cell
from diagnostics.core.shown import by_uncertainty
from diagnostics.report.naming import TRUE, of_all_rollouts


def other_measures(table: pd.DataFrame, registered: tuple[str, float] | None) -> str:
    """Whether the recommended cell, or the registered one, does the same by other divergences.

    A selection may lower one direction of the divergence and not the other, so that a decision by
    the trained loss alone can hide what matters to a reader of the other direction.

    Args:
        table: As `analysis.decision.decide` returns it, or read back from decision.csv.
        registered: Criterion and budget that were registered; None where none were.

    Returns:
        A sentence with each measure whose verdict is another, in nats per position with half the
        interval; that they agree, where all do; empty without a judged cell or other measures.
    """
    cell = _cell(table, registered)
    if cell is None or cell["verdict"] not in OF_REGISTERED:
        return ""
    rows = [row for row in _beside(table, cell) if row["verdict"] in OF_REGISTERED]
    other = [row for row in rows if row["verdict"] != cell["verdict"]]
    if not rows:
        return ""
    if not other:
        names = " and ".join(MEASURE_WORDS[row["measure"]] for row in rows)
        return f"The verdict on {named_cell(cell)} is the same by {names}."
    said = "; ".join(f"by {MEASURE_WORDS[row['measure']]} {_words(row)}" for row in other)
    return f"Exploratory, {named_cell(cell)} by another measure: {said}."


def _cell(table: pd.DataFrame, registered: tuple[str, float] | None) -> Mapping[str, Any] | None:
    """The recommended cell, otherwise the registered one, by the measure of the decision."""
    rows = table[table["primary"].isin(TRUE)]
    chosen = rows[rows["recommended"].isin(TRUE)] if "recommended" in rows else rows[:0]
    if chosen.empty and registered is not None:
        chosen = _same(rows, *registered)
    return chosen.iloc[0].to_dict() if len(chosen) else None


def _beside(table: pd.DataFrame, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same cell at the same horizon, by each measure but its own."""
    rows = of_all_rollouts(_same(table, cell["criterion"], cell["budget"]))
    other = (rows["horizon"] == cell["horizon"]) & (rows["measure"] != cell["measure"])
    return rows[other].to_dict("records")


def _same(table: pd.DataFrame, criterion: str, budget: float) -> pd.DataFrame:
    near = np.isclose(table["budget"].astype(float), budget)
    return table[(table["criterion"] == criterion) & near]


def _words(row: Mapping[str, Any]) -> str:
    """A verdict with its difference to random and half the interval."""
    half = (row["over_random_high"] - row["over_random_low"]) / 2
    own = by_uncertainty(row["over_random"], half, sign=True)
    return f"{OF_REGISTERED[row['verdict']]} ({own} ± {by_uncertainty(half, half)})"
