import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import correlations, study
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import criterion
from tests.analysis.test_claims import FOUR, trained
from tests.made_tokens import made_tokens

TABLES = {
    "correlations",
    "placebo_excess",
    "differences",
    "partial",
    "within_prompt",
    "quadrants",
    "positions",
    "q3_contrast",
    "q3_groups",
    "matching",
    "balance",
    "matching_caliper",
    "balance_caliper",
    "regressions",
    "decomposition",
    "residual_curves",
    "support_robustness",
    "verdicts",
    "gain_robustness",
    "saturation",
    "coverage",
    "warnings",
    "left_out",
}


@pytest.fixture(scope="module")
def tokens():
    return made_tokens()


FEW = {"criteria": ["teachability", "divergence", "q3_teachability"], "draws": 20}


@pytest.fixture(scope="module")
def made(tokens):
    return study.study(tokens, **FEW)


def test_every_table_is_made(made):
    assert set(made) == TABLES
    assert all(len(table) for name, table in made.items() if name != "warnings")


def test_every_table_says_what_it_rests_on(made):
    for name, table in made.items():
        if name not in ("warnings", "left_out"):
            assert {"positions", "prompts"} <= set(table.columns), name
        if name not in ("warnings", "left_out", "balance", "balance_caliper", "saturation"):
            assert {"outcome", "split"} <= set(table.columns), name


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
    for name in ("q3_contrast", "q3_groups", "regressions", "coverage", "partial"):
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
                "verdicts",
                "gain_robustness",
            },
            "no column compatibility",
        ),
        ("student_entropy", {"quadrants", "partial", "verdicts"}, "no column student_entropy"),
    ],
)
def test_a_missing_column_leaves_tables_out_with_the_reason(tokens, missing, gone, why):
    made = study.study(tokens.drop(columns=missing), **FEW | {"criteria": ["divergence", "late"]})
    assert not gone & set(made) and {
        "correlations",
        "within_prompt",
        "coverage",
        "saturation",
    } <= set(made)
    assert {(name, "the whole table", why) for name in gone} <= left(made)


def test_without_placebo_split_special_tokens_and_teacher_entropy(tokens):
    bare = made_tokens(placebo=False).drop(
        columns=["split", "is_special", "teacher_entropy", "relative_gain"]
    )
    made = study.study(bare, **FEW)
    reasons = left(made)
    assert {
        ("all", "outcome relative_gain", "no column relative_gain"),
        ("all", "placebo of gain", "no column placebo_gain"),
        ("all", "step and held-out positions apart", "no column split with both"),
        ("gain_robustness", "without special tokens", "no column is_special"),
        ("regressions", "teacher entropy as a term", "no column teacher_entropy"),
        ("placebo_excess", "the whole table", "nothing in it is defined"),
    } <= reasons
    assert set(made["verdicts"].outcome) == {"gain"} and (made["verdicts"].looks == 4).all()


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
        assert set(made["verdicts"].verdict) <= {"supported", "refuted", "inconclusive"}


def test_a_table_without_gains_or_rows_is_refused(tokens):
    with pytest.raises(DiagnosticsError, match=r"^The analysis needs an outcome"):
        study.study(tokens.drop(columns=["gain", "relative_gain", "reverse_gain"]))
    with pytest.raises(DiagnosticsError, match=r"^The token table has no rows"):
        study.study(tokens.head(0))


def test_training_runs_and_other_losses_join(tokens):
    made = study.study(
        tokens,
        **FEW,
        training=trained("supported", **FOUR),
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
    for name in ("correlations", "partial", "within_prompt", "placebo_excess"):
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
