"""Where a position's gain comes from, to first order in the step.

With u = theta1 - theta0 = -a P g the step, g = sum_j w_j grad l_j the gradient of the mean loss
(w_j = 1 / number of supervised positions), P the diagonal that makes the optimizer's first update
of it (1/(|g| + eps) by coordinate for AdamW, 1/|g| for SGD) and D_i = KL(q_i||p_i), teacher first,
with logits z:

    first_order_gain_i = -grad D_i . u = -<p_i - q_i, dz_i>       dz: one forward-mode pass along u
    k_ij               = a w_j grad D_i . P grad l_j              what j's loss does for position i
    sum_j k_ij         = first_order_gain_i
    lift_j             = mean of k_ij over held-out i     what j's loss does for other prompts
    sum_j lift_j       = mean first-order gain of the held-out positions

A row of k takes one backward pass, for grad D_i, and one forward-mode pass along a P grad D_i,
which gives <dl_j/dz_j, dz_j> at every position j that it visits. Only i's own prompt is visited:
the rest of the row is first_order_gain minus the sum found there. So the split into *self* (j = i),
*own_context* (other positions of i's context), *own_prompt* (other contexts of i's prompt) and
*other_prompts* costs about one short context per position. The lift of all positions together takes
one backward pass over the held-out half and one forward-mode pass over the step half.

The *output layer* kernel is the part of k that goes through the output head's own parameters,
hidden states held fixed; for a plain gradient step it is <p_i - q_i, dl_j/dz_j> <h_i, h_j>. The
*full* kernel has all parameters. With tied embeddings P comes from the whole gradient and the
output layer's part from its use as output head alone.

P is that of the step on all positions, so lift is linear in the selection; a step on a selection
alone has its own P (`intervention` takes it). Where AdamW's P divides by a gradient that nearly
cancels, single terms exceed their sum, so a share outside [0, 1] is not an error.

Reference: influence to first order as in arXiv 2002.08484 (TracIn), with the optimizer's
preconditioner in between.

Axes: N positions of the bank, n of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import AnalysisConfig
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import progress
from diagnostics.core.schema import validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.core.types import Bank
from diagnostics.measure import divergences, losses
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.step import (
    ProbeConfig,
    StepBench,
    first_update,
    in_nonfinite_context,
    prepare_step,
)
from diagnostics.probing.tensor_lists import tensor_norm

log = logging.getLogger("diagnostics")
FRACTIONS = (0.1, 0.3, 1.0, 3.0)
"""Step sizes, in units of the calibrated one, at which predicted and realised gain are compared."""
PARTS = ("self", "own_context", "own_prompt", "other_prompts")
"""Sources of a position's gain."""
SHARE_COLUMNS = (
    "kernel",
    "group",
    "part",
    "mean",
    "low",
    "high",
    "share",
    "share_low",
    "share_high",
    "positions",
    "prompts",
)


@dataclass(frozen=True)
class AttributionConfig:
    """Which kernel, on how many positions.

    Attributes:
        sample: Step positions whose gain is split by source, the same number from each quadrant.
        full_kernel: Whether the gain is split by all parameters too, not the output layer alone.
    """

    sample: int = field(
        default=256,
        metadata={
            "help": (
                "step positions whose gain is split by source, the same number from each quadrant"
            )
        },
    )
    full_kernel: bool = field(
        default=False, metadata={"help": "split by all parameters too, not the output layer alone"}
    )


@dataclass
class Attribution:
    """What `attribute` returns."""

    tokens: pd.DataFrame
    """The token table with first_order_gain and lift (nats), one row per position."""
    linearity: pd.DataFrame
    """Realized against predicted gain, by step size (see `linearity`)."""
    kernel: pd.DataFrame
    """One row per sampled position and kernel: PARTS and their sum, nats."""
    shares: pd.DataFrame
    """Share of each part in the gain, by group of positions (see `kernel_shares`)."""
    lift: pd.DataFrame
    """Share of each group of step positions in the lift (see `lift_by_group`)."""
    calibration: pd.DataFrame
    """Calibration of the step, as in `probe`."""

    def _repr_html_(self) -> str:
        shown = (
            self.linearity[self.linearity["split"] == "all"],
            self.shares[self.shares["group"] == "all"],
        )
        return "".join(table.to_html(index=False, float_format="%.3g") for table in shown)


@with_settings(probe=ProbeConfig, config=AttributionConfig, analysis=AnalysisConfig)
def attribute(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: AttributionConfig = AttributionConfig(),
    analysis: AnalysisConfig = AnalysisConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int = scores.BATCH_TOKENS,
    **settings: Any,
) -> Attribution:
    """Attribute the step of `probe` with the same settings to the positions that took part in it.

    Attention runs in its plain form meanwhile, since fused kernels have no forward-mode derivative.
    The student ends as it began, bit for bit.

    Args:
        pair: The student, in float32 or float64, and its teacher.
        bank: The frozen contexts, N response positions in all.
        probe: The step; its fields may be given as keywords instead.
        config: Which kernel, on how many positions; its fields may be given as keywords instead.
        analysis: How intervals are made; its fields may be given as keywords instead.
        tokens: The bank's token table; None scores the bank first. Its column `split` is used
            where it has one; otherwise prompts are split as in `probe`.
        batch_tokens: Tokens in one forward pass, padding included.
        settings: Fields of `probe`, `config` and `analysis`.

    Returns:
        The token table with first_order_gain (nats) at every position and lift (nats) at every
        supervised one, and the tables linearity, kernel, shares and lift.

    Raises:
        DiagnosticsError: As `probe` does, and for an architecture without forward-mode derivative.

    Reference:
        Influence to first order as in arXiv 2002.08484 (TracIn), with the optimizer's
        preconditioner in between.
    """
    step = prepare_step(pair, bank, tokens, probe, batch_tokens=batch_tokens)
    bench, size = step.bench, step.step_size
    with plain_attention(pair.student.model):
        tracer = Tracer(
            bench,
            step.weights_N,
            loss=probe.loss,
            beta=probe.beta,
            optimizer=probe.optimizer,
            step_size=size,
        )
        first_order_N = tracer.first_order_gain
        tokens = validate_tokens(
            bench.tokens.assign(
                split=bench.split, first_order_gain=first_order_N, lift=tracer.lift()
            )
        )
        targets = sample_positions(tokens, step.weights_N, count=config.sample, seed=probe.seed)
        kernel = tracer.kernel(targets, full=config.full_kernel)
    realized = realized_gains(bench, tracer.update, size)
    bench.require_restored()
    norm = tensor_norm(tracer.update) / bench.weight_norm
    draws, level, seed = analysis.draws, analysis.level, probe.seed
    return Attribution(
        tokens,
        linearity(tokens, realized, size, norm=norm, draws=draws, level=level, seed=seed),
        kernel,
        kernel_shares(tokens, kernel, draws=draws, level=level, seed=seed),
        lift_by_group(tokens, draws=draws, level=level, seed=seed),
        step.calibration,
    )


# --- derivatives ---


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Run attention and experts as plain matrix products while the block runs.

    Fused kernels have no forward-mode derivative.
    """
    switched: Any = model  # torch's stubs call every attribute of a module a tensor or a module
    attention = switched.config._attn_implementation
    experts = getattr(switched.config, "_experts_implementation", None)
    switched.set_attn_implementation("eager")
    try:
        if experts not in (None, "eager"):
            switched.set_experts_implementation("eager")
        yield
    finally:
        switched.set_attn_implementation(attention)
        if experts not in (None, "eager"):
            switched.set_experts_implementation(experts)


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual tensor.

    The first one makes torch 2.13 load a module that warns of its own use of TorchScript.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        return forward_ad.make_dual(primal, tangent)


class _StandIn(nn.Module):
    """Runs a function while other tensors stand in for the model's parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable):
        return function()


Visit = Callable[[slice, Tensor, Tensor], None]
"""Called with rows of a batch, their logits [r, V] and the logits' derivative [r, V]."""


class Tracer:
    """The step of a bench, and derivatives along it and between positions.

    It works inside `plain_attention` only.

    Args:
        bench: The student at theta0.
        weights_N: Float [N], 0 where a position carries no loss.
        loss: Loss of the step, one of `losses.LOSSES`.
        beta: The teacher's share in the mixture of `jsd`.
        optimizer: `adamw` or `sgd`.
        step_size: Size of the step along the optimizer's first update.
    """

    def __init__(
        self,
        bench: StepBench,
        weights_N: np.ndarray,
        *,
        loss: str,
        beta: float,
        optimizer: str,
        step_size: float,
    ):
        self.bench, self.weights_N = bench, weights_N
        self.loss, self.beta, self.step_size = loss, beta, step_size
        self.student, self.teacher = bench.pair.student, bench.teacher
        self.names = bench.names
        _, gradient = bench.gradient(weights_N, loss=loss, beta=beta)
        self.update = first_update(gradient, optimizer)
        self.scale = [
            torch.where(g == 0, 0.0, -u / g) for g, u in zip(gradient, self.update, strict=True)
        ]
        self.advantage_N = torch.from_numpy(bench.tokens["advantage"].to_numpy().copy())
        self._stand_in = _StandIn(self.student.model)

    @cached_property
    def first_order_gain(self) -> np.ndarray:
        """-<p - q, dz> [N] in nats, along the step."""
        gain_N = np.zeros(len(self.bench.tokens))
        tangents = dict(zip(self.names, (self.step_size * u for u in self.update), strict=True))
        self._visit_all(
            [(batch, states) for part in self.bench.frozen.parts for batch, states in part],
            tangents,
            gain_N,
            "first order",
            sign=-1.0,
            loss="forward_kl",
        )
        return distributed.sum_over_processes(gain_N)

    def lift(self) -> np.ndarray:
        """What each step position's loss does for the mean forward KL of the held-out positions.

        Returns:
            Float64 [N] in nats; NaN at a position without loss. The sum is the mean first-order
            gain of the held-out positions.
        """
        lift_N = np.zeros(len(self.bench.tokens))
        tangents = dict(zip(self.names, self._pulled(self._held_out_gradient()), strict=True))
        self._visit_all(
            list(self.bench.step),
            tangents,
            lift_N,
            "lift",
            sign=1.0,
            loss=self.loss,
        )
        lift_N = distributed.sum_over_processes(lift_N) * self.weights_N / self.weights_N.sum()
        return np.where(self.weights_N > 0, lift_N, np.nan)

    def _pulled(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """a P times a gradient: the direction in which the loss of a helpful position pushes."""
        return [self.step_size * s * g for s, g in zip(self.scale, gradient, strict=True)]

    def _held_out_gradient(self) -> list[Tensor]:
        """Gradient of the mean forward KL of the held-out positions."""
        bench = self.bench
        finite = np.isfinite(bench.tokens[["forward_kl", "reverse_kl"]].to_numpy()).all(axis=1)
        weights_N = (
            (bench.split == "held_out") & finite & ~in_nonfinite_context(bench.tokens)
        ).astype(float)
        total = [torch.zeros_like(p) for p in bench.parameters]
        for batch, teacher_nH in bench.held_out:
            if weights_N[batch.rows_n.numpy()].any():
                part = bench.batch_loss(
                    batch,
                    batch.states(self.student),
                    teacher_nH,
                    weights_N,
                    loss="forward_kl",
                    beta=0.0,
                )
                _accumulate(total, torch.autograd.grad(part, bench.parameters, allow_unused=True))
        distributed.sum_in_place(total)
        return total

    def _visit_all(
        self,
        batches: Sequence[tuple[scores.Batch, Tensor]],
        tangents: dict[str, Tensor],
        out_N: np.ndarray,
        what: str,
        *,
        sign: float,
        loss: str,
    ) -> None:
        """Write sign * <dl/dz, dz> of every position of the batches into out_N."""
        positions = sum(len(batch.rows_n) for batch, _ in batches)
        with progress(total=positions, description=what) as bar:
            for batch, teacher_nH in batches:
                out_N[batch.rows_n.numpy()] = sign * self.effect(
                    batch, teacher_nH, tangents, loss=loss
                )
                bar.update(len(batch.rows_n))

    def effect(
        self,
        batch: scores.Batch,
        teacher_nH: Tensor,
        tangents: dict[str, Tensor],
        *,
        loss: str,
        states_nH: Tensor | None = None,
    ) -> np.ndarray:
        """Derivative of each position's loss along a direction in parameter space.

        Args:
            batch: The batch, n positions.
            teacher_nH: The teacher's states [n, H].
            tangents: The direction, one tensor per parameter that moves, by name.
            loss: One of `losses.LOSSES`.
            states_nH: The student's states [n, H] where they are held fixed.

        Returns:
            Float64 [n] in nats.
        """
        parts: list[Tensor] = []

        def visit(rows: slice, z_rV: Tensor, dz_rV: Tensor) -> None:
            pulls_rV = self._pulls(batch, rows, z_rV, teacher_nH, loss=loss)
            parts.append((pulls_rV.double() * dz_rV.double()).sum(-1))

        self._derivative(batch, tangents, visit, states_nH)
        return torch.cat(parts).cpu().numpy()

    def _pulls(
        self, batch: scores.Batch, rows: slice, z_rV: Tensor, teacher_nH: Tensor, *, loss: str
    ) -> Tensor:
        """dl/dz [r, V] of each position's loss in its own logits."""
        with torch.no_grad():
            teacher_rV = divergences.teacher_logits_for(z_rV, teacher_nH[rows], self.teacher.logits)
        with torch.enable_grad():
            leaf_rV = z_rV.detach().requires_grad_()
            values_r = losses.per_position(
                leaf_rV,
                teacher_rV,
                batch.sampled_n[rows].to(z_rV.device),
                loss=loss,
                beta=self.beta,
                advantage_N=self.advantage_N[batch.rows_n[rows]].to(z_rV.device),
            )
            return torch.autograd.grad(values_r.sum(), leaf_rV)[0]

    @torch.no_grad()
    def _derivative(
        self,
        batch: scores.Batch,
        tangents: dict[str, Tensor],
        visit: Visit,
        states_nH: Tensor | None,
    ) -> None:
        def run() -> None:
            hidden_nH = batch.states(self.student) if states_nH is None else states_nH
            chunk = divergences.chunk_size(self.student.vocabulary)
            for start in range(0, len(batch.rows_n), chunk):
                rows = slice(start, start + chunk)
                logits = forward_ad.unpack_dual(self.student.logits(hidden_nH[rows]))
                visit(
                    rows,
                    logits.primal,
                    torch.zeros_like(logits.primal) if logits.tangent is None else logits.tangent,
                )

        named = dict(self.student.model.named_parameters())
        try:
            with forward_ad.dual_level():
                duals = {
                    f"model.{name}": _dual(named[name].detach(), tangent)
                    for name, tangent in tangents.items()
                }
                functional_call(self._stand_in, duals, (run,))
        except NotImplementedError as error:
            raise DiagnosticsError(
                f"{type(self.student.model).__name__} has an operation without forward-mode"
                f" derivative ({str(error).splitlines()[0][:200]}). Probe and intervene on it;"
                " attribution needs another architecture."
            ) from error

    # --- the kernel ---

    def kernel(self, targets: np.ndarray, *, full: bool) -> pd.DataFrame:
        """Split the first-order gain of each target position by source.

        Args:
            targets: Rows of the token table, step positions.
            full: Whether the full kernel is measured too.

        Returns:
            One row per target and kernel, with columns kernel (output_layer, full), context_id,
            prompt_id, position, then PARTS and total (nats).
        """
        kinds = [
            name
            for name, wanted in (("output_layer", self.student.apart), ("full", full))
            if wanted
        ]
        if not self.student.apart:
            log.warning(
                "the output layer of %s cannot be told apart: its kernel is left out",
                type(self.student.model).__name__,
            )
        tables = [self._split(targets, kind) for kind in kinds]
        return (
            pd.concat(tables, ignore_index=True)
            if tables
            else pd.DataFrame(columns=["kernel", *_KERNEL_KEYS, *PARTS, "total"])
        )

    def _split(self, targets: np.ndarray, kind: str) -> pd.DataFrame:
        tokens = self.bench.tokens
        prompts, contexts = (tokens[name].to_numpy() for name in ("prompt_id", "context_id"))
        found = np.zeros((len(targets), len(PARTS)))
        groups = distributed.share(
            sorted(set(prompts[targets])), lambda prompt: float((prompts == prompt).sum())
        )
        with progress(total=len(targets), description=f"{kind} kernel", unit=" positions") as bar:
            for prompt in groups:
                own = np.flatnonzero(prompts == prompt)
                here = np.flatnonzero(prompts[targets] == prompt)
                for k, row_n in zip(here, self.rows(targets[here], own, kind=kind), strict=True):
                    same_context = contexts[own] == contexts[targets[k]]
                    itself = own == targets[k]
                    found[k, :3] = (
                        row_n[itself].sum(),
                        row_n[same_context & ~itself].sum(),
                        row_n[~same_context].sum(),
                    )
                    bar.update()
        found = distributed.sum_over_processes(found)
        total = self.totals(targets, kind=kind)
        found[:, 3] = total - found[:, :3].sum(axis=1)
        keys = tokens.loc[targets, list(_KERNEL_KEYS)].reset_index(drop=True)
        return pd.concat(
            [
                keys.assign(kernel=kind),
                pd.DataFrame(found, columns=list(PARTS)).assign(total=total),
            ],
            axis=1,
        )

    def rows(
        self, targets: Sequence[int] | np.ndarray, sources: np.ndarray, *, kind: str
    ) -> Iterator[np.ndarray]:
        """Rows of the kernel.

        Args:
            targets: Rows i of the token table.
            sources: Rows j of the token table.
            kind: `output_layer` or `full`.

        Yields:
            k_ij over the sources j, float64 in nats, for each target i.
        """
        keep_N = np.zeros(len(self.bench.tokens), dtype=bool)
        keep_N[sources] = keep_N[list(targets)] = True
        visited = [
            (batch, self._teacher_states(batch), self._fixed_states(batch, kind))
            for batch in scores.batches(self.bench.bank, keep=keep_N)
        ]
        for target in targets:
            tangents = self._tangents(target, visited, kind)
            row_N = np.zeros(len(self.bench.tokens))
            for batch, teacher_nH, states_nH in visited:
                row_N[batch.rows_n.numpy()] = self.effect(
                    batch, teacher_nH, tangents, loss=self.loss, states_nH=states_nH
                )
            yield (row_N * self.weights_N / self.weights_N.sum())[sources]

    @torch.no_grad()
    def _teacher_states(self, batch: scores.Batch) -> Tensor:
        return batch.teacher_states(self.teacher)

    @torch.no_grad()
    def _fixed_states(self, batch: scores.Batch, kind: str) -> Tensor | None:
        """The student's states where the kernel holds them fixed; None otherwise."""
        return batch.states(self.student) if kind == "output_layer" else None

    def _tangents(self, target: int, visited: list[tuple], kind: str) -> dict[str, Tensor]:
        """a P grad D of one position, over the parameters of the kernel."""
        batch, teacher_nH, states_nH = next(
            entry for entry in visited if (entry[0].rows_n == target).any()
        )
        place = int((batch.rows_n == target).nonzero()[0, 0])
        at = slice(place, place + 1)
        hidden_nH = batch.states(self.student) if states_nH is None else states_nH
        weight_N = np.zeros(len(self.bench.tokens))
        weight_N[target] = 1.0
        value = self.bench.batch_loss(
            _only(batch, at), hidden_nH[at], teacher_nH[at], weight_N, loss="forward_kl", beta=0.0
        )
        return self._partial(
            torch.autograd.grad(value, self._parameters(kind), allow_unused=True), kind
        )

    def totals(self, targets: np.ndarray, *, kind: str) -> np.ndarray:
        """Sum of each target's row over all sources, float64 [targets] in nats."""
        if kind == "full":
            return self.first_order_gain[targets]
        tangents = self._partial(self._head_gradient(), kind)
        wanted = np.isin(np.arange(len(self.bench.tokens)), targets)
        gain_N = np.zeros(len(wanted))
        for batch in distributed.share(
            scores.batches(self.bench.bank, keep=wanted), lambda batch: batch.tokens
        ):
            fixed_nH = self._fixed_states(batch, kind)
            gain_N[batch.rows_n.numpy()] = self.effect(
                batch, self._teacher_states(batch), tangents, loss="forward_kl", states_nH=fixed_nH
            )
        return distributed.sum_over_processes(gain_N)[targets]

    def _head_gradient(self) -> list[Tensor]:
        """Gradient of the mean loss over the output head's parameters, states held fixed."""
        bench, parameters = self.bench, self._parameters("output_layer")
        total = [torch.zeros_like(p) for p in parameters]
        for batch, teacher_nH in bench.step:
            with torch.no_grad():
                fixed_nH = batch.states(self.student)
            part = bench.batch_loss(
                batch, fixed_nH, teacher_nH, self.weights_N, loss=self.loss, beta=self.beta
            )
            _accumulate(total, torch.autograd.grad(part, parameters, allow_unused=True))
        distributed.sum_in_place(total)
        return total

    def _places(self, kind: str) -> list[int]:
        """Indices of the bench's parameters that a kernel has."""
        head = list(self.student.head.parameters()) if kind == "output_layer" else None
        return [
            i
            for i, p in enumerate(self.bench.parameters)
            if head is None or any(p is h for h in head)
        ]

    def _parameters(self, kind: str) -> list[Tensor]:
        return [self.bench.parameters[i] for i in self._places(kind)]

    def _partial(self, gradient: Sequence[Tensor | None], kind: str) -> dict[str, Tensor]:
        """Tangents a P g by name, for a gradient over the kernel's parameters."""
        places = self._places(kind)
        return {
            self.names[i]: (
                self.step_size
                * self.scale[i]
                * (torch.zeros_like(self.scale[i]) if g is None else g)
            )
            for i, g in zip(places, gradient, strict=True)
        }


_KERNEL_KEYS = ("context_id", "prompt_id", "position")


def _only(batch: scores.Batch, at: slice) -> scores.Batch:
    """The batch with some of its positions."""
    return scores.Batch(
        batch.ids_BT,
        batch.mask_BT,
        (batch.at_n[0][at], batch.at_n[1][at]),
        batch.sampled_n[at],
        batch.rows_n[at],
    )


def _accumulate(total: list[Tensor], parts: Sequence[Tensor | None]) -> None:
    for sum_, part in zip(total, parts, strict=True):
        if part is not None:
            sum_ += part


def realized_gains(
    bench: StepBench,
    update: list[Tensor],
    step_size: float,
    *,
    fractions: Sequence[float] = FRACTIONS,
) -> dict[float, np.ndarray]:
    """Gain after each fraction of the step.

    Args:
        bench: The student at theta0.
        update: One tensor per parameter.
        step_size: Size of the whole step.
        fractions: Parts of the step that are taken.

    Returns:
        Float64 [N] in nats for each fraction.
    """
    before = bench.rescore("before")[0]
    gains = {}
    for fraction in fractions:
        with bench.moved(update, fraction * step_size):
            gains[fraction] = before - bench.rescore(f"{fraction:g} of the step")[0]
    return gains


def sample_positions(
    tokens: pd.DataFrame, weights_N: np.ndarray, *, count: int, seed: int
) -> np.ndarray:
    """Draw supervised positions, the same number from each quadrant as far as there are so many.

    Args:
        tokens: Token table, one row per position.
        weights_N: Float [N], 0 where a position carries no loss.
        count: Positions in all; a quadrant gives at most a quarter of them, rounded up.
        seed: Seed of the draw.

    Returns:
        Rows of the table, ascending.

    Raises:
        DiagnosticsError: Fewer than one position was asked for.
    """
    if count < 1:
        raise DiagnosticsError(f"A kernel on {count} positions was asked for; sample at least 1.")
    generator, quadrant = np.random.default_rng([seed, 3]), registry.quadrants(tokens)
    chosen = []
    for number in (1, 2, 3, 4):
        rows = np.flatnonzero((weights_N > 0) & (quadrant == number))
        chosen.append(generator.permutation(rows)[: -(-count // 4)])
    return np.sort(np.concatenate(chosen))


# --- tables ---


def linearity(
    tokens: pd.DataFrame,
    realized: dict[float, np.ndarray],
    step_size: float,
    *,
    norm: float,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the realized gain with the first-order prediction, by step size.

    Args:
        tokens: Token table with first_order_gain, split and prompt_id.
        realized: Gains float64 [N] in nats by fraction of the step.
        step_size: Size of the whole step.
        norm: Norm of the update for a step of size 1 over the norm of the weights.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per fraction and split, with columns fraction, step_size, relative_norm, split (all,
        step, held_out), slope (realized on predicted, with intercept), slope_low, slope_high, r2
        (squared Pearson; 0 where its interval's end is negative), r2_low, r2_high, explained (1 -
        sum of squared errors of the prediction itself over the realized gain's), predicted_mean,
        realised_mean (nats), positions, prompts.
    """
    rows = []
    for fraction, gain_N in realized.items():
        for name in ("all", "step", "held_out"):
            predicted_N = fraction * tokens["first_order_gain"].to_numpy(dtype=np.float64)
            mask = (
                np.isfinite(predicted_N)
                & np.isfinite(gain_N)
                & ((tokens["split"] == name).to_numpy() | (name == "all"))
            )
            prompts = PromptClusters(tokens["prompt_id"].to_numpy()[mask], draws=draws, seed=seed)
            slope, explained = _fit(predicted_N[mask], gain_N[mask], prompts)
            pearson = rank_correlation.pearson(predicted_N[mask], gain_N[mask], prompts)
            low, high = np.clip(pearson.interval(level), 0, None) ** 2
            rows.append(
                {
                    "fraction": fraction,
                    "step_size": fraction * step_size,
                    "relative_norm": fraction * step_size * norm,
                    "split": name,
                    **_ends("slope", slope, level),
                    "r2": pearson.value**2,
                    "r2_low": low,
                    "r2_high": high,
                    "explained": explained.value,
                    "predicted_mean": predicted_N[mask].mean(),
                    "realised_mean": gain_N[mask].mean(),
                    "positions": int(mask.sum()),
                    "prompts": prompts.count,
                }
            )
    return pd.DataFrame(rows)


def _fit(x: np.ndarray, y: np.ndarray, prompts: PromptClusters) -> list[Estimate]:
    """Slope and explained share, from per-prompt sums."""
    scale = max(float(np.abs(np.concatenate([x, y])).max(initial=0.0)), np.finfo(float).tiny)
    x, y = x / scale, y / scale

    def statistic(sums: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            xx, yy, xy = sxx / n - (sx / n) ** 2, syy / n - (sy / n) ** 2, sxy / n - sx * sy / n**2
            values = np.stack([xy / xx, 1 - (sxx - 2 * sxy + syy) / n / yy], axis=-1)
        return np.where(np.isfinite(values), values, np.nan)

    sums = prompts.sums(np.ones_like(x), x, y, x * x, y * y, x * y)
    return bootstrap.of_sums(statistic, sums, prompts, np.ones(len(x), dtype=bool))


def _ends(name: str, estimate: Estimate, level: float) -> dict:
    low, high = estimate.interval(level)
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}


def position_groups(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """Groups of positions that the tables report.

    Args:
        tokens: Token table, one row per position.

    Returns:
        Masks bool [N]: all, the quadrants q1 to q4, and the thirds (1 is the lowest) of
        compatibility and of teachability.
    """
    everywhere, quadrant = np.ones(len(tokens), dtype=bool), registry.quadrants(tokens)
    groups = {"all": everywhere} | {f"q{number}": quadrant == number for number in (1, 2, 3, 4)}
    for name in ("compatibility", "teachability"):
        third = rank_correlation.groups_by_rank(
            registry.score_criterion(tokens, name), 3, everywhere
        )
        groups |= {f"{name}_{number}": third == number for number in (1, 2, 3)}
    return groups


def kernel_shares(
    tokens: pd.DataFrame,
    kernel: pd.DataFrame,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of each part of the first-order gain, and its share of the whole, by group of positions.

    Sampled positions are weighted by how many step positions of their quadrant each stands for.

    Args:
        tokens: Token table with split, one row per position.
        kernel: Table of `Tracer.kernel`.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per kernel, group and part, with columns kernel, group (see `position_groups`), part
        (PARTS, total), mean, low, high (nats), share, share_low, share_high (NaN where the group's
        total is not positive), positions, prompts.
    """
    place = pd.Series(
        np.arange(len(tokens)), index=pd.MultiIndex.from_frame(tokens[["context_id", "position"]])
    )
    groups, quadrant = position_groups(tokens), registry.quadrants(tokens)
    on_step = (tokens["split"] == "step").to_numpy()
    rows = []
    for kind, table in kernel.groupby("kernel", sort=False):
        at = place.loc[pd.MultiIndex.from_frame(table[["context_id", "position"]])].to_numpy()
        stands_for = {
            q: (on_step & (quadrant == q)).sum() / max((quadrant[at] == q).sum(), 1)
            for q in range(5)
        }
        weight = np.array([stands_for[q] for q in quadrant[at]])
        for name, mask in groups.items():
            if mask[at].any():
                part = table[mask[at]]
                prompts = PromptClusters(part["prompt_id"].to_numpy(), draws=draws, seed=seed)
                values = part[[*PARTS, "total"]].to_numpy(dtype=np.float64)
                rows += [
                    {"kernel": kind, "group": name} | row
                    for row in _weighted_shares(values, weight[mask[at]], prompts, level)
                ]
    return pd.DataFrame(rows, columns=list(SHARE_COLUMNS))


def _weighted_shares(
    values: np.ndarray, weight: np.ndarray, prompts: PromptClusters, level: float
) -> Iterator[dict]:
    names = [*PARTS, "total"]

    def statistic(sums: np.ndarray) -> np.ndarray:
        parts, count = sums[..., :-1], sums[..., -1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(parts[..., -1:] > 0, parts / parts[..., -1:], np.nan)
            return np.concatenate([np.where(count > 0, parts / count, np.nan), shares], axis=-1)

    sums = prompts.sums(*(values * weight[:, None]).T, weight)
    estimates = bootstrap.of_sums(statistic, sums, prompts, np.ones(len(values), dtype=bool))
    for name, mean, share in zip(
        names, estimates[: len(names)], estimates[len(names) :], strict=True
    ):
        low, high = mean.interval(level)
        yield (
            {"part": name, "mean": mean.value, "low": low, "high": high}
            | _ends("share", share, level)
            | {"positions": mean.positions, "prompts": mean.prompts}
        )


def lift_by_group(
    tokens: pd.DataFrame, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """What the losses of each group of step positions do for the held-out prompts.

    Args:
        tokens: Token table with lift, one row per position.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per group (see `position_groups`), with columns group, lift_share (of the sum over
        step positions), low, high, position_share, enrichment (lift share over position share; 1
        where the group lifts as much as any other), enrichment_low, enrichment_high, positions,
        prompts. Shares are NaN where the whole lift is not positive.
    """
    lift_N = tokens["lift"].to_numpy(dtype=np.float64)
    known = np.isfinite(lift_N)
    prompts = PromptClusters(tokens["prompt_id"].to_numpy()[known], draws=draws, seed=seed)
    rows = []
    for name, mask in position_groups(tokens).items():
        inside = mask[known].astype(float)
        sums = prompts.sums(lift_N[known] * inside, lift_N[known], inside, np.ones(known.sum()))
        share, part, enrichment = bootstrap.of_sums(
            _lift_shares, sums, prompts, np.ones(known.sum(), dtype=bool)
        )
        low, high = share.interval(level)
        rows.append(
            {
                "group": name,
                "lift_share": share.value,
                "low": low,
                "high": high,
                "position_share": part.value,
            }
            | _ends("enrichment", enrichment, level)
            | {"positions": int(inside.sum()), "prompts": prompts.count}
        )
    return pd.DataFrame(rows)


def _lift_shares(sums: np.ndarray) -> np.ndarray:
    inside, whole, count, everything = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(whole > 0, inside / whole, np.nan)
        return np.stack(
            [share, count / everything, np.where(count > 0, share / (count / everything), np.nan)],
            axis=-1,
        )
