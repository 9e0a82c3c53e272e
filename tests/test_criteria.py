"""Every criterion equals its formula; the registry, selections, ties and quadrants."""

import itertools
import re
from math import ceil, exp, sqrt

import numpy as np
import pandas as pd
import pytest

from diagnostics import criteria as C
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import (
    criterion,
    find,
    normalize,
    quadrants,
    ranking,
    score_criterion,
    select,
)
from tests.made_tokens import made_tokens

NAN = float("nan")


def table(n=40, seed=0):
    """Every column that a built-in criterion reads."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, n)
    codes = np.repeat(np.arange(n), size)[:n]
    place = np.concatenate([np.arange(k) for k in np.bincount(codes)])
    advantage = rng.normal(size=n)
    return pd.DataFrame(
        {
            "context_id": [f"c{g}" for g in codes],
            "position": place,
            "response_length": np.bincount(codes)[codes],
            "student_entropy": rng.exponential(size=n),
            "teacher_entropy": rng.exponential(size=n),
            "forward_kl": rng.exponential(size=n),
            "reverse_kl": rng.exponential(size=n),
            "js": rng.random(n) * np.log(2),
            "hellinger": rng.random(n),
            "compatibility": rng.random(n),
            "advantage": advantage,
            "acceptance": np.minimum(1, np.exp(advantage)),
            "student_margin": rng.random(n),
            "union_log_ratio_variance": rng.exponential(size=n),
            "student_top1_in_teacher_top5": rng.random(n) < 0.5,
        }
    )


# --- normalisation


def test_normalise_by_hand():
    """21 values 0..20: Q05 = 1 and Q95 = 19 by linear interpolation."""
    assert normalize(np.arange(21.0)).tolist() == pytest.approx(
        [0, 0, *[(v - 1) / 18 for v in range(2, 19)], 1, 1]
    )
    assert normalize(np.array([0.0, 10.0])).tolist() == [0, 1]


def _normalise_loop(values):
    ordered = sorted(v for v in values if np.isfinite(v))

    def quantile(share):
        at = share * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    low, high = quantile(0.05), quantile(0.95)
    return [
        (
            NAN
            if not np.isfinite(v)
            else 0.0
            if high <= low
            else min(max((v - low) / (high - low), 0.0), 1.0)
        )
        for v in values
    ]


def test_normalise_equals_the_loop_and_ignores_shift_and_scale():
    values = np.random.default_rng(0).exponential(size=101)
    values[[3, 50]] = NAN, np.inf
    assert normalize(values) == pytest.approx(_normalise_loop(values), nan_ok=True, abs=1e-12)
    assert normalize(7 * values - 3) == pytest.approx(normalize(values), nan_ok=True)


def test_constant_columns_are_zero_and_missing_ones_stay_missing():
    assert normalize(np.full(5, 2.0)).tolist() == [0] * 5
    assert normalize(np.array([2.0, NAN])).tolist()[0] == 0 and np.isnan(
        normalize(np.array([2.0, NAN]))[1]
    )
    assert np.isnan(normalize(np.full(3, NAN))).all() and normalize(np.array([])).shape == (0,)


# --- every criterion against its formula


def _softor(a, b):
    return a + b - a * b


def _rows(tokens):
    """Per position: the row, with h, d, c by the loop above."""
    columns = {
        letter: _normalise_loop(tokens[name])
        for letter, name in dict(
            h="student_entropy", d="forward_kl", c="compatibility", r="reverse_kl"
        ).items()
    }
    return [
        dict(row, **{letter: values[i] for letter, values in columns.items()})
        for i, row in enumerate(tokens.to_dict("records"))
    ]


def _min_max(values):
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


def _prefix_share(tokens):
    shares = []
    for row in tokens.itertuples():
        mine = tokens[tokens.context_id == row.context_id]
        total = sum(abs(a) for a in mine.advantage)
        shares.append(sum(abs(a) for a in mine[mine.position < row.position].advantage) / total)
    return shares


def _fire(tokens):
    weights = [
        (2 - t / max(tokens.teacher_entropy)) * (1 + s / max(tokens.student_entropy))
        for s, t in zip(tokens.student_entropy, tokens.teacher_entropy)
    ]
    return [w / (sum(weights) / len(weights)) for w in weights]


def _relative(row):
    return row["position"] / max(row["response_length"] - 1, 1)


ORACLES = {
    "full": lambda t: [1.0] * len(t),
    "entropy": lambda t: [r["h"] for r in _rows(t)],
    "divergence": lambda t: [r["d"] for r in _rows(t)],
    "reverse_divergence": lambda t: [r["r"] for r in _rows(t)],
    "compatibility": lambda t: [r["c"] for r in _rows(t)],
    "teachability": lambda t: [r["d"] * r["c"] for r in _rows(t)],
    "incompatible": lambda t: [r["d"] * (1 - r["c"]) for r in _rows(t)],
    "tip": lambda t: [_softor(r["h"], r["d"]) for r in _rows(t)],
    "tip_paper": lambda t: [
        _softor(a, b)
        for a, b in zip(_min_max(list(t.student_entropy)), _min_max(list(t.reverse_kl)))
    ],
    "teachability_entropy": lambda t: [_softor(r["h"], r["d"] * r["c"]) for r in _rows(t)],
    "q3_teachability": lambda t: [
        (
            r["d"] * r["c"]
            if r["h"] <= np.median([s["h"] for s in _rows(t)])
            and r["d"] >= np.median([s["d"] for s in _rows(t)])
            else NAN
        )
        for r in _rows(t)
    ],
    "advantage_abs": lambda t: [abs(a) for a in t.advantage],
    "surprise": lambda t: [-a for a in t.advantage],
    "acceptance": lambda t: list(t.acceptance),
    "selectkd": lambda t: [1.0 if hit else 0.01 for hit in t.student_top1_in_teacher_top5],
    "advantage": lambda t: list(t.advantage),
    "projected_gradient": lambda t: list(t.union_log_ratio_variance),
    "early": lambda t: [1 - _relative(r) for r in _rows(t)],
    "late": lambda t: [_relative(r) for r in _rows(t)],
    "teacher_confidence": lambda t: [-h for h in t.teacher_entropy],
    "hellinger": lambda t: list(t.hellinger),
    "jsd": lambda t: list(t.js),
    "margin": lambda t: [-m for m in t.student_margin],
    "iw_prefix": lambda t: [1 + 0.5 * (1 - share) for share in _prefix_share(t)],
    "position_weight": lambda t: [
        0.25 + 0.75 / (1 + exp(-(_relative(r) - 0.30) / 0.10)) for r in _rows(t)
    ],
    "fire": _fire,
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_criterion_equals_its_loop(name, seed):
    tokens = table(seed=seed)
    assert score_criterion(tokens, name) == pytest.approx(
        ORACLES[name](tokens), abs=1e-12, nan_ok=True
    )


def test_every_built_in_criterion_has_an_oracle():
    assert set(ORACLES) | {"random"} == set(C.list_criteria().index[~C.list_criteria().mine])


def test_three_positions_by_hand():
    """H 0 1 2, D 0 2 1, C 1 0 0.5: quantiles at 5 and 95 % are 0.1 and 1.9 (0.05 and 0.95 for
    C).
    """
    tokens = pd.DataFrame(
        {
            "student_entropy": [0.0, 1, 2],
            "forward_kl": [0.0, 2, 1],
            "compatibility": [1, 0, 0.5],
            "position": [0, 1, 2],
            "response_length": 3,
        }
    )
    assert score_criterion(tokens, "teachability") == pytest.approx([0, 0, 0.25])
    assert score_criterion(tokens, "incompatible") == pytest.approx([0, 1, 0.25])
    assert score_criterion(tokens, "tip") == pytest.approx([0, 1, 1])
    assert score_criterion(tokens, "late").tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("name", [*ORACLES, "random"])
def test_scores_do_not_depend_on_row_labels_or_gains(name):
    tokens = table()
    labelled = tokens.set_index(np.arange(len(tokens))[::-1] * 3)
    assert score_criterion(labelled.assign(gain=1.0), name) == pytest.approx(
        score_criterion(tokens, name), nan_ok=True
    )


@pytest.mark.parametrize("name", sorted(set(ORACLES) - {"full", "random", "iw_prefix"}))
def test_scores_follow_their_rows(name):
    tokens = table()
    order = np.random.default_rng(3).permutation(len(tokens))
    assert score_criterion(tokens.iloc[order], name) == pytest.approx(
        score_criterion(tokens, name)[order], nan_ok=True
    )


def test_a_missing_measurement_is_an_undefined_score():
    tokens = table()
    tokens.loc[2, "forward_kl"] = np.inf
    for name in ("divergence", "teachability", "tip", "q3_teachability"):
        assert np.isnan(score_criterion(tokens, name)[2])
    assert np.isfinite(score_criterion(tokens, "compatibility")[2])


def test_random_is_seeded_and_uniform():
    tokens = pd.DataFrame({"position": np.zeros(4000)})
    first, again, other = (score_criterion(tokens, "random", seed=s) for s in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert first.min() >= 0 and first.max() < 1 and first.mean() == pytest.approx(0.5, abs=0.02)


def test_another_support_takes_the_place_of_compatibility():
    tokens = table().assign(topk_overlap_k8=np.linspace(0, 1, 40))
    swapped = score_criterion(
        tokens, "teachability", substitute={"compatibility": "topk_overlap_k8"}
    )
    assert swapped == pytest.approx(
        normalize(tokens.forward_kl) * normalize(tokens.topk_overlap_k8)
    )
    bare = tokens.drop(columns="compatibility")
    assert score_criterion(
        bare, "teachability", substitute={"compatibility": "topk_overlap_k8"}
    ) == pytest.approx(swapped)
    assert score_criterion(
        tokens, "entropy", substitute={"compatibility": "nowhere"}
    ) == pytest.approx(normalize(tokens.student_entropy))


# --- registry


def test_the_registry_as_a_table():
    listed = C.list_criteria()
    assert listed.index.is_unique and list(listed.columns) == [
        "recommended",
        "formula",
        "direction",
        "kind",
        "needs",
        "budget",
        "source",
        "note",
        "aliases",
        "mine",
    ]
    assert listed.loc["teachability"].to_dict() == {
        "recommended": True,
        "formula": "d*c",
        "direction": "high",
        "kind": "select",
        "needs": "forward_kl, compatibility",
        "budget": 0.05,
        "source": "2605.26844",
        "note": "",
        "aliases": "dlearn_high",
        "mine": False,
    }
    assert listed.loc["full", "kind"] == "all" and (listed.formula != "").all()


def test_the_recommended_criteria_come_first_and_the_rest_keeps_its_order():
    listed = C.list_criteria()
    first = "random entropy divergence compatibility teachability tip projected_gradient".split()
    assert list(listed.index[listed.recommended]) == list(listed.index[: len(first)]) == first
    assert list(listed.index[len(first) :]) == [name for name in C.names() if name not in first]


def test_every_built_in_formula_has_a_source_or_says_ours():
    for name, row in C.list_criteria().iterrows():
        assert re.fullmatch(r"ours|\d{4}\.\d{5}", row.source), name


def test_negations_and_near_duplicates_are_marked():
    tokens, listed = table(), C.list_criteria()
    scores = {name: score_criterion(tokens, name) for name in listed.index}
    for one, other in itertools.combinations(listed.index, 2):
        if np.allclose(scores[one], -scores[other]) or np.allclose(scores[one], 1 - scores[other]):
            assert listed.note[one] == f"the negation of `{other}`"
            assert listed.note[other] == f"the negation of `{one}`"
    for name, note in listed.note.items():
        assert all(mentioned in listed.index for mentioned in re.findall(r"`(\w+)`", note)), name


@pytest.mark.parametrize(
    "alias, name",
    [
        ("pure_opd", "full"),
        ("dlearn_high", "teachability"),
        ("dincompat_high", "incompatible"),
        ("ca_softor", "teachability_entropy"),
        ("q3_teachability_high", "q3_teachability"),
        ("sampled_rkl_max", "surprise"),
        ("sampled_rkl_min", "advantage"),
        ("pgt", "projected_gradient"),
        ("prefix", "early"),
    ],
)
def test_released_names_are_understood(alias, name):
    assert find(alias).name == name


def test_available_is_what_the_columns_allow():
    assert C.available(
        pd.DataFrame({"position": [0], "forward_kl": [1.0], "compatibility": [1.0]})
    ) == ["full", "random", "divergence", "compatibility", "teachability", "incompatible"]


def test_an_unknown_criterion_lists_the_known():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Unknown criterion 'enropy'\. Known are full, random, entropy, .*fire; register"
            r" another with @diagnostics\.criterion\.$"
        ),
    ):
        find("enropy")


def test_three_lines_add_a_criterion(registry):
    @criterion("mine", needs=["teacher_entropy", "student_entropy"], aliases=["my_own"])
    def mine(tokens):
        """H(q) / (1 + H(p))"""
        return tokens.teacher_entropy / (1 + tokens.student_entropy)

    tokens = table()
    assert score_criterion(tokens, "my_own") == pytest.approx(
        tokens.teacher_entropy / (1 + tokens.student_entropy)
    )
    listed = C.list_criteria().loc["mine"]
    assert listed.mine and listed.formula == "H(q) / (1 + H(p))" and "mine" in C.available(tokens)

    @criterion("mine", needs=["student_entropy"], aliases=["my_own"])
    def again(tokens):
        return -tokens.student_entropy

    assert (
        score_criterion(tokens, "mine") == pytest.approx(-tokens.student_entropy)
        and mine(tokens) is not None
    )


@pytest.mark.parametrize(
    "name, aliases, word, owner",
    [
        ("tip", [], "tip", "tip"),
        ("prefix", [], "prefix", "early"),
        ("mine", ["entropy"], "entropy", "entropy"),
        ("mine", ["ca_softor"], "ca_softor", "teachability_entropy"),
    ],
)
def test_built_in_names_cannot_be_taken(registry, name, aliases, word, owner):
    with pytest.raises(
        DiagnosticsError,
        match=rf"^Criterion '{word}' is taken, by '{owner}'\. Register yours under another name\.$",
    ):
        criterion(name, needs=["position"], aliases=aliases)(lambda tokens: tokens["position"])
    assert find(word).name == owner and not find(word).mine


@pytest.mark.parametrize(
    "column, stage",
    [("gain", "outcome"), ("forward_kl_after", "after"), ("placebo_gain", "outcome")],
)
def test_nothing_from_after_the_step_may_predict(registry, column, stage):
    criterion("leak", needs=[column])(lambda tokens: tokens[column])
    message = (
        rf"^Criterion 'leak' reads {column}, which is known only after the step \({stage}\)\. Use"
        r" columns from before it\.$"
    )
    with pytest.raises(DiagnosticsError, match=message):
        score_criterion(table().assign(**{column: 1.0}), "leak")
    with pytest.raises(DiagnosticsError, match="'teachability' reads gain"):
        score_criterion(
            table().assign(gain=1.0), "teachability", substitute={"compatibility": "gain"}
        )


@pytest.mark.parametrize("read", [lambda tokens: tokens["gain"], lambda tokens: tokens.gain])
def test_a_column_that_is_not_declared_is_not_seen(registry, read):
    criterion("sly", needs=["forward_kl"])(read)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Criterion 'sly' reads gain, which its needs \(forward_kl\) do not name\. Add it to"
            r" needs\.$"
        ),
    ):
        score_criterion(table().assign(gain=1.0), "sly")
    with pytest.raises((KeyError, AttributeError)):
        score_criterion(table(), "sly")


def test_a_missing_column_and_a_wrong_number_of_scores(registry):
    with pytest.raises(
        DiagnosticsError,
        match=r"^Criterion 'teachability' needs the column compatibility; this one has ",
    ):
        score_criterion(table().drop(columns="compatibility"), "teachability")
    criterion("short", needs=["position"])(lambda tokens: tokens["position"].iloc[1:])
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Criterion 'short' returned shape \(39,\) for 40 positions\. Return one score per"
            r" row\.$"
        ),
    ):
        score_criterion(table(), "short")


# --- quadrants


def test_quadrants_by_hand():
    tokens = pd.DataFrame({"student_entropy": [1.0, 9, 9, 1, NAN], "forward_kl": [9.0, 9, 1, 1, 1]})
    assert quadrants(tokens).tolist() == [3, 1, 2, 4, 0]


def test_ties_at_the_medians_go_to_q3():
    assert quadrants(
        pd.DataFrame({"student_entropy": [1.0, 2, 3], "forward_kl": [1.0, 2, 3]})
    ).tolist() == [4, 3, 1]
    assert quadrants(
        pd.DataFrame({"student_entropy": [5.0, 5], "forward_kl": [5.0, 5]})
    ).tolist() == [3, 3]
    assert quadrants(pd.DataFrame({"student_entropy": [NAN], "forward_kl": [1.0]})).tolist() == [0]


def test_quadrants_split_without_ties_evenly():
    tokens = table(n=40)
    found = quadrants(tokens)
    assert np.isin(found, (3, 4)).sum() == 20 and np.isin(found, (1, 3)).sum() == 20


# --- selection


def _select_loop(tokens, scores, budget):
    best = sorted(
        (i for i in range(len(scores)) if np.isfinite(scores[i])),
        key=lambda i: (-scores[i], tokens.position[i], i),
    )
    return [i in best[: ceil(round(budget * len(scores), 9))] for i in range(len(scores))]


@pytest.mark.parametrize("name", ["teachability", "selectkd", "q3_teachability", "late", "random"])
@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1, 0.3, 1.0])
def test_selection_equals_the_loop(name, budget):
    tokens = table()
    mask = select(tokens, name, budget=budget, seed=4)
    assert mask.tolist() == _select_loop(tokens, score_criterion(tokens, name, seed=4), budget)


def test_ties_go_to_the_earlier_position_then_row():
    tokens = pd.DataFrame(
        {"context_id": list("aabb"), "position": [1, 0, 1, 0], "response_length": 2}
    )
    assert select(tokens, np.ones(4), budget=0.5).tolist() == [False, True, False, True]
    assert select(tokens, np.ones(4), budget=0.75).tolist() == [True, True, False, True]
    assert ranking(tokens, np.array([1.0, NAN, 2, 1])).tolist() == [2, 3, 0]


def test_undefined_scores_are_never_selected():
    tokens = pd.DataFrame(
        {"context_id": list("aabb"), "position": [0, 1, 0, 1], "response_length": 2}
    )
    assert select(tokens, np.array([NAN, 1, NAN, NAN]), budget=1.0).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_every_context_keeps_its_minimum_within_the_budget():
    tokens = made_tokens(prompts=6, length=12)
    plain, least = (
        select(tokens, "teachability", budget=0.2, per_context_minimum=m) for m in (0, 1)
    )
    assert plain.sum() == least.sum() == ceil(0.2 * len(tokens))
    assert (
        tokens[least]
        .groupby("context_id")
        .size()
        .reindex(tokens.context_id.unique(), fill_value=0)
        .min()
        >= 1
    )
    scores = score_criterion(tokens, "teachability")
    for _, rows in tokens.groupby("context_id"):
        assert least[rows.index[np.argmax(scores[rows.index])]]


def test_default_budgets_and_full():
    tokens = table()
    assert select(tokens, "teachability").sum() == 2 and select(tokens, "acceptance").sum() == 40
    assert select(tokens, np.arange(40.0)).sum() == 2 and select(tokens, "full", budget=0.05).all()


@pytest.mark.parametrize(
    "positions, budget, count",
    [(57_600, 0.1, 5_760), (10, 0.05, 1), (100, 0.07, 7), (3, 1.0, 3), (1000, 0.001, 1)],
)
def test_budget_count(positions, budget, count):
    assert C.budget_count(positions, budget) == count


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, NAN])
def test_a_budget_is_a_share(budget):
    with pytest.raises(
        DiagnosticsError, match=r"^A budget is a share of positions in \(0, 1\]; got "
    ):
        select(table(), "entropy", budget=budget)


def test_a_minimum_larger_than_the_budget_is_refused():
    tokens = pd.DataFrame({"context_id": list("abcd"), "position": 0, "response_length": 1})
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^per_context_minimum=1 needs 4 positions, more than the budget's 1\. Raise the budget"
            r" or lower the minimum\.$"
        ),
    ):
        select(tokens, np.ones(4), budget=0.25, per_context_minimum=1)


def test_hellinger_and_js_are_read_not_computed():
    tokens = table().assign(hellinger=sqrt(0.5), js=0.1)
    assert set(score_criterion(tokens, "hellinger")) == {sqrt(0.5)} and set(
        score_criterion(tokens, "jsd")
    ) == {0.1}


def test_the_soft_or_is_exactly_one_where_either_part_is():
    """a + b - a*b is 0.9999999999999999 for one in five of these; then rounding, and not the
    position, orders a tie.
    """
    from diagnostics.criteria import soft_or

    other = np.random.default_rng(0).random(10_000)
    one = np.ones(10_000)
    assert (
        (soft_or(one, other) == 1).all()
        and (soft_or(other, one) == 1).all()
        and ((one + other - one * other) != 1).any()
    )
    np.testing.assert_allclose(
        soft_or(other, other[::-1]), other + other[::-1] - other * other[::-1], atol=1e-15
    )


@pytest.mark.parametrize("name", ["tip", "teachability_entropy"])
def test_all_positions_at_the_clip_of_entropy_are_tied(name):
    """Whoever has h = 1 has the score 1, whatever d is, and the earliest are taken."""
    rng = np.random.default_rng(1)
    tokens = pd.DataFrame(
        {
            "position": np.arange(2000),
            "context_id": "c",
            "student_entropy": rng.random(2000),
            "forward_kl": rng.random(2000),
            "compatibility": rng.random(2000),
        }
    )
    scores, h = score_criterion(tokens, name), normalize(tokens.student_entropy)
    assert (scores[h == 1] == 1).all() and (h == 1).sum() == 100
    top = np.flatnonzero(select(tokens, name, budget=0.03))
    assert top.tolist() == np.flatnonzero(scores == 1)[:60].tolist()
