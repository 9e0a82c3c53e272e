"""What a checkpoint's generation settings ask for, and how sampling treats them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.models.special_tokens import turn_end

log = logging.getLogger("diagnostics")
HONORED_SETTINGS = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
    "do_sample",
    "use_cache",
    "cache_implementation",
)
"""Generation settings that sampling follows, or that cannot change a token."""
NEUTRAL_VALUES = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}
"""Values of generation settings that have no effect."""


def sampled_from(*, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = 0) -> str:
    """Describe the distribution that responses are drawn from, as the manifest names it.
    `temperature`, `top_p` and `top_k` are as in `rollout`.
    """
    narrowed = ([f"the {top_k} likeliest tokens of it"] if top_k else []) + (
        [f"the nucleus of mass {top_p:g} of that"] if top_p < 1 else []
    )
    return ", ".join(
        [f"p, the student's distribution, at temperature {temperature:g}", *narrowed]
    ) + (", renormalised" if narrowed else "")


def ignored_settings(model: nn.Module) -> dict[str, Any]:
    """Return the checkpoint's generation settings that sampling does not follow, by name."""
    settings = getattr(model, "generation_config", None)
    asked = settings.to_diff_dict() if settings is not None else {}
    return {
        name: value if isinstance(value, (bool, int, float, str, list)) else str(value)
        for name, value in sorted(asked.items())
        if name not in HONORED_SETTINGS
        and not name.startswith("_")
        and value not in (None, False, [], {}, NEUTRAL_VALUES.get(name))
    }


def sampling_facts(pair: Pair, **options) -> dict[str, Any]:
    """Return what the manifest says about sampling. options: as in `sampled_from`."""
    aside = ignored_settings(pair.student.model)
    return {"sampled_from": sampled_from(**options)} | (
        {"generation_config_set_aside": aside} if aside else {}
    )


def warn_before_sampling(pair: Pair) -> None:
    """Warn where this checkpoint's settings promise a behavior that sampling does not have, or
    where no token can end a response.
    """
    aside = ignored_settings(pair.student.model)
    if aside:
        log.warning(
            "the student's generation_config.json asks for %s: ignored, tokens are drawn from the"
            " student's own distribution",
            ", ".join(f"{name}={value}" for name, value in aside.items()),
        )
    end = unlisted_turn_end(pair)
    if end is not None:
        log.warning(
            "the chat template ends a turn with %r, which does not end a response: add its id %d to"
            " eos_token_id in the student's generation_config.json, or responses continue after it",
            pair.tokenizer.convert_ids_to_tokens(end),
            end,
        )
    if not any(i < pair.vocabulary for i in pair.end_ids):
        log.warning(
            "no token that ends a response is among the %d shared ids (end ids: %s): every response"
            " runs to the maximum length",
            pair.vocabulary,
            list(pair.end_ids) or "none",
        )


def make_savable(model: Any) -> None:
    """Repair generation settings that transformers refuses to write once training has changed them.

    Many checkpoints set a temperature without do_sample. Where that is not the whole contradiction,
    only the start, end and padding ids are kept, and a warning says so: a training must not fail at
    a file that this program never reads.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None or _is_valid(settings):
        return
    sampled = copy.deepcopy(settings)
    sampled.do_sample = True
    ids = {
        name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model.generation_config = sampled if _is_valid(sampled) else GenerationConfig(**ids)
    if model.generation_config is not sampled:
        log.warning(
            "the student's generation_config.json contradicts itself; the trained student keeps"
            " only its start, end and padding ids"
        )


def _is_valid(settings) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def unlisted_turn_end(pair: Pair) -> int | None:
    """Return the special token that ends the assistant's turn in the chat template but is not an
    end id of the pair; None where there is none.
    """
    end = turn_end(pair.tokenizer)
    return None if end in pair.end_ids else end


def positions_after_turn_end(pair: Pair, bank: Bank) -> dict[str, Any]:
    """Count the responses that continue after the template's end of a turn.

    Args:
        pair: The pair whose student wrote the responses.
        bank: Frozen contexts.

    Returns:
        `token`, `id`, number of `responses` and of `positions` after that token; {} where there
        are none.
    """
    end = unlisted_turn_end(pair)
    if end is None:
        return {}
    behind = [
        len(context.response_ids) - 1 - context.response_ids.index(end)
        for context in bank
        if end in context.response_ids
    ]
    if not sum(behind):
        return {}
    return {
        "token": pair.tokenizer.convert_ids_to_tokens(end),
        "id": end,
        "responses": sum(map(bool, behind)),
        "positions": sum(behind),
    }


@contextmanager
def without_own_settings(model: nn.Module) -> Iterator[None]:
    """Remove the checkpoint's own generation settings while the block runs.

    `generate` fills every setting that ours leave open from them. Wrappers (adapters, sharding)
    hold settings of their own or look up those of the wrapped model, so all modules are searched.
    """
    from transformers import GenerationConfig

    holders: list[Any] = [
        module
        for module in model.modules()
        if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    own = [module.generation_config for module in holders]
    for module in holders:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, settings in zip(holders, own):
            module.generation_config = settings
