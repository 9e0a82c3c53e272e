"""Means of a training's steps by tenth of the responses."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.training.positions import MEASURED, by_tenth


def step(lengths, seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    places = [(length, t) for length in lengths for t in range(length)]
    table = pd.DataFrame(places, columns=["response_length", "position"])
    return table.assign(**{name: rng.exponential(size=len(places)) for name in MEASURED})


def test_three_tokens_by_hand():
    tokens = step([3]).assign(reverse_kl=[1.0, 2.0, 6.0])
    found = by_tenth(tokens, np.array([0.0, 2.0, 0.0]))
    assert found[["tenth", "positions", "reverse_kl", "selected_share"]].values.tolist() == [
        [0, 1, 1.0, 0.0],
        [5, 1, 2.0, 1.0],
        [9, 1, 6.0, 0.0],
    ]


def test_means_equal_a_loop_and_hold_every_position_once():
    tokens, rng = step([1, 4, 17, 30]), np.random.default_rng(1)
    tokens.loc[rng.random(len(tokens)) < 0.2, "reverse_kl"] = np.nan
    weights = rng.random(len(tokens)) * (rng.random(len(tokens)) < 0.5)
    found = by_tenth(tokens, weights).set_index("tenth")
    assert found.positions.sum() == len(tokens)
    for tenth, row in found.iterrows():
        inside = [
            i
            for i, (length, t) in enumerate(zip(tokens.response_length, tokens.position))
            if min(int(10 * t / max(length - 1, 1)), 9) == tenth
        ]
        for name in MEASURED:
            values = [tokens[name][i] for i in inside if np.isfinite(tokens[name][i])]
            expected = sum(values) / len(values) if values else np.nan
            assert row[name] == pytest.approx(expected, nan_ok=True)
        assert row.selected_share == pytest.approx(
            sum(weights[i] > 0 for i in inside) / len(inside)
        )


def test_what_is_nowhere_finite_has_no_mean():
    found = by_tenth(step([2]).assign(forward_kl=[np.inf, np.nan]), np.ones(2))
    assert found.forward_kl.isna().all() and found.reverse_kl.notna().all()
