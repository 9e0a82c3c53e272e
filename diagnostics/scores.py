"""Frozen contexts and a pair become the token table.

Contexts are grouped by length, padded on the right and sent through the backbones; only the states that
predict response tokens are kept, and `divergences` projects those chunk by chunk. The state at index t - 1
predicts token t: `_batch` is the only place that says so.

Axes: B contexts, T tokens, n response positions of a batch, N of the bank, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics import divergences
from diagnostics.pairs import Pair, Readout
from diagnostics.runs import progress
from diagnostics.types import Bank, Context, DiagnosticsError, validate_tokens

log = logging.getLogger("diagnostics")
BATCH_TOKENS = 8192
NOT_FINITE_LIMIT = 0.01
"""Share of positions that may be excluded for NaN or infinite logits before scoring stops."""


@dataclass(frozen=True)
class ScoreConfig:
    """How contexts are scored."""

    k: int = field(default=16, metadata={"help": "size of the top-K supports"})
    sweep: tuple[int, ...] = field(default=(4, 8, 32), metadata={"help": "other K measured in the same pass"})
    batch_tokens: int = field(default=BATCH_TOKENS, metadata={"help": "tokens in one forward pass, padding included"})


@dataclass(frozen=True)
class Batch:
    """Some contexts of a bank, padded on the right."""

    ids_BT: Tensor
    mask_BT: Tensor
    at_n: tuple[Tensor, Tensor]
    """Context and time index of the state that predicts each response token."""
    sampled_n: Tensor
    rows_n: Tensor
    """Rows of the token table that the positions fill."""

    def states(self, model: Readout) -> Tensor:
        """States [n, H] of the response positions, on the model's device."""
        hidden_BTH = model.hidden(self.ids_BT, self.mask_BT)
        return hidden_BTH[self.at_n[0].to(hidden_BTH.device), self.at_n[1].to(hidden_BTH.device)]


def batches(bank: Bank, *, batch_tokens: int = BATCH_TOKENS, keep: np.ndarray | None = None) -> list[Batch]:
    """Group contexts of like length into batches of at most `batch_tokens` tokens, padding included.

    keep: bool [N]; only positions that it marks are in the batches, and contexts without any are left out.
    """
    starts = np.cumsum([0] + [len(context.response_ids) for context in bank])
    wanted = [i for i in range(len(bank)) if starts[i + 1] > starts[i] and (keep is None or keep[starts[i] : starts[i + 1]].any())]
    groups: list[list[int]] = []
    for i in sorted(wanted, key=lambda i: (len(bank[i].ids), i)):
        if not groups or (len(groups[-1]) + 1) * len(bank[i].ids) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    return [_batch([bank[i] for i in group], [starts[i] for i in group], keep) for group in groups]


def _batch(contexts: Sequence[Context], starts: Sequence[int], keep: np.ndarray | None) -> Batch:
    width = max(len(context.ids) for context in contexts)
    ids_BT, mask_BT = torch.zeros(len(contexts), width, dtype=torch.long), torch.zeros(len(contexts), width, dtype=torch.long)
    which, when, rows, sampled = [], [], [], []
    for b, (context, start) in enumerate(zip(contexts, starts)):
        ids_BT[b, : len(context.ids)] = torch.tensor(context.ids)
        mask_BT[b, : len(context.ids)] = 1
        first = len(context.prompt_ids)
        for t, token in enumerate(context.response_ids):
            if keep is None or keep[start + t]:
                which.append(b), when.append(first + t - 1), rows.append(start + t), sampled.append(token)
    return Batch(ids_BT, mask_BT, (torch.tensor(which), torch.tensor(when)), torch.tensor(sampled), torch.tensor(rows))


def score(
    pair: Pair, bank: Bank, *, k: int = 16, sweep: Sequence[int] = (4, 8, 32), batch_tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Measure every response position of the bank, exactly over the shared vocabulary.

    Returns the token table (`types.SCHEMA`): one row a position, in bank order, KLs and entropies in nats;
    support-dependent columns also for each other K in `sweep`. A position with NaN or infinite logits is NaN
    in every measurement and counted in a warning. Raises DiagnosticsError for an empty bank, ids outside the
    vocabulary, a prompt without tokens, or more than 1 % such positions.
    """
    check_bank(pair, bank)
    columns: dict[str, np.ndarray] = {}
    for batch, student_nH, teacher_nH in _forward(pair, batches(bank, batch_tokens=batch_tokens), "score"):
        measured = divergences.measure_hidden(
            student_nH, pair.student.logits, teacher_nH, pair.teacher.logits, batch.sampled_n, k=k, sweep=tuple(sweep)
        )
        measured |= _dropped(pair, student_nH, teacher_nH)
        for name, values_n in measured.items():
            columns.setdefault(name, np.full(bank.positions, np.nan))[batch.rows_n.numpy()] = values_n.double().cpu().numpy()
    _check_finite(columns["student_entropy"] + columns["teacher_entropy"], bank)
    return validate_tokens(pd.concat([_keys(pair, bank), pd.DataFrame(_restore_flags(columns))], axis=1))


def check_bank(pair: Pair, bank: Bank) -> None:
    """Refuse a bank that the pair cannot score."""
    if not bank.positions:
        raise DiagnosticsError(f"The bank has {len(bank)} contexts and no response tokens. Sample longer responses, or check the file.")
    for context in bank:
        if not context.prompt_ids:
            raise DiagnosticsError(f"Context {context.context_id!r} has no prompt tokens, so its first response token cannot be predicted. Add a start token.")
        largest = max(context.ids)
        if largest >= pair.vocabulary or min(context.ids) < 0:
            raise DiagnosticsError(
                f"Context {context.context_id!r} holds token id {largest}, and the shared vocabulary has {pair.vocabulary}. "
                "The bank was written by another tokenizer; sample it again with this pair."
            )


@torch.no_grad()
def _forward(pair: Pair, todo: list[Batch], description: str) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    with progress(total=sum(len(batch.rows_n) for batch in todo), description=description) as bar:
        for batch in todo:
            yield batch, batch.states(pair.student), batch.states(pair.teacher)
            bar.update(len(batch.rows_n))


@torch.no_grad()
def teacher_states(pair: Pair, todo: list[Batch]) -> list[Tensor]:
    """The teacher's states [n, H] for each batch: one forward pass, kept for every later re-score."""
    with progress(total=sum(len(batch.rows_n) for batch in todo), description="teacher") as bar:
        states = []
        for batch in todo:
            states.append(batch.states(pair.teacher))
            bar.update(len(batch.rows_n))
    return states


@torch.no_grad()
def rescore(pair: Pair, todo: list[Batch], teacher: list[Tensor], *, positions: int, description: str) -> tuple[np.ndarray, np.ndarray]:
    """Forward KL (teacher first) and reverse KL [N] in nats with the student as it is now; NaN where not scored."""
    forward, reverse = np.full(positions, np.nan), np.full(positions, np.nan)
    with progress(total=sum(len(batch.rows_n) for batch in todo), description=description) as bar:
        for batch, teacher_nH in zip(todo, teacher):
            pairs_n = divergences.kl_pair_hidden(batch.states(pair.student), pair.student.logits, teacher_nH, pair.teacher.logits)
            for target, values_n in zip((forward, reverse), pairs_n):
                target[batch.rows_n.numpy()] = values_n.double().cpu().numpy()
            bar.update(len(batch.rows_n))
    return forward, reverse


def _dropped(pair: Pair, student_nH: Tensor, teacher_nH: Tensor) -> dict[str, Tensor]:
    """Mass that each model gives to ids outside the shared vocabulary; columns only for a model that has any."""
    dropped = {}
    for name, model, hidden_nH in (("student", pair.student, student_nH), ("teacher", pair.teacher, teacher_nH)):
        if model.full_vocabulary > model.vocabulary:
            dropped[f"{name}_dropped_mass"] = divergences.mass_outside(hidden_nH, model.logits, model.dropped_logits)
    return dropped


def _keys(pair: Pair, bank: Bank) -> pd.DataFrame:
    special = set(pair.tokenizer.all_special_ids)
    rows = [
        (context.context_id, context.prompt_id, position, len(context.response_ids), token, token in special)
        for context in bank
        for position, token in enumerate(context.response_ids)
    ]
    frame = pd.DataFrame(rows, columns=["context_id", "prompt_id", "position", "response_length", "token_id", "is_special"])
    texts = {token: pair.tokenizer.decode([token]) for token in frame["token_id"].unique()}
    return frame.assign(token=frame["token_id"].map(texts))


def _restore_flags(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Indicator columns pass through float; a position that was not scored counts as False there and NaN elsewhere."""
    from diagnostics.types import column

    return {name: np.nan_to_num(values).astype(bool) if column(name).dtype == "bool" else values for name, values in columns.items()}


def _check_finite(values: np.ndarray, bank: Bank) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return
    starts = np.cumsum([0] + [len(context.response_ids) for context in bank])
    context = int(np.searchsorted(starts, bad[0], side="right")) - 1
    first = f"the first at position {bad[0] - starts[context]} of context {bank[context].context_id!r}"
    if len(bad) > NOT_FINITE_LIMIT * len(values):
        raise DiagnosticsError(
            f"{len(bad)} of {len(values)} positions have NaN or infinite logits ({first}). "
            "Load the models in float32, or check their weights."
        )
    log.warning("%d of %d positions have NaN or infinite logits and are excluded (%s)", len(bad), len(values), first)
