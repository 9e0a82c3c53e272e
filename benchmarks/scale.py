"""How analysis, comparison and page grow with the number of positions.

    python benchmarks/scale.py [--positions 100000 1000000 5000000] [--keep DIR]

Makes run directories of 250 positions per prompt (5 million positions have 20,000 prompts) with
made-up values in every column that the three commands read, then runs each command by itself.
Prints seconds, processor seconds, peak memory of the command and its copies (what they share counts
once) and seconds per million positions. Needs Linux; no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.analysis_speed import paper_size
from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import versions

LENGTH = 250
"""Positions of a response."""
PROMPTS_AT_ONCE = 200
"""Prompts that are made, and written as a row group, together."""
WORDS = tuple(f" word{i}" for i in range(800)) + tuple(map(str, range(100))) + tuple(".,;:!?-()'")
SECONDS = 0.5
"""Time between two looks at the memory."""
STAGES = ("analyze", "compare", "report")


def made_run(directory: Path, positions: int) -> Path:
    """Write a run directory with a token table, its contexts and a manifest."""
    prompts = max(1, positions // LENGTH)
    (directory / "tables").mkdir(parents=True)
    for name, part_of in (("tokens", tokens_of), ("contexts", contexts_of)):
        writer = None
        for first in range(0, prompts, PROMPTS_AT_ONCE):
            part = pa.Table.from_pandas(
                part_of(first, min(PROMPTS_AT_ONCE, prompts - first)), preserve_index=False
            )
            writer = writer or pq.ParquetWriter(directory / f"{name}.parquet", part.schema)
            writer.write_table(part)
        if writer is not None:
            writer.close()
    (directory / "manifest.json").write_text(json.dumps(manifest(directory)), encoding="utf-8")
    return directory


def tokens_of(first: int, prompts: int) -> pd.DataFrame:
    """The token table of some prompts, the first of which has the number `first`."""
    part = paper_size(prompts, LENGTH, seed=first)
    number = part["prompt_id"].str[1:].astype(int) + first
    names = {"context_id": "c", "prompt_id": "p"}
    part = part.assign(**{name: letter + number.astype(str) for name, letter in names.items()})
    return part.assign(token=np.array(WORDS, dtype=object)[part["token_id"] % len(WORDS)])


def contexts_of(first: int, prompts: int) -> pd.DataFrame:
    """The contexts of the same prompts."""
    rng = np.random.default_rng(first)
    rows = [
        {
            "context_id": f"c{number}",
            "prompt_id": f"p{number}",
            "prompt": f"What is {number}?",
            "prompt_ids": rng.integers(0, 1000, 8).tolist(),
            "response": "".join(WORDS[each] for each in ids),
            "response_ids": ids.tolist(),
            "finished": True,
        }
        for number in range(first, first + prompts)
        for ids in [rng.integers(0, len(WORDS), LENGTH)]
    ]
    return pd.DataFrame(rows)


def manifest(directory: Path) -> dict:
    """What the commands read of a manifest."""
    model = {"architecture": "LlamaForCausalLM", "parameters": 1, "dtype": "float32"}
    facts = {side: {"name": side, "revision": None, **model} for side in ("student", "teacher")}
    contexts = {"contexts.parquet": sha256_file(directory / "contexts.parquet")}
    probe = {"loss": "reverse_kl", "optimizer": "adamw", "seed": 0}
    stage = {"inputs": {}, "files": {}}
    return {
        "format": 1,
        "versions": versions(),
        "stages": {
            "rollout": {
                **stage,
                "settings": {"seed": 0, "max_new_tokens": LENGTH},
                "files": contexts,
                "facts": {"pair": "custom", **facts},
            },
            "score": {**stage, "settings": {"k": 16}},
            "probe": {**stage, "settings": probe, "facts": {**probe, "step_size": 1e-5}},
        },
        "joined": {"tokens.parquet": sha256_file(directory / "tokens.parquet")},
    }


def measured(stage: str, directory: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of a command and its copies."""
    command = [sys.executable, "-m", "diagnostics", stage, "--output-dir", str(directory)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [*command, "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(own_memory, family(process.pid))))
        time.sleep(SECONDS)
    if process.returncode:
        raise SystemExit(f"{stage} failed in {directory}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - begin,
        "processor": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "GiB": peak / 2**30,
    }


def family(process: int) -> list[int]:
    """A process and its children, theirs, and so on."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [process, *(each for child in children for each in family(int(child)))]


def own_memory(process: int) -> int:
    """Bytes of a process; of what it shares with others, its share."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Make the runs, time the commands and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[100_000, 1_000_000, 5_000_000])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--keep", type=Path, help="folder in which the runs are made and kept")
    options = parser.parse_args()
    print(f"{'positions':>10}{'stage':>9}{'s':>8}{'CPU s':>8}{'GiB':>6}{'s per million':>15}")
    with tempfile.TemporaryDirectory() as scratch:
        for positions in options.positions:
            directory = (options.keep or Path(scratch)) / str(positions)
            if not directory.exists():
                made_run(directory, positions)
            for stage in options.stages:
                found = measured(stage, directory)
                print(
                    f"{positions:>10,}{stage:>9}{found['seconds']:>8.1f}{found['processor']:>8.1f}"
                    f"{found['GiB']:>6.2f}{found['seconds'] / positions * 1e6:>15.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
