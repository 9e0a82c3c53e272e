"""How long the analysis takes at paper size, and how much faster it is than resampling DataFrames.

    python benchmarks/analysis_speed.py [--quick] [--naive-draws 3]

Paper size is 300 prompts of 192 positions. The oracle concatenates, for every draw, the rows of the
prompts that were drawn and correlates again with scipy; its time per draw is measured over a few
draws and scaled to 1,000. Prints a table, or with --json a list of {name, value, unit, goal}."""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diagnostics.analysis import correlations, splits, study
from diagnostics.core.folds import combine
from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import normalize

DRAWS = 1000
METHODS = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}


def paper_size(prompts: int, length: int, seed: int = 0, folds: int = 4) -> pd.DataFrame:
    """A fold table with every column that a criterion or a support needs, values made up."""
    rng = np.random.default_rng(seed)
    codes, n = np.repeat(np.arange(prompts), length), prompts * length
    between = rng.normal(size=(prompts, 4))[codes]
    tokens = pd.DataFrame(
        {
            "context_id": [f"c{g}" for g in codes],
            "prompt_id": [f"p{g}" for g in codes],
            "position": np.tile(np.arange(length), prompts),
            "response_length": length,
            "token_id": rng.integers(0, 1000, n),
            "token": "t",
            "fold": codes % folds,
            "is_special": rng.random(n) < 0.01,
            "student_top1_in_teacher_top5": rng.random(n) < 0.8,
        }
    )
    for i, name in enumerate(("student_entropy", "forward_kl", "teacher_entropy", "reverse_kl")):
        tokens[name] = np.exp(rng.normal(size=n) + 0.5 * between[:, i % 4])
    for name in ("js", "hellinger", "acceptance", "student_margin", "union_log_ratio_variance"):
        tokens[name] = rng.random(n)
    tokens["advantage"] = rng.normal(size=n)
    compatibility = rng.beta(2, 1, n)
    for suffix in ("", "_k4", "_k8", "_k32"):
        near = np.clip(compatibility + 0.05 * rng.normal(size=n), 0, 1)
        for name in (
            "compatibility",
            "compatibility_intersection",
            "shared_student_mass",
            "bhattacharyya",
        ):
            tokens[name + suffix] = near * rng.uniform(0.9, 1, n)
        tokens[f"topk_overlap{suffix}"] = np.round(near * 16) / 16
        tokens[f"topk_jaccard{suffix}"] = tokens[f"topk_overlap{suffix}"] / (
            2 - tokens[f"topk_overlap{suffix}"]
        )
    d = normalize(tokens["forward_kl"])
    gain = d * (0.5 + 0.5 * normalize(tokens["compatibility"])) + rng.standard_t(5, n)
    found = {
        "gain": gain,
        "reverse_gain": gain + rng.normal(size=n),
        "gain_permuted": 0.5 * d + rng.normal(size=n),
    }
    for name, values in found.items():
        for fold in range(folds):
            tokens[f"{name}_fold{fold}"] = values * rng.normal(1, 0.1) + 0.1 * rng.normal(size=n)
    return validate_tokens(combine(tokens))


def naive_seconds(tokens: pd.DataFrame, names: list[str], draws: int) -> float:
    """Seconds per draw of a bootstrap that concatenates DataFrames, for the same cells as
    `correlate`.
    """
    frame = tokens.assign(
        **{f"score_{name}": score for name, score in splits.scores(tokens, names).items()}
    )
    rng, started = np.random.default_rng(0), time.perf_counter()
    groups = dict(list(frame.groupby("prompt_id")))
    keys = list(groups)
    for _ in range(draws):
        drawn = pd.concat([groups[keys[i]] for i in rng.integers(0, len(keys), len(keys))])
        for prefix in ("", "own_"):
            for outcome in splits.outcomes_and_null(tokens):
                kept = drawn[drawn[prefix + outcome].notna()]
                for name in names:
                    pair = kept[[f"score_{name}", prefix + outcome]].dropna()
                    for method, function in METHODS.items():
                        if method == "spearman" or outcome in correlations.LINEAR_OUTCOMES:
                            function(pair[f"score_{name}"], pair[prefix + outcome])
    return (time.perf_counter() - started) / draws


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts, for a look")
    parser.add_argument("--naive-draws", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tokens = paper_size(30 if options.quick else 300, 192)
    timed = {}

    def measure(name: str, work) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        timed[name] = time.perf_counter() - wall, time.process_time() - cpu

    names = list(splits.scores(tokens))
    measure("warm up", lambda: study.study(tokens.head(2000), draws=10))
    measure("correlate", lambda: correlations.correlate(tokens, draws=DRAWS))
    measure("study", lambda: study.study(tokens, draws=DRAWS))
    some = ["teachability", "divergence", "random"]
    naive = naive_seconds(tokens, some, options.naive_draws) * DRAWS / len(some) * len(names)
    rows = [
        {
            "name": f"correlate, {len(names)} criteria, {len(tokens):,} positions, {DRAWS:,} draws",
            "value": timed["correlate"][0],
            "unit": "s",
            "goal": 60,
        },
        {
            "name": "the same, processor time of one thread",
            "value": timed["correlate"][1],
            "unit": "s",
            "goal": None,
        },
        {
            "name": "naive bootstrap over correlate",
            "value": naive / timed["correlate"][0],
            "unit": "x",
            "goal": 100,
        },
        {"name": "study", "value": timed["study"][0], "unit": "s", "goal": 240},
        {
            "name": "the same, processor time of one thread",
            "value": timed["study"][1],
            "unit": "s",
            "goal": None,
        },
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:<70} {row['value']:>10.1f} {row['unit']:<2} goal {row['goal'] or '-'}")


if __name__ == "__main__":
    main()
