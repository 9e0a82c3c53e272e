"""A population of real positions with many step batches, and fresh samples probed from scratch.

Three things are made with the embedded pair, in a folder that is not committed:

*population*: its prompts, their token table, and what one step on each of many step batches did to
every position. A step batch has G/4 prompts that are not in the population, because a probe of G
prompts in four folds takes its steps on G/4. For each batch: one AdamW step of the reverse KL, and
one of the same norm towards a permuted teacher. The gain is always towards the true teacher.

*samples*: G prompts that are drawn anew, with responses, scores, and a probe in four folds. A
second permutation of the teacher stands for a teacher that says nothing about a context. Nothing is
shared between two samples, or with the population, except the models and the size of the step.

*effects*: what STEPS optimizer steps on the selected positions of a step batch did to prompts of
the population, for a few criteria.

Finished batches and samples are files of their own, so an interrupted run continues.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

import diagnostics as dx
from diagnostics.contexts.story_sums import sums
from diagnostics.core.types import Bank, Prompt, read_bank
from diagnostics.models.named_pairs import NAMED_PAIRS
from diagnostics.models.pair import Pair
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.permuted_teacher import graders
from diagnostics.probing.step import StepBench
from diagnostics.probing.trajectory import TrajectoryConfig, planned_trajectory, remeasured

LOSS = "reverse_kl"
FOLDS = 4
KINDS = ("real", "permuted", "permuted_again")
"""The three steps of a fold: towards the teacher, and towards two permutations of it."""
PROMPT_SEED = 1300
SAMPLE_SEED = 7_000_000
NEW_TOKENS = 64
RATE = NAMED_PAIRS["embedded"].learning_rate
"""Size of every step: AdamW's learning rate in the pair's trainings. (A size that is calibrated
anew in each sample varies with its prompts, and no interval of one sample can see that.)"""


def prompts_of(seed: int, count: int) -> list[Prompt]:
    """Prompts of the embedded pair's probe split; other seeds give other prompts."""
    return sums(count, seed=seed, split="probe")


def frozen(pair: Pair, prompts: Sequence[Prompt], *, seed: int) -> tuple[Bank, pd.DataFrame]:
    """Responses to the prompts, and their token table."""
    bank = dx.rollout(pair, prompts, max_new_tokens=NEW_TOKENS, seed=seed)
    return bank, dx.score(pair, bank)


def bench_of(pair: Pair, bank: Bank, tokens: pd.DataFrame) -> StepBench:
    """A bench of one fold, on whose positions steps are taken."""
    return StepBench(pair, bank, tokens, np.zeros(len(tokens), dtype=np.int32))


def gains_of(
    bench: StepBench,
    fold: int,
    target: FrozenBank,
    before: Sequence[np.ndarray],
    *,
    kinds: Sequence[str],
    seed: int,
) -> dict[str, np.ndarray]:
    """Gain of every position of `target` after steps on a fold, by kind: [2, N] float32.

    The first row is the forward KL's (teacher first), the second the reverse KL's, in nats. All
    updates have the norm of the step towards the teacher.
    """
    weights_N, found = bench.loss_weights(fold), {}
    norm = bench.direction(weights_N, loss=LOSS, beta=0.5, optimizer="adamw").norm
    for kind in kinds:
        permutation = KINDS.index(kind)
        graded_by = None
        if permutation:
            graded_by = graders(bench.tokens, weights_N, "global", seed=[seed, permutation])
        direction = bench.direction(
            weights_N, loss=LOSS, beta=0.5, optimizer="adamw", graded_by=graded_by
        )
        with bench.moved(direction.update, RATE * norm / direction.norm):
            after = target.divergences()
        found[kind] = (np.stack(before) - np.stack(after)).astype(np.float32)
    bench.require_restored()
    return found


# --- the population
# ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a population is made of.

    Attributes:
        prompts: Prompts of the population.
        batches: Step batches of each size.
        sizes: Prompts of a step batch.
    """

    prompts: int = 1024
    batches: int = 32
    sizes: tuple[int, ...] = (16, 32)

    @property
    def pool(self) -> list[Prompt]:
        """The prompts of the population, then those of every step batch."""
        return prompts_of(PROMPT_SEED, self.prompts + self.batches * sum(self.sizes))

    def step_batches(self) -> Iterator[tuple[int, int, list[Prompt]]]:
        """Size, number and prompts of every step batch; the sizes take turns."""
        pool = self.pool
        starts = self.prompts + self.batches * np.cumsum([0, *self.sizes])
        for number in range(self.batches):
            for count, start in zip(self.sizes, starts, strict=False):
                first = int(start) + count * number
                yield count, number, pool[first : first + count]


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a folder was made with."""
    kept = json.loads((folder / "recipe.json").read_text())
    return Recipe(kept["prompts"], kept["batches"], tuple(kept["sizes"]))


def make_population(folder: Path, pair: Pair, recipe: Recipe) -> None:
    """Score the population and take both steps of every batch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    target = FrozenBank(pair, _population_bank(folder, pair, recipe))
    before = target.divergences()
    for count, number, mine in recipe.step_batches():
        file = folder / f"batch{count}-{number:03d}.parquet"
        if not file.exists():
            bench = bench_of(pair, *frozen(pair, mine, seed=1))
            save(file, gains_of(bench, 0, target, before, kinds=KINDS[:2], seed=number))
            print(file.name, flush=True)


def _population_bank(folder: Path, pair: Pair, recipe: Recipe) -> Bank:
    contexts, table = (folder / f"population.{what}.parquet" for what in ("contexts", "tokens"))
    if not table.exists():
        bank, tokens = frozen(pair, recipe.pool[: recipe.prompts], seed=0)
        bank.to_frame().to_parquet(contexts)
        tokens.to_parquet(table)
    return read_bank(contexts)


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays [M, N] by name to a file that is whole or absent, one column per row of each."""
    partial = file.with_suffix(".partial")
    columns = {f"{name}.{m}": row for name, rows in arrays.items() for m, row in enumerate(rows)}
    pd.DataFrame(columns).to_parquet(partial)
    partial.replace(file)


# --- samples
# ---------------------------------------------------------------------------------------


def make_samples(folder: Path, pair: Pair, *, prompts: int, samples: Sequence[int]) -> None:
    """Probe fresh samples of `prompts` prompts, four folds each."""
    where = folder / f"probes{prompts}"
    where.mkdir(parents=True, exist_ok=True)
    for number in samples:
        file = where / f"{number:04d}.parquet"
        if not file.exists():
            partial = file.with_suffix(".partial")
            one_sample(pair, prompts=prompts, number=number).to_parquet(partial)
            partial.replace(file)
            print(file, flush=True)


def one_sample(pair: Pair, *, prompts: int, number: int) -> pd.DataFrame:
    """The token table of a probe, and `gain_again_fold<f>`, the gains of a second permutation."""
    seed = SAMPLE_SEED + 1000 * number + prompts
    bank, tokens = frozen(pair, prompts_of(seed, prompts), seed=number)
    result = dx.probe(
        pair, bank, tokens=tokens, loss=LOSS, folds=FOLDS, step=RATE, placebos=0, seed=number
    )
    bench = StepBench(pair, bank, tokens, result.tokens["fold"].to_numpy())
    target = FrozenBank(pair, bank)
    before, again = target.divergences(), {}
    for fold in range(FOLDS):
        found = gains_of(bench, fold, target, before, kinds=KINDS[2:], seed=seed)
        again[f"gain_again_fold{fold}"] = found[KINDS[2]][0]
    return result.tokens.assign(**again)


# --- effects at a horizon
# ---------------------------------------------------------------------------------------

STEPS, BUDGET, K = 20, 0.05, 16
EFFECT_PROMPTS, EFFECT_BATCHES = 512, 20
CELLS = (("full", 0), ("random", 0), ("random", 1), ("teachability", 0), ("divergence", 0))
"""Criterion and number of the draw."""


def make_effects(folder: Path, pair: Pair, *, size: int) -> None:
    """Trajectories of each cell on each step batch of a size, with the drop of every prompt of the
    population's first EFFECT_PROMPTS.
    """
    bank = read_bank(folder / "population.contexts.parquet")
    target = FrozenBank(pair, Bank(tuple(bank)[:EFFECT_PROMPTS]))
    before = target.divergences()
    for count, number, mine in recipe_of(folder).step_batches():
        file = folder / f"effects{count}-{number:03d}.parquet"
        if count == size and number < EFFECT_BATCHES and not file.exists():
            _effects(pair, mine, target, before, seed=number).to_parquet(file)
            print(file.name, flush=True)


def _effects(
    pair: Pair, mine: Sequence[Prompt], target: FrozenBank, before: Sequence, *, seed: int
) -> pd.DataFrame:
    bench = bench_of(pair, *frozen(pair, mine, seed=1))
    parts = []
    for criterion, draw in CELLS:
        trajectory = planned_trajectory(
            bench,
            0,
            TrajectoryConfig(RATE, loss=LOSS),
            _Selection(bench, criterion, seed=[seed, draw]),
            steps=STEPS,
            seed=seed,
        )
        for _ in trajectory.run((STEPS,)):
            after = target.divergences()
        drop = pd.DataFrame(
            {
                "prompt_id": target.prompt_ids,
                "positions": 1,
                "forward_kl": before[0] - after[0],
                "reverse_kl": before[1] - after[1],
            }
        )
        rows = drop.groupby("prompt_id", sort=False).sum().reset_index()
        parts.append(rows.assign(criterion=criterion, draw=draw))
    return pd.concat(parts, ignore_index=True)


@dataclass
class _Selection:
    """Loss weights of a minibatch: its best BUDGET by a criterion, scored when its turn comes."""

    bench: StepBench
    criterion: str
    seed: Sequence[int]

    def __call__(self, rows: np.ndarray, number: int) -> np.ndarray:
        if self.criterion == "full":
            return np.ones(len(rows))
        tokens = self.bench.tokens.iloc[rows]
        if self.criterion != "random":
            tokens = remeasured(self.bench, rows, k=K)
        chosen = dx.select(tokens, self.criterion, budget=BUDGET, seed=[*self.seed, number])
        return np.asarray(chosen, dtype=np.float64)
