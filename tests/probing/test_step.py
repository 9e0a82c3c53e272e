"""The set-up that probe, intervention and attribution share, and the frozen bank below it."""

import dataclasses

import numpy as np
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.models.pair import weights_sha256
from diagnostics.probing import scores
from diagnostics.probing.attribution import AttributionConfig, attribute
from diagnostics.probing.directions import FILE, Store
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.intervention import InterventionConfig, intervene, interventions
from diagnostics.probing.one_step import ControlConfig, probe
from diagnostics.probing.scores import ScoreConfig, score
from diagnostics.probing.step import FoldSteps, ProbeConfig, StepBench, kept_step, prepare_step
from diagnostics.probing.tensor_lists import inner_product, tensor_norm
from tests.conftest import make_pair, make_prompts

GRID = InterventionConfig(criteria=("entropy",), budgets=(0.5,), random_draws=1, horizon=(0,))


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


def test_all_three_take_the_same_step(setting):
    pair, bank, tokens = setting
    config = ProbeConfig(loss="jsd", beta=0.3, seed=4)
    step = prepare_step(pair, bank, tokens, config)
    probed = probe(pair, bank, config, tokens=tokens)
    grid = interventions(pair, bank, config, GRID, tokens=tokens)
    traced = attribute(pair, bank, config, AttributionConfig(sample=1), tokens=tokens, draws=10)
    for calibration in (probed.calibration, grid.calibration, traced.calibration):
        own = calibration[calibration.fold == 0].reset_index(drop=True)
        assert own.equals(step.calibration)
    assert probed.step.step_size == step.step_size == grid.effects[0].step_size
    for fold in (probed.tokens.fold, traced.tokens.fold):
        assert (np.asarray(fold) == step.bench.folds).all()
    np.testing.assert_array_equal(grid.effects[0].selected_N, step.weights_N > 0)


def test_keywords_and_configuration_objects_are_one(setting):
    pair, bank, tokens = setting
    left = probe(pair, bank, tokens=tokens, optimizer="sgd", folds=3, nulls=[])
    right = probe(
        pair, bank, ProbeConfig(optimizer="sgd", folds=3), ControlConfig(nulls=()), tokens=tokens
    )
    assert left.tokens.equals(right.tokens) and left.steps == right.steps
    assert score(pair, bank, k=8, sweep=[2]).equals(score(pair, bank, ScoreConfig(k=8, sweep=(2,))))
    cells = dataclasses.asdict(GRID)
    left = intervene(pair, bank, tokens=tokens, draws=20, **cells)
    assert left.equals(intervene(pair, bank, None, GRID, tokens=tokens, draws=20))


def test_a_tables_folds_are_kept_where_asked(setting):
    pair, bank, tokens = setting
    fold, config = assign_folds(tokens, 3, seed=7), ProbeConfig(step=1e-4)
    bench = prepare_step(pair, bank, tokens.assign(fold=fold), config).bench
    assert (bench.folds == fold).all() and bench.count == 3
    split = np.where(fold == 1, "step", "held_out")
    of_one_step = prepare_step(pair, bank, tokens.assign(split=split), config)
    assert ((of_one_step.bench.folds == 0) == (fold == 1)).all()
    assert (of_one_step.weights_N == (fold == 1)).all()
    own = prepare_step(pair, bank, tokens.assign(fold=fold), config, keep_folds=False).bench.folds
    assert (own == assign_folds(tokens, 4, seed=0)).all()


def test_another_fold_is_measured_once_at_the_size_that_is_given(setting, tmp_path):
    pair, bank, tokens = setting
    config, fold = ProbeConfig(), assign_folds(tokens, 4, seed=0)
    bench, store = StepBench(pair, bank, tokens, fold), Store(tmp_path)
    step = kept_step(bench, 2, config, store, size=1e-4)
    assert step.fold == 2 and step.step_size == 1e-4 and len(step.calibration) == 1
    assert step.calibration.fold.tolist() == [2] and (step.weights_N == (fold == 2)).all()
    again = kept_step(bench, 2, config, store, size=1e-4)
    assert again.calibration.equals(step.calibration)
    # an interrupted run that chose another size does not hand its ratio on
    other = kept_step(bench, 2, config, store, size=2e-4)
    assert other.step_size == 2e-4 and other.direction.sha256 == step.direction.sha256


def test_preparing_moves_nothing(setting):
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    step = prepare_step(pair, bank, tokens, ProbeConfig())
    assert weights_sha256(pair.student.model) == before == step.bench.origin_sha256
    assert step.step_size == step.calibration.step_size[step.calibration.chosen].item() > 0


def test_some_contexts_are_measured_on_the_banks_own_batches(setting):
    pair, bank, tokens = setting
    step = assign_folds(tokens, 2, seed=0) == 0
    frozen = FrozenBank(pair, bank, batch_tokens=60)
    assert len(frozen.whole.batches) > 2
    whole = frozen.divergences()
    for one, name in zip(whole, ("forward_kl", "reverse_kl"), strict=True):
        np.testing.assert_allclose(one, tokens[name], rtol=1e-6, atol=1e-6)
    for wanted in (step, ~step):
        some = list(frozen.whole.contexts_of(wanted))
        rows = torch.cat([batch.rows_n for batch, _ in some])
        assert sorted(rows.tolist()) == np.flatnonzero(wanted).tolist()
        assert len(some) <= len(frozen.whole.batches)
        for one, found in zip(whole, frozen.rescore("some", wanted_N=wanted), strict=True):
            np.testing.assert_allclose(found[wanted], one[wanted], rtol=1e-6, atol=1e-6)
            assert (found[~wanted] == 0).all()


def test_a_halved_part_holds_the_same_states(setting):
    pair, bank, _ = setting
    part = FrozenBank(pair, bank).whole
    before = {
        row: state
        for batch, states in part
        for row, state in zip(batch.rows_n.tolist(), states, strict=True)
    }
    count = len(part.batches)
    part.halve(MemoryError("full"))
    assert len(part.batches) == 2 * count
    for batch, states in part:
        for row, state in zip(batch.rows_n.tolist(), states, strict=True):
            assert torch.equal(before[row], state)


def test_a_pair_without_teacher_is_refused_before_any_work(setting):
    pair, bank, tokens = setting
    alone = dataclasses.replace(pair, teacher=None)
    with pytest.raises(DiagnosticsError, match=r"^This pair has only a student"):
        probe(alone, bank, tokens=tokens)


def test_batches_of_one_context_stay_while_others_can_be_halved(setting):
    pair, bank, _ = setting
    part = FrozenBank(pair, bank, batch_tokens=26).whole
    sizes = [len(batch.ids_BT) for batch in part.batches]
    assert min(sizes) == 1 < max(sizes)
    while any(len(batch.ids_BT) > 1 for batch in part.batches):
        part.halve(MemoryError("full"))
    assert len(part.batches) == sum(sizes)
    with pytest.raises(DiagnosticsError, match=r"^One context of \d+ tokens does not fit"):
        part.halve(MemoryError("full"))


def test_batches_that_are_too_large_for_a_gradient_are_halved_beforehand(setting, monkeypatch):
    pair, bank, tokens = setting
    part = FrozenBank(pair, bank).whole
    rows = torch.cat([batch.rows_n for batch in part.batches])
    part.keep_to(50)
    assert all(batch.tokens <= 50 or len(batch.ids_BT) == 1 for batch in part.batches)
    assert max(len(batch.ids_BT) for batch in part.batches) > 1
    assert torch.cat([batch.rows_n for batch in part.batches]).equal(rows)
    assert [len(batch.rows_n) for batch, _ in part] == [len(states) for _, states in part]
    part.keep_to(1)
    assert len(part.batches) == len(bank)
    monkeypatch.setattr(
        scores, "chosen_batch_tokens", lambda *args, use="score": 9999 if use == "score" else 20
    )
    bench = StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0))
    assert len(bench.frozen.whole.batches) == 1 < len(bench._part.batches)


def test_a_batch_keeps_the_contexts_that_are_wanted(setting):
    pair, bank, _ = setting
    part = FrozenBank(pair, bank).whole
    batch, states = part.batches[0], part.teacher[0]
    wanted = torch.zeros(len(batch.rows_n), dtype=torch.bool)
    wanted[[0, 3, -1]] = True
    some, kept = batch.with_contexts_of(wanted, states)
    names = {batch.contexts[b].context_id for b in batch.at_n[0][wanted].tolist()}
    assert {context.context_id for context in some.contexts} == names and len(names) > 1
    rows = [row for row in batch.rows_n.tolist() if row in set(some.rows_n.tolist())]
    assert some.rows_n.tolist() == rows and some.mask_BT.sum(1).max() == some.ids_BT.shape[1]
    place = [batch.rows_n.tolist().index(row) for row in rows]
    assert torch.equal(kept, states[place]) and torch.equal(some.sampled_n, batch.sampled_n[place])
    torch.testing.assert_close(some.states(pair.student), batch.states(pair.student)[place])
    assert batch.with_contexts_of(torch.ones_like(wanted), states)[0] is batch


def test_the_contexts_of_a_step_are_joined_into_few_batches(setting):
    pair, bank, _ = setting
    whole = FrozenBank(pair, bank, batch_tokens=40).whole
    wanted = np.zeros(bank.positions, dtype=bool)
    wanted[[int(batch.rows_n[0]) for batch in whole.batches]] = True  # one context of each
    apart, part = list(whole.contexts_of(wanted)), whole.joined(wanted, 10_000)
    assert len(apart) > 3 and len(part.batches) == 1
    (batch, states), rows = next(iter(part)), torch.cat([one.rows_n for one, _ in apart])
    assert batch.rows_n.equal(rows) and states.equal(torch.cat([some for _, some in apart]))
    assert [c for one, _ in apart for c in one.contexts] == list(batch.contexts)
    assert batch.sampled_n.equal(batch.ids_BT[batch.at_n[0], batch.at_n[1] + 1])
    torch.testing.assert_close(
        batch.states(pair.student), torch.cat([one.states(pair.student) for one, _ in apart])
    )
    some = whole.joined(wanted, 30)
    assert 1 < len(some.batches) < len(apart)
    assert all(one.tokens <= 30 for one in some.batches)
    assert torch.cat([one.rows_n for one in some.batches]).equal(rows)
    none = whole.joined(wanted, 1)  # what does not fit stays as it is
    assert [one.rows_n.tolist() for one in none.batches] == [
        one.rows_n.tolist() for one, _ in apart
    ]


def test_directions_without_a_folder_wait_in_memory_and_are_made_once(setting, monkeypatch):
    pair, bank, tokens = setting
    bench, made = StepBench(pair, bank, tokens, assign_folds(tokens, 3, seed=0)), []
    real = StepBench.direction
    monkeypatch.setattr(StepBench, "direction", lambda *a, **k: (made.append(0), real(*a, **k))[1])
    steps = FoldSteps(bench, ProbeConfig(), lambda fold: Store(None))
    prepared = [steps.prepared(fold) for fold in range(3)]
    assert len(made) == 3 and len({step.step_size for step in prepared}) == 1
    for fold, step in enumerate(prepared):
        assert step.fold == fold and set(step.calibration.fold) == {fold}
        steps.forget(fold)
    assert not steps._waiting
    alone = kept_step(bench, 1, ProbeConfig(), Store(None))
    assert alone.step_size == prepared[1].step_size
    assert alone.calibration.equals(prepared[1].calibration)


def test_a_direction_that_vanishes_is_named(setting, tmp_path):
    pair, bank, tokens = setting
    bench = StepBench(pair, bank, tokens, assign_folds(tokens, 2, seed=0))
    steps = FoldSteps(bench, ProbeConfig(), lambda fold: Store(tmp_path / str(fold)))
    assert steps.size > 0
    (tmp_path / "1" / FILE).unlink()
    with pytest.raises(DiagnosticsError, match=r"1 has lost the direction of fold 1 while it was"):
        steps.prepared(1)


# --- theta0's divergences from the scores


def steps_passes(bench, monkeypatch):
    """What the bench measures, by the name of each pass."""
    passes, real = [], StepBench.rescore
    monkeypatch.setattr(
        StepBench,
        "rescore",
        lambda self, name, **options: (passes.append(name), real(self, name, **options))[1],
    )
    return passes


@pytest.mark.parametrize("batch_tokens", [30, 60, 8192])
def test_scores_of_the_same_student_and_batches_are_theta0s(setting, monkeypatch, batch_tokens):
    pair, bank, _ = setting
    tokens = score(pair, bank, batch_tokens=batch_tokens)
    bench = StepBench(
        pair, bank, tokens, assign_folds(tokens, 4, seed=0), batch_tokens=batch_tokens
    )
    measured, passes = bench.rescore("measured", js=True), steps_passes(bench, monkeypatch)
    for found in (bench.before(), bench.before(js=True)):
        for one, other in zip(found, measured):
            np.testing.assert_array_equal(one.view(np.int64), other.view(np.int64))
    assert passes == []
    gains = probe(pair, bank, tokens=tokens, batch_tokens=batch_tokens, step=0, horizon=())
    assert "before" not in passes and (gains.tokens.gain == 0).all()


@pytest.mark.parametrize(
    "why", ["another student", "other batches", "unknown", "other bits", "a file"]
)
def test_other_scores_are_measured_again(setting, monkeypatch, tmp_path, why):
    pair, bank, tokens = setting
    tokens = tokens.copy()
    if why == "another student":
        tokens = score(make_pair(student_seed=5), bank)
    elif why == "unknown":
        tokens.attrs.clear()
    elif why == "other batches":
        tokens = score(pair, bank, batch_tokens=30)
    elif why == "other bits":  # such as those of another device
        tokens["reverse_kl"] = np.nextafter(tokens["reverse_kl"], np.inf)
    else:
        tokens.to_parquet(tmp_path / "scores.parquet", index=False)
        tokens = validate_tokens(read_parquet(tmp_path / "scores.parquet"))
    bench = StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0))
    measured, passes = bench.rescore("measured"), steps_passes(bench, monkeypatch)
    for _ in range(2):  # the second time from memory
        assert all((a == b).all() for a, b in zip(bench.before(), measured, strict=True))
    assert passes == ([] if why == "a file" else ["before"])


def test_nan_measurements_of_the_scores_are_theta0s_too(setting, monkeypatch):
    pair, bank, _ = setting
    tokens = score(pair, bank)
    bench = StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0))
    tokens.loc[0, ["forward_kl", "reverse_kl"]] = np.nan
    real = scores.rescore

    def rescore(*args, **options):
        found = real(*args, **options)
        for values in found:
            values[0] = np.nan
        return found

    monkeypatch.setattr(scores, "rescore", rescore)
    passes = steps_passes(bench, monkeypatch)
    assert np.isnan(bench.before()[0][0]) and passes == []


# --- gradients in bfloat16


def test_gradients_under_autocast_are_nearly_the_same_and_measurements_stay(setting):
    pair, bank, tokens = setting
    folds = assign_folds(tokens, 2, seed=0)
    full, narrow = (
        StepBench(pair, bank, tokens, folds, gradient_precision=precision)
        for precision in ("full", "bfloat16")
    )
    weights_N = full.loss_weights(0)
    one, other = (
        bench.gradient(weights_N, loss="reverse_kl", beta=0.5)[1] for bench in (full, narrow)
    )
    assert all(g.dtype == torch.float32 for g in other)
    assert not torch.equal(one[0], other[0])
    cosine = inner_product(one, other) / (tensor_norm(one) * tensor_norm(other))
    assert 0.97 < cosine < 0.99999
    assert all((a == b).all() for a, b in zip(full.rescore("x"), narrow.rescore("x"), strict=True))
    direction = narrow.direction(weights_N, loss="reverse_kl", beta=0.5, optimizer="adamw")
    # the loss that the calibration starts from is measured as the losses that it is compared with
    assert direction.value == full.mean_loss(weights_N, loss="reverse_kl", beta=0.5)


def test_the_precision_of_gradients_is_part_of_the_settings(setting):
    pair, bank, tokens = setting
    options = {"tokens": tokens, "nulls": (), "placebos": 0, "horizon": ()}
    narrow = probe(pair, bank, gradient_precision="bfloat16", **options)
    full = probe(pair, bank, **options)
    assert not narrow.tokens.gain.equals(full.tokens.gain)
    assert np.corrcoef(narrow.tokens.gain, full.tokens.gain)[0, 1] > 0.9
    assert dataclasses.asdict(ProbeConfig())["gradient_precision"] == "full"
    with pytest.raises(DiagnosticsError, match=r"^Unknown gradient precision 'float16'\. Known"):
        ProbeConfig(gradient_precision="float16")
    cells = {"tokens": tokens, **dataclasses.asdict(GRID)}
    one, other = (
        interventions(pair, bank, gradient_precision=precision, **cells).effects
        for precision in ("full", "bfloat16")
    )
    assert not any(np.array_equal(a.reduction_N3, b.reduction_N3) for a, b in zip(one, other))
