"""Strata of D: where the gain lies, and how much of it a permuted teacher gives back.

With the positions of a population cut into tenths by D, the forward KL before the step, and sums
over the positions of one stratum:

    share       sum gain / sum D             the part of the divergence that one step removed
    null_share  sum gain_permuted / sum gain the part of the gain that needs no teacher's context
    linearity   sum gain / sum first-order gain, after the same step

A position's own relative gain has D in its denominator, so it rests on a floor and on positions
whose D is next to nothing. A ratio of sums has neither. It means a share only where the step is
linear: where `linearity` was measured and lies outside of `LINEAR`, the stratum is marked and its
share is left out.

Tenths, quadrants and sums are made anew in every draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import cuts
from diagnostics.analysis.bootstrap import Estimate, positive_ratio
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.quadrants import QUADRANT_COLUMNS, QUADRANT_NAMES
from diagnostics.analysis.rank_correlation import equal_groups, rank_shares
from diagnostics.analysis.splits import NULL_OUTCOME, same_positions, splits
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.folds import NULLS, null_suffix, step_count
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

STRATA = 10
LINEAR = (0.8, 1.25)
"""Realized over first-order gain between which a stratum counts as linear."""
STRATUM_OUTCOMES = ("gain", NULL_OUTCOME, "context_gain")
FIRST_ORDER = "first_order_gain"
LEAST_DIVERGENCE = 1e-3
"""Median D in nats of a stratum below which its figures have no intervals."""
STRATUM_STATISTICS = (*STRATUM_OUTCOMES, "share", "null_share", "linearity")
NULL_STATISTICS = ("gain", NULL_OUTCOME, "null_share", "share")


@with_settings(bootstrap=Bootstrap)
def strata(
    tokens: pd.DataFrame,
    *,
    count: int = STRATA,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """What the step did in each stratum of D.

    Args:
        tokens: A token table with `forward_kl` and `gain`, one row per response position.
        count: Number of strata, equally many positions each.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per population and stratum, with columns split, stratum (from 1, the lowest D),
        divergence (its median D in nats), nats_share (its part of all of D), and with `_low` and
        `_high` beside each: gain, gain_permuted and context_gain (means in nats), share (of its D
        that the step removed), null_share (of its gain that the permuted teacher gives back),
        linearity (realized over first-order gain); linear (true, false, or empty where the table
        has no first-order gain), positions, prompts, steps. A ratio is NaN where its denominator is
        not positive, a null_share where the gain is not told apart from 0. Strata whose median D is
        under 1e-3 nats have no intervals: their gains are a few 1e-8 nats, of which intervals hold
        the truth 42 to 78 times in a hundred. Strata that ties leave empty have no row.

    Raises:
        DiagnosticsError: If a column is missing.
    """
    require_columns(tokens, ("forward_kl", "gain"), what="The table of strata")
    names = [*(name for name in STRATUM_OUTCOMES if name in tokens), *_LINEARITY]

    def statistic(drawn: Drawn) -> np.ndarray:
        group, divergence = _strata_of(drawn, count)
        return np.concatenate(
            [
                _of_stratum(drawn, split, divergence, group, count).ravel()
                for split in _populations(drawn)
            ]
        )

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        tokens = _with_first_order(tokens)
        found = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, ("forward_kl",), names)
            estimates = iter(cuts.redrawn(statistic, tokens, together, ("forward_kl",), names))
            group, _ = _strata_of(drawn, count)
            for split in _populations(drawn):
                defined = np.isfinite(drawn.values[split, "gain"])
                for name in STRATUM_STATISTICS:
                    for stratum in range(1, count + 1):
                        found[split, stratum, name] = cuts.counted(
                            next(estimates), defined & (group == stratum), drawn.prompt
                        )
        return found

    found = over_steps(make, tokens, bootstrap)
    return pd.DataFrame(_stratum_rows(tokens, found, count, bootstrap.level))


_LINEARITY = tuple(
    f"_{side}_{population}"
    for side in ("realized", "predicted")
    for population in ("held_out", "step", "all")
)


def _with_first_order(tokens: pd.DataFrame) -> pd.DataFrame:
    """The table with the realized and the first-order gain of the same step, by population.

    In a fold table the first-order gain is that of the step on fold 0.
    """
    nothing = np.full(len(tokens), np.nan)
    if FIRST_ORDER not in tokens:
        return tokens.assign(**dict.fromkeys(_LINEARITY, nothing))
    folds = step_count(tokens) > 1
    realized = tokens["gain_fold0" if folds else "gain"].to_numpy(dtype=np.float64)
    predicted = tokens[FIRST_ORDER].to_numpy(dtype=np.float64)
    own = tokens["fold"].to_numpy() == 0 if folds else np.ones(len(tokens), dtype=bool)
    masks = {"held_out": ~own if folds else own, "step": own, "all": own}
    both = np.isfinite(realized) & np.isfinite(predicted)
    return tokens.assign(
        **{
            f"_{side}_{name}": np.where(mask & both, values, np.nan)
            for side, values in (("realized", realized), ("predicted", predicted))
            for name, mask in masks.items()
        }
    )


def _populations(drawn: Drawn) -> list[str]:
    return list(dict.fromkeys(split for split, _ in drawn.values))


def _strata_of(drawn: Drawn, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] stratum of each position, from 1, 0 where D is undefined; and [n] D."""
    divergence = drawn.tokens["forward_kl"].to_numpy(dtype=np.float64)[: len(drawn.prompt)]
    return equal_groups(rank_shares(divergence), count), divergence


def _sums(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """[count + 1] sums of finite values by group from 0."""
    finite = np.isfinite(values)
    return np.bincount(group[finite], weights=values[finite], minlength=count + 1)


def _ratio(over: np.ndarray, under: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """[count] sum over sum by group from 1, over the positions where both are defined."""
    both = np.isfinite(over) & np.isfinite(under)
    sums = (_sums(np.where(both, values, np.nan), group, count)[1:] for values in (over, under))
    return positive_ratio(*sums)


def _of_stratum(
    drawn: Drawn, split: str, divergence: np.ndarray, group: np.ndarray, count: int
) -> np.ndarray:
    """[statistics, count] the statistics of a population in each stratum."""
    missing = np.full(len(group), np.nan)
    values = {name: drawn.values.get((split, name), missing) for name in STRATUM_OUTCOMES}
    found = [
        _ratio(each, np.where(np.isfinite(each), 1.0, np.nan), group, count)
        for each in values.values()
    ]
    realized, predicted = (
        drawn.values[split, f"_{side}_{split}"] for side in ("realized", "predicted")
    )
    return np.stack(
        [
            *found,
            _ratio(values["gain"], divergence, group, count),
            _ratio(values[NULL_OUTCOME], values["gain"], group, count),
            _ratio(realized, predicted, group, count),
        ]
    )


def _stratum_rows(
    tokens: pd.DataFrame, found: dict[tuple, Estimate], count: int, level: float
) -> Iterable[dict]:
    rows = []
    for split in splits(tokens, draws=0):
        drawn = cuts.whole(tokens, [split], ("forward_kl",), ("gain",))
        group, divergence = _strata_of(drawn, count)
        defined = np.isfinite(drawn.values[split.name, "gain"])
        for stratum in range(1, count + 1):
            here = divergence[defined & (group == stratum)]
            if not len(here):
                continue
            estimates = {name: found[split.name, stratum, name] for name in STRATUM_STATISTICS}
            linear = _is_linear(estimates["linearity"].value)
            key = {
                "split": split.name,
                "stratum": stratum,
                "divergence": float(np.median(here)),
                "nats_share": _part(here, divergence[defined]),
            }
            hidden = {"share"} if linear is False else set()
            bare = tuple(estimates) if key["divergence"] < LEAST_DIVERGENCE else ()
            rows.append(
                key
                | _columns(estimates, level, hidden=hidden | _unsure(estimates, level), bare=bare)
                | {"linear": linear}
                | _counts(estimates["gain"])
            )
    return rows


def _part(here: np.ndarray, everywhere: np.ndarray) -> float:
    total = float(np.nansum(everywhere))
    return float(here.sum()) / total if total > 0 else np.nan


def _is_linear(ratio: float) -> bool | None:
    """Whether a stratum counts as linear; None where that was not measured."""
    return LINEAR[0] <= ratio <= LINEAR[1] if np.isfinite(ratio) else None


def _unsure(estimates: dict[str, Estimate], level: float) -> set[str]:
    """`null_share` where the gain that it divides by is not told apart from 0."""
    return {"null_share"} if not estimates["gain"].interval(level)[0] > 0 else set()


def _columns(
    estimates: dict[str, Estimate],
    level: float,
    *,
    hidden: Iterable[str] = (),
    bare: Iterable[str] = (),
) -> dict[str, float]:
    """Value, low and high end of each estimate, as columns; NaN for the hidden ones, and for the
    ends of the bare ones.
    """
    found = {}
    for name, estimate in estimates.items():
        reach = (np.nan,) * 2 if name in bare else estimate.interval(level)
        ends = (np.nan,) * 3 if name in hidden else (estimate.value, *reach)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return found


def _counts(estimate: Estimate) -> dict[str, int]:
    return {
        "positions": estimate.positions,
        "prompts": estimate.prompts,
        "steps": estimate.steps,
    }


@with_settings(bootstrap=Bootstrap)
def null_share(
    tokens: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> pd.DataFrame:
    """How much of the gain a permuted teacher gives back, over all positions and by quadrant.

    Args:
        tokens: A token table with `gain` and `gain_permuted`, one row per response position.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per population, null (global, divergence, token_type: among which positions the
        teacher was permuted) and quadrant (all, Q1..Q4), with `_low` and `_high` beside each: gain
        and gain_permuted (means in nats), null_share (sum of the one over sum of the other) and
        share (sum of gain over sum of D); positions, prompts, steps. A ratio is NaN where its
        denominator is not positive.

    Raises:
        DiagnosticsError: If a column is missing.
    """
    require_columns(
        tokens, ("gain", NULL_OUTCOME, *QUADRANT_COLUMNS), what="The share of the permuted gain"
    )
    nulls = [null for null in NULLS if NULL_OUTCOME + null_suffix(null) in tokens]
    names = ["gain", *(NULL_OUTCOME + null_suffix(null) for null in nulls)]

    def statistic(drawn: Drawn) -> np.ndarray:
        group, divergence = drawn.quadrants(), _strata_of(drawn, 1)[1]
        return np.array(
            [
                _of_null(drawn, split, null, divergence, group)
                for split in _populations(drawn)
                for null in nulls
            ]
        ).ravel()

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        found = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, QUADRANT_COLUMNS, names)
            estimates = iter(cuts.redrawn(statistic, tokens, together, QUADRANT_COLUMNS, names))
            group = drawn.quadrants()
            for split in _populations(drawn):
                for null in nulls:
                    for name in NULL_STATISTICS:
                        for number, quadrant in QUADRANT_NAMES.items():
                            mask = np.isfinite(drawn.values[split, "gain"])
                            mask &= (group == number) | (number == 0)
                            found[split, null, quadrant, name] = cuts.counted(
                                next(estimates), mask, drawn.prompt
                            )
        return found

    return _null_table(over_steps(make, tokens, bootstrap), bootstrap.level)


def _null_table(found: Mapping[tuple, Estimate], level: float) -> pd.DataFrame:
    """The table of `null_share`, from estimates by split, null, quadrant and statistic."""
    rows = []
    for split, null, quadrant in dict.fromkeys(key[:3] for key in found):
        estimates = {name: found[split, null, quadrant, name] for name in NULL_STATISTICS}
        key = {"split": split, "null": null, "quadrant": quadrant}
        columns = _columns(estimates, level, hidden=_unsure(estimates, level))
        rows.append(key | columns | _counts(estimates["gain"]))
    return pd.DataFrame(rows)


def _of_null(
    drawn: Drawn, split: str, null: str, divergence: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """[statistics, quadrants] over all positions, then in each quadrant."""
    gain = drawn.values[split, "gain"]
    permuted = drawn.values[split, NULL_OUTCOME + null_suffix(null)]
    everywhere = np.ones(len(group), dtype=int)
    ones = np.ones(len(group))
    pairs = ((gain, ones), (permuted, ones), (permuted, gain), (gain, divergence))
    return np.array([[*_ratio(*pair, everywhere, 1), *_ratio(*pair, group, 4)] for pair in pairs])
