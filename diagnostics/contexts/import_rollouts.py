"""Rollouts that were sampled by another program become frozen contexts.

    format     identifying columns              written by
    contexts   context_id, prompt_ids,          this project
               response_ids, finished
    released   tokens, resp_len                 the scripts of arXiv 2605.26844 (context bank)
    slime      tokens, response_length          slime's debug rollouts: the .pt archive, or its
                                                samples as JSONL
    verl       input, output                    verl's rollout dumps, JSONL
    trl        prompt, completion               TRL's logged completions, parquet
    plain      prompt, response                 anything: text, chat messages, or prompt_ids and
                                                response_ids

Ids are taken as they are. Text is encoded by the pair's tokenizer, prompt and response together, so
that the response begins where its first token would have begun. The prompt goes through the chat
template, like those of a prompt file, unless it is rendered already or the format stores rendered
text. A response ends with its first end token, and padding before or after it is removed. Contexts
of this project are frozen already: of their ids nothing is padding, and all stay.

A reply of several turns, with what a tool or a user says between them, is kept whole where the
student's own tokens are told: by a loss mask, or by a chat template with `{% generation %}` marks.
Both models then read all of it, and the student's tokens alone are positions
(`core.types.Context.supervised`); it ends with the last of them. Where nothing tells them, or with
`--turns first`, a response ends before the first token that the student did not write, and a reply
in messages is the text of its first one, with tool calls and reasoning as the template writes them.
`--turns all` refuses what it cannot tell.

Three more faults leave no trace in such files, so every context is checked for them.
*Re-tokenization drift*: the ids decode to a text that encodes to other ids, so that positions exist
that the student never saw. *Other text*: the ids decode to another text than the file's. *Lost
special tokens*: dumps that were decoded without them give prompts that no model was asked; where
the prompt file is named as well, its prompts replace them.

Whether a response is right is read from the columns `correct`, `reward` or `score`, or judged by a
verifier (`contexts.verifiers`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.contexts.conversations import holds_more
from diagnostics.contexts.import_counts import log_counts, require_same_tokenizer
from diagnostics.contexts.import_formats import (
    FORMATS,
    Row,
    find_format,
    read_row,
    read_rows_of_rollouts,
)
from diagnostics.contexts.import_freezer import TURNS, Freezer, number_contexts
from diagnostics.contexts.prompts import log_unused_columns
from diagnostics.contexts.rendering import Renderer
from diagnostics.contexts.verifiers import ANSWERS, judge_imported
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    import pandas as pd

    from diagnostics.core.types import Context
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
class ImportConfig:
    """Settings of importing responses that were sampled by another program."""

    rollouts: str | None = field(
        default=None, metadata={"help": "file of prompts with responses; nothing is sampled then"}
    )
    rollouts_format: str = field(
        default="auto",
        metadata={
            "help": "program that wrote the file of rollouts",
            "choices": ("auto", "contexts", "released", "slime", "verl", "trl", "plain"),
        },
    )
    turns: str = field(
        default="auto",
        metadata={
            "help": "replies of several messages or with a mask: all, first, or all where told",
            "choices": TURNS,
        },
    )


def read_rollouts(
    pair: Pair,
    path: str | Path,
    *,
    rollouts_format: str = "auto",
    turns: str = "auto",
    prompts: Sequence[Prompt] = (),
    contexts: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    verifier: str = "auto",
) -> Bank:
    """Read a file of rollouts and freeze it with the pair's tokenizer.

    Responses without tokens and contexts longer than the models' window are left out. What was
    counted goes to the log.

    Args:
        pair: Student and teacher; the tokenizer, the shared vocabulary and the window are
            theirs.
        path: JSONL, parquet or CSV file of rollouts, or slime's `.pt` archive.
        rollouts_format: `auto`, or the name of a format in the table of this module.
        turns: Which turns of a reply are kept: `all`, the `first`, or (`auto`) all where the
            student's tokens are told, and else the first.
        prompts: The prompts that the rollouts came from. They replace prompts of the file that
            lost their special tokens.
        contexts: Take the first contexts up to this number; None takes all.
        chat: Render text prompts with the chat template, where there is one and the text is not
            rendered already.
        chat_template_kwargs: Arguments of the chat template; a row's own take precedence.
        verifier: What judges responses of which the file says nothing (`contexts.verifiers`).

    Returns:
        A Bank in file order.

    Raises:
        DiagnosticsError: The file cannot be read or has no known format; a row has neither text
            nor ids; ids lie outside the vocabulary, or mostly spell another text than the
            file's; or there are fewer contexts than asked for.
    """
    return freeze_rollouts(
        pair,
        path,
        rollouts_format=rollouts_format,
        turns=turns,
        prompts=prompts,
        contexts=contexts,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
        verifier=verifier,
    )[0]


def freeze_rollouts(
    pair: Pair,
    path: str | Path,
    *,
    rollouts_format: str = "auto",
    turns: str = "auto",
    prompts: Sequence[Prompt] = (),
    contexts: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    verifier: str = "auto",
) -> tuple[Bank, dict[str, Any]]:
    """Read a file of rollouts as `read_rollouts` does, and return the counts with the bank.

    Args:
        pair: Student and teacher; the tokenizer, the shared vocabulary and the window are
            theirs.
        path: JSONL, parquet or CSV file of rollouts, or slime's `.pt` archive.
        rollouts_format: `auto`, or the name of a format in the table of this module.
        turns: Which turns of a reply are kept: `all`, the `first`, or (`auto`) all where the
            student's tokens are told, and else the first.
        prompts: The prompts that the rollouts came from. They replace prompts of the file that
            lost their special tokens.
        contexts: Take the first contexts up to this number; None takes all.
        chat: Render text prompts with the chat template, where there is one and the text is not
            rendered already.
        chat_template_kwargs: Arguments of the chat template; a row's own take precedence.
        verifier: What judges responses of which the file says nothing (`contexts.verifiers`).

    Returns:
        The bank in file order, and a dict with `format`, `rows`, `contexts`, `positions`, the
        counts that COUNTED explains, `not_needed` (usable contexts beyond the number asked for)
        and, where any response was judged, `correct` (the counts of `verifiers.judge_imported`).

    Raises:
        DiagnosticsError: The file cannot be read or has no known format; a row has neither text
            nor ids; ids lie outside the vocabulary, or mostly spell another text than the
            file's; or there are fewer contexts than asked for.
    """
    path = Path(path)
    frame = read_rows_of_rollouts(path)
    kind = find_format(frame, rollouts_format, path)
    renderer = Renderer(pair.tokenizer, chat, chat_template_kwargs)
    freezer = Freezer(pair, renderer, prompts, turns=turns)
    kept, asked = _frozen_rows(frame, kind, freezer, path)
    counts = freezer.counted()
    require_same_tokenizer(freezer.counts, path)
    wanted = _wanted(contexts, len(kept), len(frame), counts, path)
    bank = Bank(tuple(number_contexts(list(kept.values())[:wanted], path)))
    rows = dict(zip((context.context_id for context in bank), kept, strict=False))
    bank, judged = judge_imported(
        bank, frame, rows, prompts, verifier, pair=pair.name, where=str(path)
    )
    asked |= {judged.get("stated_by", ""), *(ANSWERS if "without_answer" in judged else ())}
    said = (path, kind, len(bank), bank.positions, len(frame))
    log.info("%s (%s): %d contexts, %d positions of %d rows", *said)
    log_counts(counts, path)
    log_unused_columns(set(map(str, frame.columns)) - asked, path)
    return bank, {
        "format": kind,
        "rows": len(frame),
        "contexts": len(bank),
        "positions": bank.positions,
        **counts,
        "not_needed": len(kept) - wanted,
        **({"correct": judged} if judged else {}),
    }


def _wanted(asked: int | None, usable: int, rows: int, counts: dict[str, int], path: Path) -> int:
    """How many contexts are taken: as many as are asked for, or all that can be used."""
    wanted = usable if asked is None else asked
    if not 1 <= wanted <= usable:
        log_counts(counts, path)
        raise DiagnosticsError(
            f"{path} holds {usable} usable contexts of {rows}"
            + (f", and {asked} are asked for" if asked is not None else "")
            + ". Name a larger file or lower --contexts."
        )
    return wanted


def _frozen_rows(
    frame: pd.DataFrame, kind: str, freezer: Freezer, path: Path
) -> tuple[dict[int, Context], set[str]]:
    """The usable contexts by the number of their row, from 0, and the columns that were read."""
    asked: set[str] = set()
    kept: dict[int, Context] = {}
    for number, values in enumerate(frame.to_dict("records")):
        row = Row(values, f"{path}, row {number + 1}", freezer.counts, asked)
        context = freezer(read_row(FORMATS[kind], row), row.where)
        if context is not None:
            kept[number] = context
        freezer.counts["prompts_beside"] += kind in ("plain", "trl") and holds_more(values, "")
    return kept, asked
