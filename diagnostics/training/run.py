"""TA-OPD training: on-policy distillation on the positions that a criterion selects.

    DIR/train.json                settings and hashes of models and data; a resumed run must agree
    DIR/metrics.jsonl             one line per step: loss, selected share, D, C and H on selected
                                  and on all positions, Jaccard index with other criteria, ...
    DIR/positions.jsonl           one line per step and tenth of the responses (`positions`)
    DIR/timings.jsonl             seconds and tokens per second of each step, which differ every run
    DIR/evaluations.parquet, .csv the student before, during and after (`evaluation`), one row per
                                  step and measure
    DIR/contexts.parquet          the frozen bank
    DIR/training_gains.parquet    gains of every frozen position after n steps: gain_step_<n>,
                                  relative_gain_step_<n>, reverse_gain_step_<n>
    DIR/checkpoints/              TRL's own checkpoints
    DIR/student/                  the trained student, and which prompts it was trained on

The order of prompts is drawn once for all steps, and every response has its own random stream, so a
run that was killed continues from its last whole checkpoint with the same results: student,
metrics, evaluations and gains are those of an uninterrupted run. Timings and checkpoints are not
(they hold times and states of generators). Defaults are those of arXiv 2605.26844: K = 16, budget
5 %, reverse KL, temperature 1, learning rate 1e-6 (2e-4 with LoRA).

Departure: the paper's loss is the policy gradient on the sampled token (`sampled` here); the
default is the full reverse KL, of which that loss is a sampled estimate."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.contexts.prompts import Given, any_prompts
from diagnostics.contexts.trained_prompts import write_trained_prompts
from diagnostics.contexts.verifiers import recorded_verifier
from diagnostics.core import distributed, files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.schema import read_parquet
from diagnostics.core.shown import sizes
from diagnostics.core.tables import write_csv, write_json, write_parquet
from diagnostics.core.types import Bank, Prompt
from diagnostics.models.named_pairs import TRAINING_OPTIMIZER
from diagnostics.models.topk_teacher import refuse
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.training import engine_options, trackers
from diagnostics.training.config import EngineConfig, TrainConfig
from diagnostics.training.evaluation import (
    EvaluationConfig,
    evaluate,
    find_verifier,
    summarize_evaluation,
)
from diagnostics.training.positions import by_tenth

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")

TIMINGS = ("step_time", "tokens_per_second")
"""Entries of a step's log that depend on the clock. They go to timings.jsonl, so that metrics.jsonl
is the same from every run.
"""
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
CUT_SHORT = (
    "PytorchStreamWriter failed",
    "inline_container",
    "unexpected pos",
    "No space left",
    "File too large",
    "I/O error",
    "quota exceeded",
)
"""Parts of the messages of torch's and safetensors' writers, which raise no OSError when a file
could not be written to its end.
"""


@dataclass
class TrainResult:
    """What `train` returns."""

    metrics: pd.DataFrame
    """The log of the training, one row per step."""
    evaluations: pd.DataFrame
    """Mean and interval of each measure at each evaluated step; step 0 is the untouched student."""
    student: Path
    """Folder of the trained student."""

    def __repr__(self) -> str:
        tables = {"metrics": self.metrics, "evaluations": self.evaluations}
        return sizes(f"TrainResult of {self.student} (rows)", tables)

    def _repr_html_(self) -> str:
        if self.evaluations.empty:
            return self.metrics.tail().to_html()
        return self.evaluations.pivot(index="step", columns="measure", values="mean").to_html(
            float_format="%.4g"
        )


def train(
    pair: Pair,
    prompts: Given,
    *,
    output_dir: str | Path,
    config: TrainConfig = TrainConfig(),
    engine: EngineConfig = EngineConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    held_out: Given = (),
    bank: Bank | None = None,
    untouched: pd.DataFrame | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Distill the pair's teacher into its student, in place, on the student's own responses.

    Under `accelerate launch` or `torchrun` every process calls this function alike.

    Args:
        pair: The student, which is trained in place, and its teacher.
        prompts: Prompts to train on, or what `load_prompts` reads: a path, texts, rows, or frozen
            contexts.
        output_dir: The run directory; see the module's head for its files.
        config: What is trained; `batch` is the global one.
        engine: How TRL runs the training.
        evaluation: How the student is evaluated.
        held_out: Prompts that are evaluated and never trained on, in the same forms; without any,
            nothing is evaluated.
        bank: Frozen contexts, for evaluation and `probe_every`.
        untouched: An evaluation of the student as it is, where one exists already.
        options: Further arguments of `SelectedDistillationTrainer`: callbacks (added to ours),
            optimizers, peft_config.

    Returns:
        Metrics (one row per step), evaluations (one row per step and measure, with intervals) and
        the folder of the trained student.

    Raises:
        DiagnosticsError: The settings do not fit together, a prompt is in both sets, the directory
            holds an unfinished training (unless `engine.resume`), one with other settings or one
            without a whole checkpoint, or disk or memory is exhausted.

    Reference:
        TA-OPD, arXiv 2605.26844.
    """
    from diagnostics.contexts.generation_settings import make_savable, warn_before_sampling

    directory = Path(output_dir)
    refuse(pair.teacher, "Training")
    engine_options.require_installed(engine.trl)
    prompts, held_out = any_prompts(prompts, pair), any_prompts(held_out, pair)
    trackers.require_tracker(engine.report_to, engine_options.trl_fields(engine.trl))
    _check_data(pair, prompts, held_out, config, engine)
    warn_before_sampling(pair)
    make_savable(pair.student.model)
    checkpoint = _prepare(
        directory,
        _fingerprint(pair, prompts, held_out, bank, config, engine, evaluation),
        resume=engine.resume,
    )
    monitor = TrainingMonitor(
        pair, directory, config, engine, evaluation, held_out, bank, untouched
    )
    with _without_deprecations():
        with _explained(engine):
            trainer = _trainer(
                pair, prompts, directory, config, engine, monitor, dict(options or {})
            )
        with _machine_named(directory), _explained(engine, begun=lambda: trainer.begun):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _keep_student(trainer, pair, prompts, config, directory)
    metrics = read_lines(directory / "metrics.jsonl")
    return TrainResult(metrics, monitor.summary(), directory / "student")


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """TRL 1.16 asks the model under a name that transformers 5.23 has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        yield


def _keep_student(
    trainer, pair, prompts: Sequence[Prompt], config: TrainConfig, directory: Path
) -> None:
    """Write the trained student, and which prompts it was trained on."""
    with _machine_named(directory):
        _save_student(trainer, pair, directory / "student")
        if distributed.is_main():
            drawn = schedule(prompts, config.steps * config.batch, seed=config.seed)
            write_trained_prompts(directory / "student", drawn)
    distributed.barrier()


# --- data and identity ---


def _check_data(
    pair,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    config: TrainConfig,
    engine: EngineConfig,
) -> None:
    if pair.offload_teacher:
        raise DiagnosticsError(
            "Training needs teacher and student on the device at once. Leave out --offload-teacher;"
            " --teacher-dtype bfloat16 saves memory."
        )
    parts = engine.accumulation * distributed.world()
    if config.batch % parts:
        raise DiagnosticsError(
            f"A batch of {config.batch} responses cannot be shared by {distributed.world()}"
            f" processes with {engine.accumulation} micro-batches each. Choose a multiple of"
            f" {parts}."
        )
    if not prompts:
        raise DiagnosticsError(
            "No prompts are left to train on. Give more prompts, or fewer --eval-contexts."
        )
    if any(prompt.teacher_prompt is not None for prompt in (*prompts, *held_out)):
        raise DiagnosticsError(
            "Prompts with a hint or a teacher_prompt can be scored and probed; training lets both"
            " models read one prompt. Leave those columns out."
        )
    both = {p.prompt_id for p in prompts} & {p.prompt_id for p in held_out}
    if both:
        raise DiagnosticsError(
            f"{len(both)} prompts are trained on and held out as well, among them {min(both)!r}."
            " Remove them from one set."
        )


def schedule(prompts: Sequence[Prompt], count: int, *, seed: int) -> list[Prompt]:
    """Draw the training order.

    Args:
        prompts: Prompts to train on.
        count: Number of prompts in all.
        seed: Seed of the order.

    Returns:
        `count` prompts, shuffled again for every pass over them.
    """
    generator, order = np.random.default_rng([seed, 7]), []
    while len(order) < count:
        order += generator.permutation(len(prompts)).tolist()
    return [prompts[i] for i in order[:count]]


def _fingerprint(pair, prompts, held_out, bank, config, engine, evaluation) -> dict[str, Any]:
    """Settings and hashes that a resumed training must share."""

    def digest(items) -> str:
        return hashlib.sha256(json.dumps(items).encode()).hexdigest()

    settings = (
        asdict(config)
        | asdict(engine)
        | asdict(evaluation)
        | recorded_verifier(evaluation.verifier)
        | {"learning_rate": config.rate(pair.name, engine.lora_rank)}
    )
    settings = {
        key: value
        for key, value in settings.items()
        if key not in ("resume", "save_every", "trl", "peft", "eval_prompts", "report_to")
        # An earlier version had neither of these, and its trainings can be resumed.
        and (key, value) not in (("per_context_minimum", 0), ("measure_every", 1))
    }
    return settings | {
        "trl": engine_options.trl_fields(engine.trl),
        "peft": engine_options.peft_fields(engine.peft) or None,
        "student": pair.facts["student"]["weights_sha256"],
        "teacher": pair.facts["teacher"]["weights_sha256"],
        "prompts": digest([p.prompt for p in prompts]),
        "held_out": digest([[p.prompt, p.answer] for p in held_out]),
        "bank": None if bank is None else digest([context.ids for context in bank]),
    }


def _prepare(directory: Path, fingerprint: dict, *, resume: bool) -> Path | None:
    """Write train.json, or compare with the existing one; returns the checkpoint to resume from."""
    _refuse_links(directory)
    path, checkpoint = directory / "train.json", last_checkpoint(directory / "checkpoints")
    if path.exists() and checkpoint is not None:
        if not resume:
            raise DiagnosticsError(
                f"{directory} holds a training that stopped at or after step"
                f" {_step_of(checkpoint)}. Pass --resume to go on from there, or choose another"
                " --output-dir."
            )
        earlier, now = _earlier_settings(path), json.loads(json.dumps(fingerprint))
        keys = sorted(
            key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key)
        )
        different = [f"{key}: was {earlier.get(key)!r}, now {now.get(key)!r}" for key in keys]
        if different:
            raise DiagnosticsError(
                f"{directory} holds a training with other settings ({'; '.join(different)}). Resume"
                " with the earlier ones."
            )
    distributed.barrier()
    write_json(path, fingerprint)
    return checkpoint


def _refuse_links(directory: Path) -> None:
    """Refuse links in the folders in which TRL writes and deletes.

    A link would lead it out of the run directory.
    """
    folders = [directory / "checkpoints", directory / "student"]
    for path in [
        *folders,
        *(
            found
            for folder in folders
            if folder.is_dir() and not folder.is_symlink()
            for found in folder.iterdir()
        ),
    ]:
        if path.is_symlink():
            raise DiagnosticsError(
                f"{path} is a link, which training would write through. Remove it, or choose"
                " another --output-dir."
            )


def _earlier_settings(path: Path) -> dict:
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DiagnosticsError(
            f"{path} cannot be read ({error}), so it is unknown what was trained. Choose another"
            " --output-dir."
        ) from error
    if not isinstance(earlier, dict):
        raise DiagnosticsError(
            f"{path} holds no settings, so it is unknown what was trained. Choose another"
            " --output-dir."
        )
    return earlier


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole.

    TRL writes trainer_state.json last, so a checkpoint without it was never finished. A finished
    one with a cut or missing file is passed over with a warning.

    Args:
        folder: Folder of the checkpoints.

    Returns:
        The checkpoint's folder, or None where none was finished.

    Raises:
        DiagnosticsError: Checkpoints were finished, and none of them is whole.
    """
    finished = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _is_json(path / "trainer_state.json")
    ]
    damaged = []
    for path in sorted(finished, key=_step_of, reverse=True):
        reason = _damage(path)
        if reason is None:
            return path
        log.warning("%s is passed over: %s", path.name, reason)
        damaged.append(f"{path.name}: {reason}")
    if damaged:
        raise DiagnosticsError(
            f"{folder} has no whole checkpoint to go on from ({'; '.join(damaged)}). Bring the"
            " files back, or choose another --output-dir."
        )
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _damage(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint; None where it is whole.

    Lengths and ends of files are checked, not every byte.
    """
    parts = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in parts:
        if path.suffix == ".safetensors" and not _ends_as_it_says(path):
            return f"{path.name} is cut short"
        if path.suffix in (".pt", ".bin", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    names = {path.name for path in parts}
    if not any(name.endswith((".safetensors", ".bin", ".distcp")) for name in names):
        return "its weights are missing"
    if not any(
        name.startswith("optimizer") or ".distcp" in name or name.endswith("_optim_states.pt")
        for name in names
    ):
        return "its optimizer is missing"
    return None


def _ends_as_it_says(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            entries = [
                entry
                for name, entry in json.loads(file.read(length)).items()
                if name != "__metadata__"
            ]
            return size == 8 + length + max(
                (entry["data_offsets"][1] for entry in entries), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return False


# --- errors of other libraries and of the machine ---


@contextmanager
def _explained(engine: EngineConfig, *, begun=lambda: False) -> Iterator[None]:
    """Turn an error of TRL, Accelerate, peft or the optimizer before the first step into one
    sentence.
    """
    try:
        yield
    except DiagnosticsError:
        raise
    except (TypeError, ValueError, KeyError, ImportError, NotImplementedError, re.error) as error:
        if begun():
            raise
        given = (
            " and ".join(
                name for name in (engine.trl and "--trl", engine.peft and "--peft") if name
            )
            or "the flags"
        )
        raise DiagnosticsError(
            "TRL and its engines do not take these settings:"
            f" {(str(error).splitlines() or [type(error).__name__])[0]} Correct {given}."
        ) from error


@contextmanager
def _machine_named(directory: Path) -> Iterator[None]:
    """Turn an error about a full disk, a file size limit or full memory into one sentence with a
    remedy.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DiagnosticsError(
            f"A step does not fit in memory ({_first_line(error)}). Raise --accumulation, set"
            ' "activation_checkpointing": true in --trl, or lower --max-new-tokens; --resume goes'
            " on from the last checkpoint."
        ) from error
    except Exception as error:
        if not _cannot_write(error):
            raise
        raise DiagnosticsError(
            f"The training's files in {directory} cannot be written ({_first_line(error)}). What"
            " was finished is kept. Make room or lift the limit, and give the same command with"
            " --resume."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cannot_write(error: BaseException | None) -> bool:
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NO_ROOM) or any(
            sign in str(error) for sign in CUT_SHORT
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- TRL ---


def trl_config(
    directory: Path, config: TrainConfig, engine: EngineConfig, *, rate: float, cpu: bool = True
):
    """TRL's DistillationConfig.

    It has full precision and no activation checkpointing unless `engine.trl` asks for them.

    Args:
        directory: The run directory.
        config: What is trained.
        engine: How TRL runs it.
        rate: The learning rate in force.
        cpu: Whether the student is on the CPU, where several processes only join when told so.

    Returns:
        The configuration, of TRL's own class.

    Raises:
        DiagnosticsError: A field has no effect here, or TRL refuses it.
    """
    from trl import DistillationConfig

    fields = {
        "bf16": False,
        "activation_checkpointing": False,
        "disable_dropout": True,
        "disable_tqdm": True,
        "save_total_limit": 2,
        "dataloader_pin_memory": not cpu,
        "use_cpu": cpu,
    } | TRAINING_OPTIMIZER
    fields |= engine_options.trl_fields(engine.trl) | trackers.trl_fields(
        engine.report_to, directory
    )
    engine_options.require_noise(fields, engine.peft)
    if cpu and fields.get("fp16"):
        raise DiagnosticsError(
            'fp16 has no effect on the CPU. Use "bf16": true in --trl there, or a GPU.'
        )
    with _explained(engine):
        return DistillationConfig(
            output_dir=str(directory / "checkpoints"),
            max_steps=config.steps,
            seed=config.seed,
            learning_rate=rate,
            per_device_train_batch_size=config.batch // (engine.accumulation * distributed.world()),
            gradient_accumulation_steps=engine.accumulation,
            max_completion_length=engine.max_new_tokens,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="steps" if engine.save_every else "no",
            save_steps=engine.save_every or 1,
            **fields,
        )


def _trainer(
    pair,
    prompts,
    directory: Path,
    config: TrainConfig,
    engine: EngineConfig,
    monitor: TrainingMonitor,
    options: dict[str, Any],
):
    from transformers import PrinterCallback, set_seed

    from diagnostics.training.trl_trainer import SelectedDistillationTrainer

    needed = config.steps * config.batch
    adapter = engine_options.lora_config(engine.lora_rank, engine.peft)
    callbacks = _callbacks(engine, directory, monitor, options.pop("callbacks", []))
    set_seed(config.seed)  # an adapter starts from random numbers, the same in every process
    trainer = SelectedDistillationTrainer(
        pair,
        _selection(config, engine),
        args=trl_config(
            directory,
            config,
            engine,
            rate=config.rate(pair.name, engine.lora_rank),
            cpu=pair.student.device.type == "cpu",
        ),
        train_dataset=_dataset(pair, schedule(prompts, needed, seed=config.seed), engine),
        callbacks=callbacks,
        **{"peft_config": adapter} | options,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.num_processes != distributed.world():
        raise DiagnosticsError(
            f"{distributed.world()} processes were started and TRL trains in"
            f" {trainer.accelerator.num_processes}. Start them with torchrun or `accelerate launch"
            " --multi_gpu`."
        )
    monitor.require_whole(trainer)
    trainer.watch = monitor.keep_positions
    return trainer


def _selection(config: TrainConfig, engine: EngineConfig):
    """What the trainer selects by, of its own class."""
    from diagnostics.training.trl_trainer import Selection

    return Selection(
        config.criterion,
        config.budget,
        loss=config.loss,
        beta=config.beta,
        k=config.k,
        seed=config.seed,
        ties=config.ties,
        scope=config.scope,
        per_context_minimum=config.per_context_minimum,
        measure_every=engine.measure_every,
    )


def _callbacks(
    engine: EngineConfig, directory: Path, monitor: TrainingMonitor, own: Sequence
) -> list:
    """The monitor's callback, those of trackers in the run directory, and the caller's own."""
    asked = (engine.report_to, *engine_options.trackers(engine_options.trl_fields(engine.trl)))
    monitor.tables = trackers.tables_of(asked, directory)
    return [monitor.callback(), *trackers.callbacks_of(monitor.tables), *own]


def _dataset(pair: Pair, order: Sequence[Prompt], engine: EngineConfig):
    """The prompts in training order, as `SelectedDistillationTrainer` reads them."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": [prompt.prompt for prompt in order],
            "ids": _ids(pair, order, engine),
            "row": list(range(len(order))),
        }
    )


def _ids(pair: Pair, order: Sequence[Prompt], engine: EngineConfig) -> list[list[int]]:
    """The ids of each prompt, as in sampling and scoring.

    TRL would add the tokenizer's special tokens to the rendered text.
    """
    from diagnostics.contexts.rollouts import encode_prompts

    distinct = list({id(prompt): prompt for prompt in order}.values())
    known = dict(
        zip(
            map(id, distinct),
            map(list, encode_prompts(pair, distinct, max_new_tokens=engine.max_new_tokens)),
        )
    )
    return [known[id(prompt)] for prompt in order]


def _save_student(trainer, pair: Pair, folder: Path) -> None:
    """Write the trained student as one model, adapters merged in, and its tokenizer.

    Adapters are merged on the first process, from whole weights. An adapter on a quantized student
    is written by itself, since merging would round it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if hasattr(model, "merge_and_unload") and not getattr(
        model.get_base_model(), "is_quantized", False
    ):
        model = (
            (_whole(model, state) if distributed.is_main() else None)
            if state is not None
            else model
        )
        model, state = model and model.merge_and_unload(), None
    if distributed.is_main():
        from diagnostics.training.trl_trainer import name_base

        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        name_base(folder)
        pair.tokenizer.save_pretrained(folder)


def _whole(sharded, state: dict):
    """A copy on the CPU of a sharded model with adapters, from its gathered weights."""
    import copy

    from peft import get_peft_model

    base = sharded.get_base_model()
    whole = get_peft_model(
        type(base)(copy.deepcopy(base.config)), copy.deepcopy(sharded.peft_config["default"])
    )
    missing = set(whole.load_state_dict(state, strict=False).missing_keys)
    tied = {name for name, _ in whole.named_parameters(remove_duplicate=False)} - {
        name for name, _ in whole.named_parameters()
    }
    if missing - tied:
        raise DiagnosticsError(
            f"The gathered student lacks {min(missing - tied)}, so it cannot be saved whole. Its"
            " checkpoints hold what was trained."
        )
    return whole


# --- the monitor ---


class TrainingMonitor:
    """Writes metrics, evaluations and gains at the steps that are due while TRL trains.

    Args:
        pair: Student and teacher.
        directory: The run directory.
        config: What is trained.
        engine: How TRL runs it.
        evaluation: How the student is evaluated.
        held_out: Prompts to evaluate on; none turns evaluation off.
        bank: Frozen contexts, or None.
        untouched: An evaluation of the student as it is, where one exists already.

    Raises:
        DiagnosticsError: `engine.probe_every` is set without a bank.
    """

    def __init__(
        self,
        pair,
        directory: Path,
        config: TrainConfig,
        engine: EngineConfig,
        evaluation: EvaluationConfig,
        held_out,
        bank,
        untouched=None,
    ):
        self.pair, self.directory, self.config, self.engine, self.evaluation = (
            pair,
            directory,
            config,
            engine,
            evaluation,
        )
        self.held_out, self.untouched = list(held_out), untouched
        self.verify = (
            find_verifier(evaluation.verifier, pair=pair.name, prompts=self.held_out)
            if self.held_out
            else None
        )
        self.frozen = FrozenBank(pair, bank) if bank is not None else None
        self.tables: Sequence[trackers.Tables] = ()
        """Where the selection's log and the evaluations go as tables, beside the run directory."""
        if engine.probe_every and bank is None:
            raise DiagnosticsError(
                "probe_every re-scores a frozen bank, and there is none. Give held-out prompts or a"
                " contexts.parquet."
            )

    def require_whole(self, trainer) -> None:
        """Refuse to evaluate a sharded student.

        Evaluation calls the model outside TRL's wrappers, where a process has only its shard.
        """
        sharded = trainer.is_fsdp_enabled or (
            trainer.is_deepspeed_enabled
            and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        if sharded and (self.held_out or self.frozen):
            raise DiagnosticsError(
                "The student is sharded, and a shard cannot be evaluated during training. Pass"
                " --eval-contexts 0, and evaluate checkpoints afterwards with diagnostics.evaluate."
            )

    def callback(self):
        """The transformers callback that calls this monitor."""
        from transformers import TrainerCallback

        monitor = self

        class Watch(TrainerCallback):
            """Passes TRL's events on."""

            def on_train_begin(self, args, state, control, **_):
                monitor.begin(state.global_step)

            def on_step_end(self, args, state, control, **_):
                monitor.after_step(state.global_step)

            def on_log(self, args, state, control, logs=None, **_):
                if logs and "loss" in logs:
                    monitor.log(state.global_step, logs)

        return Watch()

    def path(self, name: str) -> Path:
        """The path of a file of the run."""
        return self.directory / name

    def begin(self, step: int) -> None:
        """Remove records of later steps than `step`; at step 0 evaluate the untouched student.

        Args:
            step: 0, or the checkpoint's step.
        """
        if distributed.is_main():
            for name in ("metrics.jsonl", "timings.jsonl", "positions.jsonl"):
                lines = read_lines(self.path(name))
                lines = lines[lines["step"] <= step] if len(lines) else lines
                write_atomic(
                    self.path(name),
                    "".join(_line(row) for row in lines.to_dict("records")).encode(),
                )
        if step == 0:
            self._evaluate(0)
            self._start_gains()
            return
        for name, keep in (
            ("evaluations.parquet", self._earlier_rows),
            ("training_gains.parquet", _earlier_columns),
        ):
            if self.path(name).exists():
                write_parquet(self.path(name), keep(read_parquet(self.path(name)), step))

    @staticmethod
    def _earlier_rows(table: pd.DataFrame, step: int) -> pd.DataFrame:
        return table[table["step"] <= step]

    def after_step(self, step: int) -> None:
        """Evaluate the student and score the bank again where that is due after `step`."""
        every, last = self.evaluation.eval_every, step == self.config.steps
        if last or (every and step % every == 0):
            self._evaluate(step)
        every = self.engine.probe_every
        if every and (step == 1 or last or step % every == 0):
            self._gains(step)

    def log(self, step: int, logs: dict[str, float]) -> None:
        """Append one step to metrics.jsonl, and its timings to timings.jsonl."""
        if not distributed.is_main():
            return
        _append(
            self.path("metrics.jsonl"),
            {"step": step} | {name: value for name, value in logs.items() if name not in TIMINGS},
        )
        _append(
            self.path("timings.jsonl"),
            {"step": step} | {name: logs[name] for name in TIMINGS if name in logs},
        )
        if step == self.config.steps:
            self._log_tables(step)
        if step % max(1, self.config.steps // 10) == 0:
            log.info(
                "step %d of %d: loss %.4f, %.0f tokens/s",
                step,
                self.config.steps,
                logs["loss"],
                logs.get("tokens_per_second") or math.nan,
            )

    def keep_positions(self, step: int, tokens: pd.DataFrame, weights: np.ndarray) -> None:
        """Append a step's means by tenth of the responses to positions.jsonl."""
        if distributed.is_main():
            for row in by_tenth(tokens, weights).to_dict("records"):
                _append(self.path("positions.jsonl"), {"step": step} | row)

    def _log_tables(self, step: int) -> None:
        """Give the trackers the log of the selection and the evaluations as tables."""
        found = {"selection_log": read_lines(self.path("metrics.jsonl"))}
        if self.held_out:
            found["evaluations"] = self.summary()
        for tables in self.tables:
            tables.log(found, step)

    def _evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        rows = (
            self.untouched
            if step == 0 and self.untouched is not None
            else evaluate(
                self.pair,
                self.held_out,
                bank=self.frozen,
                verify=self.verify,
                samples=self.evaluation.eval_samples,
                max_new_tokens=self.engine.max_new_tokens,
            )
        )
        rows = rows.assign(step=step)
        earlier = (
            read_parquet(self.path("evaluations.parquet"))
            if step and self.path("evaluations.parquet").exists()
            else rows[:0]
        )
        rows = (
            pd.concat([earlier[earlier["step"] < step], rows], ignore_index=True)
            if len(earlier)
            else rows
        )
        distributed.barrier()
        write_parquet(self.path("evaluations.parquet"), rows)
        write_csv(self.path("evaluations.csv"), self.summary(rows))
        distributed.barrier()
        now = self.summary(rows[rows["step"] == step]).set_index("measure")["mean"]
        log.info(
            "step %d, held out: %s",
            step,
            ", ".join(f"{name} {value:.4g}" for name, value in now.items()),
        )

    def summary(self, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Mean and interval of each measure at each evaluated step.

        Args:
            rows: Evaluations with a column step; None reads the run's file.
        """
        if rows is None:
            rows = (
                read_parquet(self.path("evaluations.parquet"))
                if self.held_out
                else pd.DataFrame({"step": []})
            )
        tables = [
            summarize_evaluation(part).assign(step=step) for step, part in rows.groupby("step")
        ]
        return (
            pd.concat(tables, ignore_index=True)
            if tables
            else pd.DataFrame(columns=["step", "measure", "mean"])
        )

    def _start_gains(self) -> None:
        if not self.engine.probe_every:
            return
        forward, reverse = self.frozen.divergences()
        keys = [
            (context.context_id, position)
            for context in self.frozen.bank
            for position in range(len(context.sampled_ids))
        ]
        table = pd.DataFrame(keys, columns=["context_id", "position"]).assign(
            forward_kl_step_0=forward, reverse_kl_step_0=reverse
        )
        write_parquet(self.path("training_gains.parquet"), table)
        distributed.barrier()

    def _gains(self, step: int) -> None:
        from diagnostics.core.formulas import gains

        table, model = read_parquet(self.path("training_gains.parquet")), self.pair.student.model
        training = model.training
        model.eval()
        after = self.frozen.divergences()
        model.train(training)
        found = gains(
            (table["forward_kl_step_0"].to_numpy(), table["reverse_kl_step_0"].to_numpy()), after
        )
        distributed.barrier()
        kept = {f"{name}_step_{step}": found[name] for name in GAINS}
        write_parquet(self.path("training_gains.parquet"), table.assign(**kept))
        distributed.barrier()


GAINS = ("gain", "relative_gain", "reverse_gain")
"""Outcomes that are kept for every measured step n as `<name>_step_<n>`."""


def _earlier_columns(table: pd.DataFrame, step: int) -> pd.DataFrame:
    late = [
        name for name in table.columns if "_step_" in name and int(name.rpartition("_")[2]) > step
    ]
    return table.drop(columns=late)


def _append(path: Path, row: dict) -> None:
    """Append a line to a file of the run, never through a link."""
    with os.fdopen(
        files.open_inside(path.parent, path.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a"
    ) as file:
        file.write(_line(row))


def _line(row: dict) -> str:
    """One JSON line; numbers that are not finite become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(clean) + "\n"


def read_lines(path: Path) -> pd.DataFrame:
    """Read a metrics.jsonl as a table; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return pd.DataFrame(rows)
