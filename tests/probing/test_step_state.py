"""Where a step keeps its state: the same numbers everywhere, and nothing left behind."""

import errno
import os
import sys
import tempfile

import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import load_pair
from diagnostics.probing import step_state
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench
from diagnostics.probing.step_state import StatePlace, place_of
from diagnostics.probing.tensor_lists import inner_product
from tests.conftest import make_pair, make_prompts

HALF = {"horizon": (1, 3), "minibatch": 2, "batch_tokens": 60, "placebos": 1}


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    tokens = score(pair, bank)
    return pair, bank, tokens, probe(pair, bank, tokens=tokens, **HALF)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A folder of its own for temporary files, in which every tensor gets one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(step_state, "SMALL", 1)
    return tmp_path


def mapped(tensors):
    return [t.untyped_storage().filename is not None for t in tensors]


@pytest.mark.parametrize("kind", ["device", "host", "disk"])
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
def test_the_numbers_are_the_same_wherever_the_state_lies(
    setting, scratch, monkeypatch, kind, loss
):
    pair, bank, tokens, expected = setting
    if loss != "reverse_kl":
        expected = probe(pair, bank, tokens=tokens, loss=loss, **HALF)
    monkeypatch.setattr("diagnostics.probing.step.place_of", lambda *args: StatePlace(kind))
    result = probe(pair, bank, tokens=tokens, loss=loss, **HALF)
    assert result.tokens.equals(expected.tokens) and result.steps == expected.steps
    assert result.placebo.equals(expected.placebo) and result.horizon.equals(expected.horizon)
    assert not any(scratch.iterdir())


def test_a_copy_of_the_weights_in_main_memory_takes_the_optimizers_steps(setting, monkeypatch):
    """As beside a card: sums, moments and the weights that AdamW moves are not the student's."""
    pair, bank, tokens, expected = setting
    monkeypatch.setattr("diagnostics.probing.step.place_of", lambda *args: StatePlace("host"))
    apart = torch.device("cpu", 0)  # to torch another device than a tensor's own
    monkeypatch.setattr(StatePlace, "sums", lambda self, like: apart)
    result = probe(pair, bank, tokens=tokens, **HALF)
    assert result.tokens.equals(expected.tokens)


def test_theta0_and_directions_are_mapped_files(setting, scratch):
    pair, bank, tokens, result = setting
    pair.step_state = "disk"
    try:
        bench = StepBench(pair, bank, tokens, result.tokens.fold.to_numpy())
    finally:
        pair.step_state = "auto"
    ones = [torch.ones_like(p) for p in bench.parameters]
    before = [p.detach().clone() for p in bench.parameters]
    assert bench.origin is bench.parameters
    with bench.moved(ones, 0.5):
        assert all(mapped(bench.origin)) and bench.origin is not bench.parameters
        for p, o, b in zip(bench.parameters, bench.origin, before, strict=True):
            assert torch.equal(o, b) and torch.equal(p, 0.5 + b)
    bench.require_restored()
    waiting = bench.place.waiting(ones)
    assert all(mapped(waiting)) and bench.place.waiting(waiting)[0] is waiting[0]
    assert all(mapped(bench.place.zeros(ones))) and not any(scratch.iterdir())


def test_mapped_tensors_rest_outside_the_process(scratch):
    """Their values come back when they are read, and memory that is their own is left alone."""
    place = StatePlace("disk")
    (mine,) = place.copy([torch.arange(2**20, dtype=torch.float32)])

    def resident():
        with open("/proc/self/smaps") as file:
            lines = file.read().split("opd-state-")[1].splitlines()
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1])

    on_linux = sys.platform == "linux"
    assert not on_linux or resident() == 0
    assert mine.sum() > 0
    assert not on_linux or resident() == 4096
    place.rest([mine, torch.ones(3)])
    assert not on_linux or resident() == 0
    assert torch.equal(mine, torch.arange(2**20, dtype=torch.float32))
    mine.add_(1)
    place.rest([mine])
    assert mine[5] == 6
    own = torch.ones(2**20)
    StatePlace("device").rest([mine, own]), place.rest([own]), place.tidy()
    assert own.sum() == 2**20


def test_moving_a_moved_student_is_noticed(setting):
    pair, bank, tokens, result = setting
    bench = StepBench(pair, bank, tokens, result.tokens.fold.to_numpy())
    zeros = [torch.zeros_like(p) for p in bench.parameters]
    again = bench.moved(zeros, 1.0)
    with bench.moved(zeros, 1.0), pytest.raises(AssertionError, match="moved already"):
        again.__enter__()
    bench.require_restored()


def test_a_full_disk_leaves_the_state_in_memory(scratch, monkeypatch, caplog):
    def full(descriptor, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step_state, "_take_blocks", full)
    (copy,) = StatePlace("disk").copy([torch.arange(6.0).view(2, 3)])
    assert torch.equal(copy, torch.arange(6.0).view(2, 3)) and mapped([copy]) == [False]
    assert f"{scratch} has no room for" in caplog.text and "TMPDIR" in caplog.text
    assert not any(scratch.iterdir())


def test_blocks_are_taken_beforehand(scratch):
    path = scratch / "file"
    with open(path, "w+b") as file:
        step_state._take_blocks(file.fileno(), 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000
        assert os.fstat(file.fileno()).st_blocks * 512 >= 100_000


def test_auto_looks_at_the_size_and_at_the_free_memory(monkeypatch):
    small, large = [torch.zeros(8)], [torch.zeros(step_state.LARGE // 4, device="meta")]
    assert place_of("auto", small).kind == "device" == place_of("host", small).kind
    assert place_of("disk", small).kind == "disk"
    size = step_state.LARGE
    need = step_state.STATE_SHARE * size / (1 - step_state.RESERVE)
    for free, kind in ((need - 1, "host"), (need + 1, "device"), (None, "device")):
        monkeypatch.setattr(step_state, "free_bytes", lambda device, free=free: free)
        assert place_of("auto", large).kind == kind

    class OnCpu:
        device = torch.device("cpu")

        def numel(self):
            return step_state.LARGE

        def element_size(self):
            return 4

    assert place_of("auto", [OnCpu()]).kind == "disk"


def test_a_card_with_room_keeps_waiting_directions(monkeypatch):
    update = [torch.zeros(1000)]
    assert not StatePlace("device").has_room(update) and not StatePlace("device").has_room([])
    monkeypatch.setattr(step_state, "free_bytes", lambda device: 10**9)
    assert StatePlace("device").has_room(update) and not StatePlace("host").has_room(update)


def test_unknown_places_are_refused(setting):
    with pytest.raises(DiagnosticsError, match=r"^Unknown step state 'card'\. Known are auto,"):
        load_pair("embedded", step_state="card")
    with pytest.raises(DiagnosticsError, match=r"^Unknown step state 'card'\. Known are auto,"):
        place_of("card", [torch.zeros(1)])


def test_the_gradient_of_a_direction_alone_is_its_product(setting):
    """The slope along a direction equals the product with the whole gradient."""
    pair, bank, tokens, result = setting
    bench = StepBench(pair, bank, tokens, result.tokens.fold.to_numpy(), batch_tokens=40)
    weights_N = bench.loss_weights(1)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator) for p in bench.parameters]
    value, gradient = bench.gradient(weights_N, loss="reverse_kl", beta=0.5)
    again, slope = bench.slope(weights_N, direction, loss="reverse_kl", beta=0.5)
    assert again == value and slope == pytest.approx(inner_product(gradient, direction), rel=1e-5)
    assert all(p.grad is None for p in bench.parameters)
    direction[0][:] = torch.nan
    with pytest.raises(DiagnosticsError, match=r"with slope nan along the step"):
        bench.slope(weights_N, direction, loss="reverse_kl", beta=0.5)
