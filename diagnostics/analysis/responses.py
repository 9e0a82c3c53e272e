"""Right and wrong responses alone: the positions of either, and whether they are enough to judge.

The positions of one kind are a token table of their own: its scales, cuts, ranks, selections and
draws are made from them alone, as in a bank that holds no other response. The step is another
matter. It was taken on all contexts of a fold, so that a gain at a right response is what a step on
right and wrong ones did there, and so is its null. Which responses are right is not drawn by lot:
they are the shorter or the easier ones too.
"""

from __future__ import annotations

import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.names import did_you_mean
from diagnostics.core.schema import require_columns

SIDES = {"right": 1.0, "wrong": 0.0}
"""Value of the column `correct` by side."""
ALL = "all"
"""Right, wrong and not judged together."""
NOT_REGISTERED = "these are the {} responses alone, and what was recorded is of all"
"""Why no verdict on a side confirms anything: primary choices are of all responses."""


def require_known(responses: str) -> None:
    """Refuse a name that is neither `all` nor a side.

    Args:
        responses: The name.

    Raises:
        DiagnosticsError: It is unknown.
    """
    known = (ALL, *SIDES)
    if responses not in known:
        raise DiagnosticsError(
            f"Unknown responses {responses!r}.{did_you_mean(responses, known)} Known are"
            f" {', '.join(known)}."
        )


def of_responses(tokens: pd.DataFrame, responses: str) -> pd.DataFrame:
    """The positions of all, of right or of wrong responses.

    Args:
        tokens: A token table of N rows; for a side with the column `correct` (1, 0 or NaN).
        responses: `all`, `right` or `wrong`. Responses that are not judged belong to neither side.

    Returns:
        The rows in their order, numbered anew; the table itself for `all`.

    Raises:
        DiagnosticsError: The name is unknown, the table has no verdicts, or none of that kind.
    """
    require_known(responses)
    if responses == ALL:
        return tokens
    require_columns(tokens, ("correct",), what=f"A table of {responses} responses")
    chosen = tokens[tokens["correct"] == SIDES[responses]]
    if chosen.empty:
        raise DiagnosticsError(
            f"No position is of a {responses} response: {int(tokens['correct'].notna().sum())} of"
            f" {len(tokens)} positions are judged. Judge more responses, with --verifier or the"
            " column `correct`."
        )
    return chosen.reset_index(drop=True)


def count_responses(tokens: pd.DataFrame) -> dict[str, dict[str, int]]:
    """How much there is of right, wrong and not judged responses.

    Args:
        tokens: A token table with context_id, prompt_id and, where any response was judged,
            `correct`.

    Returns:
        By `right`, `wrong` and `not judged`: prompts, contexts and positions.
    """
    correct = tokens["correct"] if "correct" in tokens else pd.Series(float("nan"), tokens.index)
    masks = {name: correct == value for name, value in SIDES.items()}
    masks["not judged"] = correct.isna()
    return {
        name: {
            "prompts": int(tokens["prompt_id"][mask].nunique()),
            "contexts": int(tokens["context_id"][mask].nunique()),
            "positions": int(mask.sum()),
        }
        for name, mask in masks.items()
    }


def too_few(side: str, prompts: int, least: int) -> str:
    """Why nothing is concluded from a side; empty where it has prompts enough.

    Args:
        side: right or wrong.
        prompts: Prompts that have such a response.
        least: Prompts below which nothing is judged.
    """
    if prompts >= least:
        return ""
    have = "prompt has" if prompts == 1 else "prompts have"
    return f"Not judged: {prompts} {have} a {side} response, of at least {least}."
