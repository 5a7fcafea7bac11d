"""Judge a tensor by the float64 reference: its error in proportion to the reference's own."""

from __future__ import annotations

import math

import torch

from snapshot_tool.base.tolerance import (
    CAP,
    ULPS,
    OracleComparison,
    OracleTensor,
    Tolerance,
    error_multiplier,
)
from snapshot_tool.numerics.compare import unravel

_BLOCK = 2**20  # elements: a block's float64 copies stay below 50 MB


def compare_with_oracle(
    oracle: OracleTensor, actual: torch.Tensor, *, tolerance: Tolerance, dtype: str
) -> OracleComparison:
    """Return the figures of a candidate's output, of the recorded tensor's shape.

    A position is one index of the leading dimensions: a patch, a token, a step.

    dtype: the candidate's dtype. The limits are in proportion to the reference's errors in it, and
    at least some of its units in the last place.
    """
    width = actual.shape[-1]
    flat = [t.reshape(-1, width) for t in (oracle.reference, oracle.delta, actual)]
    step = max(1, _BLOCK // width)
    sums, most, sizes, total = [], [], [], 0.0
    for start in range(0, len(flat[0]), step):
        reference, delta, values = (t[start : start + step].to("cpu", torch.float64) for t in flat)
        errors = (values - (reference + delta)).abs()
        sums.append(errors.square().sum(-1))
        most.append(errors.amax(-1))
        sizes.append(reference.abs().amax(-1))
        total += float(reference.square().sum())
    greatest = torch.cat(most)
    noise = oracle.noise.reshape(-1).double()
    reference_error = math.sqrt(float(noise.square().mean()))
    multiplier = error_multiplier(actual.numel(), dtype=dtype)
    # The size of the values is the golden's, never the candidate's: a fault must not widen it.
    ulps = ULPS * torch.finfo(getattr(torch, dtype)).eps
    room = tolerance.atol / 10
    limits = CAP * multiplier * noise.clamp(min=reference_error) + room + ulps * torch.cat(sizes)
    excess = (greatest / limits).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(excess.argmax())
    scale = math.sqrt(total / actual.numel())
    return OracleComparison(
        error=math.sqrt(float(torch.cat(sums).sum()) / actual.numel()),
        reference_error=reference_error,
        limit=multiplier * reference_error + room + ulps * scale,
        position=unravel(worst, actual.shape[:-1]),
        position_error=float(greatest[worst]),
        position_limit=float(limits[worst]),
    )


def position_noise(values: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of values - oracle at each position, float32, without a width.

    An infinite error becomes NaN, because every error would be below an infinite limit.
    """
    errors = values.to("cpu", torch.float64) - oracle.to("cpu", torch.float64)
    noise = errors.square().mean(-1).sqrt().float()
    return noise.masked_fill(noise.isinf(), torch.nan)
