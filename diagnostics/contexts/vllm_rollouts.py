"""Sampling with vLLM, where it is installed: thousands of responses at a time on a GPU.

vLLM draws by its own kernels from logits that its own forward pass rounds otherwise, so its text is
not that of transformers for the same seed. What holds here as there: every response has a seed of
its own, named by (seed, prompt id, sample number), tokens are drawn from the student's distribution
at the requested temperature, top_p and top_k, the checkpoint's own generation settings are set
aside, and ids outside the shared vocabulary are never drawn. vLLM reports the log-probability of
every token that it drew; they are kept with the contexts, so that scoring can compare them with
its own.

vLLM reads the student from a folder. It is given the weights in memory, written to a temporary one,
so that an adapter, a trained student or a model made in Python is sampled as it is."""

from __future__ import annotations

import gc
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
MEMORY = 0.9
"""Share of the free memory that vLLM may take, beside the pair that is on the card already."""
SEEDS = 2**31
"""Number of seeds; vLLM takes any 64-bit integer, and half of 32 bits fits every release."""
AT_ONCE = 2048
"""Responses that vLLM is given at once, after which they are kept on disk. vLLM forms its own
batches of them, and keeps a few hundred running.
"""


@dataclass(frozen=True)
class Sampled:
    """One response: its ids, the end token included."""

    ids: Sequence[int]
    logprobs: list[float] | None = None
    """What the engine reports of each token; None where it reports nothing."""


def require_vllm() -> None:
    """Raise DiagnosticsError where vLLM cannot sample: not installed, or several processes."""
    if importlib.util.find_spec("vllm") is None:
        raise DiagnosticsError(
            "--rollout-engine vllm needs the package vllm, which is not installed. Run `pip install"
            " vllm`, or leave the option out: transformers samples then."
        )
    if distributed.world() > 1:
        raise DiagnosticsError(
            f"--rollout-engine vllm samples in one process, and {distributed.world()} were started."
            " Sample the rollouts without torchrun, and start the later stages with it."
        )


@contextmanager
def engine(pair: Pair, *, longest: int, seed: int) -> Iterator[Any]:
    """vLLM with the pair's student, as it is in memory, for the time of a block.

    Args:
        pair: The student and the tokenizer.
        longest: Tokens of the longest prompt and its response.
        seed: Seed of the engine; every response has its own beside it.

    Raises:
        DiagnosticsError: vLLM is not installed or does not take the student.
    """
    require_vllm()
    with tempfile.TemporaryDirectory(prefix="vllm-student-") as folder:
        _write(pair, Path(folder))
        made = _made(
            pair,
            model=folder,
            tokenizer=folder,
            dtype=str(pair.student.model.dtype).removeprefix("torch."),
            seed=seed,
            max_model_len=longest,
            generation_config="vllm",  # not the checkpoint's own settings
            **_memory(pair),
        )
        try:
            yield made
        finally:
            _end(made)


def sample(
    made: Any,
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> list[Sampled]:
    """Sample one response per prompt.

    Args:
        made: What `engine` gives.
        pair: The pair, for its end ids and shared vocabulary.
        prompts: Token ids of each prompt.
        seeds: Seed of each response.
        max_new_tokens: As in `rollout`.
        temperature: As in `rollout`.
        top_p: As in `rollout`.
        top_k: As in `rollout`.

    Raises:
        DiagnosticsError: vLLM answers with other tokens than were asked for.
    """
    from vllm import SamplingParams

    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k or -1,
        "max_tokens": max_new_tokens,
        **_settings(pair),
    }
    answers = made.generate(
        [{"prompt_token_ids": list(ids)} for ids in prompts],
        sampling_params=[SamplingParams(seed=seed, **settings) for seed in seeds],
        use_tqdm=False,
    )
    if len(answers) != len(prompts):
        raise DiagnosticsError(
            f"vLLM was given {len(prompts)} prompts and answered {len(answers)}. Sample with"
            " --rollout-engine transformers."
        )
    return [_read(answer.outputs[0], pair) for answer in answers]


def _settings(pair: Pair) -> dict[str, Any]:
    """Settings of sampling that follow from the pair, and from what is kept."""
    cut = pair.student.full_vocabulary > pair.vocabulary
    return {
        "logprobs": 1,  # the drawn token's is always among them
        "stop_token_ids": list(pair.end_ids),
        "skip_special_tokens": False,
        "detokenize": False,
        **({"allowed_token_ids": list(range(pair.vocabulary))} if cut else {}),
    }


def _read(output: Any, pair: Pair) -> Sampled:
    """One answer, cut after its first end token."""
    ids = [int(token) for token in output.token_ids]
    ends = [place for place, token in enumerate(ids) if token in pair.end_ids]
    ids = ids[: ends[0] + 1] if ends else ids
    if not ids or not all(0 <= token < pair.vocabulary for token in ids):
        raise DiagnosticsError(
            f"vLLM answered the ids {ids[:8]}, and the shared vocabulary has {pair.vocabulary}"
            " tokens. Sample with --rollout-engine transformers."
        )
    listed = output.logprobs or []
    if len(listed) < len(ids) or not all(token in by for token, by in zip(ids, listed)):
        raise DiagnosticsError(
            f"vLLM gave no log-probability for some of {len(ids)} tokens, though it was asked to."
            " Update vLLM, or sample with --rollout-engine transformers."
        )
    return Sampled(ids, [float(by[token].logprob) for token, by in zip(ids, listed)])


def _write(pair: Pair, folder: Path) -> None:
    """Write the student and its tokenizer to a folder that vLLM reads."""
    model: Any = pair.student.model
    if getattr(model, "is_quantized", False):
        raise DiagnosticsError(
            "--rollout-engine vllm takes a student with whole weights, and this one's are"
            " quantised. Load it in bfloat16 or float32, or sample with transformers."
        )
    model.save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)


def _made(pair: Pair, **options: Any) -> Any:
    """vLLM's engine. Its refusal of a model is one sentence with a remedy."""
    from vllm import LLM

    try:
        return LLM(**options)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DiagnosticsError(
            f"vLLM does not take the student ({type(pair.student.model).__name__}): {reason}"
            " Sample with --rollout-engine transformers."
        ) from error


def _memory(pair: Pair) -> dict[str, float]:
    """The share of the card that vLLM may fill, as it states it: of all memory, not of the free."""
    import torch

    if pair.student.device.type != "cuda":
        return {}
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(pair.student.device)
    return {"gpu_memory_utilization": round(MEMORY * free / whole, 3)}


def _end(made: Any) -> None:
    """Let vLLM give its memory back, so that the models can score."""
    import torch

    core = getattr(getattr(made, "llm_engine", None), "engine_core", None)
    shutdown = getattr(core, "shutdown", None)
    if shutdown is not None:
        shutdown()
    del made
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def version() -> str:
    """vLLM's version, for the manifest."""
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))
