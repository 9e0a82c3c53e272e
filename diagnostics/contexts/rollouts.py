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

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.contexts.encoding import encode_prompt, special_ids
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, progress
from diagnostics.core.types import Bank, Context, Prompt
from diagnostics.measure.projection import wide_head
from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
BATCH_TOKENS = 8192
"""As for scoring: what a batch may hold before padding and memory cost more than the passes
saved.
"""
TAKEN_OVER = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
    "do_sample",
    "use_cache",
    "cache_implementation",
)
"""Generation settings that are taken over, or that cannot change a token."""
NEUTRAL = {
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
"""Values that ask for nothing."""


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
    say_cautions(pair)
    bank = sample(
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
    behind = behind_turn_end(pair, bank)
    if behind:
        log.warning(
            "%d of %d positions lie behind a %r (id %d) that ended the turn",
            behind["positions"],
            bank.positions,
            behind["token"],
            behind["id"],
        )
    return bank


def sample(
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
    encoded = encode(pair, prompts, max_new_tokens=max_new_tokens)
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


def encode(pair: Pair, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[tuple[int, ...]]:
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


# --- what is sampled from
# -----------------------------------------------------------------------------


def sampled_from(*, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = 0) -> str:
    """The distribution that responses are drawn from, in words, as the manifest names it."""
    narrowed = ([f"the {top_k} likeliest tokens of it"] if top_k else []) + (
        [f"the nucleus of mass {top_p:g} of that"] if top_p < 1 else []
    )
    return ", ".join(
        [f"p, the student's distribution, at temperature {temperature:g}", *narrowed]
    ) + (", renormalised" if narrowed else "")


def set_aside(model: nn.Module) -> dict[str, Any]:
    """What the checkpoint's own generation settings ask for and sampling does not do."""
    settings = getattr(model, "generation_config", None)
    asked = settings.to_diff_dict() if settings is not None else {}
    return {
        name: value if isinstance(value, (bool, int, float, str, list)) else str(value)
        for name, value in sorted(asked.items())
        if name not in TAKEN_OVER
        and not name.startswith("_")
        and value not in (None, False, [], {}, NEUTRAL.get(name))
    }


def sampling_facts(pair: Pair, **options) -> dict[str, Any]:
    """What the manifest says about how responses were drawn. options: as for `sampled_from`."""
    aside = set_aside(pair.student.model)
    return {"sampled_from": sampled_from(**options)} | (
        {"generation_config_set_aside": aside} if aside else {}
    )


def say_cautions(pair: Pair) -> None:
    """Say, before anything is sampled, what a user of this checkpoint may expect and does not
    get.
    """
    aside = set_aside(pair.student.model)
    if aside:
        log.warning(
            "the student's generation_config.json asks for %s: set aside, tokens are drawn from the"
            " student's own distribution",
            ", ".join(f"{name}={value}" for name, value in aside.items()),
        )
    end = turn_end(pair)
    if end is not None:
        log.warning(
            "the chat template ends a turn with %r, which does not end a response: add its id %d to"
            " eos_token_id in the student's generation_config.json, or responses go on behind it",
            pair.tokenizer.convert_ids_to_tokens(end),
            end,
        )
    if not any(i < pair.vocabulary for i in pair.end_ids):
        log.warning(
            "no token that ends a response is among the %d shared ids (end ids: %s): every response"
            " goes on to its longest",
            pair.vocabulary,
            list(pair.end_ids) or "none",
        )


def make_savable(model: nn.Module) -> None:
    """Mend generation settings that transformers refuses to write once anything in them was
    changed, as training does.

    Many checkpoints ask for a temperature without asking for sampling. Where that is not the whole
    contradiction, the ids alone are kept, and a warning says so: a training must not end at the
    file that nothing here reads."""
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
            "the student's generation_config.json contradicts itself; the trained student's keeps"
            " its start, end and padding ids alone"
        )


def _is_valid(settings) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def turn_end(pair: Pair) -> int | None:
    """The special token with which the chat template ends the assistant's turn, where it is no end
    of a response; else None.
    """
    from diagnostics.contexts.encoding import render

    mark = "answer"
    text = render(
        pair.tokenizer,
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}],
        add_generation_prompt=False,
    )
    if text is None or mark not in text:
        return None
    ids = pair.tokenizer(text.rpartition(mark)[2].strip(), add_special_tokens=False)["input_ids"]
    found = bool(ids) and ids[0] in special_ids(pair.tokenizer) and ids[0] not in pair.end_ids
    return ids[0] if found else None


def behind_turn_end(pair: Pair, bank: Bank) -> dict[str, Any]:
    """How many responses went on behind the template's end of a turn, and for how many positions;
    {} where none did.
    """
    end = turn_end(pair)
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


# --- batches
# ------------------------------------------------------------------------------------------


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
        return stream(seed, self.prompt.prompt_id, self.sample)


def stream(*name) -> np.random.Generator:
    """The random stream of that name: the same parts give the same draws, other parts others."""
    text = "/".join(map(str, name)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"))


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
    return [_until_end(row, end_ids) for row in output_BT[:, width:].tolist()]


@contextmanager
def without_own_settings(model: nn.Module) -> Iterator[None]:
    """The checkpoint's generation settings are away while the block runs: `generate` fills every
    gap of ours from them.

    Wrappers (adapters, sharding) hold settings of their own or reach for those within, so all
    modules are looked at."""
    from transformers import GenerationConfig

    holders = [
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
        teacher_prompt_ids=_teacher_ids(pair, request.prompt),
    )
