"""Measuring a tensor against its golden, in one pass over blocks, and judging the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapshot_tool.core.results import Comparison, Verdict, Worst
from snapshot_tool.core.tolerance import Tolerance

if TYPE_CHECKING:
    import torch

_BLOCK = 2**20  # elements: a block's float64 copies stay below 50 MB


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

    Sums are taken in float64; integers are compared exactly where below 2**53.
    """
    totals = _Totals()
    flat_expected, flat_actual = expected.reshape(-1), actual.reshape(-1)
    numel = flat_expected.numel()
    for start in range(0, numel, _BLOCK):
        block = slice(start, start + _BLOCK)
        totals.add(flat_expected[block], flat_actual[block], tolerance, start=start)
    flat = totals.worst_index
    worst = Worst(
        unravel(flat, expected.shape), float(flat_expected[flat]), float(flat_actual[flat])
    )
    return Comparison(
        max_abs=totals.max_abs,
        max_rel=totals.max_rel,
        mean_abs=totals.sum_abs / numel,
        rmse=math.sqrt(totals.sum_squares / numel),
        cosine=totals.cosine(),
        mismatched=totals.mismatched,
        numel=numel,
        worst=worst,
    )


class _Totals:
    """What is summed up over the blocks of two tensors."""

    def __init__(self) -> None:
        self.max_abs = self.max_rel = 0.0
        self.sum_abs = self.sum_squares = 0.0
        self.dot = self.norm_expected = self.norm_actual = 0.0
        self.mismatched = 0
        self.worst_index, self.worst_excess = 0, -math.inf

    def add(
        self, expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance, *, start: int
    ) -> None:
        """Take in one block."""
        import torch

        wide_expected = expected.to("cpu", torch.float64)
        wide_actual = actual.to("cpu", torch.float64)
        # Equal infinities differ by NaN and yet agree.
        same = wide_actual == wide_expected
        diff = (wide_actual - wide_expected).abs().masked_fill_(same, 0.0)
        magnitude = wide_expected.abs()
        # Zero times Inf is NaN: without a relative part nothing is added.
        allowed = (tolerance.atol + tolerance.rtol * magnitude).nan_to_num_(
            nan=tolerance.atol, posinf=math.inf
        )
        # `not <=` rather than `>`, and no allowance for Inf: NaN and stray Inf are mismatches.
        bad = ~((diff <= allowed) & diff.isfinite()) & ~same
        self.mismatched += int(bad.sum())
        excess = (diff - allowed).nan_to_num_(nan=math.inf, posinf=math.inf)
        excess = excess.masked_fill_(bad & ~diff.isfinite(), math.inf)
        place = int(excess.argmax())
        if float(excess[place]) > self.worst_excess:
            self.worst_index, self.worst_excess = start + place, float(excess[place])
        relative = (diff / magnitude).masked_fill_(same, 0.0)
        self.max_abs = _max(self.max_abs, float(diff.max()))
        self.max_rel = _max(self.max_rel, float(relative.max()))
        self.sum_abs += float(diff.sum())
        self.sum_squares += float(diff.square().sum())
        self.dot += float(wide_expected @ wide_actual)
        self.norm_expected += float(wide_expected @ wide_expected)
        self.norm_actual += float(wide_actual @ wide_actual)

    def cosine(self) -> float:
        """Return the cosine of both whole tensors."""
        if self.norm_expected == 0 or self.norm_actual == 0:
            return 1.0 if self.norm_expected == self.norm_actual else 0.0
        return self.dot / math.sqrt(self.norm_expected) / math.sqrt(self.norm_actual)


def _max(one: float, other: float) -> float:
    """Return the greater of two figures; NaN, once seen, stays: built-in max would lose it."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index into `shape` of a flat place."""
    index: list[int] = []
    for side in reversed(shape):
        flat, place = divmod(flat, side)
        index.append(place)
    return tuple(reversed(index))
