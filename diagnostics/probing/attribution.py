"""Where a position's gain comes from, to first order in the step.

With u = theta1 - theta0 = -a P g the step, g = sum_j w_j grad l_j the gradient of the mean loss
(w_j = 1 / number of supervised positions), P the diagonal that makes the optimiser's first update
of it (1/(|g| + eps) by coordinate for AdamW, 1/|g| for SGD) and D_i = KL(q_i||p_i), teacher first,
with logits z:

    first_order_gain_i = -grad D_i . u = -<p_i - q_i, dz_i>       dz: one forward-mode pass along u
    k_ij               = a w_j grad D_i . P grad l_j              what j's loss does for position i
    sum_j k_ij         = first_order_gain_i
    lift_j             = mean of k_ij over held-out positions i   what j's loss does for other prompts
    sum_j lift_j       = mean first-order gain of the held-out positions

A row of k takes one backward pass, for grad D_i, and one forward-mode pass along a P grad D_i,
which gives <dl_j/dz_j, dz_j> at every position j that it visits. Only i's own prompt is visited:
the rest of the row is first_order_gain less what was found there. So the split into *self* (j = i),
*own_context* (j elsewhere in i's context), *own_prompt* (other contexts of i's prompt) and
*other_prompts* costs about one short context a position. The lift of all positions together takes
one backward pass over the held-out half and one forward-mode pass over the step half.

The *output layer* kernel is the part of k that goes through the output head's own parameters,
hidden states held fixed; for a plain gradient step it is <p_i - q_i, dl_j/dz_j> <h_i, h_j>. The
*full* kernel has all parameters. With tied embeddings P comes from the whole gradient and the
output layer's part from its use as output head alone.

P is that of the step on all positions, so lift is linear in the selection; a step on a selection
alone has its own P (`intervention` takes it). Where AdamW's P divides by a gradient that nearly
cancels, single terms exceed their sum: shares outside [0, 1] are no error.

Reference: influence to first order as in arXiv 2002.08484 (TracIn), with the optimiser's
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

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import progress
from diagnostics.core.schema import validate_tokens
from diagnostics.core.types import Bank
from diagnostics.measure import divergences, losses
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.one_step import (
    StepBench,
    calibrate,
    first_update,
    in_nonfinite_context,
    loss_weights,
    requested_step,
    require_same_bank,
    split_prompts,
    tensor_norm,
)

log = logging.getLogger("diagnostics")
FRACTIONS = (0.1, 0.3, 1.0, 3.0)
"""Step sizes, in units of the calibrated one, at which predicted and realised gain are compared."""
PARTS = ("self", "own_context", "own_prompt", "other_prompts")


@dataclass(frozen=True)
class AttributionConfig:
    """Which kernel, on how many positions."""

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
    """First-order gains, how linear the step is, and where the gain of sampled positions comes
    from.
    """

    tokens: pd.DataFrame
    """The token table with first_order_gain and lift."""
    linearity: pd.DataFrame
    kernel: pd.DataFrame
    """One row a sampled position and kernel: PARTS and their sum, nats."""
    shares: pd.DataFrame
    lift: pd.DataFrame
    calibration: pd.DataFrame

    def _repr_html_(self) -> str:
        shown = (
            self.linearity[self.linearity["split"] == "all"],
            self.shares[self.shares["group"] == "all"],
        )
        return "".join(table.to_html(index=False, float_format="%.3g") for table in shown)


def attribute(
    pair: Pair,
    bank: Bank,
    *,
    tokens: pd.DataFrame | None = None,
    loss: str = "reverse_kl",
    beta: float = 0.5,
    optimizer: str = "adamw",
    step: str | float = "auto",
    held_out: float = 0.5,
    seed: int = 0,
    sample: int = 256,
    full_kernel: bool = False,
    draws: int = 1000,
    level: float = 0.95,
    batch_tokens: int = scores.BATCH_TOKENS,
) -> Attribution:
    """Attribute the step of `probe` with the same settings to the positions that took part in it.

    tokens: the bank's table; scored here where None. Its `split` is used where it has one. The
    attention runs in its plain form meanwhile, since fused ones have no forward-mode derivative;
    the student ends as it began. Raises DiagnosticsError as `probe` does, and for an architecture
    without forward-mode derivative."""
    step_size = requested_step(loss, optimizer, step)
    tokens = scores.score(pair, bank, batch_tokens=batch_tokens) if tokens is None else tokens
    require_same_bank(bank, tokens)
    split = (
        tokens["split"].to_numpy(dtype=object)
        if "split" in tokens
        else split_prompts(tokens["prompt_id"], held_out=held_out, seed=seed)
    )
    bench = StepBench(pair, bank, tokens, split, batch_tokens=batch_tokens)
    weights_N = loss_weights(tokens, split)
    direction = bench.direction(weights_N, loss=loss, beta=beta, optimizer=optimizer)
    calibration = calibrate(bench, direction, weights_N, beta=beta, step_size=step_size)
    size = float(calibration.loc[calibration["chosen"], "step_size"].iloc[0])
    with plain_attention(pair.student.model):
        tracer = Tracer(bench, weights_N, loss=loss, beta=beta, optimizer=optimizer, step_size=size)
        first_order_N = tracer.first_order_gain
        tokens = validate_tokens(
            tokens.assign(split=split, first_order_gain=first_order_N, lift=tracer.lift())
        )
        kernel = tracer.kernel(
            sample_positions(tokens, weights_N, count=sample, seed=seed), full=full_kernel
        )
    realised = realised_gains(bench, tracer.update, size)
    bench.require_restored()
    options = {"draws": draws, "level": level, "seed": seed}
    return Attribution(
        tokens,
        linearity(
            tokens, realised, size, norm=tensor_norm(tracer.update) / bench.weight_norm, **options
        ),
        kernel,
        kernel_shares(tokens, kernel, **options),
        lift_by_group(tokens, **options),
        calibration,
    )


# --- derivatives
# ------------------------------------------------------------------------------------


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention and experts written out in matrix products while the block runs: fused ones have no
    forward-mode derivative.
    """
    attention, experts = (
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
    )
    model.set_attn_implementation("eager")
    try:
        if experts not in (None, "eager"):
            model.set_experts_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts not in (None, "eager"):
            model.set_experts_implementation(experts)


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual tensor. The first one makes torch 2.13 load a module that warns of its own use of
    TorchScript.
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
    """The step of a bench, and derivatives along and between positions.

    Needs `plain_attention` around it.
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
        self.bench, self.weights_N, self.loss, self.beta, self.step_size = (
            bench,
            weights_N,
            loss,
            beta,
            step_size,
        )
        self.student, self.teacher = bench.pair.student, bench.pair.teacher
        self.names = [
            name for name, p in self.student.model.named_parameters() if p.is_floating_point()
        ]
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
            self.bench.all_batches,
            self.bench.teacher,
            tangents,
            gain_N,
            "first order",
            sign=-1.0,
            loss="forward_kl",
        )
        return distributed.sum_over_processes(gain_N)

    def lift(self) -> np.ndarray:
        """What each step position's loss does for the mean held-out forward KL [N], nats; NaN
        without loss.

        Sums to the mean first-order gain of the held-out positions.
        """
        lift_N = np.zeros(len(self.bench.tokens))
        tangents = dict(zip(self.names, self._pulled(self._held_out_gradient()), strict=True))
        self._visit_all(
            self.bench.step_batches,
            self.bench.step_teacher,
            tangents,
            lift_N,
            "lift",
            sign=1.0,
            loss=self.loss,
        )
        lift_N = distributed.sum_over_processes(lift_N) * self.weights_N / self.weights_N.sum()
        return np.where(self.weights_N > 0, lift_N, np.nan)

    def _pulled(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """a P times a gradient: the direction in which a position's loss has to push to help."""
        return [self.step_size * s * g for s, g in zip(self.scale, gradient, strict=True)]

    def _held_out_gradient(self) -> list[Tensor]:
        """Gradient of the mean forward KL of the held-out positions."""
        bench = self.bench
        finite = np.isfinite(bench.tokens[["forward_kl", "reverse_kl"]].to_numpy()).all(axis=1)
        weights_N = (
            (bench.split == "held_out") & finite & ~in_nonfinite_context(bench.tokens)
        ).astype(float)
        total = [torch.zeros_like(p) for p in bench.parameters]
        for batch, teacher_nH in zip(bench.held_out_batches, bench.held_out_teacher, strict=True):
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
        batches: Sequence[scores.Batch],
        teacher: Sequence[Tensor],
        tangents: dict[str, Tensor],
        out_N: np.ndarray,
        what: str,
        *,
        sign: float,
        loss: str,
    ) -> None:
        """sign * <dl/dz, dz> of every position of the batches into out_N."""
        with progress(total=sum(len(batch.rows_n) for batch in batches), description=what) as bar:
            for batch, teacher_nH in zip(batches, teacher, strict=True):
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
        """Derivative [n] of each position's loss along a direction in parameter space, nats.

        states_nH: where given, the student's states, held fixed.
        """
        parts = []

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
        """The gain of each target position (rows of the table, step positions) by source, one row a
        target and kernel.

        Returns columns kernel (output_layer, full), context_id, prompt_id, position, then PARTS and
        total, nats."""
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
        self, targets: Sequence[int], sources: np.ndarray, *, kind: str
    ) -> Iterator[np.ndarray]:
        """k_ij [sources] for each target i, nats. targets and sources: rows of the token table."""
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
        return batch.states(self.student) if kind == "output_layer" else None

    def _tangents(self, target: int, visited: list[tuple], kind: str) -> dict[str, Tensor]:
        """a P grad D of one position, over the parameters of the kernel."""
        batch, teacher_nH, states_nH = next(
            entry for entry in visited if (entry[0].rows_n == target).any()
        )
        at = slice((k := int((batch.rows_n == target).nonzero()[0, 0])), k + 1)
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
        """Sum of each target's row over all sources, nats."""
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
        for batch, teacher_nH in zip(bench.step_batches, bench.step_teacher, strict=True):
            fixed_nH = self._fixed_states(batch, "output_layer")
            part = bench.batch_loss(
                batch, fixed_nH, teacher_nH, self.weights_N, loss=self.loss, beta=self.beta
            )
            _accumulate(total, torch.autograd.grad(part, parameters, allow_unused=True))
        distributed.sum_in_place(total)
        return total

    def _places(self, kind: str) -> list[int]:
        """Which of the bench's parameters a kernel has."""
        head = [p for p in self.student.head.parameters()] if kind == "output_layer" else None
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


def realised_gains(
    bench: StepBench,
    update: list[Tensor],
    step_size: float,
    *,
    fractions: Sequence[float] = FRACTIONS,
) -> dict[float, np.ndarray]:
    """Gain [N] in nats after each fraction of the step, by fraction."""
    before = bench.rescore("before")[0]
    gains = {}
    for fraction in fractions:
        with bench.moved(update, fraction * step_size):
            gains[fraction] = before - bench.rescore(f"{fraction:g} of the step")[0]
    return gains


def sample_positions(
    tokens: pd.DataFrame, weights_N: np.ndarray, *, count: int, seed: int
) -> np.ndarray:
    """Rows of supervised positions, as many from each quadrant as there are, up to count / 4;
    ascending.
    """
    if count < 1:
        raise DiagnosticsError(f"A kernel on {count} positions was asked for; sample at least 1.")
    generator, quadrant = np.random.default_rng([seed, 3]), registry.quadrants(tokens)
    chosen = []
    for number in (1, 2, 3, 4):
        rows = np.flatnonzero((weights_N > 0) & (quadrant == number))
        chosen.append(generator.permutation(rows)[: -(-count // 4)])
    return np.sort(np.concatenate(chosen))


# --- tables
# -----------------------------------------------------------------------------------------


def linearity(
    tokens: pd.DataFrame,
    realised: dict[float, np.ndarray],
    step_size: float,
    *,
    norm: float,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Realised gain against the first-order prediction, by step size.

    realised: gains [N] by fraction of the step, whose size is step_size and relative norm step_size
    * norm. Returns columns fraction, step_size, relative_norm, split (all, step, held_out), slope
    (realised on predicted, with intercept), slope_low, slope_high, r2 (squared Pearson; 0 where its
    interval's end is negative), r2_low, r2_high, explained (1 - sum of squared errors of the
    prediction itself over the realised gain's), predicted_mean, realised_mean (nats), positions,
    prompts."""
    rows = []
    for fraction, gain_N in realised.items():
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
    """Masks [N]: all, quadrants q1 to q4, and thirds (1 the lowest) of compatibility and of
    teachability.
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
    Returns columns kernel, group (see `position_groups`), part (PARTS, total), mean, low, high
    (nats), share, share_low, share_high (NaN where the group's total is not positive), positions,
    prompts."""
    place = pd.Series(
        np.arange(len(tokens)), index=pd.MultiIndex.from_frame(tokens[["context_id", "position"]])
    )
    groups, quadrant, on_step = (
        position_groups(tokens),
        registry.quadrants(tokens),
        (tokens["split"] == "step").to_numpy(),
    )
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
    columns = [
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
    ]
    return pd.DataFrame(rows, columns=columns)


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

    Returns columns group, lift_share (of the sum over step positions), low, high, position_share,
    enrichment (lift share over position share; 1 where the group lifts as much as any),
    enrichment_low, enrichment_high, positions, prompts. NaN where the whole lift is not positive.
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
