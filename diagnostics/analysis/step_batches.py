"""The step batches: a table's estimates computed anew without each step, and their pooled drops."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.prompt_groups import groups_of, over_groups
from diagnostics.core.folds import combine, step_count

Key = TypeVar("Key", bound=Hashable)


def over_steps(
    make: Callable[..., dict[Key, Estimate]],
    tokens: pd.DataFrame,
    bootstrap: Bootstrap,
    *,
    before: Callable[[pd.DataFrame], Any] | None = None,
    whole: bool = False,
) -> dict[Key, Estimate]:
    """Estimates of a token table whose intervals carry its step batches.

    Args:
        make: Takes a token table and how prompts are resampled, and returns estimates by key.
        tokens: A token table. Where it has one step, its estimates carry the prompts alone. A table
            of many prompts is divided (`prompt_groups`), and `make` gets its groups.
        bootstrap: How the intervals are made.
        before: Makes of a table what no step changes; `make` then takes it as a third argument.
        whole: Whether `make` knows its rows by number, so that the table cannot be divided.

    Returns:
        The estimates with their values without each step; NaN where one is undefined then.
    """
    groups = [] if whole else groups_of(tokens, bootstrap.seed)
    if not groups:
        return _of_table(make, tokens, bootstrap, before)
    still = replace(bootstrap, draws=0)
    return over_groups(lambda group: _of_table(make, group, still, before), groups)


def _of_table(
    make: Callable[..., dict[Key, Estimate]],
    tokens: pd.DataFrame,
    bootstrap: Bootstrap,
    before: Callable[[pd.DataFrame], Any] | None,
) -> dict[Key, Estimate]:
    fixed = () if before is None else (before(tokens),)
    found = make(tokens, bootstrap, *fixed)
    steps = step_count(tokens)
    if steps < 2:
        return found
    still = replace(bootstrap, draws=0)
    without = [make(combine(tokens, without=step), still, *fixed) for step in range(steps)]
    return {
        key: replace(
            estimate,
            without_step=np.array([part[key].value if key in part else np.nan for part in without]),
        )
        for key, estimate in found.items()
    }


def pooled_drops(calibration: pd.DataFrame) -> pd.DataFrame:
    """The drops of a calibration over all folds together, by which the size was chosen.

    Args:
        calibration: One row per step size and fold, with the columns step_size, predicted_drop,
            realised_drop (nats per position of the step's loss), chosen and, where they are known,
            fold and relative_norm.

    Returns:
        One row per size that every fold tried, ascending, with the columns step_size,
        predicted_drop and realised_drop (means over the folds, nats), ratio (summed realised over
        summed predicted drop, NaN where none is predicted), chosen, folds and relative_norm (mean).
    """
    folds = calibration["fold"].nunique() if "fold" in calibration else 1
    by_size = calibration.groupby("step_size", sort=True)
    means = ["predicted_drop", "realised_drop"]
    means += ["relative_norm"] if "relative_norm" in calibration else []
    pooled = by_size[means].mean()
    predicted = pooled["predicted_drop"]
    pooled = pooled.assign(
        ratio=pooled["realised_drop"] / predicted.where(predicted != 0),
        chosen=by_size["chosen"].max().astype(bool),
        folds=folds,
    )
    return pooled[by_size.size() == folds].reset_index()
