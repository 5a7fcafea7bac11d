"""The figures of two flat tensors, block by block, on as many threads as torch has.

A block is measured in float32, in memory that stays in the processor's cache. What float32 does not
decide is measured in float64: elements at the very edge of the tolerance, blocks with NaN, Inf or
differences that float32 cannot square, wider dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshot_tool.core.tolerance import Tolerance

if TYPE_CHECKING:
    import torch

# Elements; no power of two. Five such rows of float32 stay in the processor's cache, and threads
# hand over Python's lock three times less often than with a third of it.
_BLOCK = 150_000
_PIECE = 2**22  # elements that are copied at once of a tensor that is not contiguous
_SHARE = 8  # blocks that a thread takes at once
# Differences whose squares float32 holds: neither 0 nor Inf, and their sum over a block neither.
_LEAST, _MOST = 1e-15, 1e16
_MARGIN = 1e-6  # of a difference: more than float32 loses of it (6e-8 for each of two operations)


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """Figures of one block; see core.results.Comparison. `start` is its first element's place.

    worst_excess: greatest |actual - expected| - atol - rtol |expected|; inf for stray NaN and Inf.
    """

    start: int
    max_abs: float
    max_rel: float
    sum_abs: float
    sum_squares: float
    norm_expected: float
    norm_actual: float
    mismatched: int
    worst_excess: float


def measure_blocks(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> list[BlockFigures]:
    """Return the figures of all blocks of two tensors of one shape, in order."""
    found: list[BlockFigures] = []
    with _one_thread_for_each_operation() as threads, ThreadPoolExecutor(threads) as pool:
        for start, one, other in _pieces(expected, actual):
            shares = range(0, one.numel(), _SHARE * _BLOCK)
            work = _Worker(one, other, tolerance, start)
            # Threads cost more than one share does.
            done = pool.map(work, shares) if len(shares) > 1 else map(work, shares)
            found += (figures for share in done for figures in share)
    return found


@contextmanager
def _one_thread_for_each_operation() -> Iterator[int]:
    """Let no operation of torch be spread over threads; yield how many torch otherwise has.

    So blocks can be shared out, and a sum does not depend on the number of threads.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def worst_place(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance, block: BlockFigures
) -> int:
    """Return the place of a block's element furthest beyond the tolerance, or nearest to it."""
    for start, one, other in _pieces(expected, actual):
        if start <= block.start < start + one.numel():
            part = slice(block.start - start, block.start - start + _BLOCK)
            excess = _Exact(one[part], other[part], tolerance).excess
            return block.start + int(excess.argmax())
    raise ValueError(f"no block begins at {block.start}")


def _pieces(
    expected: torch.Tensor, actual: torch.Tensor, start: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield both tensors flat, with the place of their first element.

    Tensors that are not contiguous are copied a piece at a time, so that memory stays small.
    """
    plain = expected.is_contiguous() and actual.is_contiguous()
    if plain or expected.numel() <= _PIECE:
        yield start, expected.reshape(-1), actual.reshape(-1)
        return
    size = expected[0].numel()
    rows = max(1, _PIECE // max(1, size))
    for row in range(0, len(expected), rows):
        part = slice(row, row + rows) if rows > 1 else row
        yield from _pieces(expected[part], actual[part], start + row * size)


@dataclass(frozen=True, slots=True)
class _Worker:
    """Measures a share of the blocks."""

    expected: torch.Tensor
    actual: torch.Tensor
    tolerance: Tolerance
    first: int

    def __call__(self, begin: int) -> list[BlockFigures]:
        import torch

        end = min(begin + _SHARE * _BLOCK, self.expected.numel())
        with torch.inference_mode():
            space = torch.empty(3, min(_BLOCK, end - begin))
            return [self._measure(start, space) for start in range(begin, end, _BLOCK)]

    def _measure(self, start: int, space: torch.Tensor) -> BlockFigures:
        block = slice(start, start + _BLOCK)
        expected, actual = self.expected[block].to("cpu"), self.actual[block].to("cpu")
        place = self.first + start
        if _is_narrow(expected.dtype) and _is_narrow(actual.dtype):
            found = _in_float32(expected.float(), actual.float(), self.tolerance, space, place)
            if found is not None:
                return found
        return _Exact(expected, actual, self.tolerance).figures(place)


def _is_narrow(dtype: torch.dtype) -> bool:
    import torch

    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def _in_float32(
    expected: torch.Tensor,
    actual: torch.Tensor,
    tolerance: Tolerance,
    space: torch.Tensor,
    start: int,
) -> BlockFigures | None:
    """Return a block's figures, or None where float32 does not decide."""
    import torch

    diff, magnitude, other = space[:, : len(expected)]
    torch.sub(actual, expected, out=diff).abs_()
    max_abs = float(diff.max())
    if not (max_abs == 0 or _LEAST < max_abs < _MOST):
        return None
    torch.abs(expected, out=magnitude)
    relative = torch.div(diff, magnitude, out=other)
    max_rel = float(relative.max())
    if math.isnan(max_rel):  # 0 / 0: no difference
        max_rel = float(relative.nan_to_num_(nan=0.0, posinf=math.inf).max())
    if math.isinf(max_rel) and bool(expected[relative.isinf()].all()):  # too large for float32
        return None
    beyond = torch.add(diff, magnitude, alpha=-tolerance.rtol, out=other)
    greatest = float(beyond.max())
    margin = _MARGIN * max_abs
    mismatched = 0
    if greatest > tolerance.atol - margin:
        mismatched = int(torch.count_nonzero(beyond > tolerance.atol + margin))
        near = beyond > tolerance.atol - margin
        if mismatched != int(torch.count_nonzero(near)):
            edge = (near & (beyond <= tolerance.atol + margin)).nonzero()[:, 0]
            mismatched += _Exact(expected[edge], actual[edge], tolerance).mismatched
    squares = [float(x.dot(x)) for x in (diff, expected, actual)]
    if not all(map(math.isfinite, squares)):
        return None
    return BlockFigures(
        start,
        max_abs=max_abs,
        max_rel=max_rel,
        sum_abs=float(diff.sum()),
        sum_squares=squares[0],
        norm_expected=squares[1],
        norm_actual=squares[2],
        mismatched=mismatched,
        worst_excess=greatest - tolerance.atol,
    )


class _Exact:
    """A block of any dtype in float64; integers are exact where below 2**53."""

    def __init__(self, expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance) -> None:
        import torch

        self._expected = expected.to("cpu", torch.float64)
        self._actual = actual.to("cpu", torch.float64)
        # Equal infinities differ by NaN and yet agree.
        self._same = self._actual == self._expected
        self._diff = (self._actual - self._expected).abs().masked_fill_(self._same, 0.0)
        # Zero times Inf is NaN: without a relative part nothing is added.
        allowed = (tolerance.atol + tolerance.rtol * self._expected.abs()).nan_to_num_(
            nan=tolerance.atol, posinf=math.inf
        )
        # `not <=` rather than `>`, and no allowance for Inf: NaN and stray Inf are mismatches.
        finite = self._diff.isfinite()
        bad = ~((self._diff <= allowed) & finite) & ~self._same
        self.mismatched = int(bad.sum())
        excess = (self._diff - allowed).nan_to_num_(nan=math.inf, posinf=math.inf)
        self.excess = excess.masked_fill_(bad & ~finite, math.inf)

    def figures(self, start: int) -> BlockFigures:
        """Return the block's figures."""
        relative = (self._diff / self._expected.abs()).masked_fill_(self._same, 0.0)
        return BlockFigures(
            start,
            max_abs=float(self._diff.max()),
            max_rel=float(relative.max()),
            sum_abs=float(self._diff.sum()),
            sum_squares=float(self._diff.square().sum()),
            norm_expected=float(self._expected @ self._expected),
            norm_actual=float(self._actual @ self._actual),
            mismatched=self.mismatched,
            worst_excess=float(self.excess.max()),
        )
