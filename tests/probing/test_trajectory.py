"""Optimizer steps on minibatches of frozen contexts, against torch's own loop."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.named_pairs import TRAINING_OPTIMIZER, training_rate
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.probing.config.trajectory import TrajectoryConfig, require_horizon
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench
from diagnostics.probing.tensor_lists import first_update, tensor_norm
from diagnostics.probing.trajectory import (
    Trajectory,
    every_position,
    full_trajectory,
    minibatches,
    planned_trajectory,
    remeasured,
    require_support,
)
from tests.conftest import make_model, make_pair, make_prompts

RATE = 3e-3


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    tokens = score(pair, bank)
    folds = (np.unique(tokens.prompt_id, return_inverse=True)[1] % 3).astype(np.int32)
    return pair, bank, StepBench(pair, bank, tokens, folds, batch_tokens=60)


def config(**settings):
    return TrajectoryConfig(**{"rate": RATE} | settings)


def weights_now(bench):
    return [p.detach().clone() for p in bench.parameters]


def test_one_step_on_all_contexts_is_the_first_update(setting):
    _, _, bench = setting
    weights_N = bench.loss_weights(0)
    gradient = bench.gradient(weights_N, loss="reverse_kl", beta=0.5)[1]
    bound = min(1.0, TRAINING_OPTIMIZER["max_grad_norm"] / tensor_norm(gradient))
    expected = first_update([g * bound for g in gradient], "adamw")
    run = full_trajectory(bench, 0, config(minibatch=100), steps=1, seed=0)
    np.testing.assert_array_equal(run.steps[0], np.flatnonzero(weights_N))
    for _ in run.run((1,)):
        for p, o, d in zip(bench.parameters, bench.origin, expected, strict=True):
            torch.testing.assert_close(p - o, RATE * d, rtol=1e-3, atol=1e-6)
        assert run.update_norm > 0.1
    bench.require_restored()


def spread(weights_N, rows):
    """The weights at these rows, 0 elsewhere."""
    return np.where(np.isin(np.arange(len(weights_N)), rows), weights_N, 0.0)


def torchs_own_loop(pair, bank, weights, *, rate, steps, warm=()):
    """torch.optim.AdamW on a twin of the student; the loss in float64 from whole logits."""
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    parameters = list(twin.student.model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    for lr, selected in [(0.0, w) for w in warm] + [(rate, w) for w in weights[:steps]]:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        total, start = 0.0, 0
        for context in bank:
            ids, stop = torch.tensor([context.ids]), start + len(context.response_ids)
            at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
            p = twin.student.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
            with torch.no_grad():
                q = twin.teacher.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            total = total + (kl * torch.from_numpy(selected[start:stop])).sum()
            start = stop
        (total / selected.sum()).backward()
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters))
        for p in parameters:
            p.grad *= float(min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("warm_steps", [0, 2])
def test_k_steps_are_torchs_own_loop(setting, warm_steps):
    pair, bank, bench = setting
    weights = np.random.default_rng(3).random((9, len(bench.tokens))).round()
    run = planned_trajectory(
        bench,
        1,
        config(minibatch=2, warm_steps=warm_steps),
        lambda rows, number: weights[number][rows],
        steps=5,
        seed=4,
    )
    assert len({rows.tobytes() for rows in run.steps}) > 1 and len(run.warm) == warm_steps
    carried = [spread(weights[n], rows) for n, rows in enumerate(run.steps, 1)]
    warm = [spread(weights[-n], rows) for n, rows in enumerate(run.warm, 1)]
    for k in run.run((2, 5)):
        np.testing.assert_array_equal(run.carried_N, sum(carried[:k]) > 0)
        expected = torchs_own_loop(pair, bank, carried, rate=RATE, steps=k, warm=warm)
        start = torch.cat([o.reshape(-1) for o in bench.origin])
        mine, other = (
            torch.cat([p.reshape(-1) for p in ps]) - start for ps in (weights_now(bench), expected)
        )
        # a gradient that is nearly 0 may round to either sign, which AdamW makes a whole step of
        assert float((mine - other).norm() / other.norm()) < 0.01
        assert float(other.norm()) > 0.1
    bench.require_restored()


def test_a_warm_state_changes_the_steps_and_not_the_start(setting):
    _, _, bench = setting
    cold, warm = (
        full_trajectory(bench, 0, config(minibatch=2, warm_steps=n), steps=1, seed=0)
        for n in (0, 3)
    )
    assert all(np.array_equal(a, b) for a, b in zip(cold.steps, warm.steps, strict=True))
    norms = [next(run.update_norm for _ in run.run((1,))) for run in (cold, warm)]
    # moments that hold other minibatches' gradients too make shorter steps than signs alone
    assert 0 < norms[1] < 0.9 * norms[0]


def test_a_rate_of_0_gives_exactly_0(setting):
    _, _, bench = setting
    before = bench.rescore("before", js=True)
    run = full_trajectory(bench, 0, config(rate=0.0, minibatch=2, warm_steps=1), steps=3, seed=0)
    for _ in run.run((1, 3)):
        np.testing.assert_array_equal(bench.rescore("after", js=True), before)
        assert run.update_norm == 0


def test_the_student_is_restored_bit_for_bit_also_after_an_early_stop(setting):
    pair, _, bench = setting
    run = full_trajectory(bench, 0, config(minibatch=2), steps=3, seed=0)
    for _ in run.run((1, 3)):
        break
    bench.require_restored()

    def fail():
        for _ in run.run((1, 3)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    bench.require_restored()
    assert weights_sha256(pair.student.model) == bench.origin_sha256
    assert all(p.grad is None for p in bench.parameters)


def test_the_same_trajectory_is_the_same_to_the_last_bit(setting):
    _, _, bench = setting
    run = full_trajectory(bench, 2, config(minibatch=2), steps=3, seed=0)
    first, second = (next(weights_now(bench) for _ in run.run((3,))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_long_gradient_is_clipped_as_in_training(setting):
    _, _, bench = setting
    rows = np.flatnonzero(bench.loss_weights(0))
    loose, tight = (
        Trajectory(
            bench,
            config(
                rate=10.0,
                optimizer=TRAINING_OPTIMIZER | {"adam_epsilon": 1e3, "max_grad_norm": bound},
            ),
            [rows],
            every_position,
        )
        for bound in (1e9, 1.0)
    )
    moved = [next(run.update_norm for _ in run.run((1,))) for run in (loose, tight)]
    # with eps far above the gradient the step is proportional to the gradient
    assert loose.gradient_norm == tight.gradient_norm > 1
    assert moved[1] / moved[0] == pytest.approx(1 / loose.gradient_norm, rel=0.01)


def test_a_step_without_loss_is_counted(setting):
    _, _, bench = setting
    rows = np.flatnonzero(bench.loss_weights(0))

    def all_but(*without):
        return lambda rows, number: np.full(len(rows), float(number not in without))

    run = Trajectory(bench, config(), [rows] * 3, all_but(2))
    assert [(k, run.idle_steps) for k in run.run((1, 2, 3))] == [(1, 0), (2, 1), (3, 1)]
    still = Trajectory(bench, config(), [rows], all_but(1))
    assert [still.update_norm for _ in still.run((1,))] == [0.0]
    assert still.idle_steps == 1 and not still.carried_N.any()


def test_minibatches_pass_through_all_contexts(setting):
    _, _, bench = setting
    tokens, mask = bench.tokens, bench.loss_weights(0) > 0
    contexts = tokens.context_id[mask].unique()
    assert len(contexts) == 4
    for size in (1, 2, 3, 4, 9):
        found = minibatches(tokens, mask, steps=24, minibatch=size, seed=(0,))
        counts = times_seen(tokens, found)
        for rows in found:
            ids = tokens.context_id.iloc[rows]
            assert ids.nunique() == min(size, 4) and (np.diff(rows) > 0).all()
            # a context comes with all its positions
            assert len(rows) == tokens.context_id[mask].isin(ids.unique()).sum()
        assert set(counts.index) == set(contexts) and counts.max() - counts.min() <= 1
    one, same, other = (
        minibatches(tokens, mask, steps=6, minibatch=2, seed=seed) for seed in ((0,), (0,), (1,))
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def times_seen(tokens, found):
    """How often each context was in a step."""
    return pd.Series(
        [name for rows in found for name in tokens.context_id.iloc[rows].unique()]
    ).value_counts()


def test_broken_contexts_take_no_part(setting):
    _, _, bench = setting
    with pytest.raises(DiagnosticsError, match=r"^No context with finite measurements is left"):
        minibatches(bench.tokens, np.zeros(len(bench.tokens), dtype=bool), steps=1)


def test_horizons_are_checked():
    assert require_horizon((20, 1, 5, 5, 0)) == (1, 5, 20) and require_horizon((0,)) == ()
    for wrong in ((-1,), (1.5,)):
        with pytest.raises(DiagnosticsError, match=r"^A horizon is a number of optimizer steps"):
            require_horizon(wrong)


@pytest.mark.parametrize("settings", [{"rate": -1.0}, {"rate": np.nan}, {"loss": "mse"}])
def test_settings_are_checked(settings):
    with pytest.raises(DiagnosticsError):
        config(**settings)
    for wrong in ({"minibatch": 0}, {"warm_steps": -1}):
        with pytest.raises(DiagnosticsError, match=r"^A trajectory takes minibatches"):
            config(**wrong)


def test_rate_and_optimizer_are_those_of_training(tmp_path):
    from diagnostics.training.run import EngineConfig, TrainConfig, trl_config

    assert [training_rate(name) for name in ("embedded", "smollm2", "custom")] == [1e-4, 1e-5, 1e-6]
    assert training_rate("embedded", 8) == TrainConfig().rate("embedded", 8) == 2e-4
    engine = EngineConfig()
    settings = trl_config(tmp_path, TrainConfig(), engine, rate=1e-4)
    assert {name: getattr(settings, name) for name in TRAINING_OPTIMIZER} == TRAINING_OPTIMIZER
    assert "adamw_torch" in settings.optim.value
    own = trl_config(tmp_path, TrainConfig(), EngineConfig(trl='{"weight_decay": 0.1}'), rate=1e-4)
    assert own.weight_decay == 0.1 and own.adam_beta2 == TRAINING_OPTIMIZER["adam_beta2"]


def test_a_minibatch_is_measured_anew_with_the_student_of_its_step(setting):
    pair, bank, bench = setting
    seen = []

    def weigh(rows, number):
        seen.append((rows, remeasured(bench, rows, k=16), weights_now(bench)))
        return np.ones(len(rows))

    run = planned_trajectory(bench, 0, config(minibatch=2), weigh, steps=3, seed=0)
    assert list(run.run((3,))) == [3]
    rows, table, _ = seen[0]
    names = [name for name in MEASURED if name in bench.tokens]
    np.testing.assert_allclose(table[names], bench.tokens[names].iloc[rows], atol=1e-5)
    rows, table, weights = seen[2]
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    with torch.no_grad():
        for p, w in zip(twin.student.model.parameters(), weights, strict=True):
            p.copy_(w)
    np.testing.assert_allclose(table[names], score(twin, bank)[names].iloc[rows], atol=1e-5)
    assert np.abs(table[names].to_numpy() - bench.tokens[names].iloc[rows].to_numpy()).max() > 1e-2
    assert list(table.columns) == list(bench.tokens.columns)
    assert (table.dtypes == bench.tokens.dtypes).all()
    some = ["context_id", "position", "forward_kl", "compatibility"]
    narrow = remeasured(bench, rows, k=16, of=bench.tokens[some])
    pd.testing.assert_frame_equal(narrow, remeasured(bench, rows, k=16)[some])


MEASURED = (
    "forward_kl",
    "reverse_kl",
    "union_forward_kl",
    "compatibility",
    "student_entropy",
    "advantage",
)


def test_another_k_than_the_tables_is_refused(setting):
    _, _, bench = setting
    rows = np.flatnonzero(bench.loss_weights(0))
    require_support(bench, rows, k=16)
    with pytest.raises(DiagnosticsError, match=r"^With K = 2 the compatibility at theta0 differs"):
        require_support(bench, rows, k=2)


def test_a_narrow_teachers_rounding_is_not_taken_for_another_k(setting):
    _, _, bench = setting
    rows = np.flatnonzero(bench.loss_weights(0))
    exact = bench.tokens["compatibility"].copy()
    noise = np.random.default_rng(0).normal(scale=4e-3, size=len(exact))
    try:
        bench.tokens["compatibility"] = exact + noise
        require_support(bench, rows, k=16)
        with pytest.raises(DiagnosticsError, match=r"^With K = 8 the compatibility"):
            require_support(bench, rows, k=8)
    finally:
        bench.tokens["compatibility"] = exact
