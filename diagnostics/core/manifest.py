"""The manifest of a run directory: read with care, and asked for the hash of every file that is
read.
"""

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

log = logging.getLogger("diagnostics")
MANIFEST_BYTES = 64 * 2**20
"""Longest manifest that is read; one of a grid of a thousand trainings has a hundredth of it."""
MANIFEST_DEPTH = 32
"""Deepest nesting of a manifest; this program writes five levels, and a page shows them by
recursion.
"""
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
    "trl",
    "peft",
)
"""Settings that name a file or folder: recorded by its last name."""


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as this module writes it. Raises DiagnosticsError for a file that is missing,
    damaged or something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MANIFEST_BYTES + 1)
        manifest = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_manifest(path, getattr(error, "strerror", None) or str(error)) from error
    if len(content) > MANIFEST_BYTES or _deeper(manifest, MANIFEST_DEPTH):
        raise _no_manifest(path, f"more than {MANIFEST_BYTES:,} bytes or {MANIFEST_DEPTH} levels")
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict):
        raise _no_manifest(path, "no stages")
    for name, record in stages.items():
        parts = {"models": {}, "code": {}} | record if isinstance(record, dict) else {}
        if not all(
            isinstance(parts.get(part), dict)
            for part in ("settings", "inputs", "files", "models", "code")
        ):
            raise _no_manifest(path, f"stage {name!r} has no settings, inputs and files")
    if not all(
        isinstance(manifest.get(part, {}), dict) for part in ("versions", "joined", "begun")
    ):
        raise _no_manifest(path, "versions are no object")
    if not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in manifest.get("begun", {}).values()
    ):
        raise _no_manifest(path, "what was begun is no list of names")
    named = [
        file for record in stages.values() for part in ("inputs", "files") for file in record[part]
    ] + list(manifest.get("joined", {}))
    outside = next((file for file in named if _leads_out(file)), None)
    if outside is not None:
        raise _no_manifest(path, f"it names a file outside its directory, {outside!r}")
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


def _no_manifest(path: Path, reason: str) -> DiagnosticsError:
    return DiagnosticsError(
        f"{path} is not a manifest of this project ({reason}). Choose another --output-dir, or"
        " remove that file."
    )


def recorded(settings: Mapping[str, Any], *, apart: bool = False) -> dict[str, Any]:
    """Settings as a file may hold them: inputs by their last name, and no home folder in any text.

    apart: where no hash of their content stands beside them, tell inputs of one last name apart by
    a hash of their place."""
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
    home = os.path.expanduser("~").rstrip("/")
    if isinstance(value, dict):
        return {key: without_home(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_home(each) for each in value]
    return (
        value.replace(f"{home}/", "~/")
        if isinstance(value, str) and home.startswith("/")
        else value
    )


def unchanged(directory: str | Path, name: str) -> Path:
    """The path of a file of another run, compared with that run's manifest before anybody reads it.

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


def hashes_of(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Hashes that a manifest has of a file."""
    known = [
        record["files"][name]
        for record in manifest["stages"].values()
        if name in record.get("files", {})
    ]
    return known + [digest for file, digest in manifest.get("joined", {}).items() if file == name]
