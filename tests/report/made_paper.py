"""Made-up final tables of the paper: every artefact, with and without intervals and contexts."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.report import figures
from diagnostics.report.figures.paper import FIGURES, table_name
from tests import study_tables

SIDES = ("released", "controlled", "context")
UNIT = "relative gain; nats"
WHY = "The gap is the same sign on both sides; 12 of 480 positions of Q3 are in it by H1 only."
SELECTORS = (
    "q3_compatibility",
    "q3_teachability_first",
    "q3_divergence",
    "teachability",
    "divergence",
    "incompatible",
    "tip",
    "entropy",
    "random",
)
SCORES = ("compatibility", "divergence", "incompatible", "teachability")
PROXIES = ("mass", "bhattacharyya", "jaccard", "overlap")
MASKS = ("q3_teachability", "q3_teachability_low", "q3_incompatible")


def final(
    keys: list[tuple], *, unit: str = UNIT, context: bool = True, ends: bool = True, seed: int = 0
) -> pd.DataFrame:
    """A final table from (row, quantity, k, budget), with made-up numbers on every side."""
    rng, rows = np.random.default_rng(seed), []
    for row, quantity, k, budget in keys:
        cells = {"row": row, "quantity": quantity, "k": k, "budget": budget, "unit": unit}
        for side, scale in zip(SIDES, (0.1, 0.4, 0.2), strict=True):
            known = side != "context" or context
            value = scale * rng.normal(0.5, 1) if known else np.nan
            half = scale * rng.uniform(0.2, 0.5) if ends and known else np.nan
            cells[side] = value
            cells |= {f"{side}_low": value - half, f"{side}_high": value + 1.2 * half}
            cells[f"{side}_n"] = float(rng.integers(100, 600)) if known else np.nan
        rows.append(cells | {"why": WHY})
    return pd.DataFrame(rows)


def plane(number: str, bins: int = 6) -> pd.DataFrame:
    """A plane of percentiles with some empty cells."""
    rng, edges, rows = np.random.default_rng(3), np.linspace(0, 1, bins + 1), []
    for x in range(bins):
        for y in range(bins):
            if (x + y) % 5 == 4:
                continue
            signed = number == "2A"
            released, controlled = rng.normal(0, 1, 2) if signed else rng.uniform(0, 1, 2)
            rows.append(
                {
                    "x_bin": x,
                    "y_bin": y,
                    "x_low": edges[x],
                    "x_high": edges[x + 1],
                    "y_low": edges[y],
                    "y_high": edges[y + 1],
                    "unit": "asinh of relative gain; nats" if signed else "share of positions",
                    "released": released,
                    "released_n": float(rng.integers(10, 90)),
                    "controlled": controlled,
                    "controlled_n": float(rng.integers(10, 90)),
                    "context": np.nan,
                    "context_n": np.nan,
                    "why": WHY,
                }
            )
    return pd.DataFrame(rows)


def gaps(context: bool = True) -> pd.DataFrame:
    """Table 1 and figure 3C: the Q3 gap and the matched gap at three K."""
    keys = [
        (f"K = {k}", quantity, float(k), np.nan)
        for k in (8, 16, 32)
        for quantity in ("Q3 gap", "matched gap")
    ]
    return final(keys, context=context)


def counted() -> pd.DataFrame:
    """Table 5: what the numbers rest on."""
    counts = {"positions": 2526.0, "contexts": 48.0, "prompts": 48.0}
    table = final([(name, "count", np.nan, np.nan) for name in counts], unit="count", ends=False)
    values = list(counts.values())
    return table.assign(released=values, controlled=values, context=values)


def selectors(quantities: tuple[str, ...] = ("mean gain", "gain per kept share")) -> pd.DataFrame:
    """Table 8 and figures 4A, 4B: nine selectors at two budgets."""
    keys = [
        (name, quantity, np.nan, budget)
        for quantity in quantities
        for budget in (0.03, 0.05)
        for name in SELECTORS
    ]
    return final(keys, seed=1)


def proxies(sizes: tuple[int, ...] = (8, 16, 32)) -> pd.DataFrame:
    """Table 6 and figures 4C, 5B."""
    keys = [(name, "Q3 gap", float(k), np.nan) for name in PROXIES for k in sizes]
    return final(keys, seed=2)


def quarters(*statistics: str) -> pd.DataFrame:
    """Figures 4D and 5C; one score has fewer buckets than the others."""
    keys = [
        (score, f"{statistic} of bucket {bucket}", np.nan, np.nan)
        for statistic in statistics
        for score in SCORES
        for bucket in range(3 if score == "compatibility" else 4)
    ]
    return final(keys, seed=4)


def coefficients() -> pd.DataFrame:
    """Figure 3A; as released there are no intervals."""
    keys = [
        (f"K = {k}", quantity, float(k), np.nan)
        for k in (8, 16, 32)
        for quantity in ("coefficient of D^L", "coefficient of D^I")
    ]
    table = final(keys, unit="standard deviations", seed=5)
    return table.assign(released_low=np.nan, released_high=np.nan)


def masks() -> pd.DataFrame:
    """Table 7 and figure 3B: trainings inside Q3; no context gain."""
    quantities = ("gap after training", "matched gap", "mean gain")
    keys = [(name, quantity, np.nan, 0.05) for name in MASKS for quantity in quantities]
    return final(keys, context=False, seed=6)


TITLES = {
    "Table 1": "The Q3 gap",
    "Table 8": "Exact top N",
    "Figure 2A": "Gain over compatible and incompatible divergence",
    "Figure 3C": "The Q3 gap",
    "Figure 4A": "Mean gain of the exact top N",
}


def differences() -> pd.DataFrame:
    """One row per artefact, with what the paper prints for some."""
    rows = [
        {
            "artefact": name,
            "title": title,
            "released": f"{title}: .050 [.017, .080].",
            "controlled": f"{title}: .012 [−.02, .05] nats.",
            "why": WHY,
            "printed": ".084 [.069, .098]" if name in ("Table 1", "Figure 3C") else np.nan,
        }
        for name, title in TITLES.items()
    ]
    return pd.DataFrame(rows)


def tables() -> dict[str, pd.DataFrame]:
    """Every final table by name."""
    found = {f"paper_figure_{number.lower()}": plane(number) for number in ("2A", "2B", "2C")}
    return found | {
        "paper_table_1": gaps(),
        "paper_table_5": counted(),
        "paper_table_6": proxies(),
        "paper_table_7": masks(),
        "paper_table_8": selectors(),
        "paper_table_9": coefficients(),
        "paper_figure_3a": coefficients(),
        "paper_figure_3b": masks(),
        "paper_figure_3c": gaps(),
        "paper_figure_4a": selectors(("mean gain",)),
        "paper_figure_4b": selectors(("gain per kept share",)),
        "paper_figure_4c": proxies((16, 32)),
        "paper_figure_4d": quarters("mean"),
        "paper_figure_5a": gaps(),
        "paper_figure_5b": proxies(),
        "paper_figure_5c": quarters("trimmed mean"),
        "paper_differences": differences(),
    }


def figures_with_tables() -> dict:
    """For every figure of the paper, by its name in `figures`: what draws it, and its table."""
    made = tables()
    found = {
        f"paper_{number.lower()}": (draw, functools.partial(made.get, table_name(number)))
        for number, draw in FIGURES.items()
    }
    return found | {"paper": (functools.partial(figures.paper, "3C"), tables)}


def write_run(directory: Path, **more: pd.DataFrame) -> Path:
    """A run directory with these tables, and a checkpoint in its manifest."""
    study_tables.write_run(directory, **tables(), **more)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["stages"]["after"] = {
        "settings": {"after": "/somewhere/trained/student"},
        "inputs": {},
        "files": {},
    }
    path.write_text(json.dumps(manifest))
    return directory
