"""What a step does when only the selected positions carry loss: criteria compared by intervention.

    theta_c = theta0 + a_c * d_c
    reduction_i = D_i(theta0) - D_i(theta_c),   for D in KL(q||p), KL(p||q) and JS, in nats

where d_c is the optimizer's first direction for the mean loss over the positions of cell c.

A *cell* is one criterion at one budget. Scores are normalized over the whole table, as everywhere;
the selection is made among the step positions, and the budget is a share of those. Every cell
starts from the same theta0. With `match="norm"` it moves the weights as far as the calibrated step
on all positions does: a_c = a_full |d_full| / |d_c|. With `match="lr"` the learning rate is the
same instead. (A small selection leaves some weights without gradient; at equal norm AdamW's first
step then moves the others further.)

Three cells are always present: `full`, every step position; `random`, several draws per budget;
`placebo`, the full step with every coordinate under a random sign. A cell is compared with `full`
and with `random` *on its own positions*: how much would those positions have gained if all
positions, or as many random ones, had been supervised? Intervals resample prompts; those that
involve `random` also carry the spread of its draws.

The teacher runs once for all cells; the cells share each batch's student forward pass as far as
memory for their gradients goes. A cell's result is a file named by everything that decides it,
including the bits of the full step's direction, so an interrupted grid continues where it stopped
(`directions`), and a wider grid keeps the finished cells.

Reference: arXiv 2605.26844 compares criteria by training runs; this is the first step of one, with
the norm held.

Axes: N positions, C cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics import criteria as registry
from diagnostics.analysis.config import AnalysisConfig
from diagnostics.analysis.selection import is_baseline
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version
from diagnostics.core.progress import Shards, no_shards
from diagnostics.core.schema import read_parquet
from diagnostics.core.settings import with_settings
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.directions import Store, read_record, write_record
from diagnostics.probing.intervention_cells import Effect, InterventionCell, Interventions
from diagnostics.probing.intervention_table import summarize
from diagnostics.probing.step import (
    PreparedStep,
    ProbeConfig,
    StepBench,
    first_update,
    kept_step,
    loss_weights,
    step_positions,
)
from diagnostics.probing.tensor_lists import tensor_norm

log = logging.getLogger("diagnostics")
MATCHES = ("norm", "lr")
CRITERIA = (
    "entropy",
    "divergence",
    "reverse_divergence",
    "compatibility",
    "teachability",
    "incompatible",
    "tip",
)
BUDGETS = (0.01, 0.05, 0.1, 0.3)
GRADIENT_BYTES = 2**30
"""Memory for the gradients of cells that share one student forward."""


@dataclass(frozen=True)
class InterventionConfig:
    """The grid of cells.

    Attributes:
        criteria: Registered criteria; `full`, `random` and `placebo` are always present.
        budgets: Shares of the step positions, each in (0, 1].
        match: What all cells have in common: the `norm` of the update, or the learning rate (`lr`).
        random_draws: Random selections per budget, at least 1.

    Raises:
        DiagnosticsError: `match` is unknown, or there is no random draw.
    """

    criteria: tuple[str, ...] = field(
        default=CRITERIA, metadata={"help": "criteria; full, random and a placebo are always there"}
    )
    budgets: tuple[float, ...] = field(
        default=BUDGETS, metadata={"help": "shares of the step positions"}
    )
    match: str = field(
        default="norm",
        metadata={
            "help": "what cells have in common: norm of the update, or lr",
            "choices": MATCHES,
        },
    )
    random_draws: int = field(default=5, metadata={"help": "random selections a budget"})

    def __post_init__(self):
        if self.match not in MATCHES:
            raise DiagnosticsError(
                f"Unknown match {self.match!r}. Known are {', '.join(MATCHES)}: cells have the"
                " update's norm or its learning rate in common."
            )
        if self.random_draws < 1:
            raise DiagnosticsError(
                f"random_draws is {self.random_draws}; a comparison with random needs at least 1,"
                " and 5 to see its spread."
            )


@with_settings(probe=ProbeConfig, config=InterventionConfig, analysis=AnalysisConfig)
def intervene(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: InterventionConfig = InterventionConfig(),
    analysis: AnalysisConfig = AnalysisConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int = scores.BATCH_TOKENS,
    cache: str | Path | None = None,
    shards: Callable[[str], Shards] = no_shards,
    **settings: Any,
) -> pd.DataFrame:
    """Take one step per cell from the same student, and tabulate what each changed.

    Only the selected positions of a cell carry loss. This is `interventions` followed by
    `summarize`.

    Args:
        pair: The student, in float32 or float64, and its teacher.
        bank: The frozen contexts, N response positions in all.
        probe: The step; its fields may be given as keywords instead.
        config: The grid of cells; its fields may be given as keywords instead.
        analysis: How intervals are made; its fields may be given as keywords instead.
        tokens: The bank's token table; None scores the bank first. Its column `split` is used
            where it has one; otherwise prompts are split as in `probe`.
        batch_tokens: Tokens in one forward pass, padding included.
        cache: Folder for finished cells; nothing is kept by default.
        shards: Where the step on all positions is kept until the grid is done.
        settings: Fields of `probe`, `config` and `analysis`.

    Returns:
        The table of `summarize`: one row per criterion, budget, group of positions and measure.

    Raises:
        DiagnosticsError: As `interventions` does.
    """
    result = interventions(
        pair,
        bank,
        probe,
        config,
        tokens=tokens,
        batch_tokens=batch_tokens,
        cache=cache,
        shards=shards,
    )
    return summarize(result, draws=analysis.draws, level=analysis.level, seed=probe.seed)


@with_settings(probe=ProbeConfig, config=InterventionConfig)
def interventions(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: InterventionConfig = InterventionConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int = scores.BATCH_TOKENS,
    cache: str | Path | None = None,
    shards: Callable[[str], Shards] = no_shards,
    **settings: Any,
) -> Interventions:
    """Measure every cell of criteria x budgets, with full, random and placebo.

    Args:
        pair: The student, in float32 or float64, and its teacher. The student ends as it began.
        bank: The frozen contexts, N response positions in all.
        probe: The step on all positions, whose size every cell's step is matched to; its fields
            may be given as keywords instead.
        config: The grid of cells; its fields may be given as keywords instead.
        tokens: The bank's token table; None scores the bank first. Its column `split` is used
            where it has one; otherwise prompts are split as in `probe`.
        batch_tokens: Tokens in one forward pass, padding included.
        cache: Folder for finished cells; nothing is kept by default.
        shards: Where the step on all positions is kept until the grid is done.
        settings: Fields of `probe` and `config`.

    Returns:
        The cells with the effect of each (reductions in nats [N, 3]), for `summarize`.

    Raises:
        DiagnosticsError: A name is unknown, a budget lies outside (0, 1], there is no random draw,
            a cell selects no position, or the table is of another bank.
    """
    positions = step_positions(pair, bank, tokens, probe, batch_tokens=batch_tokens)
    # planned before the teacher runs: a grid that cannot be measured is refused at once
    cells = plan(positions.tokens, positions.split, config, seed=probe.seed)
    bench = StepBench(pair, bank, positions.tokens, positions.split, batch_tokens=batch_tokens)
    folder = None if cache is None else Path(cache)
    full = _full_step(bench, cells, probe, config, folder, Store(shards("direction").folder))
    effects = Grid(full, probe, config.match, folder).measure(cells)
    bench.require_restored()
    return Interventions(bench.tokens, bench.split, cells, effects, full.calibration)


def _full_step(
    bench: StepBench,
    cells: Sequence[InterventionCell],
    probe: ProbeConfig,
    config: InterventionConfig,
    cache: Path | None,
    store: Store,
) -> PreparedStep:
    """The step on all positions.

    Where the cache knows it and has every cell that moves along it, the direction's numbers are
    not needed, and no backward pass is made for it.
    """
    weights_N = cells[0].weights_N
    if cache is None:
        return kept_step(bench, weights_N, probe, store)
    record = cache / f"step-{_full_step_name(bench, weights_N, probe)}.json"
    known = read_record(record)
    if known is not None:
        full = PreparedStep(bench, weights_N, *known)
        if not Grid(full, probe, config.match, cache).needs_direction(cells):
            return full
    full = kept_step(bench, weights_N, probe, store)
    write_record(record, full.direction, full.calibration)
    return full


def _full_step_name(bench: StepBench, weights_N: np.ndarray, probe: ProbeConfig) -> str:
    """Name of everything that decides the step on all positions, except the rounding of its
    gradient.
    """
    settings = {name: getattr(probe, name) for name in ("loss", "beta", "optimizer", "step")}
    identity = settings | _identity(bench) | {"code": code_version("probing.intervention")}
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, default=str).encode() + weights_N.tobytes()
    ).hexdigest()[:24]


def _identity(bench: StepBench) -> dict:
    """Hashes of both models and of the bank."""
    ids = json.dumps(
        [
            [context.context_id, context.prompt_ids, context.response_ids, context.teacher_ids]
            for context in bench.bank
        ]
    )
    return {
        "student": bench.origin_sha256,
        "teacher": bench.pair.facts.get("teacher"),
        "bank": hashlib.sha256(ids.encode()).hexdigest(),
    }


def plan(
    tokens: pd.DataFrame, split: np.ndarray, config: InterventionConfig, *, seed: int
) -> list[InterventionCell]:
    """The cells of a grid: full, placebo, then random and each criterion at each budget.

    A position whose measurements are not finite carries no loss, selected or not.

    Args:
        tokens: Token table, one row per position.
        split: `step` or `held_out` for each position [N].
        config: The grid.
        seed: Seed of the random selections; draw number i uses seed + i.

    Returns:
        The cells; the first is `full`.

    Raises:
        DiagnosticsError: A criterion is unknown, a budget lies outside (0, 1], or a cell selects no
            position with finite measurements.
    """
    usable_N = loss_weights(tokens, split)
    budgets = sorted(set(config.budgets))
    cells = [
        InterventionCell("full", 1.0, 0, usable_N),
        InterventionCell("placebo", 1.0, 0, usable_N),
    ]
    named = [("random", draw) for draw in range(config.random_draws)]
    named += [(name, 0) for name in dict.fromkeys(config.criteria) if not is_baseline(name)]
    for name, draw in named:
        score = registry.score_criterion(tokens, name, seed=seed + draw)
        cells += [
            InterventionCell(name, budget, draw, _selected(tokens, split, score, budget, usable_N))
            for budget in budgets
        ]
    empty = next((cell for cell in cells if not cell.weights_N.any()), None)
    if empty is not None:
        raise DiagnosticsError(
            f"{empty.criterion} at budget {empty.budget} selects no step position with finite"
            " measurements. Leave it out, or raise the budget."
        )
    return cells


def _selected(
    tokens: pd.DataFrame, split: np.ndarray, score: np.ndarray, budget: float, usable_N: np.ndarray
) -> np.ndarray:
    on_step = split == "step"
    weights_N = np.zeros(len(tokens))
    weights_N[on_step] = registry.select(tokens[on_step], score[on_step], budget=budget)
    return weights_N * usable_N


@dataclass(frozen=True)
class Grid:
    """The step on all positions as reference, and where finished cells are kept."""

    full: PreparedStep
    probe: ProbeConfig
    match: str
    cache: Path | None

    @property
    def bench(self) -> StepBench:
        """The bench of the step on all positions, which every cell uses."""
        return self.full.bench

    def measure(self, cells: Sequence[InterventionCell]) -> list[Effect]:
        """Measure the effect of each cell. Cells with the same positions are measured once.

        Args:
            cells: Cells of one grid on this bench.

        Returns:
            The effects, in the cells' order.
        """
        keys = [self.key(cell) for cell in cells]
        todo = dict(zip(keys, cells, strict=True))
        found = {key: effect for key in todo if (effect := self._kept(key)) is not None}
        missing = {key: cell for key, cell in todo.items() if key not in found}
        log.info(
            "intervention: %d cells, %d of them distinct, %d already measured",
            len(cells),
            len(todo),
            len(found),
        )
        for key, effect in self._measured(missing):
            if self.cache is not None:
                write_parquet(self.cache / f"{key}.parquet", effect.to_frame())
            found[key] = Effect.from_frame(effect.to_frame())
        return [found[key] for key in keys]

    def key(self, cell: InterventionCell) -> str:
        """Name of everything that decides a cell's effect: positions, step, both models and the
        bank.
        """
        identity = self._identity | {
            "loss": self.probe.loss,
            "beta": self.probe.beta,
            "optimizer": self.probe.optimizer,
            "match": self.match,
            "size": self.full.step_size,
            "direction": self.full.direction.sha256,
            "placebo": self.probe.seed if cell.placebo else None,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        digest.update(np.packbits(cell.weights_N > 0).tobytes())
        return digest.hexdigest()[:24]

    @cached_property
    def _identity(self) -> dict:
        return _identity(self.bench)

    def needs_direction(self, cells: Sequence[InterventionCell]) -> bool:
        """True where a cell that moves along the step on all positions is still to be measured."""
        return any(self._is_full(cell) and self._kept(self.key(cell)) is None for cell in cells)

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

    def _measured(self, missing: dict[str, InterventionCell]) -> Iterator[tuple[str, Effect]]:
        if not missing:
            return
        before = self.bench.rescore("before", js=True)
        todo = list(missing.items())
        room = max(
            1, GRADIENT_BYTES // sum(p.numel() * p.element_size() for p in self.bench.parameters)
        )
        for start in range(0, len(todo), room):
            group = todo[start : start + room]
            partial = [cell.weights_N for _, cell in group if not self._is_full(cell)]
            gradients = iter(
                shared_gradients(self.bench, partial, loss=self.probe.loss, beta=self.probe.beta)
            )
            for number, (key, cell) in enumerate(group, start + 1):
                gradient = None if self._is_full(cell) else next(gradients)
                yield key, self._effect(cell, gradient, before, f"cell {number} of {len(todo)}")

    def _is_full(self, cell: InterventionCell) -> bool:
        """True where the step on all positions is the cell's own, as it is for the placebo before
        its signs.
        """
        return np.array_equal(cell.weights_N, self.full.weights_N)

    def _effect(
        self, cell: InterventionCell, gradient: list[Tensor] | None, before: tuple, description: str
    ) -> Effect:
        if gradient is None:
            full = self.full.direction
            update, norm, gradient_norm = full.update, full.norm, full.gradient_norm
        else:
            update = first_update(gradient, self.probe.optimizer)
            norm, gradient_norm = tensor_norm(update), tensor_norm(gradient)
        size = self._size(norm, gradient_norm)
        seed = self.probe.seed if cell.placebo else None
        with self.bench.moved(update, size, placebo_seed=seed):
            after = self.bench.rescore(description, js=True)
        return Effect(
            size, size * norm, gradient_norm, np.stack(before, axis=1) - np.stack(after, axis=1)
        )

    def _size(self, norm: float, gradient_norm: float) -> float:
        """Step size of a cell. SGD's direction has norm 1, so there an equal learning rate scales
        with the gradient.
        """
        full, size = self.full.direction, self.full.step_size
        if self.match == "norm":
            return size * full.norm / norm if norm else 0.0
        return size * (gradient_norm / full.gradient_norm if self.probe.optimizer == "sgd" else 1.0)


def shared_gradients(
    bench: StepBench, weights: Sequence[np.ndarray], *, loss: str, beta: float
) -> list[list[Tensor]]:
    """Gradients of several weightings of the mean loss, with one student forward pass per batch.

    Out of memory, every weighting gets its own forward passes.

    Args:
        bench: The student at theta0.
        weights: One float [N] per weighting, 0 where a position carries no loss.
        loss: One of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`.

    Returns:
        For each weighting one tensor per parameter.
    """
    try:
        gradients = [[torch.zeros_like(p) for p in bench.parameters] for _ in weights]
        for batch, teacher_nH in bench.step:
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
    student_nH = batch.states(bench.pair.student)
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
