"""Regressions of the gain, and its residual after entropy, divergence and position.

With h, d, c the normalized student entropy, forward KL and compatibility, ht the normalized teacher
entropy and t the relative position, all standardized to mean 0 and standard deviation 1 over the
positions of a fit:

    interaction      gain ~ h + d + h*d + t + ht
    compatibility    gain ~ h + d + h*d + t + ht + c
    decomposition    gain ~ h + d*c + d*(1 - c) + t + ht

The decomposition splits d into a part within the student's reach and a part outside of it; claim C3
of arXiv 2605.26844 is that the coefficient of the first is the larger. Standardized coefficients
also differ where the two predictors merely have different variances, so the difference is also
given *per unit* of d.

Departures: intervals are cluster-robust (the released scripts give coefficients alone); the usual
CR1 errors, which are too small with some tens of prompts, are in a column of their own. ht is left
out where the table lacks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import BSpline

from diagnostics.analysis import linear_model, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, of_sums, winsorize
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.linear_model import Regression
from diagnostics.analysis.splits import Split, outcomes, row, splits
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings
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
BASE_MODEL = "interaction"
"""The model whose R^2 the others are compared with."""
WINSORISED = (0.0, 0.01, 0.05)
HELD_TERMS = ("student_entropy", "divergence", "position", "teacher_entropy")
CURVE_SCORES = ("compatibility", "teachability", "incompatible")
DECILES, GRID, INNER_KNOTS = 10, 25, 3
REGRESSION_COLUMNS = (
    "student_entropy",
    "forward_kl",
    "compatibility",
    "position",
    "response_length",
)


def terms(
    tokens: pd.DataFrame, *, substitute: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Predictors of the regressions, normalized over the whole table and not yet standardized.

    Args:
        tokens: A token table with N rows.
        substitute: Columns to read in place of others, e.g. {"compatibility": "topk_overlap_k8"}.

    Returns:
        [N] values by name of the term.

    Raises:
        DiagnosticsError: If a column is missing.
    """
    require_columns(tokens, REGRESSION_COLUMNS, what="A regression of the gain")
    h = normalize(tokens["student_entropy"])
    d = normalize(tokens["forward_kl"])
    found = {
        "student_entropy": h,
        "divergence": d,
        "entropy_x_divergence": h * d,
        "position": relative_position(tokens),
    }
    for name in CURVE_SCORES:
        found[name] = score_criterion(tokens, name, substitute=substitute)
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
    """Fit one model on a split.

    Args:
        model: interaction, compatibility or decomposition.
        values: [n] outcome on the split.
        predictors: [N] terms over the whole table, as from `terms`; those that are missing are left
            out.
        split: The split.
        robust: False leaves the CR1 errors out.

    Returns:
        The fit; None where it is undefined.
    """
    chosen = {name: predictors[name][split.mask] for name in MODELS[model] if name in predictors}
    return linear_model.regress(values, chosen, split.prompts, robust=robust)


def decomposition_difference(regression: Regression, *, per_unit: bool = False) -> Estimate:
    """Coefficient of d*c minus that of d*(1 - c).

    Args:
        regression: A fit of the model decomposition.
        per_unit: True for coefficients in the outcome's unit per unit of d, False for standardized
            ones.

    Returns:
        The difference.
    """
    first, second = (regression.coefficients[name] for name in ("teachability", "incompatible"))
    if per_unit:
        scale = regression.spread
        first = first.times(scale["outcome"] / scale["teachability"])
        second = second.times(scale["outcome"] / scale["incompatible"])
    return first - second


@with_settings(bootstrap=Bootstrap)
def regressions(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> dict[str, pd.DataFrame]:
    """The three models for every outcome and split, raw and winsorized by 1 and 5 %.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Two tables. `regressions`: outcome, split, winsorised (share of each tail), model, term,
        coefficient (standardized), low, high, p_value, robust_error (CR1, statsmodels), inflation
        (variance inflation factor), r_squared, r_squared_gain (over the interaction model, NaN for
        itself) with its low and high, positions, prompts. `decomposition`: outcome, split,
        winsorised, scale (standardised, per_unit), difference, low, high, p_value, positions,
        prompts. Models that cannot be fitted have no rows.
    """
    predictors = terms(tokens)
    rows = []
    tests = []
    for split in splits(tokens, bootstrap=bootstrap):
        for outcome in outcomes(tokens):
            for share in WINSORISED:
                values = winsorize(split.values(tokens, outcome), share)
                fits = {model: fit(model, values, predictors, split) for model in MODELS}
                key = {"outcome": outcome, "split": split.name, "winsorised": share}
                for model, found in fits.items():
                    base = fits[BASE_MODEL] if model != BASE_MODEL else None
                    rows += (
                        _coefficients(key | {"model": model}, found, base, bootstrap.level)
                        if found
                        else []
                    )
                if fits["decomposition"]:
                    tests += _tests(key, fits["decomposition"], bootstrap.level)
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


# Residual curves


@with_settings(bootstrap=Bootstrap)
def residual_curves(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> pd.DataFrame:
    """Residual of each outcome after {h, d, position, ht}, along c, d*c and d*(1 - c).

    `decile` rows are means over tenths of the score by rank; `spline` rows are a cubic regression
    spline with three inner knots at the quartiles. Both are fitted anew, residuals included, in
    every draw.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, curve, at (the score), residual (in the outcome's unit), low,
        high, positions, prompts.
    """
    predictors = terms(tokens)
    rows = []
    held = [predictors[name] for name in HELD_TERMS if name in predictors]
    for split in splits(tokens, bootstrap=bootstrap):
        controls = [column[split.mask] for column in held]
        for outcome in outcomes(tokens):
            values = split.values(tokens, outcome)
            for score in CURVE_SCORES:
                x = predictors[score][split.mask]
                key = {"outcome": outcome, "split": split.name, "score": score}
                for curve, points in residual_curve(x, values, controls, split.prompts).items():
                    rows += [
                        key | {"curve": curve, "at": at} | row(e, bootstrap.level, named="residual")
                        for at, e in points
                    ]
    return pd.DataFrame(rows)


def residual_curve(
    x: np.ndarray, values: np.ndarray, controls: list[np.ndarray], prompts: PromptClusters
) -> dict[str, list[tuple[float, Estimate]]]:
    """Points of both curves for one score.

    Args:
        x: [N] score.
        values: [N] outcome.
        controls: [N] each, the columns that are held fixed.
        prompts: The prompts of the N positions, with their draws.

    Returns:
        By curve its points (score, residual); a curve for which the score has too few distinct
        values is left out.
    """
    mask = np.all(np.isfinite([x, values, *controls]), axis=0)
    if mask.sum() < DECILES * 2:
        return {}
    x = x[mask]
    values = values[mask]
    columns = [rank_correlation.standardize(control[mask]) for control in controls]
    group = rank_correlation.groups_by_rank(x, DECILES, np.ones(len(x), dtype=bool))
    here = [number for number in range(1, DECILES + 1) if (group == number).any()]
    indicator = np.stack([group == number for number in here], axis=1).astype(np.float64)
    centers = [float(x[group == number].mean()) for number in here]
    curves = {
        "decile": _points(centers, indicator, np.eye(len(here)), values, columns, prompts, mask)
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
    """Regress the residual of values [n] on a basis [n, k] and evaluate it [points, k], from sums
    alone.

    The sums are the cross products of [1, controls, values], then basis'basis and
    basis'[1, controls, values].
    """
    fixed = [np.ones(len(values)), *columns, values]
    q = len(fixed)
    k = basis.shape[1]
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

    return list(zip(at, of_sums(curve, sums, prompts, mask)))
