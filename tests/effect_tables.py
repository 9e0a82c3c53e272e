"""Intervention tables from a random-effects model, and the decision made from one, for tests.

A cell's reduction at a prompt that a step batch holds out is

    truth + prompt + batch + prompt x batch (+ selection, for random)

where every effect but the truth is normal, with a part that all cells share (paired differences
cancel it) and a part of the cell's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

MEASURES = {"forward_kl": 0.5, "reverse_kl": 1.0, "js": 0.25}
"""Divergence -> its reduction as a multiple of the truth."""
TRUTHS = {
    ("full", 1.0): 0.20,
    ("random", 0.05): 0.07,
    ("random_divergent", 0.05): 0.06,
    ("position_matched", 0.05): 0.07,
    ("token_identity", 0.05): 0.08,
    ("teachability", 0.05): 0.11,
    ("divergence", 0.05): 0.03,
    ("entropy", 0.05): 0.02,
    ("random", 0.3): 0.12,
    ("random_divergent", 0.3): 0.12,
    ("position_matched", 0.3): 0.12,
    ("token_identity", 0.3): 0.12,
    ("teachability", 0.3): 0.14,
    ("divergence", 0.3): 0.10,
    ("entropy", 0.3): 0.12,
}
"""(criterion, budget) -> reverse KL's reduction at the longest horizon, in nats."""
SEEDED = ("random", "random_divergent", "position_matched")


def made_interventions(
    truths: Mapping[tuple[str, float], float] = TRUTHS,
    *,
    folds: int = 4,
    prompts: int = 64,
    horizons: tuple[int, ...] = (0, 1, 5, 20),
    draws: int = 3,
    shared: float = 0.05,
    prompt: float = 0.03,
    batch: float = 0.01,
    both: float = 0.02,
    selection: float = 0.01,
    ambiguous: Mapping[str, float] | None = None,
    overfitted: tuple[str, ...] = (),
    correct: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """An `interventions.parquet` of known truth.

    Args:
        truths: Reduction of reverse KL at the longest horizon by criterion and budget, nats.
        folds: Step batches; prompt g is in fold g modulo their number.
        prompts: Prompts of all folds together.
        horizons: Optimizer steps; the truth grows in proportion to them (0 counts as 1).
        draws: Selections of random per step batch.
        shared: Standard deviation of prompt effects that all cells share.
        prompt: Of each cell's own prompt effects.
        batch: Of each cell's own step batch effects.
        both: Of each cell's own effects of prompt and batch together.
        selection: Of a selection of random in a step batch.
        ambiguous: Share of the selection that ties decide, by criterion.
        overfitted: Criteria that lose half at the longest horizon, while the step batches gain.
        correct: Whether a verifier labels rollouts; every third prompt has a wrong one alone.
        seed: Of all effects.
    """
    rng = np.random.default_rng(seed)
    positions = rng.integers(20, 60, prompts)
    common = rng.normal(0, shared, prompts)
    place = np.arange(prompts) % folds
    frames = []
    for (criterion, budget), truth in truths.items():
        own = rng.normal(0, prompt, prompts)
        for fold in range(folds):
            of_batch = rng.normal(0, batch) + rng.normal(0, both, prompts)
            for draw in range(draws if criterion in SEEDED else 1):
                chosen = rng.normal(0, selection) if criterion in SEEDED else 0.0
                for horizon in horizons:
                    held = place != fold
                    scale = max(horizon, 1) / max(*horizons, 1)
                    value = scale * (truth + common + own + of_batch + chosen)
                    value = np.where(held, value, value + 0.3 * scale)
                    if criterion in overfitted and horizon == max(horizons):
                        value = np.where(held, value / 8, value)
                    frames.append(
                        pd.DataFrame(
                            {
                                "criterion": criterion,
                                "budget": budget,
                                "draw": draw,
                                "fold": fold,
                                "horizon": horizon,
                                "prompt_id": [f"p{g:03d}" for g in range(prompts)],
                                "held_out": held,
                                "positions": positions,
                                **{m: k * value * positions for m, k in MEASURES.items()},
                                "ambiguous": (ambiguous or {}).get(criterion, 0.0),
                            }
                        )
                    )
    table = pd.concat(frames, ignore_index=True)
    if correct:
        table["correct"] = table["prompt_id"].str[1:].astype(int) % 3 != 0
    return table


def one_batch(effects: pd.DataFrame, fold: int = 0) -> pd.DataFrame:
    """The first step of one fold in the form of older tables: `split`, no fold and no horizon."""
    found = effects[(effects["fold"] == fold) & (effects["horizon"] == 0)]
    split = np.where(found["held_out"], "held_out", "step")
    return found.drop(columns=["fold", "horizon", "held_out", "ambiguous"]).assign(split=split)


PROMPTS, SEEDS = 40, 3


def outcome_rows(
    effects, *, measure="reverse_kl", seeds=SEEDS, prompts=PROMPTS, noise=0.02, rng=0, start=1.0
):
    """Rows of a grid of trainings: value = start - effect of the cell + prompt effect + noise."""
    generator = np.random.default_rng(rng)
    prompt_effect, count = generator.normal(0, 0.1, prompts), generator.integers(5, 15, prompts)
    rows = []
    for (criterion, budget), effect in {("untouched", 0.0): 0.0, **effects}.items():
        for seed in [-1] if criterion == "untouched" else range(seeds):
            values = (
                start
                - effect
                + prompt_effect
                + generator.normal(0, noise if criterion != "untouched" else 0, prompts)
            )
            rows += [
                (criterion, budget, seed, measure, f"p{g:02d}", value * n, n)
                for g, (value, n) in enumerate(zip(values, count))
            ]
    return pd.DataFrame(
        rows, columns=["criterion", "budget", "seed", "measure", "prompt_id", "total", "count"]
    )
