"""Relative gains and acceptance: worked by hand, for every kind of array."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.core.formulas import (
    RELATIVE_GAIN_FLOOR,
    RELEASED_EPSILON,
    acceptance,
    relative_gain,
    released_relative_gain,
)

BEFORE, AFTER = np.array([2.0, 0.5, 0.0009, 0.0]), np.array([1.5, 0.6, 0.0003, 0.0])


@pytest.mark.parametrize("kind", [np.asarray, pd.Series])
def test_relative_gains_by_hand(kind):
    found = relative_gain(kind(BEFORE), kind(AFTER))
    np.testing.assert_allclose(found, [0.25, -0.2, np.nan, np.nan], rtol=1e-15)
    released = released_relative_gain(kind(BEFORE), kind(AFTER))
    np.testing.assert_allclose(released, [0.25, -0.2, 2 / 3, 0.0], rtol=1e-8)


def test_the_floor_itself_counts():
    at = np.array([RELATIVE_GAIN_FLOOR])
    assert relative_gain(at, at / 2) == 0.5
    assert relative_gain(at, at / 2, floor=0.01) != relative_gain(at, at / 2)
    assert RELEASED_EPSILON < RELATIVE_GAIN_FLOOR


@pytest.mark.parametrize("kind", [np.asarray, pd.Series, torch.tensor])
def test_acceptance_is_the_smaller_of_one_and_the_ratio(kind):
    ratio = [0.25, 1.0, 3.0, np.nan]
    found = acceptance(kind(np.log(ratio)))
    assert type(found) is type(kind(np.log(ratio)))
    np.testing.assert_allclose(np.asarray(found), [0.25, 1.0, 1.0, np.nan], rtol=1e-15)
