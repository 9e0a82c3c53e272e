"""Frozen contexts and a pair become the token table.

Contexts are grouped by length, padded on the right and sent through the backbones; only the states
that predict response tokens are kept, and `divergences` projects those chunk by chunk. The state at
index t - 1 predicts token t: `_batch` is the only place that says so. A teacher with a prompt of
its own reads that and the same response: its state for response token t lies as much later as its
prompt is longer, and `Batch.for_teacher` is the only place that says so.

Axes: B contexts, T tokens, n response positions of a batch, N of the bank, H hidden size, V
vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.contexts.encoding import special_ids
from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, progress
from diagnostics.core.schema import validate_tokens
from diagnostics.core.types import Bank, Context
from diagnostics.measure import divergences
from diagnostics.models import topk_teacher
from diagnostics.models.pair import Pair, Readout

log = logging.getLogger("diagnostics")
BATCH_TOKENS = 8192
TOPS = 5
"""Likeliest tokens of each model that the token view shows."""
NOT_FINITE_LIMIT = 0.01
"""Share of positions that may be excluded for NaN or infinite logits before scoring stops."""
NOT_FINITE_SHOWN = 64
"""Positions that are looked at again, to say whose logits they are, where scoring stops."""


@dataclass(frozen=True)
class ScoreConfig:
    """How contexts are scored."""

    k: int = field(default=16, metadata={"help": "size of the top-K supports"})
    sweep: tuple[int, ...] = field(
        default=(4, 8, 32), metadata={"help": "other K measured in the same pass"}
    )
    batch_tokens: int = field(
        default=BATCH_TOKENS, metadata={"help": "tokens in one forward pass, padding included"}
    )


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
    contexts: tuple[Context, ...] = ()
    """The contexts [B], for what the teacher reads."""

    def teacher_states(self, teacher: Readout) -> Tensor:
        """The teacher's states [n, H] of the response positions, after the prompt that it reads; a
        listed teacher's lists.
        """
        if isinstance(teacher, topk_teacher.TopKTeacher):
            return teacher.states(self.contexts, self.at_n)
        return self.for_teacher().states(teacher)

    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it: the same positions, tokens and rows, after its own
        prompts.
        """
        if all(context.teacher_prompt_ids is None for context in self.contexts):
            return self
        ids_BT, mask_BT = _padded([context.teacher_ids for context in self.contexts])
        later_B = torch.tensor(
            [len(context.teacher_ids) - len(context.ids) for context in self.contexts]
        )
        which_n, when_n = self.at_n[0], self.at_n[1] + later_B[self.at_n[0]]
        assert torch.equal(ids_BT[which_n, when_n + 1], self.sampled_n), (
            "the teacher's sequence holds another response"
        )
        return Batch(ids_BT, mask_BT, (which_n, when_n), self.sampled_n, self.rows_n)

    def states(self, model: Readout) -> Tensor:
        """States [n, H] of the response positions, on the model's device.

        Out of memory, the contexts are run in two halves, again and again down to one.
        """
        try:
            hidden_BTH = model.hidden(self.ids_BT, self.mask_BT)
            return hidden_BTH[
                self.at_n[0].to(hidden_BTH.device), self.at_n[1].to(hidden_BTH.device)
            ]
        except (torch.OutOfMemoryError, MemoryError) as error:
            if model.sharded:
                raise DiagnosticsError(
                    f"{self.tokens} tokens do not fit beside a sharded teacher, whose processes"
                    " cannot halve a batch one by one. Lower --batch-tokens."
                ) from error
            halves = self.halves(error)
        return torch.cat([half.states(model) for half in halves])

    def halves(self, error: BaseException) -> list[Batch]:
        """The batch in two, after it did not fit. Raises DiagnosticsError where it is one context
        already.
        """
        contexts = len(self.ids_BT)
        if contexts == 1:
            raise DiagnosticsError(
                f"One context of {self.ids_BT.shape[1]} tokens does not fit in memory"
                f" ({str(error).splitlines()[0]}). Use --teacher-dtype bfloat16, --offload-teacher,"
                " a larger device or shorter contexts."
            ) from error
        log.warning("%d tokens do not fit in memory at once: halved", self.ids_BT.numel())
        return [self._part(0, contexts // 2), self._part(contexts // 2, contexts)]

    def _part(self, first: int, last: int) -> Batch:
        mine_n = (self.at_n[0] >= first) & (self.at_n[0] < last)
        width = int(self.mask_BT[first:last].sum(1).max())
        at_n = (self.at_n[0][mine_n] - first, self.at_n[1][mine_n])
        return Batch(
            self.ids_BT[first:last, :width],
            self.mask_BT[first:last, :width],
            at_n,
            self.sampled_n[mine_n],
            self.rows_n[mine_n],
            self.contexts[first:last],
        )

    @property
    def tokens(self) -> int:
        """Tokens in the forward pass, padding included."""
        return self.ids_BT.numel()


def batches(
    bank: Bank, *, batch_tokens: int = BATCH_TOKENS, keep: np.ndarray | None = None
) -> list[Batch]:
    """Group contexts of like length into batches of at most `batch_tokens` tokens, padding
    included.

    keep: bool [N]; only positions that it marks are in the batches, and contexts without any are
    left out."""
    starts = np.cumsum([0] + [len(context.response_ids) for context in bank])
    wanted = [
        i
        for i in range(len(bank))
        if starts[i + 1] > starts[i] and (keep is None or keep[starts[i] : starts[i + 1]].any())
    ]
    groups: list[list[int]] = []
    for i in sorted(wanted, key=lambda i: (bank[i].longest, i)):
        if not groups or (len(groups[-1]) + 1) * bank[i].longest > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    return [_batch([bank[i] for i in group], [starts[i] for i in group], keep) for group in groups]


def _batch(contexts: Sequence[Context], starts: Sequence[int], keep: np.ndarray | None) -> Batch:
    ids_BT, mask_BT = _padded([context.ids for context in contexts])
    which, when, rows, sampled = [], [], [], []
    for b, (context, start) in enumerate(zip(contexts, starts)):
        first = len(context.prompt_ids)
        for t, token in enumerate(context.response_ids):
            if keep is None or keep[start + t]:
                (
                    which.append(b),
                    when.append(first + t - 1),
                    rows.append(start + t),
                    sampled.append(token),
                )
    return Batch(
        ids_BT,
        mask_BT,
        (torch.tensor(which), torch.tensor(when)),
        torch.tensor(sampled),
        torch.tensor(rows),
        tuple(contexts),
    )


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], zeros on the right, and the mask of what is no filler."""
    width = max(map(len, sequences))
    ids_BT, mask_BT = torch.zeros(2, len(sequences), width, dtype=torch.long).unbind()
    for b, ids in enumerate(sequences):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
    return ids_BT, mask_BT


def score(
    pair: Pair,
    bank: Bank,
    *,
    k: int = 16,
    sweep: Sequence[int] = (4, 8, 32),
    batch_tokens: int = BATCH_TOKENS,
    shards: Shards | None = None,
) -> pd.DataFrame:
    """Measure every response position of the bank, exactly over the shared vocabulary.

    Returns the token table (`types.SCHEMA`): one row a position, in bank order, KLs and entropies
    in nats; support-dependent columns also for each other K in `sweep`. A position with NaN or
    infinite logits is NaN in every measurement and counted in a warning. shards: where finished
    batches are kept, and taken from. Raises DiagnosticsError for an empty bank, ids outside the
    vocabulary, a prompt without tokens, or more than 1 % such positions."""
    return _table(
        pair, bank, _columns(pair, bank, k=k, sweep=sweep, batch_tokens=batch_tokens, shards=shards)
    )


def score_with_tops(
    pair: Pair,
    bank: Bank,
    *,
    k: int = 16,
    sweep: Sequence[int] = (4, 8, 32),
    batch_tokens: int = BATCH_TOKENS,
    shards: Shards | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`score`, and from the same pass what each model would have said: its likeliest tokens, for
    the token view.

    Returns the token table, the same to the bit, and one row a position with the columns
    context_id, position and for `student` and `teacher` <model>_top (lists of at most TOPS tokens
    as text, likeliest first), <model>_top_p (their probabilities, float32) and <model>_top_ids. The
    lists of a position with NaN or infinite logits are empty."""
    columns = _columns(
        pair, bank, k=k, sweep=sweep, batch_tokens=batch_tokens, shards=shards, tops=TOPS
    )
    lists = {
        name: columns.pop(name)
        for name in list(columns)
        if name.startswith(("student_top_", "teacher_top_"))
    }
    tokens = _table(pair, bank, columns)
    return tokens, pd.concat(
        [
            tokens[["context_id", "position"]],
            *(_lists(pair, lists, role) for role in ("student", "teacher")),
        ],
        axis=1,
    )


def _table(pair: Pair, bank: Bank, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    _check_finite(columns["student_entropy"] + columns["teacher_entropy"], pair, bank)
    return validate_tokens(
        pd.concat([_keys(pair, bank), pd.DataFrame(_restore_flags(columns))], axis=1)
    )


def _columns(
    pair: Pair,
    bank: Bank,
    *,
    k: int,
    sweep: Sequence[int],
    batch_tokens: int,
    shards: Shards | None,
    tops: int = 0,
) -> dict[str, np.ndarray]:
    """Every measurement [N] by name, float64, over all processes."""
    check_bank(pair, bank)
    shards = shards or Shards()
    columns: dict[str, np.ndarray] = {}
    todo = _take_up(
        local_batches(batches(bank, batch_tokens=batch_tokens)), shards, columns, bank.positions
    )
    options = {
        "k": k,
        "sweep": tuple(sweep),
        "tops": tops,
        "student_dropped": _dropped(pair.student),
    }
    listed = isinstance(pair.teacher, topk_teacher.TopKTeacher)
    depth = pair.teacher.depth(bank) if listed else None
    for batch, student_nH, teacher_nH in _forward(pair, todo, "score"):
        if listed:
            measured = topk_teacher.measure_hidden(
                student_nH, pair.student.logits, teacher_nH, batch.sampled_n, depth=depth, **options
            )
        else:
            measured = divergences.measure_hidden(
                student_nH,
                pair.student.logits,
                teacher_nH,
                pair.teacher.logits,
                batch.sampled_n,
                teacher_dropped=_dropped(pair.teacher),
                **options,
            )
        values = {name: values_n.double().cpu().numpy() for name, values_n in measured.items()}
        shards.add(batch.rows_n.numpy(), values)
        _fill(columns, batch, values, bank.positions)
    return _gathered(columns, bank.positions)


def _lists(pair: Pair, lists: dict[str, np.ndarray], role: str) -> pd.DataFrame:
    """A model's likeliest tokens as three columns of lists."""
    count = sum(name.startswith(f"{role}_top_") for name in lists) // 2
    ids_NK = np.stack([lists[f"{role}_top_{j}"] for j in range(count)], axis=1)
    shares_NK = np.stack([lists[f"{role}_top_{j}_p"] for j in range(count)], axis=1)
    known_N = np.isfinite(shares_NK).all(axis=1)
    distinct, codes = np.unique(np.nan_to_num(ids_NK).astype(np.int32), return_inverse=True)
    texts = np.array([pair.tokenizer.decode([token]) for token in distinct.tolist()], dtype=object)
    codes_NK = codes.reshape(ids_NK.shape)
    columns = {
        "top": texts[codes_NK],
        "top_p": shares_NK.astype(np.float32),
        "top_ids": distinct[codes_NK],
    }
    return pd.DataFrame(
        {
            f"{role}_{name}": [row if known else row[:0] for row, known in zip(values, known_N)]
            for name, values in columns.items()
        }
    )


def _fill(
    columns: dict[str, np.ndarray], batch: Batch, values: Mapping[str, Sequence], positions: int
) -> None:
    for name in values:
        columns.setdefault(name, np.zeros(positions))[batch.rows_n.numpy()] = values[name]


def _take_up(
    todo: list[Batch], shards: Shards, columns: dict[str, np.ndarray], positions: int
) -> list[Batch]:
    """Fill in what an interrupted run measured; returns the batches that are left."""
    left = []
    for batch in todo:
        found = shards.take(batch.rows_n.numpy())
        if found is None:
            left.append(batch)
        else:
            _fill(columns, batch, {name: found[name].to_numpy() for name in found}, positions)
    return left


def local_batches(todo: list[Batch]) -> list[Batch]:
    """This process's batches."""
    return distributed.share(todo, lambda batch: batch.tokens)


def _gathered(columns: dict[str, np.ndarray], positions: int) -> dict[str, np.ndarray]:
    """Columns with every process's rows; a process without batches brings none of its own."""
    if distributed.world() == 1:
        return columns
    names = sorted(distributed.names(columns))
    whole = distributed.sum_over_processes(
        np.stack([columns.get(name, np.zeros(positions)) for name in names])
    )
    return dict(zip(names, whole))


def check_bank(pair: Pair, bank: Bank) -> None:
    """Refuse a bank that the pair cannot score."""
    if pair.teacher is None:
        raise DiagnosticsError(
            "This pair has a student alone, which can write and not be graded. Name a teacher, or a"
            " file of its log-probabilities."
        )
    if not bank.positions:
        raise DiagnosticsError(
            f"The bank has {len(bank)} contexts and no response tokens. Sample longer responses, or"
            " check the file."
        )
    for context in bank:
        if not context.prompt_ids or not len(context.teacher_ids) > len(context.response_ids):
            raise DiagnosticsError(
                f"Context {context.context_id!r} has no prompt tokens, so its first response token"
                " cannot be predicted. Add a start token."
            )
        largest = max(context.ids + context.teacher_ids)
        if largest >= pair.vocabulary or min(context.ids + context.teacher_ids) < 0:
            raise DiagnosticsError(
                f"Context {context.context_id!r} holds token id {largest}, and the shared"
                f" vocabulary has {pair.vocabulary}. The bank was written by another tokenizer;"
                " sample it again with this pair."
            )
    if isinstance(pair.teacher, topk_teacher.TopKTeacher):
        pair.teacher.require(bank)


@torch.no_grad()
def _forward(
    pair: Pair, todo: list[Batch], description: str
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    taught = (
        iter(teacher_states(pair, todo))
        if pair.offload_teacher
        else _teacher_states_in_turn(pair, todo)
    )
    for teacher_nH, batch in zip(taught, _with_progress(todo, description)):
        yield batch, batch.states(pair.student), teacher_nH


def _teacher_states_in_turn(pair: Pair, todo: list[Batch]) -> Iterator[Tensor]:
    """The teacher's states [n, H] for each batch. A sharded teacher needs every process at every
    pass: those with fewer batches run it on one token until all are through."""
    spare = max(distributed.total_lengths(len(todo))) - len(todo) if pair.teacher.sharded else 0
    for batch in todo:
        yield batch.teacher_states(pair.teacher)
    for _ in range(spare):
        pair.teacher.hidden(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))


def _with_progress(todo: list[Batch], description: str) -> Iterator[Batch]:
    with progress(total=sum(len(batch.rows_n) for batch in todo), description=description) as bar:
        for batch in todo:
            yield batch
            bar.update(len(batch.rows_n))


@torch.no_grad()
def teacher_states(pair: Pair, todo: list[Batch]) -> list[Tensor]:
    """The teacher's states [n, H] for each batch: one forward pass, kept for every later re-score.

    With `offload_teacher` the two models take turns on the device, and the states wait in main
    memory."""
    if not pair.offload_teacher:
        return [
            teacher_nH
            for teacher_nH, _ in zip(
                _teacher_states_in_turn(pair, todo), _with_progress(todo, "teacher")
            )
        ]
    with pair.teachers_turn():
        return [
            batch.teacher_states(pair.teacher).cpu() for batch in _with_progress(todo, "teacher")
        ]


@torch.no_grad()
def rescore(
    pair: Pair,
    todo: list[Batch],
    teacher: list[Tensor],
    *,
    positions: int,
    description: str,
    js: bool = False,
    shards: Shards | None = None,
) -> tuple[np.ndarray, ...]:
    """Forward KL (teacher first), reverse KL and with `js` JS [N] in nats with the student as it is
    now; 0 where not scored.

    todo, teacher: this process's batches and the teacher's states for them. shards: as for `score`.
    """
    shards, names = (
        shards or Shards(),
        (("forward_kl", "reverse_kl", "js") if js else ("forward_kl", "reverse_kl")),
    )
    columns: dict[str, np.ndarray] = {name: np.zeros(positions) for name in names}
    left = {id(batch) for batch in _take_up(todo, shards, columns, positions)}
    for batch, teacher_nH in zip(_with_progress(todo, description), teacher):
        if id(batch) not in left:
            continue
        measured = divergences.kl_pair_hidden(
            batch.states(pair.student), pair.student.logits, teacher_nH, pair.teacher.logits, js=js
        )
        values = {name: values_n.double().cpu().numpy() for name, values_n in zip(names, measured)}
        shards.add(batch.rows_n.numpy(), values)
        _fill(columns, batch, values, positions)
    return tuple(distributed.sum_over_processes(np.stack(list(columns.values()))))


def _dropped(model: Readout) -> divergences.Logits | None:
    """Logits of the ids outside the shared vocabulary, for a model that has any."""
    return model.dropped_logits if model.full_vocabulary > model.vocabulary else None


def _keys(pair: Pair, bank: Bank) -> pd.DataFrame:
    special = special_ids(pair.tokenizer)
    rows = [
        (
            context.context_id,
            context.prompt_id,
            position,
            len(context.response_ids),
            token,
            token in special,
        )
        for context in bank
        for position, token in enumerate(context.response_ids)
    ]
    frame = pd.DataFrame(
        rows,
        columns=[
            "context_id",
            "prompt_id",
            "position",
            "response_length",
            "token_id",
            "is_special",
        ],
    )
    texts = {token: pair.tokenizer.decode([token]) for token in frame["token_id"].unique()}
    return frame.assign(token=frame["token_id"].map(texts))


def _restore_flags(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Indicator columns pass through float; a position that was not scored counts as False there
    and NaN elsewhere.
    """
    from diagnostics.core.schema import column

    return {
        name: np.nan_to_num(values).astype(bool) if column(name).dtype == "bool" else values
        for name, values in columns.items()
    }


def _check_finite(values: np.ndarray, pair: Pair, bank: Bank) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return
    starts = np.cumsum([0] + [len(context.response_ids) for context in bank])
    context = int(np.searchsorted(starts, bad[0], side="right")) - 1
    stops = len(bad) > NOT_FINITE_LIMIT * len(values)
    of_student = _not_finite_of_student(pair, bank, bad[:NOT_FINITE_SHOWN] if stops else bad)
    where = (
        f"the first at position {bad[0] - starts[context]} of context {bank[context].context_id!r},"
        f" the {'student' if of_student[0] else 'teacher'}'s; of {len(of_student)} looked at,"
        f" {int(of_student.sum())} are the student's and {int((~of_student).sum())} the teacher's"
        " alone"
    )
    if stops:
        raise DiagnosticsError(
            f"{len(bad)} of {len(values)} positions have NaN or infinite logits ({where}). Load the"
            " models in float32, or check their weights."
        )
    log.warning(
        "%d of %d positions have NaN or infinite logits and are excluded (%s)",
        len(bad),
        len(values),
        where,
    )


@torch.no_grad()
def _not_finite_of_student(pair: Pair, bank: Bank, rows: np.ndarray) -> np.ndarray:
    """Whether the student's own logits are at fault [len(rows)]; where they are not, the teacher's
    are.
    """
    keep, found = np.zeros(bank.positions, dtype=bool), np.zeros(bank.positions, dtype=bool)
    keep[rows] = True
    for batch in batches(bank, keep=keep):
        logits_nV = pair.student.logits(batch.states(pair.student))
        whole_n = ~(logits_nV.isnan() | (logits_nV == torch.inf)).any(-1) & (
            logits_nV > -torch.inf
        ).any(-1)
        found[batch.rows_n.numpy()] = ~whole_n.cpu().numpy()
    return found[rows]
