"""The schema of the token table: every column's meaning, unit and stage, and the checks of a
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diagnostics.core.errors import DiagnosticsError

if TYPE_CHECKING:
    import pandas as pd

Stage = Literal["key", "before", "after", "outcome"]
Listed = Literal["exact", "lower bound", "where listed", "impossible", "change of a bound"]


@dataclass(frozen=True)
class Column:
    """One column of the token table."""

    name: str
    dtype: str
    unit: str
    stage: Stage
    """*key* names the row; *before* was measured with theta0 and may predict; *after* was measured
    with another student and may not; *outcome* is what is predicted."""
    meaning: str
    by_support: bool = False
    """True where the value depends on K; other K are stored as `<name>_k<K>`."""
    listed: Listed = "exact"
    """What the value is with a teacher that is known by lists of its likeliest tokens alone
    (`remote`): *exact*; a *lower bound*; exact *where listed* and NaN elsewhere; *impossible*; or,
    of an outcome, the exact *change of a bound*."""


def _columns(
    stage: Stage, dtype: str, *rows: tuple[str, str, str], by_support: bool = False
) -> list[Column]:
    return [Column(name, dtype, unit, stage, meaning, by_support) for name, unit, meaning in rows]


SCHEMA: dict[str, Column] = {
    column.name: column
    for column in [
        *_columns(
            "key",
            "string",
            ("context_id", "", "context that the position belongs to"),
            ("prompt_id", "", "prompt of the context; the cluster of every interval"),
            ("token", "", "the sampled token as text"),
            ("split", "", "`step`: its context carried the step's loss; `held_out`: it did not"),
        ),
        *_columns(
            "key",
            "int32",
            ("position", "tokens", "index of the response token, from 0"),
            ("response_length", "tokens", "number of response positions of the context"),
            ("token_id", "", "id of the sampled token y"),
        ),
        *_columns("key", "bool", ("is_special", "", "y is a special token of the tokenizer")),
        *_columns(
            "before",
            "float64",
            ("student_entropy", "nats", "H(p)"),
            ("teacher_entropy", "nats", "H(q)"),
            ("forward_kl", "nats", "KL(q||p), teacher first"),
            ("reverse_kl", "nats", "KL(p||q), student first"),
            ("js", "nats", "Jensen-Shannon divergence, at most ln 2"),
            (
                "hellinger",
                "",
                "Hellinger distance sqrt(1 - sum sqrt(p q)) over the whole vocabulary",
            ),
            ("student_logprob", "nats", "ln p(y)"),
            ("teacher_logprob", "nats", "ln q(y)"),
            ("advantage", "nats", "ln q(y) - ln p(y)"),
            ("acceptance", "probability", "min(1, q(y)/p(y))"),
            (
                "student_margin",
                "probability",
                "p of the student's first choice minus p of its second",
            ),
            ("student_dropped_mass", "probability", "student mass outside the shared vocabulary"),
            ("teacher_dropped_mass", "probability", "teacher mass outside the shared vocabulary"),
            (
                "teacher_tail_mass",
                "probability",
                "teacher mass outside its list, where it is known by lists alone",
            ),
        ),
        *_columns(
            "before",
            "float64",
            ("compatibility", "probability", "teacher mass on the student's top K"),
            (
                "compatibility_intersection",
                "probability",
                "teacher mass on the tokens in both top-K lists",
            ),
            ("topk_overlap", "fraction", "share of the K that both lists hold"),
            ("topk_jaccard", "fraction", "tokens in both lists over tokens in either"),
            ("shared_student_mass", "probability", "student mass on the tokens in both lists"),
            ("bhattacharyya", "", "sum over U of sqrt(p q), both renormalised on U"),
            ("union_forward_kl", "nats", "KL(q||p) with both renormalised on U"),
            (
                "union_forward_kl_released",
                "nats",
                (
                    "the same as the released training code computes it: each "
                    "model's probability outside its own list is zero, floored at 1e-12"
                ),
            ),
            (
                "union_log_ratio_variance",
                "nats^2",
                "variance under p renormalised on U of ln q - ln p",
            ),
            by_support=True,
        ),
        *_columns(
            "before",
            "bool",
            ("teacher_top1_in_topk", "", "the teacher's first choice is in the student's top K"),
            ("sampled_in_teacher_topk", "", "y is in the teacher's top K"),
            by_support=True,
        ),
        *_columns(
            "before",
            "bool",
            ("top1_match", "", "both models have the same first choice"),
            (
                "student_top1_in_teacher_top5",
                "",
                "the student's first choice is in the teacher's top 5",
            ),
        ),
        *_columns(
            "after",
            "float64",
            ("forward_kl_after", "nats", "KL(q||p) with the updated student"),
            ("reverse_kl_after", "nats", "KL(p||q) with the updated student"),
        ),
        *_columns(
            "outcome",
            "float64",
            ("gain", "nats", "forward_kl before minus after"),
            (
                "relative_gain",
                "fraction",
                "gain over forward_kl before; NaN where that is under 1e-3 nats",
            ),
            (
                "relative_gain_released",
                "fraction",
                "gain over (forward_kl before + 1e-12), no floor",
            ),
            ("reverse_gain", "nats", "reverse_kl before minus after"),
            ("placebo_gain", "nats", "gain after a random step of the same norm"),
            ("placebo_relative_gain", "fraction", "relative_gain after that random step"),
            ("placebo_reverse_gain", "nats", "reverse_gain after that random step"),
            ("first_order_gain", "nats", "gain predicted by the derivative along the step"),
            (
                "lift",
                "nats",
                (
                    "what the position's own loss adds, to first order, to the mean gain of the"
                    " held-out positions"
                ),
            ),
        ),
    ]
}
"""Every column that a token table may hold, in the order in which it is written."""
KEYS = ("context_id", "prompt_id", "position", "response_length", "token_id", "token")
"""Columns that every token table has."""


def column(name: str) -> Column | None:
    """Schema of a column, also for `<name>_k<K>` and for an outcome after n steps of training,
    `<name>_step_<n>`.

    None where the name is not the instrument's own.
    """
    base, _, k = name.rpartition("_k")
    if base in SCHEMA and SCHEMA[base].by_support and k.isdigit():
        return SCHEMA[base]
    base, _, step = name.rpartition("_step_")
    if base in SCHEMA and SCHEMA[base].stage == "outcome" and step.isdigit():
        return SCHEMA[base]
    return SCHEMA.get(name)


def support_column(name: str, k: int | None) -> str:
    """Name of a support-dependent column for another K: `compatibility`, 8 ->
    `compatibility_k8`.
    """
    return name if k is None else f"{name}_k{k}"


def require_columns(frame: pd.DataFrame, names: Iterable[str], *, what: str) -> None:
    """Raise DiagnosticsError where `frame` lacks one of the columns."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise DiagnosticsError(
            f"{what} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; this one has"
            f" {', '.join(map(str, frame.columns[:40])) or 'none'}. Write the missing ones, or run"
            " the stage that does."
        )


def validate_tokens(tokens: pd.DataFrame) -> pd.DataFrame:
    """Check a token table against the schema and return it with the schema's dtypes and order.

    Unknown columns are kept, last. Raises DiagnosticsError for a missing key, a column that cannot
    take its dtype, or a position that appears twice."""
    require_columns(tokens, KEYS, what="a token table")
    known = [name for name in tokens.columns if column(name)]
    order = sorted(known, key=_place)
    tokens = tokens[order + [name for name in tokens.columns if name not in known]].copy()
    for name in known:
        tokens[name] = _cast(tokens[name], column(name).dtype)
    twice = tokens.duplicated(["context_id", "position"])
    if twice.any():
        row = tokens[twice].iloc[0]
        raise DiagnosticsError(
            f"Position {row.position} of context {row.context_id!r} appears more than once. "
            "A token table has one row a response position; drop the repeats."
        )
    return tokens.reset_index(drop=True)


def _place(name: str) -> tuple[int, int]:
    """Schema order; the run's own K first, then other K, or later steps, from small to large."""
    base = column(name).name
    return list(SCHEMA).index(base), (
        0 if name == base else int(name.rpartition("_")[2].removeprefix("k"))
    )


def _cast(values: pd.Series, dtype: str) -> pd.Series:
    try:
        return values.astype("str" if dtype == "string" else dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise DiagnosticsError(
            f"Column {values.name} should hold {dtype}, and holds {values.dtype} ({error}). Mend"
            " the file that it came from."
        ) from error


def read_parquet(path: str | Path, **options) -> pd.DataFrame:
    """Read one parquet file. options: as pandas takes them. Raises DiagnosticsError where it is
    missing, damaged, or holds more than it can (`bounds`).
    """
    import pandas as pd
    import pyarrow as pa

    from diagnostics.core.limits import check_parquet

    try:
        check_parquet(path)
        return pd.read_parquet(path, **options)
    except (
        OSError,
        KeyError,
        ValueError,
        pa.ArrowException,
    ) as error:  # a damaged file fails in its pages or in pandas' own notes
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DiagnosticsError(
            f"{path} cannot be read as parquet ({reason}). Check the path, or run the stage that"
            " writes it again."
        ) from error


def read_tokens(path: str | Path) -> pd.DataFrame:
    """Read and validate a `tokens.parquet` that this project wrote."""
    return validate_tokens(read_parquet(path))
