"""Continue prompts token by token, each from a random stream of its own."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.contexts.generation_settings import without_own_settings
from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure.projection import wide_head

log = logging.getLogger("diagnostics")


def random_stream(*name) -> np.random.Generator:
    """The random stream of that name: the same parts give the same draws, other parts others."""
    text = "/".join(map(str, name)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))


class StreamSampler:
    """Picks each row's next token from its own stream; a logits processor for greedy `generate`."""

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
        scores_BV = logits_BV.double() / self.temperature
        scores_BV[:, self.vocabulary :] = -torch.inf
        for warper in self.warpers:
            scores_BV = warper(ids_BT, scores_BV)
        cumulative_BV = scores_BV.softmax(-1).cumsum(-1)
        uniform_B1 = torch.tensor(
            [[stream.random()] for stream in self.streams],
            dtype=torch.float64,
            device=cumulative_BV.device,
        )
        chosen_B1 = torch.searchsorted(
            cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True
        )
        chosen_B1 = chosen_B1.clamp_max(logits_BV.shape[-1] - 1)
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B1, 0.0)

    def part(self, rows: slice) -> StreamSampler:
        """The chooser of these rows alone."""
        part = copy.copy(self)
        part.streams = self.streams[rows]
        return part


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    chooser: StreamSampler,
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    halves: bool = True,
) -> list[list[int]]:
    """Continue prompts (ids, padded on the left here); each result stops after its first end token,
    which it keeps.

    Out of memory, the prompts are continued in two halves, again and again down to one, with the
    same draws. halves: False for a model whose passes several processes must make together. Raises
    DiagnosticsError where one does not fit."""
    states = [stream.bit_generator.state for stream in chooser.streams]
    try:
        return _generate(model, prompts, chooser, end_ids, max_new_tokens)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if not halves:
            raise
        _require_halves(prompts, max_new_tokens, error)
    log.warning(
        "%d prompts with %d new tokens each do not fit in memory at once: halved",
        len(prompts),
        max_new_tokens,
    )
    for stream, state in zip(chooser.streams, states):
        stream.bit_generator.state = state
    middle = len(prompts) // 2
    parts = (slice(0, middle), slice(middle, None))
    return [
        ids
        for rows in parts
        for ids in generate(
            model, prompts[rows], chooser.part(rows), end_ids=end_ids, max_new_tokens=max_new_tokens
        )
    ]


def _require_halves(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, error: BaseException
) -> None:
    if len(prompts) == 1:
        raise DiagnosticsError(
            f"One prompt of {len(prompts[0])} tokens with {max_new_tokens} new ones does not fit in"
            f" memory ({(str(error).splitlines() or ['out of memory'])[0]}). Use --offload-teacher,"
            " a larger device, shorter prompts or a smaller --max-new-tokens."
        ) from error


@torch.no_grad()
def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    chooser: StreamSampler,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    width, device = max(map(len, prompts)), next(model.parameters()).device
    filler = next((i for i in end_ids if i < chooser.vocabulary), 0)
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
            logits_processor=LogitsProcessorList([chooser]),
        )
    return [_cut_at_end(row, end_ids) for row in output_BT[:, width:].tolist()]


def _cut_at_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [place for place, i in enumerate(ids) if i in end_ids]
    return ids[: ends[0] + 1] if ends else ids
