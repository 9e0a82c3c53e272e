"""Section 3 as its builder script computes it: locations, buckets, regressions, proxies."""

import numpy as np
import pytest

from diagnostics.analysis.paper import section3
from diagnostics.analysis.paper.bank import ScriptTable, scaled, script_table
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens, quantile
from tests.made_tokens import only_row


@pytest.fixture(scope="module")
def tokens():
    return checkpoint_tokens(14, 20)


@pytest.fixture(scope="module")
def table(tokens):
    return script_table(tokens)


def flat(gain, compatibility):
    """A table in which one column matters."""
    n = len(gain)
    zeros = np.zeros(n)
    return ScriptTable(np.arange(n), np.arange(n), gain, zeros, zeros, compatibility, zeros, zeros)


def test_a_trimmed_mean_keeps_the_values_at_its_limits():
    # Of 0..20 the limits are 1 and 19, and both are kept.
    values = np.r_[np.arange(20.0), 1000.0]
    assert section3.trimmed_mean(values) == pytest.approx(np.arange(1, 20).mean())


def test_a_trimmed_mean_of_two_values_is_undefined():
    assert np.isnan(section3.trimmed_mean(np.array([0.0, 1.0])))
    assert section3.trimmed_mean(np.array([2.0, 2.0])) == 2


def test_a_winsorized_mean_moves_values_to_the_limits():
    values = np.r_[np.arange(20.0), 1000.0]
    assert section3.winsorized_mean(values, 0.05) == pytest.approx(
        (1 + np.arange(1, 20).sum() + 19) / 21
    )


@pytest.mark.parametrize("location", [section3.trimmed_mean, section3.winsorized_mean])
def test_robust_means_move_with_the_values(location):
    values = np.random.default_rng(0).standard_t(2, 200)
    assert location(values + 5) == pytest.approx(location(values) + 5)


def test_buckets_are_quarters_with_equal_edges_merged():
    assert list(section3.quantile_buckets(np.arange(8.0), 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Edges 0 0 .5 1 1 of six values leave two buckets.
    assert list(section3.quantile_buckets(np.array([0.0, 0, 0, 1, 1, 1]), 4)) == [0, 0, 0, 1, 1, 1]
    assert list(section3.quantile_buckets(np.ones(3), 4)) == [-1, -1, -1]


def test_locations_of_the_gain_equal_a_loop(table):
    row, y = section3.robust_gain(table).iloc[0], sorted(table.gain)
    low, high = quantile(y, 0.05), quantile(y, 0.95)

    assert (row["positions"], row["contexts"]) == (len(y), 14)
    assert row["mean"] == pytest.approx(sum(y) / len(y))
    assert row["median"] == pytest.approx(quantile(y, 0.5))
    assert row["trimmed_mean"] == pytest.approx(np.mean([z for z in y if low <= z <= high]))
    assert row["winsorized_mean_5"] == pytest.approx(np.mean([min(max(z, low), high) for z in y]))
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_bucket_gains_are_worked_by_hand():
    found = section3.bucket_gains(flat(np.arange(8.0), np.arange(8.0)))
    row = only_row(found, region="all", score="compatibility", bucket=2)

    assert (row["positions"], row["score_mean"], row["mean"], row["median"]) == (2, 4.5, 4.5, 4.5)
    # The other scores are constant and have no bucket.
    assert set(found["score"]) == {"compatibility"}


def test_buckets_hold_every_position_of_their_region_once(table):
    found = section3.bucket_gains(table).groupby(["region", "score"])["positions"].sum()

    assert set(found.loc["all"]) == {len(table)} and set(found.loc["Q3"]) == {table.in_q3.sum()}
    assert set(found.index.get_level_values("score")) == set(section3.BUCKET_SCORES)


def test_buckets_within_q3_are_cut_within_q3(table):
    score, y = table.score("teachability")[table.in_q3], table.gain[table.in_q3]
    edges = [quantile(list(score), share) for share in (0.25, 0.5)]
    row = only_row(section3.bucket_gains(table), region="Q3", score="teachability", bucket=1)

    inside = (score > edges[0]) & (score <= edges[1])
    assert row["positions"] == inside.sum() and row["mean"] == pytest.approx(y[inside].mean())


def test_regressions_equal_normal_equations_on_standardized_columns(table):
    found = section3.regressions(table)
    columns, y = section3.terms(table), np.clip(table.gain, *np.quantile(table.gain, [0.01, 0.99]))
    for model, names in section3.MODELS.items():
        z = [(x - x.mean()) / x.std() for x in [*(columns[name] for name in names), y]]
        beta = np.linalg.solve(
            [[a @ b for b in z[:-1]] for a in z[:-1]], [a @ z[-1] for a in z[:-1]]
        )
        rows = found[(found["winsorized"] == 0.01) & (found["model"] == model)]
        assert tuple(rows["term"]) == names
        assert rows["coefficient"].to_numpy() == pytest.approx(beta)
        assert rows["r_squared"].iloc[0] == pytest.approx(
            beta @ [a @ z[-1] for a in z[:-1]] / len(y)
        )


def test_residuals_along_a_score_leave_nothing_over_all_positions(table):
    found = section3.residual_bins(table)
    for name, rows in found.groupby("score"):
        assert (rows["positions"] * rows["residual_mean"]).sum() == pytest.approx(0, abs=1e-10), (
            name
        )
        assert rows["positions"].sum() == len(table)
    assert (found.groupby("score").size() <= 10).all()


# Support proxies


def test_proxies_come_with_the_scripts_fall_backs(tokens):
    found = section3.support_proxies(tokens)
    overlap = tokens["topk_overlap"].to_numpy()

    assert set(found) == {
        "compatibility",
        "bhattacharyya",
        "topk_overlap",
        "topk_jaccard",
        "teacher_top1_in_topk",
        "sampled_in_topk",
        "top1_match",
        "shared_teacher_mass",
        "shared_student_mass",
    }
    assert (found["shared_teacher_mass"] == tokens["compatibility"]).all()
    assert (found["shared_student_mass"] == 1).all()
    assert found["topk_jaccard"] == pytest.approx(overlap / (2 - overlap))
    other = section3.support_proxies(tokens, k=8)
    assert (other["compatibility"] == tokens["compatibility_k8"]).all()
    assert "bhattacharyya" not in other


def test_a_proxys_gap_is_cut_and_scaled_within_q3(tokens, table):
    proxy = section3.support_proxies(tokens)["bhattacharyya"]
    row = section3.support_gaps(table, {"bhattacharyya": proxy}, draws=20).iloc[0]
    raw, y = proxy[table.in_q3], table.gain[table.in_q3]
    score = scaled(raw)
    low, high = (quantile(list(score), share) for share in (1 / 3, 2 / 3))

    assert row["positions"] == table.in_q3.sum() and row["proxy_sd"] == pytest.approx(raw.std())
    assert row["gap"] == pytest.approx(y[score >= high].mean() - y[score <= low].mean())
    assert row["low"] <= row["high"] and row["pairs"] > 0


def test_each_proxy_has_the_draws_of_its_own_seed(tokens, table):
    proxies = section3.support_proxies(tokens)
    together = section3.support_gaps(table, proxies, draws=20).set_index("proxy")
    alone = section3.support_gaps(table, {"topk_overlap": proxies["topk_overlap"]}, draws=20)

    assert alone.set_index("proxy").loc["topk_overlap"].equals(together.loc["topk_overlap"])
    # Jaccard follows from the overlap, so its thirds are the overlap's.
    assert together.loc["topk_jaccard", "gap"] == together.loc["topk_overlap", "gap"]


def test_a_constant_proxy_has_no_gap(tokens, table):
    row = section3.support_gaps(table, {"one": np.ones(len(tokens))}, draws=5).iloc[0]

    assert row["gap"] == row["low"] == row["high"] == 0 and row["pairs"] == 0
    assert np.isnan(row["matched_mean"])


def test_positions_without_a_proxy_are_left_out_and_counted(tokens, table):
    proxy = tokens["bhattacharyya"].to_numpy().copy()
    gone = table.rows[table.in_q3][:3]
    proxy[gone] = np.nan
    rows = section3.support_gaps(
        table, {"gaps": proxy, "none": np.full(len(tokens), np.nan)}, draws=5
    ).set_index("proxy")

    assert rows.loc["gaps", "positions"] == table.in_q3.sum() - 3
    assert np.isfinite(rows.loc["gaps", "gap"])
    assert rows.loc["none", "positions"] == 0 and np.isnan(rows.loc["none", "gap"])
