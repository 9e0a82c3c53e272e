"""The two changed teachers of reports/teacher-ladder, made from a teacher's folder.

    python scripts/ladder_teachers.py without-layers TEACHER 20,22 FOLDER
    python scripts/ladder_teachers.py foreign-template RUN TEACHER TEMPLATE.txt LISTS.parquet

The first leaves decoder layers out (counted from 0). The second lets the teacher grade a run's
responses after the prompts in another model's template, in which {} stands for the question, and
keeps its 256 likeliest tokens: a teacher whose chat template does not fit, as `--teacher-logprobs`
reads it."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diagnostics.models.readout import remove_layers

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What stands around the question in a prompt of the Qwen family."""
LISTED = 256


def without_layers(teacher: Path, layers: tuple[int, ...], folder: Path) -> None:
    """Write a teacher's folder without some of its decoder layers."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    kinds = getattr(model.config, "layer_types", None)
    remove_layers(model, layers)
    if kinds:
        kept = [kind for layer, kind in enumerate(kinds) if layer not in layers]
        model.config.layer_types = kept
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


def question(prompt: str) -> str:
    """The user's words in a rendered prompt of the Qwen family.

    Raises:
        ValueError: The prompt is rendered in another way.
    """
    if START not in prompt or not prompt.endswith(END):
        raise ValueError(f"The prompt is not of one question in Qwen's template: {prompt[:200]!r}")
    return prompt.split(START, 1)[1][: -len(END)]


@torch.inference_mode()
def under_foreign_template(run: Path, teacher: Path, template: str) -> pd.DataFrame:
    """The lists of the teacher for each context of a run, one row per context."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).eval()
    rows = []
    for context in pd.read_parquet(run / "contexts.parquet").itertuples():
        text = template.replace("{}", question(context.prompt))
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = [int(token) for token in context.response_ids]
        logits = model(torch.tensor([before + response])).logits[0, len(before) - 1 : -1]
        top = logits.float().log_softmax(-1).topk(LISTED)
        rows.append(
            {
                "context_id": context.context_id,
                "response_ids": response,
                "top_ids": top.indices.tolist(),
                "top_logprobs": top.values.double().tolist(),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "without-layers":
        layers = tuple(int(layer) for layer in given[1].split(","))
        without_layers(Path(given[0]), layers, Path(given[2]))
    elif what == "foreign-template":
        run, teacher, template = map(Path, given[:3])
        under_foreign_template(run, teacher, template.read_text()).to_parquet(given[3])
    else:
        sys.exit(f"What to make is without-layers or foreign-template; got {what!r}.")
