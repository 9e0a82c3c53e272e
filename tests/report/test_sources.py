"""Where gains come from, in sentences; and what cannot be read is neither drawn nor told."""

import numpy as np
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import figures, sources, summary
from diagnostics.report.run_tables import RunTables
from tests import study_tables


def wide(table, name, factor):
    """The table with intervals of a column that are wider by a factor."""
    middle = table[name]
    ends = {
        f"{name}_{end}": middle + factor * (table[f"{name}_{end}"] - middle)
        for end in ("low", "high")
    }
    return table.assign(**ends)


def with_all(table):
    return table.replace({"group": {table.group.iloc[0]: "all"}})


def test_shares_of_the_full_kernel_are_told_first():
    table = with_all(study_tables.kernel_shares())
    assert sources.shares_said(table) == (
        "Of a position's first-order gain, 22 % (17 % to 28 %) from its own loss, 32 % (27 % to"
        " 38 %) from the rest of its response, 7 % (2 % to 13 %) from its prompt's other responses,"
        " 47 % (42 % to 53 %) from other prompts."
    )
    full = table.kernel == "full"
    mixed = table.assign(
        share_low=table.share_low.where(~full, -9.0), share_high=table.share_high.where(~full, 9.0)
    )
    assert sources.readable_kernel(mixed) == "output_layer"
    assert sources.shares_said(mixed).startswith(
        "Of a position's first-order gain through the output layer alone, 20 % (15 % to 26 %) from"
    )
    assert "Kernel: output layer." in figures.kernel_shares(mixed).caption


def test_shares_that_cannot_be_read_are_a_sentence_and_no_figure():
    table = wide(with_all(study_tables.kernel_shares()), "share", 60)
    assert sources.shares_said(table) == (
        "Whose loss moved a position cannot be told: the interval of its own loss's share reaches"
        " from −280 % to 380 % (16 prompts)."
    )
    with pytest.raises(DiagnosticsError, match=r"^Shares whose intervals are wider than the whole"):
        figures.kernel_shares(table)
    figures.kernel_shares(table, kernel="full")  # asked for


def test_lifts_name_the_group_that_is_surely_above_the_average():
    table = study_tables.lift()
    groups = table[table.group != "all"]
    best = groups[groups.enrichment_low > 1].iloc[-1]
    said = sources.lift_said(table)
    assert said.startswith("Losses at ") and said.endswith(" position's (16 prompts).")
    assert f"do {best.enrichment:.2g} ({best.enrichment_low:.2g} to" in said
    level = table.assign(enrichment_low=0.9)
    assert sources.lift_said(level) == (
        "No group's losses are told apart from an average position's (16 prompts)."
    )


@pytest.mark.parametrize("factor, why", [(400, "intervals reach"), (np.nan, "what the step does")])
def test_lifts_that_cannot_be_read_are_a_sentence_and_no_figure(factor, why):
    table = wide(study_tables.lift(), "enrichment", factor)
    said = sources.lift_said(table)
    assert said.startswith(f"Whose losses help held-out prompts cannot be told: {why}")
    with pytest.raises(DiagnosticsError, match=r"^Lifts whose intervals are wider than an average"):
        figures.lift(table)
    found = summary.answer(RunTables({}, {"lift": table}))
    assert found["Where does a gain come from?"] == said


def test_groups_are_named_in_words():
    assert sources._group("q3") == "positions of Q3"
    assert sources._group("compatibility_3") == "the highest third of compatibility"
