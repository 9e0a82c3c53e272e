"""Independent implementations in plain Python that several test files compare with."""

from __future__ import annotations

import math


def softmax(logits: list[float]) -> list[float]:
    """Probabilities of one row of logits, summed exactly."""
    largest = max(logits)
    weights = [math.exp(z - largest) for z in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def xlog(x: float, y: float) -> float:
    """x ln y, 0 where x is 0."""
    return 0.0 if x == 0 else x * math.log(y) if y > 0 else -math.inf


def kl(a: list[float], b: list[float]) -> float:
    """KL(a || b) in nats, summed exactly."""
    return math.fsum(xlog(x, x) - xlog(x, y) for x, y in zip(a, b))


def best(distribution: list[float], k: int) -> list[int]:
    """The k most likely ids, most likely first, ties to the lower id."""
    return sorted(range(len(distribution)), key=lambda v: (-distribution[v], v))[:k]
