"""Norms, products and random signs of a model's weights: lists of tensors, one per parameter.

Sums run in float64 over pieces of a tensor, whose copies stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diagnostics.measure.divergences import to_float64

PIECE = 2**18
"""Numbers of a tensor that are added up at a time."""


@torch.no_grad()
def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in every bit: NaN equals NaN, and 0 differs from -0.

    The tensors are compared on their own device.
    """
    return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (left, right)))


def tensor_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors together."""
    return float(sum((to_float64(t) ** 2).sum() for (t,) in _pieces(tensors)) ** 0.5)


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of the products of corresponding numbers of two lists of tensors."""
    return float(sum((to_float64(a) * to_float64(b)).sum() for a, b in _pieces(left, right)))


def _pieces(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding tensors of the lists, flattened and cut into pieces."""
    for tensors in zip(*lists):
        yield from zip(*(t.detach().reshape(-1).split(PIECE) for t in tensors))


def random_signs(like: Sequence[Tensor], seed: int | None) -> Iterator[Tensor | int]:
    """Random signs, int8, in the shapes of `like`; 1 without a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for tensor in like:
        if generator is None:
            yield 1
            continue
        # drawn on the CPU, so that every device meets the same placebo
        bits = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8)
        yield bits.mul_(2).sub_(1).to(tensor.device)
