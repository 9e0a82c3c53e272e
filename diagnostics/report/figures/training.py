"""What training logged, and what a grid of short trainings gained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import style
from diagnostics.report.figures.common import interval_of, reduction_curves, shown_criteria
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, DASHES, DOUBLE

TRAINED = ("forward_kl", "reverse_kl", "accuracy", "accuracy_greedy")
MEASURE_UNITS = {
    "accuracy": "share",
    "accuracy_greedy": "share",
    "finished": "share",
    "response_length": "tokens",
}


def _measured(name: str) -> str:
    """A measure of an evaluation with its unit."""
    return f"{style.words(name)} ({MEASURE_UNITS.get(name, 'nats')})"


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
@style.plate
def training_curves(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = ("loss", "forward_kl/all"),
    budget: float | None = None,
    window: int | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What training logged, step by step: `dx.plot.training_curves(result.metrics)`.

    table: a column step, the measures, and where there are several trainings criterion, budget and
    seed. A line is a criterion at a budget, the mean over its seeds of running means of `window`
    steps (a twentieth of the steps where None); its band reaches from the lowest to the highest
    seed. budget: that one alone, beside full; the nearest to 5 % where None and all of them would
    be more than six lines."""
    names = [name for name in measures if name in table] or list(measures)
    table = style.keep(table, "figures.training_curves", ("step", *names))
    table, share = _some_cells(table, budget)
    window = window or max(1, table.step.nunique() // 20)
    rows, columns = style.panels(len(names), width)
    figure, axes = style.canvas(width, 0.9 + 1.7 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        _seed_bands(ax, table, name, window)
        ax.set_ylabel(_logged(name))
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step")
    style.legend(figure, axes[0, 0], 4 if width > 5 else 2)
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
    """A line a cell with the range of its seeds."""
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
        line = style.criterion_style(key[0], criteria) if key else {"color": BLUE}
        if key and (table[table.criterion == key[0]].budget.nunique() > 1):
            line |= {"linestyle": DASHES[number % len(DASHES)]}
        label = (
            style.words(key[0]) + (f" {key[1]:.0%}" if len(key) > 1 and key[1] < 1 else "")
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
            f"{style.words(what)}, {where} (nats)"
            if where and "kl" in what
            else style.words(name.replace("/", ", "))
        ),
    )


@figure(
    table="evaluations",
    title="Held-out prompts during training",
    reading=(
        "The dashed line is the untouched student. Divergences should fall below it, accuracies"
        " rise above."
    ),
)
@style.plate
def evaluations(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = TRAINED,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """The student on held-out prompts before, during and after training:
    `dx.plot.evaluations(result.evaluations)`.

    table: columns step, measure, mean, low, high, count, prompts. The dashed line is the untouched
    student."""
    table = style.keep(
        table,
        "figures.evaluations",
        ("step", "measure", "mean", "low", "high"),
        {"measure": measures},
    )
    names = style.present(table.measure, measures)
    rows, columns = style.panels(len(names), width)
    figure, axes = style.canvas(width, 0.6 + 1.6 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        part = table[table.measure == name].sort_values("step")
        style.upright(
            ax, part.step, part, "mean", marker="o", linestyle="-", color=BLUE, label=name
        )
        ax.axhline(part["mean"].iloc[0], color=style.quiet(), linestyle=DASHES[1], linewidth=0.9)
        ax.set_ylabel(_measured(name))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step")
    prompts = f"{int(table.prompts.max()):,} held-out prompts." if "prompts" in table else ""
    style.caption(figure, prompts, style.bars(level))
    return figure


@figure(
    table="validation_outcomes",
    title="What training gained",
    reading=(
        "Gain over the untouched student on held-out prompts, by budget. Full OPD is the level"
        " line. Bars cross seeds with prompts; where they overlap, read the paired differences in"
        " the table instead."
    ),
)
@style.plate
def validation(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = TRAINED,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What trainings gained on held-out prompts, by budget:
    `dx.plot.validation(tables["validation_outcomes"])`.

    table: columns criterion, budget, measure, gain, gain_low, gain_high (improvement over the
    untouched student), seeds, prompts. The level line is full OPD; bars are intervals over seeds
    and prompts."""
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    table = interval_of(
        style.keep(table, "figures.validation", needs, {"measure": measures}), "gain"
    )
    table = table.rename(columns={"gain": "reduction"})
    names, shown = (
        shown_criteria(table[table.criterion != "untouched"], criteria),
        style.present(table.measure, measures),
    )
    down, across = (-(-len(shown) // 2), min(2, len(shown))) if width > 5 else (len(shown), 1)
    figure, axes = style.canvas(width, 0.8 + 2.0 * down, down, across)
    for ax, name in zip(axes.flat, shown, strict=False):
        reduction_curves(ax, table[table.measure == name].sort_values("budget"), names, bars=True)
        ax.set_ylabel(f"gain in {_measured(name)}")
        ax.set_xlabel("budget (share of positions)")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    style.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    style.caption(figure, _trained_counts(table), style.bars(level, over="seeds and prompts"))
    return figure


FORESEEN = ("captured_gain", "captured_relative_gain", "intervention_forward_kl", "one_step_gain")
"""Answers of the usual scatter: what a criterion captures of each gain, what a step on its
selection does, and a training's own first step.
"""
ANSWERS = {
    "captured_gain": "captured gain",
    "captured_relative_gain": "captured relative gain",
    "intervention_forward_kl": "drop after one step (nats)",
    "one_step_gain": "gain after first step (nats)",
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
@style.plate
def validation_scatter(
    table: pd.DataFrame,
    foreseen: pd.DataFrame,
    *,
    answers: Sequence[str] = FORESEEN,
    measure: str = "forward_kl",
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Foreseen against trained: `dx.plot.validation_scatter(tables["validation_outcomes"],
    tables["validation_foreseen"])`.

    table: as `validation` has it. foreseen: columns criterion, budget, answer, value, one panel an
    answer. A mark is one cell of the grid; a colour and shape is a criterion, a larger mark a
    larger budget. Marks that rise to the right were foreseen."""
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    trained = interval_of(
        style.keep(table, "figures.validation_scatter", needs, {"measure": measure}), "gain"
    )
    foreseen = style.keep(
        foreseen,
        "figures.validation_scatter",
        ("criterion", "budget", "answer", "value"),
        {"answer": answers},
    )
    both = trained.merge(
        foreseen[["criterion", "budget", "answer", "value"]], on=["criterion", "budget"]
    )
    both = style.keep(
        both.dropna(subset=["value", "gain"]), "figures.validation_scatter", ("value",)
    )
    shown, names = style.present(both.answer, answers), list(dict.fromkeys(both.criterion))
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure, axes = style.canvas(
        width, 0.9 + (1.9 if width > 5 else 1.5) * down, down, across, sharey=True
    )
    figure.get_layout_engine().set(w_pad=0.13)  # ticks at the very end of an axis hang over
    for ax, answer in zip(axes.flat, shown, strict=False):
        _cells(ax, both[both.answer == answer], names)
        ax.set_xlabel(ANSWERS.get(answer, style.words(answer)))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"trained gain ({MEASURE_UNITS.get(measure, 'nats')})")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    style.legend(figure, axes[0, 0], 5 if width > 5 else 3)
    words = (
        f"{len(both[['criterion', 'budget']].drop_duplicates())} cells; a larger mark is a larger"
        " budget."
    )
    style.caption(
        figure,
        f"Trained gain in {style.words(measure)}.",
        words,
        _trained_counts(table),
        style.bars(level, over="seeds and prompts"),
    )
    return figure


def _cells(ax, table: pd.DataFrame, names: list[str]) -> None:
    """Every cell of a grid as a mark with its interval, the mark growing with the budget."""
    style.zero(ax)
    for name in names:
        line = style.criterion_style(name, names) | {"linestyle": "none"}
        for number, cell in enumerate(
            table[table.criterion == name].sort_values("budget").to_dict("records")
        ):
            label = style.words(name) if number == 0 else f"_{name} {number}"
            style.upright(
                ax,
                [cell["value"]],
                pd.DataFrame([cell]),
                "gain",
                label=label,
                **line | {"markersize": 3.0 + 1.3 * number},
            )
    ax.xaxis.set_major_locator(MaxNLocator(4 if ax.figure.get_figwidth() > 5 else 3))


def _trained_counts(table: pd.DataFrame) -> str:
    """Seeds and held-out prompts of a grid, where its table names them."""
    trained = table[table.criterion != "untouched"]
    if not {"seeds", "prompts"} <= set(table):
        return ""
    return f"{int(trained.seeds.max())} seeds, {int(trained.prompts.max()):,} held-out prompts."
