"""Several processes, one result: contexts are shared out, sums and tables are global.

Start any command under `torchrun --nproc-per-node N -m diagnostics …` or `accelerate launch`.
Batches are formed before they are shared out, so every number of processes scores the same batches,
and tables do not depend on it: each batch's numbers come from one process, and a probe's mean loss
and gradient are added up in more digits than they keep. (The number of *threads* orders sums within
a tensor; last digits may hang on that.) Only the first process writes. Alone, every function here
is the identity and torch is not imported."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

from diagnostics.core.errors import DiagnosticsError

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def require_launcher() -> None:
    """Refuse an environment that is half a launcher's: this process would wait for others, or write
    nothing.
    """
    given = {"RANK": os.environ.get("RANK"), "WORLD_SIZE": os.environ.get("WORLD_SIZE")}
    if given == {"RANK": None, "WORLD_SIZE": None}:
        return
    numbers = [
        int(value) if value is not None and value.isdecimal() else None for value in given.values()
    ]
    whole = None not in numbers and numbers[0] < numbers[1]
    if whole and (
        numbers[1] == 1 or (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"))
    ):
        return
    said = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    raise DiagnosticsError(
        f"The environment has {said}, and not all that a launcher sets (RANK below WORLD_SIZE,"
        " MASTER_ADDR, MASTER_PORT). Start with torchrun or accelerate launch, or unset RANK and"
        " WORLD_SIZE."
    )


def is_main() -> bool:
    """True in the process that writes files and shows progress."""
    return rank() == 0


@cache
def group():
    """torch.distributed, its default process group set up. Only where `world()` > 1."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        )
        atexit.register(distributed.destroy_process_group)
    return distributed


def local_device(name: str) -> str:
    """`cuda` or `auto` becomes this process's own GPU where there are several processes."""
    import torch

    if world() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return name


def share(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's part of the items, in order: the costliest first, each to the least loaded
    process.
    """
    if world() == 1:
        return list(items)
    loads, mine = [0.0] * world(), []
    for index in sorted(range(len(items)), key=lambda i: (-cost(items[i]), i)):
        target = loads.index(min(loads))
        loads[target] += cost(items[index])
        if target == rank():
            mine.append(index)
    return [items[index] for index in sorted(mine)]


def sum_over_processes(array):
    """Sum of a float64 numpy array over the processes; each fills in its own part and leaves 0
    elsewhere.
    """
    if world() == 1:
        return array
    import torch

    tensor = torch.from_numpy(array.copy())
    group().all_reduce(tensor)
    return tensor.numpy()


def names(columns: Sequence[str]) -> set[str]:
    """Union of the processes' short ASCII names; every process has all of them or none."""
    if world() == 1:
        return set(columns)
    import torch

    text = ",".join(columns).encode()
    lengths = total_lengths(len(text))
    buffer = torch.zeros(max(lengths), dtype=torch.uint8)
    source = lengths.index(max(lengths))
    if rank() == source:
        buffer[:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    group().broadcast(buffer, src=source)
    return set(bytes(buffer.tolist()).decode().split(","))


def total_lengths(length: int) -> list[int]:
    """Each process's number, by rank."""
    import numpy as np

    mine = np.zeros(world())
    mine[rank()] = length
    return [int(value) for value in sum_over_processes(mine)]


def sum_in_place(tensors: Sequence) -> None:
    """Sum tensors over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            group().all_reduce(tensor)


def barrier() -> None:
    """Wait for all processes, so that files written before are there after."""
    if world() > 1:
        group().barrier()
