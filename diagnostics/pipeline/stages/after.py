"""The stage `after`: the contexts are scored again with a trained student."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diagnostics.contexts.trained_prompts import RECORD, read_trained_prompts, seen_contexts
from diagnostics.core.fingerprints import fingerprint_files
from diagnostics.core.tables import write_parquet_parts
from diagnostics.core.types import Bank, read_bank
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import SCORE, Job
from diagnostics.pipeline.stages.token_table import join_tokens

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair
    from diagnostics.probing.config.scores import ScoreConfig
    from diagnostics.probing.scores import MeasuredBank

log = logging.getLogger("diagnostics")


def do(job: Job) -> None:
    """Do the stage where a command names a trained student."""
    if job.flag("after"):
        after_stage(job.run, job.models, job.flag("after"), job.configs[SCORE])


def after_stage(run: Run, models: Models, checkpoint: str, config: ScoreConfig) -> None:
    """Score the frozen positions again with a trained student, into `after.parquet`.

    A checkpoint is one step: no fold is held out for it, and there is no permuted teacher beside
    it. In a run without a probe the table then has its gains, neither `fold` nor `context_gain`,
    and the manifest says `steps: 1`. A probe's gains stay what they are, whichever came first; the
    checkpoint's are forward_kl minus forward_kl_after.

    Args:
        run: A run directory with scores.
        models: The pair of those scores.
        checkpoint: Folder or Hugging Face id of the trained student.
        config: Supports and batches, those of the scores.
    """
    from diagnostics.probing.scores import measure_bank

    def work() -> dict:
        pair = _trained_pair(models, checkpoint)
        bank = pair.graded(read_bank(run.path("contexts.parquet")))
        measured = measure_bank(pair, bank, config, shards=run.shards("after"))
        seen = _seen(checkpoint, bank)
        write_parquet_parts(run.path("after.parquet"), _after_parts(measured, config, seen))
        seen_facts = {} if seen is None else {"seen_positions": int(seen.sum())}
        return {**pair.facts, "steps": 1, "not_finite": measured.not_finite, **seen_facts}

    trained = {"after": fingerprint_files(Path(checkpoint))} if Path(checkpoint).exists() else {}
    run.stage(
        "after",
        settings={**models.settings, "after": checkpoint, **dataclasses.asdict(config)},
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["after.parquet"],
        work=work,
        code=("probing.scores", "contexts.trained_prompts"),
        models=lambda: models.fingerprint() | trained,
    )
    join_tokens(run)


def _after_parts(
    measured: MeasuredBank, config: ScoreConfig, seen_N: np.ndarray | None
) -> Iterator[pd.DataFrame]:
    """The parts of after.parquet: a trained student's columns, and whether it saw the prompt."""
    from diagnostics.probing.scores import as_after

    first = 0
    for part in measured.tokens():
        after, last = as_after(part, config), first + len(part)
        yield after if seen_N is None else after.assign(seen=seen_N[first:last])
        first = last


def _trained_pair(models: Models, checkpoint: str) -> Pair:
    """The pair with a trained student in the student's place."""
    from diagnostics.models.named_pairs import named_pair
    from diagnostics.models.pair import load_pair

    options = dataclasses.asdict(models.config)
    name = options.pop("pair")
    teacher = (
        {}
        if name is None or options["teacher_logprobs"]
        else {"teacher": named_pair(name).folders()[1]}
    )
    return load_pair(**options | teacher | {"student": checkpoint, "student_revision": None})


def _seen(checkpoint: str, bank: Bank) -> np.ndarray | None:
    """Whether the checkpoint was trained on each position's prompt [N]; None where unknown."""
    trained = read_trained_prompts(checkpoint)
    if trained is None:
        log.info(
            "%s holds no %s, so it is unknown which contexts the checkpoint was trained on",
            checkpoint,
            RECORD,
        )
        return None
    lengths = [len(context.sampled_ids) for context in bank]
    return np.repeat(seen_contexts(trained, bank), lengths)
