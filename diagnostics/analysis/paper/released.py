"""The paper's tables and figures as its released scripts compute them, from one token table.

    tables 1, 3C, 5A   `gap`            H and C of the trained student, thirds of c in Q3
    tables 2, 7, 10    `interventions`  the same gap after trainings under masks, not a mean gain
    tables 5, 6, 9     `section3`       every predictor of the untrained student
    table 8            `topn`           h and d of the untrained, c of the trained student
    figures 4D, 5C     `section3`       quartile buckets inside Q3
    figure 2           inferred: no script is released for it

Gains are the relative ones of the scripts, (D - D') / (D + 1e-12), as fractions; `controlled` has
the same tables in nats, with predictors before the step and cuts inside the draws. Every table has
the long form `row, quantity, k, budget, estimate, low, high, n`, with NaN where a column does not
apply and where the scripts make no interval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from diagnostics.analysis.paper.bank import (
    ScriptTable,
    column_at,
    percentile_ranks,
    script_table,
)
from diagnostics.analysis.paper.gap import GainStatistics, gain_statistics
from diagnostics.analysis.paper.interventions import over_seeds, trainings
from diagnostics.analysis.paper.sample import LONG, supports
from diagnostics.analysis.paper.section3 import (
    bucket_gains,
    regressions,
    support_gaps,
    support_proxies,
)
from diagnostics.analysis.paper.topn import top_gains
from diagnostics.analysis.robustness import BASE_K, known_k
from diagnostics.core.errors import DiagnosticsError

log = logging.getLogger("diagnostics")
SELECTORS = (
    "q3_compatibility",
    "q3_teachability_first",
    "q3_divergence",
    "teachability",
    "divergence",
    "incompatible",
    "tip",
    "entropy",
    "random",
)
"""Rows of table 8; the script also has c and h (+) d*c (`topn.SELECTORS`)."""
PROXIES = {
    "mass": "compatibility",
    "bhattacharyya": "bhattacharyya",
    "jaccard": "topk_jaccard",
    "overlap": "topk_overlap",
}
"""Rows of table 6, and the proxy of each."""
BUCKETED = ("compatibility", "divergence", "incompatible", "teachability")
"""Rows of the buckets."""
BUCKET_MEANS = {
    "mean": "mean",
    "trimmed mean": "trimmed_mean",
    "winsorized mean": "winsorized_mean",
}
TABLE_7 = ("q3_teachability", "q3_teachability_low", "q3_incompatible")
BUDGETS_2 = (0.03, 0.05)
BUDGETS_10 = (0.01, 0.03, 0.05, 0.1)
OF_TRAININGS = {
    "gap after training": "gap",
    "matched gap": "matched",
    "mean gain": "mean_gain",
    "kept share": "kept_share",
    "gap per kept share": "gap_per_kept_share",
    "share in Q3": "q3_share",
    "mean D^L": "mean_teachability",
    "mean D^I": "mean_incompatible",
    "mean C": "mean_compatibility",
}
"""Quantities of tables 2, 7 and 10, and the column of each in `interventions.trainings`."""
PLANES = {
    "2A": ("teachability", "incompatible", None),
    "2B": ("entropy", "divergence", "teachability"),
    "2C": ("entropy", "divergence", "incompatible"),
}
"""By figure the scores of its axes, and the one whose mean percentile it shows; None shows the mean
asinh of the gain."""
PLANE = ["figure", "x_bin", "y_bin", "x_low", "x_high", "y_low", "y_high", "positions", "estimate"]
BINS = 10


def _row(row: str, quantity: str, estimate: float, n: float, **given: float) -> dict:
    """A row of `LONG`; `given` are k, budget, low and high, as far as they are known."""
    k, budget, low, high = (given.get(name, np.nan) for name in ("k", "budget", "low", "high"))
    return dict(zip(LONG, (row, quantity, float(k), float(budget), estimate, low, high, n)))


def _long(rows: Iterable[dict]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=LONG).astype(dict.fromkeys(LONG[2:7], np.float64))


def _sizes(tokens: pd.DataFrame, ks: Iterable[int] | None, when: str) -> list[int]:
    """The K of `ks`, or all, at which the table has C; at least one."""
    found = [
        k for k in supports(tokens, ks) if column_at(tokens, "compatibility", k, when) in tokens
    ]
    if not found:
        wanted = "any K" if ks is None else f"K = {', '.join(map(str, ks))}"
        raise DiagnosticsError(
            f"The table has no compatibility {when} training at {wanted}. Score the contexts with"
            " that K among --sweep, and the trained student with `score --after CHECKPOINT`."
        )
    return found


def table_1(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """Table 1, figures 3C and 5A: the gap of the *trained* student's C inside its own Q3.

    Args:
        tokens: A token table with the columns `_after` of a checkpoint.
        ks: Sizes of the support; None takes all that the table has after training, and others are
            left out.

    Returns:
        The long form: rows `K = 16` and so on; quantities `Q3 gap` with its percentile interval
        over contexts (n positions in Q3) and `matched gap` (n pairs), as fractions.

    Raises:
        DiagnosticsError: A column is missing.
    """
    rows = []
    for k in _sizes(tokens, ks, "after"):
        rows += _gap_rows(gain_statistics(tokens, k=k), k)
    return _long(rows)


def _gap_rows(found: GainStatistics, k: int) -> list[dict]:
    gap, pairs, row = found.gap, found.matched, f"K = {k}"
    return [
        _row(row, "Q3 gap", gap.estimate, found.positions, low=gap.low, high=gap.high, k=k),
        _row(row, "matched gap", pairs.mean, pairs.pairs, k=k),
    ]


def table_5(tokens: pd.DataFrame) -> pd.DataFrame:
    """Table 5: what the numbers rest on, after positions without a measurement are dropped.

    A warning says how many were.

    Args:
        tokens: A token table with a gain.

    Returns:
        The long form: rows `positions`, `contexts`, `prompts`; quantity `count`.

    Raises:
        DiagnosticsError: A column is missing.
    """
    table = script_table(tokens)
    if table.dropped:
        log.warning(
            "%d of %d positions lack a column that the released scripts read, and are in none of"
            " their numbers.",
            table.dropped,
            len(tokens),
        )
    prompts = tokens["prompt_id"].iloc[table.rows].nunique()
    counts = {"positions": len(table), "contexts": table.contexts, "prompts": prompts}
    return _long(_row(name, "count", float(count), count) for name, count in counts.items())


def table_6(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """Table 6, figures 4C and 5B: the gap of each support proxy of the *untrained* student in Q3.

    Args:
        tokens: A token table with a gain.
        ks: Sizes of the support; None takes all that the table has, and others are left out.

    Returns:
        The long form: rows `mass`, `bhattacharyya`, `jaccard`, `overlap`, as far as the table has
        them; quantity `Q3 gap` with its percentile interval over contexts, as fractions; n
        positions in Q3. The Jaccard row equals the overlap row, from which the script computes it.

    Raises:
        DiagnosticsError: A column is missing.
    """
    rows = []
    for k in _sizes(tokens, ks, "before"):
        proxies = support_proxies(tokens, k=k)
        proxies = {name: proxies[name] for name in PROXIES.values() if name in proxies}
        found = support_gaps(script_table(tokens, k=k), proxies).set_index("proxy")
        for name, proxy in PROXIES.items():
            if proxy in found.index:
                gap = found.loc[proxy]
                ends = {"low": gap["low"], "high": gap["high"]}
                rows.append(_row(name, "Q3 gap", gap["gap"], int(gap["positions"]), k=k, **ends))
    return _long(rows)


def table_8(tokens: pd.DataFrame, *, budgets: Iterable[float] = (0.03, 0.05)) -> pd.DataFrame:
    """Table 8, figures 4A and 4B: the mean gain of what nine selectors select.

    Where the cut divides equals, those that are taken are drawn at random with a fixed seed; the
    script leaves them to an unstable sort, and its number lies between `least` and `greatest`.

    Args:
        tokens: A token table with a gain and `compatibility_after`.
        budgets: Shares of the positions, in (0, 1].

    Returns:
        The long form: rows of `SELECTORS`; quantities `mean gain` (winsorized G, a fraction, with a
        percentile interval over contexts), `gain per kept share` (the mean over n / N), `share in
        Q3`, `tied share` (of the selection: positions taken out of equals that the cut divides),
        `expected under ties`, `least` and `greatest` (the mean gain whichever of the equals are
        taken; for `random`, which ranks nothing, NaN); n positions selected.

    Raises:
        DiagnosticsError: A column is missing, or a budget lies outside (0, 1].
    """
    table = script_table(tokens, compatibility="after")
    k = known_k(tokens) or BASE_K
    found = top_gains(table, k=k, budgets=budgets, selectors=SELECTORS)
    return _long(row for each in found.to_dict("records") for row in _selector_rows(each))


def _selector_rows(found: dict) -> Iterator[dict]:
    divided = found["taken"] if found["tied"] > found["taken"] else 0
    numbers = {
        "gain per kept share": found["per_kept_share"],
        "share in Q3": found["q3_share"],
        "tied share": divided / found["positions"],
        "expected under ties": found["expected"],
        "least": found["least"],
        "greatest": found["greatest"],
    }
    at = {"n": found["positions"], "budget": found["budget"]}
    ends = {"low": found["low"], "high": found["high"]}
    yield _row(found["selector"], "mean gain", found["mean"], **ends, **at)
    for quantity, value in numbers.items():
        yield _row(found["selector"], quantity, value, **at)


def table_9(tokens: pd.DataFrame, *, ks: Iterable[int] | None = None) -> pd.DataFrame:
    """Table 9 and figure 3A: standardized coefficients of d*c and d*(1 - c).

    The coefficients are the section 3 builder's, of raw G on predictors of the untrained student.
    No script is released for the printed interval and Delta R2; `R2 gained` is that of the same
    builder's two models.

    Args:
        tokens: A token table with a gain.
        ks: Sizes of the support; None takes all that the table has, and others are left out.

    Returns:
        The long form: rows `K = 16` and so on; quantities `coefficient of D^L`, `coefficient of
        D^I`, `difference of coefficients` and `R2 gained` (over the model with h*d in the place of
        the two); n positions; no interval.

    Raises:
        DiagnosticsError: A column is missing.
    """
    rows = []
    for k in _sizes(tokens, ks, "before"):
        table = script_table(tokens, k=k)
        found = regressions(table)
        raw = found[found["winsorized"] == 0].set_index(["model", "term"])
        inside, outside = (
            raw.loc[("decomposition", term), "coefficient"]
            for term in ("teachability", "incompatible")
        )
        fits = [
            raw.loc[(name, "entropy"), "r_squared"] for name in ("decomposition", "interaction")
        ]
        numbers = {
            "coefficient of D^L": inside,
            "coefficient of D^I": outside,
            "difference of coefficients": inside - outside,
            "R2 gained": fits[0] - fits[1],
        }
        rows += [
            _row(f"K = {k}", quantity, value, len(table), k=k)
            for quantity, value in numbers.items()
        ]
    return _long(rows)


def buckets(tokens: pd.DataFrame) -> pd.DataFrame:
    """Figures 4D and 5C: locations of the gain in quartile buckets of four scores inside Q3.

    Args:
        tokens: A token table with a gain.

    Returns:
        The long form: rows of `BUCKETED`; quantities `mean of bucket 0` (the lowest) to `3`, and
        the same for `trimmed mean` (5 %) and `winsorized mean` (1 %), whose limits are the
        bucket's own, as fractions; n positions. A saturated score has fewer buckets.

    Raises:
        DiagnosticsError: A column is missing.
    """
    found = bucket_gains(script_table(tokens))
    found = found[(found["region"] == "Q3") & found["score"].isin(BUCKETED)]
    found = found.sort_values("score", key=lambda names: names.map(BUCKETED.index), kind="stable")
    return _long(
        _row(each["score"], f"{word} of bucket {each['bucket']}", each[column], each["positions"])
        for each in found.to_dict("records")
        for word, column in BUCKET_MEANS.items()
    )


def planes(tokens: pd.DataFrame, *, bins: int = BINS, fewest: int = 1) -> pd.DataFrame:
    """Figures 2A to 2C: means over the percentiles of two scores.

    **Inferred.** No script is released for figure 2; only its column names are. Axes are percentile
    ranks of the section 3 builder's d*c, d*(1 - c), h and d; 2A shows the mean of asinh(G), 2B and
    2C show the mean percentile of d*c and of d*(1 - c). The paper states neither the number of bins
    nor the fewest positions of a cell, and its color bar runs to 4, which no asinh of a gain of at
    most 1 reaches.

    Args:
        tokens: A token table with a gain.
        bins: Bins of each axis, equal in percentiles.
        fewest: Number of positions below which a cell has no number.

    Returns:
        Columns figure, x_bin, y_bin (from 0), x_low, x_high, y_low, y_high (shares of the
        positions), positions, estimate: asinh of a fraction in 2A (x: d*c, y: d*(1 - c)), and
        percentiles from 0 to 1 in 2B and 2C (x: H, y: D). Cells without a position have no row.

    Raises:
        DiagnosticsError: A column is missing, or there is no bin.
    """
    if bins < 1:
        raise DiagnosticsError(f"A plane has at least one bin; got bins={bins}.")
    table = script_table(tokens)
    found = pd.concat([_plane(table, figure, bins) for figure in PLANES], ignore_index=True)
    return found.assign(estimate=found["estimate"].where(found["positions"] >= fewest))


def _plane(table: ScriptTable, figure: str, bins: int) -> pd.DataFrame:
    *axes, shown = PLANES[figure]
    values = percentile_ranks(table.score(shown)) if shown else np.arcsinh(table.gain)
    ranks = {axis: percentile_ranks(table.score(name)) for axis, name in zip("xy", axes)}
    # The highest rank is 1 and belongs to the last bin; rounding keeps a rank on an edge below it.
    cells = {
        f"{axis}_bin": np.ceil(np.round(rank * bins, 9)).astype(int) - 1
        for axis, rank in ranks.items()
    }
    grouped = pd.DataFrame(cells | {"shown": values}).groupby(list(cells))["shown"]
    found = grouped.agg(["size", "mean"]).reset_index()
    edges = {
        f"{axis}_{end}": (found[f"{axis}_bin"] + shift) / bins
        for axis in "xy"
        for end, shift in (("low", 0), ("high", 1))
    }
    renamed = found.rename(columns={"size": "positions", "mean": "estimate"})
    return renamed.assign(figure=figure, **edges)[PLANE]


# Trainings


def table_2(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Table 2: trainings under each mask at 3 and 5 %.

    The paper's "G" is the gap after training, and its "G/keep" that gap over the kept share.

    Args:
        tokens: A token table of the untrained student.
        cells: One row per training and position (see `interventions.trainings`).
        kept: One row per training: what its rollouts kept.

    Returns:
        The long form: rows are the masks that were trained with; quantities `kept share`, `gap
        after training`, `gap per kept share`, `share in Q3` and `mean gain` (of G, over all
        positions), by budget; low and high are the mean less and plus one standard deviation over
        seeds (NaN for one seed); n trainings.

    Raises:
        DiagnosticsError: A column is missing, or a training lacks a position.
    """
    names = ("kept share", "gap after training", "gap per kept share", "share in Q3", "mean gain")
    return _of_trainings(tokens, cells, kept, names, budgets=BUDGETS_2)


def table_7(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Table 7 and figure 3B: trainings under the three masks inside Q3.

    Args:
        tokens: As `table_2`.
        cells: As `table_2`.
        kept: As `table_2`.

    Returns:
        The long form: rows of `TABLE_7`; quantities `gap after training`, `matched gap`, `mean
        gain`, `mean D^L`, `mean D^I`, `mean C` (over what was kept) and `kept share`; otherwise as
        `table_2`.

    Raises:
        DiagnosticsError: As `table_2`.
    """
    names = (
        "gap after training",
        "matched gap",
        "mean gain",
        "mean D^L",
        "mean D^I",
        "mean C",
        "kept share",
    )
    return _of_trainings(tokens, cells, kept, names, criteria=TABLE_7)


def table_10(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
    """Table 10: trainings with teachability at 1, 3, 5 and 10 %.

    Args:
        tokens: As `table_2`.
        cells: As `table_2`.
        kept: As `table_2`.

    Returns:
        The long form: row `teachability`; quantities `gap after training`, `matched gap` and `mean
        gain`; otherwise as `table_2`.

    Raises:
        DiagnosticsError: As `table_2`.
    """
    names = ("gap after training", "matched gap", "mean gain")
    return _of_trainings(tokens, cells, kept, names, budgets=BUDGETS_10, criteria=("teachability",))


def _of_trainings(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    quantities: tuple[str, ...],
    *,
    budgets: tuple[float, ...] | None = None,
    criteria: tuple[str, ...] | None = None,
) -> pd.DataFrame:
    """Mean and spread over seeds of the trainings of some masks and budgets."""
    wanted = np.ones(len(cells), dtype=bool)
    if budgets is not None:
        wanted &= np.isclose(cells["budget"].to_numpy(np.float64)[:, None], budgets).any(axis=1)
    if criteria is not None:
        wanted &= cells["criterion"].isin(criteria).to_numpy()
    if not wanted.any():
        return _long([])
    found = over_seeds(trainings(tokens, cells[wanted], kept))
    found = found.set_index(["criterion", "budget", "quantity"])
    return _long(
        _row(
            criterion,
            quantity,
            each["mean"],
            int(each["seeds"]),
            low=each["mean"] - each["sd"],
            high=each["mean"] + each["sd"],
            budget=budget,
        )
        for criterion, budget in dict.fromkeys(found.index.droplevel("quantity"))
        for quantity in quantities
        for each in [found.loc[(criterion, budget, OF_TRAININGS[quantity])]]
    )
