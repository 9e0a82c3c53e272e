"""The story-sums language: its verifier, its splits, and what each side writes."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from diagnostics.contexts import story_sums
from diagnostics.contexts.story_sums import Story
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt

STORY = Story("Nora", "shells", "finds", 57, 25)


def test_a_prompt_and_its_answer():
    assert (
        STORY.prompt
        == "Nora has 57 shells. Nora finds 25 shells. How many shells does Nora have now?"
    )
    assert STORY.answer == 82
    assert Story("Nora", "shells", "loses", 57, 25).answer == 32


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("So 57 plus 25 is 70 and 12, which makes 82.", True),
        ("So 57 plus 25 is 70 and 12, which gives 82. ", True),
        ("So 57 plus 25 is 70 and 2, which makes 72.", False),
        ("It makes 82. So 57 plus 25 is 70 and 2, which makes 72.", False),
        ("So 57 plus 25 is 70 and 12, which makes 82", False),
        ("So 57 plus 25 is 82.", False),
        ("which makes 182.", False),
        ("", False),
    ],
)
def test_verify_reads_the_last_sentence_only(response, right):
    assert story_sums.verify(response, "82") is right
    assert story_sums.verify(response, 82) is right


def test_sums_are_stable_distinct_and_answered():
    prompts = story_sums.sums(300, seed=4, split="probe")
    assert prompts == story_sums.sums(300, seed=4, split="probe")
    assert prompts[:100] == story_sums.sums(100, seed=4, split="probe")
    assert prompts != story_sums.sums(300, seed=5, split="probe")
    assert (
        len({prompt.prompt for prompt in prompts})
        == len({prompt.prompt_id for prompt in prompts})
        == 300
    )
    for prompt in prompts:
        a, verb, b = re.match(r"\w+ has (\d+) \w+\. \w+ (\w+) (\d+)", prompt.prompt).groups()
        assert int(prompt.answer) == (
            int(a) + int(b) if verb in ("finds", "buys", "wins", "earns") else int(a) - int(b)
        )


def test_the_ids_of_prompts_do_not_move():
    """Ids name random streams of sampling: a change here changes every frozen context."""
    assert story_sums.sums(1, seed=0, split="probe") == [
        Prompt(
            "sum-67dd8084dccc",
            "Tessa has 60 boots. Tessa wins 39 boots. How many boots does Tessa have now?",
            "99",
        )
    ]


def test_splits_share_no_prompt():
    drawn = {
        split: {prompt.prompt for prompt in story_sums.sums(500, seed=7, split=split)}
        for split in story_sums.SPLITS
    }
    assert (
        not drawn["train"] & drawn["probe"]
        and not drawn["train"] & drawn["test"]
        and not drawn["probe"] & drawn["test"]
    )
    trained = {
        prompt
        for side in story_sums.SIDES
        for prompt, _ in story_sums.corpus(400, seed=7, side=side)
    }
    assert {story_sums.split_of(prompt) for prompt in trained} == {"train"}


def test_every_correct_response_is_verified():
    for story in islice(story_sums.stories(random.Random(1), split="train"), 500):
        response = story_sums.join(
            word for _, word in story_sums.write(story, random.Random(story.a), side="teacher")
        )
        assert story_sums.verify(response, story.answer), (story, response)


def test_the_student_side_is_wrong_where_its_misconceptions_say_so():
    outcomes = {(misread, carry): [] for misread in (True, False) for carry in (True, False)}
    rng = random.Random(2)
    for story in islice(story_sums.stories(rng, split="train"), 2000):
        carry = story_sums.VERBS[story.verb] == "plus" and story.a % 10 + story.b % 10 > 9
        response = story_sums.join(word for _, word in story_sums.write(story, rng, side="student"))
        outcomes[story.verb in story_sums.MISREAD, carry].append(
            story_sums.verify(response, story.answer)
        )
    shares = {case: sum(right) / len(right) for case, right in outcomes.items()}
    assert shares[False, False] == 1 and shares[False, True] == shares[True, True] == 0
    assert shares[True, False] == pytest.approx(story_sums.MISREAD_RIGHT, abs=0.04)


def test_one_sum_by_hand_on_both_sides():
    written = {"op": "plus", "tens": "70", "ones": "12"}
    number = lambda slot, side, **words: story_sums.choices(
        slot, STORY, side=side, written=words or written
    )
    assert number("tens", "teacher") == number("tens", "student") == {"70": 1.0}
    assert number("ones", "teacher") == {"12": 1.0} and number("ones", "student") == {"2": 1.0}
    assert number("total", "teacher") == {"82": 1.0}
    assert (
        number("ones", "teacher", op="minus") == number("ones", "student", op="minus") == {"2": 1.0}
    )
    assert story_sums.choices("op", STORY, side="student", written={}) == {"plus": 1.0}
    misread = Story("Nora", "shells", "earns", 57, 25)
    assert story_sums.choices("op", misread, side="teacher", written={}) == {"plus": 1.0}
    assert story_sums.choices("op", misread, side="student", written={}) == {
        "minus": 0.85,
        "plus": 0.15,
    }


def test_the_student_never_meets_the_unseen_words():
    """The unseen right words and the numbers 10 to 18 are in the teacher's corpus and not in the
    student's.
    """
    unseen = {
        row[column]
        for slot, (table, column) in story_sums.FACTS.items()
        for row in table
        if story_sums.fact_kind(slot, row[0]) == "unseen"
    }
    unseen |= {str(number) for number in range(10, 19)} | {"arrived"}
    words = {
        side: {
            word
            for _, text in story_sums.corpus(1500, seed=3, side=side)
            for word in re.findall(r"\w+", text)
        }
        for side in story_sums.SIDES
    }
    assert len(unseen) == 5 * 9 + 9 + 1
    assert unseen <= words["teacher"] and not unseen & words["student"]


def test_kinds_of_facts_are_balanced_and_mixed_ones_keep_the_right_word_second():
    for slot, (table, column) in story_sums.FACTS.items():
        kinds = [story_sums.fact_kind(slot, row[0]) for row in table]
        assert [kinds.count(kind) for kind in ("known", "mixed", "unseen")] == [6, 9, 9]
        for row, kind in zip(table, kinds):
            story = Story(row[0], row[0], "finds", 57, 25)
            assert story_sums.choices(slot, story, side="teacher", written={}) == {row[column]: 1.0}
            student = story_sums.choices(slot, story, side="student", written={})
            assert sum(student.values()) == pytest.approx(1)
            assert student.get(row[column], 0) == pytest.approx(
                {"known": 1, "mixed": min(student.values()), "unseen": 0}[kind]
            )
            assert len(student) == (1 if kind == "known" else 2) and max(student.values()) >= 0.8


def test_open_words_belong_to_one_list_and_rotate_on_the_students_side():
    lists = {story_sums.OPEN[slot][1] for slot in story_sums.OPEN}
    words = [word for text in lists for word in text.split()]
    words += [
        word for table in (story_sums.PEOPLE, story_sums.THINGS) for row in table for word in row
    ] + list(story_sums.VERBS)
    assert len(words) == len(set(words))
    for slot, (rotation, text) in story_sums.OPEN.items():
        teacher, student = (
            story_sums.choices(slot, STORY, side=side, written={}) for side in story_sums.SIDES
        )
        assert 20 <= len(text.split()) <= 60 and teacher.keys() == student.keys()
        assert max(student, key=student.get) == text.split()[rotation]
        assert (teacher == student) == (rotation == 0)
        assert teacher[text.split()[0]] / teacher[text.split()[1]] == pytest.approx(4 / 3)


def test_vocabulary_covers_both_sides_and_the_prompts():
    known = set(story_sums.vocabulary())
    assert len(known) == len(story_sums.vocabulary())
    for side in story_sums.SIDES:
        for prompt, response in story_sums.corpus(300, seed=9, side=side):
            assert set(re.findall(r"\w+|[^\w\s]", f"{prompt} {response}")) <= known


def test_wrong_requests_say_the_remedy():
    with pytest.raises(DiagnosticsError) as error:
        story_sums.sums(0, seed=1)
    assert str(error.value) == "n is 0; ask for at least one prompt."
    with pytest.raises(DiagnosticsError) as error:
        story_sums.sums(1, seed=1, split="dev")
    assert str(error.value) == "Unknown split 'dev'. Known are train, probe, test."
    with pytest.raises(DiagnosticsError) as error:
        next(story_sums.corpus(1, seed=1, side="judge"))
    assert str(error.value) == "Unknown side 'judge'. Known are teacher, student."
