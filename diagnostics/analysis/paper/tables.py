"""The paper's tables and figures: each as released, controlled, and why the two differ.

    tables = dx.paper("RUN")
    tables["paper_table_1"], tables["paper_differences"]

A final table has one row per `row, quantity, k, budget`, with an estimate, the ends of its interval
and its n (positions, pairs, or trainings) on three sides:

    released     as the released scripts compute it: relative gain over 1e-12, H and C before or
                 after by the script's choice, percentile intervals over contexts
    controlled   the same checkpoint: the gain in nats, predictors before training, cuts in the
                 draws, t intervals over prompts, contexts that the training did not see
    context      the probe's held-out context gain in the place of the checkpoint's

`unit` is `<released>; <controlled>` where the two differ, and `why` says in one sentence what makes
the difference, or why a number is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.paper import controlled, released, training
from diagnostics.analysis.paper import sentences as words
from diagnostics.analysis.paper.cells import FOLDER, read_cells, with_student
from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.analysis.paper.sample import COLUMNS as OUTCOME_COLUMNS
from diagnostics.analysis.paper.sample import KEYS, NEEDED, Sample, long_table, reasons, samples
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import token_table
from diagnostics.core.schema import read_parquet, require_columns, validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import Tables

SIDES = ("released", "controlled", "context")
ORDER = ("controlled", "released", "context")
"""Sides in the order in which they decide the order of rows."""
SIDE_OF = {"checkpoint": "controlled", "context": "context"}
"""Side of each outcome."""
ENDS = {"": "estimate", "_low": "low", "_high": "high", "_n": "n"}
COUNTED = ("prompts", "seeds")
"""Counts that the sentences need, 0 where a side does not tell; no columns of a final table."""
COLUMNS = [*KEYS, "unit", *(f"{side}{end}" for side in SIDES for end in ENDS), "why"]
"""Columns of a final table."""
CELL = ("x_bin", "y_bin", "x_low", "x_high", "y_low", "y_high")
"""Columns of a plane besides."""
DIFFERENCES = ["artefact", "title", "released", "controlled", "why", "printed"]
"""Columns of the table of one row per artefact."""

GAIN = "relative gain; nats"
WINSORIZED = "relative gain, winsorized; nats"
UNITS = {
    "count": "count",
    "Q3 gap": GAIN,
    "matched gap": GAIN,
    "overlap": "share of positions",
    "gap after training": GAIN,
    "gap per kept share": "relative gain per share; nats per share",
    "mean gain": GAIN,
    "mean gain minus random": GAIN,
    "mean gain (seen)": GAIN,
    "gain per kept share": "relative gain per share; nats per share",
    "kept share": "share of positions",
    "share in Q3": "share of positions",
    "tied share": "share of positions",
    "expected under ties": WINSORIZED,
    "least": WINSORIZED,
    "greatest": WINSORIZED,
    "mean D^L": "normalized",
    "mean D^I": "normalized",
    "mean C": "normalized",
    "coefficient of D^L": "standardized",
    "coefficient of D^I": "standardized",
    "difference of coefficients": "standardized",
    "R2 gained": "share of variance",
}
"""Unit of each quantity."""
PLANE_UNITS = {
    "2A": "asinh of the relative gain; nats",
    "2B": "percentile, 0 to 1",
    "2C": "percentile, 0 to 1",
}
PLANE_QUANTITIES = {
    "2A": "mean gain",
    "2B": "mean percentile of D^L",
    "2C": "mean percentile of D^I",
}


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper, and the part of a joined table that it shows.

    Attributes:
        name: As the paper calls it, e.g. `Figure 3C`.
        source: The joined table.
        shows: What the quantities that it shows begin with; empty shows all.
        main: The quantity that its sentences are about.
    """

    name: str
    source: str
    shows: tuple[str, ...] = ()
    main: str = ""

    @property
    def table(self) -> str:
        """Name of its final table, e.g. `paper_figure_3c`."""
        return f"paper_{self.name.lower().replace(' ', '_')}"


ARTEFACTS = (
    Artefact("Table 1", "1", main="Q3 gap"),
    Artefact("Table 2", "2", main="gap after training"),
    Artefact("Table 5", "5", main="count"),
    Artefact("Table 6", "6", main="Q3 gap"),
    Artefact("Table 7", "7", main="gap after training"),
    Artefact("Table 8", "8", main="mean gain"),
    Artefact("Table 9", "9", main="difference of coefficients"),
    Artefact("Table 10", "10", main="gap after training"),
    *(Artefact(f"Figure {name}", name, main=main) for name, main in PLANE_QUANTITIES.items()),
    Artefact("Figure 3A", "9", ("coefficient of", "difference of"), "difference of coefficients"),
    Artefact("Figure 3B", "7", ("gap after", "matched gap", "mean gain"), "gap after training"),
    Artefact("Figure 3C", "1", ("Q3 gap", "matched gap"), "Q3 gap"),
    Artefact("Figure 4A", "8", ("mean gain",), "mean gain"),
    Artefact("Figure 4B", "8", ("gain per kept share",), "gain per kept share"),
    Artefact("Figure 4C", "6", main="Q3 gap"),
    Artefact("Figure 4D", "buckets", ("mean of",), "mean of bucket 3"),
    Artefact("Figure 5A", "1", ("Q3 gap", "matched gap"), "Q3 gap"),
    Artefact("Figure 5B", "6", main="Q3 gap"),
    Artefact("Figure 5C", "buckets", ("trimmed mean of",), "trimmed mean of bucket 3"),
)
"""Every artefact that can be made from a token bank and short trainings, tables first."""
TRAINED = ("2", "7", "10")
"""Joined tables that need trainings."""


@with_settings(bootstrap=Bootstrap)
def paper(
    tokens: pd.DataFrame | str | Path,
    *,
    cells: pd.DataFrame | None = None,
    kept: pd.DataFrame | None = None,
    ks: Iterable[int] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """Make every table and figure of the paper that a run allows, as released and controlled.

    Args:
        tokens: A token table, one row per response position, or the directory of a run. It needs a
            trained student (`score --after`, or an import of the files before and after training);
            with a probe that has folds and a null, the context gain stands beside.
        cells: What every training under a mask measures at those positions (`paper.cells`); None
            takes those of the run, and without any tables 2, 7 and 10 are left out. Where the table
            has no trained student, the first training with teachability at 5 % stands for it.
        kept: What every training kept; given together with `cells`.
        ks: Sizes of the support; None takes all that the table has.
        bootstrap: How the controlled intervals are made, and the seed of the released selections'
            ties. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Final tables by name: `paper_table_1`, `_2`, `_5` to `_10`, `paper_figure_2a` to
        `paper_figure_5c`, with the columns row, quantity, k, budget, unit, then for each of
        released, controlled and context the estimate, `_low`, `_high` and `_n`, then why; the
        planes have x_bin, y_bin, x_low, x_high, y_low, y_high besides. `paper_differences` has one
        row per artefact, those that could not be made included: artefact, title, released,
        controlled, why, printed (what the paper prints, where it is comparable).

    Raises:
        DiagnosticsError: There is no trained student and no context gain, only one of `cells` and
            `kept` is given, or a training lacks positions of the table.

    Reference:
        arXiv 2605.26844, section 3, and the scripts released with it.
    """
    if isinstance(tokens, str | Path):
        tokens, cells, kept = _of_run(Path(tokens), cells, kept)
    tokens = token_table(tokens)
    require_columns(tokens, NEEDED, what="A table of the paper")
    if (cells is None) != (kept is None):
        raise DiagnosticsError(
            "What trainings measured and what they kept belong together; got only"
            f" {'kept' if cells is None else 'cells'}. Give both, as paper.cells.read_cells does."
        )
    if cells is not None and "checkpoint" in reasons(tokens):
        tokens = with_student(tokens, cells)
    lacking = reasons(tokens)
    if len(lacking) == len(OUTCOME_COLUMNS) and (cells is None or cells.empty):
        raise DiagnosticsError(
            "The paper's tables need a trained student or a context gain, and here"
            f" {lacking['checkpoint']}; and {lacking['context']}."
        )
    study = _Study(tokens, cells, kept, None if ks is None else tuple(ks), bootstrap)
    return Tables(study.tables())


def _of_run(
    directory: Path, cells: pd.DataFrame | None, kept: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]:
    """The token table and the trainings of a run directory."""
    path = directory / "tokens.parquet"
    if not path.is_file():
        raise DiagnosticsError(
            f"{directory} holds no tokens.parquet. Give the directory of a run that was scored, or"
            " a token table."
        )
    tokens = validate_tokens(read_parquet(path))
    if cells is None and kept is None and (directory / FOLDER).is_dir():
        cells, kept = read_cells(directory / FOLDER)
    return tokens, cells, kept


# --- sides


@dataclass(frozen=True)
class _Study:
    """Everything that the final tables are joined from, made once."""

    tokens: pd.DataFrame
    cells: pd.DataFrame | None
    kept: pd.DataFrame | None
    ks: tuple[int, ...] | None
    bootstrap: Bootstrap

    @cached_property
    def samples(self) -> list[Sample]:
        """The positions of the controlled numbers."""
        return samples(self.tokens)

    @cached_property
    def trainings(self) -> training.Study | None:
        """The trainings; None without any."""
        if self.cells is None or self.kept is None or self.cells.empty:
            return None
        return training.study(self.tokens, self.cells, self.kept, self.bootstrap)

    @cached_property
    def controlled_trainings(self) -> dict[str, pd.DataFrame]:
        """The controlled tables of trainings by number."""
        return {} if self.trainings is None else dict(training.tables(self.trainings))

    @cached_property
    def released_planes(self) -> pd.DataFrame:
        """The planes as released, all figures together."""
        fewest = controlled.FEWEST_IN_CELL
        return released.planes(self.tokens, bins=self.bins, fewest=fewest)

    @property
    def bins(self) -> int:
        """Bins of each axis of a plane, as many as the fewest positions of a side allow."""
        return controlled.bins_for(min((int(s.mask.sum()) for s in self.samples), default=0))

    @cached_property
    def controlled_planes(self) -> dict[str, pd.DataFrame]:
        """The planes of each outcome, all figures together."""
        lacking = reasons(self.tokens)
        return {
            SIDE_OF[outcome]: controlled.planes(self.tokens, bins=self.bins, outcome=outcome)
            for outcome in OUTCOME_COLUMNS
            if outcome not in lacking
        }

    @cached_property
    def facts(self) -> words.Facts:
        """What the sentences need to know of the bank."""
        return words.facts(self.tokens, reasons(self.tokens))

    def tables(self) -> dict[str, pd.DataFrame]:
        """All final tables, and the differences."""
        joined = {number: self.joined(number) for number in dict.fromkeys(_sources())}
        made, rows = {}, []
        for artefact in ARTEFACTS:
            whole, known = joined[artefact.source]
            table = _shown(whole, artefact)
            if len(table):
                made[artefact.table] = _finished(table, whole, artefact, known)
            rows.append(difference(artefact, table, whole, known))
        return made | {"paper_differences": pd.DataFrame(rows, columns=DIFFERENCES)}

    def joined(self, number: str) -> tuple[pd.DataFrame, words.Facts]:
        """All sides of one table, and the facts with why a side of it is missing."""
        parts: dict[str, pd.DataFrame] = {}
        lacking: dict[str, str] = dict(self.facts.lacking)
        for side, make in {"released": _released, "controlled": _controlled}.items():
            try:
                parts |= make(self, number)
            except DiagnosticsError as error:
                # A side that the columns do not allow is left out, and the table says why.
                for name in ("released",) if side == "released" else OUTCOME_COLUMNS:
                    lacking.setdefault(name, words.reason_of(error))
        if number in TRAINED:
            lacking["context"] = (
                "a probe takes one step on all positions and trains under no mask"
                if self.trainings is not None
                else "there are no trainings"
            )
        known = replace(self.facts, lacking=lacking)
        if number in TRAINED and self.trainings is not None:
            found = self.trainings.found
            known = replace(known, kind=found.kind, small_gain=found.share_of_small)
        return (planes_joined if number in PLANE_UNITS else joined_sides)(parts), known


def _sources() -> Iterable[str]:
    return (artefact.source for artefact in ARTEFACTS)


def _released(study: _Study, number: str) -> dict[str, pd.DataFrame]:
    """The released side of a table."""
    tokens, ks = study.tokens, study.ks
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "1": lambda: released.table_1(tokens, ks=ks),
        "5": lambda: released.table_5(tokens),
        "6": lambda: released.table_6(tokens, ks=ks),
        "8": lambda: released.table_8(tokens, budgets=released.BUDGETS_2),
        "9": lambda: released.table_9(tokens, ks=ks),
        "buckets": lambda: released.buckets(tokens),
        **{name: lambda name=name: _plane(study.released_planes, name) for name in PLANE_UNITS},
    }
    if number not in TRAINED:
        return {"released": made[number]()}
    if study.trainings is None:
        return {}
    function = getattr(released, f"table_{number}")
    return {"released": function(tokens, study.cells, study.kept)}


def _controlled(study: _Study, number: str) -> dict[str, pd.DataFrame]:
    """The controlled side of a table and, where there is one, that of the context gain."""
    if number in TRAINED:
        made = study.controlled_trainings
        return {"controlled": made[number]} if number in made else {}
    if number in PLANE_UNITS:
        return {
            side: _plane(table, number)
            for side, table in study.controlled_planes.items()
            if side == "controlled" or number == "2A"
        }
    found: dict[str, pd.DataFrame] = {}
    for sample in study.samples:
        for outcome, table in _long_tables(study, sample, number).items():
            found[SIDE_OF[outcome]] = table
    return found


def _long_tables(study: _Study, sample: Sample, number: str) -> dict[str, pd.DataFrame]:
    """The long form of each outcome of a sample."""
    level = study.bootstrap.level
    if number == "5":
        return {
            outcome: controlled.table_5(study.tokens, outcome=outcome)
            for outcome in sample.outcomes
        }
    if number == "8":
        found, ties = controlled.selector_table(sample, released.BUDGETS_2, study.bootstrap)
        return {
            outcome: controlled.with_ties(found, ties, level, outcome)
            for outcome in sample.outcomes
        }
    if number == "buckets":
        estimates = controlled.bucket_estimates(sample, study.bootstrap)
    else:
        make = {
            "1": controlled.gap_estimates,
            "6": controlled.proxy_estimates,
            "9": controlled.coefficient_estimates,
        }[number]
        estimates = make(sample, study.ks, study.bootstrap)
    return {outcome: long_table(estimates, level, outcome) for outcome in sample.outcomes}


def _plane(planes: pd.DataFrame, number: str) -> pd.DataFrame:
    """One figure's plane."""
    return planes[planes["figure"] == number]


# --- joining


def joined_sides(parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Join the long forms of one table by row, quantity, K and budget.

    Args:
        parts: Long forms by side; a side may be missing.

    Returns:
        Columns of `KEYS`, then of each side its estimate, low, high, n, prompts and seeds, NaN (0)
        where a side has no such row; by quantity, K, budget and row.
    """
    sides = [_side(parts[side], side) for side in ORDER if side in parts and len(parts[side])]
    if not sides:
        return pd.DataFrame(columns=[*KEYS, *_side_columns()])
    table = sides[0]
    for other in sides[1:]:
        table = table.merge(other, on=[*KEYS], how="outer", sort=False)
    ordered = pd.concat([side[[*KEYS]] for side in sides])
    places = {name: {v: i for i, v in enumerate(dict.fromkeys(ordered[name]))} for name in KEYS[:2]}
    table = table.assign(
        _quantity=table["quantity"].map(places["quantity"]), _row=table["row"].map(places["row"])
    )
    table = table.sort_values(["_quantity", "k", "budget", "_row"], kind="stable")
    return _whole(table.reset_index(drop=True))


def _side_columns() -> list[str]:
    return [f"{side}{end}" for side in SIDES for end in (*ENDS, *(f"_{n}" for n in COUNTED))]


def _side(long: pd.DataFrame, side: str) -> pd.DataFrame:
    """A long form with the columns of one side."""
    keys = {name: long[name].astype(float).round(6) for name in ("k", "budget")}
    named = {f"{side}{end}": long[name].astype(float) for end, name in ENDS.items()}
    named |= {f"{side}_{name}": long.get(name, 0) for name in COUNTED}
    return pd.DataFrame({"row": long["row"], "quantity": long["quantity"], **keys, **named})


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """A joined table with every side's columns, undefined where a side is missing."""
    table = table.reindex(columns=[*table.columns, *(c for c in _side_columns() if c not in table)])
    counts = [f"{side}_{name}" for side in SIDES for name in COUNTED]
    return table.assign(**{name: table[name].fillna(0).astype(int) for name in counts})


def planes_joined(parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Join the planes of one figure by their cells.

    Args:
        parts: Planes by side, each with the columns of `CELL`, figure, positions and estimate.

    Returns:
        As `joined_sides`, with the columns of `CELL`; a row per cell, named by its bins.
    """
    sides = [
        plane[[*CELL, "positions", "estimate"]].rename(
            columns={"positions": f"{side}_n", "estimate": side}
        )
        for side in SIDES
        if (plane := parts.get(side)) is not None and len(plane)
    ]
    if not sides:
        return pd.DataFrame(columns=[*KEYS, *CELL, *_side_columns()])
    number = str(next(plane for plane in parts.values() if len(plane))["figure"].iloc[0])
    # Edges are bins over their number, and are rounded so that both sides' are the same floats.
    edges = [name for name in CELL if name.endswith(("low", "high"))]
    sides = [plane.assign(**{name: plane[name].round(9) for name in edges}) for plane in sides]
    table = sides[0]
    for other in sides[1:]:
        table = table.merge(other, on=[*CELL], how="outer", sort=False)
    table = table.sort_values(["x_bin", "y_bin"], kind="stable").reset_index(drop=True)
    names = [f"cell {x}, {y}" for x, y in zip(table["x_bin"], table["y_bin"], strict=True)]
    quantity = PLANE_QUANTITIES[number]
    return _whole(table.assign(row=names, quantity=quantity, k=np.nan, budget=np.nan))


# --- final tables


def _shown(table: pd.DataFrame, artefact: Artefact) -> pd.DataFrame:
    """The rows of a joined table that an artefact shows, with their units."""
    if artefact.shows:
        table = table[table["quantity"].str.startswith(artefact.shows)]
    table = table.reset_index(drop=True)
    return table.assign(unit=[unit_of(artefact, name) for name in table["quantity"]])


def unit_of(artefact: Artefact, quantity: str) -> str:
    """`<released>; <controlled>` unit of a quantity, or one unit where both have it."""
    if artefact.source in PLANE_UNITS:
        return PLANE_UNITS[artefact.source]
    if artefact.source == "8" and quantity == "mean gain":
        return WINSORIZED
    return GAIN if artefact.source == "buckets" else UNITS[quantity]


def _finished(
    table: pd.DataFrame, whole: pd.DataFrame, artefact: Artefact, known: words.Facts
) -> pd.DataFrame:
    """A final table: with the reason of every row, in the order of the columns."""
    # A figure's sentences need rows of its table that it does not show, such as ties.
    numbers = words.numbers_of(whole) | words.numbers_of(table)
    keys = [words.key_of(row) for row in table.to_dict("records")]
    whys = [words.why(artefact.name, key, numbers, known) for key in keys]
    columns = [*COLUMNS[:-1], *(CELL if artefact.source in PLANE_UNITS else ()), "why"]
    return _one_per_row(table.assign(why=whys), artefact)[columns]


def _one_per_row(table: pd.DataFrame, artefact: Artefact) -> pd.DataFrame:
    """A table of figure 3B names the budget with the mask where masks were trained at several."""
    if artefact.name != "Figure 3B" or table["budget"].nunique() < 2:
        return table
    named = zip(table["row"], table["budget"], strict=True)
    return table.assign(row=[f"{row} at {words.percent(budget)}" for row, budget in named])


def difference(
    artefact: Artefact, table: pd.DataFrame, whole: pd.DataFrame, known: words.Facts
) -> dict[str, str]:
    """The row of `paper_differences` of one artefact, from its rows of a joined table."""
    paper = PRINTED[artefact.name]
    row = {"artefact": artefact.name, "title": paper.title, "printed": paper.text}
    if not len(table):
        why = words.not_made(known, needs_training=artefact.source in TRAINED)
        return row | {"released": "", "controlled": "", "why": why}
    found = words.of_artefact(artefact.name, artefact.main, table, whole, known)
    return row | found | {"why": f"{found['why']} {paper.note}".strip()}
