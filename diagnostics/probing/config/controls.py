"""What a probe measures beside its steps: nulls, the placebo and a trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import NULLS
from diagnostics.models.named_pairs import training_rate
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.config.trajectory import (
    HORIZON,
    MINIBATCH,
    TrajectoryConfig,
    require_horizon,
)


@dataclass(frozen=True)
class ControlConfig:
    """What is measured beside the steps.

    Attributes:
        nulls: Among which positions the teacher is permuted, names of `folds.NULLS`; without
            `global` there is no context gain.
        placebos: Random directions of the placebo, each taken both ways; 0 for none.
        horizon: Numbers of optimizer steps after which a trajectory on fold 0 is measured; 0 or
            nothing takes none.
        warm_steps: Steps at a learning rate of 0 that fill the optimizer's state beforehand.
        minibatch: Contexts in an optimizer step of the trajectory, as many as the training to be
            foreseen has responses in a step; most of the trajectory's cost is in proportion to it.
        learning_rate: Of the trajectory; None takes the training's.

    Raises:
        DiagnosticsError: A null is unknown, or a number of the trajectory is out of its range.
    """

    nulls: tuple[str, ...] = field(
        default=("global",),
        metadata={
            "help": "permuted teachers: global, or within divergence (deciles) or token_type"
        },
    )
    placebos: int = field(
        default=4, metadata={"help": "random directions of the placebo, each both ways"}
    )

    horizon: tuple[int, ...] = field(
        default=HORIZON,
        metadata={
            "help": "optimizer steps after which a trajectory on fold 0 is measured; 0: none"
        },
    )
    warm_steps: int = field(
        default=0, metadata={"help": "steps at rate 0 that fill the optimizer's state before"}
    )
    minibatch: int = field(
        default=MINIBATCH, metadata={"help": "contexts in an optimizer step of the trajectory"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "of the trajectory; the training's where not given"}
    )

    def rate(self, pair: str) -> float:
        """The learning rate of the trajectory of a pair, given by name."""
        return training_rate(pair) if self.learning_rate is None else self.learning_rate

    def __post_init__(self):
        for null in self.nulls:
            require_null(null)
        require_horizon(self.horizon)
        # a trajectory comes last, and what it refuses should not cost the steps before it
        self.trajectory(0.0 if self.learning_rate is None else self.learning_rate)

    def trajectory(
        self, rate: float, *, loss: str = ProbeConfig.loss, beta: float = ProbeConfig.beta
    ) -> TrajectoryConfig:
        """The optimizer's steps of the trajectory."""
        return TrajectoryConfig(rate, loss, beta, self.minibatch, self.warm_steps)


def require_null(null: str) -> None:
    """Raise DiagnosticsError for a name that is no null."""
    if null not in NULLS:
        raise DiagnosticsError(f"Unknown null {null!r}. Known are {', '.join(NULLS)}.")
