"""Layers that are released once their work is done, and loaded again when they are needed."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import readout as readout_module
from diagnostics.models.pair import load_pair
from diagnostics.models.weights import weights_checksum
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from tests.conftest import make_bank, make_model, make_pair, make_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny pair on disk, whose teacher ties head and embedding; layers of any size count."""
    monkeypatch.setattr(readout_module, "RELEASED_FROM", 0)
    make_model(1).save_pretrained(tmp_path / "student")
    make_model(2, hidden=48, tie_word_embeddings=True).save_pretrained(tmp_path / "teacher")
    for name in ("student", "teacher"):
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def loaded(folder, **options):
    return load_pair(
        student=str(folder / "student"), teacher=str(folder / "teacher"), device="cpu", **options
    )


def storages(model):
    return [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_released_teacher_projects_and_comes_back_bit_for_bit(folder, dtype):
    pair = loaded(folder, teacher_dtype=dtype)
    teacher, bank = pair.teacher, make_bank([5, 6])
    ids = torch.tensor([bank[0].ids])
    states = teacher.hidden(ids, torch.ones_like(ids))[0]
    logits, own = teacher.logits(states), teacher.model
    held = storages(own)
    name = weights_checksum(own)
    assert teacher.release() and teacher.release()
    gc.collect()
    assert all(p.is_meta for p in own.parameters()) and all(ref.expired() for ref in held)
    assert torch.equal(teacher.logits(states), logits)
    assert pair.window == 256 and teacher.device.type == "cpu"
    assert all(p.is_meta for p in own.parameters())  # none of these needs the layers
    assert torch.equal(teacher.hidden(ids, torch.ones_like(ids))[0], states)
    assert teacher.model is own and weights_checksum(own) == name
    assert own.lm_head.weight is own.model.embed_tokens.weight is teacher.head.weight
    assert teacher.release() and teacher.model is own and not own.lm_head.weight.is_meta


def test_weights_that_changed_on_disk_are_refused(folder):
    pair = loaded(folder)
    pair.release_teacher()
    make_model(3, hidden=48, tie_word_embeddings=True).save_pretrained(folder / "teacher")
    with pytest.raises(DiagnosticsError, match=r"teacher are others than when this command began"):
        score(pair, make_bank([5]))


def test_what_cannot_be_loaded_again_stays(folder, monkeypatch):
    pair = make_pair()
    assert not pair.teacher.release() and not pair.teacher.model.lm_head.weight.is_meta
    from_files = loaded(folder)
    monkeypatch.setattr(readout_module, "RELEASED_FROM", 2**28)
    assert not from_files.teacher.release()  # too small to be worth it
    in_memory = load_pair(
        student=make_model(1), teacher=make_model(2), tokenizer=make_tokenizer(), device="cpu"
    )
    assert in_memory.teacher.load_again is None


def test_a_probe_releases_the_teacher_and_loads_it_for_new_text(folder, monkeypatch):
    bank, released = make_bank([5, 9, 6, 7, 12, 4, 8, 6]), []
    kept = loaded(folder)
    tokens = score(kept, bank)
    monkeypatch.setattr(readout_module, "RELEASED_FROM", 2**28)
    expected = probe(kept, bank, tokens=tokens, horizon=(2,), minibatch=2, placebos=1)
    monkeypatch.setattr(readout_module, "RELEASED_FROM", 0)
    pair, real = loaded(folder), FrozenBank.rescore
    model = pair.teacher.model
    monkeypatch.setattr(
        FrozenBank,
        "rescore",
        lambda self, *a, **k: (
            released.append(model.lm_head.weight.is_meta),
            real(self, *a, **k),
        )[1],
    )
    loads, load = [], pair.teacher.load_again
    pair.teacher.load_again = lambda: (loads.append(0), load())[1]
    result = probe(pair, bank, tokens=tokens, horizon=(2,), minibatch=2, placebos=1)
    assert all(released) and len(loads) == 2  # the texts of theta0 and of the last horizon
    assert result.tokens.equals(expected.tokens) and result.horizon.equals(expected.horizon)
