"""Which prompts a command works on, and which are held out for evaluation."""

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
"""Number of prompts that a pair with a task of its own writes where none is given."""


def choose_prompts(models: Models, config, *, room: int = 1) -> PromptSet:
    """Return the prompts of the file or data set, or those that a named pair brings.

    Args:
        models: The lazily loaded pair.
        config: A PromptConfig.
        room: Tokens of the models' window that each prompt must leave for a response.

    Returns:
        The prompts and their counts.

    Raises:
        DiagnosticsError: There are no prompts, or the window is too small for the response.
    """
    from diagnostics.contexts.encoding import uses_clock
    from diagnostics.contexts.prompts import PromptSet, read_prompts
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.named_pairs import NAMED_PAIRS

    options = dataclasses.asdict(config)
    path = options.pop("prompts")
    kwargs = json_object(options.pop("chat_template_kwargs"), "--chat-template-kwargs")
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
        path,
        tokenizer=models.pair.tokenizer,
        teacher_tokenizer=models.pair.teacher_reads,
        chat_template_kwargs=kwargs,
        **options,
    )


def _room_for_a_prompt(window: int | None, response: int) -> int | None:
    """Return the tokens that the window leaves for a prompt beside a response; None without a
    window.
    """
    if window is not None and window <= response:
        raise DiagnosticsError(
            f"The models' window of {window} tokens leaves no room for a prompt beside a response"
            f" of --max-new-tokens {response}. Lower --max-new-tokens."
        )
    return window and window - response


def json_object(text: str, flag: str) -> dict:
    """Return the JSON object that a flag was given. Raises DiagnosticsError for anything else."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DiagnosticsError(f"{flag} takes a JSON object; got {text!r}.")
    return value


def rendered_sha256(prompts: list[Prompt]) -> str:
    """Return one hash over what the models read; a template that writes the date changes it."""
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
    """Return prompts to train on and prompts to hold out.

    A named pair with a task writes as many of both as are needed. A file gives its last
    `eval_contexts` prompts, unless a file of held-out prompts is given.

    Args:
        models: The lazily loaded pair.
        prompts: A PromptConfig.
        evaluation: An EvaluationConfig.
        needed: Number of training prompts that a task should write.
        seed: Seed of the training prompts that a task writes.
        room: Tokens of the models' window that each prompt must leave for a response.

    Returns:
        Training prompts and held-out prompts.
    """
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.named_pairs import NAMED_PAIRS

    count = evaluation.eval_contexts
    named = NAMED_PAIRS.get(models.config.pair)
    held_out = []
    if evaluation.eval_prompts and count:
        file = dataclasses.replace(
            prompts, prompts=evaluation.eval_prompts, prompts_split=None, contexts=count
        )
        held_out = choose_prompts(models, file, room=room).prompts
    if prompts.prompts is None and named and named.task:
        write = TASKS[named.task].write
        if count and not evaluation.eval_prompts:
            held_out = write(count, seed=0, split="test")
        return write(prompts.contexts or needed, seed=seed, split="train"), held_out
    found = choose_prompts(models, prompts, room=room).prompts
    if evaluation.eval_prompts:
        return found, held_out
    return found[: len(found) - count], found[len(found) - count :]
