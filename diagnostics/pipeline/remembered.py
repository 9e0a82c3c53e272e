"""Settings that a command takes from the manifest of its run where no flag gives them.

A manifest names models and prompts by their last names and by hashes, so that it tells nothing of
the machine. Where the files with these hashes lie is noted outside the run, in the user's own
folder for such notes (`XDG_STATE_HOME`, else `~/.local/state`), each time a command has used them:
no stranger's manifest can say what is opened here. A flag that is given always counts, and is
refused where it contradicts what the run holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.manifest import PATHS, read_manifest
from diagnostics.pipeline.registry import BY_NAME, flags_of, load_configs
from diagnostics.pipeline.stage import PAIR, PROBE, PROMPTS, SCORE

MEASURED = ("probe", "score", "rollout")
"""Stages whose settings of the pair, the step and the scores later stages share."""
SHARED = (PAIR, SCORE, PROBE)
"""Configurations that those stages and the later ones have in common."""
OF_OTHERS = {"validate": (PAIR, PROMPTS)}
"""Configurations that a command takes from the other run that it is given."""
NOT_TAKEN = ("contexts",)
"""Settings that are not taken from another run: how many prompts it used."""
MOST = 1000
"""Most places that are noted; the oldest are forgotten first."""


def places_file() -> Path:
    """The user's note of where files with a hash lie."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "opd-diagnostics" / "places.json"


def places() -> dict[str, str]:
    """Paths by the hash of what lies there; empty where nothing was noted or can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(places_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {str(digest): path for digest, path in found.items() if isinstance(path, str)}
    return {}


def note(found: Mapping[str, str]) -> None:
    """Note where files lie, by their hash. Where the note cannot be written nothing is lost."""
    known = places()
    if all(known.get(digest) == path for digest, path in found.items()):
        return
    kept = {digest: path for digest, path in known.items() if digest not in found} | dict(found)
    with suppress(OSError, DiagnosticsError):
        places_file().parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(list(kept.items())[-MOST:]), indent=1)
        write_atomic(places_file(), text.encode("utf-8"))


def note_inputs(manifest: Mapping[str, Any], configs: Iterable[Any]) -> None:
    """Note where the models and prompts of a finished command lie.

    Args:
        manifest: The manifest of its run, which has the hashes.
        configs: The command's configurations, which have the paths.
    """
    given = {
        key: value
        for config in configs
        for key, value in vars(config).items()
        if key in PATHS and isinstance(value, str)
    }
    found = {}
    for record in manifest["stages"].values():
        for key, value in given.items():
            digest = _digest(record, key)
            place = value.removeprefix("hf:")
            if digest and os.path.lexists(place):
                found[digest] = value[: len(value) - len(place)] + os.path.abspath(place)
    note(found)


def _digest(record: Mapping[str, Any], key: str) -> str | None:
    digest = record["models"].get(key) if key in record.get("models", {}) else None
    digest = digest or record["settings"].get(f"{key}_sha256")
    return digest if isinstance(digest, str) else None


def flags(parsed: argparse.Namespace, given: Collection[str]) -> list[str]:
    """Flags that were not given, from the manifest of the command's run.

    Args:
        parsed: The parsed flags.
        given: Names of the flags that the user gave.

    Returns:
        Arguments for the parser, which checks their values as if they had been typed.

    Raises:
        DiagnosticsError: A model or a prompt file of the run is needed, was not given, and nobody
            knows where it lies.
    """
    command, found = parsed.command, dict[str, str]()
    stages = _stages(getattr(parsed, "output_dir", None))
    other = _stages(getattr(parsed, "offline", None)) if command in OF_OTHERS else {}
    for config, fields in _fields(command).items():
        records = _sources(command, config, stages)
        if config in OF_OTHERS.get(command, ()):
            records += [other[each] for each in MEASURED if each in other]
        for name in fields:
            if name in given or name in found or _named_otherwise(name, given):
                continue
            value, record = _found(name, records)
            if value is not None and not (name in NOT_TAKEN and record in other.values()):
                found[name] = _typed(name, value, record)
    return list(found.values())


def _stages(directory: str | None) -> dict[str, Any]:
    path = Path(directory) / "manifest.json" if directory else None
    if path is None or not path.is_file():
        return {}
    return read_manifest(path)["stages"]


def _fields(command: str) -> dict[str, list[str]]:
    """Names of settings by configuration; a flag that no configuration holds is under ''."""
    configs = load_configs(command)
    found = {
        name: [field.name for field in dataclasses.fields(config)]
        for name, config in configs.items()
    }
    held = {name for names in found.values() for name in names}
    own = [each.field for each in flags_of(BY_NAME[command]) if each.recorded == "always"]
    return found | {"": [name for name in own if name not in held]}


def _sources(command: str, config: str, stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records that may hold a configuration's settings: the command's own stages, then those whose
    settings it shares.
    """
    parts = BY_NAME[command].parts or (command,)
    own = [part for part in parts if config == "" or config in BY_NAME[part].configs]
    names = [*own, *(MEASURED if config in SHARED else ())]
    return [stages[name] for name in dict.fromkeys(names) if name in stages]


def _found(name: str, records: Iterable[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The first value of a setting, and the record that has it."""
    for record in records:
        if record["settings"].get(name) is not None:
            return record["settings"][name], record
    return None, {}


def _named_otherwise(name: str, given: Collection[str]) -> bool:
    """Whether the user named the models in another way than by this setting."""
    return (name == "pair" and bool({"student", "teacher"} & set(given))) or (
        name in ("student", "teacher") and "pair" in given
    )


def _typed(name: str, value: Any, record: dict[str, Any]) -> str:
    """A setting as it is typed."""
    if name in PATHS and isinstance(value, str):
        value = _place(name, value, record)
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"


def _place(name: str, value: str, record: dict[str, Any]) -> str:
    """Where an input of a run lies: as noted, or under its last name here, or on the hub."""
    digest = _digest(record, name)
    known = places().get(digest or "")
    if known is not None and os.path.lexists(known.removeprefix("hf:")):
        return known
    local = len(digest or "") == 64
    if not local or os.path.lexists(value):
        return value
    raise DiagnosticsError(
        f"The run's {name} is {value!r}, and where it lies is not known here: a manifest holds its"
        f" last name alone. Name it: --{name.replace('_', '-')} PATH/TO/{value}."
    )
