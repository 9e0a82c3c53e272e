"""Measured cost of the instrument against its goals and its floors, in one table.

    python benchmarks/bench.py [--quick] [--only NAME ...] [--threads N] [--json] [--errors]

A row is a function under `@row`: it returns what was measured and the floor that the work cannot go
below, both in the row's unit. `--quick` shrinks the sizes and fails (exit code 1) only where a goal
of memory or exactness is missed: its timings are for reading. Ratios compare parts that were timed
in turn within one run, by their medians. Rows of memory run in a process of their own, so that
nothing else has raised its peak. A row whose yardstick this machine does not have is named at the
end as not measured.

Writes benchmarks/latest.json: a list of {name, value, unit, goal, floor}.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch
import torch.nn.functional as F
import yardsticks
from torch import Tensor

from diagnostics.core.schema import SCHEMA
from diagnostics.measure import divergences, losses

K, SWEEP = 16, (4, 8, 32)
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Sizes:
    """How large the rows are. Widths are hidden sizes."""

    vocabulary: int = 151_936
    student: int = 896
    teacher: int = 1536
    positions: int = 1024
    loss_positions: int = 1024
    timed_positions: int = 160
    loop_positions: int = 8
    repeats: int = 5


FULL = Sizes()
QUICK = Sizes(
    vocabulary=50_000,
    student=64,
    teacher=96,
    positions=640,
    loss_positions=1024,
    timed_positions=32,
    loop_positions=2,
    repeats=2,
)


@dataclass(frozen=True)
class Measured:
    """A row's result in the row's unit; NaN where there is no floor."""

    value: float
    floor: float = math.nan


@dataclass(frozen=True)
class Row:
    """An entry of the table."""

    name: str
    unit: str
    goal: float
    function: Callable[[Sizes], Measured]
    kind: str
    """*time* is never a failure in a quick run; *memory* and *exact* are; *memory* runs in its own
    process.
    """
    at_least: bool
    """True where the goal is to be reached from above."""

    def met(self, value: float) -> bool:
        """Whether the goal is reached; a row without one always is."""
        return math.isnan(self.goal) or (
            value >= self.goal if self.at_least else value <= self.goal
        )


ROWS: dict[str, Row] = {}


def row(
    name: str, *, unit: str, goal: float = math.nan, kind: str = "time", at_least: bool = False
) -> Callable:
    """Register `function(sizes) -> Measured` as a row."""

    def register(function: Callable[[Sizes], Measured]) -> Callable[[Sizes], Measured]:
        ROWS[name] = Row(name, unit, goal, function, kind, at_least)
        return function

    return register


# ---------------------------------------------------------------- what is measured


class Heads:
    """Random states and output projections of both models."""

    def __init__(self, sizes: Sizes, positions: int, *, trainable: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.student_VH = torch.randn(sizes.vocabulary, sizes.student, generator=generator) * (
            3 / sizes.student**0.5
        )
        self.teacher_VH = torch.randn(sizes.vocabulary, sizes.teacher, generator=generator) * (
            3 / sizes.teacher**0.5
        )
        self.student_NH = torch.randn(positions, sizes.student, generator=generator).requires_grad_(
            trainable
        )
        self.teacher_NH = torch.randn(positions, sizes.teacher, generator=generator)
        self.sampled_N = torch.randint(sizes.vocabulary, (positions,), generator=generator)
        self.student_VH.requires_grad_(trainable)

    def student(self, hidden_nH: Tensor) -> Tensor:
        """The student's logits [n, V] of its states."""
        return F.linear(hidden_nH, self.student_VH)

    def teacher(self, hidden_nH: Tensor) -> Tensor:
        """The teacher's logits [n, V] of its states."""
        return F.linear(hidden_nH, self.teacher_VH)

    def weights(self) -> tuple[Tensor, ...]:
        """States and weight of the student, then of the teacher."""
        return self.student_NH, self.student_VH, self.teacher_NH, self.teacher_VH

    def states(self) -> tuple:
        """States and head of the student, then of the teacher."""
        return self.student_NH, self.student, self.teacher_NH, self.teacher


def seconds_in_turn(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function; they run in turn, so that a slow spell falls on all of them.

    Of the processor where there is one thread, which other programs do not stretch; else of the
    clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for taken, function in zip(times, functions):
            start = clock()
            function()
            taken.append(clock() - start)
    return [median(taken[1:]) for taken in times]


def measure(student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor) -> dict[str, Tensor]:
    """Every measurement of full logits, at this benchmark's K and sweep."""
    return divergences.measure(student_NV, teacher_NV, sampled_N, k=K, sweep=SWEEP)


def transcendental_passes(vocabulary: int) -> Callable[[], None]:
    """Two exp2, one log2 and two square roots a token, in cache and nothing else: what the
    statistics cannot avoid.
    """
    both_2V, one_V = torch.rand(2, vocabulary), torch.rand(vocabulary)
    out_2V, out_V = torch.empty_like(both_2V), torch.empty_like(one_V)

    def passes() -> None:
        torch.exp2(both_2V, out=out_2V)
        torch.log2(one_V, out=out_V)
        torch.sqrt(both_2V, out=out_2V)

    return passes


@row("statistics_over_projections", unit="ratio", goal=0.25)
def statistics_over_projections(sizes: Sizes) -> Measured:
    """All statistics of a chunk against the two output projections that give its logits."""
    n, heads = sizes.timed_positions, Heads(sizes, sizes.timed_positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
    projections, statistics, passes = seconds_in_turn(
        sizes.repeats,
        lambda: (heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)),
        lambda: measure(*logits, heads.sampled_N),
        transcendental_passes(sizes.vocabulary),
    )
    return Measured(statistics / projections, n * passes / projections)


@row("kl_pair_over_projections", unit="ratio", goal=0.10)
def kl_pair_over_projections(sizes: Sizes) -> Measured:
    """Both KLs alone, as a re-score needs them. Floor: two exp2 a token."""
    n, heads = sizes.timed_positions, Heads(sizes, sizes.timed_positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
    both_2V = torch.rand(2, sizes.vocabulary)
    out_2V = torch.empty_like(both_2V)
    projections, kls, passes = seconds_in_turn(
        sizes.repeats,
        lambda: (heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)),
        lambda: divergences.kl_pair(*logits),
        lambda: torch.exp2(both_2V, out=out_2V),
    )
    return Measured(kls / projections, n * passes / projections)


@row("loop_over_statistics", unit="times", goal=30, at_least=True)
def loop_over_statistics(sizes: Sizes) -> Measured:
    """The oracle, one position at a time in float64, over `measure` on the same logits. Floor: over
    the passes alone.
    """
    heads = Heads(sizes, sizes.timed_positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
    few = [x[: sizes.loop_positions] for x in (*logits, heads.sampled_N)]
    loop, statistics, passes = seconds_in_turn(
        sizes.repeats,
        lambda: reference_loop(*few),
        lambda: measure(*logits, heads.sampled_N),
        transcendental_passes(sizes.vocabulary),
    )
    loop_position = loop / sizes.loop_positions
    return Measured(loop_position / (statistics / sizes.timed_positions), loop_position / passes)


def best_rows(heads: Heads, sizes: Sizes, function: Callable, *per_row: Tensor, **others) -> int:
    """Rows per block at which a plain function of rows is fastest."""
    count = min(16, sizes.timed_positions)
    few = [x[:count] for x in per_row]
    choices = [4, 8, 16]
    times = seconds_in_turn(
        2,
        *(lambda rows=rows: yardsticks.in_rows(function, rows, *few, **others) for rows in choices),
    )
    return choices[times.index(min(times))]


def plain_over(sizes: Sizes, *, kls: bool = False, compiled: bool = False) -> Measured:
    """Plain torch, in the blocks of rows that suit it best, over the same of this package. Floor:
    over the passes alone.
    """
    heads = Heads(sizes, sizes.timed_positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
    function = yardsticks.plain_kls if kls else yardsticks.plain_statistics
    per_row = logits if kls else (*logits, heads.sampled_N)
    others = {} if kls else {"ks": (*SWEEP, K)}
    if compiled:
        function = yardsticks.compiled(function, "cpu")
    rows = 16 if compiled else best_rows(heads, sizes, function, *per_row, **others)
    plain, mine, passes = seconds_in_turn(
        sizes.repeats,
        lambda: yardsticks.in_rows(function, rows, *per_row, **others),
        lambda: divergences.kl_pair(*logits) if kls else measure(*logits, heads.sampled_N),
        transcendental_passes(sizes.vocabulary),
    )
    return Measured(plain / mine, plain / (sizes.timed_positions * passes))


@row("plain_over_statistics", unit="times", at_least=True)
def plain_over_statistics(sizes: Sizes) -> Measured:
    """All statistics in plain vectorized torch, float32, over `measure` on the same logits."""
    return plain_over(sizes)


@row("compiled_over_statistics", unit="times", at_least=True)
def compiled_over_statistics(sizes: Sizes) -> Measured:
    """The same under torch.compile, 16 rows at a time."""
    return plain_over(sizes, compiled=True)


@row("plain_over_kl_pair", unit="times", at_least=True)
def plain_over_kl_pair(sizes: Sizes) -> Measured:
    """Both KLs in plain vectorized torch over `kl_pair`."""
    return plain_over(sizes, kls=True)


def reference_loop(
    student_NV: Tensor, teacher_NV: Tensor, sampled_N: Tensor
) -> list[dict[str, float]]:
    """The main measurements, position by position, as one would write them to be sure of them."""
    return [
        reference_position(student_V.double(), teacher_V.double(), int(y))
        for student_V, teacher_V, y in zip(student_NV, teacher_NV, sampled_N)
    ]


def reference_position(student_V: Tensor, teacher_V: Tensor, y: int) -> dict[str, float]:
    """The measurements of one position, by the formulas as they are written."""
    ln_p_V, ln_q_V = student_V.log_softmax(-1), teacher_V.log_softmax(-1)
    p_V, q_V = ln_p_V.exp(), ln_q_V.exp()
    ln_m_V = ((p_V + q_V) / 2).log()
    out = {
        "student_entropy": -(p_V * ln_p_V).sum(),
        "teacher_entropy": -(q_V * ln_q_V).sum(),
        "forward_kl": (q_V * (ln_q_V - ln_p_V)).sum(),
        "reverse_kl": (p_V * (ln_p_V - ln_q_V)).sum(),
        "js": (p_V * (ln_p_V - ln_m_V)).sum() / 2 + (q_V * (ln_q_V - ln_m_V)).sum() / 2,
        "hellinger": (1 - (p_V * q_V).sqrt().sum()).clamp(min=0).sqrt(),
        "student_logprob": ln_p_V[y],
        "teacher_logprob": ln_q_V[y],
    }
    # Ties go to the lower id, which topk does not promise and a stable sort does.
    most = max(K, *SWEEP)
    order_p, order_q = (
        x_V.sort(descending=True, stable=True).indices[:most].tolist()
        for x_V in (student_V, teacher_V)
    )
    for k in (K, *SWEEP):
        support = reference_support(p_V, q_V, set(order_p[:k]), set(order_q[:k]))
        out |= {name if k == K else f"{name}_k{k}": value for name, value in support.items()}
    return {name: float(value) for name, value in out.items()}


def reference_support(p_V: Tensor, q_V: Tensor, s: set[int], t: set[int]) -> dict[str, float]:
    """The measurements of one position on two supports, by the formulas as they are written."""
    union = sorted(s | t)
    p_U, q_U = p_V[union] / p_V[union].sum(), q_V[union] / q_V[union].sum()
    return {
        "compatibility": sum(q_V[v] for v in s),
        "compatibility_intersection": sum(q_V[v] for v in s & t),
        "topk_overlap": len(s & t) / len(s),
        "topk_jaccard": len(s & t) / len(union),
        "shared_student_mass": sum(p_V[v] for v in s & t),
        "bhattacharyya": (p_U * q_U).sqrt().sum(),
        "union_forward_kl": (q_U * (q_U.log() - p_U.log())).sum(),
    }


@row("statistics_error_float32", unit="nats", goal=1e-6, kind="exact")
def statistics_error_float32(sizes: Sizes) -> Measured:
    """Largest difference from the oracle, over positions and measurements, from float32 logits."""
    heads = Heads(sizes, sizes.loop_positions)
    logits = heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
    measured, expected = measure(*logits, heads.sampled_N), reference_loop(*logits, heads.sampled_N)
    errors = [
        abs(float(measured[name][i]) - value)
        for i, one in enumerate(expected)
        for name, value in one.items()
    ]
    return Measured(max(errors))


# ---------------------------------------------------------------- memory


def peak_extra(function: Callable[[], object]) -> float:
    """MiB by which the process's peak of resident memory rises while `function` runs. Linux
    only.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MEBIBYTE


def warm_up(sizes: Sizes) -> None:
    """Run everything once at a small size, so that libraries and thread pools are loaded before the
    peak is reset.
    """
    small = Sizes(vocabulary=2000, student=sizes.student, teacher=sizes.teacher)
    heads = Heads(small, 4, trainable=True)
    with torch.no_grad():
        scoring(heads)
    ours(heads, "jsd").backward()
    full_logits(heads, "jsd").backward()


def scoring(heads: Heads) -> dict[str, Tensor]:
    """Every measurement of hidden states, with the logits made in chunks."""
    return divergences.measure_hidden(*heads.states(), heads.sampled_N, k=K, sweep=SWEEP)


def scoring_peak(sizes: Sizes, positions: int) -> Measured:
    """Peak of scoring over models and states. Floor: the logits of one position."""
    warm_up(sizes)
    heads = Heads(sizes, positions)
    return Measured(peak_extra(lambda: scoring(heads)), 2 * 4 * sizes.vocabulary / MEBIBYTE)


@row("scoring_peak_memory", unit="MiB", goal=300, kind="memory")
def scoring_peak_memory(sizes: Sizes) -> Measured:
    """Peak of scoring, beyond the models and states."""
    return scoring_peak(sizes, sizes.positions)


@row("scoring_memory_growth", unit="ratio", goal=1.1, kind="memory")
def scoring_memory_growth(sizes: Sizes) -> Measured:
    """The same at four times the positions over once."""
    once = scoring_peak(sizes, sizes.positions).value
    return Measured(scoring_peak(sizes, 4 * sizes.positions).value / once, 1.0)


def ours(heads: Heads, loss: str) -> Tensor:
    """The loss with its logits made in chunks."""
    return losses.chunked_loss(
        *heads.states(),
        heads.sampled_N,
        loss=loss,
        weights_N=torch.ones(len(heads.sampled_N)),
        denominator=float(len(heads.sampled_N)),
    )


def full_logits(heads: Heads, loss: str) -> Tensor:
    """The plain implementation: `yardsticks.full_logits`."""
    return yardsticks.full_logits(*heads.weights(), loss)


def loss_memory(sizes: Sizes, loss: str) -> Measured:
    """Peak of loss and backward over that of the full-logits form. Floor: the gradients of head and
    states alone.
    """
    warm_up(sizes)
    peaks = []
    for implementation in (ours, full_logits):
        peaks.append(_peak_of_backward(implementation, sizes, loss))
    gradients = 4 * sizes.student * (sizes.vocabulary + sizes.loss_positions) / MEBIBYTE
    return Measured(peaks[0] / peaks[1], gradients / peaks[1])


def _peak_of_backward(implementation, sizes: Sizes, loss: str) -> float:
    """Peak memory of one loss and its backward pass; its heads are freed on return."""
    heads = Heads(sizes, sizes.loss_positions, trainable=True)
    return peak_extra(lambda: implementation(heads, loss).backward())


for _loss in ("forward_kl", "reverse_kl", "jsd"):
    row(f"loss_memory_{_loss}", unit="ratio", goal=0.25, kind="memory")(
        lambda sizes, loss=_loss: loss_memory(sizes, loss)
    )


# ---------------------------------------------------------------- losses


@row("loss_gradient_error", unit="relative", goal=1e-5, kind="exact")
def loss_gradient_error(sizes: Sizes) -> Measured:
    """Gradient of every loss in float32 against the full-logits form traced in float64, relative,
    the worst.
    """
    small = Sizes(vocabulary=min(sizes.vocabulary, 20_000), student=64, teacher=96)
    errors = []
    for loss in ("forward_kl", "reverse_kl", "jsd"):
        heads, exact = Heads(small, 48, trainable=True), Heads(small, 48, trainable=True)
        for name in ("student_VH", "teacher_VH", "student_NH", "teacher_NH"):
            getattr(exact, name).data = getattr(heads, name).data.double()
        got = torch.autograd.grad(ours(heads, loss), [heads.student_NH, heads.student_VH])
        expected = torch.autograd.grad(
            full_logits(exact, loss), [exact.student_NH, exact.student_VH]
        )
        errors += [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected)]
    return Measured(max(errors))


@row("loss_over_full_logits", unit="ratio", goal=1.1)
def loss_over_full_logits(sizes: Sizes) -> Measured:
    """Time of reverse KL and its backward over that of the full-logits form. Floor: the four matrix
    products.
    """
    heads = Heads(sizes, sizes.timed_positions, trainable=True)
    slope_NV = torch.ones(sizes.timed_positions, sizes.vocabulary)

    def products() -> None:
        with torch.no_grad():
            heads.student(heads.student_NH), heads.teacher(heads.teacher_NH)
            torch.mm(slope_NV, heads.student_VH), torch.mm(slope_NV.T, heads.student_NH)

    def step(implementation: Callable) -> Callable[[], None]:
        return lambda: torch.autograd.grad(
            implementation(heads, "reverse_kl"), [heads.student_NH, heads.student_VH]
        )

    mine, full, floor = seconds_in_turn(sizes.repeats, step(ours), step(full_logits), products)
    return Measured(mine / full, floor / full)


def other_over_loss(sizes: Sizes, other: Callable) -> Measured:
    """Reverse KL and its backward of another library over this package's."""
    heads = Heads(sizes, sizes.timed_positions, trainable=True)

    def step(implementation: Callable) -> Callable[[], None]:
        return lambda: torch.autograd.grad(
            implementation(), [heads.student_NH, heads.student_VH], retain_graph=False
        )

    mine, theirs = seconds_in_turn(
        sizes.repeats,
        step(lambda: ours(heads, "reverse_kl")),
        step(lambda: other(*heads.weights(), "reverse_kl")),
    )
    return Measured(theirs / mine)


@row("trl_over_loss", unit="times", at_least=True)
def trl_over_loss(sizes: Sizes) -> Measured:
    """TRL's fused divergence, which has Triton kernels on a GPU and plain torch here."""
    return other_over_loss(sizes, yardsticks.trl)


@row("liger_over_loss", unit="times", at_least=True)
def liger_over_loss(sizes: Sizes) -> Measured:
    """Liger's fused linear JSD at its own chunk, not compiled."""
    return other_over_loss(sizes, yardsticks.liger)


@row("loss_selection_projected", unit="ratio", goal=1.0, kind="exact")
def loss_selection_projected(sizes: Sizes) -> Measured:
    """Positions projected over positions selected, at a budget of 5 %."""
    heads, projected = Heads(QUICK, 400, trainable=True), []
    weights_N = torch.zeros(400)
    weights_N[torch.randperm(400, generator=torch.Generator().manual_seed(0))[:20]] = 1

    def counted(hidden_nH: Tensor) -> Tensor:
        projected.append(len(hidden_nH))
        return heads.student(hidden_nH)

    losses.chunked_loss(
        heads.student_NH,
        counted,
        heads.teacher_NH,
        heads.teacher,
        heads.sampled_N,
        loss="reverse_kl",
        weights_N=weights_N,
        denominator=20.0,
    ).backward()
    return Measured(sum(projected) / 20, 1.0)


# ---------------------------------------------------------------- errors by dtype


def error_table(sizes: Sizes, *, positions: int = 32) -> str:
    """Markdown: largest error of each measurement against float64, by dtype of the logits.

    *arithmetic*: from the same rounded logits in float64; *logits*: what rounding the logits itself
    changed."""
    heads = Heads(sizes, positions)
    student_NV, noise_NV = (
        head.double() / 3
        for head in (heads.student(heads.student_NH), heads.teacher(heads.teacher_NH))
    )
    exact = [10 + 3 * student_NV, 10 + 2.5 * student_NV + 1.5 * noise_NV]
    reference, columns = measure(*exact, heads.sampled_N), {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = [logits_NV.to(dtype) for logits_NV in exact]
        got, rounded = (
            measure(*narrow, heads.sampled_N),
            measure(*(x.double() for x in narrow), heads.sampled_N),
        )
        columns[dtype] = [(got, rounded), (rounded, reference)]
    heading = " | ".join(
        f"{str(dtype)[6:]} arithmetic | {str(dtype)[6:]} logits" for dtype in columns
    )
    lines = [f"| measurement | {heading} |", "|---|" + "---|" * 6]
    for name in (name for name in SCHEMA if name in reference):
        errors = [
            float((a[name] - b[name]).abs().max()) for pairs in columns.values() for a, b in pairs
        ]
        lines.append(
            f"| {name} | " + " | ".join(f"{error:.1e}" if error else "0" for error in errors) + " |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- the table


def run(entry: Row, sizes: Sizes, *, arguments: list[str]) -> dict:
    """One row as {name, value, unit, goal, floor}; a row of memory in its own process."""
    if entry.kind == "memory":
        done = subprocess.run(
            [sys.executable, __file__, "--row", entry.name, *arguments],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{entry.name} failed:\n{done.stderr}")
        measured = Measured(**json.loads(done.stdout))
    else:
        measured = entry.function(sizes)
    return {
        "name": entry.name,
        "value": measured.value,
        "unit": entry.unit,
        "goal": entry.goal,
        "floor": measured.floor,
    }


def line(result: dict, entry: Row, *, judged: bool) -> str:
    """The row for reading: measured over floor last. judged: whether a goal that was missed is said
    to be.
    """
    sign = "" if math.isnan(entry.goal) else ">= " if entry.at_least else "<= "
    goal = "-" if math.isnan(entry.goal) else f"{sign}{entry.goal:g}"
    over = result["value"] / result["floor"]
    floor, over = ("-", "-") if math.isnan(over) else (f"{result['floor']:.3g}", f"{over:.2f}")
    verdict = "  missed" if judged and not entry.met(result["value"]) else ""
    return (
        f"{result['name']:<30}{result['value']:>11.3g}"
        f" {result['unit']:<9}{goal:>10}{floor:>11}{over:>9}{verdict}"
    )


def main() -> int:
    """Print the table, write latest.json, and say by the exit code whether a bound was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes; only goals of memory and exactness can fail",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ROWS), help="these rows")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON and write no file"
    )
    parser.add_argument(
        "--errors", action="store_true", help="print the table of errors by dtype instead"
    )
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else FULL
    if options.errors:
        print(error_table(sizes))
        return 0
    if options.row:
        print(json.dumps(asdict(ROWS[options.row].function(sizes))))
        return 0
    arguments = [*(["--quick"] if options.quick else []), "--threads", str(options.threads)]
    results, broken, missing = [], False, []
    if not options.json:
        print(f"{'row':<30}{'measured':>11} {'unit':<9}{'goal':>10}{'floor':>11}{'x floor':>9}")
    for entry in (ROWS[name] for name in options.only or ROWS):
        try:
            results.append(run(entry, sizes, arguments=arguments))
        except yardsticks.Missing as reason:
            missing.append(f"{entry.name} ({reason})")
            continue
        judged = entry.kind != "time" or not options.quick
        broken |= judged and not entry.met(results[-1]["value"])
        if not options.json:
            print(line(results[-1], entry, judged=judged), flush=True)
    import pipeline

    for found in [] if options.only else pipeline.rows(quick=options.quick):
        entry = Row(
            found["name"],
            found["unit"],
            found["goal"],
            None,
            found.pop("kind"),
            found.pop("at_least"),
        )
        results.append(found)
        judged = entry.kind != "time" or not options.quick
        broken |= judged and not entry.met(found["value"])
        if not options.json:
            print(line(found, entry, judged=judged), flush=True)
    if not (options.only or torch.cuda.is_available()):
        missing.append("the rows of a GPU, there is none: benchmarks/gpu.py prints them")
    elif not (options.only or options.json):
        import gpu

        broken |= bool(gpu.main(["--kernels", *(["--small"] if options.quick else [])]))
    for reason in missing if not options.json else ():
        print(f"not measured: {reason}")
    written = json.dumps(
        [{k: None if v != v else v for k, v in result.items()} for result in results], indent=1
    )
    print(written) if options.json else (HERE / "latest.json").write_text(written + "\n")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
