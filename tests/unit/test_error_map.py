"""The compact map of a tensor's errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot_tool.base.results import SIZE_BOUNDS
from snapshot_tool.base.tolerance import EXACT, Tolerance
from snapshot_tool.numerics.compare import compare_tensors, map_errors

TOLERANCE = Tolerance(1e-3, 0.0)


def test_a_map_shows_where_the_one_error_is() -> None:
    """In its tile, at its position, in units of the tolerance; the rest is zero."""
    expected = torch.zeros(5, 60, 8)
    actual = expected.clone()
    actual[3, 41, 6] = 0.05
    errors = map_errors(expected, actual, TOLERANCE)
    assert errors is not None
    assert errors.shape == (5, 60)
    assert errors.rows[3][41] == pytest.approx(50)
    assert sum(cell > 0 for row in errors.rows for cell in row) == 1
    assert sum(errors.counts) == 5 * 60 * 8
    place = next(i for i, bound in enumerate(SIZE_BOUNDS) if bound > 50)
    assert errors.counts[place] == 1


@pytest.mark.parametrize(
    ("shape", "mapped"),
    [
        ((480,), (1, 480)),
        ((122, 8), (8, 122)),
        ((17, 64, 96), (17, 64)),
        ((17, 3, 32, 16), (17, 512)),
    ],
)
def test_rows_and_columns_are_tiles_and_positions(
    shape: tuple[int, ...], mapped: tuple[int, int]
) -> None:
    """A vector is one row; records of positions stand on their side; channels are no position."""
    errors = map_errors(torch.zeros(shape), torch.ones(shape), TOLERANCE)
    assert errors is not None
    assert errors.shape == mapped


def test_a_large_map_is_binned_and_keeps_its_greatest_errors() -> None:
    """However many tiles and positions there are, the map stays small."""
    expected = torch.zeros(40, 1024, 2)
    actual = expected.clone()
    actual[39, 1023, 1] = 7e-3
    errors = map_errors(expected, actual, TOLERANCE)
    assert errors is not None
    assert errors.shape == (40, 1024)
    assert (len(errors.rows), len(errors.rows[0])) == (32, 64)
    assert errors.rows[-1][-1] == pytest.approx(7)


def test_nan_is_beyond_every_bound() -> None:
    """It is infinite in the map and in the last count; infinities that agree are no error."""
    expected = torch.tensor([math.inf, 0.0, 0.0])
    actual = torch.tensor([math.inf, math.nan, 0.0])
    errors = map_errors(expected, actual, TOLERANCE)
    assert errors is not None
    assert errors.rows == [[0.0, math.inf, 0.0]]
    assert (errors.counts[0], errors.counts[-1]) == (2, 1)


def test_without_a_tolerance_there_is_no_map() -> None:
    """Errors of tokens have no unit."""
    assert map_errors(torch.tensor([1, 2]), torch.tensor([1, 3]), EXACT) is None


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40))
def test_the_sizes_agree_with_the_comparison(values: list[float]) -> None:
    """As many elements lie beyond 1 as the comparison counts as mismatched."""
    expected, actual = torch.zeros(len(values)), torch.tensor(values)
    tolerance = Tolerance(0.7, 0.0)
    errors = map_errors(expected, actual, tolerance)
    assert errors is not None
    beyond = sum(errors.counts[SIZE_BOUNDS.index(1.0) + 1 :])
    assert beyond == compare_tensors(expected, actual, tolerance).mismatched
