"""What a student can do on held-out prompts: divergence on its own text, accuracy, length.

    forward_kl, reverse_kl    KL(q||p) (teacher first), KL(p||q): mean over the positions of the
                              sampled responses
    accuracy                  share of the sampled responses that the verifier accepts (avg@n)
    accuracy_greedy           the same for one response per prompt, the most likely token each time
    response_length, finished tokens per sampled response; share that ended with an end token
    bank_forward_kl, ...      the two divergences at the positions of frozen contexts

Every measure is a ratio of sums over prompts, sum_g total_g / sum_g count_g, kept as one row per
prompt, so that means, intervals and paired differences between students come from one table.
Intervals resample prompts (`bootstrap`). Responses are drawn from streams named (seed, prompt,
sample): two students meet the same random numbers, and an interrupted training meets them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.contexts.prompts import Given, any_prompts
from diagnostics.contexts.verifiers import VERIFIER_FLAG, Verify, find_verifier, judge
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair
    from diagnostics.probing.frozen_bank import FrozenBank

__all__ = ["EvaluationConfig", "estimate", "evaluate", "find_verifier", "summarize_evaluation"]
SEED = 1009
"""Seed of the held-out responses. It is the same for every training, so that trainings of different
seeds can be paired.
"""
COLUMNS = ("measure", "prompt_id", "total", "count")
"""Columns of an evaluation, which has one row per measure and prompt."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How the student is evaluated during training.

    Attributes:
        eval_every: Steps between two evaluations; 0 evaluates before and after training only.
        eval_prompts: File of held-out prompts; the last of the training prompts where None.
        eval_contexts: Number of held-out prompts; 0 turns evaluation off.
        eval_samples: Sampled responses per held-out prompt.
        verifier: What judges answers: `sums` (story sums), `math` (math-verify), `none`, `auto`, or
            a function of one's own (see `find_verifier`).
    """

    eval_every: int = field(
        default=0,
        metadata={"help": "evaluate after every so many steps; 0: before and after training only"},
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "file of held-out prompts; the last of --prompts where not given"},
    )
    eval_contexts: int = field(
        default=64, metadata={"help": "number of held-out prompts; 0 turns evaluation off"}
    )
    eval_samples: int = field(
        default=4, metadata={"help": "sampled responses to each held-out prompt"}
    )
    verifier: str = field(default="auto", metadata=VERIFIER_FLAG)


def evaluate(
    pair: Pair,
    prompts: Given,
    *,
    bank: FrozenBank | Bank | None = None,
    verify: Verify | None = None,
    samples: int = 4,
    max_new_tokens: int = 64,
    seed: int = SEED,
) -> pd.DataFrame:
    """Evaluate the pair's student as it is now.

    Args:
        pair: The student and its teacher. The student is in evaluation mode meanwhile, and in its
            former mode afterwards.
        prompts: Prompts held out from training, or what `load_prompts` reads: a path, texts, rows,
            or frozen contexts. Those with an answer count towards accuracy.
        bank: Frozen contexts whose divergences are measured too.
        verify: From a response and an answer to whether it is accepted; without it, accuracy is
            left out.
        samples: Sampled responses per prompt, at least 1.
        max_new_tokens: Longest response in tokens.
        seed: Seed of sampling.

    Returns:
        One row per measure and prompt, with columns measure (see the module's head; KLs in nats),
        prompt_id, total and count.

    Raises:
        DiagnosticsError: There are no prompts or no samples.
    """
    from diagnostics.contexts.rollouts import sample_responses
    from diagnostics.probing.frozen_bank import FrozenBank

    prompts = any_prompts(prompts, pair)
    if not prompts or samples < 1:
        raise DiagnosticsError(
            f"An evaluation needs prompts and samples; got {len(prompts)} prompts and {samples}"
            " samples."
        )
    training = pair.student.model.training
    pair.student.model.eval()
    try:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        sampled = sample_responses(pair, prompts, samples_per_prompt=samples, **options)
        frames = [*_divergences(FrozenBank(pair, sampled), ""), *_responses(sampled)]
        if bank is not None:
            bank = FrozenBank(pair, bank) if isinstance(bank, Bank) else bank
            frames += _divergences(bank, "bank_")
        if verify is not None:
            greedy = sample_responses(pair, prompts, top_k=1, **options)
            frames += [
                _accuracy("accuracy", sampled, prompts, verify),
                _accuracy("accuracy_greedy", greedy, prompts, verify),
            ]
    finally:
        pair.student.model.train(training)
    return pd.concat(frames, ignore_index=True)


def by_prompt(measure: str, prompt_ids: Sequence[str], values: Sequence[float]) -> pd.DataFrame:
    """One measure as rows of an evaluation.

    Args:
        measure: Its name.
        prompt_ids: The prompt of each value.
        values: Numbers; NaN ones are neither added nor counted.

    Returns:
        One row per prompt, with the columns of COLUMNS.
    """
    values = pd.Series(np.asarray(values, dtype=np.float64))
    groups = values.groupby(np.asarray(prompt_ids, dtype=object))
    sums = (
        pd.DataFrame({"total": groups.sum(), "count": groups.count()})
        .rename_axis("prompt_id")
        .reset_index()
    )
    return sums.assign(measure=measure)[list(COLUMNS)]


def _divergences(bank: FrozenBank, prefix: str) -> list[pd.DataFrame]:
    names = (f"{prefix}forward_kl", f"{prefix}reverse_kl")
    return [
        by_prompt(name, bank.prompt_ids, values) for name, values in zip(names, bank.divergences())
    ]


def _responses(bank: Bank) -> list[pd.DataFrame]:
    prompt_ids = [context.prompt_id for context in bank]
    return [
        by_prompt("response_length", prompt_ids, [len(context.response_ids) for context in bank]),
        by_prompt("finished", prompt_ids, [context.finished for context in bank]),
    ]


def _accuracy(measure: str, bank: Bank, prompts: Sequence[Prompt], verify: Verify) -> pd.DataFrame:
    answers = {prompt.prompt_id: prompt.answer for prompt in prompts if prompt.answer is not None}
    judged = [context for context in bank if context.prompt_id in answers]
    verdicts, _ = judge(
        Bank(tuple(judged)), {c.context_id: answers[c.prompt_id] for c in judged}, verify
    )
    # A response that the verifier could not judge is counted by neither side of the share.
    found = [np.nan if c.correct is None else c.correct for c in verdicts]
    return by_prompt(measure, [c.prompt_id for c in judged], found)


def estimate(rows: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of one measure, total over count, with its draws over prompts.

    Args:
        rows: Columns prompt_id, total, count.
        draws: Bootstrap draws over prompts.
        seed: Seed of the bootstrap.

    Returns:
        The estimate; NaN without a count.
    """
    prompts = PromptClusters(rows["prompt_id"].to_numpy(), draws=draws, seed=seed)
    sums = prompts.sums(
        rows["total"].to_numpy(dtype=np.float64), rows["count"].to_numpy(dtype=np.float64)
    )
    total, count = (prompts.weights @ sums).T
    whole = sums.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Estimate(
            float(np.divide(*whole)),
            np.where(count > 0, total / count, np.nan),
            int(whole[1]),
            prompts.count,
        )


def summarize_evaluation(
    rows: pd.DataFrame, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean and prompt-bootstrap interval of each measure of an evaluation.

    Args:
        rows: Table of `evaluate`.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per measure, with columns measure, mean, low, high, count (positions or responses)
        and prompts.
    """
    out = []
    for measure, part in rows.groupby("measure", sort=False):
        mean = estimate(part, draws=draws, seed=seed)
        low, high = mean.interval(level)
        out.append(
            {
                "measure": measure,
                "mean": mean.value,
                "low": low,
                "high": high,
                "count": mean.positions,
                "prompts": mean.prompts,
            }
        )
    return pd.DataFrame(out, columns=["measure", "mean", "low", "high", "count", "prompts"])
