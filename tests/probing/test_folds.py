"""Folds of prompts: balance against random splits, determinism, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.probing.folds import BALANCED, assign_folds, folds_of, prompt_values


def table(prompts=64, seed=0):
    """Prompts of unlike length, entropy and (heavy-tailed) divergence, some with two contexts."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(prompts):
        level, entropy = rng.lognormal(0, 1), rng.uniform(0, 3)
        for _ in range(1 + (number % 5 == 0)):
            rows += [
                (f"p{number}", level * rng.exponential(), entropy + rng.normal())
                for _ in range(rng.integers(1, 60))
            ]
    return pd.DataFrame(rows, columns=["prompt_id", "forward_kl", "student_entropy"])


def imbalance(tokens, fold_N):
    """Variance of the folds' means in units of the prompts' variance, over the values."""
    values = prompt_values(tokens)
    fold = tokens.assign(fold=fold_N).groupby("prompt_id").fold.first().loc[values.index]
    means = values.groupby(fold.to_numpy()).mean()
    return float((means.var() / values.var()).sum())


def test_folds_are_balanced_far_better_than_a_random_split():
    for seed in range(3):
        tokens = table(seed=seed)
        own = imbalance(tokens, assign_folds(tokens, 4, seed=seed))
        names, rng = tokens.prompt_id.unique(), np.random.default_rng(seed)
        split = []
        for _ in range(100):
            order = rng.permutation(len(names)) % 4
            split.append(imbalance(tokens, tokens.prompt_id.map(dict(zip(names, order)))))
        assert own < np.quantile(split, 0.02), seed


@pytest.mark.parametrize("prompts, count", [(2, 2), (5, 4), (4, 4), (23, 4), (64, 7)])
def test_every_fold_gets_its_share_of_whole_prompts(prompts, count):
    tokens = table(prompts)
    fold_N = assign_folds(tokens, count, seed=3)
    assert fold_N.dtype == np.int32 and set(fold_N) == set(range(count))
    by_prompt = tokens.assign(fold=fold_N).groupby("prompt_id").fold
    assert (by_prompt.nunique() == 1).all()
    sizes = by_prompt.first().value_counts()
    assert sizes.max() - sizes.min() <= 1


def test_names_values_and_seed_decide_not_the_order_of_the_table():
    tokens = table()
    fold_N = assign_folds(tokens, 4, seed=0)
    assert (fold_N == assign_folds(tokens, 4, seed=0)).all()
    assert not (fold_N == assign_folds(tokens, 4, seed=1)).all()
    order = np.argsort(tokens.prompt_id.to_numpy(), kind="stable")[::-1]
    np.testing.assert_array_equal(assign_folds(tokens.iloc[np.sort(order)], 4, seed=0), fold_N)
    prompts_backwards = tokens.iloc[
        np.concatenate(
            [np.flatnonzero(tokens.prompt_id == name) for name in tokens.prompt_id.unique()[::-1]]
        )
    ]
    np.testing.assert_array_equal(
        assign_folds(prompts_backwards, 4, seed=0), fold_N[prompts_backwards.index]
    )


def test_four_prompts_worked_by_hand():
    """Two pairs of alike prompts: each fold gets one of each pair, whatever the seed."""
    tokens = pd.DataFrame(
        {
            "prompt_id": ["a", "b", "c", "d"],
            "forward_kl": [9.0, 9.0, 1.0, 1.0],
            "student_entropy": [2.0, 2.0, 0.5, 0.5],
        }
    )
    for seed in range(8):
        fold_N = assign_folds(tokens, 2, seed=seed)
        assert sorted(fold_N[:2]) == [0, 1] == sorted(fold_N[2:])


def test_unmeasured_prompts_and_constant_values_do_no_harm():
    tokens = table(12)
    tokens.loc[tokens.prompt_id == "p3", list(BALANCED[:2])] = np.nan
    tokens["student_entropy"] = 1.0
    assert set(assign_folds(tokens, 4, seed=0)) == {0, 1, 2, 3}


def test_folds_of_a_table():
    assert folds_of(pd.DataFrame({"fold": [2, 0]})).tolist() == [2, 0]
    assert folds_of(pd.DataFrame({"split": ["step", "held_out"]})).tolist() == [0, 1]
    assert folds_of(pd.DataFrame({"token": ["x"]})) is None


@pytest.mark.parametrize(
    "count, seed, message",
    [
        (1, 0, r"^folds is 1, and what is held out for a step are the other folds\. Use at least"),
        (4, -1, r"^A seed is a whole number of at least 0; got -1\.$"),
        (9, 0, r"^8 prompts cannot fill 9 folds\. Every fold needs one at least; use more prompts"),
    ],
)
def test_folds_that_cannot_be_made(count, seed, message):
    with pytest.raises(DiagnosticsError, match=message):
        assign_folds(table(8), count, seed=seed)
