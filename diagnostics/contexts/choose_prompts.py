"""Which prompts a command works on, and which are kept apart for evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import TYPE_CHECKING

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import parse_json
from diagnostics.core.types import Prompt
from diagnostics.models.identity import Models

if TYPE_CHECKING:
    from diagnostics.contexts.prompts import PromptSet

log = logging.getLogger("diagnostics")
EMBEDDED_CONTEXTS = 128


def choose_prompts(models: Models, config, *, room: int = 1) -> PromptSet:
    """Prompts from the file or data set, or those that a named pair brings; each leaves `room` for
    a response.
    """
    from diagnostics.contexts.encoding import uses_clock
    from diagnostics.contexts.prompts import PromptSet, read_prompts
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.pair import NAMED_PAIRS

    options = dataclasses.asdict(config)
    path, kwargs = (
        options.pop("prompts"),
        json_object(options.pop("chat_template_kwargs"), "--chat-template-kwargs"),
    )
    named = NAMED_PAIRS.get(models.config.pair)
    if path is None and named and named.task:
        write = TASKS[named.task].write
        return PromptSet(write(config.contexts or EMBEDDED_CONTEXTS, seed=0, split="probe"), {})
    if path is None and named:
        path = named.prompts
    if path is None:
        raise DiagnosticsError(
            "No prompts were given, and this pair brings none. Name a file with --prompts."
        )
    options["max_prompt_tokens"] = config.max_prompt_tokens or _room_for_a_prompt(
        models.pair.window, room
    )
    if config.chat and uses_clock(models.pair.tokenizer, kwargs):
        log.warning(
            "the chat template writes the date of the day: prompts, and what is sampled after them,"
            " are others tomorrow. Where the template takes a date, fix it with"
            ' --chat-template-kwargs, as in \'{"date_string": "26 Jul 2024"}\''
        )
    return read_prompts(
        path, tokenizer=models.pair.tokenizer, chat_template_kwargs=kwargs, **options
    )


def _room_for_a_prompt(window: int | None, response: int) -> int | None:
    """Tokens that the window leaves for a prompt beside a response; None without a window."""
    if window is not None and window <= response:
        raise DiagnosticsError(
            f"The models' window of {window} tokens leaves no room for a prompt beside a response"
            f" of --max-new-tokens {response}. Lower --max-new-tokens."
        )
    return window and window - response


def json_object(text: str, flag: str) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DiagnosticsError(f"{flag} takes a JSON object; got {text!r}.")
    return value


def rendered_sha256(prompts: list[Prompt]) -> str:
    """One hash over what the models read: a template that writes the date makes it another one
    every day.
    """
    texts = [prompt.prompt for prompt in prompts]
    return hashlib.sha256(
        json.dumps(
            texts
            + [prompt.teacher_prompt for prompt in prompts if prompt.teacher_prompt is not None]
        ).encode()
    ).hexdigest()


def training_prompts(
    models: Models, prompts, evaluation, *, needed: int, seed: int, room: int = 1
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and prompts to hold out.

    A named pair with a task writes as many of both as are `needed`; a file gives up its last
    `eval_contexts`, unless there is a file of held-out prompts. Each leaves `room` for a response.
    """
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.pair import NAMED_PAIRS

    count = evaluation.eval_contexts
    named = NAMED_PAIRS.get(models.config.pair)
    if prompts.prompts is None and named and named.task:
        write = TASKS[named.task].write
        return write(prompts.contexts or needed, seed=seed, split="train"), (
            write(count, seed=0, split="test") if count else []
        )
    found = choose_prompts(models, prompts, room=room).prompts
    if evaluation.eval_prompts:
        held_out = dataclasses.replace(
            prompts, prompts=evaluation.eval_prompts, prompts_split=None, contexts=count
        )
        return found, choose_prompts(models, held_out, room=room).prompts if count else []
    return found[: len(found) - count], found[len(found) - count :]
