"""Norms, products, first updates and random signs of weights: lists of tensors, one per parameter.

Everything runs over pieces of a tensor, so that no list needs memory for a second one: sums in
float64, whose copies of a piece stay in cache, and updates in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diagnostics.measure.divergences import to_float64
from diagnostics.models.weights import splitmix64
from diagnostics.probing.spread import Spread

ADAM_EPS = 1e-8
PIECE = 2**18
"""Numbers of a tensor that are worked on at a time."""
ACCELERATORS_PIECE = 2**24
"""The same on an accelerator, whose launches cost more than small sums."""
BITS = 64
"""Signs that one pseudo-random number gives."""


def tensor_norm(tensors: Sequence[Tensor], spread: Spread | None = None) -> float:
    """Euclidean norm over all tensors together.

    Args:
        tensors: The tensors, or what this process holds of each.
        spread: How they are divided among the processes; None where each process has all of them.
    """
    if spread is None or spread.is_whole:
        return float(sum((to_float64(t) ** 2).sum() for (t,) in _pieces(tensors)) ** 0.5)
    return spread.total(tensor_norm([t]) ** 2 for t in tensors) ** 0.5


def distance(
    left: Sequence[Tensor], right: Sequence[Tensor], spread: Spread | None = None
) -> float:
    """Euclidean norm of the difference of two lists, on the devices of the left one; `spread` as
    in `tensor_norm`.
    """
    if spread is None or spread.is_whole:
        squares = ((to_float64(a - b.to(a.device)) ** 2).sum() for a, b in _pieces(left, right))
        return float(sum(squares) ** 0.5)
    return spread.total(distance([a], [b]) ** 2 for a, b in zip(left, right, strict=True)) ** 0.5


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of the products of corresponding numbers of two lists of tensors."""
    return float(sum((to_float64(a) * to_float64(b)).sum() for a, b in _pieces(left, right)))


def add_in_float64(total: Tensor, addend: Tensor) -> Tensor:
    """The sum of two tensors of one shape, added into the first where that is float64 already.

    PyTorch alone would first cast the whole addend, which for a large embedding is a gigabyte.
    """
    total = to_float64(total).contiguous()
    for into, part in _pieces([total], [addend.to(total.device)]):
        into += part
    return total


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding tensors of the lists, flattened and cut into pieces."""
    for tensors in zip(*lists):
        size = _piece_size(tensors[0])
        yield from zip(*(t.detach().reshape(-1).split(size) for t in tensors))


def _piece_size(tensor: Tensor) -> int:
    return PIECE if tensor.device.type == "cpu" else ACCELERATORS_PIECE


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding rows of tensors of one shape, some rows at a time, as views."""
    whole = [t.detach().view(1) if t.dim() == 0 else t.detach() for t in tensors]
    width = max(1, whole[0].numel() // max(1, len(whole[0])))
    yield from zip(*(t.split(max(1, _piece_size(whole[0]) // width)) for t in whole), strict=True)


def first_update(gradient: Sequence[Tensor], optimizer: str) -> list[Tensor]:
    """The optimizer's first update from a gradient, for a step of size 1.

    Args:
        gradient: One tensor per parameter.
        optimizer: `adamw` gives -g/(|g| + eps) for each coordinate, `sgd` gives -g/|g|.

    Returns:
        One tensor per parameter.
    """
    update = [g.clone() for g in gradient]
    first_update_in_place(update, optimizer)
    return update


@torch.no_grad()
def first_update_in_place(
    gradient: Sequence[Tensor], optimizer: str, spread: Spread | None = None
) -> tuple[float, float]:
    """Turn a gradient into `first_update` of it.

    Args:
        gradient: One tensor per parameter; the update afterwards.
        optimizer: `adamw` or `sgd`.
        spread: As in `tensor_norm`.

    Returns:
        The gradient's norm, and its product with the update, which is the change of the loss for a
        step of size 1, to first order.
    """
    norm = tensor_norm(gradient, spread)
    scale = max(norm, torch.finfo(torch.float32).tiny)
    if spread is None or spread.is_whole:
        return norm, float(sum(_updated(gradient, optimizer, scale)))
    return norm, spread.total(float(sum(_updated([g], optimizer, scale))) for g in gradient)


def _updated(gradient: Sequence[Tensor], optimizer: str, scale: float) -> Iterator[Tensor]:
    """Turn gradients into updates, piece by piece; gives each piece's product of the two."""
    for (piece,) in (pieces for g in gradient for pieces in row_pieces(g)):
        before = piece.clone()
        piece.div_(before.abs().add_(ADAM_EPS) if optimizer == "adamw" else scale).neg_()
        yield (to_float64(before) * to_float64(piece)).sum()


def signs(seed: int, first: int, count: int, device: torch.device | str) -> Tensor:
    """Random signs of consecutive coordinates, each decided by the seed and its number alone.

    Coordinate i has bit i % 64 of the splitmix64 number of counter i // 64, so the signs depend
    neither on the device nor on how coordinates are divided among calls and processes.

    Args:
        seed: An integer of up to 64 bits.
        first: Number of the first coordinate.
        count: How many.
        device: Where the signs are made.

    Returns:
        int8 [count] of -1 and 1.
    """
    begin, end = first // BITS, -(-(first + count) // BITS)
    words = splitmix64(torch.arange(begin, end, device=device), seed)
    bits = (words[:, None] >> torch.arange(BITS, device=device)).bitwise_and_(1).to(torch.int8)
    return bits.reshape(-1)[first - BITS * begin :][:count].mul_(2).sub_(1)
