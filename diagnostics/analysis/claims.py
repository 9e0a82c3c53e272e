"""Tests of the claims C1-C5 and one verdict per claim.

    C1  raw KL is a coarse proxy               spearman_difference > 0, beyond the placebo's
    C2  in Q3, compatible beats incompatible   tertile_difference > 0 and matched_difference > 0
    C3  learnable disagreement carries it      decomposition > 0
    C4  not an artefact of K or the proxy      C2 and C3 for every other K and proxy of
                                               compatibility
    C5  TA-OPD at 5 % matches or beats full    training runs: held-out KL and accuracy
        OPD and the other criteria

A verdict comes from tests, never from a point estimate. A claim of several parts is supported where
every part is above 0 (its p value is the largest, intersection-union), and refuted where some part
is below 0 (the smallest p of the parts below 0, times the number of parts, Bonferroni). Within a
split, the claims C1-C4 for both gains are eight tests ("looks"): Holm's correction keeps the chance
of any false verdict among them at 1 - level, and the interval shown is the one at the level that
Holm leaves to its row. The primary split is `all`; `step` and `held_out` are reported with a
correction of their own.

C5 is tested in `training_outcomes`, over seeds and prompts; here its rows only get the columns of
the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import Estimate, holm
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.robustness import CLAIM_OUTCOMES, Finding
from diagnostics.core.schema import require_columns

STATEMENTS = {
    "C1": "raw KL is a coarse proxy: teachability ranks the gain better than divergence does",
    "C2": "among confident and wrong positions, compatible ones gain more than incompatible ones",
    "C3": "learnable disagreement carries the effect: d*c weighs more than d*(1 - c)",
    "C4": "C2 and C3 do not depend on K or on the proxy of compatibility",
    "C5": "TA-OPD at 5 % matches or beats full OPD, entropy, divergence and TIP",
}
CLAIM_STATISTICS = {
    "C1": ("spearman_difference",),
    "C2": ("tertile_difference", "matched_difference"),
    "C3": ("decomposition",),
    "C4": ("tertile_difference", "matched_difference", "decomposition"),
}
OUTCOME_WORDS = {"gain": "absolute gain", "relative_gain": "relative gain"}
UNITS = {"gain": "nats", "relative_gain": "of D"}
IMBALANCE_LIMIT = 0.1
"""Standardized difference between matched pairs above which the sentence of C2 mentions it."""
TA_BUDGET = 0.05
RIVALS = ("full", "entropy", "divergence", "tip")
MINIMUM_SEEDS = 3


@dataclass(frozen=True)
class ClaimTest:
    """The test of one claim for one gain on one split, before the correction.

    Attributes:
        claim: C1, C2, C3 or C4.
        outcome: Column of the gain.
        split: `all`, `step` or `held_out`.
        parts: The claim's parts that are defined.
        undefined: Number of parts that could not be computed.
    """

    claim: str
    outcome: str
    split: str
    parts: tuple[Finding, ...]
    undefined: int

    @property
    def deciding(self) -> Finding | None:
        """The part with the weakest support, or the one that contradicts the claim most; None
        without parts.
        """
        if not self.parts:
            return None
        against = [part for part in self.parts if part.estimate.value < 0]
        return min(against, key=_p_value) if against else max(self.parts, key=_p_value)

    @property
    def p_value(self) -> float:
        """P value of the claim's negation where all parts are above 0, of the claim where some are
        below.
        """
        if not self.parts:
            return np.nan
        part = self.deciding
        return (
            min(1.0, _p_value(part) * len(self.parts))
            if part.estimate.value < 0
            else _p_value(part)
        )

    def verdict(self, p_corrected: float, level: float) -> str:
        """Judge the claim.

        Args:
            p_corrected: The p value after the correction for all tests of the split.
            level: 1 - level is the chance of a false verdict that is accepted.

        Returns:
            supported, refuted or inconclusive.
        """
        if not p_corrected <= 1 - level:
            return "inconclusive"
        if self.deciding.estimate.value < 0:
            return "refuted"
        return "supported" if not self.undefined or self.claim == "C4" else "inconclusive"


def _p_value(finding: Finding) -> float:
    return finding.estimate.p_value


def verdicts(
    found: Sequence[Finding],
    *,
    level: float = Bootstrap.level,
    placebo: Collection[str] = CLAIM_OUTCOMES,
    imbalance: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """C1-C4 for both gains on every split.

    Args:
        found: The statistics of `robustness.findings`.
        level: 1 - level is the chance of any false verdict per split.
        placebo: Outcomes that have a placebo, so that C1 was tested beyond it.
        imbalance: Largest standardized difference that is left between matched pairs, by split; the
            sentence of C2 says so where it is more than a tenth.

    Returns:
        Columns claim, statement, outcome, split, primary, verdict, statistic (of the deciding
        part), estimate, low, high, p_value, p_corrected, looks, parts, sentence, positions,
        prompts.

    Reference:
        arXiv 2605.26844 (the claims); Holm 1979; Berger 1982 (intersection-union tests).
    """
    rows = []
    for split in dict.fromkeys(finding.split for finding in found):
        here = [finding for finding in found if finding.split == split]
        looks = [
            _claim_test(claim, outcome, split, here)
            for claim in CLAIM_STATISTICS
            for outcome in CLAIM_OUTCOMES
            if _has_outcome(here, outcome)
        ]
        corrected = holm([test.p_value for test in looks])
        levels = _holm_levels([test.p_value for test in looks], level)
        rows += [
            _row(
                test,
                p,
                at,
                len(looks),
                level,
                _remark(test, here, level, placebo, (imbalance or {}).get(split, 0.0)),
            )
            for test, p, at in zip(looks, corrected, levels, strict=True)
        ]
    return pd.DataFrame(rows)


def _remark(
    test: ClaimTest,
    found: Sequence[Finding],
    level: float,
    placebo: Collection[str],
    imbalance: float,
) -> str:
    """A qualification that belongs to the sentence of a claim, or nothing."""
    if test.claim == "C1":
        return " beyond the placebo's" if test.outcome in placebo else ", without a placebo"
    if test.claim == "C2" and imbalance > IMBALANCE_LIMIT:
        return (
            f"; matched pairs still differ by up to {imbalance:.1f} standard deviations in what"
            " they were matched on"
        )
    if test.claim == "C3":
        units = [
            f
            for f in found
            if (f.statistic, f.outcome) == ("decomposition_per_unit", test.outcome)
            and f.proxy == found[0].proxy
            and f.k == found[0].k
        ]
        if units:
            low, high = units[0].estimate.interval(level)
            return (
                f", per unit of d {units[0].estimate.value:+.3g} [{low:+.3g}, {high:+.3g}]"
                f" {UNITS[test.outcome]}"
            )
    return ""


def _has_outcome(found: Sequence[Finding], outcome: str) -> bool:
    return any(finding.outcome == outcome for finding in found)


def _claim_test(claim: str, outcome: str, split: str, found: Sequence[Finding]) -> ClaimTest:
    base = next(finding for finding in found)
    mine = [
        finding
        for finding in found
        if finding.outcome == outcome
        and finding.statistic in CLAIM_STATISTICS[claim]
        and ((finding.proxy, finding.k) == (base.proxy, base.k)) == (claim != "C4")
    ]
    defined = tuple(finding for finding in mine if np.isfinite(_p_value(finding)))
    return ClaimTest(claim, outcome, split, defined, len(mine) - len(defined))


def _holm_levels(p_values: Sequence[float], level: float) -> np.ndarray:
    """Level of each row's interval such that it excludes 0 exactly where Holm rejects."""
    p_values = np.asarray(p_values, dtype=np.float64)
    alpha = 1 - level
    order = np.argsort(p_values)
    order = order[np.isfinite(p_values[order])]
    levels = np.full(p_values.shape, level)
    share = alpha
    for rank, at in enumerate(order):
        share = alpha / (len(order) - rank)
        if p_values[at] > share:
            levels[order[rank:]] = 1 - share
            break
        levels[at] = 1 - share
    return levels


def _row(test: ClaimTest, p: float, at: float, looks: int, level: float, remark: str) -> dict:
    verdict = test.verdict(p, level)
    part = test.deciding
    if part is not None and part.estimate.value < 0:
        at = 1 - (1 - at) / len(test.parts)
    estimate = part.estimate if part else Estimate(np.nan, np.empty(0), 0, 0)
    low, high = estimate.interval(at) if part else (np.nan, np.nan)
    return {
        "claim": test.claim,
        "statement": STATEMENTS[test.claim],
        "outcome": test.outcome,
        "split": test.split,
        "primary": test.split == "all",
        "verdict": verdict,
        "statistic": part.statistic if part else "",
        "estimate": estimate.value,
        "low": low,
        "high": high,
        "p_value": test.p_value,
        "p_corrected": p,
        "looks": looks,
        "parts": len(test.parts),
        "sentence": _sentence(test, verdict, low, high, p, looks, remark),
        "positions": estimate.positions,
        "prompts": estimate.prompts,
    }


def _sentence(
    test: ClaimTest, verdict: str, low: float, high: float, p: float, looks: int, remark: str
) -> str:
    """One plain sentence with the numbers of a claim."""
    about = (
        f"{test.claim} is {verdict} for the {OUTCOME_WORDS[test.outcome]} on {_where(test.split)}: "
    )
    part = test.deciding
    if part is None:
        return about + (
            "nothing to compare with, no other K or proxy is in the table."
            if test.claim == "C4"
            else "its statistics are undefined here."
        )
    numbers = f"{part.estimate.value:+.3g} [{low:+.3g}, {high:+.3g}]"
    text = {
        "C1": f"Spearman of d*c minus Spearman of d is {numbers}",
        "C2": (
            f"the top less the bottom tertile of compatibility in Q3 {_kind(part)} {numbers}"
            f" {UNITS[test.outcome]}"
        ),
        "C3": f"beta(d*c) minus beta(d*(1 - c)) is {numbers}",
        "C4": (
            f"{_agreeing(test)} of {len(test.parts)} statistics over {_variants(test)} lie above 0,"
            f" and the one that decides, {part.statistic.replace('_', ' ')} with {part.proxy} at K"
            f" = {part.k}, is {numbers}"
        ),
    }[test.claim]
    missing = f"; {test.undefined} more could not be computed" if test.undefined else ""
    return (
        f"{about}{text}{remark}{missing} ({part.estimate.prompts} prompts; p = {p:.2g} after Holm"
        f" over {looks} looks)."
    )


def _where(split: str) -> str:
    return {"all": "all positions", "step": "step positions", "held_out": "held-out positions"}[
        split
    ]


def _kind(part: Finding) -> str:
    return (
        "differ by"
        if part.statistic == "tertile_difference"
        else "differ, matched within prompts, by"
    )


def _agreeing(test: ClaimTest) -> int:
    return sum(part.estimate.value > 0 for part in test.parts)


def _variants(test: ClaimTest) -> str:
    pairs = {(part.proxy, part.k) for part in test.parts}
    supports = sorted({k for _, k in pairs})
    return f"{len(pairs)} other supports (K = {', '.join(map(str, supports))})"


# C5, from a grid of trainings


def of_training(table: pd.DataFrame) -> pd.DataFrame:
    """C5 in the columns of `verdicts`.

    Args:
        table: Verdicts of a grid of trainings, as from `training_outcomes.verdict_table`.

    Returns:
        One row per measure and budget. outcome is the measure and split is `training`; the numbers
        are those of the rival that decides: the one closest to overtaking where the claim is
        supported, the one furthest ahead where it is refuted. positions is 0.

    Raises:
        DiagnosticsError: If a column is missing.
    """
    require_columns(
        table,
        (
            "claim",
            "measure",
            "budget",
            "rival",
            "difference",
            "low",
            "high",
            "margin",
            "verdict",
            "seeds",
            "prompts",
        ),
        what="A table of training verdicts",
    )
    overall = table[table["rival"] == "all"]
    return pd.DataFrame([_training_row(row, _rivals(table, row)) for row in overall.itertuples()])


def _rivals(table: pd.DataFrame, row) -> pd.DataFrame:
    same = (
        (table["claim"] == row.claim)
        & (table["measure"] == row.measure)
        & (table["rival"] != "all")
    )
    return table[same]


def _training_row(row, rivals: pd.DataFrame) -> dict:
    ends = rivals.dropna(subset=["low", "high"])
    by = "high" if row.verdict == "refuted" else "low"
    part = ends.loc[ends[by].idxmin()] if len(ends) else None
    number = {
        name: part[name] if part is not None else np.nan for name in ("difference", "low", "high")
    }
    return {
        "claim": row.claim,
        "statement": STATEMENTS["C5"].replace("5 %", f"{row.budget:.0%}".replace("%", " %")),
        "outcome": row.measure,
        "split": "training",
        "primary": True,
        "verdict": row.verdict,
        "statistic": f"gain_over_{part['rival']}" if part is not None else "",
        "estimate": number["difference"],
        "low": number["low"],
        "high": number["high"],
        "p_value": np.nan,
        "p_corrected": np.nan,
        "looks": len(rivals),
        "parts": len(rivals),
        "sentence": _grid_sentence(row, rivals),
        "positions": 0,
        "prompts": row.prompts,
    }


def _grid_sentence(row, rivals: pd.DataFrame) -> str:
    about = f"{row.claim} is {row.verdict} for {row.measure.replace('_', ' ')}: "
    if not row.seeds >= MINIMUM_SEEDS:
        return about + f"fewer than {MINIMUM_SEEDS} seeds were trained."
    parts = [
        f"{one.rival} {one.difference:+.3g} [{one.low:+.3g}, {one.high:+.3g}]"
        for one in rivals.itertuples()
    ]
    missing = sorted(set(RIVALS) - set(rivals["rival"]))
    gap = f"; not trained: {', '.join(missing)}" if missing else ""
    return (
        f"{about}the gain of teachability minus that of {'; '.join(parts)} ({row.seeds:.0f} seeds,"
        f" {row.prompts:.0f} prompts; it may fall short by {row.margin:.3g} and still match){gap}."
    )
