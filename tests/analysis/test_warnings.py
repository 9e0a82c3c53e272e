import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import robustness
from diagnostics.analysis.warnings import warnings
from tests.made_tokens import made_tokens


@pytest.fixture(scope="module")
def tokens():
    return made_tokens(prompts=50, length=14).drop(columns="split")


def codes(tokens, **tables):
    table = warnings(tokens, tables)
    assert list(table.columns) == ["code", "subject", "value", "limit", "message"]
    return list(zip(table.code, table.subject))


def test_a_sound_table_has_none(tokens):
    made = {
        "coverage": robustness.coverage(tokens, draws=20),
        "saturation": robustness.saturation(tokens),
    }
    assert (
        codes(
            tokens.assign(relative_gain=tokens.gain),
            **made
            | {
                "coverage": robustness.coverage(
                    tokens.assign(relative_gain=0.1 * tokens.gain), draws=20
                )
            },
        )
        == []
    )


def test_saturated_compatibility_at_three_quarters(tokens):
    n = len(tokens)
    at = lambda share: tokens.assign(compatibility=np.where(np.arange(n) < share * n, 0.995, 0.5))
    assert codes(at(0.76)) == [("saturated", "compatibility")] and codes(at(0.74)) == []
    assert (
        warnings(at(0.76), {})
        .message[0]
        .startswith("Compatibility is at least 0.99 at 76% of positions:")
    )


def test_few_prompts_and_undefined_outcomes():
    few = made_tokens(prompts=10, length=14).drop(columns="split")
    found = codes(few, coverage=robustness.coverage(few, draws=5))
    assert ("few_prompts", "gain, all") in found
    sparse = made_tokens(prompts=50).drop(columns="split")
    sparse.loc[: len(sparse) // 2, "relative_gain"] = np.nan
    assert ("undefined_outcome", "relative_gain, all") in codes(
        sparse, coverage=robustness.coverage(sparse, draws=5)
    )


def test_uneven_prompts_count_for_fewer(tokens):
    lopsided = pd.concat([tokens, tokens.assign(prompt_id="p0")], ignore_index=True)
    row = robustness.coverage(lopsided, draws=5).iloc[0]
    assert row.prompts == 50 and row.effective_prompts < 5
    assert (
        "rests on 50 prompts that weigh like"
        in warnings(lopsided, {"coverage": robustness.coverage(lopsided, draws=5)}).message[0]
    )


def test_constants_rare_quadrants_dropped_mass_and_no_placebo(tokens):
    flat = tokens.assign(teacher_entropy=1.0)
    assert ("constant", "teacher_entropy") in codes(flat, saturation=robustness.saturation(flat))
    together = tokens.assign(forward_kl=tokens.student_entropy)
    assert {("rare_quadrant", "Q2"), ("rare_quadrant", "Q3")} <= set(codes(together))
    assert codes(tokens.assign(teacher_dropped_mass=0.05)) == [
        ("dropped_mass", "teacher_dropped_mass")
    ]
    assert codes(tokens.drop(columns="placebo_reverse_gain")) == [("no_placebo", "reverse_gain")]


def test_collinear_terms_and_pairs_that_differ(tokens):
    terms = pd.DataFrame({"model": ["m", "m"], "term": ["a", "b"], "inflation": [11.0, 3.0]})
    assert codes(tokens, regressions=terms) == [("collinear", "m: a")]
    balance = pd.DataFrame(
        {"score": ["c", "c"], "split": ["all", "all"], "after": [-0.4, 0.05], "replacement": True}
    )
    assert (
        codes(tokens, balance=balance) == [("unbalanced", "c, all")]
        and codes(tokens, balance=balance[1:]) == []
    )
    assert codes(tokens, balance=balance.assign(replacement=False)) == []


def test_a_decomposition_that_turns_over_with_the_scale(tokens):
    rows = pd.DataFrame(
        {
            "outcome": "gain",
            "split": "all",
            "winsorised": 0.01,
            "scale": ["standardised", "per_unit"],
            "difference": [0.2, -0.1],
            "low": [0.1, -0.2],
            "high": [0.3, -0.05],
        }
    )
    assert codes(tokens, decomposition=rows) == [("scale", "gain, all, winsorised 0.01")]
    assert (
        codes(
            tokens,
            decomposition=rows.assign(difference=[0.2, 0.1], high=[0.3, 0.3], low=[0.1, 0.05]),
        )
        == []
    )
    assert codes(tokens, decomposition=rows.assign(high=[0.3, 0.05])) == []


def test_what_a_reader_noted_comes_first(tokens):
    noted = tokens.drop(columns="placebo_gain")
    noted.attrs["warnings"] = [["read_after", "compatibility", "It was read after training."]]
    table = warnings(noted, {})
    assert (
        table.code.tolist() == ["read_after", "no_placebo"]
        and table.message[0] == "It was read after training."
    )
