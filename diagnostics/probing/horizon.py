"""What a short trajectory of the real optimizer does, beside the one step: `gain_h<k>`.

    reduction_k = mean over positions of D(theta0) - D(theta_k),    theta_k from `trajectory`

One trajectory of the full loss is taken on the contexts of fold 0, at the training's learning rate.
At each horizon k every frozen position is measured: the contexts that carried loss (`step`) and
those of all other folds (`held_out`). At the last horizon the students also write: `fresh` compares
theta_k on its own new responses with theta0 on its own, to the same prompts and with the same
random numbers. The prompts are those of one held-out fold, since writing costs far more than
measuring.

A horizon is *overfitted* where the held-out reduction has fallen below that of an earlier horizon
while the reduction on the step contexts still grows: the student then learns the frozen responses.

Intervals resample prompts; the trajectory is one (`steps` is 1). Those of `step` would resample the
very prompts that made the trajectory, so they are undefined.

An interrupted stage takes the trajectory again from theta0, since one that continues on a GPU is
not the same to the last bit.

Axes: N positions of the bank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.decision import beyond_best
from diagnostics.contexts.rollouts import resample
from diagnostics.models.topk_teacher import TopKTeacher
from diagnostics.probing.config.trajectory import TrajectoryConfig
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.step import StepBench
from diagnostics.probing.trajectory import full_trajectory

log = logging.getLogger("diagnostics")
STEP_FOLD, FRESH_FOLD = 0, 1
MEASURES = ("forward_kl", "reverse_kl")
OUTCOMES = {"forward_kl": "gain", "reverse_kl": "reverse_gain"}
"""The outcome whose `_h<k>` columns hold each divergence's reduction."""


@dataclass(frozen=True)
class Fresh:
    """Divergences of two students on text of their own, for the same prompts."""

    before: pd.DataFrame
    """One row per position of theta0's text: prompt_id, forward_kl and reverse_kl (nats)."""
    after: pd.DataFrame
    """The same of the moved student's text."""


@dataclass(frozen=True)
class HorizonGains:
    """What a trajectory did."""

    columns: dict[str, np.ndarray]
    """`gain_h<k>` and the like, float64 [N] in nats (see `horizon_gains`)."""
    fresh: Fresh | None
    """New text at the last horizon; None where the teacher cannot grade it."""
    update_norm: float
    """Norm of the distance from theta0 at the last horizon."""


def horizon_gains(
    bench: StepBench,
    before: Sequence[np.ndarray],
    config: TrajectoryConfig,
    *,
    horizon: Sequence[int],
    seed: int,
) -> HorizonGains:
    """Take the trajectory and measure every position at each horizon.

    Args:
        bench: The student at theta0, where it is again afterwards.
        before: Forward and reverse KL at theta0, float64 [N] each, as `bench.rescore` gives them.
        config: The optimizer's steps.
        horizon: Ascending numbers of steps, one at least.
        seed: Seed of the minibatches and of the new text.

    Returns:
        The gains after k steps: gain_h<k> and reverse_gain_h<k> at the positions of other folds,
        own_gain_h<k> and own_reverse_gain_h<k> at those of fold 0, and NaN at all others.

    Raises:
        DiagnosticsError: As `Trajectory.run` does.
    """
    columns: dict[str, np.ndarray] = {}
    on_step_N = bench.folds == STEP_FOLD
    written = _written(bench, seed)
    way = full_trajectory(bench, STEP_FOLD, config, steps=max(horizon), seed=seed)
    fresh, norm = None, np.nan
    for k in way.run(horizon):
        after = bench.rescore(f"horizon {k}")
        for name, was_N, is_N in zip(OUTCOMES.values(), before, after, strict=True):
            columns[f"{name}_h{k}"] = np.where(on_step_N, np.nan, was_N - is_N)
            columns[f"own_{name}_h{k}"] = np.where(on_step_N, was_N - is_N, np.nan)
        if k == max(horizon):
            norm, moved = way.update_norm, _written(bench, seed)
            fresh = Fresh(written, moved) if written is not None and moved is not None else None
    return HorizonGains(columns, fresh, norm)


def _written(bench: StepBench, seed: int) -> pd.DataFrame | None:
    """Divergences on responses of the student as it is now to the prompts of one held-out fold."""
    if isinstance(bench.teacher, TopKTeacher):
        log.warning(
            "new text is left out of the horizons: %s grades frozen responses alone",
            bench.teacher.name,
        )
        return None
    prompts = set(bench.tokens["prompt_id"][bench.folds == FRESH_FOLD])
    contexts = [context for context in bench.bank if context.prompt_id in prompts]
    longest = max(len(context.response_ids) for context in bench.bank)
    new = FrozenBank(bench.pair, resample(bench.pair, contexts, max_new_tokens=longest, seed=seed))
    bench.release_teacher()
    values = dict(zip(MEASURES, new.divergences(), strict=True))
    return pd.DataFrame({"prompt_id": new.prompt_ids, **values})


def horizon_table(
    tokens: pd.DataFrame,
    fresh: Fresh | None,
    *,
    horizon: Sequence[int],
    bootstrap_config: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Mean reductions along the trajectory, by population.

    Args:
        tokens: Token table with the columns of `horizon_gains` and prompt_id.
        fresh: New text at the last horizon, where there is any.
        horizon: The numbers of steps.
        bootstrap_config: Draws, level and seed of the intervals.

    Returns:
        One row per horizon, population and measure, with columns criterion (full), budget (1),
        horizon, population (held_out, step; fresh at the last horizon), measure (forward_kl =
        KL(q||p), reverse_kl = KL(p||q)), reduction, low, high (nats per position; the interval of
        `step` is undefined), overfitted, positions (of both texts for fresh), prompts, steps (1).
    """
    rows = []
    for measure, outcome in OUTCOMES.items():
        held, step = (
            [_mean(tokens, f"{prefix}{outcome}_h{k}", bootstrap_config) for k in horizon]
            for prefix in ("", "own_")
        )
        beyond = beyond_best([one.value for one in held], [one.value for one in step])
        for k, one, other, over in zip(horizon, held, step, beyond, strict=True):
            rows.append(_row(k, "held_out", measure, one, over, bootstrap_config.level))
            rows.append(_row(k, "step", measure, other, over, None))
        if fresh is not None:
            estimate = _fresh_reduction(fresh, measure, bootstrap_config)
            rows.append(
                _row(horizon[-1], "fresh", measure, estimate, beyond[-1], bootstrap_config.level)
            )
    return pd.DataFrame(rows)


def _mean(tokens: pd.DataFrame, name: str, config: Bootstrap) -> Estimate:
    values_N = tokens[name].to_numpy(dtype=np.float64)
    known = np.isfinite(values_N)
    prompts = PromptClusters(tokens["prompt_id"][known], bootstrap=config)
    return bootstrap.mean(values_N[known], prompts)


def _fresh_reduction(fresh: Fresh, measure: str, config: Bootstrap) -> Estimate:
    """Mean of theta0 on its text less that of the moved student on its own, prompts paired."""
    both = pd.concat([fresh.before, fresh.after], ignore_index=True)
    values_N = both[measure].to_numpy(dtype=np.float64)
    moved_N = np.arange(len(both)) >= len(fresh.before)
    known = np.isfinite(values_N)
    prompts = PromptClusters(both["prompt_id"][known], bootstrap=config)
    was_n, is_n = (~moved_N[known]).astype(float), moved_N[known].astype(float)
    sums = prompts.sums(was_n * values_N[known], was_n, is_n * values_N[known], is_n)

    def reduction(sums: np.ndarray) -> np.ndarray:
        before, after = (bootstrap.positive_ratio(sums[..., i], sums[..., i + 1]) for i in (0, 2))
        return (before - after)[..., None]

    return bootstrap.of_sums(reduction, sums, prompts, np.ones(known.sum(), dtype=bool))[0]


def _row(
    k: int, population: str, measure: str, estimate: Estimate, over: bool, level: float | None
) -> dict:
    low, high = (np.nan, np.nan) if level is None else estimate.interval(level)
    return {
        "criterion": "full",
        "budget": 1.0,
        "horizon": k,
        "population": population,
        "measure": measure,
        "reduction": estimate.value,
        "low": low,
        "high": high,
        "overfitted": bool(over),
        "positions": estimate.positions,
        "prompts": estimate.prompts,
        "steps": 1,
    }
