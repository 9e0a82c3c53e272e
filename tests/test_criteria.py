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
    student_logprob = np.log(rng.random(n)) - np.maximum(advantage, 0)
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
            "student_logprob": student_logprob,
            "teacher_logprob": student_logprob + advantage,
            "ier_signal": rng.exponential(size=n),
            "ier_noise": np.where(np.arange(n) % 7, rng.exponential(size=n), 0.0),
            "ier_full_signal": rng.exponential(size=n),
            "ier_full_noise": rng.exponential(size=n),
            "teacher_top1_gap": rng.uniform(-1, 1, n),
            "student_margin": rng.random(n),
            "union_log_ratio_variance": rng.exponential(size=n),
            "union_forward_kl": rng.exponential(size=n),
            "union_forward_kl_released": rng.exponential(size=n),
            "token_identity_gain": rng.normal(size=n),
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
            h="student_entropy",
            f="forward_kl",
            d="union_forward_kl",
            e="union_forward_kl_released",
            c="compatibility",
            r="reverse_kl",
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


def _in_q3(tokens, value):
    rows = _rows(tokens)
    h, f = (np.median([row[letter] for row in rows]) for letter in "hf")
    return [value(row) if row["h"] <= h and row["f"] >= f else NAN for row in rows]


def _times(a, b):
    return max(a, 0) * max(b, 0) + min(a, 0) + min(b, 0)


def _unclipped(tokens):
    """Per position: (z - Q05)/(Q95 - Q05) without limits, for H, D and C."""
    names = {"h": "student_entropy", "d": "union_forward_kl", "c": "compatibility"}
    found = {}
    for letter, name in names.items():
        low, high = tokens[name].quantile(0.05), tokens[name].quantile(0.95)
        found[letter] = ((tokens[name] - low) / (high - low)).tolist()
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _split_set(tokens, n):
    """What the released trainer keeps of n positions: round(n/2) by h, the rest by (1 - h)*d*c."""
    clipped, raw = _rows(tokens), _unclipped(tokens)
    places = tokens.position.tolist()

    def best(rows, value, count):
        return sorted(rows, key=lambda i: (-value(clipped[i]), -value(raw[i]), places[i], i))[
            :count
        ]

    chosen = best(range(len(tokens)), lambda r: r["h"], round(n / 2))
    left = [i for i in range(len(tokens)) if i not in chosen]
    return {
        *chosen,
        *best(left, lambda r: _times(1 - r["h"], _times(r["d"], r["c"])), n - len(chosen)),
    }


def _split_loop(tokens):
    score = [NAN] * len(tokens)
    for n in range(1, len(tokens) + 1):
        (new,) = _split_set(tokens, n) - _split_set(tokens, n - 1)
        score[new] = 1.0 - n
    return score


def _chances(row):
    return exp(row["student_logprob"]), exp(row["teacher_logprob"])


def _power(row, exponent):
    p, q = _chances(row)
    return abs(q**exponent - p**exponent)


def _tails(tokens):
    score = []
    for row in tokens.itertuples():
        mine = tokens[tokens.context_id == row.context_id].advantage
        below = sum(a < row.advantage for a in mine)
        above = sum(a > row.advantage for a in mine)
        equal = len(mine) - below - above
        score.append(-(min(below, above) + (equal + 1) / 2) / len(mine))
    return score


def _bellman(tokens):
    rows = _rows(tokens)

    def rest(i):
        """R and M of a position, by the recursion as its source writes it."""
        following = [
            j
            for j, row in enumerate(rows)
            if row["context_id"] == rows[i]["context_id"]
            and row["position"] == rows[i]["position"] + 1
        ]
        total, mass = rest(following[0]) if following else (0.0, 0.0)
        kept = 0.995 * min(1, exp(rows[i]["advantage"]))
        return rows[i]["d"] * rows[i]["c"] + kept * total, 1 + kept * mass

    values = [total / mass for total, mass in map(rest, range(len(rows)))]
    return [0.1 + 0.9 * z**2 for z in _normalise_loop(values)]


ORACLES = {
    "full": lambda t: [1.0] * len(t),
    "entropy": lambda t: [r["h"] for r in _rows(t)],
    "divergence": lambda t: [r["f"] for r in _rows(t)],
    "reverse_divergence": lambda t: [r["r"] for r in _rows(t)],
    "compatibility": lambda t: [r["c"] for r in _rows(t)],
    "teachability": lambda t: [r["d"] * r["c"] for r in _rows(t)],
    "teachability_full": lambda t: [r["f"] * r["c"] for r in _rows(t)],
    "teachability_released": lambda t: [r["e"] * r["c"] for r in _rows(t)],
    "token_identity": lambda t: list(t.token_identity_gain),
    "incompatible": lambda t: [r["d"] * (1 - r["c"]) for r in _rows(t)],
    "tip": lambda t: [_softor(r["h"], r["d"]) for r in _rows(t)],
    "tip_paper": lambda t: [
        _softor(a, b)
        for a, b in zip(_min_max(list(t.student_entropy)), _min_max(list(t.reverse_kl)))
    ],
    "teachability_entropy": lambda t: [_softor(r["h"], r["d"] * r["c"]) for r in _rows(t)],
    "q3_teachability": lambda t: _in_q3(t, lambda r: r["d"] * r["c"]),
    "q3_teachability_low": lambda t: _in_q3(t, lambda r: -r["d"] * r["c"]),
    "q3_incompatible": lambda t: _in_q3(t, lambda r: r["d"] * (1 - r["c"])),
    "q3_compatibility": lambda t: _in_q3(t, lambda r: r["c"]),
    "q3_compatibility_low": lambda t: _in_q3(t, lambda r: -r["c"]),
    "split_budget": lambda t: _split_loop(t),
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
    "dial": lambda t: [_power(r, 1) for r in _rows(t)],
    "power": lambda t: [_power(r, 0.1) for r in _rows(t)],
    "gradient_size": lambda t: [2 * abs(r["advantage"]) * (1 - _chances(r)[0]) for r in _rows(t)],
    "sure": lambda t: [1 + (1 - _chances(r)[0]) for r in _rows(t)],
    "tails": _tails,
    "ier": lambda t: [r["ier_signal"] / max(r["ier_noise"], 1e-8) for r in _rows(t)],
    "ier_full": lambda t: [r["ier_full_signal"] / r["ier_full_noise"] for r in _rows(t)],
    "teacher_top1_gap": lambda t: list(t.teacher_top1_gap),
    "bellman": _bellman,
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_criterion_equals_its_loop(name, seed):
    tokens = table(seed=seed)
    assert score_criterion(tokens, name) == pytest.approx(
        ORACLES[name](tokens), abs=1e-12, nan_ok=True
    )


def test_every_built_in_criterion_has_an_oracle():
    seeded = {"random", "random_divergent", "position_matched", "q3"}
    built_in = C.list_criteria().index[~C.list_criteria().mine]
    assert set(ORACLES) | seeded == set(built_in)
    assert {name for name in built_in if C.is_seeded(name)} == seeded


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
    tokens.loc[2, ["forward_kl", "union_forward_kl"]] = np.inf
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
        normalize(tokens.union_forward_kl) * normalize(tokens.topk_overlap_k8)
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
        "needs": "union_forward_kl, compatibility",
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
        # arXiv numbers; a repository where the formula is in no paper
        assert re.fullmatch(r"ours|\d{4}\.\d{5}|ihbkaiser/jta-opd", row.source), name


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
        ("q3_dincompat_high", "q3_incompatible"),
        ("q3_highc", "q3_compatibility"),
        ("q3_lowc", "q3_compatibility_low"),
        ("split_budget_ca", "split_budget"),
        ("sampled_rkl_max", "surprise"),
        ("sampled_rkl_min", "advantage"),
        ("pgt", "projected_gradient"),
        ("prefix", "early"),
        ("pctltail", "tails"),
        ("rac", "bellman"),
    ],
)
def test_released_names_are_understood(alias, name):
    assert find(alias).name == name


def test_comparisons_take_a_mask_of_one_experiment_only_by_name():
    asked = {
        "q3",
        "q3_compatibility",
        "q3_compatibility_low",
        "q3_teachability_low",
        "q3_incompatible",
        "split_budget",
        "dial",
        "power",
        "gradient_size",
        "sure",
        "tails",
        "ier",
        "ier_full",
        "teacher_top1_gap",
        "bellman",
    }
    assert set(C.available(table())) - set(C.usual(table())) == asked
    assert {name for name in C.names() if find(name).by_name} == asked


def test_available_is_what_the_columns_allow():
    assert C.available(
        pd.DataFrame({"position": [0], "forward_kl": [1.0], "compatibility": [1.0]})
    ) == [
        "full",
        "random",
        "random_divergent",
        "divergence",
        "compatibility",
        "teachability",
        "teachability_full",
        "incompatible",
    ]


def test_an_unknown_criterion_lists_the_known():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Unknown criterion 'enropy'\. Did you mean 'entropy'\? Known are full, .*fire, .*, "
            r"and A_and_B or A_or_B of two of them; register another with"
            r" @diagnostics\.criterion, on the command line in a file that"
            r" --criterion-module names\.$"
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
    [("gain", "outcome"), ("forward_kl_after", "after"), ("own_context_gain", "outcome")],
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


# --- ties


def saturated(n=2000, seed=1):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "position": np.arange(n),
            "context_id": "c",
            "response_length": n,
            "student_entropy": rng.random(n),
            "forward_kl": rng.random(n),
            "union_forward_kl": rng.random(n),
            "reverse_kl": rng.random(n),
            "compatibility": rng.random(n),
        }
    )


@pytest.mark.parametrize("name", ["tip", "teachability_entropy"])
def test_all_positions_at_the_clip_of_entropy_are_tied(name):
    """Whoever has h = 1 has the score 1, whatever d is; without another rule the earliest win."""
    tokens = saturated()
    scores, h = score_criterion(tokens, name), normalize(tokens.student_entropy)
    assert (scores[h == 1] == 1).all() and (h == 1).sum() == 100
    top = np.flatnonzero(select(tokens, name, budget=0.03, ties="position"))
    assert top.tolist() == np.flatnonzero(scores == 1)[:60].tolist()


def test_equal_scores_go_by_the_unclipped_score_by_hand():
    """21 positions with D = 0 to 20: N clips 19 and 20 to 1, and 20 is the larger."""
    tokens = pd.DataFrame({"position": np.arange(21)[::-1], "forward_kl": np.arange(21.0)})
    clipped, raw = C.score_pairs(tokens, "divergence")
    assert clipped[19] == clipped[20] == 1 and raw[19] == 1 and raw[20] == pytest.approx(19 / 18)
    assert clipped[0] == clipped[1] == 0 and raw[0] == pytest.approx(-1 / 18)
    late, early = tokens.assign(position=np.arange(21)), tokens
    for table_, first in ((late, 19), (early, 20)):
        assert np.flatnonzero(select(table_, "divergence", budget=1 / 21)).tolist() == [20]
        by_place = select(table_, "divergence", budget=1 / 21, ties="position")
        assert np.flatnonzero(by_place).tolist() == [first]
    assert C.ambiguous_share(tokens, "divergence", budget=1 / 21) == 0
    assert C.ambiguous_share(tokens, "divergence", budget=1 / 21, ties="position") == 1
    assert C.ambiguous_share(tokens, "divergence", budget=2 / 21, ties="position") == 0


def test_products_and_soft_ors_beyond_the_clip_by_hand():
    """In [0, 1] they are a*b and a + b - a*b; outside, the excess is added."""
    for a, b, product in [
        (0.5, 0.5, 0.25),
        (1.5, 1.2, 1.8),
        (-0.5, 0.9, -0.5),
        (-0.5, -0.25, -0.75),
    ]:
        assert C.times(np.array(a), np.array(b)) == pytest.approx(product)
    for a, b, either in [
        (0.5, 0.5, 0.75),
        (1.25, 0.3, 1.25),
        (1.25, 1.5, 1.75),
        (-0.5, -0.5, -1.25),
    ]:
        assert C.soft_or(np.array(a), np.array(b)) == pytest.approx(either)


@pytest.mark.parametrize("function", [C.times, C.soft_or])
def test_the_continued_formulas_grow_with_both_parts(function):
    """The literal a*b falls with b where a < 0, and a + b - a*b falls with b where a > 1."""
    grid = np.linspace(-2, 3, 51)
    values = function(grid[:, None], grid[None, :])
    assert (np.diff(values, axis=0) >= 0).all() and (np.diff(values, axis=1) >= 0).all()


UNCLIPPED = {
    "entropy": lambda u: u["student_entropy"],
    "divergence": lambda u: u["forward_kl"],
    "reverse_divergence": lambda u: u["reverse_kl"],
    "compatibility": lambda u: u["compatibility"],
    "teachability": lambda u: _times(u["union_forward_kl"], u["compatibility"]),
    "teachability_full": lambda u: _times(u["forward_kl"], u["compatibility"]),
    "incompatible": lambda u: _times(u["union_forward_kl"], 1 - u["compatibility"]),
    "tip": lambda u: 1 - _times(1 - u["student_entropy"], 1 - u["union_forward_kl"]),
    "teachability_entropy": lambda u: (
        1 - _times(1 - u["student_entropy"], 1 - _times(u["union_forward_kl"], u["compatibility"]))
    ),
}


@pytest.mark.parametrize("name", UNCLIPPED)
@pytest.mark.parametrize("ties", ["raw", "position"])
@pytest.mark.parametrize("budget", [0.01, 0.05, 0.6, 0.97])
def test_selections_among_ties_equal_a_slow_loop(name, ties, budget):
    tokens = saturated(n=300)
    low, high = (tokens.drop(columns="context_id").quantile(q) for q in (0.05, 0.95))
    scores = score_criterion(tokens, name)
    keys = []
    for i, row in tokens.iterrows():
        scaled = {k: (row[k] - low[k]) / (high[k] - low[k]) for k in low.index[2:]}
        keys.append((-scores[i], *([-UNCLIPPED[name](scaled)] * (ties == "raw")), row.position, i))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    count = ceil(budget * 300)
    wanted = sorted(order[:count])
    assert np.flatnonzero(select(tokens, name, budget=budget, ties=ties)).tolist() == wanted
    depth = 2 if ties == "raw" else 1
    equal = sum(keys[i][:depth] == keys[order[count]][:depth] for i in wanted)
    found = C.ambiguous_share(tokens, name, budget=budget, ties=ties)
    assert found == pytest.approx(equal / count)


def test_a_score_and_its_unclipped_form_never_disagree_on_strict_order():
    tokens = saturated()
    for name in ("entropy", "divergence", "reverse_divergence", "compatibility"):
        clipped, raw = C.score_pairs(tokens, name)
        assert (np.diff(clipped[np.argsort(raw)]) >= 0).all()
    for name in ("random", "random_divergent"):
        clipped, raw = C.score_pairs(tokens, name, seed=3)
        assert (clipped == raw).all()


def test_random_ties_choose_among_all_that_are_equal_and_only_them():
    tokens = saturated()
    clip = score_criterion(tokens, "divergence") == 1
    taken = np.zeros(len(tokens))
    for seed in range(400):
        mask = select(tokens, "divergence", budget=0.03, ties="random", seed=seed)
        assert mask.sum() == 60 and not mask[~clip].any()
        taken += mask
    # each of the 100 is taken with probability 0.6; 400 draws have a standard error of .0245
    assert abs(taken[clip] / 400 - 0.6).max() < 5 * 0.0245
    again = [select(tokens, "divergence", budget=0.03, ties="random", seed=5) for _ in range(2)]
    assert (again[0] == again[1]).all()
    assert C.ambiguous_share(tokens, "divergence", budget=0.03, ties="random") == 1
    assert C.ambiguous_share(tokens, "divergence", budget=0.03) == 0


def test_a_table_of_ties_is_ambiguous_throughout():
    tokens = pd.DataFrame({"position": np.arange(50), "context_id": "c", "forward_kl": 2.0})
    for ties in ("raw", "position", "random"):
        assert C.ambiguous_share(tokens, "divergence", budget=0.3, ties=ties) == 1
        assert C.ambiguous_share(tokens, "divergence", budget=1.0, ties=ties) == 0
    assert C.ambiguous_share(tokens, "full", budget=0.3) == 0
    assert np.isnan(C.ambiguous_share(tokens, np.full(50, NAN), budget=0.3))


def test_scores_that_are_given_have_their_ties_ordered_by_raw():
    tokens = pd.DataFrame({"position": [0, 1, 2, 3]})
    scores, raw = np.array([1.0, 1, 0, 1]), np.array([1.0, 3, 9, NAN])
    assert ranking(tokens, scores, raw).tolist() == [1, 0, 3, 2]
    assert ranking(tokens, scores, raw, ties="position").tolist() == [0, 1, 3, 2]
    assert select(tokens, scores, raw=raw, budget=0.25).tolist() == [False, True, False, False]
    assert C.ambiguous_share(tokens, scores, budget=0.25) == 1
    assert C.ambiguous_share(tokens, scores, raw=raw, budget=0.25) == 0


def test_a_users_criterion_breaks_its_ties_with_its_own_unclipped_form(registry):
    @criterion("mine", needs=["forward_kl"])
    def mine(tokens, *, scale):
        return scale(tokens.forward_kl)

    @criterion("plain", needs=["forward_kl"])
    def plain(tokens):
        return normalize(tokens.forward_kl)

    tokens = saturated()
    assert (select(tokens, "mine", budget=0.01) == select(tokens, "divergence", budget=0.01)).all()
    clipped, raw = C.score_pairs(tokens, "plain")
    assert (clipped == raw).all() and C.ambiguous_share(tokens, "plain", budget=0.01) == 1


def test_copies_scale_as_repeated_rows_do():
    tokens = table()
    copies = np.random.default_rng(0).integers(0, 4, len(tokens))
    repeated = tokens.loc[np.repeat(tokens.index, copies)]
    for name in ORACLES:
        # A repeated row takes a place of its own in the order of `split_budget`, and of a response;
        # a draw repeats whole responses, each of which is a response of its own.
        within = ("tails", "bellman")
        if name in ("full", "iw_prefix", "fire", "tip_paper", "split_budget", *within):
            continue
        both = zip(C.score_pairs(tokens, name, copies=copies), C.score_pairs(repeated, name))
        for once, again in both:
            assert np.repeat(once, copies) == pytest.approx(again, nan_ok=True), name


def test_a_constant_column_has_no_spread_to_break_ties_with():
    """Of 40 values only one differs: N is 0 for all, and the one still comes first."""
    values = np.zeros(40)
    values[7] = 5
    tokens = pd.DataFrame({"position": np.arange(40), "forward_kl": values})
    clipped, raw = C.score_pairs(tokens, "divergence")
    assert not clipped.any() and raw.tolist() == values.tolist()
    assert np.flatnonzero(select(tokens, "divergence", budget=0.02)).tolist() == [7]


# --- scope


def _scope_loop(tokens, name, budget, groups):
    clipped, raw = C.score_pairs(tokens, name)
    chosen = np.zeros(len(tokens), dtype=bool)
    equal = 0
    for group in dict.fromkeys(groups):
        here = [i for i in range(len(tokens)) if groups[i] == group]
        best = sorted(
            (i for i in here if np.isfinite(clipped[i])),
            key=lambda i: (-clipped[i], -raw[i], tokens.position[i], i),
        )
        count = ceil(round(budget * len(here), 9))
        chosen[best[:count]] = True
        if count < len(best):
            last = best[count]
            equal += sum(clipped[i] == clipped[last] and raw[i] == raw[last] for i in best[:count])
    return chosen, equal / chosen.sum()


@pytest.mark.parametrize("name", ["teachability", "selectkd", "q3_teachability", "divergence"])
@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["batch", "context"])
def test_scopes_equal_a_slow_loop(name, budget, scope):
    tokens = table(n=200, seed=2)
    batch = C.training_batches(tokens, contexts=5, seed=1) if scope == "batch" else None
    groups = tokens.context_id.tolist() if batch is None else batch.tolist()
    expected, share = _scope_loop(tokens, name, budget, groups)
    given = {"budget": budget, "scope": scope, "batch": batch}
    assert (select(tokens, name, **given) == expected).all()
    assert C.ambiguous_share(tokens, name, **given) == pytest.approx(share)
    if batch is not None:
        named = tokens.assign(step=batch)
        assert (select(named, name, budget=budget, scope="batch", batch="step") == expected).all()


def test_one_batch_is_the_table_and_batches_hold_whole_contexts():
    tokens = table(n=100)
    whole = select(tokens, "tip", budget=0.2)
    assert (select(tokens, "tip", budget=0.2, scope="batch", batch=np.zeros(100)) == whole).all()
    batch = C.training_batches(tokens, contexts=4, seed=3)
    by_context = pd.Series(batch).groupby(tokens.context_id)
    assert (by_context.nunique() == 1).all()
    sizes = by_context.first().value_counts()
    assert (sizes.loc[: sizes.index.max() - 1] == 4).all() and sizes.sum() == tokens[
        "context_id"
    ].nunique()
    with pytest.raises(DiagnosticsError, match=r"^A batch holds at least one context; got 0\.$"):
        C.training_batches(tokens, contexts=0)


def test_a_minimum_per_context_holds_within_each_batch():
    tokens = table(n=200, seed=2)
    batch = C.training_batches(tokens, contexts=5)
    mask = select(
        tokens, "teachability", budget=0.5, per_context_minimum=1, scope="batch", batch=batch
    )
    assert (pd.Series(mask).groupby(tokens.context_id).sum() >= 1).all()
    for number in set(batch):
        assert mask[batch == number].sum() == ceil(0.5 * (batch == number).sum())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"ties": "last"}, r"^ties is one of raw, position, random; got 'last'\.$"),
        ({"scope": "prompt"}, r"^scope is one of table, batch, context; got 'prompt'\.$"),
        (
            {"scope": "batch"},
            r"^The batch of each position belongs to the scope 'batch'; got scope='batch' and no"
            r" batch\. Give both, or neither\.$",
        ),
        ({"batch": np.zeros(40)}, r"got scope='table' and batches\. Give both, or neither\.$"),
        (
            {"scope": "batch", "batch": np.zeros(3)},
            r"^There are 3 batch numbers for 40 positions\. Give one each\.$",
        ),
        (
            {"scope": "batch", "batch": np.full(40, NAN)},
            r"^40 positions have no batch\. Give each position its own\.$",
        ),
        ({"scope": "batch", "batch": "nowhere"}, r"^The scope 'batch' needs the column nowhere;"),
    ],
)
def test_unknown_rules_are_refused(given, message):
    with pytest.raises(DiagnosticsError, match=message):
        select(table(), "entropy", budget=0.2, **given)
    with pytest.raises(DiagnosticsError, match=message):
        C.ambiguous_share(table(), "entropy", budget=0.2, **given)


# --- which divergence, and fair rivals


def test_the_disagreement_is_the_unions_where_the_table_has_it():
    tokens = table()
    assert C.disagreement_column(tokens) == "union_forward_kl"
    older = tokens.drop(columns="union_forward_kl")
    assert C.disagreement_column(older) == "forward_kl"
    for name in ("teachability", "incompatible", "tip", "teachability_entropy", "q3_teachability"):
        with_full = tokens.assign(union_forward_kl=tokens.forward_kl)
        assert score_criterion(older, name) == pytest.approx(
            score_criterion(with_full, name), nan_ok=True
        )
        assert C.missing_columns(older, name) == []
    assert score_criterion(older, "teachability") == pytest.approx(
        score_criterion(tokens, "teachability_full")
    )
    assert C.missing_columns(older.drop(columns="forward_kl"), "teachability") == [
        "union_forward_kl"
    ]


def test_random_divergent_takes_the_upper_half_of_the_divergence_first():
    tokens = table(n=101)
    tokens.loc[4, "union_forward_kl"] = NAN
    upper = (tokens.union_forward_kl > tokens.union_forward_kl.median()).to_numpy()
    assert upper.sum() == 50
    first, other = (select(tokens, "random_divergent", budget=0.2, seed=s) for s in (1, 2))
    assert not first[~upper].any() and not other[~upper].any() and (first != other).any()
    half = select(tokens, "random_divergent", budget=50 / 101)
    assert (half == upper).all()
    all_but_one = select(tokens, "random_divergent", budget=1.0)
    assert all_but_one.sum() == 100 and not all_but_one[4]


def test_the_position_matched_rival_selects_as_much_in_each_tenth_of_the_response():
    rng = np.random.default_rng(0)
    tokens = saturated(n=3000).assign(
        position=np.tile(np.arange(30), 100),
        response_length=30,
        context_id=np.repeat([f"c{i}" for i in range(100)], 30),
    )
    tokens["union_forward_kl"] = rng.exponential(size=3000) * (1 + tokens.position / 5)
    tenth = C.position_tenths(tokens)
    assert set(tenth) == set(range(10)) and tenth[29] == 9 and tenth[2] == 0 and tenth[3] == 1
    for ties in ("raw", "position"):
        own, rival = (
            select(tokens, name, budget=0.07, ties=ties)
            for name in ("teachability", "position_matched")
        )
        assert (np.bincount(tenth[own]) == np.bincount(tenth[rival])).all() and (own != rival).any()
    scores = score_criterion(tokens, "position_matched", seed=1)
    assert sorted(scores) == sorted(score_criterion(tokens, "teachability"))
    assert (scores != score_criterion(tokens, "position_matched", seed=2)).any()
    assert abs(np.corrcoef(scores, score_criterion(tokens, "teachability"))[0, 1]) < 0.2


def test_a_divergence_that_lists_hardly_know_is_read_over_the_whole_vocabulary():
    tokens = pd.DataFrame(
        {
            "forward_kl": [0.1, 0.4, 0.9, 0.2, 0.6, 0.3],
            "union_forward_kl": [np.nan, np.nan, np.nan, np.nan, 0.5, 0.2],
            "compatibility": [0.9, 0.1, 0.5, 0.7, 0.3, 0.8],
        }
    )
    assert C.disagreement_column(tokens) == "forward_kl"
    scores = C.score_criterion(tokens, "teachability")
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, C.score_criterion(tokens, "teachability_full"))
    known = tokens.assign(union_forward_kl=[0.1, 0.3, np.nan, 0.2, 0.5, 0.2])
    assert C.disagreement_column(known) == "union_forward_kl"
    assert np.isnan(C.score_criterion(known, "teachability")[2])


# --- the masks inside Q3, and the split budget


def q3_table():
    """Six positions. H and KL put a, b and c into Q3 (H <= 2.5, KL >= 2.5); C and D differ there.

    With six values the quantiles lie a quarter of the way into the outer gaps, so that N is 0 for
    the lowest value, 1 for the highest, and (z - low)/(high - low) between.
    """
    return pd.DataFrame(
        {
            "context_id": list("uuuvvv"),
            "position": [0, 1, 2, 0, 1, 2],
            "response_length": 3,
            "student_entropy": [0.0, 1, 2, 3, 4, 5],
            "forward_kl": [3.0, 4, 5, 0, 1, 2],
            "union_forward_kl": [3.0, 4, 5, 0, 1, 2],
            "compatibility": [0.6, 1.0, 0.0, 0.2, 0.4, 0.8],
            "reverse_kl": 1.0,
            "union_forward_kl_released": 1.0,
        }
    )


@pytest.mark.parametrize(
    "name, order",
    [
        # d = 11/18, 15/18 and 1 (low .25, high 4.75); c = 11/18, 1 and 0 (low .05, high .95)
        ("q3_compatibility", [1, 0, 2]),
        ("q3_compatibility_low", [2, 0, 1]),
        ("q3_teachability", [1, 0, 2]),
        ("q3_teachability_low", [2, 0, 1]),
        ("q3_incompatible", [2, 0, 1]),
    ],
)
def test_masks_inside_q3_by_hand(name, order):
    tokens = q3_table()
    assert quadrants(tokens).tolist() == [3, 3, 3, 2, 2, 2]
    values = {
        "q3_compatibility": [11 / 18, 1, 0],
        "q3_compatibility_low": [-11 / 18, -1, 0],
        "q3_teachability": [11 / 18 * 11 / 18, 15 / 18, 0],
        "q3_teachability_low": [-11 / 18 * 11 / 18, -15 / 18, 0],
        "q3_incompatible": [11 / 18 * 7 / 18, 0, 1],
    }
    scores = score_criterion(tokens, name)
    assert scores[:3] == pytest.approx(values[name]) and np.isnan(scores[3:]).all()
    for count in (1, 2, 3):
        chosen = np.flatnonzero(select(tokens, name, budget=count / 6))
        assert chosen.tolist() == sorted(order[:count])
    # A budget above the quadrant's share keeps the quadrant, fewer than it asks for.
    assert select(tokens, name, budget=1.0).tolist() == [True] * 3 + [False] * 3


def test_q3_alone_is_drawn_inside_the_quadrant_and_nowhere_else():
    tokens = q3_table()
    taken = np.zeros(6)
    for seed in range(600):
        mask = select(tokens, "q3", budget=1 / 6, seed=seed)
        assert mask.sum() == 1 and quadrants(tokens)[mask].tolist() == [3]
        taken += mask
    # each of three with probability 1/3; 600 draws have a standard error of .0192
    assert abs(taken[:3] / 600 - 1 / 3).max() < 5 * 0.0192
    assert select(tokens, "q3", budget=1.0, seed=1).sum() == 3
    again = [select(tokens, "q3", budget=2 / 6, seed=4) for _ in range(2)]
    assert (again[0] == again[1]).all()


@pytest.mark.parametrize(
    "name, high", [("q3_compatibility", True), ("q3_compatibility_low", False)]
)
def test_equal_scores_inside_q3_go_by_the_unclipped_score(name, high):
    """A twentieth of the positions shares c = 1, another c = 0; within each, C itself decides."""
    tokens = saturated()
    inside = np.flatnonzero(quadrants(tokens) == 3)
    compatibility = tokens.compatibility.to_numpy()[inside]
    best = inside[np.argsort(-compatibility if high else compatibility)[:8]]
    c = normalize(tokens.compatibility)
    assert (c[best] == (1 if high else 0)).all()
    chosen = np.flatnonzero(select(tokens, name, budget=8 / 2000))
    assert chosen.tolist() == sorted(best.tolist())
    assert C.ambiguous_share(tokens, name, budget=8 / 2000) == 0


def test_the_low_end_is_the_other_ends_negation():
    tokens = saturated()
    for name in ("q3_compatibility", "q3_teachability"):
        for high, low in zip(C.score_pairs(tokens, name), C.score_pairs(tokens, f"{name}_low")):
            assert high == pytest.approx(-low, nan_ok=True)


def test_the_split_budget_by_hand():
    """By h: 5 4 3 2 1 0. h is 0, 3/18, 7/18, 11/18, 15/18, 1 (low .25, high 4.75), so that
    (1 - h)*d*c is 1 * 11/18 * 11/18 for row 0 and 15/18 * 15/18 for row 1; the others have 0.
    """
    tokens = q3_table()
    # n = 1: round(.5) = 0 by h, so row 1; n = 2: one by h, row 5; n = 3: two by h, row 4;
    # n = 4: two by h, so row 0; n = 5: two by h and three by the rest.
    assert np.argsort(-score_criterion(tokens, "split_budget"))[:4].tolist() == [1, 5, 4, 0]
    for n in range(1, 7):
        assert set(np.flatnonzero(select(tokens, "split_budget", budget=n / 6))) == _split_set(
            tokens, n
        )


@pytest.mark.parametrize("seed", range(4))
def test_the_split_budget_is_the_released_selection_at_every_budget(seed):
    """Columns with ties, and positions that both halves want."""
    tokens = table(seed=seed)
    for name in ("student_entropy", "union_forward_kl", "compatibility"):
        tokens[name] = tokens[name].round(1)
    for n in range(1, len(tokens) + 1):
        chosen = select(tokens, "split_budget", budget=n / len(tokens))
        assert set(np.flatnonzero(chosen)) == _split_set(tokens, n)


def test_a_position_that_lacks_one_half_of_the_split_is_never_taken():
    tokens = table()
    tokens.loc[3, "compatibility"] = NAN
    assert np.isnan(score_criterion(tokens, "split_budget")[3])
    assert select(tokens, "split_budget", budget=1.0).sum() == len(tokens) - 1


@pytest.mark.parametrize("scope", ["table", "context"])
def test_one_scoring_gives_the_selection_and_what_ties_decide(scope):
    tokens = table()
    tokens["student_entropy"] = tokens["student_entropy"].round(0)  # with ties
    shares = []
    for name in C.available(tokens):
        how = {"budget": 0.2, "seed": [3, 1], "scope": scope}
        mask, share = C.selection(tokens, name, **how)
        np.testing.assert_array_equal(mask, select(tokens, name, **how))
        np.testing.assert_equal(share, C.ambiguous_share(tokens, name, **how))
        shares.append(share)
    assert max(shares) > 0


def test_possible_columns_are_all_that_a_criterion_may_read_of_any_table():
    tokens = table()
    for name in C.available(tokens):
        known = find(name).possible_columns
        assert set(find(name).columns(tokens).values()) <= known
        assert set(find(name).columns(tokens.drop(columns="union_forward_kl")).values()) <= known
    assert {"union_forward_kl", "forward_kl"} <= find("teachability").possible_columns
    assert find("entropy").possible_columns == {"student_entropy"}
