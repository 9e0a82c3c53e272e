"""Checksums against a slow loop over Python's integers, and what they notice."""

import hashlib

import numpy as np
import pytest
import torch

from diagnostics.models import weights
from diagnostics.models.weights import checksum, checksums, splitmix64, weights_sha256
from tests.conftest import make_model

WORDS = 2**64


def slow_splitmix64(counter, key=0):
    """The published generator on Python's integers, after `counter` + 1 steps from the seed."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) % WORDS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORDS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORDS
    return z ^ (z >> 31)


def slow_checksum(tensor, chunk):
    """The same name from bytes, word by word."""
    size = tensor.element_size()
    row = size * (tensor.shape[-1] if tensor.dim() > 1 else 1)
    width = 8 if row % 8 == 0 else size
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = [
        int.from_bytes(data[i : i + width], "little", signed=True)
        for i in range(0, len(data), width)
    ]
    places = range(min(chunk, len(words)))
    factors = [(slow_splitmix64(j) | 1, slow_splitmix64(chunk + j) | 1) for j in places]
    sums = []
    for i in range(0, len(words), chunk):
        inner = [w * k % WORDS for w, (k, _) in zip(words[i : i + chunk], factors)]
        sums.append(sum((z ^ z >> 32) * k for z, (_, k) in zip(inner, factors)) % WORDS)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(np.array(sums, dtype=np.uint64).tobytes())
    return digest.hexdigest()


def test_the_generator_gives_its_published_numbers():
    """The first outputs of splitmix64 from seed 0, as its authors and many libraries list them."""
    found = [number % WORDS for number in splitmix64(torch.arange(3)).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("key", [0, 5, 2**32 - 1, 2**63 + 11, -7])
def test_the_generator_is_the_one_of_pythons_integers(key):
    counters = torch.tensor([0, 1, 2, 1000, 2**40, 2**62])
    found = [number % WORDS for number in splitmix64(counters, key).tolist()]
    assert found == [slow_splitmix64(counter, key) for counter in counters.tolist()]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 6),
        torch.randn(4, 3),  # rows of 12 bytes are no whole words
        torch.randn(7),
        torch.tensor(-0.0),
        torch.randn(3, 4).bfloat16(),
        torch.randn(3, 3).bfloat16(),
        torch.randn(2, 3, 2).double(),
        torch.randint(-128, 127, (3, 16), dtype=torch.int8),
        torch.randn(6, 4).T,
        torch.randn(9)[1:],
        torch.zeros(0, 3),
    ],
)
def test_a_checksum_is_the_sum_of_words_times_odd_numbers(tensor):
    assert checksum(tensor) == slow_checksum(tensor, weights.CHUNK)


def test_chunks_are_summed_by_themselves(monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 4)
    weights._factors.cache_clear()
    try:
        for tensor in (torch.randn(5, 6), torch.randn(11), torch.randn(2, 16)):
            assert checksum(tensor) == slow_checksum(tensor, 4)
        whole = torch.randn(6, 8)
        shifted = torch.cat([torch.zeros(1), whole.reshape(-1)])[1:].view(6, 8)
        assert shifted.storage_offset() % 2 and checksum(shifted) == checksum(whole)
    finally:
        weights._factors.cache_clear()


def flipped(tensor, *bits):
    """The tensor with some bits of its bytes flipped."""
    data = tensor.clone()
    for bit in bits:
        data.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return data


def test_every_bit_counts():
    tensor = torch.randn(4, 8)
    bits = 32 * tensor.numel()
    names = {checksum(flipped(tensor, bit)) for bit in range(bits)} | {checksum(tensor)}
    assert len(names) == 1 + bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 8), (32,)])
def test_changes_do_not_undo_each_other(dtype, shape):
    """Signs are the uppermost bits of words or of their halves, which plain products would lose."""
    tensor = torch.randn(shape, dtype=dtype)
    size = 8 * tensor.element_size()
    signs = [size * (i + 1) - 1 for i in range(tensor.numel())]
    names = [checksum(flipped(tensor, a, b)) for a in signs for b in signs if a < b]
    names += [checksum(flipped(tensor, sign)) for sign in signs] + [checksum(tensor)]
    assert len(set(names)) == len(names)
    assert checksum(flipped(tensor, *signs)) == checksum(-tensor) not in names


def test_what_else_is_noticed_and_what_is_not():
    tensor = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    swapped = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
    others = [swapped, tensor.double(), tensor.view(4), tensor.view(1, 4)]
    negative = tensor.clone()
    negative[1, 1] = -0.0
    names = {checksum(t) for t in (tensor, negative, *others)}
    assert len(names) == 2 + len(others)
    nan = torch.full((2, 2), torch.nan)
    assert checksum(nan) == checksum(nan.clone()) and checksum(tensor.T) == checksum(
        tensor.T.contiguous()
    )


def test_weights_are_hashed_once_for_each_state(monkeypatch):
    model, made, real = make_model(7), [], weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda model: (made.append(0), real(model))[1])
    monkeypatch.setattr(weights, "_sha256_of", {})
    first = weights_sha256(model)
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode() + p.detach().numpy().tobytes())
    assert first == digest.hexdigest() == weights_sha256(make_model(7)) and len(made) == 1
    with torch.no_grad():
        model.lm_head.weight[3, 1] += 1
    second = weights_sha256(model)
    assert second != first and len(made) == 2
    with torch.no_grad():
        model.lm_head.weight[3, 1] -= 1
    changed = checksums(model) | {"lm_head.weight": None}
    assert changed == checksums(make_model(7)) | {"lm_head.weight": None}
