"""Do the conclusions depend on the support, the form of the gain, or saturated predictors?

Four statistics test claims C1-C3 (arXiv 2605.26844), each for one outcome on one split:

    spearman_difference    rho(outcome, d*c) - rho(outcome, d)
    tertile_difference     mean outcome, top minus bottom tertile of c within Q3
    matched_difference     the same within prompts at similar (h, d, position), with replacement
    decomposition          beta(d*c) - beta(d*(1 - c)), standardized (see `regressions`)
    decomposition_per_unit the same per unit of d; no claim is tested by it, but it can differ in
                           sign from the standardized one where the variances of d*c and d*(1 - c)
                           differ

Here they are repeated with every proxy of compatibility and every K, for every form of the gain,
and without special tokens and first positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import linear_model, matching, rank_correlation, regressions
from diagnostics.analysis.bootstrap import (
    Estimate,
    PromptClusters,
    design_effect,
    effective_clusters,
    mean,
    mean_difference,
    undefined,
    winsorize,
)
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.linear_model import Regression
from diagnostics.analysis.rank_correlation import Variable
from diagnostics.analysis.splits import Split, controls, outcomes, row, splits
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import step_count
from diagnostics.core.schema import SCHEMA, support_column
from diagnostics.core.settings import with_settings
from diagnostics.criteria import HIGH_QUANTILE, LOW_QUANTILE, quadrants

PROXIES = (
    "compatibility",
    "compatibility_intersection",
    "topk_overlap",
    "topk_jaccard",
    "shared_student_mass",
    "bhattacharyya",
)
SUPPORTS = (4, 8, 16, 32)
BASE_K = 16
"""K of the columns without a suffix where it is stated nowhere: the default of the scorer."""
MOST_K, TELLING = 256, 30
"""The largest K that is tried as the overlaps' denominator, and the number of positions with a
partial overlap that suffice to infer K.
"""
STATISTICS = (
    "spearman_difference",
    "tertile_difference",
    "matched_difference",
    "decomposition",
    "decomposition_per_unit",
)
CLAIM_OUTCOMES = ("gain", "relative_gain")
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Contrast:
    """Top and bottom group of a score among the Q3 positions of a split.

    Attributes:
        split: The split with its n positions.
        score: Name of the score.
        group: [n] 1 for the lowest group, `groups` for the highest, 0 outside Q3.
        groups: Number of groups.
    """

    split: Split
    score: str
    group: np.ndarray
    groups: int

    @property
    def top(self) -> np.ndarray:
        """Mask of the highest group."""
        return self.group == self.groups

    @property
    def bottom(self) -> np.ndarray:
        """Mask of the lowest group."""
        return self.group == 1

    def difference(self, values: np.ndarray) -> Estimate:
        """Mean of the values [n] in the top minus in the bottom group."""
        return mean_difference(values, self.split.prompts, self.top, self.bottom)


def contrasts(
    scored: dict[str, np.ndarray], in_q3: np.ndarray, split: Split, groups: int
) -> Iterator[Contrast]:
    """Groups of each score [N] within Q3 of the split, cut once over the split's Q3 positions."""
    for name, score in scored.items():
        group = rank_correlation.groups_by_rank(score[split.mask], groups, in_q3[split.mask])
        yield Contrast(split, name, group, groups)


def matching_features(tokens: pd.DataFrame) -> np.ndarray:
    """Coordinates [N, 3] to match in: h, d and relative position, each over its standard deviation
    within Q3.
    """
    columns = controls(tokens).values()
    in_q3 = quadrants(tokens) == 3
    # Distances inside Q3 are compared, so the spread inside Q3 is the unit.
    spreads = [column[in_q3].std() if in_q3.any() else 0.0 for column in columns]
    return np.stack([column / (spread or 1.0) for column, spread in zip(columns, spreads)], axis=1)


def _placed(pairs: matching.Pairs, values: np.ndarray) -> np.ndarray:
    found = np.full(len(values), np.nan)
    found[pairs.treated] = pairs.differences(values)
    return found


def pair_up(contrast: Contrast, space: np.ndarray) -> matching.Pairs:
    """Pair top with bottom positions of a contrast, within prompts, in coordinates [n, F]."""
    defined = np.isfinite(space).all(axis=1)
    top = contrast.top & defined
    bottom = contrast.bottom & defined
    return matching.match(space, top, bottom, contrast.split.prompts.codes)


class ClaimStatistics:
    """The statistics of one table, with one column in the place of compatibility.

    Args:
        tokens: A token table with outcomes.
        proxy: Column to read in place of compatibility.
    """

    def __init__(self, tokens: pd.DataFrame, *, proxy: str = "compatibility"):
        self.tokens, self.proxy = tokens, proxy
        self.predictors = regressions.terms(tokens, substitute={"compatibility": proxy})
        self.in_q3 = quadrants(tokens) == 3
        self.space = matching_features(tokens)

    def estimates(
        self,
        split: Split,
        outcome: str,
        *,
        names: Iterable[str] = STATISTICS,
        winsorised: float = 0.0,
    ) -> dict[str, Estimate]:
        """Compute statistics for one outcome on one split.

        Args:
            split: The split.
            outcome: Column of the outcome.
            names: Statistics to compute.
            winsorised: Share of each tail at which the outcome is clipped.

        Returns:
            Estimates by name.
        """
        values = winsorize(split.values(self.tokens, outcome), winsorised)
        contrast = self.contrast(split)

        # Two of the statistics need the same regression, and neither may be wanted.
        @cache
        def decomposition() -> Regression | None:
            chosen = {
                name: self.predictors[name][split.mask]
                for name in regressions.MODELS["decomposition"]
                if name in self.predictors
            }
            return linear_model.regress(values, chosen, split.prompts, robust=False)

        def difference(per_unit: bool) -> Estimate:
            found = decomposition()
            if not found:
                return undefined(split.prompts)
            sides = [found.coefficients[name] for name in ("teachability", "incompatible")]
            if per_unit:
                scale = found.spread
                sides = [
                    side.times(scale["outcome"] / scale[name])
                    for side, name in zip(sides, ("teachability", "incompatible"))
                ]
            return sides[0] - sides[1]

        make = {
            "spearman_difference": lambda: self._difference(split, values),
            "tertile_difference": lambda: contrast.difference(values),
            "matched_difference": lambda: mean(
                _placed(self._pairs(contrast), values), split.prompts
            ),
            "decomposition": lambda: difference(per_unit=False),
            "decomposition_per_unit": lambda: difference(per_unit=True),
        }
        return {name: make[name]() for name in names}

    def contrast(self, split: Split) -> Contrast:
        """Tertiles of c within Q3 of the split."""
        return next(contrasts({self.proxy: self.predictors["compatibility"]}, self.in_q3, split, 3))

    def _pairs(self, contrast: Contrast) -> matching.Pairs:
        return pair_up(contrast, self.space[contrast.split.mask])

    def _difference(self, split: Split, values: np.ndarray) -> Estimate:
        values = Variable(values)
        first, second = (
            rank_correlation.spearman(self.predictors[name][split.mask], values, split.prompts)
            for name in ("teachability", "divergence")
        )
        return first - second


@dataclass(frozen=True)
class Finding:
    """One of the statistics, with its proxy, K, outcome and split.

    Attributes:
        proxy: Measurement in the place of compatibility.
        k: Number of tokens in its support.
        outcome: Column of the outcome.
        split: `all`, `step` or `held_out`.
        statistic: Name of the statistic.
        estimate: Its value.
    """

    proxy: str
    k: int
    outcome: str
    split: str
    statistic: str
    estimate: Estimate

    def row(self, level: float) -> dict:
        """The finding as a row of a table, with an interval at that level."""
        key = {
            name: getattr(self, name) for name in ("proxy", "k", "outcome", "split", "statistic")
        }
        return key | row(self.estimate, level, p_value=self.estimate.p_value)


def depends_on_k(tokens: pd.DataFrame) -> list[str]:
    """Columns without a suffix whose values depend on K."""
    return [name for name in tokens if name in SCHEMA and SCHEMA[name].by_support]


def known_k(tokens: pd.DataFrame, stated: int | None = None) -> int | None:
    """K of the columns without a suffix.

    `topk_overlap` is a number of tokens over K, so its values tell K where enough positions have a
    partial overlap.

    Args:
        tokens: A token table; `attrs["k"]` counts as stated where nothing else is.
        stated: K according to a caller, a flag or a manifest.

    Returns:
        K as stated or as the overlaps show it; None where neither is known.

    Raises:
        DiagnosticsError: If a stated K contradicts the columns.
    """
    stated = tokens.attrs.get("k") if stated is None else stated
    if stated is not None and stated < 1:
        raise DiagnosticsError(f"K is a number of tokens, 1 or more; got {stated}.")
    if "topk_overlap" not in tokens:
        return stated
    overlap = tokens["topk_overlap"].to_numpy(dtype=np.float64)
    overlap = overlap[(overlap > 0) & (overlap < 1)]
    if stated is not None:
        if not _are_parts(overlap, stated):
            shown = next(
                (
                    f" They are those of K = {k}."
                    for k in range(1, MOST_K + 1)
                    if _are_parts(overlap, k)
                ),
                "",
            )
            raise DiagnosticsError(
                f"The values of topk_overlap are no numbers of tokens over {stated}, so K is not"
                f" {stated}.{shown} Give the K that the table was made with."
            )
        return stated
    return shown_k(tokens)


def shown_k(tokens: pd.DataFrame) -> int | None:
    """K as the overlaps show it, the smallest that they are parts of; None where they are too
    few.
    """
    if "topk_overlap" not in tokens:
        return None
    overlap = tokens["topk_overlap"].to_numpy(dtype=np.float64)
    overlap = overlap[(overlap > 0) & (overlap < 1)]
    if len(overlap) < TELLING:
        return None
    return next((k for k in range(1, MOST_K + 1) if _are_parts(overlap, k)), None)


def _are_parts(overlap: np.ndarray, k: int) -> bool:
    return bool(np.all(np.abs(overlap * k - np.round(overlap * k)) < 1e-3))


def supports(tokens: pd.DataFrame, *, base_k: int = BASE_K) -> list[tuple[str, int, str]]:
    """Stand-ins of compatibility that the table holds, at any K.

    Args:
        tokens: A token table.
        base_k: K of the columns without a suffix.

    Returns:
        (proxy, K, column), compatibility first.
    """
    found = [(proxy, base_k, proxy) for proxy in PROXIES if proxy in tokens]
    for proxy in PROXIES:
        sizes = sorted(
            int(k)
            for base, _, k in (str(name).rpartition("_k") for name in tokens)
            if base == proxy and k.isdigit()
        )
        found += [(proxy, k, support_column(proxy, k)) for k in sizes if k != base_k]
    return found


@with_settings(bootstrap=Bootstrap)
def findings(
    tokens: pd.DataFrame,
    *,
    base_k: int = BASE_K,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> list[Finding]:
    """All statistics for compatibility, and those of C2 and C3 for every other proxy and K.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        base_k: K of the columns without a suffix.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One finding per proxy, K, outcome, split and statistic.
    """
    found = []
    parts = list(splits(tokens, bootstrap=bootstrap))
    for proxy, k, name in supports(tokens, base_k=base_k):
        claims = ClaimStatistics(tokens, proxy=name)
        wanted = STATISTICS if name == "compatibility" else STATISTICS[1:]
        for split in parts:
            for outcome in outcomes(tokens):
                estimates = claims.estimates(split, outcome, names=wanted)
                found += [
                    Finding(proxy, k, outcome, split.name, s, estimate)
                    for s, estimate in estimates.items()
                ]
    return found


def support_robustness(found: list[Finding], *, level: float) -> pd.DataFrame:
    """The statistics of C2 and C3 for every proxy and K.

    Args:
        found: As from `findings`.
        level: Coverage of the intervals.

    Returns:
        Columns proxy, k, outcome, split, statistic, estimate, low, high, p_value, positions (pairs
        for the matched difference), prompts.
    """
    return pd.DataFrame(
        [finding.row(level) for finding in found if finding.statistic != "spearman_difference"]
    )


@with_settings(bootstrap=Bootstrap)
def gain_robustness(
    tokens: pd.DataFrame,
    *,
    losses: Mapping[str, pd.DataFrame] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """All statistics under every form of the gain.

    Where positions are left out, scores are normalized over those that stay.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        losses: Token tables of steps with other losses on the same bank, by loss.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns variant (the difference: nothing, winsorised_0.01, winsorised_0.05,
        no_special_tokens, no_first_position, neither, or loss_<name>), outcome, split, statistic,
        estimate, low, high, p_value, positions, prompts.
    """
    rows: list[dict] = []
    forms = [
        name
        for name in ("gain", "relative_gain", "relative_gain_released", "reverse_gain")
        if name in tokens
    ]
    rows += _variant(tokens, "nothing", forms, bootstrap=bootstrap)
    for share in (0.01, 0.05):
        rows += _variant(
            tokens, f"winsorised_{share:g}", forms, winsorised=share, bootstrap=bootstrap
        )
    for variant, kept in _subsets(tokens).items():
        rows += _variant(
            kept, variant, [name for name in CLAIM_OUTCOMES if name in kept], bootstrap=bootstrap
        )
    for loss, table in (losses or {}).items():
        rows += _variant(
            table,
            f"loss_{loss}",
            [name for name in CLAIM_OUTCOMES if name in table],
            bootstrap=bootstrap,
        )
    return pd.DataFrame(rows)


def _subsets(tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    later = tokens["position"] > 0
    masks = {"no_first_position": later}
    if "is_special" in tokens:
        plain = ~tokens["is_special"].astype(bool)
        masks = {"no_special_tokens": plain, "no_first_position": later, "neither": plain & later}
    return {name: tokens[mask].reset_index(drop=True) for name, mask in masks.items() if mask.any()}


def _variant(
    tokens: pd.DataFrame,
    variant: str,
    forms: list[str],
    *,
    bootstrap: Bootstrap,
    winsorised: float = 0.0,
) -> list[dict]:
    claims = ClaimStatistics(tokens)
    rows = []
    for split in splits(tokens, bootstrap=bootstrap):
        for outcome in forms:
            key = {"variant": variant, "outcome": outcome, "split": split.name}
            for name, estimate in claims.estimates(split, outcome, winsorised=winsorised).items():
                rows.append(
                    key
                    | {"statistic": name}
                    | row(estimate, bootstrap.level, p_value=estimate.p_value)
                )
    return rows


# Saturation and coverage


def saturation(tokens: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of every measurement from before the step, and its share at the clip bounds of N().

    Args:
        tokens: A token table.

    Returns:
        Columns measurement, unit, mean, q01 .. q99, at_low and at_high (share of positions at or
        beyond the 5 % and 95 % quantile), distinct, undefined, positions, prompts.
    """
    prompts = PromptClusters(tokens["prompt_id"], draws=0)
    rows = []
    for name in tokens.columns:
        if name in SCHEMA and SCHEMA[name].stage == "before":
            values = tokens[name].to_numpy(dtype=np.float64)
            finite = np.isfinite(values)
            key = {"measurement": name, "unit": SCHEMA[name].unit}
            counts = {
                "undefined": int((~finite).sum()),
                "positions": int(finite.sum()),
                "prompts": prompts.present(finite),
            }
            rows.append(key | _spread(values[finite]) | counts)
    return pd.DataFrame(rows)


def _spread(values: np.ndarray) -> dict:
    at = np.quantile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
    found = dict(zip(QUANTILES, map(float, at)))
    low = found[LOW_QUANTILE]
    high = found[HIGH_QUANTILE]
    ends = ((values <= low).mean(), (values >= high).mean()) if len(values) else (np.nan, np.nan)
    return {
        "mean": float(values.mean()) if len(values) else np.nan,
        **{f"q{100 * q:02.0f}": v for q, v in found.items()},
        "at_low": float(ends[0]),
        "at_high": float(ends[1]),
        "distinct": len(np.unique(values)),
    }


@with_settings(bootstrap=Bootstrap)
def coverage(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> pd.DataFrame:
    """How much data each outcome is computed from.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, contexts, undefined (positions without a value), effective_prompts
        (as many prompts of equal length would weigh the same), design_effect (variance of the mean
        over that of independent positions), effective_positions (positions over the design effect),
        positions, prompts, steps.
    """
    rows = []
    for split in splits(tokens, bootstrap=bootstrap):
        for outcome in outcomes(tokens):
            values = split.values(tokens, outcome)
            finite = np.isfinite(values)
            effect = design_effect(values, split.prompts)
            sizes = np.bincount(split.prompts.codes[finite], minlength=split.prompts.count)
            rows.append(
                {
                    "outcome": outcome,
                    "split": split.name,
                    "contexts": tokens["context_id"][split.mask].nunique(),
                    "undefined": int((~finite).sum()),
                    "effective_prompts": effective_clusters(sizes),
                    "design_effect": effect,
                    "effective_positions": float(finite.sum() / effect) if effect > 0 else np.nan,
                    "positions": int(finite.sum()),
                    "prompts": split.prompts.present(finite),
                    "steps": step_count(tokens),
                }
            )
    return pd.DataFrame(rows)
