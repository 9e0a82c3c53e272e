"""Several teachers on one bank: means, paired differences, who is best where, and agreement."""

import math

import numpy as np
import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.analysis.teachers import LEARNABLE, compare_teachers, teachers_sentences
from tests.factories import message
from tests.made_tokens import made_tokens

DRAWS = {"draws": 100, "seed": 1}


def base(prompts=24, **options):
    tokens = made_tokens(prompts, **options)
    rng = np.random.default_rng(7)
    tokens["student_logprob"] = -rng.exponential(size=len(tokens))
    return tokens


def pair_of(seed=0, shift=0.5, **options):
    """The same student with two teachers: the second's divergence is larger by `shift`."""
    one = base(**options)
    rng = np.random.default_rng(seed)
    other = one.copy()
    other["forward_kl"] = one["forward_kl"] + shift + 0.1 * rng.normal(size=len(one)) ** 2
    other["advantage"] = rng.permutation(one["advantage"].to_numpy())
    return {"small": one, "large": other}


def row(table, **cells):
    found = table
    for name, value in cells.items():
        found = found[found[name] == value]
    assert len(found) == 1, found
    return found.iloc[0]


def four_positions():
    """Two prompts of two positions, worked by hand."""
    one = pd.DataFrame(
        {
            "context_id": ["a", "a", "b", "b"],
            "prompt_id": ["p", "p", "q", "q"],
            "position": [0, 1, 0, 1],
            "response_length": 2,
            "token_id": [1, 2, 3, 4],
            "token": "t",
            "student_logprob": -1.0,
            "student_entropy": [0.1, 0.5, 0.9, 1.3],
            "forward_kl": [1.0, 2.0, 3.0, 4.0],
            "compatibility": [0.5, 0.5, 1.0, 0.25],
            "advantage": [1.0, 2.0, 3.0, 4.0],
        }
    )
    other = one.assign(forward_kl=[2.0, 2.0, 1.0, 4.0], compatibility=[0.5, 0.5, 1.0, 0.5])
    return {"A": one, "B": other}


def test_four_positions_by_hand():
    made = compare_teachers(four_positions(), criteria=["divergence"], budgets=[0.5], **DRAWS)
    means = made["teachers"]
    # D*C of A: 0.5, 1, 3, 1; of B: 1, 1, 1, 2
    assert row(means, teacher="A", measure=LEARNABLE, group="all")["mean"] == 5.5 / 4
    assert row(means, teacher="B", measure=LEARNABLE, group="all")["mean"] == 5 / 4
    apart = row(made["teachers_differences"], measure=LEARNABLE, group="all")
    assert apart.difference == 0.5 / 4 and apart.verdict == "too few prompts"
    best = made["teachers_best"]
    # a0: B, a1: both, b0: A, b1: B
    assert row(best, teacher="A", group="all")["share"] == 1.5 / 4
    assert row(best, teacher="B", group="all")["share"] == 2.5 / 4
    assert set(best["chance"]) == {0.5}
    jaccard = row(made["teachers_agreement"], what="Jaccard", size=0.5)
    # A selects b0, b1 by D; B selects b1 and one of a0, a1, which tie
    assert jaccard.value == 1 / 3 and jaccard.chance == pytest.approx(0.5 / 1.5)
    assert row(made["teachers_agreement"], measure="advantage").value == pytest.approx(1.0)


def test_ranks_agree_as_a_slow_computation_does():
    tables = pair_of()
    made = compare_teachers(tables, **DRAWS)
    for measure in ("advantage", "forward_kl"):
        x, y = (table[measure].rank() for table in tables.values())
        slow = np.corrcoef(x, y)[0, 1]
        found = row(made["teachers_agreement"], what="rank correlation", measure=measure)
        assert found.value == pytest.approx(slow, abs=1e-9)
        assert found.low < found.value < found.high


def test_a_teacher_against_itself_agrees_and_is_not_told_apart():
    tokens = base()
    made = compare_teachers({"A": tokens, "B": tokens.copy()}, **DRAWS)
    assert (made["teachers_differences"]["difference"].dropna() == 0).all()
    assert not set(made["teachers_differences"]["verdict"]) & {"higher", "lower"}
    agreement = made["teachers_agreement"]
    assert agreement["value"].tolist() == pytest.approx([1.0] * len(agreement))
    assert row(made["teachers_best"], teacher="A", group="all")["share"] == 0.5


def test_a_larger_divergence_is_told_apart_and_an_unrelated_advantage_is_not():
    made = compare_teachers(pair_of(shift=0.5), **DRAWS)
    differences = made["teachers_differences"]
    assert row(differences, measure="forward_kl", group="all").verdict == "lower"
    assert row(differences, measure="advantage", group="all").verdict == "not told apart"
    correlation = row(made["teachers_agreement"], what="rank correlation", measure="advantage")
    assert correlation.low < 0 < correlation.high
    said = teachers_sentences(made)
    assert said[0].startswith("small offers less that this student can follow than large over all")


def test_teachability_is_on_one_scale_for_all_teachers():
    """A scale per teacher would give both the same mean."""
    tables = pair_of(shift=3.0)
    means = compare_teachers(tables, **DRAWS)["teachers"]
    small, large = (
        row(means, teacher=name, measure="teachability", group="all")["mean"] for name in tables
    )
    assert large > 1.5 * small
    pooled = dx.score_criterion(pd.concat(list(tables.values())), "teachability")
    assert small == pytest.approx(pooled[: len(tables["small"])].mean())


def test_domains_are_groups_and_prompts_without_one_are_counted():
    tables = pair_of()
    domains = {f"p{i}": ("math" if i < 10 else "code") for i in range(20)}
    means = compare_teachers(tables, domains=domains, **DRAWS)["teachers"]
    of = means[(means["teacher"] == "small") & (means["measure"] == "forward_kl")]
    found = of.set_index("group")
    tokens = tables["small"]
    math_rows = tokens["prompt_id"].map(domains) == "math"
    assert found.loc["domain math", "mean"] == pytest.approx(tokens["forward_kl"][math_rows].mean())
    assert found.loc["domain math", "prompts"] == 10 and found.loc["no domain", "prompts"] == 4
    parts = ["domain math", "domain code", "no domain"]
    assert found.loc[parts, "positions"].sum() == found.loc["all", "positions"]
    quarters = [name for name in found.index if "quarter" in name]
    assert found.loc[quarters, "positions"].sum() == found.loc["all", "positions"]


def test_below_twenty_prompts_nothing_is_judged():
    made = compare_teachers(pair_of(prompts=19, shift=5.0), **DRAWS)
    assert set(made["teachers_differences"]["verdict"]) == {"too few prompts"}


def test_a_bound_is_not_judged_against_an_exact_value():
    tables = pair_of(shift=5.0)
    tables["large"] = tables["large"].assign(teacher_tail_mass=0.1)
    made = compare_teachers(tables, **DRAWS)
    found = row(made["teachers_differences"], measure="forward_kl", group="all")
    assert found.exactness == "exact against lower bound" and found.verdict == "not comparable"
    assert math.isnan(found.p_value)
    one = row(made["teachers"], teacher="large", measure="compatibility", group="all")
    assert one.exactness == "lower bound"


def test_gains_carry_the_steps_and_other_measures_the_prompts():
    tables = pair_of()
    made = compare_teachers(tables, **DRAWS)["teachers"]
    assert {"gain", "context_gain"} <= set(made["measure"])
    alone = {name: t.drop(columns=[c for c in t if "_fold" in c]) for name, t in tables.items()}
    still = compare_teachers(alone, **DRAWS)["teachers"]
    for measure, wider in (("gain", True), ("forward_kl", False)):
        widths = [
            np.subtract(*row(t, teacher="small", measure=measure, group="all")[["high", "low"]])
            for t in (made, still)
        ]
        assert (widths[0] > widths[1]) == wider


def test_overlap_of_the_likeliest_tokens_by_hand():
    tables = four_positions()
    lists = {"A": [[1, 2, 3, 4, 5]] * 4, "B": [[1, 9, 3, 8, 7], [2, 1, 3, 4, 5], [1], []]}
    keys = tables["A"][["context_id", "position"]]
    tops = {name: keys.assign(teacher_top_ids=each) for name, each in lists.items()}
    agreement = compare_teachers(tables, tops=tops, **DRAWS)["teachers_agreement"]
    first = row(agreement, what="overlap", size=1)
    assert first.value == pytest.approx(2 / 3) and first.positions == 3  # the last list is empty
    assert row(agreement, what="overlap", size=5).value == pytest.approx((2 / 5 + 1) / 2)


def test_positions_that_one_table_lacks_are_left_out_and_counted(caplog):
    tables = pair_of()
    tables["large"] = tables["large"].iloc[3:]
    made = compare_teachers(tables, **DRAWS)["teachers"]
    left = made.groupby("teacher")["left_out"].first()
    assert left.to_dict() == {"small": 3, "large": 0}
    assert "left out: 3 of small" in caplog.text


def test_what_is_not_one_bank_of_one_student_is_refused():
    tables = pair_of()
    assert "got 1. Give two runs" in message(compare_teachers, {"A": tables["small"]})
    other = tables["large"].assign(token_id=tables["large"]["token_id"] + 1)
    assert "the responses are not the same" in message(
        compare_teachers, {"A": tables["small"], "B": other}
    )
    apart = tables["large"].assign(student_logprob=tables["large"]["student_logprob"] - 1)
    assert "different students or dtypes" in message(
        compare_teachers, {"A": tables["small"], "B": apart}
    )
    renamed = tables["large"].assign(context_id="x" + tables["large"]["context_id"])
    assert "share no position" in message(compare_teachers, {"A": tables["small"], "B": renamed})
