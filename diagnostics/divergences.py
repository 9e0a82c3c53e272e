"""Entropies, divergences, top-K supports and masses of two next-token distributions. The only definition of each.

With p the student's distribution at a position, q the teacher's, y the sampled token, S and T the K most
likely tokens of p and of q and U = S | T, all sums over the whole shared vocabulary unless a set is named:

    student_entropy, teacher_entropy    H(p), H(q)                       nats
    forward_kl                          KL(q||p) = sum q (ln q - ln p)   teacher first
    reverse_kl                          KL(p||q) = sum p (ln p - ln q)   student first
    js                                  KL(p||m)/2 + KL(q||m)/2, m = (p + q)/2; at most ln 2
    hellinger                           sqrt(1 - sum sqrt(p q))
    acceptance                          min(1, q(y)/p(y)); its mean under p is 1 - total variation
    compatibility                       sum over S of q
    compatibility_intersection          sum over S & T of q
    topk_overlap, topk_jaccard          |S & T|/K, |S & T|/|U|
    shared_student_mass                 sum over S & T of p
    bhattacharyya                       sum over U of sqrt(p_U q_U), both renormalised on U
    union_forward_kl                    KL(q_U||p_U), teacher first
    union_log_ratio_variance            variance under p_U of ln q_U - ln p_U
    union_forward_kl_released           KL over U of max(1e-12, q/q(T) on T else 0) from max(1e-12, p/p(S) on S else 0)

Reference: the measurements of arXiv 2605.26844 and its released scripts; union_log_ratio_variance is the
weight of projected-gradient selection, and student_top1_in_teacher_top5 the test of SelecTKD.

Departures: every sum is exact over the vocabulary. The released training code sees only each model's own
list; its divergence is kept under the name `released` for comparison. Top-K ties go to the lower token id.

Numbers: logits are upcast to float32 (float64 stays) before any softmax; vocabulary-wide terms are formed from
the log-ratio ln q - ln p, so that what cancels has cancelled before it is multiplied, and are added up in
float64. KLs may come out negative by rounding and are returned so.

Undefined is NaN: a position with a NaN or +inf logit in either model is NaN in every measurement. A logit of -inf
is probability 0, and 0 ln 0 = 0; KL(q||p) is inf where q > 0 and p = 0.

Axes: N positions, n of a chunk, r of a row block, H hidden size, V vocabulary, K support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import log

import torch
from torch import Tensor

from diagnostics.types import DiagnosticsError, support_column

Logits = Callable[[Tensor], Tensor]
"""Maps hidden states [n, H] to logits [n, V] over the shared vocabulary, in any dtype."""

RELEASED_FLOOR = 1e-12
SELECTKD_TOP = 5
CHUNK_BYTES = 160 * 2**20
"""Size of both models' float32 logits for one chunk of positions."""
ABSENT = 2000.0
"""Nats below the row's maximum that stand for a logit of -inf: exp(-2000) is 0 in float64."""


@torch.no_grad()
def measure(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, sampled_N: Tensor, *, k: int = 16, sweep: Sequence[int] = ()
) -> dict[str, Tensor]:
    """All measurements of each position, from logits in hand.

    student_logits_NV, teacher_logits_NV: [N, V] over the same ids, any floating dtype. sampled_N: [N] ids of the
    sampled tokens. k: size of the supports; for each other K in `sweep` the support-dependent measurements come
    again as `<name>_k<K>`. A K beyond V counts as V.

    Returns float64 tensors [N], named and in the units of `types.SCHEMA`; indicators are 0 or 1. Raises
    DiagnosticsError where shapes differ, a sampled id is outside the vocabulary, or a K is not positive.
    """
    _check(student_logits_NV, teacher_logits_NV, sampled_N, (k, *sweep))
    student_NV, teacher_NV = _working(student_logits_NV), _working(teacher_logits_NV)
    dense = _dense(student_NV, teacher_NV)
    broken_N = ~(dense["student_entropy"] + dense["teacher_entropy"]).isfinite()
    if broken_N.any():
        fixed = _dense_with_absent(student_NV[broken_N].double(), teacher_NV[broken_N].double())
        for name, values_N in dense.items():
            values_N[broken_N] = fixed[name]
    student_norm_N, teacher_norm_N = dense.pop("student_norm"), dense.pop("teacher_norm")
    out = dense | _sampled(student_NV, student_norm_N, teacher_NV, teacher_norm_N, sampled_N)
    out |= _supports(student_NV, student_norm_N, teacher_NV, teacher_norm_N, sampled_N, k=k, sweep=sweep)
    undefined_N = dense["student_entropy"].isnan() | dense["teacher_entropy"].isnan()
    return {name: values_N.masked_fill(undefined_N, float("nan")) for name, values_N in out.items()}


@torch.no_grad()
def kl_pair(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) (teacher first) and KL(p||q) [N] in nats, float64; bit for bit the columns of `measure`."""
    out = measure(student_logits_NV, teacher_logits_NV, torch.zeros(len(student_logits_NV), dtype=torch.long), k=1)
    return out["forward_kl"], out["reverse_kl"]


@torch.no_grad()
def measure_hidden(
    student_hidden_NH: Tensor,
    student_logits: Logits,
    teacher_hidden_NH: Tensor,
    teacher_logits: Logits,
    sampled_N: Tensor,
    *,
    k: int = 16,
    sweep: Sequence[int] = (),
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """`measure` from hidden states [N, H], projected `chunk` positions at a time; nothing larger than a chunk is held.

    The two models may sit on different devices; the result is on the student's. chunk: positions, None picks a
    number from the vocabulary's size. Same chunk, same bits; another chunk changes results by rounding alone.
    """
    parts: dict[str, list[Tensor]] = {}
    for rows, student_nV, teacher_nV in _chunks(student_hidden_NH, student_logits, teacher_hidden_NH, teacher_logits, chunk):
        measured = measure(student_nV, teacher_nV, sampled_N[rows].to(student_nV.device), k=k, sweep=sweep)
        for name, values_n in measured.items():
            parts.setdefault(name, []).append(values_n)
    return {name: torch.cat(values) for name, values in parts.items()}


@torch.no_grad()
def kl_pair_hidden(
    student_hidden_NH: Tensor,
    student_logits: Logits,
    teacher_hidden_NH: Tensor,
    teacher_logits: Logits,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`kl_pair` from hidden states, chunk by chunk; bit for bit the columns of `measure_hidden` with the same chunk."""
    chunks = _chunks(student_hidden_NH, student_logits, teacher_hidden_NH, teacher_logits, chunk)
    pairs = [kl_pair(student_nV, teacher_nV) for _, student_nV, teacher_nV in chunks]
    return torch.cat([forward for forward, _ in pairs]), torch.cat([reverse for _, reverse in pairs])


@torch.no_grad()
def mass_outside(hidden_NH: Tensor, logits: Logits, outside_logits: Logits, *, chunk: int | None = None) -> Tensor:
    """Probability [N] that a model gives to ids outside the shared vocabulary, before renormalisation; float64.

    logits, outside_logits: the same head's logits over the shared and over the other ids.
    """
    parts = []
    for rows in _slices(hidden_NH, logits, chunk):
        inside_n = _working(logits(hidden_NH[rows])).logsumexp(-1).double()
        outside_n = _working(outside_logits(hidden_NH[rows])).logsumexp(-1).double()
        parts.append(torch.sigmoid(outside_n - inside_n))
    return torch.cat(parts)


def chunk_size(vocabulary: int) -> int:
    """Positions of a chunk when none is asked for."""
    return max(1, CHUNK_BYTES // (2 * 4 * vocabulary))


def _chunks(student_hidden_NH, student_logits, teacher_hidden_NH, teacher_logits, chunk) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for rows in _slices(student_hidden_NH, student_logits, chunk):
        student_nV = student_logits(student_hidden_NH[rows])
        yield rows, student_nV, teacher_logits(teacher_hidden_NH[rows]).to(student_nV.device)


def _slices(hidden_NH: Tensor, logits: Logits, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise DiagnosticsError(f"chunk is {chunk}; give a positive number of positions, or None to have one picked.")
    step = chunk or chunk_size(logits(hidden_NH[:1]).shape[-1])
    return [slice(start, start + step) for start in range(0, max(1, len(hidden_NH)), step)]


def _check(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, sizes: Sequence[int]) -> None:
    if student_NV.shape != teacher_NV.shape or student_NV.dim() != 2:
        raise DiagnosticsError(
            f"Student logits have shape {tuple(student_NV.shape)} and teacher logits {tuple(teacher_NV.shape)}; both must be "
            "[positions, vocabulary] over the same ids. Slice both to the shared vocabulary first."
        )
    if min(sizes) < 1:
        raise DiagnosticsError(f"A support of K = {min(sizes)} tokens was asked for; K must be at least 1.")
    if sampled_N.shape != student_NV.shape[:1]:
        raise DiagnosticsError(f"{len(student_NV)} positions have {tuple(sampled_N.shape)} sampled tokens; give one id a position.")
    outside_N = (sampled_N < 0) | (sampled_N >= student_NV.shape[1])
    if outside_N.any():
        raise DiagnosticsError(
            f"Sampled token id {int(sampled_N[outside_N][0])} is outside the vocabulary of {student_NV.shape[1]}. "
            "The contexts were sampled with another tokenizer; sample them again."
        )


def _working(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _total(terms_rV: Tensor) -> Tensor:
    return terms_rV.sum(-1, dtype=torch.float64)


def _dense(student_rV: Tensor, teacher_rV: Tensor) -> dict[str, Tensor]:
    """Vocabulary-wide sums; `*_norm` are the log-normalisers. A row with a non-finite logit has a NaN entropy."""
    student_norm_r, teacher_norm_r = student_rV.double().logsumexp(-1), teacher_rV.double().logsumexp(-1)
    ln_p_rV = student_rV - student_norm_r.to(student_rV.dtype)[:, None]
    ratio_rV = teacher_rV - student_rV - (teacher_norm_r - student_norm_r).to(student_rV.dtype)[:, None]
    p_rV, q_rV = ln_p_rV.exp(), (ln_p_rV + ratio_rV).exp()
    forward_r, reverse_r = _total(q_rV * ratio_rV), -_total(p_rV * ratio_rV)
    mean_ratio_rV = ((p_rV + q_rV) / 2).clamp_(min=torch.finfo(p_rV.dtype).tiny).log_() - ln_p_rV
    return {
        "student_entropy": -_total(p_rV * ln_p_rV),
        "teacher_entropy": -_total(q_rV * ln_p_rV) - forward_r,
        "forward_kl": forward_r,
        "reverse_kl": reverse_r,
        "js": (_total(q_rV * (ratio_rV - mean_ratio_rV)) - _total(p_rV * mean_ratio_rV)) / 2,
        "hellinger": (_total((p_rV.sqrt() - q_rV.sqrt()).square()) / 2).sqrt(),
        "student_norm": student_norm_r,
        "teacher_norm": teacher_norm_r,
    }


def _dense_with_absent(student_rV: Tensor, teacher_rV: Tensor) -> dict[str, Tensor]:
    """`_dense` of float64 rows that may hold -inf (probability 0), NaN or +inf (NaN in every measurement)."""
    no_student_rV, no_teacher_rV = student_rV == -torch.inf, teacher_rV == -torch.inf
    out = _dense(_filled(student_rV, no_student_rV), _filled(teacher_rV, no_teacher_rV))
    out["forward_kl"][(no_student_rV & ~no_teacher_rV).any(-1)] = torch.inf
    out["reverse_kl"][(no_teacher_rV & ~no_student_rV).any(-1)] = torch.inf
    undefined_r = ~(_finite_or_absent(student_rV) & _finite_or_absent(teacher_rV))
    return {name: values_r.masked_fill(undefined_r, float("nan")) for name, values_r in out.items()}


def _filled(logits_rV: Tensor, absent_rV: Tensor) -> Tensor:
    return torch.where(absent_rV, logits_rV.amax(-1, keepdim=True) - ABSENT, logits_rV)


def _finite_or_absent(logits_rV: Tensor) -> Tensor:
    return ~(logits_rV.isnan() | (logits_rV == torch.inf)).any(-1) & (logits_rV > -torch.inf).any(-1)


def _sampled(student_NV, student_norm_N, teacher_NV, teacher_norm_N, sampled_N) -> dict[str, Tensor]:
    ln_p_N = _ln_probability(student_NV, student_norm_N, sampled_N[:, None])[:, 0]
    ln_q_N = _ln_probability(teacher_NV, teacher_norm_N, sampled_N[:, None])[:, 0]
    advantage_N = ln_q_N - ln_p_N
    return {
        "student_logprob": ln_p_N,
        "teacher_logprob": ln_q_N,
        "advantage": advantage_N,
        "acceptance": advantage_N.clamp(max=0).exp(),
    }


def _ln_probability(logits_NV: Tensor, norm_N: Tensor, ids_NK: Tensor) -> Tensor:
    return logits_NV.gather(1, ids_NK).double() - norm_N[:, None]


def top_ids(logits_NV: Tensor, k: int) -> Tensor:
    """Ids [N, k] of the largest logits, largest first, ties to the lower id."""
    return logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _supports(student_NV, student_norm_N, teacher_NV, teacher_norm_N, sampled_N, *, k: int, sweep: Sequence[int]) -> dict[str, Tensor]:
    """Measurements of the top-K lists, for k and for each other K in `sweep`."""
    largest = min(max(k, SELECTKD_TOP, *sweep), student_NV.shape[1])
    s_NK, t_NK = top_ids(student_NV, largest), top_ids(teacher_NV, largest)
    values = {
        "p_s": _ln_probability(student_NV, student_norm_N, s_NK), "q_s": _ln_probability(teacher_NV, teacher_norm_N, s_NK),
        "p_t": _ln_probability(student_NV, student_norm_N, t_NK), "q_t": _ln_probability(teacher_NV, teacher_norm_N, t_NK),
    }
    top_p_N2 = values["p_s"][:, :2].exp()
    out = {
        "student_margin": top_p_N2[:, 0] - top_p_N2[:, 1:].sum(-1),
        "top1_match": (s_NK[:, 0] == t_NK[:, 0]).double(),
        "student_top1_in_teacher_top5": (s_NK[:, :1] == t_NK[:, :SELECTKD_TOP]).any(-1).double(),
    }
    same_NKK = s_NK[:, :, None] == t_NK[:, None, :]
    for size in dict.fromkeys((k, *sweep)):
        part = min(size, largest)
        lists = {name: values_NK[:, :part] for name, values_NK in values.items()}
        measured = _support(same_NKK[:, :part, :part], **lists)
        measured["sampled_in_teacher_topk"] = (t_NK[:, :part] == sampled_N[:, None]).any(-1).double()
        out |= {support_column(name, None if size == k else size): values_N for name, values_N in measured.items()}
    return out


def _support(same_NKK: Tensor, *, p_s: Tensor, q_s: Tensor, p_t: Tensor, q_t: Tensor) -> dict[str, Tensor]:
    """Measurements of one K. same_NKK: [N, i, j] is True where S's i-th is T's j-th token; p_s: ln p on S, and so on."""
    s_in_t_NK, t_in_s_NK = same_NKK.any(2), same_NKK.any(1)
    shared_N = s_in_t_NK.sum(-1).double()
    k = same_NKK.shape[1]
    union_NU = torch.cat([torch.ones_like(s_in_t_NK), ~t_in_s_NK], -1)
    return {
        "compatibility": q_s.exp().sum(-1),
        "compatibility_intersection": (q_s.exp() * s_in_t_NK).sum(-1),
        "topk_overlap": shared_N / k,
        "topk_jaccard": shared_N / (2 * k - shared_N),
        "shared_student_mass": (p_s.exp() * s_in_t_NK).sum(-1),
        "teacher_top1_in_topk": t_in_s_NK[:, 0].double(),
        **_union(torch.cat([p_s, p_t], -1), torch.cat([q_s, q_t], -1), union_NU),
        "union_forward_kl_released": _released(s_in_t_NK, t_in_s_NK, same_NKK, p_s, q_t),
    }


def _union(ln_p_NU: Tensor, ln_q_NU: Tensor, union_NU: Tensor) -> dict[str, Tensor]:
    """Measurements on U, p and q renormalised there; entries outside `union_NU` are repeats."""
    ln_p_NU = ln_p_NU.masked_fill(~union_NU, -torch.inf).log_softmax(-1)
    ln_q_NU = ln_q_NU.masked_fill(~union_NU, -torch.inf).log_softmax(-1)
    p_NU, q_NU = ln_p_NU.exp(), ln_q_NU.exp()
    forward_NU = torch.where(q_NU > 0, q_NU * (ln_q_NU - ln_p_NU), 0.0)
    ratio_NU = torch.where(p_NU > 0, ln_q_NU - ln_p_NU, 0.0)
    mean_N = (p_NU * ratio_NU).sum(-1, keepdim=True)
    return {
        "bhattacharyya": (p_NU * q_NU).sqrt().sum(-1),
        "union_forward_kl": forward_NU.sum(-1),
        "union_log_ratio_variance": (p_NU * (ratio_NU - mean_N).square()).sum(-1),
    }


def _released(s_in_t_NK: Tensor, t_in_s_NK: Tensor, same_NKK: Tensor, p_s: Tensor, q_t: Tensor) -> Tensor:
    """The released training code's union KL, teacher first: each list renormalised, floored outside itself."""
    floor = log(RELEASED_FLOOR)
    p_NK, q_NK = p_s.log_softmax(-1).clamp(min=floor), q_t.log_softmax(-1).clamp(min=floor)
    p_at_t_NK = torch.where(t_in_s_NK, (same_NKK * p_NK[:, :, None]).sum(1), floor)
    on_t_N = (q_NK.exp() * (q_NK - p_at_t_NK)).sum(-1)
    on_s_alone_N = torch.where(s_in_t_NK, 0.0, RELEASED_FLOOR * (floor - p_NK)).sum(-1)
    return on_t_N + on_s_alone_N
