"""The package's public names: real functions, the same for Python, type checkers and editors."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diagnostics as dx

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "diagnostics" / "__init__.pyi"


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")


def stub_imports():
    """The stub's public names with the module and the name there."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_stub_and_the_package_have_the_same_names():
    assigned = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.Assign)]
    assert sorted(ast.literal_eval(assigned[0].value)) == dx.__all__ == sorted(stub_imports())


@pytest.mark.parametrize("name", dx.__all__)
def test_a_name_is_what_the_stub_imports(name):
    module, original = stub_imports()[name]
    home = importlib.import_module(module)
    assert getattr(dx, name) is getattr(home, original)


def test_the_directory_of_the_package_is_its_public_names():
    assert dir(dx) == dx.__all__


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'diagnostics' has no attribute 'no_such'"):
        dx.no_such  # noqa: B018


def test_no_module_at_the_top_bears_a_public_name():
    modules = {path.stem for path in (ROOT / "diagnostics").iterdir()}
    assert sorted(modules & set(dx.__all__)) == []


def test_functions_have_their_parameters_before_and_after_their_first_use():
    names = ("probe", "load_pair", "list_criteria", "score", "study")
    code = "import inspect, diagnostics as dx\n" + "".join(
        f"for _ in range(2): print(*inspect.signature(dx.{name}).parameters)\n" for name in names
    )
    parameters = [" ".join(inspect.signature(getattr(dx, name)).parameters) for name in names]
    assert run_python(code) == [*(each for each in parameters for _ in range(2)), ""]
    assert all(inspect.isfunction(getattr(dx, name)) for name in names)


def test_every_argument_of_a_public_function_is_documented():
    assert run_python(
        "import sys; sys.argv = ['', '--missing']\nimport runpy\n"
        "runpy.run_path('scripts/measure_code.py')['main']()"
    ) == ["", ""]


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, diagnostics; diagnostics.__all__\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code)[0] == "[]"


USER = """
import diagnostics as dx

def use(text: str) -> int:
    reveal_type(dx.probe)
    return len(dx.load_pair(text).name) + dx.load_pair(text)

dx.no_such_thing
dx.load_pair("embedded", no_such_option=1)
"""


SETTINGS = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-accelerate.*,datasets.*,matplotlib.*,numpy.*,pandas.*,peft.*,PIL.*,pyarrow.*,scipy.*]
follow_imports = skip
[mypy-tokenizers.*,torch.*,transformers.*,trl.*]
follow_imports = skip
"""
"""The package's own modules are read; to read its libraries too takes ten times as long."""


def test_a_type_checker_knows_every_name_and_refuses_others(tmp_path):
    for name, text in (("user.py", USER), ("mypy.ini", SETTINGS)):
        (tmp_path / name).write_text(text)
    options = [f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(tmp_path / "user.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert 'Module has no attribute "no_such_thing"' in done.stdout, done.stdout + done.stderr
    assert 'Unexpected keyword argument "no_such_option" for "load_pair"' in done.stdout
    assert 'Revealed type is "def (pair: diagnostics.models.pair.Pair' in done.stdout
