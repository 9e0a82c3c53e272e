"""What a model can come from: a folder or a Hugging Face id, a LoRA adapter, a GGUF file, quantised weights.

An *adapter* (a folder or id with adapter_config.json, as PEFT writes it) is merged into the base model that it names,
in the dtype asked for: W + scale * B A. From then on it is a model like any other, and a step moves all of its
weights, not the adapter's alone. A *GGUF* file (`FOLDER/FILE.gguf`, or `ID/FILE.gguf` on Hugging Face) is dequantised to
the dtype asked for. *int8* and *nf4* are bitsandbytes' weights, made while loading; they and checkpoints that were
saved so need CUDA, and serve for a teacher only.

Weights are read from safetensors or GGUF, never from a format that can run code.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diagnostics import parallel
from diagnostics.bounds import check_weights, parse_json
from diagnostics.runs import sha256_file
from diagnostics.types import DiagnosticsError

log = logging.getLogger("diagnostics")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
QUANTISED = ("int8", "nf4")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_model(source, revision: str | None = None, *, dtype: str, device: str) -> nn.Module:
    """One causal language model in eval mode on its device. A model already in memory is moved, not copied.

    source: see the module's head. dtype: one of DTYPES or QUANTISED. What is special about the source is left in
    the model's `source_facts`, for the manifest. Raises DiagnosticsError for a source that cannot be loaded.
    """
    place = resolve_device(parallel.local_device(device))
    if isinstance(source, nn.Module):
        return source.to(place).eval()
    if dtype not in (*DTYPES, *QUANTISED):
        raise DiagnosticsError(f"Unknown dtype {dtype!r}. Known are {', '.join((*DTYPES, *QUANTISED))}.")
    if is_gguf(source):
        model, facts = _load_gguf(str(source), revision, dtype)
    elif (folder := adapter_folder(source, revision)) is not None:
        model, facts = _load_adapter(folder, dtype, place)
    else:
        model, facts = _load_plain(source, revision, dtype, place)
    model.source_facts = facts
    return model.eval() if "quantised" in facts else model.to(place).eval()


def load_tokenizer(source: str | Path, revision: str | None = None):
    """The tokenizer beside a model; an adapter without one has its base model's. Raises DiagnosticsError where there is none."""
    from transformers import AutoTokenizer

    if is_gguf(source):
        _require("gguf", "GGUF files")
        return _from_source(AutoTokenizer, source, "tokenizer", revision=revision)
    named = isinstance(source, (str, Path))
    folder = adapter_folder(source, revision) if named and Path(source).is_dir() else None
    if folder is None or (folder / "tokenizer_config.json").is_file():
        try:
            return _from_source(AutoTokenizer, source, "tokenizer", revision=revision)
        except DiagnosticsError as error:
            offline = "connect" in str(error)
            folder = None if offline or not named or Path(source).is_dir() else adapter_folder(source, revision)
            if folder is None:
                raise
    settings = _adapter_settings(folder)
    return load_tokenizer(settings["base_model_name_or_path"], settings.get("revision"))


def is_gguf(source) -> bool:
    """The source names a GGUF file."""
    return isinstance(source, (str, Path)) and str(source).endswith(".gguf")


def _load_plain(source, revision: str | None, dtype: str, place: torch.device) -> tuple[nn.Module, dict]:
    from transformers import AutoConfig, AutoModelForCausalLM

    check_weights(source)
    options: dict[str, Any] = {"revision": revision, "use_safetensors": True, "dtype": DTYPES.get(dtype, torch.bfloat16)}
    saved = getattr(_from_source(AutoConfig, source, "model", revision=revision), "quantization_config", None) or {}
    method = saved.get("quant_method") if isinstance(saved, dict) else getattr(saved, "quant_method", None)
    kind = dtype if dtype in QUANTISED else str(getattr(method, "value", method)) if method else None
    if kind is None:
        return _from_source(AutoModelForCausalLM, source, "model", **options), {}
    if dtype in QUANTISED or kind.startswith("bitsandbytes"):
        _require_cuda(kind, source, place)
    if dtype in QUANTISED:
        options["quantization_config"] = _bitsandbytes(dtype)
    return _from_source(AutoModelForCausalLM, source, "model", device_map={"": place}, **options), {"quantised": kind}


def _require_cuda(kind: str, source, place: torch.device) -> None:
    if place.type != "cuda":
        raise DiagnosticsError(
            f"{source} with {kind} weights needs CUDA and the package bitsandbytes, and the device is {place}. "
            "Use the unquantised model with --teacher-dtype bfloat16, a GGUF file, or a machine with CUDA."
        )
    _require("bitsandbytes", f"{kind} weights")


def _bitsandbytes(dtype: str):
    from transformers import BitsAndBytesConfig

    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _load_gguf(source: str, revision: str | None, dtype: str) -> tuple[nn.Module, dict]:
    from transformers import AutoModelForCausalLM, GgufConfig

    _require("gguf", "GGUF files")
    if dtype in QUANTISED:
        raise DiagnosticsError(f"{source} is a GGUF file, which is dequantised when it is read; {dtype} would quantise it again. Use bfloat16 or float32.")
    path = Path(source)
    check_weights(path)
    model = _from_source(AutoModelForCausalLM, path, "model", revision=revision, dtype=DTYPES[dtype], quantization_config=GgufConfig(dequantize=True))
    model.config.quantization_config = None
    return model, {"gguf": path.name} | ({"sha256": sha256_file(path)} if path.is_file() else {})


def adapter_folder(source, revision: str | None = None) -> Path | None:
    """The folder with an adapter's two files, fetched where the source is a Hugging Face id; None for a whole model."""
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(source).is_dir():
        return Path(source) if (Path(source) / ADAPTER_CONFIG).is_file() else None
    if _is_cached(str(source), "config.json", revision):
        return _cached_adapter(str(source), revision)  # a whole model needs no look at the network
    try:
        if find_adapter_config_file(str(source), revision=revision) is None:
            return None
        return Path(cached_file(str(source), ADAPTER_WEIGHTS, revision=revision)).parent
    except (OSError, ValueError):
        return None


def _is_cached(source: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(source, file, revision=revision), str)
    except ValueError:  # no Hugging Face id at all
        return False


def _cached_adapter(source: str, revision: str | None) -> Path | None:
    """The folder of an adapter that was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    if not all(_is_cached(source, file, revision) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        return None
    return Path(try_to_load_from_cache(source, ADAPTER_CONFIG, revision=revision)).parent


def _adapter_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = parse_json((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiagnosticsError(f"{folder / ADAPTER_CONFIG} cannot be read as an adapter's settings ({error!r}). Save the adapter again with PEFT.") from error
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise DiagnosticsError(f"{folder} holds an adapter of type {kind} for the base model {base!r}. Only LoRA can be merged, into a base model that is named.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise DiagnosticsError(f"{folder} has no {ADAPTER_WEIGHTS}; other formats can run code and are not read. Save the adapter again with safetensors.")
    return settings


def _load_adapter(folder: Path, dtype: str, place: torch.device) -> tuple[nn.Module, dict]:
    settings = _adapter_settings(folder)
    base = settings["base_model_name_or_path"]
    if dtype in QUANTISED:
        raise DiagnosticsError(f"{folder} is an adapter, which is merged into its base model; that cannot be done in {dtype}. Use bfloat16 or float32.")
    _require("peft", "adapters")
    check_weights(folder)
    model, facts = _load_plain(base, settings.get("revision"), dtype, place)
    if facts:
        raise DiagnosticsError(f"{folder} is an adapter for {base}, whose weights are quantised ({facts['quantised']}). Merge it into the unquantised model.")
    merged = _merge(model, folder).requires_grad_(True)
    merged.config._name_or_path = str(folder)
    log.info("%s: adapter of rank %s merged into %s", folder, settings.get("r"), base)
    facts = {"adapter": "lora", "rank": settings.get("r"), "base": Path(base).name if Path(base).is_dir() else base, "base_revision": settings.get("revision")}
    return merged, facts | {"adapter_sha256": sha256_file(folder / ADAPTER_WEIGHTS)}


def _merge(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter merged. Raises DiagnosticsError where the adapter does not fit."""
    from peft import PeftModel

    what, remedy = f"The adapter in {folder} cannot be merged", "Check that it belongs to this base model."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about each other
        adapted = _attempt(lambda: PeftModel.from_pretrained(model, str(folder)), what, remedy)
        _require_fit(adapted, folder)
        return _attempt(lambda: adapted.merge_and_unload(safe_merge=True), what, remedy)


def _require_fit(adapted: nn.Module, folder: Path) -> None:
    """Every low-rank factor of the model comes from the file, and every one in the file is used: PEFT passes over either."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        there = {name for name in file.keys() if ".lora_" in name and "magnitude" not in name}
    here = {name.replace(".default", "") for name, _ in adapted.named_parameters() if ".lora_" in name and "magnitude" not in name}
    if here != there:
        raise DiagnosticsError(
            f"The adapter in {folder} does not fit its base model: {len(here - there)} factors of the model are not in the file and {len(there - here)} of the "
            f"file not in the model ({min(here ^ there)}). Check that it belongs to this base model."
        )


def _from_source(loader, source, what: str, **options):
    _quiet_bars_in_logs()
    if not isinstance(source, (str, Path)):
        raise DiagnosticsError(f"No {what} came with {type(source).__name__}. Pass tokenizer=… beside models in memory.")
    place = str(source)
    if is_gguf(source):
        place, options = str(Path(source).parent), options | {"gguf_file": Path(source).name}
    return _attempt(lambda: loader.from_pretrained(place, **options), f"No {what} can be loaded from {str(source)!r}",
                    "Give a local folder with config.json, *.safetensors and tokenizer files, a GGUF file, or a Hugging Face id while online.")


def _attempt(load: Callable[[], Any], what: str, remedy: str) -> Any:
    """The result, or a DiagnosticsError with the first line of what went wrong."""
    try:
        return load()
    except (DiagnosticsError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file can end in any error of the libraries that read it
        reason = _first_words(str(error))
        reason = f"{type(error).__name__}: {reason}" if isinstance(error, LookupError) or not reason else reason
        raise DiagnosticsError(f"{what} ({reason}). {remedy}") from error


def _first_words(text: str) -> str:
    """The first line of an error, with the next where it only announces that ("…:")."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return told[:300]


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DiagnosticsError(f"Reading {what} needs the package {package}, which is not installed. Run `pip install {package}`.")


def _quiet_bars_in_logs() -> None:
    """Loading bars are for terminals, as ours are."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU. Raises DiagnosticsError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise DiagnosticsError(f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Use auto or cpu.") from error
    return place


def shared_template(student, teacher) -> dict[str, Any]:
    """Let one chat template serve both models, and say which.

    student, teacher: tokenizers. The student's template renders every prompt; a student without one takes the
    teacher's. Returns what the manifest records: whose it is, its hash, a short example, and the same of the
    teacher's where that differs. A pair without templates gives {}.
    """
    own, other = (getattr(tokenizer, "chat_template", None) for tokenizer in (student, teacher))
    if not (own or other):
        return {}
    facts = {"of": "student" if own else "teacher"}
    if not own:
        student.chat_template = other
        log.warning("the student's tokenizer has no chat template: the teacher's is used for both")
    facts |= _described(student)
    if own and other and own != other:
        facts |= {f"teacher_{name}": value for name, value in _described(teacher).items()}
        hashes = facts["sha256"][:12], facts["teacher_sha256"][:12]
        log.warning("the chat templates differ: the student's (%s) renders the prompts of both, not the teacher's (%s)", *hashes)
    return facts


def _described(tokenizer) -> dict[str, str | None]:
    from hashlib import sha256

    from diagnostics.templates import Template

    try:
        example = Template(tokenizer)([{"role": "user", "content": "…"}], "the example", add_generation_prompt=True)
    except DiagnosticsError:  # its own reason is given where a prompt meets it
        example = None
    return {"sha256": sha256(str(tokenizer.chat_template).encode()).hexdigest(), "example": example}
