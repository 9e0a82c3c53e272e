"""Logits out of narrow states: against float64 of the same operands, and what a pair in bfloat16
measures.
"""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics import criteria, rollout, score
from diagnostics.contexts.story_sums import sums
from diagnostics.measure import divergences, losses, projection
from diagnostics.measure.projection import linear, wide_head
from diagnostics.models.pair import Readout, load_pair

MEASURES = ("forward_kl", "reverse_kl", "js", "compatibility", "advantage", "student_entropy")


def operands(dtype=torch.bfloat16, *, states=None, n=7, hidden=48, vocabulary=301):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        draw(n, hidden).to(states or dtype),
        draw(vocabulary, hidden).to(dtype),
        draw(vocabulary).to(dtype),
    )


@pytest.fixture
def parts(monkeypatch):
    """A head of 301 ids is widened in many parts, the last of them short."""
    monkeypatch.setattr(projection, "WIDENED_BYTES", 40 * 48 * 4)


@pytest.mark.parametrize(
    "dtype, states",
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_narrow_operands_give_float32_logits(parts, dtype, states, bias):
    h, w, b = operands(dtype, states=states)
    b = b if bias else None
    exact = F.linear(h.double(), w.double(), None if b is None else b.double())
    logits = linear(h, w, b)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5
    if dtype == states or states is None:
        assert (F.linear(h, w, b) - exact).abs().max() > 1e-3  # what it is for


def test_float64_stays_and_float32_is_f_linear():
    assert linear(*operands(torch.float64)).dtype == torch.float64
    assert linear(*operands(torch.bfloat16, states=torch.float64)).dtype == torch.float64
    assert torch.equal(linear(*operands(torch.float32)), F.linear(*operands(torch.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_derivatives_are_rounded_once(parts, dtype):
    given = [x.requires_grad_() for x in operands(dtype)]
    wide = [x.detach().double().requires_grad_() for x in given]
    weights = torch.randn(7, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (linear(*given) * weights.float()).sum().backward()
    (F.linear(*wide) * weights).sum().backward()
    for narrow, exact in zip(given, wide, strict=True):
        assert narrow.grad.dtype == dtype
        assert torch.allclose(
            narrow.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_nothing(dtype):
    given = [x.requires_grad_() for x in operands(dtype)]
    outside = linear(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear(*given)
    inside.sum().backward()
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert torch.equal(given[1].grad, torch.autograd.grad(outside.sum(), given[1])[0])


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x._base is None:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def test_no_second_head_is_held(monkeypatch):
    monkeypatch.setattr(projection, "WIDENED_BYTES", 2**16)
    h, w, _ = operands(vocabulary=20_000)
    with _Largest() as forward:
        logits = linear(h, w)
    assert forward.bytes <= max(2**16, logits.numel() * 4) < w.numel() * 4
    with _Largest() as backward:
        projection.to_states(logits, w, h.dtype)
    assert backward.bytes <= 2**16


def test_no_states_give_no_logits_and_know_their_parameters():
    _, w, _ = operands()
    logits = linear(torch.zeros(0, 48, dtype=torch.bfloat16), nn.Parameter(w))
    assert logits.shape == (0, 301) and losses._leaves(logits)


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_a_narrow_heads_gradient_is_that_of_float32_logits(loss):
    """Chunk by chunk, cut to a shared vocabulary, and rounded once at the end."""
    h, w, _ = operands(n=40)
    q, v, _ = operands(n=40, hidden=32)
    y = torch.arange(40)
    options = {"loss": loss, "weights_N": torch.ones(40), "denominator": 40.0}

    def gradients(dtype, **more):
        head = nn.Parameter(w.to(dtype))
        states = h.detach().to(dtype, copy=True).requires_grad_()
        value = losses.chunked_loss(
            states,
            lambda x: linear(x, head[:200]),
            q.double(),
            lambda x: linear(x, v[:200].double()),
            y,
            **options,
            **more,
        )
        value.backward()
        return value, head.grad, states.grad

    value, of_head, of_states = gradients(torch.bfloat16, chunk=3)
    exact, exact_head, exact_states = gradients(torch.float64)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert of_head.dtype == of_states.dtype == torch.bfloat16
    for narrow, wide in ((of_head, exact_head), (of_states, exact_states)):
        assert (narrow.double() - wide).norm() / wide.norm() < 0.6 * torch.finfo(torch.bfloat16).eps


def test_chunks_of_a_narrow_head_add_up_in_float32():
    """A thousand small derivatives, of which bfloat16 sums would lose most."""
    h, w, _ = operands(n=1000)
    head = nn.Parameter(w)

    def gradient(chunk):
        head.grad = None
        losses.chunked_loss(
            h,
            lambda x: linear(x, head),
            h,
            lambda x: linear(x, w.flip(0)),
            torch.zeros(1000, dtype=torch.long),
            loss="forward_kl",
            weights_N=torch.ones(1000),
            denominator=1000.0,
            chunk=chunk,
        ).backward()
        return head.grad.double()

    whole = gradient(1000)
    assert (gradient(1) - whole).norm() / whole.norm() < 0.01 * torch.finfo(
        torch.bfloat16
    ).eps ** 0.5


# ---------------------------------------------------------------- a pair


@pytest.fixture(scope="module")
def pair():
    return load_pair("embedded", dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def bank(pair):
    return rollout(pair, sums(24, seed=3, split="probe"), max_new_tokens=24, seed=0)


def rounded(readout):
    """The logits that the model itself would hand over: rounded to its dtype."""
    return lambda h: readout.logits(h).to(readout.head.weight.dtype)


@pytest.fixture(scope="module")
def three_ways(pair, bank):
    """Tables from the same bfloat16 states: as scored, from rounded logits, from float32 weights on
    float32 states.
    """
    from diagnostics.probing import scores

    tokens, of_rounded, of_exact = score(pair, bank, sweep=()), [], []
    exact = {
        id(r): lambda h, r=r: F.linear(h.double(), r.head.weight.double())
        for r in (pair.student, pair.teacher)
    }
    order = []
    with torch.no_grad():
        for batch in scores.batches(bank):
            states = batch.states(pair.student), batch.teacher_states(pair.teacher)
            assert states[0].dtype == torch.bfloat16
            order.append(batch.rows_n)
            for out, heads in (
                (of_rounded, [rounded(pair.student), rounded(pair.teacher)]),
                (of_exact, [exact[id(pair.student)], exact[id(pair.teacher)]]),
            ):
                out.append(
                    divergences.measure_hidden(
                        states[0], heads[0], states[1], heads[1], batch.sampled_n
                    )
                )
    rows = torch.cat(order).argsort()
    return [tokens] + [
        tokens.assign(
            **{
                name: torch.cat([p[name] for p in out])[rows].numpy()
                for name in out[0]
                if name in tokens
            }
        )
        for out in (of_rounded, of_exact)
    ]


@pytest.mark.parametrize("name", MEASURES)
def test_mean_errors_of_a_bf16_pair_fall(three_ways, name):
    scored, of_rounded, of_exact = (table[name].to_numpy() for table in three_ways)
    before, now = (np.abs(x - of_exact).mean() for x in (of_rounded, scored))
    assert 5 * now < before


@pytest.mark.parametrize("name", ["teachability", "entropy"])
def test_five_percent_of_a_bf16_pair_are_those_of_float32_logits(three_ways, name):
    scored, of_rounded, of_exact = (
        criteria.select(table, name, budget=0.05) for table in three_ways
    )
    assert scored.sum() and np.array_equal(scored, of_exact)


def test_a_narrow_model_is_apart_whatever_its_rounding(pair):
    assert pair.student.apart and pair.teacher.apart
    assert (
        pair.student.logits(
            torch.zeros(2, pair.student.head.in_features, dtype=torch.bfloat16)
        ).dtype
        == torch.float32
    )


@torch.no_grad()
def test_a_model_that_is_run_whole_gives_float32_logits_too(pair):
    model, ids = pair.student.model, torch.arange(6)[None]
    with wide_head(model):
        inside = model(input_ids=ids).logits
    states = model.base_model(input_ids=ids).last_hidden_state[0]
    assert inside.dtype == torch.float32 and torch.equal(
        inside[0], linear(states, model.lm_head.weight)
    )
    assert model(input_ids=ids).logits.dtype == torch.bfloat16


def test_text_is_drawn_from_the_logits_that_are_measured(pair, monkeypatch):
    """What the first token is drawn from is float32, and that token's log-probability there is the
    scored one.
    """
    from diagnostics.contexts import rollouts

    seen, choose = [], rollouts.StreamSampler.__call__
    monkeypatch.setattr(
        rollouts.StreamSampler,
        "__call__",
        lambda self, ids, logits: (seen.append(logits.clone()), choose(self, ids, logits))[1],
    )
    bank = rollout(pair, sums(1, seed=3, split="probe"), max_new_tokens=2, seed=0)
    logits = seen[0][0, : pair.vocabulary].float()
    assert (logits != logits.bfloat16().float()).any()
    drawn = logits.double().log_softmax(-1)[bank[0].response_ids[0]]
    assert score(pair, bank, sweep=())["student_logprob"][0] == pytest.approx(
        float(drawn), abs=1e-5
    )


# ---------------------------------------------------------------- scales of the logits

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED = {
    "FalconH1Config": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "Llama4TextConfig": {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
    },
    "GraniteConfig": {"logits_scaling": 8.0},
    "CohereConfig": {"logit_scale": 0.25},
    "HyperCLOVAXConfig": {"logits_scaling": 0.125},
    "Gemma2Config": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SCALED, "MptConfig"])
@torch.no_grad()
def test_logits_of_scaled_heads(name, dtype):
    torch.manual_seed(0)
    if name == "MptConfig":
        config = transformers.MptConfig(
            vocab_size=60,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            logit_scale="inv_sqrt_d_model",
        )
    else:
        config = getattr(transformers, name)(**(TINY | SCALED[name]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    model.get_output_embeddings().weight.mul_(20)
    readout = Readout(model)
    assert readout.apart
    ids = torch.arange(3, 11)[None]
    whole = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        .logits[0]
        .double()
    )
    logits = readout.logits(readout.hidden(ids, torch.ones_like(ids))[0]).double()
    assert (logits - whole).abs().max() <= 8 * torch.finfo(dtype).eps * (1 + whole.abs().max())
