"""Where a step keeps what it needs beside the model: theta0, directions, the optimizer's moments.

    device   beside the student
    host     in main memory, for a student on a card that is full
    disk     in unnamed files that are mapped into memory: the system keeps as much of them there
             as has room

A float32 student takes 4 bytes per parameter. A gradient in float64 takes 8 more, a direction 4,
theta0 4, and the two moments of AdamW 8: on a card or in memory that holds the model twice, they do
not fit all at once. On the disk they cost reading and writing, which on a CPU is little beside the
arithmetic of a step. The numbers are the same wherever they lie.

`auto` is `device`, except for a student of LARGE bytes or more: on a CPU it is `disk` then, and on
another device `host` where less is free than the state takes at most.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.config import STEP_STATES

log = logging.getLogger("diagnostics")
LARGE = 2**28
"""Bytes of a student from which on `auto` looks for another place."""
SMALL = 2**20
"""Bytes of a tensor below which it is not worth a file of its own."""
STATE_SHARE = 5
"""The most that is needed at once, in units of a float32 student: theta0, AdamW's moments and a
gradient in float64."""
MADV_DONTNEED = 4
"""Advice to the system, of this number on Linux and macOS, that mapped pages are not needed now."""
RESERVE = 0.25
"""Share of the free memory of a card that is left to the activations."""


def place_of(asked: str, parameters: Sequence[Tensor]) -> StatePlace:
    """Where the state of a student's steps lies.

    Args:
        asked: One of STEP_STATES.
        parameters: The student's parameters, on their device.

    Returns:
        The place.

    Raises:
        DiagnosticsError: The name is unknown.
    """
    if asked not in STEP_STATES:
        raise DiagnosticsError(f"Unknown step state {asked!r}. Known are {', '.join(STEP_STATES)}.")
    kind = asked if asked != "auto" else _automatic(parameters)
    if parameters and parameters[0].device.type == "cpu" and kind == "host":
        kind = "device"  # the student's device is main memory
    if kind != "device":
        log.info("what a step needs beside the student lies on the %s", kind)
    return StatePlace(kind)


def _automatic(parameters: Sequence[Tensor]) -> str:
    size = sum(p.numel() * p.element_size() for p in parameters)
    if size < LARGE:
        return "device"
    if parameters[0].device.type == "cpu":
        return "disk"
    free = free_bytes(parameters[0].device)
    return "host" if free is not None and STATE_SHARE * size > (1 - RESERVE) * free else "device"


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device; None where the device does not tell."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@dataclass(frozen=True)
class StatePlace:
    """A place for the state of a step."""

    kind: str
    """`device`, `host` or `disk`."""

    @property
    def beside(self) -> bool:
        """True where the state lies beside the student, so that every copy takes its memory."""
        return self.kind == "device"

    def sums(self, like: Tensor) -> torch.device:
        """The device of a gradient's sums."""
        return like.device if self.beside else torch.device("cpu")

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors, in this place."""
        return [self._copy(tensor.detach()) for tensor in tensors]

    def kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that will not change, in this place; those that lie there already are not
        copied.
        """
        if self.kind == "disk":
            return [t if _is_mapped(t) else self._copy(t) for t in tensors]
        return [t.detach() if self.beside else t.detach().cpu() for t in tensors]

    def waiting(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that will not change, where they are in nobody's way until their turn comes.

        A card keeps them where it has room for them and for a step's state; else main memory does.
        """
        if self.beside and not self.has_room(tensors):
            return [t.detach().cpu() for t in tensors]
        return self.kept(tensors)

    def has_room(self, tensors: Sequence[Tensor]) -> bool:
        """True for a card that has several times the memory that such tensors take."""
        if not self.beside or not tensors:
            return False
        free = free_bytes(tensors[0].device)
        size = sum(t.numel() * t.element_size() for t in tensors)
        return free is not None and (1 - RESERVE) * free > 2 * STATE_SHARE * size

    def rest(self, tensors: Sequence[Tensor]) -> None:
        """Take mapped tensors out of this process's memory until they are read or written again;
        what was written stays in the system's cache of the disk.
        """
        for tensor in tensors if self.kind == "disk" else ():
            if _is_mapped(tensor):
                storage = tensor.untyped_storage()
                _libc().madvise(
                    ctypes.c_void_p(storage.data_ptr()),
                    ctypes.c_size_t(storage.nbytes()),
                    MADV_DONTNEED,
                )

    def tidy(self) -> None:
        """Give memory that was freed back to the system, which the allocator would keep between
        large tensors that are still alive.
        """
        if not self.beside and hasattr(_libc(), "malloc_trim"):
            _libc().malloc_trim(0)

    def zeros(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros in the shapes and dtypes of tensors, in this place."""
        if self.kind == "disk":
            return [_mapped(t) for t in tensors]
        return [torch.zeros_like(t, device=self.sums(t)) for t in tensors]

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.kind == "disk":
            copy = _mapped(tensor).copy_(tensor)
            self.rest([copy])
            return copy
        return tensor.to(self.sums(tensor), copy=True)


@cache
def _libc() -> ctypes.CDLL:
    """The C library that this process uses."""
    return ctypes.CDLL(None)


BESIDE = StatePlace("device")
"""The state lies beside the student."""


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def _mapped(like: Tensor) -> Tensor:
    """Zeros in the shape and dtype of a tensor, in a file without a name.

    The file's blocks are taken beforehand, since a disk that is full ends a process which writes to
    mapped memory. It has no name any more when this returns, so nothing is left of it however the
    process ends. Where the disk has no room, the zeros lie in memory.
    """
    size = like.numel() * like.element_size()
    if size < SMALL:
        return torch.zeros_like(like, device="cpu")
    descriptor, name = tempfile.mkstemp(prefix="opd-state-")
    try:
        _take_blocks(descriptor, size)
        flat = torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype)
        return flat.view(like.shape)
    except (OSError, RuntimeError) as error:
        log.warning(
            "%s has no room for %.1f GiB of a step's state, which stays in memory (%s); another"
            " folder can be named by the environment variable TMPDIR",
            Path(name).parent,
            size / 2**30,
            error,
        )
        return torch.zeros_like(like, device="cpu")
    finally:
        os.close(descriptor)
        os.unlink(name)


def _take_blocks(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)
        status = os.fstatvfs(descriptor)
        if status.f_bavail * status.f_frsize < size:
            raise OSError(f"{math.ceil(size / 2**20)} MiB are not free")
