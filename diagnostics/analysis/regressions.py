"""Regressions of the gain, and its residual after entropy, divergence and position.

With h, d, c the normalized student entropy, forward KL and compatibility, ht the normalized teacher
entropy and t the relative position, all standardized to mean 0 and standard deviation 1 over the
positions of a fit:

    interaction      gain ~ h + d + h*d + t + ht
    compatibility    gain ~ h + d + h*d + t + ht + c
    decomposition    gain ~ h + d*c + d*(1 - c) + t + ht

The decomposition splits d into a part within the student's reach and a part outside of it.
Standardized coefficients also differ where the two predictors merely have different variances, so
the difference is also given *per unit* of d. It has no main effect of c; the test of claim C3 has
(`claim_statistics`).

The coefficients' normalizations, winsorizing limits and standard deviations are made anew in every
draw. The residual curves cut their deciles and knots once, and refit everything else.

Departures: intervals resample prompts (the released scripts give coefficients alone). ht is left
out where the table lacks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import BSpline

from diagnostics.analysis import cuts, linear_model, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, of_sums
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.splits import outcomes, row, same_positions, splits, table
from diagnostics.analysis.step_batches import over_steps
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
SCALES = ("standardised", "per_unit")
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


@dataclass(frozen=True)
class _Plan:
    """Which fits are made, in the order of their numbers.

    Attributes:
        keys: (population, outcome) of each outcome.
        models: Terms by model, of those that the table has.
    """

    keys: list[tuple[str, str]]
    models: dict[str, tuple[str, ...]]

    def names(self) -> list[tuple]:
        """What each number of `numbers` is: its kind, then outcome, population, share of each tail
        that is winsorized, and model and term, or scale.
        """
        fits = [(outcome, split, share) for split, outcome in self.keys for share in WINSORISED]
        found: list[tuple] = []
        for fit in fits:
            for model, chosen in self.models.items():
                found += [("coefficient", *fit, model, term) for term in chosen]
                found.append(("r_squared", *fit, model))
            found += [("difference", *fit, scale) for scale in SCALES]
        return found

    def numbers(self, drawn: Drawn) -> np.ndarray:
        """All numbers for the positions of a draw; NaN where a model cannot be fitted."""
        predictors = {
            name: column[: len(drawn.prompt)] for name, column in terms(drawn.tokens).items()
        }
        design = np.stack(list(predictors.values()))
        defined = np.isfinite(design).all(axis=0)
        # Outcomes that are defined at the same positions are explained by the same terms.
        alike: dict[bytes, list[int]] = {}
        values = [drawn.values[key] for key in self.keys]
        for number, column in enumerate(values):
            alike.setdefault(np.packbits(np.isfinite(column)).tobytes(), []).append(number)
        found = np.empty((len(values), len(self.names()) // len(values)))
        for numbers in alike.values():
            rows = defined & np.isfinite(values[numbers[0]])
            outcomes = [_winsorized(values[number], rows) for number in numbers]
            fits = self._fits(list(predictors), design[:, rows], np.concatenate(outcomes))
            found[numbers] = fits.reshape(len(numbers), -1)
        return found.ravel()

    def _fits(self, names: list[str], design: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
        """[outcomes, numbers] of outcomes [outcomes, n] that share a design [terms, n]."""
        matrix, spread = linear_model.correlation_matrix(np.concatenate([design, outcomes]))
        at = range(len(names), len(matrix))
        found = []
        for model, chosen in self.models.items():
            inner = [names.index(term) for term in chosen]
            beta, fit = linear_model.standardized_fits(matrix, inner, at)
            if design.shape[1] < len(chosen) + 3:
                beta, fit = np.full_like(beta, np.nan), np.full_like(fit, np.nan)
            found += [*beta, fit]
            if model == "decomposition":
                first, second = (chosen.index(term) for term in ("teachability", "incompatible"))
                with np.errstate(invalid="ignore", divide="ignore"):
                    unit = beta * spread[list(at)] / spread[inner][:, None]
                differences = [each[first] - each[second] for each in (beta, unit)]
        return np.stack([*found, *differences], axis=1)


def _winsorized(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[shares, rows] values [n] under a mask, clipped at the quantiles of all finite ones."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.full((len(WINSORISED), int(rows.sum())), np.nan)
    tails = [end for share in WINSORISED for end in (share, 1 - share)]
    limits = np.quantile(finite, tails).reshape(-1, 2)
    return np.clip(values[rows], limits[:, :1], limits[:, 1:])


@with_settings(bootstrap=Bootstrap)
def regressions(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> dict[str, pd.DataFrame]:
    """The three models for every outcome and population, raw and winsorized by 1 and 5 %.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Two tables. `regressions`: outcome, split, winsorised (share of each tail), model, term,
        coefficient (standardized), low, high, p_value, inflation (variance inflation factor),
        r_squared, r_squared_gain (over the interaction model, NaN for itself) with its low and
        high, positions, prompts, steps. `decomposition`: outcome, split, winsorised, scale
        (standardised, per_unit), difference, low, high, p_value, positions, prompts, steps. Models
        that cannot be fitted have no rows.
    """
    terms(tokens)  # Refuses a table that lacks a column.
    names = outcomes(tokens)
    models = {
        model: tuple(term for term in chosen if term != "teacher_entropy" or term in tokens)
        for model, chosen in MODELS.items()
    }
    needs = [*REGRESSION_COLUMNS, *(["teacher_entropy"] if "teacher_entropy" in tokens else [])]
    needs = cuts.needed_columns(tokens, CURVE_SCORES, needs)

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        found = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, needs, names)
            plan = _Plan(list(drawn.values), models)
            estimates = cuts.redrawn(plan.numbers, tokens, together, needs, names)
            defined = np.isfinite(list(terms(drawn.tokens).values())).all(axis=0)
            for key, estimate in zip(plan.names(), estimates, strict=True):
                values = drawn.values[key[2], key[1]]
                mask = np.isfinite(values) & defined[: len(values)]
                found[key] = cuts.counted(estimate, mask, drawn.prompt)
        return found

    found = over_steps(make, tokens, bootstrap)
    differences = {
        key[1:]: estimate
        for key, estimate in found.items()
        if key[0] == "difference" and np.isfinite(estimate.value)
    }
    keys = ("outcome", "split", "winsorised", "scale")
    level = bootstrap.level
    return {
        "regressions": pd.DataFrame(list(_coefficient_rows(tokens, found, models, level))),
        "decomposition": table(differences, keys, level, named="difference", tested=True),
    }


def _coefficient_rows(
    tokens: pd.DataFrame, found: Mapping[tuple, Estimate], models: Mapping, level: float
) -> Iterator[dict]:
    inflation = _inflation(tokens, models)
    for (kind, *key), estimate in found.items():
        if kind != "coefficient" or not np.isfinite(estimate.value):
            continue
        outcome, split, share, model, term = key
        fit = found["r_squared", outcome, split, share, model]
        more = None
        if model != BASE_MODEL:
            more = fit - found["r_squared", outcome, split, share, BASE_MODEL]
        low, high = more.interval(level) if more else (np.nan, np.nan)
        names = ("outcome", "split", "winsorised", "model", "term")
        yield dict(zip(names, key, strict=True)) | row(
            estimate,
            level,
            named="coefficient",
            p_value=estimate.p_value,
            inflation=inflation[outcome, split, model].get(term, np.nan),
            r_squared=fit.value,
            r_squared_gain=more.value if more else np.nan,
            r_squared_gain_low=low,
            r_squared_gain_high=high,
        )


def _inflation(tokens: pd.DataFrame, models: Mapping) -> dict[tuple, dict[str, float]]:
    """Variance inflation factor of each term by (outcome, population, model)."""
    predictors = terms(tokens)
    found = {}
    for split in splits(tokens, draws=0):
        columns = np.stack([column[split.mask] for column in predictors.values()])
        defined = np.isfinite(columns).all(axis=0)
        for outcome in outcomes(tokens):
            rows = defined & np.isfinite(split.values(tokens, outcome))
            matrix, _ = linear_model.correlation_matrix(columns[:, rows])
            for model, chosen in models.items():
                at = [list(predictors).index(term) for term in chosen]
                factors = np.diag(linear_model.inverse(matrix[np.ix_(at, at)]))
                found[outcome, split.name, model] = dict(zip(chosen, map(float, factors)))
    return found


# Residual curves


@with_settings(bootstrap=Bootstrap)
def residual_curves(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> pd.DataFrame:
    """Residual of each outcome after {h, d, position, ht}, along c, d*c and d*(1 - c).

    `decile` rows are means over tenths of the score by rank; `spline` rows are a cubic regression
    spline with three inner knots at the quartiles, at quantiles of the score with equal distances
    between them. Both are fitted anew, residuals included, in every draw.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, curve, point (its number), residual (in the outcome's unit),
        low, high, at (the score), rank (the share of positions below it, half of its equals
        counted), positions, prompts, steps.
    """

    def make(tokens: pd.DataFrame, settings: Bootstrap, predictors: dict) -> dict[tuple, Estimate]:
        found = {}
        held = [predictors[name] for name in HELD_TERMS if name in predictors]
        for split in splits(tokens, bootstrap=settings):
            controls = [column[split.mask] for column in held]
            for outcome in outcomes(tokens):
                values = split.values(tokens, outcome)
                for score in CURVE_SCORES:
                    x = predictors[score][split.mask]
                    curves = residual_curve(x, values, controls, split.prompts)
                    for curve, points in curves.items():
                        ranks = _ranks([at for at, _ in points], x[np.isfinite(x)])
                        for number, (at, estimate) in enumerate(points):
                            key = (outcome, split.name, score, curve, number)
                            found["residual", *key] = estimate
                            found["at", *key] = replace(estimate, value=at)
                            found["rank", *key] = replace(estimate, value=ranks[number])
        return found

    made = over_steps(make, tokens, bootstrap, before=terms)
    found = {key[1:]: estimate for key, estimate in made.items() if key[0] == "residual"}
    places = {key: {part: made[part, *key].value for part in ("at", "rank")} for key in found}
    names = ("outcome", "split", "score", "curve", "point")
    return table(found, names, bootstrap.level, named="residual", more=places)


def _ranks(at: list[float], x: np.ndarray) -> list[float]:
    """Share of the values [n] below each of `at`, half of its equals counted."""
    ordered = np.sort(x)
    below, up_to = (np.searchsorted(ordered, at, side=side) for side in ("left", "right"))
    return ((below + up_to) / (2 * len(ordered))).tolist()


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
        grid = np.quantile(x, np.linspace(0.01, 0.99, GRID))
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

    def curve(s: np.ndarray) -> np.ndarray:
        whole = s[..., : q * q].reshape(*s.shape[:-1], q, q)
        inner = s[..., q * q : q * q + k * k].reshape(*s.shape[:-1], k, k)
        cross = s[..., q * q + k * k :].reshape(*s.shape[:-1], k, q)
        beta = linear_model.inverse(whole[..., :-1, :-1]) @ whole[..., :-1, -1:]
        residual = cross[..., -1:] - cross[..., :-1] @ beta
        return (evaluate @ linear_model.inverse(inner) @ residual)[..., 0]

    if not prompts.draws:  # the sums over all prompts are enough
        parts = np.stack(fixed), basis.T
        pairs = ((parts[0], parts[0]), (parts[1], parts[1]), (parts[1], parts[0]))
        total = np.concatenate([(one @ other.T).ravel() for one, other in pairs])
        counts = int(mask.sum()), prompts.present(mask)
        return [(x, Estimate(y, np.empty(0), *counts)) for x, y in zip(at, curve(total).tolist())]
    products = [a * b for a in fixed for b in fixed]
    products += [basis[:, i] * basis[:, j] for i in range(k) for j in range(k)]
    products += [basis[:, i] * b for i in range(k) for b in fixed]
    sums = prompts.sums(*products, at=mask)
    return list(zip(at, of_sums(curve, sums, prompts, mask)))
