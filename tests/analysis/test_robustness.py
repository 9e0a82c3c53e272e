import numpy as np
import pytest
from scipy import stats

from diagnostics.analysis import quadrants as quadrant_tables
from diagnostics.analysis import regressions
from diagnostics.analysis import robustness as R
from diagnostics.criteria import quadrants, score_criterion
from tests.analysis.test_correlations import one
from tests.made_tokens import made_tokens

DRAWS = {"draws": 40}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


@pytest.fixture(scope="module")
def found(tokens):
    return R.findings(tokens, **DRAWS)


def test_the_statistics_are_those_of_the_other_tables(tokens, found):
    mine = {
        f.statistic: f.estimate.value
        for f in found
        if (f.proxy, f.outcome, f.split, f.k) == ("compatibility", "gain", "all", 16)
    }
    assert mine["tertile_difference"] == pytest.approx(
        one(
            quadrant_tables.q3_contrast(tokens, draws=5),
            outcome="gain",
            split="all",
            score="compatibility",
            groups="tertile",
        ).difference
    )
    assert mine["matched_difference"] == pytest.approx(
        one(
            quadrant_tables.matching(tokens, draws=5),
            outcome="gain",
            split="all",
            score="compatibility",
            replacement=True,
        ).difference
    )
    test = regressions.regressions(tokens, draws=5)["decomposition"]
    assert mine["decomposition"] == pytest.approx(
        one(test, outcome="gain", split="all", winsorised=0.0, scale="standardised").difference
    )
    assert mine["decomposition_per_unit"] == pytest.approx(
        one(test, outcome="gain", split="all", winsorised=0.0, scale="per_unit").difference
    )
    rho = {
        (name, y): stats.spearmanr(score_criterion(tokens, name), tokens[y]).statistic
        for name in ("teachability", "divergence")
        for y in ("gain", "placebo_gain")
    }
    gap = {y: rho["teachability", y] - rho["divergence", y] for y in ("gain", "placebo_gain")}
    assert mine["spearman_difference"] == pytest.approx(gap["gain"] - gap["placebo_gain"])


def test_without_a_placebo_the_plain_difference(tokens):
    bare = tokens.drop(columns=["placebo_gain"])
    mine = next(
        f
        for f in R.findings(bare, **DRAWS)
        if f.statistic == "spearman_difference" and f.outcome == "gain" and f.split == "all"
    )
    rho = [
        stats.spearmanr(score_criterion(tokens, name), tokens.gain).statistic
        for name in ("teachability", "divergence")
    ]
    assert mine.estimate.value == pytest.approx(rho[0] - rho[1])


def test_every_proxy_and_k_of_the_columns(tokens):
    assert R.supports(tokens) == [
        ("compatibility", 16, "compatibility"),
        ("topk_overlap", 16, "topk_overlap"),
        ("compatibility", 8, "compatibility_k8"),
        ("topk_overlap", 8, "topk_overlap_k8"),
    ]
    assert R.supports(tokens, base_k=8) == [
        ("compatibility", 8, "compatibility"),
        ("topk_overlap", 8, "topk_overlap"),
    ]


def test_support_table(tokens, found):
    table = R.support_robustness(found, level=0.95)
    assert list(table.columns) == [
        "proxy",
        "k",
        "outcome",
        "split",
        "statistic",
        "estimate",
        "low",
        "high",
        "p_value",
        "positions",
        "prompts",
    ]
    assert len(table) == 4 * 3 * 3 * 4 and "spearman_difference" not in set(table.statistic)
    row = one(
        table,
        proxy="compatibility",
        k=8,
        outcome="gain",
        split="all",
        statistic="tertile_difference",
    )
    in_q3 = tokens[quadrants(tokens) == 3]
    share = (in_q3.compatibility_k8.rank() - 0.5) / len(in_q3)
    assert row.estimate == pytest.approx(
        in_q3.gain[share >= 2 / 3].mean() - in_q3.gain[share < 1 / 3].mean()
    )


def test_the_same_support_twice_gives_the_same_numbers(tokens):
    twin = tokens.assign(compatibility_k8=tokens.compatibility)
    table = R.support_robustness(R.findings(twin, **DRAWS), level=0.95)
    first, second = (
        table[(table.proxy == "compatibility") & (table.k == k)]
        .drop(columns="k")
        .reset_index(drop=True)
        for k in (16, 8)
    )
    assert first.equals(second)


def test_gain_table(tokens):
    table = R.gain_robustness(tokens, losses={"forward_kl": made_tokens(seed=5)}, **DRAWS)
    assert list(dict.fromkeys(table.variant)) == [
        "nothing",
        "winsorised_0.01",
        "winsorised_0.05",
        "no_special_tokens",
        "no_first_position",
        "neither",
        "loss_forward_kl",
    ]
    assert set(table.statistic) == set(R.STATISTICS) and set(
        table[table.variant == "nothing"].outcome
    ) == {"gain", "relative_gain", "reverse_gain"}
    pick = dict(outcome="gain", split="all", statistic="tertile_difference")
    kept = tokens[~tokens.is_special & (tokens.position > 0)].reset_index(drop=True)
    alone = one(
        quadrant_tables.q3_contrast(kept, draws=5),
        outcome="gain",
        split="all",
        score="compatibility",
        groups="tertile",
    )
    assert one(table, variant="neither", **pick).estimate == pytest.approx(alone.difference)
    assert one(table, variant="neither", **pick).estimate != pytest.approx(
        one(table, variant="nothing", **pick).estimate
    )


def test_one_wild_gain_moves_the_raw_and_not_the_winsorised_contrast(tokens):
    in_q3 = np.flatnonzero(quadrants(tokens) == 3)
    wild = tokens.copy()
    wild.loc[in_q3[np.argmax(tokens.compatibility[in_q3])], "gain"] = 1e3
    pick = dict(outcome="gain", split="all", statistic="tertile_difference")
    before, after = (R.gain_robustness(t, **DRAWS) for t in (tokens, wild))
    assert abs(one(after, variant="nothing", **pick).estimate) > 10
    assert one(after, variant="winsorised_0.05", **pick).estimate == pytest.approx(
        one(before, variant="winsorised_0.05", **pick).estimate, abs=0.3
    )


def test_a_table_of_special_tokens_and_first_positions_alone(tokens):
    table = R.gain_robustness(tokens.assign(is_special=True, position=0), **DRAWS)
    assert set(table.variant) == {"nothing", "winsorised_0.01", "winsorised_0.05"}


def test_saturation_by_hand(tokens):
    values = np.r_[np.ones(len(tokens) - 2), 0.0, np.nan]
    row = one(R.saturation(tokens.assign(compatibility=values)), measurement="compatibility")
    assert (row.q50, row.q05, row.undefined, row.distinct, row.positions) == (
        1.0,
        1.0,
        1,
        2,
        len(tokens) - 1,
    )
    assert row.at_low == 1.0 and row.at_high == pytest.approx(1 - 1 / (len(tokens) - 1))
    table = R.saturation(tokens)
    assert "gain" not in set(table.measurement) and "position" not in set(table.measurement)
    spread = one(table, measurement="forward_kl")
    assert spread.q95 == pytest.approx(
        np.quantile(tokens.forward_kl, 0.95)
    ) and spread.at_low == pytest.approx(0.05, abs=0.02)
    assert np.isnan(
        one(R.saturation(tokens.assign(forward_kl=np.nan)), measurement="forward_kl").q50
    )


def test_coverage_by_hand(tokens):
    table = R.coverage(tokens, draws=200)
    row = one(table, outcome="relative_gain", split="all")
    sizes = tokens[tokens.relative_gain.notna()].groupby("prompt_id").size().to_numpy()
    assert (
        row.undefined == tokens.relative_gain.isna().sum()
        and row.positions == tokens.relative_gain.notna().sum()
    )
    assert (
        row.effective_prompts == pytest.approx(sizes.sum() ** 2 / (sizes**2).sum())
        and row.contexts == 12
    )
    assert row.effective_positions == pytest.approx(row.positions / row.design_effect)
