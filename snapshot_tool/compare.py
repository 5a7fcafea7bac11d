"""Measuring a tensor against its golden, and judging the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from snapshot_tool.blocks import measure_blocks, worst_place
from snapshot_tool.core.results import Comparison, Verdict, Worst
from snapshot_tool.core.tolerance import Tolerance

if TYPE_CHECKING:
    import torch


def judge_tensor(
    expected: torch.Tensor,
    actual: object,
    tolerance: Tolerance,
    *,
    computed_in: torch.dtype | None = None,
) -> tuple[Verdict, str, Comparison | None]:
    """Return verdict, reason and figures of a candidate's output against the golden.

    The rule is torch.allclose's with equal_nan=False, and stricter in what it refuses: another
    type, shape or dtype fails by name, and so does NaN or Inf where the golden has none.

    computed_in: a floating-point dtype that is right, too, where the golden's is another one.
    """
    import torch

    if not isinstance(actual, torch.Tensor):
        return Verdict.FAIL, f"expected a tensor, actual is {type(actual).__name__}", None
    if actual.shape != expected.shape:
        shapes = f"expected {tuple(expected.shape)}, actual {tuple(actual.shape)}"
        return Verdict.FAIL, f"shape mismatch: {shapes}", None
    allowed = {expected.dtype, computed_in if expected.is_floating_point() else None}
    if actual.dtype not in allowed:
        return (
            Verdict.FAIL,
            f"dtype mismatch: expected {expected.dtype}, actual {actual.dtype}",
            None,
        )
    if expected.numel() == 0:
        return Verdict.FAIL, "the golden tensor is empty: nothing to compare", None
    comparison = compare_tensors(expected, actual, tolerance)
    if comparison.mismatched == 0:
        return Verdict.PASS, "", comparison
    return Verdict.FAIL, _reason(actual, comparison, tolerance), comparison


def _reason(actual: torch.Tensor, comparison: Comparison, tolerance: Tolerance) -> str:
    """Word a mismatch after torch.testing.assert_close, NaN and Inf by name."""
    import torch

    count, numel = comparison.mismatched, comparison.numel
    reason = f"{count} of {numel} differ ({count / numel:.2%})"
    if actual.is_floating_point():
        for name, bad in (("NaN", torch.isnan(actual)), ("Inf", torch.isinf(actual))):
            if found := int(bad.sum()):
                reason += f", {found} {name}"
    worst = comparison.worst
    if worst is None:
        return reason
    diff = abs(worst.actual - worst.expected)
    allowed = tolerance.atol + (tolerance.rtol * abs(worst.expected) if tolerance.rtol else 0.0)
    return (
        f"{reason}; worst at {list(worst.index)}: expected {worst.expected:.6g}, actual "
        f"{worst.actual:.6g} (|diff| {diff:.3g} > {allowed:.3g} allowed)"
    )


def compare_tensors(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> Comparison:
    """Return the figures of two tensors of one shape, at least one element, on any device.

    Memory beyond both tensors is bounded however large they are. Sums over blocks are taken in
    float64; integers are compared exactly where below 2**53.
    """
    blocks = measure_blocks(expected, actual, tolerance)
    worst_block = max(blocks, key=lambda block: block.worst_excess)
    index = unravel(worst_place(expected, actual, tolerance, worst_block), expected.shape)
    numel = expected.numel()
    sum_squares = sum(block.sum_squares for block in blocks)
    return Comparison(
        max_abs=_greatest(block.max_abs for block in blocks),
        max_rel=_greatest(block.max_rel for block in blocks),
        mean_abs=sum(block.sum_abs for block in blocks) / numel,
        rmse=math.sqrt(sum_squares / numel),
        cosine=_cosine(
            sum(block.norm_expected for block in blocks),
            sum(block.norm_actual for block in blocks),
            sum_squares,
        ),
        mismatched=sum(block.mismatched for block in blocks),
        numel=numel,
        worst=Worst(index, float(expected[index]), float(actual[index])),
    )


def _cosine(expected: float, actual: float, difference: float) -> float:
    """Return the cosine between two vectors from the squared norms of both and of their difference.

    By the law of cosines, arranged so that nearly parallel vectors lose no digits.
    """
    if expected == 0 or actual == 0:
        return 1.0 if expected == actual else 0.0
    one, other = math.sqrt(expected), math.sqrt(actual)
    return 1 - (difference - (one - other) ** 2) / (2 * one * other)


def _greatest(figures: Iterable[float]) -> float:
    """Return the greatest of non-negative figures; NaN, once seen, stays: max would lose it."""
    found = list(figures)
    return math.nan if any(map(math.isnan, found)) else max(found)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index into `shape` of a flat place."""
    index: list[int] = []
    for side in reversed(shape):
        flat, place = divmod(flat, side)
        index.append(place)
    return tuple(reversed(index))
