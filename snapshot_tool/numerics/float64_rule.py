"""Judging a tensor by the oracle: the candidate's error in proportion to the reference's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from snapshot_tool.base.tolerance import (
    CAP,
    ULPS,
    OracleComparison,
    OracleTensor,
    Tolerance,
    error_multiplier,
)
from snapshot_tool.numerics.compare import unravel

if TYPE_CHECKING:
    import torch

_BLOCK = 2**20  # elements: a block's float64 copies stay below 50 MB


def compare_with_oracle(
    oracle: OracleTensor, actual: torch.Tensor, *, tolerance: Tolerance, dtype: str
) -> OracleComparison:
    """Return the figures of a candidate's output, of the recorded tensor's shape.

    dtype: the one that the candidate computes in; its unit in the last place is the floor, and the
    reference's errors in it are the measure.
    """
    import torch

    noise = oracle.noise.reshape(-1).double()
    sums, greatest, sizes, scale = _position_errors(oracle, actual)
    reference_error = math.sqrt(float(noise.square().mean()))
    multiplier = error_multiplier(actual.numel(), dtype=dtype)
    # The size of the values is the golden's, never the candidate's: a fault must not widen it.
    ulps = ULPS * torch.finfo(getattr(torch, dtype)).eps
    room = tolerance.atol / 10
    error = math.sqrt(float(sums.sum()) / actual.numel())
    limits = CAP * multiplier * noise.clamp(min=reference_error) + room + ulps * sizes
    excess = (greatest / limits).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(excess.argmax())
    return OracleComparison(
        error=error,
        reference_error=reference_error,
        limit=multiplier * reference_error + room + ulps * scale,
        position=unravel(worst, actual.shape[:-1]),
        position_error=float(greatest[worst]),
        position_limit=float(limits[worst]),
    )


def position_noise(values: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of values - oracle at each position, float32, without a width.

    NaN for an infinite one: it must not become a limit that everything keeps.
    """
    import torch

    errors = values.to("cpu", torch.float64) - oracle.to("cpu", torch.float64)
    noise = errors.square().mean(-1).sqrt().float()
    return noise.masked_fill(noise.isinf(), torch.nan)


def _position_errors(
    oracle: OracleTensor, actual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return each position's squared error, greatest error and greatest value, and the whole's rms.

    A position is all that shares the leading dimensions: a patch, a token, a step.
    """
    import torch

    width = actual.shape[-1]
    flat = [t.reshape(-1, width) for t in (oracle.reference, oracle.delta, actual)]
    rows = max(1, _BLOCK // width)
    sums, greatest, sizes, total = [], [], [], 0.0
    for start in range(0, len(flat[0]), rows):
        reference, delta, values = (t[start : start + rows].to("cpu", torch.float64) for t in flat)
        errors = (values - (reference + delta)).abs()
        sums.append(errors.square().sum(-1))
        greatest.append(errors.amax(-1))
        sizes.append(reference.abs().amax(-1))
        total += float(reference.square().sum())
    rms = math.sqrt(total / actual.numel())
    return torch.cat(sums), torch.cat(greatest), torch.cat(sizes), rms
