"""How much of a student's text a teacher with another tokenizer can grade.

The teacher reads the same bytes in other tokens. Position t, the prefix before response token t, is
*comparable* where that prefix ends on a boundary of the teacher's tokens too; only there does the
teacher have a next-token distribution for it. The sampled token is *spelled* where it also ends on
such a boundary: the teacher then writes it as one token, or as a short chain whose probability is a
product of conditionals. A token among the student's most likely ones is spelled where the teacher
has a token of the same bytes, or tokenizes them to a chain of at most `chains` tokens.

    positions_comparable    comparable positions / positions
    sampled_spelled         positions whose token is spelled / positions
    sampled_one_token       the same by one token of the teacher's
    top_mass_spelled        student mass on spelled tokens of its top K / its mass on the top K,
                            summed over comparable positions
    top_mass_one_token      the same by one token of the teacher's
    top_mass                student mass on its top K, mean over comparable positions
    vocabulary_one_token    share of the student's vocabulary that is one token of the teacher's

No model runs: two tokenizers and frozen contexts are enough, and the rows about the student's top K
need the lists that scoring left (`tops.parquet`). Where both models are given, they run once, and
the means of `contexts.byte_bounds` over comparable positions are added: bounds of compatibility and
of both divergences. They are about comparable positions alone, which are not like the others.

Special tokens are compared by name, and cut a response into pieces that are tokenized apart. Where
the teacher has no token of that name, nothing behind it is comparable, since the teacher cannot
read the prefix. A response is tokenized apart from its prompt. Bytes that are no UTF-8, such as a
character that was cut by the end of a response, and pieces that the teacher's tokenizer does not
write back as they were are not comparable, and counted.

Reference: the alignment of texts by boundaries is that of cross-tokenizer distillation in TRL's
GOLD trainer and of arXiv 2605.07711; the shares are this project's own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import PromptClusters, of_sums
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.selection import token_type
from diagnostics.contexts.byte_bounds import COLUMNS, Spellings, context_bounds, too_long
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import require_as_written
from diagnostics.core.schema import read_parquet, read_tokens, require_columns
from diagnostics.core.settings import with_settings
from diagnostics.core.types import Bank, Context, read_bank
from diagnostics.models.loading import load_model, load_tokenizer
from diagnostics.models.readout import Readout
from diagnostics.models.token_bytes import TokenBytes

log = logging.getLogger("diagnostics")
CHAINS = 4
"""Most teacher tokens that spell one of the student's: longer products say little of one token."""
TOP_LISTS = ("context_id", "position", "student_top_ids", "student_top_p")
MEASURES = {
    "positions_comparable": ("comparable", "counted"),
    "sampled_spelled": ("spelled", "counted"),
    "sampled_one_token": ("one_token", "counted"),
    "top_mass_spelled": ("top_spelled", "top_mass"),
    "top_mass_one_token": ("top_one_token", "top_mass"),
    "top_mass": ("top_mass", "listed"),
    **{name: (name, "bounded") for name in COLUMNS},
}
"""What is summed over positions, and over what, for each share of the table."""
COUNTED = {
    "undecodable": "lie in, or behind, bytes that are no UTF-8: not comparable",
    "rewritten": (
        "lie in, or behind, text that the teacher's tokenizer does not write back as it was: not"
        " comparable"
    ),
    "unreadable": ("lie behind a special token that the teacher's tokenizer lacks: not comparable"),
    "over_long": "are beyond a model's window: not bounded",
}
"""Positions that are left out for other reasons than a boundary, in the words of the log."""
VOCABULARY = "vocabulary_one_token"
ALL = "all"


@dataclass
class Coverage:
    """What `tokenizer_coverage` returns."""

    table: pd.DataFrame
    """The shares, with intervals over prompts."""
    positions: pd.DataFrame
    """One row per position."""
    counts: dict[str, int]
    """Positions that are left out for other reasons than a boundary, by the names of COUNTED."""

    def __repr__(self) -> str:
        return f"<Coverage of {len(self.positions):,} positions>\n{self.table.to_string()}"

    def _repr_html_(self) -> str:
        return self.table.to_html(float_format="%.3g")


@with_settings(bootstrap=Bootstrap)
def tokenizer_coverage(
    student: Any,
    teacher: Any,
    bank: Bank,
    *,
    tops: pd.DataFrame | None = None,
    chains: int = CHAINS,
    models: tuple[Readout, Readout] | None = None,
    k: int = 16,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> Coverage:
    """Report how much of frozen responses a teacher with another tokenizer can grade.

    Args:
        student: Tokenizer that the responses' ids are of.
        teacher: Tokenizer of the teacher.
        bank: The frozen contexts.
        tops: The student's most likely tokens, as `score_with_tops` returns them, with the columns
            context_id, position, student_top_ids and student_top_p; None leaves their rows out.
        chains: Most teacher tokens that may spell one of the student's.
        models: Student and teacher, to bound compatibility and divergence too; None runs no model.
        k: Number of the student's likeliest tokens whose strings these bounds are about.
        bootstrap: Draws, level and seed of the intervals.
        settings: Fields of `bootstrap`.

    Returns:
        The table with columns measure, token_type (`all` or one of `selection.token_type`),
        exactness (`exact`, or what a bound is), estimate (a share, or nats of a divergence), low,
        high, positions and prompts; and one row per position with its context_id, prompt_id,
        position, token, is_special, comparable, teacher_tokens (the number that spell the sampled
        token, 0 where it is not spelled) and, with `tops`, top_mass, top_spelled and top_one_token
        (probabilities), and with `models` the columns of `byte_bounds.COLUMNS`, NaN where the
        position is not comparable.

    Raises:
        DiagnosticsError: The bank is empty or has ids that the student's tokenizer lacks, the bytes
            of a tokenizer's tokens cannot be told, or a list is malformed.
    """
    _require_chains(chains)
    reader = _Reader(
        TokenBytes(student, "student's tokenizer"),
        TokenBytes(teacher, "teacher's tokenizer"),
        chains,
    )
    _require_ids(bank, len(reader.student))
    positions = pd.concat([reader.read(context) for context in bank], ignore_index=True)
    if tops is not None:
        positions = positions.assign(**reader.tops(positions, tops))
    if models is not None:
        positions = positions.assign(**reader.bounds(bank, models, k))
    table = _table(positions, bootstrap)
    counts = {name: reader.counts[name] for name in COUNTED}
    _say(counts, len(positions))
    return Coverage(
        pd.concat([table, _vocabulary_row(reader)], ignore_index=True)[table.columns],
        positions,
        counts,
    )


def _require_chains(chains: int) -> None:
    if not isinstance(chains, int) or chains < 1:
        raise DiagnosticsError(
            f"chains is the most teacher tokens that spell one of the student's, 1 or more; got"
            f" {chains!r}."
        )


def _vocabulary_row(reader: _Reader) -> pd.DataFrame:
    """The share of the vocabulary that both tokenizers have, as a row of the table."""
    row = {
        "measure": VOCABULARY,
        "token_type": ALL,
        "exactness": "exact",
        "estimate": reader.vocabulary_share(),
        "prompts": 0,
        "positions": 0,
    }
    return pd.DataFrame([row])


def read_coverage(
    student: str,
    teacher: str,
    contexts: str,
    *,
    chains: int = CHAINS,
    k: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Coverage:
    """Report the coverage of a run's contexts, or of a file of contexts, from named tokenizers.

    Args:
        student: Folder or Hugging Face id of the student's tokenizer.
        teacher: The same of the teacher's.
        contexts: Run directory, whose lists of most likely tokens are used where it has them, or
            a file of frozen contexts.
        chains: Most teacher tokens that may spell one of the student's.
        k: Run both models too, and bound compatibility and divergence on the strings of so many of
            the student's likeliest tokens; None runs no model.
        device: Where the models run.
        dtype: Dtype of their weights.

    Returns:
        The report of `tokenizer_coverage`.

    Raises:
        DiagnosticsError: A file or a tokenizer cannot be read, and as `tokenizer_coverage`.
    """
    place = Path(contexts)
    run = place if place.is_dir() else None
    bank = read_bank(place if run is None else run / "contexts.parquet")
    lists = None if run is None else run / "tops.parquet"
    tops = None
    if lists is not None and lists.is_file():
        require_as_written(lists)
        tops = read_parquet(lists)
    scored = None if run is None else run / "scores.parquet"
    if tops is not None and scored is not None and scored.is_file():
        bank = bank.as_scored(read_tokens(scored))
    tokenizers = load_tokenizer(student), load_tokenizer(teacher)
    if k is None:
        return tokenizer_coverage(*tokenizers, bank, tops=tops, chains=chains)
    loaded = [
        Readout(load_model(source, dtype=dtype, device=device)) for source in (student, teacher)
    ]
    return tokenizer_coverage(
        *tokenizers, bank, tops=tops, chains=chains, models=(loaded[0], loaded[1]), k=k
    )


def _require_ids(bank: Bank, size: int) -> None:
    if not bank.positions:
        raise DiagnosticsError(
            f"The bank has {len(bank)} contexts and no response tokens. Sample longer responses, or"
            " check the file."
        )
    largest = max(max(context.response_ids, default=0) for context in bank)
    if largest >= size:
        raise DiagnosticsError(
            f"The contexts hold token id {largest}, and the student's tokenizer has {size} tokens."
            " Name the tokenizer that wrote them as the student's."
        )


def _say(counts: Mapping[str, int], positions: int) -> None:
    for name, why in COUNTED.items():
        if counts[name]:
            log.warning("%d of %d positions %s", counts[name], positions, why)


@dataclass
class Reading:
    """A response in the teacher's tokens."""

    before: list[int | None]
    """For each of the student's tokens, the number of the teacher's before it; None where it begins
    on no boundary of theirs."""
    lengths: list[int]
    """Number of the teacher's tokens that spell it there; 0 where none do."""
    reasons: list[str]
    """Why it is not comparable, where no boundary is to blame."""
    ids: list[int]
    """The response in the teacher's tokens, as far as it can be read."""

    @classmethod
    def of_length(cls, count: int) -> Reading:
        """A reading of so many tokens, none of them read yet."""
        return cls([None] * count, [0] * count, [""] * count, [])


class _Reader:
    """Reads responses of the student as the teacher would."""

    def __init__(self, student: TokenBytes, teacher: TokenBytes, chains: int):
        self.student, self.teacher, self.chains = student, teacher, chains
        self.counts: Counter[str] = Counter()
        self._lengths: dict[int, int] = {}

    def read(self, context: Context) -> pd.DataFrame:
        """One row per position of a context."""
        reading = self.aligned(context.response_ids)
        at = list(context.positions)
        self.counts.update(reading.reasons[t] for t in at)
        ids = [context.response_ids[t] for t in at]
        return pd.DataFrame(
            {
                "context_id": context.context_id,
                "prompt_id": context.prompt_id,
                "position": range(len(at)),
                "token_id": ids,
                "token": [self.student.of(i).decode(errors="replace") for i in ids],
                "is_special": [i in self.student.special for i in ids],
                "comparable": [reading.before[t] is not None for t in at],
                "teacher_tokens": [reading.lengths[t] for t in at],
            }
        )

    def aligned(self, ids: tuple[int, ...]) -> Reading:
        """A response in the teacher's tokens, and where these meet the student's."""
        reading = Reading.of_length(len(ids))
        for first, last in _pieces(ids, self.student.special):
            if ids[first] in self.student.special:
                why = self._read_special(reading, ids[first], first)
            else:
                why = self._read_text(reading, ids[first:last], first)
            if why:  # the teacher cannot read the prefix of what follows
                reading.reasons[last:] = [why] * (len(ids) - last)
                break
        return reading

    def _read_special(self, reading: Reading, token_id: int, t: int) -> str:
        found = self._special(token_id)
        reading.before[t] = len(reading.ids)
        if found is None:
            return "unreadable"
        reading.lengths[t] = 1
        reading.ids.append(found)
        return ""

    def _read_text(self, reading: Reading, ids: tuple[int, ...], first: int) -> str:
        """Read a run of ordinary tokens; returns why the teacher cannot read all of it."""
        pieces = [self.student.of(i) for i in ids]
        text = b"".join(pieces)
        readable = _utf8_prefix(text)
        found = self.teacher.encode(text[:readable])
        ends, place = {0: len(reading.ids)}, 0
        for number, (_, piece) in enumerate(found or (), len(reading.ids) + 1):
            place += len(piece)
            ends[place] = number
        place = 0
        for t, piece in enumerate(pieces, first):
            start, place = place, place + len(piece)
            # the token that begins where the last readable character ends has a whole prefix
            reading.reasons[t] = (
                "undecodable" if start > readable else "rewritten" if found is None else ""
            )
            if not reading.reasons[t]:
                reading.before[t] = ends.get(start)
            if reading.before[t] is not None and piece and place in ends:
                reading.lengths[t] = ends[place] - ends[start]
        reading.ids += [token_id for token_id, _ in found or ()]
        return "rewritten" if found is None else "undecodable" if readable < len(text) else ""

    def _special(self, token_id: int) -> int | None:
        """The teacher's special token of the same name."""
        return self.teacher.special_names.get(self.student.of(token_id))

    def spelling(self, token_id: int) -> int:
        """Number of teacher tokens that spell a student token by itself; 0 for more than `chains`,
        or where there is no spelling.
        """
        if token_id not in self._lengths:
            self._lengths[token_id] = self._spelling(token_id)
        return self._lengths[token_id]

    def _spelling(self, token_id: int) -> int:
        if token_id in self.student.special:
            return int(self._special(token_id) is not None)
        text = self.student.of(token_id)
        if not text or text in self.teacher.by_bytes:
            return int(bool(text))
        found = self.teacher.encode(text)
        return len(found) if found is not None and len(found) <= self.chains else 0

    def vocabulary_share(self) -> float:
        """Share of the student's ordinary tokens that are one token of the teacher's."""
        own = self.student.by_bytes
        return len(own.keys() & self.teacher.by_bytes.keys()) / max(1, len(own))

    def bounds(self, bank: Bank, models: tuple[Readout, Readout], k: int) -> dict[str, np.ndarray]:
        """Bounds of compatibility and divergence [N]; NaN at positions that are not comparable."""
        sides = (self.student, self.teacher)
        spellings = tuple(
            Spellings(tokens, model.full_vocabulary)
            for tokens, model in zip(sides, models, strict=True)
        )
        rows: list[tuple[float, ...]] = []
        for context in bank:
            rows += self._bounds(context, models, (spellings[0], spellings[1]), k)
        values_N4 = np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))
        return dict(zip(COLUMNS, values_N4.T, strict=True))

    def _bounds(
        self,
        context: Context,
        models: tuple[Readout, Readout],
        spellings: tuple[Spellings, Spellings],
        k: int,
    ) -> list[tuple[float, ...]]:
        reading = self.aligned(context.response_ids)
        aligned = {
            t: (t, before) for t in context.positions if (before := reading.before[t]) is not None
        }
        undefined = (np.nan,) * len(COLUMNS)
        if any(too_long(models, context, reading.ids, self.teacher.tokenizer)):
            self.counts["over_long"] += len(aligned)
            return [undefined] * len(context.positions)
        found = context_bounds(models, spellings, context, list(aligned.values()), reading.ids, k=k)
        known = dict(zip(aligned, found, strict=True))
        return [known.get(t, undefined) for t in context.positions]

    def tops(self, positions: pd.DataFrame, tops: pd.DataFrame) -> dict[str, np.ndarray]:
        """The student's mass on its top K, and on what of it is spelled, at each position; NaN
        where the position has no list.
        """
        require_columns(tops, TOP_LISTS, what="A table of most likely tokens for a coverage report")
        lists = tops.drop_duplicates(["context_id", "position"]).set_index(
            ["context_id", "position"]
        )[list(TOP_LISTS[2:])]
        wanted = pd.MultiIndex.from_frame(positions[["context_id", "position"]])
        found = lists.reindex(wanted)
        rows = [
            self._top(ids, shares) for ids, shares in zip(*(found[name] for name in TOP_LISTS[2:]))
        ]
        values_N3 = np.array(rows, dtype=np.float64).reshape(len(positions), 3)
        return dict(zip(("top_mass", "top_spelled", "top_one_token"), values_N3.T, strict=True))

    def _top(self, ids: Any, shares: Any) -> tuple[float, float, float]:
        if not isinstance(ids, Iterable) or not len(list(ids)):
            return (np.nan,) * 3
        lengths = np.array([self.spelling(int(i)) for i in ids])
        shares_K = np.asarray(shares, dtype=np.float64)
        return (
            float(shares_K.sum()),
            float(shares_K[lengths > 0].sum()),
            float(shares_K[lengths == 1].sum()),
        )


def _pieces(ids: tuple[int, ...], special: frozenset[int]) -> list[tuple[int, int]]:
    """First and last index of each special token, and of each run of others."""
    found: list[tuple[int, int]] = []
    for t, token in enumerate(ids):
        joins = found and token not in special and ids[found[-1][0]] not in special
        if joins:
            found[-1] = (found[-1][0], t + 1)
        else:
            found.append((t, t + 1))
    return found


def _utf8_prefix(text: bytes) -> int:
    """Number of bytes before the first that is no UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(text)


def _table(positions: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """The shares by token type, with intervals over prompts."""
    clusters = PromptClusters(positions["prompt_id"], bootstrap=bootstrap)
    columns = _summed(positions)
    kinds = token_type(positions)
    groups = [ALL, *sorted(set(kinds))]
    rows = []
    for measure, (part, whole) in MEASURES.items():
        if part not in columns:
            continue
        most = np.inf if "kl" in measure else 1.0
        for kind in groups:
            mask = columns[whole] > 0
            mask &= (kinds == kind) | (kind == ALL)
            rows.append(
                {"measure": measure, "token_type": kind, "exactness": _exactness(measure)}
                | _share(columns[part], columns[whole], mask, clusters, bootstrap.level, most=most)
            )
    return pd.DataFrame(rows)


def _exactness(measure: str) -> str:
    """What a measure says of the quantity that it is named after."""
    return {"least": "lower bound", "most": "upper bound"}.get(measure.rpartition("_")[2], "exact")


def _summed(positions: pd.DataFrame) -> dict[str, np.ndarray]:
    """What the shares are sums of, by the names of MEASURES."""
    comparable = positions["comparable"].to_numpy(dtype=bool)
    lengths = positions["teacher_tokens"].to_numpy()
    columns = {
        "counted": np.ones(len(positions)),
        "comparable": comparable.astype(float),
        "spelled": (lengths > 0).astype(float),
        "one_token": (lengths == 1).astype(float),
    }
    if "top_mass" in positions:
        listed = comparable & positions["top_mass"].notna().to_numpy()
        columns["listed"] = listed.astype(float)
        for name in ("top_mass", "top_spelled", "top_one_token"):
            columns[name] = np.where(listed, positions[name], 0.0)
    if COLUMNS[0] in positions:
        bounded = positions[COLUMNS[0]].notna().to_numpy()
        columns["bounded"] = bounded.astype(float)
        for name in COLUMNS:
            columns[name] = np.where(bounded, positions[name], 0.0)
    return columns


def _share(
    part: np.ndarray,
    whole: np.ndarray,
    mask: np.ndarray,
    clusters: PromptClusters,
    level: float,
    *,
    most: float,
) -> dict[str, float]:
    """A ratio of sums over the masked positions, with its interval over prompts, cut to what the
    ratio can be: 0 to `most`.
    """
    sums = clusters.sums(np.where(mask, part, 0.0), np.where(mask, whole, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = of_sums(lambda s: s[..., :1] / s[..., 1:], sums, clusters, mask)[0]
    low, high = estimate.interval(level)
    return {
        "estimate": estimate.value,
        "low": max(low, 0.0) if np.isfinite(low) else np.nan,
        "high": min(high, most) if np.isfinite(high) else np.nan,
        "positions": estimate.positions,
        "prompts": estimate.prompts,
    }
