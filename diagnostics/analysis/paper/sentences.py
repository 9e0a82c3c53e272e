"""Why a released number and a controlled one differ, in one sentence with its number."""

from __future__ import annotations
