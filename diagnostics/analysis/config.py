"""How intervals are made, and what is concluded from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import as_written


@dataclasses.dataclass(frozen=True)
@as_written
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


CONTROLLED_OUTCOMES = ("context_gain", "context_gain_divergence", "context_gain_token_type")
"""Outcomes that a verdict may rest on: each has a null that it could have failed against."""
SIGNAL = 1e-6
"""Mean forward KL in nats per position below which two models differ by float32's rounding alone:
there is nothing to learn, and what a step changes is of that size as well.
"""
FEWEST_PROMPTS = 20
"""Number of prompts below which intervals were not calibrated (`benchmarks/CALIBRATION.md`)."""


@dataclasses.dataclass(frozen=True)
@as_written
class PrimaryChoices:
    """What is concluded from, chosen and recorded before the probe has measured any gain.

    Attributes:
        outcome: Column of the outcome, one of `CONTROLLED_OUTCOMES`.
        population: `held_out` or `step`.
        criterion: The criterion whose choice of positions is in question.
        budget: Share of the positions that it may choose.
        horizon: Number of optimizer steps after which criteria are compared.
        margin: Share of a statistic by which another K may change it and still agree.
        level: 1 - level is the chance of any false verdict that is accepted.
        minimum_prompts: Number of prompts below which there is no verdict, 20 or more.
    """

    outcome: str = "context_gain"
    population: str = "held_out"
    criterion: str = "teachability"
    budget: float = 0.05
    horizon: int = 20
    margin: float = 0.25
    level: float = 0.95
    minimum_prompts: int = FEWEST_PROMPTS

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)!r} ({rule})"
            for name, (fits, rule) in _RULES.items()
            if not fits(getattr(self, name))
        ]
        if wrong:
            raise DiagnosticsError(
                f"These primary choices cannot be: {'; '.join(wrong)}. Choose others."
            )

    def sha256(self) -> str:
        """Hash of the choices, whatever their order."""
        return hashlib.sha256(self.as_text().encode()).hexdigest()

    def as_text(self) -> str:
        """The choices as `parse` reads them, in the order of their names."""
        return ",".join(f"{name}={value}" for name, value in sorted(vars(self).items()))

    @classmethod
    def parse(cls, text: str | None) -> PrimaryChoices:
        """Read choices that differ from the defaults.

        Args:
            text: `name=value` pairs between commas, e.g. `budget=0.1,horizon=10`; None or an empty
                text means the defaults.

        Raises:
            DiagnosticsError: A name is unknown or appears twice, or a value cannot be one.
        """
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        chosen: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in (text or "").split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in kinds or not equals or name in chosen:
                raise DiagnosticsError(
                    f"Primary choices are name=value pairs between commas; got {part!r}. Names,"
                    f" each at most once: {', '.join(kinds)}."
                )
            try:
                chosen[name] = kinds[name](value)
            except ValueError as error:
                raise DiagnosticsError(
                    f"The primary choice {name} takes {kinds[name].__name__}; got {value!r}."
                ) from error
        return cls(**chosen)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "outcome": (
        lambda value: value in CONTROLLED_OUTCOMES,
        f"one of {', '.join(CONTROLLED_OUTCOMES)}: another has no null to fail against",
    ),
    "population": (lambda value: value in ("held_out", "step"), "held_out or step"),
    "criterion": (bool, "a name"),
    "budget": (lambda value: 0 < value <= 1, "above 0, at most 1"),
    "horizon": (lambda value: value >= 0, "0 or more"),
    "margin": (lambda value: 0 < value < 1, "between 0 and 1"),
    "level": (lambda value: 0.5 <= value < 1, "from .5 to below 1"),
    "minimum_prompts": (lambda value: value >= FEWEST_PROMPTS, f"{FEWEST_PROMPTS} or more"),
}
