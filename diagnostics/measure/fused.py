"""Statistics and losses of whole chunks in a few launches of the Triton kernels of `kernels`.

Triton comes with torch for CUDA and is imported when a chunk of logits lies on such a device, and
nowhere else: the CPU and every other device take the path of `divergences` and `losses`, and so do
float64 logits and a device on which a first small call of the kernels fails, which is said once.
Both paths give the same columns, to rounding, and the same top-K ids.

A call launches one kernel, however many positions it has, and allocates its results alone: nothing
of the vocabulary's length but the maxima of groups of ids. To project inside a tile as well would
need both projections once for each pass, and they cost more than reading the logits.

With TRITON_INTERPRET=1 in the environment, Triton's interpreter runs the kernels on the CPU, which
is how they are tested where no GPU is at hand.

Axes: N positions, V vocabulary, G groups of ids, K support.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("diagnostics")

SUMS = (
    "forward_kl",
    "reverse_kl",
    "js",
    "hellinger",
    "student_entropy",
    "teacher_entropy",
    "student_norm",
    "teacher_norm",
)
"""Rows of the kernel's result, in their order."""
LEVELS = {"kl": 2, "js": 3, "all": len(SUMS)}
"""Number of those rows that each extent measures; the order is that of the kernel's levels."""
LOSSES = ("forward_kl", "reverse_kl", "jsd", "sampled")
"""The losses that have a kernel, in the order of its constants."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_K = 64
"""Ids that one program of the top-K kernel holds the candidates of."""
THREADS = 128
LOAD_BYTES = 16
"""Bytes that one thread reads at once."""
PER_THREAD = 8
"""Logits of each model that one thread holds at a time; more would leave room for fewer threads."""


def applies(*logits_NV: Tensor) -> bool:
    """Whether the kernels take these logits: where they lie, their dtype and their layout."""
    return all(map(_fits, logits_NV)) and _runs(logits_NV[0].device)


def _fits(logits_NV: Tensor) -> bool:
    return logits_NV.dtype in DTYPES and logits_NV.numel() > 0 and logits_NV.stride(1) == 1


def _runs(device: torch.device) -> bool:
    return (device.type == "cuda" or interpreted()) and _tried(str(device))


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _tried(device: str) -> bool:
    """Whether a small call succeeds on a device."""
    try:
        statistics(*torch.zeros(2, 1, 2, device=device).unbind(), upto="kl", group=1)
    except Exception as error:  # no Triton, no C compiler, an old card: each raises something else
        log.warning(
            "Triton's kernels do not run on %s (%s: %s). Statistics and losses are taken with"
            " torch alone, which is slower. `pip install triton` and a C compiler are what they"
            " need.",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True


def statistics(
    student_NV: Tensor, teacher_NV: Tensor, *, upto: str, group: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Vocabulary-wide measurements of every row, in one launch.

    Args:
        student_NV: [N, V] logits that `applies` takes.
        teacher_NV: [N, V] over the same ids, on the same device.
        upto: A key of LEVELS: both KLs alone, JS too, or everything.
        group: Ids per group, a power of two of at most 128.

    Returns:
        float64 [N] by name: the first LEVELS[upto] of SUMS, and for `all` `<model>_maxima`, float32
        [N, G]; and a bool [N] of the rows that float64 has to measure again.

    Reference:
        The definitions are those at the head of `divergences`.
    """
    from diagnostics.measure import kernels

    rows, vocabulary = student_NV.shape
    groups = -(-vocabulary // group)
    out_SN = student_NV.new_empty(LEVELS[upto], rows, dtype=torch.float64)
    flags_N = student_NV.new_empty(rows, dtype=torch.int32)
    maxima_2NG = student_NV.new_empty(2, rows if upto == "all" else 0, groups, dtype=torch.float32)
    _launch(
        kernels.statistics,
        (student_NV, teacher_NV, student_NV.stride(0), teacher_NV.stride(0), vocabulary),
        (out_SN, flags_N, rows, *maxima_2NG, groups),
        LEVEL=list(LEVELS).index(upto),
        GROUP=group,
        **_tile(student_NV, teacher_NV),
    )
    out = dict(zip(SUMS, out_SN))
    if upto == "all":
        out |= {"student_maxima": maxima_2NG[0], "teacher_maxima": maxima_2NG[1]}
    return out, (flags_N & kernels.AGAIN.value) > 0


def top_ids(logits_NV: Tensor, k: int, maxima_NG: Tensor, *, group: int) -> Tensor:
    """`divergences.top_ids` in one launch, from the float32 maxima of groups of ids.

    Args:
        logits_NV: [N, V] logits that `applies` takes.
        k: Number of ids, at most V and LARGEST_K.
        maxima_NG: [N, G] as `statistics` returns them.
        group: Ids per group.

    Returns:
        int64 [N, k].
    """
    from diagnostics.measure import kernels

    (rows, vocabulary), groups = logits_NV.shape, maxima_NG.shape[1]
    ids_NK = torch.empty(rows, k, dtype=torch.int64, device=logits_NV.device)
    width = max(2, _power_of_two(k))
    _launch(
        kernels.top_ids,
        (logits_NV, logits_NV.stride(0), vocabulary),
        (maxima_NG.contiguous(), groups, ids_NK, k),
        GROUPS=max(width, _power_of_two(groups)),
        GROUP=group,
        K=width,
    )
    return ids_NK


def objective(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    loss: str,
    beta: float,
    sampled_N: Tensor,
    advantage_N: Tensor | None,
    scale_N: Tensor | None,
    slope_NV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values of a loss and their derivative in the student's logits, in one launch.

    Args:
        student_NV: [N, V] logits that `applies` takes.
        teacher_NV: [N, V] over the same ids.
        loss: One of LOSSES.
        beta: Weight of the teacher, strictly between 0 and 1; only `jsd` uses it.
        sampled_N: [N] ids of the sampled tokens; only `sampled` uses them.
        advantage_N: [N] replaces the advantage of `sampled`; None takes ln q(y) - ln p(y).
        scale_N: [N] factors of the derivative; None is 1.
        slope_NV: [N, V] is filled with the derivative times the scale; it may be `student_NV`
            itself. None where no derivative is wanted.

    Returns:
        float64 values [N] in nats, and a bool [N] of the rows that float64 has to measure again:
        those have no derivative yet, and their logits are as they were.

    Reference:
        The definitions are those at the head of `losses`.
    """
    from diagnostics.measure import kernels

    rows, vocabulary = student_NV.shape
    values_N = student_NV.new_empty(rows, dtype=torch.float64)
    flags_N = student_NV.new_empty(rows, dtype=torch.int32)
    slope = student_NV if slope_NV is None else slope_NV

    def given(values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The values where there are any; what the kernel does not read is of no matter."""
        return values_N if values is None else values.to(values_N.device, dtype).contiguous()

    _launch(
        kernels.objective,
        (student_NV, teacher_NV, student_NV.stride(0), teacher_NV.stride(0), vocabulary),
        (given(sampled_N, torch.int64), given(advantage_N, torch.float64)),
        (given(scale_N, torch.float64), values_N, flags_N, slope, slope.stride(0), float(beta)),
        LOSS=LOSSES.index(loss),
        GIVEN=advantage_N is not None,
        SCALED=scale_N is not None,
        SLOPE=slope_NV is not None,
        **_tile(student_NV, teacher_NV),
    )
    return values_N, (flags_N & (kernels.AGAIN.value | kernels.UNDEFINED.value)) > 0


def result_bytes(rows: int, vocabulary: int, *, k: int, group: int) -> int:
    """Bytes that `statistics` of everything and `top_ids` of both models allocate."""
    groups = -(-vocabulary // group)
    return rows * (8 * len(SUMS) + 4 + 1 + 2 * 4 * groups + 2 * 8 * k)


def _tile(*logits_NV: Tensor) -> dict[str, int]:
    """A tile's shape: each thread reads LOAD_BYTES at once and holds PER_THREAD logits."""
    at_once = LOAD_BYTES // min(logits.element_size() for logits in logits_NV)
    return {"R": PER_THREAD // at_once, "C": THREADS * at_once, "T": THREADS}


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, *arguments: tuple, **constants: Any) -> None:
    """Run a kernel with one program per row of the first argument, on that argument's device."""
    flat = [argument for part in arguments for argument in part]
    on_device = torch.cuda.device(flat[0].device) if flat[0].is_cuda else nullcontext()
    with on_device:
        kernel[(len(flat[0]),)](*flat, num_warps=THREADS // 32, **constants)
