"""Drawn inputs whose right value is worked out apart: generation settings, templates with odd
tokenizers, adapters on any module. `FUZZ_CASES` draws more, as in tests/test_fuzz.py.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diagnostics.contexts import generation, rollouts
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.generation_settings import sampling_facts
from diagnostics.contexts.rendering import Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.loading import load_model
from diagnostics.models.pair import assemble
from tests.conftest import make_model, make_prompts, make_tokenizer

ALL = int(os.environ.get("FUZZ_CASES", 2600))


def cases(share: float):
    return settings(
        max_examples=max(5, round(share * ALL)),
        deadline=None,
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


# --- generation settings

SETTINGS = {
    "do_sample": [True, False],
    "temperature": [0.1, 0.7, 5.0],
    "top_p": [0.1, 0.9],
    "top_k": [1, 20],
    "min_p": [0.3],
    "typical_p": [0.2],
    "epsilon_cutoff": [0.01],
    "eta_cutoff": [0.01],
    "repetition_penalty": [0.5, 1.1, 3.0],
    "encoder_repetition_penalty": [1.5],
    "no_repeat_ngram_size": [1, 2],
    "min_length": [30],
    "min_new_tokens": [3, 20],
    "max_length": [3],
    "max_new_tokens": [1],
    "max_time": [1e-6],
    "suppress_tokens": [list(range(5, 60))],
    "begin_suppress_tokens": [list(range(5, 60))],
    "bad_words_ids": [[[7], [8, 9]]],
    "sequence_bias": [[[[20], 50.0]]],
    "exponential_decay_length_penalty": [(1, 3.0)],
    "guidance_scale": [3.0],
    "forced_bos_token_id": [9],
    "forced_eos_token_id": [9],
    "num_beams": [2, 4],
    "num_return_sequences": [2],
    "diversity_penalty": [1.0],
    "penalty_alpha": [0.6],
    "dola_layers": ["high"],
    "prompt_lookup_num_tokens": [2],
    "stop_strings": [["w1", "w2"]],
    "return_dict_in_generate": [True],
    "output_scores": [True],
    "token_healing": [True],
    "use_cache": [False],
    "cache_implementation": ["static", "dynamic"],
    "renormalize_logits": [True],
    "remove_invalid_values": [True],
    "pad_token_id": [2, 40],
    "bos_token_id": [3, 40],
}


@pytest.fixture(scope="module")
def models():
    return make_model(1), make_model(2), make_tokenizer()


@torch.no_grad()
def redrawn(model, context, seed, temperature, top_p, top_k, size):
    """The response's tokens, each drawn again from p, tempered and filtered, by plain loops."""
    prompt, found = list(context.prompt_ids), []
    draws = generation.random_stream(seed, context.prompt_id, 0)
    logits = model(torch.tensor([[*prompt, *context.response_ids]])).logits[0].double()
    for t in range(len(context.response_ids)):
        p = (logits[len(prompt) - 1 + t, :size] / temperature).softmax(-1).numpy()
        order = np.argsort(-p, kind="stable")
        if top_k:
            p[order[top_k:]] = 0
            p = p / p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        cumulative = np.cumsum(p)
        found.append(int(np.searchsorted(cumulative, draws.random() * cumulative[-1], "right")))
    return tuple(found)


@pytest.mark.filterwarnings("ignore")
@given(
    asked=st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in SETTINGS.items()}),
    temperature=st.sampled_from([0.5, 0.7, 1.0, 1.3]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    seed=st.integers(0, 5),
)
@cases(0.02)
def test_generation_settings_bend_no_draw(models, asked, temperature, top_p, top_k, seed):
    from transformers import GenerationConfig

    student, teacher, tokenizer = models
    student.generation_config = GenerationConfig(eos_token_id=1)
    for name, value in asked.items():
        setattr(student.generation_config, name, value)
    pair = assemble("drawn", student, teacher, tokenizer)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    bank = rollouts.rollout(pair, make_prompts(3), max_new_tokens=6, seed=seed, **options)
    for context in bank:
        expected = redrawn(student, context, seed, temperature, top_p, top_k, pair.vocabulary)
        assert context.response_ids == expected
        assert not set(context.response_ids[:-1]) & set(pair.end_ids)
    aside = sampling_facts(pair, **options).get("generation_config_set_aside", {})
    bending = {"repetition_penalty", "suppress_tokens", "num_beams", "min_new_tokens"}
    assert bending & set(asked) <= set(aside)


# --- templates and tokenizers

STARTS = st.sampled_from(["", "{{ bos_token }}", "<pad>", "w9 "])
HEADS = st.sampled_from(
    [
        "<{{ m.role }}> ",
        "{{ m['role'] }}: ",
        "[{{ m.role | upper }}] ",
        "{% if loop.first %}w5 {% endif %}",
    ]
)
CONTENTS = st.sampled_from(
    ["{{ m.content }}", "{{ m['content'] | trim }}", "{{ m.content }}{{ eos_token }}"]
)
REFUSALS = st.sampled_from(
    ["", "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"]
)
ENDS = st.sampled_from(["w6", "<pad>", "{{ bos_token }}w6", "{% if thinking %}w7{% endif %}w6", ""])
POSTS = st.sampled_from([None, "B $A", "$A E", "B $A E", "B B $A", "E $A B"])
CHATS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.sampled_from(["w1 w2", " w3 ", "w4", "<pad> w1"]),
        }
    ),
    max_size=2,
).map(lambda before: [*before, {"role": "user", "content": "w8 w1"}])


def odd_tokenizer(template, post):
    from tokenizers.processors import TemplateProcessing

    made = make_tokenizer()
    names = made.convert_ids_to_tokens([0, 1])
    made.bos_token, made.eos_token, made.chat_template = *names, template
    if post:
        single = post.replace("B", names[0]).replace("E", names[1])
        special = [(name, i) for i, name in enumerate(names)]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=special
        )
    return made


@given(
    start=STARTS,
    head=HEADS,
    content=CONTENTS,
    refusal=REFUSALS,
    end=ENDS,
    post=POSTS,
    chat=CHATS,
    thinking=st.booleans(),
)
@cases(0.02)
def test_rendered_ids_are_the_templates_own(
    start, head, content, refusal, end, post, chat, thinking
):
    template = (
        f"{start}{{% for m in messages %}}{refusal}{head}{content} {{% endfor %}}"
        f"{{% if add_generation_prompt %}}{end}{{% endif %}}"
    )
    tokenizer = odd_tokenizer(template, post)
    renderer = Renderer(tokenizer, kwargs={"thinking": thinking})
    try:
        expected = tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=False, thinking=thinking
        )
    except Exception:
        with pytest.raises(DiagnosticsError, match="does not render"):
            renderer(chat, "row 1")
        return
    text = renderer(chat, "row 1")
    assert list(encode_prompt(tokenizer, text, rendered=text in renderer.written)) == expected


# --- adapters

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]


@pytest.mark.filterwarnings("ignore")
@given(
    tied=st.booleans(),
    targets=st.sets(st.sampled_from([*MODULES, "embed_tokens"]), min_size=1, max_size=3),
    saved=st.sampled_from([None, ["lm_head"], ["embed_tokens"], ["norm"]]),
    variant=st.sampled_from([{}, {"use_rslora": True}, {"lora_alpha": 1}, {"bias": "all"}]),
    seed=st.integers(0, 9),
)
@cases(0.01)
def test_a_merged_adapter_is_the_adapted_model(
    tmp_path_factory, tied, targets, saved, variant, seed
):
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    make_model(1, tie_word_embeddings=tied).save_pretrained(folder / "base")
    base = load_model(folder / "base", dtype="float32", device="cpu")
    torch.manual_seed(seed)
    options = {"modules_to_save": saved, "target_modules": sorted(targets - set(saved or ()))}
    if not options["target_modules"]:
        options["target_modules"] = ["q_proj"]
    config = peft.LoraConfig(
        r=3, init_lora_weights=False, task_type="CAUSAL_LM", **options | variant
    )
    adapted = peft.get_peft_model(base, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    merged = load_model(folder / "adapter", dtype="float32", device="cpu")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=2e-4, rtol=1e-4)
