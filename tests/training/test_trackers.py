"""Trackers of a training: the log through TRL, and the tables, with stand-ins for the packages."""

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trl.extras import profiling

from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.stages.validate import _engine_of_cells
from diagnostics.training import trackers
from diagnostics.training.evaluation import EvaluationConfig
from diagnostics.training.run import EngineConfig, TrainConfig, train
from tests.conftest import make_pair, make_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
STUBS = Path(__file__).parent.parent / "stub_trackers"


KEPT = {}
"""Stand-ins that were imported once, so that all tests of a session mean the same modules."""


def of(name):
    return {each: module for each, module in sys.modules.items() if each.split(".")[0] == name}


@pytest.fixture
def installed(monkeypatch):
    """Imports the stand-in for a tracker under its name, with nothing recorded yet."""
    monkeypatch.syspath_prepend(str(STUBS))
    made = []

    def install(name):
        sys.modules.update(KEPT.get(name, {}))
        stub = importlib.import_module(name)
        stub.calls.clear()
        stub.run = None
        # TRL imports the trackers that there are when it is imported itself, which may be long ago.
        monkeypatch.setattr(profiling, name, stub, raising=False)
        made.append(name)
        return stub

    yield install
    for name in made:
        KEPT[name] = of(name)
        for module in KEPT[name]:
            del sys.modules[module]


def trained(folder, tracker, **options):
    return train(
        make_pair(),
        make_prompts(16)[:12],
        output_dir=folder,
        config=TrainConfig(steps=2, batch=4, budget=0.3),
        engine=EngineConfig(max_new_tokens=6, save_every=0, report_to=tracker, **options),
        held_out=make_prompts(16)[12:],
        evaluation=EvaluationConfig(eval_samples=1),
    )


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_the_log_and_both_tables(tmp_path, installed, name):
    stub = installed(name)
    result = trained(tmp_path / "mine", name)
    assert ("init", "mine") in stub.calls
    logged = [given for kind, given in stub.calls if kind == "log"]
    steps = [given for given in logged if "train/loss" in given]
    assert len(steps) == 2
    assert steps[0]["train/overlap_ratio"] == result.metrics["overlap_ratio"][0]
    given = {key: each.dataframe for part in logged for key, each in part.items() if is_table(each)}
    assert given.keys() == {"selection_log", "evaluations"}
    pd.testing.assert_frame_equal(given["selection_log"], result.metrics)
    pd.testing.assert_frame_equal(given["evaluations"], result.evaluations)


def is_table(value):
    return type(value).__name__ == "Table"


def test_without_a_tracker_the_training_is_the_same(tmp_path, installed):
    stub = installed("trackio")
    plain, told = trained(tmp_path / "plain", "none"), trained(tmp_path / "told", "trackio")
    pd.testing.assert_frame_equal(plain.metrics, told.metrics)
    for name in ("train.json", "metrics.jsonl", "evaluations.parquet"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()
    assert stub.calls


class Writer:
    def __init__(self):
        self.texts = {}

    def add_text(self, name, text, step):
        self.texts[name] = text, step


def test_tables_are_text_in_tensorboard():
    made = trackers.TensorboardTables.__new__(trackers.TensorboardTables)
    made.writer = Writer()
    table = pd.DataFrame({"measure": ["a|b", "c"], "mean": [0.12345678, np.nan], "step": [1, 2]})
    made.log({"evaluations": table}, 7)
    text, step = made.writer.texts["evaluations"]
    assert step == 7 and text.split("\n") == [
        "| measure | mean | step |",
        "| --- | --- | --- |",
        "| a\\|b | 0.1235 | 1 |",
        "| c |  | 2 |",
    ]


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DiagnosticsError,
        match=rf"^--report-to {name} needs the package {name}, which is not installed\. Run `pip",
    ):
        trained(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(DiagnosticsError, match=r"^Unknown tracker 'mlflow'\. Known are none, "):
        trained(tmp_path, "mlflow")


def test_two_trackers_are_refused(installed):
    installed("wandb")
    with pytest.raises(
        DiagnosticsError, match=r"^--report-to names wandb and --trl tensorboard\. Name one"
    ):
        trackers.require_tracker("wandb", {"report_to": "tensorboard"})
    trackers.require_tracker("wandb", {"report_to": "none"})


def test_a_grid_reports_to_no_tracker():
    with pytest.raises(DiagnosticsError, match=r"^A grid of trainings reports to no tracker: "):
        _engine_of_cells(EngineConfig(report_to="wandb"))
