"""Settings of a stage: merged from configurations, and compared with those in the manifest."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import recorded
from diagnostics.core.settings import RETIRED
from diagnostics.models.config import needs_whole_student
from diagnostics.pipeline.run import Run

if TYPE_CHECKING:
    from diagnostics.models.identity import Models
    from diagnostics.probing.config.step import ProbeConfig

log = logging.getLogger("diagnostics")


def merged(*parts: Any) -> dict[str, Any]:
    """The fields of configurations and the entries of dictionaries, as one stage's settings."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= part if isinstance(part, dict) else dataclasses.asdict(part)
    return merged


def scored_supports(run: Run) -> tuple[int, tuple[int, ...]]:
    """The K of the run's scores and the other K that were measured beside it; the defaults where
    the manifest does not say.
    """
    from diagnostics.probing.config.scores import ScoreConfig

    settings = run.manifest["stages"].get("score", {}).get("settings", {})
    usual = ScoreConfig()
    return settings.get("k", usual.k), tuple(settings.get("sweep", usual.sweep))


def scored_k(run: Run) -> int | None:
    """The K of the run's scores; None where they were not made by this run."""
    return run.manifest["stages"].get("score", {}).get("settings", {}).get("k")


def widened(
    run: Run,
    stage: str,
    config: Any,
    *others: Any,
    names: Sequence[str] = ("criteria", "budgets"),
    everything: str | None = None,
    say: bool = True,
) -> Any:
    """A grid together with the one that the run already has, where all else is the same.

    Looks at the outcome that were taken stay in the tables, and count where verdicts are corrected
    for their number.

    Args:
        run: The run directory.
        stage: The stage's name in the manifest.
        config: The settings that are asked for.
        others: Further settings of the stage that have to be the same.
        names: The settings that are lists to be joined.
        everything: Name of a list that stands for all there are where it is empty.
        say: Whether what is added is logged.
    """
    earlier = run.manifest["stages"].get(stage, {}).get("settings", {})
    now = json.loads(json.dumps(recorded(merged(config, *others))))
    lists = [earlier.get(name) for name in names]
    if not all(isinstance(each, list) for each in lists) or any(
        earlier.get(name) != value for name, value in now.items() if name not in names
    ):
        return config
    joined = {}
    for name, there in zip(names, lists, strict=True):
        asked = getattr(config, name)
        both = tuple(dict.fromkeys([*there, *asked]))
        joined[name] = () if name == everything and not (there and asked) else both
        if name != "criteria":
            joined[name] = tuple(sorted(both))
    kept = [
        str(each) for name in names for each in joined[name] if each not in getattr(config, name)
    ]
    if kept and say:
        log.info("%s: kept beside what is asked for: %s", stage, ", ".join(kept))
    return dataclasses.replace(config, **joined)


def refuse_sharded_student(models: Models, what: str) -> None:
    """Refuse a sharded student where only whole ones can be stepped."""
    if models.config.shard_student:
        raise needs_whole_student(what)


def require_probe_settings(run: Run, probe: ProbeConfig, *, what: str) -> None:
    """Refuse settings of another step than the probe's: all tables of a run describe the same."""
    earlier = run.manifest["stages"].get("probe", {}).get("settings", {})
    if "held_out" in earlier:
        raise DiagnosticsError(
            f"{run.directory} was probed with --held-out {earlier['held_out']}, by a version that"
            f" took one step. {RETIRED['held_out']} Probe again in another --output-dir."
        )
    different = [
        f"{name}: {earlier[name]!r} there, {value!r} now"
        for name, value in dataclasses.asdict(probe).items()
        if name in earlier and earlier[name] != value
    ]
    if different:
        raise DiagnosticsError(
            f"{what} explains the step of the run's probe, and {run.directory} holds one with other"
            f" settings ({'; '.join(different)}). Use the probe's settings, or another"
            " --output-dir."
        )
