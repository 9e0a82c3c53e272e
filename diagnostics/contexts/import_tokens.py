"""Token tables of other programs, under this project's names.

Read are our own tables and those of the scripts released with arXiv 2605.26844 (CSV, JSONL or
parquet; `released_columns` has their columns), a folder of the training code's rollouts, and two
tables of one bank: one from before training and one from after it.

Two tables are joined position by position, on the keys of both; what has no counterpart is left out
and counted. The measurements of the second table become `<column>_after`, and what it says of the
time before training is compared with the first. Warnings are also stored in `attrs["warnings"]`,
from which the study takes them. A column `k`, `top_k` or `topk` with one value, the length of the
lists of top ids, or the `config.json` beside rollouts gives the K of the table."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.contexts.paired_tokens import join_after
from diagnostics.contexts.released_columns import from_released
from diagnostics.contexts.released_gains import same_student
from diagnostics.contexts.released_keys import (
    IDS,
    NO_TOKEN,
    count_ambiguous,
    ids_as_text,
    is_mixed,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import TOKENS
from diagnostics.core.manifest import require_as_written
from diagnostics.core.rows import read_rows
from diagnostics.core.schema import validate_tokens
from diagnostics.models.special_tokens import special_ids

log = logging.getLogger("diagnostics")
ROLLOUT = re.compile(r"rollout_.*\.(csv|jsonl|parquet)")
"""Files of a folder that hold rollouts; the training code writes a summary beside them."""
CONFIG_K = "opd_topk_metrics_k"
"""The training code's name of K, in the config.json beside its rollouts."""


def read_tokens(
    path: str | Path, *, after: str | Path | None = None, tokenizer: Any = None
) -> pd.DataFrame:
    """Read a token table, ours or a released script's, which its columns tell apart.

    Args:
        path: CSV, JSONL or parquet file with one row per position; the directory of a run, whose
            tokens.parquet is read; or a folder of the training code's rollouts, which are taken in
            the order of their names.
        after: A table of the same positions with the trained student. Its measurements become
            `<column>_after`, and gains follow. None reads `path` alone.
        tokenizer: The pair's tokenizer, or its folder or Hugging Face id: `token` is then the text
            of each `token_id`, and `is_special` is known. None leaves what the table has.

    Returns:
        A table that `validate_tokens` accepts: `context_id`, `prompt_id`, `position`,
        `response_length`, `token_id`, `token`, and those measurements of the schema that the
        file has (divergences and entropies in nats, undefined values NaN). Columns without a
        counterpart are left out and named in the log. `attrs["warnings"]` lists [code, subject,
        message] for every warning, which is also logged; `attrs["k"]` is K where the file
        states it.

    Raises:
        DiagnosticsError: A file cannot be read or is neither kind of table; `after` shares no
            position with `path`, is of another student, or holds no divergence; or the tokenizer
            is another.

    Reference:
        The released columns are those of the scripts of arXiv 2605.26844.
    """
    found = _read(Path(path))
    tokens = _converted(found) if after is None else _joined(found, _read(Path(after)))
    return tokens if tokenizer is None else with_texts(tokens, tokenizer)


class _Table:
    """The rows of a file or folder, with what lies beside them."""

    def __init__(self, path: Path, frame: pd.DataFrame, exact: set[str], k: int | None):
        self.path, self.frame, self.exact, self.k = path, frame, exact, k

    @property
    def is_ours(self) -> bool:
        return "context_id" in self.frame

    @property
    def has_gaps(self) -> bool:
        """Whether a released table tells its samples apart by `sample_ordinal` alone."""
        frame = self.frame
        return not self.is_ours and (
            "sample_index" not in frame or frame["sample_index"].isna().any()
        )


def _read(path: Path) -> _Table:
    """Read a file, or the rollouts of a folder."""
    if (path / TOKENS).is_file():
        path = path / TOKENS
    if path.is_dir():
        return _read_folder(path)
    require_as_written(path)
    frame = read_rows(path)
    exact = _exact_ids(frame, path)
    frame = frame.assign(**exact)
    if "context_id" in frame:
        frame = _named_by_text(_text_as_written(frame, path, set(exact)), path)
    return _Table(path, frame, set(exact), None)


def _read_folder(folder: Path) -> _Table:
    """Read the rollouts of a folder one after the other, in the order of their names."""
    files = sorted(file for file in folder.iterdir() if ROLLOUT.fullmatch(file.name))
    if not files:
        raise DiagnosticsError(
            f"{folder} holds no {TOKENS} and no rollouts (files rollout_*.csv, .jsonl or .parquet)."
            " Name the directory of a run, a folder that the training code wrote, or one file."
        )
    parts = []
    for file in files:
        frame = _read(file).frame
        named = "rollout_id" in frame and frame["rollout_id"].notna().all()
        parts.append(frame if named else frame.assign(rollout_id=file.stem))
    # Columns of ids hold objects, so that joining files rounds none of them.
    ids = dict.fromkeys(IDS, object)
    frame = pd.concat(
        [part.astype({name: ids[name] for name in part if name in ids}) for part in parts],
        ignore_index=True,
    )
    log.info("%d rows of %d rollouts in %s", len(frame), len(files), folder)
    return _Table(folder, frame, set(), _config_k(folder))


def _config_k(folder: Path) -> int | None:
    """Return the K that the training code wrote beside its rollouts, where it did."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        k = json.loads(path.read_text(encoding="utf-8"))[CONFIG_K]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return k if isinstance(k, int) and not isinstance(k, bool) and k >= 1 else None


def _converted(table: _Table, *, trained: bool = False, by_ordinal: bool = False) -> pd.DataFrame:
    """Return a table under our names, gains in nats where it has any."""
    if table.is_ours:
        return validate_tokens(table.frame)
    columns = set(table.frame.columns)
    if "tok_pos" not in columns or not {"sample_index", "sample_ordinal"} & columns:
        raise DiagnosticsError(
            f"{table.path} is no token table: neither context_id nor sample_index and tok_pos are"
            f" among its columns ({', '.join(map(str, table.frame.columns[:12]))}). Give a"
            " tokens.parquet, or a token bank of the released scripts."
        )
    return from_released(table.frame, trained=trained, by_ordinal=by_ordinal, k=table.k)


def _joined(before: _Table, after: _Table) -> pd.DataFrame:
    """Return the table of both files. Where one of them lacks a sample's index, samples go by
    their ordinal in both.
    """
    if not after.is_ours and same_student(after.frame):
        raise DiagnosticsError(
            f"The plain columns of {after.path} are those of theta0: KLf_full is KLf_full_base"
            " everywhere, and the gains are not 0. Name the file that was scored with the trained"
            " student."
        )
    by_ordinal = (before.has_gaps or after.has_gaps) and not (before.is_ours or after.is_ours)
    return join_after(
        _converted(before, by_ordinal=by_ordinal),
        _converted(after, trained=True, by_ordinal=by_ordinal),
        names=(str(before.path), str(after.path)),
    )


def with_texts(tokens: pd.DataFrame, tokenizer: Any) -> pd.DataFrame:
    """Add the texts of the sampled tokens, and which of them are special.

    Args:
        tokens: A token table.
        tokenizer: A tokenizer, or the folder or Hugging Face id of one.

    Returns:
        A copy with `token` and `is_special` as scoring writes them.

    Raises:
        DiagnosticsError: The table has no token ids, or the tokenizer is not the one that they
            came from: it lacks an id, or has another text for most of those that the table tells.
    """
    if isinstance(tokenizer, (str, Path)):
        from diagnostics.models.loading import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    ids = tokens["token_id"]
    if (ids == NO_TOKEN).any():
        raise DiagnosticsError(
            "The table does not say which tokens were sampled, so a tokenizer gives them no text."
            " Leave it out."
        )
    if ids.max() >= len(tokenizer):
        raise DiagnosticsError(
            f"The table holds the token id {ids.max()}, and the tokenizer has {len(tokenizer)}"
            " tokens. Give the tokenizer of the pair."
        )
    texts = ids.map({token: tokenizer.decode([token]) for token in ids.unique().tolist()})
    known = tokens["token"] != ids.astype(str)
    other = known & (tokens["token"] != texts)
    if known.any() and other.sum() > known.sum() / 2:
        row = tokens[other].iloc[0]
        raise DiagnosticsError(
            f"The tokenizer reads {other.sum()} of {known.sum()} tokens otherwise than the table:"
            f" {row.token!r} (id {row.token_id}) is {texts[row.name]!r}. Give the tokenizer of the"
            " pair, or none."
        )
    special = np.isin(ids, list(special_ids(tokenizer)))
    made = validate_tokens(tokens.assign(token=texts, is_special=special))
    made.attrs.update(tokens.attrs)
    return made


def _exact_ids(frame: pd.DataFrame, path: Path) -> dict[str, pd.Series]:
    """Return the columns of ids that came out as floats, as the file has them: one gap does that
    to whole numbers, and large ones are then no longer told apart.
    """
    rounded = [name for name in IDS if name in frame and frame[name].dtype.kind == "f"]
    written = read_rows(path, text=True) if rounded else frame
    return {
        name: pd.Series(
            [
                _cell(value) if there else None
                for value, there in zip(written[name], frame[name].notna(), strict=True)
            ],
            index=frame.index,
            dtype=object,
        )
        for name in rounded
    }


def _cell(value):
    """Return a CSV's cell as an id: 007 stays, 3.0 is a number."""
    decimal = isinstance(value, str) and not value.strip().removeprefix("-").isdecimal()
    return float(value) if decimal else value


def _text_as_written(frame: pd.DataFrame, path: Path, exact: set[str]) -> pd.DataFrame:
    """Read the text columns of a CSV as text: a token may be the word `null` and an id `007`, and
    neither is a number or missing. An empty id is missing. `exact` names columns that are as
    written already.
    """
    names = {"context_id", "prompt_id", "token", "split"} - exact
    if path.suffix == ".csv" and (text := [name for name in frame if name in names]):
        written = pd.read_csv(path, usecols=text, dtype="str", keep_default_na=False)
        for name in {"context_id", "prompt_id"} & set(text):
            written[name] = written[name].where(written[name] != "", None)
        frame = frame.assign(**written)
    return frame


def _named_by_text(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the table with ids as text. Raises DiagnosticsError for ids that are floats of 2**53
    and more: as names they would join what was apart.
    """
    for name in {"context_id", "prompt_id"} & set(frame):
        vague = count_ambiguous(frame[name])
        if vague:
            raise DiagnosticsError(
                f"{path}: {name} holds {vague} floats of 2**53 and more, which no longer tell whole"
                " numbers apart. Write the ids as whole numbers or as text."
            )
        if is_mixed(frame[name]):
            frame = frame.assign(**{name: ids_as_text(frame[name])})
    return frame
