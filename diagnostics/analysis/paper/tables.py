"""The paper's tables and figures, each as released, controlled, and why the two differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from diagnostics.analysis.config import Bootstrap
from diagnostics.core.settings import with_settings

KEYS = ("row", "quantity", "k", "budget")
SIDES = ("released", "controlled", "context")
COLUMNS = [
    *KEYS,
    "unit",
    *(f"{side}{end}" for side in SIDES for end in ("", "_low", "_high", "_n")),
    "why",
]
"""Columns of a final table. `unit` is `<released>; <controlled>` where the two units differ."""
DIFFERENCES = ["artefact", "title", "released", "controlled", "why", "printed"]


@with_settings(bootstrap=Bootstrap)
def paper(
    tokens: pd.DataFrame,
    *,
    cells: pd.DataFrame | None = None,
    kept: pd.DataFrame | None = None,
    ks: Iterable[int] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """Make every table and figure of the paper that the token table allows."""
    return {"paper_differences": pd.DataFrame(columns=DIFFERENCES)}
