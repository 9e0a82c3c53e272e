"""The stages on a run directory: each reads files, calls one function, and writes files.

`registry.STAGES` lists what each reads and writes. `tokens.parquet` joins scores and gains, and is
written anew whenever either changes. The settings of rollout, score, probe and train are fixed once
their files exist. Tables and report are derived: they are made again when their inputs, or the
settings that they were asked with, have changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.analysis.bounds import is_listed, marked
from diagnostics.contexts.choose_prompts import (
    choose_prompts,
    json_object,
    rendered_sha256,
    training_prompts,
)
from diagnostics.contexts.trained_prompts import RECORD, read_trained_prompts, seen_contexts
from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import code_version, fingerprint_files
from diagnostics.core.joined_parts import joined_parts
from diagnostics.core.manifest import recorded, unchanged
from diagnostics.core.progress import expect, forecast
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.settings import RETIRED
from diagnostics.core.tables import (
    read_csv,
    write_csv,
    write_json,
    write_parquet,
    write_parquet_parts,
)
from diagnostics.core.types import SAMPLED, Bank, Prompt, read_bank, write_bank
from diagnostics.models.identity import Models, file_hash
from diagnostics.pipeline.ahead import Ahead
from diagnostics.pipeline.run import Run

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig, PrimaryChoices
    from diagnostics.analysis.selection import ComparisonConfig
    from diagnostics.contexts.import_rollouts import ImportConfig
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.contexts.rollouts import RolloutConfig
    from diagnostics.core.progress import Shards
    from diagnostics.models.pair import Pair
    from diagnostics.models.served.ask import AskConfig
    from diagnostics.probing.attribution import AttributionConfig
    from diagnostics.probing.intervention import InterventionConfig
    from diagnostics.probing.one_step import ControlConfig, ProbeConfig
    from diagnostics.probing.scores import MeasuredBank, ScoreConfig
    from diagnostics.training.evaluation import EvaluationConfig
    from diagnostics.training.grid import TrainingCell, ValidateConfig
    from diagnostics.training.run import EngineConfig, TrainConfig

log = logging.getLogger("diagnostics")
LATER = ("prompts_split", "max_prompt_tokens", "teacher_logprobs")
"""Options that were added after the first grids. A cell names them only where they are set, so that
cells of earlier grids keep their names; None is what those grids did."""
GAIN_KEYS = ("context_id", "position")
STOPS = "tables/stop_tokens.csv"
"""The tokens that end a response for either model."""


def _merged(*parts: Any) -> dict[str, Any]:
    """The fields of configurations and the entries of dictionaries, as one stage's settings."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part if isinstance(part, dict) else dataclasses.asdict(part)
    return merged


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration by which a cell of the grid is named, without unused options
    of `LATER`.
    """
    return {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None or key not in LATER
    }


def rollout_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    rollout: RolloutConfig,
    elsewhere: ImportConfig | None = None,
    *,
    folds: int | None = None,
) -> None:
    """Sample and freeze contexts, or freeze the rollouts of another program.

    Args:
        run: The open run directory.
        models: The pair; the student samples.
        prompts: Which prompts are answered, and how they are rendered.
        rollout: How responses are sampled.
        elsewhere: A file of rollouts. Where its `rollouts` is set, those are frozen and nothing is
            sampled.
        folds: Folds of a probe that comes next, which too few prompts are refused for.
    """
    from diagnostics.contexts.generation_settings import positions_after_turn_end, sampling_facts
    from diagnostics.contexts.rollouts import chosen_batch_tokens, engine_facts, sampled
    from diagnostics.contexts.verifiers import judge_rollouts, recorded_verifier
    from diagnostics.contexts.vllm_rollouts import require_vllm

    if elsewhere is not None and elsewhere.rollouts is not None:
        freeze_stage(run, models, prompts, elsewhere, verifier=rollout.verifier)
        return
    path = prompts.prompts
    settings = _merged(models.writer_settings, prompts, rollout, file_hash("prompts", path))
    settings |= recorded_verifier(rollout.verifier)
    bound: int | None = None
    if folds is not None and "rollout" not in run.manifest["stages"]:
        bound = at_most(prompts)
        _require_enough(bound, folds)

    def work() -> dict:
        if rollout.rollout_engine == "vllm":
            require_vllm()  # before the models are loaded
        pair = models.pair
        found = choose_prompts(models, prompts, room=rollout.max_new_tokens)
        if folds is not None and len(found.prompts) != bound:
            _require_enough(len(found.prompts), folds)
        rendered = rendered_sha256(found.prompts)
        chosen = dataclasses.replace(rollout, batch_tokens=chosen_batch_tokens(pair, rollout))
        bank = sampled(pair, found.prompts, chosen, shards=_responses_so_far(run, rendered))
        bank, judged = judge_rollouts(bank, found.prompts, rollout.verifier, pair=pair.name)
        write_bank(run.path("contexts.parquet"), bank)
        drawn = sampling_facts(
            pair, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
        )
        behind = positions_after_turn_end(pair, bank)
        return {
            **pair.facts,
            "contexts": len(bank),
            "positions": bank.positions,
            "prompts": found.counts,
            **drawn,
            **engine_facts(chosen),
            "first_prompt": found.prompts[0].prompt,
            "rendered_prompts_sha256": rendered,
            **({"behind_turn_end": behind} if behind else {}),
            **({"correct": judged} if judged else {}),
        }

    run.stage(
        "rollout",
        settings=settings,
        outputs=["contexts.parquet"],
        work=work,
        code=(
            "contexts.rollouts",
            "contexts.vllm_rollouts",
            "contexts.prompts",
            "contexts.story_sums",
            "contexts.verifiers",
            "models.pair",
        ),
        models=models.fingerprint,
    )


def at_most(prompts: PromptConfig) -> int | None:
    """The most prompts that there can be, before any model or tokenizer is loaded.

    Returns:
        The rows of the file, at most as many as are asked for; None where only the pair or a data
        set knows, and where the file cannot be read, which its reader explains.
    """
    from diagnostics.contexts.prompt_sources import prompt_column_of, read_source

    path = prompts.prompts
    if path is None or path.startswith("hf:"):
        return prompts.contexts
    try:
        table = read_source(path, prompts.prompts_split)
        prompt_column_of(table, prompts.prompt_column, path)
    except DiagnosticsError:
        return None
    return len(table) if prompts.contexts is None else min(len(table), prompts.contexts)


def _require_enough(count: int | None, folds: int) -> None:
    """Refuse fewer prompts than folds, and say when there are too few for a verdict."""
    from diagnostics.analysis.config import FEWEST_PROMPTS

    if not count:  # unknown, or none: its reader explains
        return
    prompts = f"{count} prompt{'s' if count > 1 else ''}"
    if count < folds:
        raise DiagnosticsError(
            f"{prompts} cannot be divided into {folds} folds, one step on each. Use at least"
            f" {FEWEST_PROMPTS} prompts, from which on verdicts are given, or lower --folds."
        )
    if count < FEWEST_PROMPTS:
        log.warning(
            "%s: below %d on a side nothing is judged. The run goes on without a verdict; %d"
            " prompts more would allow one",
            prompts,
            FEWEST_PROMPTS,
            FEWEST_PROMPTS - count,
        )


def _responses_so_far(run: Run, rendered: str) -> Shards:
    """The responses that an interrupted run sampled for exactly these rendered prompts."""
    shards = run.shards(f"responses-{rendered[:16]}")
    folder = shards.folder
    others = (
        [path for path in folder.parent.glob("responses-*") if path != folder]
        if folder is not None and folder.parent.is_dir()
        else []
    )
    if others:
        log.warning(
            "%s was interrupted when the prompts were rendered otherwise (a chat template that"
            " writes the date?). Its responses to those prompts are set aside, and sampling begins"
            " anew",
            run.directory,
        )
    return shards


def freeze_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    elsewhere: ImportConfig,
    *,
    verifier: str = "auto",
) -> None:
    """Freeze a file of rollouts as the run's contexts; `prompts` says which prompts they answer."""
    from diagnostics.contexts.import_rollouts import freeze_rollouts
    from diagnostics.contexts.verifiers import recorded_verifier

    files = {**file_hash("rollouts", elsewhere.rollouts), **file_hash("prompts", prompts.prompts)}

    def work() -> dict:
        originals = (
            choose_prompts(models, dataclasses.replace(prompts, contexts=None)).prompts
            if prompts.prompts
            else []
        )
        kwargs = json_object(prompts.chat_template_kwargs, "--chat-template-kwargs")
        bank, counts = freeze_rollouts(
            models.pair,
            elsewhere.rollouts,
            rollouts_format=elsewhere.rollouts_format,
            turns=elsewhere.turns,
            prompts=originals,
            contexts=prompts.contexts,
            chat=prompts.chat,
            chat_template_kwargs=kwargs,
            verifier=verifier,
        )
        write_bank(run.path("contexts.parquet"), bank)
        return {
            **models.pair.facts,
            "contexts": len(bank),
            "positions": bank.positions,
            "rollouts": counts,
            "first_prompt": bank[0].prompt,
        }

    run.stage(
        "rollout",
        settings=_merged(
            models.writer_settings, prompts, elsewhere, files, recorded_verifier(verifier)
        ),
        outputs=["contexts.parquet"],
        work=work,
        code=("contexts.import_rollouts", "contexts.prompts", "models.pair"),
        models=models.fingerprint,
    )


LISTS = "teacher_logprobs.parquet"
"""A served teacher's lists on the run's contexts."""


def ask_stage(run: Run, models: Models, config: AskConfig) -> Path:
    """Ask a server for a teacher's likeliest tokens at every response position.

    The manifest has the model's name there and the length of the lists, and neither the address nor
    the key. The file is checked as `--teacher-logprobs` will read it before it is written.

    Args:
        run: A run directory with contexts.
        models: The pair, of which the student's tokenizer is loaded and nothing else.
        config: The server, and how it is asked.

    Returns:
        The path of the file.
    """
    from diagnostics.models.served.ask import ask_teacher, require_server
    from diagnostics.models.topk_teacher import lists_of

    path = run.path(LISTS)
    if "ask-teacher" not in run.manifest["stages"]:
        require_server(config)  # before the manifest says that the stage has begun

    def work() -> dict:
        bank, tokenizer = read_bank(run.path("contexts.parquet")), models.tokenizer
        frame, facts = ask_teacher(bank, tokenizer, config, shards=run.shards)
        largest = max(tokenizer.get_vocab().values())
        listed = max(i for lists in frame["top_ids"] for ids in lists for i in ids)
        teacher = lists_of(frame, LISTS, vocabulary=1 + max(largest, listed))
        teacher.require(bank)
        write_parquet(path, frame)
        return {**facts, "longest": teacher.width, "read_as_absent": teacher.absent}

    run.stage(
        "ask-teacher",
        settings={
            "served_model": config.served_model,
            "dialect": config.dialect,
            "top_logprobs": config.top_logprobs,
        },
        inputs=["contexts.parquet"],
        outputs=[LISTS],
        work=work,
        code=("models.served.ask",),
    )
    return path


def score_stage(run: Run, models: Models, config: ScoreConfig) -> None:
    """Measure every response position, and keep the most likely tokens of both models there."""
    from diagnostics.models.pair import stop_tokens
    from diagnostics.models.special_tokens import count_dropped
    from diagnostics.probing.scores import TOP_TYPES, TOPS, chosen_batch_tokens, measure_bank

    def work() -> dict:
        bank = read_bank(run.path("contexts.parquet"))
        size = chosen_batch_tokens(models.pair, config.batch_tokens)
        settings = dataclasses.replace(config, batch_tokens=size)
        measured = measure_bank(models.pair, bank, settings, shards=run.shards("scores"), tops=TOPS)
        write_parquet_parts(run.path("scores.parquet"), measured.tokens())
        write_parquet_parts(run.path("tops.parquet"), measured.tops(), types=TOP_TYPES)
        write_csv(run.path(STOPS), stop_tokens(models.pair))
        dropped = models.pair.dropped
        return {
            **models.pair.facts,
            "not_finite": measured.not_finite,
            "batch_tokens": size,
            **({"dropped_tokens": count_dropped(bank, dropped)} if dropped else {}),
        }

    run.stage(
        "score",
        settings={**models.settings, **dataclasses.asdict(config)},
        inputs=["contexts.parquet"],
        outputs=["scores.parquet", "tops.parquet", STOPS],
        work=work,
        code=("probing.scores", "models.special_tokens"),
        models=models.fingerprint,
    )
    join_tokens(run)


def probe_stage(
    run: Run,
    models: Models,
    config: ProbeConfig,
    controls: ControlConfig,
    *,
    batch_tokens: int,
    primary: str | None = None,
) -> None:
    """Take the steps and measure the gains, on batches of at most `batch_tokens` tokens.

    What will be concluded from (`primary`, as `PrimaryChoices.parse` reads it) is recorded first.
    """
    from diagnostics.probing.one_step import probe, read_scores
    from diagnostics.probing.trajectory import require_horizon

    names = ["calibration", "placebo"]
    names += ["horizon"] if require_horizon(controls.horizon) else []

    def work() -> dict:
        bank = read_bank(run.path("contexts.parquet"))
        tokens = read_scores(run.path("scores.parquet"))
        expect(_probe_work(len(tokens), len(bank), config, controls))
        result = probe(
            models.pair,
            bank,
            config,
            controls,
            tokens=tokens,
            batch_tokens=batch_tokens,
            shards=run.shards,
        )
        added = [name for name in result.tokens if name not in tokens or name in GAIN_KEYS]
        write_parquet(run.path("gains.parquet"), result.tokens[added])
        listed = {"exactness": "change of a bound"} if is_listed(tokens) else {}
        for name in names:
            write_csv(run.path(f"tables/{name}.csv"), getattr(result, name).assign(**listed))
        return {
            **dataclasses.asdict(result.step),
            "folds": len(result.steps),
            "horizon_rate": controls.rate(models.pair.name),
        }

    choices = register_primary(run, primary)
    run.stage(
        "probe",
        settings=_merged(
            models.settings, config, controls, {"batch_tokens": batch_tokens, "primary": choices}
        ),
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["gains.parquet", *(f"tables/{name}.csv" for name in names)],
        work=work,
        code=("probing.one_step",),
        models=models.fingerprint,
    )
    join_tokens(run)


def _probe_work(
    positions: int, contexts: int, config: ProbeConfig, controls: ControlConfig
) -> float:
    """About how many positions the student's forward passes of a probe go over."""
    from diagnostics.probing.step import CALIBRATION_TRIALS, FORWARD_AND_BACK
    from diagnostics.probing.trajectory import MINIBATCH, require_horizon

    nulls, horizon = len(controls.nulls), require_horizon(controls.horizon)
    passes = 2 + CALIBRATION_TRIALS - 1 + (1 + nulls) * (FORWARD_AND_BACK + config.folds)
    passes += 2 * controls.placebos + len(horizon)
    trained = max(horizon, default=0) * min(MINIBATCH, contexts / config.folds)
    return positions * (passes + FORWARD_AND_BACK * trained / contexts)


def register_primary(run: Run, primary: str | None) -> str:
    """Record the primary choices before the probe, and return them as text."""
    from diagnostics.analysis.config import PrimaryChoices

    choices = PrimaryChoices.parse(primary)
    run.register(dataclasses.asdict(choices), choices.sha256(), stage="probe")
    return choices.as_text()


def _primary(run: Run, primary: str | None) -> tuple[PrimaryChoices, str | None]:
    """The choices of an analysis, those recorded where none are given, and the recorded hash.

    A record that is not as its own hash has it counts as none.
    """
    from diagnostics.analysis.config import PrimaryChoices

    recorded = run.manifest.get("primary")
    if recorded is None:
        return PrimaryChoices.parse(primary), None
    stated = recorded.get("choices")
    stated = stated if isinstance(stated, dict) else {}
    known = PrimaryChoices.parse(",".join(f"{name}={value}" for name, value in stated.items()))
    digest = known.sha256()
    if digest != recorded.get("sha256") or dataclasses.asdict(known) != stated:
        log.warning(
            "The primary choices in %s are not as their hash has them, so that nothing was"
            " recorded before the probe",
            run.manifest_path,
        )
        digest = None
    return (known if primary is None else PrimaryChoices.parse(primary)), digest


def import_tokens(
    run: Run, path: Path, *, after: Path | None = None, tokenizer: str | None = None
) -> None:
    """Take over a token table of another program as the run's tokens.parquet.

    Args:
        run: The open run directory.
        path: The table, or a folder of rollouts.
        after: A table of the same positions with the trained student.
        tokenizer: Folder or Hugging Face id of the tokenizer that gives tokens their text.
    """
    from diagnostics.contexts.import_tokens import read_tokens

    def work() -> dict:
        tokens = read_tokens(path, after=after, tokenizer=tokenizer)
        write_parquet(run.path("tokens.parquet"), tokens)
        warned = [list(note) for note in tokens.attrs.get("warnings", ())]
        known = {"k": tokens.attrs["k"]} if "k" in tokens.attrs else {}
        return {"positions": len(tokens), "warnings": warned, **known}

    tables = {"tokens": path, **({} if after is None else {"tokens_after": after})}
    for name, table in tables.items():
        if not (os.path.isfile(table) or os.path.isdir(table)):
            raise DiagnosticsError(
                f"{table} is not a file. Name a token table in CSV, JSONL or parquet, or a folder"
                f" of rollouts, with --{name.replace('_', '-')}."
            )
    settings: dict[str, Any] = {name: table.name for name, table in tables.items()}
    hashes = {name: file_hash(name, str(table))[f"{name}_sha256"] for name, table in tables.items()}
    settings["sha256"] = hashes.pop("tokens")
    settings |= {f"{name}_sha256": digest for name, digest in hashes.items()}
    settings |= {} if tokenizer is None else {"tokenizer": tokenizer}
    local = tokenizer is not None and Path(tokenizer).exists()
    run.stage(
        "import",
        settings=settings,
        outputs=["tokens.parquet"],
        work=work,
        code=("contexts.import_tokens",),
        models=lambda: {"tokenizer": fingerprint_files(Path(str(tokenizer)))} if local else {},
    )


def after_stage(run: Run, models: Models, checkpoint: str, config: ScoreConfig) -> None:
    """Score the frozen positions again with a trained student, into `after.parquet`.

    A checkpoint is one step: no fold is held out for it, and there is no permuted teacher beside
    it. In a run without a probe the table then has its gains, neither `fold` nor `context_gain`,
    and the manifest says `steps: 1`. A probe's gains stay what they are, whichever came first; the
    checkpoint's are forward_kl minus forward_kl_after.

    Args:
        run: A run directory with scores.
        models: The pair of those scores.
        checkpoint: Folder or Hugging Face id of the trained student.
        config: Supports and batches, those of the scores.
    """
    from diagnostics.probing.scores import measure_bank

    def work() -> dict:
        pair = _trained_pair(models, checkpoint)
        bank = pair.graded(read_bank(run.path("contexts.parquet")))
        measured = measure_bank(pair, bank, config, shards=run.shards("after"))
        seen = _seen(checkpoint, bank)
        write_parquet_parts(run.path("after.parquet"), _after_parts(measured, config, seen))
        seen_facts = {} if seen is None else {"seen_positions": int(seen.sum())}
        return {**pair.facts, "steps": 1, "not_finite": measured.not_finite, **seen_facts}

    trained = {"after": fingerprint_files(Path(checkpoint))} if Path(checkpoint).exists() else {}
    run.stage(
        "after",
        settings={**models.settings, "after": checkpoint, **dataclasses.asdict(config)},
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["after.parquet"],
        work=work,
        code=("probing.scores", "contexts.trained_prompts"),
        models=lambda: models.fingerprint() | trained,
    )
    join_tokens(run)


def _after_parts(
    measured: MeasuredBank, config: ScoreConfig, seen_N: np.ndarray | None
) -> Iterator[pd.DataFrame]:
    """The parts of after.parquet: a trained student's columns, and whether it saw the prompt."""
    from diagnostics.probing.scores import as_after

    first = 0
    for part in measured.tokens():
        after, last = as_after(part, config), first + len(part)
        yield after if seen_N is None else after.assign(seen=seen_N[first:last])
        first = last


def _trained_pair(models: Models, checkpoint: str) -> Pair:
    """The pair with a trained student in the student's place."""
    from diagnostics.models.named_pairs import named_pair
    from diagnostics.models.pair import load_pair

    options = dataclasses.asdict(models.config)
    name = options.pop("pair")
    teacher = (
        {}
        if name is None or options["teacher_logprobs"]
        else {"teacher": named_pair(name).folders()[1]}
    )
    return load_pair(**options | teacher | {"student": checkpoint, "student_revision": None})


def _seen(checkpoint: str, bank: Bank) -> np.ndarray | None:
    """Whether the checkpoint was trained on each position's prompt [N]; None where unknown."""
    trained = read_trained_prompts(checkpoint)
    if trained is None:
        log.info(
            "%s holds no %s, so it is unknown which contexts the checkpoint was trained on",
            checkpoint,
            RECORD,
        )
        return None
    lengths = [len(context.sampled_ids) for context in bank]
    return np.repeat(seen_contexts(trained, bank), lengths)


def join_tokens(run: Run) -> None:
    """Join the files that hold its columns to tokens.parquet."""
    scores = run.require("scores.parquet")

    def written(name: str) -> bool:
        return run.path(name).exists() and run.as_written(name)

    added = [run.path(name) for name in ADDED if written(name)]
    after = run.path("after.parquet") if written("after.parquet") else None
    with run.joining("tokens.parquet"):
        parts = joined_parts(scores, added, after=after)
        write_parquet_parts(run.path("tokens.parquet"), parts)


ADDED = ("gains.parquet", "first_order.parquet", "training_gains.parquet")
"""Files whose columns the token table has beside those of the scores."""


def refuse_shards(models: Models) -> None:
    """Refuse to train with models that are sharded by hand."""
    if models.config.shard_teacher or models.config.shard_student:
        flag = "--shard-teacher" if models.config.shard_teacher else "--shard-student"
        raise DiagnosticsError(
            f"Training shards its models by Accelerate's own configuration; leave {flag}"
            " out and use `accelerate launch --config_file`."
        )


def refuse_sharded_student(models: Models, what: str) -> None:
    """Refuse a sharded student where only whole ones can be stepped."""
    if models.config.shard_student:
        raise DiagnosticsError(
            f"Got --shard-student, and {what} moves a student that every process holds whole."
            " Leave it out, use a larger device or --step-state host; rollout, score and probe"
            " take a sharded student."
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
    from diagnostics.contexts.generation_settings import sampling_facts
    from diagnostics.contexts.verifiers import recorded_verifier
    from diagnostics.training.engine_options import lora_config, require_installed, trl_fields
    from diagnostics.training.run import train
    from diagnostics.training.trackers import require_tracker

    refuse_shards(models)
    # Options that cannot be used are refused before anything is recorded or loaded.
    require_installed(engine.trl)
    require_tracker(engine.report_to, trl_fields(engine.trl))
    lora_config(engine.lora_rank, engine.peft)
    hashes = [
        file_hash("prompts", prompts.prompts),
        file_hash("eval_prompts", evaluation.eval_prompts),
        file_hash("trl", engine.trl),
        file_hash("peft", engine.peft),
    ]
    settings = _merged(models.settings, prompts, config, engine, evaluation, *hashes)
    settings |= recorded_verifier(evaluation.verifier)
    for name in ("resume", "save_every", "report_to"):  # they do not change what is trained
        del settings[name]

    def work() -> dict:
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
        given = trl_fields(engine.trl)
        narrowed = {name: given[name] for name in ("top_p", "top_k") if name in given}
        return {
            **models.pair.facts,
            "prompts": len(data),
            "held_out": len(held_out),
            **sampling_facts(models.pair, **narrowed),
            "rendered_prompts_sha256": rendered_sha256([*data, *held_out]),
        }

    run.stage(
        "train",
        settings=settings,
        outputs=lambda: _trained_files(run),
        work=work,
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


def analyze_stage(
    run: Run,
    config: AnalysisConfig,
    *,
    seed: int,
    training: str | None = None,
    k: int | None = None,
    primary: str | None = None,
    made: Ahead | None = None,
) -> None:
    """Write every table that the token table allows.

    Args:
        run: A run directory with `tokens.parquet`.
        config: Draws and level of the intervals.
        seed: Seed of the bootstrap.
        training: Directory of a finished validation, for claim C5.
        k: K of an imported table's columns.
        primary: What is concluded from, as `PrimaryChoices.parse` reads it; None takes what was
            recorded before the probe, or the defaults.
        made: Where another process makes the tables, from `analysis_to_make`.
    """
    stage, task = _analysis(run, config, seed, training, k, primary)
    tables: dict[str, pd.DataFrame] = {}

    def work() -> None:
        tables.update((made or Ahead({})).take("analyze", task()))
        tables.update(_engine_tables(run, tables, {**dataclasses.asdict(config), "seed": seed}))
        for name, table in tables.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    run.stage(
        "analyze",
        **stage,
        outputs=lambda: [f"tables/{name}.csv" for name in tables],
        work=work,
        derived=True,
    )


def analysis_to_make(
    run: Run, config: AnalysisConfig, *, seed: int, primary: str | None = None
) -> dict[str, Any] | None:
    """The task of `ahead` for the tables of `analyze_stage`; None where they are kept."""
    stage, task = _analysis(run, config, seed, None, None, primary)
    return None if run.has("analyze", **stage) else task()


def _analysis(
    run: Run,
    config: AnalysisConfig,
    seed: int,
    training: str | None,
    k: int | None,
    primary: str | None,
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What `Run.stage` is asked for in an analysis, and its task for `ahead`."""
    choices, registered = _primary(run, primary)
    source = table_path(training, "validation_verdicts", what="validation") if training else None
    settings = {**dataclasses.asdict(config), "seed": seed} | (
        {"training": training, "training_sha256": sha256_file(source)} if source else {}
    )
    settings |= {"k": k, "primary": choices.as_text(), "registered": registered}
    scored = _scored_k(run)
    if None not in (k, scored) and k != scored:
        raise DiagnosticsError(
            f"Got --k {k}, and this run was scored with --k {scored}. Leave it out; it is for"
            " imported tables."
        )

    def task() -> dict[str, Any]:
        from diagnostics.analysis.prompt_groups import read_studied

        tokens = read_studied(run.path("tokens.parquet"), seed)
        if "gain" not in tokens:
            raise DiagnosticsError(
                f"{run.path('tokens.parquet')} has no gains in nats."
                + (
                    " Give the scores of the trained student as well, with --tokens-after."
                    if "import" in run.manifest["stages"]
                    else " Run the probe stage first."
                )
            )
        options = {
            **dataclasses.asdict(config),
            "seed": seed,
            "training": read_csv(source) if source else None,
            "base_k": _table_k(run, tokens, scored or k),
            "choices": choices,
            "registered": registered,
        }
        return {"tokens": run.path("tokens.parquet"), "options": options}

    stage = {
        "settings": settings,
        "inputs": ["tokens.parquet", *_of_engine(run)],
        "code": ("analysis.study", *(["analysis.engine_check"] if _of_engine(run) else [])),
    }
    return stage, task


def _of_engine(run: Run) -> list[str]:
    """Files that a check of the sampling engine reads; none where the bank came without its
    log-probabilities, or the table is not of this run's contexts.
    """
    import pyarrow.parquet as pq

    path = run.path("contexts.parquet")
    if "import" in run.manifest["stages"] or files.kind(path) != "file":
        return []
    try:
        held = SAMPLED in pq.read_schema(path).names
    except (OSError, ValueError):  # a damaged file is named by the stage that reads it
        return []
    return (
        ["contexts.parquet", "tops.parquet"] if held and run.path("tops.parquet").exists() else []
    )


def _engine_tables(
    run: Run, tables: Mapping[str, pd.DataFrame], options: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    """The tables of the engine check, and the warnings with its own."""
    from diagnostics.analysis.engine_check import engine_tables, engine_warning

    if not _of_engine(run):
        return {}
    contexts, tops, tokens = (
        read_parquet(run.path(f"{name}.parquet")) for name in ("contexts", "tops", "tokens")
    )
    made = engine_tables(contexts, tokens, tops=tops, **options)
    found = engine_warning(made["engine_check"], made["engine_causes"])
    known = tables["warnings"]
    if found is not None:
        log.warning("%s", found[4])
        row = pd.DataFrame([found], columns=list(known.columns)).astype(known.dtypes.to_dict())
        known = row if known.empty else pd.concat([known, row], ignore_index=True)
    return {**made, "warnings": known}


def _table_k(run: Run, tokens: pd.DataFrame, stated: int | None) -> int | None:
    """Return the K of a token table's columns, as scoring, the table or `stated` says.

    Raises:
        DiagnosticsError: An imported table has columns that depend on K, and nothing states it.
    """
    from diagnostics.analysis.robustness import depends_on_k, known_k, shown_k

    k = known_k(tokens, stated)
    shown = shown_k(tokens) if "import" in run.manifest["stages"] else None
    if shown is not None and k != shown:
        raise DiagnosticsError(
            f"K = {k} is said of the imported table, and the values of its topk_overlap are those"
            f" of K = {shown}: none is an odd part. Give the K that the table was made with."
        )
    if k is None and depends_on_k(tokens) and "import" in run.manifest["stages"]:
        raise DiagnosticsError(
            f"The imported table does not say at which K {', '.join(depends_on_k(tokens)[:3])} were"
            " measured. Give it with --k, or in a column `k`."
        )
    return k


def table_path(directory: str, name: str, *, what: str) -> Path:
    """Return the path of another run's table.

    Raises:
        DiagnosticsError: The run has no table of that name, or the table has changed since.
    """
    path = Path(directory) / "tables" / f"{name}.csv"
    if not os.path.isfile(path):
        raise DiagnosticsError(
            f"{path} does not exist. Name the directory of a run whose {what} is finished."
        )
    return unchanged(directory, f"tables/{name}.csv")


def compare_stage(
    run: Run,
    config: ComparisonConfig,
    analysis: AnalysisConfig,
    *,
    seed: int,
    made: Ahead | None = None,
) -> None:
    """Compare criteria by the gains of the run, and with its interventions where it has any.

    What the directory compares already stays in its tables: criteria and budgets are added to them.

    Args:
        run: A run directory with `tokens.parquet`.
        config: Criteria, budgets and rules of selection.
        analysis: Draws and level of the intervals.
        seed: Seed of the bootstrap.
        made: Where another process makes the tables of the gains, from `comparison_to_make`.
    """
    from diagnostics.analysis.decision import decide
    from diagnostics.analysis.rank_agreement import agreement, answers

    config = _widened(run, "compare", config, analysis, {"seed": seed}, everything="criteria")
    tables: dict[str, pd.DataFrame] = {}
    effects = next(iter(_compared(run)[1:]), None)
    step = run.manifest["stages"].get("intervene", {}).get("settings", {})
    loss = step.get("loss", "reverse_kl")
    options = {**dataclasses.asdict(analysis), "seed": seed}

    def work() -> None:
        from diagnostics.analysis.prompt_groups import read_studied

        # Interventions are of every prompt, so they are compared with the whole table.
        path = run.path("tokens.parquet")
        whole = validate_tokens(read_parquet(path)) if effects else None
        tokens = read_studied(path, seed) if whole is None else whole
        tables.update((made or Ahead({})).take("compare", _comparison_task(run, config, options)))
        if effects:
            sums = read_parquet(run.path(effects))
            tables.update(
                offline_agreement=agreement(tokens, sums, rules=config.rules, **options),
                offline_answers=answers(tokens, sums, rules=config.rules),
                decision=decide(sums, loss=loss, choices=_primary(run, None)[0], **options),
            )
        tables.update(marked(tables, tokens, otherwise="change of a bound"))
        for name, table in tables.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    run.stage(
        "compare",
        settings={**dataclasses.asdict(config), **options},
        inputs=_compared(run),
        outputs=lambda: [f"tables/{name}.csv" for name in tables],
        work=work,
        derived=True,
        code=COMPARISON_CODE,
    )


def _compared(run: Run) -> list[str]:
    """Files that a comparison reads."""
    effects = "interventions.parquet"
    return ["tokens.parquet", *([effects] if run.path(effects).exists() else [])]


COMPARISON_CODE = (
    "analysis.correctness",
    "analysis.selection",
    "analysis.selection_draws",
    "analysis.rank_agreement",
    "analysis.criterion_labels",
    "analysis.decision",
)
"""Modules that decide the tables of a comparison."""


def _comparison_task(
    run: Run, config: ComparisonConfig, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `ahead` makes the tables of the gains from."""
    return {
        "tokens": run.path("tokens.parquet"),
        "options": {**dataclasses.asdict(config), **options},
    }


def comparison_to_make(
    run: Run, config: ComparisonConfig, analysis: AnalysisConfig, *, seed: int
) -> dict[str, Any] | None:
    """The task of `ahead` for the tables of `compare_stage`; None where they are kept as long as
    the interventions stay as they are.
    """
    config = _widened(
        run, "compare", config, analysis, {"seed": seed}, everything="criteria", say=False
    )
    options = {**dataclasses.asdict(analysis), "seed": seed}
    kept = run.has(
        "compare",
        settings={**dataclasses.asdict(config), **options},
        inputs=_compared(run),
        code=COMPARISON_CODE,
    )
    return None if kept else _comparison_task(run, config, options)


def decided_now(directory: Path, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The decision from a run's interventions as they are, before `compare` has written it."""
    from diagnostics.analysis.config import PrimaryChoices
    from diagnostics.analysis.decision import decide

    settings = manifest["stages"]["intervene"]["settings"]
    recorded = manifest.get("primary", {}).get("choices", {})
    choices = ",".join(f"{name}={value}" for name, value in recorded.items())
    return decide(
        read_parquet(unchanged(directory, "interventions.parquet")),
        loss=settings["loss"],
        choices=PrimaryChoices.parse(choices),
        draws=settings["draws"],
        level=settings["level"],
        seed=settings["seed"],
    )


def comparison_of(run: Run, asked: Sequence[str]) -> ComparisonConfig:
    """The comparison that a run makes of its own: of what it intervenes on, by the rules of its
    earlier comparison where it has one.

    Args:
        run: A run directory with `tokens.parquet`.
        asked: The criteria of its interventions.
    """
    from diagnostics import criteria as registry
    from diagnostics.analysis.selection import ComparisonConfig
    from diagnostics.probing.intervention import RIVALS

    tokens = validate_tokens(read_parquet(run.path("tokens.parquet")))
    names = [
        name
        for name in dict.fromkeys([*RIVALS, *(registry.find(each).name for each in asked)])
        if not registry.missing_columns(tokens, name)
    ]
    earlier = run.manifest["stages"].get("compare", {}).get("settings", {})
    rules = {name: earlier[name] for name in ("ties", "scope", "batch") if name in earlier}
    return ComparisonConfig(criteria=tuple(names), **rules)


def _widened(
    run: Run,
    stage: str,
    config: Any,
    *others: Any,
    names: Sequence[str] = ("criteria", "budgets"),
    everything: str | None = None,
    say: bool = True,
) -> Any:
    """A grid together with the one that the run already has, where all else is the same.

    Looks at the outcome that were taken stay in the tables, and count where verdicts are corrected
    for their number.

    Args:
        run: The run directory.
        stage: The stage's name in the manifest.
        config: The settings that are asked for.
        others: Further settings of the stage that have to be the same.
        names: The settings that are lists to be joined.
        everything: Name of a list that stands for all there are where it is empty.
        say: Whether what is added is logged.
    """
    earlier = run.manifest["stages"].get(stage, {}).get("settings", {})
    now = json.loads(json.dumps(recorded(_merged(config, *others))))
    lists = [earlier.get(name) for name in names]
    if not all(isinstance(each, list) for each in lists) or any(
        earlier.get(name) != value for name, value in now.items() if name not in names
    ):
        return config
    joined = {}
    for name, there in zip(names, lists, strict=True):
        asked = getattr(config, name)
        both = tuple(dict.fromkeys([*there, *asked]))
        joined[name] = () if name == everything and not (there and asked) else both
        if name != "criteria":
            joined[name] = tuple(sorted(both))
    kept = [
        str(each) for name in names for each in joined[name] if each not in getattr(config, name)
    ]
    if kept and say:
        log.info("%s: kept beside what is asked for: %s", stage, ", ".join(kept))
    return dataclasses.replace(config, **joined)


def intervene_stage(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
    drop: bool = False,
) -> None:
    """Take one step, and short trajectories, per criterion, budget and fold.

    Finished cells are kept in `cells`, so that a wider grid or a longer horizon goes on from there.
    What the directory has intervened on already stays in its tables: criteria, budgets and horizons
    are added to them.

    Args:
        run: A run directory with contexts and scores. Where it has the probe's gains, their folds
            and token_identity_gain are used.
        models: The pair.
        probe: The step and the folds, which have to be the probe's where the run has one.
        config: Criteria, budgets, horizons, and how cells are matched.
        analysis: Draws and level of the intervals.
        batch_tokens: The most tokens of a batch.
        drop: Whether criteria whose columns the scores lack are left out, and not refused.
    """
    from diagnostics.probing.intervention import SUPPORT, interventions
    from diagnostics.probing.intervention_table import summarize
    from diagnostics.probing.trajectory import require_horizon

    refuse_sharded_student(models, "an intervention")
    _require_probe_settings(run, probe, what="An intervention")
    config = _whole_grid(run, models, probe, config, analysis, batch_tokens, drop=drop)

    def work() -> dict:
        bank, tokens = read_bank(run.path("contexts.parquet")), _before_intervening(run)
        _say_grid(len(tokens), len(bank), probe, config)
        result = interventions(
            models.pair,
            bank,
            probe,
            config,
            tokens=tokens,
            k=_scored_k(run) or SUPPORT,
            batch_tokens=batch_tokens,
            cache=run.path("cells"),
            shards=run.shards,
        )
        write_parquet(run.path("interventions.parquet"), result.by_prompt())
        table = marked(
            {"intervention": summarize(result, **dataclasses.asdict(analysis), seed=probe.seed)},
            tokens,
        )["intervention"]
        write_csv(run.path("tables/intervention.csv"), table)
        chosen = result.calibration[result.calibration["chosen"]].iloc[0]
        return {
            "cells": len(result.cells),
            "steps": result.steps,
            "step_size": float(chosen.step_size),
            "relative_norm": float(chosen.relative_norm),
            "horizon": list(require_horizon(config.horizon)),
            "horizon_rate": config.trajectory(models.pair, probe).rate,
        }

    run.stage(
        "intervene",
        **_intervention(run, models, probe, config, analysis, batch_tokens),
        outputs=["interventions.parquet", "tables/intervention.csv"],
        work=work,
        derived=True,
        models=models.fingerprint,
    )


def _intervention(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    batch_tokens: int,
) -> dict[str, Any]:
    """What `Run.stage` is asked for in an intervention."""
    inputs = ["contexts.parquet", "scores.parquet"]
    inputs += [name for name in ("gains.parquet",) if run.path(name).exists()]
    settings = _merged(models.settings, probe, config, analysis, {"batch_tokens": batch_tokens})
    return {"settings": settings, "inputs": inputs, "code": ("probing.intervention",)}


def _with_columns(run: Run, config: InterventionConfig, *, say: bool) -> InterventionConfig:
    """The grid without the criteria that read a column which the scores lack."""
    from diagnostics import criteria as registry

    tokens = validate_tokens(read_parquet(run.require("scores.parquet")))
    lacking = {name: registry.missing_columns(tokens, name) for name in config.criteria}
    for name, columns in lacking.items():
        if columns and say:
            log.warning("%s is left out: the scores lack %s", name, ", ".join(columns))
    kept = tuple(name for name in config.criteria if not lacking[name])
    return dataclasses.replace(config, criteria=kept)


def _say_grid(
    positions: int, contexts: int, probe: ProbeConfig, config: InterventionConfig
) -> None:
    """Say how many trajectories a grid has, and how much work that is."""
    from diagnostics import criteria as registry
    from diagnostics.probing.intervention import RIVALS
    from diagnostics.probing.step import CALIBRATION_TRIALS, FORWARD_AND_BACK
    from diagnostics.probing.trajectory import require_horizon

    names = {*RIVALS, *(registry.find(name).name for name in config.criteria)} - {"full"}
    draws = sum(config.random_draws if registry.is_seeded(name) else 1 for name in names)
    cells, horizon = 1 + len(set(config.budgets)) * draws, require_horizon(config.horizon)
    trained = max(horizon, default=0) * min(config.minibatch, contexts / probe.folds) / contexts
    per_cell = 1 + len(horizon) + FORWARD_AND_BACK / probe.folds + (1 + FORWARD_AND_BACK) * trained
    passes = CALIBRATION_TRIALS + FORWARD_AND_BACK + probe.folds * (1 + cells * per_cell)
    expect(positions * passes)
    takes = forecast(positions * passes)
    log.info(
        "%d selections on each of %d folds, with rivals and draws; each is measured after %s"
        " steps%s. Finished ones are kept",
        cells,
        probe.folds,
        ", ".join(map(str, horizon)) or "1",
        f": about {takes} at the probe's pace" if takes else "",
    )


def _whole_grid(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    batch_tokens: int,
    *,
    drop: bool,
    say: bool = True,
) -> InterventionConfig:
    """The grid that is measured: what is asked for and can be, with what is there already."""
    if drop:
        config = _with_columns(run, config, say=say)
    others = (models.settings, probe, analysis, {"batch_tokens": batch_tokens})
    names = ("criteria", "budgets", "horizon")
    return _widened(run, "intervene", config, *others, names=names, say=say)


def _before_intervening(run: Run) -> pd.DataFrame:
    """The scores, with what an intervention may see of the gains."""
    tokens = validate_tokens(read_parquet(run.path("scores.parquet")))
    if not run.path("gains.parquet").exists():
        return tokens
    gains = read_parquet(run.path("gains.parquet"))
    known = [name for name in BEFORE_INTERVENING if name in gains]
    return tokens.merge(gains[[*GAIN_KEYS, *known]], on=list(GAIN_KEYS), how="left")


def cells_to_measure(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
    drop: bool,
) -> dict[str, Any] | None:
    """The task of `ahead` for the trajectories of `intervene_stage`.

    None where they are measured already, no core would be free for them, or the models are not on
    the processor: a device that is shared would be no faster, and each process holds both models.
    """
    import torch

    from diagnostics.models.loading import resolve_device
    from diagnostics.pipeline.ahead import cores
    from diagnostics.probing.intervention import SUPPORT

    config = _whole_grid(run, models, probe, config, analysis, batch_tokens, drop=drop, say=False)
    asked = _intervention(run, models, probe, config, analysis, batch_tokens)
    threads = torch.get_num_threads()
    if (
        run.has("intervene", **asked)
        or 2 * threads > cores()
        or resolve_device(models.config.device).type != "cpu"
    ):
        return None
    options = {
        "probe": probe,
        "config": config,
        "tokens": _before_intervening(run),
        "cache": run.path("cells"),
        "k": _scored_k(run) or SUPPORT,
        "batch_tokens": batch_tokens,
    }
    return {
        "pair": models.config,
        "directory": run.directory,
        "contexts": run.path("contexts.parquet"),
        "threads": threads,
        "options": options,
    }


BEFORE_INTERVENING = ("fold", "split", "token_identity_gain")
"""Columns of the probe's gains that an intervention may see: no outcome of a position itself."""


def scored_supports(run: Run) -> tuple[int, tuple[int, ...]]:
    """The K of the run's scores and the other K that were measured beside it; the defaults where
    the manifest does not say.
    """
    from diagnostics.probing.scores import ScoreConfig

    settings = run.manifest["stages"].get("score", {}).get("settings", {})
    usual = ScoreConfig()
    return settings.get("k", usual.k), tuple(settings.get("sweep", usual.sweep))


def _scored_k(run: Run) -> int | None:
    """The K of the run's scores; None where they were not made by this run."""
    return run.manifest["stages"].get("score", {}).get("settings", {}).get("k")


def attribute_stage(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: AttributionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
) -> None:
    """Attribute the probe's step to the positions whose loss caused it.

    Args:
        run: A run directory with contexts, scores and gains.
        models: The pair.
        probe: The step, which has to be the probe's.
        config: How many positions are attributed, and whether the whole kernel is written.
        analysis: Draws and level of the intervals.
        batch_tokens: The most tokens of a batch.
    """
    from diagnostics.probing.attribution import attribute

    refuse_sharded_student(models, "an attribution")
    _require_probe_settings(run, probe, what="An attribution")
    names = ("linearity", "kernel", "kernel_shares", "lift")

    def work() -> None:
        bank, tokens = (
            read_bank(run.path("contexts.parquet")),
            validate_tokens(read_parquet(run.path("scores.parquet"))),
        )
        result = attribute(
            models.pair,
            bank,
            probe,
            config,
            analysis,
            tokens=tokens,
            batch_tokens=batch_tokens,
        )
        write_parquet(
            run.path("first_order.parquet"), result.tokens[[*GAIN_KEYS, "first_order_gain", "lift"]]
        )
        made = dict(
            zip(names, (result.linearity, result.kernel, result.shares, result.lift), strict=True)
        )
        for name, table in marked(made, tokens, otherwise="change of a bound").items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    settings = _merged(models.settings, probe, config, analysis, {"batch_tokens": batch_tokens})
    run.stage(
        "attribute",
        settings=settings,
        inputs=["contexts.parquet", "scores.parquet", "gains.parquet"],
        outputs=["first_order.parquet", *(f"tables/{name}.csv" for name in names)],
        work=work,
        derived=True,
        code=("probing.attribution",),
        models=models.fingerprint,
    )
    join_tokens(run)


def _require_probe_settings(run: Run, probe: ProbeConfig, *, what: str) -> None:
    """Refuse settings of another step than the probe's: all tables of a run describe the same."""
    earlier = run.manifest["stages"].get("probe", {}).get("settings", {})
    if "held_out" in earlier:
        raise DiagnosticsError(
            f"{run.directory} was probed with --held-out {earlier['held_out']}, by a version that"
            f" took one step. {RETIRED['held_out']} Probe again in another --output-dir."
        )
    different = [
        f"{name}: {earlier[name]!r} there, {value!r} now"
        for name, value in dataclasses.asdict(probe).items()
        if name in earlier and earlier[name] != value
    ]
    if different:
        raise DiagnosticsError(
            f"{what} explains the step of the run's probe, and {run.directory} holds one with other"
            f" settings ({'; '.join(different)}). Use the probe's settings, or another"
            " --output-dir."
        )


def report_stage(run: Run, *, contexts: int | None = None, pdf: bool = False) -> Path:
    """Draw the figures and write the report, where it is not of the same files already.

    Args:
        run: The open run directory.
        contexts: How many contexts are shown token by token; None is the report's default.
        pdf: Whether every figure is written as PDF too.

    Returns:
        The path of report.html.
    """
    from diagnostics.report.page import CONTEXTS, build

    shown = CONTEXTS if contexts is None else contexts
    of_now = _page_inputs(run, shown, pdf)
    if _pages_are(run, of_now):
        log.info("report: kept, since nothing that it shows has changed")
        return run.path("report.html")
    page = build(run.directory, contexts=shown, pdf=pdf)
    pages = json.loads(files.read_inside(run.directory, "pages.json"))
    made_of = _made_of(of_now, pages["report.html"][-1])
    write_json(run.path("pages.json"), pages | {MADE_OF: [made_of]})
    return page


MADE_OF = "made of"
"""Entry of pages.json with the hash of what the report was made of, and of the report."""


def _page_inputs(run: Run, contexts: int, pdf: bool) -> str:
    """Hash over the files that a report reads, how much of them it shows, and its code."""
    read = ["manifest.json", "tokens.parquet", "contexts.parquet", "tops.parquet"]
    read += ["metrics.jsonl", "positions.jsonl", "train.json", "timings.jsonl", "evaluations.csv"]
    read += [name for name, kind in files.walk(run.directory, "tables") if kind == "file"]
    content = [(name, files.hash_inside(run.directory, name)) for name in sorted(read)]
    code = code_version("report.page", "report.run_results")
    return hashlib.sha256(json.dumps([content, contexts, pdf, code]).encode()).hexdigest()


def _made_of(inputs: str, page: str) -> str:
    return hashlib.sha256(f"{inputs} {page}".encode()).hexdigest()


def _pages_are(run: Run, inputs: str) -> bool:
    """Whether the directory's pages are whole and were made of these inputs."""
    try:
        pages = json.loads(files.read_inside(run.directory, "pages.json"))
        of, page = pages.pop(MADE_OF)[0], pages["report.html"][-1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return of == _made_of(inputs, page) and all(
        files.hash_inside(run.directory, name) in hashes for name, hashes in pages.items()
    )


def validate_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    config: ValidateConfig,
    evaluation: EvaluationConfig,
    *,
    offline: str | None,
    analysis: AnalysisConfig,
    engine: EngineConfig | None = None,
) -> None:
    """Train the grid, cell by cell, and write its tables.

    Finished cells are kept, and a wider grid adds to them.

    Args:
        run: The open run directory.
        models: The pair.
        prompts: The prompts that are trained on.
        config: Criteria, budgets and seeds of the grid, and the length of each training.
        evaluation: What is measured on held-out prompts.
        offline: Directory of a finished main job, whose answers are compared with the trainings.
        analysis: Draws and level of the intervals.
        engine: How TRL runs each training, except for what a grid decides itself.
    """
    from diagnostics.contexts.verifiers import recorded_verifier
    from diagnostics.measure.losses import check_loss
    from diagnostics.training import grid

    check_loss(config.loss)
    refuse_shards(models)
    folder = run.path("cells")
    options = _engine_of_cells(engine)
    judged_by = recorded_verifier(evaluation.verifier)
    sources = {
        **models.fingerprint(),
        **file_hash("prompts", prompts.prompts),
        **file_hash("eval_prompts", evaluation.eval_prompts),
        **file_hash("trl", options.get("trl")),
        **file_hash("peft", options.get("peft")),
        **{name: judged_by[name] for name in ("verifier_sha256",) if name in judged_by},
    }
    earlier = run.manifest["stages"].get("validate", {}).get("inputs", {})
    job = grid.Job(
        folder,
        *map(_settings, (models.config, prompts, evaluation, config)),
        options,
        sources,
        code_version("training.run", "training.trl_trainer", "training.evaluation"),
        run.accept_code,
        {file.removeprefix("cells/"): digest for file, digest in earlier.items()},
    )
    cells, made = grid.grid(config), {}
    write_json(run.manifest_path, run.manifest)
    grid.run_grid(job, cells, workers=config.workers)

    def work() -> None:
        made.update(_validation_tables(folder, cells, offline, analysis))
        for name, table in made.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    settings = _merged(
        models.settings,
        _settings(prompts),
        config,
        evaluation,
        analysis,
        {"offline": offline},
        options,
        judged_by,
    )
    names = ["untouched", *(cell.name for cell in cells)]
    run.stage(
        "validate",
        settings=settings,
        inputs=[f"cells/{name}.{kind}" for name in names for kind in ("parquet", "json")]
        + [f"cells/{cell.name}.curve.parquet" for cell in cells],
        outputs=lambda: [f"tables/{name}.csv" for name in made],
        work=work,
        derived=True,
        code=("training.grid", "training.run"),
        models=models.fingerprint,
    )


def _validation_tables(
    folder: Path, cells: Sequence[TrainingCell], offline: str | None, analysis: AnalysisConfig
) -> dict[str, pd.DataFrame]:
    """The tables of a finished grid, whose cells lie in `folder`."""
    from diagnostics.analysis import foresight
    from diagnostics.analysis.claims import of_training
    from diagnostics.training import grid

    competing = dict.fromkeys(
        (cell.criterion, cell.budget) for cell in cells if cell.criterion != "full"
    )
    answers = (
        foresight.offline_run(Path(offline), competing, draws=analysis.draws) if offline else None
    )
    rows = grid.read_outcomes(folder, cells)
    made = foresight.tables(rows, answers, **dataclasses.asdict(analysis))
    verdicts = [*_claims_of(offline), of_training(made["validation_verdicts"])]
    return {**made, "verdicts": pd.concat(verdicts, ignore_index=True)}


def _engine_of_cells(engine: EngineConfig | None) -> dict[str, Any]:
    """Return the engine options that differ from their defaults.

    Raises:
        DiagnosticsError: An option was given that a grid decides itself.
    """
    from diagnostics.training.run import EngineConfig

    usual = dataclasses.asdict(EngineConfig())
    given = {
        key: value
        for key, value in dataclasses.asdict(engine or EngineConfig()).items()
        if value != usual[key] and key != "max_new_tokens"
    }
    decided = [
        f"--{key.replace('_', '-')}"
        for key in ("save_every", "probe_every", "resume")
        if key in given
    ]
    if decided:
        raise DiagnosticsError(
            f"A grid of trainings takes no {' or '.join(decided)}: each training is short, kept"
            " when it ends and begun again otherwise. Leave it out."
        )
    if "report_to" in given:
        raise DiagnosticsError(
            "A grid of trainings reports to no tracker: each training's log is kept as"
            " cells/*.curve.parquet. Leave --report-to out."
        )
    return given


def _claims_of(directory: str | None) -> list[pd.DataFrame]:
    """The verdicts of a finished main job, which a validation's table of verdicts begins with."""
    path = Path(directory) / "tables/verdicts.csv" if directory else None
    if path is None or not path.exists():
        return []
    table = read_csv(unchanged(directory, "tables/verdicts.csv"))
    if "population" not in table:
        log.warning(
            "%s was written by an earlier version, whose verdicts had other tests; they are left"
            " out. Run analyze there again",
            path,
        )
        return []
    return [table[table["population"] != "training"]]
