"""Run by `python -m torch.distributed.run --nproc-per-node 2`: trainings of a tiny pair under
FSDP2, one after the other.

    python -m torch.distributed.run --nproc-per-node 2 tests/launched_fsdp.py FOLDER NAME [NAME ...]

Each of `CASES` writes FOLDER/NAME as a training does. Two processes on the CPU stand in for two
GPUs: Accelerate allows FSDP on accelerators only, so that one test of it is passed over in memory;
`fully_shard`, its policies and the collectives are real."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from diagnostics.core import distributed
from diagnostics.models.readout import Readout
from diagnostics.training import run as training_run
from diagnostics.training.evaluation import EvaluationConfig
from tests.conftest import make_pair, make_prompts

CASES = {
    "plain": {},
    "sampled": {"loss": "sampled"},
    "lora": {"lora_rank": 4},
    "bf16": {"bf16": True, "teacher": torch.bfloat16},
    "bf16-float32-teacher": {"bf16": True},
    "bf16-sampled": {"bf16": True, "loss": "sampled"},
    "bf16-lora": {"bf16": True, "teacher": torch.bfloat16, "lora_rank": 4},
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""configs/fsdp2-8gpu.yaml as the variables that `accelerate launch` makes of it."""


SETTINGS = {"adam_epsilon": 1e-3}
"""A step in proportion to its gradient: with AdamW's own 1e-8 the last bit of a gradient near 0
decides the sign of a whole step.
"""


def allow_on_the_cpu() -> None:
    """Let Accelerate set FSDP up without an accelerator."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = init


def run(
    folder: Path, *, loss="reverse_kl", lora_rank=0, bf16=False, teacher=torch.float32, save_every=0
) -> training_run.TrainResult:
    """Train for three steps of two micro-batches."""
    pair = make_pair()
    pair.teacher = Readout(pair.teacher.model.to(teacher), vocabulary=pair.vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    engine = training_run.EngineConfig(
        max_new_tokens=8,
        save_every=save_every,
        accumulation=2,
        lora_rank=lora_rank,
        trl=json.dumps(SETTINGS | {"bf16": bf16}),
    )
    return training_run.train(
        pair,
        make_prompts(24),
        output_dir=folder,
        engine=engine,
        evaluation=EvaluationConfig(eval_contexts=0),
        config=training_run.TrainConfig(
            budget=0.2, steps=3, batch=8, learning_rate=1e-3, loss=loss
        ),
    )


if __name__ == "__main__":
    from accelerate.state import AcceleratorState, PartialState

    torch.set_num_threads(1)
    os.environ |= FSDP2
    allow_on_the_cpu()
    for name in sys.argv[2:]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if CASES[name].get("bf16") else "no"
        run(Path(sys.argv[1]) / name, **CASES[name])
        AcceleratorState._reset_state()
        PartialState._reset_state()
    distributed.barrier()  # nobody leaves while another still speaks to it
    distributed.leave()
