"""What the source never does, and what a run's files never hold. Read off the syntax tree, so a
comment or a string cannot hide a call.
"""

import ast
import json
import os
import platform
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.run import open_run

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "diagnostics").rglob("*.py"))
SOURCES = [
    *PACKAGE,
    *sorted((ROOT / "scripts").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
OWN_PROCESSES = ("ahead.py", "processes.py")
"""Modules that exchange objects with a process which they have started themselves, over its pipes
and in a folder that only its user can read; they open no file that comes from elsewhere."""
UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}
SHELLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pty.spawn",
    "os.execl",
    "os.spawnl",
}
NETWORK = {
    "socket",
    "http",
    "urllib",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "asyncio",
}


def nodes(kind, paths=SOURCES):
    return [
        (path, node) for path in paths for node in ast.walk(TREES[path]) if isinstance(node, kind)
    ]


def name_of(function) -> str:
    """`a.b.c` of a called function, as far as it is written so."""
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join(
        reversed([*parts, function.id] if isinstance(function, ast.Name) else [*parts, "?"])
    )


def imported(paths=SOURCES):
    for path, node in nodes((ast.Import, ast.ImportFrom), paths):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
        yield from ((path.name, name.split(".")[0]) for name in names)


def calls(paths=SOURCES):
    return [(path.name, name_of(node.func), node) for path, node in nodes(ast.Call, paths)]


def test_nothing_is_unpickled():
    used = {found for found in imported() if found[1] in UNPICKLERS}
    assert used == {(name, "pickle") for name in OWN_PROCESSES}
    unsafe = {
        "torch.load",
        "torch.save",
        "pd.read_pickle",
        "pandas.read_pickle",
        "np.load",
        "numpy.load",
        "eval",
        "exec",
        "compile",
        "__import__",
    }
    assert [
        (path, name) for path, name, _ in calls() if name in unsafe or name.endswith(".to_pickle")
    ] == []


def test_models_bring_no_code_and_no_pickled_weights():
    """`trust_remote_code` is passed nowhere as True; what names it passes a user's own flag on."""
    given = [
        (path, keyword.value)
        for path, _, call in calls()
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert [path for path, value in given if isinstance(value, ast.Constant) and value.value] == []


def test_no_shell():
    assert [(path, name) for path, name, _ in calls() if name in SHELLS] == []
    assert [
        path
        for path, _, call in calls()
        for keyword in call.keywords
        if keyword.arg == "shell"
        and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ] == []
    # The package starts no program but Python itself, with a module of its own.
    started = {found for found in imported(PACKAGE) if found[1] in ("subprocess", "pty")}
    assert started == {("ahead.py", "subprocess")}
    (call,) = [call for path, name, call in calls(PACKAGE) if name.startswith("subprocess.")]
    program, switch, module, *_ = call.args[0].elts
    assert ast.unparse(program) == "sys.executable"
    assert (switch.value, module.id) == ("-m", "__name__")


def test_the_package_opens_no_connection_of_its_own():
    """Only transformers and datasets fetch, and only what an id names; and one module asks the
    server that `ask-teacher` is given, through the standard library.
    """
    found = {found for found in imported(PACKAGE) if found[1] in NETWORK}
    assert found == {("connection.py", "http"), ("connection.py", "urllib")}
    (asking,) = [path for path in PACKAGE if path.name == "connection.py"]
    assert asking.parent.name == "served"
    opened = [name for _, name, _ in calls([asking]) if "urlopen" in name or "Proxy" in name]
    assert opened == []  # those would read proxies from the environment


def test_only_the_command_that_is_given_a_url_reaches_the_module_that_connects():
    """`ask` alone imports `connection`'s server, and only the stage `ask-teacher` imports `ask`."""
    users: dict[str, set[str]] = {}
    for path, node in nodes(ast.ImportFrom, PACKAGE):
        if (node.module or "").startswith("diagnostics.models.served"):
            users.setdefault(node.module.rpartition(".")[2], set()).add(path.name)
    assert users["connection"] == {"ask.py", "dialects.py"}
    assert users["ask"] == {"ask_teacher.py"}


def test_the_environment_is_asked_for_named_settings_only():
    allowed = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "OPD_DIAGNOSTICS_CACHE",
        "XDG_CACHE_HOME",
        "CUDA_VISIBLE_DEVICES",
        "THP_MEM_ALLOC_ENABLE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "TRITON_INTERPRET",
        "XDG_STATE_HOME",
        "PYTHONPATH",
        "NO_COLOR",
        "FORCE_COLOR",
        # criteria.MODULES_VARIABLE, the files of the user's own criteria; and the variable that the
        # user names with --api-key-env
        "?",
    }
    asked = {
        (path, call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else "?")
        for path, name, call in calls(PACKAGE)
        if name in ("os.environ.get", "os.environ.setdefault", "os.getenv")
    }
    assert {name for _, name in asked} <= allowed
    assert {path for path, name in asked if name == "?"} == {"criteria.py", "ask.py"}
    read = Counter(p.name for p, node in nodes(ast.Attribute, PACKAGE) if node.attr == "environ")
    called = Counter(p for p, name, _ in calls(PACKAGE) if name.startswith("os.environ"))
    # A child process gets the environment as it is, and the names of the user's own criteria.
    assert read - called == Counter({"ahead.py": 1, "criteria.py": 1}), (
        "os.environ is used otherwise than by os.environ.get"
    )


@pytest.mark.slow
def test_a_run_with_local_models_needs_no_network_and_its_files_tell_nothing_of_the_machine(
    folders, tmp_path, monkeypatch
):
    secrets = {
        "HF_TOKEN": "hf_Q7secretQ7",
        "AWS_SECRET_ACCESS_KEY": "aws-Q7secretQ7",
        "WANDB_API_KEY": "wandb-Q7secretQ7",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def refused(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    directory = tmp_path / "out"
    for module, name in (
        (socket, "gethostname"),
        (socket, "getfqdn"),
        (platform, "node"),
    ):  # a name that no chance puts into packed numbers
        monkeypatch.setattr(module, name, lambda *_: "host-Q7secretQ7")
    home = (
        tmp_path.parent / f"{tmp_path.name}-home/alice-Q7secretQ7"
    )  # models and prompts lie in the user's home
    for name in ("student", "teacher"):
        shutil.copytree(folders[1 if name == "student" else 3], home / name)
    shutil.copy(folders[5], home)
    monkeypatch.setenv("HOME", str(home))
    mine = [
        "--student",
        str(home / "student"),
        "--teacher",
        str(home / "teacher"),
        "--prompts",
        str(home / "prompts.jsonl"),
        *folders[6:10],
    ]
    models = [*mine[:4], "--device", "cpu", "--quiet", "--output-dir", str(directory)]
    assert main(["rollout", *mine, *models[4:]]) == 0 and main(["score", *models]) == 0
    assert (
        main(["probe", *models]) == 0
        and main(["analyze", "--draws", "20", "--quiet", *models[-2:]]) == 0
    )
    assert main(["report", str(directory), "--quiet"]) == 0
    told = [
        *secrets.values(),
        "Q7secret",
        socket.gethostname(),
        os.environ.get("PATH", "\0"),
        str(home),
    ]
    for path in directory.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [value for value in told if value.encode() in content] == [], path
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert set(json.loads((directory / "manifest.json").read_text())) == {
        "format",
        "primary",
        "versions",
        "stages",
        "joined",
    }


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_names_from_a_manifest_do_not_lead_out_of_the_directory(tmp_path, name):
    record = {"settings": {}, "inputs": {}, "files": {name: "0" * 64}}
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "manifest.json").write_text(json.dumps({"stages": {"x": record}}))
    with (
        pytest.raises(DiagnosticsError, match="names a file outside its directory"),
        open_run(directory),
    ):
        raise AssertionError("opened")
