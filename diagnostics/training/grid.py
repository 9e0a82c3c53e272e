"""A grid of short trainings: do the probe's conclusions survive real training?

A *cell* is one criterion at one budget. Each cell is trained once per seed, with equal steps and
optimizer settings, from the same student, and evaluated on the same held-out prompts with the same
random numbers (`evaluation`). `full` has one cell. This module runs the grid;
`training_outcomes` has its statistics and judges the claim.

    DIR/cells/contexts.parquet           the frozen bank, sampled from the untouched student
    DIR/cells/untouched.parquet, .json   evaluation of the untouched student, and its record
    DIR/cells/<cell>.parquet             evaluation of a trained student, and its first step's gains
    DIR/cells/<cell>.curve.parquet       metrics of its training, one row per step
    DIR/cells/<cell>.json                its record, written last: settings, hashes, code version

A cell whose record and files agree with the settings is finished and is never trained again, so an
interrupted grid continues and a wider grid keeps its cells.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet
from diagnostics.core.settings import as_written

if TYPE_CHECKING:
    from diagnostics.training.config import EngineConfig, TrainConfig

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
@as_written
class ValidateConfig:
    """The grid of trainings, with equal settings for every cell.

    Attributes:
        criteria: Criteria to train with.
        budgets: Shares of positions, for each criterion except `full`.
        seeds: Trainings of each cell, with seeds 0, 1, ...
        steps: Optimizer steps of each training.
        batch: Responses per step.
        learning_rate: None takes the named pair's rate, or 1e-6.
        loss: One of `losses.LOSSES`.
        max_new_tokens: Longest response in tokens.
        workers: Trainings at the same time, one thread each.
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: Whether a budget is a share of a step's positions or of each response's.

    Raises:
        DiagnosticsError: There are no criteria, seeds or workers, a criterion is unknown, or a
            budget lies outside (0, 1].
    """

    criteria: tuple[str, ...] = field(
        default=("full", "random", "entropy", "divergence", "tip", "teachability", "incompatible"),
        metadata={"help": "criteria to train with"},
    )
    budgets: tuple[float, ...] = field(
        default=(0.05, 0.1, 0.3), metadata={"help": "budgets of each but full"}
    )
    seeds: int = field(default=3, metadata={"help": "trainings of each cell, seeds 0, 1, …"})
    steps: int = field(default=100, metadata={"help": "optimizer steps of each training"})
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
    ties: str = field(default="raw", metadata=registry.TIES_FLAG)
    scope: str = field(default="batch", metadata=registry.TRAINING_SCOPE_FLAG)

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
        """The stem of its files' names."""
        return f"{self.criterion}-{_budget_name(self.budget)}-seed{self.seed}"


def _budget_name(budget: float) -> str:
    """Six digits where they are exact, all digits otherwise: no two budgets share a name."""
    short = f"{budget:g}"
    return short if float(short) == budget else repr(budget)


def grid(config: ValidateConfig) -> list[TrainingCell]:
    """List every training of a grid.

    Args:
        config: The grid.

    Returns:
        The cells, seed by seed, so that an interrupted grid holds whole comparisons.
    """
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
    """Everything that a worker needs to train a cell; names and numbers only."""

    folder: Path
    """Folder of the cells' files."""
    pair: dict
    """Fields of `PairConfig`."""
    prompts: dict
    """Fields of `PromptConfig`."""
    evaluation: dict
    """Fields of `EvaluationConfig`."""
    grid: dict
    """Fields of `ValidateConfig`."""
    engine: dict = field(default_factory=dict)
    """Fields of `EngineConfig` that differ from their defaults."""
    sources: dict = field(default_factory=dict)
    """Hashes of the models' files and of the prompts."""
    code: str | None = None
    """Version of the modules that decide a training's numbers."""
    accept_code: bool = False
    """Whether finished cells of another version are kept."""
    known: dict = field(default_factory=dict)
    """Hashes of cells' files that the run's manifest records."""

    @property
    def identity(self) -> dict:
        """Settings that a finished cell must share. The list of cells is not among them."""
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
        from diagnostics.core.manifest import recorded

        said = {
            name: self.sources.get(f"{name}_sha256", self.engine[name])
            for name in ("trl", "peft")
            if self.engine.get(name)
        }
        return json.loads(json.dumps(recorded(self.engine | said)))

    def finished(self, name: str) -> bool:
        """Whether a cell was trained with these settings and its files are as they were written.

        A cell whose files are lost, cut short or changed is not finished, which is logged.

        Args:
            name: Name of a cell, or `untouched`.

        Raises:
            DiagnosticsError: The cell was trained with other settings, models or prompts, or by
                another version of the code.
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
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("settings"), dict)
            or not isinstance(record.get("files", {}), dict)
        ):
            raise _Again("its record has no settings")
        if name != "untouched" and _cell_of(record) != name:
            raise _Again(f"its record is of another cell, {_cell_of(record)}")
        return record

    @property
    def rules(self) -> dict[str, str]:
        """How this grid's cells select."""
        return EARLIER_RULES | {k: self.grid[k] for k in EARLIER_RULES if k in self.grid}

    def _selected_by(self, name: str, record: dict) -> dict[str, str]:
        """The rules of a finished cell's selection, as far as they decide it.

        The untouched student and a training on all positions select none, and a score without
        limits has no unclipped form that would order its ties otherwise than by position.
        """
        said = record["settings"]
        rules = EARLIER_RULES | {key: said[key] for key in EARLIER_RULES if key in said}
        entry = None if name == "untouched" else registry.find(record["cell"]["criterion"])
        if entry is None or entry.kind == "all":
            return self.rules
        same = "scale" not in entry.arguments and "random" not in (
            rules["ties"],
            self.rules["ties"],
        )
        return rules | {"ties": self.rules["ties"]} if same else rules

    def _require_same(self, name: str, record: dict) -> None:
        path = self.folder / f"{name}.json"
        different = self._differences(name, record)
        if different:
            raise DiagnosticsError(
                f"{path} was trained with other settings ({'; '.join(different)}). Choose another"
                " --output-dir."
            )
        self._require_rules(path, self._selected_by(name, record))
        self._require_code(path, record)

    def _differences(self, name: str, record: dict) -> list[str]:
        """Settings, engine options and sources that a finished cell does not share."""
        engine = {} if name == "untouched" else self.engine_identity
        theirs, sources = record.get("engine", {}), record.get("sources", {})
        named = [key for key in sources if key not in ("trl_sha256", "peft_sha256")]
        own = [
            key
            for key in self.identity
            if key not in EARLIER_RULES and not _known_by_content(key, sources)
        ]
        compared = [
            (record["settings"], self.identity, own),
            (theirs, engine, sorted(theirs.keys() | engine)),
            (sources, self.sources, named),
        ]
        return [
            f"{key}: was {was.get(key)!r}, now {now.get(key)!r}"
            for was, now, keys in compared
            for key in keys
            if was.get(key) != now.get(key)
        ]

    def _require_rules(self, path: Path, was: dict[str, str]) -> None:
        """Refuse a cell that selected otherwise, unless another version's cells are kept."""
        now = self.rules
        rules = [f"{key} was {was[key]!r}, now {now[key]!r}" for key in was if was[key] != now[key]]
        if not rules:
            return
        if not self.accept_code:
            raise DiagnosticsError(
                f"{path} selected its positions by other rules ({'; '.join(rules)}). Choose"
                " another --output-dir, those rules, or --accept-code to keep what it measured."
            )
        log.warning("%s: kept, though it selected by other rules (%s)", path, "; ".join(rules))

    def _require_code(self, path: Path, record: dict) -> None:
        """Refuse a cell of another version, unless such cells are kept."""
        if self.code is None or record.get("code", self.code) == self.code:
            return
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

    def begin(self) -> None:
        """Write what every cell needs, once for the whole grid: the bank and `untouched`."""
        run_untouched(self)

    def train(self, cell: TrainingCell) -> str:
        """Train one cell, write its files, and return a line for the log."""
        return run_cell(self, cell)


BANK = "contexts.parquet"
EARLIER_RULES = {"ties": "position", "scope": "batch"}
"""How a cell selected whose record says nothing of it."""


class _Again(Exception):
    """Why the files of a cell cannot be used."""


def _cell_of(record: dict) -> str | None:
    """Name of the cell that a record belongs to."""
    try:
        return TrainingCell(**record["cell"]).name
    except (KeyError, TypeError, ValueError):
        return None


def _sha256(path: Path) -> str:
    from diagnostics.core.files import sha256_file

    return sha256_file(path)


def run_grid(job: Job, cells: Sequence[TrainingCell], *, workers: int) -> None:
    """Evaluate the untouched student, then train every cell that is not finished.

    Each training leaves its files when it ends.

    Args:
        job: Settings of the grid, and its folder.
        cells: The trainings.
        workers: Trainings at the same time; 1 trains in this process.

    Raises:
        DiagnosticsError: The folder is a link, a finished cell has other settings, or a training
            fails.
    """
    if os.path.islink(job.folder):
        raise DiagnosticsError(
            f"{job.folder} is a link, and cells are written into the run's own folder alone. Remove"
            " the link."
        )
    remove_scratch(job.folder)
    try:
        if not job.finished("untouched"):
            job.begin()
        missing = [cell for cell in cells if not job.finished(cell.name)]
        log.info("%d of %d trainings to do", len(missing), len(cells))
        if workers == 1 or len(missing) < 2:
            began = time.perf_counter()
            for done, cell in enumerate(missing, 1):
                result = job.train(cell)
                left = _left(began, done, len(missing))
                log.info("%s (%d of %d%s)", result, done, len(missing), left)
        else:
            _held.clear()  # the workers load their own
            _share_out(job, missing, workers)
    finally:
        _held.clear()
    _say_threads(job, cells)


def _say_threads(job: Job, cells: Sequence[TrainingCell]) -> None:
    """Warn where cells were trained on different numbers of threads.

    The number of threads orders sums, so that the last digits of equal cells differ.
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
    """Train in several processes, which end with this one; unfinished work is removed."""
    from diagnostics.training.workers import share_out

    tasks, began = [(job, cell) for cell in missing], time.perf_counter()
    try:
        for done, result in enumerate(
            share_out(_work, tasks, environments(min(workers, len(tasks)), job.pair)), 1
        ):
            log.info("%s (%d of %d%s)", result, done, len(missing), _left(began, done, len(tasks)))
    finally:
        remove_scratch(job.folder)


def _left(began: float, done: int, total: int) -> str:
    """How long the rest takes at the pace so far; nothing at the end."""
    minutes = (time.perf_counter() - began) / done * (total - done) / 60
    return f", about {max(1, round(minutes))} min left" if done < total else ""


def _work(task: tuple[Job, TrainingCell]) -> str:
    """Train one cell in a worker, on one thread: small models lose time to a second one."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("diagnostics").setLevel(logging.WARNING)
    job, cell = task
    return job.train(cell)


def environments(workers: int, pair: Mapping[str, Any]) -> list[dict[str, str]]:
    """Environment variables of each worker.

    Args:
        workers: Number of workers.
        pair: Fields of `PairConfig`.

    Returns:
        One mapping per worker. It names a GPU where there are several and no device was asked for.
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
    """Names of the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name.strip() for name in named.split(",")]
        if named
        else [str(number) for number in range(count)]
    )
    return names[:count]


SCRATCH = re.compile(r"\.training-.+-seed\d+")
"""Names of the folders in which trainings work."""


def remove_scratch(folder: Path) -> None:
    """Remove the folders of killed trainings.

    Only folders with our own names are removed, never a link or the target of a link.

    Args:
        folder: Folder of the cells.
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
def scratch_folder(job: Job, cell: TrainingCell) -> Iterator[Path]:
    """The folder in which a training works, removed at its end."""
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


def fresh_pair(job: Job):
    """A copy of the pair as it was loaded, which shares the teacher's weights.

    Where a training changed the loaded weights, the models are loaded again with a warning.
    """
    key = json.dumps([job.pair, job.sources], sort_keys=True)
    if _held.get("key") == key and _checksum(_held["pair"]) != _held["checksum"]:
        log.warning(
            "a training changed the weights that the next one begins with; the models are loaded"
            " again"
        )
        _held.clear()
    if _held.get("key") != key:
        from diagnostics.models.config import PairConfig
        from diagnostics.models.identity import Models

        _held.clear()
        pair = Models(PairConfig(**job.pair)).pair
        _held.update(key=key, pair=pair, checksum=_checksum(pair))
    return _copy(_held["pair"])


def _copy(pair):
    """The pair with modules, tokenizer and student's weights of its own.

    The teacher's weights are not trained and stay shared.
    """
    import copy

    teacher = getattr(pair.teacher, "model", None)
    shared = [] if teacher is None else [*teacher.parameters(), *teacher.buffers()]
    return copy.deepcopy(pair, {id(tensor): tensor for tensor in shared})


def _checksum(pair) -> list[int]:
    """One integer per model, exact over all bits of its weights and their order.

    It is computed on the weights' own device.
    """
    import torch

    sums = []
    for readout in (pair.student, pair.teacher):
        model, total = getattr(readout, "model", None), 0
        for tensor in [] if model is None else [*model.parameters(), *model.buffers()]:
            bits = tensor.detach().contiguous().flatten()
            whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
            # in pieces, since the sums below take eight bytes per weight
            for piece in bits.view(whole[bits.element_size()]).split(2**24):
                places = torch.arange(1, len(piece) + 1, device=piece.device)
                total = (31 * total + int((piece.long() * places).sum())) % 2**64
        sums.append(total)
    return sums


def _known_by_content(key: str, sources: Mapping[str, Any]) -> bool:
    """Whether a setting is the place of an input whose content a record names by its hash.

    Such an input may lie elsewhere: a grid that was begun on one machine goes on on another.
    """
    name = key.removesuffix("_place")
    return name != key and (name in sources or f"{name}_sha256" in sources)


def _pair_and_prompts(job: Job, seed: int):
    from diagnostics.contexts import choose_prompts
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.models import identity
    from diagnostics.models.config import PairConfig
    from diagnostics.training.evaluation import EvaluationConfig

    models, evaluation = identity.Models(PairConfig(**job.pair)), EvaluationConfig(**job.evaluation)
    models.pair = fresh_pair(job)
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
    """Freeze the bank and evaluate the untouched student, once for the whole grid.

    Args:
        job: Settings of the grid, and its folder.
    """
    from diagnostics.contexts.rollouts import rollout
    from diagnostics.core.tables import write_parquet
    from diagnostics.probing.frozen_bank import FrozenBank
    from diagnostics.training.evaluation import evaluate, find_verifier

    pair, _, held_out, evaluation = _pair_and_prompts(job, 0)
    verify = find_verifier(evaluation.verifier, pair=pair.name, prompts=held_out)
    bank = rollout(pair, held_out, max_new_tokens=job.grid["max_new_tokens"])
    write_parquet(job.folder / BANK, bank.to_frame())
    rows = evaluate(
        pair,
        held_out,
        bank=FrozenBank(pair, bank),
        verify=verify,
        samples=evaluation.eval_samples,
        max_new_tokens=job.grid["max_new_tokens"],
    )
    finish_cell(job, "untouched", rows, facts=pair.facts)


def run_cell(job: Job, cell: TrainingCell) -> str:
    """Train one cell and write its evaluation, its curve and, last, its record.

    Args:
        job: Settings of the grid, and its folder.
        cell: The training.

    Returns:
        A line for the log.
    """
    import torch

    from diagnostics.core.tables import write_parquet
    from diagnostics.core.types import read_bank
    from diagnostics.training.run import train

    began = time.perf_counter()
    pair, data, held_out, evaluation = _pair_and_prompts(job, cell.seed)
    config, engine = _configs_of(job, cell)
    untouched = read_parquet(job.folder / "untouched.parquet")
    bank = read_bank(job.folder / BANK)
    with scratch_folder(job, cell) as scratch:
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
    finish_cell(
        job,
        cell.name,
        pd.concat([rows, _first_gains(gains, bank)], ignore_index=True),
        cell=asdict(cell),
        seconds=round(seconds, 1),
        threads=torch.get_num_threads(),
    )
    return f"{cell.name}: {seconds:.0f} s"


def _configs_of(job: Job, cell: TrainingCell) -> tuple[TrainConfig, EngineConfig]:
    """What a cell trains, and how TRL runs it."""
    from diagnostics.training.config import EngineConfig, TrainConfig

    grid = job.grid
    config = TrainConfig(
        criterion=cell.criterion,
        budget=cell.budget,
        seed=cell.seed,
        **{key: grid[key] for key in ("steps", "batch", "learning_rate", "loss", "ties", "scope")},
    )
    engine = EngineConfig(
        **job.engine, max_new_tokens=grid["max_new_tokens"], save_every=0, probe_every=grid["steps"]
    )
    return config, engine


def _first_gains(gains: pd.DataFrame, bank) -> pd.DataFrame:
    """Gain of the frozen positions after the first step, as rows of an evaluation."""
    from diagnostics.analysis.training_outcomes import FIRST_STEP
    from diagnostics.training.evaluation import by_prompt

    prompt_ids = np.repeat(
        [context.prompt_id for context in bank], [len(context.response_ids) for context in bank]
    )
    return pd.concat(
        [by_prompt(measure, prompt_ids, gains[column]) for measure, column in FIRST_STEP.items()],
        ignore_index=True,
    )


def finish_cell(job: Job, name: str, rows: pd.DataFrame, **record) -> None:
    """Write a cell's table and then its record, which makes it finished.

    Args:
        job: Settings of the grid, and its folder.
        name: Name of the cell, or `untouched`.
        rows: Its table.
        record: What the record says beside settings, hashes and the code's version.
    """
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
    """Read the evaluations of the untouched student and of the finished cells.

    Args:
        folder: Folder of the cells.
        cells: The trainings; those without a record are left out.

    Returns:
        One row per training, measure and prompt, with columns criterion (`untouched` for the
        untouched student), budget, seed, measure, prompt_id, total, count.
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
