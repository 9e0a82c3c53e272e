"""A population of real positions with many step batches, and fresh samples probed from scratch.

Three things are made with the embedded pair, in a folder that is not committed:

*population*: P prompts, their token table, and what one step on each of S step batches did to
every position. A step batch has G/4 prompts that are not in the population, because a probe of G
prompts in four folds takes its steps on G/4. For each batch: one AdamW step of the reverse KL and
two steps of the same norm towards a permuted teacher, each position graded by the teacher of
another position of the batch. The gain is always towards the true teacher.

*samples*: G prompts that are drawn anew, with responses, scores, four folds and a step on each of
them, as a probe would do it. Nothing is shared between two samples, or with the population, except
the models and the size of the step, which is the trainings' learning rate.

*effects*: what k optimizer steps on the selected positions of a step batch did to the population,
summed per prompt, for a few cells.

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
import torch
from torch import Tensor

import diagnostics as dx
from diagnostics.contexts.story_sums import sums
from diagnostics.core.types import Bank, Prompt, read_bank
from diagnostics.models.named_pairs import NAMED_PAIRS
from diagnostics.models.pair import Pair
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.step import StepBench, calibrate, first_update
from diagnostics.probing.tensor_lists import tensor_norm

LOSS = "reverse_kl"
FOLDS = 4
KINDS = ("real", "permuted", "permuted_again")
"""The three steps of each batch: towards the teacher, and towards two permutations of it."""
PROMPT_SEED = 1300
SAMPLE_SEED = 7_000_000
NEW_TOKENS = 64
RATE = NAMED_PAIRS["embedded"].learning_rate
"""Size of every step: AdamW's learning rate in the pair's trainings. (Sizes that are calibrated on
16 or 32 prompts vary by a factor of 100, so a sample's own would say more of its first fold than of
its intervals.)"""


def prompts_of(seed: int, count: int) -> list[Prompt]:
    """Prompts of the embedded pair's probe split; other seeds give other prompts."""
    return sums(count, seed=seed, split="probe")


def frozen(pair: Pair, prompts: Sequence[Prompt], *, seed: int) -> tuple[Bank, pd.DataFrame]:
    """Responses to the prompts, and their token table."""
    bank = dx.rollout(pair, prompts, max_new_tokens=NEW_TOKENS, seed=seed)
    return bank, dx.score(pair, bank)


class StepBatch:
    """Contexts that carry the loss, with one gradient per way in which they are graded."""

    def __init__(self, pair: Pair, bank: Bank, tokens: pd.DataFrame):
        self.pair, self.tokens = pair, tokens
        everywhere = np.full(len(tokens), "step", dtype=object)
        self.bench = StepBench(pair, bank, tokens, everywhere)
        self.weights_N = np.ones(len(tokens))

    def gradient(self, permutation_n: np.ndarray | None = None) -> list[Tensor]:
        """The gradient of the mean loss at theta0.

        Args:
            permutation_n: [n] whose teacher grades each position, in the order of the batches;
                None keeps every position's own.
        """
        part = self.bench.step
        own = part.teacher
        if permutation_n is not None:
            mixed_nH = torch.cat(own)[torch.from_numpy(permutation_n)]
            part.teacher = list(mixed_nH.split([len(states) for states in own]))
        try:
            return self.bench.gradient(self.weights_N, loss=LOSS, beta=0.5)[1]
        finally:
            part.teacher = own

    def updates(self, count: int, *, seed: int) -> Iterator[list[Tensor]]:
        """The first updates of KINDS for a step of size 1, all of the norm of the first of them."""
        first = None
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            permutation_n = derangement(rng, len(self.tokens)) if number else None
            update = first_update(self.gradient(permutation_n), "adamw")
            size = tensor_norm(update)
            first = size if first is None else first
            yield [u * (first / size) for u in update]


def derangement(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random cyclic permutation of n >= 2 places, in which nothing keeps its own place."""
    order = rng.permutation(n)
    target = np.empty(n, dtype=np.int64)
    target[order] = np.roll(order, -1)
    return target


def gains_of(
    batch: StepBatch,
    target: FrozenBank,
    before: tuple,
    *,
    seed: int,
    kinds: Sequence[str] = KINDS,
) -> dict[str, np.ndarray]:
    """Gain of every position of `target` after each of the batch's steps, by kind: [2, N] float32.

    The first row is the forward KL's (teacher first), the second the reverse KL's, in nats.
    """
    found = {}
    for kind, update in zip(kinds, batch.updates(len(kinds), seed=seed), strict=True):
        with batch.bench.moved(update, RATE):
            after = target.divergences()
        found[kind] = (np.stack(before) - np.stack(after)).astype(np.float32)
    batch.bench.require_restored()
    return found


def calibrated_size(pair: Pair, bank: Bank, tokens: pd.DataFrame) -> float:
    """The step size that the probe would choose for these contexts."""
    batch = StepBatch(pair, bank, tokens)
    direction = batch.bench.direction(batch.weights_N, loss=LOSS, beta=0.5, optimizer="adamw")
    table = calibrate(batch.bench, direction, batch.weights_N, beta=0.5)
    return float(table.step_size[table.chosen].iloc[0])


def part_of(
    bank: Bank, tokens: pd.DataFrame, prompt_ids: Sequence[str]
) -> tuple[Bank, pd.DataFrame]:
    """The contexts of some prompts, and their rows of the token table."""
    chosen = set(prompt_ids)
    contexts = tuple(context for context in bank if context.prompt_id in chosen)
    rows = tokens[tokens.prompt_id.isin(chosen)].reset_index(drop=True)
    return Bank(contexts), rows


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

    def step_batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, int, list[Prompt]]]:
        """Size, number and prompts of every step batch; the sizes take turns."""
        starts = self.prompts + self.batches * np.cumsum([0, *self.sizes])
        for number in range(self.batches):
            for count, start in zip(self.sizes, starts, strict=False):
                first = int(start) + count * number
                yield count, number, list(prompts[first : first + count])


def make_population(folder: Path, pair: Pair, recipe: Recipe) -> None:
    """Score the population and take every batch's three steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    wanted = recipe.prompts + recipe.batches * sum(recipe.sizes)
    prompts = prompts_of(PROMPT_SEED, wanted)
    bank, _ = _kept_bank(folder / "population", pair, prompts[: recipe.prompts], seed=0)
    target = FrozenBank(pair, bank)
    before = target.divergences()
    for count, number, mine in recipe.step_batches(prompts):
        file = folder / f"batch{count}-{number:03d}.npz"
        if not file.exists():
            batch = StepBatch(pair, *frozen(pair, mine, seed=1))
            gains = gains_of(batch, target, before, seed=number, kinds=KINDS[:2])
            save(file, gains)
            print(file.name, flush=True)


def _kept_bank(
    stem: Path, pair: Pair, prompts: Sequence[Prompt], *, seed: int
) -> tuple[Bank, pd.DataFrame]:
    contexts, table = stem.with_suffix(".contexts.parquet"), stem.with_suffix(".tokens.parquet")
    if not table.exists():
        bank, tokens = frozen(pair, prompts, seed=seed)
        bank.to_frame().to_parquet(contexts)
        tokens.to_parquet(table)
    return read_bank(contexts), pd.read_parquet(table)


def calibrations(folder: Path, pair: Pair, recipe: Recipe) -> None:
    """The sizes that a probe would choose on the larger step batches, to say how far they vary."""
    pool = prompts_of(PROMPT_SEED, recipe.prompts + recipe.batches * sum(recipe.sizes))
    rows = [
        (number, calibrated_size(pair, *frozen(pair, mine, seed=1)))
        for count, number, mine in recipe.step_batches(pool)
        if count == recipe.sizes[-1]
    ]
    table = pd.DataFrame(rows, columns=["batch", "step_size"])
    table.to_csv(folder / "calibrations.csv", index=False)


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to a file that is whole or absent."""
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(file)


# --- samples
# ---------------------------------------------------------------------------------------


def make_samples(folder: Path, pair: Pair, *, prompts: int, samples: Sequence[int]) -> None:
    """Probe fresh samples of `prompts` prompts, four folds each."""
    where = folder / f"samples{prompts}"
    where.mkdir(parents=True, exist_ok=True)
    for number in samples:
        file = where / f"{number:04d}.npz"
        if not file.exists():
            tokens, gains = one_sample(pair, prompts=prompts, number=number)
            tokens.to_parquet(file.with_suffix(".parquet"))
            save(file, gains)
            print(file, flush=True)


def one_sample(
    pair: Pair, *, prompts: int, number: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One sample: its scored table with `fold`, and its gains by kind, [folds, 2, N]."""
    seed = SAMPLE_SEED + 1000 * number + prompts
    bank, tokens = frozen(pair, prompts_of(seed, prompts), seed=number)
    names = tokens.prompt_id.unique()
    order = np.random.default_rng(seed).permutation(len(names)) % FOLDS
    fold_of = dict(zip(names, order, strict=True))
    tokens = tokens.assign(fold=tokens.prompt_id.map(fold_of).astype(np.int32))
    target = FrozenBank(pair, bank)
    before = target.divergences()
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for fold in range(FOLDS):
        batch = StepBatch(pair, *part_of(bank, tokens, names[order == fold]))
        for kind, gain in gains_of(batch, target, before, seed=seed + fold).items():
            found[kind].append(gain)
    return tokens, {kind: np.stack(gains) for kind, gains in found.items()}


# --- effects at a horizon
# ---------------------------------------------------------------------------------------

STEPS, MINIBATCH, BUDGET, EFFECT_PROMPTS = 20, 16, 0.05, 768
CELLS = (
    ("full", 0),
    ("random", 0),
    ("random", 1),
    ("teachability", 0),
    ("divergence", 0),
    ("entropy", 0),
    ("tip", 0),
    ("compatibility", 0),
)


def make_effects(folder: Path, pair: Pair, *, size: int) -> None:
    """Trajectories of each cell on each step batch of a size, with the drop of every prompt of the
    population's first EFFECT_PROMPTS.
    """
    bank = read_bank(folder / "population.contexts.parquet")
    target = FrozenBank(pair, Bank(tuple(bank)[:EFFECT_PROMPTS]))
    before = target.divergences()
    recipe = recipe_of(folder)
    pool = prompts_of(PROMPT_SEED, recipe.prompts + recipe.batches * sum(recipe.sizes))
    for count, number, mine in recipe.step_batches(pool):
        file = folder / f"effects{count}-{number:03d}.parquet"
        if count == size and not file.exists():
            _effects(pair, mine, target, before, seed=number).to_parquet(file)
            print(file.name, flush=True)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a folder was made with."""
    kept = json.loads((folder / "recipe.json").read_text())
    return Recipe(kept["prompts"], kept["batches"], tuple(kept["sizes"]))


def _effects(
    pair: Pair, mine: Sequence[Prompt], target: FrozenBank, before: tuple, *, seed: int
) -> pd.DataFrame:
    batch = StepBatch(pair, *frozen(pair, mine, seed=1))
    parts = []
    for criterion, draw in CELLS:
        _trajectory(batch, criterion, seed=seed, draw=draw)
        after = target.divergences()
        batch.bench.restore()
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
    batch.bench.require_restored()
    return pd.concat(parts, ignore_index=True)


def _trajectory(batch: StepBatch, criterion: str, *, seed: int, draw: int) -> None:
    """STEPS steps of AdamW on minibatches of the batch's contexts; the student stays moved."""
    bench = batch.bench
    optimizer = torch.optim.AdamW(bench.parameters, lr=RATE, weight_decay=0.0)
    contexts = batch.tokens.context_id.unique()
    rng, left = np.random.default_rng([seed, draw]), []
    for _ in range(STEPS):
        if len(left) < MINIBATCH:
            left = list(rng.permutation(contexts))
        chosen, left = left[:MINIBATCH], left[MINIBATCH:]
        rows_N = batch.tokens.context_id.isin(chosen).to_numpy()
        weights_N = np.zeros(len(batch.tokens))
        weights_N[rows_N] = _selection(
            batch.tokens[rows_N], criterion, seed=int(rng.integers(2**31))
        )
        bench.pair.student.model.zero_grad(set_to_none=True)
        for rows, teacher_nH in bench.step:
            if weights_N[rows.rows_n.numpy()].any():
                states_nH = rows.states(bench.pair.student)
                bench.batch_loss(
                    rows, states_nH, teacher_nH, weights_N, loss=LOSS, beta=0.5
                ).backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters, 1.0)
        optimizer.step()
    bench.pair.student.model.zero_grad(set_to_none=True)


def _selection(tokens: pd.DataFrame, criterion: str, *, seed: int) -> np.ndarray:
    if criterion == "full":
        return np.ones(len(tokens))
    tokens = tokens.reset_index(drop=True)
    score = dx.score_criterion(tokens, criterion, seed=seed)
    return np.asarray(dx.select(tokens, score, budget=BUDGET), dtype=float)
