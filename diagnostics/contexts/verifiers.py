"""Whether a response is right: what judges it, and what a file of rollouts says of it.

A context is right, wrong or not judged. Sampled responses are judged by a *verifier*, a function of
a response's text and a reference answer:

    auto               the task of a named pair (story sums for `embedded`); otherwise math-verify,
                       where it is installed and prompts carry answers
    sums, math, none   story sums; math-verify, for LaTeX and plain answers; nothing
    FILE.py:function   a function of one's own, also as module:function

A verifier of one's own returns true or false (or 1 and 0), or None where it cannot tell. Where it
raises an error the response is not judged, and is counted: an error of the verifier is no error of
the student. Only a function that the user names is run, never one that a manifest names.

Imported responses may come with a verdict: the column `correct` (true or false, 1 or 0), else
`reward`, else `score`, where all of its values are 0 and 1, or -1 and 1 (the larger is right).
Graded rewards have no threshold that fits all of them, so they say nothing here, and a warning says
so. A row without a verdict is judged by the verifier, against its `answer`, `gts` or `label`, or
against the answer of its prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.contexts.prompt_ids import cell_text
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.names import did_you_mean
from diagnostics.core.rows import missing
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    from diagnostics.core.types import Context

log = logging.getLogger("diagnostics")
Verify = Callable[[str, str], Any]
"""From a response and an answer to whether it is accepted; None where it cannot tell."""
VERIFIERS = ("auto", "sums", "math", "none")
"""Verifiers by name."""
OWN = "own"
"""What the settings of a manifest hold in place of the name of a user's function."""
VERIFIER_FLAG = {
    "help": (
        "what judges responses: auto, sums (story sums), math (math-verify), none, or a function of"
        " response and answer as FILE.py:function or module:function"
    )
}
"""Metadata of a setting `verifier`."""
STATED = ("correct", "reward", "score")
"""Columns of a file of rollouts that may say whether a response is right, the first first."""
ANSWERS = ("answer", "gts", "label")
"""Columns of a file of rollouts that may hold the reference answer."""
SIGNS = ({0, 1}, {-1, 1})
"""Values of a reward that is a verdict."""


def find_verifier(name: str, *, pair: str, prompts: Sequence[Prompt]) -> Verify | None:
    """Find the function that judges responses to held-out prompts.

    Args:
        name: One of VERIFIERS, or a function as FILE.py:function or module:function. `auto` means
            the task of a named pair (story sums for `embedded`); otherwise math-verify, where it is
            installed and prompts carry answers.
        pair: The pair's name.
        prompts: The held-out prompts.

    Returns:
        A function from a response and an answer to whether it is accepted, or None where nothing
        can be judged.

    Raises:
        DiagnosticsError: A verifier was asked for and is not available, or no prompt has an answer.
    """
    answered = sum(prompt.answer is not None for prompt in prompts)
    found = _find(name, pair, answered, of="held-out prompt")
    if found is None and name == "auto" and answered:
        log.warning(
            "%d held-out prompts have answers, and no verifier is available: accuracy is left out"
            " (%s)",
            answered,
            _remedy(prompt.answer for prompt in prompts),
        )
    return found


def _remedy(answers: Iterable[str | None]) -> str:
    """What would judge responses; for whole numbers, also the verifier of story sums."""
    known = [answer for answer in answers if answer is not None]
    sums = (
        "; or --verifier sums, where a response ends in “makes N.” or “gives N.”, as the embedded"
        " pair's do"
    )
    whole = all(re.fullmatch(r"\s*\d+\s*", answer) for answer in known)
    return "pip install math-verify" + (sums if whole else "")


def _find(name: str, pair: str, answered: int, *, of: str) -> Verify | None:
    """The verifier of a name, where `answered` prompts or rows have an answer."""
    if name == "none" or (name == "auto" and not answered):
        return None
    own = own_verifier(name)
    if not answered:
        raise DiagnosticsError(
            f"The verifier {name!r} was asked for, and no {of} has an answer. Add an"
            " `answer` column."
        )
    if own is not None:
        return own
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.named_pairs import NAMED_PAIRS

    named = NAMED_PAIRS.get(pair)
    task = TASKS.get((named.task if name == "auto" and named else name) or "")
    if task:
        return task.verify
    if name not in VERIFIERS:
        raise _unknown(name)
    if importlib.util.find_spec("math_verify"):
        return verify_math
    if name == "math":
        raise DiagnosticsError(
            "The verifier 'math' needs the package math-verify. Run `pip install math-verify`, or"
            " use --verifier none."
        )
    return None


def _unknown(name: str) -> DiagnosticsError:
    if name == OWN:
        return DiagnosticsError(
            "The manifest of this run says that a function of the user's own judged the responses,"
            " and a function is not run because a manifest names it. Name it again: --verifier"
            " FILE.py:function."
        )
    return DiagnosticsError(
        f"Unknown verifier {name!r}.{did_you_mean(name, VERIFIERS)} Known are"
        f" {', '.join(VERIFIERS)}, and a function of your own as FILE.py:function or"
        " module:function."
    )


def verify_math(response: str, answer: str) -> bool | None:
    """Whether math-verify finds the response's last expression equal to the answer.

    A response that is the answer, letter by letter, is right, although it may be no expression. One
    in which it finds no expression is wrong. What is no fault of the student's is no
    verdict: an answer that it cannot read gives None, as does one of words, which it reads as a
    product of letters in any order; a comparison that fails or takes too long raises.

    Args:
        response: The student's text; the minus sign of print counts as a minus.
        answer: The expected expression, plain or LaTeX, with or without dollars around it.

    Returns:
        True or False; None where the answer itself cannot be read, or is words.

    Raises:
        RuntimeError: It failed, took too long, or is not called in the main thread, where alone its
            limit of time works.
    """
    from math_verify import parse, verify

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "math-verify limits its time by a signal, which works in the main thread alone: judge"
            " responses there, or by --verifier FILE.py:function"
        )
    response, answer = (text.replace(PRINTED_MINUS, "-").strip() for text in (response, answer))
    if answer and response == answer:
        return True
    if IN_WORDS.fullmatch(answer):
        return None
    gold = parse(answer if "$" in answer or "\\" in answer else f"${answer}$")
    gold = gold or parse(f"${answer}$")  # LaTeX that nothing marks as such
    found = parse(response)
    if gold and found and verify(gold, found):
        return True
    if all(isinstance(each, str) for each in gold):  # no expression, or nothing at all
        return None
    if found:
        _unless_failed(lambda: verify(gold, found, raise_on_error=True))
    else:
        _unless_late(lambda: parse(response, raise_on_error=True))
    return False


IN_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+([\s'.,-]+[^\W\d_]+)*\.?")
"""An answer of words alone, at least one of three letters or more."""
PRINTED_MINUS = "\u2212"
"""The minus sign, which math-verify does not read."""


def _unless_late(read: Callable[[], Any]) -> None:
    """Raise where an empty reading of a response came of the limit of time; what cannot be read for
    another reason is the student's.
    """
    try:
        read()
    except Exception:  # a text that is no expression
        return
    except BaseException as error:
        raise _late(error) from error


def _unless_failed(compare: Callable[[], Any]) -> None:
    """Raise where a "no" is no comparison, but an error or the limit of time."""
    try:
        compare()
    except Exception as error:
        raise RuntimeError(f"math-verify failed ({type(error).__name__}: {error})") from error
    except BaseException as error:
        raise _late(error) from error


def _late(error: BaseException) -> BaseException:
    """What is raised for math-verify's own error for its limit of time, which derives from
    BaseException; any other such error stays as it is.
    """
    is_own = type(error).__name__ == "TimeoutException"
    return RuntimeError("math-verify took too long") if is_own else error


# --- a function of one's own


def own_verifier(name: str) -> Verify | None:
    """The function that FILE.py:function or module:function names; None for another form.

    Raises:
        DiagnosticsError: There is no such file, module or function, or it cannot be run.
    """
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function.isidentifier():
        return None
    module = _module(source)
    found = getattr(module, function, None)
    if not callable(found):
        raise DiagnosticsError(
            f"{source} has no function {function!r}.{did_you_mean(function, dir(module))} Name one"
            " that takes a response and an answer."
        )
    return found


def _module(source: str) -> Any:
    """The file or module that a verifier lies in, run once."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).absolute()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        label = f"verifier_{path.stem}_{digest}"
        spec = importlib.util.spec_from_loader(label, SourceFileLoader(label, str(path)))
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module
    except DiagnosticsError:
        raise
    except Exception as error:
        raise DiagnosticsError(
            f"The verifier's {source} cannot be run ({type(error).__name__}: {error}). Name a file"
            " FILE.py:function, or a module that Python finds."
        ) from error


def recorded_verifier(name: str) -> dict[str, str]:
    """What a manifest records of a verifier: its name, and the hash of a function's file.

    Args:
        name: The verifier's name, or the user's function.

    Returns:
        The setting `verifier`; for a user's function `own` with `verifier_function` (without the
        file's folder) and, where its source is a file, `verifier_sha256`.

    Raises:
        DiagnosticsError: As `own_verifier`.
    """
    function = own_verifier(name)
    if function is None:
        return {"verifier": name}
    source, _, last = name.rpartition(":")
    shown = f"{Path(source).name if source.endswith('.py') else source}:{last}"
    try:
        file = Path(source) if source.endswith(".py") else Path(inspect.getfile(function))
        digest = {"verifier_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    except (TypeError, OSError):  # a function of the interpreter has no file
        digest = {}
    return {"verifier": OWN, "verifier_function": shown, **digest}


# --- what is judged


def judge_rollouts(
    bank: Bank, prompts: Sequence[Prompt], verifier: str, *, pair: str
) -> tuple[Bank, dict[str, Any]]:
    """Judge the responses of a bank against the answers of its prompts.

    Args:
        bank: The frozen contexts.
        prompts: Their prompts.
        verifier: As `find_verifier`.
        pair: The pair's name.

    Returns:
        The bank with `correct`, and the counts of `judge`, which are empty without a verifier.

    Raises:
        DiagnosticsError: A verifier was asked for and is not available, or no prompt has an answer.
    """
    by_prompt = {prompt.prompt_id: prompt.answer for prompt in prompts}
    answers = {context.context_id: by_prompt.get(context.prompt_id) for context in bank}
    return _judged(bank, answers, verifier, pair=pair, of="prompt")


def judge_imported(
    bank: Bank,
    frame: pd.DataFrame,
    rows: Mapping[str, int],
    prompts: Sequence[Prompt],
    verifier: str,
    *,
    pair: str,
    where: str,
) -> tuple[Bank, dict[str, Any]]:
    """Take over what a file says of its responses, and judge the others.

    Args:
        bank: The frozen contexts.
        frame: The file's rows.
        rows: By context id, the number of its row in the file.
        prompts: The prompts that the rollouts came from, with their answers.
        verifier: As `find_verifier`.
        pair: The pair's name.
        where: Name of the file, for messages.

    Returns:
        The bank with `correct`, and the counts of `judge` with `stated_by`, the column that said
        it.

    Raises:
        DiagnosticsError: The column `correct` holds something else; and as `judge_rollouts`.
    """
    column, said = stated(frame, where)
    found = [said[rows[context.context_id]] for context in bank]
    bank = _with(bank, found)
    by_prompt = {prompt.prompt_id: prompt.answer for prompt in prompts}
    named = [name for name in ANSWERS if name in frame]
    answers = {
        context.context_id: _answer(frame, named, rows[context.context_id], where)
        or by_prompt.get(context.prompt_id)
        for context in bank
    }
    bank, counts = _judged(bank, answers, verifier, pair=pair, of="row or prompt")
    return bank, counts | ({"stated_by": column} if column else {})


def _answer(frame: pd.DataFrame, named: Sequence[str], row: int, where: str) -> str | None:
    cells = (cell_text(frame[name].iloc[row], f"{where}, row {row + 1}") for name in named)
    return next((cell for cell in cells if cell is not None), None)


def _judged(
    bank: Bank, answers: Mapping[str, str | None], verifier: str, *, pair: str, of: str
) -> tuple[Bank, dict[str, Any]]:
    left = [context for context in bank if context.correct is None]
    answered = sum(answers.get(context.context_id) is not None for context in left)
    verify = _find(verifier, pair, answered, of=of) if left else None
    if verify is None:
        if answered and verifier == "auto":
            log.info(
                "%d responses have an answer, and no verifier is available: they are not judged"
                " (%s)",
                answered,
                _remedy(answers.get(context.context_id) for context in left),
            )
        counts = _counts(bank) if any(c.correct is not None for c in bank) else {}
    else:
        bank, counts = judge(bank, answers, verify)
    if counts:
        log.info("%d responses are right, %d wrong", counts["right"], counts["wrong"])
    return bank, counts


def judge(
    bank: Bank, answers: Mapping[str, str | None], verify: Verify
) -> tuple[Bank, dict[str, Any]]:
    """Judge the contexts that are not judged yet.

    Args:
        bank: The frozen contexts.
        answers: By context id, the reference answer.
        verify: From a response and an answer to whether it is accepted.

    Returns:
        The bank with `correct`, and counts: right, wrong, without_answer, undecided (the verifier
        said None), failed (it raised an error) and first_failure, the first such error.

    Raises:
        DiagnosticsError: The verifier returns something else than true, false or None.
    """
    found, counts = [], {"without_answer": 0, "undecided": 0, "failed": 0}
    first = ""
    for context in bank:
        answer, verdict = answers.get(context.context_id), context.correct
        if verdict is None and answer is None:
            counts["without_answer"] += 1
        elif verdict is None:
            try:
                verdict = _verdict(verify(context.response, str(answer)), context)
                counts["undecided"] += verdict is None
            except DiagnosticsError:
                raise
            except Exception as error:
                counts["failed"] += 1
                first = first or f"{type(error).__name__}: {error}"[:200]
        found.append(verdict)
    if counts["failed"]:
        log.warning(
            "the verifier failed on %d responses, which are not judged (the first: %s)",
            counts["failed"],
            first,
        )
    bank = _with(bank, found)
    return bank, _counts(bank) | counts | ({"first_failure": first} if first else {})


def _counts(bank: Bank) -> dict[str, Any]:
    verdicts = [context.correct for context in bank]
    return {"right": verdicts.count(True), "wrong": verdicts.count(False)}


def _with(bank: Bank, verdicts: Sequence[bool | None]) -> Bank:
    return Bank(
        tuple(
            dataclasses.replace(context, correct=verdict)
            for context, verdict in zip(bank, verdicts, strict=True)
        )
    )


def _verdict(value: Any, context: Context) -> bool | None:
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None:
        return None
    if isinstance(plain, bool | int | float) and plain in (0, 1):
        return bool(plain)
    raise DiagnosticsError(
        f"The verifier returned {str(value)[:60]!r} for {context.context_id!r}. Return true or"
        " false, or None where it cannot tell."
    )


# --- what a file says


def stated(frame: pd.DataFrame, where: str) -> tuple[str | None, list[bool | None]]:
    """Whether each row of a file of rollouts says that its response is right.

    Args:
        frame: The file's rows.
        where: Name of the file, for messages.

    Returns:
        The column that says it, None where no column does; and a verdict per row, None where it has
        none.

    Raises:
        DiagnosticsError: The column `correct` holds something else than true and false.
    """
    for name in STATED:
        values = list(frame[name]) if name in frame else []
        if all(map(missing, values)):
            continue
        if name == "correct":
            return name, [_truth(value, f"{where}, row {i}") for i, value in enumerate(values, 1)]
        numbers = [None if missing(value) else _number(value) for value in values]
        said = {number for number in numbers if number is not None}
        if any(said <= signs for signs in SIGNS):
            return name, [None if number is None else number > 0 for number in numbers]
        log.warning(
            "%s: the column %s is graded (%s), and what of it is right is not known: it judges"
            " nothing. Add a column `correct`",
            where,
            name,
            ", ".join(str(value)[:20] for value in list(dict.fromkeys(map(str, values)))[:3]),
        )
    return None, [None] * len(frame)


def _number(value: Any) -> float:
    """A reward as a number; NaN, which is no verdict, for anything else."""
    plain = value.item() if isinstance(value, np.generic) else value
    return float(plain) if isinstance(plain, bool | int | float) else np.nan


WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _truth(value: Any, where: str) -> bool | None:
    if missing(value):
        return None
    found = WORDS.get(str(value).strip().lower())
    if found is None:
        raise DiagnosticsError(
            f"{where}: correct should be true or false; found {str(value)[:60]!r}. Fix that row, or"
            " leave it empty where it is not known."
        )
    return found
