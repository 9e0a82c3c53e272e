"""How contexts are scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostics.measure import extra_names
from diagnostics.models import batch_size


@dataclass(frozen=True)
class ScoreConfig:
    """How contexts are scored.

    Attributes:
        k: Size of the top-K supports.
        sweep: Other sizes K that are measured in the same pass.
        batch_tokens: Tokens in one forward pass, padding included; None takes 8,192 on the CPU,
            fewer for the gradient of a large student, and on CUDA what the free memory holds
            (`models.batch_size`).
        extra: Further measurements (`measure.extra_names.COLUMNS`).
    """

    k: int = field(default=16, metadata={"help": "size of the top-K supports"})
    sweep: tuple[int, ...] = field(
        default=(4, 8, 32), metadata={"help": "other K measured in the same pass"}
    )
    batch_tokens: int | None = field(default=None, metadata=batch_size.FLAG)
    extra: tuple[str, ...] = field(
        default=(),
        metadata={"help": f"measurements that few criteria read: {', '.join(extra_names.COLUMNS)}"},
    )

    def __post_init__(self) -> None:
        extra_names.check_extras(self.extra)
