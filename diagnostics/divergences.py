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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
BLOCK_BYTES = 12 * 2**20
"""Size of the buffers of one row block on the CPU: small enough for the last-level cache."""
GROUP = 64
"""Ids whose largest logit stands for them in the top-K search, and whose terms are summed in float32."""
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
    out = _rows(student_logits_NV, teacher_logits_NV)
    student, teacher = (_Model(x_NV, out.pop(f"{name}_norm"), out.pop(f"{name}_maxima")) for name, x_NV in (
        ("student", student_logits_NV), ("teacher", teacher_logits_NV),
    ))
    out |= _sampled(student, teacher, sampled_N) | _supports(student, teacher, sampled_N, k=k, sweep=sweep)
    undefined_N = out["student_entropy"].isnan()
    return {name: values_N.masked_fill(undefined_N, float("nan")) for name, values_N in out.items()}


@torch.no_grad()
def kl_pair(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) (teacher first) and KL(p||q) [N] in nats, float64; bit for bit the columns of `measure`."""
    _check(student_logits_NV, teacher_logits_NV)
    out = _rows(student_logits_NV, teacher_logits_NV, kls_only=True)
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

    def part(rows: slice) -> dict[str, Tensor]:
        student_nV = student_logits(student_hidden_NH[rows])
        teacher_nV = teacher_logits(teacher_hidden_NH[rows]).to(student_nV.device)
        return measure(student_nV, teacher_nV, sampled_N[rows].to(student_nV.device), k=k, sweep=sweep)

    parts = [part(rows) for rows in _slices(student_hidden_NH, student_logits, chunk)]
    return {name: torch.cat([measured[name] for measured in parts]) for name in parts[0]}


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

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        student_nV = student_logits(student_hidden_NH[rows])
        return kl_pair(student_nV, teacher_logits(teacher_hidden_NH[rows]).to(student_nV.device))

    parts = [part(rows) for rows in _slices(student_hidden_NH, student_logits, chunk)]
    return torch.cat([forward for forward, _ in parts]), torch.cat([reverse for _, reverse in parts])


@torch.no_grad()
def mass_outside(hidden_NH: Tensor, logits: Logits, outside_logits: Logits, *, chunk: int | None = None) -> Tensor:
    """Probability [N] that a model gives to ids outside the shared vocabulary, before renormalisation; float64.

    logits, outside_logits: the same head's logits over the shared and over the other ids.
    """

    def part(rows: slice) -> Tensor:
        inside_n = _log_normaliser(logits(hidden_NH[rows]))
        return torch.sigmoid(_log_normaliser(outside_logits(hidden_NH[rows])) - inside_n)

    return torch.cat([part(rows) for rows in _slices(hidden_NH, logits, chunk)])


def chunk_size(vocabulary: int) -> int:
    """Positions of a chunk when none is asked for."""
    return max(1, CHUNK_BYTES // (2 * 4 * vocabulary))


def _block_bytes(device: torch.device) -> int:
    return BLOCK_BYTES if device.type == "cpu" else 16 * BLOCK_BYTES


def _slices(hidden_NH: Tensor, logits: Logits, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise DiagnosticsError(f"chunk is {chunk}; give a positive number of positions, or None to have one picked.")
    step = chunk or chunk_size(logits(hidden_NH[:1]).shape[-1])
    return [slice(start, start + step) for start in range(0, max(1, len(hidden_NH)), step)]


def _check(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor | None = None, sizes: Sequence[int] = (1,)) -> None:
    if student_NV.shape != teacher_NV.shape or student_NV.dim() != 2:
        raise DiagnosticsError(
            f"Student logits have shape {tuple(student_NV.shape)} and teacher logits {tuple(teacher_NV.shape)}; both must be "
            "[positions, vocabulary] over the same ids. Slice both to the shared vocabulary first."
        )
    if min(sizes) < 1:
        raise DiagnosticsError(f"A support of K = {min(sizes)} tokens was asked for; K must be at least 1.")
    if sampled_N is not None:
        _check_sampled(sampled_N, student_NV.shape)


def _check_sampled(sampled_N: Tensor, shape: torch.Size) -> None:
    if sampled_N.shape != shape[:1]:
        raise DiagnosticsError(
            f"There are {shape[0]} positions and sampled tokens of shape {tuple(sampled_N.shape)}; give one id a position."
        )
    outside_N = (sampled_N < 0) | (sampled_N >= shape[1])
    if outside_N.any():
        raise DiagnosticsError(
            f"Sampled token id {int(sampled_N[outside_N][0])} is outside the vocabulary of {shape[1]}. "
            "The contexts were sampled with another tokenizer; sample them again."
        )


@dataclass(frozen=True)
class _Side:
    """One model on a row block, in buffers that later steps overwrite."""

    centred_rV: Tensor
    """Logits minus the row's maximum."""
    weight_rV: Tensor
    """Its exponential; divided by `total_r` it is the distribution."""
    total_r: Tensor
    norm_r: Tensor
    """ln of the sum of exp of the logits."""
    maxima_rG: Tensor
    """Largest logit of each group of `GROUP` ids."""


def _side(logits_rV: Tensor, centred_rV: Tensor, weight_rV: Tensor) -> _Side:
    if logits_rV.dtype != centred_rV.dtype:
        logits_rV = centred_rV.copy_(logits_rV)
    maxima_rG = _group(logits_rV, torch.amax)
    largest_r = maxima_rG.amax(-1, keepdim=True)
    torch.sub(logits_rV, largest_r, out=centred_rV)
    torch.exp(centred_rV, out=weight_rV)
    total_r = _total(weight_rV)
    return _Side(centred_rV, weight_rV, total_r, total_r.log() + _exact(largest_r[:, 0]), maxima_rG)


def _log_normaliser(logits_nV: Tensor) -> Tensor:
    return torch.cat([_exact(block_rV.float() if block_rV.dtype != torch.float64 else block_rV).logsumexp(-1) for block_rV in logits_nV.split(8)])


def _group(values_rV: Tensor, reduction: Callable) -> Tensor:
    """`reduction` over each run of GROUP ids, the last run being shorter: [r, ceil(V / GROUP)]."""
    whole = values_rV.shape[1] - values_rV.shape[1] % GROUP
    parts = [reduction(values_rV[:, :whole].unflatten(1, (-1, GROUP)), -1)] if whole else []
    if whole < values_rV.shape[1]:
        parts.append(reduction(values_rV[:, whole:], -1, keepdim=True))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _total(terms_rV: Tensor) -> Tensor:
    """Sum [r] over the vocabulary: short float32 sums, added up in float64."""
    return _exact(_group(terms_rV, torch.sum)).sum(-1)


def _exact(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _kls(p: _Side, q: _Side, spare_rV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) and KL(p||q) [r]; leaves ln q - ln p in `q.centred_rV`."""
    shift_r = q.total_r.log() - p.total_r.log()
    rounded_r1 = shift_r[:, None].to(spare_rV)
    ratio_rV = q.centred_rV.sub_(p.centred_rV).sub_(rounded_r1)
    missing_r = shift_r - _exact(rounded_r1[:, 0])
    forward_r = _total(torch.mul(q.weight_rV, ratio_rV, out=spare_rV)) / q.total_r - missing_r
    reverse_r = missing_r - _total(torch.mul(p.weight_rV, ratio_rV, out=spare_rV)) / p.total_r
    return forward_r, reverse_r


def _dense(student_rV: Tensor, teacher_rV: Tensor, buffers_5rV: Tensor, *, kls_only: bool = False) -> dict[str, Tensor]:
    """Vocabulary-wide sums of a row block. A row with a logit that is not finite has a NaN divergence.

    `*_norm` are log-normalisers, `*_maxima` feed the top-K search.
    """
    p, q, spare_rV = _side(student_rV, *buffers_5rV[:2]), _side(teacher_rV, *buffers_5rV[2:4]), buffers_5rV[4]
    if kls_only:
        return dict(zip(("forward_kl", "reverse_kl"), _kls(p, q, spare_rV)))
    entropies = [x.total_r.log() - _total(torch.mul(x.weight_rV, x.centred_rV, out=spare_rV)) / x.total_r for x in (p, q)]
    forward_r, reverse_r = _kls(p, q, spare_rV)
    p_rV, q_rV = (x.weight_rV.mul_((1 / x.total_r)[:, None].to(x.weight_rV)) for x in (p, q))
    return {
        "student_entropy": entropies[0],
        "teacher_entropy": entropies[1],
        "forward_kl": forward_r,
        "reverse_kl": reverse_r,
        "js": _mixture_entropy(p_rV, q_rV, p.centred_rV, spare_rV) - (entropies[0] + entropies[1]) / 2,
        "hellinger": (_total(p_rV.sqrt_().sub_(q_rV.sqrt_()).square_()) / 2).sqrt(),
        "student_norm": p.norm_r,
        "teacher_norm": q.norm_r,
        "student_maxima": p.maxima_rG,
        "teacher_maxima": q.maxima_rG,
    }


def _mixture_entropy(p_rV: Tensor, q_rV: Tensor, sum_rV: Tensor, ln_rV: Tensor) -> Tensor:
    """H((p + q)/2) from ln(p + q); the last two arguments are overwritten."""
    torch.add(p_rV, q_rV, out=sum_rV).clamp_(min=torch.finfo(sum_rV.dtype).tiny)
    terms_rV = torch.log(sum_rV, out=ln_rV).mul_(sum_rV)
    return log(2) - _total(terms_rV) / 2


def _rows(student_NV: Tensor, teacher_NV: Tensor, *, kls_only: bool = False) -> dict[str, Tensor]:
    """`_dense` over row blocks that stay in cache; rows that hold a logit of -inf, NaN or +inf are done again apart."""
    count, vocabulary = student_NV.shape
    step = max(1, min(count, _block_bytes(student_NV.device) // (20 * vocabulary)))
    dtype = torch.promote_types(torch.promote_types(student_NV.dtype, teacher_NV.dtype), torch.float32)
    buffers = torch.empty(5, step, vocabulary, dtype=dtype, device=student_NV.device)
    parts = []
    for start in range(0, count, step):
        student_rV, teacher_rV = student_NV[start : start + step], teacher_NV[start : start + step]
        part = _dense(student_rV, teacher_rV, buffers[:, : len(student_rV)], kls_only=kls_only)
        for row in (~part["forward_kl"].isfinite()).nonzero()[:, 0].tolist():
            mended = _dense_with_absent(student_rV[row : row + 1].double(), teacher_rV[row : row + 1].double())
            for name in part.keys() & mended.keys():
                part[name][row] = mended[name][0]
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _dense_with_absent(student_rV: Tensor, teacher_rV: Tensor) -> dict[str, Tensor]:
    """`_dense` of float64 rows that may hold -inf (probability 0), NaN or +inf (NaN in every measurement)."""
    no_student_rV, no_teacher_rV = student_rV == -torch.inf, teacher_rV == -torch.inf
    buffers = torch.empty(5, *student_rV.shape, dtype=torch.float64, device=student_rV.device)
    out = _dense(_filled(student_rV, no_student_rV), _filled(teacher_rV, no_teacher_rV), buffers)
    out["forward_kl"][(no_student_rV & ~no_teacher_rV).any(-1)] = torch.inf
    out["reverse_kl"][(no_teacher_rV & ~no_student_rV).any(-1)] = torch.inf
    undefined_r = ~(_finite_or_absent(student_rV) & _finite_or_absent(teacher_rV))
    return {name: values_r.masked_fill(undefined_r, float("nan")) for name, values_r in out.items() if values_r.dim() == 1}


def _filled(logits_rV: Tensor, absent_rV: Tensor) -> Tensor:
    return torch.where(absent_rV, logits_rV.amax(-1, keepdim=True) - ABSENT, logits_rV)


def _finite_or_absent(logits_rV: Tensor) -> Tensor:
    return ~(logits_rV.isnan() | (logits_rV == torch.inf)).any(-1) & (logits_rV > -torch.inf).any(-1)


@dataclass(frozen=True)
class _Model:
    """One model's logits on a chunk, with what the dense pass found in them."""

    logits_NV: Tensor
    norm_N: Tensor
    maxima_NG: Tensor

    def ln(self, ids_NK: Tensor) -> Tensor:
        """Log-probabilities [N, K] of the ids, float64."""
        return _exact(self.logits_NV.gather(1, ids_NK)) - self.norm_N[:, None]

    def top(self, k: int) -> Tensor:
        """Ids [N, k] of the most likely tokens, most likely first, ties to the lower id."""
        return top_ids(self.logits_NV, k, maxima_NG=self.maxima_NG)


def _sampled(student: _Model, teacher: _Model, sampled_N: Tensor) -> dict[str, Tensor]:
    ln_p_N, ln_q_N = student.ln(sampled_N[:, None])[:, 0], teacher.ln(sampled_N[:, None])[:, 0]
    return {
        "student_logprob": ln_p_N,
        "teacher_logprob": ln_q_N,
        "advantage": ln_q_N - ln_p_N,
        "acceptance": (ln_q_N - ln_p_N).clamp(max=0).exp(),
    }


def top_ids(logits_NV: Tensor, k: int, *, maxima_NG: Tensor | None = None) -> Tensor:
    """Ids [N, min(k, V)] of the largest logits, largest first, ties to the lower id. Exact.

    The k best ids lie in the k groups of GROUP ids whose maxima are largest (ties again to the lower), so
    only those groups are searched. maxima_NG: [N, ceil(V / GROUP)] the groups' maxima where already known.
    """
    vocabulary = logits_NV.shape[1]
    k = min(k, vocabulary)
    maxima_NG = _group(logits_NV, torch.amax) if maxima_NG is None else maxima_NG
    groups_Nk = _largest(maxima_NG, min(k, maxima_NG.shape[1])).sort(-1).values
    ids_NC = (groups_Nk[:, :, None] * GROUP + torch.arange(GROUP, device=groups_Nk.device)).flatten(1)
    beyond_NC = ids_NC >= vocabulary
    candidates_NC = logits_NV.gather(1, ids_NC.clamp(max=vocabulary - 1)).masked_fill(beyond_NC, -torch.inf)
    return ids_NC.gather(1, _largest(candidates_NC, k))


def _largest(values_NC: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the largest values, largest first, ties to the lower index.

    float32 and narrower: the value's bits, ordered as integers, and the index make one unique key each.
    """
    if values_NC.dtype == torch.float64:
        return values_NC.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits_NC = (values_NC.float() + 0.0).view(torch.int32)
    ordered_NC = (bits_NC ^ ((bits_NC >> 31) & 0x7FFFFFFF)).long()
    keys_NC = (ordered_NC << 32) - torch.arange(values_NC.shape[1], device=values_NC.device)
    return keys_NC.topk(k, dim=-1).indices


def _supports(student: _Model, teacher: _Model, sampled_N: Tensor, *, k: int, sweep: Sequence[int]) -> dict[str, Tensor]:
    """Measurements of the top-K lists, for k and for each other K in `sweep`."""
    largest = min(max(k, SELECTKD_TOP, *sweep), student.logits_NV.shape[1])
    s_NK, t_NK = student.top(largest), teacher.top(largest)
    values = {"p_s": student.ln(s_NK), "q_s": teacher.ln(s_NK), "p_t": student.ln(t_NK), "q_t": teacher.ln(t_NK)}
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
