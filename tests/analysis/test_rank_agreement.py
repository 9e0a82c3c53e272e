"""Agreement of captured gains with interventions, against a plain Kendall's tau."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import criteria
from diagnostics.analysis.rank_agreement import CellScores, agreement, answers, kendall
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from tests.made_tokens import INTERVENED_BUDGETS, INTERVENED_CRITERIA, make_effects
from tests.study_tables import tokens as study_tokens


@pytest.fixture
def tokens():
    frame = study_tokens(prompts=12, seed=5)
    frame["gain"] += 0.02
    return frame


def captured(tokens, criterion, budget):
    step = tokens[tokens.split == "step"]
    if criterion == "random":
        return np.ceil(budget * len(step)) / len(step)
    return step.gain[chosen(tokens, criterion, budget)].sum() / step.gain.sum()


def chosen(tokens, criterion, budget):
    """The mask over the step positions, scored over the whole table."""
    here = (tokens.split == "step").to_numpy()
    score, raw = (each[here] for each in criteria.score_pairs(tokens, criterion))
    return criteria.select(tokens[here], score, raw=raw, budget=budget)


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_an_intervention_that_follows_the_captured_gain_agrees_wholly(tokens):
    effects = make_effects(
        tokens,
        lambda criterion, budget: (
            captured(tokens, criterion, budget)
            if criterion in (*INTERVENED_CRITERIA, "random")
            else 99.0
        ),
    )
    found = agreement(tokens, effects, draws=40)
    row = one(found, scope="all", x="captured_gain", y="held_out_forward_kl")
    assert (
        row.kendall == pytest.approx(1)
        and row.cells == 18
        and row.p_permutation != row.p_permutation
        and row.prompts == 6
        and 0.5 < row.low < 1
        and row.high == 1
    )
    assert one(
        found, scope="all", x="captured_gain", y="held_out_reverse_kl"
    ).kendall == pytest.approx(-1)
    for scope in ("within_budget", "budget_0.05", "budget_0.5"):
        assert one(
            found, scope=scope, x="captured_gain", y="held_out_forward_kl"
        ).kendall == pytest.approx(1)


def test_tau_is_scipys_over_cells(tokens):
    rng = np.random.default_rng(1)
    drawn = {}
    effects = make_effects(tokens, lambda *cell: drawn.setdefault(cell, rng.normal()))
    found = agreement(tokens, effects, draws=40)
    cells = [
        (name, budget) for name in ("random", *INTERVENED_CRITERIA) for budget in INTERVENED_BUDGETS
    ]
    x, y = [captured(tokens, *cell) for cell in cells], [drawn[cell] for cell in cells]
    row = one(found, scope="all", x="captured_gain", y="held_out_forward_kl")
    assert (
        row.kendall == pytest.approx(stats.kendalltau(x, y).statistic)
        and row.low < row.kendall < row.high
    )
    small = [i for i, cell in enumerate(cells) if cell[1] == 0.05]
    expected = stats.kendalltau(np.array(x)[small], np.array(y)[small]).statistic
    assert one(
        found, scope="budget_0.05", x="captured_gain", y="held_out_forward_kl"
    ).kendall == pytest.approx(expected)


def test_within_budget_pools_the_pairs_of_each_budget(tokens):
    """A reduction that grows with the budget and nothing else agrees over all cells and is silent
    within a budget.
    """
    found = agreement(
        tokens, make_effects(tokens, lambda criterion, budget: budget, draws=1), draws=20
    )
    assert one(found, scope="all", x="captured_gain", y="held_out_forward_kl").kendall > 0.5
    assert np.isnan(
        one(found, scope="within_budget", x="captured_gain", y="held_out_forward_kl").kendall
    )
    rng, drawn = np.random.default_rng(2), {}
    effects = make_effects(tokens, lambda *cell: drawn.setdefault(cell, rng.normal()), draws=1)
    concordant = pairs = 0
    names = ("random", *INTERVENED_CRITERIA)
    for budget in INTERVENED_BUDGETS:
        for i, a in enumerate(names):
            for b in names[:i]:
                dx = captured(tokens, a, budget) - captured(tokens, b, budget)
                concordant += np.sign(dx) * np.sign(drawn[a, budget] - drawn[b, budget])
                pairs += 1
    row = one(
        agreement(tokens, effects, draws=20),
        scope="within_budget",
        x="captured_gain",
        y="held_out_forward_kl",
    )
    assert row.kendall == pytest.approx(concordant / pairs)


def test_noise_between_prompts_widens_the_interval(tokens):
    widths = []
    for noise in (0.01, 1.0):
        effects = make_effects(
            tokens,
            lambda criterion, budget: (
                captured(tokens, criterion, budget) if criterion in INTERVENED_CRITERIA else 0.0
            ),
            noise=noise,
        )
        row = one(
            agreement(tokens, effects, draws=200),
            scope="all",
            x="captured_gain",
            y="held_out_forward_kl",
        )
        widths.append(row.high - row.low)
    assert widths[1] > widths[0] > 0


def test_answers_rank_within_a_budget(tokens):
    effects = make_effects(
        tokens,
        lambda criterion, budget: (
            captured(tokens, criterion, budget) if criterion != "placebo" else 0.0
        ),
    )
    table = answers(tokens, effects)
    assert len(table) == 18 and not {"full", "placebo"} & set(table.criterion)
    for _, part in table.groupby("budget"):
        assert part.captured_gain_rank.min() == 1 and part.captured_gain_rank.max() <= 6
        best = part.loc[part.captured_gain.idxmax()]
        assert best.captured_gain_rank == 1 == best.held_out_forward_kl_rank
    own = table[(table.criterion == "teachability") & (table.budget == 0.2)].iloc[0]
    assert (
        own.captured_gain
        == pytest.approx(captured(tokens, "teachability", 0.2))
        == own.held_out_forward_kl
    )
    assert table[table.criterion == "random"].held_out_forward_kl.tolist() == pytest.approx(
        [captured(tokens, "random", b) for b in INTERVENED_BUDGETS]
    )


def test_offline_answers_are_compared_with_each_other(tokens):
    tokens["first_order_gain"] = tokens.gain
    tokens["lift"] = np.where(tokens.split == "step", tokens.gain, np.nan)
    effects = make_effects(tokens, lambda criterion, budget: budget)
    found = agreement(tokens, effects, outcomes=("gain", "first_order_gain", "lift"), draws=20)
    for x, y in (("gain", "first_order_gain"), ("gain", "lift"), ("first_order_gain", "lift")):
        assert one(
            found, scope="all", x=f"captured_{x}", y=f"captured_{y}"
        ).kendall == pytest.approx(1)


def test_a_total_that_is_not_positive_still_ranks(tokens):
    """Shares of such a total are undefined; which cell captured more is not."""
    tokens["gain"] -= 2 * tokens.gain[tokens.split == "step"].mean()
    step = tokens[tokens.split == "step"]
    assert step.gain.sum() < 0
    sums = {}
    for name in INTERVENED_CRITERIA:
        for budget in INTERVENED_BUDGETS:
            sums[name, budget] = step.gain[chosen(tokens, name, budget)].sum()
    sums |= {
        ("random", budget): step.gain.sum() * np.ceil(budget * len(step)) / len(step)
        for budget in INTERVENED_BUDGETS
    }
    effects = make_effects(tokens, lambda *cell: sums.get(cell, 0.0), draws=1)
    row = one(
        agreement(tokens, effects, draws=100),
        scope="all",
        x="captured_gain",
        y="held_out_forward_kl",
    )
    assert row.kendall == pytest.approx(1) and np.isfinite([row.low, row.high]).all()
    table = answers(tokens, effects)
    assert table.captured_gain.isna().all() and set(table.captured_gain_rank) == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t, e: (t.assign(split=np.where(t.split == "step", "held_out", "step")), e),
            (
                r"^Token table and interventions split the prompts differently \(the first to"
                r" differ is 'p0'\)\."
            ),
        ),
        (
            lambda t, e: (t.drop(columns="split"), e),
            r"^A comparison with interventions needs the column split; ",
        ),
        (
            lambda t, e: (
                t.drop(columns=["gain", "relative_gain", "context_gain"], errors="ignore"),
                e,
            ),
            (
                r"^The token table has no outcome, one of context_gain, gain, relative_gain,"
                r" positive_gain, first_order_gain, lift\. Run the probe on it first\.$"
            ),
        ),
        (
            lambda t, e: (t, e[e.criterion.isin(["full", "placebo"])]),
            (
                r"^The intervention table holds no cell but full and placebo\. Intervene on some"
                r" criteria first\.$"
            ),
        ),
        (
            lambda t, e: (t, e.drop(columns="draw")),
            r"^An intervention table needs the column draw; ",
        ),
    ],
)
def test_tables_that_do_not_belong_together(tokens, change, message):
    changed = change(tokens, make_effects(tokens, lambda criterion, budget: budget))
    with pytest.raises(DiagnosticsError, match=message):
        agreement(*changed, draws=5)


# --- ties, near-duplicates, permutation, horizons and step batches


def horizons(effects, *steps):
    """The interventions at each horizon; the reduction of each is the first's times 1 + k."""
    return pd.concat(
        [
            effects.assign(horizon=k, forward_kl=effects.forward_kl * (1 if not k else -1))
            for k in (0, *steps)
        ],
        ignore_index=True,
    )


def test_each_horizon_is_an_answer_of_its_own(tokens):
    effects = horizons(
        make_effects(
            tokens,
            lambda *cell: (
                captured(tokens, *cell) if cell[0] != "placebo" and cell[0] != "full" else 0.0
            ),
            draws=1,
        ),
        5,
        20,
    )
    found = agreement(tokens, effects, draws=20)
    for y, sign in (("held_out_forward_kl", 1), ("held_out_h5_forward_kl", -1)):
        row = one(found, scope="within_budget", x="captured_gain", y=y)
        assert row.kendall == pytest.approx(sign)
    assert "held_out_h20_reverse_kl" in set(found.y)
    short = effects[~((effects.horizon == 20) & (effects.criterion == "entropy"))]
    fewer = agreement(tokens, short, draws=20)
    cells = [
        one(part, scope="all", x="captured_gain", y="held_out_h20_forward_kl").cells
        for part in (found, fewer)
    ]
    assert cells[0] - cells[1] == len(INTERVENED_BUDGETS)


def test_cells_that_ties_decide_are_left_out_and_counted(tokens):
    """A third of all positions share the highest entropy, so that small budgets are a lottery."""
    tokens["student_entropy"] = np.minimum(
        tokens.student_entropy, tokens.student_entropy.quantile(0.6)
    )
    effects = make_effects(
        tokens,
        lambda *cell: (
            captured(tokens, *cell) if cell[0] in (*INTERVENED_CRITERIA, "random") else 0.0
        ),
    )
    table = answers(tokens, effects)
    unsure = table[table.ambiguous > criteria.AMBIGUOUS]
    assert set(unsure.criterion) == {"entropy"} and set(unsure.budget) == {0.05, 0.2}
    row = one(
        agreement(tokens, effects, draws=20),
        scope="all",
        x="captured_gain",
        y="held_out_forward_kl",
    )
    assert row.cells == 16 and row.cells_left_out == 2
    marked = effects.assign(ambiguous=np.where(effects.criterion == "divergence", 0.5, 0.0))
    row = one(
        agreement(tokens, marked, draws=20), scope="all", x="captured_gain", y="held_out_forward_kl"
    )
    assert row.cells == 13 and row.cells_left_out == 5


def test_near_duplicates_count_once(tokens):
    tokens["js"] = tokens.forward_kl**0.5
    rng, drawn = np.random.default_rng(3), {}
    effects = make_effects(tokens, lambda *cell: drawn.setdefault(cell, rng.normal()), draws=1)
    twin = effects[effects.criterion == "divergence"].assign(criterion="jsd")
    both = pd.concat([effects, twin], ignore_index=True)
    alone, together = (
        one(
            agreement(tokens, each, draws=20),
            scope="within_budget",
            x="captured_gain",
            y="held_out_forward_kl",
        )
        for each in (effects, both)
    )
    assert together.groups == alone.groups == 6 and together.cells == alone.cells == 18
    table = answers(tokens, both)
    assert set(table[table.criterion.isin(["jsd", "divergence"])].group) == {"divergence"}


def test_unrelated_answers_have_a_permutation_p_and_agreeing_ones_a_small_one(tokens):
    """Six labels: 720 exchanges, of which the identity always reaches the observed tau."""
    follow = make_effects(
        tokens,
        lambda *cell: (
            captured(tokens, *cell) if cell[0] in (*INTERVENED_CRITERIA, "random") else 0.0
        ),
        draws=1,
    )
    row = one(
        agreement(tokens, follow, draws=20),
        scope="within_budget",
        x="captured_gain",
        y="held_out_forward_kl",
    )
    assert row.kendall == pytest.approx(1) and 1 / 720 <= row.p_permutation < 0.02
    ps = []
    for seed in range(40):
        rng, drawn = np.random.default_rng(seed), {}
        noise = {name: rng.normal() for name in (*INTERVENED_CRITERIA, "random")}
        effects = make_effects(
            tokens,
            lambda c, b, noise=noise, drawn=drawn, rng=rng: drawn.setdefault(
                (c, b), noise.get(c, 0.0) + 0.1 * rng.normal()
            ),
            draws=1,
        )
        found = agreement(tokens, effects, outcomes=("gain",), measures=("forward_kl",), draws=2)
        ps.append(one(found, scope="within_budget", y="held_out_forward_kl").p_permutation)
    # uniform under the null: 40 draws have at most 6 of 40 below .05 with probability .997
    assert sum(p <= 0.05 for p in ps) <= 6 and np.mean(ps) > 0.3


def fold_tables(seed=0, folds=4):
    """A fold table and interventions of every fold's step, held out for the other folds."""
    tokens = study_tokens(prompts=16, seed=5).drop(columns="split")
    rng = np.random.default_rng(seed)
    tokens["fold"] = tokens.prompt_id.str[1:].astype(int) % folds
    for f in range(folds):
        for name in ("gain", "reverse_gain", "gain_permuted"):
            tokens[f"{name}_fold{f}"] = tokens.gain + 0.3 * rng.normal(size=len(tokens))
    tokens = combine(tokens)
    sizes = tokens.groupby("prompt_id").agg(n=("position", "size"), fold=("fold", "first"))
    effect = {(c, b): rng.normal() for c in INTERVENED_CRITERIA for b in (0.1, 0.3)}
    rows = [
        {
            "criterion": c,
            "budget": b,
            "draw": 0,
            "fold": f,
            "horizon": k,
            "prompt_id": prompt,
            "held_out": row.fold != f,
            "positions": row.n,
            "forward_kl": row.n * (value + 0.2 * rng.normal()),
            "reverse_kl": row.n * value,
        }
        for (c, b), value in {**effect, ("full", 1.0): 1.0}.items()
        for f in range(folds)
        for k in (0, 5)
        for prompt, row in sizes.iterrows()
    ]
    return tokens, pd.DataFrame(rows)


def test_a_fold_table_carries_its_step_batches():
    tokens, effects = fold_tables()
    found = agreement(tokens, effects, draws=20)
    row = one(found, scope="all", x="captured_context_gain", y="held_out_h5_forward_kl")
    assert row.steps == 4 and row.prompts == 16 and row.cells == 10
    held = effects[effects.held_out & (effects.horizon == 0)]
    means = held.groupby(["criterion", "budget"])[["reverse_kl", "positions"]].sum()
    table = answers(tokens, effects).set_index(["criterion", "budget"])
    expected = (means.reverse_kl / means.positions).reindex(table.index)
    np.testing.assert_allclose(table.held_out_reverse_kl, expected)
    for name in INTERVENED_CRITERIA:
        mask = criteria.select(tokens, name, budget=0.3)
        assert table.captured_gain[name, 0.3] == pytest.approx(
            tokens.gain[mask].sum() / tokens.gain.sum()
        )


def test_tau_without_a_step_batch_is_that_of_the_others():
    rng = np.random.default_rng(0)
    x, y = (
        CellScores(
            name, rng.normal(size=6), rng.normal(size=(5, 6)), 9, without_FC=rng.normal(size=(3, 6))
        )
        for name in "xy"
    )
    pairs = ~np.eye(6, dtype=bool)
    tau = kendall(x, y, pairs)
    assert tau.steps == 3
    for f in range(3):
        expected = stats.kendalltau(x.without_FC[f], y.without_FC[f]).statistic
        assert tau.without_step[f] == pytest.approx(expected)
    still = kendall(x, replace(y, without_FC=None), pairs)
    assert still.without_step[1] == pytest.approx(
        stats.kendalltau(x.without_FC[1], y.value_C).statistic
    )


def test_folds_that_differ_are_refused():
    tokens, effects = fold_tables()
    effects["held_out"] = ~effects.held_out
    with pytest.raises(DiagnosticsError, match="split the prompts differently"):
        agreement(tokens, effects, draws=5)
