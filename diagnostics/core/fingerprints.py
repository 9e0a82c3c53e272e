"""Fingerprints of what a result depends on: code, libraries, models' files, threads."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file

PACKAGE = resources.files("diagnostics")
"""The installed package, in a folder or in a zip archive."""
PLUMBING = (
    "pipeline",
    "core.files",
    "core.progress",
    "core.tables",
    "core.manifest",
    "core.fingerprints",
    "core.run_lock",
)
"""Modules that decide where and when, never a number."""
MODEL_FILES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
"""What a model's folder is fingerprinted by: weights, configuration, tokenizer, chat template."""
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "numpy",
    "pandas",
    "scipy",
    "statsmodels",
    "matplotlib",
    "pyarrow",
)


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
    """The package's version and a hash over the code that some modules run.

    The hash covers the modules and everything that they import from this package. Comments,
    docstrings and layout are no part of it.

    Args:
        modules: Dotted names inside the package, such as `probing.scores`.

    Raises:
        DiagnosticsError: The source of a module cannot be read.
        ValueError: A name is no module; a hash over nothing would never change.
    """
    from diagnostics import __version__

    if unknown := [name for name in modules if _place(name) is None]:
        raise ValueError(f"no module of this package is named {', '.join(unknown)}")
    digest = hashlib.sha256()
    for name, shape in sorted(_imported(modules).items()):
        if not set(PLUMBING) & {name, name.split(".")[0]}:
            digest.update(f"{name}\0{shape}\0".encode("utf-8", "backslashreplace"))
    return f"{__version__} {digest.hexdigest()[:16]}"


def _shape(node: Any, imports: list[ast.stmt]) -> Any:
    """A syntax tree as nested tuples: no places, no docstrings or other free-standing constants, no
    field that says nothing. Its statements of import are added to `imports`.

    Fields that are empty are left out, since versions of Python differ in which of them they have.
    """
    if type(node) is list:
        return tuple(
            [
                _shape(each, imports)
                for each in node
                if not (type(each) is ast.Expr and type(each.value) is ast.Constant)
            ]
        )
    kind: Any = type(node)
    names = _fields(kind)
    if names is None:
        return repr(node)
    if isinstance(node, ast.Import | ast.ImportFrom):
        imports.append(node)
    said: list[Any] = [kind.__name__]
    for name in names:
        value = getattr(node, name, None)
        if (value is not None and value != []) or type(node) is ast.Constant:
            said.append((name, _shape(value, imports)))
    return tuple(said)


@cache
def _fields(kind: type) -> tuple[str, ...] | None:
    """The fields of a kind of node that say something; None for what is no node."""
    if not issubclass(kind, ast.AST):
        return None
    return tuple(name for name in kind._fields if name not in ("ctx", "kind", "type_comment"))


def _imported(modules: Iterable[str]) -> dict[str, str]:
    """Shapes of this package's modules that are reached from `modules`, themselves and the
    sub-packages they lie in included.
    """
    found: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in found or (place := _place(name)) is None:
            continue
        found[name], imports = _told(_source(place), str(place), name)
        todo += [name.rpartition(".")[0], *imports]
    return found


def _place(name: str):
    """Path of a module's source; None where the package has no module of that name."""
    parts = name.split(".")
    for end in ((*parts[:-1], f"{parts[-1]}.py"), (*parts, "__init__.py")) if name else ():
        place = PACKAGE.joinpath(*end)
        if place.is_file():
            return place
    return None


def _source(place) -> bytes:
    try:
        return place.read_bytes()
    except OSError as error:
        raise _unreadable(place, error) from error


@cache
def _told(source: bytes, place: str, name: str) -> tuple[str, tuple[str, ...]]:
    """The shape of a module's syntax tree as text, and what the module may import.

    It is kept, since the stages of a run share most of their modules.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise _unreadable(place, error) from error
    imports: list[ast.stmt] = []
    shape = str(_shape(tree, imports))
    return shape, tuple(_imports(imports, name, package=place.endswith("__init__.py")))


def _unreadable(place, error: Exception) -> DiagnosticsError:
    return DiagnosticsError(
        f"The source {place} cannot be read ({error}), so this program cannot say which code"
        " measured. Install the package again."
    )


def _imports(found: Iterable[ast.stmt], name: str, *, package: bool) -> Iterator[str]:
    """Names inside the package that a module's statements may import: modules, and what is imported
    from them, which may be modules too.
    """
    parents = name.split(".") if package else name.split(".")[:-1]
    for node in found:
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("diagnostics.")
                for alias in node.names
                if alias.name.startswith("diagnostics.")
            )
        elif isinstance(node, ast.ImportFrom):
            whole = ["diagnostics", *parents][: len(parents) + 2 - node.level] if node.level else []
            whole += node.module.split(".") if node.module else []
            if whole[:1] == ["diagnostics"]:
                inner = ".".join(whole[1:])
                yield from (inner, *(f"{inner}.{alias.name}".lstrip(".") for alias in node.names))


def fingerprint_files(source: Path) -> str:
    """One hash over a model's file, or over names and contents of a folder's `MODEL_FILES`."""
    if source.is_file():
        return sha256_file(source)
    digest = hashlib.sha256()
    for path in sorted(
        path for path in source.iterdir() if path.suffix in MODEL_FILES and path.is_file()
    ):
        digest.update(path.name.encode() + b"\0" + sha256_file(path).encode())
    return digest.hexdigest()


def threads(*, models: bool) -> int:
    """Number of threads that sums are divided among.

    Sums in another order differ in their last digits, so a file that is made again on another
    number of threads may have other bytes.

    Args:
        models: Whether the stage runs models. Then torch's number counts, else the number that the
            machine offers to BLAS.
    """
    if models and "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    offered = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return int(asked) if asked.isdecimal() and int(asked) else offered
