"""The manifest and the tables of a run: all that its summary in sentences needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from diagnostics.analysis.config import PrimaryChoices
from diagnostics.analysis.decision import LOSS_MEASURE

LEVEL = 0.95
"""Level of the intervals where a manifest does not record it."""


@dataclass(frozen=True)
class RunTables:
    """A run's manifest and its tables by name."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The content of manifest.json."""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Tables by the name of their file, without its ending."""

    def table(self, name: str) -> pd.DataFrame | None:
        """The table of that name; None where the run has none, or none with rows."""
        table = self.tables.get(name)
        return None if table is None or table.empty else table

    def stage(self, name: str) -> dict[str, Any]:
        """Settings and facts of a stage in one dictionary; a fact replaces a setting of its name,
        since it says what was used in the end.
        """
        stage = self.manifest.get("stages", {}).get(name, {})
        return {**stage.get("settings", {}), **(stage.get("facts") or {})}

    @property
    def measure(self) -> str | None:
        """The divergence that the run's loss lowers, by which criteria are judged; None where no
        stage records a loss.
        """
        losses = [self.stage(name).get("loss") for name in ("intervene", "probe", "validate")]
        return next((LOSS_MEASURE[loss] for loss in losses if loss in LOSS_MEASURE), None)

    @property
    def horizon(self) -> int:
        """The horizon at which criteria are compared, as it was registered before the probe."""
        primary = self.manifest.get("primary") or {}
        return int(primary.get("choices", {}).get("horizon", PrimaryChoices.horizon))

    @property
    def level(self) -> float:
        """Level of the intervals, between 0 and 1."""
        return float(self.stage("analyze").get("level", LEVEL))
