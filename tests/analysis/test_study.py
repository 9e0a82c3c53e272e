"""The whole study: its tables, its gaps, and that it needs no torch."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import correlations, study
from diagnostics.analysis.splits import STATED_GAIN, STUDY_OUTCOMES
from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.core import processes
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine
from diagnostics.criteria import criterion
from tests.made_tokens import FOUR_RIVALS, made_tokens, only_row, training_verdicts

TABLES = {
    "correlations",
    "differences",
    "partial",
    "quadrants",
    "positions",
    "q3_contrast",
    "q3_groups",
    "matching",
    "balance",
    "strata",
    "null_share",
    "regressions",
    "decomposition",
    "residual_curves",
    "verdicts",
    "claim_statistics",
    "support_robustness",
    "gain_robustness",
    "saturation",
    "coverage",
    "warnings",
    "left_out",
}
WITHOUT_OUTCOME = ("balance", "saturation", "strata", "null_share")
WITHOUT_INTERVALS = ("balance", "saturation")


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


FEW = {"criteria": ["teachability", "divergence", "q3_teachability"], "draws": 12}


@pytest.fixture(scope="module")
def made(tokens):
    return study.study(tokens, **FEW)


def test_every_table_is_made(made):
    assert set(made) == TABLES
    assert all(len(table) for name, table in made.items() if name != "warnings")


def test_every_table_says_what_it_rests_on(made):
    for name, table in made.items():
        if name in ("warnings", "left_out"):
            continue
        columns = set(table.columns)
        assert {"positions", "prompts"} <= columns, name
        assert "steps" in columns or name in WITHOUT_INTERVALS, name
        assert columns & {"split", "population"} or name == "saturation", name
        assert "outcome" in columns or name in WITHOUT_OUTCOME, name
        assert not [column for column in columns if "placebo" in column], name


def test_the_held_out_population_comes_first_and_nats_lead(made):
    for name, table in made.items():
        if "split" in table and len(set(table.split)) > 1:
            assert list(dict.fromkeys(table.split)) == ["held_out", "step"], name
        if "outcome" in table and name != "verdicts":
            assert table.outcome.iloc[0] == "context_gain", name


def test_intervals_carry_the_step_batches(made):
    for name, table in made.items():
        if "steps" in table and name != "claim_statistics":
            assert (table.steps == 4).all(), name


def test_tables_survive_csv(made, tmp_path):
    for name, table in made.items():
        table.to_csv(tmp_path / "t.csv", index=False)
        assert list(pd.read_csv(tmp_path / "t.csv").columns) == list(table.columns), name


def test_same_seed_same_study_and_the_table_is_left_alone(tokens, made):
    before = tokens.copy()
    again = study.study(tokens, **FEW)
    for name, table in made.items():
        pd.testing.assert_frame_equal(table, again[name])
    pd.testing.assert_frame_equal(tokens, before)


def test_row_order_does_not_matter(tokens, made):
    shuffled = study.study(tokens.sample(frac=1, random_state=0).reset_index(drop=True), **FEW)
    for name in (
        "q3_contrast",
        "q3_groups",
        "regressions",
        "coverage",
        "partial",
        "matching",
        "strata",
        "null_share",
        "quadrants",
    ):
        numbers = made[name].select_dtypes("number").columns
        np.testing.assert_allclose(
            shuffled[name][numbers], made[name][numbers], atol=1e-8, err_msg=name
        )


def left(made):
    return set(zip(made["left_out"].table, made["left_out"].what, made["left_out"].why))


def test_only_what_was_not_given_is_left_out_of_a_full_table(made):
    reasons = left(made)
    assert ("verdicts", "claim C5", "no training results were given") in reasons
    assert ("support_robustness", "K = 4", "no column compatibility_k4") in reasons
    assert ("correlations", "criterion jsd", "no column js") in reasons
    assert not [row for row in reasons if row[1] == "the whole table"]


def test_nobody_misses_what_is_measured_on_request_alone(made):
    assert not [row for row in left(made) if "ier" in row[2] or "top1_gap" in row[2]]


@pytest.mark.parametrize(
    "missing, gone, why",
    [
        (
            "compatibility",
            {
                "q3_contrast",
                "q3_groups",
                "matching",
                "balance",
                "regressions",
                "decomposition",
                "residual_curves",
                "support_robustness",
                "claim_statistics",
                "verdicts",
                "gain_robustness",
            },
            "no column compatibility",
        ),
        (
            "student_entropy",
            {"quadrants", "partial", "verdicts", "null_share"},
            "no column student_entropy",
        ),
    ],
)
def test_a_missing_column_leaves_tables_out_with_the_reason(tokens, missing, gone, why):
    made = study.study(tokens.drop(columns=missing), **FEW | {"criteria": ["divergence", "late"]})
    assert not gone & set(made) and {
        "correlations",
        "strata",
        "coverage",
        "saturation",
    } <= set(made)
    assert {(name, "the whole table", why) for name in gone} <= left(made)


def test_without_null_halves_special_tokens_and_teacher_entropy():
    bare = made_tokens(permuted=False, folds=0, split=False).drop(
        columns=["is_special", "teacher_entropy", "relative_gain"]
    )
    made = study.study(bare, **FEW)
    assert {
        ("all", "outcome relative_gain", "no column relative_gain"),
        ("all", "outcome context_gain", "no column context_gain"),
        ("all", "the null of a permuted teacher", "no column gain_permuted"),
        ("all", "the step batches' part of intervals", "no columns fold and gain_fold<f>"),
        ("all", "step and held-out positions apart", "no column split with both"),
        ("gain_robustness", "without special tokens", "no column is_special"),
        ("regressions", "teacher entropy as a term", "no column teacher_entropy"),
        ("null_share", "the whole table", "no column gain_permuted"),
    } <= left(made)
    assert set(made["verdicts"].outcome) <= {"gain", "context_gain"}
    controlled = made["verdicts"][made["verdicts"].kind == "controlled"]
    assert set(controlled.verdict) <= {"not identified"}
    assert set(made["correlations"].split) == {"all"} and (made["correlations"].steps == 1).all()


def test_a_table_of_one_step_keeps_its_halves():
    made = study.study(made_tokens(folds=0), **FEW)
    assert set(made) == TABLES
    assert list(dict.fromkeys(made["correlations"].split)) == ["held_out", "step"]
    for name in ("correlations", "q3_contrast", "regressions", "strata", "null_share"):
        assert (made[name].steps == 1).all(), name


def test_the_names_of_the_folds_change_no_table(tokens, made):
    order = np.array([2, 0, 3, 1])
    named = tokens.assign(fold=order[tokens.fold].astype("int32")).assign(
        **{
            f"{name}_fold{order[f]}": tokens[f"{name}_fold{f}"]
            for name in ("gain", "reverse_gain", "gain_permuted")
            for f in range(4)
        }
    )
    again = study.study(combine(named), **FEW)
    for name in ("correlations", "q3_contrast", "matching", "decomposition", "strata"):
        numbers = made[name].select_dtypes("number").columns
        np.testing.assert_allclose(
            again[name][numbers], made[name][numbers], atol=1e-8, err_msg=name
        )


def test_a_released_table_is_studied(tmp_path):
    """It states D and its predictors before and after: no folds, no halves and no null."""
    rows = made_tokens(folds=0, split=False)
    number = rows.context_id.factorize()[0]
    after = {"KLf_full": rows.forward_kl - rows.gain, "Hs_full": rows.student_entropy}
    pd.DataFrame(
        {
            "sample_index": number,
            "group_index": number,
            "sample_ordinal": number,
            "tok_pos": rows.position,
            "token_id": rows.token_id,
            "KLf_full_base": rows.forward_kl,
            "Hs_full_base": rows.student_entropy,
            "Cmass_true_base": rows.compatibility,
            "Cmass_true": rows.compatibility,
        }
        | after
    ).to_parquet(tmp_path / "released.parquet")
    tokens = read_tokens(tmp_path / "released.parquet")
    made = study.study(tokens, **FEW)
    assert {"correlations", "q3_contrast", "strata", "verdicts", "regressions"} <= set(made)
    assert set(made["correlations"].split) == {"all"}
    row = only_row(made["strata"], stratum=10)
    assert row.gain == pytest.approx(
        only_row(study.strata(rows, draws=5), stratum=10).gain
    ) and np.isnan(row.null_share)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.head(1),
        lambda t: t.head(5),
        lambda t: t[t.prompt_id == "p2"],
        lambda t: t.assign(gain=0.0),
        lambda t: t.assign(gain=np.nan),
        lambda t: t.assign(student_entropy=1.0, forward_kl=1.0, compatibility=1.0),
        lambda t: t.assign(forward_kl=np.nan),
        lambda t: t.round(0),
    ],
)
def test_degenerate_tables_are_studied_without_a_stumble(tokens, edit):
    made = study.study(edit(tokens).reset_index(drop=True), **FEW)
    assert {"correlations", "warnings", "left_out", "coverage"} <= set(made)
    if "verdicts" in made:
        assert set(made["verdicts"].verdict) <= {"not identified", "inconclusive"}


def test_a_table_without_gains_or_rows_is_refused(tokens):
    with pytest.raises(DiagnosticsError, match=r"^The analysis needs an outcome"):
        study.study(tokens.drop(columns=[*STUDY_OUTCOMES, STATED_GAIN]))
    with pytest.raises(DiagnosticsError, match=r"^The token table has no rows"):
        study.study(tokens.head(0))


def test_training_runs_and_other_losses_join(tokens):
    made = study.study(
        tokens,
        **FEW,
        training=training_verdicts("supported", **FOUR_RIVALS),
        losses={"forward_kl": made_tokens(seed=3)},
    )
    assert made["verdicts"].claim.tolist()[-1] == "C5" and "loss_forward_kl" in set(
        made["gain_robustness"].variant
    )
    assert not {what for _, what, _ in left(made)} & {"claim C5", "other losses"}


def test_a_users_criterion_joins_every_correlation(tokens, registry):
    criterion("mine", needs=["forward_kl"])(lambda t: -t.forward_kl)
    made = study.study(tokens, **FEW | {"criteria": ["mine", "entropy"]})
    assert "mine" in set(correlations.correlate(tokens, draws=2).criterion)
    for name in ("correlations", "partial"):
        assert "mine" in set(made[name].criterion)
    assert set(made["differences"].criterion) == {"mine"}


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, diagnostics.analysis.study, diagnostics.contexts.import_tokens; print([m for m"
        " in ('torch', 'transformers') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_study_of_two_processes_is_that_of_one(monkeypatch):
    tokens = made_tokens()
    taken = []

    def usable():
        taken.append(2)
        return 2

    monkeypatch.setattr(processes, "usable", usable)
    alone = study.study(tokens, draws=20)
    assert not taken and len(tokens) < study.SHARED
    monkeypatch.setattr(study, "SHARED", len(tokens))
    shared = study.study(tokens, draws=20)
    assert taken and list(shared) == list(alone)
    for name, table in alone.items():
        pd.testing.assert_frame_equal(shared[name], table, check_exact=True)
