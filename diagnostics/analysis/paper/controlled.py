"""The paper's statistics with controls: predictors before the step, nats, cuts in the draws.

    controlled   y = forward_kl - forward_kl_after, the gain of the checkpoint in nats
    context      y = context_gain, the probe's held-out gain less that of a permuted teacher

Every table is in the long form `row, quantity, k, budget, estimate, low, high, n`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd

from diagnostics.analysis.config import Bootstrap
from diagnostics.core.settings import with_settings

Outcome = Literal["checkpoint", "context"]
BUDGETS = (0.03, 0.05)
"""Budgets of table 8."""
LONG = ["row", "quantity", "k", "budget", "estimate", "low", "high", "n"]


@with_settings(bootstrap=Bootstrap)
def table_1(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """The Q3 gap of every K."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_5(
    tokens: pd.DataFrame,
    *,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """What the numbers rest on."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_6(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """The Q3 gap of every support proxy."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_8(
    tokens: pd.DataFrame,
    *,
    budgets: Iterable[float] = BUDGETS,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """What each selector selects."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_9(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """The regression on D^L and D^I at every K."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def buckets(
    tokens: pd.DataFrame,
    *,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Quartile buckets inside Q3."""
    return pd.DataFrame(columns=LONG)


def planes(
    tokens: pd.DataFrame, *, bins: int = 20, outcome: Outcome = "checkpoint"
) -> pd.DataFrame:
    """Percentile planes of figures 2A to 2C."""
    return pd.DataFrame(
        columns=[
            "figure",
            "x_bin",
            "y_bin",
            "x_low",
            "x_high",
            "y_low",
            "y_high",
            "positions",
            "estimate",
        ]
    )
