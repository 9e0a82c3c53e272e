"""Loading models: folders, Hugging Face ids, LoRA adapters, GGUF files, quantized weights.

An *adapter* (a folder or id with adapter_config.json, as PEFT writes it) is merged into the base
model that it names, in the dtype asked for: W + scale * B A. Where it touches one end of tied
weights (head and embedding), the ends are untied first, and the merged model must give the adapted
model's own logits. Afterwards it is a model like any other, and a step moves all of its weights,
not the adapter's alone. A *GGUF* file (`FOLDER/FILE.gguf`, or `ID/FILE.gguf` on Hugging Face) is
dequantized to the dtype asked for. *int8* and *nf4* are bitsandbytes' weights, made while loading;
they, and checkpoints that were saved in these formats, need CUDA and serve as teachers only.

Weights are read from safetensors or GGUF, never from a format that can run code. Code in a model's
folder (`auto_map`, custom_generate) is never run, and no flag allows it. A model whose file lacks
weights is refused, since the library would draw them at random."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.limits import check_weights, parse_json
from diagnostics.models.dtypes import DTYPE_NAMES, QUANTIZED
from diagnostics.models.weights import weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("diagnostics")
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}
SOURCE_FACTS = "source_facts"
"""Attribute of a loaded model that says what is special about its source, for the manifest."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_COUNTED = 10_000
"""Most layers or experts that a config may name: the largest known models have a few hundred of
each, and building a thousand million of them would hang the machine before the weights' file is
looked at."""
MOST_SETTINGS_BYTES = 4 * 2**20
"""Size of an adapter's settings beyond which they are not read; real ones have some kilobytes."""
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
"""What a Hugging Face id looks like: a name, or an owner and a name."""
TRIED_TOKENS = 16
"""Tokens of the short sequence on which a merged model is compared with the adapted one."""


def load_model(source, revision: str | None = None, *, dtype: str, device: str) -> PreTrainedModel:
    """Load one causal language model in eval mode on its device.

    Args:
        source: Folder, Hugging Face id, adapter or GGUF file, as in the head of this module; or a
            model in memory, which is moved and not copied.
        revision: Branch, tag or commit of a Hugging Face id.
        dtype: One of DTYPES or QUANTIZED.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Returns:
        The model. Its attribute `source_facts` holds what the manifest records of the source.

    Raises:
        DiagnosticsError: The source cannot be loaded.
    """
    place = resolve_device(distributed.local_device(device))
    if isinstance(source, nn.Module):
        return move(cast("PreTrainedModel", source), place).eval()
    if dtype not in (*DTYPES, *QUANTIZED):
        raise DiagnosticsError(
            f"Unknown dtype {dtype!r}. Known are {', '.join((*DTYPES, *QUANTIZED))}."
        )
    if is_gguf(source):
        model, facts = _load_gguf(str(source), revision, dtype)
    elif (folder := adapter_folder(source, revision)) is not None:
        model, facts = _load_adapter(folder, dtype, place)
    else:
        model, facts = _load_plain(source, revision, dtype, place)
    setattr(model, SOURCE_FACTS, facts)
    if "quantised" in facts:  # made on their device, and cannot be moved
        return model.eval()
    if place.type != "cpu":
        weights_sha256(model)  # while the bytes are here; on the device its checksum finds the hash
    return move(model, place).eval()


def move(model: PreTrainedModel, place: torch.device | str) -> PreTrainedModel:
    """Move a model to a device, in place, and return it."""
    movable: Any = model  # transformers' own `to` hides its arguments from a type checker
    return movable.to(place)


def load_tokenizer(source: str | Path, revision: str | None = None):
    """Load the tokenizer that belongs to a model.

    An adapter without a tokenizer has its base model's.

    Args:
        source: As in `load_model`, but not a model in memory.
        revision: Branch, tag or commit of a Hugging Face id.

    Raises:
        DiagnosticsError: There is no tokenizer, or it cannot be read.
    """
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
            folder = (
                None
                if offline or not named or Path(source).is_dir()
                else adapter_folder(source, revision)
            )
            if folder is None:
                raise
    settings = _adapter_settings(folder)
    return load_tokenizer(settings["base_model_name_or_path"], settings.get("revision"))


def is_gguf(source) -> bool:
    """Whether a source names a GGUF file."""
    return isinstance(source, (str, Path)) and str(source).endswith(".gguf")


def _load_plain(
    source, revision: str | None, dtype: str, place: torch.device
) -> tuple[PreTrainedModel, dict]:
    check_weights(source)
    _check_config(source, revision)
    options: dict[str, Any] = {
        "revision": revision,
        "use_safetensors": True,
        "dtype": DTYPES.get(dtype, torch.bfloat16),
    }
    kind = dtype if dtype in QUANTIZED else _saved_method(source, revision)
    if kind is None:
        return _whole(source, **options), {}
    if dtype in QUANTIZED or kind.startswith("bitsandbytes"):
        _require_cuda(kind, source, place)
    if dtype in QUANTIZED:
        options["quantization_config"] = _bitsandbytes(dtype)
    return _whole(source, device_map={"": place}, **options), {"quantised": kind}


def _saved_method(source, revision: str | None) -> str | None:
    """Method by which a checkpoint's weights were quantized; None for plain weights."""
    from transformers import AutoConfig

    config = _from_source(AutoConfig, source, "model", revision=revision)
    saved = getattr(config, "quantization_config", None) or {}
    if isinstance(saved, dict):
        method = saved.get("quant_method")
    else:
        method = getattr(saved, "quant_method", None)
    return str(getattr(method, "value", method)) if method else None


def _whole(source, **options) -> PreTrainedModel:
    """A model whose weights all come from its file.

    The library would draw missing weights at random, so they are refused.
    """
    from transformers import AutoModelForCausalLM

    model, found = _from_source(
        AutoModelForCausalLM, source, "model", output_loading_info=True, **options
    )
    lacking, spare = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if lacking:
        raise DiagnosticsError(
            f"{source} lacks {len(lacking)} of the weights that its config.json asks for"
            f" ({', '.join(lacking[:3])}); they would be drawn at random. Save the whole model"
            " again, or fix its config.json."
        )
    if spare:
        log.warning(
            "%s: %d weights of the file are not in a %s and are not used (%s)",
            source,
            len(spare),
            type(model).__name__,
            ", ".join(spare[:3]),
        )
    return model


def _check_config(source, revision: str | None) -> None:
    """Refuse a config.json that asks for code, or for more parts than any model has.

    This happens before anything is built from it.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if not isinstance(source, (str, Path)):
        return
    settings = _attempt(
        lambda: PreTrainedConfig.get_config_dict(str(source), revision=revision)[0],
        *_no("model", source),
    )
    for name, value in _named(settings):
        if (
            isinstance(value, int)
            and value > MOST_COUNTED
            and name.startswith(("n_", "num_"))
            and ("layer" in name or "expert" in name)
        ):
            raise DiagnosticsError(
                f"The config.json of {source} asks for {name} = {value:,}, and {MOST_COUNTED:,} is"
                " the most that is built. Fix it."
            )
        if name.endswith("_implementation") and "/" in str(value):
            raise DiagnosticsError(
                f"The config.json of {source} names code to fetch, {name} = {str(value)[:80]!r},"
                " which is not run. Take that entry out."
            )
    if settings.get("auto_map") and settings.get("model_type") in CONFIG_MAPPING:
        log.warning(
            "%s brings code of its own, which is not run: %s as the library has it is used",
            source,
            settings.get("model_type"),
        )


def _named(settings: dict) -> Iterator[tuple[str, Any]]:
    """Every name with its value, at any depth of nested settings."""
    waiting = [settings]
    while waiting:
        for name, value in waiting.pop().items():
            yield str(name), value
            if isinstance(value, dict):
                waiting.append(value)


def _require_cuda(kind: str, source, place: torch.device) -> None:
    if place.type != "cuda":
        raise DiagnosticsError(
            f"{source} with {kind} weights needs CUDA and the package bitsandbytes, and the device"
            f" is {place}. Use the unquantised model with --teacher-dtype bfloat16, a GGUF file, or"
            " a machine with CUDA."
        )
    _require("bitsandbytes", f"{kind} weights")


def _bitsandbytes(dtype: str):
    from transformers import BitsAndBytesConfig

    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _load_gguf(source: str, revision: str | None, dtype: str) -> tuple[PreTrainedModel, dict]:
    from transformers import GgufConfig

    _require("gguf", "GGUF files")
    if dtype in QUANTIZED:
        raise DiagnosticsError(
            f"{source} is a GGUF file, which is dequantised when it is read; {dtype} would quantise"
            " it again. Use bfloat16 or float32."
        )
    path = Path(source)
    check_weights(path)
    model = _whole(
        path,
        revision=revision,
        dtype=DTYPES[dtype],
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.quantization_config = None
    return model, {"gguf": path.name} | ({"sha256": sha256_file(path)} if path.is_file() else {})


def adapter_folder(source, revision: str | None = None) -> Path | None:
    """Folder with an adapter's two files; None for a whole model.

    The files are fetched where the source is a Hugging Face id.
    """
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(source).is_dir():
        return Path(source) if (Path(source) / ADAPTER_CONFIG).is_file() else None
    if _is_cached(str(source), "config.json", revision):
        return _cached_adapter(str(source), revision)  # a whole model needs no look at the network
    try:
        if find_adapter_config_file(str(source), revision=revision) is None:
            return None
        found = cached_file(str(source), ADAPTER_WEIGHTS, revision=revision)
        return None if found is None else Path(found).parent
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
    settings = try_to_load_from_cache(source, ADAPTER_CONFIG, revision=revision)
    return Path(settings).parent if isinstance(settings, str) else None


def _adapter_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        if path.stat().st_size > MOST_SETTINGS_BYTES:
            raise ValueError(
                f"{path.stat().st_size:,} bytes, where {MOST_SETTINGS_BYTES:,} are the most that is"
                " read"
            )
        settings = parse_json(path.read_text(encoding="utf-8"))
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiagnosticsError(
            f"{path} cannot be read as an adapter's settings ({error!r}). Save the adapter again"
            " with PEFT."
        ) from error
    if kind != "LORA" or not isinstance(base, str) or not base:
        raise DiagnosticsError(
            f"{folder} holds an adapter of type {kind} for the base model {base!r}. Only LoRA can"
            " be merged, into a base model that is named."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise DiagnosticsError(
            f"{folder} has no {ADAPTER_WEIGHTS}; other formats can run code and are not read. Save"
            " the adapter again with safetensors."
        )
    _require_base(folder, base)
    return settings


def _require_base(folder: Path, base: str) -> None:
    """Refuse a base model that is neither an existing folder with a model nor a Hugging Face id."""
    named = f"The adapter in {folder} names the base model {base!r}"
    if Path(base).is_dir():
        if (Path(base) / ADAPTER_CONFIG).is_file():
            raise DiagnosticsError(
                f"{named}, which is an adapter itself. Merge that one into its own base model"
                " first, and name the result."
            )
    elif not re.fullmatch(HUB_ID, base):
        raise DiagnosticsError(
            f"{named}, a path that is not on this machine. Put the base model there, or write its"
            f" folder or its Hugging Face id as base_model_name_or_path in {ADAPTER_CONFIG}."
        )


def base_folder(source, revision: str | None = None) -> Path | None:
    """Local folder of the base model of a local adapter; None where there is none."""
    if not isinstance(source, (str, Path)) or not (Path(source) / ADAPTER_CONFIG).is_file():
        return None
    base = Path(_adapter_settings(Path(source))["base_model_name_or_path"])
    return base if base.is_dir() else None


def _load_adapter(folder: Path, dtype: str, place: torch.device) -> tuple[PreTrainedModel, dict]:
    settings = _adapter_settings(folder)
    base = settings["base_model_name_or_path"]
    if dtype in QUANTIZED:
        raise DiagnosticsError(
            f"{folder} is an adapter, which is merged into its base model; that cannot be done in"
            f" {dtype}. Use bfloat16 or float32."
        )
    _require("peft", "adapters")
    check_weights(folder)
    model, facts = _load_plain(base, settings.get("revision"), dtype, place)
    if facts:
        raise DiagnosticsError(
            f"{folder} is an adapter for {base}, whose weights are quantised"
            f" ({facts['quantised']}). Merge it into the unquantised model."
        )
    merged = _merge(model, folder).requires_grad_(True)
    merged.config._name_or_path = str(folder)
    log.info("%s: adapter of rank %s merged into %s", folder, settings.get("r"), base)
    facts = {
        "adapter": "lora",
        "rank": settings.get("r"),
        "base": Path(base).name if Path(base).is_dir() else base,
        "base_revision": settings.get("revision"),
    }
    return merged, facts | {"adapter_sha256": sha256_file(folder / ADAPTER_WEIGHTS)}


def _merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter merged. Raises DiagnosticsError where the adapter does not fit, or
    where the merged model would be another than the adapted one."""
    from peft import PeftModel

    what, remedy = (
        f"The adapter in {folder} cannot be merged",
        "Check that it belongs to this base model.",
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = _attempt(
            lambda: PeftModel.from_pretrained(model, str(folder)), what, remedy
        ).eval()
        _require_fit(adapted, folder)
        expected_TV = _tried(adapted)
        untied = _untie(adapted)
        merged = _attempt(lambda: adapted.merge_and_unload(safe_merge=True), what, remedy)
        _settle_ties(merged)
    _require_same(expected_TV, _tried(merged), folder)
    _pass_on(said, folder, untied=untied)
    return merged


@torch.no_grad()
def _tried(model: PreTrainedModel) -> torch.Tensor:
    """Logits [T, V] on a short sequence of ids spread over the vocabulary."""
    size = len(cast("torch.Tensor", model.get_input_embeddings().weight))
    ids_BT = (
        torch.linspace(0, size - 1, TRIED_TOKENS).long()[None].to(next(model.parameters()).device)
    )
    return model(input_ids=ids_BT, use_cache=False).logits[0]


def _require_same(adapted_TV: torch.Tensor, merged_TV: torch.Tensor, folder: Path) -> None:
    """Refuse a merged model whose logits differ from the adapted model's by more than rounding."""
    difference = float((adapted_TV - merged_TV).abs().max())
    if not difference <= torch.finfo(merged_TV.dtype).eps ** 0.5 * (
        1 + float(adapted_TV.abs().max())
    ):
        raise DiagnosticsError(
            f"The adapter in {folder} cannot be merged: merged, the model's logits differ by up to"
            f" {difference:.3g} from those of the model with its adapter. Its kind of adapter"
            " cannot be written into the weights; load it with PEFT and pass the model itself as"
            " student or teacher."
        )


def _untie(adapted: nn.Module) -> bool:
    """Give every owner of a shared weight its own copy where an adapter touches one of them.

    A merge writes into the weight and would change its other owners too: an adapter of the head
    would change the embedding, and the other way round.
    """
    owners: dict[int, list[tuple[nn.Module, str, nn.Parameter, bool]]] = {}
    touched = tuple(f"{name}." for name, module in adapted.named_modules() if _is_adapter(module))
    for name, module in adapted.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(
                    (module, key, parameter, f"{name}.".startswith(touched))
                )
    shared = [
        group
        for group in owners.values()
        if len(group) > 1 and any(adapter for *_, adapter in group)
    ]
    for group in shared:
        for module, key, own, _ in group[1:]:
            module._parameters[key] = nn.Parameter(
                own.detach().clone(), requires_grad=own.requires_grad
            )
    return bool(shared)


def _is_adapter(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _settle_ties(merged: PreTrainedModel) -> None:
    """Tie head and embedding again where they came out equal.

    Otherwise they are recorded as untied, so that a checkpoint of the model holds both.
    """
    head: Any = merged.get_output_embeddings()
    embedding: Any = merged.get_input_embeddings()
    ties = getattr(merged, "all_tied_weights_keys", None)
    if head is None or not ties or head.weight is embedding.weight:
        return
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        settled = True
    else:
        settled, merged.all_tied_weights_keys = False, {}
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = settled


ANSWERED = ("tie_word_embeddings", "no longer tied after merging")
"""Words of PEFT's warnings about tied weights. They are dropped, since the weights are untied
before an adapter is merged."""


def _pass_on(said: list[warnings.WarningMessage], folder: Path, *, untied: bool) -> None:
    """Refuse or repeat the warnings of PEFT, which may concern the numbers.

    Notices for developers are left out.
    """
    for message in dict.fromkeys(
        str(entry.message)
        for entry in said
        if not issubclass(entry.category, (FutureWarning, DeprecationWarning))
    ):
        if "missing adapter keys" in message:
            raise DiagnosticsError(
                f"The adapter in {folder} lacks weights that its settings name ({message[:300]})."
                " Save the adapter again."
            )
        if not any(words in message for words in ANSWERED):
            log.warning("%s, as PEFT says: %s", folder, " ".join(message.split())[:400])
    if untied:
        log.info(
            "%s: the adapter touches tied weights; head and embedding were untied before it was"
            " merged",
            folder,
        )


def _require_fit(adapted: nn.Module, folder: Path) -> None:
    """Refuse an adapter whose low-rank factors are not exactly those of the model.

    PEFT silently skips factors that are missing on either side.
    """
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        in_file = list(file.keys())
    there = {name for name in in_file if ".lora_" in name and "magnitude" not in name}
    here = {
        name.replace(".default", "")
        for name, _ in adapted.named_parameters()
        if ".lora_" in name and "magnitude" not in name
    }
    if here != there:
        raise DiagnosticsError(
            f"The adapter in {folder} does not fit its base model: {len(here - there)} factors of"
            f" the model are not in the file and {len(there - here)} of the file not in the model"
            f" ({min(here ^ there)}). Check that it belongs to this base model."
        )


def _from_source(loader, source, what: str, **options):
    _quiet_bars_in_logs()
    if not isinstance(source, (str, Path)):
        raise DiagnosticsError(
            f"No {what} came with {type(source).__name__}. Pass tokenizer=… with models in memory."
        )
    place = str(source)
    if is_gguf(source):
        place, options = str(Path(source).parent), options | {"gguf_file": Path(source).name}
    return _attempt(
        lambda: loader.from_pretrained(place, trust_remote_code=False, **options),
        *_no(what, source),
    )


def _no(what: str, source) -> tuple[str, str]:
    """Beginning and end of the error for a source that cannot be loaded."""
    return (
        f"No {what} can be loaded from {str(source)!r}",
        (
            "Give a local folder with config.json, *.safetensors and tokenizer files, a GGUF file,"
            " or a Hugging Face id while online."
        ),
    )


def _attempt(load: Callable[[], Any], what: str, remedy: str) -> Any:
    """The result of `load`, whose errors become a DiagnosticsError with their reason."""
    try:
        return load()
    except (DiagnosticsError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file can end in any error of the libraries that read it
        if "custom code" in str(error):
            raise DiagnosticsError(
                f"{what}: it brings code of its own (auto_map), which this program never runs; no"
                " flag allows it. Use a checkpoint of an architecture that transformers has, or"
                " load the model yourself and pass it with its tokenizer to diagnostics.load_pair."
            ) from error
        raise DiagnosticsError(f"{what} ({_reason(error)}). {remedy}") from error


def _reason(error: Exception) -> str:
    """First line of an error's message, and the second where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:400]
    return f"{type(error).__name__}: {said}" if isinstance(error, LookupError) or not said else said


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DiagnosticsError(
            f"Reading {what} needs the package {package}, which is not installed. Run `pip install"
            f" {package}`."
        )


def _quiet_bars_in_logs() -> None:
    """Hide the library's loading bars in logs, as this program hides its own."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """The device of a name; `auto` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        DiagnosticsError: The machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise DiagnosticsError(
            f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Use auto or cpu."
        ) from error
    return place


def shared_template(student, teacher) -> dict[str, Any]:
    """Let one chat template serve both models, and record which one.

    The student's template renders every prompt; a student without one takes the teacher's.

    Args:
        student: Tokenizer of the student; it receives the teacher's template where it has none.
        teacher: Tokenizer of the teacher.

    Returns:
        Facts for the manifest: whose template it is, its hash, a short example, and the same of the
        teacher's template where that differs. {} for a pair without templates.
    """
    own, other = (getattr(tokenizer, "chat_template", None) for tokenizer in (student, teacher))
    if not (own or other):
        return {}
    facts: dict[str, Any] = {"of": "student" if own else "teacher"}
    if not own:
        student.chat_template = other
        log.warning("the student's tokenizer has no chat template: the teacher's is used for both")
    facts |= _described(student)
    if own and other and own != other:
        facts |= {f"teacher_{name}": value for name, value in _described(teacher).items()}
        hashes = facts["sha256"][:12], facts["teacher_sha256"][:12]
        log.warning(
            "the chat templates differ: the student's (%s) renders the prompts of both, not the"
            " teacher's (%s)",
            *hashes,
        )
    return facts


def _described(tokenizer) -> dict[str, str | None]:
    from hashlib import sha256

    from diagnostics.models.chat_templates import Template

    try:
        example = Template(tokenizer)(
            [{"role": "user", "content": "…"}], "the example", add_generation_prompt=True
        )
    except DiagnosticsError:  # its own reason is given where a prompt meets it
        example = None
    return {"sha256": sha256(str(tokenizer.chat_template).encode()).hexdigest(), "example": example}
