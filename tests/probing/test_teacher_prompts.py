"""A teacher that reads more than the student: the same response after its own prompt."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Prompt, read_bank
from diagnostics.models.pair import assemble
from diagnostics.pipeline.cli import main
from diagnostics.probing import scores
from diagnostics.probing.attribution import attribute
from diagnostics.probing.intervention import interventions
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import batches, score
from diagnostics.training.run import EngineConfig, TrainConfig, train
from tests.conftest import make_bank, make_model, make_prompts, make_tokenizer
from tests.probing.test_scores import crowded, reference_logprobs


def hinted(bank, hints):
    """The bank with other prompts for the teacher, None where there is none."""
    contexts = [
        dataclasses.replace(c, teacher_prompt=None if h is None else "hint", teacher_prompt_ids=h)
        for c, h in zip(bank, hints)
    ]
    return Bank(tuple(contexts))


@pytest.fixture
def hints(bank):
    """Longer, shorter, equal and none."""
    return hinted(
        bank, [(0, 9, 9, 9, 9, 9, 9), (0,), None, bank[3].prompt_ids, (0, 20, 21, 22), None]
    )


@pytest.fixture
def same():
    """Student and teacher with the same weights."""
    return assemble("self", make_model(1), make_model(1), make_tokenizer())


def as_seen_by_teacher(context):
    return dataclasses.replace(
        context,
        prompt_ids=context.teacher_ids[: len(context.teacher_ids) - len(context.response_ids)],
    )


def distributions(model, context):
    """ln of the next-token distributions [T, V] before each response token, float64, one forward a
    token.
    """
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([context.prompt_ids + context.response_ids[:t]]))
            .logits[0, -1]
            .double()
            for t in range(len(context.response_ids))
        ]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_position_t_of_the_student_meets_position_t_of_the_teacher(pair, hints, batch_tokens):
    """Against plain loops, every position from a forward of its own."""
    tokens = score(pair, hints, batch_tokens=batch_tokens)
    np.testing.assert_allclose(
        tokens.student_logprob,
        np.concatenate([reference_logprobs(pair.student.model, c) for c in hints]),
        atol=1e-5,
    )
    expected = np.concatenate(
        [reference_logprobs(pair.teacher.model, as_seen_by_teacher(c)) for c in hints]
    )
    np.testing.assert_allclose(tokens.teacher_logprob, expected, atol=1e-5)
    kls = []
    for c in hints:
        p, q = (
            distributions(pair.student.model, c),
            distributions(pair.teacher.model, as_seen_by_teacher(c)),
        )
        kls += (q.exp() * (q - p)).sum(-1).tolist()
    np.testing.assert_allclose(tokens.forward_kl, kls, atol=1e-5)


def test_a_hint_changes_the_teacher_and_nothing_else(pair, bank, hints):
    plain, with_hints = score(pair, bank), score(pair, hints)
    other = with_hints.context_id.isin(["c0", "c1", "c4"])
    np.testing.assert_allclose(with_hints.student_entropy, plain.student_entropy, atol=1e-5)
    np.testing.assert_allclose(
        with_hints.teacher_entropy[~other], plain.teacher_entropy[~other], atol=1e-5
    )
    assert (np.abs(with_hints.teacher_entropy - plain.teacher_entropy)[other] > 1e-3).mean() > 0.9


def test_the_same_weights_disagree_only_through_the_hint(same, hints):
    tokens = score(same, hints)
    other = tokens.context_id.isin(["c0", "c1", "c4"])
    np.testing.assert_allclose(tokens.forward_kl[~other], 0, atol=1e-6)
    assert (tokens.forward_kl[other] > 1e-4).all()


def test_probe_scores_the_same_positions(same, hints):
    result = probe(same, hints, folds=2, horizon=())
    np.testing.assert_allclose(result.tokens.forward_kl, score(same, hints).forward_kl, atol=1e-6)
    step = result.tokens[result.tokens.forward_kl > 1e-4]
    assert len(step) and step.own_gain.mean() > 0
    nothing = probe(same, hints, folds=2, horizon=(), step=0).tokens
    assert (nothing.gain == 0).all()


def test_the_probes_gradient_is_that_of_the_hinted_loss(pair, hints):
    """Mean reverse KL at theta0 against plain loops."""
    result = probe(pair, hints, folds=2, horizon=())
    step = set(result.tokens[result.tokens.fold == 0].context_id)
    values = []
    for c in hints:
        if c.context_id in step:
            p, q = (
                distributions(pair.student.model, c),
                distributions(pair.teacher.model, as_seen_by_teacher(c)),
            )
            values += (p.exp() * (p - q)).sum(-1).tolist()
    assert result.step.loss_before == pytest.approx(np.mean(values), abs=1e-5)


def test_interventions_and_attribution_go_through(pair, hints):
    tokens = score(pair, hints)
    options = {"criteria": ["divergence"], "budgets": [0.3], "random_draws": 1, "horizon": (0, 2)}
    result = interventions(pair, hints, tokens=tokens, folds=2, **options)
    full = result.effects[0].reduction_N3[:, 0]
    gain = probe(pair, hints, tokens=tokens, folds=2, placebos=0, horizon=(), nulls=()).tokens
    np.testing.assert_allclose(full, gain.gain_fold0, atol=1e-6)
    assert all(np.isfinite(effect.reduction_N3).all() for effect in result.effects)
    lift = attribute(pair, hints, tokens=tokens, sample=2, draws=10)
    assert np.isfinite(lift.tokens.first_order_gain).all()


@torch.no_grad()
def test_out_of_memory_halves_keep_the_teachers_prompts(pair, hints, monkeypatch):
    reference = score(pair, hints)
    crowded(pair, monkeypatch, 40)
    np.testing.assert_allclose(score(pair, hints).forward_kl, reference.forward_kl, atol=1e-5)
    whole = batches(hints)[0]
    for half in whole.halves(MemoryError("x")):
        assert [c.context_id for c in half.contexts] == [c.context_id for c in whole.contexts][
            : len(half.contexts)
        ] or half.contexts[-1] is whole.contexts[-1]
        np.testing.assert_allclose(
            half.teacher_states(pair.teacher),
            whole.teacher_states(pair.teacher)[np.isin(whole.rows_n, half.rows_n)],
            atol=1e-5,
        )


@torch.no_grad()
def test_a_subset_of_positions_keeps_its_alignment(pair, hints):
    keep = np.zeros(hints.positions, dtype=bool)
    keep[[0, 7, 8, 30]] = True
    whole = scores.teacher_states(pair, batches(hints))
    rows = torch.cat([b.rows_n for b in batches(hints)])
    states = torch.cat(whole)[rows.argsort()]
    for batch in batches(hints, keep=keep):
        np.testing.assert_allclose(
            batch.teacher_states(pair.teacher), states[batch.rows_n], atol=1e-5
        )


def test_batches_count_the_longer_sequence():
    bank = hinted(make_bank([5] * 10), [tuple([0] + [9] * 60)] * 10)
    assert max(batch.for_teacher().tokens for batch in batches(bank, batch_tokens=200)) <= 200


def test_rollout_freezes_both_prompts(pair, tmp_path):
    prompts = [
        dataclasses.replace(make_prompts(2)[0], teacher_prompt="w50 w51 w0 w1"),
        make_prompts(2)[1],
    ]
    bank = rollout(pair, prompts, max_new_tokens=4)
    assert bank[0].teacher_prompt_ids == (0, 54, 55, 4, 5) and bank[1].teacher_prompt_ids is None
    assert [c.response_ids for c in bank] == [
        c.response_ids for c in rollout(pair, make_prompts(2), max_new_tokens=4)
    ]
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet", index=False)
    assert (
        read_bank(tmp_path / "contexts.parquet") == bank
        and bank[0].teacher_prompt == "w50 w51 w0 w1"
    )
    assert "teacher_prompt" not in rollout(pair, make_prompts(2), max_new_tokens=4).to_frame()


def test_hints_that_cannot_be_scored(pair, bank):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Context 'c0' has no prompt tokens, so its first response token cannot be predicted"
        ),
    ):
        score(pair, hinted(bank, [(), *[None] * 5]))
    with pytest.raises(
        DiagnosticsError,
        match=r"^Context 'c0' holds token id 64, and the shared vocabulary has 64\.",
    ):
        score(pair, hinted(bank, [(0, 64), *[None] * 5]))


def test_training_refuses_hints(pair, tmp_path):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Prompts with a hint or a teacher_prompt can be scored and probed; training lets both"
            r" models read one prompt"
        ),
    ):
        train(
            pair,
            [Prompt("a", "w1", teacher_prompt="w2 w1")] * 4,
            output_dir=tmp_path,
            config=TrainConfig(steps=1, batch=2),
            engine=EngineConfig(),
        )


def test_the_main_job_with_hints(folders, tmp_path):
    """Self-distillation on the command line: one model as both, a hint for the teacher."""
    rows = [{"prompt": f"w{i} w{(7 * i) % 60}", "hint": f"w{(3 * i) % 60}"} for i in range(24)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    assert (
        main(
            [
                "run",
                "--quick",
                "--student",
                folders[1],
                "--teacher",
                folders[1],
                "--prompts",
                str(tmp_path / "p.jsonl"),
                "--max-new-tokens",
                "6",
                "--draws",
                "20",
                "--folds",
                "2",
                "--device",
                "cpu",
                "--quiet",
                "--output-dir",
                str(out),
            ]
        )
        == 0
    )
    tokens = pd.read_parquet(out / "tokens.parquet")
    assert (tokens.forward_kl > 0).mean() > 0.9 and tokens.gain.notna().all()
    assert read_bank(out / "contexts.parquet")[0].teacher_prompt == "w0\n\nw0 w0"
