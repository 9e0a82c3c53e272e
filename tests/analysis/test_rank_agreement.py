import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics import criteria
from diagnostics.analysis.rank_agreement import agreement, answers
from diagnostics.core.errors import DiagnosticsError
from tests.study_tables import tokens as study_tokens

NAMES = ("divergence", "teachability", "entropy", "compatibility", "incompatible")
BUDGETS = (0.05, 0.2, 0.5)


@pytest.fixture
def tokens():
    frame = study_tokens(prompts=12, seed=5)
    frame["gain"] += 0.02
    return frame


def make_effects(tokens, value, *, draws=3, noise=0.0):
    """Interventions whose mean reduction in a cell is value(criterion, budget) on every position,
    plus noise by prompt.
    """
    rng, rows = np.random.default_rng(0), []
    by_prompt = tokens.groupby("prompt_id").agg(
        split=("split", "first"), positions=("position", "size")
    )
    for criterion in ("full", "placebo", "random", *NAMES):
        for budget in (1.0,) if criterion in ("full", "placebo") else BUDGETS:
            for draw in range(draws if criterion == "random" else 1):
                for prompt, row in by_prompt.iterrows():
                    mean = (
                        value(criterion, budget)
                        + noise * rng.normal()
                        + (draw - (draws - 1) / 2 if criterion == "random" else 0)
                    )
                    rows.append(
                        {
                            "criterion": criterion,
                            "budget": budget,
                            "draw": draw,
                            "prompt_id": prompt,
                            "split": row.split,
                            "positions": row.positions,
                            "forward_kl": mean * row.positions,
                            "reverse_kl": -mean * row.positions,
                            "js": 0.0,
                        }
                    )
    return pd.DataFrame(rows)


def captured(tokens, criterion, budget):
    step = tokens[tokens.split == "step"]
    if criterion == "random":
        return np.ceil(budget * len(step)) / len(step)
    score = criteria.score_criterion(tokens, criterion)[(tokens.split == "step").to_numpy()]
    return step.gain[criteria.select(step, score, budget=budget)].sum() / step.gain.sum()


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_an_intervention_that_follows_the_captured_gain_agrees_wholly(tokens):
    effects = make_effects(
        tokens,
        lambda criterion, budget: (
            captured(tokens, criterion, budget) if criterion in (*NAMES, "random") else 99.0
        ),
    )
    found = agreement(tokens, effects, draws=40)
    row = one(found, scope="all", x="captured_gain", y="held_out_forward_kl")
    assert (
        row.kendall == pytest.approx(1)
        and row.cells == 18
        and row.prompts == 6
        and 0.5 < row.low < 1
        and row.high == 1
    )
    assert one(
        found, scope="all", x="captured_gain", y="held_out_reverse_kl"
    ).kendall == pytest.approx(-1)
    for scope in ("within_budget", "budget_0.05", "budget_0.5"):
        assert one(
            found, scope=scope, x="captured_gain", y="step_forward_kl"
        ).kendall == pytest.approx(1)


def test_tau_is_scipys_over_cells(tokens):
    rng = np.random.default_rng(1)
    drawn = {}
    effects = make_effects(tokens, lambda *cell: drawn.setdefault(cell, rng.normal()))
    found = agreement(tokens, effects, draws=40)
    cells = [(name, budget) for name in ("random", *NAMES) for budget in BUDGETS]
    x, y = [captured(tokens, *cell) for cell in cells], [drawn[cell] for cell in cells]
    row = one(found, scope="all", x="captured_gain", y="held_out_forward_kl")
    assert (
        row.kendall == pytest.approx(stats.kendalltau(x, y).statistic)
        and row.low < row.kendall < row.high
    )
    small = [i for i, cell in enumerate(cells) if cell[1] == 0.05]
    expected = stats.kendalltau(np.array(x)[small], np.array(y)[small]).statistic
    assert one(
        found, scope="budget_0.05", x="captured_gain", y="step_forward_kl"
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
    names = ("random", *NAMES)
    for budget in BUDGETS:
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
                captured(tokens, criterion, budget) if criterion in NAMES else 0.0
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
        [captured(tokens, "random", b) for b in BUDGETS]
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
    for name in NAMES:
        score = criteria.score_criterion(tokens, name)[(tokens.split == "step").to_numpy()]
        for budget in BUDGETS:
            sums[name, budget] = step.gain[criteria.select(step, score, budget=budget)].sum()
    sums |= {
        ("random", budget): step.gain.sum() * np.ceil(budget * len(step)) / len(step)
        for budget in BUDGETS
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
            lambda t, e: (t.drop(columns=["gain", "relative_gain"]), e),
            (
                r"^The token table has no outcome, one of gain, relative_gain, positive_gain,"
                r" first_order_gain, lift\. Run the probe on it first\.$"
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
