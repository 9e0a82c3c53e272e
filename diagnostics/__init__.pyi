"""The public names, for type checkers and editors. Written by scripts/docs.py."""

from diagnostics.analysis.correctness import by_correctness
from diagnostics.analysis.decision import decide, decision_sentence
from diagnostics.analysis.engine_check import engine_causes, engine_check, engine_worst
from diagnostics.analysis.paper.tables import paper
from diagnostics.analysis.rank_agreement import agreement
from diagnostics.analysis.selection import (
    compare,
    selection_curves,
    selection_overlap,
    selection_profile,
    selection_summary,
)
from diagnostics.analysis.study import correlate, q3_contrast, q3_groups, study
from diagnostics.analysis.teachers import compare_teachers
from diagnostics.contexts.coverage import tokenizer_coverage
from diagnostics.contexts.import_rollouts import read_rollouts
from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.contexts.prompts import load_prompts
from diagnostics.contexts.rollouts import rollout
from diagnostics.contexts.story_sums import sums, verify
from diagnostics.contexts.verifiers import find_verifier
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, validate_tokens
from diagnostics.core.types import Bank, Context, Prompt, read_bank
from diagnostics.criteria import (
    ambiguous_share,
    criterion,
    disagreement_column,
    list_criteria,
    normalize,
    score_criterion,
    select,
    training_batches,
)
from diagnostics.models.pair import Pair, load_pair, stop_tokens
from diagnostics.probing.attribution import attribute
from diagnostics.probing.intervention import intervene, interventions
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score, score_with_tops
from diagnostics.report import figures as plot
from diagnostics.report.atlas_page import atlas
from diagnostics.report.compare_runs import compare_runs
from diagnostics.report.page import read_run
from diagnostics.report.tokenview import show
from diagnostics.training.config import EngineConfig, TrainConfig
from diagnostics.training.evaluation import EvaluationConfig, evaluate, summarize_evaluation
from diagnostics.training.run import train

__version__: str
__all__ = [
    "SCHEMA",
    "Bank",
    "Context",
    "DiagnosticsError",
    "EngineConfig",
    "EvaluationConfig",
    "Pair",
    "Prompt",
    "TrainConfig",
    "agreement",
    "ambiguous_share",
    "atlas",
    "attribute",
    "by_correctness",
    "compare",
    "compare_runs",
    "compare_teachers",
    "correlate",
    "criterion",
    "decide",
    "decision_sentence",
    "disagreement_column",
    "engine_causes",
    "engine_check",
    "engine_worst",
    "evaluate",
    "find_verifier",
    "intervene",
    "interventions",
    "list_criteria",
    "load_pair",
    "load_prompts",
    "normalize",
    "paper",
    "plot",
    "probe",
    "q3_contrast",
    "q3_groups",
    "read_bank",
    "read_rollouts",
    "read_run",
    "read_tokens",
    "rollout",
    "score",
    "score_criterion",
    "score_with_tops",
    "select",
    "selection_curves",
    "selection_overlap",
    "selection_profile",
    "selection_summary",
    "show",
    "stop_tokens",
    "study",
    "summarize_evaluation",
    "sums",
    "tokenizer_coverage",
    "train",
    "training_batches",
    "validate_tokens",
    "verify",
]
