"""The run directory: a manifest, stages that are done once, writes that are whole or absent.

    DIR/manifest.json      versions, models, and for each stage its settings, inputs and files with sha256
    DIR/contexts.parquet   DIR/tokens.parquet   DIR/tables/*.csv   DIR/figures/*   DIR/report.html

A stage is identified by its settings and by the hashes of the files it reads. Asked for again, it is kept
where all of that agrees and its files are intact, redone where a file of its own is damaged or missing, and
refused where the settings differ: nothing that was measured is overwritten by another configuration.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics import parallel
from diagnostics.types import DiagnosticsError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "numpy", "pandas", "scipy", "statsmodels", "matplotlib", "pyarrow")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | Path, content: bytes) -> Path:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of several processes only the first writes.
    """
    path = Path(path)
    if not parallel.is_main():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
    return path


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
    return write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def progress(iterable: Iterable | None = None, *, total: int, description: str, unit: str = " positions"):
    """A tqdm bar that shows rate and time left, and disappears where the output is not a terminal."""
    from tqdm import tqdm

    hidden = None if parallel.is_main() else True
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


class Run:
    """An output directory and its manifest. Use `open_run`, which holds the directory's lock."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest_path = self.directory / "manifest.json"
        self.manifest: dict[str, Any] = self._read_manifest()

    def _read_manifest(self) -> dict[str, Any]:
        if not self.manifest_path.exists():
            return {"format": 1, "versions": versions(), "stages": {}}
        try:
            manifest = json.loads(self.manifest_path.read_text())
            assert isinstance(manifest["stages"], dict)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise DiagnosticsError(
                f"{self.manifest_path} is not a manifest of this project ({error or 'no stages'}). "
                "Choose another --output-dir, or remove that file."
            ) from error
        return manifest

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
    ) -> bool:
        """Do `work()` once. It writes `outputs`, reads `inputs` and may return facts for the manifest.

        `outputs` may be a function, called after the work. Returns True where the work was done, False where
        an earlier, intact result was kept. Raises DiagnosticsError where the directory holds this stage with
        other settings or inputs; a *derived* stage is done again instead.
        """
        inputs = {file: self._input_hash(name, file) for file in inputs}
        identity = json.loads(json.dumps({"settings": settings, "inputs": inputs}))
        earlier = self.manifest["stages"].get(name)
        if earlier is not None:
            same = {part: earlier[part] for part in identity} == identity
            if not same and not derived:
                self._refuse_difference(name, earlier, identity)
            if same and self._intact(earlier["files"]):
                log.info("%s: kept from the earlier run", name)
                return False
        facts = work()
        parallel.barrier()
        written = outputs() if callable(outputs) else outputs
        files = {file: sha256_file(self.path(file)) for file in written}
        self.manifest["stages"][name] = {**identity, "files": files, **({"facts": facts} if facts else {})}
        write_json(self.manifest_path, self.manifest)
        parallel.barrier()
        return True

    def _input_hash(self, stage: str, file: str) -> str:
        if not self.path(file).is_file():
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not there. Run the stage that writes it first."
            )
        return sha256_file(self.path(file))

    def _intact(self, files: dict[str, str]) -> bool:
        return all(self.path(file).is_file() and sha256_file(self.path(file)) == digest for file, digest in files.items())

    def _refuse_difference(self, name: str, earlier: dict, now: dict) -> None:
        differences = [
            f"{part[:-1]} {key}: was {earlier[part].get(key)!r}, now {now[part].get(key)!r}"
            for part in ("settings", "inputs")
            for key in sorted(earlier[part].keys() | now[part].keys())
            if earlier[part].get(key) != now[part].get(key)
        ]
        raise DiagnosticsError(
            f"{self.directory} holds stage {name!r} of another configuration ({'; '.join(differences)}). "
            "Nothing was overwritten. Choose another --output-dir, or the earlier settings."
        )


@contextmanager
def open_run(directory: str | Path):
    """Open (or create) a run directory and hold its lock while the block runs.

    Raises DiagnosticsError where the path is a file, cannot be written, holds files of something else, or
    is in use by another process.
    """
    directory = Path(directory)
    if not parallel.is_main():
        yield Run(directory)
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
        yield Run(directory)


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
