"""Random groups of prompts: intervals of tables that are too large to be drawn anew.

    T   = mean_b T_b                        each statistic is computed once in each of B groups
    SE^2 = 1/(B (B-1)) sum_b (T_b - T)^2    and its t interval has B-1 degrees of freedom

The prompts are divided at random, whole, so that each group is a small table of the same kind, in
which cuts, ranks and selections are made anew. Every position is worked on once, whatever the
number of prompts, where draws and a jackknife work on each some hundreds of times.

A group's statistic is biased by some 1/m, m the prompts of a group, and so is the mean. With 2,000
prompts or more that is small against the standard error, about 1/sqrt(B m): a correlation's bias is
at most 0.2 / m, which at m = 40 is 0.2 standard errors.

Reference: Wolter 2007, "Introduction to Variance Estimation", ch. 2 (random groups).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.analysis.bootstrap import ENOUGH_DRAWS, Estimate
from diagnostics.core.processes import share_out
from diagnostics.core.schema import read_parquet, validate_tokens

log = logging.getLogger("diagnostics")
GROUPS = 50
"""Number of groups: a standard error is then itself uncertain by 10 %."""
LEAST_PROMPTS = 2000
"""Prompts of a table from which on it is divided, so that a group has 40."""
LEAST_POSITIONS = 50_000
"""Positions of a table from which on it is divided, so that a group has 1,000."""
Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


_divided: list[tuple[weakref.ref, int, list[pd.DataFrame]]] = []
"""The table that was divided last, so that all tables of a study share its groups."""


STUDIED = 1_000_000
"""Positions that a study of a table with many prompts is made from; of more, whole prompts are
drawn at random. Standard errors are then those of the prompts drawn, and the counts say so."""


def read_studied(path: str | Path, seed: int, *, correct: float | None = None) -> pd.DataFrame:
    """Read a token table, or only the sample of it that `studied` would take.

    Args:
        path: A `tokens.parquet`.
        seed: Seed of the sample.
        correct: Only the rows with this value of the column `correct`; None takes all.

    Returns:
        What `studied` makes of the validated table; the rest of a large one is never in memory.

    Raises:
        DiagnosticsError: The file is missing or damaged, or holds no token table.
    """
    side = [] if correct is None else [("correct", "==", correct)]
    ids = (
        read_parquet(path, columns=["prompt_id"], filters=side or None)["prompt_id"]
        if is_long(path)
        else None
    )
    chosen = _chosen(ids, seed) if ids is not None and len(ids) > STUDIED else None
    if chosen is None:
        return validate_tokens(read_parquet(path, filters=side or None))
    names, told = chosen
    of_prompts = [*side, ("prompt_id", "in", names)]
    return _told(validate_tokens(read_parquet(path, filters=of_prompts)), told)


def is_long(path: str | Path) -> bool:
    """Whether a parquet file has more rows than are studied; what is no such file is not."""
    try:
        about = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False  # its reader says what is wrong with it
    return about.num_rows > STUDIED and "prompt_id" in about.schema.names


def studied(tokens: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table itself, or the positions of a random sample of its prompts where it is too large.

    Args:
        tokens: A token table.
        seed: Seed of the sample.

    Returns:
        About `STUDIED` rows in their order, with a warning among its attributes that counts what
        was left out.
    """
    if len(tokens) <= STUDIED or "prompt_id" not in tokens:
        return tokens
    chosen = _chosen(tokens["prompt_id"], seed)
    if chosen is None:
        return tokens
    names, told = chosen
    return _told(tokens[tokens["prompt_id"].isin(names)].reset_index(drop=True), told)


def _chosen(ids: pd.Series, seed: int) -> tuple[list[str], str] | None:
    """Names of the prompts that a study is made from and a sentence on them, from the prompt of
    every position; None where all are.
    """
    codes, names = pd.factorize(ids)
    if len(names) < LEAST_PROMPTS or (codes < 0).any():
        return None
    order = np.random.default_rng([seed, 3]).permutation(len(names))
    upto = np.cumsum(np.bincount(codes, minlength=len(names))[order])
    wanted = max(LEAST_PROMPTS, int(np.searchsorted(upto, STUDIED, side="right")))
    return list(names[order[:wanted]]), (
        f"The study is of {upto[wanted - 1]:,} positions of {wanted:,} prompts, drawn at random"
        f" from {len(codes):,} positions of {len(names):,}."
    )


@functools.cache
def _say(told: str) -> None:
    """Log a sentence once, however many tables of the run are made from the sample."""
    log.warning("%s", told)


def _told(sample: pd.DataFrame, told: str) -> pd.DataFrame:
    """The sample with its warning, which the study's table of warnings takes over."""
    _say(told)
    earlier = sample.attrs.get("warnings", ())
    sample.attrs["warnings"] = [*earlier, ["sampled", "the token table", told]]
    return sample


_MARK = "group of prompts"
"""Attribute of a table that is a group, which `combine` and other copies keep."""


def is_group(tokens: pd.DataFrame) -> bool:
    """Whether a table is one of the groups of a larger one."""
    return bool(tokens.attrs.get(_MARK))


def groups_of(tokens: pd.DataFrame, seed: int) -> list[pd.DataFrame]:
    """Divide a token table into groups of whole prompts; empty where it is not to be divided.

    Args:
        tokens: A token table.
        seed: Seed of the division.

    Returns:
        Tables whose prompts are drawn at random, the same for the same table and seed. They are
        kept as long as the table is.
    """
    if is_group(tokens) or len(tokens) < LEAST_POSITIONS or "prompt_id" not in tokens:
        return []
    for table, of, groups in _divided:
        if table() is tokens and of == seed:
            return groups
    groups = _divide(tokens, seed)
    _divided.clear()
    _divided.append((weakref.ref(tokens, lambda _: _divided.clear()), seed, groups))
    return groups


def _divide(tokens: pd.DataFrame, seed: int) -> list[pd.DataFrame]:
    codes, names = pd.factorize(tokens["prompt_id"])
    if len(names) < LEAST_PROMPTS:
        return []
    # A stream of its own, which no other use of the seed shares.
    group_of = np.random.default_rng([seed, 2]).permutation(len(names)) % GROUPS
    group = group_of[codes].astype(np.uint8)
    order = np.argsort(group, kind="stable")
    ordered = tokens.take(order).reset_index(drop=True)
    ends = np.cumsum(np.bincount(group, minlength=GROUPS))
    groups = [ordered.iloc[start:end] for start, end in zip([0, *ends], ends)]
    for group in groups:
        group.index = pd.RangeIndex(len(group))
        group.attrs[_MARK] = True
    return groups


def over_groups(
    make: Callable[[pd.DataFrame], dict[Key, Estimate]], groups: Sequence[pd.DataFrame]
) -> dict[Key, Estimate]:
    """Estimates from the values that they have in each group.

    Args:
        make: Takes a group and returns estimates by key; their draws are not used.
        groups: As from `groups_of`.

    Returns:
        The means over groups by key, with their intervals, the positions and prompts of all groups,
        and `without_step` as the mean of the groups' own.
    """
    made = of_each(make, groups)
    keys = dict.fromkeys(key for part in made for key in part)
    return {key: _mean([part.get(key) for part in made]) for key in keys}


def of_each(make: Callable[[pd.DataFrame], Made], groups: Sequence[pd.DataFrame]) -> list[Made]:
    """What is made of each group, in as many processes as are `processes.usable`."""
    return list(share_out(range(len(groups)), lambda number: make(groups[number])).values())


def _mean(found: Sequence[Estimate | None]) -> Estimate:
    """One estimate of the groups' own; None where a group has none."""
    present = [each for each in found if each is not None]
    value, draws = of_values(np.array([each.value if each else np.nan for each in found]))
    steps = [each.without_step for each in present if each.without_step is not None]
    without = [of_values(np.array(values))[0] for values in zip(*steps)]
    return replace(
        present[0],
        value=value,
        draws=draws,
        positions=sum(each.positions for each in present),
        prompts=sum(each.prompts for each in present),
        left_out=None,
        without_step=np.array(without) if steps else None,
        groups=len(found),
    )


def of_values(values: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of the groups' values [B], and draws [B] whose spread is its standard error.

    Where too few groups have a value it is NaN.
    """
    defined = np.isfinite(values)
    if defined.sum() < max(2, ENOUGH_DRAWS * len(values)):
        return np.nan, np.full(len(values), np.nan)
    value = float(values[defined].mean())
    return value, value + (values - value) / np.sqrt(defined.sum())
