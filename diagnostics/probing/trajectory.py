"""Short trajectories: k optimizer steps on minibatches of frozen contexts, as training takes them.

    theta_k = AdamW(theta_(k-1), g_k)
    g_k     = gradient at theta_(k-1) of sum_i w_ki l_i / sum_i w_ki,   i in the minibatch k

One step at theta0 is AdamW's sign descent, and it orders selections otherwise than training does;
ten to twenty steps of the real optimizer, with its state and at the training's learning rate, come
closer to it. They take minibatches of the contexts of one fold, whose responses stay as they are:
the longer a trajectory, the further its student is from the one that wrote them, and the better it
knows them. So every other fold's contexts are measured too, at each *horizon* k.

As in training, the loss weights w of a minibatch are decided when its turn comes, from what the
student is by then: a selection that is fixed at theta0 drives the same positions on and on, and
turns from the best into the worst within twenty steps (`remeasured`).

The contexts of a fold are shuffled again for every pass over them, in a seeded order that all
selections share. The learning rate is constant, since training's linear decay has hardly begun
where a horizon is a small part of it. The advantage of `sampled` is theta0's.

A warm start fills the optimizer's state before the first step: steps at a learning rate of 0 on
minibatches in another order, so that weights stay at theta0 and moments do not.

Memory: AdamW's state takes twice the student's weights, beside the gradient and the copy of theta0
that every step needs; `step_state` says where they lie. It is released at the last horizon. Several
processes divide each minibatch, add up its gradient, and take the same step.

Reference: Loshchilov and Hutter 2019 (AdamW).

Axes: N positions of the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import topk_teacher
from diagnostics.probing import scores
from diagnostics.probing.config.trajectory import MINIBATCH, TrajectoryConfig
from diagnostics.probing.step import StepBench
from diagnostics.probing.tensor_lists import distance

FUSED_ON = ("cpu", "cuda")
"""Devices whose AdamW torch has as one kernel, which training uses and which needs no further
memory."""
CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""
SAME_COMPATIBILITY = 1e-3
"""Other batches change a compatibility in float32 by rounding alone, and by less than this."""
ONE_SIDED = 0.9
"""Share of the changes that have one sign where K is another: it moves nearly every position, and
all to one side. The rounding of a teacher in bfloat16 moves few by much, or to both sides.
"""
A_CHANGE = 1e-6
Rows = np.ndarray
"""Rows of the token table, int [n], in ascending order."""
Weigh = Callable[[Rows, int], np.ndarray]
"""From the rows of a minibatch and the number of its step to loss weights [n]."""


def minibatches(
    tokens: pd.DataFrame,
    mask_N: np.ndarray,
    *,
    steps: int,
    minibatch: int = MINIBATCH,
    seed: Sequence[int] = (0,),
) -> list[Rows]:
    """The positions of each step's contexts.

    All contexts are gone through in a random order, again and again, each time in another. A step
    that a pass leaves unfilled is filled from the next pass, with contexts that it does not have
    yet; a step therefore has every context at most once, and all contexts in the fewest steps.

    Args:
        tokens: Token table of N rows in bank order.
        mask_N: bool [N]; contexts with a position under the mask take part, with those positions.
        steps: Number of steps.
        minibatch: Contexts in a step; all of them where there are fewer.
        seed: Seed of the order.

    Returns:
        One array of rows per step.

    Raises:
        DiagnosticsError: No context takes part.
    """
    rows_N = np.flatnonzero(mask_N)
    codes_n, names = pd.factorize(tokens["context_id"].to_numpy()[rows_N])
    if not len(names):
        raise DiagnosticsError(
            "No context with finite measurements is left to take steps on. Use more prompts or"
            " fewer folds."
        )
    generator = np.random.default_rng(list(seed))
    size, found = min(minibatch, len(names)), []
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < size:
            fresh = generator.permutation(len(names)).tolist()
            waiting += [c for c in fresh if c not in waiting] + [c for c in fresh if c in waiting]
        found.append(rows_N[np.isin(codes_n, waiting[:size])])
        waiting = waiting[size:]
    return found


class _Optimizer:
    """AdamW on the bench's student, whose moments lie where the bench has the state of its steps.

    In main memory beside a card it steps on a copy of the weights there, which the student then
    gets. With moments in mapped files it goes from one weight to the next, so that only its own
    moments are in memory.
    """

    def __init__(self, bench: StepBench, config: TrajectoryConfig):
        self.bench, self.settings, place = bench, config.optimizer, bench.place
        apart = place.sums(bench.parameters[0]) != bench.parameters[0].device
        self.weights = (
            [p.detach().to("cpu", copy=True) for p in bench.parameters]
            if apart
            else bench.parameters
        )
        groups = [[w] for w in self.weights] if place.kind == "disk" else [self.weights]
        self.parts = [self._adamw(group, config.rate) for group in groups]

    def _adamw(self, weights: list[Tensor], rate: float) -> torch.optim.AdamW:
        made = torch.optim.AdamW(
            weights,
            lr=rate,
            betas=(self.settings["adam_beta1"], self.settings["adam_beta2"]),
            eps=self.settings["adam_epsilon"],
            weight_decay=self.settings["weight_decay"],
            fused=all(w.device.type in FUSED_ON for w in weights),
        )
        place = self.bench.place
        if place.kind == "disk":  # moments as AdamW itself would make them, but elsewhere
            for w, one, two in zip(weights, place.zeros(weights), place.zeros(weights)):
                made.state[w] = {"step": torch.zeros(()), "exp_avg": one, "exp_avg_sq": two}
        return made

    def step(self, gradient: list[Tensor], *, rate: float) -> float:
        """Clip the gradient, take a step of this rate, and return the norm before clipping."""
        assert self.parts, "a trajectory goes on after its last horizon"
        for w, g in zip(self.weights, gradient, strict=True):
            w.grad = g
        norm = self._clip()
        for part in self.parts:
            part.param_groups[0]["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
            for state in part.state.values():
                self.bench.place.rest([state["exp_avg"], state["exp_avg_sq"]])
        if self.weights is not self.bench.parameters:
            with torch.no_grad():
                for p, w in zip(self.bench.parameters, self.weights, strict=True):
                    p.copy_(w)
        return norm

    def _clip(self) -> float:
        """Bound the gradient's norm, and return what it was."""
        most = self.settings["max_grad_norm"]
        if self.bench.spread.is_whole:
            return float(torch.nn.utils.clip_grad_norm_(self.weights, most))
        gradient = [w.grad for w in self.weights if w.grad is not None]
        norm = self.bench.norm(gradient)
        for g in gradient:  # as torch does it with the norm of whole weights
            g.mul_(min(1.0, most / (norm + CLIP_EPS)))
        return norm

    def forget(self) -> None:
        """Free the memory of the moments, and of the weights' copy."""
        self.parts, self.weights = [], []
        self.bench.place.tidy()


class Trajectory:
    """Optimizer steps of the bench's student on given minibatches.

    Args:
        bench: The student at theta0, and the bank.
        config: The optimizer's steps.
        steps: Rows of the minibatch of each step.
        weigh: Takes the rows [n] of a minibatch and the number of its step, from 1 on (a warm step:
            from -1 downwards), while the student stands before that step, and returns loss weights
            [n] of at least 0. A step without any weight has no gradient: the optimizer's momentum
            alone moves the student, and `idle_steps` counts it.
        warm: Rows of the minibatch of each warm step.
        few_passes: Whether a step's contexts share passes, as in `StepBench.gradient`.

    Attributes:
        gradient_norm: Norm of the first step's gradient, taken at theta0, before it is clipped.
        idle_steps: Steps so far without a position that carries loss.
        carried_N: bool [N], positions that have carried loss so far.
    """

    def __init__(
        self,
        bench: StepBench,
        config: TrajectoryConfig,
        steps: Sequence[Rows],
        weigh: Weigh,
        warm: Sequence[Rows] = (),
        *,
        few_passes: bool = False,
    ):
        self.bench, self.config, self.weigh = bench, config, weigh
        self.steps, self.warm, self.few_passes = list(steps), list(warm), few_passes
        self._begin()

    def _begin(self) -> None:
        self.gradient_norm, self.idle_steps = np.nan, 0
        self.carried_N = np.zeros(len(self.bench.tokens), dtype=bool)

    @property
    def update_norm(self) -> float:
        """Norm of the student's present distance from theta0."""
        return distance(self.bench.parameters, self.bench.origin, self.bench.spread)

    def run(self, horizon: Sequence[int]) -> Iterator[int]:
        """Take the steps, and hand over wherever a horizon is reached.

        Args:
            horizon: Ascending numbers of steps, at most as many as there are minibatches.

        Yields:
            Each horizon, while the student stands there. Afterwards it is back at theta0, bit for
            bit, also where the caller stops early or fails.

        Raises:
            DiagnosticsError: Loss or gradient is not finite, one context does not fit in memory, or
                a top-K teacher cannot supply this loss.
        """
        if not horizon:
            return
        assert max(horizon) <= len(self.steps), "a horizon beyond the planned steps"
        self._begin()
        with self.bench.held():
            optimizer = _Optimizer(self.bench, self.config)
            for number, rows in enumerate(self.warm, 1):
                self._step(optimizer, rows, -number, rate=0.0)
            for number, rows in enumerate(self.steps[: max(horizon)], 1):
                norm = self._step(optimizer, rows, number, rate=self.config.rate)
                if number == 1:
                    self.gradient_norm = norm
                if number == max(horizon):
                    optimizer.forget()  # what is done at the last horizon may need its memory
                if number in horizon:
                    yield number

    def _step(self, optimizer: _Optimizer, rows: Rows, number: int, *, rate: float) -> float:
        """One step; returns the norm of its gradient before it is clipped."""
        weights_N = np.zeros(len(self.bench.tokens))
        weights_N[rows] = self.weigh(rows, number)
        norm = optimizer.step(self._gradient(weights_N), rate=rate)
        if number > 0:
            self.carried_N |= weights_N > 0
            self.idle_steps += not weights_N.any()
        return norm

    def _gradient(self, weights_N: np.ndarray) -> list[Tensor]:
        bench, config = self.bench, self.config
        if not weights_N.any():
            return [torch.zeros_like(p, device=bench.place.sums(p)) for p in bench.parameters]
        advantage_N = bench.tokens["advantage"].to_numpy()
        topk_teacher.require_loss(bench.teacher, config.loss, advantage_N, weights_N)
        return bench.gradient(
            weights_N, loss=config.loss, beta=config.beta, few_passes=self.few_passes
        )[1]


def planned_trajectory(
    bench: StepBench,
    fold: int,
    config: TrajectoryConfig,
    weigh: Weigh,
    *,
    steps: int,
    seed: int,
    few_passes: bool = False,
) -> Trajectory:
    """A trajectory on minibatches of the contexts of a fold.

    Args:
        bench: The student at theta0, and the bank.
        fold: The fold whose contexts the steps are taken on.
        config: The optimizer's steps.
        weigh: As in `Trajectory`.
        steps: Number of steps.
        seed: Seed of the minibatches' order.
        few_passes: As in `Trajectory`.

    Returns:
        The trajectory; nothing is moved yet.
    """
    usable_N = bench.loss_weights(fold) > 0
    way, warm = (
        minibatches(
            bench.tokens,
            usable_N,
            steps=count,
            minibatch=config.minibatch,
            seed=(seed, fold, number),
        )
        for number, count in enumerate((steps, config.warm_steps))
    )
    return Trajectory(bench, config, way, weigh, warm, few_passes=few_passes)


def full_trajectory(
    bench: StepBench, fold: int, config: TrajectoryConfig, *, steps: int, seed: int
) -> Trajectory:
    """The trajectory whose loss is the mean over all positions of each minibatch of a fold.

    Args:
        bench: The student at theta0, and the bank.
        fold: The fold whose contexts the steps are taken on.
        config: The optimizer's steps.
        steps: Number of steps.
        seed: Seed of the minibatches' order.

    Returns:
        The trajectory; nothing is moved yet.
    """
    return planned_trajectory(bench, fold, config, every_position, steps=steps, seed=seed)


def every_position(rows: Rows, number: int) -> np.ndarray:
    """Loss weights of 1 for all positions of a minibatch [n]."""
    return np.ones(len(rows))


def remeasured(
    bench: StepBench,
    rows: Rows,
    *,
    k: int,
    extra: tuple[str, ...] = (),
    of: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The token table of some contexts, measured with the student as it is now.

    Args:
        bench: The student, wherever it stands, and the bank.
        rows: Rows of whole contexts.
        k: Size of the top-K supports; other sizes and what is no measurement of the two models
            keep the table's values.
        extra: Further measurements (`measure.extras`); those not named keep the table's values.
        of: The bench's token table with the columns that are wanted; None takes all.

    Returns:
        The token table of these rows, with the columns of `of`.
    """
    tokens = bench.tokens if of is None else of
    here_N = np.zeros(len(bench.tokens))
    here_N[rows] = 1.0
    found = scores.measure_again(
        bench.pair,
        bench.bank,
        bench.weighted_in_few_passes(here_N),
        scores.ScoreConfig(k=k, sweep=(), extra=extra),
    )
    known = {name: values[rows] for name, values in found.items() if name in tokens}
    return tokens.iloc[rows].assign(**known)


def require_support(bench: StepBench, rows: Rows, *, k: int) -> None:
    """Check that a size of supports is the one that the bench's token table was measured with.

    Args:
        bench: The student at theta0, and the bank.
        rows: Rows of some whole contexts, which are measured.
        k: Size of the top-K supports.

    Raises:
        DiagnosticsError: These positions have another compatibility in the table.
    """
    now, before = (
        table["compatibility"].to_numpy()
        for table in (remeasured(bench, rows, k=k), bench.tokens.iloc[rows])
    )
    change = np.nan_to_num(now - before)
    apart = np.abs(change).max(initial=0.0)
    up = change[np.abs(change) > A_CHANGE] > 0
    one_sided = 2 * len(up) > len(change) and max(up.mean(), 1 - up.mean()) > ONE_SIDED
    if apart > SAME_COMPATIBILITY and one_sided:
        raise DiagnosticsError(
            f"With K = {k} the compatibility at theta0 differs from the token table's by up to"
            f" {apart:.2g}. Give the K that the table was scored with."
        )
