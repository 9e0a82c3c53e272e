"""Sums over weights that are divided among processes are those of the whole weights."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from diagnostics.core import distributed
from diagnostics.probing.spread import Spread, of_weights
from diagnostics.probing.tensor_lists import distance, first_update_in_place, tensor_norm

WHOLE = [[[3.0, 0.0], [0.0, 4.0], [12.0, 0.0]], [2.0, 1.0]]
"""A divided weight of three rows, and one that every process has."""
PARTS = [[WHOLE[0][:2], WHOLE[1]], [WHOLE[0][2:], WHOLE[1]]]
SPREADS = [Spread((True, False), (0, 6)), Spread((True, False), (4, 6))]


def tensors(lists):
    return [torch.tensor(numbers, dtype=torch.float64) for numbers in lists]


@pytest.fixture
def two_processes(monkeypatch):
    """Call a function of the process's number in two threads that stand for two processes."""
    here, together, sent = threading.local(), threading.Barrier(2, timeout=20), {}

    def total(values):
        sent[here.number] = values.copy()
        together.wait()
        whole = sent[0] + sent[1]
        together.wait()
        return whole

    def call(function):
        def run(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(run, range(2)))

    monkeypatch.setattr(distributed, "sum_over_processes", total)
    return call


def test_a_norm_counts_every_row_once(two_processes):
    by_hand = (9 + 16 + 144 + 4 + 1) ** 0.5
    assert tensor_norm(tensors(WHOLE)) == pytest.approx(by_hand)
    found = two_processes(lambda n: tensor_norm(tensors(PARTS[n]), SPREADS[n]))
    assert found == pytest.approx([by_hand, by_hand])


def test_a_distance_counts_every_row_once(two_processes):
    moved = [[t + 1 for t in tensors(part)] for part in PARTS]
    found = two_processes(lambda n: distance(tensors(PARTS[n]), moved[n], SPREADS[n]))
    assert found == pytest.approx([8**0.5, 8**0.5])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_of_parts_is_the_part_of_the_update(two_processes, optimizer):
    whole = tensors(WHOLE)
    norm, slope = first_update_in_place(whole, optimizer)

    def of_process(number):
        own = tensors(PARTS[number])
        return *first_update_in_place(own, optimizer, SPREADS[number]), own

    (*one, first), (*two, second) = two_processes(of_process)
    assert one == pytest.approx([norm, slope]) and two == pytest.approx([norm, slope])
    torch.testing.assert_close(torch.cat([first[0], second[0]]), whole[0])
    torch.testing.assert_close(first[1], whole[1])


def test_whole_weights_have_no_parts():
    spread = of_weights([torch.zeros(2, 3), torch.zeros(4), torch.zeros(())])
    assert spread == Spread((False, False, False), (0, 6, 10)) and spread.is_whole
    assert spread.total([1.0, 2.0, 4.0]) == 7.0 and spread.name("abc") == "abc"


def test_a_direction_in_parts_has_one_name_that_any_part_changes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def name(digests, rank):
        monkeypatch.setenv("RANK", str(rank))
        every = np.array([list(digest.encode()) for digest in digests], dtype=float)
        monkeypatch.setattr(distributed, "sum_over_processes", lambda own: every)
        return SPREADS[rank].name(digests[rank])

    ones = [hashlib.sha256(text).hexdigest() for text in (b"a", b"b", b"c")]
    assert name(ones[:2], 0) == name(ones[:2], 1)
    assert len({name(ones[:2], 0), name(ones[1:], 0), name(ones[1::-1], 0)}) == 3
