"""Sample the student once and freeze what it wrote.

Each context draws from a random stream of its own, named by (seed, prompt id, sample number), through the
inverse of the cumulative distribution. The text therefore does not depend on which prompts share a batch,
beyond the rounding of the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics import parallel
from diagnostics.pairs import Pair
from diagnostics.projection import wide_head
from diagnostics.prompts import encode_prompt
from diagnostics.runs import Shards, progress
from diagnostics.types import Bank, Context, DiagnosticsError, Prompt


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature; the KL temperature stays 1"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus mass; 1 keeps the whole vocabulary"})
    top_k: int = field(default=0, metadata={"help": "sample from so many likeliest tokens; 0 from all"})
    samples_per_prompt: int = field(default=1, metadata={"help": "responses to each prompt"})
    seed: int = field(default=0, metadata={"help": "seed of sampling"})


def rollout(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples_per_prompt: int = 1,
    seed: int = 0,
    batch_tokens: int = 8192,
    shards: Shards | None = None,
) -> Bank:
    """Sample `samples_per_prompt` responses to each prompt from the student and freeze them.

    Responses end at an end-of-sequence token, which is kept as their last id, or after `max_new_tokens`.
    Returns a Bank in prompt order. shards: where finished batches are kept, and taken from. Raises DiagnosticsError for settings out of range or a prompt without tokens.
    """
    if not 0 < top_p <= 1 or top_k < 0:
        raise DiagnosticsError(f"top_p={top_p} must lie in (0, 1], where 1 keeps every token, and top_k={top_k} must not be negative; 0 keeps every token.")
    if max_new_tokens < 1 or samples_per_prompt < 1 or not 0 < temperature < float("inf"):
        raise DiagnosticsError(
            f"max_new_tokens={max_new_tokens}, samples_per_prompt={samples_per_prompt} and temperature={temperature} must be positive."
        )
    requests = [_Request(prompt, sample, encode_prompt(pair.tokenizer, prompt.prompt)) for prompt in prompts for sample in range(samples_per_prompt)]
    empty = next((request for request in requests if not request.prompt_ids), None)
    if empty is not None:
        raise DiagnosticsError(f"Prompt {empty.prompt.prompt_id!r} has no tokens ({empty.prompt.prompt[:60]!r}). Remove it, or add a start token.")
    written = np.zeros((len(requests), max_new_tokens))  # id + 1; 0 after the end
    options, shards = (temperature, top_p, top_k, pair.vocabulary), shards or Shards()
    todo = parallel.share(list(_batches(requests, batch_tokens, max_new_tokens)), len)
    with progress(total=sum(map(len, todo)), description="rollout", unit=" contexts") as bar:
        for batch in todo:
            found = shards.take(batch)
            responses = _responses(pair, [requests[i] for i in batch], seed, options, max_new_tokens) if found is None else found["ids"]
            if found is None:
                shards.add(batch, {"ids": responses})
            for i, ids in zip(batch, responses):
                written[i, : len(ids)] = np.array(ids) + 1
            bar.update(len(batch))
    ids_NT = parallel.total(written).astype(int)
    return Bank(tuple(_freeze(pair, request, (row[row > 0] - 1).tolist()) for request, row in zip(requests, ids_NT)))


def _responses(pair: Pair, requests: list[_Request], seed: int, options: tuple, max_new_tokens: int) -> list[list[int]]:
    chooser = Chooser([request.stream(seed) for request in requests], *options)
    return generate(pair.student.model, [request.prompt_ids for request in requests], chooser, end_ids=pair.end_ids, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]

    def stream(self, seed: int) -> np.random.Generator:
        return stream(seed, self.prompt.prompt_id, self.sample)


def stream(*name) -> np.random.Generator:
    """The random stream of that name: the same parts give the same draws, other parts others."""
    text = "/".join(map(str, name)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))


def _batches(requests: list[_Request], batch_tokens: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Request numbers grouped by prompt length, so that padding is small."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * (len(requests[i].prompt_ids) + max_new_tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


class Chooser:
    """Picks each row's next token from its own stream; a logits processor for greedy `generate`."""

    def __init__(self, streams: list[np.random.Generator], temperature: float, top_p: float, top_k: int, vocabulary: int):
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.streams, self.temperature, self.vocabulary = streams, temperature, vocabulary
        self.warpers = ([TopKLogitsWarper(top_k)] if top_k > 0 else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        scores_BV = logits_BV.double() / self.temperature
        scores_BV[:, self.vocabulary :] = -torch.inf
        for warper in self.warpers:
            scores_BV = warper(ids_BT, scores_BV)
        cumulative_BV = scores_BV.softmax(-1).cumsum(-1)
        uniform_B1 = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64, device=cumulative_BV.device)
        chosen_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
        chosen_B1 = chosen_B1.clamp_max(logits_BV.shape[-1] - 1)
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, chosen_B1, 0.0)


@torch.no_grad()
def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], chooser: Chooser, *, end_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Continue prompts (ids, padded on the left here); each result stops after its first end token, which it keeps."""
    from transformers import GenerationConfig, LogitsProcessorList

    width, device = max(map(len, prompts)), next(model.parameters()).device
    filler = end_ids[0] if end_ids else 0
    ids_BT = torch.tensor([[filler] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(end_ids) or None, pad_token_id=filler)
    with wide_head(model):
        output_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, logits_processor=LogitsProcessorList([chooser])
        )
    return [_until_end(row, end_ids) for row in output_BT[:, width:].tolist()]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [place for place, i in enumerate(ids) if i in end_ids]
    return ids[: ends[0] + 1] if ends else ids


def _freeze(pair: Pair, request: _Request, ids: list[int]) -> Context:
    return Context(
        context_id=f"{request.prompt.prompt_id}-{request.sample}",
        prompt_id=request.prompt.prompt_id,
        prompt=request.prompt.prompt,
        prompt_ids=request.prompt_ids,
        response=pair.tokenizer.decode(ids, skip_special_tokens=True),
        response_ids=tuple(ids),
        finished=bool(ids) and ids[-1] in pair.end_ids,
        teacher_prompt=request.prompt.teacher_prompt,
        teacher_prompt_ids=None if request.prompt.teacher_prompt is None else encode_prompt(pair.tokenizer, request.prompt.teacher_prompt),
    )
