"""A file of one's own criteria on the command line, and what is recorded of it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import diagnostics as dx
from diagnostics import criteria
from diagnostics.core.tables import write_parquet
from diagnostics.pipeline import run as run_directory
from diagnostics.pipeline.cli import main
from tests.made_tokens import made_tokens

MINE = """
import diagnostics as dx


@dx.criterion("mine_alone", needs=["forward_kl", "student_entropy"])
def mine_alone(table):
    return table.forward_kl - {weight} * table.student_entropy
"""


@pytest.fixture
def module(tmp_path, registry):
    """A file with one criterion; what it registers is forgotten after the test."""
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(weight=1.0))
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_a_file_registers_its_criteria_once(module):
    tokens = made_tokens(4, 6)
    criteria.load_module(module)
    criteria.load_module(str(module))
    scores = dx.score_criterion(tokens, "mine_alone")
    np.testing.assert_allclose(scores, tokens.forward_kl - tokens.student_entropy)
    assert criteria.loaded_modules() == f"mine.py {digest(module)}"
    assert criteria.find("mine_alone").version == criteria.loaded_modules()
    assert criteria.find("teachability").version == ""
    assert os.environ[criteria.MODULES_VARIABLE] == str(module)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, r"mine\.py cannot be read \(No such file or directory\)\. Name a Python file"),
        ("x = (", r"mine\.py cannot be run \(SyntaxError: .*shows where it fails\.$"),
        ("1 / 0", r"mine\.py cannot be run \(ZeroDivisionError: division by zero\)"),
        ("x = 1", r"mine\.py registers no criterion\. Decorate a function"),
        (
            "import diagnostics as dx\ndx.criterion('z', needs=['compat'])",
            r"^Criterion 'z' needs the column 'compat', .* Did you mean 'compatibility'\?",
        ),
    ],
)
def test_a_file_that_cannot_serve_is_refused(text, sentence, module):
    module.unlink() if text is None else module.write_text(text)
    with pytest.raises(dx.DiagnosticsError, match=sentence):
        criteria.load_module(module)
    assert criteria.loaded_modules() == ""


def test_a_process_that_is_started_knows_the_same_criteria(module):
    criteria.load_module(module)
    code = "import diagnostics as dx; print('mine_alone' in dx.list_criteria().index)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_only_stages_that_score_by_criteria_record_the_file(module):
    plain = {name: run_directory._version(name, ("criteria",)) for name in ("score", "compare")}
    criteria.load_module(module)
    assert run_directory._version("score", ("criteria",)) == plain["score"]
    assert run_directory._version("compare", ("criteria",)) == (
        f"{plain['compare']} with mine.py {digest(module)}"
    )


def test_the_command_line_compares_by_a_criterion_of_the_users(module, tmp_path, capsys):
    out = tmp_path / "run"
    write_parquet(tmp_path / "tokens.parquet", made_tokens(8, 8))
    command = ["compare", "--tokens", str(tmp_path / "tokens.parquet"), "--output-dir", str(out)]
    command += ["--criteria", "mine_alone,entropy", "--budgets", "10%", "--draws", "20", "--quiet"]
    assert main(command) == 2
    assert "--criterion-module names" in capsys.readouterr().err
    assert main([*command, "--criterion-module", str(module)]) == 0
    table = (out / "tables" / "selection_curves.csv").read_text()
    assert "mine_alone" in table
    manifest = json.loads((out / "manifest.json").read_text())
    version = manifest["stages"]["compare"]["code"]["version"]
    assert version.endswith(f" with mine.py {digest(module)}")
