"""Each warning of the study, tables without it, and the verdicts that it changes."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import claims, robustness
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from diagnostics.analysis.warnings import EXPLAINED, ORDINARY, WARNING_COLUMNS, warnings
from diagnostics.report import provenance, run_results
from tests.claim_tables import claim_tokens, one_step


@pytest.fixture(scope="module")
def tokens():
    return claim_tokens(prompts=50, length=14)


def codes(tokens, **tables):
    table = warnings(tokens, tables)
    assert tuple(table.columns) == WARNING_COLUMNS
    return list(zip(table.code, table.subject, strict=True))


def test_a_sound_table_has_none(tokens):
    made = {
        "coverage": robustness.coverage(tokens.assign(relative_gain=tokens.gain), draws=20),
        "saturation": robustness.saturation(tokens),
    }
    assert codes(tokens, **made) == []


def test_saturated_compatibility_at_three_quarters(tokens):
    n = len(tokens)

    def at(share):
        return tokens.assign(compatibility=np.where(np.arange(n) < share * n, 0.995, 0.5))

    assert codes(at(0.76)) == [("saturated", "compatibility")] and codes(at(0.74)) == []
    assert (
        warnings(at(0.76), {})
        .message[0]
        .startswith("Compatibility is at least 0.99 at 76% of positions:")
    )


def test_models_that_differ_by_their_rounding_are_named(tokens):
    same = warnings(tokens.assign(forward_kl=2e-8), {})
    assert same.code[0] == "no_signal" and same.value[0] == pytest.approx(2e-8)
    assert (
        "Are --student and --teacher the same model? The mean forward KL is 2.0e-08 nats"
        in (same.message[0])
    )
    assert "no_signal" not in dict(codes(tokens.assign(forward_kl=2e-6)))


def covered(**columns):
    rows = {"outcome": ["gain", "context_gain", "gain"], "split": ["held_out", "held_out", "step"]}
    usual = {"undefined": 0, "positions": 100, "prompts": 50, "effective_prompts": 40.0}
    return pd.DataFrame(rows | usual | columns)


def test_few_prompts_are_one_line_with_the_populations_in_brackets(tokens):
    table = warnings(tokens, {"coverage": covered(effective_prompts=[15.0, 12.5, 30.0])})
    assert table.code.tolist() == ["few_prompts"] and table.value[0] == 12.5
    assert table.message[0] == (
        "Intervals were calibrated for 20 prompts and more, and here 50 prompts weigh as much as"
        " 12.5 of equal length [held_out: gain, context_gain]."
    )
    assert codes(tokens, coverage=covered()) == []


def test_undefined_outcomes_are_one_line(tokens):
    table = warnings(tokens, {"coverage": covered(undefined=[0, 30, 50])})
    assert table.code.tolist() == ["undefined_outcome"] and table.value[0] == pytest.approx(1 / 3)
    assert table.message[0] == (
        "Up to 33% of the positions have no context gain or gain [held_out: context_gain; step:"
        " gain]."
    )


def test_constants_rare_quadrants_and_dropped_mass(tokens):
    flat = tokens.assign(teacher_entropy=1.0, bhattacharyya=0.5)
    assert codes(flat, saturation=robustness.saturation(flat)) == [
        ("constant", "teacher_entropy, bhattacharyya")
    ]
    together = tokens.assign(forward_kl=tokens.student_entropy)
    assert codes(together) == [("rare_quadrant", "Q2, Q3")]
    lost = tokens.assign(teacher_dropped_mass=0.05, student_dropped_mass=0.02)
    assert codes(lost) == [("dropped_mass", "student, teacher")]


def test_collinear_terms_and_pairs_that_differ(tokens):
    terms = pd.DataFrame(
        {"model": ["m", "m", "n"], "term": ["a", "b", "a"], "inflation": [11.0, 3.0, 36.0]}
    )
    assert codes(tokens, regressions=terms) == [("collinear", "m: a; n: a")]
    assert codes(tokens, regressions=terms[1:2]) == []
    balance = pd.DataFrame(
        {"score": ["c", "c"], "split": ["held_out", "step"], "after": [-0.4, 0.05]}
    )
    assert codes(tokens, balance=balance) == [("unmatched", "held_out: c")]
    assert codes(tokens, balance=balance[1:]) == []


def test_one_step_and_no_null(tokens):
    assert codes(one_step(tokens)) == [("one_step", "steps")]
    assert codes(tokens.drop(columns="context_gain")) == [("no_null", "context_gain")]


def test_what_a_reader_noted_comes_first(tokens):
    noted = tokens.drop(columns="context_gain")
    noted.attrs["warnings"] = [["read_after", "compatibility", "It was read after training."]]
    table = warnings(noted, {})
    assert table.code.tolist() == ["read_after", "no_null"]
    assert table.message[0] == "It was read after training."


def verdict(claim, kind, verdict, reason, *, population="held_out", outcome="context_gain"):
    row = dict.fromkeys(claims.VERDICT_COLUMNS, "")
    row |= {"claim": claim, "kind": kind, "verdict": verdict, "reason": reason}
    return row | {
        "population": population,
        "outcome": outcome,
        "primary": True,
        "exploratory": False,
    }


def test_a_cause_that_changes_a_verdict_comes_first_and_names_it(tokens):
    table = pd.DataFrame(
        [
            verdict("C1", "controlled", "inconclusive", claims.REASONS["holds_zero"]),
            verdict("C2", "controlled", "not identified", "no overlap: 12% of them"),
            verdict("C2", "controlled", "not identified", "no overlap: 9%", population="step"),
            verdict("C3", "paper", "inconclusive", "depends on the scale: above 0 here"),
        ]
    )
    lost = tokens.assign(teacher_dropped_mass=0.05)
    found = warnings(lost, {"verdicts": table})
    assert found.code.tolist() == ["no_overlap", "scale", "dropped_mass"]
    assert found.changes_verdict.tolist() == [
        "C2 (controlled) is not identified [held_out, step: context_gain]",
        "C3 (paper) is inconclusive [held_out: context_gain]",
        "",
    ]
    assert found.message[0].startswith("Inside Q3 compatible and incompatible positions differ")


def test_a_rule_with_figures_of_its_own_speaks_for_its_cause(tokens):
    bare = tokens.drop(columns="context_gain")
    reason = claims.REASONS["no_null"]
    table = pd.DataFrame([verdict("C1", "controlled", "not identified", reason)])
    found = warnings(bare, {"verdicts": table})
    assert found.code.tolist() == ["no_null"]
    assert found.changes_verdict[0] == "C1 (controlled) is not identified [held_out: context_gain]"


def test_every_cause_has_its_words():
    assert set(claims.REASONS) == set(EXPLAINED) | set(filter(None, ORDINARY))
    assert [claims.cause(text) for text in claims.REASONS.values()] == list(claims.REASONS)


def test_nothing_confirmed_is_said_once(tokens):
    made = claims.claim_tables(tokens, base_k=16, bootstrap=Bootstrap(draws=10))
    found = warnings(tokens, made).set_index("code")
    assert found.message["exploratory"] == (
        "No verdict of this table confirms anything: no primary choices were recorded before the"
        " probe."
    )
    digest = PrimaryChoices().sha256()
    made = claims.claim_tables(tokens, base_k=16, bootstrap=Bootstrap(draws=10), registered=digest)
    assert "exploratory" not in set(warnings(tokens, made).code)


def test_a_page_names_the_verdict_that_a_warning_changes(tokens):
    table = pd.DataFrame([verdict("C2", "controlled", "not identified", "no overlap: 12%")])
    made = {"warnings": warnings(tokens.assign(teacher_dropped_mass=0.05), {"verdicts": table})}
    (first, changes), (second, unchanged) = provenance.causes(run_results.RunResults({}, made))
    assert first.endswith("or another pair.")
    assert changes == "C2 (controlled) is not identified [held_out: context_gain]"
    assert not unchanged and second.startswith("On average some probability")
