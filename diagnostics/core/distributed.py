"""Several processes, one result: contexts are divided among processes, sums are global.

Start any command under `torchrun --nproc-per-node N -m diagnostics …` or `accelerate launch`.
Batches are formed before they are divided, so every number of processes scores the same batches,
and tables do not depend on it: each batch's numbers come from one process, and a probe's mean loss
and gradient are added up in more digits than they keep. (The number of *threads* does order the
sums within a tensor, so last digits may depend on that.) Only the first process writes. With a
single process every function here is the identity, and torch is not imported."""

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
    """Refuse an environment in which a launcher's variables are set only in part.

    A process in it would wait for others that never start, or would write nothing.
    """
    given = {"RANK": os.environ.get("RANK"), "WORLD_SIZE": os.environ.get("WORLD_SIZE")}
    if given == {"RANK": None, "WORLD_SIZE": None}:
        return
    numbers = [int(value) for value in given.values() if value is not None and value.isdecimal()]
    whole = len(numbers) == 2 and numbers[0] < numbers[1]
    reachable = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    if whole and (numbers[1] == 1 or reachable):
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
    """torch.distributed, its default process group set up. Only where `world()` > 1.

    It ends with the process, also where Accelerate set it up: the threads of a group that outlives
    the interpreter may abort it.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        )
    atexit.register(leave)
    return distributed


def leave() -> None:
    """End the process group, if there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def local_device(name: str) -> str:
    """`cuda` or `auto` becomes this process's own GPU where there are several processes."""
    import torch

    if world() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return name


def share(items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process's part of the items, in their order.

    Items are assigned from the most to the least costly, each to the least loaded process.
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
    """Sum of a float64 numpy array over the processes.

    Each process fills in its own part and leaves 0 in all other places.
    """
    if world() == 1:
        return array
    import torch

    tensor = torch.from_numpy(array.copy())
    group().all_reduce(tensor)
    return tensor.numpy()


def names(columns: Sequence[str]) -> set[str]:
    """Union of the processes' short ASCII names.

    Every process passes all of them or none.
    """
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
    """The number that each process passed, by rank."""
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
    """Wait for all processes, so that files written before it exist after it."""
    if world() > 1:
        group().barrier()
