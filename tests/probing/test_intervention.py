import json

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import criteria
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.pipeline.cli import main
from diagnostics.probing import intervention
from diagnostics.probing.intervention import (
    MEASURES,
    Effect,
    Grid,
    InterventionCell,
    Interventions,
    intervene,
    interventions,
    plan,
    shared_gradients,
    summarize,
)
from diagnostics.probing.one_step import StepBench, loss_weights, probe, split_prompts
from diagnostics.probing.scores import score
from tests.conftest import make_model, make_pair, make_prompts
from tests.study_tables import tokens as study_tokens

GRID = {"criteria": ("teachability", "entropy"), "budgets": (0.1, 0.5), "random_draws": 2}


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


@pytest.fixture(scope="module")
def result(setting):
    pair, bank, tokens = setting
    return interventions(pair, bank, tokens=tokens, **GRID)


def effect_of(result, criterion, budget, draw=0):
    index = next(
        i
        for i, cell in enumerate(result.cells)
        if (cell.criterion, cell.budget, cell.draw) == (criterion, budget, draw)
    )
    return result.cells[index], result.effects[index]


def test_full_and_placebo_are_the_probes_step(setting, result):
    pair, bank, tokens = setting
    probed = probe(pair, bank, tokens=tokens)
    full, placebo = (effect_of(result, name, 1.0)[1].reduction_N3 for name in ("full", "placebo"))
    np.testing.assert_allclose(full[:, 0], probed.tokens.gain, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(full[:, 1], probed.tokens.reverse_gain, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(placebo[:, 0], probed.tokens.placebo_gain, rtol=1e-5, atol=1e-7)
    assert (
        result.calibration.equals(probed.calibration)
        and (result.split == probed.tokens.split).all()
    )


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
    "optimizer, match", [("adamw", "norm"), ("adamw", "lr"), ("sgd", "norm"), ("sgd", "lr")]
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
    )
    cell, effect = effect_of(found, "teachability", 0.2)
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    loss = mean_reverse_kl(twin, bank, cell.weights_N)
    loss.backward()
    parameters = list(twin.student.model.parameters())
    norm = float(torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters)))
    full = effect_of(found, "full", 1.0)[1]
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
    assert effect.gradient_norm == pytest.approx(
        norm, rel=1e-3
    ) and effect.update_norm == pytest.approx(moved, rel=1e-3)
    assert np.abs(expected).max() > 1e-3
    if match == "norm":
        assert effect.update_norm == pytest.approx(full.update_norm, rel=1e-6)
    elif optimizer == "adamw":
        assert effect.step_size == full.step_size == size


def test_the_student_ends_as_it_began(setting, result):
    assert weights_sha256(setting[0].student.model) == setting[0].facts["student"]["weights_sha256"]


def test_cells_are_selections_among_the_step_positions(setting, result):
    _, _, tokens = setting
    step = result.split == "step"
    for name in GRID["criteria"]:
        ranked = criteria.score_criterion(tokens, name)
        for budget in GRID["budgets"]:
            cell, _ = effect_of(result, name, budget)
            expected = np.zeros(len(tokens))
            expected[step] = criteria.select(tokens[step], ranked[step], budget=budget)
            np.testing.assert_array_equal(cell.weights_N, expected)
            assert cell.weights_N.sum() == np.ceil(budget * step.sum())
    draws = [effect_of(result, "random", 0.1, draw)[0].weights_N for draw in (0, 1)]
    assert not np.array_equal(*draws) and draws[0].sum() == draws[1].sum()
    assert [cell.criterion for cell in result.cells[:2]] == ["full", "placebo"] and len(
        result.cells
    ) == 2 + 2 * 2 + 2 * 2


def test_baselines_are_not_planned_twice_and_broken_positions_carry_no_loss(setting):
    _, _, tokens = setting
    tokens = tokens.copy()
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    broken = np.flatnonzero(split == "step")[:3]
    tokens.loc[broken, "forward_kl"] = np.nan
    cells = plan(
        tokens,
        split,
        criteria=["full", "random", "entropy", "entropy"],
        budgets=[1.0, 0.5, 0.5],
        random_draws=1,
        seed=0,
    )
    assert [(cell.criterion, cell.budget) for cell in cells] == [
        ("full", 1.0),
        ("placebo", 1.0),
        ("random", 0.5),
        ("random", 1.0),
        ("entropy", 0.5),
        ("entropy", 1.0),
    ]
    assert all((cell.weights_N[broken] == 0).all() for cell in cells)


def test_gradients_that_share_a_forward_are_each_ones_own(setting, monkeypatch, caplog):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    bench = StepBench(pair, bank, tokens, split, batch_tokens=60)
    rng, usable = np.random.default_rng(0), loss_weights(tokens, split)
    weights = [usable * (rng.random(len(tokens)) < share) for share in (0.05, 0.3, 0.9)]
    shared = shared_gradients(bench, weights, loss="jsd", beta=0.3)
    monkeypatch.setattr(
        intervention, "_add_gradients", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full"))
    )
    alone = shared_gradients(bench, weights, loss="jsd", beta=0.3)
    assert "3 cells do not fit in memory together: each gets its own forward pass" in caplog.text
    for one, other in zip(shared, alone, strict=True):
        assert max(float(a.abs().max()) for a in one) > 1e-4
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_small_memory_changes_nothing(setting, result, monkeypatch):
    pair, bank, tokens = setting
    monkeypatch.setattr(intervention, "GRADIENT_BYTES", 1)
    again = interventions(pair, bank, tokens=tokens, **GRID)
    for one, other in zip(result.effects, again.effects, strict=True):
        np.testing.assert_allclose(one.reduction_N3, other.reduction_N3, rtol=1e-4, atol=1e-6)


def test_an_interrupted_grid_goes_on_where_it_was(setting, result, tmp_path, monkeypatch):
    pair, bank, tokens = setting
    measured, original = [], Grid._effect

    def stop_after(limit):
        def effect(self, cell, *rest):
            if len(measured) == limit:
                raise KeyboardInterrupt
            measured.append((cell.criterion, cell.budget, cell.draw))
            return original(self, cell, *rest)

        return effect

    monkeypatch.setattr(Grid, "_effect", stop_after(4))
    with pytest.raises(KeyboardInterrupt):
        interventions(pair, bank, tokens=tokens, cache=tmp_path, **GRID)
    assert (
        len(list(tmp_path.glob("*.parquet"))) == 4
        and weights_sha256(pair.student.model) == pair.facts["student"]["weights_sha256"]
    )
    monkeypatch.setattr(Grid, "_effect", stop_after(100))
    resumed = interventions(pair, bank, tokens=tokens, cache=tmp_path, **GRID)
    assert len(measured) == len(set(measured)) == len(result.cells)
    np.testing.assert_array_equal(
        [e.reduction_N3 for e in resumed.effects], [e.reduction_N3 for e in result.effects]
    )
    wider = interventions(
        pair,
        bank,
        tokens=tokens,
        cache=tmp_path,
        **GRID | {"criteria": ("teachability", "entropy", "divergence")},
    )
    assert len(measured) == len(result.cells) + 2 and len(wider.cells) == len(result.cells) + 2


def test_a_damaged_cell_is_measured_again(setting, result, tmp_path, caplog):
    pair, bank, tokens = setting
    interventions(pair, bank, tokens=tokens, cache=tmp_path, **GRID)
    victims = sorted(tmp_path.glob("*.parquet"))[:2]
    content = victims[0].read_bytes()
    victims[0].write_bytes(content[: len(content) // 2])
    pd.read_parquet(victims[1]).head(3).to_parquet(victims[1])
    again = interventions(pair, bank, tokens=tokens, cache=tmp_path, **GRID)
    assert "a finished cell is measured again" in caplog.text and victims[0].read_bytes() == content
    np.testing.assert_array_equal(
        [e.reduction_N3 for e in again.effects], [e.reduction_N3 for e in result.effects]
    )


def test_a_cells_name_holds_everything_that_decides_it(setting):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    bench, usable = StepBench(pair, bank, tokens, split), loss_weights(tokens, split)
    full = bench.direction(usable, loss="reverse_kl", beta=0.5, optimizer="adamw")
    settings = {
        "bench": bench,
        "loss": "reverse_kl",
        "beta": 0.5,
        "optimizer": "adamw",
        "match": "norm",
        "full": full,
        "full_weights_N": usable,
        "full_size": 1e-3,
        "seed": 0,
        "cache": None,
    }
    cell, placebo = (
        InterventionCell("full", 1.0, 0, usable),
        InterventionCell("placebo", 1.0, 0, usable),
    )
    half = InterventionCell("entropy", 0.5, 0, usable * (np.arange(len(usable)) % 2))
    keys = [Grid(**settings).key(c) for c in (cell, placebo, half)]
    keys += [
        Grid(**settings | change).key(cell)
        for change in (
            {"loss": "jsd"},
            {"beta": 0.1},
            {"optimizer": "sgd"},
            {"match": "lr"},
            {"full_size": 2e-3},
        )
    ]
    keys.append(Grid(**settings | {"seed": 1}).key(placebo))
    assert len(set(keys)) == len(keys)
    assert (
        Grid(**settings | {"seed": 1}).key(cell)
        == keys[0]
        == Grid(**settings).key(InterventionCell("tip", 1.0, 0, usable.copy()))
    )


def test_the_same_positions_are_measured_once(setting, monkeypatch):
    pair, bank, tokens = setting
    count, original = [], Grid._effect
    monkeypatch.setattr(
        Grid, "_effect", lambda self, *rest: count.append(1) or original(self, *rest)
    )
    found = interventions(
        pair, bank, tokens=tokens, criteria=["entropy", "divergence"], budgets=[1.0], random_draws=2
    )
    assert len(found.cells) == 6 and len(count) == 2
    np.testing.assert_array_equal(
        effect_of(found, "entropy", 1.0)[1].reduction_N3, found.effects[0].reduction_N3
    )


def test_a_split_in_the_table_is_used(setting):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.25, seed=7)
    found = interventions(
        pair, bank, tokens=tokens.assign(split=split), criteria=[], budgets=[0.5], random_draws=1
    )
    assert (found.split == split).all() and (found.cells[0].weights_N == (split == "step")).all()


# --- the table
# ------------------------------------------------------------------------------------------


@pytest.fixture
def invented():
    """Effects drawn at random on a synthetic table: nothing but arithmetic is left to test."""
    tokens = study_tokens(prompts=10)
    split, rng = tokens.split.to_numpy(dtype=object), np.random.default_rng(0)
    cells = plan(tokens, split, criteria=["divergence"], budgets=[0.2], random_draws=3, seed=0)
    effects = [
        Effect(0.1 * i, 1.0, 2.0, rng.normal(i, 1, size=(len(tokens), 3)))
        for i in range(len(cells))
    ]
    return Interventions(tokens, split, cells, effects, pd.DataFrame())


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_summary_is_means_and_paired_differences(invented):
    table = summarize(invented, draws=60)
    full, _, *random, own = [effect.reduction_N3 for effect in invented.effects]
    cell, step = invented.cells[-1], invented.split == "step"
    masks = {
        "selected": cell.weights_N > 0,
        "unselected": step & (cell.weights_N == 0),
        "step": step,
        "held_out": ~step,
    }
    for group, mask in masks.items():
        for m, measure in enumerate(MEASURES):
            row = one(table, criterion="divergence", group=group, measure=measure)
            assert row.reduction == pytest.approx(own[mask, m].mean())
            assert row.minus_full == pytest.approx((own - full)[mask, m].mean())
            assert row.minus_random == pytest.approx(
                own[mask, m].mean() - np.mean([r[mask, m].mean() for r in random])
            )
            assert (
                row.low < row.reduction < row.high
                and row.minus_random_low < row.minus_random < row.minus_random_high
            )
            assert row.positions == mask.sum() and row.selected == cell.weights_N.sum()
    placebo = one(table, criterion="placebo", group="held_out", measure="js")
    assert placebo.reduction == pytest.approx(
        invented.effects[1].reduction_N3[~step, 2].mean()
    ) and np.isnan(placebo.minus_random)
    assert np.isnan(one(table, criterion="full", group="step", measure="js").minus_full)
    assert not len(table[(table.criterion == "full") & (table.group == "unselected")])


def test_random_rows_average_their_draws(invented):
    table = summarize(invented, draws=60)
    row = one(table, criterion="random", group="selected", measure="forward_kl")
    means = [
        e.reduction_N3[c.weights_N > 0, 0].mean()
        for c, e in zip(invented.cells[2:5], invented.effects[2:5])
    ]
    assert row.reduction == pytest.approx(np.mean(means)) and row.spread == pytest.approx(
        np.std(means, ddof=1)
    )
    against = [
        (e.reduction_N3 - invented.effects[0].reduction_N3)[c.weights_N > 0, 0].mean()
        for c, e in zip(invented.cells[2:5], invented.effects[2:5])
    ]
    assert row.minus_full == pytest.approx(np.mean(against))
    assert row.step_size == pytest.approx(0.3) and np.isnan(
        one(table, criterion="divergence", group="step", measure="js").spread
    )


def test_intervals_hold_the_spread_of_random(invented):
    """The draws lie about 1 apart, the prompts' means far less: the comparison with random is as
    wide as three draws leave it.
    """
    table = summarize(invented, draws=4000)
    row = one(table, criterion="divergence", group="held_out", measure="forward_kl")
    assert row.high - row.low < 0.6
    half = (row.minus_random_high - row.minus_random_low) / 2
    assert row.prompts == 5 and half == pytest.approx(2.776 / 3**0.5 * (5 / 4) ** 0.5, rel=0.15)


def test_differences_are_paired_by_prompt(invented):
    """A cell that differs from full by a constant has an interval of no width, however the prompts
    differ.
    """
    shifted = invented.effects[0].reduction_N3 + 0.25
    invented.effects[-1] = Effect(0.0, 1.0, 1.0, shifted)
    row = one(
        summarize(invented, draws=50),
        criterion="divergence",
        group="held_out",
        measure="reverse_kl",
    )
    assert row.minus_full_low == pytest.approx(0.25) == row.minus_full_high
    assert row.high - row.low > 1e-3


def test_sums_by_prompt_lose_nothing(invented):
    sums = invented.by_prompt()
    assert len(sums) == len(invented.cells) * invented.tokens.prompt_id.nunique()
    held_out = sums[(sums.criterion == "divergence") & (sums.split == "held_out")]
    row = one(summarize(invented, draws=20), criterion="divergence", group="held_out", measure="js")
    assert (
        held_out.js.sum() / held_out.positions.sum() == pytest.approx(row.reduction)
        and held_out.positions.sum() == row.positions
    )


def test_a_position_that_broke_is_left_out(invented):
    invented.effects[-1].reduction_N3[:5] = np.nan
    table = summarize(invented, draws=20)
    row = one(table, criterion="divergence", group="step", measure="forward_kl")
    assert row.positions == (invented.split == "step").sum() - (
        invented.split[:5] == "step"
    ).sum() and np.isfinite(row.reduction)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"match": "loss"},
            (
                r"^Unknown match 'loss'\. Known are norm, lr: cells have the update's norm or its"
                r" learning rate in common\.$"
            ),
        ),
        (
            {"random_draws": 0},
            (
                r"^random_draws is 0; a comparison with random needs at least 1, and 5 to see its"
                r" spread\.$"
            ),
        ),
        ({"loss": "hinge"}, r"^Unknown loss 'hinge'\. Known are "),
        ({"criteria": ["nice"]}, r"^Unknown criterion 'nice'\. Known are full, random, "),
        ({"budgets": [1.5]}, r"^A budget is a share of positions in \(0, 1\]; got 1\.5\.$"),
        ({"optimizer": "adam7"}, r"^Unknown optimizer 'adam7'\. Known are adamw, sgd\.$"),
    ],
)
def test_settings_that_cannot_be_used(setting, options, message):
    pair, bank, tokens = setting
    with pytest.raises(DiagnosticsError, match=message):
        intervene(pair, bank, tokens=tokens, **options)


def test_a_criterion_that_selects_nothing_is_named(setting):
    _, _, tokens = setting
    tokens = tokens.assign(acceptance=np.nan)
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^acceptance at budget 0\.1 selects no step position with finite measurements\. Leave"
            r" it out, or raise the budget\.$"
        ),
    ):
        plan(tokens, split, criteria=["acceptance"], budgets=[0.1], random_draws=1, seed=0)


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
    assert main(["score", *models]) == 0 and main(["probe", *models]) == 0
    return base / "out", models


def test_the_three_commands_leave_their_tables(run_directory):
    directory, models = run_directory
    grid = [
        "--criteria",
        "divergence,entropy,teachability",
        "--budgets",
        "0.1,0.5",
        "--random-draws",
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
    assert "tip" in set(pd.read_csv(directory / "tables/intervention.csv").criterion)


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
