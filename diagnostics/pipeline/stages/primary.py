"""What is concluded from: recorded before the probe, and read again by the analyses."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from diagnostics.pipeline.run import Run

if TYPE_CHECKING:
    from diagnostics.analysis.config import PrimaryChoices

log = logging.getLogger("diagnostics")


def register_primary(run: Run, primary: str | None) -> str:
    """Record the primary choices before the probe, and return them as text."""
    from diagnostics.analysis.config import PrimaryChoices

    choices = PrimaryChoices.parse(primary)
    run.register(dataclasses.asdict(choices), choices.sha256(), stage="probe")
    return choices.as_text()


def primary_choices(run: Run, primary: str | None) -> tuple[PrimaryChoices, str | None]:
    """The choices of an analysis, those recorded where none are given, and the recorded hash.

    A record that is not as its own hash has it counts as none.
    """
    from diagnostics.analysis.config import PrimaryChoices

    recorded = run.manifest.get("primary")
    if recorded is None:
        return PrimaryChoices.parse(primary), None
    stated = recorded.get("choices")
    stated = stated if isinstance(stated, dict) else {}
    known = PrimaryChoices.parse(",".join(f"{name}={value}" for name, value in stated.items()))
    digest = known.sha256()
    if digest != recorded.get("sha256") or dataclasses.asdict(known) != stated:
        log.warning(
            "The primary choices in %s are not as their hash has them, so that nothing was"
            " recorded before the probe",
            run.manifest_path,
        )
        digest = None
    return (known if primary is None else PrimaryChoices.parse(primary)), digest
