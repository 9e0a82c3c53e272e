"""Ask a server for the log-probabilities of the likeliest tokens on frozen contexts.

    bank = dx.read_bank("RUN/contexts.parquet")
    lists, facts = ask_teacher(bank, tokenizer, AskConfig(url="http://localhost:8000/v1"))

One question per context, several at once. Each answer is checked and kept before the next is taken,
so that an interrupted command repeats only what was on its way. What a server is, is read off its
list of models; answers of different models never come into one file."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, no_shards, progress
from diagnostics.core.types import Bank, Context
from diagnostics.models.served.connection import CAP, Server, Stopped, read_address
from diagnostics.models.served.dialects import DIALECTS, Answer
from diagnostics.models.served.spelling import Spelling

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("diagnostics")
USUAL_CAP = 20
"""The longest list that vLLM gives unless it was started for more."""
FEW, SHARE = 5, 0.01
"""Token texts that may differ from the student's tokenizer, and the share of them: the names of
special tokens do in some pairs."""
ENTRY_BYTES, TOKEN_BYTES, ANSWER_BYTES = 400, 100, 2**20
"""Most bytes of an answer: per entry of a list, per token of the sequence, and in all besides."""
OWNERS = {"vllm": "vllm", "sglang": "sglang"}
"""Dialects by what the server's list of models names as the owner."""


@dataclass(frozen=True)
class AskConfig:
    """Settings of asking a server for a teacher's log-probabilities."""

    url: str | None = field(
        default=None,
        metadata={"help": "address of the server's interface, as http://localhost:8000/v1"},
    )
    served_model: str | None = field(
        default=None, metadata={"help": "the model's name there, where the server has several"}
    )
    dialect: str = field(
        default="auto",
        metadata={
            "help": "how the server is asked; auto reads it off its list of models",
            "choices": ("auto", *DIALECTS),
        },
    )
    top_logprobs: int = field(
        default=USUAL_CAP,
        metadata={"help": "tokens per list; vLLM gives more than 20 only with --max-logprobs"},
    )
    concurrency: int = field(default=8, metadata={"help": "questions on their way at once"})
    retries: int = field(
        default=6, metadata={"help": "how often a question is repeated that failed in passing"}
    )
    timeout: int = field(
        default=600, metadata={"help": "seconds that the server may be silent over one question"}
    )
    api_key_env: str | None = field(
        default=None,
        metadata={"help": "environment variable that holds the server's key; it is kept nowhere"},
    )


@dataclass(frozen=True)
class Served:
    """What a server serves."""

    model: str
    """Its name there."""
    dialect: str
    """A key of DIALECTS."""


def read_key(name: str | None) -> str | None:
    """The key in an environment variable; None where no variable is named.

    Raises:
        DiagnosticsError: The variable is empty, or holds what no header can carry.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise DiagnosticsError(
            f"The environment variable {name[:60]!r} holds no key. Set it, or leave --api-key-env"
            " out."
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise DiagnosticsError(
            f"The environment variable {name[:60]!r} holds spaces or characters that no key has."
            " Set it to the key alone."
        )
    return key


def find_served(server: Server, config: AskConfig) -> Served:
    """What the server's list of models says.

    Raises:
        DiagnosticsError: It gives no list, lacks the model that is asked for, or has several and
            none was named.
    """
    said = server.get(f"{server.address.path}/models")
    listed = said.get("data") if isinstance(said, dict) else None
    models = [
        each
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, dict) and isinstance(each.get("id"), str)
    ]
    names = [each["id"] for each in models]
    if not models:
        raise DiagnosticsError(
            f"The server at {server.address.shown} lists no models under"
            f" {server.address.path}/models. Give --url with the path of its interface, as"
            " http://localhost:8000/v1."
        )
    wanted = config.served_model if config.served_model is not None else names[0]
    if wanted not in names or (config.served_model is None and len(names) > 1):
        raise DiagnosticsError(
            f"The server at {server.address.shown} serves {', '.join(names[:10])}"
            + (f", and not {wanted!r}" if wanted not in names else "")
            + ". Name one of them with --served-model."
        )
    owner = str(models[names.index(wanted)].get("owned_by", "")).lower()
    kind = OWNERS.get(owner, "openai") if config.dialect == "auto" else config.dialect
    return Served(wanted, kind)


class Texts:
    """Compares the texts of a server's tokens with the student's tokenizer, answer by answer."""

    def __init__(self, spelling: Spelling):
        self.spelling = spelling
        self.compared, self.differing = 0, 0
        self.entries, self.unknown = 0, 0
        self.different: dict[int, str] = {}

    def check(self, answer: Answer) -> None:
        """Compare one answer. Raises DiagnosticsError where the tokenizer is another one."""
        for token, text in answer.texts:
            if not self.spelling.texts(token):
                continue
            differs = self.spelling.differs(token, text)
            self.compared += differs is not None
            if differs:
                self.differing += 1
                self.different.setdefault(token, text)
        unknown = [i for ids in answer.ids for i in ids if not self.spelling.texts(i)]
        self.entries += sum(map(len, answer.ids))
        self.unknown += len(unknown)
        if self.unknown > max(FEW, SHARE * self.entries):
            raise DiagnosticsError(
                f"The server lists {self.unknown} of {self.entries} ids that the student's"
                f" tokenizer does not have ({unknown[0]} among them). The teacher has another"
                " tokenizer; it cannot grade this student."
            )
        if self.differing > max(FEW, SHARE * self.compared):
            raise DiagnosticsError(
                f"The server's tokenizer is not the student's: {self.differing} of {self.compared}"
                f" token texts differ ({self.examples()}). It cannot grade this student; serve a"
                " teacher with the student's tokenizer."
            )

    def examples(self) -> str:
        """The first tokens that differ."""
        return ", ".join(
            f"id {token} is {text[:20]!r} there and {(self.spelling.texts(token) or ('',))[-1]!r}"
            " here"
            for token, text in list(self.different.items())[:3]
        )

    def warn(self) -> None:
        """Say what was not compared, and what differs though the tokenizer is the same."""
        if not self.compared:
            log.warning(
                "the server gave no token texts that could be compared, so that only ids tell"
                " whether its tokenizer is the student's"
            )
        elif self.different:
            log.warning(
                "%d token texts of the server differ from the student's tokenizer (%s); where they"
                " are special tokens of other names, this does no harm",
                len(self.different),
                self.examples(),
            )


def require_server(config: AskConfig) -> str:
    """Return the server's address. Raises DiagnosticsError where none was named."""
    if config.url is None:
        raise DiagnosticsError(
            "No server was named. Give its address: --url http://localhost:8000/v1."
        )
    return config.url


def ask_teacher(
    bank: Bank,
    tokenizer: PreTrainedTokenizerBase,
    config: AskConfig,
    *,
    shards: Callable[[str], Shards] = no_shards,
    wait: Callable[[float], Any] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Ask a server for the teacher's likeliest tokens at every response position.

    Args:
        bank: Frozen contexts. The server reads each context's ids, the teacher's own prompt where
            it has one.
        tokenizer: The student's tokenizer, with which the server's token texts are compared.
        config: The server and how it is asked; `url` must be set.
        shards: Gives the place where finished answers are kept, by the name of what answered.
        wait: Waits some seconds before a repetition; None waits until the command ends.

    Returns:
        One row per context, with the columns context_id, response_ids, top_ids and top_logprobs (a
        list of natural logarithms per response token), and facts for the manifest: model, dialect,
        counts of contexts, positions, compared and different token texts, and repeated requests.

    Raises:
        DiagnosticsError: There is no URL or no such server, it refuses or fails again and again,
            its tokenizer is not the student's, or an answer does not fit its context.
    """
    server = _server_of(config, wait)
    served = find_served(server, config)
    log.info("%s at %s, asked as %s", served.model, server.address.shown, served.dialect)
    kept = shards(_name_of(served))
    texts = Texts(Spelling(tokenizer))
    asked = [i for i, context in enumerate(bank) if context.response_ids]
    found = {i: _kept(kept, i) for i in asked}
    left = [i for i in asked if found[i] is None]
    try:
        found |= _new_answers(server, served, bank, left, config, texts, kept)
    finally:
        server.stop.set()
        kept.flush()
    if left:
        texts.warn()
    frame = _lists(bank, found)
    _say_shorter(frame, config, len(tokenizer))
    return frame, {
        "served_model": _last_name(served.model),
        "dialect": served.dialect,
        "contexts": len(frame),
        "positions": bank.positions,
        "taken_up": len(asked) - len(left),
        "texts_compared": texts.compared,
        "texts_different": texts.differing,
        "requests_repeated": server.repeated,
    }


def _server_of(config: AskConfig, wait: Callable[[float], Any] | None) -> Server:
    return Server(
        read_address(require_server(config)),
        key=read_key(config.api_key_env),
        timeout=config.timeout,
        retries=config.retries,
        wait=wait,
    )


def _new_answers(
    server: Server,
    served: Served,
    bank: Bank,
    left: Sequence[int],
    config: AskConfig,
    texts: Texts,
    kept: Shards,
) -> dict[int, tuple[list, list]]:
    """The lists of the contexts that are left, each checked and kept before the next is taken."""
    found: dict[int, tuple[list, list]] = {}
    with progress(total=len(left), description="asking", unit=" contexts") as bar:
        for answers in _answers(server, served, bank, left, config, texts.spelling):
            for i, answer in answers:
                texts.check(answer)
                found[i] = (answer.ids, answer.logprobs)
                kept.add([i], {"top_ids": [answer.ids], "top_logprobs": [answer.logprobs]})
                bar.update(1)
            kept.flush()
    return found


def _lists(bank: Bank, found: Mapping[int, tuple[list, list] | None]) -> pd.DataFrame:
    """The table of `ask_teacher`, from the lists by the number of their context."""
    import pandas as pd

    rows = [
        (bank[i].context_id, list(bank[i].response_ids), *lists)
        for i, lists in found.items()
        if lists is not None
    ]
    return pd.DataFrame(rows, columns=["context_id", "response_ids", "top_ids", "top_logprobs"])


def _last_name(model: str) -> str:
    """A model's name; of a folder on the server, its last name alone."""
    return PurePath(model).name if model.startswith("/") else model


def _name_of(served: Served) -> str:
    """Name under which the answers of a model are kept."""
    return "answers-" + hashlib.sha256(f"{served.model} {served.dialect}".encode()).hexdigest()[:16]


def _kept(shards: Shards, row: int) -> tuple[list, list] | None:
    """The lists of a context from an interrupted command."""
    found = shards.take([row])
    if found is None:
        return None
    ids, values = (found[name].iloc[0] for name in ("top_ids", "top_logprobs"))
    return [list(map(int, part)) for part in ids], [list(map(float, part)) for part in values]


def _answers(
    server: Server,
    served: Served,
    bank: Bank,
    left: Sequence[int],
    config: AskConfig,
    spelling: Spelling,
) -> Iterator[list[tuple[int, Answer]]]:
    """Answers as they come, several together where they came together.

    A question is asked only where there is room: an answer takes its place until it is kept, so
    that a killed command loses at most `concurrency` answers. The threads end with the program: a
    server that is silent holds up no one who stops it.
    """
    room = threading.Semaphore(config.concurrency)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
    for i in left:
        waiting.put(i)

    def work() -> None:
        while not server.stop.is_set():
            room.acquire()
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, ask_one(server, served, bank[i], config.top_logprobs, spelling)))
            except BaseException as error:  # carried to the thread that reports it
                done.put((i, error))

    for _ in range(min(config.concurrency, len(left))):
        threading.Thread(target=work, daemon=True).start()
    came = 0
    while came < len(left):
        batch = [done.get()]
        while not done.empty():
            batch.append(done.get())
        came += len(batch)
        failed = [each for _, each in batch if isinstance(each, BaseException)]
        yield [(i, each) for i, each in batch if not isinstance(each, BaseException)]
        room.release(len(batch))
        if failed:
            raise next((each for each in failed if not isinstance(each, Stopped)), failed[0])


def ask_one(server: Server, served: Served, context: Context, k: int, spelling: Spelling) -> Answer:
    """Ask about one context.

    Args:
        server: The server.
        served: The model and the dialect.
        context: The context.
        k: Tokens per list.
        spelling: The student's tokenizer, for servers that give texts alone.

    Raises:
        DiagnosticsError: The server refuses, fails again and again, or answers about other tokens.
    """
    dialect = DIALECTS[served.dialect]
    length = len(context.teacher_ids)
    return server.post(
        dialect.path(server.address.path),
        dialect.question(context, k, served.model),
        most=ANSWER_BYTES + length * (TOKEN_BYTES + ENTRY_BYTES * (k + 1)),
        read=lambda said: dialect.read(said, context, spelling),
        what=f"context {context.context_id!r}",
    )


def _say_shorter(frame: pd.DataFrame, config: AskConfig, vocabulary: int) -> None:
    """Warn where the server gives shorter lists than were asked for, without saying so."""
    shortest = min((len(ids) for lists in frame["top_ids"] for ids in lists), default=0)
    if frame.size and shortest < min(config.top_logprobs, vocabulary):
        log.warning(
            "the server's shortest list has %d tokens, and %d were asked for. %s",
            shortest,
            config.top_logprobs,
            CAP + ".",
        )
