"""The one exception that users see: what was wrong, the value seen, and the remedy."""

from __future__ import annotations


class DiagnosticsError(ValueError):
    """An input that cannot be used.

    The message has three parts: what was wrong, the value that was seen, and the remedy.
    """
