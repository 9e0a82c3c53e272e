"""The report's figures as files and page elements: what is drawn from which table, in which
processes.

A figure is laid out once per width. From the wide one come the PNG, the page's SVG and, on request,
a PDF; from the narrow one the SVG for a phone. The page's colors in an SVG are variables, so the
same drawing serves light, dark and print. The figures are shared out among processes where that is
safe; the bytes are the same for any number of them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.processes import share_out
from diagnostics.core.progress import progress
from diagnostics.report import look, svg
from diagnostics.report.canvas import OVERVIEW, NotebookFigure
from diagnostics.report.figures.registry import FIGURES, FigureSpec, in_page_order
from diagnostics.report.look import DOUBLE, SINGLE
from diagnostics.report.palette import GREY, KNOWN
from diagnostics.report.run_results import RunResults


class Drawing(NamedTuple):
    """One figure as it goes into a page and a folder."""

    wide: str
    """SVG element for a page, `DOUBLE` inches."""
    narrow: str
    """SVG element for a phone, `SINGLE` inches."""
    png: bytes
    pdf: bytes | None


def draw_all(
    run: RunResults, *, pdf: bool = False, workers: int | None = None
) -> tuple[dict[str, Drawing], dict[str, str]]:
    """Draw every figure of the report at both widths.

    Args:
        run: The run's tables and tokens.
        pdf: Whether each figure is made as PDF too.
        workers: Number of processes; as many as this one may use where None.

    Returns:
        The figures by name, in the page's order, and for each one that could not be drawn the
        reason.
    """
    drawn, left_out, _ = draw_beside(run, {}, pdf=pdf, workers=workers)
    return drawn, left_out


def draw_beside(
    run: RunResults,
    others: Mapping[str, Callable[[], Any]],
    *,
    pdf: bool = False,
    workers: int | None = None,
) -> tuple[dict[str, Drawing], dict[str, str], dict[str, Any]]:
    """Draw every figure of the report at both widths, and make other parts of a page with the same
    processes.

    Args:
        run: As `draw_all`.
        others: What makes each of the other parts; it can be pickled.
        pdf: As `draw_all`.
        workers: As `draw_all`.

    Returns:
        As `draw_all`, and the other parts by name.
    """
    specs = in_page_order()
    names = [spec.name for spec in sorted(specs, key=lambda spec: spec.table != "tokens")]

    def work(name: str) -> Any:
        return others[name]() if name in others else _drawn(run, FIGURES[name], pdf)

    with progress(total=len(names), description="figures", unit=" figures") as bar:
        uncounted = len(others)

        def tell(count: int) -> None:
            nonlocal uncounted
            first = min(count, uncounted)
            uncounted -= first
            bar.update(count - first)

        with _seldom_collected():
            made = share_out([*others, *names], work, workers, tell=tell)
    drawn = {spec.name: made[spec.name] for spec in specs if isinstance(made[spec.name], Drawing)}
    left_out = {spec.name: made[spec.name] for spec in specs if spec.name not in drawn}
    return drawn, left_out, {name: made[name] for name in others}


def _drawn(run: RunResults, spec: FigureSpec, pdf: bool) -> Drawing | str:
    """A figure in every form; the reason where it cannot be drawn."""
    with look.untouched():
        try:
            wide, narrow = (figure_of(run, spec.name, width) for width in (DOUBLE, SINGLE))
        except DiagnosticsError as error:
            return str(error)
        return Drawing(
            svg.inline_svg(wide, f"{spec.name}-wide"),
            svg.inline_svg(narrow, f"{spec.name}-narrow"),
            svg.png(wide),
            svg.pdf(wide) if pdf else None,
        )


def figure_of(run: RunResults, name: str, width: float = DOUBLE) -> NotebookFigure:
    """One figure of the report, in our look whatever the user's settings are.

    Args:
        run: The run's tables and tokens.
        name: Name of a registered figure.
        width: Inches.

    Returns:
        The figure.

    Raises:
        DiagnosticsError: The run has no such table, or the table does not allow the figure.
    """
    spec = FIGURES[name]
    table = run.tokens if spec.table == "tokens" else run.table(spec.table)
    if reason := _not_drawn(run, spec, table):
        raise DiagnosticsError(reason)
    options: dict[str, Any] = {arg: run.table(source) for arg, source in spec.arguments.items()}
    if "level" in spec.parameters:
        options["level"] = run.level
    if "marked" in spec.parameters:
        options["marked"] = run.horizon
    if (core := getattr(spec.draw, "keywords", {}).get("criteria")) is not None:
        options["criteria"] = overview(run, table, core)
    if spec.measured and "measure" in table and (table.measure == run.measure).any():
        options["measure"] = run.measure
    token = OVERVIEW.set("criteria" in options)
    try:
        with look.untouched(), matplotlib.rc_context({"figure.dpi": svg.DPI}):
            return spec.draw(table, width=width, **options)
    finally:
        OVERVIEW.reset(token)


WINNERS = 3
"""Criteria with the highest correlation that an overview shows beyond the usual ones."""


def overview(run: RunResults, table: pd.DataFrame, core: Sequence[str]) -> list[str]:
    """Criteria of an overview: the usual ones, and those that the page's words may name.

    These are what the decision found better than random, the user's own, and the highest
    correlations with the context gain.
    """
    present = {*table.criterion, *(table.other if "other" in table else ())}
    named = [name for name in table.criterion if name not in (*KNOWN, *GREY, "placebo")]
    decision, ranked = run.table("decision"), run.table("correlations")
    if decision is not None and {"verdict", "criterion"} <= set(decision):
        named += list(decision.criterion[decision.verdict == "better"])
    if ranked is not None and {"outcome", "split", "method", "estimate"} <= set(ranked):
        rows = ranked[(ranked.outcome == "context_gain") & (ranked.method == "spearman")]
        rows = rows[rows.split == "held_out"].sort_values("estimate", ascending=False)
        named += [name for name in rows.criterion if name not in core][:WINNERS]
    return [name for name in dict.fromkeys((*core, *named)) if name in present]


def _not_drawn(run: RunResults, spec: FigureSpec, table: pd.DataFrame | None) -> str:
    """Why a figure cannot be drawn; empty where it can."""
    lacking = (
        [spec.table]
        if table is None
        else [name for name in spec.with_tables if run.table(name) is None]
    )
    if lacking:
        return f"no table {lacking[0]}"
    absent = [name for name in spec.needs if name not in table]
    return f"no column {absent[0]} in the {spec.table} table" if absent else ""


OBJECTS = 100_000
"""New objects after which garbage is looked for while figures are drawn. They are made of so many
that the usual number takes a tenth of the time."""


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """A context in which garbage is looked for every `OBJECTS` objects."""
    before = gc.get_threshold()
    gc.set_threshold(OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
