"""Masks of the released training code: scores within a rollout, ties, and the minimum on top."""

import random

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper import masks
from tests.analysis.paper.checkpoint_tokens import quantile
from tests.factories import message


def made_bank(rollouts=3, samples=4, seed=0):
    """Measured columns with ties, and what names a position."""
    rng = np.random.default_rng(seed)
    n = rollouts * samples * 9
    return pd.DataFrame(
        {
            "entropy": np.round(rng.random(n), 2),
            "divergence": np.round(rng.exponential(size=n), 1),
            "compatibility": np.round(rng.random(n), 1),
            "rollout": np.repeat(np.arange(rollouts), samples * 9),
            "sample": np.repeat(np.arange(rollouts * samples), 9),
            "position": np.tile(np.arange(9), rollouts * samples),
            "supervised": rng.random(n) < 0.9,
        }
    )


def scores_of(bank):
    return masks.training_scores(
        *(bank[name] for name in ("entropy", "divergence", "compatibility", "rollout"))
    )


def kept_of(bank, mask, budget, **options):
    names = ("position", "sample", "rollout", "supervised")
    return masks.training_mask(
        scores_of(bank), mask, budget, **{name: bank[name] for name in names}, **options
    )


def one_rollout(**scores):
    """Positions of one sample in one rollout, with given scores."""
    n = len(next(iter(scores.values())))
    columns = {name: np.zeros(n) for name in masks.SCORE_COLUMNS} | {"quadrant": np.ones(n)}
    options = dict(
        position=np.arange(n),
        sample=np.zeros(n),
        rollout=np.zeros(n, int),
        supervised=np.ones(n, bool),
    )
    return pd.DataFrame(columns | scores), options


# Scores


def test_scores_are_worked_by_hand():
    # Quantiles of 0..20 are 1 and 19; position 10 is in the middle of each column.
    z = np.arange(21.0)
    row = masks.training_scores(z, 2 * z, z / 20, np.zeros(21)).iloc[10]

    assert row[["entropy", "divergence", "compatibility"]].tolist() == pytest.approx([0.5] * 3)
    # D*C is z^2 / 10, scaled between .1 and 36.1: 10 becomes 9.9 / 36.
    w = 9.9 / 36
    assert row["weighted_divergence"] == pytest.approx(w)
    assert row[["teachability", "incompatible"]].tolist() == pytest.approx([0.25, 0.25])
    assert row["tip"] == pytest.approx(0.75)
    assert row["teachability_entropy"] == pytest.approx(0.5 + w - 0.5 * w)
    assert row["split"] == pytest.approx(0.5 * w)


def test_the_medians_belong_to_high_entropy_and_high_divergence():
    h, d = np.array([0.0, 0, 1, 1, 0.5]), np.array([0.0, 1, 0, 1, 0.5])
    found = masks.training_scores(h, d, h, np.zeros(5))

    # The last position lies on both medians: Q1, although the analysis scripts have it in Q3.
    assert found["quadrant"].tolist() == [4, 3, 2, 1, 1]


def test_scores_are_scaled_within_a_rollout():
    bank = made_bank()
    whole = scores_of(bank)
    for _, part in bank.groupby("rollout"):
        alone = scores_of(part.reset_index(drop=True))
        assert (alone.to_numpy() == whole.loc[part.index].to_numpy()).all()
    # The order of the rows decides nothing.
    order = np.random.default_rng(1).permutation(len(bank))
    shuffled = scores_of(bank.iloc[order].reset_index(drop=True))
    assert (shuffled.to_numpy() == whole.to_numpy()[order]).all()


def test_a_quantile_lies_between_its_neighbors():
    values = np.sort(np.random.default_rng(0).normal(size=37))
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert masks._quantile(values, share) == pytest.approx(quantile(list(values), share))


def test_a_constant_column_is_0_and_a_gap_is_refused():
    ones = np.ones(4)
    assert (masks.training_scores(ones, ones, ones, ones)["tip"] == 0).all()
    assert message(masks.training_scores, np.array([np.nan, 1]), *[np.ones(2)] * 3).startswith(
        "entropy is not finite at 1 of 2 positions"
    )


# Masks


def test_the_best_are_kept_and_ties_go_to_the_earlier_position():
    scores, options = one_rollout(divergence=np.array([0.2, 1, 1, 1, 0.1]))

    assert masks.training_mask(scores, "divergence", 0.4, **options).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_from_the_low_end_ties_go_to_the_later_position():
    scores, options = one_rollout(
        compatibility=np.array([0.0, 0, 0, 1]), quadrant=np.array([3, 3, 3, 3])
    )

    kept = masks.training_mask(scores, "q3_compatibility_low", 0.5, **options)
    assert kept.tolist() == [False, True, True, False]


def test_a_quadrant_smaller_than_the_budget_is_kept_whole():
    scores, options = one_rollout(
        teachability=np.array([0.1, 0.9, 0.5, 0.8]), quadrant=np.array([3, 1, 1, 1])
    )

    kept = masks.training_mask(scores, "q3_teachability", 0.75, **options)
    assert kept.tolist() == [True, False, False, False]


def test_a_split_budget_gives_half_to_the_entropy_and_the_rest_to_the_score():
    scores, options = one_rollout(
        entropy=np.array([1.0, 0.9, 0, 0, 0, 0]), split=np.array([0.9, 0.1, 0.8, 0.7, 0, 0])
    )

    # Of a budget of 3 the entropy has 2: round(1.5) is 2. The first of the rest is position 2.
    kept = masks.training_mask(scores, "split_budget", 0.5, **options)
    assert kept.tolist() == [True, True, True, False, False, False]


def test_a_sample_without_a_kept_position_gets_one_on_top():
    scores, options = one_rollout(
        divergence=np.array([0.9, 0.8, 0.1, 0.2]),
        teachability_entropy=np.array([0.0, 0.0, 0.7, 0.3]),
    )
    options["sample"] = np.array([0, 0, 1, 1])

    kept = masks.training_mask(scores, "divergence", 0.25, **options)
    assert kept.tolist() == [True, False, True, False]
    assert masks.training_mask(scores, "divergence", 0.25, minimum=0, **options).sum() == 1


def test_random_positions_are_pythons_own_shuffle():
    bank = made_bank()
    kept = kept_of(bank, "random", 0.1, minimum=0)
    for number, part in bank.groupby("rollout"):
        rows = part.index[part["supervised"]].tolist()
        random.Random(42 + number).shuffle(rows)
        assert sorted(rows[: -(-len(rows) // 10)]) == part.index[kept[part.index]].tolist()


@pytest.mark.parametrize(
    "mask", [name for name in masks.MASKS if name not in ("random", "split_budget")]
)
def test_a_mask_equals_a_loop(mask):
    bank = made_bank(seed=2)
    scores = scores_of(bank)
    inside = mask in masks.INSIDE_Q3
    score = scores[(masks.INSIDE_Q3 if inside else masks.ALONE)[mask]]
    sign = 1 if mask.endswith("_low") else -1
    expected = set()
    for _, part in bank.groupby("rollout"):
        valid = [i for i in part.index if bank["supervised"][i]]
        rows = [i for i in valid if not inside or scores["quadrant"][i] == 3]
        rows.sort(key=lambda i: (sign * score[i], -sign * bank["position"][i], i))
        expected |= set(rows[: max(1, -(-len(valid) * 3 // 20))])
        for sample in set(bank["sample"][valid]):
            own = [i for i in valid if bank["sample"][i] == sample]
            if not expected & set(own):
                fill = scores["teachability_entropy"]
                expected.add(min(own, key=lambda i: (-fill[i], bank["position"][i], i)))

    assert set(np.flatnonzero(kept_of(bank, mask, 0.15))) == expected


@pytest.mark.parametrize("mask", masks.MASKS)
def test_every_mask_keeps_supervised_positions_and_every_sample(mask):
    bank = made_bank(seed=5)
    kept, exact = kept_of(bank, mask, 0.1), kept_of(bank, mask, 0.1, minimum=0)

    assert not (kept & ~bank["supervised"]).any() and not (exact & ~kept).any()
    assert bank[kept]["sample"].nunique() == bank["sample"].nunique()
    budgets = bank[bank["supervised"]].groupby("rollout").size().map(lambda n: -(-n // 10))
    assert (bank[exact].groupby("rollout").size() <= budgets).all()
    assert exact.sum() == budgets.sum() or mask in masks.INSIDE_Q3


def test_a_rollout_without_loss_keeps_nothing():
    bank = made_bank()
    bank.loc[bank["rollout"] == 1, "supervised"] = False

    kept = kept_of(bank, "tip", 0.1)
    assert not kept[bank["rollout"] == 1].any() and kept.any()


def test_an_unknown_mask_and_a_wrong_budget_are_refused():
    assert message(kept_of, made_bank(), "jsd", 0.1).startswith(
        "The released training code has no mask 'jsd'. Take one of entropy, divergence,"
    )
    assert message(kept_of, made_bank(), "tip", 0.0) == (
        "A budget is a share of positions in (0, 1]; got 0.0."
    )


def test_what_was_kept_is_counted_among_supervised_positions():
    scores, _ = one_rollout(
        teachability=np.array([0.2, 0.4, 1, 1]),
        incompatible=np.array([0.1, 0.3, 1, 1]),
        compatibility=np.array([0.5, 0.7, 1, 1]),
        quadrant=np.array([3, 1, 3, 3]),
    )
    supervised, kept = np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 1], bool)

    assert masks.kept_summary(scores, kept, supervised) == pytest.approx(
        {
            "kept_share": 2 / 3,
            "q3_share": 0.5,
            "mean_teachability": 0.3,
            "mean_incompatible": 0.2,
            "mean_compatibility": 0.6,
        }
    )
    nothing = masks.kept_summary(scores, ~supervised, supervised)
    assert nothing["kept_share"] == 0 and np.isnan(nothing["q3_share"])
