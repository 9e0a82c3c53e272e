"""Warnings of the study, where a conclusion rests on little data or none: one line per cause.

Each rule looks at the token table or at finished tables and returns at most one row; populations,
outcomes and measurements that share the cause stand in brackets. `changes_verdict` names the
claims whose verdict the cause decided, and what it became: those rows come first. A cause that
decided a verdict has a row even where no rule knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd

from diagnostics.analysis import claims
from diagnostics.analysis.bounds import is_listed
from diagnostics.analysis.claims import IMBALANCE_LIMIT
from diagnostics.analysis.config import FEWEST_PROMPTS, SIGNAL
from diagnostics.core.folds import step_count
from diagnostics.criteria import quadrants

SATURATED, SATURATED_SHARE = 0.99, 0.75
RARE_QUADRANT = 0.05
UNDEFINED_SHARE = 0.2
INFLATED = 10.0
DROPPED_MASS = 0.01
WARNING_COLUMNS = ("code", "subject", "value", "limit", "message", "changes_verdict")
ORDINARY = ("holds_zero", "")
"""Causes that are a test's own answer, of which nobody need be warned."""
EXPLAINED = {
    "no_null": (
        "No step towards a permuted teacher was taken, so that nothing tells a gain that needs the"
        " right teacher from one that any teacher gives. Run the probe with its null"
    ),
    "few_prompts": (
        f"There are fewer than {FEWEST_PROMPTS} prompts, for which no interval was calibrated."
        " Measure more prompts"
    ),
    "no_signal": (
        "Teacher and student give the same probabilities up to rounding, so that there is nothing"
        " to learn. Are --student and --teacher the same model?"
    ),
    "no_overlap": (
        "Inside Q3 compatible and incompatible positions differ so much in divergence that they"
        " cannot be compared at equal divergence. Take C1 or C3 instead, or another pair"
    ),
    "unbalanced": (
        "Inside Q3 the weighted groups still differ in what they were weighted for, so that their"
        " difference may be one of divergence or entropy"
    ),
    "no_width": "An interval has no width, because nothing varies between prompts",
    "undefined": "A statistic is undefined, because a measurement or the outcome does not vary",
    "no_base": "C4 asks whether C2 and C3 depend on K, and neither has a verdict of its own",
    "no_support": "Only one K was measured, so that nothing can be compared. Score with --sweep",
    "scale": (
        "d*c weighs more than d*(1 - c) on one scale and less on another: the answer is the"
        " scale's, not the data's"
    ),
    "partly_undefined": "Some comparisons over K or proxies are undefined",
    "power": "The trainings are too few or their prompts too few to test so small a margin",
    "few_seeds": "A grid was trained with too few seeds for a verdict",
}
"""What a cause is and what to do, where no rule says it with figures of its own."""


def warnings(tokens: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All warnings for a token table and the study's tables.

    Args:
        tokens: A token table; `attrs["warnings"]` may hold warnings of the reader that imported it.
        tables: Tables by name; coverage, saturation, regressions, balance and verdicts are read
            where they are present.

    Returns:
        Columns code, subject, value, limit, message, and changes_verdict, a text that is empty
        where no verdict hangs on it. Those that change one come first.
    """
    changed = dict(_changed(tables.get("verdicts", pd.DataFrame())))
    rows = [(*row, changed.get(row[0], "")) for rule in RULES for row in rule(tokens, tables)]
    known = {row[0] for row in rows}
    rows += [
        (code, "verdicts", np.nan, np.nan, f"{EXPLAINED[code]}.", became)
        for code, became in changed.items()
        if code not in known
    ]
    rows.sort(key=lambda row: not row[-1])
    return pd.DataFrame(rows, columns=WARNING_COLUMNS)


def _changed(verdicts: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """(cause, claims with what their verdicts became), for causes that decided one."""
    if not {"reason", "kind", "population"} <= set(verdicts.columns):
        return
    causes = verdicts["reason"].fillna("").map(claims.cause)
    for code, rows in verdicts.groupby(causes, sort=False):
        if code not in ORDINARY:
            yield (
                code,
                "; ".join(
                    f"{claim} ({kind}) is {verdict} [{_listed(some['population'])}:"
                    f" {_listed(some['outcome'])}]"
                    for (claim, kind, verdict), some in rows.groupby(
                        ["claim", "kind", "verdict"], sort=False
                    )
                ),
            )


def _listed(values: Iterable) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _either(names: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`, in words."""
    *first, last = dict.fromkeys(str(name).replace("_", " ") for name in names)
    return f"{', '.join(first)} or {last}" if first else last


def _grouped(names: Iterable[tuple[str, str]]) -> str:
    """`population: outcome, outcome; population: outcome` from pairs of outcome and population."""
    groups: dict[str, list[str]] = {}
    for outcome, population in names:
        groups.setdefault(population, []).append(outcome)
    return "; ".join(f"{name}: {_listed(members)}" for name, members in groups.items())


def _few_prompts(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("coverage", pd.DataFrame())
    few = table[table["effective_prompts"] < FEWEST_PROMPTS] if len(table) else table
    if len(few):
        worst = few.loc[few["effective_prompts"].idxmin()]
        where = _grouped(zip(few["outcome"], few["split"], strict=True))
        yield (
            "few_prompts",
            where,
            worst.effective_prompts,
            FEWEST_PROMPTS,
            (
                f"Intervals were calibrated for {FEWEST_PROMPTS} prompts and more, and here"
                f" {worst.prompts} prompts weigh as much as {worst.effective_prompts:.1f} of equal"
                f" length [{where}]."
            ),
        )


def _undefined_outcomes(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("coverage", pd.DataFrame())
    if not len(table):
        return
    share = table["undefined"] / (table["undefined"] + table["positions"]).clip(lower=1)
    many = table[share > UNDEFINED_SHARE]
    if len(many):
        where = _grouped(zip(many["outcome"], many["split"], strict=True))
        yield (
            "undefined_outcome",
            where,
            float(share.max()),
            UNDEFINED_SHARE,
            f"Up to {share.max():.0%} of the positions have no"
            f" {_either(many['outcome'])} [{where}].",
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
    table = tables.get("saturation", pd.DataFrame())
    flat = table[table["distinct"] <= 1] if len(table) else table
    if len(flat):
        names = _listed(flat["measurement"])
        yield (
            "constant",
            names,
            int(flat["distinct"].min()),
            2,
            (
                "A measurement with one value or none makes every score that rests on it alone"
                f" constant [{names}]."
            ),
        )


def _rare_quadrants(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if not {"student_entropy", "forward_kl"} <= set(tokens):
        return
    quadrant = quadrants(tokens)
    shares = {f"Q{number}": float((quadrant == number).mean()) for number in (1, 2, 3, 4)}
    rare = {name: share for name, share in shares.items() if share < RARE_QUADRANT}
    if rare:
        named = ", ".join(f"{name}: {share:.1%}" for name, share in rare.items())
        yield (
            "rare_quadrant",
            _listed(rare),
            min(rare.values()),
            RARE_QUADRANT,
            f"Few positions lie in a quadrant, and contrasts within it rest on them [{named}].",
        )


def _inflated(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("regressions", pd.DataFrame())
    high = table[table["inflation"] > INFLATED] if len(table) else table
    if len(high):
        where = _grouped(zip(high["term"], high["model"], strict=True))
        yield (
            "collinear",
            where,
            float(high["inflation"].max()),
            INFLATED,
            (
                "Other terms inflate the variance of a coefficient up to"
                f" {high['inflation'].max():.1f} times [{where}]."
            ),
        )


def _unbalanced(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("balance", pd.DataFrame())
    table = table[np.isinf(table["caliper"])] if "caliper" in table else table
    apart = table[table["after"].abs() > IMBALANCE_LIMIT] if len(table) else table
    if len(apart):
        where = _grouped(zip(apart["score"], apart["split"], strict=True))
        worst = float(apart["after"].abs().max())
        yield (
            "unmatched",
            where,
            worst,
            IMBALANCE_LIMIT,
            (
                f"Matched pairs still differ by up to {worst:.2f} standard deviations in what they"
                f" were matched on; no verdict rests on them [{where}]."
            ),
        )


def _no_null(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if "gain" in tokens and "context_gain" not in tokens:
        yield ("no_null", "context_gain", 0, 1, f"{EXPLAINED['no_null']}.")


def _one_step(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if "gain" in tokens and step_count(tokens) < 2:
        yield (
            "one_step",
            "steps",
            1,
            2,
            (
                "One step was taken: intervals say how much other prompts would change a figure,"
                " and leave out how much another step would. Verdicts are exploratory."
            ),
        )


def _unregistered(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    table = tables.get("verdicts", pd.DataFrame())
    if {"primary", "exploratory"} <= set(table.columns):
        ours = table[table["primary"].astype(bool) & (table["population"] != "training")]
        if len(ours) and ours["exploratory"].astype(bool).all():
            why = ours["sentence"].iloc[0].rpartition("Exploratory: ")[2].rstrip(".")
            yield (
                "exploratory",
                "verdicts",
                np.nan,
                np.nan,
                f"No verdict of this table confirms anything: {why}.",
            )


def _dropped(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    shares = {
        name.split("_")[0]: float(tokens[name].mean())
        for name in ("student_dropped_mass", "teacher_dropped_mass")
        if name in tokens and tokens[name].mean() > DROPPED_MASS
    }
    if shares:
        named = ", ".join(f"{name}: {share:.1%}" for name, share in shares.items())
        yield (
            "dropped_mass",
            _listed(shares),
            max(shares.values()),
            DROPPED_MASS,
            f"On average some probability lies outside the shared vocabulary [{named}].",
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


def _no_signal(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    if "forward_kl" not in tokens:
        return
    mean = float(tokens["forward_kl"].mean())
    if mean < SIGNAL:
        yield (
            "no_signal",
            "forward_kl",
            mean,
            SIGNAL,
            (
                f"{EXPLAINED['no_signal']} The mean forward KL is {mean:.1e} nats per position, and"
                " what a step changes is rounding as well."
            ),
        )


def _from_reader(tokens: pd.DataFrame, tables: dict) -> Iterator[tuple]:
    for code, subject, message in tokens.attrs.get("warnings", ()):
        yield code, subject, np.nan, np.nan, message


RULES: tuple[Callable, ...] = (
    _from_reader,
    _no_signal,
    _no_null,
    _one_step,
    _unregistered,
    _few_prompts,
    _undefined_outcomes,
    _saturated,
    _constant,
    _rare_quadrants,
    _inflated,
    _unbalanced,
    _dropped,
    _listed_teacher,
)
