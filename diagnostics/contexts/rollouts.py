"""Sample the student once and freeze what it wrote.

The tokens are drawn from the student's own distribution p at the requested temperature; `top_p` and
`top_k` narrow it where they are set. Each context draws from its own random stream, named by (seed,
prompt id, sample number), by inverting the cumulative distribution. The text therefore does not
depend on which prompts share a batch, except for the rounding of the logits. With `rollout_engine`
vLLM samples in the place of transformers (`vllm_rollouts`).

A checkpoint's generation_config.json may ask for more (repetition_penalty, suppress_tokens,
num_beams, ...). The tokens would then be drawn from something other than p, so these settings are
ignored, except for the ids that end a response. The log and the manifest name what was ignored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diagnostics.contexts import generation, vllm_rollouts
from diagnostics.contexts.config import ENGINES, RolloutConfig
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.generation import StreamSampler, random_stream
from diagnostics.contexts.generation_settings import positions_after_turn_end, warn_before_sampling
from diagnostics.contexts.prompts import Given, as_prompts
from diagnostics.contexts.verifiers import judge_rollouts
from diagnostics.contexts.vllm_rollouts import Sampled
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, progress
from diagnostics.core.types import CONTEXTS_TOGETHER, Bank, Context, Prompt, shared_ids
from diagnostics.models import batch_size
from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")


def rollout(
    pair: Pair,
    prompts: Given,
    *,
    max_new_tokens: int = RolloutConfig.max_new_tokens,
    temperature: float = RolloutConfig.temperature,
    top_p: float = RolloutConfig.top_p,
    top_k: int = RolloutConfig.top_k,
    samples_per_prompt: int = RolloutConfig.samples_per_prompt,
    seed: int = RolloutConfig.seed,
    batch_tokens: int | None = RolloutConfig.batch_tokens,
    rollout_engine: str = RolloutConfig.rollout_engine,
    verifier: str = RolloutConfig.verifier,
    shards: Shards | None = None,
) -> Bank:
    """Sample responses to each prompt from the student and freeze them.

    A response ends at an end-of-sequence token, which is kept as its last id, or after
    `max_new_tokens`. A batch that does not fit in memory is halved. Warnings about the checkpoint's
    own generation settings go to the log.

    Args:
        pair: Student and teacher with their shared tokenizer; only the student is run.
        prompts: Prompts as `load_prompts` or `sums` returns them; or what `load_prompts` reads: a
            path, or texts or rows, which are rendered with the pair's chat template.
        max_new_tokens: Longest response, in tokens.
        temperature: Sampling temperature, greater than 0. The divergences keep temperature 1.
        top_p: Nucleus mass in (0, 1]; 1 keeps the whole vocabulary.
        top_k: Number of most likely tokens to sample from; 0 keeps all.
        samples_per_prompt: Number of responses per prompt.
        seed: Seed of sampling. Equal seeds give equal responses, whatever the batches are.
        batch_tokens: Tokens per forward pass, padding included; None takes 8,192 on the CPU, and on
            CUDA what the free memory holds (`models.batch_size`).
        rollout_engine: `transformers`, or `vllm` where that is installed; its contexts have the
            log-probabilities that it reports (`Context.sampled_logprobs`).
        verifier: What judges the responses to prompts with an answer (`contexts.verifiers`).
        shards: Where finished batches are kept and taken from again; None keeps nothing.

    Returns:
        A Bank in prompt order with `len(prompts) * samples_per_prompt` contexts, whose ids are
        `<prompt_id>-<sample>`.

    Raises:
        DiagnosticsError: There is no prompt; a setting is out of range; a prompt has no tokens or a
            token that a model lacks; a prompt leaves no room for its response in the models'
            window; or vLLM is asked for and cannot sample.
    """
    prompts = as_prompts(prompts, pair)
    bank = sampled(
        pair,
        prompts,
        RolloutConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            batch_tokens=batch_tokens,
            rollout_engine=rollout_engine,
        ),
        shards=shards,
    )
    return judge_rollouts(bank, prompts, verifier, pair=pair.name)[0]


def sampled(
    pair: Pair, prompts: Sequence[Prompt], config: RolloutConfig, *, shards: Shards | None = None
) -> Bank:
    """Sample as `rollout` does, without judging the responses. Errors are those of `rollout`."""
    options = dataclasses.asdict(config)
    del options["verifier"]
    warn_before_sampling(pair)
    bank = sample_responses(pair, prompts, **options, shards=shards)
    behind = positions_after_turn_end(pair, bank)
    if behind:
        log.warning(
            "%d of %d positions come after a %r (id %d) that ended the turn",
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
    max_new_tokens: int = RolloutConfig.max_new_tokens,
    temperature: float = RolloutConfig.temperature,
    top_p: float = RolloutConfig.top_p,
    top_k: int = RolloutConfig.top_k,
    samples_per_prompt: int = RolloutConfig.samples_per_prompt,
    seed: int = RolloutConfig.seed,
    batch_tokens: int | None = RolloutConfig.batch_tokens,
    rollout_engine: str = RolloutConfig.rollout_engine,
    shards: Shards | None = None,
) -> Bank:
    """Sample as `rollout` does, without its warnings: for a student that is sampled repeatedly
    while it changes. Arguments, result and errors are those of `rollout`.
    """
    config = RolloutConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
        batch_tokens=batch_tokens,
        rollout_engine=rollout_engine,
    )
    _require_in_range(config)
    requests = [
        _Request(prompt, sample, ids)
        for prompt, ids in zip(
            prompts, encode_prompts(pair, prompts, max_new_tokens=max_new_tokens)
        )
        for sample in range(samples_per_prompt)
    ]
    responses = _sample_requests(pair, requests, config, shards or Shards())
    return Bank(tuple(_freeze(pair, *both) for both in zip(requests, responses)))


def resample(pair: Pair, contexts: Sequence[Context], *, max_new_tokens: int, seed: int) -> Bank:
    """Answer the prompts of frozen contexts anew, with the student as it is now.

    The prompts' ids are those of the contexts, so that nothing depends on how they were rendered.
    Equal seeds give equal random numbers to every student.

    Args:
        pair: The student and the tokenizer.
        contexts: The frozen contexts; several of one prompt get streams of their own.
        max_new_tokens: Longest response, in tokens.
        seed: Seed of sampling.

    Returns:
        The same contexts with new responses, sampled at temperature 1.
    """
    config = RolloutConfig(max_new_tokens=max_new_tokens, seed=seed)
    _require_in_range(config)
    samples: dict[str, int] = {}
    requests = []
    for context in contexts:
        sample = samples.get(context.prompt_id, 0)
        samples[context.prompt_id] = sample + 1
        prompt = Prompt(context.prompt_id, context.prompt)
        requests.append(_Request(prompt, sample, context.prompt_ids))
    written = _sample_requests(pair, requests, config, Shards())
    frozen = [_freeze(pair, *both) for both in zip(requests, written)]
    return Bank(
        tuple(
            dataclasses.replace(
                old,
                response=new.response,
                response_ids=new.response_ids,
                finished=new.finished,
                correct=None,  # the old response's
                supervised=None,
                sampled_logprobs=new.sampled_logprobs,
            )
            for old, new in zip(contexts, frozen, strict=True)
        )
    )


def _require_in_range(config: RolloutConfig) -> None:
    """Raise DiagnosticsError for a setting that sampling cannot follow."""
    if not 0 < config.top_p <= 1 or config.top_k < 0:
        raise DiagnosticsError(
            f"top_p={config.top_p} must lie in (0, 1], where 1 keeps every token, and"
            f" top_k={config.top_k} must not be negative; 0 keeps every token."
        )
    if (
        config.max_new_tokens < 1
        or config.samples_per_prompt < 1
        or not 0 < config.temperature < float("inf")
    ):
        raise DiagnosticsError(
            f"max_new_tokens={config.max_new_tokens},"
            f" samples_per_prompt={config.samples_per_prompt} and"
            f" temperature={config.temperature} must be positive."
        )
    if config.rollout_engine not in ENGINES:
        raise DiagnosticsError(
            f"Unknown rollout_engine {config.rollout_engine!r}. Known are {', '.join(ENGINES)}."
        )


def _sample_requests(
    pair: Pair, requests: list[_Request], config: RolloutConfig, shards: Shards
) -> list[Sampled]:
    """Sample all requests with the engine that was asked for."""
    if config.rollout_engine == "vllm":
        return _sample_with_vllm(pair, requests, config, shards)
    return [Sampled(ids) for ids in _sample_ids(pair, requests, config, shards)]


def _sample_ids(
    pair: Pair, requests: list[_Request], config: RolloutConfig, shards: Shards
) -> list[tuple[int, ...]]:
    """Sample all requests, each process its share of the batches; the ids of every response."""
    written: dict[int, tuple[int, ...]] = {}
    tokens = chosen_batch_tokens(pair, config)
    batches = list(_batches(requests, tokens, config.max_new_tokens))
    # a sharded student needs every process at every token, so all sample all responses
    together = pair.student.sharded
    todo = batches if together else distributed.share(batches, len)
    with progress(total=sum(map(len, todo)), description="rollout", unit=" contexts") as bar:
        for batch in todo:
            found = shards.take(batch)
            if found is None:
                found = {"ids": _responses(pair, [requests[i] for i in batch], config)}
                if not together or distributed.is_main():
                    shards.add(batch, found)
            for i, ids in zip(batch, found["ids"]):
                written[i] = shared_ids(ids)
            bar.update(len(batch))
    if together:
        return [written[i] for i in range(len(requests))]
    return _of_all_processes(written, len(requests), config.max_new_tokens)


def _of_all_processes(
    written: dict[int, tuple[int, ...]], count: int, longest: int
) -> list[tuple[int, ...]]:
    """The ids of every response, each of which one process has written."""
    if distributed.world() == 1:
        return [written[i] for i in range(count)]
    whole: list[tuple[int, ...]] = []
    for first in range(0, count, CONTEXTS_TOGETHER):
        # processes add up their rows, so a row holds id + 1, and 0 after the response's end
        ids_nT = np.zeros((min(CONTEXTS_TOGETHER, count - first), longest))
        for i in range(first, first + len(ids_nT)):
            own = written.get(i, ())
            ids_nT[i - first, : len(own)] = np.array(own, dtype=float) + 1
        ids_nT = distributed.sum_over_processes(ids_nT).astype(int)
        whole += [shared_ids((row[row > 0] - 1).tolist()) for row in ids_nT]
    return whole


def chosen_batch_tokens(pair: Pair, config: RolloutConfig) -> int:
    """Tokens per forward pass of sampling: what was asked for, or what memory holds.

    Args:
        pair: The student, on its device.
        config: What was asked for.
    """
    return batch_size.choose(
        config.batch_tokens,
        [pair.student.model],
        use="sample",
        row_tokens=config.max_new_tokens,  # without the prompt: rather too small than too large
    )


def engine_facts(config: RolloutConfig) -> dict[str, Any]:
    """What the manifest records of how responses were sampled: vLLM's version, or the size of a
    batch.
    """
    if config.rollout_engine == "vllm":
        return {"vllm": vllm_rollouts.version()}
    return {"batch_tokens": config.batch_tokens}


def _sample_with_vllm(
    pair: Pair, requests: list[_Request], config: RolloutConfig, shards: Shards
) -> list[Sampled]:
    """Sample all requests with vLLM, some thousand at a time."""
    vllm_rollouts.require_vllm()
    done: dict[int, Sampled] = {}
    groups = [
        list(range(start, min(start + vllm_rollouts.AT_ONCE, len(requests))))
        for start in range(0, len(requests), vllm_rollouts.AT_ONCE)
    ]
    for group in groups:
        found = shards.take(group)
        if found is not None:
            pairs = zip(found["ids"], found["logprobs"])
            done |= {i: Sampled(list(ids), list(own)) for i, (ids, own) in zip(group, pairs)}
    left = [group for group in groups if group[0] not in done]
    longest = max(len(request.prompt_ids) for request in requests) + config.max_new_tokens
    with progress(total=sum(map(len, left)), description="rollout", unit=" contexts") as bar:
        if left:
            with vllm_rollouts.engine(pair, longest=longest, seed=config.seed) as made:
                for group in left:
                    written = _written(made, pair, [requests[i] for i in group], config)
                    columns: dict[str, Sequence[Any]] = {
                        "ids": [each.ids for each in written],
                        "logprobs": [each.logprobs or [] for each in written],
                    }
                    shards.add(group, columns)
                    done |= dict(zip(group, written))
                    bar.update(len(group))
    return [done[i] for i in range(len(requests))]


def _written(
    made: Any, pair: Pair, requests: Sequence[_Request], config: RolloutConfig
) -> list[Sampled]:
    """What vLLM answers to some requests, each from a seed of its own."""
    return vllm_rollouts.sample(
        made,
        pair,
        [request.prompt_ids for request in requests],
        [int(request.stream(config.seed).integers(vllm_rollouts.SEEDS)) for request in requests],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )


def encode_prompts(
    pair: Pair, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Encode each prompt to the ids that the student reads wherever it is sampled.

    Args:
        pair: Student and teacher; the tokenizer, vocabulary and window are theirs.
        prompts: Rendered prompts.
        max_new_tokens: Tokens to reserve for the response.

    Returns:
        One tuple of token ids per prompt.

    Raises:
        DiagnosticsError: A prompt, or a teacher's prompt, has no tokens, has a token that a
            model has no row for, or is too long for a response of `max_new_tokens` in the
            models' window.
    """
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
    """Return the ids of the teacher's own prompt, or None where it reads the student's."""
    return (
        None
        if prompt.teacher_prompt is None
        else encode_prompt(
            pair.teacher_reads or pair.tokenizer, prompt.teacher_prompt, rendered=prompt.rendered
        )
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


def _responses(pair: Pair, requests: list[_Request], config: RolloutConfig) -> list[list[int]]:
    """Sample one batch of requests; one list of response ids per request."""
    sampler = StreamSampler(
        [request.stream(config.seed) for request in requests],
        config.temperature,
        config.top_p,
        config.top_k,
        pair.vocabulary,
    )
    return generation.generate(
        pair.student.model,
        [request.prompt_ids for request in requests],
        sampler,
        end_ids=pair.end_ids,
        max_new_tokens=config.max_new_tokens,
        halves=not pair.student.sharded,
    )


@dataclass(frozen=True)
class _Request:
    """One response to be sampled."""

    prompt: Prompt
    sample: int
    prompt_ids: tuple[int, ...]

    def stream(self, seed: int) -> np.random.Generator:
        """Return the random stream of this response."""
        return random_stream(seed, self.prompt.prompt_id, self.sample)


def _batches(
    requests: list[_Request], batch_tokens: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """Yield request numbers in batches, grouped by prompt length so that padding is small."""
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


def _freeze(pair: Pair, request: _Request, sampled: Sampled) -> Context:
    """Build the context of one sampled response."""
    ids = sampled.ids
    tokenizer: Any = pair.tokenizer  # decode() of one list of ids gives one text
    return Context(
        context_id=f"{request.prompt.prompt_id}-{request.sample}",
        prompt_id=request.prompt.prompt_id,
        prompt=request.prompt.prompt,
        prompt_ids=request.prompt_ids,
        response=tokenizer.decode(ids, skip_special_tokens=True),
        response_ids=shared_ids(ids),
        finished=bool(ids) and ids[-1] in pair.end_ids,
        teacher_prompt=request.prompt.teacher_prompt,
        teacher_prompt_ids=_teacher_ids(pair, request.prompt),
        domain=request.prompt.domain,
        sampled_logprobs=None if sampled.logprobs is None else tuple(sampled.logprobs),
    )
