"""Made things that several test files need: token tables, logits, folders' contents."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import Tensor

from diagnostics.core.errors import DiagnosticsError


def keys(**changes):
    """A token table of two positions, key columns only; `changes` adds or replaces columns."""
    row = dict(
        context_id=["c", "c"],
        prompt_id=["p", "p"],
        position=[0, 1],
        response_length=[2, 2],
        token_id=[5, 6],
        token=["a", "b"],
    )
    return pd.DataFrame(row | changes)


def contents(folder):
    """Bytes of every file beneath a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def random_logits(
    seed: int, count: int, vocabulary: int, *, scale: float = 3.0, dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher (related, but far from equal) and sampled ids."""
    generator = torch.Generator().manual_seed(seed)
    student_NV = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * scale
    teacher_NV = (
        0.6 * student_NV
        + torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * scale / 2
    )
    return (
        student_NV.to(dtype),
        teacher_NV.to(dtype),
        torch.randint(vocabulary, (count,), generator=generator),
    )


def padded(
    seed: int, value: float, *, vocabulary: int = 700, count: int = 90
) -> tuple[Tensor, Tensor, Tensor]:
    """A vocabulary whose last ids are no tokens: in both models for most rows, in either alone for
    some, in neither for one.
    """
    student_NV, teacher_NV, sampled_N = random_logits(seed, count, vocabulary, dtype=torch.float32)
    student_NV[:-1, -60:] = teacher_NV[:-1, -60:] = value
    student_NV[3, -60:], teacher_NV[5, -60:], student_NV[7, 0] = 1.0, 1.0, math.nan
    return student_NV, teacher_NV, sampled_N.clamp(max=vocabulary - 61)


def message(function, *args, **options) -> str:
    """The whole sentence with which a call is refused."""
    with pytest.raises(DiagnosticsError) as raised:
        function(*args, **options)
    return str(raised.value)
