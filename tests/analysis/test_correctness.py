"""Right and wrong responses: every statistic against a loop, and when there is a verdict."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.correctness import COLUMNS, DIFFERENCE, by_correctness, is_judged
from diagnostics.analysis.decision import decide
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import score_criterion, select
from tests.effect_tables import made_interventions
from tests.made_tokens import made_tokens

NAN = float("nan")


def judged(prompts=12, *, seed=0, share=0.5, lift=0.0, **how):
    """Made tokens whose contexts are right with a chance; right ones gain `lift` nats more."""
    tokens = made_tokens(prompts, seed=seed, **how)
    names = tokens.context_id.unique()
    right = np.random.default_rng(seed + 1).random(len(names)) < share
    right[:2] = True, False
    correct = tokens.context_id.map(dict(zip(names, right.astype(float), strict=True)))
    gains = [name for name in tokens if name.startswith(("gain", "own_gain", "context_gain"))]
    lifted = {name: tokens[name] + lift * correct for name in gains}
    return tokens.assign(correct=correct, **lifted)


def row(table, **where):
    found = table
    for name, value in where.items():
        found = found[found[name] == value]
    assert len(found) == 1, where
    return found.iloc[0]


def test_by_hand():
    """Two prompts with two positions each; margin chooses the first position of either.

    Right: gains 4 and 1, of which 4 is selected; wrong: 2 and 2, of which one 2 is selected.
    """
    tokens = pd.DataFrame(
        {
            "context_id": ["a", "a", "b", "b"],
            "prompt_id": ["a", "a", "b", "b"],
            "position": [0, 1, 0, 1],
            "response_length": 2,
            "token_id": 1,
            "token": "t",
            "student_margin": [0.1, 0.9, 0.2, 0.8],
            "gain": [4.0, 1.0, 2.0, 2.0],
            "advantage": [-1.0, 0.0, 3.0, 1.0],
            "correct": [1.0, 1.0, 0.0, 0.0],
        }
    )
    table = by_correctness(tokens, criteria=["margin"], budgets=[0.5], draws=20)
    at = {"criterion": "margin", "budget": 0.5}
    expected = {
        ("selected_share", "positions"): (0.5, 0.5),
        ("mean", "gain"): (4, 2),
        ("mean", "advantage"): (-1, 3),
    }
    for (statistic, measure), (right, wrong) in expected.items():
        here = {**at, "statistic": statistic, "measure": measure}
        assert row(table, **here, rollouts="right").estimate == pytest.approx(right)
        assert row(table, **here, rollouts="wrong").estimate == pytest.approx(wrong)
        assert row(table, **here, rollouts=DIFFERENCE).estimate == pytest.approx(right - wrong)
    full = row(table, criterion="full", statistic="mean", measure="gain", rollouts="right")
    assert full.estimate == 2.5 and full.positions == 2 and full.prompts == 1
    assert list(table.columns) == COLUMNS


@pytest.mark.parametrize("folds", [0, 3])
def test_every_statistic_equals_its_loop(folds):
    tokens = judged(30, seed=2, folds=folds, split=False, lift=0.1)
    tokens.loc[tokens.context_id == "c5", "correct"] = NAN
    names = ["teachability", "margin"] if "student_margin" in tokens else ["teachability", "tip"]
    table = by_correctness(tokens, criteria=names, budgets=[0.1, 0.3], draws=30)
    assert (table.split == ("held_out" if folds else "all")).all()
    for name in names:
        score = None
        for budget in (0.1, 0.3):
            chosen = select(tokens, name, budget=budget)
            for rollouts, value in (("right", 1), ("wrong", 0)):
                side = (tokens.correct == value).to_numpy()
                part = tokens[side & chosen]
                at = {"criterion": name, "budget": budget, "rollouts": rollouts}
                found = row(table, **at, statistic="selected_share")
                assert found.estimate == pytest.approx((side & chosen).sum() / side.sum())
                assert found.prompts == tokens.prompt_id[side].nunique()
                assert found.positions == side.sum()
                for measure in ("gain", "context_gain", "advantage"):
                    found = row(table, **at, statistic="mean", measure=measure)
                    assert found.estimate == pytest.approx(part[measure].mean())
                found = row(table, **at, statistic="captured_share")
                share = part.gain.sum() / tokens.gain[side].sum()
                assert np.isnan(found.estimate) or found.estimate == pytest.approx(share)
                if score is None:
                    score = pd.Series(score_criterion(tokens, name))
                own = row(
                    table,
                    criterion=name,
                    statistic="spearman",
                    measure="gain",
                    rollouts=rollouts,
                )
                expected = score[side].rank().corr(tokens.gain.reset_index(drop=True)[side].rank())
                assert own.estimate == pytest.approx(expected)
    assert (table.steps == (folds or 1)).all()


def test_the_captured_share_is_there_where_totals_are_told_apart_from_0():
    tokens = judged(40, seed=1, lift=0.3, noise=0.05, folds=0, split=False)
    table = by_correctness(tokens, criteria=["tip"], budgets=[0.2], draws=40)
    for rollouts, value in (("right", 1), ("wrong", 0)):
        side = (tokens.correct == value).to_numpy()
        chosen = select(tokens, "tip", budget=0.2)
        share = tokens.gain[side & chosen].sum() / tokens.gain[side].sum()
        found = row(table, criterion="tip", statistic="captured_share", rollouts=rollouts)
        assert found.estimate == pytest.approx(share)
    nothing = tokens.assign(gain=np.where(tokens.correct == 1, tokens.gain, -tokens.gain))
    table = by_correctness(nothing, criteria=["tip"], budgets=[0.2], draws=40)
    shares = table[table.statistic == "captured_share"].set_index(["criterion", "rollouts"])
    assert np.isnan(shares.estimate["tip", "wrong"]) and np.isnan(
        shares.estimate["tip", DIFFERENCE]
    )
    assert shares.estimate["tip", "right"] > 0 and shares.higher["tip", DIFFERENCE] == ""


def test_a_clear_difference_is_told_and_turns_over_with_the_sides():
    tokens = judged(80, seed=3, lift=1.0, folds=0, split=False)
    here = {"criterion": "full", "statistic": "mean", "measure": "gain", "rollouts": DIFFERENCE}
    found = row(by_correctness(tokens, criteria=["tip"], draws=80), **here)
    assert found.higher == "right" and found.low > 0.5 and found.p_holm < 1e-3
    swapped = tokens.assign(correct=1 - tokens.correct)
    other = row(by_correctness(swapped, criteria=["tip"], draws=80), **here)
    assert other.higher == "wrong" and other.estimate == pytest.approx(-found.estimate)


def test_without_a_difference_few_are_told_apart():
    """Of 20 tables whose sides are drawn by lot, about one shows a difference."""
    told = 0
    for seed in range(20):
        tokens = judged(50, seed=seed, folds=0, split=False)
        table = by_correctness(tokens, criteria=["tip"], budgets=[0.2], draws=40)
        own = table[(table.statistic == "mean") & (table.measure == "gain")]
        told += (own.higher.isin(["right", "wrong"])).any()
    assert told <= 4


def test_below_20_prompts_a_side_there_is_no_verdict():
    tokens = judged(30, seed=3, lift=3.0, folds=0, split=False)
    table = by_correctness(tokens, criteria=["tip"], draws=40)
    sides = tokens.groupby("prompt_id").correct.first()
    counts = [int((sides == value).sum()) for value in (1, 0)]
    assert min(counts) < 20
    differences = table[table.rollouts == DIFFERENCE]
    assert (differences.higher == "").all() and differences.p_holm.isna().all()
    few = " and ".join(
        f"{count} prompts with a {name} response"
        for name, count in zip(("right", "wrong"), counts)
        if count < 20
    )
    assert set(differences.reason) == {f"{few}: fewer than 20"}
    assert (table[table.rollouts != DIFFERENCE].reason == "").all()


def test_a_constant_and_a_tied_selection_carry_no_verdict():
    tokens = judged(80, seed=3, lift=1.0, folds=0, split=False).assign(
        student_top1_in_teacher_top5=True
    )
    table = by_correctness(tokens, criteria=["selectkd"], budgets=[0.2], draws=40)
    whole = row(table, criterion="full", statistic="selected_share", rollouts=DIFFERENCE)
    assert whole.estimate == 0 and whole.higher == ""
    assert whole.reason == "undefined, or without a width"
    tied = table[(table.criterion == "selectkd") & (table.budget == 0.2)]
    tied = tied[tied.rollouts == DIFFERENCE]
    assert (tied.ambiguous > 0.1).all() and (tied.reason == "ties decide the selection").all()


def test_a_prompt_with_both_kinds_counts_on_both_sides():
    tokens = judged(24, seed=4, folds=0, split=False)
    tokens["prompt_id"] = "p" + (tokens.prompt_id.str[1:].astype(int) // 2).astype(str)
    table = by_correctness(tokens, criteria=["tip"], budgets=[0.2], draws=30)
    counts = {value: tokens.prompt_id[tokens.correct == value].nunique() for value in (0.0, 1.0)}
    assert counts[0] + counts[1] > tokens.prompt_id.nunique()
    found = row(table, criterion="full", statistic="selected_share", rollouts=DIFFERENCE)
    assert found.prompts == min(counts.values())


def test_tables_without_both_kinds_are_refused():
    tokens = judged(6)
    assert is_judged(tokens) and not is_judged(tokens.drop(columns="correct"))
    assert not is_judged(tokens.drop(columns="gain"))
    alike = tokens.assign(correct=1.0)
    assert not is_judged(alike)
    with pytest.raises(DiagnosticsError) as caught:
        by_correctness(alike)
    assert str(caught.value) == (
        f"The table's {len(alike)} judged positions are all of one kind of response. The comparison"
        " needs right and wrong ones: judge more responses, with --verifier or the column"
        " `correct`."
    )
    with pytest.raises(DiagnosticsError, match="needs the column correct"):
        by_correctness(tokens.drop(columns="correct"))


def test_the_decision_reads_the_token_tables_own_form_of_the_verdict():
    """1, 0 and NaN as floats, as the column of a token table has them."""
    truths = {("random", 0.1): 0.1, ("tip", 0.1): 0.2}
    effects = made_interventions(truths, correct=True, horizons=(20,))
    numbers = effects.assign(correct=effects.correct.astype(float))
    expected, found = decide(effects, draws=40), decide(numbers, draws=40)
    pd.testing.assert_frame_equal(found, expected)
    unknown = numbers.assign(correct=numbers.correct.where(numbers.prompt_id > "p005"))
    kinds = decide(unknown, draws=40).groupby("rollouts").prompts.max()
    whole = expected.groupby("rollouts").prompts.max()
    assert kinds["all"] == whole["all"] and kinds["right"] < whole["right"]
