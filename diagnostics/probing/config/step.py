"""The step and its folds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure.loss_names import LOSSES

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("full", "bfloat16")


@dataclass(frozen=True)
class ProbeConfig:
    """The step.

    Attributes:
        loss: Loss of the step, one of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`, from 0 to 1; no other loss reads it.
        optimizer: Whose first update is the direction: `adamw` or `sgd`.
        step: `auto` calibrates the size; otherwise a number of at least 0, which is the learning
            rate for `adamw` and the norm of the update for `sgd`.
        folds: Number of folds, at least 2: one step is taken on the prompts of each, and all other
            prompts are held out for it.
        seed: Seed of the folds and of the controls.
        gradient_precision: `full` takes gradients in the student's own dtype; `bfloat16` takes
            those of its layers under autocast, which is faster on a GPU and another direction.
            Divergences are always measured in the student's own dtype.

    Raises:
        DiagnosticsError: The loss, the optimizer or the precision is unknown, or the step is no
            number of at least 0.
    """

    loss: str = field(
        default="reverse_kl", metadata={"help": "OPD loss of the step", "choices": LOSSES}
    )
    beta: float = field(default=0.5, metadata={"help": "teacher's share in the mixture of jsd"})
    optimizer: str = field(
        default="adamw", metadata={"help": "direction of the step", "choices": OPTIMIZERS}
    )
    step: str = field(
        default="auto",
        metadata={"help": "auto, or a number: learning rate (adamw) or update norm (sgd)"},
    )
    folds: int = field(
        default=4,
        metadata={"help": "folds of prompts: one step on each, all others held out for it"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the folds and of the controls"})
    gradient_precision: str = field(
        default="full",
        metadata={
            "help": "full: gradients in the student's dtype; bfloat16: its layers under autocast",
            "choices": PRECISIONS,
        },
    )

    def __post_init__(self):
        requested_step(self.loss, self.optimizer, self.step)
        if self.gradient_precision not in PRECISIONS:
            raise DiagnosticsError(
                f"Unknown gradient precision {self.gradient_precision!r}. Known are"
                f" {', '.join(PRECISIONS)}."
            )

    @property
    def step_size(self) -> float | None:
        """The size that was asked for; None where it is to be calibrated."""
        return requested_step(self.loss, self.optimizer, self.step)


def requested_step(loss: str, optimizer: str, step: str | float) -> float | None:
    """The step size that was asked for; None for `auto`.

    Raises:
        DiagnosticsError: The loss or the optimizer is unknown, or the step is no number of at
            least 0.
    """
    if loss not in LOSSES:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(LOSSES)}.")
    if optimizer not in OPTIMIZERS:
        raise DiagnosticsError(
            f"Unknown optimizer {optimizer!r}. Known are {', '.join(OPTIMIZERS)}."
        )
    if step == "auto":
        return None
    try:
        size = float(step)
    except (TypeError, ValueError):
        size = float("nan")
    if not (math.isfinite(size) and size >= 0):
        raise DiagnosticsError(f"The step is 'auto' or a number of at least 0; got {step!r}.")
    return size
