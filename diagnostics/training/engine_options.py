"""Options for TRL and peft: read, checked and bounded before anything is built.

Two JSON objects are accepted, `--trl` (fields of TRL's DistillationConfig) and `--peft` (fields of
peft's LoraConfig), each in a file or written out. The fields that have an effect are listed here;
every other field is refused, and the message names the option that replaces it. This is a list of
allowed fields because new releases add fields that name hosts, tokens and folders faster than a
list of forbidden ones could follow. The value of a refused field is never repeated, logged or
recorded, since it may be a token.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError

LARGEST = 1_000_000
"""Most bytes of a settings file; a real one has a few hundred."""

TRL_FIELDS = frozenset(
    {
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "neftune_noise_alpha",
        "disable_dropout",
        "full_determinism",
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "pad_to_multiple_of",
        "save_total_limit",
        "report_to",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "use_vllm",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_structured_outputs_regex",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "ddp_backend",
        "ddp_timeout",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_find_unused_parameters",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "logging_nan_inf_filter",
        "log_completions",
        "num_completions_to_print",
        "log_unique_prompts",
    }
)
"""Fields of DistillationConfig that have an effect here, name no place outside the run directory
and do not invalidate the measurements.
"""

LEAVES = "nothing leaves the run directory; upload DIR/student yourself"
LAUNCH = "start under `accelerate launch --config_file` with a file that says so"
WAYS = {
    "output_dir": "--output-dir",
    "logging_dir": "the run directory is --output-dir",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "per_device_train_batch_size": "--batch",
    "auto_find_batch_size": "--batch and --accumulation",
    "gradient_accumulation_steps": "--accumulation",
    "learning_rate": "--learning-rate",
    "max_completion_length": "--max-new-tokens",
    "beta": "--loss and --beta",
    "seed": "--seed",
    "data_seed": "--seed",
    "save_strategy": "--save-every",
    "save_steps": "--save-every",
    "save_only_model": "a resumed training needs its optimizer",
    "logging_steps": "every step is in metrics.jsonl",
    "logging_strategy": "every step is in metrics.jsonl",
    "logging_first_step": "every step is in metrics.jsonl",
    "temperature": "loss and measurements are of the untempered p, so training samples from it",
    "shuffle_dataset": "--seed draws the order of the prompts",
    "remove_unused_columns": "each row's number names its random stream",
    "chat_template_kwargs": "--chat-template-kwargs",
    "max_tool_calling_iterations": "training takes no tools",
    "cache_implementation": "our own generation decides it",
    "use_cpu": "--device cpu",
    "model_init_kwargs": "--student, --student-revision and --dtype",
    "trust_remote_code": "load the model yourself and call diagnostics.train",
    "resume_from_checkpoint": "--resume",
    "fsdp": LAUNCH,
    "fsdp_config": LAUNCH,
    "deepspeed": LAUNCH,
    "accelerator_config": LAUNCH,
    "parallelism_config": LAUNCH,
    "run_name": LEAVES,
    "project": LEAVES,
}
"""Refused field -> the option that replaces it, or the reason."""
PREFIXES = {
    "hub_": LEAVES,
    "push_to_hub": LEAVES,
    "trackio": LEAVES,
    "vllm_server": 'generate in the training processes, "vllm_mode": "colocate"',
    "vllm_group_port": 'generate in the training processes, "vllm_mode": "colocate"',
    "teacher_model": "--teacher, --teacher-revision and --teacher-dtype",
    "eval_": "--eval-every, --eval-contexts and --eval-samples",
    "per_device_eval": "--eval-contexts",
}
ELSEWHERE = "a script that makes SelectedDistillationTrainer itself can set it (docs/scale.md)"
TRACKERS = ("none", "tensorboard")
"""Trackers that write into the run directory, which `--trl` may name."""
REPORT_TO = (*TRACKERS, "trackio", "wandb")
"""Trackers that `--report-to` may name."""
BOTH_NAMES = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
"""Older and newer name of one option; TRL's page and most recipes use the older one."""

PEFT_FIELDS = {
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "modules_to_save": (list,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "init_lora_weights": (bool, str),
    "target_parameters": (list,),
}
"""Fields of LoraConfig that have an effect, with their types. Fields that change the base model,
name another model or need data are left out.
"""
INITS = (True, False, "gaussian", "orthogonal")
"""Initializations of an adapter that leave the base weights unchanged, so that a resumed training
finds the same base.
"""


def read_object(text: str | None, flag: str) -> dict[str, Any]:
    """Read a JSON object from a file, or one that is written out.

    Args:
        text: The object or the file's path; None gives an empty object.
        flag: The flag that it was given with, for the message.

    Raises:
        DiagnosticsError: It is neither, or it names a field twice.
    """
    if text is None:
        return {}
    written_out = text.lstrip().startswith("{")
    where = flag if written_out else text
    try:
        value = json.loads(
            text if written_out else _small_file(text),
            object_pairs_hook=functools.partial(_once, where),
        )
    except DiagnosticsError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DiagnosticsError(
            f"{where} cannot be read as JSON ({error}). Give an object of fields, in a file or"
            " written out."
        ) from error
    if not isinstance(value, dict):
        raise DiagnosticsError(
            f"{where} holds a {type(value).__name__}, not an object. Give an object of fields, in a"
            " file or written out."
        )
    return value


def _small_file(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise OSError("there is no such file")
    if path.stat().st_size > LARGEST:
        raise OSError(f"it has {path.stat().st_size} bytes, more than {LARGEST}")
    return path.read_text(encoding="utf-8")


def _once(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DiagnosticsError(f"{where} names {', '.join(twice)} twice. Keep one.")
    return dict(pairs)


def trl_fields(text: str | None) -> dict[str, Any]:
    """Read and check fields of DistillationConfig.

    Args:
        text: Value of `--trl`: an object, a file's path, or None.

    Returns:
        The fields, under their newer names.

    Raises:
        DiagnosticsError: A field has no effect here (the message names its replacement), or a value
            has another type.
    """
    fields, where = read_object(text, "--trl"), _shown(text, "--trl")
    known = _hints()
    unknown = sorted(fields.keys() - known.keys() - WAYS.keys())
    if unknown:
        raise DiagnosticsError(
            f"{where} sets {', '.join(unknown)}, which no DistillationConfig knows. Correct the"
            " name, or remove it there."
        )
    refused = [f"{name} ({way(name)})" for name in sorted(fields.keys() - TRL_FIELDS)]
    if refused:
        raise DiagnosticsError(
            f"{where} sets what is not TRL's to decide here: {'; '.join(refused)}. Remove it there."
        )
    for name, value in fields.items():
        if not fits(known[name], value):
            raise DiagnosticsError(
                f"{where} sets {name} to {_seen(value)}; {_words(known[name])} is needed."
                " Correct it there."
            )
    _check_values(fields, where)
    return _one_name(fields, where)


def _shown(text: str | None, flag: str) -> str:
    return flag if text is None or text.lstrip().startswith("{") else text


def way(name: str) -> str:
    """The option that replaces a refused field of this name, or the reason for the refusal."""
    found = WAYS.get(name) or next(
        (told for prefix, told in PREFIXES.items() if name.startswith(prefix)), None
    )
    return found or ELSEWHERE


@functools.cache
def _hints() -> dict[str, Any]:
    import dataclasses

    from trl import DistillationConfig

    hints = typing.get_type_hints(DistillationConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(DistillationConfig)}


MOST_WORKERS = 64
"""Processes that read prompts; each is started at once, and a million of them end the machine."""
SHOWN = 8
"""Characters of a text that an error repeats; a token is longer."""


def _seen(value: Any) -> str:
    """A value of the wrong type as an error may show it."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"a text of {len(value)} characters"
    return json.dumps(value)[:80] if not isinstance(value, list | dict) else type(value).__name__


def fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value has a field's type.

    An integer also fits a float field; a boolean fits no number field, and a text no field of
    an object, where it would be recorded unread.

    Args:
        hint: The field's type hint.
        value: The value that was read.
    """
    kinds = _kinds(hint)
    if isinstance(value, str) and dict in kinds:
        return False
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds or float in kinds
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    return any(
        isinstance(value, kind) or (isinstance(value, str) and issubclass(kind, enum.Enum))
        for kind in kinds
    )


def _kinds(hint: Any) -> list[type]:
    parts = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    kinds = [typing.get_origin(part) or part for part in parts]
    return [kind for kind in kinds if isinstance(kind, type)]


def _words(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "an object",
        list: "a list",
        types.NoneType: "null",
    }
    return " or ".join(dict.fromkeys(names.get(kind, "text") for kind in _kinds(hint)))


CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "early_stop")
"""Arguments of torch's checkpointing that JSON can hold and a training may want."""


def _check_values(fields: dict[str, Any], where: str) -> None:
    """Refuse values that would open a connection or write outside the run directory, and those
    that sampling and checkpointing do not take.
    """
    top_p, top_k = fields.get("top_p", 1.0), fields.get("top_k", 0)
    if not 0 < top_p <= 1 or (top_k is not None and top_k < 0):
        raise DiagnosticsError(
            f"{where} sets top_p to {top_p} and top_k to {top_k}; top_p must lie in (0, 1], where 1"
            " keeps every token, and top_k must not be negative, where 0 keeps every token."
            " Correct it there."
        )
    for name in BOTH_NAMES[1]:
        unknown = sorted((fields.get(name) or {}).keys() - set(CHECKPOINTING))
        if unknown:
            raise DiagnosticsError(
                f"{where} sets {', '.join(unknown)} in {name}, and {', '.join(CHECKPOINTING)} are"
                " what may stand there. Correct it there."
            )
    if any(tracker not in TRACKERS for tracker in trackers(fields)):
        raise DiagnosticsError(
            f"{where} reports to a tracker other than {' or '.join(TRACKERS)}: {LEAVES}, and"
            " metrics.jsonl. Remove report_to there; --report-to names another tracker."
        )
    if not 0 <= fields.get("dataloader_num_workers", 0) <= MOST_WORKERS:
        raise DiagnosticsError(
            f"{where} sets dataloader_num_workers to {fields['dataloader_num_workers']}; 0 to"
            f" {MOST_WORKERS} processes may read the prompts, which are in memory already. Correct"
            " it there."
        )
    if fields.get("vllm_mode", "colocate") != "colocate":
        raise DiagnosticsError(
            f'{where} has a vllm_mode other than "colocate", which would ask another host. Use'
            ' "colocate".'
        )


def trackers(fields: dict[str, Any]) -> list:
    """The trackers that `report_to` asks for."""
    asked = fields.get("report_to") or []
    return [asked] if isinstance(asked, str) else asked


def require_installed(text: str | None) -> None:
    """Raise DiagnosticsError where `--trl`, whose value is `text`, needs a missing package."""
    fields, where = trl_fields(text), _shown(text, "--trl")
    if "tensorboard" in trackers(fields) and not importlib.util.find_spec("tensorboard"):
        raise DiagnosticsError(
            f"{where} reports to tensorboard, which is not installed. Run `pip install"
            " tensorboard`, or read metrics.jsonl."
        )
    if fields.get("use_vllm") and not importlib.util.find_spec("vllm"):
        raise DiagnosticsError(
            f"{where} sets use_vllm, and vllm is not installed. Run `pip install trl[vllm]`, or"
            " remove it: transformers generates then."
        )


def _one_name(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields under their newer names.

    Raises DiagnosticsError where both names are given with different values.
    """
    fields = dict(fields)
    for old, new in BOTH_NAMES:
        if old not in fields:
            continue
        value = fields.pop(old)
        if fields.setdefault(new, value) != value:
            raise DiagnosticsError(
                f"{where} sets {old} and {new}, two names of one option, to different values. Keep"
                " one."
            )
    return fields


def peft_fields(text: str | None) -> dict[str, Any]:
    """Read and check fields of LoraConfig.

    Args:
        text: Value of `--peft`: an object, a file's path, or None.

    Raises:
        DiagnosticsError: A field has no effect here, or a value has another type.
    """
    fields, where = read_object(text, "--peft"), _shown(text, "--peft")
    refused = sorted(fields.keys() - PEFT_FIELDS.keys())
    if refused:
        told = (
            "the rank is --lora-rank"
            if refused == ["r"]
            else (
                f"known are {', '.join(PEFT_FIELDS)};"
                f" {ELSEWHERE.replace('set it', 'give its own peft_config')}"
            )
        )
        raise DiagnosticsError(
            f"{where} sets {', '.join(refused)}, which is not for it to say: {told}. Remove it"
            " there."
        )
    for name, value in fields.items():
        kinds = PEFT_FIELDS[name]
        if (
            not isinstance(value, kinds)
            or (isinstance(value, bool) and bool not in kinds)
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            shown = " or ".join(dict.fromkeys(_words(kind) for kind in kinds))
            raise DiagnosticsError(
                f"{where} sets {name} to {_seen(value)}; {shown} is needed. Correct it there."
            )
    if fields.get("init_lora_weights", True) not in INITS:
        raise DiagnosticsError(
            f"{where} sets init_lora_weights to a start other than"
            f" {', '.join(map(json.dumps, INITS))}, which would change the base weights. Use one of"
            " them."
        )
    return fields


def require_noise(trl: dict[str, Any], peft: str | None) -> None:
    """Raise DiagnosticsError where `--peft` asks for dropout that `--trl` leaves off."""
    dropout = peft_fields(peft).get("lora_dropout")
    if dropout and trl.get("disable_dropout", True):
        raise DiagnosticsError(
            f"{_shown(peft, '--peft')} sets lora_dropout to {dropout}, and dropout is off in"
            ' training. Set "disable_dropout": false in --trl as well, or leave it out.'
        )


def lora_config(rank: int, text: str | None = None):
    """Build peft's LoraConfig.

    Args:
        rank: Rank of the adapter; 0 for none.
        text: Value of `--peft`: further fields.

    Returns:
        The configuration, or None without a rank.

    Raises:
        DiagnosticsError: peft is not installed, fields are given without a rank, or peft refuses
            them.
    """
    fields = peft_fields(text)
    if not rank:
        if fields:
            raise DiagnosticsError(
                f"{_shown(text, '--peft')} describes an adapter, and there is none. Give its rank"
                " with --lora-rank."
            )
        return None
    if not importlib.util.find_spec("peft"):
        raise DiagnosticsError(
            f"A LoRA of rank {rank} needs the package peft. Run `pip install peft`, or train all"
            " weights with --lora-rank 0."
        )
    from peft import LoraConfig

    try:
        return LoraConfig(
            **{
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
            }
            | fields
        )
    except (TypeError, ValueError, ImportError) as error:
        raise DiagnosticsError(
            f"peft does not take these settings: {error}. Correct {_shown(text, '--peft')}."
        ) from error
