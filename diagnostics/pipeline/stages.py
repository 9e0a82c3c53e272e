"""The stages on a run directory: each reads files, calls one function, writes files.

    rollout -> contexts.parquet     score -> scores.parquet, tops.parquet     probe -> gains.parquet, tables/calibration.csv
    analyze -> tables/*.csv         report -> figures/*, report.html
    compare -> tables/selection_*.csv, tables/offline_*.csv      intervene -> interventions.parquet, tables/intervention.csv, cells/*
    attribute -> first_order.parquet, tables/{linearity,kernel,kernel_shares,lift}.csv
    score --after -> gains.parquet from a checkpoint in place of the probe's
    train -> training_gains.parquet and what `training` lists        validate -> what `validation` lists

`tokens.parquet` is scores and gains side by side, written anew whenever either appears. Settings of
rollout, score, probe and train are fixed once their files exist; tables and report are derived, and
made again when what they come from, or how they are asked for, has changed."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pandas as pd

from diagnostics.analysis.bounds import is_listed, marked
from diagnostics.contexts.choose_prompts import (
    choose_prompts,
    json_object,
    rendered_sha256,
    training_prompts,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import code_version, fingerprint_files
from diagnostics.core.manifest import unchanged
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_csv, write_json, write_parquet
from diagnostics.core.types import Bank, Prompt, read_bank
from diagnostics.models.identity import Models, file_hash
from diagnostics.pipeline.run import Run

log = logging.getLogger("diagnostics")
LATER = ("prompts_split", "max_prompt_tokens", "teacher_logprobs")
"""Options that the cells of earlier grids do not name; None is what those did."""
GAIN_KEYS = ("context_id", "position")


def _settings(config) -> dict:
    """A configuration as a cell of the grid is named by it: an option that came later is named only
    where it is used.
    """
    return {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None or key not in LATER
    }


def rollout_stage(run: Run, models: Models, prompts, rollout, elsewhere=None) -> None:
    """Sample and freeze contexts; with `elsewhere.rollouts`, freeze what was sampled elsewhere."""
    from diagnostics.contexts.rollouts import behind_turn_end, sampling_facts
    from diagnostics.contexts.rollouts import rollout as sample

    if elsewhere is not None and elsewhere.rollouts is not None:
        return freeze_stage(run, models, prompts, elsewhere)
    path = prompts.prompts
    settings = {
        **models.writer_settings,
        **dataclasses.asdict(prompts),
        **dataclasses.asdict(rollout),
        **file_hash("prompts", path),
    }

    def work() -> dict:
        pair = models.pair
        found = choose_prompts(models, prompts, room=rollout.max_new_tokens)
        rendered = rendered_sha256(found.prompts)
        bank = sample(
            pair,
            found.prompts,
            **dataclasses.asdict(rollout),
            shards=_responses_so_far(run, rendered),
        )
        write_parquet(run.path("contexts.parquet"), bank.to_frame())
        drawn = sampling_facts(
            pair, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
        )
        behind = behind_turn_end(pair, bank)
        return {
            **pair.facts,
            "contexts": len(bank),
            "positions": bank.positions,
            "prompts": found.counts,
            **drawn,
            "first_prompt": found.prompts[0].prompt,
            "rendered_prompts_sha256": rendered,
            **({"behind_turn_end": behind} if behind else {}),
        }

    run.stage(
        "rollout",
        settings=settings,
        outputs=["contexts.parquet"],
        work=work,
        code=("contexts.rollouts", "contexts.prompts", "contexts.story_sums", "models.pair"),
        models=models.fingerprint,
    )


def _responses_so_far(run: Run, rendered: str):
    """What an interrupted run sampled after the same rendered prompts, and after no others."""
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
            " writes the date?): what was sampled after those is set aside, and sampling begins"
            " anew",
            run.directory,
        )
    return shards


def freeze_stage(run: Run, models: Models, prompts, elsewhere) -> None:
    """Freeze a file of rollouts as the run's contexts; --prompts names the prompts that they came
    from.
    """
    from diagnostics.contexts.import_rollouts import freeze

    files = {**file_hash("rollouts", elsewhere.rollouts), **file_hash("prompts", prompts.prompts)}

    def work() -> dict:
        originals = (
            choose_prompts(models, dataclasses.replace(prompts, contexts=None)).prompts
            if prompts.prompts
            else []
        )
        kwargs = json_object(prompts.chat_template_kwargs, "--chat-template-kwargs")
        bank, counts = freeze(
            models.pair,
            elsewhere.rollouts,
            rollouts_format=elsewhere.rollouts_format,
            prompts=originals,
            contexts=prompts.contexts,
            chat=prompts.chat,
            chat_template_kwargs=kwargs,
        )
        write_parquet(run.path("contexts.parquet"), bank.to_frame())
        return {
            **models.pair.facts,
            "contexts": len(bank),
            "positions": bank.positions,
            "rollouts": counts,
            "first_prompt": bank[0].prompt,
        }

    run.stage(
        "rollout",
        settings={
            **models.writer_settings,
            **dataclasses.asdict(prompts),
            **dataclasses.asdict(elsewhere),
            **files,
        },
        outputs=["contexts.parquet"],
        work=work,
        code=("contexts.import_rollouts", "contexts.prompts", "models.pair"),
        models=models.fingerprint,
    )


def score_stage(run: Run, models: Models, config) -> None:
    """Measure every response position, and keep what both models would have said there."""
    from diagnostics.probing.scores import score_with_tops

    def work() -> dict:
        bank = read_bank(run.path("contexts.parquet"))
        tokens, tops = score_with_tops(
            models.pair, bank, **dataclasses.asdict(config), shards=run.shards("scores")
        )
        write_parquet(run.path("scores.parquet"), tokens)
        write_parquet(run.path("tops.parquet"), tops)
        return {**models.pair.facts, "not_finite": int(tokens["forward_kl"].isna().sum())}

    run.stage(
        "score",
        settings={**models.settings, **dataclasses.asdict(config)},
        inputs=["contexts.parquet"],
        outputs=["scores.parquet", "tops.parquet"],
        work=work,
        code=("probing.scores",),
        models=models.fingerprint,
    )
    join_tokens(run)


def probe_stage(run: Run, models: Models, config, *, batch_tokens: int) -> None:
    """Take the step and measure the gains."""
    from diagnostics.probing.one_step import probe

    def work() -> dict:
        bank, tokens = (
            read_bank(run.path("contexts.parquet")),
            validate_tokens(read_parquet(run.path("scores.parquet"))),
        )
        result = probe(
            models.pair,
            bank,
            tokens=tokens,
            batch_tokens=batch_tokens,
            **dataclasses.asdict(config),
            shards=run.shards,
        )
        added = [name for name in result.tokens if name not in tokens or name in GAIN_KEYS]
        write_parquet(run.path("gains.parquet"), result.tokens[added])
        listed = {"exactness": "change of a bound"} if is_listed(tokens) else {}
        write_csv(run.path("tables/calibration.csv"), result.calibration.assign(**listed))
        return dataclasses.asdict(result.step)

    run.stage(
        "probe",
        settings={**models.settings, **dataclasses.asdict(config), "batch_tokens": batch_tokens},
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["gains.parquet", "tables/calibration.csv"],
        work=work,
        code=("probing.one_step",),
        models=models.fingerprint,
    )
    join_tokens(run)


def import_tokens(run: Run, path: Path) -> None:
    """Bring a token table from elsewhere into the run as its tokens.parquet."""
    from diagnostics.contexts.import_tokens import read_tokens

    def work() -> None:
        write_parquet(run.path("tokens.parquet"), read_tokens(path))

    if not os.path.isfile(path):
        raise DiagnosticsError(
            f"{path} is not a file. Name a token table in CSV, JSONL or parquet with --tokens."
        )
    run.stage(
        "import",
        settings={"tokens": path.name, "sha256": sha256_file(path)},
        outputs=["tokens.parquet"],
        work=work,
        code=("contexts.import_tokens",),
    )


def after_stage(run: Run, models: Models, checkpoint: str, *, batch_tokens: int) -> None:
    """Gains of a student that was trained anywhere: the frozen positions scored again with it."""
    from diagnostics.models.pair import load_pair, named_pair
    from diagnostics.probing.one_step import gains
    from diagnostics.training.evaluation import FrozenBank

    def work() -> dict:
        options = dataclasses.asdict(models.config)
        name = options.pop("pair")
        teacher = (
            {}
            if name is None or options["teacher_logprobs"]
            else {"teacher": named_pair(name).folders()[1]}
        )
        pair = load_pair(**options | teacher | {"student": checkpoint, "student_revision": None})
        before = read_parquet(run.path("scores.parquet"))
        after = FrozenBank(
            pair, read_bank(run.path("contexts.parquet")), batch_tokens=batch_tokens
        ).divergences()
        columns = gains((before["forward_kl"].to_numpy(), before["reverse_kl"].to_numpy()), after)
        write_parquet(run.path("gains.parquet"), before[list(GAIN_KEYS)].assign(**columns))
        return pair.facts

    trained = {"after": fingerprint_files(Path(checkpoint))} if Path(checkpoint).exists() else {}
    if "probe" in run.manifest["stages"]:
        raise DiagnosticsError(
            f"{run.directory} holds the gains of a probe. Score the same contexts in another"
            " --output-dir, and the checkpoint there."
        )
    run.stage(
        "after",
        settings={**models.settings, "after": checkpoint, "batch_tokens": batch_tokens},
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["gains.parquet"],
        work=work,
        code=("probing.one_step", "training.evaluation"),
        models=lambda: models.fingerprint() | trained,
    )
    join_tokens(run)


def join_tokens(run: Run) -> None:
    """Write tokens.parquet from the files that hold its columns."""
    tokens = read_parquet(run.require("scores.parquet"))
    for name in ("gains.parquet", "first_order.parquet", "training_gains.parquet"):
        if run.path(name).exists() and run.as_written(name):
            added = read_parquet(run.path(name))
            added = added.drop(columns=[column for column in added if column.endswith("_step_0")])
            tokens = tokens.merge(added, on=list(GAIN_KEYS), how="left", validate="one_to_one")
    with run.joining("tokens.parquet"):
        write_parquet(run.path("tokens.parquet"), validate_tokens(tokens))


def _refuse_shards(models: Models) -> None:
    if models.config.shard_teacher:
        raise DiagnosticsError(
            "Training shards its models by Accelerate's own configuration; leave --shard-teacher"
            " out and use `accelerate launch --config_file`."
        )


def frozen_bank(run: Run, pair, held_out: list[Prompt], *, max_new_tokens: int) -> Bank | None:
    """The run's contexts; where there are none, the untouched student answers the held-out
    prompts.
    """
    from diagnostics.contexts.rollouts import rollout

    if run.path("contexts.parquet").exists():
        return read_bank(run.path("contexts.parquet"))
    if not held_out:
        return None
    bank = rollout(pair, held_out, max_new_tokens=max_new_tokens)
    write_parquet(run.path("contexts.parquet"), bank.to_frame())
    return bank


def train_stage(run: Run, models: Models, prompts, config, engine, evaluation) -> None:
    """Train the student; gains on the frozen bank join the token table where there is one."""
    from diagnostics.contexts.rollouts import sampling_facts
    from diagnostics.training.engine_options import lora_config, require_installed, trl_fields
    from diagnostics.training.run import train

    _refuse_shards(models)
    (
        require_installed(engine.trl),
        lora_config(engine.lora_rank, engine.peft),
    )  # refused before anything is recorded or loaded
    settings = {
        **models.settings,
        **dataclasses.asdict(prompts),
        **dataclasses.asdict(config),
        **dataclasses.asdict(engine),
        **dataclasses.asdict(evaluation),
        **file_hash("prompts", prompts.prompts),
        **file_hash("eval_prompts", evaluation.eval_prompts),
        **file_hash("trl", engine.trl),
        **file_hash("peft", engine.peft),
    }
    settings = {
        key: value for key, value in settings.items() if key not in ("resume", "save_every")
    }

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
        wanted = held_out or engine.probe_every
        bank = (
            frozen_bank(run, models.pair, held_out, max_new_tokens=engine.max_new_tokens)
            if wanted
            else None
        )
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
        narrowed = {
            name: value
            for name, value in trl_fields(engine.trl).items()
            if name in ("top_p", "top_k")
        }
        return {
            **models.pair.facts,
            "prompts": len(data),
            "held_out": len(held_out),
            **sampling_facts(models.pair, **narrowed),
            "rendered_prompts_sha256": rendered_sha256([*data, *held_out]),
        }

    def outputs() -> list[str]:
        names = (
            "train.json",
            "metrics.jsonl",
            "evaluations.csv",
            "evaluations.parquet",
            "training_gains.parquet",
        )
        weights = sorted(run.path("student").glob("*.safetensors"))
        return [name for name in names if run.path(name).exists()] + [
            f"student/{path.name}" for path in weights
        ]

    run.stage(
        "train",
        settings=settings,
        outputs=outputs,
        work=work,
        code=("training.run", "training.trl_trainer", "training.engine_options"),
        models=models.fingerprint,
    )
    if run.path("scores.parquet").exists():
        join_tokens(run)


def analyze_stage(
    run: Run, config, *, seed: int, training: str | None = None, k: int | None = None
) -> None:
    """Write every table that the token table allows; training: directory of a finished validation,
    for claim C5; k: K of an imported table."""
    from diagnostics.analysis.study import study

    tables, source = (
        {},
        (table_path(training, "validation_verdicts", what="validation") if training else None),
    )
    trained = pd.read_csv(source) if source else None
    settings = {**dataclasses.asdict(config), "seed": seed} | (
        {"training": training, "training_sha256": sha256_file(source)} if source else {}
    )
    settings |= {"k": k}
    scored = run.manifest["stages"].get("score", {}).get("settings", {}).get("k")
    if None not in (k, scored) and k != scored:
        raise DiagnosticsError(
            f"Got --k {k}, and this run was scored with --k {scored}. Leave it out; it is for"
            " imported tables."
        )

    def work() -> None:
        tokens = validate_tokens(read_parquet(run.path("tokens.parquet")))
        if "gain" not in tokens:
            raise DiagnosticsError(
                f"{run.path('tokens.parquet')} has no gains. Run the probe stage first."
            )
        tables.update(
            study(
                tokens,
                draws=config.draws,
                level=config.level,
                seed=seed,
                training=trained,
                base_k=_table_k(run, tokens, scored or k),
            )
        )
        for name, table in tables.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    run.stage(
        "analyze",
        settings=settings,
        inputs=["tokens.parquet"],
        outputs=lambda: [f"tables/{name}.csv" for name in tables],
        work=work,
        derived=True,
        code=("analysis.study",),
    )


def _table_k(run: Run, tokens: pd.DataFrame, stated: int | None) -> int | None:
    """K of a token table's columns: the run's own scoring says it, an imported table or its flag
    has to.
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
    """Where another run keeps a table. Raises DiagnosticsError where it has none of that name, or a
    changed one.
    """
    path = Path(directory) / "tables" / f"{name}.csv"
    if not os.path.isfile(path):
        raise DiagnosticsError(
            f"{path} does not exist. Name the directory of a run whose {what} is finished."
        )
    return unchanged(directory, f"tables/{name}.csv")


def compare_stage(run: Run, config, analysis, *, seed: int) -> None:
    """Compare criteria on the gains at hand, and with interventions where there are any."""
    from diagnostics.analysis.rank_agreement import agreement, answers
    from diagnostics.analysis.selection import ALL_OUTCOMES, compare

    tables = {}
    effects = "interventions.parquet" if run.path("interventions.parquet").exists() else None

    def work() -> None:
        tokens = validate_tokens(read_parquet(run.path("tokens.parquet")))
        options = {**dataclasses.asdict(analysis), "seed": seed}
        tables.update(
            compare(
                tokens,
                outcomes=ALL_OUTCOMES,
                criteria=config.criteria,
                budgets=config.budgets,
                **options,
            )
        )
        if effects:
            sums = read_parquet(run.path(effects))
            tables.update(
                offline_agreement=agreement(tokens, sums, **options),
                offline_answers=answers(tokens, sums),
            )
        tables.update(marked(tables, tokens, otherwise="change of a bound"))
        for name, table in tables.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    run.stage(
        "compare",
        settings={**dataclasses.asdict(config), **dataclasses.asdict(analysis), "seed": seed},
        inputs=["tokens.parquet", *([effects] if effects else [])],
        outputs=lambda: [f"tables/{name}.csv" for name in tables],
        work=work,
        derived=True,
        code=("analysis.selection", "analysis.rank_agreement"),
    )


def intervene_stage(
    run: Run, models: Models, probe, config, analysis, *, batch_tokens: int
) -> None:
    """One step a criterion and budget. Finished cells are kept in `cells`, so that a wider grid
    goes on from there.
    """
    from diagnostics.probing.intervention import interventions, summarize

    _require_probe_settings(run, probe, what="An intervention")

    def work() -> dict:
        bank, tokens = (
            read_bank(run.path("contexts.parquet")),
            validate_tokens(read_parquet(run.path("scores.parquet"))),
        )
        result = interventions(
            models.pair,
            bank,
            tokens=tokens,
            batch_tokens=batch_tokens,
            cache=run.path("cells"),
            shards=run.shards,
            **dataclasses.asdict(probe),
            **dataclasses.asdict(config),
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
            "step_size": float(chosen.step_size),
            "relative_norm": float(chosen.relative_norm),
        }

    settings = {
        **models.settings,
        **dataclasses.asdict(probe),
        **dataclasses.asdict(config),
        **dataclasses.asdict(analysis),
        "batch_tokens": batch_tokens,
    }
    run.stage(
        "intervene",
        settings=settings,
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["interventions.parquet", "tables/intervention.csv"],
        work=work,
        derived=True,
        code=("probing.intervention",),
        models=models.fingerprint,
    )


def attribute_stage(
    run: Run, models: Models, probe, config, analysis, *, batch_tokens: int
) -> None:
    """Attribute the probe's step to the positions that took part in it."""
    from diagnostics.probing.attribution import attribute

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
            tokens=tokens,
            batch_tokens=batch_tokens,
            **dataclasses.asdict(probe),
            **dataclasses.asdict(config),
            **dataclasses.asdict(analysis),
        )
        write_parquet(
            run.path("first_order.parquet"), result.tokens[[*GAIN_KEYS, "first_order_gain", "lift"]]
        )
        made = dict(
            zip(names, (result.linearity, result.kernel, result.shares, result.lift), strict=True)
        )
        for name, table in marked(made, tokens, otherwise="change of a bound").items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    settings = {
        **models.settings,
        **dataclasses.asdict(probe),
        **dataclasses.asdict(config),
        **dataclasses.asdict(analysis),
        "batch_tokens": batch_tokens,
    }
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


def _require_probe_settings(run: Run, probe, *, what: str) -> None:
    """The step of a run's tables is one step: the probe's, where there is one."""
    earlier = run.manifest["stages"].get("probe", {}).get("settings", {})
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


def report_stage(run: Run, *, contexts: int | None = None) -> Path:
    """Draw the figures and write the report; contexts: how many are shown token by token, the
    report's usual number where None.
    """
    from diagnostics.report.page import CONTEXTS, build

    return build(run.directory, contexts=CONTEXTS if contexts is None else contexts)


def validate_stage(
    run: Run,
    models: Models,
    prompts,
    config,
    evaluation,
    *,
    offline: str | None,
    analysis,
    engine=None,
) -> None:
    """Train the grid, cell by cell, and write its tables. What is finished is kept; a wider grid
    adds to it.

    engine: how TRL runs each training, but for what a grid decides itself.
    """
    from diagnostics.analysis import training_outcomes
    from diagnostics.analysis.claims import of_training
    from diagnostics.measure.losses import check_loss
    from diagnostics.training import grid

    check_loss(config.loss)
    _refuse_shards(models)
    folder = run.path("cells")
    options = _engine_of_cells(engine)
    sources = {
        **models.fingerprint(),
        **file_hash("prompts", prompts.prompts),
        **file_hash("eval_prompts", evaluation.eval_prompts),
        **file_hash("trl", options.get("trl")),
    }
    earlier = run.manifest["stages"].get("validate", {}).get("inputs", {})
    job = grid.Job(
        folder,
        *map(_settings, (models.config, prompts, evaluation, config)),
        options,
        sources,
        code_version("training", "trainer", "evaluation"),
        run.accept_code,
        {file.removeprefix("cells/"): digest for file, digest in earlier.items()},
    )
    cells, made = grid.grid(config), {}
    write_json(run.manifest_path, run.manifest)
    grid.run_grid(job, cells, workers=config.workers)

    def work() -> None:
        competing = dict.fromkeys(
            (cell.criterion, cell.budget) for cell in cells if cell.criterion != "full"
        )
        answers = (
            training_outcomes.offline_answers(Path(offline), competing, draws=analysis.draws)
            if offline
            else None
        )
        rows = grid.read_outcomes(folder, cells)
        made.update(training_outcomes.tables(rows, answers, **dataclasses.asdict(analysis)))
        made["verdicts"] = pd.concat(
            [*_claims_of(offline), of_training(made["validation_verdicts"])], ignore_index=True
        )
        for name, table in made.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    settings = {
        **models.settings,
        **_settings(prompts),
        **dataclasses.asdict(config),
        **dataclasses.asdict(evaluation),
        **dataclasses.asdict(analysis),
        "offline": offline,
        **options,
    }
    names = ["untouched", *(cell.name for cell in cells)]
    run.stage(
        "validate",
        settings=settings,
        inputs=[f"cells/{name}.parquet" for name in names],
        outputs=lambda: [f"tables/{name}.csv" for name in made],
        work=work,
        derived=True,
        code=("training.grid", "training.run"),
        models=models.fingerprint,
    )


def _engine_of_cells(engine) -> dict:
    """Engine options that were given. Raises DiagnosticsError for those that a grid decides
    itself.
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
    return given


def _claims_of(directory: str | None) -> list[pd.DataFrame]:
    """The verdicts of a finished main job, as the beginning of a validation's."""
    path = Path(directory) / "tables/verdicts.csv" if directory else None
    return (
        [pd.read_csv(unchanged(directory, "tables/verdicts.csv")).query("split != 'training'")]
        if path and path.exists()
        else []
    )
