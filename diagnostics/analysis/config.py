"""How intervals are made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """The flags that every analysis shares."""

    draws: int = dataclasses.field(default=1000, metadata={"help": "bootstrap draws over prompts"})
    level: float = dataclasses.field(default=0.95, metadata={"help": "level of the intervals"})


@dataclasses.dataclass(frozen=True)
class Bootstrap(AnalysisConfig):
    """How the prompts are resampled, and how wide the intervals are.

    Attributes:
        draws: Number of times that the prompts are resampled.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the draws; the criterion `random` takes the same one.
    """

    seed: int = 0
