"""Token tables with a probe and a trained student, and trainings of known content."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tests.made_tokens import made_tokens

MASKS = ("random", "teachability", "entropy")


def made_study(
    prompts: int = 24,
    length: int = 30,
    *,
    seed: int = 0,
    seen: float | None = None,
    folds: int = 4,
    **options,
) -> pd.DataFrame:
    """A table of `made_tokens` with the columns of a checkpoint at K = 16 and 8, and further
    proxies; the first share `seen` of the prompts was trained on.
    """
    rng = np.random.default_rng(seed + 7)
    tokens = made_tokens(prompts, length, seed=seed, folds=folds, **options)
    n = len(tokens)
    gain = 0.1 * tokens["forward_kl"] * tokens["compatibility"] + 0.1 * rng.normal(size=n)
    made = {
        "forward_kl_after": np.maximum(tokens["forward_kl"] - gain, 0.0),
        "student_entropy_after": tokens["student_entropy"] * np.exp(0.2 * rng.normal(size=n)),
        "union_forward_kl": tokens["forward_kl"] * rng.uniform(0.7, 1.0, n),
        "bhattacharyya": rng.random(n),
        "topk_jaccard": tokens["topk_overlap"] / (2 - tokens["topk_overlap"]),
    }
    for name in ("compatibility", "compatibility_k8"):
        made[f"{name}_after"] = np.clip(tokens[name] + 0.1 * rng.normal(size=n), 0, 1)
    if seen is not None:
        names = sorted(set(tokens["prompt_id"]))
        made["seen"] = tokens["prompt_id"].isin(names[: int(seen * prompts)])
    return tokens.assign(**made)


def made_trainings(
    tokens: pd.DataFrame,
    gains: dict[str, np.ndarray],
    *,
    budgets=(0.05,),
    seeds: int = 2,
    noise: float = 0.0,
    halves: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and kept positions of trainings that gain `gains` [N] by mask, plus noise by seed.

    With `halves` training s saw every second prompt, s mod 2 the first; otherwise it saw none.
    """
    rng = np.random.default_rng(11)
    codes = pd.factorize(tokens["prompt_id"], sort=True)[0]
    cells, kept = [], []
    for name, gain in gains.items():
        for budget in budgets:
            for seed in range(seeds):
                made = gain + noise * rng.normal() + noise * rng.normal(size=len(tokens))
                cells.append(
                    pd.DataFrame(
                        {
                            "criterion": name,
                            "budget": budget,
                            "seed": seed,
                            "context_id": tokens["context_id"],
                            "position": tokens["position"],
                            "forward_kl_after": tokens["forward_kl"] - made,
                            "reverse_kl_after": tokens["reverse_kl"],
                            "student_entropy_after": tokens["student_entropy"],
                            "compatibility_after": tokens["compatibility"],
                            "seen": codes % 2 == seed % 2 if halves else False,
                        }
                    )
                )
                kept.append(
                    {
                        "criterion": name,
                        "budget": budget,
                        "seed": seed,
                        "kept_share": budget * (1 + 0.1 * seed),
                        "q3_share": 0.5,
                        "mean_teachability": 0.4,
                        "mean_incompatible": 0.2,
                        "mean_compatibility": 0.6,
                    }
                )
    return pd.concat(cells, ignore_index=True), pd.DataFrame(kept)
