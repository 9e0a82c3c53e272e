"""What the study says about claims C1-C5.

    C1  raw KL is a coarse proxy               spearman_difference > 0, beyond the placebo's
    C2  in Q3, compatible beats incompatible   tertile_difference > 0 and matched_difference > 0
    C3  learnable disagreement carries it      decomposition > 0
    C4  not an artefact of K or the proxy      C2 and C3 for every other K and proxy of compatibility
    C5  TA-OPD at 5 % matches or beats full    training runs: held-out KL and accuracy
        OPD and the other criteria

A verdict comes from tests, never from a point. A claim of several parts is supported where every part is
above 0 (its p value is the largest, intersection-union), refuted where some part is below 0 (the smallest p
of the parts below 0, times the number of parts, Bonferroni). Within a split, the claims C1-C4 for both gains
are eight looks: Holm's correction holds the chance of any false verdict among them at 1 - level, and the interval
shown is the one at the level that Holm leaves to its row. The primary split is `all`; `step` and `held_out`
are reported with a correction of their own.

C5 pairs runs by seed: supported where TA-OPD is at most a margin worse than each rival, refuted where it is worse than
some rival and the margin is not held; held-out KL and accuracy have a row each, Bonferroni over all comparisons.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics import criteria as registry
from diagnostics import statistics
from diagnostics.robustness import GAINS, Finding
from diagnostics.statistics import Estimate
from diagnostics.types import require_columns

STATEMENTS = {
    "C1": "raw KL is a coarse proxy: teachability ranks the gain better than divergence does",
    "C2": "among confident and wrong positions, compatible ones gain more than incompatible ones",
    "C3": "learnable disagreement carries the effect: d*c weighs more than d*(1 - c)",
    "C4": "C2 and C3 do not depend on K or on the proxy of compatibility",
    "C5": "TA-OPD at 5 % matches or beats full OPD, entropy, divergence and TIP",
}
PARTS = {
    "C1": ("spearman_difference",), "C2": ("tertile_difference", "matched_difference"), "C3": ("decomposition",),
    "C4": ("tertile_difference", "matched_difference", "decomposition"),
}
OUTCOME_WORDS = {"gain": "absolute gain", "relative_gain": "relative gain"}
UNITS = {"gain": "nats", "relative_gain": "of D"}
UNBALANCED = 0.1
"""Standard deviations by which matched pairs may differ before it is said."""
TA_BUDGET = 0.05
RIVALS = ("full", "entropy", "divergence", "tip")
MARGINS = {"held_out_kl": 0.02, "accuracy": 0.01}
"""How much worse still *matches*: nats of held-out KL, and share of tasks solved."""
MINIMUM_SEEDS = 3


@dataclass(frozen=True)
class Look:
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
        """Of the claim being false where all parts lie above 0, of it being true where some lie below."""
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
    found: Sequence[Finding], *, level: float = 0.95, placebo: Collection[str] = GAINS, imbalance: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """C1-C4 for both gains on every split.

    found: the statistics of `robustness.findings`; placebo: outcomes that have one, so that C1 went beyond
    it; imbalance: by how many standard deviations matched pairs still differ, by split, to be said where it is more than
    a tenth. Returns columns
    claim, statement, outcome, split, primary, verdict, statistic (of the deciding part), estimate, low, high, p_value,
    p_corrected, looks, parts, sentence, positions, prompts.
    """
    rows = []
    for split in dict.fromkeys(finding.split for finding in found):
        here = [finding for finding in found if finding.split == split]
        looks = [_look(claim, outcome, split, here) for claim in PARTS for outcome in GAINS if _has(here, outcome)]
        corrected = statistics.holm([look.p_value for look in looks])
        levels = _holm_levels([look.p_value for look in looks], level)
        rows += [
            _row(look, p, at, len(looks), level, _remark(look, here, level, placebo, (imbalance or {}).get(split, 0.0)))
            for look, p, at in zip(looks, corrected, levels, strict=True)
        ]
    return pd.DataFrame(rows)


def _remark(look: Look, found: Sequence[Finding], level: float, placebo: Collection[str], imbalance: float) -> str:
    """What the sentence of a claim should not leave out."""
    if look.claim == "C1":
        return " beyond the placebo's" if look.outcome in placebo else ", without a placebo"
    if look.claim == "C2" and imbalance > UNBALANCED:
        return f"; matched pairs still differ by up to {imbalance:.1f} standard deviations in what they were matched on"
    if look.claim == "C3":
        units = [f for f in found if (f.statistic, f.outcome) == ("decomposition_per_unit", look.outcome) and f.proxy == found[0].proxy and f.k == found[0].k]
        if units:
            low, high = units[0].estimate.interval(level)
            return f", per unit of d {units[0].estimate.value:+.3g} [{low:+.3g}, {high:+.3g}] {UNITS[look.outcome]}"
    return ""


def _has(found: Sequence[Finding], outcome: str) -> bool:
    return any(finding.outcome == outcome for finding in found)


def _look(claim: str, outcome: str, split: str, found: Sequence[Finding]) -> Look:
    base = next(finding for finding in found)
    mine = [
        finding for finding in found
        if finding.outcome == outcome and finding.statistic in PARTS[claim]
        and ((finding.proxy, finding.k) == (base.proxy, base.k)) == (claim != "C4")
    ]
    defined = tuple(finding for finding in mine if np.isfinite(_p(finding)))
    return Look(claim, outcome, split, defined, len(mine) - len(defined))


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


def _row(look: Look, p: float, at: float, looks: int, level: float, remark: str) -> dict:
    verdict, part = look.verdict(p, level), look.deciding
    if part is not None and part.estimate.value < 0:
        at = 1 - (1 - at) / len(look.parts)
    estimate = part.estimate if part else Estimate(np.nan, np.empty(0), 0, 0)
    low, high = estimate.interval(at) if part else (np.nan, np.nan)
    return {
        "claim": look.claim, "statement": STATEMENTS[look.claim], "outcome": look.outcome, "split": look.split,
        "primary": look.split == "all", "verdict": verdict, "statistic": part.statistic if part else "",
        "estimate": estimate.value, "low": low, "high": high, "p_value": look.p_value, "p_corrected": p, "looks": looks,
        "parts": len(look.parts), "sentence": _sentence(look, verdict, low, high, p, looks, remark),
        "positions": estimate.positions, "prompts": estimate.prompts,
    }


def _sentence(look: Look, verdict: str, low: float, high: float, p: float, looks: int, remark: str) -> str:
    """One plain sentence with the numbers."""
    about = f"{look.claim} is {verdict} for the {OUTCOME_WORDS[look.outcome]} on {_where(look.split)}: "
    part = look.deciding
    if part is None:
        return about + ("nothing to compare with, no other K or proxy is in the table." if look.claim == "C4"
                        else "its statistics are undefined here.")
    numbers = f"{part.estimate.value:+.3g} [{low:+.3g}, {high:+.3g}]"
    text = {
        "C1": f"Spearman of d*c minus Spearman of d is {numbers}",
        "C2": f"the top less the bottom tertile of compatibility in Q3 {_kind(part)} {numbers} {UNITS[look.outcome]}",
        "C3": f"beta(d*c) minus beta(d*(1 - c)) is {numbers}",
        "C4": f"{_agreeing(look)} of {len(look.parts)} statistics over {_variants(look)} lie above 0, and the one that decides, "
              f"{part.statistic.replace('_', ' ')} with {part.proxy} at K = {part.k}, is {numbers}",
    }[look.claim]
    missing = f"; {look.undefined} more could not be computed" if look.undefined else ""
    return f"{about}{text}{remark}{missing} ({part.estimate.prompts} prompts; p = {p:.2g} after Holm over {looks} looks)."


def _where(split: str) -> str:
    return {"all": "all positions", "step": "step positions", "held_out": "held-out positions"}[split]


def _kind(part: Finding) -> str:
    return "differ by" if part.statistic == "tertile_difference" else "differ, matched within prompts, by"


def _agreeing(look: Look) -> int:
    return sum(part.estimate.value > 0 for part in look.parts)


def _variants(look: Look) -> str:
    pairs = {(part.proxy, part.k) for part in look.parts}
    supports = sorted({k for _, k in pairs})
    return f"{len(pairs)} other supports (K = {', '.join(map(str, supports))})"


# --- C5 ---------------------------------------------------------------------------------------------


def training_verdict(training: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """C5 from training runs, in the columns of `verdicts`; outcome is the measure, positions and prompts are 0.

    training: one row a run with criterion, budget, seed, held_out_kl (nats) and accuracy (share). Teachability
    at 5 % is compared, paired by seed, with each of full, entropy, divergence and tip at 5 % (full at its own).
    """
    require_columns(training, ("criterion", "budget", "seed", *MARGINS), what="The table of training runs")
    training = training.assign(criterion=[registry.find(name).name for name in training["criterion"]])
    rivals = [rival for rival in RIVALS if _runs(training, rival, "accuracy") is not None]
    looks = len(rivals) * len(MARGINS)
    return pd.DataFrame([
        _training_row(measure, {rival: _advantage(training, rival, measure) for rival in rivals}, looks, level) for measure in MARGINS
    ])


def _runs(training: pd.DataFrame, criterion: str, measure: str) -> pd.Series | None:
    """Measure by seed of a criterion at its budget; None where there is no such run."""
    mine = training[training["criterion"] == criterion]
    if criterion != "full":
        mine = mine[np.isclose(mine["budget"], TA_BUDGET)]
    return mine.groupby("seed")[measure].mean() if len(mine) else None


def _advantage(training: pd.DataFrame, rival: str, measure: str) -> np.ndarray:
    """[seeds] by how much teachability is better than the rival; lower is better for a KL."""
    mine, other = _runs(training, "teachability", measure), _runs(training, rival, measure)
    if mine is None:
        return np.empty(0)
    difference = (mine - other).dropna().to_numpy()
    return -difference if measure == "held_out_kl" else difference


def _training_row(measure: str, advantages: dict[str, np.ndarray], looks: int, level: float) -> dict:
    seeds = min((len(values) for values in advantages.values()), default=0)
    found = {rival: _t_interval(values, 1 - (1 - level) / max(looks, 1)) for rival, values in advantages.items()}
    weakest = min(found, key=lambda rival: found[rival][1]) if found and seeds >= MINIMUM_SEEDS else None
    value, low, high = found[weakest] if weakest else (np.nan, np.nan, np.nan)
    verdict = "inconclusive"
    if low > -MARGINS[measure]:
        verdict = "supported" if set(found) == set(RIVALS) else verdict
    elif any(ends[1] <= -MARGINS[measure] and ends[2] < 0 for ends in found.values()) and weakest:
        weakest = min(found, key=lambda rival: found[rival][2])
        (value, low, high), verdict = found[weakest], "refuted"
    return {
        "claim": "C5", "statement": STATEMENTS["C5"], "outcome": measure, "split": "training", "primary": True,
        "verdict": verdict, "statistic": f"advantage_over_{weakest}" if weakest else "", "estimate": value, "low": low,
        "high": high, "p_value": np.nan, "p_corrected": np.nan, "looks": looks, "parts": len(found),
        "sentence": _training_sentence(measure, verdict, weakest, (value, low, high), seeds, set(RIVALS) - set(found)),
        "positions": 0, "prompts": 0,
    }


def _t_interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    if len(values) < 2:
        return (float(values.mean()) if len(values) else np.nan), np.nan, np.nan
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - reach), float(values.mean() + reach)


def _training_sentence(measure: str, verdict: str, weakest: str | None, ends, seeds: int, missing: set[str]) -> str:
    about = f"C5 is {verdict} for {measure.replace('_', ' ')}: "
    if weakest is None:
        return about + f"{seeds} paired seeds are fewer than {MINIMUM_SEEDS}, or teachability at 5 % was not run."
    gap = f"; not run: {', '.join(sorted(missing))}" if missing else ""
    return about + (
        f"teachability at 5 % is better than {weakest}, its closest rival, by {ends[0]:+.3g} [{ends[1]:+.3g}, {ends[2]:+.3g}] "
        f"over {seeds} seeds (a margin of {MARGINS[measure]:g} still matches){gap}."
    )
