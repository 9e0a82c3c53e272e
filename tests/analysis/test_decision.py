"""The decision table: effects of cells with three parts of an interval, verdicts, and power."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import criteria
from diagnostics.analysis import decision, rank_agreement
from diagnostics.analysis.bootstrap import holm
from diagnostics.analysis.cell_effects import CellEffects, CellEstimate, satterthwaite
from diagnostics.analysis.config import AnalysisConfig
from diagnostics.analysis.decision import (
    COLUMNS,
    beyond_best,
    decide,
    decision_sentence,
    registered_sentence,
)
from diagnostics.analysis.power import LARGEST_DESIGN, needed, smallest_detectable
from diagnostics.analysis.selection import ComparisonConfig
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.shown import by_uncertainty
from diagnostics.core.tables import read_csv, write_csv
from diagnostics.pipeline.run import open_run
from diagnostics.pipeline.stages.compare import compare_stage
from tests.effect_tables import TRUTHS, made_interventions, one_batch
from tests.made_tokens import made_tokens, only_row

CELL, RANDOM, FULL = ("tip", 0.05, 20), ("random", 0.05, 20), ("full", 1.0, 20)
PLAIN = {("full", 1.0): 0.2, ("random", 0.05): 0.07, ("tip", 0.05): 0.11}
QUIET = {"shared": 0.01, "prompt": 0.004, "batch": 0.001, "both": 0.002, "selection": 0.001}


def effect_rows(values, *, criterion, positions, fold_of, draw=0, horizon=20, budget=0.05):
    """Rows of one draw of a cell: values[fold][prompt] are mean reductions per position."""
    return pd.DataFrame(
        [
            {
                "criterion": criterion,
                "budget": budget,
                "draw": draw,
                "fold": fold,
                "horizon": horizon,
                "prompt_id": prompt,
                "held_out": fold_of[prompt] != fold,
                "positions": positions[prompt],
                "reverse_kl": value * positions[prompt],
            }
            for fold, of_prompts in values.items()
            for prompt, value in of_prompts.items()
        ]
    )


@pytest.fixture
def by_hand():
    """Two folds and three prompts: a and b in fold 0 are held out for step 1, c for step 0."""
    facts = {"positions": {"a": 10, "b": 20, "c": 30}, "fold_of": {"a": 0, "b": 0, "c": 1}}
    return pd.concat(
        [
            effect_rows(
                {0: {"a": 9, "b": 9, "c": 0.4}, 1: {"a": 0.1, "b": 0.3, "c": 9}},
                criterion="tip",
                **facts,
            ),
            effect_rows(
                {0: {"a": 9, "b": 9, "c": 0.1}, 1: {"a": 0.1, "b": 0.0, "c": 9}},
                criterion="random",
                **facts,
            ),
        ]
    )


def test_two_folds_and_three_prompts_by_hand(by_hand):
    found = CellEffects(by_hand, draws=4000)
    tip, random = (found.effect(cell, "reverse_kl") for cell in (CELL, RANDOM))
    # (1 + 6 + 12) / 60 and (1 + 0 + 3) / 60; step 0 is seen by c alone, step 1 by a and b.
    assert tip.value == pytest.approx(19 / 60) and random.value == pytest.approx(4 / 60)
    assert (tip.positions, tip.prompts, tip.steps) == (60, 3, 2)
    over = tip - random
    assert over.value == pytest.approx(0.25)
    np.testing.assert_allclose(over.without_step, [6 / 30, 9 / 30])
    assert over.step_error == pytest.approx(0.05)  # half the difference of the two
    np.testing.assert_allclose(over.left_out, [15 / 50, 9 / 40, 6 / 30])
    jackknife = np.sqrt(2 / 3 * (0.05**2 + 0.025**2 + 0.05**2))
    assert over.prompt_error >= jackknife
    assert np.isnan(over.draw_error)  # one selection at random; its spread is between the steps
    assert over.standard_error == pytest.approx(np.hypot(over.prompt_error, 0.05))
    variances = np.array([over.prompt_error**2, 0.05**2])
    freedom = variances.sum() ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 1)
    assert over.freedom == pytest.approx(freedom)
    reach = stats.t.ppf(0.975, freedom) * over.standard_error
    assert over.interval() == (pytest.approx(0.25 - reach), pytest.approx(0.25 + reach))


def slow_value(effects, cell, weight, skip=None):
    """Mean held-out reduction of a cell, summed row by row; random's selections are averaged."""
    part = effects[
        (effects["criterion"] == cell[0])
        & (effects["budget"] == cell[1])
        & (effects["horizon"] == cell[2])
        & effects["held_out"]
    ]
    over = under = 0.0
    for row in part.to_dict("records"):
        if row["fold"] != skip:
            over += weight[row["prompt_id"]] * row["reverse_kl"]
            under += weight[row["prompt_id"]] * row["positions"]
    return over / under


def test_an_effect_against_loops_over_rows():
    effects = made_interventions(PLAIN, folds=3, prompts=12, horizons=(0, 20), draws=4)
    found = CellEffects(effects, draws=30, seed=3)
    over = found.effect(CELL, "reverse_kl") - found.effect(RANDOM, "reverse_kl")
    names = sorted(set(effects["prompt_id"]))

    def difference(weight, skip=None):
        return slow_value(effects, CELL, weight, skip) - slow_value(effects, RANDOM, weight, skip)

    once = dict.fromkeys(names, 1)
    assert over.value == pytest.approx(difference(once), rel=1e-12)
    taken = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=30)
    np.testing.assert_allclose(over.draws, [difference(dict(zip(names, row))) for row in taken])
    np.testing.assert_allclose(over.left_out, [difference({**once, name: 0}) for name in names])
    np.testing.assert_allclose(over.without_step, [difference(once, skip) for skip in range(3)])
    variance = 0.0
    for fold in range(3):
        here = effects[(effects["fold"] == fold) & effects["held_out"]]
        here = here[(here["criterion"] == "random") & (here["horizon"] == 20)]
        means = [d["reverse_kl"].sum() / d["positions"].sum() for _, d in here.groupby("draw")]
        variance += np.var(means, ddof=1) / 4 / 9
    assert over.draw_error == pytest.approx(np.sqrt(variance)) and over.draw_freedom == 9


def test_the_spread_of_selections_is_a_floor_under_that_of_step_batches():
    base = {"value": 1.0, "draws": np.zeros(9), "positions": 5, "prompts": 10}
    between = CellEstimate(**base, without_step=np.array([0.9, 1.1]), draw_error=0.05)
    chance = CellEstimate(**base, without_step=np.ones(4), draw_error=0.05, draw_freedom=8.0)
    alone = CellEstimate(**base, draw_error=0.05, draw_freedom=4.0)
    single = CellEstimate(**base, draw_error=np.nan, draw_freedom=np.nan)
    assert (between.batch_error, between.batch_freedom) == (pytest.approx(0.1), 1)
    assert (chance.batch_error, chance.batch_freedom) == (0.05, 8)
    assert (alone.batch_error, alone.batch_freedom, alone.freedom) == (0.05, 4, pytest.approx(4))
    assert np.isnan(single.interval()).all()


def test_satterthwaite_of_parts():
    assert satterthwaite((3.0, 5.0), (4.0, 9.0)) == (5.0, pytest.approx(625 / (81 / 5 + 256 / 9)))
    assert satterthwaite((3.0, 5.0), (0.0, np.inf)) == (3.0, pytest.approx(5.0))
    assert satterthwaite((0.0, np.inf), (0.0, np.inf)) == (0.0, np.inf)


def test_every_column_is_there_and_each_rival_is_compared():
    table = decide(made_interventions(**QUIET), draws=50)
    assert list(table) == COLUMNS and len(table) == len(TRUTHS) * 4 * 3
    row = only_row(table, criterion="teachability", budget=0.05, horizon=20, measure="reverse_kl")
    assert row["primary"] and row["looks"] == 12 and row["steps"] == 4
    for rival, truth in (("random", 0.07), ("random_divergent", 0.06), ("full", 0.2)):
        assert row[f"over_{rival}"] == pytest.approx(0.11 - truth, abs=0.005)
        assert row[f"over_{rival}_low"] < 0.11 - truth < row[f"over_{rival}_high"]
    random = only_row(table, criterion="random", budget=0.05, horizon=20, measure="reverse_kl")
    assert np.isnan(random["over_random"]) and random["over_full"] == pytest.approx(-0.13, abs=0.01)
    assert random["verdict"] == "" and np.isnan(random["p_holm"])
    assert table["primary"].sum() == len(TRUTHS)


def test_the_decision_is_the_best_lower_bound():
    table = decide(made_interventions(**QUIET), draws=100)
    chosen = only_row(table, recommended=True)
    better = table[table["primary"] & (table["verdict"] == "better")]
    assert chosen["over_random_low"] == better["over_random_low"].max()
    assert (chosen["criterion"], chosen["budget"], chosen["horizon"]) == ("teachability", 0.05, 20)
    half = (chosen["over_random_high"] - chosen["over_random_low"]) / 2
    assert decision_sentence(table) == (
        "All positions do best; where a selection is wanted, train with teachability at 5 %:"
        f" {chosen['over_random']:+.4f} ± {half:.4f} nats of reverse KL per position over random"
        " after 20 steps (64 prompts, 4 step batches). All positions lower it by"
        f" {-chosen['over_full']:.4f} [{-chosen['over_full_high']:.4f},"
        f" {-chosen['over_full_low']:.4f}] more."
    )


def test_a_cell_that_is_as_good_is_named_and_nothing_is_said_to_be_best():
    truths = {**PLAIN, ("tip", 0.05): 0.13, ("entropy", 0.05): 0.129}
    table = decide(made_interventions(truths, **QUIET), draws=100)
    chosen = only_row(table, recommended=True)["criterion"]
    other = {"tip": "entropy", "entropy": "tip"}[chosen]
    text = decision_sentence(table)
    assert f"Within its interval lies {other} at 5 %: which is best is not identified." in text


def test_a_selection_that_beats_all_positions_is_the_first_choice():
    truths = {**TRUTHS, ("full", 1.0): 0.05}
    text = decision_sentence(decide(made_interventions(truths, **QUIET), draws=100))
    assert text.startswith("Train with teachability at 5 %")
    assert "That is more than with all positions (difference +0.0" in text


def test_the_sentence_is_the_same_for_the_file(tmp_path):
    table = decide(made_interventions(), draws=50)
    write_csv(tmp_path / "decision.csv", table)
    assert decision_sentence(read_csv(tmp_path / "decision.csv")) == decision_sentence(table)


def test_a_rival_that_is_as_good_is_named():
    truths = {**PLAIN, ("random_divergent", 0.05): 0.09, ("position_matched", 0.05): 0.07}
    table = decide(made_interventions(truths, **QUIET), draws=100)
    text = decision_sentence(table)
    assert "train with tip at 5 %: +0.0" in text and "not shown to be better" not in text
    low = table["over_random_divergent_low"].where(table["criterion"] != "tip", -0.001)
    text = decision_sentence(table.assign(over_random_divergent_low=low))
    assert text.endswith(" more. It is not shown to be better than random_divergent.")


def test_a_control_is_never_the_recommendation():
    truths = {**PLAIN, ("tip", 0.05): 0.03, ("random_divergent", 0.05): 0.12}
    table = decide(made_interventions(truths, **QUIET), draws=100)
    control = only_row(table, primary=True, criterion="random_divergent")
    assert control["verdict"] == "better" and not table["recommended"].any()
    text = decision_sentence(table)
    assert text.startswith(
        "No criterion is told apart from choosing at random among divergent positions:"
        " random_divergent at 5 %: +0.0"
    )
    # a table of an earlier version, which recommended it
    earlier = table.assign(recommended=table.index == control.name)
    assert decision_sentence(earlier) == text


def test_a_criterion_that_is_not_told_apart_from_divergent_positions_is_not_recommended():
    truths = {**PLAIN, ("tip", 0.05): 0.11, ("random_divergent", 0.05): 0.11}
    table = decide(made_interventions(truths, **QUIET), draws=100)
    tip = only_row(table, primary=True, criterion="tip")
    assert tip["verdict"] == "better" and tip["over_random_divergent_low"] <= 0
    assert not table["recommended"].any()
    text = decision_sentence(table)
    assert text.startswith(
        "No criterion is told apart from choosing at random among divergent positions: tip at 5 %:"
    )
    assert text.endswith("] over random_divergent.")
    without = {key: value for key, value in truths.items() if key[0] != "random_divergent"}
    alone = decide(made_interventions(without, **QUIET), draws=100)
    assert only_row(alone, recommended=True)["criterion"] == "tip"


def test_controls_are_the_rivals_and_what_its_note_calls_one():
    named = {"random", "random_divergent", "position_matched", "token_identity", "q3"}
    assert {name for name in criteria.names() if decision.is_control(name)} == named
    assert not decision.is_control("a criterion of another program")


@pytest.mark.parametrize(
    "truth, options, verdict, reason",
    [
        (0.11, {}, "better", ""),
        (0.03, {}, "worse", ""),
        (0.0705, {}, "no difference shown", ""),
        (0.11, {"batch": 0.05}, "cannot tell", ""),
        (0.11, {"prompts": 16}, "not judged", "16 held-out prompts of at least 20"),
        (0.11, {"ambiguous": {"tip": 0.25}}, "better", "ties decide 25% of the selection"),
        (0.11, {"ambiguous": {"tip": 0.09}}, "better", ""),
        (
            0.9,
            {"overfitted": ("tip",), "horizons": (5, 20)},
            "better",
            "beyond the horizon where the bank is overfitted",
        ),
        (0.11, {"horizons": (0,)}, "better", "one step does not foresee training"),
    ],
)
def test_verdicts(truth, options, verdict, reason):
    effects = made_interventions({**PLAIN, ("tip", 0.05): truth}, **{**QUIET, **options})
    row = only_row(decide(effects, draws=100), primary=True, criterion="tip")
    assert (row["verdict"], row["reason"]) == (verdict, reason)
    assert row["recommended"] == (verdict == "better" and not reason)


def test_what_stands_against_a_better_criterion_is_said():
    options = QUIET | {"ambiguous": {"tip": 0.25}}
    text = decision_sentence(decide(made_interventions(PLAIN, **options), draws=50))
    assert text.startswith("No criterion can be recommended: tip at 5 %: +0.0")
    assert text.endswith("(64 prompts, 4 step batches), but ties decide 25% of the selection.")


def test_too_little_data_says_how_much_more():
    truths = {**PLAIN, ("tip", 0.05): 0.1}
    table = decide(made_interventions(truths, batch=0.02, seed=1), draws=100)
    row = only_row(table, primary=True, criterion="tip")
    assert row["verdict"] == "cannot tell"
    more = row["prompts_needed"] - 64
    assert decision_sentence(table).startswith("Cannot tell: tip at 5 %: +")
    assert decision_sentence(table).endswith(
        f"; {more:,.0f} prompts more, {row['prompts_needed']:,.0f} in {row['steps_needed']:.0f}"
        " step batches, would show such a difference with 80 % power."
    )
    assert row["prompts_needed"] == 16 * row["steps_needed"]


def test_the_registered_cell_is_said_beside_another_recommendation():
    table = decide(made_interventions(**QUIET), draws=100)
    chosen = only_row(table, recommended=True)
    assert (chosen["criterion"], chosen["budget"]) == ("teachability", 0.05)
    assert registered_sentence(table, "teachability", 0.05) == ""  # the decision names it
    row = only_row(table, primary=True, criterion="divergence", budget=0.05)
    half = (row["over_random_high"] - row["over_random_low"]) / 2
    shown = f"{by_uncertainty(row['over_random'], half, sign=True)} ± {by_uncertainty(half, half)}"
    verdict = {"better": "better than random", "worse": "worse than random"}[row["verdict"]]
    assert registered_sentence(table, "divergence", 0.05) == (
        f"The registered choice, divergence at 5 %: {shown}, {verdict}."
    )
    assert registered_sentence(table, "margin", 0.3) == (
        "The registered choice, margin at 30 %, was not intervened on."
    )
    corrected = table.copy()
    corrected.loc[row.name, "verdict"] = "cannot tell"
    assert registered_sentence(corrected, "divergence", 0.05).endswith(
        f"{shown}, not told apart from random after Holm's correction for {row['looks']:g} looks."
    )
    few = decide(made_interventions(**(QUIET | {"prompts": 12})), draws=50)
    assert registered_sentence(few, "margin", 0.3) == ""


def test_no_criterion_above_random():
    truths = {**PLAIN, ("tip", 0.05): 0.02, ("entropy", 0.05): 0.0695}
    table = decide(made_interventions(truths, **(QUIET | {"seed": 2})), draws=100)
    verdicts = sorted(table.loc[table["primary"] & (table["p_value"] > 0), "verdict"])
    assert verdicts == ["no difference shown", "worse"]
    text = "No criterion is above random positions at any budget ("
    assert decision_sentence(table).startswith(text)


def test_an_older_table_has_one_step_batch_and_no_recommendation():
    effects = one_batch(made_interventions(**QUIET))
    table = decide(effects, draws=50)
    row = only_row(table, primary=True, criterion="teachability", budget=0.05)
    assert (row["steps"], row["horizon"], row["prompts"]) == (1, 0, 48)
    assert row["reason"] == "prompts alone: one step batch; one step does not foresee training"
    assert np.isnan(row["error_steps"]) and row["error_draws"] > 0
    assert np.isnan(row[["prompts_needed", "steps_needed"]].astype(float)).all()
    assert row["prompts_needed_alone"] > 0 and not table["recommended"].any()
    assert decision_sentence(table) == (
        "No decision: one step of matched norm does not foresee training. Intervene with a horizon."
    )


def test_one_step_batch_at_a_horizon_decides_nothing():
    effects = made_interventions(**QUIET)
    table = decide(effects[effects["fold"] == 2], draws=50)
    assert not table["recommended"].any()
    assert decision_sentence(table) == (
        "No decision: there is one step batch, and its intervals carry the prompts alone."
        " Intervene on several folds."
    )


def test_random_against_itself_has_zero_width_and_no_verdict():
    effects = made_interventions(PLAIN, draws=1)
    copy = effects[effects["criterion"] == "random"].assign(criterion="entropy")
    row = only_row(decide(pd.concat([effects, copy])), primary=True, criterion="entropy")
    assert row["over_random"] == 0 and row["over_random_low"] == row["over_random_high"] == 0
    assert (row["verdict"], row["reason"]) == ("cannot tell", "no interval: zero width")


def test_swapped_labels_negate_the_difference():
    effects = made_interventions(PLAIN, draws=1, horizons=(20,))
    swapped = effects.replace({"criterion": {"tip": "random", "random": "tip"}})
    rows = [
        only_row(decide(e, draws=60), primary=True, criterion="tip") for e in (effects, swapped)
    ]
    one, other = (row[["over_random", "over_random_low", "over_random_high"]] for row in rows)
    assert list(other) == pytest.approx([-one.iloc[0], -one.iloc[2], -one.iloc[1]])
    assert rows[0]["p_value"] == pytest.approx(rows[1]["p_value"])


def test_another_unit_changes_no_verdict():
    effects = made_interventions()
    measures = ["forward_kl", "reverse_kl", "js"]
    one, other = (
        decide(e, draws=60)
        for e in (effects, effects.assign(**{m: 3 * effects[m] for m in measures}))
    )
    for name in ("over_random", "over_full_low", "smallest_detectable", "margin"):
        np.testing.assert_allclose(other[name], 3 * one[name])
    same = ["verdict", "prompts_needed", "recommended"]
    pd.testing.assert_frame_equal(one[same], other[same])


def test_holm_counts_the_cells_of_a_horizon_and_divergence():
    table = decide(made_interventions(), draws=60)
    for _, part in table.groupby(["horizon", "measure"]):
        np.testing.assert_allclose(part["p_holm"], holm(part["p_value"].to_numpy()))
        assert (part["looks"] == part["p_value"].notna().sum()).all()


@pytest.mark.parametrize(
    "held_out, on_step, expected",
    [
        ([1, 2, 3], [1, 2, 3], [False, False, False]),
        ([1, 3, 2], [1, 2, 3], [False, False, True]),
        ([1, 3, 2], [1, 4, 3], [False, False, False]),  # the step batches lose too
        ([3, 1, 2], [1, 2, 3], [False, True, True]),  # still below the first
        ([3, np.nan, 2], [1, 2, 3], [False, False, False]),
    ],
)
def test_beyond_which_horizon_the_bank_is_overfitted(held_out, on_step, expected):
    assert beyond_best(held_out, on_step) == expected


def test_right_and_wrong_rollouts_apart():
    effects = made_interventions(PLAIN, correct=True, horizons=(20,))
    table = decide(effects, draws=60)
    assert set(table["rollouts"]) == {"all", "right", "wrong"}
    for kind, subset in (("right", effects["correct"]), ("wrong", ~effects["correct"])):
        alone = decide(effects[subset].drop(columns="correct"), draws=60)
        part = table[table["rollouts"] == kind]
        same = ["criterion", "effect", "over_random", "over_random_low", "p_value", "prompts"]
        pd.testing.assert_frame_equal(
            part[same].reset_index(drop=True), alone[same].reset_index(drop=True)
        )
    assert not table.loc[table["rollouts"] != "all", ["primary", "recommended"]].any().any()


def test_a_prompt_with_right_and_wrong_rollouts_counts_once_among_all():
    plain = made_interventions(PLAIN, horizons=(20,))
    names = ["positions", "forward_kl", "reverse_kl", "js"]
    half = plain.assign(**{name: plain[name] / 2 for name in names})
    split = pd.concat([half.assign(correct=True), half.assign(correct=False)])
    one, other = (
        decide(e, draws=60).query("rollouts == 'all'").drop(columns="positions")
        for e in (plain, split)
    )
    pd.testing.assert_frame_equal(one, other)


def test_rollouts_without_a_label_are_among_all_alone():
    effects = made_interventions(PLAIN, correct=True, horizons=(20,))
    effects["correct"] = effects["correct"].astype(object).where(effects["prompt_id"] > "p010")
    table = decide(effects, draws=20).set_index(["rollouts", "criterion", "measure"])["prompts"]
    counts = [table[kind, "tip", "js"] for kind in ("all", "right", "wrong")]
    assert counts == [64, 35, 18]  # of p011 to p063, every third is wrong


@pytest.mark.parametrize(
    "change, options, message",
    [
        (
            lambda e: e.drop(columns=["held_out"]),
            {},
            r"^An intervention table needs the column held_out \(or split, in older tables\)\.",
        ),
        (
            lambda e: pd.concat([e, e.head(2)]),
            {},
            r"^2 rows of the intervention table stand twice, the first of \{'criterion': 'full'",
        ),
        (
            lambda e: e.assign(js=np.nan),
            {},
            r"^\d+ rows of the intervention table are not finite, the first of \{'criterion'",
        ),
        (
            lambda e: e[~((e["criterion"] == "tip") & (e["fold"] == 1))],
            {},
            (
                r"^tip at budget 0\.05 and horizon 20 lacks 48 pairs of a step batch and a held-out"
                r" prompt that other cells have, the first of fold 1 and prompt 'p000' \(draw 0\)\."
            ),
        ),
        (
            lambda e: e[e["criterion"] == "full"],
            {},
            r"^The intervention table holds no selection, only full steps\.",
        ),
        (
            lambda e: e.assign(held_out=False),
            {},
            r"^The intervention table holds no held-out prompt, on which cells are compared\.",
        ),
        (
            lambda e: e,
            {"horizon": 50},
            (
                r"^The interventions hold no horizon of 50 steps; they hold 20\. Name one of these,"
                r" or intervene with --horizon 50\.$"
            ),
        ),
        (lambda e: e, {"loss": "mse"}, r"^Unknown loss 'mse'\. Known are forward_kl, "),
        (
            lambda e: e.drop(columns="reverse_kl"),
            {},
            (
                r"^Cells of the loss reverse_kl are judged by reverse_kl, which the interventions"
                r" lack; they hold forward_kl, js\."
            ),
        ),
    ],
)
def test_what_cannot_be_decided(change, options, message):
    effects = made_interventions(PLAIN, horizons=(20,))
    with pytest.raises(DiagnosticsError, match=message):
        decide(change(effects), draws=5, **options)


def test_the_horizon_is_twenty_where_there_is_one_and_the_longest_otherwise():
    for horizons, expected in (((0, 1, 20, 50), 20), ((0, 1, 5), 5), ((0,), 0)):
        table = decide(made_interventions(PLAIN, horizons=horizons, prompts=24), draws=5)
        assert set(table.loc[table["primary"], "horizon"]) == {expected}


@pytest.mark.parametrize(
    "loss, measure", [("sampled", "reverse_kl"), ("forward_kl", "forward_kl"), ("jsd", "js")]
)
def test_cells_are_judged_by_what_the_loss_lowers(loss, measure):
    table = decide(made_interventions(PLAIN, prompts=24), loss=loss, draws=5)
    assert set(table.loc[table["primary"], "measure"]) == {measure}


def estimate(value, *, prompts=40, prompt_error=0.01, steps=4, step_error=0.01):
    """A difference whose two parts of the error are given."""
    without = np.array([1.0, -1.0, *np.zeros(steps - 2)]) if steps > 1 else None
    left_out = np.array([1.0, -1.0, *np.zeros(prompts - 2)])
    made = CellEstimate(
        value,
        np.full(9, value),
        100,
        prompts,
        left_out=value + left_out * prompt_error / np.sqrt(2 * (prompts - 1) / prompts),
        without_step=None
        if without is None
        else value + without * step_error / np.sqrt(2 * (steps - 1) / steps),
    )
    assert made.prompt_error == pytest.approx(prompt_error)
    return made


def test_the_smallest_detectable_difference_is_seen_four_times_in_five():
    """The power of a test with the design's degrees of freedom, against a simulation."""
    design = estimate(0.0)
    delta = smallest_detectable(design, level=0.95)
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 0.01 * np.sqrt(40), (20_000, 40))
    batches = rng.normal(0, 0.01 * np.sqrt(4), (20_000, 4))
    value = delta + prompts.mean(axis=1) + batches.mean(axis=1)
    parts = prompts.var(axis=1, ddof=1) / 40, batches.var(axis=1, ddof=1) / 4
    freedom = (parts[0] + parts[1]) ** 2 / (parts[0] ** 2 / 39 + parts[1] ** 2 / 3)
    seen = np.abs(value) / np.sqrt(parts[0] + parts[1]) > stats.t.ppf(0.975, freedom)
    print(f"power at the smallest detectable difference: {seen.mean():.3f}")
    assert seen.mean() == pytest.approx(0.8, abs=0.03)


def power_at(delta, prompts, steps, prompt_variance, step_variance):
    """Exact power of the test with known degrees of freedom, from the noncentral t."""
    parts = prompt_variance / prompts, step_variance / steps
    error = np.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (prompts - 1) + parts[1] ** 2 / (steps - 1))
    return stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, delta / error)


def test_designs_that_are_needed_have_the_power():
    design = needed(estimate(0.03), level=0.95)
    of_prompts, of_steps = 0.01**2 * 40, 0.01**2 * 4
    assert design.prompts == 10 * design.steps
    assert power_at(0.03, design.prompts, design.steps, of_prompts, of_steps) > 0.77
    assert power_at(0.03, design.prompts - 10, design.steps - 1, of_prompts, of_steps) < 0.8
    alone = needed(estimate(0.06), level=0.95).prompts_alone
    assert power_at(0.06, alone, 4, of_prompts, of_steps) > 0.75
    assert power_at(0.06, alone - 1, 4, of_prompts, of_steps) < 0.8


def test_a_design_is_the_smallest_of_all_that_suffice():
    made = estimate(0.05)
    of_prompts, of_steps = 0.01**2 * 40, 0.01**2 * 4

    def suffices(prompts, steps):
        variances = np.array([of_prompts / prompts, of_steps / steps])
        freedom = variances.sum() ** 2 / (variances**2 / [prompts - 1, steps - 1]).sum()
        reach = stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)
        return reach * np.sqrt(variances.sum()) <= 0.05

    found = needed(made, level=0.95)
    assert found.prompts_alone == next(n for n in range(2, 10**5) if suffices(n, 4))
    assert found.steps == next(n for n in range(2, 1000) if suffices(10 * n, n))


def test_what_no_design_can_show():
    no_number = needed(estimate(0.03, step_error=0.02), level=0.95)
    assert no_number.prompts_alone == np.inf and np.isfinite(no_number.prompts)
    nothing = needed(estimate(1e-9), level=0.95)
    assert nothing.prompts == nothing.steps == np.inf
    one = needed(estimate(0.03, steps=1), level=0.95)
    assert np.isnan([one.prompts, one.steps]).all() and 2 < one.prompts_alone < LARGEST_DESIGN
    still = CellEstimate(0.1, np.full(9, 0.1), 5, 10)
    assert np.isnan(smallest_detectable(still, level=0.95))
    assert np.isnan(needed(still, level=0.95).prompts_alone)


@pytest.mark.parametrize(
    "options", [{}, {"batch": 0.03}, {"batch": 0.0, "selection": 0.02}, {"folds": 2}]
)
def test_intervals_over_random_hold_the_truth(options):
    """Prompts, step batches and selections all are drawn anew; the truth is +.04 nats."""
    truths, held, repeats = {("random", 0.05): 0.07, ("tip", 0.05): 0.11}, 0, 150
    for seed in range(repeats):
        effects = made_interventions(truths, horizons=(20,), prompts=48, seed=seed, **options)
        found = CellEffects(effects, draws=100, seed=seed)
        over = found.effect(CELL, "reverse_kl") - found.effect(RANDOM, "reverse_kl")
        low, high = over.interval()
        held += low <= 0.04 <= high
    print(f"coverage with {options}: {held / repeats:.3f}")
    assert held / repeats >= 0.87


def test_compare_writes_the_decision_where_there_are_interventions(tmp_path, monkeypatch):
    for name in ("agreement", "answers"):  # of captured gains; they are tested elsewhere
        monkeypatch.setattr(rank_agreement, name, lambda *_, **__: pd.DataFrame())
    tokens, effects = made_tokens(prompts=24), made_interventions(PLAIN, prompts=24)
    options = {"seed": 0, "analysis": AnalysisConfig(draws=20)}
    criteria = ComparisonConfig(criteria=("divergence",))

    with open_run(tmp_path) as run:

        def made(stage, table, name, **settings):
            run.stage(
                stage,
                settings=settings,
                outputs=[name],
                work=lambda: table.to_parquet(run.path(name), index=False),
            )

        made("probe", tokens, "tokens.parquet")
        compare_stage(run, criteria, **options)
        assert not (tmp_path / "tables/decision.csv").exists()
        made("intervene", effects, "interventions.parquet", loss="forward_kl")
        compare_stage(run, criteria, **options)
    table = read_csv(tmp_path / "tables/decision.csv")
    expected = decide(effects, loss="forward_kl", draws=20)
    assert list(table) == COLUMNS
    same = ["criterion", "measure", "primary", "over_random", "p_holm", "recommended"]
    pd.testing.assert_frame_equal(table[same], expected[same])
    assert set(table.loc[table["primary"], "measure"]) == {"forward_kl"}
