"""Do the probe's conclusions survive real training? A grid of short trainings, their outcomes, and
who foresaw them.

A *cell* is one criterion at one budget; each is trained once a seed, with equal steps and optimiser
settings, from the same student, and evaluated on the same held-out prompts with the same random
numbers (`evaluation`). `full` has one cell. With S seeds and G held-out prompts, total T_sg and
count N_sg of a measure,

    value = 1/S sum_s v_s,   v_s = sum_g T_sg / sum_g N_sg
    error^2 = E_S + E_G,     E_S = var_s(v_s) / S,   E_G = G/(G - 1) var over prompt draws of the value
    interval = value +- t(f) * error,   f = error^4 / (E_S^2/(S - 1) + E_G^2/(G - 1))

so seeds and prompts are crossed, and f is Welch and Satterthwaite's. (E_S holds some of what
prompts and seeds do together, and E_G the rest: the interval errs to the long side.) Differences
between cells are paired: v_s and the draws are subtracted before any error is taken. With one seed
E_S is undefined, and so is the interval.

Gain of a training = untouched - trained for divergences, trained - untouched for accuracies: larger
is better.

    C5  TA-OPD at 5 % matches or beats full OPD and the entropy, divergence and TIP baselines.
        Against each rival: supported where the interval of gain(teachability) - gain(rival) reaches
        no lower than -margin, refuted where it lies below, inconclusive otherwise or with fewer
        than 3 seeds; margin = 10 % of the gain of full (0 where full gains nothing). Overall:
        supported where all are, refuted where one is.

Agreement with offline answers is Kendall's tau over cells (`agreement`); its draws resample prompts
and seeds of the training outcomes and, apart from them, the prompts of the run that gave the
offline answer.

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

from diagnostics import criteria as registry
from diagnostics.analysis.training_outcomes import FIRST_STEP
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
class ValidateConfig:
    """The grid of trainings. Equal settings for every cell, fixed before any outcome was seen."""

    criteria: tuple[str, ...] = field(
        default=("full", "random", "entropy", "divergence", "tip", "teachability", "incompatible"),
        metadata={"help": "criteria to train with"},
    )
    budgets: tuple[float, ...] = field(
        default=(0.05, 0.1, 0.3), metadata={"help": "budgets of each but full"}
    )
    seeds: int = field(default=3, metadata={"help": "trainings of each cell, seeds 0, 1, …"})
    steps: int = field(default=100, metadata={"help": "optimiser steps of each training"})
    batch: int = field(default=16, metadata={"help": "responses in a step"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "1e-6, or the named pair's where not given"}
    )
    loss: str = field(
        default="reverse_kl",
        metadata={"help": "OPD loss: forward_kl, reverse_kl, jsd, sampled or topk_reverse"},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    workers: int = field(
        default=2, metadata={"help": "trainings at the same time, one thread each"}
    )

    def __post_init__(self):
        if self.seeds < 1 or self.workers < 1 or not self.criteria:
            raise DiagnosticsError(
                f"A grid needs criteria, seeds and workers; got {len(self.criteria)}, {self.seeds}"
                f" and {self.workers}."
            )
        for name in self.criteria:
            registry.find(name)
        for budget in self.budgets:
            registry.budget_count(1, budget)


@dataclass(frozen=True)
class TrainingCell:
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


def grid(config: ValidateConfig) -> list[TrainingCell]:
    """Every training, seed by seed, so that an interrupted grid holds whole comparisons."""
    cells = []
    for seed in range(config.seeds):
        for criterion in dict.fromkeys(config.criteria):
            whole = registry.find(criterion).kind == "all"
            cells += [
                TrainingCell(criterion, budget, seed)
                for budget in ((1.0,) if whole else dict.fromkeys(config.budgets))
            ]
    return cells


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
        """Settings that a finished cell must share; which other cells there are is not among
        them.
        """
        from diagnostics.core.manifest import recorded
        from diagnostics.models.identity import WHERE

        grid = {
            key: value
            for key, value in self.grid.items()
            if key not in ("criteria", "budgets", "seeds", "workers")
        }
        pair = {key: value for key, value in self.pair.items() if key not in WHERE}
        return json.loads(
            json.dumps(recorded(pair | self.prompts | self.evaluation | grid, apart=True))
        )

    @property
    def engine_identity(self) -> dict:
        """Engine options that a finished cell must share; a file counts by its content."""
        trl = (
            {"trl": self.sources.get("trl_sha256", self.engine["trl"])}
            if self.engine.get("trl")
            else {}
        )
        return json.loads(json.dumps(self.engine | trl))

    def finished(self, name: str) -> bool:
        """True where the cell is done with these settings and its files are as they were written.

        A cell that is lost, cut or was changed is to be measured again, with a warning. Raises
        DiagnosticsError where it is done with other settings, models or prompts, or by another
        version of the code."""
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
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("settings"), dict)
            or not isinstance(record.get("files", {}), dict)
        ):
            raise _Again("its record has no settings")
        if name != "untouched" and _cell_of(record) != name:
            raise _Again(f"its record is of another cell, {_cell_of(record)}")
        return record

    def _require_same(self, name: str, record: dict) -> None:
        path, engine = (
            self.folder / f"{name}.json",
            ({} if name == "untouched" else self.engine_identity),
        )
        compared = [
            (record["settings"], self.identity, list(self.identity)),
            (record.get("engine", {}), engine, sorted(record.get("engine", {}).keys() | engine)),
            (
                record.get("sources", {}),
                self.sources,
                [key for key in record.get("sources", {}) if key != "trl_sha256"],
            ),
        ]
        different = [
            f"{key}: was {was.get(key)!r}, now {now.get(key)!r}"
            for was, now, keys in compared
            for key in keys
            if was.get(key) != now.get(key)
        ]
        if different:
            raise DiagnosticsError(
                f"{path} was trained with other settings ({'; '.join(different)}). Choose another"
                " --output-dir."
            )
        if self.code is not None and record.get("code", self.code) != self.code:
            if not self.accept_code:
                raise DiagnosticsError(
                    f"{path} was trained by another version of this program (was {record['code']},"
                    f" now {self.code}). Choose another --output-dir, that version, or"
                    " --accept-code to keep what it measured."
                )
            log.warning(
                "%s: kept, though another version of this program measured it (was %s, now %s)",
                path,
                record["code"],
                self.code,
            )

    def _require_whole(self, name: str, record: dict) -> None:
        for file in self.files(name):
            path = self.folder / file
            if not path.is_file():
                raise _Again(f"{file} is lost")
            digest = _sha256(path)
            was = record.get("files", {}).get(file, digest), self.known.get(file, digest)
            if was != (digest, digest):
                raise _Again(f"{file} is not as it was written (sha256 {digest[:16]}…)")
        if name != "untouched" and record.get("bank", _sha256(self.folder / BANK)) != _sha256(
            self.folder / BANK
        ):
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
        return TrainingCell(**record["cell"]).name
    except (KeyError, TypeError, ValueError):
        return None


def _sha256(path: Path) -> str:
    from diagnostics.core.files import sha256_file

    return sha256_file(path)


def run_grid(job: Job, cells: Sequence[TrainingCell], *, workers: int) -> None:
    """Evaluate the untouched student, then train every cell that is not finished. Each leaves its
    files when it ends.
    """
    if os.path.islink(job.folder):
        raise DiagnosticsError(
            f"{job.folder} is a link, and cells are written into the run's own folder alone. Remove"
            " the link."
        )
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


def _say_threads(job: Job, cells: Sequence[TrainingCell]) -> None:
    """Sums come out in another order on another number of threads, so that equal cells differ in
    their last digits.
    """
    records = [
        json.loads((job.folder / f"{cell.name}.json").read_text(encoding="utf-8")) for cell in cells
    ]
    threads = sorted({record["threads"] for record in records if "threads" in record})
    if len(threads) > 1:
        log.warning(
            "cells of this grid were trained on %s threads each: their last digits differ by that",
            " and ".join(map(str, threads)),
        )


def _share_out(job: Job, missing: Sequence[TrainingCell], workers: int) -> None:
    """Train on several processes, which end with this one; what they had begun goes with them."""
    from diagnostics.training.workers import share_out

    tasks = [(job, cell) for cell in missing]
    try:
        for done, result in enumerate(
            share_out(_work, tasks, environments(min(workers, len(tasks)), job.pair)), 1
        ):
            log.info("%s (%d of %d)", result, done, len(missing))
    finally:
        remove_scratch(job.folder)


def _work(task: tuple[Job, TrainingCell]) -> str:
    """One cell in a worker, on one thread: models this small lose time to a second one."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("diagnostics").setLevel(logging.WARNING)
    return run_cell(*task)


def environments(workers: int, pair: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each worker's environment adds: a GPU of its own where there are several and no device
    was named.
    """
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
    names = (
        [name.strip() for name in named.split(",")]
        if named
        else [str(number) for number in range(count)]
    )
    return names[:count]


SCRATCH = re.compile(r"\.training-.+-seed\d+")
"""Names of the folders that trainings work in."""


def remove_scratch(folder: Path) -> None:
    """Remove what killed trainings had begun: folders of our own naming, no link and nothing that a
    link leads to.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        begun = [
            entry.path
            for entry in entries
            if SCRATCH.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in begun:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _scratch(job: Job, cell: TrainingCell) -> Iterator[Path]:
    path = job.folder / f".training-{cell.name}"
    if path.is_symlink():
        raise DiagnosticsError(f"{path} is a link, and this program makes none. Remove it.")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


_held: dict[str, Any] = {}
"""The pair of this process as it was loaded, with its checksum; trainings get copies."""


def _fresh_pair(job: Job):
    """A pair as it was loaded: the student's weights copied, the teacher's shared, and both
    compared with what they were.

    Where they differ the models are loaded anew, with a warning.
    """
    key = json.dumps([job.pair, job.sources], sort_keys=True)
    if _held.get("key") == key and _checksum(_held["pair"]) != _held["checksum"]:
        log.warning(
            "a training changed the weights that the next one begins with; the models are loaded"
            " anew"
        )
        _held.clear()
    if _held.get("key") != key:
        from diagnostics.models.identity import Models
        from diagnostics.models.pair import PairConfig

        _held.clear()
        pair = Models(PairConfig(**job.pair)).pair
        _held.update(key=key, pair=pair, checksum=_checksum(pair))
    return _copy(_held["pair"])


def _copy(pair):
    """The pair with modules, tokenizer and student's weights of its own. The teacher's weights are
    not trained and stay one.
    """
    import copy

    teacher = getattr(pair.teacher, "model", None)
    shared = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    return copy.deepcopy(pair, {id(tensor): tensor for tensor in shared})


def _checksum(pair) -> list[int]:
    """One whole number for each model, over all bits of its weights and their order; where the
    weights lie, and exact.
    """
    import torch

    sums = []
    for readout in (pair.student, pair.teacher):
        model, total = getattr(readout, "model", None), 0
        for tensor in [] if model is None else [*model.parameters(), *model.buffers()]:
            bits = tensor.detach().contiguous().flatten()
            whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
            for piece in bits.view(whole[bits.element_size()]).split(
                2**24
            ):  # the sums below take eight bytes a weight
                places = torch.arange(1, len(piece) + 1, device=piece.device)
                total = (31 * total + int((piece.long() * places).sum())) % 2**64
        sums.append(total)
    return sums


def _pair_and_prompts(job: Job, seed: int):
    from diagnostics.contexts import choose_prompts
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.models import identity
    from diagnostics.models.pair import PairConfig
    from diagnostics.training.evaluation import EvaluationConfig

    models, evaluation = identity.Models(PairConfig(**job.pair)), EvaluationConfig(**job.evaluation)
    models.pair = _fresh_pair(job)
    data, held_out = choose_prompts.training_prompts(
        models,
        PromptConfig(**job.prompts),
        evaluation,
        needed=job.grid["steps"] * job.grid["batch"],
        seed=seed,
        room=job.grid["max_new_tokens"],
    )
    if not held_out:
        raise DiagnosticsError(
            "A validation compares students on held-out prompts, and there are none. Raise"
            " --eval-contexts."
        )
    return models.pair, data, held_out, evaluation


def run_untouched(job: Job) -> None:
    """Freeze the bank and evaluate the untouched student, once for the whole grid."""
    from diagnostics.contexts.rollouts import rollout
    from diagnostics.core.tables import write_parquet
    from diagnostics.training.evaluation import FrozenBank, evaluate, find_verifier

    pair, _, held_out, evaluation = _pair_and_prompts(job, 0)
    bank = rollout(pair, held_out, max_new_tokens=job.grid["max_new_tokens"])
    write_parquet(job.folder / BANK, bank.to_frame())
    rows = evaluate(
        pair,
        held_out,
        bank=FrozenBank(pair, bank),
        verify=find_verifier(evaluation.verifier, pair=pair.name, prompts=held_out),
        samples=evaluation.eval_samples,
        max_new_tokens=job.grid["max_new_tokens"],
    )
    _finish(job, "untouched", rows, facts=pair.facts)


def run_cell(job: Job, cell: TrainingCell) -> str:
    """Train one cell and leave its evaluation, its curve and then its record. Returns what to
    log.
    """
    import time

    import torch

    from diagnostics.core.tables import write_parquet
    from diagnostics.core.types import read_bank
    from diagnostics.training.run import EngineConfig, TrainConfig, train

    began, grid = time.perf_counter(), job.grid
    pair, data, held_out, evaluation = _pair_and_prompts(job, cell.seed)
    config = TrainConfig(
        criterion=cell.criterion,
        budget=cell.budget,
        seed=cell.seed,
        **{key: grid[key] for key in ("steps", "batch", "learning_rate", "loss")},
    )
    engine = EngineConfig(
        **job.engine, max_new_tokens=grid["max_new_tokens"], save_every=0, probe_every=grid["steps"]
    )
    untouched = read_parquet(job.folder / "untouched.parquet")
    bank = read_bank(job.folder / BANK)
    with _scratch(job, cell) as scratch:
        result = train(
            pair,
            data,
            output_dir=scratch,
            config=config,
            engine=engine,
            evaluation=evaluation,
            held_out=held_out,
            bank=bank,
            untouched=untouched,
        )
        rows = read_parquet(scratch / "evaluations.parquet").query("step > 0").drop(columns="step")
        gains = read_parquet(scratch / "training_gains.parquet")
    write_parquet(job.folder / f"{cell.name}.curve.parquet", result.metrics)
    seconds = time.perf_counter() - began
    _finish(
        job,
        cell.name,
        pd.concat([rows, _first_gains(gains, bank)], ignore_index=True),
        cell=asdict(cell),
        seconds=round(seconds, 1),
        threads=torch.get_num_threads(),
    )
    return f"{cell.name}: {seconds:.0f} s"


def _first_gains(gains: pd.DataFrame, bank) -> pd.DataFrame:
    """Gain of the frozen positions after the first step, as rows of an evaluation."""
    from diagnostics.training.evaluation import by_prompt

    prompt_ids = np.repeat(
        [context.prompt_id for context in bank], [len(context.response_ids) for context in bank]
    )
    return pd.concat(
        [by_prompt(measure, prompt_ids, gains[column]) for measure, column in FIRST_STEP.items()],
        ignore_index=True,
    )


def _finish(job: Job, name: str, rows: pd.DataFrame, **record) -> None:
    from diagnostics.core.tables import write_json, write_parquet

    write_parquet(job.folder / f"{name}.parquet", rows)
    if name != "untouched":
        record |= {"bank": _sha256(job.folder / BANK)} | (
            {"engine": job.engine_identity} if job.engine else {}
        )
    written = {file: _sha256(job.folder / file) for file in job.files(name)}
    code = {} if job.code is None else {"code": job.code}
    write_json(
        job.folder / f"{name}.json",
        record | {"settings": job.identity, "sources": job.sources, **code, "files": written},
    )


def read_outcomes(folder: Path, cells: Iterable[TrainingCell]) -> pd.DataFrame:
    """Evaluations of the untouched student and of the finished cells, one row a training, measure
    and prompt.

    Columns criterion (`untouched` for the first), budget, seed, measure, prompt_id, total, count.
    """

    frames = [
        read_parquet(folder / "untouched.parquet").assign(
            criterion="untouched", budget=0.0, seed=-1
        )
    ]
    frames += [
        read_parquet(folder / f"{cell.name}.parquet").assign(**asdict(cell))
        for cell in cells
        if (folder / f"{cell.name}.json").exists()
    ]
    return pd.concat(frames, ignore_index=True)
