"""Small synthetic tables in the shape that the analysis writes, for the tests of figures and
report.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.core.files import sha256_file
from diagnostics.core.schema import validate_tokens
from diagnostics.core.types import Bank, Context

CRITERIA = (
    "entropy",
    "divergence",
    "reverse_divergence",
    "compatibility",
    "teachability",
    "incompatible",
    "tip",
    "random",
)
SPLITS = ("all", "step", "held_out")
BOTH = ("gain", "relative_gain")


def tokens(prompts: int = 8, length: int = 20, seed: int = 0) -> pd.DataFrame:
    """A token table whose gains grow with divergence and compatibility."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(prompts):
        size = int(rng.integers(length // 2, length + 1))
        for t in range(size):
            sure, wrong = rng.random(2) < 0.5
            h, d = np.exp(rng.normal((-3 if sure else 0.3, 0 if wrong else -4), 1))
            c = rng.beta(5, 1.2) if rng.random() < 0.75 else rng.beta(0.5, 3)
            gain = d * (0.1 + 0.1 * c + 0.03 * rng.normal())
            rows.append(
                {
                    "context_id": f"c{i}",
                    "prompt_id": f"p{i}",
                    "position": t,
                    "response_length": size,
                    "token_id": int(rng.integers(5, 100)),
                    "token": f" tok{rng.integers(100)}",
                    "student_entropy": h,
                    "teacher_entropy": 0.8 * h,
                    "forward_kl": d,
                    "reverse_kl": 1.1 * d,
                    "compatibility": c,
                    "split": "step" if i < prompts // 2 else "held_out",
                    "gain": gain,
                    "relative_gain": gain / d if d > 1e-3 else np.nan,
                }
            )
    return validate_tokens(pd.DataFrame(rows))


def bank_of(table: pd.DataFrame) -> Bank:
    """The bank that a synthetic token table could have come from; its prompts try to be markup."""
    contexts = []
    for name, rows in table.groupby("context_id", sort=False):
        contexts.append(
            Context(
                name,
                rows.prompt_id.iloc[0],
                f"What <b>is</b> {name}?",
                (1, 2),
                "".join(rows.token),
                tuple(rows.token_id),
                True,
            )
        )
    return Bank(tuple(contexts))


def correlations(names=CRITERIA, seed: int = 0) -> pd.DataFrame:
    """One row for each outcome, split, method and criterion, all estimates distinct."""
    rng, rows = np.random.default_rng(seed), []
    for outcome in (*BOTH, "reverse_gain"):
        for split in SPLITS:
            for criterion in names:
                for method in ("spearman", "pearson"):
                    estimate, width = rng.uniform(-0.3, 0.7), rng.uniform(0.04, 0.1)
                    rows.append(
                        {
                            "outcome": outcome,
                            "criterion": criterion,
                            "split": split,
                            "method": method,
                            "estimate": estimate,
                            "low": estimate - width,
                            "high": estimate + 0.9 * width,
                            "positions": 734 if outcome == "gain" else 701,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def q3_groups(scores=("compatibility", "teachability", "incompatible")) -> pd.DataFrame:
    """Groups 1 (lowest) to 3 of each score, rising except for `incompatible`."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for score in scores:
                for k, group in enumerate((1, 2, 3)):
                    mean = (
                        0.02
                        + 0.01 * k * (-0.4 if score == "incompatible" else 1)
                        + 0.001 * len(split)
                    )
                    rows.append(
                        {
                            "outcome": outcome,
                            "split": split,
                            "score": score,
                            "group": group,
                            "mean": mean,
                            "low": 0.8 * mean,
                            "high": 1.25 * mean,
                            "positions": 61,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def q3_contrast() -> pd.DataFrame:
    """Top minus bottom of `q3_groups`; the interval of relative gain holds zero."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for score in ("compatibility", "teachability", "incompatible"):
                for groups in ("tertile", "quartile"):
                    difference = (-0.008 if score == "incompatible" else 0.02) * (
                        1.2 if groups == "quartile" else 1
                    )
                    reach = 0.005 if outcome == "gain" else 0.05
                    rows.append(
                        {
                            "outcome": outcome,
                            "split": split,
                            "score": score,
                            "groups": groups,
                            "difference": difference,
                            "low": difference - reach,
                            "high": difference + reach,
                            "bottom_mean": 0.02,
                            "top_mean": 0.02 + difference,
                            "positions": 122,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def calibration() -> pd.DataFrame:
    """Four steps; the third is chosen, after the fourth the loss rose."""
    size = np.array([1e-6, 4e-6, 1.6e-5, 6.4e-5])
    ratio = np.array([0.98, 0.93, 0.82, -0.3])
    return pd.DataFrame(
        {
            "step_size": size,
            "relative_norm": 3 * size,
            "predicted_drop": 2e3 * size,
            "realised_drop": 2e3 * size * ratio,
            "ratio": ratio,
            "chosen": [False, False, True, False],
        }
    )


def quadrants() -> pd.DataFrame:
    """Four quadrants and all, means and medians."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for k, quadrant in enumerate(("all", "Q1", "Q2", "Q3", "Q4")):
                for statistic in ("mean", "median"):
                    estimate = (
                        0.01 * (k + 1) + 0.001 * len(split) + (0.05 if statistic == "median" else 0)
                    )
                    rows.append(
                        {
                            "outcome": outcome,
                            "split": split,
                            "quadrant": quadrant,
                            "statistic": statistic,
                            "estimate": estimate,
                            "low": 0.8 * estimate,
                            "high": 1.1 * estimate,
                            "share": 1.0 if k == 0 else 0.1 * k,
                            "positions": 100,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def matching() -> pd.DataFrame:
    """Matched differences in place of `q3_contrast`'s, of every pair and within a caliper."""
    table = q3_contrast()
    table = table[table.groups == "tertile"].drop(columns=["groups", "bottom_mean", "top_mean"])
    shifted = table.assign(
        difference=0.7 * table.difference,
        low=0.7 * table.difference - 0.01,
        high=0.7 * table.difference + 0.01,
    )
    return pd.concat(
        [
            shifted.assign(caliper=0.5, matched=0.31),
            shifted.assign(caliper=np.inf, matched=1.0, difference=9.0),
        ],
        ignore_index=True,
    )


def selection_curves(names=("divergence", "teachability")) -> pd.DataFrame:
    """Shares at four budgets for each criterion and random."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for k, criterion in enumerate(("random", *names)):
                for budget in (0.01, 0.05, 0.3, 1.0):
                    share = budget ** (1 / (1 + 0.3 * k)) * (1 if outcome == "gain" else 0.9)
                    rows.append(
                        {
                            "outcome": outcome,
                            "criterion": criterion,
                            "split": split,
                            "budget": budget,
                            "selected": int(500 * budget),
                            "tied": 0,
                            "captured_share": share,
                            "low": 0.9 * share,
                            "high": min(1.05 * share, 1),
                            "random": budget,
                            "random_low": 0.8 * budget,
                            "random_high": min(1.2 * budget, 1.0),
                            "oracle": budget**0.3,
                            "positions": 500,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def selection_summary() -> pd.DataFrame:
    """Area, and enrichment at two budgets."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for k, criterion in enumerate(("divergence", "teachability", "tip")):
                for statistic, budget, baseline in (
                    ("area", np.nan, 0.0),
                    ("enrichment", 0.01, 1.0),
                    ("enrichment", 0.05, 1.0),
                ):
                    estimate = baseline + 0.1 * (k + 1) + (0.05 if budget == 0.05 else 0)
                    rows.append(
                        {
                            "outcome": outcome,
                            "criterion": criterion,
                            "split": split,
                            "statistic": statistic,
                            "budget": budget,
                            "estimate": estimate,
                            "low": estimate - 0.08,
                            "high": estimate + 0.06,
                            "baseline": baseline,
                            "best": "tip",
                            "behind_best": 0.1 * (k - 2),
                            "behind_best_low": 0.1 * (k - 2) - 0.05,
                            "behind_best_high": 0.1 * (k - 2) + 0.05,
                            "positions": 500,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(rows)


def selection_overlap() -> pd.DataFrame:
    """Three pairs of three criteria, Jaccard at two budgets and Spearman."""
    rows = []
    for k, (one, other) in enumerate(
        (("divergence", "teachability"), ("divergence", "tip"), ("teachability", "tip"))
    ):
        for statistic, budget in (("spearman", np.nan), ("jaccard", 0.01), ("jaccard", 0.05)):
            estimate = 0.15 + 0.2 * k + (0.05 if budget == 0.05 else 0)
            rows.append(
                {
                    "criterion": one,
                    "other": other,
                    "statistic": statistic,
                    "budget": budget,
                    "estimate": estimate,
                    "low": estimate - 0.02,
                    "high": estimate + 0.02,
                    "chance": 0.026,
                    "positions": 500,
                    "prompts": 16,
                }
            )
    return pd.DataFrame(rows)


def selection_profile() -> pd.DataFrame:
    """Quadrant and token shares of two criteria."""
    rows = []
    measures = {
        "q1": 0.1,
        "q2": 0.2,
        "q3": 0.3,
        "q4": 0.4,
        "word": 0.6,
        "number": 0.3,
        "punctuation": 0.1,
    }
    for k, criterion in enumerate(("divergence", "teachability")):
        for budget in (0.01, 0.05):
            for measure, share in measures.items():
                rows.append(
                    {
                        "criterion": criterion,
                        "budget": budget,
                        "measure": measure,
                        "estimate": share * (1 - 0.1 * k),
                        "low": 0.0,
                        "high": 1.0,
                        "full": share,
                        "minus_full": -0.1 * k * share,
                        "minus_full_low": -0.1,
                        "minus_full_high": 0.1,
                        "positions": 25,
                        "prompts": 16,
                    }
                )
    return pd.DataFrame(rows)


def intervention() -> pd.DataFrame:
    """Full, placebo, random and two criteria at three budgets."""
    rows = []
    for group in ("selected", "unselected", "step", "held_out"):
        for measure in ("forward_kl", "reverse_kl", "js"):
            cells = [("full", 1.0, 0.02), ("placebo", 1.0, -0.001)]
            cells += [
                (name, budget, 0.02 * budget**0.5 * (1 + 0.2 * k))
                for k, name in enumerate(("random", "divergence", "teachability"))
                for budget in (0.05, 0.1, 0.3)
            ]
            for criterion, budget, reduction in cells:
                reduction += 0.001 * len(group)
                rows.append(
                    {
                        "criterion": criterion,
                        "budget": budget,
                        "group": group,
                        "measure": measure,
                        "reduction": reduction,
                        "low": reduction - 0.002,
                        "high": reduction + 0.003,
                        "positions": 250,
                        "prompts": 16,
                    }
                )
    return pd.DataFrame(rows)


def regressions() -> pd.DataFrame:
    """Two models, raw and winsorised."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for winsorised in (0.0, 0.05):
                for model, terms in (
                    ("interaction", ("student_entropy", "divergence")),
                    ("decomposition", ("student_entropy", "teachability", "incompatible")),
                ):
                    for k, term in enumerate(terms):
                        coefficient = 0.1 * (k + 1) + winsorised + 0.001 * len(split)
                        rows.append(
                            {
                                "outcome": outcome,
                                "split": split,
                                "winsorised": winsorised,
                                "model": model,
                                "term": term,
                                "coefficient": coefficient,
                                "low": coefficient - 0.05,
                                "high": coefficient + 0.06,
                                "r_squared": 0.1,
                                "positions": 500,
                                "prompts": 16,
                            }
                        )
    return pd.DataFrame(rows)


def _claims(rows: list[dict]) -> pd.DataFrame:
    """Both claims' statistics for every key."""
    found = []
    for i, key in enumerate(rows):
        for outcome in BOTH:
            for split in SPLITS:
                for statistic in ("tertile_difference", "decomposition"):
                    estimate = 0.01 * (i + 1) + (0.1 if statistic == "decomposition" else 0)
                    found.append(
                        key
                        | {
                            "outcome": outcome,
                            "split": split,
                            "statistic": statistic,
                            "estimate": estimate,
                            "low": estimate - 0.02,
                            "high": estimate + 0.03,
                            "p_value": 0.01,
                            "positions": 500,
                            "prompts": 16,
                        }
                    )
    return pd.DataFrame(found)


def support_robustness() -> pd.DataFrame:
    """Two proxies at two K."""
    return _claims(
        [{"proxy": proxy, "k": k} for proxy in ("compatibility", "topk_overlap") for k in (4, 16)]
    )


def gain_robustness() -> pd.DataFrame:
    """Three variants of the gain."""
    return _claims(
        [{"variant": variant} for variant in ("nothing", "winsorised_0.05", "no_special_tokens")]
    )


def residual_curves() -> pd.DataFrame:
    """Deciles and spline of two scores."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for score in ("compatibility", "teachability"):
                for curve, count in (("decile", 10), ("spline", 25)):
                    for at in np.linspace(0.02, 0.98, count):
                        residual = 0.01 * np.sin(3 * at) * (2 if score == "teachability" else 1)
                        rows.append(
                            {
                                "outcome": outcome,
                                "split": split,
                                "score": score,
                                "curve": curve,
                                "at": at,
                                "residual": residual,
                                "low": residual - 0.003,
                                "high": residual + 0.004,
                                "positions": 500,
                                "prompts": 16,
                            }
                        )
    return pd.DataFrame(rows)


def linearity() -> pd.DataFrame:
    """Four step sizes."""
    rows = []
    for fraction in (0.25, 0.5, 1.0, 2.0):
        for split in SPLITS:
            slope, r2 = 1 - 0.2 * fraction, 0.98 - 0.1 * fraction
            rows.append(
                {
                    "fraction": fraction,
                    "step_size": 1e-5 * fraction,
                    "relative_norm": 1e-4 * fraction,
                    "split": split,
                    "slope": slope,
                    "slope_low": slope - 0.05,
                    "slope_high": slope + 0.04,
                    "r2": r2,
                    "r2_low": r2 - 0.05,
                    "r2_high": r2 + 0.01,
                    "positions": 500,
                    "prompts": 16,
                }
            )
    return pd.DataFrame(rows)


GROUPS = ("all", "Q1", "Q3", "compatibility_1", "compatibility_3")


def kernel_shares() -> pd.DataFrame:
    """Sources of five groups for both kernels."""
    rows = []
    for kernel in ("output_layer", "full"):
        for i, group in enumerate(GROUPS):
            for part, share in {
                "self": 0.2,
                "own_context": 0.3,
                "own_prompt": 0.05,
                "other_prompts": 0.45,
                "total": 1.0,
            }.items():
                share += (0.01 * i if part == "self" else 0) + (0.02 if kernel == "full" else 0)
                rows.append(
                    {
                        "kernel": kernel,
                        "group": group,
                        "part": part,
                        "mean": share / 100,
                        "low": 0.0,
                        "high": 0.1,
                        "share": share,
                        "share_low": share - 0.05,
                        "share_high": share + 0.06,
                        "positions": 64,
                        "prompts": 16,
                    }
                )
    return pd.DataFrame(rows)


def lift() -> pd.DataFrame:
    """Enrichment of five groups."""
    return pd.DataFrame(
        [
            {
                "group": group,
                "lift_share": 0.2,
                "low": 0.1,
                "high": 0.3,
                "position_share": 0.2,
                "enrichment": 0.8 + 0.1 * i,
                "enrichment_low": 0.7 + 0.1 * i,
                "enrichment_high": 1.0 + 0.1 * i,
                "positions": 100,
                "prompts": 16,
            }
            for i, group in enumerate(GROUPS)
        ]
    )


def agreement() -> pd.DataFrame:
    """Three answers against the held-out drop, over all cells and within a budget."""
    pairs = [
        ("captured_gain", "held_out_forward_kl"),
        ("captured_relative_gain", "held_out_forward_kl"),
        ("held_out_forward_kl", "step_forward_kl"),
        ("captured_gain", "captured_relative_gain"),
    ]
    return pd.DataFrame(
        [
            {
                "scope": scope,
                "x": x,
                "y": y,
                "kendall": 0.6 - 0.2 * i - shift,
                "low": 0.4 - 0.2 * i,
                "high": 0.7 - 0.2 * i,
                "cells": 35,
                "prompts": 16,
            }
            for scope, shift in (("all", 0.0), ("within_budget", 0.05))
            for i, (x, y) in enumerate(pairs)
        ]
    )


def verdicts() -> pd.DataFrame:
    """C1 turned over, C2 supported by both gains; on all positions and held out."""
    rows = []
    for split, primary in (("all", True), ("held_out", False)):
        for claim, statement, found in (
            ("C1", "teachability ranks better", ("refuted", "supported")),
            ("C2", "compatible <gains> more", ("supported", "supported")),
        ):
            for outcome, verdict in zip(BOTH, found, strict=True):
                rows.append(
                    {
                        "claim": claim,
                        "statement": statement,
                        "outcome": outcome,
                        "split": split,
                        "primary": primary,
                        "verdict": verdict,
                        "estimate": 0.1,
                        "low": 0.05,
                        "high": 0.15,
                        "sentence": f"{claim} is {verdict} for the {outcome}.",
                        "positions": 500,
                        "prompts": 16,
                    }
                )
    return pd.DataFrame(rows)


def validation_outcomes() -> pd.DataFrame:
    """Untouched, full, random and teachability at two budgets, by divergence, accuracy and the
    first step's gain.
    """
    rows = [
        {
            "criterion": "untouched",
            "budget": 0.0,
            "measure": measure,
            "mean": 0.5,
            "low": 0.45,
            "high": 0.55,
            "seeds": 0,
            "prompts": 24,
        }
        for measure in ("forward_kl", "accuracy")
    ]
    for measure, scale in (("forward_kl", 0.3), ("accuracy", 0.1), ("one_step_gain", 0.004)):
        for k, (criterion, budget) in enumerate(
            (
                ("full", 1.0),
                ("random", 0.05),
                ("random", 0.3),
                ("teachability", 0.05),
                ("teachability", 0.3),
            )
        ):
            gain = scale * budget**0.3 * (1 + 0.02 * k)
            rows.append(
                {
                    "criterion": criterion,
                    "budget": budget,
                    "measure": measure,
                    "mean": 2 * gain,
                    "low": 1.9 * gain,
                    "high": 2.1 * gain,
                    "gain": gain,
                    "gain_low": 0.8 * gain,
                    "gain_high": 1.3 * gain,
                    "seeds": 3,
                    "prompts": 24,
                }
            )
    return pd.DataFrame(rows)


def validation_foreseen() -> pd.DataFrame:
    """Three answers on the cells of `validation_outcomes`, one of them not on all."""
    cells = [("random", 0.05), ("random", 0.3), ("teachability", 0.05), ("teachability", 0.3)]
    rows = [
        (*cell, answer, scale * (1 + k))
        for answer, scale in (
            ("captured_gain", 0.1),
            ("one_step_gain", 0.002),
            ("captured_relative_gain", 0.07),
        )
        for k, cell in enumerate(cells)
        if (answer, cell) != ("captured_relative_gain", cells[0])
    ]
    return pd.DataFrame(rows, columns=["criterion", "budget", "answer", "value"])


def validation_verdicts() -> pd.DataFrame:
    """C5 against two rivals by one measure."""
    row = {
        "claim": "C5",
        "measure": "forward_kl",
        "budget": 0.05,
        "margin": 0.03,
        "seeds": 3,
        "prompts": 24,
    }
    return pd.DataFrame(
        [
            row | {"rival": "all", "verdict": "refuted"},
            row
            | {
                "rival": "full",
                "difference": -0.15,
                "low": -0.2,
                "high": -0.1,
                "beats": False,
                "verdict": "refuted",
            },
            row
            | {
                "rival": "entropy",
                "difference": 0.02,
                "low": 0.01,
                "high": 0.03,
                "beats": True,
                "verdict": "supported",
            },
        ]
    )


def validation_agreement() -> pd.DataFrame:
    """Two answers against the trained gain."""
    return pd.DataFrame(
        [
            {
                "scope": scope,
                "x": x,
                "y": "trained_forward_kl",
                "kendall": tau,
                "low": tau - 0.2,
                "high": tau + 0.1,
                "cells": 18,
                "prompts": 24,
            }
            for scope in ("all", "within_budget")
            for x, tau in (("one_step_gain", 0.6), ("captured_gain", 0.3))
        ]
    )


def evaluations() -> pd.DataFrame:
    """Two measures before, during and after training."""
    return pd.DataFrame(
        [
            {
                "step": step,
                "measure": measure,
                "mean": 0.5 - sign * step / 200,
                "low": 0.45 - sign * step / 200,
                "high": 0.55 - sign * step / 200,
                "count": 900,
                "prompts": 24,
            }
            for step in (0, 20, 40)
            for measure, sign in (("forward_kl", 1), ("accuracy", -1))
        ]
    )


def training_metrics() -> pd.DataFrame:
    """Ten steps of two cells with two seeds."""
    return pd.DataFrame(
        [
            {
                "criterion": criterion,
                "budget": budget,
                "seed": seed,
                "step": step,
                "loss": 1 / step + 0.01 * seed + budget,
                "forward_kl/all": 0.8 / step,
                "selected_share": budget,
            }
            for criterion, budget in (("full", 1.0), ("teachability", 0.05))
            for seed in (0, 1)
            for step in range(1, 11)
        ]
    )


def training_positions(steps: int = 6) -> pd.DataFrame:
    """What each step saw in every tenth of the responses but one."""
    return pd.DataFrame(
        [
            {
                "step": step,
                "tenth": tenth,
                "positions": 10 + tenth,
                "selected_share": 0.1 * (tenth == 2),
                "reverse_kl": (1 + tenth) / step,
                "student_entropy": np.nan if tenth == 0 else 0.5,
            }
            for step in range(1, steps + 1)
            for tenth in range(10)
            if (step, tenth) != (2, 3)
        ]
    )


def positions() -> pd.DataFrame:
    """Mean gain in five bins of the response."""
    return pd.DataFrame(
        [
            {
                "outcome": outcome,
                "split": split,
                "position": (k + 0.5) / 5,
                "mean": 0.01 * (k + 1),
                "low": 0.009 * (k + 1),
                "high": 0.012 * (k + 1),
                "positions": 100,
                "prompts": 16,
            }
            for outcome in BOTH
            for split in SPLITS
            for k in range(5)
        ]
    )


def of_runs() -> pd.DataFrame:
    """Spearman correlations on held-out positions of two runs."""
    tables = [
        correlations(seed=seed)
        .query("method == 'spearman' and split == 'held_out'")
        .assign(run=run)
        for run, seed in (("one", 0), ("two", 1))
    ]
    return pd.concat(tables, ignore_index=True)


def manifest() -> dict:
    """A manifest with everything that the report reads, and a prompt that tries to be markup."""
    model = {
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "parameters": 123456,
        "dtype": "float32",
    }
    facts = {
        "pair": "custom",
        "student": {"name": "small", **model},
        "teacher": {"name": "large", **model},
        "chat_template_sha256": "cc" * 32,
        "first_prompt": 'Tom <script>alert(1)</script> has "onload=" apples',
    }
    step = {
        "loss": "reverse_kl",
        "optimizer": "adamw",
        "step_size": 1.6e-5,
        "loss_before": 0.81,
        "predicted_drop": 0.032,
        "realised_drop": 0.02624,
    }
    return {
        "format": 1,
        "versions": {"python": "3.11.2", "opd-diagnostics": "0.1.0", "torch": "2.13.0"},
        "stages": {
            "rollout": {
                "settings": {"seed": 7, "max_new_tokens": 64},
                "inputs": {},
                "files": {"contexts.parquet": "ab" * 32},
                "facts": facts,
            },
            "probe": {
                "settings": {"loss": "reverse_kl", "optimizer": "adamw", "seed": 0},
                "inputs": {},
                "files": {"gains.parquet": "ef" * 32},
                "facts": step,
            },
            "analyze": {
                "settings": {"draws": 1000, "level": 0.95, "seed": 0},
                "inputs": {},
                "files": {},
            },
        },
    }


def write_run(directory: Path, **tables: pd.DataFrame) -> Path:
    """A run directory with the main job's tables, and any others given by name."""
    tables = {
        "correlations": correlations(),
        "q3_groups": q3_groups(),
        "q3_contrast": q3_contrast(),
        "calibration": calibration(),
        **tables,
    }
    (directory / "tables").mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(directory / "tables" / f"{name}.csv", index=False)
    table = tokens()
    table.to_parquet(directory / "tokens.parquet", index=False)
    bank_of(table).to_frame().to_parquet(directory / "contexts.parquet", index=False)
    return record(directory)


def record(directory: Path) -> Path:
    """Write the manifest with the hashes of the files as they are."""
    recorded = manifest()
    recorded["stages"]["rollout"]["files"] = {
        "contexts.parquet": sha256_file(directory / "contexts.parquet")
    }
    recorded["stages"]["analyze"]["files"] = {
        f"tables/{path.name}": sha256_file(path)
        for path in sorted((directory / "tables").glob("*.csv"))
    }
    recorded["joined"] = {"tokens.parquet": sha256_file(directory / "tokens.parquet")}
    (directory / "manifest.json").write_text(json.dumps(recorded), encoding="utf-8")
    return directory


def grid_outcomes() -> pd.DataFrame:
    """What every prompt showed after each training of a small grid, over three seeds."""
    cells = [
        ("full", 1.0),
        *((name, 0.05) for name in ("teachability", "entropy", "tip", "random")),
    ]
    rng = np.random.default_rng(0)
    rows = [
        (name, budget, seed, "reverse_kl", f"p{prompt:02d}", 8 * rng.normal(0.7, 0.1), 8)
        for name, budget in [("untouched", 0.0), *cells]
        for seed in ([-1] if name == "untouched" else range(3))
        for prompt in range(40)
    ]
    return pd.DataFrame(
        rows, columns=["criterion", "budget", "seed", "measure", "prompt_id", "total", "count"]
    )
