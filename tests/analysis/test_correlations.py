"""Correlations against plain pandas loops, draw by draw, and their degenerate cases."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import correlations as correlation_tables
from diagnostics.analysis import rank_correlation, splits
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.rank_correlation import Variable
from diagnostics.analysis.splits import STATED_GAIN
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from diagnostics.criteria import normalize, score_criterion
from tests.made_tokens import made_tokens, only_row, resampled

DRAWS = {"draws": 40}
NAMES = ["teachability", "divergence", "entropy", "random"]
REFERENCE = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}
OUTCOMES = ["context_gain", "gain", "gain_permuted", "reverse_gain", "relative_gain"]
PREFIX = {"held_out": "", "step": "own_", "all": ""}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


def test_correlations_equal_a_pandas_loop(tokens):
    table = correlation_tables.correlate(tokens, criteria=NAMES, **DRAWS)
    assert list(table.columns) == [
        "outcome",
        "criterion",
        "split",
        "method",
        "estimate",
        "low",
        "high",
        "p_value",
        "positions",
        "prompts",
        "steps",
    ]
    assert list(dict.fromkeys(table.outcome)) == OUTCOMES
    assert list(dict.fromkeys(table.split)) == ["held_out", "step"]
    assert len(table) == 2 * 4 * (5 + 2 * 3)
    for row in table.itertuples():
        y = tokens[PREFIX[row.split] + row.outcome]
        pair = pd.DataFrame({"x": score_criterion(tokens, row.criterion), "y": y}).dropna()
        assert row.estimate == pytest.approx(
            REFERENCE[row.method](pair.x, pair.y).statistic, abs=1e-10
        )
        assert row.low < row.estimate < row.high
        assert (row.positions, row.prompts) == (len(pair), tokens.prompt_id[pair.index].nunique())
        assert row.steps == 4
        assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0)


def test_the_halves_of_a_table_of_one_step_and_a_table_without_halves():
    halves = made_tokens(folds=0)
    table = correlation_tables.correlate(halves, criteria=["divergence"], **DRAWS)
    assert list(dict.fromkeys(table.split)) == ["held_out", "step"]
    assert (table.steps == 1).all()
    part = halves[halves.split == "held_out"]
    score = pd.Series(score_criterion(halves, "divergence"))[part.index]
    row = only_row(
        table, outcome="gain", criterion="divergence", split="held_out", method="spearman"
    )
    assert row.estimate == pytest.approx(stats.spearmanr(score, part.gain).statistic)
    whole = made_tokens(folds=0, split=False)
    table = correlation_tables.correlate(whole, criteria=["divergence"], **DRAWS)
    assert set(table.split) == {"all"}


def test_without_a_permuted_teacher_there_is_no_null_and_no_context_gain():
    table = correlation_tables.correlate(made_tokens(permuted=False), criteria=["entropy"], **DRAWS)
    assert set(table.outcome) == {"gain", "reverse_gain", "relative_gain"}


def test_aliases_seeds_and_levels(tokens):
    first, again = (
        correlation_tables.correlate(tokens, criteria=["dlearn_high"], seed=1, **DRAWS)
        for _ in range(2)
    )
    pd.testing.assert_frame_equal(first, again)
    other = correlation_tables.correlate(tokens, criteria=["dlearn_high"], seed=2, **DRAWS)
    assert (first.estimate == other.estimate).all() and (first.low != other.low).any()
    wide = correlation_tables.correlate(
        tokens, criteria=["dlearn_high"], seed=1, level=0.99, **DRAWS
    )
    assert (wide.low < first.low).all() and (wide.high > first.high).all()


def test_all_criteria_of_the_columns_but_full(tokens):
    names = set(correlation_tables.correlate(tokens, draws=5).criterion)
    assert {"random", "tip", "q3_teachability", "fire", "iw_prefix"} <= names
    assert "full" not in names and "projected_gradient" not in names


def test_scores_are_normalised_over_both_halves():
    tokens = made_tokens(folds=0)
    held = tokens[tokens.split == "held_out"]
    whole = correlation_tables.correlate(tokens, criteria=["teachability"], draws=5)
    alone = correlation_tables.correlate(
        held.drop(columns="split"), criteria=["teachability"], draws=5
    )
    pick = dict(outcome="gain", method="pearson")
    assert (
        only_row(whole, split="held_out", **pick).estimate
        != only_row(alone, split="all", **pick).estimate
    )


def test_a_known_effect_is_found_and_an_absent_one_is_not():
    table = correlation_tables.correlate(
        made_tokens(prompts=60, learnable=1.0, incompatible=0.0, noise=0.2),
        criteria=["teachability", "random"],
        draws=200,
    )
    strong, none = (
        only_row(table, outcome="gain", criterion=name, split="held_out", method="spearman")
        for name in ("teachability", "random")
    )
    assert strong.low > 0.3 and none.low < 0 < none.high


# Ranks made anew in every draw


def test_draws_and_left_out_values_rank_the_resampled_rows():
    """Ties, gaps, and prompts of one position: each draw equals scipy on its own rows."""
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(9), rng.integers(1, 8, 9))
    scores = {
        "tied": rng.integers(0, 4, len(codes)).astype(float),
        "free": rng.normal(size=len(codes)),
        "gaps": np.where(rng.random(len(codes)) < 0.3, np.nan, rng.normal(size=len(codes))),
    }
    outcomes = {
        "whole": rng.normal(size=len(codes)),
        "part": np.where(rng.random(len(codes)) < 0.2, np.nan, rng.normal(size=len(codes))),
    }
    prompts = PromptClusters(codes, draws=15)
    found = rank_correlation.spearman_pairs(
        {name: Variable(x) for name, x in scores.items()},
        {name: Variable(y) for name, y in outcomes.items()},
        prompts,
    )
    assert set(found) == {(y, x) for y in outcomes for x in scores}
    for (outcome, score), estimate in found.items():
        x, y = scores[score], outcomes[outcome]
        both = np.isfinite(x) & np.isfinite(y)
        assert estimate.value == pytest.approx(stats.spearmanr(x[both], y[both]).statistic)
        assert estimate.positions == both.sum()
        for draw, weights in zip(estimate.draws, prompts.weights, strict=True):
            rows = np.concatenate(
                [
                    np.tile(np.flatnonzero((codes == g) & both), int(w))
                    for g, w in enumerate(weights)
                ]
            )
            assert draw == pytest.approx(stats.spearmanr(x[rows], y[rows]).statistic, abs=1e-12)
        for prompt, left in enumerate(estimate.left_out):
            kept = both & (codes != prompt)
            assert left == pytest.approx(stats.spearmanr(x[kept], y[kept]).statistic, abs=1e-12)


def test_a_constant_has_no_rank_correlation_in_any_draw():
    prompts = PromptClusters(np.repeat(np.arange(5), 4), draws=7)
    found = rank_correlation.spearman_pairs(
        {"flat": Variable(np.ones(20))}, {"y": Variable(np.arange(20.0))}, prompts
    )["y", "flat"]
    assert np.isnan(found.value) and np.isnan(found.draws).all() and np.isnan(found.interval()[0])


def test_ranking_anew_is_wider_where_one_prompt_decides_the_ranks():
    """Ranks made once take the other prompts' places as given."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(20), 10)
    x = rng.normal(size=20)[codes] + 0.01 * rng.normal(size=200)
    y = rng.normal(size=200)
    prompts = PromptClusters(codes, draws=300)
    anew = rank_correlation.spearman_pairs({"x": Variable(x)}, {"y": Variable(y)}, prompts)[
        "y", "x"
    ]
    once = rank_correlation.spearman(x, y, prompts)
    assert anew.value == pytest.approx(once.value, abs=1e-12)
    assert anew.draws.std() != pytest.approx(once.draws.std(), rel=1e-3)


# The step batches


def test_the_step_part_is_the_jackknife_over_steps(tokens):
    found = correlation_tables.associate(tokens, criteria=["divergence"], **DRAWS)
    score = score_criterion(tokens, "divergence")
    for (outcome, _, split, method), estimate in found.items():
        without = [
            _correlation(method, score, combine(tokens, without=f)[PREFIX[split] + outcome])
            for f in range(4)
        ]
        assert estimate.without_step == pytest.approx(without, abs=1e-10)


def _correlation(method, score, y):
    y = y.to_numpy()
    kept = np.isfinite(y)
    return REFERENCE[method](score[kept], y[kept]).statistic


def test_equal_steps_add_nothing_to_a_held_out_interval():
    same = made_tokens(step_spread=0.0)
    found = correlation_tables.associate(same, criteria=["divergence"], **DRAWS)
    for (outcome, _, split, _), estimate in found.items():
        if split == "held_out":
            assert estimate.step_error == pytest.approx(0, abs=1e-12), outcome


def test_the_names_of_the_folds_change_nothing(tokens):
    order = np.array([2, 0, 3, 1])
    named = tokens.assign(fold=order[tokens.fold].astype("int32"))
    for name in ("gain", "reverse_gain", "gain_permuted"):
        named = named.assign(
            **{f"{name}_fold{order[f]}": tokens[f"{name}_fold{f}"] for f in range(4)}
        )
    first, second = (
        correlation_tables.correlate(t, criteria=NAMES, **DRAWS) for t in (tokens, combine(named))
    )
    numbers = first.select_dtypes("number").columns
    np.testing.assert_allclose(first[numbers], second[numbers], atol=1e-10)


# Tables that cannot be analyzed, and degenerate ones


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"drop": [*OUTCOMES, STATED_GAIN]},
            (
                r"^The analysis needs an outcome, one of context_gain, gain, reverse_gain,"
                r" relative_gain; the table has context_id.*Run the probe on it first\.$"
            ),
        ),
        (
            {"drop": ["prompt_id"]},
            r"^the analysis needs the column prompt_id; this one has context_id",
        ),
        ({"rows": 0}, r"^The token table has no rows, so there is nothing to analyze\."),
    ],
)
def test_tables_that_cannot_be_analysed(tokens, change, message):
    broken = tokens.drop(columns=change.get("drop", [])).head(change.get("rows", 9))
    with pytest.raises(DiagnosticsError, match=message):
        correlation_tables.correlate(broken, criteria=["entropy"], draws=5)


def test_positions_without_a_prompt_are_refused(tokens):
    broken = tokens.assign(prompt_id=tokens.prompt_id.where(tokens.index > 2))
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^3 positions have no prompt_id, so their cluster is not known\. Fill it in, or drop"
            r" them\.$"
        ),
    ):
        correlation_tables.correlate(broken, criteria=["entropy"], draws=5)


def test_a_criterion_without_its_columns(tokens):
    with pytest.raises(DiagnosticsError, match=r"^Criterion 'jsd' needs the column js;"):
        correlation_tables.correlate(tokens, criteria=["jsd"], draws=5)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.assign(forward_kl=1.0),
        lambda t: t.assign(gain=np.nan),
        lambda t: t.assign(gain=0.0),
        lambda t: t[t.prompt_id == "p0"],
        lambda t: t.head(2),
        lambda t: t.assign(student_entropy=np.nan),
        lambda t: t.assign(compatibility=1.0),
    ],
)
def test_degenerate_tables_give_defined_or_missing_numbers(tokens, edit):
    broken = edit(tokens).reset_index(drop=True)
    for table in (
        correlation_tables.correlate(broken, criteria=NAMES, **DRAWS),
        correlation_tables.partial_correlations(broken, criteria=NAMES, **DRAWS),
        correlation_tables.within_prompt_correlations(broken, criteria=NAMES, **DRAWS),
    ):
        known = np.isfinite(table.low)
        assert len(table) and not np.isinf(table.estimate).any()
        assert (table.low[known] <= table.estimate[known] + 1e-9).all()
        assert (table.estimate[known] <= table.high[known] + 1e-9).all()


def test_a_constant_score_and_a_single_prompt(tokens):
    constant = correlation_tables.correlate(
        tokens.assign(forward_kl=1.0), criteria=["divergence"], **DRAWS
    )
    assert constant.estimate.isna().all() and (constant.positions > 0).all()
    single = correlation_tables.correlate(
        tokens[tokens.prompt_id == "p1"], criteria=["divergence"], **DRAWS
    )
    gain = only_row(single, outcome="gain", split="held_out", method="pearson")
    assert np.isfinite(gain.estimate) and np.isnan([gain.low, gain.high]).all()
    assert gain.prompts == 1


# Differences, partial, within


def test_differences_are_paired_and_cover_every_pair(tokens):
    found = correlation_tables.associate(tokens, criteria=NAMES, **DRAWS)
    table = correlation_tables.correlation_differences(found, level=0.95)
    assert len(table) == 5 * 2 * 6 and set(table.method) == {"spearman"}
    row = only_row(
        table, outcome="gain", split="held_out", criterion="teachability", other="divergence"
    )
    first, second = (
        found["gain", name, "held_out", "spearman"] for name in ("teachability", "divergence")
    )
    assert row.difference == pytest.approx(first.value - second.value)
    paired = np.std(first.draws - second.draws)
    assert paired < np.hypot(first.draws.std(), second.draws.std())
    low, high = (first - second).interval(0.95)
    assert (row.low, row.high) == pytest.approx((low, high))
    assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0) and row.steps == 4


def test_partial_correlations_equal_residuals(tokens):
    table = correlation_tables.partial_correlations(
        tokens, criteria=["teachability", "entropy", "late"], **DRAWS
    )
    assert set(table.method) == {"spearman", "pearson"}
    assert table[table.criterion.isin(["entropy", "late"])].estimate.isna().all()
    held = np.column_stack(
        [
            np.ones(len(tokens)),
            normalize(tokens.student_entropy),
            normalize(tokens.forward_kl),
            tokens.position / np.maximum(tokens.response_length - 1, 1),
        ]
    )
    for split, column in (("held_out", "context_gain"), ("step", "own_context_gain")):
        rest = [
            v - held @ np.linalg.lstsq(held, v, rcond=None)[0]
            for v in (score_criterion(tokens, "teachability"), tokens[column].to_numpy())
        ]
        row = only_row(
            table, outcome="context_gain", criterion="teachability", split=split, method="pearson"
        )
        assert row.estimate == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-10)


@pytest.mark.parametrize(
    "method, oracle",
    [("spearman", stats.spearmanr), ("pearson", stats.pearsonr), ("kendall", stats.kendalltau)],
)
def test_within_prompt_correlations_equal_a_loop(tokens, method, oracle):
    table = correlation_tables.within_prompt_correlations(tokens, criteria=["divergence"], **DRAWS)
    row = only_row(table, outcome="gain", split="held_out", method=method)
    x = pd.Series(score_criterion(tokens, "divergence"))
    each = [
        oracle(x[rows.index], rows.gain).statistic
        for _, rows in tokens.groupby("prompt_id")
        if len(rows) >= 5
    ]
    assert row.estimate == pytest.approx(np.mean(each), abs=1e-10) and row.prompts == len(each)


# Populations


def test_populations_of_the_same_positions_stand_together(tokens):
    folds = list(splits.same_positions(splits.splits(tokens, draws=3)))
    assert [[split.name for split in group] for group in folds] == [["held_out", "step"]]
    halves = list(splits.same_positions(splits.splits(made_tokens(folds=0), draws=3)))
    assert [[split.name for split in group] for group in halves] == [["held_out"], ["step"]]


def test_the_permuted_gain_stands_after_the_gain(tokens):
    assert splits.outcomes_and_null(tokens) == OUTCOMES
    assert splits.outcomes_and_null(tokens.drop(columns=["gain", "relative_gain"])) == [
        "context_gain",
        "reverse_gain",
        "gain_permuted",
    ]


def test_rows_of_a_table_hold_key_value_interval_and_counts(tokens):
    split = next(splits.splits(tokens, draws=9))
    estimate = rank_correlation.pearson(
        split.values(tokens, "gain"), tokens.forward_kl, split.prompts
    )
    row = splits.table(
        {("a", 1): estimate}, ("x", "y"), 0.9, named="rho", tested=True, more={("a", 1): {"z": 7}}
    ).iloc[0]
    assert row.index.tolist() == (
        ["x", "y", "rho", "low", "high", "p_value", "z", "positions", "prompts", "steps"]
    )
    assert (row.x, row.y, row.rho, row.z) == ("a", 1, estimate.value, 7)
    assert (row.low, row.high) == estimate.interval(0.9)


def test_resampled_rows_are_those_of_the_draw(tokens):
    """The helper of the oracles: copies of a prompt have names of their own."""
    prompts = PromptClusters(tokens.prompt_id, draws=2)
    drawn = resampled(tokens, prompts, 1)
    sizes = tokens.groupby("prompt_id").size()
    assert len(drawn) == sum(
        int(w) * sizes[name] for w, name in zip(prompts.weights[1], prompts.names)
    )
    assert drawn.prompt_id.nunique() == prompts.count
