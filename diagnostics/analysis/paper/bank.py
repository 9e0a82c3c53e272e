"""The token table as the released analysis scripts see it: scaled columns, their gain, and Q3.

    H, D, C, H_T   student_entropy, forward_kl, compatibility, teacher_entropy; by a script's choice
                   H and C are the untrained or the trained student's
    h, d, c, ht    N(H), N(D), N(C), N(H_T), or percentile ranks
    G              (D - D') / (D + 1e-12): relative to D, and without a floor
    Q3             h <= its median and d >= its median, both inclusive

Written from the definitions of the scripts released with arXiv 2605.26844, whose numbers the tests
of this package compute again. Departures: none that is meant; a position at which a column that a
script reads is not finite is left out and counted, where the scripts set it to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from diagnostics.analysis.robustness import BASE_K, known_k
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import released_relative_gain
from diagnostics.core.schema import AFTER, support_column
from diagnostics.criteria import HIGH_QUANTILE, LOW_QUANTILE, normalize, relative_position

log = logging.getLogger("diagnostics")
When = Literal["before", "after"]
"""Whose measurement is read: the untrained student's, or the trained one's."""
AFTER_DIVERGENCE = "forward_kl" + AFTER
KEYS = ("context_id", "position", "response_length")
OF_PROBE = ("fold", "split", "gain_permuted")
"""Columns that a table has only where its gains are a probe's, and not a checkpoint's."""
NARROW = 1e-12
"""Distance of the two quantiles of N under which the scripts set a whole column to 0."""


def scaled(values) -> np.ndarray:
    """N(z) as the scripts compute it.

    Args:
        values: [N] finite values of a whole table, or of a region of one; any unit.

    Returns:
        float64 [N] in [0, 1]; all 0 where the 5 % and the 95 % quantile are less than 1e-12 apart.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or np.ptp(np.quantile(values, [LOW_QUANTILE, HIGH_QUANTILE])) < NARROW:
        return np.zeros(len(values))
    return normalize(values)


def percentile_ranks(values) -> np.ndarray:
    """Rank over N of each of N finite values, in (0, 1]; equal values share their mean rank."""
    return pd.Series(np.asarray(values, dtype=np.float64)).rank(pct=True).to_numpy()


def soft_or(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b - a*b [N] as the scripts round it.

    It is 1 only up to rounding where a or b is 1, and in the scripts that rounding decides ties;
    `criteria.soft_or` is exact there.
    """
    return a + b - a * b


def column_at(tokens: pd.DataFrame, name: str, k: int | None = None, when: When = "before") -> str:
    """Name of a measurement in a token table, at a support and before or after training.

    Args:
        tokens: The table. Its columns without a suffix belong to the K that it states or shows, and
            to 16 where it does neither.
        name: The measurement, such as `compatibility`.
        k: The K that is asked for; None means the table's own.
        when: `before` training, or `after`.

    Returns:
        The column, which the table need not have.
    """
    own = k is None or k == (known_k(tokens) or BASE_K)
    return support_column(name + (AFTER if when == "after" else ""), None if own else k)


@dataclass(frozen=True)
class ScriptTable:
    """N positions as a released script sees them.

    Attributes:
        rows: [N] row numbers of the positions in the token table.
        context: [N] number of each position's context, in order of appearance.
        gain: [N] relative gain G, a fraction.
        entropy: [N] h, in [0, 1].
        divergence: [N] d, in [0, 1].
        compatibility: [N] c, in [0, 1].
        teacher_entropy: [N] ht, in [0, 1].
        position: [N] relative position t/(T - 1).
        dropped: Number of positions that are left out because a column is not finite there.
    """

    rows: np.ndarray
    context: np.ndarray
    gain: np.ndarray
    entropy: np.ndarray
    divergence: np.ndarray
    compatibility: np.ndarray
    teacher_entropy: np.ndarray
    position: np.ndarray
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.gain)

    @cached_property
    def in_q3(self) -> np.ndarray:
        """Mask [N] of the confident and wrong positions."""
        h, d = self.entropy, self.divergence
        return (h <= np.median(h)) & (d >= np.median(d))

    @cached_property
    def contexts(self) -> int:
        """Number of contexts."""
        return len(np.unique(self.context))

    def score(self, name: str) -> np.ndarray:
        """Score [N] of a selector, by the name of its criterion (`SCORES`)."""
        if name not in SCORES:
            raise DiagnosticsError(
                f"The released scripts have no score {name!r}. Take one of {', '.join(SCORES)}."
            )
        return SCORES[name](self)


def _teachability(table: ScriptTable) -> np.ndarray:
    return table.divergence * table.compatibility


SCORES: dict[str, Callable[[ScriptTable], np.ndarray]] = {
    "teachability": _teachability,
    "divergence": lambda table: table.divergence,
    "tip": lambda table: soft_or(table.entropy, table.divergence),
    "teachability_entropy": lambda table: soft_or(table.entropy, _teachability(table)),
    "entropy": lambda table: table.entropy,
    "compatibility": lambda table: table.compatibility,
    "incompatible": lambda table: table.divergence * (1 - table.compatibility),
    "q3_compatibility": lambda table: 2.0 * table.in_q3 + table.compatibility,
    "q3_teachability_first": lambda table: 2.0 * table.in_q3 + _teachability(table),
    "q3_divergence": lambda table: 2.0 * table.in_q3 + table.divergence,
}
"""Scores by criterion. The last three put Q3 first and then fill up from outside, as the scripts'
exact selections do; the masks of the training code stay inside Q3."""


def script_table(
    tokens: pd.DataFrame,
    *,
    entropy: When = "before",
    compatibility: When = "before",
    k: int | None = None,
    proxy: str = "compatibility",
    scale: Callable[[np.ndarray], np.ndarray] = scaled,
) -> ScriptTable:
    """See a token table as a released script does.

    Args:
        tokens: A token table with `student_entropy`, `teacher_entropy`, `forward_kl`, the keys, a
            gain (see `released_gain`) and what the options ask for.
        entropy: Whose entropy H is: `after` reads `student_entropy_after`.
        compatibility: Whose C is: `after` reads `compatibility_after`.
        k: The K of C; None means the table's own.
        proxy: The column that stands in for C, without its suffixes.
        scale: How columns are brought to [0, 1].

    Returns:
        The positions at which every column is finite.

    Raises:
        DiagnosticsError: A column is missing, or no position has all of them.
    """
    columns = {
        "entropy": column_at(tokens, "student_entropy", when=entropy),
        "divergence": "forward_kl",
        "compatibility": column_at(tokens, proxy, k, compatibility),
        "teacher_entropy": "teacher_entropy",
    }
    require_measured(tokens, [*columns.values(), *KEYS])
    gain = released_gain(tokens)
    values = {name: tokens[column].to_numpy(np.float64) for name, column in columns.items()}
    finite = np.isfinite([gain, *values.values()]).all(axis=0)
    if not finite.any():
        raise DiagnosticsError(
            f"None of the {len(tokens)} positions has all of {', '.join(columns.values())} and a"
            " gain. Score the positions again, before and after training."
        )
    if dropped := int((~finite).sum()):
        log.info("%d positions lack a column of the released scripts and are left out", dropped)
    return ScriptTable(
        rows=np.flatnonzero(finite),
        context=pd.factorize(tokens["context_id"][finite])[0],
        gain=gain[finite],
        position=relative_position(tokens)[finite],
        dropped=dropped,
        **{name: scale(column[finite]) for name, column in values.items()},
    )


def released_gain(tokens: pd.DataFrame) -> np.ndarray:
    """G of each position: (D - D') / (D + 1e-12), a fraction [N].

    Args:
        tokens: A token table with `relative_gain_released`, which an import has as its file has it,
            or with `forward_kl` and `forward_kl_after` in nats. The latter are read where the
            table's gains are a probe's, which `fold`, `split` and `gain_permuted` show.

    Raises:
        DiagnosticsError: The table has neither.
    """
    if "relative_gain_released" in tokens and not set(OF_PROBE) & set(tokens):
        return tokens["relative_gain_released"].to_numpy(np.float64)
    require_measured(tokens, ["forward_kl", AFTER_DIVERGENCE])
    before, after = (tokens[name].to_numpy(np.float64) for name in ("forward_kl", AFTER_DIVERGENCE))
    return released_relative_gain(before, after)


def require_finite(name: str, values: np.ndarray) -> None:
    """Raise DiagnosticsError where a column [N] has a value that is not finite."""
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise DiagnosticsError(
            f"{name} is not finite at {wrong} of {len(values)} positions, where the released"
            " scripts would read a number. Drop those positions, or measure them again."
        )


def require_measured(tokens: pd.DataFrame, columns: list[str]) -> None:
    """Raise DiagnosticsError where a table lacks a column, with the command that writes it."""
    missing = [name for name in columns if name not in tokens]
    if not missing:
        return
    after = any(name.endswith(AFTER) for name in missing)
    remedy = (
        "Score the contexts with the trained student: opd-diagnostics score --after CHECKPOINT, or"
        " import the files from before and after training together."
        if after
        else "Score the contexts, with --sweep for another K."
    )
    raise DiagnosticsError(
        f"A statistic of the released scripts needs {', '.join(missing)}, and the table has"
        f" {', '.join(map(str, tokens.columns[:40])) or 'no column'}. {remedy}"
    )
