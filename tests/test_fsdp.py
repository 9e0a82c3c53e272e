"""Training under FSDP2 on two CPU processes, against one process."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from diagnostics.training.run import read_lines
from tests import launched_fsdp
from tests.launch import require_success, torchrun

LAYOUT = ("entropy", "num_tokens", "epoch")
"""Metrics of TRL's own: the first is a mean over micro-batches, which two processes cut
differently.
"""


def close(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """All cases under FSDP2, in one launch."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = torchrun(2, launched_fsdp.__file__, str(folder), *launched_fsdp.CASES, seconds=600)
    require_success(done)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "sampled", "lora"])
def test_sharded_in_float32_it_is_what_one_process_trains(sharded, tmp_path, name):
    if name == "lora":
        pytest.importorskip("peft")
    one = launched_fsdp.run(tmp_path, **launched_fsdp.CASES[name]).metrics
    two = read_lines(sharded / name / "metrics.jsonl")
    pd.testing.assert_frame_equal(
        two.drop(columns=list(LAYOUT)), one.drop(columns=list(LAYOUT)), rtol=1e-4
    )
    close(
        *(
            load_file(folder / "student" / "model.safetensors")
            for folder in (sharded / name, tmp_path)
        ),
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "bf16-float32-teacher", "bf16-sampled", "bf16-lora"])
def test_sharded_in_bfloat16_it_trains_and_measures_exactly(sharded, tmp_path, name):
    if "lora" in name:
        pytest.importorskip("peft")
    one = launched_fsdp.run(tmp_path, **launched_fsdp.CASES[name] | {"bf16": False}).metrics
    two = read_lines(sharded / name / "metrics.jsonl")
    assert len(two) == 3 and (two["grad_norm"] > 0).all()
    for column in ("loss", "forward_kl/all", "compatibility/all"):
        values = two[column].to_numpy(np.float32)
        assert not (torch.from_numpy(values).bfloat16().float().numpy() == values).all(), (
            f"{column} went through bfloat16"
        )
    assert two["forward_kl/all"][0] == pytest.approx(one["forward_kl/all"][0], rel=0.05)
    ours, theirs = (
        load_file(folder / "student" / "model.safetensors") for folder in (sharded / name, tmp_path)
    )
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    close(
        ours, theirs, atol=3 * 2 * 1e-3
    )  # three AdamW steps of the learning rate, in opposite directions at worst
