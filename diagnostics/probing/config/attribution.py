"""Which kernel of an attribution is measured, on how many positions."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttributionConfig:
    """Which kernel, on how many positions.

    Attributes:
        sample: Step positions whose gain is split by source, the same number from each quadrant.
        full_kernel: Whether the gain is split by all parameters too, not the output layer alone.
    """

    sample: int = field(
        default=256,
        metadata={
            "help": (
                "step positions whose gain is split by source, the same number from each quadrant"
            )
        },
    )
    full_kernel: bool = field(
        default=False, metadata={"help": "split by all parameters too, not the output layer alone"}
    )
