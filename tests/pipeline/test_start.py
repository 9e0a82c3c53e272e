"""Reading the command line: help and refusals load no model library; stages are found by name."""

import json
import subprocess
import sys

from diagnostics.pipeline import ahead
from diagnostics.pipeline.registry import BY_NAME, COMMANDS, STAGES

HEAVY = ("torch", "transformers", "trl", "accelerate", "statsmodels", "matplotlib")
CODE = """
import contextlib, io, json, sys
from diagnostics.pipeline.cli import main

def loaded(arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    return arguments, code, [name for name in {heavy} if name in sys.modules]

print(json.dumps([loaded(arguments) for arguments in {calls}]))
"""


def started(calls):
    """What each call of the command line ended with, and which heavy libraries were loaded then."""
    code = CODE.format(heavy=HEAVY, calls=calls)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def test_the_help_of_no_command_loads_a_model_library():
    calls = [["--version"], ["--help"], *([stage.name, "--help"] for stage in COMMANDS)]
    assert started(calls) == [[call, 0, []] for call in calls]


def test_a_refused_flag_or_value_is_refused_without_a_model_library():
    calls = [
        ["run", "--no-such-flag"],
        ["probe", "--loss", "no_such_loss", "--output-dir", "x"],
        ["train", "--trl"],
        ["score", "--dtype", "float8", "--output-dir", "x"],
        ["no-such-command"],
    ]
    assert started(calls) == [[call, 2, []] for call in calls]


def test_a_setting_that_cannot_be_is_refused_without_a_model_library(tmp_path):
    where = ["--output-dir", str(tmp_path / "x")]
    calls = [
        ["run", "--pair", "embedded", "--step", "-1", *where],
        ["probe", "--pair", "embedded", "--nulls", "sideways", *where],
        ["intervene", "--pair", "embedded", "--horizon", "1,-5", *where],
        ["score", "--pair", "embedded", "--extra", "no_such", *where],
        ["train", "--pair", "embedded", "--steps", "0", *where],
    ]
    assert started(calls) == [[call, 2, []] for call in calls]
    assert not (tmp_path / "x").exists()


def test_every_stage_names_a_function_that_exists():
    named = [stage for stage in STAGES if stage.run is not None]
    assert {"rollout", "after", "paper"} <= {stage.name for stage in named}
    assert all(callable(stage.function()) for stage in named)
    assert all(callable(BY_NAME[name].function("task_of")) for name in ahead.MAKERS)
