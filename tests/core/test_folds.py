"""Folds: what the steps say together about each position."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.folds import combine, fold_columns, step_count
from diagnostics.core.schema import column

STEPS = 3


@pytest.fixture
def table() -> pd.DataFrame:
    """Six positions of six prompts in three folds."""
    rng = np.random.default_rng(4)
    made = {
        f"{name}_fold{fold}": rng.normal(size=6)
        for name in ("gain", "reverse_gain", "gain_permuted", "gain_permuted_token_type")
        for fold in range(STEPS)
    }
    keys = {"fold": [0, 1, 2, 0, 1, 2], "forward_kl": 1 + rng.random(6), "reverse_kl": np.ones(6)}
    return pd.DataFrame(keys | made)


def test_a_position_has_one_gain_of_its_own_step_and_the_mean_of_the_others(table):
    combined = combine(table)
    for row, fold in zip(combined.itertuples(), table["fold"]):
        gains = [getattr(row, f"gain_fold{step}") for step in range(STEPS)]
        others = [gain for step, gain in enumerate(gains) if step != fold]
        assert row.own_gain == gains[fold]
        assert row.gain == pytest.approx(sum(others) / 2, abs=1e-15)
        assert row.gain_sd == pytest.approx(abs(others[0] - others[1]) / 2**0.5, abs=1e-15)
        assert row.context_gain == pytest.approx(row.gain - row.gain_permuted, abs=1e-15)
        assert row.own_context_gain == pytest.approx(row.own_gain - row.own_gain_permuted)
        assert row.context_gain_token_type == pytest.approx(row.gain - row.gain_permuted_token_type)
        assert row.forward_kl_after == pytest.approx(row.forward_kl - row.gain)
        assert row.relative_gain == pytest.approx(row.gain / row.forward_kl)


def test_without_a_step_its_gains_are_in_no_column(table):
    reduced = combine(table, without=1)
    changed = combine(
        table.assign(gain_fold1=9.0, reverse_gain_fold1=9.0, gain_permuted_fold1=9.0), without=1
    )
    derived = ["gain", "own_gain", "reverse_gain", "gain_permuted", "context_gain", "relative_gain"]
    pd.testing.assert_frame_equal(reduced[derived], changed[derived])
    assert reduced["own_gain"].isna().tolist() == [False, True, False] * 2
    assert reduced["gain_sd"].isna().tolist() == [True, False, True] * 2


def test_two_folds_leave_one_step_to_each_position_and_none_without_it(table):
    two = table.assign(fold=[0, 1] * 3).drop(
        columns=[name for name in table if name.endswith("_fold2")]
    )
    assert step_count(two) == 2
    assert (
        combine(two)["gain"].tolist()
        == np.where(two["fold"] == 0, two["gain_fold1"], two["gain_fold0"]).tolist()
    )
    assert combine(two, without=0)["gain"].isna().tolist() == [False, True] * 3


def test_a_table_without_folds_has_one_step(table):
    assert step_count(table.drop(columns="fold")) == 1
    assert fold_columns(table, "context_gain") == []


def test_an_undefined_gain_stays_undefined(table):
    table.loc[0, "gain_fold1"] = np.nan
    combined = combine(table)
    assert np.isnan(combined.loc[0, "gain"])
    assert np.isfinite(combined.loc[0, "own_gain"])


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("gain_fold3", "gain"),
        ("gain_permuted_token_type_fold0", "gain_permuted_token_type"),
        ("reverse_gain_h20", "reverse_gain"),
        ("gain_step_100", "gain"),
        ("compatibility_k8", "compatibility"),
    ],
)
def test_variants_have_the_schema_entry_of_their_column(name, base):
    assert column(name).name == base


@pytest.mark.parametrize("name", ["forward_kl_fold1", "gain_k8", "compatibility_h5", "my_fold1"])
def test_a_variant_of_a_column_that_has_none_is_unknown(name):
    assert column(name) is None
