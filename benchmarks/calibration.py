"""Calibration of the analysis's intervals and tests on simulated, clustered positions.

    python benchmarks/calibration.py [--datasets 1000] [--draws 1000] \\
        [--output benchmarks/CALIBRATION.md]

Prompts have 5 to 35 positions. Entropy, divergence, compatibility and the outcome each vary between
prompts (intraclass correlation 0.3), the outcome's errors are t with 5 degrees of freedom. Under
*null* the outcome is independent of the predictors, so that 1 - coverage of 0 is the rate at which
a nominal 5 % test rejects. Under *effect* it depends on d*c, on d*(1 - c) and on h, and the
truth is the mean over large samples.

Statistics that are computed anew from resampled rows (tertiles, matched pairs, selections) and step
batches are in `coverage.py`, on a real population; verdicts are there and in `claims.py`. Here are
the others, down to 20 prompts: the intervals that the project reports beside the percentile
interval and BCa from the same draws, the usual cluster-robust CR1 interval, and the interval for
independent positions.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diagnostics.analysis import (
    bootstrap,
    linear_model,
    rank_correlation,
)
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.rank_correlation import Controls
from diagnostics.criteria import normalize

LEVEL = 0.95
PROMPTS = (20, 50, 300)
CLUSTER = np.sqrt(0.3)
EFFECT = {"teachability": 0.8, "incompatible": 0.4, "entropy": 0.3}
METHODS = ("reported", "percentile", "BCa", "CR1", "independent")
POPULATIONS, POPULATION_PROMPTS = 20, 2000


def draw(rng: np.random.Generator, prompts: int, *, effect: bool) -> dict[str, np.ndarray]:
    """One data set: prompt codes and normalized h, d, c with the outcome y, all [N]."""
    codes = np.repeat(np.arange(prompts), rng.integers(5, 36, prompts))

    def clustered(errors: np.ndarray) -> np.ndarray:
        return CLUSTER * rng.normal(size=prompts)[codes] + np.sqrt(1 - CLUSTER**2) * errors

    n = len(codes)
    h, d, c = (normalize(clustered(rng.normal(size=n))) for _ in range(3))
    y = clustered(rng.standard_t(5, size=n))
    if effect:
        y = (
            y
            + EFFECT["teachability"] * d * c
            + EFFECT["incompatible"] * d * (1 - c)
            + EFFECT["entropy"] * h
        )
    return {"codes": codes, "h": h, "d": d, "c": c, "y": y}


def estimates(data: dict[str, np.ndarray], prompts: PromptClusters) -> dict[str, Estimate]:
    """Every kind of statistic that the study reports."""
    h, d, c, y = (data[name] for name in "hdcy")
    learnable = rank_correlation.Variable(d * c)
    regression = linear_model.regress(y, {"h": h, "dc": d * c, "d(1-c)": d * (1 - c)}, prompts)
    places = bootstrap.locations(y, prompts, np.ones(len(y), dtype=bool))
    spearman = rank_correlation.spearman(learnable, y, prompts)
    return {
        "spearman": spearman,
        "pearson": rank_correlation.pearson(learnable, y, prompts),
        "kendall": rank_correlation.kendall(learnable, y, prompts),
        "spearman difference": spearman - rank_correlation.spearman(d, y, prompts),
        "partial spearman": rank_correlation.partial(learnable, y, Controls([h, d]), prompts),
        "within prompts": rank_correlation.within_prompts(learnable, y, prompts),
        "mean": bootstrap.mean(y, prompts),
        "median": places["median"],
        "trimmed mean": places["trimmed_mean"],
        "winsorised mean": places["winsorised_mean"],
        "coefficient": regression.coefficients["dc"],
        "coefficient difference": regression.coefficients["dc"] - regression.coefficients["d(1-c)"],
        "r squared": regression.r_squared,
    } | {"CR1": regression.robust_error["dc"]}


def independent(data: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Intervals that treat positions as independent."""
    h, d, c, y = (data[name] for name in "hdcy")
    n, z = len(y), stats.norm.ppf((1 + LEVEL) / 2)
    r = np.arctanh(np.corrcoef(d * c, y)[0, 1])
    X = np.column_stack(
        [np.ones(n), *(rank_correlation.standardize(v) for v in (h, d * c, d * (1 - c)))]
    )
    target = rank_correlation.standardize(y)
    beta, rest = np.linalg.lstsq(X, target, rcond=None)[:2]
    beta_error = np.sqrt(np.linalg.inv(X.T @ X)[2, 2] * rest[0] / (n - 4))
    mean_error = y.std(ddof=1) / np.sqrt(n)
    return {
        "pearson": tuple(np.tanh([r - z / np.sqrt(n - 3), r + z / np.sqrt(n - 3)])),
        "mean": (y.mean() - z * mean_error, y.mean() + z * mean_error),
        "coefficient": (beta[2] - z * beta_error, beta[2] + z * beta_error),
    }


def percentile(estimate: Estimate) -> tuple[float, float]:
    """The plain percentile interval."""
    return tuple(np.nanquantile(estimate.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def bca(estimate: Estimate) -> tuple[float, float]:
    """Bias-corrected and accelerated, acceleration from the prompts left out."""
    draws = estimate.draws[np.isfinite(estimate.draws)]
    bias = stats.norm.ppf(np.clip((draws < estimate.value).mean(), 1e-3, 1 - 1e-3))
    skew = estimate.left_out.mean() - estimate.left_out
    acceleration = (skew**3).sum() / (6 * ((skew**2).sum()) ** 1.5)
    z = bias + stats.norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return tuple(np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z))))


def intervals(
    data: dict[str, np.ndarray], prompts: PromptClusters
) -> dict[tuple[str, str], tuple[float, float]]:
    """(statistic, method) -> interval for one data set."""
    made = estimates(data, prompts)
    error = made.pop("CR1")
    found = {
        ("coefficient", "CR1"): tuple(
            made["coefficient"].value
            + np.array([-1, 1]) * error * stats.t.ppf((1 + LEVEL) / 2, prompts.count - 1)
        )
    }
    for name, estimate in made.items():
        found[name, "reported"], found[name, "percentile"] = (
            estimate.interval(LEVEL),
            percentile(estimate),
        )
        if estimate.left_out is not None:
            found[name, "BCa"] = bca(estimate)
    return found | {(name, "independent"): ends for name, ends in independent(data).items()}


def truth(*, effect: bool, seed: int) -> dict[str, float]:
    """Values in the population, from samples together far larger than any data set; under null all
    but R^2 are 0.
    """
    found = defaultdict(list)
    rng = np.random.default_rng(seed)
    for _ in range(POPULATIONS):
        data = draw(rng, POPULATION_PROMPTS, effect=effect)
        made = estimates(data, PromptClusters(data["codes"], draws=0))
        for name, estimate in made.items():
            if name != "CR1":
                found[name].append(estimate.value)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means if effect else {name: 0.0 for name in means if name != "r squared"}


def coverage(*, effect: bool, prompts: int, datasets: int, draws: int, seed: int) -> pd.DataFrame:
    """Share of data sets whose interval holds the truth, by statistic and method."""
    values, hits = truth(effect=effect, seed=seed), defaultdict(list)
    for number in range(datasets):
        data = draw(np.random.default_rng([seed, prompts, number]), prompts, effect=effect)
        for key, (low, high) in intervals(
            data, PromptClusters(data["codes"], draws=draws, seed=number)
        ).items():
            if key[0] in values:
                hits[key].append(low <= values[key[0]] <= high)
    rows = [
        {
            "situation": "effect" if effect else "null",
            "prompts": prompts,
            "statistic": name,
            "method": method,
            "coverage": 100 * float(np.mean(held)),
            "datasets": len(held),
        }
        for (name, method), held in hits.items()
    ]
    return pd.DataFrame(rows)


# --- approximations
# ---------------------------------------------------------------------------------


def approximations(*, prompts: int, draws: int, seed: int, repeats: int = 5) -> pd.DataFrame:
    """Bootstrap standard error as computed over that of recomputing everything in every draw, by
    statistic.
    """
    ratios = defaultdict(list)
    for repeat in range(repeats):
        data = draw(np.random.default_rng([seed, repeat]), prompts, effect=True)
        group = PromptClusters(data["codes"], draws=draws, seed=repeat)
        rows = [np.flatnonzero(group.codes == g) for g in range(prompts)]
        again = defaultdict(list)
        for weights in group.weights.astype(int):
            at = np.concatenate([np.tile(rows[g], weights[g]) for g in range(prompts)])
            for name, value in _anew({key: values[at] for key, values in data.items()}).items():
                again[name].append(value)
        made = estimates(data, group)
        for name, values in again.items():
            ratios[name].append(made[name].draws.std() / np.std(values))
    return pd.DataFrame(
        [
            {
                "statistic": n,
                "prompts": prompts,
                "ratio": float(np.mean(v)),
                "draws": draws,
                "datasets": repeats,
            }
            for n, v in ratios.items()
        ]
    )


def _anew(data: dict[str, np.ndarray]) -> dict[str, float]:
    h, d, c, y = (data[name] for name in "hdcy")
    learnable = d * c
    rank = {name: stats.rankdata(v) for name, v in {"x": learnable, "y": y, "h": h, "d": d}.items()}
    held = np.column_stack([np.ones(len(y)), rank["h"], rank["d"]])
    basis = np.linalg.qr(held)[0]
    rest = [rank[name] - basis @ (basis.T @ rank[name]) for name in "xy"]
    low, high = np.quantile(y, [0.05, 0.95])
    return {
        "spearman": np.corrcoef(rank["x"], rank["y"])[0, 1],
        "kendall": stats.kendalltau(learnable, y).statistic,
        "partial spearman": np.corrcoef(*rest)[0, 1],
        "trimmed mean": stats.trim_mean(y, 0.05),
        "winsorised mean": np.clip(y, low, high).mean(),
    }


# --- report
# -----------------------------------------------------------------------------------------


def report(
    table: pd.DataFrame,
    near: pd.DataFrame,
    *,
    draws: int,
    seconds: float,
) -> str:
    """The results as Markdown."""
    largest = table.groupby("prompts").datasets.max().items()
    sizes = ", ".join(f"{count} at {prompts} prompts" for prompts, count in largest)
    lines = [
        "# Calibration of intervals and tests",
        "",
        (
            "Written by `python benchmarks/calibration.py`; its head says how the data are made."
            " Figures are percentages of simulated data sets"
            f" ({sizes}), {draws} draws each, nominal 95 %. {platform.machine()}, Python"
            f" {platform.python_version()}, numpy {np.__version__}, one thread, {seconds / 60:.0f}"
            " min."
        ),
        "",
        _outside(table),
        "",
    ]
    for situation, title in (
        ("null", "Null: rate at which a nominal 5 % test rejects"),
        ("effect", "Effect: coverage of the nominal 95 % interval"),
    ):
        here = table[table.situation == situation]
        here = here.assign(value=100 - here.coverage if situation == "null" else here.coverage)
        lines += [f"## {title}", "", *_markdown(here), ""]
    lines += [
        "## Standard errors of approximate draws over those of recomputing every draw",
        "",
        "| statistic | prompts | ratio |",
        "|---|---|---|",
    ]
    lines += [f"| {row.statistic} | {row.prompts} | {row.ratio:.3f} |" for row in near.itertuples()]
    return "\n".join(lines) + "\n"


def _outside(table: pd.DataFrame) -> str:
    reported = table[table.method == "reported"]
    off = reported[(reported.coverage < 93) | (reported.coverage > 97)]
    if off.empty:
        return "Every reported interval covers within 93-97 %, and every test rejects within 3-7 %."
    cells = [
        f"{row.statistic} at {row.prompts} prompts ({row.situation}, {row.coverage:.1f} %)"
        for row in off.itertuples()
    ]
    return (
        f"Of {len(reported)} reported figures {len(off)} outside of 93-97 % coverage:"
        f" {'; '.join(cells)}."
    )


def _markdown(here: pd.DataFrame) -> list[str]:
    lines = [
        "| statistic | prompts | " + " | ".join(METHODS) + " |",
        "|---" * (len(METHODS) + 2) + "|",
    ]
    for (name, prompts), rows in here.groupby(["statistic", "prompts"], sort=False):
        cells = rows.set_index("method").value.reindex(METHODS)
        lines.append(
            f"| {name} | {prompts} | "
            + " | ".join("" if np.isnan(v) else f"{v:.1f}" for v in cells)
            + " |"
        )
    return lines


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(Path(__file__).with_name("CALIBRATION.md")))
    options = parser.parse_args()
    started, tables = time.process_time(), []
    for prompts in PROMPTS:
        for effect in (False, True):
            tables.append(
                coverage(
                    effect=effect,
                    prompts=prompts,
                    datasets=options.datasets,
                    draws=options.draws,
                    seed=options.seed,
                )
            )
            print(prompts, effect, f"{time.process_time() - started:.0f} s", flush=True)
    near = pd.concat([approximations(prompts=p, draws=400, seed=options.seed) for p in (20, 50)])
    table = pd.concat(tables, ignore_index=True)
    Path(options.output).write_text(
        report(table, near, draws=options.draws, seconds=time.process_time() - started),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
