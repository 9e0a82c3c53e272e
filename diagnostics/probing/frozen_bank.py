"""Contexts with the teacher's states for them, scored again and again as the student changes.

The teacher runs once, when the bank is set up, on the batches that `scores.score` makes of the same
bank. What is measured of some contexts, such as those of a fold, runs on these batches without the
other contexts.

Axes: N positions of the bank, n of a batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diagnostics.core.progress import Shards
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores


@dataclass
class BankPart:
    """This process's batches of a bank or of a part of it, and the teacher's states [n, H] for
    each.
    """

    batches: list[scores.Batch]
    teacher: list[Tensor]

    def __iter__(self) -> Iterator[tuple[scores.Batch, Tensor]]:
        return zip(self.batches, self.teacher, strict=True)

    def copy(self) -> BankPart:
        """The same batches and states, whose lists can be halved apart."""
        return BankPart(list(self.batches), list(self.teacher))

    def contexts_of(self, wanted_N: np.ndarray) -> Iterator[tuple[scores.Batch, Tensor]]:
        """The batches without the contexts in which no position is wanted.

        Args:
            wanted_N: Bool [N] over the whole bank.

        Yields:
            A batch with n positions, and the teacher's states [n, H] for it.
        """
        for batch, teacher_nH in self:
            wanted_n = torch.from_numpy(wanted_N[batch.rows_n.numpy()])
            if wanted_n.any():
                yield batch.with_contexts_of(wanted_n, teacher_nH)

    def count_of(self, wanted_N: np.ndarray) -> int:
        """How many batches `contexts_of` gives."""
        return sum(bool(wanted_N[batch.rows_n.numpy()].any()) for batch in self.batches)

    def joined(self, wanted_N: np.ndarray, most: int) -> BankPart:
        """The contexts with a wanted position in few batches.

        The contexts of an optimizer step lie in many batches of a bank, a context or two in each;
        as they are, each would take a pass, and each gradient a sum.

        Args:
            wanted_N: Bool [N] over the whole bank.
            most: Tokens, padding included, up to which batches are joined.

        Returns:
            The batches in their order, joined where neighbours fit into one.
        """
        groups: list[list[tuple[scores.Batch, Tensor]]] = []
        contexts, width = 0, 0
        for batch, teacher_nH in self.contexts_of(wanted_N):
            contexts, width = contexts + len(batch.ids_BT), max(width, batch.ids_BT.shape[1])
            if not groups or contexts * width > most:
                contexts, width = batch.ids_BT.shape
                groups.append([])
            groups[-1].append((batch, teacher_nH))
        return BankPart(
            [scores.Batch.joined([batch for batch, _ in group]) for group in groups],
            [torch.cat([teacher_nH for _, teacher_nH in group]) for group in groups],
        )

    def halve(self, error: BaseException) -> None:
        """Halve every batch of several contexts, after one did not fit in memory.

        Args:
            error: The out-of-memory error, which is named where every batch is one context already.

        Raises:
            DiagnosticsError: No batch can be halved.
        """
        largest = max(self.batches, key=lambda batch: (len(batch.ids_BT) > 1, batch.tokens))
        largest.halves(error)  # says so, or refuses
        self._halve(lambda batch: True)

    def keep_to(self, tokens: int) -> None:
        """Halve batches of more tokens than these, padding included, down to one context."""
        while any(len(batch.ids_BT) > 1 and batch.tokens > tokens for batch in self.batches):
            self._halve(lambda batch: batch.tokens > tokens)

    def _halve(self, wanted: Callable[[scores.Batch], bool]) -> None:
        parts = [batch.in_halves() if wanted(batch) else [batch] for batch in self.batches]
        self.teacher = [
            part
            for batches, states in zip(parts, self.teacher, strict=True)
            for part in states.split([len(batch.rows_n) for batch in batches])
        ]
        self.batches = [batch for batches in parts for batch in batches]


class FrozenBank:
    """A bank, its batches and the teacher's states for them.

    Under several processes each holds a share of the batches; results are whole on all.

    Args:
        pair: Student and teacher. The student may change between two calls, the teacher may not.
        bank: The frozen contexts, N response positions in all.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`.
        on_host: Whether the teacher's states wait in main memory, in the teacher's own dtype.

    Raises:
        DiagnosticsError: The pair cannot score the bank (see `scores.check_bank`).
    """

    def __init__(
        self,
        pair: Pair,
        bank: Bank,
        *,
        batch_tokens: int | None = None,
        on_host: bool = False,
    ):
        bank = scores.check_bank(pair, bank)
        self.pair, self.bank = pair, bank
        self.batch_tokens = scores.chosen_batch_tokens(pair, batch_tokens)
        todo = scores.local_batches(scores.batches(bank, batch_tokens=self.batch_tokens))
        self.whole = BankPart(todo, scores.teacher_states(pair, todo, on_host=on_host))

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompt of every position [N]."""
        return np.repeat(
            [context.prompt_id for context in self.bank],
            [len(context.sampled_ids) for context in self.bank],
        )

    def rescore(
        self,
        description: str,
        *,
        js: bool = False,
        shards: Shards | None = None,
        wanted_N: np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Measure both divergences at every position with the student as it is now.

        Args:
            description: What the progress bar says.
            js: Whether the Jensen-Shannon divergence is measured too.
            shards: Where finished batches are kept, and taken from.
            wanted_N: Bool [N]; contexts in which no position is wanted are left out. None
                measures all.

        Returns:
            KL(q||p) (teacher first), KL(p||q) and with `js` JS, each float64 [N] in nats; 0 at a
            position that was not measured.
        """
        part = self.whole
        if wanted_N is not None:
            chosen = list(part.contexts_of(wanted_N))
            part = BankPart([batch for batch, _ in chosen], [states for _, states in chosen])
        return scores.rescore(
            self.pair,
            part.batches,
            part.teacher,
            positions=self.bank.positions,
            description=description,
            js=js,
            shards=shards,
        )

    def divergences(self) -> tuple[np.ndarray, ...]:
        """KL(q||p) (teacher first) and KL(p||q) [N] in nats with the student as it is now."""
        return self.rescore("bank")
