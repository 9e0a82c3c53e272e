"""The pair of a command, loaded when a stage first needs it, and what names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import fingerprint_files

WHERE = ("device", "teacher_device", "offload_teacher", "shard_teacher")


class Models:
    """The pair of a command, loaded when a stage first needs it, and its identity for the
    manifest.
    """

    def __init__(self, config, *, alone: bool = False):
        self.config, self.alone = config, alone
        """alone: a student without a teacher will do, for writing."""

    @cached_property
    def pair(self):
        """The loaded pair."""
        from diagnostics.models.pair import load_pair

        return load_pair(**dataclasses.asdict(self.config), alone=self.alone)

    @property
    def settings(self) -> dict:
        """What names the pair; where it runs is left out."""
        named = {
            key: value for key, value in dataclasses.asdict(self.config).items() if key not in WHERE
        }
        return named | file_hash("teacher_logprobs", self.config.teacher_logprobs)

    @property
    def writer_settings(self) -> dict:
        """The same without a remote teacher's file, which is made from what the student wrote."""
        return {
            key: value
            for key, value in self.settings.items()
            if not key.startswith("teacher_logprobs")
        }

    def fingerprint(self) -> dict[str, str]:
        """What each model is made of: a hash over its local files, or the commit of a Hugging Face
        id.
        """
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        from diagnostics.models.loading import base_folder
        from diagnostics.models.pair import named_pair

        settings = self.settings
        if settings["pair"] is not None:
            named = named_pair(settings["pair"])
            if named.made_of:
                return dict(named.made_of)
            settings |= dict(zip(("student", "teacher"), map(str, named.folders())))
        local = {
            name: Path(value)
            for name, value in settings.items()
            if name not in ("pair", "dtype", "teacher_dtype")
            and isinstance(value, str)
            and value
            and Path(value).exists()
        }
        local |= {
            f"{name}_base": base
            for name, path in list(local.items())
            if (base := base_folder(path)) is not None
        }
        remote = [
            name for name in ("student", "teacher") if settings[name] and name not in local
        ]  # their commit is known once loaded
        commits = {name: self.pair.facts.get(name, {}).get("revision") for name in remote}
        return {name: fingerprint_files(path) for name, path in local.items()} | {
            name: commit for name, commit in commits.items() if commit
        }


def file_hash(name: str, path: str | None) -> dict[str, str]:
    """The hash of a file of prompts, or of a local data set's files, for the settings of the stage
    that reads it.
    """
    place = Path((path or "").removeprefix("hf:"))
    if path and os.path.isdir(place):
        files = [
            (str(file.relative_to(place)), sha256_file(file))
            for file in sorted(place.rglob("*"))
            if file.is_file()
        ]
        return {f"{name}_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    return {f"{name}_sha256": sha256_file(place)} if path and os.path.isfile(place) else {}
