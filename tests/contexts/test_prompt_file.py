"""The prompt file that the repository brings: what it holds and that its answers are right."""

import json
import re
from collections import Counter
from pathlib import Path

FILE = Path(__file__).parents[2] / "data" / "prompts.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text().splitlines()]

SPOKEN = {
    r"What is (\d+) plus (\d+)\?": lambda a, b: a + b,
    r"What is (\d+) minus (\d+)\?": lambda a, b: a - b,
    r"What is (\d+) times (\d+)\?": lambda a, b: a * b,
    r"What is (\d+) divided by (\d+)\?": lambda a, b: a / b,
    r"What is (\d+) percent of (\d+)\?": lambda a, b: a * b / 100,
    r"What is (\d+) to the power of (\d+)\?": lambda a, b: a**b,
    r"A number plus (\d+) is (\d+)\. What is the number\?": lambda a, b: b - a,
    r"A number divided by (\d+) is (\d+)\. What is the number\?": lambda a, b: a * b,
    r"How many days are there in (\d+) weeks\?": lambda a: 7 * a,
    r"Solve for x: x / (\d+) = (\d+)\.": lambda a, b: a * b,
}


def test_every_prompt_stands_once_and_names_its_domain():
    assert len(ROWS) >= 300
    assert len({row["prompt"] for row in ROWS}) == len(ROWS)
    assert set(Counter(row["domain"] for row in ROWS)) == {"math", "code", "instruction"}


def test_each_beginning_of_the_file_is_half_mathematics():
    """A study of the first n prompts has both halves, whatever n is."""
    for n in range(8, 240):
        share = sum(row["domain"] == "math" for row in ROWS[:n]) / n
        assert abs(share - 0.5) <= 1 / n, n


def test_answers_are_whole_numbers_and_belong_to_mathematics():
    answered = [row for row in ROWS if "answer" in row]
    assert len(answered) >= 100
    assert all(row["domain"] == "math" for row in answered)
    assert all(re.fullmatch(r"-?\d+", row["answer"]) for row in answered)


def test_answers_that_can_be_read_off_the_question_are_right():
    checked = 0
    for row in ROWS:
        for pattern, solve in SPOKEN.items():
            if found := re.fullmatch(pattern, row["prompt"]):
                assert solve(*map(int, found.groups())) == int(row["answer"]), row
                checked += 1
    assert checked >= 10
