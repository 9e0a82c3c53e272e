"""Sample the student once and freeze what it wrote.

Each context draws from a random stream of its own, named by (seed, prompt id, sample number),
through the inverse of the cumulative distribution. The text therefore does not depend on which
prompts share a batch, beyond the rounding of the logits.

The distribution is the student's own, p, at the temperature asked for; `top_p` and `top_k` narrow
it where they are given. What a checkpoint's generation_config.json asks for besides
(repetition_penalty, suppress_tokens, num_beams, ...) would make the tokens draws from something
else than p: it is set aside, but for the ids that end a response, and named in the log and the
manifest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.generation import StreamSampler, generate, random_stream
from diagnostics.contexts.generation_settings import positions_after_turn_end, warn_before_sampling
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, progress
from diagnostics.core.types import Bank, Context, Prompt
from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
BATCH_TOKENS = 8192
"""As for scoring: what a batch may hold before padding and memory cost more than the passes
saved.
"""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens"})
    temperature: float = field(
        default=1.0, metadata={"help": "sampling temperature; the KL temperature stays 1"}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "nucleus mass; 1 keeps the whole vocabulary"}
    )
    top_k: int = field(
        default=0, metadata={"help": "sample from so many likeliest tokens; 0 from all"}
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "responses to each prompt"})
    seed: int = field(default=0, metadata={"help": "seed of sampling"})
    batch_tokens: int = field(
        default=BATCH_TOKENS, metadata={"help": "tokens in one forward pass, padding included"}
    )


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
    batch_tokens: int = BATCH_TOKENS,
    shards: Shards | None = None,
) -> Bank:
    """Sample `samples_per_prompt` responses to each prompt from the student and freeze them.

    Responses end at an end-of-sequence token, which is kept as their last id, or after
    `max_new_tokens`. Returns a Bank in prompt order. shards: where finished batches are kept, and
    taken from. Out of memory, a batch is halved. Raises DiagnosticsError for settings out of range,
    a prompt without tokens or with a token that a model lacks, and a prompt that leaves no room for
    its response in the models' window."""
    warn_before_sampling(pair)
    bank = sample_responses(
        pair,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
        batch_tokens=batch_tokens,
        shards=shards,
    )
    behind = positions_after_turn_end(pair, bank)
    if behind:
        log.warning(
            "%d of %d positions lie behind a %r (id %d) that ended the turn",
            behind["positions"],
            bank.positions,
            behind["token"],
            behind["id"],
        )
    return bank


def sample_responses(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples_per_prompt: int = 1,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    shards: Shards | None = None,
) -> Bank:
    """`rollout` without its cautions, for a student that is sampled again and again as it
    changes.
    """
    if not 0 < top_p <= 1 or top_k < 0:
        raise DiagnosticsError(
            f"top_p={top_p} must lie in (0, 1], where 1 keeps every token, and top_k={top_k} must"
            " not be negative; 0 keeps every token."
        )
    if max_new_tokens < 1 or samples_per_prompt < 1 or not 0 < temperature < float("inf"):
        raise DiagnosticsError(
            f"max_new_tokens={max_new_tokens}, samples_per_prompt={samples_per_prompt} and"
            f" temperature={temperature} must be positive."
        )
    encoded = encode_prompts(pair, prompts, max_new_tokens=max_new_tokens)
    requests = [
        _Request(prompt, sample, ids)
        for prompt, ids in zip(prompts, encoded)
        for sample in range(samples_per_prompt)
    ]
    written = np.zeros((len(requests), max_new_tokens))  # id + 1; 0 after the end
    options, shards = (temperature, top_p, top_k, pair.vocabulary), shards or Shards()
    todo = distributed.share(list(_batches(requests, batch_tokens, max_new_tokens)), len)
    with progress(total=sum(map(len, todo)), description="rollout", unit=" contexts") as bar:
        for batch in todo:
            found = shards.take(batch)
            responses = (
                _responses(pair, [requests[i] for i in batch], seed, options, max_new_tokens)
                if found is None
                else found["ids"]
            )
            if found is None:
                shards.add(batch, {"ids": responses})
            for i, ids in zip(batch, responses):
                written[i, : len(ids)] = np.array(ids) + 1
            bar.update(len(batch))
    ids_NT = distributed.sum_over_processes(written).astype(int)
    return Bank(
        tuple(
            _freeze(pair, request, (row[row > 0] - 1).tolist())
            for request, row in zip(requests, ids_NT)
        )
    )


def encode_prompts(
    pair: Pair, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Ids of each prompt, as the student reads them wherever it is sampled.

    Raises DiagnosticsError for a prompt (or teacher's prompt) without tokens, with a token that a
    model has no row for, or too long for a response of `max_new_tokens` beside it in the models'
    window."""
    encoded = [
        encode_prompt(pair.tokenizer, prompt.prompt, rendered=prompt.rendered) for prompt in prompts
    ]
    for prompt, ids in zip(prompts, encoded):
        _require_usable(pair, prompt, ids, max_new_tokens)
        teacher_ids = _teacher_ids(pair, prompt)
        if teacher_ids is not None:
            _require_usable(pair, prompt, teacher_ids, max_new_tokens)
    return encoded


def _teacher_ids(pair: Pair, prompt: Prompt) -> tuple[int, ...] | None:
    return (
        None
        if prompt.teacher_prompt is None
        else encode_prompt(pair.tokenizer, prompt.teacher_prompt, rendered=prompt.rendered)
    )


def _require_usable(pair: Pair, prompt: Prompt, ids: Sequence[int], max_new_tokens: int) -> None:
    if not ids:
        raise DiagnosticsError(
            f"Prompt {prompt.prompt_id!r} has no tokens ({prompt.prompt[:60]!r}). Remove it, or add"
            " a start token."
        )
    if max(ids) >= pair.vocabulary:
        whose = "student's" if max(ids) >= pair.student.full_vocabulary else "teacher's"
        raise DiagnosticsError(
            f"Prompt {prompt.prompt_id!r} holds the token"
            f" {pair.tokenizer.convert_ids_to_tokens(max(ids))!r} with id {max(ids)}, and the"
            f" {whose} vocabulary ends before it: {pair.vocabulary} ids are shared. Resize that"
            " model's embedding (resize_token_embeddings) and train it, or take the token out of"
            " the prompt and the chat template."
        )
    if pair.window is not None and len(ids) + max_new_tokens > pair.window:
        raise DiagnosticsError(
            f"Prompt {prompt.prompt_id!r} has {len(ids)} tokens, and with --max-new-tokens"
            f" {max_new_tokens} that is more than the models' window of {pair.window}. Lower"
            " --max-new-tokens or --max-prompt-tokens."
        )


def _responses(
    pair: Pair, requests: list[_Request], seed: int, options: tuple, max_new_tokens: int
) -> list[list[int]]:
    chooser = StreamSampler([request.stream(seed) for request in requests], *options)
    return generate(
        pair.student.model,
        [request.prompt_ids for request in requests],
        chooser,
        end_ids=pair.end_ids,
        max_new_tokens=max_new_tokens,
    )


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]

    def stream(self, seed: int) -> np.random.Generator:
        return random_stream(seed, self.prompt.prompt_id, self.sample)


def _batches(
    requests: list[_Request], batch_tokens: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Request numbers grouped by prompt length, so that padding is small."""
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
    batch: list[int] = []
    for i in order:
        if (
            batch
            and (len(batch) + 1) * (len(requests[i].prompt_ids) + max_new_tokens) > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(i)
    yield batch


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
        teacher_prompt_ids=_teacher_ids(pair, request.prompt),
    )
