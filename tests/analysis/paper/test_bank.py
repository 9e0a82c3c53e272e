"""The token table as the released scripts see it: hand-worked columns, Q3, and what is refused."""

import logging

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper import bank
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens, quantile, script_columns
from tests.factories import keys, message


def test_values_are_scaled_between_their_5_and_95_percent_quantiles():
    # Of 0..20 the quantiles are 1 and 19.
    found = bank.scaled(np.arange(21))

    assert found[[0, 1, 10, 19, 20]] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("values", [[], [3.0, 3.0], [1.0, 1.0 + 5e-13, 1.0]])
def test_a_column_with_no_spread_is_0(values):
    assert (bank.scaled(values) == 0).all()


def test_scaling_ignores_unit_and_origin():
    values = np.random.default_rng(0).normal(size=200)

    assert bank.scaled(7 * values - 3) == pytest.approx(bank.scaled(values), abs=1e-12)


def test_equal_values_share_their_mean_percentile_rank():
    assert bank.percentile_ranks([3, 1, 1, 2]) == pytest.approx([1, 0.375, 0.375, 0.75])


def test_the_soft_or_rounds_as_the_scripts_do():
    assert bank.soft_or(0.5, 0.5) == 0.75
    # Written so, one of the two being 1 does not always give exactly 1.
    ones = bank.soft_or(np.ones(1000), np.random.default_rng(0).random(1000))
    assert ones == pytest.approx(np.ones(1000)) and (ones < 1).any()


def test_the_gain_is_relative_without_a_floor():
    tokens = keys(forward_kl=[2.0, 1e-12], forward_kl_after=[1.0, 3e-12])

    assert bank.released_gain(tokens) == pytest.approx([0.5, -1.0])


def test_the_gain_of_an_imported_file_is_kept_to_the_last_bit():
    both = keys(
        forward_kl=[2.0, 2.0], forward_kl_after=[1.0, 1.0], relative_gain_released=[0.1, -2.0]
    )

    assert list(bank.released_gain(both)) == [0.1, -2.0]
    assert list(bank.released_gain(both.drop(columns=["forward_kl_after"]))) == [0.1, -2.0]


@pytest.mark.parametrize("column", ["fold", "split", "gain_permuted"])
def test_the_gain_beside_a_probe_is_the_checkpoints(column):
    both = keys(
        forward_kl=[2.0, 2.0], forward_kl_after=[1.0, 1.0], relative_gain_released=[0.1, -2.0]
    )

    assert bank.released_gain(both.assign(**{column: 0})) == pytest.approx([0.5, 0.5])


def test_a_table_without_a_trained_student_is_refused_with_the_command():
    assert message(bank.released_gain, keys(forward_kl=[1.0, 2.0])) == (
        "A statistic of the released scripts needs forward_kl_after, and the table has context_id,"
        " prompt_id, position, response_length, token_id, token, forward_kl. Score the contexts"
        " with the trained student: opd-diagnostics score --after CHECKPOINT, or import the files"
        " from before and after training together."
    )


def test_a_table_without_a_measurement_is_refused_with_the_remedy():
    tokens = checkpoint_tokens().drop(columns="compatibility_k8")

    assert "needs compatibility_k8, and the table has" in message(bank.script_table, tokens, k=8)
    assert "Score the contexts, with --sweep for another K." in message(
        bank.script_table, tokens, k=8
    )


@pytest.mark.parametrize(
    "k, when, column",
    [
        (None, "before", "compatibility"),
        (16, "before", "compatibility"),
        (8, "before", "compatibility_k8"),
        (16, "after", "compatibility_after"),
        (8, "after", "compatibility_k8_after"),
    ],
)
def test_the_column_of_a_support_is_named(k, when, column):
    assert bank.column_at(keys(), "compatibility", k, when) == column


def test_columns_without_a_suffix_belong_to_the_k_that_the_table_states():
    tokens = keys()
    tokens.attrs["k"] = 8

    assert bank.column_at(tokens, "compatibility", 8) == "compatibility"
    assert bank.column_at(tokens, "compatibility", 16) == "compatibility_k16"


def test_a_table_of_the_scripts_equals_a_loop():
    tokens = checkpoint_tokens()
    table, slow = bank.script_table(tokens), script_columns(tokens)

    for ours, theirs in (
        ("entropy", "h"),
        ("divergence", "d"),
        ("compatibility", "c"),
        ("teacher_entropy", "ht"),
        ("gain", "gain"),
    ):
        assert getattr(table, ours) == pytest.approx(slow[theirs], abs=1e-12)
    low_h, high_d = (quantile(list(slow[name]), 0.5) for name in ("h", "d"))
    expected = [h <= low_h and d >= high_d for h, d in zip(slow["h"], slow["d"])]
    assert list(table.in_q3) == expected and table.contexts == 10 and table.dropped == 0


def test_both_medians_belong_to_q3():
    one = np.ones(3)
    table = bank.ScriptTable(
        np.arange(3), np.zeros(3, int), one, np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.5, 1.0]),
        one, one, one,
    )  # fmt: skip

    assert list(table.in_q3) == [False, True, False]


def test_entropy_and_compatibility_are_the_trained_students_by_choice():
    tokens = checkpoint_tokens()
    before = bank.script_table(tokens)
    after = bank.script_table(tokens, entropy="after", compatibility="after", k=8)

    assert after.entropy == pytest.approx(bank.scaled(tokens.student_entropy_after))
    assert after.compatibility == pytest.approx(bank.scaled(tokens.compatibility_k8_after))
    assert (after.divergence == before.divergence).all() and (after.gain == before.gain).all()


def test_scores_are_those_of_the_scripts():
    h, d, c = np.array([0.5, 0.2, 1.0]), np.array([0.5, 0.9, 0.0]), np.array([0.5, 0.1, 1.0])
    ones = np.ones(3)
    table = bank.ScriptTable(np.arange(3), np.arange(3), ones, h, d, c, ones, ones)
    inside = np.array([2.0, 2.0, 0.0])

    expected = {
        "entropy": h,
        "divergence": d,
        "compatibility": c,
        "teachability": [0.25, 0.09, 0.0],
        "incompatible": [0.25, 0.81, 0.0],
        "tip": [0.75, 0.92, 1.0],
        "teachability_entropy": [0.625, 0.272, 1.0],
        "q3_compatibility": inside + c,
        "q3_teachability_first": [2.25, 2.09, 0.0],
        "q3_divergence": inside + d,
    }
    assert expected.keys() == bank.SCORES.keys()
    for name, score in expected.items():
        assert table.score(name) == pytest.approx(score), name
    assert message(table.score, "jsd").startswith("The released scripts have no score 'jsd'.")


def test_positions_without_a_column_are_left_out_and_counted(caplog):
    tokens = checkpoint_tokens()
    whole = bank.script_table(tokens.drop(index=[0, 5]).reset_index(drop=True))
    tokens.loc[0, "teacher_entropy"] = np.nan
    tokens.loc[5, "forward_kl_after"] = np.inf
    with caplog.at_level(logging.INFO, "diagnostics"):
        table = bank.script_table(tokens)

    assert table.dropped == 2 and len(table) == len(tokens) - 2 and 5 not in table.rows
    assert (table.entropy == whole.entropy).all() and (table.context == whole.context).all()
    assert "2 positions lack a column of the released scripts and are left out" in caplog.text


def test_a_table_without_a_whole_position_is_refused():
    tokens = checkpoint_tokens().assign(teacher_entropy=np.nan)

    assert message(bank.script_table, tokens).startswith(f"None of the {len(tokens)} positions has")


def test_a_column_with_gaps_is_refused_where_every_position_counts():
    assert message(bank.require_finite, "x", np.array([1.0, np.nan])) == (
        "x is not finite at 1 of 2 positions, where the released scripts would read a number. Drop"
        " those positions, or measure them again."
    )


def test_contexts_are_numbered_in_order_of_appearance():
    tokens = checkpoint_tokens()
    backwards = pd.concat([part for _, part in list(tokens.groupby("context_id"))[::-1]])
    table = bank.script_table(backwards.reset_index(drop=True))

    assert list(dict.fromkeys(table.context)) == list(range(10))
