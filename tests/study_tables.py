"""Small synthetic tables in the shape that the analysis writes, for the tests of figures and report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.types import validate_tokens

CRITERIA = ("entropy", "divergence", "reverse_divergence", "compatibility", "teachability", "incompatible", "tip", "random")
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
            rows.append({
                "context_id": f"c{i}", "prompt_id": f"p{i}", "position": t, "response_length": size,
                "token_id": int(rng.integers(5, 100)), "token": f" tok{rng.integers(100)}", "student_entropy": h,
                "teacher_entropy": 0.8 * h, "forward_kl": d, "reverse_kl": 1.1 * d, "compatibility": c,
                "split": "step" if i < prompts // 2 else "held_out", "gain": gain,
                "relative_gain": gain / d if d > 1e-3 else np.nan, "placebo_gain": 0.01 * d * rng.normal(),
            })
    return validate_tokens(pd.DataFrame(rows))


def correlations(names=CRITERIA, seed: int = 0) -> pd.DataFrame:
    """One row for each outcome, split, method and criterion, all estimates distinct."""
    rng, rows = np.random.default_rng(seed), []
    for outcome in (*BOTH, "reverse_gain"):
        for split in SPLITS:
            for criterion in names:
                for method in ("spearman", "pearson"):
                    estimate, width = rng.uniform(-0.3, 0.7), rng.uniform(0.04, 0.1)
                    rows.append({
                        "outcome": outcome, "criterion": criterion, "split": split, "method": method, "estimate": estimate,
                        "low": estimate - width, "high": estimate + 0.9 * width, "placebo": rng.uniform(-0.1, 0.3),
                        "positions": 734 if outcome == "gain" else 701, "prompts": 16,
                    })
    return pd.DataFrame(rows)


def q3_groups(scores=("compatibility", "teachability", "incompatible")) -> pd.DataFrame:
    """Groups 1 (lowest) to 3 of each score, rising except for `incompatible`."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for score in scores:
                for k, group in enumerate((1, 2, 3)):
                    mean = 0.02 + 0.01 * k * (-0.4 if score == "incompatible" else 1) + 0.001 * len(split)
                    rows.append({
                        "outcome": outcome, "split": split, "score": score, "group": group, "mean": mean, "low": 0.8 * mean,
                        "high": 1.25 * mean, "positions": 61, "prompts": 16,
                    })
    return pd.DataFrame(rows)


def q3_contrast() -> pd.DataFrame:
    """Top minus bottom of `q3_groups`; the interval of relative gain holds zero."""
    rows = []
    for outcome in BOTH:
        for split in SPLITS:
            for score in ("compatibility", "teachability", "incompatible"):
                for groups in ("tertile", "quartile"):
                    difference = (-0.008 if score == "incompatible" else 0.02) * (1.2 if groups == "quartile" else 1)
                    reach = 0.005 if outcome == "gain" else 0.05
                    rows.append({
                        "outcome": outcome, "split": split, "score": score, "groups": groups, "difference": difference,
                        "low": difference - reach, "high": difference + reach, "bottom_mean": 0.02, "top_mean": 0.02 + difference,
                        "placebo_difference": 0.001, "positions": 122, "prompts": 16,
                    })
    return pd.DataFrame(rows)


def calibration() -> pd.DataFrame:
    """Four steps; the third is chosen, after the fourth the loss rose."""
    size = np.array([1e-6, 4e-6, 1.6e-5, 6.4e-5])
    ratio = np.array([0.98, 0.93, 0.82, -0.3])
    return pd.DataFrame({
        "step_size": size, "relative_norm": 3 * size, "predicted_drop": 2e3 * size, "realised_drop": 2e3 * size * ratio,
        "ratio": ratio, "chosen": [False, False, True, False],
    })


def manifest() -> dict:
    """A manifest with everything that the report reads, and a prompt that tries to be markup."""
    model = {"revision": None, "architecture": "LlamaForCausalLM", "parameters": 123456, "dtype": "float32"}
    facts = {
        "pair": "custom", "student": {"name": "small", **model}, "teacher": {"name": "large", **model},
        "chat_template_sha256": "cc" * 32, "first_prompt": "Tom <script>alert(1)</script> has \"onload=\" apples",
    }
    step = {"loss": "reverse_kl", "optimizer": "adamw", "step_size": 1.6e-5, "loss_before": 0.81, "predicted_drop": 0.032, "realised_drop": 0.02624}
    return {"format": 1, "versions": {"python": "3.11.2", "opd-diagnostics": "0.1.0", "torch": "2.13.0"}, "stages": {
        "rollout": {"settings": {"seed": 7, "max_new_tokens": 64}, "inputs": {}, "files": {"contexts.parquet": "ab" * 32}, "facts": facts},
        "probe": {"settings": {"loss": "reverse_kl", "optimizer": "adamw", "seed": 0}, "inputs": {}, "files": {"gains.parquet": "ef" * 32}, "facts": step},
        "analyze": {"settings": {"draws": 1000, "level": 0.95, "seed": 0}, "inputs": {}, "files": {}},
    }}


def write_run(directory: Path, **tables: pd.DataFrame) -> Path:
    """A run directory with the main job's tables, and any others given by name."""
    tables = {"correlations": correlations(), "q3_groups": q3_groups(), "q3_contrast": q3_contrast(), "calibration": calibration(), **tables}
    (directory / "tables").mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(directory / "tables" / f"{name}.csv", index=False)
    tokens().to_parquet(directory / "tokens.parquet", index=False)
    (directory / "manifest.json").write_text(json.dumps(manifest()), encoding="utf-8")
    return directory
