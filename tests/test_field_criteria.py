"""Criteria of other papers on three tokens by hand, and two criteria fused by their ranks."""

from math import exp, log

import numpy as np
import pandas as pd
import pytest

from diagnostics import criteria as C
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import criterion, find, score_criterion, select
from tests.test_criteria import table

NAN = float("nan")


def three():
    """One response of three tokens: p(y) 1/2, 1/4, 1/2 and q(y) 1/4, 1/2, 1/2."""
    p, q = np.array([0.5, 0.25, 0.5]), np.array([0.25, 0.5, 0.5])
    return pd.DataFrame(
        {
            "context_id": "c",
            "position": [0, 1, 2],
            "response_length": 3,
            "student_logprob": np.log(p),
            "teacher_logprob": np.log(q),
            "advantage": np.log(q / p),
            "acceptance": np.minimum(1, q / p),
            "union_forward_kl": [0.0, 1.0, 1.0],
            "compatibility": [0.0, 1.0, 1.0],
        }
    )


def test_three_tokens_by_hand():
    tokens = three()
    assert score_criterion(tokens, "dial") == pytest.approx([0.25, 0.25, 0])
    # |A| is ln 2, ln 2, 0 and 1 - p(y) is 1/2, 3/4, 1/2
    assert score_criterion(tokens, "gradient_size") == pytest.approx([log(2), 1.5 * log(2), 0])
    assert score_criterion(tokens, "sure") == pytest.approx([1.5, 1.75, 1.5])
    tenth = abs(0.25**0.1 - 0.5**0.1)
    assert score_criterion(tokens, "power") == pytest.approx([tenth, tenth, 0])
    # A is -ln 2, ln 2, 0: ranks 1, 3, 2 of three, so two ends and a middle
    assert score_criterion(tokens, "tails") == pytest.approx([-1 / 3, -1 / 3, -2 / 3])


def test_bellman_by_hand():
    """Teachability 0, 1, 1 and acceptance 1/2, 1, 1: from the last token backwards.

    R = 1, 1.995, 0.9975 * 0.995...; M = 1, 1.995, 1 + 0.4975 * 1.995; so V is 1 at the last two
    tokens, and z is 0, 1, 1 (its 5 % quantile lies between V_0 and 1).
    """
    tokens = three()
    total, mass = 0.4975 * 1.995, 1 + 0.4975 * 1.995
    first = total / mass
    low = first + 0.1 * (1 - first)  # the 5 % quantile of V_0, 1, 1
    assert first < low < 1
    assert score_criterion(tokens, "bellman") == pytest.approx([0.1, 1, 1])
    unclipped = C.score_pairs(tokens, "bellman")[1]
    assert unclipped == pytest.approx([(first - low) / (1 - low), 1, 1])


def test_bellman_never_looks_into_another_response():
    tokens = table()
    one = tokens[tokens.context_id == tokens.context_id[0]]
    local = np.random.default_rng(1).random(len(tokens))
    alone = C._future_mean(one, local[one.index])
    assert C._future_mean(tokens, local)[one.index] == pytest.approx(alone)
    assert C._future_mean(tokens.iloc[:0], local[:0]).shape == (0,)


def test_bellman_of_equal_values_is_that_value():
    assert C._future_mean(table(), np.full(40, 0.3)) == pytest.approx(0.3)


def test_tails_keeps_both_ends_of_each_response():
    rng = np.random.default_rng(5)
    tokens = pd.DataFrame(
        {
            "context_id": np.repeat(["a", "b", "c"], 20),
            "position": np.tile(np.arange(20), 3),
            "advantage": rng.normal(size=60) * np.repeat([0.01, 1, 100], 20),
        }
    )
    ends = tokens.groupby("context_id").advantage.rank()
    for scope in ("context", "table"):
        kept = select(tokens, "tails", budget=0.2, scope=scope)
        assert (kept == ((ends <= 2) | (ends >= 19))).all(), scope
    assert select(tokens, "pctltail").sum() == 1, "0.1 % of 60 positions"


def test_a_token_that_the_teacher_excludes_is_at_the_end_and_not_undefined():
    tokens = three().assign(teacher_logprob=[-np.inf, log(0.5), log(0.5)])
    tokens["advantage"] = tokens.teacher_logprob - tokens.student_logprob
    assert score_criterion(tokens, "dial") == pytest.approx([0.5, 0.25, 0])
    assert score_criterion(tokens, "power")[0] == pytest.approx(0.5**0.1)
    assert score_criterion(tokens, "tails")[0] == pytest.approx(-1 / 3)
    assert np.isnan(score_criterion(tokens, "gradient_size")[0]), "an infinite |A| has no place"


def test_what_the_teacher_does_not_list_is_undefined():
    tokens = three().assign(teacher_logprob=[NAN, 0, 0], advantage=[NAN, 0, 0])
    for name in ("dial", "power", "gradient_size", "tails"):
        assert np.isnan(score_criterion(tokens, name)).tolist() == [True, False, False], name


def test_the_power_becomes_the_advantage_and_dial_is_its_other_end():
    tokens = table()
    p, q = (np.exp(tokens[f"{who}_logprob"].to_numpy()) for who in ("student", "teacher"))
    advantage = tokens.advantage.to_numpy()
    assert score_criterion(tokens, "dial") == pytest.approx(
        p * np.abs(np.expm1(advantage)), abs=1e-12
    )
    assert np.abs(q**1e-7 - p**1e-7) / 1e-7 == pytest.approx(np.abs(advantage), rel=1e-4)
    assert score_criterion(tokens, "gradient_size") == pytest.approx(
        2 * np.abs(advantage) * (score_criterion(tokens, "sure") - 1)
    )


def test_a_noise_of_zero_is_floored():
    tokens = pd.DataFrame({"ier_signal": [2.0, 1.0, NAN], "ier_noise": [0.0, 0.5, 1.0]})
    assert score_criterion(tokens, "ier") == pytest.approx([2e8, 2, NAN], nan_ok=True)


# --- two criteria by their ranks


def scored(**columns):
    frame = pd.DataFrame(columns)
    return frame.assign(position=np.arange(len(frame)))


@pytest.fixture
def two(registry):
    for name in ("first", "second"):
        criterion(name, needs=[f"{name}_score"])(lambda t, n=name: t[f"{n}_score"])


def test_and_and_or_by_hand(two):
    """Ranks 0, 1/2, 1 and 1, 0, 1/2: products 0, 0, 1/2; soft-ors 1, 1/2, 1."""
    tokens = scored(first_score=[1.0, 5.0, 70.0], second_score=[9.0, 2.0, 3.0])
    assert score_criterion(tokens, "first_and_second") == pytest.approx([0, 0, 0.5])
    assert score_criterion(tokens, "first_or_second") == pytest.approx([1, 0.5, 1])
    # equal products are ordered by u + r: 1, 1/2
    assert select(tokens, "first_and_second", budget=0.5).tolist() == [True, False, True]
    assert select(tokens, "first_or_second", budget=0.3).tolist() == [False, False, True]


def _ranks(values):
    rows = [v for v in values if np.isfinite(v)]
    return [
        (sum(w < v for w in rows) + (sum(w == v for w in rows) - 1) / 2) / max(len(rows) - 1, 1)
        if np.isfinite(v)
        else NAN
        for v in values
    ]


@pytest.mark.parametrize("pair", [("margin", "advantage_abs"), ("selectkd", "late")])
def test_a_fusion_equals_its_loop(pair):
    tokens = table(seed=3)
    tokens.loc[4, ["student_margin", "advantage"]] = NAN
    u, r = (np.array(_ranks(score_criterion(tokens, name))) for name in pair)
    assert score_criterion(tokens, "_and_".join(pair)) == pytest.approx(u * r, nan_ok=True)
    assert score_criterion(tokens, "_or_".join(pair)) == pytest.approx(u + r - u * r, nan_ok=True)


def test_ranks_go_on_where_the_clip_makes_equals():
    """N gives the three largest of 41 values one score; their ranks differ all the same."""
    tokens = scored(student_entropy=np.arange(41.0), student_margin=np.zeros(41))
    fused = score_criterion(tokens, "entropy_and_margin")
    assert (score_criterion(tokens, "entropy")[-3:] == 1).all()
    assert fused == pytest.approx(np.arange(41) / 40 * 0.5)


def test_a_row_that_is_drawn_twice_counts_twice(two):
    tokens = scored(first_score=[1.0, 2.0, 3.0], second_score=[5.0, 6.0, 4.0])
    copies = np.array([1, 2, 1])
    twice = tokens.iloc[[0, 1, 1, 2]].reset_index(drop=True)
    found = C.score_pairs(tokens, "first_and_second", copies=copies)[0]
    assert found[[0, 1, 1, 2]] == pytest.approx(score_criterion(twice, "first_and_second"))


def test_ranks_do_not_depend_on_scale(two):
    tokens = scored(first_score=[0.1, 2.0, 3.0, 9.0], second_score=[2.0, 1.0, 4.0, 3.0])
    stretched = tokens.assign(first_score=np.exp(tokens.first_score))
    for name in ("first_and_second", "first_or_second"):
        assert score_criterion(stretched, name) == pytest.approx(score_criterion(tokens, name))


def test_a_fusion_is_a_criterion_like_any_other():
    fused = find("dlearn_high_or_entropy")
    assert fused.name == "teachability_or_entropy" and fused.kind == "select"
    assert fused.needs == ("union_forward_kl", "compatibility", "student_entropy")
    assert fused.instead == {"union_forward_kl": "forward_kl"}
    assert not C.is_seeded(fused.name) and fused.name not in C.names()
    tokens = table()
    assert fused.name not in C.usual(tokens)
    assert C.missing_columns(tokens.drop(columns="student_entropy"), fused.name) == [
        "student_entropy"
    ]
    without = tokens.drop(columns="union_forward_kl")
    assert np.isfinite(score_criterion(without, fused.name)).all()


def test_a_registered_name_with_such_a_word_is_that_criterion(registry):
    criterion("entropy_and_margin", needs=["position"])(lambda t: t["position"])
    assert find("entropy_and_margin").mine and not find("entropy_and_margin").parts


@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "teachability_and_entrop",
            "'teachability_and_entrop' fuses two criteria, and 'entrop' is none. Did you mean"
            " 'entropy'? Write two names of `diagnostics criteria` with _and_ or _or_ between"
            " them.",
        ),
        (
            "entropy_or_random",
            "entropy_or_random cannot be fused: 'random' draws random numbers. Fuse two different"
            " criteria that score positions.",
        ),
        (
            "full_and_entropy",
            "full_and_entropy cannot be fused: 'full' keeps every position. Fuse two different"
            " criteria that score positions.",
        ),
        (
            "tip_and_tip",
            "tip_and_tip cannot be fused: 'tip' would be fused with itself. Fuse two different"
            " criteria that score positions.",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(name, sentence):
    with pytest.raises(DiagnosticsError) as caught:
        find(name)
    assert str(caught.value) == sentence


def test_a_fusion_of_two_unknown_names_is_an_unknown_criterion():
    with pytest.raises(DiagnosticsError, match="Unknown criterion 'this_and_that'"):
        find("this_and_that")


def test_exp_of_dial_at_beta_one_needs_no_advantage_size():
    tokens = three().assign(advantage=np.log([0.5, 2, 1]) * 7)
    assert score_criterion(tokens, "dial") == pytest.approx(
        [abs(exp(q) - exp(p)) for p, q in zip(tokens.student_logprob, tokens.teacher_logprob)]
    )


def test_a_column_on_request_is_asked_for_by_name():
    tokens = table().drop(columns=["ier_noise", "teacher_top1_gap"])
    with pytest.raises(DiagnosticsError) as caught:
        score_criterion(tokens, "ier_or_teacher_top1_gap")
    assert str(caught.value) == (
        "Criterion 'ier_or_teacher_top1_gap' needs ier_noise, teacher_top1_gap, and the table was"
        " scored without. Score with --extra ier,teacher_top1_gap, or dx.score(…, extra=['ier',"
        " 'teacher_top1_gap'])."
    )
