"""The controlled statistics of the paper against loops, the study's own tables, and invariants."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import quadrants, regressions
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.paper import controlled, training
from diagnostics.analysis.paper.sample import long_table, reasons, sample, samples
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import quadrants as quadrant_numbers
from diagnostics.criteria import select
from tests.analysis.paper.made_studies import made_study, made_trainings
from tests.made_tokens import only_row

DRAWS = {"draws": 12}
AFTER = ("student_entropy_after", "compatibility_after", "compatibility_k8_after")


@pytest.fixture(scope="module")
def tokens():
    return made_study()


@pytest.fixture(scope="module")
def dense():
    """Few prompts with many positions, so that every draw has matched pairs."""
    return made_study(8, 160)


def gain_of(table):
    return (table.forward_kl - table.forward_kl_after).to_numpy()


def thirds(values):
    """Masks of the bottom and top third by rank, equals at the middle of their ranks."""
    share = (pd.Series(values).rank() - 0.5) / len(values)
    return (share < 1 / 3).to_numpy(), (share >= 2 / 3).to_numpy()


# Which positions count, and what is refused


def test_a_table_without_a_checkpoint_says_how_to_measure_one(tokens):
    without = tokens.drop(columns=["forward_kl_after"])
    with pytest.raises(DiagnosticsError, match="score --after CHECKPOINT"):
        controlled.table_1(without, **DRAWS)
    assert set(reasons(without)) == {"checkpoint"}


def test_the_divergence_after_the_probes_own_steps_is_no_checkpoint(tokens):
    assert "the probe's own" in reasons(tokens.drop(columns=list(AFTER)))["checkpoint"]


def test_without_folds_or_a_null_there_is_no_context_gain(tokens):
    assert "permuted teacher" in reasons(tokens.drop(columns=["context_gain"]))["context"]
    one_step = made_study(folds=0, split=False)
    assert "no folds" in reasons(one_step)["context"]
    assert [each.outcomes for each in samples(one_step)] == [("checkpoint",)]


def test_an_unknown_outcome_is_refused(tokens):
    with pytest.raises(DiagnosticsError, match="one of checkpoint, context; got 'gain'"):
        sample(tokens, "gain")


def test_only_unseen_contexts_count_where_the_training_is_known():
    tokens = made_study(seen=0.5)
    count = only_row(controlled.table_5(tokens), row="prompts").estimate
    assert count == tokens.prompt_id[~tokens.seen].nunique() == 12
    before = controlled.table_1(tokens, **DRAWS)
    moved = tokens.assign(
        forward_kl_after=tokens.forward_kl_after.where(~tokens.seen, tokens.forward_kl - 9)
    )
    pd.testing.assert_frame_equal(before, controlled.table_1(moved, **DRAWS))


def test_all_contexts_count_where_the_training_saw_every_one():
    assert sample(made_study(seen=1.0), "checkpoint").kind == "seen"
    assert sample(made_study(seen=1.0), "checkpoint").mask.all()
    assert sample(made_study(), "checkpoint").kind == "all"


def test_one_step_has_its_context_gain_on_the_half_that_it_left_out():
    tokens = made_study(folds=0)
    made = {each.outcomes: each for each in samples(tokens)}
    assert made[("context",)].kind == "held_out"
    assert (made[("context",)].mask == (tokens.split == "held_out")).all()
    assert made[("checkpoint",)].mask.all()


@pytest.mark.parametrize("name", ["table_1", "table_6", "table_8", "table_9", "buckets"])
def test_no_measurement_of_the_trained_student_is_a_predictor(tokens, name):
    function = getattr(controlled, name)
    rng = np.random.default_rng(0)
    moved = tokens.assign(**{column: rng.random(len(tokens)) for column in AFTER})
    pd.testing.assert_frame_equal(function(tokens, **DRAWS), function(moved, **DRAWS))


# Gaps inside Q3


@pytest.mark.parametrize("k", [8, 16])
def test_the_q3_gap_equals_a_loop(tokens, k):
    found = only_row(controlled.table_1(tokens, **DRAWS), row=f"K = {k}", quantity="Q3 gap")
    inside = tokens[quadrant_numbers(tokens) == 3]
    bottom, top = thirds(inside["compatibility" if k == 16 else "compatibility_k8"])
    gain = gain_of(inside)
    assert found.estimate == pytest.approx(gain[top].mean() - gain[bottom].mean(), abs=1e-12)
    assert (found.k, found.n) == (k, len(inside))


def test_gap_and_matched_gap_are_those_of_the_study(dense):
    tokens = dense
    found = controlled.table_1(tokens, ks=[16], outcome="context", **DRAWS)
    where = {"outcome": "context_gain", "split": "held_out", "score": "compatibility"}
    gap = only_row(quadrants.q3_contrast(tokens, **DRAWS), **where, groups="tertile")
    own = only_row(found, quantity="Q3 gap")
    assert [own.estimate, own.low, own.high] == pytest.approx([gap.difference, gap.low, gap.high])
    pairs = only_row(quadrants.matching(tokens, **DRAWS), **where, caliper=quadrants.CALIPER)
    own = only_row(found, quantity="matched gap")
    assert [own.estimate, own.low, own.high] == pytest.approx(
        [pairs.difference, pairs.low, pairs.high]
    )
    assert own.n == pairs.positions
    assert only_row(found, quantity="overlap").estimate == pytest.approx(pairs.matched)


def test_intervals_of_the_context_gain_carry_the_step_batches(tokens):
    made = sample(tokens, "context")
    estimates = controlled.gap_estimates(made, [16], Bootstrap(**DRAWS))
    (gap,) = (each for key, each in estimates.items() if key[2] == "Q3 gap")
    assert gap.steps == 4 and gap.step_error > 0
    made = sample(tokens, "checkpoint")
    (gap, *_) = controlled.gap_estimates(made, [16], Bootstrap(**DRAWS)).values()
    assert gap.step_error == 0


def test_both_outcomes_of_one_pass_are_those_of_two(tokens):
    (both,) = samples(tokens)
    assert both.outcomes == ("checkpoint", "context")
    together = controlled.gap_estimates(both, None, Bootstrap(**DRAWS))
    for outcome in both.outcomes:
        alone = controlled.table_1(tokens, outcome=outcome, **DRAWS)
        pd.testing.assert_frame_equal(long_table(together, 0.95, outcome), alone)


@pytest.mark.parametrize(
    ("row", "column"),
    [("bhattacharyya", "bhattacharyya"), ("jaccard", "topk_jaccard"), ("overlap", "topk_overlap")],
)
def test_the_gap_of_a_proxy_equals_a_loop(tokens, row, column):
    found = only_row(controlled.table_6(tokens, **DRAWS), row=row, k=16)
    inside = tokens[quadrant_numbers(tokens) == 3]
    bottom, top = thirds(inside[column])
    gain = gain_of(inside)
    assert found.estimate == pytest.approx(gain[top].mean() - gain[bottom].mean(), abs=1e-12)


def test_a_proxy_that_the_table_lacks_has_no_row(tokens):
    found = controlled.table_6(tokens.drop(columns=["bhattacharyya"]), ks=[16], **DRAWS)
    assert list(found.row) == ["mass", "jaccard", "overlap"]


# The exact top N


def test_the_mean_gain_of_a_selector_is_that_of_its_selection(tokens):
    found = controlled.table_8(tokens, budgets=[0.1], **DRAWS)
    gain = gain_of(tokens)
    for name in ("teachability", "divergence", "incompatible", "tip", "entropy"):
        chosen = select(tokens, name, budget=0.1)
        row = only_row(found, row=name, quantity="mean gain")
        assert row.estimate == pytest.approx(gain[chosen].mean(), abs=1e-12), name
        assert row.n == chosen.sum()
        share = only_row(found, row=name, quantity="gain per kept share")
        assert share.estimate == pytest.approx(gain[chosen].mean() / chosen.mean(), abs=1e-12)
        in_q3 = only_row(found, row=name, quantity="share in Q3")
        assert in_q3.estimate == pytest.approx((quadrant_numbers(tokens)[chosen] == 3).mean())
    random = only_row(found, row="random", quantity="mean gain")
    assert random.estimate == pytest.approx(gain.mean(), abs=1e-12)


def test_selectors_of_q3_take_all_of_it_before_any_other_position(tokens):
    inside = quadrant_numbers(tokens) == 3
    budget = (inside.sum() + 5) / len(tokens)
    found = controlled.table_8(tokens, budgets=[budget], **DRAWS)
    row = only_row(found, row="q3_compatibility", quantity="share in Q3")
    assert row.estimate == pytest.approx(inside.sum() / row.n)
    outside = tokens[~inside].sort_values("compatibility", ascending=False)
    expected = np.r_[gain_of(tokens[inside]), gain_of(outside.head(int(row.n) - inside.sum()))]
    mean = only_row(found, row="q3_compatibility", quantity="mean gain")
    assert mean.estimate == pytest.approx(expected.mean(), abs=1e-12)


def test_a_planted_block_of_equals_leaves_its_range_to_chance(tokens):
    # Ten positions share the largest divergence, clipped and unclipped; five of them are taken.
    rows = np.arange(10)
    divergence = tokens.forward_kl.to_numpy().copy()
    divergence[rows] = divergence.max() + 1
    gain = np.zeros(len(tokens))
    gain[rows] = np.arange(10)
    planted = tokens.assign(forward_kl=divergence, forward_kl_after=divergence - gain)
    found = controlled.table_8(planted, budgets=[5 / len(tokens)], **DRAWS)
    found = found[found.row == "divergence"].set_index("quantity").estimate
    assert found["tied share"] == 1
    assert found[["expected under ties", "least", "greatest"]].tolist() == pytest.approx(
        [4.5, 2.0, 7.0]
    )


def test_the_unclipped_score_leaves_no_tie_where_values_differ(tokens):
    found = controlled.table_8(tokens, **DRAWS)
    ties = found[found.quantity == "tied share"]
    assert (ties.estimate == 0).all()
    for _, part in found[found.row != "random"].groupby(["row", "budget"]):
        values = part.set_index("quantity").estimate
        for name in ("expected under ties", "least", "greatest"):
            assert values[name] == pytest.approx(values["mean gain"], abs=1e-12)


# Regression, buckets, planes


def test_coefficients_are_those_of_the_study(tokens):
    found = controlled.table_9(tokens, ks=[16], outcome="context", **DRAWS)
    tables = regressions.regressions(tokens, **DRAWS)
    where = {"outcome": "context_gain", "split": "held_out", "winsorised": 0.0}
    fitted = tables["regressions"]
    for quantity, term in (("D^L", "teachability"), ("D^I", "incompatible")):
        own = only_row(found, quantity=f"coefficient of {quantity}")
        row = only_row(fitted, **where, model="decomposition", term=term)
        assert [own.estimate, own.low, own.high] == pytest.approx(
            [row.coefficient, row.low, row.high]
        )
    own = only_row(found, quantity="R2 gained")
    assert [own.estimate, own.low, own.high] == pytest.approx(
        [row.r_squared_gain, row.r_squared_gain_low, row.r_squared_gain_high]
    )
    own = only_row(found, quantity="difference of coefficients")
    row = only_row(tables["decomposition"], **where, scale="standardised")
    assert [own.estimate, own.low, own.high] == pytest.approx([row.difference, row.low, row.high])


def test_another_k_reads_its_own_columns(tokens):
    found = controlled.table_9(tokens, ks=[8], **DRAWS)
    swapped = tokens.drop(columns=["union_forward_kl"]).assign(
        compatibility=tokens.compatibility_k8
    )
    swapped = controlled.table_9(swapped.drop(columns=["compatibility_k8"]), ks=[16], **DRAWS)
    assert found.estimate.tolist() == pytest.approx(swapped.estimate.tolist())
    assert set(found.row) == {"K = 8"} and set(found.k) == {8}


def test_bucket_means_equal_a_loop(tokens):
    found = controlled.buckets(tokens, **DRAWS)
    inside = tokens[quadrant_numbers(tokens) == 3]
    gain = gain_of(inside)
    share = (inside.forward_kl.rank() - 0.5) / len(inside)
    quarter = np.floor(4 * share).to_numpy()
    for bucket in range(4):
        values = gain[quarter == bucket]
        expected = {
            "mean": values.mean(),
            "trimmed mean": stats.trim_mean(values, 0.05),
            "winsorized mean": float(stats.mstats.winsorize(values, (0.05, 0.05)).mean()),
        }
        for name, value in expected.items():
            row = only_row(found, row="divergence", quantity=f"{name} of bucket {bucket}")
            assert row.estimate == pytest.approx(value, abs=1e-12)
            assert row.n == len(values)


def test_a_plane_holds_every_position_once_and_its_cells_their_means(tokens):
    found = controlled.planes(tokens, bins=3, fewest=1)
    assert (found.groupby("figure").positions.sum() == len(tokens)).all()
    plane = found[found.figure == "2A"]
    mean = (plane.positions * plane.estimate).sum() / len(tokens)
    assert mean == pytest.approx(gain_of(tokens).mean(), abs=1e-12)
    percentile = found[found.figure == "2B"]
    mean = (percentile.positions * percentile.estimate).sum() / len(tokens)
    assert mean == pytest.approx(0.5)
    assert sorted(set(plane.x_low.round(6))) == [0, round(1 / 3, 6), round(2 / 3, 6)]


def test_a_cell_with_few_positions_keeps_its_count_and_has_no_number(tokens):
    every = controlled.planes(tokens, bins=4, fewest=1)
    fewest = int(every.positions.median())
    found = controlled.planes(tokens, bins=4, fewest=fewest)
    assert (found.positions == every.positions).all()
    few = found.positions < fewest
    assert few.any() and found.estimate[few].isna().all()
    assert (found.estimate[~few] == every.estimate[~few]).all()


# Trainings


def trained(tokens, seed=3):
    rng = np.random.default_rng(seed)
    gains = {
        name: mean + 0.1 * rng.normal(size=len(tokens))
        for name, mean in (("random", 0.05), ("teachability", 0.09), ("q3_teachability", 0.02))
    }
    return gains, *made_trainings(tokens, gains, noise=0.01, halves=True)


def test_the_mean_gain_of_a_training_is_over_the_contexts_that_it_did_not_see(tokens):
    _, cells, kept = trained(tokens)
    found = training.table_2(tokens, cells, kept, **DRAWS)
    for quantity, seen in (("mean gain", False), ("mean gain (seen)", True)):
        means = []
        for seed in (0, 1):
            cell = cells[(cells.criterion == "teachability") & (cells.seed == seed)]
            both = tokens.merge(cell, on=["context_id", "position"], suffixes=("_probe", ""))
            both = both[both.seen == seen]
            means.append((both.forward_kl - both.forward_kl_after).mean())
        row = only_row(found, row="teachability", quantity=quantity)
        assert row.estimate == pytest.approx(np.mean(means), abs=1e-12)
        # Each half is unseen by one of the two trainings.
        assert row.n == len(tokens) and row.seeds == 2


def test_the_difference_to_random_is_that_of_the_means(tokens):
    _, cells, kept = trained(tokens)
    found = training.table_2(tokens, cells, kept, **DRAWS).set_index(["row", "quantity"]).estimate
    own, rival = (found[name, "mean gain"] for name in ("teachability", "random"))
    assert found["teachability", "mean gain minus random"] == pytest.approx(own - rival)
    assert ("random", "mean gain minus random") not in found


def test_the_gap_after_training_ignores_what_every_position_gains_alike(dense):
    tokens = dense
    _, cells, kept = trained(tokens)
    lower = cells.assign(forward_kl_after=cells.forward_kl_after - 1.0)
    one, other = (
        training.table_7(tokens, each, kept, **DRAWS).set_index("quantity").estimate
        for each in (cells, lower)
    )
    for quantity in ("gap after training", "matched gap"):
        assert other[quantity] == pytest.approx(one[quantity], abs=1e-9)
    assert other["mean gain"] == pytest.approx(one["mean gain"] + 1)


def test_the_gap_after_training_equals_a_loop(tokens):
    gains, _, _ = trained(tokens)
    cells, kept = made_trainings(tokens, gains)
    found = training.table_2(tokens, cells, kept, **DRAWS)
    inside = (quadrant_numbers(tokens) == 3).nonzero()[0]
    bottom, top = thirds(tokens.compatibility.to_numpy()[inside])
    for name, gain in gains.items():
        value = gain[inside][top].mean() - gain[inside][bottom].mean()
        row = only_row(found, row=name, quantity="gap after training")
        assert row.estimate == pytest.approx(value, abs=1e-12)
        share = only_row(found, row=name, quantity="gap per kept share")
        assert share.estimate == pytest.approx(value * np.mean([1 / 0.05, 1 / 0.055]))
    # Equal seeds leave the prompts' part of the interval alone, which is that of the study's gap.
    checkpoint = tokens.assign(forward_kl_after=tokens.forward_kl - gains["teachability"])
    gap = only_row(controlled.table_1(checkpoint, ks=[16], **DRAWS), quantity="Q3 gap")
    own = only_row(found, row="teachability", quantity="gap after training")
    assert own.estimate == pytest.approx(gap.estimate)
    assert 0 < own.high - own.low <= (gap.high - gap.low) * (1 + 1e-9)


def test_one_training_has_no_interval(tokens):
    gains, _, _ = trained(tokens)
    found = training.table_2(tokens, *made_trainings(tokens, gains, seeds=1), **DRAWS)
    assert found.low.isna().all() and (found.seeds == 1).all()
    assert found.estimate.notna().all()


def test_masks_are_paired_with_random_by_the_seeds_that_both_have(tokens):
    gains, _, _ = trained(tokens)
    cells, kept = made_trainings(tokens, gains, seeds=3, noise=0.05)
    lost = (cells.criterion == "random") & (cells.seed != 1)
    gone = (kept.criterion == "random") & (kept.seed != 1)
    found = training.table_2(tokens, cells[~lost], kept[~gone], **DRAWS)
    row = only_row(found, row="teachability", quantity="mean gain minus random")
    pair = [
        tokens.forward_kl.to_numpy()
        - cells.forward_kl_after[(cells.criterion == name) & (cells.seed == 1)].to_numpy()
        for name in ("teachability", "random")
    ]
    assert row.estimate == pytest.approx(pair[0].mean() - pair[1].mean(), abs=1e-12)


def test_trainings_without_random_have_no_difference_to_it(tokens):
    gains, _, _ = trained(tokens)
    del gains["random"]
    found = training.table_2(tokens, *made_trainings(tokens, gains), **DRAWS)
    assert found[found.quantity == "mean gain minus random"].estimate.isna().all()


def test_trainings_that_do_not_fit_the_table_are_refused(tokens):
    _, cells, kept = trained(tokens)
    with pytest.raises(DiagnosticsError, match=r"random at 0\.05, seed 0 lacks positions"):
        training.table_2(tokens, cells[1:][cells.criterion[1:] == "random"], kept, **DRAWS)
    with pytest.raises(DiagnosticsError, match="positions that the token table does not hold"):
        training.table_2(tokens[:50], cells, kept, **DRAWS)
    with pytest.raises(DiagnosticsError, match="kept stands in 0 rows"):
        training.table_2(tokens, cells, kept[1:], **DRAWS)
