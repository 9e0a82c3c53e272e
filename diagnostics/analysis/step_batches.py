"""The step batches' part of an interval: a table's estimates, computed anew without each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.config import Bootstrap
from diagnostics.core.folds import combine, step_count

Key = TypeVar("Key", bound=Hashable)


def over_steps(
    make: Callable[[pd.DataFrame, Bootstrap], dict[Key, Estimate]],
    tokens: pd.DataFrame,
    bootstrap: Bootstrap,
) -> dict[Key, Estimate]:
    """Estimates of a token table whose intervals carry its step batches.

    Args:
        make: Takes a token table and how prompts are resampled, and returns estimates by key.
        tokens: A token table. Where it has one step, its estimates carry the prompts alone.
        bootstrap: How the intervals are made.

    Returns:
        The estimates with their values without each step; NaN where one is undefined then.
    """
    found = make(tokens, bootstrap)
    steps = step_count(tokens)
    if steps < 2:
        return found
    still = replace(bootstrap, draws=0)
    without = [make(combine(tokens, without=step), still) for step in range(steps)]
    return {
        key: replace(
            estimate,
            without_step=np.array([part[key].value if key in part else np.nan for part in without]),
        )
        for key, estimate in found.items()
    }
