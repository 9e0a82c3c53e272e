"""How intervals are made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """How intervals are made."""

    draws: int = dataclasses.field(default=1000, metadata={"help": "bootstrap draws over prompts"})
    level: float = dataclasses.field(default=0.95, metadata={"help": "level of the intervals"})
