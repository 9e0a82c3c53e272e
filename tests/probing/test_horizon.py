"""The trajectory of a probe: against torch's own optimizer, at rate 0, and its table by hand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.contexts.rollouts import resample, rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context
from diagnostics.models.named_pairs import training_rate
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.horizon import Fresh, horizon_gains, horizon_table
from diagnostics.probing.one_step import ControlConfig, probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench
from diagnostics.probing.trajectory import TrajectoryConfig
from tests.conftest import make_model, make_pair, make_prompts
from tests.models.test_topk_teacher import listed
from tests.probing.test_one_step import mean_reverse_kl


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


def bench_of(setting):
    pair, bank, tokens = setting
    return StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0))


def test_gains_are_those_of_torchs_own_optimizer(setting):
    pair, bank, tokens = setting
    bench = bench_of(setting)
    found = horizon_gains(
        bench, bench.rescore("before"), TrajectoryConfig(1e-3), horizon=(1, 3), seed=0
    )
    bench.require_restored()
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    on_step = bench.folds == 0
    names = set(tokens.context_id[on_step])
    contexts = [context for context in bank if context.context_id in names]
    assert len(contexts) <= 16  # one minibatch is the whole fold
    parameters = list(twin.student.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for k in (1, 2, 3):
        optimizer.zero_grad()
        mean_reverse_kl(twin, contexts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if k == 2:
            continue
        after = score(twin, bank)
        for outcome, measure in (("gain", "forward_kl"), ("reverse_gain", "reverse_kl")):
            gain_N = (tokens[measure] - after[measure]).to_numpy()
            held, own = (found.columns[f"{prefix}{outcome}_h{k}"] for prefix in ("", "own_"))
            np.testing.assert_allclose(held[~on_step], gain_N[~on_step], atol=1e-4)
            np.testing.assert_allclose(own[on_step], gain_N[on_step], atol=1e-4)
            assert np.isnan(held[on_step]).all() and np.isnan(own[~on_step]).all()
    assert np.nanmean(found.columns["own_gain_h3"]) > 1e-2 and found.update_norm > 0


def test_no_rate_no_gain_and_no_other_text(setting):
    bench = bench_of(setting)
    found = horizon_gains(
        bench, bench.rescore("before"), TrajectoryConfig(0.0), horizon=(2,), seed=0
    )
    for name, values in found.columns.items():
        assert (values[np.isfinite(values)] == 0).all(), name
    assert found.update_norm == 0 and found.fresh.before.equals(found.fresh.after)
    prompts = setting[2].prompt_id[bench.folds == 1]
    assert set(found.fresh.before.prompt_id) == set(prompts)


def test_the_probe_keeps_its_trajectory(setting):
    """Columns and table are of one trajectory, at the training's rate; the student ends as it
    began.
    """
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    result = probe(pair, bank, tokens=tokens, horizon=(3, 1, 3), nulls=(), placebos=0, step=1e-4)
    assert weights_sha256(pair.student.model) == before
    bench = bench_of(setting)
    found = horizon_gains(
        bench,
        bench.rescore("before"),
        TrajectoryConfig(training_rate(pair.name)),
        horizon=(1, 3),
        seed=0,
    )
    for name, values in found.columns.items():
        np.testing.assert_array_equal(result.tokens[name], values)
    table = result.horizon.set_index(["horizon", "population", "measure"])
    assert table.reduction[3, "held_out", "forward_kl"] == pytest.approx(
        result.tokens.gain_h3.mean()
    )
    assert table.reduction[1, "step", "reverse_kl"] == pytest.approx(
        result.tokens.own_reverse_gain_h1.mean()
    )
    assert set(table.index.get_level_values(0)) == {1, 3} and (table.steps == 1).all()
    assert np.isnan(table.low[3, "step", "forward_kl"]) and "gain_h1" not in tokens
    fresh = found.fresh
    assert table.reduction[3, "fresh", "reverse_kl"] == pytest.approx(
        fresh.before.reverse_kl.mean() - fresh.after.reverse_kl.mean()
    )


def test_the_probes_trajectory_takes_the_minibatches_that_were_asked_for(setting):
    """Steps of two contexts are others than steps of the whole fold, and those of that setting."""
    pair, bank, tokens = setting
    few, whole = (
        probe(pair, bank, tokens=tokens, horizon=(2,), nulls=(), placebos=0, step=1e-4, **options)
        for options in ({"minibatch": 2}, {})
    )
    bench = bench_of(setting)
    config = TrajectoryConfig(training_rate(pair.name), minibatch=2)
    found = horizon_gains(bench, bench.rescore("before"), config, horizon=(2,), seed=0)
    np.testing.assert_array_equal(few.tokens.gain_h2, found.columns["gain_h2"])
    assert (few.tokens.gain_h2 != whole.tokens.gain_h2)[few.tokens.fold != 0].all()
    np.testing.assert_array_equal(few.tokens.gain, whole.tokens.gain)


@pytest.mark.parametrize("wrong", [{"minibatch": 0}, {"warm_steps": -1}, {"learning_rate": -1.0}])
def test_a_trajectory_that_cannot_be_taken_is_refused_before_any_step(wrong):
    with pytest.raises(DiagnosticsError, match="trajectory"):
        ControlConfig(**wrong)


@pytest.mark.parametrize("horizon", [(), (0,)])
def test_no_trajectory_where_none_is_asked_for(setting, horizon):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, horizon=horizon, nulls=(), placebos=0, step=1e-4)
    assert result.horizon.empty and not any("_h" in name for name in result.tokens)


def test_the_table_by_hand():
    """Held-out falls behind an earlier horizon while the step contexts go on: overfitted."""
    tokens = pd.DataFrame(
        {
            "prompt_id": ["a", "a", "b", "c"],
            "gain_h1": [1.0, 2.0, 6.0, np.nan],
            "gain_h5": [0.0, 1.0, 2.0, np.nan],
            "gain_h20": [0.0, 0.0, 0.0, np.nan],
            "own_gain_h1": [np.nan, np.nan, np.nan, 1.0],
            "own_gain_h5": [np.nan, np.nan, np.nan, 2.0],
            "own_gain_h20": [np.nan, np.nan, np.nan, 1.5],
        }
    )
    for name in list(tokens)[1:]:
        tokens[name.replace("gain", "reverse_gain")] = tokens[name] * 0
    fresh = Fresh(
        pd.DataFrame(
            {"prompt_id": ["a", "b", "b"], "forward_kl": [3.0, 5.0, 1.0], "reverse_kl": 2.0}
        ),
        pd.DataFrame({"prompt_id": ["a", "b"], "forward_kl": [1.0, 2.0], "reverse_kl": 2.0}),
    )
    table = horizon_table(tokens, fresh, horizon=(1, 5, 20)).set_index(
        ["measure", "horizon", "population"]
    )
    found = table.loc["forward_kl"]
    assert found.reduction[1, "held_out"] == 3 and found.reduction[5, "held_out"] == 1
    assert found.reduction[5, "step"] == 2 and found.reduction[20, "fresh"] == 3 - 1.5
    assert found.overfitted.to_dict() == {
        (1, "held_out"): False,
        (1, "step"): False,
        (5, "held_out"): True,
        (5, "step"): True,
        (20, "held_out"): False,  # the step contexts fall too
        (20, "step"): False,
        (20, "fresh"): False,
    }
    assert found.prompts[1, "held_out"] == 2 and found.positions[1, "held_out"] == 3
    assert found.low[1, "held_out"] <= 3 <= found.high[1, "held_out"]
    assert (table.loc["reverse_kl"].reduction == 0).all() and (table.criterion == "full").all()


def test_lists_grade_no_new_text(tmp_path, pair, caplog):
    bank = rollout(pair, make_prompts(10), max_new_tokens=8)
    result = probe(listed(pair, bank, 4, tmp_path), bank, horizon=(1,), nulls=(), placebos=0)
    assert set(result.horizon.population) == {"held_out", "step"}
    assert "new text is left out of the horizons" in caplog.text


# --- new text


def test_the_same_student_writes_what_it_wrote(setting):
    pair, bank, _ = setting
    assert resample(pair, bank, max_new_tokens=8, seed=0) == bank
    other = resample(pair, bank, max_new_tokens=5, seed=1)
    assert [c.prompt_ids for c in other] == [c.prompt_ids for c in bank] and other != bank
    assert max(len(context.response_ids) for context in other) <= 5


def test_several_contexts_of_a_prompt_differ_and_keep_the_teachers_prompt(setting):
    pair, bank, _ = setting
    twin = dataclasses.replace(bank[0], context_id="twin", teacher_prompt_ids=(0, 5))
    new = resample(pair, [bank[0], twin], max_new_tokens=8, seed=0)
    assert isinstance(new, Bank) and isinstance(new[1], Context)
    assert new[0] == bank[0] and new[1].response_ids != bank[0].response_ids
    assert new[1].teacher_prompt_ids == (0, 5) and new[1].context_id == "twin"
