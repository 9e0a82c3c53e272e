"""The cross-fitted gain of the same token, against loops and by hand."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.token_identity import token_identity_gain


def fold_table(rows=60, folds=4, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    gains = {f"gain_fold{f}": rng.normal(size=rows) for f in range(folds)}
    return pd.DataFrame(
        {"token_id": rng.integers(0, tokens, rows), "fold": rng.integers(0, folds, rows), **gains}
    )


def slow(table, folds):
    """The definition, position by position."""
    out = []
    for i in table.itertuples():
        own, every = [], []
        for j in table.itertuples():
            if j.fold == i.fold:
                continue
            steps = [g for g in range(folds) if g not in (i.fold, j.fold)]
            mean = np.mean([getattr(j, f"gain_fold{g}") for g in steps])
            if np.isnan(mean):
                continue
            every.append(mean)
            if j.token_id == i.token_id:
                own.append(mean)
        m, n = np.mean(every), len(own)
        out.append(m + n / (n + 5) * (np.mean(own) - m) if n else m)
    return np.array(out)


def test_it_is_its_definition():
    for folds in (3, 4, 6):
        table = fold_table(folds=folds)
        np.testing.assert_allclose(token_identity_gain(table), slow(table, folds), atol=1e-12)


def test_worked_by_hand():
    """For i in fold 0 of three, j in fold 1 has step 2 alone and j in fold 2 has step 1 alone."""
    table = pd.DataFrame(
        {
            "token_id": [7, 7, 7, 8],
            "fold": [0, 1, 2, 2],
            "gain_fold0": [99.0, 99.0, 99.0, 99.0],
            "gain_fold1": [99.0, 99.0, 4.0, 1.0],
            "gain_fold2": [99.0, 2.0, 99.0, 99.0],
        }
    )
    overall = (2 + 4 + 1) / 3
    assert token_identity_gain(table)[0] == pytest.approx(overall + 2 / 7 * (3 - overall))


def test_nothing_of_the_positions_own_fold_or_its_step_enters():
    table = fold_table()
    before = token_identity_gain(table)
    for fold in range(4):
        here = table.fold == fold
        changed = table.copy()
        changed[f"gain_fold{fold}"] = 1e9
        changed.loc[here, [f"gain_fold{g}" for g in range(4)]] = -1e9
        np.testing.assert_array_equal(token_identity_gain(changed)[here], before[here])


def test_unknown_tokens_get_the_mean_of_all_and_nan_informs_nobody():
    table = fold_table()
    table.loc[0, "token_id"] = 1000
    table.loc[5, "gain_fold0"] = np.nan
    np.testing.assert_allclose(token_identity_gain(table), slow(table, 4), atol=1e-12)
    assert np.isfinite(token_identity_gain(table)).all()


def test_two_folds_are_too_few():
    assert token_identity_gain(fold_table(folds=2)) is None
    assert token_identity_gain(pd.DataFrame({"token_id": [1], "gain": [0.0]})) is None
