"""Several teachers on one bank: whose signal is more learnable where, and how far they agree.

The same student, the same frozen responses, one token table per teacher. At every position the
teachers are compared with each other, so that what differs between positions falls out:

    teachers              mean of each measure per teacher and group of positions
    teachers_differences  one teacher minus another, position by position
    teachers_best         share of positions where a teacher's D*C is the largest
    teachers_agreement    rank correlation of each measure between two teachers, overlap of their
                          likeliest tokens, and the Jaccard index of what a criterion selects with
                          each of them, beside that of two independent selections

D*C (`compatible_divergence`) is KL(q||p) times the teacher's mass on the student's top K, in nats:
what a teacher would change where the student can follow. `teachability` is the criterion, with both
factors scaled over all teachers' positions together, because a scale of each teacher's own would
make every teacher the same on average. Selections are each teacher's own, as a training with that
teacher makes them.

Intervals are over prompts. A difference is called higher or lower where Holm's p value over the
rows of the table is below 1 - level, on 20 prompts or more; else it is "not told apart". Where one
teacher has full logits and another only lists, their KLs and C are an exact value and a lower
bound: the difference is shown and not judged. Gains are compared where both teachers' runs were
probed; they are steps towards different teachers, in nats of different divergences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap as clusters
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, holm
from diagnostics.analysis.bounds import is_listed
from diagnostics.analysis.config import FEWEST_PROMPTS, Bootstrap
from diagnostics.analysis.rank_correlation import Variable, spearman_pairs
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import step_count
from diagnostics.core.inputs import several, shares, takes, token_table
from diagnostics.core.schema import column
from diagnostics.core.settings import with_settings
from diagnostics.core.shown import Tables

log = logging.getLogger("diagnostics")
KEYS = ["context_id", "position"]
SAME_STUDENT = 1e-3
"""Nats by which ln p(y) may differ between two scores of one student: batches round otherwise."""
LEARNABLE = "compatible_divergence"
GAINS = ("reverse_gain", "gain", "context_gain")
MEASURES = (
    "forward_kl",
    "reverse_kl",
    "compatibility",
    LEARNABLE,
    "teachability",
    "teacher_entropy",
    "advantage",
    "acceptance",
    *GAINS,
)
"""What is compared, as far as the tables have it."""
CRITERIA, BUDGETS = ("teachability", "divergence"), (0.05, 0.2)
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
THIRDS = ("low student entropy", "middle student entropy", "high student entropy")
TOP_SIZES = (1, 5)
"""Sizes of the lists of likeliest tokens whose overlap is measured; `tops.parquet` has five."""
MEAN_COLUMNS = ("teacher", "measure", "group", "mean", "low", "high", "positions", "prompts")
DIFFERENCE_COLUMNS = ("teacher", "other", "measure", "group", "difference", "low", "high")
DIFFERENCE_COLUMNS += ("p_value", "positions", "prompts")
BEST_COLUMNS = ("teacher", "group", "share", "low", "high", "chance", "positions", "prompts")
AGREEMENT_COLUMNS = ("teacher", "other", "what", "measure", "size", "value", "low", "high")
AGREEMENT_COLUMNS += ("chance", "positions", "prompts")


def _each_table(value: Any) -> Any:
    """A token table per teacher: tables, runs or files by name, or runs in a list."""
    if not isinstance(value, Mapping):
        value = {str(each).rstrip("/").rpartition("/")[2]: each for each in several(value)}
    return {str(name): token_table(each) for name, each in value.items()}


@takes(tables=_each_table, criteria=several, budgets=shares)
@with_settings(bootstrap=Bootstrap)
def compare_teachers(
    tables: Mapping[str, pd.DataFrame],
    *,
    tops: Mapping[str, pd.DataFrame] | None = None,
    domains: Mapping[str, str] | None = None,
    criteria: Sequence[str] = CRITERIA,
    budgets: Sequence[float] = BUDGETS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """Compare teachers that were scored on the same frozen contexts of one student.

    Args:
        tables: Token tables by the teacher's name, two or more; also run directories, as a mapping
            or a list. Positions that some table lacks are left out of all, with a warning.
        tops: The most likely tokens per position (`tops.parquet`: context_id, position,
            teacher_top_ids) by the teacher's name; None leaves their overlap out.
        domains: Domain by prompt_id; its domains are groups then.
        criteria: Criteria whose selections are compared.
        budgets: Shares of positions that they select.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Tables by name. teachers: teacher, measure, group, mean, low, high, positions, prompts,
        exactness, left_out (positions of this table that another lacks). teachers_differences:
        teacher, other, measure, group, difference (first minus other), low, high, p_value (Holm's),
        positions, prompts, exactness, verdict. teachers_best: teacher, group, share, low, high,
        chance, positions, prompts. teachers_agreement: teacher, other, what (rank correlation,
        overlap, Jaccard), measure (or criterion), size (list length or budget), value, low, high,
        chance (what two independent selections give), positions, prompts.

    Raises:
        DiagnosticsError: There are fewer than two tables, they share no position, they are of
            different students or responses, or K differs.
    """
    names = list(tables)
    if len(names) < 2:
        raise DiagnosticsError(
            f"Teachers are compared with each other; got {len(names)}. Give two runs or more."
        )
    common, left_out = _common(tables)
    _require_one_student(common)
    _add_measures(common)
    first = common[names[0]]
    prompts = PromptClusters(first["prompt_id"], bootstrap=bootstrap)
    groups = _groups(first, domains)
    listed = {name: is_listed(table) for name, table in common.items()}
    means = {name: _estimates(table, groups, bootstrap) for name, table in common.items()}
    return Tables(
        teachers=_means(means, groups, bootstrap, listed, left_out),
        teachers_differences=_differences(common, means, groups, prompts, bootstrap, listed),
        teachers_best=_best(common, groups, prompts, bootstrap),
        teachers_agreement=_agreement(
            common, _aligned(tops or {}, first), criteria, budgets, prompts, bootstrap
        ),
    )


def _common(
    tables: Mapping[str, pd.DataFrame],
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """The positions that all tables have, in one order, and how many each loses."""
    indexed = {name: table.set_index(KEYS, drop=False) for name, table in tables.items()}
    shared = next(iter(indexed.values())).index
    for table in indexed.values():
        shared = shared[shared.isin(table.index)]
    if not len(shared):
        raise DiagnosticsError(
            "The teachers' tables share no position. Score the same frozen contexts with each:"
            " --rollouts FIRST_RUN/contexts.parquet."
        )
    left_out = {name: len(table) - len(shared) for name, table in indexed.items()}
    if any(left_out.values()):
        log.warning(
            "positions that another teacher's table lacks are left out: %s",
            ", ".join(f"{count} of {name}" for name, count in left_out.items() if count),
        )
    common = {name: table.loc[shared].reset_index(drop=True) for name, table in indexed.items()}
    return common, left_out


def _require_one_student(common: Mapping[str, pd.DataFrame]) -> None:
    """Refuse tables of different responses or students."""
    (first, here), *others = common.items()
    for name, table in others:
        other_tokens = here["token_id"].to_numpy() != table["token_id"].to_numpy()
        if other_tokens.any():
            at = here[other_tokens].iloc[0]
            raise DiagnosticsError(
                f"{first} and {name} have other tokens at position {at.position} of context"
                f" {at.context_id!r}: the responses are not the same. Score one bank with each"
                " teacher."
            )
        apart = float((here["student_logprob"] - table["student_logprob"]).abs().max())
        if apart > SAME_STUDENT:
            raise DiagnosticsError(
                f"{first} and {name} were scored with different students or dtypes: ln p(y) differs"
                f" by up to {apart:.3g} nats. Score one student with each teacher."
            )


def _add_measures(common: dict[str, pd.DataFrame]) -> None:
    """Add what is learnable to each table, with one scale for all teachers."""
    for name, table in common.items():
        if {"forward_kl", "compatibility"} <= set(table):
            common[name] = table.assign(**{LEARNABLE: table["forward_kl"] * table["compatibility"]})
    if any(registry.missing_columns(table, "teachability") for table in common.values()):
        return
    pooled = pd.concat(list(common.values()), ignore_index=True)
    scores = np.split(registry.score_criterion(pooled, "teachability"), len(common))
    for (name, table), score in zip(list(common.items()), scores):
        common[name] = table.assign(teachability=score)


def _groups(table: pd.DataFrame, domains: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    """Masks [N] of the groups of positions; each depends on student and prompt alone."""
    groups = {"all": np.ones(len(table), bool)}
    if domains:
        known = {str(key): str(value) for key, value in domains.items() if pd.notna(value)}
        of = table["prompt_id"].astype(str).map(known)
        groups |= {
            f"domain {name}": (of == name).to_numpy() for name in sorted(of.dropna().unique())
        }
        if of.isna().any():
            groups["no domain"] = of.isna().to_numpy()
    length = table.get("response_length", table.groupby("context_id")["position"].transform("size"))
    part = np.minimum((4 * table["position"] / length).to_numpy().astype(int), 3)
    groups |= {name: part == number for number, name in enumerate(QUARTERS)}
    if "student_entropy" in table:
        entropy = table["student_entropy"].to_numpy()
        third = np.searchsorted(np.nanquantile(entropy, [1 / 3, 2 / 3]), entropy)
        groups |= {name: third == number for number, name in enumerate(THIRDS)}
    return {name: where for name, where in groups.items() if where.any()}


def exactness(measure: str, *, listed: bool) -> str:
    """How exact a measure of a teacher is: exact with full logits, else as its columns are."""
    if not listed:
        return "exact"
    if measure in (LEARNABLE, "teachability"):
        return "of lower bounds"
    entry = column(measure)
    return "exact" if entry is None else str(entry.listed)


def _ends(estimate: Estimate, bootstrap: Bootstrap) -> tuple[float, float]:
    return estimate.interval(bootstrap.level)


Estimates = dict[tuple[str, str], Estimate]
"""Means by measure and group."""


def _estimates(
    table: pd.DataFrame, groups: Mapping[str, np.ndarray], bootstrap: Bootstrap
) -> Estimates:
    """Means of one teacher's measures; those of gains carry their steps too."""

    def of(measures: Sequence[str]) -> Callable[[pd.DataFrame, Bootstrap], Estimates]:
        def make(tokens: pd.DataFrame, settings: Bootstrap) -> Estimates:
            prompts = PromptClusters(tokens["prompt_id"], bootstrap=settings)
            return {
                (measure, group): clusters.mean(tokens[measure].to_numpy(float), prompts, where)
                for measure in measures
                if measure in tokens
                for group, where in groups.items()
            }

        return make

    before = [measure for measure in MEASURES if measure not in GAINS]
    return of(before)(table, bootstrap) | over_steps(of(GAINS), table, bootstrap)


def _means(
    found: Mapping[str, Estimates],
    groups: Mapping[str, np.ndarray],
    bootstrap: Bootstrap,
    listed: Mapping[str, bool],
    left_out: Mapping[str, int],
) -> pd.DataFrame:
    rows = []
    for measure in MEASURES:
        for group in groups:
            for name, estimates in found.items():
                if (measure, group) in estimates:
                    mean = estimates[measure, group]
                    counts = (mean.positions, mean.prompts)
                    rows.append(
                        (name, measure, group, mean.value, *_ends(mean, bootstrap), *counts)
                    )
    made = pd.DataFrame(rows, columns=list(MEAN_COLUMNS))
    exact = [exactness(m, listed=listed[t]) for t, m in zip(made["teacher"], made["measure"])]
    return made.assign(exactness=exact, left_out=made["teacher"].map(left_out))


OTHER_STEPS = "%s of %s and %s come from different numbers of steps and are not subtracted"


def _differences(
    common: Mapping[str, pd.DataFrame],
    means: Mapping[str, Estimates],
    groups: Mapping[str, np.ndarray],
    prompts: PromptClusters,
    bootstrap: Bootstrap,
    listed: Mapping[str, bool],
) -> pd.DataFrame:
    rows = []
    for measure in MEASURES:
        for one, other in combinations(common, 2):
            pair = (common[one], common[other])
            if any(measure not in table for table in pair):
                continue
            if measure in GAINS and len({step_count(table) for table in pair}) > 1:
                log.warning(OTHER_STEPS, measure, one, other)
                continue
            apart = (pair[0][measure] - pair[1][measure]).to_numpy(float)
            for group, where in groups.items():
                if measure in GAINS:
                    found = means[one][measure, group] - means[other][measure, group]
                else:
                    found = clusters.mean(apart, prompts, where)
                counts = (found.p_value, found.positions, found.prompts)
                ends = _ends(found, bootstrap)
                rows.append((one, other, measure, group, found.value, *ends, *counts))
    made = pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS))
    pairs = [
        tuple(exactness(measure, listed=listed[name]) for name in (one, other))
        for one, other, measure in made[["teacher", "other", "measure"]].itertuples(index=False)
    ]
    made["exactness"] = [a if a == b else f"{a} against {b}" for a, b in pairs]
    # A rank that cannot be judged is no test, and does not count in the correction.
    judged = (made["prompts"] >= FEWEST_PROMPTS) & np.array([a == b for a, b in pairs], dtype=bool)
    made["p_value"] = holm(made["p_value"].where(judged, np.nan).to_numpy(float))
    made["verdict"] = [_verdict(row, bootstrap) for row in made.itertuples()]
    return made


def _verdict(row: Any, bootstrap: Bootstrap) -> str:
    """What a difference says."""
    if " against " in row.exactness:
        return "not comparable"
    if row.prompts < FEWEST_PROMPTS:
        return "too few prompts"
    if not np.isfinite(row.p_value):
        return "undefined"
    if row.p_value >= 1 - bootstrap.level:
        return "not told apart"
    return "higher" if row.difference > 0 else "lower"


def _best(
    common: Mapping[str, pd.DataFrame],
    groups: Mapping[str, np.ndarray],
    prompts: PromptClusters,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    """Share of positions where each teacher's D*C is the largest; ties are divided."""
    if any(LEARNABLE not in table for table in common.values()):
        return pd.DataFrame(columns=list(BEST_COLUMNS))
    values_TN = np.stack([table[LEARNABLE].to_numpy(float) for table in common.values()])
    with np.errstate(invalid="ignore"):
        best_TN = (values_TN == values_TN.max(0)).astype(float)
        best_TN /= best_TN.sum(0)  # NaN where a teacher's is undefined
    rows = []
    for group, where in groups.items():
        for name, share in zip(common, best_TN):
            found = clusters.mean(share, prompts, where)
            counts = (1 / len(common), found.positions, found.prompts)
            rows.append((name, group, found.value, *_ends(found, bootstrap), *counts))
    return pd.DataFrame(rows, columns=list(BEST_COLUMNS))


# --- agreement


def _aligned(tops: Mapping[str, pd.DataFrame], table: pd.DataFrame) -> dict[str, list]:
    """Lists of the teachers' likeliest ids [N], in the order of the positions."""
    return {
        name: table[KEYS]
        .merge(each[[*KEYS, "teacher_top_ids"]], on=KEYS, how="left")["teacher_top_ids"]
        .tolist()
        for name, each in tops.items()
        if "teacher_top_ids" in each
    }


def _agreement(
    common: Mapping[str, pd.DataFrame],
    tops: Mapping[str, list],
    criteria: Sequence[str],
    budgets: Sequence[float],
    prompts: PromptClusters,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    rows: list[tuple] = []
    for one, other in combinations(common, 2):
        pair = (common[one], common[other])
        found = list(_ranks(pair, prompts))
        if one in tops and other in tops:
            found += _overlaps(tops[one], tops[other], prompts)
        found += _selections(pair, criteria, budgets, prompts)
        for what, measure, size, estimate, chance in found:
            ends = _ends(estimate, bootstrap)
            counts = (chance, estimate.positions, estimate.prompts)
            rows.append((one, other, what, measure, size, estimate.value, *ends, *counts))
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


Agreed = tuple[str, str, float, Estimate, float]
"""What agrees, of which measure, at which size, how far, and how far by chance."""


def _ranks(pair: tuple[pd.DataFrame, pd.DataFrame], prompts: PromptClusters) -> Iterator[Agreed]:
    """Rank correlations of each measure, over positions, ranked anew in every draw."""
    for measure in MEASURES:
        if all(measure in table for table in pair):
            one, other = ({measure: Variable(table[measure].to_numpy(float))} for table in pair)
            found = spearman_pairs(one, other, prompts)[measure, measure]
            yield "rank correlation", measure, np.nan, found, 0.0


def _overlaps(one: list, other: list, prompts: PromptClusters) -> Iterator[Agreed]:
    """Mean share of the k likeliest tokens that both teachers have."""
    for size in TOP_SIZES:
        shared = np.array([_overlap(a, b, size) for a, b in zip(one, other)])
        if np.isfinite(shared).any():
            yield "overlap", "top tokens", size, clusters.mean(shared, prompts), np.nan


def _overlap(one: Any, other: Any, size: int) -> float:
    """Share of two lists' first `size` ids; NaN where a list is shorter."""
    if not all(hasattr(each, "__len__") and len(each) >= size for each in (one, other)):
        return np.nan
    return len({*one[:size]} & {*other[:size]}) / size


def _selections(
    pair: tuple[pd.DataFrame, pd.DataFrame],
    criteria: Sequence[str],
    budgets: Sequence[float],
    prompts: PromptClusters,
) -> Iterator[Agreed]:
    """Jaccard index of what a criterion selects with each of two teachers.

    Two independent selections of a share b share b^2 of the positions: b / (2 - b).
    """
    for criterion in criteria:
        if any(registry.missing_columns(table, criterion) for table in pair):
            continue
        for budget in budgets:
            one, other = (registry.select(table, criterion, budget=budget) for table in pair)
            yield "Jaccard", criterion, budget, _jaccard(one, other, prompts), budget / (2 - budget)


def _jaccard(one: np.ndarray, other: np.ndarray, prompts: PromptClusters) -> Estimate:
    """Positions in both selections [N] over those in either; the selections are made once."""
    sums = prompts.sums((one | other).astype(float), (one & other).astype(float))
    everywhere = np.ones(len(one), bool)
    return clusters.of_sums(clusters.ratio_of_sums, sums, prompts, everywhere)[0]


def teachers_sentences(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the comparison says, one sentence per pair of teachers and group that was judged.

    Args:
        tables: What `compare_teachers` returns.

    Returns:
        Sentences on what is learnable (D*C): over all positions, and in each domain.
    """
    found = tables["teachers_differences"]
    found = found[found["measure"] == LEARNABLE]
    said = []
    for row in found.itertuples():
        if row.group != "all" and not str(row.group).startswith(("domain ", "no domain")):
            continue
        where = "over all positions" if row.group == "all" else f"in {row.group}"
        figures = f"{row.difference:+.3g} nats per position, {row.low:.3g} to {row.high:.3g}"
        clear = row.verdict in ("higher", "lower")
        what = (
            f"{row.teacher} offers {'more' if row.verdict == 'higher' else 'less'} that this"
            f" student can follow than {row.other}"
            if clear
            else f"{row.teacher} and {row.other}: {row.verdict}"
        )
        said.append(f"{what} {where} (D*C: {figures}; {row.prompts} prompts).")
    return said
