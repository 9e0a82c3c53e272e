"""What a step does when only the selected positions carry loss: selection criteria compared by
intervention.

    theta_c = theta0 + a_c * d_c,    d_c the optimiser's first direction for the mean loss over the positions of cell c
    reduction_i = D_i(theta0) - D_i(theta_c),   for D in KL(q||p), KL(p||q) and JS, in nats

A *cell* is one criterion at one budget. Scores are normalised over the whole table, as everywhere;
the selection is made among the step positions, and the budget is of those. Every cell starts from
the same theta0, and with `match="norm"` moves the weights as far as the calibrated step on all
positions does: a_c = a_full |d_full| / |d_c|. With `match="lr"` the learning rate is the same
instead. (A small selection leaves some weights without gradient; at equal norm AdamW's first step
then moves the others further.)

Always present: `full`, every step position; `random`, several draws a budget; `placebo`, the full
step with every coordinate under a random sign. A cell is compared with `full` and with `random` *on
its own positions*: what would those positions have gained, had all, or as many random ones, been
supervised? Intervals resample prompts; those that involve `random` also carry the spread of its
draws.

One teacher pass for all cells; the cells share each batch's student forward as far as memory for
their gradients goes. A cell's result is a file named by everything that decides it, the bits of the
full step's direction among that, so an interrupted grid goes on where it was (`directions`), and a
wider grid keeps what it has.

Reference: arXiv 2605.26844 compares criteria by training runs; this is the first step of one, with
the norm held.

Axes: N positions, C cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.selection import is_baseline
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version
from diagnostics.core.progress import Shards, no_shards
from diagnostics.core.schema import read_parquet
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.directions import Direction, Store, read_record, write_record
from diagnostics.probing.one_step import (
    StepBench,
    first_update,
    kept_step,
    loss_weights,
    requested_step,
    require_same_bank,
    split_prompts,
    tensor_norm,
)

log = logging.getLogger("diagnostics")
MEASURES = ("forward_kl", "reverse_kl", "js")
GROUPS = ("selected", "unselected", "step", "held_out")
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
    """The grid of cells."""

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


@dataclass(frozen=True)
class InterventionCell:
    """One selection of step positions, or the placebo."""

    criterion: str
    budget: float
    draw: int
    """Number of the random selection; 0 for everything else."""
    weights_N: np.ndarray
    """1.0 where the position carries loss, else 0.0."""

    @property
    def placebo(self) -> bool:
        """True for the step in a random direction."""
        return self.criterion == "placebo"


@dataclass(frozen=True)
class Effect:
    """What a cell's step did."""

    step_size: float
    update_norm: float
    gradient_norm: float
    """Of the cell's mean loss at theta0, nats."""
    reduction_N3: np.ndarray
    """Divergence before minus after, in the order of MEASURES, nats."""

    def to_frame(self) -> pd.DataFrame:
        """One row a position; the step's three numbers repeat."""
        frame = pd.DataFrame(self.reduction_N3.astype(np.float32), columns=list(MEASURES))
        return frame.assign(
            step_size=self.step_size, update_norm=self.update_norm, gradient_norm=self.gradient_norm
        )

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Effect:
        """Inverse of `to_frame`."""
        facts = [
            float(frame[name].iloc[0]) for name in ("step_size", "update_norm", "gradient_norm")
        ]
        return cls(*facts, frame[list(MEASURES)].to_numpy(dtype=np.float64))


@dataclass
class Interventions:
    """Every cell with its effect, on one table of positions."""

    tokens: pd.DataFrame
    split: np.ndarray
    cells: list[InterventionCell]
    effects: list[Effect]
    calibration: pd.DataFrame
    """Of the step on all positions, as `probe` has it."""

    def by_prompt(self) -> pd.DataFrame:
        """Sums over each prompt's positions, for whoever compares cells later without a model.

        Columns criterion, budget, draw, prompt_id, split, positions (finite ones), then the summed
        reductions forward_kl, reverse_kl, js (nats)."""
        prompts = PromptClusters(self.tokens["prompt_id"].to_numpy(), draws=0)
        place = pd.Series(self.split).groupby(prompts.codes).first().to_numpy()
        frames = []
        for cell, effect in zip(self.cells, self.effects, strict=True):
            finite = np.isfinite(effect.reduction_N3).all(axis=1)
            sums = prompts.sums(np.ones(finite.sum()), *effect.reduction_N3[finite].T, at=finite)
            frame = pd.DataFrame(sums, columns=["positions", *MEASURES]).astype({"positions": int})
            key = {
                "criterion": cell.criterion,
                "budget": cell.budget,
                "draw": cell.draw,
                "prompt_id": prompts.names,
                "split": place,
            }
            frames.append(pd.concat([pd.DataFrame(key), frame], axis=1))
        return pd.concat(frames, ignore_index=True)


def intervene(
    pair: Pair, bank: Bank, *, draws: int = 1000, level: float = 0.95, seed: int = 0, **options
) -> pd.DataFrame:
    """One step a cell from the same student, with loss on the selected positions only, and what it
    changed.

    options: those of `interventions` (criteria, budgets, tokens, loss, optimizer, match, cache, …).
    Returns the table of `summarize`.
    """
    return summarize(
        interventions(pair, bank, seed=seed, **options), draws=draws, level=level, seed=seed
    )


def interventions(
    pair: Pair,
    bank: Bank,
    *,
    criteria: Iterable[str] = CRITERIA,
    budgets: Iterable[float] = BUDGETS,
    tokens: pd.DataFrame | None = None,
    loss: str = "reverse_kl",
    beta: float = 0.5,
    optimizer: str = "adamw",
    step: str | float = "auto",
    match: str = "norm",
    random_draws: int = 5,
    held_out: float = 0.5,
    seed: int = 0,
    batch_tokens: int = scores.BATCH_TOKENS,
    cache: str | Path | None = None,
    shards: Callable[[str], Shards] = no_shards,
) -> Interventions:
    """Measure every cell of criteria x budgets, with full, random and placebo.

    tokens: the bank's table; scored here where None. Its `split` is used where it has one, else
    prompts are split as in `probe`. step: size of the full step, `auto` calibrates it. cache:
    folder for finished cells. shards: where the step on all positions is kept until the grid is
    done. Raises DiagnosticsError for unknown names, a budget outside (0, 1], no random draw, or a
    table of another bank."""
    step_size = requested_step(loss, optimizer, step)
    if match not in MATCHES:
        raise DiagnosticsError(
            f"Unknown match {match!r}. Known are {', '.join(MATCHES)}: cells have the update's norm"
            " or its learning rate in common."
        )
    if random_draws < 1:
        raise DiagnosticsError(
            f"random_draws is {random_draws}; a comparison with random needs at least 1, and 5 to"
            " see its spread."
        )
    tokens = scores.score(pair, bank, batch_tokens=batch_tokens) if tokens is None else tokens
    require_same_bank(bank, tokens)
    split = (
        tokens["split"].to_numpy(dtype=object)
        if "split" in tokens
        else split_prompts(tokens["prompt_id"], held_out=held_out, seed=seed)
    )
    cells = plan(
        tokens, split, criteria=criteria, budgets=budgets, random_draws=random_draws, seed=seed
    )
    bench = StepBench(pair, bank, tokens, split, batch_tokens=batch_tokens)
    settings = {"loss": loss, "beta": beta, "optimizer": optimizer}

    def grid_along(full: Direction, calibration: pd.DataFrame) -> Grid:
        size = float(calibration.loc[calibration["chosen"], "step_size"].iloc[0])
        return Grid(
            bench,
            **settings,
            match=match,
            full=full,
            full_weights_N=cells[0].weights_N,
            full_size=size,
            seed=seed,
            cache=None if cache is None else Path(cache),
        )

    record = (
        None
        if cache is None
        else Path(cache)
        / f"step-{_full_step_name(bench, cells[0].weights_N, step=step, **settings)}.json"
    )
    known = None if record is None else read_record(record)
    if known is None or grid_along(*known).needs_direction(cells):
        known = kept_step(
            bench,
            cells[0].weights_N,
            Store(shards("direction").folder),
            step_size=step_size,
            **settings,
        )
        if record is not None:
            write_record(record, *known)
    grid, calibration = grid_along(*known), known[1]
    effects = grid.measure(cells)
    bench.require_restored()
    return Interventions(tokens, split, cells, effects, calibration)


def _full_step_name(bench: StepBench, weights_N: np.ndarray, **settings) -> str:
    """Name of everything that decides the step on all positions, but for the rounding of its
    gradient.
    """
    identity = settings | _identity(bench) | {"code": code_version("intervention")}
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, default=str).encode() + weights_N.tobytes()
    ).hexdigest()[:24]


def _identity(bench: StepBench) -> dict:
    """Both models and the bank."""
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
    tokens: pd.DataFrame,
    split: np.ndarray,
    *,
    criteria: Iterable[str],
    budgets: Iterable[float],
    random_draws: int,
    seed: int,
) -> list[InterventionCell]:
    """The cells of a grid: full, placebo, then random and each criterion at each budget.

    A position whose measurements are not finite carries no loss, selected or not.
    """
    usable_N = loss_weights(tokens, split)
    budgets = sorted(set(budgets))
    cells = [
        InterventionCell("full", 1.0, 0, usable_N),
        InterventionCell("placebo", 1.0, 0, usable_N),
    ]
    for draw in range(random_draws):
        score = registry.score_criterion(tokens, "random", seed=seed + draw)
        cells += [
            InterventionCell(
                "random", budget, draw, _selected(tokens, split, score, budget, usable_N)
            )
            for budget in budgets
        ]
    for name in dict.fromkeys(criteria):
        if not is_baseline(name):
            score = registry.score_criterion(tokens, name, seed=seed)
            cells += [
                InterventionCell(name, budget, 0, _selected(tokens, split, score, budget, usable_N))
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
    """A bench, the step on all positions as reference, and where finished cells are kept."""

    bench: StepBench
    loss: str
    beta: float
    optimizer: str
    match: str
    full: Direction
    full_weights_N: np.ndarray
    full_size: float
    seed: int
    cache: Path | None

    def measure(self, cells: Sequence[InterventionCell]) -> list[Effect]:
        """The effect of each cell. Cells with the same positions are measured once."""
        keys = [self.key(cell) for cell in cells]
        todo = {key: cell for key, cell in zip(keys, cells, strict=True)}
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
            "loss": self.loss,
            "beta": self.beta,
            "optimizer": self.optimizer,
            "match": self.match,
            "size": self.full_size,
            "direction": self.full.sha256,
            "placebo": self.seed if cell.placebo else None,
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
            gradients = iter(shared_gradients(self.bench, partial, loss=self.loss, beta=self.beta))
            for number, (key, cell) in enumerate(group, start + 1):
                gradient = None if self._is_full(cell) else next(gradients)
                yield key, self._effect(cell, gradient, before, f"cell {number} of {len(todo)}")

    def _is_full(self, cell: InterventionCell) -> bool:
        """True where the step on all positions is the cell's own, as it is for the placebo before
        its signs.
        """
        return np.array_equal(cell.weights_N, self.full_weights_N)

    def _effect(
        self, cell: InterventionCell, gradient: list[Tensor] | None, before: tuple, description: str
    ) -> Effect:
        if gradient is None:
            update, norm, gradient_norm = self.full.update, self.full.norm, self.full.gradient_norm
        else:
            update = first_update(gradient, self.optimizer)
            norm, gradient_norm = tensor_norm(update), tensor_norm(gradient)
        size = self._size(norm, gradient_norm)
        with self.bench.moved(update, size, placebo_seed=self.seed if cell.placebo else None):
            after = self.bench.rescore(description, js=True)
        return Effect(
            size, size * norm, gradient_norm, np.stack(before, axis=1) - np.stack(after, axis=1)
        )

    def _size(self, norm: float, gradient_norm: float) -> float:
        """Step size of a cell. SGD's direction has norm 1, so there an equal learning rate scales
        with the gradient.
        """
        if self.match == "norm":
            return self.full_size * self.full.norm / norm if norm else 0.0
        return self.full_size * (
            gradient_norm / self.full.gradient_norm if self.optimizer == "sgd" else 1.0
        )


def shared_gradients(
    bench: StepBench, weights: Sequence[np.ndarray], *, loss: str, beta: float
) -> list[list[Tensor]]:
    """Gradients of several weightings of the mean loss, with one student forward a batch; out of
    memory, one by one.

    weights: [N] each. Returns one list of tensors, parameter by parameter, for each weighting.
    """
    try:
        gradients = [[torch.zeros_like(p) for p in bench.parameters] for _ in weights]
        for batch, teacher_nH in zip(bench.step_batches, bench.step_teacher, strict=True):
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
    batch,
    teacher_nH: Tensor,
    weights: Sequence[np.ndarray],
    gradients,
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


# --- the table
# --------------------------------------------------------------------------------------


def summarize(
    result: Interventions, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean reductions of each cell by group of positions, with prompt-bootstrap intervals.

    Returns columns criterion, budget, group (selected and unselected step positions, step: both,
    held_out), measure (forward_kl = KL(q||p), reverse_kl = KL(p||q), js), reduction (mean of before
    - after, nats a position; positive is better), low, high; minus_random and minus_full with their
    _low and _high (mean over the same positions of this cell's reduction less that of random,
    averaged over its draws at this budget, or of the full step); spread (standard deviation over
    the draws of random), selected (positions that carried loss), step_size, update_norm,
    gradient_norm, positions, prompts. The rows of `random` average its draws; what cannot be is
    NaN."""
    prompts = PromptClusters(result.tokens["prompt_id"].to_numpy(), draws=draws, seed=seed)
    noise = np.random.default_rng([seed, 2]).standard_normal(draws)
    together: dict[tuple[str, float], list[int]] = {}
    for index, cell in enumerate(result.cells):
        together.setdefault((cell.criterion, cell.budget), []).append(index)
    rows = []
    for (criterion, budget), members in together.items():
        rivals = together.get(("random", budget), []) if criterion != "random" else []
        for group in GROUPS:
            masks = [_group(result, index, group) for index in members]
            if not all(mask.any() for mask in masks):
                continue
            for m, measure in enumerate(MEASURES):
                key = {"criterion": criterion, "budget": budget, "group": group, "measure": measure}
                row = _compared(
                    result, prompts, masks, members, rivals, m, level=level, noise=noise
                )
                rows.append(key | row | _facts(result, members))
    return pd.DataFrame(rows)


def _group(result: Interventions, index: int, group: str) -> np.ndarray:
    """Positions [N] of a group of a cell, as far as they were measured."""
    chosen, on_step = result.cells[index].weights_N > 0, result.split == "step"
    masks = {
        "selected": chosen,
        "unselected": on_step & ~chosen,
        "step": on_step,
        "held_out": ~on_step,
    }
    return masks[group] & np.isfinite(result.effects[index].reduction_N3).all(axis=1)


def _compared(
    result: Interventions,
    prompts: PromptClusters,
    masks: list[np.ndarray],
    members: list[int],
    rivals: list[int],
    m: int,
    *,
    level: float,
    noise: np.ndarray,
) -> dict:
    """Own mean, and paired differences to random and to the full step on the same positions."""
    own = _mean_over_draws(result, prompts, masks, [[index] for index in members], m)
    full = _mean_over_draws(result, prompts, masks, [[0]] * len(masks), m)
    spread = _spread(result, masks, members, m)
    if len(members) > 1:
        own = _noisy(own, spread / len(members) ** 0.5, noise)
    row = _ends("reduction", own, level, prefix="")
    rival = (own - _rival(result, prompts, masks[0], rivals, m, noise)) if rivals else None
    against_full = own - full if result.cells[members[0]].criterion != "full" else None
    row |= _ends("minus_random", rival, level) | _ends("minus_full", against_full, level)
    return row | {"spread": spread, "positions": own.positions, "prompts": own.prompts}


def _rival(
    result: Interventions,
    prompts: PromptClusters,
    mask: np.ndarray,
    rivals: list[int],
    m: int,
    noise: np.ndarray,
) -> Estimate:
    """Mean over random's draws of its reduction on the positions of the mask."""
    estimate = _mean_over_draws(result, prompts, [mask], [rivals], m)
    spread = _spread(result, [mask] * len(rivals), rivals, m)
    return _noisy(estimate, spread / len(rivals) ** 0.5, noise) if len(rivals) > 1 else estimate


def _mean_over_draws(
    result: Interventions,
    prompts: PromptClusters,
    masks: list[np.ndarray],
    effects: list[list[int]],
    m: int,
) -> Estimate:
    """Mean over masks of the mean reduction on each, averaged over the effects that go with it."""
    sums = []
    for mask, indices in zip(masks, effects, strict=True):
        values = np.mean([result.effects[i].reduction_N3[mask, m] for i in indices], axis=0)
        sums.append(prompts.sums(values, np.ones(len(values)), at=mask))

    def mean(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(sums[..., 1::2] > 0, sums[..., 0::2] / sums[..., 1::2], np.nan)
        return ratios.mean(axis=-1, keepdims=True)

    any_of_them = np.logical_or.reduce(masks)
    return replace(
        bootstrap.of_sums(mean, np.hstack(sums), prompts, any_of_them)[0],
        positions=int(masks[0].sum()),
    )


def _spread(result: Interventions, masks: list[np.ndarray], indices: list[int], m: int) -> float:
    means = [
        result.effects[i].reduction_N3[mask, m].mean()
        for mask, i in zip(masks, indices, strict=True)
    ]
    return float(np.std(means, ddof=1)) if len(means) > 1 else np.nan


def _noisy(estimate: Estimate, error: float, noise: np.ndarray) -> Estimate:
    """The estimate with the error that a few random selections bring."""
    return replace(estimate, draws=estimate.draws + error * noise)


def _ends(name: str, estimate: Estimate | None, level: float, *, prefix: str | None = None) -> dict:
    prefix = f"{name}_" if prefix is None else prefix
    low, high = estimate.interval(level) if estimate else (np.nan, np.nan)
    return {
        name: estimate.value if estimate else np.nan,
        f"{prefix}low": low,
        f"{prefix}high": high,
    }


def _facts(result: Interventions, members: list[int]) -> dict:
    """Selected positions and the step, averaged over draws."""
    effects = [result.effects[index] for index in members]
    selected = [int((result.cells[index].weights_N > 0).sum()) for index in members]
    return {"selected": round(float(np.mean(selected)))} | {
        name: float(np.mean([getattr(effect, name) for effect in effects]))
        for name in ("step_size", "update_norm", "gradient_norm")
    }
