"""The schema of the token table: meaning, unit and stage of every column, and a table's checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import require_as_written
from diagnostics.core.names import meant

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
    """What the value is with a top-K teacher, known by its most likely tokens alone
    (`topk_teacher`): *exact*; a *lower bound*; exact *where listed* and NaN in all other places;
    *impossible*; or, for an outcome, the exact *change of a bound*."""
    imported: bool = False
    """True for a column that only tables of other programs have."""
    on_request: str = ""
    """What to ask `score --extra` for, where the column is measured on request alone."""


def _columns(
    stage: Stage,
    dtype: str,
    *rows: tuple[str, str, str],
    by_support: bool = False,
    imported: bool = False,
    on_request: str = "",
) -> list[Column]:
    return [
        Column(
            name,
            dtype,
            unit,
            stage,
            meaning,
            by_support,
            imported=imported,
            on_request=on_request,
        )
        for name, unit, meaning in rows
    ]


SCHEMA: dict[str, Column] = {
    column.name: column
    for column in [
        *_columns(
            "key",
            "string",
            ("context_id", "", "context that the position belongs to"),
            ("prompt_id", "", "prompt of the context; the cluster of every interval"),
            ("token", "", "the sampled token as text"),
            (
                "split",
                "",
                "where there was one step: `step` (its context carried the loss) or `held_out`",
            ),
        ),
        *_columns(
            "key",
            "int32",
            ("position", "tokens", "index of the response token among the positions, from 0"),
            ("response_length", "tokens", "number of response positions of the context"),
            ("token_id", "", "id of the sampled token y"),
            ("fold", "", "fold of the prompt, from 0; one step was taken on each fold"),
            (
                "response_index",
                "tokens",
                (
                    "index of the token in the whole response, tool output included; only where"
                    " some response tokens are no positions"
                ),
            ),
        ),
        *_columns(
            "key",
            "bool",
            ("is_special", "", "y is a special token of the tokenizer"),
            (
                "seen",
                "",
                (
                    "the checkpoint of the columns `_after` was trained on the position's prompt;"
                    " absent where that is unknown"
                ),
            ),
        ),
        *_columns(
            "key",
            "float64",
            (
                "correct",
                "",
                (
                    "1 where the context's response is right, 0 where it is wrong, NaN where it was"
                    " not judged; absent where none was"
                ),
            ),
        ),
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
            (
                "student_dropped_mass",
                "probability",
                (
                    "student mass outside the shared vocabulary, and on ids that are other special"
                    " tokens for the teacher"
                ),
            ),
            ("teacher_dropped_mass", "probability", "teacher mass there"),
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
            "float64",
            (
                "ier_signal",
                "nats^2",
                (
                    "Var_p rho of the sampled-token gradient over S, T and y, as `ier` has it;"
                    " measured by `score --extra ier`"
                ),
            ),
            (
                "ier_noise",
                "nats^2",
                "E_p[(rho - b)^2 (1 - p)/p] - Var_p rho there; measured by `score --extra ier`",
            ),
            by_support=True,
            on_request="ier",
        ),
        *_columns(
            "before",
            "float64",
            ("ier_full_signal", "nats^2", "ier_signal over the whole vocabulary"),
            ("ier_full_noise", "nats^2", "ier_noise over the whole vocabulary"),
            on_request="ier",
        ),
        *_columns(
            "before",
            "float64",
            (
                "teacher_top1_gap",
                "probability",
                (
                    "q(a) - p(a) of the teacher's first choice a; measured by `score --extra"
                    " teacher_top1_gap`"
                ),
            ),
            on_request="teacher_top1_gap",
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
            "before",
            "float64",
            ("union_reverse_kl", "nats", "KL(p||q) with both renormalised on U"),
            (
                "union_reverse_kl_released",
                "nats",
                "the same with the floor of union_forward_kl_released",
            ),
            ("bhattacharyya_released", "", "bhattacharyya with that floor; no stand-in for it"),
            (
                "student_entropy_topk",
                "nats",
                "entropy of the student's own top K, renormalised; at most ln K",
            ),
            (
                "teacher_entropy_topk",
                "nats",
                "entropy of the teacher's own top K, renormalised; at most ln K",
            ),
            ("student_topk_mass", "probability", "student mass on its own top K"),
            ("teacher_topk_mass", "probability", "teacher mass on its own top K"),
            by_support=True,
            imported=True,
        ),
        *_columns(
            "before",
            "bool",
            ("sampled_in_topk", "", "y is in the student's top K"),
            by_support=True,
            imported=True,
        ),
        *_columns(
            "before",
            "float64",
            (
                "student_entropy_normalized",
                "",
                "entropy as a released table has it, scaled and clipped to [0, 1]",
            ),
            (
                "divergence_normalized",
                "",
                (
                    "divergence as a released table has it, scaled and clipped to [0, 1]: of the"
                    " whole vocabulary in section3_analysis_tokens, of the floored union in a"
                    " training bank"
                ),
            ),
            (
                "compatibility_normalized",
                "",
                "compatibility as a released table has it, scaled and clipped to [0, 1]",
            ),
            imported=True,
        ),
        *_columns(
            "before",
            "bool",
            ("in_q3_released", "", "the released program put the position into Q3"),
            ("kept_released", "", "the released training kept the position in its loss"),
            imported=True,
        ),
        *_columns(
            "after",
            "float64",
            (
                "forward_kl_after",
                "nats",
                (
                    "KL(q||p) with the updated student: the checkpoint of `score --after`, or else"
                    " the mean over the probe's steps on other folds"
                ),
            ),
            ("reverse_kl_after", "nats", "KL(p||q) with the updated student, likewise"),
            ("student_entropy_after", "nats", "H(p) with the checkpoint"),
        ),
        *_columns(
            "after",
            "float64",
            (
                "compatibility_after",
                "probability",
                "teacher mass on the checkpoint's top K; other K are `compatibility_k<K>_after`",
            ),
            by_support=True,
        ),
        *_columns(
            "outcome",
            "float64",
            (
                "gain",
                "nats",
                "forward_kl before minus after; with folds, the mean over the steps on other folds",
            ),
            ("gain_sd", "nats", "standard deviation of the gain over the steps on other folds"),
            ("own_gain", "nats", "gain after the step on the position's own fold"),
            (
                "gain_permuted",
                "nats",
                "gain (towards the true teacher) after a step towards a permuted teacher",
            ),
            ("own_gain_permuted", "nats", "the same after the step on the position's own fold"),
            ("context_gain", "nats", "gain minus gain_permuted"),
            ("own_context_gain", "nats", "own_gain minus own_gain_permuted"),
            *(
                (prefix + name + null, "nats", f"{prefix + name}, permuted within {words}")
                for null, words in (("_divergence", "deciles of D"), ("_token_type", "token types"))
                for name in ("gain_permuted", "context_gain")
                for prefix in ("", "own_")
            ),
            (
                "relative_gain",
                "fraction",
                "gain over forward_kl before; NaN where that is under 1e-3 nats",
            ),
            ("own_relative_gain", "fraction", "own_gain over forward_kl before, with that floor"),
            (
                "relative_gain_released",
                "fraction",
                "gain over (forward_kl before + 1e-12), no floor",
            ),
            ("reverse_gain", "nats", "reverse_kl before minus after, as gain"),
            ("own_reverse_gain", "nats", "the same after the step on the position's own fold"),
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
        *_columns(
            "before",
            "float64",
            (
                "token_identity_gain",
                "nats",
                (
                    "mean gain of the same token at positions of other folds, after steps on"
                    " neither fold"
                ),
            ),
        ),
    ]
}
"""Every column that a token table may hold, in the order in which it is written."""
_LISTED: dict[Listed, tuple[str, ...]] = {
    "lower bound": (
        "teacher_entropy",
        "forward_kl",
        "reverse_kl",
        "js",
        "hellinger",
        "compatibility",
        "forward_kl_after",
        "reverse_kl_after",
        "compatibility_after",
    ),
    "where listed": (
        "teacher_logprob",
        "advantage",
        "acceptance",
        "bhattacharyya",
        "union_forward_kl",
        "union_log_ratio_variance",
    ),
    "impossible": (
        "teacher_dropped_mass",
        "ier_signal",
        "ier_noise",
        "ier_full_signal",
        "ier_full_noise",
        "teacher_top1_gap",
    ),
    "change of a bound": tuple(name for name, entry in SCHEMA.items() if entry.stage == "outcome"),
}
SCHEMA |= {
    name: replace(SCHEMA[name], listed=status)
    for status, names in _LISTED.items()
    for name in names
}
KEYS = ("context_id", "prompt_id", "position", "response_length", "token_id", "token")
"""Columns that every token table has."""
SHOWN_COLUMNS = 12
"""Columns of a table that an error names; a token table has about seventy."""


_VARIANT = re.compile(r"(?P<base>\w+)_(?P<kind>k|fold|h|step_)(?P<number>\d+)")
"""A column of another support, of one fold's step, or after a number of optimizer steps."""
AFTER = "_after"
"""Ending of a measurement that was taken again with an updated student."""


def column(name: str) -> Column | None:
    """Schema entry of a column name.

    `<name>_k<K>` (another support), and of outcomes `<name>_fold<f>` (after one fold's step),
    `<name>_h<k>` (after k optimizer steps on the frozen contexts) and `<name>_step_<n>` (after n
    steps of training) have the entry of `<name>`. Any measurement from before the step may have a
    counterpart `<name>_after`, and at another support `<name>_k<K>_after`. Returns None for a
    column that this program does not define.
    """
    if name.endswith(AFTER) and name not in SCHEMA:
        return _after(column(name.removesuffix(AFTER)))
    found = _VARIANT.fullmatch(name)
    base = SCHEMA.get(found["base"]) if found else None
    if found and base and (base.by_support if found["kind"] == "k" else base.stage == "outcome"):
        return base
    return SCHEMA.get(name)


def _after(before: Column | None) -> Column | None:
    """The entry of a measurement that was taken again with an updated student."""
    if before is None or before.stage != "before":
        return None
    name = before.name + AFTER
    meaning = f"{before.meaning}; with the updated student"
    return SCHEMA.get(name) or replace(before, name=name, stage="after", meaning=meaning)


def support_column(name: str, k: int | None) -> str:
    """Name of a support-dependent column at K.

    `compatibility`, 8 gives `compatibility_k8`; `compatibility_after`, 8 `compatibility_k8_after`.
    """
    if k is None:
        return name
    base = name.removesuffix(AFTER)
    return f"{base}_k{k}{name[len(base) :]}"


def require_columns(frame: pd.DataFrame, names: Iterable[str], *, what: str) -> None:
    """Raise DiagnosticsError where a table lacks a column.

    Args:
        frame: The table.
        names: Columns that it needs.
        what: What needs them, as the subject of the error's sentence.
    """
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise DiagnosticsError(
            f"{what} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; this one has"
            f" {listed(list(map(str, frame.columns)), missing)}. Write the missing ones, or run"
            " the stage that does."
        )


def listed(columns: list[str], missing: list[str]) -> str:
    """The columns of a table, in short, with those that the missing ones may be a spelling of."""
    near = [name for word in missing if (name := meant(str(word), columns))]
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (", ".join(columns[:SHOWN_COLUMNS]) or "none") + more + hint


def validate_tokens(tokens: pd.DataFrame) -> pd.DataFrame:
    """Check a token table against the schema.

    Args:
        tokens: One row per response position, with the columns of `KEYS` at least.

    Returns:
        A copy with the schema's dtypes and column order; unknown columns are kept and come last.

    Raises:
        DiagnosticsError: A key column is missing, a column cannot take its dtype, or a position
            appears twice.
    """
    require_columns(tokens, KEYS, what="a token table")
    known = {name: entry for name in tokens.columns if (entry := column(name)) is not None}
    order = sorted(known, key=lambda name: _place(name, known[name]))
    tokens = tokens[order + [name for name in tokens.columns if name not in known]].copy()
    for name, entry in known.items():
        tokens[name] = _cast(tokens[name], entry.dtype)
    twice = tokens.duplicated(["context_id", "position"])
    if twice.any():
        row = tokens[twice].iloc[0]
        raise DiagnosticsError(
            f"Position {row.position} of context {row.context_id!r} appears more than once. "
            "A token table has one row per response position; drop the repeats."
        )
    # copied once more, which joins the columns that were cast one by one
    return tokens.reset_index(drop=True).copy()


def _place(name: str, entry: Column) -> tuple[int, int]:
    """Schema order; the run's own K first, then other K or later steps, from small to large."""
    own = name == entry.name
    found = _VARIANT.fullmatch(name.removesuffix(AFTER) if entry.stage == "after" else name)
    variant = 0 if own or found is None else 1 + int(found["number"])
    return _order(entry), variant


def _order(entry: Column) -> int:
    """The column's place in the schema. A measurement without an entry of its own that was taken
    again stands behind those that have one, in the order of the measurements.
    """
    names = list(SCHEMA)
    if entry.name in SCHEMA:
        return names.index(entry.name)
    return len(names) + names.index(entry.name.removesuffix(AFTER))


def _cast(values: pd.Series, dtype: str) -> pd.Series:
    try:
        return values.astype("str" if dtype == "string" else dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise DiagnosticsError(
            f"Column {values.name} should hold {dtype}, and holds {values.dtype} ({error}). Fix"
            " the file that it came from."
        ) from error


def read_parquet(path: str | Path, **options) -> pd.DataFrame:
    """Read one parquet file.

    Args:
        path: The file.
        options: Further arguments of `pandas.read_parquet`.

    Raises:
        DiagnosticsError: The file is missing or damaged, or its table would not fit the memory
            (`core.limits`).
    """
    import pandas as pd

    with _readable(path):
        return pd.read_parquet(path, **options)


def read_parquet_parts(path: str | Path) -> Iterator[pd.DataFrame]:
    """Read one parquet file a row group at a time.

    Args:
        path: The file, as `tables.write_parquet_parts` or another writer made it.

    Yields:
        The table's rows in order. The table's attributes are on every part.

    Raises:
        DiagnosticsError: As `read_parquet`.
    """
    import pyarrow.parquet as pq

    with _readable(path), pq.ParquetFile(path) as file:
        attributes = (file.schema_arrow.metadata or {}).get(b"PANDAS_ATTRS")
        for number in range(file.num_row_groups):
            part = file.read_row_group(number).to_pandas()
            part.attrs = json.loads(attributes) if attributes else {}
            yield part


def parquet_columns(path: str | Path) -> list[str]:
    """The names of a parquet file's columns. Raises DiagnosticsError as `read_parquet`."""
    import pyarrow.parquet as pq

    with _readable(path):
        return pq.read_schema(path).names


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Surround the reading of a parquet file, which is looked at first."""
    import pyarrow as pa

    from diagnostics.core.limits import check_parquet

    try:
        check_parquet(path)
        yield
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
    """Read and validate a `tokens.parquet` that this program wrote.

    Raises:
        DiagnosticsError: The file is damaged, or is not as the manifest beside it has it.
    """
    require_as_written(path)
    return validate_tokens(read_parquet(path))
