"""TRL's DistillationTrainer with the loss on the positions that a criterion selects.

After TRL has generated the batch of an optimizer step:

    measure   `divergences.measure_hidden` at every valid response position
    table     the positions of the whole step, over all processes and accumulation steps, as a
              token table
    select    m = `criteria.select` at the budget, or w = the scores of a criterion of kind *weight*
    loss      sum_i m_i l_i / sum_i m_i       both sums over the whole step

All of this happens within the loss's one forward pass: the states that carry the gradient are
measured as they are, and the loss is taken on those of the selected positions. In two cases the
student runs over the batch once before, without a gradient: with several micro-batches in a step,
since the selection is made over all of them before the first has its loss, and where training draws
noise (dropout, NEFTune), since a measurement with noise would not be of p. The teacher runs once
in every case.

TRL's loss mask is `completion_mask * tool_mask` and its denominator `num_items_in_batch`. The mask
m enters the first as `tool_mask`, and its sum replaces the second, so that generation,
accumulation, sharding, checkpoints and trackers stay TRL's. A loss of TRL's beta family on all
positions runs on TRL's own kernel, and on the first batch it is compared with ours, which detects a
release that changed either. Every other loss runs on `losses`, which projects no position that is
not selected.

Every response is sampled from a stream named by (seed, row of the data), so that the text depends
neither on the number of processes nor on whether training was interrupted. (With vLLM, which
samples by itself, neither holds.)

Reference: TA-OPD, arXiv 2605.26844. Departures from its released code: exact C, and D exactly on
the union of the supports; the batch's quantiles over valid response positions only; equal scores at
the budget are ordered by the unclipped score.

Axes: B responses of this process, T response tokens, n valid positions of this process, N positions
of the step, H hidden size."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from trl import DistillationTrainer
from trl import __version__ as trl_version
from trl.models.utils import unwrap_model_for_generation

from diagnostics import criteria
from diagnostics.contexts import generation
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import column
from diagnostics.core.tables import write_json
from diagnostics.measure import divergences, extras, losses, overlap
from diagnostics.measure.extra_names import extras_of
from diagnostics.models.pair import Pair
from diagnostics.models.readout import Readout
from diagnostics.models.readout import backbone as find_backbone
from diagnostics.training import step_metrics

log = logging.getLogger("diagnostics")

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}
"""The betas of the two ends of TRL's family; `jsd` lies between them."""
KEYS = ("context_id", "position", "response_length", "token_id")
"""Columns of a step's table that no model is measured for."""
PARITY = 1e-3
"""Relative difference between TRL's loss and ours, from the same states, above which training
stops.
"""
PARITY_HALF = 5e-2
"""The same where one model's states are in half precision, whose projection may be rounded in
another order.
"""
NOISE = ("drop", "jitter")
"""Parts of the names of a module's numbers that let a forward pass in training draw noise."""
ASIDE = ("teacher_states", "loss_weights", "student_entropy")
"""Tensors that the loss needs and TRL's batch does not have. They bypass the student's wrapper,
since FSDP2 casts its inputs to bfloat16.
"""
PLACE = "place"
"""Each response's place in the batch before TRL shuffled it. The step's table is in that order, so
that a random selection, and the order of equal scores, are those of every other way to train.
"""
VLLM_ONLY = {
    "min_p": (None,),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
    "cache_implementation": (None,),
}
"""Generation options that act in vLLM but not in our own sampling, with their neutral values."""

RELIED_ON = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_tokenize_prompts": ("self", "prompts"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "has_tool_images",
    ),
    "_get_last_hidden_state": (
        "self",
        "unwrapped_model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ),
    "_compute_loss": ("self", "unwrapped_student", "inputs", "num_items_in_batch"),
    "log": ("self", "logs", "start_time"),
}
"""TRL methods that are overridden or called, with the names of their first parameters."""
ATTRIBUTES = (
    "_forward_redirection",
    "_metrics",
    "_dist",
    "eos_token_ids",
    "generation_kwargs",
    "teacher_model",
    "beta",
    "compute_loss",
    "_save",
)
BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch")


def check_contract(trainer: type = DistillationTrainer, version: str = trl_version) -> None:
    """Check that the installed TRL has the methods that this module relies on.

    Args:
        trainer: TRL's trainer class.
        version: TRL's version, for the message.

    Raises:
        DiagnosticsError: A method is missing, or its first parameters have other names.
    """
    for name, expected in RELIED_ON.items():
        method = getattr(trainer, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found is None or found[: len(expected)] != expected:
            shown = "is missing" if found is None else f"takes ({', '.join(found)})"
            raise DiagnosticsError(
                f"TRL {version} is not the release that training was written for:"
                f" DistillationTrainer.{name} {shown}, and ({', '.join(expected)}, …) is relied on."
                " Install trl==1.16.0."
            )


def _check_names(what: str, found, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise DiagnosticsError(
            f"TRL {trl_version} is not the release that training was written for: {what} lacks"
            f" {', '.join(missing)}. Install trl==1.16.0."
        )


@dataclass(frozen=True)
class Selection:
    """Which positions carry loss, and which loss."""

    criterion: str
    """A registered criterion."""
    budget: float | None = None
    """Share of the step's positions, in (0, 1]; None takes the criterion's own."""
    loss: str = "reverse_kl"
    beta: float = 0.5
    """The teacher's share in the mixture of `jsd`."""
    k: int = 16
    """Size of the top-K supports."""
    seed: int = 0
    """Seed of sampling and of random selections."""
    ties: criteria.Ties = "raw"
    """How equal scores are ordered, as in `criteria.select`."""
    scope: Literal["batch", "context"] = "batch"
    """Whether the budget is a share of the step's positions or of each response's."""
    per_context_minimum: int = 0
    """Number of best positions of every response that are kept first, within the budget."""
    measure_every: int = 1
    """Steps between two measurements that only the log needs: all of them under a criterion that
    reads none, such as full and random, and those of `measure.overlap` under any other."""

    def is_due(self, step: int) -> bool:
        """Whether what only the log needs is measured at a step."""
        return step % self.measure_every == 0

    def measures(self, step: int) -> bool:
        """Whether the positions of a step are measured: for the selection, or for the log."""
        return bool(set(criteria.find(self.criterion).needs) - set(KEYS)) or self.is_due(step)

    def more(self) -> divergences.More | None:
        """Measures the columns that the criterion reads beside the usual ones."""
        return extras.asked(extras_of(criteria.find(self.criterion).needs), k=self.k)

    def of_lists(self, step: int) -> divergences.OfLists | None:
        """Measures the columns that the log reads beside the usual ones."""
        return partial(overlap.measure_overlap, k=self.k) if self.is_due(step) else None

    def _rules(self) -> dict[str, Any]:
        return {
            "ties": self.ties,
            # The table of a step is one batch.
            "scope": "table" if self.scope == "batch" else "context",
            "per_context_minimum": self.per_context_minimum,
        }

    def weights(self, tokens: pd.DataFrame, *, step: int) -> np.ndarray:
        """Loss weights of the positions of one step.

        A criterion of kind *weight* gives soft weights at a budget of 1; at a smaller budget its
        scores are ranked like any other's.

        Args:
            tokens: The step's token table, one row per position.
            step: Number of the optimizer step, which seeds random selections.

        Returns:
            Float64 [N]: 0 or 1, or a soft weight; the mean over the nonzero ones is 1. A position
            whose divergences are not finite has weight 0, where the table has them.

        Raises:
            DiagnosticsError: No position is left.
        """
        entry = criteria.find(self.criterion)
        if entry.kind == "weight" and (self.budget or entry.budget) == 1:
            weights = np.nan_to_num(criteria.score_criterion(tokens, self.criterion)).clip(min=0)
        else:
            weights = criteria.select(
                tokens, self.criterion, budget=self.budget, seed=[self.seed, step], **self._rules()
            ).astype(np.float64)
        if "forward_kl" in tokens:
            finite = np.isfinite(tokens["forward_kl"]) & np.isfinite(tokens["reverse_kl"])
            weights = np.where(finite, weights, 0.0)
        if not weights.sum() > 0:
            raise DiagnosticsError(
                f"Criterion {self.criterion!r} selects none of the {len(tokens)} positions of step"
                f" {step}. Use a larger batch or budget."
            )
        return weights * (np.count_nonzero(weights) / weights.sum())

    def masks(self, tokens: pd.DataFrame) -> dict[str, np.ndarray]:
        """Selections of the other criteria in `step_metrics.COMPARED` at this budget.

        Args:
            tokens: The step's token table, one row per position.

        Returns:
            Mask bool [N] by criterion.
        """
        budget = self.budget if self.budget is not None else criteria.find(self.criterion).budget
        return {
            name: criteria.select(tokens, name, budget=budget, seed=self.seed, **self._rules())
            for name in step_metrics.COMPARED
            if name != criteria.find(self.criterion).name
        }


def name_base(folder: Path) -> None:
    """Let a saved adapter name its base model by the last name of its folder.

    peft writes the whole path, and a home folder with it, into the settings and a README.md; while
    it saves it needs the path, or it asks the hub for a model of that name."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if base and Path(base).is_dir():
        settings["base_model_name_or_path"] = Path(base).absolute().name
        write_json(path, settings)
        (folder / "README.md").unlink(missing_ok=True)


class SelectedDistillationTrainer(DistillationTrainer):
    """`DistillationTrainer` whose loss counts only the positions of a `Selection`, or weighs them.

    Args:
        pair: Student and teacher. The student is trained in place; the teacher's vocabulary is cut
            to the student's.
        selection: Which positions carry loss, and which loss.
        options: TRL's own arguments `args`, `train_dataset`, `peft_config`, `callbacks` and
            `optimizers`. The dataset has a column `prompt` (text as the tokenizer will see it),
            `row` (its number, which names the sampling stream) and, where a chat template wrote the
            text, `ids` (its token ids; without this column `encoding.encode_prompt` of the text).

    Raises:
        DiagnosticsError: The pair, an option or the engine cannot be trained correctly.
    """

    def __init__(self, pair: Pair, selection: Selection, **options):
        check_contract()
        losses.check_loss(selection.loss, beta=selection.beta, k=selection.k)
        criteria.find(selection.criterion)
        _check_pair(pair)
        _check_options(selection, options)
        self.pair, self.selection = pair, selection
        self._streams: list[np.random.Generator] = []
        self._prompt_ids: list[list[int] | None] = []
        self._checked = False
        self._aside: dict[str, Tensor] = {}
        self.watch: Callable[[int, pd.DataFrame, np.ndarray], None] = lambda *_: None
        """Called at every step with its number, its token table and the loss weights."""
        for readout in (pair.student, pair.teacher):
            _name_backbone(readout.model)
        super().__init__(
            model=pair.student.model,
            teacher_model=_same_vocabulary(pair),
            processing_class=pair.tokenizer,
            **options,
        )
        _check_names("the trainer", dir(self), ATTRIBUTES)
        _check_engine(zero3=self._dist.is_zero3, fsdp=self._dist.fsdp_version)
        _check_adapter(self.model)
        self.beta = BETAS.get(selection.loss, selection.beta)
        self.shares_forward = self.args.gradient_accumulation_steps == 1 and not _is_noisy(
            self.model, self.args
        )

    @property
    def begun(self) -> bool:
        """Whether a batch was generated: a later failure is not due to the settings."""
        return bool(self._streams)

    def _send_telemetry(self) -> None:
        """Send nothing: training reports to the run directory and the requested trackers only."""

    def create_model_card(self, *_, **__) -> None:
        """Write nothing: the run directory has a manifest instead."""

    # --- generation ---

    def _tokenize_prompts(self, prompts):
        """The examples' own ids, or those of `encode_prompt`.

        TRL would add special tokens to text that has them already.
        """
        if not all(isinstance(prompt, str) for prompt in prompts):
            return super()._tokenize_prompts(prompts)
        known = self._prompt_ids if len(self._prompt_ids) == len(prompts) else [None] * len(prompts)
        return (
            [
                list(encode_prompt(self.pair.tokenizer, text) if ids is None else ids)
                for text, ids in zip(prompts, known)
            ],
            None,
            {},
        )

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        """Sample one response per prompt from the prompt's own stream."""
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, has_tool_images
            )
        chooser = generation.StreamSampler(
            self._streams, self.temperature, self.top_p, self.top_k, self.pair.vocabulary
        )
        whole = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        autocast = self._autocast(self.accelerator.unwrap_model(self.model_wrapped), student=True)
        with (
            whole as student,
            _without_noise(student),
            torch.no_grad(),
            autocast,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            return generation.generate(
                student,
                prompt_ids,
                chooser,
                end_ids=self.eos_token_ids,
                max_new_tokens=self.max_completion_length,
                halves=self.accelerator.num_processes == 1,
            )

    def _generate_and_score_completions(self, inputs):
        """TRL's batch with its loss narrowed to the selected positions."""
        self._streams = [
            generation.random_stream(self.selection.seed, "train", example["row"])
            for example in inputs
        ]
        self._prompt_ids = [example.get("ids") for example in inputs]
        batch = super()._generate_and_score_completions(inputs)
        _check_names("the batch", batch, BATCH)
        torch.manual_seed(
            int(
                generation.random_stream(
                    self.selection.seed, "step", self.state.global_step
                ).integers(2**31)
            )
        )
        if not self.shares_forward:
            measures = self.selection.measures(self.state.global_step)
            return self._narrow(batch, *(self._measure(batch) if measures else ({}, None)))
        return batch | {PLACE: torch.arange(len(inputs), device=batch["completion_ids"].device)}

    # --- selection ---

    def _narrow(self, batch: dict, columns: dict[str, Tensor], teacher_BTH: Tensor | None) -> dict:
        """Put the selection of the whole step into the batch's loss mask and denominator.

        columns: measurements [n] of this process's valid positions, by name; none in a step that is
        not measured. teacher_BTH: the teacher's states, where they are known already."""
        valid_BT = _valid(batch)
        place_B = batch.get(PLACE, torch.arange(len(valid_BT), device=valid_BT.device))
        tokens, mine_N = self._table(columns, valid_BT, batch["completion_ids"], place_B.argsort())
        weights_N = self.selection.weights(tokens, step=self.state.global_step)
        self._record(tokens, weights_N)
        weights_BT = torch.zeros(valid_BT.shape, dtype=torch.float64)
        weights_BT[valid_BT[place_B.argsort()].cpu()] = torch.from_numpy(weights_N[mine_N])
        weights_BT = weights_BT[place_B.cpu()]
        entropy_BT = torch.full(valid_BT.shape, torch.nan, dtype=torch.float64)
        if columns:
            entropy_BT[valid_BT.cpu()] = columns["student_entropy"].cpu()
        device = valid_BT.device
        narrowed = batch | {
            "tool_mask": (weights_BT > 0).to(device, batch["completion_mask"].dtype),
            "loss_weights": weights_BT.float().to(device),
            "student_entropy": entropy_BT.float().to(device),
            "num_items_in_batch": torch.tensor(np.count_nonzero(weights_N), device=device),
        }
        return narrowed if teacher_BTH is None else narrowed | {"teacher_states": teacher_BTH}

    def _select_within(self, student, inputs: dict) -> dict:
        """The batch with its selection, from the states that the loss is then taken on."""
        student_BTH = self._own_states(student, inputs)
        teacher_BTH = self._teacher_states(inputs)
        columns = {}
        if self.selection.measures(self.state.global_step):
            columns = self._measure_states(student, student_BTH.detach(), teacher_BTH, inputs)
        narrowed = self._narrow(inputs, columns, teacher_BTH)
        self._aside = {name: narrowed[name] for name in ASIDE} | {"student_states": student_BTH}
        return {name: value for name, value in narrowed.items() if name not in ASIDE}

    @torch.no_grad()
    def _teacher_states(self, inputs: dict) -> Tensor:
        """The teacher's states [B, T, H] at the response's positions."""
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        return self._forward_redirection(
            self.teacher_model, teacher, self._get_last_hidden_state, teacher, *_sequences(inputs)
        )

    def _measure_states(
        self, student, student_BTH: Tensor, teacher_BTH: Tensor, inputs: dict
    ) -> dict[str, Tensor]:
        """Measurements [n] of the valid positions, from the states of both models."""
        valid_BT = _valid(inputs)
        student_nH, teacher_nH = student_BTH[valid_BT], teacher_BTH[valid_BT]
        return divergences.measure_hidden(
            student_nH,
            self._student_logits(student, student_nH),
            teacher_nH,
            self._teacher_logits(teacher_nH),
            inputs["completion_ids"][valid_BT],
            k=self.selection.k,
            more=self.selection.more(),
            of_lists=self.selection.of_lists(self.state.global_step),
        )

    @torch.no_grad()
    def _measure(self, batch: dict) -> tuple[dict[str, Tensor], Tensor]:
        """Measurements [n] of this process's valid positions, and the teacher's states [B, T, H],
        from a pass of its own.

        The loss reuses the states. It and this pass take the same number of responses at a time, so
        that accumulation bounds the memory of both."""
        valid_BT = _valid(batch)
        rows = self.args.per_device_train_batch_size
        named = {name: batch[name] for name in BATCH[:-1]} | {"tool_mask": valid_BT}
        parts = []
        with _without_noise(self.model_wrapped):
            for start in range(0, len(valid_BT), rows):
                parts += self._measure_rows(
                    {name: value[start : start + rows] for name, value in named.items()}
                )
        columns, states = zip(*parts, strict=True)
        return {
            name: torch.cat([part[name] for part in columns]) for name in columns[0]
        }, torch.cat(states)

    def _measure_rows(self, part: dict[str, Tensor]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Measurements and teacher's states of some responses; out of memory, in two halves."""
        try:
            return [self._measured(part)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            count = len(part["completion_ids"])
            if count == 1 or self.accelerator.num_processes > 1:
                raise DiagnosticsError(
                    f"Scoring {count} responses at once does not fit in memory"
                    f" ({(str(error).splitlines() or ['?'])[0]}). Raise --accumulation, lower"
                    " --max-new-tokens or use --teacher-dtype bfloat16."
                ) from error
            log.warning("%d responses do not fit in memory at once: scored in halves", count)
        halves = (slice(0, count // 2), slice(count // 2, count))
        return [
            done
            for rows in halves
            for done in self._measure_rows({name: value[rows] for name, value in part.items()})
        ]

    def _measured(self, part: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """One pass of both models.

        Measurements leave the student's wrapper through a closure, since FSDP2 casts its results.
        """
        student = self.accelerator.unwrap_model(self.model_wrapped)
        found: dict[str, Tensor] = {}
        with self.compute_loss_context_manager():
            teacher_BTH = self._teacher_states(part)

            def inside(model) -> None:
                student_BTH = self._get_last_hidden_state(model, *_sequences(part))
                found.update(self._measure_states(model, student_BTH, teacher_BTH, part))

            self._forward_redirection(self.model_wrapped, student, inside, student)
        return found, teacher_BTH

    def _student_logits(self, model, states: Tensor) -> divergences.Logits:
        return _gathered(
            self.pair.student, dtype=states.dtype, head=model.get_output_embeddings()
        ).logits

    def _teacher_logits(self, states: Tensor) -> divergences.Logits:
        return _gathered(self.pair.teacher, dtype=states.dtype).logits

    def _table(
        self, columns: dict[str, Tensor], valid_BT: Tensor, ids_BT: Tensor, order_B: Tensor
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """The token table of the whole step, and a mask bool [N] of this process's rows.

        The table is the same on every process. order_B: the responses in the table's order."""
        names = sorted(columns)
        dense_BTM = torch.zeros(
            *valid_BT.shape, 2 + len(names), dtype=torch.float64, device=valid_BT.device
        )
        dense_BTM[..., 0], dense_BTM[..., 1] = valid_BT, ids_BT
        dense_BTM[valid_BT] = torch.cat(
            [dense_BTM[valid_BT][:, :2]]
            + [columns[name].double()[:, None].to(valid_BT.device) for name in names],
            1,
        )
        dense_BTM = dense_BTM[order_B]
        if self.accelerator.num_processes > 1:
            dense_BTM = self.accelerator.gather(
                self.accelerator.pad_across_processes(dense_BTM, dim=1)
            )
        whole_BTM = dense_BTM.cpu().numpy()
        context_N, position_N = np.nonzero(whole_BTM[..., 0])
        rows_NM = whole_BTM[context_N, position_N]
        lengths_B = whole_BTM[..., 0].sum(1).astype(np.int32)
        names_B = np.arange(len(whole_BTM)).astype(str).astype(object)
        tokens = pd.DataFrame(
            {
                "context_id": names_B[context_N],
                "position": position_N.astype(np.int32),
                "response_length": lengths_B[context_N],
                "token_id": rows_NM[:, 1].astype(np.int32),
            }
            | {name: _typed(name, rows_NM[:, 2 + i]) for i, name in enumerate(names)}
        )
        return tokens, context_N // len(valid_BT) == self.accelerator.process_index

    def _record(self, tokens: pd.DataFrame, weights_N: np.ndarray) -> None:
        """Log the selected positions, all positions, and the overlap with other criteria."""
        metrics = step_metrics.counts(weights_N)
        if "forward_kl" in tokens:
            self.watch(self.state.global_step + 1, tokens, weights_N)
            metrics |= step_metrics.measured(tokens, weights_N, self.selection.masks(tokens))
        for name, value in metrics.items():
            self._metrics["train"][name].append(float(value))

    # --- loss ---

    @property
    def _trl_loss(self) -> bool:
        """Whether TRL takes the loss: a member of its beta family, on all positions."""
        every = criteria.find(self.selection.criterion).kind == "all"
        scaled = any(map(_scales_otherwise, (self.pair.student, self.pair.teacher)))
        return self.selection.loss in (*BETAS, "jsd") and every and not scaled

    def _get_last_hidden_state(self, unwrapped_model, *arguments, **more):
        """TRL's method under the requested autocast.

        Within the loss, states are those of the measurement, so that no model runs twice.
        """
        student = unwrapped_model is self.accelerator.unwrap_model(self.model_wrapped)
        known = self._aside.get("student_states" if student else "teacher_states")
        if known is not None:
            return known
        with self._autocast(unwrapped_model, student=student):
            states = super()._get_last_hidden_state(unwrapped_model, *arguments, **more)
            kind = states.device.type
            dtype = (
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
            )
        return states.to(dtype)

    def _autocast(self, model, *, student: bool) -> AbstractContextManager:
        """Mixed precision for a backbone in float32; FSDP2 casts the student itself.

        Accelerate wraps `forward` in an autocast, and the backbones here are called without it.
        """
        if model.dtype != torch.float32 or (student and self.is_fsdp_enabled):
            return nullcontext()
        return self.accelerator.autocast()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's method, with our own tensors kept from the student's wrapper.

        The logged loss keeps its full precision.
        """
        self._aside = {name: inputs[name] for name in ASIDE if name in inputs}
        try:
            loss = super().compute_loss(
                model,
                {name: value for name, value in inputs.items() if name not in ASIDE},
                False,
                num_items_in_batch,
            )
        finally:
            self._aside = {}
        if loss.dtype != self._exact.dtype:  # cast on its way out; its gradient is 1 either way
            loss = loss.to(self._exact.dtype)
            loss = loss + (self._exact - loss).detach()
        return (loss, None) if return_outputs else loss

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """The loss of one micro-batch over the step's denominator, and what TRL logs: the sum of
        the student's entropy and the number of positions.
        """
        if "loss_weights" not in self._aside:
            inputs = self._select_within(unwrapped_student, inputs)
        # as in TRL's compute_loss; the argument may have been cast
        if inputs.get("num_items_in_batch") is not None:
            num_items_in_batch = (
                inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            )
        if "student_states" not in self._aside:
            self._aside["student_states"] = self._own_states(unwrapped_student, inputs)
        if "teacher_states" not in self._aside:
            self._aside["teacher_states"] = self._teacher_states(inputs)
        if self._trl_loss:
            result = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            self._check_parity(unwrapped_student, inputs, num_items_in_batch, result[0])
        else:
            loss = self._own_loss(unwrapped_student, inputs, num_items_in_batch)
            kept_BT = (inputs["tool_mask"] * inputs["completion_mask"]).bool()
            result = loss, self._aside["student_entropy"][kept_BT].sum(), kept_BT.sum()
        self._exact = result[0].detach()
        return result

    def _own_states(self, unwrapped_student, inputs) -> Tensor:
        """The student's states [B, T, H] at the response's positions."""
        return self._get_last_hidden_state(unwrapped_student, *_sequences(inputs))

    def _own_loss(self, unwrapped_student, inputs, num_items_in_batch) -> Tensor:
        """Our loss of one micro-batch. Nothing is projected but the selected positions."""
        student_BTH, teacher_BTH = self._aside["student_states"], self._aside["teacher_states"]
        valid_BT = inputs["completion_mask"].bool()
        return losses.chunked_loss(
            student_BTH[valid_BT],
            self._student_logits(unwrapped_student, student_BTH),
            teacher_BTH[valid_BT],
            self._teacher_logits(teacher_BTH),
            inputs["completion_ids"][valid_BT],
            loss=self.selection.loss,
            beta=self.selection.beta,
            k=self.selection.k,
            weights_N=self._aside["loss_weights"][valid_BT],
            denominator=float(num_items_in_batch),
        ).float()

    @torch.no_grad()
    def _check_parity(self, unwrapped_student, inputs, num_items_in_batch, loss: Tensor) -> None:
        """Check once per training that TRL's loss of a batch equals ours from the same states."""
        if self._checked:
            return
        self._checked = True
        ours = float(self._own_loss(unwrapped_student, inputs, num_items_in_batch))
        theirs = float(loss)
        exact = all(
            self._aside[name].dtype in (torch.float32, torch.float64)
            for name in ("student_states", "teacher_states")
        )
        if not abs(ours - theirs) <= (PARITY if exact else PARITY_HALF) * abs(ours) + 1e-6:
            raise DiagnosticsError(
                f"TRL {trl_version} computes a {self.selection.loss} loss of {theirs:.6g} on the"
                f" positions of a batch, where it is {ours:.6g} by diagnostics.measure.losses. Its"
                " mask, denominator or divergence has changed. Install trl==1.16.0."
            )

    # --- files ---

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """transformers' method, without its pickle of the settings.

        That file holds absolute paths, and nothing reads it.
        """
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            name_base(folder)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """TRL's method, with the response tokens per second added."""
        metrics = self._metrics["train"]
        if self.model.training and metrics.get("step_time"):
            metrics["tokens_per_second"] = [sum(metrics["positions"]) / sum(metrics["step_time"])]
        super().log(logs, start_time)


def _valid(batch: dict) -> Tensor:
    """Mask bool [B, T] of the response's positions that may carry loss."""
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()


def _sequences(batch: dict) -> tuple[Tensor, Tensor, int]:
    """Ids and mask of prompt and response [B, L], and the number of the response's positions."""
    return (
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
    )


def _is_noisy(model: torch.nn.Module, args) -> bool:
    """Whether a forward pass in training may draw random numbers: dropout, jitter, NEFTune.

    Modules of torch hold the rate as `p`, others as a number of their own, such as
    `attention_dropout`. A rate that is never used makes a model noisy too: its training is then
    right, and measures in a pass of its own.
    """
    if args.neftune_noise_alpha:
        return True
    return any(
        (isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0)
        or any(
            isinstance(value, float) and value > 0 and any(word in name for word in NOISE)
            for name, value in vars(module).items()
        )
        for module in model.modules()
    )


@contextmanager
def _without_noise(model: torch.nn.Module) -> Iterator[None]:
    """Run the model as it is, for sampling and measuring: dropout, and noise on embeddings, belong
    to the loss alone, or tokens would be drawn from something other than p.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _same_vocabulary(pair: Pair):
    """The teacher's model; where its head has more ids than the student's, the head is cut."""
    sizes = pair.student.full_vocabulary, pair.teacher.full_vocabulary
    if sizes[0] > sizes[1]:
        raise DiagnosticsError(
            f"The student's head has {sizes[0]} ids and the teacher's {sizes[1]}; training compares"
            " whole distributions. Cut the student's first:"
            f" model.resize_token_embeddings({sizes[1]})."
        )
    if sizes[0] < sizes[1]:
        log.warning(
            "the teacher's head is cut from %d to the student's %d ids and renormalised",
            sizes[1],
            sizes[0],
        )
        pair.teacher.model.resize_token_embeddings(sizes[0])
        pair.teacher = Readout(pair.teacher.model, vocabulary=sizes[0])
    return pair.teacher.model


def _check_pair(pair: Pair) -> None:
    """Refuse a model without separate backbone and head, from which the loss is computed."""
    for role, readout in (("student", pair.student), ("teacher", pair.teacher)):
        if not isinstance(readout, Readout):
            raise DiagnosticsError(
                f"Training runs both models, and this pair's {role} is not a model. Load the pair"
                " with one."
            )
        if not readout.apart:
            raise DiagnosticsError(
                f"The {role} ({type(readout.model).__name__}) cannot be taken apart into backbone"
                " and output head, from which the loss is computed. It can be scored and probed;"
                " choose another architecture for training."
            )
        if readout.excluded:
            raise DiagnosticsError(
                f"The {role}'s tokenizer names {len(readout.excluded)} special tokens otherwise"
                f" than the other model's (id {readout.excluded[0]} is the first), and the loss of"
                " training has them in both distributions. Such a pair can be scored and probed;"
                " give both models one tokenizer for training."
            )


def _scales_otherwise(readout: Readout) -> bool:
    """Whether TRL multiplies the logits by a scale that the model leaves out: the configuration's
    `logit_scale`, as of MPT.
    """
    scale = getattr(readout.model.config.get_text_config(), "logit_scale", None)
    return scale is not None and scale != readout.scale


def _name_backbone(model: torch.nn.Module) -> None:
    """Name the backbone for TRL, which reaches it by its class's prefix; Llama 4's text model names
    a prefix that it does not have.
    """
    found = find_backbone(model)
    if model.base_model is model and found is getattr(model, "model", None):
        model.base_model_prefix = "model"


def _check_options(selection: Selection, options: dict) -> None:
    """Refuse options that would have no effect, or would draw samples from another distribution
    than p under a loss that needs samples from p.
    """
    if options.get("tools") or options.get("eval_dataset") is not None:
        raise DiagnosticsError(
            "Training takes no tools and no eval_dataset. Evaluate with held-out prompts"
            " (--eval-contexts), or a student with `evaluate`."
        )
    args = options.get("args")
    bends = [
        name
        for name, neutral in VLLM_ONLY.items()
        if getattr(args, name, neutral[0]) not in neutral
    ]
    if bends and not args.use_vllm:
        raise DiagnosticsError(
            f"{', '.join(bends)} acts only where vLLM generates. Responses are drawn here from p at"
            ' its temperature, top_p and top_k; set "use_vllm": true as well, or leave it out.'
        )
    bends += [
        name
        for name, neutral in (("top_p", 1.0), ("top_k", 0))
        if getattr(args, name, neutral) != neutral
    ]
    if bends and selection.loss == "sampled":
        raise DiagnosticsError(
            "The loss `sampled` is an estimate over tokens drawn from p itself, and"
            f" {', '.join(bends)} draws them from something else. Leave that out, or use --loss"
            " reverse_kl, whose value that estimates."
        )


def _check_engine(*, zero3: bool, fsdp: int | None) -> None:
    """Refuse the engines that shard the output heads."""
    if zero3:
        raise DiagnosticsError(
            "DeepSpeed ZeRO-3 shards the output heads that the measurements project with. Use"
            " ZeRO-2, or FSDP2 (configs/fsdp2-8gpu.yaml), which shards the student as well."
        )
    if fsdp == 1:
        raise DiagnosticsError(
            "FSDP's first version shards the heads that the measurements project with. Set"
            " fsdp_version: 2 in the Accelerate file."
        )


def _check_adapter(model) -> None:
    """Refuse an adapter on the output head, or on an embedding that is tied to it.

    The loss reads the head's own weight and would miss the adapter.
    """
    if not hasattr(model, "peft_config"):
        return
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    heads = {
        "output head": model.get_output_embeddings(),
        **({"embedding, which is tied to the head": model.get_input_embeddings()} if tied else {}),
    }
    for what, module in heads.items():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            raise DiagnosticsError(
                f"The adapter reaches the {what} ({type(module).__name__}), where training would"
                " not see it. Leave it out of target_modules and modules_to_save."
            )


def _gathered(readout: Readout, *, dtype: torch.dtype | None = None, head=None) -> Readout:
    """A read-out whose head is whole on this process and in the states' dtype, as TRL projects.

    Under FSDP2 a weight is sharded until it is gathered. head: the module that has the weight now,
    where it is not the read-out's own."""
    head = readout.head if head is None else head
    weight, bias = head.weight, head.bias
    if (
        not hasattr(weight, "full_tensor")
        and head is readout.head
        and dtype in (None, weight.dtype)
    ):
        return readout

    def whole(tensor: Tensor | None) -> Tensor | None:
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor if tensor is None or dtype is None else tensor.to(dtype)

    copied = copy.copy(readout)
    copied.head = SimpleNamespace(weight=whole(weight), bias=whole(bias))
    return copied


def _typed(name: str, values_N: np.ndarray) -> np.ndarray:
    """The values in their column's type: indicators are gathered as numbers and are bool again."""
    known = column(name)
    return (
        np.nan_to_num(values_N).astype(bool)
        if known is not None and known.dtype == "bool"
        else values_N
    )
