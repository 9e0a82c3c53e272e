"""The names of the extra measurements and of their columns: all that flags need of `extras`."""

from __future__ import annotations

from collections.abc import Iterable

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.names import did_you_mean
from diagnostics.core.schema import SCHEMA, column

COLUMNS = {
    extra: tuple(name for name, entry in SCHEMA.items() if entry.on_request == extra)
    for extra in dict.fromkeys(filter(None, (entry.on_request for entry in SCHEMA.values())))
}
"""By extra, the columns of the schema that it measures."""


def check_extras(names: Iterable[str]) -> tuple[str, ...]:
    """The names of extras, each once.

    Raises:
        DiagnosticsError: One is unknown.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in COLUMNS:
            raise DiagnosticsError(
                f"Unknown extra measurement {name!r}.{did_you_mean(name, COLUMNS)} Known are"
                f" {', '.join(COLUMNS)}."
            )
    return names


def extras_of(columns: Iterable[str]) -> tuple[str, ...]:
    """The extras that measure any of these columns, at whatever K."""
    entries = [entry for name in columns if (entry := column(name)) is not None]
    read = {entry.name for entry in entries}
    return tuple(name for name, measured in COLUMNS.items() if read & set(measured))
