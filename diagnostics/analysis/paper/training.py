"""The trainings of tables 2, 7 and 10 with controls: over seeds and prompts, in nats."""

from __future__ import annotations

from typing import Any

import pandas as pd

from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.paper.controlled import LONG
from diagnostics.core.settings import with_settings


@with_settings(bootstrap=Bootstrap)
def table_2(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Trainings under each mask at 3 and 5 %."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_7(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Trainings under masks inside Q3."""
    return pd.DataFrame(columns=LONG)


@with_settings(bootstrap=Bootstrap)
def table_10(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Teachability over budgets."""
    return pd.DataFrame(columns=LONG)
