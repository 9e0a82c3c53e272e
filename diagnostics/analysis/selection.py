"""Offline comparison of criteria: the share of a step's gain that each would have captured.

For a criterion c, a budget rho and N positions, with the ceil(rho N) best positions of c selected:

    share(c, rho)      = sum of the outcome over the selected positions / sum over all N
    enrichment(c, rho) = share(c, rho) / (selected positions / N)
                         1 for full and, on average, for random
    A(c)               = integral of share(c, rho) over rho from 0 to 1, by trapezia over every rank
    area(c)            = (A(c) - 1/2) / (A(oracle) - 1/2)
                         0 for random, 1 for the oracle
    mean(c, rho)       = mean of the outcome over c's ceil(rho N) best positions
    jaccard(c, c')     = |selected by both| / |selected by either|

The oracle ranks by the outcome itself, an undefined one as 0. Where gains are negative too, its
share exceeds 1 before rho does. A share of a total that is not positive, or of a context gain that
is not told apart from 0 in sum, means nothing: it is NaN, and a warning says so. Where that total
is told apart, its share is a description without an interval, and the mean has one. (The total
cancels in the area, which is defined wherever the outcome varies.)

Scores are normalized over the whole table; budgets are shares of the positions of a population (or
of each of its training batches or responses, see `Rules`), and a selection is made among them. A
position whose outcome is undefined can be selected and then captures nothing; one whose score is
undefined is never selected. `lift` belongs to the step positions and is shown for them alone.

Selections are made anew in every draw of prompts (`selection_draws`): a cut that is made once has
intervals that are too short. Step batches enter as in every table (`step_batches`). Cells of which
ties decide more than `criteria.AMBIGUOUS` say so in the column `ambiguous`, and are never `best`.
The gain is that of a step on all positions. The effect of a step on the selected positions alone is
measured by `probing.intervention`, and `rank_agreement` compares the two answers.

Reference: captured share over budget is the concentration (Lorenz) curve of the outcome along a
score; the normalized area is the ratio known from uplift curves as the Qini coefficient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
from scipy import special

from diagnostics import criteria as registry
from diagnostics.analysis import rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, mean, positive_ratio
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.prompt_groups import groups_of, of_each, over_groups, studied
from diagnostics.analysis.rank_correlation import Variable
from diagnostics.analysis.selection_draws import (
    RANDOM_SELECTIONS,
    SELECTION_DRAWS,
    Candidates,
    Rules,
    Sums,
    selection_sums,
)
from diagnostics.analysis.splits import Split, row, scores, splits
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import several, shares, takes, token_table
from diagnostics.core.schema import listed, require_columns
from diagnostics.core.settings import as_written, with_settings
from diagnostics.core.shown import Tables
from diagnostics.criteria import BATCH_CONTEXTS, TIES_FLAG, Scope, Ties

log = logging.getLogger("diagnostics")
UNSURE = ("context_gain", "relative_gain")
"""What the names of outcomes begin with whose total may lie near 0 while the outcome is real:
differences of two gains, and fractions, which a few quiet positions decide."""
CAPTURED_OUTCOMES = ("context_gain", "gain", "relative_gain", "positive_gain")
ALL_OUTCOMES = (*CAPTURED_OUTCOMES, "first_order_gain", "lift")
CURVE_BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
ENRICHMENT_BUDGETS = (0.01, 0.05, 0.1, 0.3)
COMPARED_COLUMNS = ("prompt_id", "context_id", "position")
BY_TABLE = Rules()
"""One budget for the whole table; ties by the unclipped score."""
TOKEN_TYPES = ("word", "number", "punctuation", "special")


@dataclass(frozen=True)
@as_written
class ComparisonConfig:
    """The settings of a comparison.

    Attributes:
        criteria: Criteria to compare; none means all that the columns allow.
        budgets: Shares of positions, in (0, 1].
        ties: How positions of equal score are ordered.
        scope: What a budget is a share of.
        batch: Responses of a training batch, for the scope `batch`.
    """

    criteria: tuple[str, ...] = field(
        default=(), metadata={"help": "criteria; none means all that the columns allow"}
    )
    budgets: tuple[float, ...] = field(
        default=CURVE_BUDGETS, metadata={"help": "shares of positions"}
    )
    ties: str = field(default=Rules.ties, metadata=TIES_FLAG)
    scope: str = field(
        default=Rules.scope,
        metadata={
            "help": "a budget of the whole table, of each training batch or of each response",
            "choices": get_args(Scope),
        },
    )
    batch: int = field(
        default=BATCH_CONTEXTS, metadata={"help": "responses of a batch, for --scope batch"}
    )

    @property
    def rules(self) -> Rules:
        """Ties and scope."""
        return Rules(cast(Ties, self.ties), cast(Scope, self.scope), self.batch)


# Populations


@dataclass(frozen=True)
class Population:
    """The positions of one or more populations of a table, and the selections among them.

    The two populations of a fold table have the same positions and selections, and outcomes of
    their own.

    Attributes:
        tokens: The token table of N rows.
        splits: The populations; all have the same mask.
        candidates: The positions with criteria and budgets.
        outcomes: [n] outcomes by population and name, NaN where undefined.
    """

    tokens: pd.DataFrame
    splits: tuple[Split, ...]
    candidates: Candidates
    outcomes: dict[tuple[str, str], np.ndarray]

    @property
    def count(self) -> int:
        """Number of positions."""
        return len(self.candidates.groups)

    @cached_property
    def expected(self) -> np.ndarray:
        """[B, n] chance of each position in a random selection of each budget."""
        sizes = np.bincount(self.candidates.groups)
        counts = [
            [registry.budget_count(int(size), budget) for size in sizes]
            for budget in self.candidates.budgets
        ]
        return (np.array(counts) / sizes)[:, self.candidates.groups]

    def values(self, copies: np.ndarray | None = None) -> np.ndarray:
        """[n, 1 + outcomes] a column of ones, then the outcomes with 0 where undefined."""
        columns = [np.ones(self.count), *map(np.nan_to_num, self.outcomes.values())]
        return np.stack(columns, axis=1)

    def sums(self) -> Sums:
        """Sums of the outcomes over every selection, in every draw."""
        places = range(1, 1 + len(self.outcomes))
        draws = min(self.candidates.prompts.draws, SELECTION_DRAWS)
        return selection_sums(self.candidates, self.values, draws=draws, oracles=places)

    def estimates(self) -> dict[tuple, Estimate]:
        """Means, shares and enrichments by (statistic, population, outcome, criterion, budget);
        areas have no budget.
        """
        sums = self.sums()
        found: dict[tuple, Estimate] = {}
        for place, ((split, outcome), values) in enumerate(self.outcomes.items(), 1):
            defined = int(np.isfinite(values).sum())
            statistics = _of_outcome(sums, place, self.count)
            for c, name in enumerate(self.candidates.names):
                for statistic, array in statistics.items():
                    key = (statistic, split, outcome, name)
                    counts = defined, self.candidates.prompts.count
                    if statistic == "area":
                        found[key] = sums.estimate(array[:, c], *counts)
                        continue
                    for b, budget in enumerate(self.candidates.budgets):
                        found[(*key, budget)] = sums.estimate(array[:, c, b], *counts)
        return found

    def oracle_shares(self, values: np.ndarray) -> np.ndarray:
        """[B] share of an outcome [n] that ranking by itself captures."""
        held = np.nan_to_num(values)
        ranked = self.candidates.ranked(held, ties="position")
        kept = self.candidates.inside(ranked)[:-1]
        return positive_ratio(kept @ held, held.sum())

    def random_bands(self, level: float) -> dict[tuple[str, str], np.ndarray]:
        """By outcome, quantiles [2, B] of the share that random selections capture."""
        if self.count > SIMULATED and self.candidates.rules.scope == "table":
            return self._normal_bands(level)
        # A stream of its own, so that the band does not depend on the draws of prompts.
        generator = np.random.default_rng([self.candidates.prompts.seed, 1])
        held = self.values()[:, 1:]
        sums = [
            self.candidates.inside(
                self.candidates.ranked(generator.random(self.count), ties="position")
            )[:-1]
            @ held
            for _ in range(RANDOM_SELECTIONS)
        ]
        shares = positive_ratio(np.array(sums), held.sum(axis=0))
        ends = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {key: ends[..., i] for i, key in enumerate(self.outcomes)}

    def _normal_bands(self, level: float) -> dict[tuple[str, str], np.ndarray]:
        """The same by the normal distribution: k of n rows, drawn without replacement, hold k / n
        of a total, with the variance k (1 - k / n) S^2.
        """
        share = self.expected[:, 0]
        reach = float(special.ndtri((1 + level) / 2))
        bands = {}
        for key, values in self.outcomes.items():
            held = np.nan_to_num(values)
            spread = np.sqrt(self.count * share * (1 - share) * held.var(ddof=1))
            around = reach * positive_ratio(spread, held.sum())
            bands[key] = np.stack([share - around, share + around])
        return bands


SIMULATED = 200_000
"""Positions up to which random selections are made; of more, what they hold is normal."""


def _of_outcome(sums: Sums, place: int, positions: int) -> dict[str, np.ndarray]:
    """Means, shares and enrichments [P, C, B] and areas [P, C] of one outcome."""
    total, rows = sums.total[:, None, None, place], sums.total[:, None, None, 0]
    mean_inside = positive_ratio(sums.inside[:, :, :-1, place], sums.inside[:, :, :-1, 0])
    share = positive_ratio(sums.inside[:, :, :-1, place], total)
    enrichment = positive_ratio(share, sums.inside[:, :, :-1, 0] / rows)
    middle = sums.total[:, place] / 2
    area = positive_ratio(
        sums.inside[:, :, -1, place] - middle[:, None],
        (sums.oracle[:, -1, place] - middle)[:, None],
    )
    over = mean_inside - positive_ratio(sums.total[:, place], sums.total[:, 0])[:, None, None]
    return {
        "mean": mean_inside,
        "minus_random": over,
        "share": share,
        "enrichment": enrichment,
        "area": area,
    }


@dataclass(frozen=True)
class Cell:
    """What a criterion selects at one budget; of a random criterion the mean over its rankings.

    Attributes:
        selected: Positions; fewer than the budget where too few scores are defined.
        tied: Positions that share the score at the cut, where it divides them; else 0.
        ambiguous: Share of the selection that equals the best position left out.
    """

    selected: float
    tied: float
    ambiguous: float


def cells(candidates: Candidates) -> dict[tuple[str, float], Cell]:
    """What each criterion selects at each budget."""
    found = {}
    for name, rankings in candidates.rankings.items():
        for budget in candidates.budgets:
            chosen = [(ranked, ranked.best(ranked.counts(budget))) for ranked in rankings]
            found[name, budget] = Cell(
                *(
                    float(np.mean(each))
                    for each in (
                        [mask.sum() for _, mask in chosen],
                        [ranked.tied(mask) for ranked, mask in chosen],
                        [ranked.ambiguous(mask) for ranked, mask in chosen],
                    )
                )
            )
    return found


def populations(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
    rules: Rules = BY_TABLE,
    bootstrap: Bootstrap = Bootstrap(),
) -> list[Population]:
    """The table's populations with what criteria select among them, the primary one first.

    `random` and `full` are left out: their curves follow from the budget alone.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of positions, in (0, 1].
        rules: Ties and scope.
        bootstrap: How the intervals are made.

    Returns:
        One object per set of positions.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].
    """
    wanted = _require_outcomes(tokens, outcomes)
    require_columns(tokens, COMPARED_COLUMNS, what="The comparison")
    found: list[Population] = []
    for split in splits(tokens, bootstrap=bootstrap):
        own = {
            (split.name, name): values
            for name in wanted
            if (name != "lift" or split.name in ("step", "all"))
            and np.isfinite(values := outcome_of(tokens, name, split)).any()
        }
        if found and np.array_equal(found[-1].candidates.mask, split.mask):
            found[-1] = replace(
                found[-1], splits=(*found[-1].splits, split), outcomes=found[-1].outcomes | own
            )
            continue
        chosen = candidates(
            tokens, split.mask, split.prompts, criteria, budgets, rules, bootstrap.seed
        )
        found.append(Population(tokens, (split,), chosen, own))
    return found


def candidates(
    tokens: pd.DataFrame,
    mask: np.ndarray,
    prompts: PromptClusters,
    criteria: Iterable[str] | None,
    budgets: Iterable[float],
    rules: Rules,
    seed: int,
) -> Candidates:
    """The positions under a mask [N] with criteria, without `full` and `random`."""
    require_columns(tokens, COMPARED_COLUMNS, what="The comparison")
    names = list(criteria or []) or registry.usual(tokens)
    compared = tuple(name for name in dict.fromkeys(names) if not is_baseline(name))
    if names and not compared:
        raise DiagnosticsError(
            f"{', '.join(dict.fromkeys(names))} alone cannot be compared: criteria are compared"
            " with them, and they stand beside them in any case. Name at least one criterion."
        )
    return Candidates(tokens, mask, prompts, compared, tuple(sorted(set(budgets))), rules, seed)


def whole_table(
    tokens: pd.DataFrame,
    criteria: Iterable[str] | None,
    budgets: Iterable[float],
    *,
    rules: Rules = BY_TABLE,
    bootstrap: Bootstrap = Bootstrap(),
) -> Candidates:
    """All positions of a table with criteria and budgets; no outcome is needed."""
    require_columns(tokens, COMPARED_COLUMNS, what="The comparison")
    prompts = PromptClusters(tokens["prompt_id"].to_numpy(), bootstrap=bootstrap)
    everywhere = np.ones(len(tokens), dtype=bool)
    return candidates(tokens, everywhere, prompts, criteria, budgets, rules, bootstrap.seed)


def is_baseline(name: str) -> bool:
    """True for `full` and `random`, whose curves follow from the budget alone."""
    entry = registry.find(name)
    return entry.kind == "all" or entry.name == "random"


def outcome_values(tokens: pd.DataFrame, name: str) -> np.ndarray:
    """An outcome [N] as float64, NaN where undefined; `positive_gain` is max(gain, 0)."""
    values = tokens["gain" if name == "positive_gain" else name].to_numpy(dtype=np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    return np.maximum(values, 0.0) if name == "positive_gain" else values


def outcome_of(tokens: pd.DataFrame, name: str, split: Split) -> np.ndarray:
    """An outcome on a population [n], as `outcome_values`."""
    if name == "positive_gain":
        return np.maximum(split.values(tokens, "gain"), 0.0)
    # A lift is of the step positions, with or without folds.
    return (
        outcome_values(tokens, name)[split.mask] if name == "lift" else split.values(tokens, name)
    )


def _require_outcomes(tokens: pd.DataFrame, outcomes: Iterable[str]) -> list[str]:
    outcomes = list(outcomes)
    present = [
        name
        for name in outcomes
        if (name in tokens or (name == "positive_gain" and "gain" in tokens))
    ]
    if not present:
        raise DiagnosticsError(
            f"The comparison needs an outcome, one of {', '.join(outcomes)}; the table has "
            f"{listed(list(map(str, tokens.columns)), outcomes)}. Run the probe on it first."
        )
    return present


def _estimates(tokens: pd.DataFrame, bootstrap: Bootstrap, **options) -> dict[tuple, Estimate]:
    """Means, shares, enrichments and areas of every population, with prompts' and steps' parts.

    A share of an outcome of `UNSURE` has no interval: on samples of a real bank one of its ratio to
    such a total held the truth 43 to 90 times in a hundred. The mean in the outcome's own unit has.
    """

    def make(table: pd.DataFrame, how: Bootstrap) -> dict[tuple, Estimate]:
        found: dict[tuple, Estimate] = {}
        for part in populations(table, bootstrap=how, **options):
            found |= part.estimates()
        return found

    found = over_steps(make, tokens, bootstrap)
    unsure = _unsure_totals(tokens, options["outcomes"], bootstrap)
    if unsure:
        log.warning(
            "Shares of a sum that is not told apart from 0 mean nothing and are left undefined"
            " (NaN): %s. Means stand, and no decision or verdict rests on such a share.",
            _listed_sums(unsure),
        )
    return {
        key: _described(estimate, key[1:3] in unsure)
        if key[0] in ("share", "enrichment") and key[2].startswith(UNSURE)
        else estimate
        for key, estimate in found.items()
    }


def _listed_sums(sums: set[tuple[str, str]]) -> str:
    """`outcome (population, population); outcome (population)` from pairs of both."""
    outcomes = sorted({outcome for _, outcome in sums})
    where = [sorted(split for split, name in sums if name == outcome) for outcome in outcomes]
    return "; ".join(
        f"{outcome} ({', '.join(splits)})" for outcome, splits in zip(outcomes, where, strict=True)
    )


def _described(estimate: Estimate, undefined: bool) -> Estimate:
    """The estimate without an interval, and without a value where its total may be 0."""
    value = np.nan if undefined else estimate.value
    return replace(estimate, value=value, draws=np.full_like(estimate.draws, np.nan))


def _unsure_totals(
    tokens: pd.DataFrame, outcomes: Iterable[str], bootstrap: Bootstrap
) -> set[tuple[str, str]]:
    """Population and outcome of each total whose interval holds 0, of the outcomes of `UNSURE`."""

    def make(table: pd.DataFrame, how: Bootstrap) -> dict[tuple, Estimate]:
        return {
            (split.name, outcome): mean(split.values(table, outcome), split.prompts)
            for split in splits(table, bootstrap=how)
            for outcome in outcomes
            if outcome in table and outcome.startswith(UNSURE)
        }

    found = over_steps(make, tokens, bootstrap)
    return {key for key, total in found.items() if total.interval(bootstrap.level)[0] <= 0}


# Curves


@takes(tokens=token_table, criteria=several, outcomes=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def selection_curves(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Share of the total outcome that each criterion captures at each budget, in long form.

    A random selection captures its budget in expectation under any weighting of prompts, so
    captured_share - random is the paired difference, and its interval is low - random to high -
    random.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of the population's positions, in (0, 1].
        ties: How equal scores are ordered, as in `criteria.select`. With `random` a share is the
            expectation over their order.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, criterion, split, budget, selected (positions), tied (positions with the
        score at the cut, where it divides them), ambiguous (share of the selection that only its
        order among equals decided), captured_share, low, high (NaN for context and relative gains,
        whose totals may lie near 0), mean (of the outcome over the selected positions, in its own
        unit, an undefined one as 0), mean_low, mean_high, mean_per_kept (the mean over the share of
        positions kept), minus_random (the mean minus that of all positions, which random ones have
        on average), minus_random_low, minus_random_high, spread (standard deviation over random
        ties, or over the draws of a random criterion; 0 where nothing is random), random (the share
        that a random selection captures on average), random_low, random_high (the interval that
        holds `level` of random selections), oracle, positions, prompts, steps. The rows of `random`
        have that interval in low and high and none for the mean; all others have intervals over
        prompts and step batches, with the selection made anew in each draw.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].

    Reference:
        Concentration (Lorenz) curves.
    """
    options = _options(criteria, outcomes, budgets, Rules(ties, scope, batch))
    estimates = _estimates(tokens, bootstrap, **options)
    return _curves(populations(tokens, bootstrap=bootstrap, **options), estimates, bootstrap.level)


def _options(criteria, outcomes, budgets, rules: Rules) -> dict:
    return {
        "criteria": None if criteria is None else tuple(criteria),
        "outcomes": tuple(outcomes),
        "budgets": tuple(budgets),
        "rules": rules,
    }


def _curves(
    parts: list[Population],
    estimates: dict[tuple, Estimate],
    level: float,
    budgets: Iterable[float] | None = None,
) -> pd.DataFrame:
    rows: list[dict] = []
    for part in parts:
        found, bands = cells(part.candidates), part.random_bands(level)
        for (split, outcome), values in part.outcomes.items():
            if not outcome.startswith(UNSURE):  # of those `_estimates` says it
                _warn_unless_positive(values, outcome, split)
            frame = _shared_columns(part, values, bands[split, outcome])
            key = {"outcome": outcome, "split": split}
            held = np.nan_to_num(values)[:, None]
            rows += [key | each for each in _random_rows(part, frame, held[:, 0])]
            for name in part.candidates.names:
                spread = part.candidates.spread(name, held)[:, 0]
                spread = positive_ratio(spread, held.sum())
                for b, budget in enumerate(part.candidates.budgets):
                    share = estimates["share", split, outcome, name, budget]
                    inside = estimates["mean", split, outcome, name, budget]
                    own = {"criterion": name, "spread": spread[b], **vars(found[name, budget])}
                    own |= row(share, level, named="captured_share")
                    own |= _means(inside, found[name, budget].selected / part.count, level)
                    over = estimates["minus_random", split, outcome, name, budget]
                    own |= _over_random(over, level)
                    rows.append(key | frame[b] | own)
    table = pd.DataFrame(rows, columns=_CURVE_COLUMNS)
    wanted = table["budget"].isin(list(budgets)) if budgets is not None else slice(None)
    return table[wanted].reset_index(drop=True)


def _means(inside: Estimate, kept: float, level: float) -> dict[str, float]:
    """The mean outcome of the selected positions, and that over the share of positions kept."""
    low, high = inside.interval(level)
    over_kept = float(positive_ratio(inside.value, kept))
    return {"mean": inside.value, "mean_low": low, "mean_high": high, "mean_per_kept": over_kept}


def _over_random(over: Estimate, level: float) -> dict[str, float]:
    """The mean of the selected minus that of all positions, which random ones have on average."""
    low, high = over.interval(level)
    return {"minus_random": over.value, "minus_random_low": low, "minus_random_high": high}


_CURVE_COLUMNS = [
    "outcome",
    "criterion",
    "split",
    "budget",
    "selected",
    "tied",
    "ambiguous",
    "captured_share",
    "low",
    "high",
    "mean",
    "mean_low",
    "mean_high",
    "mean_per_kept",
    "minus_random",
    "minus_random_low",
    "minus_random_high",
    "spread",
    "random",
    "random_low",
    "random_high",
    "oracle",
    "positions",
    "prompts",
    "steps",
]


def _warn_unless_positive(values: np.ndarray, outcome: str, split: str) -> None:
    total = np.nansum(values)
    if not total > 0:
        log.warning(
            "%s sums to %.3g over the %s positions: shares of it are undefined (NaN)",
            outcome,
            total,
            split,
        )


def _shared_columns(part: Population, values: np.ndarray, band: np.ndarray) -> list[dict]:
    """What all rows of an outcome share, by budget: random's expectation and band, the oracle."""
    held = np.nan_to_num(values)
    if part.candidates.rules.scope == "table":
        random = part.expected[:, 0]
    else:
        random = positive_ratio(part.expected @ held, held.sum())
    columns = {
        "budget": part.candidates.budgets,
        "random": random,
        "random_low": band[0],
        "random_high": band[1],
        "oracle": part.oracle_shares(values),
    }
    return pd.DataFrame(columns).to_dict("records")


def _random_rows(part: Population, frame: list[dict], held: np.ndarray) -> Iterator[dict]:
    for shared, chance in zip(frame, part.expected, strict=True):
        mean_inside = float(positive_ratio(chance @ held, chance.sum()))
        kept = chance.sum() / part.count
        yield shared | {
            "mean": mean_inside,
            "mean_low": np.nan,
            "mean_high": np.nan,
            "mean_per_kept": float(positive_ratio(mean_inside, kept)),
            "minus_random": 0.0,
            "minus_random_low": np.nan,
            "minus_random_high": np.nan,
            "criterion": "random",
            "selected": round(float(chance.sum()), 6),
            "tied": 0.0,
            "ambiguous": 0.0,
            "captured_share": shared["random"],
            "low": shared["random_low"],
            "high": shared["random_high"],
            "spread": np.nan,
            "positions": part.count,
            "prompts": part.candidates.prompts.count,
            "steps": 1,
        }


@takes(tokens=token_table, criteria=several, outcomes=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def selection_summary(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = ENRICHMENT_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Each criterion in five numbers: normalized area, and enrichment at four budgets.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of the population's positions, in (0, 1].
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, criterion, split, statistic (area, enrichment), budget (NaN for area),
        ambiguous (share of the selection that ties decide; 0 for area), estimate, low, high,
        baseline (the value of random and full: area 0, enrichment 1), best (the criterion with the
        largest estimate among those that ties do not decide), behind_best, behind_best_low,
        behind_best_high (paired difference to it; where the interval includes 0 the two cannot be
        told apart), positions, prompts, steps.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].

    Reference:
        The Qini coefficient of uplift curves (Radcliffe 2007).
    """
    options = _options(criteria, outcomes, budgets, Rules(ties, scope, batch))
    estimates = _estimates(tokens, bootstrap, **options)
    parts = populations(tokens, bootstrap=bootstrap, **options)
    return _summary(parts, estimates, bootstrap.level, budgets)


def _summary(
    parts: list[Population],
    estimates: dict[tuple, Estimate],
    level: float,
    budgets: Iterable[float],
) -> pd.DataFrame:
    rows: list[dict] = []
    for part in parts:
        names, found = part.candidates.names, cells(part.candidates)
        for split, outcome in part.outcomes:
            blocks = [("area", np.nan, 0.0), *(("enrichment", b, 1.0) for b in sorted(budgets))]
            for statistic, budget, baseline in blocks:
                tail = () if statistic == "area" else (budget,)
                here = {name: estimates[statistic, split, outcome, name, *tail] for name in names}
                unsure = {name: found[name, budget].ambiguous if tail else 0.0 for name in names}
                key = {"outcome": outcome, "split": split, "statistic": statistic}
                key |= {"budget": budget, "baseline": baseline}
                rows += [key | line for line in _against_best(here, unsure, level)]
    return pd.DataFrame(rows, columns=_SUMMARY_COLUMNS)


_SUMMARY_COLUMNS = [
    "outcome",
    "criterion",
    "split",
    "statistic",
    "budget",
    "ambiguous",
    "estimate",
    "low",
    "high",
    "baseline",
    "best",
    "behind_best",
    "behind_best_low",
    "behind_best_high",
    "positions",
    "prompts",
    "steps",
]


def _against_best(
    estimates: dict[str, Estimate], ambiguous: dict[str, float], level: float
) -> Iterator[dict]:
    """Estimate and paired difference to the largest that ties do not decide, by criterion."""
    able = {
        name: estimate
        for name, estimate in estimates.items()
        if np.isfinite(estimate.value) and ambiguous[name] <= registry.AMBIGUOUS
    }
    best = max(able, key=lambda name: able[name].value) if able else None
    for name, estimate in estimates.items():
        behind = (estimate - estimates[best]) if best and name != best else None
        ends = behind.interval(level) if behind else (np.nan, np.nan)
        own = np.nan if best is None else 0.0
        yield {
            "criterion": name,
            "ambiguous": ambiguous[name],
            **row(estimate, level),
            "best": best,
            "behind_best": behind.value if behind else own,
            "behind_best_low": ends[0],
            "behind_best_high": ends[1],
        }


# What is selected


@takes(tokens=token_table, criteria=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def selection_overlap(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    budgets: Iterable[float] = CURVE_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Jaccard index of the criteria's selections at each budget, and Spearman correlation of
    scores.

    Args:
        tokens: A token table, one row per response position; no outcome is needed.
        criteria: Names or aliases; None takes all that the table's columns allow.
        budgets: Shares of the table's positions, in (0, 1].
        ties: How equal scores are ordered, as in `criteria.select`. With `random` the index is that
            of the expected numbers of positions.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per pair with columns criterion, other, statistic (jaccard, spearman), budget (NaN
        for spearman), ambiguous (the larger share of the two selections that ties decide; 0 for
        spearman), estimate, low, high, chance (the Jaccard index of two independent selections
        of that size; 0 for spearman), positions, prompts, steps.

    Raises:
        DiagnosticsError: If a criterion is unknown or lacks a column, or a budget is
            outside (0, 1].
    """
    chosen = whole_table(
        tokens, criteria, budgets, rules=Rules(ties, scope, batch), bootstrap=bootstrap
    )
    sums = _table_sums(chosen, {}, overlaps=True)
    return _overlap(chosen, sums, bootstrap)


def _table_sums(chosen: Candidates, measures: dict, *, overlaps: bool) -> Sums:
    """Sums over the selections: of ones, then of each measure and of where it is defined."""
    quadrant = [name for name in measures if name in _QUADRANTS]

    def values(copies: np.ndarray | None) -> np.ndarray:
        held = dict(measures)
        if quadrant and copies is not None:
            held |= _quadrant_measures(chosen.tokens, copies)
        columns = [np.ones(len(chosen.groups))]
        for each in held.values():
            columns += [np.nan_to_num(each), np.isfinite(each).astype(np.float64)]
        return np.stack(columns, axis=1)

    if groups := groups_of(chosen.tokens, chosen.seed):
        return _sums_of_groups(chosen, groups, overlaps=overlaps)
    draws = min(chosen.prompts.draws, SELECTION_DRAWS)
    return selection_sums(chosen, values, draws=draws, overlaps=overlaps)


def _sums_of_groups(chosen: Candidates, groups: list[pd.DataFrame], *, overlaps: bool) -> Sums:
    """`_table_sums` in each group of a divided table."""
    still = Bootstrap(draws=0, seed=chosen.seed)

    def sums(group: pd.DataFrame) -> Sums:
        inside = whole_table(
            group, chosen.names, chosen.budgets, rules=chosen.rules, bootstrap=still
        )
        return _table_sums(inside, profile_measures(group), overlaps=overlaps)

    return Sums.of_groups(of_each(sums, groups))


def _overlap(
    chosen: Candidates,
    sums: Sums,
    bootstrap: Bootstrap,
    budgets: Iterable[float] | None = None,
) -> pd.DataFrame:
    ranks = _rank_correlations(chosen, bootstrap)
    found, count, rows = cells(chosen), len(chosen.groups), []
    for (i, one), (j, other) in combinations(enumerate(chosen.names), 2):
        key = {"criterion": one, "other": other}
        rank = ranks(one, other)
        spearman = {"statistic": "spearman", "budget": np.nan, "ambiguous": 0.0, "chance": 0.0}
        rows.append(key | spearman | row(rank, bootstrap.level))
        for b, budget in enumerate(chosen.budgets):
            if budgets is not None and budget not in budgets:
                continue
            jaccard = _jaccard(sums.both[:, b, i, j], sums.both[:, b, i, i], sums.both[:, b, j, j])
            estimate = sums.estimate(jaccard, count, chosen.prompts.count)
            cell = found[one, budget], found[other, budget]
            shared = cell[0].selected * cell[1].selected / max(count, 1)
            rows.append(
                key
                | {"statistic": "jaccard", "budget": budget}
                | {"ambiguous": max(each.ambiguous for each in cell)}
                | {"chance": float(_jaccard(shared, cell[0].selected, cell[1].selected))}
                | row(estimate, bootstrap.level)
            )
    return pd.DataFrame(rows, columns=_OVERLAP_COLUMNS)


def _rank_correlations(chosen: Candidates, bootstrap: Bootstrap) -> Callable[[str, str], Estimate]:
    """The rank correlation of the scores of two criteria."""

    def variables(tokens: pd.DataFrame) -> dict[str, Variable]:
        scored = scores(tokens, chosen.names, seed=bootstrap.seed)
        return {name: Variable(score) for name, score in scored.items()}

    def values(group: pd.DataFrame) -> dict[tuple[str, str], Estimate]:
        held, prompts = variables(group), PromptClusters(group["prompt_id"], draws=0)
        return rank_correlation.values_of_pairs(held, held, prompts, ranked=True)

    if groups := groups_of(chosen.tokens, chosen.seed):
        found = over_groups(values, groups)
        return lambda one, other: found[other, one]
    held = variables(chosen.tokens)
    return lambda one, other: rank_correlation.spearman(held[one], held[other], chosen.prompts)


def _jaccard(both, one, other) -> np.ndarray:
    return positive_ratio(both, one + other - both)


_OVERLAP_COLUMNS = [
    "criterion",
    "other",
    "statistic",
    "budget",
    "ambiguous",
    "estimate",
    "low",
    "high",
    "chance",
    "positions",
    "prompts",
    "steps",
]


def token_type(tokens: pd.DataFrame) -> np.ndarray:
    """`special`, `word`, `number` or `punctuation` for each position, from the token's text alone.

    special: marked `is_special`. word: contains a letter. number: contains a digit and no letter.
    punctuation: the rest, white space and line breaks included. unknown: the table was imported
    without texts and has ids in their place. This is a rule of thumb for tables, not a tokenizer.

    Args:
        tokens: A token table with the column `token`.

    Returns:
        [N] words.
    """
    kinds = {text: _type_of(str(text)) for text in tokens["token"].unique()}
    by_text = (
        tokens["token"].map(kinds).to_numpy(dtype=object)
        if has_texts(tokens)
        else np.full(len(tokens), "unknown", dtype=object)
    )
    return (
        np.where(tokens["is_special"].to_numpy(dtype=bool), "special", by_text)
        if "is_special" in tokens
        else by_text
    )


def has_texts(tokens: pd.DataFrame) -> bool:
    """True where tokens are texts; a table that was imported without them has the ids, written out,
    in their place.
    """
    return (
        "token_id" not in tokens
        or not (tokens["token"].astype(str) == tokens["token_id"].astype(str)).all()
    )


def _type_of(text: str) -> str:
    if any(c.isalpha() for c in text):
        return "word"
    return "number" if any(c.isdigit() for c in text) else "punctuation"


@takes(tokens=token_table, criteria=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def selection_profile(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    budgets: Iterable[float] = ENRICHMENT_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """What each criterion selects at each budget, compared with all positions.

    Measures are the shares of the selection in quadrants q1 to q4, of token types and of special
    tokens, and the means of relative position (0 to 1), forward_kl, student_entropy (nats) and
    compatibility (probability), as far as the columns allow.

    Args:
        tokens: A token table, one row per response position; no outcome is needed.
        criteria: Names or aliases; None takes all that the table's columns allow.
        budgets: Shares of the table's positions, in (0, 1].
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns criterion, budget, measure, ambiguous (share of the selection that ties decide),
        estimate, low, high, full (the mean over all positions, which is random's expectation too),
        minus_full, minus_full_low, minus_full_high (paired), positions (selected), prompts, steps.

    Raises:
        DiagnosticsError: If a criterion is unknown or lacks a column, or a budget is
            outside (0, 1].
    """
    chosen = whole_table(
        tokens, criteria, budgets, rules=Rules(ties, scope, batch), bootstrap=bootstrap
    )
    measures = profile_measures(tokens)
    return _profile(
        chosen, measures, _table_sums(chosen, measures, overlaps=False), bootstrap.level, budgets
    )


def _profile(
    chosen: Candidates, measures: dict, sums: Sums, level: float, budgets: Iterable[float]
) -> pd.DataFrame:
    wanted, found, rows = set(budgets), cells(chosen), []
    for m, measure in enumerate(measures):
        over, under = 1 + 2 * m, 2 + 2 * m
        means = positive_ratio(sums.inside[..., over], sums.inside[..., under])
        full = positive_ratio(sums.total[:, over], sums.total[:, under])
        whole = sums.estimate(full, len(chosen.groups), chosen.prompts.count).value
        for c, name in enumerate(chosen.names):
            for b, budget in enumerate(chosen.budgets):
                if budget not in wanted:
                    continue
                cell, counts = found[name, budget], (len(chosen.groups), chosen.prompts.count)
                mean, difference = (
                    sums.estimate(passes, *counts)
                    for passes in (means[:, c, b], means[:, c, b] - full)
                )
                low, high = difference.interval(level)
                rows.append(
                    {"criterion": name, "budget": budget, "measure": measure}
                    | row(mean, level)
                    | {
                        "ambiguous": cell.ambiguous,
                        "full": whole,
                        "minus_full": difference.value,
                        "minus_full_low": low,
                        "minus_full_high": high,
                        "positions": round(cell.selected),
                    }
                )
    return pd.DataFrame(rows, columns=_PROFILE_COLUMNS)


_PROFILE_COLUMNS = [
    "criterion",
    "budget",
    "measure",
    "ambiguous",
    "estimate",
    "low",
    "high",
    "full",
    "minus_full",
    "minus_full_low",
    "minus_full_high",
    "positions",
    "prompts",
    "steps",
]
_QUADRANTS = ("q1", "q2", "q3", "q4")


def _quadrant_measures(tokens: pd.DataFrame, copies: np.ndarray | None) -> dict[str, np.ndarray]:
    quadrant = registry.quadrants(tokens, copies=copies)
    return {
        name: np.where(quadrant > 0, quadrant == number, np.nan)
        for number, name in enumerate(_QUADRANTS, 1)
    }


def profile_measures(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """Values [N] whose means make a profile: indicators as 0 and 1, NaN where undefined."""
    measures: dict[str, np.ndarray] = {}
    if {"student_entropy", "forward_kl"} <= set(tokens):
        measures |= _quadrant_measures(tokens, None)
    if "token" in tokens:
        kind = token_type(tokens)
        types = TOKEN_TYPES if has_texts(tokens) else ("unknown", "special")
        measures |= {
            name: (kind == name).astype(float)
            for name in types
            if name != "special" or "is_special" in tokens
        }
    if "response_length" in tokens:
        measures["relative_position"] = registry.relative_position(tokens)
    for name in ("forward_kl", "student_entropy", "compatibility"):
        if name in tokens:
            measures[name] = outcome_values(tokens, name)
    return measures


@takes(tokens=token_table, criteria=several, outcomes=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def compare(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """All four tables of the offline comparison.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of positions, in (0, 1], for the curves and the overlap; summary and profile
            have budgets of their own.
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Tables by name: selection_curves, selection_summary, selection_overlap, selection_profile;
        see the functions of these names for the columns.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].
    """
    tokens = studied(tokens, bootstrap.seed)
    # The four tables share the selections of each draw, which are most of the work.
    budgets, rules = tuple(budgets), Rules(ties, scope, batch)
    options = _options(criteria, outcomes, {*budgets, *ENRICHMENT_BUDGETS}, rules)
    estimates = _estimates(tokens, bootstrap, **options)
    parts = populations(tokens, bootstrap=bootstrap, **options)
    chosen = parts[0].candidates
    if not chosen.mask.all():
        chosen = whole_table(
            tokens, options["criteria"], options["budgets"], rules=rules, bootstrap=bootstrap
        )
    measures = profile_measures(tokens)
    sums = _table_sums(chosen, measures, overlaps=True)
    level = bootstrap.level
    return Tables(
        {
            "selection_curves": _curves(parts, estimates, level, budgets),
            "selection_summary": _summary(parts, estimates, level, ENRICHMENT_BUDGETS),
            "selection_overlap": _overlap(chosen, sums, bootstrap, budgets),
            "selection_profile": _profile(chosen, measures, sums, level, ENRICHMENT_BUDGETS),
        }
    )
