"""What the report knows of a figure, written beside the function that draws it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

CORE = (
    "entropy",
    "divergence",
    "reverse_divergence",
    "compatibility",
    "teachability",
    "incompatible",
    "tip",
    "random",
)
"""Criteria of the page's overviews; the tables have them all."""


@dataclass(frozen=True)
class FigureSpec:
    """One figure of the report."""

    name: str
    title: str
    table: str
    """Table it is drawn from; `tokens` is the token table."""
    draw: Callable[..., Figure]
    reading: str
    """How to read it."""
    needs: tuple[str, ...] = ()
    """Columns without which there is nothing to draw."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of `draw` and the tables that they are; None where the run has no such
    table.
    """
    with_tables: tuple[str, ...] = ()
    """Tables without which there is nothing to draw."""
    measured: bool = False
    """Whether `draw` takes the divergence that the run's loss descends as its `measure`."""

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of `draw` by name."""
        return inspect.signature(self.draw).parameters


FIGURES: dict[str, FigureSpec] = {}
"""The report's figures by name."""

ORDER = (
    "decision",
    "horizon_criteria",
    "horizon",
    "correlations",
    "strata",
    "entropy_divergence",
    "probabilities",
    "quadrants",
    "position_gain",
    "q3_gain",
    "q3_contrast",
    "coefficients",
    "support_robustness",
    "gain_robustness",
    "residual_curves",
    "selection_curves",
    "selection_summary",
    "selection_overlap",
    "selection_profile",
    "intervention",
    "agreement",
    "linearity",
    "kernel_shares",
    "lift",
    "foresight",
    "validation",
    "validation_scatter",
    "validation_agreement",
    "evaluations",
    "training_curves",
    "training_positions",
    "calibration",
    "distributions",
)
"""Names of the figures in the order of the page; a figure that is not named here comes last."""


def in_page_order() -> list[FigureSpec]:
    """The registered figures as the page shows them: the answer first, then what it rests on."""
    return [FIGURES[name] for name in dict.fromkeys((*ORDER, *FIGURES)) if name in FIGURES]


def figure(
    name: str | None = None,
    *,
    table: str,
    title: str,
    reading: str,
    options: Mapping[str, Any] | None = None,
    **more,
):
    """Register the decorated function as a figure of the report.

    Args:
        name: Name of its files; the function's own where None. Must be new.
        table: Name of the table that it draws.
        title: Its heading on the page.
        reading: How to read it, in one paragraph.
        options: Keyword arguments that the report passes to it.
        **more: `needs`, `arguments`, `with_tables` and `measured` of `FigureSpec`.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        key = name or draw.__name__
        assert key not in FIGURES, f"two figures are named {key}"
        drawn = functools.partial(draw, **options) if options else draw
        FIGURES[key] = FigureSpec(key, title, table, drawn, reading, **more)
        return draw

    return register
