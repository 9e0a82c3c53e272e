"""How responses are sampled: the settings, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostics.contexts.verifiers import VERIFIER_FLAG
from diagnostics.models import batch_size

ENGINES = ("transformers", "vllm")
"""What samples responses."""


@dataclass(frozen=True)
class RolloutConfig:
    """Settings of sampling responses."""

    max_new_tokens: int = field(default=64, metadata={"help": "longest response, in tokens"})
    temperature: float = field(
        default=1.0, metadata={"help": "sampling temperature; the divergences keep temperature 1"}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "nucleus mass; 1 keeps the whole vocabulary"}
    )
    top_k: int = field(
        default=0, metadata={"help": "sample from this many most likely tokens; 0 keeps all"}
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "responses per prompt"})
    seed: int = field(default=0, metadata={"help": "seed of sampling"})
    batch_tokens: int | None = field(default=None, metadata=batch_size.FLAG)
    rollout_engine: str = field(
        default="transformers",
        metadata={
            "help": "what samples; vllm must be installed, and forms its own batches",
            "choices": ENGINES,
        },
    )
    verifier: str = field(default="auto", metadata=VERIFIER_FLAG)
