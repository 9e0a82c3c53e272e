"""The final tables of the paper: joined by their keys, complete, and with a reason for each gap."""

import numpy as np
import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.analysis.paper import controlled, released, tables
from diagnostics.analysis.paper.cells import KEPT
from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.analysis.paper.tables import ARTEFACTS, COLUMNS, DIFFERENCES, joined_sides, paper
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_parquet
from tests.analysis.paper.made_studies import made_study, made_trainings
from tests.made_tokens import only_row

DRAWS = {"draws": 12}
TRAINED = {"paper_table_2", "paper_table_7", "paper_table_10", "paper_figure_3b"}
ALL = {artefact.table for artefact in ARTEFACTS} | {"paper_differences"}


@pytest.fixture(scope="module")
def tokens():
    return made_study(seen=0.5)


@pytest.fixture(scope="module")
def grid(tokens):
    rng = np.random.default_rng(5)
    names = ("random", "teachability", "q3_teachability")
    gains = {name: 0.1 + 0.1 * rng.normal(size=len(tokens)) for name in names}
    return made_trainings(tokens, gains, budgets=(0.03, 0.05), noise=0.02, halves=True)


@pytest.fixture(scope="module")
def made(tokens, grid):
    return paper(tokens, cells=grid[0], kept=grid[1], **DRAWS)


@pytest.fixture(scope="module")
def without_trainings(tokens):
    return paper(tokens, **DRAWS)


def long(*rows):
    return pd.DataFrame(rows, columns=controlled.LONG)


# What is made


def test_every_artefact_of_the_paper_is_made_with_the_columns_of_a_final_table(made):
    assert set(made) == ALL
    for name, table in made.items():
        if name == "paper_differences":
            assert list(table) == DIFFERENCES
            continue
        assert [column for column in table if column in COLUMNS] == COLUMNS, name
        assert len(table) and not table.duplicated(["row", "quantity", "k", "budget"]).any(), name
        assert table.why.str.endswith(".").all() and table.unit.str.len().all(), name
        for side in ("released", "controlled"):
            assert np.isfinite(table[side]).any(), (name, side)


def test_both_sides_are_those_of_their_modules(made, tokens, grid):
    table = made["paper_table_1"]
    for side, long_form in (
        ("released", released.table_1(tokens)),
        ("controlled", controlled.table_1(tokens, **DRAWS)),
        ("context", controlled.table_1(tokens, outcome="context", **DRAWS)),
    ):
        for row in long_form.itertuples():
            own = only_row(table, row=row.row, quantity=row.quantity)
            numbers = [own[f"{side}{end}"] for end in ("", "_low", "_high", "_n")]
            expected = [row.estimate, row.low, row.high, row.n]
            assert numbers == pytest.approx(expected, nan_ok=True)
    trained = released.table_2(tokens, *grid)
    for row in trained.itertuples():
        own = only_row(made["paper_table_2"], row=row.row, quantity=row.quantity, budget=row.budget)
        assert own.released == pytest.approx(row.estimate, nan_ok=True)


def test_figures_are_parts_of_the_tables_that_they_show(made):
    gaps = made["paper_table_1"]
    shown = made["paper_figure_3c"]
    assert set(shown.quantity) == {"Q3 gap", "matched gap"}
    pd.testing.assert_frame_equal(
        shown.drop(columns="why"),
        gaps[gaps.quantity != "overlap"].drop(columns="why").reset_index(drop=True),
    )
    assert set(made["paper_figure_3b"].row) == {"q3_teachability at 3 %", "q3_teachability at 5 %"}
    assert set(made["paper_figure_4a"].quantity) == {"mean gain"}
    assert set(made["paper_figure_4b"].quantity) == {"gain per kept share"}


def test_planes_hold_the_cells_of_both_sides_with_their_edges():
    made = paper(made_study(24, 60), ks=[16], **DRAWS)
    plane = made["paper_figure_2a"]
    assert {"x_bin", "y_bin", "x_low", "x_high", "y_low", "y_high"} <= set(plane)
    assert not plane.duplicated(["x_bin", "y_bin"]).any()
    few = plane[np.isfinite(plane.controlled_n) & plane.controlled.isna()]
    assert len(few) and (few.controlled_n < controlled.FEWEST_IN_CELL).all()
    assert few.why.str.contains("and a cell needs 10").all()
    differences = made["paper_differences"].set_index("artefact")
    left_out = differences.controlled["Figure 2A"]
    assert f"{len(few)} cells with fewer than 10 positions are left out" in left_out
    assert f"{len(plane) - len(few)} cells with " in left_out
    assert made["paper_figure_2b"].context.isna().all()
    assert made["paper_figure_2b"].why.str.contains("holds no gain").any()


def test_a_plane_has_as_many_bins_as_its_positions_allow():
    assert [controlled.bins_for(n) for n in (0, 80, 500, 2_000, 57_600)] == [2, 2, 5, 10, 10]


def test_units_are_told_apart_where_the_two_sides_differ(made):
    units = made["paper_table_1"].set_index("quantity").unit
    assert set(units["Q3 gap"]) == {"relative gain; nats"}
    assert set(units["overlap"]) == {"share of positions"}
    assert set(made["paper_table_8"].set_index("quantity").unit["mean gain"]) == {
        "relative gain, winsorized; nats"
    }
    assert set(made["paper_table_9"].unit) == {"standardized", "share of variance"}


def test_differences_name_every_artefact_with_its_printed_value_where_it_is_comparable(made):
    table = made["paper_differences"].set_index("artefact")
    assert (
        list(table.index)
        == [artefact.name for artefact in ARTEFACTS]
        == list(dict.fromkeys(table.index))
    )
    assert set(table.index) == set(PRINTED)
    assert ".084 [.069, .098]" in table.printed["Table 1"]
    assert table.printed["Figure 2A"] == "" and "No code" in table.why["Figure 2A"]
    for column in ("title", "released", "controlled", "why"):
        assert table[column].str.len().all(), column
    assert "mean gain minus random (nats)" in table.controlled["Table 2"]


# What is missing, and why


def test_without_trainings_their_tables_are_absent_and_the_command_is_named(without_trainings):
    assert set(without_trainings) == ALL - TRAINED
    why = without_trainings["paper_differences"].set_index("artefact").why
    for name in ("Table 2", "Table 7", "Table 10", "Figure 3B"):
        assert why[name] == (
            "Not made: it needs trainings under masks, which `opd-diagnostics paper --output-dir"
            " RUN --train` makes."
        )


def test_empty_trainings_are_none(tokens, without_trainings):
    keys = ["criterion", "budget", "seed"]
    empty = (
        pd.DataFrame(columns=[*keys, "context_id", "position"]),
        pd.DataFrame(columns=[*keys, *KEPT]),
    )
    found = paper(tokens, cells=empty[0], kept=empty[1], **DRAWS)
    assert set(found) == set(without_trainings)


def test_without_a_probe_the_context_gain_is_missing_with_its_reason():
    tokens = made_study(folds=0, split=False, permuted=False)
    table = paper(tokens, **DRAWS)["paper_table_1"]
    assert table.context.isna().all()
    assert np.isfinite(table.controlled[table.quantity == "Q3 gap"]).all()
    assert table.why.str.contains("no context gain: there is no probe with a permuted").all()
    assert table.why.str.contains("it is not known which the training saw").all()


def test_without_a_checkpoint_the_context_gain_stands_alone(tokens):
    lacking = [name for name in tokens if name.endswith("_after")]
    found = paper(tokens.drop(columns=[*lacking, "seen", "relative_gain_released"]), **DRAWS)
    table = found["paper_table_1"]
    assert table.released.isna().all() and table.controlled.isna().all()
    assert np.isfinite(table.context).any()
    assert table.why.str.contains("no controlled number: there is no trained student").all()


def test_without_any_outcome_the_table_is_refused_with_both_remedies(tokens):
    lacking = [name for name in tokens if name.endswith("_after")]
    bare = tokens.drop(columns=[*lacking, "context_gain"])
    with pytest.raises(DiagnosticsError, match=r"score --after CHECKPOINT.*run `opd-diagnostics"):
        paper(bare, **DRAWS)


def test_a_released_column_that_is_missing_leaves_the_controlled_side(tokens):
    found = paper(tokens.drop(columns=["student_entropy_after"]).assign(fold=0), **DRAWS)
    table = found["paper_table_1"]
    assert table.released.isna().all()
    gap = table[table.quantity == "Q3 gap"]
    assert gap.why.str.startswith(
        "No released number: a statistic of the released scripts needs student_entropy_after; "
    ).all()


def test_only_one_of_cells_and_kept_is_refused(tokens, grid):
    with pytest.raises(DiagnosticsError, match="got only cells"):
        paper(tokens, cells=grid[0], **DRAWS)


def test_the_own_k_of_a_table_names_its_rows():
    tokens = made_study()
    names = {name: name.replace("_k8", "_k16") for name in tokens if "_k8" in name}
    tokens = tokens.rename(columns=names)
    tokens["topk_overlap"] = np.round(tokens.compatibility * 8) / 8
    found = paper(tokens, **DRAWS)
    assert set(found["paper_table_1"].row) == {"K = 8", "K = 16"}
    eight = only_row(found["paper_table_1"], row="K = 8", quantity="Q3 gap")
    inside = controlled.table_1(tokens, ks=[8], **DRAWS)
    assert eight.controlled == only_row(inside, quantity="Q3 gap").estimate
    assert set(paper(tokens, ks=[16], **DRAWS)["paper_table_9"].row) == {"K = 16"}


def test_a_k_that_the_table_lacks_is_refused_by_both_sides_and_told(tokens):
    found = paper(tokens, ks=[64], **DRAWS)
    assert "paper_table_1" not in found
    why = found["paper_differences"].set_index("artefact").why["Table 1"]
    assert why.startswith("Not made: ") and "64" in why


# Runs


def write_run(folder, tokens):
    folder.mkdir()
    write_parquet(folder / "tokens.parquet", tokens)
    return folder


def test_a_run_directory_is_read_as_its_tables_are(tokens, tmp_path, without_trainings):
    run = write_run(tmp_path / "run", tokens)
    found = dx.paper(run, **DRAWS)
    assert set(found) == set(without_trainings)
    pd.testing.assert_frame_equal(found["paper_table_1"], without_trainings["paper_table_1"])
    with pytest.raises(DiagnosticsError, match=r"holds no tokens\.parquet"):
        dx.paper(tmp_path / "nowhere")


def test_the_first_training_with_teachability_stands_for_a_checkpoint(tokens, grid):
    lacking = [name for name in tokens if name.endswith("_after")]
    bare = tokens.drop(columns=[*lacking, "seen"])
    joined = tables.with_student(bare, grid[0])
    cells = grid[0]
    chosen = (cells.criterion == "teachability") & (cells.budget == 0.05) & (cells.seed == 0)
    assert (joined.forward_kl_after.to_numpy() == cells.forward_kl_after[chosen].to_numpy()).all()
    assert (joined.seen.to_numpy() == cells.seen[chosen].to_numpy()).all()
    pd.testing.assert_frame_equal(joined[bare.columns], bare)
    others = cells[cells.criterion != "teachability"]
    assert "forward_kl_after" not in tables.with_student(bare, others)
    found = paper(bare, cells=cells, kept=grid[1], **DRAWS)
    assert np.isfinite(found["paper_table_1"].controlled).any()


# Joining


def test_sides_are_joined_by_row_quantity_k_and_budget():
    one = long(
        ("tip", "mean gain", np.nan, 0.1 + 0.2, 1.0, 0.5, 1.5, 10),
        ("entropy", "mean gain", np.nan, 0.3, 2.0, np.nan, np.nan, 10),
    )
    other = long(
        ("random", "mean gain", np.nan, 0.3, 5.0, 4.0, 6.0, 7),
        ("tip", "mean gain", np.nan, 0.3, 3.0, 2.0, 4.0, 7),
    ).assign(prompts=21)
    table = joined_sides({"released": one, "controlled": other})
    assert list(table.row) == ["random", "tip", "entropy"]
    tip = only_row(table, row="tip")
    assert (tip.released, tip.controlled, tip.controlled_n) == (1.0, 3.0, 7)
    assert (tip.controlled_prompts, tip.released_prompts) == (21, 0)
    assert np.isnan(only_row(table, row="random").released)
    assert np.isnan(only_row(table, row="entropy").controlled)
    assert table.context.isna().all()


def test_sides_without_a_row_are_no_table():
    assert joined_sides({}).empty and joined_sides({"released": long()}).empty
