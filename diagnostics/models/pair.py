"""A teacher and a student over one shared vocabulary: loaded, checked and described."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank
from diagnostics.models import topk_teacher
from diagnostics.models.config import STEP_STATES, PairConfig
from diagnostics.models.loading import (
    SOURCE_FACTS,
    load_model,
    load_tokenizer,
    move,
    shared_template,
)
from diagnostics.models.named_pairs import NAMED_PAIRS, named_pair
from diagnostics.models.readout import Readout
from diagnostics.models.special_tokens import (
    STOP_COLUMNS,
    differing_special_ids,
    gradable,
    stop_rows,
    turn_end,
    warn_of_dropped,
    warn_of_stops,
)
from diagnostics.models.weights import weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("diagnostics")
SMALLER = 0.9
"""A teacher below this share of the student's parameters is remarked upon. An adapter on the same
base model adds a few percent, and is no reason to."""


@dataclass
class Pair:
    """A student and the teacher that grades it, over one shared vocabulary."""

    name: str
    """Name of the pair, or "custom"."""
    student: Readout
    teacher: Readout | topk_teacher.TopKTeacher | None
    """None where the student only samples responses."""
    tokenizer: PreTrainedTokenizerBase
    facts: dict = field(default_factory=dict)
    """Facts for the manifest: identities and dtypes of the models, vocabulary, chat template."""
    offload_teacher: bool = False
    """True where the teacher is on the device only while its states are computed; a copy of its
    head stays there."""
    step_state: str = "auto"
    """Where a step keeps what it needs beside the student (`probing.step_state`)."""

    stops: list[dict] = field(default_factory=list)
    """Rows of `stop_tokens`."""
    teacher_reads: PreTrainedTokenizerBase | None = None
    """The teacher's tokenizer where its special tokens have other names: it encodes, and renders,
    what the teacher alone reads. None where both models have one tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Number of shared ids."""
        return self.student.vocabulary

    @property
    def window(self) -> int | None:
        """Length in tokens that both models can read; None where neither names one."""
        run = [
            readout.config
            for readout in (self.student, self.teacher)
            if isinstance(readout, Readout)
        ]
        sizes = [
            getattr(config.get_text_config(), "max_position_embeddings", None) for config in run
        ]
        return min((size for size in sizes if size), default=None)

    def release_teacher(self) -> None:
        """Free the memory of the teacher's layers, where they can be loaded again (`Readout`)."""
        if isinstance(self.teacher, Readout) and not self.offload_teacher:
            self.teacher.release()

    @contextmanager
    def teachers_turn(self) -> Iterator[None]:
        """Swap the models: the teacher has the device, and the student waits in main memory.

        Afterwards the models swap back.

        Raises:
            DiagnosticsError: The pair has no teacher that can be run.
        """
        teacher = self.teacher
        if not isinstance(teacher, Readout):
            raise DiagnosticsError(
                f"The pair {self.name!r} has no teacher that can be run, so the models cannot take"
                " turns. Name a model with --teacher."
            )
        device = self.student.device
        move(self.student.model, "cpu")
        move(teacher.model, device)
        try:
            yield
        finally:
            teacher.park()
            move(self.student.model, device)

    def __repr__(self) -> str:
        roles = [
            f"{role} {' '.join(filter(None, _summary(self.facts[role])))}"
            for role in ("student", "teacher")
            if self.facts.get(role)
        ]
        models = "; ".join(roles) or "models in memory"
        return f"<Pair {self.name}: {models}; {self.vocabulary:,} shared tokens>"

    def _repr_html_(self) -> str:
        """Names, sizes and dtypes of both models, for a notebook."""
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
    def dropped(self) -> tuple[int, ...]:
        """Ids that are special tokens of other names for the teacher, and left out of both
        distributions (`models.special_tokens`).
        """
        return self.student.excluded

    def graded(self, bank: Bank) -> Bank:
        """The bank without positions whose sampled token the teacher cannot grade: one of the
        dropped ids.
        """
        return gradable(bank, self.dropped)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's and those of the student's own settings."""
        named = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        return tuple(sorted({*_own_ends(self.student.model), *named}))


def _summary(facts: dict) -> list[str]:
    """Name, architecture, size and dtype of a model, empty where not known."""
    parameters = f"{facts['parameters']:,} parameters" if "parameters" in facts else ""
    return [
        str(facts.get("name", "")),
        str(facts.get("architecture", "")),
        parameters,
        str(facts.get("dtype", "")),
    ]


def _summary_row(role: str, facts: dict) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in _summary(facts))
    return f"<tr><th>{role}</th>{cells}</tr>"


def _warn_if_swapped(facts: dict) -> None:
    """Say so where the teacher is the smaller model: the two may have been swapped."""
    student, teacher = (facts[role].get("parameters") for role in ("student", "teacher"))
    if student and teacher and teacher < SMALLER * student:
        log.warning(
            "the teacher has %s parameters and the student %s: if the two are swapped, exchange"
            " student and teacher",
            f"{teacher:,}",
            f"{student:,}",
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
    shard_student: bool = False,
    step_state: str = PairConfig.step_state,
    alone: bool = False,
) -> Pair:
    """Load a named pair, or any two causal language models that share a tokenizer.

    Both models run in eval mode. Configured vocabularies of different size are cut to the shared
    ids. Where the chat templates differ, the student's template serves both models.

    Args:
        pair: Name of a named pair, such as `embedded` or `smollm2`, in place of `student` and
            `teacher`.
        student: Hugging Face id, local folder, LoRA adapter, GGUF file (`models.loading`), or a
            model in memory; a model in memory needs `tokenizer`.
        teacher: The same of the teacher.
        teacher_logprobs: File of a teacher's top-K log-probabilities in place of a teacher
            (`models.topk_teacher`).
        tokenizer: Tokenizer of both models; None loads each model's own and compares them.
        student_revision: Branch, tag or commit of a Hugging Face id.
        teacher_revision: The same of the teacher.
        dtype: Dtype of the student's weights; a step needs float32 or float64.
        teacher_dtype: Dtype of the teacher's weights, or `int8` or `nf4` (CUDA only); None means
            the student's dtype.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        teacher_device: Device of the teacher; None means `device`.
        offload_teacher: Whether the models take turns on the device, and the waiting one lies in
            main memory.
        shard_teacher: Whether the teacher's layers are spread over the processes (FSDP2).
        shard_student: The same of the student, with theta0, gradients, directions and moments of a
            probe's steps.
        step_state: Where a step keeps what it needs beside the student: `auto`, `device`, `host` or
            `disk` (`probing.step_state`).
        alone: Whether a student without a teacher is enough, as for sampling responses.

    Returns:
        The pair, with the facts that a manifest records.

    Raises:
        DiagnosticsError: The name is unknown, arguments contradict each other, a model cannot be
            read, or the tokenizers map a token to different ids.
    """
    sharded = [
        f"--shard-{w}" for w, s in (("teacher", shard_teacher), ("student", shard_student)) if s
    ]
    _refuse_conflicts(
        pair, student, teacher, teacher_logprobs, sharded=sharded if offload_teacher else []
    )
    if step_state not in STEP_STATES:
        raise DiagnosticsError(
            f"Unknown step state {step_state!r}. Known are {', '.join(STEP_STATES)}."
        )
    if pair is not None:
        student, teacher = named_pair(pair).folders()
        teacher = None if teacher_logprobs else teacher
    student_place = "cpu" if shard_student else device  # its layers move when they are sharded
    load_student = partial(load_model, student, student_revision, dtype=dtype, device=student_place)
    name = pair or "custom"
    if student is not None and teacher is None and (teacher_logprobs is not None or alone):
        model = load_student()
        own = tokenizer or load_tokenizer(student, student_revision)
        assembled = _without_teacher(name, model, own, teacher_logprobs)
    else:
        _require_both(student, teacher)
        waiting = teacher_device or ("cpu" if offload_teacher else device)
        place = "cpu" if shard_teacher else waiting  # its layers move likewise
        dtype = teacher_dtype or dtype
        load_teacher = partial(load_model, teacher, teacher_revision, dtype=dtype, device=place)
        named = ((student, student_revision), (teacher, teacher_revision))
        assembled = _with_teacher(name, _tokenizers(tokenizer, *named), load_student, load_teacher)
        assembled.offload_teacher = offload_teacher
        if shard_teacher and isinstance(assembled.teacher, Readout):
            assembled.teacher.shard(teacher_device or device)
    assembled.step_state = step_state
    if shard_student:
        assembled.student.shard(device, whose="student")
    return assembled


def _require_both(student: object, teacher: object) -> None:
    """Refuse a pair without one of its models."""
    if student is None or teacher is None:
        raise DiagnosticsError(
            f"A pair needs both models; got student={student!r}, teacher={teacher!r}. Give both, or"
            f" one of {', '.join(NAMED_PAIRS)}."
        )


def _with_teacher(
    name: str,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    load_student: partial[PreTrainedModel],
    load_teacher: partial[PreTrainedModel],
) -> Pair:
    """Load both models, and say in the pair's facts what differs between their tokenizers."""
    dropped = differing_special_ids(*tokenizers)
    template = shared_template(*tokenizers)
    # the larger one first: while a model is loaded, the pages of its file are in memory as well
    teacher_model = load_teacher()
    assembled = assemble(name, load_student(), teacher_model, tokenizers[0], dropped=dropped)
    assembled.facts |= {"chat_template": template} if template else {}
    assembled.stops = _stops(assembled, *tokenizers)
    different = warn_of_dropped(tokenizers[0], tokenizers[1], dropped)
    assembled.facts |= {"special_tokens": different} if different else {}
    assembled.teacher_reads = tokenizers[1] if dropped else None
    source = load_teacher.args[0]
    if isinstance(assembled.teacher, Readout) and _can_be_loaded_again(source, teacher_model):
        assembled.teacher.load_again = load_teacher
    return assembled


def _can_be_loaded_again(source, model: PreTrainedModel) -> bool:
    """True for a model that came from files, and whose weights are plain numbers there."""
    return isinstance(source, (str, Path)) and "quantised" not in getattr(model, SOURCE_FACTS, {})


def _refuse_conflicts(pair, student, teacher, teacher_logprobs, *, sharded: list[str]) -> None:
    """Refuse arguments of `load_pair` of which only one can be followed.

    sharded: flags that keep a model on its devices, where the models are to take turns.
    """
    if sharded:
        whose = sharded[0].removeprefix("--shard-")
        raise DiagnosticsError(
            f"Got {sharded[0]} and --offload-teacher. A sharded {whose} stays on its devices;"
            " give one or the other."
        )
    if pair is not None and (student is not None or teacher is not None):
        raise DiagnosticsError(
            f"Got the named pair {pair!r} and a student or teacher as well. Give one or the other."
        )
    if teacher is not None and teacher_logprobs is not None:
        raise DiagnosticsError(
            f"Got the teacher {teacher!r} and its log-probabilities in {teacher_logprobs} as well."
            " Give one or the other."
        )


def _tokenizers(tokenizer, *sources: tuple) -> list[PreTrainedTokenizerBase]:
    """The student's tokenizer and the teacher's; the same one twice where one is given."""
    return [tokenizer or load_tokenizer(*source) for source in sources]


def _stops(pair: Pair, student, teacher) -> list[dict]:
    """The stop tokens of both models; a mismatch is warned of."""
    assert isinstance(pair.teacher, Readout)
    rows = stop_rows(
        student,
        teacher,
        ends=(_own_ends(pair.student.model), _own_ends(pair.teacher.model)),
        turn_end=turn_end(student),
        dropped=pair.dropped,
    )
    warn_of_stops(rows)
    return rows


def _own_ends(model: PreTrainedModel) -> tuple[int, ...]:
    """End ids of a model's own generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return tuple(i for i in (own if isinstance(own, (list, tuple)) else [own]) if i is not None)


def assemble(
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dropped: Sequence[int] = (),
) -> Pair:
    """Join two models in memory to a pair, and record their identities.

    Args:
        name: Name of the pair, for the manifest.
        student: Causal language model; it is put into eval mode.
        teacher: Causal language model; it is put into eval mode.
        tokenizer: Tokenizer of both.
        dropped: Ids that are left out of both distributions, since they are special tokens of other
            names for the teacher.

    Returns:
        The pair, cut to the smaller of the two configured vocabularies.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    shared = min(sizes)
    if sizes[0] != sizes[1]:
        log.warning(
            "configured vocabularies differ (student %d, teacher %d): both are cut to %d ids and"
            " renormalized",
            *sizes,
            shared,
        )
    readouts = [
        Readout(model, vocabulary=shared, excluded=dropped)
        for model in (student.eval(), teacher.eval())
    ]
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
    if not getattr(teacher.config, "quantization_config", None):  # packed weights count fewer
        _warn_if_swapped(facts)
    return Pair(name, readouts[0], readouts[1], tokenizer, facts)


def _without_teacher(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    logprobs: str | Path | None,
) -> Pair:
    """A student alone, or with a teacher known by a file of log-probabilities."""
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


def identity(model: PreTrainedModel) -> dict:
    """Name, architecture, size, dtype and weight hash of a model."""
    source = getattr(model.config, "_name_or_path", "") or ""
    return {
        "name": Path(source).name if os.path.isdir(source) else source,
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights_sha256": weights_sha256(model),
        **getattr(model, SOURCE_FACTS, {}),
    }


def stop_tokens(pair: Pair) -> pd.DataFrame:
    """Tabulate the tokens that end a response for the student or for the teacher.

    Args:
        pair: A loaded pair.

    Returns:
        One row per id, with token_id, student_token and teacher_token (its names), ends_student and
        ends_teacher (whether the model stops there), ends_turn (the chat template ends a turn
        there), dropped (it is left out of both distributions), and note (what a mismatch touches;
        empty where there is none).
    """
    return pd.DataFrame(pair.stops, columns=list(STOP_COLUMNS))
