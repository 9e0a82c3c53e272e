"""Signs against Python's integers, and updates that are formed in place."""

import pytest
import torch

from diagnostics.probing import tensor_lists
from diagnostics.probing.tensor_lists import (
    distance,
    first_update,
    first_update_in_place,
    inner_product,
    row_pieces,
    signs,
    tensor_norm,
)
from tests.models.test_weights import slow_splitmix64


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
@pytest.mark.parametrize(("first", "count"), [(0, 64), (0, 5), (63, 2), (70, 200), (2**33 + 1, 66)])
def test_a_sign_is_one_bit_of_the_generator(seed, first, count):
    found = signs(seed, first, count, "cpu")
    assert found.dtype == torch.int8 and found.tolist() == [
        2 * (slow_splitmix64(i // 64, seed) >> (i % 64) & 1) - 1
        for i in range(first, first + count)
    ]


def test_signs_do_not_depend_on_how_they_are_divided():
    whole = signs(11, 0, 1000, "cpu")
    for sizes in ([1] * 1000, [7] * 142 + [6], [64, 936], [500, 500]):
        parts, first = [], 0
        for size in sizes:
            parts.append(signs(11, first, size, "cpu"))
            first += size
        assert torch.equal(torch.cat(parts), whole)


def test_signs_are_balanced_and_unrelated_between_seeds():
    """Means of 2^16 fair signs, and of their products, stay within five standard errors of 0."""
    some = [signs(seed, 0, 2**16, "cpu").float() for seed in range(6)]
    limit = 5 / 2**8
    for i, one in enumerate(some):
        assert one.abs().eq(1).all() and abs(one.mean()) < limit
        assert abs((one[1:] * one[:-1]).mean()) < limit
        for other in some[:i]:
            assert abs((one * other).mean()) < limit


def lists():
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(shape, generator=generator) * 1e-4
        for shape in ((5, 3), (7,), (), (2, 3, 4), (0, 3))
    ] + [torch.zeros(2, 2)]


@pytest.mark.parametrize("piece", [1, 4, 2**18])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_in_place_is_the_formula(monkeypatch, piece, optimizer):
    monkeypatch.setattr(tensor_lists, "PIECE", piece)
    gradient = [*lists(), torch.randn(4, 6).T]
    wide = [g.double() for g in gradient]
    size = sum((g**2).sum() for g in wide) ** 0.5
    expected = [-g / (g.abs() + 1e-8) if optimizer == "adamw" else -g / size for g in wide]
    update = [g.clone() for g in gradient]
    places = [u.data_ptr() for u in update]
    norm, slope = first_update_in_place(update, optimizer)
    assert [u.data_ptr() for u in update] == places
    assert norm == tensor_norm(gradient) == pytest.approx(float(size), rel=1e-12)
    assert slope == pytest.approx(inner_product(gradient, update), rel=1e-12)
    for u, e, other in zip(update, expected, first_update(gradient, optimizer), strict=True):
        torch.testing.assert_close(u.double(), e, rtol=1e-6, atol=0)
        assert torch.equal(u, other)


@pytest.mark.parametrize("piece", [1, 5, 100])
def test_row_pieces_are_views_of_all_rows_in_order(monkeypatch, piece):
    monkeypatch.setattr(tensor_lists, "PIECE", piece)
    for tensor in lists():
        twin, seen = tensor.clone(), []
        for one, other in row_pieces(tensor, twin):
            seen += one.reshape(-1).tolist()
            other.add_(1)
        assert seen == tensor.reshape(-1).tolist() and torch.equal(twin, tensor + 1)


def test_a_distance_is_the_norm_of_the_difference():
    left, right = lists(), [t + 0.5 for t in lists()]
    assert distance(left, right) == pytest.approx(
        tensor_norm([a - b for a, b in zip(left, right)]), rel=1e-14
    )
    assert distance(left, left) == 0


@pytest.mark.parametrize("total", [torch.float32, torch.float64])
def test_sums_in_float64_are_those_of_whole_tensors(monkeypatch, total):
    monkeypatch.setattr(tensor_lists, "PIECE", 7)
    start, addend = torch.randn(5, 6).to(total), torch.randn(6, 5).t()
    expected = start.double() + addend.double()
    summed = tensor_lists.add_in_float64(start.clone(), addend)
    assert summed.dtype == torch.float64 and torch.equal(summed, expected)
    turned = tensor_lists.add_in_float64(start.clone().t(), addend.t())
    assert torch.equal(turned, expected.t())
    assert tensor_lists.add_in_float64(summed, addend).data_ptr() == summed.data_ptr()
