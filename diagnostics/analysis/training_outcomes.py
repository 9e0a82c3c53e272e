"""Gains of a grid of short trainings over seeds and prompts, and the verdict on claim C5.

`training.grid` has the formulas of the errors: E_S is the variance over seeds, E_G that over
prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.claims import MINIMUM_SEEDS, REASONS, RIVALS, TA_BUDGET
from diagnostics.analysis.config import FEWEST_PROMPTS, Bootstrap
from diagnostics.analysis.power import smallest_detectable
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

LOWER_IS_BETTER = ("forward_kl", "reverse_kl", "bank_forward_kl", "bank_reverse_kl")
HIGHER_IS_BETTER = ("accuracy", "accuracy_greedy")
JUDGED = ("reverse_kl", "forward_kl", "accuracy", "accuracy_greedy")
"""Measures for which there are verdicts and agreement."""
CLAIMANT = "teachability"
MARGIN = 0.1
"""Share of full's gain by which a criterion may be below a rival and still match it."""
FIRST_STEP = {
    "one_step_gain": "gain_step_1",
    "one_step_reverse_gain": "reverse_gain_step_1",
    "one_step_relative_gain": "relative_gain_step_1",
}
"""Measure -> column of training_gains.parquet."""


@dataclass(frozen=True)
class SeedPromptEstimate:
    """A value over seeds and prompts, with the parts of its interval.

    Attributes:
        seeds_S: [seeds] value of each seed over all prompts; one entry for a value without seeds.
        draws_DS: [draws, seeds] the same in each draw of prompts.
        prompts: Number of prompts.
        fixed: True for the untouched student, which has no seeds and no spread over them.
    """

    seeds_S: np.ndarray
    draws_DS: np.ndarray
    prompts: int
    fixed: bool = False

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
        """Squared errors E_S over seeds and E_G over prompts, see `training.grid`."""
        seeds = np.nan
        if self.fixed:
            seeds = 0.0
        elif len(self.seeds_S) > 1:
            seeds = self.seeds_S.var(ddof=1) / len(self.seeds_S)
        means_D = self.draws_DS.mean(axis=1)
        prompts = (
            np.var(means_D[np.isfinite(means_D)], ddof=1) * self.prompts / (self.prompts - 1)
            if self.prompts > 1
            else np.nan
        )
        return float(seeds), float(prompts)

    @property
    def standard_error(self) -> float:
        """The standard error over seeds and prompts; NaN with one seed or one prompt."""
        error = sum(self.errors)
        return float(np.sqrt(error)) if error >= 0 else np.nan

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the interval (Satterthwaite 1946)."""
        seeds, prompts = self.errors
        of_seeds = 0.0 if self.fixed else seeds**2 / (len(self.seeds_S) - 1)
        return float((seeds + prompts) ** 2 / (of_seeds + prompts**2 / (self.prompts - 1)))

    def interval(self, level: float = Bootstrap.level) -> tuple[float, float]:
        """Compute the t interval with Satterthwaite's degrees of freedom.

        Args:
            level: Coverage, between 0 and 1.

        Returns:
            Low and high end; NaN with one seed or one prompt.
        """
        error = self.standard_error
        if not error > 0:
            return (self.value, self.value) if error == 0 else (np.nan, np.nan)
        reach = stats.t.ppf((1 + level) / 2, self.freedom) * error
        return self.value - reach, self.value + reach

    def resampled(self, seed: int) -> np.ndarray:
        """Draws [D] over prompts and seeds at once.

        Args:
            seed: Equal seeds take the same trainings for every value of a grid.
        """
        count = self.draws_DS.shape[1]
        taken_DS = np.random.default_rng([seed, 11]).integers(
            count, size=(len(self.draws_DS), count)
        )
        return np.take_along_axis(self.draws_DS, taken_DS, axis=1).mean(axis=1)


class Outcomes:
    """The grid's evaluations as values over seeds and prompts, with shared draws of the prompts.

    Args:
        rows: Columns criterion, budget, seed, measure, prompt_id, total, count.
        bootstrap: Number of draws and their seed.
        settings: Fields of `bootstrap`.

    Raises:
        DiagnosticsError: If a column is missing.
    """

    @with_settings(bootstrap=Bootstrap)
    def __init__(self, rows: pd.DataFrame, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any):
        require_columns(
            rows,
            ("criterion", "budget", "seed", "measure", "prompt_id", "total", "count"),
            what="A table of training outcomes",
        )
        self.bootstrap = bootstrap
        self.seed = bootstrap.seed
        self._prompts: dict[tuple, PromptClusters] = {}
        self.tables = dict(iter(rows.groupby("measure", sort=False)))
        cells = rows.loc[
            rows["criterion"] != "untouched", ["criterion", "budget"]
        ].drop_duplicates()
        self.cells = list(cells.itertuples(index=False, name=None))

    def of(self, measure: str, criterion: str, budget: float) -> SeedPromptEstimate:
        """The measure of one cell.

        Raises:
            DiagnosticsError: If the grid does not hold it.
        """
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
        total_SG = total_SG.to_numpy(dtype=np.float64)
        count_SG = count_SG.to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws_DS = (prompts.weights @ total_SG.T) / (prompts.weights @ count_SG.T)
            return SeedPromptEstimate(
                total_SG.sum(1) / count_SG.sum(1),
                draws_DS,
                prompts.count,
                fixed=criterion == "untouched",
            )

    def gain(self, measure: str, criterion: str, budget: float) -> SeedPromptEstimate:
        """Improvement of a measure over the untouched student; positive is better.

        A measure that is a gain already is returned as it is.
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
        """The prompts with draws that depend on their names alone, whatever the measure."""
        if names not in self._prompts:
            self._prompts[names] = PromptClusters(
                np.array(names, dtype=object).astype(str), bootstrap=self.bootstrap
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


def outcome_table(outcomes: Outcomes, *, level: float = Bootstrap.level) -> pd.DataFrame:
    """Every measure of every cell over seeds and prompts, with paired differences.

    Args:
        outcomes: The grid's evaluations.
        level: Coverage of the intervals.

    Returns:
        Columns criterion, budget, measure, mean, low, high; gain (improvement over the untouched
        student, positive is better), gain_low, gain_high; minus_full and minus_random (paired
        differences of gains; random at the same budget) with their _low and _high; seeds, prompts.
        Undefined entries are NaN.
    """
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


def verdict_table(outcomes: Outcomes, *, level: float = Bootstrap.level) -> pd.DataFrame:
    """C5 for each measure and budget: against each rival, and overall (`rival` = all).

    A rival is matched where the interval lies above minus the margin, and ahead where it lies below
    it. Where neither holds and the margin is smaller than what the test detects with a power of
    80 %, nothing is identified, and the reason says what design would do.

    Args:
        outcomes: The grid's evaluations.
        level: Coverage of the intervals.

    Returns:
        Columns claim, measure, budget, rival, difference (of gains, teachability minus rival), low,
        high, margin, detectable (the difference that 80 % of such grids would show), beats (the
        interval is above 0), verdict, reason, seeds, prompts. The claim is about 5 %; its name at
        another budget is `C5 at <budget>`. A rival that was not trained is left out, and then the
        overall verdict cannot be supported.
    """
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
            overall = _overall(each)
            shared = {key: each[0][key] for key in ("margin", "seeds", "prompts")} if each else {}
            rows += [
                {"claim": claim, "measure": measure, "budget": budget} | row
                for row in [{"rival": "all"} | overall | shared, *each]
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
        "detectable",
        "beats",
        "verdict",
        "reason",
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
    detectable = smallest_detectable(difference, level=level)
    verdict, reason = _judged(difference, (low, high), margin, detectable)
    return {
        "rival": rival,
        "difference": difference.value,
        "low": low,
        "high": high,
        "margin": margin,
        "detectable": detectable,
        "beats": bool(low > 0 and high > low),
        "verdict": verdict,
        "reason": reason,
        "seeds": len(difference.seeds_S),
        "prompts": difference.prompts,
    }


def _judged(
    difference: SeedPromptEstimate, interval: tuple[float, float], margin: float, detectable: float
) -> tuple[str, str]:
    """Verdict and reason of one comparison."""
    low, high = interval
    if len(difference.seeds_S) < MINIMUM_SEEDS:
        return "not identified", f"{REASONS['few_seeds']}: {MINIMUM_SEEDS} are needed"
    if difference.prompts < FEWEST_PROMPTS:
        return "not identified", f"{REASONS['few_prompts']} {FEWEST_PROMPTS} prompts"
    if low == high:
        return "not identified", REASONS["no_width"]
    if not np.isfinite([low, high]).all():
        return "not identified", REASONS["undefined"]
    if not np.isfinite(margin):
        return "not identified", f"{REASONS['power']}: it is a share of full's gain, not trained"
    if low >= -margin:
        return "supported", ""
    if high < -margin:
        return "refuted", ""
    if detectable <= margin:
        return "inconclusive", REASONS["holds_zero"]
    return "not identified", _design(difference, margin, detectable)


def _design(difference: SeedPromptEstimate, margin: float, detectable: float) -> str:
    """What grid would test a margin, from the errors seen: they fall as one over each number."""
    if margin == 0:
        return f"{REASONS['power']}: it is 0, because full training gained nothing"
    times = (detectable / margin) ** 2
    prompts, seeds = (
        int(np.ceil(n * times)) for n in (difference.prompts, len(difference.seeds_S))
    )
    return (
        f"{REASONS['power']}: it is {margin:.3g}, and this grid detects {detectable:.3g} with 80 %"
        f" power; about {prompts} prompts x {seeds} seeds would be needed"
    )


def _overall(each: Sequence[dict]) -> dict:
    """Verdict and reason of the claim against all rivals: the first that a rival does not match."""
    verdicts = {row["verdict"]: row["reason"] for row in reversed(each)}
    if "refuted" in verdicts:
        return {"verdict": "refuted", "reason": ""}
    for verdict in ("not identified", "inconclusive"):
        if verdict in verdicts:
            return {"verdict": verdict, "reason": verdicts[verdict]}
    if len(each) == len(RIVALS):
        return {"verdict": "supported", "reason": ""}
    return {"verdict": "inconclusive", "reason": REASONS["holds_zero"]}
