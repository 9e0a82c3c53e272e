import json

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.training import engine_options
from diagnostics.training.engine_options import lora_config, peft_fields, trl_fields
from diagnostics.training.run import EngineConfig, TrainConfig, trl_config

SECRET = "hf_secret123"


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("push_to_hub", True, engine_options.LEAVES),
        ("hub_token", SECRET, engine_options.LEAVES),
        ("hub_model_id", f"someone/{SECRET}", engine_options.LEAVES),
        ("hub_strategy", SECRET, engine_options.LEAVES),
        ("run_name", SECRET, engine_options.LEAVES),
        ("project", SECRET, engine_options.LEAVES),
        ("trackio_space_id", SECRET, engine_options.LEAVES),
        ("output_dir", f"/{SECRET}", "--output-dir"),
        ("resume_from_checkpoint", f"/{SECRET}", "--resume"),
        ("vllm_server_host", SECRET, '"vllm_mode": "colocate"'),
        ("vllm_server_base_url", SECRET, '"vllm_mode": "colocate"'),
        ("teacher_model_name_or_path", SECRET, "--teacher, --teacher-revision and --teacher-dtype"),
        ("model_init_kwargs", {"token": SECRET}, "--student"),
        ("deepspeed", {"wandb": {"team": SECRET}}, "accelerate launch --config_file"),
        ("fsdp_config", SECRET, "accelerate launch --config_file"),
        ("accelerator_config", SECRET, "accelerate launch --config_file"),
        ("temperature", 0.7, "untempered p"),
        ("save_strategy", "no", "--save-every"),
        ("eval_strategy", "steps", "--eval-every"),
        ("trust_remote_code", True, "diagnostics.train"),
        ("torch_compile", True, "SelectedDistillationTrainer"),
    ],
)
def test_a_field_that_leads_elsewhere_is_refused_with_the_way_and_without_its_value(
    name, value, told
):
    with pytest.raises(DiagnosticsError) as refused:
        trl_fields(json.dumps({name: value}))
    message = str(refused.value)
    assert message.startswith(
        f"--trl sets what is not TRL's to decide here: {name} ("
    ) and message.endswith("Remove it there.")
    assert told in message and SECRET not in message


def test_every_field_of_trl_is_allowed_or_refused_with_a_way():
    known = set(engine_options._hints())
    assert (
        known >= engine_options.TRL_FIELDS and set(engine_options.WAYS) - {"logging_dir"} <= known
    )
    assert not {
        name
        for name in engine_options.TRL_FIELDS
        if any(
            word in name
            for word in ("hub", "token", "dir", "host", "url", "server", "_port", "trackio")
        )
    }
    for name in known - engine_options.TRL_FIELDS:
        assert engine_options.way(name)


@pytest.mark.parametrize("report_to", ["wandb", "all", ["tensorboard", "mlflow"], SECRET])
def test_no_tracker_elsewhere(report_to):
    with pytest.raises(
        DiagnosticsError, match=r"^--trl reports to a tracker other than none or tensorboard: "
    ) as refused:
        trl_fields(json.dumps({"report_to": report_to}))
    assert SECRET not in str(refused.value)


def test_tensorboard_needs_its_package(monkeypatch):
    monkeypatch.setattr(engine_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^--trl reports to tensorboard, which is not installed\. Run `pip install"
            r" tensorboard`, or read metrics\.jsonl\.$"
        ),
    ):
        engine_options.require_installed('{"report_to": "tensorboard"}')
    with pytest.raises(
        DiagnosticsError, match=r"^--trl sets use_vllm, and vllm is not installed\. "
    ):
        engine_options.require_installed('{"use_vllm": true}')


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"max_grad_norm": "1.o"}',
            r'^--trl sets max_grad_norm to "1\.o"; a number is needed\. Mend it there\.$',
        ),
        (
            '{"top_k": 2.5}',
            r"^--trl sets top_k to 2\.5; a whole number is needed\. Mend it there\.$",
        ),
        ('{"warmup_steps": true}', r"^--trl sets warmup_steps to true; a number is needed\."),
        ('{"weight_decay": NaN}', r"^--trl sets weight_decay to NaN; a number is needed\."),
        ('{"bf16": "yes"}', r'^--trl sets bf16 to "yes"; true or false or null is needed\.'),
        ('{"bf16": true, "bf16": false}', r"^--trl names bf16 twice\. Keep one\.$"),
        (
            '{"vllm_mode": "server"}',
            (
                r'^--trl has a vllm_mode other than "colocate", which would ask another host\. Use'
                r' "colocate"\.$'
            ),
        ),
        (
            '{"gradient_checkpointing": true, "activation_checkpointing": false}',
            (
                r"^--trl sets gradient_checkpointing and activation_checkpointing, two names of one"
                r" option"
            ),
        ),
        ("{" * 100_000, r"^--trl cannot be read as JSON "),
        ("nowhere.json", r"^nowhere\.json cannot be read as JSON \(there is no such file\)\."),
    ],
)
def test_mistyped_settings_are_one_sentence(text, message):
    with pytest.raises(DiagnosticsError, match=message):
        trl_fields(text)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_act(tmp_path, name):
    made = trl_config(
        tmp_path,
        TrainConfig(),
        EngineConfig(trl=json.dumps({name: True, f"{name}_kwargs": {"use_reentrant": False}})),
        rate=1e-4,
    )
    assert (
        made.activation_checkpointing
        and made.gradient_checkpointing
        and made.activation_checkpointing_kwargs == {"use_reentrant": False}
    )
    assert not trl_config(
        tmp_path, TrainConfig(), EngineConfig(), rate=1e-4
    ).activation_checkpointing


def test_what_trl_refuses_is_one_sentence(tmp_path):
    with pytest.raises(
        DiagnosticsError, match=r"^TRL and its engines do not take these settings: .* Mend --trl\.$"
    ):
        trl_config(tmp_path, TrainConfig(), EngineConfig(trl='{"optim": "steepest"}'), rate=1e-4)


def test_a_file_may_not_be_a_pipe_or_huge(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_text("{" + " " * engine_options.LARGEST + "}")
    for name, reason in (("pipe", "there is no such file"), ("huge", "more than")):
        with pytest.raises(DiagnosticsError, match=reason):
            trl_fields(str(tmp_path / name))


def test_adapters_beyond_their_rank(tmp_path):
    pytest.importorskip("peft")
    made = lora_config(
        8,
        '{"target_modules": ["q_proj"], "lora_alpha": 4, "lora_dropout": 0.1, "use_dora": true,'
        ' "use_rslora": true}',
    )
    assert (
        made.r,
        made.lora_alpha,
        made.lora_dropout,
        made.use_dora,
        made.use_rslora,
        set(made.target_modules),
    ) == (8, 4, 0.1, True, True, {"q_proj"})
    assert (
        lora_config(8).lora_alpha == 16
        and lora_config(8).target_modules == "all-linear"
        and lora_config(0) is None
    )
    (tmp_path / "peft.json").write_text('{"lora_alpha": 3}')
    assert lora_config(2, str(tmp_path / "peft.json")).lora_alpha == 3


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"r": 4}',
            (
                r"^--peft sets r, which is not for it to say: the rank is --lora-rank\. Remove it"
                r" there\.$"
            ),
        ),
        (
            json.dumps({"base_model_name_or_path": SECRET}),
            (
                r"^--peft sets base_model_name_or_path, which is not for it to say: known are"
                r" target_modules, "
            ),
        ),
        (
            '{"lora_alpha": "16"}',
            (
                r'^--peft sets lora_alpha to "16"; a whole number or a number is needed\. Mend it'
                r" there\.$"
            ),
        ),
        ('{"lora_alpha": true}', r"^--peft sets lora_alpha to true; "),
        ('{"use_dora": 1}', r"^--peft sets use_dora to 1; true or false is needed\."),
        (
            '{"init_lora_weights": "pissa"}',
            r"^--peft sets init_lora_weights to a start other than ",
        ),
    ],
)
def test_adapter_settings_that_cannot_be_used(text, message):
    with pytest.raises(DiagnosticsError, match=message) as refused:
        peft_fields(text)
    assert SECRET not in str(refused.value)


def test_an_adapter_needs_its_rank():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^--peft describes an adapter, and there is none\. Give its rank with --lora-rank\.$"
        ),
    ):
        lora_config(0, '{"lora_alpha": 4}')
