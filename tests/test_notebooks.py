"""The notebooks run from top to bottom, store no outputs and use the public API."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.pipeline.cli import main

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


SMALLER = (
    (r"dx\.sums\(\d+", "dx.sums(24"),
    (r"--contexts \d+", "--draws 20 --contexts 24"),
    (r"max([-_])new([-_])tokens([= ])\d+", r"max\1new\2tokens\g<3>16"),
    (r"\bdraws=\d+", "draws=20"),  # and not random_draws
    (r"--horizon 5", "--horizon 2"),
    (r"horizon=\(1, 5\)", "horizon=(1, 2)"),
)
"""What makes a notebook small; `make notebooks` runs them as they are."""


def small(code: str) -> str:
    """The code of a notebook with fewer and shorter responses and fewer draws."""
    for pattern, instead in SMALLER:
        code = re.sub(pattern, instead, code)
    return code


def command(words, **_):
    """`subprocess.run` for the commands of a notebook, in this process, which has loaded torch."""
    assert words[:3] == [sys.executable, "-m", "diagnostics"], words
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(words[3:])
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path, monkeypatch, registry):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(subprocess, "run", command)
    code = small("\n".join(cells(path, "code"))) + "\nreached = 'the end'"
    scope = {"__name__": "__main__"}
    exec(compile(code, path.name, "exec"), scope)
    assert scope["reached"] == "the end"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_open_nothing_by_a_place_relative_to_their_folder(path):
    assert not [
        line for source in cells(path, "code") for line in source.split("\n") if "../" in line
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tables_and_lines_fit_a_notebook(path):
    long = [line for code in cells(path, "code") for line in code.split("\n") if len(line) > 100]
    assert long == []


def test_the_first_notebook_asks_which_criterion():
    assert NOTEBOOKS[0].stem == "00_which_criterion"
    assert "# Which criterion for my pair?" in cells(NOTEBOOKS[0], "markdown")[0]


def script():
    """`scripts/notebooks.py` as a module."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_has_the_prose_the_code_and_the_outputs():
    nbformat = pytest.importorskip("nbformat")
    output = nbformat.v4.new_output
    shown = [
        output("stream", name="stdout", text="a \x1b[31mred\x1b[0m <word>\n"),
        output("stream", name="stderr", text="a bar"),
        output("display_data", {script().WIDGET: {}, "text/plain": "rollout:   0%|  | 0/64"}),
        output("display_data", {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}),
        output("execute_result", {"text/html": "<table>\n\n<tr></tr></table>"}),
        output("execute_result", {"text/plain": "'x'"}),
    ]
    code = nbformat.v4.new_code_cell("1 + 1", outputs=shown)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), code])
    text, images = script().page(notebook, "name")
    assert images == {"name_0.png": b"hello"}
    assert text == (
        "# Title\n\n```python\n1 + 1\n```\n\n"
        '<pre class="output">a red &lt;word&gt;</pre>\n\n'
        "![name, figure 1](name_0.png)\n\n"
        '<div class="output"><table>\n<tr></tr></table></div>\n\n'
        '<pre class="output">&#x27;x&#x27;</pre>\n'
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_store_no_outputs_and_use_the_public_api(path):
    assert not any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
    imports = [
        line
        for source in cells(path, "code")
        for line in source.split("\n")
        if line.startswith(("import diag", "from diag"))
    ]
    assert imports == ["import diagnostics as dx"]
    assert len(cells(path, "markdown")) >= 3
