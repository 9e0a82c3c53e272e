"""What steps do when only the selected positions carry loss: criteria compared by intervention.

    horizon 0   theta_c = theta0 + a_c * d_c,    d_c the first direction of the cell's mean loss
    horizon k   theta_c = k steps of the real optimizer on minibatches (`trajectory`)
    reduction_i = D_i(theta0) - D_i(theta_c),    D in KL(q||p), KL(p||q) and JS, in nats

A *cell* is one criterion at one budget, on the contexts of one fold, after a horizon of optimizer
steps. Each fold is the *step batch* in turn, and all others are held out for it. Every cell starts
from the same theta0.

Horizon 0 is the one step. Its selection is a share of the fold's positions. With `match="norm"` it
moves the weights as far as the step on all positions of the fold does: a_c = a |d_full| / |d_c|,
with the one size a that all folds share. With `match="lr"` the learning rate is the same instead.
(A small selection leaves some weights without gradient; at equal norm AdamW's first step then moves
the others further.)

At later horizons every step selects among the positions of its minibatch, as training does: the
minibatch is measured with the student as it is by then, and scored and normalized by itself
(`scope="batch"`; `context` gives every response a budget of its own). With `scope="table"` the
positions are those of horizon 0, chosen once at theta0.

Always present are `full`, every position, and the rivals that know less than a criterion does:
`random`, `random_divergent` and `position_matched`, with several draws per budget. A cell is
compared with `full` and with `random` *on its own positions*: how much would those positions have
gained if all positions, or as many random ones, had been supervised?

The teacher runs once for all cells; the cells of horizon 0 share each batch's student forward pass
as far as memory for their gradients goes. A finished cell is a file named by everything that
decides it, so an interrupted grid continues where it stopped, a wider grid keeps the finished
cells, and a longer horizon keeps the shorter ones.

Reference: arXiv 2605.26844 compares criteria by training runs, which begin as these do.

Axes: N positions, n of a minibatch, C cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics import criteria as registry
from diagnostics.analysis.config import AnalysisConfig
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version
from diagnostics.core.inputs import takes, token_table
from diagnostics.core.progress import Shards, no_shards, worked
from diagnostics.core.schema import read_parquet
from diagnostics.core.settings import with_settings
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank
from diagnostics.measure.extra_names import extras_of
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.config.intervention import InterventionConfig
from diagnostics.probing.config.scores import ScoreConfig
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.config.trajectory import TrajectoryConfig, require_horizon
from diagnostics.probing.directions import Direction, Store, read_record, write_record
from diagnostics.probing.intervention_cells import Effect, InterventionCell, Interventions
from diagnostics.probing.intervention_table import summarize
from diagnostics.probing.step import (
    FORWARD_AND_BACK,
    FoldSteps,
    PreparedStep,
    StepBench,
    bench_for,
    loss_weights,
    step_positions,
)
from diagnostics.probing.tensor_lists import first_update_in_place, tensor_norm
from diagnostics.probing.trajectory import (
    Rows,
    Trajectory,
    Weigh,
    every_position,
    planned_trajectory,
    remeasured,
    require_support,
)

log = logging.getLogger("diagnostics")
RIVALS = ("random", "random_divergent", "position_matched")
"""Criteria that are always measured, as far as the token table has their columns."""
SUPPORT = ScoreConfig.k
"""K of the supports where no other is given."""
UNMEASURED = {"position", "response_length", "token_identity_gain"}
"""Columns that stay as they are, wherever the student stands."""
READ_BY_ALL = frozenset({"context_id", "position", "forward_kl", "reverse_kl"})
"""Columns of the token table that the selection of a step reads, whatever the criterion."""
NO_DIRECTION = Direction([], "", 0.0, 0.0, 0.0, 0.0)
"""In place of a step's direction where only trajectories are measured."""
GRADIENT_BYTES = 2**30
"""Memory for the gradients of cells that share one student forward."""


@takes(tokens=token_table)
@with_settings(probe=ProbeConfig, config=InterventionConfig, analysis=AnalysisConfig)
def intervene(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: InterventionConfig = InterventionConfig(),
    analysis: AnalysisConfig = AnalysisConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    k: int = SUPPORT,
    batch_tokens: int | None = None,
    cache: str | Path | None = None,
    shards: Callable[[str], Shards] = no_shards,
    **settings: Any,
) -> pd.DataFrame:
    """Take one step, and short trajectories, per cell and fold, and tabulate what each changed.

    Only the selected positions of a cell carry loss. This is `interventions` followed by
    `summarize`.

    Args:
        pair: The student, in float32 or float64, and its teacher.
        bank: The frozen contexts, N response positions in all.
        probe: The step and the folds; its fields may be given as keywords instead.
        config: The grid of cells; its fields may be given as keywords instead.
        analysis: How intervals are made; its fields may be given as keywords instead.
        tokens: The bank's token table; None scores the bank first. Its column `fold` (or the
            `split` of a single step) is used where it has one; otherwise prompts are divided as in
            `probe`.
        k: The K that the table was scored with.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        cache: Folder for finished cells; nothing is kept by default.
        shards: Where the steps on all positions are kept until the grid is done.
        settings: Fields of `probe`, `config` and `analysis`.

    Returns:
        The table of `summarize`: one row per criterion, budget, horizon, group of positions and
        measure.

    Raises:
        DiagnosticsError: As `interventions` does.
    """
    result = interventions(
        pair,
        bank,
        probe,
        config,
        tokens=tokens,
        k=k,
        batch_tokens=batch_tokens,
        cache=cache,
        shards=shards,
    )
    return summarize(result, draws=analysis.draws, level=analysis.level, seed=probe.seed)


@takes(tokens=token_table)
@with_settings(probe=ProbeConfig, config=InterventionConfig)
def interventions(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: InterventionConfig = InterventionConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    k: int = SUPPORT,
    batch_tokens: int | None = None,
    cache: str | Path | None = None,
    shards: Callable[[str], Shards] = no_shards,
    size: float | None = None,
    **settings: Any,
) -> Interventions:
    """Measure every cell of criteria x budgets x folds x horizons, with full and random.

    Args:
        pair: The student, in float32 or float64, and its teacher. The student ends as it began.
        bank: The frozen contexts, N response positions in all.
        probe: The step on all positions, whose size every cell's one step is matched to, and the
            folds; its fields may be given as keywords instead.
        config: The grid of cells; its fields may be given as keywords instead.
        tokens: The bank's token table; None scores the bank first. Its column `fold` (or the
            `split` of a single step) is used where it has one; otherwise prompts are divided as in
            `probe`.
        k: The K that the table was scored with.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        cache: Folder for finished cells; nothing is kept by default.
        shards: Where the steps on all positions are kept until the grid is done.
        size: The size that a probe with the same settings calibrated; None calibrates it.
        settings: Fields of `probe` and `config`.

    Returns:
        The cells with the effect of each (reductions in nats [N, 3]), for `summarize`.

    Raises:
        DiagnosticsError: A name is unknown, a budget lies outside (0, 1], there is no random draw,
            a cell selects no position, or the table is of another bank or another K.
    """
    if tokens is None:
        tokens = scores.score(pair, bank, k=k, batch_tokens=batch_tokens)
    positions = step_positions(pair, bank, tokens, probe, batch_tokens=batch_tokens)
    # planned before the teacher runs: a grid that cannot be measured is refused at once
    planned = plan(positions.tokens, positions.folds, config, seed=probe.seed)
    course = config.trajectory(pair, probe)
    bench = bench_for(pair, bank, positions, probe, batch_tokens=batch_tokens)
    folder = None if cache is None else Path(cache)
    steps = FullSteps(bench, probe, config, folder, shards, size)
    effects: dict[InterventionCell, Effect] = {}
    calibrations: list[pd.DataFrame] = []
    for fold in step_folds(positions.tokens, positions.folds):
        mine = [one for one in planned if one.cell.fold == fold]
        grid = Grid(steps.prepared(fold, mine), probe, config, course, folder, k)
        effects |= grid.measure(mine)
        calibrations.append(grid.full.calibration)
        steps.made.forget(fold)
    bench.require_restored()
    cells = [cell for one in planned for cell in one.at(require_horizon(config.horizon))]
    return Interventions(
        bench.tokens,
        bench.folds,
        cells,
        [effects[cell] for cell in cells],
        pd.concat(calibrations, ignore_index=True),
    )


def help_measuring(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig,
    config: InterventionConfig,
    *,
    tokens: pd.DataFrame,
    cache: Path,
    k: int = SUPPORT,
    batch_tokens: int | None = None,
) -> None:
    """Measure the trajectories of a grid from its end on, while another process measures them from
    its beginning on; the cache is where they meet.

    A cell is measured from the same weights by the same steps in either process.

    Args:
        pair: As for `interventions`.
        bank: The frozen contexts.
        probe: The step and the folds.
        config: The grid of cells.
        tokens: The bank's token table.
        cache: Folder for finished cells.
        k: The K that the table was scored with.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
    """
    positions = step_positions(pair, bank, tokens, probe, batch_tokens=batch_tokens)
    planned = plan(positions.tokens, positions.folds, config, seed=probe.seed)
    bench = bench_for(pair, bank, positions, probe, batch_tokens=batch_tokens)
    for fold in reversed(step_folds(positions.tokens, positions.folds)):
        weights_N = bench.loss_weights(fold)
        # a trajectory needs neither the direction of the one step nor its size
        at_fold = PreparedStep(bench, fold, weights_N, NO_DIRECTION, pd.DataFrame())
        grid = Grid(at_fold, probe, config, config.trajectory(pair, probe), cache, k)
        for key, effect in grid.from_the_end([one for one in planned if one.cell.fold == fold]):
            write_parquet(cache / f"{key}.parquet", effect.to_frame())


def step_folds(tokens: pd.DataFrame, folds: np.ndarray) -> list[int]:
    """Folds that are the step batch in turn: all, and the step half alone of a table with `split`.

    Args:
        tokens: Token table, one row per position.
        folds: Fold of each position, int [N].
    """
    single = "fold" not in tokens and "split" in tokens
    return [0] if single else sorted(set(folds.tolist()))


class FullSteps:
    """The steps on all positions of each fold, whose one size the cells of horizon 0 share.

    Where the cache knows a step and has every cell that moves along it, the direction's numbers are
    not needed, and no backward pass is made for it.

    Args:
        bench: The student at theta0, and the bank.
        probe: The steps.
        config: The grid of cells.
        cache: Folder for finished cells, or None.
        shards: Where directions are kept until the grid is done.
        size: The size of the steps where it is known.
    """

    def __init__(
        self,
        bench: StepBench,
        probe: ProbeConfig,
        config: InterventionConfig,
        cache: Path | None,
        shards: Callable[[str], Shards],
        size: float | None,
    ):
        self.bench, self.probe, self.config, self.cache = bench, probe, config, cache
        self.size = size
        self.made = FoldSteps(
            bench, probe, lambda fold: Store(shards(f"direction-fold{fold}").folder)
        )

    def prepared(self, fold: int, planned: Sequence[Planned]) -> PreparedStep:
        """The step on a fold; `planned` is what the grid measures on it."""
        known = self._known(fold)
        if known is not None and not self._grid(known).needs_direction(planned):
            return known
        if self.cache is None:
            return self.made.prepared(fold, size=self.size)
        full = self.made.prepared(fold, size=self._known_size)
        write_record(self._record(fold), full.direction, full.calibration)
        return full

    def _grid(self, full: PreparedStep) -> Grid:
        course = self.config.trajectory(self.bench.pair, self.probe)
        return Grid(full, self.probe, self.config, course, self.cache, SUPPORT)

    @cached_property
    def _known_size(self) -> float | None:
        """The size of an earlier grid's steps, or of the probe's; None where there is none."""
        found = [known for fold in range(self.bench.count) if (known := self._known(fold))]
        return found[0].step_size if found else self.size

    def _known(self, fold: int) -> PreparedStep | None:
        """The step of an earlier grid, without its update."""
        found = None if self.cache is None else read_record(self._record(fold))
        weights_N = self.bench.loss_weights(fold)
        return None if found is None else PreparedStep(self.bench, fold, weights_N, *found)

    def _record(self, fold: int) -> Path:
        """File named by everything that decides a step, except the rounding of its gradient."""
        assert self.cache is not None
        settings = {n: getattr(self.probe, n) for n in ("loss", "beta", "optimizer", "step")}
        identity = settings | self._identity | {"fold": fold}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        for each in range(self.bench.count):  # the size rests on the steps of all folds
            digest.update(self.bench.loss_weights(each).tobytes())
        return self.cache / f"step-{digest.hexdigest()[:24]}.json"

    @cached_property
    def _identity(self) -> dict:
        return _identity(self.bench) | {"code": code_version("probing.intervention")}


def _identity(bench: StepBench) -> dict:
    """Hashes of both models and of the bank."""
    ids = json.dumps(
        [
            [
                context.context_id,
                context.prompt_ids,
                context.response_ids,
                context.teacher_ids,
                *([] if context.supervised is None else [context.supervised]),
            ]
            for context in bench.bank
        ]
    )
    return {
        "student": bench.origin_sha256,
        "teacher": bench.pair.facts.get("teacher"),
        "bank": hashlib.sha256(ids.encode()).hexdigest(),
        "gradient_precision": bench.gradient_precision,
    }


@dataclass(frozen=True)
class Planned:
    """One criterion at one budget on one fold, at every horizon."""

    cell: InterventionCell
    """The cell of horizon 0."""
    seed: int
    """Seed of its random numbers."""
    weights_N: np.ndarray
    """1.0 where the position carries the loss of the one step, else 0.0."""
    ambiguous: float
    """Share of that selection that ties decide."""

    def at(self, horizon: Sequence[int]) -> list[InterventionCell]:
        """Its cells: of horizon 0, and of these horizons."""
        return [replace(self.cell, horizon=k) for k in (0, *horizon)]


def plan(
    tokens: pd.DataFrame, folds: np.ndarray, config: InterventionConfig, *, seed: int
) -> list[Planned]:
    """The grid: on each fold full, then the rivals and each criterion at each budget.

    A position whose measurements are not finite carries no loss, selected or not.

    Args:
        tokens: Token table, one row per position.
        folds: Fold of each position, int [N].
        config: The grid.
        seed: Seed of the random selections; draw number i uses seed + i.

    Returns:
        What is measured at every horizon, with the selection of horizon 0; the first of each fold
        is `full`.

    Raises:
        DiagnosticsError: A criterion is unknown or lacks a column, a budget lies outside (0, 1], or
            a cell selects no position with finite measurements.
    """
    found = []
    for fold in step_folds(tokens, folds):
        rows = np.flatnonzero(folds == fold)
        usable_N = loss_weights(tokens, folds == fold)
        found.append(Planned(InterventionCell("full", 1.0, 0, fold, 0), seed, usable_N, 0.0))
        for name in _names(tokens, config.criteria):
            for draw in range(config.random_draws if registry.is_seeded(name) else 1):
                for budget in sorted(set(config.budgets)):
                    cell = InterventionCell(name, budget, draw, fold, 0)
                    found.append(_planned(tokens, rows, usable_N, cell, seed + draw, config.scope))
    found = _without_idle_rivals(found, config.criteria)
    empty = next((one.cell for one in found if not one.weights_N.any()), None)
    if empty is not None:
        raise DiagnosticsError(
            f"{empty.criterion} at budget {empty.budget} selects no position of fold {empty.fold}"
            " with finite measurements. Leave it out, or raise the budget."
        )
    return found


def _without_idle_rivals(planned: list[Planned], asked: Sequence[str]) -> list[Planned]:
    """Leave out the rivals that nobody asked for and that select nothing somewhere.

    Lists of a top-K teacher leave their columns undefined at many positions.
    """
    idle = {one.cell.criterion for one in planned if not one.weights_N.any()}
    idle &= set(RIVALS) - {registry.find(name).name for name in asked} - {"random"}
    if idle:
        log.warning(
            "%s select no position with finite measurements on some fold, and are left out of the"
            " rivals",
            ", ".join(sorted(idle)),
        )
    return [one for one in planned if one.cell.criterion not in idle]


def _names(tokens: pd.DataFrame, criteria: Sequence[str]) -> list[str]:
    """The rivals that the table has columns for, then the criteria that are asked for."""
    rivals = [name for name in RIVALS if not registry.missing_columns(tokens, name)]
    asked = [registry.find(name).name for name in criteria]
    chosen = [name for name in asked if registry.find(name).kind != "all"]
    return list(dict.fromkeys([*rivals, *chosen]))


def _planned(
    tokens: pd.DataFrame,
    rows: Rows,
    usable_N: np.ndarray,
    cell: InterventionCell,
    seed: int,
    scope: str,
) -> Planned:
    here = tokens.iloc[rows]
    mask, ambiguous = selected(
        here, cell.criterion, budget=cell.budget, seed=seed, by_context=scope == "context"
    )
    weights_N = np.zeros(len(tokens))
    weights_N[rows] = mask
    return Planned(cell, seed, weights_N * usable_N, ambiguous)


def selected(
    tokens: pd.DataFrame,
    criterion: str,
    *,
    budget: float,
    seed: registry.Seed,
    by_context: bool = False,
) -> tuple[np.ndarray, float]:
    """The selection among some positions, and the share of it that ties decide.

    Args:
        tokens: Token table of these positions, over which scores are normalized.
        criterion: Name of the criterion.
        budget: Share of the positions.
        seed: Seed of its random numbers.
        by_context: Whether every response has a budget of its own.

    Returns:
        bool [n], True where the position is selected; and the share.
    """
    scope: registry.Scope = "context" if by_context else "table"
    return registry.selection(tokens, criterion, budget=budget, seed=seed, scope=scope)


@dataclass
class StepSelection:
    """The loss weights of a trajectory's minibatches, one selection per step.

    Args:
        bench: The student, measured as it is when a step's turn comes, and the bank.
        planned: Criterion, budget and seed, and the selection at theta0.
        scope: One of SCOPES.
        k: Size of the top-K supports.
    """

    bench: StepBench
    planned: Planned
    scope: str
    k: int
    ambiguous: list[float] = field(default_factory=list)
    """Share of each step's selection that ties decided."""

    def __call__(self, rows: Rows, number: int) -> np.ndarray:
        """Loss weights [n] of a minibatch; see `trajectory.Trajectory`."""
        cell = self.planned.cell
        if self.scope == "table" or cell.criterion == "full":
            self.ambiguous.append(self.planned.ambiguous)
            return self.planned.weights_N[rows]
        table = self._measured(rows, number)
        mask, ambiguous = selected(
            table,
            cell.criterion,
            budget=cell.budget,
            seed=[self.planned.seed, abs(number), int(number < 0)],
            by_context=self.scope == "context",
        )
        if number > 0:
            self.ambiguous.append(ambiguous)
        return mask & np.isfinite(table["forward_kl"]) & np.isfinite(table["reverse_kl"])

    def _measured(self, rows: Rows, number: int) -> pd.DataFrame:
        """The token table of a minibatch with the student as it is now.

        Up to the first step the student stands at theta0, which the bench's table has measured; and
        a criterion that reads no measurement, such as random, needs no other.
        """
        read = set(registry.find(self.planned.cell.criterion).needs)
        if number <= 1 or read <= UNMEASURED:
            return self._read.iloc[rows]
        return remeasured(self.bench, rows, k=self.k, extra=extras_of(read), of=self._read)

    @cached_property
    def _read(self) -> pd.DataFrame:
        """The columns of the bench's table that a selection reads, which every step looks up."""
        tokens = self.bench.tokens
        wanted = registry.find(self.planned.cell.criterion).possible_columns | READ_BY_ALL
        return tokens[[name for name in tokens if name in wanted]]


@dataclass(frozen=True)
class Grid:
    """The step on all positions of a fold as reference, and where finished cells are kept."""

    full: PreparedStep
    probe: ProbeConfig
    config: InterventionConfig
    course: TrajectoryConfig
    cache: Path | None
    k: int

    @property
    def bench(self) -> StepBench:
        """The bench of the step on all positions, which every cell uses."""
        return self.full.bench

    @cached_property
    def horizon(self) -> tuple[int, ...]:
        """The horizons of the trajectories, in ascending order."""
        return require_horizon(self.config.horizon)

    def measure(self, planned: Sequence[Planned]) -> dict[InterventionCell, Effect]:
        """Measure the effect of each cell. Cells that cannot differ are measured once.

        Args:
            planned: Criteria and budgets on this grid's fold.

        Returns:
            The effect of each cell.
        """
        names = {cell: self.key(one, cell.horizon) for one in planned for cell in self._cells(one)}
        found = {key: kept for key in set(names.values()) if (kept := self._kept(key)) is not None}
        log.info(
            "intervention, fold %d: %d cells, %d of them distinct, %d already measured",
            self.full.fold,
            len(names),
            len(set(names.values())),
            len(found),
        )
        for key, effect in self._measured(planned, frozenset(found)):
            if self.cache is not None:
                write_parquet(self.cache / f"{key}.parquet", effect.to_frame())
            found[key] = Effect.from_frame(effect.to_frame())
        return {cell: found[key] for cell, key in names.items()}

    def _cells(self, one: Planned) -> list[InterventionCell]:
        return one.at(self.horizon)

    def key(self, one: Planned, horizon: int) -> str:
        """Name of everything that decides a cell's effect.

        For the one step these are its positions, the step, both models and the bank; for a
        trajectory the order of its minibatches, the optimizer and the rule of selection.
        """
        identity = self._identity | {"loss": self.probe.loss, "beta": self.probe.beta}
        if horizon == 0:
            identity |= {
                "optimizer": self.probe.optimizer,
                "match": self.config.match,
                "size": self.full.step_size,
                "direction": self.full.direction.sha256,
            }
        else:
            identity |= asdict(self.course) | self._rule(one) | {"horizon": horizon}
            identity |= {"order": self._orders[horizon]}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        digest.update(np.packbits(one.weights_N > 0).tobytes())
        return digest.hexdigest()[:24]

    def _rule(self, one: Planned) -> dict:
        """What decides the selections of a trajectory, beside the student's course."""
        cell = one.cell
        rule: dict[str, Any] = {"code": self._code}
        if cell.criterion == "full":
            return rule
        if self.config.scope == "table":
            return rule | {"scope": "table"}
        seed = one.seed if registry.is_seeded(cell.criterion) else None
        version = registry.find(cell.criterion).version
        return rule | {
            "scope": self.config.scope,
            "criterion": cell.criterion,
            "budget": cell.budget,
            "seed": seed,
            "k": self.k,
            **({"module": version} if version else {}),
        }

    @cached_property
    def _orders(self) -> dict[int, str]:
        """Hash of the minibatches up to each horizon."""
        course = self._course(every_position)
        return {k: _rows_sha256([*course.warm, *course.steps[:k]]) for k in self.horizon}

    @cached_property
    def _code(self) -> str:
        return code_version("probing.intervention")

    def _course(self, weigh: Weigh) -> Trajectory:
        return planned_trajectory(
            self.bench,
            self.full.fold,
            self.course,
            weigh,
            steps=max(self.horizon, default=0),
            seed=self.probe.seed,
            few_passes=True,
        )

    @cached_property
    def _identity(self) -> dict:
        return _identity(self.bench)

    def needs_direction(self, planned: Sequence[Planned]) -> bool:
        """True where a cell that moves along the step on all positions is still to be measured."""
        return any(self._is_full(one) and self._kept(self.key(one, 0)) is None for one in planned)

    def _kept(self, key: str) -> Effect | None:
        """A cell measured earlier; a file that cannot be read is measured again."""
        path = None if self.cache is None else self.cache / f"{key}.parquet"
        if path is None or not path.exists():
            return None
        try:
            frame = read_parquet(path)
        except DiagnosticsError as error:
            log.warning("a finished cell is measured again: %s", error)
            return None
        return Effect.from_frame(frame) if len(frame) == len(self.bench.tokens) else None

    def _measured(
        self, planned: Sequence[Planned], known: frozenset[str]
    ) -> Iterator[tuple[str, Effect]]:
        """Effects that are not known yet, by their cells' names."""
        single = {self.key(one, 0): one for one in planned}
        single = {key: one for key, one in single.items() if key not in known}
        left = self._courses(planned, known)
        if not single and not left:
            return
        self._require_support(left)  # before anything that takes long
        before = np.stack(self.bench.before(js=True), axis=1)
        yield from self._one_steps(single, before)
        yield from self._trajectories(left, before)

    def _courses(
        self, planned: Sequence[Planned], known: frozenset[str]
    ) -> list[tuple[Planned, list[int]]]:
        """Distinct trajectories with the horizons at which they are still to be measured."""
        courses = {self.key(one, max(self.horizon)): one for one in planned if self.horizon}
        wanted = [
            (one, [k for k in self.horizon if self.key(one, k) not in known])
            for one in courses.values()
        ]
        worked(sum(self._work(self.horizon) for _, at in wanted if not at))
        return [(one, at) for one, at in wanted if at]

    def _work(self, horizon: Sequence[int]) -> int:
        """About how many positions the forward passes of a trajectory go over."""
        steps = self._course(every_position).steps[: max(horizon)]
        return (1 + FORWARD_AND_BACK) * sum(map(len, steps)) + len(horizon) * len(self.bench.tokens)

    def _trajectories(
        self, left: Sequence[tuple[Planned, list[int]]], before: np.ndarray
    ) -> Iterator[tuple[str, Effect]]:
        """The effects of trajectories; one that another process has measured by now is taken."""
        for number, (one, wanted) in enumerate(left, 1):
            by_now = {key: self._kept(key) for key in (self.key(one, k) for k in wanted)}
            made = {key: effect for key, effect in by_now.items() if effect is not None}
            if len(made) == len(wanted):
                worked(self._work(wanted))
                yield from made.items()
                continue
            text = f"fold {self.full.fold}, trajectory {number} of {len(left)}"
            yield from self._trajectory(one, wanted, before, text)

    def from_the_end(self, planned: Sequence[Planned]) -> Iterator[tuple[str, Effect]]:
        """The effects of the trajectories that the cache lacks, the last ones first."""
        keys = {self.key(one, k) for one in planned for k in self.horizon}
        known = frozenset(key for key in keys if self._kept(key) is not None)
        left = self._courses(planned, known)
        if left:
            self._require_support(left)
            before = np.stack(self.bench.before(js=True), axis=1)
            yield from self._trajectories(left[::-1], before)

    def _require_support(self, left: Sequence[tuple[Planned, list[int]]]) -> None:
        """Check the size of the supports where trajectories measure criteria anew."""
        if any(one.cell.criterion != "full" for one, _ in left):
            require_support(self.bench, self._course(every_position).steps[0], k=self.k)

    def _trajectory(
        self, one: Planned, wanted: Sequence[int], before: np.ndarray, description: str
    ) -> Iterator[tuple[str, Effect]]:
        """The effects of one criterion and budget at the horizons that are wanted."""
        weigh = StepSelection(self.bench, one, self.config.scope, self.k)
        course = self._course(weigh)
        for k in course.run(wanted):
            after = self.bench.rescore(f"{description}, {k} steps", js=True)
            yield (
                self.key(one, k),
                Effect(
                    self.course.rate,
                    course.update_norm,
                    course.gradient_norm,
                    float(np.mean(weigh.ambiguous)),
                    course.idle_steps,
                    course.carried_N.copy(),
                    before - np.stack(after, axis=1),
                ),
            )

    def _one_steps(
        self, todo: dict[str, Planned], before: np.ndarray
    ) -> Iterator[tuple[str, Effect]]:
        """The effects of horizon 0, whose cells share forward passes."""
        left = list(todo.items())
        room = max(
            1, GRADIENT_BYTES // sum(p.numel() * p.element_size() for p in self.bench.parameters)
        )
        for start in range(0, len(left), room):
            group = left[start : start + room]
            partial = [one.weights_N for _, one in group if not self._is_full(one)]
            gradients = iter(
                shared_gradients(
                    self.bench,
                    partial,
                    among_N=self.full.weights_N,
                    loss=self.probe.loss,
                    beta=self.probe.beta,
                )
            )
            for number, (key, one) in enumerate(group, start + 1):
                gradient = None if self._is_full(one) else next(gradients)
                text = f"fold {self.full.fold}, cell {number} of {len(left)}"
                yield key, self._effect(one, gradient, before, text)

    def _is_full(self, one: Planned) -> bool:
        """True where the step on all positions is the cell's own."""
        return np.array_equal(one.weights_N, self.full.weights_N)

    def _effect(
        self, one: Planned, gradient: list[Tensor] | None, before: np.ndarray, description: str
    ) -> Effect:
        if gradient is None:
            full = self.full.direction
            update, norm, gradient_norm = full.update, full.norm, full.gradient_norm
        else:
            gradient_norm, _ = first_update_in_place(gradient, self.probe.optimizer)
            update, norm = gradient, tensor_norm(gradient)
        size = self._size(norm, gradient_norm)
        with self.bench.moved(update, size):
            after = self.bench.rescore(description, js=True)
        return Effect(
            size,
            size * norm,
            gradient_norm,
            one.ambiguous,
            0,
            one.weights_N > 0,
            before - np.stack(after, axis=1),
        )

    def _size(self, norm: float, gradient_norm: float) -> float:
        """Step size of a cell. SGD's direction has norm 1, so there an equal learning rate scales
        with the gradient.
        """
        full, size = self.full.direction, self.full.step_size
        if self.config.match == "norm":
            return size * full.norm / norm if norm else 0.0
        return size * (gradient_norm / full.gradient_norm if self.probe.optimizer == "sgd" else 1.0)


def _rows_sha256(steps: Sequence[Rows]) -> str:
    digest = hashlib.sha256()
    for rows in steps:
        digest.update(rows.astype(np.int64).tobytes() + b"|")
    return digest.hexdigest()


def shared_gradients(
    bench: StepBench,
    weights: Sequence[np.ndarray],
    *,
    among_N: np.ndarray,
    loss: str,
    beta: float,
) -> list[list[Tensor]]:
    """Gradients of several weightings of the mean loss, with one student forward pass per batch.

    Out of memory, every weighting gets its own forward passes.

    Args:
        bench: The student at theta0.
        weights: One float [N] per weighting, 0 where a position carries no loss.
        among_N: Nonzero [N] at every position that any weighting may have. All contexts of these
            positions run, so that a gradient does not depend on the others that share its pass.
        loss: One of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`.

    Returns:
        For each weighting one tensor per parameter.
    """
    if not weights:
        return []
    try:
        gradients = [[torch.zeros_like(p) for p in bench.parameters] for _ in weights]
        for batch, teacher_nH in bench.weighted(among_N):
            _add_gradients(bench, batch, teacher_nH, weights, gradients, loss=loss, beta=beta)
    except (torch.OutOfMemoryError, MemoryError):
        log.warning(
            "%d cells do not fit in memory together: each gets its own forward pass", len(weights)
        )
        return [bench.gradient(weights_N, loss=loss, beta=beta)[1] for weights_N in weights]
    for gradient in gradients:
        distributed.sum_in_place(gradient)
    return gradients


def _add_gradients(
    bench: StepBench,
    batch: scores.Batch,
    teacher_nH: Tensor,
    weights: Sequence[np.ndarray],
    gradients: list[list[Tensor]],
    *,
    loss: str,
    beta: float,
) -> None:
    here = [c for c, weights_N in enumerate(weights) if weights_N[batch.rows_n.numpy()].any()]
    if not here:
        return
    student_nH = bench.states(batch)
    for c in here:
        part = bench.batch_loss(batch, student_nH, teacher_nH, weights[c], loss=loss, beta=beta)
        for total, add in zip(
            gradients[c],
            torch.autograd.grad(
                part, bench.parameters, retain_graph=c != here[-1], allow_unused=True
            ),
            strict=True,
        ):
            if add is not None:
                total += add
        worked(len(batch.rows_n) * FORWARD_AND_BACK)
