"""Why released and controlled differ: known answers, planted in token tables, and each clause."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper import sentences
from diagnostics.analysis.paper.sentences import Facts
from diagnostics.analysis.paper.tables import paper
from diagnostics.core.formulas import released_relative_gain
from diagnostics.criteria import quadrants as quadrant_numbers
from tests.analysis.paper.made_studies import made_study, made_trainings
from tests.made_tokens import only_row

DRAWS = {"draws": 12}
ENDS = ("", "_low", "_high", "_n", "_prompts", "_seeds")


def joined_row(*, row="K = 16", quantity="Q3 gap", unit="relative gain; nats", k=16.0, **sides):
    """A row of a joined table: `released=(value, low, high, n)`, with prompts and seeds."""
    made = {"row": row, "quantity": quantity, "k": k, "budget": np.nan, "unit": unit}
    for side in ("released", "controlled", "context"):
        numbers = sides.get(side, (np.nan, np.nan, np.nan, np.nan))
        counted = (*numbers, sides.get("prompts", 40), 0)
        made |= {f"{side}{end}": value for end, value in zip(ENDS, counted, strict=True)}
    return made


UNSEEN = Facts(kind="unseen")


def said(row, artefact="Table 1", facts=UNSEEN):
    key = sentences.key_of(row)
    return sentences.why(artefact, key, {key: row}, facts)


RELEASED = (0.074, 0.044, 0.104, 472)


# Planted in a token table


def test_a_mask_that_leads_by_the_gap_alone_is_told_apart_from_the_one_that_gains_most():
    tokens = made_study()
    in_q3 = quadrant_numbers(tokens) == 3
    high = tokens.compatibility > tokens.compatibility[in_q3].median()
    kl = tokens.forward_kl.to_numpy()
    gains = {
        # Relative to D, the top of Q3 gains .1 and its bottom loses .1, and nothing else moves.
        "teachability": np.where(in_q3, np.where(high, 0.1, -0.1) * kl, 0.0),
        # Every position gains the same in nats.
        "random": np.full(len(tokens), 0.2),
    }
    cells, kept = made_trainings(tokens, gains, noise=1e-3)
    # The released gap reads H and C after training, which here are those before.
    tables = paper(tokens, cells=cells, kept=kept, **DRAWS)
    table = tables["paper_table_2"]
    gap = table[table.quantity == "gap after training"].set_index("row").released
    mean = table[table.quantity == "mean gain"].set_index("row").controlled
    assert gap["teachability"] > gap["random"]
    assert mean["random"] > mean["teachability"]
    why = only_row(table, row="teachability", quantity="gap after training").why
    less = mean["random"] - mean["teachability"]
    assert why.startswith("The statistic is the Q3 gap; the mean reduction is ")
    assert f"{less:.3g} less than random's" in why
    differences = tables["paper_differences"].set_index("artefact")
    assert (
        "at 5 %, by the estimates, the released gap puts teachability first, the mean reduction"
        f" random ({mean['random']:.3g} nats, of teachability {mean['teachability']:.3g})"
    ) in differences.why["Table 2"]


def test_positions_that_the_trained_students_entropy_puts_into_q3_are_counted():
    tokens = made_study()
    before = quadrant_numbers(tokens)
    # Seven positions of Q3 and seven of Q1 exchange their entropies after training.
    leaving = np.flatnonzero(before == 3)[:7]
    entering = np.flatnonzero(before == 1)[:7]
    after = tokens.student_entropy.to_numpy().copy()
    after[leaving], after[entering] = after[entering], after[leaving].copy()
    tokens = tokens.assign(student_entropy_after=after)
    count = int((before == 3).sum())
    table = paper(tokens, **DRAWS)["paper_table_1"]
    why = only_row(table, quantity="Q3 gap", k=16.0).why
    clause = f"7 of {count} positions of Q3 are in it only by the trained student's entropy"
    assert clause in why


def test_a_planted_block_of_equals_is_told_with_the_range_that_it_leaves_open():
    tokens = made_study()
    budget = 0.05
    count = round(budget * len(tokens))
    block = np.arange(2 * count)
    divergence = tokens.forward_kl.to_numpy().copy()
    divergence[block] = divergence.max() + 1
    gain = np.zeros(len(tokens))
    gain[block] = np.repeat([0.1, 0.3], count)
    tokens = tokens.assign(forward_kl=divergence, forward_kl_after=divergence - gain)
    table = paper(tokens, **DRAWS)["paper_figure_4a"]
    why = only_row(table, row="divergence", budget=budget).why
    relative = released_relative_gain(divergence[0], divergence[0] - np.array([0.1, 0.3]))
    assert (
        f"100 % of the released selection is a tied block, and its mean can be {relative[0]:.3g} to"
        f" {relative[1]:.3g}"
    ).lower() in why.lower()


def test_small_divergences_are_counted_with_their_part_of_the_relative_gain():
    tokens = made_study().iloc[:100].copy()
    kl = np.full(100, 0.5)
    kl[:10] = 1e-4
    # |G| is 9 at ten small positions and .1 at ninety others: 90 of 99.
    after = np.where(kl < 1e-3, 1e-3, 0.45)
    tokens = tokens.assign(forward_kl=kl, forward_kl_after=after)
    facts = sentences.facts(tokens, {})
    assert facts.small == pytest.approx(0.1)
    assert facts.small_gain == pytest.approx(90 / 99, rel=1e-6)
    assert "10 % of the bank and 90.9 % of the summed" in sentences.small_divergences(facts)


def test_ties_that_make_released_thirds_grow_are_counted():
    tokens = made_study()
    inside = quadrant_numbers(tokens) == 3
    tokens = tokens.assign(topk_overlap=np.where(np.arange(len(tokens)) % 2, 5 / 16, 0.75))
    known = sentences.facts(tokens, {})
    low, high, whole = known.thirds["overlap", 16.0]
    assert whole == inside.sum()
    # Two values: each third holds all of one of them.
    odd = (np.arange(len(tokens)) % 2 == 1)[inside].sum()
    assert (low, high) == (odd, whole - odd)
    assert f"thirds {low} and {high} of {whole}" in sentences.tied_thirds(
        ("overlap", "Q3 gap", 16.0, -1.0), known
    )


# Each clause


@pytest.mark.parametrize(
    ("controlled", "clause"),
    [
        ((-0.02, -0.05, 0.01, 480), "the sign turns, from 0.074 to -0.02"),
        ((0.2, 0.1, 0.3, 480), "the sign stays"),
    ],
)
def test_a_sentence_says_whether_the_sign_turns(controlled, clause):
    assert clause in said(joined_row(released=RELEASED, controlled=controlled)).lower()


def test_in_one_unit_the_sentence_says_how_the_size_changes():
    row = joined_row(
        released=RELEASED, controlled=(0.037, 0.01, 0.06, 480), unit="standardized", quantity="x"
    )
    assert "0.5 times as large" in said(row, "Table 9")


def test_a_sentence_compares_the_two_intervals():
    row = joined_row(released=RELEASED, controlled=(0.2, -0.1, 0.5, 480))
    assert (
        "the released interval excludes 0, and the t interval over 40 prompts, [-0.1, 0.5], holds 0"
    ) in said(row)
    row = joined_row(released=RELEASED, controlled=(0.2, 0.1, 0.5, 480))
    assert "both the released interval and the t interval over 40 prompts" in said(row)
    assert "exclude 0" in said(row)


def test_below_twenty_prompts_nothing_is_concluded():
    row = joined_row(released=RELEASED, controlled=(0.2, 0.1, 0.5, 480), prompts=19)
    assert "19 prompts are too few for a verdict, which needs 20" in said(row)
    assert "exclude" not in said(row)
    context = joined_row(
        released=RELEASED,
        controlled=(0.2, 0.1, 0.5, 480),
        context=(0.1, 0.05, 0.2, 480),
        prompts=19,
    )
    assert "of the context gain it is 0.1 [0.05, 0.2]." in said(context)


def test_an_interval_without_width_is_no_verdict():
    row = joined_row(released=RELEASED, controlled=(0.2, 0.2, 0.2, 480))
    assert "its interval is undefined" in said(row) and "exclude" not in said(row)


def test_the_context_gain_or_the_reason_for_its_absence_stands_in_every_sentence():
    row = joined_row(
        released=RELEASED, controlled=(0.2, 0.1, 0.5, 480), context=(0.1, -0.1, 0.3, 480)
    )
    assert "of the context gain it is 0.1 [-0.1, 0.3], which holds 0" in said(row)
    row = joined_row(released=RELEASED, controlled=(0.2, 0.1, 0.5, 480))
    facts = Facts(kind="unseen", lacking={"context": "there is no probe"})
    assert "no context gain: there is no probe" in said(row, facts=facts)


@pytest.mark.parametrize(
    ("kind", "clause"),
    [
        ("all", "over all contexts, since it is not known which the training saw."),
        ("seen", "over all contexts, since the training saw every one."),
    ],
)
def test_a_sentence_says_when_no_context_is_known_to_be_unseen(kind, clause):
    row = joined_row(released=RELEASED, controlled=(0.2, 0.1, 0.5, 480))
    assert said(row, facts=Facts(kind=kind)).endswith(clause)
    assert "over all contexts" not in said(row)


def test_predictors_that_an_import_has_from_after_training_are_named():
    tokens = made_study()
    tokens.attrs["warnings"] = [["read_after", "compatibility, topk_overlap", "..."]]
    known = sentences.facts(tokens, {})
    row = joined_row(released=RELEASED, controlled=(0.2, 0.1, 0.5, 480))
    assert said(row, facts=known).endswith(
        "the table has compatibility, topk_overlap from after training alone, on the controlled"
        " side too."
    )


def test_a_missing_side_is_named_with_its_reason():
    facts = Facts(lacking={"released": "it needs teacher_entropy", "checkpoint": "no student"})
    text = said(joined_row(controlled=(0.2, 0.1, 0.5, 480)), facts=facts)
    assert text.startswith("No released number: it needs teacher_entropy")
    text = said(joined_row(released=RELEASED), facts=facts)
    assert text.startswith("No controlled number: no student")


def test_quantities_without_a_sign_get_no_verdict():
    row = joined_row(
        row="tip",
        quantity="tied share",
        unit="share of positions",
        k=np.nan,
        released=(1.0, np.nan, np.nan, 126),
        controlled=(0.25, np.nan, np.nan, 127),
    )
    text = said(row, "Table 8")
    assert text == "The unclipped score leaves 25 % to ties, the clipped one 100 %."


@pytest.mark.parametrize(
    ("column", "clause"),
    [
        ("union_forward_kl", "D is that of the union, as printed, and as released that of the"),
        ("forward_kl", "D is that of the whole vocabulary on both sides, since the bank lacks"),
    ],
)
def test_a_sentence_says_which_divergence_the_two_sides_read(column, clause):
    tokens = made_study()
    known = sentences.facts(tokens if column in tokens and "union" in column else _full(tokens), {})
    row = joined_row(row="teachability", quantity="mean gain", k=np.nan, released=RELEASED)
    assert clause in said(row, "Table 8", known)
    plain = joined_row(row="divergence", quantity="mean gain", k=np.nan, released=RELEASED)
    assert "D is that" not in said(plain, "Table 8", known)


def _full(tokens):
    return tokens.drop(columns=["union_forward_kl"])


def test_numbers_and_shares_are_written_with_three_digits():
    assert [sentences.number(value) for value in (0.07443, -12.345, 2526.0, np.nan)] == [
        "0.0744",
        "-12.3",
        "2,526",
        "undefined",
    ]
    assert [sentences.percent(share) for share in (0.03, 0.12345, 1.0, 0.9999, 0.0)] == [
        "3 %",
        "12.3 %",
        "100 %",
        "more than 99.9 %",
        "0 %",
    ]


def test_a_headline_shows_the_largest_and_the_smallest_of_many_rows():
    rows = [
        joined_row(row=name, k=np.nan, released=(value, np.nan, np.nan, 1))
        for name, value in zip("abcdef", (3.0, 1.0, 6.0, 2.0, 5.0, 4.0), strict=True)
    ]
    text = sentences.headline("Q3 gap", rows, "released")
    assert text == "Q3 gap (relative gain): c 6, e 5, d 2, b 1"
    assert sentences.headline("Q3 gap", rows, "controlled") == ""


def test_masks_are_compared_only_where_both_numbers_are_known():
    rows = [
        joined_row(row=name, quantity=quantity, k=np.nan, **{side: (value, np.nan, np.nan, 1)})
        | {"budget": 0.05}
        for name, gap, mean in (("tip", 0.3, np.nan), ("entropy", 0.2, 0.1), ("random", 0.1, 0.4))
        for quantity, side, value in (
            ("gap after training", "released", gap),
            ("mean gain", "controlled", mean),
        )
    ]
    (text,) = sentences.masks_disagree(pd.DataFrame(rows))
    assert "puts entropy first, the mean reduction random (0.4 nats, of entropy 0.1)" in text
