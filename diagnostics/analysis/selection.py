"""Offline comparison of criteria: the share of a step's gain that each would have captured.

For a criterion c, a budget rho and N positions, with the ceil(rho N) best positions of c selected:

    share(c, rho)      = sum of the outcome over the selected positions / sum over all N
    enrichment(c, rho) = share(c, rho) / (selected positions / N)
                         1 for full and, on average, for random
    A(c)               = integral of share(c, rho) over rho from 0 to 1, by trapezia over every rank
    area(c)            = (A(c) - 1/2) / (A(oracle) - 1/2)
                         0 for random, 1 for the oracle
    jaccard(c, c')     = |selected by both| / |selected by either|

The oracle ranks by the outcome itself. Where gains are negative too, its share exceeds 1 before rho
does. A share of a total that is not positive means nothing: it is NaN, and a warning says so. (The
total cancels in the area, which is defined wherever the outcome varies.)

Scores are normalized over the whole table; budgets are shares of the positions of a split, and a
selection is made among them. A position whose outcome is undefined can be selected and then
captures nothing; one whose score is undefined is never selected. `lift` belongs to the step
positions and is shown for them alone.

Masks are fixed by the scores, so the bootstrap only reweights sums per prompt (see `bootstrap`):
all draws together cost one matrix product. The gain is that of a step on all positions. The effect
of a step on the selected positions alone is measured by `probing.intervention`, and
`rank_agreement` compares the two answers.

Reference: captured share over budget is the concentration (Lorenz) curve of the outcome along a
score; the normalized area is the ratio known from uplift curves as the Qini coefficient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, of_sums, positive_ratio
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import Variable
from diagnostics.analysis.splits import row, scores, splits
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

log = logging.getLogger("diagnostics")
CAPTURED_OUTCOMES = ("gain", "relative_gain", "positive_gain")
ALL_OUTCOMES = (*CAPTURED_OUTCOMES, "first_order_gain", "lift")
CURVE_BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
ENRICHMENT_BUDGETS = (0.01, 0.05, 0.1, 0.3)
RANDOM_SELECTIONS = 200
"""Number of random selections whose captured shares make the band of `random`."""
TOKEN_TYPES = ("word", "number", "punctuation", "special")


@dataclass(frozen=True)
class ComparisonConfig:
    """The settings of a comparison.

    Attributes:
        criteria: Criteria to compare; none means all that the columns allow.
        budgets: Shares of positions, in (0, 1].
    """

    criteria: tuple[str, ...] = field(
        default=(), metadata={"help": "criteria; none means all that the columns allow"}
    )
    budgets: tuple[float, ...] = field(
        default=CURVE_BUDGETS, metadata={"help": "shares of positions"}
    )


@dataclass(frozen=True)
class BudgetSelection:
    """The selection of a ranking of n positions at each budget.

    Attributes:
        first: [n] index of the smallest budget that selects the position; the number of budgets
            where none does.
        height: [n] share of all budgets that select the position: (n - rank + 1/2) / n with rank
            from 1, 0 where none does.
        selected: [budgets] number of selected positions; below the budget where too few scores are
            defined.
        tied: [budgets] positions that share the last selected score where the cut separates them,
            else 0.
    """

    first: np.ndarray
    height: np.ndarray
    selected: np.ndarray
    tied: np.ndarray


def select_at_budgets(
    positions: pd.DataFrame, score: np.ndarray, budgets: Sequence[float]
) -> BudgetSelection:
    """Select by one score at several budgets; ties are broken as in `criteria.select`.

    Args:
        positions: n rows with the column `position`.
        score: [n] scores, higher is selected, NaN is never selected.
        budgets: Ascending shares of the n positions.

    Returns:
        The selections.
    """
    count = len(positions)
    wanted = np.array([registry.budget_count(count, budget) for budget in budgets])
    order = registry.ranking(positions, score)
    first = np.full(count, len(wanted))
    height = np.zeros(count)
    first[order] = np.searchsorted(wanted, np.arange(len(order)), side="right")
    height[order] = (count - np.arange(len(order)) - 0.5) / count
    selected = np.minimum(wanted, len(order))
    return BudgetSelection(first, height, selected, _tied(np.asarray(score)[order], selected))


def _tied(ranked: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """How many of the scores, best first, equal the last selected one where the next one equals it
    too.
    """
    cut = [k for k in selected if 0 < k < len(ranked) and ranked[k - 1] == ranked[k]]
    ties = {k: int(np.count_nonzero(ranked == ranked[k - 1])) for k in cut}
    return np.array([ties.get(k, 0) for k in selected])


@dataclass(frozen=True)
class SplitSelections:
    """One split of a table with its outcomes and the selections of each criterion.

    Attributes:
        name: `all`, `step` or `held_out`.
        prompts: The prompts of the n positions, with their draws.
        positions: n rows with the column `position`.
        budgets: Ascending shares of the n positions.
        values: Outcomes [n] by name, NaN where undefined.
        scored: Scores [n] by criterion.
    """

    name: str
    prompts: PromptClusters
    positions: pd.DataFrame
    budgets: tuple[float, ...]
    values: dict[str, np.ndarray]
    scored: dict[str, np.ndarray]

    @cached_property
    def choices(self) -> dict[str, BudgetSelection]:
        """The selections by criterion."""
        return {
            name: select_at_budgets(self.positions, score, self.budgets)
            for name, score in self.scored.items()
        }

    @cached_property
    def oracles(self) -> dict[str, BudgetSelection]:
        """By outcome, the selections of a ranking by the outcome itself, undefined ones last."""
        lowest = np.finfo(np.float64).min
        return {
            name: select_at_budgets(self.positions, np.nan_to_num(values, nan=lowest), self.budgets)
            for name, values in self.values.items()
        }

    def random_bands(self, level: float) -> dict[str, np.ndarray]:
        """By outcome, quantiles [2, budgets] of the share that random selections capture."""
        # A stream of its own, so that the band does not depend on the draws of prompts.
        generator = np.random.default_rng([self.prompts.seed, 1])
        last = (
            np.array(
                [registry.budget_count(len(self.positions), budget) for budget in self.budgets]
            )
            - 1
        )
        values = np.nan_to_num(np.stack(list(self.values.values())))
        orders = (generator.permutation(values.shape[1]) for _ in range(RANDOM_SELECTIONS))
        sums = np.stack(
            [np.take(values, order, axis=1).cumsum(axis=1)[:, last] for order in orders]
        )
        shares = positive_ratio(sums, values.sum(axis=1)[:, None])
        return dict(
            zip(
                self.values,
                np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], axis=0).swapaxes(0, 1),
                strict=True,
            )
        )

    def inside(self, choice: BudgetSelection, values: np.ndarray) -> np.ndarray:
        """Sums [prompts, budgets] of values [n] over the selected positions; an undefined value
        adds nothing.
        """
        return _sums_within_budgets(self.prompts, choice.first, values, len(self.budgets))

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums [prompts, 1] of values [n] over all positions of the split."""
        return self.prompts.sums(np.nan_to_num(values))

    def shares(self, choice: BudgetSelection, outcome: str) -> list[Estimate]:
        """Captured share of the outcome at each budget."""
        return self.ratios(
            self.inside(choice, self.values[outcome]), self.total(self.values[outcome])
        )

    def enrichments(self, choice: BudgetSelection, outcome: str) -> list[Estimate]:
        """Captured share over the share of positions selected, at each budget."""
        values = self.values[outcome]
        ones = np.ones(len(self.positions))
        over = np.hstack([self.inside(choice, values), self.inside(choice, ones)])
        return self.estimates(_enrichment, over, self.total(values), self.total(ones))

    def area(self, choice: BudgetSelection, outcome: str) -> Estimate:
        """Normalized area of the criterion's curve."""
        heights = np.stack([choice.height, self.oracles[outcome].height]) - 0.5
        values = np.nan_to_num(self.values[outcome])
        return self.ratios(*(self.prompts.sums(values * height) for height in heights))[0]

    def means(self, choice: BudgetSelection, values: np.ndarray) -> list[Estimate]:
        """Mean of values [n] over the selected positions where it is defined, at each budget."""
        defined = np.isfinite(values).astype(np.float64)
        return self.estimates(
            _ratio_of_halves, self.inside(choice, values), self.inside(choice, defined)
        )

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean of values [n] over all positions where it is defined."""
        return self.estimates(
            _ratio_of_halves, self.total(values), self.total(np.isfinite(values).astype(np.float64))
        )[0]

    def ratios(self, over: np.ndarray, under: np.ndarray) -> list[Estimate]:
        """Sums over sums, per column of `over`; NaN where the lower sum is not positive."""
        width = over.shape[1]
        return self.estimates(
            lambda sums: positive_ratio(sums[..., :width], sums[..., width:]), over, under
        )

    def estimates(self, function: Callable, *sums: np.ndarray) -> list[Estimate]:
        """Estimates of a function of per-prompt sums [prompts, columns]."""
        return of_sums(
            function, np.hstack(sums), self.prompts, np.ones(len(self.positions), dtype=bool)
        )


def _sums_within_budgets(
    prompts: PromptClusters, first: np.ndarray, values: np.ndarray, budgets: int
) -> np.ndarray:
    cells = prompts.codes * (budgets + 1) + first
    sums = np.bincount(
        cells, weights=np.nan_to_num(values), minlength=prompts.count * (budgets + 1)
    )
    return sums.reshape(prompts.count, budgets + 1)[:, :budgets].cumsum(axis=1)


def _ratio_of_halves(sums: np.ndarray) -> np.ndarray:
    return positive_ratio(*np.split(sums, 2, axis=-1))


def _enrichment(sums: np.ndarray) -> np.ndarray:
    inside = sums[..., :-2]
    total = sums[..., -2:-1]
    count = sums[..., -1:]
    captured, selected = np.split(inside, 2, axis=-1)
    return positive_ratio(positive_ratio(captured, total), selected / count)


@with_settings(bootstrap=Bootstrap)
def split_selections(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> Iterator[SplitSelections]:
    """The table's splits, each with its selections.

    `random` and `full` are left out: their curves follow from the budget alone.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of the split's positions, in (0, 1].
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Yields:
        One object per split.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].
    """
    outcomes = _require_outcomes(tokens, outcomes)
    require_columns(tokens, ("prompt_id", "context_id", "position"), what="The comparison")
    budgets = tuple(sorted(set(budgets)))
    scored = _scored(tokens, criteria, bootstrap.seed)
    for split in splits(tokens, bootstrap=bootstrap):
        values = {name: outcome_values(tokens, name)[split.mask] for name in outcomes}
        values = {
            name: v
            for name, v in values.items()
            if np.isfinite(v).any() and (name != "lift" or split.name == "step")
        }
        here = {name: score[split.mask] for name, score in scored.items()}
        yield SplitSelections(
            split.name,
            split.prompts,
            tokens.loc[split.mask, ["position"]].reset_index(drop=True),
            budgets,
            values,
            here,
        )


def table_selections(
    tokens: pd.DataFrame,
    criteria: Iterable[str] | None,
    budgets: Iterable[float],
    *,
    bootstrap: Bootstrap,
) -> SplitSelections:
    """The whole table with its selections; no outcome is needed.

    Args:
        tokens: A token table.
        criteria: Names or aliases; None takes all that the table's columns allow.
        budgets: Shares of the table's positions.
        bootstrap: How the intervals are made.

    Returns:
        The selections on the split `all`.
    """
    require_columns(tokens, ("prompt_id", "context_id", "position"), what="The comparison")
    prompts = PromptClusters(tokens["prompt_id"].to_numpy(), bootstrap=bootstrap)
    positions = tokens[["position"]].reset_index(drop=True)
    return SplitSelections(
        "all",
        prompts,
        positions,
        tuple(sorted(set(budgets))),
        {},
        _scored(tokens, criteria, bootstrap.seed),
    )


def _scored(
    tokens: pd.DataFrame, criteria: Iterable[str] | None, seed: int
) -> dict[str, np.ndarray]:
    return {
        name: score
        for name, score in scores(tokens, criteria or None, seed=seed).items()
        if not is_baseline(name)
    }


def is_baseline(name: str) -> bool:
    """True for `full` and `random`, whose curves follow from the budget alone."""
    entry = registry.find(name)
    return entry.kind == "all" or entry.name == "random"


def outcome_values(tokens: pd.DataFrame, name: str) -> np.ndarray:
    """An outcome [N] as float64, NaN where undefined; `positive_gain` is max(gain, 0)."""
    values = tokens["gain" if name == "positive_gain" else name].to_numpy(dtype=np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    return np.maximum(values, 0.0) if name == "positive_gain" else values


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
            f"{', '.join(map(str, tokens.columns[:40]))}. Run the probe on it first."
        )
    return present


# Curves


@with_settings(bootstrap=Bootstrap)
def selection_curves(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
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
        budgets: Shares of the split's positions, in (0, 1].
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, criterion, split, budget, selected (positions), tied (positions with the
        score at the cut, where their place decided between them), captured_share, low, high, random
        (the share that a random selection captures on average: the budget itself), random_low,
        random_high (the interval that holds `level` of random selections), oracle, positions,
        prompts. The rows of `random` have that interval in low and high; all others have a
        bootstrap interval over prompts.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].

    Reference:
        Concentration (Lorenz) curves.
    """
    rows = []
    for part in split_selections(
        tokens, criteria=criteria, outcomes=outcomes, budgets=budgets, bootstrap=bootstrap
    ):
        bands = part.random_bands(bootstrap.level) if part.values else {}
        for outcome, values in part.values.items():
            _warn_unless_positive(values, outcome, part.name)
            frame = _shared_columns(part, outcome, bands[outcome])
            rows += _random_rows(frame)
            for name, choice in part.choices.items():
                ends = _captured_columns(part.shares(choice, outcome), bootstrap.level)
                own = {"criterion": name, "selected": choice.selected, "tied": choice.tied, **ends}
                rows += _long_rows(frame, own)
    return pd.DataFrame(rows, columns=_CURVE_COLUMNS)


_CURVE_COLUMNS = [
    "outcome",
    "criterion",
    "split",
    "budget",
    "selected",
    "tied",
    "captured_share",
    "low",
    "high",
    "random",
    "random_low",
    "random_high",
    "oracle",
    "positions",
    "prompts",
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


def _shared_columns(part: SplitSelections, outcome: str, band: np.ndarray) -> dict:
    """Columns that all rows of an outcome share: budgets, random's band and the oracle."""
    counts = np.array(
        [registry.budget_count(len(part.positions), budget) for budget in part.budgets]
    )
    return {
        "outcome": outcome,
        "split": part.name,
        "budget": part.budgets,
        "counts": counts,
        "random": counts / len(part.positions),
        "random_low": band[0],
        "random_high": band[1],
        "oracle": [share.value for share in part.shares(part.oracles[outcome], outcome)],
        "positions": int(np.isfinite(part.values[outcome]).sum()),
        "prompts": part.prompts.count,
    }


def _random_rows(frame: dict) -> list[dict]:
    own = {
        "criterion": "random",
        "selected": frame["counts"],
        "tied": np.zeros(len(frame["counts"]), dtype=int),
        "captured_share": frame["random"],
        "low": frame["random_low"],
        "high": frame["random_high"],
    }
    return _long_rows(frame, own)


def _captured_columns(estimates: list[Estimate], level: float) -> dict:
    low, high = zip(*(estimate.interval(level) for estimate in estimates), strict=True)
    return {"captured_share": [estimate.value for estimate in estimates], "low": low, "high": high}


def _long_rows(*columns: dict) -> list[dict]:
    """Rows of a table from columns; scalars are repeated."""
    return pd.DataFrame(
        {name: values for part in columns for name, values in part.items()}
    ).to_dict("records")


@with_settings(bootstrap=Bootstrap)
def selection_summary(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = ENRICHMENT_BUDGETS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Each criterion in five numbers: normalized area, and enrichment at four budgets.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        outcomes: Outcome columns, or `positive_gain` = max(gain, 0); those that the table lacks are
            left out.
        budgets: Shares of the split's positions, in (0, 1].
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, criterion, split, statistic (area, enrichment), budget (NaN for area),
        estimate, low, high, baseline (the value of random and full: area 0, enrichment 1), best
        (the criterion with the largest estimate), behind_best, behind_best_low, behind_best_high
        (paired difference to it; where the interval includes 0 the two cannot be told apart),
        positions, prompts.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].

    Reference:
        The Qini coefficient of uplift curves (Radcliffe 2007).
    """
    rows = []
    for part in split_selections(
        tokens, criteria=criteria, outcomes=outcomes, budgets=budgets, bootstrap=bootstrap
    ):
        for outcome in part.values:
            defined = int(np.isfinite(part.values[outcome]).sum())
            areas = {name: part.area(choice, outcome) for name, choice in part.choices.items()}
            enriched = {
                name: part.enrichments(choice, outcome) for name, choice in part.choices.items()
            }
            columns = [("area", np.nan, 0.0, areas)]
            columns += [
                ("enrichment", b, 1.0, {n: e[i] for n, e in enriched.items()})
                for i, b in enumerate(part.budgets)
            ]
            for statistic, budget, baseline, estimates in columns:
                key = {
                    "outcome": outcome,
                    "split": part.name,
                    "statistic": statistic,
                    "budget": budget,
                    "baseline": baseline,
                }
                rows += [
                    key | line | {"positions": defined}
                    for line in _against_best(estimates, bootstrap.level)
                ]
    return pd.DataFrame(rows, columns=_SUMMARY_COLUMNS)


_SUMMARY_COLUMNS = [
    "outcome",
    "criterion",
    "split",
    "statistic",
    "budget",
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
]


def _against_best(estimates: dict[str, Estimate], level: float) -> Iterator[dict]:
    """Estimate and paired difference to the largest, by criterion."""
    defined = {
        name: estimate for name, estimate in estimates.items() if np.isfinite(estimate.value)
    }
    best = max(defined, key=lambda name: defined[name].value) if defined else None
    for name, estimate in estimates.items():
        low, high = estimate.interval(level)
        line = {
            "criterion": name,
            "estimate": estimate.value,
            "low": low,
            "high": high,
            "best": best,
            "prompts": estimate.prompts,
        }
        behind = (estimate - estimates[best]) if best and name != best else None
        ends = behind.interval(level) if behind else (np.nan, np.nan)
        own = np.nan if best is None else 0.0
        yield line | {
            "behind_best": behind.value if behind else own,
            "behind_best_low": ends[0],
            "behind_best_high": ends[1],
        }


# What is selected


@with_settings(bootstrap=Bootstrap)
def selection_overlap(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    budgets: Iterable[float] = CURVE_BUDGETS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Jaccard index of the criteria's selections at each budget, and Spearman correlation of
    scores.

    Args:
        tokens: A token table, one row per response position; no outcome is needed.
        criteria: Names or aliases; None takes all that the table's columns allow.
        budgets: Shares of the table's positions, in (0, 1].
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per pair with columns criterion, other, statistic (jaccard, spearman), budget (NaN
        for spearman), estimate, low, high, chance (the Jaccard index of two independent selections
        of that size; 0 for spearman), positions, prompts.

    Raises:
        DiagnosticsError: If a criterion is unknown or lacks a column, or a budget is
            outside (0, 1].
    """
    part = table_selections(tokens, criteria, budgets, bootstrap=bootstrap)
    variables = {name: Variable(score) for name, score in part.scored.items()}
    rows = []
    for one, other in combinations(variables, 2):
        key = {"criterion": one, "other": other}
        rank = rank_correlation.spearman(variables[one], variables[other], part.prompts)
        rows.append(
            key
            | {"statistic": "spearman", "budget": np.nan, "chance": 0.0}
            | row(rank, bootstrap.level)
        )
        for budget, (estimate, chance) in zip(
            part.budgets, _jaccards(part, one, other), strict=True
        ):
            rows.append(
                key
                | {"statistic": "jaccard", "budget": budget, "chance": chance}
                | row(estimate, bootstrap.level)
            )
    return pd.DataFrame(rows, columns=_OVERLAP_COLUMNS)


_OVERLAP_COLUMNS = [
    "criterion",
    "other",
    "statistic",
    "budget",
    "estimate",
    "low",
    "high",
    "chance",
    "positions",
    "prompts",
]


def _jaccards(part: SplitSelections, one: str, other: str) -> Iterator[tuple[Estimate, float]]:
    """Jaccard at each budget, and that of two independent selections of the same sizes."""
    a = part.choices[one]
    b = part.choices[other]
    ones = np.ones(len(part.positions))
    both, either = (
        _sums_within_budgets(part.prompts, f(a.first, b.first), ones, len(part.budgets))
        for f in (np.maximum, np.minimum)
    )
    shared = a.selected * b.selected / max(len(ones), 1)
    chance = positive_ratio(shared, a.selected + b.selected - shared)
    return zip(part.estimates(_ratio_of_halves, both, either), chance, strict=True)


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


@with_settings(bootstrap=Bootstrap)
def selection_profile(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    budgets: Iterable[float] = ENRICHMENT_BUDGETS,
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
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns criterion, budget, measure, estimate, low, high, full (the mean over all positions,
        which is random's expectation too), minus_full, minus_full_low, minus_full_high (paired),
        positions (selected), prompts.

    Raises:
        DiagnosticsError: If a criterion is unknown or lacks a column, or a budget is
            outside (0, 1].
    """
    part = table_selections(tokens, criteria, budgets, bootstrap=bootstrap)
    rows = []
    for measure, values in profile_measures(tokens).items():
        full = part.mean(values)
        for name, choice in part.choices.items():
            for budget, count, mean in zip(
                part.budgets, choice.selected, part.means(choice, values), strict=True
            ):
                difference = mean - full
                low, high = difference.interval(bootstrap.level)
                rows.append(
                    {"criterion": name, "budget": budget, "measure": measure}
                    | row(mean, bootstrap.level)
                    | {
                        "full": full.value,
                        "minus_full": difference.value,
                        "minus_full_low": low,
                        "minus_full_high": high,
                        "positions": int(count),
                    }
                )
    return pd.DataFrame(rows, columns=_PROFILE_COLUMNS)


_PROFILE_COLUMNS = [
    "criterion",
    "budget",
    "measure",
    "estimate",
    "low",
    "high",
    "full",
    "minus_full",
    "minus_full_low",
    "minus_full_high",
    "positions",
    "prompts",
]


def profile_measures(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """Values [N] whose means make a profile: indicators as 0 and 1, NaN where undefined."""
    measures: dict[str, np.ndarray] = {}
    if {"student_entropy", "forward_kl"} <= set(tokens):
        quadrant = registry.quadrants(tokens)
        measures |= {f"q{q}": np.where(quadrant > 0, quadrant == q, np.nan) for q in (1, 2, 3, 4)}
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


@with_settings(bootstrap=Bootstrap)
def compare(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    outcomes: Iterable[str] = CAPTURED_OUTCOMES,
    budgets: Iterable[float] = CURVE_BUDGETS,
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
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Tables by name: selection_curves, selection_summary, selection_overlap, selection_profile;
        see the functions of these names for the columns.

    Raises:
        DiagnosticsError: If the table holds none of the outcomes, a criterion is unknown or lacks a
            column, or a budget is outside (0, 1].
    """
    shared = {"criteria": criteria, "bootstrap": bootstrap}
    budgets = tuple(budgets)
    return {
        "selection_curves": selection_curves(tokens, outcomes=outcomes, budgets=budgets, **shared),
        "selection_summary": selection_summary(tokens, outcomes=outcomes, **shared),
        "selection_overlap": selection_overlap(tokens, budgets=budgets, **shared),
        "selection_profile": selection_profile(tokens, **shared),
    }
