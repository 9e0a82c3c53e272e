"""The kernels on this machine's GPU: checked against float64 on the CPU, then timed, then a table.

    python benchmarks/gpu.py [--device cuda|cpu] [--small] [--kernels] [--minutes 9] [--output FILE]

Prints Markdown: card, date, commit and versions, then a row for each check and each time with its
goal, its floor and measured over floor. `--small` shrinks everything; `--device cpu` walks the same
lines on the CPU, whose times say nothing about a GPU. Stages of models are left out, and named,
once the minutes are used up. The exit code is 1 where a check failed. `make bench-gpu` runs it.

Sizes are those of Qwen3 1.7B and 4B: V = 151,936, hidden 2,048 and 2,560, bfloat16 heads, except
that the student's states and head are float32 where it is trained.
"""

from __future__ import annotations

import argparse
import datetime
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
import yardsticks
from torch import Tensor

from diagnostics.measure import divergences, fused, losses, projection

K, SWEEP = 16, (4, 8, 32)
MEBIBYTE = 2**20
NAN = math.nan


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    vocabulary: int = 151_936
    student: int = 2048
    teacher: int = 2560
    positions: int = 4096
    loss_positions: int = 2048
    checked: int = 32
    plain_rows: tuple[int, ...] = (64, 256, 1024)
    """Rows per block that plain torch is tried with; the fastest is compared."""
    repeats: int = 7


SMALL = Sizes(
    vocabulary=3000,
    student=32,
    teacher=48,
    positions=64,
    loss_positions=48,
    checked=4,
    plain_rows=(16,),
    repeats=1,
)


@dataclass(frozen=True)
class Line:
    """A row of the table; NaN where there is no goal or no floor."""

    name: str
    value: float
    unit: str
    goal: float = NAN
    floor: float = NAN
    at_least: bool = False
    check: bool = False

    @property
    def met(self) -> bool:
        """Whether the goal is reached; a row without one always is, a NaN with one never."""
        if math.isnan(self.goal):
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def markdown(self) -> str:
        """The row as the table shows it."""
        goal = "" if math.isnan(self.goal) else f"{'≥' if self.at_least else '≤'} {self.goal:.3g}"
        over = self.value / self.floor
        cells = [
            self.name,
            "–" if math.isnan(self.value) else f"{self.value:.3g} {self.unit}".strip(),
            goal,
            "" if math.isnan(self.floor) else f"{self.floor:.3g}",
            "" if math.isnan(over) else f"{over:.2f}",
            "" if self.met else ("**failed**" if self.check else "missed"),
        ]
        return "| " + " | ".join(cells) + " |"


class Machine:
    """The device, its clock and its memory."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device.startswith("cuda")

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, repeats: int, *functions: Callable[[], object]) -> list[float]:
        """Median of each function, which run in turn after one round to warm up."""
        taken: list[list[float]] = [[] for _ in functions]
        for _ in range(repeats + 1):
            for times, function in zip(taken, functions):
                self.wait()
                start = time.perf_counter()
                function()
                self.wait()
                times.append(1000 * (time.perf_counter() - start))
        return [median(times[1:]) for times in taken]

    def mebibytes(self, function: Callable[[], object]) -> float:
        """Peak of what torch allocates beyond what is allocated now."""
        if not self.cuda:
            return yardsticks.allocated_on_the_cpu(function) / MEBIBYTE
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE

    def launches(self, function: Callable[[], object]) -> float:
        """Kernels that ran on the device; NaN on the CPU."""
        if not self.cuda:
            return NAN
        function()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            self.wait()
        return float(
            sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events() or ())
        )

    def name(self) -> str:
        """Card and versions."""
        import platform

        card = torch.cuda.get_device_name() if self.cuda else f"CPU, {platform.machine()}"
        return f"{card}, torch {torch.__version__}, Python {platform.python_version()}"


class Heads:
    """Random states and heads of both models on the device; the student's may be trained."""

    def __init__(self, sizes: Sizes, machine: Machine, positions: int, *, trained: bool = False):
        generator = torch.Generator(machine.device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            made = torch.randn(*shape, generator=generator, device=machine.device) * scale
            return made.to(dtype)

        wide = torch.float32 if trained else torch.bfloat16
        self.student_VH = normal(
            sizes.vocabulary, sizes.student, dtype=wide, scale=3 / sizes.student**0.5
        ).requires_grad_(trained)
        self.teacher_VH = normal(
            sizes.vocabulary, sizes.teacher, dtype=torch.bfloat16, scale=3 / sizes.teacher**0.5
        )
        self.student_NH = normal(positions, sizes.student, dtype=wide).requires_grad_(trained)
        self.teacher_NH = normal(positions, sizes.teacher, dtype=torch.bfloat16)
        self.sampled_N = torch.randint(
            sizes.vocabulary, (positions,), generator=generator, device=machine.device
        )

    def student(self, states_nH: Tensor) -> Tensor:
        """The student's logits, float32."""
        return projection.linear(states_nH, self.student_VH)

    def teacher(self, states_nH: Tensor) -> Tensor:
        """The teacher's logits, float32."""
        return projection.linear(states_nH, self.teacher_VH)

    def states(self) -> tuple:
        """States and head of the student, then of the teacher."""
        return self.student_NH, self.student, self.teacher_NH, self.teacher

    def weights(self) -> tuple[Tensor, ...]:
        """States and weight of the student, then of the teacher."""
        return self.student_NH, self.student_VH, self.teacher_NH, self.teacher_VH


# ---------------------------------------------------------------- checks


def hard_logits(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Related models with ties, excluded ids, a one-hot row and a row without a difference, made on
    the CPU.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.checked, sizes.vocabulary)
    student_NV = 3 * torch.randn(shape, generator=generator)
    teacher_NV = 0.8 * student_NV + torch.randn(shape, generator=generator)
    student_NV[0] = student_NV[0].round()
    student_NV[1, -50:] = teacher_NV[1, -50:] = -math.inf
    teacher_NV[2] = -1e4
    teacher_NV[2, 17] = 0.0
    teacher_NV[3] = student_NV[3]
    sampled_N = torch.randint(sizes.vocabulary - 50, shape[:1], generator=generator)
    return student_NV.to(dtype), teacher_NV.to(dtype), sampled_N


def checks(sizes: Sizes, machine: Machine) -> Iterator[Line | str]:
    """Columns, top-K ids and derivatives on the device against float64 on the CPU."""
    if machine.cuda:
        ran = fused.applies(torch.zeros(1, 2, device=machine.device))
        yield Line("the kernels run", float(ran), "", 1.0, at_least=True, check=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = hard_logits(sizes, dtype)
        student_NV, teacher_NV, sampled_N = (x.to(machine.device) for x in given)
        measured = divergences.measure(student_NV, teacher_NV, sampled_N, k=K, sweep=SWEEP)
        exact = divergences.measure(
            given[0].double(), given[1].double(), given[2], k=K, sweep=SWEEP
        )
        errors = [
            float(((measured[name].cpu() - values_N).abs() / values_N.abs().clamp(min=1)).max())
            for name, values_N in exact.items()
        ]
        label = str(dtype).removeprefix("torch.")
        yield Line(f"columns, {label}: largest error", max(errors), "", 1e-6, check=True)
        ids = divergences.top_ids(student_NV, 32).cpu() != divergences.top_ids(given[0], 32)
        yield Line(f"top-32 ids, {label}: differing", float(ids.sum()), "", 0.0, check=True)
    for loss in yardsticks.LOSSES:
        yield Line(
            f"{loss}, gradient: relative error",
            gradient_error(sizes, machine, loss),
            "",
            1e-5,
            check=True,
        )


def gradient_error(sizes: Sizes, machine: Machine, loss: str) -> float:
    """Of the float32 derivative in the logits against float64 on the CPU, relative."""
    given = hard_logits(sizes, torch.float32)
    # A reverse KL of 1e4 nats leaves float32 four digits of what is around it; the columns have it.
    given[1][2] = given[0][2].flip(0)

    def gradient(device: str, dtype: torch.dtype) -> Tensor:
        leaf_NV = given[0].to(device, dtype).requires_grad_()
        values_N = losses.per_position(
            leaf_NV, given[1].to(device, dtype), given[2].to(device), loss=loss
        )
        return torch.autograd.grad(values_N.sum(), leaf_NV)[0].cpu().double()

    exact_NV = gradient("cpu", torch.float64)
    return float((gradient(machine.device, torch.float32) - exact_NV).norm() / exact_NV.norm())


# ---------------------------------------------------------------- times


def statistics_lines(sizes: Sizes, machine: Machine) -> Iterator[Line | str]:
    """All statistics and the KL pair on logits in hand, beside the projections and plain torch."""
    heads = Heads(sizes, machine, sizes.positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)

    def ours() -> dict[str, Tensor]:
        return divergences.measure(*logits, heads.sampled_N, k=K, sweep=SWEEP)

    def plain(rows: int, function: Callable = yardsticks.plain_statistics) -> dict[str, Tensor]:
        return yardsticks.in_rows(function, rows, *logits, heads.sampled_N, ks=(*SWEEP, K))

    rows = min(sizes.plain_rows, key=lambda n: machine.milliseconds(1, lambda: plain(n))[0])
    projections, mine, kls, plainly, plain_kls, reads = machine.milliseconds(
        sizes.repeats,
        lambda: (heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)),
        ours,
        lambda: divergences.kl_pair(*logits),
        lambda: plain(rows),
        lambda: yardsticks.in_rows(yardsticks.plain_kls, rows, *logits),
        lambda: [x.amax(-1) for x in logits * 2],
    )
    n = f"{sizes.positions:,} positions"
    yield Line(f"both projections, {n}", projections, "ms")
    yield Line(f"all statistics, {n}", mine, "ms", projections, reads)
    yield Line("their memory beyond the logits", machine.mebibytes(ours), "MiB", 300.0)
    yield Line("kernels they launch", machine.launches(ours), "")
    yield Line("plain torch, the same", plainly, "ms", floor=reads)
    yield Line("KL pair alone", kls, "ms", projections, reads)
    yield Line("plain torch, the KL pair", plain_kls, "ms", floor=reads)
    try:
        compiled = yardsticks.compiled(yardsticks.plain_statistics, machine.device)
        (taken,) = machine.milliseconds(sizes.repeats, lambda: plain(rows, compiled))
    except Exception as error:  # a compiler's errors are of many kinds
        yield f"torch.compile: {one_line(error)}"
        return
    yield Line("torch.compile of it", taken, "ms", floor=reads)
    yield Line("torch.compile over all statistics", taken / mine, "times", 4.0, at_least=True)


def one_line(error: Exception) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def loss_lines(sizes: Sizes, machine: Machine, loss: str) -> Iterator[Line | str]:
    """A loss and its backward: time and memory beside the full logits, TRL and Liger."""
    heads = Heads(sizes, machine, sizes.loss_positions, trained=True)
    weights_N = torch.ones(sizes.loss_positions, device=machine.device)

    def ours() -> Tensor:
        return losses.chunked_loss(
            *heads.states(),
            heads.sampled_N,
            loss=loss,
            weights_N=weights_N,
            denominator=float(sizes.loss_positions),
        )

    def step(implementation: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(implementation(), [heads.student_NH, heads.student_VH])

    def full() -> Tensor:
        return yardsticks.full_logits(*heads.weights(), loss)

    mine, fully, floor = machine.milliseconds(
        sizes.repeats, step(ours), step(full), lambda: products(heads)
    )
    memory, full_memory = machine.mebibytes(step(ours)), machine.mebibytes(step(full))
    gradients = 4 * sizes.student * (sizes.vocabulary + sizes.loss_positions) / MEBIBYTE
    yield Line(f"{loss} and backward, {sizes.loss_positions:,} positions", mine, "ms", fully, floor)
    yield Line(f"{loss}, full logits", fully, "ms", floor=floor)
    yield Line(f"{loss}, memory", memory, "MiB", full_memory / 3, gradients)
    yield Line(f"{loss}, memory of full logits", full_memory, "MiB", floor=gradients)
    for name, other in (("TRL", yardsticks.trl), ("Liger", yardsticks.liger)):
        theirs = step(lambda other=other: other(*heads.weights(), loss))
        try:
            (taken,) = machine.milliseconds(sizes.repeats, theirs)
            memory = machine.mebibytes(theirs)
        except Exception as error:  # not installed, or not for these dtypes
            yield f"{loss}, {name}: {one_line(error)}"
            continue
        yield Line(f"{loss}, {name}", taken, "ms", floor=floor)
        yield Line(f"{loss}, {name}, memory", memory, "MiB")


@torch.no_grad()
def products(heads: Heads) -> None:
    """The four matrix products of a loss and its backward."""
    slope_NV = heads.student(heads.student_NH)
    heads.teacher(heads.teacher_NH)
    slope_NV @ heads.student_VH, slope_NV.T @ heads.student_NH


def stage_lines(sizes: Sizes, machine: Machine) -> Iterator[Line | str]:
    """Scoring and the whole probe of a pair of random models, and `run` of the embedded pair."""
    if not machine.cuda:
        yield "stages of models: `pipeline.py` has those of the CPU"
        return
    import pipeline

    for found in pipeline.device_rows(quick=sizes is SMALL, device=machine.device):
        yield Line(
            found["name"],
            found["value"],
            found["unit"],
            found["goal"],
            found["floor"],
            found["at_least"],
        )
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        command = "-m diagnostics run --pair embedded --contexts 128 --output-dir".split()
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command, f"{folder}/run"],
            cwd=HERE.parent,
            capture_output=True,
            text=True,
        )
        taken = time.perf_counter() - start
    if done.returncode:
        yield f"`run` of the embedded pair: {(done.stderr.splitlines() or ['failed'])[-1]}"
    else:
        yield Line("`run`, embedded pair, 128 contexts", taken, "s")


# ---------------------------------------------------------------- the table


def parts(sizes: Sizes, machine: Machine) -> list[tuple[str, Callable[[], Iterator[Line | str]]]]:
    """What is measured, the most wanted first."""
    return [
        ("checks", lambda: checks(sizes, machine)),
        ("statistics", lambda: statistics_lines(sizes, machine)),
        *(
            (loss, lambda loss=loss: loss_lines(sizes, machine, loss))
            for loss in ("reverse_kl", "forward_kl", "jsd")
        ),
        ("stages", lambda: stage_lines(sizes, machine)),
    ]


def head(machine: Machine, sizes: Sizes) -> str:
    """Card, date, commit, sizes."""
    commit = subprocess.run(
        ["git", "-C", str(HERE.parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return (
        f"{machine.name()}, {datetime.date.today()}, commit {commit or 'unknown'};"
        f" V = {sizes.vocabulary:,}, hidden {sizes.student:,} and {sizes.teacher:,}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table line by line, and say by the exit code whether a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--kernels", action="store_true", help="no stages of models")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new part after so many")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    machine, sizes = Machine(options.device), SMALL if options.small else Sizes()
    start, lines, failed, absent = time.perf_counter(), [], False, []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(head(machine, sizes) + "\n")
    say("| row | measured | goal | floor | over floor | |\n|---|---|---|---|---|---|")
    for name, part in parts(sizes, machine):
        if name == "stages" and options.kernels:
            continue
        if time.perf_counter() - start > 60 * options.minutes:
            absent.append(f"{name}: the time was used up")
            continue
        try:
            for line in part():
                if isinstance(line, str):
                    absent.append(line)
                    continue
                say(line.markdown())
                failed |= line.check and not line.met
        except torch.OutOfMemoryError as error:
            absent.append(f"the rest of {name}: {one_line(error)}")
        if machine.cuda:
            torch.cuda.empty_cache()
    for reason in absent:
        say(f"\nNot measured: {reason}.")
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
