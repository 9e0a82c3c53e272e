"""What a result says of itself where it is printed."""

import math

import pytest

from diagnostics.core.shown import LONGEST, by_uncertainty, cut, sizes


@pytest.mark.parametrize(
    "value, half, signed, plain",
    [
        (0.10876, 0.0158, "+0.109", "0.109"),
        (-0.0363, 0.0036, "-0.0363", "-0.0363"),
        (0.0000123, 0.0000041, "+0.0000123", "0.0000123"),
        (-0.0001, 0.05, "0.000", "0.000"),
        (1234.5, 67.0, "+1,234", "1,234"),
        (3.4e-9, 2.1e-9, "+3.4e-9", "3.4e-9"),
        (0.123456, math.nan, "+0.123", "0.123"),
        (0.123456, 0.0, "+0.123", "0.123"),
        (math.nan, 0.1, "–", "–"),
    ],
)
def test_half_the_interval_decides_the_digits(value, half, signed, plain):
    assert by_uncertainty(value, half, sign=True) == signed
    assert by_uncertainty(value, half) == plain


@pytest.mark.parametrize("half", [1.04, 0.73, 0.0312, 0.00451, 0.000199])
def test_half_the_interval_keeps_two_digits(half):
    shown = by_uncertainty(half, half).replace(".", "").lstrip("0")
    assert len(shown) == 2
    assert float(by_uncertainty(half, half)) == pytest.approx(half, rel=0.05)


def test_parts_are_counted_and_cut():
    assert sizes("Run", {"a": [1, 2], "b": None}) == "Run: a (2)"
    assert len(cut("x" * 5000)) == LONGEST and cut("x") == "x"
