"""One verdict per claim C1-C5, as the paper has it and controlled, with its test and its reason.

    C1  raw KL is a coarse proxy               C4  not an artefact of K or of the proxy
    C2  in Q3, compatible beats incompatible   C5  TA-OPD at 5 % matches or beats full OPD and the
    C3  learnable disagreement carries it          other criteria (trainings)

`claim_statistics` has the statistics of C1 to C4. A verdict comes from a test, never from a point
estimate, and is one of

    supported, refuted    Holm's corrected p is at most 1 - level, and the sign says which
    inconclusive          the test does not decide, or C3 turns over with the scale
    not identified        there is nothing to test against: no permuted teacher, fewer than 20
                          prompts, no overlap, an interval without width, or nothing to compare

C4 as the paper has it asks for a gap in Q3 with every K and every measurement (intersection-union
for, Bonferroni against). Controlled, it is an equivalence: T_K lies between (1 - m) T and (1 + m) T
for the margin m and T at the table's own K, by two one-sided tests that carry the error of T as
well; a proxy must have the sign of T. It is tested on those of C2 and C3 that have a verdict
themselves. A measurement is a proxy where its rank correlation with C inside Q3 is .7 or more.

Holm's correction goes over the tests of one kind and outcome on one population; an interval has the
level that Holm leaves to its row. Only the controlled tests on the primary
population and outcome confirm anything, and only where `PrimaryChoices` were recorded before the
probe. All else is `exploratory`.

References: arXiv 2605.26844 (the claims); Holm 1979; Berger 1982 (intersection-union tests);
Schuirmann 1987 (two one-sided tests).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy  # its parts are loaded where they are used: a page needs none

from diagnostics.analysis import claim_statistics as statistics
from diagnostics.analysis.bootstrap import Estimate, holm
from diagnostics.analysis.claim_statistics import Overlap, Statistic, Support
from diagnostics.analysis.config import SIGNAL, Bootstrap, PrimaryChoices
from diagnostics.analysis.responses import ALL, NOT_REGISTERED
from diagnostics.analysis.robustness import supports as supports_of
from diagnostics.analysis.splits import Split, splits
from diagnostics.core.folds import step_count
from diagnostics.core.schema import require_columns

STATEMENTS = {
    ("C1", "paper"): (
        "raw KL is a coarse proxy: teachability orders the gain better than divergence does (by"
        " rank correlations, of which the paper has no table)"
    ),
    ("C1", "controlled"): (
        "raw KL is a coarse proxy: at equal divergence, positions within the student's reach gain"
        " more"
    ),
    ("C2", "paper"): (
        "among confident and wrong positions, compatible ones gain more than incompatible ones"
    ),
    ("C2", "controlled"): (
        "among confident and wrong positions, compatible ones gain more than incompatible ones of"
        " equal divergence, entropy and position"
    ),
    ("C3", "paper"): "learnable disagreement carries the effect: d*c weighs more than d*(1 - c)",
    ("C3", "controlled"): (
        "learnable disagreement carries the effect: divergence pays more where a position is"
        " compatible"
    ),
    ("C4", "paper"): "C2 holds for every K and for every measurement of compatibility",
    ("C4", "controlled"): "C2 and C3 do not depend on K or on the proxy of compatibility",
    ("C5", "controlled"): "TA-OPD at 5 % matches or beats full OPD, entropy, divergence and TIP",
}
CLAIM_STATISTICS = {
    ("C1", "paper"): "spearman_difference",
    ("C2", "paper"): "q3_gap",
    ("C3", "paper"): "standardised",
    ("C1", "controlled"): "within_strata",
    ("C2", "controlled"): "overlap_contrast",
    ("C3", "controlled"): "interaction",
}
SCALES = ("standardised", "per_unit", "interaction")
"""The scales on which C3 is looked at."""
OUTCOME_WORDS = {
    "context_gain": "context gain",
    "context_gain_divergence": "context gain (teacher permuted within deciles of D)",
    "context_gain_token_type": "context gain (teacher permuted within token types)",
    "gain": "gain",
    "relative_gain": "relative gain",
}
PAPER_OUTCOME = "gain"
"""The paper's own outcome, which has no null; its rows explore."""
PAPER_PROXIES = ("compatibility", "compatibility_intersection", "topk_overlap", "bhattacharyya")
"""What the paper measures compatibility by; topk_jaccard ranks as topk_overlap and counts once."""
TWINS = {"topk_jaccard": "topk_overlap"}
"""Measurements that order positions as another one does, and that are left out beside it."""
PROXY = 0.7
"""Absolute rank correlation with C inside Q3 from which a measurement is a proxy of it."""
IMBALANCE_LIMIT = 0.1
"""Standardized difference above which two groups are not comparable."""
PARTNERED = 0.5
"""Share of the top tertile that must have a partner in the bottom one."""
FEWEST_EFFECTIVE = 20.0
"""Effective number of positions that each tertile must keep under the overlap weights."""
REASONS = {
    "no_null": "no permuted-teacher step in this table",
    "few_prompts": "fewer than",
    "no_signal": "nothing to learn",
    "no_overlap": "no overlap",
    "unbalanced": "the groups stay apart",
    "no_width": "its interval has no width",
    "undefined": "its statistic is undefined",
    "no_base": "neither C2 nor C3 has a verdict",
    "no_support": "no other K or proxy of compatibility is in this table",
    "scale": "depends on the scale",
    "partly_undefined": "some of its comparisons are undefined",
    "holds_zero": "its test does not decide",
    "power": "the margin cannot be tested",
    "few_seeds": "too few seeds",
}
"""How the reason of a verdict begins, by cause."""
VERDICT_COLUMNS = (
    "claim",
    "statement",
    "kind",
    "outcome",
    "population",
    "primary",
    "exploratory",
    "verdict",
    "reason",
    "statistic",
    "estimate",
    "low",
    "high",
    "p_value",
    "p_corrected",
    "looks",
    "prompts",
    "steps",
    "positions",
    "sentence",
)
TA_BUDGET = 0.05
RIVALS = ("full", "entropy", "divergence", "tip")
MINIMUM_SEEDS = 3
NOTHING = Estimate(np.nan, np.empty(0), 0, 0)


@dataclass(frozen=True)
class Part:
    """One comparison of a claim's test.

    Attributes:
        statistic: What is compared.
        estimate: Its value.
        p_for: P value against the claim's negation.
        p_against: P value against the claim.
        one_sided: Whether the p values are of one-sided tests.
    """

    statistic: str
    estimate: Estimate
    p_for: float
    p_against: float
    one_sided: bool = False


@dataclass(frozen=True)
class ClaimTest:
    """The test of one claim for one outcome on one population, before the correction.

    Attributes:
        claim: C1, C2, C3 or C4.
        kind: `paper` or `controlled`.
        outcome: Column of the outcome.
        population: `held_out`, `step` or `all`.
        parts: Its comparisons that are defined.
        bar: Why there can be no verdict; empty where there can.
        turns: Why the test alone does not decide: the scale, or comparisons that are undefined.
        note: What its sentence says besides.
    """

    claim: str
    kind: str
    outcome: str
    population: str
    parts: tuple[Part, ...] = ()
    bar: str = ""
    turns: str = ""
    note: str = ""

    @property
    def p_for(self) -> float:
        """All parts must hold: the largest of their p values."""
        return max((part.p_for for part in self.parts), default=np.nan)

    @property
    def p_against(self) -> float:
        """One part suffices: the smallest of their p values, times their number."""
        return min((min(1.0, p.p_against * len(self.parts)) for p in self.parts), default=np.nan)

    @property
    def p_value(self) -> float:
        """The smaller of both; NaN where there can be no verdict."""
        return np.nan if self.bar else min(self.p_for, self.p_against)

    @property
    def against(self) -> bool:
        """Whether the test speaks against the claim."""
        return self.p_against < self.p_for

    @property
    def deciding(self) -> Part | None:
        """The part with the weakest support, or the one that contradicts the claim most."""
        if not self.parts:
            return None
        return (
            min(self.parts, key=lambda part: part.p_against)
            if self.against
            else max(self.parts, key=lambda part: part.p_for)
        )

    def verdict(self, p_corrected: float, level: float) -> tuple[str, str]:
        """Judge the claim.

        Args:
            p_corrected: The p value after the correction for all tests looked at.
            level: 1 - level is the chance of a false verdict that is accepted.

        Returns:
            The verdict, and its reason where it is not decided.
        """
        if self.bar:
            return "not identified", self.bar
        if not p_corrected <= 1 - level:
            return "inconclusive", self.turns or REASONS["holds_zero"]
        if self.turns.startswith(REASONS["scale"]):
            return "inconclusive", self.turns
        if self.against:
            return "refuted", ""
        return ("inconclusive", self.turns) if self.turns else ("supported", "")


@dataclass(frozen=True)
class Found:
    """What a token table says about the claims, before any verdict.

    Attributes:
        estimates: Every statistic.
        base: Compatibility itself.
        overlaps: The diagnosis of C2, by population.
        strata: The rank correlations of C1 inside each stratum of D with the numbers of positions,
            by population; none where the primary outcome is missing.
        others: Other K and measurements, with their rank correlation with C inside Q3 of the
            primary population; NaN for another K.
        primary: The population that verdicts lead with.
        steps: Number of steps of the table.
        populations: Number of prompts of each population.
        divergence: Mean forward KL of all positions, KL(q||p) in nats.
    """

    estimates: Mapping[Statistic, Estimate]
    base: Support
    overlaps: Mapping[str, Overlap | None]
    strata: Mapping[str, tuple[np.ndarray, np.ndarray]]
    others: Mapping[Support, float]
    primary: str
    steps: int
    populations: Mapping[str, int]
    divergence: float

    def of(self, population: str, outcome: str, name: str, support: Support) -> Estimate | None:
        """An estimate; None where it was not made."""
        return self.estimates.get(
            Statistic(population, outcome, name, support.proxy, support.k), None
        )

    def measured(self, outcome: str) -> bool:
        """Whether the table has an outcome."""
        return any(key.outcome == outcome for key in self.estimates)

    @property
    def proxies(self) -> list[Support]:
        """Other measurements that are proxies of compatibility here."""
        return [each for each, rho in self.others.items() if abs(rho) >= PROXY]

    @property
    def sizes(self) -> list[Support]:
        """Compatibility at another K."""
        return [each for each in self.others if each.proxy == self.base.proxy]

    @property
    def strangers(self) -> dict[str, float]:
        """Measurements that are no proxies of compatibility on this pair, with their rho."""
        apart = set(self.proxies) | set(self.sizes)
        return {each.column: rho for each, rho in self.others.items() if each not in apart}


def look(
    tokens: pd.DataFrame,
    *,
    base_k: int,
    bootstrap: Bootstrap,
    choices: PrimaryChoices = PrimaryChoices(),
) -> Found:
    """Compute every statistic of C1 to C4 from a token table.

    Args:
        tokens: A token table with `claim_statistics.NEEDED` and at least one outcome.
        base_k: K of the columns without a suffix.
        bootstrap: How the intervals are made.
        choices: The primary choices.
    """
    base = Support("compatibility", base_k, "compatibility")
    parts = list(splits(tokens, bootstrap=replace(bootstrap, draws=0)))
    names = [split.name for split in parts]
    primary = choices.population if choices.population in names else names[0]
    lead = parts[names.index(primary)]
    others = _others(tokens, lead, base, base_k)
    kinds = {choices.outcome: ("paper", "controlled"), PAPER_OUTCOME: ("paper",)}
    return Found(
        statistics.estimates(
            tokens,
            {outcome: kind for outcome, kind in kinds.items() if outcome in tokens},
            base,
            _compared_supports(others, base),
            widened=primary,
            bootstrap=bootstrap,
        ),
        base,
        {split.name: statistics.overlap(tokens, split, base) for split in parts},
        _strata(tokens, parts, base, choices),
        others,
        primary,
        step_count(tokens),
        {split.name: split.prompts.count for split in parts},
        float(tokens["forward_kl"].mean()),
    )


def _compared_supports(others: Mapping[Support, float], base: Support) -> dict[str, list[Support]]:
    """By kind of claim, the supports that its robustness is judged on.

    Args:
        others: Their rank correlations with the base.
        base: The compatibility that the claims are about.
    """
    sizes = [each for each in others if each.proxy == base.proxy]
    rivals = [each for each, rho in others.items() if np.isfinite(rho)]
    return {
        "paper": sizes + [each for each in rivals if each.proxy in PAPER_PROXIES],
        "controlled": sizes
        + [
            replace(each, sign=-1) if others[each] < 0 else each
            for each in rivals
            if abs(others[each]) >= PROXY
        ],
    }


def _strata(
    tokens: pd.DataFrame, parts: Iterable[Split], base: Support, choices: PrimaryChoices
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for split in parts:
        columns, used = statistics.predictors(tokens, split, [base])
        values = split.values(tokens, choices.outcome)
        used &= np.isfinite(values)
        if used.any():
            found[split.name] = statistics.by_stratum(
                values[used], columns[base.column][used], columns["forward_kl"][used]
            )
    return found


def _others(tokens: pd.DataFrame, split: Split, base: Support, base_k: int) -> dict[Support, float]:
    """Other K of compatibility (NaN), and other measurements at the table's own K (rho)."""
    found: dict[Support, float] = {}
    for proxy, k, column in supports_of(tokens, base_k=base_k):
        other = Support(proxy, k, column)
        if other == base or (TWINS.get(proxy) in tokens and k == base_k):
            continue
        if proxy == base.proxy:
            found[other] = np.nan
        elif k == base_k:
            found[other] = statistics.resemblance(tokens, split, base, other)
    return found


# the tests


def claim_tests(found: Found, choices: PrimaryChoices) -> list[ClaimTest]:
    """The tests of C1 to C4 for every outcome and population, those of C4 without their base.

    Args:
        found: The statistics.
        choices: The primary choices.
    """
    made = []
    for population in found.populations:
        for outcome in dict.fromkeys((choices.outcome, PAPER_OUTCOME)):
            for kind in ("paper", "controlled"):
                if kind == "controlled" and outcome != choices.outcome:
                    continue
                if kind == "paper" and outcome == choices.outcome and not found.measured(outcome):
                    continue
                made += _tests(found, population, outcome, kind, choices)
    return made


def _tests(
    found: Found, population: str, outcome: str, kind: str, choices: PrimaryChoices
) -> Iterator[ClaimTest]:
    for claim in ("C1", "C2", "C3"):
        name = CLAIM_STATISTICS[claim, kind]
        estimate = found.of(population, outcome, name, found.base) or NOTHING
        bar = _bar(found, population, outcome, estimate, choices)
        if (claim, kind) == ("C2", "controlled") and not bar:
            bar = overlap_bar(found.overlaps.get(population))
        yield ClaimTest(
            claim,
            kind,
            outcome,
            population,
            (_two_sided(name, estimate),),
            bar,
            _turns(found, population, outcome, choices) if claim == "C3" else "",
            _note(found, claim, kind, population, outcome, choices),
        )
    if population == found.primary:
        yield (_paper_c4 if kind == "paper" else _controlled_c4)(
            found, population, outcome, choices
        )


def _two_sided(name: str, estimate: Estimate) -> Part:
    p = estimate.p_value
    above = estimate.value > 0
    return Part(name, estimate, p if above else 1.0, 1.0 if above else p)


def _bar(
    found: Found, population: str, outcome: str, estimate: Estimate, choices: PrimaryChoices
) -> str:
    """Why an estimate can have no verdict; empty where it can."""
    if not found.measured(outcome):
        return REASONS["no_null"]
    if found.populations[population] < choices.minimum_prompts:
        return f"{REASONS['few_prompts']} {choices.minimum_prompts} prompts"
    if found.divergence < SIGNAL:
        return f"{REASONS['no_signal']}: the models differ by their rounding alone"
    if not np.isfinite(estimate.value):
        return f"{REASONS['undefined']} (a measurement or the outcome does not vary)"
    if estimate.standard_error == 0:
        return REASONS["no_width"]
    if not np.isfinite(estimate.p_value):
        return f"{REASONS['undefined']} in too many draws, or without one of the steps"
    return ""


def overlap_bar(overlap: Overlap | None) -> str:
    """Why the two tertiles of C2 cannot be compared; empty where they can.

    Args:
        overlap: The diagnosis; None where a tertile is empty.
    """
    if overlap is None:
        return f"{REASONS['no_overlap']}: a tertile of compatibility inside Q3 is empty"
    if overlap.partners < PARTNERED:
        return (
            f"{REASONS['no_overlap']}: {overlap.partners:.0%} of the compatible positions in Q3"
            " have an incompatible one of like divergence and propensity, and half would be needed"
        )
    if not overlap.imbalance <= IMBALANCE_LIMIT:
        return (
            f"{REASONS['unbalanced']}: after weighting they differ by up to"
            f" {overlap.imbalance:.2f} standard deviations"
        )
    if min(overlap.effective) < FEWEST_EFFECTIVE:
        return (
            f"{REASONS['no_overlap']}: weighting leaves {min(overlap.effective):.0f} effective"
            f" positions a side, and {FEWEST_EFFECTIVE:.0f} would be needed"
        )
    return ""


def _turns(found: Found, population: str, outcome: str, choices: PrimaryChoices) -> str:
    """Says so where two scales of C3 are significantly of opposite sign."""
    sure = {}
    for name in SCALES:
        estimate = found.of(population, outcome, name, found.base)
        low, high = estimate.interval(choices.level) if estimate else (np.nan, np.nan)
        if (low > 0 or high < 0) and high > low:
            sure[name] = estimate.value
    above, below = ([n for n, v in sure.items() if (v > 0) == sign] for sign in (True, False))
    words = {
        "standardised": "per standard deviation",
        "per_unit": "per unit of d",
        "interaction": "as an interaction beside main effects",
    }
    if not above or not below:
        return ""
    return (
        f"{REASONS['scale']}: above 0 {' and '.join(words[n] for n in above)}, below 0"
        f" {' and '.join(words[n] for n in below)}"
    )


def _note(
    found: Found, claim: str, kind: str, population: str, outcome: str, choices: PrimaryChoices
) -> str:
    """Figures that a sentence gives beside its statistic."""

    def value(name: str) -> float:
        estimate = found.of(population, outcome, name, found.base)
        return estimate.value if estimate else np.nan

    overlap = found.overlaps.get(population)
    if kind == "paper" or not found.measured(outcome):
        return ""
    if claim == "C1" and np.isfinite(value("rank_share_both_add")):
        rho, _ = found.strata.get(population, (np.empty(0), np.empty(0)))
        above, defined = int((rho > 0).sum()), int(np.isfinite(rho).sum())
        return (
            f"; it is above 0 in {above} of {defined} tenths, and C adds"
            f" {value('rank_share_c_adds'):.3f} and H {value('rank_share_h_adds'):.3f} to the"
            f" {value('rank_share_d'):.3f} of the ranks' variance that D explains"
        )
    if claim == "C2" and overlap is not None:
        return (
            f"; {overlap.partners:.0%} of the compatible positions have a partner,"
            f" {overlap.effective[0]:.0f} against {overlap.effective[1]:.0f} effective positions"
        )
    if claim == "C3" and np.isfinite(value("standardised")):
        return f"; standardized and without main effects {value('standardised'):+.3g}"
    return ""


def _paper_c4(found: Found, population: str, outcome: str, choices: PrimaryChoices) -> ClaimTest:
    """The gap in Q3 with every other K and measurement of the paper."""
    parts, undefined = [], 0
    for other in found.others:
        estimate = found.of(population, outcome, "q3_gap", other)
        if estimate is None:
            continue
        undefined += not np.isfinite(estimate.p_value)
        if np.isfinite(estimate.p_value):
            parts.append(_two_sided(f"q3_gap with {other.column}", estimate))
    return _c4("paper", found, population, outcome, tuple(parts), undefined, choices)


def _controlled_c4(
    found: Found,
    population: str,
    outcome: str,
    choices: PrimaryChoices,
    judged: Iterable[str] = ("C2", "C3"),
) -> ClaimTest:
    """Equivalence over K, and the sign with each proxy, of the claims that have a verdict."""
    parts, undefined = [], 0
    for name in (CLAIM_STATISTICS[claim, "controlled"] for claim in judged):
        base = found.of(population, outcome, name, found.base)
        for other in (*found.sizes, *found.proxies):
            estimate = found.of(population, outcome, name, other)
            if base is None or estimate is None:
                continue
            make = _equivalence if other in found.sizes else _same_sign
            part = make(f"{name} with {other.column}", base, estimate, choices.margin)
            # A column that equals C's own position by position leaves nothing to compare.
            defined = np.isfinite([part.p_for, part.p_against]).all()
            defined = defined and part.estimate.standard_error > 0
            undefined += not defined
            parts += [part] if defined else []
    return _c4("controlled", found, population, outcome, tuple(parts), undefined, choices)


def _c4(
    kind: str,
    found: Found,
    population: str,
    outcome: str,
    parts: tuple[Part, ...],
    undefined: int,
    choices: PrimaryChoices,
) -> ClaimTest:
    bar = _bar(found, population, outcome, parts[0].estimate, choices) if parts else ""
    if not bar and not parts:
        bar = REASONS["no_support" if not undefined else "undefined"]
        bar = bar if found.measured(outcome) else REASONS["no_null"]
    strangers = ", ".join(f"{name} ({rho:+.2f})" for name, rho in found.strangers.items())
    note = f"; not proxies of C on this pair: {strangers}" if strangers and kind != "paper" else ""
    turns = f"{REASONS['partly_undefined']} ({undefined})" if undefined else ""
    return ClaimTest("C4", kind, outcome, population, parts, bar, turns, note)


def _above(estimate: Estimate) -> float:
    """One-sided p value against an estimate's being at most 0."""
    error = estimate.standard_error
    return (
        float(scipy.special.stdtr(estimate.freedom, -estimate.value / error))
        if error > 0
        else np.nan
    )


def _equivalence(name: str, base: Estimate, other: Estimate, margin: float) -> Part:
    """Two one-sided tests of whether another statistic lies within a share of the base's."""
    sign = float(np.sign(base.value))
    under = base.times(sign * (1 + margin)) - other.times(sign)
    over = other.times(sign) - base.times(sign * (1 - margin))
    inside = max(_above(under), _above(over))
    outside = min(_above(under.times(-1.0)), _above(over.times(-1.0)))
    return Part(f"{name}, change", other - base, inside, outside, one_sided=True)


def _same_sign(name: str, base: Estimate, other: Estimate, margin: float) -> Part:
    """Whether the statistic of a proxy has the base's sign."""
    toward = other.times(float(np.sign(base.value)))
    return Part(name, other, _above(toward), _above(toward.times(-1.0)), one_sided=True)


# the table


def claim_tables(
    tokens: pd.DataFrame,
    *,
    base_k: int,
    bootstrap: Bootstrap = Bootstrap(),
    choices: PrimaryChoices = PrimaryChoices(),
    registered: str | None = None,
    responses: str = ALL,
) -> dict[str, pd.DataFrame]:
    """C1 to C4 for the context gain and for the paper's gain on every population.

    Args:
        tokens: A token table with `claim_statistics.NEEDED` and at least one outcome.
        base_k: K of the columns without a suffix.
        bootstrap: How the intervals are made.
        choices: The primary choices.
        registered: Their hash as it was recorded before the probe; None where none was.
        responses: Which responses the table is of; what was recorded is of `all`.

    Returns:
        Two tables. `verdicts`: the columns of `VERDICT_COLUMNS`. `claim_statistics`: population,
        outcome, claim, statistic, proxy, k, estimate, low, high, p_value, positions, prompts and
        steps; further rows for the strata of D (C1), the diagnosis of overlap (C2) and how much a
        measurement resembles C (C4), which have no interval.
    """
    found = look(tokens, base_k=base_k, bootstrap=bootstrap, choices=choices)
    why = exploratory_because(found, bootstrap.level, choices, registered, responses)
    return {
        "verdicts": verdict_table(found, level=bootstrap.level, choices=choices, because=why),
        "claim_statistics": statistics_table(found, bootstrap.level, choices),
    }


def exploratory_because(
    found: Found,
    level: float,
    choices: PrimaryChoices,
    registered: str | None,
    responses: str = ALL,
) -> str:
    """Why nothing in a table of verdicts confirms; empty where its primary rows do."""
    if responses != ALL:
        return NOT_REGISTERED.format(responses)
    if registered is None:
        return "no primary choices were recorded before the probe"
    if registered != choices.sha256():
        return "other primary choices were recorded before the probe"
    if level != choices.level:
        return f"the level is {level:g}, and {choices.level:g} was recorded before the probe"
    if found.primary != choices.population:
        return f"the table has no {choices.population} population"
    return "a single step was taken" if found.steps < 2 else ""


def verdict_table(
    found: Found,
    *,
    level: float,
    choices: PrimaryChoices = PrimaryChoices(),
    because: str = "",
) -> pd.DataFrame:
    """Judge the claims.

    Args:
        found: The statistics.
        level: 1 - level is the chance of any false verdict per outcome and population.
        choices: The primary choices.
        because: Why all of it is exploratory, from `exploratory_because`; empty where it is not.

    Returns:
        The columns of `VERDICT_COLUMNS`, the primary rows first.
    """
    rows = []
    tests = claim_tests(found, choices)
    for key in dict.fromkeys((test.population, test.outcome, test.kind) for test in tests):
        family = [test for test in tests if (test.population, test.outcome, test.kind) == key]
        family = _with_base(found, family, level, choices)
        values = [test.p_value for test in family]
        levels = _holm_levels(values, level)
        looks = int(np.isfinite(values).sum())
        for test, p, at in zip(family, holm(values), levels, strict=True):
            corrected = _Corrected(p, at, looks)
            rows.append(_row(found, test, corrected, level, choices, because))
    table = pd.DataFrame(rows, columns=VERDICT_COLUMNS)
    return table.sort_values("primary", ascending=False, kind="stable", ignore_index=True)


def _with_base(
    found: Found, family: list[ClaimTest], level: float, choices: PrimaryChoices
) -> list[ClaimTest]:
    """The tests with C4 on those of C2 and C3 that have a verdict whatever C4's p value is.

    Holm's corrected p values never grow when another p value falls, so a verdict of C2 or C3 that
    holds beside a C4 with p = 1 holds beside every C4.
    """
    at = [i for i, test in enumerate(family) if (test.claim, test.kind) == ("C4", "controlled")]
    if not at or family[at[0]].bar:
        return family
    worst = [1.0 if i in at else test.p_value for i, test in enumerate(family)]
    judged = [
        test.claim
        for test, p in zip(family, holm(worst), strict=True)
        if test.kind == "controlled"
        and test.claim in ("C2", "C3")
        and test.verdict(p, level)[0] in ("supported", "refuted")
    ]
    c4 = family[at[0]]
    if judged:
        c4 = _controlled_c4(found, c4.population, c4.outcome, choices, judged)
        c4 = replace(c4, note=f"; of {' and '.join(judged)}{c4.note}")
    else:
        c4 = replace(c4, parts=(), bar=f"{REASONS['no_base']} here")
    return [c4 if i in at else test for i, test in enumerate(family)]


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


def _interval(test: ClaimTest, at: float) -> tuple[float, float]:
    """Interval of the deciding part that goes with the test."""
    part = test.deciding
    if part is None:
        return np.nan, np.nan
    alpha = (1 - at) / (len(test.parts) if test.against else 1)
    return part.estimate.interval(1 - alpha * (2 if part.one_sided else 1))


class _Corrected(NamedTuple):
    """A test among those that it was corrected with."""

    p: float
    """Its corrected p value."""
    at: float
    """The level of its corrected interval."""
    looks: int
    """How many they are."""


def _row(
    found: Found,
    test: ClaimTest,
    corrected: _Corrected,
    level: float,
    choices: PrimaryChoices,
    because: str,
) -> dict[str, Any]:
    verdict, reason = test.verdict(corrected.p, level)
    part, (low, high) = test.deciding, _interval(test, corrected.at)
    estimate = part.estimate if part else NOTHING
    lead = choices.outcome if test.kind == "controlled" or found.measured(choices.outcome) else ""
    primary = test.population == found.primary and test.outcome == (lead or PAPER_OUTCOME)
    because = because or _exploratory(test, choices, primary=primary)
    row = {
        "claim": test.claim,
        "statement": STATEMENTS[test.claim, test.kind],
        "kind": test.kind,
        "outcome": test.outcome,
        "population": test.population,
        "primary": primary,
        "exploratory": bool(because),
        "verdict": verdict,
        "reason": reason,
        "statistic": part.statistic if part else "",
        "estimate": estimate.value,
        "low": low,
        "high": high,
        "p_value": test.p_value,
        "p_corrected": corrected.p,
        "looks": corrected.looks,
        "prompts": found.populations[test.population],
        "steps": found.steps,
        "positions": estimate.positions,
    }
    return row | {"sentence": _sentence(test, row, because, choices)}


def _exploratory(test: ClaimTest, choices: PrimaryChoices, *, primary: bool) -> str:
    """Why a row of a table that confirms is exploratory itself; empty where it is not."""
    if not (primary and test.outcome == choices.outcome):
        return "not the primary population and outcome"
    return "the controlled statistic confirms, not the paper's" if test.kind == "paper" else ""


def p_words(p: float) -> str:
    """A p value for a sentence, down to 1e-4: `p < .0001`, `p = .032`."""
    if not np.isfinite(p):
        return "p undefined"
    if p < 1e-4:
        return "p < .0001"
    text = f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return f"p = {text.lstrip('0')}"


KIND_WORDS = {
    "paper": "as the paper has it",
    "controlled": "controlled",
    ("C1", "paper"): "by rank correlations",
}
"""Words for a kind of statistic; for C1 the paper has none to be laid beside."""


def _sentence(
    test: ClaimTest, row: Mapping[str, Any], because: str, choices: PrimaryChoices
) -> str:
    """One claim in plain English: verdict, what was claimed, what was found, and on how much."""
    outcome = OUTCOME_WORDS.get(test.outcome, test.outcome)
    kind = KIND_WORDS.get((test.claim, test.kind)) or KIND_WORDS[test.kind]
    text = (
        f"{test.claim}, {kind}, is {row['verdict']} for the {outcome}"
        f" {POPULATION_WORDS[test.population]}"
    )
    text += f": {row['reason']}. " if row["reason"] else ". "
    text += f"The claim: {row['statement']}. "
    if np.isfinite(row["estimate"]):
        numbers = f"{row['estimate']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
        text += f"Found: {_measured(test, numbers, choices)}{test.note} ("
    else:
        text += "Nothing could be computed ("
    steps = f"{row['steps']} steps" if row["steps"] > 1 else STEP_WORDS
    text += f"{row['prompts']} prompts, {steps}"
    if np.isfinite(row["p_corrected"]):
        text += f"; {p_words(row['p_corrected'])} after Holm over {row['looks']} tests"
    return text + (f"). Exploratory: {because}." if because else ").")


POPULATION_WORDS = {
    "held_out": "on held-out positions",
    "step": "on positions that carried loss",
    "all": "on all positions",
}
STEP_WORDS = "one step, so that the spread between step batches is left out"
MEASURED_WORDS = {
    "spearman_difference": "the rank correlation of d*c less that of d is {}",
    "q3_gap": "inside Q3 the most compatible third gains {} nats more than the least compatible",
    "standardised": "the standardized coefficient of d*c less that of d*(1 - c) is {}",
    "within_strata": (
        "inside tenths of D, compatibility and the outcome have a mean rank correlation of {}"
    ),
    "overlap_contrast": (
        "inside Q3 the most compatible third gains {} nats more than comparable positions of the"
        " least compatible"
    ),
    "interaction": "the coefficient of d*c beside d, c and smooth terms is {} nats",
}
"""What a statistic is, with a place for its value and interval."""


def _measured(test: ClaimTest, numbers: str, choices: PrimaryChoices) -> str:
    part = test.deciding
    if test.claim != "C4":
        return MEASURED_WORDS[part.statistic].format(numbers)
    agreeing = sum(each.p_for < 0.05 for each in test.parts)
    if test.kind == "paper":
        return (
            f"{sum(each.estimate.value > 0 for each in test.parts)} of {len(test.parts)} gaps lie"
            f" above 0, and the one that decides, {part.statistic}, is {numbers} nats"
        )
    return (
        f"{agreeing} of {len(test.parts)} comparisons agree (another K within"
        f" {choices.margin:.0%} of the statistic, a proxy in its sign), and the one that decides,"
        f" {part.statistic}, is {numbers} nats"
    )


def cause(reason: str) -> str:
    """Key of `REASONS` that a verdict's reason begins with; empty for a verdict without one."""
    return next((key for key, text in REASONS.items() if reason.startswith(text)), "")


def statistics_table(found: Found, level: float, choices: PrimaryChoices) -> pd.DataFrame:
    """Every statistic behind the verdicts, and the diagnoses that have no interval.

    Args:
        found: The statistics of a token table.
        level: Coverage of the intervals.
        choices: The primary choices.
    """
    rows = []
    for key, estimate in found.estimates.items():
        low, high = estimate.interval(level)
        rows.append(
            _statistic_row(key.population, key.outcome, key.name, key.proxy, key.k)
            | {"estimate": estimate.value, "low": low, "high": high, "p_value": estimate.p_value}
            | {"positions": estimate.positions, "prompts": estimate.prompts}
            | {"steps": estimate.steps}
        )
    rows += _strata_rows(found, choices)
    rows += _overlap_rows(found)
    for other, rho in found.others.items():
        if other not in found.sizes:
            row = _statistic_row(found.primary, "", "spearman_with_c", other.proxy, other.k)
            rows.append(row | {"estimate": rho})
    return pd.DataFrame(rows)


CLAIM_OF = {name: claim for (claim, _), name in CLAIM_STATISTICS.items()} | {
    "per_unit": "C3",
    "spearman_with_c": "C4",
}


def _statistic_row(population: str, outcome: str, name: str, proxy: str, k: int) -> dict[str, Any]:
    claim = CLAIM_OF.get(name, "C1" if name.startswith(("rank_share", "stratum")) else "C2")
    return {"claim": claim, "population": population, "outcome": outcome, "statistic": name} | {
        "proxy": proxy,
        "k": k,
    }


def _strata_rows(found: Found, choices: PrimaryChoices) -> Iterator[dict[str, Any]]:
    """Controlled C1 inside each stratum of D."""
    base = (found.base.proxy, found.base.k)
    for population, (rho, sizes) in found.strata.items():
        for number, (value, size) in enumerate(zip(rho, sizes, strict=True), start=1):
            row = _statistic_row(population, choices.outcome, f"stratum_{number}", *base)
            yield row | {"estimate": value, "positions": int(size)}


def _overlap_rows(found: Found) -> Iterator[dict[str, Any]]:
    for population, overlap in found.overlaps.items():
        if overlap is None:
            continue
        values = {"share_with_partner": overlap.partners}
        values |= {f"before_{name}": value for name, value in overlap.before.items()}
        values |= {f"after_{name}": value for name, value in overlap.after.items()}
        values |= {"effective_top": overlap.effective[0], "effective_bottom": overlap.effective[1]}
        for name, value in values.items():
            base = (found.base.proxy, found.base.k)
            yield _statistic_row(population, "", name, *base) | {"estimate": value}


# C5, from a grid of trainings


def of_training(table: pd.DataFrame) -> pd.DataFrame:
    """C5 in the columns of `verdicts`.

    Args:
        table: Verdicts of a grid of trainings, as from `training_outcomes.verdict_table`.

    Returns:
        One row per measure and budget. outcome is the measure and population is `training`; the
        numbers are those of the rival that decides: the one closest to overtaking where the claim
        is supported, the one furthest ahead where it is refuted. positions is 0, steps NaN. Another
        budget than 5 % is exploratory.

    Raises:
        DiagnosticsError: If a column is missing.
    """
    require_columns(table, TRAINING_COLUMNS, what="A table of training verdicts")
    overall = table[table["rival"] == "all"]
    rows = [_training_row(row, _rivals(table, row)) for row in overall.itertuples()]
    return pd.DataFrame(rows, columns=VERDICT_COLUMNS)


TRAINING_COLUMNS = (
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
)
"""What C5 is read from. Tables written before `reason` was have the verdict alone."""


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
    reason = getattr(row, "reason", "")
    return {
        "claim": row.claim,
        "statement": STATEMENTS["C5", "controlled"].replace("5 %", f"{100 * row.budget:g} %"),
        "kind": "controlled",
        "outcome": row.measure,
        "population": "training",
        "primary": row.budget == TA_BUDGET,
        "exploratory": row.budget != TA_BUDGET,
        "verdict": row.verdict,
        "reason": reason if isinstance(reason, str) else "",
        "statistic": f"gain_over_{part['rival']}" if part is not None else "",
        "estimate": number["difference"],
        "low": number["low"],
        "high": number["high"],
        "p_value": np.nan,
        "p_corrected": np.nan,
        "looks": len(rivals),
        "prompts": row.prompts,
        "steps": np.nan,
        "positions": 0,
        "sentence": _grid_sentence(row, rivals, reason if isinstance(reason, str) else ""),
    }


def _grid_sentence(row, rivals: pd.DataFrame, reason: str) -> str:
    about = f"{row.claim} is {row.verdict} for {row.measure.replace('_', ' ')}: "
    if not row.seeds >= MINIMUM_SEEDS:
        return about + f"fewer than {MINIMUM_SEEDS} seeds were trained."
    about += f"{reason}; " if reason else ""
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
