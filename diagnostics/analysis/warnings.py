"""Warnings of the study, where a conclusion rests on little data or none.

Each rule looks at the token table or at a finished table and returns rows of code, subject, value,
limit and message. A rule that does not apply returns none; an empty table means no warning applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from diagnostics.analysis.bounds import is_listed
from diagnostics.analysis.claims import IMBALANCE_LIMIT
from diagnostics.analysis.splits import STUDY_OUTCOMES
from diagnostics.criteria import quadrants

FEW_PROMPTS = 20
"""Number of clusters below which intervals were not calibrated (`benchmarks/CALIBRATION.md`)."""
SATURATED, SATURATED_SHARE = 0.99, 0.75
RARE_QUADRANT = 0.05
UNDEFINED_SHARE = 0.2
INFLATED = 10.0
DROPPED_MASS = 0.01
WARNING_COLUMNS = ("code", "subject", "value", "limit", "message")


def warnings(tokens: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All warnings for a token table and the study's tables.

    Args:
        tokens: A token table; `attrs["warnings"]` may hold warnings of the reader that imported it.
        tables: Tables by name; coverage, saturation, regressions, decomposition and balance are
            read where they are present.

    Returns:
        Columns code, subject, value, limit, message.
    """
    rows = [row for rule in RULES for row in rule(tokens, tables)]
    return pd.DataFrame(rows, columns=WARNING_COLUMNS)


def _few_prompts(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for row in _rows_of(tables, "coverage"):
        number = row.effective_prompts
        if number < FEW_PROMPTS:
            yield (
                "few_prompts",
                f"{row.outcome}, {row.split}",
                number,
                FEW_PROMPTS,
                (
                    f"{row.outcome} on {row.split} is computed from {row.prompts} prompts, which"
                    f" weigh as much as {number:.1f} of equal length; intervals were calibrated for"
                    f" {FEW_PROMPTS} and more."
                ),
            )


def _undefined_outcomes(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for row in _rows_of(tables, "coverage"):
        share = row.undefined / max(row.undefined + row.positions, 1)
        if share > UNDEFINED_SHARE:
            yield (
                "undefined_outcome",
                f"{row.outcome}, {row.split}",
                share,
                UNDEFINED_SHARE,
                (
                    f"{row.outcome} is undefined at {share:.0%} of the {row.split} positions, which"
                    " no result covers."
                ),
            )


def _saturated(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if "compatibility" in tokens:
        share = float((tokens["compatibility"] >= SATURATED).mean())
        if share >= SATURATED_SHARE:
            yield (
                "saturated",
                "compatibility",
                share,
                SATURATED_SHARE,
                (
                    f"Compatibility is at least {SATURATED} at {share:.0%} of positions:"
                    " normalization magnifies tiny differences. Use a smaller K, or interpret c"
                    " with care."
                ),
            )


def _constant(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for row in _rows_of(tables, "saturation"):
        if row.distinct <= 1:
            yield (
                "constant",
                row.measurement,
                row.distinct,
                2,
                (
                    f"{row.measurement} has one value or none, so every score made from it alone is"
                    " constant."
                ),
            )


def _rare_quadrants(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if {"student_entropy", "forward_kl"} <= set(tokens):
        quadrant = quadrants(tokens)
        for number in (1, 2, 3, 4):
            share = float((quadrant == number).mean())
            if share < RARE_QUADRANT:
                yield (
                    "rare_quadrant",
                    f"Q{number}",
                    share,
                    RARE_QUADRANT,
                    (
                        f"Only {share:.1%} of positions lie in Q{number}; contrasts within it are"
                        " computed from few positions."
                    ),
                )


def _inflated(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for (model, term), value in _largest(tables, "regressions", ["model", "term"], "inflation"):
        if value > INFLATED:
            yield (
                "collinear",
                f"{model}: {term}",
                value,
                INFLATED,
                (
                    f"In model {model} the variance of {term}'s coefficient is inflated {value:.1f}"
                    " times by the other terms."
                ),
            )


def _unbalanced(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("balance", pd.DataFrame())
    if len(table):
        tables = {"balance": table[np.isinf(table["caliper"])].assign(after=table["after"].abs())}
    for (score, split), value in _largest(tables, "balance", ["score", "split"], "after"):
        if value > IMBALANCE_LIMIT:
            yield (
                "unbalanced",
                f"{score}, {split}",
                value,
                IMBALANCE_LIMIT,
                (
                    f"Pairs matched for {score} on {split} still differ by up to {value:.2f}"
                    " standard deviations in what they were matched on; the rows of the table"
                    " matching with a caliper keep the near pairs alone."
                ),
            )


def _scale_of_c3(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("decomposition", pd.DataFrame())
    for key, rows in (
        table.groupby(["outcome", "split", "winsorised"], sort=False) if len(table) else ()
    ):
        by = rows.set_index("scale")
        sure = ((by.low > 0) | (by.high < 0)).all()
        if sure and np.sign(by.difference["standardised"]) != np.sign(by.difference["per_unit"]):
            yield (
                "scale",
                f"{key[0]}, {key[1]}, winsorised {key[2]:g}",
                by.difference["per_unit"],
                0.0,
                (
                    f"For {key[0]} on {key[1]} (winsorised {key[2]:g}) d*c weighs"
                    f" {'more' if by.difference['standardised'] > 0 else 'less'} than d*(1 - c) for"
                    " a standard deviation and the other way round for a unit of d: C3 turns over"
                    " with the scale."
                ),
            )


def _no_placebo(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for outcome in STUDY_OUTCOMES:
        if outcome in tokens and f"placebo_{outcome}" not in tokens:
            yield (
                "no_placebo",
                outcome,
                0,
                1,
                (
                    f"There is no placebo for {outcome}: it is not known how much of a correlation"
                    " comes from D being on both sides."
                ),
            )


def _dropped(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for name in ("student_dropped_mass", "teacher_dropped_mass"):
        if name in tokens and tokens[name].mean() > DROPPED_MASS:
            yield (
                "dropped_mass",
                name,
                float(tokens[name].mean()),
                DROPPED_MASS,
                (
                    f"On average {tokens[name].mean():.1%} of {name.split('_')[0]} probability lies"
                    " outside the shared vocabulary."
                ),
            )


def _listed_teacher(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if is_listed(tokens):
        mass = float(tokens["teacher_tail_mass"].mean())
        yield (
            "listed_teacher",
            "teacher",
            mass,
            0.0,
            (
                "The teacher is known only by lists of its most likely tokens, which leave out"
                f" {mass:.2%} of its mass on average. KLs, JS, teacher entropy and compatibility"
                " are lower bounds, and gains are changes of such a bound; the table exactness"
                " lists the measurements."
            ),
        )


def _from_reader(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for code, subject, message in tokens.attrs.get("warnings", ()):
        yield code, subject, np.nan, np.nan, message


RULES: tuple[Callable, ...] = (
    _from_reader,
    _few_prompts,
    _undefined_outcomes,
    _saturated,
    _constant,
    _rare_quadrants,
    _inflated,
    _unbalanced,
    _scale_of_c3,
    _no_placebo,
    _dropped,
    _listed_teacher,
)


def _rows_of(tables: dict[str, pd.DataFrame], name: str) -> Iterator:
    return tables[name].itertuples() if name in tables else iter(())


def _largest(
    tables: dict[str, pd.DataFrame], name: str, by: list[str], column: str
) -> Iterator[tuple]:
    if name in tables and len(tables[name]):
        yield from tables[name].groupby(by, sort=False)[column].max().dropna().items()
