"""The run directory: a manifest, stages that are done once, writes that are whole or absent.

    DIR/manifest.json      versions, models, and per stage its settings, inputs and files' sha256
    DIR/contexts.parquet   DIR/tokens.parquet   DIR/tables/*.csv   DIR/figures/*   DIR/report.html

The *fingerprint* of a stage is its settings, the hashes of the files that it reads and of the
models' files, and the code: the package's version and one hash over the source of the modules that
decide the stage's numbers. When a stage is asked for again, it is kept if all of that agrees and
its files are intact, and done again if one of its files is damaged or missing. If the fingerprint
differs, it is refused with the difference shown, and nothing that was measured is overwritten. A
*derived* stage (tables, figures) is done again instead. Results of another version of the code are
kept on request.

A running stage keeps its finished parts in DIR/.partial, named by the fingerprint and by the hash
of their content. A stage that was killed continues from them; the folder is removed when the
stage's files are written. See docs/faults.md.

Nothing escapes the directory: what this program reads, writes or removes in it is reached through
`files`, which follows no link. A file that no record of the manifest names belongs to somebody else
and is never overwritten: a stage that begins writes down which files were there before it
(`begun`), and refuses to replace any of them. Settings name an input by its last name, and its hash
says which it was, so that a manifest tells nothing of the machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from diagnostics.core import distributed, files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version, threads, versions
from diagnostics.core.manifest import PATHS, hashes_of, read_manifest, recorded, without_home
from diagnostics.core.progress import SHARD, Shards
from diagnostics.core.run_lock import locked, refuse_unfit, remove_ours
from diagnostics.core.tables import write_json
from diagnostics.criteria import loaded_modules
from diagnostics.models.batch_size import BATCH_TOKENS

log = logging.getLogger("diagnostics")
TRAINED = (
    "train.json",
    "metrics.jsonl",
    "positions.jsonl",
    "timings.jsonl",
    "evaluations.csv",
    "evaluations.parquet",
    "training_gains.parquet",
)
"""Files of a training, which compares its settings with its own train.json."""
OF_CRITERIA = ("intervene", "analyze", "compare", "by-correctness", "train", "validate", "paper")
"""Stages whose numbers depend on what criteria there are."""
KEPT = re.compile(
    rf"{SHARD.pattern}|direction\.safetensors|step\.json|measured\.parquet|finished\.json"
)
PARTIAL = re.compile(r"(?P<stage>.+)-[0-9a-f]{16}")
"""Names of a kept batch, of all that a stage under way keeps (`directions`), and of its folder."""
NAME_LETTERS = 80
"""Letters of a model's name on pages."""


class Run:
    """An output directory and its manifest. Use `open_run`, which holds the directory's lock.

    accept_code: keep finished stages that another version of the code measured, with a warning.
    """

    def __init__(self, directory: str | Path, *, accept_code: bool = False):
        self.directory, self.accept_code = Path(directory), accept_code
        self.manifest_path = self.directory / "manifest.json"
        self.manifest: dict[str, Any] = self._read_manifest()
        self._partial: Path | None = None
        self._theirs: set[str] = set()
        self._say_other_versions()

    def _say_other_versions(self) -> None:
        now = versions()
        other = [
            f"{name} {was} then, {now[name]} now"
            for name, was in self.manifest.get("versions", {}).items()
            if now.get(name, was) != was
        ]
        if other:
            log.warning(
                "%s was begun with other versions (%s); equal settings may give other last digits",
                self.directory,
                ", ".join(other),
            )

    def _read_manifest(self) -> dict[str, Any]:
        found = files.kind(self.manifest_path)
        if found is None:
            return {"format": 1, "versions": versions(), "stages": {}}
        if found != "file":
            raise files.unfit(self.manifest_path, found, "file")
        return read_manifest(self.manifest_path)

    def path(self, name: str) -> Path:
        """Path of a file of this run."""
        return self.directory / name

    def stage(
        self,
        name: str,
        *,
        settings: dict[str, Any],
        inputs: Iterable[str] = (),
        outputs: Iterable[str] | Callable[[], Iterable[str]],
        work: Callable[[], Any],
        derived: bool = False,
        code: Sequence[str] = (),
        models: Callable[[], dict[str, str]] = dict,
    ) -> bool:
        """Do the work of a stage once, and record it in the manifest.

        Args:
            name: The name under which the manifest records it.
            settings: What decides its numbers, as JSON.
            inputs: Files of this directory that the work reads.
            outputs: Files of this directory that it writes, or a function that is called after
                the work and names them.
            work: Does the work, and may return facts for the manifest.
            derived: Whether another fingerprint means doing the work again rather than refusing.
            code: Modules that decide the stage's numbers.
            models: Gives the hash of each model's files.

        Returns:
            True if the work was done, False if an earlier, intact result was kept.

        Raises:
            DiagnosticsError: The directory holds this stage with another fingerprint and it is not
                *derived*; it holds anything of other models; an input is missing or damaged; or a
                file with the name of an output is in no record.
        """
        now = self._fingerprint(name, settings, inputs, code, models)
        self._require_same_models(name, now["models"])
        if self._keep(name, now, derived=derived):
            return False
        self._begin(name, outputs() if callable(outputs) else outputs)
        self._partial = (
            self.path(".partial")
            / f"{name}-{hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]}"
        )
        facts = work()
        distributed.barrier()
        written = outputs() if callable(outputs) else outputs
        made = {file: self._hash(file) for file in written}
        record = {
            **now,
            "threads": threads(models=bool(now["models"])),
            "files": made,
            **({"facts": without_home(facts)} if facts else {}),
        }
        self._say_what_differs(name, record)
        self.manifest["stages"][name] = record
        self._end(name)
        self._clear_partial(name)
        distributed.barrier()
        return True

    def _fingerprint(
        self,
        name: str,
        settings: dict[str, Any],
        inputs: Iterable[str],
        code: Sequence[str],
        models: Callable[[], dict[str, str]] = dict,
    ) -> dict[str, Any]:
        """All that a stage's result depends on, as the manifest records it."""
        now = {
            "settings": recorded(settings),
            "inputs": {file: self.input_hash(name, file) for file in inputs},
            "models": models(),
            "code": {"version": _version(name, code)} if code else {},
        }
        return json.loads(json.dumps(now))

    def has(
        self,
        name: str,
        *,
        settings: dict[str, Any],
        inputs: Iterable[str],
        code: Sequence[str],
    ) -> bool:
        """Whether a derived stage without models would be kept, were it asked for now."""
        earlier = self.manifest["stages"].get(name)
        if earlier is None:
            return False
        now = self._fingerprint(name, settings, inputs, code)
        parts = ("settings", "inputs", "code")
        return not _differences(earlier, now, parts=parts) and self._intact(earlier["files"])

    def register(self, choices: Mapping[str, Any], digest: str, *, stage: str) -> None:
        """Record what will be concluded from, before a stage has measured anything.

        Where the stage is finished without such a record, nothing is written: choices that were
        made after the measurement are no registration.

        Args:
            choices: The primary choices, as JSON.
            digest: Their hash.
            stage: The stage that measures.

        Raises:
            DiagnosticsError: Other choices were recorded before.
        """
        known = self.manifest.get("primary")
        if known is not None and known.get("sha256") != digest:
            was = known.get("choices", {})
            different = [
                f"{name}: was {was.get(name)!r}, now {value!r}"
                for name, value in choices.items()
                if was.get(name) != value
            ]
            raise DiagnosticsError(
                f"{self.directory} was begun with other primary choices"
                f" ({'; '.join(different) or 'of another version'}). Nothing was overwritten. Keep"
                " them, or choose another --output-dir."
            )
        if known is not None or stage in self.manifest["stages"]:
            return
        self.manifest["primary"] = {
            "choices": dict(choices),
            "sha256": digest,
            "registered_at": stage,
        }
        if distributed.is_main():
            write_json(self.manifest_path, self.manifest)

    def name_models(self, **names: str | None) -> None:
        """Keep what pages call the models by role; None leaves a name as it was.

        Raises:
            DiagnosticsError: A name is empty, too long, or not one printable line.
        """
        for role, name in names.items():
            if name is not None and not (
                name.strip().isprintable() and 0 < len(name.strip()) <= NAME_LETTERS
            ):
                raise DiagnosticsError(
                    f"A name is one line of at most {NAME_LETTERS} letters; got {name!r} for the"
                    f" {role}."
                )
        given = {role: name.strip() for role, name in names.items() if name is not None}
        known = self.manifest.get("names", {})
        if known | given != known:
            self.manifest["names"] = known | given
            write_json(self.manifest_path, self.manifest)

    def shards(self, name: str) -> Shards:
        """Where the running stage keeps the finished parts of the pass of that name."""
        return Shards(self._partial and self._partial / name)

    def _begin(self, name: str, outputs: Iterable[str]) -> None:
        """Record which files were there before the stage, since those are not ours to replace."""
        if not distributed.is_main():
            return
        begun = self.manifest.get("begun", {})
        theirs = begun[name] if name in begun else self._unrecorded()
        self._theirs = {file for file in theirs if files.kind(self.path(file))}
        for file in outputs:
            self._require_ours(file)
        self.manifest["begun"] = begun | {name: sorted(self._theirs)}
        write_json(self.manifest_path, self.manifest)

    def _end(self, name: str) -> None:
        self._theirs = set()
        begun = self.manifest.get("begun", {})
        begun.pop(name, None)
        if not begun:
            self.manifest.pop("begun", None)
        write_json(self.manifest_path, self.manifest)

    def _unrecorded(self) -> set[str]:
        """Files that no stage wrote, finished or interrupted: they belong to somebody else.

        The files of an interrupted stage are in no record either, but were not there when it began.
        """
        found = {
            entry.name
            for entry in os.scandir(self.directory)
            if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)
        }
        found |= {
            name
            for folder in ("tables", "student")
            for name, kind in files.walk(self.directory, folder)
            if kind != "folder"
        }
        earlier = [set(names) for stage, names in self.manifest.get("begun", {}).items()]
        if (
            files.kind(self.path("train.json")) == "file"
            and files.kind(self.path("checkpoints")) == "folder"
        ):
            found -= {
                name for name in found if name in TRAINED or name.startswith("student/")
            }  # train.json says whose they are
        return {
            name
            for name in found
            if name != "manifest.json"
            and not self._known(name)
            and all(name in names for names in earlier)
        }

    def _require_ours(self, name: str) -> None:
        if name in self._theirs:
            raise DiagnosticsError(
                f"{self.path(name)} is there, and manifest.json has no record of it, so it is not"
                " this program's to replace. Nothing was overwritten. Move it away, or choose"
                " another --output-dir."
            )

    def _say_what_differs(self, name: str, record: dict) -> None:
        """Warn when a stage was made again with equal settings and other bytes came out."""
        earlier = self.manifest["stages"].get(name)
        if earlier is None or _differences(
            earlier, record, parts=("settings", "inputs", "models", "code")
        ):
            return
        other = [
            file
            for file, digest in earlier["files"].items()
            if record["files"].get(file, digest) != digest
        ]
        was, now = earlier.get("threads"), record["threads"]
        if other and was not in (None, now):
            log.warning(
                "%s: %s came out with other bytes than before; threads were %s and are %s, which"
                " changes the order of sums and their last digits. Set OMP_NUM_THREADS=%s for the"
                " earlier bytes",
                name,
                ", ".join(other),
                was,
                now,
                was,
            )
        elif other:
            log.warning(
                "%s: %s came out with other bytes than before, on as many threads",
                name,
                ", ".join(other),
            )

    def _clear_partial(self, stage: str) -> None:
        """Remove the finished parts of a stage from `.partial`, and nothing else."""
        self._partial = None
        if not distributed.is_main():
            return
        for name, kind in files.walk(self.directory, ".partial"):
            found = PARTIAL.fullmatch(name.split("/")[1])
            if found and found["stage"] == stage:
                remove_ours(self.directory, name, kind, KEPT)
        files.remove_folder(self.directory, ".partial")

    @contextmanager
    def joining(self, name: str) -> Iterator[None]:
        """Surround the writing of a file that no single stage writes.

        Its hash is recorded at the end, so that damage to it is seen.
        """
        if not self._known(name):
            self._begin(name, [name])
        yield
        distributed.barrier()
        joined, digest = self.manifest.setdefault("joined", {}), self._hash(name)
        if joined.get(name) != digest or name in self.manifest.get("begun", {}):
            joined[name] = digest
            self._end(name)

    def wrote(self, stage: str, name: str) -> bool:
        """True for a file that this stage wrote: no other one's record has it, and it was not there
        when the stage began.
        """
        others = [record for each, record in self.manifest["stages"].items() if each != stage]
        begun = self.manifest.get("begun", {}).get(stage)
        mine = name in self.manifest["stages"].get(stage, {}).get("files", {})
        new = begun is not None and name not in begun
        return (mine or new) and not any(name in record["files"] for record in others)

    def record_file(self, name: str) -> None:
        """Record the hash of a file that was already written, as `joining` does."""
        distributed.barrier()
        self.manifest.setdefault("joined", {})[name] = self._hash(name)
        write_json(self.manifest_path, self.manifest)

    def _hash(self, name: str) -> str:
        digest = files.hash_inside(self.directory, name)
        if digest is None:
            raise DiagnosticsError(
                f"{self.path(name)} is not there. Run the stage that writes it first."
            )
        return digest

    def require(self, name: str) -> Path:
        """Return the path of a file of this run.

        Raises:
            DiagnosticsError: The file is missing, or is not as it was written.
        """
        if self._hash(name) not in (self._known(name) or [self._hash(name)]):
            raise DiagnosticsError(
                f"{self.path(name)} is not as it was written. Run the stage that writes it again."
            )
        return self.path(name)

    def input_hash(self, stage: str, file: str) -> str:
        """Hash of a file that a stage reads.

        Raises:
            DiagnosticsError: The file is missing, or is not as it was written.
        """
        digest, known = files.hash_inside(self.directory, file), self._known(file)
        if digest is None:
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not there. Run the stage that"
                " writes it first."
            )
        if known and digest not in known:
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not as it was written: its"
                f" sha256 is {digest[:16]}…, and manifest.json has {known[-1][:16]}…. Run the stage"
                " that writes it again."
            )
        return digest

    def _known(self, file: str) -> list[str]:
        """Hashes that the manifest has of a file."""
        return hashes_of(self.manifest, file)

    def as_written(self, file: str) -> bool:
        """Whether a file is intact.

        A damaged one is warned of: nobody should read it until its stage has made it again.
        """
        known = self._known(file)
        whole = not known or self._hash(file) in known
        if not whole:
            log.warning(
                "%s is not as it was written and left out until its stage has been run again",
                self.path(file),
            )
        return whole

    def _require_same_models(self, stage: str, models: dict[str, str]) -> None:
        for name, record in self.manifest["stages"].items():
            if name != stage:
                self._refuse(
                    name,
                    _differences(
                        {"models": record.get("models", {})}, {"models": models}, shared=True
                    ),
                )

    def _keep(self, name: str, now: dict, *, derived: bool) -> bool:
        """Whether the earlier result of this stage is kept.

        Raises:
            DiagnosticsError: The earlier result has another fingerprint and is not derived.
        """
        earlier = self.manifest["stages"].get(name)
        if earlier is None:
            return False
        different, code = _differences(earlier, now), _differences(earlier, now, parts=("code",))
        if not derived:
            self._refuse(
                name, different or ([] if self.accept_code else code), only_code=not different
            )
        # A table of an input that was not there then would lack what it says.
        more = derived and set(now["inputs"]) > set(earlier.get("inputs", {}))
        if different or more or (code and derived) or not self._intact(earlier["files"]):
            self._say_replaced(name, earlier["settings"], now["settings"])
            return False
        if code:
            log.warning(
                "%s: kept, though another version of this program measured it (%s)",
                name,
                "; ".join(code),
            )
        else:
            log.info("%s: kept from the earlier run", name)
        return True

    def _say_replaced(self, name: str, was: dict[str, Any], now: dict[str, Any]) -> None:
        """Warn before tables of other settings are replaced; lists that only grew lose nothing."""
        shrunk = {key: value for key, value in was.items() if not _grown(value, now.get(key))}
        different = _differences({"settings": shrunk}, {"settings": now}, parts=("settings",))
        if different:
            log.warning(
                "%s: its tables are made again with other settings (%s), and replace the earlier"
                " ones",
                name,
                "; ".join(different),
            )

    def _intact(self, recorded: dict[str, str]) -> bool:
        return all(
            files.hash_inside(self.directory, file) == digest for file, digest in recorded.items()
        )

    def _refuse(self, name: str, differences: list[str], *, only_code: bool = False) -> None:
        if not differences:
            return
        whose, instead = "another configuration", "or the earlier settings."
        if only_code:
            whose, instead = (
                "another version of this program",
                "that version, or --accept-code to keep what it measured.",
            )
        raise DiagnosticsError(
            f"{self.directory} holds stage {name!r} of {whose} ({'; '.join(differences)}). "
            f"Nothing was overwritten. Choose another --output-dir, {instead}"
        )


def _version(stage: str, code: Sequence[str]) -> str:
    """The version of the code that decides a stage, with that of the user's own criteria."""
    own = loaded_modules() if stage in OF_CRITERIA else ""
    return code_version(*code) + (f" with {own}" if own else "")


def _differences(
    earlier: dict,
    now: dict,
    *,
    parts: Sequence[str] = ("settings", "inputs", "models"),
    shared: bool = False,
) -> list[str]:
    """Say what differs between two fingerprints; keys that an older record lacks are left out."""
    return [
        f"{part.removesuffix('s')} {key}: was {was!r}, now {now[part].get(key)!r}"
        for part in parts
        for key, was in sorted(earlier.get(part, {}).items())
        if not _same(key, was, now.get(part, {}).get(key))
        and (key in now.get(part, {}) or not shared)
    ]


def _grown(was: Any, now: Any) -> bool:
    """Whether a list holds all that it held, and more."""
    return isinstance(was, list) and isinstance(now, list) and all(each in now for each in was)


def _same(key: str, was: Any, now: Any) -> bool:
    """Whether a setting is the same.

    Older records have the whole path of an input, and newer ones its last name, so the two are
    compared by their last names. They also name the size of a batch where newer ones choose it.
    """
    if key == "batch_tokens" and None in (was, now):
        return {was, now} <= {None, BATCH_TOKENS}
    return was == now or (
        key in PATHS
        and isinstance(was, str)
        and isinstance(now, str)
        and "/" in was
        and PurePath(was).name == now
    )


@contextmanager
def open_run(directory: str | Path, *, accept_code: bool = False):
    """Open or create a run directory, and hold its lock while the block runs.

    Files that a killed process had begun to write are removed.

    Args:
        directory: The run directory.
        accept_code: Keep finished stages that another version of the code measured.

    Raises:
        DiagnosticsError: The path is a file or cannot be written, holds files of another program,
            holds links or pipes in place of this program's files, or is in use by another process.
    """
    directory = Path(directory)
    if not distributed.is_main():
        with files.guard(directory):
            yield Run(directory, accept_code=accept_code)
        return
    with locked(directory):
        run = Run(directory, accept_code=accept_code)
        refuse_unfit(
            directory,
            [name for record in run.manifest["stages"].values() for name in record["files"]],
        )
        with files.guard(directory, run._require_ours):
            yield run
