"""Which prompts a student was trained on: recorded in its folder, and compared with contexts.

    STUDENT/trained_prompts.json    {"prompts": {prompt_id: [digest of each rendered text, ...]}}

A checkpoint's gains on the prompts of its own training say less than those on others. The record
lies inside the student's folder, so that it is copied and fingerprinted with the weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diagnostics.contexts.prompt_ids import digest
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_json
from diagnostics.core.types import Bank, Context, Prompt

log = logging.getLogger("diagnostics")
RECORD = "trained_prompts.json"
"""The file inside the folder of a trained student."""


def write_trained_prompts(folder: str | Path, prompts: Iterable[Prompt]) -> None:
    """Record in a student's folder which prompts it was trained on.

    Args:
        folder: The student's folder.
        prompts: The prompts of its training, in any order; repeats are recorded once.
    """
    texts: dict[str, set[str]] = {}
    for prompt in prompts:
        texts.setdefault(prompt.prompt_id, set()).add(digest(prompt.prompt))
    write_json(
        Path(folder) / RECORD,
        {"prompts": {name: sorted(found) for name, found in sorted(texts.items())}},
    )


def read_trained_prompts(folder: str | Path) -> dict[str, list[str]] | None:
    """Read what `write_trained_prompts` recorded.

    Args:
        folder: The folder of a checkpoint.

    Returns:
        Digests of the rendered texts by prompt id; None where the folder holds no record, so that
        it is unknown what the checkpoint was trained on.

    Raises:
        DiagnosticsError: There is a record that cannot be read.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["prompts"]
        return {str(name): [str(text) for text in texts] for name, texts in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DiagnosticsError(
            f"{path} should say which prompts the checkpoint was trained on, and cannot be read"
            f" ({error}). Train again, or remove the file: it then is unknown."
        ) from error


def seen_contexts(trained: dict[str, list[str]], bank: Bank | Sequence[Context]) -> np.ndarray:
    """Say which contexts answer a prompt that a student was trained on.

    A prompt counts as seen where the training had its rendered text or its id. Two files may use
    one id for different questions, and a template may render one question differently on another
    day; a doubtful prompt counts as seen, since the unseen ones are those that must be sure, and
    is counted in a warning.

    Args:
        trained: As `read_trained_prompts` returns it.
        bank: The contexts.

    Returns:
        Booleans, one per context.
    """
    known = {text for texts in trained.values() for text in texts}
    same_text = np.array([digest(context.prompt) in known for context in bank], dtype=bool)
    same_id = np.array([context.prompt_id in trained for context in bank], dtype=bool)
    if doubtful := int((same_id & ~same_text).sum()):
        log.warning(
            "%d contexts have the id of a prompt that the checkpoint was trained on, with another"
            " text; they count as seen",
            doubtful,
        )
    return same_text | same_id
