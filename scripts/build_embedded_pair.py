"""Train the embedded teacher and student from scratch, save them, and measure the pair.

    python scripts/build_embedded_pair.py [--output-dir data/embedded] [--seed 20]

Both models train at once, one process and one thread each, on endless fresh stories of the `train`
split (`diagnostics.contexts.story_sums`): the teacher on correct responses, the student on
responses with its misconceptions. The loss is the cross-entropy of response tokens only. Same seed
and same library versions, same weights.

The pair is accepted by the properties in REQUIRED, on fresh prompts of the `probe` split. No gain,
no training result and no claim of the method enters here."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnostics.contexts import story_sums

SEED = 20
BATCH = 32
PROMPTS = 200
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Recipe:
    """Size and training of one side."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    steps: int
    peak_lr: float
    warmup: int = 100


RECIPES = {
    "teacher": Recipe(layers=4, width=128, heads=4, feed_forward=352, steps=900, peak_lr=2e-3),
    "student": Recipe(layers=3, width=96, heads=4, feed_forward=256, steps=900, peak_lr=2e-3),
}

# property -> (lowest, highest) accepted value
REQUIRED = {
    "teacher_greedy_accuracy": (0.85, 1.0),
    "student_greedy_accuracy": (0.10, 0.60),
    "student_entropy_q75": (1.5, math.inf),
    "compatibility_q25": (0.0, 0.95),
    "compatibility_q05": (0.0, 0.6),
    "smallest_quadrant": (0.05, 1.0),
    "q3_compatibility_gap": (0.3, 1.0),
}


def build_tokenizer():
    """A word-level tokenizer over the task's vocabulary; it adds <bos> in front and nothing
    behind.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *story_sums.vocabulary()]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer):
    """A Llama of the recipe's size with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(tokenizer, side: str, steps: int, seed: int):
    """Yield (ids [B, T], response [B, T]) where `response` marks the tokens that carry loss."""
    pairs = story_sums.corpus(steps * BATCH, seed=seed, side=side)
    for _ in range(steps):
        prompts, responses = zip(*islice(pairs, BATCH))
        heads = tokenizer(list(prompts))["input_ids"]
        tails = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        rows = [head + tail + [tokenizer.eos_token_id] for head, tail in zip(heads, tails)]
        width = max(map(len, rows))
        ids_BT = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        places_T = torch.arange(width)
        starts_B1, ends_B1 = (
            torch.tensor([[len(head)] for head in heads]),
            torch.tensor([[len(row)] for row in rows]),
        )
        yield ids_BT, (places_T >= starts_B1) & (places_T < ends_B1)


def response_loss(model, ids_BT: Tensor, response_BT: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the marked tokens. Padding lies right, so causal attention
    never sees it.
    """
    hidden_BTH = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    marked = response_BT[:, 1:]
    return F.cross_entropy(model.lm_head(hidden_BTH[marked]), ids_BT[:, 1:][marked])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def train(side: str, folder: Path, step_share: float, seed: int) -> float:
    """Train one side, save model and tokenizer under `folder`, return the seconds it took."""
    torch.set_num_threads(1)
    torch.manual_seed(seed + story_sums.SIDES.index(side))
    recipe = RECIPES[side]
    recipe = Recipe(**{**vars(recipe), "steps": max(1, round(recipe.steps * step_share))})
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    began, recent = time.perf_counter(), []
    for step, (ids_BT, response_BT) in enumerate(batches(tokenizer, side, recipe.steps, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        loss = response_loss(model, ids_BT, response_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"{side} step {step + 1}/{recipe.steps} loss {sum(recent[-100:]) / 100:.4f} "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    save(model, tokenizer, folder / side)
    return time.perf_counter() - began


def save(model, tokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def greedy_accuracy(readout, tokenizer, prompts) -> float:
    """Share of prompts whose greedy response is verified."""
    tokenizer.padding_side = "left"
    batch = tokenizer(
        [prompt.prompt for prompt in prompts],
        return_tensors="pt",
        padding=True,
        return_token_type_ids=False,
    )
    output_BT = readout.model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(
        output_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(
        story_sums.verify(text, prompt.answer) for text, prompt in zip(texts, prompts)
    ) / len(prompts)


def measure(folder: Path, seed: int) -> dict[str, float]:
    """The pair's properties after reloading it as float32, on PROMPTS prompts that training never
    saw.
    """
    from diagnostics.contexts.rollouts import rollout
    from diagnostics.models.pair import load_pair
    from diagnostics.probing.scores import score

    pair = load_pair(student=str(folder / "student"), teacher=str(folder / "teacher"), device="cpu")
    prompts = story_sums.sums(PROMPTS, seed=seed, split="probe")
    bank = rollout(pair, prompts, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    right = [
        story_sums.verify(context.response, prompt.answer) for context, prompt in zip(bank, prompts)
    ]
    return {
        "teacher_greedy_accuracy": greedy_accuracy(pair.teacher, pair.tokenizer, prompts),
        "student_greedy_accuracy": greedy_accuracy(pair.student, pair.tokenizer, prompts),
        "student_sampled_accuracy": sum(right) / len(right),
        "finished": sum(context.finished for context in bank) / len(bank),
        "mean_response_tokens": bank.positions / len(bank),
        **properties(score(pair, bank, k=16, sweep=())),
    }


def properties(tokens) -> dict[str, float]:
    """Entropy, compatibility and quadrants of a token table; ties at a median count as low H and
    high D.
    """
    entropy, divergence, fit = tokens.student_entropy, tokens.forward_kl, tokens.compatibility
    uncertain, disagreed = entropy > entropy.median(), divergence >= divergence.median()
    quadrants = {
        "q1": uncertain & disagreed,
        "q2": uncertain & ~disagreed,
        "q3": ~uncertain & disagreed,
        "q4": ~uncertain & ~disagreed,
    }
    confident_wrong = fit[quadrants["q3"]].sort_values().to_numpy()
    third = len(confident_wrong) // 3
    return {
        "positions": len(tokens),
        "student_entropy_median": entropy.median(),
        "student_entropy_q75": entropy.quantile(0.75),
        "forward_kl_mean": divergence.mean(),
        "forward_kl_median": divergence.median(),
        "compatibility_q05": fit.quantile(0.05),
        "compatibility_q25": fit.quantile(0.25),
        "compatibility_median": fit.median(),
        **{f"{name}_share": rows.mean() for name, rows in quadrants.items()},
        "smallest_quadrant": min(rows.mean() for rows in quadrants.values()),
        "q3_compatibility_top_tertile": confident_wrong[-third:].mean(),
        "q3_compatibility_bottom_tertile": confident_wrong[:third].mean(),
        "q3_compatibility_gap": confident_wrong[-third:].mean() - confident_wrong[:third].mean(),
    }


def main() -> int:
    """Build, measure, print; 1 where a required property is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=ROOT / "data" / "embedded",
        help="folder for teacher/ and student/",
    )
    parser.add_argument(
        "--step-share",
        type=float,
        default=1.0,
        help="train this share of the steps, to try the script out",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="seed of weights, stories and prompts"
    )
    parser.add_argument(
        "--measure-only", action="store_true", help="measure the pair that is there"
    )
    arguments = parser.parse_args()
    if not arguments.measure_only:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            runs = {
                side: pool.submit(
                    train, side, arguments.output_dir, arguments.step_share, arguments.seed
                )
                for side in story_sums.SIDES
            }
            print({side: f"{run.result():.0f} s" for side, run in runs.items()})
    measured = measure(arguments.output_dir, arguments.seed)
    figures = {name: round(float(value), 4) for name, value in measured.items()}
    print(json.dumps(figures, indent=1))
    missed = {
        name: figures[name]
        for name, (low, high) in REQUIRED.items()
        if not low <= figures[name] <= high
    }
    print("missed:", missed) if missed else print("every required property holds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
