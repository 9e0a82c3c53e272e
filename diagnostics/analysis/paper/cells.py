"""The trainings of the paper's tables 2, 7 and 10, read from the folder of their cells.

RUN/paper/cells/<mask>-<budget>-seed<s>.parquet   the frozen positions after the training
RUN/paper/cells/<mask>-<budget>-seed<s>.json      its record, written last, with what was kept
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.core.checkpoint import has_checkpoint, join_checkpoint
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import hash_inside
from diagnostics.core.schema import read_parquet

FOLDER = "paper/cells"
"""Folder of the trainings inside a run directory."""
TRAINING = ("criterion", "budget", "seed")
"""What names a training."""
STANDS_FOR_A_CHECKPOINT = ("teachability", 0.05)
"""Mask and budget of the training whose student a run without a checkpoint of its own is read with.
"""
KEPT = ("kept_share", "q3_share", "mean_teachability", "mean_incompatible", "mean_compatibility")
"""What is known of the positions that a training kept of its own rollouts."""


def read_cells(
    folder: str | Path, *, names: Iterable[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the finished trainings of a folder.

    Args:
        folder: Folder of the cells, `RUN/paper/cells`.
        names: Names of the trainings to read, as `teachability-0.05-seed0`; None reads all.

    Returns:
        Two tables. The first has one row per training and frozen position, with criterion, budget,
        seed, context_id, position, the measurements after the training (`forward_kl_after`,
        `reverse_kl_after` and `student_entropy_after` in nats, `compatibility_after` as a
        probability, `compatibility_k<K>_after` likewise) and `seen`: whether the training had the
        position's prompt. The second has one row per training, with criterion, budget, seed and
        `KEPT`: the share of the rollouts' positions that carried loss, the share of those in Q3 by
        the medians of their own batch, and their mean D^L, D^I and C, each scaled within its batch.
        Both are empty, with these columns, where no training is finished.

    Raises:
        DiagnosticsError: A record cannot be read, or a table is missing or not as it was written.
    """
    folder = Path(folder)
    wanted = None if names is None else set(names)
    records = [
        _record(path)
        for path in sorted(folder.glob("*.json"))
        if wanted is None or path.stem in wanted
    ]
    found = sorted(
        (record for record in records if "cell" in record),
        key=lambda record: [record["cell"][name] for name in ("seed", "criterion", "budget")],
    )
    if not found:
        keys = ["context_id", "position", "seen"]
        return pd.DataFrame(columns=[*TRAINING, *keys]), pd.DataFrame(columns=[*TRAINING, *KEPT])
    cells = [_table(folder, record) for record in found]
    kept = pd.DataFrame([{**record["cell"], **record["kept"]} for record in found])
    # null in a record is an undefined mean
    kept = kept[[*TRAINING, *KEPT]].astype(dict.fromkeys(KEPT, float))
    return pd.concat(cells, ignore_index=True), kept


def stand_in(cells: pd.DataFrame) -> tuple[str, float, int] | None:
    """The training whose student stands for a checkpoint.

    Args:
        cells: As `read_cells` returns them.

    Returns:
        Criterion, budget and the first seed of `STANDS_FOR_A_CHECKPOINT`; None where no such
        training is among them.
    """
    criterion, budget = STANDS_FOR_A_CHECKPOINT
    found = cells.loc[(cells["criterion"] == criterion) & (cells["budget"] == budget), "seed"]
    return None if found.empty else (criterion, budget, int(found.min()))


def with_student(tokens: pd.DataFrame, cells: pd.DataFrame | None) -> pd.DataFrame:
    """The token table with a trained student: its own checkpoint, or else a training's.

    Args:
        tokens: A token table, with or without the columns of a checkpoint.
        cells: As `read_cells` returns them, or None.

    Returns:
        The table as it is where it has a checkpoint or no training can stand for one; otherwise
        with the columns of the training that `stand_in` names, `seen` among them.
    """
    chosen = None if cells is None or has_checkpoint(tokens) else stand_in(cells)
    if cells is None or chosen is None:
        return tokens
    mine = (cells[list(TRAINING)] == list(chosen)).all(axis=1)
    return join_checkpoint(tokens, cells[mine].drop(columns=list(TRAINING)))


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "cell" in record:
            missing = [name for name in TRAINING if name not in record["cell"]]
            missing += [name for name in KEPT if name not in record["kept"]]
            if missing:
                raise KeyError(", ".join(missing))
        return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiagnosticsError(
            f"{path} should be the record of a training, and cannot be read as one"
            f" ({type(error).__name__}: {error}). Remove it and give `paper --train` again: the"
            " training is then done anew."
        ) from error


def _table(folder: Path, record: dict[str, Any]) -> pd.DataFrame:
    """The frozen positions after one training, under the names of that training."""
    cell = record["cell"]
    name = next((file for file in record.get("files", {}) if _is_table(file)), "")
    digest = hash_inside(folder, name) if name else None
    if digest is None or digest != record["files"][name]:
        raise DiagnosticsError(
            f"{folder / (name or '?')} of the training {cell} is"
            f" {'missing' if digest is None else 'not as it was written'}. Give `paper --train`"
            " again: the training is then done anew."
        )
    named = {key: cell[key] for key in TRAINING}
    return pd.concat(
        [
            pd.DataFrame(named, index=range(len(rows := read_parquet(folder / name)))),
            rows,
        ],
        axis=1,
    )


def _is_table(file: str) -> bool:
    return file.endswith(".parquet") and not file.endswith(".curve.parquet")
