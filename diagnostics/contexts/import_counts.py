"""What importing rollouts counts, and how the log reports it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from diagnostics.contexts.prompts import NOTED
from diagnostics.core.errors import DiagnosticsError

log = logging.getLogger("diagnostics")
FOREIGN_SHARE = 0.5
"""If more than this share of the responses have ids that spell another text than the file's,
another tokenizer wrote the ids.
"""
COUNTED = {
    "from_text": "given as text, so their tokens come from encoding that text again",
    "retokenised": "whose ids decode to a text that encodes to other ids (re-tokenization drift)",
    "other_text": "whose ids decode to another text than the file's",
    "joined": "whose response would have shared a token with the prompt, and was encoded apart",
    "without_special": (
        "whose prompt has no special token although the chat template writes some: the dump lost"
        " them. Name the prompt file with --prompts"
    ),
    "restored": "whose prompt's special tokens were put back from --prompts",
    "turns": (
        "with tokens that the student did not write between its own: both models read them, and"
        " they are no positions"
    ),
    "turns_left_out": (
        "whose further messages were left out, since the chat template has no generation marks"
        " that tell the student's tokens"
    ),
    "cut": "cut at the first token that the student did not write",
    "after_end": (
        "cut after their first end token: what follows it does not belong to the response"
    ),
    "padded": "with padding around the prompt or the response, which was removed",
    "rewritten": "whose tool calls or reasoning the chat template rendered from their messages",
    "unwritten": (
        "with tool calls or reasoning that the chat template does not write: left out where the"
        " reasoning is lost, cut before a lost call"
    ),
    "logprobs": "with the log-probabilities of the engine that sampled them",
    "logprobs_unplaced": (
        "whose log-probabilities are not one per response token, or none at all: left out"
    ),
    "empty": "without response tokens, left out",
    "over_long": "longer than the models' window, left out",
    "repeated": "with the same tokens as an earlier one",
    "prompts_replies_cut": NOTED["replies_cut"],
    "prompts_continued": NOTED["continued"],
    "prompts_rendered": NOTED["rendered"],
    "prompts_special_inside": NOTED["special_inside"],
    "prompts_vague_ids": NOTED["vague_ids"],
    "prompts_arguments_unused": NOTED["arguments_unused"],
    "prompts_start_missing": NOTED["start_missing"],
    "prompts_unwritten": NOTED["unwritten"],
    "prompts_beside": NOTED["beside"],
}
"""What is counted, in the words of the log."""
HARMLESS = (
    "turns",
    "from_text",
    "restored",
    "logprobs",
    "rewritten",
    "prompts_rendered",
    "prompts_continued",
)
"""Counts that are logged as information; the others are warnings."""


def log_counts(counts: dict[str, int], path: Path) -> None:
    """Log every count that is not zero."""
    for name, words in COUNTED.items():
        if counts[name]:
            noun = "" if name.startswith("prompts_") else "contexts "
            log.log(
                logging.INFO if name in HARMLESS else logging.WARNING,
                "%s: %d %s%s",
                path,
                counts[name],
                noun,
                words,
            )


def require_same_tokenizer(counts: Counter, path: Path) -> None:
    """Raise DiagnosticsError where most ids spell another text than the file's."""
    if counts["spelled"] and counts["other_spelling"] > FOREIGN_SHARE * counts["spelled"]:
        raise DiagnosticsError(
            f"{path}: {counts['other_spelling']} of {counts['spelled']} responses decode to another"
            " text than the file's, so another tokenizer wrote their ids. Use the model that"
            " sampled them as --student, or give the text alone."
        )
