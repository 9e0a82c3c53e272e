"""Selection criteria: one score per position, where a higher score is selected first.

With H(p) the student's entropy, D = KL(q||p) on the union of both models' top K, each renormalised
there (teacher first), and C the teacher's mass on the student's top K, write h, d, c for the three
after `normalize`:

    N(z) = clip((z - Q05) / (Q95 - Q05), 0, 1)

with linearly interpolated quantiles over the valid response positions of the whole table or batch.
Teachability is d*c (arXiv 2605.26844, eq. 3, 9 and 12): disagreement within the student's reach.

N gives a twentieth of all positions the same highest value, so at small budgets a cut falls among
equals. Equal scores are ordered by the same formula over the *unclipped* (z - Q05)/(Q95 - Q05), in
which a product and a soft-or are continued beyond [0, 1] so that they still grow with each part:

    times(a, b)   = max(a, 0) max(b, 0) + min(a, 0) + min(b, 0)      a*b for a and b in [0, 1]
    soft_or(a, b) = 1 - times(1 - a, 1 - b)                          a + b - a*b there

What remains equal is ordered by position; `ambiguous_share` says how much of a selection that
decides.

Departures from the released training code of that paper: a constant column maps to 0, and a
non-finite value maps to NaN and is never selected (the released code silently sets it to zero).
`teachability_entropy` and `split_budget` combine d*c and not N(D*C). Quadrant Q3 is h <= median and
KL(q||p) >= its median over the whole vocabulary, as in the released analysis (the training code
uses h < median and the union). A budget keeps ceil(budget*N) positions (the analysis scripts
round). A minimum per context stays within the budget and is filled by the criterion itself (the
released code adds it on top, filled by h + N(D*C) - h*N(D*C)). The masks inside Q3 give no score
elsewhere, so that a budget above the quadrant's share keeps the quadrant and no more.

Two criteria are fused by their ranks u and r, which lie between 0 and 1 over the whole table or
batch: `A_and_B` is u*r and `A_or_B` is u + r - u*r (arXiv 2609.24432, which fuses the rank of `ier`
with the other's own score in [0, 1]; here both are ranks, so that any two can be fused).

A criterion is a plain function of table columns. Three lines register one:

    @criterion("mine", needs=["teacher_logprob", "student_entropy"])
    def mine(tokens):
        return tokens.teacher_logprob / (1 + tokens.student_entropy)
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import SourceFileLoader
from math import ceil
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import percent_meant, share, takes, token_table
from diagnostics.core.names import did_you_mean, meant
from diagnostics.core.schema import SCHEMA, column, require_columns

LOW_QUANTILE, HIGH_QUANTILE = 0.05, 0.95
DEFAULT_BUDGET = 0.05
SELECTKD_REJECTED_WEIGHT = 0.01
KNOWN_SHARE = 0.5
"""Share of the positions at which a column has to be defined, or its stand-in is read."""
IW_PREFIX_GAMMA = 0.5
AMBIGUOUS = 0.1
"""Share of a selection that ties may decide; above it a cell is marked, and no verdict uses it."""
BATCH_CONTEXTS = 16
"""Contexts of a training batch where nothing says otherwise."""

Kind = Literal["all", "select", "weight"]
Ties = Literal["raw", "position", "random"]
"""How positions of equal score are ordered: by the criterion's unclipped form and then by position,
by position, or at random."""
Scope = Literal["table", "batch", "context"]
"""What a budget is a share of: the whole table, each training batch, or each response."""
Seed = int | Sequence[int]
TIES_FLAG = {
    "help": "equal scores: by the unclipped score, by position, or at random",
    "choices": get_args(Ties),
}
"""Metadata of a setting `ties`."""
TRAINING_SCOPE_FLAG = {
    "help": "a budget of the positions of each batch, or of each response",
    "choices": ("batch", "context"),
}
"""Metadata of a setting `scope` where every selection is made in a batch."""


@dataclass(frozen=True)
class Criterion:
    """An entry of the registry."""

    name: str
    function: Callable
    """Takes a table with the columns that `needs` names; returns one score per row."""
    needs: tuple[str, ...]
    formula: str
    kind: Kind
    """*select* keeps the best positions; *weight* is meant as a loss weight and can also be ranked;
    *all* keeps every position at any budget."""
    direction: str
    """Which end of the formula's value is selected. The score is negated where that is the low
    end.
    """
    budget: float
    """Share of positions that is kept where no budget is given."""
    source: str
    """arXiv number of the paper, or name of the repository, that defines the formula; or "ours"; as
    given for a user's own."""
    aliases: tuple[str, ...]
    """Names of the same criterion in released code."""
    mine: bool
    """True for a criterion that a user registered."""
    recommended: bool = False
    """True for the few criteria to start with; `list_criteria` lists these first."""
    note: str = ""
    """Which other criterion this one negates or nearly repeats, or what the source leaves open."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """By needed column, the one that is read where a table lacks it or hardly knows it."""
    by_name: bool = False
    """True for a criterion that is compared only where it is asked for by name."""
    parts: tuple[Criterion, ...] = ()
    """The two criteria that are fused by their ranks; empty for a registered one."""

    @property
    def version(self) -> str:
        """Name and hash of the file that `load_module` read it from; empty for others."""
        if self.parts:
            return ", ".join(filter(None, dict.fromkeys(part.version for part in self.parts)))
        return _MODULES.get(self.function.__module__, "")

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the function's arguments."""
        return frozenset(inspect.signature(self.function).parameters)

    def columns(self, tokens: pd.DataFrame) -> dict[str, str]:
        """By needed column, the one to read from a table.

        A stand-in is read where the table lacks the column, or where the column is defined at less
        than half of the positions at which the stand-in is, as with lists of a top-K teacher.
        """
        return {need: self._read(tokens, need) for need in self.needs}

    @property
    def possible_columns(self) -> frozenset[str]:
        """Every column that may be read, whichever table it is: needed ones and stand-ins."""
        own = {*self.needs, *self.instead.values()}
        return frozenset(own.union(*(part.possible_columns for part in self.parts)))

    def _read(self, tokens: pd.DataFrame, need: str) -> str:
        other = self.instead.get(need)
        if other is None or other not in tokens.columns:
            return need
        if need not in tokens.columns:
            return other
        own, there = (int(tokens[name].notna().sum()) for name in (need, other))
        return other if own < KNOWN_SHARE * there else need


_REGISTRY: dict[str, Criterion] = {}
_ALIASES: dict[str, str] = {}
_MODULES: dict[str, str] = {}
"""Name and hash of each file that `load_module` ran, by the name of its module."""
MODULES_VARIABLE = "OPD_DIAGNOSTICS_CRITERION_MODULES"
"""Environment variable by which processes that this one starts find the same files."""


def criterion(
    name: str,
    *,
    needs: Iterable[str],
    formula: str = "",
    kind: Kind = "select",
    direction: str = "high",
    budget: float = DEFAULT_BUDGET,
    source: str = "",
    aliases: Iterable[str] = (),
    recommended: bool = False,
    note: str = "",
    instead: Mapping[str, str] | None = None,
    by_name: bool = False,
) -> Callable:
    """Register the decorated `function(tokens)` as a selection criterion.

    The function receives the columns that `needs` names and no others, so that nothing measured
    after the step can slip into a score. It returns one score per row, and a higher score is
    selected first. A function with an argument `seed` receives the seed of the selection. One with
    an argument `scale` is called with `Scale` objects, clipped and unclipped: `scale(tokens.x)` in
    its formula is N(x) for the score, and the unclipped form where equal scores are ordered.
    Registering one's own name again replaces the entry, as rerunning a notebook cell does.

    Args:
        name: Name of the criterion in tables, figures and flags.
        needs: Columns of the token table that the function reads, all from before the step.
        formula: What is shown in `list_criteria`; the first line of the function's docstring where
            empty.
        kind: `select` keeps the best positions; `weight` is meant as a loss weight and can also be
            ranked; `all` keeps every position at any budget.
        direction: `high` or `low`: which end of the formula's value is selected. This is shown
            only; the function itself negates its score where the low end is selected.
        budget: Share of positions in (0, 1] that is kept where no budget is given.
        source: Where the formula comes from, such as an arXiv number. The built-in criteria
            without a source say "ours".
        aliases: Further names under which the criterion is found.
        recommended: Whether `list_criteria` lists the criterion among the first.
        note: Which other criterion this one negates or nearly repeats.
        instead: By needed column, the one to read where a table lacks it.
        by_name: Whether comparisons leave the criterion out unless they are asked for it by name,
            as with a mask that one experiment needs.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        DiagnosticsError: A built-in criterion or another criterion's alias already has one of the
            names, or `needs` misspells a column of the schema. The decorator raises the first.
    """
    needs, aliases = _read_needs(name, needs), tuple(aliases)

    def register(function: Callable) -> Callable:
        mine = function.__module__ != __name__
        for word in (name, *aliases):
            owner = _ALIASES.get(word, word)
            if owner in _REGISTRY and not (owner == name and _REGISTRY[owner].mine):
                raise DiagnosticsError(
                    f"Criterion {word!r} is taken, by {owner!r}. Register yours under another name."
                )
        _REGISTRY[name] = Criterion(
            name=name,
            function=function,
            needs=needs,
            formula=formula or (inspect.getdoc(function) or "").split("\n")[0],
            kind=kind,
            direction=direction,
            budget=budget,
            source=source or ("" if mine else "ours"),
            aliases=aliases,
            mine=mine,
            recommended=recommended,
            note=note,
            instead=dict(instead or {}),
            by_name=by_name,
        )
        _ALIASES.update({alias: name for alias in aliases if alias != name})
        return function

    return register


def load_module(path: str | Path) -> None:
    """Run a Python file that registers criteria, in this process and in those that it starts.

    Args:
        path: The file. It uses `@diagnostics.criterion` as a notebook would.

    Raises:
        DiagnosticsError: There is no such file, it fails, or it registers no criterion.
    """
    path = Path(path).absolute()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DiagnosticsError(
            f"{path} cannot be read ({error.strerror}). Name a Python file that registers criteria."
        ) from error
    label = f"criterion_module_{path.stem}_{digest}"
    if label in _MODULES:
        return
    spec = importlib.util.spec_from_loader(label, SourceFileLoader(label, str(path)))
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except DiagnosticsError:
        raise
    except Exception as error:
        raise DiagnosticsError(
            f"{path} cannot be run ({type(error).__name__}: {error}). Correct it; `python"
            f" {path.name}` shows where it fails."
        ) from error
    if not any(entry.function.__module__ == label for entry in _REGISTRY.values()):
        raise DiagnosticsError(
            f"{path} registers no criterion. Decorate a function of the token table with"
            " @diagnostics.criterion(name, needs=[...])."
        )
    _MODULES[label] = f"{path.name} {digest}"
    known = os.environ.get(MODULES_VARIABLE, "").split(os.pathsep)
    os.environ[MODULES_VARIABLE] = os.pathsep.join(filter(None, dict.fromkeys([*known, str(path)])))


def loaded_modules() -> str:
    """Names and hashes of the files that `load_module` ran; empty without any."""
    return ", ".join(_MODULES.values())


def _read_needs(name: str, needs: Iterable[str]) -> tuple[str, ...]:
    """The needed columns. A name that the schema lacks may be a column of the user's own table; one
    that nearly spells a column of the schema is refused now rather than after the models ran.
    """
    listed = (needs,) if isinstance(needs, str) else tuple(needs)
    for need in listed:
        near = meant(str(need), SCHEMA) if column(need) is None else ""
        if near:
            raise DiagnosticsError(
                f"Criterion {name!r} needs the column {need!r}, which no token table has. Did you"
                f" mean {near!r}? (A column of your own needs a name that is unlike those.)"
            )
    return listed


def find(name: str) -> Criterion:
    """Return the criterion of a name or alias.

    Args:
        name: A registered name, or one of its aliases; or two of them with `_and_` or `_or_`
            between, which are fused by their ranks.

    Raises:
        DiagnosticsError: No criterion has that name, and the message lists the known ones; or the
            two cannot be fused.
    """
    entry = _registered(name) or _fused(name)
    if entry is None:
        hint = did_you_mean(name, [*_REGISTRY, *_ALIASES])
        raise DiagnosticsError(
            f"Unknown criterion {name!r}.{hint} Known are {', '.join(_unnamed())}, others that"
            " `diagnostics criteria` lists, and A_and_B or A_or_B of two of them; register another"
            " with @diagnostics.criterion, on the command line in a file that --criterion-module"
            " names."
        )
    return entry


def _unnamed() -> list[str]:
    """Names of the criteria that a comparison takes without being told."""
    return [name for name, entry in _REGISTRY.items() if not entry.by_name]


def _registered(name: str) -> Criterion | None:
    return _REGISTRY.get(_ALIASES.get(name, name))


FUSIONS = ("and", "or")
"""Words between the names of two criteria that are fused by their ranks."""


def _fused(name: str) -> Criterion | None:
    """The fusion that a name spells, None where it spells none.

    Raises:
        DiagnosticsError: One of two names is unknown, or the two cannot be fused.
    """
    splits = [
        (name[: found.start()], found[1], name[found.end() :])
        for found in re.finditer(rf"_({'|'.join(FUSIONS)})_", str(name))
    ]
    known = [(_registered(one), word, _registered(other)) for one, word, other in splits]
    for one, word, other in known:
        if one is not None and other is not None:
            return _fuse(one, word, other)
    for (left, _, right), (one, _, other) in zip(splits, known, strict=True):
        if (one is None) != (other is None):
            missing = left if one is None else right
            raise DiagnosticsError(
                f"{name!r} fuses two criteria, and {missing!r} is none."
                f"{did_you_mean(missing, [*_REGISTRY, *_ALIASES])} Write two names of"
                " `diagnostics criteria` with _and_ or _or_ between them."
            )
    return None


def _fuse(one: Criterion, word: str, other: Criterion) -> Criterion:
    """Two criteria as one, by the product (`and`) or the soft-or (`or`) of their ranks."""
    for part in (one, other):
        if part.kind == "all" or "seed" in part.arguments or one is other:
            why = "keeps every position" if part.kind == "all" else "draws random numbers"
            why = "would be fused with itself" if one is other else why
            raise DiagnosticsError(
                f"{one.name}_{word}_{other.name} cannot be fused: {part.name!r} {why}. Fuse two"
                " different criteria that score positions."
            )

    def fused(tokens: pd.DataFrame, *, scale: Scale) -> np.ndarray:
        u, r = (_rank_shares(tokens, part, scale) for part in (one, other))
        if not scale.clipped:
            return u + r
        return u * r if word == "and" else soft_or(u, r)

    return Criterion(
        name=f"{one.name}_{word}_{other.name}",
        function=fused,
        needs=tuple(dict.fromkeys([*one.needs, *other.needs])),
        formula="u*r" if word == "and" else "u + r - u*r",
        kind="select",
        direction="high",
        budget=DEFAULT_BUDGET,
        source=_IER,
        aliases=(),
        mine=one.mine or other.mine,
        note=f"u and r are the ranks of `{one.name}` and of `{other.name}`, from 0 to 1",
        instead={**other.instead, **one.instead},
        by_name=True,
        parts=(one, other),
    )


def _rank_shares(tokens: pd.DataFrame, part: Criterion, scale: Scale) -> np.ndarray:
    """[N] rank of each row by a criterion, from 0 (worst) to 1; equals share their mean rank.

    A row counts as often as the scale's copies say; a row without a score has no rank.
    """
    declared = tokens[list(part.needs)]
    given = [{"scale": replace(scale, clipped=clipped)} for clipped in (True, False)]
    scores, raw = (
        np.asarray(_call(part, declared, set(tokens.columns), **each), dtype=np.float64)
        for each in given
    )
    shares = np.full(len(tokens), np.nan)
    rows = np.flatnonzero(np.isfinite(scores))
    if not len(rows):
        return shares
    rows = rows[np.lexsort((_tie_break(raw[rows]), scores[rows]))]
    copies = np.ones(len(rows)) if scale.copies is None else scale.copies[rows]
    block = _blocks(scores[rows], _tie_break(raw[rows]))
    size = np.bincount(block, weights=copies)
    middle = np.cumsum(size) - size + (size - 1) / 2
    shares[rows] = (middle / max(size.sum() - 1, 1))[block]
    return shares


def names() -> list[str]:
    """Names of all criteria, in the order in which they were registered."""
    return list(_REGISTRY)


def list_criteria() -> pd.DataFrame:
    """List all registered criteria, the recommended ones first.

    Returns:
        One row per criterion, indexed by name, with the columns `recommended`, `formula`,
        `direction`, `kind`, `needs`, `budget`, `source`, `note`, `aliases` and `mine` (the fields
        of `Criterion`; lists are joined by commas).
    """
    fields = (
        "name",
        "recommended",
        "formula",
        "direction",
        "kind",
        "needs",
        "budget",
        "source",
        "note",
        "aliases",
        "mine",
    )
    entries = sorted(_REGISTRY.values(), key=lambda entry: not entry.recommended)
    rows = [{field: getattr(entry, field) for field in fields} for entry in entries]
    for row in rows:
        row["needs"], row["aliases"] = ", ".join(row["needs"]), ", ".join(row["aliases"])
    return pd.DataFrame(rows, columns=fields).set_index("name")


def available(tokens: pd.DataFrame) -> list[str]:
    """Names of the criteria whose columns the table holds, in registry order."""
    return [name for name in _REGISTRY if not missing_columns(tokens, name)]


def usual(tokens: pd.DataFrame) -> list[str]:
    """Names of the available criteria that a comparison takes where it is given none."""
    return [name for name in available(tokens) if not _REGISTRY[name].by_name]


def missing_columns(tokens: pd.DataFrame, name: str) -> list[str]:
    """The columns that a criterion needs and that a table has neither itself nor a stand-in for."""
    read = find(name).columns(tokens)
    return [need for need in read if read[need] not in tokens.columns]


def is_seeded(name: str) -> bool:
    """True for a criterion that draws random numbers."""
    return "seed" in find(name).arguments


def disagreement_column(tokens: pd.DataFrame) -> str:
    """The column that teachability and its relatives read as D.

    Args:
        tokens: A token table.

    Returns:
        `union_forward_kl`, which is the paper's D, where the table has it at most positions, else
        `forward_kl`.
    """
    return find("teachability").columns(tokens)[_D]


@dataclass(frozen=True)
class Scale:
    """How the formula of a criterion brings its columns to one scale.

    Called with values [N] it returns N(z), or its unclipped form; see `normalize` for the values
    that are not finite and for constant columns.
    """

    clipped: bool = True
    """False for (z - Q05) / (Q95 - Q05) without limits. Where Q95 equals Q05 this is z - Q05."""
    copies: np.ndarray | None = None
    """[N] how often each row counts in quantiles and medians, as in a bootstrap draw of prompts;
    None counts each once."""

    def __call__(self, values: pd.Series | np.ndarray) -> np.ndarray:
        """Bring values [N] to the scale, float64 [N]."""
        values = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(values)
        result = np.full(values.shape, np.nan)
        if not finite.any():
            return result
        low, high = np.quantile(self._counted(values, finite), [LOW_QUANTILE, HIGH_QUANTILE])
        if high > low:
            scaled = (values[finite] - low) / (high - low)
        else:
            scaled = np.zeros(finite.sum()) if self.clipped else values[finite] - low
        result[finite] = np.clip(scaled, 0.0, 1.0) if self.clipped else scaled
        return result

    def median(self, values: pd.Series | np.ndarray) -> float:
        """Median of the finite values [N]; NaN where there is none."""
        values = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(values)
        return float(np.median(self._counted(values, finite))) if finite.any() else np.nan

    def _counted(self, values: np.ndarray, finite: np.ndarray) -> np.ndarray:
        if self.copies is None:
            return values[finite]
        counted = np.repeat(values[finite], self.copies[finite].astype(int))
        # A draw that takes no row with a finite value has no scale of its own.
        return counted if len(counted) else values[finite]


def normalize(values: pd.Series | np.ndarray) -> np.ndarray:
    """Scale values to [0, 1] between their 5 % and 95 % quantiles.

    N(z) = clip((z - Q05) / (Q95 - Q05), 0, 1), with linearly interpolated quantiles over the finite
    values.

    Args:
        values: [N] the values of one whole table or batch; any unit.

    Returns:
        float64 [N] in [0, 1]. A value that is not finite gives NaN. Where Q95 equals Q05, every
        finite value gives 0.

    Reference:
        arXiv 2605.26844 and its released code.
    """
    return Scale()(values)


@takes(tokens=token_table)
def score_criterion(
    tokens: pd.DataFrame, name: str, *, seed: Seed = 0, substitute: Mapping[str, str] | None = None
) -> np.ndarray:
    """Score every position of a token table with one criterion.

    Args:
        tokens: Token table with one row per valid response position.
        name: Name or alias of the criterion.
        seed: Seed of criteria that draw random numbers, such as `random`.
        substitute: Columns to read in place of needed ones, for example
            {"compatibility": "topk_overlap_k8"}.

    Returns:
        float64 [N], where a higher score is selected first; NaN where the score is undefined.

    Raises:
        DiagnosticsError: The criterion is unknown, a column is missing or was measured after the
            step, or the function returns a wrong number of scores.
    """
    return _score(tokens, name, seed, substitute, [Scale()])[0]


def score_pairs(
    tokens: pd.DataFrame,
    name: str,
    *,
    seed: Seed = 0,
    substitute: Mapping[str, str] | None = None,
    copies: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score every position with a criterion, and with its unclipped form.

    Args:
        tokens: Token table with one row per valid response position.
        name: Name or alias of the criterion.
        seed: Seed of criteria that draw random numbers.
        substitute: Columns to read in place of needed ones.
        copies: [N] how often each row counts in quantiles and medians; None counts each once.

    Returns:
        Two arrays float64 [N]: the score, and the value that orders equal scores. They are the same
        for a criterion whose function has no argument `scale`. NaN where the score is undefined.

    Raises:
        DiagnosticsError: As `score_criterion`.
    """
    scales = [Scale(clipped=True, copies=copies)]
    if "scale" in find(name).arguments:
        scales.append(Scale(clipped=False, copies=copies))
    found = _score(tokens, name, seed, substitute, scales)
    return found[0], found[-1]


def _score(
    tokens: pd.DataFrame,
    name: str,
    seed: Seed,
    substitute: Mapping[str, str] | None,
    scales: Sequence[Scale],
) -> list[np.ndarray]:
    """Scores [N] under each scale."""
    entry = find(name)
    read = entry.columns(tokens)
    read |= {need: other for need, other in (substitute or {}).items() if need in entry.needs}
    _ask_for_extras(entry, [name for name in read.values() if name not in tokens])
    require_columns(tokens, read.values(), what=f"Criterion {name!r}")
    _refuse_outcomes(entry, read)
    if list(read) == list(read.values()):
        declared = tokens[list(read)]
    else:
        declared = pd.DataFrame({need: tokens[column] for need, column in read.items()})
    found = []
    for scale in scales:
        scores = _call(entry, declared, set(tokens.columns), seed=seed, scale=scale)
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (len(tokens),):
            raise DiagnosticsError(
                f"Criterion {name!r} returned shape {scores.shape} for {len(tokens)} positions."
                " Return one score per row."
            )
        found.append(np.where(np.isfinite(scores), scores, np.nan))
    return found


def _ask_for_extras(entry: Criterion, missing: Sequence[str]) -> None:
    """Say how columns that are measured on request are asked for."""
    extras = [known.on_request for name in missing if (known := column(name)) is not None]
    extras = list(dict.fromkeys(filter(None, extras)))
    if extras:
        raise DiagnosticsError(
            f"Criterion {entry.name!r} needs {', '.join(missing)}, and the table was scored"
            f" without. Score with --extra {','.join(extras)}, or dx.score(…, extra={extras})."
        )


def _call(entry: Criterion, declared: pd.DataFrame, columns: set, **offered):
    asked = {name: value for name, value in offered.items() if name in entry.arguments}
    try:
        return entry.function(declared, **asked)
    except (KeyError, AttributeError) as error:
        name = error.args[0] if isinstance(error, KeyError) else error.name
        # A typo of the user's own keeps its traceback; only an undeclared column gets our sentence.
        if name in columns - set(entry.needs):
            raise DiagnosticsError(
                f"Criterion {entry.name!r} reads {name}, which its needs ({', '.join(entry.needs)})"
                " do not name. Add it to needs."
            ) from error
        raise


def _refuse_outcomes(entry: Criterion, read: Mapping[str, str]) -> None:
    """A predictor that was measured after the step would contain what it predicts."""
    for name in read.values():
        known = column(name)
        if known is not None and known.stage in ("after", "outcome"):
            raise DiagnosticsError(
                f"Criterion {entry.name!r} reads {known.name}, which is known only after the step"
                f" ({known.stage}). Use columns from before it."
            )


def budget_count(positions: int, budget: float) -> int:
    """Number of positions that a budget keeps: ceil(budget * positions).

    The product is rounded to nine decimals first, so that its last bit cannot add a position.

    Args:
        positions: Number of positions of the whole table or batch.
        budget: Share of positions in (0, 1].

    Raises:
        DiagnosticsError: The budget lies outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise DiagnosticsError(
            f"A budget is a share of positions in (0, 1]; got {budget}.{percent_meant(budget)}"
        )
    return ceil(round(budget * positions, 9))


@takes(tokens=token_table, budget=share)
def select(
    tokens: pd.DataFrame,
    by: str | np.ndarray | Callable[[pd.DataFrame], np.ndarray],
    *,
    budget: float | None = None,
    per_context_minimum: int = 0,
    seed: Seed = 0,
    raw: np.ndarray | None = None,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: str | Sequence | np.ndarray | None = None,
) -> np.ndarray:
    """Select the ceil(budget * N) best positions of a table, of each batch or of each response.

    Positions with a NaN score are never selected, so fewer positions are kept where too few scores
    are defined. A budget counts supervised positions; it saves no forward compute. Scores are
    normalized over the whole table, whatever the scope.

    Args:
        tokens: Token table of N rows, with at least `position`, `context_id` where
            `per_context_minimum` or the scope `context` is given, and the columns that the
            criterion needs.
        by: Name of a criterion; scores [N], where a higher score is selected first; or a function
            that makes such scores of the whole table.
        budget: Share of positions in (0, 1], or a text such as `5%`; None stands for the
            criterion's own budget, and for 0.05 where scores are given. A criterion of kind
            `all` keeps every position.
        per_context_minimum: Number of best positions of every context that are kept first, within
            the same budget.
        seed: Seed of criteria that draw random numbers, and of random ties.
        raw: [N] values that order equal scores where `by` is scores; None has none.
        ties: `raw` orders equal scores by the criterion's unclipped form, then by position;
            `position` by position; `random` at random, as a top-k of a training framework may. What
            is still equal goes to the earlier row.
        scope: `table` keeps ceil(budget * N) positions; `batch` and `context` keep that share,
            rounded up, of the positions of each batch or of each context.
        batch: For the scope `batch`, the batch of each position [N], or the column that holds it;
            `training_batches` makes one.

    Returns:
        bool [N], True where the position is selected.

    Raises:
        DiagnosticsError: The budget lies outside (0, 1], or is too small for the minimum per
            context; a rule for ties or a scope is unknown; a batch is missing, or given to another
            scope; and as `score_criterion`.
    """
    if isinstance(by, str) and find(by).kind == "all":
        _check_rules(ties, scope, batch)
        return np.ones(len(tokens), dtype=bool)
    ranked, chosen = _choose(
        tokens, by, budget, per_context_minimum, seed, raw, ties=ties, scope=scope, batch=batch
    )
    mask = np.zeros(len(tokens), dtype=bool)
    mask[ranked.rows[chosen]] = True
    return mask


@takes(tokens=token_table, budget=share)
def ambiguous_share(
    tokens: pd.DataFrame,
    by: str | np.ndarray | Callable[[pd.DataFrame], np.ndarray],
    *,
    budget: float | None = None,
    per_context_minimum: int = 0,
    seed: Seed = 0,
    raw: np.ndarray | None = None,
    ties: Ties = "raw",
    scope: Scope = "table",
    batch: str | Sequence | np.ndarray | None = None,
) -> float:
    """Share of a selection that only positions of equal rank decide.

    These are the selected positions whose score (and, with `ties="raw"`, unclipped score) equals
    that of the best position that is not selected, in their table, batch or context.

    Args:
        tokens: As `select`, whose arguments these are.
        by: As `select`.
        budget: As `select`.
        per_context_minimum: As `select`.
        seed: As `select`.
        raw: As `select`.
        ties: As `select`. With `position` and `random` equal scores alone make a tie.
        scope: As `select`.
        batch: As `select`.

    Returns:
        A share in [0, 1]; NaN where nothing is selected. Above `AMBIGUOUS` a cell is marked.

    Raises:
        DiagnosticsError: As `select`.
    """
    if isinstance(by, str) and find(by).kind == "all":
        return 0.0
    ranked, chosen = _choose(
        tokens, by, budget, per_context_minimum, seed, raw, ties=ties, scope=scope, batch=batch
    )
    return ranked.ambiguous(chosen)


def selection(
    tokens: pd.DataFrame, name: str, *, budget: float, seed: Seed = 0, scope: Scope = "table"
) -> tuple[np.ndarray, float]:
    """What `select` and `ambiguous_share` say of a criterion, from one scoring of the positions.

    Args:
        tokens: As `select`.
        name: Name of the criterion.
        budget: Share of positions in (0, 1].
        seed: As `select`.
        scope: `table` or `context`, as in `select`.

    Returns:
        bool [N], True where the position is selected; and the share of these that ties decide.

    Raises:
        DiagnosticsError: As `select`.
    """
    if find(name).kind == "all":
        return np.ones(len(tokens), dtype=bool), 0.0
    ranked, chosen = _choose(tokens, name, budget, 0, seed, None, scope=scope)
    mask = np.zeros(len(tokens), dtype=bool)
    mask[ranked.rows[chosen]] = True
    return mask, ranked.ambiguous(chosen)


def _choose(
    tokens: pd.DataFrame,
    by: str | np.ndarray | Callable[[pd.DataFrame], np.ndarray],
    budget: float | None,
    minimum: int,
    seed: Seed,
    raw: np.ndarray | None,
    **rules,
) -> tuple[Ranked, np.ndarray]:
    """The ranking, and which of its places are selected [M]."""
    if isinstance(by, str):
        scores, raw = score_pairs(tokens, by, seed=seed)
        budget = find(by).budget if budget is None else budget
    else:
        scores = _given_scores(tokens, by(tokens) if callable(by) else by)
    ranked = rank(tokens, scores, raw, seed=seed, **rules)
    counts = ranked.counts(DEFAULT_BUDGET if budget is None else budget)
    return ranked, ranked.best(counts, _first_of_contexts(tokens, ranked, minimum, counts))


def _given_scores(tokens: pd.DataFrame, scores) -> np.ndarray:
    """Scores [N] that a user gave, or made of the table."""
    try:
        given = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DiagnosticsError(
            f"Positions are selected by a criterion's name, scores or a function of the table; got"
            f" {str(scores)[:60]!r}."
        ) from error
    if given.shape != (len(tokens),):
        raise DiagnosticsError(
            f"Got scores of shape {given.shape} for {len(tokens)} positions. Give one per row."
        )
    return given


@dataclass(frozen=True)
class Ranked:
    """Positions from the best to the worst, within groups that have a budget each.

    Attributes:
        rows: [M] row numbers, group after group; rows without a score are left out.
        group: [M] number of each row's group.
        block: [M] number of the block of equals that the row belongs to.
        scored: [M] number of the block of equal scores, before another value orders them.
        sizes: [G] number of positions of each group, with or without a score.
    """

    rows: np.ndarray
    group: np.ndarray
    block: np.ndarray
    scored: np.ndarray
    sizes: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """[M] place of each row in its group, from 0."""
        return _places(self.group)

    def counts(self, budget: float) -> np.ndarray:
        """[G] number of positions that a budget keeps of each group."""
        return np.array([budget_count(int(size), budget) for size in self.sizes], dtype=int)

    def best(self, counts: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
        """Mark the best positions of each group.

        Args:
            counts: [G] number of positions to keep of each group.
            first: [M] positions that are kept before all others; None has none.

        Returns:
            bool [M].
        """
        chosen = np.zeros(len(self.rows), dtype=bool)
        order = np.arange(len(self.rows)) if first is None else np.lexsort((~first, self.group))
        chosen[order[self.places < counts[self.group]]] = True
        return chosen

    def ambiguous(self, chosen: np.ndarray) -> float:
        """Share of the chosen positions [M] that are equal to the best one left in their group."""
        equal = chosen & self._at_the_cut(chosen, self.block)
        return float(equal.sum() / chosen.sum()) if chosen.any() else np.nan

    def tied(self, chosen: np.ndarray) -> int:
        """Number of positions that share a score which the cut divides, given the chosen [M]."""
        at_cut = self._at_the_cut(chosen, self.scored)
        divided = np.isin(self.scored, self.scored[at_cut & chosen])
        return int(np.count_nonzero(at_cut & divided))

    def _at_the_cut(self, chosen: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """bool [M]: positions in the block of the best position that is left in their group."""
        left = np.flatnonzero(~chosen)
        left = left[_places(self.group[left]) == 0]
        of_group = np.full(len(self.sizes), -1)
        of_group[self.group[left]] = blocks[left]
        return blocks == of_group[self.group]


def rank(
    tokens: pd.DataFrame,
    scores: np.ndarray,
    raw: np.ndarray | None = None,
    *,
    ties: Ties = "raw",
    seed: Seed = 0,
    scope: Scope = "table",
    batch: str | Sequence | np.ndarray | None = None,
) -> Ranked:
    """Rank the positions of a table, of each batch or of each context.

    Args:
        tokens: Token table of N rows with the column `position`.
        scores: [N], where a higher score comes first; rows whose score is not finite are left out.
        raw: [N] values that order equal scores; None has none.
        ties: As `select`.
        seed: Seed of random ties.
        scope: As `select`.
        batch: As `select`.

    Returns:
        The ranking.

    Raises:
        DiagnosticsError: A rule is unknown, or a batch is missing or given to another scope.
    """
    _check_rules(ties, scope, batch)
    order = ranking(tokens, scores, raw, ties=ties, seed=seed)
    codes = _groups(tokens, scope, batch)
    rows = order[np.argsort(codes[order], kind="stable")]
    scored = _blocks(codes[rows], np.asarray(scores, dtype=np.float64)[rows])
    block = scored
    if ties == "raw" and raw is not None:
        block = _blocks(scored, _tie_break(raw)[rows])
    return Ranked(rows, codes[rows], block, scored, np.bincount(codes))


def _blocks(*keys: np.ndarray) -> np.ndarray:
    """[M] number of the run of equal keys [M] that each row belongs to."""
    changes = np.zeros(len(keys[0]), dtype=bool)
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.cumsum(changes)


def ranking(
    tokens: pd.DataFrame,
    scores: np.ndarray,
    raw: np.ndarray | None = None,
    *,
    ties: Ties = "raw",
    seed: Seed = 0,
) -> np.ndarray:
    """Row numbers from the best to the worst score.

    Args:
        tokens: Token table of N rows with the column `position`.
        scores: [N], where a higher score comes first.
        raw: [N] values that order equal scores with `ties="raw"`; None has none.
        ties: `raw` orders equal scores by `raw`, then by position; `position` by position; `random`
            at random.
        seed: Seed of random ties.

    Returns:
        int [M]. What is still equal goes to the earlier row; rows whose score is not finite are
        left out.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if ties == "random":
        # A stream of its own, so that ties do not repeat the numbers of the criterion `random`.
        keys: list = [np.random.default_rng([*np.atleast_1d(seed), 1]).random(len(tokens))]
    else:
        keys = [np.arange(len(tokens)), tokens["position"].to_numpy()]
        if ties == "raw" and raw is not None:
            keys.append(-_tie_break(raw))
    order = np.lexsort((*keys, -scores))
    return order[np.isfinite(scores[order])]


def _tie_break(raw: np.ndarray) -> np.ndarray:
    """Values that order equal scores; one that is not finite comes last."""
    raw = np.asarray(raw, dtype=np.float64)
    return np.where(np.isfinite(raw), raw, np.finfo(np.float64).min)


def training_batches(
    tokens: pd.DataFrame, *, contexts: int = BATCH_CONTEXTS, seed: Seed = 0
) -> np.ndarray:
    """Put the contexts of a table into training batches.

    Args:
        tokens: Token table of N rows with the column `context_id`.
        contexts: Number of contexts of a batch; the last batch may have fewer.
        seed: Seed of the order of the contexts.

    Returns:
        int [N]: the batch of each position, from 0.

    Raises:
        DiagnosticsError: A batch would have no context.
    """
    if contexts < 1:
        raise DiagnosticsError(f"A batch holds at least one context; got {contexts}.")
    codes, names = pd.factorize(tokens["context_id"])
    return np.random.default_rng(seed).permutation(len(names))[codes] // contexts


def _check_rules(ties: str, scope: str, batch) -> None:
    for word, value, known in (("ties", ties, Ties), ("scope", scope, Scope)):
        if value not in get_args(known):
            raise DiagnosticsError(f"{word} is one of {', '.join(get_args(known))}; got {value!r}.")
    if (scope == "batch") != (batch is not None):
        raise DiagnosticsError(
            f"The batch of each position belongs to the scope 'batch'; got scope={scope!r} and"
            f" {'no batch' if batch is None else 'batches'}. Give both, or neither."
        )


def _groups(tokens: pd.DataFrame, scope: str, batch) -> np.ndarray:
    """[N] number of the group whose budget a position belongs to."""
    if scope == "table":
        return np.zeros(len(tokens), dtype=int)
    if scope == "context":
        batch = "context_id"
    if isinstance(batch, str):
        require_columns(tokens, [batch], what=f"The scope {scope!r}")
    labels = tokens[batch] if isinstance(batch, str) else np.asarray(batch)
    if len(labels) != len(tokens):
        raise DiagnosticsError(
            f"There are {len(labels)} batch numbers for {len(tokens)} positions. Give one each."
        )
    if pd.isna(labels).any():
        raise DiagnosticsError(
            f"{int(pd.isna(labels).sum())} positions have no {scope}. Give each position its own."
        )
    return pd.factorize(labels)[0]


def _places(group: np.ndarray) -> np.ndarray:
    """[M] how many rows of the same group stand before, where groups stand together [M]."""
    begins = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else group[:0]
    return np.arange(len(group)) - np.repeat(begins, np.diff(np.r_[begins, len(group)]))


def _first_of_contexts(
    tokens: pd.DataFrame, ranked: Ranked, minimum: int, counts: np.ndarray
) -> np.ndarray | None:
    """[M] the `minimum` best positions of every context."""
    if not minimum:
        return None
    contexts = tokens["context_id"].iloc[ranked.rows]
    first = (contexts.groupby([ranked.group, contexts.to_numpy()]).cumcount() < minimum).to_numpy()
    needed = np.bincount(ranked.group[first], minlength=len(counts))
    if (needed > counts).any():
        short = int(np.argmax(needed > counts))
        raise DiagnosticsError(
            f"per_context_minimum={minimum} needs {needed[short]} positions, more than the budget's"
            f" {counts[short]}. Raise the budget or lower the minimum."
        )
    return first


def quadrants(tokens: pd.DataFrame, *, copies: np.ndarray | None = None) -> np.ndarray:
    """Quadrant of each position in the plane of entropy and divergence.

    The plane is split at the medians of N(H) and of N(KL(q||p)) over the whole vocabulary. Q3,
    confident and wrong, is N(H) <= median and N(KL) >= median; ties at the medians go to it first.
    Q1 is high-high, Q2 high H and low KL, Q4 low-low.

    Args:
        tokens: Token table of N rows with `student_entropy` and `forward_kl` in nats.
        copies: [N] how often each row counts in quantiles and medians; None counts each once.

    Returns:
        int [N]: 1 to 4, and 0 where H or KL is undefined.
    """
    return _quadrants(tokens, Scale(copies=copies))


def _quadrants(tokens: pd.DataFrame, scale: Scale) -> np.ndarray:
    h, d = (scale(tokens[name]) for name in (_H, _KL))
    defined = np.isfinite(h) & np.isfinite(d)
    low_h = h <= scale.median(np.where(defined, h, np.nan))
    high_d = d >= scale.median(np.where(defined, d, np.nan))
    quadrant = np.select([low_h & high_d, ~low_h & high_d, ~low_h & ~high_d], [3, 1, 2], default=4)
    return np.where(defined, quadrant, 0)


def relative_position(tokens: pd.DataFrame) -> np.ndarray:
    """t / (T - 1) in [0, 1], and 0 where the response has one token."""
    # A response of one token divides by 1, not by 0: its only position is its first.
    last = np.maximum(tokens["response_length"].to_numpy(dtype=np.float64) - 1, 1)
    return tokens["position"].to_numpy(dtype=np.float64) / last


def position_tenths(tokens: pd.DataFrame) -> np.ndarray:
    """[N] tenth of the response that each position lies in, 0 to 9."""
    return np.minimum((10 * relative_position(tokens)).astype(int), 9)


# --- the registry

_TA = "2605.26844"
_TIP = "2604.14084"
_SPARSE_OPD = "2609.04565"
_IER = "2609.24432"
_POWER_OPD = "2606.17199"
_SURE = "2608.25643"
_JTA = "ihbkaiser/jta-opd"
"""A repository, for formulas that stand in no paper."""
DIAL_BETA = 1.0
"""Exponent of the difference of probabilities in `dial`; its paper uses 1 to 1.2."""
SURE_ALPHA = 1.0
POWER_ALPHA = 0.1
"""Exponent of both probabilities in `power`, as in its authors' code."""
TAILS_BUDGET = 0.001
"""Share of `tails` where no budget is given: 0.05 % at each end of a response."""
IER_LEAST_NOISE = 1e-8
"""Noise under which `ier` divides by this, as in its authors' code."""
BELLMAN_GAMMA, BELLMAN_LEAST_WEIGHT, BELLMAN_POWER = 0.995, 0.1, 2.0
"""Discount, least weight and exponent of `bellman`, as in its authors' code."""
SPLIT_ENTROPY_SHARE = 0.5
"""Part of the split budget that goes by entropy, as in the released training code."""
_UNSEEN = "the method's own text was not seen; this form is ours"
_H, _KL, _D, _C = "student_entropy", "forward_kl", "union_forward_kl", "compatibility"
_FULL_FOR_UNION = {_D: _KL}
"""Tables that were written without the union's divergence have the whole vocabulary's."""


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a*b for a and b in [0, 1], continued so that it grows with both of any a and b."""
    return np.maximum(a, 0) * np.maximum(b, 0) + np.minimum(a, 0) + np.minimum(b, 0)


def soft_or(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b - a*b for a and b in [0, 1], continued so that it grows with both of any a and b."""
    # In this form the value is exactly 1 wherever a or b is 1, so that rounding decides no tie.
    return 1 - times(1 - a, 1 - b)


@criterion(
    "full",
    needs=["position"],
    formula="every position",
    kind="all",
    budget=1.0,
    aliases=["pure_opd"],
    note="the baseline: no selection",
)
def _full(tokens):
    return np.ones(len(tokens))


@criterion(
    "random",
    needs=["position"],
    formula="uniform, seeded",
    recommended=True,
    note="the control of every other criterion",
)
def _random(tokens, *, seed):
    return np.random.default_rng(seed).random(len(tokens))


@criterion(
    "random_divergent",
    needs=[_D],
    formula="uniform, seeded; positions with D above its median come first",
    instead=_FULL_FOR_UNION,
    note="the control of `teachability` that knows where the models differ, and no more",
)
def _random_divergent(tokens, *, seed, scale):
    divergent = np.where(np.isfinite(tokens[_D]), tokens[_D] > scale.median(tokens[_D]), np.nan)
    return divergent + np.random.default_rng(seed).random(len(tokens))


@criterion(
    "entropy",
    needs=[_H],
    formula="h",
    source=_TA,
    recommended=True,
)
def _entropy(tokens, *, scale):
    return scale(tokens[_H])


@criterion(
    "divergence",
    needs=[_KL],
    formula="N(KL(q||p))",
    source=_TA,
    recommended=True,
    note="`reverse_divergence`, `jsd` and `hellinger` measure nearly the same",
)
def _divergence(tokens, *, scale):
    return scale(tokens[_KL])


@criterion(
    "reverse_divergence",
    needs=["reverse_kl"],
    formula="N(KL(p||q))",
    note="near `divergence`, with the student first",
)
def _reverse_divergence(tokens, *, scale):
    return scale(tokens["reverse_kl"])


@criterion(
    "compatibility",
    needs=[_C],
    formula="c",
    source=_TA,
    recommended=True,
)
def _compatibility(tokens, *, scale):
    return scale(tokens[_C])


@criterion(
    "teachability",
    needs=[_D, _C],
    formula="d*c",
    source=_TA,
    aliases=["dlearn_high"],
    recommended=True,
    instead=_FULL_FOR_UNION,
)
def _teachability(tokens, *, scale):
    return times(scale(tokens[_D]), scale(tokens[_C]))


@criterion(
    "teachability_full",
    needs=[_KL, _C],
    formula="N(KL(q||p))*c",
    source=_TA,
    note="`teachability` with the divergence over the whole vocabulary",
)
def _teachability_full(tokens, *, scale):
    return times(scale(tokens[_KL]), scale(tokens[_C]))


@criterion(
    "teachability_released",
    needs=["union_forward_kl_released", _C],
    formula="N(released D)*c",
    source=_TA,
    note="`teachability` with the floored divergence of the released training code",
)
def _teachability_released(tokens, *, scale):
    return times(scale(tokens["union_forward_kl_released"]), scale(tokens[_C]))


@criterion(
    "position_matched",
    needs=[_D, _C, "position", "response_length"],
    formula="d*c, permuted within each tenth of t/(T - 1), seeded",
    instead=_FULL_FOR_UNION,
    note="the control of `teachability` that knows where in a response it selects, and no more",
)
def _position_matched(tokens, *, seed, scale):
    scores = _teachability(tokens, scale=scale)
    generator, tenth = np.random.default_rng(seed), position_tenths(tokens)
    for number in range(10):
        here = np.flatnonzero((tenth == number) & np.isfinite(scores))
        scores[here] = scores[generator.permutation(here)]
    return scores


@criterion(
    "token_identity",
    needs=["token_identity_gain"],
    formula="mean gain of the same token id on other folds",
    note="the control that knows which token was sampled, and no more",
)
def _token_identity(tokens):
    return tokens["token_identity_gain"]


@criterion(
    "incompatible",
    needs=[_D, _C],
    formula="d*(1 - c)",
    source=_TA,
    aliases=["dincompat_high"],
    note="the rest of d after `teachability`",
    instead=_FULL_FOR_UNION,
)
def _incompatible(tokens, *, scale):
    return times(scale(tokens[_D]), 1 - scale(tokens[_C]))


@criterion(
    "tip",
    needs=[_H, _D],
    formula="h + d - h*d",
    source=_TIP,
    recommended=True,
    instead=_FULL_FOR_UNION,
)
def _tip(tokens, *, scale):
    return soft_or(scale(tokens[_H]), scale(tokens[_D]))


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
    note="near `tip`: reverse KL, scaled by minimum and maximum",
)
def _tip_paper(tokens):
    return soft_or(_min_max(tokens[_H]), _min_max(tokens["reverse_kl"]))


@criterion(
    "teachability_entropy",
    needs=[_H, _D, _C],
    formula="h + dc - h*dc",
    source=_TA,
    aliases=["ca_softor"],
    note="`tip` with d*c in place of d",
    instead=_FULL_FOR_UNION,
)
def _teachability_entropy(tokens, *, scale):
    return soft_or(scale(tokens[_H]), _teachability(tokens, scale=scale))


@criterion(
    "q3_teachability",
    needs=[_H, _KL, _D, _C],
    formula="d*c inside Q3, undefined elsewhere",
    source=_TA,
    aliases=["q3_teachability_high"],
    note="`teachability` inside one quadrant",
    instead=_FULL_FOR_UNION,
)
def _q3_teachability(tokens, *, scale):
    return _inside_q3(tokens, _teachability(tokens, scale=scale), scale)


def _inside_q3(tokens: pd.DataFrame, values: np.ndarray, scale: Scale) -> np.ndarray:
    """The values [N] inside Q3, NaN elsewhere: no budget reaches beyond the quadrant."""
    return np.where(_quadrants(tokens, replace(scale, clipped=True)) == 3, values, np.nan)


@criterion(
    "q3_teachability_low",
    needs=[_H, _KL, _D, _C],
    formula="d*c inside Q3, undefined elsewhere",
    direction="low",
    source=_TA,
    note="the other end of `q3_teachability`",
    instead=_FULL_FOR_UNION,
    by_name=True,
)
def _q3_teachability_low(tokens, *, scale):
    return -_q3_teachability(tokens, scale=scale)


@criterion(
    "q3_incompatible",
    needs=[_H, _KL, _D, _C],
    formula="d*(1 - c) inside Q3, undefined elsewhere",
    source=_TA,
    aliases=["q3_dincompat_high"],
    note="`incompatible` inside one quadrant",
    instead=_FULL_FOR_UNION,
    by_name=True,
)
def _q3_incompatible(tokens, *, scale):
    return _inside_q3(tokens, _incompatible(tokens, scale=scale), scale)


@criterion(
    "q3_compatibility",
    needs=[_H, _KL, _C],
    formula="c inside Q3, undefined elsewhere",
    source=_TA,
    aliases=["q3_highc"],
    note="`compatibility` inside one quadrant",
    by_name=True,
)
def _q3_compatibility(tokens, *, scale):
    return _inside_q3(tokens, scale(tokens[_C]), scale)


@criterion(
    "q3_compatibility_low",
    needs=[_H, _KL, _C],
    formula="c inside Q3, undefined elsewhere",
    direction="low",
    source=_TA,
    aliases=["q3_lowc"],
    note="the other end of `q3_compatibility`",
    by_name=True,
)
def _q3_compatibility_low(tokens, *, scale):
    return -_q3_compatibility(tokens, scale=scale)


@criterion(
    "q3",
    needs=[_H, _KL],
    formula="uniform, seeded; inside Q3, undefined elsewhere",
    source=_TA,
    note="the control of every mask inside Q3: it knows the quadrant, and no more",
    by_name=True,
)
def _q3(tokens, *, seed, scale):
    return _inside_q3(tokens, np.random.default_rng(seed).random(len(tokens)), scale)


@criterion(
    "split_budget",
    needs=[_H, _D, _C, "position"],
    formula="half of any budget by h, the rest by (1 - h)*d*c among what is left",
    source=_TA,
    aliases=["split_budget_ca"],
    note="the score is the order in which a growing budget takes positions, so that none are equal",
    instead=_FULL_FOR_UNION,
    by_name=True,
)
def _split_budget(tokens, *, scale):
    scales = [replace(scale, clipped=clipped) for clipped in (True, False)]
    by_h = [each(tokens[_H]) for each in scales]
    by_rest = [
        times(1 - h, _teachability(tokens, scale=each))
        for h, each in zip(by_h, scales, strict=True)
    ]
    defined = np.isfinite(by_h[0]) & np.isfinite(by_rest[0])
    here = tokens[["position"]]
    # A position without one of the two scores is in neither order.
    orders = [
        ranking(here, np.where(defined, clipped, np.nan), raw) for clipped, raw in (by_h, by_rest)
    ]
    return _split_order(*orders, len(tokens))


def _split_order(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Minus the place [N] at which a growing budget takes each row, NaN for rows it never takes.

    A budget of n rows holds the round(share*n) best of the first order, and for the rest the best
    of the second that are left. Larger budgets contain smaller ones, since n grows either part by
    one row, and a row that moves from the second part into the first makes room for the next.
    """
    taken, score, at = np.zeros(count, dtype=bool), np.full(count, np.nan), 0
    for place in range(len(first)):
        row = None
        # Python rounds a half to the even number, as the released code does.
        if round(SPLIT_ENTROPY_SHARE * (place + 1)) > round(SPLIT_ENTROPY_SHARE * place):
            row = first[round(SPLIT_ENTROPY_SHARE * place)]
        if row is None or taken[row]:
            while taken[second[at]]:
                at += 1
            row = second[at]
        taken[row], score[row] = True, -float(place)
    return score


@criterion(
    "advantage_abs",
    needs=["advantage"],
    formula="|A|, A = ln q(y) - ln p(y)",
    note="the size of `advantage`",
)
def _advantage_abs(tokens):
    return tokens["advantage"].abs()


@criterion(
    "surprise",
    needs=["advantage"],
    formula="-A",
    aliases=["sampled_rkl_max"],
    source=_SPARSE_OPD,
    note="the negation of `advantage`",
)
def _surprise(tokens):
    return -tokens["advantage"]


@criterion(
    "advantage",
    needs=["advantage"],
    formula="A",
    aliases=["sampled_rkl_min"],
    source=_SPARSE_OPD,
    note="the negation of `surprise`",
)
def _advantage(tokens):
    return tokens["advantage"]


@criterion(
    "acceptance",
    needs=["acceptance"],
    formula="min(1, q(y)/p(y))",
    kind="weight",
    budget=1.0,
    note="`advantage` capped at 0, as a probability",
)
def _acceptance(tokens):
    return tokens["acceptance"]


@criterion(
    "selectkd",
    needs=["student_top1_in_teacher_top5"],
    kind="weight",
    budget=1.0,
    formula="1 where the student's first choice is in the teacher's top 5, else 0.01",
    source="2510.24021",
)
def _selectkd(tokens):
    return np.where(tokens["student_top1_in_teacher_top5"], 1.0, SELECTKD_REJECTED_WEIGHT)


@criterion(
    "projected_gradient",
    needs=["union_log_ratio_variance"],
    formula="Var_pU[ln qU - ln pU]",
    source=_JTA,
    aliases=["pgt"],
    recommended=True,
    note="the signal of `ier` on the two lists alone, without a floor",
)
def _projected_gradient(tokens):
    return tokens["union_log_ratio_variance"]


@criterion(
    "early",
    needs=["position", "response_length"],
    formula="1 - t/(T - 1)",
    aliases=["prefix"],
    source=_TA,
    note="the negation of `late`",
)
def _early(tokens):
    return 1 - relative_position(tokens)


@criterion(
    "late",
    needs=["position", "response_length"],
    formula="t/(T - 1)",
    note="the negation of `early`",
)
def _late(tokens):
    return relative_position(tokens)


@criterion("teacher_confidence", needs=["teacher_entropy"], formula="-H(q)")
def _teacher_confidence(tokens):
    return -tokens["teacher_entropy"]


@criterion(
    "hellinger",
    needs=["hellinger"],
    formula="sqrt(1 - sum sqrt(p q))",
    note="near `divergence`, bounded by 1",
)
def _hellinger(tokens):
    return tokens["hellinger"]


@criterion(
    "jsd",
    needs=["js"],
    formula="JS(p, q)",
    note="near `divergence`, bounded by ln 2",
)
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
    source="2606.22600",
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
    note="ranks like `late`",
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
    note=_UNSEEN,
)
def _fire(tokens):
    confident_teacher = 1 - tokens["teacher_entropy"] / tokens["teacher_entropy"].max()
    open_student = tokens["student_entropy"] / tokens["student_entropy"].max()
    weight = (1 + confident_teacher) * (1 + open_student)
    return weight / weight.mean()


def _probabilities(tokens: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """p(y) and q(y) [N] of the sampled tokens."""
    ln_p, ln_q = (
        tokens[name].to_numpy(dtype=np.float64) for name in ("student_logprob", "teacher_logprob")
    )
    return np.exp(ln_p), np.exp(ln_q)


@criterion(
    "dial",
    needs=["advantage", "student_logprob", "teacher_logprob"],
    formula="|A|^(1 - b) |q(y) - p(y)|^b, b = 1",
    source="2610.11659",
    note="`power` with exponent 1; its paper spends the budget on each response",
    by_name=True,
)
def _dial(tokens):
    p, q = _probabilities(tokens)
    return tokens["advantage"].abs() ** (1 - DIAL_BETA) * np.abs(q - p) ** DIAL_BETA


@criterion(
    "power",
    needs=["student_logprob", "teacher_logprob"],
    formula="|q(y)^a - p(y)^a|, a = 0.1",
    source=_POWER_OPD,
    note="near `advantage_abs`, which it becomes (over a) as a goes to 0; `dial` at a = 1",
    by_name=True,
)
def _power(tokens):
    p, q = _probabilities(tokens)
    return np.abs(q**POWER_ALPHA - p**POWER_ALPHA)


@criterion(
    "gradient_size",
    needs=["advantage", "student_logprob"],
    formula="2|A|(1 - p(y))",
    source=_SURE,
    note="`advantage_abs` where p(y) is small; the l1 norm of the sampled-token loss's gradient",
    by_name=True,
)
def _gradient_size(tokens):
    return 2 * tokens["advantage"].abs() * -np.expm1(tokens["student_logprob"])


@criterion(
    "sure",
    needs=["student_logprob"],
    kind="weight",
    budget=1.0,
    formula="1 + a(1 - p(y)), a = 1",
    source=_SURE,
    note="near `entropy`: ranks by -ln p(y), and knows nothing of the teacher",
    by_name=True,
)
def _sure(tokens):
    return 1 - SURE_ALPHA * np.expm1(tokens["student_logprob"])


@criterion(
    "tails",
    needs=["advantage", "context_id"],
    formula="-min(r, T + 1 - r)/T for the rank r of A in its response, equals by |A|",
    budget=TAILS_BUDGET,
    source=_SPARSE_OPD,
    aliases=["pctltail"],
    note="the first of `advantage` and of `surprise` in each response",
    by_name=True,
)
def _tails(tokens, *, scale):
    if not scale.clipped:
        return tokens["advantage"].abs()
    by_context = tokens["advantage"].groupby(tokens["context_id"].to_numpy())
    rank, size = by_context.rank(method="average"), by_context.transform("count")
    return -np.minimum(rank, size + 1 - rank) / size


@criterion(
    "ier",
    needs=["ier_signal", "ier_noise"],
    formula="signal/noise of the sampled-token gradient on S, T and y",
    source=_IER,
    note="its columns are measured by `score --extra ier`",
    by_name=True,
)
def _ier(tokens):
    return tokens["ier_signal"] / tokens["ier_noise"].clip(lower=IER_LEAST_NOISE)


@criterion(
    "ier_full",
    needs=["ier_full_signal", "ier_full_noise"],
    formula="the same over the whole vocabulary",
    note="near `projected_gradient`; `ier` without candidates and floor, by `score --extra ier`",
    by_name=True,
)
def _ier_full(tokens):
    return tokens["ier_full_signal"] / tokens["ier_full_noise"].clip(lower=IER_LEAST_NOISE)


@criterion(
    "teacher_top1_gap",
    needs=["teacher_top1_gap"],
    formula="q(a) - p(a) of the teacher's first choice a",
    source=_POWER_OPD,
    note="its source logs it; the column is measured by `score --extra teacher_top1_gap`",
    by_name=True,
)
def _teacher_top1_gap(tokens):
    return tokens["teacher_top1_gap"]


@criterion(
    "bellman",
    needs=[_D, _C, "acceptance", "context_id", "position"],
    kind="weight",
    budget=1.0,
    formula="0.1 + 0.9 N(R/M)^2; R = d*c + g*a*R', M = 1 + g*a*M', g = 0.995",
    source=_JTA,
    aliases=["rac"],
    note="`teachability` averaged over what comes next, as far as the teacher accepts it",
    instead=_FULL_FOR_UNION,
    by_name=True,
)
def _bellman(tokens, *, scale):
    local = _teachability(tokens, scale=replace(scale, clipped=True))
    scaled = scale(_future_mean(tokens, local))
    if not scale.clipped:
        return scaled
    return BELLMAN_LEAST_WEIGHT + (1 - BELLMAN_LEAST_WEIGHT) * scaled**BELLMAN_POWER


def _future_mean(tokens: pd.DataFrame, local: np.ndarray) -> np.ndarray:
    """R/M [N]: values [N] averaged along the rest of each response, discounted and accepted."""
    order = np.lexsort((tokens["position"].to_numpy(), pd.factorize(tokens["context_id"])[0]))
    contexts = pd.factorize(tokens["context_id"].to_numpy()[order])[0]
    place = _places(contexts)
    by_place = np.argsort(place, kind="stable")
    keep = BELLMAN_GAMMA * tokens["acceptance"].to_numpy(dtype=np.float64)[order]
    total, mass = local[order].copy(), np.ones(len(order))
    has_next = np.r_[contexts[1:] == contexts[:-1], False] if len(order) else np.zeros(0, bool)
    # From the last place backwards, so that what comes next is final where it is read.
    for rows in np.split(by_place, np.cumsum(np.bincount(place))[:-1])[::-1]:
        rows = rows[has_next[rows]]
        total[rows] += keep[rows] * total[rows + 1]
        mass[rows] += keep[rows] * mass[rows + 1]
    found = np.empty(len(order))
    found[order] = total / mass
    return found


for _path in filter(None, os.environ.get(MODULES_VARIABLE, "").split(os.pathsep)):
    load_module(_path)  # this process was started by one that had loaded it
