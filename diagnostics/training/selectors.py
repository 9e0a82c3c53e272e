"""Short trainings under the masks of one paper's tables 2, 7 and 10, and their frozen bank after.

    RUN/paper/cells/contexts.parquet             the run's frozen bank
    RUN/paper/cells/untouched.parquet, .json     the half of the prompts that each position is in
    RUN/paper/cells/<cell>.parquet               every frozen position after the training, `seen`
    RUN/paper/cells/<cell>.curve.parquet         metrics of the training, one row per step
    RUN/paper/cells/<cell>.json                  its record, written last: settings, hashes, kept

A *cell* is one training: a mask, a budget and a seed. All cells begin with the same student and
have equal steps and optimizer settings. The machinery is that of `grid`: a cell whose record and
files agree with the settings is finished and is never trained again, so that an interrupted command
continues, and a wider one keeps its cells.

The prompts of the frozen bank are divided once into two halves that are alike (`probing.folds`).
Training s has exactly the prompts of half s mod 2, each of them at least once, so that every frozen
position is new to half of the trainings and known to the other half; `seen` says which. After the
training the whole bank is scored again with its student (`scores.score_after`).

What a mask kept of the training's own rollouts comes from the log of the training: the share of all
positions, the share of the kept ones in Q3 (by the medians of their batch), and their mean D^L, D^I
and C (scaled within their batch), over all steps together.

Departures from the paper (arXiv 2605.26844): an exact budget, where the released code adds a
position to every sample that would keep none (`per_context_minimum` keeps one within the budget);
the full reverse KL in place of its sampled estimate; trainings of tens of steps at the pair's own
rate; and the gains are measured on contexts of the untouched student, half of them on prompts that
the training never had, where the paper's are the training's own rollouts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.paper.cells import KEPT
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet
from diagnostics.core.settings import as_written
from diagnostics.training import grid
from diagnostics.training.grid import TrainingCell

if TYPE_CHECKING:
    from diagnostics.core.types import Bank, Prompt
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
MASKS = (
    "teachability",
    "divergence",
    "incompatible",
    "tip",
    "random",
    "teachability_entropy",
    "entropy",
    "q3_compatibility",
    "q3_compatibility_low",
    "q3",
    "q3_teachability",
    "q3_teachability_low",
    "q3_incompatible",
)
"""The ten masks of table 2, then the three of table 7."""
CURVE = "teachability"
"""The mask of table 10, which is trained at more budgets."""
HALVES = 2
HALVES_SEED = 0
"""Seed of the division of the prompts, the same for every training of a run."""
FEWEST_SEEDS = 2
"""Trainings of a cell: one alone has no spread, and knows one half of the prompts only."""


@dataclass(frozen=True)
@as_written
class SelectorConfig:
    """The short trainings under the paper's masks.

    Attributes:
        train: Whether to train at all.
        masks: Criteria to train with.
        budgets: Shares of positions, for each of the masks.
        curve: Shares of positions of teachability, in addition.
        seeds: Trainings of each mask and budget, with seeds 0, 1, ..., two or more.
        steps: Optimizer steps of each training.
        batch: Responses per step.
        learning_rate: None takes the named pair's rate, or 1e-6.
        per_context_minimum: Number of best positions of each response that are kept first, within
            the budget; 0 keeps the budget's best alone.
        workers: Trainings at the same time, one thread each.

    Raises:
        DiagnosticsError: There are no masks or workers, or fewer than two seeds; a mask is unknown
            or selects nothing; or a budget lies outside (0, 1].
    """

    train: bool = field(default=False, metadata={"help": "train under the masks"})
    masks: tuple[str, ...] = field(default=MASKS, metadata={"help": "masks to train under"})
    budgets: tuple[float, ...] = field(default=(0.03, 0.05), metadata={"help": "budgets of each"})
    curve: tuple[float, ...] = field(
        default=(0.01, 0.03, 0.05, 0.10), metadata={"help": "budgets of teachability besides"}
    )
    seeds: int = field(
        default=2, metadata={"help": "trainings of each mask and budget, seeds 0, 1, …; 2 or more"}
    )
    steps: int = field(default=30, metadata={"help": "optimizer steps of each training"})
    batch: int = field(default=16, metadata={"help": "responses in a step"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "1e-6, or the named pair's where not given"}
    )
    per_context_minimum: int = field(
        default=0, metadata={"help": "positions of each response that are kept first"}
    )
    workers: int = field(
        default=2, metadata={"help": "trainings at the same time, one thread each"}
    )

    def __post_init__(self):
        if not self.masks or self.workers < 1 or self.seeds < FEWEST_SEEDS:
            raise DiagnosticsError(
                f"The trainings need masks, a worker and at least {FEWEST_SEEDS} seeds, since one"
                f" training has no spread; got {len(self.masks)}, {self.workers} and {self.seeds}."
            )
        for name in self.masks:
            if registry.find(name).kind == "all":
                raise DiagnosticsError(
                    f"{name!r} keeps every position, so it is no mask. Leave it out of --masks."
                )
        for budget in (*self.budgets, *self.curve):
            registry.budget_count(1, budget)

    def cells(self) -> list[TrainingCell]:
        """List every training, seed by seed, so that an interrupted run holds whole comparisons."""
        names = dict.fromkeys(registry.find(name).name for name in self.masks)
        budgets = {
            name: sorted({*self.budgets, *(self.curve if name == CURVE else ())}) for name in names
        }
        return [
            TrainingCell(name, budget, seed)
            for seed in range(self.seeds)
            for name in names
            for budget in budgets[name]
        ]


@dataclass(frozen=True)
class SelectorJob(grid.Job):
    """A grid of these trainings. `grid` has what a finished cell must share, beside the pair."""

    run: Path = Path()
    """The run directory, whose contexts and scores the trainings begin with."""

    def begin(self) -> None:
        """Write the bank and the half of each position, once for all trainings."""
        divide(self)

    def train(self, cell: TrainingCell) -> str:
        """Train one cell, score the bank, and write its files."""
        return train_cell(self, cell)


def shared_settings(config: SelectorConfig, bank: Bank, *, k: int, sweep: Sequence[int]) -> dict:
    """Settings that decide the numbers of every cell alike.

    Args:
        config: The trainings.
        bank: The frozen contexts; responses are as long as its longest.
        k: Size of the supports, that of the run's scores.
        sweep: Other sizes K that the bank is scored with.
    """
    return {
        "steps": config.steps,
        "batch": config.batch,
        "learning_rate": config.learning_rate,
        "per_context_minimum": config.per_context_minimum,
        "max_new_tokens": max(len(context.response_ids) for context in bank),
        "k": k,
        "sweep": list(sweep),
        "ties": "raw",
        "scope": "batch",
    }


def divide(job: SelectorJob) -> None:
    """Divide the frozen bank's prompts into halves, and write both into the folder of the cells.

    Args:
        job: Settings of the trainings, and their folder.

    Raises:
        DiagnosticsError: A training has fewer responses than a half has prompts.
    """
    from diagnostics.core.tables import write_parquet
    from diagnostics.core.types import read_bank
    from diagnostics.probing.folds import assign_folds

    bank = read_bank(job.run / "contexts.parquet")
    scores = read_parquet(job.run / "scores.parquet")
    half = assign_folds(scores, HALVES, seed=HALVES_SEED)
    rows = scores[["context_id", "prompt_id", "position"]].assign(half=half)
    _require_every_prompt(job, rows)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_parquet(job.folder / grid.BANK, bank.to_frame())
    grid.finish_cell(job, "untouched", rows)


def _require_every_prompt(job: SelectorJob, rows: pd.DataFrame) -> None:
    largest = int(rows.groupby("half")["prompt_id"].nunique().max())
    drawn = job.grid["steps"] * job.grid["batch"]
    if drawn < largest:
        raise DiagnosticsError(
            f"A training has each of the {largest} prompts of its half at least once, and"
            f" {job.grid['steps']} steps of {job.grid['batch']} responses have {drawn}. Raise"
            f" --steps to {-(-largest // job.grid['batch'])} or more, or --batch."
        )


def half_prompts(bank: Bank, rows: pd.DataFrame, half: int, pair: Pair) -> list[Prompt]:
    """The prompts of one half of the bank, as training reads them.

    Args:
        bank: The frozen contexts.
        rows: Their positions, with context_id and half.
        half: 0 or 1.
        pair: The pair, whose tokenizer has to give the ids that the contexts hold.

    Returns:
        One prompt per name, in bank order.

    Raises:
        DiagnosticsError: The teacher reads prompts of its own, or the tokenizer gives other ids.
    """
    from diagnostics.core.types import Prompt

    chosen = set(rows.loc[rows["half"] == half, "context_id"])
    contexts = {context.prompt_id: context for context in bank if context.context_id in chosen}
    if any(context.teacher_prompt_ids is not None for context in contexts.values()):
        raise DiagnosticsError(
            "The teacher of these contexts reads prompts of its own; training lets both models read"
            " one prompt. Train on contexts without a hint."
        )
    return [
        Prompt(
            context.prompt_id,
            context.prompt,
            rendered=_is_rendered(pair.tokenizer, context.prompt, context.prompt_ids),
        )
        for context in contexts.values()
    ]


def _is_rendered(tokenizer, text: str, ids: Sequence[int]) -> bool:
    """Whether a frozen prompt was encoded as a rendered one: a context keeps its ids only."""
    from diagnostics.contexts.encoding import encode_prompt

    for rendered in (False, True):
        if tuple(encode_prompt(tokenizer, text, rendered=rendered)) == tuple(ids):
            return rendered
    raise DiagnosticsError(
        f"The frozen prompt {text[:60]!r} has other ids than this tokenizer gives it, so that it"
        " would be trained on as another text. Train with the pair that sampled the contexts."
    )


def train_cell(job: SelectorJob, cell: TrainingCell) -> str:
    """Train one cell, score the frozen bank with its student, and write its record last.

    Args:
        job: Settings of the trainings, and their folder.
        cell: The training.

    Returns:
        A line for the log.
    """
    import torch

    from diagnostics.core.tables import write_parquet
    from diagnostics.core.types import read_bank

    began = time.perf_counter()
    bank, rows = read_bank(job.folder / grid.BANK), read_parquet(job.folder / "untouched.parquet")
    pair, half = grid.fresh_pair(job), cell.seed % HALVES
    metrics = _trained(job, cell, pair, half_prompts(bank, rows, half, pair))
    halves = rows.drop_duplicates("context_id").set_index("context_id")["half"]
    after = _after(job, pair, bank)
    after = after.assign(seen=(after["context_id"].map(halves) == half).to_numpy())
    write_parquet(job.folder / f"{cell.name}.curve.parquet", metrics)
    seconds = time.perf_counter() - began
    kept = kept_positions(metrics)
    grid.finish_cell(
        job,
        cell.name,
        after,
        cell=asdict(cell),
        kept={name: value if np.isfinite(value) else None for name, value in kept.items()},
        seconds=round(seconds, 1),
        threads=torch.get_num_threads(),
    )
    return f"{cell.name}: {seconds:.0f} s, kept {kept['kept_share']:.2%} of its positions"


def _trained(job: SelectorJob, cell: TrainingCell, pair: Pair, prompts: list[Prompt]):
    """Train the pair's student in place, and return the log of the training."""
    from diagnostics.training.config import EngineConfig, TrainConfig
    from diagnostics.training.run import train

    names = ("steps", "batch", "learning_rate", "per_context_minimum", "k", "ties", "scope")
    with grid.scratch_folder(job, cell) as scratch:
        result = train(
            pair,
            prompts,
            output_dir=scratch,
            config=TrainConfig(**asdict(cell), **{name: job.grid[name] for name in names}),
            engine=EngineConfig(max_new_tokens=job.grid["max_new_tokens"], save_every=0),
        )
        return result.metrics


def _after(job: SelectorJob, pair: Pair, bank: Bank) -> pd.DataFrame:
    """The frozen positions as the trained student has them."""
    from diagnostics.probing.config.scores import ScoreConfig
    from diagnostics.probing.scores import score_after

    pair.student.model.eval()
    return score_after(pair, bank, ScoreConfig(k=job.grid["k"], sweep=tuple(job.grid["sweep"])))


def kept_positions(metrics: pd.DataFrame) -> dict[str, float]:
    """What a training kept of its own rollouts, over all steps together.

    Args:
        metrics: The log of the training, one row per step, with selected and positions (numbers of
            positions), `q3/selected` and `score_<criterion>/selected`, means over the selected.

    Returns:
        The values of `cells.KEPT`; NaN where no step has the mean.
    """
    from diagnostics.training.step_metrics import SCORED

    selected = metrics["selected"].to_numpy(dtype=float)

    def mean(name: str) -> float:
        values = metrics[name].to_numpy(dtype=float)
        known = np.isfinite(values)
        return float(np.average(values[known], weights=selected[known])) if known.any() else np.nan

    names = ("q3/selected", *(f"score_{name}/selected" for name in SCORED))
    found = [selected.sum() / metrics["positions"].sum(), *map(mean, names)]
    return dict(zip(KEPT, map(float, found), strict=True))


def run_selectors(job: SelectorJob, config: SelectorConfig) -> None:
    """Train every cell that is not finished.

    Args:
        job: Settings of the trainings, and their folder.
        config: The trainings.

    Raises:
        DiagnosticsError: The minimum per response exceeds the smallest budget; and as
            `grid.run_grid`.
    """
    cells = config.cells()
    _require_room_for_minimum(job, min(cell.budget for cell in cells))
    grid.run_grid(job, cells, workers=config.workers)


def _require_room_for_minimum(job: SelectorJob, budget: float) -> None:
    """Refuse a minimum that the smallest budget cannot hold, before anything is trained."""
    scores = read_parquet(job.run / "scores.parquet")
    length = len(scores) / scores["context_id"].nunique()
    minimum = job.grid["per_context_minimum"]
    if minimum > budget * length:
        raise DiagnosticsError(
            f"A minimum of {minimum} positions per response is more than a budget of {budget:g}"
            f" keeps of responses with {length:.0f} positions on average. Raise the budgets"
            " (--budgets, --curve), or use --per-context-minimum 0."
        )
