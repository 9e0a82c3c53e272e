"""The study: every table from one token table, without torch or a model.

    import diagnostics as dx
    tables = dx.study(dx.read_tokens("tokens.parquet"))
    tables["verdicts"]

A table that the token table's columns do not allow is left out and listed in `left_out` with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bounds, claims, correlations, regressions, robustness
from diagnostics.analysis import splits as position_splits
from diagnostics.analysis import warnings as study_warnings
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from diagnostics.analysis.correlations import (
    correlate,
    partial_correlations,
    within_prompt_correlations,
)
from diagnostics.analysis.prompt_groups import groups_of, studied
from diagnostics.analysis.quadrants import (
    balance,
    matching,
    position_means,
    q3_contrast,
    q3_groups,
    q3_tables,
    quadrant_means,
)
from diagnostics.analysis.regressions import residual_curves
from diagnostics.analysis.responses import ALL, of_responses
from diagnostics.analysis.robustness import coverage, gain_robustness, saturation
from diagnostics.analysis.splits import (
    NULL_OUTCOME,
    STUDY_OUTCOMES,
    outcomes,
    scores,
    splits,
)
from diagnostics.analysis.strata import null_share, strata
from diagnostics.core.folds import step_count
from diagnostics.core.inputs import several, takes, token_table
from diagnostics.core.processes import share_out
from diagnostics.core.progress import progress
from diagnostics.core.schema import column, support_column
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import Tables

__all__ = [
    "balance",
    "correlate",
    "coverage",
    "gain_robustness",
    "matching",
    "null_share",
    "outcomes",
    "partial_correlations",
    "position_means",
    "q3_contrast",
    "q3_groups",
    "quadrant_means",
    "residual_curves",
    "saturation",
    "scores",
    "splits",
    "strata",
    "study",
    "within_prompt_correlations",
]

_QUADRANT_COLUMNS = ("student_entropy", "forward_kl")
_Q3_COLUMNS = (*_QUADRANT_COLUMNS, "compatibility")
_CLAIM_COLUMNS = regressions.REGRESSION_COLUMNS
_CORRELATION_TABLES = ("correlations", "differences")
_Q3_TABLES = ("q3_contrast", "q3_groups")
_REGRESSION_TABLES = ("regressions", "decomposition")
_CLAIM_TABLES = ("verdicts", "claim_statistics", "support_robustness")
LONGEST = ("verdicts", "gain_robustness", "correlations", "regressions")
"""First tables of the steps that take most of the time."""
SHARED = 1_000
"""Positions from which on a study is shared out among processes."""
SUPPORT_STATISTICS = ("q3_gap", "overlap_contrast", "interaction")
"""Statistics of the claims that are computed for other K and other measurements too."""


@takes(tokens=token_table, criteria=several)
@with_settings(bootstrap=Bootstrap)
def study(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    training: pd.DataFrame | None = None,
    losses: Mapping[str, pd.DataFrame] | None = None,
    base_k: int | None = None,
    choices: PrimaryChoices = PrimaryChoices(),
    registered: str | None = None,
    responses: str = ALL,
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """Make every table that the token table allows.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Criteria to correlate; None takes all that the columns allow.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        training: Verdicts of a grid of trainings (`training_outcomes.verdict_table`), for claim C5.
        losses: Token tables of steps with other losses on the same bank, by loss.
        base_k: K of the columns without a suffix; None reads it from the table
            (`robustness.known_k`) and warns where it is not known.
        choices: What is concluded from; anything else is exploratory.
        registered: The hash of the choices as it was recorded before the probe; None where none
            was, and then every verdict is exploratory.
        responses: `all`, or the `right` or `wrong` ones alone, as the column `correct` says
            (`responses`); every verdict on a side is exploratory.
        settings: Fields of `bootstrap`.

    Returns:
        Tables by file name: correlations, differences, partial, quadrants, positions, q3_contrast,
        q3_groups, matching, balance, strata, null_share, regressions, decomposition,
        residual_curves, verdicts, claim_statistics, support_robustness, gain_robustness,
        saturation, coverage, warnings and left_out (columns table, what, why), and exactness for
        a top-K teacher.

    Raises:
        DiagnosticsError: If the table holds no outcome, no row or no prompt_id, or `base_k`
            contradicts its columns; or it has no response of the kind that is asked for.

    Reference:
        arXiv 2605.26844 (the claims and the released analysis).
    """
    outcomes(tokens)
    tokens = of_responses(tokens, responses)
    losses = {name: of_responses(table, responses) for name, table in (losses or {}).items()}
    criteria = None if criteria is None else list(criteria)
    tokens, base_k = _with_k(studied(tokens, bootstrap.seed), base_k)
    losses = {name: studied(table, bootstrap.seed) for name, table in losses.items()}
    primary = {"choices": choices, "registered": registered, "responses": responses}
    steps = _plan(tokens, criteria, bootstrap, losses, base_k, primary)
    groups_of(tokens, bootstrap.seed)  # once, so that the copies of this process share them
    made, absent = _made(steps, tokens, None if len(tokens) >= SHARED else 1)
    left_out = [*_gaps(tokens, base_k, losses, training), *absent]
    if training is not None:
        verdicts = [made["verdicts"]] if "verdicts" in made else []
        verdicts.append(claims.of_training(training))
        made["verdicts"] = pd.concat(verdicts, ignore_index=True)
    made["warnings"] = study_warnings.warnings(tokens, made)
    made["left_out"] = pd.DataFrame(left_out, columns=["table", "what", "why"])
    exact = {"exactness": bounds.exactness_table(tokens)} if bounds.is_listed(tokens) else {}
    return Tables(bounds.marked(made, tokens) | exact)


def _made(
    steps: Sequence[_Step], tokens: pd.DataFrame, workers: int | None
) -> tuple[dict[str, pd.DataFrame], list[tuple[str, str, str]]]:
    """The tables of the steps in their order, and (table, part, reason) for each that is left out.

    They are made in several processes, longest first.
    """
    known = {step.names[0]: step for step in steps}
    names = sorted(known, key=lambda name: (*LONGEST, name).index(name))
    with progress(total=len(names), description="tables", unit=" tables") as bar:
        found = share_out(names, lambda name: known[name].tables(tokens), workers, tell=bar.update)
    made, left_out = {}, []
    for step in steps:
        missing = step.missing(tokens)
        for name, table in found[step.names[0]].items():
            if table is not None and len(table):
                made[name] = table
                continue
            why = f"no column {', '.join(missing)}" if missing else "nothing in it is defined"
            left_out.append((name, "the whole table", why))
    return made, left_out


def _with_k(tokens: pd.DataFrame, stated: int | None) -> tuple[pd.DataFrame, int]:
    """The table and the K of its columns; a table that depends on an unknown K gets a warning for
    it.
    """
    k = robustness.known_k(tokens, stated)
    dependent = robustness.depends_on_k(tokens)
    if k is None and dependent:
        tokens = tokens.copy()
        tokens.attrs["warnings"] = [
            *tokens.attrs.get("warnings", ()),
            [
                "unknown_k",
                ", ".join(dependent),
                (
                    f"Nothing says at which K these columns were measured; K = {robustness.BASE_K}"
                    " is written for it. Pass base_k, or --k."
                ),
            ],
        ]
    return tokens, robustness.BASE_K if k is None else k


@dataclass(frozen=True)
class _Step:
    """Some tables of the study, the columns that they need, and how they are made."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    make: Callable[[], dict[str, pd.DataFrame]]

    def missing(self, tokens: pd.DataFrame) -> list[str]:
        """The columns that the table lacks."""
        return [name for name in self.needs if name not in tokens]

    def tables(self, tokens: pd.DataFrame) -> Mapping[str, pd.DataFrame | None]:
        """The tables by name; None for each where columns are missing."""
        return dict.fromkeys(self.names) if self.missing(tokens) else self.make()


def _plan(
    tokens: pd.DataFrame,
    criteria: list[str] | None,
    bootstrap: Bootstrap,
    losses,
    base_k: int,
    primary: Mapping[str, Any],
) -> list[_Step]:
    """The steps of the study in the order of its tables."""
    scored = {"criteria": criteria, "bootstrap": bootstrap}
    drawn = {"bootstrap": bootstrap}
    seeded, of_k = {"seed": bootstrap.seed}, {"base_k": base_k}

    def one(name: str, needs: tuple[str, ...], function: Callable, **options) -> _Step:
        return _Step((name,), needs, lambda: {name: function(tokens, **options)})

    def several(names: tuple[str, ...], needs: tuple[str, ...], function: Callable, **options):
        return _Step(names, needs, lambda: function(tokens, **options))

    return [
        several(_CORRELATION_TABLES, (), _correlations, **scored),
        one("partial", position_splits.HELD_COLUMNS, partial_correlations, **scored),
        one("quadrants", _QUADRANT_COLUMNS, quadrant_means, **drawn),
        one("positions", ("position", "response_length"), position_means, **drawn),
        several(_Q3_TABLES, _Q3_COLUMNS, q3_tables, **drawn),
        one("matching", _CLAIM_COLUMNS, matching, **drawn),
        one("balance", _CLAIM_COLUMNS, balance, **seeded),
        one("strata", ("forward_kl", "gain"), strata, **drawn),
        one("null_share", (*_QUADRANT_COLUMNS, "gain", NULL_OUTCOME), null_share, **drawn),
        several(_REGRESSION_TABLES, _CLAIM_COLUMNS, regressions.regressions, **drawn),
        one("residual_curves", _CLAIM_COLUMNS, residual_curves, **drawn),
        several(_CLAIM_TABLES, _CLAIM_COLUMNS, _claims, **of_k, **primary, **drawn),
        one("gain_robustness", _CLAIM_COLUMNS, gain_robustness, losses=losses, **of_k, **drawn),
        one("saturation", (), saturation),
        one("coverage", (), coverage, **drawn),
    ]


def _correlations(
    tokens: pd.DataFrame, *, criteria: list[str] | None, bootstrap: Bootstrap
) -> dict[str, pd.DataFrame]:
    found = correlations.associate(tokens, criteria=criteria, bootstrap=bootstrap)
    return {
        "correlations": correlations.correlation_table(found, level=bootstrap.level),
        "differences": correlations.correlation_differences(found, level=bootstrap.level),
    }


def _claims(
    tokens: pd.DataFrame,
    *,
    base_k: int,
    bootstrap: Bootstrap,
    **primary: Any,
) -> dict[str, pd.DataFrame]:
    made = claims.claim_tables(tokens, base_k=base_k, bootstrap=bootstrap, **primary)
    return made | {"support_robustness": _by_support(made["claim_statistics"])}


def _by_support(statistics: pd.DataFrame) -> pd.DataFrame:
    """The statistics of C2 and C3 with every K and every measurement in the place of C."""
    rows = statistics[statistics["statistic"].isin(SUPPORT_STATISTICS)]
    wide = rows.groupby(["population", "outcome", "statistic"])["proxy"].transform("size") > 1
    return (
        rows[wide]
        .rename(columns={"population": "split"})
        .drop(columns="claim")
        .reset_index(drop=True)
    )


def _on_request(name: str) -> bool:
    """Whether a column is measured only where it is asked for, so that nobody misses it."""
    known = column(name)
    return known is not None and bool(known.on_request)


def _gaps(tokens: pd.DataFrame, base_k: int, losses, training) -> Iterator[tuple[str, str, str]]:
    """(table, part, reason) for each part that is left out of a table for want of columns."""
    for name in registry.names():
        missing = registry.missing_columns(tokens, name)
        if missing and not all(_on_request(each) for each in missing):
            yield "correlations", f"criterion {name}", f"no column {', '.join(missing)}"
    for outcome in STUDY_OUTCOMES:
        if outcome not in tokens:
            yield "all", f"outcome {outcome}", f"no column {outcome}"
    if NULL_OUTCOME not in tokens:
        yield "all", "the null of a permuted teacher", f"no column {NULL_OUTCOME}"
    if "first_order_gain" not in tokens:
        yield "strata", "how linear the step was", "no column first_order_gain"
    if step_count(tokens) < 2:
        yield "all", "the step batches' part of intervals", "no columns fold and gain_fold<f>"
        if "split" not in tokens or not {"step", "held_out"} <= set(tokens["split"]):
            yield "all", "step and held-out positions apart", "no column split with both"
    for k in robustness.SUPPORTS:
        if k != base_k and support_column("compatibility", k) not in tokens:
            yield (
                "support_robustness",
                f"K = {k}",
                f"no column {support_column('compatibility', k)}",
            )
    for proxy in robustness.PROXIES:
        if proxy not in tokens:
            yield "support_robustness", f"proxy {proxy}", f"no column {proxy}"
    if "is_special" not in tokens:
        yield "gain_robustness", "without special tokens", "no column is_special"
    if "teacher_entropy" not in tokens:
        yield "regressions", "teacher entropy as a term", "no column teacher_entropy"
    if not losses:
        yield (
            "gain_robustness",
            "other losses",
            "no token tables of steps with other losses were given",
        )
    if training is None:
        yield "verdicts", "claim C5", "no training results were given"
