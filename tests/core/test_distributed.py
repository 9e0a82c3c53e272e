"""Several processes give the tables of one, refuse as one does, and go on after a kill."""

import os
import signal
import time

import numpy as np
import pandas as pd
import pytest

from diagnostics.core import distributed
from diagnostics.core.files import sha256_file
from diagnostics.pipeline.cli import main
from tests import launched_stages
from tests.launch import forked, torchrun

of_a_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def stages(folders):
    """Commands by stage, in small batches, so that both processes have some of each half."""
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    small = [*models, "--batch-tokens", "60"]
    return {
        "rollout": folders[:10] + models[4:],
        "score": small,
        "probe": [*small, "--folds", "2"],
        "intervene": [
            *small,
            "--criteria",
            "divergence",
            "--budgets",
            "0.3",
            "--random-draws",
            "1",
            "--horizon",
            "2",
            "--minibatch",
            "2",
            "--learning-rate",
            "1e-3",
            "--draws",
            "9",
        ],
        "attribute": [*small, "--sample", "6", "--draws", "9"],
    }


def commands(stages, directory):
    """The command lines of the stages."""
    where = ["--output-dir", str(directory)]
    return [[stage, *options, *where] for stage, options in stages.items()]


def fail_first():
    """The first copy fails at once, and the other waits for it."""
    if os.environ["RANK"] == "0":
        os._exit(3)
    time.sleep(60)


@of_a_fork
@pytest.mark.parametrize("_", range(5))
def test_a_copy_that_fails_ends_the_others(_):
    assert forked(2, fail_first) == [3, -signal.SIGKILL]


@pytest.fixture(scope="module")
def together(stages, tmp_path_factory):
    """Every stage in two processes."""
    directory = tmp_path_factory.mktemp("together") / "out"
    assert forked(2, launched_stages.do, commands(stages, directory)) == [0, 0]
    return directory


@pytest.mark.slow
@of_a_fork
def test_two_processes_give_one_process_s_tables(stages, together, tmp_path):
    alone = tmp_path / "alone"
    for stage, options in stages.items():
        assert main([stage, *options, "--output-dir", str(alone)]) == 0
    for name in ("contexts.parquet", "scores.parquet"):
        assert sha256_file(alone / name) == sha256_file(together / name), name
    one, two = (pd.read_parquet(folder / "tokens.parquet") for folder in (alone, together))
    keys = ["context_id", "position", "fold"]
    assert one[keys].equals(two[keys])
    for name in one.select_dtypes("float"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-6, rtol=1e-6, err_msg=name)
    assert one.context_gain.abs().max() > 1e-4 and one.first_order_gain.abs().max() > 1e-4
    for name in ("intervention", "linearity", "kernel_shares"):
        pd.testing.assert_frame_equal(
            *(pd.read_csv(folder / f"tables/{name}.csv") for folder in (alone, together)),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.slow
@of_a_fork
@pytest.mark.parametrize(
    "folder, killed, later", [("responses", "0", 2), ("scores", "01", 1), ("global-", "0", 2)]
)
def test_processes_killed_at_once_go_on_and_the_files_are_the_same(
    stages, together, tmp_path, folder, killed, later
):
    out = tmp_path / "out"
    measured = commands({name: stages[name] for name in ("rollout", "score", "probe")}, out)
    assert -signal.SIGKILL in forked(2, launched_stages.do, measured, folder, killed)
    assert any(out.glob(f".partial/*/{folder}*/*.parquet")) and not (out / "gains.parquet").exists()
    assert not any(forked(later, launched_stages.do, measured))
    names = ("contexts.parquet", "scores.parquet", "gains.parquet", "tables/calibration.csv")
    names += ("tables/placebo.csv",)
    assert [sha256_file(out / name) for name in names] == [
        sha256_file(together / name) for name in names
    ]
    assert [path.name for path in out.glob(".*")] == [".lock"]


@pytest.mark.slow
def test_two_processes_refuse_as_one_does(folders, tmp_path):
    done = torchrun(
        2, "-m", "diagnostics", "run", "--pair", "nowhere", "--output-dir", str(tmp_path / "x")
    )
    assert done.returncode != 0 and "error: Unknown pair 'nowhere'" in done.stderr
    assert "DiagnosticsError" not in done.stderr and "pipeline/cli.py" not in done.stderr


def test_alone_everything_is_the_identity():
    assert distributed.world() == 1 and distributed.is_main()
    assert distributed.share([3, 1, 2], float) == [3, 1, 2]
    values = np.arange(3.0)
    assert distributed.sum_over_processes(values) is values and distributed.names(["a"]) == {"a"}
    assert distributed.barrier() is None and distributed.local_device("auto") == "auto"


def test_shares_are_disjoint_complete_and_even(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    costs = [9, 1, 5, 4, 4, 3, 7, 2]
    parts = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        parts.append(distributed.share(list(enumerate(costs)), lambda item: item[1]))
    assert sorted(index for part in parts for index, _ in part) == list(range(8))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(cost for _, cost in part) for part in parts]
    assert max(loads) - min(loads) <= 2
