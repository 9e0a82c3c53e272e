"""The lock of a run directory, and what is refused or removed before it is used."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import read_manifest

log = logging.getLogger("diagnostics")
FOLDERS = (
    "tables",
    "figures",
    "cells",
    "paper",
    "checkpoints",
    "student",
    "tensorboard",
    ".partial",
)
"""Folders of a run directory that this program keeps."""
FILES = (
    "manifest.json",
    "contexts.parquet",
    "scores.parquet",
    "tops.parquet",
    "gains.parquet",
    "tokens.parquet",
    "first_order.parquet",
    "interventions.parquet",
    "training_gains.parquet",
    "evaluations.parquet",
    "evaluations.csv",
    "metrics.jsonl",
    "positions.jsonl",
    "timings.jsonl",
    "train.json",
    "report.html",
    "report.md",
    "compare.html",
    "paper.html",
    "after.parquet",
    "pages.json",
    ".lock",
)
"""Files of a run directory that this program keeps, in addition to those in the manifest."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    The directory is created where it does not exist, and files that a killed process left
    half-written are removed.

    Raises:
        DiagnosticsError: Another process holds the lock, the folder cannot be written, belongs to
            something else, or holds a link in place of a file of this program.
    """
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(directory)
        refuse_unfit(directory, FILES)
        lock = files.open_inside(directory, ".lock", os.O_RDWR | os.O_CREAT)
    with os.fdopen(lock, "rb"):
        _take_lock(lock, directory)
        with _usable(directory):
            _refuse_foreign(directory)
            _remove_unfinished(directory)
        yield


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} cannot be used as output directory ({error.strerror}). Choose a folder"
            " that can be written."
        ) from error


def _take_lock(lock: int, directory: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} is in use by another process. Wait for it to end, or choose another"
            " --output-dir."
        ) from error


def _refuse_foreign(directory: Path) -> None:
    """Refuse a folder with files but no manifest.

    The folder belongs to something else, or has lost the record of its files. Contexts alone may be
    put into a new directory, to be scored there.
    """
    present = sorted(
        entry.name for entry in os.scandir(directory) if not entry.name.startswith(".")
    )
    if "manifest.json" in present or present in ([], ["contexts.parquet"]):
        return
    other = next(name for name in present if name != "contexts.parquet")
    if set(present) & {*FILES, *FOLDERS}:
        raise DiagnosticsError(
            f"{directory} holds {other!r} and no manifest.json, so nothing says with which settings"
            " its files were made. Nothing was overwritten. Bring manifest.json back, or choose an"
            " empty or new --output-dir."
        )
    raise DiagnosticsError(
        f"{directory} holds {other!r} and no manifest.json, so it is not a run of this project. "
        "Choose an empty or new --output-dir."
    )


def refuse_unfit(directory: Path, names: Iterable[str]) -> None:
    """Refuse links, pipes and the like in place of this program's files and folders.

    This program would read or write through them.
    """
    for name in names:
        if (found := files.kind(directory / name)) not in ("file", None):
            raise files.unfit(directory / name, found, "file")
    for folder in FOLDERS:
        if (found := files.kind(directory / folder)) not in ("folder", None):
            raise files.unfit(directory / folder, found, "folder")
        for name, found in files.walk(directory, folder):
            if found not in ("file", "folder"):
                raise files.unfit(directory / name, found, "file")


def _remove_unfinished(directory: Path) -> None:
    """Remove half-written files, recognized by name, from this program's own folders."""
    found = [(name, files.kind(directory / name)) for name in sorted(os.listdir(directory))]
    found += [entry for folder in FOLDERS for entry in files.walk(directory, folder)]
    for name, kind in found:
        if kind == "file" and files.TEMPORARY.fullmatch(name.rpartition("/")[2]):
            remove_ours(directory, name, kind, files.TEMPORARY)


def remove_ours(directory: Path, name: str, kind: str, naming: re.Pattern) -> None:
    """Remove an empty folder, or a file of this program's naming.

    Anything else stays, with a warning.
    """
    if kind == "folder":
        gone = files.remove_folder(directory, name)
    else:
        ours = any(each.fullmatch(name.rpartition("/")[2]) for each in (naming, files.TEMPORARY))
        gone = ours and files.remove_inside(directory, name)
    if not gone and kind != "folder":
        log.warning("%s is not this program's, or another user's, and stays", directory / name)


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold a folder while pages are written into it.

    A run directory is held by its lock file. Any other folder is locked itself, so that no lock
    file is left in it.
    """
    if files.kind(directory / "manifest.json") is not None:
        with locked(directory), files.guard(directory):
            read_manifest(directory / "manifest.json")
            yield
        return
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take_lock(descriptor, directory)
        with files.guard(directory):
            yield
    finally:
        os.close(descriptor)
