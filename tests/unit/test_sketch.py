"""Sketches: small, the same for the same seed, and sensitive to order and sign."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.taps.sketches import (
    MOMENTS,
    moments_error,
    project,
    relative_error,
    sample_indices,
    sketch,
)

TENSOR = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(1))
SHAPES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 5), (1, 1, 1, 1), (1, 70)]

PINNED_MOMENTS = [9.3125, 10.771175848841512, 9.3125, 0.0, 18.625]
PINNED_SAMPLE = """
1 1 3 7 8 13 13 14 14 17 20 20 20 21 34 37 43 48 49 50 50 52 52 53 53 54 57 58 59 63 71 72 74 80 83
87 87 88 88 89 91 92 94 99 102 102 103 103 105 106 107 110 116 121 129 129 130 130 131 131 133 134
145 149
"""
PINNED_PROJECTION = """
-1.0920641769908337 0.336804839632687 0.13268069440075547 -0.74505313009655
-1.561549711024276 33.52739085434475 -9.56321620411599 23.117059447516244
0.15309310892394865 -31.016663867991994 0.19391793797033494 -8.746719623188266
0.03061862178478973 13.31910047638353 -2.194334561243264 0.6634034720037774
"""


def values(*shape: int) -> torch.Tensor:
    """Return the same tensor of a shape every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def changed_in_one_element(tensor: torch.Tensor) -> torch.Tensor:
    """Add one to the last element."""
    other = tensor.clone()
    other[2, 49, 39] += 1
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda t: -t,
        lambda t: t.flip(0),
        lambda t: t.flip(1),
        lambda t: t[..., torch.randperm(40, generator=torch.Generator().manual_seed(2))],
        lambda t: t.transpose(1, 2).reshape(t.shape),
        changed_in_one_element,
        lambda t: t * 1.001,
    ],
    ids=["negated", "rows", "positions", "permuted", "transposed", "one element", "scaled"],
)
def test_a_changed_tensor_has_another_sketch(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Norm and range alone would not change in some of these."""
    golden = sketch(TENSOR, seed=5)
    assert relative_error(golden, sketch(TENSOR.clone(), seed=5)) == 0
    assert relative_error(golden, sketch(change(TENSOR), seed=5)) > ERROR_LIMIT


def test_the_error_of_rounding_is_measured_and_far_below_the_limit() -> None:
    """Noise of the size of float32 rounding."""
    noise = torch.randn(TENSOR.shape, generator=torch.Generator().manual_seed(3)) * 1e-6
    error = relative_error(sketch(TENSOR, seed=5), sketch(TENSOR + noise, seed=5))
    assert 3e-7 < error < 3e-6


def with_first(value: float) -> torch.Tensor:
    """Return the tensor with another first element."""
    other = TENSOR.clone()
    other[0, 0, 0] = value
    return other


@pytest.mark.parametrize(
    "other",
    [with_first(float("nan")), with_first(float("inf")), TENSOR.reshape(150, 40)],
    ids=["nan", "inf", "shape"],
)
def test_nan_inf_and_another_shape_are_infinitely_far(other: torch.Tensor) -> None:
    """They never count as small."""
    assert relative_error(sketch(TENSOR, seed=5), sketch(other, seed=5)) == float("inf")


def test_moments_do_not_depend_on_order() -> None:
    """They are equal for the same values in another order, and differ for scaled ones."""
    golden = sketch(TENSOR, seed=5)
    assert moments_error(golden, sketch(TENSOR.flip(0), seed=5)) < ERROR_LIMIT
    assert moments_error(golden, sketch(TENSOR * 1.01, seed=5)) > ERROR_LIMIT


def test_the_sample_is_the_tensors_elements() -> None:
    """At seeded indices; a small tensor is kept whole."""
    indices = sample_indices(TENSOR.numel(), seed=5)
    assert torch.equal(sketch(TENSOR, seed=5).sample, TENSOR.reshape(-1)[indices])
    assert torch.equal(sketch(TENSOR[0, 0], seed=5).sample, TENSOR[0, 0])


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 2**33])
def test_sample_indices_are_sorted_and_within_the_tensor(numel: int) -> None:
    """All up to 64; then 64, the same for a seed, and spread over tensors of any size."""
    indices = sample_indices(numel, seed=1)
    if numel <= 64:
        assert indices.tolist() == list(range(numel))
        return
    assert (len(indices), indices.dtype) == (64, torch.int64)
    assert indices.tolist() == sorted(indices.tolist())
    assert int(indices[0]) >= 0
    assert numel // 2 < int(indices[-1]) < numel
    assert torch.equal(indices, sample_indices(numel, seed=1))
    assert not torch.equal(indices, sample_indices(numel, seed=2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_projection_is_a_signed_sum_of_all_elements(shape: tuple[int, ...]) -> None:
    """Sixteen sums with a sign for each element, the same for a seed."""
    tensor = values(*shape)
    numel = tensor.numel()
    units = torch.eye(numel).reshape(numel, *shape)
    signs = torch.stack([project(unit, seed=3) for unit in units]) * numel**0.5
    assert torch.allclose(signs.abs(), torch.ones(numel, 16, dtype=torch.float64))
    sums = (signs * tensor.reshape(-1, 1).double()).sum(0) / numel**0.5
    assert torch.allclose(project(tensor, seed=3), sums, rtol=1e-12, atol=1e-12)
    if numel > 1:
        assert not torch.equal(project(tensor, seed=3), project(tensor, seed=4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_the_elements_in_float64(shape: tuple[int, ...]) -> None:
    """Mean, root mean square, mean of magnitudes, least and greatest, in this order."""
    numbers = values(*shape).double()
    found = dict(zip(MOMENTS, sketch(values(*shape), seed=3).moments.tolist(), strict=True))
    expected = {
        "mean": float(numbers.mean()),
        "rms": float(numbers.square().mean().sqrt()),
        "abs_mean": float(numbers.abs().mean()),
        "min": float(numbers.min()),
        "max": float(numbers.max()),
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_sketch_of_a_fixed_tensor_is_pinned() -> None:
    """Sketches in committed goldens are compared with ones made years later."""
    found = sketch((torch.arange(150, dtype=torch.float32) / 8).reshape(3, 5, 10), seed=42)
    assert found.shape == (3, 5, 10)
    assert found.moments.tolist() == pytest.approx(PINNED_MOMENTS, rel=1e-15)
    assert (found.sample * 8).to(torch.int64).tolist() == [int(n) for n in PINNED_SAMPLE.split()]
    projection = [float(number) for number in PINNED_PROJECTION.split()]
    assert found.projection.tolist() == pytest.approx(projection, rel=1e-13)


@pytest.mark.parametrize("rows", [2**20 // 512 - 1, 2**20 // 512, 2**20 // 512 + 1])
def test_rows_at_the_edge_of_a_block_are_all_counted(rows: int) -> None:
    """One element in the last row is in the sum, whichever block that row falls in."""
    tensor = torch.zeros(rows, 512)
    tensor[-1, -1] = 3.0
    found = project(tensor, seed=5) * tensor.numel() ** 0.5
    assert found.abs().tolist() == pytest.approx([3.0] * 16, rel=1e-12)


def test_a_view_has_the_sketch_of_its_elements() -> None:
    """Hooks often see views, whose strides differ."""
    base = values(6, 8)
    for view in (base.t(), base[:, ::2], base[2:]):
        one, other = sketch(view, seed=1), sketch(view.contiguous(), seed=1)
        assert torch.equal(one.projection, other.projection)
        assert torch.equal(one.sample, other.sample)


def test_half_precision_is_widened_before_it_is_summed() -> None:
    """In bfloat16 itself a thousand ones would add up to 256."""
    found = sketch(torch.ones(1000, dtype=torch.bfloat16), seed=1)
    assert found.moments.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert found.sample.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1)], ids=str)
def test_a_tensor_of_no_or_too_many_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    """A sketch has one to four dimensions."""
    with pytest.raises(ValueError, match="cannot sketch"):
        sketch(torch.ones(shape), seed=1)
