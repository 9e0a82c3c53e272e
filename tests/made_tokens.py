"""Token tables, interventions and verdicts of known content, for the tests of the analysis."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.folds import combine
from diagnostics.core.formulas import relative_gain
from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import normalize

INTERVENED_CRITERIA = ("divergence", "teachability", "entropy", "compatibility", "incompatible")
INTERVENED_BUDGETS = (0.05, 0.2, 0.5)
FOUR_RIVALS = {
    "full": (0.0, -0.005, 0.005),
    "entropy": (0.1, 0.05, 0.15),
    "divergence": (0.2, 0.1, 0.3),
    "tip": (0.02, 0.01, 0.03),
}
"""(difference, low, high) of each rival in a grid where teachability wins."""


def made_tokens(
    prompts: int = 12,
    length: int = 15,
    *,
    seed: int = 0,
    learnable: float = 1.0,
    incompatible: float = 0.5,
    marginal: float = 0.3,
    noise: float = 0.3,
    step_spread: float = 0.1,
    folds: int = 4,
    split: bool = True,
    permuted: bool = True,
    supports=(8,),
) -> pd.DataFrame:
    """gain = learnable * d*c + incompatible * d*(1 - c) + noise, in nats, and marginal * d of it
    after the step towards a permuted teacher; predictors vary between prompts too.

    With folds, every step's gain has a factor of its own with the spread `step_spread`. With
    `folds` of 0 there is one step, on every second prompt, and a column `split` if `split` is True.
    """
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(prompts), rng.integers(length // 2, length + 1, prompts))
    n, between = len(codes), rng.normal(size=(prompts, 4))[codes]
    sizes = np.bincount(codes)
    h, d = (np.exp(rng.normal(size=n) + 0.5 * between[:, i]) for i in (0, 1))
    d = np.where(rng.random(n) < 0.06, 1e-4 * d, d)
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
    gain = (
        learnable * dn * cn
        + incompatible * dn * (1 - cn)
        + noise * (rng.standard_t(5, size=n) + 0.3 * between[:, 3])
    )
    found = {
        "gain": gain,
        "reverse_gain": gain + 0.1 * rng.normal(size=n),
        "gain_permuted": marginal * dn + 0.1 * noise * rng.normal(size=n),
    }
    if not permuted:
        del found["gain_permuted"]
    if folds:
        tokens["fold"] = codes % folds
        factors = 1 + step_spread * rng.normal(size=(folds, 2))
        for name, values in found.items():
            for fold, (real, null) in enumerate(factors):
                factor = null if name == "gain_permuted" else real
                tokens[f"{name}_fold{fold}"] = values * factor
        return validate_tokens(combine(tokens))
    return validate_tokens(_one_step(tokens.assign(**found), codes, split))


def _one_step(tokens: pd.DataFrame, codes: np.ndarray, split: bool) -> pd.DataFrame:
    """A table of one step: the outcomes that follow from its gains, and its halves."""
    after = tokens["forward_kl"] - tokens["gain"]
    tokens["relative_gain"] = relative_gain(
        tokens["forward_kl"].to_numpy(), after.to_numpy(dtype=float)
    )
    if "gain_permuted" in tokens:
        tokens["context_gain"] = tokens["gain"] - tokens["gain_permuted"]
    if split:
        tokens["split"] = np.where(codes % 2, "held_out", "step")
    return tokens


def only_row(table, **where):
    """The only row of a table with these values."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def make_effects(tokens, value, *, draws=3, noise=0.0):
    """Interventions whose mean reduction in a cell is value(criterion, budget) on every position,
    plus noise by prompt.
    """
    rng, rows = np.random.default_rng(0), []
    by_prompt = tokens.groupby("prompt_id").agg(
        split=("split", "first"), positions=("position", "size")
    )
    for criterion in ("full", "placebo", "random", *INTERVENED_CRITERIA):
        for budget in (1.0,) if criterion in ("full", "placebo") else INTERVENED_BUDGETS:
            for draw in range(draws if criterion == "random" else 1):
                for prompt, row in by_prompt.iterrows():
                    mean = (
                        value(criterion, budget)
                        + noise * rng.normal()
                        + (draw - (draws - 1) / 2 if criterion == "random" else 0)
                    )
                    rows.append(
                        {
                            "criterion": criterion,
                            "budget": budget,
                            "draw": draw,
                            "prompt_id": prompt,
                            "split": row.split,
                            "positions": row.positions,
                            "forward_kl": mean * row.positions,
                            "reverse_kl": -mean * row.positions,
                            "js": 0.0,
                        }
                    )
    return pd.DataFrame(rows)


def training_verdicts(verdict, seeds=3, **rivals):
    """Verdicts of a grid for one measure: (difference, low, high) of each rival."""
    key = {
        "claim": "C5",
        "measure": "forward_kl",
        "budget": 0.05,
        "margin": 0.01,
        "seeds": seeds,
        "prompts": 40,
    }
    rows = [
        key
        | {"rival": "all", "verdict": verdict, "difference": np.nan, "low": np.nan, "high": np.nan}
    ]
    rows += [
        key | {"rival": name, "verdict": "", "difference": d, "low": low, "high": high}
        for name, (d, low, high) in rivals.items()
    ]
    return pd.DataFrame(rows)


def resampled(tokens: pd.DataFrame, prompts, draw: int) -> pd.DataFrame:
    """The rows of one draw of `PromptClusters`, where copies of a prompt have names of their own.

    The positions of the prompts must be those of the whole table.
    """
    parts = []
    for name, weight in zip(prompts.names, prompts.weights[draw], strict=True):
        rows = tokens[tokens.prompt_id == name]
        for copy in range(int(weight)):
            parts.append(
                rows.assign(
                    prompt_id=rows.prompt_id + f"/{copy}", context_id=rows.context_id + f"/{copy}"
                )
            )
    return pd.concat(parts, ignore_index=True)
