"""opd-diagnostics: which of a teacher's token-level signals can this student learn from?

Names load on first use, so `import diagnostics` stays cheap and needs neither torch nor a model.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

__version__ = "0.1.0"

# Large tensors in large pages: filling a fresh one takes a third to a fifth of the time. Torch
# reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    "core.types": (
        "Bank",
        "Context",
        "DiagnosticsError",
        "Prompt",
        "SCHEMA",
        "read_bank",
        "validate_tokens",
    ),
    "criteria": ("criterion", "list_criteria", "normalize", "score_criterion", "select"),
    "models.pair": ("Pair", "load_pair"),
    "contexts.prompts": ("load_prompts",),
    "contexts.rollouts": ("rollout",),
    "contexts.import_rollouts": ("read_rollouts",),
    "probing.scores": ("score", "score_with_tops"),
    "probing.one_step": ("probe",),
    "analysis.selection": (
        "compare",
        "selection_curves",
        "selection_overlap",
        "selection_profile",
        "selection_summary",
    ),
    "analysis.rank_agreement": ("agreement",),
    "probing.intervention": ("intervene", "interventions"),
    "probing.attribution": ("attribute",),
    "training.run": ("EngineConfig", "TrainConfig", "train"),
    "training.evaluation": (
        "EvaluationConfig",
        "evaluate",
        "find_verifier",
        "summarize_evaluation",
    ),
    "contexts.story_sums": ("sums", "verify"),
    "contexts.import_tokens": ("read_tokens",),
    "analysis.study": ("correlate", "q3_contrast", "q3_groups", "study"),
    "report.tokenview": ("show",),
    "report.page": ("read_run",),
    "report.compare_runs": ("compare_runs",),
}
_MODULES = {"plot": "report.figures"}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"diagnostics.{_MODULES[name]}")
    if name in _HOME:
        return getattr(importlib.import_module(f"diagnostics.{_HOME[name]}"), name)
    raise AttributeError(f"module 'diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Callable(ModuleType):
    """A module that is called like the function of its name: once imported, it stands where that
    function stood.
    """

    def __call__(self, *args, **options):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value) -> None:
        if _HOME.get(name) == name and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
