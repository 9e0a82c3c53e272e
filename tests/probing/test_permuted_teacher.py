"""The null of a step: which teacher grades which position, its gradient by loops, its gains."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.analysis.selection import token_type
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble
from diagnostics.probing import permuted_teacher
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.frozen_bank import BankPart
from diagnostics.probing.one_step import probe
from diagnostics.probing.permuted_teacher import graded_by_others, graders, kept_own
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench
from diagnostics.probing.tensor_lists import first_update, tensor_norm
from tests.conftest import make_bank, make_model, make_tokenizer
from tests.probing.test_attribution import gpt2

LOSSES = ["reverse_kl", "forward_kl", "jsd", "sampled", "topk_reverse"]
LENGTHS = [5, 9, 6, 7, 12, 4, 8, 6]


@pytest.fixture(scope="module")
def setting():
    pair = assemble("exact", gpt2(1), gpt2(2, hidden=32), make_tokenizer())
    bank = make_bank(LENGTHS)
    return pair, bank, score(pair, bank)


def bench_of(setting, **options):
    pair, bank, tokens = setting
    return StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0), **options)


# --- who is graded by whom


def test_no_position_keeps_its_own_teacher_and_every_teacher_is_used_once():
    tokens = pd.DataFrame({"forward_kl": np.arange(200.0)})
    weights = (np.arange(200) % 3 == 0).astype(float)
    rows = np.flatnonzero(weights)
    for seed in range(20):
        graded_by = graders(tokens, weights, "global", seed=[seed])
        assert sorted(graded_by[rows]) == rows.tolist() and kept_own(graded_by, weights) == 0
        assert (graded_by[weights == 0] == np.flatnonzero(weights == 0)).all()
    assert not (graded_by == graders(tokens, weights, "global", seed=[21])).all()
    assert (graded_by == graders(tokens, weights, "global", seed=[19])).all()


def test_all_cycles_are_equally_likely():
    tokens, weights = pd.DataFrame({"forward_kl": np.zeros(4)}), np.ones(4)
    found = [tuple(graders(tokens, weights, "global", seed=[seed])) for seed in range(3000)]
    counts = pd.Series(found).value_counts()
    assert len(counts) == 6 and counts.min() > 400  # (4 - 1)! cycles, 500 expected of each


def test_within_deciles_of_the_divergence():
    rng = np.random.default_rng(0)
    tokens = pd.DataFrame({"forward_kl": rng.lognormal(size=103)})
    weights = np.ones(103)
    graded_by = graders(tokens, weights, "divergence", seed=[0])
    decile = tokens.forward_kl.rank().sub(1).astype(int).to_numpy() * 10 // 103
    assert (decile[graded_by] == decile).all() and kept_own(graded_by, weights) == 0
    assert len(set(decile)) == 10
    # of seven positions there are three groups, with two at least in each
    few = graders(tokens, (np.arange(103) < 7).astype(float), "divergence", seed=[0])
    assert kept_own(few, (np.arange(103) < 7).astype(float)) == 0


def test_within_token_types_a_lone_position_keeps_its_own_and_is_counted():
    tokens = pd.DataFrame(
        {"token": ["a", "7", "b", ",", "c", ";"], "is_special": False, "forward_kl": 1.0}
    )
    weights = np.ones(6)
    graded_by = graders(tokens, weights, "token_type", seed=[0])
    kinds = token_type(tokens)
    assert (kinds[graded_by] == kinds).all()
    assert graded_by[1] == 1 and kept_own(graded_by, weights) == 1
    assert graded_by[[3, 5]].tolist() == [5, 3]


def test_a_null_in_which_nothing_can_move_is_refused():
    tokens = pd.DataFrame({"forward_kl": [1.0, 2.0]})
    with pytest.raises(
        DiagnosticsError, match=r"^The null 'global' has 1 step positions in as many groups, so"
    ):
        graders(tokens, np.array([1.0, 0.0]), "global", seed=[0])
    with pytest.raises(DiagnosticsError, match=r"^Unknown null 'far'\. Known are global"):
        graders(tokens, np.ones(2), "far", seed=[0])


# --- the gradient


def slow_gradient(setting, weights, graded_by, loss):
    """One position at a time from whole logits: its student against the teacher of another."""
    pair, bank, _ = setting
    ln_p, ln_q, sampled = [], [], []
    for context in bank:
        ids = torch.tensor([context.ids])
        at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        ln_p.append(pair.student.model(input_ids=ids).logits[0, at].log_softmax(-1))
        ln_q.append(pair.teacher.model(input_ids=ids).logits[0, at].detach().log_softmax(-1))
        sampled += context.response_ids
    ln_p, ln_q = torch.cat(ln_p), torch.cat(ln_q)
    total = 0.0
    for i in np.flatnonzero(weights):
        p, q, y = ln_p[i], ln_q[graded_by[i]], sampled[i]
        if loss == "forward_kl":
            value = (q.exp() * (q - p)).sum()
        elif loss == "reverse_kl":
            value = (p.exp() * (p - q)).sum()
        elif loss == "jsd":
            m = (0.3 * q.exp() + 0.7 * p.exp()).log()
            value = 0.3 * (q.exp() * (q - m)).sum() + 0.7 * (p.exp() * (p - m)).sum()
        elif loss == "sampled":  # the permuted teacher's advantage at the token of position i
            value = -(q[y] - p[y]).detach() * p[y]
        else:
            top = p.topk(16).indices
            p, q = p[top].log_softmax(-1), q[top].log_softmax(-1)
            value = (p.exp() * (p - q)).sum()
        total = total + weights[i] * value
    mean = total / weights.sum()
    return float(mean.detach()), torch.autograd.grad(mean, list(pair.student.model.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch_tokens", [20, 10_000])
def test_the_gradient_is_that_of_a_loop(setting, loss, batch_tokens):
    bench = bench_of(setting, batch_tokens=batch_tokens)
    weights = bench.loss_weights(1) + 0.5 * bench.loss_weights(3)
    graded_by = graders(setting[2], weights, "global", seed=[3])
    value, gradient = bench.gradient(weights, loss=loss, beta=0.3, graded_by=graded_by)
    expected, slow = slow_gradient(setting, weights, graded_by, loss)
    assert value == pytest.approx(expected, rel=1e-9)
    for mine, theirs in zip(gradient, slow, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    own = bench.gradient(weights, loss=loss, beta=0.3)[1]
    assert not torch.allclose(own[-1], gradient[-1], rtol=1e-3)


def test_everybodys_own_teacher_is_the_real_gradient(setting):
    bench = bench_of(setting)
    weights = bench.loss_weights(0)
    same = np.arange(len(weights))
    real, permuted = (
        bench.gradient(weights, loss="reverse_kl", beta=0.5, graded_by=by) for by in (None, same)
    )
    assert real[0] == permuted[0]
    assert all(torch.equal(a, b) for a, b in zip(real[1], permuted[1], strict=True))


def test_processes_exchange_the_states(setting, monkeypatch):
    """Each of two processes gets the very states that one process would have given it."""
    bench = bench_of(setting, batch_tokens=25)
    weights = bench.loss_weights(0) + bench.loss_weights(2)
    graded_by = graders(setting[2], weights, "global", seed=[1])
    part = bench.frozen.whole
    whole = {
        row: state
        for batch, states in graded_by_others(part, weights, graded_by)
        for row, state in zip(batch.rows_n.tolist(), states, strict=True)
    }
    shares = [BankPart(part.batches[first::2], part.teacher[first::2]) for first in (0, 1)]
    monkeypatch.setattr(permuted_teacher, "EXCHANGED_ROWS", 4)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "total_lengths", lambda length: [length, 32])
    sent = {0: [], 1: []}
    for record in (True, False):
        for rank in (0, 1):
            turn = itertools.count()

            def sum_in_place(tensors, rank=rank, turn=turn, record=record):
                if record:
                    sent[rank].append(tensors[0].clone())
                else:
                    tensors[0] += sent[1 - rank][next(turn)]

            monkeypatch.setattr(distributed, "sum_in_place", sum_in_place)
            found = graded_by_others(shares[rank], weights, graded_by)
            if record:
                continue
            seen = 0
            for batch, states in found:
                for row, state in zip(batch.rows_n.tolist(), states, strict=True):
                    if weights[row]:
                        assert torch.equal(state, whole[row])
                        seen += 1
            assert 0 < seen < weights.astype(bool).sum()
    assert len(sent[0]) > 2


def test_only_a_fold_of_states_is_copied(setting):
    bench = bench_of(setting, batch_tokens=25)
    weights = bench.loss_weights(1)
    graded_by = graders(setting[2], weights, "global", seed=[0])
    part = graded_by_others(bench.frozen.whole, weights, graded_by)
    rows = torch.cat([batch.rows_n for batch in part.batches]).numpy()
    assert sorted(rows) == np.flatnonzero(weights).tolist()
    assert sum(len(states) for states in part.teacher) == weights.sum()


# --- the step


def test_the_null_moves_as_far_as_the_step(setting):
    """From theta0, the permuted gradient's own first update, at the norm of the real step."""
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, optimizer="adamw", step=1e-3, placebos=0, horizon=())
    bench = bench_of(setting)
    before = bench.rescore("before")[0]
    for fold in range(4):
        weights = bench.loss_weights(fold)
        graded_by = graders(tokens, weights, "global", seed=[0, 4, fold, 0])
        update = first_update(slow_gradient(setting, weights, graded_by, "reverse_kl")[1], "adamw")
        size = result.steps[fold].update_norm / tensor_norm(update)
        with bench.moved(update, size):
            gain = before - bench.rescore("after")[0]
        np.testing.assert_allclose(
            result.tokens[f"gain_permuted_fold{fold}"], gain, rtol=1e-5, atol=1e-9
        )
    table = result.tokens
    np.testing.assert_array_equal(table.context_gain, table.gain - table.gain_permuted)
    np.testing.assert_array_equal(table.own_context_gain, table.own_gain - table.own_gain_permuted)
    assert table.context_gain.abs().max() > 1e-4


def marginal_teacher():
    """A teacher that says the same everywhere: one embedding, and layers that add nothing."""
    model = make_model(2, hidden=48)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[5].expand(64, 48))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_teacher_without_context_gives_no_context_gain(optimizer):
    pair, bank = (
        assemble("flat", make_model(1), marginal_teacher(), make_tokenizer()),
        make_bank(LENGTHS),
    )
    table = probe(
        pair,
        bank,
        optimizer=optimizer,
        nulls=("global", "divergence", "token_type"),
        placebos=0,
        horizon=(),
    ).tokens
    assert table.teacher_entropy.std() < 1e-6 and table.own_gain.mean() > 1e-3
    for name in ("context_gain", "own_context_gain", "context_gain_divergence"):
        assert (table[name] == 0).all(), name
    assert (table.context_gain_token_type == 0).all()


@pytest.mark.parametrize("nulls", [(), ("divergence",), ("token_type", "global")])
def test_only_the_nulls_that_were_asked_for(setting, nulls):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, step=1e-4, nulls=nulls, placebos=0, horizon=())
    for name, infix in (
        ("global", ""),
        ("divergence", "_divergence"),
        ("token_type", "_token_type"),
    ):
        assert (f"gain_permuted{infix}_fold3" in result.tokens) == (name in nulls)
        assert (f"context_gain{infix}" in result.tokens) == (name in nulls)
    assert all(list(step.kept_own_teacher) == list(nulls) for step in result.steps)
