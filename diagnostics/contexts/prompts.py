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
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.contexts.chat_templates import Template
from diagnostics.contexts.conversations import (
    ARGUMENTS,
    as_messages,
    missing,
    plain,
    read_text,
    require_template,
    row_arguments,
    template_arguments,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import parse_json
from diagnostics.core.schema import read_parquet
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
}
"""What is counted while prompts are rendered, in the words of the log."""
KNOWN = ("prompt_id", "answer", "hint", "teacher_prompt", *ARGUMENTS)
"""Columns that a prompt file may have beside the prompt."""
FROZEN = ("context_id", "prompt_ids", "response_ids", "finished")
"""Columns by which a table of this program's contexts is told: its prompts are rendered."""
EXACT = 2**53
"""Whole numbers from here on are not all told apart by a float."""
CHARACTERS = 16
"""Characters of a text that are tokenised for each token of the limit, at first, to see whether it
is longer; four are usual.
"""
PROBE = "opd-probe"
"""What is rendered to see what a template writes around a message."""


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
            f"{source} holds {len(prompts)} usable prompts{why}, and {wanted} are asked for."
            f" {remedy}"
        )
    return prompts[:wanted]


def encode_prompt(tokenizer, text: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Ids of a prompt, the only ones that sampling, scoring, training and imports use.

    rendered: a chat template wrote the text, which then is all there is: the ids are those of
    `apply_chat_template(tokenize=True)`. Other text keeps the tokenizer's start token, which stands
    once where the text brings it as well, unless the text holds special tokens and the chat
    template writes no start token. Nothing is ever put behind a prompt: the student would answer
    after the end of a text."""
    require_unicode(text)
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = () if rendered else start_ids(tokenizer)
    if bare[: len(start)] == start or _written_in_template(tokenizer, bare, start):
        return bare
    return start + bare


def start_ids(tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text."""
    for text in ("a", "0", "."):  # not every vocabulary has a token for each
        bare, whole = (
            tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
            for special in (False, True)
        )
        places = [
            i
            for i in range(len(whole) - len(bare) + 1)
            if bare and whole[i : i + len(bare)] == bare
        ]
        if places:
            return whole[: places[0]]
    return ()


_BEGINNINGS: weakref.WeakKeyDictionary[Any, tuple[str, tuple[int, ...] | None]] = (
    weakref.WeakKeyDictionary()
)
"""By tokenizer: its chat template, and the ids of what that writes for a question; seen once, as it
takes a process.
"""


def _written_in_template(tokenizer, bare: tuple[int, ...], start: tuple[int, ...]) -> bool:
    """The text has special tokens, and the template that writes such texts begins them without
    `start`.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not template or not special_ids(tokenizer).intersection(bare):
        return False
    if _BEGINNINGS.get(tokenizer, ("",))[0] != template:
        written = render(tokenizer, [{"role": "user", "content": "a"}])
        _BEGINNINGS[tokenizer] = (
            template,
            written and tuple(tokenizer(written, add_special_tokens=False)["input_ids"]),
        )
    beginning = _BEGINNINGS[tokenizer][1]
    return bool(beginning) and beginning[: len(start)] != start


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that `decode(skip_special_tokens=True)` leaves out: those named (start,
    end, ...) and those flagged.
    """
    flagged = {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    return frozenset(flagged.union(tokenizer.all_special_ids))


def render(
    tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs
) -> str | None:
    """Messages of our own by the chat template, to learn how it writes; None without one, or where
    it refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return Template(tokenizer)(
            messages, "the chat template", add_generation_prompt=add_generation_prompt, **kwargs
        )
    except DiagnosticsError:  # what the template does with prompts is seen when they are rendered
        return None


def uses_clock(tokenizer, kwargs: dict[str, Any] | None = None) -> bool:
    """The chat template asks for the time, so that a prompt is another one tomorrow."""
    question, kwargs = (
        [{"role": "user", "content": "a"}],
        template_arguments(kwargs or {}, "--chat-template-kwargs"),
    )
    no_clock = {**kwargs, "strftime_now": "no function"}  # whoever calls it ends in an error
    return (
        render(tokenizer, question, **kwargs) is not None
        and render(tokenizer, question, **no_clock) is None
    )


def require_unicode(text: str) -> None:
    """Raise DiagnosticsError for a text that holds half a surrogate pair, as JSON may: no tokenizer
    reads it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DiagnosticsError(
            f"The text {text[:40]!r} holds half a surrogate pair at character {error.start}, which"
            " is no character. Write the file again as UTF-8."
        ) from error


def digest(text: str) -> str:
    """Short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_rows(path: Path, *, text: bool = False) -> pd.DataFrame:
    """A JSONL, parquet or CSV file as a table. Raises DiagnosticsError with the line that cannot be
    read.

    text: values stay as they are written; otherwise a CSV's cells become numbers, words such as NA
    gaps, and a column of whole numbers with a gap floats."""
    import pandas as pd

    csv_options = {"dtype": "str", "keep_default_na": False} if text else {}
    readers = {
        ".jsonl": lambda file: pd.DataFrame(_read_jsonl(file), dtype=object if text else None),
        ".parquet": read_parquet,
        ".csv": lambda file: pd.read_csv(file, **csv_options),
    }
    readers |= (
        {".parquet": lambda file: exact(read_parquet(file, to_pandas_kwargs=AS_WRITTEN))}
        if text
        else {}
    )
    _require_name(path)
    if path.suffix not in readers:
        raise DiagnosticsError(
            f"{path} ends in {path.suffix!r}; prompt files are .jsonl, .parquet or .csv. Convert it"
            " to one of these."
        )
    try:
        frame = readers[path.suffix](path)
    except DiagnosticsError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise DiagnosticsError(
            f"{path} cannot be read ({reason}). Check the path and the format."
        ) from error
    if not len(frame):
        raise DiagnosticsError(f"{path} holds no rows. Give a file with at least one prompt.")
    return frame


AS_WRITTEN = {"integer_object_nulls": True, "ignore_metadata": True, "maps_as_pydicts": "strict"}
"""How Arrow hands its columns over: whole numbers with gaps exactly, an index as a column, maps as
objects.
"""


def exact(frame: pd.DataFrame) -> pd.DataFrame:
    """A parquet table as its first writer meant it: a float column of whole numbers with gaps was a
    column of whole numbers.
    """
    frame = frame.drop(columns=[name for name in frame if str(name).startswith("__index_level_")])
    for name in frame.columns[[str(kind) in ("float64", "float32") for kind in frame.dtypes]]:
        values = frame[name]
        held = values[values.notna()]
        if len(held) < len(values) and (held % 1 == 0).all() and (held.abs() < EXACT).all():
            frame[name] = np.array(
                [None if missing(value) else int(value) for value in values], dtype=object
            )
    return frame


def _require_name(path: Path) -> None:
    """Raise DiagnosticsError for a name that is no UTF-8: a manifest could not hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DiagnosticsError(
            f"The name of the file {str(path)!a} is not UTF-8, so no record can hold it. Rename the"
            " file."
        ) from error


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"line {number} is nested too deeply") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


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
        return exact(
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


class Renderer:
    """Text or chat messages as the text that the tokenizer will see."""

    def __init__(self, tokenizer, chat: bool = True, kwargs: dict[str, Any] | None = None):
        self.tokenizer, self.template = tokenizer, Template(tokenizer)
        self.arguments = template_arguments(kwargs or {}, "--chat-template-kwargs")
        self.has_template = (
            bool(getattr(tokenizer, "chat_template", None)) or "chat_template" in self.arguments
        )
        self.wraps_text = chat and self.has_template
        self.special = [
            token
            for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
            if token
        ]
        self.counts: Counter = Counter()
        self._writes: dict[str, bool] = {}
        self.written: set[str] = set()
        """Texts that the chat template wrote whole: `encode_prompt` adds nothing to them."""

    def __call__(
        self,
        value,
        where: str,
        arguments: dict[str, Any] | None = None,
        *,
        rendered: bool = False,
        count: bool = True,
    ) -> str:
        """The rendered prompt, "" for a missing one. Raises DiagnosticsError for anything else than
        text or messages.

        arguments: what the row itself hands to the template. rendered: a text is known to be what
        the tokenizer saw. count: note in `counts` what became of it."""
        value = "" if missing(value) else value if rendered else read_text(value, where)
        counts, arguments = self.counts if count else Counter(), self.arguments | (arguments or {})
        if isinstance(value, str) and self._stays(value, rendered, counts):
            counts["arguments_unused"] += bool(
                value and (arguments.get("tools") or arguments.get("documents"))
            )
            return value
        messages = (
            [{"role": "user", "content": value}]
            if isinstance(value, str)
            else self.messages(value, where)
        )
        return self._asked(messages, where, arguments, counts)

    def messages(self, value, where: str) -> list[dict]:
        """Chat messages as this template reads them."""
        return as_messages(value, where, blocks=_has_blocks(value) and self.reads_blocks)

    def render(self, messages: list[dict], where: str, arguments: dict[str, Any], **how) -> str:
        """What the template writes for these messages. Raises DiagnosticsError where there is no
        template, or it does not.
        """
        if not self.has_template:
            raise DiagnosticsError(
                f"{where} holds chat messages, and the tokenizer has no chat template. Give text"
                " prompts, or a chat model."
            )
        require_template(getattr(self.tokenizer, "chat_template", None), arguments, where)
        return self.template(
            messages,
            where,
            **{
                name: value for name, value in arguments.items() if name != "continue_final_message"
            },
            **how,
        )

    def _stays(self, text: str, rendered: bool, counts: Counter) -> bool:
        """A text that no template goes around: there is none, it is empty, or it has been through
        it.
        """
        if not self.wraps_text or not text.strip():
            return True
        rendered = rendered or self.is_rendered(text)
        counts["rendered"] += rendered
        if (
            rendered and self.frame[0] and text.startswith(self.frame[0])
        ):  # as the template begins a prompt, start token or none
            self.written.add(text)
        counts["special_inside"] += not rendered and self.has_special(text)
        return rendered

    def _asked(
        self, messages: list[dict], where: str, arguments: dict[str, Any], counts: Counter
    ) -> str:
        """Messages with the reply asked for, or with a reply that was begun left open."""
        if self.continues(messages, arguments):
            counts["continued"] += 1
            how = {"continue_final_message": True}
        else:
            asked = self.question(messages)
            counts["replies_cut"] += len(asked) < len(messages)
            messages, how = asked, {"add_generation_prompt": True}
        text = self.render(messages, where, arguments, **how)
        self.written.add(text)
        given = [name for name in ("tools", "documents") if arguments.get(name)]
        counts["arguments_unused"] += any(
            [not self._is_written(name, text, messages, where, arguments, how) for name in given]
        )
        return text

    def continues(self, messages: list[dict], arguments: dict[str, Any]) -> bool:
        """The last message begins the reply: the caller says so, or the message itself (`prefix`,
        as some servers take it).
        """
        return messages[-1]["role"] == "assistant" and bool(
            arguments.get("continue_final_message") or messages[-1].get("prefix") is True
        )

    def question(self, messages: list[dict]) -> list[dict]:
        """The chat up to the reply that is asked for."""
        answered = messages[-1]["role"] == "assistant" and len(messages) > 1
        return messages[:-1] if answered else messages

    def _is_written(
        self,
        name: str,
        text: str,
        messages: list[dict],
        where: str,
        arguments: dict[str, Any],
        how: dict,
    ) -> bool:
        """The template writes something of that argument, as the first row that has it shows."""
        if name not in self._writes:
            try:
                without = self.render(
                    messages,
                    where,
                    {key: value for key, value in arguments.items() if key != name},
                    **how,
                )
            except DiagnosticsError:  # it cannot do without
                without = None
            self._writes[name] = text != without
        return self._writes[name]

    def with_hint(
        self, value, hint: str, where: str, arguments: dict[str, Any] | None = None
    ) -> str:
        """The prompt with a hint before the last user message's text, or before the text."""
        value = read_text(value, where)
        if isinstance(value, str) and self.wraps_text and self.is_rendered(value):
            raise DiagnosticsError(
                f"{where} has a hint, and its prompt is rendered already, so that the hint has no"
                " place in it. Give a teacher_prompt instead."
            )
        if isinstance(value, str):
            return self(f"{hint}\n\n{value}", where, arguments, count=False)
        messages = self.messages(value, where)
        if not self.continues(messages, self.arguments | (arguments or {})):
            messages = self.question(messages)
        last = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"), default=None
        )
        if last is None:
            raise DiagnosticsError(
                f"{where} has a hint and no user message to put it before. Give a teacher_prompt"
                " instead."
            )
        content = messages[last].get("content") or ""
        hinted = (
            f"{hint}\n\n{content}"
            if isinstance(content, str)
            else [{"type": "text", "text": f"{hint}\n\n"}, *content]
        )
        return self(
            [*messages[:last], {**messages[last], "content": hinted}, *messages[last + 1 :]],
            where,
            arguments,
            count=False,
        )

    # What the template writes around a message, seen from what it makes of one.

    def has_special(self, text: str) -> bool:
        """A special token of the tokenizer is in the text."""
        return any(token in text for token in self.special)

    def is_rendered(self, text: str) -> bool:
        """The text begins with a special token, or is framed as the template frames a question."""
        stripped = text.strip()
        if any(stripped.startswith(token) for token in self.special):
            return True
        head, tail = (part.strip() for part in self.frame)
        return (
            bool(tail)
            and stripped.endswith(tail)
            and (self.has_special(tail) or (bool(head) and stripped.startswith(head)))
        )

    def spells(self, text, ids) -> bool:
        """The text is that of the prompt's ids, so it is what the tokenizer saw."""
        if (
            not isinstance(text, str)
            or not text
            or not isinstance(ids, (list, tuple, np.ndarray))
            or not self.wraps_text
        ):
            return False
        ids = list(ids)
        return (
            list(encode_prompt(self.tokenizer, text)) == ids
            or list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
        )

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes before a question and, to ask for the reply, at the very end;
        empty where that cannot be seen.
        """
        asked, told = self._probe(PROBE), self._probe(PROBE, add_generation_prompt=False)
        if PROBE not in asked:
            return "", ""
        head, _, tail = asked.partition(PROBE)
        return head, (asked.removeprefix(told) if asked.startswith(told) else "") or tail

    @cached_property
    def reads_blocks(self) -> bool:
        """The template takes content as a list of blocks, and writes the text in it."""
        text = self._probe(PROBE)
        return bool(text) and text == self._probe([{"type": "text", "text": PROBE}])

    def _probe(self, content, **how) -> str:
        try:
            return self.render(
                [{"role": "user", "content": content}],
                "the chat template",
                self.arguments,
                **{"add_generation_prompt": True} | how,
            )
        except DiagnosticsError:
            return ""


def _has_blocks(value) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and any(
        isinstance(message, dict) and isinstance(message.get("content"), (list, np.ndarray))
        for message in value
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
