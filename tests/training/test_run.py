import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt
from diagnostics.criteria import budget_count
from diagnostics.models.loading import load_model
from diagnostics.models.pair import weights_sha256
from diagnostics.pipeline.cli import main
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.training import engine_options
from diagnostics.training import run as training_run
from diagnostics.training.evaluation import EvaluationConfig
from diagnostics.training.run import (
    EngineConfig,
    TrainConfig,
    last_checkpoint,
    read_lines,
    schedule,
    train,
    trl_config,
)
from diagnostics.training.trl_trainer import SelectedDistillationTrainer
from tests import launched_training
from tests.conftest import make_pair, make_prompts

PROMPTS, HELD_OUT = (
    make_prompts(12),
    [Prompt(f"h{p.prompt_id}", f"w5 {p.prompt}") for p in make_prompts(4)],
)
SETTINGS = dict(
    config=TrainConfig(budget=0.2, steps=6, batch=4, learning_rate=1e-3), held_out=HELD_OUT
)
ENGINE = EngineConfig(max_new_tokens=8, save_every=2, probe_every=3)


def bank():
    return rollout(make_pair(), HELD_OUT, max_new_tokens=8)


def run(folder, **options):
    pair = make_pair()
    options = (
        SETTINGS
        | {
            "engine": ENGINE,
            "evaluation": EvaluationConfig(eval_every=3, eval_samples=2),
            "bank": bank(),
        }
        | options
    )
    return train(pair, PROMPTS, output_dir=folder, **options), pair


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return folder, *run(folder)


def test_metrics_have_a_line_a_step(finished):
    folder, result, _ = finished
    assert result.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for row in result.metrics.itertuples():
        assert row.selected == budget_count(
            int(row.positions), 0.2
        ) and row.selected_share == pytest.approx(row.selected / row.positions)
    wanted = {"loss", "grad_norm", "entropy"}
    wanted |= {
        f"{name}/{part}"
        for name in ("forward_kl", "compatibility", "student_entropy", "shared_student_mass")
        for part in ("all", "selected")
    }
    wanted |= {f"jaccard/{name}" for name in ("entropy", "divergence", "tip", "incompatible")}
    assert wanted <= set(result.metrics) and result.metrics[sorted(wanted)].notna().all(axis=None)
    assert not {"tokens_per_second", "step_time"} & set(result.metrics)
    timings = read_lines(folder / "timings.jsonl")
    assert (
        timings["step"].tolist() == [1, 2, 3, 4, 5, 6]
        and (timings["tokens_per_second"] > 0).all()
        and (timings["step_time"] > 0).all()
    )


def test_the_untouched_student_is_evaluated_first(finished):
    folder, result, pair = finished
    assert sorted(set(result.evaluations["step"])) == [0, 3, 6]
    values = result.evaluations.pivot(index="step", columns="measure", values="mean")
    untouched, trained = make_pair(), pair
    for student, step in ((untouched, 0), (trained, 6)):
        frozen = FrozenBank(student, bank())
        assert values.loc[step, "bank_forward_kl"] == pytest.approx(
            frozen.divergences()[0].mean(), rel=1e-6
        )
    assert values.loc[6, "bank_reverse_kl"] < values.loc[0, "bank_reverse_kl"]
    assert (result.evaluations["low"] <= result.evaluations["mean"]).all()
    assert "bank_reverse_kl" in result._repr_html_()
    assert pd.read_csv(folder / "evaluations.csv")["mean"].tolist() == pytest.approx(
        result.evaluations["mean"].tolist()
    )


def test_gains_after_n_steps_are_those_of_the_bank(finished):
    folder, _, pair = finished
    table = pd.read_parquet(folder / "training_gains.parquet")
    assert [name for name in table if name.startswith("gain_step_")] == [
        "gain_step_1",
        "gain_step_3",
        "gain_step_6",
    ]
    before, after = (FrozenBank(student, bank()).divergences() for student in (make_pair(), pair))
    np.testing.assert_allclose(table["gain_step_6"], before[0] - after[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        table["reverse_gain_step_6"], before[1] - after[1], rtol=0, atol=1e-9
    )
    assert (
        table["gain_step_1"].abs().max() > 0
        and (table["gain_step_1"] != table["gain_step_3"]).any()
    )


def test_the_trained_student_is_saved(finished):
    _folder, result, pair = finished
    saved = load_file(result.student / "model.safetensors")
    for name, parameter in pair.student.model.named_parameters():
        assert torch.equal(saved[name], parameter.detach())
    assert weights_sha256(pair.student.model) != weights_sha256(make_pair().student.model)
    assert weights_sha256(pair.teacher.model) == weights_sha256(make_pair().teacher.model)
    assert (result.student / "tokenizer.json").exists() and not (
        result.student / "training_args.bin"
    ).exists()


def assert_same_training(folder, result, finished):
    reference_folder, reference, _ = finished
    pd.testing.assert_frame_equal(result.evaluations, reference.evaluations, rtol=0)
    for name in (
        "metrics.jsonl",
        "positions.jsonl",
        "evaluations.parquet",
        "evaluations.csv",
        "training_gains.parquet",
        "student/model.safetensors",
    ):
        assert (folder / name).read_bytes() == (reference_folder / name).read_bytes(), name


class Stop(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("crash_at", [1, 4, 5])
def test_a_crashed_training_goes_on_as_if_nothing_had_happened(
    tmp_path, finished, monkeypatch, crash_at
):
    original = training_run.TrainingMonitor.after_step

    def crashing(self, step):
        original(self, step)
        if step == crash_at:
            raise Stop

    monkeypatch.setattr(training_run.TrainingMonitor, "after_step", crashing)
    with pytest.raises(Stop):
        run(tmp_path)
    monkeypatch.setattr(training_run.TrainingMonitor, "after_step", original)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    torch.manual_seed(99)
    result, _ = run(
        tmp_path, engine=EngineConfig(max_new_tokens=8, save_every=2, probe_every=3, resume=True)
    )
    assert_same_training(tmp_path, result, finished)


def test_an_unfinished_training_needs_resume_and_the_same_settings(finished):
    folder, *_ = finished
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^{folder} holds a training that stopped at or after step 6\. Pass --resume to go on"
            r" from there, or choose another --output-dir\.$"
        ),
    ):
        run(folder)
    resume = EngineConfig(max_new_tokens=8, save_every=2, probe_every=3, resume=True)
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^{folder} holds a training with other settings \(budget: was 0\.2, now 0\.5\)\."
            r" Resume with the earlier ones\.$"
        ),
    ):
        run(
            folder,
            engine=resume,
            config=TrainConfig(budget=0.5, steps=6, batch=4, learning_rate=1e-3),
        )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^.* holds a training with other settings \(bank: was '.*', now None\)\. Resume with"
            r" the earlier ones\.$"
        ),
    ):
        run(folder, engine=resume, bank=None)


def checkpoint(folder, state="{}"):
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(64)}, folder / "model.safetensors")
    torch.save({"s": torch.ones(64)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global_st')):
        checkpoint(tmp_path / f"checkpoint-{step}", state)
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None


def cut(path, size):
    os.truncate(path, size)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: cut(folder / "model.safetensors", 100), "model.safetensors is cut short"),
        (lambda folder: cut(folder / "model.safetensors", 4), "model.safetensors is cut short"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 400),
            "model.safetensors is cut short",
        ),
        (lambda folder: cut(folder / "optimizer.pt", 500), "optimizer.pt is cut short"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "its optimizer is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "its weights are missing"),
    ],
)
def test_of_damaged_checkpoints_the_last_whole_one_is_taken(tmp_path, damage, reason, caplog):
    for step in (2, 4):
        checkpoint(tmp_path / f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert f"checkpoint-4 is passed over: {reason}" in caplog.text
    damage(tmp_path / "checkpoint-2")
    message = (
        rf"^.* has no whole checkpoint to go on from \(checkpoint-4: {reason}; checkpoint-2:"
        rf" {reason}\)\. Bring the files back, or choose another --output-dir\.$"
    )
    with pytest.raises(DiagnosticsError, match=message):
        last_checkpoint(tmp_path)


def test_a_training_without_a_minimum_is_recorded_as_before_there_was_one(finished, tmp_path):
    """So that a training of an earlier version can be resumed."""
    assert "per_context_minimum" not in json.loads((finished[0] / "train.json").read_text())
    config = SETTINGS["config"]
    with_one = dataclasses.replace(config, budget=0.3, per_context_minimum=1, steps=1)
    run(tmp_path, config=with_one)
    assert json.loads((tmp_path / "train.json").read_text())["per_context_minimum"] == 1
    with pytest.raises(
        DiagnosticsError,
        match=r"^A minimum per context is a number of positions, 0 or more; got -1\.$",
    ):
        dataclasses.replace(config, per_context_minimum=-1)


def test_a_resume_from_an_earlier_checkpoint_ends_the_same(tmp_path, finished, caplog):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    cut(tmp_path / "run" / "checkpoints" / "checkpoint-6" / "model.safetensors", 1000)
    result, _ = run(
        tmp_path / "run",
        engine=EngineConfig(max_new_tokens=8, save_every=2, probe_every=3, resume=True),
    )
    assert "checkpoint-6 is passed over: model.safetensors is cut short" in caplog.text
    assert_same_training(tmp_path / "run", result, finished)


def test_two_trainings_write_the_same_files(tmp_path, finished):
    result, _ = run(tmp_path)
    assert_same_training(tmp_path, result, finished)
    assert (tmp_path / "train.json").read_bytes() == (finished[0] / "train.json").read_bytes()
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize("name", ["checkpoints", "student", "checkpoints/checkpoint-2"])
def test_a_link_below_the_run_is_not_written_through(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^{link} is a link, which training would write through\. Remove it, or choose another"
            r" --output-dir\.$"
        ),
    ):
        run(tmp_path / "run")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk_is_a_sentence_and_the_training_goes_on(tmp_path, finished, monkeypatch, error):
    original = SelectedDistillationTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-4"):
            raise error
        original(self, folder)

    monkeypatch.setattr(SelectedDistillationTrainer, "_save_optimizer_and_scheduler", full)
    message = (
        rf"^The training's files in {tmp_path} cannot be written \(.*\)\. What was finished is"
        r" kept\. Make room or lift the limit, and give the same command with --resume\.$"
    )
    with pytest.raises(DiagnosticsError, match=message):
        run(tmp_path)
    monkeypatch.setattr(SelectedDistillationTrainer, "_save_optimizer_and_scheduler", original)
    result, _ = run(
        tmp_path, engine=EngineConfig(max_new_tokens=8, save_every=2, probe_every=3, resume=True)
    )
    assert_same_training(tmp_path, result, finished)


def test_a_step_that_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(SelectedDistillationTrainer, "_compute_loss", full)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^A step does not fit in memory \(injected\)\. Raise --accumulation, .*; --resume goes"
            r" on from the last checkpoint\.$"
        ),
    ):
        run(tmp_path)


def test_callbacks_and_optimizers_reach_the_trainer(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *_, **__):
            self.steps += 1

    count, pair = Count(), make_pair()
    optimizer = torch.optim.SGD(pair.student.model.parameters(), lr=1e-2)
    train(
        pair,
        PROMPTS,
        output_dir=tmp_path,
        config=TrainConfig(steps=2, batch=4),
        engine=EngineConfig(max_new_tokens=6, save_every=0),
        options={"callbacks": [count], "optimizers": (optimizer, None)},
    )
    assert count.steps == 2 and len(read_lines(tmp_path / "metrics.jsonl")) == 2
    assert weights_sha256(pair.student.model) != weights_sha256(make_pair().student.model)


def test_every_pass_over_the_prompts_has_its_own_order():
    order = [p.prompt_id for p in schedule(PROMPTS, 30, seed=1)]
    assert (
        sorted(order[:12]) == sorted(order[12:24]) == sorted(p.prompt_id for p in PROMPTS)
        and order[:12] != order[12:24]
    )
    assert (
        order
        == [p.prompt_id for p in schedule(PROMPTS, 30, seed=1)]
        != [p.prompt_id for p in schedule(PROMPTS, 30, seed=2)]
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"engine": EngineConfig(accumulation=3)},
            (
                r"^A batch of 4 responses cannot be shared by 1 processes with 3 micro-batches"
                r" each\. Choose a multiple of 3\.$"
            ),
        ),
        (
            {"held_out": PROMPTS[:1]},
            (
                r"^1 prompts are trained on and held out as well, among them 'p0'\. Remove them"
                r" from one set\.$"
            ),
        ),
        (
            {"engine": EngineConfig(probe_every=1), "bank": None},
            (
                r"^probe_every re-scores a frozen bank, and there is none\. Give held-out prompts"
                r" or a contexts\.parquet\.$"
            ),
        ),
        (
            {"config": TrainConfig(criterion="nothing")},
            r"^Unknown criterion 'nothing'\. Known are full, random, ",
        ),
        (
            {"config": TrainConfig(loss="jsd", beta=2.0)},
            r"^beta is 2\.0; it weighs two divergences",
        ),
        (
            {"engine": EngineConfig(lora_rank=4)},
            (
                r"^A LoRA of rank 4 needs the package peft\. Run `pip install peft`, or train all"
                r" weights with --lora-rank 0\.$"
            ),
        ),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, options, message, monkeypatch):
    if "peft" in message:
        monkeypatch.setattr(engine_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DiagnosticsError, match=message):
        run(tmp_path, **({"config": TrainConfig(steps=2, batch=4)} | options))


def test_a_lora_is_trained_and_saved_merged(tmp_path):
    pytest.importorskip("peft")
    pair, untouched = make_pair(), make_pair().student.model
    train(
        pair,
        PROMPTS,
        output_dir=tmp_path,
        config=TrainConfig(steps=2, batch=4),
        engine=EngineConfig(lora_rank=4, max_new_tokens=6),
    )
    saved = dict(load_model(tmp_path / "student", dtype="float32", device="cpu").named_parameters())
    moved = {name for name, p in untouched.named_parameters() if not torch.equal(p, saved[name])}
    assert saved.keys() == dict(untouched.named_parameters()).keys()
    assert (
        moved and all("_proj" in name for name in moved) and any("q_proj" in name for name in moved)
    )


def test_numbers_of_steps_and_prompts_are_checked(tmp_path):
    with pytest.raises(
        DiagnosticsError, match=r"^Training needs steps and responses; got steps=0, batch=16\.$"
    ):
        TrainConfig(steps=0)
    with pytest.raises(
        DiagnosticsError,
        match=r"^No prompts are left to train on\. Give more prompts, or fewer --eval-contexts\.$",
    ):
        train(make_pair(), [], output_dir=tmp_path)


def test_models_that_take_turns_cannot_train(tmp_path):
    pair = make_pair()
    pair.offload_teacher = True
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Training needs teacher and student on the device at once\. Leave out"
            r" --offload-teacher; --teacher-dtype bfloat16 saves memory\.$"
        ),
    ):
        train(pair, PROMPTS, output_dir=tmp_path)


def test_learning_rates():
    assert TrainConfig().rate("custom", 0) == 1e-6 and TrainConfig().rate("custom", 8) == 2e-4
    assert (
        TrainConfig().rate("embedded", 0) == 1e-4
        and TrainConfig(learning_rate=3e-5).rate("embedded", 0) == 3e-5
    )


def test_trl_fields_come_from_a_file(tmp_path):
    path = tmp_path / "trl.json"
    path.write_text(
        json.dumps({"lr_scheduler_type": "constant", "max_grad_norm": 0.5, "report_to": "none"})
    )
    made = trl_config(
        tmp_path, TrainConfig(batch=8), EngineConfig(accumulation=2, trl=str(path)), rate=1e-4
    )
    assert (
        made.lr_scheduler_type,
        made.max_grad_norm,
        made.per_device_train_batch_size,
        made.gradient_accumulation_steps,
    ) == ("constant", 0.5, 4, 2)
    for content, message in (
        (
            '{"beta": 0.5, "max_steps": 3}',
            (
                r"^.*trl\.json sets what is not TRL's to decide here: beta \(--loss and --beta\);"
                r" max_steps \(--steps\)\. Remove it there\.$"
            ),
        ),
        (
            '{"betta": 1}',
            (
                r"^.*trl\.json sets betta, which no DistillationConfig knows\. Correct the name, or"
                r" remove it there\.$"
            ),
        ),
        (
            "[",
            (
                r"^.*trl\.json cannot be read as JSON .*Give an object of fields, in a file or"
                r" written out\.$"
            ),
        ),
    ):
        path.write_text(content)
        with pytest.raises(DiagnosticsError, match=message):
            trl_config(tmp_path, TrainConfig(), EngineConfig(trl=str(path)), rate=1e-4)


CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_configs_at_scale_are_read(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    engine = EngineConfig(
        max_new_tokens=4096, accumulation=4, trl=str(CONFIGS / "qwen3-4b-to-1.7b.json")
    )
    made = trl_config(tmp_path, TrainConfig(batch=64, steps=300), engine, rate=1e-6)
    assert (
        made.use_vllm
        and made.vllm_mode == "colocate"
        and made.bf16
        and made.activation_checkpointing
        and made.save_steps == 50
    )
    assert (
        made.vllm_max_model_length > engine.max_new_tokens
        and made.per_device_train_batch_size == 16
    )
    launch = load_config_from_file(str(CONFIGS / "fsdp2-8gpu.yaml"))
    assert (
        launch.distributed_type.value,
        launch.num_processes,
        launch.fsdp_config["fsdp_version"],
    ) == ("FSDP", 8, 2)


def test_the_command_of_the_scale_page_is_understood():
    text = (CONFIGS.parent / "docs/scale.md").read_text()
    command = text.split("-m diagnostics ")[1].split("```")[0].replace("\\\n", " ")
    from diagnostics.pipeline.cli import build_parser

    parsed = build_parser("train").parse_args(shlex.split(command))
    assert (parsed.criterion, parsed.budget, parsed.batch, parsed.eval_contexts) == (
        "teachability",
        0.05,
        64,
        0,
    )
    assert (CONFIGS.parent / parsed.trl).exists()


def test_the_example_of_the_scale_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = (CONFIGS.parent / "docs/scale.md").read_text().split("```python")[1:]
    (code,) = (block.split("```")[0] for block in blocks if "options=" in block)
    exec(compile(code, "scale.md", "exec"), {})
    assert read_lines(tmp_path / "runs/own/metrics.jsonl")["step"].tolist() == [1, 2]


def test_a_sharded_student_is_not_evaluated():
    monitor = training_run.TrainingMonitor(
        make_pair(), Path("x"), TrainConfig(), EngineConfig(), EvaluationConfig(), HELD_OUT, None
    )
    sharded = SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    message = (
        r"^The student is sharded, and a shard cannot be evaluated during training\. Pass"
        r" --eval-contexts 0, "
        r"and evaluate checkpoints afterwards with diagnostics\.evaluate\.$"
    )
    with pytest.raises(DiagnosticsError, match=message):
        monitor.require_whole(sharded)
    training_run.TrainingMonitor(
        make_pair(), Path("x"), TrainConfig(), EngineConfig(), EvaluationConfig(), [], None
    ).require_whole(sharded)


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        training_run._line({"step": 1, "loss": float("nan")})
        + training_run._line({"step": 2, "loss": 0.5})
        + '{"step": 3, "l'
    )
    lines = read_lines(tmp_path / "m.jsonl")
    assert (
        lines["step"].tolist() == [1, 2] and np.isnan(lines["loss"][0]) and lines["loss"][1] == 0.5
    )
    assert read_lines(tmp_path / "none.jsonl").empty


# --- the command line
# -------------------------------------------------------------------------------


def flags(folders, directory, *more):
    return [
        "train",
        *folders[0],
        *folders[1],
        "--eval-contexts",
        "4",
        "--eval-samples",
        "2",
        "--steps",
        "4",
        "--batch",
        "4",
        "--budget",
        "0.2",
        "--max-new-tokens",
        "8",
        "--learning-rate",
        "0.001",
        "--output-dir",
        str(directory),
        *more,
    ]


def test_training_and_its_gains_on_the_command_line(folders, tmp_path, capsys):
    models, prompts = folders
    assert (
        main(["rollout", *models, *prompts, "--max-new-tokens", "8", "--output-dir", str(tmp_path)])
        == 0
    )
    assert main(["score", *models, "--output-dir", str(tmp_path)]) == 0
    assert main(flags(folders, tmp_path, "--probe-every", "2")) == 0
    tokens = pd.read_parquet(tmp_path / "tokens.parquet")
    assert {
        "gain_step_1",
        "gain_step_2",
        "gain_step_4",
        "relative_gain_step_4",
        "forward_kl",
    } <= set(tokens) and "gain" not in tokens
    assert "forward_kl_step_0" not in tokens and tokens["gain_step_4"].notna().all()
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    assert main(flags(folders, tmp_path, "--probe-every", "2")) == 0  # kept
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before

    assert (
        main(
            ["score", *models, "--after", str(tmp_path / "student"), "--output-dir", str(tmp_path)]
        )
        == 0
    )
    after = pd.read_parquet(tmp_path / "tokens.parquet")
    np.testing.assert_allclose(after["gain"], after["gain_step_4"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(
        after["forward_kl"] - after["forward_kl_after"], after["gain"], rtol=0, atol=1e-12
    )
    assert main(["analyze", "--draws", "20", "--quiet", "--output-dir", str(tmp_path)]) == 0


def test_training_without_evaluation(folders, tmp_path):
    assert main(flags(folders, tmp_path, "--eval-contexts", "0", "--criterion", "random")) == 0
    assert (
        not (tmp_path / "evaluations.csv").exists() and not (tmp_path / "contexts.parquet").exists()
    )
    assert (
        len(read_lines(tmp_path / "metrics.jsonl")) == 4
        and (tmp_path / "student" / "model.safetensors").exists()
    )


def test_the_same_student_scores_gains_of_zero(folders, tmp_path):
    models, prompts = folders
    assert (
        main(["rollout", *models, *prompts, "--max-new-tokens", "8", "--output-dir", str(tmp_path)])
        == 0
    )
    assert main(["score", *models, "--after", models[1], "--output-dir", str(tmp_path)]) == 0
    tokens = pd.read_parquet(tmp_path / "tokens.parquet")
    assert (tokens["gain"] == 0).all() and (tokens["reverse_gain"] == 0).all()


def test_a_checkpoint_beside_a_probe_leaves_the_probe_s_columns(folders, tmp_path):
    models, prompts = folders
    out = ["--output-dir", str(tmp_path)]
    for command in (["rollout", *prompts, "--max-new-tokens", "8"], ["score"], ["probe"]):
        assert main([command[0], *models, *command[1:], *out]) == 0
    probed = pd.read_parquet(tmp_path / "tokens.parquet")
    assert main(["score", *models, "--after", models[1], *out]) == 0
    both = pd.read_parquet(tmp_path / "tokens.parquet")
    # The checkpoint is the untrained student, so what was measured again is what it was before.
    for name in ("forward_kl", "reverse_kl", "student_entropy", "compatibility"):
        np.testing.assert_array_equal(both[f"{name}_after"], both[name])
    np.testing.assert_array_equal(both["compatibility_k8_after"], both["compatibility_k8"])
    assert "seen" not in both  # nothing says what the untrained student was trained on
    kept = [name for name in probed if name not in ("forward_kl_after", "reverse_kl_after")]
    pd.testing.assert_frame_equal(both[kept], probed[kept])
    assert (probed["forward_kl_after"] != both["forward_kl_after"]).any()
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert "after.parquet" in stages["after"]["files"]
    assert "gains.parquet" in stages["probe"]["files"]


def test_the_order_of_probe_and_checkpoint_does_not_matter(folders, tmp_path):
    models, prompts = folders
    assert main(flags(folders, tmp_path / "t", "--eval-contexts", "0")) == 0
    steps = {"probe": ["probe"], "after": ["score", "--after", str(tmp_path / "t/student")]}
    for name, order in (("one", ("probe", "after")), ("other", ("after", "probe"))):
        out = ["--output-dir", str(tmp_path / name)]
        for command in (["rollout", *prompts, "--max-new-tokens", "8"], ["score"]):
            assert main([command[0], *models, *command[1:], *out]) == 0
        for step in order:
            assert main([steps[step][0], *models, *steps[step][1:], *out]) == 0
    one, other = ((tmp_path / name / "tokens.parquet").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_checkpoint_trained_here_says_which_contexts_it_saw(folders, tmp_path):
    models, prompts = folders
    trained = tmp_path / "t"
    assert main(flags(folders, trained, "--eval-contexts", "0", "--steps", "1")) == 0
    record = json.loads((trained / "student/trained_prompts.json").read_text())["prompts"]
    files = json.loads((trained / "manifest.json").read_text())["stages"]["train"]["files"]
    assert "student/trained_prompts.json" in files
    out = ["--output-dir", str(tmp_path / "run")]
    assert main(["rollout", *models, *prompts, "--max-new-tokens", "8", *out]) == 0
    assert main(["score", *models, "--after", str(trained / "student"), *out]) == 0
    tokens = pd.read_parquet(tmp_path / "run/tokens.parquet")
    np.testing.assert_array_equal(tokens["seen"], tokens["prompt_id"].isin(record))
    assert tokens["seen"].any() and not tokens["seen"].all()
    facts = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["after"]["facts"]
    assert facts["seen_positions"] == tokens["seen"].sum() and facts["steps"] == 1


def test_a_scored_checkpoint_is_repeated_from_the_manifest(folders, tmp_path):
    models, prompts = folders
    run, trained = tmp_path / "run", tmp_path / "t"
    assert main(flags(folders, trained, "--eval-contexts", "0", "--steps", "1")) == 0
    out = ["--output-dir", str(run)]
    assert main(["rollout", *models, *prompts, "--max-new-tokens", "8", *out]) == 0
    options = ["--k", "4", "--sweep", "2"]
    after = ["--after", str(trained / "student")]
    assert main(["score", *models, *options, *after, *out]) == 0
    tokens = pd.read_parquet(run / "tokens.parquet")
    assert {"compatibility_after", "compatibility_k2_after"} <= set(tokens)
    inputs = [models[1], models[3], prompts[1], str(trained / "student")]
    repeated = ["rerun", str(run / "manifest.json"), "--output-dir", str(tmp_path / "again")]
    assert main([*repeated, "--inputs", *inputs]) == 0


@pytest.mark.slow
def test_a_killed_training_resumes_with_the_same_weights(folders, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(flags(folders, whole, "--steps", "30", "--save-every", "4")) == 0
    command = [
        sys.executable,
        "-m",
        "diagnostics",
        *flags(folders, killed, "--steps", "30", "--save-every", "4"),
    ]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while (
        len(read_lines(killed / "metrics.jsonl")) < 6
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "student").exists() and last_checkpoint(killed / "checkpoints") is not None
    assert main(flags(folders, killed, "--steps", "30", "--save-every", "4", "--resume")) == 0
    for name in (
        "metrics.jsonl",
        "evaluations.parquet",
        "evaluations.csv",
        "student/model.safetensors",
    ):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    single = launched_training.run(one)
    command = [
        "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        str(Path(launched_training.__file__)),
        str(two),
    ]
    command[0] = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for rank in (0, 1) for row in np.load(two / f"rows-{rank}.npy")]
    assert sorted(rows) == sorted(str(row) for row in single) and len(rows) == 24
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (two, one))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)
    pd.testing.assert_frame_equal(
        *(pd.read_csv(folder / "evaluations.csv") for folder in (two, one)), rtol=1e-4
    )
    gains = [pd.read_parquet(folder / "training_gains.parquet") for folder in (two, one)]
    np.testing.assert_allclose(*(table["gain_step_1"] for table in gains), rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        *(table["gain_step_3"] for table in gains), rtol=0, atol=1e-3
    )  # AdamW turns rounding of tiny gradients into steps
