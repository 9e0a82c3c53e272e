"""Prompt files and data sets become prompts with stable ids.

JSONL, parquet or CSV, or a Hugging Face data set (`hf:NAME`), with a `prompt` column (text, or a
list of chat messages), or `messages`, or any column by name; optional `answer` and `prompt_id`. A
teacher that sees more than the student gets it from `teacher_prompt` (text or messages, whole) or
`hint` (text put before the last user message). `tools`, `documents` and `chat_template_kwargs` go
into the row's template. A text that is rendered already stays as it is. Rows that cannot be used
are counted and said, never dropped in silence; so are the columns that are not used."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.contexts.conversations import (
    ARGUMENTS,
    holds_more,
    plain,
    read_text,
    row_arguments,
)
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.rendering import Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import AS_WRITTEN, EXACT, keep_whole_numbers, missing, read_rows
from diagnostics.core.types import Prompt

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
DATASET = "hf:"
LEFT_OUT = {"empty": "empty", "repeated": "repeated", "over_long": "over-long"}
NOTED = {
    "replies_cut": (
        "chats end with the assistant's turn, which was cut off: the student writes it. Where it"
        " should go on from there, "
        """pass --chat-template-kwargs '{"continue_final_message": true}'"""
    ),
    "continued": (
        "chats end with the beginning of the assistant's turn, which the student continues"
    ),
    "rendered": "prompts were rendered before: no chat template was put around them",
    "special_inside": (
        "texts hold special tokens in their midst; the chat template was put around them as"
        " they are"
    ),
    "vague_ids": (
        "ids are floats of 2**53 and more, which no longer tell whole numbers apart: the prompts"
        " are named by their text instead"
    ),
    "arguments_unused": (
        "prompts have tools or documents that are not used: nothing of them is in the rendered text"
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
KNOWN = ("prompt_id", "answer", "hint", "teacher_prompt", *ARGUMENTS)
"""Columns that a prompt file may have beside the prompt."""
FROZEN = ("context_id", "prompt_ids", "response_ids", "finished")
"""Columns by which a table of this program's contexts is told: its prompts are rendered."""
CHARACTERS = 16
"""Characters of a text that are tokenised for each token of the limit, at first, to see whether it
is longer; four are usual.
"""


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how they are rendered."""

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
    contexts: int | None = field(default=None, metadata={"help": "use the first so many prompts"})
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": (
                "leave out longer prompts; what the models' windows leave beside the response where"
                " not given"
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
    """Prompts in file order, and what became of the rows."""

    prompts: list[Prompt]
    counts: dict[str, int]
    """rows read, prompts used, rows left out (empty, repeated, over_long), what NOTED says of the
    rendering, not_needed (usable, beyond the number asked for)."""


def load_prompts(path: str | Path, **options) -> list[Prompt]:
    """The prompts of a file or data set; arguments and errors as in `read_prompts`."""
    return read_prompts(path, **options).prompts


def read_prompts(
    path: str | Path,
    *,
    tokenizer,
    prompts_split: str | None = None,
    prompt_column: str | None = None,
    contexts: int | None = None,
    max_prompt_tokens: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> PromptSet:
    """Read and render prompts, and count what was left out.

    path: a file, or `hf:NAME[:CONFIG][@REVISION]` with `prompts_split`. Message lists, also as JSON
    text, always go through the tokenizer's chat template, text only with `chat`, where there is a
    template and it is not rendered already; all ask for a reply. chat_template_kwargs: what the
    template is given; a row's own come before. Empty prompts, repeats of an earlier one and those
    of more than `max_prompt_tokens` tokens (None: the tokenizer's own limit) are left out and
    counted in a warning. Returns the first `contexts` prompts, all where None. Raises
    DiagnosticsError for a source that is missing, empty or unreadable, a missing column, a prompt
    of another type, an id with two prompts, or fewer prompts than asked for."""
    frame = _read_source(str(path), prompts_split)
    column = _prompt_column(frame, prompt_column, path)
    renderer = Renderer(tokenizer, chat, chat_template_kwargs or {})
    limit = max_prompt_tokens or getattr(tokenizer, "model_max_length", None)
    counts: Counter = Counter(
        rows=len(frame), prompts=0, **dict.fromkeys(LEFT_OUT, 0), not_needed=0
    )
    prompts: dict[str, Prompt] = {}
    for prompt in _rendered(frame, column, renderer, path):
        kind = _unusable(prompt, prompts, tokenizer, limit, path)
        counts[kind or "prompts"] += 1
        if kind is None:
            prompts[prompt.prompt_id] = prompt
    counts.update({name: renderer.counts[name] for name in NOTED})
    _say(counts, path, limit)
    say_unused(
        set(frame.columns) - {column, *KNOWN} - (set(FROZEN) if _is_frozen(frame) else set()), path
    )
    chosen = take(
        list(prompts.values()), contexts, str(path), over_long=(counts["over_long"], limit)
    )
    counts["not_needed"] = len(prompts) - len(chosen)
    counts["prompts"] = len(chosen)
    return PromptSet(chosen, dict(counts))


def _rendered(frame: pd.DataFrame, column: str, renderer: Renderer, path) -> Iterator[Prompt]:
    frozen = _is_frozen(frame) and column == "prompt"
    names: dict[
        tuple[str, str | None], str
    ] = {}  # of what is rendered alike, the first row's: a repeat
    for number, values in enumerate(frame.to_dict("records"), 1):
        where = f"{path}, row {number}"
        value, arguments = values[column], row_arguments(values, where)
        stays = frozen or renderer.spells(value, values.get("prompt_ids"))
        text = renderer(value, where, arguments, rendered=stays)
        teacher = _teacher_prompt(values, value, renderer, where, arguments, rendered=frozen)
        renderer.counts["vague_ids"] += is_vague(values.get("prompt_id"))
        renderer.counts["beside"] += not stays and holds_more(values, column)
        source = value if stays else read_text(value, where)
        identity = name_of(values.get("prompt_id"), where) or names.setdefault(
            (text, teacher), _source_digest(source, arguments, values)
        )
        yield Prompt(
            identity,
            text,
            cell_text(values.get("answer"), where),
            teacher,
            rendered=text in renderer.written,
        )


def _source_digest(value, arguments: dict[str, Any], values: dict[str, Any]) -> str:
    """Name of what a row asks, before any template wrote it: the same tomorrow, and for another
    model's template.

    values: the row, whose hint and teacher_prompt are asked as well.
    """
    more = arguments | {name: _plain_value(values.get(name)) for name in ("teacher_prompt", "hint")}
    parts = {"prompt": _plain_value(value)} | {
        name: part for name, part in more.items() if part not in (None, "")
    }
    if set(parts) == {"prompt"} and isinstance(value, str):
        return digest(value)
    return digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


def _plain_value(value):
    """A cell in JSON's terms, keys without a value left out: Arrow gives every message the keys of
    all.
    """
    if isinstance(value, dict):
        return {str(key): _plain_value(part) for key, part in value.items() if not missing(part)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain_value(part) for part in value]
    return None if missing(value) else value


def _is_frozen(frame: pd.DataFrame) -> bool:
    return set(FROZEN) <= set(frame.columns)


def _unusable(
    prompt: Prompt, earlier: dict[str, Prompt], tokenizer, limit: int | None, path
) -> str | None:
    """Why a prompt is left out, None where it is not. Raises DiagnosticsError for an id that names
    another prompt.
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
    return (
        "over_long"
        if limit and any(_longer(text, limit, tokenizer, prompt.rendered) for text in texts)
        else None
    )


def _longer(text: str, limit: int, tokenizer, rendered: bool) -> bool:
    """More tokens than `limit`; a text of fewer bytes than that is not tokenised to find out."""
    short = 4 * len(text) + 8 <= limit or len(text.encode("utf-8", "surrogatepass")) + 8 <= limit
    return not short and (
        far_longer(text, limit, tokenizer)
        or len(encode_prompt(tokenizer, text, rendered=rendered)) > limit
    )


def far_longer(text: str, limit: int, tokenizer) -> bool:
    """A beginning of the text has over twice `limit` tokens, so that the whole, however large, need
    not be tokenised.

    Twice, because a cut within a word changes the tokens of that word.
    """
    size = CHARACTERS * limit + 4096
    while size < len(text):
        beginning = text[:size].encode("utf-8", "replace").decode()
        if len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) > 2 * limit:
            return True
        size *= 4
    return False


def _say(counts: Counter, path, limit: int | None) -> None:
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


def say_unused(names, path) -> None:
    """Name, once, the columns of a file that nothing was read from."""
    unused = sorted(map(str, names))
    if unused:
        log.info(
            "%s: columns that are not used: %s",
            path,
            ", ".join(unused[:20]) + (f" and {len(unused) - 20} more" if len(unused) > 20 else ""),
        )


def take(
    prompts: list[Prompt],
    contexts: int | None,
    source: str,
    *,
    over_long: tuple[int, int | None] = (0, None),
) -> list[Prompt]:
    """The first `contexts` prompts. Raises DiagnosticsError where there are fewer, or none.

    over_long: how many were left out for their length, and the limit; the message names it then.
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


def digest(text: str) -> str:
    """Short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _read_source(source: str, split: str | None) -> pd.DataFrame:
    if source.startswith(DATASET):
        return _read_dataset(source.removeprefix(DATASET), split or "train")
    if split is not None:
        raise DiagnosticsError(
            f"--prompts-split {split} belongs to a data set, and {source} is a file. Write"
            f" hf:{source}, or leave the split out."
        )
    return read_rows(Path(source), text=True)


def _read_dataset(name: str, split: str) -> pd.DataFrame:
    """One split of a Hugging Face data set, or of a local folder of its files (also one that
    `save_to_disk` wrote).
    """
    try:
        import datasets
    except ImportError as error:
        raise DiagnosticsError(
            "Prompts from a data set need the package datasets. Run `pip install datasets`, or give"
            " a file."
        ) from error
    datasets.disable_progress_bars()
    try:
        return keep_whole_numbers(
            _open_dataset(datasets, name, split).with_format("arrow")[:].to_pandas(**AS_WRITTEN)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DiagnosticsError(
            f"{DATASET}{name}, split {split!r}, cannot be read ({reason}). Check name,"
            " configuration and --prompts-split; a name needs a network, a local folder does not."
        ) from error


def _open_dataset(datasets, name: str, split: str):
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(name)
    if folder.is_dir():
        return datasets.load_dataset(name, split=split)
    name, _, revision = name.partition("@")
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(
        name, configuration or None, split=split, revision=revision or None
    )


def _prompt_column(frame: pd.DataFrame, wanted: str | None, path) -> str:
    names = [wanted] if wanted else ["prompt", "messages"]
    for name in names:
        if name in frame.columns:
            return name
    raise DiagnosticsError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has"
        f" {', '.join(map(str, frame.columns[:20]))}. Name the column with --prompt-column."
    )


def _teacher_prompt(
    values: dict[str, Any],
    value,
    renderer: Renderer,
    where: str,
    arguments: dict[str, Any],
    *,
    rendered: bool,
) -> str | None:
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


def cell_text(value, where: str) -> str | None:
    """A cell as text, lists and objects as JSON; None where it is missing or empty."""
    if missing(value) or (isinstance(value, str) and not value):
        return None
    held = value.item() if isinstance(value, np.generic) else value
    return (
        json.dumps(plain(held, where))
        if isinstance(held, (list, tuple, dict, np.ndarray))
        else str(held)
    )


def name_of(value, where: str) -> str | None:
    """An id as text, None where there is none; 3.0, as a column that once had gaps holds it, is 3,
    and a vague one is none.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not value.is_integer():
        return cell_text(value, where)
    return None if is_vague(value) else str(int(value))


def is_vague(value) -> bool:
    """A whole number that a float no longer tells from its neighbours: as an id it would join what
    was apart.
    """
    return isinstance(value, (float, np.floating)) and EXACT <= abs(value) < float("inf")
