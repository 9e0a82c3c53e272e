"""A stand-in for the package vllm, put on sys.path by tests: its Python API, with transformers
underneath.

It takes exactly the arguments that are listed here, so that a misspelled one is a TypeError, and
answers with objects that have vLLM's fields. `CALLS` records what was asked for, and `FAULT` lets a
test have the engine answer wrongly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.0.stub"


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    allowed_token_ids: list[int] | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    calls: ClassVar[list[dict]] = []
    asked: ClassVar[list[SamplingParams]] = []
    fault: ClassVar[str] = ""

    def __init__(
        self,
        model,
        *,
        tokenizer=None,
        dtype="auto",
        seed=0,
        max_model_len=None,
        generation_config="auto",
        gpu_memory_utilization=0.9,
    ):
        LLM.calls.append(
            {
                "dtype": dtype,
                "seed": seed,
                "max_model_len": max_model_len,
                "generation_config": generation_config,
            }
        )
        if LLM.fault == "refuses":
            raise ValueError("Model architectures ['X'] are not supported for now.")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.room = max_model_len

    def generate(self, prompts, sampling_params=None, use_tqdm=True):
        LLM.asked += sampling_params
        answers = [
            self._answer(prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
        return answers[:-1] if LLM.fault == "short" else answers

    @torch.no_grad()
    def _answer(self, prompt, params):
        draws = torch.Generator().manual_seed(params.seed)
        ids, listed = list(prompt), []
        assert len(ids) + params.max_tokens <= self.room
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            if params.allowed_token_ids is not None:
                kept = torch.full_like(logits, -torch.inf)
                kept[params.allowed_token_ids] = logits[params.allowed_token_ids]
                logits = kept
            logits = logits / params.temperature
            if params.top_k not in (0, -1):
                logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=draws))
            ids.append(token)
            best = int(raw.argmax())
            listed.append({i: Logprob(float(raw[i])) for i in {best, token}})
            if token in (params.stop_token_ids or ()):
                break
        new = ids[len(prompt) :]
        if LLM.fault == "no logprobs":
            listed = None
        if LLM.fault == "other ids":
            new = [10**6]
        return RequestOutput(list(prompt), [CompletionOutput(0, "", new, listed)])
