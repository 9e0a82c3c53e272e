"""Models whose layers are spread over processes: they measure and step as whole ones."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import write_bank
from diagnostics.models import readout
from diagnostics.models.pair import load_pair
from diagnostics.pipeline.cli import main
from tests import launched_shards
from tests.conftest import make_bank, make_model, make_tokenizer
from tests.launch import require_success, torchrun


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
    require_success(done)
    one, two = (pd.read_parquet(folder / "tokens.parquet") for folder in (whole, sharded))
    pd.testing.assert_frame_equal(one, two, rtol=1e-6, atol=1e-6)
    assert one.gain.abs().max() > 1e-4


PROBES = {
    "adamw": [{}, {"horizon": [1, 3], "warm_steps": 1, "minibatch": 3}],
    "sampled": [
        {"shard_teacher": True, "step_state": "disk"},
        {"loss": "sampled", "optimizer": "sgd", "step": "0.05", "horizon": [2], "minibatch": 2},
    ],
    "float32": [{"dtype": "float32"}, {"horizon": [0]}],
}
"""Options of the pair and of the probe."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A student whose weights two processes cannot halve, its teacher, and contexts."""
    folder = tmp_path_factory.mktemp("odd")
    config = make_model(1).config
    config.intermediate_size = 65
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = LlamaForCausalLM(config)
    for name, model in (("student", student), ("teacher", make_model(2))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_bank(folder / "contexts.parquet", make_bank([5, 9, 3, 7, 12, 4, 8, 6, 10, 2, 11]))
    return folder


@pytest.fixture(scope="module")
def sharded_probes(odd):
    """The probes of PROBES in two processes."""
    runs = [
        [name, {"shard_student": True, **loading}, {"placebos": 1, **options}]
        for name, (loading, options) in PROBES.items()
    ]
    done = torchrun(2, "-m", "tests.launched_shards", str(odd), json.dumps(runs))
    require_success(done)
    return odd


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_sharded_student_is_probed_as_a_whole_one(sharded_probes, name):
    """To 1e-12 in float64; in float32 to what another order of sums does to AdamW's signs."""
    loading, options = PROBES[name]
    whole = {key: value for key, value in loading.items() if key != "shard_teacher"}
    *_, result = launched_shards.run(
        sharded_probes, whole, {"placebos": 1, **options, "horizon": tuple(options["horizon"])}
    )
    tokens = pd.read_parquet(sharded_probes / f"{name}.parquet")
    near = {"rtol": 1e-12, "atol": 1e-12} if name != "float32" else {"rtol": 1e-3, "atol": 1e-5}
    pd.testing.assert_frame_equal(tokens, result.tokens, **near)
    assert result.tokens["gain"].abs().max() > 1e-4
    one, two = json.loads((sharded_probes / f"{name}.json").read_text())
    alone = launched_shards.said(result)
    assert one["weights"] == two["weights"] == alone["weights"]
    for mine, theirs, found in zip(one["tables"], two["tables"], alone["tables"], strict=True):
        assert str(mine) == str(theirs)
        np.testing.assert_allclose(
            np.array(mine, dtype=float), np.array(found, dtype=float), **near
        )
    np.testing.assert_allclose(one["steps"], alone["steps"], **near)


@pytest.mark.slow
def test_each_process_holds_its_rows_and_their_signs_are_those_of_the_whole(sharded_probes):
    pair, bank, result = launched_shards.run(sharded_probes, {}, {"horizon": (0,), "placebos": 0})
    held, signs = launched_shards.moved(pair, bank, result)
    parts = json.loads((sharded_probes / "adamw.json").read_text())
    names = [name for name, _ in pair.student.model.named_parameters()]
    layers = 0
    for name, whole, *own in zip(names, signs, *(part["signs"] for part in parts), strict=True):
        if ".layers." in name:
            layers += len(whole)
            assert own[0] + own[1] == whole and len(own[0]) < len(whole)
        else:
            assert own[0] == own[1] == whole
    assert [part["held"] for part in parts] != [held, held]
    assert sum(part["held"] for part in parts) == 2 * held - layers


@pytest.mark.slow
def test_a_sharded_student_samples_scores_and_is_probed_as_a_whole_one(folders, tmp_path):
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    small = [*models, "--batch-tokens", "60"]
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    stages = {"rollout": [*folders[:10], *models[4:]], "score": small}
    for stage, options in stages.items():
        assert main([stage, *options, "--output-dir", str(whole)]) == 0
    commands = [
        [stage, *options, "--shard-student", "--output-dir", str(sharded)]
        for stage, options in {**stages, "probe": [*small, "--horizon", "1"]}.items()
    ]
    done = torchrun(2, "-m", "tests.launched_stages", json.dumps(commands))
    require_success(done)
    for name in ("contexts", "scores"):
        one, two = (pd.read_parquet(folder / f"{name}.parquet") for folder in (whole, sharded))
        pd.testing.assert_frame_equal(one, two, rtol=1e-6, atol=1e-6)
    assert pd.read_parquet(sharded / "tokens.parquet").gain.abs().max() > 1e-4


def test_stages_that_move_whole_students_refuse_a_sharded_one(finished, folders, capsys):
    for stage in ("intervene", "attribute"):
        command = [stage, *folders[:4], "--shard-student", "--output-dir", str(finished)]
        assert main(command) == 2
        assert "rollout, score and probe take a sharded student" in capsys.readouterr().err


def test_sharding_needs_processes_and_a_model_that_comes_apart(pair):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The teacher cannot be sharded: this is the only process\. Start under `torchrun"
            r" --nproc-per-node N`, or leave"
        ),
    ):
        pair.teacher.shard("cpu")
    with pytest.raises(DiagnosticsError, match=r"^The student cannot be .*leave --shard-student"):
        pair.student.shard("cpu", whose="student")
    with pytest.raises(DiagnosticsError, match=r"^Got --shard-student and --offload-teacher\."):
        load_pair("embedded", shard_student=True, offload_teacher=True)
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
