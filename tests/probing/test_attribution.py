"""First-order gains, lift and kernel against per-position gradients by plain autograd."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context
from diagnostics.criteria import quadrants
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.probing.attribution import attribute, sample_positions
from diagnostics.probing.attribution_tables import (
    kernel_shares,
    lift_by_group,
    linearity,
    position_groups,
)
from diagnostics.probing.folds import folds_of
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench, loss_weights
from diagnostics.probing.tracer import PARTS, Tracer, plain_attention
from tests.conftest import make_bank, make_model, make_tokenizer
from tests.study_tables import tokens as study_tokens

STEP = {"adamw": 1e-3, "sgd": 0.05}


def gpt2(seed, *, hidden=24, tied=False):
    """An architecture that stays in float64 throughout; Llama's norms and plain attention go
    through float32.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64,
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config).double().eval()
    torch.random.set_rng_state(state)
    return model


def make_setting(student=None):
    """A float64 pair and a bank in which one prompt has two contexts."""
    pair = assemble("tiny", student or gpt2(1), gpt2(2, hidden=32), make_tokenizer())
    contexts = list(make_bank([5, 4, 3, 6, 4, 2]))
    twin = contexts[1]
    contexts.append(
        Context(
            "c6",
            twin.prompt_id,
            twin.prompt,
            twin.prompt_ids,
            "other",
            twin.response_ids[::-1],
            False,
        )
    )
    bank = Bank(tuple(contexts))
    tokens = score(pair, bank)
    # the prompt with two contexts carries loss
    return (
        pair,
        bank,
        tokens,
        np.where(tokens.prompt_id.isin(["p1", "p3", "p4"]), "step", "held_out"),
    )


@pytest.fixture(scope="module")
def setting():
    pair, bank, tokens, split = make_setting()
    assert "p1" in set(tokens.prompt_id[split == "step"]), (
        "the prompt with two contexts has to carry loss"
    )
    return pair, bank, tokens, split


@pytest.fixture(autouse=True)
def written_out(setting):
    """One form of the attention for everything that is compared."""
    with plain_attention(setting[0].student.model):
        yield


def tracer_of(setting, optimizer, loss="reverse_kl"):
    pair, bank, tokens, split = setting
    bench = StepBench(pair, bank, tokens, folds_of(tokens.assign(split=split)))
    return Tracer(
        bench,
        loss_weights(tokens, split == "step"),
        loss=loss,
        beta=0.5,
        optimizer=optimizer,
        step_size=STEP[optimizer],
    )


def brute_force(setting, optimizer):
    """Per-position gradients by plain autograd on whole logits: grad D [N, P], grad of the reverse
    KL [N, P], and a*P.
    """
    pair, bank, _tokens, split = setting
    parameters = list(pair.student.model.parameters())
    gradients = ([], [])
    for context in bank:
        ids = torch.tensor([context.ids])
        at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        ln_p = pair.student.model(input_ids=ids).logits[0, at].log_softmax(-1)
        ln_q = pair.teacher.model(input_ids=ids).logits[0, at].detach().log_softmax(-1)
        for values, out in zip(
            ((ln_q.exp() * (ln_q - ln_p)).sum(-1), (ln_p.exp() * (ln_p - ln_q)).sum(-1)), gradients
        ):
            for value in values:
                parts = torch.autograd.grad(value, parameters, retain_graph=True)
                out.append(torch.cat([part.flatten() for part in parts]))
    forward_NP, loss_NP = (torch.stack(rows) for rows in gradients)
    on_step = torch.from_numpy((split == "step").astype(float))
    g_P = (on_step[:, None] * loss_NP).sum(0) / on_step.sum()
    scale_P = 1 / (g_P.abs() + 1e-8) if optimizer == "adamw" else torch.ones_like(g_P) / g_P.norm()
    return forward_NP, loss_NP, torch.where(g_P == 0, 0.0, STEP[optimizer] * scale_P), on_step


def brute_kernel(setting, optimizer, columns=slice(None)):
    forward_NP, loss_NP, scale_P, on_step = brute_force(setting, optimizer)
    return (
        (forward_NP[:, columns] * scale_P[columns])
        @ loss_NP[:, columns].T
        * on_step
        / on_step.sum()
    ).numpy()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_full_kernel_is_brute_force(setting, optimizer):
    """Every entry, own prompt or not, equals products of gradients taken one position at a time."""
    expected = brute_kernel(setting, optimizer)
    every = np.arange(len(expected))
    tracer = tracer_of(setting, optimizer)
    found = np.stack(list(tracer.rows(every, every, kind="full")))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rows_sum_to_the_first_order_gain_and_columns_to_the_lift(setting, optimizer):
    kernel, held_out = brute_kernel(setting, optimizer), setting[3] == "held_out"
    tracer = tracer_of(setting, optimizer)
    gain, lift = tracer.first_order_gain, tracer.lift()
    np.testing.assert_allclose(
        gain, kernel.sum(axis=1), rtol=1e-6, atol=1e-9 * np.abs(kernel).max()
    )
    np.testing.assert_allclose(
        lift[~held_out],
        kernel[held_out][:, ~held_out].mean(axis=0),
        rtol=1e-6,
        atol=1e-9 * np.abs(kernel).max(),
    )
    assert np.isnan(lift[held_out]).all()
    assert np.nansum(lift) == pytest.approx(gain[held_out].mean(), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("full", [False, True])
def test_the_split_adds_up_and_names_the_right_sources(setting, optimizer, full):
    pair, _, tokens, split = setting
    kind = "full" if full else "output_layer"
    head = slice(-pair.student.head.weight.numel(), None)
    assert list(pair.student.model.parameters())[-1] is pair.student.head.weight
    kernel = brute_kernel(setting, optimizer, slice(None) if full else head)
    targets = np.flatnonzero(split == "step")
    table = tracer_of(setting, optimizer).kernel(targets, full=full)
    table = table[table.kernel == kind].reset_index(drop=True)
    context, prompt = tokens.context_id.to_numpy(), tokens.prompt_id.to_numpy()
    scale = np.abs(kernel).max()
    for k, i in enumerate(targets):
        same_context, same_prompt = context == context[i], prompt == prompt[i]
        expected = {
            "self": kernel[i, i],
            "own_context": kernel[i, same_context].sum() - kernel[i, i],
            "own_prompt": kernel[i, same_prompt & ~same_context].sum(),
            "other_prompts": kernel[i, ~same_prompt].sum(),
            "total": kernel[i].sum(),
        }
        for name, value in expected.items():
            assert table[name][k] == pytest.approx(value, rel=1e-6, abs=1e-9 * scale), name
    assert table.own_prompt.abs().max() > 0
    np.testing.assert_allclose(table[list(PARTS)].sum(axis=1), table.total, atol=1e-12 * scale)


def test_output_layer_of_a_gradient_step_has_a_closed_form(setting):
    """<p_i - q_i, dl_j/dz_j> <h_i, h_j>, with the reverse KL's pull p (ln p - ln q - KL) written
    out.
    """
    pair, bank, tokens, split = setting
    states, p, q = [], [], []
    for context in bank:
        ids = torch.tensor([context.ids])
        at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        with torch.no_grad():
            states.append(pair.student.model.base_model(input_ids=ids).last_hidden_state[0, at])
            p.append(pair.student.model(input_ids=ids).logits[0, at].softmax(-1))
            q.append(pair.teacher.model(input_ids=ids).logits[0, at].softmax(-1))
    h, p, q = (torch.cat(parts) for parts in (states, p, q))
    ratio = p.log() - q.log()
    pull = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    on_step = torch.from_numpy((split == "step").astype(float))
    tracer = tracer_of(setting, "sgd")
    norm = float(brute_norm(setting))
    expected = STEP["sgd"] / norm * ((p - q) @ pull.T) * (h @ h.T) * on_step / on_step.sum()
    every = np.arange(len(tokens))
    found = np.stack(list(tracer.rows(every[:6], every, kind="output_layer")))
    np.testing.assert_allclose(found, expected[:6].numpy(), rtol=1e-7, atol=1e-12)


def brute_norm(setting):
    _, loss_NP, _, on_step = brute_force(setting, "sgd")
    return ((on_step[:, None] * loss_NP).sum(0) / on_step.sum()).norm()


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "sampled", "topk_reverse"])
def test_first_order_gain_is_the_finite_difference(setting, loss):
    _pair, _bank, _tokens, _split = setting
    tracer = tracer_of(setting, "sgd", loss)
    gain = tracer.first_order_gain
    bench, small = tracer.bench, 1e-6
    ends = []
    for sign in (1, -1):
        with bench.moved(tracer.update, sign * small):
            ends.append(bench.rescore("x")[0])
    bench.require_restored()
    np.testing.assert_allclose(
        gain / STEP["sgd"], (ends[1] - ends[0]) / (2 * small), rtol=1e-5, atol=1e-8
    )
    assert np.abs(gain).max() > 1e-4


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled", "topk_reverse"])
def test_lift_sums_to_the_held_out_gain_for_every_loss(setting, loss):
    tracer = tracer_of(setting, "sgd", loss)
    gain, lift = tracer.first_order_gain, tracer.lift()
    assert np.nansum(lift) == pytest.approx(gain[setting[3] == "held_out"].mean(), rel=1e-9)


def test_tied_embeddings_give_the_output_layer_its_output_path_alone():
    setting = make_setting(gpt2(1, tied=True))
    pair, _, _, split = setting
    assert pair.student.head.weight is pair.student.model.get_input_embeddings().weight
    targets = np.flatnonzero(split == "step")[:3]
    with plain_attention(pair.student.model):
        tracer = tracer_of(setting, "adamw")
        table = tracer.kernel(targets, full=True).set_index("kernel")
        whole = np.stack(
            list(tracer.rows(targets, np.arange(len(split)), kind="output_layer"))
        ).sum(axis=1)
    np.testing.assert_allclose(table.loc["output_layer", "total"], whole, rtol=1e-8)
    np.testing.assert_allclose(
        table.loc["full", "total"], tracer.first_order_gain[targets], rtol=1e-8
    )
    assert not np.allclose(
        table.loc["full", "total"], table.loc["output_layer", "total"], rtol=0.01
    )


def test_a_float32_llama_adds_up_too():
    pair, _bank, _tokens, split = setting = make_setting(make_model(1))
    targets = np.flatnonzero(split == "step")[:4]
    with plain_attention(pair.student.model):
        tracer = tracer_of(setting, "sgd")
        rows, gain = (
            np.stack(list(tracer.rows(targets, np.arange(len(split)), kind="full"))),
            tracer.first_order_gain,
        )
    np.testing.assert_allclose(
        rows.sum(axis=1), gain[targets], rtol=1e-3, atol=1e-4 * np.abs(rows).max()
    )


def mixture(seed):
    """Experts whose fused form has no forward-mode derivative."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config).eval()


def test_a_mixture_of_experts_adds_up_too():
    pair, bank, tokens, split = setting = make_setting(mixture(1))
    targets, before = (
        np.flatnonzero(split == "step")[:3],
        pair.student.model.config._experts_implementation,
    )
    assert before != "eager"
    with plain_attention(pair.student.model):
        assert pair.student.model.config._experts_implementation == "eager"
        tracer = tracer_of(setting, "sgd")
        rows, gain = (
            np.stack(list(tracer.rows(targets, np.arange(len(split)), kind="full"))),
            tracer.first_order_gain,
        )
    assert pair.student.model.config._experts_implementation == before
    np.testing.assert_allclose(
        rows.sum(axis=1), gain[targets], rtol=1e-3, atol=1e-4 * np.abs(rows).max()
    )
    table = attribute(
        pair, bank, tokens=tokens, sample=4, draws=50, optimizer="sgd", step=1e-3
    ).linearity
    assert table[table.split == "all"].set_index("fraction").slope[0.1] == pytest.approx(
        1, abs=0.05
    )


def test_attribute_leaves_the_student_as_it_was(setting):
    pair, bank, tokens, _ = setting
    before, attention = (
        weights_sha256(pair.student.model),
        pair.student.model.config._attn_implementation,
    )
    result = attribute(pair, bank, tokens=tokens, sample=8, draws=50)
    assert (
        weights_sha256(pair.student.model) == before
        and pair.student.model.config._attn_implementation == attention
    )
    assert set(result.kernel.kernel) == {"output_layer"} and result.kernel.shape[0] <= 8
    step = result.tokens.fold == 0
    assert result.tokens.lift.notna().equals(step) and result.tokens.first_order_gain.notna().all()
    assert "slope" in result._repr_html_()


def test_a_small_step_is_predicted_and_a_large_one_is_not(setting):
    pair, bank, tokens, _ = setting
    table = attribute(
        pair, bank, tokens=tokens, sample=4, draws=50, optimizer="sgd", step=0.01, folds=2
    ).linearity
    whole = table[table.split == "all"].set_index("fraction")
    assert (
        whole.slope[0.1] == pytest.approx(1, abs=0.02)
        and whole.r2[0.1] > 0.999
        and whole.explained[0.1] > 0.999
    )
    assert abs(whole.slope[3.0] - 1) > 5 * abs(whole.slope[0.1] - 1)
    assert (table.slope_low <= table.slope).all() and (table.r2_high <= 1).all()
    np.testing.assert_allclose(table.step_size, table.fraction * 0.01)


def test_the_first_order_gain_predicts_that_of_fold_0(setting):
    """The step of the probe is the one that is attributed: same folds, same size, same fold."""
    pair, bank, tokens, _ = setting
    options = {"tokens": tokens, "optimizer": "sgd", "step": 0.003, "folds": 3}
    traced = attribute(pair, bank, sample=4, draws=50, **options)
    probed = probe(pair, bank, nulls=(), placebos=0, horizon=(), **options).tokens
    assert (traced.tokens.fold == probed.fold).all()
    errors = [
        np.abs(probed[f"gain_fold{fold}"] - traced.tokens.first_order_gain).mean()
        for fold in range(3)
    ]
    assert errors[0] < 0.03 * probed.gain_fold0.abs().mean() and min(errors[1:]) > 10 * errors[0]
    rows = traced.linearity.set_index(["fraction", "split"])
    assert rows.realised_mean[1.0, "step"] == pytest.approx(
        probed.gain_fold0[probed.fold == 0].mean(), rel=1e-3
    )
    assert rows.realised_mean[1.0, "held_out"] == pytest.approx(
        probed.gain_fold0[probed.fold > 0].mean(), rel=1e-3
    )


def test_lift_adds_up_over_the_prompts_of_all_other_folds(setting):
    pair, bank, tokens, _ = setting
    table = attribute(pair, bank, tokens=tokens, sample=1, draws=20, folds=3).tokens
    held_out = table.fold > 0
    assert table.fold.nunique() == 3
    assert table.lift.sum() == pytest.approx(table.first_order_gain[held_out].mean(), rel=1e-6)


def test_linearity_is_ordinary_least_squares():
    tokens = study_tokens(prompts=10)
    rng = np.random.default_rng(0)
    tokens["first_order_gain"] = rng.normal(size=len(tokens))
    realised = (
        0.7 * tokens.first_order_gain.to_numpy() * 0.5 + 0.2 + 0.1 * rng.normal(size=len(tokens))
    )
    row = (
        linearity(tokens, {0.5: realised}, 2.0, norm=0.25, draws=200).set_index("split").loc["all"]
    )
    x = 0.5 * tokens.first_order_gain
    slope, _intercept = np.polyfit(x, realised, 1)
    assert row.slope == pytest.approx(slope, rel=1e-9) and row.r2 == pytest.approx(
        np.corrcoef(x, realised)[0, 1] ** 2, rel=1e-9
    )
    assert row.explained == pytest.approx(
        1 - np.sum((realised - x) ** 2) / np.sum((realised - realised.mean()) ** 2), rel=1e-9
    )
    assert (
        row.slope_low < 0.7 < row.slope_high and row.relative_norm == 0.25 and row.step_size == 1.0
    )


def test_sample_is_stratified_and_only_of_supervised_positions():
    tokens = study_tokens(prompts=12)
    weights = (tokens.split == "step").to_numpy().astype(float)
    rows = sample_positions(tokens, weights, count=20, seed=0)
    quadrant = quadrants(tokens)[rows]
    assert (weights[rows] == 1).all() and len(set(rows)) == len(rows) and (np.diff(rows) > 0).all()
    for number in (1, 2, 3, 4):
        there = ((quadrants(tokens) == number) & (weights == 1)).sum()
        assert (quadrant == number).sum() == min(5, there)
    assert not np.array_equal(rows, sample_positions(tokens, weights, count=20, seed=1))
    with pytest.raises(
        DiagnosticsError, match=r"^A kernel on 0 positions was asked for; sample at least 1\.$"
    ):
        sample_positions(tokens, weights, count=0, seed=0)


def test_shares_weight_each_quadrant_by_what_it_stands_for():
    """Two sampled positions of unequal quadrants: the mean over all is that of the population, not
    of the sample.
    """
    tokens = study_tokens(prompts=12)
    quadrant, step = quadrants(tokens), (tokens.split == "step").to_numpy()
    rows = [np.flatnonzero(step & (quadrant == number))[0] for number in (1, 3)]
    kernel = tokens.loc[rows, ["context_id", "prompt_id", "position"]].reset_index(drop=True)
    kernel[["kernel", *PARTS, "total"]] = [
        ["full", 1.0, 0.0, 0.0, 1.0, 2.0],
        ["full", 3.0, 1.0, 0.0, -2.0, 2.0],
    ]
    table = kernel_shares(tokens, kernel, draws=20).set_index(["group", "part"])
    one, three = ((step & (quadrant == number)).sum() for number in (1, 3))
    assert table["mean"]["all", "self"] == pytest.approx((one + 3 * three) / (one + three))
    assert table.share["all", "self"] == pytest.approx((one + 3 * three) / (2 * one + 2 * three))
    assert (
        table["mean"]["q3", "other_prompts"] == -2.0 and table.share["q3", "other_prompts"] == -1.0
    )
    assert sum(table.share["all", part] for part in PARTS) == pytest.approx(1)


def test_shares_of_a_total_that_is_not_positive_are_undefined():
    tokens = study_tokens(prompts=6)
    kernel = tokens.loc[:3, ["context_id", "prompt_id", "position"]]
    kernel[["kernel", *PARTS, "total"]] = [["full", 1.0, 0.0, 0.0, -2.0, -1.0]] * 4
    table = kernel_shares(tokens, kernel, draws=20)
    assert table.share.isna().all() and (table[(table.part == "self")]["mean"] == 1).all()


def test_lift_by_group_counts_shares():
    tokens = study_tokens(prompts=12)
    step = (tokens.split == "step").to_numpy()
    tokens["lift"] = np.where(step, np.random.default_rng(1).gamma(2, size=len(tokens)), np.nan)
    table = lift_by_group(tokens, draws=100).set_index("group")
    for name, mask in position_groups(tokens).items():
        share = tokens.lift[mask].sum() / tokens.lift.sum()
        part = (mask & step).sum() / step.sum()
        assert table.lift_share[name] == pytest.approx(share) and table.position_share[
            name
        ] == pytest.approx(part)
        assert table.enrichment[name] == pytest.approx(share / part)
    tokens["lift"] = -tokens["lift"]
    assert lift_by_group(tokens, draws=20).lift_share.isna().all()


def test_an_architecture_without_forward_mode_is_named(setting, monkeypatch):
    pair, _bank, _tokens, _split = setting
    tracer = tracer_of(setting, "sgd")

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g

    logits = pair.student.logits
    monkeypatch.setattr(pair.student, "logits", lambda hidden: logits(Opaque.apply(hidden)))
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^GPT2LMHeadModel has an operation without forward-mode derivative \(.*\)\. Probe and"
            r" intervene on it"
        ),
    ):
        _ = tracer.first_order_gain


def test_kernel_table_without_a_separable_head(setting, monkeypatch, caplog):
    pair, _bank, _tokens, split = setting
    tracer = tracer_of(setting, "sgd")
    monkeypatch.setattr(pair.student, "apart", False)
    table = tracer.kernel(np.flatnonzero(split == "step")[:2], full=False)
    assert (
        isinstance(table, pd.DataFrame)
        and table.empty
        and "cannot be told apart: its kernel is left out" in caplog.text
    )
