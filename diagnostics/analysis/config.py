"""How intervals are made."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """The settings of intervals that are flags of every analysis command.

    Attributes:
        draws: Number of times that the prompts are resampled.
        level: Coverage of the intervals, between 0 and 1.
    """

    draws: int = dataclasses.field(default=1000, metadata={"help": "bootstrap draws over prompts"})
    level: float = dataclasses.field(default=0.95, metadata={"help": "level of the intervals"})


@dataclasses.dataclass(frozen=True)
class Bootstrap(AnalysisConfig):
    """How the prompts are resampled, and how wide the intervals are.

    Attributes:
        seed: Seed of the draws; the criterion `random` takes the same one.
    """

    seed: int = dataclasses.field(
        default=0, metadata={"help": "seed of the draws and of the criterion random"}
    )
