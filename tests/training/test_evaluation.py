"""Every measure of an evaluation against the modules that it stands on; verifiers; intervals."""

import json
import sys
import types

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts import verifiers
from diagnostics.contexts.rollouts import rollout
from diagnostics.contexts.story_sums import verify as verify_sum
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.scores import score
from diagnostics.training.evaluation import (
    SEED,
    estimate,
    evaluate,
    find_verifier,
    summarize_evaluation,
)
from tests.conftest import make_pair, make_prompts


def starts_low(response, answer):
    """Accepts a response whose first word has an even number."""
    return response != "" and int(response.split()[0][1:]) % 2 == 0


@pytest.fixture(scope="module")
def answered():
    return [
        Prompt(p.prompt_id, p.prompt, "x" if i != 2 else None)
        for i, p in enumerate(make_prompts(5))
    ]


def means(rows):
    sums = rows.groupby("measure")[["total", "count"]].sum()
    return sums["total"] / sums["count"]


def test_every_measure_is_that_of_the_modules_it_stands_on(pair, answered):
    frozen = rollout(pair, make_prompts(3), max_new_tokens=6, seed=3)
    rows = evaluate(
        pair,
        answered,
        bank=FrozenBank(pair, frozen),
        verify=starts_low,
        samples=3,
        max_new_tokens=7,
    )
    fresh = rollout(pair, answered, max_new_tokens=7, samples_per_prompt=3, seed=SEED)
    greedy = rollout(pair, answered, max_new_tokens=7, top_k=1, seed=SEED)
    tokens, found = score(pair, fresh, sweep=()), means(rows)
    assert found["forward_kl"] == pytest.approx(tokens["forward_kl"].mean()) and found[
        "reverse_kl"
    ] == pytest.approx(tokens["reverse_kl"].mean())
    assert found["bank_reverse_kl"] == pytest.approx(
        score(pair, frozen, sweep=())["reverse_kl"].mean()
    )
    assert found["response_length"] == pytest.approx(fresh.positions / 15) and found[
        "finished"
    ] == np.mean([c.finished for c in fresh])
    judged = [starts_low(c.response, "x") for c in fresh if c.prompt_id != "p2"]
    assert found["accuracy"] == pytest.approx(np.mean(judged)) and 0 < found["accuracy"] < 1
    assert found["accuracy_greedy"] == np.mean(
        [starts_low(c.response, "x") for c in greedy if c.prompt_id != "p2"]
    )
    assert set(rows.loc[rows["measure"] == "accuracy", "prompt_id"]) == {"p0", "p1", "p3", "p4"}
    assert (rows.loc[rows["measure"] == "accuracy", "count"] == 3).all()


def test_the_same_student_gives_the_same_rows_and_keeps_its_mode(answered):
    pair = make_pair()
    pair.student.model.train()
    first, second = (evaluate(pair, answered, samples=2, max_new_tokens=5) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert pair.student.model.training
    assert {"forward_kl", "reverse_kl", "response_length", "finished"} == set(first["measure"])


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    rows = pd.DataFrame(
        {"measure": "m", "prompt_id": ["a", "b", "c"], "total": [1.0, 6.0, 2.0], "count": [1, 3, 4]}
    )
    found = estimate(rows, draws=400, seed=1)
    assert found.value == 9 / 8 and (found.positions, found.prompts) == (8, 3)
    weights = np.random.default_rng(1).multinomial(3, [1 / 3] * 3, size=400)
    np.testing.assert_allclose(found.draws, (weights @ [1.0, 6.0, 2.0]) / (weights @ [1, 3, 4]))
    table = summarize_evaluation(rows, draws=400, seed=1).iloc[0]
    assert (table["measure"], table["mean"], table["count"], table["prompts"]) == ("m", 9 / 8, 8, 3)
    assert (table["low"], table["high"]) == found.interval(0.95)


def test_nothing_counted_is_undefined():
    rows = pd.DataFrame(
        {"measure": "m", "prompt_id": ["a", "b"], "total": [0.0, 0.0], "count": [0, 0]}
    )
    assert np.isnan(estimate(rows).value) and np.isnan(summarize_evaluation(rows).loc[0, "low"])


def test_an_evaluation_of_nothing_is_refused(pair):
    with pytest.raises(
        DiagnosticsError,
        match=r"^An evaluation needs prompts and samples; got 0 prompts and 4 samples\.$",
    ):
        evaluate(pair, [])


def test_prompts_may_be_texts_a_file_or_contexts_and_a_bank_itself(pair, tmp_path):
    texts = [prompt.prompt for prompt in make_prompts(3)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    frozen = rollout(pair, texts, samples_per_prompt=2, max_new_tokens=4)
    how = {"samples": 1, "max_new_tokens": 4}
    rows = evaluate(pair, texts, bank=frozen, **how)
    for given in (file, str(file), [{"prompt": text} for text in texts], frozen):
        pd.testing.assert_frame_equal(
            evaluate(pair, given, bank=FrozenBank(pair, frozen), **how), rows
        )
    assert set(rows.prompt_id) == {context.prompt_id for context in frozen}


def test_verifiers(monkeypatch, caplog):
    bare, answered = make_prompts(2), [Prompt("a", "w1", "42")]
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)
    assert (
        find_verifier("auto", pair="embedded", prompts=answered)
        is verify_sum
        is find_verifier("sums", pair="x", prompts=answered)
    )
    assert (
        find_verifier("auto", pair="embedded", prompts=bare) is None
        and find_verifier("none", pair="embedded", prompts=answered) is None
    )
    assert (
        find_verifier("auto", pair="x", prompts=answered) is None
        and "1 held-out prompts have answers" in caplog.text
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The verifier 'math' needs the package math-verify\. Run `pip install math-verify`,"
            r" or use --verifier none\.$"
        ),
    ):
        find_verifier("math", pair="x", prompts=answered)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The verifier 'sums' was asked for, and no held-out prompt has an answer\. Add an"
            r" `answer` column\.$"
        ),
    ):
        find_verifier("sums", pair="x", prompts=bare)
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: object())
    assert find_verifier("auto", pair="x", prompts=answered) is verifiers.verify_math


def test_math_verify_gets_gold_first_and_plain_answers_as_latex(monkeypatch):
    calls = []
    stub = types.SimpleNamespace(
        parse=lambda text: [text], verify=lambda gold, answer: calls.append((gold, answer)) or True
    )
    monkeypatch.setitem(sys.modules, "math_verify", stub)
    assert verifiers.verify_math("so \\boxed{42}", "42") is True
    verifiers.verify_math("x", "\\frac{1}{2}")
    assert calls == [(["$42$"], ["so \\boxed{42}"]), (["\\frac{1}{2}"], ["x"])]
