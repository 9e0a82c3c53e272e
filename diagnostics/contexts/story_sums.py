"""Story sums: a small language with a verifier; the teacher speaks it correctly, the student not.

A prompt tells of somebody who has `a` things and gains or loses `b`. The response is a few
sentences of story and then the sum, worked out. Every word of a response fills a *slot*, and for
each slot there are two distributions over words (`story_words`), one per side. The teacher's side
is correct. The student's side differs from it in ways that were chosen so that all four quadrants
of entropy and divergence occur:

- open choices among 20 to 60 words, with the same preferences on both sides (uncertain, agreed) or
  with the student's preferences rotated down the list (uncertain, disagreed);
- small choices among a few wordings, with the same weights, slightly different ones, or a habit
  (confident);
- facts: a word that follows from the name or the things of the prompt. The student knows some; in
  *mixed* ones it prefers a wrong word and keeps the right one second; in *unseen* ones it never met
  the right word;
- the sum: some verbs are misread (mixed), and carries are dropped (the student never met 10 to 18).

Everything is drawn from explicit generators, and prompts are assigned to splits by a hash of their
text."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from diagnostics.contexts.story_words import (
    FACTS,
    KINDS,
    MISREAD,
    MISREAD_RIGHT_SHARE,
    OPEN,
    OPEN_OFFSET,
    PEOPLE,
    PLANS,
    SECOND_SHARES,
    SENTENCES,
    SMALL,
    THINGS,
    VERBS,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt

Side = Literal["teacher", "student"]
Split = Literal["train", "probe", "test"]
SIDES = ("teacher", "student")
"""Who speaks."""
SPLITS = {"train": range(8), "probe": range(8, 9), "test": range(9, 10)}
"""Which of ten hash buckets belong to each split."""


@dataclass(frozen=True)
class Story:
    """What one prompt tells: `name` has `a` things and gains or loses `b` of them."""

    name: str
    items: str
    verb: str
    a: int
    b: int

    @property
    def prompt(self) -> str:
        """The question as text."""
        start = (
            f"{self.name} has {self.a} {self.items}. {self.name} {self.verb} {self.b} {self.items}."
        )
        return f"{start} How many {self.items} does {self.name} have now?"

    @property
    def answer(self) -> int:
        """The correct number."""
        return self.a + self.b if VERBS[self.verb] == "plus" else self.a - self.b


def split_of(prompt: str) -> str:
    """Return the split that a prompt's text belongs to."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def stories(rng: random.Random, *, split: Split) -> Iterator[Story]:
    """Yield stories of one split without end; a story may repeat.

    Sums lie below 100; differences are at least 20 and need no borrowing. The same bounds hold for
    the other operation, except for the borrowing, so that a misread verb still leads to a number of
    the language.

    Args:
        rng: Generator that the stories are drawn from.
        split: `train`, `probe` or `test`.

    Yields:
        Stories.

    Raises:
        DiagnosticsError: The split is unknown.
    """
    if split not in SPLITS:
        raise DiagnosticsError(f"Unknown split {split!r}. Known are {', '.join(SPLITS)}.")
    while True:
        b = rng.randrange(20, 40)
        a = rng.randrange(b + 20, 100 - b)
        story = Story(rng.choice(PEOPLE)[0], rng.choice(THINGS)[0], rng.choice(list(VERBS)), a, b)
        borrows = VERBS[story.verb] == "minus" and a % 10 < b % 10
        if not borrows and split_of(story.prompt) == split:
            yield story


def sums(n: int, *, seed: int, split: Split = "train") -> list[Prompt]:
    """Write different prompts of one split with their answers.

    Args:
        n: Number of prompts, at least 1.
        seed: Seed of the prompts; equal seeds give equal prompts.
        split: `train`, `probe` or `test`. Splits never share a prompt.

    Returns:
        `n` prompts. Each id is `sum-` and a hash of the text; each answer is a number as text.

    Raises:
        DiagnosticsError: The split is unknown, or n is less than 1.
    """
    if n < 1:
        raise DiagnosticsError(f"n is {n}; ask for at least one prompt.")
    chosen: dict[str, Prompt] = {}
    for story in stories(random.Random(seed), split=split):
        identity = "sum-" + hashlib.sha256(story.prompt.encode()).hexdigest()[:12]
        chosen.setdefault(identity, Prompt(identity, story.prompt, str(story.answer)))
        if len(chosen) == n:
            break
    return list(chosen.values())


def verify(response: str, answer: str | int) -> bool:
    """Judge whether a response gives the right number.

    A response that was cut before its last full stop is wrong, whatever numbers it holds.

    Args:
        response: The response as text, without special tokens.
        answer: The reference answer, as `sums` writes it.

    Returns:
        True where the response ends in `makes N.` or `gives N.` with N equal to the answer.
    """
    end = re.search(r"\b(?:makes|gives) (\d+)\.\s*$", response)
    return end is not None and int(end[1]) == int(answer)


def choices(slot: str, story: Story, *, side: Side, written: dict[str, str]) -> dict[str, float]:
    """Return the words that may fill a slot, with their probabilities on one side of the language.

    Args:
        slot: Name of the slot.
        story: What the prompt tells.
        side: `teacher` or `student`.
        written: Words of the earlier slots of the same response; only `op`, `tens` and `ones`
            matter.

    Returns:
        Word -> probability; the probabilities add up to 1.
    """
    fixed = {
        "NAME": story.name,
        "ITEMS": story.items,
        "A": str(story.a),
        "B": str(story.b),
        "COMMA": ",",
        "STOP": ".",
    }
    if slot in OPEN or slot in SMALL:
        return word_weights(slot, side)
    if slot in FACTS:
        return fact_words(slot, story.name if FACTS[slot][0] is PEOPLE else story.items, side)
    if slot == "op":
        return _operation(story.verb, side)
    if slot in ("tens", "ones", "total"):
        return {_number(slot, story, side, written): 1.0}
    return {fixed.get(slot, slot): 1.0}


@cache
def word_weights(slot: str, side: Side) -> dict[str, float]:
    """Return the probabilities of the words of an open or small slot on one side."""
    column = SIDES.index(side)
    if slot in SMALL:
        pairs = (entry.split(":") for entry in SMALL[slot].split())
        weights = {word: float(both.split("/")[column]) for word, both in pairs}
    else:
        rotation, words = OPEN[slot][0] * column, OPEN[slot][1].split()
        order = words[rotation:] + words[:rotation]
        weights = {word: 1 / (rank + OPEN_OFFSET) for rank, word in enumerate(order)}
    return _normalized(weights)


def _normalized(weights: dict[str, float]) -> dict[str, float]:
    """Scale weights to probabilities and drop words of weight 0."""
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items() if weight > 0}


def fact_kind(slot: str, key: str) -> str:
    """Return how the student holds a fact: `known`, `mixed` or `unseen`."""
    table, column = FACTS[slot]
    return KINDS[(_row(table, key) + 3 * column) % len(KINDS)]


@cache
def fact_words(slot: str, key: str, side: Side) -> dict[str, float]:
    """Return the words that may fill a fact slot, with their probabilities on one side."""
    table, column = FACTS[slot]
    row = _row(table, key)
    kind, right = fact_kind(slot, key), table[row][column]
    if side == "teacher" or kind == "known":
        return {right: 1.0}
    later = (table[(row + step) % len(table)] for step in range(1, len(table)))
    wrong = [other[column] for other in later if fact_kind(slot, other[0]) != "unseen"]
    second = SECOND_SHARES[row % len(SECOND_SHARES)]
    return {wrong[0]: 1 - second, right if kind == "mixed" else wrong[1]: second}


def _row(table: list[list[str]], key: str) -> int:
    """Return the row of a table whose first column is `key`."""
    return next(row for row, words in enumerate(table) if words[0] == key)


def _operation(verb: str, side: Side) -> dict[str, float]:
    """Return plus and minus with their probabilities after a verb."""
    right = VERBS[verb]
    if side == "teacher" or verb not in MISREAD:
        return {right: 1.0}
    return {
        "minus" if right == "plus" else "plus": 1 - MISREAD_RIGHT_SHARE,
        right: MISREAD_RIGHT_SHARE,
    }


def _number(slot: str, story: Story, side: Side, written: dict[str, str]) -> str:
    """Return the tens, ones or total that one side writes. The student drops carries and, where it
    subtracts, takes the smaller digit from the larger.
    """
    if slot == "total":
        return str(int(written["tens"]) + int(written["ones"]))
    unit = 10 if slot == "tens" else 1
    a, b = story.a // unit % 10, story.b // unit % 10
    if written["op"] == "minus":
        return str(unit * abs(a - b))
    return str(unit * (a + b)) if side == "teacher" or slot == "tens" else str((a + b) % 10)


def write(story: Story, rng: random.Random, *, side: Side) -> Iterator[tuple[str, str]]:
    """Yield one response as (slot, word) pairs in order.

    Args:
        story: What the prompt tells.
        rng: Generator that the words are drawn from.
        side: `teacher` or `student`.

    Yields:
        The slot and the word that fills it.
    """
    plan = _pick(
        {" ".join(order): weights[SIDES.index(side)] for order, weights in PLANS.items()}, rng
    )
    written: dict[str, str] = {}
    for slot in " ".join(SENTENCES[sentence] for sentence in plan.split()).split():
        written[slot] = word = _pick(choices(slot, story, side=side, written=written), rng)
        yield slot, word


def _pick(weights: dict[str, float], rng: random.Random) -> str:
    """Draw a word by its weight; a single word takes no draw."""
    return (
        next(iter(weights))
        if len(weights) == 1
        else rng.choices(list(weights), list(weights.values()))[0]
    )


def corpus(n: int, *, seed: int, side: Side, split: Split = "train") -> Iterator[tuple[str, str]]:
    """Yield pairs of prompt and response as one side writes them; the two sides draw from different
    streams.

    Args:
        n: Number of pairs.
        seed: Seed of the stories and the words.
        side: `teacher` or `student`.
        split: `train`, `probe` or `test`.

    Yields:
        (prompt, response) as text.

    Raises:
        DiagnosticsError: The side or the split is unknown.
    """
    if side not in SIDES:
        raise DiagnosticsError(f"Unknown side {side!r}. Known are {', '.join(SIDES)}.")
    rng = random.Random(f"{seed}/{side}")
    for _, story in zip(range(n), stories(rng, split=split)):
        yield story.prompt, join(word for _, word in write(story, rng, side=side))


def join(words) -> str:
    """Return words as text: single spaces, none before a comma or a full stop."""
    return " ".join(words).replace(" ,", ",").replace(" .", ".")


def vocabulary() -> list[str]:
    """Return every word of prompts and responses once: the numbers to 99, then the other words in
    alphabetical order.
    """
    words = {
        word for slot in [*OPEN, *SMALL] for side in SIDES for word in word_weights(slot, side)
    }
    words |= {word for table in (PEOPLE, THINGS) for row in table for word in row}
    words |= {
        word for sentence in SENTENCES.values() for word in sentence.split() if word not in _SLOTS
    }
    words |= set(VERBS) | set(VERBS.values()) | set("has How many does have now ? . ,".split())
    return [str(number) for number in range(100)] + sorted(words)


_SLOTS = {
    *OPEN,
    *SMALL,
    *FACTS,
    "NAME",
    "ITEMS",
    "A",
    "B",
    "COMMA",
    "STOP",
    "op",
    "tens",
    "ones",
    "total",
}
"""Names in SENTENCES that stand for words rather than for themselves."""


@dataclass(frozen=True)
class Task:
    """A source of prompts in any number, and the judge of a response to them."""

    write: Callable[..., list[Prompt]]
    """(n, *, seed, split) -> prompts; splits never share a prompt."""
    verify: Callable[[str, str], bool]
    """(response, answer) -> whether the response is accepted."""


TASKS = {"sums": Task(sums, verify)}
"""Tasks by the name that a named pair gives."""
