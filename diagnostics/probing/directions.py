"""The direction of a step, kept while its stage runs, so that an interrupted stage continues.

A backward pass on a GPU is not reproducible to the last bit, so a direction that is computed again
is a different one, and measurements along the first must not be mixed with it. The direction is
therefore written once, into the stage's folder under DIR/.partial, and everything measured along it
is named by the hash of its numbers (`Direction.name`). A stage that finds the direction continues;
a stage that does not find it starts again. The folder's own name holds the settings, the bank, the
models and the code; the folder is removed when the stage's files are written.

On disk, a direction takes 4 bytes per parameter of a float32 student. Where there is no room for
it, or where making it again takes less time than writing it, the stage runs without. Once
everything along a direction is measured, the measurements take its place (`Store.finish`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file, write_atomic
from diagnostics.core.tables import write_json, write_parquet
from diagnostics.models.weights import checksum
from diagnostics.probing.spread import Spread
from diagnostics.probing.step_state import BESIDE, StatePlace

log = logging.getLogger("diagnostics")
FILE, RECORD = "direction.safetensors", "step.json"
MEASURED, FINISHED = "measured.parquet", "finished.json"
RESERVE_BYTES = 2**30
"""Free space on the disk that a kept direction leaves to the stage's own files."""
BYTES_PER_SECOND = 2**29
"""What a disk is taken to write: a direction that is made faster than that is not kept."""
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
"""Names of the dtypes that a student's step can have."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """An optimizer's first direction at theta0: theta1 = theta0 + step_size * update."""

    update: list[Tensor]
    """One tensor per parameter; empty where every measurement along it is known already."""
    calibration_loss: str
    """Loss whose drop decides the step's size: the step's own, except for `sampled`."""
    value: float
    """Mean of the calibration_loss at theta0, nats."""
    gradient_norm: float
    """Norm of the gradient of the step's own mean loss."""
    slope: float
    """Change of the calibration_loss's mean in nats for a step of size 1, to first order."""
    norm: float
    """Norm of the update for a step of size 1."""
    sha256: str = ""
    """Hash of the update's checksums and of the numbers above; made by `named`."""

    def named(self, spread: Spread | None = None) -> Direction:
        """The same direction with its hash, which costs one pass over the update.

        Args:
            spread: How the update is divided among the processes, whose parts are then all hashed.
        """
        digest = hashlib.sha256(json.dumps(self.facts()).encode())
        for tensor in self.update:
            digest.update(checksum(tensor).encode())
        own = digest.hexdigest()
        return dataclasses.replace(self, sha256=own if spread is None else spread.name(own))

    def waiting(self, place: StatePlace) -> Direction:
        """The same direction where it waits for its turn."""
        return dataclasses.replace(self, update=place.waiting(self.update))

    def without_update(self) -> Direction:
        """The same direction once everything along it is measured: its update's memory is free."""
        return dataclasses.replace(self, update=[])

    def facts(self) -> dict:
        """Everything but the update and its hash."""
        return {
            "calibration_loss": self.calibration_loss,
            "value": self.value,
            "gradient_norm": self.gradient_norm,
            "slope": self.slope,
            "norm": self.norm,
        }

    def name(self, step_size: float) -> str:
        """The name of a step of this size along this direction.

        Another rounding of the gradient is another direction and gives another name.
        """
        assert self.sha256, "a direction is named before anything is measured along it"
        return hashlib.sha256(f"{self.sha256} {float(step_size)!r}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A step that was taken, and everything that was measured along it."""

    direction: Direction
    size: float
    """Size of the step along the direction."""
    measured: pd.DataFrame
    """One row per position of the bank."""
    calibration: pd.DataFrame | None
    """The calibration along the direction; None where it has the size of another step."""


@dataclasses.dataclass(frozen=True)
class Store:
    """Where a stage keeps its direction and the calibration along it.

    Without a folder nothing is kept.
    """

    folder: Path | None
    directions: bool = True
    """Whether the direction itself is kept. A divided one is not: an interrupted stage makes it
    again, and finds what was measured along it where its bits are the same."""

    def direction(self, like: Sequence[Tensor], place: StatePlace = BESIDE) -> Direction | None:
        """The direction of an interrupted run.

        Args:
            like: The student's parameters.
            place: Where the state of their steps lies, and the direction too.

        Returns:
            The direction, or None where any process lacks it or it is damaged.
        """
        path = self._path
        found = None if path is None else self._read(path, like, place)
        return found if _everywhere(found) else None

    @property
    def _path(self) -> Path | None:
        return self.folder / FILE if self.folder is not None and self.directions else None

    def holds(self) -> bool:
        """Whether a direction lies on disk, for every process to see."""
        path = self._path
        return _everywhere(path if path is not None and path.is_file() else None)

    def _read(self, path: Path, like: Sequence[Tensor], place: StatePlace) -> Direction | None:
        from safetensors import SafetensorError, safe_open

        if path.is_symlink() or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["direction"])
                update = [file.get_tensor(str(i)).to(place.sums(p)) for i, p in enumerate(like)]
            found = Direction(update, **facts["facts"]).named()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): the direction is computed again", path, error)
            return None
        same = all(
            u.shape == p.shape and u.dtype == p.dtype for u, p in zip(update, like, strict=True)
        )
        if not same or found.sha256 != facts["sha256"]:
            log.warning("%s is damaged: the direction is computed again", path)
            return None
        return found

    def keep(self, direction: Direction, *, seconds: float = math.inf) -> None:
        """Write a direction, whole or not at all.

        One that was made in less time than the disk needs is made again instead. A disk without
        room for it is only a warning.

        Args:
            direction: The direction with its hash.
            seconds: Time in which it was made.
        """
        if self.folder is None or not self.directions or not distributed.is_main():
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in direction.update)
        if seconds < size / BYTES_PER_SECOND:
            return
        try:
            free = shutil.disk_usage(
                next(path for path in (self.folder, *self.folder.parents) if path.exists())
            ).free
            if free < size + RESERVE_BYTES:
                raise DiagnosticsError(
                    f"It takes {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free."
                )
            write_atomic(self.folder / FILE, _file_parts(direction))
        except (DiagnosticsError, OSError) as error:
            log.warning(
                "the step's direction cannot be kept, so that a killed run would start this stage"
                " again: %s",
                error,
            )

    def calibration(self, direction: Direction) -> pd.DataFrame | None:
        """The calibration along this direction; None where there is none."""
        found = None if self.folder is None else read_record(self.folder / RECORD)
        return found[1] if found is not None and found[0].sha256 == direction.sha256 else None

    def keep_calibration(self, direction: Direction, calibration: pd.DataFrame) -> None:
        """Write the calibration along this direction."""
        if self.folder is not None:
            write_record(self.folder / RECORD, direction, calibration)

    def finish(self, finished: Finished) -> None:
        """Write what was measured along a direction, and remove the direction's numbers.

        A disk without room is only a warning: the direction stays then.
        """
        if self.folder is None or not distributed.is_main():
            return
        try:
            write_parquet(self.folder / MEASURED, finished.measured)
            content = {
                "facts": finished.direction.facts(),
                "sha256": finished.direction.sha256,
                "size": finished.size,
                "measured": sha256_file(self.folder / MEASURED),
                "calibration": _as_lists(finished.calibration),
            }
            write_json(self.folder / FINISHED, content)
            (self.folder / FILE).unlink(missing_ok=True)
        except (DiagnosticsError, OSError) as error:
            log.warning("what was measured along a step cannot be kept: %s", error)

    def finished(self) -> Finished | None:
        """What an interrupted run measured along its direction; None where any process lacks it."""
        found = None if self.folder is None else _read_finished(self.folder)
        return found if _everywhere(found) else None


def _file_parts(direction: Direction) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file with a direction, one tensor after the other, so that no
    second copy of them is in memory.
    """
    record = json.dumps({"facts": direction.facts(), "sha256": direction.sha256})
    header: dict[str, dict] = {"__metadata__": {"direction": record}}
    place = 0
    for number, tensor in enumerate(direction.update):
        end = place + tensor.numel() * tensor.element_size()
        header[str(number)] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    yield len(text).to_bytes(8, "little") + text
    for tensor in direction.update:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_finished(folder: Path) -> Finished | None:
    record, table = folder / FINISHED, folder / MEASURED
    if any(path.is_symlink() or not path.is_file() for path in (record, table)):
        return None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        if sha256_file(table) != content["measured"]:
            raise ValueError("its table is another")
        calibration = content["calibration"]
        return Finished(
            Direction([], **content["facts"], sha256=content["sha256"]),
            float(content["size"]),
            pd.read_parquet(table),
            None if calibration is None else pd.DataFrame(calibration),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and left out (%s)", record, error)
        return None


def _as_lists(table: pd.DataFrame | None) -> dict | None:
    return None if table is None else {name: table[name].tolist() for name in table}


def write_record(path: Path, direction: Direction, calibration: pd.DataFrame) -> None:
    """Write a direction without its update, and the calibration along it."""
    content = {
        "facts": direction.facts(),
        "sha256": direction.sha256,
        "calibration": calibration.to_dict("list"),
    }
    try:
        write_json(path, content)
    except DiagnosticsError as error:
        log.warning("%s", error)


def read_record(path: Path) -> tuple[Direction, pd.DataFrame] | None:
    """A direction without its update, and the calibration along it.

    None where any process lacks them.
    """
    found = None
    if path.is_file() and not path.is_symlink():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = (
                Direction([], **content["facts"], sha256=content["sha256"]),
                pd.DataFrame(content["calibration"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged and left out", path)
    return found if _everywhere(found) else None


def _everywhere(found) -> bool:
    """True where every process has found it: they continue together or start again together."""
    return (
        distributed.sum_over_processes(np.array([float(found is not None)]))[0]
        == distributed.world()
    )
