import numpy as np
import pytest
import statsmodels.api as sm

from diagnostics.analysis import regressions as R
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import normalize, relative_position
from tests.analysis.test_correlations import one
from tests.made_tokens import made_tokens

DRAWS = {"draws": 60}


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


@pytest.mark.parametrize("model", R.MODELS)
@pytest.mark.parametrize("share", R.WINSORISED)
def test_models_equal_statsmodels(tokens, tables, model, share):
    y = tokens.gain.to_numpy()
    y = np.clip(y, *np.quantile(y, [share, 1 - share]))
    names = R.MODELS[model]
    design = np.column_stack([z(columns(tokens)[name]) for name in names])
    fit = sm.OLS(z(y), sm.add_constant(design)).fit(
        cov_type="cluster", cov_kwds={"groups": tokens.prompt_id.factorize()[0]}, use_t=True
    )
    for i, term in enumerate(names, 1):
        row = one(
            tables["regressions"],
            outcome="gain",
            split="all",
            winsorised=share,
            model=model,
            term=term,
        )
        assert row.coefficient == pytest.approx(
            fit.params[i], abs=1e-10
        ) and row.robust_error == pytest.approx(fit.bse[i], abs=1e-10)
        assert row.r_squared == pytest.approx(fit.rsquared, abs=1e-10)
        assert row.low < row.coefficient < row.high and (row.p_value < 0.05) == (
            row.low > 0 or row.high < 0
        )


def test_r_squared_gain_is_over_the_interaction_model(tables):
    rows = tables["regressions"].query("outcome == 'gain' and split == 'all' and winsorised == 0")
    base, more = (
        one(rows, model=model, term="student_entropy") for model in ("interaction", "compatibility")
    )
    assert (
        more.r_squared_gain == pytest.approx(more.r_squared - base.r_squared)
        and more.r_squared_gain > 0
    )
    assert np.isnan(base.r_squared_gain)


def test_the_decomposition_test_is_the_difference_of_its_coefficients(tables, tokens):
    rows = tables["regressions"].query(
        "outcome == 'gain' and split == 'all' and winsorised == 0 and model == 'decomposition'"
    )
    first, second = (one(rows, term=term).coefficient for term in ("teachability", "incompatible"))
    test = one(
        tables["decomposition"], outcome="gain", split="all", winsorised=0.0, scale="standardised"
    )
    assert test.difference == pytest.approx(first - second)
    per_unit = one(
        tables["decomposition"], outcome="gain", split="all", winsorised=0.0, scale="per_unit"
    )
    scale = tokens.gain.std(ddof=0)
    expected = (
        first * scale / columns(tokens)["teachability"].std()
        - second * scale / columns(tokens)["incompatible"].std()
    )
    assert per_unit.difference == pytest.approx(expected)


def test_a_given_difference_of_slopes_is_recovered():
    tokens = made_tokens(prompts=120, length=40, learnable=1.2, incompatible=0.5, noise=0.3)
    found = R.regressions(tokens, draws=100)["decomposition"]
    row = one(found, outcome="gain", split="all", winsorised=0.0, scale="per_unit")
    assert row.low < 0.7 < row.high and row.high - row.low < 0.25
    equal = R.regressions(
        made_tokens(prompts=120, length=40, learnable=0.8, incompatible=0.8), draws=100
    )["decomposition"]
    row = one(equal, outcome="gain", split="all", winsorised=0.0, scale="per_unit")
    assert row.low < 0 < row.high


def test_another_support_takes_the_place_of_compatibility(tokens):
    found = R.terms(tokens, substitute={"compatibility": "topk_overlap"})
    assert found["compatibility"] == pytest.approx(normalize(tokens.topk_overlap))
    with pytest.raises(
        DiagnosticsError,
        match="^Criterion 'compatibility' reads gain, which is known only after the step",
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


# --- residual curves
# --------------------------------------------------------------------------------


def test_decile_means_of_the_residual_equal_a_loop(tokens):
    table = R.residual_curves(tokens, **DRAWS)
    made = columns(tokens)
    held = np.column_stack([np.ones(len(tokens)), *(made[name] for name in R.HELD)])
    rest = tokens.gain - held @ np.linalg.lstsq(held, tokens.gain, rcond=None)[0]
    for score in R.CURVE_SCORES:
        rows = table.query(
            "outcome == 'gain' and split == 'all' and curve == 'decile' and score == @score"
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
