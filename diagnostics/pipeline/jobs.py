"""A command at work on a run directory: its stages in turn, with another process beside them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from diagnostics.core.progress import in_stages
from diagnostics.pipeline import ahead
from diagnostics.pipeline.registry import BY_NAME
from diagnostics.pipeline.stage import Job
from diagnostics.pipeline.stages.settings import refuse_sharded_student

LEFT_OUT = ("intervene", "compare")
"""Stages that --quick leaves out: nothing is decided without the first."""
UNASKED = {
    "import": ("tokens", "tokens_after", "tokenizer"),
    "after": ("after",),
    "by-correctness": ("by_correctness",),
}
"""Stages that are done where one of these flags asks for them, and otherwise left out."""


def do(job: Job) -> dict[str, Any]:
    """Run a command's stages in turn on its run directory, and return what to print.

    Where interventions come before the analysis, its tables are made meanwhile by another process.
    """
    result: dict[str, Any] = {"output_dir": str(job.run.directory)}
    names = stages_of(job)
    if "intervene" in names:  # before anything else is done
        refuse_sharded_student(job.models, "an intervention")
    with ExitStack() as stack, in_stages(names) as shown:
        made: ahead.Ahead | None = None
        if _will_wait(job, names):
            made = stack.enter_context(ahead.beside())
        for name in names:
            if name == "intervene" and "analyze" in names:
                if made is None:
                    made = stack.enter_context(ahead.beside(_tasks(job)))
                else:
                    made.give(_tasks(job))
            options = {"made": made} if made is not None and name in ahead.TABLES else {}
            with shown.stage(name):
                result = BY_NAME[name].function()(job, **options) or result
    return result


def stages_of(job: Job) -> list[str]:
    """The stages that a command does, in their order."""
    names = BY_NAME[job.command].parts or (job.command,)
    quick = job.flag("quick")
    return [
        name
        for name in names
        if not (quick and name in LEFT_OUT)
        and (name == job.command or name not in UNASKED or any(map(job.flag, UNASKED[name])))
    ]


def _will_wait(job: Job, names: list[str]) -> bool:
    """Whether another process can load what it needs while models sample, score or step."""
    to_probe = "probe" in names and "probe" not in job.run.manifest["stages"]
    return to_probe and {"intervene", "analyze"} <= set(names)


def _tasks(job: Job) -> dict[str, Any]:
    """What another process can make during the interventions, without what is kept anyway."""
    found = {name: BY_NAME[name].function("task_of")(job) for name in ahead.MAKERS}
    return {name: task for name, task in found.items() if task is not None}
