"""Files inside a directory, opened without following links and never outside the directory.

    with guard(directory):                 # no file beneath `directory` is written through a link
        write_atomic(directory / "a" / "b.csv", content)
    read_inside(directory, "a/b.csv")      # a regular file; refuses links, pipes and ways out
    remove_inside(directory, "a/b.csv")    # a regular file of the same user

A directory may come from a stranger (an archive keeps links and pipes) or lie on a shared disk. The
directory itself may be a link, since a user named it; its entries may not lead out of it. Each step
down is opened relative to the folder above, so that the entry that was checked is the one opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.opd\.tmp")
"""Names of files that are being written; no other file is removed as unfinished."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Without following a link, and without waiting for a pipe's other end."""
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}

Content = bytes | memoryview | Iterable[bytes | memoryview]
"""All bytes of a file, at once or in parts."""

_guarded: dict[str, Callable[[str], None]] = {}
"""Guarded directories, each with the function that is called before a file in it is written."""


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind(path: str | Path, *, folder: int | None = None) -> str | None:
    """Kind of a directory entry, without following a link.

    Args:
        path: The entry.
        folder: Descriptor of the folder that `path` is relative to.

    Returns:
        `file`, `folder`, `link`, `pipe`, `socket` or `device`; None where there is no entry.
    """
    try:
        return KINDS.get(
            stat.S_IFMT(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode), "device"
        )
    except (FileNotFoundError, NotADirectoryError):
        return None


def inside(name: str) -> tuple[str, ...]:
    """The parts of a name beneath a directory.

    Raises:
        DiagnosticsError: The name leads out of the directory.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise DiagnosticsError(
            f"{name!r} names no file inside the directory. Give a name that does not lead out"
            " of it."
        )
    return parts


@contextmanager
def _folder(root: str | Path, parts: tuple[str, ...], *, create: bool = False) -> Iterator[int]:
    """A descriptor of the folder `parts` beneath `root`, each step taken without following a
    link.
    """
    descriptor, so_far = os.open(root, FOLDER), Path(root)
    try:
        for part in parts:
            so_far = so_far / part
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            if (found := kind(part, folder=descriptor)) not in ("folder", None):
                raise unfit(so_far, found, "folder")
            inner = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def unfit(path: str | Path, found: str, wanted: str) -> DiagnosticsError:
    """The error for a link, pipe or device where this program keeps its own file or folder.

    Args:
        path: The entry.
        found: Kind of the entry, as `kind` names it.
        wanted: `file` or `folder`.
    """
    return DiagnosticsError(
        f"{path} is a {found}, where this program keeps a {wanted} of its own: nothing was read"
        f" from it or written through it. Remove it, or put a {wanted} in its place; a run"
        " directory as a whole may be a link."
    )


def open_inside(root: str | Path, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """A descriptor of the regular file `name` beneath `root`.

    Args:
        root: Directory; it may be a link itself.
        name: Name beneath it, with `/` between folders.
        flags: As for `os.open`.
        mode: Permissions of a file that is created, reduced by the umask.

    Raises:
        DiagnosticsError: The entry, or a folder on the way, is a link or of another kind.
        OSError: As `os.open` raises it.
    """
    *folders, last = inside(name)
    with _folder(root, tuple(folders)) as folder:
        if (found := kind(last, folder=folder)) not in ("file", None):
            raise unfit(Path(root) / name, found, "file")
        try:
            descriptor = os.open(last, flags | FILE, mode, dir_fd=folder)
        except OSError as error:
            error.filename = str(Path(root) / name)
            raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise unfit(Path(root) / name, "special file", "file")
    return descriptor


def read_inside(root: str | Path, name: str) -> bytes:
    """The bytes of the regular file `name` beneath `root`. Raises as `open_inside` does."""
    with os.fdopen(open_inside(root, name), "rb") as file:
        return file.read()


def hash_inside(root: str | Path, name: str) -> str | None:
    """Hex sha256 of the regular file `name` beneath `root`; None where there is no file.

    Raises:
        DiagnosticsError: The entry is a link or of another kind.
    """
    try:
        with os.fdopen(open_inside(root, name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def remove_inside(root: str | Path, name: str) -> bool:
    """Remove a regular file that belongs to this user.

    Returns False, and removes nothing, where the entry is of another kind or another user's.
    """
    *folders, last = inside(name)
    with _folder(root, tuple(folders)) as folder:
        found = os.stat(last, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        os.unlink(last, dir_fd=folder)
    return True


def remove_folder(root: str | Path, name: str) -> bool:
    """Remove an empty folder; False where it is not empty, not a folder or not this user's."""
    *folders, last = inside(name)
    try:
        with _folder(root, tuple(folders)) as folder:
            os.rmdir(last, dir_fd=folder)
    except OSError:
        return False
    return True


def walk(root: str | Path, name: str) -> Iterator[tuple[str, str]]:
    """Name (relative to `root`) and kind of everything beneath the folder `name`, deepest first.

    No link is followed.
    """
    base = Path(root)
    if kind(base / name) != "folder":
        return
    for entry in sorted(os.scandir(base / name), key=lambda entry: entry.name):
        inner = f"{name}/{entry.name}"
        found = kind(base / inner)
        if found == "folder":
            yield from walk(root, inner)
        if found is not None:
            yield inner, found


@contextmanager
def guard(root: str | Path, before: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """Make `write_atomic` write beneath `root` through no link while the block runs.

    Args:
        root: The directory.
        before: Called with each file's name beneath `root` before it is written; it may raise.
    """
    key = os.path.abspath(root)
    earlier = _guarded.get(key)
    _guarded[key] = before
    try:
        yield
    finally:
        _guarded.pop(key) if earlier is None else _guarded.update({key: earlier})


def _split(path: Path) -> tuple[Path, str]:
    """The guarded directory that holds a path, and the path's name in it.

    Where no guarded directory holds it, this is the path's own folder.
    """
    whole = os.path.abspath(path)
    roots = [root for root in _guarded if whole.startswith(root.rstrip("/") + "/")]
    if not roots:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.parent, path.name
    root = max(roots, key=len)
    name = whole[len(root.rstrip("/")) + 1 :]
    _guarded[root](name)
    return Path(root), name


def write_atomic(path: str | Path, content: Content) -> Path:
    """Write a file so that a reader or a crash sees the old content or the new, never a part.

    Permissions follow the umask. Of several processes only the first one writes.

    Args:
        path: The file; its folders are created.
        content: All of its bytes, at once or in parts.

    Returns:
        The path.

    Raises:
        DiagnosticsError: The disk is full or read-only, or the path leads out of a guarded
            directory.
    """
    path = Path(path)
    if distributed.is_main():
        try:
            replace(path, content)
        except OSError as error:
            raise DiagnosticsError(
                f"{path} cannot be written ({error.strerror or error}). Nothing finished was lost. "
                "Make room or choose another --output-dir, and give the same command again."
            ) from error
    return path


def replace(path: Path, content: Content) -> None:
    """Write a file as `write_atomic` does, but in every process and with plain OSErrors."""
    root, name = _split(path)
    *folders, last = inside(name)
    with _folder(root, tuple(folders), create=True) as folder:
        if (found := kind(last, folder=folder)) not in ("file", None) and os.path.abspath(
            root
        ) in _guarded:
            raise unfit(path, found, "file")
        if found == "folder":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary = f".{secrets.token_hex(8)}.opd.tmp"
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE, 0o666, dir_fd=folder
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines([content] if isinstance(content, (bytes, memoryview)) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
        os.fsync(folder)  # a rename is durable only once its folder is on disk
