"""Rollouts that were sampled elsewhere become frozen contexts.

    format     columns that tell it                    what wrote it
    contexts   context_id, prompt_ids, finished …      this project
    released   tokens, resp_len                        the context bank of the scripts of arXiv 2605.26844
    slime      tokens, response_length                 slime's debug rollouts: the .pt archive, or its samples as JSONL
    verl       input, output                           verl's rollout dumps, JSONL
    trl        prompt, completion                      TRL's logged completions, parquet
    plain      prompt, response                        anything: text, chat messages, or prompt_ids and response_ids

Ids are taken as they stand. Text is encoded by the pair's tokenizer, prompt and response together,
so that the response begins where its first token would have; the prompt goes through the chat
template as a prompt file's does, unless it has been through it or the format stores rendered text.
A response ends where the student stopped: at the first token that it did not write (a tool's, by
the loss mask or the message's role), and with the first end token; filler before or after goes. A
reply in messages is the text of its first message, with tool calls and reasoning as the template
writes them.

Three more things can go wrong without a trace in such files, and are looked for in every context.
*Re-tokenisation drift*: the ids decode to a text that encodes to other ids, so that positions exist
that the student never saw. *Other text*: the ids decode to something else than the file's text.
*Lost special tokens*: dumps that were decoded without them give prompts that no model was asked;
where the prompt file is named as well, its prompts are put back in their place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.contexts.import_counts import log_counts, require_same_tokenizer
from diagnostics.contexts.import_formats import (
    FORMATS,
    Row,
    find_format,
    read_row,
    read_rows_of_rollouts,
)
from diagnostics.contexts.import_freezer import Freezer, number_contexts
from diagnostics.contexts.prompts import log_unused_columns
from diagnostics.contexts.rendering import Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
class ImportConfig:
    """Responses that were sampled elsewhere, in place of sampling."""

    rollouts: str | None = field(
        default=None, metadata={"help": "file of prompts with responses; nothing is sampled then"}
    )
    rollouts_format: str = field(
        default="auto",
        metadata={
            "help": "who wrote it",
            "choices": ("auto", "contexts", "released", "slime", "verl", "trl", "plain"),
        },
    )


def read_rollouts(pair: Pair, path: str | Path, **options) -> Bank:
    """Contexts from a file of rollouts; arguments and errors as in `freeze_rollouts`, what it counts goes to
    the log alone.
    """
    return freeze_rollouts(pair, path, **options)[0]


def freeze_rollouts(
    pair: Pair,
    path: str | Path,
    *,
    rollouts_format: str = "auto",
    prompts: Sequence[Prompt] = (),
    contexts: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[Bank, dict[str, Any]]:
    """Read a file of rollouts and freeze it with the pair's tokenizer.

    prompts: where the dump lost special tokens, the prompts it came from. contexts: take the first
    so many, all where None. Responses without tokens and contexts longer than the models' windows
    are left out. Returns the bank in file order and what was counted, which is also logged: rows,
    contexts, positions, what COUNTED names, not_needed. Raises DiagnosticsError for a file that
    cannot be read or is of no known format, a row that holds neither text nor ids, ids outside the
    vocabulary, ids that mostly spell another text than the file's, or fewer contexts than asked
    for."""
    path = Path(path)
    frame = read_rows_of_rollouts(path)
    kind = find_format(frame, rollouts_format, path)
    freezer = Freezer(pair, Renderer(pair.tokenizer, chat, chat_template_kwargs), prompts)
    asked: set[str] = set()
    found = []
    for number, values in enumerate(frame.to_dict("records"), 1):
        row = Row(values, f"{path}, row {number}", freezer.counts, asked)
        found.append(freezer(read_row(FORMATS[kind], row), row.where))
    kept = [context for context in found if context is not None]
    wanted = len(kept) if contexts is None else contexts
    counts = freezer.counted()
    require_same_tokenizer(freezer.counts, path)
    if not kept or not 1 <= wanted <= len(kept):
        log_counts(counts, path)
        raise DiagnosticsError(
            f"{path} holds {len(kept)} usable contexts of {len(frame)}, and {wanted} are asked for."
            " Name a larger file or lower --contexts."
        )
    bank = Bank(tuple(number_contexts(kept[:wanted], path)))
    log.info(
        "%s (%s): %d contexts, %d positions of %d rows",
        path,
        kind,
        len(bank),
        bank.positions,
        len(frame),
    )
    log_counts(counts, path)
    log_unused_columns(set(map(str, frame.columns)) - asked, path)
    return bank, {
        "format": kind,
        "rows": len(frame),
        "contexts": len(bank),
        "positions": bank.positions,
        **counts,
        "not_needed": len(kept) - wanted,
    }
