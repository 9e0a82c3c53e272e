"""One OPD step per fold on frozen contexts, and what each did to every position.

    gain_i = D_i(theta0) - D_i(theta0 + a*d),   D = KL(q||p), teacher first, in nats

Module `step` sets the steps up: the folds, the direction d of each and the size a that all share.
The probe takes the step of every fold from the same theta0 and measures every position before and
after. A position's `gain` is the mean over the steps on the other folds, for which it was held out;
`own_gain` comes from the step in which it carried loss (`core.folds`).

Two controls are measured beside it. After the step towards a *permuted teacher*
(`permuted_teacher`) the gain needs nothing that the teacher says about a context, so
`context_gain = gain - gain_permuted` is what conclusions are about. The *placebo* (`placebo`) shows
how large a gain is that has no teacher in it. And a short trajectory of the real optimizer shows
where the step leads (`horizon`).

Before and after come from the same code on the same batches, so a step of size 0 gives gains of
exactly 0. The student is restored from a copy afterwards, and every bit is compared.

Departures from the scripts released with arXiv 2605.26844: predictors are those of theta0; a
relative gain is undefined where D is under 1e-3 nats (`relative_gain_released` has no floor)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis.bounds import TAIL_COLUMN
from diagnostics.analysis.config import Bootstrap
from diagnostics.core.folds import NULLS, combine, null_suffix
from diagnostics.core.inputs import takes, token_table
from diagnostics.core.progress import Shards, no_shards
from diagnostics.core.schema import (
    KEYS,
    column,
    parquet_columns,
    read_parquet,
    validate_tokens,
)
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import sizes
from diagnostics.core.token_identity import token_identity_gain
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.config.controls import ControlConfig
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.config.trajectory import require_horizon
from diagnostics.probing.directions import Direction, Finished, Store
from diagnostics.probing.horizon import Fresh, horizon_gains, horizon_table
from diagnostics.probing.permuted_teacher import graders, kept_own, require_graded
from diagnostics.probing.placebo import STEP_FOLD, placebo_by_rollouts, placebo_gains
from diagnostics.probing.step import (
    FoldSteps,
    PreparedStep,
    StepBench,
    bench_for,
    kept_direction,
    step_positions,
)

READ = (
    *KEYS,
    "is_special",
    "response_index",
    TAIL_COLUMN,
    "forward_kl",
    "reverse_kl",
    "js",
    "student_entropy",
    "advantage",
)
"""Columns of the scores that a probe reads: positions, divergences, folds, nulls, advantages."""
PLACEBO = "placebo"
"""What the columns of the placebo's passes begin with; they never reach the token table."""


@dataclass(frozen=True)
class Step:
    """The record of a step. Losses are means over the supervised positions, in nats."""

    fold: int
    """The fold whose positions carried the loss."""
    loss: str
    beta: float
    optimizer: str
    step_size: float
    update_norm: float
    relative_norm: float
    """Norm of the update over the norm of the weights."""
    gradient_norm: float
    loss_before: float
    """Mean of the loss at theta0; for `sampled`, of the reverse KL that calibrates its size."""
    predicted_drop: float
    realised_drop: float
    step_positions: int
    held_out_positions: int
    kept_own_teacher: dict[str, int]
    """For each null, positions that kept their own teacher, being alone in their group."""
    weights_sha256: str
    """Hash of the student before the step. Afterwards every bit of its weights was restored."""


@dataclass
class ProbeResult:
    """What `probe` returns."""

    tokens: pd.DataFrame
    """The token table with gains, one row per position."""
    calibration: pd.DataFrame
    """The step sizes that were tried on every fold (see `step.calibrate_together`)."""
    placebo: pd.DataFrame
    """Sizes of the placebo's gains by stratum of D (see `placebo.placebo_by_rollouts`)."""
    horizon: pd.DataFrame
    """Reductions along the trajectory (see `horizon.horizon_table`); empty without one."""
    steps: list[Step]
    """The records of the steps, in the order of the folds."""

    @property
    def step(self) -> Step:
        """The record of the step on fold 0."""
        return self.steps[0]

    def __repr__(self) -> str:
        return sizes("ProbeResult (rows)", vars(self))

    def _repr_html_(self) -> str:
        shown = ["gain", "own_gain", "gain_permuted", "context_gain"]
        gains = self.tokens.groupby("fold")[[name for name in shown if name in self.tokens]].mean()
        step = (
            pd.DataFrame(map(asdict, self.steps)).drop(columns="weights_sha256").set_index("fold").T
        )
        return (
            f"<p>Mean gain (nats) by fold</p>{gains.to_html(float_format='%.3g')}{step.to_html()}"
        )


def read_scores(path: Path) -> pd.DataFrame:
    """Read what a probe needs of a `scores.parquet`: some ten of its seventy columns.

    Raises:
        DiagnosticsError: The file is missing or damaged, or holds no token table.
    """
    there = [name for name in READ if name in parquet_columns(path)]
    return validate_tokens(read_parquet(path, columns=there))


@takes(tokens=token_table)
@with_settings(config=ProbeConfig, controls=ControlConfig)
def probe(
    pair: Pair,
    bank: Bank,
    config: ProbeConfig = ProbeConfig(),
    controls: ControlConfig = ControlConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int | None = None,
    shards: Callable[[str], Shards] = no_shards,
    **settings: Any,
) -> ProbeResult:
    """Take one OPD step on each fold of the prompts and measure the gains at every position.

    The student ends as it began, bit for bit.

    Args:
        pair: The student, in float32 or float64, and its teacher.
        bank: The frozen contexts, N response positions in all.
        config: The steps; its fields may be given as keywords instead. Steps of size 0 change
            nothing, exactly.
        controls: What is measured beside them; its fields may be given as keywords instead.
        tokens: The bank's token table as `score` wrote it; None scores the bank first. Outcomes of
            an earlier probe are left out of the result.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        shards: Where each pass keeps its finished batches, by the name of the pass; nothing is
            kept by default. Batches of a moved student are only reused for the very same step.
        settings: Fields of `config` and `controls`.

    Returns:
        The token table with fold, gain_fold<f> and reverse_gain_fold<f> (before minus after the
        step on fold f, nats), gain_permuted_fold<f> for each null, everything that `folds.combine`
        makes of them, token_identity_gain, and gain_h<k> and the like along the trajectory; the
        calibration of the steps' size; the placebo's sizes; the trajectory's reductions; and the
        steps' records.

    Raises:
        DiagnosticsError: A setting is unknown or out of range, the table is of another bank, there
            are fewer prompts than folds, the student's precision is too low, or a null is not
            defined for this teacher and loss.
    """
    if controls.nulls:
        require_graded(scores.teacher_of(pair), config.loss)
    positions = step_positions(
        pair,
        bank,
        tokens,
        config,
        batch_tokens=batch_tokens,
        keep_folds=False,  # the probe draws the folds that every later stage finds in the table
    )
    bench = bench_for(pair, bank, positions, config, batch_tokens=batch_tokens)
    before = bench.before(shards=shards("before"))
    probing = _Probing(bench, config, controls, shards, before)
    for fold in range(bench.count):
        probing.measure(fold)
    probing.follow()
    bench.require_restored()
    return probing.result()


class _Probing:
    """The steps of a probe, fold by fold.

    A fold whose passes are all done is kept as it is, and its direction is forgotten.
    """

    def __init__(
        self,
        bench: StepBench,
        config: ProbeConfig,
        controls: ControlConfig,
        shards: Callable[[str], Shards],
        before: tuple[np.ndarray, ...],
    ):
        self.bench, self.config, self.controls = bench, config, controls
        self.shards, self.before = shards, before
        self.ways = FoldSteps(bench, config, lambda fold: self._store(f"direction-fold{fold}"))
        self.columns: dict[str, np.ndarray] = {}
        self.placebos: list[np.ndarray] = []
        self.steps: list[PreparedStep] = []
        self.kept_own: list[dict[str, int]] = []
        self.horizon = require_horizon(controls.horizon)
        self.fresh: Fresh | None = None

    def _store(self, name: str) -> Store:
        return Store(self.shards(name).folder, directions=self.bench.spread.is_whole)

    def measure(self, fold: int) -> None:
        """Take the step on a fold, with its placebo where it has one, and its nulls."""
        step = self._taken(fold)
        self.steps.append(step)
        self.kept_own.append({null: self._take_null(step, null) for null in self.controls.nulls})

    def follow(self) -> None:
        """Take the trajectory, where one is asked for."""
        if not self.horizon:
            return
        found = horizon_gains(
            self.bench,
            self.before,
            self.controls.trajectory(
                self.controls.rate(self.bench.pair.name),
                loss=self.config.loss,
                beta=self.config.beta,
            ),
            horizon=self.horizon,
            seed=self.config.seed,
        )
        self.columns |= found.columns
        self.fresh = found.fresh

    def _taken(self, fold: int) -> PreparedStep:
        """The step on a fold, whose measurements are in `columns`; without its update's numbers."""
        store = self.ways.store(fold)
        finished = store.finished()
        if finished is None or finished.size != self.ways.size:
            step = self.ways.prepared(fold)
            finished = Finished(
                step.direction, step.step_size, self._measured(step), step.calibration
            )
            store.finish(finished)
            self.ways.forget(fold)
        for name, values_N in finished.measured.items():
            self.columns[str(name)] = values_N.to_numpy()
        weights_N, direction = self.bench.loss_weights(fold), finished.direction.without_update()
        assert finished.calibration is not None
        return PreparedStep(self.bench, fold, weights_N, direction, finished.calibration)

    def _measured(self, step: PreparedStep) -> pd.DataFrame:
        """Both gains [N] after a step, and those of its placebos."""
        fold, name = step.fold, step.direction.name(step.step_size)
        gain_N, reverse_N = self._gains(
            step.direction, step.step_size, f"after-{name}", f"step {fold}"
        )
        columns = {f"gain_fold{fold}": gain_N, f"reverse_gain_fold{fold}": reverse_N}
        if fold == STEP_FOLD:
            placebos = placebo_gains(
                step,
                directions=self.controls.placebos,
                seed=self.config.seed,
                shards=self.shards,
            )
            columns |= {f"{PLACEBO}{number}": values for number, values in enumerate(placebos)}
        return pd.DataFrame(columns)

    def _take_null(self, step: PreparedStep, null: str) -> int:
        """Measure the step towards a permuted teacher; returns how many kept their own."""
        fold, tokens = step.fold, self.bench.tokens
        graded_by = graders(
            tokens, step.weights_N, null, seed=[self.config.seed, 4, fold, NULLS.index(null)]
        )
        store = self._store(f"direction-{null}-fold{fold}")
        finished = store.finished()
        if finished is None or finished.size != _matched(step, finished.direction):
            direction = kept_direction(
                self.bench, step.weights_N, self.config, store, graded_by=graded_by
            )
            size = _matched(step, direction)
            gain_N, _ = self._gains(
                direction, size, f"{null}-{direction.name(size)}", f"permuted teacher {fold}"
            )
            measured = pd.DataFrame({f"gain_permuted{null_suffix(null)}_fold{fold}": gain_N})
            finished = Finished(direction, size, measured, None)
            store.finish(finished)
        for name, values_N in finished.measured.items():
            self.columns[str(name)] = values_N.to_numpy()
        return kept_own(graded_by, step.weights_N)

    def _gains(
        self, direction: Direction, size: float, name: str, description: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Forward and reverse gain [N] of every position after a step."""
        with self.bench.moved(direction.update, size):
            after = self.bench.rescore(description, shards=self.shards(name))
        return self.before[0] - after[0], self.before[1] - after[1]

    def result(self) -> ProbeResult:
        """The tables, once every fold is measured."""
        placebos = [
            self.columns.pop(name) for name in list(self.columns) if name.startswith(PLACEBO)
        ]
        predictors = _without_outcomes(self.bench.tokens)
        found = pd.DataFrame({"fold": self.bench.folds, **self.columns}, index=predictors.index)
        tokens = combine(pd.concat([predictors, found], axis=1))
        identity_N = token_identity_gain(tokens)
        identity = {} if identity_N is None else {"token_identity_gain": identity_N}
        return ProbeResult(
            validate_tokens(tokens.assign(**identity)),
            pd.concat([step.calibration for step in self.steps], ignore_index=True),
            placebo_by_rollouts(tokens, tokens[f"gain_fold{STEP_FOLD}"].to_numpy(), placebos),
            horizon_table(
                tokens,
                self.fresh,
                horizon=self.horizon,
                bootstrap_config=Bootstrap(seed=self.config.seed),
            ),
            [
                _record(step, self.config, kept)
                for step, kept in zip(self.steps, self.kept_own, strict=True)
            ],
        )


def _matched(step: PreparedStep, direction: Direction) -> float:
    """Size at which another direction moves the weights as far as a step does.

    The norms' ratio comes first, so that an equal direction gets the step's own size in every bit.
    """
    norm = direction.norm
    return step.step_size * (step.direction.norm / norm) if norm else 0.0


def _without_outcomes(tokens: pd.DataFrame) -> pd.DataFrame:
    """The table without what another step left in it."""
    kinds = {name: column(name) for name in tokens}
    made = [
        name
        for name, kind in kinds.items()
        if name in ("split", "fold", "token_identity_gain")
        or (kind is not None and kind.stage in ("after", "outcome"))
    ]
    return tokens.drop(columns=made)


def _record(step: PreparedStep, config: ProbeConfig, kept: dict[str, int]) -> Step:
    chosen, direction = step.chosen, step.direction
    return Step(
        step.fold,
        config.loss,
        config.beta,
        config.optimizer,
        float(chosen.step_size),
        float(chosen.step_size * direction.norm),
        float(chosen.relative_norm),
        direction.gradient_norm,
        direction.value,
        float(chosen.predicted_drop),
        float(chosen.realised_drop),
        int((step.weights_N > 0).sum()),
        int((step.bench.folds != step.fold).sum()),
        kept,
        step.bench.origin_sha256,
    )
