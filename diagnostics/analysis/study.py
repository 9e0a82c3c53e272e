"""The study: every table from one token table, without torch or a model.

    import diagnostics as dx
    tables = dx.analysis.study(dx.read_tokens("tokens.parquet"))
    tables["verdicts"]

What the table's columns do not allow is left out and listed in `left_out` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bounds, claims, correlations, regressions, robustness
from diagnostics.analysis import splits as position_splits
from diagnostics.analysis import warnings as study_warnings
from diagnostics.analysis.correlations import (
    correlate,
    partial_correlations,
    within_prompt_correlations,
)
from diagnostics.analysis.quadrants import (
    balance,
    matching,
    position_means,
    q3_contrast,
    q3_groups,
    quadrant_means,
)
from diagnostics.analysis.regressions import residual_curves
from diagnostics.analysis.robustness import coverage, gain_robustness, saturation
from diagnostics.analysis.splits import OUTCOMES, outcomes, scores, splits
from diagnostics.core.schema import support_column

__all__ = [
    "balance",
    "correlate",
    "coverage",
    "gain_robustness",
    "matching",
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
    "study",
    "within_prompt_correlations",
]

_PLANE = ("student_entropy", "forward_kl")
_Q3 = (*_PLANE, "compatibility")
_CLAIMS = regressions.NEEDS


def study(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    training: pd.DataFrame | None = None,
    losses: Mapping[str, pd.DataFrame] | None = None,
    base_k: int | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table that the token table allows, by file name.

    criteria: those to correlate, None takes all that the columns allow; training: the verdicts of a
    grid of trainings (`validation.verdict_table`), for claim C5; losses: token tables of steps with
    other losses, by loss; base_k: K of the columns without a suffix, None reads it from the table
    (`robustness.known_k`) and warns where nothing tells it. The tables are correlations,
    placebo_excess, differences, partial, within_prompt, quadrants, positions, q3_contrast,
    q3_groups, matching and balance (also within a caliper: ..._caliper), regressions,
    decomposition, residual_curves, support_robustness, gain_robustness, saturation, coverage,
    verdicts, warnings and left_out (columns table, what, why). Raises DiagnosticsError where the
    table holds no outcome, no row or no prompt_id."""
    outcomes(tokens)
    options = {"draws": draws, "level": level, "seed": seed}
    criteria = None if criteria is None else list(criteria)
    tokens, base_k = _with_k(tokens, base_k)
    plan = _plan(tokens, criteria, options, losses, base_k)
    made, left_out = {}, list(_gaps(tokens, base_k, losses, training))
    for needs, make in plan:
        missing = [name for name in needs if name not in tokens]
        for name, table in make(missing).items():
            if table is not None and len(table):
                made[name] = table
            else:
                why = f"no column {', '.join(missing)}" if missing else "nothing in it is defined"
                left_out.append((name, "the whole table", why))
    if training is not None:
        made["verdicts"] = pd.concat(
            [*([made["verdicts"]] if "verdicts" in made else []), claims.of_training(training)],
            ignore_index=True,
        )
    made["warnings"] = study_warnings.warnings(tokens, made)
    made["left_out"] = pd.DataFrame(left_out, columns=["table", "what", "why"])
    return bounds.marked(made, tokens) | (
        {"exactness": bounds.table(tokens)} if bounds.is_listed(tokens) else {}
    )


def _with_k(tokens: pd.DataFrame, stated: int | None) -> tuple[pd.DataFrame, int]:
    """The table and the K of its columns; a table that depends on a K which nothing tells gets a
    warning for it.
    """
    k, dependent = robustness.known_k(tokens, stated), robustness.depends_on_k(tokens)
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


def _plan(
    tokens: pd.DataFrame, criteria: list[str] | None, options: dict, losses, base_k: int
) -> list[tuple[tuple[str, ...], Callable]]:
    """(columns needed, missing columns -> tables by name); a step with missing columns makes
    None.
    """

    def one(name: str, function: Callable, **more) -> Callable:
        return lambda missing: {name: None if missing else function(tokens, **more)}

    def several(names: tuple[str, ...], function: Callable) -> Callable:
        return lambda missing: dict.fromkeys(names) if missing else function()

    return [
        ((), several((), lambda: _correlations(tokens, criteria, **options))),
        (
            position_splits.HELD_COLUMNS,
            one("partial", partial_correlations, criteria=criteria, **options),
        ),
        ((), one("within_prompt", within_prompt_correlations, criteria=criteria, **options)),
        (_PLANE, one("quadrants", quadrant_means, **options)),
        (("position", "response_length"), one("positions", position_means, **options)),
        (_Q3, one("q3_contrast", q3_contrast, **options)),
        (_Q3, one("q3_groups", q3_groups, **options)),
        (_CLAIMS, one("matching", matching, **options)),
        (_CLAIMS, one("balance", balance, seed=options["seed"])),
        (_CLAIMS, one("matching_caliper", matching, caliper=correlations.CALIPER, **options)),
        (
            _CLAIMS,
            one("balance_caliper", balance, caliper=correlations.CALIPER, seed=options["seed"]),
        ),
        (
            _CLAIMS,
            several(
                ("regressions", "decomposition"), lambda: regressions.regressions(tokens, **options)
            ),
        ),
        (_CLAIMS, one("residual_curves", residual_curves, **options)),
        (
            _CLAIMS,
            several(
                ("support_robustness", "verdicts"),
                lambda: _claims(tokens, base_k=base_k, **options),
            ),
        ),
        (_CLAIMS, one("gain_robustness", gain_robustness, losses=losses, **options)),
        ((), one("saturation", saturation)),
        ((), one("coverage", coverage, draws=options["draws"], seed=options["seed"])),
    ]


def _correlations(
    tokens: pd.DataFrame, criteria: list[str] | None, *, draws: int, level: float, seed: int
) -> dict[str, pd.DataFrame]:
    found = correlations.associate(tokens, criteria=criteria, draws=draws, seed=seed)
    return {
        "correlations": correlations.correlation_table(found, level=level),
        "placebo_excess": correlations.placebo_excess(found, level=level),
        "differences": correlations.correlation_differences(found, level=level),
    }


def _claims(
    tokens: pd.DataFrame, *, base_k: int, draws: int, level: float, seed: int
) -> dict[str, pd.DataFrame]:
    found = robustness.findings(tokens, base_k=base_k, draws=draws, seed=seed)
    pairs = balance(tokens, by=["compatibility"], seed=seed)
    pairs = pairs[pairs["replacement"]]
    made = claims.verdicts(
        found,
        level=level,
        placebo=[name for name in OUTCOMES if f"placebo_{name}" in tokens],
        imbalance=pairs["after"].abs().groupby(pairs["split"]).max().to_dict(),
    )
    return {
        "support_robustness": robustness.support_robustness(found, level=level),
        "verdicts": made,
    }


def _gaps(tokens: pd.DataFrame, base_k: int, losses, training) -> Iterator[tuple[str, str, str]]:
    """What the columns do not allow although its table is made."""
    for name in registry.list_criteria().index:
        missing = [need for need in registry.find(name).needs if need not in tokens]
        if missing:
            yield "correlations", f"criterion {name}", f"no column {', '.join(missing)}"
    for outcome in OUTCOMES:
        if outcome not in tokens:
            yield "all", f"outcome {outcome}", f"no column {outcome}"
        elif f"placebo_{outcome}" not in tokens:
            yield "all", f"placebo of {outcome}", f"no column placebo_{outcome}"
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
