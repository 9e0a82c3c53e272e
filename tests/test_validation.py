import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import validation
from diagnostics.cli import main
from diagnostics.types import DiagnosticsError
from diagnostics.validation import Cell, Crossed, Outcomes, ValidateConfig, agreement_table, cells_table, foreseen_table, grid, offline_answers, outcome_table, verdict_table
from tests.test_training import folders  # noqa: F401  (a fixture)

PROMPTS, SEEDS = 40, 3


def outcome_rows(effects, *, measure="reverse_kl", seeds=SEEDS, prompts=PROMPTS, noise=0.02, rng=0, start=1.0):
    """Rows of a grid: value = start - effect of the cell + prompt effect + noise."""
    generator = np.random.default_rng(rng)
    prompt_effect, count = generator.normal(0, 0.1, prompts), generator.integers(5, 15, prompts)
    rows = []
    for (criterion, budget), effect in {("untouched", 0.0): 0.0, **effects}.items():
        for seed in [-1] if criterion == "untouched" else range(seeds):
            values = start - effect + prompt_effect + generator.normal(0, noise if criterion != "untouched" else 0, prompts)
            rows += [(criterion, budget, seed, measure, f"p{g:02d}", value * n, n) for g, (value, n) in enumerate(zip(values, count))]
    return pd.DataFrame(rows, columns=["criterion", "budget", "seed", "measure", "prompt_id", "total", "count"])


FIVE = {("full", 1.0): 0.5, ("teachability", 0.05): 0.5, ("entropy", 0.05): 0.3, ("divergence", 0.05): 0.2, ("tip", 0.05): 0.3, ("random", 0.05): 0.35}


def test_the_grid_goes_seed_by_seed_and_full_has_one_cell():
    cells = grid(ValidateConfig(criteria=("full", "tip"), budgets=(0.05, 0.3), seeds=2))
    assert [cell.name for cell in cells] == ["full-1-seed0", "tip-0.05-seed0", "tip-0.3-seed0", "full-1-seed1", "tip-0.05-seed1", "tip-0.3-seed1"]
    assert len(grid(ValidateConfig())) == 57


@pytest.mark.parametrize("options, message", [
    ({"criteria": ("teachable",)}, r"^Unknown criterion 'teachable'\. Known are "),
    ({"budgets": (0.05, 1.5)}, r"^A budget is a share of positions in \(0, 1\]; got 1\.5\.$"),
    ({"seeds": 0}, r"^A grid needs criteria, seeds and workers; got 7, 0 and 2\.$"),
])
def test_a_grid_that_cannot_be_trained(options, message):
    with pytest.raises(DiagnosticsError, match=message):
        ValidateConfig(**options)


def test_an_interval_crosses_seeds_and_prompts():
    rows = outcome_rows(FIVE)
    outcomes = Outcomes(rows, draws=300, seed=4)
    found = outcomes.of("reverse_kl", "tip", 0.05)
    part = rows[(rows["criterion"] == "tip")]
    weights = np.random.default_rng(4).multinomial(PROMPTS, np.full(PROMPTS, 1 / PROMPTS), size=300)
    by_seed, draws = [], []
    for _, single in part.groupby("seed"):
        total, count = single["total"].to_numpy(), single["count"].to_numpy()
        by_seed.append(total.sum() / count.sum())
        draws.append([(w * total).sum() / (w * count).sum() for w in weights])
    assert found.value == pytest.approx(np.mean(by_seed)) and found.prompts == PROMPTS
    e_s, e_g = np.var(by_seed, ddof=1) / 3, np.var(np.mean(draws, 0), ddof=1) * PROMPTS / (PROMPTS - 1)
    assert found.errors == (pytest.approx(e_s), pytest.approx(e_g))
    freedom = (e_s + e_g) ** 2 / (e_s**2 / 2 + e_g**2 / (PROMPTS - 1))
    reach = stats.t.ppf(0.95, freedom) * np.sqrt(e_s + e_g)
    assert found.interval(0.9) == (pytest.approx(found.value - reach), pytest.approx(found.value + reach))


def test_differences_are_paired_by_prompt():
    outcomes = Outcomes(outcome_rows(FIVE), draws=300)
    one, other = (outcomes.of("reverse_kl", name, 0.05) for name in ("tip", "random"))
    paired = one - other
    assert paired.value == pytest.approx(one.value - other.value)
    assert paired.errors[1] < 0.1 * (one.errors[1] + other.errors[1])
    gain = outcomes.gain("reverse_kl", "divergence", 0.05)
    assert gain.value == pytest.approx(0.2, abs=0.02) and gain.interval()[0] > 0.15
    assert outcomes.gain("reverse_kl", "divergence", 0.05).errors[1] < one.errors[1]


def test_accuracy_gains_upwards_and_divergence_downwards():
    rows = pd.concat([outcome_rows({("full", 1.0): 0.2}), outcome_rows({("full", 1.0): 0.2}, measure="accuracy")])
    outcomes = Outcomes(rows, draws=50)
    assert outcomes.gain("reverse_kl", "full", 1.0).value == pytest.approx(0.2, abs=0.02)
    assert outcomes.gain("accuracy", "full", 1.0).value == pytest.approx(-0.2, abs=0.02)


def test_one_seed_has_no_interval():
    found = Outcomes(outcome_rows(FIVE, seeds=1), draws=50).of("reverse_kl", "tip", 0.05)
    assert np.isnan(found.errors[0]) and np.isnan(found.interval()).all() and np.isfinite(found.value)


def test_untouched_has_no_spread_over_seeds():
    found = Outcomes(outcome_rows(FIVE), draws=200).of("reverse_kl", "untouched", 0.0)
    assert found.fixed and found.errors[0] == 0
    low, high = found.interval()
    reach = stats.t.ppf(0.975, PROMPTS - 1) * np.sqrt(found.errors[1])
    assert (low, high) == (pytest.approx(found.value - reach), pytest.approx(found.value + reach))


def test_coverage_of_a_paired_difference():
    """Seeds and prompts both move the difference; 95 % intervals hold the truth at least about that often."""
    generator, held, repeats = np.random.default_rng(0), 0, 200
    for _ in range(repeats):
        seed, prompt, both = generator.normal(0, 0.05, (3, 1)), generator.normal(0, 0.3, (1, 30)), generator.normal(0, 0.2, (3, 30))
        values_SG = 0.1 + seed + prompt + both
        weights = generator.multinomial(30, np.full(30, 1 / 30), size=100)
        low, high = Crossed(values_SG.mean(1), weights @ values_SG.T / 30, 30).interval()
        held += low <= 0.1 <= high
    assert 0.92 <= held / repeats


def test_cells_that_cannot_be_paired_or_found():
    rows = outcome_rows(FIVE)
    rows = rows[~((rows["criterion"] == "tip") & (rows["seed"] == 2))]
    outcomes = Outcomes(rows, draws=20)
    with pytest.raises(DiagnosticsError, match=r"^Cells with 2 and 3 seeds cannot be paired\. Finish the grid\.$"):
        outcomes.of("reverse_kl", "tip", 0.05) - outcomes.of("reverse_kl", "full", 1.0)
    with pytest.raises(DiagnosticsError, match=r"^The grid holds no reverse_kl of tip at 0\.3\. Train that cell first\.$"):
        outcomes.of("reverse_kl", "tip", 0.3)


def test_outcome_table_says_what_each_cell_is_paired_against():
    table = outcome_table(Outcomes(outcome_rows(FIVE), draws=100)).set_index("criterion")
    assert table.loc["untouched", "mean"] == pytest.approx(1.0, abs=0.05) and np.isnan(table.loc["untouched", "gain"])
    assert table.loc["teachability", "gain"] == pytest.approx(0.5, abs=0.02)
    assert table.loc["teachability", "minus_random"] == pytest.approx(0.15, abs=0.02) and table.loc["teachability", "minus_random_low"] > 0.1
    assert table.loc["entropy", "minus_full"] == pytest.approx(-0.2, abs=0.02) and np.isnan(table.loc["full", "minus_full"])
    assert np.isnan(table.loc["random", "minus_random"]) and (table.drop("untouched")["seeds"] == 3).all()
    single = cells_table(Outcomes(outcome_rows(FIVE), draws=2))
    mean = single[single["criterion"] == "tip"]["value"].mean()
    assert len(single) == 1 + 6 * 3 and mean == pytest.approx(table.loc["tip", "mean"])


@pytest.mark.parametrize("changes, expected", [
    ({}, {"all": "supported", "full": "supported", "entropy": "supported", "divergence": "supported", "tip": "supported"}),
    ({("entropy", 0.05): 0.52}, {"all": "supported", "entropy": "supported"}),
    ({("entropy", 0.05): 0.9}, {"all": "refuted", "entropy": "refuted", "tip": "supported"}),
    ({("full", 1.0): -0.1, ("tip", 0.05): 0.6}, {"full": "supported", "tip": "refuted"}),
])
def test_verdicts_follow_the_intervals(changes, expected):
    table = verdict_table(Outcomes(outcome_rows(FIVE | changes), draws=100)).set_index("rival")
    assert (table["claim"] == "C5").all() and {rival: table.loc[rival, "verdict"] for rival in expected} == expected
    assert table.loc["full", "margin"] == pytest.approx(max(0.0, 0.1 * changes.get(("full", 1.0), 0.5)), abs=0.005)
    assert table.loc["divergence", "beats"] and table.loc["divergence", "low"] > 0


def test_a_wide_interval_or_a_missing_rival_is_inconclusive():
    noisy = verdict_table(Outcomes(outcome_rows(FIVE | {("entropy", 0.05): 0.5}, noise=1.5), draws=100)).set_index("rival")
    assert noisy.loc["entropy", "verdict"] == "inconclusive" and noisy.loc["all", "verdict"] in ("inconclusive", "refuted")
    missing = {cell: effect for cell, effect in FIVE.items() if cell[0] != "tip"}
    table = verdict_table(Outcomes(outcome_rows(missing), draws=100)).set_index("rival")
    assert table.loc["all", "verdict"] == "inconclusive" and "tip" not in table.index
    two = verdict_table(Outcomes(outcome_rows(FIVE, seeds=2), draws=100))
    assert (two["verdict"] == "inconclusive").all()


def test_other_budgets_are_named_apart():
    wide = {**FIVE, **{(name, 0.3): effect for (name, _), effect in FIVE.items() if name != "full"}}
    table = verdict_table(Outcomes(outcome_rows(wide), draws=50))
    assert list(dict.fromkeys(table["claim"])) == ["C5", "C5 at 0.3"]


def test_agreement_is_kendalls_tau_over_cells():
    cells = {(name, budget): effect for budget, shift in ((0.05, 0.0), (0.3, 0.2))
             for name, effect in (("teachability", 0.1 + shift), ("entropy", 0.2 + shift), ("tip", 0.3 + shift))}
    outcomes = Outcomes(outcome_rows({("full", 1.0): 0.9, **cells}, noise=0.01), draws=100)
    offline = pd.DataFrame([(*cell, "captured_gain", value) for cell, value in zip(cells, [3, 1, 2, 4, 6, 5])], columns=["criterion", "budget", "answer", "value"])
    table = agreement_table(outcomes, offline).set_index("scope")
    assert table.loc["all", "kendall"] == pytest.approx(stats.kendalltau(list(cells.values()), offline["value"]).statistic)
    assert table.loc["within_budget", "kendall"] == pytest.approx(0.0) and table.loc["budget_0.3", "kendall"] == pytest.approx(1 / 3)
    assert (table["y"] == "trained_reverse_kl").all() and table.loc["all", "cells"] == 6 and (table["prompts"] == PROMPTS).all()
    few = offline.iloc[:2]
    assert agreement_table(outcomes, few).empty


def test_agreement_with_the_first_step_of_the_trainings():
    effects = {("full", 1.0): 0.9, ("teachability", 0.05): 0.1, ("entropy", 0.05): 0.2, ("tip", 0.05): 0.3}
    first = outcome_rows({cell: -effect for cell, effect in effects.items()}, measure="one_step_gain", start=0.0, noise=0.001)
    rows = pd.concat([outcome_rows(effects, noise=0.01), first[first["criterion"] != "untouched"]])
    table = agreement_table(Outcomes(rows, draws=200)).set_index("scope")
    assert table.loc["all", "kendall"] == pytest.approx(1.0) and table.loc["all", "x"] == "one_step_gain"
    assert table.loc["all", "low"] > 0.5


def test_what_was_foreseen_is_kept_beside_what_was_trained():
    effects = {("full", 1.0): 0.9, ("teachability", 0.05): 0.1, ("entropy", 0.05): 0.2}
    first = outcome_rows({cell: -effect for cell, effect in effects.items()}, measure="one_step_gain", start=0.0, noise=0.0)
    rows = pd.concat([outcome_rows(effects), first[first["criterion"] != "untouched"]])
    offline = pd.DataFrame([("entropy", 0.05, "captured_gain", 0.4), ("full", 1.0, "captured_gain", 1.0), ("tip", 0.05, "captured_gain", 0.3),
                            ("teachability", 0.05, "captured_gain", np.nan)], columns=["criterion", "budget", "answer", "value"])
    table = foreseen_table(Outcomes(rows, draws=20), offline)
    assert list(table.columns) == ["criterion", "budget", "answer", "value"]
    found = {(row.criterion, row.answer): row.value for row in table.itertuples()}
    assert found == pytest.approx({("teachability", "one_step_gain"): 0.1, ("entropy", "one_step_gain"): 0.2, ("entropy", "captured_gain"): 0.4}, rel=0.05)


def test_offline_answers_are_read_from_a_run(tmp_path):
    with pytest.raises(DiagnosticsError, match=r"holds neither tables/selection_curves\.csv nor tables/intervention\.csv\. Name a run directory whose main job is finished\.$"):
        offline_answers(tmp_path)
    (tmp_path / "tables").mkdir()
    pd.DataFrame({"outcome": ["gain", "gain"], "criterion": ["tip", "tip"], "split": ["all", "step"], "budget": [0.05, 0.05], "captured_share": [0.4, 0.9]}).to_csv(
        tmp_path / "tables/selection_curves.csv", index=False)
    pd.DataFrame({"criterion": ["tip", "tip"], "budget": [0.05, 0.05], "group": ["held_out", "step"], "measure": "forward_kl", "reduction": [0.1, 0.7]}).to_csv(
        tmp_path / "tables/intervention.csv", index=False)
    found = offline_answers(tmp_path)
    assert found.values.tolist() == [["tip", 0.05, "captured_gain", 0.4], ["tip", 0.05, "intervention_forward_kl", 0.1]]


def command(folders, directory, *more):  # noqa: F811
    return ["validate", *folders[0], *folders[1], "--eval-contexts", "6", "--eval-samples", "2", "--steps", "2", "--batch", "4", "--max-new-tokens", "8", "--seeds", "2",
            "--criteria", "full,random,teachability", "--budgets", "0.2", "--learning-rate", "0.001", "--draws", "50", "--workers", "1", "--output-dir", str(directory), *more]


def test_an_interrupted_grid_goes_on_where_it_was(folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    trained, original = [], validation.run_cell

    def counting(job, cell):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(cell)
        return original(job, cell)

    monkeypatch.setattr(validation, "run_cell", counting)
    assert main(command(folders, tmp_path)) == 130
    monkeypatch.setattr(validation, "run_cell", lambda job, cell: trained.append(cell) or original(job, cell))
    assert main(command(folders, tmp_path)) == 0
    assert [cell.name for cell in trained] == [cell.name for cell in grid(ValidateConfig(criteria=("full", "random", "teachability"), budgets=(0.2,), seeds=2))]
    tables = {name: pd.read_csv(tmp_path / "tables" / f"validation_{name}.csv") for name in ("cells", "outcomes", "verdicts", "agreement", "foreseen")}
    assert set(tables["foreseen"]["answer"]) == set(validation.FIRST_STEP)
    assert set(tables["outcomes"]["criterion"]) == {"untouched", "full", "random", "teachability"} and (tables["verdicts"]["verdict"] == "inconclusive").all()
    record = json.loads((tmp_path / "cells/teachability-0.2-seed1.json").read_text())
    assert record["cell"] == {"criterion": "teachability", "budget": 0.2, "seed": 1} and record["settings"]["steps"] == 2
    assert {"loss", "reverse_kl/all"} <= set(pd.read_parquet(tmp_path / "cells/full-1-seed0.curve.parquet"))
    assert not [path for path in (tmp_path / "cells").iterdir() if path.name.startswith(".")]

    before = (tmp_path / "cells/full-1-seed0.parquet").read_bytes()
    assert main(command(folders, tmp_path, "--budgets", "0.2,0.4")) == 0  # a wider grid adds to it
    assert [cell.budget for cell in trained[6:]] == [0.4] * 4 and (tmp_path / "cells/full-1-seed0.parquet").read_bytes() == before
    assert main(command(folders, tmp_path, "--steps", "3")) == 2
    assert "was trained with other settings (steps: was 2, now 3). Choose another --output-dir." in capsys.readouterr().err


def test_equal_seeds_meet_equal_prompts_and_random_numbers(folders, tmp_path):  # noqa: F811
    assert main(command(folders, tmp_path, "--seeds", "1")) == 0
    curves = [pd.read_parquet(tmp_path / f"cells/{name}-seed0.curve.parquet") for name in ("full-1", "random-0.2", "teachability-0.2")]
    assert len({curve["reverse_kl/all"][0] for curve in curves}) == 1 and len({curve["loss"][0] for curve in curves}) == 3


@pytest.mark.slow
def test_workers_give_the_same_cells(folders, tmp_path):  # noqa: F811
    for workers in ("1", "2"):
        assert main(command(folders, tmp_path / workers, "--seeds", "1", "--workers", workers)) == 0
    for name in ("untouched", "full-1-seed0", "teachability-0.2-seed0"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / workers / f"cells/{name}.parquet") for workers in "12"), rtol=1e-5)


def test_tables_need_no_torch():
    code = "import sys; from diagnostics import validation; print('torch' in sys.modules, 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]


def test_a_cell_has_a_name():
    assert Cell("tip", 0.05, 2).name == "tip-0.05-seed2"
