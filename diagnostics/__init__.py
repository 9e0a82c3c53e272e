"""opd-diagnostics: which of a teacher's token-level signals can this student learn from?

A name is imported on its first use, so `import diagnostics` is quick and needs neither torch nor a
model.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Large tensors lie in large memory pages, which makes filling a fresh one three to five times as
# fast. Torch reads this variable at its first allocation, so it is set before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Where each public name lives. `scripts/docs.py` writes __init__.pyi from these two tables, so that
# a type checker and an editor know every name and refuse any other.
_HOMES = {
    "core.errors": ("DiagnosticsError",),
    "core.schema": ("SCHEMA", "validate_tokens"),
    "core.types": ("Bank", "Context", "Prompt", "read_bank"),
    "criteria": (
        "ambiguous_share",
        "criterion",
        "disagreement_column",
        "list_criteria",
        "normalize",
        "score_criterion",
        "select",
        "training_batches",
    ),
    "models.pair": ("Pair", "load_pair", "stop_tokens"),
    "contexts.prompts": ("load_prompts",),
    "contexts.rollouts": ("rollout",),
    "contexts.coverage": ("tokenizer_coverage",),
    "contexts.import_rollouts": ("read_rollouts",),
    "contexts.verifiers": ("find_verifier",),
    "probing.scores": ("score", "score_with_tops"),
    "probing.one_step": ("probe",),
    "analysis.selection": (
        "compare",
        "selection_curves",
        "selection_overlap",
        "selection_profile",
        "selection_summary",
    ),
    "analysis.correctness": ("by_correctness",),
    "analysis.decision": ("decide", "decision_sentence"),
    "analysis.engine_check": ("engine_causes", "engine_check", "engine_worst"),
    "analysis.rank_agreement": ("agreement",),
    "probing.intervention": ("intervene", "interventions"),
    "probing.attribution": ("attribute",),
    "training.config": ("EngineConfig", "TrainConfig"),
    "training.run": ("train",),
    "training.evaluation": (
        "EvaluationConfig",
        "evaluate",
        "summarize_evaluation",
    ),
    "contexts.story_sums": ("sums", "verify"),
    "contexts.import_tokens": ("read_tokens",),
    "analysis.paper.tables": ("paper",),
    "analysis.teachers": ("compare_teachers",),
    "analysis.study": ("correlate", "q3_contrast", "q3_groups", "study"),
    "report.tokenview": ("show",),
    "report.page": ("read_run",),
    "report.compare_runs": ("compare_runs",),
    "report.atlas_page": ("atlas",),
}
_MODULES = {"plot": "report.figures"}
_HOME = {name: home for home, names in _HOMES.items() for name in names} | _MODULES
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on its first use, and keep it so that every later use finds it at once.

    Raises:
        AttributeError: The package has no public name of this spelling.
    """
    if name not in _HOME:
        from diagnostics.core.names import did_you_mean

        raise AttributeError(
            f"module 'diagnostics' has no attribute {name!r}.{did_you_mean(name, __all__)}"
        )
    module = importlib.import_module(f"diagnostics.{_HOME[name]}")
    globals()[name] = value = module if name in _MODULES else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
