"""Trainings under a mask, as the released aggregating scripts compute them."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper.cells import KEPT
from diagnostics.analysis.paper.gap import gain_statistics
from diagnostics.analysis.paper.interventions import over_seeds, trainings
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens
from tests.factories import message
from tests.made_tokens import only_row

READ = [
    "context_id",
    "position",
    "forward_kl_after",
    "student_entropy_after",
    "compatibility_after",
]


def made_trainings():
    """A table, the cells of three trainings, and what each kept."""
    tokens = checkpoint_tokens()
    names = [("teachability", 0.05, 0), ("teachability", 0.05, 1), ("random", 0.03, 0)]
    cells, kept = [], []
    for number, (criterion, budget, seed) in enumerate(names):
        moved = checkpoint_tokens(seed=0).assign(
            forward_kl_after=tokens["forward_kl_after"]
            * (1 + 0.1 * number * tokens["compatibility"])
        )
        training = {"criterion": criterion, "budget": budget, "seed": seed}
        cells.append(moved[READ].assign(**training))
        kept.append(training | dict(zip(KEPT, (0.05 + 0.01 * number, 0.4, 0.3, 0.2, 0.1))))
    return tokens, pd.concat(cells, ignore_index=True), pd.DataFrame(kept)


def test_a_training_has_the_statistics_of_its_own_student():
    tokens, cells, kept = made_trainings()
    found = trainings(tokens, cells, kept, draws=20)
    cell = cells[(cells["criterion"] == "teachability") & (cells["seed"] == 1)]
    alone = tokens.assign(forward_kl_after=cell["forward_kl_after"].to_numpy())
    expected = gain_statistics(alone, seed=20260512, draws=20)
    row = only_row(found, criterion="teachability", seed=1)

    assert (row["gap"], row["low"], row["high"]) == (
        expected.gap.estimate,
        expected.gap.low,
        expected.gap.high,
    )
    assert (row["matched"], row["pairs"]) == (expected.matched.mean, expected.matched.pairs)
    assert row["mean_gain"] == expected.mean and row["kept_share"] == pytest.approx(0.06)
    assert row["gap_per_kept_share"] == pytest.approx(row["gap"] / 0.06)


def test_what_the_table_says_of_another_student_gives_way():
    tokens, cells, kept = made_trainings()
    other = tokens.assign(forward_kl_after=0.0, relative_gain_released=9.0)

    pd.testing.assert_frame_equal(
        trainings(other, cells, kept, draws=5), trainings(tokens, cells, kept, draws=5)
    )


def test_the_order_of_rows_decides_nothing():
    tokens, cells, kept = made_trainings()
    shuffled = cells.sample(frac=1, random_state=0)

    pd.testing.assert_frame_equal(
        trainings(tokens, shuffled, kept, draws=5), trainings(tokens, cells, kept, draws=5)
    )


def test_seeds_are_averaged_with_their_sample_deviation():
    found = pd.DataFrame(
        {
            "criterion": ["tip", "tip", "q3"],
            "budget": [0.05, 0.05, 0.05],
            "seed": [0, 1, 0],
            "gap": [1.0, 3.0, 5.0],
        }
    )
    rows = over_seeds(found).set_index("criterion")

    assert rows.loc["tip", ["mean", "sd", "seeds"]].tolist() == pytest.approx([2, np.sqrt(2), 2])
    assert rows.loc["q3", "mean"] == 5 and np.isnan(rows.loc["q3", "sd"])


def test_a_training_without_a_record_of_what_it_kept_has_none():
    tokens, cells, kept = made_trainings()
    row = only_row(trainings(tokens, cells, kept.iloc[:2], draws=5), criterion="random")

    assert (
        np.isfinite(row["gap"]) and np.isnan([row["kept_share"], row["gap_per_kept_share"]]).all()
    )


def test_a_training_that_kept_nothing_has_no_gap_per_kept_share():
    tokens, cells, kept = made_trainings()
    found = trainings(tokens, cells, kept.assign(kept_share=0.0), draws=5)

    assert found["gap_per_kept_share"].isna().all()


def test_a_training_that_lacks_a_position_is_refused():
    tokens, cells, kept = made_trainings()
    one = cells[cells["criterion"] == "random"]

    assert message(trainings, tokens, one.iloc[1:], kept) == (
        f"The training ('random', 0.03, 0) has {len(one) - 1} rows, 0 of them repeated, for"
        f" {len(tokens)} positions. Score every position with it once."
    )
    elsewhere = one.assign(context_id="other-" + one["context_id"])
    assert message(trainings, tokens, elsewhere, kept) == (
        f"The training ('random', 0.03, 0) lacks {len(tokens)} of {len(tokens)} positions. Score"
        " the same contexts with it."
    )


def test_a_position_without_a_divergence_after_a_training_is_left_out():
    tokens, cells, kept = made_trainings()
    one = cells[cells["criterion"] == "random"].reset_index(drop=True)
    lacking = one.copy()
    lacking.loc[3, "forward_kl_after"] = np.nan
    found, whole = (trainings(tokens, each, kept, draws=5) for each in (lacking, one))

    assert found["mean_gain"].iloc[0] != whole["mean_gain"].iloc[0]
    assert np.isfinite(found["gap"]).all()


def test_a_table_without_a_column_is_refused():
    tokens, cells, kept = made_trainings()

    assert message(trainings, tokens, cells.drop(columns="seed"), kept).startswith(
        "A table of trainings needs the column seed;"
    )
    assert message(trainings, tokens, cells, kept.drop(columns="q3_share")).startswith(
        "A table of what trainings kept needs the column q3_share;"
    )
