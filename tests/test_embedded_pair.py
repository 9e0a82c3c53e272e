"""The embedded pair has the properties that it was accepted by, re-measured on fresh prompts.

Nothing here uses the instrument's own scoring: entropy, divergence and compatibility come from
plain float64 softmaxes over the full vocabulary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diagnostics.contexts import story_sums

FOLDER = Path(__file__).resolve().parent.parent / "data" / "embedded"
PROMPTS, MAX_NEW_TOKENS, K = 200, 64, 16


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "student")


@pytest.fixture(scope="module")
def models():
    from transformers import AutoModelForCausalLM

    return SimpleNamespace(
        **{
            side: AutoModelForCausalLM.from_pretrained(FOLDER / side, dtype=torch.float32).eval()
            for side in story_sums.SIDES
        }
    )


@pytest.fixture(scope="module")
def prompts():
    return story_sums.sums(PROMPTS, seed=20_000, split="test")


@torch.no_grad()
def respond(
    model, tokenizer, prompts, *, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Responses to left-padded prompts, greedy without a generator, else at temperature 1; <eos> is
    kept.
    """
    rows = [tokenizer(prompt.prompt)["input_ids"] for prompt in prompts]
    assert (
        len({len(row) for row in rows}) == 1
    )  # every prompt has as many words, so nothing is padded
    ids_BT, cache = torch.tensor(rows), None
    written: list[torch.Tensor] = []
    for _ in range(MAX_NEW_TOKENS):
        output = model(
            input_ids=written[-1] if written else ids_BT, past_key_values=cache, use_cache=True
        )
        cache, logits_BV = output.past_key_values, output.logits[:, -1].double()
        written.append(
            torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
            if generator
            else logits_BV.argmax(-1, keepdim=True)
        )
    responses = torch.cat(written, 1).tolist()
    return [
        row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
        for row in responses
    ]


def accuracy(responses, tokenizer, prompts) -> float:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return float(
        np.mean([story_sums.verify(text, prompt.answer) for text, prompt in zip(texts, prompts)])
    )


@torch.no_grad()
def oracle(models, tokenizer, prompts, responses) -> SimpleNamespace:
    """Entropy H(p), divergence KL(q||p) and teacher mass on the student's top K, one response at a
    time in float64.
    """
    entropy, divergence, fit = [], [], []
    for prompt, response in zip(prompts, responses):
        head = tokenizer(prompt.prompt)["input_ids"]
        ids_1T = torch.tensor([head + response])
        at = slice(len(head) - 1, len(head) + len(response) - 1)
        p_TV, q_TV = (
            model(input_ids=ids_1T).logits[0, at].double().softmax(-1).numpy()
            for model in (models.student, models.teacher)
        )
        for p, q in zip(p_TV, q_TV):
            entropy.append(-np.sum(p * np.log(p)))
            divergence.append(np.sum(q * (np.log(q) - np.log(p))))
            fit.append(q[np.argsort(-p, kind="stable")[:K]].sum())
    return SimpleNamespace(
        entropy=np.array(entropy), divergence=np.array(divergence), fit=np.array(fit)
    )


@pytest.fixture(scope="module")
def sampled(models, tokenizer, prompts):
    return respond(models.student, tokenizer, prompts, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(models, tokenizer, prompts, sampled):
    return oracle(models, tokenizer, prompts, sampled)


def test_files_are_small_and_plain():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


def test_both_sides_carry_the_same_tokenizer():
    student, teacher = (
        (FOLDER / side / "tokenizer.json").read_bytes() for side in ("student", "teacher")
    )
    assert student == teacher


def test_tokenizer_speaks_the_language(tokenizer):
    assert (
        len(
            {
                tokenizer.pad_token_id,
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
                tokenizer.unk_token_id,
            }
        )
        == 4
    )
    for side in story_sums.SIDES:
        for prompt, response in story_sums.corpus(100, seed=5, side=side):
            ids = tokenizer(prompt)["input_ids"]
            assert (
                ids[0] == tokenizer.bos_token_id
                and tokenizer.eos_token_id not in ids
                and tokenizer.unk_token_id not in ids
            )
            assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
            bare = tokenizer(response, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in bare and tokenizer.decode(bare) == response


def test_tokenizer_is_the_task_s_vocabulary(tokenizer, models):
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        *story_sums.vocabulary(),
    ]
    assert models.student.config.vocab_size == models.teacher.config.vocab_size == len(tokenizer)


def test_teacher_solves_the_task(models, tokenizer, prompts):
    assert accuracy(respond(models.teacher, tokenizer, prompts), tokenizer, prompts) >= 0.85


def test_student_solves_some(models, tokenizer, prompts, sampled):
    assert 0.10 <= accuracy(respond(models.student, tokenizer, prompts), tokenizer, prompts) <= 0.60
    assert 0.10 <= accuracy(sampled, tokenizer, prompts) <= 0.60


def test_responses_end_by_themselves(sampled, tokenizer):
    ended = [ids[-1] == tokenizer.eos_token_id for ids in sampled]
    assert np.mean(ended) >= 0.97
    assert 30 <= np.mean([len(ids) for ids in sampled]) <= 60
    assert len({len(ids) for ids in sampled}) > 1


def test_the_student_is_often_uncertain(measured):
    assert np.quantile(measured.entropy, 0.75) >= 1.5


def test_compatibility_is_spread(measured):
    assert np.quantile(measured.fit, 0.25) <= 0.95
    assert np.quantile(measured.fit, 0.05) <= 0.6


def test_every_quadrant_is_inhabited(measured):
    uncertain, disagreed = (
        measured.entropy > np.median(measured.entropy),
        measured.divergence >= np.median(measured.divergence),
    )
    shares = [
        np.mean((uncertain == a) & (disagreed == b)) for a in (True, False) for b in (True, False)
    ]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0.05


def test_confident_errors_are_of_both_kinds(measured):
    q3 = (measured.entropy <= np.median(measured.entropy)) & (
        measured.divergence >= np.median(measured.divergence)
    )
    fit = np.sort(measured.fit[q3])
    third = len(fit) // 3
    assert fit[-third:].mean() - fit[:third].mean() >= 0.3


def test_the_card_states_what_the_build_measured():
    """Every figure of the card's table is there and within what the pair was accepted by."""
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    figures = json.loads(re.search(r"```json\n(.*?)```", card, re.S)[1])
    assert (
        figures["teacher_greedy_accuracy"] >= 0.85
        and 0.10 <= figures["student_greedy_accuracy"] <= 0.60
    )
    assert figures["student_entropy_q75"] >= 1.5 and figures["smallest_quadrant"] >= 0.05
    assert (
        figures["compatibility_q25"] <= 0.95
        and figures["compatibility_q05"] <= 0.6
        and figures["q3_compatibility_gap"] >= 0.3
    )
    assert "fixed before any gain was looked at" in " ".join(card.split())
