"""Models from folders, adapters, GGUF files and quantized weights, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from diagnostics import load_pair, score
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import loading
from diagnostics.models.loading import load_model, load_tokenizer, shared_template
from diagnostics.probing.one_step import probe
from tests.conftest import make_bank, make_model, make_prompts, make_tokenizer

LOAD = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model with its tokenizer, and a LoRA adapter for it with weights of its own."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    make_model(1).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    adapted = with_adapter(peft, load_model(folder / "base", **LOAD))
    adapted.save_pretrained(folder / "adapter")
    return folder


def with_adapter(peft, model, **options):
    """The model with a LoRA of rank 4 that is not zero, unmerged."""
    import warnings

    torch.manual_seed(5)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, settings)


def adapter_like(folder, target, **changes):
    """A copy of the adapter with other settings."""
    shutil.copytree(folder / "adapter", target)
    settings = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(settings | changes))
    return target


# --- LoRA


def test_a_merged_adapter_is_the_base_plus_scaled_products(base):
    """By hand: W + (alpha / r) B A with alpha 8 and r 4, in float64 from the adapter's own file."""
    from safetensors.torch import load_file

    merged, plain = load_model(base / "adapter", **LOAD), load_model(base / "base", **LOAD)
    parts = load_file(base / "adapter" / "adapter_model.safetensors")
    touched = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in parts
        if "lora_A" in name
    }
    assert len(touched) == 14
    for name, weight in merged.named_parameters():
        expected = dict(plain.named_parameters())[name].double()
        module = name.removesuffix(".weight")
        if module in touched:
            a, b = (
                parts[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB"
            )
            expected = expected + 2 * b @ a
            assert (expected - dict(plain.named_parameters())[name]).abs().max() > 0.01
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
        assert weight.requires_grad


@pytest.mark.parametrize("adapted", ["student", "teacher"])
def test_scores_equal_those_of_the_unmerged_adapter(base, adapted):
    import peft

    bank = make_bank([5, 9, 3])
    other = make_model(2, hidden=48)
    source = {"student": other, "teacher": other} | {adapted: base / "adapter"}
    found = score(load_pair(**source, tokenizer=make_tokenizer(), device="cpu"), bank)
    unmerged = with_adapter(peft, make_model(1))
    expected = []
    for context in bank:
        with torch.no_grad():
            logits = (
                unmerged(input_ids=torch.tensor([context.ids])).logits[0].double().log_softmax(-1)
            )
        first = len(context.prompt_ids) - 1
        expected += [
            float(logits[first + t, token]) for t, token in enumerate(context.response_ids)
        ]
    np.testing.assert_allclose(found[f"{adapted}_logprob"], expected, atol=1e-4)
    plain = score(
        load_pair(**source | {adapted: base / "base"}, tokenizer=make_tokenizer(), device="cpu"),
        bank,
    )
    assert np.abs(plain[f"{adapted}_logprob"] - expected).max() > 0.1


def test_a_step_moves_all_weights_of_a_merged_student(base):
    pair = load_pair(student=str(base / "adapter"), teacher=str(base / "base"), device="cpu")
    bank = rollout(pair, make_prompts(8), max_new_tokens=6)
    result = probe(pair, bank)
    assert result.step.update_norm > 0 and result.tokens.gain.abs().max() > 0
    facts = pair.facts["student"]
    assert (facts["name"], facts["adapter"], facts["base"], facts["rank"]) == (
        "adapter",
        "lora",
        "base",
        4,
    )
    assert len(facts["adapter_sha256"]) == 64 and "adapter" not in pair.facts["teacher"]
    assert (
        facts["parameters"] == pair.facts["teacher"]["parameters"]
        and facts["weights_sha256"] != pair.facts["teacher"]["weights_sha256"]
    )


def test_an_adapter_has_its_own_tokenizer_or_the_bases(base, tmp_path):
    assert load_tokenizer(base / "adapter").get_vocab() == make_tokenizer().get_vocab()
    own = adapter_like(base, tmp_path / "own")
    make_tokenizer([*(f"w{i}" for i in range(60)), "extra"]).save_pretrained(own)
    assert "extra" in load_tokenizer(own).get_vocab()


def test_adapters_that_cannot_be_merged(base, tmp_path):
    def refused(folder, message, **options):
        with pytest.raises(DiagnosticsError, match=message):
            load_model(folder, **LOAD | options)

    refused(
        adapter_like(base, tmp_path / "a", peft_type="PREFIX_TUNING"),
        r"a holds an adapter of type PREFIX_TUNING for the base model '.*base'\. Only LoRA can be"
        r" merged",
    )
    refused(
        adapter_like(base, tmp_path / "b", base_model_name_or_path=None),
        r"for the base model None\. Only LoRA",
    )
    refused(
        adapter_like(base, tmp_path / "c", base_model_name_or_path=str(tmp_path / "gone")),
        r"c names the base model '.*gone', a path that is not on this machine\. Put the base model"
        r" there",
    )
    refused(
        adapter_like(base, tmp_path / "j", base_model_name_or_path="../gone"),
        r"names the base model '\.\./gone', a path that is not on this machine",
    )
    refused(
        adapter_like(base, tmp_path / "k", base_model_name_or_path="https://x.y/z"),
        r"names the base model 'https://x\.y/z', a path that is not on this machine",
    )
    refused(
        adapter_like(base, tmp_path / "l", base_model_name_or_path=str(base / "adapter")),
        r"which is an adapter itself\. Merge that one into its own base model first",
    )
    make_model(1, hidden=48).save_pretrained(tmp_path / "wide")
    refused(
        adapter_like(base, tmp_path / "d", base_model_name_or_path=str(tmp_path / "wide")),
        r"^The adapter in .*d cannot be merged \(Error\(s\) in loading state_dict.*\)\. Check that"
        r" it belongs",
    )
    refused(
        adapter_like(base, tmp_path / "e", target_modules=["nothing"]),
        r"^The adapter in .*e cannot be merged \(Target modules .*\)\. Check that it belongs",
    )
    make_model(1, layers=3).save_pretrained(tmp_path / "deep")
    everywhere = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    refused(
        adapter_like(
            base,
            tmp_path / "f",
            base_model_name_or_path=str(tmp_path / "deep"),
            target_modules=everywhere,
        ),
        r"^The adapter in .*f does not fit its base model: 14 factors of the model are not in the"
        r" file and 0 of the file not in the model \(base_model\.model\.model\.layers\.2",
    )
    make_model(1, layers=1).save_pretrained(tmp_path / "flat")
    refused(
        adapter_like(base, tmp_path / "i", base_model_name_or_path=str(tmp_path / "flat")),
        r"0 factors of the model are not in the file and 14 of the file not in the model",
    )
    unsafe = adapter_like(base, tmp_path / "g")
    (unsafe / "adapter_model.safetensors").rename(unsafe / "adapter_model.bin")
    refused(
        unsafe,
        r"g has no adapter_model\.safetensors; other formats can run code and are not read\. Save"
        r" the adapter again",
    )
    (adapter_like(base, tmp_path / "h") / "adapter_config.json").write_text("{")
    refused(tmp_path / "h", r"adapter_config\.json cannot be read as an adapter's settings")
    (tmp_path / "h" / "adapter_config.json").write_text("[" * 10**5 + "]" * 10**5)
    refused(
        tmp_path / "h",
        r"adapter_config\.json cannot be read as an adapter's settings \(ValueError\('its brackets"
        r" are nested more than 100 deep'",
    )
    (tmp_path / "h" / "adapter_config.json").write_text(" " * 5_000_000)
    refused(
        tmp_path / "h",
        r"settings \(ValueError\('5,000,000 bytes, where 4,194,304 are the most that is read'\)\)",
    )
    refused(
        base / "adapter",
        r"adapter is an adapter, which is merged into its base model; that cannot be done in nf4",
        dtype="nf4",
    )


# --- adapters on every module of tied and untied bases

EVERYWHERE = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
ADAPTERS = {
    name: {"target_modules": [name]} for name in (*EVERYWHERE, "lm_head", "embed_tokens")
} | {
    "all": {"target_modules": [*EVERYWHERE, "lm_head", "embed_tokens"]},
    "ends": {"target_modules": ["lm_head", "embed_tokens"], "lora_alpha": 32, "use_rslora": True},
    "kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "dora": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True},
    "ranks": {
        "target_modules": EVERYWHERE,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    },
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved and kept tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved embedding, adapted head": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 40]},
    "tokens of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [5, 40]},
    },
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def ends(request, tmp_path_factory):
    """A base model whose head is or is not its embedding."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("ends")
    make_model(1, tie_word_embeddings=request.param).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder, request.param


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_is_what_peft_runs(ends, kind, tmp_path):
    """Logits against PeftModel's on the untouched base, and the merged model lives through a
    checkpoint.
    """
    import warnings

    import peft
    from transformers import AutoModelForCausalLM

    folder, tied = ends
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(
            load_model(folder / "base", **LOAD),
            peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"lora_alpha": 8, **ADAPTERS[kind]}),
        )
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
        made.save_pretrained(tmp_path / "adapter")
        expected = logits(
            peft.PeftModel.from_pretrained(
                load_model(folder / "base", **LOAD), str(tmp_path / "adapter")
            ).eval()
        )
    merged = load_model(tmp_path / "adapter", **LOAD)
    assert (expected - logits(load_model(folder / "base", **LOAD))).abs().max() > 0.01
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    same = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert same == merged.config.tie_word_embeddings and (tied or not same)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        expected,
        rtol=0,
        atol=1e-4,
    )


def lora(folder, target, **settings):
    """A random LoRA for the base model of a folder, saved."""
    import warnings

    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        made = peft.get_peft_model(
            load_model(folder / "base", **LOAD),
            peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings),
        )
        made.save_pretrained(target)
    return target


def test_a_merge_that_changes_the_model_is_refused(ends, tmp_path, monkeypatch):
    """Were tied weights not untied, the difference would be seen."""
    folder, tied = ends
    adapter = lora(folder, tmp_path / "a", target_modules=["embed_tokens"])
    monkeypatch.setattr(loading, "_untie", lambda adapted: False)
    if not tied:
        load_model(adapter, **LOAD)
        return
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"a cannot be merged: merged, the model's logits differ by up to \d.* from those of the"
            r" model with its adapter\. Its kind"
        ),
    ):
        load_model(adapter, **LOAD)


def test_adapters_that_no_weights_can_hold_are_refused(ends, tmp_path):
    """A bias where the layer has none; an adapter that waits for certain tokens."""
    folder, _ = ends
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"cannot be merged \(Impossible to merge LoRA with `lora_bias=True` because the base"
            r" layer has no bias"
        ),
    ):
        load_model(lora(folder, tmp_path / "a", target_modules=["q_proj"], lora_bias=True), **LOAD)
    with pytest.raises(DiagnosticsError, match="cannot be merged"):
        load_model(
            lora(folder, tmp_path / "b", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
            **LOAD,
        )


def test_what_peft_warns_of_is_said_or_refused(ends, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    folder, _ = ends
    adapter = lora(folder, tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"of_a_later_version": 3}))
    load_model(adapter, **LOAD)
    assert [
        message
        for message in caplog.messages
        if "as PEFT says: Unexpected keyword arguments ['of_a_later_version']" in message
    ]
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "magnitude" not in name},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"a lacks weights that its settings name \(Found missing adapter keys.*magnitude.*\)\."
            r" Save the adapter again\."
        ),
    ):
        load_model(adapter, **LOAD)


def test_an_adapter_that_grew_the_vocabulary_says_by_how_much(ends, tmp_path):
    import warnings

    import peft

    folder, _ = ends
    model = load_model(folder / "base", **LOAD)
    model.resize_token_embeddings(70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        ).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"a cannot be merged \(.*size mismatch for .*: copying a param with shape"
            r" torch\.Size\(\[70, 32\]\) from checkpoint, .*\[64, 32\]\)\.\)\."
        ),
    ):
        load_model(tmp_path / "a", **LOAD)


def test_adapters_without_peft(base, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Reading adapters needs the package peft, which is not installed\. Run `pip install"
            r" peft`\.$"
        ),
    ):
        load_model(base / "adapter", **LOAD)


# --- GGUF

TOKENS = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "Ġ",
    "w",
    *"0123456789",
    *(f"w{i}" for i in range(10)),
    *(f"Ġw{i}" for i in range(38)),
]
MERGES = [f"w {i}" for i in range(10)] + [f"Ġ w{i}" for i in range(10)]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(path, model, quantise=lambda values: (values, None)):
    """A Llama in the layout of llama.cpp: query and key rows interleaved for its rotary
    embedding.
    """
    import gguf

    c, out = model.config, gguf.GGUFWriter(path, "llama")
    (
        out.add_block_count(c.num_hidden_layers),
        out.add_context_length(c.max_position_embeddings),
        out.add_embedding_length(c.hidden_size),
    )
    (
        out.add_feed_forward_length(c.intermediate_size),
        out.add_head_count(c.num_attention_heads),
        out.add_head_count_kv(c.num_key_value_heads),
    )
    (
        out.add_layer_norm_rms_eps(c.rms_norm_eps),
        out.add_rope_freq_base(c.rope_parameters["rope_theta"]),
        out.add_vocab_size(c.vocab_size),
    )
    (
        out.add_tokenizer_model("gpt2"),
        out.add_tokenizer_pre("smollm"),
        out.add_token_list(TOKENS),
        out.add_token_merges(MERGES),
    )
    out.add_token_types([3 if token.startswith("<") else 1 for token in TOKENS])
    (
        out.add_bos_token_id(0),
        out.add_eos_token_id(1),
        out.add_pad_token_id(2),
        out.add_unk_token_id(3),
    )
    for name, weight in model.state_dict().items():
        values, target = weight.numpy(), WHOLE.get(name)
        if target is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{layer}.{PARTS[part]}.weight"
            if PARTS[part] in ("attn_q", "attn_k"):
                heads = c.num_attention_heads if PARTS[part] == "attn_q" else c.num_key_value_heads
                values = (
                    values.reshape(heads, 2, -1, values.shape[1])
                    .swapaxes(1, 2)
                    .reshape(values.shape)
                )
        values, kind = (
            quantise(np.ascontiguousarray(values)) if values.ndim == 2 else (values, None)
        )
        out.add_tensor(target, values, raw_dtype=kind)
    (
        out.write_header_to_file(),
        out.write_kv_data_to_file(),
        out.write_tensors_to_file(),
        out.close(),
    )
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path):
    pytest.importorskip("gguf")
    found = load_model(write_gguf(tmp_path / "m.gguf", make_model(1)), **LOAD)
    torch.testing.assert_close(logits(found), logits(make_model(1)), rtol=0, atol=0)
    assert (
        found.source_facts["gguf"] == "m.gguf"
        and len(found.source_facts["sha256"]) == 64
        and found.config.quantization_config is None
    )


def test_a_quantised_gguf_file_is_dequantised(tmp_path):
    """Q8_0: blocks of 32 weights, each a scale of largest/127, rounded to float16, times whole
    numbers up to 127.
    """
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    found = load_model(
        write_gguf(
            tmp_path / "m.gguf",
            make_model(1),
            lambda values: (gguf.quants.quantize(values, kind), kind),
        ),
        **LOAD,
    )
    for name, weight in make_model(1).named_parameters():
        error = (dict(found.named_parameters())[name] - weight).abs()
        if weight.ndim == 2 and "q_proj" not in name and "k_proj" not in name:
            blocks = weight.reshape(-1, 32).abs().amax(-1) / 127
            assert (
                error.max() > 0
                and (error.reshape(-1, 32) <= (0.5 + 127 / 2**11) * blocks[:, None] + 1e-6).all()
            )
    assert 1e-4 < (logits(found) - logits(make_model(1))).abs().max() < 0.5


def test_a_pair_of_gguf_files_scores(tmp_path):
    pytest.importorskip("gguf")
    student, teacher = (
        write_gguf(tmp_path / "s.gguf", make_model(1)),
        write_gguf(tmp_path / "t.gguf", make_model(2)),
    )
    pair = load_pair(
        student=str(student), teacher=str(teacher), device="cpu", teacher_dtype="bfloat16"
    )
    assert (
        pair.facts["student"]["gguf"] == "s.gguf"
        and pair.facts["teacher"]["dtype"] == "bfloat16"
        and pair.student.apart
    )
    assert pair.tokenizer("w1 w2")["input_ids"] == [
        TOKENS.index(token) for token in ("w", "1", "Ġ", "w", "2")
    ]
    tokens = score(pair, rollout(pair, make_prompts(3), max_new_tokens=4))
    assert (tokens.forward_kl > 0).all()


def test_gguf_files_that_cannot_be_read(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(DiagnosticsError, match=r"^No model can be loaded from '.*bad\.gguf' \("):
        load_model(tmp_path / "bad.gguf", **LOAD)
    with pytest.raises(
        DiagnosticsError, match=r"^No tokenizer can be loaded from '.*bad\.gguf' \("
    ):
        load_tokenizer(tmp_path / "bad.gguf")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"bad\.gguf is a GGUF file, which is dequantised when it is read; int8 would quantise"
            r" it again"
        ),
    ):
        load_model(tmp_path / "bad.gguf", dtype="int8", device="cpu")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DiagnosticsError, match=r"^Reading GGUF files needs the package gguf"):
        load_model(tmp_path / "bad.gguf", **LOAD)


# --- quantised and unsafe weights


@pytest.fixture
def folder(tmp_path):
    make_model(1).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_bitsandbytes_without_cuda(folder, dtype):
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"m with {dtype} weights needs CUDA and the package bitsandbytes, and the device is"
            r" cpu\. Use the unquantised model"
        ),
    ):
        load_pair(student=str(folder), teacher=str(folder), teacher_dtype=dtype, device="cpu")


def test_a_checkpoint_saved_by_bitsandbytes_without_cuda(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        )
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"m with bitsandbytes(_8bit)? weights needs CUDA and the package bitsandbytes, and the"
            r" device is cpu"
        ),
    ):
        load_model(folder, **LOAD)


def test_the_student_is_never_quantised():
    from diagnostics.pipeline.cli import main

    assert main(["score", "--pair", "embedded", "--dtype", "nf4", "--output-dir", "nowhere"]) == 2
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Unknown dtype 'int4'\. Known are float32, bfloat16, float16, float64, int8, nf4\.$"
        ),
    ):
        load_model("x", dtype="int4", device="cpu")


def test_weights_that_could_run_code_are_refused(folder):
    torch.save(make_model(1).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        DiagnosticsError, match=r"^No model can be loaded from '.*m' \(.*model\.safetensors"
    ):
        load_model(folder, **LOAD)


def test_revisions_reach_the_loader(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    seen = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda source, **options: (seen.append(options), real(source, **options))[1],
    )
    load_pair(
        student=str(folder),
        teacher=str(folder),
        student_revision="abc",
        teacher_revision="def",
        teacher_dtype="float16",
        device="cpu",
    )
    assert sorted(((o["revision"], o["dtype"], o["use_safetensors"]) for o in seen), key=str) == [
        ("abc", torch.float32, True),
        ("def", torch.float16, True),
    ]


def test_another_base_model_is_another_student(ends, tmp_path):
    """The adapter's folder is the same, the weights below it are not: a run's fingerprint tells
    them apart.
    """
    from diagnostics.models.identity import Models
    from diagnostics.models.pair import PairConfig

    folder, _ = ends
    shutil.copytree(folder / "base", tmp_path / "base")
    adapter = lora(folder, tmp_path / "a", target_modules=["q_proj"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    config = PairConfig(student=str(adapter), teacher=str(folder / "base"))
    before = Models(config).fingerprint()
    make_model(9).save_pretrained(tmp_path / "base")
    after = Models(config).fingerprint()
    assert set(before) == {"student", "student_base", "teacher"} and [
        name for name in before if before[name] != after[name]
    ] == ["student_base"]


# --- what a folder may ask for


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_weights_that_the_file_lacks_are_not_drawn_at_random(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1.mlp" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"m lacks 3 of the weights that its config\.json asks for"
            r" \(model\.layers\.1\.mlp\.down_proj\.weight, .*; they would be drawn at random\."
        ),
    ):
        load_model(folder, **LOAD)


def test_weights_that_are_not_used_are_said(folder, caplog):
    load_model(with_config(folder, num_hidden_layers=1), **LOAD)
    assert [
        message
        for message in caplog.messages
        if message.startswith(
            f"{folder}: 9 weights of the file are not in a LlamaForCausalLM and are not used"
            " (model.layers.1"
        )
    ]


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_local_experts"])
def test_a_config_that_asks_for_too_many_parts(folder, name):
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^The config\.json of .*m asks for {name} = 1,000,000,000, and 10,000 is the most"
            r" that is built"
        ),
    ):
        load_model(with_config(folder, **{name: 10**9}), **LOAD)
    with pytest.raises(DiagnosticsError, match=rf"asks for {name} = 1,000,000,000"):
        load_model(with_config(folder, **{name: 2, "text_config": {"deep": {name: 10**9}}}), **LOAD)


def test_a_config_that_names_code_to_fetch(folder):
    with pytest.raises(
        DiagnosticsError,
        match=r"names code to fetch, attn_implementation = 'who/kernel', which is not run",
    ):
        load_model(with_config(folder, attn_implementation="who/kernel"), **LOAD)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_settings_nested_beyond_measure(folder, file):
    (folder / file).write_text('{"model_type": "llama", "a": ' + "[" * 10**5 + "]" * 10**5 + "}")

    def load():
        load_model(folder, **LOAD)
        load_tokenizer(folder)

    with pytest.raises(
        DiagnosticsError, match=r"^No (model|tokenizer) can be loaded from '.*m' \("
    ):
        load()


EVIL = """open({ran!r}, "w").write("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "evilmodel"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
def generate(*arguments, **options):
    pass
"""


@pytest.fixture
def evil(folder, tmp_path, monkeypatch):
    """A folder whose code leaves a file where it runs; nobody may be asked."""
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield folder
    assert not (tmp_path / "ran").exists()


NEVER = (
    r"from '.*m': it brings code of its own \(auto_map\), which this program never runs; no flag"
    r" allows it\. Use a checkpoint of an architecture"
)


def test_a_models_code_is_not_run(evil):
    with_config(
        evil,
        model_type="evilmodel",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    with pytest.raises(DiagnosticsError, match="^No model can be loaded " + NEVER):
        load_model(evil, **LOAD)


def test_a_known_model_with_code_of_its_own_is_the_librarys(evil, caplog):
    with_config(evil, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    torch.testing.assert_close(
        logits(load_model(evil, **LOAD)), logits(make_model(1)), rtol=0, atol=0
    )
    assert (
        f"{evil} brings code of its own, which is not run: llama as the library has it is used"
        in caplog.messages
    )


def test_a_tokenizers_code_is_not_run(evil):
    settings = json.loads((evil / "tokenizer_config.json").read_text())
    changes = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(DiagnosticsError, match="^No tokenizer can be loaded " + NEVER):
        load_tokenizer(evil)


def test_every_loader_is_told_to_run_no_code():
    """Read off the syntax tree: what is loaded by transformers says so, so that nobody is asked."""
    import ast
    from pathlib import Path

    calls = [
        (path.name, call)
        for path in sorted(Path(loading.__file__).parent.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "from_pretrained"
    ]
    said = {
        (path, call.lineno): [
            keyword.value.value for keyword in call.keywords if keyword.arg == "trust_remote_code"
        ]
        for path, call in calls
        if ast.unparse(call.func.value) != "PeftModel"
    }  # it takes a model that is loaded already
    assert len(said) >= 3 and set(map(tuple, said.values())) == {(False,)}


def test_the_code_of_an_adapters_base_is_not_run(evil, tmp_path):
    pytest.importorskip("peft")
    with_config(
        evil,
        model_type="evilmodel",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "base_model_name_or_path": str(evil),
                "auto_mapping": {"base_model_class": "M", "parent_library": "evil"},
            }
        )
    )
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(DiagnosticsError, match="^No model can be loaded " + NEVER):
        load_model(tmp_path / "a", **LOAD)


# --- chat templates


def templated(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_one_template_serves_both_and_the_other_is_shown(caplog):
    student, teacher = (
        templated("S {{ messages[0].content }}"),
        templated("T {{ messages[0].content }} go"),
    )
    facts = shared_template(student, teacher)
    assert (facts["of"], facts["example"], facts["teacher_example"]) == ("student", "S …", "T … go")
    assert (
        len(facts["sha256"]) == len(facts["teacher_sha256"]) == 64
        and facts["sha256"] != facts["teacher_sha256"]
    )
    assert caplog.messages == [
        f"the chat templates differ: the student's ({facts['sha256'][:12]}) renders the prompts of"
        f" both, not the teacher's ({facts['teacher_sha256'][:12]})"
    ]


def test_a_student_without_a_template_takes_the_teachers(caplog):
    student, teacher = make_tokenizer(), templated("T {{ messages[0].content }}")
    assert (
        shared_template(student, teacher)["of"] == "teacher"
        and student.chat_template == teacher.chat_template
    )
    assert caplog.messages == [
        "the student's tokenizer has no chat template: the teacher's is used for both"
    ]


def test_equal_templates_need_no_word_and_none_gives_none(caplog):
    assert (
        "teacher_sha256" not in shared_template(templated("a"), templated("a"))
        and shared_template(make_tokenizer(), make_tokenizer()) == {}
    )
    assert (
        shared_template(templated("{{ raise_exception('no') }}"), make_tokenizer())["example"]
        is None
        and not caplog.messages
    )


def test_the_pairs_facts_name_the_template(tmp_path):
    for name, seed, text in (
        ("s", 1, "S {{ messages[0].content }}"),
        ("t", 2, "T {{ messages[0].content }}"),
    ):
        make_model(seed).save_pretrained(tmp_path / name)
        templated(text).save_pretrained(tmp_path / name)
    facts = load_pair(student=str(tmp_path / "s"), teacher=str(tmp_path / "t"), device="cpu").facts
    assert (
        facts["chat_template"]["of"] == "student"
        and facts["chat_template"]["sha256"] == facts["chat_template_sha256"]
        and "teacher_sha256" in facts["chat_template"]
    )


# --- Hugging Face ids


def cached(hub, name, **files):
    """A repository in the local cache, as a download leaves it."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for file, source in files.values():
        shutil.copy(source, folder / "snapshots" / ("a" * 40) / file)
    return folder / "snapshots" / ("a" * 40)


def test_an_id_that_is_in_the_cache_is_told_apart_without_a_network(base, tmp_path, monkeypatch):
    """A whole model needs no look for an adapter; an adapter is found where it was downloaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "transformers.utils.peft_utils.find_adapter_config_file",
        lambda *_, **__: pytest.fail("asked the network"),
    )
    cached(tmp_path, "who/model", config=("config.json", base / "base" / "config.json"))
    here = cached(
        tmp_path,
        "who/both",
        config=("config.json", base / "base" / "config.json"),
        a=("adapter_config.json", base / "adapter" / "adapter_config.json"),
        w=("adapter_model.safetensors", base / "adapter" / "adapter_model.safetensors"),
    )
    assert (
        loading.adapter_folder("who/model") is None and loading.adapter_folder("who/both") == here
    )


def test_an_id_with_an_adapter_is_fetched(base, monkeypatch):
    monkeypatch.setattr(
        "transformers.utils.peft_utils.find_adapter_config_file",
        lambda source, revision: str(base / "adapter" / "adapter_config.json"),
    )
    monkeypatch.setattr(
        "transformers.utils.cached_file",
        lambda source, name, revision: str(base / "adapter" / name),
    )
    assert loading.adapter_folder("who/adapter", "main") == base / "adapter"
    model = load_model("who/adapter", **LOAD)
    assert model.source_facts["base"] == "base"
