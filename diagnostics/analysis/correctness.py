"""Every criterion by right and by wrong responses: what it selects, and what that gains.

Selections are made among all positions, as in `selection`, and then split by whether the response
is right. For a criterion, a budget and a side (right or wrong), with P the side's positions and S
those of them that are selected:

    selected_share    |S| / |P|                   the budget, where a criterion prefers neither
    captured_share    sum over S of the gain / sum over P of the gain
    mean              mean over S of the gain, the context gain and the advantage
    spearman          rank correlation over P of the score with the gain and the context gain

`full` selects every position, so that its means are those of the whole side. A difference is right
minus wrong. Its interval resamples prompts, with the selection made anew in every draw, and carries
the step batches; a prompt with responses of both kinds counts on both sides of the same draw.

A difference has a verdict where both sides have 20 prompts, ties decide no more of the selection
than `criteria.AMBIGUOUS`, and the interval has a width: `right` or `wrong`, whichever is higher, by
a p value that is adjusted (Holm) over the criteria and budgets of that statistic, and `neither`
where the two are not told apart. Which responses are right is not drawn by lot: they are the
shorter, the easier or the more familiar ones too, so that a difference describes these two sets of
responses and says nothing about what correctness does.

Reference: none; the split of arXiv 2605.10889, whose teachers guide better on wrong rollouts, for
the gain of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, holm, mean, positive_ratio
from diagnostics.analysis.config import FEWEST_PROMPTS, Bootstrap
from diagnostics.analysis.rank_correlation import Variable, spearman
from diagnostics.analysis.responses import SIDES
from diagnostics.analysis.selection import ENRICHMENT_BUDGETS, candidates, cells
from diagnostics.analysis.selection_draws import SELECTION_DRAWS, Candidates, Rules, selection_sums
from diagnostics.analysis.splits import Split, row, scores, splits
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import several, shares, takes, token_table
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings
from diagnostics.criteria import BATCH_CONTEXTS, Scope, Ties

MEASURES = ("gain", "context_gain", "advantage")
"""What is averaged over a selection, in nats."""
CORRELATED = ("gain", "context_gain")
CAPTURED = "gain"
"""The outcome whose total is shared out; that of the context gain may lie near 0."""
DIFFERENCE = "right minus wrong"
FULL = "full"
COLUMNS = [
    "split",
    "criterion",
    "budget",
    "statistic",
    "measure",
    "rollouts",
    "estimate",
    "low",
    "high",
    "p_value",
    "p_holm",
    "higher",
    "reason",
    "ambiguous",
    "positions",
    "prompts",
    "steps",
]


def is_judged(tokens: pd.DataFrame) -> bool:
    """Whether a token table has a right and a wrong response, and a gain to compare them by."""
    return set(SIDES.values()) <= set(tokens.get("correct", ())) and "gain" in tokens


@takes(tokens=token_table, criteria=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def by_correctness(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    budgets: Iterable[float] = ENRICHMENT_BUDGETS,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: int = BATCH_CONTEXTS,
    minimum_prompts: int = FEWEST_PROMPTS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Compare what criteria select, and what it gains, in right and in wrong responses.

    Args:
        tokens: A token table with `gain` and `correct`, one row per response position.
        criteria: Names or aliases; None takes all that the table's columns allow.
        budgets: Shares of the positions of both sides together, in (0, 1].
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: What a budget is a share of, as in `criteria.select`.
        batch: Responses of a batch, for the scope `batch`.
        minimum_prompts: Prompts of a side below which a difference has no verdict.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns split (the primary population), criterion, budget (NaN for spearman), statistic,
        measure, rollouts (right, wrong, right minus wrong), estimate, low, high, and for a
        difference p_value, p_holm (over the criteria and budgets of its statistic and measure),
        higher (right, wrong, neither; empty without a verdict), reason (why there is none);
        ambiguous (share of the selection that ties decide), positions and prompts (of the side; of
        a difference, the fewer prompts of the two), steps.

    Raises:
        DiagnosticsError: The table lacks a gain or the column `correct`, or has no right or no
            wrong response; a criterion is unknown or lacks a column; a budget is outside (0, 1].
    """
    require_columns(tokens, ("gain", "correct"), what="The comparison by correctness")
    if not is_judged(tokens):
        raise DiagnosticsError(
            f"The table's {int(tokens['correct'].notna().sum())} judged positions are all of one"
            " kind of response. The comparison needs right and wrong ones: judge more responses,"
            " with --verifier or the column `correct`."
        )
    rules, names = Rules(ties, scope, batch), None if criteria is None else tuple(criteria)
    options = {"criteria": names, "budgets": tuple(budgets), "rules": rules}

    def make(table: pd.DataFrame, how: Bootstrap) -> dict[tuple, Estimate]:
        return _Sides.of(table, how, **options).estimates()

    found = over_steps(make, tokens, bootstrap)
    whole = _Sides.of(tokens, bootstrap, **options)
    counted = {name: whole.prompts_of(side) for name, side in whole.masks.items()}
    frame = pd.DataFrame(_rows(found, whole, bootstrap.level), columns=COLUMNS)
    return _judged(frame, counted, bootstrap.level, minimum_prompts)


@dataclass(frozen=True)
class _Sides:
    """The primary population with its criteria, split by correctness.

    Attributes:
        tokens: The token table of N rows.
        split: The primary population of n positions.
        chosen: Its positions with criteria and budgets.
        masks: bool [n] positions by side.
        measures: [n] values by name, NaN where undefined.
    """

    tokens: pd.DataFrame
    split: Split
    chosen: Candidates
    masks: dict[str, np.ndarray]
    measures: dict[str, np.ndarray]

    @classmethod
    def of(
        cls,
        tokens: pd.DataFrame,
        bootstrap: Bootstrap,
        *,
        criteria: tuple[str, ...] | None,
        budgets: tuple[float, ...],
        rules: Rules,
    ) -> _Sides:
        """The sides of a token table."""
        split = next(splits(tokens, bootstrap=bootstrap))
        chosen = candidates(
            tokens, split.mask, split.prompts, criteria, budgets, rules, bootstrap.seed
        )
        correct = tokens["correct"].to_numpy(dtype=np.float64)[split.mask]
        measures = {name: split.values(tokens, name) for name in MEASURES if name in tokens}
        masks = {name: correct == value for name, value in SIDES.items()}
        return cls(tokens, split, chosen, masks, measures)

    @property
    def prompts(self) -> PromptClusters:
        """The prompts of the n positions."""
        return self.split.prompts

    def prompts_of(self, side: np.ndarray) -> int:
        """Number of prompts that have a position on a side [n]."""
        return self.prompts.present(side)

    def estimates(self) -> dict[tuple, Estimate]:
        """By (criterion, budget, statistic, measure, rollouts)."""
        return {**self._of_selections(), **self._of_scores()}

    def _values(self) -> np.ndarray:
        """[n, 2 sides * (1 + 2 measures)] ones, then each measure and where it is defined."""
        columns = []
        for side in self.masks.values():
            columns.append(side.astype(np.float64))
            for values in self.measures.values():
                known = side & np.isfinite(values)
                columns += [np.where(known, values, 0.0), known.astype(np.float64)]
        return np.stack(columns, axis=1)

    def _of_selections(self) -> dict[tuple, Estimate]:
        held = self._values()
        draws = min(self.prompts.draws, SELECTION_DRAWS)
        sums = selection_sums(self.chosen, lambda copies: held, draws=draws)
        width, found = 1 + 2 * len(self.measures), {}
        for c, b, name, budget in self._cells():
            inside = sums.total if c is None else sums.inside[:, c, b]
            parts = [
                _statistics(inside[:, at : at + width], sums.total[:, at : at + width], self)
                for at in (0, width)
            ]
            for key in parts[0]:
                passes = [part[key] for part in parts]
                found |= self._three((name, budget, *key), passes)
        return found

    def _cells(self) -> Iterator[tuple[int | None, int, str, float]]:
        yield None, 0, FULL, 1.0
        for c, name in enumerate(self.chosen.names):
            for b, budget in enumerate(self.chosen.budgets):
                yield c, b, name, budget

    def _three(self, key: tuple, passes: list[np.ndarray]) -> dict[tuple, Estimate]:
        """The estimates of both sides and of their difference, from values in every pass [P]."""
        sides = list(self.masks.values())
        prompts = [self.prompts_of(side) for side in sides]
        positions = [int(side.sum()) for side in sides]
        rows = [*zip(self.masks, passes, positions, prompts, strict=True)]
        rows.append((DIFFERENCE, passes[0] - passes[1], sum(positions), min(prompts)))
        return {
            (*key, rollouts): Estimate(float(values[0]), values[1:], count, clusters)
            for rollouts, values, count, clusters in rows
        }

    def _of_scores(self) -> dict[tuple, Estimate]:
        """Rank correlations of every score with the outcomes, on either side."""
        found: dict[tuple, Estimate] = {}
        for name, score in scores(self.tokens, self.chosen.names, seed=self.chosen.seed).items():
            for outcome in (each for each in CORRELATED if each in self.measures):
                both = []
                for rollouts, side in self.masks.items():
                    own = np.where(side, score[self.split.mask], np.nan)
                    both.append(
                        spearman(Variable(own), Variable(self.measures[outcome]), self.prompts)
                    )
                    found[name, np.nan, "spearman", outcome, rollouts] = both[-1]
                found[name, np.nan, "spearman", outcome, DIFFERENCE] = both[0] - both[1]
        return found


def _statistics(inside: np.ndarray, total: np.ndarray, sides: _Sides) -> dict[tuple, np.ndarray]:
    """Statistics of one selection on one side in every pass [P], from sums [P, columns]."""
    found = {("selected_share", "positions"): positive_ratio(inside[:, 0], total[:, 0])}
    for m, name in enumerate(sides.measures):
        over, under = 1 + 2 * m, 2 + 2 * m
        found["mean", name] = positive_ratio(inside[:, over], inside[:, under])
        if name == CAPTURED:
            found["captured_share", name] = positive_ratio(inside[:, over], total[:, over])
    return found


def _rows(found: dict[tuple, Estimate], sides: _Sides, level: float) -> Iterator[dict]:
    """One row per estimate; shares of a total that is not told apart from 0 are left undefined."""
    unsure = {
        name
        for name, side in sides.masks.items()
        if not mean(sides.measures[CAPTURED], sides.prompts, side).interval(level)[0] > 0
    }
    ties = cells(sides.chosen)
    for (name, budget, statistic, measure, rollouts), estimate in found.items():
        cell = ties.get((name, budget))
        made, both = row(estimate, level), rollouts == DIFFERENCE
        if statistic == "captured_share" and (rollouts in unsure or (unsure and both)):
            made |= {"estimate": np.nan, "low": np.nan, "high": np.nan}
        yield {
            "split": sides.split.name,
            "criterion": name,
            "budget": budget,
            "statistic": statistic,
            "measure": measure,
            "rollouts": rollouts,
            **made,
            "p_value": estimate.p_value if both else np.nan,
            "p_holm": np.nan,
            "higher": "",
            "reason": "",
            "ambiguous": cell.ambiguous if cell else 0.0,
        }


def _judged(
    frame: pd.DataFrame, counted: dict[str, int], level: float, minimum: int
) -> pd.DataFrame:
    """The table with adjusted p values and, where there may be one, which side is higher."""
    frame.loc[frame["estimate"].isna(), "p_value"] = np.nan
    differences = frame.index[frame["rollouts"] == DIFFERENCE]
    few = [f"{count} prompts with a {name} response" for name, count in counted.items()]
    few = [text for text, count in zip(few, counted.values(), strict=True) if count < minimum]
    reasons = pd.Series("", index=differences)
    tied = frame["ambiguous"].loc[differences] > registry.AMBIGUOUS
    width = (frame["high"] - frame["low"]).loc[differences]
    reasons[~(width > 0)] = "undefined, or without a width"
    reasons[tied] = "ties decide the selection"
    if few:
        reasons[:] = f"{' and '.join(few)}: fewer than {minimum}"
    frame.loc[differences, "reason"] = reasons
    able = frame.loc[differences][reasons == ""]
    for _, part in able.groupby(["statistic", "measure"], sort=False):
        adjusted = holm(part["p_value"].to_numpy())
        told = adjusted <= 1 - level
        side = np.where(part["estimate"] > 0, "right", "wrong")
        frame.loc[part.index, "p_holm"] = adjusted
        frame.loc[part.index, "higher"] = np.where(told, side, "neither")
    return frame
