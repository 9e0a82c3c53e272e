"""The nouns of this program: prompt, context and bank.

Read this file first, then `core.schema`: everything else speaks in these terms.

A *prompt* goes to the student, which samples one response; the frozen pair is a *context*. A
response of T tokens gives T *positions*; position t is the prefix that ends just before response
token t. Where a tool or a user wrote part of a response (`Context.supervised`), only the student's
own tokens are positions, counted from 0 over these alone. At a position, p is the student's
next-token distribution, q the teacher's and y the token the student sampled. S and T are the K most
likely tokens of p and of q, U their union. Logarithms are natural: entropies and divergences are in
nats."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import require_as_written
from diagnostics.core.rows import missing
from diagnostics.core.schema import read_parquet_parts, require_columns
from diagnostics.core.tables import write_parquet_parts

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Prompt:
    """One question for the student."""

    prompt_id: str
    """Stable name; the cluster of every interval."""
    prompt: str
    """Text as the tokenizer will see it, chat template already applied."""
    answer: str | None = None
    """Reference answer where the task can be verified."""
    teacher_prompt: str | None = None
    """Rendered prompt for the teacher; None means the same as `prompt`."""
    rendered: bool = False
    """True where a chat template wrote the whole text, so that encoding adds no token."""
    domain: str | None = None
    """What kind of question it is, where the prompt file says so."""


@dataclass(frozen=True)
class Context:
    """A prompt with the response that the student sampled, frozen."""

    context_id: str
    prompt_id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]
    finished: bool
    """True where the response ended by itself; its last id is then the end-of-sequence token."""
    teacher_prompt: str | None = None
    """Rendered prompt for the teacher; None means the same as `prompt`."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    correct: bool | None = None
    """Whether the response is right, as a verifier or the file that it came from says; None where
    it was not judged."""
    supervised: tuple[bool, ...] | None = None
    """For each response token, whether it is a position: the student wrote it, and the teacher can
    grade it. None means that all are. The others are read by both models and measured by none."""
    domain: str | None = None
    """What kind of question the prompt is, where the prompt file says so."""
    sampled_logprobs: tuple[float, ...] | None = None
    """For each response token, ln of its probability as the engine that sampled it reported it, NaN
    where it reported none; None where none is known. No measurement reads them: scoring has its
    own, and the two are compared."""

    def __post_init__(self):
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.response_ids):
                raise DiagnosticsError(
                    f"Context {self.context_id!r} has {len(values)} values in {name} and"
                    f" {len(self.response_ids)} response tokens. Give one value per token, or none."
                )

    def __repr__(self) -> str:
        said = self.response if len(self.response) <= 80 else self.response[:79] + "…"
        return f"<Context {self.context_id}: {len(self.response_ids)} response tokens, {said!r}>"

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response ids in one sequence."""
        return self.prompt_ids + self.response_ids

    @property
    def positions(self) -> tuple[int, ...]:
        """Indices, within the response, of the tokens that are positions."""
        if self.supervised is None:
            return tuple(range(len(self.response_ids)))
        return tuple(t for t, own in enumerate(self.supervised) if own)

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that are positions: the rows of a token table."""
        if self.supervised is None:
            return self.response_ids
        return tuple(self.response_ids[t] for t in self.positions)

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        """The sequence that the teacher reads: its own prompt and the same response."""
        return (
            self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids
        ) + self.response_ids

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return max(len(self.ids), len(self.teacher_ids))


OF_TEACHER = ("teacher_prompt", "teacher_prompt_ids")
"""Columns of a context table that are there only where the teacher reads its own prompt."""
SUPERVISED = "supervised"
"""Column of a context table that is there only where some response tokens are no positions."""
SAMPLED = "sampled_logprobs"
"""Column of a context table that is there only where an engine reported what it drew."""
PER_TOKEN = (SUPERVISED, SAMPLED)
"""Columns of a context table with one value per response token."""
CONTEXTS_TOGETHER = 4096
"""Contexts of a table that are in memory as one, and in a row group of its file."""
OPTIONAL = (*OF_TEACHER, "correct", "domain", *PER_TOKEN)
"""Columns of a context table that may be absent."""


@dataclass(frozen=True)
class Bank:
    """Frozen contexts in a fixed order; the unit that stages pass along."""

    contexts: tuple[Context, ...]

    def __len__(self) -> int:
        return len(self.contexts)

    def __iter__(self) -> Iterator[Context]:
        return iter(self.contexts)

    def __getitem__(self, index: int) -> Context:
        return self.contexts[index]

    @property
    def positions(self) -> int:
        """Number of response positions over all contexts."""
        return sum(len(context.sampled_ids) for context in self.contexts)

    @property
    def masked(self) -> bool:
        """Whether some response tokens are no positions (`Context.supervised`)."""
        return any(context.supervised is not None for context in self.contexts)

    def as_scored(self, tokens: pd.DataFrame) -> Bank:
        """The bank with those positions that a token table of it has.

        Args:
            tokens: One row per position. Where it has the column `response_index`, some response
                tokens may be no positions for its pair, and are none in the bank that is returned.
        """
        if "response_index" not in tokens:
            return self
        held = {
            str(name): frozenset(indices.tolist())
            for name, indices in tokens.groupby("context_id")["response_index"]
        }
        return Bank(
            tuple(
                replace(
                    context,
                    supervised=tuple(
                        t in held.get(context.context_id, ())
                        for t in range(len(context.response_ids))
                    ),
                )
                for context in self.contexts
            )
        )

    @property
    def _counts(self) -> str:
        prompts = len({context.prompt_id for context in self.contexts})
        return (
            f"{len(self):,} contexts of {prompts:,} prompts, {self.positions:,} response positions,"
            f" {sum(context.finished for context in self):,} ended by themselves"
        )

    def __repr__(self) -> str:
        return f"<Bank: {self._counts}>"

    def _repr_html_(self) -> str:
        """Counts, and the beginning of the first context, for a notebook."""
        from html import escape

        if not self.contexts:
            return "<p>A bank without contexts.</p>"
        first = self.contexts[0]
        return (
            f"<p>{self._counts}.</p><p>{escape(first.context_id)}:"
            f" <i>{escape(first.prompt[-300:])}</i> {escape(first.response[:300])}</p>"
        )

    def to_frame(self) -> pd.DataFrame:
        """The bank as a table.

        Returns:
            One row per context, with the columns of `contexts.parquet` (the fields of `Context`);
            the teacher's prompts, whether a response is right, `supervised` and `sampled_logprobs`
            only where any context has them.
        """
        return _frame(self.contexts, self._columns())

    def to_frames(self) -> Iterator[pd.DataFrame]:
        """The table of `to_frame` in parts of CONTEXTS_TOGETHER contexts."""
        columns = self._columns()
        for first in range(0, len(self), CONTEXTS_TOGETHER):
            yield _frame(self.contexts[first : first + CONTEXTS_TOGETHER], columns)

    def _columns(self) -> list[str]:
        """The columns of the bank's table."""
        there = {
            **dict.fromkeys(OF_TEACHER, any(c.teacher_prompt_ids is not None for c in self)),
            "correct": any(context.correct is not None for context in self),
            SUPERVISED: self.masked,
            "domain": any(context.domain is not None for context in self),
            SAMPLED: any(context.sampled_logprobs is not None for context in self),
        }
        return [name for name in Context.__dataclass_fields__ if there.get(name, True)]

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Bank:
        """The bank that a table holds; the inverse of `to_frame`.

        Args:
            frame: One row per context, with the columns of `contexts.parquet`.

        Raises:
            DiagnosticsError: A column is missing, a context id repeats, or a value has the wrong
                kind.
        """
        return cls.from_frames([frame])

    @classmethod
    def from_frames(cls, frames: Iterable[pd.DataFrame]) -> Bank:
        """The bank that a table in parts holds; errors are those of `from_frame`."""
        contexts: list[Context] = []
        for frame in frames:
            require_columns(
                frame,
                [name for name in Context.__dataclass_fields__ if name not in OPTIONAL],
                what="a context table",
            )
            contexts += map(_context, frame.to_dict("records"))
        counts = Counter(context.context_id for context in contexts)
        repeated = next((name for name, count in counts.items() if count > 1), None)
        if repeated is not None:
            raise DiagnosticsError(
                f"context_id {repeated!r} appears more than once. Give every context its own id."
            )
        return cls(tuple(contexts))


def _frame(contexts: Sequence[Context], columns: list[str]) -> pd.DataFrame:
    import pandas as pd

    rows = [[getattr(context, name) for name in columns] for context in contexts]
    frame = pd.DataFrame(rows, columns=columns)
    for name in (name for name in columns if name.endswith("_ids") or name in PER_TOKEN):
        frame[name] = [None if values is None else list(values) for values in frame[name]]
    return frame


def _context(row: dict) -> Context:
    hint, mask = row.get("teacher_prompt_ids"), row.get(SUPERVISED)
    own = tuple(map(_is_own, mask)) if mask is not None and hasattr(mask, "__len__") else None
    hinted = hasattr(hint, "__len__")  # a gap in a column of lists is None or NaN
    return Context(
        context_id=str(row["context_id"]),
        prompt_id=str(row["prompt_id"]),
        prompt=str(row["prompt"]),
        prompt_ids=_whole(row["prompt_ids"]),
        response=str(row["response"]),
        response_ids=_whole(row["response_ids"]),
        finished=_truth(row["finished"], "finished"),
        teacher_prompt=str(row["teacher_prompt"]) if hinted else None,
        teacher_prompt_ids=_whole(hint) if hinted else None,
        correct=None if missing(row.get("correct")) else _truth(row["correct"], "correct"),
        supervised=own,
        domain=None if missing(row.get("domain")) else str(row["domain"]),
        sampled_logprobs=_numbers(row.get(SAMPLED)),
    )


def _truth(value, name: str) -> bool:
    plain = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(plain, bool | int | float) or plain not in (True, False):
        raise DiagnosticsError(
            f"A context is {name} or not: true or false; found {str(value)[:60]!r}. Fix the"
            f" table's column {name}."
        )
    return bool(plain)


def _is_own(value) -> bool:
    plain = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(plain, bool | int | float) or plain not in (True, False):
        raise DiagnosticsError(
            f"A response token is a position or not: true or false; found {str(value)[:60]!r}. Fix"
            f" the table's column {SUPERVISED}."
        )
    return bool(plain)


def _numbers(values) -> tuple[float, ...] | None:
    """A list of numbers, NaN for a gap in it; None where there is no list."""
    if values is None or not hasattr(values, "__len__"):
        return None
    try:
        return tuple(float("nan") if value is None else float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise DiagnosticsError(
            f"A context's {SAMPLED} are numbers; found {str(values)[:60]!r}. Fix the table, or"
            " leave the column out."
        ) from error


def _whole(ids) -> tuple[int, ...]:
    try:
        return shared_ids(map(operator.index, ids))
    except TypeError as error:
        raise DiagnosticsError(
            f"A context's token ids are a list of whole numbers; found {str(ids)[:60]!r}. Fix the"
            " table, or read it with --rollouts."
        ) from error


_ids: dict[int, int] = {}
"""One object for every token id that was read or sampled: as many as a vocabulary has."""


def shared_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """A tuple of token ids that takes eight bytes per id, since equal ids are one object."""
    return tuple(_ids.setdefault(i, i) for i in map(int, ids))


def write_bank(path: str | Path, bank: Bank) -> Path:
    """Write a bank as `contexts.parquet`, atomically; some contexts at a time become its table.

    Raises:
        DiagnosticsError: The file cannot be written.
    """
    import pyarrow as pa

    texts, ids = pa.large_string(), pa.list_(pa.int64())
    types = {
        **dict(zip(OF_TEACHER, (texts, ids), strict=True)),
        "response_ids": ids,
        "correct": pa.bool_(),
        "domain": texts,
        SUPERVISED: pa.list_(pa.bool_()),
        SAMPLED: pa.list_(pa.float64()),
    }
    return write_parquet_parts(path, bank.to_frames(), types=types)


def read_bank(path: str | Path) -> Bank:
    """Read a `contexts.parquet` that this program wrote.

    Args:
        path: The file.

    Returns:
        The frozen contexts, in the file's order.

    Raises:
        DiagnosticsError: The file cannot be read, does not hold contexts, or is not as the
            manifest beside it has it.
    """
    require_as_written(path)
    return Bank.from_frames(read_parquet_parts(path))
