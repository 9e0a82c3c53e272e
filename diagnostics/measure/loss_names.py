"""The names of the losses, and what their settings can be: all that flags need of `losses`."""

from __future__ import annotations

from diagnostics.core.errors import DiagnosticsError

LOSSES: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd", "sampled", "topk_reverse")


def check_loss(loss: str, *, beta: float = 0.5, k: int = 16) -> None:
    """Raise DiagnosticsError for an unknown loss, beta outside [0, 1], or K below 1."""
    if loss not in LOSSES:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(LOSSES)}.")
    if not 0 <= beta <= 1:
        raise DiagnosticsError(
            f"beta is {beta}; it weighs two divergences and must lie in [0, 1]. 0 is forward KL, 1"
            " reverse KL."
        )
    if k < 1:
        raise DiagnosticsError(f"A support of K = {k} tokens was asked for; K must be at least 1.")
