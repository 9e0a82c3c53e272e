"""Do the conclusions depend on the form of the gain, on saturated predictors, or on little data?

The claims' statistics (`claim_statistics`) are repeated for every form of the gain, with its tails
winsorized, without special tokens and first positions, and for other losses. A claim that is about
more than a few positions survives all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import claim_statistics
from diagnostics.analysis.bootstrap import PromptClusters, design_effect, effective_clusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.splits import outcomes, splits
from diagnostics.analysis.splits import table as table_of
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import step_count
from diagnostics.core.schema import SCHEMA, support_column
from diagnostics.core.settings import with_settings
from diagnostics.criteria import HIGH_QUANTILE, LOW_QUANTILE

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
GAIN_FORMS = (
    "context_gain",
    "gain",
    "reverse_gain",
    "relative_gain",
    "relative_gain_released",
)
VARIED_OUTCOMES = ("context_gain", "gain")
VARIED_STATISTICS = ("within_strata", "overlap_contrast", "interaction")
"""The controlled statistics of C1, C2 and C3."""
VARIED_DRAWS = 60
"""Draws of each variant: what matters is whether it turns the sign of the whole table."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


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


# Other forms of the gain


@with_settings(bootstrap=Bootstrap)
def gain_robustness(
    tokens: pd.DataFrame,
    *,
    losses: Mapping[str, pd.DataFrame] | None = None,
    base_k: int = BASE_K,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """The claims' controlled statistics on the first population, under every form of the gain.

    Where positions are left out, scores are normalized over those that stay.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        losses: Token tables of steps with other losses on the same bank, by loss.
        base_k: K of the columns without a suffix.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns variant (the difference: nothing, winsorised_0.01, winsorised_0.05,
        no_special_tokens, no_first_position, neither, or loss_<name>), outcome, split, statistic
        (as `claim_statistics` names them), estimate, low, high, p_value, positions, prompts, steps.
    """
    base = claim_statistics.Support("compatibility", base_k, "compatibility")
    found = {}
    for variant, table, forms, share in _variants(tokens, losses or {}):
        kinds = {name: ("controlled",) for name in forms if name in table}
        estimates = claim_statistics.estimates(
            table,
            kinds,
            base,
            {},
            widened="",
            bootstrap=bootstrap,
            draws=VARIED_DRAWS,
            winsorised=share,
            only=next(splits(table, draws=0)).name,
        )
        for key, estimate in estimates.items():
            if key.name in VARIED_STATISTICS:
                found[variant, key.outcome, key.population, key.name] = estimate
    names = ("variant", "outcome", "split", "statistic")
    return table_of(found, names, bootstrap.level, tested=True)


def _variants(
    tokens: pd.DataFrame, losses: Mapping[str, pd.DataFrame]
) -> Iterator[tuple[str, pd.DataFrame, tuple[str, ...], float]]:
    """Each variant with its table, outcomes, and share of each tail that is winsorized; one table
    at a time, since each is a copy.
    """
    yield "nothing", tokens, GAIN_FORMS, 0.0
    for share in (0.01, 0.05):
        yield f"winsorised_{share:g}", tokens, VARIED_OUTCOMES, share
    for name, kept in _subsets(tokens):
        yield name, kept, VARIED_OUTCOMES, 0.0
    for name, table in losses.items():
        yield f"loss_{name}", table, VARIED_OUTCOMES, 0.0


def _subsets(tokens: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    later = tokens["position"] > 0
    masks = {"no_first_position": later}
    if "is_special" in tokens:
        plain = ~tokens["is_special"].astype(bool)
        masks = {"no_special_tokens": plain, "no_first_position": later, "neither": plain & later}
    for name, mask in masks.items():
        if mask.any():
            yield name, tokens[mask].reset_index(drop=True)


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
