"""The pair of a command, loaded when a stage first needs it, and what names it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import fingerprint_files

WHERE = (
    "device",
    "teacher_device",
    "offload_teacher",
    "shard_teacher",
    "shard_student",
    "step_state",
)


class Models:
    """The pair of a command, loaded when a stage first needs it, and its identity.

    Args:
        config: A `PairConfig`.
        alone: Whether a student without a teacher is enough, as for sampling responses.
    """

    def __init__(self, config, *, alone: bool = False):
        self.config, self.alone = config, alone

    @cached_property
    def pair(self):
        """The loaded pair."""
        from diagnostics.models.pair import load_pair

        return load_pair(**dataclasses.asdict(self.config), alone=self.alone)

    @cached_property
    def tokenizer(self):
        """The student's tokenizer, without its model.

        Raises:
            DiagnosticsError: No student is named, or it has no tokenizer.
        """
        from diagnostics.models.loading import load_tokenizer
        from diagnostics.models.named_pairs import named_pair

        student, revision = self.config.student, self.config.student_revision
        if self.config.pair is not None:
            student, revision = named_pair(self.config.pair).folders()[0], None
        if student is None:
            raise DiagnosticsError(
                "The student's tokenizer is needed, and no student was named. Give --student or"
                " --pair."
            )
        return load_tokenizer(student, revision)

    @property
    def settings(self) -> dict:
        """Settings that name the pair; devices are left out."""
        named = {
            key: value for key, value in dataclasses.asdict(self.config).items() if key not in WHERE
        }
        return named | file_hash("teacher_logprobs", self.config.teacher_logprobs)

    @property
    def writer_settings(self) -> dict:
        """The same without a top-K teacher's file, which is made from the student's responses."""
        return {
            key: value
            for key, value in self.settings.items()
            if not key.startswith("teacher_logprobs")
        }

    def fingerprint(self) -> dict[str, str]:
        """Identity of each model: a hash over local files, or the commit of a Hugging Face id."""
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        from diagnostics.models.loading import base_folder
        from diagnostics.models.named_pairs import named_pair

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
    """Hash of a prompt file or of a local data set, for the settings of the stage that reads it.

    Args:
        name: Name of the setting; the entry is called `<name>_sha256`.
        path: The file or folder, with or without `hf:` before it.

    Returns:
        One entry, or none where there is no such file or folder.
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
