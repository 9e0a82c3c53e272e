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
READ = (
    "context_id",
    "position",
    "response_length",
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
)


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
    h, d, ht = (
        percentile_ranks(tokens[name])
        for name in ("student_entropy", "forward_kl", "teacher_entropy")
    )
    gain, place = released_gain(tokens), relative_position(tokens)
    for name, values in {"the gain": gain, **{name: tokens[name] for name in READ[3:]}}.items():
        require_finite(name, np.asarray(values, dtype=np.float64))
    y = standardize(gain)
    base = fit(y, [standardize(column) for column in (h, d, h * d, place, ht)]).r_squared
    q3 = (h <= np.median(h)) & (d >= np.median(d))
    context = tokens["context_id"].to_numpy()[q3]
    rows = []
    for name, values in proxies.items():
        raw = np.asarray(values, dtype=np.float64)
        require_finite(name, raw)
        c = percentile_ranks(raw)
        split = fit(y, [standardize(column) for column in (h, d * c, d * (1 - c), place, ht)])
        bottom, top = ends((d * c)[q3], QUARTILES)
        outer = bottom | top
        rng = np.random.default_rng(seed)
        groups = bottom[outer], top[outer]
        found = gap(gain[q3][outer], context[outer], groups, rng=rng, draws=draws)
        rows.append(
            {
                "proxy": name,
                "proxy_mean": raw.mean(),
                "proxy_sd": raw.std(),
                "r_squared": base,
                "r_squared_gained": split.r_squared - base,
                "teachability": split.coefficients[1],
                "incompatible": split.coefficients[2],
                "gap": found.estimate,
                "low": found.low,
                "high": found.high,
                "bottom": found.bottom,
                "top": found.top,
            }
        )
    return pd.DataFrame(rows)
