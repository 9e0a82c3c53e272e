"""What the tokens that both models list say, as other programs log it while they train.

With p the student's distribution at a position, q the teacher's, S and T the K most likely tokens
of p and of q, m = |S & T|, and p', q' both renormalized on S & T:

    listed_student_mass, listed_teacher_mass    sum over T of p, and of q
    overlap_advantage                           sum over S & T of p' (ln q' - ln p') / m
    overlap_advantage_teacher                   sum over S & T of q (ln p - ln q) / m

The first advantage is -KL(p'||q')/m, so that it is never positive and 0 where the models agree on
their shared tokens; the second is over the whole vocabulary's probabilities and may have either
sign.

Reference: arXiv 2604.13016, equation 7, for the first; verl's metrics of top-K distillation for the
second and the masses.

Departure: where no token is shared both are NaN, where verl's code has 0.

Axes: N positions, K support."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def measure_overlap(lists: Mapping[str, Tensor], *, k: int) -> dict[str, Tensor]:
    """Measure the tokens that both models list.

    `divergences.measure_hidden` takes it as `of_lists`, so that the lists are those of the supports
    and are searched once.

    Args:
        lists: `s` and `t`, ids [N, K] of each model's most likely tokens, most likely first, and
            `p_t` and `q_t`, float64 [N, K], ln of both models' probabilities of the teacher's.
        k: Size of the lists, in tokens; longer ones are cut.

    Returns:
        float64 tensors [N] by name; NaN where a logit is NaN or +inf.

    Reference:
        See the head of this module.
    """
    own_NK, listed_NK, ln_p_NK, ln_q_NK = (lists[name][:, :k] for name in ("s", "t", "p_t", "q_t"))
    shared_NK = (listed_NK[:, :, None] == own_NK[:, None, :]).any(2)
    found = {
        "listed_student_mass": ln_p_NK.exp().sum(-1),
        "listed_teacher_mass": ln_q_NK.exp().sum(-1),
        "overlap_advantage": overlap_advantage(ln_p_NK, ln_q_NK, shared_NK),
        "overlap_advantage_teacher": _mean_shared(
            ln_q_NK.exp() * (ln_p_NK - ln_q_NK), ln_q_NK, shared_NK
        ),
    }
    bad_N = ln_p_NK.isnan().any(-1) | ln_q_NK.isnan().any(-1)
    return {name: values_N.masked_fill(bad_N, float("nan")) for name, values_N in found.items()}


def overlap_advantage(ln_p_NK: Tensor, ln_q_NK: Tensor, shared_NK: Tensor) -> Tensor:
    """Mean over the shared tokens of p' (ln q' - ln p'), renormalized on them; NaN without any.

    Args:
        ln_p_NK: [N, K] ln of the student's probabilities.
        ln_q_NK: [N, K] the same of the teacher.
        shared_NK: Mask bool [N, K] of the tokens that both models list.
    """
    ln_p_NK, ln_q_NK = (
        ln_NK.masked_fill(~shared_NK, -torch.inf).log_softmax(-1) for ln_NK in (ln_p_NK, ln_q_NK)
    )
    return _mean_shared(ln_p_NK.exp() * (ln_q_NK - ln_p_NK), ln_p_NK, shared_NK)


def _mean_shared(terms_NK: Tensor, weight_NK: Tensor, shared_NK: Tensor) -> Tensor:
    """Mean of the terms over the shared tokens; a term whose weight e^w is 0 is 0."""
    counted_NK = shared_NK & (weight_NK > -torch.inf)
    return torch.where(counted_NK, terms_NK, 0.0).sum(-1) / shared_NK.sum(-1)
