"""Run under `accelerate launch`: three steps on a tiny pair; each process writes the masks of its
own rows.

    accelerate launch --multi_gpu --num_processes 2 tests/launched_training.py FOLDER

(accelerate starts one process alone under `--cpu`; `--multi_gpu` means several, on whatever device
there is.)"""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diagnostics.contexts.rollouts import rollout
from diagnostics.core import distributed
from diagnostics.training import run as training_run
from diagnostics.training import trl_trainer
from tests.conftest import make_pair, make_prompts


class Recording(trl_trainer.SelectedDistillationTrainer):
    """Keeps prompt, response and mask of every row."""

    rows: ClassVar[list] = []

    def _narrow(self, batch, *measured):
        batch = super()._narrow(batch, *measured)
        for prompt, real, ids, valid, mask in zip(
            *(
                batch[name]
                for name in (
                    "prompt_ids",
                    "prompt_mask",
                    "completion_ids",
                    "completion_mask",
                    "tool_mask",
                )
            )
        ):
            self.rows.append(
                (
                    self.state.global_step,
                    prompt[real.bool()].tolist(),
                    ids[valid.bool()].tolist(),
                    mask[valid.bool()].tolist(),
                )
            )
        return batch


def run(folder: Path, criterion: str = "teachability") -> list:
    """Train; return this process's rows."""
    trl_trainer.SelectedDistillationTrainer, original = (
        Recording,
        trl_trainer.SelectedDistillationTrainer,
    )
    Recording.rows = []
    pair, prompts = make_pair(), make_prompts(30)
    try:
        training_run.train(
            pair,
            prompts[:24],
            output_dir=folder,
            config=training_run.TrainConfig(
                criterion=criterion, budget=0.2, steps=3, batch=8, learning_rate=1e-3
            ),
            engine=training_run.EngineConfig(max_new_tokens=8, save_every=0, probe_every=2),
            held_out=prompts[24:],
            evaluation=training_run.EvaluationConfig(eval_samples=2),
            bank=rollout(make_pair(), prompts[24:], max_new_tokens=8),
        )
    finally:
        trl_trainer.SelectedDistillationTrainer = original
    return Recording.rows


if __name__ == "__main__":
    target = Path(sys.argv[1])
    rows = run(target)
    np.save(target / f"rows-{distributed.rank()}.npy", np.array([str(row) for row in rows]))
