"""On-policy distillation objectives per position, and their reduction with bounded memory.

With p the student's distribution, q the teacher's, y the sampled token, S the student's top K:

    forward_kl      KL(q||p) = sum q (ln q - ln p)              teacher first
    reverse_kl      KL(p||q) = sum p (ln p - ln q)              student first
    jsd             beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p
    sampled         -A ln p(y), A = ln q(y) - ln p(y) detached: the policy gradient whose mean is KL(p||q)'s
    topk_reverse    KL(p_S||q_S), both renormalised on S; S itself carries no gradient

beta = 0 of jsd is forward_kl and beta = 1 is reverse_kl, as in TRL's and Liger's generalised JSD: the interior
form tends to 0 at both ends, so the ends are special cases, not limits. Values are in nats.

Reference: arXiv 2306.13649 (generalised JSD), arXiv 2605.26844 (sampled-token loss).

The reduction is the sum over positions of weight times value, over a denominator that the caller counts
globally; accumulation and data parallelism then leave the gradient unchanged.

Numbers: logits are upcast to float32 (float64 stays). A token that both models exclude (-inf logits)
contributes 0. The teacher never receives a gradient.

Axes: N positions, n of a chunk, H hidden size, V vocabulary, K support.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diagnostics.divergences import Logits, chunk_size, top_ids
from diagnostics.types import DiagnosticsError

Loss = Literal["forward_kl", "reverse_kl", "jsd", "sampled", "topk_reverse"]
LOSSES: tuple[str, ...] = ("forward_kl", "reverse_kl", "jsd", "sampled", "topk_reverse")


def per_position(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    sampled_N: Tensor,
    *,
    loss: str,
    beta: float = 0.5,
    k: int = 16,
    advantage_N: Tensor | None = None,
) -> Tensor:
    """The objective [N] of each position in nats, differentiable in the student's logits.

    student_logits_NV, teacher_logits_NV: [N, V] over the same ids. sampled_N: [N] ids, used by `sampled` only.
    beta: used by `jsd` only. k: used by `topk_reverse` only. advantage_N: [N] replaces ln q(y) - ln p(y) in
    `sampled` (an advantage frozen at rollout). Raises DiagnosticsError for an unknown loss or a beta outside [0, 1].
    """
    check_loss(loss, beta=beta, k=k)
    ln_p_NV, ln_q_NV = _log_softmax(student_logits_NV), _log_softmax(teacher_logits_NV.detach())
    if loss == "sampled":
        return _sampled(ln_p_NV, ln_q_NV, sampled_N, advantage_N)
    if loss == "topk_reverse":
        ids_NK = top_ids(student_logits_NV.detach(), k)
        return _kl(ln_p_NV.gather(1, ids_NK).log_softmax(-1), ln_q_NV.gather(1, ids_NK).log_softmax(-1))
    if loss == "forward_kl" or (loss == "jsd" and beta == 0):
        return _kl(ln_q_NV, ln_p_NV)
    if loss == "reverse_kl" or beta == 1:
        return _kl(ln_p_NV, ln_q_NV)
    ln_m_NV = (beta * ln_q_NV.exp() + (1 - beta) * ln_p_NV.exp()).clamp(min=torch.finfo(ln_p_NV.dtype).tiny).log()
    return beta * _kl(ln_q_NV, ln_m_NV) + (1 - beta) * _kl(ln_p_NV, ln_m_NV)


def check_loss(loss: str, *, beta: float = 0.5, k: int = 16) -> None:
    """Raise DiagnosticsError for an unknown loss, a beta outside [0, 1], or a K that is not positive."""
    if loss not in LOSSES:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(LOSSES)}.")
    if not 0 <= beta <= 1:
        raise DiagnosticsError(f"beta is {beta}; it weighs two divergences and must lie in [0, 1]. 0 is forward KL, 1 reverse KL.")
    if k < 1:
        raise DiagnosticsError(f"A support of K = {k} tokens was asked for; K must be at least 1.")


def reduce(values_N: Tensor, weights_N: Tensor, denominator: float) -> Tensor:
    """Sum over positions of weight times value, divided by `denominator` (the global sum of weights, or count).

    A position of weight 0 does not count, whatever its value. Raises DiagnosticsError for a denominator <= 0.
    """
    if not denominator > 0:
        raise DiagnosticsError(f"The denominator of the loss is {denominator}; select at least one position.")
    kept_N = weights_N != 0
    return (values_N[kept_N] * weights_N[kept_N]).sum() / denominator


def chunked_loss(
    student_hidden_NH: Tensor,
    student_logits: Logits,
    teacher_hidden_NH: Tensor,
    teacher_logits: Logits,
    sampled_N: Tensor,
    *,
    loss: str,
    weights_N: Tensor,
    denominator: float,
    beta: float = 0.5,
    k: int = 16,
    advantage_N: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The reduced objective, a scalar in nats; logits live for one chunk of positions, in forward and in backward.

    Differentiable in student_hidden_NH [N, H] and in whatever parameters `student_logits` uses. weights_N: [N];
    positions of weight 0 are never projected. denominator: global, see `reduce`. chunk: positions.
    """
    check_loss(loss, beta=beta, k=k)
    kept_N = weights_N.nonzero()[:, 0]
    step = chunk or chunk_size(student_logits(student_hidden_NH[:1].detach()).shape[-1])

    def part(hidden_nH: Tensor, at_n: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_nV = teacher_logits(teacher_hidden_NH[at_n.to(teacher_hidden_NH.device)])
        student_nV = student_logits(hidden_nH)
        advantage_n = None if advantage_N is None else advantage_N[at_n]
        values_n = per_position(
            student_nV, teacher_nV.to(student_nV.device), sampled_N[at_n], loss=loss, beta=beta, k=k, advantage_N=advantage_n
        )
        return reduce(values_n, weights_N[at_n], denominator)

    parts = [checkpoint(part, student_hidden_NH[at_n], at_n, use_reentrant=False) for at_n in kept_N.split(step)]
    return torch.stack(parts).sum() if parts else student_hidden_NH.sum() * 0


def _log_softmax(logits_NV: Tensor) -> Tensor:
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV.log_softmax(-1)


def _kl(ln_a_NV: Tensor, ln_b_NV: Tensor) -> Tensor:
    """KL(a||b) [N], 0 where a is 0."""
    present_NV = ln_a_NV > -torch.inf
    terms_NV = ln_a_NV.exp() * (ln_a_NV.masked_fill(~present_NV, 0.0) - ln_b_NV.masked_fill(~present_NV, 0.0))
    return terms_NV.sum(-1)


def _sampled(ln_p_NV: Tensor, ln_q_NV: Tensor, sampled_N: Tensor, advantage_N: Tensor | None) -> Tensor:
    ln_p_N = ln_p_NV.gather(1, sampled_N[:, None])[:, 0]
    if advantage_N is None:
        advantage_N = ln_q_NV.gather(1, sampled_N[:, None])[:, 0] - ln_p_N
    return -advantage_N.detach() * ln_p_N
