"""Logits in float32 or wider, whatever dtype hidden states and output head have.

    z = h W' + b, every product and sum in float32 (float64 where either side is), never rounded to
    a narrower dtype

bfloat16 keeps eight bits of a logit: rounded to that, logits around 10 are off by about 0.03, and a
KL by 1e-2 nats. The states and weights of a narrow model are given; their product need not be
rounded as well. The head is widened one part of the vocabulary at a time, so that memory holds
WIDENED_BYTES more and not a second head. On CUDA the matrix product itself takes narrow operands
and returns float32, where torch offers that.

Autocast is off inside, since it would round the operands again. Derivatives are made in the wide
dtype and rounded once, to the dtype of what they belong to.

Axes: n positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

WIDENED_BYTES = 32 * 2**20
"""Bytes of the head's weight that are held in the wide dtype at a time: enough for a fast matrix
product.
"""
NARROW = (torch.float16, torch.bfloat16)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Dtype of logits from operands of these dtypes: float32, or float64 where one is float64."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def linear(states_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`F.linear` whose sums and result are at least float32; differentiable once.

    Args:
        states_nH: [n, H], any floating dtype.
        weight_VH: [V, H], any floating dtype.
        bias_V: [V], or None.

    Returns:
        Logits [n, V], float32, or float64 where either side is float64.
    """
    given = (states_nH, weight_VH, bias_V)
    if has_torch_function(tuple(x for x in given if x is not None)):
        return handle_torch_function(linear, given, *given)
    with no_autocast(weight_VH.device.type):
        if states_nH.dtype == weight_VH.dtype == wide_dtype(states_nH.dtype):
            return F.linear(*given)
        return _Widened.apply(*given)


def no_autocast(device: str):
    """A context in which autocast rounds no operand."""
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


def _product(states_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    dtype = wide_dtype(states_nH.dtype, weight_VH.dtype)
    if states_nH.dtype == weight_VH.dtype and _takes_narrow(weight_VH):
        logits_nV = torch.mm(states_nH, weight_VH.T, out_dtype=dtype)
    else:
        logits_nV = states_nH.new_empty(len(states_nH), len(weight_VH), dtype=dtype)
        wide_nH = states_nH.to(dtype)
        for rows in _parts(weight_VH, dtype) if len(states_nH) else ():
            logits_nV[:, rows] = wide_nH @ weight_VH[rows].to(dtype).T
    return logits_nV if bias_V is None else logits_nV.add_(bias_V)


def _takes_narrow(weight_VH: Tensor) -> bool:
    """True where torch multiplies narrow matrices into a float32 one.

    This is found by trying, once per device and dtype.
    """
    if weight_VH.device.type != "cuda" or weight_VH.dtype not in NARROW:
        return False
    key = (weight_VH.device, weight_VH.dtype)
    if key not in _TAKES_NARROW:
        tiny = torch.ones(16, 16, device=weight_VH.device, dtype=weight_VH.dtype)
        try:
            _TAKES_NARROW[key] = (
                torch.mm(tiny, tiny, out_dtype=torch.float32).dtype == torch.float32
            )
        except (
            TypeError,
            RuntimeError,
        ):  # an older torch does not know the argument, or not for this device
            _TAKES_NARROW[key] = False
    return _TAKES_NARROW[key]


_TAKES_NARROW: dict[tuple, bool] = {}


def _parts(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows of the head in turn, as many as WIDENED_BYTES hold."""
    step = max(1, WIDENED_BYTES // (dtype.itemsize * max(1, weight_VH.shape[1])))
    for start in range(0, len(weight_VH), step):
        yield slice(start, start + step)


def to_states(gradient_nV: Tensor, weight_VH: Tensor, dtype: torch.dtype) -> Tensor:
    """Derivative [n, H] in the states, of dtype `dtype`.

    gradient_nV: derivative in the logits; weight_VH: the head's weight.
    """
    if gradient_nV.dtype == weight_VH.dtype:
        return (gradient_nV @ weight_VH).to(dtype)
    wide = wide_dtype(gradient_nV.dtype, weight_VH.dtype)
    sum_nH = gradient_nV.new_zeros(len(gradient_nV), weight_VH.shape[1], dtype=wide)
    for rows in _parts(weight_VH, wide):
        sum_nH.addmm_(gradient_nV[:, rows].to(wide), weight_VH[rows].to(wide))
    return sum_nH.to(dtype)


def add_to_weight(sum_VH: Tensor, gradient_nV: Tensor, states_nH: Tensor) -> None:
    """Add the derivative in the weight to `sum_VH` of the wide dtype, in place.

    gradient_nV: derivative in the logits; states_nH: the states that were projected.
    """
    sum_VH.addmm_(gradient_nV.T.to(sum_VH.dtype), states_nH.to(sum_VH.dtype))


def _to_weight(gradient_nV: Tensor, states_nH: Tensor, weight_VH: Tensor) -> Tensor:
    """The derivative [V, H] in the weight, in the weight's dtype."""
    to_weight_VH = torch.empty_like(weight_VH)
    wide_nH = states_nH.to(gradient_nV.dtype)
    for rows in _parts(weight_VH, gradient_nV.dtype):
        to_weight_VH[rows] = (gradient_nV[:, rows].T @ wide_nH).to(weight_VH.dtype)
    return to_weight_VH


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(states_nH, weight_VH)
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        return _product(states_nH, weight_VH, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_nV: Tensor) -> tuple:
        states_nH, weight_VH = ctx.saved_tensors
        states, weight, bias = ctx.needs_input_grad
        with no_autocast(weight_VH.device.type):
            return (
                to_states(gradient_nV, weight_VH, states_nH.dtype) if states else None,
                _to_weight(gradient_nV, states_nH, weight_VH) if weight else None,
                gradient_nV.sum(0).to(ctx.bias_dtype) if bias else None,
            )


@contextmanager
def wide_head(model: nn.Module) -> Iterator[None]:
    """Make a model's own logits leave its narrow output head in float32 while the block runs.

    This is for models that are run whole: those that cannot be taken apart, and generation. A head
    that is not a plain linear layer, or that accelerate moves or FSDP shards, stays as it is.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear) or not _can_be_widened(head):
        yield
        return

    def forward(states_BTH: Tensor) -> Tensor:
        logits_nV = linear(states_BTH.reshape(-1, states_BTH.shape[-1]), head.weight, head.bias)
        return logits_nV.view(*states_BTH.shape[:-1], -1)

    head.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward


def _can_be_widened(head: nn.Linear) -> bool:
    """A plain narrow head that stays where it is: accelerate's hooks and FSDP's shards replace
    `forward` or the weight's class.
    """
    moved = hasattr(head, "_hf_hook") or "forward" in vars(head)
    return head.weight.dtype in NARROW and not moved and type(head.weight) is nn.Parameter


def is_plain(head: nn.Module | None) -> bool:
    """True for a linear layer whose weight holds floating-point numbers."""
    return isinstance(head, nn.Linear) and head.weight.is_floating_point()
