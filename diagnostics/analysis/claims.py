"""What the study says about claims C1-C5.

    C1  raw KL is a coarse proxy               spearman_difference > 0, beyond the placebo's
    C2  in Q3, compatible beats incompatible   tertile_difference > 0 and matched_difference > 0
    C3  learnable disagreement carries it      decomposition > 0
    C4  not an artefact of K or the proxy      C2 and C3 for every other K and proxy of compatibility
    C5  TA-OPD at 5 % matches or beats full    training runs: held-out KL and accuracy
        OPD and the other criteria

A verdict comes from tests, never from a point. A claim of several parts is supported where every
part is above 0 (its p value is the largest, intersection-union), refuted where some part is below 0
(the smallest p of the parts below 0, times the number of parts, Bonferroni). Within a split, the
claims C1-C4 for both gains are eight looks: Holm's correction holds the chance of any false verdict
among them at 1 - level, and the interval shown is the one at the level that Holm leaves to its row.
The primary split is `all`; `step` and `held_out` are reported with a correction of their own.

C5 is judged in `validation`, over seeds and prompts; here it only takes the form of the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.robustness import GAINS, Finding
from diagnostics.core.schema import require_columns

STATEMENTS = {
    "C1": "raw KL is a coarse proxy: teachability ranks the gain better than divergence does",
    "C2": "among confident and wrong positions, compatible ones gain more than incompatible ones",
    "C3": "learnable disagreement carries the effect: d*c weighs more than d*(1 - c)",
    "C4": "C2 and C3 do not depend on K or on the proxy of compatibility",
    "C5": "TA-OPD at 5 % matches or beats full OPD, entropy, divergence and TIP",
}
PARTS = {
    "C1": ("spearman_difference",),
    "C2": ("tertile_difference", "matched_difference"),
    "C3": ("decomposition",),
    "C4": ("tertile_difference", "matched_difference", "decomposition"),
}
OUTCOME_WORDS = {"gain": "absolute gain", "relative_gain": "relative gain"}
UNITS = {"gain": "nats", "relative_gain": "of D"}
UNBALANCED = 0.1
"""Standard deviations by which matched pairs may differ before it is said."""
TA_BUDGET = 0.05
RIVALS = ("full", "entropy", "divergence", "tip")
MINIMUM_SEEDS = 3


@dataclass(frozen=True)
class ClaimTest:
    """One claim for one gain on one split, before the correction."""

    claim: str
    outcome: str
    split: str
    parts: tuple[Finding, ...]
    """The claim's parts that are defined."""
    undefined: int
    """Parts that could not be computed."""

    @property
    def deciding(self) -> Finding | None:
        """The part with the weakest support, or the one that speaks most against the claim."""
        if not self.parts:
            return None
        against = [part for part in self.parts if part.estimate.value < 0]
        return min(against, key=_p) if against else max(self.parts, key=_p)

    @property
    def p_value(self) -> float:
        """Of the claim being false where all parts lie above 0, of it being true where some lie
        below.
        """
        if not self.parts:
            return np.nan
        part = self.deciding
        return min(1.0, _p(part) * len(self.parts)) if part.estimate.value < 0 else _p(part)

    def verdict(self, p_corrected: float, level: float) -> str:
        """supported, refuted or inconclusive."""
        if not p_corrected <= 1 - level:
            return "inconclusive"
        if self.deciding.estimate.value < 0:
            return "refuted"
        return "supported" if not self.undefined or self.claim == "C4" else "inconclusive"


def _p(finding: Finding) -> float:
    return finding.estimate.p_value


def verdicts(
    found: Sequence[Finding],
    *,
    level: float = 0.95,
    placebo: Collection[str] = GAINS,
    imbalance: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """C1-C4 for both gains on every split.

    found: the statistics of `robustness.findings`; placebo: outcomes that have one, so that C1 went
    beyond it; imbalance: by how many standard deviations matched pairs still differ, by split, to
    be said where it is more than a tenth. Returns columns claim, statement, outcome, split,
    primary, verdict, statistic (of the deciding part), estimate, low, high, p_value, p_corrected,
    looks, parts, sentence, positions, prompts."""
    rows = []
    for split in dict.fromkeys(finding.split for finding in found):
        here = [finding for finding in found if finding.split == split]
        looks = [
            _look(claim, outcome, split, here)
            for claim in PARTS
            for outcome in GAINS
            if _has(here, outcome)
        ]
        corrected = bootstrap.holm([look.p_value for look in looks])
        levels = _holm_levels([look.p_value for look in looks], level)
        rows += [
            _row(
                look,
                p,
                at,
                len(looks),
                level,
                _remark(look, here, level, placebo, (imbalance or {}).get(split, 0.0)),
            )
            for look, p, at in zip(looks, corrected, levels, strict=True)
        ]
    return pd.DataFrame(rows)


def _remark(
    look: ClaimTest,
    found: Sequence[Finding],
    level: float,
    placebo: Collection[str],
    imbalance: float,
) -> str:
    """What the sentence of a claim should not leave out."""
    if look.claim == "C1":
        return " beyond the placebo's" if look.outcome in placebo else ", without a placebo"
    if look.claim == "C2" and imbalance > UNBALANCED:
        return (
            f"; matched pairs still differ by up to {imbalance:.1f} standard deviations in what"
            " they were matched on"
        )
    if look.claim == "C3":
        units = [
            f
            for f in found
            if (f.statistic, f.outcome) == ("decomposition_per_unit", look.outcome)
            and f.proxy == found[0].proxy
            and f.k == found[0].k
        ]
        if units:
            low, high = units[0].estimate.interval(level)
            return (
                f", per unit of d {units[0].estimate.value:+.3g} [{low:+.3g}, {high:+.3g}]"
                f" {UNITS[look.outcome]}"
            )
    return ""


def _has(found: Sequence[Finding], outcome: str) -> bool:
    return any(finding.outcome == outcome for finding in found)


def _look(claim: str, outcome: str, split: str, found: Sequence[Finding]) -> ClaimTest:
    base = next(finding for finding in found)
    mine = [
        finding
        for finding in found
        if finding.outcome == outcome
        and finding.statistic in PARTS[claim]
        and ((finding.proxy, finding.k) == (base.proxy, base.k)) == (claim != "C4")
    ]
    defined = tuple(finding for finding in mine if np.isfinite(_p(finding)))
    return ClaimTest(claim, outcome, split, defined, len(mine) - len(defined))


def _holm_levels(p_values: Sequence[float], level: float) -> np.ndarray:
    """Level of each row's interval such that it excludes 0 exactly where Holm rejects."""
    p_values, alpha = np.asarray(p_values, dtype=np.float64), 1 - level
    order = np.argsort(p_values)
    order = order[np.isfinite(p_values[order])]
    levels, share = np.full(p_values.shape, level), alpha
    for rank, at in enumerate(order):
        share = alpha / (len(order) - rank)
        if p_values[at] > share:
            levels[order[rank:]] = 1 - share
            break
        levels[at] = 1 - share
    return levels


def _row(look: ClaimTest, p: float, at: float, looks: int, level: float, remark: str) -> dict:
    verdict, part = look.verdict(p, level), look.deciding
    if part is not None and part.estimate.value < 0:
        at = 1 - (1 - at) / len(look.parts)
    estimate = part.estimate if part else Estimate(np.nan, np.empty(0), 0, 0)
    low, high = estimate.interval(at) if part else (np.nan, np.nan)
    return {
        "claim": look.claim,
        "statement": STATEMENTS[look.claim],
        "outcome": look.outcome,
        "split": look.split,
        "primary": look.split == "all",
        "verdict": verdict,
        "statistic": part.statistic if part else "",
        "estimate": estimate.value,
        "low": low,
        "high": high,
        "p_value": look.p_value,
        "p_corrected": p,
        "looks": looks,
        "parts": len(look.parts),
        "sentence": _sentence(look, verdict, low, high, p, looks, remark),
        "positions": estimate.positions,
        "prompts": estimate.prompts,
    }


def _sentence(
    look: ClaimTest, verdict: str, low: float, high: float, p: float, looks: int, remark: str
) -> str:
    """One plain sentence with the numbers."""
    about = (
        f"{look.claim} is {verdict} for the {OUTCOME_WORDS[look.outcome]} on {_where(look.split)}: "
    )
    part = look.deciding
    if part is None:
        return about + (
            "nothing to compare with, no other K or proxy is in the table."
            if look.claim == "C4"
            else "its statistics are undefined here."
        )
    numbers = f"{part.estimate.value:+.3g} [{low:+.3g}, {high:+.3g}]"
    text = {
        "C1": f"Spearman of d*c minus Spearman of d is {numbers}",
        "C2": (
            f"the top less the bottom tertile of compatibility in Q3 {_kind(part)} {numbers}"
            f" {UNITS[look.outcome]}"
        ),
        "C3": f"beta(d*c) minus beta(d*(1 - c)) is {numbers}",
        "C4": (
            f"{_agreeing(look)} of {len(look.parts)} statistics over {_variants(look)} lie above 0,"
            f" and the one that decides, {part.statistic.replace('_', ' ')} with {part.proxy} at K"
            f" = {part.k}, is {numbers}"
        ),
    }[look.claim]
    missing = f"; {look.undefined} more could not be computed" if look.undefined else ""
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


def _agreeing(look: ClaimTest) -> int:
    return sum(part.estimate.value > 0 for part in look.parts)


def _variants(look: ClaimTest) -> str:
    pairs = {(part.proxy, part.k) for part in look.parts}
    supports = sorted({k for _, k in pairs})
    return f"{len(pairs)} other supports (K = {', '.join(map(str, supports))})"


# --- C5
# ---------------------------------------------------------------------------------------------


def of_training(table: pd.DataFrame) -> pd.DataFrame:
    """C5 in the columns of `verdicts`: a row for each measure and budget of
    `validation.verdict_table`.

    outcome is the measure, split `training`; the numbers are those of the rival that decides: the
    one closest to overtaking where the claim is supported, the one furthest ahead where it is
    refuted. positions is 0. Raises DiagnosticsError where columns are missing."""
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
    return pd.DataFrame([_of_grid(row, _rivals(table, row)) for row in overall.itertuples()])


def _rivals(table: pd.DataFrame, row) -> pd.DataFrame:
    same = (
        (table["claim"] == row.claim)
        & (table["measure"] == row.measure)
        & (table["rival"] != "all")
    )
    return table[same]


def _of_grid(row, rivals: pd.DataFrame) -> dict:
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
