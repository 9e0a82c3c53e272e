"""Matching within prompts, by hand and against a loop."""

import numpy as np
import pytest

from diagnostics.analysis import matching


def test_matching_by_hand():
    """Both treated are nearest to control 2; control 4 is of another prompt."""
    features = np.array([[0.0], [1.0], [1.2], [5.0], [0.0]])
    treated = np.array([True, True, False, False, False])
    control = np.array([False, False, True, True, True])
    codes = np.array([0, 0, 0, 0, 1])
    pairs = matching.match(features, treated, control, codes)
    assert (pairs.treated.tolist(), pairs.control.tolist()) == ([0, 1], [2, 2])
    assert pairs.distance == pytest.approx([1.2, 0.2])
    near = pairs.within(1.0)
    assert (near.treated.tolist(), near.control.tolist()) == ([1], [2])
    values = np.array([3.0, 4.0, 1.0, 9.0, 9.0])
    assert pairs.difference(values) == 2.5 and near.difference(values) == 3.0
    assert pairs.difference(np.array([np.nan, 4.0, 1.0, 0, 0])) == 3.0
    empty = matching.match(features, treated, control & (codes == 1), codes)
    assert len(empty.treated) == 0 and np.isnan(empty.difference(values))


def test_of_equally_near_controls_the_first_is_taken():
    features = np.array([[1.0], [0.0], [2.0]])
    pairs = matching.match(
        features, np.array([1, 0, 0], bool), np.array([0, 1, 1], bool), np.zeros(3, dtype=int)
    )
    assert pairs.control.tolist() == [1]


@pytest.mark.parametrize("seed", range(5))
def test_matching_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 7, 60)
    features = rng.normal(size=(60, 3))
    kind = rng.integers(0, 3, 60)
    pairs = matching.match(features, kind == 1, kind == 2, codes)
    expected = {}
    for i in np.flatnonzero(kind == 1):
        rivals = np.flatnonzero((kind == 2) & (codes == codes[i]))
        if len(rivals):
            apart = np.linalg.norm(features[rivals] - features[i], axis=1)
            expected[i] = (rivals[apart.argmin()], apart.min())
    assert pairs.treated.tolist() == sorted(expected)
    for i, j, distance in zip(pairs.treated, pairs.control, pairs.distance):
        assert j == expected[i][0] and distance == pytest.approx(expected[i][1])


def test_matching_removes_what_was_matched_on():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(12), 400)
    confounder = rng.normal(size=4800)
    treated = 0.5 * confounder + rng.normal(size=4800) > 0
    y = 2 * confounder + 0.5 * treated + 0.1 * rng.normal(size=4800)
    pairs = matching.match(confounder[:, None], treated, ~treated, codes)
    assert pairs.difference(y) == pytest.approx(0.5, abs=0.15)
    assert y[treated].mean() - y[~treated].mean() > 1.5


def test_standardized_difference():
    assert matching.standardized_difference(np.array([3.0, 5]), np.array([1.0]), 2.0) == 1.5
    assert np.isnan(matching.standardized_difference(np.array([]), np.array([1.0]), 2.0))
    assert np.isnan(matching.standardized_difference(np.ones(2), np.ones(2), 0))
