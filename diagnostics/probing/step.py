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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from diagnostics.measure.divergences import to_float64
from diagnostics.models import topk_teacher
from diagnostics.models.pair import Pair, weights_sha256
from diagnostics.probing import scores
from diagnostics.probing.directions import Direction, Store
from diagnostics.probing.folds import assign_folds, folds_of
from diagnostics.probing.frozen_bank import BankPart, FrozenBank, halve
from diagnostics.probing.permuted_teacher import graded_by_others
from diagnostics.probing.tensor_lists import inner_product, random_signs, same_bits, tensor_norm

log = logging.getLogger("diagnostics")
ADAM_EPS = 1e-8
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
OPTIMIZERS = ("adamw", "sgd")
CALIBRATION_LOSS = {"sampled": "reverse_kl"}


@dataclass(frozen=True)
class ProbeConfig:
    """The step.

    Attributes:
        loss: Loss of the step, one of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`, from 0 to 1; no other loss reads it.
        optimizer: Whose first update is the direction: `adamw` or `sgd`.
        step: `auto` calibrates the size; otherwise a number of at least 0, which is the learning
            rate for `adamw` and the norm of the update for `sgd`.
        folds: Number of folds, at least 2: one step is taken on the prompts of each, and all other
            prompts are held out for it.
        seed: Seed of the folds and of the controls.

    Raises:
        DiagnosticsError: The loss or the optimizer is unknown, or the step is no number of at
            least 0.
    """

    loss: str = field(
        default="reverse_kl", metadata={"help": "OPD loss of the step", "choices": losses.LOSSES}
    )
    beta: float = field(default=0.5, metadata={"help": "teacher's share in the mixture of jsd"})
    optimizer: str = field(
        default="adamw", metadata={"help": "direction of the step", "choices": OPTIMIZERS}
    )
    step: str = field(
        default="auto",
        metadata={"help": "auto, or a number: learning rate (adamw) or update norm (sgd)"},
    )
    folds: int = field(
        default=4,
        metadata={"help": "folds of prompts: one step on each, all others held out for it"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the folds and of the controls"})

    def __post_init__(self):
        requested_step(self.loss, self.optimizer, self.step)

    @property
    def step_size(self) -> float | None:
        """The size that was asked for; None where it is to be calibrated."""
        return requested_step(self.loss, self.optimizer, self.step)


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
    batch_tokens: int = scores.BATCH_TOKENS,
    keep_folds: bool = True,
    store: Store | None = None,
) -> PreparedStep:
    """Set up the step on all positions of fold 0: gradient, direction and size.

    Args:
        pair: Student (float32 or float64) and teacher.
        bank: The frozen contexts.
        tokens: The bank's token table; None scores the bank first.
        config: The step.
        batch_tokens: Tokens in one forward pass, padding included.
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
    bench = StepBench(pair, bank, positions.tokens, positions.folds, batch_tokens=batch_tokens)
    return kept_step(bench, 0, config, store or Store(None))


def step_positions(
    pair: Pair,
    bank: Bank,
    tokens: pd.DataFrame | None,
    config: ProbeConfig,
    *,
    batch_tokens: int = scores.BATCH_TOKENS,
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
        store: From a fold to where its direction and calibration are kept. Directions without a
            folder wait in main memory until they are forgotten.
    """

    def __init__(self, bench: StepBench, config: ProbeConfig, store: Callable[[int], Store]):
        self.bench, self.config, self.store = bench, config, store
        self._waiting: dict[int, Direction] = {}
        self._made: set[int] = set()
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
        self.store(fold).keep_calibration(self._direction(fold), table)

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

    def _direction(self, fold: int) -> Direction:
        """The direction of a fold on the student's devices; made once."""
        if fold in self._waiting:
            return self._waiting[fold].on(self.bench.parameters)
        if fold in self._made:
            found = self.store(fold).direction(self.bench.parameters)
            if found is None:
                raise DiagnosticsError(
                    f"{self.store(fold).folder} has lost the direction of fold {fold} while it was"
                    " needed. Start the same command again; what is finished stays."
                )
            return found
        weights_N, store = self.bench.loss_weights(fold), self.store(fold)
        direction = kept_direction(self.bench, weights_N, self.config, store)
        self._made.add(fold)
        if not store.holds():
            self._waiting[fold] = direction.parked()
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
    direction = store.direction(bench.parameters)
    if direction is None:
        direction = bench.direction(
            weights_N,
            loss=config.loss,
            beta=config.beta,
            optimizer=config.optimizer,
            graded_by=graded_by,
        ).named()
        store.keep(direction)
    else:
        log.info("%s: continuing along the direction of an interrupted run", store.folder)
    return direction


class StepBench:
    """A frozen bank and a student that can be moved along a direction and put back.

    The bank is divided into one part per fold, and one more for the contexts in which a measurement
    is NaN, which carry no loss. Measurements always run on the same batches of these parts; losses
    and gradients run on the same batches without the contexts that carry no weight.

    Args:
        pair: Student (float32 or float64) and teacher.
        bank: The frozen contexts, N response positions in all.
        tokens: The bank's token table, one row per position in bank order.
        folds: Fold of each position, int [N].
        batch_tokens: Tokens in one forward pass, padding included.

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
        batch_tokens: int = scores.BATCH_TOKENS,
    ):
        self.pair, self.tokens, self.folds = pair, tokens, folds
        self.count = int(folds.max()) + 1
        self.teacher = scores.teacher_of(pair)
        self.parameters: list[Tensor] = [
            p for p in pair.student.model.parameters() if p.is_floating_point()
        ]
        _require_precision(self.parameters)
        apart = in_nonfinite_context(tokens)
        masks = [(folds == fold) & ~apart for fold in range(self.count)]
        self.frozen = FrozenBank(pair, bank, batch_tokens=batch_tokens, parts=[*masks, apart])
        self.bank = self.frozen.bank
        # halved where a gradient runs out of memory, while measurements keep their batches
        self._parts = [part.copy() for part in self.frozen.parts]
        self.origin = [p.detach().clone() for p in self.parameters]
        self.origin_sha256 = weights_sha256(pair.student.model)
        self.weight_norm = tensor_norm(self.origin)
        self._sums: list[Tensor | None] = []

    def part(self, fold: int) -> BankPart:
        """This process's batches of the finite contexts of a fold."""
        return self._parts[fold]

    def loss_weights(self, fold: int) -> np.ndarray:
        """1.0 at the positions that carry loss in the step on a fold, else 0.0; float64 [N]."""
        return loss_weights(self.tokens, self.folds == fold)

    def weighted(
        self, weights_N: np.ndarray, *, parts: Sequence[BankPart] | None = None
    ) -> Iterator[tuple[scores.Batch, Tensor]]:
        """This process's batches without the contexts in which no position has a weight.

        Args:
            weights_N: Float [N] over the whole bank.
            parts: Parts of the bank in place of the bench's own.

        Yields:
            A batch with n positions, and the teacher's states [n, H] for it.
        """
        for part in self._parts if parts is None else parts:
            for batch, teacher_nH in part:
                wanted_n = torch.from_numpy(weights_N[batch.rows_n.numpy()] != 0)
                if wanted_n.any():
                    yield batch.with_contexts_of(wanted_n, teacher_nH)

    def mean_loss(
        self, weights_N: np.ndarray, *, loss: str, beta: float, backward: bool = False
    ) -> float:
        """Weighted mean of the loss with the student as it is now.

        The denominator is the sum of all weights, so neither value nor gradient depends on the
        size or the number of batches. The advantage of `sampled` is held at theta0's.

        Args:
            weights_N: Float [N], 0 where a position carries no loss; positions of any fold.
            loss: One of `losses.LOSSES`.
            beta: The teacher's share in the mixture of `jsd`.
            backward: Whether the gradient is collected too (see `gradient`).

        Returns:
            The mean in nats.
        """
        return self._mean_loss(self._parts, weights_N, backward, loss=loss, beta=beta)

    def _mean_loss(
        self, parts: Sequence[BankPart], weights_N: np.ndarray, backward: bool, **options: Any
    ) -> float:
        parts_N = np.zeros(len(self.tokens))
        with torch.set_grad_enabled(backward):
            for batch, teacher_nH in self.weighted(weights_N, parts=parts):
                student_nH = batch.states(self.pair.student)
                part = self.batch_loss(batch, student_nH, teacher_nH, weights_N, **options)
                parts_N[int(batch.rows_n[0])] = float(part.detach())
                if backward:
                    part.backward()
                    self._collect_gradients()
                worked(len(batch.rows_n) * (FORWARD_AND_BACK if backward else 1))
        # rounded once, so that neither the order of the batches nor their process matters
        return math.fsum(distributed.sum_over_processes(parts_N))

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

        Returns:
            The mean in nats, and one tensor per parameter in the parameter's dtype.

        Raises:
            DiagnosticsError: Loss or gradient is not finite, or one context does not fit in memory.
        """
        parts, value = self._parts, None
        if graded_by is not None:
            parts = graded_by_others(self._parts, weights_N, graded_by)
        while value is None:
            self._sums = [None] * len(self.parameters)
            # an attempt that ran out of memory leaves gradients behind
            self.pair.student.model.zero_grad(set_to_none=True)
            try:
                value = self._mean_loss(
                    parts, weights_N, True, loss=loss, beta=beta, own_teacher=graded_by is None
                )
            except (torch.OutOfMemoryError, MemoryError) as error:
                halve(parts, error)
        gradient = self._summed_gradients()
        if not np.isfinite(value) or not np.isfinite(tensor_norm(gradient)):
            raise DiagnosticsError(
                f"The {loss} loss is {value} with gradient norm {tensor_norm(gradient)}. Check the"
                " models' logits for NaN or inf, or use float32."
            )
        return value, gradient

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            total = self._sums[i]
            if total is None:  # the first batch's gradient is kept without a copy
                self._sums[i] = p.grad
            else:
                total = to_float64(total)
                total += p.grad.to(total.device)
                self._sums[i] = total
            p.grad = None

    def _summed_gradients(self) -> list[Tensor]:
        """The gradient over all processes in the parameters' dtype; what was collected is
        forgotten.
        """
        sums = [
            torch.zeros_like(p) if total is None else total
            for p, total in zip(self.parameters, self._sums, strict=True)
        ]
        self._sums = []
        if distributed.world() > 1:
            sums = [to_float64(total) for total in sums]
            distributed.sum_in_place(sums)
        return [total.to(p) for p, total in zip(self.parameters, sums, strict=True)]

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
        value, gradient = self.gradient(weights_N, loss=loss, beta=beta, graded_by=graded_by)
        norm = tensor_norm(gradient)
        update = first_update(gradient, optimizer)
        calibration_loss = loss if graded_by is not None else CALIBRATION_LOSS.get(loss, loss)
        if calibration_loss != loss:
            value, gradient = self.gradient(weights_N, loss=calibration_loss, beta=beta)
        slope = inner_product(gradient, update)
        return Direction(update, calibration_loss, value, norm, slope, tensor_norm(update))

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
        signs = random_signs(direction, placebo_seed)
        try:
            with torch.no_grad():
                for p, o, d, sign in zip(self.parameters, self.origin, direction, signs):
                    torch.mul(d, step_size, out=p)
                    p.mul_(sign).add_(o)
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put theta0 back, bit for bit."""
        for p, o in zip(self.parameters, self.origin, strict=True):
            p.copy_(o)

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
            folds: The folds whose finite contexts are measured; None measures the whole bank.

        Returns:
            Float64 [N] in nats for each divergence; 0 at a position that was not measured.
        """
        return self.frozen.rescore(description, js=js, shards=shards, parts=folds)

    def require_restored(self) -> None:
        """Raise RuntimeError unless every bit of the student's weights is as at the start."""
        changed = [
            name
            for name, p, o in zip(self.names, self.parameters, self.origin, strict=True)
            if not same_bits(p, o)
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


def first_update(gradient: list[Tensor], optimizer: str) -> list[Tensor]:
    """The optimizer's first update from a gradient, for a step of size 1.

    Args:
        gradient: One tensor per parameter.
        optimizer: `adamw` gives -g/(|g| + eps) for each coordinate, `sgd` gives -g/|g|.

    Returns:
        One tensor per parameter.
    """
    if optimizer == "adamw":
        sizes = (g.abs().add_(ADAM_EPS) for g in gradient)
        return [torch.div(g, size, out=size).neg_() for g, size in zip(gradient, sizes)]
    scale = max(tensor_norm(gradient), torch.finfo(torch.float32).tiny)
    return [-g / scale for g in gradient]


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
            size = _first_size([load() for load in directions])
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


def _first_size(directions: Sequence[Direction]) -> float:
    """The size that is predicted to remove the share FIRST_TRIAL_DROP of the folds' losses."""
    slope = sum(direction.slope for direction in directions)
    value = sum(direction.value for direction in directions)
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


def requested_step(loss: str, optimizer: str, step: str | float) -> float | None:
    """The step size that was asked for; None for `auto`.

    Raises:
        DiagnosticsError: The loss or the optimizer is unknown, or the step is no number of at
            least 0.
    """
    if loss not in losses.LOSSES:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(losses.LOSSES)}.")
    if optimizer not in OPTIMIZERS:
        raise DiagnosticsError(
            f"Unknown optimizer {optimizer!r}. Known are {', '.join(OPTIMIZERS)}."
        )
    if step == "auto":
        return None
    try:
        size = float(step)
    except (TypeError, ValueError):
        size = float("nan")
    if not (np.isfinite(size) and size >= 0):
        raise DiagnosticsError(f"The step is 'auto' or a number of at least 0; got {step!r}.")
    return size


def _require_precision(parameters: list[Tensor]) -> None:
    coarse = next(
        (p.dtype for p in parameters if p.dtype not in (torch.float32, torch.float64)), None
    )
    if coarse is not None:
        raise DiagnosticsError(
            f"The student is in {str(coarse).removeprefix('torch.')}, where a step this small"
            " vanishes in rounding. Load it with dtype='float32' (teacher_dtype may stay lower)."
        )
