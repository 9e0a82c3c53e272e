"""Token tables with a trained student's columns, for the tests of the released statistics."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.schema import validate_tokens
from tests.made_tokens import made_tokens


def checkpoint_tokens(prompts: int = 10, length: int = 16, *, seed: int = 0) -> pd.DataFrame:
    """A table without folds whose trained student has moved at random, at K = 16 and 8."""
    rng = np.random.default_rng(seed + 1)
    tokens = made_tokens(prompts, length, seed=seed, folds=0, split=False, permuted=False)
    tokens = tokens.drop(columns=["gain", "reverse_gain", "relative_gain"])
    n = len(tokens)
    moved = {
        "forward_kl_after": tokens["forward_kl"] * np.exp(0.3 * rng.normal(size=n)),
        "student_entropy_after": tokens["student_entropy"] * np.exp(0.2 * rng.normal(size=n)),
        "bhattacharyya": rng.random(n),
        "teacher_top1_in_topk": rng.random(n) < 0.7,
        "sampled_in_topk": rng.random(n) < 0.9,
        "top1_match": rng.random(n) < 0.5,
    }
    for name in ("compatibility", "compatibility_k8"):
        moved[f"{name}_after"] = np.clip(tokens[name] + 0.1 * rng.normal(size=n), 0, 1)
    return validate_tokens(tokens.assign(**moved))


def script_columns(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """The scaled columns of a table by slow and plain loops: h, d, c, ht and G."""
    scaled = {}
    for name, column in (
        ("h", "student_entropy"),
        ("d", "forward_kl"),
        ("c", "compatibility"),
        ("ht", "teacher_entropy"),
    ):
        values = [float(value) for value in tokens[column]]
        low, high = quantile(values, 0.05), quantile(values, 0.95)
        scaled[name] = np.array([min(max((z - low) / (high - low), 0.0), 1.0) for z in values])
    pairs = zip(tokens["forward_kl"], tokens["forward_kl_after"])
    return scaled | {"gain": np.array([(a - b) / (a + 1e-12) for a, b in pairs])}


def quantile(values: list[float], share: float) -> float:
    """A linearly interpolated quantile, from the sorted list."""
    ordered, place = sorted(values), share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
