"""What judges a response, what a file says of it, and what of either is counted."""

import hashlib
import importlib.util
import sys
import threading
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts import verifiers
from diagnostics.contexts.import_rollouts import freeze_rollouts, read_rollouts
from diagnostics.contexts.rollouts import rollout
from diagnostics.contexts.story_sums import sums, verify
from diagnostics.contexts.verifiers import (
    judge,
    judge_rollouts,
    own_verifier,
    recorded_verifier,
    stated,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank, Prompt, read_bank
from diagnostics.probing.scores import score
from tests.conftest import make_bank, make_prompts
from tests.contexts.factories import jsonl


def answers_of(bank, answer="5"):
    return {context.context_id: answer for context in bank}


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "judge_mine.py"
    path.write_text("def right(response, answer):\n    return answer in response\nnumber = 7\n")
    return path


def test_the_four_verdicts_are_told_apart():
    bank = make_bank([1, 1, 1, 1, 1])
    given = {bank[i].context_id: str(i) for i in range(4)}

    def failing(response, answer):
        if answer == "3":
            raise ValueError("no number in the answer")
        return {"0": True, "1": np.False_, "2": None}[answer]

    found, counts = judge(bank, given, failing)
    assert [context.correct for context in found] == [True, False, None, None, None]
    assert counts == {
        "right": 1,
        "wrong": 1,
        "without_answer": 1,
        "undecided": 1,
        "failed": 1,
        "first_failure": "ValueError: no number in the answer",
    }


def test_an_error_of_the_verifier_is_warned_of_and_never_a_wrong_response(caplog):
    bank = make_bank([2, 2])

    def broken(response, answer):
        raise RuntimeError("out of order")

    found, counts = judge(bank, answers_of(bank), broken)
    assert counts["failed"] == 2 and counts["wrong"] == 0
    assert [context.correct for context in found] == [None, None]
    assert caplog.messages == [
        "the verifier failed on 2 responses, which are not judged (the first: RuntimeError: out of"
        " order)"
    ]


@pytest.mark.parametrize("value", [0.5, "yes", [True]])
def test_a_verifier_that_returns_no_verdict_is_refused(value):
    bank = make_bank([1])
    with pytest.raises(DiagnosticsError) as caught:
        judge(bank, answers_of(bank), lambda response, answer: value)
    assert str(caught.value) == (
        f"The verifier returned {str(value)!r} for {bank[0].context_id!r}. Return true or false, or"
        " None where it cannot tell."
    )


def test_what_is_judged_already_stays():
    bank = make_bank([1, 1])
    bank = Bank((replace(bank[0], correct=True), bank[1]))
    found, counts = judge(bank, answers_of(bank), lambda response, answer: False)
    assert [context.correct for context in found] == [True, False]
    assert (counts["right"], counts["wrong"]) == (1, 1)


def test_story_sums_are_judged_when_they_are_sampled(pair):
    """The verifier sees the response's text and its prompt's own answer."""
    prompts = [Prompt(f"p{i}", p.prompt, str(i)) for i, p in enumerate(make_prompts(4))]
    seen = []

    def verifier(response, answer):
        seen.append((response, answer))
        return answer == "2"

    bank = rollout(pair, prompts, max_new_tokens=3, verifier="none", samples_per_prompt=2)
    assert all(context.correct is None for context in bank)
    judged, _ = judge(
        bank, {c.context_id: prompts[int(c.prompt_id[1])].answer for c in bank}, verifier
    )
    assert [context.correct for context in judged] == [False] * 4 + [True] * 2 + [False] * 2
    assert seen == [(c.response, c.prompt_id[1]) for c in bank]
    named, facts = judge_rollouts(bank, prompts, "auto", pair="embedded")
    assert facts["wrong"] == 8, "the embedded pair's task judges where nothing else is asked for"
    assert [c.correct for c in named] == [verify(c.response, "0") for c in bank]
    assert judge_rollouts(bank, make_prompts(4), "auto", pair="embedded") == (bank, {})


def test_the_reference_solution_is_right_and_another_number_is_not():
    prompt = sums(1, seed=0)[0]
    bank = make_bank([1, 1])
    bank = Bank(
        tuple(
            replace(context, prompt_id=prompt.prompt_id, response=f"That makes {number}.")
            for context, number in zip(bank, (prompt.answer, int(prompt.answer) + 1))
        )
    )
    found, _ = judge_rollouts(bank, [prompt], "sums", pair="whatever")
    assert [context.correct for context in found] == [True, False]


def test_without_an_answer_a_verifier_that_was_asked_for_is_refused():
    bank = make_bank([1])
    with pytest.raises(DiagnosticsError) as caught:
        judge_rollouts(bank, make_prompts(1), "sums", pair="embedded")
    assert str(caught.value) == (
        "The verifier 'sums' was asked for, and no prompt has an answer. Add an `answer` column."
    )


def test_math_verify_is_used_where_it_is_installed_and_missed_in_words(monkeypatch, caplog):
    caplog.set_level("INFO")
    bank = make_bank([1])
    prompts = [Prompt(bank[0].prompt_id, "w1", "$\\frac12$")]
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)
    assert judge_rollouts(bank, prompts, "auto", pair="x") == (bank, {})
    assert caplog.messages == [
        "1 responses have an answer, and no verifier is available: they are not judged (pip install"
        " math-verify)"
    ]
    caplog.clear()
    whole = [Prompt(bank[0].prompt_id, "w1", "42")]
    judge_rollouts(bank, whole, "auto", pair="x")
    assert caplog.messages[0].endswith(
        "(pip install math-verify; or --verifier sums, where a response ends in “makes N.” or"
        " “gives N.”, as the embedded pair's do)"
    )
    with pytest.raises(DiagnosticsError, match="needs the package math-verify"):
        judge_rollouts(bank, prompts, "math", pair="x")
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(verifiers, "verify_math", lambda response, answer: answer == "$\\frac12$")
    assert judge_rollouts(bank, prompts, "auto", pair="x")[0][0].correct is True


needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@needs_math_verify
@pytest.mark.parametrize(
    "response, answer, expected",
    [
        ("The answer is 42.", "42", True),
        ("so $\\boxed{\\frac{1}{2}}$", "0.5", True),
        ("\\boxed{1/2}", "\\frac{1}{2}", True),
        ("$\\sqrt{2}$", "\\sqrt2", True),  # LaTeX without dollars
        ("it is $\\pi$", "\\pi", True),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("the answer is \u22123", "-3", True),
        ("1,234 of them", "1234", True),
        ("4 + 14 = 18", "She has 4+14.\n#### 18", True),
        ("The answer is 41.", "42", False),
        ("no idea", "4", False),
        ("", "4", False),
        ("\\frac{{{", "4", False),
        ("\\text{Paris}", "\\text{Paris}", True),
        ("(1, 2)", "(1, 2)", True),
    ],
)
def test_the_real_math_verify(response, answer, expected):
    assert verifiers.verify_math(response, answer) is expected


@needs_math_verify
def test_the_real_math_verify_judges_a_bank(caplog):
    bank = make_bank([1, 1, 1])
    answers = {bank[0].context_id: bank[0].response, bank[1].context_id: "???"}
    found, counts = verifiers.judge(bank, answers, verifiers.verify_math)
    assert (counts["undecided"], counts["without_answer"], counts["failed"]) == (1, 1, 0)
    assert found[1].correct is None and found[2].correct is None


def _stand_in(monkeypatch, *, found=("x",), equal=False, error=None):
    """A math-verify that gives these readings of a response, and fails where it is asked to say."""

    def say(value, raising):
        if raising and error is not None:
            raise error
        return value

    def parse(text, raise_on_error=False):
        return [4] if text == "$4$" else say(list(found), raise_on_error)

    def verify(gold, target, raise_on_error=False):
        return say(equal, raise_on_error)

    stub = types.SimpleNamespace(parse=parse, verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", stub)


class TimeoutException(BaseException):
    """As math-verify's own is called and derived."""


def test_what_takes_too_long_is_no_verdict(monkeypatch):
    for found in (("x",), ()):
        _stand_in(monkeypatch, found=found, error=TimeoutException())
        with pytest.raises(RuntimeError, match="took too long"):
            verifiers.verify_math("long", "4")


def test_a_comparison_that_fails_is_no_verdict_and_a_text_that_is_none_is_wrong(monkeypatch):
    _stand_in(monkeypatch, error=TypeError("no order"))
    with pytest.raises(RuntimeError, match=r"math-verify failed \(TypeError: no order"):
        verifiers.verify_math("x", "4")
    _stand_in(monkeypatch, found=(), error=TypeError("no number"))
    assert verifiers.verify_math("x", "4") is False
    _stand_in(monkeypatch, equal=True, error=TypeError("of another form"))
    assert verifiers.verify_math("x", "4") is True


@pytest.mark.parametrize("answer", ["Paris", "New York", "Evelyn.", "yes"])
def test_an_answer_of_words_is_not_judged_as_a_product_of_its_letters(monkeypatch, answer):
    _stand_in(monkeypatch, equal=True)
    assert verifiers.verify_math(answer[::-1], answer) is None
    assert verifiers.verify_math(answer, answer) is True


@pytest.mark.parametrize("answer", ["x+y", "xy", "3 apples", r"\sin x", "12", "B"])
def test_an_answer_that_is_more_than_words_goes_to_math_verify(monkeypatch, answer):
    _stand_in(monkeypatch, equal=True)
    assert verifiers.verify_math("another text", answer) is True


def test_an_interrupt_is_never_taken_for_its_limit_of_time(monkeypatch):
    _stand_in(monkeypatch, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        verifiers.verify_math("x", "4")


def test_in_another_thread_nothing_is_judged_and_it_says_why(monkeypatch, caplog):
    _stand_in(monkeypatch, equal=True)
    bank, answers = make_bank([1]), {}
    answers[bank[0].context_id] = "4"
    found = []
    work = threading.Thread(
        target=lambda: found.append(verifiers.judge(bank, answers, verifiers.verify_math))
    )
    work.start()
    work.join()
    (judged, counts) = found[0]
    assert judged[0].correct is None and counts["failed"] == 1
    assert "main thread alone" in counts["first_failure"]


# --- a function of one's own


def test_a_function_in_a_file_judges(own):
    name = f"{own}:right"
    assert own_verifier(name)("it is 5", "5") is True
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    assert recorded_verifier(name) == {
        "verifier": "own",
        "verifier_function": "judge_mine.py:right",
        "verifier_sha256": digest,
    }
    assert recorded_verifier("auto") == {"verifier": "auto"}


def test_a_function_of_a_module_judges(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    monkeypatch.delitem(sys.modules, "judge_mine", raising=False)
    assert own_verifier("judge_mine:right")("it is 5", "6") is False
    found = recorded_verifier("judge_mine:right")
    assert found["verifier_function"] == "judge_mine:right"
    assert found["verifier_sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


def test_a_file_that_has_changed_is_read_again(own):
    assert own_verifier(f"{own}:right")("5", "6") is False
    own.write_text("def right(response, answer):\n    return True\n")
    assert own_verifier(f"{own}:right")("5", "6") is True


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("{}:rigth", "{} has no function 'rigth'. Did you mean 'right'? Name one that takes a"),
        ("{}:number", "{} has no function 'number'."),
        ("{}.py:right", "The verifier's {}.py cannot be run (FileNotFoundError: "),
        ("no_such_module:right", "The verifier's no_such_module cannot be run (ModuleNotFound"),
    ],
)
def test_a_function_that_is_not_there_is_refused(own, name, sentence):
    with pytest.raises(DiagnosticsError) as caught:
        own_verifier(name.format(own))
    assert str(caught.value).startswith(sentence.format(own))


def test_unknown_names_and_the_own_of_a_manifest_are_refused():
    bank = make_bank([1])
    prompts = [Prompt(bank[0].prompt_id, "w1", "5")]
    with pytest.raises(DiagnosticsError, match=r"^Unknown verifier 'sum'\. Did you mean 'sums'\?"):
        judge_rollouts(bank, prompts, "sum", pair="x")
    with pytest.raises(
        DiagnosticsError, match=r"a function is not run because a manifest names it\. Name it again"
    ):
        judge_rollouts(bank, prompts, "own", pair="x")


# --- what a file says


@pytest.mark.parametrize(
    "columns, column, verdicts",
    [
        ({"correct": [True, False, None]}, "correct", [True, False, None]),
        ({"correct": ["true", " FALSE", "1"]}, "correct", [True, False, True]),
        ({"correct": [1, 0, float("nan")]}, "correct", [True, False, None]),
        ({"reward": [1.0, 0.0, 1.0]}, "reward", [True, False, True]),
        ({"reward": [-1, 1, None]}, "reward", [False, True, None]),
        ({"score": [True, False, False]}, "score", [True, False, False]),
        ({"correct": [None] * 3, "score": [0, 1, 1]}, "score", [False, True, True]),
        ({"reward": [0.3, 1.0, 0.0], "score": [0, 1, 1]}, "score", [False, True, True]),
        ({"reward": [{"a": 1}, 1, 0]}, None, [None] * 3),
        ({"reward": [0.0, 1.0, -1.0]}, None, [None] * 3),
        ({"other": [1, 0, 1]}, None, [None] * 3),
    ],
)
def test_what_a_file_says_of_its_responses(columns, column, verdicts):
    assert stated(pd.DataFrame(columns, dtype=object), "r") == (column, verdicts)


def test_a_graded_reward_says_nothing_and_is_named(caplog):
    stated(pd.DataFrame({"reward": [0.25, 0.5, 1.0]}), "r.jsonl")
    assert caplog.messages == [
        "r.jsonl: the column reward is graded (0.25, 0.5, 1.0), and what of it is right is not"
        " known: it judges nothing. Add a column `correct`"
    ]


def test_another_word_in_the_column_correct_is_refused_with_its_row():
    with pytest.raises(DiagnosticsError) as caught:
        stated(pd.DataFrame({"correct": ["true", "maybe"]}), "r.jsonl")
    assert str(caught.value) == (
        "r.jsonl, row 2: correct should be true or false; found 'maybe'. Fix that row, or leave it"
        " empty where it is not known."
    )


def test_imported_rows_keep_their_verdict_where_others_are_left_out(pair, tmp_path):
    """The second row has no response token and is left out; the third keeps its own verdict."""
    rows = (
        {"prompt": "w1", "response": "w2", "correct": True},
        {"prompt": "w1", "response_ids": [], "correct": True},
        {"prompt": "w3", "response": "w4", "correct": False},
        {"prompt": "w5", "response": "w6"},
    )
    bank, counts = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", *rows))
    assert [context.correct for context in bank] == [True, False, None]
    assert counts["correct"] == {"right": 1, "wrong": 1, "stated_by": "correct"}


def test_rows_without_a_verdict_are_judged_by_their_answer(pair, tmp_path, own):
    rows = (
        {"prompt": "w1", "response": "w2", "answer": "w2"},
        {"prompt": "w1", "response": "w2", "answer": "w3"},
        {"prompt": "w1", "response": "w2", "answer": "w3", "correct": True},
        {"prompt": "w1", "response": "w2"},
    )
    path = jsonl(tmp_path / "r.jsonl", *rows)
    bank, counts = freeze_rollouts(pair, path, verifier=f"{own}:right")
    assert [context.correct for context in bank] == [True, False, True, None]
    assert counts["correct"] == {
        "right": 2,
        "wrong": 1,
        "without_answer": 1,
        "undecided": 0,
        "failed": 0,
        "stated_by": "correct",
    }
    named = [Prompt("p", "w1", "w2")]
    bare = jsonl(tmp_path / "s.jsonl", {"prompt": "w1", "response": "w2", "prompt_id": "p"})
    found = read_rollouts(pair, bare, prompts=named, verifier=f"{own}:right")
    assert found[0].correct is True


# --- from contexts to the token table


def test_the_verdict_survives_the_file_and_reaches_every_position(pair, tmp_path):
    bank = make_bank([2, 3, 1])
    bank = Bank(
        tuple(replace(c, correct=v) for c, v in zip(bank, (True, False, None), strict=True))
    )
    write_parquet(tmp_path / "contexts.parquet", bank.to_frame())
    again = read_bank(tmp_path / "contexts.parquet")
    assert again == bank
    tokens = score(pair, again)
    assert tokens.correct.dtype == np.float64
    assert tokens.correct.tolist()[:5] == [1, 1, 0, 0, 0] and np.isnan(tokens.correct[5])


def test_a_bank_that_was_not_judged_has_no_such_column(pair):
    bank = make_bank([2])
    assert "correct" not in bank.to_frame() and "correct" not in score(pair, bank)


def test_another_value_in_contexts_is_refused():
    frame = make_bank([1]).to_frame().assign(correct="perhaps")
    with pytest.raises(DiagnosticsError) as caught:
        Bank.from_frame(frame)
    assert str(caught.value) == (
        "A context is correct or not: true or false; found 'perhaps'. Fix the table's column"
        " correct."
    )
