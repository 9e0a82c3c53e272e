"""In training every token is a draw from p, whatever the loss's own passes do, on every kind of
model; and what would have no effect is refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from diagnostics.contexts import generation
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble
from diagnostics.models.readout import Readout
from diagnostics.training.evaluation import EvaluationConfig
from diagnostics.training.run import EngineConfig, TrainConfig, train
from tests.conftest import make_pair, make_prompts, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@torch.no_grad()
def misdrawn(model, prompts, responses, states, *, top_p=1.0) -> int:
    """Tokens that are not what their stream draws from the model in eval mode, one at a time."""
    training, bad = model.training, 0
    model.eval()
    for prompt, response, state in zip(prompts, responses, states, strict=True):
        draws = np.random.default_rng()
        draws.bit_generator.state = state
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
        for t, token in enumerate(response):
            p = logits[len(prompt) - 1 + t].softmax(-1).numpy()
            order = np.argsort(-p, kind="stable")
            outside = order[np.cumsum(p[order]) - p[order] >= top_p]
            p[outside] = 0
            cumulative = np.cumsum(p)
            place = draws.random() * cumulative[-1]
            bad += int(np.searchsorted(cumulative, place, side="right")) != token
    model.train(training)
    return bad


@pytest.fixture
def drawn(monkeypatch):
    """(misdrawn, drawn) tokens of each generated batch; `top_p` is what they are drawn at."""
    found, original = {"top_p": 1.0, "batches": []}, generation.generate

    def generate(model, prompts, sampler, **options):
        states = [stream.bit_generator.state for stream in sampler.streams]
        responses = original(model, prompts, sampler, **options)
        bad = misdrawn(model, prompts, responses, states, top_p=found["top_p"])
        found["batches"].append((bad, sum(map(len, responses))))
        return responses

    monkeypatch.setattr(generation, "generate", generate)
    return found


def run(folder, pair, *, trl=None, peft=None, rank=0, loss="reverse_kl", steps=2):
    return train(
        pair,
        make_prompts(8),
        output_dir=folder,
        config=TrainConfig("teachability", 0.5, loss=loss, steps=steps, batch=4, learning_rate=0.1),
        engine=EngineConfig(
            max_new_tokens=8,
            save_every=0,
            lora_rank=rank,
            trl=json.dumps(trl) if trl else None,
            peft=json.dumps(peft) if peft else None,
        ),
        evaluation=EvaluationConfig(eval_contexts=0),
    )


def bent(pair):
    """The pair, its student with generation settings that would bend the sampling."""
    settings = pair.student.model.generation_config
    settings.repetition_penalty, settings.suppress_tokens, settings.num_beams = 1.5, [5, 6, 7], 3
    return pair


@pytest.mark.parametrize(
    "trl, peft, rank, top_p",
    [
        (None, None, 0, 1.0),
        ({"top_p": 0.7}, None, 0, 0.7),
        ({"neftune_noise_alpha": 5}, None, 0, 1.0),
        (None, None, 4, 1.0),
        ({"disable_dropout": False}, {"lora_dropout": 0.5}, 4, 1.0),
        ({"gradient_checkpointing": True}, None, 4, 1.0),
    ],
)
def test_tokens_are_draws_from_p(tmp_path, drawn, trl, peft, rank, top_p):
    drawn["top_p"] = top_p
    run(tmp_path, bent(make_pair()), trl=trl, peft=peft, rank=rank)
    assert len(drawn["batches"]) == 2 and sum(count for _, count in drawn["batches"]) > 30
    assert [bad for bad, _ in drawn["batches"]] == [0, 0]


def test_dropout_is_in_the_loss_and_nowhere_else(tmp_path, drawn):
    def pair():
        made = make_pair()
        for layer in made.student.model.model.layers:
            layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
        return made

    found = {
        off: run(tmp_path / str(off), pair(), trl={"disable_dropout": off}, steps=1).metrics
        for off in (True, False)
    }
    assert [bad for bad, _ in drawn["batches"]] == [0, 0]
    one, other = found[True].iloc[0], found[False].iloc[0]
    assert one["forward_kl/all"] == other["forward_kl/all"] and one["loss"] != other["loss"]


def pair_of(name, settings):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(getattr(transformers, name)(settings).eval())
    return assemble("made", *models, make_tokenizer())


def llama4():
    from transformers import Llama4TextConfig

    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    return pair_of("Llama4ForCausalLM", Llama4TextConfig(**SMALL | more))


def mpt(scale):
    from transformers import MptConfig

    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64}
    settings = MptConfig(**sizes, initializer_range=0.3, eos_token_id=1, logit_scale=scale)
    return pair_of("MptForCausalLM", settings)


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
@pytest.mark.parametrize("make", [llama4, lambda: mpt("inv_sqrt_d_model"), lambda: mpt(0.25)])
def test_models_whose_backbone_or_scale_trl_does_not_know(tmp_path, make, loss, drawn):
    pair = make()
    assert pair.student.apart
    before = [p.detach().clone() for p in pair.student.model.parameters()]
    metrics = run(tmp_path, pair, loss=loss, steps=1).metrics
    assert np.isfinite(metrics["loss"]).all() and drawn["batches"][0][0] == 0
    if loss == "reverse_kl":
        assert metrics["loss"][0] == pytest.approx(metrics["reverse_kl/selected"][0], rel=1e-4)
    after = pair.student.model.parameters()
    assert any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "trl, peft, message",
    [
        (None, {"lora_dropout": 0.1}, r"lora_dropout to 0\.1, and dropout is off in training"),
        ({"top_p": 0.0}, None, r"sets top_p to 0\.0 and top_k to 0; top_p must lie in \(0, 1\]"),
        ({"top_p": 1.5}, None, r"top_p must lie in"),
        ({"top_k": -1}, None, r"top_k must not be negative"),
        ({"fp16": True}, None, r"^fp16 has no effect on the CPU"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"zz": 1}},
            None,
            r"sets zz in activation_checkpointing_kwargs|sets zz in gradient_checkpointing_kwargs",
        ),
        (None, {"target_modules": "(("}, r"do not take these settings: missing \)"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_one_sentence(tmp_path, trl, peft, message):
    with pytest.raises(DiagnosticsError, match=message):
        run(tmp_path, make_pair(), trl=trl, peft=peft, rank=4 if peft else 0)


@pytest.mark.parametrize("target", ["all-linear", ["embed_tokens"], ["lm_head"]])
def test_an_adapted_model_in_memory_is_measured_as_it_runs(target):
    peft = pytest.importorskip("peft")
    pair = bent(make_pair())
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(pair.student.model, settings).eval()
    readout = Readout(adapted)
    ids = torch.arange(2, 12)[None]
    expected = adapted(input_ids=ids).logits[0]
    found = readout.logits(readout.hidden(ids, torch.ones_like(ids))[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    streams = [generation.random_stream(0, "a")]
    states = [stream.bit_generator.state for stream in streams]
    sampler = generation.StreamSampler(streams, 1.0, 1.0, 0, 64)
    responses = generation.generate(adapted, [(5, 6)], sampler, end_ids=[1], max_new_tokens=16)
    assert misdrawn(adapted, [(5, 6)], responses, states) == 0


def test_an_adapter_of_virtual_tokens_is_refused():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(make_pair().student.model, settings)
    with pytest.raises(DiagnosticsError, match="adapter of type PROMPT_TUNING, which puts virtual"):
        Readout(adapted)
