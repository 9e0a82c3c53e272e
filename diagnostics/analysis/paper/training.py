"""The trainings of tables 2, 7 and 10 with controls: over seeds and prompts, in nats.

For a training of one criterion, budget and seed, with y = forward_kl - forward_kl_after of its
student at each position of the bank:

    mean gain             mean y over the contexts whose prompts the training did not see
    mean gain (seen)      the same over those that it saw
    ... minus random      the mean gain less that of `random` at the same budget, paired
    gap after training    mean y, top less bottom third of C inside Q3, H and C before training
    matched gap           the same for pairs within the caliper (`controlled`)

Trainings of different seeds may have seen different halves of the prompts. Their spread then holds
the difference of the halves as well, which makes intervals longer; differences to random positions
are paired by seed, and so by half.

The released scripts print the gap, under the name of a gain; a training that lowers the divergence
everywhere by the same has a gap of 0. Intervals carry prompts and seeds by the rule of
`training_outcomes`; the gaps' cuts and pairs are made anew in every draw of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import cuts
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.paper.cells import TRAINING
from diagnostics.analysis.paper.controlled import matched_space, near_pairs
from diagnostics.analysis.paper.released import BUDGETS_2, BUDGETS_10, TABLE_7
from diagnostics.analysis.paper.sample import LONG
from diagnostics.analysis.quadrants import MATCHED_COLUMNS
from diagnostics.analysis.rank_correlation import equal_groups, rank_shares
from diagnostics.analysis.splits import Split
from diagnostics.analysis.training_outcomes import Outcomes, SeedPromptEstimate
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import RELATIVE_GAIN_FLOOR, released_relative_gain
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

ORDER = (
    "teachability",
    "divergence",
    "incompatible",
    "tip",
    "random",
    "teachability_entropy",
    "entropy",
    "q3_compatibility",
    "q3_compatibility_low",
    "q3",
)
"""Masks of table 2 in the order of the paper; others that were trained with follow by name."""
CURVE = ("teachability",)
"""The mask of table 10."""
CELL_COLUMNS = (*TRAINING, "context_id", "position", "forward_kl_after")
KEPT = {
    "kept share": "kept_share",
    "share in Q3": "q3_share",
    "mean D^L": "mean_teachability",
    "mean D^I": "mean_incompatible",
    "mean C": "mean_compatibility",
}
"""Quantities that a training's record holds, and the column of each."""
UNSEEN, SEEN = "mean gain", "mean gain (seen)"
ROW_NUMBER = "row_number"
Training = tuple[str, float, int]


@dataclass(frozen=True)
class Trainings:
    """What every training gained at every position of a token table.

    Attributes:
        tokens: Token table of N rows.
        names: Criterion, budget and seed of each of C trainings.
        gains_CN: [C, N] forward_kl - forward_kl_after in nats; NaN where undefined.
        seen_CN: [C, N] whether the training saw the position's prompt; None where that is unknown.
        kept: What its rollouts kept, one row per training.
    """

    tokens: pd.DataFrame
    names: list[Training]
    gains_CN: np.ndarray
    seen_CN: np.ndarray | None
    kept: pd.DataFrame

    @property
    def kind(self) -> str:
        """`unseen` where some positions were not seen, `seen` where all were, else `all`."""
        if self.seen_CN is None:
            return "all"
        return "seen" if self.seen_CN.all() else "unseen"

    @cached_property
    def counted_CN(self) -> np.ndarray:
        """[C, N] gains at the positions that count, NaN at those that the training saw."""
        if self.kind != "unseen":
            return self.gains_CN
        return np.where(self.seen_CN, np.nan, self.gains_CN)

    @property
    def seen_gains_CN(self) -> np.ndarray:
        """[C, N] gains at the positions that the training saw, NaN elsewhere."""
        return np.where(self.seen_CN, self.gains_CN, np.nan)

    @property
    def share_of_small(self) -> float:
        """Share of the summed size of all trainings' relative gains, without a floor, that lies at
        positions whose divergence is below the floor.
        """
        before_N = self.tokens["forward_kl"].to_numpy(dtype=np.float64)
        size_CN = np.abs(released_relative_gain(before_N, before_N - self.gains_CN))
        size_CN = np.where(np.isfinite(size_CN), size_CN, 0.0)
        total = size_CN.sum()
        small = size_CN[:, before_N < RELATIVE_GAIN_FLOOR].sum()
        return float(small / total) if total > 0 else np.nan

    @property
    def mask(self) -> np.ndarray:
        """[N] the positions that count for some training."""
        return np.isfinite(self.counted_CN).any(axis=0)

    def seeds(self, criterion: str, budget: float) -> list[int]:
        """Numbers of the trainings of a criterion and budget, by seed."""
        return sorted(
            (i for i, name in enumerate(self.names) if name[:2] == (criterion, budget)),
            key=lambda i: self.names[i][2],
        )


def trainings(tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame) -> Trainings:
    """Put the trainings' measurements beside the positions of a token table.

    Args:
        tokens: A token table, one row per response position, with forward_kl.
        cells: One row per training and position: criterion, budget, seed, context_id, position,
            forward_kl_after and, where it is known, seen.
        kept: One row per training: criterion, budget, seed, kept_share, q3_share,
            mean_teachability, mean_incompatible, mean_compatibility.

    Raises:
        DiagnosticsError: A column is missing, a training lacks a position of the table or has one
            twice or another, or has no row or several rows in `kept`.
    """
    require_columns(tokens, ("context_id", "position", "forward_kl"), what="Trainings' gains")
    require_columns(cells, CELL_COLUMNS, what="A table of trainings' cells")
    require_columns(kept, [*TRAINING, *KEPT.values()], what="The table of what trainings kept")
    names, of_kept = _names(cells).unique().sort_values(), _names(kept)
    wrong = [name for name in names if (of_kept == name).sum() != 1]
    if wrong:
        raise DiagnosticsError(
            f"What the training {_words(wrong[0])} kept stands in {(of_kept == wrong[0]).sum()}"
            " rows, and should in one. Run `opd-diagnostics paper --train` again."
        )
    cell, row = _places(tokens, cells, names)
    before = tokens["forward_kl"].to_numpy(dtype=np.float64)
    gains_CN = np.full((len(names), len(tokens)), np.nan)
    gains_CN[cell, row] = before[row] - cells["forward_kl_after"].to_numpy(dtype=np.float64)
    seen_CN = None
    if "seen" in cells:
        seen_CN = np.zeros(gains_CN.shape, dtype=bool)
        seen_CN[cell, row] = cells["seen"].to_numpy(dtype=bool)
    gains_CN = np.where(np.isfinite(gains_CN), gains_CN, np.nan)
    kept = kept.iloc[of_kept.get_indexer(names)].reset_index(drop=True)
    return Trainings(tokens, list(names), gains_CN, seen_CN, kept)


def _names(frame: pd.DataFrame) -> pd.MultiIndex:
    """The training of each row; budgets are rounded, so that their last bits tell nothing apart."""
    return pd.MultiIndex.from_arrays(
        [frame["criterion"].astype(str), frame["budget"].round(6), frame["seed"].astype(int)]
    )


def _words(name: Training) -> str:
    return f"{name[0]} at {name[1]:g}, seed {name[2]}"


def _places(
    tokens: pd.DataFrame, cells: pd.DataFrame, names: pd.MultiIndex
) -> tuple[np.ndarray, np.ndarray]:
    """Number of the training, and of the token table's row, of each row of `cells`."""
    keys = ["context_id", "position"]
    cell = names.get_indexer(_names(cells))
    row = pd.MultiIndex.from_frame(tokens[keys]).get_indexer(pd.MultiIndex.from_frame(cells[keys]))
    foreign = int((row < 0).sum())
    if foreign:
        raise DiagnosticsError(
            f"{foreign} of {len(row)} rows of the trainings' cells are of positions that the token"
            " table does not hold. Give the token table of the same run."
        )
    counts = np.bincount(cell * len(tokens) + row, minlength=len(names) * len(tokens))
    wrong = np.flatnonzero((counts.reshape(len(names), -1) != 1).any(axis=1))
    if len(wrong):
        raise DiagnosticsError(
            f"The training {_words(names[wrong[0]])} lacks positions of the token table, or has"
            " some twice. Run `opd-diagnostics paper --train` again."
        )
    return cell, row


# --- estimates


def mean_gains(found: Trainings, bootstrap: Bootstrap) -> Outcomes:
    """Mean gains as outcomes over seeds and prompts: measures `mean gain` and, where some positions
    were seen and some not, `mean gain (seen)`.
    """
    prompts = PromptClusters(found.tokens["prompt_id"], draws=0)
    parts = [_by_prompt(found.names, found.counted_CN, prompts, UNSEEN)]
    if found.kind == "unseen":
        parts.append(_by_prompt(found.names, found.seen_gains_CN, prompts, SEEN))
    return Outcomes(pd.concat(parts, ignore_index=True), bootstrap=bootstrap)


def _by_prompt(
    names: list[Training], gains_CN: np.ndarray, prompts: PromptClusters, measure: str
) -> pd.DataFrame:
    """Sum and number of the finite gains per training and prompt that has any."""
    finite = np.isfinite(gains_CN)
    total_GC = prompts.sums(*np.where(finite, gains_CN, 0.0))
    count_GC = prompts.sums(*finite.astype(np.float64))
    present = count_GC.any(axis=1)
    parts = [
        pd.DataFrame(
            {
                "criterion": criterion,
                "budget": budget,
                "seed": seed,
                "measure": measure,
                "prompt_id": np.asarray(prompts.names)[present],
                "total": total_GC[present, cell],
                "count": count_GC[present, cell],
            }
        )
        for cell, (criterion, budget, seed) in enumerate(names)
    ]
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Gaps:
    """Gaps inside Q3 of every training, in every draw of prompts.

    Attributes:
        values_C: [C] of each training.
        draws_DC: [draws, C] the same in each draw.
        n: Positions of Q3, or pairs.
        prompts: Number of their prompts.
    """

    values_C: np.ndarray
    draws_DC: np.ndarray
    n: int
    prompts: int

    def over_seeds(self, cells: list[int]) -> SeedPromptEstimate:
        """The trainings of one criterion and budget over seeds and prompts."""
        return SeedPromptEstimate(self.values_C[cells], self.draws_DC[:, cells], self.prompts)


def gaps(found: Trainings, bootstrap: Bootstrap) -> dict[str, Gaps]:
    """`gap after training` and `matched gap` of every training.

    Predictors are those before training, the same for all, so that one set of cuts and pairs per
    draw serves every training.
    """
    needs = [*MATCHED_COLUMNS, "compatibility", ROW_NUMBER]
    tokens = found.tokens.assign(**{ROW_NUMBER: np.arange(len(found.tokens))})
    require_columns(tokens, needs, what="The Q3 gap after training")
    split = Split(
        found.kind, found.mask, PromptClusters(tokens["prompt_id"][found.mask], bootstrap=bootstrap)
    )

    def statistic(drawn: Drawn) -> np.ndarray:
        groups = _groups(drawn)
        row = drawn.tokens[ROW_NUMBER].to_numpy()
        top, bottom, treated, control = (found.counted_CN[:, row[rows]] for rows in groups)
        return np.concatenate([_means(top) - _means(bottom), _means(treated - control)])

    whole = cuts.whole(tokens, [split], needs, ())
    top, bottom, treated, _ = _groups(whole)
    estimates = cuts.redrawn(statistic, tokens, [split], needs, ())
    values = np.array([each.value for each in estimates])
    draws = np.stack([each.draws for each in estimates], axis=1)
    count = len(found.names)
    inside = int((whole.quadrants() == 3).sum())
    prompts = [len(np.unique(whole.prompt[rows])) for rows in (top, bottom, treated)]
    return {
        "gap after training": Gaps(values[:count], draws[:, :count], inside, min(prompts[:2])),
        "matched gap": Gaps(values[count:], draws[:, count:], len(treated), prompts[2]),
    }


def _groups(drawn: Drawn) -> tuple[np.ndarray, ...]:
    """Rows of the top and the bottom third of C inside Q3, and of the pairs of both."""
    in_q3 = drawn.quadrants() == 3
    inside = np.flatnonzero(in_q3)
    values = drawn.tokens["compatibility"].to_numpy(dtype=np.float64)[inside]
    group = equal_groups(rank_shares(values), 3)
    top, bottom = inside[group == 3], inside[group == 1]
    near = near_pairs(drawn, matched_space(drawn, in_q3), top, bottom)
    return top, bottom, near.treated, near.control


def _means(values_Cn: np.ndarray) -> np.ndarray:
    """[C] mean of the finite values of each row; NaN without any."""
    finite = np.isfinite(values_Cn)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, values_Cn, 0.0).sum(axis=1) / finite.sum(axis=1)


# --- tables


@dataclass(frozen=True)
class Study:
    """Every estimate of a set of trainings, made once for the three tables.

    Attributes:
        found: The trainings.
        bootstrap: How the intervals are made.
    """

    found: Trainings
    bootstrap: Bootstrap

    @cached_property
    def outcomes(self) -> Outcomes:
        """Mean gains over seeds and prompts."""
        return mean_gains(self.found, self.bootstrap)

    @cached_property
    def gaps(self) -> dict[str, Gaps]:
        """Gaps inside Q3 of every training."""
        return gaps(self.found, self.bootstrap)

    def table(
        self,
        criteria: Iterable[str] | None,
        budgets: Iterable[float] | None,
        quantities: Iterable[str],
    ) -> pd.DataFrame:
        """The long form of some quantities; None takes every criterion or budget."""
        quantities = list(quantities)
        trained = {name for name, _, _ in self.found.names}
        if criteria is None:
            criteria = [*(name for name in ORDER if name in trained), *sorted(trained - {*ORDER})]
        here = {name[:2] for name in self.found.names}
        wanted = sorted({budget for _, budget in here} if budgets is None else set(budgets))
        rows = [
            (criterion, quantity, np.nan, budget, *numbers)
            for criterion in criteria
            for budget in wanted
            if (criterion, budget) in here
            for quantity in quantities
            if (numbers := self._numbers(quantity, criterion, budget)) is not None
        ]
        table = pd.DataFrame(rows, columns=[*LONG, "prompts", "seeds"])
        numbers = ["k", "budget", "estimate", "low", "high"]
        return table.astype(dict.fromkeys(numbers, float))

    def _numbers(self, quantity: str, criterion: str, budget: float) -> tuple | None:
        """Estimate, low, high, n, prompts and seeds; None where a quantity does not apply."""
        cells = self.found.seeds(criterion, budget)
        if quantity in KEPT:
            kept = self.found.kept[KEPT[quantity]].to_numpy(dtype=np.float64)[cells]
            return float(kept.mean()), np.nan, np.nan, len(cells), 0, len(cells)
        made = _QUANTITIES[quantity](self, criterion, budget)
        if made is None:
            return None
        estimate, n = made
        low, high = estimate.interval(self.bootstrap.level)
        return estimate.value, low, high, n, estimate.prompts, len(cells)

    def gap(self, quantity: str, criterion: str, budget: float) -> tuple[SeedPromptEstimate, int]:
        """A gap of one criterion and budget, and its n."""
        made = self.gaps[quantity]
        return made.over_seeds(self.found.seeds(criterion, budget)), made.n

    def mean(
        self, measure: str, criterion: str, budget: float
    ) -> tuple[SeedPromptEstimate, int] | None:
        """A mean gain of one criterion and budget, and the positions that count for a training."""
        if measure not in self.outcomes.tables:
            return None
        gains_CN = self.found.seen_gains_CN if measure == SEEN else self.found.counted_CN
        known_N = np.isfinite(gains_CN[self.found.seeds(criterion, budget)]).any(axis=0)
        return self.outcomes.of(measure, criterion, budget), int(known_N.sum())

    def minus_random(self, criterion: str, budget: float) -> tuple[SeedPromptEstimate, int] | None:
        """The mean gain less that of random positions, paired by prompt and by the seeds that both
        were trained with; undefined without any.
        """
        if criterion == "random":
            return None
        own, rival = (self._by_seed(name, budget) for name in (criterion, "random"))
        shared = sorted(own.keys() & rival.keys())
        known_N = np.isfinite(self.found.counted_CN[list(own.values())]).any(axis=0)
        if not shared:
            nothing = SeedPromptEstimate(np.array([np.nan]), np.full((1, 1), np.nan), 0)
            return nothing, int(known_N.sum())
        one, other = (
            _of_seeds(
                self.outcomes.of(UNSEEN, name, budget), [list(seeds).index(s) for s in shared]
            )
            for name, seeds in ((criterion, own), ("random", rival))
        )
        return one - other, int(known_N.sum())

    def _by_seed(self, criterion: str, budget: float) -> dict[int, int]:
        """Number of each training of a criterion and budget by its seed, in ascending order."""
        return {self.found.names[i][2]: i for i in self.found.seeds(criterion, budget)}

    def per_share(
        self, made: tuple[SeedPromptEstimate, int] | None, criterion: str, budget: float
    ) -> tuple[SeedPromptEstimate, int] | None:
        """An estimate over the share of positions that each of its trainings kept."""
        if made is None:
            return None
        cells = self.found.seeds(criterion, budget)
        share_S = self.found.kept["kept_share"].to_numpy(dtype=np.float64)[cells]
        estimate, n = made
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = (np.where(share_S > 0, each / share_S, np.nan) for each in _sides(estimate))
            return SeedPromptEstimate(*scaled, estimate.prompts), n


def _of_seeds(estimate: SeedPromptEstimate, at: list[int]) -> SeedPromptEstimate:
    """An estimate of some of its seeds, by their places."""
    return SeedPromptEstimate(estimate.seeds_S[at], estimate.draws_DS[:, at], estimate.prompts)


def _sides(estimate: SeedPromptEstimate) -> tuple[np.ndarray, np.ndarray]:
    return estimate.seeds_S, estimate.draws_DS


MINUS_RANDOM = "mean gain minus random"
_QUANTITIES: dict[str, Callable[[Study, str, float], tuple[SeedPromptEstimate, int] | None]] = {
    "gap after training": lambda study, *of: study.gap("gap after training", *of),
    "matched gap": lambda study, *of: study.gap("matched gap", *of),
    "gap per kept share": lambda study, *of: study.per_share(
        study.gap("gap after training", *of), *of
    ),
    UNSEEN: lambda study, *of: study.mean(UNSEEN, *of),
    MINUS_RANDOM: lambda study, *of: study.minus_random(*of),
    "gain per kept share": lambda study, *of: study.per_share(study.mean(UNSEEN, *of), *of),
    SEEN: lambda study, *of: study.mean(SEEN, *of),
}
GAINS = (UNSEEN, MINUS_RANDOM, SEEN)
QUANTITIES_2 = (
    "kept share",
    "gap after training",
    "gap per kept share",
    "share in Q3",
    UNSEEN,
    MINUS_RANDOM,
    "gain per kept share",
    SEEN,
)
QUANTITIES_7 = (
    "gap after training",
    "matched gap",
    *GAINS,
    "mean D^L",
    "mean D^I",
    "mean C",
    "kept share",
)
QUANTITIES_10 = ("gap after training", "matched gap", *GAINS)


def study(
    tokens: pd.DataFrame, cells: pd.DataFrame, kept: pd.DataFrame, bootstrap: Bootstrap
) -> Study:
    """The trainings with their estimates, for several tables."""
    return Study(trainings(tokens, cells, kept), bootstrap)


def tables(made: Study) -> Iterator[tuple[str, pd.DataFrame]]:
    """Number and long form of each table of trainings that has rows."""
    for number, plan in _TABLES.items():
        table = made.table(*plan)
        if len(table):
            yield number, table


_TABLES = {
    "2": (None, BUDGETS_2, QUANTITIES_2),
    "7": (TABLE_7, None, QUANTITIES_7),
    "10": (CURVE, BUDGETS_10, QUANTITIES_10),
}


@with_settings(bootstrap=Bootstrap)
def table_2(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 2: trainings under each mask at 3 and 5 %.

    Args:
        tokens: A token table, one row per response position.
        cells: What every training's student measures there (`trainings`).
        kept: What every training kept (`trainings`).
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: a row per criterion and budget, quantities `kept share`, `share in Q3`,
        `gap after training`, `gap per kept share`, `mean gain`, `mean gain minus random`, `gain per
        kept share` and `mean gain (seen)` (nats), with n (positions; trainings for shares) and
        further columns prompts and seeds.

    Raises:
        DiagnosticsError: As `trainings`.

    Reference:
        arXiv 2605.26844, table 2.
    """
    return study(tokens, cells, kept, bootstrap).table(*_TABLES["2"])


@with_settings(bootstrap=Bootstrap)
def table_7(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 7: trainings under masks inside Q3, at every budget that was trained.

    Args:
        tokens: A token table, one row per response position.
        cells: What every training's student measures there (`trainings`).
        kept: What every training kept (`trainings`).
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form as of `table_2`, with `matched gap` and the means over what was kept, `mean
        D^L`, `mean D^I` and `mean C`.

    Raises:
        DiagnosticsError: As `trainings`.

    Reference:
        arXiv 2605.26844, table 7 and figure 3B.
    """
    return study(tokens, cells, kept, bootstrap).table(*_TABLES["7"])


@with_settings(bootstrap=Bootstrap)
def table_10(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 10: trainings with teachability at 1, 3, 5 and 10 %.

    Args:
        tokens: A token table, one row per response position.
        cells: What every training's student measures there (`trainings`).
        kept: What every training kept (`trainings`).
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form as of `table_2`, with `matched gap`.

    Raises:
        DiagnosticsError: As `trainings`.

    Reference:
        arXiv 2605.26844, table 10.
    """
    return study(tokens, cells, kept, bootstrap).table(*_TABLES["10"])
