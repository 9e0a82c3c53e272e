"""Selection criteria: one score a position, higher is selected.

With H(p) the student's entropy, D = KL(q||p) (teacher first) and C the teacher's mass on the
student's top K, write h, d, c for the three after `normalize`:

    N(z) = clip((z - Q05) / (Q95 - Q05), 0, 1)

with linearly interpolated quantiles over the valid response positions of the whole table or batch.
Teachability is d*c (arXiv 2605.26844): disagreement, where it lies within the student's reach.

Departures from the released training code: a constant column maps to 0 and a non-finite value to
NaN, which is never selected (there: silently zero); `teachability_entropy` combines d*c, not
N(D*C); quadrant Q3 is h <= median and d >= median, as in the released analysis (the training code:
h < median). A budget keeps ceil(budget*N) positions (the analysis scripts round), and a minimum per
context stays within it, by the criterion itself (there: on top of it, filled by h + N(D*C) -
h*N(D*C)).

A criterion is a plain function of table columns. Register one with three lines:

    @criterion("mine", needs=["teacher_logprob", "student_entropy"])
    def mine(tokens):
        return tokens.teacher_logprob / (1 + tokens.student_entropy)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import column, require_columns

LOW_QUANTILE, HIGH_QUANTILE = 0.05, 0.95
SELECTKD_REJECTED_WEIGHT = 0.01
IW_PREFIX_GAMMA = 0.5

Kind = Literal["all", "select", "weight"]


@dataclass(frozen=True)
class Criterion:
    """An entry of the registry."""

    name: str
    function: Callable
    needs: tuple[str, ...]
    formula: str
    kind: Kind
    """*select* keeps the best positions; *weight* is meant as a loss weight and can also be ranked;
    *all* keeps every position at any budget."""
    direction: str
    """Which end of the formula's value is selected; the score is negated where that is the low
    end.
    """
    budget: float
    source: str
    aliases: tuple[str, ...]
    mine: bool
    """True for a criterion that a user registered."""


_REGISTRY: dict[str, Criterion] = {}
_ALIASES: dict[str, str] = {}


def criterion(
    name: str,
    *,
    needs: Iterable[str],
    formula: str = "",
    kind: Kind = "select",
    direction: str = "high",
    budget: float = 0.05,
    source: str = "",
    aliases: Iterable[str] = (),
) -> Callable:
    """Register `function(tokens) -> one score a position`; a `seed` argument makes it a seeded one.

    Raises DiagnosticsError where a built-in criterion or another's alias has the name already;
    registering one's own name again replaces it, as rerunning a notebook cell does. The function is
    given the columns that `needs` names and no others, so that nothing from after the step can slip
    into a score."""
    needs, aliases = tuple(needs), tuple(aliases)

    def register(function: Callable) -> Callable:
        mine = function.__module__ != __name__
        for word in (name, *aliases):
            owner = _ALIASES.get(word, word)
            if owner in _REGISTRY and not (owner == name and _REGISTRY[owner].mine):
                raise DiagnosticsError(
                    f"Criterion {word!r} is taken, by {owner!r}. Register yours under another name."
                )
        _REGISTRY[name] = Criterion(
            name,
            function,
            needs,
            formula or (inspect.getdoc(function) or "").split("\n")[0],
            kind,
            direction,
            budget,
            source,
            aliases,
            mine,
        )
        _ALIASES.update({alias: name for alias in aliases if alias != name})
        return function

    return register


def find(name: str) -> Criterion:
    """The criterion of that name or alias. Raises DiagnosticsError with the known names."""
    entry = _REGISTRY.get(_ALIASES.get(name, name))
    if entry is None:
        raise DiagnosticsError(
            f"Unknown criterion {name!r}. Known are {', '.join(_REGISTRY)}; register another with"
            " @diagnostics.criterion."
        )
    return entry


def list_criteria() -> pd.DataFrame:
    """The registry as a table indexed by name."""
    fields = (
        "name",
        "formula",
        "direction",
        "kind",
        "needs",
        "budget",
        "source",
        "aliases",
        "mine",
    )
    rows = [{field: getattr(entry, field) for field in fields} for entry in _REGISTRY.values()]
    for row in rows:
        row["needs"], row["aliases"] = ", ".join(row["needs"]), ", ".join(row["aliases"])
    return pd.DataFrame(rows, columns=fields).set_index("name")


def available(tokens: pd.DataFrame) -> list[str]:
    """Names of the criteria whose columns the table holds, in registry order."""
    return [name for name, entry in _REGISTRY.items() if set(entry.needs) <= set(tokens.columns)]


def normalize(values: pd.Series | np.ndarray) -> np.ndarray:
    """N(z) of the module's head over the finite values of one whole table or batch.

    Returns float64 [N] in [0, 1]; NaN where the value is not finite, 0 everywhere where Q95 equals
    Q05."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    result = np.full(values.shape, np.nan)
    if not finite.any():
        return result
    low, high = np.quantile(values[finite], [LOW_QUANTILE, HIGH_QUANTILE])
    scaled = np.zeros(finite.sum()) if high <= low else (values[finite] - low) / (high - low)
    result[finite] = np.clip(scaled, 0.0, 1.0)
    return result


def score_criterion(
    tokens: pd.DataFrame, name: str, *, seed: int = 0, substitute: Mapping[str, str] | None = None
) -> np.ndarray:
    """Score every position of the table with one criterion.

    tokens: valid response positions only, one a row; `seed` matters to `random` alone. `substitute`
    reads another column in place of a needed one, e.g. {"compatibility": "topk_overlap_k8"}.
    Returns float64 [N], higher is selected, NaN where undefined. Raises DiagnosticsError for an
    unknown criterion, a missing column, a column measured after the step, or a wrong number of
    scores."""
    entry = find(name)
    substitute = {new: old for new, old in (substitute or {}).items() if new in entry.needs}
    require_columns(
        tokens, [substitute.get(need, need) for need in entry.needs], what=f"Criterion {name!r}"
    )
    _refuse_outcomes(entry, substitute)
    declared = pd.DataFrame({need: tokens[substitute.get(need, need)] for need in entry.needs})
    scores = np.asarray(_call(entry, declared, set(tokens.columns), seed), dtype=np.float64)
    if scores.shape != (len(tokens),):
        raise DiagnosticsError(
            f"Criterion {name!r} returned shape {scores.shape} for {len(tokens)} positions. Return"
            " one score a row."
        )
    return np.where(np.isfinite(scores), scores, np.nan)


def _call(entry: Criterion, declared: pd.DataFrame, columns: set, seed: int):
    seeded = {"seed": seed} if "seed" in inspect.signature(entry.function).parameters else {}
    try:
        return entry.function(declared, **seeded)
    except (KeyError, AttributeError) as error:
        name = error.args[0] if isinstance(error, KeyError) else error.name
        if name in columns - set(entry.needs):
            raise DiagnosticsError(
                f"Criterion {entry.name!r} reads {name}, which its needs ({', '.join(entry.needs)})"
                " do not name. Add it to needs."
            ) from error
        raise


def _refuse_outcomes(entry: Criterion, substitute: Mapping[str, str]) -> None:
    """A predictor that was measured after the step would contain what it predicts."""
    for need in entry.needs:
        known = column(substitute.get(need, need))
        if known is not None and known.stage in ("after", "outcome"):
            raise DiagnosticsError(
                f"Criterion {entry.name!r} reads {known.name}, which is known only after the step"
                f" ({known.stage}). Use columns from before it."
            )


def budget_count(positions: int, budget: float) -> int:
    """ceil(budget * positions), safe against the last bit of the product. Raises for a budget
    outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise DiagnosticsError(f"A budget is a share of positions in (0, 1]; got {budget}.")
    return ceil(round(budget * positions, 9))


def select(
    tokens: pd.DataFrame,
    by: str | np.ndarray,
    *,
    budget: float | None = None,
    per_context_minimum: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Mask of the ceil(budget * N) best positions of the whole table or batch.

    by: a criterion's name, or scores [N]. Ties go to the earlier position, then to the earlier row.
    `per_context_minimum` first keeps the best so many of each context, within the same budget.
    Positions with a NaN score are never selected, so fewer are kept where too few scores are
    defined. A criterion of kind *all* keeps every position. Returns bool [N]. A budget counts
    supervised positions; it saves no forward compute."""
    entry = find(by) if isinstance(by, str) else None
    if entry is not None and entry.kind == "all":
        return np.ones(len(tokens), dtype=bool)
    scores = score_criterion(tokens, by, seed=seed) if entry else np.asarray(by, dtype=np.float64)
    budget = budget if budget is not None else entry.budget if entry else 0.05
    count = budget_count(len(tokens), budget)
    order = ranking(tokens, scores)
    guaranteed = _best_of_each_context(tokens, order, per_context_minimum, count)
    rest = order[~np.isin(order, guaranteed)]
    mask = np.zeros(len(tokens), dtype=bool)
    mask[guaranteed] = True
    mask[rest[: count - len(guaranteed)]] = True
    return mask


def ranking(tokens: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """Row numbers from best to worst score; ties by position, then row; undefined scores left
    out.
    """
    scores = np.asarray(scores, dtype=np.float64)
    order = np.lexsort((np.arange(len(tokens)), tokens["position"].to_numpy(), -scores))
    return order[np.isfinite(scores[order])]


def _best_of_each_context(
    tokens: pd.DataFrame, order: np.ndarray, minimum: int, count: int
) -> np.ndarray:
    if not minimum:
        return order[:0]
    place = (
        tokens["context_id"]
        .iloc[order]
        .groupby(tokens["context_id"].iloc[order].to_numpy())
        .cumcount()
    )
    best = order[place.to_numpy() < minimum]
    if len(best) > count:
        raise DiagnosticsError(
            f"per_context_minimum={minimum} needs {len(best)} positions, more than the budget's"
            f" {count}. Raise the budget or lower the minimum."
        )
    return best


def quadrants(tokens: pd.DataFrame) -> np.ndarray:
    """Quadrant of each position as int 1..4, 0 where H or D is undefined.

    Split at the medians of h and d. Q3, confident and wrong, is h <= median and d >= median; ties
    at the medians go to it first, then Q1 high-high, Q2 high h low d, Q4 low-low."""
    h, d = normalize(tokens["student_entropy"]), normalize(tokens["forward_kl"])
    defined = np.isfinite(h) & np.isfinite(d)
    if not defined.any():
        return np.zeros(len(tokens), dtype=int)
    middle_h, middle_d = np.median(h[defined]), np.median(d[defined])
    low_h, high_d = h <= middle_h, d >= middle_d
    quadrant = np.select([low_h & high_d, ~low_h & high_d, ~low_h & ~high_d], [3, 1, 2], default=4)
    return np.where(defined, quadrant, 0)


def relative_position(tokens: pd.DataFrame) -> np.ndarray:
    """t / (T - 1) in [0, 1], 0 where the response has one token."""
    last = np.maximum(tokens["response_length"].to_numpy(dtype=np.float64) - 1, 1)
    return tokens["position"].to_numpy(dtype=np.float64) / last


# --- the registry
# -----------------------------------------------------------------------------------

_TA = "2605.26844"
_TIP = "2604.14084"
_H, _D, _C = "student_entropy", "forward_kl", "compatibility"


def soft_or(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b - a*b, written as 1 - (1 - a)(1 - b): exactly 1 wherever a or b is 1, so that rounding
    decides no tie.
    """
    return 1 - (1 - a) * (1 - b)


@criterion(
    "full",
    needs=["position"],
    formula="every position",
    kind="all",
    budget=1.0,
    aliases=["pure_opd"],
)
def _full(tokens):
    return np.ones(len(tokens))


@criterion("random", needs=["position"], formula="uniform, seeded")
def _random(tokens, *, seed):
    return np.random.default_rng(seed).random(len(tokens))


@criterion("entropy", needs=[_H], formula="h")
def _entropy(tokens):
    return normalize(tokens[_H])


@criterion("divergence", needs=[_D], formula="d")
def _divergence(tokens):
    return normalize(tokens[_D])


@criterion("reverse_divergence", needs=["reverse_kl"], formula="N(KL(p||q))")
def _reverse_divergence(tokens):
    return normalize(tokens["reverse_kl"])


@criterion("compatibility", needs=[_C], formula="c", source=_TA)
def _compatibility(tokens):
    return normalize(tokens[_C])


@criterion("teachability", needs=[_D, _C], formula="d*c", source=_TA, aliases=["dlearn_high"])
def _teachability(tokens):
    return normalize(tokens[_D]) * normalize(tokens[_C])


@criterion(
    "incompatible", needs=[_D, _C], formula="d*(1 - c)", source=_TA, aliases=["dincompat_high"]
)
def _incompatible(tokens):
    return normalize(tokens[_D]) * (1 - normalize(tokens[_C]))


@criterion("tip", needs=[_H, _D], formula="h + d - h*d", source=_TIP)
def _tip(tokens):
    return soft_or(normalize(tokens[_H]), normalize(tokens[_D]))


def _min_max(values: pd.Series) -> np.ndarray:
    """(z - min) / (max - min), 0 for a constant column."""
    values = values.to_numpy(dtype=np.float64)
    finite = values[np.isfinite(values)]
    span = np.ptp(finite) if len(finite) else 0.0
    return (
        (values - finite.min()) / span if span > 0 else np.where(np.isfinite(values), 0.0, np.nan)
    )


@criterion(
    "tip_paper",
    needs=[_H, "reverse_kl"],
    formula="soft-or of min-max H(p) and min-max KL(p||q)",
    source=_TIP,
)
def _tip_paper(tokens):
    return soft_or(_min_max(tokens[_H]), _min_max(tokens["reverse_kl"]))


@criterion(
    "teachability_entropy",
    needs=[_H, _D, _C],
    formula="h + dc - h*dc",
    source=_TA,
    aliases=["ca_softor"],
)
def _teachability_entropy(tokens):
    return soft_or(normalize(tokens[_H]), _teachability(tokens))


@criterion(
    "q3_teachability",
    needs=[_H, _D, _C],
    formula="d*c inside Q3, undefined elsewhere",
    source=_TA,
    aliases=["q3_teachability_high"],
)
def _q3_teachability(tokens):
    return np.where(quadrants(tokens) == 3, _teachability(tokens), np.nan)


@criterion("advantage_abs", needs=["advantage"], formula="|A|, A = ln q(y) - ln p(y)")
def _advantage_abs(tokens):
    return tokens["advantage"].abs()


@criterion("surprise", needs=["advantage"], formula="-A", aliases=["sampled_rkl_max"])
def _surprise(tokens):
    return -tokens["advantage"]


@criterion("advantage", needs=["advantage"], formula="A", aliases=["sampled_rkl_min"])
def _advantage(tokens):
    return tokens["advantage"]


@criterion(
    "acceptance", needs=["acceptance"], formula="min(1, q(y)/p(y))", kind="weight", budget=1.0
)
def _acceptance(tokens):
    return tokens["acceptance"]


@criterion(
    "selectkd",
    needs=["student_top1_in_teacher_top5"],
    kind="weight",
    budget=1.0,
    formula="1 where the student's first choice is in the teacher's top 5, else 0.01",
)
def _selectkd(tokens):
    return np.where(tokens["student_top1_in_teacher_top5"], 1.0, SELECTKD_REJECTED_WEIGHT)


@criterion(
    "projected_gradient",
    needs=["union_log_ratio_variance"],
    formula="Var_pU[ln qU - ln pU]",
    aliases=["pgt"],
)
def _projected_gradient(tokens):
    return tokens["union_log_ratio_variance"]


@criterion(
    "early", needs=["position", "response_length"], formula="1 - t/(T - 1)", aliases=["prefix"]
)
def _early(tokens):
    return 1 - relative_position(tokens)


@criterion("late", needs=["position", "response_length"], formula="t/(T - 1)")
def _late(tokens):
    return relative_position(tokens)


@criterion("teacher_confidence", needs=["teacher_entropy"], formula="-H(q)")
def _teacher_confidence(tokens):
    return -tokens["teacher_entropy"]


@criterion("hellinger", needs=["hellinger"], formula="sqrt(1 - sum sqrt(p q))")
def _hellinger(tokens):
    return tokens["hellinger"]


@criterion("jsd", needs=["js"], formula="JS(p, q)")
def _jsd(tokens):
    return tokens["js"]


@criterion("margin", needs=["student_margin"], formula="p(first) - p(second)", direction="low")
def _margin(tokens):
    return -tokens["student_margin"]


@criterion(
    "iw_prefix",
    needs=["advantage", "position", "context_id"],
    kind="weight",
    budget=1.0,
    formula="1 + 0.5*(1 - sum_{k<t}|A_k| / sum_{k<T}|A_k|)",
)
def _iw_prefix(tokens):
    ordered = tokens.reset_index(drop=True).sort_values(["context_id", "position"])
    size = ordered["advantage"].abs()
    by_context = size.groupby(ordered["context_id"])
    total = by_context.transform("sum")
    share = ((by_context.cumsum() - size) / total).where(total > 0, 0.0)
    return (1 + IW_PREFIX_GAMMA * (1 - share)).sort_index()


@criterion(
    "position_weight",
    needs=["position", "response_length"],
    kind="weight",
    budget=1.0,
    source="2605.21606",
    formula="0.25 + 0.75*sigmoid((t/(T - 1) - 0.30)/0.10)",
)
def _position_weight(tokens):
    return 0.25 + 0.75 / (1 + np.exp(-(relative_position(tokens) - 0.30) / 0.10))


@criterion(
    "fire",
    needs=["student_entropy", "teacher_entropy"],
    kind="weight",
    budget=1.0,
    formula="(1 + 1 - H(q)/max)(1 + H(p)/max), over its mean; maxima over the table",
)
def _fire(tokens):
    confident_teacher = 1 - tokens["teacher_entropy"] / tokens["teacher_entropy"].max()
    open_student = tokens["student_entropy"] / tokens["student_entropy"].max()
    weight = (1 + confident_teacher) * (1 + open_student)
    return weight / weight.mean()
