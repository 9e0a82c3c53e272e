"""The stage `compare`: what each criterion would have captured, and the decision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.analysis.bounds import marked
from diagnostics.core.manifest import unchanged
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_csv
from diagnostics.pipeline.ahead import Ahead
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ANALYSIS, COMPARISON, INTERVENTION, Job
from diagnostics.pipeline.stages.primary import primary_choices
from diagnostics.pipeline.stages.settings import widened

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig
    from diagnostics.analysis.selection import ComparisonConfig

COMPARISON_CODE = (
    "analysis.correctness",
    "analysis.selection",
    "analysis.selection_draws",
    "analysis.rank_agreement",
    "analysis.criterion_labels",
    "analysis.decision",
)
"""Modules that decide the tables of a comparison."""


def do(job: Job, made: Ahead | None = None) -> None:
    """Do the stage of a command."""
    compare_stage(
        job.run, _comparison(job), job.configs[ANALYSIS], seed=job.flag("seed"), made=made
    )


def task_of(job: Job) -> dict[str, Any] | None:
    """What another process can make of the stage meanwhile; None where its tables are kept."""
    return comparison_to_make(
        job.run, _comparison(job), job.configs[ANALYSIS], seed=job.flag("seed")
    )


def _comparison(job: Job) -> Any:
    """What is compared: what was asked for, or what the run intervenes on."""
    if COMPARISON in job.configs:
        return job.configs[COMPARISON]
    return comparison_of(job.run, job.configs[INTERVENTION].criteria)


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
    config = widened(run, "compare", config, analysis, {"seed": seed}, everything="criteria")
    tables: dict[str, pd.DataFrame] = {}
    effects = next(iter(_compared(run)[1:]), None)
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
            tables.update(_with_interventions(run, config, tokens, sums, options))
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


def _with_interventions(
    run: Run,
    config: ComparisonConfig,
    tokens: pd.DataFrame,
    sums: pd.DataFrame,
    options: Mapping[str, Any],
) -> dict[str, pd.DataFrame]:
    """The tables that set the interventions, as sums per prompt, beside the gains."""
    from diagnostics.analysis.decision import decide
    from diagnostics.analysis.rank_agreement import agreement, answers

    step = run.manifest["stages"].get("intervene", {}).get("settings", {})
    loss, choices = step.get("loss", "reverse_kl"), primary_choices(run, None)[0]
    return {
        "offline_agreement": agreement(tokens, sums, rules=config.rules, **options),
        "offline_answers": answers(tokens, sums, rules=config.rules),
        "decision": decide(sums, loss=loss, choices=choices, **options),
    }


def _compared(run: Run) -> list[str]:
    """Files that a comparison reads."""
    effects = "interventions.parquet"
    return ["tokens.parquet", *([effects] if run.path(effects).exists() else [])]


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
    config = widened(
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
