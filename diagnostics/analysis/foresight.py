"""Did the offline answers foresee the trainings? Rank agreement and signs, over criteria.

An offline answer gives every cell (criterion, budget) a number before any training: the captured
share of a gain, or what steps on the cell's positions alone did. Two questions are asked of it:

- *Order*: Kendall's tau-b between the answer and the gain of training, over the pairs of a scope
  (all cells; pairs of equal budget pooled; each budget). Its interval says how far prompts, step
  batches and seeds move tau of *these* criteria. Whether criteria that have nothing to do with the
  trainings would agree as well is said by the permutation: the criteria's labels are exchanged in
  the trainings, jointly over budgets, and p is the share of exchanges whose tau is at least as far
  from 0 as the observed one (all exchanges up to EXACT_GROUPS labels, else EXCHANGES seeded ones,
  with (1 + hits) / (1 + EXCHANGES)). Holm corrects it over the answers that are looked at.
- *Sign*: for each horizon, whether criterion minus random has the sign that it has after training,
  wherever the training's interval excludes 0.

Criteria that rank positions nearly alike are one witness, not several: they are grouped, a group's
value is the mean of its members', and labels are those of groups. Cells whose selection is decided
by ties to more than AMBIGUOUS are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import rank_agreement as ranks
from diagnostics.analysis.bootstrap import holm
from diagnostics.analysis.cell_effects import NO_CELLS, CellEffects
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.criterion_labels import group_cells, grouping, permutation_p
from diagnostics.analysis.decision import overfitted_cells
from diagnostics.analysis.rank_agreement import CellScores, Tau
from diagnostics.analysis.training_outcomes import (
    FIRST_STEP,
    JUDGED,
    Outcomes,
    SeedPromptEstimate,
    cells_table,
    outcome_table,
    verdict_table,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet, require_columns, validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.criteria import AMBIGUOUS

NO_DRAWS = "the outcomes of single prompts are not kept, from which an interval is made"
SIGN_MEASURES = ("reverse_kl", "forward_kl")
"""Divergences that both an intervention and a training measure."""

Cell = tuple[str, float]
"""Criterion and budget."""


@dataclass(frozen=True)
class OfflineValue:
    """The value that another run gives to a cell, with the draws of that run's own prompts.

    Attributes:
        value: The value.
        draws_D: [draws] its bootstrap replicates; none for a value from a table.
        prompts: Number of that run's prompts.
        without_step: [steps] its value without each step batch; None for one step.
    """

    value: float
    draws_D: np.ndarray
    prompts: int
    without_step: np.ndarray | None = None

    def resampled(self, seed: int) -> np.ndarray:
        """The draws [D] as they are; the seed is not used."""
        return self.draws_D


Offline = Mapping[str, Mapping[Cell, OfflineValue]]
"""By answer and cell."""
Values = Mapping[Cell, "OfflineValue | SeedPromptEstimate"]


@dataclass(frozen=True)
class OfflineRun:
    """What a finished main job says about cells before any training.

    Attributes:
        answers: By answer and cell.
        effects: The run's interventions; None where there are none.
        groups: Name of the near-duplicates' group of each criterion.
        ambiguous: Cells whose selection ties decide to more than AMBIGUOUS.
    """

    answers: Offline
    effects: CellEffects | None
    groups: Mapping[str, str]
    ambiguous: frozenset[Cell]


# Agreement


def agreement_table(
    trained: Outcomes | pd.DataFrame,
    offline: Offline | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    ambiguous: Iterable[Cell] = (),
    level: float = Bootstrap.level,
) -> pd.DataFrame:
    """Kendall's tau between offline values and the gain of training, over the cells except full.

    Args:
        trained: The grid's evaluations, or the table validation_outcomes where these are gone.
        offline: The values of another run, see `offline_answers` and `answers_of_table`.
        groups: Group of each criterion; None takes FAMILIES.
        ambiguous: Cells that are left out.
        level: Coverage of the intervals.

    Returns:
        Columns scope (all, within_budget, or budget_<share>), x (the answer), y
        (`trained_<measure>`), kendall, low, high, p_permutation, p_holm (over the
        answers of a scope and y), looks (their number), groups, cells (after grouping),
        cells_left_out (ambiguous), prompts, steps, reason (why there is no interval). The gain
        after each training's own first step is among the answers of a grid. Only cells that both
        sides hold are compared; fewer than three give no row.
    """
    gains = trained_gains(trained)
    left_out = set(ambiguous)
    rows: list[dict] = []
    for name, values in _answers(trained, offline):
        held = [cell for cell in next(iter(gains.values()), {}) if cell in values]
        used = [cell for cell in held if cell not in left_out]
        if len(used) >= 3:
            more = {"cells_left_out": len(held) - len(used)}
            rows += [
                row | more
                for row in _agreement_rows(name, values, gains, used, groups, _seed(trained), level)
            ]
    columns = ["scope", "x", "y", "kendall", "low", "high", "p_permutation", "p_holm", "looks"]
    columns += ["groups", "cells", "cells_left_out", "prompts", "steps", "reason"]
    table = pd.DataFrame(rows, columns=columns)
    family = table.groupby(["scope", "y"], sort=False)["p_permutation"]
    table["p_holm"] = family.transform(lambda p: holm(p.to_numpy(dtype=float)))
    table["looks"] = family.transform("count")
    return table


def _seed(trained: Outcomes | pd.DataFrame) -> int:
    return trained.seed if isinstance(trained, Outcomes) else Bootstrap.seed


def trained_gains(trained: Outcomes | pd.DataFrame) -> dict[str, Values]:
    """Gains of every trained cell except full by judged measure, from evaluations or their table.

    Args:
        trained: The grid's evaluations, or the table validation_outcomes.
    """
    if isinstance(trained, Outcomes):
        cells = [cell for cell in trained.cells if cell[0] != "full"]
        return {
            measure: {cell: trained.gain(measure, *cell) for cell in cells}
            for measure in trained.measures(JUDGED)
        }
    require_columns(
        trained, ("criterion", "budget", "measure", "gain", "prompts"), what="Trained outcomes"
    )
    rows = trained[~trained["criterion"].isin(["full", "untouched"]) & trained["gain"].notna()]
    return {
        measure: {
            (row.criterion, float(row.budget)): _known(row.gain, row.prompts)
            for row in rows[rows["measure"] == measure].itertuples()
        }
        for measure in JUDGED
        if (rows["measure"] == measure).any()
    }


def _known(value: float, prompts: int) -> OfflineValue:
    return OfflineValue(float(value), np.empty(0), int(prompts))


def answers_of_table(foreseen: pd.DataFrame) -> Offline:
    """The offline values of a table validation_foreseen, without draws.

    Args:
        foreseen: Columns criterion, budget, answer, value.

    Returns:
        By answer and cell; the number of prompts, which the table does not hold, is 0.
    """
    require_columns(
        foreseen, ("criterion", "budget", "answer", "value"), what="A table of offline answers"
    )
    return {
        str(answer): {(row.criterion, float(row.budget)): _known(row.value, 0) for row in part}
        for answer, part in (
            (answer, list(rows.itertuples())) for answer, rows in foreseen.groupby("answer")
        )
    }


def foreseen_table(outcomes: Outcomes, offline: Offline | None = None) -> pd.DataFrame:
    """Offline value of each trained cell except full, before its training or after its first step.

    Args:
        outcomes: The grid's evaluations.
        offline: The values of another run, see `offline_answers`.

    Returns:
        Columns criterion, budget, answer, value; the answers of the grid's own first steps are the
        means over its seeds. Cells without a value are left out.
    """
    rows = [
        (*cell, name, values[cell].value)
        for name, values in _answers(outcomes, offline)
        for cell in outcomes.cells
        if cell[0] != "full" and cell in values
    ]
    return pd.DataFrame(rows, columns=["criterion", "budget", "answer", "value"])


def _answers(
    trained: Outcomes | pd.DataFrame, offline: Offline | None
) -> Iterator[tuple[str, Values]]:
    if isinstance(trained, Outcomes):
        for measure in trained.measures(FIRST_STEP):
            yield measure, {cell: trained.gain(measure, *cell) for cell in trained.cells}
    yield from (offline or {}).items()


def _agreement_rows(
    name: str,
    values: Values,
    gains: Mapping[str, Values],
    cells: Sequence[Cell],
    groups: Mapping[str, str] | None,
    seed: int,
    level: float,
) -> Iterator[dict]:
    """The rows of one answer: every scope by every judged measure."""
    members = group_cells(cells, grouping([c for c, _ in cells]) if groups is None else groups)
    frame = pd.DataFrame(list(members), columns=["criterion", "budget"])
    sides = {name: values, **{f"trained_{m}": gain for m, gain in gains.items()}}
    answer, *trained = _grouped(sides, members, seed)
    without = _without_steps(values, members)
    for scope, pairs in ranks.scopes(frame):
        for gain in trained:
            tau = _tau(answer, without, gain, pairs)
            low, high = tau.interval(level)
            yield {
                "scope": scope,
                "x": name,
                "y": gain.name,
                "kendall": tau.value,
                "low": low,
                "high": high,
                "p_permutation": permutation_p(
                    frame, answer.value_C, gain.value_C, pairs, seed=seed
                ),
                "groups": frame.loc[pairs.any(axis=1), "criterion"].nunique(),
                "cells": int(pairs.any(axis=1).sum()),
                "prompts": tau.prompts,
                "steps": tau.steps,
                "reason": "" if len(tau.draws) else NO_DRAWS,
            }


def _grouped(
    sides: Mapping[str, Values], members: Mapping[Cell, Sequence[Cell]], seed: int
) -> list[CellScores]:
    """Means over each group's members, with as many draws as every side has."""
    drawn = {
        name: {
            group: np.stack([values[cell].resampled(seed) for cell in cells])
            for group, cells in members.items()
        }
        for name, values in sides.items()
    }
    count = min(draws.shape[1] for side in drawn.values() for draws in side.values())
    # A table does not say how many prompts its values are from; then the other side's count.
    known = [v.prompts for side in sides.values() for v in side.values() if v.prompts > 0]
    return [
        CellScores(
            name,
            np.array([np.mean([values[cell].value for cell in of]) for of in members.values()]),
            np.stack([drawn[name][group][:, :count].mean(axis=0) for group in members], axis=1),
            min((values[cell].prompts or min(known)) for of in members.values() for cell in of),
        )
        for name, values in sides.items()
    ]


def _without_steps(values: Values, members: Mapping[Cell, Sequence[Cell]]) -> np.ndarray | None:
    """[steps, groups] the values without each step batch; None where an answer has one step."""
    steps = {
        cell: getattr(values[cell], "without_step", None) for of in members.values() for cell in of
    }
    if any(step is None for step in steps.values()):
        return None
    return np.stack(
        [np.mean([steps[cell] for cell in of], axis=0) for of in members.values()], axis=1
    )


def _tau(
    answer: CellScores, without: np.ndarray | None, gain: CellScores, pairs: np.ndarray
) -> Tau:
    """Tau with the value that it takes without each step batch of the answer."""
    tau = ranks.kendall(answer, gain, pairs)
    if without is None:
        return tau
    none = np.empty((0, len(gain.value_C)))
    still = replace(gain, draws_DC=none)
    each = [
        ranks.kendall(CellScores(answer.name, row, none, answer.prompts), still, pairs).value
        for row in without
    ]
    return replace(tau, without_step=np.array(each))


# Signs


def foresight_signs(
    effects: CellEffects | Offline, trained: pd.DataFrame, *, ambiguous: Iterable[Cell] = ()
) -> pd.DataFrame:
    """Does criterion minus random have the sign offline that it has after training?

    Args:
        effects: The interventions of a run; or answers without draws, of which those of
            interventions are read.
        trained: The table validation_outcomes, with minus_random and its ends.
        ambiguous: Cells that ties decide; they are listed without a judgement.

    Returns:
        One row per criterion, budget, horizon and divergence that both sides hold: columns
        criterion, budget, horizon, measure, offline_difference, offline_low, offline_high (NaN
        without draws), trained_difference, trained_low, trained_high, decided (the training's
        interval excludes 0), agrees (the signs are equal; NaN where the training is not decided or
        the cell is ambiguous), ambiguous, overfitted (beyond the horizon up to which the step
        batches' drop carries over).
    """
    require_columns(
        trained,
        ("criterion", "budget", "measure", "minus_random", "minus_random_low", "minus_random_high"),
        what="Trained outcomes",
    )
    after = trained[trained["minus_random"].notna()].set_index(["criterion", "budget", "measure"])
    left_out = set(ambiguous)
    rows = []
    for key, offline in _differences(effects):
        criterion, budget, _, measure = key
        if (criterion, budget, measure) not in after.index:
            continue
        ends = after.loc[(criterion, budget, measure)]
        low, high = ends["minus_random_low"], ends["minus_random_high"]
        decided = bool(low > 0 or high < 0)
        judged = decided and (criterion, budget) not in left_out
        same = np.sign(offline["offline_difference"]) == np.sign(ends["minus_random"])
        rows.append(
            dict(zip(("criterion", "budget", "horizon", "measure"), key))
            | offline
            | {
                "trained_difference": ends["minus_random"],
                "trained_low": low,
                "trained_high": high,
                "decided": decided,
                "agrees": bool(same) if judged else np.nan,
                "ambiguous": (criterion, budget) in left_out,
            }
        )
    return pd.DataFrame(rows, columns=_SIGN_COLUMNS)


_SIGN_COLUMNS = ["criterion", "budget", "horizon", "measure"]
_SIGN_COLUMNS += [
    f"{side}_{end}" for side in ("offline", "trained") for end in ("difference", "low", "high")
]
_SIGN_COLUMNS += ["decided", "agrees", "ambiguous", "overfitted"]


def _differences(effects: CellEffects | Offline) -> Iterator[tuple[tuple, dict]]:
    """Criterion minus random of each cell, horizon and divergence that trainings measure."""
    if isinstance(effects, CellEffects):
        yield from _measured_differences(effects)
        return
    for answer, values in effects.items():
        place = _intervention(answer)
        for criterion, budget in values if place else ():
            rival = values.get(("random", budget))
            if rival is not None and criterion not in ("random", *NO_CELLS):
                difference = values[criterion, budget].value - rival.value
                yield (
                    (criterion, budget, *place),
                    {
                        "offline_difference": difference,
                        "offline_low": np.nan,
                        "offline_high": np.nan,
                        "overfitted": False,
                    },
                )


def _measured_differences(effects: CellEffects) -> Iterator[tuple[tuple, dict]]:
    for measure in (name for name in SIGN_MEASURES if name in effects.measures):
        beyond = overfitted_cells(effects, measure)
        for cell in effects.cells:
            criterion, budget, horizon = cell
            rival = ("random", budget, horizon)
            if criterion in ("random", *NO_CELLS) or rival not in effects:
                continue
            difference = effects.effect(cell, measure) - effects.effect(rival, measure)
            low, high = difference.interval(effects.level)
            yield (
                (criterion, budget, horizon, measure),
                {
                    "offline_difference": difference.value,
                    "offline_low": low,
                    "offline_high": high,
                    "overfitted": cell in beyond,
                },
            )


def intervention_answer(measure: str, horizon: int) -> str:
    """Name of the answer that an intervention gives after a horizon of steps."""
    return f"intervention_{measure}" if horizon == 0 else f"intervention_h{horizon}_{measure}"


def _intervention(answer: str) -> tuple[int, str] | None:
    """Horizon and measure of an intervention's answer, of those that trainings measure."""
    for measure in SIGN_MEASURES:
        if answer == intervention_answer(measure, 0):
            return 0, measure
        if answer.startswith("intervention_h") and answer.endswith(f"_{measure}"):
            middle = answer.removeprefix("intervention_h").removesuffix(f"_{measure}")
            if middle.isdigit():
                return int(middle), measure
    return None


# What a main job says


@with_settings(bootstrap=Bootstrap)
def offline_answers(
    directory: Path,
    cells: Iterable[Cell],
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> Offline:
    """The values that a finished main job gives to cells, see `offline_run`.

    Args:
        directory: Run directory of the main job.
        cells: (criterion, budget) of each cell.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Raises:
        DiagnosticsError: As `offline_run`.
    """
    return offline_run(directory, cells, bootstrap=bootstrap).answers


@with_settings(bootstrap=Bootstrap)
def offline_run(
    directory: Path,
    cells: Iterable[Cell],
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> OfflineRun:
    """What a finished main job says about cells, from its positions and interventions.

    Args:
        directory: Run directory of the main job.
        cells: (criterion, budget) of each cell.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Its answers by cell: captured_<outcome> is the share of the outcome that the criterion
        captures at the budget, and intervention_<measure> or intervention_h<k>_<measure> is the
        mean reduction at held-out positions after one step of matched norm, or k optimizer steps,
        on the selected positions alone. Cells without data in that run are left out. With them, the
        interventions themselves, groups of near-duplicates by the run's scores, and the cells that
        ties decide.

    Raises:
        DiagnosticsError: If the directory has no tokens.parquet with gains.
    """
    from diagnostics.core.manifest import unchanged

    path = directory / "tokens.parquet"
    if not path.exists():
        raise DiagnosticsError(
            f"{path} does not exist. Name a run directory whose main job is finished."
        )
    tokens = validate_tokens(read_parquet(unchanged(directory, path.name)))
    file = unchanged(directory, "interventions.parquet")
    # These draws have a seed of their own: with as many prompts, an equal seed would make them the
    # draws of the trainings' prompts.
    seed = int(np.random.default_rng([bootstrap.seed, 13]).integers(2**31))
    apart = replace(bootstrap, seed=seed)
    wanted = list(cells)
    effects = (
        CellEffects(read_parquet(file), bootstrap=replace(apart, seed=seed + 1))
        if file.exists()
        else None
    )
    answers = dict(_captured(tokens, wanted, apart))
    if effects is not None:
        answers |= dict(_intervened(effects, wanted))
    names = [criterion for criterion, _ in wanted]
    return OfflineRun(
        answers, effects, grouping(names, tokens), _ambiguous(tokens, effects, wanted)
    )


def _captured(
    tokens: pd.DataFrame, cells: Sequence[Cell], bootstrap: Bootstrap
) -> Iterator[tuple[str, Mapping[Cell, OfflineValue]]]:
    scorable = registry.available(tokens)
    frame = pd.DataFrame(
        [cell for cell in cells if registry.find(cell[0]).name in scorable],
        columns=["criterion", "budget"],
    )
    if len(frame):
        for answer in ranks.offline_values(tokens, frame, bootstrap=bootstrap):
            yield answer.name, dict(_values_by_cell(answer, frame))


def _values_by_cell(answer: CellScores, cells: pd.DataFrame) -> Iterator[tuple[Cell, OfflineValue]]:
    for c, cell in enumerate(cells.itertuples(index=False, name=None)):
        if np.isfinite(answer.value_C[c]) and answer.unit > 0:
            yield (
                cell,
                OfflineValue(
                    float(answer.value_C[c] / answer.unit),
                    answer.draws_DC[:, c] / answer.unit,
                    answer.prompts,
                    None if answer.without_FC is None else answer.without_FC[:, c] / answer.unit,
                ),
            )


def _intervened(
    effects: CellEffects, cells: Sequence[Cell]
) -> Iterator[tuple[str, Mapping[Cell, OfflineValue]]]:
    for horizon in sorted({h for _, _, h in effects.cells}):
        for measure in effects.measures:
            found = {}
            for criterion, budget in cells:
                if (criterion, budget, horizon) in effects:
                    own = effects.effect((criterion, budget, horizon), measure)
                    found[criterion, budget] = OfflineValue(
                        own.value, own.draws, own.prompts, own.without_step
                    )
            yield intervention_answer(measure, horizon), found


def _ambiguous(
    tokens: pd.DataFrame, effects: CellEffects | None, cells: Sequence[Cell]
) -> frozenset[Cell]:
    """Cells that ties decide: at some horizon of the interventions, or in the token table."""
    shares: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for criterion, budget, horizon in effects.cells if effects is not None else ():
        if (criterion, budget) in shares:
            share = effects.fact((criterion, budget, horizon), "ambiguous")
            shares[criterion, budget].append(share)
    scorable = registry.available(tokens)
    for (criterion, budget), known in shares.items():
        if not np.isfinite(known).any() and registry.find(criterion).name in scorable:
            known.append(registry.ambiguous_share(tokens, criterion, budget=budget))
    return frozenset(cell for cell, known in shares.items() if np.any(np.array(known) > AMBIGUOUS))


# All tables


@with_settings(bootstrap=Bootstrap)
def tables(
    rows: pd.DataFrame,
    offline: OfflineRun | Offline | None = None,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """All tables of a validation by file name.

    Args:
        rows: The grid's evaluations, as from `training.grid.read_outcomes`.
        offline: What another run says, see `offline_run`, or its answers alone.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        validation_cells, validation_outcomes, validation_verdicts, validation_agreement,
        validation_foreseen and, where the other run has interventions, foresight_signs.
    """
    outcomes = Outcomes(rows, bootstrap=bootstrap)
    trained = outcome_table(outcomes, level=bootstrap.level)
    run = _as_run(offline)
    return {
        "validation_cells": cells_table(outcomes),
        "validation_outcomes": trained,
        "validation_verdicts": verdict_table(outcomes, level=bootstrap.level),
        "validation_foreseen": foreseen_table(outcomes, run.answers),
        **_compared(outcomes, trained, run, bootstrap.level),
    }


@with_settings(bootstrap=Bootstrap)
def tables_of_committed(
    trained: pd.DataFrame,
    foreseen: pd.DataFrame | None = None,
    offline: OfflineRun | None = None,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """Agreement of trainings whose single outcomes are gone, from their committed tables.

    Args:
        trained: The table validation_outcomes.
        foreseen: The table validation_foreseen, whose answers are taken where `offline` has none.
        offline: What a run, perhaps a later one, says about the same cells, see `offline_run`.
        bootstrap: Level of the intervals that are left.
        settings: Fields of `bootstrap`.

    Returns:
        validation_agreement, judged by permutation alone, and foresight_signs where there are
        interventions. Intervals of tau are NaN, with the reason in a column.
    """
    run = offline or OfflineRun({}, None, {}, frozenset())
    old = answers_of_table(foreseen) if foreseen is not None else {}
    groups = run.groups or grouping(trained["criterion"])
    merged = replace(run, answers={**old, **run.answers}, groups=groups)
    return _compared(trained, trained, merged, bootstrap.level)


def _as_run(offline: OfflineRun | Offline | None) -> OfflineRun:
    if isinstance(offline, OfflineRun):
        return offline
    answers = offline or {}
    names = [criterion for values in answers.values() for criterion, _ in values]
    return OfflineRun(answers, None, grouping(names), frozenset())


def _compared(
    grid: Outcomes | pd.DataFrame, trained: pd.DataFrame, run: OfflineRun, level: float
) -> dict[str, pd.DataFrame]:
    """Order and signs of a run's answers against the trainings'."""
    found = {
        "validation_agreement": agreement_table(
            grid, run.answers, groups=run.groups, ambiguous=run.ambiguous, level=level
        )
    }
    source = run.effects if run.effects is not None else run.answers
    signs = foresight_signs(source, trained, ambiguous=run.ambiguous)
    return {**found, "foresight_signs": signs} if len(signs) else found
