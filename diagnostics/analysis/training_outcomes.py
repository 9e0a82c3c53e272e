"""What a grid of short trainings gained, over seeds and prompts, and whether the offline answers
foresaw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics import criteria as registry
from diagnostics.analysis import rank_agreement as ranks
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.claims import MINIMUM_SEEDS, RIVALS, TA_BUDGET
from diagnostics.analysis.rank_agreement import CellScores
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet, require_columns, validate_tokens

LOWER_IS_BETTER = ("forward_kl", "reverse_kl", "bank_forward_kl", "bank_reverse_kl")
HIGHER_IS_BETTER = ("accuracy", "accuracy_greedy")
JUDGED = ("reverse_kl", "forward_kl", "accuracy", "accuracy_greedy")
"""Measures that verdicts and agreement are about."""
CLAIMANT = "teachability"
MARGIN = 0.1
"""Share of full's gain by which a criterion may fall short and still match."""
FIRST_STEP = {
    "one_step_gain": "gain_step_1",
    "one_step_reverse_gain": "reverse_gain_step_1",
    "one_step_relative_gain": "relative_gain_step_1",
}
"""Measure -> column of training_gains.parquet."""


@dataclass(frozen=True)
class SeedPromptEstimate:
    """A value over seeds and prompts, with what its interval is made of."""

    seeds_S: np.ndarray
    """Value of each seed over all prompts; one entry for a value without seeds."""
    draws_DS: np.ndarray
    """The same in each draw of prompts."""
    prompts: int
    fixed: bool = False
    """True for the untouched student, which has no seeds and no spread over them."""

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.seeds_S.mean())

    def __neg__(self) -> SeedPromptEstimate:
        return SeedPromptEstimate(-self.seeds_S, -self.draws_DS, self.prompts, self.fixed)

    def __sub__(self, other: SeedPromptEstimate) -> SeedPromptEstimate:
        """Paired by seed and by prompt; a fixed value is the same for every seed."""
        if len(self.seeds_S) != len(other.seeds_S) and not (self.fixed or other.fixed):
            raise DiagnosticsError(
                f"Cells with {len(self.seeds_S)} and {len(other.seeds_S)} seeds cannot be paired."
                " Finish the grid."
            )
        return SeedPromptEstimate(
            self.seeds_S - other.seeds_S,
            self.draws_DS - other.draws_DS,
            self.prompts,
            self.fixed and other.fixed,
        )

    @property
    def errors(self) -> tuple[float, float]:
        """E_S and E_G of the module's head."""
        seeds = (
            0.0
            if self.fixed
            else self.seeds_S.var(ddof=1) / len(self.seeds_S)
            if len(self.seeds_S) > 1
            else np.nan
        )
        means_D = self.draws_DS.mean(axis=1)
        prompts = (
            np.var(means_D[np.isfinite(means_D)], ddof=1) * self.prompts / (self.prompts - 1)
            if self.prompts > 1
            else np.nan
        )
        return float(seeds), float(prompts)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end; NaN with one seed or one prompt."""
        seeds, prompts = self.errors
        error = seeds + prompts
        if not error > 0:
            return (self.value, self.value) if error == 0 else (np.nan, np.nan)
        freedom = error**2 / (
            (0.0 if self.fixed else seeds**2 / (len(self.seeds_S) - 1))
            + prompts**2 / (self.prompts - 1)
        )
        reach = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(error)
        return self.value - reach, self.value + reach

    def resampled(self, seed: int) -> np.ndarray:
        """Draws [D] over prompts and seeds at once; the same seeds are taken for every value of a
        grid.
        """
        count = self.draws_DS.shape[1]
        taken_DS = np.random.default_rng([seed, 11]).integers(
            count, size=(len(self.draws_DS), count)
        )
        return np.take_along_axis(self.draws_DS, taken_DS, axis=1).mean(axis=1)


class Outcomes:
    """The grid's evaluations as crossed values, on shared draws of the held-out prompts."""

    def __init__(self, rows: pd.DataFrame, *, draws: int = 1000, seed: int = 0):
        require_columns(
            rows,
            ("criterion", "budget", "seed", "measure", "prompt_id", "total", "count"),
            what="A table of training outcomes",
        )
        self.draws, self.seed = draws, seed
        self._prompts: dict[tuple, PromptClusters] = {}
        self.tables = {measure: part for measure, part in rows.groupby("measure", sort=False)}
        cells = rows.loc[
            rows["criterion"] != "untouched", ["criterion", "budget"]
        ].drop_duplicates()
        self.cells = list(cells.itertuples(index=False, name=None))

    def of(self, measure: str, criterion: str, budget: float) -> SeedPromptEstimate:
        """The measure of one cell. Raises DiagnosticsError where the grid does not hold it."""
        part = self.tables.get(measure, pd.DataFrame(columns=["criterion", "budget"]))
        part = part[(part["criterion"] == criterion) & (part["budget"] == budget)]
        if part.empty:
            raise DiagnosticsError(
                f"The grid holds no {measure} of {criterion} at {budget:g}. Train that cell first."
            )
        total_SG, count_SG = (
            part.pivot(index="seed", columns="prompt_id", values=name).sort_index(axis=1)
            for name in ("total", "count")
        )
        prompts = self._shared(tuple(total_SG.columns))
        total_SG, count_SG = (
            total_SG.to_numpy(dtype=np.float64),
            count_SG.to_numpy(dtype=np.float64),
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            draws_DS = (prompts.weights @ total_SG.T) / (prompts.weights @ count_SG.T)
            return SeedPromptEstimate(
                total_SG.sum(1) / count_SG.sum(1),
                draws_DS,
                prompts.count,
                fixed=criterion == "untouched",
            )

    def gain(self, measure: str, criterion: str, budget: float) -> SeedPromptEstimate:
        """Improvement over the untouched student; positive is better. A measure that is a gain
        already stays.
        """
        value = self.of(measure, criterion, budget)
        if measure not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
            return value
        change = value - self.of(measure, "untouched", 0.0)
        return -change if measure in LOWER_IS_BETTER else change

    def measures(self, wanted: Iterable[str]) -> list[str]:
        """Those of the wanted measures that the grid holds."""
        return [name for name in wanted if name in self.tables]

    def _shared(self, names: tuple) -> PromptClusters:
        """Equal prompts have equal draws, whatever the measure."""
        if names not in self._prompts:
            self._prompts[names] = PromptClusters(
                np.array(names, dtype=object).astype(str), draws=self.draws, seed=self.seed
            )
        return self._prompts[names]


def cells_table(outcomes: Outcomes) -> pd.DataFrame:
    """Mean of each measure of each single training: columns criterion, budget, seed, measure,
    value.
    """
    rows = []
    for measure, part in outcomes.tables.items():
        sums = (
            part.groupby(["criterion", "budget", "seed"], sort=False)[["total", "count"]]
            .sum()
            .reset_index()
        )
        rows.append(sums.assign(measure=measure, value=sums["total"] / sums["count"]))
    return pd.concat(rows, ignore_index=True)[["criterion", "budget", "seed", "measure", "value"]]


def outcome_table(outcomes: Outcomes, *, level: float = 0.95) -> pd.DataFrame:
    """Every measure of every cell over seeds and prompts, and what it is paired against.

    Returns columns criterion, budget, measure, mean, low, high; gain (improvement over the
    untouched student, positive is better), gain_low, gain_high; minus_full and minus_random (paired
    differences of gains; random at the same budget) with their _low and _high; seeds, prompts. What
    cannot be is NaN."""
    rows = []
    for measure in outcomes.tables:
        judged = measure in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
        if "untouched" in set(outcomes.tables[measure]["criterion"]):
            start = outcomes.of(measure, "untouched", 0.0)
            key = {"criterion": "untouched", "budget": 0.0, "measure": measure}
            rows.append(key | _ends("mean", start, level) | {"seeds": 0, "prompts": start.prompts})
        for criterion, budget in outcomes.cells:
            value = outcomes.of(measure, criterion, budget)
            row = {"criterion": criterion, "budget": budget, "measure": measure} | _ends(
                "mean", value, level
            )
            if judged or measure.startswith("one_step"):
                gain = outcomes.gain(measure, criterion, budget)
                row |= _ends("gain", gain, level) if judged else {}
                row |= _paired(outcomes, measure, criterion, budget, gain, level)
            rows.append(row | {"seeds": len(value.seeds_S), "prompts": value.prompts})
    names = [
        f"{part}{end}"
        for part in ("mean", "gain", "minus_full", "minus_random")
        for end in ("", "_low", "_high")
    ]
    names[1:3] = ["low", "high"]
    return pd.DataFrame(rows).reindex(
        columns=["criterion", "budget", "measure", *names, "seeds", "prompts"]
    )


def _ends(name: str, value: SeedPromptEstimate, level: float) -> dict:
    low, high = value.interval(level)
    prefix = "" if name == "mean" else f"{name}_"
    return {name: value.value, f"{prefix}low": low, f"{prefix}high": high}


def _paired(
    outcomes: Outcomes,
    measure: str,
    criterion: str,
    budget: float,
    gain: SeedPromptEstimate,
    level: float,
) -> dict:
    row = {}
    for rival, at in (("full", 1.0), ("random", budget)):
        if (rival, at) in outcomes.cells and (criterion, budget) != (rival, at):
            row |= _ends(f"minus_{rival}", gain - outcomes.gain(measure, rival, at), level)
    return row


def verdict_table(outcomes: Outcomes, *, level: float = 0.95) -> pd.DataFrame:
    """C5 for each measure: against each rival, and overall (`rival` = all); also at the grid's
    other budgets.

    Returns columns claim, measure, budget, rival, difference (of gains, teachability minus rival),
    low, high, margin, beats (the interval lies above 0), verdict, seeds, prompts. The claim is
    about 5 %; its name at another budget is `C5 at <budget>`. A rival that was not trained is left
    out, and then the overall verdict is inconclusive."""
    rows = []
    budgets = sorted(
        {budget for criterion, budget in outcomes.cells if criterion == CLAIMANT},
        key=lambda b: (b != TA_BUDGET, b),
    )
    for measure in outcomes.measures(JUDGED):
        for budget in budgets:
            claim = "C5" if budget == TA_BUDGET else f"C5 at {budget:g}"
            each = [
                _against(outcomes, measure, budget, rival, level)
                for rival in RIVALS
                if (rival, _budget_of(rival, budget)) in outcomes.cells
            ]
            overall = _overall([row["verdict"] for row in each], complete=len(each) == len(RIVALS))
            shared = {key: each[0][key] for key in ("margin", "seeds", "prompts")} if each else {}
            rows += [
                {"claim": claim, "measure": measure, "budget": budget} | row
                for row in [{"rival": "all", "verdict": overall} | shared, *each]
            ]
    order = [
        "claim",
        "measure",
        "budget",
        "rival",
        "difference",
        "low",
        "high",
        "margin",
        "beats",
        "verdict",
        "seeds",
        "prompts",
    ]
    return pd.DataFrame(rows).reindex(columns=order)


def _budget_of(rival: str, budget: float) -> float:
    return 1.0 if rival == "full" else budget


def _against(outcomes: Outcomes, measure: str, budget: float, rival: str, level: float) -> dict:
    margin = np.nan
    if ("full", 1.0) in outcomes.cells:
        margin = MARGIN * max(0.0, outcomes.gain(measure, "full", 1.0).value)
    difference = outcomes.gain(measure, CLAIMANT, budget) - outcomes.gain(
        measure, rival, _budget_of(rival, budget)
    )
    low, high = difference.interval(level)
    seeds = len(difference.seeds_S)
    verdict = "inconclusive"
    if seeds >= MINIMUM_SEEDS and np.isfinite([low, high, margin]).all():
        verdict = "supported" if low >= -margin else "refuted" if high < -margin else verdict
    return {
        "rival": rival,
        "difference": difference.value,
        "low": low,
        "high": high,
        "margin": margin,
        "beats": bool(low > 0),
        "verdict": verdict,
        "seeds": seeds,
        "prompts": difference.prompts,
    }


def _overall(verdicts: Sequence[str], *, complete: bool) -> str:
    if "refuted" in verdicts:
        return "refuted"
    return (
        "supported"
        if complete and all(verdict == "supported" for verdict in verdicts)
        else "inconclusive"
    )


@dataclass(frozen=True)
class OfflineValue:
    """What another run says of a cell, with the draws of that run's own prompts."""

    value: float
    draws_D: np.ndarray
    prompts: int

    def resampled(self, seed: int) -> np.ndarray:
        """Draws [D]; they are given."""
        return self.draws_D


Offline = Mapping[str, Mapping[tuple[str, float], OfflineValue]]
"""By answer and cell."""


def agreement_table(
    outcomes: Outcomes, offline: Offline | None = None, *, level: float = 0.95
) -> pd.DataFrame:
    """Kendall's tau between what was foreseen and the gain of training, over the cells but full.

    offline: see `offline_answers`; the gain after each training's own first step is added. Returns
    columns scope (all, within_budget, or budget_<share>), x (the answer), y (`trained_<measure>`),
    kendall, low, high, cells, prompts. Only cells that both sides hold are compared; fewer than
    three give no row."""
    rows = []
    trained = outcomes.measures(JUDGED)
    for name, values in _foreseen(outcomes, offline):
        cells = [cell for cell in outcomes.cells if cell[0] != "full" and cell in values]
        if len(cells) < 3:
            continue
        frame = pd.DataFrame(cells, columns=["criterion", "budget"])
        answer = _answer(name, [values[cell] for cell in cells], outcomes)
        gains = [
            _answer(f"trained_{m}", [outcomes.gain(m, *cell) for cell in cells], outcomes)
            for m in trained
        ]
        for scope, pairs in ranks.scopes(frame):
            for gain in gains:
                tau = ranks.kendall(answer, gain, pairs)
                low, high = tau.interval(level)
                rows.append(
                    {
                        "scope": scope,
                        "x": name,
                        "y": gain.name,
                        "kendall": tau.value,
                        "low": low,
                        "high": high,
                        "cells": int(pairs.any(axis=1).sum()),
                        "prompts": tau.prompts,
                    }
                )
    return pd.DataFrame(
        rows, columns=["scope", "x", "y", "kendall", "low", "high", "cells", "prompts"]
    )


def foreseen_table(outcomes: Outcomes, offline: Offline | None = None) -> pd.DataFrame:
    """What was foreseen of each trained cell but full, before its training or after its first step.

    offline: as for `agreement_table`. Returns columns criterion, budget, answer, value; the answers
    of the grid's own first steps are the means over its seeds. Cells that an answer does not know
    are left out."""
    rows = [
        (*cell, name, values[cell].value)
        for name, values in _foreseen(outcomes, offline)
        for cell in outcomes.cells
        if cell[0] != "full" and cell in values
    ]
    return pd.DataFrame(rows, columns=["criterion", "budget", "answer", "value"])


def _foreseen(outcomes: Outcomes, offline: Offline | None) -> Iterator[tuple[str, Mapping]]:
    for measure in outcomes.measures(FIRST_STEP):
        yield measure, {cell: outcomes.gain(measure, *cell) for cell in outcomes.cells}
    yield from (offline or {}).items()


def _answer(
    name: str, values: Sequence[SeedPromptEstimate | OfflineValue], outcomes: Outcomes
) -> CellScores:
    """Values of some cells with their draws."""
    draws = [v.resampled(outcomes.seed) for v in values]
    return CellScores(
        name,
        np.array([v.value for v in values]),
        np.stack(draws, axis=1),
        min(v.prompts for v in values),
    )


def offline_answers(
    directory: Path, cells: Iterable[tuple[str, float]], *, draws: int = 1000, seed: int = 0
) -> Offline:
    """What a finished main job says of cells (criterion, budget), from its positions and
    interventions.

    captured_<outcome>: share of the outcome that the criterion captures at the budget, over all
    positions. intervention_<measure>: mean reduction at held-out positions after a step on the
    selected ones alone. A cell is missing where the job knows nothing of it. Raises
    DiagnosticsError where the directory has no tokens.parquet with gains."""
    from diagnostics.core.manifest import unchanged

    path = directory / "tokens.parquet"
    if not path.exists():
        raise DiagnosticsError(
            f"{path} does not exist. Name a run directory whose main job is finished."
        )
    tokens, effects = (
        validate_tokens(read_parquet(unchanged(directory, path.name))),
        unchanged(directory, "interventions.parquet"),
    )
    scorable = registry.available(tokens)
    frame = pd.DataFrame(
        [cell for cell in cells if registry.find(cell[0]).name in scorable],
        columns=["criterion", "budget"],
    )
    # Draws of their own: with as many prompts, equal seeds would tie these draws to those of the
    # trainings' prompts.
    apart = int(np.random.default_rng([seed, 13]).integers(2**31))
    found = (
        ranks.foreseen(
            tokens,
            read_parquet(effects) if effects.exists() else None,
            frame,
            draws=draws,
            seed=apart,
        )
        if len(frame)
        else []
    )
    return {answer.name: dict(_known(answer, frame)) for answer in found}


def _known(
    answer: CellScores, cells: pd.DataFrame
) -> Iterator[tuple[tuple[str, float], OfflineValue]]:
    for c, cell in enumerate(cells.itertuples(index=False, name=None)):
        if np.isfinite(answer.value_C[c]) and answer.unit > 0:
            yield (
                cell,
                OfflineValue(
                    float(answer.value_C[c] / answer.unit),
                    answer.draws_DC[:, c] / answer.unit,
                    answer.prompts,
                ),
            )


def tables(
    rows: pd.DataFrame,
    offline: Offline | None = None,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """All tables of a validation by file name. rows: see `read_outcomes`; offline: see
    `offline_answers`.
    """
    outcomes = Outcomes(rows, draws=draws, seed=seed)
    return {
        "validation_cells": cells_table(outcomes),
        "validation_outcomes": outcome_table(outcomes, level=level),
        "validation_verdicts": verdict_table(outcomes, level=level),
        "validation_agreement": agreement_table(outcomes, offline, level=level),
        "validation_foreseen": foreseen_table(outcomes, offline),
    }
