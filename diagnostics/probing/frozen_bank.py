"""Contexts with the teacher's states for them, scored again and again as the student changes.

The teacher runs once, when the bank is set up. A bank may be divided into parts, such as folds of
the prompts; every part has batches of its own.

Axes: N positions of the bank, n of a batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diagnostics.core.progress import Shards
from diagnostics.core.types import Bank
from diagnostics.models.pair import Pair
from diagnostics.probing import scores


@dataclass
class BankPart:
    """This process's batches of a part of the bank, and the teacher's states [n, H] for each."""

    batches: list[scores.Batch]
    teacher: list[Tensor]

    def __iter__(self) -> Iterator[tuple[scores.Batch, Tensor]]:
        return zip(self.batches, self.teacher, strict=True)

    def copy(self) -> BankPart:
        """The same batches and states, whose lists can be halved apart."""
        return BankPart(list(self.batches), list(self.teacher))

    def _halve(self, error: BaseException) -> bool:
        """Halve every batch of several contexts. Returns whether there was any."""
        halves = [
            batch.halves(error) if len(batch.ids_BT) > 1 else [batch] for batch in self.batches
        ]
        self.teacher = [
            part
            for two, states in zip(halves, self.teacher, strict=True)
            for part in states.split([len(half.rows_n) for half in two])
        ]
        self.batches = [half for two in halves for half in two]
        return any(len(two) > 1 for two in halves)


def halve(parts: Sequence[BankPart], error: BaseException) -> None:
    """Halve every batch of some parts after one of them did not fit in memory.

    Args:
        parts: Parts of a bank; their batches are replaced.
        error: The out-of-memory error, which is named where every batch is one context already.

    Raises:
        DiagnosticsError: No batch can be halved.
    """
    halved = [part._halve(error) for part in parts]
    if not any(halved):
        max((batch for part in parts for batch in part.batches), key=lambda b: b.tokens).halves(
            error
        )


class FrozenBank:
    """A bank, its batches and the teacher's states for them.

    Under several processes each holds a share of the batches; results are whole on all.

    Args:
        pair: Student and teacher. The student may change between two calls, the teacher may not.
        bank: The frozen contexts, N response positions in all.
        batch_tokens: Tokens in one forward pass, padding included; None as in `ScoreConfig`, and
            where there are parts, so few that a gradient fits as well.
        parts: Masks bool [N], each a part of the bank with its own batches, such as those that
            carry a step; one part with every position by default. A position that no mask has is
            not scored.

    Raises:
        DiagnosticsError: The pair cannot score the bank (see `scores.check_bank`).
    """

    def __init__(
        self,
        pair: Pair,
        bank: Bank,
        *,
        batch_tokens: int | None = None,
        parts: Sequence[np.ndarray] | None = None,
    ):
        bank = scores.check_bank(pair, bank)
        self.pair, self.bank = pair, bank
        self.batch_tokens = scores.chosen_batch_tokens(
            pair, batch_tokens, use="score" if parts is None else "gradient"
        )
        groups = [
            scores.local_batches(scores.batches(bank, batch_tokens=self.batch_tokens, keep=keep))
            for keep in ((None,) if parts is None else parts)
        ]
        states = iter(scores.teacher_states(pair, [batch for group in groups for batch in group]))
        self.parts = [BankPart(group, [next(states) for _ in group]) for group in groups]

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
        parts: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Measure both divergences at every position with the student as it is now.

        Args:
            description: What the progress bar says.
            js: Whether the Jensen-Shannon divergence is measured too.
            shards: Where finished batches are kept, and taken from.
            parts: Numbers of the parts that are measured; None measures all.

        Returns:
            KL(q||p) (teacher first), KL(p||q) and with `js` JS, each float64 [N] in nats; 0 at a
            position that none of these parts has.
        """
        chosen = self.parts if parts is None else [self.parts[part] for part in parts]
        return scores.rescore(
            self.pair,
            [batch for part in chosen for batch in part.batches],
            [states for part in chosen for states in part.teacher],
            positions=self.bank.positions,
            description=description,
            js=js,
            shards=shards,
        )

    def divergences(self) -> tuple[np.ndarray, ...]:
        """KL(q||p) (teacher first) and KL(p||q) [N] in nats with the student as it is now."""
        return self.rescore("bank")
