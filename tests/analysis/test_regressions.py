"""Regressions against statsmodels, and residual curves against plain least squares."""

import numpy as np
import pytest
import statsmodels.api as sm

from diagnostics.analysis import regressions as R
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from diagnostics.criteria import normalize, relative_position
from tests.made_tokens import made_tokens, only_row, resampled

DRAWS = {"draws": 30}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


@pytest.fixture(scope="module")
def tables(tokens):
    return R.regressions(tokens, **DRAWS)


def columns(tokens):
    h, d, c = (
        normalize(tokens[name]) for name in ("student_entropy", "forward_kl", "compatibility")
    )
    return {
        "student_entropy": h,
        "divergence": d,
        "entropy_x_divergence": h * d,
        "position": relative_position(tokens),
        "teacher_entropy": normalize(tokens.teacher_entropy),
        "compatibility": c,
        "teachability": d * c,
        "incompatible": d * (1 - c),
    }


def z(values):
    return (values - values.mean()) / values.std()


def fitted(model, table, column, share, made=None):
    """statsmodels' fit of one model, with the table's own standard deviations and limits."""
    y = table[column].to_numpy()
    finite = np.isfinite(y)
    y = np.clip(y[finite], *np.quantile(y[finite], [share, 1 - share]))
    made = columns(table) if made is None else made
    design = np.column_stack([z(made[name][finite]) for name in R.MODELS[model]])
    return sm.OLS(z(y), sm.add_constant(design)).fit(), y


@pytest.mark.parametrize("split, column", [("held_out", "context_gain"), ("step", "own_gain")])
@pytest.mark.parametrize("model", R.MODELS)
@pytest.mark.parametrize("share", R.WINSORISED)
def test_models_equal_statsmodels(tokens, tables, model, share, split, column):
    fit, _ = fitted(model, tokens, column, share)
    for i, term in enumerate(R.MODELS[model], 1):
        row = only_row(
            tables["regressions"],
            outcome=column.removeprefix("own_"),
            split=split,
            winsorised=share,
            model=model,
            term=term,
        )
        assert row.coefficient == pytest.approx(fit.params[i], abs=1e-10)
        assert row.r_squared == pytest.approx(fit.rsquared, abs=1e-10)
        assert row.low < row.coefficient < row.high and row.steps == 4
        assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0)
        others = [name for name in R.MODELS[model] if name != term]
        made = columns(tokens)
        explained = sm.OLS(
            made[term], sm.add_constant(np.column_stack([made[name] for name in others]))
        ).fit()
        assert row.inflation == pytest.approx(1 / (1 - explained.rsquared), rel=1e-8)


def kept_estimates(tokens, **settings):
    """The estimates behind the tables, by key."""
    found = {}

    def keep(make, table, bootstrap):
        made = over_steps(make, table, bootstrap)
        found.update(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R, "over_steps", keep)
        R.regressions(tokens, **settings)
    return found


def test_draws_make_limits_and_normalizations_anew(tokens):
    found = kept_estimates(tokens, draws=6)
    prompts = PromptClusters(tokens.prompt_id, draws=6)
    for draw in range(6):
        drawn = resampled(tokens, prompts, draw)
        for outcome in ("context_gain", "relative_gain"):
            key = (outcome, "held_out", 0.05)
            fit, y = fitted("decomposition", drawn, outcome, 0.05)
            for i, term in enumerate(R.MODELS["decomposition"], 1):
                estimate = found["coefficient", *key, "decomposition", term]
                assert estimate.draws[draw] == pytest.approx(fit.params[i], abs=1e-9)
            finite = np.isfinite(drawn[outcome])
            sides = [columns(drawn)[name][finite].std() for name in R.CURVE_SCORES[1:]]
            unit = fit.params[2:4] * y.std() / sides
            difference = found["difference", *key, "per_unit"].draws[draw]
            assert difference == pytest.approx(unit[0] - unit[1], abs=1e-9)


def test_the_step_part_is_the_jackknife_over_steps(tokens):
    found = kept_estimates(tokens, draws=4)
    estimate = found["difference", "gain", "step", 0.0, "standardised"]
    for step, value in enumerate(estimate.without_step):
        fit, _ = fitted("decomposition", combine(tokens, without=step), "own_gain", 0.0)
        assert value == pytest.approx(fit.params[2] - fit.params[3], abs=1e-10)
    still = kept_estimates(made_tokens(step_spread=0.0), draws=4)
    assert still["r_squared", "gain", "held_out", 0.0, "interaction"].step_error < 1e-12


def test_r_squared_gain_is_over_the_interaction_model(tables):
    rows = tables["regressions"].query(
        "outcome == 'gain' and split == 'held_out' and winsorised == 0"
    )
    base, more = (
        only_row(rows, model=model, term="student_entropy")
        for model in ("interaction", "compatibility")
    )
    assert more.r_squared_gain == pytest.approx(more.r_squared - base.r_squared)
    assert more.r_squared_gain > 0 and np.isnan(base.r_squared_gain)
    assert more.r_squared_gain_low < more.r_squared_gain < more.r_squared_gain_high


def test_the_decomposition_test_is_the_difference_of_its_coefficients(tables, tokens):
    pick = dict(outcome="gain", split="held_out", winsorised=0.0)
    first, second = (
        only_row(tables["regressions"], model="decomposition", term=term, **pick).coefficient
        for term in ("teachability", "incompatible")
    )
    test = only_row(tables["decomposition"], scale="standardised", **pick)
    assert test.difference == pytest.approx(first - second) and test.steps == 4
    per_unit = only_row(tables["decomposition"], scale="per_unit", **pick)
    scale = tokens.gain.std(ddof=0)
    expected = (
        first * scale / columns(tokens)["teachability"].std()
        - second * scale / columns(tokens)["incompatible"].std()
    )
    assert per_unit.difference == pytest.approx(expected)


def test_a_given_difference_of_slopes_is_recovered():
    given = dict(prompts=120, length=40, noise=0.3, step_spread=0.0)
    found = R.regressions(made_tokens(learnable=1.2, incompatible=0.5, **given), draws=100)
    pick = dict(outcome="gain", split="held_out", winsorised=0.0, scale="per_unit")
    row = only_row(found["decomposition"], **pick)
    assert row.low < 0.7 < row.high and row.high - row.low < 0.25
    equal = R.regressions(made_tokens(learnable=0.8, incompatible=0.8, **given), draws=100)
    row = only_row(equal["decomposition"], **pick)
    assert row.low < 0 < row.high


def test_another_support_takes_the_place_of_compatibility(tokens):
    found = R.terms(tokens, substitute={"compatibility": "topk_overlap"})
    assert found["compatibility"] == pytest.approx(normalize(tokens.topk_overlap))
    with pytest.raises(
        DiagnosticsError,
        match=r"^Criterion 'compatibility' reads gain, which is known only after the step",
    ):
        R.terms(tokens, substitute={"compatibility": "gain"})
    assert found["teachability"] + found["incompatible"] == pytest.approx(found["divergence"])


def test_teacher_entropy_may_be_missing_and_compatibility_may_not(tokens):
    rows = R.regressions(tokens.drop(columns="teacher_entropy"), draws=5)["regressions"]
    assert "teacher_entropy" not in set(rows.term) and set(rows.model) == set(R.MODELS)
    with pytest.raises(
        DiagnosticsError,
        match=r"^A regression of the gain needs the column compatibility; this one has ",
    ):
        R.regressions(tokens.drop(columns="compatibility"), draws=5)


def test_models_that_cannot_be_fitted_have_no_rows(tokens):
    rows = R.regressions(tokens.assign(compatibility=1.0), draws=5)["regressions"]
    assert set(rows.model) == {"interaction"}
    assert not len(R.regressions(tokens.head(4), draws=5)["regressions"])


# Residual curves


def test_decile_means_of_the_residual_equal_a_loop(tokens):
    table = R.residual_curves(tokens, **DRAWS)
    made = columns(tokens)
    held = np.column_stack([np.ones(len(tokens)), *(made[name] for name in R.HELD_TERMS)])
    rest = tokens.gain - held @ np.linalg.lstsq(held, tokens.gain, rcond=None)[0]
    for score in R.CURVE_SCORES:
        rows = table.query(
            "outcome == 'gain' and split == 'held_out' and curve == 'decile' and score == @score"
        )
        tenth = np.ceil(
            (np.argsort(np.argsort(made[score], kind="stable")) + 0.5) / len(tokens) * 10
        )
        if len(np.unique(made[score])) == len(tokens):
            assert rows.residual.tolist() == pytest.approx(
                rest.groupby(tenth).mean().tolist(), abs=1e-10
            )
        assert rows["at"].is_monotonic_increasing and len(rows) <= 10
    known = table[table.low.notna()]
    assert (
        set(known.curve) == {"decile", "spline"}
        and (known.low <= known.residual).all()
        and len(known) > 300
    )


def test_ranks_of_the_curves_count_half_of_what_is_equal():
    assert R._ranks([0.0, 1.0, 2.0, 5.0], np.array([1.0, 1.0, 2.0, 3.0])) == [0, 0.25, 0.625, 1.0]


def test_points_of_the_spline_lie_at_equal_distances_in_rank():
    x = np.random.default_rng(3).exponential(size=500) ** 3
    prompts = PromptClusters(np.arange(500) // 10, draws=5)
    points = R.residual_curve(x, x, [np.arange(500.0)], prompts)["spline"]
    ranks = R._ranks([at for at, _ in points], x)
    assert len(points) == R.GRID and np.ptp(np.diff(ranks)) < 0.01


def test_deciles_of_untied_scores_equal_a_loop():
    rng = np.random.default_rng(0)
    x, y, control = rng.normal(size=(3, 300))
    points = R.residual_curve(x, y, [control], PromptClusters(np.arange(300) // 10, draws=20))[
        "decile"
    ]
    held = np.column_stack([np.ones(300), control])
    rest = y - held @ np.linalg.lstsq(held, y, rcond=None)[0]
    tenth = np.argsort(np.argsort(x)) // 30
    assert [e.value for _, e in points] == pytest.approx(
        [rest[tenth == k].mean() for k in range(10)], abs=1e-10
    )
    assert [at for at, _ in points] == pytest.approx([x[tenth == k].mean() for k in range(10)])


def test_draws_of_the_curve_refit_the_residual():
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(6), 20)
    x, y, control = rng.normal(size=(3, 120))
    prompts = PromptClusters(codes, draws=3, seed=2)
    points = R.residual_curve(x, y, [control], prompts)["decile"]
    tenth = np.argsort(np.argsort(x)) // 12
    for draw in range(3):
        at = np.concatenate(
            [
                np.flatnonzero(codes == g)
                for g in range(6)
                for _ in range(int(prompts.weights[draw, g]))
            ]
        )
        held = np.column_stack([np.ones(len(at)), control[at]])
        rest = y[at] - held @ np.linalg.lstsq(held, y[at], rcond=None)[0]
        present = [k for k in range(10) if (tenth[at] == k).any()]
        if len(present) == 10:
            assert [e.draws[draw] for _, e in points] == pytest.approx(
                [rest[tenth[at] == k].mean() for k in range(10)], abs=1e-9
            )


def test_the_spline_follows_a_bent_curve_and_is_flat_for_none():
    rng = np.random.default_rng(0)
    x, control = rng.random((2, 6000))
    prompts = PromptClusters(np.arange(6000) // 30, draws=50)
    bent = R.residual_curve(
        x, np.sin(4 * x) + 0.5 * control + 0.1 * rng.normal(size=6000), [control], prompts
    )["spline"]
    target = np.array([np.sin(4 * at) for at, _ in bent]) - np.sin(4 * x).mean()
    assert np.array([e.value for _, e in bent]) == pytest.approx(target, abs=0.03)
    flat = R.residual_curve(x, 0.5 * control + 0.1 * rng.normal(size=6000), [control], prompts)[
        "spline"
    ]
    assert max(abs(e.value) for _, e in flat) < 0.02


def test_few_distinct_scores_have_deciles_and_no_spline():
    rng = np.random.default_rng(0)
    curves = R.residual_curve(
        (rng.random(200) < 0.5).astype(float),
        rng.normal(size=200),
        [rng.normal(size=200)],
        PromptClusters(np.arange(200) // 10, draws=5),
    )
    assert set(curves) == {"decile"} and len(curves["decile"]) == 2
    assert (
        R.residual_curve(rng.random(10), rng.random(10), [], PromptClusters(np.arange(10), draws=5))
        == {}
    )
