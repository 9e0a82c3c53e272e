"""The stage `rollout`: responses are sampled and frozen, or those of another program are."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from diagnostics.contexts.choose_prompts import choose_prompts, json_object, rendered_sha256
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import write_bank
from diagnostics.models.identity import Models, file_hash
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import BANK, PROBE, PROMPTS, ROLLOUT, Job
from diagnostics.pipeline.stages.settings import merged

if TYPE_CHECKING:
    from diagnostics.contexts.config import RolloutConfig
    from diagnostics.contexts.import_rollouts import ImportConfig
    from diagnostics.contexts.prompts import PromptConfig, PromptSet
    from diagnostics.core.progress import Shards
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")


def do(job: Job) -> None:
    """Do the stage of a command."""
    rollout_stage(
        job.run,
        job.models,
        job.configs[PROMPTS],
        job.configs[ROLLOUT],
        job.configs[BANK],
        folds=job.configs[PROBE].folds if PROBE in job.configs else None,
    )


def rollout_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    rollout: RolloutConfig,
    elsewhere: ImportConfig | None = None,
    *,
    folds: int | None = None,
) -> None:
    """Sample and freeze contexts, or freeze the rollouts of another program.

    Args:
        run: The open run directory.
        models: The pair; the student samples.
        prompts: Which prompts are answered, and how they are rendered.
        rollout: How responses are sampled.
        elsewhere: A file of rollouts. Where its `rollouts` is set, those are frozen and nothing is
            sampled.
        folds: Folds of a probe that comes next, which too few prompts are refused for.
    """
    from diagnostics.contexts.verifiers import recorded_verifier

    if elsewhere is not None and elsewhere.rollouts is not None:
        freeze_stage(run, models, prompts, elsewhere, verifier=rollout.verifier)
        return
    named = (file_hash("prompts", prompts.prompts), recorded_verifier(rollout.verifier))
    bound: int | None = None
    if folds is not None and "rollout" not in run.manifest["stages"]:
        bound = at_most(prompts)
        _require_enough(bound, folds)

    def work() -> dict[str, Any]:
        _require_engine(rollout)  # before the models are loaded
        pair = models.pair
        found = choose_prompts(models, prompts, room=rollout.max_new_tokens)
        if folds is not None and len(found.prompts) != bound:
            _require_enough(len(found.prompts), folds)
        return _sampled(run, pair, found, rollout)

    run.stage(
        "rollout",
        settings=merged(models.writer_settings, prompts, rollout, *named),
        outputs=["contexts.parquet"],
        work=work,
        code=(
            "contexts.rollouts",
            "contexts.vllm_rollouts",
            "contexts.prompts",
            "contexts.story_sums",
            "contexts.verifiers",
            "models.pair",
        ),
        models=models.fingerprint,
    )


def _require_engine(rollout: RolloutConfig) -> None:
    """Refuse vLLM where it is not installed."""
    from diagnostics.contexts.vllm_rollouts import require_vllm

    if rollout.rollout_engine == "vllm":
        require_vllm()


def _sampled(run: Run, pair: Pair, found: PromptSet, rollout: RolloutConfig) -> dict[str, Any]:
    """Sample, judge and write the contexts, and return the facts for the manifest."""
    from diagnostics.contexts.generation_settings import positions_after_turn_end, sampling_facts
    from diagnostics.contexts.rollouts import chosen_batch_tokens, engine_facts, sampled
    from diagnostics.contexts.verifiers import judge_rollouts

    rendered = rendered_sha256(found.prompts)
    chosen = dataclasses.replace(rollout, batch_tokens=chosen_batch_tokens(pair, rollout))
    bank = sampled(pair, found.prompts, chosen, shards=_responses_so_far(run, rendered))
    bank, judged = judge_rollouts(bank, found.prompts, rollout.verifier, pair=pair.name)
    write_bank(run.path("contexts.parquet"), bank)
    drawn = sampling_facts(
        pair, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
    )
    behind = positions_after_turn_end(pair, bank)
    return {
        **pair.facts,
        "contexts": len(bank),
        "positions": bank.positions,
        "prompts": found.counts,
        **drawn,
        **engine_facts(chosen),
        "first_prompt": found.prompts[0].prompt,
        "rendered_prompts_sha256": rendered,
        **({"behind_turn_end": behind} if behind else {}),
        **({"correct": judged} if judged else {}),
    }


def at_most(prompts: PromptConfig) -> int | None:
    """The most prompts that there can be, before any model or tokenizer is loaded.

    Returns:
        The rows of the file, at most as many as are asked for; None where only the pair or a data
        set knows, and where the file cannot be read, which its reader explains.
    """
    from diagnostics.contexts.prompt_sources import prompt_column_of, read_source

    path = prompts.prompts
    if path is None or path.startswith("hf:"):
        return prompts.contexts
    try:
        table = read_source(path, prompts.prompts_split)
        prompt_column_of(table, prompts.prompt_column, path)
    except DiagnosticsError:
        return None
    return len(table) if prompts.contexts is None else min(len(table), prompts.contexts)


def _require_enough(count: int | None, folds: int) -> None:
    """Refuse fewer prompts than folds, and say when there are too few for a verdict."""
    from diagnostics.analysis.config import FEWEST_PROMPTS

    if not count:  # unknown, or none: its reader explains
        return
    prompts = f"{count} prompt{'s' if count > 1 else ''}"
    if count < folds:
        raise DiagnosticsError(
            f"{prompts} cannot be divided into {folds} folds, one step on each. Use at least"
            f" {FEWEST_PROMPTS} prompts, from which on verdicts are given, or lower --folds."
        )
    if count < FEWEST_PROMPTS:
        log.warning(
            "%s: below %d on a side nothing is judged. The run goes on without a verdict; %d"
            " prompts more would allow one",
            prompts,
            FEWEST_PROMPTS,
            FEWEST_PROMPTS - count,
        )


def _responses_so_far(run: Run, rendered: str) -> Shards:
    """The responses that an interrupted run sampled for exactly these rendered prompts."""
    shards = run.shards(f"responses-{rendered[:16]}")
    folder = shards.folder
    others = (
        [path for path in folder.parent.glob("responses-*") if path != folder]
        if folder is not None and folder.parent.is_dir()
        else []
    )
    if others:
        log.warning(
            "%s was interrupted when the prompts were rendered otherwise (a chat template that"
            " writes the date?). Its responses to those prompts are set aside, and sampling begins"
            " anew",
            run.directory,
        )
    return shards


def freeze_stage(
    run: Run,
    models: Models,
    prompts: PromptConfig,
    elsewhere: ImportConfig,
    *,
    verifier: str = "auto",
) -> None:
    """Freeze a file of rollouts as the run's contexts; `prompts` says which prompts they answer."""
    from diagnostics.contexts.verifiers import recorded_verifier

    files = {**file_hash("rollouts", elsewhere.rollouts), **file_hash("prompts", prompts.prompts)}
    run.stage(
        "rollout",
        settings=merged(
            models.writer_settings, prompts, elsewhere, files, recorded_verifier(verifier)
        ),
        outputs=["contexts.parquet"],
        work=lambda: _frozen(run, models, prompts, elsewhere, verifier),
        code=("contexts.import_rollouts", "contexts.prompts", "models.pair"),
        models=models.fingerprint,
    )


def _frozen(
    run: Run, models: Models, prompts: PromptConfig, elsewhere: ImportConfig, verifier: str
) -> dict[str, Any]:
    """Freeze the file and write the contexts, and return the facts for the manifest."""
    from diagnostics.contexts.import_rollouts import freeze_rollouts

    originals = (
        choose_prompts(models, dataclasses.replace(prompts, contexts=None)).prompts
        if prompts.prompts
        else []
    )
    kwargs = json_object(prompts.chat_template_kwargs, "--chat-template-kwargs")
    bank, counts = freeze_rollouts(
        models.pair,
        elsewhere.rollouts,
        rollouts_format=elsewhere.rollouts_format,
        turns=elsewhere.turns,
        prompts=originals,
        contexts=prompts.contexts,
        chat=prompts.chat,
        chat_template_kwargs=kwargs,
        verifier=verifier,
    )
    write_bank(run.path("contexts.parquet"), bank)
    return {
        **models.pair.facts,
        "contexts": len(bank),
        "positions": bank.positions,
        "rollouts": counts,
        "first_prompt": bank[0].prompt,
    }
