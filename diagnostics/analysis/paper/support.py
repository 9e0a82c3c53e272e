"""Does it matter how support is defined? The released check, with percentile ranks in place of N.

    h, d, ht = rank / N of the untrained student's H, D and of H_T;  c = rank / N of a proxy of the
    *trained* student
    base     = standardized G on h, d, h*d, t/(T - 1), ht
    split    = the same with d*c and d*(1 - c) in place of d and h*d
    gap      = G between the outer quartiles of d*c inside Q3, over the contexts that hold one

Written from the definition of `support_definition_robustness_20260517.py` of the scripts released
with arXiv 2605.26844, in no table of the paper. Departure: its `top1_match` compares the first
elements of two sets of ids and not the likeliest tokens; give the true first choices instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from diagnostics.analysis.paper.bank import (
    KEYS,
    percentile_ranks,
    released_gain,
    require_finite,
    require_measured,
)
from diagnostics.analysis.paper.gap import QUARTILES, ends, gap
from diagnostics.analysis.paper.least_squares import fit
from diagnostics.analysis.rank_correlation import standardize
from diagnostics.criteria import relative_position

DEFINITION_SEED = 17
DEFINITION_DRAWS = 800
READ = (*KEYS, "student_entropy", "forward_kl", "teacher_entropy")


def support_definitions(
    tokens: pd.DataFrame,
    proxies: Mapping[str, np.ndarray],
    *,
    seed: int = DEFINITION_SEED,
    draws: int = DEFINITION_DRAWS,
) -> pd.DataFrame:
    """What the decomposition and the gap become with each definition of support.

    Args:
        tokens: A token table of N rows with a gain.
        proxies: [N] values of the trained student by proxy.
        seed: Seed of the draws, anew for each proxy.
        draws: Number of draws.

    Returns:
        Columns proxy, proxy_mean, proxy_sd (population), r_squared (of the base model),
        r_squared_gained, teachability, incompatible (standardized coefficients of d*c and
        d*(1 - c)), gap, low, high, bottom, top (numbers of positions); gaps as fractions.

    Raises:
        DiagnosticsError: A column is missing, or not finite at every position.
    """
    require_measured(tokens, list(READ))
    measured = {name: tokens[name].to_numpy(np.float64) for name in READ[3:]}
    gain = released_gain(tokens)
    given = {name: np.asarray(values, dtype=np.float64) for name, values in proxies.items()}
    for name, column in {"the gain": gain, **measured, **given}.items():
        require_finite(name, column)
    h, d, ht = (percentile_ranks(column) for column in measured.values())
    place = relative_position(tokens)
    y = standardize(gain)
    base = fit(y, [standardize(column) for column in (h, d, h * d, place, ht)]).r_squared
    q3 = (h <= np.median(h)) & (d >= np.median(d))
    context = tokens["context_id"].to_numpy()[q3]
    rows = []
    for name, raw in given.items():
        c = percentile_ranks(raw)
        split = fit(y, [standardize(column) for column in (h, d * c, d * (1 - c), place, ht)])
        rng = np.random.default_rng(seed)
        rows.append(
            {
                "proxy": name,
                "proxy_mean": raw.mean(),
                "proxy_sd": raw.std(),
                "r_squared": base,
                "r_squared_gained": split.r_squared - base,
                "teachability": split.coefficients[1],
                "incompatible": split.coefficients[2],
                **_outer_gap(gain[q3], context, (d * c)[q3], rng, draws),
            }
        )
    return pd.DataFrame(rows)


def _outer_gap(
    gain: np.ndarray, context: np.ndarray, score: np.ndarray, rng: np.random.Generator, draws: int
) -> dict:
    """Gap between the outer quartiles of a score, over the contexts that hold one of either."""
    groups = ends(score, QUARTILES)
    outer = groups[0] | groups[1]
    inside = groups[0][outer], groups[1][outer]
    found = gap(gain[outer], context[outer], inside, rng=rng, draws=draws)
    return {
        "gap": found.estimate,
        "low": found.low,
        "high": found.high,
        "bottom": found.bottom,
        "top": found.top,
    }
