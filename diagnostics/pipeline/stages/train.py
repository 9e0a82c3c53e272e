"""The stage `train`: the student is trained, and the frozen bank measured again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diagnostics.contexts.choose_prompts import rendered_sha256, training_prompts
from diagnostics.contexts.trained_prompts import RECORD
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_json
from diagnostics.core.types import Bank, Prompt, read_bank, write_bank
from diagnostics.models.identity import Models, file_hash
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ENGINE, EVALUATION, PROMPTS, TRAIN, Job
from diagnostics.pipeline.stages.settings import merged
from diagnostics.pipeline.stages.token_table import join_tokens

if TYPE_CHECKING:
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.models.pair import Pair
    from diagnostics.training.config import EngineConfig, TrainConfig
    from diagnostics.training.evaluation import EvaluationConfig


def do(job: Job) -> None:
    """Do the stage of a command."""
    train_stage(
        job.run,
        job.models,
        *(job.configs[name] for name in (PROMPTS, TRAIN, ENGINE, EVALUATION)),
    )


def refuse_shards(models: Models) -> None:
    """Refuse to train with models that are sharded by hand."""
    if models.config.shard_teacher or models.config.shard_student:
        flag = "--shard-teacher" if models.config.shard_teacher else "--shard-student"
        raise DiagnosticsError(
            f"Training shards its models by Accelerate's own configuration; leave {flag}"
            " out and use `accelerate launch --config_file`."
        )


def frozen_bank(
    run: Run, pair: Pair, held_out: list[Prompt], *, max_new_tokens: int
) -> Bank | None:
    """Return the run's contexts, or else the untouched student's responses to held-out prompts.

    Responses are written into the run. Without contexts and held-out prompts the result is None.
    """
    from diagnostics.contexts.rollouts import rollout

    name = "contexts.parquet"
    if run.path(name).exists() and ("rollout" in run.manifest["stages"] or run.as_written(name)):
        return read_bank(run.path(name))
    if not held_out:
        return None
    bank = rollout(pair, held_out, max_new_tokens=max_new_tokens)
    write_bank(run.path("contexts.parquet"), bank)
    return bank


def _trained_files(run: Run) -> list[str]:
    """What a training has written: its logs and evaluations, the student's weights, and on which
    prompts it was trained.
    """
    names = ["train.json", "metrics.jsonl", "positions.jsonl"]
    names += ["evaluations.csv", "evaluations.parquet"]
    names += ["training_gains.parquet", f"student/{RECORD}"]
    names += ["contexts.parquet"] if run.wrote("train", "contexts.parquet") else []
    weights = sorted(run.path("student").glob("*.safetensors"))
    written = [name for name in names if run.path(name).exists()]
    return written + [f"student/{path.name}" for path in weights]


def train_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    config: TrainConfig,
    engine: EngineConfig,
    evaluation: EvaluationConfig,
) -> None:
    """Train the student; gains on the frozen bank join the token table where there is one.

    Args:
        run: The open run directory.
        models: The pair.
        prompts: The prompts that are trained on.
        config: The objective, the selection and the length of the training.
        engine: How TRL runs the training.
        evaluation: What is measured on held-out prompts, and how often.
    """
    refuse_shards(models)
    _refuse_options(engine)  # before anything is recorded or loaded
    run.stage(
        "train",
        settings=_settings(models, prompts, config, engine, evaluation),
        outputs=lambda: _trained_files(run),
        work=lambda: _trained(run, models, prompts, config, engine, evaluation),
        code=(
            "training.run",
            "training.trl_trainer",
            "training.step_metrics",
            "training.engine_options",
        ),
        models=models.fingerprint,
    )
    if run.path("scores.parquet").exists():
        join_tokens(run)


def _refuse_options(engine: EngineConfig) -> None:
    """Refuse options of TRL, peft or a tracker that cannot be used."""
    from diagnostics.training.engine_options import lora_config, require_installed, trl_fields
    from diagnostics.training.trackers import require_tracker

    require_installed(engine.trl)
    require_tracker(engine.report_to, trl_fields(engine.trl))
    lora_config(engine.lora_rank, engine.peft)


def _settings(
    models: Models,
    prompts: PromptConfig,
    config: TrainConfig,
    engine: EngineConfig,
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """The settings that the manifest records, with the hashes of the files that they name."""
    from diagnostics.contexts.verifiers import recorded_verifier

    hashes = [
        file_hash("prompts", prompts.prompts),
        file_hash("eval_prompts", evaluation.eval_prompts),
        file_hash("trl", engine.trl),
        file_hash("peft", engine.peft),
    ]
    settings = merged(models.settings, prompts, config, engine, evaluation, *hashes)
    settings |= recorded_verifier(evaluation.verifier)
    for name in ("resume", "save_every", "report_to"):  # they do not change what is trained
        del settings[name]
    return settings


def _trained(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    config: TrainConfig,
    engine: EngineConfig,
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Train, and return the facts for the manifest."""
    from diagnostics.training.run import train

    write_json(run.manifest_path, run.manifest)
    data, held_out = training_prompts(
        models,
        prompts,
        evaluation,
        needed=config.steps * config.batch,
        seed=config.seed,
        room=engine.max_new_tokens,
    )
    bank = None
    if held_out or engine.probe_every:
        bank = frozen_bank(run, models.pair, held_out, max_new_tokens=engine.max_new_tokens)
    train(
        models.pair,
        data,
        output_dir=run.directory,
        config=config,
        engine=engine,
        evaluation=evaluation,
        held_out=held_out,
        bank=bank,
    )
    return {
        **models.pair.facts,
        "prompts": len(data),
        "held_out": len(held_out),
        **_drawn(models.pair, engine),
        "rendered_prompts_sha256": rendered_sha256([*data, *held_out]),
    }


def _drawn(pair: Pair, engine: EngineConfig) -> dict[str, Any]:
    """What the training's responses were drawn from."""
    from diagnostics.contexts.generation_settings import sampling_facts
    from diagnostics.training.engine_options import trl_fields

    given = trl_fields(engine.trl)
    return sampling_facts(
        pair, **{name: given[name] for name in ("top_p", "top_k") if name in given}
    )
