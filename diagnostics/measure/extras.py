"""Measurements that are made only where they are asked for, because few criteria read them.

With p the student's distribution at a position, q the teacher's, y the sampled token, S and T the K
most likely tokens of p and of q, rho = ln p/q clipped to +-30 and L = (1 - p)/p:

    signal = Var_p rho
    noise  = E_p[(rho - b)^2 L] - Var_p rho      b = E_p[rho L] / E_p[L]

These are the squared size of the mean, and the variance, of the sampled-token gradient with its
best baseline b in the student's Fisher metric, in which a token's score function has the squared
size L. The noise is therefore never negative; it is 0 over two tokens.

    ier_signal, ier_noise              over S | T | {y}: a log-probability that is missing from a
                                       model's own list is -12 (y's is known), and both models are
                                       renormalized there
    ier_full_signal, ier_full_noise    over the whole vocabulary, renormalized by nothing
    teacher_top1_gap                   q(a) - p(a) of the teacher's first choice a

Reference: arXiv 2609.24432 and its released code (the candidates, the floor and the clip); arXiv
2606.17199's code logs teacher_top1_gap.

Departures: L is not limited by an epsilon, since p_i L_i = 1 - p_i needs none; a token of
probability 0 is never sampled and counts in neither sum.

Cost: the sums over the vocabulary take as long as all of `divergences` together; the candidates are
some tens of numbers per position.

Axes: N positions, r of a row block, V vocabulary, K support, C = 2K + 1 candidates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diagnostics.core.schema import SCHEMA, support_column
from diagnostics.measure.divergences import More, to_float64, top_ids
from diagnostics.measure.extra_names import COLUMNS, check_extras

MISSING_LOGPROB = -12.0
"""ln of the probability that stands for one that is missing from a model's list."""
LOG_RATIO_LIMIT = 30.0
ROWS = 8
"""Positions whose whole distributions are held in float64 at once."""


def asked(names: Sequence[str], *, k: int, sweep: Sequence[int] = ()) -> More | None:
    """What `divergences.measure_hidden` takes as `more` to measure some extras; None for none.

    Args:
        names: Keys of COLUMNS.
        k: Size of the supports, in tokens.
        sweep: Further K.

    Raises:
        DiagnosticsError: An extra is unknown.
    """
    names = check_extras(names)
    return partial(measure_extras, names=names, k=k, sweep=sweep) if names else None


@torch.no_grad()
def measure_extras(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    sampled_N: Tensor,
    *,
    names: Sequence[str],
    k: int = 16,
    sweep: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Measure extras at every position from the logits of both models.

    Args:
        student_logits_NV: [N, V], any floating dtype; -inf excludes a token.
        teacher_logits_NV: [N, V] over the same ids.
        sampled_N: [N] ids of the sampled tokens.
        names: Keys of COLUMNS.
        k: Size of the supports, in tokens.
        sweep: Further K, for which the columns that depend on it are `<name>_k<K>`.

    Returns:
        float64 tensors [N] by column name; NaN where a logit is NaN or +inf.

    Raises:
        DiagnosticsError: An extra is unknown.

    Reference:
        arXiv 2609.24432; see the head of this module.
    """
    names = check_extras(names)
    parts = [
        _block(student_rV, teacher_rV, sampled_r, names, k, sweep)
        for student_rV, teacher_rV, sampled_r in zip(
            student_logits_NV.split(ROWS), teacher_logits_NV.split(ROWS), sampled_N.split(ROWS)
        )
    ]
    return {
        name: torch.cat([part[name] for part in parts])
        if parts
        else torch.zeros(0, dtype=torch.float64)
        for name in _names(names, k, sweep)
    }


def _names(extras: Sequence[str], k: int, sweep: Sequence[int]) -> list[str]:
    """The columns of some extras, those of every K among them."""
    return [
        support_column(name, size)
        for extra in extras
        for name in COLUMNS[extra]
        for size in (None, *(each for each in dict.fromkeys(sweep) if each != k))
        if size is None or SCHEMA[name].by_support
    ]


def _block(
    student_rV: Tensor,
    teacher_rV: Tensor,
    sampled_r: Tensor,
    extras: Sequence[str],
    k: int,
    sweep: Sequence[int],
) -> dict[str, Tensor]:
    ln_p_rV, ln_q_rV = (
        to_float64(logits.to(torch.promote_types(logits.dtype, torch.float32))).log_softmax(-1)
        for logits in (student_rV, teacher_rV)
    )
    bad_r = ln_p_rV.isnan().any(-1) | ln_q_rV.isnan().any(-1)
    out: dict[str, Tensor] = {}
    if "ier" in extras:
        out["ier_full_signal"], out["ier_full_noise"] = signal_and_noise(ln_p_rV, ln_q_rV)
        for size in dict.fromkeys((k, *sweep)):
            found = signal_and_noise(*_candidates(ln_p_rV, ln_q_rV, sampled_r, size))
            for name, values_r in zip(("ier_signal", "ier_noise"), found, strict=True):
                out[support_column(name, None if size == k else size)] = values_r
    if "teacher_top1_gap" in extras:
        first_r1 = top_ids(ln_q_rV, 1)
        gap_r1 = ln_q_rV.gather(1, first_r1).exp() - ln_p_rV.gather(1, first_r1).exp()
        out["teacher_top1_gap"] = gap_r1[:, 0]
    return {name: values_r.masked_fill(bad_r, float("nan")) for name, values_r in out.items()}


def _candidates(
    ln_p_rV: Tensor, ln_q_rV: Tensor, sampled_r: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """ln p and ln q [r, C] over S, T and y, renormalized; entries that repeat one are -inf."""
    s_rK, t_rK, y_r1 = top_ids(ln_p_rV, k), top_ids(ln_q_rV, k), sampled_r[:, None]
    ids_rC = torch.cat([s_rK, t_rK, y_r1], -1)
    in_s_rC, in_t_rC = ((ids_rC[:, :, None] == top[:, None, :]).any(2) for top in (s_rK, t_rK))
    is_y_rC = ids_rC == y_r1
    width = s_rK.shape[1]
    place_C = torch.arange(ids_rC.shape[1], device=ids_rC.device)
    repeats_rC = (in_s_rC & (place_C >= width)) | (in_t_rC & (place_C >= 2 * width))
    found = []
    for ln_rV, listed_rC in ((ln_p_rV, in_s_rC), (ln_q_rV, in_t_rC)):
        ln_rC = ln_rV.gather(1, ids_rC)
        known_rC = (listed_rC | is_y_rC) & ln_rC.isfinite()
        ln_rC = torch.where(known_rC, ln_rC, MISSING_LOGPROB)
        found.append(ln_rC.masked_fill(repeats_rC, -torch.inf).log_softmax(-1))
    return found[0], found[1]


def signal_and_noise(ln_p_NC: Tensor, ln_q_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of the sampled-token gradient over some tokens.

    Args:
        ln_p_NC: [N, C] ln of the student's probabilities, which add up to 1; -inf is a token that
            does not exist.
        ln_q_NC: [N, C] the same of the teacher.

    Returns:
        Two tensors [N] in nats squared; see the head of this module.
    """
    there_NC = ln_p_NC > -torch.inf
    rho_NC = torch.where(there_NC, ln_p_NC - ln_q_NC, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    p_NC = ln_p_NC.exp()
    rest_NC = -torch.expm1(ln_p_NC) * there_NC  # p L = 1 - p
    mean_N1 = (p_NC * rho_NC).sum(-1, keepdim=True)
    signal_N = (p_NC * (rho_NC - mean_N1).square()).sum(-1)
    mass_N1 = rest_NC.sum(-1, keepdim=True)
    base_N1 = torch.where(mass_N1 > 0, (rest_NC * rho_NC).sum(-1, keepdim=True) / mass_N1, mean_N1)
    second_N = (rest_NC * (rho_NC - base_N1).square()).sum(-1)
    # What is below 0 is rounding: a variance is not negative.
    return signal_N, (second_N - signal_N).clamp(min=0)
