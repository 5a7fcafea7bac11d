"""Making the map of a tensor's errors, row by row, so that memory stays small."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from snapshot_tool.base.error_map import SIZE_BOUNDS, ErrorMap
from snapshot_tool.base.tolerance import Tolerance

if TYPE_CHECKING:
    import torch

_MAX_CELLS = (32, 64)  # rows, columns: 2048 numbers for each tensor that fails
_TWO, _THREE, _FOUR = 2, 3, 4


def map_errors(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> ErrorMap | None:
    """Return the map of two tensors of one shape; None where the tolerance allows nothing at all.

    Without a tolerance, as for tokens, errors have no unit.
    """
    import torch

    if tolerance.atol == tolerance.rtol == 0:
        return None
    bounds = torch.tensor(SIZE_BOUNDS, dtype=torch.float64)
    counts = torch.zeros(len(bounds) + 1, dtype=torch.int64)
    rows = []
    for one, other in zip(_as_rows(expected), _as_rows(actual), strict=True):
        used = _tolerance_used(one, other, tolerance)
        sizes = torch.bucketize(used.flatten(), bounds, right=True)
        counts += torch.bincount(sizes, minlength=len(counts))
        rows.append(used.amax(-1))
    grid = torch.stack(rows)
    size = [min(side, most) for side, most in zip(grid.shape, _MAX_CELLS, strict=True)]
    cells = torch.nn.functional.adaptive_max_pool2d(grid[None], size)[0]
    return ErrorMap(
        (grid.shape[0], grid.shape[1]),
        # Three digits: what the JSON keeps, so that a page made from it is the same.
        tuple(tuple(float(f"{cell:.3g}") for cell in row) for row in cells.tolist()),
        tuple(counts.tolist()),
    )


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return (rows, positions, width): see ErrorMap.shape."""
    if tensor.dim() < _TWO:
        return tensor.reshape(1, -1, 1)
    if tensor.dim() == _TWO:
        return tensor.T.unsqueeze(-1)
    if tensor.dim() == _FOUR:
        # (tiles, channels, height, width): a position is a pixel.
        return tensor.flatten(2).transpose(1, 2)
    return tensor.flatten(1, -2) if tensor.dim() > _THREE else tensor


def _tolerance_used(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> torch.Tensor:
    import torch

    one, other = (tensor.to("cpu", torch.float64) for tensor in (expected, actual))
    used = (other - one).abs() / (tolerance.atol + tolerance.rtol * one.abs())
    return used.masked_fill(one == other, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
