"""Bad input of every kind, to every reader and to the command line: it ends in a result or in one
DiagnosticsError, and touches no other file.

The tests draw about a thousand cases. `FUZZ_CASES=50000 pytest tests/test_fuzz.py` draws about that
many in all; the counts of the last such campaign stand in docs/faults.md. A case that fails is
printed, shrunk, with the code that repeats it."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from diagnostics.contexts import import_rollouts, import_tokens, rollouts, story_sums, torch_archive
from diagnostics.contexts.prompts import read_prompts
from diagnostics.core import manifest as manifests
from diagnostics.core import run_lock, schema, types
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.schema import SCHEMA
from diagnostics.core.tables import write_csv
from diagnostics.core.types import Context
from diagnostics.models import pair, topk_teacher
from diagnostics.pipeline import cli, registry
from diagnostics.pipeline import run as run_directory
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.report import run_results, written_pages
from diagnostics.training import engine_options
from tests import study_tables
from tests.conftest import make_bank, make_pair, make_prompts, make_tokenizer

ALL = int(os.environ.get("FUZZ_CASES", 1000))
COUNTS: dict[str, int] = {}


def cases(share: float, **options):
    """Settings for a test that draws its share of all cases; none may take ten seconds."""
    return settings(
        max_examples=max(5, round(share * ALL)),
        deadline=timedelta(seconds=10),
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,
        ],
        **options,
    )


# --- what is drawn
# ------------------------------------------------------------------------------------

WORDS = [
    "prompt",
    "messages",
    "answer",
    "prompt_id",
    "context_id",
    "response",
    "prompt_ids",
    "response_ids",
    "finished",
    "role",
    "user",
    "content",
    "tokens",
    "sample_index",
    "tok_pos",
    "token_id",
    "null",
    "NaN",
    "w1 w2",
    "<bos>",
    "../../x",
    "hint",
    "teacher_prompt",
    "split",
    "step",
    "gain",
]
TEXT = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=12),
    st.text(alphabet="\x00\x01\x1b\x7f\r\n\t\"',\\\u2028\u202e\ufeff\ud83d\U0001f600é", max_size=8),
    st.builds(
        lambda text, times: text * times,
        st.text(min_size=1, max_size=4),
        st.sampled_from([1, 100, 5000]),
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([-1, 2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    st.one_of(TEXT, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), VALUES),
                "content": VALUES,
            }
        ),
        VALUES,
    ),
    max_size=3,
)
IDS = st.one_of(st.lists(st.integers(0, 66), max_size=6), VALUES)
MASK = st.one_of(
    st.lists(st.booleans(), max_size=6), st.lists(st.integers(0, 1), max_size=6), VALUES
)


def rows(columns):
    """Rows with some of the columns that a reader looks for, mostly of its types, and others."""
    fields = {name: st.one_of(kind, VALUES) for name, kind in columns.items()}
    known = st.one_of(st.fixed_dictionaries(fields), st.fixed_dictionaries({}, optional=fields))
    return st.lists(
        st.one_of(
            known, st.builds(lambda a, b: a | b, known, st.dictionaries(TEXT, VALUES, max_size=2))
        ),
        min_size=1,
        max_size=4,
    )


PROMPTS = rows(
    {
        "prompt": st.one_of(TEXT, MESSAGES),
        "messages": MESSAGES,
        "answer": NUMBERS,
        "prompt_id": TEXT,
        "hint": TEXT,
        "teacher_prompt": st.one_of(TEXT, MESSAGES),
    }
)
CONTEXTS = rows(
    {
        "context_id": TEXT,
        "prompt_id": TEXT,
        "prompt": TEXT,
        "prompt_ids": IDS,
        "response": TEXT,
        "response_ids": IDS,
        "finished": st.booleans(),
        "supervised": MASK,
    }
)
ROLLOUTS = st.one_of(
    CONTEXTS,
    rows(
        {
            "prompt": st.one_of(TEXT, MESSAGES),
            "response": TEXT,
            "prompt_ids": IDS,
            "response_ids": IDS,
            "loss_mask": MASK,
            "attention_mask": MASK,
        }
    ),
    rows(
        {
            "tokens": IDS,
            "resp_len": st.integers(-1, 5),
            "prompt_len": st.integers(-1, 5),
            "sample_index": NUMBERS,
            "group_index": NUMBERS,
        }
    ),
    rows(
        {
            "tokens": IDS,
            "response_length": st.integers(-1, 5),
            "loss_mask": MASK,
            "prompt": TEXT,
            "response": TEXT,
        }
    ),
    rows({"input": TEXT, "output": TEXT}),
    rows({"prompt": st.one_of(TEXT, MESSAGES), "completion": st.one_of(TEXT, MESSAGES)}),
)
OURS = rows(
    {
        name: {"string": TEXT, "bool": st.booleans()}.get(entry.dtype, st.integers(0, 5))
        for name, entry in list(SCHEMA.items())[:16]
    }
)
NESTED = st.lists(st.lists(st.integers(0, 65), min_size=1, max_size=3), max_size=3)
LISTS = rows(
    {
        "context_id": TEXT,
        "top_ids": NESTED,
        "top_logprobs": st.lists(st.lists(st.floats(-20, 0.1), min_size=1, max_size=3), max_size=3),
        "position": NUMBERS,
        "response_ids": IDS,
        "token_id": NUMBERS,
    }
)
RELEASED = rows(
    dict.fromkeys(
        (
            "sample_index",
            "tok_pos",
            "token_id",
            "group_index",
            "rollout_id",
            "loss_mask_original",
            "Hs_full",
            "KLf_full",
            "KLf_full_base",
            "KLr_full_base",
            "Cmass",
            "Cmass_exact",
            "reach_t1",
            "G_KLf",
            "student_logp_sampled",
            "teacher_logp_sampled",
        ),
        NUMBERS,
    )
)


def as_jsonl(table) -> bytes:
    return "\n".join(json.dumps(row) for row in table).encode("utf-8", "surrogatepass")


def as_csv(table) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(str(name) for row in table for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: str(value)[:10_000] for name, value in row.items()} for row in table)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(table) -> bytes:
    buffer = io.BytesIO()
    try:
        pd.DataFrame(table).to_parquet(buffer, index=False)
    except Exception:  # whatever arrow cannot hold is no parquet file
        assume(False)
    return buffer.getvalue()


WRITERS = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}


@st.composite
def files(draw, table):
    """A file's ending and bytes: a table as written, the same damaged, or just bytes."""
    suffix = draw(st.sampled_from(sorted(WRITERS)))
    kind = draw(st.sampled_from(["whole", "whole", "whole", "damaged", "bytes"]))
    if kind == "bytes":
        return suffix, draw(
            st.one_of(
                st.binary(max_size=60),
                st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
            )
        )
    content = bytearray(WRITERS[suffix](draw(table)))
    if kind == "damaged" and content:
        place = draw(st.integers(0, len(content) - 1))
        how = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
        if how == "cut":
            del content[place:]
        elif how == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        else:
            content[place:place] = (
                draw(st.binary(max_size=4)) if how == "insert" else content[place:]
            )
    return suffix, bytes(content)


# --- what must hold
# -----------------------------------------------------------------------------------


def ends_well(name, call) -> None:
    """The call returns, or raises a DiagnosticsError of one paragraph that says something."""
    COUNTS[name] = COUNTS.get(name, 0) + 1
    with contextlib.redirect_stderr(io.StringIO()), np.errstate(all="ignore"):
        said = None
        try:
            call()
        except DiagnosticsError as error:
            said = str(error)
    assert said is None or (len(said) > 20 and said.strip() == said)


def tree(folder):
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def written_counts():
    """With FUZZ_CASES the number of cases of each reader goes to the terminal's log."""
    yield
    if "FUZZ_CASES" in os.environ:
        print(f"\ncases: {sum(COUNTS.values())} in all; {COUNTS}")


@pytest.fixture(scope="module")
def tiny():
    return make_pair()


@pytest.fixture(scope="module")
def chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    return tokenizer


READERS = {
    "prompts": (PROMPTS, lambda path, pair, chat: read_prompts(path, tokenizer=chat)),
    "plain prompts": (
        PROMPTS,
        lambda path, pair, chat: read_prompts(
            path, tokenizer=pair.tokenizer, contexts=2, max_prompt_tokens=5
        ),
    ),
    "rollouts": (ROLLOUTS, lambda path, pair, chat: import_rollouts.freeze_rollouts(pair, path)),
    "contexts": (CONTEXTS, lambda path, pair, chat: types.read_bank(path)),
    "tokens": (OURS, lambda path, pair, chat: schema.read_tokens(path)),
    "token tables": (OURS, lambda path, pair, chat: import_tokens.read_tokens(path)),
    "remote teachers": (
        LISTS,
        lambda path, pair, chat: topk_teacher.read_lists(path, vocabulary=64),
    ),
    "released tables": (RELEASED, lambda path, pair, chat: import_tokens.read_tokens(path)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@cases(0.105)
@given(data=st.data())
def test_readers(name, tiny, chat, tmp_path, data):
    table, read = READERS[name]
    suffix, content = data.draw(files(table))
    path = tmp_path / f"a file{suffix}"
    path.write_bytes(content)
    try:
        ends_well(name, lambda: read(path, tiny, chat))
        unchanged = path.read_bytes() == content and [
            found.name for found in tmp_path.iterdir()
        ] == [path.name]
    finally:
        path.unlink()
    assert unchanged


@pytest.mark.parametrize("size", [10**6])
def test_a_prompt_of_a_megabyte(tiny, chat, tmp_path, size):
    long = {"prompt": "w1 " * (size // 3)}
    (tmp_path / "long.jsonl").write_bytes(as_jsonl([long, {"prompt": "w2"}]))
    prompts = read_prompts(tmp_path / "long.jsonl", tokenizer=chat, max_prompt_tokens=200)
    assert [prompt.prompt for prompt in prompts.prompts] == ["<bos> user w2 "] and prompts.counts[
        "over_long"
    ] == 1
    assert (
        len(read_prompts(tmp_path / "long.jsonl", tokenizer=tiny.tokenizer).prompts[0].prompt)
        > size - 3
    )


SETTINGS = st.dictionaries(TEXT, VALUES, max_size=3)
RECORDS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "settings": st.one_of(SETTINGS, VALUES),
            "inputs": st.one_of(SETTINGS, VALUES),
            "files": st.one_of(SETTINGS, VALUES),
            "models": VALUES,
            "code": VALUES,
            "facts": VALUES,
        },
    ),
)
MANIFESTS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "stages": st.one_of(
                VALUES,
                st.dictionaries(st.sampled_from(["score", "probe", "x"]), RECORDS, max_size=2),
            )
        },
        optional={"versions": VALUES, "joined": VALUES, "format": VALUES},
    ),
)


@cases(0.06)
@given(manifest=MANIFESTS, raw=st.one_of(st.none(), st.binary(max_size=30)))
@example(manifest={}, raw=b"[" * 100_000)
def test_manifests(tmp_path, manifest, raw):
    content = json.dumps(manifest).encode("utf-8", "surrogatepass") if raw is None else raw
    (tmp_path / "manifest.json").write_bytes(content)

    def stage():
        with run_directory.open_run(tmp_path) as run:
            run.stage(
                "score",
                settings={"k": 1},
                outputs=[],
                work=pytest.fail,
                models=lambda: {"student": "x"},
                code=("core.types",),
            )

    ends_well("manifests", lambda: manifests.read_manifest(tmp_path / "manifest.json"))
    with contextlib.suppress(pytest.fail.Exception):
        ends_well("manifests", stage)
    ends_well("manifests", lambda: cli.main(["report", "--quiet", "--output-dir", str(tmp_path)]))


@cases(0.04)
@given(
    fields=st.one_of(
        st.dictionaries(
            st.one_of(TEXT, st.sampled_from(["weight_decay", "max_grad_norm", "bf16"])),
            VALUES,
            max_size=3,
        ),
        VALUES,
    ),
    raw=st.one_of(st.none(), st.binary(max_size=30)),
)
def test_settings_of_a_trainer(tmp_path, fields, raw):
    path = tmp_path / "trl.json"
    path.write_bytes(json.dumps(fields).encode("utf-8", "surrogatepass") if raw is None else raw)
    ends_well("trainer settings", lambda: engine_options.trl_fields(str(path)))


@cases(0.05)
@given(
    content=st.binary(max_size=80),
    cut=st.integers(0, 2000),
    flip=st.integers(0, 2000),
    damaged=st.booleans(),
)
def test_archives(tmp_path, content, cut, flip, damaged):
    if damaged:
        source = bytearray((banks_files() / "slime.pt").read_bytes())
        source[flip % len(source)] ^= 1 + cut % 255
        content = bytes(source) if cut % 3 else bytes(source[: cut % len(source)])
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    ends_well("archives", lambda: torch_archive.read_archive(path))


def banks_files():
    from pathlib import Path

    return Path(__file__).parent / "files"


@cases(0.05)
@given(response=st.one_of(TEXT, st.text(max_size=60)), answer=st.one_of(TEXT, st.integers()))
def test_the_verifier_judges_any_text(response, answer):
    ends_well("verifier", lambda: story_sums.verify(response, answer))


# --- measurements with settings and contexts at the edge
# ------------------------------------------------

HUGE = st.one_of(st.integers(-2, 70), st.sampled_from([10**6, 2**31, 2**63, -(2**40)]))
REALS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 0.5, 1e-6, -1.0]))


@st.composite
def contexts(draw):
    ids = st.lists(st.integers(-1, 65), max_size=4)
    return types.Bank(
        tuple(
            Context(
                f"c{i}",
                draw(st.sampled_from(["p0", "p1", "p2"])),
                draw(TEXT),
                tuple(draw(ids)),
                draw(TEXT),
                tuple(draw(ids)),
                draw(st.booleans()),
            )
            for i in range(draw(st.integers(0, 4)))
        )
    )


@pytest.mark.filterwarnings("ignore")
@cases(0.03)
@given(bank=contexts(), k=HUGE, sweep=st.lists(HUGE, max_size=2), batch_tokens=HUGE)
def test_scoring(tiny, bank, k, sweep, batch_tokens):
    ends_well("score", lambda: score(tiny, bank, k=k, sweep=sweep, batch_tokens=batch_tokens))


@pytest.mark.filterwarnings("ignore")
@cases(0.01)
@given(
    step=st.one_of(REALS, st.sampled_from(["auto", "1e9", "x"])),
    beta=REALS,
    folds=st.integers(-1, 5),
    nulls=st.lists(st.sampled_from(["global", "token_type", "x"]), max_size=2),
    placebos=st.integers(-1, 1),
    horizon=st.lists(st.integers(-1, 2), max_size=2),
    seed=st.integers(-2, 2**40),
    loss=st.sampled_from(["forward_kl", "jsd", "x"]),
)
def test_probing(tiny, step, beta, folds, nulls, placebos, horizon, seed, loss):
    ends_well(
        "probe",
        lambda: probe(
            tiny,
            make_bank([2, 1, 3]),
            step=step,
            beta=beta,
            folds=folds,
            nulls=nulls,
            placebos=placebos,
            horizon=horizon,
            seed=seed,
            loss=loss,
        ),
    )


@pytest.mark.filterwarnings("ignore")
@cases(0.02)
@given(
    tokens=st.integers(-1, 3),
    temperature=REALS,
    top_p=REALS,
    top_k=HUGE,
    samples=st.integers(-1, 2),
    seed=st.integers(-5, 2**70),
)
def test_sampling(tiny, tokens, temperature, top_p, top_k, samples, seed):
    ends_well(
        "rollout",
        lambda: rollouts.rollout(
            tiny,
            make_prompts(2),
            max_new_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            samples_per_prompt=samples,
            seed=seed,
        ),
    )


# --- the command line
# -----------------------------------------------------------------------------------


def options_of(command):
    actions = cli.build_parser()._subparsers._group_actions[0].choices[command]._actions
    return sorted(
        {name for action in actions for name in action.option_strings}
        - {"--output-dir", "-h", "--help"}
    )


COMMANDS = {command: options_of(command) for command in (stage.name for stage in registry.COMMANDS)}
ARGUMENTS = st.one_of(
    TEXT.map(lambda text: text[:200].replace("\0", "")),
    NUMBERS.map(str).map(lambda text: text[:60]),
    st.sampled_from(
        [
            "embedded",
            "here/a b.jsonl",
            "here/tokens.csv",
            "here/empty.parquet",
            "here",
            "0.1,0.5",
            "1,2,x",
            "-1",
            "1e999",
            "teachability",
            "forward_kl",
            "auto",
            "{}",
            "[1]",
            "cpu",
        ]
    ),
)


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from([*COMMANDS, "fly", ""]))
    flags = COMMANDS.get(command, ["--x"])
    arguments = [command]
    for flag in draw(st.lists(st.sampled_from(flags), max_size=4)):
        arguments += draw(st.sampled_from([[flag, None], [flag], [f"{flag}=" + draw(ARGUMENTS)]]))
    arguments = [draw(ARGUMENTS) if part is None else part for part in arguments]
    return arguments + draw(st.lists(ARGUMENTS, max_size=1))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with input files, and no models to load: what is left of the command line is
    parsing, reading and refusing.
    """
    here = tmp_path / "here"
    here.mkdir()
    (here / "a b.jsonl").write_text('{"prompt": "w1"}\n')
    (here / "tokens.csv").write_text(
        "context_id,prompt_id,position,response_length,token_id,token,forward_kl\n"
        "a,a,0,1,5,w1,0.5\n"
    )
    (here / "empty.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def none(*_, **__):
        raise DiagnosticsError("There are no models on this desk.")

    monkeypatch.setattr(pair, "load_pair", none)
    return tmp_path


OUT = "out put/ü"


@pytest.mark.filterwarnings("ignore")
@cases(0.12)
@given(arguments=command_lines(), fresh=st.booleans())
@example(
    arguments=["run", "--pair", "embedded", "--prompts", "here/a b.jsonl", "--contexts", "-5"],
    fresh=True,
)
@example(
    arguments=["analyze", "--tokens", "here/tokens.csv", "--draws", "1000000000000"], fresh=True
)
def test_command_lines(desk, arguments, fresh):
    before = tree(desk / "here")
    output = [] if arguments[0] == "criteria" else ["--output-dir", OUT]
    COUNTS["command lines"] = COUNTS.get("command lines", 0) + 1
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            code = cli.main([*arguments, *output])
        except SystemExit as stop:  # --help
            code = stop.code
    assert code in (0, 2), (code, errors.getvalue())
    if code == 2:
        assert (
            errors.getvalue().splitlines()[-1:]
            and "error: " in errors.getvalue()
            and "Traceback" not in errors.getvalue()
        )
    assert tree(desk / "here") == before
    assert {path.name for path in desk.iterdir()} <= {"here", OUT.split("/")[0]}


# --- run directories
# ------------------------------------------------------------------------------------

PLACES = [
    "manifest.json",
    "tokens.parquet",
    "contexts.parquet",
    "pages.json",
    "report.html",
    ".lock",
    "tables",
    "tables/verdicts.csv",
    "tables/mine.csv",
    "figures",
    "figures/quadrants.png",
    ".partial",
    ".partial/made-0123456789abcdef",
    ".partial/made-0123456789abcdef/a.parquet",
    "cells",
    "cells/full-1-seed0.json",
    "cells/full-1-seed0.curve.parquet",
    "metrics.jsonl",
    "evaluations.csv",
    "made.csv",
    ".0123456789abcdef.opd.tmp",
]


def to_link(place, outside, content):
    place.symlink_to(outside / ("folder" if len(content) % 2 else "file"))


def to_dangling(place, outside, content):
    place.symlink_to(outside / "nothing")


def to_loop(place, outside, content):
    place.symlink_to(place)


def to_hard_link(place, outside, content):
    os.link(outside / "file", place)


def to_pipe(place, outside, content):
    os.mkfifo(place)


def to_folder(place, outside, content):
    place.mkdir()
    (place / "inner").write_bytes(content)


def to_bytes(place, outside, content):
    place.write_bytes(content)


def to_nothing(place, outside, content):
    pass


DAMAGES = [to_link, to_dangling, to_loop, to_hard_link, to_pipe, to_folder, to_bytes, to_nothing]
MODES = [0o000, 0o200, 0o444, 0o500, 0o755]


def damage(directory, outside, name, kind, content):
    """Put something else in a place; a folder on the way that is none any more keeps it out."""
    place = directory / name
    if any(parent.is_symlink() or parent.is_file() for parent in place.parents):
        return
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    elif os.path.lexists(place):
        place.unlink()
    place.parent.mkdir(parents=True, exist_ok=True)
    kind(place, outside, content)


def cut_or_flip(directory, name, at, cut):
    """Half a file, or one with another byte in it."""
    place = directory / name
    if place.is_symlink() or not place.is_file() or not place.stat().st_size:
        return
    content = bytearray(place.read_bytes())
    at %= len(content)
    if cut:
        del content[at:]
    else:
        content[at] ^= 0x20
    os.unlink(place)  # a hard link's other name keeps its content
    place.write_bytes(content)


def read_all(directory):
    run_results.read_run(directory)


def read_tokens_there(directory):
    schema.read_tokens(directory / "tokens.parquet")


def read_bank_there(directory):
    types.read_bank(directory / "contexts.parquet")


def finish_a_stage(directory):
    with run_directory.open_run(directory) as run:
        made = run.path("made.csv")
        table = pd.DataFrame({"a": [1]})
        run.stage(
            "made", settings={}, outputs=["made.csv"], work=lambda: write_csv(made, table) and None
        )


def write_a_page(directory):
    with run_lock.hold(directory):
        written_pages.write_pages(directory, {"report.html": b"page", "figures/quadrants.png": b""})


USES = [read_all, read_tokens_there, read_bank_there, finish_a_stage, write_a_page]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("finished")
    return study_tables.write_run(folder / "run", verdicts=study_tables.verdicts())


@pytest.mark.filterwarnings("ignore")
@cases(0.08)
@given(
    damages=st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(DAMAGES), st.binary(max_size=40)),
        max_size=3,
    ),
    cuts=st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 10**6), st.booleans())),
    modes=st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(MODES)), max_size=2),
    use=st.sampled_from(USES),
)
def test_damaged_run_directories(finished, damages, cuts, modes, use):
    """Links, pipes, folders, modes, cut and edited files: nothing beyond the directory changes."""
    with tempfile.TemporaryDirectory() as place:
        directory, outside = Path(place, "run"), Path(place, "outside")
        shutil.copytree(finished, directory)
        (outside / "folder").mkdir(parents=True)
        (outside / "file").write_text("precious")
        (outside / "folder/inner").write_text("precious")
        for name, kind, content in damages:
            damage(directory, outside, name, kind, content)
        for name, at, cut in cuts[:2]:
            cut_or_flip(directory, name, at, cut)
        for name, mode in modes:
            if os.path.exists(directory / name) and not os.path.islink(directory / name):
                os.chmod(directory / name, mode)
        before = contents(outside)
        ends_well("run directories", lambda: use(directory))
        assert contents(outside) == before
        subprocess.run(["chmod", "-R", "u+rwX", str(directory)], check=False)


def contents(folder):
    """Names and contents of the files beneath a folder."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
