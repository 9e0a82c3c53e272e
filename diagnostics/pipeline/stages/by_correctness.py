"""The stage `by-correctness`: the tables of a run for its right and for its wrong responses alone.

    DIR/tables/right/NAME.csv    DIR/tables/wrong/NAME.csv

are what `analyze` and `compare` make of a token table that holds the responses of one kind and no
other, with the settings of those two stages: scales, cuts, ranks and selections are the side's own,
nulls and the placebo are read at the same positions, and Holm's correction is over the side's own
tests. Every step was taken on all contexts of its fold, so a gain at a right response is what a
step on right and wrong ones did there. What was registered before the probe is of all responses,
so that no verdict here confirms.

A side with fewer prompts than a verdict needs has no tables, and a sentence says so in the
manifest, on the page and on the terminal. The decision is that of `interventions.parquet` at the
side's held-out responses; its cells select among all responses, and so `offline_agreement` and
`offline_answers`, which would compare them with selections on one side, are left out, as is what no
file of the run holds per position (`left_out` lists it).
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.analysis.bounds import marked
from diagnostics.analysis.responses import SIDES, count_responses, too_few
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import read_parquet
from diagnostics.core.tables import read_csv, write_csv
from diagnostics.pipeline.stage import Job
from diagnostics.pipeline.stages.analyze import table_k
from diagnostics.pipeline.stages.compare import COMPARISON_CODE

if TYPE_CHECKING:
    from diagnostics.pipeline.run import Run

STAGE = "by-correctness"
log = logging.getLogger("diagnostics")
CODE = ("analysis.study", *COMPARISON_CODE, "pipeline.stages.by_correctness")
"""Modules that decide the tables."""
PLACEBO = "tables/placebo.csv"
EFFECTS = "interventions.parquet"
COMPARED = ("criteria", "budgets", "ties", "scope", "batch", "draws", "level", "seed")
"""Settings of the run's comparison that its sides share."""
OF_ALL = {
    "calibration": "the step was taken on all responses",
    "intervention": "its groups are of all responses; decision has the held-out effects of a side",
    "linearity": "the step was taken on all responses",
    "kernel": "positions of all responses were sampled",
    "kernel_shares": "positions of all responses were sampled",
    "lift": "groups of all responses carried the loss",
    "offline_agreement": "interventions select among all responses",
    "offline_answers": "interventions select among all responses",
    "engine_check": "it is about the engine, and is made of all responses",
    "engine_causes": "it is about the engine, and is made of all responses",
}
"""Tables of a run that no side has, and why."""


def do(job: Job) -> dict[str, Any] | None:
    """Do the stage of a command; a `run` whose responses nobody judged goes on to its page."""
    why = unjudged(job.run) if job.command == "run" else ""
    if why:
        log.warning("%s", why)
        return None
    return by_correctness_stage(job.run)


def by_correctness_stage(run: Run) -> dict[str, Any]:
    """Write the tables of right and of wrong responses alone.

    Args:
        run: A run directory whose responses were judged and whose `analyze` is finished; the tables
            of `compare` are made where that is finished too.

    Returns:
        What is printed: output_dir, and a sentence per side.

    Raises:
        DiagnosticsError: Nothing was judged, or the run has no tables of all responses yet.
    """
    if why := unjudged(run):
        raise DiagnosticsError(why)
    counts, settings = _counts(run), _settings(run)
    made: dict[str, pd.DataFrame] = {}

    def work() -> dict[str, Any]:
        facts: dict[str, Any] = {"not_judged": counts["not judged"]["contexts"]}
        for side in SIDES:
            why = too_few(side, counts[side]["prompts"], _choices(settings).minimum_prompts)
            tables = {} if why else _tables(run, side, settings)
            for name, table in tables.items():
                made[f"tables/{side}/{name}.csv"] = table
                write_csv(run.path(f"tables/{side}/{name}.csv"), table)
            facts[side] = counts[side] | ({"left_out": why} if why else {"tables": len(tables)})
        return facts

    run.stage(
        STAGE,
        settings=settings,
        inputs=["tokens.parquet", *(name for name in (EFFECTS, PLACEBO) if _has(run, name))],
        outputs=lambda: list(made),
        work=work,
        derived=True,
        code=CODE,
    )
    facts = run.manifest["stages"][STAGE]["facts"]
    said = {side: sentence(side, facts[side]) for side in SIDES}
    for text in said.values():
        log.log(logging.WARNING if text.startswith("Not judged") else logging.INFO, "%s", text)
    return {"output_dir": str(run.directory), **said}


def sentence(side: str, facts: Mapping[str, Any]) -> str:
    """What was made of a side, or why nothing was."""
    if "left_out" in facts:
        return f"{facts['left_out']} No table of {side} responses alone was made."
    return (
        f"{facts['tables']} tables in tables/{side}: {facts['prompts']:,} prompts,"
        f" {facts['positions']:,} positions."
    )


def unjudged(run: Run) -> str:
    """Why a run has no right and no wrong response; empty where it has any."""
    counts = _counts(run)
    if any(counts[side]["positions"] for side in SIDES):
        return ""
    return (
        f"None of the {counts['not judged']['contexts']} responses of {run.directory} is judged"
        " right or wrong. Judge them when they are sampled or imported, with --verifier or the"
        " column `correct`."
    )


def judged_sides(run: Run) -> bool:
    """Whether a run has right and wrong responses of prompts enough for verdicts on either."""
    from diagnostics.analysis.config import FEWEST_PROMPTS

    if not run.path("tokens.parquet").exists():
        return False
    counts = _counts(run)
    return all(not too_few(side, counts[side]["prompts"], FEWEST_PROMPTS) for side in SIDES)


def _counts(run: Run) -> dict[str, dict[str, int]]:
    """`count_responses` of the run's token table, of which only the columns it needs are read."""
    import pyarrow.parquet as pq

    path = run.require("tokens.parquet")
    known = set(pq.read_schema(path).names)
    names = [name for name in ("context_id", "prompt_id", "correct") if name in known]
    return count_responses(read_parquet(path, columns=names))


def _settings(run: Run) -> dict[str, Any]:
    """The settings of the run's analysis and, where there is one, of its comparison."""
    records = run.manifest["stages"]
    if "analyze" not in records:
        raise DiagnosticsError(
            f"{run.directory} has no tables of all responses, whose settings those of right and of"
            f" wrong ones share. Run `analyze --output-dir {run.directory}` first."
        )
    found = records["analyze"]["settings"]
    analysis = {name: found[name] for name in ("draws", "level", "seed", "k", "primary")}
    compared = records.get("compare", {}).get("settings")
    comparison = None if compared is None else [[name, compared[name]] for name in COMPARED]
    return {**analysis, "comparison": comparison}


def _choices(settings: Mapping[str, Any]) -> Any:
    from diagnostics.analysis.config import PrimaryChoices

    return PrimaryChoices.parse(settings["primary"])


def _has(run: Run, name: str) -> bool:
    return run.path(name).exists()


def _tables(run: Run, side: str, settings: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table of one side, and in `left_out` what it lacks of the run's tables, and why."""
    from diagnostics.analysis.prompt_groups import read_studied

    log.info("tables of %s responses", side)
    tokens = read_studied(run.path("tokens.parquet"), settings["seed"], correct=SIDES[side])
    made = _study(run, tokens, side, settings)
    made |= _comparison(tokens, settings) | _decision(run, tokens, side, settings)
    made |= _placebo(run, side) | _horizon(run, tokens)
    lacking = [
        (name, "the whole table", why)
        for name, why in OF_ALL.items()
        if _has(run, f"tables/{name}.csv")
    ]
    rows = pd.DataFrame(lacking, columns=["table", "what", "why"])
    made["left_out"] = pd.concat([made["left_out"], rows], ignore_index=True)
    return made


def _study(
    run: Run, tokens: pd.DataFrame, side: str, settings: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    from diagnostics.analysis.study import study

    return study(
        tokens,
        responses=side,
        base_k=table_k(run, tokens, settings["k"]),
        choices=_choices(settings),
        **{name: settings[name] for name in ("draws", "level", "seed")},
    )


def _comparison(tokens: pd.DataFrame, settings: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What criteria capture of the side's gains; nothing where the run was not compared."""
    from diagnostics.analysis.selection import ALL_OUTCOMES, compare

    if settings["comparison"] is None:
        return {}
    options = dict(settings["comparison"])
    made = compare(tokens, outcomes=ALL_OUTCOMES, **options)
    return marked(made, tokens, otherwise="change of a bound")


def _decision(
    run: Run, tokens: pd.DataFrame, side: str, settings: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    """The decision by the interventions' effects at the side's held-out responses."""
    from diagnostics.analysis.cell_effects import of_rollouts
    from diagnostics.analysis.decision import decide

    if settings["comparison"] is None or not _has(run, EFFECTS):
        return {}
    effects = read_parquet(run.path(EFFECTS))
    if "correct" not in effects:  # measured before the responses were judged
        return {}
    loss = run.manifest["stages"].get("intervene", {}).get("settings", {}).get("loss")
    options = {name: settings[name] for name in ("draws", "level", "seed")}
    own = of_rollouts(effects, side).drop(columns="correct")
    table = decide(own, loss=loss or "reverse_kl", choices=_choices(settings), **options)
    return marked({"decision": table}, tokens, otherwise="change of a bound")


def _placebo(run: Run, side: str) -> dict[str, pd.DataFrame]:
    """The placebo's sizes at the side's positions, which the probe measured."""
    if not _has(run, PLACEBO):
        return {}
    table = read_csv(run.path(PLACEBO))
    if "rollouts" not in table:  # of a probe before the responses were judged
        return {}
    own = table[table["rollouts"] == side].drop(columns="rollouts")
    return {"placebo": own.reset_index(drop=True)}


def _horizon(run: Run, tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The trajectory's reductions at the side's frozen positions; new text is judged by nobody."""
    found = [re.fullmatch(r"gain_h(\d+)", name) for name in tokens]
    horizon = sorted(int(each[1]) for each in found if each)
    columns = [f"{own}gain_h{k}" for k in horizon for own in ("", "own_")]
    if not horizon or not all(tokens[name].notna().any() for name in columns):
        return {}
    from diagnostics.analysis.config import Bootstrap
    from diagnostics.probing.horizon import horizon_table

    seed = run.manifest["stages"].get("probe", {}).get("settings", {}).get("seed", 0)
    made = horizon_table(tokens, None, horizon=horizon, bootstrap_config=Bootstrap(seed=seed))
    return marked({"horizon": made}, tokens, otherwise="change of a bound")


def hint(directory: str | Path, program: str) -> str:
    """The command that makes the tables of either side, as a line; empty where it has no use.

    Args:
        directory: A finished run.
        program: How this program is called.
    """
    from diagnostics.pipeline.run import Run

    run = Run(directory)
    if STAGE in run.manifest["stages"] or not judged_sides(run):
        return ""
    return (
        f"right and wrong responses apart: {program} {STAGE} --output-dir"
        f" {shlex.quote(str(directory))} (takes about"
        " as long as analyze and compare did)"
    )
