"""What holds on several pairs: one estimate per pair, a mean over pairs, and a new pair's range.

    y_j = theta + u_j + e_j,   u_j ~ N(0, tau^2),   e_j ~ N(0, s_j^2)          pair j of k
    w_j = 1 / (s_j^2 + tau^2),   theta = sum w_j y_j / sum w_j
    SE^2 = max(1, sum w_j (y_j - theta)^2 / (k - 1)) / sum w_j                 Hartung and Knapp
    mean = theta +- t(k - 1) SE
    new pair = theta +- t(k - 2) sqrt(tau^2 + SE^2)                            from three pairs on

tau^2 is Paule and Mandel's; s_j is half of the pair's interval over the normal quantile of its
level, so that a pair whose interval is wide, for its few prompts or few steps, weighs little. The
factor of Hartung and Knapp is never below 1: with three pairs that happen to agree it would
otherwise shorten the interval.

Correlations are pooled after Fisher's arctanh. Differences to random are divided by what the full
loss gives in the same pair, at the same horizon and by the same divergence, because a nat is not
the same achievement in two pairs; where the full loss's own reduction is not clear of zero, the
share is undefined and counted. Estimates of the claims stay in their own units.

A pair with fewer prompts than the primary choices ask for is shown and not pooled.

References: Paule and Mandel 1982; Hartung and Knapp 2001; Röver, Knapp and Friede 2015 (the factor
of at least 1); Higgins, Thompson and Spiegelhalter 2009 (the range for a new study).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

from diagnostics.analysis.bootstrap import holm
from diagnostics.analysis.config import PrimaryChoices
from diagnostics.core.errors import DiagnosticsError

KEY = ["kind", "conclusion", "outcome", "budget", "horizon", "rollouts"]
"""What names a conclusion; parts that a kind does not have are empty."""
COLUMNS = ["pair", *KEY, "unit", "estimate", "low", "high", "prompts", "steps", "judged", "reason"]
CLAIMS = {
    ("C1", "within_strata"): "at equal divergence, compatible positions gain more",
    ("C2", "overlap_contrast"): "within Q3, compatible positions gain more than their like",
    ("C3", "interaction"): "divergence pays more where a position is compatible",
    ("C1", "spearman_difference"): "teachability orders the gain better than divergence",
    ("C2", "q3_gap"): "within Q3, the compatible third gains more",
    ("C3", "standardised"): "d·c weighs more than d·(1 − c)",
}
"""Claim and statistic -> what a positive estimate says; the first three are the controlled ones."""
CLAIM_K = 16
"""The K of the claims' statistics."""
NOT_CRITERIA = ("random", "full")
RIVALS = ("random", "random_divergent")
"""What criteria are compared with: random positions, and random ones above the median of D."""
ENOUGH_FOR_A_RANGE = 3
"""Pairs from which on a range for a new pair is defined."""
ALPHA = 0.05


@dataclass(frozen=True)
class PairTables:
    """What one pair's run says, and the level of its intervals."""

    tables: Mapping[str, pd.DataFrame]
    """The run's tables by name: decision, correlations and claim_statistics are read."""
    level: float = 0.95
    """Level of the intervals in them."""


def effects(pairs: Mapping[str, PairTables]) -> pd.DataFrame:
    """Lay out what every pair says on every conclusion.

    Args:
        pairs: The tables of each pair's run, by the name of the pair.

    Returns:
        One row per pair and conclusion, with columns pair, kind (over_random,
        over_random_divergent, correlation, claim), conclusion (a criterion, or claim and
        statistic), outcome (of over_<rival> the divergence that the loss lowers), budget, horizon,
        rollouts (all; right, wrong), unit, estimate, low, high (at the pair's level), prompts,
        steps, judged (whether it is pooled) and reason (why it is not).

    Raises:
        DiagnosticsError: There are fewer than two pairs, or none has a table to read.
    """
    if len(pairs) < 2:
        raise DiagnosticsError(
            f"An atlas needs two or more pairs; got {len(pairs)}. Name more run directories."
        )
    parts = [
        part.assign(pair=name)
        for name, pair in pairs.items()
        for part in (
            *(_over(rival, pair.tables.get("decision")) for rival in RIVALS),
            _correlations(pair.tables.get("correlations")),
            _claims(pair.tables.get("claim_statistics")),
        )
        if part is not None and len(part)
    ]
    if not parts:
        raise DiagnosticsError(
            "None of the runs has a table decision, correlations or claim_statistics. Run `analyze`"
            " and `compare` on them first."
        )
    table = pd.concat(parts, ignore_index=True)
    table["judged"], table["reason"] = _judged(table)
    return table[COLUMNS]


def _judged(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row is pooled, and the reason where it is not."""
    few = (table["prompts"] < PrimaryChoices().minimum_prompts).to_numpy()
    width = (table["high"] - table["low"]).to_numpy(float)
    undefined = ~np.isfinite(table["estimate"].to_numpy(float)) | ~np.isfinite(width)
    reason = np.select(
        [table["reason"] != "", undefined, few, width <= 0],
        [table["reason"], "undefined", "too few prompts", "no interval"],
        default="",
    )
    return reason == "", reason


def _row_frame(table: pd.DataFrame, **columns) -> pd.DataFrame:
    empty = {"outcome": "", "budget": np.nan, "horizon": np.nan, "rollouts": "all", "reason": ""}
    frame = pd.DataFrame({**empty, **columns}, index=table.index)
    frame["prompts"] = table["prompts"].to_numpy()
    frame["steps"] = table["steps"].to_numpy() if "steps" in table else np.nan
    return frame


def _over(rival: str, table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Differences to a rival as shares of the full loss's reduction."""
    if table is None or f"over_{rival}" not in table:
        return None
    shown = table[table["primary"].astype(bool) & ~table["criterion"].isin(NOT_CRITERIA)]
    rollouts = table[table["measure"].isin(shown["measure"])]
    rows = rollouts[
        ~rollouts["criterion"].isin([*NOT_CRITERIA, rival])
        & (rollouts["horizon"] > 0)
        & rollouts[f"over_{rival}"].notna()
    ]
    full = rollouts[rollouts["criterion"] == "full"]
    keys = ["horizon", "measure", "rollouts"]
    full = full.set_index(keys)[["effect", "effect_low"]]
    index = pd.MultiIndex.from_frame(rows[keys])
    whole = full.reindex(index)
    known = (whole["effect_low"] > 0).to_numpy()
    by = np.where(known, whole["effect"].to_numpy(float), np.nan)
    ends = {
        name: rows[f"over_{rival}{end}"].to_numpy(float) / by
        for name, end in (("estimate", ""), ("low", "_low"), ("high", "_high"))
    }
    return _row_frame(
        rows,
        kind=f"over_{rival}",
        conclusion=rows["criterion"],
        outcome=rows["measure"],
        budget=rows["budget"].astype(float),
        horizon=rows["horizon"].astype(float),
        rollouts=rows["rollouts"],
        unit="share of what all positions give",
        reason=np.where(known, "", "the full loss's reduction is not clear of zero"),
        **ends,
    )


def _correlations(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Rank correlations with the gain and the context gain on held-out positions."""
    if table is None:
        return None
    rows = table[
        (table["split"] == "held_out")
        & (table["method"] == "spearman")
        & table["outcome"].isin(["gain", "context_gain"])
        & ~table["criterion"].isin(NOT_CRITERIA)
    ]
    return _row_frame(
        rows,
        kind="correlation",
        conclusion=rows["criterion"],
        outcome=rows["outcome"],
        unit="Spearman",
        estimate=rows["estimate"],
        low=rows["low"],
        high=rows["high"],
    )


def _claims(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """The claims' statistics on the context gain of held-out positions."""
    if table is None:
        return None
    named = pd.Series(
        list(zip(table["claim"], table["statistic"], strict=True)), index=table.index, dtype=object
    )
    rows = table[
        named.isin(list(CLAIMS))
        & (table["population"] == "held_out")
        & (table["outcome"] == "context_gain")
        & (table["proxy"] == "compatibility")
        & (table["k"] == CLAIM_K)
    ]
    return _row_frame(
        rows,
        kind="claim",
        conclusion=rows["claim"] + ": " + rows["statistic"],
        outcome=rows["outcome"],
        unit="the statistic's own",
        estimate=rows["estimate"],
        low=rows["low"],
        high=rows["high"],
    )


def pooled(table: pd.DataFrame, *, levels: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Pool every conclusion over the pairs that judge it.

    Args:
        table: As `effects` returns it.
        levels: Level of each pair's intervals; .95 where not given.

    Returns:
        One row per conclusion, with its key, unit, pairs (that are judged), not_judged, mean, low,
        high (random effects at 95 %), p_value, p_holm (over the conclusions of one kind, outcome,
        horizon and kind of rollouts), tau (in the scale that is pooled), i2 (share of the spread
        beyond the pairs' own intervals), q, q_p_value, new_low, new_high (where a new pair is
        expected, from three pairs on), above, below, open (pairs whose interval lies above, below
        or around zero), lowest, highest (the pairs' estimates) and verdict.
    """
    rows = [
        {**dict(zip(KEY, key, strict=True)), **_pool(group, levels or {})}
        for key, group in table.groupby(KEY, sort=False, dropna=False)
    ]
    found = pd.DataFrame(rows)
    found["p_holm"] = np.nan
    for _, group in found.groupby(["kind", "outcome", "horizon", "rollouts"], dropna=False):
        tested = group[group["p_value"].notna()]
        found.loc[tested.index, "p_holm"] = holm(tested["p_value"].to_numpy())
    found["verdict"] = [_verdict(row) for row in found.to_dict("records")]
    return found


def _pool(group: pd.DataFrame, levels: Mapping[str, float]) -> dict:
    """Mean, heterogeneity and range of one conclusion."""
    judged = group[group["judged"]]
    fisher = group["kind"].iloc[0] == "correlation"
    value, low, high = (judged[name].to_numpy(float) for name in ("estimate", "low", "high"))
    found = {
        "unit": group["unit"].iloc[0],
        "pairs": len(judged),
        "not_judged": len(group) - len(judged),
        "above": int((low > 0).sum()),
        "below": int((high < 0).sum()),
        "open": int(((low <= 0) & (high >= 0)).sum()),
        "lowest": value.min() if len(value) else np.nan,
        "highest": value.max() if len(value) else np.nan,
    }
    if len(judged) < 2:
        return {**found, **dict.fromkeys(STATISTICS, np.nan)}
    scaled = [
        np.arctanh(np.clip(part, -1 + 1e-12, 1 - 1e-12)) if fisher else part
        for part in (value, low, high)
    ]
    level = np.array([levels.get(pair, 0.95) for pair in judged["pair"]])
    error = (scaled[2] - scaled[1]) / 2 / stats.norm.ppf((1 + level) / 2)
    pool = random_effects(scaled[0], error)
    if fisher:
        names = ("mean", "low", "high", "new_low", "new_high")
        pool |= {name: float(np.tanh(pool[name])) for name in names}
    return {**found, **pool}


STATISTICS = (
    "mean",
    "low",
    "high",
    "p_value",
    "tau",
    "i2",
    "q",
    "q_p_value",
    "new_low",
    "new_high",
)


def random_effects(estimates, errors, *, level: float = 0.95) -> dict[str, float]:
    """Pool one estimate per pair with a random effect of the pair.

    Args:
        estimates: [k] one estimate per pair, k at least 2.
        errors: [k] their standard errors, above zero.
        level: Level of the interval and of the range.

    Returns:
        mean, low, high, p_value, tau, i2, q, q_p_value, new_low, new_high; the range for a new pair
        is NaN for two pairs.

    Reference:
        The formulas stand in the module's docstring.
    """
    value, error = np.asarray(estimates, float), np.asarray(errors, float)
    k, tau2, q = len(value), _paule_mandel(value, error), _spread(value, error, 0.0)
    weight = 1 / (error**2 + tau2)
    mean = float((weight * value).sum() / weight.sum())
    factor = max(1.0, float((weight * (value - mean) ** 2).sum() / (k - 1)))
    spread = np.sqrt(factor / weight.sum())
    reach = stats.t.ppf((1 + level) / 2, k - 1) * spread
    new = np.nan
    if k >= ENOUGH_FOR_A_RANGE:
        new = stats.t.ppf((1 + level) / 2, k - 2) * np.sqrt(tau2 + spread**2)
    return {
        "mean": mean,
        "low": mean - reach,
        "high": mean + reach,
        "p_value": float(2 * stats.t.sf(abs(mean) / spread, k - 1)),
        "tau": float(np.sqrt(tau2)),
        "i2": max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0,
        "q": q,
        "q_p_value": float(stats.chi2.sf(q, k - 1)),
        "new_low": mean - new,
        "new_high": mean + new,
    }


def _spread(value: np.ndarray, error: np.ndarray, tau2: float) -> float:
    """Weighted squares around the weighted mean, where pairs spread by tau2 beyond their errors."""
    weight = 1 / (error**2 + tau2)
    return float((weight * (value - (weight * value).sum() / weight.sum()) ** 2).sum())


def _paule_mandel(value: np.ndarray, error: np.ndarray) -> float:
    """The spread between pairs at which the weighted squares are k - 1; 0 where they are fewer.

    A root finder on the pairs' own scale. statsmodels' iteration stops at an absolute 1e-5, which
    is more than the whole of tau^2 for effects of some thousandths of a nat, and ends at 0 for some
    pairs that do spread.
    """
    wanted = len(value) - 1
    if _spread(value, error, 0.0) <= wanted:
        return 0.0
    unit = float(np.var(value, ddof=1))  # at this tau^2 the squares are already below k - 1
    return unit * optimize.brentq(
        lambda share: _spread(value, error, share * unit) - wanted, 0.0, 1.0, xtol=1e-15
    )


def _verdict(row: Mapping) -> str:
    """What the pairs together say; the first that applies, see `docs/statistics.md`."""
    side = "above" if row["mean"] > 0 else "below"
    if row["pairs"] < 2:
        return "one pair" if row["pairs"] else "not judged"
    if row["above"] and row["below"]:
        return "turns with the pair"
    if max(row["above"], row["below"]) == row["pairs"]:
        return f"{side} zero on every pair"
    if row["new_low"] > 0 or row["new_high"] < 0:
        return f"{side} zero expected for a new pair"
    if row["pairs"] >= ENOUGH_FOR_A_RANGE and row["p_holm"] < ALPHA:
        return f"{side} zero on average"
    return "cannot tell"
