"""The statistics of the claims: worked by hand, against slow loops, and what must not move them."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from statsmodels.regression.linear_model import OLS

from diagnostics import criteria
from diagnostics.analysis import claim_statistics as S
from diagnostics.analysis.claim_statistics import Positions, Support
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import Ranked
from diagnostics.analysis.splits import splits
from diagnostics.core.folds import combine
from tests.claim_tables import claim_tokens

BASE = Support("compatibility", 16, "compatibility")


@pytest.fixture(scope="module")
def tokens():
    return claim_tokens(prompts=24, length=30, reach=0.01)


@pytest.fixture(scope="module")
def at(tokens):
    return positions(tokens)


def positions(tokens):
    columns, used = S.predictors(tokens, next(splits(tokens, draws=0)), [BASE])
    taken = {name: column[used] for name, column in columns.items()}
    return Positions(taken | {"y": tokens["context_gain"].to_numpy()[used]})


# C1


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 200), rng.integers(0, 9, 200)
    assert S.spearman(Ranked(x), Ranked(y)) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert np.isnan(S.spearman(Ranked(np.ones(5)), Ranked(np.arange(5.0))))


def test_strata_by_hand():
    """Two strata's worth of D: y rises with x in one and falls in the other, at equal D."""
    held = np.repeat([1.0, 2.0], 6)
    x = np.tile(np.arange(6.0), 2)
    y = np.r_[np.arange(6.0), -np.arange(6.0)]
    found, sizes = S.by_stratum(y, x, held)
    assert np.isfinite(found).sum() == 2 and sizes.sum() == 12
    assert sorted(found[np.isfinite(found)]) == pytest.approx([-1, 1])
    assert S.within_strata(y, x, held) == pytest.approx(0, abs=1e-12)
    assert S.within_strata(x, x, held) == pytest.approx(1)


def slow_strata(y, x, held):
    """Deciles and partial rank correlations, one position at a time."""
    edges = [np.quantile(held, q) for q in np.linspace(0.1, 0.9, 9)]
    stratum = [sum(value >= edge for edge in edges) for value in held]
    total = weight = 0.0
    for number in range(10):
        here = [i for i in range(len(y)) if stratum[i] == number]
        a, b, c = (stats.rankdata([column[i] for i in here]) for column in (y, x, held))
        ab, ac, bc = (np.corrcoef(*pair)[0, 1] for pair in ((a, b), (a, c), (b, c)))
        total += len(here) * (ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2))
        weight += len(here)
    return total / weight


def test_strata_against_a_slow_loop():
    rng = np.random.default_rng(1)
    held = np.round(np.exp(rng.normal(size=400)), 2)
    x = np.round(rng.normal(size=400) - held, 1)
    y = np.round(x + rng.normal(size=400), 1)
    assert S.within_strata(y, x, held) == pytest.approx(slow_strata(y, x, held), abs=1e-12)


def test_what_d_alone_gives_is_not_taken_for_reach():
    """D still varies inside a decile, most in the outer ones; its ranks are held fixed there."""
    rng = np.random.default_rng(2)
    held = np.exp(2 * rng.normal(size=8000))
    x = -np.log(held) + 0.5 * rng.normal(size=8000)
    y = np.log(held) + 0.1 * rng.normal(size=8000)
    assert abs(S.within_strata(y, x, held)) < 0.05
    stratum = S.strata_of(held)
    plain = [stats.spearmanr(y[stratum == s], x[stratum == s])[0] for s in range(10)]
    assert np.mean(plain) < -0.25


def test_strata_are_undefined_where_nothing_varies():
    held = np.arange(100.0)
    assert np.isnan(S.within_strata(held, np.ones(100), held))
    tied = S.within_strata(np.arange(100.0), np.arange(100.0), np.ones(100))
    assert tied == pytest.approx(1), "one stratum, in which D holds nothing fixed"


def test_rank_shares_are_those_of_regressions_on_ranks():
    rng = np.random.default_rng(3)
    d, c, h = rng.normal(size=(3, 300))
    y = d + 0.5 * c * h + 0.3 * c + rng.normal(size=300)
    ranks = {name: stats.rankdata(v) for name, v in dict(d=d, c=c, h=h, y=y).items()}

    def share(*names):
        design = np.column_stack([np.ones(300), *(ranks[name] for name in names)])
        return OLS(ranks["y"], design).fit().rsquared

    alone = share("d")
    expected = [alone, share("d", "c") - alone, share("d", "h") - alone]
    expected.append(share("d", "c", "h") - alone)
    found = S.rank_shares(*(Ranked(v) for v in (y, d, c, h)))
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.isnan(S.rank_shares(*(Ranked(v) for v in (y, d, d, h)))[1])


# C2


def test_propensities_and_weights_by_hand():
    """One binary confounder: e is the share of treated at each of its values."""
    x = np.r_[np.zeros(4), np.ones(4)]
    treated = np.array([1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    logit = S.propensity(x[:, None], treated)
    assert expit(logit) == pytest.approx(np.where(x == 0, 0.25, 0.75), abs=1e-3)
    weight = S.overlap_weights(logit, treated)
    assert weight == pytest.approx(np.where(treated, 1 - expit(logit), expit(logit)), rel=1e-12)
    # Strata of equal n e (1 - e) weigh the same: (10 - 1) at 0 and (3 - 2) at 1 average to 5.
    y = np.where(treated, np.where(x == 0, 10, 3), np.where(x == 0, 1, 2)).astype(float)
    assert S.weighted_gap(y, weight, treated) == pytest.approx(5, abs=0.01)
    assert np.isnan(S.weighted_gap(y, weight * 0, treated))


def slow_logits(features, treated):
    """Gradient ascent with the same penalty, one coefficient vector."""
    scaled = (features - features.mean(0)) / features.std(0)
    design = np.column_stack([np.ones(len(scaled)), scaled])
    beta = np.zeros(design.shape[1])
    penalty = np.r_[0, np.full(scaled.shape[1], S.RIDGE)]
    for _ in range(40_000):
        slope = design.T @ (treated - expit(design @ beta)) - penalty * beta
        beta += 0.02 * slope
    return design @ beta


def test_propensities_against_a_slow_loop():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(60, 2))
    treated = rng.random(60) < expit(features[:, 0])
    assert S.propensity(features, treated) == pytest.approx(
        slow_logits(features, treated), abs=1e-6
    )
    constant = S.propensity(np.column_stack([features, np.ones(60)]), treated)
    assert constant == pytest.approx(S.propensity(features, treated), abs=1e-9)


def test_overlap_weights_balance_what_they_are_fitted_on(at):
    top, bottom = at.tertiles(BASE)
    rows = np.flatnonzero(top | bottom)
    features, weight = at.confounders(rows), at.weights(BASE)[rows]
    for column in features.T:
        gap = S.weighted_gap(column, weight, top[rows])
        assert abs(gap) < 1e-3 * column.std()


def test_the_tertiles_are_those_of_q3(tokens, at):
    assert (at.in_q3 == (criteria.quadrants(tokens) == 3)).all()
    top, bottom = at.tertiles(BASE)
    c = tokens["compatibility"].to_numpy()
    third = at.in_q3.sum() / 3
    assert abs(top.sum() - third) < 1 and abs(bottom.sum() - third) < 1
    assert c[top].min() > c[bottom].max() and at.in_q3[top | bottom].all()
    y = at.columns["y"]
    assert S.mean_gap(y, top, bottom) == pytest.approx(y[top].mean() - y[bottom].mean())
    assert np.isnan(S.mean_gap(y, top, np.zeros_like(top)))


def slow_partners(tokens, at):
    """Positions of the top tertile with a near one in the bottom, pair by pair."""
    top, bottom = at.tertiles(BASE)
    rows = np.flatnonzero(top | bottom)
    features = at.confounders(rows)
    logit = dict(zip(rows, S.propensity(features, top[rows]), strict=True))
    log_d = dict(zip(rows, features[:, 0], strict=True))

    def pooled(values):
        sides = ([values[i] for i in rows if top[i]], [values[i] for i in rows if bottom[i]])
        return np.sqrt(sum(np.var(side) for side in sides) / 2)

    reach = [0.2 * pooled(values) for values in (logit, log_d)]
    found = 0
    for i in np.flatnonzero(top):
        found += any(
            abs(logit[i] - logit[j]) <= reach[0] and abs(log_d[i] - log_d[j]) <= reach[1]
            for j in np.flatnonzero(bottom)
        )
    return found / top.sum()


def test_overlap_against_a_slow_loop():
    for slope, least, most in ((0.0, 0.7, 1.0), (1.5, 0.2, 1.0), (6.0, 0.0, 0.35)):
        tokens = claim_tokens(prompts=24, length=30, slope=slope)
        found = S.overlap(tokens, next(splits(tokens, draws=0)), BASE)
        assert found.partners == pytest.approx(slow_partners(tokens, positions(tokens)))
        assert least <= found.partners <= most
        assert found.imbalance == max(map(abs, found.after.values()))
    assert found.before["ln_divergence"] < -1 and min(found.effective) < 40


# C3


def test_the_spline_is_linear_outside_its_knots_and_as_harrell_writes_it():
    x = np.linspace(0, 10, 201)
    columns = S.spline(x, (0.05, 0.35, 0.65, 0.95))
    assert columns.shape == (201, 3) and (columns[:, 0] == x).all()
    bends = np.abs(np.diff(columns[:, 1:], n=2, axis=0)).max(axis=1)
    middle = x[1:-1]
    assert bends[(middle < 0.45) | (middle > 9.55)].max() < 1e-12 < bends.max()
    t = np.quantile(x, (0.05, 0.35, 0.65, 0.95))

    def term(value, j):
        def cube(z):
            return max(z, 0.0) ** 3

        return (
            cube(value - t[j])
            - cube(value - t[2]) * (t[3] - t[j]) / (t[3] - t[2])
            + cube(value - t[3]) * (t[2] - t[j]) / (t[3] - t[2])
        ) / (t[3] - t[0]) ** 2

    slow = [[term(value, j) for j in (0, 1)] for value in x]
    assert columns[:, 1:] == pytest.approx(np.array(slow), abs=1e-12)
    assert S.spline(np.r_[np.zeros(99), 1.0], (0.05, 0.35, 0.65, 0.95)).shape == (100, 1)


def slow_interaction(at, y):
    """All terms of the controlled C3 in one least-squares fit."""
    smooth = [
        S.spline(at.log_divergence, S.KNOTS["divergence"]),
        S.spline(at.columns["student_entropy"], S.KNOTS["entropy"]),
    ]
    c = at.score(BASE)
    held = (at.columns["relative_position"], criteria.normalize(at.columns["teacher_entropy"]))
    design = np.column_stack([at.d * c, c, np.ones(len(c)), at.d, *smooth, *held])
    scale = np.abs(design).max(axis=0)
    return np.linalg.lstsq(design / scale, y, rcond=None)[0][0] / scale[0]


def test_the_interaction_is_that_of_one_fit_with_all_terms(at):
    y = at.columns["y"]
    found = S.interaction(y, at.d, at.score(BASE), at.basis)
    assert found == pytest.approx(slow_interaction(at, y), rel=1e-6)


def test_a_planted_interaction_is_returned_whatever_the_main_effects(at):
    c, h = at.score(BASE), at.columns["student_entropy"]
    y = 3 * at.d * c - 2 * c + 5 * at.d + 0.7 * at.log_divergence - h + 1
    assert S.interaction(y, at.d, c, at.basis) == pytest.approx(3, rel=1e-6)
    moved = S.interaction(y + 100 * c - 40 * at.d, at.d, c, at.basis)
    assert moved == pytest.approx(3, rel=1e-6)
    assert np.isnan(S.interaction(y, at.d, np.full(len(y), 0.5), at.basis))


def test_the_decomposition_is_that_of_statsmodels(at):
    y, c = at.columns["y"], at.score(BASE)
    design = np.column_stack([at.paper_d * c, at.paper_d * (1 - c), at.held])
    unit = OLS(y, np.column_stack([np.ones(len(y)), design])).fit().params[1:]
    scaled = unit * design.std(0) / y.std()
    found = S.decomposition(y, at.paper_d, c, at.held)
    assert found == pytest.approx((scaled[0] - scaled[1], unit[0] - unit[1]), rel=1e-9)
    assert np.isnan(S.decomposition(np.ones(len(y)), at.paper_d, c, at.held)).all()
    assert np.isnan(S.decomposition(y, at.paper_d, np.ones(len(y)), at.held)).all()


# draws and populations


def test_everything_is_cut_anew_in_each_draw(tokens):
    """A draw's value is that of a table in which its prompts stand as often as it took them."""
    found = S.estimates(
        tokens,
        {"context_gain": ("paper", "controlled")},
        BASE,
        {},
        widened="held_out",
        bootstrap=Bootstrap(draws=2),
    )
    split = next(splits(tokens, draws=2))
    rows = []
    for prompt, times in enumerate(split.prompts.weights[1].astype(int)):
        rows += np.flatnonzero(split.prompts.codes == prompt).tolist() * times
    drawn = tokens.iloc[rows].reset_index(drop=True)
    at = positions(drawn)
    expected = S.paper_statistics(at, "y", BASE) | S.controlled_statistics(at, "y", BASE)
    for (name, _), value in expected.items():
        estimate = found[S.Statistic("held_out", "context_gain", name, "compatibility", 16)]
        assert estimate.draws[1] == pytest.approx(value, abs=1e-12), name


def test_the_steps_part_is_the_table_without_each_step(tokens):
    found = S.estimates(
        tokens,
        {"context_gain": ("controlled",)},
        BASE,
        {},
        widened="held_out",
        bootstrap=Bootstrap(draws=2),
    )
    for population, prefix in (("held_out", ""), ("step", "own_")):
        key = S.Statistic(population, "context_gain", "interaction", "compatibility", 16)
        assert found[key].steps == 4
        for fold in range(4):
            part = combine(tokens, without=fold)
            part = part.assign(context_gain=part[f"{prefix}context_gain"])
            part = part[np.isfinite(part["context_gain"])]
            at = positions(part)
            value = S.interaction(at.columns["y"], at.d, at.score(BASE), at.basis)
            assert found[key].without_step[fold] == pytest.approx(value, rel=1e-9)


def test_a_bank_where_every_position_is_tied():
    tokens = claim_tokens(prompts=24, length=10)
    flat = tokens.assign(
        forward_kl=1.0, student_entropy=1.0, teacher_entropy=1.0, compatibility=0.5
    )
    found = S.estimates(
        flat,
        {"context_gain": ("paper", "controlled")},
        BASE,
        {},
        widened="held_out",
        bootstrap=Bootstrap(draws=5),
    )
    assert all(np.isnan(estimate.value) for estimate in found.values())
    assert S.overlap(flat, next(splits(flat, draws=0)), BASE) is None


def test_an_outcome_that_is_nowhere_defined_has_no_estimate(tokens):
    found = S.estimates(
        tokens.assign(context_gain=np.nan),
        {"context_gain": ("paper",), "gain": ("paper",)},
        BASE,
        {},
        widened="held_out",
        bootstrap=Bootstrap(draws=2),
    )
    assert {(key.population, key.outcome) for key in found} == {
        ("held_out", "gain"),
        ("step", "gain"),
        ("step", "context_gain"),
    }


def test_resemblance_is_the_rank_correlation_inside_q3(tokens):
    split = next(splits(tokens, draws=0))
    other = Support("bhattacharyya", 16, "bhattacharyya")
    inside = criteria.quadrants(tokens) == 3
    expected = stats.spearmanr(tokens["compatibility"][inside], tokens["bhattacharyya"][inside])[0]
    assert S.resemblance(tokens, split, BASE, other) == pytest.approx(expected)
    holed = tokens.assign(bhattacharyya=tokens["bhattacharyya"].where(tokens.index > 3))
    assert np.isnan(S.resemblance(holed, split, BASE, other))
