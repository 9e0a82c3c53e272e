"""Which models a pair has: the settings, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.dtypes import DTYPE_NAMES, QUANTIZED
from diagnostics.models.named_pairs import NAMED_PAIRS

STEP_STATES = ("auto", "device", "host", "disk")
"""Where a step can keep what it needs beside the student."""


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
            "choices": DTYPE_NAMES,
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": (
                "teacher's dtype, the student's where not given; int8 and nf4 are bitsandbytes' and"
                " need CUDA"
            ),
            "choices": (*DTYPE_NAMES, *QUANTIZED),
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
    shard_student: bool = field(
        default=False,
        metadata={
            "help": "spread the student's layers, and a probe's state, over the processes (FSDP2)"
        },
    )
    offload_teacher: bool = field(
        default=False,
        metadata={
            "help": "models take turns on the device; the teacher's states wait in main memory"
        },
    )
    step_state: str = field(
        default="auto",
        metadata={
            "help": "where a step keeps theta0, directions and moments",
            "choices": STEP_STATES,
        },
    )


def needs_whole_student(what: str) -> DiagnosticsError:
    """The error for a sharded student where only whole ones can be stepped."""
    return DiagnosticsError(
        f"Got --shard-student, and {what} moves a student that every process holds whole. Leave it"
        " out, use a larger device or --step-state host; rollout, score and probe take a sharded"
        " student, and so does run --quick."
    )
