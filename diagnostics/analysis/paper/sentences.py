"""Why a released number and a controlled one differ, in one sentence with its numbers.

A sentence names what the released statistic takes from the outcome or leaves to chance (Q3 by the
trained student's entropy, ties, a gap in the place of a mean, gains relative to next to nothing),
then compares sign and interval, and says why a number is missing. Every number in it comes from the
tables or from the positions themselves. Intervals are compared with 0 only from `FEWEST_PROMPTS`
prompts on, and never where one has no width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.config import FEWEST_PROMPTS
from diagnostics.analysis.paper.bank import column_at, released_gain
from diagnostics.analysis.paper.controlled import FEWEST_IN_CELL
from diagnostics.analysis.paper.gap import THIRDS, ends
from diagnostics.analysis.paper.released import PROXIES
from diagnostics.analysis.paper.sample import samples, supports
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import RELATIVE_GAIN_FLOOR

Row = Mapping[str, Any]
Numbers = Mapping[tuple, Row]
"""Rows of a joined table by row, quantity, K and budget; -1 stands for an undefined K or budget."""
AFTER_ENTROPY = "student_entropy_after"
LEAK = "read_after"
"""Code of the import's warning that predictors are the trained student's."""
BY_OUTCOME = ("Table 1", "Figure 3C", "Figure 5A")
"""Artefacts whose released Q3 is chosen by the entropy of the run's trained student."""
TRAINED = ("Table 2", "Table 7", "Figure 3B", "Table 10")
OF_SELECTORS = ("Table 8", "Figure 4A", "Figure 4B")
OF_PROXIES = ("Table 6", "Figure 4C", "Figure 5B")
OF_ALL_POSITIONS = ("Table 9", "Figure 3A", "Figure 2A")
"""Artefacts of the raw relative gain over all positions; inside Q3 no divergence is small."""
GAPS = ("gap after training", "gap per kept share", "matched gap")
OF_BUCKETS = ("Figure 4D", "Figure 5C")
OF_PLANES = ("Figure 2A", "Figure 2B", "Figure 2C")
USES_D = ("q3_teachability_first", "teachability", "incompatible", "tip")
"""Selectors and scores that read D of the union; `divergence` is the whole vocabulary's."""
USES_C = ("q3_compatibility", "q3_teachability_first", "teachability", "incompatible")
"""Selectors that read C, which is the trained student's as released."""
OURS = {
    "overlap": "the scripts match without a caliper; this share of the top third has a partner"
    " within it, and says how far the two thirds can be compared",
    "mean gain minus random": "the scripts print no difference to random positions",
    "mean gain (seen)": "the scripts do not tell contexts that the training saw from others",
    "gain per kept share": "the scripts divide the gap, and not the mean gain, by the kept share",
}
"""Quantities that no released script computes for trainings or gaps, and why they stand here."""
RECORDED = ("kept share", "mean D^L", "mean D^I", "mean C")
UNDER_TIES = ("expected under ties", "least", "greatest")
PERCENTILES = ("mean percentile of D^L", "mean percentile of D^I")
DESCRIBED = (*RECORDED, *UNDER_TIES, *PERCENTILES, "share in Q3", "tied share", "overlap", "count")
"""Quantities that describe, and of which no sign and no interval means anything."""
SIDES = {
    "released": "released number",
    "checkpoint": "controlled number",
    "context": "context gain",
}
"""What is missing where `Facts.lacking` has a name."""
SHOWN_ROWS = 4
"""Rows that a headline shows; of more it shows the largest and the smallest two."""


@dataclass(frozen=True)
class Facts:
    """What the sentences say of a bank.

    Attributes:
        kind: Which positions the controlled numbers are of: `unseen`, `seen`, `all`, `held_out`.
        q3: Positions of Q3 by the trained student's entropy; None where it was not measured.
        q3_by_outcome: Those of them that are not in Q3 by the untrained student's.
        small: Share of the positions whose KL is below 1e-3 nats.
        small_gain: Their share of the sum of |G|, the relative gain without a floor.
        union: Whether D^L and D^I read the union's divergence, as the paper prints it.
        read_after: Predictors that the table has from after training alone.
        thirds: By row of table 6 and K the sizes of the released bottom and top third, and of Q3.
        lacking: Why an outcome is missing, by `checkpoint`, `context` and `released`.
    """

    kind: str = "all"
    q3: int | None = None
    q3_by_outcome: int = 0
    small: float = np.nan
    small_gain: float = np.nan
    union: bool = False
    read_after: str = ""
    thirds: Mapping[tuple[str, float], tuple[int, int, int]] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)


def facts(tokens: pd.DataFrame, lacking: Mapping[str, str]) -> Facts:
    """Count what the sentences need.

    Args:
        tokens: A token table, one row per response position.
        lacking: Why an outcome is missing, by its name.
    """
    made = samples(tokens)
    q3, by_outcome = _q3_by_outcome(tokens)
    kind = made[0].kind if made else "all"
    union = registry.disagreement_column(tokens) != "forward_kl"
    read_after = next((note[1] for note in tokens.attrs.get("warnings", ()) if note[0] == LEAK), "")
    small = _small(tokens)
    return Facts(kind, q3, by_outcome, *small, union, read_after, _thirds(tokens), lacking)


def _q3_by_outcome(tokens: pd.DataFrame) -> tuple[int | None, int]:
    """Positions of Q3 by the trained student's entropy, and those that it alone puts there."""
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
    small = tokens["forward_kl"].to_numpy(dtype=np.float64)[defined] < RELATIVE_GAIN_FLOOR
    total = size[defined].sum()
    if not len(small) or not total > 0:
        return np.nan, np.nan
    return float(small.mean()), float(size[defined][small].sum() / total)


def _thirds(tokens: pd.DataFrame) -> dict[tuple[str, float], tuple[int, int, int]]:
    inside = tokens[registry.quadrants(tokens) == 3]
    found = {}
    for k in supports(tokens, None, PROXIES.values()):
        for row, proxy in PROXIES.items():
            column = column_at(tokens, proxy, k)
            values = inside[column].dropna().to_numpy(np.float64) if column in inside else ()
            if len(values):
                sizes = (int(group.sum()) for group in ends(values, THIRDS))
                found[row, float(k)] = (*sizes, len(values))
    return found


# --- words


def number(value: float) -> str:
    """A number with three significant digits, or without a fraction from 100 on."""
    if not np.isfinite(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in percent with three significant digits."""
    if not np.isfinite(share):
        return "an undefined share"
    return "more than 99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.3g} %"


def with_interval(row: Row, side: str) -> str:
    """`0.074 [0.044, 0.104]`; the number alone where the interval is undefined."""
    value, low, high = (float(row[f"{side}{end}"]) for end in ("", "_low", "_high"))
    if not np.isfinite([low, high]).all():
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def sentence(clauses: Iterable[str]) -> str:
    """Clauses as one sentence; empty without any."""
    text = "; ".join(clause for clause in clauses if clause)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def reason_of(error: Exception) -> str:
    """The first sentence of an error as a clause, without the columns that a table has."""
    text = re.split(r"\. |; this one has|, and the table has", str(error))[0].rstrip(".")
    return f"{text[0].lower()}{text[1:]}" if text else "it is undefined"


def units(unit: str) -> tuple[str, str]:
    """The released and the controlled unit of `<released>; <controlled>`."""
    first, _, second = unit.partition("; ")
    return first, second or first


def key_of(row: Row) -> tuple:
    """Key of a row in `Numbers`."""
    numbers = (float(row[name]) for name in ("k", "budget"))
    return (row["row"], row["quantity"], *(-1.0 if np.isnan(each) else each for each in numbers))


def numbers_of(table: pd.DataFrame) -> dict[tuple, Row]:
    """The rows of a table by their keys."""
    return {key_of(row): row for row in table.to_dict("records")}


# --- clauses that compare


def excludes_zero(row: Row, side: str) -> bool | None:
    """Whether an interval excludes 0; None where it is undefined or has no width."""
    low, high = float(row[f"{side}_low"]), float(row[f"{side}_high"])
    return None if not high > low else bool(low > 0 or high < 0)


def turns(row: Row) -> bool | None:
    """Whether the sign turns between released and controlled; None where either has none."""
    one, other = float(row["released"]), float(row["controlled"])
    if not np.isfinite([one, other]).all() or one == 0 or other == 0:
        return None
    return (one > 0) != (other > 0)


def signs(row: Row) -> str:
    """Whether the sign turns and, in one unit, how the size changes."""
    one, other = float(row["released"]), float(row["controlled"])
    turned, (first, second) = turns(row), units(row["unit"])
    if turned is None:
        return ""
    if turned:
        return f"the sign turns, from {number(one)} to {number(other)}"
    factor = f" and the size is {number(other / one)} times as large" if first == second else ""
    return f"the sign stays{factor}"


def intervals(row: Row) -> str:
    """Whether the two intervals agree about 0."""
    own, prompts = excludes_zero(row, "controlled"), int(row["controlled_prompts"])
    if not np.isfinite(row["controlled"]):
        return ""
    if own is None:
        alone = int(row["controlled_seeds"]) == 1
        return "one training has no interval over seeds" if alone else "its interval is undefined"
    if prompts < FEWEST_PROMPTS:
        return f"{prompts} prompts are too few for a verdict, which needs {FEWEST_PROMPTS}"
    ours = (
        f"the t interval over {prompts} prompts,"
        f" [{number(row['controlled_low'])}, {number(row['controlled_high'])}],"
    )
    theirs = excludes_zero(row, "released")
    if theirs is None:
        return f"{ours} {_of_zero(own)}"
    kind = "mean ± SD over seeds" if int(row["controlled_seeds"]) else "interval"
    if theirs == own:
        return f"both the released {kind} and {ours} {'exclude' if own else 'hold'} 0"
    return f"the released {kind} {_of_zero(theirs)}, and {ours} {_of_zero(own)}"


def _of_zero(excludes: bool) -> str:
    return "excludes 0" if excludes else "holds 0"


def context(row: Row, known: Facts) -> str:
    """What the context gain says, or why there is none."""
    if not np.isfinite(row["context"]):
        return f"no context gain: {known.lacking.get('context', 'it is undefined here')}"
    excluded = excludes_zero(row, "context")
    said = f"of the context gain it is {with_interval(row, 'context')}"
    if excluded is None or int(row["context_prompts"]) < FEWEST_PROMPTS:
        return said
    return f"{said}, which {_of_zero(excluded)}"


# --- clauses that explain


def population(known: Facts) -> str:
    """Why the controlled numbers are not of unseen contexts, or not of predictors from before."""
    seen = {
        "all": "over all contexts, since it is not known which the training saw",
        "seen": "over all contexts, since the training saw every one",
    }.get(known.kind, "")
    if not known.read_after:
        return seen
    leak = f"the table has {known.read_after} from after training alone, on the controlled side too"
    return f"{seen}; {leak}" if seen else leak


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
        f"positions with a KL below {RELATIVE_GAIN_FLOOR:g} nats are {percent(known.small)} of the"
        f" bank and {percent(known.small_gain)} of the summed size of its relative gain"
    )


def disagreement(known: Facts) -> str:
    """Which D the two sides read."""
    if known.union:
        return "D is that of the union, as printed, and as released that of the whole vocabulary"
    return "D is that of the whole vocabulary on both sides, since the bank lacks the union's"


def no_mean(key: tuple, numbers: Numbers) -> str:
    """That a gap after training is no mean reduction, with the mean reduction."""
    row, _, k, budget = key
    mean = numbers.get((row, "mean gain", k, budget))
    if mean is None or not np.isfinite(mean["controlled"]):
        return "the statistic is the Q3 gap and no mean reduction"
    said = (
        "the statistic is the Q3 gap; the mean reduction is"
        f" {with_interval(mean, 'controlled')} nats"
    )
    against = numbers.get((row, "mean gain minus random", k, budget))
    if against is None or not np.isfinite(against["controlled"]):
        return said
    value = float(against["controlled"])
    return f"{said}, {number(abs(value))} {'more' if value >= 0 else 'less'} than random's"


def ties(key: tuple, numbers: Numbers) -> str:
    """How much of a released selection is a tied block, and what its mean could be."""
    row, _, k, budget = key
    share, least, greatest = (
        float(numbers.get((row, name, k, budget), {}).get("released", np.nan))
        for name in ("tied share", "least", "greatest")
    )
    if row == "random" or not np.isfinite(share):
        return ""
    if share == 0:
        return "no tie cuts through the released selection"
    said = f"{percent(share)} of the released selection is a tied block"
    if not np.isfinite([least, greatest]).all():
        return said
    return f"{said}, and its mean can be {number(least)} to {number(greatest)}"


def tied_thirds(key: tuple, known: Facts) -> str:
    """How far ties make the released thirds of a proxy grow."""
    row, _, k, _ = key
    low, high, whole = known.thirds.get((row, k), (0, 0, 0))
    if max(low, high) <= whole / THIRDS + 1:
        return ""
    return f"ties make the released thirds {low} and {high} of {whole} positions"


def causes(artefact: str, key: tuple, numbers: Numbers, known: Facts) -> list[str]:
    """What the released statistic of a row takes from the outcome, or leaves to chance."""
    row, quantity, _, _ = key
    found = []
    if artefact in TRAINED:
        found += [no_mean(key, numbers)] if quantity in GAPS else [small_divergences(known)]
    if artefact in BY_OUTCOME:
        found.append(by_outcome(known))
    if artefact in OF_SELECTORS:
        found.append(ties(key, numbers))
        found += ["as released, C is the trained student's"] if row in USES_C else []
        found += [small_divergences(known)] if row == "random" else []
    if artefact in OF_PROXIES:
        found.append(tied_thirds(key, known))
    if artefact in OF_ALL_POSITIONS and "x_bin" not in numbers[key]:
        found += [small_divergences(known), disagreement(known)]
    if artefact in (*OF_SELECTORS, *OF_BUCKETS) and row in USES_D:
        found.append(disagreement(known))
    return found


def described(key: tuple, numbers: Numbers, known: Facts) -> str:
    """What a quantity without a sign says on both sides."""
    quantity, row = key[1], numbers[key]
    one, other = float(row["released"]), float(row["controlled"])
    if not np.isfinite([one, other]).all():
        return ""
    if quantity in RECORDED or (quantity == "share in Q3" and int(row["controlled_seeds"])):
        return "it is the trainings' own record, which both sides share"
    if quantity == "share in Q3":
        return f"{percent(other)} of the controlled selection, and {percent(one)} as released"
    if quantity == "tied share":
        return (
            f"the unclipped score leaves {percent(other)} to ties, the clipped one {percent(one)}"
        )
    if quantity in UNDER_TIES:
        left = numbers.get((key[0], "tied share", *key[2:]), {}).get("controlled", np.nan)
        return f"with the unclipped score ties decide {percent(float(left))} of the selection"
    if quantity in PERCENTILES:
        return "a plane of percentiles holds no gain, and so none of a context"
    fewer = one - other
    return f"{number(fewer)} fewer count than in the released table{_of_seen(known)}"


def _of_seen(known: Facts) -> str:
    return ", those that the training saw" if known.kind == "unseen" else ""


# --- the sentence of a row


def why(artefact: str, key: tuple, numbers: Numbers, known: Facts) -> str:
    """Why the numbers of one row differ, or why one is missing, in one sentence.

    Args:
        artefact: The paper's name of the table or figure.
        key: Row, quantity, K and budget, as the keys of `numbers`.
        numbers: All rows of the table that the artefact is a part of, with the prompts and seeds of
            each side.
        known: The facts of the bank.
    """
    row, quantity = numbers[key], key[1]
    clauses = []
    if not np.isfinite(row["released"]):
        own = OURS.get(quantity, "") if np.isfinite(row["controlled"]) else ""
        clauses.append(own or f"no released number: {_unreleased(row, known)}")
    elif quantity not in DESCRIBED:
        clauses += causes(artefact, key, numbers, known)
    if not np.isfinite(row["controlled"]):
        clauses.append(f"no controlled number: {_undefined(row, known)}")
    if quantity in DESCRIBED:
        clauses.append(described(key, numbers, known))
    else:
        clauses += [signs(row), "" if "x_bin" in row else intervals(row)]
    if quantity not in DESCRIBED or "context" in known.lacking:
        clauses.append(context(row, known))
    return sentence([*clauses, population(known)])


def _unreleased(row: Row, known: Facts) -> str:
    if "x_bin" in row and "released" not in known.lacking:
        return _few(row, "released")
    return known.lacking.get("released", "it is undefined there")


def _undefined(row: Row, known: Facts) -> str:
    if "checkpoint" in known.lacking:
        return known.lacking["checkpoint"]
    if "x_bin" in row:
        return _few(row, "controlled")
    if row["quantity"] == "matched gap":
        return "no position of the top third has a partner within the caliper"
    if row["quantity"] == "mean gain minus random":
        return "random positions were not trained on at this budget with a seed of these"
    return "it is undefined here"


def _few(row: Row, side: str) -> str:
    count = row[f"{side}_n"]
    many = f"{int(count)} positions" if np.isfinite(count) else "no position"
    return f"{many}, and a cell needs {FEWEST_IN_CELL}"


# --- the sentences of an artefact


def of_artefact(
    artefact: str, main: str, table: pd.DataFrame, whole: pd.DataFrame, known: Facts
) -> dict[str, str]:
    """What an artefact says as released and controlled, and why they differ.

    Args:
        artefact: The paper's name of the table or figure.
        main: The quantity whose numbers are told.
        table: The artefact's rows of a joined table, with units.
        whole: All rows of that table.
        known: The facts of the bank.

    Returns:
        Sentences `released`, `controlled` and `why`; empty where a side has no number.
    """
    if "x_bin" in table:
        told = {side: _of_plane(table, side) for side in ("released", "controlled")}
    else:
        rows = [row for row in table.to_dict("records") if row["quantity"] == main]
        told = {side: sentence([headline(main, rows, side)]) for side in ("released", "controlled")}
        if artefact in TRAINED:
            told["controlled"] = sentence(_of_trainings(main, whole, rows))
    clauses = [_agreement(table), *_general_causes(artefact, whole, known), population(known)]
    return told | {"why": sentence([*clauses, *_missing(known)])}


def _of_trainings(main: str, whole: pd.DataFrame, rows: list[Row]) -> Iterable[str]:
    """The gap's controlled numbers, then the mean reduction's and its difference to random's."""
    yield headline(main, rows, "controlled")
    for quantity, unit in (("mean gain", "nats"), ("mean gain minus random", "nats")):
        of_mean = [row for row in whole.to_dict("records") if row["quantity"] == quantity]
        yield headline(quantity, [{**row, "unit": unit} for row in of_mean], "controlled")


def _general_causes(artefact: str, whole: pd.DataFrame, known: Facts) -> list[str]:
    """What the released statistic takes from the outcome or leaves to chance, over all rows."""
    if artefact in TRAINED:
        return [
            "the released statistic is a gap inside Q3 and no mean reduction",
            *masks_disagree(whole),
        ]
    if artefact in BY_OUTCOME:
        return [by_outcome(known)]
    if artefact in OF_SELECTORS:
        return [most_tied(whole), disagreement(known)]
    if artefact in OF_BUCKETS:
        return [disagreement(known)]
    if artefact in OF_PROXIES:
        return [_most_grown(known)]
    if artefact == "Table 5" and known.kind == "unseen":
        return ["the controlled numbers are of contexts that the training did not see"]
    found = [small_divergences(known)] if artefact in OF_ALL_POSITIONS else []
    return [*found, disagreement(known)] if artefact in (*OF_ALL_POSITIONS, *OF_PLANES) else found


def _missing(known: Facts) -> list[str]:
    return [
        f"no {what}: {known.lacking[name]}" for name, what in SIDES.items() if name in known.lacking
    ]


def headline(main: str, rows: list[Row], side: str) -> str:
    """The main quantity's numbers on one side; empty without any."""
    known = [row for row in rows if np.isfinite(row[side])]
    if not known:
        return ""
    if len(known) > SHOWN_ROWS:
        known = sorted(known, key=lambda row: -row[side])
        known = [*known[: SHOWN_ROWS // 2], *known[-(SHOWN_ROWS // 2) :]]
    unit = units(known[0]["unit"])[side != "released"]
    parts = ", ".join(f"{_named(row)} {with_interval(row, side)}" for row in known)
    return f"{main} ({unit}): {parts}" if unit != main else parts


def _named(row: Row) -> str:
    """A row with its K and budget, where its name does not hold them."""
    name = str(row["row"])
    if np.isfinite(row["k"]) and not name.startswith("K = "):
        name += f" at K = {row['k']:g}"
    return f"{name} at {percent(row['budget'])}" if np.isfinite(row["budget"]) else name


def _agreement(table: pd.DataFrame) -> str:
    """How often signs turn, and how often the two intervals disagree about 0."""
    rows = [row for row in table.to_dict("records") if row["quantity"] not in DESCRIBED]
    turned = [known for row in rows if (known := turns(row)) is not None]
    if not turned:
        return ""
    said = f"{sum(turned)} of {len(turned)} signs turn"
    enough = [row for row in rows if int(row["controlled_prompts"]) >= FEWEST_PROMPTS]
    pairs = [(excludes_zero(row, "released"), excludes_zero(row, "controlled")) for row in enough]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return said
    lost, won = (pairs.count(pair) for pair in ((True, False), (False, True)))
    return (
        f"{said}; of {len(pairs)} released intervals {lost} exclude 0 where the controlled one"
        f" holds it, and {won} hold it where that excludes it"
    )


def masks_disagree(table: pd.DataFrame) -> list[str]:
    """Which mask leads by the released gap and which by the mean reduction, for each budget.

    Args:
        table: The joined table of trainings.
    """
    found = []
    for budget in sorted(table["budget"].dropna().unique()):
        gaps = _by_size(table, "released", "gap after training", budget)
        means = _by_size(table, "controlled", "mean gain", budget)
        both = [name for name in gaps if name in means]
        if len(both) < 2:
            continue
        first, best = both[0], next(name for name in means if name in both)
        said = f"at {percent(budget)}, by the estimates, the released gap puts {first} first"
        size = f"{number(means[best])} nats"
        found.append(
            f"{said}, and so does the mean reduction ({size})"
            if best == first
            else f"{said}, the mean reduction {best} ({size}, of {first} {number(means[first])})"
        )
    return found


def _by_size(table: pd.DataFrame, side: str, quantity: str, budget: float) -> dict[str, float]:
    """Values of a quantity at a budget by row, the largest of one side first."""
    rows = table[(table["quantity"] == quantity) & np.isclose(table["budget"], budget)]
    rows = rows[np.isfinite(rows[side].astype(float))]
    rows = rows.sort_values(side, ascending=False, kind="stable")
    return dict(zip(rows["row"], rows[side].astype(float)))


def most_tied(table: pd.DataFrame) -> str:
    """How many released selections cut through equal scores, and the one that does so the most."""
    rows = table[table["quantity"] == "tied share"]
    rows = rows[np.isfinite(rows["released"].astype(float))]
    cut = rows[rows["released"].astype(float) > 0]
    if rows.empty:
        return ""
    if cut.empty:
        return f"none of {len(rows)} released selections cuts through equal scores"
    worst = cut.loc[cut["released"].astype(float).idxmax()]
    return (
        f"{len(cut)} of {len(rows)} released selections cut through equal scores; that of"
        f" {worst['row']} at {percent(worst['budget'])} is a tied block to"
        f" {percent(worst['released'])}"
    )


def _most_grown(known: Facts) -> str:
    """The proxy whose released thirds ties make grow the most."""
    if not known.thirds:
        return ""
    (row, k), _ = max(known.thirds.items(), key=lambda each: max(each[1][:2]) / each[1][2])
    said = tied_thirds((row, "", k, -1.0), known)
    return f"{said} ({row} at K = {k:g})" if said else ""


def _of_plane(table: pd.DataFrame, side: str) -> str:
    """How many cells of a plane have a number, over how many positions, and how large it is."""
    defined = np.isfinite(table[side].astype(float))
    rows, few = table[defined], table[~defined & np.isfinite(table[f"{side}_n"].astype(float))]
    if rows.empty:
        return ""
    unit = units(table["unit"].iloc[0])[side != "released"]
    said = (
        f"{len(rows)} cells with {number(rows[f'{side}_n'].sum())} positions, from"
        f" {number(rows[side].min())} to {number(rows[side].max())} ({unit})"
    )
    left = f"{len(few)} cells with fewer than {FEWEST_IN_CELL} positions are left out,"
    left += f" {number(few[f'{side}_n'].sum())} positions in all"
    return sentence([said, left if len(few) else ""])


def not_made(known: Facts, *, needs_training: bool) -> str:
    """Why an artefact has no table."""
    if needs_training:
        return (
            "Not made: it needs trainings under masks, which `opd-diagnostics paper --output-dir"
            " RUN --train` makes."
        )
    return sentence([f"not made: {reason}" for reason in dict.fromkeys(known.lacking.values())])
