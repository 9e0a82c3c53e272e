"""Rows of the benchmark that run whole stages: scoring, the probe, two processes, and a GPU.

    python benchmarks/pipeline.py [--quick]    # these rows alone; bench.py runs them after its own

Random weights in the shapes of Qwen2.5 0.5B (student) and 1.5B (teacher), float32; the two-process
row takes two of their layers, and `quick` takes two narrow ones over 16,000 tokens. Each ratio is
taken within one process, stages and their floor in turn, medians of the pairs. With a GPU:
Qwen3-1.7B and 4B in bfloat16 on 300 contexts of 192 positions, the probe's student in float32."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnostics.core import distributed
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import batches, score
from diagnostics.probing.step import StepBench

VOCABULARY = 151_936
STUDENT = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
TEACHER = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
STUDENT_3 = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TEACHER_3 = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


class Tokens:
    """As much of a tokenizer as scoring asks for."""

    all_special_ids: tuple = ()
    eos_token_id = 1
    chat_template = None

    def decode(self, ids):
        """Names in place of words."""
        return f"<{ids[0]}>"


def qwen2(shape: dict, vocabulary: int = VOCABULARY) -> torch.nn.Module:
    """A random Qwen2 of the shape; speed does not depend on the weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(shape["hidden_size"])
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096, **shape
        )
    ).eval()


def qwen3(shape: dict, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A random Qwen3 of the shape, made where it will run."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(shape["hidden_size"])
    with torch.device(device):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY,
                tie_word_embeddings=True,
                max_position_embeddings=4096,
                **shape,
            )
        )
    return model.to(dtype).eval()


def small_pair(*, quick: bool, layers: int | None = None):
    """The two Qwen2.5 shapes, or two narrow models over 16,000 tokens."""
    if quick:
        return pair_of(
            *(
                qwen2(
                    STUDENT
                    | {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 2},
                    16_000,
                )
                for size in (224, 336)
            )
        )
    return pair_of(
        *(
            qwen2(shape | ({"num_hidden_layers": layers} if layers else {}))
            for shape in (STUDENT, TEACHER)
        )
    )


def pair_of(student: torch.nn.Module, teacher: torch.nn.Module):
    """A pair of models in memory."""
    from diagnostics.models.pair import assemble

    return assemble("bench", student, teacher, Tokens())


def random_bank(*, contexts: int = 8, prompt: int = 16, response: int = 48):
    """Contexts of random tokens, all of one length."""
    from diagnostics.core.types import Bank, Context

    ids = np.random.default_rng(0).integers(10, 16_000, (contexts, prompt + response)).tolist()
    return Bank(
        tuple(
            Context(f"c{i}", f"p{i}", "", tuple(row[:prompt]), "", tuple(row[prompt:]), False)
            for i, row in enumerate(ids)
        )
    )


def seconds(work) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def bare(model, todo) -> None:
    """The floor: backbone, then the output projection of the response positions, a chunk at a
    time.
    """
    for batch in todo:
        hidden_nH = batch.states(model)
        for start in range(0, len(hidden_nH), 64):
            model.logits(hidden_nH[start : start + 64])


def scoring_rows(*, quick: bool) -> list[dict]:
    """Scoring against the two bare forwards with their projections."""
    pair, bank = small_pair(quick=quick), random_bank()
    todo, ratios = batches(bank), []
    for _ in range(4):
        floor = seconds(lambda: (bare(pair.student, todo), bare(pair.teacher, todo)))
        ratios.append(seconds(lambda: score(pair, bank, sweep=(4, 8, 32))) / floor)
    return [row("scoring_over_bare_forwards", statistics.median(ratios[1:]), "x", 1.10, 1.0)]


def probe_rows(*, quick: bool) -> list[dict]:
    """A whole probe against the teacher's forward and four of the student's; calibration and
    placebo apart, in student forwards.

    The probe is set up, takes its step, scores the bank before and after and restores the student.
    At full shapes one turn, since each takes minutes."""
    pair, bank = small_pair(quick=quick), random_bank(response=48 if quick else 112)
    tokens, todo = score(pair, bank), batches(bank)
    turns = [_probe_turn(pair, bank, tokens, todo) for _ in range(3 if quick else 1)]
    teacher, student, whole, trial, placebo = (statistics.median(part) for part in zip(*turns))
    return [
        row("probe_over_forwards", whole / (teacher + 4 * student), "x", 1.30, 1.0),
        row("calibration_trial", trial / student, "forwards", floor=0.5),
        row("placebo", placebo / student, "forwards", floor=1.0),
    ]


def _probe_turn(pair, bank, tokens, todo) -> tuple[float, ...]:
    """Seconds of the teacher's and the student's forward, of the probe, of one calibration trial
    and of the placebo.
    """
    teacher, student = (
        seconds(lambda model=model: bare(model, todo)) for model in (pair.teacher, pair.student)
    )
    found = {}

    def whole():
        bench = StepBench(pair, bank, tokens, assign_folds(tokens, 2, seed=0))
        weights_N = bench.loss_weights(0)
        found["bench"], found["weights_N"] = bench, weights_N
        direction = found["direction"] = bench.direction(
            weights_N, loss="reverse_kl", beta=0.5, optimizer="adamw"
        )
        bench.rescore("before")
        with bench.moved(direction.update, 1e-6):
            bench.rescore("after")
        bench.require_restored()

    def placebo():
        with found["bench"].moved(found["direction"].update, 1e-6, placebo_seed=0):
            found["bench"].rescore("placebo")

    def trial():
        with found["bench"].moved(found["direction"].update, 1e-6):
            found["bench"].mean_loss(found["weights_N"], loss="reverse_kl", beta=0.5)

    return teacher, student, seconds(whole), seconds(trial), seconds(placebo)


def two_process_rows(*, quick: bool) -> list[dict]:
    """`score` in two processes of one thread against one process of one thread; start-up and
    loading are not counted.
    """
    one, two = _timed_score(1, quick=quick), _timed_score(2, quick=quick)
    return [
        row("two_processes_speedup", one["seconds"] / two["seconds"], "x", 1.7, 2.0, at_least=True),
        row(
            "two_processes_tables_differ",
            float(one["table"] != two["table"]),
            "",
            0.0,
            kind="exact",
        ),
    ]


def _timed_score(processes: int, *, quick: bool) -> dict:
    """Seconds of the call in the slowest process, and the table's hash."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        __file__,
        "--timed-score",
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def timed_score(*, quick: bool) -> None:
    """What `_timed_score` starts: one process's part, timed between two barriers; the median of
    three after one to warm up.
    """
    torch.set_num_threads(1)
    pair, bank = small_pair(quick=quick, layers=2), random_bank(contexts=16 if quick else 48)
    times = []
    for _ in range(2 if quick else 4):
        distributed.barrier()
        times.append(
            seconds(
                lambda: (
                    score(pair, bank, sweep=(4, 8, 32), batch_tokens=256),
                    distributed.barrier(),
                )
            )
        )
    table = score(pair, bank, batch_tokens=256)
    if distributed.is_main():
        digest = hashlib.sha256(pd.util.hash_pandas_object(table).to_numpy().tobytes()).hexdigest()
        print(json.dumps({"seconds": statistics.median(times[1:]), "table": digest}))


def device_rows(
    *, quick: bool, device: str = "cuda", contexts: int = 300, response: int = 192
) -> list[dict]:
    """The paper's size on a GPU: seconds, share of the bare forwards' throughput, peak memory; then
    a whole probe.
    """
    pair = pair_of(
        qwen3(STUDENT_3, torch.bfloat16, device), qwen3(TEACHER_3, torch.bfloat16, device)
    )
    bank = random_bank(contexts=4 if quick else contexts, prompt=64, response=response)
    todo = batches(bank)
    floor, whole = (
        min(_on_device(work, device) for _ in range(2))
        for work in (
            lambda: (bare(pair.student, todo), bare(pair.teacher, todo)),
            lambda: score(pair, bank, sweep=(4, 8, 32)),
        )
    )
    rows = [
        row("gpu_scoring_seconds", whole, "s", 15.0, floor),
        row("gpu_scoring_throughput", floor / whole, "x", 0.60, 1.0, at_least=True),
        row("gpu_scoring_peak", _peak_gb(device), "GB"),
    ]
    pair, tokens = pair_of(pair.student.model.float(), pair.teacher.model), score(pair, bank)
    taken = _on_device(lambda: probe(pair, bank, tokens=tokens, step=1e-6), device)
    return [
        *rows,
        row("gpu_probe_seconds", taken, "s"),
        row("gpu_probe_peak", _peak_gb(device), "GB"),
    ]


def _on_device(work, device: str) -> float:
    """Seconds of a call, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    return seconds(lambda: (work(), wait()))


def _peak_gb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else float("nan")


NAN = float("nan")


def row(
    name: str,
    value: float,
    unit: str,
    goal: float = NAN,
    floor: float = NAN,
    *,
    kind: str = "time",
    at_least: bool = False,
) -> dict:
    """One line of the benchmark's table."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "floor": floor,
        "kind": kind,
        "at_least": at_least,
    }


def rows(*, quick: bool):
    """Every row, one after the other; those of a GPU where there is one."""
    groups = [scoring_rows, probe_rows, two_process_rows] + (
        [device_rows] if torch.cuda.is_available() else []
    )
    for group in groups:
        yield from group(quick=quick)
        gc.collect()


if __name__ == "__main__" and "--timed-score" in sys.argv:
    timed_score(quick="--quick" in sys.argv)
elif __name__ == "__main__":
    for found in rows(quick="--quick" in sys.argv):
        print(found, flush=True)
