"""The command line: `python -m diagnostics COMMAND --output-dir DIR …`.

Exit codes: 0 done; 1 a repeated run has other files; 2 the input or the machine cannot be used (one
paragraph on stderr says why and what to do); 130 stopped by the user, 143 by a signal, 141 when the
reader of the output has gone. Anything else is a fault of this program and shows its traceback.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagnostics import __version__
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import read_manifest
from diagnostics.core.progress import clear_line, in_stages, set_quiet
from diagnostics.pipeline.flags import Parser, add_flags, read_flags
from diagnostics.pipeline.registry import BY_NAME, COMMANDS, flags_of, load_configs
from diagnostics.pipeline.stage import PAIR, Job, Stage

log = logging.getLogger("diagnostics")
EXIT_CODES = """\
exit codes: 0 done; 1 a repeated run has other files; 2 the input or the machine cannot be used,
with one paragraph on stderr; 130 stopped by the user, 143 by a signal, 141 by a reader that went.
The same command again continues an interrupted one."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
"""Errors for which the disk, not this program, is to blame."""
NAMES = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.EMFILE,
    errno.ENFILE,
)
"""Errors for which a given path, or the number of open files, is to blame."""
BROKEN_PIPE = 141
"""The exit code when the reader of the output has stopped: 128 + SIGPIPE, as shells count it."""


def program() -> str:
    """How this program was started, as the user would type it again."""
    started = Path(sys.argv[0]).stem
    return started if started == "opd-diagnostics" else "python -m diagnostics"


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser, with one subcommand per command of the registry.

    Args:
        only: A command; the others get no flags from configurations, whose modules are then not
            imported. None gives every command all of its flags.
    """
    parser = Parser(
        prog=program(),
        description="Which of a teacher's token-level signals can this student learn from?",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"opd-diagnostics {__version__}",
        help="print the version and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in COMMANDS:
        examples = "\n".join(f"  {program()} {example}" for example in stage.example)
        command = commands.add_parser(
            stage.name,
            help=stage.purpose,
            description=stage.purpose,
            epilog=f"example:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_flags(command, stage, load_configs(stage.name) if only in (None, stage.name) else {})
    return parser


def _add_flags(command: argparse.ArgumentParser, stage: Stage, configs: dict[str, type]) -> None:
    """Give a command its own flags, those of its configurations, and those of every command."""
    command.set_defaults(configs=configs)
    command.add_argument(
        "--quiet", action="store_true", help="print only warnings and errors on stderr"
    )
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")
    command.add_argument(
        "--criterion-module",
        metavar="FILE",
        action="append",
        default=[],
        help="Python file that registers criteria of your own; may be given several times",
    )
    for own in flags_of(stage):
        own.add(command)
    add_flags(command, *configs.values())


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
    _load_criteria(parsed.criterion_module)
    result = {
        "criteria": _criteria,
        "coverage": lambda: _coverage(parsed),
        "rerun": lambda: _rerun(parsed),
        "report": lambda: _report(parsed),
        "atlas": lambda: _atlas(parsed),
        "teachers": lambda: _teachers(parsed),
    }.get(parsed.command, lambda: _answered(*_completed(parsed, arguments)))()
    code = result.pop("code", 0)
    text = (
        json.dumps(result, indent=2)
        if parsed.json
        else printable(result.pop("text", "") or _plain(result))
    )
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as `head` does
        # Python flushes stdout once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _load_criteria(paths: Sequence[str]) -> None:
    """Register the criteria of the user's own files."""
    if paths:
        from diagnostics.criteria import load_module

        for path in paths:
            load_module(path)


def _completed(
    parsed: argparse.Namespace, arguments: list[str]
) -> tuple[argparse.Namespace, frozenset[str]]:
    """The flags, filled in from the run's manifest where none is given, and names of the given."""
    from diagnostics.pipeline import remembered

    given = build_parser(arguments[0]).given(arguments)
    flags = remembered.flags(parsed, given)
    whole = build_parser(arguments[0]).parse_args([arguments[0], *flags, *arguments[1:]])
    taken = [
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in vars(whole).items()
        if name != "configs" and value != getattr(parsed, name, None)
    ]
    if taken:
        log.info("taken from the run: %s", ", ".join(taken))
    return whole, given


def _answered(parsed: argparse.Namespace, given: frozenset[str]) -> dict:
    """Run a command on one run directory, and add what the run says now."""
    from diagnostics.pipeline import answer

    result = _stage(parsed, given)
    directory = Path(parsed.output_dir)
    if parsed.command == "analyze":
        found = {**result, "claims": answer.claims(directory)}
        lines = [f"{c['claim']}: {c['verdict']} – {c['statement']}" for c in found["claims"]]
        return {**found, "text": "\n".join([*lines, _plain(result)])}
    if parsed.command not in ("run", "intervene", "compare"):
        return result
    manifest = read_manifest(directory / "manifest.json")
    table = _decided_now(directory, manifest) if parsed.command == "intervene" else None
    found = answer.answer(
        directory,
        program(),
        pair=_pair_flags(parsed),
        table=table,
        page=result.get("report"),
    )
    apart = _apart(directory) if parsed.command == "run" else ""
    return {**found, "text": "\n".join(filter(None, [answer.text(found), apart]))}


def _decided_now(directory: Path, manifest: Mapping[str, Any]) -> Any:
    """The decision table of a run's interventions, before `compare` has written it."""
    from diagnostics.pipeline.stages.compare import decided_now

    return decided_now(directory, manifest)


def _apart(directory: Path) -> str:
    """The command that makes the tables of right and of wrong responses; empty without use."""
    from diagnostics.pipeline.stages.by_correctness import hint

    return hint(directory, program())


def _pair_flags(parsed: argparse.Namespace) -> str:
    """The flags that name the pair and its prompts in another directory."""
    if getattr(parsed, "pair", None):
        return f"--pair {parsed.pair}"
    named = [(name, getattr(parsed, name, None)) for name in ("student", "teacher")]
    flags = [f"--{name} {shlex.quote(value)}" for name, value in named if value]
    return " ".join([*flags, "--prompts MORE.jsonl"])


def printable(text: str) -> str:
    """Write control and direction characters out: a stranger's file could steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


class _Lines(logging.StreamHandler):
    """Writes log lines above the line of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        clear_line()
        super().emit(record)


class _Printable(logging.Formatter):
    """Passes every log line through `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: the lock is given back, and no file is left unfinished.

    Processes of a launcher just end, because the launcher decides for all of them.
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
    """Say what to do when disk or memory gave out; None for any other error."""
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
            " file or folder that can be opened."
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
    handler = _Lines()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.WARNING if quiet else logging.INFO, force=True
    )
    for noisy in ("httpx", "matplotlib", "fontTools", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _criteria() -> dict:
    from diagnostics.criteria import list_criteria

    entries = list_criteria().reset_index().to_dict("records")
    width = shutil.get_terminal_size(fallback=(sys.maxsize, 24)).columns
    return {
        "text": (
            f"{_criteria_lines(entries, width)}\n\n"
            "Two by their ranks u and r: A_and_B is u*r, A_or_B is u + r - u*r.\n"
            "*: recommended; `run` intervenes on these. Budgets, sources, notes: --json."
        ),
        "criteria": entries,
    }


def _criteria_lines(entries: Sequence[Mapping[str, Any]], width: int) -> str:
    """A line per criterion in the given order, none wider than that many characters."""
    heads = ("name", "kind", "needs", "formula")
    rows = [("", *heads)]
    for entry in entries:
        name, kind, needs, formula = (str(entry[head]) for head in heads)
        star = "*" if entry["recommended"] else ""
        rows.append((star, name, kind, _cut(needs, width // 4), formula))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" ".join(map(str.ljust, row, wide)).rstrip() for row in rows)
    return "\n".join(_cut(line, width) for line in lines)


def _cut(text: str, width: int) -> str:
    """The text, the end of which gives way to an ellipsis where it is longer than the width."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _coverage(parsed: argparse.Namespace) -> dict:
    from diagnostics.contexts.coverage import read_coverage

    found = read_coverage(
        parsed.student,
        parsed.teacher,
        parsed.contexts,
        chains=parsed.chains,
        k=parsed.k,
        device=parsed.device,
        dtype=parsed.dtype,
    )
    return {
        "text": found.table.to_string(index=False, float_format="{:.3f}".format),
        "coverage": json.loads(found.table.to_json(orient="records")),
        **found.counts,
    }


def _rerun(parsed: argparse.Namespace) -> dict:
    from diagnostics.pipeline import reproduce

    def repeat(arguments: list[str]) -> None:
        device = ["--device", parsed.device] if PAIR in BY_NAME[arguments[0]].configs else []
        _stage(build_parser(arguments[0]).parse_args([*arguments, *device]))

    table = reproduce.rerun(
        Path(parsed.manifest),
        Path(parsed.output_dir),
        do=repeat,
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
    if (parsed.directory is None) == (parsed.output_dir is None):
        raise DiagnosticsError(
            "A report goes into one directory: name it as DIR, or with --output-dir."
        )
    from diagnostics.pipeline.run import open_run
    from diagnostics.pipeline.stages.report import report_stage

    directory = Path(parsed.directory or parsed.output_dir)
    if parsed.compare:
        from diagnostics.report.compare_runs import write

        return {"report": str(write(parsed.compare, directory))}
    if not os.path.lexists(directory / "manifest.json"):  # before a lock makes the directory
        raise DiagnosticsError(
            f"{directory} holds no manifest.json. Name the --output-dir of an earlier run."
        )
    with open_run(directory) as run, in_stages(["report"]) as shown, shown.stage("report"):
        run.name_models(student=parsed.student_name, teacher=parsed.teacher_name)
        page = report_stage(run, contexts=parsed.contexts, pdf=parsed.pdf)
        return {"report": str(page)}


def _teachers(parsed: argparse.Namespace) -> dict:
    from diagnostics.pipeline import teachers

    return teachers.compare(parsed)


def _atlas(parsed: argparse.Namespace) -> dict:
    from diagnostics.report.atlas_page import atlas

    found = atlas(parsed.runs, names=parsed.names)
    lines = [
        f"{question}:\n" + "\n".join(f"  - {text}" for text in texts)
        for question, texts in found.sentences().items()
    ]
    page = str(found.save(parsed.output_dir))
    return {**found.sentences(), "page": page, "text": "\n".join([*lines, f"page: {page}"])}


def _stage(parsed: argparse.Namespace, given: frozenset[str] = frozenset()) -> dict:
    """Run a command that works on one run directory."""
    from diagnostics.criteria import find
    from diagnostics.models.identity import Models
    from diagnostics.pipeline import remembered
    from diagnostics.pipeline.jobs import do
    from diagnostics.pipeline.run import open_run

    configs = {name: read_flags(parsed, config) for name, config in parsed.configs.items()}
    for criterion in dict.fromkeys(_criteria_of(configs)):
        find(criterion)  # before any model runs
    with open_run(parsed.output_dir, accept_code=getattr(parsed, "accept_code", False)) as run:
        models = (
            Models(configs[PAIR], alone=parsed.command == "rollout") if PAIR in configs else None
        )
        result = do(Job(parsed.command, run, models, configs, parsed, given))
        remembered.note_inputs(run.manifest, configs.values())
    return result


def _criteria_of(configs: Mapping[str, Any]) -> Iterator[str]:
    """Every criterion that a command's settings name."""
    for config in configs.values():
        yield from getattr(config, "criteria", ())
        if isinstance(getattr(config, "criterion", None), str):
            yield config.criterion
