"""Continue prompts token by token, each prompt from its own random stream.

Axes in names: B prompts of a batch, T tokens, V vocabulary."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.contexts.generation_settings import without_own_settings
from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure.projection import wide_head

log = logging.getLogger("diagnostics")


def random_stream(*name) -> np.random.Generator:
    """Return the random generator with that name: equal parts give equal draws."""
    text = "/".join(map(str, name)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))


class StreamSampler:
    """A logits processor that picks each row's next token from the row's own random stream.

    It leaves one finite logit per row, so `generate` in greedy mode takes exactly that token.

    Args:
        streams: One random generator per prompt of the batch.
        temperature: Sampling temperature, greater than 0.
        top_p: Nucleus mass; 1 keeps the whole vocabulary.
        top_k: Number of most likely tokens to sample from; 0 keeps all.
        vocabulary: Number of ids that may be drawn; later ids get probability 0.
    """

    def __init__(
        self,
        streams: list[np.random.Generator],
        temperature: float,
        top_p: float,
        top_k: int,
        vocabulary: int,
    ):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.streams, self.temperature, self.vocabulary = streams, temperature, vocabulary
        self.warpers = ([TopKLogitsWarper(top_k)] if top_k > 0 else []) + (
            [TopPLogitsWarper(top_p)] if top_p < 1 else []
        )

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Return logits [B, V] that are 0 at the drawn token and -inf elsewhere."""
        scores_BV = logits_BV.double() / self.temperature
        scores_BV[:, self.vocabulary :] = -torch.inf
        for warper in self.warpers:
            scores_BV = warper(ids_BT, scores_BV)
        # Float64, so that the draw does not depend on how a float32 sum over V is rounded.
        cumulative_BV = scores_BV.softmax(-1).cumsum(-1)
        uniform_B1 = torch.tensor(
            [[stream.random()] for stream in self.streams],
            dtype=torch.float64,
            device=cumulative_BV.device,
        )
        chosen_B1 = torch.searchsorted(
            cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True
        )
        # A uniform number near 1 may land behind the last entry.
        chosen_B1 = chosen_B1.clamp_max(logits_BV.shape[-1] - 1)
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B1, 0.0)

    def part(self, rows: slice) -> StreamSampler:
        """Return a sampler for these rows alone; the streams are shared, not copied."""
        part = copy.copy(self)
        part.streams = self.streams[rows]
        return part


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampler: StreamSampler,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    halves: bool = True,
) -> list[list[int]]:
    """Continue prompts, and cut each continuation after its first end token, which is kept.

    Where memory runs out, the prompts are continued in two halves, repeatedly down to single
    prompts, with the same draws.

    Args:
        model: Causal language model with transformers' `generate`.
        prompts: Token ids of each prompt; they are padded on the left here.
        sampler: Picks the tokens; it holds one stream per prompt.
        end_ids: Ids that end a continuation.
        max_new_tokens: Longest continuation, in tokens.
        halves: Whether to halve where memory runs out. False for a model whose forward passes
            several processes must make together.

    Returns:
        One list of new token ids per prompt.

    Raises:
        DiagnosticsError: A single prompt does not fit in memory.
    """
    states = [stream.bit_generator.state for stream in sampler.streams]
    try:
        return _generate(model, prompts, sampler, end_ids, max_new_tokens)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if not halves:
            raise
        _require_halves(prompts, max_new_tokens, error)
    log.warning(
        "%d prompts with %d new tokens each do not fit in memory at once: halved",
        len(prompts),
        max_new_tokens,
    )
    for stream, state in zip(sampler.streams, states):
        stream.bit_generator.state = state
    middle = len(prompts) // 2
    parts = (slice(0, middle), slice(middle, None))
    return [
        ids
        for rows in parts
        for ids in generate(
            model, prompts[rows], sampler.part(rows), end_ids=end_ids, max_new_tokens=max_new_tokens
        )
    ]


def _require_halves(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, error: BaseException
) -> None:
    """Raise DiagnosticsError where a batch of one prompt cannot be halved any more."""
    if len(prompts) == 1:
        raise DiagnosticsError(
            f"One prompt of {len(prompts[0])} tokens with {max_new_tokens} new ones does not fit in"
            f" memory ({(str(error).splitlines() or ['out of memory'])[0]}). Use --offload-teacher,"
            " a larger device, shorter prompts or a smaller --max-new-tokens."
        ) from error


@torch.no_grad()
def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: StreamSampler,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue all prompts in one batch; arguments and result as in `generate`."""
    from transformers import GenerationConfig, LogitsProcessorList

    width, device = max(map(len, prompts)), next(model.parameters()).device
    filler = next((i for i in end_ids if i < sampler.vocabulary), 0)
    ids_BT = torch.tensor(
        [[filler] * (width - len(ids)) + list(ids) for ids in prompts], device=device
    )
    mask_BT = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
    )
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(end_ids) or None,
        pad_token_id=filler,
    )
    with without_own_settings(model), wide_head(model):
        output_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=settings,
            logits_processor=LogitsProcessorList([sampler]),
        )
    return [_cut_at_end(row, end_ids) for row in output_BT[:, width:].tolist()]


def _cut_at_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Return the ids up to and including the first end token."""
    ends = [place for place, i in enumerate(ids) if i in end_ids]
    return ids[: ends[0] + 1] if ends else ids
