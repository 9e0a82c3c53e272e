"""A pair is two models over one vocabulary: loaded, compared and described."""

import dataclasses

import pytest
import torch

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.loading import resolve_device
from diagnostics.models.pair import (
    assemble,
    load_pair,
    weights_sha256,
)
from diagnostics.models.special_tokens import differing_special_ids
from tests.conftest import WORDS, make_model, make_pair, make_tokenizer


def test_vocabularies_of_other_size_are_cut(caplog):
    pair = assemble(
        "tiny", make_model(1, vocabulary=64), make_model(2, vocabulary=70), make_tokenizer()
    )
    assert pair.vocabulary == 64 and pair.teacher.full_vocabulary == 70
    assert "configured vocabularies differ (student 64, teacher 70)" in caplog.text
    hidden = torch.randn(3, 32)
    whole = pair.teacher.model.lm_head(hidden)
    torch.testing.assert_close(
        torch.cat([pair.teacher.logits(hidden), pair.teacher.dropped_logits(hidden)], 1), whole
    )


def test_other_token_maps_are_refused():
    with pytest.raises(DiagnosticsError) as error:
        differing_special_ids(make_tokenizer(), make_tokenizer(WORDS[::-1]))
    assert str(error.value).startswith(
        "The tokenizers differ in 60 tokens ('w0' is 4 for the student and 63 for the teacher, 'w1'"
    )
    assert "choose a teacher with the student's tokenizer" in str(error.value)


def test_one_tokenizer_may_know_more():
    assert differing_special_ids(make_tokenizer(), make_tokenizer([*WORDS, "extra"])) == ()


def test_an_id_with_two_names_is_refused():
    with pytest.raises(DiagnosticsError, match="differ in 2 tokens"):
        differing_special_ids(make_tokenizer(), make_tokenizer([*WORDS[:-1], "other"]))


def test_models_come_from_folders(tmp_path):
    pair = make_pair()
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    loaded = load_pair(
        student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), device="cpu"
    )
    assert loaded.facts["student"]["weights_sha256"] == pair.facts["student"]["weights_sha256"]
    assert (
        loaded.facts["teacher"]["name"] == "teacher"
        and loaded.facts["student"]["dtype"] == "float32"
    )
    low = load_pair(
        student=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        teacher_dtype="bfloat16",
        device="cpu",
    )
    assert (
        low.facts["teacher"]["dtype"] == "bfloat16" and low.facts["student"]["dtype"] == "float32"
    )


def test_models_in_memory_bring_a_tokenizer():
    pair = load_pair(
        student=make_model(1), teacher=make_model(2), tokenizer=make_tokenizer(), device="cpu"
    )
    assert pair.vocabulary == 64 and pair.end_ids == (1,)
    with pytest.raises(
        DiagnosticsError, match=r"No tokenizer came with LlamaForCausalLM\. Pass tokenizer="
    ):
        load_pair(student=make_model(1), teacher=make_model(2), device="cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(pair="nothing"), r"^Unknown pair 'nothing'\. Known are embedded, smollm2"),
        (dict(student="a"), r"^A pair needs both models; got student='a', teacher=None"),
        (dict(pair="embedded", student="a"), r"^Got the named pair 'embedded' and a student"),
        (
            dict(student="/nowhere/a", teacher="/nowhere/b"),
            r"^No tokenizer can be loaded from '/nowhere/a'",
        ),
    ],
)
def test_a_pair_that_cannot_be_had(arguments, message):
    with pytest.raises(DiagnosticsError, match=message):
        load_pair(**arguments)


def test_unknown_device_and_dtype():
    with pytest.raises(DiagnosticsError, match=r"Device 'abacus' cannot be used"):
        resolve_device("abacus")
    with pytest.raises(DiagnosticsError, match=r"Unknown dtype 'float7'"):
        load_pair(student="x", teacher="y", tokenizer=make_tokenizer(), dtype="float7")


def test_hash_sees_one_bit():
    model = make_model(1)
    before = weights_sha256(model)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert weights_sha256(model) != before == weights_sha256(make_model(1))


def test_a_pair_shows_who_its_models_are(pair):
    text = pair._repr_html_()
    assert (
        text.startswith("<p>Pair tiny: 64 shared tokens</p><table><tr><th>student</th>")
        and text.count("LlamaForCausalLM") == 2
    )
    assert f"{sum(p.numel() for p in pair.teacher.model.parameters()):,} parameters" in text


def test_a_scalar_parameter_is_hashed_too():
    model = make_model(1)
    model.temperature = torch.nn.Parameter(torch.tensor(1.5))
    before = weights_sha256(model)
    with torch.no_grad():
        model.temperature.fill_(1.25)
    assert weights_sha256(model) != before


def test_models_of_a_teacher_known_by_lists_do_not_take_turns(pair):
    listed = dataclasses.replace(pair, teacher=None)
    with (
        pytest.raises(
            DiagnosticsError,
            match=r"^The pair 'tiny' has no teacher that can be run, .* Name a model with"
            r" --teacher\.$",
        ),
        listed.teachers_turn(),
    ):
        raise AssertionError("the models took turns")
