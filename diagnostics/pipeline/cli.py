"""The command line: `python -m diagnostics STAGE --output-dir DIR …`.

Exit codes: 0 done; 1 a repeated run has other files; 2 the input or the machine cannot be used (one
paragraph on stderr says why and what to do); 130 stopped by the user, 143 by a signal, 141 where
the reader of the output went. Anything else is a fault of this program and shows its traceback."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diagnostics import __version__
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import set_quiet
from diagnostics.pipeline.flags import Parser, add_flags, read_flags

log = logging.getLogger("diagnostics")
EXIT_CODES = """exit codes: 0 done; 1 a repeated run has other files; 2 the input or the machine cannot be used, with one paragraph on
stderr; 130 stopped by the user, 143 by a signal, 141 by a reader that went. The same command again goes on where an interrupted one was."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
"""What the disk, not this program, is to blame for."""
NAMES = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.EMFILE,
    errno.ENFILE,
)
"""What a path that was given, or the number of open files, is to blame for."""
BROKEN_PIPE = 141
"""Whoever read the output has stopped: as a shell counts a program that SIGPIPE ended."""

EXAMPLES = {
    "run": (
        "python -m diagnostics run --pair embedded --output-dir reports/demo\n  python -m"
        " diagnostics run --student ./small --teacher ./large --prompts prompts.jsonl --output-dir"
        " reports/mine"
    ),
    "rollout": (
        "python -m diagnostics rollout --pair embedded --contexts 64 --output-dir reports/mine\n "
        " python -m diagnostics rollout --student ./small --teacher ./large --rollouts"
        " rollout_data/40.jsonl --prompts prompts.jsonl --output-dir reports/mine"
    ),
    "score": (
        "python -m diagnostics score --pair embedded --output-dir reports/mine\n  python -m"
        " diagnostics score --pair embedded --after reports/trained/student --output-dir"
        " reports/mine"
    ),
    "probe": (
        "python -m diagnostics probe --pair embedded --loss forward_kl --output-dir reports/mine"
    ),
    "analyze": (
        "python -m diagnostics analyze --output-dir reports/mine\n"
        "  python -m diagnostics analyze --tokens token_bank.csv --output-dir reports/theirs"
    ),
    "compare": (
        "python -m diagnostics compare --output-dir reports/mine --criteria"
        " divergence,teachability,tip --budgets 0.01,0.05,0.1"
    ),
    "intervene": (
        "python -m diagnostics intervene --pair embedded --criteria divergence,teachability"
        " --budgets 0.05,0.3 --output-dir reports/mine"
    ),
    "attribute": (
        "python -m diagnostics attribute --pair embedded --full-kernel --output-dir reports/mine"
    ),
    "report": (
        "python -m diagnostics report reports/mine\n"
        "  python -m diagnostics report --compare reports/demo reports/smollm2 --output-dir reports"
    ),
    "train": (
        "python -m diagnostics train --pair embedded --criterion teachability --budget 0.05 --steps"
        " 100 --output-dir reports/trained\n  accelerate launch -m diagnostics train --student"
        " ./small --teacher ./large --prompts prompts.jsonl --output-dir reports/trained"
    ),
    "validate": (
        "python -m diagnostics validate --pair embedded --offline reports/demo --output-dir"
        " reports/validation"
    ),
    "rerun": (
        "python -m diagnostics rerun reports/demo/manifest.json --output-dir reports/again\n "
        " python -m diagnostics rerun reports/mine/manifest.json --inputs ./small ./large"
        " prompts.jsonl --output-dir reports/again"
    ),
    "criteria": "python -m diagnostics criteria",
}
PURPOSE = {
    "run": "the whole main job: rollout, score, probe, analyze, report",
    "rollout": (
        "sample one response a prompt from the student and freeze it, or freeze responses that were"
        " sampled elsewhere"
    ),
    "score": "measure every response position of the frozen contexts",
    "probe": "take one OPD step, re-score the same positions, restore the student",
    "analyze": "write the tables of the study from tokens.parquet",
    "compare": "what each criterion would have captured of the gains, at each budget",
    "intervene": "one step with loss on the selected positions only, for each criterion and budget",
    "attribute": "first-order gains, and where a position's gain comes from",
    "report": (
        "draw the figures and write report.html from the run's files alone, or set several runs"
        " side by side"
    ),
    "train": "TA-OPD: train the student on the positions that a criterion selects",
    "validate": "a grid of short trainings: do the probe's conclusions survive them?",
    "rerun": "repeat a run from its manifest and compare every file's hash",
    "criteria": "list the registered selection criteria",
}


STAGES = {
    "rollout": (
        "models.pair.PairConfig",
        "contexts.prompts.PromptConfig",
        "contexts.rollouts.RolloutConfig",
        "contexts.import_rollouts.BankConfig",
    ),
    "score": ("models.pair.PairConfig", "probing.scores.ScoreConfig"),
    "probe": (
        "models.pair.PairConfig",
        "probing.one_step.ProbeConfig",
        "probing.scores.ScoreConfig",
    ),
    "analyze": ("analysis.config.AnalysisConfig",),
    "report": (),
}
STAGES["run"] = tuple(dict.fromkeys(config for configs in STAGES.values() for config in configs))
STAGES["compare"] = ("analysis.selection.ComparisonConfig", "analysis.config.AnalysisConfig")
STAGES["intervene"] = (
    "models.pair.PairConfig",
    "probing.one_step.ProbeConfig",
    "probing.intervention.InterventionConfig",
    "analysis.config.AnalysisConfig",
    "probing.scores.ScoreConfig",
)
STAGES["attribute"] = (
    "models.pair.PairConfig",
    "probing.one_step.ProbeConfig",
    "probing.attribution.AttributionConfig",
    "analysis.config.AnalysisConfig",
    "probing.scores.ScoreConfig",
)
STAGES["train"] = (
    "models.pair.PairConfig",
    "contexts.prompts.PromptConfig",
    "training.run.TrainConfig",
    "training.run.EngineConfig",
    "training.evaluation.EvaluationConfig",
)
STAGES["validate"] = (
    "models.pair.PairConfig",
    "contexts.prompts.PromptConfig",
    "training.grid.ValidateConfig",
    "training.run.EngineConfig",
    "training.evaluation.EvaluationConfig",
    "analysis.config.AnalysisConfig",
)


def _configs(command: str) -> tuple[type, ...]:
    """A command's dataclasses; loaded by name so that commands without a model never import
    torch.
    """
    pairs = (name.rsplit(".", 1) for name in STAGES.get(command, ()))
    return tuple(
        getattr(importlib.import_module(f"diagnostics.{module}"), config)
        for module, config in pairs
    )


def program() -> str:
    """How this program was started, as the user would type it again."""
    started = Path(sys.argv[0]).stem
    return started if started == "opd-diagnostics" else "python -m diagnostics"


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser with one subcommand a stage; with `only`, the other subcommands get no flags."""
    parser = Parser(
        prog=program(),
        description="Which of a teacher's token-level signals can this student learn from?",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"opd-diagnostics {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")
    for name in PURPOSE:
        command = commands.add_parser(
            name,
            help=PURPOSE[name],
            description=PURPOSE[name],
            epilog=f"example:\n  {EXAMPLES[name].replace('python -m diagnostics', program())}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        configs = _configs(name) if only in (None, name) else ()
        command.set_defaults(configs=configs)
        command.add_argument(
            "--quiet", action="store_true", help="only warnings and errors on stderr"
        )
        command.add_argument(
            "--json", action="store_true", help="print the result as one JSON object"
        )
        if name in STAGES:
            command.add_argument(
                "--output-dir", required=name != "report", help="the run's directory"
            )
            add_flags(command, *configs)
        if name == "report":
            _report_flags(command)
        if "models.pair.PairConfig" in STAGES.get(name, ()):
            command.add_argument(
                "--accept-code",
                action="store_true",
                help="keep finished stages that another version of this program measured",
            )
        if name == "rerun":
            command.add_argument("manifest", help="manifest.json of a finished run")
            command.add_argument("--output-dir", required=True, help="a new directory")
            command.add_argument(
                "--inputs",
                nargs="+",
                default=(),
                metavar="PATH",
                help=(
                    "models, prompts and runs that the manifest names and that do not lie beside it"
                ),
            )
            command.add_argument(
                "--device", default="auto", help="where the models run (default: auto)"
            )
        if name == "validate":
            command.add_argument(
                "--offline",
                help=(
                    "run directory of a finished main job, whose answers are compared with the"
                    " trainings"
                ),
            )
        if name == "score":
            command.add_argument(
                "--after", help="a trained student: add its after-columns and gains to the table"
            )
        if name == "analyze":
            command.add_argument(
                "--training", help="run directory of a finished validation, for claim C5"
            )
            command.add_argument(
                "--k",
                type=int,
                help="K of an imported table's columns, where the table does not say it",
            )
        if name in ("analyze", "compare"):
            command.add_argument(
                "--seed", type=int, default=0, help="seed of the bootstrap (default: 0)"
            )
            command.add_argument(
                "--tokens",
                help=(
                    "read this token table (ours, or one of the released scripts') instead of the"
                    " run's own"
                ),
            )
    return parser


def _report_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "directory", nargs="?", metavar="DIR", help="the run's directory, the same as --output-dir"
    )
    command.add_argument(
        "--contexts",
        type=int,
        default=24,
        help="contexts shown token by token, 0 for none (default: 24)",
    )
    command.add_argument(
        "--compare",
        nargs="+",
        metavar="DIR",
        help="finished runs to set side by side, in compare.html of --output-dir",
    )


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        distributed.require_launcher()
        with _sigterm_stops():
            return _command(sys.argv[1:] if arguments is None else list(arguments))
    except DiagnosticsError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
    except KeyboardInterrupt as error:
        print(
            "stopped; what was finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        return 143 if isinstance(error, Terminated) else 130
    except (OSError, MemoryError, RuntimeError) as error:
        explained = _fault_of_the_machine(error)
        if explained is None:
            raise
        print(printable(f"error: {explained}"), file=sys.stderr)
    return 2


def _command(arguments: list[str]) -> int:
    if not arguments:
        build_parser("").print_help()
        return 0
    parsed = build_parser(arguments[0]).parse_args(arguments)
    _log_to_stderr(quiet=parsed.quiet or parsed.json)
    result = {
        "criteria": _criteria,
        "rerun": lambda: _rerun(parsed),
        "report": lambda: _report(parsed),
    }.get(parsed.command, lambda: _stage(parsed))()
    code = result.pop("code", 0)
    text = (
        json.dumps(result, indent=2)
        if parsed.json
        else printable(result.pop("text", "") or _plain(result))
    )
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains once more at its end
        return BROKEN_PIPE
    return code


def printable(text: str) -> str:
    """Text whose control and direction characters are written out: names in files from elsewhere
    may steer a terminal.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


class _Printable(logging.Formatter):
    """Log lines as `printable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, with the lock given back and no unfinished file. A
    launcher's processes just end.
    """
    if distributed.world() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fault_of_the_machine(error: Exception) -> str | None:
    """What to say where disk or memory gave out, None for anything else."""
    first = (str(error).splitlines() or [""])[0][:200]
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in first
    ):
        return (
            f"The memory does not suffice ({first or type(error).__name__}). What was finished is"
            " kept. Use smaller --batch-tokens, --teacher-dtype bfloat16 or --offload-teacher, or"
            " a larger machine."
        )
    if isinstance(error, OSError) and error.errno in NAMES:
        return (
            f"{str(error.filename or 'A path')[:120]} cannot be opened ({error.strerror}). Name a"
            " file or folder that can be."
        )
    if isinstance(error, OSError) and error.errno in DISK:
        return (
            f"{error.filename or 'A file'} cannot be used ({error.strerror}). What was finished is"
            " kept. Make room or mend the permissions, and give the same command again."
        )
    return None


def _plain(result: dict) -> str:
    return "\n".join(f"{key}: {value}" for key, value in result.items())


def _log_to_stderr(*, quiet: bool) -> None:
    set_quiet(quiet)
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.WARNING if quiet else logging.INFO, force=True
    )
    for noisy in ("httpx", "matplotlib", "fontTools", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _criteria() -> dict:
    from diagnostics.criteria import list_criteria

    table = list_criteria()
    return {
        "text": table.drop(columns=["mine"]).to_string(),
        "criteria": table.reset_index().to_dict("records"),
    }


def _rerun(parsed: argparse.Namespace) -> dict:
    from diagnostics.pipeline import reproduce

    def do(arguments: list[str]) -> None:
        command = [
            *arguments,
            *(
                ["--device", parsed.device]
                if "models.pair.PairConfig" in STAGES[arguments[0]]
                else []
            ),
        ]
        _stage(build_parser(command[0]).parse_args(command))

    table = reproduce.rerun(
        Path(parsed.manifest),
        Path(parsed.output_dir),
        configs=_configs,
        do=do,
        inputs=[Path(path) for path in parsed.inputs],
    )
    different = int((~table["same"]).sum())
    text = "\n".join(
        f"{'equal    ' if row.same else 'different'}  {row.file}" for row in table.itertuples()
    )
    end = f"{len(table) - different} of {len(table)} files are equal"
    return {
        "code": int(different > 0),
        "text": f"{text}\n{end}",
        "files": table.to_dict("records"),
        "different": different,
    }


def _report(parsed: argparse.Namespace) -> dict:
    from diagnostics.pipeline.run import open_run
    from diagnostics.pipeline.stages import report_stage

    if (parsed.directory is None) == (parsed.output_dir is None):
        raise DiagnosticsError(
            "A report goes into one directory: name it as DIR, or with --output-dir."
        )
    directory = Path(parsed.directory or parsed.output_dir)
    if parsed.compare:
        from diagnostics.report.compare_runs import write

        return {"report": str(write(parsed.compare, directory))}
    if not os.path.lexists(directory / "manifest.json"):  # before a lock makes the directory
        raise DiagnosticsError(
            f"{directory} holds no manifest.json. Name the --output-dir of an earlier run."
        )
    with open_run(directory) as run:
        return {"report": str(report_stage(run, contexts=parsed.contexts))}


def _stage(parsed: argparse.Namespace) -> dict:
    from diagnostics.models import identity
    from diagnostics.pipeline import stages
    from diagnostics.pipeline.run import open_run

    configs = {config.__name__: read_flags(parsed, config) for config in parsed.configs}
    with open_run(parsed.output_dir, accept_code=getattr(parsed, "accept_code", False)) as run:
        models = (
            identity.Models(configs["PairConfig"], alone=parsed.command == "rollout")
            if "PairConfig" in configs
            else None
        )
        if parsed.command in ("run", "rollout"):
            stages.rollout_stage(
                run,
                models,
                configs["PromptConfig"],
                configs["RolloutConfig"],
                configs["BankConfig"],
            )
        if parsed.command in ("run", "score"):
            stages.score_stage(run, models, configs["ScoreConfig"])
        if getattr(parsed, "after", None):
            stages.after_stage(
                run, models, parsed.after, batch_tokens=configs["ScoreConfig"].batch_tokens
            )
        if parsed.command == "train":
            stages.train_stage(
                run,
                models,
                *(
                    configs[name]
                    for name in ("PromptConfig", "TrainConfig", "EngineConfig", "EvaluationConfig")
                ),
            )
        if parsed.command == "validate":
            stages.validate_stage(
                run,
                models,
                *(configs[name] for name in ("PromptConfig", "ValidateConfig", "EvaluationConfig")),
                offline=parsed.offline,
                analysis=configs["AnalysisConfig"],
                engine=configs["EngineConfig"],
            )
        if parsed.command in ("run", "probe"):
            stages.probe_stage(
                run,
                models,
                configs["ProbeConfig"],
                batch_tokens=configs["ScoreConfig"].batch_tokens,
            )
        if parsed.command in ("intervene", "attribute"):
            stage, own = (
                (stages.intervene_stage, "InterventionConfig")
                if parsed.command == "intervene"
                else (stages.attribute_stage, "AttributionConfig")
            )
            stage(
                run,
                models,
                *(configs[name] for name in ("ProbeConfig", own, "AnalysisConfig")),
                batch_tokens=configs["ScoreConfig"].batch_tokens,
            )
        if getattr(parsed, "tokens", None):
            stages.import_tokens(run, Path(parsed.tokens))
        if parsed.command == "compare":
            stages.compare_stage(
                run, configs["ComparisonConfig"], configs["AnalysisConfig"], seed=parsed.seed
            )
        if parsed.command in ("run", "analyze"):
            stages.analyze_stage(
                run,
                configs["AnalysisConfig"],
                seed=parsed.seed,
                training=getattr(parsed, "training", None),
                k=parsed.k if parsed.command == "analyze" else None,
            )
        if parsed.command == "run":
            return {"report": str(stages.report_stage(run))}
        return {"output_dir": str(run.directory)}
