"""How many tokens go into one forward pass, where nobody says.

On the CPU, and wherever free memory is not known, it is `BATCH_TOKENS`; in a pass with a gradient,
at most what `GRADIENT_BYTES` hold, since a process that outgrows main memory is ended. On CUDA it
is what the free memory holds. Both go by an estimate of the bytes that a token needs, with M
layers, H the hidden size, I the width of the feed-forward part, K the key-value width (heads times
their size) and V the vocabulary, in elements of the model's dtype unless bytes are named:

    score       8 H + 4 I                           the widest layer; no other is kept
    sample      2 K M + 8 H + 4 I + 40 V/L bytes    the cache, and a row's distribution in float64
                                                    over the L tokens of a row
    gradient    M (12 H + 5 I)                      what the backward pass needs of every layer

Half of a card's free memory is planned for, and the number is rounded down to a power of two, so
that a few megabytes more or less in use do not change the batches. An estimate that was too high is
no error: a batch that does not fit is halved where it is run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

log = logging.getLogger("diagnostics")
BATCH_TOKENS = 8192
"""Tokens of a pass on the CPU, where larger batches lose more to padding and to the cache than they
save in passes.
"""
GRADIENT_BYTES = 1 << 30
"""Bytes that the layers of a pass with a gradient may keep on the CPU, by the estimate."""
LEAST, MOST = 1024, 131_072
"""Bounds of a number that was chosen: below it passes are too small to fill a card, and above it
they do not become faster.
"""
PLANNED = 0.5
"""Share of the free memory that a batch may take by the estimate. The rest is for logits, for
states that wait, and for what the estimate leaves out.
"""
ROW_BYTES = 40
"""Bytes per id of the vocabulary and row while a token is drawn: the logits twice in float32, and
scaled, as probabilities, summed up and sorted in float64.
"""
FLAG = {
    "help": (
        "tokens in one forward pass, padding included; 8192 on the CPU (fewer for the gradient of a"
        " large student) and what memory holds on a GPU where not given"
    )
}
"""Metadata of a setting `batch_tokens`."""
Use = Literal["score", "sample", "gradient"]


def choose(
    asked: int | None,
    models: Iterable[Any],
    *,
    use: Use = "score",
    row_tokens: int = 1,
) -> int:
    """The number of tokens, padding included, in one forward pass.

    Args:
        asked: What the user asked for; None chooses.
        models: The models that run on the batches, as transformers has them. They are on their
            device already.
        use: What is done: a forward pass, sampling with a cache, or a pass with a gradient.
        row_tokens: Tokens of one row of a batch, which share the row's distribution in sampling.

    Returns:
        `asked`, or the number that the module's head describes.
    """
    if asked is not None:
        return asked
    models = list(models)
    free = min((_free(model) for model in models), default=None, key=_or_infinite)
    if free is None and (use != "gradient" or not models):
        return BATCH_TOKENS
    needed = max(token_bytes(model, use=use, row_tokens=row_tokens) for model in models)
    if free is None:
        return min(BATCH_TOKENS, _power_of_two(GRADIENT_BYTES / needed))
    tokens = fitting(free, needed)
    log.info(
        "batches of %d tokens: %.1f GB are free, and a token needs about %.0f kB",
        tokens,
        free / 1e9,
        needed / 1e3,
    )
    return tokens


def fitting(free: int, needed: float) -> int:
    """The power of two of tokens, within the bounds, that `PLANNED` of the free bytes hold.

    Args:
        free: Free bytes.
        needed: Bytes per token.
    """
    return min(MOST, max(LEAST, _power_of_two(PLANNED * free / needed)))


def _power_of_two(number: float) -> int:
    """The largest power of two that is not above a number; 1 where that is below 1."""
    return 1 << (max(1, int(number)).bit_length() - 1)


def token_bytes(model: Any, *, use: Use, row_tokens: int = 1) -> float:
    """The estimate of the bytes that one token needs, as the module's head has it.

    Args:
        model: A causal language model of transformers.
        use: As in `choose`.
        row_tokens: As in `choose`.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = getattr(config, "num_hidden_layers", 1)
    size = model.dtype.itemsize
    if use == "gradient":
        return size * layers * (12 * hidden + 5 * inner)
    widest = size * (8 * hidden + 4 * inner)
    if use == "score":
        return widest
    row = ROW_BYTES * config.vocab_size / max(1, row_tokens)
    return widest + size * 2 * layers * _key_width(config) + row


def _key_width(config: Any) -> int:
    """Width of a layer's keys: heads of keys and values times the size of a head."""
    heads = getattr(config, "num_attention_heads", 1) or 1
    own = getattr(config, "num_key_value_heads", None) or heads
    return own * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _free(model: Any) -> int | None:
    """Free bytes on a model's device; None where it is no CUDA device."""
    import torch  # not at the top, since the command line reads this module without torch

    place = next(model.parameters()).device
    if place.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(place)
    # what torch holds and nothing uses is free as well
    return free + torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)


def _or_infinite(free: int | None) -> float:
    return float("inf") if free is None else free
