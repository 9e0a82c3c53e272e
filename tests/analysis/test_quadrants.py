"""Quadrants, contrasts within Q3 and matched pairs against loops, in each draw too."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import cuts, quadrants
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.splits import same_positions, splits
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from diagnostics.criteria import normalize, score_criterion
from diagnostics.criteria import quadrants as quadrant_numbers
from tests.made_tokens import made_tokens, only_row, resampled

DRAWS = {"draws": 12}
COLUMNS = {"held_out": "gain", "step": "own_gain"}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


def tertile_means(table, column, score, groups=3):
    """Means of a column in the groups of a score within Q3, and those rows' numbers."""
    part = table[quadrant_numbers(table) == 3]
    values = pd.Series(score_criterion(table, score), index=table.index)[part.index]
    share = (values.rank() - 0.5) / len(values)
    return [
        part[column][(share >= k / groups) & (share < (k + 1) / groups)].mean()
        for k in range(groups)
    ]


def location(values, name):
    values = np.sort(values[np.isfinite(values)])
    return {
        "mean": values.mean(),
        "median": np.median(values),
        "trimmed_mean": stats.trim_mean(values, 0.05),
        "winsorised_mean": float(stats.mstats.winsorize(values, (0.05, 0.05)).mean()),
    }[name]


# Over the whole table


def test_quadrant_means_equal_a_loop(tokens):
    table = quadrants.quadrant_means(tokens, **DRAWS)
    assert len(table) == 5 * 2 * 5 * 4 and (table.steps == 4).all()
    number = quadrant_numbers(tokens)
    for row in table[table.outcome == "gain"].itertuples():
        here = (
            np.ones(len(tokens), bool) if row.quadrant == "all" else number == int(row.quadrant[1])
        )
        values = tokens[COLUMNS[row.split]][here].to_numpy()
        assert row.estimate == pytest.approx(location(values, row.statistic), abs=1e-10)
        assert row.positions == len(values) and row.share == pytest.approx(here.mean())
        assert row.prompts == tokens.prompt_id[here].nunique()


def test_locations_by_hand():
    values = np.array([np.nan, 40.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -30])
    assert quadrants.plain_locations(values, 0.1) == pytest.approx([5.0, 5.0, 5.0, 5.0])
    assert np.isnan(quadrants.plain_locations(np.array([np.nan]), 0.1)).all()


def test_position_means_equal_a_loop(tokens):
    table = quadrants.position_means(tokens, bins=4, **DRAWS)
    assert sorted(table.position.unique()) == [0.125, 0.375, 0.625, 0.875]
    for row in table[table.outcome == "gain"].itertuples():
        values = [
            value
            for value, t, length in zip(
                tokens[COLUMNS[row.split]], tokens.position, tokens.response_length
            )
            if min(3, int(4 * t / max(length - 1, 1))) == 4 * row.position - 0.5
        ]
        assert row.positions == len(values)
        assert row.mean == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert row.low <= row.mean <= row.high and row.steps == 4


def test_q3_tables_equal_a_loop(tokens):
    tables = quadrants.q3_tables(tokens, bootstrap=Bootstrap(**DRAWS))
    contrast, groups = tables["q3_contrast"], tables["q3_groups"]
    pd.testing.assert_frame_equal(contrast, quadrants.q3_contrast(tokens, **DRAWS))
    pd.testing.assert_frame_equal(groups, quadrants.q3_groups(tokens, **DRAWS))
    assert len(contrast) == 5 * 2 * 4 * 2 and len(groups) == 5 * 2 * 4 * 3
    for row in contrast[contrast.outcome == "gain"].itertuples():
        count = {"tertile": 3, "quartile": 4}[row.groups]
        means = tertile_means(tokens, COLUMNS[row.split], row.score, count)
        assert (row.bottom_mean, row.top_mean) == pytest.approx((means[0], means[-1]))
        assert row.difference == pytest.approx(means[-1] - means[0])
        assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0)
    for row in groups[groups.outcome == "gain"].itertuples():
        means = tertile_means(tokens, COLUMNS[row.split], row.score)
        assert row.mean == pytest.approx(means[row.group - 1])


def test_a_given_tertile_contrast_is_recovered():
    """Within Q3 d is near 1 and c spreads, so the top tertile gains more by the slope times the gap
    in d*c.
    """
    tokens = made_tokens(
        prompts=150, length=40, learnable=1.0, incompatible=0.0, noise=0.2, step_spread=0.0
    )
    row = only_row(
        quadrants.q3_contrast(tokens, by=["compatibility"], draws=200),
        outcome="gain",
        split="held_out",
        groups="tertile",
    )
    product = normalize(tokens.forward_kl) * normalize(tokens.compatibility)
    means = tertile_means(tokens.assign(product=product), "product", "compatibility")
    truth = means[2] - means[0]
    assert row.low < truth < row.high and row.low > 0.8 * truth and truth > 0.1


# In every draw


@pytest.mark.parametrize("outcome", ["context_gain", "relative_gain"])
def test_q3_draws_make_medians_quantiles_and_tertiles_anew(tokens, outcome):
    means = quadrants._group_means(tokens, ["teachability"], [3], Bootstrap(**DRAWS))
    prompts = PromptClusters(tokens.prompt_id, **DRAWS)
    for number in (1, 2, 3):
        estimate = means[outcome, "held_out", "teachability", 3, number]
        expected = [
            tertile_means(resampled(tokens, prompts, draw), outcome, "teachability")[number - 1]
            for draw in range(12)
        ]
        assert estimate.draws == pytest.approx(expected, abs=1e-12)


def test_quadrant_draws_make_the_medians_anew(tokens):
    found = {}

    def keep(estimates, *arguments, **options):
        found.update(estimates)
        return pd.DataFrame()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadrants, "table", keep)
        quadrants.quadrant_means(tokens, **DRAWS)
    prompts = PromptClusters(tokens.prompt_id, **DRAWS)
    for draw in range(4):
        drawn = resampled(tokens, prompts, draw)
        q3 = drawn[quadrant_numbers(drawn) == 3]
        for name in quadrants.LOCATIONS:
            estimate = found["relative_gain", "step", "Q3", name]
            expected = location(q3.own_relative_gain.to_numpy(), name)
            assert estimate.draws[draw] == pytest.approx(expected, abs=1e-10)


def test_a_draw_of_one_half_leaves_the_other_half_in_place():
    """Scores of a table of one step are normalized over both halves."""
    tokens = made_tokens(folds=0)
    held, rest = (tokens[tokens.split == name] for name in ("held_out", "step"))
    means = quadrants._group_means(tokens, ["teachability"], [3], Bootstrap(**DRAWS))
    estimate = means["gain", "held_out", "teachability", 3, 3]
    prompts = PromptClusters(held.prompt_id, **DRAWS)
    for draw in range(6):
        drawn = pd.concat([resampled(held, prompts, draw), rest], ignore_index=True)
        part = drawn[(quadrant_numbers(drawn) == 3) & (drawn.split == "held_out")]
        values = pd.Series(score_criterion(drawn, "teachability"))[part.index]
        top = part.gain[(values.rank() - 0.5) / len(values) >= 2 / 3]
        assert estimate.draws[draw] == pytest.approx(top.mean(), abs=1e-12)


def test_copies_of_a_context_are_different_contexts(tokens):
    together = next(same_positions(splits(tokens, draws=3)))
    seen = []

    def statistic(drawn):
        seen.append((drawn.tokens.context_id.nunique(), len(np.unique(drawn.prompt))))
        return np.zeros(1)

    cuts.redrawn(statistic, tokens, together, ["context_id"], ["gain"])
    assert seen == [(12, 12)] * 4


def test_the_step_part_of_a_contrast_is_the_jackknife_over_steps(tokens):
    means = quadrants._group_means(tokens, ["compatibility"], [3], Bootstrap(**DRAWS))
    difference = quadrants._top_minus_bottom(means)["context_gain", "held_out", "compatibility", 3]
    without = []
    for step in range(4):
        values = tertile_means(combine(tokens, without=step), "context_gain", "compatibility")
        without.append(values[2] - values[0])
    assert difference.without_step == pytest.approx(without, abs=1e-12)


def test_equal_steps_add_nothing_to_a_held_out_contrast():
    means = quadrants._group_means(
        made_tokens(step_spread=0.0), ["compatibility"], [3], Bootstrap(**DRAWS)
    )
    for key, estimate in means.items():
        if key[1] == "held_out":
            assert estimate.step_error == pytest.approx(0, abs=1e-12)


# Matching


def slow_pairs(table, score="compatibility"):
    """(top row, bottom row, distance), pair by pair."""
    part = quadrant_numbers(table) == 3
    with np.errstate(divide="ignore"):
        covariates = np.stack(
            [
                normalize(table.student_entropy),
                np.log(table.forward_kl.to_numpy()),
                (table.position / np.maximum(table.response_length - 1, 1)).to_numpy(),
            ]
        )
    space = (covariates / covariates[:, part].std(axis=1, keepdims=True)).T
    values = pd.Series(score_criterion(table, score))[part]
    share = (values.rank() - 0.5) / len(values)
    top, bottom = share.index[share >= 2 / 3], share.index[share < 1 / 3]
    pairs = []
    for i in top:
        rivals = [j for j in bottom if table.prompt_id[j] == table.prompt_id[i]]
        if rivals:
            apart = [np.linalg.norm(space[i] - space[j]) for j in rivals]
            pairs.append((i, rivals[int(np.argmin(apart))], min(apart)))
    return pairs, len(top)


def slow_difference(table, column, caliper, score="compatibility"):
    near = [(i, j) for i, j, apart in slow_pairs(table, score)[0] if apart <= caliper]
    found = [table[column][i] - table[column][j] for i, j in near]
    found = [value for value in found if np.isfinite(value)]
    return np.mean(found) if found else np.nan


@pytest.mark.parametrize("caliper", [np.inf, 1.0])
def test_matching_equals_a_loop_over_the_table_and_in_each_draw(tokens, caliper):
    found = {}
    keep = quadrants.table

    def kept(estimates, *arguments, **options):
        found.update(estimates)
        return keep(estimates, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadrants, "table", kept)
        table = quadrants.matching(tokens, by=["compatibility"], calipers=[caliper], **DRAWS)
    pairs, top = slow_pairs(tokens)
    near = [pair for pair in pairs if pair[2] <= caliper]
    row = only_row(table, outcome="gain", split="held_out")
    assert row.difference == pytest.approx(slow_difference(tokens, "gain", caliper))
    assert (row.positions, row.matched) == (len(near), pytest.approx(len(near) / top))
    assert row.prompts == len({tokens.prompt_id[i] for i, _, _ in near}) and row.steps == 4
    prompts = PromptClusters(tokens.prompt_id, **DRAWS)
    draws = found["relative_gain", "step", "compatibility", caliper].draws
    for draw in range(6):
        drawn = resampled(tokens, prompts, draw)
        expected = slow_difference(drawn, "own_relative_gain", caliper)
        assert draws[draw] == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_matching_and_balance_agree(tokens):
    table, balance = quadrants.matching(tokens, **DRAWS), quadrants.balance(tokens)
    assert len(table) == 5 * 2 * 3 * 2 and len(balance) == 2 * 3 * 2 * 3
    assert ((table.matched >= 0) & (table.matched <= 1)).all()
    pairs = table[table.outcome == "gain"].set_index(["split", "score", "caliper"]).positions
    keys = list(zip(balance.split, balance.score, balance.caliper))
    assert balance.positions.tolist() == pairs.loc[keys].tolist()


def test_a_caliper_keeps_the_near_pairs(tokens):
    table = quadrants.matching(tokens, **DRAWS)
    wide, near = (table[table.caliper == c].positions.to_numpy() for c in quadrants.CALIPERS)
    assert (near <= wide).all() and (near < wide).any()
    none = quadrants.balance(tokens, calipers=[1e-9])
    assert len(none) and none.after.isna().all() and none.before.notna().all()


def test_balance_before_equals_the_usual_formula(tokens):
    row = only_row(
        quadrants.balance(tokens, by=["compatibility"], calipers=[np.inf]),
        split="held_out",
        covariate="log_divergence",
    )
    in_q3 = tokens[quadrant_numbers(tokens) == 3]
    share = (in_q3.compatibility.rank() - 0.5) / len(in_q3)
    d = np.log(in_q3.forward_kl)
    top, bottom = d[share >= 2 / 3], d[share < 1 / 3]
    assert row.before == pytest.approx(
        (top.mean() - bottom.mean()) / np.sqrt((top.var(ddof=0) + bottom.var(ddof=0)) / 2)
    )


def test_matching_improves_balance_with_enough_positions():
    tokens = made_tokens(prompts=20, length=300)
    tokens["compatibility"] = 0.3 * tokens.forward_kl.rank(pct=True) + 0.7 * tokens.compatibility
    table = quadrants.balance(tokens, by=["compatibility"])
    pick = dict(split="held_out", covariate="log_divergence")
    nearest, caliper = (only_row(table, caliper=c, **pick) for c in quadrants.CALIPERS)
    assert abs(caliper.after) < abs(nearest.after) < 0.6 * abs(nearest.before)
    assert nearest.before > 0.3


def test_pairs_are_told_apart_by_ln_d_where_d_is_clipped():
    """Beyond its 95 % quantile d is 1 for all; ln D still tells 8 nats from 15."""
    tokens = made_tokens(prompts=30, length=40)
    clipped = normalize(tokens.forward_kl) == 1
    assert tokens.forward_kl[clipped].max() > 1.5 * tokens.forward_kl[clipped].min()
    values = quadrants.matching_covariates(tokens)["log_divergence"]
    assert len(np.unique(values[clipped])) == clipped.sum()


# Missing columns and degenerate tables


def test_a_missing_column_is_refused(tokens):
    for make, column in (
        (quadrants.q3_contrast, "compatibility"),
        (quadrants.matching, "position"),
        (quadrants.balance, "student_entropy"),
    ):
        with pytest.raises(DiagnosticsError, match=rf"needs the column {column}; this one has"):
            make(tokens.drop(columns=column))


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.assign(forward_kl=1.0),
        lambda t: t.assign(forward_kl=0.0),
        lambda t: t.assign(gain=np.nan),
        lambda t: t[t.prompt_id == "p0"],
        lambda t: t.head(2),
        lambda t: t.assign(student_entropy=np.nan),
        lambda t: t.assign(compatibility=1.0),
    ],
)
def test_degenerate_tables_give_defined_or_missing_numbers(tokens, edit):
    broken = edit(tokens).reset_index(drop=True)
    for make, name in (
        (quadrants.q3_contrast, "difference"),
        (quadrants.q3_groups, "mean"),
        (quadrants.quadrant_means, "estimate"),
        (quadrants.matching, "difference"),
    ):
        table = make(broken, **DRAWS)
        known = np.isfinite(table.low)
        assert len(table) and not np.isinf(table[name]).any()
        assert (table.low[known] <= table[name][known] + 1e-9).all()
        assert (table[name][known] <= table.high[known] + 1e-9).all()


def test_a_table_that_states_the_released_gain_alone_is_contrasted_by_it():
    tokens = made_tokens(folds=0, split=False)
    stated = tokens.gain / (tokens.forward_kl + 1e-12)
    kept = ["context_id", "prompt_id", "position", "response_length", "token_id", "token"]
    kept += ["student_entropy", "forward_kl", "compatibility"]
    alone = quadrants.q3_contrast(
        tokens[kept].assign(relative_gain_released=stated), by=["compatibility"], **DRAWS
    )
    beside = quadrants.q3_contrast(
        tokens[[*kept, "gain"]].assign(gain=stated), by=["compatibility"], **DRAWS
    )
    assert set(alone.outcome) == {"relative_gain_released"}
    pd.testing.assert_series_equal(alone.difference, beside.difference)
