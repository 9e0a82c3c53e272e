"""Pages are replaced only where this program wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.tables import write_json


def write_pages(directory: str | Path, pages: Mapping[str, bytes]) -> None:
    """Write pages and figures, and their hashes into pages.json; equal files give equal bytes.

    A file of such a name that is not as this program wrote it is somebody's own, or was changed by
    hand. Raises DiagnosticsError for it before anything is written."""
    directory = Path(directory)
    record = _read_pages(directory)
    for name in pages:
        found = files.hash_inside(directory, name)
        if found is not None and found not in record.get(name, []):
            said = (
                "is not as it was written"
                if name in record
                else "is there, and pages.json has no record of it"
            )
            raise DiagnosticsError(
                f"{directory / name} {said}, so it is not this program's to replace. Nothing was"
                " overwritten. Move it away, or choose another directory."
            )
    now = {name: hashlib.sha256(content).hexdigest() for name, content in pages.items()}
    both = {name: sorted({*record.get(name, []), digest}) for name, digest in now.items()}
    with files.guard(directory):
        write_json(
            directory / "pages.json", record | both
        )  # before the pages: killed in between, both are known
        for name, content in pages.items():
            write_atomic(directory / name, content)
        write_json(
            directory / "pages.json",
            dict(sorted((record | {name: [digest] for name, digest in now.items()}).items())),
        )


def _read_pages(directory: Path) -> dict[str, list[str]]:
    """What pages.json knows: names and hashes of pages that were written."""
    try:
        content = json.loads(files.read_inside(directory, "pages.json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise DiagnosticsError(
            f"{directory / 'pages.json'} is damaged ({error}). Move it and the pages beside it"
            " away."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(hashes, list) for hashes in content.values()
    ):
        raise DiagnosticsError(
            f"{directory / 'pages.json'} is not this program's record of its pages. Move it away."
        )
    return content
