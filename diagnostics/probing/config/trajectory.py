"""Short trajectories: their horizons, minibatches and optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure.loss_names import check_loss
from diagnostics.models.named_pairs import TRAINING_OPTIMIZER

HORIZON = (1, 5, 20)
"""Optimizer steps after which a trajectory is measured where nothing else is asked for."""
MINIBATCH = 16
"""Contexts in a step, as many as training's responses in a step."""


@dataclass(frozen=True)
class TrajectoryConfig:
    """The optimizer's steps.

    Attributes:
        rate: Learning rate, constant over the steps.
        loss: One of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`.
        minibatch: Contexts in a step.
        warm_steps: Steps at a learning rate of 0 that fill the optimizer's state beforehand.
        optimizer: AdamW's settings and the bound of the gradient's norm, under TRL's names.

    Raises:
        DiagnosticsError: A number is out of its range, or the loss is unknown.
    """

    rate: float
    loss: str = "reverse_kl"
    beta: float = 0.5
    minibatch: int = MINIBATCH
    warm_steps: int = 0
    optimizer: dict[str, float] = field(default_factory=lambda: dict(TRAINING_OPTIMIZER))

    def __post_init__(self):
        check_loss(self.loss, beta=self.beta)
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise DiagnosticsError(
                f"A trajectory's learning rate is a number of at least 0; got {self.rate!r}."
            )
        if self.minibatch < 1 or self.warm_steps < 0:
            raise DiagnosticsError(
                "A trajectory takes minibatches of at least 1 context and at least 0 warm steps;"
                f" got minibatch={self.minibatch}, warm_steps={self.warm_steps}."
            )


def require_horizon(horizon: Sequence[int]) -> tuple[int, ...]:
    """The horizons of a trajectory: distinct numbers of steps in ascending order.

    Args:
        horizon: Numbers of optimizer steps; 0 stands for the one step at theta0, which is no
            trajectory, and is left out.

    Returns:
        The numbers; none where no trajectory is asked for.

    Raises:
        DiagnosticsError: A number is negative or no whole number.
    """
    wrong = [k for k in horizon if int(k) != k or k < 0]
    if wrong:
        raise DiagnosticsError(
            f"A horizon is a number of optimizer steps, such as 1,5,20, or 0 for none; got"
            f" {wrong[0]!r}."
        )
    return tuple(sorted({int(k) for k in horizon} - {0}))
