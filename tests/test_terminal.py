"""The command line at a terminal: steering characters, a reader that goes, half a launcher, odd
paths.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.core import distributed
from diagnostics.pipeline.cli import main, printable

ROOT = Path(__file__).parent.parent


def test_characters_that_steer_a_terminal_are_written_out():
    assert (
        printable("a\x1b[31mb\x07\r\x9bc\u202ed\udcff é\n\t🙂")
        == "a\\x1b[31mb\\x07\\r\\x9bc\\u202ed\\udcff é\n\t🙂"
    )


def test_a_manifest_s_words_reach_the_terminal_written_out(tmp_path, capsys):
    record = {"settings": {}, "inputs": {}, "files": {}}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"versions": {"torch": "\x1b]0;owned\x07"}, "stages": {"\x1b[2J": record}})
    )
    assert (
        main(["rerun", str(tmp_path / "manifest.json"), "--output-dir", str(tmp_path / "again")])
        == 2
    )
    assert main(["analyze", "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        "\x1b" not in said
        and "\x07" not in said
        and r"\x1b[2J" in said
        and r"\x1b]0;owned\x07" in said
    )


def test_a_reader_that_goes_is_no_fault():
    command = f"{sys.executable} -m diagnostics criteria; echo code $? >&2"
    with subprocess.Popen(
        ["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shell:
        shell.stdout.close()  # before anything is printed
        error = shell.stderr.read()
    assert shell.returncode == 0 and error == "code 141\n"


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, capsys, given):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["criteria"]) == 2
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    assert (
        capsys.readouterr().err
        == f"error: The environment has {said}, and not all that a launcher sets (RANK below"
        " WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Start with torchrun or accelerate launch, or"
        " unset RANK and WORLD_SIZE.\n"
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
)
def test_a_whole_launcher_or_none_is_accepted(monkeypatch, given):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert distributed.require_launcher() is None


LONG = "a" * 300


@pytest.mark.parametrize(
    "command",
    [
        ["report", LONG],
        ["report", "--against", LONG, LONG, "--output-dir", "x"],
        ["analyze", "--against", LONG, "--output-dir", "x"],
        ["analyze", "--tokens", LONG, "--output-dir", "x"],
        ["analyze", "--output-dir", LONG],
        ["rerun", LONG, "--output-dir", "x"],
        [
            "rollout",
            "--student",
            LONG,
            "--teacher",
            LONG,
            "--prompts",
            "x.jsonl",
            "--output-dir",
            "x",
        ],
        ["rollout", "--pair", "embedded", "--prompts", LONG, "--output-dir", "x"],
    ],
)
def test_a_name_longer_than_file_systems_allow_is_one_sentence(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--quiet"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def on_a_terminal(*command, size, folder):
    """What a command writes to a pseudo-terminal of a size, and its exit code."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end has gone
            part = b""
        if not part:
            break
        said += part
    os.close(ours)
    return said.decode(), process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(0, 0), (24, 50)])
def test_a_terminal_of_any_size_shows_the_stage_and_its_time(size, tmp_path, folders):
    flags = [*folders[:6], "--contexts", "8", "--max-new-tokens", "4", "--device", "cpu"]
    said, code = on_a_terminal("rollout", *flags, "--output-dir", "out", size=size, folder=tmp_path)
    assert code == 0 and "\rstage 1 of 1 (rollout)" in said
    assert "INFO stage 1 of 1 (rollout): done in" in said and "Traceback" not in said
    drawn = [part for line in said.split("\n") for part in line.split("\r") if "stage 1" in part]
    assert max(len(part) for part in drawn if "INFO" not in part) <= (size[1] or 80) - 1
