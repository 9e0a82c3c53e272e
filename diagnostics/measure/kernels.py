"""Triton kernels that read the logits of a position where they lie, once per pass.

Everything here has its definition in `divergences` and `losses`; `fused` prepares the calls. One
program measures one position. A first pass finds both normalizers (and the maxima of groups of
ids), a second one the sums over the vocabulary, and a loss has a third that writes its derivative.
No pass writes anything of the vocabulary's length but that derivative, which may take the place of
the student's logits.

Numbers: arithmetic is float32. A thread adds R terms in float32 and everything beyond in float64.
With d the logits below their row's maximum in nats, w = exp d and Z = sum w, the log-ratio is
formed from the differences d before anything is multiplied, so that what cancels has cancelled:

    r = log2 q - log2 p = (d_q - d_p) / ln 2 - log2(Z_q / Z_p)
    t = 2^-|r|, the smaller of p and q over the larger
    js          sum of [(p + q) (1 - log2(1 + t)) - min(p, q) |r|] / 2, in bits
    hellinger   sum of max(p, q) (1 - sqrt t)^2 = sum of (sqrt p - sqrt q)^2

A logit of -inf, and one so far below the maximum that float32 has no room for the difference, takes
part as one ABSENT nats below it: its probability is 0. The flags say what else follows from it.

Axes: R x C ids of one tile, G groups of ids, K ids of a list.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.core import constexpr

LOG2E = constexpr(1.4426950408889634)
LN2 = constexpr(0.6931471805599453)
ABSENT = constexpr(2000.0)
FAR = constexpr(-1e30)
"""Nats below the row's maximum from which a finite logit counts as far below."""

STUDENT_EXCLUDES = constexpr(1)
"""Flag: a token with a finite logit of the teacher has -inf from the student."""
TEACHER_EXCLUDES = constexpr(2)
"""Flag: the reverse."""
AGAIN = constexpr(4)
"""Flag: a token that is far below the maximum of one model has mass in the other: float64 is
needed.
"""
UNDEFINED = constexpr(8)
"""Flag: a NaN or +inf logit, or no finite one."""

KL, JS, ALL = constexpr(0), constexpr(1), constexpr(2)
"""How much `statistics` measures."""
FORWARD_KL, REVERSE_KL, JSD, SAMPLED = constexpr(0), constexpr(1), constexpr(2), constexpr(3)
"""What `objective` measures."""


@triton.jit
def _load(row, start, vocabulary, R: tl.constexpr, C: tl.constexpr):
    """One tile of a row's logits as float32; -inf beyond the vocabulary."""
    at_RC = start + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(row + at_RC, mask=at_RC < vocabulary, other=float("-inf")).to(tl.float32)


@triton.jit
def _store_maxima(
    x_RC, maxima, start, groups, R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr
):
    """The largest logit of each run of GROUP ids of a tile."""
    per: tl.constexpr = C // GROUP
    largest_RG = tl.max(tl.reshape(x_RC, [R, per, GROUP]), 2)
    at_RG = start // GROUP + tl.arange(0, R)[:, None] * per + tl.arange(0, per)[None, :]
    tl.store(maxima + at_RG, largest_RG, mask=at_RG < groups)


@triton.jit
def _normalizer(
    row,
    vocabulary,
    maxima,
    groups,
    MAXIMA: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A row's maximum, its sum of exp over that (float64), and UNDEFINED or 0.

    Each of C columns keeps a maximum and a sum of its own, which are joined at the end.
    """
    peak_C = tl.full([C], float("-inf"), tl.float32)
    total_C = tl.zeros([C], tl.float64)
    wrong_C = tl.zeros([C], tl.int32)
    for start in range(0, vocabulary, R * C):
        x_RC = _load(row, start, vocabulary, R, C)
        wrong_C |= tl.max(((x_RC != x_RC) | (x_RC == float("inf"))).to(tl.int32), 0)
        if MAXIMA:
            _store_maxima(x_RC, maxima, start, groups, R, C, GROUP)
        new_C = tl.maximum(peak_C, tl.max(x_RC, 0))
        from_C = tl.where(new_C == float("-inf"), 0.0, new_C)
        added_C = tl.sum(tl.exp2((x_RC - from_C[None, :]) * LOG2E), 0)
        total_C = total_C * tl.exp2((peak_C - from_C) * LOG2E).to(tl.float64) + added_C.to(
            tl.float64
        )
        peak_C = new_C
    peak = tl.max(peak_C, 0)
    wrong = (tl.max(wrong_C, 0) > 0) | (peak == float("-inf"))
    peak = tl.where(wrong, 0.0, peak)
    total = tl.sum(total_C * tl.exp2((peak_C - peak) * LOG2E).to(tl.float64), 0)
    return peak, tl.where(wrong, 1.0, total), tl.where(wrong, UNDEFINED, 0)


@triton.jit
def _shift(student_total, teacher_total):
    """log2(Z_q / Z_p), rounded to what the tiles subtract."""
    return (tl.log2(teacher_total) - tl.log2(student_total)).to(tl.float32)


@triton.jit
def _differences(student_RC, teacher_RC, student_peak, teacher_peak):
    """Nats below the maxima of both models, and the flags of each token."""
    d_p_RC, d_q_RC = student_RC - student_peak, teacher_RC - teacher_peak
    far_p_RC, far_q_RC = d_p_RC < FAR, d_q_RC < FAR
    no_p_RC, no_q_RC = student_RC == float("-inf"), teacher_RC == float("-inf")
    d_p_RC, d_q_RC = tl.where(far_p_RC, -ABSENT, d_p_RC), tl.where(far_q_RC, -ABSENT, d_q_RC)
    mass_p_RC, mass_q_RC = d_p_RC > -ABSENT / 2, d_q_RC > -ABSENT / 2
    again_RC = (far_p_RC & ~no_p_RC & mass_q_RC) | (far_q_RC & ~no_q_RC & mass_p_RC)
    flags_RC = (
        (no_p_RC & ~no_q_RC).to(tl.int32) * STUDENT_EXCLUDES
        | (no_q_RC & ~no_p_RC).to(tl.int32) * TEACHER_EXCLUDES
        | again_RC.to(tl.int32) * AGAIN
    )
    return d_p_RC, d_q_RC, flags_RC


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _into(total_T, terms_RC, T: tl.constexpr):
    """A tile's terms added to T running sums: those of one thread in float32, the rest in
    float64.
    """
    terms_C = tl.sum(terms_RC, 0)
    terms_T = tl.sum(tl.reshape(terms_C, [T, terms_C.shape[0] // T]), 1)
    return total_T + terms_T.to(tl.float64)


# Not compiled anew for numbers of rows or of ids that happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["rows", "groups"])
def statistics(
    student,
    teacher,
    student_stride,
    teacher_stride,
    vocabulary,
    out,
    flags,
    rows,
    student_maxima,
    teacher_maxima,
    groups,
    LEVEL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One position of `divergences._dense`. out: float64 [8, rows], in the order of `fused.SUMS`;
    flags: int32 [rows].
    """
    n = tl.program_id(0).to(tl.int64)
    student += n * student_stride
    teacher += n * teacher_stride
    m_p, z_p, wrong_p = _normalizer(
        student, vocabulary, student_maxima + n * groups, groups, LEVEL == ALL, R, C, GROUP
    )
    m_q, z_q, wrong_q = _normalizer(
        teacher, vocabulary, teacher_maxima + n * groups, groups, LEVEL == ALL, R, C, GROUP
    )
    shift = _shift(z_p, z_q)
    over_p, over_q = (1.0 / z_p).to(tl.float32), (1.0 / z_q).to(tl.float32)

    w_p_T, w_q_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
    forward_T, reverse_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
    wd_p_T, wd_q_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
    js_T, hellinger_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
    flags_C = tl.zeros([C], tl.int32)
    for start in range(0, vocabulary, R * C):
        d_p_RC, d_q_RC, flags_RC = _differences(
            _load(student, start, vocabulary, R, C),
            _load(teacher, start, vocabulary, R, C),
            m_p,
            m_q,
        )
        flags_C |= tl.reduce(flags_RC, 0, _or)
        w_p_RC, w_q_RC = tl.exp2(d_p_RC * LOG2E), tl.exp2(d_q_RC * LOG2E)
        r_RC = (d_q_RC - d_p_RC) * LOG2E - shift
        w_p_T, w_q_T = _into(w_p_T, w_p_RC, T), _into(w_q_T, w_q_RC, T)
        forward_T, reverse_T = (
            _into(forward_T, w_q_RC * r_RC, T),
            _into(reverse_T, w_p_RC * r_RC, T),
        )
        if LEVEL != KL:
            p_RC, q_RC = w_p_RC * over_p, w_q_RC * over_q
            root_RC = tl.exp2(tl.abs(r_RC) * -0.5)
            js_T = _into(
                js_T,
                (p_RC + q_RC) * (1.0 - tl.log2(1.0 + root_RC * root_RC))
                - tl.minimum(p_RC, q_RC) * tl.abs(r_RC),
                T,
            )
        if LEVEL == ALL:
            wd_p_T, wd_q_T = _into(wd_p_T, w_p_RC * d_p_RC, T), _into(wd_q_T, w_q_RC * d_q_RC, T)
            apart_RC = 1.0 - root_RC
            hellinger_T = _into(hellinger_T, tl.maximum(p_RC, q_RC) * apart_RC * apart_RC, T)

    flag = tl.reduce(flags_C, 0, _or) | wrong_p | wrong_q
    z_p, z_q = tl.sum(w_p_T, 0), tl.sum(w_q_T, 0)  # rounded less than the first pass's
    ln_p, ln_q = tl.log2(z_p) * LN2, tl.log2(z_q) * LN2
    rounding = shift.to(tl.float64) * LN2 - (ln_q - ln_p)
    forward = tl.sum(forward_T, 0) / z_q * LN2 + rounding
    reverse = tl.sum(reverse_T, 0) / z_p * -LN2 - rounding
    forward = tl.where((flag & STUDENT_EXCLUDES) != 0, float("inf"), forward)
    reverse = tl.where((flag & TEACHER_EXCLUDES) != 0, float("inf"), reverse)
    undefined = (flag & UNDEFINED) != 0
    nan = float("nan")
    out += n
    tl.store(flags + n, flag)
    tl.store(out, tl.where(undefined, nan, forward))
    tl.store(out + rows, tl.where(undefined, nan, reverse))
    if LEVEL != KL:
        tl.store(out + 2 * rows, tl.where(undefined, nan, tl.sum(js_T, 0) * LN2 / 2))
    if LEVEL == ALL:
        tl.store(out + 3 * rows, tl.where(undefined, nan, tl.sqrt(tl.sum(hellinger_T, 0) / 2)))
        tl.store(out + 4 * rows, tl.where(undefined, nan, ln_p - tl.sum(wd_p_T, 0) / z_p))
        tl.store(out + 5 * rows, tl.where(undefined, nan, ln_q - tl.sum(wd_q_T, 0) / z_q))
        tl.store(out + 6 * rows, tl.where(undefined, nan, m_p.to(tl.float64) + ln_p))
        tl.store(out + 7 * rows, tl.where(undefined, nan, m_q.to(tl.float64) + ln_q))


@triton.jit
def _ordered(x, valid):
    """uint32 that order as the logits do, -0.0 as 0.0; 0, which is least, where not valid."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(valid, ordered.to(tl.uint32, bitcast=True) ^ 0x80000000, 0)


@triton.jit
def _places(ordered_X, k):
    """Whether each entry is one of the k largest, ties to the lower index, and its place among
    them by index. The k-th largest is found bit by bit.
    """
    kth, bit = tl.full([], 0, tl.uint32), tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        tried = kth | bit
        bit = bit >> 1
        kth = tl.where(tl.sum((ordered_X >= tried).to(tl.int32), 0) >= k, tried, kth)
    above_X, equal_X = ordered_X > kth, ordered_X == kth
    wanted = k - tl.sum(above_X.to(tl.int32), 0)
    taken_X = above_X | (equal_X & (tl.cumsum(equal_X.to(tl.int32), 0) <= wanted))
    return taken_X, tl.cumsum(taken_X.to(tl.int32), 0) - 1


@triton.jit(do_not_specialize=["groups", "k"])
def top_ids(
    logits,
    stride,
    vocabulary,
    maxima,
    groups,
    ids,
    k,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    """One position of `divergences.top_ids`. GROUPS and K: `groups` and `k` up to the next power of
    two, GROUPS at least K. `ids` also carries what the steps hand on.
    """
    n = tl.program_id(0).to(tl.int64)
    logits += n * stride
    ids += n * k
    at_G, at_K = tl.arange(0, GROUPS), tl.arange(0, K)
    largest_G = tl.load(maxima + n * groups + at_G, mask=at_G < groups, other=0.0)
    taken_G, place_G = _places(_ordered(largest_G, at_G < groups), k)
    tl.store(ids + place_G, at_G.to(tl.int64), mask=taken_G)
    tl.debug_barrier()
    group_K = tl.load(ids + at_K, mask=at_K < k, other=groups)
    tl.debug_barrier()

    id_X = tl.reshape(group_K[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [K * GROUP])
    valid_X = id_X < vocabulary
    x_X = tl.load(logits + id_X, mask=valid_X, other=0.0).to(tl.float32)
    taken_X, place_X = _places(_ordered(x_X, valid_X), k)
    tl.store(ids + place_X, tl.minimum(id_X, vocabulary - 1), mask=taken_X)
    tl.debug_barrier()
    id_K = tl.load(ids + at_K, mask=at_K < k, other=0)
    tl.debug_barrier()

    x_K = tl.load(logits + id_K).to(tl.float32)
    ordered_K = _ordered(x_K, at_K < k)
    before_KK = (ordered_K[None, :] > ordered_K[:, None]) | (
        (ordered_K[None, :] == ordered_K[:, None]) & (at_K[None, :] < at_K[:, None])
    )
    tl.store(ids + tl.sum(before_KK.to(tl.int32), 1), id_K, mask=at_K < k)


@triton.jit
def _excess(r_RC, beta):
    """log2 m - log2 p with m = beta q + (1 - beta) p, from r = log2 q - log2 p."""
    t_RC = tl.exp2(-tl.abs(r_RC))
    larger, smaller = tl.where(r_RC > 0, beta, 1 - beta), tl.where(r_RC > 0, 1 - beta, beta)
    return tl.maximum(r_RC, 0.0) + tl.log2(larger + smaller * t_RC)


@triton.jit
def objective(
    student,
    teacher,
    student_stride,
    teacher_stride,
    vocabulary,
    sampled,
    advantage,
    scale,
    values,
    flags,
    slope,
    slope_stride,
    beta,
    LOSS: tl.constexpr,
    GIVEN: tl.constexpr,
    SCALED: tl.constexpr,
    SLOPE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """One position of a loss. values: float64 [rows]; flags: int32 [rows]; slope: the derivative
    times the scale, and may be the student's logits themselves.

    A row with AGAIN or UNDEFINED gets no derivative: its logits stay, to be measured in float64.
    GIVEN, SCALED: whether there are advantages and scales.
    """
    n = tl.program_id(0).to(tl.int64)
    student += n * student_stride
    teacher += n * teacher_stride
    m_p, z_p, wrong_p = _normalizer(student, vocabulary, student, 0, False, R, C, 1)
    m_q, z_q, wrong_q = _normalizer(teacher, vocabulary, teacher, 0, False, R, C, 1)
    shift = _shift(z_p, z_q)
    over_p, over_q = (1.0 / z_p).to(tl.float32), (1.0 / z_q).to(tl.float32)
    flag = wrong_p | wrong_q
    y = tl.full([], 0, tl.int64)
    if LOSS == SAMPLED:
        y = tl.load(sampled + n)
        norm_p = m_p.to(tl.float64) + tl.log2(z_p) * LN2
        norm_q = m_q.to(tl.float64) + tl.log2(z_q) * LN2
        ln_p = tl.load(student + y).to(tl.float64) - norm_p
        ln_q = tl.load(teacher + y).to(tl.float64) - norm_q
        mean = ln_q - ln_p
        if GIVEN:
            mean = tl.load(advantage + n)
        value = -mean * ln_p
        # The advantage may be infinite or undefined, which float64 sorts out.
        flag = tl.where((value != value) | (tl.abs(value) == float("inf")), flag | AGAIN, flag)
    else:
        w_p_T, w_q_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
        from_p_T, from_q_T = tl.zeros([T], tl.float64), tl.zeros([T], tl.float64)
        flags_C = tl.zeros([C], tl.int32)
        for start in range(0, vocabulary, R * C):
            d_p_RC, d_q_RC, flags_RC = _differences(
                _load(student, start, vocabulary, R, C),
                _load(teacher, start, vocabulary, R, C),
                m_p,
                m_q,
            )
            flags_C |= tl.reduce(flags_RC, 0, _or)
            w_p_RC, w_q_RC = tl.exp2(d_p_RC * LOG2E), tl.exp2(d_q_RC * LOG2E)
            r_RC = (d_q_RC - d_p_RC) * LOG2E - shift
            w_p_T, w_q_T = _into(w_p_T, w_p_RC, T), _into(w_q_T, w_q_RC, T)
            if LOSS == JSD:
                excess_RC = _excess(r_RC, beta)
                from_p_T = _into(from_p_T, w_p_RC * -excess_RC, T)
                from_q_T = _into(from_q_T, w_q_RC * (r_RC - excess_RC), T)
            else:
                from_p_T = _into(from_p_T, w_p_RC * -r_RC, T)
                from_q_T = _into(from_q_T, w_q_RC * r_RC, T)
        flag |= tl.reduce(flags_C, 0, _or)
        z_p, z_q = tl.sum(w_p_T, 0), tl.sum(w_q_T, 0)
        rounding = (shift.to(tl.float64) - (tl.log2(z_q) - tl.log2(z_p))) * LN2
        mean, other = tl.sum(from_p_T, 0) / z_p * LN2, tl.sum(from_q_T, 0) / z_q * LN2
        if LOSS == JSD:
            value = beta * other + (1 - beta) * mean
        elif LOSS == FORWARD_KL:
            value = other + rounding
            value = tl.where((flag & STUDENT_EXCLUDES) != 0, float("inf"), value)
        else:
            mean -= rounding
            value = tl.where((flag & TEACHER_EXCLUDES) != 0, float("inf"), mean)
    undefined = (flag & UNDEFINED) != 0
    tl.store(values + n, tl.where(undefined, float("nan"), value))
    tl.store(flags + n, flag)

    if SLOPE:  # noqa: SIM102 - the outer condition is settled when the kernel is compiled
        if (flag & (AGAIN | UNDEFINED)) == 0:
            factor = 1.0
            if SCALED:
                factor = tl.load(scale + n).to(tl.float32)
            _write_slope(
                student,
                teacher,
                vocabulary,
                slope + n * slope_stride,
                (m_p, m_q, over_p, over_q, shift),
                (mean.to(tl.float32), factor, beta, y),
                LOSS,
                R,
                C,
            )


@triton.jit
def _write_slope(
    student,
    teacher,
    vocabulary,
    slope,
    row,
    loss,
    LOSS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The derivative of a loss in one row's logits. row: both maxima, one over both sums, log2 of
    the sums' ratio; loss: the mean that the derivative is taken from, its factor, beta and y.
    """
    m_p, m_q, over_p, over_q, shift = row
    mean, factor, beta, y = loss
    for start in range(0, vocabulary, R * C):
        at_RC = start + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
        d_p_RC, d_q_RC, _ = _differences(
            _load(student, start, vocabulary, R, C),
            _load(teacher, start, vocabulary, R, C),
            m_p,
            m_q,
        )
        p_RC = tl.exp2(d_p_RC * LOG2E) * over_p
        r_RC = (d_q_RC - d_p_RC) * LOG2E - shift
        if LOSS == FORWARD_KL:
            slope_RC = p_RC - tl.exp2(d_q_RC * LOG2E) * over_q
        elif LOSS == REVERSE_KL:
            slope_RC = p_RC * (r_RC * -LN2 - mean)
        elif LOSS == JSD:
            slope_RC = (1 - beta) * p_RC * (_excess(r_RC, beta) * -LN2 - mean)
        else:
            slope_RC = mean * (p_RC - (at_RC == y).to(tl.float32))
        tl.store(slope + at_RC, slope_RC * factor, mask=at_RC < vocabulary)
