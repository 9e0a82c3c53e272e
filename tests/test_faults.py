"""What machines do to a run: killed, interrupted, out of room or memory, damaged files. Nothing is
lost and no part is taken for a whole.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.core import progress, tables
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.types import Bank, Context, read_bank
from diagnostics.models.pair import assemble, load_pair
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.run import open_run
from diagnostics.probing import scores
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from tests.conftest import make_bank, make_model, make_tokenizer

ROOT = Path(__file__).parent.parent
SMALL = ["--batch-tokens", "60"]


def hashes(directory):
    """Every file of a run directory that is not hidden, with its hash."""
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


def hidden(directory):
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "/." in f"/{path.relative_to(directory)}"
    )


def measure(options, directory):
    """What the main job measures, without the tables and pages that follow from it: exit code of
    the last stage begun.
    """
    models, out = [*options[:4], "--device", "cpu", "--quiet"], ["--output-dir", str(directory)]
    stages = (
        ["rollout", *options[:10], *models[4:]],
        ["score", *models, *SMALL],
        ["probe", *models, *SMALL, "--folds", "2"],
    )
    return next((code for stage in stages if (code := main([*stage, *out]))), 0)


@pytest.fixture(scope="module")
def reference(folders, tmp_path_factory):
    """Measured in small batches, never interrupted."""
    directory = tmp_path_factory.mktemp("reference") / "out"
    assert measure(folders, directory) == 0
    return directory


class Stop:
    """Counts the batches that a model runs, and raises before one of them."""

    def __init__(self, monkeypatch):
        self.calls, self.at, real = 0, None, scores.Batch.states

        def states(batch, model):
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            return real(batch, model)

        monkeypatch.setattr(scores.Batch, "states", states)

    def count(self, at=None):
        self.calls, self.at = 0, at
        return self


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.setattr(progress, "SHARD_SECONDS", 0.0)
    return Stop(monkeypatch)


@pytest.fixture(scope="module")
def total(reference, folders, tmp_path_factory):
    """Batches that models run in a job that keeps each at once and is never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "SHARD_SECONDS", 0.0)
        counted, directory = Stop(patch), tmp_path_factory.mktemp("whole") / "out"
        assert measure(folders, directory) == 0
    assert hashes(directory) == hashes(reference)
    return counted.calls


@pytest.mark.parametrize("at", [7, -8, -2])
def test_an_interrupted_job_goes_on_at_the_batch_where_it_was(
    reference, total, folders, tmp_path, stop, capsys, at
):
    assert (stop.count(at % (total + 1)), measure(folders, tmp_path / "out"))[1] == 130
    assert (
        capsys.readouterr().err
        == "stopped; what was finished is kept, and the same command goes on from there\n"
    )
    assert any(name.startswith(".partial/") for name in hidden(tmp_path / "out"))
    done = at % (total + 1) - 1
    stop.count()
    assert measure(folders, tmp_path / "out") == 0
    assert stop.calls < total - (done > 20)  # what was measured is not measured again
    assert hashes(tmp_path / "out") == hashes(reference)
    assert hidden(tmp_path / "out") == [".lock"]


# --- killed, terminated, two at once
# --------------------------------------------------------------------


def in_a_process(options, directory):
    """Measuring in a process of its own, forked from this one, every finished batch on disk at
    once.
    """

    def child():
        progress.SHARD_SECONDS = 0.0
        os._exit(measure(options, directory))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def there(directory, pattern):
    try:
        return any(True for _ in directory.glob(pattern))
    except FileNotFoundError:  # a folder that was removed while it was listed
        return False


def wait_for(directory, pattern, process):
    while not there(directory, pattern):
        assert process.is_alive(), f"the job ended before {pattern} was there"
        time.sleep(0.001)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "pattern",
    [
        ".partial/rollout-*/responses-*/*.parquet",
        ".partial/score-*/scores/*.parquet",
        ".partial/probe-*/after-*/*.parquet",
        ".partial/probe-*/direction-global-fold1/*.parquet",
    ],
)
def test_killed_at_once_the_job_goes_on_and_its_files_are_the_same(
    reference, folders, tmp_path, pattern
):
    process = in_a_process(folders, tmp_path / "out")
    wait_for(tmp_path, f"out/{pattern}", process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and hashes(tmp_path / "out") != hashes(reference)
    assert measure(folders, tmp_path / "out") == 0
    assert hashes(tmp_path / "out") == hashes(reference) and hidden(tmp_path / "out") == [".lock"]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_second_process_is_refused_and_sigterm_ends_as_ctrl_c_does(
    reference, folders, tmp_path, capfd
):
    process = in_a_process(folders, tmp_path / "out")
    wait_for(tmp_path, "out/.partial/score-*/scores/*.parquet", process)
    process_stopped = os.kill(process.pid, signal.SIGSTOP)
    assert process_stopped is None and measure(folders, tmp_path / "out") == 2
    assert (
        "is in use by another process. Wait for it to end, or choose another --output-dir."
        in capfd.readouterr().err
    )
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 143
    assert (
        "stopped; what was finished is kept, and the same command goes on from there"
        in capfd.readouterr().err
    )
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert measure(folders, tmp_path / "out") == 0 and hashes(tmp_path / "out") == hashes(reference)


# --- the disk
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, code, words, number",
    [
        ("fsync", errno.ENOSPC, "No space left on device", 1),
        ("fsync", errno.ENOSPC, "No space left on device", 6),
        ("fsync", errno.ENOSPC, "No space left on device", 9),
        ("replace", errno.EIO, "Input/output error", 4),
    ],
)
def test_a_disk_that_gives_out_is_named_and_the_job_goes_on_when_it_is_back(
    reference, folders, tmp_path, monkeypatch, capsys, call, code, words, number
):
    calls, real = [], getattr(os, call)

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= number:
            raise OSError(code, words)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        assert measure(folders, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert (
        error.startswith("error: ")
        and f" cannot be written ({words}). Nothing finished was lost. Make room or choose"
        " another --output-dir"
        in error
    )
    known = hashes(reference)
    assert all(
        name == "manifest.json" or digest == known[name]
        for name, digest in hashes(tmp_path / "out").items()
        if name in known
    )
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert measure(folders, tmp_path / "out") == 0 and hashes(tmp_path / "out") == known


def test_a_small_file_system_fills_up(folders, tmp_path, capsys):
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=8k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("no file system can be mounted here; a full disk is injected above")
    try:
        assert measure(folders, tmp_path / "out") == 2
        assert (
            "cannot be written (No space left on device). Nothing finished was lost."
            in capsys.readouterr().err
        )
        assert (
            not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "out/contexts.parquet").exists()
        )
    finally:
        os.system(f"umount {tmp_path}")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Path,
        "mkdir",
        lambda self, **_: (_ for _ in ()).throw(
            PermissionError(errno.EACCES, "Permission denied", str(self))
        ),
    )
    assert main(["rollout", "--pair", "embedded", "--output-dir", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'out'} cannot be used as output directory (Permission denied)."
        " Choose a folder that can be written.\n"
    )


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, how",
    [
        ("contexts.parquet", "flipped"),
        ("scores.parquet", "cut"),
        ("gains.parquet", "cut"),
        ("gains.parquet", "flipped"),
        ("tokens.parquet", "flipped"),
        ("tables/calibration.csv", "cut"),
    ],
)
def test_a_damaged_file_is_made_again_and_never_read(
    reference, folders, tmp_path, capsys, name, how
):
    directory = tmp_path / "out"
    shutil.copytree(reference, directory)
    damaged(directory / name, how)
    if name in ("contexts.parquet", "scores.parquet", "tokens.parquet"):
        stage = (
            ["analyze", "--draws", "20"]
            if name == "tokens.parquet"
            else ["intervene", *folders[:4], "--device", "cpu"]
        )
        assert main([*stage, "--quiet", "--output-dir", str(directory)]) == 2
        said = capsys.readouterr().err
        if name == "scores.parquet":  # read before the stage begins, for what it holds of K
            assert f"{directory / name} is not as it was written. Run the stage that" in said
        else:
            assert f"reads {directory / name}, which is not as it was written: its sha256" in said
    assert measure(folders, directory) == 0
    assert hashes(directory) == hashes(reference)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_weights_are_refused(reference, folders, tmp_path, capsys, how):
    student, directory = tmp_path / "student", tmp_path / "out"
    shutil.copytree(folders[1], student)
    shutil.copytree(reference, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    for record in manifest["stages"].values():
        if "student" in record["settings"]:
            record["settings"]["student"] = str(student)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    damaged(student / "model.safetensors", how)
    assert (
        main(
            [
                "score",
                "--student",
                str(student),
                *folders[2:4],
                "--device",
                "cpu",
                *SMALL,
                "--quiet",
                "--output-dir",
                str(directory),
            ]
        )
        == 2
    )
    assert "of another configuration (model student: was " in capsys.readouterr().err
    if how == "cut":
        with pytest.raises(DiagnosticsError, match="No model can be loaded from"):
            load_pair(student=student, teacher=folders[3], device="cpu")


# --- memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError("injected"), torch.OutOfMemoryError("injected")])
def test_models_too_large_for_the_machine(folders, tmp_path, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    assert measure(folders, tmp_path / "out") == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            f"error: The memory does not suffice ({error}). What was finished is kept. Use"
            " smaller --batch-tokens, "
            "--teacher-dtype bfloat16 or --offload-teacher, or a larger machine."
        )
    )


def test_out_of_memory_in_the_middle_halves_and_goes_on(reference, folders, tmp_path, monkeypatch):
    from diagnostics.models.readout import Readout

    real, failures = Readout.hidden, []

    def hidden(readout, ids_BT, mask_BT):
        if len(ids_BT) > 2 and len(failures) < 6:
            failures.append(len(ids_BT))
            raise torch.OutOfMemoryError("injected")
        return real(readout, ids_BT, mask_BT)

    monkeypatch.setattr(Readout, "hidden", hidden)
    assert measure(folders, tmp_path / "out") == 0 and len(failures) == 6
    expected, found = (
        pd.read_parquet(directory / "tokens.parquet") for directory in (reference, tmp_path / "out")
    )
    np.testing.assert_allclose(found.gain, expected.gain, atol=1e-5)


# --- numbers
# --------------------------------------------------------------------------------------------


def poisoned(seed, token, value=float("nan"), **options):
    """A model whose states are not finite from the given id on, that id included."""
    model = make_model(seed, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    return model


CLEAN = tuple(
    Context(f"c{i}", f"p{i}", "", (0, 5 + i), "", tuple(range(4, 44)), False) for i in range(8)
)
TOUCHED = Context("c8", "p8", "", (0, 5), "", (5, 60, 6), False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_positions_without_finite_logits_are_excluded_counted_and_named(whose, value, caplog):
    models = {"student": make_model(1), "teacher": make_model(2)} | {
        whose: poisoned(1 if whose == "student" else 2, 60, value)
    }
    pair = assemble("nan", models["student"], models["teacher"], make_tokenizer())
    bank = Bank((*CLEAN, TOUCHED))
    tokens = score(pair, bank)
    bad = tokens.forward_kl.isna()
    assert set(tokens.context_id[bad]) == {"c8"} and bad.sum() in (
        2,
        3,
    )  # attention may carry a NaN to all of its context
    first = tokens.position[bad].iloc[0]
    counted = (
        f"{bad.sum()} are the student's and 0"
        if whose == "student"
        else f"0 are the student's and {bad.sum()}"
    )
    assert (
        f"{bad.sum()} of 323 positions have NaN or infinite logits and are excluded (the first"
        f" at position {first} of context 'c8', the {whose}'s; "
        f"of {bad.sum()} looked at, {counted} the teacher's alone)"
    ) in caplog.text
    result = probe(pair, bank, tokens=tokens)
    assert (result.tokens.gain.isna() == bad).all() and result.tokens.gain[~bad].abs().max() > 0
    assert (result.tokens.context_gain.isna() == bad).all()
    assert result.tokens.token_identity_gain.notna().all()
    assert result.step.step_positions == int(
        ((result.tokens.fold == 0) & (tokens.context_id != "c8")).sum()
    )


def test_an_overflowing_fp16_teacher_stops_the_run_and_is_named(bank):
    teacher = make_model(2).half()
    with torch.no_grad():
        teacher.lm_head.weight *= 1e6
    pair = assemble("fp16", make_model(1), teacher, make_tokenizer())
    with pytest.raises(
        DiagnosticsError,
        match=r"positions have NaN or infinite logits \(the first at position \d of context"
        r" 'c0', the teacher's; of 38 looked at, 0 are the "
        r"student's and 38 the teacher's alone\)\. Load the models in float32, or check their"
        r" weights\.$",
    ):
        score(pair, bank)


def measured_to_the_end(pair, bank, folder, *, report=False, **options):
    """A bank through score, probe and tables, and with `report` the page, as the command line would
    take it; the tokens.
    """
    from diagnostics.analysis import config
    from diagnostics.pipeline.stages.analyze import analyze_stage
    from diagnostics.pipeline.stages.probe import probe_stage
    from diagnostics.pipeline.stages.report import report_stage
    from diagnostics.pipeline.stages.score import score_stage
    from diagnostics.probing.one_step import ControlConfig, ProbeConfig
    from diagnostics.probing.scores import ScoreConfig

    models = type("Models", (), {"pair": pair, "settings": {}, "fingerprint": lambda self: {}})()
    with open_run(folder) as run:
        tables.write_parquet(run.path("contexts.parquet"), bank.to_frame())
        score_stage(run, models, ScoreConfig(**options))
        probe_stage(run, models, ProbeConfig(folds=2), ControlConfig(), batch_tokens=8192)
        analyze_stage(run, config.AnalysisConfig(draws=20), seed=0)
        assert not report or report_stage(run).stat().st_size > 10_000
    return pd.read_parquet(folder / "tokens.parquet")


def test_a_student_that_writes_one_token_only(bank, tmp_path):
    student = make_model(1)
    with torch.no_grad():
        student.lm_head.weight *= 0
        student.lm_head.weight[7] = 100 * torch.sign(student.model.norm.weight)
        student.model.layers[-1].mlp.down_proj.weight *= 0
    pair = assemble("collapsed", student, make_model(2), make_tokenizer())
    tokens = measured_to_the_end(pair, bank, tmp_path / "out")
    assert (
        tokens.student_entropy.max() < np.log(64)
        and len(tokens) == bank.positions
        and tokens.forward_kl.min() > 0
    )


def test_a_teacher_that_is_the_student(bank, tmp_path):
    pair = assemble("same", make_model(1), make_model(1), make_tokenizer())
    tokens = measured_to_the_end(pair, bank, tmp_path / "out", report=True)
    assert (
        tokens.forward_kl.abs().max() < 1e-6
        and tokens.gain.abs().max() < 1e-4
        and tokens.relative_gain.isna().all()
    )


@pytest.mark.parametrize("k", [64, 1000])
def test_supports_as_large_as_the_vocabulary(pair, bank, tmp_path, k):
    tokens = measured_to_the_end(pair, bank, tmp_path / "out", k=k, sweep=(63, 5000))
    np.testing.assert_allclose(
        tokens[["compatibility", "topk_overlap", "topk_jaccard"]], 1, atol=1e-6
    )
    np.testing.assert_allclose(tokens.union_forward_kl, tokens.forward_kl, atol=1e-5)


def test_responses_without_tokens(pair, tmp_path):
    bank = Bank((*make_bank([3, 4, 5, 2]).contexts, Context("e", "e", "", (0, 4), "", (), False)))
    tokens = measured_to_the_end(pair, bank, tmp_path / "out")
    assert (
        len(tokens) == 14
        and "e" not in set(tokens.context_id)
        and len(read_bank(tmp_path / "out/contexts.parquet")) == 5
    )
