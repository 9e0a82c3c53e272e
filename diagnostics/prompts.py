"""Prompt files become prompts with stable ids.

JSONL, parquet or CSV with a `prompt` column (text, or a list of chat messages), or `messages`, or any
column by name; optional `answer` and `prompt_id`. Rows that cannot be used are counted and said, never
dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.types import DiagnosticsError, Prompt, read_parquet

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how they are rendered."""

    prompts: str | None = field(default=None, metadata={"help": "JSONL, parquet or CSV of prompts; a named pair brings its own"})
    prompt_column: str | None = field(default=None, metadata={"help": "column with the prompt; `prompt` or `messages` where not given"})
    contexts: int | None = field(default=None, metadata={"help": "use the first so many prompts"})
    chat: bool = field(default=True, metadata={"help": "render text prompts with the tokenizer's chat template where it has one"})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON object passed to the chat template"})


def load_prompts(
    path: str | Path,
    *,
    tokenizer,
    prompt_column: str | None = None,
    contexts: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Prompt]:
    """Read and render prompts.

    Message lists always go through the tokenizer's chat template, text only with `chat` and where there is
    a template; both ask for a reply. Empty prompts and repeats of an earlier one are left out and counted in
    a warning. Returns the first `contexts` prompts, all where None.
    Raises DiagnosticsError for a file that is missing, empty or unreadable, a missing column, a prompt of
    another type, or fewer prompts than asked for.
    """
    frame = read_rows(Path(path))
    column = _prompt_column(frame, prompt_column, path)
    rendered = [_render(value, tokenizer, chat, chat_template_kwargs or {}, f"{path}, row {row + 1}") for row, value in enumerate(frame[column])]
    prompts: dict[str, Prompt] = {}
    empty = repeated = 0
    for row, text in enumerate(rendered):
        if not text.strip():
            empty += 1
            continue
        prompt = Prompt(_identity(frame, row, text), text, _answer(frame, row))
        repeated += prompt.prompt_id in prompts
        prompts.setdefault(prompt.prompt_id, prompt)
    if empty or repeated:
        log.warning("%s: %d empty and %d repeated prompts left out of %d", path, empty, repeated, len(frame))
    return take(list(prompts.values()), contexts, str(path))


def take(prompts: list[Prompt], contexts: int | None, source: str) -> list[Prompt]:
    """The first `contexts` prompts. Raises DiagnosticsError where there are fewer, or none."""
    wanted = len(prompts) if contexts is None else contexts
    if not prompts or not 1 <= wanted <= len(prompts):
        raise DiagnosticsError(f"{source} holds {len(prompts)} usable prompts, and {wanted} are asked for. Add prompts or lower --contexts.")
    return prompts[:wanted]


def read_rows(path: Path) -> pd.DataFrame:
    """A JSONL, parquet or CSV file as a table. Raises DiagnosticsError with the line that cannot be read."""
    import pandas as pd

    readers = {".jsonl": _read_jsonl, ".parquet": read_parquet, ".csv": pd.read_csv}
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


def _read_jsonl(path: Path) -> pd.DataFrame:
    import pandas as pd

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
    return pd.DataFrame(rows)


def _prompt_column(frame: pd.DataFrame, wanted: str | None, path) -> str:
    names = [wanted] if wanted else ["prompt", "messages"]
    for name in names:
        if name in frame.columns:
            return name
    raise DiagnosticsError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has {', '.join(map(str, frame.columns[:20]))}. Name the column with --prompt-column."
    )


def _render(value, tokenizer, chat: bool, kwargs: dict, where: str) -> str:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(value, str):
        if not (chat and has_template) or not value.strip():
            return value
        value = [{"role": "user", "content": value}]
    messages = list(value) if hasattr(value, "__iter__") else None
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
        if value is None or value != value:
            return ""
        raise DiagnosticsError(f"{where}: a prompt is text or a list of {{role, content}} messages; found {str(value)[:80]!r}. Mend that row.")
    if not has_template:
        raise DiagnosticsError(f"{where} holds chat messages, and the tokenizer has no chat template. Give text prompts, or a chat model.")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


def _identity(frame: pd.DataFrame, row: int, text: str) -> str:
    if "prompt_id" in frame.columns:
        return str(frame["prompt_id"].iloc[row])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _answer(frame: pd.DataFrame, row: int) -> str | None:
    if "answer" not in frame.columns:
        return None
    value = frame["answer"].iloc[row]
    return None if value is None or value != value else str(value)
