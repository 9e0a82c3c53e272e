"""One OPD step on frozen contexts, and what it did to every position.

    gain_i = D_i(theta0) - D_i(theta0 + a*d),   D = KL(q||p), teacher first, in nats

Module `step` sets the step up: the direction d, its size a, and the split of the prompts into a
step half and a held-out half. The probe takes the step and measures every position before and
after. A *placebo* moves every weight by the same amount with a random sign: same norm, no teacher.
D(theta0) enters both a predictor and the gain; the placebo's correlation measures that mechanical
coupling.

Before and after come from the same code on the same batches, so a step of size 0 gives gains of
exactly 0. The student is restored from a copy afterwards, and every bit is compared.

Departures from the scripts released with arXiv 2605.26844: predictors are those of theta0; a
relative gain is undefined where D is under 1e-3 nats (`relative_gain_released` has no floor)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.core.formulas import relative_gain, released_relative_gain
from diagnostics.core.progress import Shards, no_shards
from diagnostics.core.schema import validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores
from diagnostics.probing.directions import Store
from diagnostics.probing.step import PreparedStep, ProbeConfig, prepare_step


@dataclass(frozen=True)
class Step:
    """The record of a step. Losses are means over the supervised positions, in nats."""

    loss: str
    beta: float
    optimizer: str
    step_size: float
    update_norm: float
    relative_norm: float
    """Norm of the update over the norm of the weights."""
    gradient_norm: float
    loss_before: float
    """Mean of the loss at theta0; for `sampled`, of the reverse KL that calibrates its size."""
    predicted_drop: float
    realised_drop: float
    step_positions: int
    held_out_positions: int
    weights_sha256: str
    """Hash of the student before the step. Afterwards every bit of its weights was restored."""


@dataclass
class ProbeResult:
    """What `probe` returns."""

    tokens: pd.DataFrame
    """The token table with gains, one row per position."""
    calibration: pd.DataFrame
    """The step sizes that were tried, one row per size (see `step.calibrate`)."""
    step: Step
    """The record of the step that was taken."""

    def _repr_html_(self) -> str:
        gains = self.tokens.groupby("split")[["gain", "relative_gain", "placebo_gain"]].mean()
        step = pd.Series(asdict(self.step)).drop("weights_sha256").to_frame("step")
        return (
            "<p>Mean gain (nats; relative as a"
            f" fraction)</p>{gains.to_html(float_format='%.3g')}{step.to_html()}"
        )


@with_settings(config=ProbeConfig)
def probe(
    pair: Pair,
    bank: Bank,
    config: ProbeConfig = ProbeConfig(),
    *,
    tokens: pd.DataFrame | None = None,
    batch_tokens: int = scores.BATCH_TOKENS,
    shards: Callable[[str], Shards] = no_shards,
    **settings: Any,
) -> ProbeResult:
    """Take one OPD step on the step half of the prompts and measure the gain at every position.

    The student ends as it began, bit for bit.

    Args:
        pair: The student, in float32 or float64, and its teacher.
        bank: The frozen contexts, N response positions in all.
        config: The step; its fields may be given as keywords instead. A step of size 0 changes
            nothing, exactly.
        tokens: The bank's token table as `score` wrote it; None scores the bank first.
        batch_tokens: Tokens in one forward pass, padding included.
        shards: Where each pass keeps its finished batches, by the name of the pass; nothing is
            kept by default. Batches of a moved student are only reused for the very same step.
        settings: Fields of `config`.

    Returns:
        The token table with the columns split, forward_kl_after, reverse_kl_after (nats), gain and
        reverse_gain (before minus after, nats), relative_gain, relative_gain_released, and the
        placebo's gains placebo_gain, placebo_relative_gain and placebo_reverse_gain; the
        calibration of the step's size; and the step's record.

    Raises:
        DiagnosticsError: A setting is unknown or out of range, the table is of another bank, one
            half has no prompts, or the student's precision is too low.
    """
    step = prepare_step(
        pair,
        bank,
        tokens,
        config,
        batch_tokens=batch_tokens,
        keep_split=False,  # the probe draws the split that every later stage finds in the table
        store=Store(shards("direction").folder),
    )
    found = _measured_gains(step, seed=config.seed, shards=shards)
    step.bench.require_restored()
    return ProbeResult(
        validate_tokens(step.bench.tokens.assign(split=step.bench.split, **found)),
        step.calibration,
        _record(step, config),
    )


def _measured_gains(
    step: PreparedStep, *, seed: int, shards: Callable[[str], Shards]
) -> dict[str, np.ndarray]:
    """Every position before the step, after it and after the placebo."""
    bench, direction, size = step.bench, step.direction, step.chosen.step_size
    name = direction.name(size)
    before = bench.rescore("before", shards=shards("before"))
    with bench.moved(direction.update, size):
        after = bench.rescore("after", shards=shards(f"after-{name}"))
    with bench.moved(direction.update, size, placebo_seed=seed):
        placebo = bench.rescore("placebo", shards=shards(f"placebo-{name}"))
    return gains(before, after, placebo)


def _record(step: PreparedStep, config: ProbeConfig) -> Step:
    chosen, direction = step.chosen, step.direction
    return Step(
        config.loss,
        config.beta,
        config.optimizer,
        float(chosen.step_size),
        float(chosen.step_size * direction.norm),
        float(chosen.relative_norm),
        direction.gradient_norm,
        direction.value,
        float(chosen.predicted_drop),
        float(chosen.realised_drop),
        int((step.weights_N > 0).sum()),
        int((step.bench.split == "held_out").sum()),
        step.bench.origin_sha256,
    )


def gains(before: tuple, after: tuple, placebo: tuple | None = None) -> dict[str, np.ndarray]:
    """Outcome columns of the token table from the divergences before and after a step.

    Args:
        before: Forward KL (teacher first) and reverse KL before the step, float64 [N] each, nats.
        after: The same after the step.
        placebo: The same after the placebo, where there is one.

    Returns:
        Float64 [N] for each column: forward_kl_after, reverse_kl_after, gain, relative_gain (NaN
        where the forward KL before is under 1e-3 nats), relative_gain_released (no floor),
        reverse_gain; with a placebo also placebo_gain, placebo_relative_gain and
        placebo_reverse_gain.
    """
    columns = {
        "forward_kl_after": after[0],
        "reverse_kl_after": after[1],
        "gain": before[0] - after[0],
        "relative_gain": relative_gain(before[0], after[0]),
        "relative_gain_released": released_relative_gain(before[0], after[0]),
        "reverse_gain": before[1] - after[1],
    }
    if placebo is None:
        return columns
    return columns | {
        "placebo_gain": before[0] - placebo[0],
        "placebo_relative_gain": relative_gain(before[0], placebo[0]),
        "placebo_reverse_gain": before[1] - placebo[1],
    }
