import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from diagnostics.analysis import claims as V
from diagnostics.analysis import robustness
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.robustness import Finding
from diagnostics.core.errors import DiagnosticsError
from tests.analysis.test_correlations import one
from tests.made_tokens import made_tokens


def estimate(value, error=1.0, prompts=101):
    """Normal draws with a given standard error of the value."""
    draws = value + np.array([-1.0, 1.0] * 500) * error / np.sqrt(
        1000 / 999 * prompts / (prompts - 1)
    )
    return Estimate(value, draws, 1000, prompts)


def findings(values, *, outcome="gain", split="all", proxy="compatibility", k=16):
    return [
        Finding(proxy, k, outcome, split, statistic, estimate(value))
        for statistic, value in values.items()
    ]


STRONG = dict(
    spearman_difference=6.0, tertile_difference=7.0, matched_difference=6.5, decomposition=8.0
)
FLAT = dict.fromkeys(STRONG, 0.1)
OPPOSED = {name: -value for name, value in STRONG.items()}


def both(values, **where):
    return [
        f
        for outcome in ("gain", "relative_gain")
        for f in findings(values, outcome=outcome, **where)
    ]


@pytest.mark.parametrize(
    "values, expected", [(STRONG, "supported"), (FLAT, "inconclusive"), (OPPOSED, "refuted")]
)
def test_verdicts_follow_the_tests(values, expected):
    table = V.verdicts([*both(values), *both(values, k=8)])
    assert list(table.claim) == ["C1", "C1", "C2", "C2", "C3", "C3", "C4", "C4"] and set(
        table.verdict
    ) == {expected}
    assert table.primary.all() and (table.looks == 8).all()


def test_columns_and_sentence():
    table = V.verdicts([*both(STRONG), *both(STRONG, k=8), *both(STRONG, proxy="topk_overlap")])
    assert list(table.columns) == [
        "claim",
        "statement",
        "outcome",
        "split",
        "primary",
        "verdict",
        "statistic",
        "estimate",
        "low",
        "high",
        "p_value",
        "p_corrected",
        "looks",
        "parts",
        "sentence",
        "positions",
        "prompts",
    ]
    row = one(table, claim="C4", outcome="relative_gain")
    assert row.parts == 6 and row.statistic == "matched_difference"
    assert row.sentence.startswith(
        "C4 is supported for the relative gain on all positions: 6 of 6 statistics over 2 other"
        " supports (K = 8, 16) lie above 0, and the one that decides, matched difference with"
        " compatibility at K = 8, is +6.5 ["
    ) and row.sentence.endswith("after Holm over 8 looks).")
    assert "beyond the placebo's" in one(table, claim="C1", outcome="gain").sentence
    unit = Finding("compatibility", 16, "gain", "all", "decomposition_per_unit", estimate(-2.0))
    told = V.verdicts([*both(STRONG), unit], imbalance={"all": 1.34})
    assert (
        ", per unit of d -2 [" in one(told, claim="C3", outcome="gain").sentence
        and "] nats (101 prompts" in one(told, claim="C3", outcome="gain").sentence
    )
    assert (
        "matched pairs still differ by up to 1.3 standard deviations"
        in one(told, claim="C2", outcome="gain").sentence
    )
    assert (
        "still differ"
        not in one(
            V.verdicts(both(STRONG), imbalance={"all": 0.05}), claim="C2", outcome="gain"
        ).sentence
    )
    assert (
        "without a placebo"
        in one(
            V.verdicts(both(STRONG), placebo=["gain"]), claim="C1", outcome="relative_gain"
        ).sentence
    )


def test_p_values_are_corrected_by_holm():
    values = dict(
        spearman_difference=2.2, tertile_difference=2.9, matched_difference=2.6, decomposition=3.4
    )
    table = V.verdicts([*both(values), *both(FLAT, k=8)])
    assert table.p_corrected.tolist() == pytest.approx(
        multipletests(table.p_value, method="holm")[1]
    )
    assert (table.p_value <= table.p_corrected).all()


def test_the_interval_excludes_zero_exactly_where_holm_rejects():
    rng = np.random.default_rng(0)
    for _ in range(60):
        found = [
            f
            for k in (16, 8)
            for outcome in ("gain", "relative_gain")
            for f in findings({s: rng.normal() * 3 for s in STRONG}, outcome=outcome, k=k)
        ]
        table = V.verdicts(found)
        outside = (table.low > 0) | (table.high < 0)
        assert (outside == (table.p_corrected <= 0.05)).all()
        assert ((table.verdict != "inconclusive") == outside).all()


def test_a_conjunction_takes_the_weakest_part():
    mixed = STRONG | {"matched_difference": 1.0}
    row = one(V.verdicts(both(mixed)), claim="C2", outcome="gain")
    assert (
        row.verdict == "inconclusive"
        and row.statistic == "matched_difference"
        and row.estimate == 1.0
    )
    assert row.p_value == pytest.approx(estimate(1.0).p_value)


def test_one_part_below_zero_refutes_with_bonferroni():
    mixed = STRONG | {"tertile_difference": -5.0}
    row = one(V.verdicts(both(mixed)), claim="C2", outcome="gain")
    assert (
        row.verdict == "refuted"
        and row.statistic == "tertile_difference"
        and row.p_value == pytest.approx(2 * estimate(-5.0).p_value)
    )
    weak = one(V.verdicts(both(STRONG | {"tertile_difference": -2.2})), claim="C2", outcome="gain")
    assert weak.verdict == "inconclusive"


def test_splits_are_corrected_apart_and_only_all_is_primary():
    table = V.verdicts([*both(STRONG), *both(FLAT, split="held_out")])
    assert table.groupby("split").primary.first().to_dict() == {"all": True, "held_out": False}
    assert set(table[table.split == "all"].verdict) == {"supported", "inconclusive"} and set(
        table[table.split == "held_out"].verdict
    ) == {"inconclusive"}


def test_c4_without_other_supports_is_not_tested():
    row = one(V.verdicts(both(STRONG)), claim="C4", outcome="gain")
    assert (
        row.verdict == "inconclusive"
        and np.isnan([row.estimate, row.low, row.p_value, row.p_corrected]).all()
        and row.parts == 0
    )
    assert (
        row.sentence
        == "C4 is inconclusive for the absolute gain on all positions: nothing to compare with, no"
        " other K or proxy is in the table."
    )


def test_undefined_parts_keep_a_claim_from_being_supported():
    found = [
        Finding("compatibility", 16, "gain", "all", s, estimate(6.0))
        for s in STRONG
        if s != "matched_difference"
    ]
    found.append(
        Finding(
            "compatibility",
            16,
            "gain",
            "all",
            "matched_difference",
            Estimate(np.nan, np.full(9, np.nan), 0, 0),
        )
    )
    row = one(V.verdicts(found), claim="C2")
    assert row.verdict == "inconclusive" and "1 more could not be computed" in row.sentence
    c4 = [
        *both(STRONG),
        *both(STRONG, k=8),
        Finding(
            "topk_jaccard",
            8,
            "gain",
            "all",
            "decomposition",
            Estimate(np.nan, np.full(9, np.nan), 0, 0),
        ),
    ]
    row = one(V.verdicts(c4), claim="C4", outcome="gain")
    assert row.verdict == "supported" and "; 1 more could not be computed" in row.sentence


@pytest.mark.parametrize(
    "learnable, incompatible, verdict", [(1.5, 0.2, "supported"), (0.2, 1.5, "refuted")]
)
def test_c3_on_made_tables(learnable, incompatible, verdict):
    tokens = made_tokens(
        prompts=60, length=20, learnable=learnable, incompatible=incompatible
    ).drop(columns="split")
    table = V.verdicts(robustness.findings(tokens, draws=100))
    assert one(table, claim="C3", outcome="gain").verdict == verdict
    assert one(table, claim="C2", outcome="gain").verdict == verdict
    assert one(table, claim="C4", outcome="gain").verdict == verdict


# --- C5
# ---------------------------------------------------------------------------------------------


def trained(verdict, seeds=3, **rivals):
    """Verdicts of a grid for one measure: (difference, low, high) of each rival."""
    key = {
        "claim": "C5",
        "measure": "forward_kl",
        "budget": 0.05,
        "margin": 0.01,
        "seeds": seeds,
        "prompts": 40,
    }
    rows = [
        key
        | {"rival": "all", "verdict": verdict, "difference": np.nan, "low": np.nan, "high": np.nan}
    ]
    rows += [
        key | {"rival": name, "verdict": "", "difference": d, "low": low, "high": high}
        for name, (d, low, high) in rivals.items()
    ]
    return pd.DataFrame(rows)


FOUR = {
    "full": (0.0, -0.005, 0.005),
    "entropy": (0.1, 0.05, 0.15),
    "divergence": (0.2, 0.1, 0.3),
    "tip": (0.02, 0.01, 0.03),
}


def test_c5_shows_the_rival_that_decides():
    row = V.of_training(trained("supported", **FOUR)).iloc[0]
    assert (row.statistic, row.estimate, row.low, row.high, row.split, row.parts) == (
        "gain_over_full",
        0,
        -0.005,
        0.005,
        "training",
        4,
    )
    assert (
        row.sentence
        == "C5 is supported for forward kl: the gain of teachability minus that of full +0 [-0.005,"
        " +0.005]; entropy +0.1 [+0.05, +0.15]; divergence +0.2 [+0.1, +0.3]; tip +0.02 [+0.01,"
        " +0.03] (3 seeds, 40 prompts; it may fall short by 0.01 and still match)."
    )
    ahead = FOUR | {"tip": (-0.2, -0.3, -0.1), "entropy": (-0.2, -0.5, 0.1)}
    assert V.of_training(trained("refuted", **ahead)).iloc[0].statistic == "gain_over_tip"


def test_c5_with_too_little():
    few = V.of_training(trained("inconclusive", seeds=2, **FOUR)).iloc[0]
    assert few.sentence == "C5 is inconclusive for forward kl: fewer than 3 seeds were trained."
    gap = V.of_training(trained("inconclusive", full=FOUR["full"])).iloc[0]
    assert gap.sentence.endswith("still match); not trained: divergence, entropy, tip.")
    alone = V.of_training(trained("inconclusive")).iloc[0]
    assert alone.statistic == "" and np.isnan(alone.estimate)
    with pytest.raises(
        DiagnosticsError,
        match=r"^A table of training verdicts needs the column margin; this one has claim",
    ):
        V.of_training(trained("supported", **FOUR).drop(columns="margin"))
