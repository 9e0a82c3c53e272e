"""What is kept of the gradients of many batches, one parameter at a time.

A hook takes each parameter's gradient as soon as the backward pass has made it, so the gradients of
a batch are never in memory together, and a student on a full card can have its sums in main memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from diagnostics.core import distributed
from diagnostics.measure.divergences import to_float64
from diagnostics.probing.spread import is_divided, local
from diagnostics.probing.step_state import StatePlace
from diagnostics.probing.tensor_lists import add_in_float64, inner_product


class GradientTaker:
    """Takes the gradient of each parameter during backward passes; subclasses say what for."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = list(parameters)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take every gradient that is made while the block runs; no parameter keeps its own."""
        hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, i))
            for i, p in enumerate(self.parameters)
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self.take(number, local(gradient))

    def take(self, number: int, gradient: Tensor) -> None:
        """One parameter's gradient of one batch; of a divided one, this process's part of the
        gradient of all processes' batches.
        """
        raise NotImplementedError


class GradientSums(GradientTaker):
    """The sum over batches in float64, which every order of the batches rounds alike.

    Args:
        parameters: The student's parameters.
        place: Where the sums lie.
    """

    def __init__(self, parameters: Sequence[Tensor], place: StatePlace):
        super().__init__(parameters)
        self.place = place
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def take(self, number: int, gradient: Tensor) -> None:
        """Add one parameter's gradient; the first one is kept without a copy."""
        total = self._sums[number]
        if total is None:
            self._sums[number] = gradient.to(self.place.sums(gradient))
        else:
            self._sums[number] = add_in_float64(total, gradient)

    def total(self) -> list[Tensor]:
        """The sums over all processes in the parameters' dtype. They can be had once: each sum is
        forgotten as it is rounded.
        """
        return [self._rounded(number, p) for number, p in enumerate(self.parameters)]

    def _rounded(self, number: int, parameter: Tensor) -> Tensor:
        total, self._sums[number] = self._sums[number], None
        if total is None:
            own = local(parameter.detach())
            total = torch.zeros_like(own, device=self.place.sums(own))
        if distributed.world() > 1 and not is_divided(parameter):
            total = to_float64(total)
            distributed.sum_in_place([total])
        return total.to(parameter.dtype)


class GradientProduct(GradientTaker):
    """The product of each batch's gradient with a direction; no gradient is kept.

    Args:
        parameters: The student's parameters.
        direction: One tensor per parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], direction: Sequence[Tensor]):
        super().__init__(parameters)
        self.direction, self._product = list(direction), 0.0

    def take(self, number: int, gradient: Tensor) -> None:
        """Add one parameter's part of the present batch's product."""
        self._product += inner_product([gradient], [self.direction[number].to(gradient.device)])

    def of_batch(self) -> float:
        """The product of the batch that was just gone through; the next one begins at 0."""
        product, self._product = self._product, 0.0
        return product
