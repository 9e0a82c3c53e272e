"""Rows of the benchmark that run whole stages: scoring, the probe, two processes.

Random weights in the shapes of Qwen2.5 0.5B (student) and 1.5B (teacher), float32; `quick` keeps the vocabulary
and two layers. Each ratio is taken within one process, stages and their floor in turn, medians of the pairs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VOCABULARY = 151_936
SHAPES = {
    "student": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "teacher": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
}


class Tokens:
    """As much of a tokenizer as scoring asks for."""

    all_special_ids: tuple = ()
    eos_token_id = 1
    chat_template = None

    def decode(self, ids):
        """Names in place of words."""
        return f"<{ids[0]}>"


def qwen(side: str, *, quick: bool) -> torch.nn.Module:
    """A random Qwen2 of the side's shape; normal weights, since speed does not depend on them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[side] | ({"num_hidden_layers": 2} if quick else {})
    torch.manual_seed(len(side))
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=4096, **shape)).eval()


def setting(*, quick: bool, contexts: int = 8, prompt: int = 16, response: int = 48):
    """A pair and a bank of random tokens."""
    from diagnostics.pairs import assemble
    from diagnostics.types import Bank, Context

    pair = assemble("bench", qwen("student", quick=quick), qwen("teacher", quick=quick), Tokens())
    ids = np.random.default_rng(0).integers(10, VOCABULARY, (contexts, prompt + response)).tolist()
    made = [Context(f"c{i}", f"p{i}", "", tuple(row[:prompt]), "", tuple(row[prompt:]), False) for i, row in enumerate(ids)]
    return pair, Bank(tuple(made))


def seconds(work) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def bare(model, todo) -> None:
    """The floor: backbone, then the output projection of the response positions, a chunk at a time."""
    for batch in todo:
        hidden_nH = batch.states(model)
        for start in range(0, len(hidden_nH), 64):
            model.logits(hidden_nH[start : start + 64])


def scoring_row(*, quick: bool) -> list[dict]:
    """Scoring against the two bare forwards with their projections."""
    from diagnostics.scores import batches, score

    pair, bank = setting(quick=quick)
    todo = batches(bank)
    ratios, floors = [], []
    for turn in range(4):
        floor = seconds(lambda: (bare(pair.student, todo), bare(pair.teacher, todo)))
        whole = seconds(lambda: score(pair, bank, sweep=(4, 8, 32)))
        if turn:
            ratios.append(whole / floor), floors.append(floor)
    return [row("scoring / two bare forwards with projections", statistics.median(ratios), "x", 1.10, 1.0)]


def probe_rows(*, quick: bool) -> list[dict]:
    """A whole probe at a given step against the teacher's forward and four of the student's."""
    from diagnostics.probe import probe
    from diagnostics.scores import batches, score

    pair, bank = setting(quick=quick)
    todo, tokens = batches(bank), score(pair, bank)
    ratios = []
    for turn in range(3):
        teacher, student = seconds(lambda: bare(pair.teacher, todo)), seconds(lambda: bare(pair.student, todo))
        whole = seconds(lambda: probe(pair, bank, tokens=tokens, step=1e-6))
        if turn:
            ratios.append(whole / (teacher + 4 * student))
    return [row("probe with placebo and one trial / (teacher + 4 student forwards)", statistics.median(ratios), "x", 1.30, 1.0)]


def two_process_rows(*, quick: bool) -> list[dict]:
    """`score` under torchrun with two processes of one thread against one process of one thread, on the embedded pair."""
    contexts = "48" if quick else "1000"
    with tempfile.TemporaryDirectory() as folder:
        times, tables = {}, {}
        for processes in (1, 2):
            out = Path(folder) / str(processes)
            _command(1, "rollout", "--contexts", contexts, "--output-dir", str(out))
            times[processes] = _command(processes, "score", "--batch-tokens", "4096", "--output-dir", str(out))
            tables[processes] = (out / "scores.parquet").read_bytes()
        overhead = seconds(lambda: subprocess.run([sys.executable, "-c", "import diagnostics.scores"], cwd=ROOT, check=True))
    speedup = (times[1] - overhead) / (times[2] - overhead)
    return [row("score, two processes / one (start-up taken off)", speedup, "x faster", 1.7, 2.0),
            row("score, two processes and one: tables differ", float(tables[1] != tables[2]), "", 0.0, 0.0)]


def _command(processes: int, stage: str, *arguments: str) -> float:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "diagnostics", stage, "--pair", "embedded", "--quiet", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return seconds(lambda: subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True))


def row(name: str, value: float, unit: str, goal: float, floor: float) -> dict:
    """One line of the benchmark's table."""
    return {"name": name, "value": round(value, 4), "unit": unit, "goal": goal, "floor": floor}


if __name__ == "__main__":
    for function in (scoring_row, probe_rows, two_process_rows):
        for line in function(quick="--quick" in sys.argv):
            print(line, flush=True)
