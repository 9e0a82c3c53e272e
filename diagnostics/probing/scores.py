"""The token table: every response position of frozen contexts, measured with a pair.

Contexts are grouped by length, padded on the right and sent through the backbones; only the states
that predict response tokens are kept, and `divergences` projects those chunk by chunk. The state at
index t - 1 predicts token t; only `_batch` relies on that. A teacher with a prompt of its own reads
that prompt and the same response. Its state for response token t therefore lies later by the
difference in the prompts' lengths; only `Batch.for_teacher` relies on that.

Axes: B contexts, T tokens, n response positions of a batch, N of the bank, H hidden size, V
vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards, progress, worked
from diagnostics.core.row_store import RowStore
from diagnostics.core.schema import AFTER, column, support_column, validate_tokens
from diagnostics.core.settings import with_settings
from diagnostics.core.types import Bank, Context
from diagnostics.measure import divergences, extras
from diagnostics.models import batch_size, topk_teacher
from diagnostics.models.batch_size import BATCH_TOKENS
from diagnostics.models.config import needs_whole_student
from diagnostics.models.pair import Pair
from diagnostics.models.readout import Readout, in_step
from diagnostics.models.special_tokens import count_dropped, log_dropped, special_ids
from diagnostics.models.weights import weights_sha256
from diagnostics.probing.config.scores import ScoreConfig

log = logging.getLogger("diagnostics")
PADDING = 0.25
"""Most padding of a batch of more than BATCH_TOKENS tokens, as a share of its tokens. Smaller ones
are filled whatever their padding is, since sorting by length alone keeps that small.
"""
TOPS = 5
"""Number of most likely tokens of each model that the token view shows."""
TOP_COLUMNS = ("student_top_", "teacher_top_")
"""What the columns of the most likely tokens begin with."""
TOP_TYPES = {
    f"{role}_{name}": pa.list_(kind)
    for role in ("student", "teacher")
    for name, kind in (("top", pa.string()), ("top_p", pa.float32()), ("top_ids", pa.int32()))
}
"""Types of the columns of lists, for a part of a table in which every list is empty."""
POSITIONS_TOGETHER = 2**16
"""Positions of a table that are in memory at a time, and in a row group of its file; a context is
never divided.
"""
NOT_FINITE_LIMIT = 0.01
"""Share of positions that may be excluded for NaN or infinite logits before scoring stops."""
NOT_FINITE_SHOWN = 64
"""Positions that are examined again to tell whose logits are not finite, where scoring stops."""


SCORED = "scored"
"""Attribute (`attrs`) of a token table: what `scored_with` gives."""
MEASURED_AFTER = {
    "forward_kl": False,
    "reverse_kl": False,
    "student_entropy": False,
    "compatibility": True,
}
"""Measurements that are kept of a checkpoint, and whether they are kept for every K."""
Teacher = Readout | topk_teacher.TopKTeacher
"""What grades the responses: a model, or a file of its log-probabilities."""


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
    """The contexts [B], which hold the teacher's prompts."""

    def teacher_states(self, teacher: Teacher) -> Tensor:
        """Teacher hidden states [n, H] at the response positions, given the teacher's own prompt.

        For a top-K teacher: its packed lists [n, 2K].
        """
        if isinstance(teacher, topk_teacher.TopKTeacher):
            return teacher.states(self.contexts, self.at_n)
        return self.for_teacher().states(teacher)

    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it: after its own prompts, with the same positions, tokens
        and rows.
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

        Out of memory, the contexts are run in two halves, repeatedly down to one context.
        """
        try:
            hidden_BTH = model.hidden(self.ids_BT, self.mask_BT)
            return hidden_BTH[
                self.at_n[0].to(hidden_BTH.device), self.at_n[1].to(hidden_BTH.device)
            ]
        except (torch.OutOfMemoryError, MemoryError) as error:
            if model.sharded:
                raise too_large(self.tokens) from error
            halves = self.halves(error)
        return torch.cat([half.states(model) for half in halves])

    def halves(self, error: BaseException) -> list[Batch]:
        """The batch in two halves, after it did not fit in memory.

        Raises DiagnosticsError where it is one context already.
        """
        contexts = len(self.ids_BT)
        if contexts == 1:
            raise DiagnosticsError(
                f"One context of {self.ids_BT.shape[1]} tokens does not fit in memory"
                f" ({str(error).splitlines()[0]}). Use --teacher-dtype bfloat16, --offload-teacher,"
                " a larger device or shorter contexts."
            ) from error
        log.warning("%d tokens do not fit in memory at once: halved", self.ids_BT.numel())
        return self.in_halves()

    def in_halves(self) -> list[Batch]:
        """The batch in two halves, or as it is where it is one context."""
        half = len(self.ids_BT) // 2
        return [self._part(0, half), self._part(half, len(self.ids_BT))] if half else [self]

    def with_contexts_of(self, wanted_n: Tensor, states_nH: Tensor) -> tuple[Batch, Tensor]:
        """The batch without the contexts in which no position is wanted, and its states.

        Args:
            wanted_n: Mask bool [n] with one position at least.
            states_nH: States [n, H], such as the teacher's.

        Returns:
            A batch of m positions, all of the contexts that stay, and their states [m, H].
        """
        stays_B = torch.zeros(len(self.ids_BT), dtype=torch.bool)
        stays_B[self.at_n[0][wanted_n]] = True
        if stays_B.all():
            return self, states_nH
        kept_n, width = stays_B[self.at_n[0]], int(self.mask_BT[stays_B].sum(1).max())
        place_B = stays_B.cumsum(0) - 1
        batch = Batch(
            self.ids_BT[stays_B, :width],
            self.mask_BT[stays_B, :width],
            (place_B[self.at_n[0][kept_n]], self.at_n[1][kept_n]),
            self.sampled_n[kept_n],
            self.rows_n[kept_n],
            tuple(context for context, stays in zip(self.contexts, stays_B.tolist()) if stays),
        )
        return batch, states_nH[kept_n.to(states_nH.device)]

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """The contexts of several batches, one batch after the other, as one batch."""
        if len(batches) == 1:
            return batches[0]
        width = max(batch.ids_BT.shape[1] for batch in batches)
        first = np.cumsum([0] + [len(batch.ids_BT) for batch in batches]).tolist()

        def wide(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([pad(t_BT, (0, width - t_BT.shape[1])) for t_BT in tensors])

        return Batch(
            wide(batch.ids_BT for batch in batches),
            wide(batch.mask_BT for batch in batches),
            (
                torch.cat([batch.at_n[0] + start for batch, start in zip(batches, first)]),
                torch.cat([batch.at_n[1] for batch in batches]),
            ),
            torch.cat([batch.sampled_n for batch in batches]),
            torch.cat([batch.rows_n for batch in batches]),
            tuple(context for batch in batches for context in batch.contexts),
        )

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


def too_large(tokens: int) -> DiagnosticsError:
    """The error for a batch that does not fit where a model is sharded."""
    return DiagnosticsError(
        f"{tokens} tokens do not fit beside a sharded model, whose processes cannot halve a batch"
        " one by one. Lower --batch-tokens."
    )


def chosen_batch_tokens(pair: Pair, asked: int | None, *, use: batch_size.Use = "score") -> int:
    """Tokens in one forward pass of a pair's models: what was asked for, or what memory holds.

    Args:
        pair: Student and teacher, on their devices.
        asked: A number, or None to choose one.
        use: Whether the passes are run for their results alone, or for a gradient.
    """
    if asked is not None:
        return asked
    # a teacher whose layers are released is not loaded again for a gradient, which is the student's
    both = [pair.student] if use == "gradient" else [pair.student, pair.teacher]
    run = [readout.model for readout in both if isinstance(readout, Readout)]
    return batch_size.choose(asked, run, use=use)


def batches(
    bank: Bank, *, batch_tokens: int = BATCH_TOKENS, keep: np.ndarray | None = None
) -> list[Batch]:
    """Group contexts of similar length into batches.

    Args:
        bank: The frozen contexts, N response positions in all.
        batch_tokens: Most tokens in a batch, padding included; a longer context has its own batch.
        keep: Mask bool [N]; other positions, and contexts without a marked one, are left out.

    Returns:
        The batches, shortest contexts first.
    """
    return list(plans(bank, batch_tokens=batch_tokens, keep=keep))


def plans(
    bank: Bank, *, batch_tokens: int = BATCH_TOKENS, keep: np.ndarray | None = None
) -> BatchPlans:
    """The batches of `batches`, each of which is made when it is asked for."""
    starts = np.cumsum([0] + [len(context.sampled_ids) for context in bank])
    lengths = [context.longest for context in bank]
    wanted = [
        i
        for i in range(len(bank))
        if starts[i + 1] > starts[i] and (keep is None or keep[starts[i] : starts[i + 1]].any())
    ]
    groups: list[list[int]] = []
    tokens = 0
    for i in sorted(wanted, key=lambda i: (lengths[i], i)):
        if not groups or _is_full(len(groups[-1]) + 1, lengths[i], tokens, batch_tokens):
            groups.append([])
            tokens = 0
        groups[-1].append(i)
        tokens += lengths[i]
    return BatchPlans(bank, starts, keep, groups)


@dataclass(frozen=True, eq=False)
class BatchPlans(Sequence[Batch]):
    """Batches of a bank that take no memory until they are asked for."""

    bank: Bank
    starts: np.ndarray
    """First row of each context."""
    keep: np.ndarray | None
    groups: list[list[int]]
    """Numbers of the contexts of each batch."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number):
        group = self.groups[number]
        return _batch([self.bank[i] for i in group], [self.starts[i] for i in group], self.keep)

    def of(self, numbers: Iterable[int]) -> BatchPlans:
        """Some of the batches, by number."""
        return replace(self, groups=[self.groups[number] for number in numbers])

    def tokens(self, number: int) -> int:
        """Tokens in a batch's forward pass, padding included."""
        group = self.groups[number]
        return len(group) * max(len(self.bank[i].ids) for i in group)

    @property
    def positions(self) -> int:
        """Positions of all batches."""
        return sum(len(self.rows(number)) for number in range(len(self)))

    def rows(self, number: int) -> np.ndarray:
        """Rows of the token table that a batch's contexts have."""
        group = self.groups[number]
        rows_n = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in group])
        return rows_n if self.keep is None else rows_n[self.keep[rows_n]]


def _is_full(contexts: int, longest: int, tokens: int, batch_tokens: int) -> bool:
    """Whether a batch of so many contexts, with the one of `longest` tokens added to those of
    `tokens` in all, would be too large, or large and too full of padding.
    """
    area = contexts * longest
    return area > batch_tokens or (area > BATCH_TOKENS and area - tokens - longest > PADDING * area)


def _batch(contexts: Sequence[Context], starts: Sequence[int], keep: np.ndarray | None) -> Batch:
    ids_BT, mask_BT = _padded([context.ids for context in contexts])
    counts = np.array([len(context.sampled_ids) for context in contexts])
    first = np.array([len(context.prompt_ids) for context in contexts])
    which_n = np.repeat(np.arange(len(contexts)), counts)
    rows_n = np.repeat(np.asarray(starts), counts) + _counted(counts)
    when_n = first[which_n] + response_indices(contexts) - 1
    sampled_n = sampled_tokens(contexts)
    kept = slice(None) if keep is None else keep[rows_n]
    return Batch(
        ids_BT,
        mask_BT,
        (torch.tensor(which_n[kept]), torch.tensor(when_n[kept])),
        torch.tensor(sampled_n[kept]),
        torch.tensor(rows_n[kept]),
        tuple(contexts),
    )


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, T] with zeros on the right, and the mask of real tokens [B, T]."""
    lengths = np.array([len(ids) for ids in sequences])
    mask_BT = np.arange(lengths.max()) < lengths[:, None]
    ids_BT = np.zeros(mask_BT.shape, dtype=np.int64)
    ids_BT[mask_BT] = np.concatenate([np.asarray(ids, np.int64) for ids in sequences])
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT.astype(np.int64))


@with_settings(config=ScoreConfig)
def score(
    pair: Pair,
    bank: Bank,
    config: ScoreConfig = ScoreConfig(),
    *,
    shards: Shards | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Measure every response position of the bank, exactly over the shared vocabulary.

    Args:
        pair: Student and teacher.
        bank: The frozen contexts, N response positions in all.
        config: Supports and batches; its fields may be given as keywords instead.
        shards: Where finished batches are kept, and taken from; nothing is kept by default.
        settings: Fields of `config`.

    Returns:
        The token table (`schema.SCHEMA`): one row per position in bank order, KLs and entropies in
        nats, and support-dependent columns also for each other K in `sweep`. A position with NaN
        or infinite logits is NaN in every measurement and counted in a warning.

    Raises:
        DiagnosticsError: The bank is empty, holds ids outside the vocabulary or a prompt without
            tokens, or more than 1 % of its positions have NaN or infinite logits.
    """
    return _joined(measure_bank(pair, bank, config, shards=shards).tokens())


def score_after(
    pair: Pair, bank: Bank, config: ScoreConfig = ScoreConfig(), *, shards: Shards | None = None
) -> pd.DataFrame:
    """Measure the bank again with a trained student.

    Args:
        pair: The pair with the trained student in the student's place.
        bank: The frozen contexts, N response positions in all.
        config: Supports and batches.
        shards: Where finished batches are kept, and taken from; nothing is kept by default.

    Returns:
        One row per position in bank order, with context_id, position and, for each of
        `MEASURED_AFTER`, the column `<name>_after`, or `<name>_k<K>_after` for another K.

    Raises:
        DiagnosticsError: As `score`.
    """
    measured = measure_bank(pair, bank, config, shards=shards)
    return _joined(as_after(part, config) for part in measured.tokens())


def as_after(measured: pd.DataFrame, config: ScoreConfig) -> pd.DataFrame:
    """The columns of a trained student, from a token table that was measured with it.

    Args:
        measured: The token table, or a part of it.
        config: The supports of the measurement.

    Returns:
        The columns of `score_after`.
    """
    columns = {
        support_column(f"{name}{AFTER}", k): measured[support_column(name, k)]
        for name, by_support in MEASURED_AFTER.items()
        for k in (None, *(config.sweep if by_support else ()))
        if support_column(name, k) in measured
    }
    return measured[["context_id", "position"]].assign(**columns)


@with_settings(config=ScoreConfig)
def score_with_tops(
    pair: Pair,
    bank: Bank,
    config: ScoreConfig = ScoreConfig(),
    *,
    shards: Shards | None = None,
    **settings: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure as `score` does, and list each model's most likely tokens from the same pass.

    Args:
        pair: Student and teacher.
        bank: The frozen contexts, N response positions in all.
        config: Supports and batches; its fields may be given as keywords instead.
        shards: Where finished batches are kept, and taken from; nothing is kept by default.
        settings: Fields of `config`.

    Returns:
        The token table of `score`, equal in every bit; and for the token view one row per position
        with columns context_id, position and for `student` and `teacher` <model>_top (lists of at
        most TOPS tokens as text, most likely first), <model>_top_p (their probabilities, float32)
        and <model>_top_ids. The lists of a position with NaN or infinite logits are empty.

    Raises:
        DiagnosticsError: As `score` does.
    """
    measured = measure_bank(pair, bank, config, shards=shards, tops=TOPS)
    return _joined(measured.tokens()), _joined(measured.tops())


def _joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """One table of its parts, with the attributes of the first one."""
    tables = list(parts)
    if len(tables) == 1:
        return tables[0]
    whole = pd.concat(tables, ignore_index=True)
    whole.attrs = tables[0].attrs
    return whole


class MeasuredBank:
    """A bank that was measured, whose tables are made of some contexts at a time.

    Under several processes all go through the parts together, and get the same.

    Args:
        pair: Student and teacher.
        bank: The checked bank.
        config: How it was measured, the tokens in a forward pass included.
        store: The measurements of all rows.
    """

    def __init__(self, pair: Pair, bank: Bank, config: ScoreConfig, store: RowStore):
        assert config.batch_tokens is not None, "the size of the batches is decided before they run"
        self.pair, self.bank, self._store = pair, bank, store
        # what a whole table has or has not, whichever contexts a part is made of
        self._masked = bank.masked
        self._judged = any(context.correct is not None for context in bank)
        self._scored = scored_with(student_sha256(pair), config.batch_tokens)
        lists = [name for name in store.names if name.startswith(TOP_COLUMNS)]
        self._lists, self._numbers = lists, [name for name in store.names if name not in lists]
        self.not_finite = self._check_finite()

    def tokens(self) -> Iterator[pd.DataFrame]:
        """The token table (`score`) in parts, in bank order."""
        for part, first, last in self._parts():
            columns = self._store.take(first, last, self._numbers)
            keys = _keys(self.pair, part, masked=self._masked, judged=self._judged)
            table = validate_tokens(
                pd.concat([keys, pd.DataFrame(_restore_flags(columns))], axis=1)
            )
            table.attrs[SCORED] = self._scored
            yield table

    def tops(self) -> Iterator[pd.DataFrame]:
        """The most likely tokens of both models (`score_with_tops`) in the same parts."""
        for part, first, last in self._parts():
            lists = self._store.take(first, last, self._lists)
            yield pd.concat(
                [
                    _places(part),
                    *(_lists(self.pair, lists, role) for role in ("student", "teacher")),
                ],
                axis=1,
            )

    def _parts(self) -> Iterator[tuple[Bank, int, int]]:
        """Some consecutive contexts, their first row, and the row after their last one."""
        chosen: list[Context] = []
        first = last = 0
        for context in self.bank:
            count = len(context.sampled_ids)
            if last > first and last - first + count > POSITIONS_TOGETHER:
                yield Bank(tuple(chosen)), first, last
                chosen, first = [], last
            chosen.append(context)
            last += count
        if last > first:
            yield Bank(tuple(chosen)), first, last

    def _check_finite(self) -> int:
        """Refuse a bank with too many logits that are not finite, or warn of some.

        Returns the number of positions without a divergence.
        """
        names, bad, undefined = ("student_entropy", "teacher_entropy", "forward_kl"), [], 0
        for first, last in self._store.parts(POSITIONS_TOGETHER):
            student_n, teacher_n, divergence_n = self._store.take(first, last, names).values()
            bad.append(first + np.flatnonzero(~np.isfinite(student_n + teacher_n)))
            undefined += int(np.isnan(divergence_n).sum())
        _report_not_finite(np.concatenate(bad), self.pair, self.bank)
        return undefined


def _decided(pair: Pair, config: ScoreConfig) -> ScoreConfig:
    """The same configuration with the tokens in one forward pass."""
    return replace(config, batch_tokens=chosen_batch_tokens(pair, config.batch_tokens))


def student_sha256(pair: Pair) -> str:
    """The hash of the student's weights; that of the loaded ones where they are sharded now."""
    if pair.student.sharded:
        return str(pair.facts["student"]["weights_sha256"])
    return weights_sha256(pair.student.model)


def scored_with(student_sha256: str, batch_tokens: int) -> dict[str, str | int]:
    """What the bits of a token table rest on, beside bank, teacher, code and device: the hash of
    the student's weights, and the tokens in a forward pass, which decide the batches.
    """
    return {"student": student_sha256, "batch_tokens": batch_tokens}


def measure_bank(
    pair: Pair,
    bank: Bank,
    config: ScoreConfig = ScoreConfig(),
    *,
    shards: Shards | None = None,
    tops: int = 0,
) -> MeasuredBank:
    """Measure every response position, for tables that are made of some contexts at a time.

    In a run directory the measurements wait in a file, so that the memory that this takes grows
    with the contexts themselves and with nothing that is measured of them.

    Args:
        pair: Student and teacher.
        bank: The frozen contexts, N response positions in all.
        config: Supports and batches.
        shards: Where finished batches are kept, and taken from; nothing is kept by default.
        tops: Number of each model's most likely tokens to list.

    Returns:
        The measured bank.

    Raises:
        DiagnosticsError: As `score` does.
    """
    bank, config = _graded(pair, bank), _decided(pair, config)
    assert config.batch_tokens is not None, "the size of the batches is decided before they run"
    shards = shards or Shards()
    store = RowStore(bank.positions, shards.folder)
    planned = plans(bank, batch_tokens=config.batch_tokens)
    own = distributed.share(range(len(planned)), planned.tokens)
    todo = planned.of(number for number in own if not _taken_up(shards, planned, number, store))
    measure = _measure(pair, bank, config, tops=tops)
    measured = (
        (batch, measure(batch, *states)) for batch, *states in _forward(pair, todo, "score")
    )
    for batch, values in on_host(measured):
        shards.add(batch.rows_n.tolist(), values)
        store.put(batch.rows_n.numpy(), values)
    return MeasuredBank(pair, bank, config, store)


def _taken_up(shards: Shards, planned: BatchPlans, number: int, store: RowStore) -> bool:
    """Whether an interrupted run kept a batch, whose measurements are then in the store."""
    rows_n = planned.rows(number)
    found = shards.take(rows_n.tolist())
    if found is not None:
        store.put(rows_n, {str(name): found[name].to_numpy() for name in found})
    return found is not None


def on_host(
    measured: Iterable[tuple[Batch, Mapping[str, Tensor]]],
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Each batch with its measurements in main memory, float64 [n] by name.

    All measurements of a batch are copied at once. On CUDA the copy runs while the next batch is
    measured: a batch is handed out one later than it came.
    """
    waiting: tuple[Batch, _Copy] | None = None
    for batch, values in measured:
        copy = _Copy(values)
        if waiting is not None:
            yield waiting[0], waiting[1].arrays()
        waiting = batch, copy
        if not copy.is_under_way:
            yield batch, copy.arrays()
            waiting = None
    if waiting is not None:
        yield waiting[0], waiting[1].arrays()


class _Copy:
    """Measurements [n] by name on their way to main memory, as float64."""

    def __init__(self, values: Mapping[str, Tensor]):
        self.names = list(values)
        stacked_Mn = torch.stack([values_n.double() for values_n in values.values()])
        self.is_under_way = stacked_Mn.device.type == "cuda"
        self._values_Mn = stacked_Mn
        if self.is_under_way:
            self._values_Mn = torch.empty(stacked_Mn.shape, dtype=torch.float64, pin_memory=True)
            self._values_Mn.copy_(stacked_Mn, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(stacked_Mn.device))

    def arrays(self) -> dict[str, Any]:
        """The values by name, once they are there."""
        if self.is_under_way:
            self._copied.synchronize()
        # a copy, since a shard may keep one column of a batch longer than the others
        return dict(zip(self.names, self._values_Mn.cpu().numpy().copy()))


@torch.no_grad()
def measure_again(
    pair: Pair, bank: Bank, todo: Iterable[tuple[Batch, Tensor]], config: ScoreConfig
) -> dict[str, np.ndarray]:
    """Every measurement of some positions with the student as it is now.

    Args:
        pair: Student and teacher.
        bank: The frozen contexts, N response positions in all.
        todo: This process's batches, each with the teacher's states [n, H].
        config: Supports.

    Returns:
        By column name as in `score`, each [N] over all processes; 0 or False at a position that no
        batch has.

    Raises:
        DiagnosticsError: The student is sharded.
    """
    if pair.student.sharded:
        raise needs_whole_student("a selection that is measured anew")
    columns: dict[str, np.ndarray] = {}
    measure = _measure(pair, bank, config, tops=0)
    for batch, values in on_host(
        (batch, measure(batch, batch.states(pair.student), teacher_nH))
        for batch, teacher_nH in todo
    ):
        _fill(columns, batch, values, bank.positions)
        worked(len(batch.rows_n))
    return _restore_flags(_gathered(columns, bank.positions))


Measure = Callable[[Batch, Tensor, Tensor], Mapping[str, Tensor]]
"""From a batch and the states [n, H] of both models to the measurements [n] by name."""


def _measure(pair: Pair, bank: Bank, config: ScoreConfig, *, tops: int) -> Measure:
    """The measurement of a batch, for a teacher with full logits or one known by top-K lists."""
    student, teacher = pair.student, teacher_of(pair)
    k, sweep, student_dropped = config.k, tuple(config.sweep), _dropped(pair.student)
    extra = tuple(config.extra)
    if isinstance(teacher, topk_teacher.TopKTeacher):
        if extra:
            topk_teacher.refuse(teacher, f"The measurement {extra[0]}")
        depth = teacher.depth(bank)

        def measure_lists(batch: Batch, student_nH: Tensor, teacher_nH: Tensor):
            return topk_teacher.measure_hidden(
                student_nH,
                student.logits,
                teacher_nH,
                batch.sampled_n,
                depth=depth,
                k=k,
                sweep=sweep,
                tops=tops,
                student_dropped=student_dropped,
            )

        return measure_lists
    logits, teacher_dropped = teacher.logits, _dropped(teacher)

    def measure_logits(batch: Batch, student_nH: Tensor, teacher_nH: Tensor):
        return divergences.measure_hidden(
            student_nH,
            student.logits,
            teacher_nH,
            logits,
            batch.sampled_n,
            teacher_dropped=teacher_dropped,
            k=k,
            sweep=sweep,
            tops=tops,
            more=extras.asked(extra, k=k, sweep=sweep),
            student_dropped=student_dropped,
        )

    return measure_logits


def _lists(pair: Pair, lists: dict[str, np.ndarray], role: str) -> pd.DataFrame:
    """A model's most likely tokens as three columns of lists."""
    count = sum(name.startswith(f"{role}_top_") for name in lists) // 2
    ids_NK = np.stack([lists[f"{role}_top_{j}"] for j in range(count)], axis=1)
    shares_NK = np.stack([lists[f"{role}_top_{j}_p"] for j in range(count)], axis=1)
    known_N = np.isfinite(shares_NK).all(axis=1)
    distinct, codes = np.unique(np.nan_to_num(ids_NK).astype(np.int32), return_inverse=True)
    tokenizer: Any = pair.tokenizer
    texts = np.array([tokenizer.decode([token]) for token in distinct.tolist()], dtype=object)
    codes_NK = codes.reshape(ids_NK.shape)
    columns: dict[str, np.ndarray] = {
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
    columns: dict[str, np.ndarray], batch: Batch, values: Mapping[str, np.ndarray], positions: int
) -> None:
    for name in values:
        columns.setdefault(name, np.zeros(positions))[batch.rows_n.numpy()] = values[name]


def _not_kept(
    todo: list[Batch], shards: Shards, columns: dict[str, np.ndarray], positions: int
) -> list[Batch]:
    """Fill in the rows that an interrupted run kept; returns the batches that are left."""
    left = []
    for batch in todo:
        found = shards.take(batch.rows_n.tolist())
        if found is None:
            left.append(batch)
        else:
            _fill(columns, batch, {name: found[name].to_numpy() for name in found}, positions)
    return left


def local_batches(todo: list[Batch]) -> list[Batch]:
    """This process's batches."""
    return distributed.share(todo, lambda batch: batch.tokens)


def _gathered(columns: dict[str, np.ndarray], positions: int) -> dict[str, np.ndarray]:
    """Columns with the rows of all processes; a process without batches has no columns itself."""
    if distributed.world() == 1:
        return columns
    names = sorted(distributed.names(list(columns)))
    whole = distributed.sum_over_processes(
        np.stack([columns.get(name, np.zeros(positions)) for name in names])
    )
    return dict(zip(names, whole))


def teacher_of(pair: Pair) -> Teacher:
    """The pair's teacher. Raises DiagnosticsError for a pair that has a student alone."""
    if pair.teacher is None:
        raise DiagnosticsError(
            "This pair has only a student, which can sample responses but not grade them. Name a"
            " teacher, or a file of its log-probabilities."
        )
    return pair.teacher


def check_bank(pair: Pair, bank: Bank) -> Bank:
    """Return the bank with the positions that the pair can grade, or refuse it.

    Args:
        pair: Student and teacher.
        bank: The frozen contexts.

    Returns:
        The bank; without positions whose token is another special token for the teacher.

    Raises:
        DiagnosticsError: The pair has no teacher, the bank has no response token, a context has no
            prompt token or an id outside the shared vocabulary, or a top-K teacher lacks a list.
    """
    teacher = teacher_of(pair)
    bank = pair.graded(bank)
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
    if isinstance(teacher, topk_teacher.TopKTeacher):
        teacher.require(bank)
    return bank


def _graded(pair: Pair, bank: Bank) -> Bank:
    """The checked bank with the positions that the pair can grade; says what is left out."""
    graded = check_bank(pair, bank)
    if pair.dropped:
        log_dropped(count_dropped(bank, pair.dropped), bank.positions)
    return graded


@torch.no_grad()
def _forward(
    pair: Pair, todo: Sequence[Batch], description: str
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    shown = _with_progress(todo, description)
    if pair.offload_teacher:  # the student is whole then
        for batch, teacher_nH in zip(shown, teacher_states(pair, todo)):
            yield batch, batch.states(pair.student), teacher_nH
        return
    teacher = teacher_of(pair)
    for batch in in_step(shown, len(todo), [*_models(teacher), pair.student]):
        teacher_nH = batch.teacher_states(teacher)
        yield batch, batch.states(pair.student), teacher_nH


def _models(teacher: Teacher) -> list[Readout]:
    """The teacher, where it is a model that is run."""
    return [teacher] if isinstance(teacher, Readout) else []


def _with_progress(todo: Sequence[Batch], description: str) -> Iterator[Batch]:
    total = (
        todo.positions if isinstance(todo, BatchPlans) else sum(len(batch.rows_n) for batch in todo)
    )
    with progress(total=total, description=description) as bar:
        for batch in todo:
            yield batch
            bar.update(len(batch.rows_n))


@torch.no_grad()
def teacher_states(pair: Pair, todo: Sequence[Batch], *, on_host: bool = False) -> list[Tensor]:
    """The teacher's states for each batch, from one forward pass.

    With `offload_teacher` the two models take turns on the device, and the states wait in main
    memory.

    Args:
        pair: Student and teacher.
        todo: This process's batches.
        on_host: Whether the states wait in main memory although the models take no turns.

    Returns:
        One tensor [n, H] per batch; for a top-K teacher its packed lists [n, 2K].
    """
    teacher = teacher_of(pair)
    if not pair.offload_teacher:
        return [
            states_nH.cpu() if on_host else states_nH
            for batch in in_step(_with_progress(todo, "teacher"), len(todo), _models(teacher))
            for states_nH in [batch.teacher_states(teacher)]
        ]
    with pair.teachers_turn():
        return [batch.teacher_states(teacher).cpu() for batch in _with_progress(todo, "teacher")]


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
    """Measure the divergences with the student as it is now.

    Args:
        pair: Student and teacher.
        todo: This process's batches.
        teacher: The teacher's states [n, H] for each of them.
        positions: Number N of positions of the bank.
        description: What the progress bar says.
        js: Whether the Jensen-Shannon divergence is measured too.
        shards: Where finished batches are kept, and taken from; nothing is kept by default.

    Returns:
        KL(q||p) (teacher first), KL(p||q) and with `js` JS, each float64 [N] in nats over all
        processes; 0 at a position that no batch has.
    """
    shards, logits = shards or Shards(), teacher_of(pair).logits
    names = ("forward_kl", "reverse_kl", "js") if js else ("forward_kl", "reverse_kl")
    columns: dict[str, np.ndarray] = {name: np.zeros(positions) for name in names}
    left = {id(batch) for batch in _not_kept(todo, shards, columns, positions)}

    def measured() -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        shown = zip(_with_progress(todo, description), teacher)
        here = (each for each in shown if id(each[0]) in left)
        for batch, teacher_nH in in_step(here, len(left), [pair.student]):
            found = divergences.kl_pair_hidden(
                batch.states(pair.student), pair.student.logits, teacher_nH, logits, js=js
            )
            yield batch, dict(zip(names, found))

    for batch, values in on_host(measured()):
        shards.add(batch.rows_n.tolist(), values)
        _fill(columns, batch, values, positions)
    return tuple(distributed.sum_over_processes(np.stack(list(columns.values()))))


def _dropped(model: Readout) -> divergences.Logits | None:
    """Logits of the ids that are left out of the distributions, for a model that has any."""
    return model.dropped_logits if model.drops else None


def _keys(pair: Pair, bank: Bank, *, masked: bool, judged: bool) -> pd.DataFrame:
    """The columns of a token table that need no model.

    masked, judged: whether the table tells which response tokens are positions, and which responses
    are right, although no context of this bank may need it.
    """
    counts = np.array([len(context.sampled_ids) for context in bank])
    context_N = np.repeat(np.arange(len(bank)), counts)
    token_N = sampled_tokens(bank)
    distinct, code_N = np.unique(token_N, return_inverse=True)
    special, known = special_ids(pair.tokenizer), distinct.tolist()
    tokenizer: Any = pair.tokenizer

    # Texts are repeated in pandas' own form: making it anew takes longer than all the rest.
    def of_contexts(values: Iterable) -> pd.Series:
        return pd.Series(list(values)).take(context_N).reset_index(drop=True)

    def of_tokens(values: list) -> pd.Series:
        return pd.Series(values).take(code_N).reset_index(drop=True)

    return pd.DataFrame(
        {
            "context_id": of_contexts(context.context_id for context in bank),
            "prompt_id": of_contexts(context.prompt_id for context in bank),
            "position": _counted(counts),
            "response_length": counts[context_N],
            "token_id": token_N,
            "is_special": of_tokens([token in special for token in known]),
            **({"response_index": response_indices(bank.contexts)} if masked else {}),
            "token": of_tokens([tokenizer.decode([token]) for token in known]),
            **(_verdicts(bank, context_N) if judged else {}),
        }
    )


def _places(bank: Bank) -> pd.DataFrame:
    """The context and the position of every row, as a token table has them."""
    counts = np.array([len(context.sampled_ids) for context in bank])
    names = pd.Series([context.context_id for context in bank])
    kinds = {name: kind.dtype for name in ("position",) if (kind := column(name)) is not None}
    return pd.DataFrame(
        {
            "context_id": names.repeat(counts).reset_index(drop=True),
            "position": _counted(counts),
        }
    ).astype({"context_id": "str", **kinds})


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, … for each of the counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _verdicts(bank: Bank, context_N: np.ndarray) -> dict[str, np.ndarray]:
    """The column `correct` [N], NaN where a context was not judged."""
    verdicts = [np.nan if context.correct is None else context.correct for context in bank]
    return {"correct": np.array(verdicts, dtype=float)[context_N]}


def sampled_tokens(contexts: Iterable[Context]) -> np.ndarray:
    """The sampled token of every position [N], int64, in the order of a token table's rows."""
    return np.fromiter(
        (token for context in contexts for token in context.sampled_ids), dtype=np.int64
    )


def response_indices(contexts: Iterable[Context]) -> np.ndarray:
    """The index within its response of every position [N], int64, in the same order."""
    return np.concatenate([np.asarray(context.positions, dtype=np.int64) for context in contexts])


def lists_positions(bank: Bank, tokens: pd.DataFrame) -> bool:
    """Whether a token table's rows are the bank's positions in order, by context and token.

    Args:
        bank: The frozen contexts, N response positions in all.
        tokens: A table with the columns context_id and token_id.
    """
    if len(tokens) != bank.positions:
        return False
    if not np.array_equal(tokens["token_id"].to_numpy(), sampled_tokens(bank)):
        return False
    ids = tokens["context_id"].to_numpy()
    starts = np.cumsum([0] + [len(context.sampled_ids) for context in bank])
    return all(
        (ids[first:last] == context.context_id).all()
        for context, first, last in zip(bank, starts, starts[1:])
    )


def _restore_flags(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn indicator columns, which pass through float, back into bool.

    A position that was not scored is False in those and NaN in the others.
    """
    kinds = {name: column(name) for name in columns}
    flags = {name for name, kind in kinds.items() if kind is not None and kind.dtype == "bool"}
    return {
        name: np.nan_to_num(values).astype(bool) if name in flags else values
        for name, values in columns.items()
    }


def _report_not_finite(bad: np.ndarray, pair: Pair, bank: Bank) -> None:
    """Warn of these rows, or refuse a bank where they are too many."""
    if not len(bad):
        return
    starts = np.cumsum([0] + [len(context.sampled_ids) for context in bank])
    context = int(np.searchsorted(starts, bad[0], side="right")) - 1
    stops = len(bad) > NOT_FINITE_LIMIT * bank.positions
    of_student = _not_finite_of_student(pair, bank, bad[:NOT_FINITE_SHOWN] if stops else bad)
    where = (
        f"the first at position {bad[0] - starts[context]} of context {bank[context].context_id!r},"
        f" the {'student' if of_student[0] else 'teacher'}'s; of {len(of_student)} looked at,"
        f" {int(of_student.sum())} are the student's and {int((~of_student).sum())} the teacher's"
        " alone"
    )
    if stops:
        raise DiagnosticsError(
            f"{len(bad)} of {bank.positions} positions have NaN or infinite logits ({where}). Load"
            " the models in float32, or check their weights."
        )
    log.warning(
        "%d of %d positions have NaN or infinite logits and are excluded (%s)",
        len(bad),
        bank.positions,
        where,
    )


@torch.no_grad()
def _not_finite_of_student(pair: Pair, bank: Bank, rows: np.ndarray) -> np.ndarray:
    """Whether the student's logits are not finite, bool [rows]; otherwise the teacher's are not."""
    keep = np.zeros(bank.positions, dtype=bool)
    found = np.zeros(bank.positions, dtype=bool)
    keep[rows] = True
    for batch in batches(bank, keep=keep):
        logits_nV = pair.student.logits(batch.states(pair.student))
        whole_n = ~(logits_nV.isnan() | (logits_nV == torch.inf)).any(-1) & (
            logits_nV > -torch.inf
        ).any(-1)
        found[batch.rows_n.numpy()] = ~whole_n.cpu().numpy()
    return found[rows]
