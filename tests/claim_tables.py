"""Fold tables of known content, for the tests of the claims."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.folds import combine
from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import normalize


def claim_tokens(
    prompts: int = 32,
    length: int = 40,
    *,
    seed: int = 0,
    reach: float = 0.0,
    interaction: float = 0.0,
    marginal: float = 0.02,
    noise: float = 0.01,
    slope: float = 0.8,
    folds: int = 4,
    sizes: tuple[int, ...] = (4, 8, 32),
    k_noise: float = 0.02,
    null: bool = True,
    tilt: float = 0.0,
) -> pd.DataFrame:
    """A fold table whose gain is marginal * d + reach * (c - 1/2) + interaction * d*c + noise.

    Args:
        prompts: Number of prompts.
        length: Positions per prompt.
        seed: Seed.
        reach: What compatibility adds to the context gain, in nats.
        interaction: What d*c adds to it.
        marginal: What any teacher gives: it is in the permuted gain as well.
        noise: Standard deviation of each gain's noise, 0.3 of which varies by prompt and step.
        slope: How steeply compatibility falls with ln D: 0 for none, 4 for no overlap.
        folds: Number of folds.
        sizes: Other K of compatibility.
        k_noise: How much compatibility differs between K.
        null: Whether there is a step towards a permuted teacher.
        tilt: Standard deviation over steps of what d*c and c add to a step's gain by chance, with
            the mean over all possible steps at 0.
    """
    rng = np.random.default_rng(seed)
    code = np.repeat(np.arange(prompts), length)
    n = len(code)
    between = rng.normal(size=(prompts, 3))[code]
    divergence = np.exp(-1 + 1.5 * rng.normal(size=n) + 0.5 * between[:, 0])
    entropy = np.exp(-0.5 + rng.normal(size=n) + 0.5 * between[:, 1])
    logit = 1.5 * rng.normal(size=n) + 0.5 * between[:, 2] - slope * np.log(divergence)
    compatibility = 1 / (1 + np.exp(-logit))
    overlap = np.round(rng.random(n) * 16) / 16
    columns = {
        "context_id": [f"c{g:03d}" for g in code],
        "prompt_id": [f"p{g:03d}" for g in code],
        "position": np.tile(np.arange(length), prompts),
        "response_length": length,
        "token_id": 0,
        "token": "t",
        "fold": code % folds,
        "forward_kl": divergence,
        "reverse_kl": divergence,
        "student_entropy": entropy,
        "teacher_entropy": entropy * np.exp(0.3 * rng.normal(size=n)),
        "compatibility": compatibility,
        "bhattacharyya": np.clip(compatibility + 0.05 * rng.normal(size=n), 0, 1),
        "topk_overlap": overlap,
        "topk_jaccard": overlap / (2 - overlap),
    }
    for k in sizes:
        columns[f"compatibility_k{k}"] = np.clip(compatibility + k_noise * rng.normal(size=n), 0, 1)
    d, c = normalize(divergence), normalize(compatibility)
    own = reach * (c - 0.5) + interaction * d * c
    for fold in range(folds):
        common = marginal * d * (1 + 0.1 * rng.normal() + 0.5 * (code % folds == fold))

        def disturbed():
            return noise * (rng.normal(size=n) + 0.3 * rng.normal(size=prompts)[code])

        chance = tilt * (rng.normal() * c + rng.normal() * d * c) if tilt else 0.0
        columns[f"gain_fold{fold}"] = common + own + chance + disturbed()
        columns[f"reverse_gain_fold{fold}"] = columns[f"gain_fold{fold}"]
        if null:
            columns[f"gain_permuted_fold{fold}"] = common + disturbed()
    return validate_tokens(combine(pd.DataFrame(columns)))


def one_step(tokens: pd.DataFrame) -> pd.DataFrame:
    """The same positions as a table of one step with a column `split` in place of folds."""
    drop = [name for name in tokens if "fold" in name or name.startswith("own_")]
    split = np.where(tokens["fold"] % 2, "held_out", "step")
    return tokens.drop(columns=drop).assign(split=split)
