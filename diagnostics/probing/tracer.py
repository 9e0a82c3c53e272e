"""Derivatives along a step and between positions; `attribution` has the formulas.

A directional derivative is one forward-mode pass, in which dual tensors stand in for the model's
parameters. A gradient is one backward pass. Fused attention has no forward-mode derivative, so
everything here works inside `plain_attention` only.

Axes: N positions of the bank, n of a batch, r of a chunk of it, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import progress
from diagnostics.measure import divergences, losses
from diagnostics.models.config import needs_whole_student
from diagnostics.probing import scores
from diagnostics.probing.step import StepBench, loss_weights
from diagnostics.probing.tensor_lists import first_update

log = logging.getLogger("diagnostics")
PARTS = ("self", "own_context", "own_prompt", "other_prompts")
"""Sources of a position's gain."""


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
        if not bench.spread.is_whole:
            raise needs_whole_student("an attribution")
        self.bench, self.weights_N = bench, weights_N
        self.loss, self.beta, self.step_size = loss, beta, step_size
        self.student, self.teacher = bench.pair.student, bench.teacher
        self.names = bench.names
        _, sums = bench.gradient(weights_N, loss=loss, beta=beta)
        gradient = [g.to(p.device) for g, p in zip(sums, bench.parameters, strict=True)]
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
            list(self.bench.frozen.whole),
            tangents,
            gain_N,
            "first order",
            sign=-1.0,
            loss="forward_kl",
        )
        return distributed.sum_over_processes(gain_N)

    def lift(self) -> np.ndarray:
        """What each step position's loss does for the mean forward KL of the held-out positions.

        Held out are the folds in which no position carries loss.

        Returns:
            Float64 [N] in nats; NaN at a position without loss. The sum is the mean first-order
            gain of the held-out positions.
        """
        lift_N = np.zeros(len(self.bench.tokens))
        tangents = dict(zip(self.names, self._pulled(self._held_out_gradient()), strict=True))
        self._visit_all(
            list(self.bench.weighted(self.weights_N)),
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
        on_step = np.isin(bench.folds, bench.folds[self.weights_N > 0])
        weights_N = loss_weights(bench.tokens, ~on_step)
        total = [torch.zeros_like(p) for p in bench.parameters]
        for batch, teacher_nH in bench.weighted(weights_N):
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
        for batch, teacher_nH in bench.weighted(self.weights_N):
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
