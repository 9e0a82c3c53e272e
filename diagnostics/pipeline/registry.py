"""The one table of commands and stages: what each is for, takes, reads, writes and calls.

The parser, the dispatcher, `rerun`, the pages of the documentation and the table of commands are
made from `STAGES`, so a new stage is one new entry.
"""

from __future__ import annotations

import importlib

from diagnostics.pipeline.flags import Flag, flag
from diagnostics.pipeline.stage import (
    ANALYSIS,
    ASK,
    ATTRIBUTION,
    BANK,
    COMPARISON,
    CONTROLS,
    ENGINE,
    EVALUATION,
    INTERVENTION,
    PAIR,
    PROBE,
    PROMPTS,
    ROLLOUT,
    SCORE,
    SELECTORS,
    TRAIN,
    VALIDATE,
    Stage,
)

OUTPUT_DIR = flag("output-dir", required=True, help="directory of the run")
ACCEPT_CODE = flag(
    "accept-code",
    action="store_true",
    help="keep finished stages that another version of this program measured",
)
SEED = flag(
    "seed", recorded="always", type=int, default=0, help="seed of the bootstrap (default: 0)"
)

PRIMARY = flag(
    "primary",
    recorded="maybe",
    metavar="NAME=VALUE,…",
    help=(
        "what verdicts rest on, recorded before the probe: outcome, population, criterion, budget,"
        " horizon, margin, level, minimum_prompts (default: those of PrimaryChoices; for analyze,"
        " those that were recorded)"
    ),
)


QUICK = flag(
    "quick",
    action="store_true",
    help="leave the interventions out: a page without an answer to which criterion to train with",
)
APART = flag(
    "by-correctness",
    action="store_true",
    help="write the tables for right and for wrong responses alone too, which takes about as long"
    " as the tables of all",
)


STAGES = (
    Stage(
        name="run",
        purpose=(
            "Answer which criterion to train with: rollout, score, probe, intervene, analyze,"
            " compare, report."
        ),
        example=(
            "run --pair embedded --output-dir reports/demo",
            "run --student ./small --teacher ./large --prompts prompts.jsonl"
            " --output-dir reports/mine",
            "run --quick --pair embedded --output-dir reports/quick",
        ),
        configs=(PAIR, PROMPTS, ROLLOUT, BANK, SCORE, PROBE, CONTROLS, INTERVENTION, ANALYSIS),
        reads="two models and prompts",
        writes="everything that its stages write",
        flags=(OUTPUT_DIR, ACCEPT_CODE, PRIMARY, QUICK, APART),
        parts=(
            "rollout",
            "score",
            "probe",
            "intervene",
            "analyze",
            "compare",
            "by-correctness",
            "report",
        ),
        modules=("pipeline.stages",),
    ),
    Stage(
        name="rollout",
        purpose=(
            "Sample one response per prompt from the student and freeze it, or freeze responses"
            " that were sampled by another program."
        ),
        example=(
            "rollout --pair embedded --contexts 64 --output-dir reports/mine",
            "rollout --student ./small --teacher ./large --rollouts rollout_data/40.jsonl"
            " --prompts prompts.jsonl --output-dir reports/mine",
        ),
        configs=(PAIR, PROMPTS, ROLLOUT, BANK),
        reads="prompts, or a file of rollouts",
        writes="`contexts.parquet`: what the student wrote, frozen",
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="rollout:do",
        modules=(
            "contexts.prompts",
            "contexts.conversations",
            "models.chat_templates",
            "contexts.rollouts",
            "contexts.import_rollouts",
            "contexts.verifiers",
        ),
    ),
    Stage(
        name="ask-teacher",
        purpose=(
            "Ask a vLLM, SGLang or OpenAI-compatible server for a teacher's likeliest tokens on the"
            " frozen contexts."
        ),
        example=(
            "ask-teacher --url http://localhost:8000/v1 --output-dir reports/mine",
            "score --student ./small --teacher-logprobs reports/mine/teacher_logprobs.parquet"
            " --output-dir reports/mine",
        ),
        configs=(ASK, PAIR),
        reads="`contexts.parquet`, the student's tokenizer, and a server",
        writes="`teacher_logprobs.parquet`: the file that `--teacher-logprobs` reads",
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="ask_teacher:do",
        repeatable=False,
        modules=("models.served.ask", "models.served.dialects", "models.topk_teacher"),
    ),
    Stage(
        name="score",
        purpose="Measure every response position of the frozen contexts.",
        example=(
            "score --pair embedded --output-dir reports/mine",
            "score --pair embedded --after reports/trained/student --output-dir reports/mine",
        ),
        configs=(PAIR, SCORE),
        reads="`contexts.parquet`",
        writes=(
            "`scores.parquet`: every measurement before the step; `tops.parquet`: the most likely"
            " tokens of both models; `tables/stop_tokens.csv`: what ends a response for either;"
            " `tokens.parquet`"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="score:do",
        parts=("score", "after"),
        modules=("probing.scores", "measure.divergences", "measure.extras"),
    ),
    Stage(
        name="import",
        purpose="Take over a token table that was written by another program.",
        reads="a token table",
        writes="`tokens.parquet`",
        flags=(
            flag(
                "tokens",
                recorded="always",
                help=(
                    "read this token table (of this program, or of one of the released scripts),"
                    " or this folder of rollouts, instead of the run's own"
                ),
            ),
            flag(
                "tokens-after",
                recorded="maybe",
                help="the table of the same positions with the trained student, beside --tokens",
            ),
            flag(
                "tokenizer",
                recorded="maybe",
                help="folder or id of the tokenizer that gives an imported table its texts",
            ),
        ),
        run="import_tokens:do",
        command="analyze",
    ),
    Stage(
        name="probe",
        purpose=(
            "Take one distillation step on each fold of the prompts, score every position again,"
            " restore the student."
        ),
        example=("probe --pair embedded --loss forward_kl --output-dir reports/mine",),
        configs=(PAIR, PROBE, CONTROLS, SCORE),
        reads="`contexts.parquet`, `scores.parquet`",
        writes=(
            "`gains.parquet`, `tables/calibration.csv`, `tables/placebo.csv`,"
            " `tables/horizon.csv`; `tokens.parquet`: scores and gains joined"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE, PRIMARY),
        run="probe:do",
        modules=(
            "probing.one_step",
            "probing.folds",
            "probing.permuted_teacher",
            "probing.placebo",
            "probing.horizon",
            "probing.trajectory",
            "measure.losses",
        ),
    ),
    Stage(
        name="after",
        purpose="Score the contexts again with a trained student, beside a probe or without one.",
        reads="`contexts.parquet`, `scores.parquet`",
        writes="`after.parquet`; `tokens.parquet`: its columns and, without a probe, its gains",
        flags=(
            flag(
                "after",
                recorded="always",
                help="a trained student: add its columns after training and its gains to the table",
            ),
        ),
        run="after:do",
        command="score",
    ),
    Stage(
        name="attribute",
        purpose="Compute first-order gains, and where the gain of a position comes from.",
        example=("attribute --full-kernel --output-dir reports/mine",),
        configs=(PAIR, PROBE, ATTRIBUTION, ANALYSIS, SCORE),
        reads="`contexts.parquet`, `scores.parquet`, `gains.parquet`",
        writes=(
            "`first_order.parquet`, `tables/linearity.csv`, `tables/kernel.csv`,"
            " `tables/kernel_shares.csv`, `tables/lift.csv`"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="attribute:do",
        modules=("probing.attribution",),
    ),
    Stage(
        name="intervene",
        purpose=(
            "Take one step, and short trajectories of the real optimizer, per criterion and budget,"
            " with loss on the selected positions only."
        ),
        example=(
            "intervene --criteria divergence,margin --budgets 5%,30% --output-dir reports/mine",
        ),
        configs=(PAIR, PROBE, INTERVENTION, ANALYSIS, SCORE),
        reads="`contexts.parquet`, `scores.parquet`, and `gains.parquet` where there is one",
        writes=(
            "`interventions.parquet`, `tables/intervention.csv`; `cells/`: finished cells, so that"
            " a wider grid or a longer horizon goes on from there"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="intervene:do",
        modules=("probing.intervention", "analysis.rank_agreement"),
    ),
    Stage(
        name="analyze",
        purpose="Write the tables of the study from the token table.",
        example=(
            "analyze --output-dir reports/mine",
            "analyze --tokens token_bank.csv --output-dir reports/theirs",
            "analyze --tokens theta0_metrics.parquet --tokens-after fixed_context_metrics.parquet"
            " --tokenizer ./small --output-dir reports/theirs",
        ),
        configs=(ANALYSIS,),
        reads="`tokens.parquet`, or another token table",
        writes="`tables/*.csv`",
        flags=(
            OUTPUT_DIR,
            flag(
                "against",
                formerly="training",
                metavar="DIR",
                recorded="maybe",
                help="run directory of a finished validation, for claim C5",
            ),
            flag(
                "k",
                recorded="maybe",
                type=int,
                help="K of an imported table's columns, where the table does not say it",
            ),
            SEED,
            PRIMARY,
        ),
        run="analyze:do",
        parts=("import", "analyze"),
        modules=(
            "analysis.study",
            "analysis.regressions",
            "analysis.robustness",
            "contexts.import_tokens",
        ),
    ),
    Stage(
        name="compare",
        purpose="Say what each criterion would have captured of the gains, at each budget.",
        example=(
            "compare --output-dir reports/mine --criteria divergence,teachability,tip"
            " --budgets 0.01,0.05,0.1",
        ),
        configs=(COMPARISON, ANALYSIS),
        reads="`tokens.parquet`; `interventions.parquet` where there is one",
        writes=(
            "`tables/selection_*.csv`, `tables/offline_*.csv`, `tables/decision.csv`; where"
            " responses were judged: `tables/by_correctness.csv`"
        ),
        flags=(OUTPUT_DIR, SEED),
        run="compare:do",
        parts=("import", "compare"),
        modules=("analysis.selection", "criteria", "analysis.correctness", "analysis.decision"),
    ),
    Stage(
        name="by-correctness",
        purpose=(
            "Write the tables of analyze and compare again for right and for wrong responses alone."
        ),
        example=("by-correctness --output-dir reports/mine",),
        reads="`tokens.parquet` of judged responses; `interventions.parquet` where there is one",
        writes="`tables/right/*.csv`, `tables/wrong/*.csv`",
        flags=(OUTPUT_DIR,),
        run="by_correctness:do",
        modules=(
            "pipeline.stages.by_correctness",
            "analysis.responses",
            "analysis.correctness",
        ),
    ),
    Stage(
        name="report",
        purpose=(
            "Draw the figures and write report.html from the run's files alone, or set several"
            " runs side by side."
        ),
        example=(
            "report reports/mine",
            "report --against reports/demo reports/smollm2 --output-dir reports",
        ),
        reads="whatever the run holds",
        writes="`figures/*`, `report.html`, `report.md`; with `--against`: `compare.html`",
        flags=(
            flag("output-dir", help="directory of the run, or of the comparison"),
            Flag(("directory",), dict(nargs="?", metavar="DIR", help="the same as --output-dir")),
            flag(
                "contexts",
                type=int,
                default=24,
                help="contexts shown token by token, 0 for none (default: 24)",
            ),
            flag("pdf", action="store_true", help="write every figure as PDF too"),
            *(
                flag(
                    f"{role}-name",
                    metavar="NAME",
                    help=f"what pages call the {role}, where its folder's name does not say it",
                )
                for role in ("student", "teacher")
            ),
            flag(
                "against",
                formerly="compare",
                nargs="+",
                metavar="DIR",
                help="finished runs to set side by side, in compare.html of --output-dir",
            ),
        ),
        run="report:do",
        recorded=False,
        modules=("report.page", "report.summary", "report.tokenview", "report.compare_runs"),
    ),
    Stage(
        name="train",
        purpose="Train the student on the positions that a criterion selects (TA-OPD).",
        example=(
            "train --pair embedded --criterion teachability --budget 0.05 --steps 100"
            " --output-dir reports/trained",
        ),
        configs=(PAIR, PROMPTS, TRAIN, ENGINE, EVALUATION),
        reads="two models and prompts; `contexts.parquet` where there is one",
        writes=(
            "`student/`, `train.json`, `metrics.jsonl`, `positions.jsonl`, `evaluations.*`,"
            " `training_gains.parquet`"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE),
        run="train:do",
        modules=("training.run", "training.trl_trainer", "training.evaluation"),
    ),
    Stage(
        name="validate",
        purpose=(
            "Train a grid of short trainings, and compare their outcomes with the probe's"
            " conclusions."
        ),
        example=("validate --against reports/demo --output-dir reports/validation",),
        configs=(PAIR, PROMPTS, VALIDATE, ENGINE, EVALUATION, ANALYSIS),
        reads="two models and prompts; with `--against`: a finished run",
        writes=(
            "`cells/`, `tables/validation_*.csv`, `tables/foresight_signs.csv`,"
            " `tables/verdicts.csv`"
        ),
        flags=(
            OUTPUT_DIR,
            ACCEPT_CODE,
            flag(
                "against",
                formerly="offline",
                metavar="DIR",
                recorded="maybe",
                help=(
                    "run directory of a finished main job, whose answers are compared with the"
                    " trainings"
                ),
            ),
        ),
        run="validate:do",
        modules=("training.grid", "analysis.training_outcomes", "analysis.foresight"),
    ),
    Stage(
        name="paper",
        purpose=(
            "Lay out the tables and figures of arXiv 2605.26844 for the run's pair, each as the"
            " released scripts compute it and controlled."
        ),
        example=(
            "paper --output-dir reports/mine",
            "paper --pair embedded --train --output-dir reports/mine",
            "paper --tokens theta0.parquet --tokens-after trained.parquet --output-dir"
            " reports/theirs",
        ),
        configs=(PAIR, SELECTORS, ANALYSIS),
        reads=(
            "`tokens.parquet` with a trained student's columns, or two tables of another program;"
            " with `--train`: two models, `contexts.parquet`, `scores.parquet`"
        ),
        writes=(
            "`tables/paper_*.csv`, `figures/paper_*`, `paper.html`; with `--train`: `paper/cells/`"
        ),
        flags=(OUTPUT_DIR, ACCEPT_CODE, SEED),
        run="paper:do",
        parts=("import", "paper"),
        modules=("training.selectors", "analysis.paper.tables", "analysis.paper.cells"),
    ),
    Stage(
        name="teachers",
        purpose=(
            "Score one bank with several teachers, and say whose signal this student can follow"
            " where, and how far they agree."
        ),
        example=(
            "teachers --student ./small --teacher ./large --teacher ./other --prompts"
            " prompts.jsonl --output-dir reports/teachers",
            "teachers --against reports/one reports/two --output-dir reports/teachers",
        ),
        configs=(PAIR, PROMPTS, ROLLOUT, BANK, SCORE, PROBE, CONTROLS, ANALYSIS),
        reads="a student, two teachers or more and prompts; or scored runs of one bank",
        writes=(
            "a run directory per teacher; `tables/teachers.csv`, `teachers_differences.csv`,"
            " `teachers_best.csv`, `teachers_agreement.csv`; `teachers.html`,"
            " `figures/teachers*.png`"
        ),
        flags=(
            OUTPUT_DIR,
            ACCEPT_CODE,
            flag(
                "teacher",
                action="append",
                metavar="TEACHER",
                help=(
                    "a teacher, as for other commands, or a file of its log-probabilities; once"
                    " per teacher"
                ),
            ),
            flag(
                "against",
                nargs="+",
                metavar="RUN",
                help="scored runs of one bank and student, in place of teachers",
            ),
            flag("names", nargs="+", metavar="NAME", help="a name per teacher, in their order"),
            flag("probe", action="store_true", help="measure gains with each teacher too"),
        ),
        repeatable=False,
        modules=("analysis.teachers", "pipeline.teachers", "report.teachers_page"),
    ),
    Stage(
        name="atlas",
        purpose="Pool what the runs of several pairs say: what holds on all, what turns, what a new"
        " pair would show.",
        example=(
            "atlas reports/embedded-probe reports/second-pair reports/smollm2 --output-dir"
            " reports/atlas",
        ),
        reads="`manifest.json` and `tables/*.csv` of two or more runs, one per pair",
        writes="`atlas.html`, `atlas.json`, `tables/atlas_*.csv`, `figures/atlas_*.png`",
        flags=(
            Flag(("runs",), dict(nargs="+", metavar="RUN", help="run directories, one per pair")),
            flag("names", nargs="+", metavar="NAME", help="a name for each pair, in their order"),
            flag("output-dir", required=True, help="folder of the atlas"),
        ),
        recorded=False,
        modules=("analysis.across_pairs", "report.atlas_page"),
    ),
    Stage(
        name="rerun",
        purpose="Repeat a run from its manifest and compare the hash of every file.",
        example=(
            "rerun reports/demo/manifest.json --output-dir reports/again",
            "rerun reports/mine/manifest.json --inputs ./small ./large prompts.jsonl"
            " --output-dir reports/again",
        ),
        reads="`manifest.json` of a finished run, and what it names",
        writes="the same files in a new directory",
        flags=(
            Flag(("manifest",), dict(help="manifest.json of a finished run")),
            flag("output-dir", required=True, help="a new directory"),
            flag(
                "inputs",
                nargs="+",
                default=(),
                metavar="PATH",
                help=(
                    "models, prompts and runs that the manifest names and that do not lie beside it"
                ),
            ),
            flag("device", default="auto", help="where the models run (default: auto)"),
        ),
        modules=("pipeline.reproduce",),
    ),
    Stage(
        name="coverage",
        purpose="Report how much of frozen contexts a teacher with another tokenizer can grade.",
        example=(
            "coverage --student ./small --teacher ./other --contexts reports/mine",
            "coverage --student ./small --teacher ./other --contexts contexts.parquet --k 16",
        ),
        reads=(
            "two tokenizers, and with `--k` two models; `contexts.parquet`, and `tops.parquet`"
            " where a run has it"
        ),
        writes="nothing",
        flags=(
            flag(
                "student", required=True, help="tokenizer of the contexts: Hugging Face id, folder"
            ),
            flag("teacher", required=True, help="tokenizer of the teacher: likewise"),
            flag(
                "contexts",
                required=True,
                metavar="RUN_OR_FILE",
                help="run directory, or a file of frozen contexts",
            ),
            flag(
                "chains",
                type=int,
                default=4,
                help="most teacher tokens that spell one of the student's (default: 4)",
            ),
            flag(
                "k",
                type=int,
                help=(
                    "run both models too, and bound compatibility and divergence on the strings of"
                    " so many of the student's likeliest tokens"
                ),
            ),
            flag("device", default="auto", help="where the models run (default: auto)"),
            flag("dtype", default="float32", help="dtype of their weights (default: float32)"),
        ),
        modules=("contexts.coverage", "contexts.byte_bounds", "models.token_bytes"),
    ),
    Stage(
        name="criteria",
        purpose="List the registered selection criteria.",
        example=("criteria",),
        reads="nothing",
        writes="nothing",
    ),
)
"""Every stage in the order of the work, so that each reads what those before it write."""
BY_NAME = {stage.name: stage for stage in STAGES}
COMMANDS = tuple(stage for stage in STAGES if stage.command is None)
"""The stages that a user can type."""


def flags_of(command: Stage) -> tuple[Flag, ...]:
    """A command's own flags, and those of its parts that are no commands themselves."""
    parts = (BY_NAME[name] for name in command.parts)
    return command.flags + tuple(own for part in parts if part.command for own in part.flags)


def load_configs(command: str) -> dict[str, type]:
    """The dataclasses of a command by name; this imports the modules that define them."""
    return {name: _imported(name) for name in BY_NAME[command].configs}


def _imported(name: str) -> type:
    module, _, config = name.rpartition(".")
    return getattr(importlib.import_module(f"diagnostics.{module}"), config)
