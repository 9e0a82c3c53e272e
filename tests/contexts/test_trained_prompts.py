"""Which prompts a student was trained on."""

import json

import numpy as np
import pytest

from diagnostics.contexts.trained_prompts import (
    RECORD,
    read_trained_prompts,
    seen_contexts,
    write_trained_prompts,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Context, Prompt


def context(prompt_id: str, prompt: str) -> Context:
    return Context("c", prompt_id, prompt, (1,), "r", (2, 3), True)


def test_the_record_lists_each_prompt_once(tmp_path):
    write_trained_prompts(tmp_path, [Prompt("b", "two"), Prompt("a", "one"), Prompt("b", "two")])
    trained = read_trained_prompts(tmp_path)
    assert list(trained) == ["a", "b"] and len(trained["b"]) == 1


def test_without_a_record_it_is_unknown(tmp_path):
    assert read_trained_prompts(tmp_path) is None
    assert read_trained_prompts("some/hub-id") is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompts": 3}', "["])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(DiagnosticsError, match="should say which prompts the checkpoint was"):
        read_trained_prompts(tmp_path)


def test_a_prompt_is_seen_by_its_text_or_its_id(tmp_path, caplog):
    write_trained_prompts(tmp_path, [Prompt("a", "one"), Prompt("b", "two")])
    bank = [
        context("a", "one"),
        context("other-name", "two"),
        context("a", "another question"),
        context("c", "three"),
    ]
    with caplog.at_level("WARNING"):
        seen = seen_contexts(read_trained_prompts(tmp_path), bank)
    np.testing.assert_array_equal(seen, [True, True, True, False])
    assert "1 contexts have the id of a prompt" in caplog.text


def test_the_record_is_stable(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    prompts = [Prompt(str(i), f"text {i}") for i in range(5)]
    write_trained_prompts(tmp_path / "x", prompts)
    write_trained_prompts(tmp_path / "y", prompts[::-1])
    assert json.loads((tmp_path / "x" / RECORD).read_text())
    assert (tmp_path / "x" / RECORD).read_bytes() == (tmp_path / "y" / RECORD).read_bytes()
