"""Coverage of the study's intervals on a real population, with step batches drawn anew.

    python benchmarks/coverage.py make-population --folder FOLDER
    python benchmarks/coverage.py make-samples    --folder FOLDER --prompts 64 --samples 200
    python benchmarks/coverage.py make-effects    --folder FOLDER
    python benchmarks/coverage.py measure         --folder FOLDER --prompts 64
    python benchmarks/coverage.py report          --folder FOLDER --output benchmarks/COVERAGE.md

`coverage_population` has how population, samples and effects are made. Every step is taken up
again where it was interrupted; `measure` and `report` run no model.

The estimand of a statistic is its expectation over step batches on the whole population: the mean,
over DRAWS_OF_BATCHES draws, of the statistic of all population positions, each with the held-out
mean of the steps on F batches of G/F prompts that the draw assigns to its prompt. An interval of a
sample covers if it holds the estimand.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import sys

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diagnostics.analysis.config import Bootstrap
from diagnostics.core.folds import combine, fold_columns

FOLDS = 4
LEVEL = 0.95
DRAWS = 300
DRAWS_OF_BATCHES = 48
CRITERIA = ("divergence", "teachability", "compatibility", "entropy", "advantage_abs")
OUTCOMES = ("context_gain", "gain", "reverse_gain", "relative_gain")
POPULATIONS = ("held_out", "all")
"""The population of positions that is looked at: held out in a sample; the estimand's table has no
folds, and all of its positions are held out."""


@dataclass(frozen=True)
class Family:
    """Intervals of one kind, read from one table of the analysis.

    Attributes:
        name: What the report calls them.
        make: Takes a table and how intervals are made, and returns the analysis's table.
        value: Column of the statistic.
        keys: Columns that name a row.
        low: Column of the interval's lower end.
        high: Column of the interval's upper end.
        conservative: True where the documentation states that intervals are too wide.
    """

    name: str
    make: Callable[[pd.DataFrame, Bootstrap], pd.DataFrame]
    value: str
    keys: tuple[str, ...]
    low: str = "low"
    high: str = "high"
    conservative: bool = False

    def rows(self, table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
        """One row per statistic: family, statistic, estimate, low, high."""
        found = self.make(table, bootstrap)
        if "split" in found:
            found = found[found["split"].isin(POPULATIONS)]
        if "outcome" in found:
            found = found[found["outcome"].isin(OUTCOMES)]
        names = found[list(self.keys)].astype(str).agg(" ".join, axis=1)
        ends = {name: found[getattr(self, name)].to_numpy(float) for name in ("low", "high")}
        return pd.DataFrame(
            {
                "family": self.name,
                "statistic": names.to_numpy(),
                "estimate": found[self.value].to_numpy(float),
                **ends,
            }
        )


# --- tables of samples and of the population
# ---------------------------------------------------------------------------------------


def fold_table(
    tokens: pd.DataFrame, gains: dict[str, np.ndarray], *, real: str, permuted: str
) -> pd.DataFrame:
    """The token table that a probe would have written.

    Args:
        tokens: A scored table of N rows with `fold`.
        gains: By kind of step, [F, 2, N]: gains of forward and reverse KL after each fold's step.
        real: The kind that stands for the step towards the teacher.
        permuted: The kind that stands for the step towards a permuted teacher.
    """
    columns = {}
    for fold in range(len(gains[real])):
        columns[f"gain_fold{fold}"] = gains[real][fold, 0].astype(float)
        columns[f"reverse_gain_fold{fold}"] = gains[real][fold, 1].astype(float)
        columns[f"gain_permuted_fold{fold}"] = gains[permuted][fold, 0].astype(float)
    return combine(tokens.assign(**columns))


def sample_table(
    folder: Path, prompts: int, number: int, *, real: str = "real", permuted: str = "permuted"
) -> pd.DataFrame:
    """The fold table of one sample."""
    stem = folder / f"samples{prompts}" / f"{number:04d}"
    with np.load(stem.with_suffix(".npz")) as gains:
        kept = {kind: gains[kind] for kind in (real, permuted)}
    tokens = pd.read_parquet(stem.with_suffix(".parquet"))
    return fold_table(tokens, kept, real=real, permuted=permuted)


def sample_numbers(folder: Path, prompts: int) -> list[int]:
    """Numbers of the samples that are finished."""
    return sorted(
        int(file.stem)
        for file in (folder / f"samples{prompts}").glob("*.npz")
        if "partial" not in file.name
    )


def population_tables(folder: Path, prompts: int, draws: int) -> Iterator[pd.DataFrame]:
    """The population's table under different draws of F step batches, without its folds.

    Without the folds' columns a table has one step, so that no interval is made over steps.
    """
    tokens = pd.read_parquet(folder / "population.tokens.parquet")
    files = sorted(folder.glob(f"batch{prompts // FOLDS}-*.npz"))
    kinds = ("real", "permuted")
    gains = []
    for file in files:
        with np.load(file) as kept:
            gains.append({kind: kept[kind] for kind in kinds})
    names = tokens.prompt_id.unique()
    for draw in range(draws):
        rng = np.random.default_rng([prompts, draw])
        folds = dict(zip(names, rng.permutation(len(names)) % FOLDS, strict=True))
        chosen = rng.choice(len(gains), FOLDS, replace=False)
        table = fold_table(
            tokens.assign(fold=tokens.prompt_id.map(folds).astype(np.int32)),
            {kind: np.stack([gains[batch][kind] for batch in chosen]) for kind in kinds},
            real="real",
            permuted="permuted",
        )
        yield without_folds(table)


def without_folds(table: pd.DataFrame) -> pd.DataFrame:
    """A fold table's held-out means alone."""
    steps = [
        name
        for outcome in ("gain", "reverse_gain", "gain_permuted")
        for name in fold_columns(table, outcome)
    ]
    own = [name for name in table if name.startswith("own_")]
    return table.drop(columns=["fold", *steps, *own])


# --- families of intervals
# ---------------------------------------------------------------------------------------


def _correlations(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    return correlations.correlate(table, criteria=CRITERIA, bootstrap=bootstrap)


def _differences(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    found = correlations.associate(table, criteria=CRITERIA, bootstrap=bootstrap)
    return correlations.correlation_differences(found, level=bootstrap.level)


def _tertiles(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    return quadrants.q3_contrast(table, bootstrap=bootstrap)


def _matched(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    return quadrants.matching(table, by=["compatibility"], bootstrap=bootstrap)


def _shares(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    return selection.selection_curves(
        table, criteria=CRITERIA, outcomes=OUTCOMES, budgets=BUDGETS, bootstrap=bootstrap
    )


def _summaries(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    found = selection.selection_summary(
        table, criteria=CRITERIA, outcomes=OUTCOMES, budgets=BUDGETS, bootstrap=bootstrap
    )
    return found[found["statistic"].isin(["area", "enrichment"])]


def _overlaps(table: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    found = selection.selection_overlap(
        table, criteria=CRITERIA, budgets=BUDGETS, bootstrap=bootstrap
    )
    return found[found["statistic"] == "jaccard"]


BUDGETS = (0.01, 0.05, 0.1, 0.3)
