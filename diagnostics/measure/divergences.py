"""Entropies, divergences, top-K supports and masses of two next-token distributions.

This module holds the only definition of each.

With p the student's distribution at a position, q the teacher's, y the sampled token, S and T the K
most likely tokens of p and of q and U = S | T, all sums over the whole shared vocabulary unless a
set is named:

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
    bhattacharyya                       sum over U of sqrt(p_U q_U), both renormalized on U
    union_forward_kl                    KL(q_U||p_U), teacher first
    union_log_ratio_variance            variance under p_U of ln q_U - ln p_U
    union_forward_kl_released           KL(q'||p') over U, q' = max(1e-12, q/q(T) on T, else 0),
                                        p' = max(1e-12, p/p(S) on S, else 0)

Reference: the measurements of arXiv 2605.26844 and its released scripts; union_log_ratio_variance
is the weight of projected-gradient selection, and student_top1_in_teacher_top5 the test of
SelecTKD.

Departures: every sum is exact over the vocabulary. The released training code sees only each
model's own list; its divergence is kept under the name `released` for comparison. Top-K ties go to
the lower token id.

Numbers: logits are upcast to float32 (float64 stays) before any softmax. Both KLs are formed from
ln q - ln p, so that what cancels has cancelled before it is multiplied; sums over the vocabulary
end in float64. A KL or a JS may come out negative by rounding (about 1e-7 nats) and is returned so.

Undefined values are NaN: a position with a NaN or +inf logit in either model is NaN in every
measurement. A logit of -inf is probability 0, and 0 ln 0 = 0; KL(q||p) is inf where q > 0 and
p = 0.

Cost: positions are projected one chunk at a time. On the CPU they are measured a few rows at a
time, so that the passes over the vocabulary stay in the processor's cache; per row and model there
is one exp2, and for the row one log2. On CUDA a chunk is one launch of a kernel that holds a tile
of each row (`fused`), and its top-K lists are two more. What the lists say is worked out for many
chunks at once.

Axes: N positions, n of a chunk, r of a row block, 2 student and teacher, H hidden size, V
vocabulary, K support, G groups of ids, U entries of both lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Literal

import torch
from torch import Tensor

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import acceptance
from diagnostics.core.schema import support_column
from diagnostics.measure import fused

Logits = Callable[[Tensor], Tensor]
"""Maps hidden states [n, H] to logits [n, V] over the shared vocabulary, in any dtype."""
More = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From both models' logits [n, V] and the sampled ids [n] to further columns [n] by name."""
OfLists = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From both models' top-K lists (`_lists`) to further columns [n] by name."""

RELEASED_FLOOR = 1e-12
SELECTKD_TOP = 5
CHUNK_BYTES = 192 * 2**20
"""Bytes of both models' float32 logits for one chunk of positions on the CPU. Larger chunks project
hardly faster.
"""
BLOCK_BYTES = 16 * 2**20
"""Bytes of the buffers of one row block on the CPU, so that they fit its last-level cache."""
ACCELERATOR_FACTOR = 8
"""Factor on CHUNK_BYTES on an accelerator, where kernel launches cost more than cache misses."""
ACCELERATOR_BYTES = 240 * 2**20
"""Bytes beyond the logits that any step on an accelerator may take: one row block's buffers, or the
candidates of a top-K search.
"""
ACCELERATOR_CHUNK = 16_384
"""Most positions of a chunk on an accelerator: over a small vocabulary, what is kept of a position
outweighs its logits.
"""
LISTS_BYTES = 32 * 2**20
"""Bytes of what is compared of the top-K lists at a time on the CPU."""
ACCELERATOR_LISTS_BYTES = 96 * 2**20
"""The same on an accelerator, where some 200 launches a piece cost more than its arithmetic."""
GROUP = 64
"""Ids per group; a group's largest logit stands for it in the top-K search."""
RUNS = 64
"""Number of equal parts of the vocabulary that are summed before float64 adds the sums up."""
LN2 = log(2)
ABSENT = 2000.0
"""Nats below the row's maximum that stand for a logit of -inf: exp(-2000) is 0 in float64."""


@torch.no_grad()
def measure(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    sampled_N: Tensor,
    *,
    k: int = 16,
    sweep: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Measure every position from the logits of both models.

    Args:
        student_logits_NV: [N, V], any floating dtype; -inf excludes a token.
        teacher_logits_NV: [N, V] over the same ids, any floating dtype.
        sampled_N: [N] ids of the sampled tokens.
        k: Size of the supports, in tokens. A K beyond V counts as V.
        sweep: Further K, for which the support-dependent measurements are returned as
            `<name>_k<K>`.

    Returns:
        float64 tensors [N] by column name, in the units of `core.schema.SCHEMA`. Indicators are 0
        or 1; a position with a NaN or +inf logit is NaN in all of them.

    Raises:
        DiagnosticsError: Shapes differ, a sampled id is outside the vocabulary, or a K is not
            positive.

    Reference:
        arXiv 2605.26844 and its released scripts; see the head of this module.
    """
    part = _measure_logits(student_logits_NV, teacher_logits_NV, sampled_N, k=k, sweep=sweep)
    return _with_supports([part], k=k, sweep=sweep)


@dataclass(frozen=True)
class _Part:
    """What a chunk's logits are needed for: everything else is worked out from this."""

    columns: dict[str, Tensor]
    lists: dict[str, Tensor]
    norms: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Further columns, which are not made NaN where the others are."""

    def __len__(self) -> int:
        return len(self.columns["student_entropy"])


def _measure_logits(
    student_NV: Tensor,
    teacher_NV: Tensor,
    sampled_N: Tensor,
    *,
    k: int,
    sweep: Sequence[int],
) -> _Part:
    """Everything that reads the logits; each model's log-normalizer [N] with it."""
    _check(student_NV, teacher_NV, sampled_N, (k, *sweep))
    out = _rows(student_NV, teacher_NV)
    norms = {name: out.pop(f"{name}_norm") for name in ("student", "teacher")}
    student = _Model(student_NV, norms["student"], out.pop("student_maxima"))
    teacher = _Model(teacher_NV, norms["teacher"], out.pop("teacher_maxima"))
    out |= _sampled(student, teacher, sampled_N)
    largest = _longest(k, sweep, student_NV.shape[1])
    return _Part(out, _lists(student, teacher, sampled_N, largest), norms)


def _longest(k: int, sweep: Sequence[int], vocabulary: int) -> int:
    """Ids of each model's list, which every K and SELECTKD_TOP take the front of."""
    return min(max(k, SELECTKD_TOP, *sweep), vocabulary)


def _with_supports(
    parts: Sequence[_Part], *, k: int, sweep: Sequence[int], tops: int = 0
) -> dict[str, Tensor]:
    """All columns of several chunks; the lists are compared at most LISTS_BYTES at a time."""
    columns, lists, beside = (
        {name: torch.cat([one[name] for one in every]) for name in every[0]}
        for every in zip(*((part.columns, part.lists, part.beside) for part in parts))
    )
    step = lists_rows(lists["s"].shape[1], lists["s"].device)
    pieces = [
        _supports({name: values_NK[rows] for name, values_NK in lists.items()}, k, sweep, tops)
        for rows in _rows_in_turn(len(lists["s"]), step)
    ]
    columns |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    undefined_N = columns["student_entropy"].isnan()
    return {
        name: values_N.masked_fill(undefined_N, float("nan")) for name, values_N in columns.items()
    } | beside


def lists_rows(largest: int, device: torch.device | str) -> int:
    """Positions whose lists of `largest` ids are compared at a time on a device: so many bytes of
    float64 for each pair of entries, and some twenty for each entry.
    """
    on_cpu = torch.device(device).type == "cpu"
    held = LISTS_BYTES if on_cpu else ACCELERATOR_LISTS_BYTES
    return max(1, held // (8 * largest * (2 * largest + 20)))


def _rows_in_turn(count: int, step: int) -> list[slice]:
    """Slices of at most `step` rows, one empty one where there are no rows."""
    return [slice(start, start + step) for start in range(0, max(1, count), step)]


@torch.no_grad()
def kl_pair(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q||p) (teacher first) and KL(p||q) of each position.

    Args:
        student_logits_NV: [N, V], any floating dtype.
        teacher_logits_NV: [N, V] over the same ids.

    Returns:
        Two float64 tensors [N] in nats, bit for bit the columns of `measure`.
    """
    _check(student_logits_NV, teacher_logits_NV)
    out = _rows(student_logits_NV, teacher_logits_NV, upto="kl")
    return out["forward_kl"], out["reverse_kl"]


@torch.no_grad()
def kls_and_js(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q||p) (teacher first), KL(p||q) and JS of each position.

    Args:
        student_logits_NV: [N, V], any floating dtype.
        teacher_logits_NV: [N, V] over the same ids.

    Returns:
        Three float64 tensors [N] in nats, bit for bit the columns of `measure`.
    """
    _check(student_logits_NV, teacher_logits_NV)
    out = _rows(student_logits_NV, teacher_logits_NV, upto="js")
    return out["forward_kl"], out["reverse_kl"], out["js"]


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
    tops: int = 0,
    chunk: int | None = None,
    student_dropped: Logits | None = None,
    teacher_dropped: Logits | None = None,
    more: More | None = None,
    of_lists: OfLists | None = None,
) -> dict[str, Tensor]:
    """Measure every position from hidden states, with the logits of one chunk in memory.

    The two models may sit on different devices; the result is on the student's. The same chunk
    gives the same bits; another chunk changes results by rounding alone.

    Args:
        student_hidden_NH: [N, H] states of the student.
        student_logits: Maps states [n, H] to logits [n, V] over the shared vocabulary.
        teacher_hidden_NH: [N, H'] states of the teacher, which may have another H.
        teacher_logits: The same map of the teacher.
        sampled_N: [N] ids of the sampled tokens.
        k: Size of the supports, as in `measure`.
        sweep: Further K, as in `measure`.
        tops: Number of each model's most likely tokens that are returned as `<model>_top_<j>` (id)
            and `<model>_top_<j>_p` (probability), j from 0; at most SELECTKD_TOP.
        chunk: Positions per projection; None chooses a number by the vocabulary's size.
        student_dropped: Maps states to the student's logits over ids outside the shared vocabulary,
            where there are any; then `student_dropped_mass` is measured too.
        teacher_dropped: The same of the teacher.
        more: Measures further columns from the same logits, such as `extras.asked`.
        of_lists: Measures further columns from the top-K lists, such as `overlap.measure_overlap`.

    Returns:
        float64 tensors [N] by column name, as `measure`.

    Raises:
        DiagnosticsError: As `measure`, and for a chunk that is not positive.
    """

    def part(rows: slice) -> _Part:
        student_nV = student_logits(student_hidden_NH[rows])
        teacher_nV = teacher_logits(teacher_hidden_NH[rows]).to(student_nV.device)
        found = _measure_logits(
            student_nV, teacher_nV, sampled_N[rows].to(student_nV.device), k=k, sweep=sweep
        )
        if more is not None:
            found.beside.update(more(student_nV, teacher_nV, sampled_N[rows].to(student_nV.device)))
        if of_lists is not None:
            found.beside.update(of_lists(found.lists))
        if student_dropped is not None:
            found.beside["student_dropped_mass"] = _mass_outside(
                student_dropped(student_hidden_NH[rows]), found.norms["student"]
            )
        if teacher_dropped is not None:
            found.beside["teacher_dropped_mass"] = _mass_outside(
                teacher_dropped(teacher_hidden_NH[rows]), found.norms["teacher"]
            )
        return found

    parts, waiting = [], []
    for rows in _slices(student_hidden_NH, student_logits, chunk):
        waiting.append(part(rows))
        lists_NK = waiting[0].lists["s"]
        if sum(map(len, waiting)) >= lists_rows(lists_NK.shape[1], lists_NK.device):
            parts.append(_with_supports(waiting, k=k, sweep=sweep, tops=tops))
            waiting = []
    if waiting:
        parts.append(_with_supports(waiting, k=k, sweep=sweep, tops=tops))
    return {name: torch.cat([measured[name] for measured in parts]) for name in parts[0]}


@torch.no_grad()
def kl_pair_hidden(
    student_hidden_NH: Tensor,
    student_logits: Logits,
    teacher_hidden_NH: Tensor,
    teacher_logits: Logits,
    *,
    js: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, ...]:
    """`kl_pair` (with `js`: `kls_and_js`) from hidden states, one chunk at a time.

    Args:
        student_hidden_NH: [N, H] states of the student.
        student_logits: Maps states [n, H] to logits [n, V].
        teacher_hidden_NH: [N, H'] states of the teacher.
        teacher_logits: The same map of the teacher.
        js: Whether JS is returned as a third tensor.
        chunk: Positions per projection; None chooses a number by the vocabulary's size.

    Returns:
        float64 tensors [N] in nats, bit for bit the columns of `measure_hidden` at the same chunk.
    """
    measured = kls_and_js if js else kl_pair

    def part(rows: slice) -> tuple[Tensor, ...]:
        student_nV = student_logits(student_hidden_NH[rows])
        return measured(
            student_nV, teacher_logits_for(student_nV, teacher_hidden_NH[rows], teacher_logits)
        )

    parts = [part(rows) for rows in _slices(student_hidden_NH, student_logits, chunk)]
    return tuple(torch.cat(columns) for columns in zip(*parts))


def teacher_logits_for(
    student_nV: Tensor, teacher_hidden_nH: Tensor, teacher_logits: Logits
) -> Tensor:
    """The teacher's logits [n, V], on the device of the student's.

    A top-K teacher (`models.topk_teacher`) needs the student's logits to complete its own.
    """
    completed_by = getattr(teacher_logits, "completed_by", None)
    if completed_by is None:
        return teacher_logits(teacher_hidden_nH).to(student_nV.device)
    return completed_by(teacher_hidden_nH, student_nV).to(student_nV.device)


@torch.no_grad()
def mass_outside(
    hidden_NH: Tensor, logits: Logits, outside_logits: Logits, *, chunk: int | None = None
) -> Tensor:
    """Probability of the ids outside the shared vocabulary, before renormalization.

    Args:
        hidden_NH: [N, H] states of one model.
        logits: Maps states to the head's logits over the shared ids.
        outside_logits: Maps states to the same head's logits over the other ids.
        chunk: Positions per projection; None chooses a number by the vocabulary's size.

    Returns:
        float64 [N] in [0, 1].
    """

    def part(rows: slice) -> Tensor:
        inside_n = _log_normalizer(logits(hidden_NH[rows]))
        return _mass_outside(outside_logits(hidden_NH[rows]), inside_n)

    return torch.cat([part(rows) for rows in _slices(hidden_NH, logits, chunk)])


def _mass_outside(outside_nW: Tensor, inside_n: Tensor) -> Tensor:
    return torch.sigmoid(_log_normalizer(outside_nW).to(inside_n.device) - inside_n)


def _log_normalizer(logits_nV: Tensor) -> Tensor:
    """ln of the sum of exp [n], float64, a few rows at a time."""
    dtype = torch.promote_types(logits_nV.dtype, torch.float32)
    return torch.cat(
        [to_float64(logits_rV.to(dtype).logsumexp(-1)) for logits_rV in logits_nV.split(8)]
    )


def chunk_size(vocabulary: int, device: torch.device | str = "cpu") -> int:
    """Number of positions per chunk where none is asked for.

    Beyond 16 it is a multiple of 16, which matrix products are fastest at.
    """
    on_cpu = torch.device(device).type == "cpu"
    held = CHUNK_BYTES if on_cpu else ACCELERATOR_FACTOR * CHUNK_BYTES
    positions = held // (2 * torch.float32.itemsize * vocabulary)
    positions = positions if on_cpu else min(positions, ACCELERATOR_CHUNK)
    return max(1, positions - positions % 16 if positions > 16 else positions)


def peak_bytes(
    rows: int,
    vocabulary: int,
    *,
    k: int = 16,
    sweep: Sequence[int] = (),
    tops: int = 0,
    device: torch.device | str = "cuda",
) -> int:
    """Most bytes that measuring a chunk with the kernels takes beyond its logits.

    Args:
        rows: Positions of the chunk.
        vocabulary: Number of ids.
        k: Size of the supports, as in `measure`.
        sweep: Further K, as in `measure`.
        tops: As in `measure_hidden`.
        device: Where the kernels run; on the CPU, in their interpreter.

    Returns:
        Bytes of: the kernels' results; the lists; what comparing `lists_rows` of them takes; and
        the columns, twice where they are put together.
    """
    largest = _longest(k, sweep, vocabulary)
    columns = 15 + 11 * len({k, *sweep}) + 4 * tops  # of the whole, and of each K
    lists = rows * 8 * (6 * largest + 1)
    found = fused.result_bytes(rows, vocabulary, k=largest, group=GROUP)
    compared = min(rows, lists_rows(largest, device)) * 8 * largest * (2 * largest + 20)
    return found + 2 * lists + compared + 2 * rows * 8 * columns


def _slices(hidden_NH: Tensor, logits: Logits, chunk: int | None) -> list[slice]:
    if chunk is not None and chunk < 1:
        raise DiagnosticsError(
            f"chunk is {chunk}; give a positive number of positions, or None to have one picked."
        )
    nothing_0V = logits(hidden_NH[:0])
    step = chunk or chunk_size(nothing_0V.shape[-1], nothing_0V.device)
    return _rows_in_turn(len(hidden_NH), step)


def _check(
    student_NV: Tensor,
    teacher_NV: Tensor,
    sampled_N: Tensor | None = None,
    sizes: Sequence[int] = (1,),
) -> None:
    if student_NV.shape != teacher_NV.shape or student_NV.dim() != 2:
        raise DiagnosticsError(
            f"Student logits have shape {tuple(student_NV.shape)} and teacher logits"
            f" {tuple(teacher_NV.shape)}; both must be [positions, vocabulary] over the same ids."
            " Slice both to the shared vocabulary first."
        )
    if min(sizes) < 1:
        raise DiagnosticsError(
            f"A support of K = {min(sizes)} tokens was asked for; K must be at least 1."
        )
    if sampled_N is not None:
        _check_sampled(sampled_N, student_NV.shape)


def _check_sampled(sampled_N: Tensor, shape: torch.Size) -> None:
    if sampled_N.shape != shape[:1]:
        raise DiagnosticsError(
            f"There are {shape[0]} positions and sampled tokens of shape {tuple(sampled_N.shape)};"
            " give one id per position."
        )
    outside_N = (sampled_N < 0) | (sampled_N >= shape[1])
    if outside_N.any():
        raise DiagnosticsError(
            f"Sampled token id {int(sampled_N[outside_N][0])} is outside the vocabulary of"
            f" {shape[1]}. The contexts were sampled with another tokenizer; sample them again."
        )


class Block:
    """Both models on a few rows, in buffers that stay in cache.

    The block works in bits, since exp2 takes half the time of exp. Every row-wise sum is float64.
    The methods must be called in the order in which they are written, since later ones overwrite
    buffers of earlier ones.
    """

    def __init__(
        self, student_rV: Tensor, teacher_rV: Tensor, buffers_3r2V: Tensor, *, grouped: bool
    ):
        self.centred_r2V, self._weight_r2V, self.spare_r2V = buffers_3r2V
        self._centre(student_rV, teacher_rV, grouped=grouped)
        self.total_r2 = sum_float64(torch.exp2(self.centred_r2V, out=self._weight_r2V))

    def _centre(self, student_rV: Tensor, teacher_rV: Tensor, *, grouped: bool) -> None:
        """Logits in bits plus an offset that takes the row's largest close to 0; where grouped, the
        maxima of groups of ids on the way.
        """
        self.maxima, largest, peaks = [], [], []
        for logits_rV, target_rV in zip((student_rV, teacher_rV), self.centred_r2V.unbind(1)):
            logits_rV = (
                logits_rV if logits_rV.dtype == target_rV.dtype else target_rV.copy_(logits_rV)
            )
            maxima_rX = _group(logits_rV, GROUP, torch.amax) if grouped else logits_rV
            self.maxima.append(maxima_rX)
            largest_r1 = maxima_rX.amax(-1, keepdim=True)
            offset_r1 = largest_r1 / -LN2
            torch.add(
                offset_r1, logits_rV, alpha=1 / LN2, out=target_rV
            )  # a fused multiply-add: one rounding
            largest.append(to_float64(largest_r1))
            peaks.append(to_float64(torch.add(offset_r1, largest_r1, alpha=1 / LN2)))
        self._largest_r2, self._peak_r2 = torch.cat(largest, -1), torch.cat(peaks, -1)

    def norms(self) -> Tensor:
        """ln of the sum of exp of the logits [r, 2]."""
        return self._largest_r2 + LN2 * (self.total_r2.log2() - self._peak_r2)

    def entropies(self) -> Tensor:
        """H(p), H(q) [r, 2] in nats."""
        mean_r2 = (
            sum_float64(torch.mul(self._weight_r2V, self.centred_r2V, out=self.spare_r2V))
            / self.total_r2
        )
        return LN2 * (self.total_r2.log2() - mean_r2)

    def kls(self) -> tuple[Tensor, Tensor]:
        """KL(q||p) and KL(p||q) [r] in nats; `ratio_rV` then holds log2 q - log2 p."""
        shift_r1 = (self.total_r2[:, 1:] / self.total_r2[:, :1]).log2()
        rounded_r1 = shift_r1.to(self.spare_r2V)
        student_rV, self.ratio_rV = self.centred_r2V.unbind(1)
        self.ratio_rV.sub_(student_rV).sub_(rounded_r1)
        mean_r2 = (
            sum_float64(torch.mul(self._weight_r2V, self.ratio_rV[:, None], out=self.spare_r2V))
            / self.total_r2
        )
        mean_r2 += to_float64(rounded_r1) - shift_r1
        return LN2 * mean_r2[:, 1], -LN2 * mean_r2[:, 0]

    def distributions(self) -> Tensor:
        """p and q as [r, 2, V]."""
        return self._weight_r2V.mul_((1 / self.total_r2)[:, :, None].to(self._weight_r2V))


def blocks(
    student_NV: Tensor, teacher_NV: Tensor, *, grouped: bool = False
) -> Iterator[tuple[slice, Block]]:
    """The rows in turn, as many at a time as stay in cache.

    A block's buffers are used again for the next block. grouped: whether `maxima` are those of
    groups of ids, which only the top-K lists need.
    """
    count, vocabulary = student_NV.shape
    dtype = torch.promote_types(
        torch.promote_types(student_NV.dtype, teacher_NV.dtype), torch.float32
    )
    step = max(1, min(count, _block_rows(vocabulary, dtype, student_NV.device)))
    buffers_3r2V = torch.empty(3, step, 2, vocabulary, dtype=dtype, device=student_NV.device)
    for start in range(0, max(1, count), step):
        rows = slice(start, min(start + step, count))
        yield (
            rows,
            Block(
                student_NV[rows],
                teacher_NV[rows],
                buffers_3r2V[:, : rows.stop - rows.start],
                grouped=grouped,
            ),
        )


def _rows(
    student_NV: Tensor, teacher_NV: Tensor, *, upto: Literal["kl", "js", "all"] = "all"
) -> dict[str, Tensor]:
    """Vocabulary-wide measurements of every row.

    Rows that hold a logit of -inf, NaN or +inf are measured again by `_dense_with_absent`; of a
    kernel's rows, those that float32 cannot hold.
    """
    if fused.applies(student_NV, teacher_NV):
        out, again_N = fused.statistics(student_NV, teacher_NV, upto=upto, group=GROUP)
    else:
        parts = [
            _dense(block, upto=upto)
            for _, block in blocks(student_NV, teacher_NV, grouped=upto == "all")
        ]
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        again_N = ~out["forward_kl"].isfinite()
    for rows_r in in_float64(again_N, student_NV.shape[1]):
        for name, value_r in _dense_with_absent(
            student_NV[rows_r], teacher_NV[rows_r], upto=upto
        ).items():
            out[name][rows_r] = value_r
    return out


def in_float64(again_N: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """The rows [r] that are to be measured again, as many at a time as one float64 block holds.

    A vocabulary that is padded with -inf brings every row here, where there is no kernel.
    """
    rows_n = again_N.nonzero()[:, 0]
    if len(rows_n):
        yield from rows_n.split(_block_rows(vocabulary, torch.float64, again_N.device))


def _block_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose block fits BLOCK_BYTES, or on an accelerator its memory: three buffers for both
    models.
    """
    held = BLOCK_BYTES if device.type == "cpu" else ACCELERATOR_BYTES
    return max(1, held // (6 * dtype.itemsize * vocabulary))


def _dense(block: Block, *, upto: str) -> dict[str, Tensor]:
    """Measurements of one block; a row with a logit that is not finite has a KL that is not.

    `*_norm` are log-normalizers, and `*_maxima` feed `top_ids`.
    """
    if upto == "kl":
        return dict(zip(("forward_kl", "reverse_kl"), block.kls()))
    columns = {"entropy": block.entropies(), "norm": block.norms()}
    out = dict(zip(("forward_kl", "reverse_kl"), block.kls()))
    distributions_r2V = block.distributions()
    out["js"] = _mixture_entropy(distributions_r2V, block.spare_r2V) - columns["entropy"].mean(-1)
    if upto == "js":
        return out
    for i, model in enumerate(("student", "teacher")):
        out |= {f"{model}_{name}": values_r2[:, i] for name, values_r2 in columns.items()} | {
            f"{model}_maxima": block.maxima[i]
        }
    return out | {"hellinger": _hellinger(distributions_r2V)}


def _mixture_entropy(distributions_r2V: Tensor, spare_r2V: Tensor) -> Tensor:
    """H((p + q)/2) [r] in nats, from log2(p + q)."""
    sum_rV, ln_rV = spare_r2V.unbind(1)
    torch.add(*distributions_r2V.unbind(1), out=sum_rV).clamp_(min=torch.finfo(sum_rV.dtype).tiny)
    return LN2 * (1 - sum_float64(torch.log2(sum_rV, out=ln_rV).mul_(sum_rV)) / 2)


def _hellinger(distributions_r2V: Tensor) -> Tensor:
    """From sum (sqrt p - sqrt q)^2 / 2, which is 1 - sum sqrt(p q) without its cancellation;
    overwrites its argument.
    """
    student_rV, teacher_rV = distributions_r2V.sqrt_().unbind(1)
    return (sum_float64(student_rV.sub_(teacher_rV).square_()) / 2).sqrt()


def _group(values: Tensor, length: int, reduction: Callable) -> Tensor:
    """`reduction` over each run of `length` entries of the last dimension, the last run being
    shorter.
    """
    runs, rest = divmod(values.shape[-1], length)
    whole = runs * length
    parts = [reduction(values[..., :whole].view(*values.shape[:-1], runs, length), -1)]
    if rest:
        parts.append(reduction(values[..., whole:], -1, keepdim=True))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def sum_float64(terms: Tensor) -> Tensor:
    """Sum over the last dimension: RUNS sums in the terms' dtype, added up in float64."""
    return to_float64(_group(terms, max(1, terms.shape[-1] // RUNS), torch.sum)).sum(-1)


def to_float64(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _dense_with_absent(student_rV: Tensor, teacher_rV: Tensor, *, upto: str) -> dict[str, Tensor]:
    """`_dense` of rows that may hold -inf (probability 0), NaN or +inf (NaN in every
    measurement).
    """
    student_rV, teacher_rV = to_float64(student_rV), to_float64(teacher_rV)
    ((_, block),) = blocks(replace_neg_inf(student_rV), replace_neg_inf(teacher_rV))
    out = _dense(block, upto=upto)
    out["forward_kl"][has_mass_outside(teacher_rV, student_rV)] = torch.inf
    out["reverse_kl"][has_mass_outside(student_rV, teacher_rV)] = torch.inf
    undefined_r = ~(_finite_or_absent(student_rV) & _finite_or_absent(teacher_rV))
    return {
        name: values_r.masked_fill(undefined_r, float("nan"))
        for name, values_r in out.items()
        if values_r.dim() == 1
    }


def replace_neg_inf(logits_rV: Tensor) -> Tensor:
    """Replace logits of -inf by finite ones so low that their probability is exactly 0.

    NaN and +inf make a row NaN.
    """
    floor_r1 = logits_rV.amax(-1, keepdim=True) - ABSENT
    return torch.where(logits_rV == -torch.inf, floor_r1, logits_rV)


def has_mass_outside(logits_rV: Tensor, reference_rV: Tensor) -> Tensor:
    """Rows [r] where a token that `reference_rV` excludes (-inf) has probability under
    `logits_rV`.
    """
    return ((reference_rV == -torch.inf) & (logits_rV > -torch.inf)).any(-1)


def _finite_or_absent(logits_rV: Tensor) -> Tensor:
    return ~(logits_rV.isnan() | (logits_rV == torch.inf)).any(-1) & (logits_rV > -torch.inf).any(
        -1
    )


@dataclass(frozen=True)
class _Model:
    """One model's logits on a chunk, with what the dense pass found in them."""

    logits_NV: Tensor
    norm_N: Tensor
    maxima_NG: Tensor

    def ln(self, ids_NK: Tensor) -> Tensor:
        """Log-probabilities [N, K] of the ids, float64."""
        return to_float64(self.logits_NV.gather(1, ids_NK)) - self.norm_N[:, None]

    def top(self, k: int) -> Tensor:
        """Ids [N, k] of the most likely tokens, most likely first, ties to the lower id."""
        return top_ids(self.logits_NV, k, maxima_NG=self.maxima_NG)


def _sampled(student: _Model, teacher: _Model, sampled_N: Tensor) -> dict[str, Tensor]:
    ln_p_N, ln_q_N = student.ln(sampled_N[:, None])[:, 0], teacher.ln(sampled_N[:, None])[:, 0]
    return {
        "student_logprob": ln_p_N,
        "teacher_logprob": ln_q_N,
        "advantage": ln_q_N - ln_p_N,
        "acceptance": acceptance(ln_q_N - ln_p_N),
    }


def top_ids(logits_NV: Tensor, k: int, *, maxima_NG: Tensor | None = None) -> Tensor:
    """Ids of the largest logits, largest first, ties to the lower id; exact.

    The k best ids lie in the k groups of GROUP ids whose maxima are largest (ties again to the
    lower), so only those groups are searched.

    Args:
        logits_NV: [N, V].
        k: Number of ids.
        maxima_NG: [N, ceil(V / GROUP)] the groups' maxima, where they are known already.

    Returns:
        int64 [N, min(k, V)].
    """
    vocabulary = logits_NV.shape[1]
    k = min(k, vocabulary)
    maxima_NG = _group(logits_NV, GROUP, torch.amax) if maxima_NG is None else maxima_NG
    if k <= fused.LARGEST_K and fused.applies(logits_NV):
        return fused.top_ids(logits_NV, k, maxima_NG.float(), group=GROUP)
    step = logits_NV.shape[0]
    if logits_NV.device.type != "cpu":  # 40 bytes for each candidate
        step = max(1, ACCELERATOR_BYTES // (40 * GROUP * k))
    return torch.cat(
        [
            _top_ids(logits_NV[rows], k, maxima_NG[rows])
            for rows in _rows_in_turn(len(logits_NV), max(1, step))
        ]
    )


def _top_ids(logits_NV: Tensor, k: int, maxima_NG: Tensor) -> Tensor:
    """`top_ids` with torch, all rows at once."""
    vocabulary = logits_NV.shape[1]
    groups_Nk = _largest(maxima_NG, min(k, maxima_NG.shape[1])).sort(-1).values
    ids_NC = (groups_Nk[:, :, None] * GROUP + torch.arange(GROUP, device=groups_Nk.device)).flatten(
        1
    )
    beyond_NC = ids_NC >= vocabulary
    candidates_NC = logits_NV.gather(1, ids_NC.clamp(max=vocabulary - 1)).masked_fill(
        beyond_NC, -torch.inf
    )
    return ids_NC.gather(1, _largest(candidates_NC, k))


def _largest(values_NC: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the largest values, largest first, ties to the lower index.

    float32 and narrower: the value's bits, ordered as integers, and the index make one unique key
    each."""
    if values_NC.dtype == torch.float64:
        return values_NC.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits_NC = (values_NC.float() + 0.0).view(torch.int32)
    ordered_NC = (bits_NC ^ ((bits_NC >> 31) & 0x7FFFFFFF)).long()
    keys_NC = (ordered_NC << 32) - torch.arange(values_NC.shape[1], device=values_NC.device)
    return keys_NC.topk(k, dim=-1).indices


def _lists(student: _Model, teacher: _Model, sampled_N: Tensor, largest: int) -> dict[str, Tensor]:
    """Each model's `largest` most likely ids `s` and `t` [N, K], most likely first; both models'
    log-probabilities of them, `p_s`, `q_s`, `p_t` and `q_t`, float64; and the ids `sampled` [N].
    """
    s_NK, t_NK = student.top(largest), teacher.top(largest)
    values = {
        "p_s": student.ln(s_NK),
        "q_s": teacher.ln(s_NK),
        "p_t": student.ln(t_NK),
        "q_t": teacher.ln(t_NK),
    }
    ids = {"s": s_NK, "t": t_NK, "sampled": sampled_N}
    return values | {name: ids_N.to(student.norm_N.device) for name, ids_N in ids.items()}


def _supports(
    lists: dict[str, Tensor], k: int, sweep: Sequence[int], tops: int
) -> dict[str, Tensor]:
    """Measurements of the top-K lists, for k and for each other K in `sweep`."""
    values = dict(lists)
    s_NK, t_NK, sampled_N = values.pop("s"), values.pop("t"), values.pop("sampled")
    largest = s_NK.shape[1]
    top_p_N2 = values["p_s"][:, :2].exp()
    out = {
        "student_margin": top_p_N2[:, 0] - top_p_N2[:, 1:].sum(-1),
        "top1_match": (s_NK[:, 0] == t_NK[:, 0]).double(),
        "student_top1_in_teacher_top5": (s_NK[:, :1] == t_NK[:, :SELECTKD_TOP]).any(-1).double(),
    }
    out |= _tops("student", s_NK[:, :tops], values["p_s"]) | _tops(
        "teacher", t_NK[:, :tops], values["q_t"]
    )
    same_NKK = s_NK[:, :, None] == t_NK[:, None, :]
    for size in dict.fromkeys((k, *sweep)):
        part = min(size, largest)
        lists = {name: values_NK[:, :part] for name, values_NK in values.items()}
        measured = _support(same_NKK[:, :part, :part], **lists)
        measured["sampled_in_teacher_topk"] = (
            (t_NK[:, :part] == sampled_N[:, None]).any(-1).double()
        )
        out |= {
            support_column(name, None if size == k else size): values_N
            for name, values_N in measured.items()
        }
    return out


def _tops(model: str, ids_NK: Tensor, ln_NK: Tensor) -> dict[str, Tensor]:
    """Ids and probabilities of a model's most likely tokens, one column each.

    Ids are exact in float64.
    """
    columns: dict[str, Tensor] = {}
    for j in range(ids_NK.shape[1]):
        columns |= {
            f"{model}_top_{j}": ids_NK[:, j].double(),
            f"{model}_top_{j}_p": ln_NK[:, j].exp(),
        }
    return columns


def _support(
    same_NKK: Tensor, *, p_s: Tensor, q_s: Tensor, p_t: Tensor, q_t: Tensor
) -> dict[str, Tensor]:
    """Measurements of one K. same_NKK: [N, i, j] is True where S's i-th is T's j-th token; p_s: ln
    p on S, and so on.
    """
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
    """Measurements on U, p and q renormalized there; entries outside `union_NU` are repeats."""
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


def _released(
    s_in_t_NK: Tensor, t_in_s_NK: Tensor, same_NKK: Tensor, p_s: Tensor, q_t: Tensor
) -> Tensor:
    """The released training code's union KL, teacher first: each list renormalized, floored outside
    itself.
    """
    floor = log(RELEASED_FLOOR)
    p_NK, q_NK = p_s.log_softmax(-1).clamp(min=floor), q_t.log_softmax(-1).clamp(min=floor)
    p_at_t_NK = torch.where(t_in_s_NK, (same_NKK * p_NK[:, :, None]).sum(1), floor)
    on_t_N = (q_NK.exp() * (q_NK - p_at_t_NK)).sum(-1)
    on_s_alone_N = torch.where(s_in_t_NK, 0.0, RELEASED_FLOOR * (floor - p_NK)).sum(-1)
    return on_t_N + on_s_alone_N
