import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import correlations as correlation_tables
from diagnostics.analysis import quadrants as quadrant_tables
from diagnostics.analysis import splits
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import normalize, quadrants, score_criterion
from tests.made_tokens import made_tokens

DRAWS = {"draws": 60}
NAMES = ["teachability", "divergence", "entropy", "random"]
REFERENCE = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


def one(table, **where):
    """The only row of a table with these values."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


# --- correlations
# -----------------------------------------------------------------------------------


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
        "placebo",
        "positions",
        "prompts",
    ]
    assert len(table) == 3 * 4 * 3 * 3
    for row in table.itertuples():
        part = tokens if row.split == "all" else tokens[tokens.split == row.split]
        pair = (
            pd.DataFrame(
                {
                    "x": score_criterion(tokens, row.criterion),
                    "y": tokens[row.outcome],
                    "z": tokens[f"placebo_{row.outcome}"],
                }
            )
            .loc[part.index]
            .dropna()
        )
        assert row.estimate == pytest.approx(
            REFERENCE[row.method](pair.x, pair.y).statistic, abs=1e-10
        )
        assert row.placebo == pytest.approx(
            REFERENCE[row.method](pair.x, pair.z).statistic, abs=1e-10
        )
        assert row.low < row.estimate < row.high
        assert (row.positions, row.prompts) == (len(pair), part.prompt_id[pair.index].nunique())


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
    assert (
        {"random", "tip", "q3_teachability", "fire", "iw_prefix"} <= names
        and "full" not in names
        and "projected_gradient" not in names
    )


def test_scores_are_normalised_over_the_whole_table(tokens):
    held = tokens[tokens.split == "held_out"]
    whole = correlation_tables.correlate(tokens, criteria=["teachability"], draws=5)
    alone = correlation_tables.correlate(
        held.drop(columns="split"), criteria=["teachability"], draws=5
    )
    pick = dict(outcome="gain", method="pearson")
    assert one(whole, split="held_out", **pick).estimate != one(alone, split="all", **pick).estimate


def test_without_placebo_or_split(tokens):
    table = correlation_tables.correlate(
        made_tokens(placebo=False).drop(columns="split"), criteria=["entropy"], **DRAWS
    )
    assert table.placebo.isna().all() and set(table.split) == {"all"}
    assert not len(
        correlation_tables.placebo_excess(
            correlation_tables.associate(made_tokens(placebo=False), criteria=["entropy"], draws=5),
            level=0.9,
        )
    )


def test_a_known_effect_is_found_and_an_absent_one_is_not():
    table = correlation_tables.correlate(
        made_tokens(prompts=60, learnable=1.0, incompatible=0.0, noise=0.2),
        criteria=["teachability", "random"],
        draws=200,
    )
    strong, none = (
        one(table, outcome="gain", criterion=name, split="all", method="spearman")
        for name in ("teachability", "random")
    )
    assert strong.low > 0.3 and none.low < 0 < none.high


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"drop": ["gain", "relative_gain", "reverse_gain"]},
            (
                r"^The analysis needs an outcome, one of gain, relative_gain, reverse_gain; the"
                r" table has context_id.*Run the probe on it first\.$"
            ),
        ),
        (
            {"drop": ["prompt_id"]},
            r"^the analysis needs the column prompt_id; this one has context_id",
        ),
        ({"rows": 0}, r"^The token table has no rows, so there is nothing to analyse\."),
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


def test_a_criterion_without_its_columns_and_one_from_after(tokens):
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
        quadrant_tables.q3_contrast(broken, **DRAWS),
        quadrant_tables.q3_groups(broken, **DRAWS),
        quadrant_tables.quadrant_means(broken, **DRAWS),
        quadrant_tables.matching(broken, **DRAWS),
        correlation_tables.partial_correlations(broken, criteria=NAMES, **DRAWS),
        correlation_tables.within_prompt_correlations(broken, criteria=NAMES, **DRAWS),
    ):
        value = table.iloc[:, list(table.columns).index("low") - 1].to_numpy()
        assert len(table) and (np.isfinite(value) | np.isnan(value)).all()
        known = np.isfinite(table.low)
        assert (table.low[known] <= value[known] + 1e-9).all() and (
            value[known] <= table.high[known] + 1e-9
        ).all()


def test_a_constant_score_and_a_single_prompt(tokens):
    constant = correlation_tables.correlate(
        tokens.assign(forward_kl=1.0), criteria=["divergence"], **DRAWS
    )
    assert constant.estimate.isna().all() and (constant.positions > 0).all()
    single = correlation_tables.correlate(
        tokens[tokens.prompt_id == "p1"], criteria=["divergence"], **DRAWS
    )
    gain = one(single, outcome="gain", split="all", method="pearson")
    assert (
        np.isfinite(gain.estimate) and np.isnan([gain.low, gain.high]).all() and gain.prompts == 1
    )


# --- differences, excess, partial, within
# -----------------------------------------------------------


def test_differences_are_paired_and_cover_every_pair(tokens):
    found = correlation_tables.associate(tokens, criteria=NAMES, **DRAWS)
    table = correlation_tables.correlation_differences(found, level=0.95)
    assert len(table) == 3 * 3 * 6 * 3 and set(table.method) == set(correlation_tables.METHODS)
    row = one(
        table,
        outcome="gain",
        split="all",
        criterion="teachability",
        other="divergence",
        method="spearman",
    )
    first, second = (
        next(
            a
            for a in found
            if (a.outcome, a.criterion, a.split, a.method) == ("gain", name, "all", "spearman")
        )
        for name in ("teachability", "divergence")
    )
    assert row.difference == pytest.approx(first.estimate.value - second.estimate.value)
    paired = np.std(first.estimate.draws - second.estimate.draws)
    assert paired < np.hypot(first.estimate.draws.std(), second.estimate.draws.std())
    assert row.high - row.low == pytest.approx(
        2 * stats.t.ppf(0.975, row.prompts - 1) * (first.estimate - second.estimate).standard_error
    )
    assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0)


def test_excess_over_the_placebo(tokens):
    found = correlation_tables.associate(
        tokens, criteria=["teachability"], methods=["pearson"], **DRAWS
    )
    correlations, excess = (
        correlation_tables.correlation_table(found, level=0.95),
        correlation_tables.placebo_excess(found, level=0.95),
    )
    assert excess.excess.tolist() == pytest.approx(
        (correlations.estimate - correlations.placebo).tolist()
    )


def test_partial_correlations_equal_residuals(tokens):
    table = correlation_tables.partial_correlations(
        tokens, criteria=["teachability", "entropy", "late"], **DRAWS
    )
    assert (
        set(table.method) == {"spearman", "pearson"}
        and table[table.criterion.isin(["entropy", "late"])].estimate.isna().all()
    )
    held = np.column_stack(
        [
            np.ones(len(tokens)),
            normalize(tokens.student_entropy),
            normalize(tokens.forward_kl),
            tokens.position / np.maximum(tokens.response_length - 1, 1),
        ]
    )
    rest = [
        v - held @ np.linalg.lstsq(held, v, rcond=None)[0]
        for v in (score_criterion(tokens, "teachability"), tokens.gain.to_numpy())
    ]
    row = one(table, outcome="gain", criterion="teachability", split="all", method="pearson")
    assert row.estimate == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-10)


@pytest.mark.parametrize(
    "method, oracle",
    [("spearman", stats.spearmanr), ("pearson", stats.pearsonr), ("kendall", stats.kendalltau)],
)
def test_within_prompt_correlations_equal_a_loop(tokens, method, oracle):
    table = correlation_tables.within_prompt_correlations(tokens, criteria=["divergence"], **DRAWS)
    row = one(table, outcome="gain", split="all", method=method)
    x = pd.Series(score_criterion(tokens, "divergence"))
    each = [
        oracle(x[rows.index], rows.gain).statistic
        for _, rows in tokens.groupby("prompt_id")
        if len(rows) >= 5
    ]
    assert row.estimate == pytest.approx(np.mean(each), abs=1e-10) and row.prompts == len(each)


# --- quadrants and Q3
# -------------------------------------------------------------------------------


def test_position_means_equal_a_loop(tokens):
    table = quadrant_tables.position_means(tokens, bins=4, **DRAWS)
    assert list(table.columns) == [
        "outcome",
        "split",
        "position",
        "mean",
        "low",
        "high",
        "positions",
        "prompts",
    ]
    assert sorted(table.position.unique()) == [0.125, 0.375, 0.625, 0.875]
    for row in table.itertuples():
        part = tokens if row.split == "all" else tokens[tokens.split == row.split]
        values = [
            value
            for value, t, length in zip(part[row.outcome], part.position, part.response_length)
            if min(3, int(4 * t / max(length - 1, 1))) == 4 * row.position - 0.5
            and np.isfinite(value)
        ]
        assert row.positions == len(values)
        assert row.mean == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert row.low <= row.mean <= row.high


def test_quadrant_means_equal_a_loop(tokens):
    table = quadrant_tables.quadrant_means(tokens, **DRAWS)
    assert len(table) == 3 * 3 * 5 * 4
    number = quadrants(tokens)
    for row in table[table.outcome == "gain"].itertuples():
        mask = (
            (number == int(row.quadrant[1]))
            if row.quadrant != "all"
            else np.ones(len(tokens), bool)
        )
        part = mask & ((tokens.split == row.split) | (row.split == "all")).to_numpy()
        values = tokens.gain[part].to_numpy()
        expected = {
            "mean": values.mean(),
            "median": np.median(values),
            "trimmed_mean": stats.trim_mean(values, 0.05),
            "winsorised_mean": float(stats.mstats.winsorize(values, (0.05, 0.05)).mean()),
        }[row.statistic]
        assert row.estimate == pytest.approx(expected, abs=1e-10) and row.positions == len(values)
    shares = (
        table[(table.outcome == "gain") & (table.split == "all") & (table.statistic == "mean")]
        .set_index("quadrant")
        .share
    )
    assert shares[["Q1", "Q2", "Q3", "Q4"]].sum() == pytest.approx(1) and shares["all"] == 1


def test_q3_tables_equal_a_loop(tokens):
    contrast, groups = (
        quadrant_tables.q3_contrast(tokens, **DRAWS),
        quadrant_tables.q3_groups(tokens, **DRAWS),
    )
    assert list(contrast.columns) == [
        "outcome",
        "split",
        "score",
        "groups",
        "difference",
        "low",
        "high",
        "bottom_mean",
        "top_mean",
        "placebo_difference",
        "positions",
        "prompts",
    ]
    assert list(groups.columns) == [
        "outcome",
        "split",
        "score",
        "group",
        "mean",
        "low",
        "high",
        "positions",
        "prompts",
    ]
    for split in ("all", "held_out"):
        part = tokens[(quadrants(tokens) == 3) & ((tokens.split == split) | (split == "all"))]
        score = pd.Series(score_criterion(tokens, "compatibility"))[part.index]
        share = (score.rank() - 0.5) / len(score)
        for count, name in ((3, "tertile"), (4, "quartile")):
            top, bottom = part[share >= (count - 1) / count], part[share < 1 / count]
            row = one(contrast, outcome="gain", split=split, score="compatibility", groups=name)
            assert row.top_mean == pytest.approx(
                top.gain.mean()
            ) and row.bottom_mean == pytest.approx(bottom.gain.mean())
            assert row.difference == pytest.approx(
                top.gain.mean() - bottom.gain.mean()
            ) and row.positions == len(top) + len(bottom)
            assert row.placebo_difference == pytest.approx(
                top.placebo_gain.mean() - bottom.placebo_gain.mean()
            )
        for number in (1, 2, 3):
            mean = part[(share >= (number - 1) / 3) & (share < number / 3)].gain.mean()
            assert one(groups, outcome="gain", split=split, score="compatibility", group=number)[
                "mean"
            ] == pytest.approx(mean)


def test_a_given_tertile_contrast_is_recovered():
    """Within Q3 d is near 1 and c spreads, so the top tertile gains more by the slope times the gap
    in d*c.
    """
    tokens = made_tokens(prompts=150, length=40, learnable=1.0, incompatible=0.0, noise=0.2)
    row = one(
        quadrant_tables.q3_contrast(tokens, draws=200),
        outcome="gain",
        split="all",
        score="compatibility",
        groups="tertile",
    )
    product = pd.Series(normalize(tokens.forward_kl) * normalize(tokens.compatibility))
    in_q3 = quadrants(tokens) == 3
    share = (tokens.compatibility[in_q3].rank() - 0.5) / in_q3.sum()
    truth = product[share.index[share >= 2 / 3]].mean() - product[share.index[share < 1 / 3]].mean()
    assert row.low < truth < row.high and row.low > 0.8 * truth and truth > 0.1


# --- matching
# ---------------------------------------------------------------------------------------


def test_matching_and_balance_agree(tokens):
    table, balance = quadrant_tables.matching(tokens, **DRAWS), quadrant_tables.balance(tokens)
    assert len(table) == len(balance) == 3 * 3 * 2 * 3
    pairs = table[table.outcome == "gain"].set_index(["split", "score", "replacement"]).positions
    assert (
        balance.set_index(["split", "score", "replacement"]).positions
        == pairs.loc[list(zip(balance.split, balance.score, balance.replacement))].to_numpy()
    ).all()
    assert ((table.matched >= 0) & (table.matched <= 1)).all()
    once, again = (table[table.replacement == r].positions.to_numpy() for r in (False, True))
    assert (once <= again).all() and (once < again).any()


def test_a_caliper_keeps_the_near_pairs(tokens):
    wide, near = (
        quadrant_tables.matching(tokens, caliper=c, **DRAWS)
        for c in (np.inf, correlation_tables.CALIPER)
    )
    assert (near.positions <= wide.positions).all() and (near.positions < wide.positions).any()
    assert (
        len(quadrant_tables.balance(tokens, caliper=1e-9))
        and quadrant_tables.balance(tokens, caliper=1e-9).after.isna().all()
    )


def test_balance_before_equals_the_usual_formula(tokens):
    row = one(
        quadrant_tables.balance(tokens),
        split="all",
        score="compatibility",
        covariate="forward_kl",
        replacement=True,
    )
    in_q3 = tokens[quadrants(tokens) == 3]
    share = (in_q3.compatibility.rank() - 0.5) / len(in_q3)
    d = pd.Series(normalize(tokens.forward_kl))
    top, bottom = d[share.index[share >= 2 / 3]], d[share.index[share < 1 / 3]]
    assert row.before == pytest.approx(
        (top.mean() - bottom.mean()) / np.sqrt((top.var(ddof=0) + bottom.var(ddof=0)) / 2)
    )


def test_matching_improves_balance_with_enough_positions():
    tokens = made_tokens(prompts=40, length=60)
    tokens["compatibility"] = 0.5 * normalize(tokens.student_entropy) + 0.5 * tokens.compatibility
    pick = dict(split="all", covariate="student_entropy", replacement=True)
    nearest, caliper = (
        one(quadrant_tables.balance(tokens, by=["compatibility"], caliper=c), **pick)
        for c in (np.inf, correlation_tables.CALIPER)
    )
    assert (
        abs(caliper.after) < abs(nearest.after) < 0.6 * abs(nearest.before) and nearest.before > 0.3
    )


def test_splits_carry_their_own_prompts(tokens):
    parts = {split.name: split for split in splits.splits(tokens, draws=3)}
    assert list(parts) == ["all", "step", "held_out"] and isinstance(
        parts["step"].prompts, PromptClusters
    )
    assert (
        parts["step"].prompts.count + parts["held_out"].prompts.count
        == parts["all"].prompts.count
        == 12
    )
    assert (
        parts["step"].values(tokens, "absent").shape == (parts["step"].mask.sum(),)
        and np.isnan(parts["step"].values(tokens, "absent")).all()
    )
    assert [split.name for split in splits.splits(tokens.assign(split="step"))] == ["all"]
