"""Verdicts on the claims: tests, corrections, reasons and sentences."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from diagnostics.analysis import claims as V
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.claim_statistics import Overlap, Statistic, Support
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from diagnostics.core.errors import DiagnosticsError
from tests.claim_tables import claim_tokens, one_step
from tests.made_tokens import FOUR_RIVALS, only_row, training_verdicts

CHOICES = PrimaryChoices()
DIGEST = CHOICES.sha256()
BASE = Support("compatibility", 16, "compatibility")
EIGHT = Support("compatibility", 8, "compatibility_k8")
CBC = Support("bhattacharyya", 16, "bhattacharyya")
APART = Support("topk_overlap", 16, "topk_overlap")
FINE = Overlap(0.9, {"ln_divergence": -1.0}, {"ln_divergence": 0.0}, (90.0, 80.0))
STRONG = dict(
    spearman_difference=6.0,
    q3_gap=7.0,
    standardised=8.0,
    per_unit=5.0,
    within_strata=6.5,
    overlap_contrast=6.0,
    interaction=8.0,
)
SHARES = dict(rank_share_d=0.7, rank_share_c_adds=0.02) | dict(
    rank_share_h_adds=0.04, rank_share_both_add=0.05
)
FLAT = dict.fromkeys(STRONG, 0.1)
OPPOSED = {name: -value for name, value in STRONG.items()}


def estimate(value, error=1.0, prompts=101):
    """Draws with a given standard error of the value."""
    draws = value + np.array([-1.0, 1.0] * 500) * error / np.sqrt(
        1000 / 999 * prompts / (prompts - 1)
    )
    return Estimate(value, draws, 1000, prompts)


def found(values, *, others=None, overlap=FINE, prompts=101, steps=4, more=None, divergence=0.3):
    """Statistics on one held-out population; `more` gives those with other supports."""
    estimates = {
        Statistic("held_out", outcome, name, "compatibility", 16): estimate(value)
        for outcome in ("context_gain", "gain")
        for name, value in values.items()
    }
    estimates |= {
        Statistic("held_out", "context_gain", name, support.proxy, support.k): value
        for (name, support), value in (more or {}).items()
    }
    others = {EIGHT: np.nan} if others is None else others
    return V.Found(
        estimates,
        BASE,
        {"held_out": overlap},
        {"held_out": (np.r_[np.full(9, 0.1), -0.1], np.full(10, 100))},
        others,
        "held_out",
        steps,
        {"held_out": prompts},
        divergence,
    )


def with_eight(values, **change):
    """Another K whose statistics are those of K = 16, in draws that are a little wider."""
    names = ("q3_gap", "overlap_contrast", "interaction")
    more = {(name, EIGHT): estimate(values[name], error=1.05) for name in names}
    return found(values, more=more | change.pop("more", {}), **change)


def judged(what, **options):
    return V.verdict_table(what, level=0.95, **options)


def controlled(table, claim):
    return only_row(table[table.primary], claim=claim, kind="controlled")


@pytest.mark.parametrize(
    "values, expected", [(STRONG, "supported"), (FLAT, "inconclusive"), (OPPOSED, "refuted")]
)
def test_verdicts_follow_the_tests(values, expected):
    table = judged(with_eight(values))
    own = table[table.claim != "C4"]
    assert set(own.verdict) == {expected}
    assert table.primary.tolist() == [True] * 8 + [False] * 4
    looks = table[table.primary].groupby("kind").looks.unique().map(list).to_dict()
    assert looks == {"controlled": [3 if values is FLAT else 4], "paper": [4]}
    c4 = controlled(table, "C4")
    assert c4.verdict == ("not identified" if values is FLAT else "supported")
    assert only_row(table[table.primary], claim="C4", kind="paper").verdict == expected


def test_models_that_differ_by_their_rounding_have_no_verdict():
    """What a step changes is rounding then too, and can still be ordered significantly."""
    table = judged(with_eight(STRONG, divergence=9e-7))
    assert set(table.verdict) == {"not identified"}
    assert set(table[table.claim.isin(["C1", "C2", "C3"])].reason.map(V.cause)) == {"no_signal"}
    more = judged(with_eight(STRONG, divergence=1.1e-6))
    assert set(more[more.claim != "C4"].verdict) == {"supported"}


def test_columns_and_sentences():
    table = judged(with_eight(STRONG | SHARES))
    assert tuple(table.columns) == V.VERDICT_COLUMNS
    row = controlled(table, "C1")
    assert row.sentence.startswith(
        "C1, controlled, is supported for the context gain on held-out positions. The claim: raw KL"
        " is a coarse proxy: at equal divergence, positions within the student's reach gain more."
        " Found: inside tenths of D, compatibility and the outcome have a mean rank correlation of"
        " +6.5 ["
    )
    assert row.sentence.endswith(
        "]; it is above 0 in 9 of 10 tenths, and C adds 0.020 and H 0.040 to the 0.700 of the"
        " ranks' variance that D explains (101 prompts, 4 steps; p < .0001 after Holm over 4"
        " tests)."
    )
    assert row.reason == "" and row.statistic == "within_strata" and not row.exploratory
    alone = judged(found(STRONG, steps=1), because="a single step was taken")
    assert alone.exploratory.all() and alone.sentence[0].endswith(
        "Exploratory: a single step was taken."
    )
    assert "one step, so that the spread between step batches is left out" in alone.sentence[0]


def test_only_the_primary_rows_confirm():
    table = judged(with_eight(STRONG))
    confirming = table.primary & (table.kind == "controlled")
    assert (table.exploratory == ~confirming).all() and confirming.sum() == 4
    ends = {
        True: "Exploratory: the controlled statistic confirms, not the paper's.",
        False: "Exploratory: not the primary population and outcome.",
    }
    for row in table[table.exploratory].itertuples():
        assert row.sentence.endswith(ends[row.primary])


def test_p_values_are_corrected_by_holm_over_what_is_looked_at():
    values = STRONG | dict(within_strata=2.9, overlap_contrast=2.6, interaction=2.4)
    primary = judged(found(values, others={}))
    primary = primary[primary.primary & primary.p_value.notna()]
    assert len(primary) == 6 and (primary.looks == 3).all()
    for _, tests in primary.groupby("kind"):
        assert tests.p_corrected.tolist() == pytest.approx(
            multipletests(tests.p_value, method="holm")[1]
        )


def test_the_interval_excludes_zero_exactly_where_holm_rejects():
    rng = np.random.default_rng(0)
    for _ in range(60):
        table = judged(found({name: rng.normal() * 3 for name in STRONG}, others={}))
        table = table[table.p_value.notna() & (table.claim != "C3")]
        outside = (table.low > 0) | (table.high < 0)
        assert (outside == (table.p_corrected <= 0.05)).all()
        assert (table.verdict.isin(["supported", "refuted"]) == outside).all()


# what can have no verdict


def test_fewer_than_twenty_prompts_have_no_verdict():
    table = judged(found(STRONG, prompts=19))
    assert set(table.verdict) == {"not identified"}
    assert controlled(table, "C1").reason == "fewer than 20 prompts"
    assert controlled(table, "C1").estimate == 6.5 and np.isnan(controlled(table, "C1").p_corrected)
    stricter = replace(CHOICES, minimum_prompts=200)
    assert controlled(judged(found(STRONG), choices=stricter), "C1").reason.endswith("200 prompts")


def test_an_interval_without_width_is_never_a_verdict():
    certain = found(STRONG)
    key = Statistic("held_out", "context_gain", "within_strata", "compatibility", 16)
    fixed = replace(estimate(1.0), draws=np.ones(1000))
    table = judged(replace(certain, estimates=certain.estimates | {key: fixed}))
    row = controlled(table, "C1")
    assert row.verdict == "not identified" and row.reason == "its interval has no width"
    lost = replace(estimate(np.nan), draws=np.full(1000, np.nan))
    row = controlled(judged(replace(certain, estimates=certain.estimates | {key: lost})), "C1")
    assert row.reason.startswith("its statistic is undefined") and np.isnan(row.p_value)


@pytest.mark.parametrize(
    "overlap, reason",
    [
        (None, "no overlap: a tertile of compatibility inside Q3 is empty"),
        (replace(FINE, partners=0.49), "no overlap: 49% of the compatible positions in Q3 have"),
        (replace(FINE, after={"ln_divergence": 0.2}), "the groups stay apart: after weighting"),
        (replace(FINE, effective=(90.0, 19.0)), "no overlap: weighting leaves 19 effective"),
    ],
)
def test_c2_without_overlap_is_not_identified(overlap, reason):
    table = judged(found(STRONG, overlap=overlap))
    row = controlled(table, "C2")
    assert row.verdict == "not identified" and row.reason.startswith(reason)
    assert only_row(table[table.primary], claim="C2", kind="paper").verdict == "supported"
    assert V.cause(row.reason) in ("no_overlap", "unbalanced")


def test_c3_that_turns_over_with_the_scale_is_inconclusive():
    turned = STRONG | {"interaction": -8.0}
    table = judged(found(turned))
    rows = table[(table.claim == "C3") & table.primary]
    assert set(rows.verdict) == {"inconclusive"}
    assert set(rows.reason) == {
        "depends on the scale: above 0 per standard deviation and per unit of d, below 0 as an"
        " interaction beside main effects"
    }
    unsure = judged(found(STRONG | {"per_unit": -0.5}))
    assert controlled(unsure, "C3").verdict == "supported"


def test_a_table_without_a_permuted_teacher_has_no_controlled_verdict():
    tokens = claim_tokens(prompts=24, length=12, reach=0.02, null=False)
    table = V.claim_tables(tokens, base_k=16, bootstrap=Bootstrap(draws=20))["verdicts"]
    rows = table[table.kind == "controlled"]
    assert set(rows.verdict) == {"not identified"}
    assert set(rows.reason) == {"no permuted-teacher step in this table"}
    assert set(rows.outcome) == {"context_gain"} and rows.estimate.isna().all()
    paper = table[(table.kind == "paper") & table.primary]
    assert set(paper.outcome) == {"gain"} and len(paper) == 4 and paper.exploratory.all()


# C4


def test_equivalence_by_hand():
    """T = 10 +- 1 and T_K = 9 +- 1 in the same draws: both ends of 7.5 to 12.5 are tested."""
    base, other = estimate(10.0), estimate(9.0)
    part = V._equivalence("x", base, other, 0.25)
    # 1.25 T - T_K = 3.5 with error .25; T_K - .75 T = 1.5 with error .25.
    p = [stats.t.sf(value / 0.25, 100) for value in (3.5, 1.5)]
    assert part.p_for == pytest.approx(max(p), rel=1e-6)
    assert part.p_against == pytest.approx(1 - min(p), rel=1e-6)
    assert part.estimate.value == -1
    mirrored = V._equivalence("x", base.times(-1.0), other.times(-1.0), 0.25)
    assert mirrored.p_for == pytest.approx(part.p_for)


def test_another_k_that_changes_the_statistic_refutes_c4():
    more = {
        ("overlap_contrast", EIGHT): estimate(1.0, 1.05),
        ("interaction", EIGHT): estimate(8.0, 1.05),
    }
    what = found(STRONG, more=more | {("q3_gap", EIGHT): estimate(7.0)})
    row = controlled(judged(what), "C4")
    assert row.verdict == "refuted"
    assert row.statistic == "overlap_contrast with compatibility_k8, change" and row.estimate == -5


def test_noise_in_another_k_leaves_c4_inconclusive():
    noisy = {("overlap_contrast", EIGHT): replace(estimate(6.0), draws=estimate(6, 4).draws[::-1])}
    row = controlled(judged(with_eight(STRONG, more=noisy)), "C4")
    assert row.verdict == "inconclusive" and row.reason == "its test does not decide"


def test_c4_needs_a_verdict_of_its_base():
    row = controlled(judged(with_eight(STRONG | {"interaction": 0.1})), "C4")
    assert row.verdict == "supported" and "; of C2" in row.sentence and "C3" not in row.statistic
    neither = with_eight(STRONG | {"interaction": 0.1, "overlap_contrast": 0.2})
    row = controlled(judged(neither), "C4")
    assert row.reason == "neither C2 nor C3 has a verdict here"


def test_without_another_k_c4_has_nothing_to_compare():
    row = controlled(judged(found(STRONG, others={})), "C4")
    assert row.reason == "no other K or proxy of compatibility is in this table"


def test_a_proxy_that_is_none_is_listed_and_not_tested():
    more = {
        ("overlap_contrast", CBC): estimate(5.0),
        ("interaction", CBC): estimate(6.0),
        ("overlap_contrast", APART): estimate(-50.0),
        ("interaction", APART): estimate(-50.0),
    }
    others = {EIGHT: np.nan, CBC: 0.9, APART: 0.1}
    row = controlled(judged(with_eight(STRONG, more=more, others=others)), "C4")
    assert row.verdict == "supported"
    assert "4 of 4 comparisons agree" in row.sentence
    assert "not proxies of C on this pair: topk_overlap (+0.10)" in row.sentence
    opposed = more | {("interaction", CBC): estimate(-60.0)}
    row = controlled(judged(with_eight(STRONG, more=opposed, others=others)), "C4")
    assert row.verdict == "refuted" and row.statistic == "interaction with bhattacharyya"


def test_undefined_comparisons_keep_c4_from_being_supported():
    lost = {("interaction", EIGHT): replace(estimate(8.0), draws=np.full(1000, np.nan))}
    row = controlled(judged(with_eight(STRONG, more=lost)), "C4")
    assert (
        row.verdict == "inconclusive" and row.reason == "some of its comparisons are undefined (1)"
    )


# whole tables


def verdicts(tokens, *, draws=60, registered=DIGEST):
    return V.claim_tables(
        tokens,
        base_k=16,
        bootstrap=Bootstrap(draws=draws),
        registered=registered,
    )


def test_a_planted_context_gain_is_found():
    made = verdicts(claim_tokens(reach=0.02, prompts=40))
    table = made["verdicts"]
    for claim in ("C1", "C2"):
        assert controlled(table, claim).verdict == "supported"
    assert controlled(table, "C1").steps == 4 and controlled(table, "C1").prompts == 40
    inside = made["claim_statistics"]
    strata = inside[inside.statistic.str.startswith("stratum") & (inside.population == "held_out")]
    assert len(strata) == 10 and strata.positions.sum() == 1600 and (strata.estimate > 0).all()
    rho = inside[inside.statistic == "spearman_with_c"].set_index("proxy").estimate
    assert rho["bhattacharyya"] > 0.7 > abs(rho["topk_overlap"]) and "topk_jaccard" not in rho


def test_what_any_teacher_gives_supports_nothing():
    """The gain rises with D alone, under the permuted teacher as under the true one."""
    false = 0
    for seed in range(3):
        table = verdicts(claim_tokens(seed=seed, marginal=0.05, prompts=24))["verdicts"]
        false += table[table.primary].verdict.isin(["supported", "refuted"]).any()
        by_gain = table[(table.outcome == "gain") & (table.population == "held_out")]
        assert only_row(by_gain, claim="C1").verdict == "refuted", "the gain alone misleads"
    assert false <= 1


def test_a_planted_interaction_is_found_and_a_negative_one_refutes():
    up = verdicts(claim_tokens(interaction=0.1, prompts=40))["verdicts"]
    assert controlled(up, "C3").verdict == "supported"
    assert controlled(up, "C3").estimate == pytest.approx(0.1, rel=0.2)
    down = verdicts(claim_tokens(interaction=-0.1, prompts=40))["verdicts"]
    assert controlled(down, "C3").verdict == "refuted"


def test_a_bank_where_every_position_is_tied_has_no_verdict():
    flat = dict(forward_kl=1.0, student_entropy=1.0, teacher_entropy=1.0, compatibility=0.5)
    flat |= {f"compatibility_k{k}": 0.5 for k in (4, 8, 32)} | {"bhattacharyya": 0.5}
    table = verdicts(claim_tokens(prompts=24, length=10).assign(**flat), draws=20)["verdicts"]
    assert set(table[table.kind == "controlled"].verdict) == {"not identified"}
    assert not table.verdict.isin(["supported", "refuted"]).any()


def test_a_table_of_one_step_is_exploratory_and_says_so():
    tokens = one_step(claim_tokens(prompts=48, length=20, reach=0.05))
    table = verdicts(tokens)["verdicts"]
    assert table.exploratory.all() and (table.steps == 1).all()
    row = controlled(table, "C1")
    assert row.verdict == "supported" and row.population == "held_out" and row.prompts == 24
    assert row.sentence.endswith("Exploratory: a single step was taken.")


def test_what_was_not_recorded_before_the_probe_is_exploratory():
    what = found(STRONG)
    assert V.exploratory_because(what, 0.95, CHOICES, CHOICES.sha256()) == ""
    for expected, options in {
        "no primary choices were recorded": (0.95, CHOICES, None),
        "other primary choices": (0.95, replace(CHOICES, margin=0.5), CHOICES.sha256()),
        "the level is 0.9, and 0.95": (0.9, CHOICES, CHOICES.sha256()),
    }.items():
        assert V.exploratory_because(what, *options).startswith(expected)
    stepped = replace(CHOICES, population="step")
    assert V.exploratory_because(what, 0.95, stepped, stepped.sha256()) == (
        "the table has no step population"
    )


def test_p_values_are_printed_down_to_one_in_ten_thousand():
    shown = [V.p_words(p) for p in (3e-9, 9.9e-5, 0.00034, 0.0123, 0.4, 1.0, np.nan)]
    assert shown == [
        "p < .0001",
        "p < .0001",
        "p = .0003",
        "p = .012",
        "p = .40",
        "p = 1.00",
        "p undefined",
    ]


# C5


def test_c5_shows_the_rival_that_decides():
    row = V.of_training(training_verdicts("supported", **FOUR_RIVALS)).iloc[0]
    assert tuple(V.of_training(training_verdicts("supported", **FOUR_RIVALS)).columns) == (
        V.VERDICT_COLUMNS
    )
    assert (row.statistic, row.estimate, row.low, row.high, row.population, row.looks) == (
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
    ahead = FOUR_RIVALS | {"tip": (-0.2, -0.3, -0.1), "entropy": (-0.2, -0.5, 0.1)}
    assert V.of_training(training_verdicts("refuted", **ahead)).iloc[0].statistic == "gain_over_tip"


def test_c5_with_too_little():
    few = V.of_training(training_verdicts("inconclusive", seeds=2, **FOUR_RIVALS)).iloc[0]
    assert few.sentence == "C5 is inconclusive for forward kl: fewer than 3 seeds were trained."
    gap = V.of_training(training_verdicts("inconclusive", full=FOUR_RIVALS["full"])).iloc[0]
    assert gap.sentence.endswith("still match); not trained: divergence, entropy, tip.")
    alone = V.of_training(training_verdicts("inconclusive")).iloc[0]
    assert alone.statistic == "" and np.isnan(alone.estimate)
    with pytest.raises(
        DiagnosticsError,
        match=r"^A table of training verdicts needs the column margin; this one has claim",
    ):
        V.of_training(training_verdicts("supported", **FOUR_RIVALS).drop(columns="margin"))
