"""Cells of an intervention against the probe and torch's own steps; the grid's cache; its table."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diagnostics import criteria
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.pipeline.cli import main
from diagnostics.probing import intervention
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.intervention import (
    Grid,
    InterventionConfig,
    Planned,
    StepSelection,
    intervene,
    interventions,
    plan,
    shared_gradients,
)
from diagnostics.probing.intervention_cells import (
    MEASURES,
    Effect,
    InterventionCell,
    Interventions,
)
from diagnostics.probing.intervention_table import summarize
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import PreparedStep, ProbeConfig, StepBench
from diagnostics.probing.trajectory import remeasured
from tests.conftest import make_model, make_pair, make_prompts
from tests.study_tables import tokens as study_tokens

GRID = {"criteria": ("teachability", "entropy"), "budgets": (0.1, 0.5), "random_draws": 2}
TWO = {"folds": 2, "horizon": (1, 3), "minibatch": 3, "learning_rate": 3e-3}
PLAN = GRID | TWO
CELLS = 1 + 2 * (3 * 2 + 2)
"""Criteria and budgets of a fold with the draws of random and its two variants, and full."""


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


@pytest.fixture(scope="module")
def result(setting):
    pair, bank, tokens = setting
    return interventions(pair, bank, tokens=tokens, **PLAN)


def effect_of(result, criterion, budget, draw=0, fold=0, horizon=0):
    cell = InterventionCell(criterion, budget, draw, fold, horizon)
    return result.effects[result.cells.index(cell)]


def test_a_known_size_is_taken_and_not_calibrated_again(setting, result):
    pair, bank, tokens = setting
    size = float(result.calibration["step_size"][result.calibration["chosen"]].iloc[0])
    again = interventions(pair, bank, tokens=tokens, size=size, **PLAN)
    assert again.calibration["step_size"].tolist() == [size, size]
    assert again.calibration["chosen"].all() and again.cells == result.cells
    for first, second in zip(result.effects, again.effects, strict=True):
        np.testing.assert_array_equal(first.reduction_N3, second.reduction_N3)


def test_full_is_the_probes_step_on_every_fold(setting, result):
    pair, bank, tokens = setting
    probed = probe(pair, bank, tokens=tokens, folds=2, placebos=0, nulls=())
    np.testing.assert_array_equal(result.folds, probed.tokens.fold)
    for fold in (0, 1):
        full = effect_of(result, "full", 1.0, fold=fold)
        gains = probed.tokens[[f"gain_fold{fold}", f"reverse_gain_fold{fold}"]]
        np.testing.assert_allclose(full.reduction_N3[:, :2], gains, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(full.selected_N, result.folds == fold)
    pd.testing.assert_frame_equal(result.calibration, probed.calibration)
    assert "placebo" not in {cell.criterion for cell in result.cells}


def mean_reverse_kl(pair, bank, selected):
    """Mean KL(p||q) over the selected positions from whole logits, with gradient."""
    total, start = 0.0, 0
    for context in bank:
        ids, stop = torch.tensor([context.ids]), start + len(context.response_ids)
        at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        p = pair.student.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        with torch.no_grad():
            q = pair.teacher.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        total = total + ((p.exp() * (p - q)).sum(-1) * torch.from_numpy(selected[start:stop])).sum()
        start = stop
    return total / selected.sum()


@pytest.mark.parametrize(
    ("optimizer", "match"), [("adamw", "norm"), ("adamw", "lr"), ("sgd", "norm"), ("sgd", "lr")]
)
def test_a_cell_is_torchs_own_step_on_the_selected_positions(setting, optimizer, match):
    """Gradient by plain autograd, update by torch.optim, divergences by a fresh score."""
    pair, bank, tokens = setting
    size = 3e-4 if optimizer == "adamw" else 0.05
    found = interventions(
        pair,
        bank,
        tokens=tokens,
        criteria=["teachability"],
        budgets=[0.2],
        random_draws=1,
        optimizer=optimizer,
        step=size,
        match=match,
        folds=2,
        horizon=(0,),
    )
    effect = effect_of(found, "teachability", 0.2, fold=1)
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    loss = mean_reverse_kl(twin, bank, effect.selected_N.astype(float))
    loss.backward()
    parameters = list(twin.student.model.parameters())
    norm = float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters)))
    full = effect_of(found, "full", 1.0, fold=1)
    before = [p.detach().clone() for p in parameters]
    if optimizer == "adamw":
        torch.optim.AdamW(parameters, lr=effect.step_size, weight_decay=0.0).step()
    else:
        torch.optim.SGD(
            parameters, lr=(size if match == "norm" else size * norm / full.gradient_norm) / norm
        ).step()
    moved = float(
        torch.sqrt(sum(((p.detach() - b).double() ** 2).sum() for p, b in zip(parameters, before)))
    )
    after = score(twin, bank)
    expected = tokens[list(MEASURES)].to_numpy() - after[list(MEASURES)].to_numpy()
    np.testing.assert_allclose(effect.reduction_N3, expected, atol=3e-5)
    assert effect.gradient_norm == pytest.approx(norm, rel=1e-3)
    assert effect.update_norm == pytest.approx(moved, rel=1e-3)
    assert np.abs(expected).max() > 1e-3
    if match == "norm":
        assert effect.update_norm == pytest.approx(full.update_norm, rel=1e-6)
    elif optimizer == "adamw":
        assert effect.step_size == full.step_size == size


def test_the_student_ends_as_it_began(setting, result):
    assert weights_sha256(setting[0].student.model) == setting[0].facts["student"]["weights_sha256"]


def test_the_one_steps_cells_are_selections_among_a_folds_positions(setting, result):
    _, _, tokens = setting
    for fold in (0, 1):
        here = result.folds == fold
        for name in GRID["criteria"]:
            for budget in GRID["budgets"]:
                effect = effect_of(result, name, budget, fold=fold)
                expected = np.zeros(len(tokens), dtype=bool)
                expected[here] = criteria.select(tokens[here], name, budget=budget)
                np.testing.assert_array_equal(effect.selected_N, expected)
                assert effect.selected_N.sum() == np.ceil(budget * here.sum())
        draws = [effect_of(result, "random", 0.1, n, fold).selected_N for n in (0, 1)]
        assert not np.array_equal(*draws)
        assert draws[0].sum() == draws[1].sum()
    assert len(result.cells) == 2 * 3 * CELLS
    assert [cell.horizon for cell in result.cells[:3]] == [0, 1, 3]


# --- trajectories
# ---------------------------------------------------------------------------------


def remembered(monkeypatch):
    """The arguments and results of every selection of a trajectory, in order."""
    seen, original = [], StepSelection.__call__

    def call(self, rows, number):
        measured = remeasured(self.bench, rows, k=self.k)
        weights = original(self, rows, number)
        seen.append((self.planned.cell, rows, number, measured, weights))
        return weights

    monkeypatch.setattr(StepSelection, "__call__", call)
    return seen


@pytest.mark.parametrize("scope", ["batch", "context", "table"])
def test_every_minibatch_is_selected_as_the_scope_says(setting, scope, monkeypatch):
    pair, bank, tokens = setting
    seen = remembered(monkeypatch)
    grid = PLAN | {"criteria": ("teachability",), "budgets": (0.3,), "random_draws": 1}
    found = interventions(pair, bank, tokens=tokens, scope=scope, **grid)
    checked = 0
    for cell, rows, number, measured, weights in seen:
        if cell.criterion == "full":
            assert (weights == 1).all()
            continue
        if cell.criterion not in ("teachability", "random"):
            continue
        if scope == "table":
            whole = effect_of(found, cell.criterion, 0.3, fold=cell.fold).selected_N
            np.testing.assert_array_equal(weights, whole[rows])
            continue
        table = measured if number > 1 else tokens.iloc[rows]
        how = {"scope": "context"} if scope == "context" else {}
        expected = criteria.select(table, cell.criterion, budget=0.3, seed=[0, number, 0], **how)
        np.testing.assert_array_equal(weights, expected)
        sizes = table.groupby("context_id").size() if scope == "context" else [len(rows)]
        assert weights.sum() == sum(np.ceil(0.3 * n) for n in sizes)
        checked += 1
    assert checked == (0 if scope == "table" else 2 * 2 * 3)
    per_fold = [
        [rows for c, rows, *_ in seen if (c.criterion, c.fold) == (name, 0)]
        for name in ("full", "teachability", "random")
    ]
    for other in per_fold[1:]:  # all cells pass through the same minibatches
        assert all(np.array_equal(a, b) for a, b in zip(per_fold[0], other, strict=True))


def test_what_carried_loss_and_how_far_it_went_is_recorded(setting, monkeypatch):
    pair, bank, tokens = setting
    seen = remembered(monkeypatch)
    grid = PLAN | {"criteria": ("teachability",), "budgets": (0.3,), "random_draws": 1}
    found = interventions(pair, bank, tokens=tokens, **grid)
    for horizon in (1, 3):
        effect = effect_of(found, "teachability", 0.3, fold=1, horizon=horizon)
        carried = np.zeros(len(tokens), dtype=bool)
        for cell, rows, number, _, weights in seen:
            if (cell.criterion, cell.fold) == ("teachability", 1) and number <= horizon:
                carried[rows[weights > 0]] = True
        np.testing.assert_array_equal(effect.selected_N, carried)
        assert effect.step_size == 3e-3 and effect.update_norm > 0.1 and effect.idle_steps == 0
        assert np.abs(effect.reduction_N3).max() > 1e-3
    assert not carried[found.folds == 0].any()


def test_a_longer_horizon_and_a_wider_grid_keep_what_is_finished(setting, tmp_path, monkeypatch):
    pair, bank, tokens = setting
    runs, original = [], Grid._trajectory

    def trajectory(self, one, wanted, *rest):
        runs.append((one.cell.criterion, tuple(wanted)))
        yield from original(self, one, wanted, *rest)

    monkeypatch.setattr(Grid, "_trajectory", trajectory)
    grid = PLAN | {"criteria": ("entropy",), "budgets": (0.5,), "random_draws": 1}
    first = interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    assert len(runs) == 2 * 5 and {wanted for _, wanted in runs} == {(1, 3)}
    runs.clear()
    again = interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    assert runs == []
    np.testing.assert_array_equal(
        [e.reduction_N3 for e in again.effects], [e.reduction_N3 for e in first.effects]
    )
    longer = grid | {"horizon": (1, 2, 3)}
    interventions(pair, bank, tokens=tokens, cache=tmp_path, **longer)
    assert len(runs) == 10 and {wanted for _, wanted in runs} == {(2,)}
    runs.clear()
    wider = longer | {"criteria": ("entropy", "tip")}
    found = interventions(pair, bank, tokens=tokens, cache=tmp_path, **wider)
    assert runs == [("tip", (1, 2, 3))] * 2
    np.testing.assert_array_equal(
        effect_of(found, "entropy", 0.5, horizon=3).reduction_N3,
        effect_of(first, "entropy", 0.5, horizon=3).reduction_N3,
    )


def test_an_interrupted_trajectory_leaves_the_student_and_its_horizons(
    setting, tmp_path, monkeypatch
):
    pair, bank, tokens = setting
    grid = PLAN | {"criteria": (), "budgets": (0.5,), "random_draws": 1}
    original = StepBench.rescore

    def stop(self, description, **options):
        if "3 steps" in description:
            raise KeyboardInterrupt
        return original(self, description, **options)

    monkeypatch.setattr(StepBench, "rescore", stop)
    with pytest.raises(KeyboardInterrupt):
        interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    # full, random and its two variants of the one step, and full after one step of a trajectory
    assert len(list(tmp_path.glob("*.parquet"))) == 4 + 1
    assert weights_sha256(pair.student.model) == pair.facts["student"]["weights_sha256"]


def test_without_a_horizon_there_is_the_one_step_alone(setting):
    pair, bank, tokens = setting
    found = interventions(pair, bank, tokens=tokens, **PLAN | {"horizon": (0,)})
    assert {cell.horizon for cell in found.cells} == {0} and len(found.cells) == 2 * CELLS


def test_the_rate_is_the_trainings():
    pair = make_pair()
    course = InterventionConfig().trajectory(pair, ProbeConfig(loss="jsd", beta=0.3))
    assert (course.rate, course.loss, course.beta) == (1e-6, "jsd", 0.3)
    pair.name = "embedded"
    assert InterventionConfig().trajectory(pair, ProbeConfig()).rate == 1e-4
    assert InterventionConfig(learning_rate=0.5).trajectory(pair, ProbeConfig()).rate == 0.5


# --- the grid
# -------------------------------------------------------------------------------------


def test_baselines_are_not_planned_twice_and_broken_positions_carry_no_loss(setting):
    _, _, tokens = setting
    tokens = tokens.copy()
    folds = assign_folds(tokens, 2, seed=0)
    broken = np.flatnonzero(folds == 0)[:3]
    tokens.loc[broken, "forward_kl"] = np.nan
    grid = InterventionConfig(
        criteria=("full", "random", "entropy", "entropy"), budgets=(1.0, 0.5, 0.5), random_draws=1
    )
    planned = [one for one in plan(tokens, folds, grid, seed=0) if one.cell.fold == 0]
    assert [(one.cell.criterion, one.cell.budget) for one in planned] == [
        ("full", 1.0),
        ("random", 0.5),
        ("random", 1.0),
        ("random_divergent", 0.5),
        ("random_divergent", 1.0),
        ("position_matched", 0.5),
        ("position_matched", 1.0),
        ("entropy", 0.5),
        ("entropy", 1.0),
    ]
    assert all((one.weights_N[broken] == 0).all() for one in planned)


def test_rivals_that_the_table_has_no_columns_for_are_left_out(setting):
    _, _, tokens = setting
    bare = tokens[["context_id", "prompt_id", "position", "forward_kl", "reverse_kl"]]
    folds = assign_folds(tokens, 2, seed=0)
    grid = InterventionConfig(criteria=(), budgets=(0.5,), random_draws=1)
    names = {one.cell.criterion for one in plan(bare, folds, grid, seed=0)}
    assert names == {"full", "random", "random_divergent"}


def test_the_share_that_ties_decide_is_recorded(setting):
    _, _, tokens = setting
    tied = tokens.assign(student_entropy=1.0)
    folds = assign_folds(tokens, 2, seed=0)
    grid = InterventionConfig(criteria=("entropy", "teachability"), budgets=(0.3,), random_draws=1)
    shares = {one.cell.criterion: one.ambiguous for one in plan(tied, folds, grid, seed=0)}
    assert shares["entropy"] == 1.0 and shares["full"] == shares["random"] == 0.0
    assert shares["teachability"] < 1.0


def test_gradients_that_share_a_forward_are_each_ones_own(setting, monkeypatch, caplog):
    pair, bank, tokens = setting
    folds = assign_folds(tokens, 2, seed=0)
    bench = StepBench(pair, bank, tokens, folds, batch_tokens=60)
    rng, usable = np.random.default_rng(0), bench.loss_weights(0)
    weights = [usable * (rng.random(len(tokens)) < share) for share in (0.05, 0.3, 0.9)]
    shared = shared_gradients(bench, weights, among_N=usable, loss="jsd", beta=0.3)
    monkeypatch.setattr(
        intervention, "_add_gradients", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full"))
    )
    alone = shared_gradients(bench, weights, among_N=usable, loss="jsd", beta=0.3)
    assert "3 cells do not fit in memory together: each gets its own forward pass" in caplog.text
    for one, other in zip(shared, alone, strict=True):
        assert max(float(a.abs().max()) for a in one) > 1e-4
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_small_memory_changes_nothing(setting, result, monkeypatch):
    pair, bank, tokens = setting
    monkeypatch.setattr(intervention, "GRADIENT_BYTES", 1)
    again = interventions(pair, bank, tokens=tokens, **PLAN | {"horizon": (0,)})
    for cell, effect in zip(again.cells, again.effects, strict=True):
        np.testing.assert_allclose(
            effect.reduction_N3,
            result.effects[result.cells.index(cell)].reduction_N3,
            rtol=1e-4,
            atol=1e-6,
        )


def test_an_interrupted_grid_goes_on_where_it_was(setting, result, tmp_path, monkeypatch):
    pair, bank, tokens = setting
    measured, original = [], Grid._effect

    def stop_after(limit):
        def effect(self, one, *rest):
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append(one.cell)
            return original(self, one, *rest)

        return effect

    grid = PLAN | {"horizon": (0,)}
    monkeypatch.setattr(Grid, "_effect", stop_after(4))
    with pytest.raises(KeyboardInterrupt):
        interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    assert len(list(tmp_path.glob("*.parquet"))) == 4
    assert weights_sha256(pair.student.model) == pair.facts["student"]["weights_sha256"]
    monkeypatch.setattr(Grid, "_effect", stop_after(100))
    resumed = interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    assert len(measured) == len(set(measured)) == len(resumed.cells)
    for cell, effect in zip(resumed.cells, resumed.effects, strict=True):
        np.testing.assert_array_equal(
            effect.reduction_N3, result.effects[result.cells.index(cell)].reduction_N3
        )
    wider = grid | {"criteria": (*GRID["criteria"], "divergence")}
    found = interventions(pair, bank, tokens=tokens, cache=tmp_path, **wider)
    assert len(measured) == len(resumed.cells) + 4 == len(found.cells)


def test_a_damaged_cell_is_measured_again(setting, result, tmp_path, caplog):
    pair, bank, tokens = setting
    grid = PLAN | {"horizon": (0,)}
    first = interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    victims = sorted(tmp_path.glob("*.parquet"))[:2]
    content = victims[0].read_bytes()
    victims[0].write_bytes(content[: len(content) // 2])
    pd.read_parquet(victims[1]).head(3).to_parquet(victims[1])
    again = interventions(pair, bank, tokens=tokens, cache=tmp_path, **grid)
    assert "a finished cell is measured again" in caplog.text
    assert victims[0].read_bytes() == content
    np.testing.assert_array_equal(
        [e.reduction_N3 for e in again.effects], [e.reduction_N3 for e in first.effects]
    )


def test_a_cells_name_holds_everything_that_decides_it(setting):
    pair, bank, tokens = setting
    folds = assign_folds(tokens, 2, seed=0)
    bench = StepBench(pair, bank, tokens, folds)
    usable = bench.loss_weights(0)
    direction = bench.direction(usable, loss="reverse_kl", beta=0.5, optimizer="adamw").named()

    def key(*, horizon=0, cell=("tip", 0.5, 0), seed=0, weights=usable, size=1e-3, k=16, **given):
        names = {"match", "scope", "warm_steps", "minibatch", "learning_rate"}
        config = InterventionConfig(
            horizon=(1, 5), **{"minibatch": 3} | {n: v for n, v in given.items() if n in names}
        )
        settings = ProbeConfig(**{n: v for n, v in given.items() if n not in names})
        calibration = pd.DataFrame({"step_size": [size], "chosen": [True]})
        step = PreparedStep(bench, 0, usable, direction, calibration)
        course = config.trajectory(pair, settings)
        planned = Planned(InterventionCell(*cell, 0, 0), seed, weights, 0.0)
        return Grid(step, settings, config, course, None, k).key(planned, horizon)

    half = usable * (np.arange(len(usable)) % 2)
    single = [{}, {"loss": "jsd"}, {"beta": 0.1}, {"optimizer": "sgd"}, {"match": "lr"}]
    single += [{"size": 2e-3}, {"weights": half}]
    names = {key(**change) for change in single}
    assert len(names) == len(single)
    # the one step is decided by its positions, whoever chose them
    assert key(cell=("entropy", 0.1, 3), seed=5) == key() == key(scope="table", k=4)

    longer = [{}, {"horizon": 5}, {"loss": "jsd"}, {"beta": 0.1}, {"weights": half}, {"k": 4}]
    longer += [{"scope": "context"}, {"scope": "table"}, {"warm_steps": 1}, {"minibatch": 2}]
    longer += [{"learning_rate": 1.0}, {"cell": ("entropy", 0.5, 0)}, {"cell": ("tip", 0.1, 0)}]
    longer += [{"cell": ("random", 0.5, 0)}, {"cell": ("random", 0.5, 1), "seed": 1}]
    longer += [{"cell": ("full", 1.0, 0)}]
    found = {key(**{"horizon": 1} | change) for change in longer}
    assert len(found) == len(longer) and not found & names
    # a criterion without random numbers has no seed, and the optimizer of the one step no say
    same = key(horizon=1)
    assert same == key(horizon=1, cell=("tip", 0.5, 7), seed=1) == key(horizon=1, size=2e-3)


def test_the_same_positions_are_measured_once(setting, monkeypatch):
    pair, bank, tokens = setting
    count, original = [], Grid._effect
    monkeypatch.setattr(
        Grid, "_effect", lambda self, *rest: count.append(1) or original(self, *rest)
    )
    options = {"criteria": ["entropy"], "budgets": [1.0], "random_draws": 1, "horizon": (0,)}
    found = interventions(pair, bank, tokens=tokens, folds=2, **options)
    assert len(found.cells) == 2 * 5 and len(count) == 2
    np.testing.assert_array_equal(
        effect_of(found, "entropy", 1.0).reduction_N3, found.effects[0].reduction_N3
    )


def test_a_fold_and_a_split_in_the_table_are_used(setting):
    pair, bank, tokens = setting
    options = {"criteria": [], "budgets": [0.5], "random_draws": 1, "horizon": (0,)}
    folds = assign_folds(tokens, 3, seed=7)
    found = interventions(pair, bank, tokens=tokens.assign(fold=folds), **options)
    np.testing.assert_array_equal(found.folds, folds)
    assert found.steps == 3
    split = np.where(folds == 1, "step", "held_out")
    single = interventions(pair, bank, tokens=tokens.assign(split=split), **options)
    assert single.steps == 1 and {cell.fold for cell in single.cells} == {0}
    np.testing.assert_array_equal(effect_of(single, "full", 1.0).selected_N, split == "step")


# --- the table
# ------------------------------------------------------------------------------------------


@pytest.fixture
def invented():
    """Effects drawn at random on a synthetic table: nothing but arithmetic is left to test."""
    tokens = study_tokens(prompts=10).drop(columns=["split", "fold"], errors="ignore")
    folds = pd.factorize(tokens.prompt_id)[0] % 3
    grid = InterventionConfig(criteria=("divergence",), budgets=(0.2,), random_draws=3)
    rng, cells, effects = np.random.default_rng(0), [], []
    for one in plan(tokens, folds, grid, seed=0):
        if one.cell.criterion in ("random_divergent", "position_matched"):
            continue
        for cell in one.at((1, 5)):
            level = {"full": 0, "random": 1 + one.cell.draw, "divergence": 6}[one.cell.criterion]
            values = rng.normal(level + 0.3 * cell.fold, 1, size=(len(tokens), 3))
            carried = one.weights_N > 0
            cells.append(cell)
            effects.append(Effect(0.1 * level, 1.0, 2.0, 0.25, cell.horizon, carried, values))
    return Interventions(tokens, folds, cells, effects, pd.DataFrame())


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def slow_mean(result, criterion, measure, group, *, horizon=0, positions_of=None, without=None):
    """Mean of draws of a pooled mean over positions and folds, one position after another.

    positions_of: criterion whose positions count, draw 0 of it; None counts each draw's own.
    """
    found = []
    for draw in sorted({c.draw for c in result.cells if c.criterion == criterion}):
        total = count = 0.0
        for cell, effect in zip(result.cells, result.effects, strict=True):
            if (cell.criterion, cell.draw, cell.horizon) != (criterion, draw, horizon):
                continue
            if cell.fold == without:
                continue
            asked = (
                effect
                if positions_of is None
                else effect_of(result, positions_of, 0.2, 0, cell.fold, horizon)
            )
            for i, fold in enumerate(result.folds):
                mine = fold == cell.fold
                here = {
                    "selected": asked.selected_N[i],
                    "unselected": mine and not asked.selected_N[i],
                    "step": mine,
                    "held_out": not mine,
                }[group]
                if here:
                    total += float(effect.reduction_N3[i, MEASURES.index(measure)])
                    count += 1
        found.append(total / count)
    return np.array(found)


@pytest.mark.parametrize("group", ["selected", "unselected", "step", "held_out"])
def test_summary_is_pooled_means_and_paired_differences(invented, group):
    table = summarize(invented, draws=60)
    for measure, horizon in (("forward_kl", 0), ("js", 5)):
        row = one(table, criterion="divergence", group=group, measure=measure, horizon=horizon)
        at = {"measure": measure, "group": group, "horizon": horizon}
        own = slow_mean(invented, "divergence", **at)[0]
        assert row.reduction == pytest.approx(own)
        on = at | {"positions_of": "divergence"}
        assert row.minus_random == pytest.approx(own - slow_mean(invented, "random", **on).mean())
        assert row.minus_full == pytest.approx(own - slow_mean(invented, "full", **on)[0])
        assert row.low < row.reduction < row.high
        assert row.minus_random_low < row.minus_random < row.minus_random_high
        assert row.steps == 3 and row.prompts == 10 and row.ambiguous == 0.25
        assert row.idle_steps == 3 * horizon
    full = table[table.criterion == "full"]
    assert full.minus_full.isna().all() and full.minus_random.isna().all()
    assert "unselected" not in set(full.group)


def test_intervals_hold_prompts_step_batches_and_draws(invented):
    """The parts against the bootstrap's own, a jackknife by hand, and the draws' spread."""
    table = summarize(invented, draws=4000)
    at = {"measure": "reverse_kl", "group": "held_out", "horizon": 1}
    row = one(table, criterion="divergence", **at)
    left = np.array([slow_mean(invented, "divergence", without=fold, **at)[0] for fold in range(3)])
    step_error = np.sqrt(2 / 3 * np.sum((left - left.mean()) ** 2))
    by_prompt = invented.by_prompt()
    mine = by_prompt[(by_prompt.criterion == "divergence") & (by_prompt.horizon == 1)]
    mine = mine[mine.held_out].groupby("prompt_id")[["reverse_kl", "positions"]].sum()
    rng = np.random.default_rng(1)
    draws = [mine.iloc[rng.integers(0, 10, 10)].sum() for _ in range(4000)]
    prompt_error = np.std([d.reverse_kl / d.positions for d in draws]) * np.sqrt(10 / 9)
    error = np.hypot(step_error, prompt_error)
    freedom = error**4 / (prompt_error**4 / 9 + step_error**4 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    assert (row.high - row.low) / 2 == pytest.approx(half, rel=0.06)
    random = one(table, criterion="random", **at)
    spread = slow_mean(invented, "random", **at)
    assert random.spread == pytest.approx(np.std(spread, ddof=1))
    # three draws about 1 apart: their mean is known to no better than 1 / sqrt(3), in each fold
    against = one(table, criterion="divergence", **at)
    wide = (against.minus_random_high - against.minus_random_low) / 2
    assert wide > stats.t.ppf(0.975, 6) / 3 * 0.9


def test_random_rows_average_their_draws(invented):
    table = summarize(invented, draws=60)
    row = one(table, criterion="random", group="selected", measure="forward_kl", horizon=0)
    means = slow_mean(invented, "random", "forward_kl", "selected")
    assert row.reduction == pytest.approx(means.mean())
    assert row.spread == pytest.approx(np.std(means, ddof=1))
    assert row.step_size == pytest.approx(0.2)
    own = one(table, criterion="divergence", group="step", measure="js", horizon=0)
    assert np.isnan(own.spread)


def test_differences_are_paired_by_prompt_and_step_batch(invented):
    """A cell that differs from full by a constant has an interval of no width, however the prompts
    and the step batches differ.
    """
    for number, cell in enumerate(invented.cells):
        if cell.criterion == "divergence":
            full = effect_of(invented, "full", 1.0, 0, cell.fold, cell.horizon)
            own = invented.effects[number]
            invented.effects[number] = replace(own, reduction_N3=full.reduction_N3 + 0.25)
    at = {"criterion": "divergence", "group": "held_out", "measure": "reverse_kl", "horizon": 5}
    row = one(summarize(invented, draws=50), **at)
    assert row.minus_full_low == pytest.approx(0.25)
    assert row.minus_full_high == pytest.approx(0.25)
    assert row.high - row.low > 1e-3


def test_a_horizon_at_which_only_the_step_batch_gains_is_marked(invented):
    """Held out: .3 after one step, .2 after five. Step batch: .3 and .4, or .3 and .2."""
    for later, expected in ((0.4, [False, False, True]), (0.2, [False] * 3)):
        for number, cell in enumerate(invented.cells):
            mine, values = invented.folds == cell.fold, np.full((len(invented.folds), 3), 0.3)
            if cell.horizon == 5:
                values = np.where(mine[:, None], later, 0.2) * np.ones((1, 3))
            invented.effects[number] = replace(invented.effects[number], reduction_N3=values)
        table = summarize(invented, draws=20)
        found = table[(table.criterion == "divergence") & (table.group == "step")]
        found = found[found.measure == "js"].sort_values("horizon")
        assert list(found.overfitted) == expected


def test_sums_by_prompt_lose_nothing(invented):
    sums = invented.by_prompt()
    assert len(sums) == len(invented.cells) * invented.tokens.prompt_id.nunique()
    assert list(sums) == [
        *("criterion", "budget", "draw", "fold", "horizon", "prompt_id", "held_out"),
        *("positions", *MEASURES, "ambiguous"),
    ]
    cell = sums[(sums.criterion == "divergence") & (sums.horizon == 5)]
    held_out = cell[cell.held_out]
    row = one(
        summarize(invented, draws=20),
        criterion="divergence",
        group="held_out",
        measure="js",
        horizon=5,
    )
    assert held_out.js.sum() / held_out.positions.sum() == pytest.approx(row.reduction)
    assert held_out.positions.sum() == 2 * len(invented.tokens) == 2 * row.positions
    assert (cell.groupby("prompt_id").held_out.sum() == 2).all()
    place = dict(zip(invented.tokens.prompt_id, invented.folds))
    assert (cell.held_out == (cell.prompt_id.map(place) != cell.fold)).all()


def test_right_and_wrong_responses_have_rows_of_their_own(invented):
    correct = (invented.tokens.position % 2 == 0).where(invented.tokens.prompt_id != "p0")
    invented.tokens = invented.tokens.assign(correct=correct)
    sums = invented.by_prompt()
    plain = replace(invented, tokens=invented.tokens.drop(columns="correct")).by_prompt()
    keys = ["criterion", "budget", "draw", "fold", "horizon", "prompt_id"]
    merged = sums.groupby(keys)[["positions", "js"]].sum()
    pd.testing.assert_frame_equal(
        merged, plain.groupby(keys)[["positions", "js"]].sum(), check_dtype=False
    )
    assert set(sums.correct.dropna()) == {True, False}


def test_a_position_that_broke_is_left_out(invented):
    broken = np.flatnonzero(invented.folds == 0)[:5]
    for cell, effect in zip(invented.cells, invented.effects, strict=True):
        if cell.criterion == "divergence":
            effect.reduction_N3[broken] = np.nan
    table = summarize(invented, draws=20)
    row = one(table, criterion="divergence", group="step", measure="forward_kl", horizon=0)
    assert row.positions == len(invented.tokens) - 5 and np.isfinite(row.reduction)


def test_an_effect_is_as_its_file_has_it(invented):
    effect = replace(
        invented.effects[0], reduction_N3=invented.effects[0].reduction_N3.astype("f4")
    )
    again = Effect.from_frame(effect.to_frame())
    for name in Effect.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(effect, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "loss"}, r"^Unknown match 'loss'\. Known are norm, lr\.$"),
        ({"scope": "word"}, r"^Unknown scope 'word'\. Known are batch, context, table\.$"),
        (
            {"random_draws": 0},
            (
                r"^random_draws is 0; a comparison with random needs at least 1, and 2 to see its"
                r" spread\.$"
            ),
        ),
        (
            {"horizon": (-1,)},
            r"^A horizon is a number of optimizer steps, such as 1,5,20, or 0 for",
        ),
        ({"minibatch": 0}, r"^A trajectory takes minibatches of at least 1 context"),
        ({"loss": "hinge"}, r"^Unknown loss 'hinge'\. Known are "),
        ({"criteria": ["nice"]}, r"^Unknown criterion 'nice'\. Known are full, random, "),
        (
            {"budgets": [1.5]},
            r"^A budget is a share of positions in \(0, 1\]; got 1\.5\. Did",
        ),
        ({"optimizer": "adam7"}, r"^Unknown optimizer 'adam7'\. Known are adamw, sgd\.$"),
    ],
)
def test_settings_that_cannot_be_used(setting, options, message):
    pair, bank, tokens = setting
    with pytest.raises(DiagnosticsError, match=message):
        intervene(pair, bank, tokens=tokens, **options)


def test_a_table_of_another_k_is_refused(setting):
    pair, bank, tokens = setting
    options = PLAN | {"criteria": (), "budgets": (0.5,), "random_draws": 1}
    with pytest.raises(DiagnosticsError, match=r"^With K = 2 the compatibility at theta0 differs"):
        interventions(pair, bank, tokens=tokens, k=2, **options)


def test_a_criterion_that_selects_nothing_is_named(setting):
    _, _, tokens = setting
    tokens = tokens.assign(acceptance=np.nan)
    folds = assign_folds(tokens, 2, seed=0)
    grid = InterventionConfig(criteria=("acceptance",), budgets=(0.1,), random_draws=1)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^acceptance at budget 0\.1 selects no position of fold 0 with finite measurements\."
            r" Leave it out, or raise the budget\.$"
        ),
    ):
        plan(tokens, folds, grid, seed=0)


# --- the command line
# -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    base = tmp_path_factory.mktemp("grid")
    pair = make_pair()
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(base / name)
        pair.tokenizer.save_pretrained(base / name)
    (base / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"w{i} w{(7 * i) % 60}"}) for i in range(12))
    )
    models = [
        "--student",
        str(base / "student"),
        "--teacher",
        str(base / "teacher"),
        "--device",
        "cpu",
        "--quiet",
        "--output-dir",
        str(base / "out"),
    ]
    assert (
        main(
            ["rollout", *models, "--prompts", str(base / "prompts.jsonl"), "--max-new-tokens", "6"]
        )
        == 0
    )
    assert main(["score", *models]) == 0 and main(["probe", *models, "--folds", "3"]) == 0
    return base / "out", models


@pytest.mark.slow
def test_the_three_commands_leave_their_tables(run_directory):
    directory, models = run_directory
    grid = [
        "--criteria",
        "divergence,entropy,teachability",
        "--budgets",
        "0.1,0.5",
        "--random-draws",
        "2",
        "--horizon",
        "2",
        "--draws",
        "30",
    ]
    assert main(["intervene", *models, *grid]) == 0
    assert main(["attribute", *models, "--sample", "8", "--draws", "30"]) == 0
    assert (
        main(
            [
                "compare",
                "--output-dir",
                str(directory),
                "--criteria",
                "divergence,entropy",
                "--draws",
                "30",
                "--quiet",
            ]
        )
        == 0
    )
    tables = {path.stem for path in (directory / "tables").glob("*.csv")}
    assert {
        "intervention",
        "linearity",
        "kernel",
        "kernel_shares",
        "lift",
        "selection_curves",
        "selection_summary",
        "selection_overlap",
        "selection_profile",
        "offline_agreement",
        "offline_answers",
    } <= tables
    tokens = pd.read_parquet(directory / "tokens.parquet")
    assert {"gain", "first_order_gain", "lift"} <= set(tokens)
    agreed = pd.read_csv(directory / "tables/offline_agreement.csv")
    assert {"captured_gain", "captured_first_order_gain", "captured_lift"} <= set(
        agreed.x
    ) and "held_out_forward_kl" in set(agreed.y)
    stages = json.loads((directory / "manifest.json").read_text())["stages"]
    assert {"intervene", "attribute", "compare"} <= set(stages)
    cells = {path: path.stat().st_mtime_ns for path in (directory / "cells").glob("*.parquet")}
    assert (
        main(["intervene", *models, *grid, "--criteria", "divergence,entropy,teachability,tip"])
        == 0
    )
    assert (
        cells.items()
        <= {
            path: path.stat().st_mtime_ns for path in (directory / "cells").glob("*.parquet")
        }.items()
    )
    table = pd.read_csv(directory / "tables/intervention.csv")
    assert (
        "tip" in set(table.criterion) and set(table.horizon) == {0, 2} and set(table.steps) == {3}
    )
    effects = pd.read_parquet(directory / "interventions.parquet")
    assert set(effects.fold) == set(tokens.fold) == {0, 1, 2}
    place = tokens.drop_duplicates("prompt_id").set_index("prompt_id").fold
    assert (effects.held_out == (effects.prompt_id.map(place) != effects.fold)).all()
    assert main(["intervene", *models, *grid, "--criteria", "token_identity"]) == 0
    table = pd.read_csv(directory / "tables/intervention.csv")
    assert {"token_identity", "random_divergent", "position_matched"} <= set(table.criterion)


@pytest.mark.parametrize(
    "command, what", [("intervene", "An intervention"), ("attribute", "An attribution")]
)
def test_another_step_than_the_probes_is_refused(run_directory, command, what, capsys):
    _, models = run_directory
    assert main([command, *models, "--loss", "forward_kl"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {what} explains the step of the run's probe, and ")
        and "loss: 'reverse_kl' there, 'forward_kl' now" in error
    )


def test_attribution_needs_the_probe(run_directory, tmp_path, capsys):
    directory, models = run_directory
    for name in ("contexts.parquet", "scores.parquet", "tops.parquet"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["stages"] = {
        name: manifest["stages"][name]
        for name in ("rollout", "score")
        if name in manifest["stages"]
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["attribute", *models[:-1], str(tmp_path)]) == 2
    assert (
        "reads" in (error := capsys.readouterr().err)
        and "gains.parquet, which is not there" in error
    )
