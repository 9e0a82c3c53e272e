"""Tables of an attribution: how linear the step is, which part gains come from, which group lifts.

A token table or a kernel table goes in, and one row per group with prompt-bootstrap intervals comes
out. `attribution` explains the quantities.

Axes: N positions of the bank.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.probing.folds import folds_of
from diagnostics.probing.tracer import PARTS

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
        tokens: Token table with first_order_gain, prompt_id and fold (fold 0 carried the loss) or
            the split of a single step.
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
    rows, on_step = [], _on_step(tokens)
    everywhere = np.ones(len(tokens), dtype=bool)
    for fraction, gain_N in realized.items():
        for name, mask in (("all", everywhere), ("step", on_step), ("held_out", ~on_step)):
            predicted_N = fraction * tokens["first_order_gain"].to_numpy(dtype=np.float64)
            mask = mask & np.isfinite(predicted_N) & np.isfinite(gain_N)
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


def _on_step(tokens: pd.DataFrame) -> np.ndarray:
    """Mask [N] of the positions of the fold whose step is attributed."""
    folds = folds_of(tokens)
    assert folds is not None, "attribution records the folds"
    return folds == 0


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
        tokens: Token table with fold or split, as in `linearity`, one row per position.
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
    on_step = _on_step(tokens)
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
