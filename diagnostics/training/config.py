"""What is trained and how: the settings of a training, readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import as_written
from diagnostics.criteria import TIES_FLAG, TRAINING_SCOPE_FLAG
from diagnostics.measure.loss_names import LOSSES
from diagnostics.models.named_pairs import training_rate
from diagnostics.training import engine_options


@dataclass(frozen=True)
@as_written
class TrainConfig:
    """What is trained, and on which positions.

    Attributes:
        criterion: Which positions carry loss, a registered criterion.
        budget: Share of positions in (0, 1]; None takes the criterion's own.
        loss: One of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`, from 0 to 1; no other loss reads it.
        k: Size of the top-K supports.
        steps: Optimizer steps.
        batch: Responses per step, over all processes and accumulation steps.
        learning_rate: None takes 1e-6, 2e-4 with LoRA, or the named pair's rate.
        seed: Seed of data order, sampling and random selection.
        ties: How equal scores are ordered, as in `criteria.select`.
        scope: Whether the budget is a share of the step's positions or of each response's.
        per_context_minimum: Number of best positions of each response that are kept first, within
            the budget.

    Raises:
        DiagnosticsError: There are no steps or no responses, or the minimum is negative.
    """

    criterion: str = field(
        default="teachability", metadata={"help": "which positions carry loss; see `criteria`"}
    )
    budget: float | None = field(
        default=None, metadata={"help": "share of positions; the criterion's own where not given"}
    )
    loss: str = field(default="reverse_kl", metadata={"help": "OPD loss", "choices": LOSSES})
    beta: float = field(default=0.5, metadata={"help": "teacher's share in the mixture of jsd"})
    k: int = field(default=16, metadata={"help": "size of the top-K supports"})
    steps: int = field(default=150, metadata={"help": "optimizer steps"})
    batch: int = field(
        default=16, metadata={"help": "responses in a step, over all processes and accumulation"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "1e-6, 2e-4 with LoRA, or the named pair's where not given"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of data order, sampling and random selection"}
    )
    ties: str = field(default="raw", metadata=TIES_FLAG)
    scope: str = field(default="batch", metadata=TRAINING_SCOPE_FLAG)
    per_context_minimum: int = field(
        default=0, metadata={"help": "positions of each response that are kept first"}
    )

    def __post_init__(self):
        if self.per_context_minimum < 0:
            raise DiagnosticsError(
                "A minimum per context is a number of positions, 0 or more; got"
                f" {self.per_context_minimum}."
            )
        if self.steps < 1 or self.batch < 1:
            raise DiagnosticsError(
                f"Training needs steps and responses; got steps={self.steps}, batch={self.batch}."
            )

    def rate(self, pair: str, lora_rank: int) -> float:
        """The learning rate in force.

        Args:
            pair: The pair's name.
            lora_rank: Rank of the adapter; 0 trains all weights.
        """
        rate = self.learning_rate
        return training_rate(pair, lora_rank) if rate is None else rate


@dataclass(frozen=True)
class EngineConfig:
    """How TRL runs the training.

    Attributes:
        max_new_tokens: Longest response in tokens.
        accumulation: Micro-batches per step on each process.
        lora_rank: Rank of a LoRA adapter, which needs peft; 0 trains all weights.
        save_every: Steps between two checkpoints; 0 writes none.
        probe_every: Steps between two measurements of the frozen bank, which is also measured after
            the first and the last step; 0 never measures it.
        measure_every: Steps between two measurements of the training batch that only the log needs
            (`Selection.measure_every`); the steps between them log less.
        report_to: A tracker that gets the log and our tables as well (`training.trackers`).
        resume: Whether training continues from the last checkpoint in the output directory.
        trl: Further fields of TRL's DistillationConfig: a JSON file, or an object written out.
        peft: Further fields of peft's LoraConfig: a JSON file, or an object written out.
    """

    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    accumulation: int = field(
        default=1, metadata={"help": "micro-batches in a step on each process"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "train a LoRA of this rank (needs peft); 0 trains all weights"}
    )
    save_every: int = field(
        default=50, metadata={"help": "checkpoint after every so many steps; 0: none"}
    )
    probe_every: int = field(
        default=0,
        metadata={
            "help": (
                "re-score the frozen bank after step 1, every so many steps and the last; 0: never"
            )
        },
    )
    measure_every: int = field(
        default=1,
        metadata={
            "help": (
                "measure what only the log needs at every so many steps: all where the criterion"
                " reads no measurement (full, random)"
            )
        },
    )
    report_to: str = field(
        default="none",
        metadata={
            "help": "tracker that gets the log and our tables as well",
            "choices": engine_options.REPORT_TO,
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "go on from the last checkpoint in the output directory"}
    )
    trl: str | None = field(
        default=None,
        metadata={
            "help": (
                "further fields of TRL's DistillationConfig (vLLM, bf16, …): a JSON file, or an"
                " object written out"
            )
        },
    )
    peft: str | None = field(
        default=None,
        metadata={
            "help": (
                "further fields of peft's LoraConfig (targets, alpha, DoRA, …): a JSON file, or an"
                " object written out"
            )
        },
    )
