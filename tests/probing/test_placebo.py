"""The placebo's sizes: by hand, and against steps that are taken one by one."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.core.progress import no_shards
from diagnostics.probing.one_step import probe
from diagnostics.probing.placebo import placebo_by_rollouts, placebo_gains, placebo_table
from diagnostics.probing.scores import score
from diagnostics.probing.step import ProbeConfig, prepare_step
from tests.conftest import make_bank, make_pair


@pytest.fixture(scope="module")
def setting():
    pair, bank = make_pair(), make_bank([5, 9, 6, 7, 12, 4, 8, 6])
    return pair, bank, score(pair, bank)


def test_sizes_by_hand():
    tokens = pd.DataFrame({"forward_kl": [5e-4, 5.0, 1.0, 0.5], "prompt_id": ["a", "a", "b", "c"]})
    step_N = np.array([0.1, 0.3, -0.5, 7.0])
    gains = [np.array([1.0, 2.0, -4.0, np.nan]), np.array([-1.0, -2.0, 2.0, np.nan])]
    table = placebo_table(tokens, step_N, gains).set_index("stratum")
    whole = table.loc["all"]
    assert (whole.positions, whole.prompts, whole.directions) == (3, 2, 1)
    assert whole.mean_gain == pytest.approx(-2 / 6) and whole.mean_abs_gain == pytest.approx(2)
    assert whole.sd == pytest.approx(np.std([1, 2, -4, -1, -2, 2], ddof=1))
    assert whole.step_mean_gain == pytest.approx(-0.1 / 3)
    assert whole.step_mean_abs_gain == pytest.approx(0.3)
    assert table.loc["1 to inf"].positions == 2 and table.loc["1 to inf"].mean_abs_gain == 2.5
    assert table.loc["0 to 0.001"].step_mean_gain == 0.1
    empty = table.loc["0.1 to 1"]  # its position was not measured
    assert empty.positions == 0 and np.isnan(empty.mean_gain) and np.isnan(empty.step_sd)
    assert table.positions.iloc[1:].sum() == whole.positions


def test_no_placebo_is_an_empty_table():
    tokens = pd.DataFrame({"forward_kl": [1.0], "prompt_id": ["a"]})
    table = placebo_table(tokens, np.array([1.0]), [])
    assert (table.positions == 0).all() and (table.directions == 0).all()


def test_a_placebo_moves_as_far_both_ways_and_measures_the_next_fold(setting):
    pair, bank, tokens = setting
    step = prepare_step(pair, bank, tokens, ProbeConfig(step=1e-4))
    bench = step.bench
    moved = []
    real = bench.rescore

    def rescore(*args, **options):
        moved.append([(p - o).detach() for p, o in zip(bench.parameters, bench.origin)])
        return real(*args, **options)

    bench.rescore = rescore
    found = list(placebo_gains(step, directions=2, seed=0, shards=no_shards))
    assert len(found) == 4 == len(moved) - 1
    assert all((move == 0).all() for move in moved.pop(0))
    here = bench.folds == 1
    assert all((np.isfinite(gain_N) == here).all() for gain_N in found)
    for move in moved:
        for m, u in zip(move, step.direction.update, strict=True):
            torch.testing.assert_close(m.abs(), 1e-4 * u.abs(), atol=2e-7, rtol=1e-2)
    for there, back in (moved[:2], moved[2:]):
        for a, b in zip(there, back, strict=True):
            torch.testing.assert_close(a, -b, atol=2e-7, rtol=1e-2)
    assert not torch.allclose(moved[0][0], moved[2][0])
    # what is left of both ways together is curvature: small beside either
    assert np.abs(found[0] + found[1])[here].mean() < 0.1 * np.abs(found[0])[here].mean()
    bench.require_restored()


def test_the_probe_tabulates_it_against_its_own_step(setting):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, placebos=1, nulls=(), horizon=(), step=1e-4)
    assert not any("placebo" in name for name in result.tokens)
    step = prepare_step(pair, bank, tokens, ProbeConfig(step=1e-4))
    gains = list(placebo_gains(step, directions=1, seed=0, shards=no_shards))
    here = (result.tokens.fold == 1).to_numpy()
    whole = result.placebo.set_index("stratum").loc["all"]
    assert whole.positions == here.sum() and whole.directions == 1
    assert whole.mean_abs_gain == pytest.approx(np.mean([np.abs(g[here]).mean() for g in gains]))
    assert whole.step_mean_gain == pytest.approx(result.tokens.gain_fold0[here].mean())


def test_right_and_wrong_responses_have_rows_of_their_own():
    """A side's rows are the table of its positions alone; a position that is not judged counts in
    the rows of all.
    """
    rng = np.random.default_rng(0)
    correct = np.array([1, 1, 0, 0, 0, np.nan] * 4)
    tokens = pd.DataFrame(
        {
            "forward_kl": rng.gamma(0.5, size=24),
            "prompt_id": np.repeat(list("abcd"), 6),
            "correct": correct,
        }
    )
    step_N, gains = rng.normal(size=24), [rng.normal(size=24) for _ in range(4)]
    found = placebo_by_rollouts(tokens, step_N, gains)
    assert list(found["rollouts"].unique()) == ["all", "right", "wrong"]
    whole = found[found["rollouts"] == "all"].drop(columns="rollouts")
    pd.testing.assert_frame_equal(whole, placebo_table(tokens, step_N, gains))
    assert whole["positions"].iloc[0] == 24
    mask_N = correct == 0
    alone = placebo_table(tokens[mask_N], step_N[mask_N], [each[mask_N] for each in gains])
    own = found[found["rollouts"] == "wrong"].drop(columns="rollouts").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, alone)
    unjudged = placebo_by_rollouts(tokens.drop(columns="correct"), step_N, gains)
    pd.testing.assert_frame_equal(unjudged, placebo_table(tokens, step_N, gains))
