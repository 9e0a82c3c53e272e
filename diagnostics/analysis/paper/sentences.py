"""Why a released number and a controlled one differ, in one sentence with its numbers.

A sentence names what the released statistic takes from the outcome or leaves to chance (Q3 by the
trained student's entropy, ties, a gap in the place of a mean), then compares sign and interval, and
says why a number is missing. Every number in it comes from the tables or from the positions
themselves. Intervals are compared only from `FEWEST_PROMPTS` prompts on, and never where one has no
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.config import FEWEST_PROMPTS
from diagnostics.analysis.paper.bank import released_gain
from diagnostics.analysis.paper.sample import KEYS, mean_of, samples
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import RELATIVE_FLOOR

Numbers = Mapping[tuple, Mapping[str, Any]]
"""Rows of a final table by row, quantity, K and budget; -1 stands for an undefined K or budget."""
AFTER_ENTROPY = "student_entropy_after"
BY_OUTCOME = ("Table 1", "Figure 3C", "Figure 5A", "Table 2", "Table 7", "Figure 3B", "Table 10")
"""Artefacts whose released Q3 is chosen by the trained student's entropy."""
TRAINED = ("Table 2", "Table 7", "Figure 3B", "Table 10")
OF_SELECTORS = ("Table 8", "Figure 4A", "Figure 4B")
USES_C = ("q3_compatibility", "q3_teachability_first", "teachability", "incompatible")
"""Selectors that read C, which is the trained student's as released."""
OURS = {
    "overlap": "the share of the top third with a partner within the caliper says how far the two"
    " thirds can be compared; the scripts match without a caliper",
    "mean gain minus random": "the scripts print no difference to random positions",
    "mean gain (seen)": "the scripts do not tell contexts that the training saw from others",
}
"""Quantities that no released script computes, and why they stand here."""


@dataclass(frozen=True)
class Facts:
    """What the sentences say of a bank.

    Attributes:
        kind: Which positions the controlled numbers are of: `unseen`, `seen`, `all`, `held_out`.
        positions: Number of those positions.
        prompts: Number of their prompts.
        q3: Positions of Q3 by the trained student's entropy; None where it was not measured.
        q3_by_outcome: Those of them that are not in Q3 by the untrained student's.
        small: Share of the positions whose KL is below 1e-3 nats.
        small_gain: Their share of the sum of |G|, the relative gain without a floor.
        lacking: Why an outcome is missing, by `checkpoint`, `context` and `released`.
    """

    kind: str = "all"
    positions: int = 0
    prompts: int = 0
    q3: int | None = None
    q3_by_outcome: int = 0
    small: float = np.nan
    small_gain: float = np.nan
    lacking: Mapping[str, str] = field(default_factory=dict)


def facts(tokens: pd.DataFrame, lacking: Mapping[str, str]) -> Facts:
    """Count what the sentences need.

    Args:
        tokens: A token table, one row per response position.
        lacking: Why an outcome is missing, by its name.
    """
    made = samples(tokens)
    kept = tokens[made[0].mask] if made else tokens
    q3, by_outcome = _q3_by_outcome(tokens)
    return Facts(
        made[0].kind if made else "all",
        len(kept),
        kept["prompt_id"].nunique(),
        q3,
        by_outcome,
        *_small(tokens),
        lacking,
    )


def _q3_by_outcome(tokens: pd.DataFrame) -> tuple[int | None, int]:
    """Positions of Q3 by the trained student's entropy, and those of them that only it puts there."""
    if AFTER_ENTROPY not in tokens:
        return None, 0
    columns = ["student_entropy", "forward_kl"]
    before = registry.quadrants(tokens[columns]) == 3
    trained = tokens[columns].assign(student_entropy=tokens[AFTER_ENTROPY])
    after = registry.quadrants(trained) == 3
    return int(after.sum()), int((after & ~before).sum())


def _small(tokens: pd.DataFrame) -> tuple[float, float]:
    """Share of positions below the floor of the relative gain, and of the sum of |G|."""
    try:
        size = np.abs(released_gain(tokens))
    except DiagnosticsError:
        return np.nan, np.nan
    defined = np.isfinite(size)
    small = tokens["forward_kl"].to_numpy(dtype=np.float64)[defined] < RELATIVE_FLOOR
    total = size[defined].sum()
    if not len(small) or not total > 0:
        return np.nan, np.nan
    return float(small.mean()), float(size[defined][small].sum() / total)


# --- words


def number(value: float) -> str:
    """A number with three significant digits."""
    return "undefined" if not np.isfinite(value) else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in percent, with a digit behind the point below 10 %."""
    if not np.isfinite(share):
        return "an undefined share"
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def with_interval(row: Mapping[str, Any], side: str) -> str:
    """`.074 [.044, .104]`; the number alone where the interval is undefined."""
    value, low, high = (float(row[f"{side}{end}"]) for end in ("", "_low", "_high"))
    if not np.isfinite([low, high]).all():
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def sentence(clauses: Iterable[str]) -> str:
    """Clauses as one sentence; empty without any."""
    text = "; ".join(clause for clause in clauses if clause)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def units(unit: str) -> tuple[str, str]:
    """The released and the controlled unit of `<released>; <controlled>`."""
    first, _, second = unit.partition("; ")
    return first, second or first


# --- parts of a sentence


def excludes_zero(row: Mapping[str, Any], side: str) -> bool | None:
    """Whether an interval excludes 0; None where it is undefined or has no width."""
    low, high = float(row[f"{side}_low"]), float(row[f"{side}_high"])
    return None if not high > low else bool(low > 0 or high < 0)


def signs(row: Mapping[str, Any]) -> str:
    """Whether the sign turns between released and controlled."""
    one, other = float(row["released"]), float(row["controlled"])
    if not np.isfinite([one, other]).all() or one == 0 or other == 0:
        return ""
    if (one > 0) != (other > 0):
        return f"the sign turns, from {number(one)} to {number(other)}"
    first, second = units(row["unit"])
    if first != second:
        return "the sign stays"
    return f"the sign stays and the size changes by a factor of {number(other / one)}"


def intervals(row: Mapping[str, Any]) -> str:
    """Whether the two intervals agree about 0."""
    own, prompts = excludes_zero(row, "controlled"), int(row["controlled_prompts"])
    if not np.isfinite(row["controlled"]) or own is None:
        return ""
    if prompts < FEWEST_PROMPTS:
        return f"{prompts} prompts are too few for a verdict, which needs {FEWEST_PROMPTS}"
    ends = f"[{number(row['controlled_low'])}, {number(row['controlled_high'])}]"
    own_words = f"the t interval over {prompts} prompts, {ends}, {_of_zero(own)}"
    theirs = excludes_zero(row, "released")
    if theirs is None:
        return own_words
    join = "both the released interval and" if theirs == own else "the released interval"
    if theirs == own:
        return f"{join} {own_words.replace('holds 0', 'hold 0').replace('excludes 0', 'exclude 0')}"
    return f"{join} {_of_zero(theirs)}, and {own_words}"


def _of_zero(excludes: bool) -> str:
    return "excludes 0" if excludes else "holds 0"


def context(row: Mapping[str, Any], known: Facts) -> str:
    """What the context gain says, or why there is none."""
    if not np.isfinite(row["context"]):
        why = known.lacking.get("context", "it is undefined here")
        return f"no context gain: {why}"
    excluded = excludes_zero(row, "context")
    words = f"of the context gain it is {with_interval(row, 'context')}"
    if excluded is None or int(row["context_prompts"]) < FEWEST_PROMPTS:
        return words
    return f"{words}, which {_of_zero(excluded)}"


def population(known: Facts) -> str:
    """Why the controlled numbers are not of unseen contexts."""
    return {
        "all": "over all contexts, since it is not known which the training saw",
        "seen": "over all contexts, since the training saw every one",
    }.get(known.kind, "")


def by_outcome(known: Facts) -> str:
    """How far the trained student's entropy chooses Q3."""
    if known.q3 is None:
        return ""
    return (
        f"{known.q3_by_outcome} of {known.q3} positions of Q3 are in it only by the trained"
        " student's entropy"
    )


def small_divergences(known: Facts) -> str:
    """How far the relative gain is that of positions at which nothing is to be learned."""
    if not np.isfinite(known.small_gain):
        return ""
    return (
        f"positions with a KL below {RELATIVE_FLOOR:g} nats are {percent(known.small)} of the bank"
        f" and {percent(known.small_gain)} of the sum of the relative gain's sizes"
    )


def no_mean(key: tuple, numbers: Numbers) -> str:
    """That a gap after training is no mean reduction, with the mean reduction."""
    row, _, k, budget = key
    mean = numbers.get((row, "mean gain", k, budget))
    if mean is None or not np.isfinite(mean["controlled"]):
        return "the statistic is the Q3 gap and no mean reduction"
    words = (
        "the statistic is the Q3 gap; the mean reduction is"
        f" {with_interval(mean, 'controlled')} nats"
    )
    against = numbers.get((row, "mean gain minus random", k, budget))
    if against is None or not np.isfinite(against["controlled"]):
        return words
    value = float(against["controlled"])
    return f"{words}, {number(abs(value))} {'more' if value >= 0 else 'less'} than random's"


def ties(key: tuple, numbers: Numbers) -> str:
    """How much of a released selection is a tied block, and what its mean could be."""
    row, _, k, budget = key
    share, least, greatest = (
        float(numbers.get((row, name, k, budget), {}).get("released", np.nan))
        for name in ("tied share", "least", "greatest")
    )
    if not np.isfinite(share):
        return ""
    if share == 0:
        return "no tie cuts through the released selection"
    words = f"{percent(share)} of the released selection is a tied block"
    if not np.isfinite([least, greatest]).all():
        return words
    return f"{words}, whose mean can be {number(least)} to {number(greatest)}"


def causes(artefact: str, key: tuple, numbers: Numbers, known: Facts) -> list[str]:
    """What the released statistic of a row takes from the outcome, or leaves to chance."""
    row, quantity, _, _ = key
    found = []
    if artefact in TRAINED and quantity in ("gap after training", "gap per kept share"):
        found.append(no_mean(key, numbers))
    if artefact in BY_OUTCOME and "gap" in quantity and artefact not in TRAINED:
        found.append(by_outcome(known))
    if artefact in OF_SELECTORS and quantity in ("mean gain", "gain per kept share"):
        found.append(ties(key, numbers))
        if row in USES_C:
            found.append("as released, C is the trained student's")
    if quantity == "mean gain" and artefact in TRAINED:
        found.append(small_divergences(known))
    return found


def why(artefact: str, key: tuple, numbers: Numbers, known: Facts) -> str:
    """Why the numbers of one row differ, or why one is missing, in one sentence.

    Args:
        artefact: The paper's name of the table or figure.
        key: Row, quantity, K and budget, as the keys of `numbers`.
        numbers: All rows of the artefact's table, with `controlled_prompts` and `context_prompts`.
        known: The facts of the bank.
    """
    row, quantity = numbers[key], key[1]
    clauses = []
    if not np.isfinite(row["released"]):
        reason = OURS.get(quantity) or known.lacking.get("released", "it is undefined there")
        clauses.append(reason if quantity in OURS else f"no released number: {reason}")
    else:
        clauses += causes(artefact, key, numbers, known)
    if not np.isfinite(row["controlled"]):
        clauses.append(f"no controlled number: {_undefined(row, quantity, known)}")
    clauses += [signs(row), intervals(row), context(row, known), population(known)]
    return sentence(clauses)


def _undefined(row: Mapping[str, Any], quantity: str, known: Facts) -> str:
    if "checkpoint" in known.lacking:
        return known.lacking["checkpoint"]
    if quantity == "matched gap":
        return "no position of the top third has a partner within the caliper"
    return "it is undefined here"


# --- an artefact in a few sentences


def order_of(table: pd.DataFrame, side: str, quantity: str, budget: float) -> list[str]:
    """Rows of a quantity at a budget, the largest of one side first."""
    rows = table[(table["quantity"] == quantity) & np.isclose(table["budget"], budget)]
    rows = rows[np.isfinite(rows[side].astype(float))]
    return list(rows.sort_values(side, ascending=False, kind="stable")["row"])


def masks_disagree(table: pd.DataFrame) -> list[str]:
    """Which mask leads by the released gap and which by the mean reduction, for each budget.

    Args:
        table: The final table of trainings.
    """
    found = []
    for budget in sorted(table["budget"].dropna().unique()):
        gaps = order_of(table, "released", "gap after training", budget)
        means = order_of(table, "controlled", "mean gain", budget)
        both = [name for name in gaps if name in means]
        if len(both) < 2:
            continue
        best = next(name for name in means if name in both)
        words = f"at {percent(budget)} the released gap puts {both[0]} first"
        found.append(
            f"{words} and so does the mean reduction in nats"
            if best == both[0]
            else f"{words}, the mean reduction in nats {best}"
        )
    return found


def key_of(row: Mapping[str, Any]) -> tuple:
    """Key of a row in `Numbers`."""
    numbers = (float(row[name]) for name in ("k", "budget"))
    return (row["row"], row["quantity"], *(-1.0 if np.isnan(each) else each for each in numbers))


def numbers_of(table: pd.DataFrame) -> dict[tuple, dict[str, Any]]:
    """The rows of a table by their keys."""
    return {key_of(row): row for row in table.to_dict("records")}
