"""The one exception that users see: what was wrong, the value seen, and the remedy."""

from __future__ import annotations


class DiagnosticsError(ValueError):
    """An input that cannot be used. The message says what was wrong, the value seen, and the
    remedy.
    """
