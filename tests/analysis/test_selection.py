import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import criteria
from diagnostics.analysis import selection
from diagnostics.analysis.selection import (
    ALL_OUTCOMES,
    compare,
    parts,
    profile_measures,
    selection_curves,
    selection_overlap,
    selection_profile,
    selection_summary,
    token_type,
)
from diagnostics.core.errors import DiagnosticsError
from tests.study_tables import tokens as study_tokens

NAMES = ["divergence", "teachability", "entropy", "compatibility"]


def hand_table():
    """Five positions of two prompts; |A| ranks them 4, 0, 2, 1, 3 and the gains sum to 10."""
    return pd.DataFrame(
        {
            "context_id": ["a", "a", "a", "b", "b"],
            "prompt_id": ["a", "a", "a", "b", "b"],
            "position": [0, 1, 2, 0, 1],
            "response_length": [3, 3, 3, 2, 2],
            "token": ["The", " 12", ",", "\n", "x1"],
            "is_special": [False] * 5,
            "advantage": [-4.0, 2.0, 3.0, -1.0, 5.0],
            "gain": [2.0, -1.0, 6.0, 0.0, 3.0],
        }
    )


def table(prompts=14, seed=3):
    tokens = study_tokens(prompts=prompts, seed=seed)
    tokens["gain"] += 0.02
    return tokens


def rows(frame, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame.reset_index(drop=True)


def test_curves_by_hand():
    found = selection_curves(
        hand_table(),
        criteria=["advantage_abs"],
        outcomes=["gain", "positive_gain"],
        budgets=[0.2, 0.4, 0.6, 0.8, 1.0],
        draws=20,
    )
    gain = rows(found, outcome="gain", criterion="advantage_abs")
    np.testing.assert_allclose(gain.captured_share, [0.3, 0.5, 1.1, 1.0, 1.0])
    np.testing.assert_allclose(gain.oracle, [0.6, 0.9, 1.1, 1.1, 1.0])
    np.testing.assert_allclose(gain.random, [0.2, 0.4, 0.6, 0.8, 1.0])
    assert (
        gain.selected.tolist() == [1, 2, 3, 4, 5]
        and (gain.positions == 5).all()
        and (gain.prompts == 2).all()
    )
    positive = rows(found, outcome="positive_gain", criterion="advantage_abs")
    np.testing.assert_allclose(positive.captured_share, np.array([3, 5, 11, 11, 11]) / 11)


def test_summary_by_hand():
    """Heights (5 - rank + 1/2)/5 are .9 .7 .5 .3 .1; best first the gains are 3 2 6 -1 0, the
    oracle's 6 3 2 0 -1.
    """
    found = selection_summary(
        hand_table(), criteria=["advantage_abs"], outcomes=["gain"], budgets=[0.4], draws=20
    )
    area = np.dot([3, 2, 6, -1, 0], [0.4, 0.2, 0, -0.2, -0.4]) / np.dot(
        [6, 3, 2, 0, -1], [0.4, 0.2, 0, -0.2, -0.4]
    )
    assert rows(found, statistic="area").estimate.item() == pytest.approx(area)
    assert rows(found, statistic="enrichment").estimate.item() == pytest.approx(0.5 / 0.4)
    assert (
        rows(found, statistic="area").baseline.item() == 0
        and rows(found, statistic="enrichment").baseline.item() == 1
    )


def test_masks_are_those_of_select():
    tokens = table()
    found = selection_curves(tokens, criteria=NAMES, budgets=[0.013, 0.1, 0.55], draws=5)
    for name in NAMES:
        for budget in (0.013, 0.1, 0.55):
            mask = criteria.select(tokens, name, budget=budget)
            row = rows(found, outcome="gain", criterion=name, split="all", budget=budget)
            assert row.captured_share.item() == pytest.approx(
                tokens.gain[mask].sum() / tokens.gain.sum()
            )
            assert row.selected.item() == mask.sum()


def test_a_split_has_its_own_budget_and_the_tables_normalisation():
    tokens = table()
    found = selection_curves(
        tokens, criteria=["teachability"], outcomes=["gain"], budgets=[0.2], draws=5
    )
    score = criteria.score_criterion(tokens, "teachability")
    for split in ("step", "held_out"):
        here = (tokens.split == split).to_numpy()
        mask = criteria.select(tokens[here], score[here], budget=0.2)
        row = rows(found, criterion="teachability", split=split)
        assert row.captured_share.item() == pytest.approx(
            tokens.gain[here][mask].sum() / tokens.gain[here].sum()
        )
        assert row.prompts.item() == tokens.prompt_id[here].nunique()


def resampled(tokens, statistic, weights, names):
    """A statistic of the rows of each draw, every row repeated as often as the draw takes its
    prompt.
    """
    place = {name: i for i, name in enumerate(names)}
    times = tokens.prompt_id.map(place).to_numpy()
    return [statistic(np.repeat(np.arange(len(tokens)), w[times].astype(int))) for w in weights]


def test_draws_are_those_of_a_plain_resampling():
    tokens = table(prompts=6)
    part = next(
        parts(
            tokens,
            criteria=["divergence"],
            outcomes=["gain", "relative_gain"],
            budgets=[0.1, 0.4],
            draws=8,
            seed=1,
        )
    )
    choice, weights, names = part.choices["divergence"], part.prompts.weights, part.prompts.names
    score = criteria.score_criterion(tokens, "divergence")
    oracle = pd.Series(-tokens.gain).rank(method="first").to_numpy()
    rank = np.empty(len(tokens))
    rank[criteria.ranking(tokens, score)] = np.arange(1, len(tokens) + 1)
    height, best = ((len(tokens) - r + 0.5) / len(tokens) for r in (rank, oracle))
    for outcome in ("gain", "relative_gain"):
        value = tokens[outcome].fillna(0).to_numpy()
        for b, budget in enumerate((0.1, 0.4)):
            mask = criteria.select(tokens, score, budget=budget)
            expected = resampled(
                tokens, lambda at: value[at][mask[at]].sum() / value[at].sum(), weights, names
            )
            np.testing.assert_allclose(part.shares(choice, outcome)[b].draws, expected)
            expected = resampled(
                tokens,
                lambda at: value[at][mask[at]].sum() / value[at].sum() / mask[at].mean(),
                weights,
                names,
            )
            np.testing.assert_allclose(part.enrichments(choice, outcome)[b].draws, expected)
    gain = tokens.gain.to_numpy()
    expected = resampled(
        tokens,
        lambda at: (gain[at] * (height[at] - 0.5)).sum() / (gain[at] * (best[at] - 0.5)).sum(),
        weights,
        names,
    )
    np.testing.assert_allclose(part.area(choice, "gain").draws, expected)
    assert part.area(choice, "gain").left_out[0] != part.area(choice, "gain").left_out[1]


def test_area_is_the_integral_of_the_curve():
    tokens = table()
    count = len(tokens)
    budgets = [(k + 1) / count for k in range(count)]
    part = next(
        parts(tokens, criteria=["teachability"], outcomes=["gain"], budgets=budgets, draws=2)
    )
    curves = [
        [0.0, *(e.value for e in part.shares(choice, "gain"))]
        for choice in (part.choices["teachability"], part.oracles["gain"])
    ]
    areas = [np.trapezoid(curve, dx=1 / count) - 0.5 for curve in curves]
    assert part.area(part.choices["teachability"], "gain").value == pytest.approx(
        areas[0] / areas[1]
    )


def test_invariants():
    tokens = table()
    found = selection_curves(tokens, draws=20)
    assert {"random", "teachability", "tip"} <= set(found.criterion) and "full" not in set(
        found.criterion
    )
    full = found[(found.budget == 1) & (found.selected == found.positions)]
    np.testing.assert_allclose(full.captured_share, 1)
    assert (found.captured_share <= found.oracle + 1e-9).all()
    assert (found.random_low <= found.random_high).all()
    summary = selection_summary(tokens, draws=20)
    area = rows(summary, statistic="area")
    ranked = area[area.criterion != "q3_teachability"]
    assert ranked.estimate.between(-1, 1).all() and (area.behind_best <= 0).all()


def test_the_outcome_itself_is_the_oracle():
    tokens = table()
    tokens["acceptance"] = tokens.gain.rank()
    found = selection_summary(
        tokens, criteria=["acceptance", "entropy"], outcomes=["gain"], draws=50
    )
    area = rows(found, statistic="area", split="all").set_index("criterion")
    assert (
        area.estimate["acceptance"] == pytest.approx(1) and area.best.tolist() == ["acceptance"] * 2
    )
    assert area.behind_best["acceptance"] == 0 and np.isnan(area.behind_best_low["acceptance"])
    assert area.behind_best["entropy"] == pytest.approx(area.estimate["entropy"] - 1)
    assert area.behind_best_high["entropy"] < 0
    tokens["acceptance"] = -tokens.acceptance
    assert (
        selection_summary(tokens, criteria=["acceptance"], outcomes=["gain"], draws=5).estimate[0]
        < -0.2
    )


def test_random_band_holds_random_selections():
    tokens = table(prompts=30)
    found = rows(
        selection_curves(
            tokens, criteria=["entropy"], outcomes=["gain"], budgets=[0.1, 0.5], draws=5
        ),
        criterion="random",
        split="all",
    )
    assert (found.captured_share == found.random).all() and (found.low == found.random_low).all()
    inside = 0
    for seed in range(100):
        mask = criteria.select(tokens, "random", budget=0.1, seed=seed + 1000)
        inside += found.low[0] <= tokens.gain[mask].sum() / tokens.gain.sum() <= found.high[0]
    assert 85 <= inside <= 100


def test_a_total_that_is_not_positive_has_no_share(caplog):
    tokens = table()
    tokens["gain"] -= 2 * tokens.gain.mean()
    found = selection_curves(
        tokens,
        criteria=["divergence"],
        outcomes=["gain", "positive_gain"],
        budgets=[0.1, 1.0],
        draws=20,
    )
    gain = rows(found, outcome="gain", criterion="divergence")
    assert (
        gain[["captured_share", "low", "high", "oracle", "random_low"]].isna().all(axis=None)
        and gain.random.notna().all()
    )
    assert rows(found, outcome="positive_gain").captured_share.notna().all()
    total = tokens.gain.sum()
    assert (
        f"gain sums to {total:.3g} over the all positions: shares of it are undefined (NaN)"
        in caplog.text
    )
    area = rows(
        selection_summary(tokens, criteria=["divergence"], outcomes=["gain"], draws=20),
        statistic="area",
        split="all",
    )
    assert np.isfinite(area.estimate).all()
    assert (
        rows(
            selection_summary(tokens, criteria=["divergence"], outcomes=["gain"], draws=20),
            statistic="enrichment",
        )
        .estimate.isna()
        .all()
    )


def test_undefined_outcomes_capture_nothing_but_take_room():
    tokens = table()
    undefined = tokens.forward_kl < tokens.forward_kl.median()
    tokens.loc[undefined, "relative_gain"] = np.nan
    found = rows(
        selection_curves(
            tokens, criteria=["entropy"], outcomes=["relative_gain"], budgets=[0.3], draws=5
        ),
        criterion="entropy",
        split="all",
    )
    mask = criteria.select(tokens, "entropy", budget=0.3)
    assert found.captured_share.item() == pytest.approx(
        tokens.relative_gain[mask].sum() / tokens.relative_gain.sum()
    )
    assert (
        found.positions.item() == tokens.relative_gain.notna().sum() < len(tokens)
        and found.selected.item() == mask.sum()
    )


def test_undefined_scores_are_never_selected():
    found = selection_curves(
        table(), criteria=["q3_teachability"], outcomes=["gain"], budgets=[0.01, 1.0], draws=5
    )
    own = rows(found, criterion="q3_teachability", split="all")
    assert (
        own.selected[0] == np.ceil(0.01 * own.positions[0])
        and own.selected[1] == (criteria.quadrants(table()) == 3).sum() < own.positions[1]
    )
    assert own.captured_share[1] < 1


def test_a_cut_through_ties_is_shown():
    tokens = hand_table().assign(advantage=[1.0, 1.0, 2.0, 1.0, 0.5])
    found = rows(
        selection_curves(
            tokens,
            criteria=["advantage_abs"],
            outcomes=["gain"],
            budgets=[0.2, 0.4, 0.6, 0.8],
            draws=2,
        ),
        criterion="advantage_abs",
    )
    assert found.tied.tolist() == [0, 3, 3, 0]


def test_lift_is_for_step_positions():
    tokens = table()
    tokens["lift"] = np.where(tokens.split == "step", 1.0, np.nan)
    found = selection_curves(
        tokens, criteria=["entropy"], outcomes=ALL_OUTCOMES, budgets=[0.5], draws=5
    )
    assert set(rows(found, outcome="lift").split) == {"step"} and set(
        rows(found, outcome="gain").split
    ) == {"all", "step", "held_out"}
    assert "first_order_gain" not in set(found.outcome)


def test_one_prompt_has_no_interval():
    found = selection_curves(
        hand_table().assign(prompt_id="a"),
        criteria=["advantage_abs"],
        outcomes=["gain"],
        budgets=[0.4],
        draws=10,
    )
    own = rows(found, criterion="advantage_abs")
    assert own.captured_share.item() == 0.5 and own.low.isna().all()


def test_overlap_by_hand_and_by_scipy():
    tokens = table()
    found = selection_overlap(
        tokens, criteria=["divergence", "entropy"], budgets=[0.1, 0.3], draws=30
    )
    a, b = (criteria.select(tokens, name, budget=0.1) for name in ("divergence", "entropy"))
    row = rows(found, statistic="jaccard", budget=0.1)
    assert (
        row.estimate.item() == pytest.approx((a & b).sum() / (a | b).sum())
        and row.low.item() < row.estimate.item() < row.high.item()
    )
    k, n = a.sum(), len(tokens)
    assert row.chance.item() == pytest.approx((k * k / n) / (2 * k - k * k / n))
    scores = [criteria.score_criterion(tokens, name) for name in ("divergence", "entropy")]
    assert rows(found, statistic="spearman").estimate.item() == pytest.approx(
        stats.spearmanr(*scores).statistic, abs=1e-10
    )
    assert len(found) == 3


def test_a_criterion_overlaps_with_itself_wholly():
    found = selection_overlap(
        table(), criteria=["teachability", "dlearn_high"], budgets=[0.05, 1.0], draws=10
    )
    np.testing.assert_allclose(found.estimate, 1)


def test_jaccard_draws_are_those_of_a_plain_resampling():
    tokens = table(prompts=6)
    part = selection.whole(tokens, ["divergence", "entropy"], [0.2], draws=8, seed=2)
    ((estimate, _),) = selection._jaccards(part, "divergence", "entropy")
    a, b = (criteria.select(tokens, name, budget=0.2) for name in ("divergence", "entropy"))
    expected = resampled(
        tokens,
        lambda at: (a & b)[at].sum() / (a | b)[at].sum(),
        part.prompts.weights,
        part.prompts.names,
    )
    np.testing.assert_allclose(estimate.draws, expected)


@pytest.mark.parametrize(
    "text, kind",
    [
        (" the", "word"),
        ("x1", "word"),
        ("été", "word"),
        ("42", "number"),
        (" 3.5", "number"),
        ("½", "punctuation"),
        (",", "punctuation"),
        ("\n", "punctuation"),
        ("", "punctuation"),
        ("中", "word"),
        ("$", "punctuation"),
    ],
)
def test_token_types(text, kind):
    frame = pd.DataFrame({"token": [text, text], "is_special": [False, True]})
    assert token_type(frame).tolist() == [kind, "special"]
    assert token_type(frame[["token"]]).tolist() == [kind, kind]


def test_profile_is_means_over_the_selection():
    tokens = table()
    tokens["is_special"] = tokens.token_id % 7 == 0
    tokens.loc[3, "compatibility"] = np.nan
    found = selection_profile(tokens, criteria=["divergence", "early"], budgets=[0.1], draws=30)
    quadrant, kind = criteria.quadrants(tokens), token_type(tokens)
    assert set(found.measure) == {
        "q1",
        "q2",
        "q3",
        "q4",
        "word",
        "number",
        "punctuation",
        "special",
        "relative_position",
        "forward_kl",
        "student_entropy",
        "compatibility",
    }
    for name in ("divergence", "early"):
        mask = criteria.select(tokens, name, budget=0.1)
        own = rows(found, criterion=name).set_index("measure")
        assert own.estimate["q3"] == pytest.approx((quadrant[mask] == 3).mean()) and own.full[
            "q3"
        ] == pytest.approx((quadrant == 3).mean())
        assert own.estimate["special"] == pytest.approx((kind[mask] == "special").mean())
        assert own.estimate["compatibility"] == pytest.approx(tokens.compatibility[mask].mean())
        assert own.minus_full["forward_kl"] == pytest.approx(
            tokens.forward_kl[mask].mean() - tokens.forward_kl.mean()
        )
        assert (
            own.minus_full_low["forward_kl"]
            < own.minus_full["forward_kl"]
            < own.minus_full_high["forward_kl"]
        )
        assert (own.positions == mask.sum()).all()
        assert own.estimate[["q1", "q2", "q3", "q4"]].sum() == pytest.approx(1)
    assert rows(found, criterion="early").set_index("measure").estimate["relative_position"] < 0.1


def test_measures_are_what_the_columns_allow():
    assert set(profile_measures(hand_table())) == {
        "word",
        "number",
        "punctuation",
        "special",
        "relative_position",
    }
    assert set(profile_measures(hand_table()[["gain"]])) == set()


def test_same_seed_same_tables():
    one, two, other = (compare(table(), criteria=NAMES, draws=30, seed=seed) for seed in (0, 0, 1))
    assert set(one) == {
        "selection_curves",
        "selection_summary",
        "selection_overlap",
        "selection_profile",
    }
    for name in one:
        pd.testing.assert_frame_equal(one[name], two[name])
    assert not one["selection_curves"].low.equals(other["selection_curves"].low)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (
            hand_table().drop(columns="gain"),
            {},
            (
                r"^The comparison needs an outcome, one of gain, relative_gain, positive_gain; the"
                r" table has context_id, .*\. Run the probe on it first\.$"
            ),
        ),
        (
            hand_table(),
            {"budgets": [0.0]},
            r"^A budget is a share of positions in \(0, 1\]; got 0\.0\.$",
        ),
        (
            hand_table(),
            {"criteria": ["teachability"]},
            r"^Criterion 'teachability' needs the columns forward_kl, compatibility; this one has ",
        ),
        (
            hand_table(),
            {"criteria": ["nice"]},
            r"^Unknown criterion 'nice'\. Known are full, random, ",
        ),
        (
            hand_table().drop(columns="prompt_id"),
            {},
            r"^The comparison needs the column prompt_id; this one has ",
        ),
    ],
)
def test_what_cannot_be_compared(tokens, options, message):
    with pytest.raises(DiagnosticsError, match=message):
        selection_curves(tokens, draws=2, **{"criteria": ["advantage_abs"]} | options)


def test_needs_no_torch():
    code = (
        "import sys, diagnostics as dx; dx.selection_curves, dx.agreement; print('torch' in"
        " sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


def test_the_page_lists_every_criterion():
    page = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text(encoding="utf-8")
    listed = criteria.list_criteria()
    for name, row in listed[~listed.mine].iterrows():
        assert f"| `{name}` |" in page, name
        assert all(f"`{alias}`" in page for alias in row["aliases"].split(", ") if alias), name
    assert "`ier`" in page and "`s2d`" in page
