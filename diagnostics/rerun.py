"""Repeat a run from its manifest, and compare every file that it made.

A manifest's settings become the commands that gave them, one a stage, in the order of the stages. Before anything is run
the models and the prompt files are compared with what the manifest says of them; other code or other versions of
libraries are named and do not stop the repetition, since they may be what it is for.

What no stage wrote (contexts from elsewhere, laid into the directory by hand) is taken from beside the manifest, and must
have the hash that the manifest gives. Paths in a manifest are those that were typed: run from the same folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics import runs
from diagnostics.types import DiagnosticsError

log = logging.getLogger("diagnostics")
ORDER = ("rollout", "score", "import", "probe", "after", "attribute", "intervene", "analyze", "compare", "train", "validate")
COMMANDS = {"import": "analyze", "after": "score"}
"""Stages whose command has another name."""
Configs = Callable[[str], Sequence[type]]
"""A command's dataclasses."""


def rerun(path: Path, output_dir: Path, *, configs: Configs, do: Callable[[list[str]], None]) -> pd.DataFrame:
    """Repeat the run of the manifest at `path` in `output_dir` and compare the files.

    do: runs one command, given its arguments. Returns columns stage, file, was and now (sha256; None where the file is not
    there), same. Raises DiagnosticsError where the manifest cannot be read or repeated, or models or prompts are others.
    """
    manifest = runs.read_manifest(path)
    if not manifest["stages"]:
        raise DiagnosticsError(f"{path} has no finished stage, so there is nothing to repeat. Name the manifest of a finished run.")
    if output_dir.resolve() == path.parent.resolve():
        raise DiagnosticsError(f"{output_dir} is the run itself. Choose a new --output-dir to repeat it in.")
    planned = list(commands(manifest, configs, beside=path.parent))
    _require_same_sources(manifest, configs)
    _lay_in(manifest, path.parent, output_dir)
    for command in planned:
        log.info("%s", " ".join(command))
        do([*command, "--output-dir", str(output_dir), "--quiet"])
    return compared(manifest, runs.read_manifest(output_dir / "manifest.json"))


def commands(manifest: dict[str, Any], configs: Configs, *, beside: Path) -> Iterator[list[str]]:
    """The arguments that gave each of the manifest's stages, without an output directory; beside: where imported files are looked for.

    Raises DiagnosticsError for a stage that no command gives, or a setting whose value the manifest does not hold.
    """
    stages = manifest["stages"]
    unknown = sorted(stages.keys() - set(ORDER))
    if unknown:
        raise DiagnosticsError(f"The manifest has the stage {unknown[0]!r}, which this version cannot repeat. Known are {', '.join(ORDER)}.")
    for name in (name for name in ORDER if name in stages):
        settings, command = stages[name]["settings"], COMMANDS.get(name, name)
        arguments = [command]
        for field in _fields(configs(command)):
            arguments += _flag(field.name, settings[field.name]) if field.name in settings else []
        if name in ("analyze", "compare"):
            arguments += ["--seed", str(settings["seed"])]
        if name == "after":
            arguments += ["--after", settings["after"]]
        for flag in {"validate": ["offline"], "analyze": ["training", "k"]}.get(name, []):
            arguments += _flag(flag, settings.get(flag))
        if name == "import":
            arguments += ["--tokens", str(beside / settings["tokens"])]
        yield arguments


def _fields(configs: Sequence[type]) -> list[dataclasses.Field]:
    return list({field.name: field for config in configs for field in dataclasses.fields(config)}.values())


def _flag(name: str, value) -> list[str]:
    """A setting as it was typed; nothing for one that was left out."""
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _require_same_sources(manifest: dict[str, Any], configs: Configs) -> None:
    """Refuse to spend hours on other models or prompts than the manifest's."""
    from diagnostics.pairs import PairConfig
    from diagnostics.stages import Models, table_path

    different = []
    for name, record in manifest["stages"].items():
        settings = record["settings"]
        if record.get("models") and name != "validate":
            pair = PairConfig(**{field.name: settings[field.name] for field in dataclasses.fields(PairConfig) if field.name in settings})
            now = Models(pair).fingerprint()
            different += [f"{key} of stage {name!r}: was {was}, is {now[key]}" for key, was in record["models"].items() if key in now and now[key] != was]
        for key in ("prompts", "eval_prompts", "rollouts", "teacher_logprobs", "training"):
            was, file = settings.get(f"{key}_sha256"), Path(settings.get(key) or ".")
            file = table_path(str(file), "validation_verdicts", what="validation") if was and key == "training" else file
            if was and file.is_file() and (now_sha := runs.sha256_file(file)) != was:
                different.append(f"{file}: sha256 was {was}, is {now_sha}")
    if different:
        raise DiagnosticsError(f"What the manifest was made from has changed ({'; '.join(dict.fromkeys(different))}). Bring back the earlier files.")


def _lay_in(manifest: dict[str, Any], source: Path, output_dir: Path) -> None:
    """Copy inputs that no stage wrote."""
    written = {file for record in manifest["stages"].values() for file in record["files"]} | set(manifest.get("joined", {}))
    for record in manifest["stages"].values():
        for file, digest in record["inputs"].items():
            if file in written or file.startswith("cells/") or (output_dir / file).exists():
                continue
            if not (source / file).is_file() or runs.sha256_file(source / file) != digest:
                raise DiagnosticsError(f"{source / file}, which no stage of the run wrote, is missing or another (sha256 {digest} is asked for). Bring it back.")
            output_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, output_dir / file)


def compared(was: dict[str, Any], now: dict[str, Any]) -> pd.DataFrame:
    """Every file of the earlier manifest beside the later one's; columns as of `rerun`. Says which versions are others."""
    other = [f"{name} {version} then, {now['versions'].get(name)} now"
             for name, version in was.get("versions", {}).items() if now["versions"].get(name) != version]
    for stage, record in was["stages"].items():
        codes = [json.dumps(each.get("code", {}).get("version")) for each in (record, now["stages"].get(stage, {}))]
        other += [f"code of {stage} {codes[0]} then, {codes[1]} now"] if codes[0] != codes[1] else []
    if other:
        log.warning("other versions: %s", "; ".join(other))
    rows = []
    for stage, record in was["stages"].items():
        files = now["stages"].get(stage, {}).get("files", {})
        rows += [(stage, file, digest, files.get(file), files.get(file) == digest) for file, digest in record["files"].items()]
    rows += [("joined", file, digest, now.get("joined", {}).get(file), now.get("joined", {}).get(file) == digest) for file, digest in was.get("joined", {}).items()]
    return pd.DataFrame(rows, columns=["stage", "file", "was", "now", "same"]).astype({"same": bool})
