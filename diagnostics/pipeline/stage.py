"""What a stage is: the record that the registry holds of it, and a command at work on a run.

Configurations and functions are named rather than imported, so that reading the command line needs
neither torch nor a model.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diagnostics.pipeline.flags import Flag

if TYPE_CHECKING:
    from diagnostics.models.identity import Models
    from diagnostics.pipeline.run import Run

PAIR = "models.config.PairConfig"
PROMPTS = "contexts.prompts.PromptConfig"
ROLLOUT = "contexts.config.RolloutConfig"
BANK = "contexts.import_rollouts.ImportConfig"
ASK = "models.served.ask.AskConfig"
SCORE = "probing.config.scores.ScoreConfig"
PROBE = "probing.config.step.ProbeConfig"
CONTROLS = "probing.config.controls.ControlConfig"
INTERVENTION = "probing.config.intervention.InterventionConfig"
ATTRIBUTION = "probing.config.attribution.AttributionConfig"
ANALYSIS = "analysis.config.AnalysisConfig"
COMPARISON = "analysis.selection.ComparisonConfig"
TRAIN = "training.config.TrainConfig"
ENGINE = "training.config.EngineConfig"
EVALUATION = "training.evaluation.EvaluationConfig"
VALIDATE = "training.grid.ValidateConfig"
SELECTORS = "training.selectors.SelectorConfig"


@dataclass(frozen=True)
class Job:
    """One command at work on one run directory."""

    command: str
    """The command's name."""
    run: Run
    """The open run directory."""
    models: Models | None
    """The pair, loaded when a stage first needs it; None for commands without a model."""
    configs: Mapping[str, Any]
    """The command's configurations by the names above."""
    flags: argparse.Namespace
    """The parsed flags, for settings that no configuration holds."""
    given: frozenset[str] = frozenset()
    """Names of the flags that the user gave."""

    def flag(self, name: str) -> Any:
        """The value of a flag, None where this command has no such flag."""
        return getattr(self.flags, name, None)


@dataclass(frozen=True)
class Stage:
    """A command, or a part of one that the manifest records under a name of its own."""

    name: str
    """What the user types and the manifest records."""
    purpose: str
    """What it does, in one sentence."""
    example: tuple[str, ...] = ()
    """Arguments of commands to show, without the program's name."""
    configs: tuple[str, ...] = ()
    """Dataclasses whose fields are its flags, as `room.module.Class`."""
    reads: str = ""
    """Files and inputs that it reads, for the table of commands."""
    writes: str = ""
    """Files that it writes, for the table of commands."""
    flags: tuple[Flag, ...] = ()
    """Flags that no configuration holds; a command has those of its unnamed parts too."""
    run: str | None = None
    """The work on a run directory, as `module:function` below `pipeline.stages`, which is imported
    when the work begins. The function takes a `Job`; what it returns is the command's result. None
    for a command that does not work on one run, which `cli` calls itself."""
    parts: tuple[str, ...] = ()
    """Stages that the command runs in turn, its own among them; itself alone where empty."""
    command: str | None = None
    """The command that runs it, where that has another name: the stage is no command then."""
    recorded: bool = True
    """Whether the manifest records it, so that `rerun` repeats it."""
    repeatable: bool = True
    """Whether `rerun` can repeat it; where not, its files are inputs of the repetition."""
    modules: tuple[str, ...] = ()
    """Modules whose docstrings its page of the documentation shows."""

    def function(self, name: str | None = None) -> Callable[..., dict[str, Any] | None]:
        """The function that `run` names, or another one of its module.

        Args:
            name: The other one's name.
        """
        assert self.run is not None, self.name
        module, _, own = self.run.partition(":")
        return getattr(
            importlib.import_module(f"diagnostics.pipeline.stages.{module}"), name or own
        )
