"""Sentences follow the tables: numbers are theirs, and a claim needs an interval."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.report import summary
from diagnostics.report.summary import RunResults
from tests import study_tables


def row(criterion, estimate, *, outcome="gain", split="held_out", half=0.05, placebo=0.1):
    return {
        "outcome": outcome,
        "criterion": criterion,
        "split": split,
        "method": "spearman",
        "estimate": estimate,
        "low": estimate - half,
        "high": estimate + half,
        "placebo": placebo,
        "positions": 500,
        "prompts": 20,
    }


def material(*rows, **tables) -> RunResults:
    return RunResults(study_tables.manifest(), {"correlations": pd.DataFrame(rows), **tables})


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (0.0234, 2, "0.023"),
        (-0.5, 2, "−0.50"),
        (12345.6, 3, "12,346"),
        (0.0, 2, "0"),
        (3.2e-7, 2, "3.2e-07"),
        (float("nan"), 2, "–"),
        (float("inf"), 2, "–"),
        (0.996, 2, "1.00"),
    ],
)
def test_number(value, digits, text):
    assert summary.number(value, digits) == text


def test_setup_names_loss_optimiser_prompts_and_positions():
    table = pd.DataFrame(
        [
            row("tip", 0.4),
            row("tip", 0.5, split="step") | {"prompts": 12, "positions": 300},
            row("tip", 0.4, split="all"),
        ]
    )
    assert (
        summary.setup(RunResults(study_tables.manifest(), {"correlations": table}))
        == "The student took AdamW's first step of the reverse KL loss on 12 step prompts (300"
        " positions) and was re-scored there and on 20 held-out prompts (500 positions); its"
        " loss of 0.810 nats a position fell by 0.026, 82% of the first-order prediction."
    )


def test_signals_name_the_leader_its_interval_its_placebo_and_teachability():
    rows = [
        row("random", 0.9),
        row("divergence", 0.6),
        row("teachability", 0.4, placebo=0.2),
        row("tip", 0.3),
    ]
    assert (
        summary.signals(material(*rows))
        == "Gain in nats on held-out positions follows divergence best (Spearman +0.60, 95%"
        " interval +0.55 to +0.65, placebo +0.10; no other interval reaches it). Teachability"
        " reaches +0.40 (+0.35 to +0.45; placebo +0.20) with gain in nats."
    )


def test_signals_admit_what_they_cannot_tell_apart():
    text = summary.signals(
        material(*(row(name, 0.6 - i / 100) for i, name in enumerate(["a_b", "c", "d", "e", "f"])))
    )
    assert (
        text.startswith("Gain in nats on held-out positions follows a b best")
        and "; not told apart from c, d, e and 1 more)." in text
    )


def test_paired_differences_decide_where_there_are_any():
    def pair(criterion, other, low, high):
        return {
            "outcome": "gain",
            "criterion": criterion,
            "other": other,
            "split": "held_out",
            "method": "spearman",
            "difference": (low + high) / 2,
            "low": low,
            "high": high,
        }

    rows = [row("a", 0.6), row("b", 0.58), row("c", 0.57)]
    apart = pd.DataFrame([pair("a", "b", 0.01, 0.03), pair("c", "a", -0.05, -0.01)])
    assert summary.signals(material(*rows, differences=apart)).endswith(
        "; ahead of every other in paired draws)."
    )
    apart.loc[1, "high"] = 0.01
    assert summary.signals(material(*rows, differences=apart)).endswith("; not told apart from c).")


def test_both_gains_stand_side_by_side_and_a_turnover_is_said():
    rows = [
        row("divergence", 0.6),
        row("teachability", 0.5),
        row("divergence", -0.1, outcome="relative_gain"),
        row("teachability", 0.2, outcome="relative_gain"),
    ]
    text = summary.signals(material(*rows))
    assert "; relative gain on held-out positions follows teachability best (Spearman +0.20" in text
    assert text.endswith(
        "The order turns over with the definition of gain: divergence is 2nd of 2 in relative"
        " terms, teachability 2nd of 2 in nats."
    )
    rows[2]["estimate"] = 0.9
    assert summary.signals(material(*rows)).endswith(
        "Both gains put divergence first, so the choice does not hinge on how gain is defined."
    )


def test_budget_names_random_and_oracle():
    table = study_tables.selection_curves()
    assert (
        summary.budget(material(selection_curves=table))
        == "With 5% of the positions, teachability captures 15.4% of the gain in nats (13.8% to"
        " 16.1%; random 4.0% to 6.0%, oracle 40.7%); teachability captures 13.8% of the relative"
        " gain (12.5% to 14.5%; random 4.0% to 6.0%, oracle 40.7%)."
    )
    undefined = table.assign(
        captured_share=table.captured_share.where(table.criterion != "teachability")
    )
    assert "divergence captures 10.0% of the gain in nats" in summary.budget(
        material(selection_curves=undefined)
    )


def test_q3_leaves_the_sign_open_where_the_interval_holds_zero():
    assert (
        summary.q3(material(q3_contrast=study_tables.q3_contrast()))
        == "Among confident, wrong positions (Q3), the third with the highest compatibility gained"
        " 0.020 nats more (0.015 to 0.025) and 0.020 of their divergence more (−0.030 to 0.070,"
        " which leaves the sign open) than the third with the lowest."
    )


def test_trainings_and_who_foresaw_them():
    tables = {
        "validation_outcomes": study_tables.validation_outcomes(),
        "validation_agreement": study_tables.validation_agreement(),
    }
    found = RunResults({"stages": {"validate": {"settings": {"steps": 60}}}}, tables)
    assert (
        summary.trained(found)
        == "60 steps with 3 seeds, judged on 24 held-out prompts, gained over the untouched student"
        " in forward KL 0.30 (0.24 to 0.39) on all positions, 0.13 (0.10 to 0.17) at 5% by"
        " teachability (the most there), 0.12 (0.100 to 0.16) at 5% by random; in accuracy 0.10"
        " (0.080 to 0.13) on all positions, 0.043 (0.035 to 0.056) at 5% by teachability (the"
        " most there), 0.042 (0.033 to 0.054) at 5% by random."
    )
    assert (
        summary.foreseen(found)
        == "How far an answer ranked those 18 trainings, each among those of its budget, as their"
        " gain in forward KL did (Kendall τ): one step gain +0.60 (+0.40 to +0.70); captured"
        " gain +0.30 (+0.10 to +0.40)."
    )
    assert (
        summary.certainty(found)
        == "Intervals cross 3 seeds with 24 prompts and typically reach 0.05 nats to either side of"
        " a gain in forward KL; differences between two trainings are paired, in the table"
        " validation_outcomes. Other steps, learning rates, losses or pairs could change the"
        " order."
    )


def test_every_claim_is_named_by_each_gain():
    rows = [
        ("C1", "gain", "refuted"),
        ("C1", "relative_gain", "supported"),
        ("C2", "gain", "supported"),
        ("C3", "gain", "supported"),
        ("C5", "forward_kl", "inconclusive"),
        ("C5 at 0.1", "forward_kl", "refuted"),
    ]
    table = pd.DataFrame(rows, columns=["claim", "outcome", "verdict"])
    assert (
        summary.judged(RunResults({}, {"verdicts": table}))
        == "By gain in nats, C2 and C3 are supported, C1 is refuted; by relative gain, C1 is"
        " supported; by forward KL, C5 is inconclusive."
    )
    assert summary.judged(RunResults()) == ""


def test_training_claims_come_once():
    trained = {"validation_verdicts": study_tables.validation_verdicts()}
    rows = summary.training_claims(RunResults({}, trained))
    assert summary.judged(RunResults({}, trained)) == "By forward KL, C5 is refuted (by full)."
    assert (rows.claim == "C5").all() and set(rows.outcome) == set(
        trained["validation_verdicts"].measure
    )
    assert (
        summary.training_claims(RunResults({}, trained | {"verdicts": rows})).empty
        and summary.training_claims(RunResults({})).empty
    )


def test_certainty_names_prompts_width_and_what_would_change_it():
    text = summary.certainty(
        material(
            row("a", 0.5, half=0.04),
            row("b", 0.4, half=0.06),
            row("c", 0.3, half=0.05),
            calibration=study_tables.calibration(),
        )
    )
    assert text.startswith(
        "The correlations' intervals come from resampling 20 prompts and typically reach 0.05 to"
        " either side, "
    )
    assert "step size (here 1.6e-05)" in text


def test_numbers_are_the_tables():
    """Every estimate that the answer quotes changes with the table."""
    tables = {
        "correlations": study_tables.correlations(),
        "q3_contrast": study_tables.q3_contrast(),
        "calibration": study_tables.calibration(),
    }
    before = list(summary.answer(RunResults(study_tables.manifest(), tables)).values())
    tables["correlations"] = study_tables.correlations(seed=1).assign(prompts=17)
    after = list(summary.answer(RunResults(study_tables.manifest(), tables)).values())
    assert len(before) == len(after) == 4
    assert [a == b for a, b in zip(before, after)] == [False, False, True, False]


def test_without_tables_nothing_is_claimed():
    assert summary.answer(RunResults()) == {}
    assert list(summary.answer(RunResults(study_tables.manifest(), {})).values()) == [
        "The student took AdamW's first step of the reverse KL loss; its loss of 0.810 nats a"
        " position fell by 0.026, 82% of the first-order prediction."
    ]


def test_a_run_shows_itself_as_a_summary():
    tables = {"correlations": study_tables.correlations(), "verdicts": study_tables.verdicts()}
    text = RunResults(study_tables.manifest(), tables)._repr_html_()
    assert text.startswith(
        "<h4>Which of large&#x27;s signals can small learn from?</h4><p><b>What was done?</b> The"
        " student took"
    )
    assert (
        text.count("<tr>") == 4
        and "<td>refuted</td>" in text
        and "tables (rows): correlations (" in text
    )
    assert "<script>" not in RunResults(tables={"<script>": pd.DataFrame({"a": [1]})})._repr_html_()


def test_undefined_estimates_never_lead():
    rows = [row("broken", np.nan), row("tip", 0.2)]
    assert summary.ranked(material(*rows), "gain").criterion.tolist() == ["tip"]


@pytest.mark.parametrize(
    "pair, expected",
    [
        (
            "embedded",
            "The embedded pair: which of the teacher's signals can the student learn from?",
        ),
        ("custom", "Which of large's signals can small learn from?"),
        (None, "Which of the teacher's signals can the student learn from?"),
    ],
)
def test_title(pair, expected):
    manifest = study_tables.manifest()
    manifest["stages"]["rollout"]["facts"]["pair"] = pair
    assert summary.title(RunResults(manifest if pair else {})) == expected
