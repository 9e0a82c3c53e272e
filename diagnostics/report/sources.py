"""Where gains come from and whose losses help others, in one sentence each, and whether the numbers
can be read at all.

Shares of a sum that is small beside its own error have intervals of many times the whole. Drawn or
listed they only look like results, so that a sentence says it in their place.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.report.naming import readable

WIDEST_SHARE = 0.5
"""Half of an interval, as a share of the gain, up to which a share can be read."""
WIDEST_LIFT = 1.0
"""Half of an interval, in times the average position's lift, up to which a lift can be read."""
KERNELS = ("full", "output_layer")
"""The kernels, the one that holds more of the step first."""
SOURCES = {
    "self": "its own loss",
    "own_context": "the rest of its response",
    "own_prompt": "its prompt's other responses",
    "other_prompts": "other prompts",
}


def _half(table: pd.DataFrame, name: str) -> float:
    """Median half width of the intervals of a column; infinite where none is known."""
    widths = ((table[f"{name}_high"] - table[f"{name}_low"]) / 2).to_numpy(float)
    known = widths[np.isfinite(widths) & (widths > 0)]
    return float(np.median(known)) if len(known) else np.inf


def readable_kernel(table: pd.DataFrame) -> str | None:
    """The kernel whose shares can be read, the full one first; None where none can.

    Args:
        table: `kernel_shares`, with the columns kernel, part, share_low and share_high.
    """
    for kernel in (*KERNELS, *table["kernel"].unique()):
        rows = table[(table["kernel"] == kernel) & table["part"].isin(list(SOURCES))]
        if len(rows) and _half(rows, "share") <= WIDEST_SHARE:
            return str(kernel)
    return None


def shares_said(table: pd.DataFrame) -> str:
    """Whose losses a position's first-order gain comes from, over all positions.

    Args:
        table: `kernel_shares`, one row per (kernel, group, part), with the columns share,
            share_low, share_high and prompts.
    """
    kernel = readable_kernel(table)
    shown = kernel or str(table["kernel"].iloc[0])
    rows = table[(table["kernel"] == shown) & (table["group"] == "all")].set_index("part")
    if "self" not in rows.index:
        return ""
    own = rows.loc["self"]
    if kernel is None:
        reach = (
            f": the interval of its own loss's share reaches from {_share(own['share_low'])} to"
            f" {_share(own['share_high'])}"
            if np.isfinite([own["share_low"], own["share_high"]]).all()
            else ""
        )
        return f"Whose loss moved a position cannot be told{reach} ({int(own['prompts'])} prompts)."
    parts = [name for name in SOURCES if name in rows.index and rows.loc[name, "share"] != 0]
    listed = ", ".join(
        f"{_share(rows.loc[name, 'share'])} ({_share(rows.loc[name, 'share_low'])} to"
        f" {_share(rows.loc[name, 'share_high'])}) from {SOURCES[name]}"
        for name in parts
    )
    through = "" if kernel == "full" else f" through the {readable(kernel)} alone"
    return f"Of a position's first-order gain{through}, {listed}."


def lift_can_be_read(table: pd.DataFrame) -> bool:
    """Whether the groups' lifts are known to less than that of an average position.

    Args:
        table: `lift`, with the columns group, enrichment_low and enrichment_high.
    """
    return _half(table[table["group"] != "all"], "enrichment") <= WIDEST_LIFT


def lift_said(table: pd.DataFrame) -> str:
    """Which group's losses do more for held-out prompts than an average position's.

    Args:
        table: `lift`, one row per group, with the columns enrichment, enrichment_low,
            enrichment_high and prompts.
    """
    groups = table[table["group"] != "all"]
    if groups.empty:
        return ""
    prompts = f"({int(groups['prompts'].max())} prompts)"
    if not lift_can_be_read(table):
        half = _half(groups, "enrichment")
        why = (
            f"intervals reach {half:.2g} times the average to either side"
            if np.isfinite(half)
            else "what the step does for them as a whole is not clear of zero"
        )
        return f"Whose losses help held-out prompts cannot be told: {why} {prompts}."
    above = groups[groups["enrichment_low"] > 1]
    if above.empty:
        return f"No group's losses are told apart from an average position's {prompts}."
    row = above.sort_values("enrichment_low", kind="stable").iloc[-1]
    return (
        f"Losses at {_group(str(row['group']))} do {row['enrichment']:.2g}"
        f" ({row['enrichment_low']:.2g} to {row['enrichment_high']:.2g}) times as much for held-out"
        f" prompts as an average position's {prompts}."
    )


def _group(name: str) -> str:
    """`q3` as positions of Q3, `compatibility_3` as the highest third of compatibility."""
    score, _, third = name.rpartition("_")
    if score and third in ("1", "2", "3"):
        return f"the {('lowest', 'middle', 'highest')[int(third) - 1]} third of {readable(score)}"
    return f"positions of {readable(name)}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "−")
