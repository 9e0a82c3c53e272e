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

Nothing escapes the directory: what this program reads, writes or removes in it is reached through `files`, which follows no
link. What no record of the manifest names is somebody's own and is never overwritten: a stage that begins writes down which
files were there before it (`begun`), and refuses to replace any of them. Settings name an input by its last name, and its
hash says which it was, so that a manifest tells nothing of the machine.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata, resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from diagnostics.core import files, distributed
from diagnostics.core.files import sha256_file, write_atomic
from diagnostics.core.types import DiagnosticsError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
PACKAGE = resources.files("diagnostics")
"""The installed package, in a folder or in a zip archive."""
PLUMBING = ("pipeline", "core.files", "core.progress", "core.tables", "core.manifest", "core.fingerprints")
"""Modules that decide where and when, never a number."""
MANIFEST_BYTES = 64 * 2**20
"""Longest manifest that is read; one of a grid of a thousand trainings has a hundredth of it."""
MANIFEST_DEPTH = 32
"""Deepest nesting of a manifest; this program writes five levels, and a page shows them by recursion."""
FOLDERS = ("tables", "figures", "cells", "checkpoints", "student", "tensorboard", ".partial")
"""Folders of a run directory that this program keeps."""
FILES = ("manifest.json", "contexts.parquet", "scores.parquet", "tops.parquet", "gains.parquet", "tokens.parquet", "first_order.parquet",
         "interventions.parquet", "training_gains.parquet", "evaluations.parquet", "evaluations.csv", "metrics.jsonl", "timings.jsonl", "train.json",
         "report.html", "report.md", "compare.html", "pages.json", ".lock")
"""Files of a run directory that this program keeps, beside those that a manifest names."""
PATHS = ("student", "teacher", "prompts", "eval_prompts", "rollouts", "teacher_logprobs", "training", "offline", "after", "trl", "peft")
"""Settings that name a file or folder: recorded by its last name."""
TRAINED = ("train.json", "metrics.jsonl", "evaluations.csv", "evaluations.parquet", "training_gains.parquet")
"""Files of a training, which compares its settings with its own train.json."""
SHARD = re.compile(r"[0-9]+-[0-9a-f]{16}\.parquet")
KEPT = re.compile(rf"{SHARD.pattern}|direction\.safetensors|step\.json")
PARTIAL = re.compile(r"(?P<stage>.+)-[0-9a-f]{16}")
"""Names of a kept batch, of all that a stage under way keeps (`directions`), and of its folder."""
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
"""What a model's folder is fingerprinted by: weights, configuration, tokenizer, chat template."""
SHARD_SECONDS = 10.0
"""Least work between two writes to DIR/.partial: with a write of some milliseconds, under a thousandth of the time."""
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "numpy", "pandas", "scipy", "statsmodels", "matplotlib", "pyarrow")


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

    hidden = None if distributed.is_main() and not _quiet else True
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
    """The package's version and a hash over the code of `modules` and of all that they import from this package.

    modules: dotted names inside the package. Comments, docstrings and layout are no part of the hash. Raises
    DiagnosticsError where the source of a module cannot be read.
    """
    from diagnostics import __version__

    digest = hashlib.sha256()
    for name, tree in sorted(_imported(modules).items()):
        if not set(PLUMBING) & {name, name.split(".")[0]}:
            digest.update(f"{name}\0{_shape(tree)}\0".encode("utf-8", "backslashreplace"))
    return f"{__version__} {digest.hexdigest()[:16]}"


def _shape(node: Any) -> Any:
    """A syntax tree as nested tuples: no places, no docstrings or other free-standing constants, no field that says nothing.

    Fields that are empty are left out, since versions of Python differ in which of them they have.
    """
    if isinstance(node, list):
        return tuple(_shape(each) for each in node if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node)
              if name not in ("ctx", "kind", "type_comment") and (value not in (None, []) or isinstance(node, ast.Constant))]
    return (type(node).__name__, *((name, _shape(value)) for name, value in fields))


def _imported(modules: Iterable[str]) -> dict[str, ast.Module]:
    """Modules of this package that are reached from `modules`, themselves and the sub-packages they lie in included."""
    found: dict[str, ast.Module] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in found or (place := _place(name)) is None:
            continue
        found[name] = _tree(place)
        todo += [name.rpartition(".")[0], *_imports(found[name], name, package=place.name == "__init__.py")]
    return found


def _place(name: str):
    """Where the source of a module lies; None where no module of the package has that name."""
    parts = name.split(".")
    for end in ((*parts[:-1], f"{parts[-1]}.py"), (*parts, "__init__.py")) if name else ():
        place = PACKAGE.joinpath(*end)
        if place.is_file():
            return place
    return None


def _tree(place) -> ast.Module:
    try:
        return ast.parse(place.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise DiagnosticsError(
            f"The source {place} cannot be read ({error}), so this program cannot say which code measured. Install the package again."
        ) from error


def _imports(tree: ast.Module, name: str, *, package: bool) -> Iterator[str]:
    """Names inside the package that a module may import: modules, and what is imported from them, which may be modules too."""
    parents = name.split(".") if package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix(f"diagnostics.") for alias in node.names if alias.name.startswith(f"diagnostics."))
        elif isinstance(node, ast.ImportFrom):
            whole = ["diagnostics", *parents][: len(parents) + 2 - node.level] if node.level else []
            whole += node.module.split(".") if node.module else []
            if whole[:1] == ["diagnostics"]:
                inner = ".".join(whole[1:])
                yield from (inner, *(f"{inner}.{alias.name}".lstrip(".") for alias in node.names))


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
        if not all(isinstance(parts.get(part), dict) for part in ("settings", "inputs", "files", "models", "code")):
            raise _no_manifest(path, f"stage {name!r} has no settings, inputs and files")
    if not all(isinstance(manifest.get(part, {}), dict) for part in ("versions", "joined", "begun")):
        raise _no_manifest(path, "versions are no object")
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in manifest.get("begun", {}).values()):
        raise _no_manifest(path, "what was begun is no list of names")
    named = [file for record in stages.values() for part in ("inputs", "files") for file in record[part]] + list(manifest.get("joined", {}))
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
    return DiagnosticsError(f"{path} is not a manifest of this project ({reason}). Choose another --output-dir, or remove that file.")


def recorded(settings: Mapping[str, Any], *, apart: bool = False) -> dict[str, Any]:
    """Settings as a file may hold them: inputs by their last name, and no home folder in any text.

    apart: where no hash of their content stands beside them, tell inputs of one last name apart by a hash of their place.
    """
    places = {f"{key}_place": hashlib.sha256(os.path.abspath(value).encode("utf-8", "surrogateescape")).hexdigest()[:16]
              for key, value in settings.items() if apart and key in PATHS and isinstance(value, str) and _last_name(value) != value}
    return places | {key: without_home(_last_name(value) if key in PATHS and isinstance(value, str) else value) for key, value in settings.items()}


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
    return value.replace(f"{home}/", "~/") if isinstance(value, str) and home.startswith("/") else value


def threads(*, models: bool) -> int:
    """Threads that sums are shared out to: torch's in a stage with models, else those that the machine offers to BLAS.

    Sums in another order end in other last digits, so a file that is made again on another number may have other bytes.
    """
    if models and "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    offered = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(asked) if asked.isdecimal() and int(asked) else offered


def unchanged(directory: str | Path, name: str) -> Path:
    """The path of a file of another run, compared with that run's manifest before anybody reads it.

    Raises DiagnosticsError where the file is not as it was written, or is no regular file. A file in no record is named in a
    warning.
    """
    directory = Path(directory)
    manifest = read_manifest(directory / "manifest.json") if files.kind(directory / "manifest.json") else {"stages": {}}
    digest, known = files.hash_inside(directory, name), hashes_of(manifest, name)
    if digest is not None and known and digest not in known:
        raise DiagnosticsError(
            f"{directory / name} is not as it was written: its sha256 is {digest[:16]}…, and manifest.json has {known[-1][:16]}…. "
            f"Run the stage that writes it again in {directory}, or name another run."
        )
    if digest is not None and not known:
        log.warning("%s is in no record of its run's manifest.json, so nothing says what measured it", directory / name)
    return directory / name


def hashes_of(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Hashes that a manifest has of a file."""
    known = [record["files"][name] for record in manifest["stages"].values() if name in record.get("files", {})]
    return known + [digest for file, digest in manifest.get("joined", {}).items() if file == name]


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
            if not SHARD.fullmatch(path.name) or files.kind(path) != "file":
                continue
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
        name = f"{distributed.rank()}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.parquet"
        try:
            files.replace(self.folder / name, buffer.getvalue())
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
        self._theirs: set[str] = set()
        self._say_other_versions()

    def _say_other_versions(self) -> None:
        now = versions()
        other = [f"{name} {was} then, {now[name]} now" for name, was in self.manifest.get("versions", {}).items() if now.get(name, was) != was]
        if other:
            log.warning("%s was begun with other versions (%s); equal settings may give other last digits", self.directory, ", ".join(other))

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
        """Do `work()` once. It writes `outputs`, reads `inputs` and may return facts for the manifest.

        `outputs` may be a function, called after the work. code: modules that decide the stage's numbers. models: gives
        the hash of each model's files. Returns True where the work was done, False where an earlier, intact result
        was kept. Raises DiagnosticsError where the directory holds this stage with another fingerprint, a *derived* stage
        excepted, where it holds anything of other models, where an input is missing or damaged, or where a file of the
        name of an output is in no record.
        """
        inputs = {file: self._input_hash(name, file) for file in inputs}
        now = {"settings": recorded(settings), "inputs": inputs, "models": models(), "code": {"version": code_version(*code)} if code else {}}
        now = json.loads(json.dumps(now))
        self._require_same_models(name, now["models"])
        if self._keep(name, now, derived=derived):
            return False
        self._begin(name, outputs() if callable(outputs) else outputs)
        self._partial = self.path(".partial") / f"{name}-{hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]}"
        facts = work()
        distributed.barrier()
        written = outputs() if callable(outputs) else outputs
        made = {file: self._hash(file) for file in written}
        record = {**now, "threads": threads(models=bool(now["models"])), "files": made, **({"facts": without_home(facts)} if facts else {})}
        self._say_what_differs(name, record)
        self.manifest["stages"][name] = record
        self._end(name)
        self._clear_partial(name)
        distributed.barrier()
        return True

    def shards(self, name: str) -> Shards:
        """Where the stage under way keeps the finished parts of the pass of that name."""
        return Shards(self._partial and self._partial / name)

    def _begin(self, name: str, outputs: Iterable[str]) -> None:
        """Write down which files were there before the stage: a directory with our files in it is ours from the first on."""
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
        """Files that no stage wrote, and none that was interrupted: somebody's own.

        What an interrupted stage had written is in no record either, but was not there when it began.
        """
        found = {entry.name for entry in os.scandir(self.directory) if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)}
        found |= {name for folder in ("tables", "student") for name, kind in files.walk(self.directory, folder) if kind != "folder"}
        earlier = [set(names) for stage, names in self.manifest.get("begun", {}).items()]
        if files.kind(self.path("train.json")) == "file" and files.kind(self.path("checkpoints")) == "folder":
            found -= {name for name in found if name in TRAINED or name.startswith("student/")}  # train.json says whose they are
        return {name for name in found if name != "manifest.json" and not self._known(name) and all(name in names for names in earlier)}

    def _require_ours(self, name: str) -> None:
        if name in self._theirs:
            raise DiagnosticsError(
                f"{self.path(name)} is there, and manifest.json has no record of it, so it is not this program's to replace. "
                "Nothing was overwritten. Move it away, or choose another --output-dir."
            )

    def _say_what_differs(self, name: str, record: dict) -> None:
        """Where a finished stage was made again with equal settings and came out otherwise: which files, and on how many threads."""
        earlier = self.manifest["stages"].get(name)
        if earlier is None or _differences(earlier, record, parts=("settings", "inputs", "models", "code")):
            return
        other = [file for file, digest in earlier["files"].items() if record["files"].get(file, digest) != digest]
        was, now = earlier.get("threads"), record["threads"]
        if other and was not in (None, now):
            log.warning("%s: %s came out with other bytes than before; threads were %s and are %s, which changes the order of sums and "
                        "their last digits. Set OMP_NUM_THREADS=%s for the earlier bytes", name, ", ".join(other), was, now, was)
        elif other:
            log.warning("%s: %s came out with other bytes than before, on as many threads", name, ", ".join(other))

    def _clear_partial(self, stage: str) -> None:
        """Remove the finished parts of a stage, and nothing else that lies there."""
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
        """While a file that no single stage writes is written; its hash is recorded at the end, so that damage to it is seen."""
        if not self._known(name):
            self._begin(name, [name])
        yield
        distributed.barrier()
        joined, digest = self.manifest.setdefault("joined", {}), self._hash(name)
        if joined.get(name) != digest or name in self.manifest.get("begun", {}):
            joined[name] = digest
            self._end(name)

    def record_file(self, name: str) -> None:
        """Keep the hash of a file that was written already, as `joining` does."""
        distributed.barrier()
        self.manifest.setdefault("joined", {})[name] = self._hash(name)
        write_json(self.manifest_path, self.manifest)

    def _hash(self, name: str) -> str:
        digest = files.hash_inside(self.directory, name)
        if digest is None:
            raise DiagnosticsError(f"{self.path(name)} is not there. Run the stage that writes it first.")
        return digest

    def require(self, name: str) -> Path:
        """The path of a file of this run. Raises DiagnosticsError where it is missing or not as it was written."""
        if self._hash(name) not in (self._known(name) or [self._hash(name)]):
            raise DiagnosticsError(f"{self.path(name)} is not as it was written. Run the stage that writes it again.")
        return self.path(name)

    def _input_hash(self, stage: str, file: str) -> str:
        digest, known = files.hash_inside(self.directory, file), self._known(file)
        if digest is None:
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not there. Run the stage that writes it first."
            )
        if known and digest not in known:
            raise DiagnosticsError(
                f"Stage {stage!r} reads {self.path(file)}, which is not as it was written: its sha256 is {digest[:16]}…, and "
                f"manifest.json has {known[-1][:16]}…. Run the stage that writes it again."
            )
        return digest

    def _known(self, file: str) -> list[str]:
        """Hashes that the manifest has of a file."""
        return hashes_of(self.manifest, file)

    def as_written(self, file: str) -> bool:
        """False, with a warning, for a file that is damaged: its stage will make it again, and nobody should read it until then."""
        known = self._known(file)
        whole = not known or self._hash(file) in known
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

    def _intact(self, recorded: dict[str, str]) -> bool:
        return all(files.hash_inside(self.directory, file) == digest for file, digest in recorded.items())

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
        if not _same(key, was, now.get(part, {}).get(key)) and (key in now.get(part, {}) or not shared)
    ]


def _same(key: str, was: Any, now: Any) -> bool:
    """Whether a setting is the same; an older record has an input by its whole path, where its last name is recorded now."""
    return was == now or (key in PATHS and isinstance(was, str) and isinstance(now, str) and "/" in was and PurePath(was).name == now)


@contextmanager
def open_run(directory: str | Path, *, accept_code: bool = False):
    """Open (or create) a run directory and hold its lock while the block runs.

    What a killed process had begun to write is removed. accept_code: as for `Run`. Raises DiagnosticsError where the path is a
    file, cannot be written, holds files of something else, or links and pipes in place of this program's files, or is in use
    by another process.
    """
    directory = Path(directory)
    if not distributed.is_main():
        with files.guard(directory):
            yield Run(directory, accept_code=accept_code)
        return
    with locked(directory):
        run = Run(directory, accept_code=accept_code)
        refuse_unfit(directory, [name for record in run.manifest["stages"].values() for name in record["files"]])
        with files.guard(directory, run._require_ours):
            yield run


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory, made where it is not there, and remove what a killed process had begun to write."""
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(directory)
        refuse_unfit(directory, FILES)
        lock = files.open_inside(directory, ".lock", os.O_RDWR | os.O_CREAT)
    with os.fdopen(lock, "rb"):
        _take_lock(lock, directory)
        with _usable(directory):
            _refuse_foreign(directory)
            _remove_unfinished(directory)
        yield


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} cannot be used as output directory ({error.strerror}). Choose a folder that can be written."
        ) from error


def _take_lock(lock: int, directory: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DiagnosticsError(
            f"{directory} is in use by another process. Wait for it to end, or choose another --output-dir."
        ) from error


def _refuse_foreign(directory: Path) -> None:
    """A folder with files but no manifest belongs to somebody else, or has lost the record of what its files are.

    Contexts alone may be laid into a new directory, to be scored there.
    """
    present = sorted(entry.name for entry in os.scandir(directory) if not entry.name.startswith("."))
    if "manifest.json" in present or present in ([], ["contexts.parquet"]):
        return
    other = next(name for name in present if name != "contexts.parquet")
    if set(present) & {*FILES, *FOLDERS}:
        raise DiagnosticsError(
            f"{directory} holds {other!r} and no manifest.json, so nothing says with which settings its files were made. "
            "Nothing was overwritten. Bring manifest.json back, or choose an empty or new --output-dir."
        )
    raise DiagnosticsError(
        f"{directory} holds {other!r} and no manifest.json, so it is not a run of this project. "
        "Choose an empty or new --output-dir."
    )


def refuse_unfit(directory: Path, names: Iterable[str]) -> None:
    """Links, pipes and the like in place of this program's files and folders: they would be read or written through."""
    for name in names:
        if (found := files.kind(directory / name)) not in ("file", None):
            raise files.unfit(directory / name, found, "file")
    for folder in FOLDERS:
        if (found := files.kind(directory / folder)) not in ("folder", None):
            raise files.unfit(directory / folder, found, "folder")
        for name, found in files.walk(directory, folder):
            if found not in ("file", "folder"):
                raise files.unfit(directory / name, found, "file")


def _remove_unfinished(directory: Path) -> None:
    """Remove what a killed process had begun to write: by this program's own naming, in this program's own folders."""
    found = [(name, files.kind(directory / name)) for name in sorted(os.listdir(directory))]
    found += [entry for folder in FOLDERS for entry in files.walk(directory, folder)]
    for name, kind in found:
        if kind == "file" and files.TEMPORARY.fullmatch(name.rpartition("/")[2]):
            remove_ours(directory, name, kind, files.TEMPORARY)


def remove_ours(directory: Path, name: str, kind: str, naming: re.Pattern) -> None:
    """Remove an empty folder, or a file of this program's naming; what is somebody else's stays, with a word."""
    if kind == "folder":
        gone = files.remove_folder(directory, name)
    else:
        ours = any(each.fullmatch(name.rpartition("/")[2]) for each in (naming, files.TEMPORARY))
        gone = ours and files.remove_inside(directory, name)
    if not gone and kind != "folder":
        log.warning("%s is not this program's, or another user's, and stays", directory / name)


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold a folder while pages are written into it: a run by its lock; any other, in which no file is left for it, by itself."""
    if files.kind(directory / "manifest.json") is not None:
        with locked(directory), files.guard(directory):
            read_manifest(directory / "manifest.json")
            yield
        return
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take_lock(descriptor, directory)
        with files.guard(directory):
            yield
    finally:
        os.close(descriptor)


def write_pages(directory: str | Path, pages: Mapping[str, bytes]) -> None:
    """Write pages and figures, and their hashes into pages.json; equal files give equal bytes.

    A file of such a name that is not as this program wrote it is somebody's own, or was changed by hand. Raises
    DiagnosticsError for it before anything is written.
    """
    directory = Path(directory)
    record = _read_pages(directory)
    for name in pages:
        found = files.hash_inside(directory, name)
        if found is not None and found not in record.get(name, []):
            said = "is not as it was written" if name in record else "is there, and pages.json has no record of it"
            raise DiagnosticsError(f"{directory / name} {said}, so it is not this program's to replace. Nothing was overwritten. Move it away, "
                                   "or choose another directory.")
    now = {name: hashlib.sha256(content).hexdigest() for name, content in pages.items()}
    both = {name: sorted({*record.get(name, []), digest}) for name, digest in now.items()}
    with files.guard(directory):
        write_json(directory / "pages.json", record | both)  # before the pages: killed in between, both are known
        for name, content in pages.items():
            write_atomic(directory / name, content)
        write_json(directory / "pages.json", dict(sorted((record | {name: [digest] for name, digest in now.items()}).items())))


def _read_pages(directory: Path) -> dict[str, list[str]]:
    """What pages.json knows: names and hashes of pages that were written."""
    try:
        content = json.loads(files.read_inside(directory, "pages.json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise DiagnosticsError(f"{directory / 'pages.json'} is damaged ({error}). Move it and the pages beside it away.") from error
    if not isinstance(content, dict) or not all(isinstance(hashes, list) for hashes in content.values()):
        raise DiagnosticsError(f"{directory / 'pages.json'} is not this program's record of its pages. Move it away.")
    return content
