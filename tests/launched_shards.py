"""Run by torchrun: probes of a pair whose student is sharded, one after the other.

    torchrun --nproc-per-node 2 -m tests.launched_shards FOLDER JSON

FOLDER has student, teacher and contexts.parquet; JSON is a list of [NAME, options of `load_pair`,
options of `probe`]. The first process writes NAME.parquet and NAME.json: the token table, and what
every process found out about its own part of the student."""

import json
import sys
from pathlib import Path

import torch

from diagnostics.core import distributed
from diagnostics.core.tables import write_json, write_parquet
from diagnostics.core.types import read_bank
from diagnostics.models.pair import load_pair
from diagnostics.probing import step_state
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import ProbeConfig, bench_for, step_positions

SMALL = {"device": "cpu", "dtype": "float64"}
BATCH_TOKENS = 60
"""So that two processes have unlike numbers of batches."""


def run(folder, loading, options):
    """The token table of a probe, and what it says of its steps."""
    pair = load_pair(
        student=str(folder / "student"), teacher=str(folder / "teacher"), **SMALL | loading
    )
    bank = read_bank(folder / "contexts.parquet")
    tokens = score(pair, bank, batch_tokens=BATCH_TOKENS)
    result = probe(pair, bank, tokens=tokens, batch_tokens=BATCH_TOKENS, **options)
    return pair, bank, result


def said(result):
    """The numbers beside the token table."""
    tables = (result.calibration, result.placebo, result.horizon)
    numbers = [table.select_dtypes("number").to_numpy().tolist() for table in tables]
    steps = [
        [each.step_size, each.update_norm, each.gradient_norm, each.relative_norm]
        for each in result.steps
    ]
    return {"tables": numbers, "steps": steps, "weights": result.step.weights_sha256}


def moved(pair, bank, result):
    """The student's weights under random signs of a direction that is the same in every process."""
    config = ProbeConfig()
    positions = step_positions(pair, bank, result.tokens, config, batch_tokens=BATCH_TOKENS)
    bench = bench_for(pair, bank, positions, config, batch_tokens=BATCH_TOKENS)
    held = sum(p.numel() for p in bench.parameters)
    with bench.moved([torch.ones_like(p) for p in bench.parameters], 0.5, placebo_seed=11):
        shift = [p - o for p, o in zip(bench.parameters, bench.origin, strict=True)]
    bench.require_restored()
    return held, [each.sign().reshape(-1).tolist() for each in shift]


def main(folder, runs):
    step_state.SMALL = 0
    for name, loading, options in runs:
        pair, bank, result = run(folder, loading, options)
        held, signs = moved(pair, bank, result)
        write_parquet(folder / f"{name}.parquet", result.tokens)
        own = {"held": held, "signs": signs, **said(result)}
        everyone = [None] * distributed.world()
        distributed.group().all_gather_object(everyone, own)
        write_json(folder / f"{name}.json", everyone)
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
