"""How many bytes a parameter a probe holds at its peak: counted, not estimated."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from diagnostics.core.progress import Shards
from diagnostics.models.pair import assemble
from diagnostics.probing import step_state
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from tests.conftest import make_bank, make_model, make_tokenizer

BYTES = 14
"""Goal per parameter of a float32 student, its own four included."""


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, those of mapped files left out."""

    def __init__(self, known=()):
        super().__init__()
        self.live, self.bound, self.peak = {}, 0, 0
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._add(each)
        if self.bound > self.peak:  # storages may have gone since they were counted
            self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
            self.bound = sum(size for _, size in self.live.values())
            self.peak = max(self.peak, self.bound)
        return result

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.live and storage.filename is None:
            self.live[reference.cdata] = (reference, storage.nbytes())
            self.bound += storage.nbytes()


@pytest.fixture(scope="module")
def setting():
    """A student of 10 million parameters whose activations are small beside them."""
    pair = assemble("wide", make_model(1, hidden=512, layers=4), make_model(2), make_tokenizer())
    bank = make_bank([4, 5, 4, 6, 5, 4, 6, 5])
    return pair, bank, score(pair, bank)


def per_parameter(setting, monkeypatch, kind, **options):
    pair, bank, tokens = setting
    monkeypatch.setattr(step_state, "SMALL", 2**12)
    monkeypatch.setattr(pair, "step_state", kind)
    parameters = list(pair.student.model.parameters())
    with LiveBytes(parameters) as counted:
        probe(pair, bank, tokens=tokens, batch_tokens=1, minibatch=2, placebos=1, **options)
    return counted.peak / sum(p.numel() for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a run directory"])
def test_a_probe_with_folds_horizon_and_permuted_teacher(
    setting, monkeypatch, tmp_path, loss, kept
):
    """Every part of it: four folds, the trajectory with new text, the null and the placebo."""
    options = {"loss": loss, "horizon": (1, 2), "nulls": ("global",)}
    if kept:
        options["shards"] = lambda name: Shards(tmp_path / name)
    assert 12 < per_parameter(setting, monkeypatch, "disk", **options) <= BYTES


@pytest.mark.slow
def test_beside_the_student_it_takes_more(setting, monkeypatch):
    """So that the count above would notice a copy: directions wait, and AdamW has its moments."""
    assert per_parameter(setting, monkeypatch, "device", horizon=(1, 2)) > BYTES + 8
