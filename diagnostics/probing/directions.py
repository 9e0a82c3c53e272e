"""The direction of a step, kept while its stage runs, so that an interrupted stage goes on along
the same one.

A backward pass on a GPU is not reproducible to the last bit, so a direction that is made again is
another one, and what was measured along the first has no place beside it. The direction is
therefore written once, into the stage's folder under DIR/.partial, and everything measured along it
is named by the hash of its numbers (`Direction.name`): a stage that finds the direction goes on,
and one that does not begins anew. Results of two directions never meet. The folder's own name holds
the settings, the bank, the models and the code; it goes when the stage's files are written.

On disk: 4 bytes a parameter of a float32 student. Where there is no room for it, the stage goes on
without."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.tables import write_json

log = logging.getLogger("diagnostics")
FILE, RECORD = "direction.safetensors", "step.json"
RESERVE_BYTES = 2**30
"""Room on the disk that a kept direction leaves to the stage's own files."""


@dataclasses.dataclass(frozen=True)
class Direction:
    """An optimiser's first direction at theta0: theta1 = theta0 + step_size * update."""

    update: list[Tensor]
    """Empty where all that was measured along it is at hand."""
    calibration_loss: str
    """Loss whose drop decides the step's size: the step's own, save for `sampled`."""
    value: float
    """Mean of the calibration_loss at theta0, nats."""
    gradient_norm: float
    slope: float
    """Change of the calibration_loss's mean in nats for a step of size 1, to first order."""
    norm: float
    sha256: str = ""
    """Hash of the update and of the numbers above; made by `named`."""

    def named(self) -> Direction:
        """The same with its hash, which costs one pass over the update."""
        digest = hashlib.sha256(json.dumps(self.facts()).encode())
        for tensor in self.update:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return dataclasses.replace(self, sha256=digest.hexdigest())

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
        """A step's name. Another rounding of the gradient is another direction and gives another
        name.
        """
        assert self.sha256, "a direction is named before anything is measured along it"
        return hashlib.sha256(f"{self.sha256} {float(step_size)!r}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Store:
    """Where a stage keeps its direction and the calibration along it; without a folder nothing is
    kept.
    """

    folder: Path | None

    def direction(self, like: list[Tensor]) -> Direction | None:
        """The direction of an interrupted run, on the devices of `like`; None where any process
        lacks it or it is damaged.
        """
        found = self._read(like) if self.folder is not None else None
        if not _everywhere(found):
            return None
        log.info("%s: the direction of an interrupted run is taken up", self.folder)
        return found

    def _read(self, like: list[Tensor]) -> Direction | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / FILE
        if path.is_symlink() or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["direction"])
                update = [file.get_tensor(str(i)).to(p.device) for i, p in enumerate(like)]
            found = Direction(update, **facts["facts"]).named()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): the direction is made anew", path, error)
            return None
        same = all(
            u.shape == p.shape and u.dtype == p.dtype for u, p in zip(update, like, strict=True)
        )
        if not same or found.sha256 != facts["sha256"]:
            log.warning("%s is damaged: the direction is made anew", path)
            return None
        return found

    def keep(self, direction: Direction) -> None:
        """Write a direction, whole or not at all; a disk without room for it is no fault of the
        stage.
        """
        if self.folder is None or not distributed.is_main():
            return
        from safetensors.torch import save

        size = sum(tensor.numel() * tensor.element_size() for tensor in direction.update)
        try:
            free = shutil.disk_usage(
                next(path for path in (self.folder, *self.folder.parents) if path.exists())
            ).free
            if free < size + RESERVE_BYTES:
                raise DiagnosticsError(
                    f"It takes {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free."
                )
            tensors = {
                str(i): tensor.detach().cpu().contiguous()
                for i, tensor in enumerate(direction.update)
            }
            record = json.dumps({"facts": direction.facts(), "sha256": direction.sha256})
            write_atomic(self.folder / FILE, save(tensors, metadata={"direction": record}))
        except (DiagnosticsError, OSError) as error:
            log.warning(
                "the step's direction cannot be kept, so that a killed run would begin this stage"
                " anew: %s",
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


def write_record(path: Path, direction: Direction, calibration: pd.DataFrame) -> None:
    """Write what is known of a direction without its numbers, and the calibration along it."""
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
    """A direction without its update, and the calibration along it; None where any process lacks
    them.
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
    """True where every process has found it: they go on together or begin together."""
    return (
        distributed.sum_over_processes(np.array([float(found is not None)]))[0]
        == distributed.world()
    )
