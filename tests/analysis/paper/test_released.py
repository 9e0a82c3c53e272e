"""The paper's tables as the released scripts compute them: rows, quantities and their sources."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper import gap, released, section3, topn
from diagnostics.analysis.paper.bank import percentile_ranks, script_table
from diagnostics.analysis.paper.interventions import trainings
from diagnostics.analysis.paper.sample import LONG
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens
from tests.analysis.paper.test_interventions import made_trainings
from tests.factories import message
from tests.made_tokens import only_row


@pytest.fixture(scope="module")
def tokens():
    return checkpoint_tokens(14, 20)


def test_table_1_has_the_gap_of_the_trained_student_at_every_k(tokens):
    found = released.table_1(tokens)
    expected = gap.gain_statistics(tokens, k=8)
    row = only_row(found, row="K = 8", quantity="Q3 gap")
    pairs = only_row(found, row="K = 8", quantity="matched gap")

    assert list(found.columns) == LONG and set(found["k"]) == {8.0, 16.0}
    assert tuple(row[["estimate", "low", "high", "n"]]) == (
        expected.gap.estimate,
        expected.gap.low,
        expected.gap.high,
        expected.positions,
    )
    assert tuple(pairs[["estimate", "n"]]) == (expected.matched.mean, expected.matched.pairs)
    assert np.isnan(pairs[["low", "high", "budget"]].astype(float)).all()
    assert set(released.table_1(tokens, ks=[8, 99])["k"]) == {8.0}


def test_tables_by_k_refuse_a_table_without_that_k(tokens):
    before = tokens.drop(columns=["compatibility_after", "compatibility_k8_after"])
    assert message(released.table_1, before) == (
        "The table has no compatibility after training at any K. Score the contexts with that K"
        " among --sweep, and the trained student with `score --after CHECKPOINT`."
    )
    assert "no compatibility before training at K = 99." in message(
        released.table_9, tokens, ks=[99]
    )


def test_table_5_counts_what_is_left_and_says_how_much_is_not(tokens, caplog):
    lacking = tokens.copy()
    gone = lacking["context_id"] == lacking["context_id"].iloc[0]
    lacking.loc[gone, "teacher_entropy"] = np.nan
    found = released.table_5(lacking).set_index("row")["estimate"]

    assert found.to_dict() == {"positions": (~gone).sum(), "contexts": 13, "prompts": 13}
    assert f"{gone.sum()} of {len(tokens)} positions lack a column" in caplog.text


def test_table_6_has_every_proxy_that_the_table_knows(tokens):
    found = released.table_6(tokens)
    at = {k: set(rows["row"]) for k, rows in found.groupby("k")}

    assert at == {
        8.0: {"mass", "jaccard", "overlap"},
        16.0: {"mass", "bhattacharyya", "jaccard", "overlap"},
    }
    table = script_table(tokens)
    expected = section3.support_gaps(table, {"bhattacharyya": tokens["bhattacharyya"]}).iloc[0]
    row = only_row(found, row="bhattacharyya")
    assert tuple(row[["estimate", "low", "high", "n"]]) == tuple(
        expected[["gap", "low", "high", "positions"]]
    )
    pairs = found[found["k"] == 16].set_index("row")["estimate"]
    assert pairs["jaccard"] == pairs["overlap"]


def test_table_8_has_the_nine_selectors_and_what_ties_decide(tokens):
    found = released.table_8(tokens, budgets=[0.03, 0.2])
    table = script_table(tokens, compatibility="after")
    expected = only_row(
        topn.top_gains(table, budgets=[0.03], selectors=["divergence"]), selector="divergence"
    )
    rows = found[(found["row"] == "divergence") & (found["budget"] == 0.03)].set_index("quantity")

    assert set(found["row"]) == set(released.SELECTORS) and len(found) == 9 * 7 * 2
    assert found["k"].isna().all()
    assert rows.loc["mean gain", "low"] == expected["low"]
    assert rows["estimate"].to_dict() == pytest.approx(
        {
            "mean gain": expected["mean"],
            "gain per kept share": expected["per_kept_share"],
            "share in Q3": expected["q3_share"],
            "tied share": expected["taken"] / expected["positions"],
            "expected under ties": expected["expected"],
            "least": expected["least"],
            "greatest": expected["greatest"],
        }
    )
    random = found[found["row"] == "random"].set_index(["quantity", "budget"])["estimate"]
    assert random["tied share"].eq(0).all() and random["expected under ties"].isna().all()


def test_table_9_is_the_decomposition_of_the_raw_gain(tokens):
    found = released.table_9(tokens).set_index(["row", "quantity"])["estimate"]
    raw = section3.regressions(script_table(tokens, k=8))
    raw = raw[raw["winsorized"] == 0]
    split = raw[raw["model"] == "decomposition"].set_index("term")
    plain = raw[raw["model"] == "interaction"]["r_squared"].iloc[0]

    inside, outside = split.loc[["teachability", "incompatible"], "coefficient"]
    assert found["K = 8"].to_dict() == pytest.approx(
        {
            "coefficient of D^L": inside,
            "coefficient of D^I": outside,
            "difference of coefficients": inside - outside,
            "R2 gained": split["r_squared"].iloc[0] - plain,
        }
    )


def test_buckets_are_those_inside_q3(tokens):
    found = released.buckets(tokens)
    of_section = section3.bucket_gains(script_table(tokens))
    expected = only_row(of_section, region="Q3", score="incompatible", bucket=2)
    row = only_row(found, row="incompatible", quantity="trimmed mean of bucket 2")

    assert list(dict.fromkeys(found["row"])) == list(released.BUCKETED)
    assert (row["estimate"], row["n"]) == (expected["trimmed_mean"], expected["positions"])
    assert (
        len(found)
        == 3 * (of_section["region"] == "Q3")[of_section["score"].isin(released.BUCKETED)].sum()
    )


# Planes


def test_planes_hold_every_position_once_between_their_edges(tokens):
    found = released.planes(tokens, bins=4)

    assert set(found.groupby("figure")["positions"].sum()) == {len(tokens)}
    assert (found["x_high"] - found["x_low"] == 0.25).all() and found["x_bin"].between(0, 3).all()
    # Percentile ranks without ties put a quarter into each bin.
    assert found[found["figure"] == "2B"].groupby("x_bin")["positions"].sum().to_numpy() == (
        pytest.approx(len(tokens) / 4, abs=len(tokens) / 18)
    )


def test_a_plane_shows_means_over_its_cells(tokens):
    table = script_table(tokens)
    x, y = (percentile_ranks(table.score(name)) for name in ("teachability", "incompatible"))
    inside = (x > 0.5) & (x <= 0.75) & (y > 0.25) & (y <= 0.5)
    cell = only_row(released.planes(tokens, bins=4), figure="2A", x_bin=2, y_bin=1)
    assert cell["positions"] == inside.sum()
    assert cell["estimate"] == pytest.approx(np.arcsinh(table.gain[inside]).mean())

    h, d = (percentile_ranks(table.score(name)) for name in ("entropy", "divergence"))
    corner = (h <= 0.25) & (d > 0.75)
    cell = only_row(released.planes(tokens, bins=4), figure="2C", x_bin=0, y_bin=3)
    assert (cell["positions"], cell["estimate"]) == (
        corner.sum(),
        pytest.approx(y[corner].mean()),
    )


def test_a_cell_with_few_positions_has_no_number(tokens):
    found = released.planes(tokens, bins=20, fewest=3)

    assert (found["estimate"].isna() == (found["positions"] < 3)).all()
    assert found["estimate"].isna().any() and found["estimate"].notna().any()


def test_a_plane_without_bins_is_refused(tokens):
    assert message(released.planes, tokens, bins=0) == "A plane has at least one bin; got bins=0."


# Trainings


def test_table_2_averages_the_seeds_of_each_mask():
    tokens, cells, kept = made_trainings()
    found = released.table_2(tokens, cells, kept)
    gaps = trainings(tokens, cells, kept).groupby("criterion")["gap"]
    row = only_row(found, row="teachability", quantity="gap after training")

    assert row["estimate"] == pytest.approx(gaps.mean()["teachability"])
    spread = gaps.std()["teachability"]
    assert (row["low"], row["high"]) == pytest.approx(
        (row["estimate"] - spread, row["estimate"] + spread)
    )
    assert (row["n"], row["budget"]) == (2, 0.05) and np.isnan(row["k"])
    alone = only_row(found, row="random", quantity="mean gain")
    assert alone["n"] == 1 and np.isnan([alone["low"], alone["high"]]).all()
    assert set(found["quantity"]) == {
        "kept share",
        "gap after training",
        "gap per kept share",
        "share in Q3",
        "mean gain",
    }


def test_tables_7_and_10_take_their_own_masks_and_budgets():
    tokens, cells, kept = made_trainings()
    assert released.table_7(tokens, cells, kept).empty
    names = {"teachability": "q3_incompatible"}
    inside = released.table_7(
        tokens,
        cells.assign(criterion=cells["criterion"].replace(names)),
        kept.assign(criterion=kept["criterion"].replace(names)),
    )
    assert set(inside["row"]) == {"q3_incompatible"}
    assert only_row(inside, quantity="mean D^L")["estimate"] == pytest.approx(0.3)

    found = released.table_10(tokens, cells, kept)
    assert set(found["row"]) == {"teachability"} and set(found["budget"]) == {0.05}
    other = cells.assign(budget=0.07)
    assert released.table_10(tokens, other, kept).empty
    assert list(released.table_2(tokens, other, kept).columns) == LONG


def test_no_table_is_made_without_a_trained_student(tokens):
    before = tokens.drop(columns=[name for name in tokens if name.endswith("_after")])
    for table in (released.table_5, released.table_6, released.table_8, released.buckets):
        assert "opd-diagnostics score --after CHECKPOINT" in message(table, before)


def test_tables_are_numbers(tokens):
    for table in (released.table_1(tokens), released.table_8(tokens), released.buckets(tokens)):
        numbers = table.drop(columns=["row", "quantity"])
        assert all(pd.api.types.is_numeric_dtype(column) for _, column in numbers.items())
