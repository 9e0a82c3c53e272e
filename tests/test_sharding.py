"""A teacher whose layers are spread over processes."""

import json

import pandas as pd
import pytest
from torch import nn

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import readout
from diagnostics.models.pair import load_pair
from diagnostics.pipeline.cli import main
from tests.launch import torchrun


@pytest.mark.slow
def test_a_sharded_teacher_scores_and_probes_as_a_whole_one(folders, tmp_path):
    # batches of 60 tokens, so that the two processes have unlike numbers of them
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    small = [*models, "--batch-tokens", "60"]
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder in (whole, sharded):
        assert main(["rollout", *folders[:10], *models[4:], "--output-dir", str(folder)]) == 0
    for stage in ("score", "probe"):
        assert main([stage, *small, "--output-dir", str(whole)]) == 0
    stages = [
        [stage, *small, "--shard-teacher", "--output-dir", str(sharded)]
        for stage in ("score", "probe")
    ]
    done = torchrun(2, "-m", "tests.launched_stages", json.dumps(stages))
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (pd.read_parquet(folder / "tokens.parquet") for folder in (whole, sharded))
    pd.testing.assert_frame_equal(one, two, rtol=1e-6, atol=1e-6)
    assert one.gain.abs().max() > 1e-4


def test_sharding_needs_processes_and_a_model_that_comes_apart(pair):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The teacher cannot be sharded: this is the only process\. Start under `torchrun"
            r" --nproc-per-node N`, or leave"
        ),
    ):
        pair.teacher.shard("cpu")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Got --shard-teacher and --offload-teacher\. A sharded teacher stays on its devices;"
            r" give one or the other\.$"
        ),
    ):
        load_pair("embedded", shard_teacher=True, offload_teacher=True)


def test_decoder_layers_are_the_longest_list():
    backbone = nn.Module()
    backbone.heads, backbone.layers = (
        nn.ModuleList([nn.Linear(1, 1)]),
        nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]),
    )
    assert readout.decoder_layers(backbone) is backbone.layers
