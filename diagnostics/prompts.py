"""Prompt files and data sets become prompts with stable ids.

JSONL, parquet or CSV, or a Hugging Face data set (`hf:NAME`), with a `prompt` column (text, or a list of chat
messages), or `messages`, or any column by name; optional `answer` and `prompt_id`. A teacher that sees more than the
student gets it from `teacher_prompt` (text or messages, whole) or `hint` (text put before the last user message).
Rows that cannot be used are counted and said, never dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.types import DiagnosticsError, Prompt, read_parquet

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
DATASET = "hf:"
LEFT_OUT = {"empty": "empty", "repeated": "repeated", "over_long": "over-long"}


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how they are rendered."""

    prompts: str | None = field(default=None, metadata={
        "help": "JSONL, parquet or CSV of prompts, or hf:NAME[:CONFIG][@REVISION] of a Hugging Face data set; a named pair brings its own"})
    prompts_split: str | None = field(default=None, metadata={"help": "split of a Hugging Face data set; train where not given"})
    prompt_column: str | None = field(default=None, metadata={"help": "column with the prompt; `prompt` or `messages` where not given"})
    contexts: int | None = field(default=None, metadata={"help": "use the first so many prompts"})
    max_prompt_tokens: int | None = field(default=None, metadata={
        "help": "leave out longer prompts; what the models' windows leave beside the response where not given"})
    chat: bool = field(default=True, metadata={"help": "render text prompts with the tokenizer's chat template where it has one"})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON object passed to the chat template"})


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, and what became of the rows."""

    prompts: list[Prompt]
    counts: dict[str, int]
    """rows read, prompts used, rows left out (empty, repeated, over_long), replies_cut (a chat that ended with the
    assistant's turn lost it), not_needed (usable, beyond the number asked for)."""


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

    path: a file, or `hf:NAME[:CONFIG][@REVISION]` with `prompts_split`. Message lists always go through the
    tokenizer's chat template, text only with `chat` and where there is a template; both ask for a reply. Empty
    prompts, repeats of an earlier one and those of more than `max_prompt_tokens` tokens (None: the tokenizer's own
    limit) are left out and counted in a warning. Returns the first `contexts` prompts, all where None.
    Raises DiagnosticsError for a source that is missing, empty or unreadable, a missing column, a prompt of another
    type, an id with two prompts, or fewer prompts than asked for.
    """
    frame = _read_source(str(path), prompts_split)
    column = _prompt_column(frame, prompt_column, path)
    renderer = Renderer(tokenizer, chat, chat_template_kwargs or {})
    limit = max_prompt_tokens or getattr(tokenizer, "model_max_length", None)
    counts: Counter = Counter(rows=len(frame), prompts=0, empty=0, repeated=0, over_long=0, replies_cut=0, not_needed=0)
    prompts: dict[str, Prompt] = {}
    for prompt in _rendered(frame, column, renderer, path):
        kind = _unusable(prompt, prompts, tokenizer, limit, path)
        counts[kind or "prompts"] += 1
        if kind is None:
            prompts[prompt.prompt_id] = prompt
    counts["replies_cut"] = renderer.replies_cut
    _say(counts, path, limit)
    chosen = take(list(prompts.values()), contexts, str(path), over_long=(counts["over_long"], limit))
    counts["not_needed"] = len(prompts) - len(chosen)
    counts["prompts"] = len(chosen)
    return PromptSet(chosen, dict(counts))


def _rendered(frame: pd.DataFrame, column: str, renderer: Renderer, path) -> Iterator[Prompt]:
    names: dict[tuple[str, str | None], str] = {}  # of what is rendered alike, the first row's: a repeat
    for row, value in enumerate(frame[column]):
        where = f"{path}, row {row + 1}"
        text, teacher = renderer(value, where), _teacher_prompt(frame, row, value, renderer, where)
        identity = _text(frame, "prompt_id", row) or names.setdefault((text, teacher), _source_digest(frame, row, value))
        yield Prompt(identity, text, _text(frame, "answer", row), teacher, rendered=text in renderer.written)


SOURCE = ("teacher_prompt", "hint", "tools", "documents", "chat_template_kwargs")
"""Columns that, beside the prompt's own, decide what is asked."""


def _source_digest(frame: pd.DataFrame, row: int, value) -> str:
    """Name of what a row asks, before any template wrote it: the same tomorrow, and for another model's template."""
    more = {name: _plain_value(frame[name].iloc[row]) for name in SOURCE if name in frame}
    parts = {"prompt": _plain_value(value)} | {name: part for name, part in more.items() if part not in (None, "")}
    if set(parts) == {"prompt"} and isinstance(value, str):
        return digest(value)
    return digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


def _plain_value(value):
    """A cell in JSON's terms, keys without a value left out: Arrow gives every message the keys of all."""
    if isinstance(value, dict):
        return {str(key): _plain_value(part) for key, part in value.items() if not missing(part)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain_value(part) for part in value]
    return None if missing(value) else value


def _unusable(prompt: Prompt, earlier: dict[str, Prompt], tokenizer, limit: int | None, path) -> str | None:
    """Why a prompt is left out, None where it is not. Raises DiagnosticsError for an id that names another prompt."""
    if not prompt.prompt.strip():
        return "empty"
    same = earlier.get(prompt.prompt_id)
    if same is not None and (same.prompt, same.teacher_prompt) != (prompt.prompt, prompt.teacher_prompt):
        raise DiagnosticsError(
            f"{path}: prompt_id {prompt.prompt_id!r} names two prompts ({same.prompt[:40]!r} and {prompt.prompt[:40]!r}). Give each its own id."
        )
    if same is not None:
        return "repeated"
    texts = [text for text in (prompt.prompt, prompt.teacher_prompt) if text is not None]
    return "over_long" if limit and any(_longer(text, limit, tokenizer, prompt.rendered) for text in texts) else None


def _longer(text: str, limit: int, tokenizer, rendered: bool) -> bool:
    """More tokens than `limit`; a text of fewer bytes than that is not tokenised to find out."""
    return len(text.encode("utf-8", "surrogatepass")) + 8 > limit and len(encode_prompt(tokenizer, text, rendered=rendered)) > limit


def _say(counts: Counter, path, limit: int | None) -> None:
    if any(counts[kind] for kind in LEFT_OUT):
        left_out = ", ".join(f"{counts[kind]} {word}" + (f" (more than {limit} tokens)" if kind == "over_long" and counts[kind] else "")
                             for kind, word in LEFT_OUT.items())
        log.warning("%s: %s prompts left out of %d", path, left_out, counts["rows"])
    if counts["replies_cut"]:
        log.warning("%s: %d chats end with the assistant's turn, which was cut off: the student writes it", path, counts["replies_cut"])


def take(prompts: list[Prompt], contexts: int | None, source: str, *, over_long: tuple[int, int | None] = (0, None)) -> list[Prompt]:
    """The first `contexts` prompts. Raises DiagnosticsError where there are fewer, or none.

    over_long: how many were left out for their length, and the limit; the message names it then.
    """
    wanted = len(prompts) if contexts is None else contexts
    if not prompts or not 1 <= wanted <= len(prompts):
        why = f" ({over_long[0]} are longer than {over_long[1]} tokens)" if over_long[0] else ""
        remedy = "Add prompts, lower --contexts or --max-new-tokens, or raise --max-prompt-tokens." if why else "Add prompts or lower --contexts."
        raise DiagnosticsError(f"{source} holds {len(prompts)} usable prompts{why}, and {wanted} are asked for. {remedy}")
    return prompts[:wanted]


def encode_prompt(tokenizer, text: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Ids of a prompt, the only ones that sampling, scoring, training and imports use.

    rendered: a chat template wrote the text, which then is all there is: the ids are those of
    `apply_chat_template(tokenize=True)`. Other text keeps the tokenizer's start token, which stands once where the text
    brings it as well, unless the text holds special tokens and the chat template writes no start token. Nothing is ever
    put behind a prompt: the student would answer after the end of a text.
    """
    require_unicode(text)
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = () if rendered else start_ids(tokenizer)
    if bare[: len(start)] == start or _written_in_template(tokenizer, bare, start):
        return bare
    return start + bare


def start_ids(tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text."""
    for text in ("a", "0", "."):  # not every vocabulary has a token for each
        bare, whole = (tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (False, True))
        places = [i for i in range(len(whole) - len(bare) + 1) if bare and whole[i : i + len(bare)] == bare]
        if places:
            return whole[: places[0]]
    return ()


def _written_in_template(tokenizer, bare: tuple[int, ...], start: tuple[int, ...]) -> bool:
    """The text has special tokens, and the template that writes such texts begins them without `start`."""
    if not getattr(tokenizer, "chat_template", None) or not special_ids(tokenizer).intersection(bare):
        return False
    written = render(tokenizer, [{"role": "user", "content": "a"}])
    return written is not None and tuple(tokenizer(written, add_special_tokens=False)["input_ids"])[: len(start)] != start


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that `decode(skip_special_tokens=True)` leaves out: those named (start, end, ...) and those flagged."""
    flagged = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return frozenset(flagged.union(tokenizer.all_special_ids))


def render(tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs) -> str | None:
    """Messages of our own by the chat template, to learn how it writes; None without one, or where it refuses them."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs)
    except Exception:  # a template is a program, and may end in any error; what it does with prompts is seen when they are rendered
        return None


def uses_clock(tokenizer, kwargs: dict[str, Any] | None = None) -> bool:
    """The chat template asks for the time, so that a prompt is another one tomorrow."""
    question, kwargs = [{"role": "user", "content": "a"}], kwargs or {}
    no_clock = {**kwargs, "strftime_now": "no function"}  # whoever calls it ends in an error
    return render(tokenizer, question, **kwargs) is not None and render(tokenizer, question, **no_clock) is None


def require_unicode(text: str) -> None:
    """Raise DiagnosticsError for a text that holds half a surrogate pair, as JSON may: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DiagnosticsError(
            f"The text {text[:40]!r} holds half a surrogate pair at character {error.start}, which is no character. Write the file again as UTF-8."
        ) from error


def digest(text: str) -> str:
    """Short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_rows(path: Path, *, text: bool = False) -> pd.DataFrame:
    """A JSONL, parquet or CSV file as a table. Raises DiagnosticsError with the line that cannot be read.

    text: values stay as they are written; otherwise a CSV's cells become numbers, words such as NA gaps, and a
    JSONL column of whole numbers with a gap floats.
    """
    import pandas as pd

    csv_options = {"dtype": "str", "keep_default_na": False} if text else {}
    readers = {".jsonl": lambda file: pd.DataFrame(_read_jsonl(file), dtype=object if text else None), ".parquet": read_parquet,
               ".csv": lambda file: pd.read_csv(file, **csv_options)}
    if path.suffix not in readers:
        raise DiagnosticsError(f"{path} ends in {path.suffix!r}; prompt files are .jsonl, .parquet or .csv. Convert it to one of these.")
    try:
        frame = readers[path.suffix](path)
    except DiagnosticsError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise DiagnosticsError(f"{path} cannot be read ({reason}). Check the path and the format.") from error
    if not len(frame):
        raise DiagnosticsError(f"{path} holds no rows. Give a file with at least one prompt.")
    return frame


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _read_source(source: str, split: str | None) -> pd.DataFrame:
    if source.startswith(DATASET):
        return _read_dataset(source.removeprefix(DATASET), split or "train")
    if split is not None:
        raise DiagnosticsError(f"--prompts-split {split} belongs to a data set, and {source} is a file. Write hf:{source}, or leave the split out.")
    return read_rows(Path(source), text=True)


def _read_dataset(name: str, split: str) -> pd.DataFrame:
    """One split of a Hugging Face data set, or of a local folder of its files (also one that `save_to_disk` wrote)."""
    try:
        import datasets
    except ImportError as error:
        raise DiagnosticsError("Prompts from a data set need the package datasets. Run `pip install datasets`, or give a file.") from error
    datasets.disable_progress_bars()
    try:
        return _open_dataset(datasets, name, split).to_pandas()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DiagnosticsError(
            f"{DATASET}{name}, split {split!r}, cannot be read ({reason}). "
            "Check name, configuration and --prompts-split; a name needs a network, a local folder does not."
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
    return datasets.load_dataset(name, configuration or None, split=split, revision=revision or None)


def _prompt_column(frame: pd.DataFrame, wanted: str | None, path) -> str:
    names = [wanted] if wanted else ["prompt", "messages"]
    for name in names:
        if name in frame.columns:
            return name
    raise DiagnosticsError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has {', '.join(map(str, frame.columns[:20]))}. Name the column with --prompt-column."
    )


class Renderer:
    """Text or chat messages as the text that the tokenizer will see."""

    def __init__(self, tokenizer, chat: bool = True, kwargs: dict[str, Any] | None = None):
        self.tokenizer, self.kwargs = tokenizer, kwargs or {}
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.wraps_text = chat and self.has_template
        self.replies_cut = 0
        self.written: set[str] = set()
        """Texts that the chat template wrote whole."""

    def __call__(self, value, where: str) -> str:
        """The rendered prompt, "" for a missing one. Raises DiagnosticsError for anything else than text or messages."""
        if missing(value):
            return ""
        if isinstance(value, str):
            if not self.wraps_text or not value.strip():
                return value
            value = [{"role": "user", "content": value}]
        messages = self.question(as_messages(value, where))
        if not self.has_template:
            raise DiagnosticsError(f"{where} holds chat messages, and the tokenizer has no chat template. Give text prompts, or a chat model.")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self.kwargs)
        self.written.add(text)
        return text

    def question(self, messages: list[dict]) -> list[dict]:
        """The chat up to the reply that is asked for."""
        answered = messages[-1]["role"] == "assistant" and len(messages) > 1
        self.replies_cut += answered
        return messages[:-1] if answered else messages

    def with_hint(self, value, hint: str, where: str) -> str:
        """The prompt with a hint before the last user message's text, or before the text."""
        if isinstance(value, str):
            return self(f"{hint}\n\n{value}", where)
        messages = self.question(as_messages(value, where))
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise DiagnosticsError(f"{where} has a hint and no user message to put it before. Give a teacher_prompt instead.")
        hinted = [*messages[:last], {**messages[last], "content": f"{hint}\n\n{messages[last]['content']}"}, *messages[last + 1 :]]
        return self(hinted, where)


def as_messages(value, where: str) -> list[dict]:
    """A list of chat messages with a role and text content. Raises DiagnosticsError for anything else."""
    messages = list(value) if hasattr(value, "__iter__") and not isinstance(value, (str, dict)) else None
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in messages):
        raise DiagnosticsError(f"{where}: a prompt is text or a list of {{role, content}} messages; found {str(value)[:80]!r}. Mend that row.")
    return messages


def missing(value) -> bool:
    """None, or the NaN that stands for a gap in a column."""
    return value is None or (isinstance(value, float) and value != value)


def _teacher_prompt(frame: pd.DataFrame, row: int, value, renderer: Renderer, where: str) -> str | None:
    whole = frame["teacher_prompt"].iloc[row] if "teacher_prompt" in frame else None
    hint = _text(frame, "hint", row)
    if not missing(whole) and not (isinstance(whole, str) and not whole.strip()):
        if hint:
            raise DiagnosticsError(f"{where} has a teacher_prompt and a hint. Give one: the whole of what the teacher reads, or what it reads besides.")
        return renderer(whole, where)
    return renderer.with_hint(value, hint, where) if hint and not missing(value) else None


def _text(frame: pd.DataFrame, column: str, row: int) -> str | None:
    """A cell as text, None where the column or the value is missing."""
    value = frame[column].iloc[row] if column in frame else None
    return None if missing(value) or (isinstance(value, str) and not value) else str(value)
