"""One OPD step on frozen contexts, and what it did to every position.

    gain_i = D_i(theta0) - D_i(theta0 + a*d),   D = KL(q||p), teacher first, in nats

The prompts are split in two: the *step* half carries the loss, the *held-out* half shows what
spills over. The direction d is the one that training would take first: `adamw` is AdamW's
bias-corrected first step, -g/(|g| + eps), so that the step size a is its learning rate; `sgd` is
-g/|g|, so that a is the update's norm. Step size `auto` is the largest tried whose realised drop in
mean loss is at least 80 % of the first-order prediction -a*<g, d>. (`sampled` is a linear surrogate
whose own value bounds no step: its size is calibrated on the reverse KL that it estimates.) A
*placebo* moves every weight by the same amount with a random sign: same norm, no teacher; the
correlation that it shows is what the presence of D in both sides of a comparison gives alone.

Before and after come from the same code on the same batches, so a step of size 0 gives gains of
exactly 0. The student is restored from a copy afterwards, and every bit is compared.

Departures from the scripts released with arXiv 2605.26844: predictors are those of theta0; a
relative gain is undefined where D is under 1e-3 nats (`relative_gain_released` has no floor)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, no_shards
from diagnostics.core.schema import require_columns, validate_tokens
from diagnostics.core.types import RELATIVE_GAIN_FLOOR, Bank
from diagnostics.measure import losses
from diagnostics.measure.divergences import to_float64
from diagnostics.models import topk_teacher
from diagnostics.models.pair import Pair, weights_sha256
from diagnostics.probing import scores
from diagnostics.probing.directions import Direction, Store

log = logging.getLogger("diagnostics")
ADAM_EPS = 1e-8
LINEAR_ENOUGH = 0.8
FIRST_TRIAL_DROP = 0.02
"""Share of the loss that the first calibration trial is predicted to remove."""
AIM = 0.85
"""A trial aims at this share of the size where the last trial's parabola meets LINEAR_ENOUGH."""
CLOSE_ENOUGH = 0.86
"""Between this ratio and LINEAR_ENOUGH a calibration ends early."""
CALIBRATION_TRIALS = 4
"""On the step half these cost as much as two forward passes over the bank."""
PIECE = 2**18
"""Numbers of a tensor that are added up at a time."""
RESCUE_TRIALS = 3
"""Further trials where none of the planned ones was linear."""
OPTIMIZERS = ("adamw", "sgd")
CALIBRATION_LOSS = {"sampled": "reverse_kl"}


@dataclass(frozen=True)
class ProbeConfig:
    """The step and its controls."""

    loss: str = field(
        default="reverse_kl", metadata={"help": "OPD loss of the step", "choices": losses.LOSSES}
    )
    beta: float = field(default=0.5, metadata={"help": "teacher's share in the mixture of jsd"})
    optimizer: str = field(
        default="adamw", metadata={"help": "direction of the step", "choices": OPTIMIZERS}
    )
    step: str = field(
        default="auto",
        metadata={"help": "auto, or a number: learning rate (adamw) or update norm (sgd)"},
    )
    held_out: float = field(default=0.5, metadata={"help": "share of prompts that carry no loss"})
    seed: int = field(default=0, metadata={"help": "seed of the split and of the placebo"})

    def __post_init__(self):
        requested_step(self.loss, self.optimizer, self.step)


@dataclass(frozen=True)
class Step:
    """What was done to the student, for the record. Losses in nats a selected position."""

    loss: str
    beta: float
    optimizer: str
    step_size: float
    update_norm: float
    relative_norm: float
    """Norm of the update over the norm of the weights."""
    gradient_norm: float
    loss_before: float
    """Mean of the loss at theta0; for `sampled` of the reverse KL, which its size is calibrated
    on.
    """
    predicted_drop: float
    realised_drop: float
    step_positions: int
    held_out_positions: int
    weights_sha256: str
    """Hash of the student before the step; after it, its weights were the same in every bit."""


@dataclass
class ProbeResult:
    """Token table with gains, the calibration curve of the step, and the step's record."""

    tokens: pd.DataFrame
    calibration: pd.DataFrame
    step: Step

    def _repr_html_(self) -> str:
        gains = self.tokens.groupby("split")[["gain", "relative_gain", "placebo_gain"]].mean()
        step = pd.Series(asdict(self.step)).drop("weights_sha256").to_frame("step")
        return (
            "<p>Mean gain (nats; relative as a"
            f" fraction)</p>{gains.to_html(float_format='%.3g')}{step.to_html()}"
        )


class StepBench:
    """A frozen bank, its teacher states and a student that can be moved along a direction and put
    back.

    Everything that takes a step stands on it: the probe, the intervention, the attribution. The
    teacher is run once, when the bench is set up."""

    def __init__(
        self,
        pair: Pair,
        bank: Bank,
        tokens: pd.DataFrame,
        split: np.ndarray,
        *,
        batch_tokens: int = scores.BATCH_TOKENS,
    ):
        self.pair, self.bank, self.tokens, self.split = pair, bank, tokens, split
        self.parameters = [p for p in pair.student.model.parameters() if p.is_floating_point()]
        _require_precision(self.parameters)
        on_step, apart = split == "step", in_nonfinite_context(tokens)
        groups = [
            scores.local_batches(scores.batches(bank, batch_tokens=batch_tokens, keep=keep))
            for keep in (on_step & ~apart, ~on_step & ~apart, apart)
        ]
        states = iter(scores.teacher_states(pair, sum(groups, [])))
        self.step_batches, self.held_out_batches, self._spoiled_batches = groups
        self.step_teacher, self.held_out_teacher, self._spoiled_teacher = (
            [next(states) for _ in group] for group in groups
        )
        self.origin = [p.detach().clone() for p in self.parameters]
        self.origin_sha256 = weights_sha256(pair.student.model)
        self.weight_norm = tensor_norm(self.origin)

    def mean_loss(
        self, weights_N: np.ndarray, *, loss: str, beta: float, backward: bool = False
    ) -> float:
        """Weighted mean of the loss, weights summing over all positions; with `backward` also its
        gradient.

        weights_N: float [N], 0 where a position carries no loss. The denominator is the sum of all
        weights, so neither the batch size nor the number of batches changes value or gradient. The
        advantage of `sampled` is held at theta0's."""
        parts_N = np.zeros(len(self.tokens))
        with torch.set_grad_enabled(backward):
            for batch, teacher_nH in zip(self.step_batches, self.step_teacher):
                if not weights_N[batch.rows_n.numpy()].any():
                    continue
                part = self.batch_loss(
                    batch,
                    batch.states(self.pair.student),
                    teacher_nH,
                    weights_N,
                    loss=loss,
                    beta=beta,
                )
                parts_N[int(batch.rows_n[0])] = float(part.detach())
                if backward:
                    part.backward()
                    self._collect_gradients()
        return math.fsum(
            distributed.sum_over_processes(parts_N)
        )  # rounded once: the order of the batches, and whose they are, is no matter

    def batch_loss(
        self,
        batch: scores.Batch,
        student_nH: Tensor,
        teacher_nH: Tensor,
        weights_N: np.ndarray,
        *,
        loss: str,
        beta: float,
    ) -> Tensor:
        """One batch's part of the weighted mean loss over all positions, from states [n, H] of both
        models.
        """
        rows = batch.rows_n.numpy()
        return losses.chunked_loss(
            student_nH,
            self.pair.student.logits,
            teacher_nH,
            self.pair.teacher.logits,
            batch.sampled_n,
            loss=loss,
            beta=beta,
            weights_N=torch.from_numpy(weights_N[rows]),
            denominator=float(weights_N.sum()),
            advantage_N=torch.from_numpy(self.tokens["advantage"].to_numpy()[rows]),
        )

    def gradient(
        self, weights_N: np.ndarray, *, loss: str, beta: float
    ) -> tuple[float, list[Tensor]]:
        """Mean loss at theta0 in nats and its gradient, one tensor a parameter.

        Batches are added up in float64: AdamW's first step divides a gradient by its own size,
        which would turn the rounding of another order of summation into a different step. Out of
        memory, every batch is halved and the gradient is started again."""
        value = None
        while value is None:
            self._sums: list[Tensor | None] = [None] * len(self.parameters)
            self.pair.student.model.zero_grad(
                set_to_none=True
            )  # what a batch that did not fit left behind
            try:
                value = self.mean_loss(weights_N, loss=loss, beta=beta, backward=True)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve_step_batches(error)
        gradient = self._summed_gradients()
        if not np.isfinite(value) or not np.isfinite(tensor_norm(gradient)):
            raise DiagnosticsError(
                f"The {loss} loss is {value} with gradient norm {tensor_norm(gradient)}. Check the"
                " models' logits for NaN or inf, or use float32."
            )
        return value, gradient

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            if self._sums[i] is None:  # a first batch's gradient is kept uncopied
                self._sums[i] = p.grad
            else:
                self._sums[i] = to_float64(self._sums[i])
                self._sums[i] += p.grad.to(self._sums[i].device)
            p.grad = None

    def _summed_gradients(self) -> list[Tensor]:
        """The gradient over all processes in the parameters' dtype; what was collected is
        forgotten.
        """
        sums, self._sums = (
            [
                torch.zeros_like(p) if total is None else total
                for p, total in zip(self.parameters, self._sums)
            ],
            [],
        )
        if distributed.world() > 1:
            sums = [to_float64(total) for total in sums]
            distributed.sum_in_place(sums)
        return [total.to(p) for p, total in zip(self.parameters, sums)]

    def _halve_step_batches(self, error: BaseException) -> None:
        halves = [batch.halves(error) for batch in self.step_batches]
        self.step_teacher = [
            part
            for pair, states in zip(halves, self.step_teacher)
            for part in states.split([len(half.rows_n) for half in pair])
        ]
        self.step_batches = [half for pair in halves for half in pair]

    def direction(
        self, weights_N: np.ndarray, *, loss: str, beta: float, optimizer: str
    ) -> Direction:
        """The optimiser's first direction at theta0, and the loss that its size is calibrated
        on.
        """
        topk_teacher.require_loss(
            self.pair.teacher, loss, self.tokens["advantage"].to_numpy(), weights_N
        )
        value, gradient = self.gradient(weights_N, loss=loss, beta=beta)
        norm = tensor_norm(gradient)
        update = first_update(gradient, optimizer)
        calibration_loss = CALIBRATION_LOSS.get(loss, loss)
        if calibration_loss != loss:
            value, gradient = self.gradient(weights_N, loss=calibration_loss, beta=beta)
        return Direction(
            update, calibration_loss, value, norm, _dot(gradient, update), tensor_norm(update)
        )

    @contextmanager
    def moved(
        self, direction: list[Tensor], step_size: float, *, placebo_seed: int | None = None
    ) -> Iterator[None]:
        """The student at theta0 + step_size * direction; with a seed, every coordinate under a
        random sign.
        """
        try:
            with torch.no_grad():
                for p, o, d, sign in zip(
                    self.parameters, self.origin, direction, _signs(direction, placebo_seed)
                ):
                    torch.mul(d, step_size, out=p)
                    p.mul_(sign).add_(o)
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put theta0 back, bit for bit."""
        for p, o in zip(self.parameters, self.origin):
            p.copy_(o)

    def rescore(
        self, description: str, *, js: bool = False, shards: Shards | None = None
    ) -> tuple[np.ndarray, ...]:
        """Forward KL, reverse KL and with `js` JS [N] of the whole bank with the student as it is
        now.
        """
        positions = len(self.tokens)
        return scores.rescore(
            self.pair,
            self.all_batches,
            self.teacher,
            positions=positions,
            description=description,
            js=js,
            shards=shards,
        )

    @property
    def all_batches(self) -> list[scores.Batch]:
        """This process's batches, step contexts first."""
        return self.step_batches + self.held_out_batches + self._spoiled_batches

    @property
    def teacher(self) -> list[Tensor]:
        """The teacher's states for `all_batches`."""
        return self.step_teacher + self.held_out_teacher + self._spoiled_teacher

    def require_restored(self) -> None:
        """Raise RuntimeError unless the student's weights are bit for bit what they were at the
        start.
        """
        changed = [
            name
            for name, p, o in zip(self._names(), self.parameters, self.origin, strict=True)
            if not same_bits(p, o)
        ]
        if changed:
            raise RuntimeError(
                f"{len(changed)} of the student's {len(self.parameters)} weights are not as before"
                f" the step, {changed[0]} first"
            )

    def _names(self) -> list[str]:
        return [
            name for name, p in self.pair.student.model.named_parameters() if p.is_floating_point()
        ]


@torch.no_grad()
def same_bits(left: Tensor, right: Tensor) -> bool:
    """True where two tensors agree in every bit; compared where they are, NaN with NaN and 0 apart
    from -0.
    """
    return torch.equal(*(x.detach().reshape(-1).view(torch.uint8) for x in (left, right)))


def first_update(gradient: list[Tensor], optimizer: str) -> list[Tensor]:
    """The optimiser's first update from a gradient, for a step of size 1: -g/(|g| + eps) by
    coordinate, or -g/|g|.
    """
    if optimizer == "adamw":
        sizes = (g.abs().add_(ADAM_EPS) for g in gradient)
        return [torch.div(g, size, out=size).neg_() for g, size in zip(gradient, sizes)]
    scale = max(tensor_norm(gradient), torch.finfo(torch.float32).tiny)
    return [-g / scale for g in gradient]


def probe(
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
    batch_tokens: int = scores.BATCH_TOKENS,
    shards: Callable[[str], Shards] = no_shards,
) -> ProbeResult:
    """Take one OPD step on the step half of the prompts and measure the gain at every position.

    tokens: the bank's table as `score` wrote it; scored here where None. `step` is `auto` or a
    number (learning rate for adamw, update norm for sgd); 0 changes nothing, exactly. The student
    must be in float32 or float64 and ends as it began. shards: where each pass keeps its finished
    batches; those of a moved student count only for the very same step. Returns the table with the
    columns `split, forward_kl_after, reverse_kl_after, gain, relative_gain, relative_gain_released,
    reverse_gain` and the placebo's gains. Raises DiagnosticsError for an unknown loss or optimiser,
    a step that is not a number, a table of another bank, or a share that leaves one half without
    prompts."""
    step_size = requested_step(loss, optimizer, step)
    tokens = scores.score(pair, bank, batch_tokens=batch_tokens) if tokens is None else tokens
    require_same_bank(bank, tokens)
    split = split_prompts(tokens["prompt_id"], held_out=held_out, seed=seed)
    bench = StepBench(pair, bank, tokens, split, batch_tokens=batch_tokens)
    weights_N = loss_weights(tokens, split)
    direction, calibration = kept_step(
        bench,
        weights_N,
        Store(shards("direction").folder),
        loss=loss,
        beta=beta,
        optimizer=optimizer,
        step_size=step_size,
    )
    chosen = calibration[calibration["chosen"]].iloc[0]
    before, step_name = (
        bench.rescore("before", shards=shards("before")),
        direction.name(chosen.step_size),
    )
    with bench.moved(direction.update, chosen.step_size):
        after = bench.rescore("after", shards=shards(f"after-{step_name}"))
    with bench.moved(direction.update, chosen.step_size, placebo_seed=seed):
        placebo = bench.rescore("placebo", shards=shards(f"placebo-{step_name}"))
    bench.require_restored()
    record = Step(
        loss,
        beta,
        optimizer,
        float(chosen.step_size),
        float(chosen.step_size * direction.norm),
        float(chosen.relative_norm),
        direction.gradient_norm,
        direction.value,
        float(chosen.predicted_drop),
        float(chosen.realised_drop),
        int((weights_N > 0).sum()),
        int((split == "held_out").sum()),
        bench.origin_sha256,
    )
    return ProbeResult(
        validate_tokens(tokens.assign(split=split, **gains(before, after, placebo))),
        calibration,
        record,
    )


def kept_step(
    bench: StepBench,
    weights_N: np.ndarray,
    store: Store,
    *,
    loss: str,
    beta: float,
    optimizer: str,
    step_size: float | None,
) -> tuple[Direction, pd.DataFrame]:
    """The step's direction and the calibration along it: an interrupted run's where the store has
    them, made and kept where not.

    What is measured along a direction is named by it, so nothing that belongs to another one is
    taken up."""
    direction = store.direction(bench.parameters)
    if direction is None:
        direction = bench.direction(weights_N, loss=loss, beta=beta, optimizer=optimizer).named()
        store.keep(direction)
    calibration = store.calibration(direction)
    if calibration is None:
        calibration = calibrate(bench, direction, weights_N, beta=beta, step_size=step_size)
        store.keep_calibration(direction, calibration)
    return direction, calibration


def gains(before: tuple, after: tuple, placebo: tuple | None = None) -> dict[str, np.ndarray]:
    """Outcome columns [N] from (forward KL, reverse KL) before and after the step, and after the
    placebo if there is one.

    Relative gains are NaN where the forward KL before is under 1e-3 nats.
    """
    gain, reverse_gain = before[0] - after[0], before[1] - after[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        base = np.where(before[0] >= RELATIVE_GAIN_FLOOR, before[0], np.nan)
        columns = {
            "forward_kl_after": after[0],
            "reverse_kl_after": after[1],
            "gain": gain,
            "relative_gain": gain / base,
            "relative_gain_released": gain / (before[0] + 1e-12),
            "reverse_gain": reverse_gain,
        }
        if placebo is None:
            return columns
        placebo_gain = before[0] - placebo[0]
        return columns | {
            "placebo_gain": placebo_gain,
            "placebo_relative_gain": placebo_gain / base,
            "placebo_reverse_gain": before[1] - placebo[1],
        }


def calibrate(
    bench: StepBench,
    direction: Direction,
    weights_N: np.ndarray,
    *,
    beta: float,
    step_size: float | None = None,
) -> pd.DataFrame:
    """Realised against predicted drop of the mean loss along a direction.

    With `step_size` that size alone is tried and chosen. Otherwise up to four: what is missing to a
    ratio of 1 is taken to grow as a power of the size, the power read off the last two trials, and
    each trial aims at a ratio a little above 0.8. Where none of the four reaches 0.8, up to three
    smaller ones follow. The largest size with a ratio of at least 0.8 is chosen; with a warning,
    the smallest where there is none. Returns columns step_size, relative_norm, predicted_drop,
    realised_drop (nats), ratio, chosen."""
    first = (
        -FIRST_TRIAL_DROP * abs(direction.value) / direction.slope if direction.slope < 0 else 0.0
    )
    size, rows = (first if step_size is None else step_size), []
    for trial in range(CALIBRATION_TRIALS + RESCUE_TRIALS if step_size is None else 1):
        with bench.moved(direction.update, size):
            realised = direction.value - bench.mean_loss(
                weights_N, loss=direction.calibration_loss, beta=beta
            )
        predicted = -size * direction.slope
        ratio = realised / predicted if predicted else np.nan
        rows.append((size, size * direction.norm / bench.weight_norm, predicted, realised, ratio))
        linear = any(row[-1] >= LINEAR_ENOUGH for row in rows)
        if (
            predicted == 0
            or LINEAR_ENOUGH <= ratio <= CLOSE_ENOUGH
            or (linear and trial + 1 >= CALIBRATION_TRIALS)
        ):
            break
        size = _next_size([(row[0], 1 - row[-1]) for row in rows])
    table = pd.DataFrame(
        rows, columns=["step_size", "relative_norm", "predicted_drop", "realised_drop", "ratio"]
    )
    return table.assign(chosen=table.index == _choose(table, step_size is None)).sort_values(
        "step_size", ignore_index=True
    )


def _next_size(trials: list[tuple[float, float]]) -> float:
    """Size at which the shortfall, a power of the size through the last two trials, is AIM of what
    is allowed.
    """
    size, short = trials[-1]
    short = max(short, 1e-3) if np.isfinite(short) else np.inf
    power = 1.0
    if (
        len(trials) > 1
        and min(trials[-2][1], short) > 1e-3
        and np.isfinite(short)
        and np.isfinite(trials[-2][1])
    ):
        power = np.log(trials[-2][1] / short) / np.log(trials[-2][0] / size)
    power = power if 0.05 < power < 4 else 1.0
    return size * float(np.clip((AIM * (1 - LINEAR_ENOUGH) / short) ** (1 / power), 0.1, 8.0))


def _choose(table: pd.DataFrame, automatic: bool) -> int:
    enough = table[table["ratio"] >= LINEAR_ENOUGH]
    if len(enough):
        return enough["step_size"].idxmax()
    if automatic and table["ratio"].notna().any():
        log.warning(
            "no step tried was linear (best ratio %.2f); the smallest is used", table["ratio"].max()
        )
    return table["step_size"].idxmin()


def split_prompts(prompt_ids: pd.Series, *, held_out: float, seed: int) -> np.ndarray:
    """`step` or `held_out` for each position; contexts of one prompt stay together."""
    prompts = sorted(prompt_ids.unique())
    count = round(held_out * len(prompts)) if abs(held_out) <= 1 else 0
    if seed < 0:
        raise DiagnosticsError(f"A seed is a whole number of at least 0; got {seed}.")
    if not 0 < count < len(prompts):
        raise DiagnosticsError(
            f"held_out={held_out} leaves {len(prompts) - count} step and {count} held-out prompts"
            f" of {len(prompts)}. Each half needs one at least; use more prompts or another share."
        )
    chosen = set(np.random.default_rng([seed, 0]).permutation(prompts)[:count])
    return np.where(prompt_ids.isin(chosen), "held_out", "step").astype(object)


def loss_weights(tokens: pd.DataFrame, split: np.ndarray) -> np.ndarray:
    """1.0 at step positions whose measurements are finite and whose context is not spoiled, 0.0 elsewhere."""
    finite = np.isfinite(tokens["forward_kl"].to_numpy()) & np.isfinite(
        tokens["reverse_kl"].to_numpy()
    )
    return ((split == "step") & finite & ~in_nonfinite_context(tokens)).astype(float)


def in_nonfinite_context(tokens: pd.DataFrame) -> np.ndarray:
    """Positions [N] of contexts in which any measurement is NaN: 0 times NaN is NaN on the way back
    through a model, so none may carry loss.
    """
    return tokens["forward_kl"].isna().groupby(tokens["context_id"]).transform("any").to_numpy()


def require_same_bank(bank: Bank, tokens: pd.DataFrame) -> None:
    """Refuse a token table whose rows are not the bank's positions in order."""
    require_columns(
        tokens,
        ("context_id", "token_id", "forward_kl", "reverse_kl", "advantage"),
        what="A probe's token table",
    )
    expected = [(context.context_id, token) for context in bank for token in context.response_ids]
    found = list(zip(tokens["context_id"], tokens["token_id"]))
    if expected != found:
        raise DiagnosticsError(
            f"The token table ({len(found)} rows) does not list the bank's {len(expected)}"
            " positions in order. Score this bank again."
        )


def requested_step(loss: str, optimizer: str, step: str | float) -> float | None:
    """The step size asked for, None for `auto`. Raises DiagnosticsError for an unknown loss or
    optimiser, or no size.
    """
    if loss not in losses.LOSSES:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(losses.LOSSES)}.")
    if optimizer not in OPTIMIZERS:
        raise DiagnosticsError(
            f"Unknown optimizer {optimizer!r}. Known are {', '.join(OPTIMIZERS)}."
        )
    if step == "auto":
        return None
    try:
        size = float(step)
    except (TypeError, ValueError):
        size = float("nan")
    if not (np.isfinite(size) and size >= 0):
        raise DiagnosticsError(f"The step is 'auto' or a number of at least 0; got {step!r}.")
    return size


def _require_precision(parameters: list[Tensor]) -> None:
    coarse = next(
        (p.dtype for p in parameters if p.dtype not in (torch.float32, torch.float64)), None
    )
    if coarse is not None:
        raise DiagnosticsError(
            f"The student is in {str(coarse).removeprefix('torch.')}, where a step this small"
            " vanishes in rounding. Load it with dtype='float32' (teacher_dtype may stay lower)."
        )


def tensor_norm(tensors: list[Tensor]) -> float:
    """Euclidean norm over all tensors together."""
    return float(sum((to_float64(t) ** 2).sum() for (t,) in _pieces(tensors)) ** 0.5)


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    return float(sum((to_float64(a) * to_float64(b)).sum() for a, b in _pieces(left, right)))


def _pieces(*lists: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The lists' tensors side by side, flat, in pieces whose float64 copies stay in cache."""
    for tensors in zip(*lists):
        yield from zip(*(t.detach().reshape(-1).split(PIECE) for t in tensors))


def _signs(like: list[Tensor], seed: int | None) -> Iterator[Tensor | int]:
    """Random signs, int8, in the shapes of `like`; 1 without a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for d in like:
        yield (
            1
            if generator is None
            else torch.randint(0, 2, d.shape, generator=generator, dtype=torch.int8)
            .mul_(2)
            .sub_(1)
            .to(d.device)
        )
