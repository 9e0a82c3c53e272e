"""The claims' statistics by form of the gain; supports, saturation and coverage."""

import numpy as np
import pytest

from diagnostics.analysis import claim_statistics
from diagnostics.analysis import robustness as R
from diagnostics.analysis.config import Bootstrap
from tests.made_tokens import made_tokens, only_row

DRAWS = {"draws": 10}
BASE = claim_statistics.Support("compatibility", 16, "compatibility")


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


@pytest.fixture(scope="module")
def varied(tokens):
    return R.gain_robustness(tokens, losses={"forward_kl": made_tokens(seed=5)}, **DRAWS)


def test_every_proxy_and_k_of_the_columns(tokens):
    assert R.supports(tokens) == [
        ("compatibility", 16, "compatibility"),
        ("topk_overlap", 16, "topk_overlap"),
        ("compatibility", 8, "compatibility_k8"),
        ("topk_overlap", 8, "topk_overlap_k8"),
    ]
    assert R.supports(tokens, base_k=8) == [
        ("compatibility", 8, "compatibility"),
        ("topk_overlap", 8, "topk_overlap"),
    ]


def test_every_form_of_the_gain_has_its_rows(varied):
    assert list(dict.fromkeys(varied.variant)) == [
        "nothing",
        "winsorised_0.01",
        "winsorised_0.05",
        "no_special_tokens",
        "no_first_position",
        "neither",
        "loss_forward_kl",
    ]
    assert set(varied.statistic) == set(R.VARIED_STATISTICS)
    assert set(varied.split) == {"held_out"} and (varied.steps == 4).all()
    assert set(varied[varied.variant == "nothing"].outcome) == set(R.GAIN_FORMS)
    assert set(varied[varied.variant != "nothing"].outcome) == set(R.VARIED_OUTCOMES)


def test_the_statistics_are_those_of_the_claims(tokens, varied):
    kept = tokens[~tokens.is_special & (tokens.position > 0)].reset_index(drop=True)
    kinds = {"context_gain": ("controlled",)}
    for variant, table in (("nothing", tokens), ("neither", kept)):
        found = claim_statistics.estimates(
            table, kinds, BASE, {}, widened="", bootstrap=Bootstrap(**DRAWS)
        )
        for key, estimate in found.items():
            if key.population == "held_out" and key.name in R.VARIED_STATISTICS:
                row = only_row(varied, variant=variant, outcome="context_gain", statistic=key.name)
                assert row.estimate == pytest.approx(estimate.value)
                assert row.low == pytest.approx(estimate.interval(0.95)[0], nan_ok=True)


def test_the_gain_is_winsorised_in_each_draw(tokens, varied):
    """Clipping after the draw: the same as a table whose drawn gains were clipped."""
    found = claim_statistics.estimates(
        tokens,
        {"gain": ("paper",)},
        BASE,
        {},
        widened="",
        bootstrap=Bootstrap(**DRAWS),
        winsorised=0.05,
        only="held_out",
    )
    clipped = tokens.assign(gain=tokens.gain.clip(*tokens.gain.quantile([0.05, 0.95])))
    plain = claim_statistics.estimates(
        clipped, {"gain": ("paper",)}, BASE, {}, widened="", bootstrap=Bootstrap(draws=0)
    )
    assert {key.population for key in found} == {"held_out"}
    for key, estimate in found.items():
        assert estimate.value == pytest.approx(plain[key].value, abs=1e-10)
        if key.name == "q3_gap":
            assert (estimate.draws != plain[key].value).all()


def test_one_wild_gain_moves_the_raw_and_not_the_winsorised_contrast(tokens):
    wild = tokens.assign(context_gain=tokens.context_gain.where(tokens.index != 7, 1e3))
    before, after = (R.gain_robustness(t.drop(columns="fold"), **DRAWS) for t in (tokens, wild))
    pick = dict(outcome="context_gain", statistic="interaction")
    raw, clipped = ("nothing", "winsorised_0.05")
    moved = {
        variant: abs(
            only_row(after, variant=variant, **pick).estimate
            - only_row(before, variant=variant, **pick).estimate
        )
        for variant in (raw, clipped)
    }
    assert moved[raw] > 10 * moved[clipped]


def test_a_table_of_special_tokens_and_first_positions_alone(tokens):
    table = R.gain_robustness(tokens.assign(is_special=True, position=0), **DRAWS)
    assert set(table.variant) == {"nothing", "winsorised_0.01", "winsorised_0.05"}


def test_saturation_by_hand(tokens):
    values = np.r_[np.ones(len(tokens) - 2), 0.0, np.nan]
    row = only_row(R.saturation(tokens.assign(compatibility=values)), measurement="compatibility")
    assert (row.q50, row.q05, row.undefined, row.distinct, row.positions) == (
        1.0,
        1.0,
        1,
        2,
        len(tokens) - 1,
    )
    assert row.at_low == 1.0 and row.at_high == pytest.approx(1 - 1 / (len(tokens) - 1))
    table = R.saturation(tokens)
    assert "gain" not in set(table.measurement) and "position" not in set(table.measurement)
    spread = only_row(table, measurement="forward_kl")
    assert spread.q95 == pytest.approx(
        np.quantile(tokens.forward_kl, 0.95)
    ) and spread.at_low == pytest.approx(0.05, abs=0.02)
    assert np.isnan(
        only_row(R.saturation(tokens.assign(forward_kl=np.nan)), measurement="forward_kl").q50
    )


def test_coverage_by_hand(tokens):
    table = R.coverage(tokens, draws=200)
    row = only_row(table, outcome="relative_gain", split="held_out")
    sizes = tokens[tokens.relative_gain.notna()].groupby("prompt_id").size().to_numpy()
    assert (
        row.undefined == tokens.relative_gain.isna().sum()
        and row.positions == tokens.relative_gain.notna().sum()
    )
    assert (
        row.effective_prompts == pytest.approx(sizes.sum() ** 2 / (sizes**2).sum())
        and row.contexts == 12
    )
    assert row.effective_positions == pytest.approx(row.positions / row.design_effect)
    assert row.steps == 4 and (R.coverage(made_tokens(folds=0), draws=20).steps == 1).all()
