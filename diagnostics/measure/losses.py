"""On-policy distillation objectives per position, and their reduction with bounded memory.

With p the student's distribution, q the teacher's, y the sampled token, S the student's top K, z
the student's logits, the value of a position in nats and its derivative in z:

    forward_kl     KL(q||p), teacher first                 p - q
    reverse_kl     KL(p||q), student first                 p (ln p - ln q - KL(p||q))
    jsd            beta KL(q||m) + (1 - beta) KL(p||m),    (1 - beta) p (ln p - ln m - KL(p||m))
                   m = beta q + (1 - beta) p
    sampled        -A ln p(y), A = ln q(y) - ln p(y)       A (p - [y]), with A held constant
    topk_reverse   KL(p_S||q_S), renormalized on S         that of reverse_kl, on S

`sampled` is the policy gradient on the sampled token: over y ~ p its derivative averages to
reverse_kl's. beta = 0 of jsd is forward_kl and beta = 1 is reverse_kl, as in TRL's and Liger's
generalized JSD: the interior form tends to 0 at both ends, so the ends are special cases, not
limits.

Reference: arXiv 2306.13649 (generalized JSD), arXiv 2605.26844 (loss on the sampled token).

The reduction is the sum over positions of weight times value, over a denominator that the caller
counts globally, so that accumulation and data parallelism leave the gradient unchanged.

Departures: derivatives are written out, not traced, so a chunk of positions costs its logits once;
`chunked_loss` takes the derivative while the logits are in hand, where checkpointing would project
twice, and writes it over them where the head's last step does not need them. There is no second
derivative. The values of both KLs are those of `divergences`, bit for bit; on CUDA, where a kernel
takes value and derivative of a chunk in one launch (`fused`; topk_reverse has none), to rounding.

Undefined is NaN, value and derivative: a NaN or +inf logit in either model. A token that both
models exclude (-inf) contributes 0; one that only the second distribution of a KL excludes makes it
inf.

Axes: N positions, n of a chunk, r of a row block, H hidden size, V vocabulary, K support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure import fused, projection
from diagnostics.measure.divergences import (
    LN2,
    Block,
    Logits,
    blocks,
    chunk_size,
    has_mass_outside,
    in_float64,
    replace_neg_inf,
    sum_float64,
    teacher_logits_for,
    to_float64,
    top_ids,
)
from diagnostics.measure.loss_names import LOSSES as LOSSES  # named here too, beside the formulas
from diagnostics.measure.loss_names import check_loss


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
    """The objective of each position, differentiable once in the student's logits.

    Args:
        student_logits_NV: [N, V], any floating dtype.
        teacher_logits_NV: [N, V] over the same ids; no gradient flows into it.
        sampled_N: [N] ids of the sampled tokens; only `sampled` uses them.
        loss: One of LOSSES.
        beta: Weight of the teacher in [0, 1]; only `jsd` uses it.
        k: Size of the support in tokens; only `topk_reverse` uses it.
        advantage_N: [N] replaces ln q(y) - ln p(y) in `sampled`, such as an advantage that was
            frozen earlier.

    Returns:
        float64 [N] in nats; NaN where undefined.

    Raises:
        DiagnosticsError: The loss is unknown, beta lies outside [0, 1], or K is not positive.

    Reference:
        arXiv 2306.13649 (generalized JSD), arXiv 2605.26844 (loss on the sampled token).
    """
    objective = _objective(loss, beta=beta, k=k)
    positions = _Positions(sampled_N, advantage_N)
    return _PerPosition.apply(student_logits_NV, teacher_logits_NV.detach(), positions, objective)


def reduce(values_N: Tensor, weights_N: Tensor, denominator: float) -> Tensor:
    """Sum over positions of weight times value, over a denominator.

    Args:
        values_N: [N] values of the positions, in nats.
        weights_N: [N] weights. A position of weight 0 does not count, whatever its value.
        denominator: The global sum of weights, or the global count of positions.

    Returns:
        A scalar in nats.

    Raises:
        DiagnosticsError: The denominator is not positive.
    """
    _check_denominator(denominator)
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
    """The reduced objective, with the logits of one chunk in memory.

    The result is differentiable once in `student_hidden_NH` and in the parameters that
    `student_logits` uses. The derivatives are taken during the forward pass; the backward pass only
    hands them over.

    Args:
        student_hidden_NH: [N, H] states of the student.
        student_logits: Maps states [n, H] to logits [n, V], made for this call: the derivative may
            be written over them.
        teacher_hidden_NH: [N, H'] states of the teacher.
        teacher_logits: The same map of the teacher; no gradient flows into it.
        sampled_N: [N] ids of the sampled tokens.
        loss: One of LOSSES.
        weights_N: [N] weights; positions of weight 0 are never projected.
        denominator: Global sum of weights or count of positions, as in `reduce`.
        beta: As in `per_position`.
        k: As in `per_position`.
        advantage_N: As in `per_position`.
        chunk: Positions per projection; None chooses a number by the vocabulary's size.

    Returns:
        A scalar in nats, float64 (float32 where the device has no float64).

    Raises:
        DiagnosticsError: As `per_position`, and for a denominator that is not positive.
    """
    _check_denominator(denominator)
    objective = _objective(loss, beta=beta, k=k)
    nothing_0V = student_logits(student_hidden_NH[:0].detach())
    leaves = _leaves(nothing_0V)
    kept_n = weights_N.nonzero()[:, 0]
    # Half of scoring's chunk, since memory also holds the head's gradient, and the logits'
    # derivative where it cannot take their place.
    step = chunk or max(1, chunk_size(nothing_0V.shape[-1], nothing_0V.device) // 2)
    chunks = kept_n.split(step) if len(kept_n) else ()

    def chunk_value(at_n: Tensor, gradients: _Gradients | None) -> Tensor:
        """One chunk's part of the sum; its derivative goes to `gradients`."""
        hidden_nH = _at(student_hidden_NH, at_n).detach()
        scale_n = to_float64(_at(weights_N, at_n)) / denominator
        positions = _Positions(
            _at(sampled_N, at_n),
            None if advantage_N is None else _at(advantage_N, at_n),
            scale_n,
        )
        slope_nV: Tensor | None = None
        if gradients is None:
            student_nV = student_logits(hidden_nH)
        else:
            student_nV = gradients.trace(student_logits, hidden_nH)
            slope_nV = (
                student_nV.detach()
                if _may_be_overwritten(student_nV)
                else torch.empty_like(student_nV, requires_grad=False)
            )
        with torch.no_grad():
            teacher_nV = teacher_logits_for(
                student_nV.detach(), _at(teacher_hidden_NH, at_n), teacher_logits
            )
        values_n = _evaluate(
            objective, student_nV.detach(), teacher_nV, positions, slope_NV=slope_nV
        )
        del teacher_nV
        if gradients is not None and slope_nV is not None:
            gradients.add(student_nV, slope_nV, at_n)
        return (values_n * scale_n.to(values_n.device)).sum()

    if torch.is_grad_enabled() and (student_hidden_NH.requires_grad or leaves):
        return _Chunked.apply(chunk_value, chunks, student_hidden_NH, *leaves)
    return _sum((chunk_value(at_n, None) for at_n in chunks), student_hidden_NH.device)


OVERWRITABLE = ("_Linear", "_Widened", "Mm", "Addmm", "Mul", "Div")
"""Operations whose derivative does not need what they returned."""


def _may_be_overwritten(logits_nV: Tensor) -> bool:
    """Whether logits are a tensor of their own that no step of their graph has kept."""
    made_by = type(logits_nV.grad_fn).__name__.removesuffix("0").removesuffix("Backward")
    return made_by in OVERWRITABLE and logits_nV._base is None and logits_nV.is_contiguous()


@dataclass(frozen=True)
class _Objective:
    """A checked loss with its settings."""

    loss: str
    beta: float
    k: int


def _objective(loss: str, *, beta: float, k: int) -> _Objective:
    check_loss(loss, beta=beta, k=k)
    if loss == "jsd" and beta in (0, 1):
        loss = "reverse_kl" if beta else "forward_kl"
    return _Objective(loss, beta, k)


@dataclass(frozen=True)
class _Positions:
    """What a loss takes in addition to logits."""

    sampled_N: Tensor
    advantage_N: Tensor | None
    scale_N: Tensor | None = None
    """Factor of the derivative; 1 where None."""

    def __getitem__(self, rows: slice | Tensor) -> _Positions:
        return _Positions(
            self.sampled_N[rows],
            None if self.advantage_N is None else self.advantage_N[rows],
            None if self.scale_N is None else self.scale_N[rows],
        )

    def scaled(self, derivative_NV: Tensor) -> Tensor:
        """The derivative times the scale, in place."""
        return (
            derivative_NV
            if self.scale_N is None
            else derivative_NV.mul_(self.scale_N[:, None].to(derivative_NV))
        )


@torch.no_grad()
def _evaluate(
    objective: _Objective,
    student_NV: Tensor,
    teacher_NV: Tensor,
    positions: _Positions,
    *,
    slope_NV: Tensor | None,
) -> Tensor:
    """Values [N], float64; fills `slope_NV`, where given, with their derivative in the student's
    logits times the scale.

    `slope_NV` may be the student's logits: no row is written before its value is known to be right,
    since a value that is not finite is taken again from the logits, in float64.
    """
    if objective.loss in fused.LOSSES and fused.applies(student_NV, teacher_NV):
        values_N, again_N = fused.objective(
            student_NV,
            teacher_NV,
            loss=objective.loss,
            beta=objective.beta,
            sampled_N=positions.sampled_N,
            advantage_N=positions.advantage_N,
            scale_N=positions.scale_N,
            slope_NV=slope_NV,
        )
    else:
        values_N = _evaluate_blocks(objective, student_NV, teacher_NV, positions, slope_NV)
        again_N = ~values_N.isfinite()
    for rows_r in in_float64(again_N, student_NV.shape[1]):  # -inf as logit, or truly not finite
        student_rV, teacher_rV = to_float64(student_NV[rows_r]), to_float64(teacher_NV[rows_r])
        ((_, block),) = blocks(replace_neg_inf(student_rV), replace_neg_inf(teacher_rV))
        value_r, derivative = _RULES[objective.loss](
            objective, block, student_rV, teacher_rV, positions[rows_r]
        )
        if slope_NV is not None:
            slope_NV[rows_r] = positions[rows_r].scaled(derivative()).to(slope_NV.dtype)
        values_N[rows_r] = torch.where(
            _infinite(objective, student_rV, teacher_rV) & ~value_r.isnan(), torch.inf, value_r
        )
    return values_N


def _evaluate_blocks(
    objective: _Objective,
    student_NV: Tensor,
    teacher_NV: Tensor,
    positions: _Positions,
    slope_NV: Tensor | None,
) -> Tensor:
    """Values [N], float64, a few rows at a time; fills the slope of rows with a finite value."""

    def fill(rows: slice, block: Block) -> Tensor:
        value_r, derivative = _RULES[objective.loss](
            objective, block, student_NV[rows], teacher_NV[rows], positions[rows]
        )
        if slope_NV is None:
            return value_r
        slope_rV = positions[rows].scaled(derivative()).to(slope_NV.dtype)
        right_r = value_r.isfinite()
        if right_r.all():
            slope_NV[rows] = slope_rV
        else:
            slope_NV[rows][right_r] = slope_rV[right_r]
        return value_r

    return torch.cat([fill(rows, block) for rows, block in blocks(student_NV, teacher_NV)])


def _infinite(objective: _Objective, student_rV: Tensor, teacher_rV: Tensor) -> Tensor:
    """Rows [r] whose KL is inf because only its second distribution excludes a token."""
    if objective.loss == "forward_kl":
        return has_mass_outside(teacher_rV, student_rV)
    return has_mass_outside(student_rV, teacher_rV) & (objective.loss == "reverse_kl")


# Each rule returns the values [r] and a function that gives the derivative [r, V] in one of the
# block's buffers.
Rule = tuple[Tensor, Callable[[], Tensor]]


def _forward_kl(
    objective: _Objective,
    block: Block,
    student_rV: Tensor,
    teacher_rV: Tensor,
    positions: _Positions,
) -> Rule:
    forward_r, _ = block.kls()

    def derivative() -> Tensor:
        p_rV, q_rV = block.distributions().unbind(1)
        return p_rV.sub_(q_rV)

    return forward_r, derivative


def _reverse_kl(
    objective: _Objective,
    block: Block,
    student_rV: Tensor,
    teacher_rV: Tensor,
    positions: _Positions,
) -> Rule:
    _, reverse_r = block.kls()

    def derivative() -> Tensor:
        return (
            block.ratio_rV.mul_(-LN2)
            .sub_(reverse_r[:, None].to(block.ratio_rV))
            .mul_(block.distributions()[:, 0])
        )

    return reverse_r, derivative


def _jsd(
    objective: _Objective,
    block: Block,
    student_rV: Tensor,
    teacher_rV: Tensor,
    positions: _Positions,
) -> Rule:
    beta, (forward_r, _) = objective.beta, block.kls()
    distributions_r2V = block.distributions()
    excess_rV = _log_mixture_over_p(beta, block, distributions_r2V)
    mean_r2 = LN2 * sum_float64(
        torch.mul(distributions_r2V, excess_rV[:, None], out=block.spare_r2V)
    )
    from_student_r, from_teacher_r = -mean_r2[:, 0], forward_r - mean_r2[:, 1]  # KL(p||m), KL(q||m)

    def derivative() -> Tensor:
        slope_rV = excess_rV.mul_(-LN2).sub_(from_student_r[:, None].to(excess_rV))
        return slope_rV.mul_(distributions_r2V[:, 0]).mul_(1 - beta)

    return beta * from_teacher_r + (1 - beta) * from_student_r, derivative


def _log_mixture_over_p(beta: float, block: Block, distributions_r2V: Tensor) -> Tensor:
    """log2 m - log2 p [r, V], m = beta q + (1 - beta) p, in the block's buffer of log2 p."""
    mixture_rV, ln_rV = block.spare_r2V.unbind(1)
    p_rV, q_rV = distributions_r2V.unbind(1)
    torch.lerp(p_rV, q_rV, beta, out=mixture_rV).clamp_(min=torch.finfo(mixture_rV.dtype).tiny)
    centred_rV = block.centred_r2V[:, 0]
    return torch.sub(torch.log2(mixture_rV, out=ln_rV), centred_rV, out=centred_rV).add_(
        block.total_r2[:, :1].log2().to(centred_rV)
    )


def _sampled(
    objective: _Objective,
    block: Block,
    student_rV: Tensor,
    teacher_rV: Tensor,
    positions: _Positions,
) -> Rule:
    norm_r2, y_r1 = block.norms(), positions.sampled_N[:, None].to(student_rV.device)
    ln_p_r, ln_q_r = (
        to_float64(x_rV.gather(1, y_r1))[:, 0] - norm_r2[:, i]
        for i, x_rV in enumerate((student_rV, teacher_rV))
    )
    advantage_r = (
        ln_q_r - ln_p_r
        if positions.advantage_N is None
        else to_float64(positions.advantage_N).to(ln_p_r.device)
    )

    def derivative() -> Tensor:
        p_rV = block.distributions()[:, 0]
        factor_r1 = advantage_r[:, None].to(p_rV)
        return p_rV.mul_(factor_r1).scatter_add_(1, y_r1, -factor_r1)

    return -advantage_r * ln_p_r, derivative


def _topk_reverse(
    objective: _Objective,
    block: Block,
    student_rV: Tensor,
    teacher_rV: Tensor,
    positions: _Positions,
) -> Rule:
    ids_rK = top_ids(student_rV, objective.k)
    ln_p_rK, ln_q_rK = (
        to_float64(x_rV.gather(1, ids_rK)).log_softmax(-1) for x_rV in (student_rV, teacher_rV)
    )
    ratio_rK = torch.where(ln_p_rK > -torch.inf, ln_p_rK - ln_q_rK, 0.0)
    value_r = (ln_p_rK.exp() * ratio_rK).sum(-1) + 0 * block.total_r2.sum(
        -1
    )  # NaN where any logit is

    def derivative() -> Tensor:
        slope_rK = ln_p_rK.exp() * (ratio_rK - value_r[:, None])
        return block.centred_r2V[:, 0].zero_().scatter_(1, ids_rK, slope_rK.to(block.centred_r2V))

    return value_r, derivative


_RULES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "sampled": _sampled,
    "topk_reverse": _topk_reverse,
}


class _PerPosition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_NV: Tensor, teacher_NV: Tensor, positions: _Positions, objective: _Objective
    ) -> Tensor:
        slope_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        values_N = _evaluate(objective, student_NV, teacher_NV, positions, slope_NV=slope_NV)
        ctx.save_for_backward(slope_NV)
        return values_N

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_N: Tensor) -> tuple:
        (slope_NV,) = ctx.saved_tensors
        return slope_NV * gradient_N[:, None].to(slope_NV), None, None, None


class _Chunked(torch.autograd.Function):
    """Sum of the chunks' values, and the derivative that was taken with them."""

    @staticmethod
    def forward(
        ctx, chunk_value: Callable, chunks: Sequence[Tensor], hidden_NH: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.gradients = _Gradients(hidden_NH, leaves)
        return _sum((chunk_value(at_n, ctx.gradients) for at_n in chunks), hidden_NH.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError(
                "chunked_loss frees its derivative in the first backward; call it again for a"
                " second."
            )
        hidden_NH, sums = ctx.gradients.result()
        ctx.gradients = None
        factor = float(gradient)
        scaled = (x if x is None or factor == 1 else x.mul_(factor) for x in (hidden_NH, *sums))
        return None, None, *scaled


class _Gradients:
    """Derivative of a chunked loss in hidden states and parameters, added up chunk by chunk."""

    def __init__(self, hidden_NH: Tensor, leaves: tuple[Tensor, ...]):
        self._hidden_NH = torch.zeros_like(hidden_NH) if hidden_NH.requires_grad else None
        self._leaves = leaves
        self._sums: dict[int, Tensor] = {}
        self._input_nH: Tensor | None = None

    def trace(self, student_logits: Logits, hidden_nH: Tensor) -> Tensor:
        """The chunk's logits, with the graph that leads to them."""
        self._input_nH = hidden_nH.requires_grad_(self._hidden_NH is not None)
        with torch.enable_grad(), _LinearsAddInPlace(self):
            return student_logits(self._input_nH)

    def add(self, logits_nV: Tensor, slope_nV: Tensor, at_n: Tensor) -> None:
        """Carry a derivative in the chunk's logits on to hidden states and parameters."""
        input_nH = self._input_nH
        if input_nH is None:
            raise RuntimeError("add() follows trace(), once per chunk.")
        inputs = [x for x in (input_nH, *self._leaves) if x.requires_grad]
        # Retained, since what a head uses may share a graph between chunks; this chunk's goes with
        # its logits.
        parts = dict(
            zip(
                map(id, inputs),
                torch.autograd.grad(
                    logits_nV, inputs, slope_nV, retain_graph=True, allow_unused=True
                ),
            )
        )
        if self._hidden_NH is not None and parts[id(input_nH)] is not None:
            self._hidden_NH[at_n.to(self._hidden_NH.device)] = parts[id(input_nH)]
        for leaf in self._leaves:
            if parts[id(leaf)] is not None:
                self.sum_of(leaf).add_(parts[id(leaf)])
        self._input_nH = None

    def sum_of(self, leaf: Tensor) -> Tensor:
        """The running derivative in a parameter, float32 or wider: chunks that add up to one number
        are rounded once.
        """
        if id(leaf) not in self._sums:
            self._sums[id(leaf)] = torch.zeros_like(leaf, dtype=projection.wide_dtype(leaf.dtype))
        return self._sums[id(leaf)]

    def holds(self, tensor: Tensor) -> bool:
        """True for one of the parameters."""
        return any(tensor is leaf for leaf in self._leaves)

    def result(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """Derivative in the hidden states and in each parameter, in their dtypes."""
        sums = [(leaf, self._sums.pop(id(leaf), None)) for leaf in self._leaves]
        return self._hidden_NH, [
            None if total is None else total.to(leaf.dtype) for leaf, total in sums
        ]


class _LinearsAddInPlace(TorchFunctionMode):
    """Make linear layers add their weight's derivative to the running sum.

    This applies to F.linear and `projection.linear` while the mode is active, where the weight is a
    parameter or a slice of one. Autograd would create one more [V, H] tensor for each chunk, which
    at full vocabulary is most of the memory.
    """

    def __init__(self, gradients: _Gradients):
        super().__init__()
        self._gradients = gradients

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, projection.linear) and not kwargs and self._applies(func, *args):
            return _Linear.apply(
                func, args[0], args[1], args[2] if len(args) > 2 else None, self._gradients
            )
        return func(*args, **(kwargs or {}))

    def _applies(
        self, func: Callable, input_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None
    ) -> bool:
        leaf = weight_VH if weight_VH._base is None else weight_VH._base
        plain = type(weight_VH) in (Tensor, torch.nn.Parameter) and type(leaf) in (
            Tensor,
            torch.nn.Parameter,
        )
        same = input_nH.dim() == 2 and weight_VH.dtype == leaf.dtype and leaf.is_contiguous()
        if func is F.linear:
            same = (
                same
                and input_nH.dtype == weight_VH.dtype
                and not torch.is_autocast_enabled(weight_VH.device.type)
            )
        return plain and same and self._gradients.holds(leaf)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        func: Callable,
        input_nH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        gradients: _Gradients,
    ) -> Tensor:
        ctx.save_for_backward(input_nH, weight_VH)
        ctx.gradients, ctx.bias_dtype = gradients, None if bias_V is None else bias_V.dtype
        return func(input_nH, weight_VH, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_nV: Tensor) -> tuple:
        input_nH, weight_VH = ctx.saved_tensors
        leaf = weight_VH if weight_VH._base is None else weight_VH._base
        place = (
            weight_VH.size(),
            weight_VH.stride(),
            weight_VH.storage_offset() - leaf.storage_offset(),
        )
        with projection.no_autocast(weight_VH.device.type):
            projection.add_to_weight(
                ctx.gradients.sum_of(leaf).as_strided(*place), gradient_nV, input_nH
            )
            to_input = (
                projection.to_states(gradient_nV, weight_VH, input_nH.dtype)
                if ctx.needs_input_grad[1]
                else None
            )
        to_bias = gradient_nV.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return None, to_input, None, to_bias, None


def _leaves(output: Tensor) -> tuple[Tensor, ...]:
    """The parameters at the roots of an output's graph, in a fixed order."""
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return tuple(found)


def _at(values_N: Tensor, at_n: Tensor) -> Tensor:
    return values_N[at_n.to(values_N.device)]


def _sum(values: Iterable[Tensor], device: torch.device) -> Tensor:
    """float64 scalar, float32 where the device has no more."""
    out = sum(values, torch.zeros((), dtype=torch.float64))
    return out.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _check_denominator(denominator: float) -> None:
    if not denominator > 0:
        raise DiagnosticsError(
            f"The denominator of the loss is {denominator}; select at least one position."
        )
