"""Sampling with vLLM, with a stand-in that speaks its Python API in its place."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics.contexts import vllm_rollouts
from diagnostics.contexts.generation import random_stream
from diagnostics.contexts.rollouts import RolloutConfig, engine_facts, rollout
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards
from diagnostics.core.types import Bank, read_bank
from diagnostics.models.identity import Models
from diagnostics.models.pair import assemble
from diagnostics.pipeline.cli import main
from diagnostics.probing.scores import score
from tests.conftest import make_model, make_pair, make_prompts, make_tokenizer

STUB = Path(__file__).parent.parent / "stub_vllm"


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in under vLLM's name, with nothing recorded yet."""
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.delitem(importlib.import_module("sys").modules, "vllm", raising=False)
    stub = importlib.import_module("vllm")
    yield stub
    importlib.import_module("sys").modules.pop("vllm", None)


def sampled(pair, count=6, **settings):
    return rollout(
        pair, make_prompts(count), **{"max_new_tokens": 8, "rollout_engine": "vllm"} | settings
    )


def test_its_log_probabilities_are_those_of_the_scores(vllm):
    """They are kept with the contexts, and are the student's own for the tokens it drew."""
    pair = make_pair()
    bank = sampled(pair)
    told = np.concatenate([context.sampled_logprobs for context in bank])
    measured = score(make_pair(), bank, sweep=())["student_logprob"]
    assert len(told) == bank.positions
    np.testing.assert_allclose(told, measured, atol=1e-5)
    for context in bank:
        assert context.finished == (context.response_ids[-1] in pair.end_ids)
        assert not any(token in pair.end_ids for token in context.response_ids[:-1])


def test_the_weights_in_memory_are_sampled(vllm):
    """A student that was changed after it was loaded is not the one of its folder."""
    pair = make_pair()
    before = sampled(pair)
    with torch.no_grad():
        pair.student.model.lm_head.weight.mul_(3.0)
    after = sampled(pair)
    assert before != after
    told = np.concatenate([context.sampled_logprobs for context in after])
    np.testing.assert_allclose(told, score(pair, after, sweep=())["student_logprob"], atol=1e-4)


def test_every_response_has_the_seed_of_its_stream(vllm):
    bank = sampled(make_pair(), count=2, samples_per_prompt=2, seed=5)
    expected = [
        int(random_stream(5, prompt, sample).integers(vllm_rollouts.SEEDS))
        for prompt in ("p0", "p1")
        for sample in (0, 1)
    ]
    assert [params.seed for params in vllm.LLM.asked] == expected and len(set(expected)) == 4
    assert len({context.response_ids for context in bank}) == 4


def test_what_is_asked_for_is_what_the_settings_say(vllm):
    sampled(make_pair(), temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=4, seed=3)
    asked = vllm.LLM.asked[0]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (0.7, 0.9, 5, 4)
    assert asked.stop_token_ids == [1] and asked.allowed_token_ids is None
    engine = vllm.LLM.calls[0]
    assert engine["generation_config"] == "vllm" and engine["seed"] == 3
    assert engine["dtype"] == "float32"
    sampled(make_pair(), max_new_tokens=4)
    assert vllm.LLM.asked[-1].top_k == -1


def test_ids_outside_the_shared_vocabulary_are_never_drawn(vllm):
    pair = assemble("tiny", make_model(1, vocabulary=72), make_model(2), make_tokenizer())
    with torch.no_grad():
        pair.student.model.lm_head.weight[64:] *= 40
    bank = sampled(pair)
    assert max(max(context.response_ids) for context in bank) < 64
    assert vllm.LLM.asked[0].allowed_token_ids == list(range(64))


def test_a_group_that_is_kept_is_not_sampled_again(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_rollouts, "AT_ONCE", 2)
    monkeypatch.setattr("diagnostics.core.progress.SHARD_SECONDS", 0.0)
    whole = sampled(make_pair(), shards=Shards(tmp_path))
    vllm.LLM.asked.clear()
    again = sampled(make_pair(), shards=Shards(tmp_path))
    assert again == whole and vllm.LLM.asked == []
    next(tmp_path.glob("*.parquet")).unlink()
    assert sampled(make_pair(), shards=Shards(tmp_path)) == whole
    assert len(vllm.LLM.asked) == 2


def test_the_manifest_names_the_engine(vllm):
    assert engine_facts(RolloutConfig(rollout_engine="vllm")) == {"vllm": "0.0.stub"}
    assert engine_facts(RolloutConfig(batch_tokens=60)) == {"batch_tokens": 60}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_it_is_refused_and_nothing_else_samples():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^--rollout-engine vllm needs the package vllm, which is not installed\. Run `pip"
            r" install vllm`, or leave the option out: transformers samples then\.$"
        ),
    ):
        sampled(make_pair())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_command_without_vllm_ends_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    def loaded(self):
        raise AssertionError("the models were loaded")

    monkeypatch.setattr(Models, "pair", property(loaded))
    command = ["rollout", "--pair", "embedded", "--contexts", "2", "--rollout-engine", "vllm"]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 2
    assert "needs the package vllm, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run/contexts.parquet").exists()


def test_a_command_records_the_engine_and_what_it_reported(vllm, tmp_path):
    command = ["rollout", "--pair", "embedded", "--contexts", "2", "--max-new-tokens", "4"]
    out = ["--rollout-engine", "vllm", "--quiet", "--output-dir", str(tmp_path)]
    assert main([*command, *out]) == 0
    stage = json.loads((tmp_path / "manifest.json").read_text())["stages"]["rollout"]
    assert stage["settings"]["rollout_engine"] == "vllm" and stage["facts"]["vllm"] == "0.0.stub"
    for context in read_bank(tmp_path / "contexts.parquet"):
        assert len(context.sampled_logprobs) == len(context.response_ids)


def test_an_unknown_engine_is_refused():
    with pytest.raises(
        DiagnosticsError, match=r"^Unknown rollout_engine 'sglang'\. Known are transformers, vllm"
    ):
        sampled(make_pair(), rollout_engine="sglang")


def test_several_processes_are_refused(vllm, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(DiagnosticsError, match=r"samples in one process, and 2 were started\."):
        sampled(make_pair())


@pytest.mark.parametrize(
    "fault, message",
    [
        (
            "refuses",
            r"^vLLM does not take the student \(LlamaForCausalLM\): Model architectures \['X'\] are"
            r" not supported for now\. Sample with --rollout-engine transformers\.$",
        ),
        ("short", r"^vLLM was given 6 prompts and answered 5\. Sample with"),
        ("no logprobs", r"^vLLM gave no log-probability for some of \d+ tokens, though it was"),
        ("other ids", r"^vLLM answered the ids \[1000000\], and the shared vocabulary has 64"),
    ],
)
def test_a_wrong_answer_is_refused(vllm, monkeypatch, fault, message):
    monkeypatch.setattr(vllm.LLM, "fault", fault)
    with pytest.raises(DiagnosticsError, match=message):
        sampled(make_pair())


def test_a_table_of_contexts_keeps_what_the_engine_reported(vllm):
    bank = sampled(make_pair())
    frame = bank.to_frame()
    assert [len(row) for row in frame["sampled_logprobs"]] == [len(c.response_ids) for c in bank]
    assert Bank.from_frame(frame) == bank
    untold = Bank(tuple(dataclasses.replace(c, sampled_logprobs=None) for c in bank))
    assert "sampled_logprobs" not in untold.to_frame()
    mixed = Bank((untold[0], *bank.contexts[1:]))
    assert Bank.from_frame(mixed.to_frame()) == mixed


@pytest.mark.parametrize(
    "values, message",
    [
        ((-1.0,), r"^Context 'p0-0' has 1 values in sampled_logprobs and \d+ response tokens\."),
        (["a"] * 8, r"^A context's sampled_logprobs are numbers; found "),
    ],
)
def test_log_probabilities_that_do_not_fit_are_refused(values, message):
    frame = rollout(make_pair(), make_prompts(1), max_new_tokens=8).to_frame()
    frame["sampled_logprobs"] = [list(values)]
    with pytest.raises(DiagnosticsError, match=message):
        Bank.from_frame(frame)
