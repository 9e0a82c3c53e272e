"""The stage `ask-teacher`: a served teacher's likeliest tokens on the frozen contexts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.core.tables import write_parquet
from diagnostics.core.types import read_bank
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ASK, Job

if TYPE_CHECKING:
    from diagnostics.models.served.ask import AskConfig

LISTS = "teacher_logprobs.parquet"
"""A served teacher's lists on the run's contexts."""


def do(job: Job) -> dict[str, str]:
    """Do the stage of a command, and name the file."""
    file = ask_stage(job.run, job.models, job.configs[ASK])
    return {"output_dir": str(job.run.directory), "teacher_logprobs": str(file)}


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
