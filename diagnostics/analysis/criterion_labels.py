"""Whether an agreement over criteria is more than their labels: permutation and near-duplicates.

Criteria that have nothing to do with an outcome would agree with it by chance. The permutation
exchanges the criteria's labels on one side, jointly over budgets; p is the share of exchanges whose
Kendall's tau-b is at least as far from 0 as the observed one (all exchanges up to EXACT_GROUPS
labels, else EXCHANGES seeded ones, with (1 + hits) / (1 + EXCHANGES)). Criteria that rank positions
nearly alike are one witness, not several: `grouping` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, permutations
from math import factorial

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics import criteria as registry
from diagnostics.analysis.cell_effects import NO_CELLS

EXACT_GROUPS = 8
"""Labels up to which every exchange is made: 8! = 40,320."""
EXCHANGES = 10_000
"""Seeded exchanges above that: a p of .05 is then known to within .004."""
BLOCK = 1_000_000
"""Number of elements of a [exchanges, pairs] block that is held in memory at a time."""
ALIKE = 0.95
"""Spearman correlation of two criteria's scores from which they are near-duplicates."""
FAMILIES = (
    ("advantage_abs", "surprise"),
    ("teachability", "q3_teachability", "teachability_full", "teachability_released"),
    ("divergence", "jsd", "hellinger"),
)
"""Near-duplicates where there is no token table to compare scores in."""

Cell = tuple[str, float]
"""Criterion and budget."""


# Permutation over criteria


def permutation_p(
    cells: pd.DataFrame, x_C: np.ndarray, y_C: np.ndarray, pairs: np.ndarray, *, seed: int = 0
) -> float:
    """Two-sided p value of tau-b when criteria's labels are exchanged, jointly over budgets.

    Args:
        cells: [C] columns criterion and budget, each pair once.
        x_C: [C] one side's values.
        y_C: [C] the other side's; its labels are exchanged.
        pairs: [C, C] symmetric mask of the pairs that count, the same for all cells of a budget.
        seed: Of the exchanges where there are more than EXACT_GROUPS labels.

    Returns:
        Share of the exchanges whose tau is at least as far from 0 as the observed one. A pair of
        which an exchange leaves a cell without a value does not count in it. NaN where tau is
        undefined.
    """
    used = np.flatnonzero(pairs.any(axis=1))
    if not len(used):
        return np.nan
    labels, g = np.unique(cells["criterion"].to_numpy(dtype=str)[used], return_inverse=True)
    budgets, b = np.unique(cells["budget"].to_numpy(dtype=float)[used], return_inverse=True)
    x_GB, y_GB = np.full((2, len(labels), len(budgets)), np.nan)
    x_GB[g, b], y_GB[g, b] = x_C[used], y_C[used]
    together = np.zeros((len(budgets), len(budgets)), dtype=bool)
    first, second = np.nonzero(pairs[np.ix_(used, used)])
    together[b[first], b[second]] = True
    # Where labels move, pairs of cells are pairs of budgets: any two distinct cells of two budgets
    # that are compared.
    chosen = np.tile(together, (len(labels), len(labels)))
    # Each pair once.
    return _share_as_far(x_GB, y_GB, np.flatnonzero(np.triu(chosen, 1).reshape(-1)), seed)


def _share_as_far(x_GB: np.ndarray, y_GB: np.ndarray, chosen: np.ndarray, seed: int) -> float:
    x_signs, x_known = (part.reshape(-1)[chosen] for part in _signs(x_GB))
    y_signs, y_known = (part.reshape(-1) for part in _signs(y_GB))
    first, second = np.divmod(chosen, y_GB.size)

    def taus(orders: np.ndarray) -> np.ndarray:
        at = orders[:, :, None] * y_GB.shape[1] + np.arange(y_GB.shape[1])
        at = at.reshape(len(orders), -1).astype(np.int32)
        pairs = at[:, first] * np.int32(y_GB.size) + at[:, second]
        signs = y_signs.take(pairs)
        known = np.ones_like(signs) if y_known.all() else y_known.take(pairs)
        untied_x = known @ np.abs(x_signs)
        untied_y = np.abs(signs) @ x_known
        with np.errstate(invalid="ignore", divide="ignore"):
            return (signs @ x_signs) / np.sqrt(untied_x * untied_y)

    observed = taus(np.arange(len(x_GB))[None])[0]
    if not np.isfinite(observed):
        return np.nan
    hits, total, exact = 0, 0, len(x_GB) <= EXACT_GROUPS
    for orders in _exchanges(len(x_GB), seed, max(1, BLOCK // max(len(chosen), 1))):
        found = taus(orders)
        # An exchange that leaves tau undefined speaks for chance.
        hits += int(np.sum(~(np.abs(found) < abs(observed) - 1e-6)))
        total += len(orders)
    return hits / total if exact else (1 + hits) / (1 + total)


def _signs(values_GB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[cells, cells] signs of differences, 0 where either is NaN, and 1.0 where both are known."""
    flat = values_GB.reshape(-1)
    known = np.isfinite(flat)
    both = known[:, None] & known[None, :]
    filled = np.where(known, flat, 0.0)
    signs = np.sign(filled[:, None] - filled[None, :]) * both
    return signs.astype(np.float32), both.astype(np.float32)


def _exchanges(count: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """Blocks [exchanges, count] of orders of the labels."""
    if count <= EXACT_GROUPS:
        every = np.array(list(permutations(range(count)))).reshape(factorial(count), count)
    else:
        rng = np.random.default_rng([seed, 17])
        every = rng.permuted(np.tile(np.arange(count), (EXCHANGES, 1)), axis=1)
    for first in range(0, len(every), block):
        yield every[first : first + block]


# Near-duplicates


def group_cells(cells: Iterable[Cell], groups: Mapping[str, str]) -> dict[Cell, list[Cell]]:
    """Members of each (group, budget); a criterion without a group is its own."""
    found: dict[Cell, list[Cell]] = {}
    for criterion, budget in cells:
        found.setdefault((groups.get(criterion, criterion), budget), []).append((criterion, budget))
    return found


def grouping(criteria: Iterable[str], tokens: pd.DataFrame | None = None) -> dict[str, str]:
    """Group of each criterion: itself, or the first of its near-duplicates.

    Args:
        criteria: Names.
        tokens: A token table in which their scores are compared; None takes FAMILIES.

    Returns:
        The name of a group's first member by criterion. Two criteria whose scores have a Spearman
        correlation of at least ALIKE, over the positions where both are defined, are in one group,
        and so is whoever is alike with either.
    """
    names = list(dict.fromkeys(criteria))
    group = {name: name for name in names}
    for one, other in _alike(names, tokens):
        kept, merged = group[one], group[other]
        group = {name: kept if label == merged else label for name, label in group.items()}
    return group


def _alike(names: Sequence[str], tokens: pd.DataFrame | None) -> Iterator[tuple[str, str]]:
    if tokens is None:
        for family in FAMILIES:
            here = [name for name in names if name in family]
            yield from pairwise(here)
        return
    scorable = registry.available(tokens)
    scored = {
        name: np.asarray(registry.score_criterion(tokens, name), dtype=np.float64)
        for name in names
        if name not in ("random", *NO_CELLS) and registry.find(name).name in scorable
    }
    for one, other in combinations(scored, 2):
        both = np.isfinite(scored[one]) & np.isfinite(scored[other])
        a, b = scored[one][both], scored[other][both]
        defined = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
        if defined and stats.spearmanr(a, b).statistic >= ALIKE:
            yield one, other
