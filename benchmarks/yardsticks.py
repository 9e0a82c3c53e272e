"""What this package's statistics and losses are compared with: what one would otherwise use.

The statistics as plain vectorized torch in float32, by the formulas as they are written; the same
under torch.compile, where a compiler is present; the loss over all logits, traced by autograd; and
the fused losses of TRL and Liger, where they are installed. None of them is slowed down: rows per
block and chunk are those at which each was fastest, or its own default.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Missing(Exception):
    """A yardstick that this machine does not have, and why."""


# ---------------------------------------------------------------- statistics


def _wide(logits_NV: Tensor) -> Tensor:
    """float32 of narrower logits."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def plain_kls(student_NV: Tensor, teacher_NV: Tensor) -> dict[str, Tensor]:
    """Both KLs [N], all rows at once."""
    ln_p_NV, ln_q_NV = _wide(student_NV).log_softmax(-1), _wide(teacher_NV).log_softmax(-1)
    ratio_NV = ln_q_NV - ln_p_NV
    return {
        "forward_kl": (ln_q_NV.exp() * ratio_NV).sum(-1),
        "reverse_kl": -(ln_p_NV.exp() * ratio_NV).sum(-1),
    }


def plain_statistics(
    student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor, ks: Sequence[int]
) -> dict[str, Tensor]:
    """The main measurements [N], all rows at once; those of a list of K ids as `<name>_k<K>`."""
    student_NV, teacher_NV = _wide(student_NV), _wide(teacher_NV)
    ln_p_NV, ln_q_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    p_NV, q_NV = ln_p_NV.exp(), ln_q_NV.exp()
    ratio_NV, mixture_NV = ln_q_NV - ln_p_NV, (p_NV + q_NV) / 2
    ln_m_NV = mixture_NV.log()
    y_N1 = sampled_N[:, None]
    out = {
        "student_entropy": -(p_NV * ln_p_NV).sum(-1),
        "teacher_entropy": -(q_NV * ln_q_NV).sum(-1),
        "forward_kl": (q_NV * ratio_NV).sum(-1),
        "reverse_kl": -(p_NV * ratio_NV).sum(-1),
        "js": ((p_NV * (ln_p_NV - ln_m_NV)).sum(-1) + (q_NV * (ln_q_NV - ln_m_NV)).sum(-1)) / 2,
        "hellinger": (1 - (p_NV * q_NV).sqrt().sum(-1)).clamp(min=0).sqrt(),
        "student_logprob": ln_p_NV.gather(1, y_N1)[:, 0],
        "teacher_logprob": ln_q_NV.gather(1, y_N1)[:, 0],
    }
    s_NK, t_NK = student_NV.topk(max(ks)).indices, teacher_NV.topk(max(ks)).indices
    for k in ks:
        found = _plain_support(p_NV, q_NV, s_NK[:, :k], t_NK[:, :k])
        out |= {f"{name}_k{k}": values_N for name, values_N in found.items()}
    return out


def _plain_support(p_NV: Tensor, q_NV: Tensor, s_NK: Tensor, t_NK: Tensor) -> dict[str, Tensor]:
    same_NKK = s_NK[:, :, None] == t_NK[:, None, :]
    s_in_t_NK, t_in_s_NK = same_NKK.any(2), same_NKK.any(1)
    p_s_NK, q_s_NK = p_NV.gather(1, s_NK), q_NV.gather(1, s_NK)
    shared_N = s_in_t_NK.sum(-1)
    p_NU, q_NU = (
        torch.cat([at_s_NK, x_NV.gather(1, t_NK) * ~t_in_s_NK], -1)
        for x_NV, at_s_NK in ((p_NV, p_s_NK), (q_NV, q_s_NK))
    )
    p_NU, q_NU = p_NU / p_NU.sum(-1, keepdim=True), q_NU / q_NU.sum(-1, keepdim=True)
    ratio_NU = torch.where(p_NU > 0, (q_NU / p_NU).log(), 0.0)
    mean_N1 = (p_NU * ratio_NU).sum(-1, keepdim=True)
    return {
        "compatibility": q_s_NK.sum(-1),
        "compatibility_intersection": (q_s_NK * s_in_t_NK).sum(-1),
        "topk_overlap": shared_N / s_NK.shape[1],
        "topk_jaccard": shared_N / (2 * s_NK.shape[1] - shared_N),
        "shared_student_mass": (p_s_NK * s_in_t_NK).sum(-1),
        "teacher_top1_in_topk": t_in_s_NK[:, 0].float(),
        "bhattacharyya": (p_NU * q_NU).sqrt().sum(-1),
        "union_forward_kl": (q_NU * ratio_NU).sum(-1),
        "union_log_ratio_variance": (p_NU * (ratio_NU - mean_N1).square()).sum(-1),
    }


def in_rows(
    function: Callable[..., dict[str, Tensor]], rows: int, *per_row: Tensor, **others
) -> dict[str, Tensor]:
    """A function of rows, called on some of them at a time."""
    parts = [
        function(*(x[start : start + rows] for x in per_row), **others)
        for start in range(0, len(per_row[0]), rows)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compiled(function: Callable, device: str) -> Callable:
    """The function under torch.compile. Raises Missing where nothing can compile it."""
    if device == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise Missing("torch.compile needs a C++ compiler on the CPU")
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------- losses, as means over positions

LOSSES = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
"""Weight of the teacher in the mixture, as TRL and Liger name the three losses."""


def full_logits(
    student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, loss: str
) -> Tensor:
    """Both models' logits of every position, softmax and divergence traced by autograd."""
    with torch.no_grad():
        ln_q_NV = _wide(F.linear(teacher_NH, teacher_VH)).log_softmax(-1)
    ln_p_NV = _wide(F.linear(student_NH, student_VH)).log_softmax(-1)
    if loss == "forward_kl":
        return F.kl_div(ln_p_NV, ln_q_NV, reduction="sum", log_target=True) / len(ln_p_NV)
    if loss == "reverse_kl":
        return F.kl_div(ln_q_NV, ln_p_NV, reduction="sum", log_target=True) / len(ln_p_NV)
    ln_m_NV = torch.logsumexp(torch.stack([ln_p_NV, ln_q_NV]) - math.log(2), 0)
    kls = [
        F.kl_div(ln_m_NV, ln_NV, reduction="sum", log_target=True) for ln_NV in (ln_p_NV, ln_q_NV)
    ]
    return sum(kls) / 2 / len(ln_p_NV)


def trl(
    student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, loss: str
) -> Tensor:
    """TRL's fused divergence."""
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise Missing(f"TRL's fused divergence: {error}") from None
    values_N, _ = ChunkedDivergenceFunction.apply(
        student_NH, student_VH, None, teacher_NH, teacher_VH, None, LOSSES[loss]
    )
    return values_N.sum() / len(values_N)


def liger(
    student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor, loss: str
) -> Tensor:
    """Liger's fused linear JSD, the teacher's term alone."""
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    except ImportError as error:
        raise Missing(f"Liger's fused loss: {error}") from None
    settings = {
        "true_labels": torch.zeros(len(student_NH), dtype=torch.long, device=student_NH.device),
        "student_bias": None,
        "teacher_bias": None,
        "weight_hard_loss": 0.0,
        "weight_soft_loss": 1.0,
        "beta": LOSSES[loss],
        "ignore_index": -100,
        "temperature": 1.0,
        "compiled": student_NH.is_cuda,
    }
    return LigerFusedLinearJSDFunction.apply(
        student_NH, student_VH, teacher_NH, teacher_VH, *settings.values()
    )


# ---------------------------------------------------------------- memory


def allocated_on_the_cpu(function: Callable[[], object]) -> int:
    """Most bytes that torch held at one time while a function ran, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return int(torch.tensor(changes, dtype=torch.int64).cumsum(0).max())
