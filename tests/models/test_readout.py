"""A model taken apart into backbone and head gives its own logits."""

import pytest
import torch

from diagnostics.core import distributed
from diagnostics.models.readout import Readout, in_step, remove_layers
from tests.conftest import make_model


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


class Counted:
    """A model that counts its spare passes."""

    def __init__(self, name, sharded, passes):
        self.name, self.sharded, self.passes = name, sharded, passes

    def spare_pass(self):
        self.passes.append(self.name)


def test_a_process_with_fewer_passes_runs_spare_ones_of_the_sharded_models(monkeypatch):
    monkeypatch.setattr(distributed, "total_lengths", lambda count: [count, 4])
    passes = []
    models = [Counted("teacher", True, passes), Counted("whole", False, passes)]
    models.append(Counted("student", True, passes))
    assert list(in_step("ab", 2, models)) == ["a", "b"]
    assert passes == ["teacher", "student"] * 2


def test_whole_models_ask_no_other_process(monkeypatch):
    monkeypatch.setattr(distributed, "total_lengths", None)
    assert list(in_step(iter([1, 2]), 2, [Counted("whole", False, [])])) == [1, 2]
