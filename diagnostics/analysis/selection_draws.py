"""Selections at budgets, made anew in every draw of prompts.

A draw takes each prompt w times, and every position of it counts as w rows. With the positions in
the order of their scores, B_i the rows before position i and k the budget's number of rows,

    f_i = clip((k - B_i) / w_i, 0, 1)      the share of the rows of position i that is selected
    sum_i w_i f_i v_i                      what the selection holds of v

which is what resampling rows and selecting among them gives. Quantiles and medians in a score are
those of the draw's rows too. Where ties are random, f_i is the expectation over the order of
equals: B_i and w_i are then those of the whole block of equals, and a sum has the variance of
drawing r of the m rows of the block without replacement, r (1 - r/m) S^2.

A budget of every batch or every response is a number k of each; a resampled response is a
response of its own.

Axes: N positions of the table, n those among which is selected, B budgets, C criteria, M columns of
values, P passes (the rows as they are, then one per draw).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.prompt_groups import of_values
from diagnostics.criteria import BATCH_CONTEXTS, Ranked, Scope, Ties

SELECTION_DRAWS = 200
"""Draws of prompts in which selections are made anew: a standard error is then itself uncertain by
5 %."""
RANDOM_SELECTIONS = 200
"""Number of random selections whose captured shares make the band of `random`."""
SEEDED_SELECTIONS = 5
"""Selections over which a criterion that draws random numbers is averaged."""


@dataclass(frozen=True)
class Rules:
    """How a budget is spent and how ties are ordered."""

    ties: Ties = "raw"
    """As `criteria.select`."""
    scope: Scope = "table"
    """As `criteria.select`."""
    batch_contexts: int = BATCH_CONTEXTS
    """Contexts of a batch, for the scope `batch`."""


@dataclass(frozen=True)
class Candidates:
    """The positions among which criteria select, and the criteria.

    Attributes:
        tokens: Token table of N rows, over which scores are normalized.
        mask: [N] the n positions.
        prompts: The prompts of the n positions, with their draws.
        names: [C] criteria.
        budgets: [B] ascending shares of the n positions, or of each batch or response.
        rules: Scope and ties.
        seed: Seed of random criteria and of the batches.
    """

    tokens: pd.DataFrame
    mask: np.ndarray
    prompts: PromptClusters
    names: tuple[str, ...]
    budgets: tuple[float, ...]
    rules: Rules = field(default_factory=Rules)
    seed: int = 0

    @cached_property
    def positions(self) -> pd.DataFrame:
        """The n positions: `position`, `context_id` and `batch`."""
        frame = self.tokens[["position", "context_id"]]
        if self.rules.scope == "batch":
            size = self.rules.batch_contexts
            batch = registry.training_batches(frame, contexts=size, seed=self.seed)
            frame = frame.assign(batch=batch)
        return frame[self.mask].reset_index(drop=True)

    @cached_property
    def groups(self) -> np.ndarray:
        """[n] number of the table, batch or response whose budget a position belongs to."""
        if self.rules.scope == "table":
            return np.zeros(len(self.positions), dtype=int)
        name = "batch" if self.rules.scope == "batch" else "context_id"
        return pd.factorize(self.positions[name])[0]

    def ranked(
        self, scores: np.ndarray, raw: np.ndarray | None = None, *, ties: Ties | None = None
    ) -> Ranked:
        """Rank the n positions by scores [n]."""
        return registry.rank(
            self.positions,
            scores,
            raw,
            ties=ties or self.rules.ties,
            seed=self.seed,
            scope=self.rules.scope,
            batch="batch" if self.rules.scope == "batch" else None,
        )

    def ranking(self, name: str, *, copies: np.ndarray | None = None, seed: int = 0) -> Ranked:
        """The n positions by a criterion, whose quantiles count row i `copies[i]` times."""
        counted = None
        if copies is not None:
            counted = np.ones(len(self.tokens))
            counted[self.mask] = copies
        scores, raw = registry.score_pairs(self._needed[name], name, seed=seed, copies=counted)
        if copies is None or not self.plain:
            return self.ranked(scores[self.mask], raw[self.mask])
        # The same order without the blocks of equals, which only random ties ask for.
        scores, raw = scores[self.mask][self._early], raw[self.mask][self._early]
        keys = (-raw, -scores) if self.rules.ties == "raw" else (-scores,)
        order = np.lexsort(keys)[: int(np.isfinite(scores).sum())]
        none = np.zeros(len(order), dtype=int)
        return Ranked(self._early[order], none, none, none, np.array([len(scores)]))

    @cached_property
    def _needed(self) -> dict[str, pd.DataFrame]:
        """By criterion the columns that it reads."""
        found = {}
        for name in self.names:
            read = list(dict.fromkeys(registry.find(name).columns(self.tokens).values()))
            # A table that lacks one is refused where it is scored.
            found[name] = self.tokens[read] if set(read) <= set(self.tokens) else self.tokens
        return found

    @cached_property
    def _early(self) -> np.ndarray:
        """[n] rows by position."""
        return np.argsort(self.positions["position"].to_numpy(), kind="stable")

    @property
    def plain(self) -> bool:
        """Whether one budget is spent on all n positions and no tie is random."""
        return self.rules.scope == "table" and self.rules.ties != "random"

    @cached_property
    def rankings(self) -> dict[str, list[Ranked]]:
        """By criterion its ranking; several where it draws random numbers."""
        return {
            name: [
                self.ranking(name, seed=self.seed + draw)
                for draw in range(SEEDED_SELECTIONS if registry.is_seeded(name) else 1)
            ]
            for name in self.names
        }

    def rankings_of(self, name: str, copies: np.ndarray | None) -> list[Ranked]:
        """Rankings in a draw: anew where the score depends on quantiles of the draw's rows."""
        rescaled = "scale" in registry.find(name).arguments and not registry.is_seeded(name)
        if copies is None or not rescaled:
            return self.rankings[name]
        return [self.ranking(name, copies=copies)]

    def inside(self, ranked: Ranked, copies: np.ndarray | None = None) -> np.ndarray:
        """The share of each position that each budget selects, and its height.

        Args:
            ranked: A ranking of the n positions.
            copies: [n] how often the draw takes each position; None takes each once.

        Returns:
            [B + 1, n]. The last row is the height: the share of all budgets from 0 to 1 that select
            the position, over its rows on average.
        """
        n = len(self.groups)
        ones = np.ones(n)
        # A response that is drawn twice is two responses, each with a budget of its own.
        rows = ones if copies is None or self.rules.scope == "context" else copies
        before, width = np.full(n, np.inf), np.ones(n)
        before[ranked.rows], width[ranked.rows] = self._stands(ranked, rows[ranked.rows])
        sizes = np.bincount(self.groups, weights=rows)
        counts = np.array([_counts(sizes, budget) for budget in self.budgets])
        found = np.empty((len(self.budgets) + 1, n))
        with np.errstate(invalid="ignore", divide="ignore"):
            per_row = 1 / np.maximum(width, 1e-9)
            np.clip((counts[:, self.groups] - before) * per_row, 0, 1, out=found[:-1])
            height = (sizes[self.groups] - before - width / 2) / sizes[self.groups]
        found[-1] = np.where(np.isfinite(height), height, 0.0)
        return found

    def _stands(self, ranked: Ranked, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows before each ranked position in its group, and the rows that share its place [M]."""
        before = np.cumsum(rows) - rows
        begins = np.flatnonzero(ranked.places == 0)
        before -= np.repeat(before[begins], np.diff(np.r_[begins, len(rows)]))
        if self.rules.ties != "random" or not len(rows):
            return before, rows
        first = np.flatnonzero(np.r_[True, ranked.block[1:] != ranked.block[:-1]])
        size = np.diff(np.r_[first, len(rows)])
        return np.repeat(before[first], size), np.repeat(np.add.reduceat(rows, first), size)

    def spread(self, name: str, values: np.ndarray) -> np.ndarray:
        """Standard deviation over random choices of what a criterion's selections hold.

        Args:
            name: A criterion.
            values: [n, M] finite values.

        Returns:
            [B, M]: over the rankings of a random criterion, or over the order of equals where ties
            are random; 0 where nothing is random.
        """
        rankings = self.rankings[name]
        if len(rankings) > 1:
            sums = [self.inside(ranked)[:-1] @ values for ranked in rankings]
            return np.std(sums, axis=0, ddof=1)
        if self.rules.ties != "random":
            return np.zeros((len(self.budgets), values.shape[1]))
        return np.array([self._tie_spread(rankings[0], b, values) for b in self.budgets])

    def _tie_spread(self, ranked: Ranked, budget: float, values: np.ndarray) -> np.ndarray:
        """[M] standard deviation over the order of equals: r of m are drawn of each cut block."""
        chosen = ranked.best(ranked.counts(budget))
        held, size = values[ranked.rows], np.bincount(ranked.block)
        drawn = np.bincount(ranked.block, weights=chosen)
        variance = np.zeros(values.shape[1])
        for block in np.flatnonzero((drawn > 0) & (drawn < size)):
            inside = held[ranked.block == block]
            share = drawn[block] / size[block]
            variance += drawn[block] * (1 - share) * np.var(inside, axis=0, ddof=1)
        return np.sqrt(variance)

    def passes(self, draws: int) -> Iterator[np.ndarray | None]:
        """None for the rows as they are, then how often each draw takes each position [n]."""
        yield None
        for weights in self.prompts.weights[:draws]:
            yield weights[self.prompts.codes]


def _counts(sizes: np.ndarray, budget: float) -> np.ndarray:
    return np.array([registry.budget_count(int(size), budget) for size in sizes], dtype=float)


@dataclass(frozen=True)
class Chosen:
    """What one ranking selects at every budget, where one budget is spent on all n positions.

    Attributes:
        first: [n] number of the smallest budget that selects all rows of the position, B for none.
        height: [n] as the last row of `Candidates.inside`.
        cut: [B] position that the cut of a budget falls into; -1 where it falls into none.
        part: [B] share of its rows that is selected.
    """

    first: np.ndarray
    height: np.ndarray
    cut: np.ndarray
    part: np.ndarray

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[B + 1, M] sums of values [n, M] over the selections, and with heights."""
        budgets = len(self.cut)
        whole = [
            np.bincount(self.first, weights=column, minlength=budgets + 1) for column in values.T
        ]
        inside = np.cumsum(np.array(whole).T[:budgets], axis=0)
        inside += np.where(self.cut >= 0, self.part, 0.0)[:, None] * values[self.cut]
        return np.vstack([inside, self.height @ values])

    @property
    def nearest(self) -> np.ndarray:
        """[n] `first`, with each cut moved to the nearer end of the position it falls into."""
        first = self.first.copy()
        near = (self.cut >= 0) & (self.part >= 0.5)
        # The smallest budget is written last.
        first[self.cut[near][::-1]] = np.flatnonzero(near)[::-1]
        return first


def choose(candidates: Candidates, ranked: Ranked, copies: np.ndarray | None) -> Chosen:
    """Select by one ranking, in one pass; see `Chosen`."""
    n = len(candidates.groups)
    rows = np.ones(len(ranked.rows)) if copies is None else copies[ranked.rows]
    size = float(n if copies is None else copies.sum())
    upto = np.cumsum(rows)
    counts = np.array([registry.budget_count(int(size), b) for b in candidates.budgets])
    whole = np.searchsorted(upto, counts, side="right")
    first = np.full(n, len(counts))
    first[ranked.rows] = np.repeat(np.arange(len(counts) + 1), np.diff(np.r_[0, whole, len(rows)]))
    height = np.zeros(n)
    height[ranked.rows] = (size - upto + rows / 2) / size
    cut, part = np.full(len(counts), -1), np.zeros(len(counts))
    inside = whole < len(rows)
    at = whole[inside]
    cut[inside] = ranked.rows[at]
    part[inside] = 1 - (upto[at] - counts[inside]) / rows[at]
    return Chosen(first, height, cut, part)


@dataclass(frozen=True)
class Sums:
    """What selections hold of each column of values, in every pass.

    Attributes:
        inside: [P, C, B + 1, M] sums over the selections; with heights in the last of B + 1.
        oracle: [P, B + 1, M] the same where each column ranks its own positions.
        total: [P, M] sums over all n positions.
        both: [P, B, C, C] rows that two criteria select; empty unless asked for.
        grouped: Whether the passes are the groups of a divided table (`prompt_groups`), and not the
            rows as they are with their draws.
    """

    inside: np.ndarray
    oracle: np.ndarray
    total: np.ndarray
    both: np.ndarray
    grouped: bool = False

    @classmethod
    def of_groups(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of several tables, a pass each."""
        names = ("inside", "oracle", "total", "both")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, grouped=True)

    def estimate(self, passes: np.ndarray, positions: int, prompts: int) -> Estimate:
        """An estimate from the value of a statistic in every pass [P]."""
        if not self.grouped:
            return Estimate(float(passes[0]), passes[1:], positions, prompts)
        value, draws = of_values(passes)
        return Estimate(value, draws, positions, prompts, groups=len(passes))


def selection_sums(
    candidates: Candidates,
    values: Callable[[np.ndarray | None], np.ndarray],
    *,
    draws: int = SELECTION_DRAWS,
    oracles: Sequence[int] = (),
    overlaps: bool = False,
) -> Sums:
    """Sum values over the selections of every criterion, in every draw.

    Args:
        candidates: Positions, criteria and budgets.
        values: Returns columns [n, M] in a pass, from how often it takes each position.
        draws: The first of the prompts' draws that are used.
        oracles: Columns that rank their own positions, for `Sums.oracle`.
        overlaps: Whether the overlap of every two selections is wanted.

    Returns:
        The sums.
    """
    best = {
        m: candidates.ranked(np.nan_to_num(values(None)[:, m]), ties="position") for m in oracles
    }
    made: dict[str, list] = {"inside": [], "oracle": [], "total": [], "both": []}
    for copies in candidates.passes(draws):
        held = np.array(values(copies), dtype=np.float64, order="F")
        if copies is not None:
            held *= copies[:, None]
        found = [_one(candidates, name, copies, held, overlaps) for name in candidates.names]
        made["inside"].append([sums for sums, _ in found])
        kept = [each for _, each in found]
        made["both"].append(_overlaps(kept, copies, len(candidates.budgets)) if overlaps else [])
        oracle = np.full((len(candidates.budgets) + 1, held.shape[1]), np.nan)
        for m, ranked in best.items():
            oracle[:, m] = _sums(candidates, ranked, copies, held[:, [m]])[:, 0]
        made["oracle"].append(oracle)
        made["total"].append(held.sum(axis=0))
    return Sums(**{name: np.array(passes) for name, passes in made.items()})


def _sums(
    candidates: Candidates, ranked: Ranked, copies: np.ndarray | None, held: np.ndarray
) -> np.ndarray:
    """[B + 1, M] sums of values that are counted already [n, M]."""
    if candidates.plain:
        return choose(candidates, ranked, copies).sums(held)
    return candidates.inside(ranked, copies) @ held


def _one(
    candidates: Candidates, name: str, copies: np.ndarray | None, held: np.ndarray, overlaps: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A criterion's sums [B + 1, M], the mean over its rankings, and its selections for overlaps.

    These are the smallest budget [n] that selects a position or, where a share of it may be
    selected, the shares [B, n]. Of a random criterion they are those of its first ranking.
    """
    rankings = candidates.rankings_of(name, copies)
    if not candidates.plain:
        kept = [candidates.inside(ranked, copies) for ranked in rankings]
        return np.mean([each @ held for each in kept], axis=0), kept[0][:-1]
    chosen = [choose(candidates, ranked, copies) for ranked in rankings]
    sums = np.mean([each.sums(held) for each in chosen], axis=0)
    return sums, chosen[0].nearest if overlaps else chosen[0].first


def _overlaps(kept: list[np.ndarray], copies: np.ndarray | None, budgets: int) -> np.ndarray:
    """[B, C, C] rows that two selections share; of one with itself, its own rows."""
    if kept[0].ndim == 2:
        chosen = np.stack(kept, axis=1)
        counted = chosen if copies is None else chosen * copies
        both = np.matmul(counted, chosen.transpose(0, 2, 1))
        both[:, *np.diag_indices(len(kept))] = counted.sum(axis=2)
        return both
    both = np.empty((budgets, len(kept), len(kept)))
    for i, one in enumerate(kept):
        for j in range(i + 1):
            cells = np.bincount(
                one * (budgets + 1) + kept[j], weights=copies, minlength=(budgets + 1) ** 2
            ).reshape(budgets + 1, budgets + 1)
            shared = np.cumsum(np.cumsum(cells, axis=0), axis=1)
            both[:, i, j] = both[:, j, i] = np.diagonal(shared)[:budgets]
    return both
