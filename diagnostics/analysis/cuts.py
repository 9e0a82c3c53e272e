"""Cuts made anew in every draw: scores, quadrants and groups of resampled positions.

N() clips at quantiles, quadrants lie between medians, and tertiles between ranks. An interval that
takes them as given is too short wherever they matter. Here a statistic gets the rows of each draw
as a token table, and makes all of them again.

A table of one step has two populations, and its scores are normalized over both. A draw of one
population then keeps the rows of the other as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, exact
from diagnostics.analysis.rank_correlation import groups_by_rank
from diagnostics.analysis.splits import Split

DRAWS = 200
"""Draws of a table's statistics: their standard errors are then themselves uncertain by 5 %."""
Values = dict[tuple[str, str], np.ndarray]
"""[n] values by (population, outcome)."""


@dataclass(frozen=True)
class Drawn:
    """The positions of one draw.

    Attributes:
        tokens: The n drawn rows, then the rows of the other population, if there is one; the
            columns are those that the statistic asked for.
        values: [n] each outcome by (population, outcome).
        prompt: [n] number of the drawn prompt; copies of a prompt have numbers of their own.
    """

    tokens: pd.DataFrame
    values: Values
    prompt: np.ndarray

    def scores(self, name: str, *, seed: int = 0) -> np.ndarray:
        """[n] scores of a criterion, normalized over all rows of `tokens`."""
        return registry.score_criterion(self.tokens, name, seed=seed)[: len(self.prompt)]

    def quadrants(self) -> np.ndarray:
        """[n] quadrant of each position, between the medians of all rows of `tokens`."""
        return registry.quadrants(self.tokens)[: len(self.prompt)]

    def groups(self, name: str, count: int, within: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """[n] group of each position by the rank of its score among those under a mask, from 1."""
        return groups_by_rank(self.scores(name, seed=seed), count, within)


def needed_columns(
    tokens: pd.DataFrame, names: Iterable[str], further: Iterable[str] = ()
) -> list[str]:
    """Columns of a table that criteria read, their stand-ins included, and further ones."""
    found = [need for name in names for need in registry.find(name).columns(tokens).values()]
    return list(dict.fromkeys([*found, *further]))


def redrawn(
    statistic: Callable[[Drawn], np.ndarray],
    tokens: pd.DataFrame,
    together: list[Split],
    needs: Iterable[str],
    outcomes: Iterable[str],
) -> list[Estimate]:
    """Estimate statistics that are computed from the rows of every draw.

    Args:
        statistic: Takes the positions of a draw and returns P values.
        tokens: A token table of N rows.
        together: Populations of the same positions.
        needs: Columns that the statistic reads.
        outcomes: Outcomes that the statistic reads.

    Returns:
        P estimates; their counts are those of all positions of the populations.
    """
    population = _Population(tokens, together, list(needs), list(outcomes))
    return exact(
        lambda columns: statistic(population.drawn(columns)),
        population.columns,
        population.prompts,
        draws=DRAWS,
    )


def whole(
    tokens: pd.DataFrame, together: list[Split], needs: Iterable[str], outcomes: Iterable[str]
) -> Drawn:
    """The positions of populations themselves, as a draw that takes every prompt once, in the order
    of the table.
    """
    population = _Population(tokens, together, list(needs), list(outcomes))
    return population.drawn(population.columns | {"prompt": population.prompts.codes})


def counted(estimate: Estimate, mask: np.ndarray, prompt: np.ndarray) -> Estimate:
    """An estimate with the counts of the positions [n] under a mask."""
    return replace(estimate, positions=int(mask.sum()), prompts=different(prompt[mask]))


def different(numbers: np.ndarray) -> int:
    """How many different numbers there are among numbers from 0."""
    return int(np.count_nonzero(np.bincount(numbers)))


_NAMES = ("context_id", "prompt_id")


class _Population:
    """The columns of populations of the same positions, and the rows that no draw moves."""

    def __init__(
        self, tokens: pd.DataFrame, together: list[Split], needs: list[str], outcomes: list[str]
    ):
        mask = together[0].mask
        self.prompts = together[0].prompts
        # Names of contexts become numbers, so that copies of a prompt can have their own.
        self.needs = {
            name: pd.factorize(tokens[name])[0] if name in _NAMES else tokens[name].to_numpy()
            for name in needs
        }
        self.fixed = {name: values[~mask] for name, values in self.needs.items()}
        self.values = {
            (split.name, outcome): split.values(tokens, outcome)
            for split in together
            for outcome in outcomes
        }
        self.columns: dict = {name: values[mask] for name, values in self.needs.items()}
        self.columns |= self.values
        self.names = len(tokens)

    def drawn(self, columns: dict) -> Drawn:
        """The positions of a draw from its columns."""
        taken = {name: columns[name] for name in self.needs}
        for name in _NAMES:
            if name in taken:
                taken[name] = taken[name] + self.names * (1 + columns["prompt"])
        rows = {name: np.concatenate([taken[name], self.fixed[name]]) for name in self.needs}
        values = {key: columns[key] for key in self.values}
        return Drawn(pd.DataFrame(rows), values, columns["prompt"])
