"""TA-OPD training: on-policy distillation on the positions that a criterion selects, watched from outside.

    DIR/train.json                what is trained, with hashes of models and data; a resumed run must agree
    DIR/metrics.jsonl             one line a step: loss, selected share, D, C and H on selected and all, Jaccard, ...
    DIR/evaluations.parquet, .csv the student before, during and after (`evaluation`), a row a step and measure
    DIR/contexts.parquet          the frozen bank
    DIR/training_gains.parquet    gain of every frozen position after n steps: gain_step_<n> and its kin
    DIR/checkpoints/              TRL's own; DIR/student/ the trained student

The order of prompts is drawn once for all steps, and every response has its own random stream, so a run that
was killed goes on from its last checkpoint as if nothing had happened. Defaults are those of arXiv 2605.26844: K = 16,
budget 5 %, reverse KL, temperature 1, learning rate 1e-6 (2e-4 with LoRA).

Departure: the paper's loss is the policy gradient on the sampled token (`sampled` here); the default is the full
reverse KL whose expectation that is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics import parallel
from diagnostics.evaluation import EvaluationConfig, FrozenBank, evaluate, find_verifier, summarise_evaluation
from diagnostics.losses import LOSSES
from diagnostics.pairs import NAMED_PAIRS
from diagnostics.remote import refuse
from diagnostics.runs import write_csv, write_json, write_parquet
from diagnostics.types import Bank, DiagnosticsError, Prompt, read_parquet

if TYPE_CHECKING:
    from diagnostics.pairs import Pair

log = logging.getLogger("diagnostics")

FULL_RATE, LORA_RATE = 1e-6, 2e-4
OURS = ("output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_completion_length",
        "beta", "temperature", "shuffle_dataset", "seed", "logging_steps", "save_strategy", "save_steps", "remove_unused_columns",
        "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "max_tool_calling_iterations")
"""DistillationConfig fields that our own settings decide, or that our sampling does not know."""


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on."""

    criterion: str = field(default="teachability", metadata={"help": "which positions carry loss; see `criteria`"})
    budget: float | None = field(default=None, metadata={"help": "share of positions; the criterion's own where not given"})
    loss: str = field(default="reverse_kl", metadata={"help": "OPD loss", "choices": LOSSES})
    beta: float = field(default=0.5, metadata={"help": "teacher's share in the mixture of jsd"})
    k: int = field(default=16, metadata={"help": "size of the top-K supports"})
    steps: int = field(default=150, metadata={"help": "optimiser steps"})
    batch: int = field(default=16, metadata={"help": "responses in a step, over all processes and accumulation"})
    learning_rate: float | None = field(default=None, metadata={"help": "1e-6, 2e-4 with LoRA, or the named pair's where not given"})
    seed: int = field(default=0, metadata={"help": "seed of data order, sampling and random selection"})

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1:
            raise DiagnosticsError(f"Training needs steps and responses; got steps={self.steps}, batch={self.batch}.")

    def rate(self, pair: str, lora_rank: int) -> float:
        """The learning rate in force."""
        named = NAMED_PAIRS.get(pair)
        fallback = LORA_RATE if lora_rank else named.learning_rate if named else FULL_RATE
        return fallback if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class EngineConfig:
    """How TRL runs it."""

    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches in a step on each process"})
    lora_rank: int = field(default=0, metadata={"help": "train a LoRA of this rank (needs peft); 0 trains all weights"})
    save_every: int = field(default=50, metadata={"help": "checkpoint after every so many steps; 0: none"})
    probe_every: int = field(default=0, metadata={"help": "re-score the frozen bank after step 1, every so many steps and the last; 0: never"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output directory"})
    trl: str | None = field(default=None, metadata={"help": "JSON file with further fields of TRL's DistillationConfig (vLLM, bf16, …)"})


@dataclass
class TrainResult:
    """What a training left behind, as tables and folders."""

    metrics: pd.DataFrame
    """One row a step."""
    evaluations: pd.DataFrame
    """Mean and interval of each measure at each evaluated step; step 0 is the untouched student."""
    student: Path

    def _repr_html_(self) -> str:
        if self.evaluations.empty:
            return self.metrics.tail().to_html()
        return self.evaluations.pivot(index="step", columns="measure", values="mean").to_html(float_format="%.4g")


def train(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    output_dir: str | Path,
    config: TrainConfig = TrainConfig(),
    engine: EngineConfig = EngineConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    held_out: Sequence[Prompt] = (),
    bank: Bank | None = None,
    untouched: pd.DataFrame | None = None,
) -> TrainResult:
    """Distil the pair's teacher into its student, in place, on the student's own responses to `prompts`.

    held_out: prompts that are evaluated and never trained on; none turns evaluation off. bank: frozen contexts for
    evaluation and `probe_every`. untouched: an evaluation of the student as it is, where one was made already.
    Under `accelerate launch` or `torchrun` every process calls this alike; `batch` is the global one.
    Raises DiagnosticsError for settings that do not fit together, prompts in both sets, a directory with an unfinished
    training (unless `engine.resume`), or one of other settings.
    """
    from diagnostics.rollouts import make_savable, say_cautions

    directory = Path(output_dir)
    refuse(pair.teacher, "Training")
    _check_data(pair, prompts, held_out, config, engine)
    say_cautions(pair)
    make_savable(pair.student.model)
    checkpoint = _prepare(directory, _fingerprint(pair, prompts, held_out, bank, config, engine, evaluation), resume=engine.resume)
    watcher = Watcher(pair, directory, config, engine, evaluation, held_out, bank, untouched)
    with warnings.catch_warnings():
        # TRL 1.16 asks the model under a name that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        trainer = _trainer(pair, prompts, directory, config, engine, watcher)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _save_student(trainer, pair, directory / "student")
    parallel.barrier()
    return TrainResult(read_lines(directory / "metrics.jsonl"), watcher.summary(), directory / "student")


# --- data and identity ------------------------------------------------------------------------------


def _check_data(pair, prompts: Sequence[Prompt], held_out: Sequence[Prompt], config: TrainConfig, engine: EngineConfig) -> None:
    if pair.offload_teacher:
        raise DiagnosticsError("Training needs teacher and student on the device at once. Leave out --offload-teacher; --teacher-dtype bfloat16 saves memory.")
    parts = engine.accumulation * parallel.world()
    if config.batch % parts:
        raise DiagnosticsError(
            f"A batch of {config.batch} responses cannot be shared by {parallel.world()} processes with {engine.accumulation} "
            f"micro-batches each. Choose a multiple of {parts}."
        )
    if not prompts:
        raise DiagnosticsError("No prompts are left to train on. Give more prompts, or fewer --eval-contexts.")
    if any(prompt.teacher_prompt is not None for prompt in (*prompts, *held_out)):
        raise DiagnosticsError("Prompts with a hint or a teacher_prompt can be scored and probed; training lets both models read one prompt. Leave those columns out.")
    both = {p.prompt_id for p in prompts} & {p.prompt_id for p in held_out}
    if both:
        raise DiagnosticsError(f"{len(both)} prompts are trained on and held out as well, among them {min(both)!r}. Remove them from one set.")


def schedule(prompts: Sequence[Prompt], count: int, *, seed: int) -> list[Prompt]:
    """`count` prompts in training order: shuffled anew for every pass over them."""
    generator, order = np.random.default_rng([seed, 7]), []
    while len(order) < count:
        order += generator.permutation(len(prompts)).tolist()
    return [prompts[i] for i in order[:count]]


def _fingerprint(pair, prompts, held_out, bank, config, engine, evaluation) -> dict[str, Any]:
    """What makes two trainings the same one."""
    def digest(items) -> str:
        return hashlib.sha256(json.dumps(items).encode()).hexdigest()

    settings = asdict(config) | asdict(engine) | asdict(evaluation) | {"learning_rate": config.rate(pair.name, engine.lora_rank)}
    settings = {key: value for key, value in settings.items() if key not in ("resume", "save_every", "trl", "eval_prompts")}
    return settings | {
        "trl": _trl_fields(engine.trl),
        "student": pair.facts["student"]["weights_sha256"], "teacher": pair.facts["teacher"]["weights_sha256"],
        "prompts": digest([p.prompt for p in prompts]), "held_out": digest([[p.prompt, p.answer] for p in held_out]),
        "bank": None if bank is None else digest([context.ids for context in bank]),
    }


def _prepare(directory: Path, fingerprint: dict, *, resume: bool) -> Path | None:
    """Write train.json, or compare with the one that is there; the checkpoint to go on from."""
    path, checkpoint = directory / "train.json", last_checkpoint(directory / "checkpoints")
    if path.exists() and checkpoint is not None:
        if not resume:
            raise DiagnosticsError(
                f"{directory} holds a training that stopped at or after step {_step_of(checkpoint)}. Pass --resume to go on from there, "
                "or choose another --output-dir."
            )
        earlier, now = json.loads(path.read_text()), json.loads(json.dumps(fingerprint))
        keys = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
        different = [f"{key}: was {earlier.get(key)!r}, now {now.get(key)!r}" for key in keys]
        if different:
            raise DiagnosticsError(f"{directory} holds a training with other settings ({'; '.join(different)}). Resume with the earlier ones.")
    parallel.barrier()
    write_json(path, fingerprint)
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; TRL writes trainer_state.json last."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


# --- TRL --------------------------------------------------------------------------------------------


def _trl_fields(path: str | None) -> dict[str, Any]:
    """Further DistillationConfig fields from a JSON file."""
    if path is None:
        return {}
    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DiagnosticsError(f"{path} cannot be read as JSON ({error}). Give an object of DistillationConfig fields.") from error
    if not isinstance(fields, dict):
        raise DiagnosticsError(f"{path} holds a {type(fields).__name__}, not an object. Give an object of DistillationConfig fields.")
    taken = [name for name in OURS if name in fields]
    if taken:
        raise DiagnosticsError(f"{path} sets {', '.join(taken)}, which this program's own flags decide or do not support. Remove them there.")
    return fields


def trl_config(directory: Path, config: TrainConfig, engine: EngineConfig, *, rate: float, cpu: bool = True):
    """TRL's DistillationConfig. Full precision and no activation checkpointing unless the file asks for them.

    cpu: the student is there; several processes join on the CPU only when told so. Raises DiagnosticsError for a field
    that TRL does not know or refuses.
    """
    from trl import DistillationConfig

    fields = {"bf16": False, "activation_checkpointing": False, "disable_dropout": True, "disable_tqdm": True, "save_total_limit": 2,
              "dataloader_pin_memory": not cpu, "use_cpu": cpu}
    fields |= {"report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none"} | _trl_fields(engine.trl)
    try:
        return DistillationConfig(
            output_dir=str(directory / "checkpoints"), max_steps=config.steps, seed=config.seed, learning_rate=rate,
            per_device_train_batch_size=config.batch // (engine.accumulation * parallel.world()), gradient_accumulation_steps=engine.accumulation,
            max_completion_length=engine.max_new_tokens, shuffle_dataset=False, logging_steps=1,
            save_strategy="steps" if engine.save_every else "no", save_steps=engine.save_every or 1, **fields,
        )
    except (TypeError, ValueError) as error:
        raise DiagnosticsError(f"TRL does not take these settings: {error}. Mend {engine.trl or 'the flags'}.") from error


def _trainer(pair, prompts, directory: Path, config: TrainConfig, engine: EngineConfig, watcher: Watcher):
    from datasets import Dataset
    from transformers import PrinterCallback

    from diagnostics.trainer import SelectedDistillationTrainer, Selection

    order = schedule(prompts, config.steps * config.batch, seed=config.seed)
    trainer = SelectedDistillationTrainer(
        pair,
        Selection(config.criterion, config.budget, loss=config.loss, beta=config.beta, k=config.k, seed=config.seed),
        args=trl_config(directory, config, engine, rate=config.rate(pair.name, engine.lora_rank), cpu=pair.student.device.type == "cpu"),
        train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in order], "ids": _ids(pair, order, engine), "row": list(range(len(order)))}),
        callbacks=[watcher.callback()],
        peft_config=_lora(engine.lora_rank),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.num_processes != parallel.world():
        raise DiagnosticsError(
            f"{parallel.world()} processes were started and TRL trains in {trainer.accelerator.num_processes}. "
            "Start them with torchrun or `accelerate launch --multi_gpu`."
        )
    watcher.require_whole(trainer)
    return trainer


def _ids(pair: Pair, order: Sequence[Prompt], engine: EngineConfig) -> list[list[int]]:
    """Each prompt's ids, as sampling and scoring have them: TRL would put the tokenizer's special tokens around the rendered text."""
    from diagnostics.rollouts import encode

    distinct = list({id(prompt): prompt for prompt in order}.values())
    known = dict(zip(map(id, distinct), map(list, encode(pair, distinct, max_new_tokens=engine.max_new_tokens))))
    return [known[id(prompt)] for prompt in order]


def _lora(rank: int):
    if not rank:
        return None
    if not importlib.util.find_spec("peft"):
        raise DiagnosticsError(f"A LoRA of rank {rank} needs the package peft. Run `pip install peft`, or train all weights with --lora-rank 0.")
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _save_student(trainer, pair: Pair, folder: Path) -> None:
    """Write the trained student as one model, adapters merged in, and its tokenizer."""
    from transformers.utils import is_peft_available

    if is_peft_available() and hasattr(trainer.model, "merge_and_unload"):
        trainer.model.merge_and_unload().save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    if parallel.is_main():
        pair.tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)


# --- watching ---------------------------------------------------------------------------------------


class Watcher:
    """Writes metrics, evaluations and gains while TRL trains; knows which steps are due."""

    def __init__(
        self, pair, directory: Path, config: TrainConfig, engine: EngineConfig, evaluation: EvaluationConfig, held_out, bank, untouched=None
    ):
        self.pair, self.directory, self.config, self.engine, self.evaluation = pair, directory, config, engine, evaluation
        self.held_out, self.untouched = list(held_out), untouched
        self.verify = find_verifier(evaluation.verifier, pair=pair.name, prompts=self.held_out) if self.held_out else None
        self.frozen = FrozenBank(pair, bank) if bank is not None else None
        if engine.probe_every and bank is None:
            raise DiagnosticsError("probe_every re-scores a frozen bank, and there is none. Give held-out prompts or a contexts.parquet.")

    def require_whole(self, trainer) -> None:
        """Evaluation calls the model outside TRL's wrappers, so no process may hold only a shard of it."""
        sharded = trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3)
        if sharded and (self.held_out or self.frozen):
            raise DiagnosticsError(
                "The student is sharded, and a shard cannot be evaluated during training. Pass --eval-contexts 0, "
                "and evaluate checkpoints afterwards with diagnostics.evaluate."
            )

    def callback(self):
        """The transformers callback that calls this watcher."""
        from transformers import TrainerCallback

        watcher = self

        class Watch(TrainerCallback):
            """Hands TRL's events on."""

            def on_train_begin(self, args, state, control, **_):
                watcher.begin(state.global_step)

            def on_step_end(self, args, state, control, **_):
                watcher.after_step(state.global_step)

            def on_log(self, args, state, control, logs=None, **_):
                if logs and "loss" in logs:
                    watcher.log(state.global_step, logs)

        return Watch()

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.directory / name

    def begin(self, step: int) -> None:
        """Forget what lies after `step` (0, or the checkpoint's); at the very start evaluate the untouched student."""
        lines = read_lines(self.path("metrics.jsonl"))
        lines = lines[lines["step"] <= step] if len(lines) else lines
        if parallel.is_main():
            text = "".join(_line(row) for row in lines.to_dict("records"))
            self.path("metrics.jsonl").write_text(text)
        if step == 0:
            self._evaluate(0)
            self._start_gains()
            return
        for name, keep in (("evaluations.parquet", self._earlier_rows), ("training_gains.parquet", _earlier_columns)):
            if self.path(name).exists():
                write_parquet(self.path(name), keep(read_parquet(self.path(name)), step))

    @staticmethod
    def _earlier_rows(table: pd.DataFrame, step: int) -> pd.DataFrame:
        return table[table["step"] <= step]

    def after_step(self, step: int) -> None:
        """Evaluate and re-score the bank where that is due."""
        every, last = self.evaluation.eval_every, step == self.config.steps
        if last or (every and step % every == 0):
            self._evaluate(step)
        every = self.engine.probe_every
        if every and (step == 1 or last or step % every == 0):
            self._gains(step)

    def log(self, step: int, logs: dict[str, float]) -> None:
        """Append one step to metrics.jsonl."""
        if not parallel.is_main():
            return
        with open(self.path("metrics.jsonl"), "a") as file:
            file.write(_line({"step": step} | logs))
        if step % max(1, self.config.steps // 10) == 0:
            log.info("step %d of %d: loss %.4f, %.0f tokens/s", step, self.config.steps, logs["loss"], logs.get("tokens_per_second") or math.nan)

    def _evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        rows = self.untouched if step == 0 and self.untouched is not None else evaluate(
            self.pair, self.held_out, bank=self.frozen, verify=self.verify, samples=self.evaluation.eval_samples,
            max_new_tokens=self.engine.max_new_tokens,
        )
        rows = rows.assign(step=step)
        earlier = read_parquet(self.path("evaluations.parquet")) if step and self.path("evaluations.parquet").exists() else rows[:0]
        rows = pd.concat([earlier[earlier["step"] < step], rows], ignore_index=True) if len(earlier) else rows
        parallel.barrier()
        write_parquet(self.path("evaluations.parquet"), rows)
        write_csv(self.path("evaluations.csv"), self.summary(rows))
        parallel.barrier()
        now = self.summary(rows[rows["step"] == step]).set_index("measure")["mean"]
        log.info("step %d, held out: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in now.items()))

    def summary(self, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Mean and interval of each measure at each evaluated step."""
        if rows is None:
            rows = read_parquet(self.path("evaluations.parquet")) if self.held_out else pd.DataFrame({"step": []})
        tables = [summarise_evaluation(part).assign(step=step) for step, part in rows.groupby("step")]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["step", "measure", "mean"])

    def _start_gains(self) -> None:
        if not self.engine.probe_every:
            return
        forward, reverse = self.frozen.divergences()
        keys = [(context.context_id, position) for context in self.frozen.bank for position in range(len(context.response_ids))]
        table = pd.DataFrame(keys, columns=["context_id", "position"]).assign(forward_kl_step_0=forward, reverse_kl_step_0=reverse)
        write_parquet(self.path("training_gains.parquet"), table)
        parallel.barrier()

    def _gains(self, step: int) -> None:
        from diagnostics.probe import gains

        table, model = read_parquet(self.path("training_gains.parquet")), self.pair.student.model
        training = model.training
        model.eval()
        after = self.frozen.divergences()
        model.train(training)
        found = gains((table["forward_kl_step_0"].to_numpy(), table["reverse_kl_step_0"].to_numpy()), after)
        parallel.barrier()
        kept = {f"{name}_step_{step}": found[name] for name in GAINS}
        write_parquet(self.path("training_gains.parquet"), table.assign(**kept))
        parallel.barrier()


GAINS = ("gain", "relative_gain", "reverse_gain")
"""Outcomes that are kept for every probed step n as `<name>_step_<n>`."""


def _earlier_columns(table: pd.DataFrame, step: int) -> pd.DataFrame:
    late = [name for name in table.columns if "_step_" in name and int(name.rpartition("_")[2]) > step]
    return table.drop(columns=late)


def _line(row: dict) -> str:
    """One JSON line; what is not finite becomes null."""
    clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(clean) + "\n"


def read_lines(path: Path) -> pd.DataFrame:
    """A metrics.jsonl as a table; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return pd.DataFrame(rows)
