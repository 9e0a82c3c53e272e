"""The decision table: which criterion is worth a training run, at what budget, and how surely.

Each criterion at each budget is compared, by prompt and by step batch, with random positions at
that budget, with all positions, and with the fair rivals that were intervened on; `cell_effects`
has the formulas. One row is one cell, horizon and divergence.

| verdict | where |
|---|---|
| better, worse | the interval excludes 0, and so does p after Holm over the horizon's cells |
| no difference shown | the whole interval lies within MARGIN of random's own effect |
| cannot tell | otherwise; a zero-width interval is never a verdict |
| not judged | fewer held-out prompts than the primary choices ask for |

A cell is recommended if it is better than random at the chosen horizon in the loss's own
divergence, was moved by at least two step batches of at least one optimizer step, has no more than
AMBIGUOUS of its selection decided by ties, and is not overfitted; of these, the one whose lower
bound over random is largest. Two things are never recommended: a control (`is_control`), which says
what a criterion may owe its success to, and a criterion that is not told apart from the control
DIVERGENT at its own budget, for then choosing at random where the models differ does as well. One
norm-matched step (horizon 0) orders criteria differently from
training, so that nothing is recommended from it.

The budget counts supervised positions; it saves no forward compute. Where the full loss does better
the sentence says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import holm
from diagnostics.analysis.cell_effects import (
    NO_CELLS,
    Cell,
    CellEffects,
    CellEstimate,
)
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from diagnostics.analysis.power import needed, smallest_detectable
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import by_uncertainty
from diagnostics.criteria import AMBIGUOUS

MARGIN = 0.25
"""Share of random's effect within which two criteria are called level."""
FAIR_RIVALS = ("random_divergent", "position_matched", "token_identity")
DIVERGENT = "random_divergent"
"""The control that a recommended criterion is told apart from, where that was intervened on."""
RIVALS = ("random", "full", *FAIR_RIVALS)
"""What each criterion is compared with: columns over_<rival>, over_<rival>_low and _high."""
LOSS_MEASURE = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "sampled": "reverse_kl",
    "topk_reverse": "reverse_kl",
    "jsd": "js",
}
"""Loss -> the divergence that it lowers, by which its criteria are judged."""
MEASURE_WORDS = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "js": "JS divergence"}
COLUMNS = [
    "criterion",
    "budget",
    "horizon",
    "measure",
    "rollouts",
    "primary",
    "effect",
    "effect_low",
    "effect_high",
    *(f"over_{rival}{end}" for rival in RIVALS for end in ("", "_low", "_high")),
    "error_prompts",
    "error_steps",
    "error_draws",
    "margin",
    "p_value",
    "p_holm",
    "looks",
    "smallest_detectable",
    "prompts_needed",
    "steps_needed",
    "prompts_needed_alone",
    "positions",
    "prompts",
    "steps",
    "ambiguous",
    "overfitted",
    "verdict",
    "reason",
    "recommended",
]


@with_settings(bootstrap=Bootstrap)
def decide(
    effects: pd.DataFrame,
    *,
    horizon: int | None = None,
    loss: str = "reverse_kl",
    choices: PrimaryChoices = PrimaryChoices(),
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Compare every cell of an intervention with random, full and fair rivals.

    Args:
        effects: `interventions.parquet`, see `cell_effects.read_effects`.
        horizon: Optimizer steps after which cells are judged; None takes that of the primary
            choices where the table holds it and its longest horizon otherwise.
        loss: The loss of the steps; cells are judged by the divergence that it lowers.
        choices: The primary choices, of which the horizon and minimum_prompts are used.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per cell, horizon, divergence and kind of rollouts, with columns criterion, budget,
        horizon, measure, rollouts (all; right and wrong where a verifier labels them), primary (the
        rows that are judged), effect (held-out reduction, nats per position; positive is better),
        over_<rival> (paired difference to random, full, random_divergent, position_matched and
        token_identity; NaN where absent), each with _low and _high; error_prompts, error_steps and
        error_draws (the parts of the standard error of over_random), margin (the difference within
        which a cell is level with random), p_value, p_holm (over the looks of its horizon and
        divergence), looks, smallest_detectable (with 80 % power), prompts_needed with steps_needed,
        prompts_needed_alone (with as many step batches; infinite where none suffices), positions,
        prompts, steps (1: the interval carries the prompts alone), ambiguous (share of the
        selection decided by ties), overfitted, verdict, reason (why there is no verdict, or what
        limits one), recommended.

    Raises:
        DiagnosticsError: The table is not one of interventions, holds no selection, lacks the
            horizon or the loss's divergence, or the loss is unknown.
    """
    whole = CellEffects(effects, bootstrap=bootstrap)
    if all(criterion in NO_CELLS for criterion, _, _ in whole.cells):
        raise DiagnosticsError(
            "The intervention table holds no selection, only full steps. Intervene on some criteria"
            " first."
        )
    primary = (_horizon(whole, horizon, choices.horizon), _measure(whole, loss))
    kinds = ("all", "right", "wrong") if "correct" in effects else ("all",)
    rows = [
        row | {"rollouts": kind, "primary": kind == "all" and row["_look"] == primary}
        for kind in kinds
        for part in _parts(effects, kind, whole, bootstrap)
        for row in _rows(part)
    ]
    table = _judged(pd.DataFrame(rows), bootstrap.level, choices.minimum_prompts)
    return _recommended(table)[COLUMNS]


def _parts(
    effects: pd.DataFrame, kind: str, whole: CellEffects, bootstrap: Bootstrap
) -> Iterator[CellEffects]:
    """The effects on one kind of rollouts; none where no held-out prompt has such a rollout."""
    if kind == "all":
        yield whole
    elif effects["correct"].eq(kind == "right").any():
        yield CellEffects(effects, rollouts=kind, bootstrap=bootstrap)


def _horizon(found: CellEffects, horizon: int | None, usual: int) -> int:
    held = sorted({h for _, _, h in found.cells})
    if horizon is None:
        return usual if usual in held else held[-1]
    if horizon not in held:
        raise DiagnosticsError(
            f"The interventions hold no horizon of {horizon} steps; they hold"
            f" {', '.join(map(str, held))}. Name one of these, or intervene with --horizon"
            f" {horizon}."
        )
    return horizon


def _measure(found: CellEffects, loss: str) -> str:
    if loss not in LOSS_MEASURE:
        raise DiagnosticsError(f"Unknown loss {loss!r}. Known are {', '.join(LOSS_MEASURE)}.")
    if LOSS_MEASURE[loss] not in found.measures:
        raise DiagnosticsError(
            f"Cells of the loss {loss} are judged by {LOSS_MEASURE[loss]}, which the interventions"
            f" lack; they hold {', '.join(found.measures)}. Intervene again."
        )
    return LOSS_MEASURE[loss]


def _rows(found: CellEffects) -> Iterator[dict]:
    """One row per cell and divergence, not yet judged."""
    for measure in found.measures:
        overfitted = overfitted_cells(found, measure)
        for cell in found.cells:
            criterion, budget, horizon = cell
            effect = found.effect(cell, measure)
            low, high = effect.interval(found.level)
            yield {
                "criterion": criterion,
                "budget": budget,
                "horizon": horizon,
                "measure": measure,
                "_look": (horizon, measure),
                "effect": effect.value,
                "effect_low": low,
                "effect_high": high,
                **_compared(found, cell, measure, effect),
                "positions": effect.positions,
                "prompts": effect.prompts,
                "steps": effect.steps,
                "ambiguous": found.fact(cell, "ambiguous"),
                "overfitted": cell in overfitted,
            }


def _compared(found: CellEffects, cell: Cell, measure: str, effect: CellEstimate) -> dict:
    """Differences to every rival, and what the difference to random needs and could show."""
    criterion, budget, horizon = cell
    row: dict = {}
    for rival in RIVALS:
        other = (rival, 1.0 if rival == "full" else budget, horizon)
        if rival == criterion or other not in found:
            continue
        theirs = found.effect(other, measure)
        difference = effect - theirs
        low, high = difference.interval(found.level)
        row |= {f"over_{rival}": difference.value, f"over_{rival}_low": low}
        row |= {f"over_{rival}_high": high}
        if rival == "random":
            row |= _over_random(difference, theirs, found.level)
    return row


def _over_random(difference: CellEstimate, random: CellEstimate, level: float) -> dict:
    design = needed(difference, level=level)
    return {
        "error_prompts": difference.prompt_error,
        "error_steps": difference.step_error if difference.steps > 1 else np.nan,
        "error_draws": difference.draw_error,
        "margin": MARGIN * random.value if random.value > 0 else np.nan,
        "p_value": difference.p_value,
        "smallest_detectable": smallest_detectable(difference, level=level),
        "prompts_needed": design.prompts,
        "steps_needed": design.steps,
        "prompts_needed_alone": design.prompts_alone,
    }


def overfitted_cells(found: CellEffects, measure: str) -> set[Cell]:
    """Cells beyond the horizon up to which the step batches' drop carries over to held-out prompts.

    Args:
        found: The cells of an intervention.
        measure: The divergence.

    Returns:
        The cells of a trajectory whose held-out reduction is below one of an earlier horizon while
        the reduction on the step batches is above that of the horizon before.
    """
    curves: dict[tuple[str, float], list[int]] = {}
    for criterion, budget, horizon in found.cells:
        if horizon > 0:
            curves.setdefault((criterion, budget), []).append(horizon)
    over = set()
    for (criterion, budget), horizons in curves.items():
        cells = [(criterion, budget, horizon) for horizon in sorted(horizons)]
        held = [found.effect(cell, measure).value for cell in cells]
        step = [found.on_step(cell, measure) for cell in cells]
        over |= {cell for cell, beyond in zip(cells, beyond_best(held, step)) if beyond}
    return over


def beyond_best(held_out: list[float], on_step: list[float]) -> list[bool]:
    """Where a curve over horizons is overfitted.

    Args:
        held_out: Reduction at held-out positions at each horizon, from short to long.
        on_step: The same at the step batches' positions.

    Returns:
        True where the held-out reduction is below one of an earlier horizon and the step batches'
        is above that of the horizon before; NaN is neither.
    """
    return [
        k > 0 and held_out[k] < np.max(held_out[:k]) and on_step[k] > on_step[k - 1]
        for k in range(len(held_out))
    ]


def _judged(table: pd.DataFrame, level: float, fewest: int) -> pd.DataFrame:
    """The table with p values after Holm, verdicts and reasons."""
    table = table.reindex(columns=[*dict.fromkeys([*table, *COLUMNS])])
    numbers = [name for name in COLUMNS if name.startswith(("over_", "error_", "p_"))]
    table = table.astype(dict.fromkeys(numbers, float))
    family = table.groupby(["horizon", "measure", "rollouts"], sort=False)["p_value"]
    table["p_holm"] = family.transform(lambda p: holm(p.to_numpy(dtype=float)))
    table["looks"] = family.transform("count")
    found = [_verdict(row, level, fewest) for row in table.to_dict("records")]
    return table.assign(verdict=[v for v, _ in found], reason=[reason for _, reason in found])


def _verdict(row: Mapping, level: float, fewest: int) -> tuple[str, str]:
    """A verdict on a cell against random, and what stands against it or limits it."""
    if row["criterion"] in ("random", *NO_CELLS):
        return "", ""
    if np.isnan(row["over_random"]):
        return "not judged", "no random selection of this budget to compare with"
    if row["prompts"] < fewest:
        return "not judged", f"{row['prompts']} held-out prompts of at least {fewest}"
    low, high = row["over_random_low"], row["over_random_high"]
    if not high > low:
        why = "one random selection, whose spread is unknown" if np.isnan(low) else "zero width"
        return "cannot tell", f"no interval: {why}"
    return _of_interval(row, low, high, level), _limits(row)


def _of_interval(row: Mapping, low: float, high: float, level: float) -> str:
    if row["p_holm"] < 1 - level and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    level_with_random = -row["margin"] <= low and high <= row["margin"]
    return "no difference shown" if level_with_random else "cannot tell"


def _limits(row: Mapping) -> str:
    """What a reader must know of a verdict's interval or cell."""
    limits = []
    if row["steps"] < 2:
        limits.append("prompts alone: one step batch")
    if row["horizon"] == 0:
        limits.append("one step does not foresee training")
    if row["ambiguous"] > AMBIGUOUS:
        limits.append(f"ties decide {row['ambiguous']:.0%} of the selection")
    if row["overfitted"]:
        limits.append("beyond the horizon where the bank is overfitted")
    return "; ".join(limits)


def is_control(name: str) -> bool:
    """Whether a criterion only shows what others may owe their success to.

    Args:
        name: A fair rival, `random`, or a registered criterion; the note of a control begins so.
    """
    if name in ("random", *FAIR_RIVALS):
        return True
    return name in registry.names() and registry.find(name).note.startswith("the control")


def _could_be_named(table: pd.DataFrame) -> pd.Series:
    """Cells of criteria that are no controls and, where it is there, are told from DIVERGENT."""
    low = table.get(f"over_{DIVERGENT}_low", pd.Series(np.nan, table.index)).astype(float)
    return ~table["criterion"].map(is_control) & ~(low <= 0)


def _recommended(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the one cell to train with marked, if there is one."""
    fit = table["primary"] & (table["verdict"] == "better") & (table["reason"] == "")
    fit &= _could_be_named(table)
    best = table.loc[fit, "over_random_low"]
    chosen = best.idxmax() if len(best) else None
    return table.assign(recommended=[index == chosen for index in table.index])


def decision_sentence(table: pd.DataFrame) -> str:
    """The decision table in words.

    Args:
        table: As `decide` returns it, or read back from decision.csv.

    Returns:
        One to three sentences: the cell to train with and by how much it is better, or why there is
        none and how many prompts more would tell. The number after +- is half the interval.
    """
    primary = table["primary"].astype(bool)
    judged = table[primary & ~table["criterion"].isin(["random", *NO_CELLS])]
    judged = judged.assign(reason=judged["reason"].astype(object).fillna(""))
    # An earlier version could recommend a control.
    chosen = judged[judged["recommended"].astype(bool) & ~judged["criterion"].map(is_control)]
    if len(chosen):
        row = chosen.iloc[0].to_dict()
        return " ".join([f"{_opening(row, judged)} {_gain(row)}.", *_beside(row, judged)])
    return _undecided(judged)


OF_REGISTERED = {
    "better": "better than random",
    "worse": "worse than random",
    "no difference shown": "no difference to random shown",
    "cannot tell": "not told apart from random",
}
"""What a verdict says of the registered cell, after its number."""


def registered_sentence(table: pd.DataFrame, criterion: str, budget: float) -> str:
    """What the registered cell did, where the decision names another one or none.

    Args:
        table: As `decide` returns it, or read back from decision.csv.
        criterion: The registered criterion.
        budget: Its registered budget.

    Returns:
        One sentence with the unit of `decision_sentence`; empty where that sentence names the cell
        already, or judges nothing.
    """
    judged = table[table["primary"].astype(bool) & ~table["criterion"].isin(["random", *NO_CELLS])]
    name = named_cell({"criterion": criterion, "budget": budget})
    said = decision_sentence(table)
    if judged.empty or (judged["verdict"] == "not judged").all() or f"{name}:" in said:
        return ""
    same = (judged["criterion"] == criterion) & np.isclose(judged["budget"].astype(float), budget)
    if not same.any():
        return f"The registered choice, {name}, was not intervened on."
    row = judged[same].iloc[0].to_dict()
    verdict = OF_REGISTERED.get(row["verdict"], row["verdict"])
    if row["verdict"] == "cannot tell" and (
        row["over_random_low"] > 0 or row["over_random_high"] < 0
    ):
        verdict += f" after Holm's correction for {row['looks']:g} looks"
    return f"The registered choice, {name}: {_over_random_words(row)}, {verdict}."


def _opening(row: Mapping, judged: pd.DataFrame) -> str:
    """The sentence's first words: a selection that is behind all positions is no first choice."""
    if row["over_full_high"] < 0 and not (judged["over_full_low"] > 0).any():
        return "All positions do best; where a selection is wanted, train with"
    return "Train with"


def _undecided(judged: pd.DataFrame) -> str:
    """Why nothing is recommended, from the causes that hold for all cells to those of one."""
    if judged.empty or (judged["verdict"] == "not judged").all():
        reasons = "; ".join(dict.fromkeys(judged["reason"])) or "no criterion was intervened on"
        return f"No decision: {reasons}."
    if (judged["horizon"] == 0).all():
        return (
            "No decision: one step of matched norm does not foresee training. Intervene with a"
            " horizon."
        )
    if (judged["steps"] < 2).all():
        return (
            "No decision: there is one step batch, and its intervals carry the prompts alone."
            " Intervene on several folds."
        )
    better = judged[judged["verdict"] == "better"].sort_values("over_random_low", ascending=False)
    if (better["reason"] == "").any():
        return _no_better_than_a_control(better[better["reason"] == ""])
    barred = better[~better["criterion"].map(is_control)]
    if len(barred):
        row = barred.iloc[0].to_dict()
        return f"No criterion can be recommended: {_gain(row)}, but {row['reason']}."
    return _cannot_tell(judged[~judged["criterion"].map(is_control)])


def _no_better_than_a_control(better: pd.DataFrame) -> str:
    """Why none of the cells that are better than random is recommended, the best of them first."""
    control = better["criterion"].map(is_control)
    row = (better if control.all() else better[~control]).iloc[0].to_dict()
    if control.all() and row["criterion"] != DIVERGENT:
        return f"No criterion is better than random positions; a control alone is: {_gain(row)}."
    text = "No criterion is told apart from choosing at random among divergent positions:"
    if control.all():
        return f"{text} {_gain(row)}."
    value, low, high = (row[f"over_{DIVERGENT}{end}"] for end in ("", "_low", "_high"))
    return f"{text} {_gain(row)}, but {_spanned(value, low, high, sign=True)} over {DIVERGENT}."


def _cannot_tell(judged: pd.DataFrame) -> str:
    open_cells = judged[(judged["verdict"] == "cannot tell") & (judged["over_random"] > 0)]
    if open_cells.empty:
        counts = judged["verdict"].value_counts()
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return f"No criterion is above random positions at any budget ({words})."
    row = open_cells.sort_values(["prompts_needed", "over_random"]).iloc[0].to_dict()
    return f"Cannot tell: {_gain(row)}; {_more(row)}."


def _more(row: Mapping) -> str:
    """What a design that could tell needs more than this one."""
    more = row["prompts_needed"] - row["prompts"]
    if not np.isfinite(more):
        return "no design of a million prompts would show a difference so small"
    if more <= 0:
        return f"it is not shown after Holm's correction for {row['looks']:g} looks"
    return (
        f"{more:,.0f} prompts more, {row['prompts_needed']:,.0f} in"
        f" {row['steps_needed']:.0f} step batches, would show such a difference with 80 % power"
    )


def named_cell(row: Mapping) -> str:
    """A criterion at a budget, as sentences name a cell."""
    return f"{row['criterion']} at {100 * row['budget']:g} %"


def _spanned(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A difference with its interval, all three with the digits that half of it allows."""
    half = (high - low) / 2
    ends = f"[{by_uncertainty(low, half)}, {by_uncertainty(high, half)}]"
    return f"{by_uncertainty(value, half, sign=sign)} {ends}"


def _over_random_words(row: Mapping) -> str:
    """The difference to random with half its interval."""
    half = (row["over_random_high"] - row["over_random_low"]) / 2
    return f"{by_uncertainty(row['over_random'], half, sign=True)} ± {by_uncertainty(half, half)}"


def _gain(row: Mapping) -> str:
    steps = f"{row['horizon']:g} step" + ("s" if row["horizon"] != 1 else "")
    return (
        f"{named_cell(row)}: {_over_random_words(row)} nats of {MEASURE_WORDS[row['measure']]}"
        f" per position over random after {steps}"
        f" ({row['prompts']:g} prompts, {row['steps']:g} step batches)"
    )


def _beside(row: Mapping, judged: pd.DataFrame) -> Iterator[str]:
    """How the recommended cell stands against all positions, other cells and fair rivals."""
    full, low, high = (row[f"over_full{end}"] for end in ("", "_low", "_high"))
    if high < 0:
        yield f"All positions lower it by {_spanned(-full, -high, -low)} more."
    elif np.isfinite(full):
        side = "more than" if low > 0 else "not told apart from"
        shown = _spanned(full, low, high, sign=True)
        yield f"That is {side} with all positions (difference {shown})."
    others = _as_good(row, judged)
    if others:
        lie = "lie" if len(others) > 1 else "lies"
        yield f"Within its interval {lie} {' and '.join(others)}: which is best is not identified."
    level = [rival for rival in FAIR_RIVALS if row[f"over_{rival}_low"] <= 0]
    if level:
        yield f"It is not shown to be better than {' and '.join(level)}."


def _as_good(row: Mapping, judged: pd.DataFrame) -> list[str]:
    """The two best other cells, better than random and no controls, within a cell's interval."""
    rest = judged[(judged["verdict"] == "better") & ~judged["criterion"].map(is_control)]
    same = (rest["criterion"] == row["criterion"]) & (rest["budget"] == row["budget"])
    rest = rest[~same & (rest["over_random"] >= row["over_random_low"])]
    best = rest.sort_values("over_random", ascending=False, kind="stable").head(2)
    return [named_cell(r) for r in best.to_dict("records")]
