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

The step is that on fold 0, and the held-out positions are those of all other folds: the first-order
gain predicts `gain_fold0`. P is that of the step on all of the fold's positions, so lift is linear
in the selection; a step on a selection alone has its own P (`intervention` takes it). Where AdamW's
P divides by a gradient that nearly cancels, single terms exceed their sum, so a share outside
[0, 1] is not an error.

Reference: influence to first order as in arXiv 2002.08484 (TracIn), with the optimizer's
preconditioner in between.

Axes: N positions of the bank, n of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from diagnostics import criteria as registry
from diagnostics.analysis.config import AnalysisConfig
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import takes, token_table
from diagnostics.core.schema import validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import sizes
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing.attribution_tables import kernel_shares, lift_by_group, linearity
from diagnostics.probing.config.attribution import AttributionConfig
from diagnostics.probing.config.step import ProbeConfig
from diagnostics.probing.step import PreparedStep, StepBench, prepare_step
from diagnostics.probing.tensor_lists import tensor_norm
from diagnostics.probing.tracer import Tracer, plain_attention

FRACTIONS = (0.1, 0.3, 1.0, 3.0)
"""Step sizes, in units of the calibrated one, at which predicted and realized gain are compared."""


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

    def __repr__(self) -> str:
        return sizes("Attribution (rows)", vars(self))

    def _repr_html_(self) -> str:
        shown = (
            self.linearity[self.linearity["split"] == "all"],
            self.shares[self.shares["group"] == "all"],
        )
        return "".join(table.to_html(index=False, float_format="%.3g") for table in shown)


@takes(tokens=token_table)
@with_settings(probe=ProbeConfig, config=AttributionConfig, analysis=AnalysisConfig)
def attribute(
    pair: Pair,
    bank: Bank,
    probe: ProbeConfig = ProbeConfig(),
    config: AttributionConfig = AttributionConfig(),
    analysis: AnalysisConfig = AnalysisConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int | None = None,
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
        tokens: The bank's token table; None scores the bank first. Its column `fold` (or the
            `split` of a single step) is used where it has one; otherwise folds are drawn as in
            `probe`.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        settings: Fields of `probe`, `config` and `analysis`.

    Returns:
        The token table with fold, first_order_gain (nats) at every position and lift (nats) at
        every supervised one, and the tables linearity, kernel, shares and lift.

    Raises:
        DiagnosticsError: As `probe` does, and for an architecture without forward-mode derivative.

    Reference:
        Influence to first order as in arXiv 2002.08484 (TracIn), with the optimizer's
        preconditioner in between.
    """
    step = prepare_step(pair, bank, tokens, probe, batch_tokens=batch_tokens)
    bench, size = step.bench, step.step_size
    with plain_attention(pair.student.model):
        tracer = _tracer(step, probe)
        first_order_N = tracer.first_order_gain
        tokens = validate_tokens(
            bench.tokens.drop(columns="split", errors="ignore").assign(
                fold=bench.folds, first_order_gain=first_order_N, lift=tracer.lift()
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


def _tracer(step: PreparedStep, probe: ProbeConfig) -> Tracer:
    return Tracer(
        step.bench,
        step.weights_N,
        loss=probe.loss,
        beta=probe.beta,
        optimizer=probe.optimizer,
        step_size=step.step_size,
    )


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
    before = bench.before()[0]
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
