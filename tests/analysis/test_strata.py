"""Strata of D and the permuted teacher's share: by hand, against loops, and in every draw."""

import numpy as np
import pytest

from diagnostics.analysis import strata as S
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from diagnostics.criteria import quadrants
from tests.made_tokens import made_tokens, only_row, resampled

DRAWS = {"draws": 12}
PREFIX = {"held_out": "", "step": "own_", "all": ""}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens(prompts=16)


def rows_of(table, stratum, count=10):
    share = (table.forward_kl.rank() - 0.5) / len(table)
    return table[(share >= (stratum - 1) / count) & (share < stratum / count)]


def loop(table, stratum, prefix):
    """The statistics of one stratum, from plain sums."""
    part = rows_of(table, stratum)
    part = part[part[f"{prefix}gain"].notna()]
    gain, null = part[f"{prefix}gain"], part[f"{prefix}gain_permuted"]
    return {
        "gain": gain.mean(),
        "gain_permuted": null.mean(),
        "context_gain": (gain - null).mean(),
        "share": gain.sum() / part.forward_kl.sum(),
        "null_share": null.sum() / gain.sum() if gain.sum() > 0 else np.nan,
    }


def kept_estimates(make, tokens):
    found = {}

    def keep(*arguments):
        found.update(over_steps(*arguments))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "over_steps", keep)
        make(tokens, **DRAWS)
    return found


def test_strata_equal_a_loop(tokens):
    table = S.strata(tokens, **DRAWS)
    assert list(zip(table.split, table.stratum)) == [
        (split, stratum) for split in ("held_out", "step") for stratum in range(1, 11)
    ]
    for row in table.itertuples():
        part = rows_of(tokens, row.stratum)
        for name, value in loop(tokens, row.stratum, PREFIX[row.split]).items():
            hidden = name == "null_share" and not row.gain_low > 0
            value = np.nan if hidden else value
            assert getattr(row, name) == pytest.approx(value, abs=1e-12, nan_ok=True), name
        assert row.divergence == pytest.approx(part.forward_kl.median())
        assert row.nats_share == pytest.approx(part.forward_kl.sum() / tokens.forward_kl.sum())
        assert (row.positions, row.prompts) == (len(part), part.prompt_id.nunique())
        assert row.gain_low < row.gain < row.gain_high and row.steps == 4
    assert table.linear.isna().all() and table.linearity.isna().all()
    assert table.groupby("split").nats_share.sum().tolist() == pytest.approx([1, 1])


def test_strata_by_hand(monkeypatch):
    """Four prompts of one position each, two strata: sums, not means of ratios."""
    monkeypatch.setattr(S, "_unsure", lambda *_: set())  # two prompts tell no gain from 0
    tokens = made_tokens(folds=0, split=False).head(4)
    tokens = tokens.assign(
        prompt_id=list("abcd"),
        forward_kl=[1.0, 3.0, 10.0, 30.0],
        gain=[0.1, 0.3, 2.0, 4.0],
        gain_permuted=[0.1, 0.1, 1.0, 0.5],
        context_gain=[0.0, 0.2, 1.0, 3.5],
        first_order_gain=[0.4, 0.4, 2.0, 5.0],
    )
    table = S.strata(tokens, count=2, **DRAWS).set_index("stratum")
    assert table.divergence.tolist() == [2.0, 20.0]
    assert table.nats_share.tolist() == pytest.approx([4 / 44, 40 / 44])
    assert table.gain.tolist() == pytest.approx([0.2, 3.0])
    assert table.null_share.tolist() == pytest.approx([0.5, 0.25])
    assert table.linearity.tolist() == pytest.approx([0.5, 6 / 7])
    assert table.linear.tolist() == [False, True]
    assert np.isnan(table.share[1]) and np.isnan(table.share_low[1])
    assert table.share[2] == pytest.approx(6 / 40)


def test_every_draw_cuts_its_own_strata(tokens):
    found = kept_estimates(S.strata, tokens)
    prompts = PromptClusters(tokens.prompt_id, **DRAWS)
    for draw in range(6):
        drawn = resampled(tokens, prompts, draw)
        for stratum in (1, 5, 10):
            for name, value in loop(drawn, stratum, "own_").items():
                estimate = found["step", stratum, name]
                assert estimate.draws[draw] == pytest.approx(value, abs=1e-10, nan_ok=True)


def test_the_step_part_is_the_jackknife_over_steps(tokens):
    found = kept_estimates(S.strata, tokens)
    for name in ("gain", "share"):
        without = [loop(combine(tokens, without=f), 9, "")[name] for f in range(4)]
        assert found["held_out", 9, name].without_step == pytest.approx(without, abs=1e-12)
    same = kept_estimates(S.strata, made_tokens(prompts=16, step_spread=0.0))
    for stratum in range(1, 11):
        assert same["held_out", stratum, "gain"].step_error == pytest.approx(0, abs=1e-12)


def test_linearity_is_of_the_step_whose_first_order_gain_is_known(tokens):
    """In a fold table that is the step on fold 0: held out are the positions of other folds."""
    first = tokens.gain_fold0 * np.where(tokens.forward_kl < tokens.forward_kl.median(), 2, 1)
    table = S.strata(tokens.assign(first_order_gain=first), **DRAWS)
    for row in table.itertuples():
        part = rows_of(tokens.assign(first=first), row.stratum)
        part = part[(part.fold == 0) == (row.split == "step")]
        expected = (
            part.gain_fold0.sum() / part["first"].sum() if part["first"].sum() > 0 else np.nan
        )
        assert row.linearity == pytest.approx(expected, nan_ok=True)
        if np.isfinite(expected):
            assert row.linear == (0.8 <= expected <= 1.25)
            assert np.isnan(row.share) == (not row.linear)


def test_ties_leave_strata_out_and_a_zero_gain_has_no_share(tokens):
    tied = S.strata(tokens.assign(forward_kl=2.0), **DRAWS)
    assert tied.groupby("split").size().tolist() == [1, 1]
    assert (tied.positions == len(tokens)).all()
    still = S.strata(made_tokens(learnable=0, incompatible=0, noise=0, marginal=0), **DRAWS)
    assert still.null_share.isna().all() and (still.gain == 0).all()


def test_null_share_equals_a_loop(tokens):
    table = S.null_share(tokens, **DRAWS)
    assert len(table) == 2 * 5 and set(table.null) == {"global"}
    number = quadrants(tokens)
    for row in table.itertuples():
        part = tokens if row.quadrant == "all" else tokens[number == int(row.quadrant[1])]
        gain, null = part[f"{PREFIX[row.split]}gain"], part[f"{PREFIX[row.split]}gain_permuted"]
        assert row.gain == pytest.approx(gain.mean())
        assert row.gain_permuted == pytest.approx(null.mean())
        told = null.sum() / gain.sum() if row.gain_low > 0 else np.nan
        assert row.null_share == pytest.approx(told, nan_ok=True)
        assert row.share == pytest.approx(gain.sum() / part.forward_kl.sum())
        assert (row.positions, row.steps) == (len(part), 4)


def test_null_share_of_every_draw(tokens):
    found = kept_estimates(S.null_share, tokens)
    prompts = PromptClusters(tokens.prompt_id, **DRAWS)
    for draw in range(6):
        drawn = resampled(tokens, prompts, draw)
        q3 = drawn[quadrants(drawn) == 3]
        for quadrant, part in (("all", drawn), ("Q3", q3)):
            estimate = found["held_out", "global", quadrant, "null_share"]
            expected = part.gain_permuted.sum() / part.gain.sum()
            assert estimate.draws[draw] == pytest.approx(expected, abs=1e-10)


def test_a_teacher_that_needs_no_context_gives_all_of_the_gain_back():
    tokens = made_tokens(
        prompts=40, learnable=0.4, incompatible=0.4, marginal=0.4, noise=0.05, step_spread=0.02
    )
    row = only_row(S.null_share(tokens, draws=100), split="held_out", quadrant="all")
    assert row.null_share_low < 1 < row.null_share_high
    assert row.null_share_high - row.null_share_low < 0.3
    planted = made_tokens(
        prompts=40, learnable=1.0, incompatible=0.4, marginal=0.2, noise=0.05, step_spread=0.02
    )
    row = only_row(S.null_share(planted, draws=100), split="held_out", quadrant="all")
    assert row.null_share_high < 0.6


def test_other_nulls_have_rows_of_their_own(tokens):
    wider = tokens.assign(
        **{
            f"gain_permuted_token_type_fold{f}": 2 * tokens[f"gain_permuted_fold{f}"]
            for f in range(4)
        }
    )
    table = S.null_share(combine(wider), **DRAWS)
    pick = dict(split="step", quadrant="Q3")
    one, two = (only_row(table, null=name, **pick) for name in ("global", "token_type"))
    assert two.null_share == pytest.approx(2 * one.null_share) and two.gain == one.gain


@pytest.mark.parametrize("make, column", [(S.strata, "gain"), (S.null_share, "gain_permuted")])
def test_a_missing_column_is_refused(tokens, make, column):
    with pytest.raises(DiagnosticsError, match=rf"needs the column {column}; this one has"):
        make(tokens.drop(columns=column))


def test_nothing_is_said_of_gains_that_are_none():
    """Without divergence there are no intervals, and without a gain no share of it."""
    tokens = made_tokens(folds=4)
    small = tokens.forward_kl <= tokens.forward_kl.quantile(0.1)
    tokens = tokens.assign(forward_kl=tokens.forward_kl.where(~small, 1e-5))
    row = S.strata(tokens, **DRAWS).set_index(["split", "stratum"]).loc["held_out", 1]
    assert row.divergence == 1e-5 and np.isfinite(row.gain)
    assert np.isnan([row.gain_low, row.gain_high, row.context_gain_low]).all()
