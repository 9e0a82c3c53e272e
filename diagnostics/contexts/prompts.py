"""Prompt files and data sets become prompts with stable ids.

JSONL, parquet or CSV files and Hugging Face data sets (`hf:NAME`) are read. The prompt stands in a
column `prompt` (text, or a list of chat messages), `messages`, or any named column; `answer` and
`prompt_id` are optional. A teacher that sees more than the student reads `teacher_prompt` (text or
messages, in place of the prompt) or `hint` (text that is put before the last user message).
`tools`, `documents` and `chat_template_kwargs` go to the chat template. A text that is rendered
already stays as it is. Rows that cannot be used are counted and logged, never dropped silently;
columns that are not used are named in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.contexts.conversations import (
    TEMPLATE_COLUMNS,
    holds_more,
    parse_messages,
    row_arguments,
)
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.prompt_ids import cell_text, id_text, is_ambiguous_id, source_digest
from diagnostics.contexts.prompt_sources import prompt_column_of, read_source
from diagnostics.contexts.rendering import Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    import pandas as pd

    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
LEFT_OUT = {"empty": "empty", "repeated": "repeated", "over_long": "over-long"}
"""Reasons for leaving a prompt out, by the name of the count."""
NOTED = {
    "replies_cut": (
        "chats end with the assistant's turn, which was cut off: the student writes it. To let"
        " the student continue that turn, "
        """pass --chat-template-kwargs '{"continue_final_message": true}'"""
    ),
    "continued": (
        "chats end with the beginning of the assistant's turn, which the student continues"
    ),
    "rendered": "prompts were rendered already: no chat template was put around them",
    "special_inside": (
        "texts contain special tokens after their beginning; the chat template was put around"
        " them unchanged"
    ),
    "vague_ids": (
        "ids are floats of 2**53 and more, which no longer tell whole numbers apart: these prompts"
        " are named by their text instead"
    ),
    "arguments_unused": (
        "prompts have tools or documents that are not used: the rendered text contains nothing of"
        " them"
    ),
    "start_missing": (
        "prompts were rendered and lack the start token that the chat template writes; the"
        " tokenizer adds none"
    ),
    "unwritten": (
        "chats hold messages, tool calls or reasoning of which the chat template writes nothing:"
        " the student does not see them"
    ),
    "beside": (
        "rows hold more of the conversation in columns that are not read (system, history, images"
        " and the like): the student does not see it"
    ),
}
"""What is counted while prompts are rendered, in the words of the log."""
OPTIONAL_COLUMNS = (
    "prompt_id",
    "answer",
    "hint",
    "teacher_prompt",
    "domain",
    *TEMPLATE_COLUMNS,
)
"""Columns that a prompt file may have in addition to the prompt."""
CONTEXT_COLUMNS = ("context_id", "prompt_ids", "response_ids", "finished")
"""A table with all of these columns holds this program's contexts, whose prompts are rendered."""
CHARACTERS = 16
"""Characters of a text that are tokenized per token of the limit, at first, to see whether the text
is longer; four are usual.
"""


@dataclass(frozen=True)
class PromptConfig:
    """Settings of reading and rendering prompts."""

    prompts: str | None = field(
        default=None,
        metadata={
            "help": (
                "JSONL, parquet or CSV of prompts, or hf:NAME[:CONFIG][@REVISION] of a Hugging Face"
                " data set; a named pair brings its own"
            )
        },
    )
    prompts_split: str | None = field(
        default=None, metadata={"help": "split of a Hugging Face data set; train where not given"}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "column with the prompt; `prompt` or `messages` where not given"},
    )
    contexts: int | None = field(
        default=None,
        metadata={"help": "number of prompts to use, from the first on; all where not given"},
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": (
                "leave out prompts with more tokens; where not given, those that leave no room for"
                " the response in the models' window"
            )
        },
    )
    chat: bool = field(
        default=True,
        metadata={
            "help": "render text prompts with the tokenizer's chat template where it has one"
        },
    )
    chat_template_kwargs: str = field(
        default="{}", metadata={"help": "JSON object passed to the chat template"}
    )


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, and counts of what became of the rows."""

    prompts: list[Prompt]
    counts: dict[str, int]
    """Number of `rows` read and of `prompts` returned; rows left out (`empty`, `repeated`,
    `over_long`); the counts of NOTED; and `not_needed`, usable prompts beyond the number asked
    for.
    """


Given = str | Path | Bank | Sequence[str | Mapping[str, Any] | Prompt]
"""Prompts as they may be given: a file or data set, frozen contexts, or texts, rows or prompts in
a list.
"""


def load_prompts(
    path: str | Path | Sequence[str | Mapping[str, Any]],
    *,
    pair: Pair | None = None,
    tokenizer: Any = None,
    prompts_split: str | None = PromptConfig.prompts_split,
    prompt_column: str | None = PromptConfig.prompt_column,
    contexts: int | None = PromptConfig.contexts,
    max_prompt_tokens: int | None = PromptConfig.max_prompt_tokens,
    chat: bool = PromptConfig.chat,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Prompt]:
    """Read prompts from a file or data set and render them with the tokenizer's chat template.

    Empty prompts, repetitions of an earlier prompt and prompts that are too long are left out; a
    warning in the log counts them.

    Args:
        path: JSONL, parquet or CSV file; `hf:NAME[:CONFIG][@REVISION]` for a Hugging Face data set;
            or a list of texts, or of rows as such a file has them.
        pair: The pair, whose tokenizer renders the prompts.
        tokenizer: A tokenizer in the place of a pair.
        prompts_split: Split of a data set; None reads `train`. Files have none.
        prompt_column: Column of the prompt; None reads `prompt`, or else `messages`.
        contexts: Number of prompts to return; None returns all.
        max_prompt_tokens: Leave out prompts with more tokens; None takes the models' window where a
            pair is given, and else the tokenizer's own limit.
        chat: Render text prompts with the chat template, where there is one and the text is not
            rendered already. Message lists are always rendered.
        chat_template_kwargs: Arguments of the chat template; a row's own take precedence.

    Returns:
        The prompts in file order, each with the rendered text, its answer if it has one, and
        the teacher's own prompt if it has one.

    Raises:
        DiagnosticsError: The source is missing, empty or unreadable; a column is missing; a
            prompt is neither text nor messages; an id names two prompts; there are fewer prompts
            than `contexts`; or neither a pair nor a tokenizer is given.
    """
    if pair is None and tokenizer is None:
        raise DiagnosticsError(
            "Prompts are rendered with the pair's tokenizer; got neither pair nor tokenizer. Call"
            " load_prompts(path, pair=pair)."
        )
    return read_prompts(
        path,
        tokenizer=tokenizer or pair.tokenizer,  # type: ignore[union-attr]
        teacher_tokenizer=None if pair is None else pair.teacher_reads,
        prompts_split=prompts_split,
        prompt_column=prompt_column,
        contexts=contexts,
        max_prompt_tokens=max_prompt_tokens or (pair.window if pair is not None else None),
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
    ).prompts


def as_prompts(prompts: Given, pair: Pair) -> list[Prompt]:
    """Prompts from whatever a user has: prompts, texts, rows, the path of a file, or contexts.

    Args:
        prompts: Prompts as `load_prompts` returns them, which stay as they are; frozen contexts,
            whose prompts are taken once each; or anything that `load_prompts` reads.
        pair: The pair, whose tokenizer renders what is not rendered yet.

    Raises:
        DiagnosticsError: There is no prompt, or as `load_prompts`.
    """
    if isinstance(prompts, Bank):
        return load_prompts(prompts.to_frame().drop_duplicates("prompt_id"), pair=pair)
    if not isinstance(prompts, str | Path) and not hasattr(prompts, "columns"):
        prompts = list(prompts)
        if not prompts:
            raise DiagnosticsError(
                "There are no prompts. Give at least one, as load_prompts or sums returns them."
            )
        if all(isinstance(prompt, Prompt) for prompt in prompts):
            return prompts  # type: ignore[return-value]
    return load_prompts(prompts, pair=pair)  # type: ignore[arg-type]


def any_prompts(prompts: Given, pair: Pair) -> list[Prompt]:
    """`as_prompts`, for arguments that may hold no prompt at all."""
    return as_prompts(prompts, pair) if isinstance(prompts, str | Path) or len(prompts) else []


def _rows_of(source: Any, split: str | None) -> tuple[pd.DataFrame, str]:
    """The table of a file, a data set or a list, and what errors call it."""
    if isinstance(source, str | Path):
        return read_source(str(source), split), str(source)
    if hasattr(source, "columns"):
        return source, "the table of prompts"
    import pandas as pd

    rows = [{"prompt": row} if isinstance(row, str) else row for row in source]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DiagnosticsError(
            "Prompts are the path of a file, or a list of texts or of rows with a column prompt;"
            f" got {str(source)[:60]!r}."
        )
    return pd.DataFrame(rows), "the list of prompts"


def read_prompts(
    path: str | Path | Sequence[str | Mapping[str, Any]],
    *,
    tokenizer: Any,
    teacher_tokenizer: Any = None,
    prompts_split: str | None = PromptConfig.prompts_split,
    prompt_column: str | None = PromptConfig.prompt_column,
    contexts: int | None = PromptConfig.contexts,
    max_prompt_tokens: int | None = PromptConfig.max_prompt_tokens,
    chat: bool = PromptConfig.chat,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> PromptSet:
    """Read prompts as `load_prompts` does, with its arguments, and return the counts with them.

    What the teacher alone reads is rendered with `teacher_tokenizer`, where there is one and it has
    a chat template (`Pair.teacher_reads`).

    Returns:
        A PromptSet: the prompts in file order, and what became of the rows.

    Raises:
        DiagnosticsError: As `load_prompts`.
    """
    frame, source = _rows_of(path, prompts_split)
    column = prompt_column_of(frame, prompt_column, source)
    renderer = teacher = Renderer(tokenizer, chat, chat_template_kwargs or {})
    if getattr(teacher_tokenizer, "chat_template", None):
        teacher = Renderer(teacher_tokenizer, chat, chat_template_kwargs or {})
    limit = max_prompt_tokens or getattr(tokenizer, "model_max_length", None)
    counts: Counter = Counter(
        rows=len(frame), prompts=0, **dict.fromkeys(LEFT_OUT, 0), not_needed=0
    )
    prompts: dict[str, Prompt] = {}
    for prompt in _rendered(frame, column, (renderer, teacher), source):
        kind = _unusable(prompt, prompts, tokenizer, limit, source)
        counts[kind or "prompts"] += 1
        if kind is None:
            prompts[prompt.prompt_id] = prompt
    counts.update({name: renderer.counts[name] for name in NOTED})
    _say(counts, path, limit)
    read = {column, *OPTIONAL_COLUMNS, *(CONTEXT_COLUMNS if _is_frozen(frame) else ())}
    log_unused_columns(set(frame.columns) - read, source)
    chosen = first_prompts(
        list(prompts.values()), contexts, source, over_long=(counts["over_long"], limit)
    )
    counts["not_needed"] = len(prompts) - len(chosen)
    counts["prompts"] = len(chosen)
    return PromptSet(chosen, dict(counts))


def _rendered(
    frame: pd.DataFrame, column: str, renderers: tuple[Renderer, Renderer], path
) -> Iterator[Prompt]:
    """Yield the prompt of each row of the table, rendered for the student and for the teacher."""
    renderer, of_teacher = renderers
    frozen = _is_frozen(frame) and column == "prompt"
    # Rows that render to the same texts are repetitions and get the first one's name.
    names: dict[tuple[str, str | None], str] = {}
    for number, values in enumerate(frame.to_dict("records"), 1):
        where = f"{path}, row {number}"
        value, arguments = values[column], row_arguments(values, where)
        stays = frozen or renderer.spells(value, values.get("prompt_ids"))
        text = renderer(value, where, arguments, rendered=stays)
        teacher = _teacher_prompt(values, value, of_teacher, where, arguments, rendered=frozen)
        renderer.counts["vague_ids"] += is_ambiguous_id(values.get("prompt_id"))
        renderer.counts["beside"] += not stays and holds_more(values, column)
        source = value if stays else parse_messages(value, where)
        identity = id_text(values.get("prompt_id"), where) or names.setdefault(
            (text, teacher), source_digest(source, arguments, values)
        )
        yield Prompt(
            identity,
            text,
            cell_text(values.get("answer"), where),
            teacher,
            rendered=text in renderer.written,
            domain=cell_text(values.get("domain"), where),
        )


def _is_frozen(frame: pd.DataFrame) -> bool:
    """Whether the table holds this program's contexts."""
    return set(CONTEXT_COLUMNS) <= set(frame.columns)


def _unusable(
    prompt: Prompt, earlier: dict[str, Prompt], tokenizer, limit: int | None, path
) -> str | None:
    """Return why a prompt is left out, or None where it is usable. Raises DiagnosticsError where
    its id already names another prompt.
    """
    if not prompt.prompt.strip():
        return "empty"
    same = earlier.get(prompt.prompt_id)
    if same is not None and (same.prompt, same.teacher_prompt) != (
        prompt.prompt,
        prompt.teacher_prompt,
    ):
        raise DiagnosticsError(
            f"{path}: prompt_id {prompt.prompt_id!r} names two prompts ({same.prompt[:40]!r} and"
            f" {prompt.prompt[:40]!r}). Give each its own id."
        )
    if same is not None:
        return "repeated"
    texts = [text for text in (prompt.prompt, prompt.teacher_prompt) if text is not None]
    if limit and any(_longer(text, limit, tokenizer, prompt.rendered) for text in texts):
        return "over_long"
    return None


def _longer(text: str, limit: int, tokenizer, rendered: bool) -> bool:
    """Whether the text has more than `limit` tokens. A text with fewer bytes than that is not
    tokenized.
    """
    short = 4 * len(text) + 8 <= limit or len(text.encode("utf-8", "surrogatepass")) + 8 <= limit
    return not short and (
        is_far_longer(text, limit, tokenizer)
        or len(encode_prompt(tokenizer, text, rendered=rendered)) > limit
    )


def is_far_longer(text: str, limit: int, tokenizer) -> bool:
    """Whether a beginning of the text has more than twice `limit` tokens.

    The whole text, however large, then need not be tokenized. The factor is two because cutting
    inside a word changes the tokens of that word.
    """
    size = CHARACTERS * limit + 4096
    while size < len(text):
        beginning = text[:size].encode("utf-8", "replace").decode()
        if len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) > 2 * limit:
            return True
        size *= 4
    return False


def _say(counts: Counter, path, limit: int | None) -> None:
    """Log how many prompts were left out, and why."""
    if any(counts[kind] for kind in LEFT_OUT):
        left_out = ", ".join(
            f"{counts[kind]} {word}"
            + (f" (more than {limit} tokens)" if kind == "over_long" and counts[kind] else "")
            for kind, word in LEFT_OUT.items()
        )
        log.warning("%s: %s prompts left out of %d", path, left_out, counts["rows"])
    for kind, words in NOTED.items():
        if counts[kind]:
            log.warning("%s: %d %s", path, counts[kind], words)


def log_unused_columns(names, path) -> None:
    """Log the names of the columns that nothing was read from."""
    unused = sorted(map(str, names))
    if unused:
        log.info(
            "%s: columns that are not used: %s",
            path,
            ", ".join(unused[:20]) + (f" and {len(unused) - 20} more" if len(unused) > 20 else ""),
        )


def first_prompts(
    prompts: list[Prompt],
    contexts: int | None,
    source: str,
    *,
    over_long: tuple[int, int | None] = (0, None),
) -> list[Prompt]:
    """Return the first `contexts` prompts; None returns all.

    Args:
        prompts: The usable prompts.
        contexts: Number asked for.
        source: File or data set, for the error.
        over_long: How many prompts were left out for their length, and the limit in tokens.

    Returns:
        The chosen prompts.

    Raises:
        DiagnosticsError: There are fewer prompts than asked for, or none.
    """
    wanted = len(prompts) if contexts is None else contexts
    if not prompts or not 1 <= wanted <= len(prompts):
        why = f" ({over_long[0]} are longer than {over_long[1]} tokens)" if over_long[0] else ""
        remedy = (
            "Add prompts, lower --contexts or --max-new-tokens, or raise --max-prompt-tokens."
            if why
            else "Add prompts or lower --contexts."
        )
        raise DiagnosticsError(
            f"{source} holds {len(prompts)} usable prompts{why}"
            + (f", and {wanted} are asked for" if contexts is not None else "")
            + f". {remedy}"
        )
    return prompts[:wanted]


def _teacher_prompt(
    values: dict[str, Any],
    value,
    renderer: Renderer,
    where: str,
    arguments: dict[str, Any],
    *,
    rendered: bool,
) -> str | None:
    """Return what the teacher reads in place of the prompt, rendered; None where it reads the
    prompt. Raises DiagnosticsError where a row has both a teacher_prompt and a hint.
    """
    whole, hint = values.get("teacher_prompt"), cell_text(values.get("hint"), where)
    if not missing(whole) and not (isinstance(whole, str) and not whole.strip()):
        if hint:
            raise DiagnosticsError(
                f"{where} has a teacher_prompt and a hint. Give one: the whole of what the teacher"
                " reads, or what it reads besides."
            )
        return renderer(whole, where, arguments, rendered=rendered, count=False)
    return (
        renderer.with_hint(value, hint, where, arguments) if hint and not missing(value) else None
    )
