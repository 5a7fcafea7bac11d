"""Compare a tensor with the golden one: by tolerances, by the float64 reference, or bit for bit.

Tensors are compared block by block in float64, with bounded memory in addition to both tensors.
Integers are exact below 2**53.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash

from snapshot_tool.base.protocol import WeightPair
from snapshot_tool.base.report import WeightDifference, WeightReport
from snapshot_tool.base.results import SIZE_BOUNDS, Comparison, ErrorMap, Verdict, Worst
from snapshot_tool.base.tolerance import (
    CAP,
    ULPS,
    OracleComparison,
    OracleTensor,
    Tolerance,
    error_multiplier,
)

_BLOCK = 2**18  # elements: ten float64 copies of a block take 20 MB
_PIECE = 2**20  # elements of a non-contiguous tensor that are copied at once
_MAX_CELLS = (32, 64)  # rows, columns: 2048 numbers for each tensor that fails


def judge_tensor(
    expected: torch.Tensor,
    actual: object,
    tolerance: Tolerance,
    *,
    computed_in: torch.dtype | None = None,
) -> tuple[Verdict, str, Comparison | None]:
    """Return verdict, reason and figures of a candidate's output against the golden.

    The rule is that of torch.allclose with equal_nan=False. Another type, shape or dtype fails, and
    so does NaN or Inf if the golden value is finite; the reason names it.

    computed_in: another floating-point dtype that is accepted.
    """
    if not isinstance(actual, torch.Tensor):
        return Verdict.FAIL, f"expected a tensor, actual is {type(actual).__name__}", None
    if actual.shape != expected.shape:
        shapes = f"expected {tuple(expected.shape)}, actual {tuple(actual.shape)}"
        return Verdict.FAIL, f"shape mismatch: {shapes}", None
    allowed = {expected.dtype, computed_in if expected.is_floating_point() else None}
    if actual.dtype not in allowed:
        dtypes = f"expected {expected.dtype}, actual {actual.dtype}"
        return Verdict.FAIL, f"dtype mismatch: {dtypes}", None
    if expected.numel() == 0:
        return Verdict.FAIL, "the golden tensor is empty: nothing to compare", None
    comparison = compare_tensors(expected, actual, tolerance)
    if comparison.mismatched == 0:
        return Verdict.PASS, "", comparison
    return Verdict.FAIL, _reason(actual, comparison, tolerance), comparison


def _reason(actual: torch.Tensor, comparison: Comparison, tolerance: Tolerance) -> str:
    """Describe a mismatch like torch.testing.assert_close, with counts of NaN and Inf."""
    count, numel = comparison.mismatched, comparison.numel
    reason = f"{count} of {numel} differ ({count / numel:.2%})"
    if actual.is_floating_point():
        for name, bad in (("NaN", torch.isnan(actual)), ("Inf", torch.isinf(actual))):
            if found := int(bad.sum()):
                reason += f", {found} {name}"
    worst = comparison.worst
    return reason if worst is None else f"{reason}; {worst.describe(tolerance)}"


def compare_tensors(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> Comparison:
    """Return the figures of two non-empty tensors of one shape, on any device."""
    greatest = [torch.zeros(2, dtype=torch.float64)]  # max_abs, max_rel of each block
    sums, mismatched, worst_excess, worst_place = [], 0, -math.inf, 0
    with torch.inference_mode():
        for place, *pair in _blocks(expected, actual):
            one, other = (tensor.to("cpu", torch.float64) for tensor in pair)
            # The difference of equal infinities is NaN, but they agree.
            same = one == other
            diff = (other - one).abs().masked_fill_(same, 0.0)
            # Zero times Inf is NaN: without a relative part nothing is added.
            allowed = (tolerance.atol + tolerance.rtol * one.abs()).nan_to_num_(
                nan=tolerance.atol, posinf=math.inf
            )
            # `not <=` rather than `>`, and no allowance for Inf: NaN and stray Inf are mismatches.
            finite = diff.isfinite()
            bad = ~((diff <= allowed) & finite) & ~same
            mismatched += int(bad.sum())
            excess = (diff - allowed).nan_to_num_(nan=math.inf, posinf=math.inf)
            excess.masked_fill_(bad & ~finite, math.inf)
            most, at = excess.max(dim=0)
            if float(most) > worst_excess:
                worst_excess, worst_place = float(most), place + int(at)
            relative = (diff / one.abs()).masked_fill_(same, 0.0)
            # A maximum of torch keeps NaN, unlike Python's.
            greatest.append(torch.stack([diff.max(), relative.max()]))
            squares = [diff.square().sum(), one.square().sum(), other.square().sum()]
            sums.append([float(figure) for figure in (diff.sum(), *squares)])
    sum_abs, sum_squares, norm_expected, norm_actual = (
        sum(column) for column in zip(*sums, strict=True)
    )
    max_abs, max_rel = torch.stack(greatest).amax(0).tolist()
    index = tuple(map(int, np.unravel_index(worst_place, expected.shape)))
    numel = expected.numel()
    return Comparison(
        max_abs=max_abs,
        max_rel=max_rel,
        mean_abs=sum_abs / numel,
        rmse=math.sqrt(sum_squares / numel),
        cosine=_cosine(norm_expected, norm_actual, sum_squares),
        mismatched=mismatched,
        numel=numel,
        worst=Worst(index, float(expected[index]), float(actual[index])),
    )


def _blocks(
    expected: torch.Tensor, actual: torch.Tensor, start: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield flat blocks of both tensors, each with the index of its first element.

    A tensor that is not contiguous must be copied to be flat, so this is done piece by piece.
    """
    plain = expected.is_contiguous() and actual.is_contiguous()
    if plain or expected.numel() <= _PIECE:
        flat = [torch.split(tensor.reshape(-1), _BLOCK) for tensor in (expected, actual)]
        for one, other in zip(*flat, strict=True):
            yield start, one, other
            start += one.numel()
        return
    size = expected[0].numel()
    rows = max(1, _PIECE // max(1, size))
    for row in range(0, len(expected), rows):
        part = slice(row, row + rows) if rows > 1 else row
        yield from _blocks(expected[part], actual[part], start + row * size)


def _cosine(expected: float, actual: float, difference: float) -> float:
    """Return the cosine between two vectors from the squared norms of both and of their difference.

    This is the law of cosines, arranged so that nearly parallel vectors lose no digits.
    """
    if expected == 0 or actual == 0:
        return 1.0 if expected == actual else 0.0
    one, other = math.sqrt(expected), math.sqrt(actual)
    return 1 - (difference - (one - other) ** 2) / (2 * one * other)


def map_errors(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> ErrorMap | None:
    """Return a map of the errors of two tensors of one shape, in units of the tolerance.

    Returns None if the tolerance is 0, as for tokens.
    """
    if tolerance.atol == tolerance.rtol == 0:
        return None
    bounds = torch.tensor(SIZE_BOUNDS, dtype=torch.float64)
    counts = torch.zeros(len(bounds) + 1, dtype=torch.int64)
    rows = []
    for pair in zip(_as_rows(expected), _as_rows(actual), strict=True):
        one, other = (tensor.to("cpu", torch.float64) for tensor in pair)
        used = (other - one).abs() / (tolerance.atol + tolerance.rtol * one.abs())
        used = used.masked_fill(one == other, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        sizes = torch.bucketize(used.flatten(), bounds, right=True)
        counts += torch.bincount(sizes, minlength=len(counts))
        rows.append(used.amax(-1))
    grid = torch.stack(rows)
    size = [min(side, most) for side, most in zip(grid.shape, _MAX_CELLS, strict=True)]
    cells = torch.nn.functional.adaptive_max_pool2d(grid[None], size)[0]
    return ErrorMap(
        (grid.shape[0], grid.shape[1]),
        tuple(" ".join(f"{cell:.3g}" for cell in row) for row in cells.tolist()),
        tuple(counts.tolist()),
    )


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return (rows, positions, width): see ErrorMap.shape."""
    match tensor.dim():
        case 0 | 1:
            return tensor.reshape(1, -1, 1)
        case 2:
            return tensor.T.unsqueeze(-1)
        case 3:
            return tensor
        case 4:  # (tiles, channels, height, width): a position is a pixel
            return tensor.flatten(2).transpose(1, 2)
        case _:
            return tensor.flatten(1, -2)


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
    step = max(1, _PIECE // width)  # float64 copies stay below 50 MB
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
        position=tuple(map(int, np.unravel_index(worst, actual.shape[:-1]))),
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


def fingerprint(data: torch.Tensor | bytes) -> str:
    """Return a digest (XXH3, 128 bits), several times as fast as SHA-256.

    It finds what was overwritten by mistake; two inputs with one digest can be made on purpose.
    """
    return xxhash.xxh3_128_hexdigest(data if isinstance(data, bytes) else tensor_bytes(data))


def equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape, dtype and device have the same bytes.

    A tensor that is not contiguous is copied.
    """
    return torch.equal(_flat_bytes(one), _flat_bytes(other))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension first; its own memory if it is contiguous."""
    return _flat_bytes(tensor.to("cpu")).numpy().data


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, (bytes,) uint8; its own memory if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    # One element is contiguous with any stride, but can be viewed as bytes only with stride 1.
    plain = flat.as_strided(flat.shape, (1,)) if flat.numel() <= 1 else flat
    return plain.view(torch.uint8)


def compare_weights(pairs: Iterable[WeightPair]) -> WeightReport:
    """Compare weights pair by pair, holding one pair at a time.

    The checkpoint's weights are cast to the candidate's dtype, as on loading. Weights are equal if
    every element is; NaN equals NaN.
    """
    compared, differing, left = 0, [], []
    for pair in pairs:
        if pair.actual is None or pair.actual.shape != pair.expected.shape:
            left.append(pair.name)
            continue
        compared += 1
        actual = pair.actual.detach()
        expected = pair.expected.to(actual.device, actual.dtype)
        if equal_bytes(expected, actual):  # it takes no memory
            continue
        mismatched = int(((expected != actual) & ~(expected.isnan() & actual.isnan())).sum())
        if mismatched:
            largest = float((actual.double() - expected.double()).abs().max())
            differing.append(
                WeightDifference(pair.name, pair.modules(), mismatched, actual.numel(), largest)
            )
    return WeightReport(compared, tuple(differing), tuple(left))
