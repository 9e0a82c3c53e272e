"""Repeat a run from its manifest, and compare every file that it made.

The settings of a manifest become the commands that gave them, one command per stage, in the order
of the registry. They go through the parser again rather than straight into dataclasses, because a
manifest may be a stranger's: types, choices and bounds are checked like typed flags. Before any
work the models and prompt files are compared with the manifest's hashes. Another version of the
code or of a library is named and does not stop the repetition, since it may be the reason for it.

Files that no stage wrote (contexts that were copied into the directory by hand) are taken from the
folder of the manifest, and must have the hash that the manifest gives. A manifest names models,
prompts and other runs by their last names. They are looked for in its own folder and among the
paths that the user names, and nowhere else, since a manifest may be a stranger's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from diagnostics.core import files, fingerprints, tables
from diagnostics.core import manifest as manifests
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import RETIRED
from diagnostics.pipeline import run as run_directory
from diagnostics.pipeline.registry import BY_NAME, STAGES, load_configs

log = logging.getLogger("diagnostics")
UNREPEATED = {stage.name for stage in STAGES if not stage.repeatable}
"""Stages whose files came from elsewhere, as from a server: they are inputs of a repetition."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(/[\w.-]+\.gguf)?")
SHA256 = re.compile(r"[0-9a-f]{64}")


def rerun(
    path: Path,
    output_dir: Path,
    *,
    do: Callable[[list[str]], None],
    inputs: Sequence[Path] = (),
) -> pd.DataFrame:
    """Repeat a run in another directory, and compare the files.

    Args:
        path: The manifest of the run.
        output_dir: The directory of the repetition.
        do: Runs one command, given its arguments.
        inputs: Models, prompt files and runs that the manifest names and that do not lie in its
            folder.

    Returns:
        One row per file with the columns stage, file, was and now (sha256; None where there is no
        such file), and same.

    Raises:
        DiagnosticsError: The manifest cannot be read or repeated, an input was not named, or a
            model or prompt file has changed.
    """
    manifest = manifests.read_manifest(path)
    if not manifest["stages"]:
        raise DiagnosticsError(
            f"{path} has no finished stage, so there is nothing to repeat. Name the manifest of a"
            " finished run."
        )
    if output_dir.resolve() == path.parent.resolve():
        raise DiagnosticsError(
            f"{output_dir} is the run itself. Choose a new --output-dir to repeat it in."
        )
    planned = list(commands(manifest, Inputs(path.parent, inputs)))
    if not planned:
        raise DiagnosticsError(
            f"{path} holds only what was made from other runs or by a server"
            f" ({', '.join(manifest['stages'])}). Repeat those runs instead."
        )
    _require_same_pair(manifest)
    _lay_in(manifest, path.parent, output_dir)
    for command in planned:
        log.info("%s", " ".join(command))
        do([*command, "--output-dir", str(output_dir), "--quiet"])
    return compared(manifest, manifests.read_manifest(output_dir / "manifest.json"))


def commands(manifest: dict[str, Any], inputs: Inputs) -> Iterator[list[str]]:
    """Yield the arguments of the command that gave each stage, without an output directory.

    Args:
        manifest: The manifest, as `read_manifest` returns it.
        inputs: Finds the files that the manifest names.

    Raises:
        DiagnosticsError: No command gives one of the stages, or the manifest lacks a setting.
    """
    stages = manifest["stages"]
    known = [
        stage.name
        for stage in STAGES
        if stage.run is not None and stage.recorded and stage.repeatable
    ]
    unknown = sorted(stages.keys() - set(known) - UNREPEATED)
    if unknown:
        raise DiagnosticsError(
            f"The manifest has the stage {unknown[0]!r}, which this version cannot repeat. Known"
            f" are {', '.join(known)}."
        )
    for name in (name for name in known if name in stages):
        command = BY_NAME[name].command or name
        settings = _settings(name, stages[name], inputs)
        yield [command, *(part for key in _keys(name) for part in _flag(key, settings.get(key)))]


def _keys(name: str) -> list[str]:
    """The settings that the command of a stage takes: fields of its configurations, then flags."""
    configs = load_configs(BY_NAME[name].command or name).values()
    fields = [field.name for config in configs for field in dataclasses.fields(config)]
    own = [flag.field for flag in BY_NAME[name].flags if flag.recorded != "never"]
    return list(dict.fromkeys([*fields, *own]))


def _settings(name: str, record: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Return the settings of a stage with the paths of its inputs.

    Raises:
        DiagnosticsError: A setting or an input is missing, or has a value that it cannot have.
    """
    settings = dict(record["settings"])
    gone = next((key for key in settings if key in RETIRED), None)
    if gone is not None:
        raise DiagnosticsError(
            f"Stage {name!r} of the manifest was run with {gone}={settings[gone]!r}, which this"
            f" version no longer has. {RETIRED[gone]} Run it anew, or repeat it with the version"
            " that the manifest names."
        )
    for key, value in settings.items():
        if (
            key in manifests.PATHS and value is not None and not isinstance(value, str)
        ) or isinstance(value, dict):
            raise DiagnosticsError(
                f"Stage {name!r} of the manifest has the {key} {str(value)[:60]!r}, which is no"
                " value of that setting. It cannot be repeated."
            )
    for key in (flag.field for flag in BY_NAME[name].flags if flag.recorded == "always"):
        if settings.get(key) is None:
            raise DiagnosticsError(
                f"Stage {name!r} of the manifest records no {key}, so it cannot be repeated. Name"
                " the manifest of a finished run."
            )
    if name == "import":
        named = settings | {"tokens_sha256": settings.get("sha256")}
        record = {"settings": named, "models": record.get("models", {})}
    paths = [
        key
        for key in (*manifests.PATHS, *(["tokens"] if name == "import" else []))
        if settings.get(key)
    ]
    # A JSON object in place of a file is no path.
    paths = [key for key in paths if not settings[key].lstrip().startswith("{")]
    return settings | {key: inputs.found(name, key, settings[key], record) for key in paths}


def _flag(name: str, value) -> list[str]:
    """A setting as it was typed; nothing for a setting that was left out."""
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


class Inputs:
    """Finds the files and folders that a manifest names by their last names.

    A manifest may be a stranger's, so nothing is read because it says so: an input is one of those
    that the user `named`, or lies in the folder of the manifest, behind no link.
    """

    def __init__(self, beside: Path, named: Sequence[Path] = ()):
        self.beside, self.named = beside, [Path(path) for path in named]

    def found(self, stage: str, key: str, value: str, record: Mapping[str, Any]) -> str:
        """Return the path of a stage's input, or its id on the Hugging Face hub.

        Args:
            stage: The stage, for messages.
            key: The setting that names the input.
            value: Its value in the manifest.
            record: The stage's record, with the hashes.

        Raises:
            DiagnosticsError: Nobody named the input, or no candidate has the recorded hash.
        """
        scheme, value = (
            ("hf:", value.removeprefix("hf:")) if value.startswith("hf:") else ("", value)
        )
        digest = _digest(key, record)
        if digest is None and self._is_id(key, scheme, value):
            return scheme + value
        candidates = list(self._candidates(value))
        hashes = {str(path): _hash_of(key, path) for path in candidates} if digest else {}
        same = [path for path in candidates if digest is None or hashes[str(path)] == digest]
        if same:
            return scheme + str(same[0])
        if candidates:
            raise _changed(
                [
                    f"{key} of stage {stage!r}, {path}: was {digest}, is {now}"
                    for path, now in hashes.items()
                ]
            )
        raise DiagnosticsError(
            f"Stage {stage!r} read {PurePath(value).name!r} ({key}), which is not beside the"
            " manifest, and what a manifest names elsewhere is not opened. Name it: --inputs"
            f" PATH/TO/{PurePath(value).name}."
        )

    def _is_id(self, key: str, scheme: str, value: str) -> bool:
        """Whether a value is an id on the hub: it looks like one, and no file has the name."""
        return bool(
            (key in ("student", "teacher", "after", "tokenizer") or scheme)
            and HUB_ID.fullmatch(value)
            and not os.path.lexists(value)
        )

    def _candidates(self, value: str) -> Iterator[Path]:
        yield from (
            path
            for path in self.named
            if PurePath(os.path.abspath(path)).name == PurePath(value).name and path.exists()
        )
        with suppress(DiagnosticsError, OSError):
            if is_inside(self.beside, value):
                yield self.beside / value


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file or folder lies below `folder`, with no link on the way or in it."""
    parts = files.inside(name)
    kinds = [files.kind(folder.joinpath(*parts[: end + 1])) for end in range(len(parts))]
    if kinds[:-1] != ["folder"] * (len(parts) - 1) or kinds[-1] not in ("file", "folder"):
        return False
    return all(kind in ("file", "folder") for _, kind in files.walk(folder, name))


def _digest(key: str, record: Mapping[str, Any]) -> str | None:
    """The recorded hash of a stage's input; models have theirs in a part of their own."""
    digest = record["settings"].get(f"{key}_sha256") or record.get("models", {}).get(key)
    return digest if isinstance(digest, str) and SHA256.fullmatch(digest) else None


def _hash_of(key: str, path: Path) -> str | None:
    """The hash of an input as the stages take it."""
    from diagnostics.models.identity import file_hash

    if key == "training":
        return files.hash_inside(path, "tables/validation_verdicts.csv")
    if key in ("student", "teacher", "after", "tokenizer"):
        return fingerprints.fingerprint_files(path)
    return file_hash(key, str(path)).get(f"{key}_sha256")


def _changed(different: Sequence[str]) -> DiagnosticsError:
    return DiagnosticsError(
        f"What the manifest was made from has changed ({'; '.join(dict.fromkeys(different))})."
        " Bring back the earlier files."
    )


def _require_same_pair(manifest: Mapping[str, Any]) -> None:
    """Refuse to spend hours on another named pair than the manifest's."""
    from diagnostics.models.config import PairConfig
    from diagnostics.models.identity import Models

    different = []
    for name, record in manifest["stages"].items():
        settings = record["settings"]
        if record.get("models") and settings.get("pair") is not None and name != "validate":
            now = Models(PairConfig(pair=settings["pair"])).fingerprint()
            different += [
                f"{key} of stage {name!r}: was {was}, is {now[key]}"
                for key, was in record["models"].items()
                if key in now and now[key] != was
            ]
    if different:
        raise _changed(different)


def _lay_in(manifest: dict[str, Any], source: Path, output_dir: Path) -> None:
    """Copy inputs that no stage wrote, from the folder of the manifest only."""
    written = {
        file
        for name, record in manifest["stages"].items()
        if name not in UNREPEATED
        for file in record["files"]
    } | set(manifest.get("joined", {}))
    wanted = {
        file: digest
        for name, record in manifest["stages"].items()
        if name not in UNREPEATED
        for file, digest in record["inputs"].items()
        if file not in written and not file.startswith(("cells/", "paper/cells/"))
    }
    content = {}
    for file, digest in wanted.items():
        if files.hash_inside(output_dir, file) if output_dir.is_dir() else None:
            continue
        if files.hash_inside(source, file) != digest:
            raise DiagnosticsError(
                f"{source / file}, which no stage of the run wrote, is missing or another (sha256"
                f" {digest} is asked for). Bring it back."
            )
        content[file] = files.read_inside(source, file)
    if not content:
        return
    with run_directory.open_run(output_dir) as run:
        tables.write_json(run.manifest_path, run.manifest)
        for file, read in content.items():
            files.write_atomic(run.path(file), read)


def _warn_of_differences(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of other versions, numbers of threads, and prompts that were rendered otherwise."""
    counts = [
        f"{stage} {record.get('threads')} then, {now['stages'].get(stage, {}).get('threads')} now"
        for stage, record in was["stages"].items()
        if stage not in UNREPEATED
        and record.get("threads") not in (None, now["stages"].get(stage, {}).get("threads"))
    ]
    if counts:
        log.warning(
            "other numbers of threads, which change the order of sums: %s", "; ".join(counts)
        )
    other = _other_versions(was, now)
    if other:
        log.warning("other versions: %s", "; ".join(other))
    _warn_of_other_prompts(was, now)


def _other_versions(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Libraries, and code of stages, that differ between two manifests."""
    other = [
        f"{name} {version} then, {now['versions'].get(name)} now"
        for name, version in was.get("versions", {}).items()
        if now["versions"].get(name) != version
    ]
    for stage, record in was["stages"].items():
        if stage in UNREPEATED:
            continue
        codes = [
            json.dumps(each.get("code", {}).get("version"))
            for each in (record, now["stages"].get(stage, {}))
        ]
        other += (
            [f"code of {stage} {codes[0]} then, {codes[1]} now"] if codes[0] != codes[1] else []
        )
    return other


def _warn_of_other_prompts(was: dict[str, Any], now: dict[str, Any]) -> None:
    for stage, record in was["stages"].items():
        hashes = [
            (each.get("facts") or {}).get("rendered_prompts_sha256")
            for each in (record, now["stages"].get(stage, {}))
        ]
        if None not in hashes and hashes[0] != hashes[1]:
            log.warning(
                "stage %s read other prompts: they were rendered otherwise then (sha256 %.12s, now"
                " %.12s), as by a chat template that writes the date. What follows from them"
                " differs",
                stage,
                *hashes,
            )


def compared(was: dict[str, Any], now: dict[str, Any]) -> pd.DataFrame:
    """Compare the files of two manifests, and warn of other versions, threads and prompts.

    Args:
        was: The earlier manifest.
        now: The manifest of the repetition.

    Returns:
        One row per file of the earlier manifest, with the columns of `rerun`.
    """
    _warn_of_differences(was, now)
    rows = []
    for stage, record in was["stages"].items():
        if stage in UNREPEATED:
            continue
        files = now["stages"].get(stage, {}).get("files", {})
        rows += [
            (stage, file, digest, files.get(file), files.get(file) == digest)
            for file, digest in record["files"].items()
        ]
    rows += [
        (
            "joined",
            file,
            digest,
            now.get("joined", {}).get(file),
            now.get("joined", {}).get(file) == digest,
        )
        for file, digest in was.get("joined", {}).items()
    ]
    return pd.DataFrame(rows, columns=["stage", "file", "was", "now", "same"]).astype(
        {"same": bool}
    )
