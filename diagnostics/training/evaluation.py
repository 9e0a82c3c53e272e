"""What a student can do on held-out prompts: divergence on its own fresh text, task accuracy,
response length.

    forward_kl, reverse_kl    KL(q||p) (teacher first), KL(p||q): mean over the positions of n sampled responses a prompt
    accuracy                  share of the sampled responses that the verifier accepts (avg@n)
    accuracy_greedy           the same for one response a prompt by the likeliest token
    response_length, finished tokens a sampled response; share that ended by itself
    bank_forward_kl, ...      the two divergences at the positions of frozen contexts

Every measure is a ratio of sums over prompts, sum_g total_g / sum_g count_g, kept as one row a
prompt, so that means, intervals and paired differences between students come from one table.
Intervals resample prompts (`statistics`). Responses are drawn from streams named (seed, prompt,
sample): two students meet the same random numbers, and an interrupted training meets them again.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Prompt

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
Verify = Callable[[str, str], bool]
SEED = 1009
"""Of the held-out responses, the same for every training, so that trainings of different seeds can
be paired.
"""
VERIFIERS = ("auto", "sums", "math", "none")
COLUMNS = ("measure", "prompt_id", "total", "count")
"""Of an evaluation: one row a measure and prompt."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How the student is evaluated during training."""

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
    verifier: str = field(
        default="auto",
        metadata={
            "help": "what judges answers: sums (story sums), math (math-verify), none",
            "choices": VERIFIERS,
        },
    )


class FrozenBank:
    """Contexts with the teacher's states for them, scored again and again as the student changes.

    Under several processes each holds a share of the batches; results are whole on all.
    """

    def __init__(self, pair: Pair, bank: Bank, *, batch_tokens: int | None = None):
        from diagnostics.probing import scores

        scores.check_bank(pair, bank)
        self.pair, self.bank = pair, bank
        self.todo = scores.local_batches(
            scores.batches(bank, batch_tokens=batch_tokens or scores.BATCH_TOKENS)
        )
        self.teacher = scores.teacher_states(pair, self.todo)
        self.prompt_ids = np.repeat(
            [context.prompt_id for context in bank], [len(context.response_ids) for context in bank]
        )

    def divergences(self) -> tuple[np.ndarray, np.ndarray]:
        """KL(q||p) and KL(p||q) [N] in nats with the student as it is now."""
        from diagnostics.probing import scores

        return scores.rescore(
            self.pair, self.todo, self.teacher, positions=self.bank.positions, description="bank"
        )


def evaluate(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    bank: FrozenBank | None = None,
    verify: Verify | None = None,
    samples: int = 4,
    max_new_tokens: int = 64,
    seed: int = SEED,
) -> pd.DataFrame:
    """Evaluate the pair's student as it is now.

    prompts: held out from training; those with an answer count towards accuracy where
    `verify(response, answer)` is given. Returns one row a measure and prompt with columns measure,
    prompt_id, total, count (see the module's head; KLs in nats). Raises DiagnosticsError without
    prompts or samples."""
    from diagnostics.contexts.rollouts import sample

    if not prompts or samples < 1:
        raise DiagnosticsError(
            f"An evaluation needs prompts and samples; got {len(prompts)} prompts and {samples}"
            " samples."
        )
    training = pair.student.model.training
    pair.student.model.eval()
    try:
        options = {"max_new_tokens": max_new_tokens, "seed": seed}
        sampled = sample(pair, prompts, samples_per_prompt=samples, **options)
        frames = [*_divergences(FrozenBank(pair, sampled), ""), *_responses(sampled)]
        if bank is not None:
            frames += _divergences(bank, "bank_")
        if verify is not None:
            greedy = sample(pair, prompts, top_k=1, **options)
            frames += [
                _accuracy("accuracy", sampled, prompts, verify),
                _accuracy("accuracy_greedy", greedy, prompts, verify),
            ]
    finally:
        pair.student.model.train(training)
    return pd.concat(frames, ignore_index=True)


def by_prompt(measure: str, prompt_ids: Sequence[str], values: Sequence[float]) -> pd.DataFrame:
    """One measure as rows of an evaluation: totals and counts of the finite values by prompt."""
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
    return by_prompt(
        measure,
        [c.prompt_id for c in judged],
        [verify(c.response, answers[c.prompt_id]) for c in judged],
    )


def estimate(rows: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of one measure, total over count, with its draws over prompts.

    rows: columns prompt_id, total, count. NaN without a count.
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

    Returns columns measure, mean, low, high, count (positions or responses), prompts.
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


def find_verifier(name: str, *, pair: str, prompts: Sequence[Prompt]) -> Verify | None:
    """The function (response, answer) -> accepted, or None where nothing can be judged.

    auto: the task of a named pair (story sums for `embedded`); otherwise math-verify where it is
    installed and prompts carry answers. Raises DiagnosticsError where a verifier was asked for and
    cannot be had."""
    answered = sum(prompt.answer is not None for prompt in prompts)
    if name == "none" or (name == "auto" and not answered):
        return None
    if not answered:
        raise DiagnosticsError(
            f"The verifier {name!r} was asked for, and no held-out prompt has an answer. Add an"
            " `answer` column."
        )
    from diagnostics.contexts.story_sums import TASKS
    from diagnostics.models.pair import NAMED_PAIRS

    named = NAMED_PAIRS.get(pair)
    task = TASKS.get(named.task if name == "auto" and named else name)
    if task:
        return task.verify
    if importlib.util.find_spec("math_verify"):
        return verify_math
    if name == "math":
        raise DiagnosticsError(
            "The verifier 'math' needs the package math-verify. Run `pip install math-verify`, or"
            " use --verifier none."
        )
    log.warning(
        "%d held-out prompts have answers, which nothing here can judge: accuracy is left out (pip"
        " install math-verify)",
        answered,
    )
    return None


def verify_math(response: str, answer: str) -> bool:
    """True where math-verify finds the response's last expression equal to the answer, plain or
    LaTeX.
    """
    from math_verify import parse, verify

    gold = answer if "$" in answer or "\\" in answer else f"${answer}$"
    return bool(verify(parse(gold), parse(response)))
