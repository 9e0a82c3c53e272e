"""A served teacher: what is asked, what is read, what is repeated, and what is refused."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards
from diagnostics.core.types import Bank, Context, read_bank
from diagnostics.models.pair import load_pair
from diagnostics.models.served import connection
from diagnostics.models.served.ask import AskConfig, ask_teacher
from diagnostics.models.served.connection import pause, read_address
from diagnostics.models.served.spelling import Spelling
from diagnostics.models.topk_teacher import lists_of, read_lists
from diagnostics.pipeline.cli import main
from diagnostics.probing.scores import ScoreConfig, score
from tests.conftest import make_bank, make_tokenizer
from tests.contexts.factories import jsonl
from tests.factories import message
from tests.models.test_topk_teacher import listed, teacher_rows
from tests.served_stub import Stub, of_model

V = 64
TOKENIZER = make_tokenizer()


def text_of(token: int) -> str:
    return TOKENIZER.decode([token])


def uniform_but(ids) -> np.ndarray:
    """ln q by hand: at place t the token (t mod 60) + 4 has 1/2, the next 1/4, the rest share."""
    table_LV = np.full((len(ids), V), math.log(0.25 / (V - 2)))
    for place in range(len(ids)):
        table_LV[place, 4 + place % 60] = math.log(0.5)
        table_LV[place, 4 + (place + 1) % 60] = math.log(0.25)
    return table_LV


def asked(stub, bank=None, *, tokenizer=TOKENIZER, waits=None, shards=None, **options):
    """What `ask_teacher` gives, without waiting."""
    config = AskConfig(**{"url": stub.url, "top_logprobs": 3, "concurrency": 2, **options})
    waits = [] if waits is None else waits
    keep = {} if shards is None else {"shards": shards}
    return ask_teacher(bank or BANK, tokenizer, config, wait=waits.append, **keep)


BANK = make_bank([3, 5, 2])


# --- what is asked and read


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
def test_each_dialect_gives_the_lists_of_every_response_token_by_hand(dialect):
    with Stub(uniform_but, text_of, dialect=dialect) as stub:
        frame, facts = asked(stub, top_logprobs=2)
    assert frame["context_id"].tolist() == ["c0", "c1", "c2"]
    assert facts["dialect"] == dialect and facts["served_model"] == "teacher"
    for context, row in zip(BANK, frame.itertuples()):
        assert tuple(row.response_ids) == context.response_ids
        for t, (ids, values) in enumerate(zip(row.top_ids, row.top_logprobs)):
            place = len(context.prompt_ids) + t
            own, best = context.response_ids[t], [4 + place % 60, 4 + (place + 1) % 60]
            expected = dict(zip(best, (math.log(0.5), math.log(0.25))))
            if own not in expected:
                expected[own] = math.log(0.25 / (V - 2))
            assert dict(zip(ids, values)) == expected and ids[:2] == best


def test_ids_go_out_and_the_temperature_is_one():
    for dialect, ids, top in (
        ("vllm", "prompt", "prompt_logprobs"),
        ("sglang", "input_ids", "top_logprobs_num"),
        ("openai", "prompt", "logprobs"),
    ):
        with Stub(uniform_but, text_of, dialect=dialect) as stub:
            asked(stub)
        assert sorted(body[ids] for body in stub.asked) == sorted(list(c.ids) for c in BANK)
        assert {body[top] for body in stub.asked} == {3}
        settings = [body.get("sampling_params", body) for body in stub.asked]
        assert {each["temperature"] for each in settings} == {1.0}
        assert {each.get("max_tokens", each.get("max_new_tokens")) for each in settings} == {1}


def test_a_teacher_with_its_own_prompt_reads_that_one():
    context = dataclasses.replace(BANK[0], teacher_prompt="hint", teacher_prompt_ids=(0, 9, 9, 9))
    with Stub(uniform_but, text_of) as stub:
        frame, _ = asked(stub, Bank((context,)))
    assert stub.asked[0]["prompt"] == [0, 9, 9, 9, *context.response_ids]
    assert frame["top_ids"][0][0][:2] == [8, 9]  # place 4


def test_the_lists_are_those_that_a_file_is_read_as():
    with Stub(uniform_but, text_of) as stub:
        frame, _ = asked(stub)
    teacher = lists_of(frame, "x", vocabulary=V)
    teacher.require(BANK)
    assert teacher.width == 4  # three likeliest, and the sampled token


def test_no_more_questions_than_allowed_are_on_their_way():
    gate = threading.Barrier(3, timeout=20)
    bank = make_bank([2] * 9)
    with Stub(uniform_but, text_of, hold=lambda _: gate.wait()) as stub:
        asked(stub, bank, concurrency=3)
    assert stub.most_at_once == 3 and len(stub.asked) == 9


# --- faults that pass


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
@pytest.mark.parametrize("fault", ["429", "503", "cut", "short", "torn", "lacking"])
def test_a_passing_fault_is_repeated_and_changes_nothing(dialect, fault):
    with Stub(uniform_but, text_of, dialect=dialect) as stub:
        whole, _ = asked(stub)
    waits = []
    with Stub(uniform_but, text_of, dialect=dialect, faults=[fault, None, fault]) as stub:
        again, facts = asked(stub, waits=waits)
    if dialect == "vllm" and fault == "lacking":
        assert len(stub.asked) == 5
    pd.testing.assert_frame_equal(whole, again.sort_values("context_id", ignore_index=True))
    assert facts["requests_repeated"] == 2 == len(waits)
    assert set(waits) <= ({3.0} if fault == "429" else {0.5, 1.0})


def test_the_pause_doubles_and_heeds_the_server_up_to_a_minute():
    assert [pause(n, None) for n in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert pause(0, 7.0) == 7.0 and pause(4, 7.0) == 8.0 and pause(0, 3600.0) == 60.0


def test_a_fault_that_stays_is_refused_after_the_last_repetition():
    with Stub(uniform_but, text_of, faults=["503"] * 50) as stub:
        said = message(asked, stub, retries=2, concurrency=1)
    assert len(stub.asked) == 3
    assert "failed 3 times at context 'c0': 503" in said and "What was answered is kept" in said


def test_finished_answers_are_kept_and_not_asked_for_again(tmp_path):
    def shards(name):
        return Shards(tmp_path / name)

    with Stub(uniform_but, text_of, faults=[None, None, *["503"] * 9]) as stub:
        message(asked, stub, retries=0, concurrency=1, shards=shards)
    assert len(stub.asked) == 3
    with Stub(uniform_but, text_of) as stub:
        frame, facts = asked(stub, shards=shards)
    assert [body["prompt"] for body in stub.asked] == [list(BANK[2].ids)]
    assert facts["taken_up"] == 2
    with Stub(uniform_but, text_of) as stub:
        whole, _ = asked(stub)
    pd.testing.assert_frame_equal(frame.sort_values("context_id", ignore_index=True), whole)


def test_answers_of_another_model_are_not_taken_up(tmp_path):
    def shards(name):
        return Shards(tmp_path / name)

    with Stub(uniform_but, text_of, faults=[None, *["503"] * 9]) as stub:
        message(asked, stub, retries=0, concurrency=1, shards=shards)
    with Stub(uniform_but, text_of, models=["another"]) as stub:
        asked(stub, shards=shards)
    assert len(stub.asked) == 3


# --- refusals


def test_a_longer_list_than_the_servers_cap_is_explained():
    with Stub(uniform_but, text_of) as stub:
        said = message(asked, stub, top_logprobs=50)
    assert "refused /v1/completions with 400" in said and "max allowed: 20" in said
    assert "--max-logprobs" in said and "--top-logprobs" in said


def test_shorter_lists_than_asked_for_are_said(caplog):
    with Stub(uniform_but, text_of, silently_cap=2) as stub:
        asked(stub, top_logprobs=9)
    assert "shortest list has 3 tokens, and 9 were asked for" in caplog.text


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_another_tokenizer_is_refused_by_its_texts(dialect):
    with Stub(uniform_but, lambda i: f"other{i}", dialect=dialect) as stub:
        said = message(asked, stub)
    assert "tokenizer is not the student's" in said and "'other" in said


def test_a_text_server_with_another_tokenizer_is_refused_at_once():
    with Stub(uniform_but, lambda i: f"other{i}", dialect="openai") as stub:
        said = message(asked, stub)
    assert "scored another token than the run holds" in said


def test_a_few_other_names_are_said_and_go_through(caplog):
    def renamed(token):
        return "<|thinks|>" if token == 4 else text_of(token)

    bank = make_bank([30] * 4)
    with Stub(uniform_but, renamed) as stub:
        frame, facts = asked(stub, bank)
    assert len(frame) == 4 and 0 < facts["texts_different"] <= 5
    assert "id 4 is '<|thinks|>' there and 'w0' here" in caplog.text


def test_ids_that_the_tokenizer_lacks_are_refused():
    def beyond(ids):
        table_LV = np.full((len(ids), 200), math.log(0.25 / 198))
        table_LV[:, 150], table_LV[:, 151] = math.log(0.5), math.log(0.25)
        return table_LV

    with Stub(beyond, text_of) as stub:
        said = message(asked, stub)
    assert "ids that the student's tokenizer does not have (150 among them)" in said


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
def test_what_is_no_log_probability_is_refused(dialect):
    with Stub(uniform_but, text_of, dialect=dialect, faults=["nan"] * 3) as stub:
        said = message(asked, stub)
    assert "in place of a log-probability" in said and "response token 0" in said


def test_signs_for_not_listed_are_read_as_absent():
    with Stub(uniform_but, text_of, faults=["sentinel"] * 3) as stub:
        frame, _ = asked(stub)
    teacher = lists_of(frame, "x", vocabulary=V)
    assert teacher.absent == BANK.positions


def test_more_places_than_tokens_are_refused():
    with Stub(uniform_but, text_of, faults=["doubled"] * 3) as stub:
        said = message(asked, stub)
    assert "places for the" in said and "takes ids" in said


def test_a_redirection_is_not_followed():
    with Stub(uniform_but, text_of, faults=["redirect"] * 3) as stub:
        said = message(asked, stub)
    assert "302" in said and "nothing is sent there" in said


def test_an_answer_larger_than_any_is_refused(monkeypatch):
    monkeypatch.setattr("diagnostics.models.served.ask.ANSWER_BYTES", 10)
    monkeypatch.setattr("diagnostics.models.served.ask.ENTRY_BYTES", 0)
    monkeypatch.setattr("diagnostics.models.served.ask.TOKEN_BYTES", 0)
    with Stub(uniform_but, text_of) as stub:
        assert "more than 10 bytes" in message(asked, stub)


def test_several_models_are_asked_which():
    with Stub(uniform_but, text_of, models=["a", "b"]) as stub:
        assert "serves a, b. Name one of them with --served-model" in message(asked, stub)
        assert "serves a, b, and not 'c'" in message(asked, stub, served_model="c")
        assert asked(stub, served_model="b")[1]["served_model"] == "b"
    assert {body["model"] for body in stub.asked} == {"b"}


def test_a_server_that_is_not_there_is_refused_at_once():
    with Stub(uniform_but, text_of) as stub:
        url = stub.url
    said = message(ask_teacher, BANK, TOKENIZER, AskConfig(url=url))
    assert "gives no answer to /v1/models (ConnectionRefusedError" in said


def test_a_context_without_a_prompt_is_refused():
    bank = Bank((Context("c", "p", "", (), "w1", (5,), False),))
    with Stub(uniform_but, text_of) as stub:
        assert "Context 'c' has no prompt" in message(asked, stub, bank)


@pytest.mark.parametrize(
    "url, words",
    [
        ("localhost:8000", "takes the address of a server"),
        ("ftp://localhost", "takes the address of a server"),
        ("http://localhost:99999/v1", "takes the address of a server"),
        ("http://me:secret@localhost/v1", "holds a name or a password"),
        ("http://localhost/v1?key=1", "takes the address of a server"),
    ],
)
def test_an_address_that_is_none_is_refused(url, words):
    said = message(read_address, url)
    assert words in said and "secret" not in said


def test_an_address_by_hand():
    address = read_address("https://[::1]:8000/v1/")
    assert (address.secure, address.host, address.port, address.path) == (True, "::1", 8000, "/v1")
    assert address.is_loopback and not read_address("http://10.0.0.1/v1").is_loopback


# --- texts that are ids, and only those


def test_a_text_of_two_tokens_is_no_id():
    class Twice:
        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 2}

        def decode(self, ids):
            return {0: "x", 1: "x", 2: "c"}[ids[0]]

        def convert_ids_to_tokens(self, token):
            return "abc"[token]

    spelling = Spelling(Twice())
    assert list(spelling.ids_of("x")) == [0, 1] and list(spelling.ids_of("c")) == [2]
    assert list(spelling.ids_of("a")) == [0] and list(spelling.ids_of("nowhere")) == []
    with Stub(lambda ids: uniform_but(ids), lambda i: "x", dialect="openai") as stub:
        bank = Bank((Context("c", "p", "", (0, 1), "x", (0,), False),))
        said = message(asked, stub, bank, tokenizer=Twice())
    assert "'x', which is 2 tokens" in said and "return_tokens_as_token_ids" in said


def test_a_server_that_writes_ids_in_place_of_texts_is_read():
    with Stub(uniform_but, lambda i: f"token_id:{i}", dialect="openai") as stub:
        stated, _ = asked(stub)
    with Stub(uniform_but, text_of, dialect="openai") as stub:
        pd.testing.assert_frame_equal(stated, asked(stub)[0])


def test_spaces_and_parts_of_characters_tell_nothing_apart():
    spelling = Spelling(TOKENIZER)
    assert spelling.differs(7, "w3") is False and spelling.differs(7, "Ġw3") is False
    assert spelling.differs(7, "▁w3") is False and spelling.differs(7, "w4") is True
    assert spelling.differs(7, "\ufffd") is None and spelling.differs(999, "w4") is None


# --- the key


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, folders, finished, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-Q7secretQ7")
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "contexts.parquet").write_bytes((finished / "contexts.parquet").read_bytes())
    command = ["ask-teacher", "--student", folders[1], "--quiet", "--output-dir", str(directory)]
    with Stub(uniform_but, text_of, key="sk-Q7secretQ7") as stub:
        arguments = [*command, "--url", stub.url, "--top-logprobs", "3"]
        assert main([*arguments, "--api-key-env", "MY_KEY"]) == 0
    assert {each.get("Authorization") for each in stub.headers} == {"Bearer sk-Q7secretQ7"}
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"Q7secret" not in content and b"127.0.0.1" not in content, path


def test_a_refused_key_is_not_repeated_in_the_message(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-Q7secretQ7")
    with Stub(uniform_but, text_of, key="another") as stub:
        said = message(asked, stub, api_key_env="MY_KEY")
    assert "401" in said and "--api-key-env" in said and "Q7secret" not in said


def test_a_variable_without_a_key_is_refused(monkeypatch):
    monkeypatch.setenv("MY_KEY", "")
    with Stub(uniform_but, text_of) as stub:
        assert "'MY_KEY' holds no key" in message(asked, stub, api_key_env="MY_KEY")
        monkeypatch.setenv("MY_KEY", "two\nlines")
        said = message(asked, stub, api_key_env="MY_KEY")
    assert "no key has" in said and "lines" not in said
    assert stub.headers == []


def test_a_key_over_http_to_another_machine_is_warned_of(caplog):
    connection.Server(read_address("http://10.0.0.1/v1"), key="k")
    assert "goes to 10.0.0.1 over http" in caplog.text


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Stub(uniform_but, text_of) as stub:
        assert len(asked(stub)[0]) == 3


# --- on a run directory


def test_a_served_teacher_gives_the_numbers_of_a_local_one(pair, folders, tmp_path):
    """From the command line to the scores, against lists of the local teacher."""
    run = [
        "--student",
        folders[1],
        "--device",
        "cpu",
        "--quiet",
        "--output-dir",
        str(tmp_path / "r"),
    ]
    assert main(["rollout", *folders[4:10], *run]) == 0
    teacher = pair.teacher.model
    with Stub(of_model(teacher), text_of) as stub:
        assert main(["ask-teacher", "--url", stub.url, *run]) == 0
        first = len(stub.asked)
        assert main(["ask-teacher", "--url", stub.url, *run]) == 0
        assert len(stub.asked) == first == 20
    file = tmp_path / "r" / "teacher_logprobs.parquet"
    assert main(["score", "--teacher-logprobs", str(file), *run]) == 0
    tokens = pd.read_parquet(tmp_path / "r" / "tokens.parquet")
    bank = read_bank(tmp_path / "r" / "contexts.parquet")
    local = score(listed(pair, bank, 20, tmp_path, sampled=True), bank, ScoreConfig())
    numbers = local.select_dtypes("number").columns
    np.testing.assert_allclose(tokens[numbers], local[numbers], atol=1e-6, rtol=0)
    exact = score(pair, bank, ScoreConfig())
    np.testing.assert_allclose(tokens["advantage"], exact["advantage"], atol=1e-4, rtol=0)
    assert (tokens["forward_kl"] <= exact["forward_kl"] + 1e-6).all()
    assert tokens["teacher_logprob"].notna().all()
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    record = manifest["stages"]["ask-teacher"]
    assert record["settings"] == {"served_model": None, "dialect": "auto", "top_logprobs": 20}
    assert record["facts"]["texts_different"] == 0 and record["facts"]["texts_compared"] > 1000
    again = ["rerun", str(tmp_path / "r" / "manifest.json"), "--inputs", folders[1], folders[5]]
    assert main([*again, "--device", "cpu", "--quiet", "--output-dir", str(tmp_path / "n")]) == 0


KILLED = """
import sys
from diagnostics.pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_command_asks_only_for_what_was_on_its_way(folders, finished, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "contexts.parquet").write_bytes((finished / "contexts.parquet").read_bytes())
    reached, never = threading.Event(), threading.Event()

    def hold(number):
        if number >= 6:  # six are answered, and two wait for ever
            if number == 7:
                reached.set()
            never.wait(60)

    arguments = ["ask-teacher", "--student", folders[1], "--concurrency", "2", "--quiet"]
    arguments += ["--output-dir", str(directory), "--url"]
    with Stub(uniform_but, text_of, hold=hold) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments, stub.url],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        never.set()
        answered = {tuple(body["prompt"]) for body in stub.asked[:6]}
    with Stub(uniform_but, text_of) as stub:
        assert main([*arguments, stub.url]) == 0
    again = {tuple(body["prompt"]) for body in stub.asked}
    assert len(again) == 14 and not again & answered
    assert len(read_lists(directory / "teacher_logprobs.parquet", vocabulary=V).lists) == 20


def test_no_url_is_refused_and_nothing_is_loaded(finished, folders, capsys):
    command = ["ask-teacher", "--student", folders[1], "--output-dir", str(finished), "--quiet"]
    record = (finished / "manifest.json").read_bytes()
    assert main(command) == 2
    assert "No server was named. Give its address: --url" in capsys.readouterr().err
    assert (finished / "manifest.json").read_bytes() == record


@pytest.mark.slow
def test_the_embedded_teacher_served_is_the_embedded_teacher_listed(tmp_path):
    """Score from the served file against score from lists of the local teacher: equal to 1e-6."""
    run = ["--pair", "embedded", "--device", "cpu", "--quiet", "--output-dir", str(tmp_path)]
    assert main(["rollout", "--contexts", "3", "--max-new-tokens", "12", *run]) == 0
    pair, bank = load_pair("embedded"), read_bank(tmp_path / "contexts.parquet")
    logprobs = of_model(pair.teacher.model)
    with Stub(logprobs, lambda i: pair.tokenizer.decode([i])) as stub:
        assert main(["ask-teacher", "--url", stub.url, *run]) == 0
    served = read_lists(tmp_path / "teacher_logprobs.parquet", vocabulary=pair.vocabulary)
    found = score(dataclasses.replace(pair, teacher=served), bank, ScoreConfig())
    rows = jsonl(tmp_path / "local.jsonl", *teacher_rows(pair, bank, 20, sampled=True))
    local = read_lists(rows, vocabulary=pair.vocabulary)
    expected = score(dataclasses.replace(pair, teacher=local), bank, ScoreConfig())
    numbers = found.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers], expected[numbers], atol=1e-6, rtol=0)
    exact = score(pair, bank, ScoreConfig())
    np.testing.assert_allclose(found["advantage"], exact["advantage"], atol=1e-5, rtol=0)
    assert (found["forward_kl"] <= exact["forward_kl"] + 1e-6).all()
    with pytest.raises(DiagnosticsError, match="tokenizer"), Stub(logprobs, str) as stub:
        ask_teacher(bank, pair.tokenizer, AskConfig(url=stub.url))
