"""The values that the paper prints, with their settings; for captions, never to be plotted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """What the paper prints for one artefact."""

    artefact: str
    title: str
    values: str
    setting: str
    comparable: bool


PRINTED: dict[str, Printed] = {}
