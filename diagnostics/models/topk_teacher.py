"""A top-K teacher, known by lists of its most likely tokens alone: what a server returns.

At a position the file holds a list L of token ids with ln q(v). The rest of the teacher's mass, r =
1 - sum over L of q, is one bucket. With P = sum outside L of p, the student's mass there:

    forward_kl        sum over L of q ln(q/p) + r ln(r/P)          at most KL(q||p), teacher first
    reverse_kl        sum over L of p ln(p/q) + P ln(P/r)          at most KL(p||q)
    js, hellinger     the same with the bucket as one more token   at most the exact ones
    teacher_entropy   - sum over L of q ln q - r ln r              at most H(q)
    compatibility     sum over S & L of q                          at most C

Merging tokens into a bucket can only lower an f-divergence (data processing), and a longer list
only raises it; a list of the whole vocabulary gives the exact values. A measurement that needs q of
one token is exact where L holds that token and NaN otherwise; one that needs the teacher's top K is
exact up to the list's depth and left out beyond it. `core.schema.Column.listed` says for each
column which case it is.

The bucket is carried as a full distribution: the teacher's tail takes the shape of the student's,

    q^(v) = q(v) on L,  r p(v)/P outside,

for KL(q^||p) is the bucketed KL, and so for KL(p||q^), JS and every f-divergence. Among the
teachers that the list allows, q^ is the nearest to the student; therefore the derivative in the
student's logits with q^ held still *is* that of the bucketed divergence (the envelope theorem), and
the probe steps on the student's exact gradient of the bucketed loss. A gain is then the exact drop
of the bound, which is no bound of the exact gain.

The file is JSONL or parquet. It holds one row per context, with `context_id` and, for each response
token in turn, the lists `top_ids` and `top_logprobs` (natural logarithms, temperature 1); or one
row per position, with `position` in addition. `response_ids` (`token_id`) are optional; where
present they are compared with the contexts'. A list is the server's top K, with the sampled token
appended where the server does that. Values that stand for "not listed" (-9999, -100, -1e30, a
floor) are no log-probabilities: such entries are read as absent, and counted. Lists that are
shifted against the response are refused, and so are logarithms to another base.

Axes: N positions, n of a chunk, K entries of the longest list (shorter ones end in id -1), V
vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.formulas import acceptance
from diagnostics.core.rows import missing, read_rows, require_unicode
from diagnostics.core.schema import require_columns, support_column
from diagnostics.core.types import Bank, Context
from diagnostics.measure import divergences
from diagnostics.measure.divergences import Logits, to_float64

log = logging.getLogger("diagnostics")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "sampled")
"""Losses that lists determine; `sampled` only where they hold every sampled token."""
TAIL_FLOOR = 1e-6
"""Least mass of the bucket: the error of log-probabilities that are rounded to six digits."""
TOO_MUCH = 0.01
"""Mass above 1 beyond which a list does not hold probabilities."""
LEAST = -103.3
"""Below ln of the least number that float32 holds: no softmax in float32 gives a probability there,
so the value is a sign.
"""
ROUND, APART = -20.0, 10.0
"""A whole number at or below the first and this many nats below the rest of its list is a sign
(-100), no log-probability.
"""
FLOOR, SELDOM, FEWEST, ROUNDED = -9.0, 0.01, 3, 0.9
"""The same number to the last bit, at or below the first, in this share of different lists and in
as many at least, is a floor of the server's; unless the last share of all values is rounded (three
digits, 16 bits), so that they meet by chance."""
ENDS = 0.9
"""Nothing lies below a floor: it is the least of this share of the lists that hold it. Where a
teacher in 16 bits is sure, its lists share values too, with others below them.
"""
FURTHEST, SHIFT_Z, SHIFT_SHARE = 3, 3.0, 0.2
"""Places by which lists are tried against the response; the z and the share of positions beyond
which they belong elsewhere.
"""
BASE_2_DEPTH, BASE_2_LISTS, BASE_2_SHARE = 2, 10, 0.2
"""Entries of a list, lists, and the share of them whose powers of two add up to all but exactly 1,
from which they are logarithms to base 2.
"""
OF_TEACHERS_TOP = (
    "topk_overlap",
    "topk_jaccard",
    "shared_student_mass",
    "compatibility_intersection",
    "union_forward_kl_released",
    "sampled_in_teacher_topk",
)
OF_THE_UNION = ("bhattacharyya", "union_forward_kl", "union_log_ratio_variance")


@dataclass(frozen=True)
class Lists:
    """The lists of one context."""

    ids_TK: np.ndarray
    """int64, -1 after the end of a list."""
    ln_q_TK: np.ndarray
    """float64, -inf there."""
    sampled_T: tuple[int, ...] | None
    """Response ids as in the file; None where the file has none."""


class Completed:
    """Logits of a top-K teacher, which need the student's to be completed."""

    def __call__(self, lists_n2K: Tensor) -> Tensor:
        """Refuse: the lists alone are not a distribution."""
        raise TypeError("a teacher known by lists has logits only together with a student's")

    def completed_by(self, lists_n2K: Tensor, student_nV: Tensor) -> Tensor:
        """ln q^ [n, V] of the module's head, on the student's device."""
        return completed(student_nV, *unpacked(lists_n2K.to(student_nV.device)))


class TopKTeacher:
    """Takes the place of a `Readout` in everything that scores frozen contexts.

    Args:
        lists: Lists of each context, by context id.
        vocabulary: Number of the student's ids.
        name: Path of the file, for messages and the manifest.
        absent: Number of entries of the file that were read as not listed.
    """

    sharded, apart = False, True

    def __init__(self, lists: dict[str, Lists], *, vocabulary: int, name: str, absent: int = 0):
        self.lists, self.name, self.absent = lists, name, absent
        self.vocabulary = self.full_vocabulary = vocabulary
        self.logits = Completed()
        self.width = max(entry.ids_TK.shape[1] for entry in lists.values())

    def depth(self, bank: Bank) -> int:
        """Number of the teacher's most likely tokens that every list of the bank certainly holds.

        This is the shortest list's length. It is one less where all lists are equally long and hold
        the sampled token, and where that is the least likely entry at some position: the server may
        have appended it because it was sampled.
        """
        found = [
            _shape_of(self.lists[context.context_id], context)
            for context in bank
            if context.sampled_ids
        ]
        lengths_N, holds_N, last_N = (np.concatenate(parts) for parts in zip(*found))
        appended = holds_N.all() and last_N.any() and lengths_N.min() == lengths_N.max()
        return int(lengths_N.min()) - int(appended)

    def require(self, bank: Bank) -> None:
        """Raise DiagnosticsError unless there are lists for every response token of the bank."""
        for context in bank:
            entry = self.lists.get(context.context_id)
            if entry is not None and len(entry.ids_TK) != len(context.response_ids):
                raise DiagnosticsError(
                    f"{self.name} has {len(entry.ids_TK)} lists for context {context.context_id!r},"
                    f" whose response has {len(context.response_ids)} tokens. Give one list per"
                    " response token, the first for the token right after the prompt."
                )
            if (
                entry is not None
                and entry.sampled_T is not None
                and entry.sampled_T != context.response_ids
            ):
                raise DiagnosticsError(
                    f"{self.name} scored another response in context {context.context_id!r} than"
                    " the run holds. Let the teacher score these contexts."
                )
        absent = [
            context.context_id
            for context in bank
            if context.response_ids and context.context_id not in self.lists
        ]
        if absent:
            raise DiagnosticsError(
                f"{self.name} has no lists for {len(absent)} of {len(bank)} contexts, {absent[0]!r}"
                " among them. Let the teacher score these contexts."
            )
        self._require_places(bank)

    def _require_places(self, bank: Bank) -> None:
        """Refuse lists that are shifted against the response; warn of sampled tokens not listed."""
        found = [
            (self.lists[context.context_id].ids_TK, np.array(context.response_ids))
            for context in bank
            if context.response_ids
        ]
        for shift in (place for place in range(-FURTHEST, FURTHEST + 1) if place):
            here, there = (
                np.concatenate(parts) for parts in zip(*(_held_at(*pair, shift) for pair in found))
            )
            only_there, only_here = int((there & ~here).sum()), int((here & ~there).sum())
            z = (only_there - only_here) / max(1, only_there + only_here) ** 0.5
            if z > SHIFT_Z and there.mean() - here.mean() > SHIFT_SHARE:
                raise DiagnosticsError(
                    f"{self.name}: {there.mean():.0%} of the lists hold the token {abs(shift)}"
                    f" {'after' if shift > 0 else 'before'} their own, and {here.mean():.0%} their"
                    " own. The lists are shifted: give the one that predicts a response token at"
                    " that token's place, the first right after the prompt."
                )
        at = [list(context.positions) for context in bank if context.response_ids]
        held = (
            np.concatenate([_held_at(*pair, 0)[0][own] for pair, own in zip(found, at)])
            if found
            else np.ones(1, bool)
        )
        if not held.all():
            log.warning(
                "%s: %d of %d lists lack the sampled token; teacher_logprob, advantage and"
                " acceptance are undefined there, and the loss sampled cannot be used",
                self.name,
                int((~held).sum()),
                len(held),
            )

    def states(self, contexts: Sequence[Context], at_n: tuple[Tensor, Tensor]) -> Tensor:
        """Packed lists at the positions of a batch.

        Args:
            contexts: Contexts of the batch.
            at_n: Indices [n] of the context and [n] of the token before the position.

        Returns:
            float64 [n, 2K], ids before log-probabilities.
        """
        rows = []
        for which, when in zip(*(index_n.tolist() for index_n in at_n)):
            entry, t = (
                self.lists[contexts[which].context_id],
                when + 1 - len(contexts[which].prompt_ids),
            )
            rows.append(
                np.concatenate(
                    [
                        _widened(entry.ids_TK[t], self.width, -1),
                        _widened(entry.ln_q_TK[t], self.width, -np.inf),
                    ]
                )
            )
        return (
            torch.from_numpy(np.stack(rows))
            if rows
            else torch.zeros(0, 2 * self.width, dtype=torch.float64)
        )

    def facts(self) -> dict[str, Any]:
        """Facts for the manifest."""
        masses = np.concatenate([np.exp(entry.ln_q_TK).sum(1) for entry in self.lists.values()])
        return {
            "name": Path(self.name).name,
            "known_by": "lists of log-probabilities",
            "sha256": sha256_file(Path(self.name)),
            "contexts": len(self.lists),
            "positions": len(masses),
            "longest": self.width,
            "mean_tail_mass": float(1 - masses.mean()),
            "read_as_absent": self.absent,
        }


def _held_at(
    ids_TK: np.ndarray, response_T: np.ndarray, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """For lists with a token `shift` places later: whether they hold their own, and that one."""
    lists = ids_TK[max(0, -shift) : max(0, len(ids_TK) - max(0, shift))]
    own, other = (response_T[max(0, -shift) + by :][: len(lists), None] for by in (0, shift))
    return (lists == own).any(1), (lists == other).any(1)


def _widened(values_K: np.ndarray, width: int, filler: float) -> np.ndarray:
    return np.concatenate([values_K, np.full(width - len(values_K), filler)])


def _shape_of(entry: Lists, context: Context) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the list of each position: length, whether it holds the sampled token, and whether that
    comes last.
    """
    at = list(context.positions)
    ids_TK, ln_q_TK = entry.ids_TK[at], entry.ln_q_TK[at]
    there_TK, sampled_T1 = ids_TK >= 0, np.array(context.sampled_ids)[:, None]
    least_T1 = np.take_along_axis(ids_TK, np.where(there_TK, ln_q_TK, np.inf).argmin(1)[:, None], 1)
    return there_TK.sum(1), (ids_TK == sampled_T1).any(1), (least_T1 == sampled_T1)[:, 0]


# --- the file


def read_lists(path: str | Path, *, vocabulary: int) -> TopKTeacher:
    """Read a file of top-K log-probabilities as a teacher.

    Args:
        path: JSONL or parquet file, as in the head of this module.
        vocabulary: Number of the student's ids.

    Raises:
        DiagnosticsError: The file cannot be read, a row holds no lists, an id lies outside the
            vocabulary or appears twice in a list, or log-probabilities are not finite or add up to
            more than 1.
    """
    return lists_of(read_rows(Path(path), text=True), path, vocabulary=vocabulary)


def lists_of(frame: pd.DataFrame, path: str | Path, *, vocabulary: int) -> TopKTeacher:
    """The teacher that a table of lists is; `read_lists` on a table that is in memory.

    Args:
        frame: The rows of such a file.
        path: Name of the file that holds them, or will.
        vocabulary: Number of the student's ids.

    Raises:
        DiagnosticsError: As in `read_lists`.
    """
    require_columns(
        frame,
        ("context_id", "top_ids", "top_logprobs"),
        what=f"{path}, a file of teacher log-probabilities,",
    )
    _require_ids(frame["context_id"], path)
    frame = frame.assign(context_id=frame["context_id"].astype(str))
    rows = _by_position(frame, path) if "position" in frame else _by_context(frame, path)
    raw = {
        context: _arrays(*parts[:2], f"{path}, context {context!r}")
        for context, parts in rows.items()
    }
    signs = dict(zip(raw, absent_entries(list(raw.values()))))
    lists = {
        context: _lists(
            *raw[context],
            signs[context],
            rows[context][2],
            vocabulary,
            f"{path}, context {context!r}",
        )
        for context in raw
    }
    teacher = TopKTeacher(
        lists,
        vocabulary=vocabulary,
        name=str(path),
        absent=int(sum(sign.sum() for sign in signs.values())),
    )
    _require_natural(teacher)
    _warn_of_bounds(teacher)
    if teacher.absent:
        values = np.concatenate([raw[context][1][sign] for context, sign in signs.items()])
        _say_absent(path, values)
    return teacher


def _require_ids(names: pd.Series, path: str | Path) -> None:
    """Refuse rows without the id of a context, or with one that is no text."""
    if names.isna().any():
        raise DiagnosticsError(
            f"{path} has {int(names.isna().sum())} rows without a context_id. Give"
            " each row the id of the context that was scored."
        )
    for name in names:
        require_unicode(str(name))


def _say_absent(path: str | Path, values: np.ndarray) -> None:
    log.warning(
        "%s: %d entries hold a value that stands for a token outside the list (%s) and are read"
        " as absent",
        path,
        len(values),
        ", ".join(f"{value:.6g}" for value in np.unique(values)[:5]),
    )


def _warn_of_bounds(teacher: TopKTeacher) -> None:
    tails = np.concatenate([1 - np.exp(entry.ln_q_TK).sum(1) for entry in teacher.lists.values()])
    log.warning(
        "%s: the teacher is known by lists of %d tokens; on average %.2g of its mass lies outside"
        " them. KLs, JS and compatibility are lower bounds",
        teacher.name,
        teacher.width,
        tails.mean(),
    )
    if (tails <= 2 * TAIL_FLOOR).mean() > 0.99 and teacher.width < teacher.vocabulary:
        log.warning(
            "%s: nearly every list adds up to 1. If the server renormalized them, nothing measured"
            " with them is right",
            teacher.name,
        )


Rows = dict[str, tuple[Sequence, Sequence, tuple[int, ...] | None]]
"""By context: id lists, log-probability lists, and the response where the file has it."""


def _by_context(frame: pd.DataFrame, path) -> Rows:
    repeated = frame["context_id"][frame["context_id"].duplicated()]
    if len(repeated):
        raise DiagnosticsError(
            f"{path} has two rows for context {repeated.iloc[0]!r}. Give one row per context, or a"
            " `position` column and one row per position."
        )
    responses = frame["response_ids"] if "response_ids" in frame else [None] * len(frame)
    return {
        context: (
            ids,
            values,
            None if missing(response) else _ids(response, f"{path}, context {context!r}"),
        )
        for context, ids, values, response in zip(
            frame["context_id"], frame["top_ids"], frame["top_logprobs"], responses
        )
    }


def _by_position(frame: pd.DataFrame, path) -> Rows:
    rows: Rows = {}
    frame = frame.assign(
        position=pd.to_numeric(frame["position"].astype(str), errors="coerce")
    ).sort_values("position", kind="stable")
    for context, part in frame.groupby("context_id", sort=False):
        if part["position"].tolist() != list(range(len(part))):
            raise DiagnosticsError(
                f"{path}: the positions of context {context!r} are not 0 to {len(part) - 1}. Give"
                " one row per response token, from 0."
            )
        sampled = (
            _ids(part["token_id"].tolist(), f"{path}, context {context!r}")
            if "token_id" in part
            else None
        )
        rows[str(context)] = (part["top_ids"].tolist(), part["top_logprobs"].tolist(), sampled)
    return rows


def _ids(values, where: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise DiagnosticsError(
            f"{where}: the sampled tokens should be whole numbers; found {str(values)[:60]!r}. Fix"
            " that row."
        ) from error


def _arrays(ids: Sequence, values: Sequence, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K], -1 after the end of a list, and values [T, K], NaN there, as the file has
    them.
    """
    ids_TK, values_TK = (
        _padded(ids, np.nan, where, "top_ids"),
        _padded(values, np.nan, where, "top_logprobs"),
    )
    if ids_TK.shape != values_TK.shape or _lengths(ids) != _lengths(values):
        raise DiagnosticsError(
            f"{where}: top_ids and top_logprobs do not have the same lengths. Give one"
            " log-probability per id."
        )
    if np.isnan(ids_TK).sum() != ids_TK.size - sum(_lengths(ids)):
        raise DiagnosticsError(
            f"{where}: top_ids should be a list of lists of numbers, and holds a gap. Fix that row."
        )
    there_TK = np.arange(ids_TK.shape[1]) < np.array(_lengths(ids))[:, None]
    _require_whole(ids, ids_TK[there_TK], where)
    ids_TK = np.where(there_TK, ids_TK, -1)
    if np.isnan(values_TK[there_TK]).any():
        raise DiagnosticsError(
            f"{where} holds a log-probability that is NaN or above 0 (nan). Store ln q of each id."
        )
    return ids_TK, values_TK


def _require_whole(ids: Sequence, values_M: np.ndarray, where: str) -> None:
    """Raise DiagnosticsError for ids with a fraction, and for truth values: they would be cut to
    the id of another token.
    """
    odd = values_M[values_M != np.round(values_M)]
    truths = any(
        row.dtype == bool
        if isinstance(row, np.ndarray)
        else any(i is True or i is False for i in row)
        for row in ids
    )
    if len(odd) or truths:
        raise DiagnosticsError(
            f"{where}: top_ids holds {odd[0] if len(odd) else 'truth values'}, and ids are whole"
            " numbers. Mend that row."
        )


def _lengths(rows: Sequence) -> list[int]:
    return [len(row) for row in rows]


def absent_entries(raw: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Find entries that hold a sign for "not listed" in place of a log-probability.

    Such signs are values that no softmax gives, whole numbers far below the rest of their list, and
    a number that many different lists share to the last bit (see the constants of this module).

    Args:
        raw: Ids [T, K] and values [T, K] of each context; values are NaN after the end of a list.

    Returns:
        bool [T, K] of each context, True where the entry is such a sign.
    """
    floors = _floors(raw)
    return [
        (values_TK < LEAST) | _stands_apart(values_TK) | np.isin(values_TK, floors)
        for _, values_TK in raw
    ]


def _stands_apart(values_TK: np.ndarray) -> np.ndarray:
    whole_TK = (values_TK <= ROUND) & (values_TK == np.round(values_TK))
    others_TK = np.where(whole_TK | np.isnan(values_TK), np.inf, values_TK)
    return whole_TK & (others_TK.min(1, keepdims=True) - values_TK >= APART)


def _floors(raw: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Values that repeat over different lists: a server writes them for all tokens below."""
    distinct = {
        values_K[~np.isnan(values_K)].tobytes() for _, values_TK in raw for values_K in values_TK
    }
    lists = [np.frombuffer(values) for values in distinct]
    values = np.concatenate(lists) if lists else np.empty(0)
    if not len(values) or _are_rounded(values[values > LEAST]):
        return np.empty(0)
    parts = [np.unique(part[part > LEAST]) for part in lists]  # ascending
    counts = _counted(np.concatenate([part[part <= FLOOR] for part in parts]))
    as_least = _counted(np.concatenate([part[:1][part[:1] <= FLOOR] for part in parts]))
    enough = max(FEWEST, SELDOM * len(lists))
    floors = [
        value
        for value, ends in as_least.items()
        if counts[value] >= enough and ends >= ENDS * counts[value]
    ]
    return np.array(floors)


def _counted(values: np.ndarray) -> dict[float, int]:
    """How often each value occurs."""
    return dict(
        zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)
    )


def _are_rounded(values: np.ndarray) -> bool:
    """Most values have at most three decimal digits, or are numbers of float16 or bfloat16."""
    thousandths, short = 1000 * values, values.astype(np.float32)
    # within float32's own rounding
    found = (
        np.abs(thousandths - thousandths.round()) < 5e-3,
        short.view(np.uint32) & 0xFFFF == 0,
        short == short.astype(np.float16),
    )
    return any(where.mean() >= ROUNDED for where in found) if len(values) else True


def _lists(
    ids_TK: np.ndarray,
    values_TK: np.ndarray,
    absent_TK: np.ndarray,
    sampled: tuple[int, ...] | None,
    vocabulary: int,
    where: str,
) -> Lists:
    """Checked lists of one context, without absent entries.

    Their mass is scaled to at most 1 - TAIL_FLOOR unless they hold the whole vocabulary.
    """
    there_TK = ~np.isnan(values_TK) & ~absent_TK
    if (ids_TK[there_TK] < 0).any():
        raise DiagnosticsError(
            f"{where}: top_ids holds an id below 0. Give one finite log-probability per id."
        )
    if not there_TK.any(1).all():
        raise DiagnosticsError(
            f"{where} has a list in which every value stands for a token outside it"
            f" ({np.nanmax(values_TK):.6g} …). Give the teacher's most likely tokens."
        )
    ids_TK, ln_q_TK = (
        np.where(there_TK, ids_TK, -1).astype(np.int64),
        np.where(there_TK, values_TK, -np.inf),
    )
    _check_lists(ids_TK, ln_q_TK, vocabulary, where)
    mass_T1 = np.exp(ln_q_TK).sum(1, keepdims=True)
    whole_T1 = there_TK.sum(1, keepdims=True) == vocabulary
    allowed_T1 = np.where(whole_T1, 1.0, np.minimum(mass_T1, 1 - TAIL_FLOOR))
    return Lists(ids_TK, ln_q_TK + np.log(allowed_T1 / mass_T1), sampled)


def _require_natural(teacher: TopKTeacher) -> None:
    """Refuse logarithms to base 2.

    Their powers of two add up to 1 or slightly less at many positions, and to more at none.
    """
    deep = [
        entry.ln_q_TK[(entry.ids_TK >= 0).sum(1) >= BASE_2_DEPTH]
        for entry in teacher.lists.values()
    ]
    sums = np.concatenate([np.exp2(ln_q_TK).sum(1) for ln_q_TK in deep])
    if (
        len(sums) >= BASE_2_LISTS
        and sums.max() <= 1 + TOO_MUCH / 10
        and (sums >= 1 - 2 * TOO_MUCH).mean() >= BASE_2_SHARE
    ):
        raise DiagnosticsError(
            f"{teacher.name} seems to hold logarithms to base 2: raised from 2, its lists add up to"
            f" {np.median(sums):.4g} at the median and never to more than 1. Store natural"
            " log-probabilities: multiply the values by ln 2 = 0.6931."
        )


def _padded(rows: Sequence, filler: float, where: str, name: str) -> np.ndarray:
    try:
        parts = [np.asarray(row, dtype=np.float64) for row in rows]
    except (TypeError, ValueError, OverflowError) as error:
        raise DiagnosticsError(
            f"{where}: {name} should be a list of lists of numbers ({str(error)[:80]}). Fix that"
            " row."
        ) from error
    if not parts or any(part.ndim != 1 or not len(part) for part in parts):
        raise DiagnosticsError(
            f"{where}: {name} should be a list of lists of numbers, none of them empty. Fix that"
            " row."
        )
    width = max(map(len, parts))
    return np.stack([_widened(part, width, filler) for part in parts])


def _check_lists(ids_TK: np.ndarray, ln_q_TK: np.ndarray, vocabulary: int, where: str) -> None:
    if ids_TK.max() >= vocabulary:
        raise DiagnosticsError(
            f"{where} lists token id {ids_TK.max()}, and the student's vocabulary has {vocabulary}."
            " The teacher has another tokenizer; it cannot grade this student."
        )
    there_TK = ids_TK >= 0
    if np.isnan(ln_q_TK).any() or (ln_q_TK[there_TK] > 1e-3).any():
        raise DiagnosticsError(
            f"{where} holds a log-probability that is NaN or above 0 ({np.nanmax(ln_q_TK):.4g})."
            " Store ln q of each id."
        )
    ordered_TK = np.sort(np.where(there_TK, ids_TK, np.arange(-ids_TK.shape[1], 0)), axis=1)
    if (np.diff(ordered_TK, axis=1) == 0).any():
        raise DiagnosticsError(f"{where} lists an id twice at one position. Give each once.")
    largest = float(np.exp(ln_q_TK).sum(1).max())
    if largest > 1 + TOO_MUCH:
        raise DiagnosticsError(
            f"{where}: the listed probabilities add up to {largest:.4g}. Store natural"
            " log-probabilities at temperature 1, not logits or another base."
        )


# --- what the lists determine


def unpacked(lists_n2K: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [n, K], -1 after the end, and ln q [n, K] of packed lists."""
    ids_nK, ln_q_nK = lists_n2K.chunk(2, dim=1)
    return ids_nK.long(), ln_q_nK


def completed(student_nV: Tensor, ids_nK: Tensor, ln_q_nK: Tensor) -> Tensor:
    """ln q^ [n, V]: the lists, and outside them the student's shape with the remaining mass.

    student_nV: the student's logits; ids_nK, ln_q_nK: the lists, ids -1 after their end.
    """
    student_nV = student_nV.to(torch.promote_types(student_nV.dtype, torch.float32))
    listed_nV = _scattered(torch.zeros_like(student_nV), ids_nK, torch.ones_like(ln_q_nK)) > 0
    tail_n = to_float64(student_nV.masked_fill(listed_nV, -torch.inf).logsumexp(-1))
    left_n = torch.log1p(-ln_q_nK.exp().sum(-1)).to(tail_n.device)
    shift_n = torch.where(tail_n > -torch.inf, left_n - tail_n, 0.0)
    return _scattered(student_nV + shift_n[:, None].to(student_nV), ids_nK, ln_q_nK)


def _listed_only(student_nV: Tensor, ids_nK: Tensor, ln_q_nK: Tensor) -> Tensor:
    """ln q [n, V] on the lists, and a probability of exactly 0 outside them."""
    absent = torch.full_like(
        student_nV, -divergences.ABSENT, dtype=torch.promote_types(student_nV.dtype, torch.float32)
    )
    return _scattered(absent, ids_nK, ln_q_nK)


def _scattered(base_nV: Tensor, ids_nK: Tensor, values_nK: Tensor) -> Tensor:
    """The values written at their ids; fillers go to a spare column, which is cut off."""
    vocabulary = base_nV.shape[1]
    spare_nV = torch.cat([base_nV, base_nV[:, :1]], 1)
    return spare_nV.scatter(1, torch.where(ids_nK < 0, vocabulary, ids_nK), values_nK.to(base_nV))[
        :, :vocabulary
    ].contiguous()


@torch.no_grad()
def measure_hidden(
    student_hidden_NH: Tensor,
    student_logits: Logits,
    lists_N2K: Tensor,
    sampled_N: Tensor,
    *,
    depth: int,
    k: int = 16,
    sweep: Sequence[int] = (),
    tops: int = 0,
    student_dropped: Logits | None = None,
) -> dict[str, Tensor]:
    """Measure every position with a teacher's lists in place of its hidden states.

    Args:
        student_hidden_NH: [N, H] states of the student.
        student_logits: Maps states [n, H] to logits [n, V].
        lists_N2K: [N, 2K] packed lists (`TopKTeacher.states`).
        sampled_N: [N] ids of the sampled tokens.
        depth: Number of the teacher's most likely tokens that every list holds.
        k: Size of the supports, as in `divergences.measure_hidden`.
        sweep: Further K.
        tops: Number of most likely tokens that are returned; at most `depth` of the teacher's.
        student_dropped: As in `divergences.measure_hidden`.

    Returns:
        float64 [N] by column name, in nats and probabilities: the columns of `core.schema.SCHEMA`
        that lists determine (`Column.listed` says which are bounds), and `teacher_tail_mass`.
    """
    step = divergences.chunk_size(
        student_logits(student_hidden_NH[:0]).shape[-1], student_hidden_NH.device
    )
    parts = []
    for start in range(0, max(1, len(student_hidden_NH)), step):
        rows = slice(start, start + step)
        student_nV = student_logits(student_hidden_NH[rows])
        lists = unpacked(lists_N2K[rows].to(student_nV.device))
        parts.append(
            _measured(
                student_nV,
                lists,
                sampled_N[rows].to(student_nV.device),
                depth=depth,
                k=k,
                sweep=sweep,
                tops=tops,
            )
        )
        if student_dropped is not None:
            parts[-1]["student_dropped_mass"] = divergences.mass_outside(
                student_hidden_NH[rows], student_logits, student_dropped
            )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measured(
    student_nV: Tensor,
    lists_nK: tuple[Tensor, Tensor],
    sampled_n: Tensor,
    *,
    depth: int,
    k: int,
    sweep: Sequence[int],
    tops: int,
) -> dict[str, Tensor]:
    """Divergences from the completed teacher, everything else from the lists and their mass."""
    ids_nK, ln_q_nK = lists_nK
    whole = divergences.measure(student_nV, completed(student_nV, ids_nK, ln_q_nK), sampled_n, k=1)
    out = divergences.measure_hidden(
        student_nV,
        _same,
        _listed_only(student_nV, ids_nK, ln_q_nK),
        _same,
        sampled_n,
        k=k,
        sweep=sweep,
        tops=min(tops, depth),
    )
    out |= {name: whole[name] for name in ("forward_kl", "reverse_kl", "js", "hellinger")}
    mass_n = ln_q_nK.exp().sum(-1).to(out["teacher_entropy"])
    tail_n = (1 - mass_n).clamp(min=0)
    out["teacher_tail_mass"] = tail_n
    out["teacher_entropy"] = (
        mass_n * out["teacher_entropy"] - torch.xlogy(mass_n, mass_n) - torch.xlogy(tail_n, tail_n)
    )
    held_n = (ids_nK == sampled_n[:, None]).any(1).to(mass_n.device)
    out["teacher_logprob"] = torch.where(held_n, out["teacher_logprob"] + mass_n.log(), torch.nan)
    out["advantage"] = out["teacher_logprob"] - out["student_logprob"]
    out["acceptance"] = acceptance(out["advantage"])
    for name in out:
        if name.startswith(("compatibility", "teacher_top_")) and (
            name.endswith("_p") or name.startswith("compatibility")
        ):
            out[name] = out[name] * mass_n
    return _defined(out, student_nV, ids_nK, depth=depth, k=k, sweep=sweep)


def _same(values: Tensor) -> Tensor:
    return values


def _defined(
    out: dict[str, Tensor],
    student_nV: Tensor,
    ids_nK: Tensor,
    *,
    depth: int,
    k: int,
    sweep: Sequence[int],
) -> dict[str, Tensor]:
    """Drop columns that need more of the teacher's top than the lists hold.

    Columns over the union are NaN where the student's top is not listed completely.
    """
    vocabulary = student_nV.shape[1]
    top_nK = divergences.top_ids(student_nV, max(k, *sweep, 1))
    covered_nK = (top_nK[:, :, None] == ids_nK[:, None, :]).any(2).to(out["forward_kl"].device)
    impossible = (
        ["student_top1_in_teacher_top5"]
        if depth < min(divergences.SELECTKD_TOP, vocabulary)
        else []
    )
    impossible += ["top1_match"] if depth < 1 else []
    for size in dict.fromkeys((k, *sweep)):
        names = {
            name: support_column(name, None if size == k else size)
            for name in (*OF_TEACHERS_TOP, *OF_THE_UNION)
        }
        if min(size, vocabulary) > depth:
            impossible += names.values()
        if depth < 1:
            impossible.append(support_column("teacher_top1_in_topk", None if size == k else size))
        covered_n = covered_nK[:, :size].all(1)
        for name in OF_THE_UNION:
            out[names[name]] = torch.where(covered_n, out[names[name]], torch.nan)
    return {name: values for name, values in out.items() if name not in impossible}


def require_loss(teacher, loss: str, advantage_N: np.ndarray, weights_N: np.ndarray) -> None:
    """Raise DiagnosticsError for a loss that a top-K teacher does not determine.

    Args:
        teacher: The pair's teacher; one that can be run determines every loss.
        loss: Name of the loss.
        advantage_N: [N] ln q(y) - ln p(y), NaN where the sampled token is not listed.
        weights_N: [N] weights of the positions in the loss.
    """
    if not isinstance(teacher, TopKTeacher):
        return
    if loss not in LOSSES:
        raise DiagnosticsError(
            f"The loss {loss} needs the teacher's probability of tokens that its lists may not"
            f" hold. Use {', '.join(LOSSES)}."
        )
    unlisted = int((~np.isfinite(advantage_N[weights_N != 0])).sum())
    if loss == "sampled" and unlisted:
        raise DiagnosticsError(
            "The loss sampled needs the teacher's probability of every sampled token, and its"
            f" lists lack {unlisted} of {int((weights_N != 0).sum())}. Use reverse_kl."
        )


def refuse(teacher, what: str) -> None:
    """Raise DiagnosticsError for a top-K teacher where a teacher must be run.

    Args:
        teacher: The pair's teacher.
        what: What needs it, as the subject of the error's sentence.
    """
    if isinstance(teacher, TopKTeacher):
        raise DiagnosticsError(
            f"{what} needs a teacher that can be run, and this one is known by the lists in"
            f" {teacher.name}. Name a model with --teacher."
        )
