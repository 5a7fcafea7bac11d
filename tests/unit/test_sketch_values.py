"""A sketch's numbers: what they are by definition, and that they never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from snapshot_tool.base import sketch as module
from snapshot_tool.base.sketch import MOMENTS, project, sample_indices, sketch

SHAPES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 5), (1, 1, 1, 1), (1, 70)]

PINNED_MOMENTS = [9.3125, 10.771175848841512, 9.3125, 0.0, 18.625]
PINNED_SAMPLE = [
    1,
    1,
    3,
    7,
    8,
    13,
    13,
    14,
    14,
    17,
    20,
    20,
    20,
    21,
    34,
    37,
    43,
    48,
    49,
    50,
    50,
    52,
    52,
    53,
    53,
    54,
    57,
    58,
    59,
    63,
    71,
    72,
    74,
    80,
    83,
    87,
    87,
    88,
    88,
    89,
    91,
    92,
    94,
    99,
    102,
    102,
    103,
    103,
    105,
    106,
    107,
    110,
    116,
    121,
    129,
    129,
    130,
    130,
    131,
    131,
    133,
    134,
    145,
    149,
]
PINNED_PROJECTION = [
    -1.0920641769908337,
    0.336804839632687,
    0.13268069440075547,
    -0.74505313009655,
    -1.561549711024276,
    33.52739085434475,
    -9.56321620411599,
    23.117059447516244,
    0.15309310892394865,
    -31.016663867991994,
    0.19391793797033494,
    -8.746719623188266,
    0.03061862178478973,
    13.31910047638353,
    -2.194334561243264,
    0.6634034720037774,
]


def values(*shape: int) -> torch.Tensor:
    """Return the same tensor of a shape every time."""
    numbers = np.random.RandomState(8).standard_normal(int(np.prod(shape)))
    return torch.from_numpy(numbers.reshape(shape)).to(torch.float32)


def projected_one_by_one(tensor: torch.Tensor, *, seed: int) -> list[float]:
    """Return the projection as its definition says: one signed sum over all elements at a time."""
    signs = [
        module._signs(length, seed=seed, dimension=dimension).numpy()
        for dimension, length in enumerate(tensor.shape)
    ]
    sums = np.zeros(16)
    for index, value in np.ndenumerate(tensor.double().numpy()):
        for column in range(16):
            factors = [signs[axis][place, column] for axis, place in enumerate(index)]
            sums[column] += value * np.prod(factors)
    return list(sums / np.sqrt(tensor.numel()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_projection_is_a_signed_sum_over_all_elements(shape: tuple[int, ...]) -> None:
    """Sixteen sums in which each element has a sign for each of its coordinates."""
    tensor = values(*shape)
    wanted = projected_one_by_one(tensor, seed=3)
    assert project(tensor, seed=3).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_those_of_the_elements_in_float64(shape: tuple[int, ...]) -> None:
    """Mean, root mean square, mean of magnitudes, least and greatest, in this order."""
    tensor = values(*shape)
    numbers = tensor.double().numpy()
    found = dict(zip(MOMENTS, sketch(tensor, seed=3).moments.tolist(), strict=True))
    assert found == pytest.approx(
        {
            "mean": numbers.mean(),
            "rms": np.sqrt((numbers**2).mean()),
            "abs_mean": np.abs(numbers).mean(),
            "min": numbers.min(),
            "max": numbers.max(),
        },
        rel=1e-12,
    )


def test_the_sketch_of_a_fixed_tensor_is_pinned() -> None:
    """Sketches in committed goldens are compared with ones made years later: these stay."""
    found = sketch((torch.arange(150, dtype=torch.float32) / 8).reshape(3, 5, 10), seed=42)
    assert found.shape == (3, 5, 10)
    assert found.moments.tolist() == pytest.approx(PINNED_MOMENTS, rel=1e-15)
    assert (found.sample * 8).to(torch.int64).tolist() == PINNED_SAMPLE
    assert found.projection.tolist() == pytest.approx(PINNED_PROJECTION, rel=1e-13)


@pytest.mark.parametrize("numel", [65, 1000, 2**33])
def test_sample_indices_are_sorted_places_within_the_tensor(numel: int) -> None:
    """As many as asked for, the same for a seed, and spread over tensors of any size."""
    indices = sample_indices(numel, seed=1)
    assert len(indices) == 64
    assert indices.dtype == torch.int64
    assert indices.tolist() == sorted(indices.tolist())
    first, last = int(indices[0]), int(indices[-1])
    assert first >= 0
    assert numel // 2 < last < numel
    assert torch.equal(indices, sample_indices(numel, seed=1))
    assert not torch.equal(indices, sample_indices(numel, seed=2))


@pytest.mark.parametrize("numel", [0, 1, 63, 64])
def test_every_place_of_a_small_tensor_is_sampled_in_order(numel: int) -> None:
    """Up to 64 elements nothing is left out."""
    assert sample_indices(numel, seed=1).tolist() == list(range(numel))


def test_another_seed_gives_another_projection() -> None:
    """The seed in the manifest decides the signs."""
    assert torch.equal(project(values(4, 5), seed=1), project(values(4, 5), seed=1))
    assert not torch.equal(project(values(4, 5), seed=1), project(values(4, 5), seed=2))


@pytest.mark.parametrize("rows", [2**20 // 512 - 1, 2**20 // 512, 2**20 // 512 + 1])
def test_rows_at_the_edge_of_a_block_are_all_counted(rows: int) -> None:
    """One element in the last row is in the sum, whichever block that row falls in."""
    tensor = torch.zeros(rows, 512)
    tensor[-1, -1] = 3.0
    found = project(tensor, seed=5) * tensor.numel() ** 0.5
    assert found.abs().tolist() == pytest.approx([3.0] * 16, rel=1e-12)


def test_a_view_has_the_sketch_of_its_elements() -> None:
    """Strides are a matter of memory, and what a hook is shown is often a view."""
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
    """The message holds the shape."""
    with pytest.raises(ValueError, match="cannot sketch a tensor of shape"):
        sketch(torch.ones(shape), seed=1)
