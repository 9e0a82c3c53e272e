"""Agreement of offline answers with trainings: order, permutation over criteria, and signs."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import foresight
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.cell_effects import CellEffects
from diagnostics.analysis.criterion_labels import EXCHANGES, grouping, permutation_p
from diagnostics.analysis.foresight import (
    OfflineValue,
    agreement_table,
    foreseen_table,
    foresight_signs,
    offline_answers,
    offline_run,
)
from diagnostics.analysis.rank_agreement import scopes
from diagnostics.analysis.training_outcomes import Outcomes, outcome_table
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import score_criterion, select
from tests.effect_tables import PROMPTS, made_interventions, outcome_rows
from tests.made_tokens import make_effects
from tests.study_tables import tokens as study_tokens


def known(value, draws=100, prompts=PROMPTS):
    """An offline answer that its own prompts do not move."""
    return OfflineValue(value, np.full(draws, value), prompts)


def test_agreement_is_kendalls_tau_over_cells():
    cells = {
        (name, budget): effect
        for budget, shift in ((0.05, 0.0), (0.3, 0.2))
        for name, effect in (
            ("teachability", 0.1 + shift),
            ("entropy", 0.2 + shift),
            ("tip", 0.3 + shift),
        )
    }
    outcomes = Outcomes(outcome_rows({("full", 1.0): 0.9, **cells}, noise=0.01), draws=100)
    offline = {"captured_gain": dict(zip(cells, map(known, [3, 1, 2, 4, 6, 5])))}
    table = agreement_table(outcomes, offline).set_index("scope")
    assert table.loc["all", "kendall"] == pytest.approx(
        stats.kendalltau(list(cells.values()), [3, 1, 2, 4, 6, 5]).statistic
    )
    assert table.loc["within_budget", "kendall"] == pytest.approx(0.0) and table.loc[
        "budget_0.3", "kendall"
    ] == pytest.approx(1 / 3)
    assert (
        (table["y"] == "trained_reverse_kl").all()
        and table.loc["all", "cells"] == 6
        and (table["prompts"] == PROMPTS).all()
    )
    few = {"captured_gain": dict(list(offline["captured_gain"].items())[:2])}
    assert agreement_table(outcomes, few).empty


def test_an_offline_answer_s_own_prompts_widen_the_interval():
    """A step that reverses a third of the offline draws lowers tau in these, and the fewer prompts
    give the degrees of freedom.
    """
    cells = {
        (name, 0.05): effect
        for name, effect in (("teachability", 0.1), ("entropy", 0.2), ("tip", 0.3))
    }
    outcomes = Outcomes(outcome_rows({("full", 1.0): 0.9, **cells}, noise=0.001), draws=300)
    turned = np.arange(300) % 3 == 0
    still = {cell: known(effect, draws=300, prompts=8) for cell, effect in cells.items()}
    moving = {
        cell: OfflineValue(effect, np.where(turned, -effect, effect), 8)
        for cell, effect in cells.items()
    }
    table = (
        agreement_table(outcomes, {"still": still, "moving": moving})
        .query("scope == 'all'")
        .set_index("x")
    )
    assert (table["kendall"] == 1).all() and (table["prompts"] == 8).all()
    assert table.loc["still", "low"] == pytest.approx(1.0)
    # draws are +1 and -1, a third of them -1
    assert table.loc["moving", "low"] == pytest.approx(
        max(
            -1, 1 - stats.t.ppf(0.975, 7) * np.std(np.where(turned, -1, 1), ddof=1) * np.sqrt(8 / 7)
        ),
        abs=0.02,
    )


def test_agreement_with_the_first_step_of_the_trainings():
    effects = {
        ("full", 1.0): 0.9,
        ("teachability", 0.05): 0.1,
        ("entropy", 0.05): 0.2,
        ("tip", 0.05): 0.3,
    }
    first = outcome_rows(
        {cell: -effect for cell, effect in effects.items()},
        measure="one_step_gain",
        start=0.0,
        noise=0.001,
    )
    rows = pd.concat([outcome_rows(effects, noise=0.01), first[first["criterion"] != "untouched"]])
    table = agreement_table(Outcomes(rows, draws=200)).set_index("scope")
    assert (
        table.loc["all", "kendall"] == pytest.approx(1.0)
        and table.loc["all", "x"] == "one_step_gain"
    )
    assert table.loc["all", "low"] > 0.5


def test_what_was_foreseen_is_kept_beside_what_was_trained():
    effects = {("full", 1.0): 0.9, ("teachability", 0.05): 0.1, ("entropy", 0.05): 0.2}
    first = outcome_rows(
        {cell: -effect for cell, effect in effects.items()},
        measure="one_step_gain",
        start=0.0,
        noise=0.0,
    )
    rows = pd.concat([outcome_rows(effects), first[first["criterion"] != "untouched"]])
    offline = {
        "captured_gain": {
            ("entropy", 0.05): known(0.4),
            ("full", 1.0): known(1.0),
            ("tip", 0.05): known(0.3),
        }
    }
    table = foreseen_table(Outcomes(rows, draws=20), offline)
    assert list(table.columns) == ["criterion", "budget", "answer", "value"]
    found = {(row.criterion, row.answer): row.value for row in table.itertuples()}
    assert found == pytest.approx(
        {
            ("teachability", "one_step_gain"): 0.1,
            ("entropy", "one_step_gain"): 0.2,
            ("entropy", "captured_gain"): 0.4,
        },
        rel=0.05,
    )


@pytest.fixture
def finished_job(tmp_path):
    """Tokens and interventions of a main job, as its directory holds them."""
    tokens = study_tokens(prompts=12, seed=5)
    tokens["gain"] += 0.02
    effects = make_effects(
        tokens, lambda criterion, budget: budget + len(criterion) / 100, noise=0.05
    )
    tokens.to_parquet(tmp_path / "tokens.parquet")
    effects.to_parquet(tmp_path / "interventions.parquet")
    return tmp_path, tokens, effects


def test_offline_answers_are_read_from_a_run(finished_job, tmp_path):
    run, tokens, effects = finished_job
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"nowhere/tokens\.parquet does not exist\. Name a run directory whose main job is"
            r" finished\.$"
        ),
    ):
        offline_answers(tmp_path / "nowhere", [("tip", 0.05)])
    cells = [
        ("teachability", 0.2),
        ("random", 0.2),
        ("entropy", 0.5),
        ("tip", 0.2),
        ("hellinger", 0.2),
    ]
    found = offline_answers(run, cells, draws=40)
    assert set(found) == {
        "captured_gain",
        "captured_relative_gain",
        "captured_positive_gain",
        *(f"intervention_{name}" for name in ("forward_kl", "reverse_kl", "js")),
    }
    assert "hellinger" not in tokens  # which the last cell needs
    assert (
        list(found["captured_gain"]) == cells[:4] and list(found["intervention_js"]) == cells[:3]
    )  # no step was taken on the fourth
    for outcome, source in (("gain", "gain"), ("relative_gain", "relative_gain")):
        values = tokens[source].where(np.isfinite(tokens[source]), 0.0).to_numpy()
        for cell in (("teachability", 0.2), ("entropy", 0.5), ("tip", 0.2)):
            chosen = select(tokens, score_criterion(tokens, cell[0]), budget=cell[1])
            answer = found[f"captured_{outcome}"][cell]
            assert answer.value == pytest.approx(values[chosen].sum() / values.sum(), rel=1e-9)
            assert answer.prompts == 12 and answer.draws_D.shape == (40,)
    for cell, answer in found["intervention_forward_kl"].items():
        held = effects[
            (effects.criterion == cell[0])
            & (effects.budget == cell[1])
            & (effects.split == "held_out")
        ]
        assert (
            answer.value == pytest.approx(held.forward_kl.sum() / held.positions.sum())
            and answer.prompts == 6
            and np.ptp(answer.draws_D) > 0
        )


def test_offline_draws_take_prompts_again_and_not_as_the_trainings_do(finished_job):
    run, tokens, _ = finished_job
    prompts = sorted(tokens["prompt_id"].unique())
    seed = int(np.random.default_rng([0, 13]).integers(2**31))
    weights = np.random.default_rng(seed).multinomial(
        len(prompts), np.full(len(prompts), 1 / len(prompts)), size=25
    )
    times = tokens["prompt_id"].map({name: i for i, name in enumerate(prompts)}).to_numpy()
    sums = []
    for draw in weights:
        rows = tokens.loc[np.repeat(tokens.index, draw[times])].reset_index(drop=True)
        sums.append(rows["gain"][select(rows, rows["forward_kl"].to_numpy(), budget=0.2)].sum())
    found = offline_answers(run, [("divergence", 0.2)], draws=25)["captured_gain"][
        ("divergence", 0.2)
    ]
    np.testing.assert_allclose(found.draws_D, np.array(sums) / tokens["gain"].sum(), rtol=1e-9)
    assert not np.array_equal(weights, PromptClusters(range(12), draws=25, seed=0).weights)


# --- permutation over criteria
# ---------------------------------------------------------------------------------


def brute_force(cells, x, y, scope):
    """p by enumerating every exchange of the criteria and calling scipy or counting pairs."""
    names = sorted(set(cells["criterion"]))
    at = {(c, b): i for i, (c, b) in enumerate(zip(cells["criterion"], cells["budget"]))}

    def tau(order):
        over = ties_x = ties_y = 0
        moved = dict(zip(names, order))
        for (c, b), i in at.items():
            for (d, e), j in at.items():
                ours, theirs = at.get((moved[c], b)), at.get((moved[d], e))
                compared = i != j and (scope == "all" or (b == e and scope in ("within_budget", b)))
                if not compared or ours is None or theirs is None:
                    continue
                one, other = np.sign(x[i] - x[j]), np.sign(y[ours] - y[theirs])
                over, ties_x, ties_y = over + one * other, ties_x + one**2, ties_y + other**2
        return over / np.sqrt(ties_x * ties_y)

    observed = tau(names)
    return observed, np.mean([abs(tau(o)) >= abs(observed) - 1e-9 for o in permutations(names)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("missing", [0, 1])
def test_the_permutation_against_every_exchange_by_hand(seed, missing):
    rng = np.random.default_rng(seed)
    cells = pd.DataFrame(
        [(name, budget) for name in "abcd" for budget in (0.1, 0.3)],
        columns=["criterion", "budget"],
    )
    cells = cells.iloc[: len(cells) - missing]
    x = rng.integers(0, 6, len(cells)).astype(float)  # with ties
    y = x + 2 * rng.normal(size=len(cells)) + cells["budget"].to_numpy()
    for scope, pairs in scopes(cells):
        key = float(scope.removeprefix("budget_")) if scope.startswith("budget_") else scope
        expected_tau, expected = brute_force(
            cells if key in ("all", "within_budget") else cells[cells["budget"] == key],
            x if key in ("all", "within_budget") else x[cells["budget"] == key],
            y if key in ("all", "within_budget") else y[cells["budget"] == key],
            key,
        )
        assert permutation_p(cells, x, y, pairs) == pytest.approx(expected)
        still = foresight.CellScores("x", x, np.empty((0, len(x))), 1)
        tau = foresight.ranks.kendall(
            still, foresight.CellScores("y", y, np.empty((0, len(y))), 1), pairs
        )
        assert tau.value == pytest.approx(expected_tau)


def test_many_criteria_are_exchanged_by_seed():
    cells = pd.DataFrame({"criterion": [f"c{i:02d}" for i in range(12)], "budget": 0.05})
    pairs = next(mask for scope, mask in scopes(cells) if scope == "within_budget")
    x = np.arange(12.0)
    assert permutation_p(cells, x, x, pairs) == pytest.approx(1 / (1 + EXCHANGES))
    noise = np.random.default_rng(0).normal(size=12)
    found = permutation_p(cells, x, noise, pairs, seed=1)
    expected = stats.kendalltau(x, noise, method="exact").pvalue
    assert found == pytest.approx(expected, abs=0.02)
    assert found == permutation_p(cells, x, noise, pairs, seed=1)


def test_equal_labels_give_equal_p_and_unrelated_answers_are_not_significant_too_often():
    """The permutation's p of unrelated answers is below .1 in about a tenth of the cases."""
    cells = pd.DataFrame(
        [(name, budget) for name in "abcdef" for budget in (0.05, 0.1, 0.3)],
        columns=["criterion", "budget"],
    )
    pairs = dict(scopes(cells))["within_budget"]
    rng, low = np.random.default_rng(0), 0
    for _ in range(100):
        x, y = (np.repeat(rng.normal(size=6), 3) + 0.3 * rng.normal(size=18) for _ in range(2))
        p = permutation_p(cells, x, y, pairs)
        assert p == pytest.approx(permutation_p(cells, y, x, pairs))  # either side may be exchanged
        low += p <= 0.1
    assert low <= 20


# --- groups and ambiguous cells
# ---------------------------------------------------------------------------------


def test_criteria_whose_scores_agree_are_one_witness():
    rng = np.random.default_rng(0)
    tokens = study_tokens(prompts=12, seed=5)
    d = rng.exponential(size=len(tokens))
    tokens = tokens.assign(forward_kl=d, reverse_kl=d * 1.0001, student_entropy=rng.random(len(d)))
    names = ["entropy", "divergence", "reverse_divergence", "random"]
    expected = {"entropy": "entropy", "random": "random", "divergence": "divergence"}
    assert grouping(names, tokens) == expected | {"reverse_divergence": "divergence"}
    assert grouping(["surprise", "advantage_abs", "tip"]) == {
        "surprise": "surprise",
        "advantage_abs": "surprise",
        "tip": "tip",
    }


def test_a_group_has_the_mean_of_its_members_and_one_label():
    effects = {("full", 1.0): 0.9, ("advantage_abs", 0.05): 0.1, ("surprise", 0.05): 0.3}
    effects |= {("entropy", 0.05): 0.25, ("tip", 0.05): 0.4}
    outcomes = Outcomes(outcome_rows(effects, noise=0.001), draws=50)
    cells = list(effects)[1:]
    offline = {"answer": dict(zip(cells, map(known, [1.0, 3.0, 2.5, 4.0])))}
    row = agreement_table(outcomes, offline).query("scope == 'within_budget'").iloc[0]
    assert (row["groups"], row["cells"], row["cells_left_out"]) == (3, 3, 0)
    assert row["kendall"] == 1.0  # 2 < 2.5 < 4 and .2 < .25 < .4
    assert row["p_permutation"] == pytest.approx(2 / 6)  # and the reverse order
    alone = agreement_table(outcomes, offline, groups={}).query("scope == 'within_budget'").iloc[0]
    assert (alone["groups"], alone["p_permutation"]) == (4, pytest.approx(2 / 24))


def test_ambiguous_cells_are_left_out_and_counted():
    effects = {("full", 1.0): 0.9}
    effects |= {(f"{name}", 0.05): i / 10 for i, name in enumerate(("tip", "entropy", "jsd"))}
    effects |= {("early", 0.05): 0.5}
    outcomes = Outcomes(outcome_rows(effects, noise=0.001), draws=50)
    offline = {"answer": dict(zip(list(effects)[1:], map(known, [1, 2, 3, 0])))}
    row = agreement_table(outcomes, offline, ambiguous=[("early", 0.05)]).iloc[0]
    assert (row["kendall"], row["cells"], row["cells_left_out"]) == (1.0, 3, 1)
    assert agreement_table(outcomes, offline).iloc[0]["kendall"] == 0.0


def test_holm_counts_the_answers_that_are_looked_at():
    effects = {(name, 0.05): i / 10 for i, name in enumerate(("tip", "entropy", "jsd", "early"))}
    outcomes = Outcomes(outcome_rows({("full", 1.0): 0.9, **effects}, noise=0.001), draws=20)
    offline = {
        "good": dict(zip(effects, map(known, [1, 2, 3, 4]))),
        "bad": dict(zip(effects, map(known, [1, 3, 2, 0]))),
    }
    table = agreement_table(outcomes, offline).query("scope == 'all'").set_index("x")
    assert (table["looks"] == 2).all()
    assert table.loc["good", "p_permutation"] == pytest.approx(2 / 24)
    assert table.loc["good", "p_holm"] == pytest.approx(4 / 24)


def test_step_batches_widen_the_interval_of_tau():
    effects = {(name, 0.05): i / 10 for i, name in enumerate(("tip", "entropy", "jsd"))}
    outcomes = Outcomes(outcome_rows({("full", 1.0): 0.9, **effects}, noise=0.001), draws=100)
    steps = [np.array([1, 1, 1, 3.5]), np.full(4, 2.0), np.full(4, 3.0)]
    moved = {
        cell: OfflineValue(i + 1.0, np.full(100, i + 1.0), 40, without_step=steps[i])
        for i, cell in enumerate(effects)
    }
    row = agreement_table(outcomes, {"moved": moved}).iloc[0]
    # without the last step 3.5 stands above 2 and 3: tau is -1/3 instead of 1
    without = np.array([1, 1, 1, -1 / 3])
    error = np.sqrt(3 / 4 * np.sum((without - without.mean()) ** 2))
    assert (row["kendall"], row["steps"]) == (1.0, 4)
    assert row["low"] == pytest.approx(max(-1, 1 - stats.t.ppf(0.975, 3) * error), abs=1e-6)


# --- horizons and signs
# ---------------------------------------------------------------------------------

TRAINED = {
    ("full", 1.0): 0.5,
    ("random", 0.05): 0.2,
    ("teachability", 0.05): 0.4,
    ("entropy", 0.05): 0.1,
    ("divergence", 0.05): 0.201,
}
OFFLINE = {
    ("full", 1.0): 0.2,
    ("random", 0.05): 0.07,
    ("teachability", 0.05): 0.11,
    ("entropy", 0.05): 0.1,
    ("divergence", 0.05): 0.03,
}


def test_signs_are_compared_wherever_training_is_decided():
    effects = made_interventions(OFFLINE, horizons=(0, 20), batch=0.001, prompt=0.004, both=0.001)
    found = CellEffects(effects, draws=50)
    trained = outcome_table(Outcomes(outcome_rows(TRAINED), draws=100))
    table = foresight_signs(found, trained)
    assert set(table["measure"]) == {"reverse_kl"}  # forward KL was not trained for
    assert set(table["horizon"]) == {0, 20} and len(table) == 6
    at = table[table["horizon"] == 20].set_index("criterion")
    over = found.effect(("entropy", 0.05, 20), "reverse_kl") - found.effect(
        ("random", 0.05, 20), "reverse_kl"
    )
    assert at.loc["entropy", "offline_difference"] == over.value
    assert (at.loc["entropy", "offline_low"], at.loc["entropy", "offline_high"]) == over.interval()
    assert at.loc["teachability", "trained_difference"] == pytest.approx(0.2, abs=0.02)
    assert dict(at["decided"]) == {"teachability": True, "entropy": True, "divergence": False}
    assert at.loc["teachability", "agrees"] is True and at.loc["entropy", "agrees"] is False
    assert np.isnan(at.loc["divergence", "agrees"])
    barred = foresight_signs(found, trained, ambiguous=[("entropy", 0.05)])
    row = barred[(barred["criterion"] == "entropy") & (barred["horizon"] == 20)].iloc[0]
    assert row["ambiguous"] and row["decided"] and np.isnan(row["agrees"])


def test_signs_beyond_the_overfitted_horizon_are_marked():
    truths = OFFLINE | {("teachability", 0.05): 0.9}
    effects = made_interventions(truths, horizons=(5, 20), overfitted=("teachability",))
    trained = outcome_table(Outcomes(outcome_rows(TRAINED), draws=20))
    table = foresight_signs(CellEffects(effects, draws=20), trained)
    marked = table.loc[table["overfitted"], ["criterion", "horizon"]].to_numpy().tolist()
    assert marked == [["teachability", 20]]


@pytest.fixture
def horizon_job(tmp_path):
    """A main job whose interventions have folds, horizons and an ambiguous criterion."""
    tokens = study_tokens(prompts=12, seed=5)
    names = {f"p{g:03d}": name for g, name in enumerate(sorted(set(tokens["prompt_id"])))}
    effects = made_interventions(
        OFFLINE, prompts=12, horizons=(0, 5), ambiguous={"divergence": 0.4}
    )
    effects["prompt_id"] = effects["prompt_id"].map(names)
    tokens.to_parquet(tmp_path / "tokens.parquet")
    effects.to_parquet(tmp_path / "interventions.parquet")
    return tmp_path, effects


def test_each_horizon_is_an_answer(horizon_job):
    directory, effects = horizon_job
    cells = [cell for cell in OFFLINE if cell[0] != "full"]
    run = offline_run(directory, cells, draws=20)
    assert {"intervention_reverse_kl", "intervention_h5_reverse_kl"} <= set(run.answers)
    answer = run.answers["intervention_h5_reverse_kl"]["entropy", 0.05]
    part = effects[(effects["criterion"] == "entropy") & (effects["horizon"] == 5)]
    held = part[part["held_out"]]
    assert answer.value == pytest.approx(held["reverse_kl"].sum() / held["positions"].sum())
    for fold, value in enumerate(answer.without_step):
        rest = held[held["fold"] != fold]
        assert value == pytest.approx(rest["reverse_kl"].sum() / rest["positions"].sum())
    assert run.ambiguous == {("divergence", 0.05)}


def test_all_tables_of_a_validation(horizon_job):
    run = offline_run(horizon_job[0], [cell for cell in OFFLINE if cell[0] != "full"], draws=20)
    made = foresight.tables(outcome_rows(TRAINED), run, draws=20)
    assert set(made) == {
        *(f"validation_{name}" for name in ("cells", "outcomes", "verdicts", "agreement")),
        "validation_foreseen",
        "foresight_signs",
    }
    agreement = made["validation_agreement"].set_index(["scope", "x"])
    row = agreement.loc[("within_budget", "intervention_h5_reverse_kl")]
    assert (row["cells"], row["cells_left_out"], row["steps"]) == (3, 1, 4)
    assert "foresight_signs" not in foresight.tables(outcome_rows(TRAINED), draws=20)


# --- committed tables
# ---------------------------------------------------------------------------------


def test_committed_tables_are_judged_by_permutation_alone():
    rows = outcome_rows(TRAINED)
    outcomes = Outcomes(rows, draws=50)
    cells = [cell for cell in TRAINED if cell[0] != "full"]
    offline = {"intervention_reverse_kl": {cell: known(OFFLINE[cell], draws=50) for cell in cells}}
    whole = foresight.tables(rows, offline, draws=50)
    again = foresight.tables_of_committed(
        whole["validation_outcomes"], whole["validation_foreseen"]
    )
    one, other = whole["validation_agreement"], again["validation_agreement"]
    same = ["scope", "x", "y", "kendall", "p_permutation", "p_holm", "groups", "cells", "prompts"]
    pd.testing.assert_frame_equal(one[same], other[same])
    assert np.isfinite(one["low"]).all() and (one["reason"] == "").all()
    assert other[["low", "high"]].isna().all().all() and (other["reason"] != "").all()
    signs = again["foresight_signs"].set_index("criterion")
    assert signs["agrees"].dropna().to_dict() == {"teachability": True, "entropy": False}
    assert signs["offline_low"].isna().all() and outcomes.cells


def test_a_later_run_answers_for_committed_trainings(horizon_job):
    run = offline_run(horizon_job[0], [cell for cell in OFFLINE if cell[0] != "full"], draws=20)
    trained = outcome_table(Outcomes(outcome_rows(TRAINED), draws=20))
    made = foresight.tables_of_committed(trained, None, run)
    assert "intervention_h5_reverse_kl" in set(made["validation_agreement"]["x"])
    assert made["foresight_signs"]["offline_low"].notna().all()
    assert set(made["foresight_signs"]["horizon"]) == {0, 5}
