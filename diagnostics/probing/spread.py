"""How a student's weights are divided among processes, and what is summed over them.

A sharded student (FSDP2) has its layers' weights in parts: of each, every process holds some
consecutive rows. All that a step does to weights it does to those rows, as to a tensor of their
own. Only what is summed over weights, as a norm, and what depends on a weight's number, as its
random sign, has to know of the division.

    sum over all weights = sum over processes of (their rows of divided weights)
                         + sum over whole weights, which every process has
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diagnostics.core import distributed


@dataclass(frozen=True)
class Spread:
    """The division of a list of weights."""

    divided: tuple[bool, ...]
    """For each weight, whether this process holds a part of its rows."""
    firsts: tuple[int, ...]
    """For each weight, the number of its first coordinate here among those of all weights."""

    @property
    def is_whole(self) -> bool:
        """True where every process has all of every weight."""
        return not any(self.divided)

    def total(self, sums: Iterable[float]) -> float:
        """A sum over all weights from the sum over each weight's part here."""
        if self.is_whole:
            return float(sum(sums))
        parts = np.zeros(2)
        for divided, value in zip(self.divided, sums, strict=True):
            parts[int(divided)] += value
        return float(parts[0] + distributed.sum_over_processes(parts[1:])[0])

    def name(self, digest: str) -> str:
        """One name of all processes' parts, from the name of the part here."""
        if self.is_whole:
            return digest
        own = np.zeros((distributed.world(), len(digest)))
        own[distributed.rank()] = np.frombuffer(digest.encode(), dtype=np.uint8)
        whole = distributed.sum_over_processes(own).astype(np.uint8)
        return hashlib.sha256(whole.tobytes()).hexdigest()


def of_weights(weights: Sequence[Tensor]) -> Spread:
    """The division of a model's own parameters."""
    firsts, first = [], 0
    for weight in weights:
        firsts.append(first + _offset(weight))
        first += weight.numel()
    return Spread(tuple(map(is_divided, weights)), tuple(firsts))


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is one whose rows are divided among the processes."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds, sharing their memory; a whole one itself."""
    divided: Any = tensor
    return divided.to_local() if is_divided(tensor) else tensor


def _offset(weight: Tensor) -> int:
    """Number of coordinates of a weight before those of this process."""
    if not is_divided(weight):
        return 0
    divided: Any = weight
    assert [place.is_shard(0) for place in divided.placements] == [True], "divided by its rows"
    rows = len(weight)
    each = -(-rows // distributed.world())  # torch.chunk's size, by which FSDP2 divides
    first = min(distributed.rank() * each, rows)
    held = len(local(weight))
    assert held == min(each, rows - first), f"{held} rows of {rows} lie here, not as they should"
    return first * (weight.numel() // rows)
