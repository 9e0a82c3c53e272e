"""Resampled clusters, correlations, regressions and matching against plain implementations."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.outliers_influence import variance_inflation_factor

from diagnostics.analysis import bootstrap, linear_model, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.rank_correlation import Controls, Variable

NAN = np.nan
CORRELATIONS = {
    "pearson": rank_correlation.pearson,
    "spearman": rank_correlation.spearman,
    "kendall": rank_correlation.kendall,
}
REFERENCE = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}


def clustered(prompts=12, least=3, most=20, seed=0, ties=False):
    """Codes and three dependent variables with prompt effects."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(prompts), rng.integers(least, most, prompts))
    x = rng.normal(size=prompts)[codes] + rng.normal(size=len(codes))
    y = 0.6 * x + rng.normal(size=prompts)[codes] + rng.standard_t(4, size=len(codes))
    z = 0.5 * x - 0.3 * y + rng.exponential(size=len(codes))
    return codes, *((np.round(v) if ties else v) for v in (x, y, z))


def drawn_rows(prompts: PromptClusters, draw: int) -> np.ndarray:
    """Rows of the data set that a draw stands for, by concatenation: the slow way."""
    return np.concatenate(
        [
            np.flatnonzero(prompts.codes == g)
            for g in range(prompts.count)
            for _ in range(int(prompts.weights[draw, g]))
        ]
    )


# Prompts and estimates


def test_sums_and_draws_by_hand():
    prompts = PromptClusters(["b", "a", "b"], draws=50, seed=1)
    assert prompts.names.tolist() == ["a", "b"] and prompts.codes.tolist() == [1, 0, 1]
    assert prompts.sums(np.array([1.0, 2.0, 4.0]), np.ones(3)).tolist() == [[2, 1], [5, 2]]
    assert prompts.sums(np.array([4.0]), at=np.array([False, False, True])).tolist() == [[0], [4]]
    assert (prompts.weights.sum(1) == 2).all() and set(prompts.weights[:, 0]) == {0, 1, 2}
    assert prompts.present(np.array([True, False, True])) == 1


def test_same_seed_same_draws_and_no_positions_resampled():
    first, again, other = (PromptClusters(list("aabbcc"), seed=s).weights for s in (3, 3, 4))
    assert (first == again).all() and (first != other).any() and first.shape == (1000, 3)
    assert PromptClusters(list("aab"), draws=0).weights.shape == (0, 2)
    assert PromptClusters(list("aabb"), draws=7).without_draws().weights.shape == (0, 2)


def test_interval_by_hand():
    draws = np.array([1.0, 3.0] * 500)
    estimate = Estimate(2.0, draws, 40, 5)
    error = np.std(draws, ddof=1) * np.sqrt(5 / 4)
    assert estimate.standard_error == pytest.approx(error)
    assert estimate.interval(0.9) == pytest.approx(
        (2 - stats.t.ppf(0.95, 4) * error, 2 + stats.t.ppf(0.95, 4) * error)
    )
    assert estimate.p_value == pytest.approx(2 * stats.t.sf(2 / error, 4))


def test_the_larger_error_is_taken():
    left_out = np.array([0.0, 4.0, 2.0, 2.0, 2.0])
    jackknife = np.sqrt(4 / 5 * 8)
    assert Estimate(
        2.0, np.array([1.99, 2.01] * 9), 40, 5, left_out=left_out
    ).standard_error == pytest.approx(jackknife)
    assert Estimate(2.0, np.array([-50.0, 50.0] * 9), 40, 5, left_out=left_out).standard_error > 50


def test_correlations_are_taken_on_fishers_scale():
    low, high = Estimate(
        0.9, np.tanh(np.arctanh(0.9) + np.array([-0.5, 0.5] * 50)), 40, 30, correlation=True
    ).interval()
    assert low < 0.9 < high < 1 and np.arctanh(high) - np.arctanh(0.9) == pytest.approx(
        np.arctanh(0.9) - np.arctanh(low)
    )


def test_interval_excludes_zero_exactly_where_the_test_rejects():
    for value in (0.5, 1.0, 2.2, 2.3, 3.0):
        estimate = Estimate(value, value + np.array([-1.0, 1.0] * 50), 9, 12)
        assert (estimate.interval(0.95)[0] > 0) == (estimate.p_value < 0.05)


@pytest.mark.parametrize(
    "estimate",
    [
        Estimate(1.0, np.arange(9.0), 4, 1),
        Estimate(1.0, np.array([1.0] + [NAN] * 9), 4, 3),
        Estimate(1.0, np.arange(9.0), 4, 3, left_out=np.array([1.0, NAN, 1.0])),
    ],
)
def test_one_prompt_or_too_few_defined_draws_have_no_interval(estimate):
    assert np.isnan([*estimate.interval(), estimate.p_value, estimate.standard_error]).all()


def test_differences_are_paired():
    prompts = PromptClusters(*[np.repeat(np.arange(10), 5)], draws=200)
    x = np.random.default_rng(0).normal(size=50) + prompts.codes
    nothing = bootstrap.mean(x, prompts) - bootstrap.mean(x + 3, prompts)
    assert nothing.value == pytest.approx(-3) and nothing.standard_error == pytest.approx(
        0, abs=1e-12
    )
    assert bootstrap.mean(x, prompts).times(-2).interval() == pytest.approx(
        tuple(-2 * v for v in reversed(bootstrap.mean(x, prompts).interval()))
    )


# Correlations


def test_kendall_by_hand():
    """Pairs of (1,1) (2,3) (3,2): two concordant, one discordant."""
    estimate = rank_correlation.kendall(
        np.array([1.0, 2, 3]), np.array([1.0, 3, 2]), PromptClusters(list("abc"))
    )
    assert estimate.value == pytest.approx(1 / 3) and (estimate.positions, estimate.prompts) == (
        3,
        3,
    )


def test_spearman_by_hand():
    """Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)."""
    assert rank_correlation.spearman(
        np.array([1, 5, 9, 10.0]), np.array([0.2, 0.1, 7, 3]), PromptClusters(list("abcd"))
    ).value == pytest.approx(0.6)


@pytest.mark.parametrize("method", CORRELATIONS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_correlations_equal_scipy(method, ties, seed):
    codes, x, y, _ = clustered(seed=seed, ties=ties)
    x[::7], y[::5] = NAN, NAN
    kept = np.isfinite(x) & np.isfinite(y)
    estimate = CORRELATIONS[method](x, y, PromptClusters(codes))
    assert abs(estimate.value - REFERENCE[method](x[kept], y[kept]).statistic) < 1e-12
    assert estimate.positions == kept.sum() and estimate.prompts == len(np.unique(codes[kept]))


@pytest.mark.parametrize("ties", ["none", "x", "y", "both"])
def test_concordance_equals_the_double_loop(ties):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 300))
    x, y = np.round(x, 0 if ties in "x both" else 9), np.round(y, 0 if ties in "y both" else 9)
    both, x_untied, y_untied = rank_correlation.concordance(
        rank_correlation.Ranked(x), rank_correlation.Ranked(y)
    )
    assert (both == (np.sign(x[:, None] - x) * np.sign(y[:, None] - y)).sum(1)).all()
    assert (x_untied == (x[:, None] != x).sum(1)).all() and (
        y_untied == (y[:, None] != y).sum(1)
    ).all()


def test_long_arrays_take_larger_blocks(monkeypatch):
    monkeypatch.setattr(rank_correlation, "LEAST_BLOCK", 4)
    x, y = np.random.default_rng(0).normal(size=(2, 700))
    both, _, _ = rank_correlation.concordance(
        rank_correlation.Ranked(x), rank_correlation.Ranked(y)
    )
    assert (both == (np.sign(x[:, None] - x) * np.sign(y[:, None] - y)).sum(1)).all()


def test_pearson_draws_and_left_out_equal_recomputation():
    codes, x, y, _ = clustered()
    prompts = PromptClusters(codes, draws=20)
    estimate = rank_correlation.pearson(x, y, prompts)
    for draw in range(20):
        at = drawn_rows(prompts, draw)
        assert estimate.draws[draw] == pytest.approx(np.corrcoef(x[at], y[at])[0, 1], abs=1e-12)
    for g in range(prompts.count):
        assert estimate.left_out[g] == pytest.approx(
            np.corrcoef(x[prompts.codes != g], y[prompts.codes != g])[0, 1], abs=1e-12
        )


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_approximate_draws_stay_near_recomputation(method):
    codes, x, y, _ = clustered(prompts=30)
    prompts = PromptClusters(codes, draws=200)
    estimate = CORRELATIONS[method](x, y, prompts)
    anew = [
        REFERENCE[method](x[at], y[at]).statistic
        for at in (drawn_rows(prompts, draw) for draw in range(200))
    ]
    assert np.corrcoef(estimate.draws, anew)[0, 1] > 0.97
    assert estimate.draws.std() == pytest.approx(np.std(anew), rel=0.1)
    left = [REFERENCE[method](x[codes != g], y[codes != g]).statistic for g in range(30)]
    assert np.std(estimate.left_out) == pytest.approx(np.std(left), rel=0.06)


@pytest.mark.parametrize("method", CORRELATIONS)
def test_correlations_keep_their_invariants(method):
    codes, x, y, _ = clustered()
    prompts, function = PromptClusters(codes, draws=30), CORRELATIONS[method]
    base = function(x, y, prompts)
    assert function(y, x, prompts).value == pytest.approx(base.value)
    assert function(-x, y, prompts).value == pytest.approx(-base.value)
    assert function(x, x, prompts).interval() == pytest.approx((1, 1))
    order = np.random.default_rng(0).permutation(len(x))
    assert function(
        x[order], y[order], PromptClusters(codes[order], draws=30)
    ).interval() == pytest.approx(base.interval())
    if method != "pearson":
        assert function(np.exp(x), y**3, prompts).value == pytest.approx(base.value)


@pytest.mark.parametrize("method", CORRELATIONS)
@pytest.mark.parametrize(
    "x, y",
    [
        ([1.0, 1, 1, 1], [1.0, 2, 3, 4]),
        ([1.0, 2, NAN, NAN], [1.0, 2, 3, 4]),
        ([NAN] * 4, [1.0, 2, 3, 4]),
        ([2.0] * 4, [2.0] * 4),
    ],
)
def test_constant_or_missing_columns_are_undefined(method, x, y):
    estimate = CORRELATIONS[method](np.array(x), np.array(y), PromptClusters(list("aabb")))
    assert (
        np.isnan([estimate.value, *estimate.interval()]).all()
        and estimate.positions == np.isfinite(x).sum()
    )


def test_one_prompt_has_a_value_and_no_interval():
    codes, x, y, _ = clustered(prompts=1, least=10)
    for function in CORRELATIONS.values():
        estimate = function(x, y, PromptClusters(codes))
        assert np.isfinite(estimate.value) and np.isnan(estimate.interval()).all()


def test_a_variable_ranks_once_per_mask():
    variable = Variable([3.0, 1.0, NAN, 2.0])
    mask = np.array([True, True, False, True])
    assert variable.ranked(mask) is variable.ranked(mask.copy()) and variable.ranked(
        mask
    ).average.tolist() == [3, 1, 2]
    assert variable.ranked(np.array([True, False, False, True])).average.tolist() == [2, 1]


def test_ranks_within_groups():
    ranked = rank_correlation.Ranked(np.array([5.0, 1, 1, 4, 9]), within=np.array([1, 0, 0, 1, 0]))
    assert ranked.average.tolist() == [2, 1.5, 1.5, 1, 3]


@pytest.mark.parametrize(
    "method, oracle",
    [("spearman", stats.spearmanr), ("pearson", stats.pearsonr), ("kendall", stats.kendalltau)],
)
def test_within_prompts_equals_a_loop(method, oracle):
    codes, x, y, _ = clustered(ties=True)
    x[3] = NAN
    frame = pd.DataFrame({"g": codes, "x": x, "y": y}).dropna()
    each = [
        oracle(part.x, part.y).statistic
        for _, part in frame.groupby("g")
        if len(part) >= 5 and part.x.nunique() > 1 and part.y.nunique() > 1
    ]
    estimate = rank_correlation.within_prompts(x, y, PromptClusters(codes), method=method)
    assert estimate.value == pytest.approx(np.mean(each), abs=1e-12) and estimate.prompts == len(
        each
    )
    error = np.std(each, ddof=1) / np.sqrt(len(each))
    assert estimate.standard_error == pytest.approx(error, rel=0.08)


def test_within_prompts_ignores_differences_between_prompts():
    codes = np.repeat(np.arange(6), 8)
    x = np.tile(np.arange(8.0), 6)
    between = np.random.default_rng(0).normal(size=6)[codes] * 100
    for method in ("spearman", "pearson", "kendall"):
        assert rank_correlation.within_prompts(
            x + between, -x + between, PromptClusters(codes), method=method
        ).value == pytest.approx(-1)
        assert np.isnan(
            rank_correlation.within_prompts(between, x, PromptClusters(codes), method=method).value
        )


def test_partial_by_hand():
    """(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2))."""
    codes, x, y, z = clustered()
    r = np.corrcoef([x, y, z])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert rank_correlation.partial(
        x, y, Controls([z]), PromptClusters(codes), ranked=False
    ).value == pytest.approx(expected, abs=1e-12)
    assert rank_correlation.partial(
        x, y, Controls([np.ones_like(z)]), PromptClusters(codes), ranked=False
    ).value == pytest.approx(r[0, 1])


def test_partial_equals_residuals_of_ranks_and_keeps_near_recomputation():
    codes, x, y, z = clustered(prompts=25)
    w = np.random.default_rng(9).normal(size=len(x))

    def loop(at):
        rx, ry, rz, rw = (stats.rankdata(v[at]) for v in (x, y, z, w))
        design = sm.add_constant(np.column_stack([rz, rw]))
        return np.corrcoef(sm.OLS(rx, design).fit().resid, sm.OLS(ry, design).fit().resid)[0, 1]

    prompts = PromptClusters(codes, draws=100)
    estimate = rank_correlation.partial(x, y, Controls([z, w]), prompts)
    assert estimate.value == pytest.approx(loop(np.arange(len(x))), abs=1e-10)
    anew = [loop(drawn_rows(prompts, draw)) for draw in range(100)]
    assert estimate.draws.std() == pytest.approx(np.std(anew), rel=0.1)


def test_partial_recovers_a_given_value_and_is_undefined_for_a_control():
    rng = np.random.default_rng(0)
    z, e, f = rng.normal(size=(3, 40_000))
    x, y = z + e, 2 * z + 0.6 * e + 0.8 * f
    prompts = PromptClusters(np.arange(40_000) // 100, draws=100)
    assert rank_correlation.partial(
        x, y, Controls([z]), prompts, ranked=False
    ).value == pytest.approx(0.6, abs=0.02)
    assert np.isnan(
        rank_correlation.partial(3 * z + 1, y, Controls([z]), prompts, ranked=False).value
    )


# Means


def test_mean_and_its_interval_by_hand():
    """Two prompts with means 1 and 4, of one and two positions."""
    prompts = PromptClusters(list("abb"), draws=4000)
    estimate = bootstrap.mean(np.array([1.0, 3, 5]), prompts)
    assert estimate.value == 3 and estimate.left_out.tolist() == [4, 1]
    assert set(np.round(estimate.draws, 9)) == {1, 3, 4}


def test_mean_draws_equal_recomputation():
    codes, x, *_ = clustered()
    x[::6] = NAN
    prompts = PromptClusters(codes, draws=15)
    assert bootstrap.mean(x, prompts).draws == pytest.approx(
        [np.nanmean(x[drawn_rows(prompts, draw)]) for draw in range(15)]
    )


def test_mean_difference_equals_recomputation_and_changes_sign():
    codes, x, y, _ = clustered()
    prompts, top, bottom = PromptClusters(codes, draws=15), y > 1, y < -1
    estimate = bootstrap.mean_difference(x, prompts, top, bottom)
    assert estimate.value == pytest.approx(x[top].mean() - x[bottom].mean())
    rows = [drawn_rows(prompts, draw) for draw in range(15)]
    assert estimate.draws == pytest.approx(
        [x[r][top[r]].mean() - x[r][bottom[r]].mean() for r in rows]
    )
    assert bootstrap.mean_difference(x, prompts, bottom, top).interval() == pytest.approx(
        tuple(-v for v in reversed(estimate.interval()))
    )
    assert np.isnan(bootstrap.mean_difference(x, prompts, top, np.zeros_like(top)).value)


def test_groups_are_equal_and_ties_stay_together():
    score = np.array([5.0, 1, 3, 2, 4, 6, NAN])
    assert rank_correlation.groups_by_rank(score, 3, np.ones(7, bool)).tolist() == [
        3,
        1,
        2,
        1,
        2,
        3,
        0,
    ]
    assert rank_correlation.groups_by_rank(
        np.array([1.0, 1, 1, 2, 3, 4]), 3, np.ones(6, bool)
    ).tolist() == [1, 1, 1, 2, 3, 3]
    assert rank_correlation.groups_by_rank(np.ones(4), 3, np.ones(4, bool)).tolist() == [2, 2, 2, 2]
    assert rank_correlation.groups_by_rank(score, 10, score < 3).tolist() == [0, 3, 0, 8, 0, 0, 0]
    assert not rank_correlation.groups_by_rank(score, 3, np.zeros(7, bool)).any()


def test_winsorise_by_hand_and_leaves_nan():
    values = np.array([0.0, 1, 2, 3, 100, NAN])
    assert bootstrap.winsorize(values, 0.25).tolist()[:5] == [1, 1, 2, 3, 3] and np.isnan(
        bootstrap.winsorize(values, 0.25)[5]
    )
    assert (
        bootstrap.winsorize(values, 0)[4] == 100
        and np.isnan(bootstrap.winsorize(np.array([NAN]), 0.1)).all()
    )


def test_locations_by_hand():
    found = bootstrap.locations(
        np.array([9.0, 1, 2, 3, 100, 4, 5, 6, 7, 8]),
        PromptClusters(np.arange(10)),
        np.ones(10, bool),
        share=0.1,
    )
    assert found["median"].value == 5.5 and found["trimmed_mean"].value == 5.5
    assert found["winsorised_mean"].value == pytest.approx((2 + 44 + 9) / 10)


@pytest.mark.parametrize("prompts, most", [(8, 6), (12, 400)])
def test_location_draws_equal_recomputation(prompts, most):
    codes, x, y, _ = clustered(prompts=prompts, most=most)
    x[0], mask = NAN, y > -1
    group = PromptClusters(codes, draws=60)
    found = bootstrap.locations(x, group, mask, share=0.1)
    kept = np.isfinite(x) & mask
    drawn = [x[r][kept[r]] for r in (drawn_rows(group, draw) for draw in range(60))]
    assert found["median"].value == np.median(x[kept])
    assert found["median"].draws == pytest.approx([np.median(v) for v in drawn], abs=1e-12)
    anew = np.array(
        [
            [stats.trim_mean(v, 0.1), float(stats.mstats.winsorize(v, (0.1, 0.1)).mean())]
            for v in drawn
        ]
    )
    for i, name in enumerate(["trimmed_mean", "winsorised_mean"]):
        assert np.corrcoef(found[name].draws, anew[:, i])[0, 1] > 0.98
        assert found[name].draws.std() == pytest.approx(anew[:, i].std(), rel=0.12)
    assert np.isnan(bootstrap.locations(x, group, np.zeros_like(mask))["median"].value)


def test_design_effect_and_effective_clusters():
    codes = np.repeat(np.arange(200), 10)
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=200)[codes], rng.normal(size=2000)
    prompts = PromptClusters(codes)
    assert bootstrap.design_effect(shared, prompts) == pytest.approx(
        10, rel=0.1
    ) and bootstrap.design_effect(own, prompts) == pytest.approx(1, rel=0.2)
    assert np.isnan(bootstrap.design_effect(np.ones(2000), prompts))
    assert (
        bootstrap.effective_clusters([5, 5, 5]) == 3
        and bootstrap.effective_clusters([9, 1]) == pytest.approx(100 / 82)
        and bootstrap.effective_clusters([0]) == 0
    )


# Regression


def test_regression_equals_statsmodels():
    codes, x, y, z = clustered(prompts=15)
    z[4] = NAN
    found = linear_model.regress(y, {"x": x, "z": z}, PromptClusters(codes, draws=30))
    kept = np.isfinite(z)
    scaled = [(v[kept] - v[kept].mean()) / v[kept].std() for v in (x, z, y)]
    design = sm.add_constant(np.column_stack(scaled[:2]))
    reference = sm.OLS(scaled[2], design).fit(
        cov_type="cluster", cov_kwds={"groups": codes[kept]}, use_t=True
    )
    jackknife = sm.OLS(scaled[2], design).fit(
        cov_type="cluster-crv3", cov_kwds={"groups": codes[kept]}, use_t=True
    )
    for i, term in enumerate(["x", "z"], 1):
        estimate = found.coefficients[term]
        assert estimate.value == pytest.approx(reference.params[i], abs=1e-10)
        assert found.robust_error[term] == pytest.approx(reference.bse[i], abs=1e-10)
        left_out = np.sqrt(14 / 15 * np.sum((estimate.left_out - estimate.value) ** 2))
        assert (
            left_out == pytest.approx(jackknife.bse[i], abs=1e-10)
            and estimate.standard_error >= left_out - 1e-12
        )
        assert found.inflation[term] == pytest.approx(
            variance_inflation_factor(design, i), abs=1e-10
        )
    assert found.r_squared.value == pytest.approx(reference.rsquared, abs=1e-10)
    assert found.fitted[kept] == pytest.approx(reference.fittedvalues, abs=1e-10) and np.isnan(
        found.fitted[4]
    )


def test_regression_draws_equal_recomputation():
    codes, x, y, z = clustered()
    prompts = PromptClusters(codes, draws=10)
    found = linear_model.regress(y, {"x": x, "z": z}, prompts, robust=False)
    scaled = [(v - v.mean()) / v.std() for v in (x, z, y)]
    for draw in range(10):
        at = drawn_rows(prompts, draw)
        fit = sm.OLS(
            scaled[2][at], sm.add_constant(np.column_stack([v[at] for v in scaled[:2]]))
        ).fit()
        assert found.coefficients["z"].draws[draw] == pytest.approx(fit.params[2], abs=1e-9)
        assert found.r_squared.draws[draw] == pytest.approx(fit.rsquared, abs=1e-9)
    assert np.isnan(found.robust_error["x"])


def test_regression_without_an_answer():
    codes, x, y, _ = clustered()
    prompts = PromptClusters(codes)
    assert linear_model.regress(y, {"x": x, "twice": 2 * x + 1}, prompts) is None
    assert linear_model.regress(y, {"x": np.ones_like(x)}, prompts) is None
    assert linear_model.regress(y, {"x": np.where(np.arange(len(x)) < 3, x, NAN)}, prompts) is None
    one = linear_model.regress(y, {"x": x}, PromptClusters(np.zeros(len(x))))
    assert (
        np.isfinite(one.coefficients["x"].value)
        and np.isnan(one.robust_error["x"])
        and np.isnan(one.coefficients["x"].p_value)
    )


def test_regression_of_a_constant_outcome_is_zero_with_an_undefined_fit():
    codes, x, *_ = clustered()
    found = linear_model.regress(np.full_like(x, 4.0), {"x": x}, PromptClusters(codes))
    assert (
        found.coefficients["x"].value == 0
        and np.isnan(found.r_squared.value)
        and np.isnan(found.coefficients["x"].p_value)
    )


def test_inverse_of_dependent_columns_is_nan_and_of_others_exact():
    good = np.array([[4.0, 1], [1, 9]]) * 1e-12
    found = linear_model.inverse(np.stack([good, [[1.0, 2], [2, 4]], np.zeros((2, 2))]))
    assert found[0] @ good == pytest.approx(np.eye(2)) and np.isnan(found[1:]).all()


def test_holm_equals_statsmodels_and_skips_nan():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.9])
    assert bootstrap.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert bootstrap.holm([0.02, NAN, 0.03]).tolist()[::2] == pytest.approx(
        [0.04, 0.04]
    ) and np.isnan(bootstrap.holm([0.02, NAN])[1])
    assert np.isnan(bootstrap.holm([NAN])).all() and len(bootstrap.holm([])) == 0


# Calibration in small


def test_clusters_widen_the_interval_and_independent_positions_do_not():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(60), 20)
    shared = rng.normal(size=60)[codes] + 0.1 * rng.normal(size=1200)
    own = rng.normal(size=1200)
    naive = np.std(shared) / np.sqrt(1200)
    assert bootstrap.mean(shared, PromptClusters(codes)).standard_error > 3 * naive
    assert bootstrap.mean(own, PromptClusters(codes)).standard_error == pytest.approx(
        np.std(own) / np.sqrt(1200), rel=0.35
    )


def test_tests_reject_a_clustered_null_at_about_five_percent():
    """A small edition of benchmarks/calibration.py: 300 data sets of 20 prompts; the naive test
    rejects often.
    """
    reported = naive = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        codes = np.repeat(np.arange(20), rng.integers(5, 30, 20))
        x, y = (rng.normal(size=20)[codes] + rng.normal(size=len(codes)) for _ in range(2))
        reported += (
            rank_correlation.spearman(x, y, PromptClusters(codes, draws=200, seed=seed)).p_value
            < 0.05
        )
        naive += stats.spearmanr(x, y).pvalue < 0.05
    assert 0.015 < reported / 300 < 0.095 and naive / 300 > 0.25
