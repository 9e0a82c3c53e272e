"""Do the probe's conclusions survive real training? A grid of short trainings, their outcomes, and who foresaw them.

A *cell* is one criterion at one budget; each is trained once a seed, with equal steps and optimiser settings, from
the same student, and evaluated on the same held-out prompts with the same random numbers (`evaluation`). `full`
has one cell. With S seeds and G held-out prompts, total T_sg and count N_sg of a measure,

    value = 1/S sum_s v_s,   v_s = sum_g T_sg / sum_g N_sg
    error^2 = E_S + E_G,     E_S = var_s(v_s) / S,   E_G = G/(G - 1) var over prompt draws of the value
    interval = value +- t(f) * error,   f = error^4 / (E_S^2/(S - 1) + E_G^2/(G - 1))

so seeds and prompts are crossed, and f is Welch and Satterthwaite's. (E_S holds some of what prompts and seeds do
together, and E_G the rest: the interval errs to the long side.) Differences between cells are paired: v_s and the
draws are subtracted before any error is taken. With one seed E_S is undefined, and so is the interval.

Gain of a training = untouched - trained for divergences, trained - untouched for accuracies: larger is better.

    C5  TA-OPD at 5 % matches or beats full OPD and the entropy, divergence and TIP baselines.
        Against each rival: supported where the interval of gain(teachability) - gain(rival) reaches no lower than -margin,
        refuted where it lies below, inconclusive otherwise or with fewer than 3 seeds; margin = 10 % of the gain of full
        (0 where full gains nothing). Overall: supported where all are, refuted where one is.

Agreement with offline answers is Kendall's tau over cells (`agreement`); its draws resample prompts and seeds of the
training outcomes and, apart from them, the prompts of the run that gave the offline answer.

Reference: Satterthwaite 1946; Owen 2007 (crossed resampling); the claim is arXiv 2605.26844's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics.analysis import rank_agreement as ranks
from diagnostics import criteria as registry
from diagnostics.analysis.rank_agreement import Answer
from diagnostics.analysis.bootstrap import Prompts
from diagnostics.core.types import DiagnosticsError, read_parquet, require_columns, validate_tokens
from diagnostics.analysis.claims import MINIMUM_SEEDS, RIVALS, TA_BUDGET

log = logging.getLogger("diagnostics")

LOWER_IS_BETTER = ("forward_kl", "reverse_kl", "bank_forward_kl", "bank_reverse_kl")
HIGHER_IS_BETTER = ("accuracy", "accuracy_greedy")
JUDGED = ("reverse_kl", "forward_kl", "accuracy", "accuracy_greedy")
"""Measures that verdicts and agreement are about."""
CLAIMANT = "teachability"
MARGIN = 0.1
"""Share of full's gain by which a criterion may fall short and still match."""


@dataclass(frozen=True)
class ValidateConfig:
    """The grid of trainings. Equal settings for every cell, fixed before any outcome was seen."""

    criteria: tuple[str, ...] = field(
        default=("full", "random", "entropy", "divergence", "tip", "teachability", "incompatible"), metadata={"help": "criteria to train with"})
    budgets: tuple[float, ...] = field(default=(0.05, 0.1, 0.3), metadata={"help": "budgets of each but full"})
    seeds: int = field(default=3, metadata={"help": "trainings of each cell, seeds 0, 1, …"})
    steps: int = field(default=100, metadata={"help": "optimiser steps of each training"})
    batch: int = field(default=16, metadata={"help": "responses in a step"})
    learning_rate: float | None = field(default=None, metadata={"help": "1e-6, or the named pair's where not given"})
    loss: str = field(default="reverse_kl", metadata={"help": "OPD loss: forward_kl, reverse_kl, jsd, sampled or topk_reverse"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    workers: int = field(default=2, metadata={"help": "trainings at the same time, one thread each"})

    def __post_init__(self):
        if self.seeds < 1 or self.workers < 1 or not self.criteria:
            raise DiagnosticsError(f"A grid needs criteria, seeds and workers; got {len(self.criteria)}, {self.seeds} and {self.workers}.")
        for name in self.criteria:
            registry.find(name)
        for budget in self.budgets:
            registry.budget_count(1, budget)


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    criterion: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.criterion}-{_budget_name(self.budget)}-seed{self.seed}"


def _budget_name(budget: float) -> str:
    """Six digits where they say it all, so that no two budgets share a name."""
    short = f"{budget:g}"
    return short if float(short) == budget else repr(budget)


def grid(config: ValidateConfig) -> list[Cell]:
    """Every training, seed by seed, so that an interrupted grid holds whole comparisons."""
    cells = []
    for seed in range(config.seeds):
        for criterion in dict.fromkeys(config.criteria):
            whole = registry.find(criterion).kind == "all"
            cells += [Cell(criterion, budget, seed) for budget in ((1.0,) if whole else dict.fromkeys(config.budgets))]
    return cells


# --- running the grid -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker needs for any cell: names and numbers only."""

    folder: Path
    pair: dict
    """Fields of `PairConfig`."""
    prompts: dict
    """Fields of `PromptConfig`."""
    evaluation: dict
    """Fields of `EvaluationConfig`."""
    grid: dict
    """Fields of `ValidateConfig`."""
    engine: dict = field(default_factory=dict)
    """Fields of `EngineConfig` that are not as they come."""
    sources: dict = field(default_factory=dict)
    """Hashes of the models' files and of the prompts."""
    code: str | None = None
    """Version of the modules that decide a training's numbers."""
    accept_code: bool = False
    """Finished cells of another version are kept."""
    known: dict = field(default_factory=dict)
    """What the run's manifest has as hashes of cells' files."""

    @property
    def identity(self) -> dict:
        """Settings that a finished cell must share; which other cells there are is not among them."""
        from diagnostics.pipeline.run import recorded
        from diagnostics.pipeline.stages import WHERE

        grid = {key: value for key, value in self.grid.items() if key not in ("criteria", "budgets", "seeds", "workers")}
        pair = {key: value for key, value in self.pair.items() if key not in WHERE}
        return json.loads(json.dumps(recorded(pair | self.prompts | self.evaluation | grid, apart=True)))

    @property
    def engine_identity(self) -> dict:
        """Engine options that a finished cell must share; a file counts by its content."""
        trl = {"trl": self.sources.get("trl_sha256", self.engine["trl"])} if self.engine.get("trl") else {}
        return json.loads(json.dumps(self.engine | trl))

    def finished(self, name: str) -> bool:
        """True where the cell is done with these settings and its files are as they were written.

        A cell that is lost, cut or was changed is to be measured again, with a warning. Raises DiagnosticsError where it is
        done with other settings, models or prompts, or by another version of the code.
        """
        try:
            record = self._record(name)
            if record is None:
                return False
            self._require_same(name, record)
            self._require_whole(name, record)
        except _Again as reason:
            log.warning("%s is measured again: %s", self.folder / name, reason)
            return False
        return True

    def _record(self, name: str) -> dict | None:
        path = self.folder / f"{name}.json"
        if not path.exists():
            if (self.folder / f"{name}.parquet").exists():
                raise _Again("its record is lost")
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _Again(f"its record cannot be read ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict) or not isinstance(record.get("files", {}), dict):
            raise _Again("its record has no settings")
        if name != "untouched" and _cell_of(record) != name:
            raise _Again(f"its record is of another cell, {_cell_of(record)}")
        return record

    def _require_same(self, name: str, record: dict) -> None:
        path, engine = self.folder / f"{name}.json", {} if name == "untouched" else self.engine_identity
        compared = [(record["settings"], self.identity, list(self.identity)),
                    (record.get("engine", {}), engine, sorted(record.get("engine", {}).keys() | engine)),
                    (record.get("sources", {}), self.sources, [key for key in record.get("sources", {}) if key != "trl_sha256"])]
        different = [f"{key}: was {was.get(key)!r}, now {now.get(key)!r}" for was, now, keys in compared for key in keys if was.get(key) != now.get(key)]
        if different:
            raise DiagnosticsError(f"{path} was trained with other settings ({'; '.join(different)}). Choose another --output-dir.")
        if self.code is not None and record.get("code", self.code) != self.code:
            if not self.accept_code:
                raise DiagnosticsError(
                    f"{path} was trained by another version of this program (was {record['code']}, now {self.code}). Choose another --output-dir, "
                    "that version, or --accept-code to keep what it measured."
                )
            log.warning("%s: kept, though another version of this program measured it (was %s, now %s)", path, record["code"], self.code)

    def _require_whole(self, name: str, record: dict) -> None:
        for file in self.files(name):
            path = self.folder / file
            if not path.is_file():
                raise _Again(f"{file} is lost")
            digest = _sha256(path)
            was = record.get("files", {}).get(file, digest), self.known.get(file, digest)
            if was != (digest, digest):
                raise _Again(f"{file} is not as it was written (sha256 {digest[:16]}…)")
        if name != "untouched" and record.get("bank", _sha256(self.folder / BANK)) != _sha256(self.folder / BANK):
            raise _Again("it was evaluated on another frozen bank")

    @staticmethod
    def files(name: str) -> tuple[str, str]:
        """The files beside a cell's record."""
        return f"{name}.parquet", BANK if name == "untouched" else f"{name}.curve.parquet"


BANK = "contexts.parquet"


class _Again(Exception):
    """Why a cell that is there cannot be used."""


def _cell_of(record: dict) -> str | None:
    """Name of the cell that a record is of."""
    try:
        return Cell(**record["cell"]).name
    except (KeyError, TypeError, ValueError):
        return None


def _sha256(path: Path) -> str:
    from diagnostics.core.files import sha256_file

    return sha256_file(path)


def run_grid(job: Job, cells: Sequence[Cell], *, workers: int) -> None:
    """Evaluate the untouched student, then train every cell that is not finished. Each leaves its files when it ends."""
    if os.path.islink(job.folder):
        raise DiagnosticsError(f"{job.folder} is a link, and cells are written into the run's own folder alone. Remove the link.")
    remove_scratch(job.folder)
    try:
        if not job.finished("untouched"):
            run_untouched(job)
        missing = [cell for cell in cells if not job.finished(cell.name)]
        log.info("%d of %d trainings to do", len(missing), len(cells))
        if workers == 1 or len(missing) < 2:
            for cell in missing:
                run_cell(job, cell)
        else:
            _held.clear()  # the workers load their own
            _share_out(job, missing, workers)
    finally:
        _held.clear()
    _say_threads(job, cells)


def _say_threads(job: Job, cells: Sequence[Cell]) -> None:
    """Sums come out in another order on another number of threads, so that equal cells differ in their last digits."""
    records = [json.loads((job.folder / f"{cell.name}.json").read_text(encoding="utf-8")) for cell in cells]
    threads = sorted({record["threads"] for record in records if "threads" in record})
    if len(threads) > 1:
        log.warning("cells of this grid were trained on %s threads each: their last digits differ by that", " and ".join(map(str, threads)))


def _share_out(job: Job, missing: Sequence[Cell], workers: int) -> None:
    """Train on several processes, which end with this one; what they had begun goes with them."""
    from diagnostics.training.workers import share_out

    tasks = [(job, cell) for cell in missing]
    try:
        for done, result in enumerate(share_out(_work, tasks, environments(min(workers, len(tasks)), job.pair)), 1):
            log.info("%s (%d of %d)", result, done, len(missing))
    finally:
        remove_scratch(job.folder)


def _work(task: tuple[Job, Cell]) -> str:
    """One cell in a worker, on one thread: models this small lose time to a second one."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("diagnostics").setLevel(logging.WARNING)
    return run_cell(*task)


def environments(workers: int, pair: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each worker's environment adds: a GPU of its own where there are several and no device was named."""
    if any(pair.get(name) not in (None, "auto", "cuda") for name in ("device", "teacher_device")):
        return [{}] * workers
    gpus = visible_gpus()
    if len(gpus) < 2:
        return [{}] * workers
    if workers > len(gpus):
        log.info("%d workers share %d GPUs", workers, len(gpus))
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    return names[:count]


SCRATCH = re.compile(r"\.training-.+-seed\d+")
"""Names of the folders that trainings work in."""


def remove_scratch(folder: Path) -> None:
    """Remove what killed trainings had begun: folders of our own naming, no link and nothing that a link leads to."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        begun = [entry.path for entry in entries if SCRATCH.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    for path in begun:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _scratch(job: Job, cell: Cell) -> Iterator[Path]:
    path = job.folder / f".training-{cell.name}"
    if path.is_symlink():
        raise DiagnosticsError(f"{path} is a link, and this program makes none. Remove it.")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- models, loaded once -----------------------------------------------------------------------------

_held: dict[str, Any] = {}
"""The pair of this process as it was loaded, with its checksum; trainings get copies."""


def _fresh_pair(job: Job):
    """A pair as it was loaded: the student's weights copied, the teacher's shared, and both compared with what they were.

    Where they differ the models are loaded anew, with a warning.
    """
    key = json.dumps([job.pair, job.sources], sort_keys=True)
    if _held.get("key") == key and _checksum(_held["pair"]) != _held["checksum"]:
        log.warning("a training changed the weights that the next one begins with; the models are loaded anew")
        _held.clear()
    if _held.get("key") != key:
        from diagnostics.models.pair import PairConfig
        from diagnostics.pipeline.stages import Models

        _held.clear()
        pair = Models(PairConfig(**job.pair)).pair
        _held.update(key=key, pair=pair, checksum=_checksum(pair))
    return _copy(_held["pair"])


def _copy(pair):
    """The pair with modules, tokenizer and student's weights of its own. The teacher's weights are not trained and stay one."""
    import copy

    teacher = getattr(pair.teacher, "model", None)
    shared = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    return copy.deepcopy(pair, {id(tensor): tensor for tensor in shared})


def _checksum(pair) -> list[int]:
    """One whole number for each model, over all bits of its weights and their order; where the weights lie, and exact."""
    import torch

    sums = []
    for readout in (pair.student, pair.teacher):
        model, total = getattr(readout, "model", None), 0
        for tensor in [] if model is None else [*model.parameters(), *model.buffers()]:
            bits = tensor.detach().contiguous().flatten()
            whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
            for piece in bits.view(whole[bits.element_size()]).split(2**24):  # the sums below take eight bytes a weight
                places = torch.arange(1, len(piece) + 1, device=piece.device)
                total = (31 * total + int((piece.long() * places).sum())) % 2**64
        sums.append(total)
    return sums


def _pair_and_prompts(job: Job, seed: int):
    from diagnostics.pipeline import stages
    from diagnostics.training.evaluation import EvaluationConfig
    from diagnostics.models.pair import PairConfig
    from diagnostics.contexts.prompts import PromptConfig

    models, evaluation = stages.Models(PairConfig(**job.pair)), EvaluationConfig(**job.evaluation)
    models.pair = _fresh_pair(job)
    data, held_out = stages.training_prompts(
        models, PromptConfig(**job.prompts), evaluation, needed=job.grid["steps"] * job.grid["batch"], seed=seed,
        room=job.grid["max_new_tokens"])
    if not held_out:
        raise DiagnosticsError("A validation compares students on held-out prompts, and there are none. Raise --eval-contexts.")
    return models.pair, data, held_out, evaluation


def run_untouched(job: Job) -> None:
    """Freeze the bank and evaluate the untouched student, once for the whole grid."""
    from diagnostics.training.evaluation import FrozenBank, evaluate, find_verifier
    from diagnostics.contexts.rollouts import rollout
    from diagnostics.pipeline.run import write_parquet

    pair, _, held_out, evaluation = _pair_and_prompts(job, 0)
    bank = rollout(pair, held_out, max_new_tokens=job.grid["max_new_tokens"])
    write_parquet(job.folder / BANK, bank.to_frame())
    rows = evaluate(
        pair, held_out, bank=FrozenBank(pair, bank), verify=find_verifier(evaluation.verifier, pair=pair.name, prompts=held_out),
        samples=evaluation.eval_samples, max_new_tokens=job.grid["max_new_tokens"])
    _finish(job, "untouched", rows, facts=pair.facts)


def run_cell(job: Job, cell: Cell) -> str:
    """Train one cell and leave its evaluation, its curve and then its record. Returns what to log."""
    import time

    import torch

    from diagnostics.pipeline.run import write_parquet
    from diagnostics.training.run import EngineConfig, TrainConfig, train
    from diagnostics.core.types import read_bank, read_parquet

    began, grid = time.perf_counter(), job.grid
    pair, data, held_out, evaluation = _pair_and_prompts(job, cell.seed)
    config = TrainConfig(
        criterion=cell.criterion, budget=cell.budget, seed=cell.seed, **{key: grid[key] for key in ("steps", "batch", "learning_rate", "loss")})
    engine = EngineConfig(**job.engine, max_new_tokens=grid["max_new_tokens"], save_every=0, probe_every=grid["steps"])
    untouched = read_parquet(job.folder / "untouched.parquet")
    bank = read_bank(job.folder / BANK)
    with _scratch(job, cell) as scratch:
        result = train(pair, data, output_dir=scratch, config=config, engine=engine, evaluation=evaluation, held_out=held_out,
                       bank=bank, untouched=untouched)
        rows = read_parquet(scratch / "evaluations.parquet").query("step > 0").drop(columns="step")
        gains = read_parquet(scratch / "training_gains.parquet")
    write_parquet(job.folder / f"{cell.name}.curve.parquet", result.metrics)
    seconds = time.perf_counter() - began
    _finish(job, cell.name, pd.concat([rows, _first_gains(gains, bank)], ignore_index=True),
            cell=asdict(cell), seconds=round(seconds, 1), threads=torch.get_num_threads())
    return f"{cell.name}: {seconds:.0f} s"


FIRST_STEP = {"one_step_gain": "gain_step_1", "one_step_reverse_gain": "reverse_gain_step_1", "one_step_relative_gain": "relative_gain_step_1"}
"""Measure -> column of training_gains.parquet."""


def _first_gains(gains: pd.DataFrame, bank) -> pd.DataFrame:
    """Gain of the frozen positions after the first step, as rows of an evaluation."""
    from diagnostics.training.evaluation import by_prompt

    prompt_ids = np.repeat([context.prompt_id for context in bank], [len(context.response_ids) for context in bank])
    return pd.concat([by_prompt(measure, prompt_ids, gains[column]) for measure, column in FIRST_STEP.items()], ignore_index=True)


def _finish(job: Job, name: str, rows: pd.DataFrame, **record) -> None:
    from diagnostics.pipeline.run import write_json, write_parquet

    write_parquet(job.folder / f"{name}.parquet", rows)
    if name != "untouched":
        record |= {"bank": _sha256(job.folder / BANK)} | ({"engine": job.engine_identity} if job.engine else {})
    written = {file: _sha256(job.folder / file) for file in job.files(name)}
    code = {} if job.code is None else {"code": job.code}
    write_json(job.folder / f"{name}.json", record | {"settings": job.identity, "sources": job.sources, **code, "files": written})


def read_outcomes(folder: Path, cells: Iterable[Cell]) -> pd.DataFrame:
    """Evaluations of the untouched student and of the finished cells, one row a training, measure and prompt.

    Columns criterion (`untouched` for the first), budget, seed, measure, prompt_id, total, count.
    """
    from diagnostics.core.types import read_parquet

    frames = [read_parquet(folder / "untouched.parquet").assign(criterion="untouched", budget=0.0, seed=-1)]
    frames += [read_parquet(folder / f"{cell.name}.parquet").assign(**asdict(cell)) for cell in cells if (folder / f"{cell.name}.json").exists()]
    return pd.concat(frames, ignore_index=True)


# --- crossed seeds and prompts ----------------------------------------------------------------------


@dataclass(frozen=True)
class Crossed:
    """A value over seeds and prompts, with what its interval is made of."""

    seeds_S: np.ndarray
    """Value of each seed over all prompts; one entry for a value without seeds."""
    draws_DS: np.ndarray
    """The same in each draw of prompts."""
    prompts: int
    fixed: bool = False
    """True for the untouched student, which has no seeds and no spread over them."""

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.seeds_S.mean())

    def __neg__(self) -> Crossed:
        return Crossed(-self.seeds_S, -self.draws_DS, self.prompts, self.fixed)

    def __sub__(self, other: Crossed) -> Crossed:
        """Paired by seed and by prompt; a fixed value is the same for every seed."""
        if len(self.seeds_S) != len(other.seeds_S) and not (self.fixed or other.fixed):
            raise DiagnosticsError(f"Cells with {len(self.seeds_S)} and {len(other.seeds_S)} seeds cannot be paired. Finish the grid.")
        return Crossed(self.seeds_S - other.seeds_S, self.draws_DS - other.draws_DS, self.prompts, self.fixed and other.fixed)

    @property
    def errors(self) -> tuple[float, float]:
        """E_S and E_G of the module's head."""
        seeds = 0.0 if self.fixed else self.seeds_S.var(ddof=1) / len(self.seeds_S) if len(self.seeds_S) > 1 else np.nan
        means_D = self.draws_DS.mean(axis=1)
        prompts = np.var(means_D[np.isfinite(means_D)], ddof=1) * self.prompts / (self.prompts - 1) if self.prompts > 1 else np.nan
        return float(seeds), float(prompts)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end; NaN with one seed or one prompt."""
        seeds, prompts = self.errors
        error = seeds + prompts
        if not error > 0:
            return (self.value, self.value) if error == 0 else (np.nan, np.nan)
        freedom = error**2 / ((0.0 if self.fixed else seeds**2 / (len(self.seeds_S) - 1)) + prompts**2 / (self.prompts - 1))
        reach = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(error)
        return self.value - reach, self.value + reach

    def resampled(self, seed: int) -> np.ndarray:
        """Draws [D] over prompts and seeds at once; the same seeds are taken for every value of a grid."""
        count = self.draws_DS.shape[1]
        taken_DS = np.random.default_rng([seed, 11]).integers(count, size=(len(self.draws_DS), count))
        return np.take_along_axis(self.draws_DS, taken_DS, axis=1).mean(axis=1)


class Outcomes:
    """The grid's evaluations as crossed values, on shared draws of the held-out prompts."""

    def __init__(self, rows: pd.DataFrame, *, draws: int = 1000, seed: int = 0):
        require_columns(rows, ("criterion", "budget", "seed", "measure", "prompt_id", "total", "count"), what="A table of training outcomes")
        self.draws, self.seed = draws, seed
        self._prompts: dict[tuple, Prompts] = {}
        self.tables = {measure: part for measure, part in rows.groupby("measure", sort=False)}
        cells = rows.loc[rows["criterion"] != "untouched", ["criterion", "budget"]].drop_duplicates()
        self.cells = list(cells.itertuples(index=False, name=None))

    def of(self, measure: str, criterion: str, budget: float) -> Crossed:
        """The measure of one cell. Raises DiagnosticsError where the grid does not hold it."""
        part = self.tables.get(measure, pd.DataFrame(columns=["criterion", "budget"]))
        part = part[(part["criterion"] == criterion) & (part["budget"] == budget)]
        if part.empty:
            raise DiagnosticsError(f"The grid holds no {measure} of {criterion} at {budget:g}. Train that cell first.")
        total_SG, count_SG = (part.pivot(index="seed", columns="prompt_id", values=name).sort_index(axis=1) for name in ("total", "count"))
        prompts = self._shared(tuple(total_SG.columns))
        total_SG, count_SG = total_SG.to_numpy(dtype=np.float64), count_SG.to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws_DS = (prompts.weights @ total_SG.T) / (prompts.weights @ count_SG.T)
            return Crossed(total_SG.sum(1) / count_SG.sum(1), draws_DS, prompts.count, fixed=criterion == "untouched")

    def gain(self, measure: str, criterion: str, budget: float) -> Crossed:
        """Improvement over the untouched student; positive is better. A measure that is a gain already stays."""
        value = self.of(measure, criterion, budget)
        if measure not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
            return value
        change = value - self.of(measure, "untouched", 0.0)
        return -change if measure in LOWER_IS_BETTER else change

    def measures(self, wanted: Iterable[str]) -> list[str]:
        """Those of the wanted measures that the grid holds."""
        return [name for name in wanted if name in self.tables]

    def _shared(self, names: tuple) -> Prompts:
        """Equal prompts have equal draws, whatever the measure."""
        if names not in self._prompts:
            self._prompts[names] = Prompts(np.array(names, dtype=object).astype(str), draws=self.draws, seed=self.seed)
        return self._prompts[names]


# --- tables -----------------------------------------------------------------------------------------


def cells_table(outcomes: Outcomes) -> pd.DataFrame:
    """Mean of each measure of each single training: columns criterion, budget, seed, measure, value."""
    rows = []
    for measure, part in outcomes.tables.items():
        sums = part.groupby(["criterion", "budget", "seed"], sort=False)[["total", "count"]].sum().reset_index()
        rows.append(sums.assign(measure=measure, value=sums["total"] / sums["count"]))
    return pd.concat(rows, ignore_index=True)[["criterion", "budget", "seed", "measure", "value"]]


def outcome_table(outcomes: Outcomes, *, level: float = 0.95) -> pd.DataFrame:
    """Every measure of every cell over seeds and prompts, and what it is paired against.

    Returns columns criterion, budget, measure, mean, low, high; gain (improvement over the untouched student, positive is
    better), gain_low, gain_high; minus_full and minus_random (paired differences of gains; random at the same budget)
    with their _low and _high; seeds, prompts. What cannot be is NaN.
    """
    rows = []
    for measure in outcomes.tables:
        judged = measure in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
        if "untouched" in set(outcomes.tables[measure]["criterion"]):
            start = outcomes.of(measure, "untouched", 0.0)
            key = {"criterion": "untouched", "budget": 0.0, "measure": measure}
            rows.append(key | _ends("mean", start, level) | {"seeds": 0, "prompts": start.prompts})
        for criterion, budget in outcomes.cells:
            value = outcomes.of(measure, criterion, budget)
            row = {"criterion": criterion, "budget": budget, "measure": measure} | _ends("mean", value, level)
            if judged or measure.startswith("one_step"):
                gain = outcomes.gain(measure, criterion, budget)
                row |= _ends("gain", gain, level) if judged else {}
                row |= _paired(outcomes, measure, criterion, budget, gain, level)
            rows.append(row | {"seeds": len(value.seeds_S), "prompts": value.prompts})
    names = [f"{part}{end}" for part in ("mean", "gain", "minus_full", "minus_random") for end in ("", "_low", "_high")]
    names[1:3] = ["low", "high"]
    return pd.DataFrame(rows).reindex(columns=["criterion", "budget", "measure", *names, "seeds", "prompts"])


def _ends(name: str, value: Crossed, level: float) -> dict:
    low, high = value.interval(level)
    prefix = "" if name == "mean" else f"{name}_"
    return {name: value.value, f"{prefix}low": low, f"{prefix}high": high}


def _paired(outcomes: Outcomes, measure: str, criterion: str, budget: float, gain: Crossed, level: float) -> dict:
    row = {}
    for rival, at in (("full", 1.0), ("random", budget)):
        if (rival, at) in outcomes.cells and (criterion, budget) != (rival, at):
            row |= _ends(f"minus_{rival}", gain - outcomes.gain(measure, rival, at), level)
    return row


def verdict_table(outcomes: Outcomes, *, level: float = 0.95) -> pd.DataFrame:
    """C5 for each measure: against each rival, and overall (`rival` = all); also at the grid's other budgets.

    Returns columns claim, measure, budget, rival, difference (of gains, teachability minus rival), low, high, margin, beats
    (the interval lies above 0), verdict, seeds, prompts. The claim is about 5 %; its name at another budget is `C5 at
    <budget>`. A rival that was not trained is left out, and then the overall verdict is inconclusive.
    """
    rows = []
    budgets = sorted({budget for criterion, budget in outcomes.cells if criterion == CLAIMANT}, key=lambda b: (b != TA_BUDGET, b))
    for measure in outcomes.measures(JUDGED):
        for budget in budgets:
            claim = "C5" if budget == TA_BUDGET else f"C5 at {budget:g}"
            each = [_against(outcomes, measure, budget, rival, level) for rival in RIVALS if (rival, _budget_of(rival, budget)) in outcomes.cells]
            overall = _overall([row["verdict"] for row in each], complete=len(each) == len(RIVALS))
            shared = {key: each[0][key] for key in ("margin", "seeds", "prompts")} if each else {}
            rows += [{"claim": claim, "measure": measure, "budget": budget} | row for row in [{"rival": "all", "verdict": overall} | shared, *each]]
    order = ["claim", "measure", "budget", "rival", "difference", "low", "high", "margin", "beats", "verdict", "seeds", "prompts"]
    return pd.DataFrame(rows).reindex(columns=order)


def _budget_of(rival: str, budget: float) -> float:
    return 1.0 if rival == "full" else budget


def _against(outcomes: Outcomes, measure: str, budget: float, rival: str, level: float) -> dict:
    margin = np.nan
    if ("full", 1.0) in outcomes.cells:
        margin = MARGIN * max(0.0, outcomes.gain(measure, "full", 1.0).value)
    difference = outcomes.gain(measure, CLAIMANT, budget) - outcomes.gain(measure, rival, _budget_of(rival, budget))
    low, high = difference.interval(level)
    seeds = len(difference.seeds_S)
    verdict = "inconclusive"
    if seeds >= MINIMUM_SEEDS and np.isfinite([low, high, margin]).all():
        verdict = "supported" if low >= -margin else "refuted" if high < -margin else verdict
    return {"rival": rival, "difference": difference.value, "low": low, "high": high, "margin": margin, "beats": bool(low > 0),
            "verdict": verdict, "seeds": seeds, "prompts": difference.prompts}


def _overall(verdicts: Sequence[str], *, complete: bool) -> str:
    if "refuted" in verdicts:
        return "refuted"
    return "supported" if complete and all(verdict == "supported" for verdict in verdicts) else "inconclusive"


# --- agreement --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What another run says of a cell, with the draws of that run's own prompts."""

    value: float
    draws_D: np.ndarray
    prompts: int

    def resampled(self, seed: int) -> np.ndarray:
        """Draws [D]; they are given."""
        return self.draws_D


Offline = Mapping[str, Mapping[tuple[str, float], Known]]
"""By answer and cell."""


def agreement_table(outcomes: Outcomes, offline: Offline | None = None, *, level: float = 0.95) -> pd.DataFrame:
    """Kendall's tau between what was foreseen and the gain of training, over the cells but full.

    offline: see `offline_answers`; the gain after each training's own first step is added. Returns columns scope (all,
    within_budget, or budget_<share>), x (the answer), y (`trained_<measure>`), kendall, low, high, cells, prompts. Only
    cells that both sides hold are compared; fewer than three give no row.
    """
    rows = []
    trained = outcomes.measures(JUDGED)
    for name, values in _foreseen(outcomes, offline):
        cells = [cell for cell in outcomes.cells if cell[0] != "full" and cell in values]
        if len(cells) < 3:
            continue
        frame = pd.DataFrame(cells, columns=["criterion", "budget"])
        answer = _answer(name, [values[cell] for cell in cells], outcomes)
        gains = [_answer(f"trained_{m}", [outcomes.gain(m, *cell) for cell in cells], outcomes) for m in trained]
        for scope, pairs in ranks.scopes(frame):
            for gain in gains:
                tau = ranks.kendall(answer, gain, pairs)
                low, high = tau.interval(level)
                rows.append({"scope": scope, "x": name, "y": gain.name, "kendall": tau.value, "low": low, "high": high,
                             "cells": int(pairs.any(axis=1).sum()), "prompts": tau.prompts})
    return pd.DataFrame(rows, columns=["scope", "x", "y", "kendall", "low", "high", "cells", "prompts"])


def foreseen_table(outcomes: Outcomes, offline: Offline | None = None) -> pd.DataFrame:
    """What was foreseen of each trained cell but full, before its training or after its first step.

    offline: as for `agreement_table`. Returns columns criterion, budget, answer, value; the answers of the grid's own first
    steps are the means over its seeds. Cells that an answer does not know are left out.
    """
    rows = [
        (*cell, name, values[cell].value)
        for name, values in _foreseen(outcomes, offline) for cell in outcomes.cells if cell[0] != "full" and cell in values
    ]
    return pd.DataFrame(rows, columns=["criterion", "budget", "answer", "value"])


def _foreseen(outcomes: Outcomes, offline: Offline | None) -> Iterator[tuple[str, Mapping]]:
    for measure in outcomes.measures(FIRST_STEP):
        yield measure, {cell: outcomes.gain(measure, *cell) for cell in outcomes.cells}
    yield from (offline or {}).items()


def _answer(name: str, values: Sequence[Crossed | Known], outcomes: Outcomes) -> Answer:
    """Values of some cells with their draws."""
    draws = [v.resampled(outcomes.seed) for v in values]
    return Answer(name, np.array([v.value for v in values]), np.stack(draws, axis=1), min(v.prompts for v in values))


def offline_answers(directory: Path, cells: Iterable[tuple[str, float]], *, draws: int = 1000, seed: int = 0) -> Offline:
    """What a finished main job says of cells (criterion, budget), from its positions and interventions.

    captured_<outcome>: share of the outcome that the criterion captures at the budget, over all positions.
    intervention_<measure>: mean reduction at held-out positions after a step on the selected ones alone.
    A cell is missing where the job knows nothing of it. Raises DiagnosticsError where the directory has no tokens.parquet with gains.
    """
    from diagnostics.pipeline.run import unchanged

    path = directory / "tokens.parquet"
    if not path.exists():
        raise DiagnosticsError(f"{path} does not exist. Name a run directory whose main job is finished.")
    tokens, effects = validate_tokens(read_parquet(unchanged(directory, path.name))), unchanged(directory, "interventions.parquet")
    scorable = registry.available(tokens)
    frame = pd.DataFrame([cell for cell in cells if registry.find(cell[0]).name in scorable], columns=["criterion", "budget"])
    # Draws of their own: with as many prompts, equal seeds would tie these draws to those of the trainings' prompts.
    apart = int(np.random.default_rng([seed, 13]).integers(2**31))
    found = ranks.foreseen(tokens, read_parquet(effects) if effects.exists() else None, frame, draws=draws, seed=apart) if len(frame) else []
    return {answer.name: dict(_known(answer, frame)) for answer in found}


def _known(answer: Answer, cells: pd.DataFrame) -> Iterator[tuple[tuple[str, float], Known]]:
    for c, cell in enumerate(cells.itertuples(index=False, name=None)):
        if np.isfinite(answer.value_C[c]) and answer.unit > 0:
            yield cell, Known(float(answer.value_C[c] / answer.unit), answer.draws_DC[:, c] / answer.unit, answer.prompts)


def tables(
    rows: pd.DataFrame, offline: Offline | None = None, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """All tables of a validation by file name. rows: see `read_outcomes`; offline: see `offline_answers`."""
    outcomes = Outcomes(rows, draws=draws, seed=seed)
    return {
        "validation_cells": cells_table(outcomes),
        "validation_outcomes": outcome_table(outcomes, level=level),
        "validation_verdicts": verdict_table(outcomes, level=level),
        "validation_agreement": agreement_table(outcomes, offline, level=level),
        "validation_foreseen": foreseen_table(outcomes, offline),
    }
