"""Compatibility and divergence of two models with different tokenizers, bounded by bytes.

At a position that is comparable (`contexts.coverage`) both models stand behind the same bytes, and
each says which bytes come next. Let U be the strings of the student's K likeliest tokens without
those that begin with another of them, so that no text begins with two. The probability that a
model's text goes on with u in U is, over its tokens v,

    low(u)  = sum of P(v) where v begins with u          v writes all of u
    high(u) = low(u) + sum of P(v) where u begins with v, v shorter     v writes a part of u

since after a part the rest may follow or not; all else does not begin with u. Both ends come from
the next-token distribution alone: no further pass of a model. The rest of the text is one bucket,
between 1 - sum of low - M and 1 - sum of low, with M the mass of all tokens that write a part of
some u. With q in [a, b] the teacher's and p in [c, d] the student's probability of a unit or of the
bucket,

    compatibility_least  = sum over U of a    at most the teacher's mass on the student's strings
    compatibility_most   = the same + M       at least that mass
    forward_kl_least     = sum of min over q, p of q ln(q/p) - q + p    at most KL(q||p) of texts
    reverse_kl_least     = the same with the models exchanged           at most KL(p||q) of texts

Each summand is at least 0, and 0 where the intervals meet; otherwise it is taken at the two nearest
ends. Over all units the terms p - q cancel, so the sum is at most the KL of the units, and merging
texts into units can only lower a KL (data processing). Where no token writes a part of a unit, the
sum *is* the KL of the units.

A special token is a unit of its own, the same for both models where its name is, or where it is
what either tokenizer ends a text with.

The teacher reads the prompt's text, or `teacher_prompt`, in its own tokens, and the response as
`coverage` aligned it.

Reference: the probability of bytes under a model of tokens is that of arXiv 2410.09303; bounds from
one distribution, without following each part, are this project's own.

Axes: n positions, V a vocabulary, U units.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from diagnostics.contexts.encoding import encode_prompt
from diagnostics.core.types import Context
from diagnostics.models.readout import Readout
from diagnostics.models.token_bytes import TokenBytes

COLUMNS = ("compatibility_least", "compatibility_most", "forward_kl_least", "reverse_kl_least")
"""What `unit_bounds` returns for a position: probabilities and nats."""
CHUNK = 64
"""Positions whose distributions are held at a time."""
END = b"\xff end"
"""The unit of what ends a text: no UTF-8, so that no string is taken for it."""
SPECIAL = b"\xff special "
"""What stands before the name of a special token's unit, likewise."""


class Spellings:
    """A vocabulary in the order of its bytes, so that beginnings stand together.

    Args:
        tokens: The tokenizer's tokens as bytes.
        size: Number of ids that the model gives probabilities to.
    """

    def __init__(self, tokens: TokenBytes, size: int):
        self.tokens, self.size = tokens, size
        vocabulary = sorted({i for i in tokens.tokenizer.get_vocab().values() if i < size})
        ordinary = [i for i in vocabulary if i not in tokens.special and tokens.of(i)]
        self.ids = np.array(sorted(ordinary, key=tokens.of), dtype=np.int64)
        self.texts = [tokens.of(int(i)) for i in self.ids]
        self._parts: dict[bytes, tuple[slice, np.ndarray]] = {}

    @cached_property
    def special_units(self) -> dict[bytes, int]:
        """The id of each special token by its unit."""
        end = self.tokens.tokenizer.eos_token_id
        found = {SPECIAL + self.tokens.of(i): i for i in self.tokens.special if i < self.size}
        return found | ({} if end is None or end >= self.size else {END: end})

    def unit(self, token_id: int) -> bytes:
        """The unit that a token writes: its bytes, or a special token's own unit."""
        if token_id == self.tokens.tokenizer.eos_token_id:
            return END
        text = self.tokens.of(token_id)
        return SPECIAL + text if token_id in self.tokens.special else text

    def of(self, unit: bytes) -> tuple[slice, np.ndarray]:
        """Places, in the order of bytes, of the tokens that begin with a string; and ids of those
        that the string begins with and that are shorter.
        """
        if unit not in self._parts:
            first, last = self._beginning_with(unit)
            parts = [
                place
                for length in range(1, len(unit))
                for place in range(*self._equal_to(unit[:length]))
            ]
            self._parts[unit] = slice(first, last), self.ids[parts]
        return self._parts[unit]

    def _beginning_with(self, text: bytes) -> tuple[int, int]:
        first = bisect_left(self.texts, text)
        after = _next_text(text)
        return first, len(self.texts) if after is None else bisect_left(self.texts, after)

    def _equal_to(self, text: bytes) -> tuple[int, int]:
        return bisect_left(self.texts, text), bisect_left(self.texts, text + b"\0")

    def intervals(
        self, p_V: np.ndarray, units: Sequence[bytes]
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Bounds of the probability that a text goes on with each unit.

        Args:
            p_V: Next-token probabilities [V].
            units: Strings none of which begins with another, and special units.

        Returns:
            low [U + 1] and high [U + 1], the bucket's last, and the mass M of tokens that write a
            part of some unit.
        """
        low, extra = np.zeros(len(units)), np.zeros(len(units))
        outside_V = np.ones(len(p_V), dtype=bool)
        partial: set[int] = set()
        for place, unit in enumerate(units):
            if is_special(unit):
                whole, parts = np.array([self.special_units[unit]]), np.array([], dtype=np.int64)
            else:
                at, parts = self.of(unit)
                whole = self.ids[at]
            low[place], extra[place] = p_V[whole].sum(), p_V[parts].sum()
            outside_V[whole] = False
            partial.update(parts.tolist())
        rest = float(p_V[outside_V].sum())  # summed itself: 1 - the others would round to 0
        outside_V[sorted(partial)] = False
        sure = float(p_V[outside_V].sum())
        left = float(p_V[sorted(partial)].sum()) if partial else 0.0
        return np.append(low, sure), np.append(np.minimum(low + extra, 1.0), rest), left


def _next_text(text: bytes) -> bytes | None:
    """The first text behind all that begin with this one; None where there is none."""
    bare = text.rstrip(b"\xff")
    return bare[:-1] + bytes([bare[-1] + 1]) if bare else None


def apart(units: Sequence[bytes]) -> list[bytes]:
    """Units without strings that begin with another of them: strings first, then special units."""
    special = {unit for unit in units if is_special(unit)}
    kept: list[bytes] = []
    for unit in sorted(set(units) - special):
        if not kept or not unit.startswith(kept[-1]):
            kept.append(unit)
    return kept + sorted(special)


def is_special(unit: bytes) -> bool:
    """Whether a unit is a special token, and no string."""
    return unit == END or unit.startswith(SPECIAL)


def least_kl(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Lower bound of KL(first||second) from intervals of both.

    Args:
        first: Low and high ends [U] of the probabilities of one model; the true ones add up to 1.
        second: The same of the other.

    Returns:
        The sum of the head of this module in nats; inf where only the first can be above 0.
    """
    (a, b), (c, d) = first, second
    above, below = a > d, b < c
    with np.errstate(divide="ignore", invalid="ignore"):
        over = np.where(above, a * np.log(a / d) - a + d, 0.0)
        under = np.where(below, np.where(b > 0, b * np.log(b / c), 0.0) - b + c, 0.0)
    return float(over.sum() + under.sum())


def unit_bounds(
    student: Spellings, teacher: Spellings, p_V: np.ndarray, q_V: np.ndarray, *, k: int
) -> tuple[float, ...]:
    """Bounds at one position.

    Args:
        student: The student's vocabulary.
        teacher: The teacher's vocabulary.
        p_V: The student's next-token probabilities, float64.
        q_V: The teacher's over its own vocabulary, float64.
        k: Number of the student's likeliest tokens whose strings are the units.

    Returns:
        The values of COLUMNS.
    """
    top = np.argsort(-p_V, kind="stable")[:k]
    found = [unit for i in top.tolist() if (unit := student.unit(i))]
    # a special token that the teacher lacks belongs to the bucket: the teacher cannot write it
    units = apart([u for u in found if not is_special(u) or u in teacher.special_units])
    *of_student, _ = student.intervals(p_V, units)
    *of_teacher, part = teacher.intervals(q_V, units)
    ends_S, ends_T = (of_student[0], of_student[1]), (of_teacher[0], of_teacher[1])
    mass = float(of_teacher[0][:-1].sum())
    return mass, min(1.0, mass + part), least_kl(ends_T, ends_S), least_kl(ends_S, ends_T)


# --- running the models


@torch.no_grad()
def probabilities(
    model: Readout, ids: Sequence[int], places: Sequence[int]
) -> Iterator[np.ndarray]:
    """Next-token probabilities of one model behind some tokens of a text.

    Args:
        model: The model, over its whole vocabulary.
        ids: The text's tokens.
        places: Indices of the tokens behind which the model is asked.

    Yields:
        Float64 [V] for each place in turn.
    """
    if not len(places):
        return
    ids_1T = torch.tensor([list(ids)])
    hidden_TH = model.hidden(ids_1T, torch.ones_like(ids_1T))[0]
    for start in range(0, len(places), CHUNK):
        chosen = torch.tensor(places[start : start + CHUNK], device=hidden_TH.device)
        logits_nV = model.logits(hidden_TH[chosen])
        yield from logits_nV.cpu().double().softmax(-1).numpy()


def context_bounds(
    models: tuple[Readout, Readout],
    spellings: tuple[Spellings, Spellings],
    context: Context,
    aligned: Sequence[tuple[int, int]],
    teacher_response: Sequence[int],
    *,
    k: int,
) -> list[tuple[float, ...]]:
    """Bounds at the comparable positions of a context.

    Args:
        models: Student and teacher.
        spellings: Their vocabularies.
        context: The context, in the student's tokens.
        aligned: For each comparable position, the number of response tokens before it in the
            student's tokens and in the teacher's.
        teacher_response: The response in the teacher's tokens.
        k: As in `unit_bounds`.

    Returns:
        The values of COLUMNS for each pair of `aligned`.
    """
    prompt = teacher_prompt_ids(spellings[1].tokens.tokenizer, context)
    before = len(context.prompt_ids) - 1, len(prompt) - 1
    texts = context.ids, (*prompt, *teacher_response)
    both = [
        probabilities(model, ids, [first + pair[side] for pair in aligned])
        for side, (model, ids, first) in enumerate(zip(models, texts, before, strict=True))
    ]
    return [unit_bounds(*spellings, p_V, q_V, k=k) for p_V, q_V in zip(*both, strict=True)]


def teacher_prompt_ids(tokenizer: Any, context: Context) -> tuple[int, ...]:
    """The prompt in the teacher's tokens: its own where the context has one, else the student's
    text.
    """
    return encode_prompt(tokenizer, context.teacher_prompt or context.prompt)


def too_long(
    models: tuple[Readout, Readout],
    context: Context,
    teacher_response: Sequence[int],
    tokenizer: Any,
) -> tuple[bool, bool]:
    """Whether a context is longer than the window of the student, and of the teacher."""
    lengths = (
        len(context.ids),
        len(teacher_prompt_ids(tokenizer, context)) + len(teacher_response),
    )
    student, teacher = (
        length > (_window(each) or length) for each, length in zip(models, lengths, strict=True)
    )
    return student, teacher


def _window(model: Readout) -> int | None:
    """Tokens that a model can read; None where it names no such number."""
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
