"""What the lists of likeliest tokens in a released table say about the two supports.

A table may hold, at each position, the ids and log-probabilities of the K tokens that each model
finds likeliest. S is the student's list and T the teacher's, p and q are their probabilities:

    topk_overlap, topk_jaccard       |S & T|/K, |S & T|/|S | T|
    shared_student_mass              sum of p over S & T
    compatibility_intersection       sum of q over S & T, a lower bound of compatibility
    student_margin                   p of the first choice minus p of the second
    student_entropy_topk, teacher_.. entropy of the list, renormalised, in nats
    union_forward_kl, bhattacharyya  only where S and T hold the same tokens: elsewhere each list
    and their like, compatibility    lacks probabilities that the union asks for, and NaN says so
    union_forward_kl_released, ...   with what a list lacks set to 0 and floored at 1e-12, as in the
                                     released training code

Axes: N positions, K tokens of a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.contexts.released_keys import LARGEST_INT
from diagnostics.core.formulas import RELEASED_EPSILON

COMPARED = 2**22
"""Comparisons of ids that are made at once, which bounds the memory of N K K of them."""
LONGEST = 4096
"""Longest list that is read: a cell may claim any length."""
MOST_MASS = 1.01
"""Most that a list's probabilities add up to, with room for rounded logarithms."""
TEACHER_TOP = 5
"""Length of the teacher's list in `student_top1_in_teacher_top5`."""
OF_TEACHER = ("teacher_entropy_topk", "teacher_topk_mass")
"""What follows from the teacher's list alone, so that training the student does not change it."""
ON_UNION = (
    "union_forward_kl",
    "union_reverse_kl",
    "bhattacharyya",
    "union_log_ratio_variance",
)
"""What compares the distributions on the union of the lists."""


@dataclass(frozen=True)
class Lists:
    """One model's lists, likeliest token first."""

    ids_NK: np.ndarray
    """Token ids, -1 behind the end of a list."""
    p_NK: np.ndarray
    """Probabilities, 0 behind the end of a list."""
    unreadable: int
    """Rows with something that cannot be a list of likeliest tokens."""

    @property
    def length_N(self) -> np.ndarray:
        """Tokens in each list; 0 where a row has none."""
        return (self.ids_NK >= 0).sum(axis=1)

    @property
    def k(self) -> int | None:
        """The length of all lists that are not empty; None where they differ or there is none."""
        lengths = np.unique(self.length_N[self.length_N > 0])
        return int(lengths[0]) if len(lengths) == 1 else None

    def __getitem__(self, rows: slice) -> Lists:
        return Lists(self.ids_NK[rows], self.p_NK[rows], 0)


def read_lists(frame: pd.DataFrame, model: str) -> Lists | None:
    """Read one model's lists.

    Args:
        frame: A released table. Cells of `<model>_top_ids` and `<model>_top_logps` are lists,
            arrays, or lists as JSON text; an empty cell is no list.
        model: `student` or `teacher`.

    Returns:
        The lists, or None where the table has no column of them or every cell is empty.
    """
    names = [f"{model}_top_ids", f"{model}_top_logps"]
    if not set(names) <= set(frame):
        return None
    cells = [[_cell(cell) for cell in frame[name]] for name in names]
    rows = [_row(ids, logps) for ids, logps in zip(*cells, strict=True)]
    width = max((len(row[0]) for row in rows if row), default=0)
    if not width:
        return None
    ids_NK, ln_NK = np.full((len(rows), width), -1), np.full((len(rows), width), -np.inf)
    for n, row in enumerate(rows):
        if row:
            ids_NK[n, : len(row[0])], ln_NK[n, : len(row[1])] = row
    ln_NK[~np.isfinite(ln_NK)] = -np.inf
    ids_NK[np.isneginf(ln_NK)] = -1
    order = np.argsort(-ln_NK, axis=1, kind="stable")
    ln_NK = np.take_along_axis(ln_NK, order, axis=1)
    return Lists(np.take_along_axis(ids_NK, order, axis=1), np.exp(ln_NK), rows.count(None))


def _cell(cell) -> list[float] | None:
    """One cell as a list of numbers, empty where there is none; None for anything else."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell) if cell.strip() else []
        except (ValueError, RecursionError):
            return None
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return []
    try:
        return [float(value) for value in cell]
    except (TypeError, ValueError, OverflowError):
        return None


def _row(
    ids: list[float] | None, logps: list[float] | None
) -> tuple[list[float], list[float]] | None:
    """One model's list at a position; None where it cannot be one: other numbers of ids and
    log-probabilities, an id twice or no whole number, or probabilities that add up to more than 1.
    """
    if ids is None or logps is None or len(ids) != len(logps) or len(ids) > LONGEST:
        return None
    whole = all(0 <= token <= LARGEST_INT and token == int(token) for token in ids)
    if not whole or len(set(ids)) < len(ids) or any(value > 0 for value in logps):
        return None
    mass = sum(math.exp(value) for value in logps if value == value)
    return (ids, logps) if mass <= MOST_MASS else None


def measure_lists(
    student: Lists, teacher: Lists, token_N: np.ndarray | None, *, k: int | None = None
) -> dict[str, np.ndarray]:
    """Measure the supports from both lists.

    Args:
        student: The student's lists.
        teacher: The teacher's, of the same positions.
        token_N: Sampled token ids [N], or None where they are unknown.
        k: K of the table, over which an overlap is a share; the longest list where None.

    Returns:
        By column name float64 [N], flags as 0 and 1; NaN where a list is missing, and elsewhere as
        the module's head says.
    """
    k = max(student.ids_NK.shape[1], teacher.ids_NK.shape[1]) if k is None else k
    count, parts = len(student.ids_NK), []
    chunk = max(1, COMPARED // (student.ids_NK.shape[1] * teacher.ids_NK.shape[1]))
    for first in range(0, max(count, 1), chunk):
        rows = slice(first, first + chunk)
        tokens = None if token_N is None else token_N[rows]
        parts.append(dict(_measured(student[rows], teacher[rows], tokens, k)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measured(
    student: Lists, teacher: Lists, token_n: np.ndarray | None, k: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The measures of some positions, by name."""
    s, t, p, q = student.ids_NK, teacher.ids_NK, student.p_NK, teacher.p_NK
    has_s, has_t = s[:, 0] >= 0, t[:, 0] >= 0
    both = has_s & has_t
    same = (s[:, :, None] == t[:, None, :]) & (s >= 0)[:, :, None]
    s_shared, t_shared = same.any(axis=2), same.any(axis=1)
    shared = s_shared.sum(axis=1)
    union = student.length_N + teacher.length_N - shared

    def where(known: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(known, values.astype(np.float64), np.nan)

    with np.errstate(divide="ignore", invalid="ignore"):
        yield "topk_overlap", where(both, shared / k)
        yield "topk_jaccard", where(both, shared / union)
        yield "shared_student_mass", where(both, (p * s_shared).sum(axis=1))
        yield "compatibility_intersection", where(both, (q * t_shared).sum(axis=1))
        if p.shape[1] > 1:
            yield "student_margin", where(has_s & (s[:, 1] >= 0), p[:, 0] - p[:, 1])
        for name, values, has in (("student", p, has_s), ("teacher", q, has_t)):
            yield f"{name}_topk_mass", where(has, values.sum(axis=1))
            yield f"{name}_entropy_topk", where(has, _entropy(values))
    yield "top1_match", where(both, s[:, 0] == t[:, 0])
    yield "teacher_top1_in_topk", where(both, t_shared[:, 0])
    yield "student_top1_in_teacher_top5", where(both, same[:, 0, :TEACHER_TOP].any(axis=1))
    if token_n is not None:
        yield "sampled_in_topk", where(has_s, (s == token_n[:, None]).any(axis=1))
        yield "sampled_in_teacher_topk", where(has_t, (t == token_n[:, None]).any(axis=1))
    yield from _on_union(p, q, same, both, both & (union == shared)).items()


def _entropy(p_nK: np.ndarray) -> np.ndarray:
    """Entropy [n] in nats of lists, renormalised."""
    share_nK = p_nK / p_nK.sum(axis=1, keepdims=True)
    return -(share_nK * np.log(np.where(share_nK > 0, share_nK, 1.0))).sum(axis=1)


def _on_union(
    p_nK: np.ndarray, q_nK: np.ndarray, same_nKK: np.ndarray, known: np.ndarray, whole: np.ndarray
) -> dict[str, np.ndarray]:
    """Divergences on the union of the lists: exact where both hold the same tokens (`whole`), and
    as the released training code has them wherever both lists are known.
    """
    ends = p_nK.shape[1]
    # The union in two parts: the student's tokens, and the teacher's that the student lacks.
    lone_nK = ~same_nKK.any(axis=1)
    p_nU = np.concatenate([p_nK, np.zeros_like(q_nK)], axis=1)
    there = np.einsum("nkl,nl->nk", same_nKK, q_nK)
    q_nU = np.concatenate([there, q_nK * lone_nK], axis=1)
    used = (p_nU > 0) | (q_nU > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_nU, q_nU = (part / part.sum(axis=1, keepdims=True) for part in (p_nU, q_nU))
    floors = [np.maximum(part, RELEASED_EPSILON) for part in (p_nU, q_nU)]
    floored = _union_measures(floors[0], floors[1], used)
    exact = _union_measures(p_nU[:, :ends], q_nU[:, :ends], used[:, :ends] & whole[:, None])
    compatibility = np.where(whole, there.sum(axis=1), np.nan)
    return (
        {name: np.where(whole, values, np.nan) for name, values in exact.items()}
        | {
            f"{name}_released": np.where(known, values, np.nan)
            for name, values in floored.items()
            if name != "union_log_ratio_variance"
        }
        | {"compatibility": compatibility}
    )


def _union_measures(p_nU: np.ndarray, q_nU: np.ndarray, used: np.ndarray) -> dict[str, np.ndarray]:
    """Divergences [n] of two distributions over the tokens that are `used`."""
    p_nU, q_nU = np.where(used, p_nU, 0.0), np.where(used, q_nU, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_nU = np.where(used, np.log(q_nU) - np.log(p_nU), 0.0)
    mean_n = (p_nU * ratio_nU).sum(axis=1, keepdims=True)
    return {
        "union_forward_kl": (q_nU * ratio_nU).sum(axis=1),
        "union_reverse_kl": -(p_nU * ratio_nU).sum(axis=1),
        "bhattacharyya": np.sqrt(p_nU * q_nU).sum(axis=1),
        "union_log_ratio_variance": (p_nU * (ratio_nU - mean_n) ** 2).sum(axis=1),
    }
