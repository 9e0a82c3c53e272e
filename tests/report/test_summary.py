"""Sentences follow the tables: numbers are theirs, and a claim needs an interval."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.decision import decision_sentence
from diagnostics.report import page, summary
from diagnostics.report.run_results import RunResults
from tests import study_tables
from tests.report import made_tables

NO_NULL = (
    "No step towards a permuted teacher was taken, so nothing says how much of this needs a signal"
    " about the position."
)


def row(criterion, estimate, *, outcome="gain", split="held_out", half=0.05):
    return {
        "outcome": outcome,
        "criterion": criterion,
        "split": split,
        "method": "spearman",
        "estimate": estimate,
        "low": estimate - half,
        "high": estimate + half,
        "positions": 500,
        "prompts": 20,
    }


def results(*rows, **tables) -> RunResults:
    return RunResults(study_tables.manifest(), {"correlations": pd.DataFrame(rows), **tables})


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (0.0234, 2, "0.023"),
        (-0.5, 2, "−0.50"),
        (12345.6, 3, "12,346"),
        (0.0, 2, "0"),
        (3.2e-7, 2, "3.2e−7"),
        (-4.632e6, 3, "−4.63e6"),
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
        " loss of 0.810 nats per position fell by 0.026, 82% of the first-order prediction."
    )


def _calibrated(ratios: list[float]) -> pd.DataFrame:
    """Folds of one size, each predicted to lower its loss by 0.1, beside a size not taken."""
    rows = [(fold, 1.0, 0.1, 0.1 * ratio, ratio, True) for fold, ratio in enumerate(ratios)]
    rows += [(fold, 2.0, 0.2, -0.9, -4.5, False) for fold in range(len(ratios))]
    names = "fold step_size predicted_drop realised_drop ratio chosen".split()
    return pd.DataFrame(rows, columns=names)


def test_setup_says_what_all_folds_did_to_their_losses():
    tables = {"calibration": _calibrated([1.3, 1.1, 0.4])}
    text = summary.setup(RunResults(study_tables.manifest(), tables))
    assert text.endswith(
        "; their losses fell by 0.093 nats per position in the mean of the folds, 93% of the"
        " first-order prediction (fold by fold 40% to 130%)."
    )
    rose = {"calibration": _calibrated([-1.3, 0.1])}
    assert "losses rose by 0.060 nats" in summary.setup(RunResults(study_tables.manifest(), rose))
    one = {"calibration": _calibrated([1.3])}
    assert "its loss of 0.810 nats" in summary.setup(RunResults(study_tables.manifest(), one))


def test_setup_names_the_folds():
    text = summary.setup(
        RunResults(study_tables.manifest(), {"correlations": made_tables.correlations()})
    )
    assert text.startswith(
        "The student took AdamW's first step of the reverse KL loss, once for each of 4 folds of 64"
        " prompts, and every position (2,400) was re-scored after each: the other folds' steps are"
        " held out for it; its loss"
    )


def test_signals_name_the_leader_its_interval_and_teachability():
    rows = [row("random", 0.9), row("divergence", 0.6), row("teachability", 0.4), row("tip", 0.3)]
    assert (
        summary.signals(results(*rows))
        == "Gain in nats on held-out positions follows divergence best (Spearman +0.60, 95%"
        " interval +0.55 to +0.65; no other interval reaches it). Teachability reaches +0.40 (+0.35"
        f" to +0.45) with gain in nats. {NO_NULL}"
    )


def test_of_models_that_differ_by_their_rounding_no_ranking_is_said():
    rows = [row("tip", 0.5), row("teachability", 0.1)]
    same = pd.DataFrame({"code": ["no_signal"], "message": [""], "changes_verdict": [""]})
    run = results(*rows, warnings=same)
    assert summary.signals(run).startswith("Not judged. Teacher and student give the same")
    assert summary.budget(run) == summary.q3(run) == ""


def test_signals_put_the_context_gain_first_and_the_null_beside_the_gain():
    rows = [
        row(name, estimate, outcome=outcome)
        for outcome, estimates in {
            "gain": (0.8, 0.6, 0.3),
            "gain_permuted": (0.7, 0.5, 0.1),
            "context_gain": (0.05, 0.2, 0.1),
            "relative_gain": (-0.5, 0.1, 0.0),
        }.items()
        for name, estimate in zip(("divergence", "teachability", "tip"), estimates, strict=True)
    ]
    assert (
        summary.signals(results(*rows))
        == "Context gain on held-out positions follows teachability best (Spearman +0.20, 95%"
        " interval +0.15 to +0.25; not told apart from TIP); gain in nats on held-out positions"
        " follows divergence best (Spearman +0.80, 95% interval +0.75 to +0.85; with a permuted"
        " teacher +0.70; no other interval reaches it). Teachability reaches +0.20 (+0.15 to +0.25)"
        " with context gain and +0.60 (+0.55 to +0.65; with a permuted teacher +0.50) with gain in"
        " nats. The order turns over between them: teachability is 2nd of 3 by gain in nats,"
        " divergence 3rd of 3 by context gain."
    )


def test_no_criterion_is_best_that_does_not_beat_random():
    rows = [row("tip", 0.04), row("teachability", 0.02), row("entropy", -0.3)]
    assert summary.signals(results(*rows)).startswith(
        "No criterion follows the gain in nats on held-out positions more than random does (the"
        " highest Spearman is TIP's, +0.04, 95% interval −0.01 to +0.09). "
    )
    table = study_tables.selection_curves().assign(prompts=40)
    low = table.assign(captured_share=0.03, low=0.02, high=0.04)
    assert summary.budget(results(selection_curves=low)).startswith(
        "With 5% of the positions, no criterion is shown to capture more of the gain in nats than"
        " random positions (random 4.0% to 6.0%; the highest share is divergence's, 3.0%, 2.0% to"
        " 4.0%); no criterion"
    )


def test_signals_admit_what_they_cannot_tell_apart():
    text = summary.signals(
        results(*(row(name, 0.6 - i / 100) for i, name in enumerate(["a_b", "c", "d", "e", "f"])))
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
    assert summary.signals(results(*rows, differences=apart)).endswith(
        f"; ahead of every other in paired draws). {NO_NULL}"
    )
    apart.loc[1, "high"] = 0.01
    assert summary.signals(results(*rows, differences=apart)).endswith(
        f"; not told apart from c). {NO_NULL}"
    )


def test_both_gains_stand_side_by_side_and_a_turnover_is_said():
    rows = [
        row("divergence", 0.6),
        row("teachability", 0.5),
        row("divergence", -0.1, outcome="relative_gain"),
        row("teachability", 0.2, outcome="relative_gain"),
    ]
    text = summary.signals(results(*rows))
    assert "; relative gain on held-out positions follows teachability best (Spearman +0.20" in text
    assert text.endswith(
        "The order turns over between them: divergence is 2nd of 2 by relative gain, teachability"
        f" 2nd of 2 by gain in nats. {NO_NULL}"
    )
    rows[2] |= {"estimate": 0.9, "low": 0.85, "high": 0.95}
    assert summary.signals(results(*rows)).endswith(f"Both put divergence first. {NO_NULL}")
    rows[2] |= {"low": -0.1}
    assert "put" not in summary.signals(results(*rows))


def test_ambiguous_cells_never_lead_a_budget():
    table = study_tables.selection_curves().assign(prompts=40)
    tied = table.assign(ambiguous=np.where(table.criterion == "teachability", 0.3, 0.0))
    assert "divergence captures 10.0% of the gain in nats" in summary.budget(
        results(selection_curves=tied)
    )


def test_the_decision_comes_first_and_its_absence_says_what_to_run():
    found = RunResults(study_tables.manifest(), {"decision": made_tables.decision()})
    first = list(summary.answer(found).items())
    assert first[0] == ("Which criterion to train with?", decision_sentence(made_tables.decision()))
    assert "wanted, train with teachability at 5 %: +0.0396 ± 0.0090 nats" in first[0][1]
    assert first[1][0] == "What next?" and "--criteria teachability,random" in first[1][1]
    for name in ("correlations", "intervention"):
        without = summary.answer(RunResults({}, {name: getattr(study_tables, name)()}))
        assert without["Which criterion to train with?"].startswith(
            "Not answered: this run holds no steps on selected positions over a horizon; the"
        )
        assert without["What next?"].startswith(
            "`opd-diagnostics intervene --horizon 1,5,20 --output-dir DIR`, then"
        )
    trained = summary.answer(RunResults({}, {"evaluations": study_tables.evaluations()}))
    assert not set(trained) & set(summary.FIRST)


def test_below_twenty_prompts_a_side_nothing_is_judged():
    few = [row("tip", 0.4) | {"prompts": 12}, row("entropy", 0.1) | {"prompts": 12}]
    assert summary.signals(results(*few)) == "Not judged: 12 prompts a side, of at least 20."
    assert summary.certainty(results(*few)) == ""
    one = study_tables.selection_curves().assign(prompts=1)
    assert summary.budget(results(selection_curves=one)) == ""
    assert summary.q3(results(q3_contrast=study_tables.q3_contrast().assign(prompts=19))) == ""
    table = made_tables.verdicts()
    shown, _ = summary.claims(results(verdicts=table.assign(prompts=3)))
    assert set(shown.verdict) == {"not judged"} and set(shown.sentence) == {""}
    assert set(shown.reason) == {"3 prompts a side, of at least 20"}
    enough, _ = summary.claims(results(verdicts=table.assign(prompts=20)))
    assert "not judged" not in set(enough.verdict) and len(enough) == len(shown) > 0


def test_sentences_speak_of_the_registered_population():
    rows = [row("tip", 0.4), row("entropy", 0.6, split="step")]
    registered = {"choices": made_tables.REGISTERED["choices"] | {"population": "step"}}
    run = results(*rows)
    other = RunResults({**run.manifest, "primary": registered}, run.tables)
    assert summary.ranked(run, "gain").criterion.tolist() == ["tip"]
    assert summary.ranked(other, "gain").criterion.tolist() == ["entropy"]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("[-0.5, -0.01] and 0.3-0.4", "[−0.5, −0.01] and 0.3-0.4"),
        ("(-.5), top-5, gpt-2, 1e-05, a -2", "(−.5), top-5, gpt-2, 1e−5, a −2"),
        ("--output-dir DIR-40", "--output-dir DIR-40"),
    ],
)
def test_minus_signs_stand_before_numbers_only(text, shown):
    assert summary.minus(text) == shown


def test_budget_names_random_and_oracle():
    table = study_tables.selection_curves().assign(prompts=40)
    assert (
        summary.budget(results(selection_curves=table))
        == "With 5% of the positions, teachability captures 15.4% of the gain in nats (13.8% to"
        " 16.1%; random 4.0% to 6.0%, oracle 40.7%); teachability captures 13.8% of the relative"
        " gain (12.5% to 14.5%; random 4.0% to 6.0%, oracle 40.7%)."
    )
    undefined = table.assign(
        captured_share=table.captured_share.where(table.criterion != "teachability")
    )
    assert "divergence captures 10.0% of the gain in nats" in summary.budget(
        results(selection_curves=undefined)
    )


def test_q3_leaves_the_sign_open_where_the_interval_holds_zero():
    table = study_tables.q3_contrast().assign(prompts=40)
    old = table[table.outcome != "context_gain"]
    assert (
        summary.q3(results(q3_contrast=old))
        == "Among confident, wrong held-out positions (Q3), the third with the highest"
        " compatibility gained 0.020 nats more (0.015 to 0.025) and 0.020 of their divergence more"
        " (−0.030 to 0.070, which leaves the sign open) than the third with the lowest."
    )
    context = old[old.outcome == "gain"].assign(outcome="context_gain", difference=-0.01)
    text = summary.q3(results(q3_contrast=pd.concat([old, context], ignore_index=True)))
    assert "gained 0.010 nats of context gain less (" in text and "of their divergence" not in text


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
        " teachability (the most there, not shown to be more than random), 0.12 (0.100 to 0.16) at"
        " 5% by random; in accuracy 0.10 (0.080 to 0.13) on all positions, 0.043 (0.035 to 0.056)"
        " at 5% by teachability (the most there, not shown to be more than random), 0.042 (0.033 to"
        " 0.054) at 5% by random."
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


def test_the_most_is_more_than_random_only_by_its_interval():
    table = study_tables.validation_outcomes().assign(minus_random_low=0.01)
    text = summary.trained(RunResults({}, {"validation_outcomes": table}))
    assert "by teachability (the most there, and more than random)" in text


def test_trainings_are_set_over_random_on_the_text_that_all_students_share():
    fresh = study_tables.validation_outcomes()
    bank = fresh[fresh.measure == "forward_kl"].assign(measure="bank_forward_kl")
    other = bank[bank.criterion == "teachability"].assign(criterion="entropy")
    bank = pd.concat([bank, other], ignore_index=True)
    over = bank.criterion.map({"teachability": -0.01, "entropy": 0.02})
    bank = bank.assign(minus_random=over, minus_random_low=over - 0.03, minus_random_high=0.05)
    tables = {"validation_outcomes": pd.concat([fresh, bank], ignore_index=True)}
    text = summary.trained(RunResults({}, tables))
    assert text.endswith(
        "more sharply than what each now writes, over random positions at 5% (the best and"
        " teachability): in forward KL entropy +0.020 (−0.010 to +0.050) and teachability −0.010"
        " (−0.040 to +0.050)."
    )
    assert "sharply" not in summary.trained(RunResults({}, {"validation_outcomes": fresh}))


def test_agreement_is_in_the_loss_s_own_divergence_with_its_permutation_p():
    table = study_tables.validation_agreement().assign(p_permutation=[0.004, 0.3] * 2)
    reverse = table.assign(
        y="trained_reverse_kl", x=table.x.replace({"one_step_gain": "intervention_h20_reverse_kl"})
    )
    reverse.loc[reverse.x == "captured_gain", ["low", "high"]] = np.nan
    tables = {
        "validation_agreement": pd.concat([table, reverse], ignore_index=True),
        "foresight_signs": made_tables.foresight_signs(),
    }
    manifest = {"stages": {"validate": {"settings": {"loss": "reverse_kl"}}}}
    assert (
        summary.foreseen(RunResults(manifest, tables))
        == "How far an answer ranked those 18 trainings, each among those of its budget, as their"
        " gain in reverse KL did (Kendall τ): intervention h20 reverse KL +0.60 (+0.40 to +0.70), p"
        " = .004; captured gain +0.30, p = .30. Sign of the difference to random in reverse KL,"
        " where training settled it: right after one matched step in 1 of 3; 20 steps in 3 of 3"
        " cells."
    )


def test_claims_are_named_controlled_and_as_the_paper_has_them():
    run = RunResults({"primary": made_tables.REGISTERED}, {"verdicts": made_tables.verdicts()})
    shown, more = summary.claims(run)
    assert more and set(zip(shown.kind, shown.outcome)) == {
        ("controlled", "context_gain"),
        ("paper", "gain"),
    }
    assert (
        summary.judged(run)
        == "With controls, by context gain, C1 is supported, C3 is inconclusive, C2 is not"
        " identified; as the paper has it, by gain in nats, C2 and C3 are supported, C1 is refuted."
    )
    assert (
        summary.registered(run)
        == "Registered before the probe (sha256 ab12ab12ab12…): outcome context gain, population"
        " held out, criterion teachability, budget 0.05, horizon 20, margin 0.25, level 0.95,"
        " minimum prompts 20. Anything else is exploratory."
    )
    assert summary.registered(RunResults()) == ""


@pytest.mark.parametrize(
    "losses, measure",
    [
        ({}, None),
        ({"probe": "reverse_kl"}, "reverse_kl"),
        ({"probe": "reverse_kl", "intervene": "forward_kl"}, "forward_kl"),
        ({"probe": "sampled"}, "reverse_kl"),
        ({"validate": "jsd"}, "js"),
        ({"probe": "mine"}, None),
    ],
)
def test_the_measure_is_the_divergence_that_the_loss_lowers(losses, measure):
    stages = {name: {"settings": {"loss": loss}} for name, loss in losses.items()}
    assert RunResults({"stages": stages}).measure == measure


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
        " supported; after training, by forward KL, C5 is inconclusive."
    )
    assert summary.judged(RunResults()) == ""


def test_training_claims_come_once():
    trained = {"validation_verdicts": study_tables.validation_verdicts()}
    rows = summary.training_claims(RunResults({}, trained))
    assert summary.judged(RunResults({}, trained)) == (
        "After training, by forward KL, C5 is refuted (by full)."
    )
    assert (rows.claim == "C5").all() and set(rows.outcome) == set(
        trained["validation_verdicts"].measure
    )
    assert (
        summary.training_claims(RunResults({}, trained | {"verdicts": rows})).empty
        and summary.training_claims(RunResults({})).empty
    )


def test_certainty_names_prompts_width_and_what_would_change_it():
    text = summary.certainty(
        results(
            row("a", 0.5, half=0.04),
            row("b", 0.4, half=0.06),
            row("c", 0.3, half=0.05),
            calibration=study_tables.calibration(),
        )
    )
    assert text.startswith(
        "The intervals of correlations with the gain in nats are over 20 prompts and typically"
        " reach 0.05 to either side, "
    )
    assert "step size (here 1.6e−5)" in text
    context = [row("a", 0.1, outcome="context_gain", half=0.2), row("a", 0.5, half=0.04)]
    assert summary.certainty(results(*context)).startswith(
        "The intervals of correlations with the context gain are over 20 prompts and typically"
        " reach 0.2 to"
    )
    four, one = (summary.certainty(results(row("a", 0.5) | {"steps": steps})) for steps in (4, 1))
    assert "are over 20 prompts and 4 step batches and typically" in four
    assert "are over 20 prompts alone, for there is one step batch, and typically" in one


def test_numbers_are_the_tables():
    """Every estimate that the answer quotes changes with the table."""
    tables = {
        "correlations": study_tables.correlations().assign(prompts=40),
        "q3_contrast": study_tables.q3_contrast().assign(prompts=40),
        "calibration": study_tables.calibration(),
    }
    before = list(summary.answer(RunResults(study_tables.manifest(), tables)).values())
    tables["correlations"] = study_tables.correlations(seed=1).assign(prompts=27)
    after = list(summary.answer(RunResults(study_tables.manifest(), tables)).values())
    same = [True, True, False, False, False, True, False]
    assert [a == b for a, b in zip(before, after, strict=True)] == same


def test_without_tables_nothing_is_claimed():
    assert summary.answer(RunResults()) == {}
    assert list(summary.answer(RunResults(study_tables.manifest(), {})).values()) == [
        "The student took AdamW's first step of the reverse KL loss; its loss of 0.810 nats"
        " per position fell by 0.026, 82% of the first-order prediction."
    ]


def test_a_run_shows_itself_as_a_summary():
    verdicts = study_tables.verdicts().assign(prompts=40)
    tables = {"correlations": study_tables.correlations(), "verdicts": verdicts}
    text = RunResults(study_tables.manifest(), tables)._repr_html_()
    assert text.startswith(
        "<h4>Which of large&#x27;s signals can small learn from?</h4><p><b>Which criterion to train"
        " with?</b> Not answered:"
    )
    assert (
        text.count("<tr>") == 4
        and "<td>refuted</td>" in text
        and "tables (rows): correlations (" in text
    )
    assert "<script>" not in RunResults(tables={"<script>": pd.DataFrame({"a": [1]})})._repr_html_()


def test_undefined_estimates_never_lead():
    rows = [row("broken", np.nan), row("tip", 0.2)]
    assert summary.ranked(results(*rows), "gain").criterion.tolist() == ["tip"]


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


def test_folders_that_are_called_by_their_role_are_told_apart_by_kind_and_size():
    manifest = study_tables.manifest()
    facts = manifest["stages"]["rollout"]["facts"]
    facts["student"] |= {"name": "student", "parameters": 483360, "weights_sha256": "b58f8dac" * 8}
    facts["teacher"] |= {"name": "teacher", "parameters": 1_540_000_000}
    run = RunResults(manifest, {})
    assert summary.title(run) == (
        "Student Llama 0.48 M, teacher Llama 1.5 B: which of the teacher's signals can the student"
        " learn from?"
    )
    over = page._over(run)
    assert "student’s weights b58f8dac…" in over and "teacher’s" not in over
    stage = {"settings": {}, "facts": facts, "inputs": {}, "files": {}}
    trained = RunResults({"stages": {"validate": stage}}, {})
    assert summary.title(trained).endswith("teacher Llama 1.5 B: what training gave")
    facts["pair"] = "embedded"
    assert summary.title(run).startswith("The embedded pair: ") and "weights" not in page._over(run)
    facts |= {"pair": "custom", "teacher": {"name": "teacher"}}
    assert summary.title(run) == "Which of the teacher's signals can the student learn from?"


def test_title_of_trainings_names_the_pair_and_the_first_screen_what_was_trained():
    stages = {"validate": {"settings": {"pair": "smollm2", "loss": "reverse_kl", "steps": 40}}}
    run = RunResults({"stages": stages}, {})
    assert summary.title(run) == "The smollm2 pair: what training gave"
    stages["validate"]["settings"] |= {"pair": None, "student": "small", "teacher": "large"}
    stages["validate"]["settings"]["learning_rate"] = 1e-4
    run = RunResults({"stages": stages}, {})
    assert summary.title(run) == "small trained with large as its teacher"
    assert summary.setup(run) == (
        "Each training took 40 steps of the reverse KL loss at a learning rate of 0.0001, on the"
        " positions that its criterion selects."
    )
