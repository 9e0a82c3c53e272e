"""Set-up of one optimizer step on frozen contexts, which probe, intervention and attribution share.

    theta1 = theta0 + a * d,    d the optimizer's first direction at theta0, a its calibrated size

The prompts are divided into folds (`folds`). A step's loss is the mean over one fold; all other
folds are *held out* for it and show what spills over. All folds have one size.

For `adamw` d is AdamW's bias-corrected first update, -g/(|g| + eps), so that the step size a is its
learning rate; for `sgd` d is -g/|g|, so that a is the update's norm. With step size `auto`, a is
the largest size tried at which the folds' mean losses together fall by at least 80 % of the
first-order prediction -a*<g, d>. (`sampled` is a linear surrogate whose own value bounds no step:
its size is calibrated on the reverse KL that it estimates.)

Axes: N positions of the bank, n of a batch, H hidden size.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, worked
from diagnostics.core.schema import require_columns
from diagnostics.core.types import Bank
from diagnostics.measure import losses
from diagnostics.models import topk_teacher
from diagnostics.models.pair import Pair
from diagnostics.models.readout import in_step
from diagnostics.models.weights import checksum
from diagnostics.probing import scores
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.directions import Direction, Store
from diagnostics.probing.folds import assign_folds, folds_of
from diagnostics.probing.frozen_bank import BankPart, FrozenBank
from diagnostics.probing.gradient_sums import GradientProduct, GradientSums, GradientTaker
from diagnostics.probing.permuted_teacher import graded_by_others
from diagnostics.probing.spread import is_divided, local, of_weights
from diagnostics.probing.step_state import place_of
from diagnostics.probing.tensor_lists import (
    first_update_in_place,
    row_pieces,
    signs,
    tensor_norm,
)

log = logging.getLogger("diagnostics")
LINEAR_ENOUGH = 0.8
FIRST_TRIAL_DROP = 0.02
"""Share of the loss that the first calibration trial is predicted to remove."""
AIM = 0.85
"""A trial aims at this share of the size where the last trial's parabola meets LINEAR_ENOUGH."""
CLOSE_ENOUGH = 0.86
"""Between this ratio and LINEAR_ENOUGH a calibration ends early."""
CALIBRATION_TRIALS = 4
"""On all folds together each costs a forward pass over the bank."""
RESCUE_TRIALS = 3
"""Further trials where none of the planned ones was linear."""
FORWARD_AND_BACK = 3
"""Work of a forward and a backward pass, in forward passes, by which progress is counted."""
CALIBRATION_LOSS = {"sampled": "reverse_kl"}


@dataclass(frozen=True)
class StepPositions:
    """The positions of a bank, and the fold of each."""

    tokens: pd.DataFrame
    """Token table, one row per position."""
    folds: np.ndarray
    """Fold of each position, int32 [N]."""

    @property
    def count(self) -> int:
        """Number of folds."""
        return int(self.folds.max()) + 1

    def weights(self, fold: int) -> np.ndarray:
        """1.0 where a position carries loss in the step on a fold, else 0.0; float64 [N]."""
        return loss_weights(self.tokens, self.folds == fold)


@dataclass(frozen=True)
class PreparedStep:
    """A calibrated step that has not been taken yet; the student stands at theta0."""

    bench: StepBench
    fold: int
    """The fold whose positions carry the loss."""
    weights_N: np.ndarray
    """1.0 where a position carries loss, else 0.0."""
    direction: Direction
    """The optimizer's first direction for the mean loss over these positions."""
    calibration: pd.DataFrame
    """The sizes that were tried (see `calibrate`), with the column fold."""

    @property
    def chosen(self) -> pd.Series:
        """The row of the calibration whose size is taken."""
        return self.calibration[self.calibration["chosen"]].iloc[0]

    @property
    def step_size(self) -> float:
        """Learning rate (adamw) or update norm (sgd) of the step."""
        return float(self.chosen.step_size)


def prepare_step(
    pair: Pair,
    bank: Bank,
    tokens: pd.DataFrame | None,
    config: ProbeConfig,
    *,
    batch_tokens: int | None = None,
    keep_folds: bool = True,
    store: Store | None = None,
) -> PreparedStep:
    """Set up the step on all positions of fold 0: gradient, direction and size.

    Args:
        pair: Student (float32 or float64) and teacher.
        bank: The frozen contexts.
        tokens: The bank's token table; None scores the bank first.
        config: The step.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        keep_folds: Whether the table's own column `fold` (or the `split` of a single step) is used
            where it has one.
        store: Where direction and calibration are kept, and taken from after an interruption.

    Returns:
        The bench with the student at theta0, the weights, the direction and the calibration.

    Raises:
        DiagnosticsError: The table is of another bank, there are fewer prompts than folds, the
            student's precision is too low for a small step, or loss or gradient is not finite.
    """
    positions = step_positions(
        pair, bank, tokens, config, batch_tokens=batch_tokens, keep_folds=keep_folds
    )
    bench = bench_for(pair, bank, positions, config, batch_tokens=batch_tokens)
    return kept_step(bench, 0, config, store or Store(None))


def bench_for(
    pair: Pair,
    bank: Bank,
    positions: StepPositions,
    config: ProbeConfig,
    *,
    batch_tokens: int | None,
) -> StepBench:
    """The bench on which the steps of a configuration are taken."""
    return StepBench(
        pair,
        bank,
        positions.tokens,
        positions.folds,
        batch_tokens=batch_tokens,
        gradient_precision=config.gradient_precision,
    )


def step_positions(
    pair: Pair,
    bank: Bank,
    tokens: pd.DataFrame | None,
    config: ProbeConfig,
    *,
    batch_tokens: int | None = None,
    keep_folds: bool = True,
) -> StepPositions:
    """The first part of `prepare_step`, which runs no model where there is a token table."""
    if tokens is None:
        tokens = scores.score(pair, bank, batch_tokens=batch_tokens)
    require_same_bank(pair.graded(bank), tokens)
    folds = folds_of(tokens) if keep_folds else None
    if folds is None:
        folds = assign_folds(tokens, config.folds, seed=config.seed)
    return StepPositions(tokens, folds)


def kept_step(
    bench: StepBench, fold: int, config: ProbeConfig, store: Store, *, size: float | None = None
) -> PreparedStep:
    """The direction of a fold's step and the calibration along it.

    They are those of an interrupted run where the store has them, and are made and kept otherwise.
    Measurements along a direction are named by its hash, so no result along another direction is
    ever reused.

    Args:
        bench: The student at theta0.
        fold: The fold whose positions carry the loss.
        config: The step.
        store: Where direction and calibration of this fold are kept.
        size: The size of the steps where it is known; None takes that of `config`, or calibrates it
            on all folds, whose directions are then made too.

    Returns:
        The step, not taken yet.
    """
    steps = FoldSteps(bench, config, lambda other: store if other == fold else Store(None))
    return steps.prepared(fold, size=size)


class FoldSteps:
    """The steps of all folds at one size, with one direction in hand at a time.

    Args:
        bench: The student at theta0.
        config: The steps.
        store: From a fold to where its direction and calibration are kept. Directions that are
            not kept wait where the bench has its state, until they are forgotten.
    """

    def __init__(self, bench: StepBench, config: ProbeConfig, store: Callable[[int], Store]):
        self.bench, self.config, self.store = bench, config, store
        self._waiting: dict[int, Direction] = {}
        self._made: dict[int, Direction] = {}
        self._tables: dict[int, pd.DataFrame] = {}

    @cached_property
    def size(self) -> float:
        """The size of every step: what was asked for, what an interrupted run chose, or calibrated
        on all folds together.
        """
        if self.config.step_size is not None:
            return self.config.step_size
        folds = range(self.bench.count)
        finished = [found for fold in folds if (found := self.store(fold).finished()) is not None]
        if finished:
            return finished[0].size
        kept = [fold for fold in folds if self.store(fold).holds()]
        tables = [self.store(fold).calibration(self._direction(fold)) for fold in kept]
        chosen = {_chosen(table) for table in tables if table is not None}
        return chosen.pop() if len(chosen) == 1 else self._calibrated()

    def _calibrated(self) -> float:
        folds = range(self.bench.count)
        table = calibrate_together(
            self.bench,
            [partial(self._direction, fold) for fold in folds],
            [self.bench.loss_weights(fold) for fold in folds],
            beta=self.config.beta,
        )
        for fold in folds:
            self._keep(fold, table[table["fold"] == fold].reset_index(drop=True))
        return _chosen(table)

    def _keep(self, fold: int, table: pd.DataFrame) -> None:
        self._tables[fold] = table
        self.store(fold).keep_calibration(self._made[fold], table)

    def prepared(self, fold: int, *, size: float | None = None) -> PreparedStep:
        """The step on a fold, not taken yet.

        Args:
            fold: The fold whose positions carry the loss.
            size: A size in place of `self.size`, at which the drop is measured once.
        """
        size = self.size if size is None else size
        direction, weights_N = self._direction(fold), self.bench.loss_weights(fold)
        table = self._tables.get(fold, self.store(fold).calibration(direction))
        if table is None or size != _chosen(table):
            table = calibrate(
                self.bench, direction, weights_N, beta=self.config.beta, step_size=size
            )
            table.insert(0, "fold", fold)
            self.store(fold).keep_calibration(direction, table)
        return PreparedStep(self.bench, fold, weights_N, direction, table)

    def forget(self, fold: int) -> None:
        """Free the memory of a direction along which everything is measured."""
        self._waiting.pop(fold, None)
        self.bench.place.tidy()

    def _direction(self, fold: int) -> Direction:
        """The direction of a fold; made once."""
        place = self.bench.place
        if fold in self._waiting:
            return self._waiting[fold]
        if fold in self._made:
            found = self.store(fold).direction(self.bench.parameters, place)
            if found is None:
                raise DiagnosticsError(
                    f"{self.store(fold).folder} has lost the direction of fold {fold} while it was"
                    " needed. Start the same command again; what is finished stays."
                )
            return found
        weights_N, store = self.bench.loss_weights(fold), self.store(fold)
        direction = kept_direction(self.bench, weights_N, self.config, store)
        self._made[fold] = direction.without_update()
        if not store.holds() or place.has_room(direction.update):
            direction = self._waiting[fold] = direction.waiting(place)
        place.tidy()
        return direction


def _chosen(calibration: pd.DataFrame) -> float:
    """The size that a calibration chose."""
    return float(calibration["step_size"][calibration["chosen"]].iloc[0])


def kept_direction(
    bench: StepBench,
    weights_N: np.ndarray,
    config: ProbeConfig,
    store: Store,
    *,
    graded_by: np.ndarray | None = None,
) -> Direction:
    """A direction, from the store where an interrupted run kept it; otherwise it is made and kept.

    Args:
        bench: The student at theta0.
        weights_N: Float [N], 0 where a position carries no loss.
        config: The step.
        store: Where this direction is kept.
        graded_by: As in `StepBench.gradient`.

    Returns:
        The direction with its hash.
    """
    direction = store.direction(bench.parameters, bench.place)
    if direction is None:
        began = time.monotonic()
        direction = bench.direction(
            weights_N,
            loss=config.loss,
            beta=config.beta,
            optimizer=config.optimizer,
            graded_by=graded_by,
        ).named(bench.spread)
        store.keep(direction, seconds=time.monotonic() - began)
    else:
        log.info("%s: continuing along the direction of an interrupted run", store.folder)
    return direction


class StepBench:
    """A frozen bank and a student that can be moved along a direction and put back.

    Measurements run on the batches on which the bank was scored. Losses and gradients run on the
    same batches without the contexts that carry no weight: those of other folds, and those in which
    a measurement is NaN.

    Args:
        pair: Student (float32 or float64) and teacher.
        bank: The frozen contexts, N response positions in all.
        tokens: The bank's token table, one row per position in bank order.
        folds: Fold of each position, int [N].
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        gradient_precision: As in `ProbeConfig`.

    Raises:
        DiagnosticsError: The student's precision is too low for a small step, or the pair cannot
            score the bank.
    """

    def __init__(
        self,
        pair: Pair,
        bank: Bank,
        tokens: pd.DataFrame,
        folds: np.ndarray,
        *,
        batch_tokens: int | None = None,
        gradient_precision: str = ProbeConfig.gradient_precision,
    ):
        self.pair, self.tokens, self.folds = pair, tokens, folds
        self.gradient_precision = gradient_precision
        self.count = int(folds.max()) + 1
        self.teacher = scores.teacher_of(pair)
        self.own_weights: list[Tensor] = [
            p for p in pair.student.model.parameters() if p.is_floating_point()
        ]
        self.spread = of_weights(self.own_weights)
        # of a sharded student, what this process holds of each weight
        self.parameters: list[Tensor] = [
            local(p).detach() if is_divided(p) else p for p in self.own_weights
        ]
        _require_precision(self.parameters)
        self.place = place_of(pair.step_state, self.parameters)
        self.frozen = FrozenBank(
            pair,
            bank,
            batch_tokens=batch_tokens,
            on_host=not self.place.beside,
        )
        self.release_teacher()
        self.bank = self.frozen.bank
        # halved where a gradient runs out of memory, while measurements keep their batches
        self._part = self.frozen.whole.copy()
        # a gradient takes more memory, but runs on one fold's contexts, a share of a batch
        self._limit = scores.chosen_batch_tokens(pair, batch_tokens, use="gradient")
        self._part.keep_to(self.count * self._limit)
        self.origin_sha256 = scores.student_sha256(pair)
        self._checksums = [checksum(p) for p in self.parameters]
        self.weight_norm = self.norm(self.parameters)
        self._origin: list[Tensor] | None = None
        self._copy: list[Tensor] | None = None
        self._before: dict[bool, tuple[np.ndarray, ...]] = {}

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Euclidean norm of a list of tensors, one per parameter, over all processes' parts."""
        return tensor_norm(tensors, self.spread)

    def release_teacher(self) -> None:
        """Free the memory of the teacher's layers where memory may be short, once its states are
        known. Whatever needs them later loads them again.
        """
        if not self.place.beside or self.pair.student.device.type == "cpu":
            self.pair.release_teacher()
        self.place.tidy()

    @property
    def origin(self) -> list[Tensor]:
        """theta0, one tensor per parameter: the parameters themselves while nothing is moved."""
        return self.parameters if self._origin is None else self._origin

    def loss_weights(self, fold: int) -> np.ndarray:
        """1.0 at the positions that carry loss in the step on a fold, else 0.0; float64 [N]."""
        return loss_weights(self.tokens, self.folds == fold)

    def weighted(self, weights_N: np.ndarray) -> Iterator[tuple[scores.Batch, Tensor]]:
        """This process's batches without the contexts in which no position has a weight.

        Args:
            weights_N: Float [N] over the whole bank.

        Yields:
            A batch with n positions, and the teacher's states [n, H] for it.
        """
        return self._part.contexts_of(weights_N != 0)

    def weighted_in_few_passes(
        self, weights_N: np.ndarray
    ) -> Iterator[tuple[scores.Batch, Tensor]]:
        """As `weighted`, with the contexts of many batches joined into few."""
        return iter(self.frozen.whole.joined(weights_N != 0, self.frozen.batch_tokens))

    def mean_loss(self, weights_N: np.ndarray, *, loss: str, beta: float) -> float:
        """Weighted mean of the loss with the student as it is now.

        The denominator is the sum of all weights, so neither value nor gradient depends on the
        size or the number of batches. The advantage of `sampled` is held at theta0's.

        Args:
            weights_N: Float [N], 0 where a position carries no loss; positions of any fold.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.

        Returns:
            The mean in nats.
        """
        return self._mean_loss(self._part, weights_N, loss=loss, beta=beta)

    def _mean_loss(
        self,
        part: BankPart,
        weights_N: np.ndarray,
        *,
        after: Callable[[int], None] | None = None,
        **options: Any,
    ) -> float:
        """The weighted mean of the loss; with `after` also a backward pass of every batch, after
        which `after` is called with the batch's first row.
        """
        backward, parts_N = after is not None, np.zeros(len(self.tokens))
        with torch.set_grad_enabled(backward):
            todo = part.contexts_of(weights_N != 0), part.count_of(weights_N != 0)
            for batch, teacher_nH in in_step(*todo, [self.pair.student]):
                student_nH = self.states(batch) if backward else batch.states(self.pair.student)
                value = self.batch_loss(batch, student_nH, teacher_nH, weights_N, **options)
                parts_N[int(batch.rows_n[0])] = float(value.detach())
                if after is not None:
                    value.backward()
                    after(int(batch.rows_n[0]))
                worked(len(batch.rows_n) * (FORWARD_AND_BACK if backward else 1))
        # rounded once, so that neither the order of the batches nor their process matters
        return math.fsum(distributed.sum_over_processes(parts_N))

    def states(self, batch: scores.Batch) -> Tensor:
        """The student's states [n, H] for a gradient, in the precision that gradients have."""
        kind = self.pair.student.device.type
        narrow = self.gradient_precision == "bfloat16"
        with torch.autocast(kind, dtype=torch.bfloat16) if narrow else nullcontext():
            return batch.states(self.pair.student)

    def batch_loss(
        self,
        batch: scores.Batch,
        student_nH: Tensor,
        teacher_nH: Tensor,
        weights_N: np.ndarray,
        *,
        loss: str,
        beta: float,
        own_teacher: bool = True,
    ) -> Tensor:
        """One batch's part of the weighted mean loss over all positions.

        Args:
            batch: The batch, n positions.
            student_nH: The student's states [n, H].
            teacher_nH: The teacher's states [n, H].
            weights_N: Float [N] over the whole bank, 0 where a position carries no loss.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.
            own_teacher: Whether the states are those of the positions' own teacher: `sampled` then
                takes theta0's advantage from the token table. Otherwise it is that of the given
                states and the present student.

        Returns:
            A scalar in nats, whose graph reaches `student_nH` and the output head.
        """
        rows = batch.rows_n.numpy()
        advantage_n = (
            torch.from_numpy(self.tokens["advantage"].to_numpy()[rows]) if own_teacher else None
        )
        return losses.chunked_loss(
            student_nH,
            self.pair.student.logits,
            teacher_nH,
            self.teacher.logits,
            batch.sampled_n,
            loss=loss,
            beta=beta,
            weights_N=torch.from_numpy(weights_N[rows]),
            denominator=float(weights_N.sum()),
            advantage_N=advantage_n,
        )

    def gradient(
        self,
        weights_N: np.ndarray,
        *,
        loss: str,
        beta: float,
        graded_by: np.ndarray | None = None,
        few_passes: bool = False,
    ) -> tuple[float, list[Tensor]]:
        """Mean loss with the student as it is now, and its gradient.

        Batches are added up in float64: AdamW's first step divides a gradient by its own size,
        which would turn the rounding of another order of summation into a different step. Out of
        memory, every batch is halved and the gradient is started again.

        Args:
            weights_N: Float [N], 0 where a position carries no loss; positions of any fold.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.
            graded_by: Int [N], the row whose teacher grades each position; None leaves every
                position its own. `sampled` then takes the advantage of that teacher.
            few_passes: Whether contexts of several of the bank's batches share a pass, as suits a
                few contexts. How they are divided, and so the last digits, then depends on the
                number of processes.

        Returns:
            The mean in nats, and one tensor per parameter in the parameter's dtype.

        Raises:
            DiagnosticsError: Loss or gradient is not finite, or one context does not fit in memory.
        """
        sums: list[GradientSums] = []

        def begin() -> tuple[GradientTaker, Callable[[int], None]]:
            sums[:] = [GradientSums(self.own_weights, self.place)]
            return sums[0], lambda row: None

        value = self._taken(
            begin, weights_N, graded_by, few_passes=few_passes, loss=loss, beta=beta
        )
        gradient = sums[0].total()
        norm = self.norm(gradient)
        if not np.isfinite(value) or not np.isfinite(norm):
            raise DiagnosticsError(
                f"The {loss} loss is {value} with gradient norm {norm}. Check the models' logits"
                " for NaN or inf, or use float32."
            )
        return value, gradient

    def slope(
        self, weights_N: np.ndarray, direction: Sequence[Tensor], *, loss: str, beta: float
    ) -> tuple[float, float]:
        """Mean loss with the student as it is now, and its change along a direction.

        The gradient is not kept, so this takes no memory per parameter.

        Args:
            weights_N: Float [N], 0 where a position carries no loss.
            direction: One tensor per parameter.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.

        Returns:
            The mean in nats, and its derivative for a step of size 1 along the direction.

        Raises:
            DiagnosticsError: As `gradient`.
        """
        parts_N = np.zeros(len(self.tokens) + distributed.world())
        takers: list[GradientProduct] = []

        def begin() -> tuple[GradientTaker, Callable[[int], None]]:
            parts_N[:] = 0.0
            takers[:] = [GradientProduct(self.own_weights, direction)]
            return takers[0], lambda row: parts_N.__setitem__(row, takers[0].of_batch())

        value = self._taken(begin, weights_N, None, loss=loss, beta=beta)
        # what came with spare passes: this process's part of the layers of other processes' batches
        parts_N[len(self.tokens) + distributed.rank()] = takers[0].of_batch()
        slope = math.fsum(distributed.sum_over_processes(parts_N))
        if not np.isfinite(value) or not np.isfinite(slope):
            raise DiagnosticsError(
                f"The {loss} loss is {value} with slope {slope} along the step. Check the models'"
                " logits for NaN or inf, or use float32."
            )
        return value, slope

    def _taken(
        self,
        begin: Callable[[], tuple[GradientTaker, Callable[[int], None]]],
        weights_N: np.ndarray,
        graded_by: np.ndarray | None,
        *,
        few_passes: bool = False,
        **options: Any,
    ) -> float:
        """The mean loss, while what `begin` makes takes every batch's gradients.

        Out of memory, every batch is halved, and all begins again.
        """
        part, value = self._part, None
        if graded_by is not None:
            part = graded_by_others(self._part, weights_N, graded_by)
        if few_passes:
            part = part.joined(weights_N != 0, self._limit)
        while value is None:
            taker, after = begin()
            # an attempt that ran out of memory leaves gradients behind
            self.pair.student.model.zero_grad(set_to_none=True)
            try:
                with taker.taking():
                    value = self._mean_loss(
                        part, weights_N, after=after, own_teacher=graded_by is None, **options
                    )
            except (torch.OutOfMemoryError, MemoryError) as error:
                if not self.spread.is_whole:
                    raise scores.too_large(max(each.tokens for each in part.batches)) from error
                part.halve(error)
                if few_passes:  # the next step begins with passes that fit
                    self._limit = max(batch.tokens for batch in part.batches)
                    self._part.keep_to(self._limit)
        return value

    def direction(
        self,
        weights_N: np.ndarray,
        *,
        loss: str,
        beta: float,
        optimizer: str,
        graded_by: np.ndarray | None = None,
    ) -> Direction:
        """The optimizer's first direction at theta0, and the loss that calibrates its size.

        Args:
            weights_N: Float [N], 0 where a position carries no loss.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.
            optimizer: `adamw` or `sgd`.
            graded_by: As in `gradient`. Such a direction has the size of another step and is
                calibrated by no loss but its own.

        Returns:
            The direction, without its hash.

        Raises:
            DiagnosticsError: A top-K teacher cannot supply this loss, or loss or gradient is not
                finite.
        """
        advantage_N = self.tokens["advantage"].to_numpy()
        topk_teacher.require_loss(self.teacher, loss, advantage_N, weights_N)
        value, update = self.gradient(weights_N, loss=loss, beta=beta, graded_by=graded_by)
        norm, slope = first_update_in_place(update, optimizer, self.spread)
        calibration_loss = loss if graded_by is not None else CALIBRATION_LOSS.get(loss, loss)
        if calibration_loss != loss:
            value, slope = self.slope(weights_N, update, loss=calibration_loss, beta=beta)
        if self.gradient_precision != "full" and graded_by is None:
            # drops are measured in full, and so is what they drop from
            value = self.mean_loss(weights_N, loss=calibration_loss, beta=beta)
        return Direction(update, calibration_loss, value, norm, slope, self.norm(update))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a copy of theta0 while the block moves the student, and put it back afterwards."""
        assert self._origin is None, "the student is moved already"
        self._origin = self._copy or self.place.copy(self.parameters)
        if not self.place.beside:
            self._copy = self._origin  # takes none of the student's memory, and is made once
        try:
            yield
        finally:
            self.restore()
            self._origin = None

    @contextmanager
    def moved(
        self, direction: list[Tensor], step_size: float, *, placebo_seed: int | None = None
    ) -> Iterator[None]:
        """Hold the student at theta0 + step_size * direction while the block runs.

        Args:
            direction: One tensor per parameter.
            step_size: Factor of the direction; a negative one moves the other way.
            placebo_seed: Where given, every coordinate of the update gets a random sign.
        """
        with self.held():
            firsts = self.spread.firsts
            with torch.no_grad():
                for p, o, d, first in zip(
                    self.parameters, self.origin, direction, firsts, strict=True
                ):
                    _move(p, o, d, step_size, placebo_seed, first)
                    self.place.rest([o, d])
            yield

    @torch.no_grad()
    def restore(self) -> None:
        """Put theta0 back, bit for bit, where the student was moved."""
        if self._origin is not None:
            for p, o in zip(self.parameters, self._origin, strict=True):
                p.copy_(o)
                self.place.rest([o])

    def rescore(
        self,
        description: str,
        *,
        js: bool = False,
        shards: Shards | None = None,
        folds: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """The divergences with the student as it is now, as `FrozenBank.rescore` measures them.

        Args:
            description: What the progress bar says.
            js: Whether the Jensen-Shannon divergence is measured too.
            shards: Where finished batches are kept, and taken from.
            folds: The folds whose contexts are measured; None measures the whole bank.

        Returns:
            Float64 [N] in nats for each divergence; 0 at a position that was not measured.
        """
        wanted_N = None if folds is None else np.isin(self.folds, list(folds))
        return self.frozen.rescore(description, js=js, shards=shards, wanted_N=wanted_N)

    def before(self, *, js: bool = False, shards: Shards | None = None) -> tuple[np.ndarray, ...]:
        """The divergences at theta0, as `rescore` measures them; measured once.

        They are those of the token table where it was scored with this student's weights and in
        these batches, and one batch that is measured again has the table's values in every bit.
        Otherwise a student that does not move would seem to.

        Args:
            js: Whether the Jensen-Shannon divergence is among them.
            shards: Where finished batches are kept, and taken from.

        Returns:
            As `rescore`.
        """
        if js not in self._before:
            found = self._scored(js)
            if found is None:
                found = self.rescore("before", js=js, shards=shards)
            else:
                worked(len(self.tokens))
            self._before[js] = found
        return self._before[js]

    def _scored(self, js: bool) -> tuple[np.ndarray, ...] | None:
        """The divergences of the token table, where they are those of this student and these
        batches.
        """
        names = ["forward_kl", "reverse_kl", *(["js"] if js else [])]
        mine = scores.scored_with(self.origin_sha256, self.frozen.batch_tokens)
        if self.tokens.attrs.get(scores.SCORED) != mine:
            return None
        if not set(names) <= set(self.tokens):
            return None
        table = tuple(self.tokens[name].to_numpy(dtype=np.float64) for name in names)
        rows_N, tried = self._trial(js)
        if all(_same_bits(a[rows_N], b[rows_N]) for a, b in zip(table, tried, strict=True)):
            return table
        log.info("the scores have other bits than this device gives: theta0 is measured again")
        return None

    def _trial(self, js: bool) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Each process's last batch, measured: its rows, bool [N], and the divergences [N]."""
        part, rows_N = self.frozen.whole, np.zeros(len(self.tokens))
        for batch in part.batches[-1:]:
            rows_N[batch.rows_n.numpy()] = 1.0
        found = scores.rescore(
            self.pair,
            part.batches[-1:],
            part.teacher[-1:],
            positions=len(self.tokens),
            description="trial",
            js=js,
        )
        return distributed.sum_over_processes(rows_N) > 0, found

    def require_restored(self) -> None:
        """Raise RuntimeError unless the student's weights have the bits that they began with."""
        changed = [
            name
            for name, p, before in zip(self.names, self.parameters, self._checksums, strict=True)
            if checksum(p) != before
        ]
        if changed:
            raise RuntimeError(
                f"{len(changed)} of the student's {len(self.parameters)} weights are not as before"
                f" the step, {changed[0]} first"
            )

    @property
    def names(self) -> list[str]:
        """The names of `parameters`."""
        return [
            name for name, p in self.pair.student.model.named_parameters() if p.is_floating_point()
        ]


def _same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two float64 arrays agree in every bit, where any NaN equals any other."""
    same = left.view(np.int64) == right.view(np.int64)
    return bool((same | (np.isnan(left) & np.isnan(right))).all())


def _move(
    parameter: Tensor,
    origin: Tensor,
    direction: Tensor,
    size: float,
    placebo_seed: int | None,
    first: int,
) -> None:
    """parameter = origin + size * sign * direction, with no further memory than for some rows.

    first: number of the parameter's first coordinate among those of all parameters.
    """
    for p, o, d in row_pieces(parameter, origin, direction):
        torch.mul(d.to(p.device), size, out=p)
        if placebo_seed is not None:
            p.mul_(signs(placebo_seed, first, p.numel(), p.device).view(p.shape))
        p.add_(o.to(p.device))
        first += p.numel()


def calibrate(
    bench: StepBench,
    direction: Direction,
    weights_N: np.ndarray,
    *,
    beta: float,
    step_size: float | None = None,
) -> pd.DataFrame:
    """Compare the realized with the predicted drop of the mean loss along one direction.

    Args:
        bench: The student at theta0.
        direction: The direction along which the student is moved.
        weights_N: Float [N], 0 where a position carries no loss.
        beta: The teacher's share in the mixture of `jsd`.
        step_size: The only size to try; None searches as `calibrate_together` does.

    Returns:
        The table of `calibrate_together` without the column fold.
    """
    table = calibrate_together(
        bench, [lambda: direction], [weights_N], beta=beta, step_size=step_size
    )
    return table.drop(columns="fold")


def calibrate_together(
    bench: StepBench,
    directions: Sequence[Callable[[], Direction]],
    weights: Sequence[np.ndarray],
    *,
    beta: float,
    step_size: float | None = None,
) -> pd.DataFrame:
    """Find one size for the steps of all folds, from the drops of their mean losses.

    The ratio of a size is that of the realized to the predicted drop, both added up over the folds:
    one fold alone can bend at a size a hundred times smaller or larger than the next. With
    `step_size`, that size alone is tried and chosen. Otherwise up to four sizes are tried: the
    shortfall of the ratio from 1 is modeled as a power of the size, with the exponent taken from
    the last two trials, and each trial aims at a ratio a little above 0.8. Where none of the four
    reaches 0.8, up to three smaller sizes follow. The largest size with a ratio of at least 0.8 is
    chosen; where there is none, the smallest is chosen with a warning.

    Args:
        bench: The student at theta0.
        directions: For each fold a function that returns its direction, so that one at a time is
            held.
        weights: For each fold float [N], 0 where a position carries no loss.
        beta: The teacher's share in the mixture of `jsd`.
        step_size: The only size to try; None searches.

    Returns:
        One row per fold and size, ascending, with columns fold, step_size, relative_norm (norm of
        the update over the norm of the weights), predicted_drop and realised_drop (nats), ratio
        (realized over predicted, of this fold) and chosen.
    """
    size, rows, trials = step_size, [], []
    for trial in range(CALIBRATION_TRIALS + RESCUE_TRIALS if step_size is None else 1):
        if size is None:
            size = _first_size(load() for load in directions)
        tried = [
            {"fold": fold, **_tried(bench, load(), weights_N, size, beta=beta)}
            for fold, (load, weights_N) in enumerate(zip(directions, weights, strict=True))
        ]
        rows += tried
        predicted, realised = (
            sum(row[name] for row in tried) for name in ("predicted_drop", "realised_drop")
        )
        ratio = realised / predicted if predicted else np.nan
        trials.append((size, ratio))
        linear = any(ratio >= LINEAR_ENOUGH for _, ratio in trials)
        if (
            predicted == 0
            or LINEAR_ENOUGH <= ratio <= CLOSE_ENOUGH
            or (linear and trial + 1 >= CALIBRATION_TRIALS)
        ):
            break
        size = _next_size([(size, 1 - ratio) for size, ratio in trials])
    table = pd.DataFrame(rows)
    chosen = table["step_size"] == _chosen_size(trials, step_size is None)
    return table.assign(chosen=chosen).sort_values(["fold", "step_size"], ignore_index=True)


def _first_size(directions: Iterable[Direction]) -> float:
    """The size that is predicted to remove the share FIRST_TRIAL_DROP of the folds' losses.

    One direction at a time is held.
    """
    slope = value = 0.0
    for direction in map(Direction.without_update, directions):
        slope, value = slope + direction.slope, value + direction.value
    return -FIRST_TRIAL_DROP * abs(value) / slope if slope < 0 else 0.0


def _tried(
    bench: StepBench, direction: Direction, weights_N: np.ndarray, size: float, *, beta: float
) -> dict[str, float]:
    """One fold's step of one size: its predicted and its realized drop."""
    with bench.moved(direction.update, size):
        realised = direction.value - bench.mean_loss(
            weights_N, loss=direction.calibration_loss, beta=beta
        )
    predicted = -size * direction.slope
    return {
        "step_size": size,
        "relative_norm": size * direction.norm / bench.weight_norm,
        "predicted_drop": predicted,
        "realised_drop": realised,
        "ratio": realised / predicted if predicted else np.nan,
    }


def _next_size(trials: list[tuple[float, float]]) -> float:
    """The size at which the modeled shortfall is the share AIM of the allowed one.

    trials: pairs of size and shortfall; the model is a power of the size through the last two.
    """
    size, short = trials[-1]
    short = max(short, 1e-3) if np.isfinite(short) else np.inf
    power = 1.0
    if (
        len(trials) > 1
        and min(trials[-2][1], short) > 1e-3
        and np.isfinite(short)
        and np.isfinite(trials[-2][1])
    ):
        power = np.log(trials[-2][1] / short) / np.log(trials[-2][0] / size)
    power = power if 0.05 < power < 4 else 1.0
    return size * float(np.clip((AIM * (1 - LINEAR_ENOUGH) / short) ** (1 / power), 0.1, 8.0))


def _chosen_size(trials: list[tuple[float, float]], automatic: bool) -> float:
    """The largest linear size; the smallest where none is."""
    enough = [size for size, ratio in trials if ratio >= LINEAR_ENOUGH]
    if enough:
        return max(enough)
    ratios = [ratio for _, ratio in trials if not np.isnan(ratio)]
    if automatic and ratios:
        log.warning("no step tried was linear (best ratio %.2f); the smallest is used", max(ratios))
    return min(size for size, _ in trials)


def loss_weights(tokens: pd.DataFrame, mask_N: np.ndarray) -> np.ndarray:
    """Weights of a step on all positions of a mask.

    Args:
        tokens: Token table with forward_kl and reverse_kl, one row per position.
        mask_N: Bool [N], such as the positions of a fold.

    Returns:
        Float [N]: 1.0 at the mask's positions whose context has no NaN measurement, 0.0 otherwise.
    """
    finite = np.isfinite(tokens["forward_kl"].to_numpy()) & np.isfinite(
        tokens["reverse_kl"].to_numpy()
    )
    return (mask_N & finite & ~in_nonfinite_context(tokens)).astype(float)


def in_nonfinite_context(tokens: pd.DataFrame) -> np.ndarray:
    """Mask bool [N] of the positions of contexts in which any measurement is NaN.

    None of them may carry loss: 0 times NaN is NaN in the backward pass through a model.
    """
    return tokens["forward_kl"].isna().groupby(tokens["context_id"]).transform("any").to_numpy()


def require_same_bank(bank: Bank, tokens: pd.DataFrame) -> None:
    """Raise DiagnosticsError unless the table's rows are the bank's positions in order."""
    require_columns(
        tokens,
        ("context_id", "token_id", "forward_kl", "reverse_kl", "advantage"),
        what="A probe's token table",
    )
    if not scores.lists_positions(bank, tokens):
        raise DiagnosticsError(
            f"The token table ({len(tokens)} rows) does not list the bank's {bank.positions}"
            " positions in order. Score this bank again."
        )


def _require_precision(parameters: list[Tensor]) -> None:
    coarse = next(
        (p.dtype for p in parameters if p.dtype not in (torch.float32, torch.float64)), None
    )
    if coarse is not None:
        raise DiagnosticsError(
            f"The student is in {str(coarse).removeprefix('torch.')}, where a step this small"
            " vanishes in rounding. Load it with dtype='float32' (teacher_dtype may stay lower)."
        )
