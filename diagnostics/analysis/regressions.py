"""Regressions of the gain, and what is left of it after entropy, divergence and position.

With h, d, c the normalised student entropy, forward KL and compatibility, ht the normalised teacher
entropy and t the relative position, all standardised to mean 0 and standard deviation 1 over the
positions of a fit:

    interaction      gain ~ h + d + h*d + t + ht
    compatibility    gain ~ h + d + h*d + t + ht + c
    decomposition    gain ~ h + d*c + d*(1 - c) + t + ht

The decomposition splits d into a part within the student's reach and a part outside of it; claim C3
of arXiv 2605.26844 is that the coefficient of the first is the larger. Standardised coefficients
also differ where the two predictors merely vary differently, so the difference is given *per unit*
of d too.

Departures: intervals are cluster-robust (the released scripts give coefficients alone); the usual
CR1 errors, too small with some tens of prompts, stand beside them. ht is left out where the table
lacks it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.interpolate import BSpline

from diagnostics.analysis import bootstrap, linear_model, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.linear_model import Regression
from diagnostics.analysis.splits import Split, outcomes, row, splits
from diagnostics.core.schema import require_columns
from diagnostics.criteria import normalize, relative_position, score_criterion

MODELS = {
    "interaction": (
        "student_entropy",
        "divergence",
        "entropy_x_divergence",
        "position",
        "teacher_entropy",
    ),
    "compatibility": (
        "student_entropy",
        "divergence",
        "entropy_x_divergence",
        "position",
        "teacher_entropy",
        "compatibility",
    ),
    "decomposition": (
        "student_entropy",
        "teachability",
        "incompatible",
        "position",
        "teacher_entropy",
    ),
}
BASE = "interaction"
"""The model that R^2 is compared with."""
WINSORISED = (0.0, 0.01, 0.05)
HELD = ("student_entropy", "divergence", "position", "teacher_entropy")
CURVE_SCORES = ("compatibility", "teachability", "incompatible")
DECILES, GRID, INNER_KNOTS = 10, 25, 3
NEEDS = ("student_entropy", "forward_kl", "compatibility", "position", "response_length")


def terms(
    tokens: pd.DataFrame, *, substitute: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Predictors [N] by name, normalised over the whole table and not yet standardised.

    `substitute` reads another column in place of one, e.g. {"compatibility": "topk_overlap_k8"}.
    """
    require_columns(tokens, NEEDS, what="A regression of the gain")
    h, d = normalize(tokens["student_entropy"]), normalize(tokens["forward_kl"])
    c = score_criterion(tokens, "compatibility", substitute=substitute)
    found = {
        "student_entropy": h,
        "divergence": d,
        "entropy_x_divergence": h * d,
        "position": relative_position(tokens),
        "compatibility": c,
        "teachability": d * c,
        "incompatible": d * (1 - c),
    }
    if "teacher_entropy" in tokens:
        found["teacher_entropy"] = normalize(tokens["teacher_entropy"])
    return found


def fit(
    model: str,
    values: np.ndarray,
    predictors: dict[str, np.ndarray],
    split: Split,
    *,
    robust: bool = True,
) -> Regression | None:
    """One model for outcome values [n] on a split; predictors [N] over the table. None where it
    cannot be fitted.
    """
    chosen = {name: predictors[name][split.mask] for name in MODELS[model] if name in predictors}
    return linear_model.regress(values, chosen, split.prompts, robust=robust)


def decomposition_difference(regression: Regression, *, per_unit: bool = False) -> Estimate:
    """Coefficient of d*c minus that of d*(1 - c): standardised, or in the outcome's unit for a unit
    of d.
    """
    first, second = (regression.coefficients[name] for name in ("teachability", "incompatible"))
    if per_unit:
        scale = regression.spread
        first = first.times(scale["outcome"] / scale["teachability"])
        second = second.times(scale["outcome"] / scale["incompatible"])
    return first - second


def regressions(
    tokens: pd.DataFrame, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """The three models for every outcome and split, raw and winsorised by 1 and 5 %.

    Returns `regressions`: outcome, split, winsorised (share of each tail), model, term, coefficient
    (standardised), low, high, p_value, robust_error (CR1, statsmodels), inflation (variance
    inflation factor), r_squared, r_squared_gain (over the interaction model, NaN for itself) with
    its low and high, positions, prompts; and `decomposition`: outcome, split, winsorised, scale
    (standardised, per_unit), difference, low, high, p_value, positions, prompts. Models that cannot
    be fitted have no rows."""
    predictors, rows, tests = terms(tokens), [], []
    for split in splits(tokens, draws=draws, seed=seed):
        for outcome in outcomes(tokens):
            for share in WINSORISED:
                values = bootstrap.winsorize(split.values(tokens, outcome), share)
                fits = {model: fit(model, values, predictors, split) for model in MODELS}
                key = {"outcome": outcome, "split": split.name, "winsorised": share}
                for model, found in fits.items():
                    base = fits[BASE] if model != BASE else None
                    rows += (
                        _coefficients(key | {"model": model}, found, base, level) if found else []
                    )
                if fits["decomposition"]:
                    tests += _tests(key, fits["decomposition"], level)
    return {"regressions": pd.DataFrame(rows), "decomposition": pd.DataFrame(tests)}


def _coefficients(
    key: dict, found: Regression, base: Regression | None, level: float
) -> list[dict]:
    more = found.r_squared - base.r_squared if base else None
    low, high = more.interval(level) if more else (np.nan, np.nan)
    fit_columns = {
        "r_squared": found.r_squared.value,
        "r_squared_gain": more.value if more else np.nan,
        "r_squared_gain_low": low,
        "r_squared_gain_high": high,
    }
    return [
        key
        | {"term": term}
        | row(
            estimate,
            level,
            named="coefficient",
            p_value=estimate.p_value,
            robust_error=found.robust_error[term],
            inflation=found.inflation[term],
            **fit_columns,
        )
        for term, estimate in found.coefficients.items()
    ]


def _tests(key: dict, found: Regression, level: float) -> list[dict]:
    both = {
        scale: decomposition_difference(found, per_unit=scale == "per_unit")
        for scale in ("standardised", "per_unit")
    }
    return [
        key | {"scale": scale} | row(estimate, level, named="difference", p_value=estimate.p_value)
        for scale, estimate in both.items()
    ]


# --- residual curves
# --------------------------------------------------------------------------------


def residual_curves(
    tokens: pd.DataFrame, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """What is left of each outcome after {h, d, position, ht}, along c, d*c and d*(1 - c).

    `decile` rows are means over tenths of the score by rank; `spline` rows a cubic regression
    spline with three inner knots at the quartiles. Both are refitted, residuals included, in every
    draw. Returns columns outcome, split, score, curve, at (the score), residual (in the outcome's
    unit), low, high, positions, prompts."""
    predictors, rows = terms(tokens), []
    held = [predictors[name] for name in HELD if name in predictors]
    for split in splits(tokens, draws=draws, seed=seed):
        controls = [column[split.mask] for column in held]
        for outcome in outcomes(tokens):
            values = split.values(tokens, outcome)
            for score in CURVE_SCORES:
                x, key = (
                    predictors[score][split.mask],
                    {"outcome": outcome, "split": split.name, "score": score},
                )
                for curve, points in residual_curve(x, values, controls, split.prompts).items():
                    rows += [
                        key | {"curve": curve, "at": at} | row(e, level, named="residual")
                        for at, e in points
                    ]
    return pd.DataFrame(rows)


def residual_curve(
    x: np.ndarray, values: np.ndarray, controls: list[np.ndarray], prompts: PromptClusters
) -> dict[str, list[tuple[float, Estimate]]]:
    """Points of both curves for a score x [N]; a curve that the score's distinct values do not
    allow is empty.
    """
    mask = np.all(np.isfinite([x, values, *controls]), axis=0)
    if mask.sum() < DECILES * 2:
        return {}
    x, values = x[mask], values[mask]
    columns = [rank_correlation.standardize(control[mask]) for control in controls]
    group = rank_correlation.groups_by_rank(x, DECILES, np.ones(len(x), dtype=bool))
    here = [number for number in range(1, DECILES + 1) if (group == number).any()]
    indicator = np.stack([group == number for number in here], axis=1).astype(np.float64)
    centres = [float(x[group == number].mean()) for number in here]
    curves = {
        "decile": _points(centres, indicator, np.eye(len(here)), values, columns, prompts, mask)
    }
    knots = np.unique(np.quantile(x, np.linspace(0, 1, INNER_KNOTS + 2)))
    if len(knots) == INNER_KNOTS + 2:
        knots = np.r_[[knots[0]] * 3, knots, [knots[-1]] * 3]
        grid = np.linspace(*np.quantile(x, [0.01, 0.99]), GRID)
        basis, at = (BSpline.design_matrix(v, knots, 3).toarray() for v in (x, grid))
        curves["spline"] = _points(grid.tolist(), basis, at, values, columns, prompts, mask)
    return curves


def _points(
    at,
    basis: np.ndarray,
    evaluate: np.ndarray,
    values: np.ndarray,
    columns,
    prompts: PromptClusters,
    mask: np.ndarray,
):
    """Regress the residual of values [n] on a basis [n, k] and evaluate [points, k], by sums alone.

    The sums are the cross products of [1, controls, values], then basis'basis and basis'[1,
    controls, values]."""
    fixed = [np.ones(len(values)), *columns, values]
    q, k = len(fixed), basis.shape[1]
    products = [a * b for a in fixed for b in fixed]
    products += [basis[:, i] * basis[:, j] for i in range(k) for j in range(k)]
    products += [basis[:, i] * b for i in range(k) for b in fixed]
    sums = prompts.sums(*products, at=mask)

    def curve(s: np.ndarray) -> np.ndarray:
        whole = s[..., : q * q].reshape(*s.shape[:-1], q, q)
        inner = s[..., q * q : q * q + k * k].reshape(*s.shape[:-1], k, k)
        cross = s[..., q * q + k * k :].reshape(*s.shape[:-1], k, q)
        beta = linear_model.inverse(whole[..., :-1, :-1]) @ whole[..., :-1, -1:]
        residual = cross[..., -1:] - cross[..., :-1] @ beta
        return (evaluate @ linear_model.inverse(inner) @ residual)[..., 0]

    return list(zip(at, bootstrap.of_sums(curve, sums, prompts, mask)))
