"""A token table with known dependence of the gains on their predictors, for the tests of the
analysis.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import normalize


def made_tokens(
    prompts: int = 12,
    length: int = 15,
    *,
    seed: int = 0,
    learnable: float = 1.0,
    incompatible: float = 0.5,
    noise: float = 0.3,
    supports=(8,),
    placebo: bool = True,
) -> pd.DataFrame:
    """gain = learnable * d*c + incompatible * d*(1 - c) + noise, in nats; predictors vary between
    prompts too.
    """
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(prompts), rng.integers(length // 2, length + 1, prompts))
    n, between = len(codes), rng.normal(size=(prompts, 4))[codes]
    sizes = np.bincount(codes)
    h, d = (np.exp(rng.normal(size=n) + 0.5 * between[:, i]) for i in (0, 1))
    c = 1 / (1 + np.exp(-2 * rng.normal(size=n) - between[:, 2]))
    dn, cn = normalize(d), normalize(c)
    advantage = rng.normal(size=n)
    tokens = pd.DataFrame(
        {
            "context_id": [f"c{g}" for g in codes],
            "prompt_id": [f"p{g}" for g in codes],
            "position": np.concatenate([np.arange(s) for s in sizes]),
            "response_length": sizes[codes],
            "token_id": rng.integers(0, 99, n),
            "token": "t",
            "split": np.where(codes % 2, "held_out", "step"),
            "student_entropy": h,
            "teacher_entropy": np.exp(rng.normal(size=n)),
            "forward_kl": d,
            "reverse_kl": d * np.exp(0.3 * rng.normal(size=n)),
            "advantage": advantage,
            "acceptance": np.minimum(1, np.exp(advantage)),
            "student_margin": rng.random(n),
            "is_special": rng.random(n) < 0.1,
            "student_top1_in_teacher_top5": rng.random(n) < 0.7,
        }
    )
    for suffix in ("", *(f"_k{k}" for k in supports)):
        tokens[f"compatibility{suffix}"] = np.clip(
            c + (0.02 * rng.normal(size=n) if suffix else 0), 0, 1
        )
        tokens[f"topk_overlap{suffix}"] = np.round(tokens[f"compatibility{suffix}"] * 16) / 16
    tokens["gain"] = (
        learnable * dn * cn
        + incompatible * dn * (1 - cn)
        + noise * (rng.standard_t(5, size=n) + 0.3 * between[:, 3])
    )
    tokens["relative_gain"] = np.where(d > 0.3, tokens["gain"] / d, np.nan)
    tokens["reverse_gain"] = tokens["gain"] + 0.1 * rng.normal(size=n)
    if placebo:
        for name in ("gain", "relative_gain", "reverse_gain"):
            tokens[f"placebo_{name}"] = np.where(
                tokens[name].isna(), np.nan, 0.1 * rng.normal(size=n)
            )
    return validate_tokens(tokens)
