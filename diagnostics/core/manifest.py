"""The manifest of a run directory: how it is read, and how files are compared with it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import regular

log = logging.getLogger("diagnostics")
MANIFEST_BYTES = 64 * 2**20
"""Longest manifest that is read; one of a grid of a thousand trainings has a hundredth of it."""
MANIFEST_DEPTH = 32
"""Deepest nesting of a manifest; this program writes five levels, and a page shows them by
recursion.
"""
REMEDY = "Choose another --output-dir, or remove that file."
"""What to do where a directory to write into holds a damaged manifest."""
PATHS = (
    "student",
    "teacher",
    "prompts",
    "eval_prompts",
    "rollouts",
    "teacher_logprobs",
    "training",
    "offline",
    "after",
    "tokens_after",
    "tokenizer",
    "trl",
    "peft",
)
"""Settings that name a file or folder: recorded by its last name."""


def read_manifest(path: Path, *, remedy: str = REMEDY) -> dict[str, Any]:
    """Read and check a manifest.

    Args:
        path: The file.
        remedy: The sentence that tells the reader what to do where it cannot be read.

    Raises:
        DiagnosticsError: The file is missing or damaged, is no manifest, or names a file outside
            its directory.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MANIFEST_BYTES + 1)
        manifest = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_manifest(path, remedy, getattr(error, "strerror", None) or str(error)) from error
    if len(content) > MANIFEST_BYTES or _deeper(manifest, MANIFEST_DEPTH):
        raise _no_manifest(
            path, remedy, f"more than {MANIFEST_BYTES:,} bytes or {MANIFEST_DEPTH} levels"
        )
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict):
        raise _no_manifest(path, remedy, "no stages")
    for name, record in stages.items():
        parts: dict[str, Any] = {}
        if isinstance(record, dict):
            parts = {"models": {}, "code": {}} | record
        if not all(
            isinstance(parts.get(part), dict)
            for part in ("settings", "inputs", "files", "models", "code")
        ):
            raise _no_manifest(path, remedy, f"stage {name!r} has no settings, inputs and files")
    if not all(
        isinstance(manifest.get(part, {}), dict)
        for part in ("versions", "joined", "begun", "primary", "names")
    ):
        raise _no_manifest(path, remedy, "versions are no object")
    if not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in manifest.get("begun", {}).values()
    ):
        raise _no_manifest(path, remedy, "what was begun is no list of names")
    named = [
        file for record in stages.values() for part in ("inputs", "files") for file in record[part]
    ] + list(manifest.get("joined", {}))
    outside = next((file for file in named if _leads_out(file)), None)
    if outside is not None:
        raise _no_manifest(path, remedy, f"it names a file outside its directory, {outside!r}")
    return manifest


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than so many levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_deeper(each, levels - 1) for each in inner))


def _leads_out(name: str) -> bool:
    try:
        files.inside(name)
    except DiagnosticsError:
        return True
    return False


def _no_manifest(path: Path, remedy: str, reason: str) -> DiagnosticsError:
    return DiagnosticsError(f"{path} is not a manifest of this project ({reason}). {remedy}")


def recorded(settings: Mapping[str, Any], *, apart: bool = False) -> dict[str, Any]:
    """Settings as a manifest may hold them: inputs by their last name, and no home folder.

    Args:
        settings: Name and value of each setting.
        apart: Whether to add a hash of each input's place. Inputs of the same last name need it
            where the manifest holds no hash of their content.
    """
    places = {
        f"{key}_place": (
            hashlib.sha256(os.path.abspath(value).encode("utf-8", "surrogateescape")).hexdigest()[
                :16
            ]
        )
        for key, value in settings.items()
        if apart and key in PATHS and isinstance(value, str) and _last_name(value) != value
    }
    return places | {
        key: without_home(_last_name(value) if key in PATHS and isinstance(value, str) else value)
        for key, value in settings.items()
    }


def _last_name(value: str) -> str:
    """A path's last name; a Hugging Face id, which names no file here, as it is."""
    scheme, path = ("hf:", value.removeprefix("hf:")) if value.startswith("hf:") else ("", value)
    local = path.startswith(("/", "~", "./", "../")) or os.path.lexists(path)
    return scheme + (PurePath(os.path.abspath(path)).name if local else path)


def without_home(value: Any) -> Any:
    """A value in whose texts the user's home folder is written `~`."""
    home = os.path.expanduser("~").rstrip("/")
    if isinstance(value, dict):
        return {key: without_home(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_home(each) for each in value]
    if not isinstance(value, str) or not home.startswith("/"):
        return value
    return "~" if value == home else value.replace(f"{home}/", "~/")


def unchanged(directory: str | Path, name: str) -> Path:
    """Compare a file of another run with that run's manifest, before anything reads it.

    Raises DiagnosticsError where the file is not as it was written, or is no regular file. A file
    in no record is named in a warning."""
    directory = Path(directory)
    manifest = (
        read_manifest(directory / "manifest.json")
        if files.kind(directory / "manifest.json")
        else {"stages": {}}
    )
    digest, known = files.hash_inside(directory, name), hashes_of(manifest, name)
    if digest is not None and known and digest not in known:
        raise DiagnosticsError(
            f"{directory / name} is not as it was written: its sha256 is {digest[:16]}…, and"
            f" manifest.json has {known[-1][:16]}…. Run the stage that writes it again in"
            f" {directory}, or name another run."
        )
    if digest is not None and not known:
        log.warning(
            "%s is in no record of its run's manifest.json, so nothing says what measured it",
            directory / name,
        )
    return directory / name


def require_as_written(path: str | Path) -> None:
    """Refuse a file of a run directory that is not as the manifest beside it has it.

    A file without a manifest beside it, without a record in it, or beside another program's
    manifest.json is nobody's to vouch for, and passes. Raises DiagnosticsError for a changed one.
    """
    path = Path(path)
    beside = path.parent / "manifest.json"
    if files.kind(beside) != "file" or not regular(path):
        return
    try:
        known = hashes_of(read_manifest(beside), path.name)
    except DiagnosticsError:
        return
    if known and files.sha256_file(path) not in known:
        raise DiagnosticsError(
            f"{path} is not as it was written: {beside} has another hash of it. Run the stage that"
            " writes it again, or move the file away from that manifest to read it as it is."
        )


def hashes_read(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Hashes that a reader may hold a file to: those of `hashes_of`, else what a stage read it
    with.
    """
    stages = manifest["stages"].values()
    return hashes_of(manifest, name) or [
        record["inputs"][name] for record in stages if name in record.get("inputs", {})
    ]


def hashes_of(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Hashes that a manifest holds of a file, from its stages and its joined files."""
    known = [
        record["files"][name]
        for record in manifest["stages"].values()
        if name in record.get("files", {})
    ]
    return known + [digest for file, digest in manifest.get("joined", {}).items() if file == name]
