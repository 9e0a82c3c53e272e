"""The grid of an intervention: criteria, budgets, horizons, and how cells are matched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diagnostics import criteria as registry
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import as_written
from diagnostics.models.named_pairs import training_rate
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.config.trajectory import (
    HORIZON,
    MINIBATCH,
    TrajectoryConfig,
    require_horizon,
)

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

MATCHES = ("norm", "lr")
SCOPES = ("batch", "context", "table")
CRITERIA = tuple(
    name for name in registry.names() if registry.find(name).recommended and name != "random"
)
"""The criteria to start with; random is always there."""
BUDGETS = (0.05, 0.1, 0.3)


@dataclass(frozen=True)
@as_written
class InterventionConfig:
    """The grid of cells.

    Attributes:
        criteria: Registered criteria; `full`, `random` and its fair variants are always present.
        budgets: Shares of the positions, each in (0, 1].
        match: What all cells of horizon 0 have in common: the `norm` of the update, or the learning
            rate (`lr`).
        random_draws: Selections per budget of each criterion that draws random numbers, at least 1.
        horizon: Optimizer steps after which cells are measured; 0 alone leaves the one step.
        scope: What a budget is a share of in a trajectory: each `batch` or each response
            (`context`), measured anew, or the fold's `table` at theta0.
        warm_steps: Steps at a learning rate of 0 that fill the optimizer's state beforehand.
        minibatch: Contexts in an optimizer step.
        learning_rate: Of the trajectories; None takes the training's.

    Raises:
        DiagnosticsError: `match`, `scope` or a horizon is unknown, or there is no random draw.
    """

    criteria: tuple[str, ...] = field(
        default=CRITERIA, metadata={"help": "criteria; full, random and its variants are added"}
    )
    budgets: tuple[float, ...] = field(default=BUDGETS, metadata={"help": "shares of positions"})
    match: str = field(
        default="norm",
        metadata={
            "help": "what cells of one step have in common: norm of the update, or lr",
            "choices": MATCHES,
        },
    )
    random_draws: int = field(default=3, metadata={"help": "random selections a budget"})
    horizon: tuple[int, ...] = field(
        default=HORIZON,
        metadata={"help": "optimizer steps after which cells are measured; 0: one step alone"},
    )
    scope: str = field(
        default="batch",
        metadata={
            "help": "what a budget is a share of in a trajectory (table: chosen at theta0)",
            "choices": SCOPES,
        },
    )
    warm_steps: int = field(
        default=0, metadata={"help": "steps at rate 0 that fill the optimizer's state beforehand"}
    )
    minibatch: int = field(default=MINIBATCH, metadata={"help": "contexts in an optimizer step"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "of the trajectories; the training's where not given"}
    )

    def __post_init__(self):
        for name, value, known in (
            ("match", self.match, MATCHES),
            ("scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise DiagnosticsError(f"Unknown {name} {value!r}. Known are {', '.join(known)}.")
        require_horizon(self.horizon)
        if self.random_draws < 1:
            raise DiagnosticsError(
                f"random_draws is {self.random_draws}; a comparison with random needs at least 1,"
                " and 2 to see its spread."
            )

    def trajectory(self, pair: Pair, probe: ProbeConfig) -> TrajectoryConfig:
        """The optimizer's steps of a pair's trajectories."""
        rate = training_rate(pair.name) if self.learning_rate is None else self.learning_rate
        return TrajectoryConfig(rate, probe.loss, probe.beta, self.minibatch, self.warm_steps)
