"""Captured shares, areas, overlaps and profiles against plain selections."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import criteria
from diagnostics.analysis import selection
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.selection import (
    ALL_OUTCOMES,
    CAPTURED_OUTCOMES,
    compare,
    populations,
    profile_measures,
    selection_curves,
    selection_overlap,
    selection_profile,
    selection_summary,
    token_type,
    whole_table,
)
from diagnostics.analysis.selection_draws import Rules, selection_sums
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
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


def whole(tokens):
    """The table without a split: one population, `all`."""
    return tokens.drop(columns="split")


def test_masks_are_those_of_select():
    tokens = whole(table())
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
    score, raw = criteria.score_pairs(tokens, "teachability")
    for split in ("step", "held_out"):
        here = (tokens.split == split).to_numpy()
        mask = criteria.select(tokens[here], score[here], raw=raw[here], budget=0.2)
        row = rows(found, criterion="teachability", split=split)
        assert row.captured_share.item() == pytest.approx(
            tokens.gain[here][mask].sum() / tokens.gain[here].sum()
        )
        assert row.prompts.item() == tokens.prompt_id[here].nunique()


def drawn(tokens, prompts, draws):
    """The rows of each draw, every row as often as the draw takes its prompt."""
    place = {name: i for i, name in enumerate(prompts.names)}
    times = tokens.prompt_id.map(place).to_numpy()
    for weights in prompts.weights[:draws]:
        yield tokens.loc[np.repeat(tokens.index, weights[times].astype(int))].reset_index(drop=True)


@pytest.mark.parametrize(
    "name", ["divergence", "teachability", "tip", "entropy", "q3_teachability"]
)
@pytest.mark.parametrize("ties", ["raw", "position"])
def test_every_draw_selects_anew_as_a_plain_resampling_does(name, ties):
    """Scores, ranks, masks and the oracle of a draw are those of its rows in a table."""
    tokens = whole(table(prompts=6))
    budgets, outcomes = (0.1, 0.4), ("gain", "relative_gain")
    (part,) = populations(
        tokens,
        criteria=[name],
        outcomes=outcomes,
        budgets=budgets,
        rules=Rules(ties=ties),
        bootstrap=Bootstrap(draws=8, seed=1),
    )
    found = part.estimates()
    for i, rows_ in enumerate(drawn(tokens, part.candidates.prompts, 8)):
        rank = np.argsort(np.argsort(-rows_.gain.to_numpy(), kind="stable")) + 1
        score, raw = criteria.score_pairs(rows_, name)
        order = criteria.ranking(rows_, score, raw, ties=ties)
        place = np.full(len(rows_), len(rows_) + 0.5)  # the height of a row without score is 0
        place[order] = np.arange(1, len(order) + 1)
        for outcome in outcomes:
            value = rows_[outcome].fillna(0).to_numpy()
            for budget in budgets:
                mask = criteria.select(rows_, name, budget=budget, ties=ties)
                share = value[mask].sum() / value.sum()
                key = ("all", outcome, name, budget)
                assert found["share", *key].draws[i] == pytest.approx(share)
                enrichment = share / mask.mean()
                assert found["enrichment", *key].draws[i] == pytest.approx(enrichment)
        n, gain = len(rows_), rows_.gain.to_numpy()
        areas = [(gain * ((n - r + 0.5) / n - 0.5)).sum() for r in (place, rank)]
        assert found["area", "all", "gain", name].draws[i] == pytest.approx(areas[0] / areas[1])


@pytest.mark.parametrize("scope", ["batch", "context"])
def test_a_scope_spends_its_budget_in_every_batch_or_response(scope):
    tokens = whole(table())
    given = {"scope": scope, "batch": 3}
    found = selection_curves(
        tokens, criteria=NAMES, outcomes=["gain"], budgets=[0.1, 0.4], draws=5, seed=2, **given
    )
    batch = criteria.training_batches(tokens, contexts=3, seed=2) if scope == "batch" else None
    for name in NAMES:
        for budget in (0.1, 0.4):
            mask = criteria.select(tokens, name, budget=budget, scope=scope, batch=batch)
            row = rows(found, criterion=name, budget=budget)
            assert row.selected.item() == mask.sum()
            assert row.captured_share.item() == pytest.approx(
                tokens.gain[mask].sum() / tokens.gain.sum()
            )
    random = rows(found, criterion="random", budget=0.4)
    groups = tokens.context_id if batch is None else pd.Series(batch)
    chance = groups.map(lambda g: np.ceil(0.4 * (groups == g).sum()) / (groups == g).sum())
    expected = (tokens.gain * chance).sum() / tokens.gain.sum()
    assert random.captured_share.item() == pytest.approx(expected)
    assert random.random_low.item() < expected < random.random_high.item()


def test_a_response_that_is_drawn_twice_has_two_budgets():
    tokens = whole(table(prompts=6))
    (part,) = populations(
        tokens,
        criteria=["entropy"],
        outcomes=["gain"],
        budgets=[0.3],
        rules=Rules(scope="context"),
        bootstrap=Bootstrap(draws=6),
    )
    estimate = part.estimates()["share", "all", "gain", "entropy", 0.3]
    for i, rows_ in enumerate(drawn(tokens, part.candidates.prompts, 6)):
        copy = rows_.groupby(["context_id", "position"]).cumcount()
        rows_["context_id"] = rows_.context_id + "-" + copy.astype(str)
        mask = criteria.select(rows_, "entropy", budget=0.3, scope="context")
        expected = rows_.gain[mask].sum() / rows_.gain.sum()
        assert estimate.draws[i] == pytest.approx(expected)


def clipped(tokens, share=0.6):
    """The same table, with the upper part of the entropy at one value."""
    top = tokens.student_entropy.quantile(share)
    return tokens.assign(student_entropy=np.minimum(tokens.student_entropy, top))


def _random_share(tokens, budget, seed):
    mask = criteria.select(tokens, "entropy", budget=budget, ties="random", seed=seed)
    return tokens.gain[mask].sum() / tokens.gain.sum()


def test_random_ties_average_over_the_orders_of_equals():
    tokens = clipped(whole(table()))
    given = {"criteria": ["entropy"], "outcomes": ["gain"], "budgets": [0.1, 0.3]}
    found = selection_curves(tokens, **given, ties="random", draws=20)
    own = rows(found, criterion="entropy")
    shares = np.array([[_random_share(tokens, b, s) for s in range(600)] for b in (0.1, 0.3)])
    error = shares.std(axis=1, ddof=1) / np.sqrt(600)
    assert (abs(own.captured_share - shares.mean(axis=1)) < 4 * error).all()
    np.testing.assert_allclose(own.spread, shares.std(axis=1, ddof=1), rtol=0.15)
    assert (own.ambiguous == 1).all() and (own.tied == own.tied[0]).all()
    plain = rows(selection_curves(tokens, **given, draws=20), criterion="entropy")
    assert (plain.spread == 0).all() and (plain.captured_share != own.captured_share).all()
    seeded = rows(
        selection_curves(tokens, criteria=["random_divergent"], outcomes=["gain"], draws=5),
        criterion="random_divergent",
    )
    # At a half the positions above the median are selected, and one more of an odd number.
    assert (seeded.spread[seeded.budget < 0.5] > 0).all()
    assert rows(seeded, budget=0.5).spread.item() < rows(seeded, budget=0.3).spread.item() / 10


def test_random_ties_in_a_draw_are_the_expectation_over_its_rows():
    tokens = clipped(whole(table(prompts=6)))
    (part,) = populations(
        tokens,
        criteria=["entropy"],
        outcomes=["gain"],
        budgets=[0.2],
        rules=Rules(ties="random"),
        bootstrap=Bootstrap(draws=4),
    )
    estimate = part.estimates()["share", "all", "gain", "entropy", 0.2]
    for i, rows_ in enumerate(drawn(tokens, part.candidates.prompts, 4)):
        score = criteria.score_criterion(rows_, "entropy")
        count, equal = np.ceil(0.2 * len(rows_)), score == score.max()
        assert equal.sum() > count
        expected = rows_.gain[equal].mean() * count / rows_.gain.sum()
        assert estimate.draws[i] == pytest.approx(expected)


def test_a_bank_where_every_position_is_tied():
    """Nothing is judged: everything is ambiguous, nobody is best, and random ties give random."""
    tokens = whole(table()).assign(student_entropy=1.0, forward_kl=2.0)
    given = {"criteria": ["entropy", "divergence"], "outcomes": ["gain"], "draws": 20}
    for ties in ("raw", "position", "random"):
        curves = selection_curves(tokens, budgets=[0.1, 0.5], ties=ties, **given)
        own = curves[curves.criterion != "random"]
        assert (own.ambiguous == 1).all() and (own.tied == len(tokens)).all()
        summary = selection_summary(tokens, budgets=[0.1, 0.5], ties=ties, **given)
        enriched = rows(summary, statistic="enrichment")
        assert enriched.best.isna().all() and enriched.behind_best.isna().all()
    np.testing.assert_allclose(own.captured_share, own.random)
    assert (abs(rows(summary, statistic="area").estimate) < 1e-9).all()
    overlap = selection_overlap(
        tokens, criteria=["entropy", "divergence"], budgets=[0.1], ties="random", draws=5
    )
    jaccard = rows(overlap, statistic="jaccard")
    assert jaccard.ambiguous.item() == 1
    assert jaccard.estimate.item() == pytest.approx(jaccard.chance.item())
    profile = selection_profile(tokens, criteria=["entropy"], budgets=[0.1], draws=5)
    assert (profile.ambiguous == 1).all()


def test_a_cell_that_ties_decide_is_never_best():
    tokens = clipped(whole(table()))
    tokens["gain"] = tokens.student_entropy + 0.01 * tokens.gain
    summary = selection_summary(
        tokens, criteria=["entropy", "divergence"], outcomes=["gain"], budgets=[0.1], draws=20
    )
    enriched = rows(summary, statistic="enrichment").set_index("criterion")
    assert enriched.estimate["entropy"] > enriched.estimate["divergence"]
    assert set(enriched.best) == {"divergence"} and enriched.behind_best["entropy"] > 0


def fold_table(folds=4):
    tokens = whole(table(prompts=16))
    rng = np.random.default_rng(0)
    tokens["fold"] = tokens.prompt_id.str[1:].astype(int) % folds
    for f in range(folds):
        for name in ("gain", "reverse_gain", "gain_permuted"):
            share = 0.5 if name == "gain_permuted" else 1.0
            tokens[f"{name}_fold{f}"] = share * tokens.gain + 0.1 * rng.normal(size=len(tokens))
    return combine(tokens)


def test_a_fold_table_has_two_populations_and_carries_its_step_batches():
    tokens = fold_table()
    found = selection_curves(tokens, criteria=["teachability"], budgets=[0.2], draws=20)
    assert list(dict.fromkeys(found.split)) == ["held_out", "step"]
    assert list(dict.fromkeys(found.outcome)) == list(CAPTURED_OUTCOMES)
    own = rows(found, criterion="teachability")
    assert (own.steps == 4).all() and (own.prompts == 16).all()
    mask = criteria.select(tokens, "teachability", budget=0.2)
    columns = {"held_out": "context_gain", "step": "own_context_gain"}
    for split, column in columns.items():
        row = rows(own, split=split, outcome="context_gain")
        assert row.captured_share.item() == pytest.approx(
            tokens[column][mask].sum() / tokens[column].sum()
        )
    options = dict(criteria=["teachability"], outcomes=["context_gain"], budgets=[0.2])
    estimates = selection._estimates(tokens, Bootstrap(draws=20), **options, rules=Rules())
    estimate = estimates["share", "held_out", "context_gain", "teachability", 0.2]
    for f in range(4):
        left = combine(tokens, without=f).context_gain
        assert estimate.without_step[f] == pytest.approx(left[mask].sum() / left.sum())


def test_area_is_the_integral_of_the_curve():
    tokens = whole(table())
    count = len(tokens)
    budgets = [(k + 1) / count for k in range(count)]
    given = {"criteria": ["teachability"], "outcomes": ["gain"], "draws": 2}
    found = rows(selection_curves(tokens, budgets=budgets, **given), criterion="teachability")
    areas = [
        np.trapezoid([0.0, *curve], dx=1 / count) - 0.5
        for curve in (found.captured_share, found.oracle)
    ]
    summary = rows(selection_summary(tokens, budgets=[0.1], **given), statistic="area")
    assert summary.estimate.item() == pytest.approx(areas[0] / areas[1])


def test_invariants():
    tokens = whole(table())
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


def test_baselines_alone_are_no_comparison():
    tokens = table()
    with pytest.raises(DiagnosticsError, match="random, full alone cannot be compared"):
        selection_summary(tokens, criteria=["random", "full"], budgets=[0.1])


def test_the_outcome_itself_is_the_oracle():
    tokens = whole(table())
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
    tokens = whole(table(prompts=30))
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
    tokens = whole(table())
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
    tokens = whole(table())
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
        whole(table()),
        criteria=["q3_teachability"],
        outcomes=["gain"],
        budgets=[0.01, 1.0],
        draws=5,
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
    ) == {"step", "held_out"}
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
    """Where a cut falls between the copies of a position, it moves to the nearer end of them."""
    tokens = table(prompts=6)
    chosen = whole_table(tokens, ["divergence", "tip"], [0.2], bootstrap=Bootstrap(draws=8, seed=2))
    both = selection_sums(chosen, lambda _: np.ones((len(tokens), 1)), draws=8, overlaps=True).both
    for i, rows_ in enumerate(drawn(tokens, chosen.prompts, 8), 1):
        a, b = (criteria.select(rows_, name, budget=0.2) for name in ("divergence", "tip"))
        expected = [(a & b).sum(), a.sum(), b.sum()]
        found = [both[i, 0, 0, 1], both[i, 0, 0, 0], both[i, 0, 1, 1]]
        assert np.abs(np.subtract(found, expected)).max() <= 3
    a, b = (criteria.select(tokens, name, budget=0.2) for name in ("divergence", "tip"))
    assert both[0, 0].tolist() == [[a.sum(), (a & b).sum()], [(a & b).sum(), b.sum()]]


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
                r"^The comparison needs an outcome, one of context_gain, gain, relative_gain,"
                r" positive_gain; the"
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
            r"^Criterion 'teachability' needs the columns union_forward_kl, compatibility; this",
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


def test_the_mean_of_what_is_selected_and_the_mean_per_share_kept():
    tokens = whole(table())
    budgets = [0.1, 0.3, 1.0]
    given = {"criteria": ["entropy"], "outcomes": ["gain"], "budgets": budgets, "draws": 20}
    curves = selection_curves(tokens, **given)
    for budget in budgets:
        chosen = criteria.select(tokens, "entropy", budget=budget)
        own = rows(curves, criterion="entropy", budget=budget).iloc[0]
        assert own["mean"] == pytest.approx(tokens.gain[chosen].mean(), rel=1e-12)
        assert own.mean_per_kept == pytest.approx(own["mean"] / chosen.mean(), rel=1e-12)
        assert own.mean_low <= own["mean"] <= own.mean_high
        over = tokens.gain[chosen].mean() - tokens.gain.mean()
        assert own.minus_random == pytest.approx(over, rel=1e-9, abs=1e-15)
        assert own.minus_random_low <= own.minus_random <= own.minus_random_high
        chance = rows(curves, criterion="random", budget=budget).iloc[0]
        assert chance["mean"] == pytest.approx(tokens.gain.mean(), rel=1e-9)
        assert chance.minus_random == 0
    everything = rows(curves, criterion="entropy", budget=1.0).iloc[0]
    assert everything["mean"] == pytest.approx(tokens.gain.mean(), rel=1e-12)
    ends = everything[["minus_random_low", "minus_random", "minus_random_high"]]
    assert ends.astype(float).tolist() == pytest.approx([0, 0, 0], abs=1e-15)


def test_the_difference_to_random_is_made_anew_in_every_draw():
    tokens = whole(table())
    part = next(
        iter(selection.populations(tokens, criteria=["entropy"], outcomes=["gain"], budgets=[0.2]))
    )
    found = part.estimates()
    inside, over = (found[kind, "all", "gain", "entropy", 0.2] for kind in ("mean", "minus_random"))
    codes, _ = pd.factorize(tokens.prompt_id, sort=True)
    gain = tokens.gain.to_numpy()
    for draw in range(5):
        copies = part.candidates.prompts.weights[draw][codes]
        mean = (copies * gain).sum() / copies.sum()
        assert over.draws[draw] == pytest.approx(inside.draws[draw] - mean, abs=1e-12)


def test_a_criterion_that_is_undefined_everywhere_selects_nothing_and_has_no_mean():
    tokens = whole(table()).assign(student_entropy=np.nan)
    given = {"criteria": ["entropy"], "outcomes": ["gain"], "budgets": [0.1], "draws": 20}
    own = rows(selection_curves(tokens, **given), criterion="entropy").iloc[0]
    assert own.selected == 0 and own[["mean", "mean_low", "mean_per_kept"]].isna().all()


def test_one_line_says_which_shares_are_undefined(caplog):
    tokens = whole(table())
    sign = np.where(np.arange(len(tokens)) % 2 == 0, 1.0, -1.0)
    tokens = tokens.assign(context_gain=0.001 + sign, relative_gain=sign - 0.5)
    outcomes = ["context_gain", "relative_gain"]
    selection_curves(tokens, criteria=["entropy"], outcomes=outcomes, budgets=[0.1], draws=20)
    (line,) = [record.getMessage() for record in caplog.records if "undefined" in record.msg]
    assert "(NaN): context_gain (all); relative_gain (all). " in line
    assert "no decision or verdict rests on such a share" in line


def test_no_share_of_a_context_gain_that_is_not_told_apart_from_zero():
    tokens = whole(table())
    sign = np.where(np.arange(len(tokens)) % 2 == 0, 1.0, -1.0)
    given = {"criteria": ["entropy"], "outcomes": ["context_gain"], "budgets": [0.1], "draws": 20}
    for gains, defined in ((1.0 + 0.1 * sign, True), (0.001 + sign, False)):
        curves = selection_curves(tokens.assign(context_gain=gains), **given)
        own = rows(curves, criterion="entropy")
        assert np.isfinite(own.captured_share).all() == defined
        assert own[["low", "high"]].isna().all(axis=None)  # a share of it is a description
        assert np.isfinite(own[["mean", "mean_low", "mean_high"]]).all(axis=None)


@pytest.mark.parametrize("total, defined", [(0.01, False), (0.4, True)])
def test_shares_of_a_relative_gain_need_a_total_that_is_told_apart_from_zero(total, defined):
    """Twelve prompts whose relative gains are of either sign: half the spread is not their mean."""
    rng = np.random.default_rng(1)
    count = 240
    tokens = pd.DataFrame(
        dict(
            context_id=np.repeat([f"c{i}" for i in range(12)], 20),
            prompt_id=np.repeat([f"p{i}" for i in range(12)], 20),
            position=np.tile(np.arange(20), 12),
            response_length=20,
            token_id=5,
            token="a",
            forward_kl=rng.gamma(1.0, size=count),
            gain=np.abs(rng.normal(size=count)),
            relative_gain=rng.normal(size=count),
        )
    )
    tokens["relative_gain"] += total - tokens["relative_gain"].mean()
    curves = selection_curves(
        tokens, criteria=["divergence"], outcomes=["relative_gain", "gain"], budgets=[0.1], draws=50
    )
    share = curves[(curves.criterion == "divergence")].set_index("outcome").captured_share
    assert np.isfinite(share["gain"]) and np.isfinite(share["relative_gain"]) == defined
