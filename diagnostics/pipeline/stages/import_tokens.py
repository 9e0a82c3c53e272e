"""The stage `import`: a token table of another program becomes the run's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import fingerprint_files
from diagnostics.core.tables import write_parquet
from diagnostics.models.identity import file_hash
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import Job


def do(job: Job) -> None:
    """Do the stage where a command names a table."""
    beside = [name for name in ("tokens_after", "tokenizer") if job.flag(name)]
    if job.flag("tokens"):
        after = job.flag("tokens_after")
        import_tokens(
            job.run,
            Path(job.flag("tokens")),
            after=Path(after) if after else None,
            tokenizer=job.flag("tokenizer"),
        )
    elif beside:
        raise DiagnosticsError(
            f"--{beside[0].replace('_', '-')} goes with an imported table, and there is none. Name"
            " it with --tokens."
        )


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
