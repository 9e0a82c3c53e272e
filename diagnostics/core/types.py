"""The nouns of this program: prompt, context and bank.

Read this file first, then `core.schema`: everything else speaks in these terms.

A *prompt* goes to the student, which samples one response; the frozen pair is a *context*. A
response of T tokens gives T *positions*; position t is the prefix that ends just before response
token t. At a position, p is the student's next-token distribution, q the teacher's and y the token
the student sampled. S and T are the K most likely tokens of p and of q, U their union. Logarithms
are natural: entropies and divergences are in nats."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import require_as_written
from diagnostics.core.rows import missing
from diagnostics.core.schema import read_parquet, require_columns

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

    def __repr__(self) -> str:
        said = self.response if len(self.response) <= 80 else self.response[:79] + "…"
        return f"<Context {self.context_id}: {len(self.response_ids)} response tokens, {said!r}>"

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response ids in one sequence."""
        return self.prompt_ids + self.response_ids

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
OPTIONAL = (*OF_TEACHER, "correct")
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
        return sum(len(context.response_ids) for context in self.contexts)

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
            the teacher's prompts, and whether a response is right, only where any context has them.
        """
        import pandas as pd

        hinted = any(context.teacher_prompt_ids is not None for context in self.contexts)
        judged = any(context.correct is not None for context in self.contexts)
        there = {**dict.fromkeys(OF_TEACHER, hinted), "correct": judged}
        columns = [name for name in Context.__dataclass_fields__ if there.get(name, True)]
        rows = [[getattr(context, name) for name in columns] for context in self.contexts]
        frame = pd.DataFrame(rows, columns=columns)
        for name in (name for name in columns if name.endswith("_ids")):
            frame[name] = [None if ids is None else list(ids) for ids in frame[name]]
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Bank:
        """The bank that a table holds; the inverse of `to_frame`.

        Args:
            frame: One row per context, with the columns of `contexts.parquet`.

        Raises:
            DiagnosticsError: A column is missing, a context id repeats, or a value has the wrong
                kind.
        """
        require_columns(
            frame,
            [name for name in Context.__dataclass_fields__ if name not in OPTIONAL],
            what="a context table",
        )
        repeated = frame.context_id[frame.context_id.duplicated()]
        if len(repeated):
            raise DiagnosticsError(
                f"context_id {repeated.iloc[0]!r} appears more than once. Give every context its"
                " own id."
            )
        return cls(tuple(_context(row) for row in frame.to_dict("records")))


def _context(row: dict) -> Context:
    hint = row.get("teacher_prompt_ids")
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
    )


def _truth(value, name: str) -> bool:
    plain = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(plain, bool | int | float) or plain not in (True, False):
        raise DiagnosticsError(
            f"A context is {name} or not: true or false; found {str(value)[:60]!r}. Fix the"
            f" table's column {name}."
        )
    return bool(plain)


def _whole(ids) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, ids))
    except TypeError as error:
        raise DiagnosticsError(
            f"A context's token ids are a list of whole numbers; found {str(ids)[:60]!r}. Fix the"
            " table, or read it with --rollouts."
        ) from error


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
    return Bank.from_frame(read_parquet(path))
