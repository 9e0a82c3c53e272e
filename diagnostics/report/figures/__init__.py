"""Figures: a finished table goes in, a matplotlib Figure comes out.

    import diagnostics as dx
    dx.plot.correlations(dx.correlate(tokens))  # in a notebook: the figure shows itself
    dx.plot.correlations(table, width=dx.plot.SINGLE).savefig("correlations.pdf")
    figure, axes = plt.subplots(1, 2)
    dx.plot.correlations(table, ax=axes[0])  # into a figure of yours

Nothing is estimated or saved here. Every function takes `width` in inches (SINGLE = 3.3 for one
column, DOUBLE = 6.9 for two) and `dark` for a dark page. Those with intervals take the `level` that
the table was made at, for the caption. Panels stand side by side at DOUBLE and below one another at
SINGLE where they would not fit. Intervals are drawn as the table gives them; the numbers of
prompts, positions and step batches stand below the figure. Nats lead: the gain, then the context
gain where the table has it. Every function raises DiagnosticsError where its table lacks a column
or has no row to show.

What comes back is a Figure, outside pyplot's list: a notebook shows it once, `show()` shows it
below a cell or in a window of a script, `savefig` embeds TrueType fonts and writes 300 dots per
inch. With `ax` (one panel) or `axes` (several) the axes come back instead. `palette`, `order`,
`labels`, `caption` and `legend` change what they say.

Your rcParams count: our look, `style()`, lies beneath them and applies only where they are as
matplotlib ships them, and never to axes of yours (`diagnostics.report.look` has the rule). Names
keep one color and marker in every figure (`diagnostics.report.palette`). The report's figures are
registered in `diagnostics.report.figures.registry`.
"""

from __future__ import annotations

from diagnostics.report.figures.across_pairs import atlas
from diagnostics.report.figures.attribution import kernel_shares, lift, linearity
from diagnostics.report.figures.decision import decision, foresight
from diagnostics.report.figures.horizon import horizon, horizon_criteria
from diagnostics.report.figures.paper import (
    paper,
    paper_2a,
    paper_2b,
    paper_2c,
    paper_3a,
    paper_3b,
    paper_3c,
    paper_4a,
    paper_4b,
    paper_4c,
    paper_4d,
    paper_5a,
    paper_5b,
    paper_5c,
)
from diagnostics.report.figures.plane import (
    entropy_divergence,
    position_gain,
    probabilities,
    q3_contrast,
    q3_gain,
    quadrants,
)
from diagnostics.report.figures.ranking import correlations
from diagnostics.report.figures.regressions import (
    coefficients,
    gain_robustness,
    residual_curves,
    support_robustness,
)
from diagnostics.report.figures.selection import (
    agreement,
    intervention,
    selection_curves,
    selection_overlap,
    selection_profile,
    selection_summary,
)
from diagnostics.report.figures.step import calibration, distributions, runs
from diagnostics.report.figures.strata import strata
from diagnostics.report.figures.teachers import teachers, teachers_agreement
from diagnostics.report.figures.training import (
    evaluations,
    training_curves,
    training_positions,
    validation,
    validation_scatter,
)
from diagnostics.report.look import DOUBLE, SINGLE, style

__all__ = [
    "DOUBLE",
    "SINGLE",
    "agreement",
    "atlas",
    "calibration",
    "coefficients",
    "correlations",
    "decision",
    "distributions",
    "entropy_divergence",
    "evaluations",
    "foresight",
    "gain_robustness",
    "horizon",
    "horizon_criteria",
    "intervention",
    "kernel_shares",
    "lift",
    "linearity",
    "paper",
    "paper_2a",
    "paper_2b",
    "paper_2c",
    "paper_3a",
    "paper_3b",
    "paper_3c",
    "paper_4a",
    "paper_4b",
    "paper_4c",
    "paper_4d",
    "paper_5a",
    "paper_5b",
    "paper_5c",
    "position_gain",
    "probabilities",
    "q3_contrast",
    "q3_gain",
    "quadrants",
    "residual_curves",
    "runs",
    "selection_curves",
    "selection_overlap",
    "selection_profile",
    "selection_summary",
    "strata",
    "style",
    "support_robustness",
    "teachers",
    "teachers_agreement",
    "training_curves",
    "training_positions",
    "validation",
    "validation_scatter",
]


def __dir__() -> list[str]:
    """The figures and the two widths, for completion after `dx.plot.`."""
    return __all__
