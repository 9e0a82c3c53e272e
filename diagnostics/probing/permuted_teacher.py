"""The null of a step: the same step towards the teacher of other positions.

    permuted loss of i = loss of p_i against q_s(i),     s a permutation of the step positions
    gain_permuted      = D_i(theta0) - D_i(after that step),    D towards i's own teacher

What such a step gives back needs no signal that is specific to a context: it comes from what the
teacher's distributions have in common (marginals, entropy, calibration). Loss, optimizer and the
update's norm are those of the real step, so `context_gain = gain - gain_permuted` is what the
teacher said about this context.

Every group of step positions is put into a random order, and each position gets the teacher of the
next one, the last that of the first. So no position keeps its own teacher where its group has two
or more, every teacher is used exactly once, and all such cycles are equally likely. A group of one
keeps its own; `kept_own` counts those. Groups: all positions of the fold (`global`), positions of
the same decile of D (`divergence`), or of the same token type (`token_type`).

The teacher's states are exchanged, so it does not run again. For a teacher known by top-K lists the
lists are exchanged, and completed by the student of the position that gets them.

Axes: N positions of the bank, n of a batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.analysis.selection import token_type
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import topk_teacher
from diagnostics.probing.config.controls import require_null
from diagnostics.probing.frozen_bank import BankPart

DECILES = 10
EXCHANGED_ROWS = 4096
"""Rows that processes exchange at a time, in float64: 64 MiB at H = 2048."""


def graders(
    tokens: pd.DataFrame, weights_N: np.ndarray, null: str, *, seed: Sequence[int]
) -> np.ndarray:
    """Draw the row whose teacher grades each position in the null of a step.

    Args:
        tokens: Token table of N rows; `divergence` reads forward_kl, `token_type` the token.
        weights_N: Float [N], 0 where a position carries no loss.
        null: One of `folds.NULLS`.
        seed: Seed of the permutation.

    Returns:
        Int [N]: a permutation within each group of the positions that carry loss; every other
        position has its own row.

    Raises:
        DiagnosticsError: The null is unknown, or no position can get another's teacher.
    """
    rows = np.flatnonzero(weights_N)
    groups = _groups(tokens.iloc[rows], null)
    generator, graded_by = np.random.default_rng(seed), np.arange(len(tokens))
    for group in np.unique(groups):
        order = generator.permutation(rows[groups == group])
        graded_by[order] = np.roll(order, -1)
    if kept_own(graded_by, weights_N) == len(rows):
        raise DiagnosticsError(
            f"The null {null!r} has {len(rows)} step positions in as many groups, so that each"
            " would keep its own teacher. Use --nulls global, fewer folds or more prompts."
        )
    return graded_by


def kept_own(graded_by: np.ndarray, weights_N: np.ndarray) -> int:
    """Number of positions with loss that keep their own teacher, being alone in their group."""
    return int(((graded_by == np.arange(len(graded_by))) & (weights_N != 0)).sum())


def require_graded(teacher: object, loss: str) -> None:
    """Refuse a loss that no permuted teacher determines.

    Args:
        teacher: The pair's teacher.
        loss: Name of the loss.

    Raises:
        DiagnosticsError: `sampled` needs the probability of the sampled token under the teacher of
            another position, whose list may not hold it.
    """
    if loss == "sampled" and isinstance(teacher, topk_teacher.TopKTeacher):
        raise DiagnosticsError(
            "A permuted teacher of the loss sampled needs its probability of tokens that were"
            f" sampled at other positions, which the lists in {teacher.name} need not hold. Use"
            " --loss reverse_kl, or --nulls= for a probe without a null."
        )


def _groups(step: pd.DataFrame, null: str) -> np.ndarray:
    """Group of each step position [m], among which teachers are permuted."""
    require_null(null)
    if null == "token_type":
        return token_type(step).astype(str)
    if null == "global":
        return np.zeros(len(step), dtype=int)
    rank = np.empty(len(step), dtype=int)
    rank[np.argsort(step["forward_kl"].to_numpy(), kind="stable")] = np.arange(len(step))
    # two positions in every group, where the fold is that small
    return rank * min(DECILES, max(len(step) // 2, 1)) // max(len(step), 1)


def graded_by_others(part: BankPart, weights_N: np.ndarray, graded_by: np.ndarray) -> BankPart:
    """A part of a bank in which every position has the teacher's states of another.

    Only contexts with loss are kept, so this adds the states of one fold to the memory.

    Args:
        part: This process's batches and the teacher's states for them.
        weights_N: Float [N], 0 where a position carries no loss; the same in every process.
        graded_by: Int [N], the row whose states each position gets, the same in every process.
            Rows and their graders are in this process's part or in another's.

    Returns:
        A new part with the batches' contexts that carry loss.
    """
    places = _Places([batch.rows_n for batch in part.batches], part.teacher, len(graded_by))
    chosen = [
        (batch, torch.zeros_like(states)) for batch, states in part.contexts_of(weights_N != 0)
    ]
    wanted = [torch.from_numpy(graded_by[batch.rows_n.numpy()]) for batch, _ in chosen]
    found = [states for _, states in chosen]
    if distributed.world() == 1:
        for rows_n, out_nH in zip(wanted, found, strict=True):
            places.fill(rows_n, out_nH)
    else:
        _exchange(places, wanted, found, np.flatnonzero(weights_N))
    return BankPart([batch for batch, _ in chosen], found)


class _Places:
    """Where this process holds the states of a row."""

    def __init__(self, rows: Sequence[Tensor], states: Sequence[Tensor], positions: int):
        self.states = states
        self.batch_N = torch.full((positions,), -1)
        self.offset_N = torch.zeros(positions, dtype=torch.long)
        for number, rows_n in enumerate(rows):
            self.batch_N[rows_n] = number
            self.offset_N[rows_n] = torch.arange(len(rows_n))

    def fill(self, rows_n: Tensor, out_nH: Tensor) -> None:
        """Write the states of the rows that this process holds; other rows are left as they are."""
        for number in self.batch_N[rows_n].unique().tolist():
            if number >= 0:
                at_n = self.batch_N[rows_n] == number
                source_n = self.offset_N[rows_n[at_n]].to(self.states[number].device)
                out_nH[at_n.to(out_nH.device)] = self.states[number][source_n].to(out_nH)


def _exchange(
    places: _Places, wanted: Sequence[Tensor], found: Sequence[Tensor], rows: np.ndarray
) -> None:
    """Fill the states that every process wants from those that hold them, some rows at a time.

    Every row is held by one process, the others add 0: in float64 the sum is its states exactly.
    """
    width = max(distributed.total_lengths(places.states[0].shape[1] if places.states else 0))
    for start in range(0, len(rows), EXCHANGED_ROWS):
        sent = torch.from_numpy(rows[start : start + EXCHANGED_ROWS])
        buffer_sH = torch.zeros(len(sent), width, dtype=torch.float64)
        places.fill(sent, buffer_sH)
        distributed.sum_in_place([buffer_sH])
        arrived = _Places([sent], [buffer_sH], len(places.batch_N))
        for rows_n, out_nH in zip(wanted, found, strict=True):
            arrived.fill(rows_n, out_nH)
