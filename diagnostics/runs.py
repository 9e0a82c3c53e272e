"""The run directory: a manifest, stages that are done once, writes that are whole or absent.

    DIR/manifest.json      versions, models, and for each stage its settings, inputs and files with sha256
    DIR/contexts.parquet   DIR/tokens.parquet   DIR/tables/*.csv   DIR/figures/*   DIR/report.html

A stage's *fingerprint* is its settings, the hashes of the files it reads and of the models' files, and the code: the
package's version and one hash over the source of the modules that decide the stage's numbers. Asked for again, a stage
is kept where all of that agrees and its files are intact, done again where a file of its own is damaged or missing, and
refused, with the difference shown, where the fingerprint is another: nothing that was measured is overwritten. A
*derived* stage (tables, figures) is done again instead. What another version of the code measured can be kept on request.

A stage under way keeps its finished parts in DIR/.partial, named by the fingerprint and by the hash of their content. Killed
and started again, it goes on from there; the folder goes when the stage's files are written. See docs/faults.md.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics import parallel
from diagnostics.types import DiagnosticsError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
PACKAGE = Path(__file__).resolve().parent
PLUMBING = ("runs", "config", "stages", "cli")
"""Modules that decide where and when, never a number."""
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
"""What a model's folder is fingerprinted by: weights, configuration, tokenizer, chat template."""
SHARD_SECONDS = 10.0
"""Least work between two writes to DIR/.partial: with a write of some milliseconds, under a thousandth of the time."""
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "numpy", "pandas", "scipy", "statsmodels", "matplotlib", "pyarrow")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of several processes only the first writes. Raises DiagnosticsError where the disk is full or read-only.
    """
    path = Path(path)
    if parallel.is_main():
        try:
            _write_atomic(path, content)
        except OSError as error:
            raise DiagnosticsError(
                f"{path} cannot be written ({error.strerror or error}). Nothing finished was lost. "
                "Make room or choose another --output-dir, and give the same command again."
            ) from error
    return path


def _write_atomic(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename is durable only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_parquet(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table as parquet, atomically; equal tables give equal bytes."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return write_atomic(path, buffer.getvalue())


def write_csv(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table as CSV, atomically, with shortest round-trip floats."""
    return write_atomic(path, frame.to_csv(index=False).encode())


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, atomically, keys in the order given."""
    return write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether progress stays hidden even on a terminal."""
    global _quiet
    _quiet = quiet


def progress(iterable: Iterable | None = None, *, total: int, description: str, unit: str = " positions"):
    """A tqdm bar with rate and time left; there is none where the output is no terminal, as in a log, or after `set_quiet`."""
    from tqdm import tqdm

    hidden = None if parallel.is_main() and not _quiet else True
    return tqdm(iterable, total=total, desc=description, unit=unit, disable=hidden, leave=False, dynamic_ncols=True)


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that decide numbers."""
    from diagnostics import __version__

    found = {"python": platform.python_version(), "opd-diagnostics": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_version(*modules: str) -> str:
    """The package's version and a hash over the source of `modules` and of all that they import from this package."""
    from diagnostics import __version__

    digest = hashlib.sha256()
    for name in sorted(_imported(modules) - set(PLUMBING)):
        digest.update(name.encode() + b"\0" + (PACKAGE / f"{name}.py").read_bytes())
    return f"{__version__} {digest.hexdigest()[:16]}"


def _imported(modules: Iterable[str]) -> set[str]:
    """Modules of this package that are reached from `modules`, themselves included."""
    found, todo = set(), list(modules)
    while todo:
        name = todo.pop()
        if name in found or not (PACKAGE / f"{name}.py").exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
                todo.append(node.module.split(".")[1])
    return found


def fingerprint_files(source: Path) -> str:
    """One hash over a model's file, or over the names and contents of the files in its folder that decide what it says."""
    if source.is_file():
        return sha256_file(source)
    digest = hashlib.sha256()
    for path in sorted(path for path in source.iterdir() if path.suffix in MODEL_FILES and path.is_file()):
        digest.update(path.name.encode() + b"\0" + sha256_file(path).encode())
    return digest.hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as this module writes it. Raises DiagnosticsError for a file that is missing, damaged or something else."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_manifest(path, getattr(error, "strerror", None) or str(error)) from error
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict):
        raise _no_manifest(path, "no stages")
    for name, record in stages.items():
        parts = {"models": {}, "code": {}} | record if isinstance(record, dict) else {}
        if not all(isinstance(parts.get(part), dict) for part in ("settings", "inputs", "files", "models", "code")):
            raise _no_manifest(path, f"stage {name!r} has no settings, inputs and files")
    if not all(isinstance(manifest.get(part, {}), dict) for part in ("versions", "joined")):
        raise _no_manifest(path, "versions are no object")
    named = [file for record in stages.values() for part in ("inputs", "files") for file in record[part]] + list(manifest.get("joined", {}))
    outside = next((file for file in named if Path(file).is_absolute() or ".." in Path(file).parts), None)
    if outside is not None:
        raise _no_manifest(path, f"it names a file outside its directory, {outside!r}")
    return manifest


def _no_manifest(path: Path, reason: str) -> DiagnosticsError:
    return DiagnosticsError(f"{path} is not a manifest of this project ({reason}). Choose another --output-dir, or remove that file.")


class Shards:
    """Results of a pass over batches, kept as they come; without a folder nothing is kept.

    A shard is a parquet file with a column `row` and one column a measurement. Its name ends in the hash of its content, so
    that a damaged one is known and left out. Every process keeps its own and reads all.
    """

    def __init__(self, folder: Path | None = None):
        import pandas as pd

        self.folder, self._pending, self._since = folder, [], time.monotonic()
        whole = list(self._whole())
        found = pd.concat(whole, ignore_index=True).drop_duplicates("row").set_index("row") if whole else pd.DataFrame()
        self._found: pd.DataFrame = found
        if whole:
            log.info("%s: %d rows of an interrupted run are taken up", folder, len(found))

    def _whole(self) -> Iterator[pd.DataFrame]:
        import pandas as pd

        for path in sorted(self.folder.glob("*.parquet")) if self.folder and self.folder.is_dir() else ():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
                yield pd.read_parquet(io.BytesIO(content))
            else:
                log.warning("%s is damaged and left out", path)

    def take(self, rows: Sequence[int]) -> pd.DataFrame | None:
        """What was measured at these rows earlier, in their order; None where any is missing."""
        places = self._found.index.get_indexer(rows)
        return None if (places < 0).any() or not len(places) else self._found.iloc[places]

    def add(self, rows: Sequence[int], columns: dict[str, Sequence]) -> None:
        """Keep the measurements of these rows: on disk a few seconds later."""
        if self.folder is not None:
            self._pending.append((rows, columns))
            if time.monotonic() - self._since >= SHARD_SECONDS:
                self._write()

    def _write(self) -> None:
        import pandas as pd

        frame = pd.concat([pd.DataFrame({"row": rows, **columns}) for rows, columns in self._pending], ignore_index=True)
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        name = f"{parallel.rank()}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.parquet"
        try:
            _write_atomic(self.folder / name, buffer.getvalue())
        except OSError as error:  # a luxury: the stage itself may still end well
            log.warning("%s cannot be written (%s): a killed run would do this part again", self.folder / name, error.strerror)
        self._pending, self._since = [], time.monotonic()


def no_shards(name: str) -> Shards:
    """Shards of a pass that keeps nothing on disk; what a pass has where there is no run directory."""
    return Shards()


class Run:
    """An output directory and its manifest. Use `open_run`, which holds the directory's lock.

    accept_code: keep finished stages that another version of the code measured, with a warning.
    """

    def __init__(self, directory: str | Path, *, accept_code: bool = False):
        self.directory, self.accept_code = Path(directory), accept_code
        self.manifest_path = self.directory / "manifest.json"
        self.manifest: dict[str, Any] = self._read_manifest()
        self._partial: Path | None = None
        self._say_other_versions()

    def _say_other_versions(self) -> None:
        now = versions()
        other = [f"{name} {was} then, {now[name]} now" for name, was in self.manifest.get("versions", {}).items() if now.get(name, was) != was]
        if other:
            log.warning("%s was begun with other versions (%s); equal settings may give other last digits", self.directory, ", ".join(other))

    def _read_manifest(self) -> dict[str, Any]:
        if not self.manifest_path.exists():
            return {"format": 1, "versions": versions(), "stages": {}}
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
        """Do `work()` once. It writes `outputs`, reads `inputs` and may return facts for the manifest.

        `outputs` may be a function, called after the work. code: modules that decide the stage's numbers. models: gives
        the hash of each model's files. Returns True where the work was done, False where an earlier, intact result
        was kept. Raises DiagnosticsError where the directory holds this stage with another fingerprint, a *derived* stage
        excepted, where it holds anything of other models, or where an input is missing or damaged.
        """
        inputs = {file: self._input_hash(name, file) for file in inputs}
        now = {"settings": settings, "inputs": inputs, "models": models(), "code": {"version": code_version(*code)} if code else {}}
        now = json.loads(json.dumps(now))
        self._require_same_models(name, now["models"])
        if self._keep(name, now, derived=derived):
            return False
        if not self.manifest["stages"]:
            write_json(self.manifest_path, self.manifest)  # a directory with our files in it is ours from the first on
        self._partial = self.path(".partial") / f"{name}-{hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]}"
        facts = work()
        parallel.barrier()
        written = outputs() if callable(outputs) else outputs
        files = {file: sha256_file(self.path(file)) for file in written}
        self.manifest["stages"][name] = {**now, "files": files, **({"facts": facts} if facts else {})}
        write_json(self.manifest_path, self.manifest)
        self._clear_partial(name)
        parallel.barrier()
        return True

    def shards(self, name: str) -> Shards:
        """Where the stage under way keeps the finished parts of the pass of that name."""
        return Shards(self._partial and self._partial / name)

    def _clear_partial(self, stage: str) -> None:
        self._partial = None
        if parallel.is_main():
            for folder in self.path(".partial").glob(f"{stage}-*"):
                shutil.rmtree(folder, ignore_errors=True)
            if self.path(".partial").is_dir() and not any(self.path(".partial").iterdir()):
                self.path(".partial").rmdir()

    def record_file(self, name: str) -> None:
        """Keep the hash of a file that no single stage writes, so that damage to it is seen."""
        parallel.barrier()
        files, digest = self.manifest.setdefault("joined", {}), sha256_file(self.path(name))
        if files.get(name) != digest:
            files[name] = digest
            write_json(self.manifest_path, self.manifest)

    def _input_hash(self, stage: str, file: str) -> str:
        if not self.path(file).is_file():
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not there. Run the stage that writes it first."
            )
        digest, known = sha256_file(self.path(file)), self._known(file)
        if known and digest not in known:
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not as it was written: its sha256 is {digest[:16]}…, and "
                f"manifest.json has {known[-1][:16]}…. Run the stage that writes it again."
            )
        return digest

    def _known(self, file: str) -> list[str]:
        """Hashes that the manifest has of a file."""
        known = [record["files"][file] for record in self.manifest["stages"].values() if file in record["files"]]
        return known + [digest for name, digest in self.manifest.get("joined", {}).items() if name == file]

    def as_written(self, file: str) -> bool:
        """False, with a warning, for a file that is damaged: its stage will make it again, and nobody should read it until then."""
        known = self._known(file)
        whole = not known or sha256_file(self.path(file)) in known
        if not whole:
            log.warning("%s is not as it was written and left out until its stage has been run again", self.path(file))
        return whole

    def _require_same_models(self, stage: str, models: dict[str, str]) -> None:
        for name, record in self.manifest["stages"].items():
            if name != stage:
                self._refuse(name, _differences({"models": record.get("models", {})}, {"models": models}, shared=True))

    def _keep(self, name: str, now: dict, *, derived: bool) -> bool:
        """True where the earlier result of this stage stands. Raises DiagnosticsError where it is another one's."""
        earlier = self.manifest["stages"].get(name)
        if earlier is None:
            return False
        different, code = _differences(earlier, now), _differences(earlier, now, parts=("code",))
        if not derived:
            self._refuse(name, different or ([] if self.accept_code else code), only_code=not different)
        if different or (code and derived) or not self._intact(earlier["files"]):
            return False
        if code:
            log.warning("%s: kept, though another version of this program measured it (%s)", name, "; ".join(code))
        else:
            log.info("%s: kept from the earlier run", name)
        return True

    def _intact(self, files: dict[str, str]) -> bool:
        return all(self.path(file).is_file() and sha256_file(self.path(file)) == digest for file, digest in files.items())

    def _refuse(self, name: str, differences: list[str], *, only_code: bool = False) -> None:
        if not differences:
            return
        whose, instead = "another configuration", "or the earlier settings."
        if only_code:
            whose, instead = "another version of this program", "that version, or --accept-code to keep what it measured."
        raise DiagnosticsError(
            f"{self.directory} holds stage {name!r} of {whose} ({'; '.join(differences)}). "
            f"Nothing was overwritten. Choose another --output-dir, {instead}"
        )


def _differences(earlier: dict, now: dict, *, parts: Sequence[str] = ("settings", "inputs", "models"), shared: bool = False) -> list[str]:
    """What differs between two fingerprints, in words. What an older record does not know of is not compared."""
    return [
        f"{part.removesuffix('s')} {key}: was {was!r}, now {now[part].get(key)!r}"
        for part in parts
        for key, was in sorted(earlier.get(part, {}).items())
        if was != now.get(part, {}).get(key) and (key in now.get(part, {}) or not shared)
    ]


@contextmanager
def open_run(directory: str | Path, *, accept_code: bool = False):
    """Open (or create) a run directory and hold its lock while the block runs.

    What a killed process had begun to write is removed. accept_code: as for `Run`. Raises DiagnosticsError where the path is a file, cannot be written, holds files of something else, or
    is in use by another process.
    """
    directory = Path(directory)
    if not parallel.is_main():
        yield Run(directory, accept_code=accept_code)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} cannot be used as output directory ({error.strerror}). Choose a folder that can be written."
        ) from error
    with lock:
        _take_lock(lock, directory)
        _refuse_foreign(directory)
        for unfinished in directory.rglob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        yield Run(directory, accept_code=accept_code)


def _take_lock(lock, directory: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} is in use by another process. Wait for it to end, or choose another --output-dir."
        ) from error


def _refuse_foreign(directory: Path) -> None:
    """A folder with files but no manifest belongs to somebody else."""
    present = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
    started = {"contexts.parquet", "manifest.json"}
    if present and not started & set(present):
        raise DiagnosticsError(
            f"{directory} holds {present[0]!r} and no manifest.json, so it is not a run of this project. "
            "Choose an empty or new --output-dir."
        )
