"""What a model's weights are: checksums made where the weights lie, and one SHA-256 per state.

    z_j = w_j k_j,    s_c = sum over the words w_j of chunk c of (z_j xor (z_j >> 32)) k'_j

All products and sums are modulo 2^64, and the k_j and k'_j are fixed pseudo-random odd numbers. A
word is eight bytes of a tensor, or one number where its rows are no multiple of eight bytes.
Between the products the upper half is folded into the lower one, since a product loses what leaves
at the top: without that, two signs that change would undo each other. Each step can be undone, so a
change of any one word changes its chunk's sum, in whatever bits; a change of several goes unnoticed
with a chance of at most about 2^-32. Integer sums do not depend on their order, so every device,
thread and process finds the same. A checksum of a whole model reads the weights once, near the
speed of memory, and takes no copy of them to the host.

It protects against accidents, not against intent: what names a model in a manifest is a SHA-256
over all bytes. That is made once per state of the weights and found again by its checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

WORD = 8
"""Bytes of a word."""
CHUNK = 2**17
"""Words of a chunk: with their factors they stay in a processor's cache."""
CHUNKS_AT_ONCE = 64
"""Chunks in one launch on an accelerator, whose launches cost more than the sums."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes, as which the bits of a number are read."""
GOLDEN, FIRST, SECOND = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of splitmix64, as signed integers."""
_sha256_of: dict[str, str] = {}
"""The SHA-256 of every state of weights that was hashed so far, by its checksum."""


def splitmix64(counters: Tensor, key: int = 0) -> Tensor:
    """Pseudo-random 64-bit numbers, each of its counter and the key alone.

    Args:
        counters: int64, any shape.
        key: The seed, an integer of up to 64 bits.

    Returns:
        int64 in the shape of the counters, uniform over all bit patterns; the same on every device.

    Reference:
        Steele, Lea and Flood 2014 (splittable generators), with the constants of splitmix64.
    """
    z = (counters + 1) * GOLDEN + _signed(key)
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted(z: Tensor, bits: int) -> Tensor:
    """The unsigned number shifted to the right; torch's own shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@cache
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """The odd factors of a chunk's words, int64 [CHUNK] before and after they are folded."""
    first, second = splitmix64(torch.arange(2 * CHUNK, device=device)).bitwise_or_(1).split(CHUNK)
    return first, second


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """A name of a tensor's dtype, shape and bits, made on its own device.

    NaN has its bits like any number, and 0 differs from -0.

    Args:
        tensor: Any dtype of up to eight bytes per number, any strides.

    Returns:
        64 hexadecimal digits; the same on every device and under any number of threads.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sums = list(_chunk_sums(tensor.detach()))
    if sums:
        digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _chunk_sums(tensor: Tensor) -> Iterator[Tensor]:
    """The sums of some chunks at a time, int64 [chunks]."""
    kind, width = _word(tensor)
    step = CHUNK * width * (1 if tensor.device.type == "cpu" else CHUNKS_AT_ONCE)
    for piece in tensor.reshape(-1).split(step) if tensor.numel() else ():
        if piece.storage_offset() % width:  # words begin at whole words of the storage
            piece = piece.clone()
        words = piece.view(kind)
        whole = len(words) // CHUNK * CHUNK
        if whole:
            yield _sums(words[:whole].view(-1, CHUNK))
        if whole < len(words):
            yield _sums(words[None, whole:])


def _sums(words_CW: Tensor) -> Tensor:
    """The sums [chunks] of chunks of words [chunks, words]."""
    before_W, after_W = (each[: words_CW.shape[1]] for each in _factors(words_CW.device))
    z_CW = words_CW * before_W
    z_CW ^= (z_CW >> 32).bitwise_and_((1 << 32) - 1)
    return z_CW.mul_(after_W).sum(1)


def _word(tensor: Tensor) -> tuple[torch.dtype, int]:
    """The integer as which words are read, and how many numbers are in one."""
    size = tensor.element_size()
    row = size * (tensor.shape[-1] if tensor.dim() > 1 else 1)
    return (torch.int64, WORD // size) if row % WORD == 0 else (INTEGERS[size], 1)


def checksums(model: nn.Module) -> dict[str, str]:
    """The checksum of every parameter, by name."""
    return {name: checksum(parameter) for name, parameter in model.named_parameters()}


def weights_checksum(model: nn.Module) -> str:
    """One name of all parameters: their names, dtypes, shapes and bits."""
    lines = (f"{name} {own}\n" for name, own in sorted(checksums(model).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@torch.no_grad()
def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over name, shape and bytes of every parameter, in name order.

    Weights whose checksum was hashed before in this process are not hashed again.
    """
    known = weights_checksum(model)
    if known not in _sha256_of:
        _sha256_of[known] = _sha256(model)
    return _sha256_of[known]


def _sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        # Flat, since a scalar parameter has no last dimension to be seen as bytes.
        content = parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()
