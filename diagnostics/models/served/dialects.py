"""What each kind of server is asked for a context, and how its answer is read.

    dialect   question                                    where the lists are
    vllm      POST completions: prompt as ids,            choices[0].prompt_logprobs: per token of
              prompt_logprobs K, max_tokens 1             the sequence {id: {logprob, …}}
    sglang    POST /generate: input_ids, return_logprob,  meta_info.input_token_logprobs and
              logprob_start_len, top_logprobs_num K       input_top_logprobs: [logprob, id, text]
    openai    POST completions: prompt as ids, echo,      choices[0].logprobs: tokens,
              logprobs K, max_tokens 1                    token_logprobs, top_logprobs

The temperature is 1 and the ids are the context's own, so that no template and no encoding comes
between. Every answer is checked against the response: as many places, and the response's own token
at each. A server that says what it thinks of texts alone (openai) is read only where each text is
one token of the student's tokenizer and no other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Context
from diagnostics.models.served.connection import PassingFault
from diagnostics.models.served.spelling import Spelling

TOKEN_ID = re.compile(r"token_id:(\d{1,9})")
"""A token's text where a server writes its id in place of it."""


@dataclass
class Answer:
    """The lists of one context, in the order of its response."""

    ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    """Natural logarithms; the sampled token is appended where it is not among the likeliest."""
    texts: list[tuple[int, str]] = field(default_factory=list)
    """Ids with the texts that the server gives them."""

    def add(self, listed: dict[int, Any], where: str) -> None:
        """Add the list of the next position."""
        values = [_number(value, where) for value in listed.values()]
        self.ids.append(list(listed))
        self.logprobs.append(values)


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked and read."""

    path: Callable[[str], str]
    """Path of a question, from the path of the server's interface."""
    question: Callable[[Context, int, str], dict[str, Any]]
    """The question about a context, for lists of K tokens, to a model of that name."""
    read: Callable[[Any, Context, Spelling], Answer]
    """Reads an answer; it raises PassingFault for a half one."""


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise DiagnosticsError(
            f"{where}: the server gives {str(value)[:40]!r} in place of a log-probability. Its"
            " model overflows in its dtype, or it is no language model; mend the server."
        )
    return float(value)


def _place(context: Context, position: int) -> str:
    return f"context {context.context_id!r}, response token {position}"


def _half(what: str) -> PassingFault:
    return PassingFault(f"an answer that lacks {what}")


def _part(value: Any, *keys: str | int) -> Any:
    """A part of an answer; None where it is not there."""
    for key in keys:
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and len(value) > key else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _listed(value: Any, length: int, what: str) -> list:
    """A list of an answer, of at least that length.

    A list that is too short is a half answer; one that is not there is another dialect.
    """
    if not isinstance(value, list):
        raise _half(what)
    if len(value) < length:
        raise _half(f"{length - len(value)} of {length} places in {what}")
    return value


def _other_tokens(context: Context, position: int, found: Any) -> DiagnosticsError:
    return DiagnosticsError(
        f"The server scored another token than the run holds at {_place(context, position)}:"
        f" {str(found)[:40]!r} in place of {context.response_ids[position]}. Its tokenizer is not"
        " the student's, or it does not take ids; name another server."
    )


def _head(context: Context) -> int:
    """Tokens before the response, of which there must be one: nothing predicts the first."""
    head = len(context.teacher_ids) - len(context.response_ids)
    if head < 1:
        raise DiagnosticsError(
            f"Context {context.context_id!r} has no prompt, and a server predicts no first token."
            " Leave it out, or give the prompt a start token."
        )
    return head


# --- vLLM


def _completions(base: str) -> str:
    return f"{base}/completions"


def _ask_vllm(context: Context, k: int, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(context.teacher_ids),
        "prompt_logprobs": k,
        "max_tokens": 1,
        "temperature": 1.0,
    }


def _read_vllm(said: Any, context: Context, spelling: Spelling) -> Answer:
    first, length = _head(context), len(context.teacher_ids)
    found = _part(said, "choices", 0, "prompt_logprobs")
    places = _listed(found, length, "prompt_logprobs")
    if len(places) != length:
        raise DiagnosticsError(
            f"The server gives {len(places)} places for the {length} tokens of context"
            f" {context.context_id!r}. It encodes the ids anew, or adds tokens; name a vLLM server"
            " that takes ids."
        )
    answer = Answer()
    for position, token in enumerate(context.response_ids):
        place = places[first + position]
        if not isinstance(place, dict) or not place:
            raise _half(f"the list of response token {position}")
        ids = [_id(key, context, position) for key in place]
        if token not in ids:
            raise _other_tokens(context, position, ids[:3])
        entries = list(place.values())
        answer.add(
            {i: _part(entry, "logprob") for i, entry in zip(ids, entries)},
            _place(context, position),
        )
        answer.texts += [
            (i, text)
            for i, entry in zip(ids, entries)
            if isinstance(text := _part(entry, "decoded_token"), str)
        ]
    return answer


def _id(value: Any, context: Context, position: int) -> int:
    """A token id of an answer, as a number or as the key of a JSON object."""
    text = str(value)
    if isinstance(value, bool | float) or not text.isdecimal() or len(text) > 9:
        raise _other_tokens(context, position, value)
    return int(text)


# --- SGLang


def _ask_sglang(context: Context, k: int, model: str) -> dict[str, Any]:
    return {
        "input_ids": list(context.teacher_ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": _head(context) - 1,
        "top_logprobs_num": k,
        "return_text_in_logprobs": True,
    }


def _read_sglang(said: Any, context: Context, spelling: Spelling) -> Answer:
    said = said[0] if isinstance(said, list) and len(said) == 1 else said
    length = len(context.response_ids)
    parts = [
        _listed(_part(said, "meta_info", name), length, name)[-length:]
        for name in ("input_token_logprobs", "input_top_logprobs")
    ]
    answer = Answer()
    for position, (own, top) in enumerate(zip(*parts)):
        token = context.response_ids[position]
        entries = [*(top if isinstance(top, list) else ()), own]
        if len(entries) < 2 or not all(isinstance(e, list) and len(e) >= 2 for e in entries):
            raise _half(f"the list of response token {position}")
        if own[1] != token:
            raise _other_tokens(context, position, own[1])
        ids = [_id(entry[1], context, position) for entry in entries]
        listed: dict[int, Any] = {}
        for i, entry in zip(ids, entries):  # the response's own token is the last
            listed.setdefault(i, entry[0])
        answer.add(listed, _place(context, position))
        answer.texts += [
            (i, entry[2])
            for i, entry in zip(ids, entries)
            if len(entry) > 2 and isinstance(entry[2], str)
        ]
    return answer


# --- OpenAI's completions


def _ask_openai(context: Context, k: int, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(context.teacher_ids),
        "echo": True,
        "logprobs": k,
        "max_tokens": 1,
        "temperature": 1.0,
    }


def _read_openai(said: Any, context: Context, spelling: Spelling) -> Answer:
    first, length = _head(context), len(context.teacher_ids)
    lists = _part(said, "choices", 0, "logprobs")
    tokens, own, tops = (
        _listed(_part(lists, name), length, name)
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    answer = Answer()
    for position, token in enumerate(context.response_ids):
        text, top = tokens[first + position], tops[first + position]
        if not isinstance(top, dict) or not top:
            raise _half(f"the list of response token {position}")
        if not isinstance(text, str) or not _spells(text, token, spelling):
            raise _other_tokens(context, position, text)
        where = _place(context, position)
        listed = {_id_of(each, spelling, where): value for each, value in top.items()}
        if len(listed) != len(top):
            raise DiagnosticsError(
                f"{where}: two texts of the server's list are the same token. Its tokenizer is not"
                " the student's."
            )
        answer.add(listed | ({token: own[first + position]} if token not in listed else {}), where)
    return answer


def _spells(text: str, token: int, spelling: Spelling) -> bool:
    """Whether a text is that of a token, as far as a text can tell."""
    stated = TOKEN_ID.fullmatch(text)
    return int(stated[1]) == token if stated else spelling.differs(token, text) is not True


def _id_of(text: str, spelling: Spelling, where: str) -> int:
    stated = TOKEN_ID.fullmatch(text)
    if stated:
        return int(stated[1])
    ids: Sequence[int] = spelling.ids_of(text)
    if len(ids) == 1:
        return ids[0]
    raise DiagnosticsError(
        f"{where}: the server lists {text[:40]!r}, which is"
        f" {'no token' if not ids else f'{len(ids)} tokens'} of the student's tokenizer, so that"
        " its id cannot be known with certainty. Use a server that gives ids: vLLM or SGLang"
        " (--dialect), or `return_tokens_as_token_ids` of the server."
    )


DIALECTS = {
    "vllm": Dialect(_completions, _ask_vllm, _read_vllm),
    "sglang": Dialect(
        lambda base: f"{base.removesuffix('/v1')}/generate", _ask_sglang, _read_sglang
    ),
    "openai": Dialect(_completions, _ask_openai, _read_openai),
}
"""The kinds of servers that can be asked."""
