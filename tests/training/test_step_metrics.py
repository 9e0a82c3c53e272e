"""What a training logs of each step, by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.probing.scores import score
from diagnostics.training import step_metrics
from tests.conftest import make_bank, make_pair


@pytest.fixture
def tokens():
    table = score(make_pair(), make_bank([9, 9, 9]), k=4, sweep=())
    drawn = np.random.default_rng(0)
    names = ("listed_student_mass", "listed_teacher_mass")
    names += ("overlap_advantage", "overlap_advantage_teacher")
    return table.assign(**{name: drawn.random(len(table)) for name in names})


def test_the_metrics_of_others_by_hand():
    """Three positions; the last shares no token, and its advantages are undefined."""
    tokens = pd.DataFrame(
        {
            "student_entropy": [1.0, 2.0, 0.5],
            "teacher_entropy": [1.5, 1.0, 0.5],
            "topk_overlap": [0.5, 1.0, 0.0],
            "shared_student_mass": [0.6, 0.9, 0.0],
            "compatibility_intersection": [0.3, 0.6, 0.0],
            "overlap_advantage": [-0.2, -0.4, np.nan],
            "overlap_advantage_teacher": [-0.1, 0.3, np.nan],
            "listed_student_mass": [0.2, 0.4, 0.9],
            "listed_teacher_mass": [0.8, 0.9, 1.0],
        }
    )
    expected = {
        "overlap_ratio": 0.5,
        "overlap_token_advantage": -0.3,
        "entropy_gap": (0.5 + 1.0 + 0.0) / 3,
        "overlap_mass_student": 0.5,
        "overlap_mass_teacher": 0.3,
        "distillation/overlap_ratio": 0.5,
        "distillation/overlap_token_advantage": 0.1,
        "distillation/student_mass": 0.5,
        "distillation/student_mass_min": 0.2,
        "distillation/student_mass_max": 0.9,
        "distillation/teacher_mass": 0.9,
        "distillation/teacher_mass_min": 0.8,
        "distillation/teacher_mass_max": 1.0,
    }
    assert step_metrics.of_peers(tokens) == pytest.approx(expected)
    undefined = step_metrics.of_peers(tokens.assign(**dict.fromkeys(tokens, np.nan)))
    assert undefined.keys() == expected.keys() and all(map(math.isnan, undefined.values()))


def test_counts_by_hand():
    assert step_metrics.counts(np.array([0, 2.0, 0, 0.5])) == {
        "selected": 2,
        "positions": 4,
        "selected_share": 0.5,
    }


def test_selected_means_are_weighted_and_overlaps_are_jaccard(tokens):
    weights = np.zeros(len(tokens))
    weights[[1, 5, 7]] = [0.5, 1.0, 1.5]
    mask = np.zeros(len(tokens), bool)
    mask[[5, 8]] = True
    found = step_metrics.measured(tokens, weights, {"tip": mask})
    values = tokens["reverse_kl"]
    assert found["reverse_kl/all"] == pytest.approx(values.mean())
    expected = (0.5 * values[1] + values[5] + 1.5 * values[7]) / 3
    assert found["reverse_kl/selected"] == pytest.approx(expected)
    assert found["jaccard/tip"] == 1 / 4 and found["not_finite"] == 0
    assert found["overlap_ratio"] == pytest.approx(tokens["topk_overlap"].mean())
