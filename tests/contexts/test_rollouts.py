import numpy as np
import pytest
import torch

from diagnostics.contexts import rollouts
from diagnostics.contexts.rollouts import (
    StreamSampler,
    generate,
    rollout,
    sampled_from,
    set_aside,
    stream,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt
from diagnostics.models.pair import assemble
from diagnostics.training.evaluation import evaluate
from diagnostics.training.run import EngineConfig, TrainConfig, train
from tests.conftest import make_model, make_pair, make_prompts, make_tokenizer


def test_same_seed_same_text(pair):
    first, second = (rollout(pair, make_prompts(6), max_new_tokens=10, seed=3) for _ in range(2))
    assert first == second != rollout(pair, make_prompts(6), max_new_tokens=10, seed=4)


def test_text_does_not_depend_on_the_batch(pair):
    together = rollout(pair, make_prompts(9), max_new_tokens=10)
    alone = rollout(pair, make_prompts(9), max_new_tokens=10, batch_tokens=1)
    assert together == alone


def test_samples_of_a_prompt_differ(pair):
    bank = rollout(pair, make_prompts(2), max_new_tokens=10, samples_per_prompt=3)
    assert [c.context_id for c in bank] == ["p0-0", "p0-1", "p0-2", "p1-0", "p1-1", "p1-2"]
    assert len({c.response_ids for c in bank}) == 6


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_responses_end_at_their_first_end_token(pad_is_eos):
    pair = assemble("tiny", make_model(1), make_model(2), make_tokenizer(pad_is_eos=pad_is_eos))
    with torch.no_grad():
        pair.student.model.lm_head.weight[1] += 0.15 * pair.student.model.lm_head.weight[4:].std()
    bank = rollout(pair, make_prompts(24), max_new_tokens=16)
    finished = [c for c in bank if c.finished]
    assert finished and len({len(c.response_ids) for c in finished}) > 1
    for context in bank:
        assert context.finished == (context.response_ids[-1] == 1)
        assert 1 not in context.response_ids[:-1]
        assert context.finished or len(context.response_ids) == 16


def test_chosen_tokens_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3, 0.0]]))
    chooser = StreamSampler([np.random.default_rng(0)], 1.0, 1.0, 0, 4)
    counts = np.zeros(4)
    for _ in range(4000):
        counts[int(chooser(torch.zeros(1, 1, dtype=torch.long), logits).argmax())] += 1
    assert counts[3] == 0
    np.testing.assert_allclose(counts / 4000, [0.5, 0.2, 0.3, 0.0], atol=0.025)


@pytest.mark.parametrize(
    "options, allowed",
    [
        ((1.0, 1.0, 1), {0}),
        ((1.0, 0.6, 0), {0, 2}),
        ((0.01, 1.0, 0), {0}),
        ((1.0, 1.0, 0, 2), {0, 1}),
    ],
)
def test_sampling_settings_narrow_the_choice(options, allowed):
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3]]))
    temperature, top_p, top_k, vocabulary = (*options, 3)[:4]
    chooser = StreamSampler([np.random.default_rng(0)], temperature, top_p, top_k, vocabulary)
    assert {
        int(chooser(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) for _ in range(200)
    } == allowed


def test_settings_and_prompts_that_cannot_be_used(pair):
    with pytest.raises(
        DiagnosticsError,
        match=r"^max_new_tokens=0, samples_per_prompt=1 and temperature=1\.0 must be positive\.$",
    ):
        rollout(pair, make_prompts(1), max_new_tokens=0)
    silent = make_tokenizer()
    silent.backend_tokenizer.post_processor = None
    bare = assemble("tiny", make_model(1), make_model(2), silent)
    with pytest.raises(
        DiagnosticsError,
        match=r"^Prompt 'p' has no tokens \(''\)\. Remove it, or add a start token\.$",
    ):
        rollout(bare, [Prompt("p", "")])


# --- p, whatever the checkpoint's generation settings say
# ------------------------------------------------

BENT = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "min_length": 40,
    "suppress_tokens": list(range(4, 40)),
    "begin_suppress_tokens": list(range(4, 60)),
    "bad_words_ids": [[i] for i in range(4, 40)],
    "sequence_bias": [[[9], 20.0]],
    "exponential_decay_length_penalty": [1, 9.0],
    "guidance_scale": 3.0,
    "forced_eos_token_id": 1,
    "forced_bos_token_id": 9,
    "temperature": 0.2,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "top_h": 0.1,
    "num_beams": 2,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "stop_strings": ["w1", "w2"],
    "prompt_lookup_num_tokens": 3,
    "max_length": 3,
    "max_time": 1e-9,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
    "penalty_alpha": 0.6,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "encoder_repetition_penalty": 2.0,
    "token_healing": True,
    "do_sample": True,
    "diversity_penalty": 1.0,
    "num_beam_groups": 2,
    "dola_layers": "low",
    "use_cache": False,
    "assistant_early_exit": 1,
}


def bend(model, **settings):
    """A checkpoint whose generation_config.json says so."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def redrawn(model, prompt_ids, draws, count, ends=(1,), temperature=1.0):
    """The documented draws, by hand: one pass a token in the model's dtype, then float64."""
    ids, out = list(prompt_ids), []
    while len(out) < count and not (out and out[-1] in ends):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
        cumulative = np.cumsum(np.exp(logits - logits.max()))
        out.append(int(np.searchsorted(cumulative, draws.random() * cumulative[-1], side="right")))
        ids.append(out[-1])
    return tuple(out)


@pytest.mark.parametrize("name", BENT)
def test_no_setting_of_the_checkpoint_bends_the_sampling(name):
    plain, bent = make_pair(), make_pair()
    bend(bent.student.model, **{name: BENT[name]})
    options = {"max_new_tokens": 8, "samples_per_prompt": 2}
    assert rollout(bent, make_prompts(4), **options) == rollout(plain, make_prompts(4), **options)
    assert (
        getattr(bent.student.model.generation_config, name) == BENT[name]
    )  # a checkpoint saved later keeps its file


def test_every_token_of_a_rollout_is_the_documented_draw_from_p():
    pair = make_pair()
    bend(pair.student.model, repetition_penalty=1.3, suppress_tokens=[5, 6], top_k=3, num_beams=2)
    for temperature in (1.0, 0.7):
        for context in rollout(
            pair, make_prompts(6), max_new_tokens=10, seed=3, temperature=temperature
        ):
            by_hand = redrawn(
                pair.student.model,
                context.prompt_ids,
                stream(3, context.prompt_id, 0),
                10,
                temperature=temperature,
            )
            assert context.response_ids == by_hand


def test_every_token_of_an_evaluation_is_the_documented_draw_from_p(monkeypatch):
    pair, prompts, seen, sample = make_pair(), make_prompts(3), [], rollouts.sample
    bend(pair.student.model, repetition_penalty=1.3, min_new_tokens=6, top_k=3)
    monkeypatch.setattr(
        rollouts, "sample", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1]
    )
    evaluate(pair, prompts, samples=2, max_new_tokens=6, seed=11)
    (bank,) = seen
    for context in bank:
        number = int(context.context_id.rpartition("-")[2])
        assert context.response_ids == redrawn(
            pair.student.model, context.prompt_ids, stream(11, context.prompt_id, number), 6
        )


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_every_token_of_a_training_step_is_the_documented_draw_from_p(
    tmp_path, monkeypatch, lora_rank
):
    pair, seen = make_pair(), []
    bend(
        pair.student.model,
        repetition_penalty=1.3,
        suppress_tokens=[5, 6],
        no_repeat_ngram_size=2,
        top_k=3,
    )
    plain = make_pair().student.model  # of the same weights: a LoRA begins at zero

    def watched(model, prompts, *rest, **more):
        seen.append((prompts, generate(model, prompts, *rest, **more)))
        return seen[-1][1]

    monkeypatch.setattr(rollouts, "generate", watched)
    train(
        pair,
        make_prompts(4),
        output_dir=tmp_path,
        config=TrainConfig(steps=1, batch=4, criterion="full", seed=5),
        engine=EngineConfig(max_new_tokens=6, save_every=0, lora_rank=lora_rank),
    )
    ((prompts, responses),) = seen
    assert [tuple(ids) for ids in responses] == [
        redrawn(plain, ids, stream(5, "train", row), 6) for row, ids in enumerate(prompts)
    ]
    assert pair.student.model.generation_config.repetition_penalty == 1.3


@pytest.mark.parametrize(
    "asked, kept",
    [
        ({"temperature": 0.6, "top_p": 0.9}, True),
        ({"num_beams": 1, "num_return_sequences": 3, "do_sample": False}, True),
        ({"num_beams": 2, "num_return_sequences": 3}, False),
    ],
)
def test_settings_that_could_not_be_written_do_not_end_a_training(tmp_path, caplog, asked, kept):
    from transformers import GenerationConfig

    pair = make_pair()
    bend(pair.student.model, **asked)
    train(
        pair,
        make_prompts(2),
        output_dir=tmp_path,
        config=TrainConfig(steps=1, batch=2, criterion="full"),
        engine=EngineConfig(max_new_tokens=2, save_every=1),
    )
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert saved.eos_token_id == 1 and all(
        (getattr(saved, name) == value) == kept
        for name, value in asked.items()
        if name != "do_sample"
    )
    assert ("contradicts itself" in caplog.text) != kept


def test_what_was_set_aside_is_named(caplog):
    pair = make_pair()
    assert set_aside(pair.student.model) == {} and rollouts.sampling_facts(pair) == {
        "sampled_from": "p, the student's distribution, at temperature 1"
    }
    bend(
        pair.student.model,
        repetition_penalty=1.1,
        top_k=20,
        temperature=1.0,
        top_p=1.0,
        num_beams=1,
        do_sample=True,
    )
    assert rollouts.sampling_facts(pair, top_p=0.9)["generation_config_set_aside"] == {
        "repetition_penalty": 1.1,
        "top_k": 20,
    }
    rollout(pair, make_prompts(1), max_new_tokens=1)
    assert caplog.messages == [
        "the student's generation_config.json asks for repetition_penalty=1.1, top_k=20: set aside,"
        " tokens are drawn from the student's own distribution"
    ]


def test_a_narrowed_distribution_is_named_as_such():
    assert sampled_from(temperature=0.7) == "p, the student's distribution, at temperature 0.7"
    assert (
        sampled_from(top_k=20, top_p=0.8)
        == "p, the student's distribution, at temperature 1, the 20 likeliest tokens of it, "
        "the nucleus of mass 0.8 of that, renormalised"
    )


# --- memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_and_draws_the_same(pair, monkeypatch, caplog, kind):
    whole, passes, once = rollout(pair, make_prompts(7), max_new_tokens=6), [], rollouts._generate

    def small(model, prompts, chooser, *rest):
        passes.append(len(prompts))
        if len(prompts) > 2:
            chooser.streams[0].random()  # some tokens had been drawn
            raise kind("no room")
        return once(model, prompts, chooser, *rest)

    monkeypatch.setattr(rollouts, "_generate", small)
    assert rollout(pair, make_prompts(7), max_new_tokens=6) == whole
    assert (
        passes == [7, 3, 1, 2, 4, 2, 2]
        and "7 prompts with 6 new tokens each do not fit in memory at once: halved" in caplog.text
    )


def test_one_prompt_that_does_not_fit_names_the_remedy(pair, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rollouts, "_generate", full)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^One prompt of 3 tokens with 6 new ones does not fit in memory \(CUDA out of"
            r" memory\.\)\. Use --offload-teacher"
        ),
    ):
        rollout(pair, make_prompts(2), max_new_tokens=6)
    with pytest.raises(torch.OutOfMemoryError):
        generate(
            pair.student.model,
            [[0, 5]] * 2,
            StreamSampler([], 1.0, 1.0, 0, 64),
            end_ids=(1,),
            max_new_tokens=2,
            halves=False,
        )


def test_batch_tokens_bound_a_pass(pair, monkeypatch):
    widths, once = [], rollouts._generate
    monkeypatch.setattr(
        rollouts,
        "_generate",
        lambda model, prompts, *rest: (
            widths.append(len(prompts) * (max(map(len, prompts)) + 6))
            or once(model, prompts, *rest)
        ),
    )
    rollout(pair, make_prompts(9), max_new_tokens=6, batch_tokens=40)
    assert len(widths) > 2 and max(widths) <= 40
