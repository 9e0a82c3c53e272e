"""The sampling engine's log-probabilities against the re-score: the gap, and what explains it."""

import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.engine_check import (
    COLDEST,
    Tempered,
    engine_causes,
    engine_check,
    engine_tables,
    engine_warning,
    engine_worst,
    fit_temperature,
)
from diagnostics.core.errors import DiagnosticsError
from tests.factories import message

V, TOP = 40, 5


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def bank(prompts=24, length=16, *, seed=0):
    """Distributions over V tokens with a sampled token each: logits, tokens and tops."""
    rng = np.random.default_rng(seed)
    n = prompts * length
    logits_NV = 3 * rng.normal(size=(n, V))
    p_NV = softmax(logits_NV)
    sampled = np.array([rng.choice(V, p=p) for p in p_NV])
    codes = np.repeat(np.arange(prompts), length)
    tokens = pd.DataFrame(
        {
            "context_id": [f"c{g}" for g in codes],
            "prompt_id": [f"p{g}" for g in codes],
            "position": np.tile(np.arange(length), prompts),
            "response_length": length,
            "token_id": sampled,
            "token": [f"t{i}" for i in sampled],
            "student_logprob": np.log(p_NV[np.arange(n), sampled]),
            "student_entropy": -(p_NV * np.log(p_NV)).sum(1),
        }
    )
    top_NK = -np.sort(-p_NV, axis=1)[:, :TOP]
    tops = tokens[["context_id", "position"]].assign(student_top_p=list(top_NK))
    return logits_NV, tokens, tops


def contexts(tokens, values):
    """The context table with the engine's values [N]."""
    lists = pd.Series(np.asarray(values, dtype=float)).groupby(tokens["context_id"], sort=False)
    return pd.DataFrame(
        {"context_id": list(lists.groups), "sampled_logprobs": [part.tolist() for _, part in lists]}
    )


def tempered(logits_NV, tokens, temperature):
    p_NV = softmax(logits_NV / temperature)
    return np.log(p_NV[np.arange(len(p_NV)), tokens["token_id"]])


def explaining(causes):
    return causes.loc[causes["explains"], "cause"].tolist()


# --- the gap


def test_four_positions_by_hand():
    tokens = pd.DataFrame(
        {
            "context_id": ["a", "a", "b", "b"],
            "prompt_id": ["p", "p", "q", "q"],
            "position": [0, 1, 0, 1],
            "response_length": 2,
            "token_id": [1, 2, 3, 4],
            "token": list("wxyz"),
            "student_logprob": [-1.0, -2.0, -3.0, -4.0],
        }
    )
    frame = pd.DataFrame(
        {"context_id": ["a", "b"], "sampled_logprobs": [[-1.1, -1.7], [-3.0, math.nan]]}
    )
    table = engine_check(frame, tokens).set_index("group")
    whole = table.loc["all"]
    assert (whole.positions, whole.prompts, whole.missing) == (3, 2, 1)
    assert whole["mean"] == pytest.approx((-0.1 + 0.3 + 0.0) / 3)
    assert whole.mean_absolute == pytest.approx(0.4 / 3) and whole.largest == pytest.approx(0.3)
    assert whole.quantile_99 == pytest.approx(0.1 + 0.98 * 0.2)  # the 0.99 * 2nd of 0, 0.1, 0.3
    x, y = np.array([-1.1, -1.7, -3.0]), np.array([-1.0, -2.0, -3.0])
    slow = sum((a - x.mean()) * (b - y.mean()) for a, b in zip(x, y))
    assert whole.correlation == pytest.approx(slow / (3 * x.std() * y.std()))
    assert table.loc["position 0", "mean"] == pytest.approx(-0.05)
    assert table.loc["position 1 to 3", "positions"] == 1
    worst = engine_worst(frame, tokens, count=2)
    assert worst["token"].tolist() == ["x", "w"]
    assert worst["difference"].tolist() == pytest.approx([0.3, -0.1])


def test_equal_values_are_the_same_and_nothing_is_warned_of():
    _, tokens, tops = bank()
    made = engine_tables(contexts(tokens, tokens["student_logprob"]), tokens, tops=tops)
    assert made["engine_check"].loc[0, "mean_absolute"] == 0
    assert not made["engine_causes"]["explains"].any()
    assert engine_warning(made["engine_check"], made["engine_causes"]) is None


def test_contexts_without_values_are_counted_and_masked_responses_keep_their_places():
    _, tokens, _ = bank(prompts=2, length=3)
    frame = contexts(tokens, tokens["student_logprob"])
    frame.loc[1, "sampled_logprobs"] = None
    assert engine_check(frame, tokens).loc[0, "missing"] == 3
    moved = tokens.assign(response_index=tokens["position"] + 1)
    frame["sampled_logprobs"] = [[9.0, *values] for values in [tokens["student_logprob"][:3]] * 2]
    found = engine_check(frame, moved[moved["context_id"] == "c0"])
    assert found.loc[0, "mean_absolute"] == 0


def test_what_cannot_be_compared_is_refused():
    _, tokens, _ = bank(prompts=2, length=3)
    frame = contexts(tokens, tokens["student_logprob"])
    assert "needs the column sampled_logprobs" in message(
        engine_check, frame.drop(columns="sampled_logprobs"), tokens
    )
    other = frame.assign(context_id=["x", "y"])
    assert "No position has both" in message(engine_check, other, tokens)
    short = frame.assign(sampled_logprobs=[[-1.0], [-1.0]])
    with pytest.raises(DiagnosticsError, match="has 1 values in sampled_logprobs and a position 1"):
        engine_check(short, tokens)


# --- the temperature


def test_the_tempered_sum_is_exact_with_the_whole_list_by_hand():
    """p = (0.5, 0.3, 0.2), T = 1/2: squares over their sum 0.38."""
    p = np.array([0.5, 0.3, 0.2])
    model = Tempered(np.log(p[[1]]), np.log(p)[None], [-(p * np.log(p)).sum()])
    assert model.at(0.5)[0] == pytest.approx(math.log(0.09 / 0.38))


def test_without_any_list_the_value_and_its_derivative_at_one_are_exact():
    """The derivative of ln p_T(y) in 1/T at T = 1 is ln p(y) + H, whatever the list."""
    rng = np.random.default_rng(3)
    p = softmax(rng.normal(size=12))
    entropy = -(p * np.log(p)).sum()
    for k in (0, 4, 12):
        listed = np.log(-np.sort(-p)[:k])[None]
        model = Tempered(np.log(p[[2]]), listed, [entropy])
        assert model.at(1.0)[0] == pytest.approx(math.log(p[2]))
        step = 1e-5
        slope = (model.at(1 / (1 + step))[0] - model.at(1 / (1 - step))[0]) / (2 * step)
        assert slope == pytest.approx(math.log(p[2]) + entropy, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.3])
def test_the_temperature_of_the_sampling_is_found(temperature):
    logits_NV, tokens, tops = bank()
    frame = contexts(tokens, tempered(logits_NV, tokens, temperature))
    causes = engine_causes(frame, tokens, tops=tops)
    row = causes.set_index("cause").loc["temperature"]
    assert row["parameter"] == pytest.approx(temperature, rel=0.1)
    assert explaining(causes) == ["temperature"]
    said = engine_warning(engine_check(frame, tokens), causes)
    assert said[0] == "engine_mismatch" and "A temperature of" in said[4]


def test_without_lists_the_temperature_is_found_near_one():
    logits_NV, tokens, _ = bank()
    frame = contexts(tokens, tempered(logits_NV, tokens, 0.9))
    row = engine_causes(frame, tokens).set_index("cause").loc["temperature"]
    assert row["parameter"] == pytest.approx(0.9, abs=0.03)


def test_values_of_greedy_sampling_fit_the_coldest():
    _, tokens, tops = bank()
    lists_NK = np.log(np.stack(tops["student_top_p"]))
    model = Tempered(tokens["student_logprob"], lists_NK, tokens["student_entropy"])
    top = np.isclose(lists_NK.max(1), tokens["student_logprob"])
    found = fit_temperature(np.zeros(len(tokens)), model, np.flatnonzero(top))
    assert found == pytest.approx(COLDEST, rel=0.2)


# --- other causes, each against values that it did not make


@pytest.mark.parametrize("by, name", [(1, "the token after"), (-1, "the token before")])
def test_a_shift_by_one_is_found(by, name):
    """Where the engine's value at t belongs to token t - by."""
    _, tokens, tops = bank()
    moved = tokens.groupby("context_id", sort=False)["student_logprob"].shift(by)
    causes = engine_causes(contexts(tokens, moved), tokens, tops=tops)
    assert explaining(causes) == [f"shift: values of {name}"]
    assert (
        "shifted against the response"
        in engine_warning(engine_check(contexts(tokens, moved), tokens), causes)[4]
    )


@pytest.mark.parametrize("base", [2, 10])
def test_another_base_is_found(base):
    _, tokens, tops = bank()
    frame = contexts(tokens, tokens["student_logprob"] / math.log(base))
    causes = engine_causes(frame, tokens, tops=tops)
    assert f"base {base}" in explaining(causes)
    left = causes.set_index("cause").loc[f"base {base}", "mean_absolute"]
    assert left == pytest.approx(0, abs=1e-12)
    assert f"Logarithms to base {base}" in engine_warning(engine_check(frame, tokens), causes)[4]


def test_another_prompt_shows_where_responses_begin():
    _, tokens, tops = bank()
    rng = np.random.default_rng(1)
    early = np.where(tokens["position"] < 4, 0.8, 0.02) * rng.normal(size=len(tokens))
    frame = contexts(tokens, tokens["student_logprob"] + early)
    causes = engine_causes(frame, tokens, tops=tops)
    assert explaining(causes) == ["another prompt or template"]
    assert "read another prompt" in engine_warning(engine_check(frame, tokens), causes)[4]


def test_rounding_needs_no_cause_and_noise_has_none():
    _, tokens, tops = bank()
    rng = np.random.default_rng(2)
    for spread, words in ((0.02, "rounding of bfloat16"), (0.8, "No cause is identified")):
        values = tokens["student_logprob"] + spread * rng.normal(size=len(tokens))
        frame = contexts(tokens, values)
        causes = engine_causes(frame, tokens, tops=tops)
        assert explaining(causes) == []
        assert words in engine_warning(engine_check(frame, tokens), causes)[4]


def test_below_twenty_prompts_nothing_is_explained():
    logits_NV, tokens, tops = bank(prompts=19)
    frame = contexts(tokens, tempered(logits_NV, tokens, 0.7))
    causes = engine_causes(frame, tokens, tops=tops)
    assert explaining(causes) == []
    assert "fewer than 20 prompts" in engine_warning(engine_check(frame, tokens), causes)[4]
