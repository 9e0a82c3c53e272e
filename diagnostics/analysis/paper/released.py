"""The paper's tables as its released scripts compute them, from one token table.

Every table is in the long form `row, quantity, k, budget, estimate, low, high, n`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from diagnostics.analysis.paper.controlled import LONG


def table_1(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """The Q3 gap of C by K: percentile interval over contexts, and matched."""
    return pd.DataFrame(columns=LONG)


def table_5(tokens: pd.DataFrame) -> pd.DataFrame:
    """How many positions, contexts and prompts the numbers rest on."""
    return pd.DataFrame(columns=LONG)


def table_6(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """The Q3 gap of every support proxy, by K."""
    return pd.DataFrame(columns=LONG)


def table_8(tokens: pd.DataFrame, *, budgets: Iterable[float] = (0.03, 0.05)) -> pd.DataFrame:
    """Mean gain of the positions that each selector takes."""
    return pd.DataFrame(columns=LONG)


def table_9(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """Standardized coefficients of D^L and D^I, by K."""
    return pd.DataFrame(columns=LONG)


def buckets(tokens: pd.DataFrame) -> pd.DataFrame:
    """Mean gain of the quartile buckets of four scores inside Q3."""
    return pd.DataFrame(columns=LONG)


def planes(tokens: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """Percentile planes of figures 2A to 2C."""
    return pd.DataFrame()


def table_2(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Trainings under each mask, at 3 and 5 %."""
    return pd.DataFrame(columns=LONG)


def table_7(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Trainings under masks inside Q3."""
    return pd.DataFrame(columns=LONG)


def table_10(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Trainings with teachability over budgets."""
    return pd.DataFrame(columns=LONG)
