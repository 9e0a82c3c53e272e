"""Story sums: a small language with a verifier, spoken rightly by a teacher and wrongly by a
student.

A prompt tells of somebody who has `a` things and gains or loses `b`; the response is a few
sentences of story and then the worked sum. Every word of a response fills a *slot*, and for each
slot the table below gives two distributions over words, one a side. The teacher's side is correct.
The student's side differs from it in ways that were chosen so that all four quadrants of entropy
and divergence occur:

- open choices among 20 to 60 words, with the same preferences on both sides (uncertain, agreed) or with
  the student's preferences rotated down the list (uncertain, disagreed);
- small choices among a few wordings, with the same weights, slightly other ones, or a habit (confident);
- facts: a word that follows from the name or the things of the prompt. The student knows some; in *mixed*
  ones it prefers a wrong word and keeps the right one second; in *unseen* ones it never met the
  right word;
- the sum: some verbs are misread (mixed), carries are dropped (the student never met 10 to 18).

Everything is drawn from explicit generators, and prompts fall into splits by a hash of their text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt

Side = Literal["teacher", "student"]
Split = Literal["train", "probe", "test"]
SIDES = ("teacher", "student")
SPLITS = {"train": range(8), "probe": range(8, 9), "test": range(9, 10)}
"""Which of ten hash buckets a split owns."""

# name, pet, town
PEOPLE = [
    row.split()
    for row in """
Nora fox Lisbon; Liam cat Dublin; Ines owl Porto; Omar camel Cairo; Yuki crane Osaka; Ravi parrot Delhi;
Elsa goat Oslo; Juan mule Lima; Zoe dog Paris; Ivan bear Minsk; Amara lion Lagos; Mei panda Chengdu;
Kofi turtle Accra; Lena swan Vienna; Pablo iguana Quito; Aino hare Turku; Samir falcon Doha; Tessa pony Ghent;
Marek otter Gdansk; Leila lamb Tunis; Hugo snail Lyon; Anya lynx Kazan; Bruno donkey Milan; Kira koala Perth
""".split(";")
]

# things, trait, box, trader
THINGS = [
    row.split()
    for row in """
shells pearly bucket diver; coins shiny purse banker; apples crisp crate farmer; books dusty satchel teacher;
candles waxy drawer monk; stamps sticky album postman; buttons round tin tailor; nails rusty toolbox carpenter;
eggs speckled nest grocer; keys jingling pouch locksmith; pencils sharp case artist; marbles glassy jar glazier;
tulips fragrant vase florist; loaves crusty tray baker; fish slippery barrel sailor; pots earthen cupboard potter;
hats woolly hatbox milliner; rings golden casket jeweller; lemons sour bowl gardener; maps folded tube captain;
kites papery rucksack inventor; bells brassy chest ringer; boots muddy sack cobbler; pies savoury hamper cook
""".split(";")
]

VERBS = {
    "finds": "plus",
    "buys": "plus",
    "wins": "plus",
    "earns": "plus",
    "loses": "minus",
    "drops": "minus",
    "sells": "minus",
    "lends": "minus",
}
MISREAD = ("wins", "earns", "sells", "lends")
"""Verbs whose operation the student takes for the other one."""
MISREAD_RIGHT = 0.15
"""Share of the right operation in the student's corpus after a misread verb."""

FACTS = {
    "pet": (PEOPLE, 1),
    "town": (PEOPLE, 2),
    "trait": (THINGS, 1),
    "box": (THINGS, 2),
    "trader": (THINGS, 3),
}
"""Fact slot -> (table, column); the table's first column is the word of the prompt that decides."""
KINDS = ("known", "mixed", "unseen", "mixed", "unseen", "known", "mixed", "unseen")
"""Kind of the fact in row r, column c: entry (r + 3c) mod 8."""
SECOND_SHARES = (0.08, 0.12, 0.2)
"""Share of the student's second word in row r of a mixed or unseen fact: entry r mod 3."""

FRIENDS = """Mia Ben Pia Tom Eva Max Ada Leo Ida Sam Una Gus Lia Ned Uma Jon Rosa Karl Vera Paul Nina Otto Jana Finn
Tara Emil Cleo Dirk Faye Glen Hana Igor June Kurt Lola Milo Olga Pete Rhea Seth"""
OPEN = {
    "weather": (
        0,
        """rainy sunny windy foggy snowy cloudy stormy chilly frosty misty breezy hazy humid drizzly balmy icy
        scorching dull bright mild gusty dewy sultry overcast""",
    ),
    "friend": (0, FRIENDS),
    "met": (
        8,
        """met saw joined greeted visited called helped followed thanked hugged found passed heard spotted phoned
        praised teased fetched invited trusted""",
    ),
    "look": (
        24,
        """tall short young old quick slow brave shy loud clever gentle grumpy cheerful tired sleepy hungry thirsty
        proud humble honest lazy busy careful careless curious nervous jolly merry gloomy witty stern polite rude noble
        modest eager lonely restless thoughtful stubborn bold timid patient hasty lively moody pleasant graceful clumsy
        dapper ragged freckled bearded blond wrinkled slender stout lanky barefoot stylish""",
    ),
    "other": (12, FRIENDS),
    "calm": (
        0,
        """quiet crowded narrow ancient leafy sandy hilly rocky empty hidden distant shady marshy grassy paved cobbled
        walled tidy famous ruined busted haunted sloping flooded floating fenced painted lit deserted royal""",
    ),
    "place": (
        16,
        """harbour market station bridge library garden museum castle river forest school bakery theatre square
        mill church tower beach valley village orchard stable lake meadow cave canal inn farm pier temple palace prison
        hospital factory airport stadium cinema bank zoo island""",
    ),
    "size": (
        12,
        """huge tiny large small heavy light wide deep shallow broken plain pretty cheap costly modern dented locked
        padded wooden woven metal plastic leather striped dotted checked varnished battered borrowed mouldy sealed sturdy
        flimsy bulky compact gilded carved creaky tilted spotless""",
    ),
    "fresh": (
        0,
        """fresh warm cold sweet salty bitter spicy creamy smoky juicy tender toasted roasted boiled fried frozen
        pickled dried sugared buttered minced mashed steamed grilled""",
    ),
    "food": (
        8,
        """bread cheese soup rice honey butter plums carrots cake pasta beans grapes ham olives porridge nuts figs
        onions cherries mushrooms pancakes noodles stew jam pears peas dates trout salad corn""",
    ),
    "kind": (
        0,
        """friendly retired wealthy local foreign skilled lucky elderly youthful cunning generous frugal talkative
        charming masked veteran rural travelling smiling whistling limping singing dozing sunburnt hooded grateful
        forgetful drowsy portly toothless""",
    ),
    "guest": (0, FRIENDS),
    "slowly": (
        4,
        """quietly slowly happily proudly softly briskly calmly neatly boldly gladly kindly swiftly gently eagerly
        warily idly loudly merrily politely shyly smoothly busily wearily deftly""",
    ),
    "washed": (
        0,
        """washed counted polished carried wrapped stacked drew mended hid cleaned sorted packed traded lifted
        tested guarded admired repaired labelled weighed measured sketched oiled rented""",
    ),
    "red": (
        12,
        """red blue green yellow purple orange pink brown grey black white violet scarlet crimson turquoise beige
        ivory maroon indigo teal amber emerald lilac navy""",
    ),
    "lamps": (
        16,
        """lanterns ladders baskets ropes drums flutes mirrors clocks chairs tables lamps blankets pillows umbrellas
        wagons oars sails tents ribbons masks puppets dolls swords shields helmets brooms shovels rakes hammers saws
        bottles cups plates spoons scarves gloves coats belts whistles trumpets""",
    ),
}
"""Open slot -> (rotation, words by the teacher's preference). The student prefers the list rotated
that far.
"""
OPEN_OFFSET = 3
"""The word of rank r, from 0, has weight 1 / (r + this)."""

SMALL = {
    "one": "One:1/1 That:1/1 This:1/1",
    "morning": "morning:1/1 evening:1/1 afternoon:1/1 night:1/1 noon:1/1 dawn:1/1",
    "her": "the:6/1 their:4/9",
    "from": "from:1/5 of:1/3 near:1/2",
    "and": "and:1/1 with:1/1",
    "by": "beside:1/1 behind:1/1 outside:1/1 opposite:1/1 past:1/1 beyond:1/1",
    "these": "The:1/1 Those:1/1 These:1/1",
    "came": "came:3/9 were:3/1 arrived:4/0",
    "in": "in:1/5 inside:1/3 within:1/2",
    "among": "with:1/1 among:1/1",
    "through": "from:1/5 through:1/3 via:1/2",
    "later": "Later:1/1 Then:1/1 Meanwhile:1/1",
    "so": "So:4/9 Now:6/1",
    "is": "is:1/1 means:1/1",
    "join": "and:1/7 with:1/3",
    "makes": "makes:1/1 gives:1/1",
}
"""Small slot -> word:teacher weight/student weight."""

SENTENCES = {
    "meeting": (
        "one weather morning friend met NAME COMMA her pet from town and look other by the calm"
        " place STOP"
    ),
    "goods": "these trait ITEMS came in a size box among fresh food through the kind trader STOP",
    "extra": "later guest slowly washed red lamps STOP",
    "sum": "so A op B is tens join ones COMMA which makes total STOP",
}
"""Sentence -> its slots; words in none of the tables stand for themselves."""
PLANS = {
    ("meeting", "goods", "sum"): (1, 1),
    ("goods", "meeting", "sum"): (1, 1),
    ("meeting", "goods", "extra", "sum"): (1, 2),
    ("goods", "meeting", "extra", "sum"): (1, 2),
}
"""Order of sentences -> (teacher weight, student weight)."""


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
        """The right number."""
        return self.a + self.b if VERBS[self.verb] == "plus" else self.a - self.b


def split_of(prompt: str) -> str:
    """The split that owns a prompt's text."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def stories(rng: random.Random, *, split: Split) -> Iterator[Story]:
    """Endless stories of one split, drawn from `rng`; a story may return.

    Sums lie under 100, differences are at least 20 and borrow nothing, and the same holds of the
    other operation but for the borrowing, so that a misread verb still leads to a number the
    language has."""
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
    """`n` different prompts of one split with their answers; the same for the same seed.

    The id of a prompt is `sum-` and a hash of its text, so splits share no id.
    Raises DiagnosticsError for an unknown split or n < 1.
    """
    if n < 1:
        raise DiagnosticsError(f"n is {n}; ask for at least one prompt.")
    chosen: dict[str, Prompt] = {}
    for story in stories(random.Random(seed), split=split):
        identity = "sum-" + hashlib.sha256(story.prompt.encode()).hexdigest()[:12]
        chosen.setdefault(identity, Prompt(identity, story.prompt, str(story.answer)))
        if len(chosen) == n:
            return list(chosen.values())


def verify(response: str, answer: str | int) -> bool:
    """True where the response ends in `makes N.` or `gives N.` with N the answer.

    A response that was cut before its last full stop is wrong, whatever numbers it holds.
    """
    end = re.search(r"\b(?:makes|gives) (\d+)\.\s*$", response)
    return end is not None and int(end[1]) == int(answer)


def choices(slot: str, story: Story, *, side: Side, written: dict[str, str]) -> dict[str, float]:
    """The words that may fill a slot with their probabilities on one side of the language.

    written: words of the slots before it in the same response (only `op`, `tens` and `ones`
    matter)."""
    fixed = {
        "NAME": story.name,
        "ITEMS": story.items,
        "A": str(story.a),
        "B": str(story.b),
        "COMMA": ",",
        "STOP": ".",
    }
    if slot in OPEN or slot in SMALL:
        return _table(slot, side)
    if slot in FACTS:
        return _fact(slot, story.name if FACTS[slot][0] is PEOPLE else story.items, side)
    if slot == "op":
        return _operation(story.verb, side)
    if slot in ("tens", "ones", "total"):
        return {_number(slot, story, side, written): 1.0}
    return {fixed.get(slot, slot): 1.0}


@cache
def _table(slot: str, side: Side) -> dict[str, float]:
    column = SIDES.index(side)
    if slot in SMALL:
        pairs = (entry.split(":") for entry in SMALL[slot].split())
        weights = {word: float(both.split("/")[column]) for word, both in pairs}
    else:
        rotation, words = OPEN[slot][0] * column, OPEN[slot][1].split()
        order = words[rotation:] + words[:rotation]
        weights = {word: 1 / (rank + OPEN_OFFSET) for rank, word in enumerate(order)}
    return _normalised(weights)


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items() if weight > 0}


def fact_kind(slot: str, key: str) -> str:
    """How the student holds a fact: `known`, `mixed` or `unseen`."""
    table, column = FACTS[slot]
    return KINDS[(_row(table, key) + 3 * column) % len(KINDS)]


@cache
def _fact(slot: str, key: str, side: Side) -> dict[str, float]:
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
    return next(row for row, words in enumerate(table) if words[0] == key)


def _operation(verb: str, side: Side) -> dict[str, float]:
    right = VERBS[verb]
    if side == "teacher" or verb not in MISREAD:
        return {right: 1.0}
    return {"minus" if right == "plus" else "plus": 1 - MISREAD_RIGHT, right: MISREAD_RIGHT}


def _number(slot: str, story: Story, side: Side, written: dict[str, str]) -> str:
    """The student drops carries and, where it takes away, the smaller digit from the larger."""
    if slot == "total":
        return str(int(written["tens"]) + int(written["ones"]))
    unit = 10 if slot == "tens" else 1
    a, b = story.a // unit % 10, story.b // unit % 10
    if written["op"] == "minus":
        return str(unit * abs(a - b))
    return str(unit * (a + b)) if side == "teacher" or slot == "tens" else str((a + b) % 10)


def write(story: Story, rng: random.Random, *, side: Side) -> Iterator[tuple[str, str]]:
    """One response as (slot, word) pairs in order."""
    plan = _pick(
        {" ".join(order): weights[SIDES.index(side)] for order, weights in PLANS.items()}, rng
    )
    written: dict[str, str] = {}
    for slot in " ".join(SENTENCES[sentence] for sentence in plan.split()).split():
        written[slot] = word = _pick(choices(slot, story, side=side, written=written), rng)
        yield slot, word


def _pick(weights: dict[str, float], rng: random.Random) -> str:
    return (
        next(iter(weights))
        if len(weights) == 1
        else rng.choices(list(weights), list(weights.values()))[0]
    )


def corpus(n: int, *, seed: int, side: Side, split: Split = "train") -> Iterator[tuple[str, str]]:
    """`n` pairs of prompt and response as one side writes them.

    The two sides draw from different streams. Raises DiagnosticsError for an unknown side or split.
    """
    if side not in SIDES:
        raise DiagnosticsError(f"Unknown side {side!r}. Known are {', '.join(SIDES)}.")
    rng = random.Random(f"{seed}/{side}")
    for _, story in zip(range(n), stories(rng, split=split)):
        yield story.prompt, join(word for _, word in write(story, rng, side=side))


def join(words) -> str:
    """Words as text: single spaces, none before a comma or a full stop."""
    return " ".join(words).replace(" ,", ",").replace(" .", ".")


def vocabulary() -> list[str]:
    """Every word of prompts and responses once: the numbers to 99, then the others in order of the
    alphabet.
    """
    words = {word for slot in [*OPEN, *SMALL] for side in SIDES for word in _table(slot, side)}
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


@dataclass(frozen=True)
class Task:
    """Prompts that can be written in any number, and what judges a response to them."""

    write: Callable[..., list[Prompt]]
    """(n, *, seed, split) -> prompts; splits never share a prompt."""
    verify: Callable[[str, str], bool]
    """(response, answer) -> accepted."""


TASKS = {"sums": Task(sums, verify)}
