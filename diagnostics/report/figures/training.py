"""What training logged, and what a grid of short trainings gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import (
    interval_of,
    reduction_curves,
    shown_criteria,
    thin_color_bar,
)
from diagnostics.report.figures.options import Intervals, Page, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, DASHES

TRAINED = (
    "forward_kl",
    "reverse_kl",
    "bank_forward_kl",
    "bank_reverse_kl",
    "accuracy",
    "accuracy_greedy",
)
SHARED = {
    "bank_forward_kl": "forward KL, shared text",
    "bank_reverse_kl": "reverse KL, shared text",
}
"""Measures on the untouched student's responses, which every trained student is scored on."""
MEASURE_UNITS = {
    "accuracy": "share",
    "accuracy_greedy": "share",
    "finished": "share",
    "response_length": "tokens",
}


def _measured(name: str) -> str:
    """A measure of an evaluation with its unit."""
    return f"{SHARED.get(name, naming.readable(name))} ({MEASURE_UNITS.get(name, 'nats')})"


MANY_CELLS = 6
"""Cells of a grid up to which all of their training curves are drawn."""


@figure(
    table="training_metrics",
    title="What training logged",
    reading=(
        "Loss on the selected positions, divergence on all of them, and the share that was"
        " selected, on the training batches."
    ),
)
@on_page
def training_curves(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = ("loss", "forward_kl/all", "selected_share"),
    budget: float | None = None,
    window: int | None = None,
    **page: Unpack[Page],
) -> Figure:
    """Measures that training logged, step by step.

    Example: `dx.plot.training_curves(result.metrics)`. There is one line per (criterion, budget):
    the mean over its seeds. Its band reaches from the lowest to the highest seed.

    Args:
        table: One row per step, with the columns step and those of `measures`; where it holds
            several trainings also criterion, budget and seed.
        measures: Columns to show, one panel for each.
        budget: The budget to show beside full. Where None, all of them, or the nearest to 5 % where
            there would be more than six lines.
        window: Number of steps of the running means; a twentieth of the steps where None.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    names = [name for name in measures if name in table] or list(measures)
    table = style.keep(table, "figures.training_curves", ("step", *names))
    table, share = _some_cells(table, budget)
    window = window or max(1, table.step.nunique() // 20)
    rows, columns = style.panels(len(names), page["width"])
    figure, axes = style.canvas(page["width"], 0.9 + 1.7 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        _seed_bands(ax, table, name, window)
        ax.set_ylabel(_logged(name))
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    seeds = (
        f"Bands: lowest to highest of {table.seed.nunique()} seeds."
        if "seed" in table and table.seed.nunique() > 1
        else ""
    )
    smooth = f"Running means of {window} steps." if window > 1 else ""
    budgets = f"Budget {share:.0%} and full." if share else ""
    style.caption(figure, "Training batches, not held-out prompts.", budgets, smooth, seeds)
    return figure


def _some_cells(table: pd.DataFrame, budget: float | None) -> tuple[pd.DataFrame, float | None]:
    """Every cell, or those of one budget and full, and that budget."""
    if "budget" not in table or (
        budget is None and len(table[["criterion", "budget"]].drop_duplicates()) <= MANY_CELLS
    ):
        return table, None
    selected = table[table.criterion != "full"]
    share = style.nearest_budget(selected) if budget is None else budget
    return (
        style.keep(
            table[(table.criterion == "full") | np.isclose(table.budget, share)],
            "figures.training_curves",
            ("step",),
        ),
        share,
    )


def _seed_bands(ax, table: pd.DataFrame, name: str, window: int) -> None:
    """Draw one line per cell, with a band over the range of its seeds."""
    keys = [key for key in ("criterion", "budget") if key in table]
    criteria = table.criterion.unique() if "criterion" in table else []
    for number, (key, cell) in enumerate(
        table.groupby(keys, sort=False) if keys else [((), table)]
    ):
        seeds = (
            cell.pivot_table(index="step", columns="seed", values=name)
            if "seed" in cell
            else cell.set_index("step")[[name]]
        )
        seeds = seeds.rolling(window, min_periods=1, center=True).mean()
        line = style.criterion_style(key[0], criteria) if key else {"color": style.tone(BLUE)}
        if key and (table[table.criterion == key[0]].budget.nunique() > 1):
            line |= {"linestyle": DASHES[number % len(DASHES)]}
        label = (
            naming.readable(key[0]) + (f" {key[1]:.0%}" if len(key) > 1 and key[1] < 1 else "")
            if key
            else "training"
        )
        ax.fill_between(
            seeds.index,
            seeds.min(axis=1),
            seeds.max(axis=1),
            color=line["color"],
            alpha=0.16,
            linewidth=0,
        )
        ax.plot(
            seeds.index,
            seeds.mean(axis=1),
            label=label,
            **line | {"marker": "None", "linewidth": 1.1},
        )


def _logged(name: str) -> str:
    """A logged measure with its unit."""
    units = {"loss": "loss of the selected (nats)", "selected_share": "selected share"}
    what, _, where = name.partition("/")
    return units.get(
        name,
        (
            f"{naming.readable(what)}, {where} (nats)"
            if where and "kl" in what
            else naming.readable(name.replace("/", ", "))
        ),
    )


ALONG = ("reverse_kl", "student_entropy", "topk_overlap", "selected_share")
ALONG_WORDS = {
    "topk_overlap": "top-K overlap (share)",
    "selected_share": "selected share",
    "compatibility": "compatibility (probability)",
}
MOST_COLUMNS = 60
"""Columns of a heat map; more steps are averaged, several to a column."""


@figure(
    table="training_positions",
    title="Where in the responses training worked",
    reading=(
        "Across the optimizer steps, upwards the place in the response, from its first token to its"
        " last. A color that fades from left to right at a place says that the student learned"
        " there; the last panel says where the loss was."
    ),
)
@on_page
def training_positions(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = ALONG,
    **page: Unpack[Page],
) -> Figure:
    """Heat maps of a training: place in the response by optimizer step.

    Example: `dx.plot.training_positions(dx.read_run("run").tables["training_positions"])`. Every
    cell is a mean over the step's batch, or over several steps where there are more than 60. Each
    panel has a scale of its own.

    Args:
        table: One row per (step, tenth), with the columns positions and those of `measures`; tenth
            0 is the beginning of a response.
        measures: Columns to show, one panel for each; where the table lacks some, the others.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    names = [name for name in measures if name in table] or list(measures)
    table = style.keep(table, "figures.training_positions", ("step", "tenth", "positions", *names))
    several = -(-table.step.nunique() // MOST_COLUMNS)
    rows, columns = style.panels(len(names), page["width"], 2 if page["width"] > 5 else 1)
    figure, axes = style.canvas(page["width"], 0.6 + 1.7 * rows, rows, columns)
    style.spread(figure, 0.2)
    for ax, name in zip(axes.flat, names, strict=False):
        _along(figure, ax, table, name, several)
        ax.set_title(ALONG_WORDS.get(name, f"{naming.readable(name)} (nats)"))
    for ax in axes[:, 0]:
        ax.set_ylabel("place in the response")
    for ax in list(axes.flat)[: len(names)][-columns:]:
        ax.set_xlabel("optimizer step")
    style.hide_rest(axes, len(names))
    style.caption(
        figure,
        f"{int(table.positions.sum()):,} positions of {table.step.nunique():,} training batches.",
        f"Means of {several} steps." if several > 1 else "",
        "Every panel has its own scale.",
    )
    return figure


def _along(figure: Figure, ax, table: pd.DataFrame, name: str, several: int) -> None:
    """One measure as a grid of columns of steps and rows of tenths; empty where nothing is known.

    The mean of several steps counts every position once.
    """
    known = table[np.isfinite(table[name].astype(float))]
    column = (known.step - table.step.min()) // several
    weighted = known.assign(column=column, value=known[name] * known.positions)
    sums = weighted.groupby(["tenth", "column"])[["value", "positions"]].sum()
    grid = (sums["value"] / sums["positions"]).unstack("column")
    last = int((table.step.max() - table.step.min()) // several)
    grid = grid.reindex(index=range(10), columns=range(last + 1))
    edges = table.step.min() - 0.5 + several * np.arange(last + 2)
    values = np.ma.masked_invalid(grid.to_numpy(float))
    mesh = ax.pcolormesh(
        edges, np.linspace(0, 1, 11), values, cmap=style.sequential(), rasterized=True
    )
    ax.grid(visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_yticks([0, 0.5, 1], ["first", "middle", "last"])
    thin_color_bar(figure, ax, mesh)


@figure(
    table="evaluations",
    title="Held-out prompts during training",
    reading=(
        "The dashed line is the untouched student. Divergences should fall below it, accuracies"
        " rise above."
    ),
)
@on_page
def evaluations(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = TRAINED,
    **page: Unpack[Intervals],
) -> Figure:
    """The student on held-out prompts before, during and after training.

    Example: `dx.plot.evaluations(result.evaluations)`. The dashed line is the untouched student.

    Args:
        table: One row per (step, measure), with the columns mean, low, high and, for the caption,
            prompts.
        measures: Measures to show, one panel for each.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    table = style.keep(
        table,
        "figures.evaluations",
        ("step", "measure", "mean", "low", "high"),
        {"measure": measures},
    )
    names = style.present(table.measure, measures)
    rows, columns = style.panels(len(names), page["width"])
    figure, axes = style.canvas(page["width"], 0.6 + 1.6 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        part = table[table.measure == name].sort_values("step")
        style.upright(
            ax,
            part.step,
            part,
            "mean",
            marker="o",
            linestyle="-",
            color=style.tone(BLUE),
            label=name,
        )
        ax.axhline(part["mean"].iloc[0], color=style.quiet(), linestyle=DASHES[1], linewidth=0.9)
        ax.set_ylabel(_measured(name))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    prompts = f"{int(table.prompts.max()):,} held-out prompts." if "prompts" in table else ""
    style.caption(figure, prompts, style.bars(page["level"]))
    return figure


@figure(
    table="validation_outcomes",
    title="What training gained",
    reading=(
        "Gain over the untouched student on held-out prompts, by budget. Full OPD is the level"
        " line. Shared text is what the untouched student wrote, on which students compare more"
        " sharply than on what each writes now. Bars cross seeds with prompts; where they overlap,"
        " read the paired differences in the table instead."
    ),
)
@on_page
def validation(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = TRAINED,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Gain of trainings over the untouched student on held-out prompts, by budget.

    Example: `dx.plot.validation(tables["validation_outcomes"])`. The level line is full
    distillation. Bars are intervals over seeds and prompts.

    Args:
        table: One row per (criterion, budget, measure), with the columns gain, gain_low, gain_high,
            seeds and prompts.
        measures: Measures to show, one panel for each.
        criteria: Names of the criteria to show; where None all of them, or the usual six where
            there are more than six.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    table = interval_of(
        style.keep(table, "figures.validation", needs, {"measure": measures}), "gain"
    )
    table = table.rename(columns={"gain": "reduction"})
    names, shown = (
        shown_criteria(table[table.criterion != "untouched"], criteria),
        style.present(table.measure, measures),
    )
    down, across = style.panels(len(shown), page["width"], 2 if page["width"] > 5 else 1)
    figure, axes = style.canvas(page["width"], 0.8 + 2.0 * down, down, across)
    for ax, name in zip(axes.flat, shown, strict=False):
        reduction_curves(ax, table[table.measure == name].sort_values("budget"), names, bars=True)
        ax.set_ylabel(f"gain in {_measured(name)}")
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("budget (share of positions)")
    style.hide_rest(axes, len(shown))
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    style.caption(
        figure, _trained_counts(table), style.bars(page["level"], over="seeds and prompts")
    )
    return figure


FORESEEN = ("captured_gain", "captured_relative_gain", "intervention_forward_kl", "one_step_gain")
"""Offline answers of the usual scatter: the share of each gain that a criterion captures, the drop
after one step on its selection, and the gain of a training's own first step.
"""
ANSWERS = {
    "captured_gain": "captured gain",
    "captured_relative_gain": "captured relative gain",
    "intervention_forward_kl": "drop after one step on the selection (nats)",
    "one_step_gain": "gain of the training’s own first step (nats)",
}


@figure(
    table="validation_outcomes",
    title="Did the offline answers foresee training?",
    reading=(
        "Each mark is one criterion at one budget: across what was foreseen of it, upwards what"
        " training gained. Marks that rise to the right were foreseen; the table"
        " validation_agreement has the rank agreement with its interval."
    ),
    arguments={"foreseen": "validation_foreseen"},
    with_tables=("validation_foreseen",),
)
@on_page
def validation_scatter(
    table: pd.DataFrame,
    foreseen: pd.DataFrame,
    *,
    answers: Sequence[str] = FORESEEN,
    measure: str = "forward_kl",
    **page: Unpack[Intervals],
) -> Figure:
    """Gain that an offline answer predicted against the gain that training brought.

    Example: `dx.plot.validation_scatter(tables["validation_outcomes"],
    tables["validation_foreseen"])`. A mark is one criterion at one budget; its color and shape name
    the criterion, and its size grows with the budget. Marks that rise to the right were predicted.

    Args:
        table: One row per (criterion, budget, measure), as `validation` takes it.
        foreseen: One row per (criterion, budget, answer), with the predicted value in the column
            value.
        answers: Offline answers to show, one panel for each.
        measure: The measure of the trained gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    both = _foreseen_and_trained(table, foreseen, answers, measure)
    shown, names = style.present(both.answer, answers), style.present(both.criterion, ())
    down, across = style.panels(len(shown), page["width"], 2)
    figure, axes = style.canvas(
        page["width"], 0.9 + (1.9 if page["width"] > 5 else 1.5) * down, down, across, sharey=True
    )
    style.spread(figure, 0.13)
    for ax, answer in zip(axes.flat, shown, strict=False):
        _cells(ax, both[both.answer == answer], names)
        ax.set_xlabel(ANSWERS.get(answer, naming.readable(answer)))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"trained gain ({MEASURE_UNITS.get(measure, 'nats')})")
    style.hide_rest(axes, len(shown))
    style.legend(figure, axes[0, 0], 5 if page["width"] > 5 else 3)
    cells = len(both[["criterion", "budget"]].drop_duplicates())
    style.caption(
        figure,
        f"Trained gain in {naming.readable(measure)}.",
        f"{cells} cells; a larger mark is a larger budget.",
        _trained_counts(table),
        style.bars(page["level"], over="seeds and prompts"),
    )
    return figure


def _foreseen_and_trained(
    table: pd.DataFrame, foreseen: pd.DataFrame, answers: Sequence[str], measure: str
) -> pd.DataFrame:
    """One row per (criterion, budget, answer) with the predicted value and the trained gain."""
    what = "figures.validation_scatter"
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    trained = interval_of(style.keep(table, what, needs, {"measure": measure}), "gain")
    columns = ["criterion", "budget", "answer", "value"]
    foreseen = style.keep(foreseen, what, columns, {"answer": answers})
    both = trained.merge(foreseen[columns], on=["criterion", "budget"])
    return style.keep(both.dropna(subset=["value", "gain"]), what, ("value",))


def _cells(ax, table: pd.DataFrame, names: list[str]) -> None:
    """Every cell of a grid as a mark with its interval, the mark growing with the budget."""
    style.zero(ax)
    for name in names:
        line = style.criterion_style(name, names) | {"linestyle": "none"}
        for number, cell in enumerate(
            table[table.criterion == name].sort_values("budget").to_dict("records")
        ):
            label = naming.readable(name) if number == 0 else f"_{name} {number}"
            style.upright(
                ax,
                [cell["value"]],
                pd.DataFrame([cell]),
                "gain",
                label=label,
                **line | {"markersize": 3.0 + 1.3 * number},
            )
    ax.xaxis.set_major_locator(MaxNLocator(4 if style.is_wide(ax) else 3))


def _trained_counts(table: pd.DataFrame) -> str:
    """Seeds and held-out prompts of a grid, where its table names them."""
    trained = table[table.criterion != "untouched"]
    if not {"seeds", "prompts"} <= set(table):
        return ""
    return f"{int(trained.seeds.max())} seeds, {int(trained.prompts.max()):,} held-out prompts."
