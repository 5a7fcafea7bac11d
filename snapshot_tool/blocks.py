"""The figures of two flat tensors, block by block, on as many threads as torch has.

A block is measured in float32, in memory that stays in the processor's cache. What float32 does not
decide is measured in float64: elements at the very edge of the tolerance, blocks with NaN, Inf or
differences that float32 cannot square, wider dtypes. Equal integers, masks say, are only summed up.
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

# Elements; no power of two. Six such rows of float32 stay in the processor's last cache. Threads
# hand over Python's lock at each operation, which takes as long as it does: so no smaller ones.
_BLOCK = 250_000
_PIECE = 2**22  # elements that are copied at once of a tensor that is not contiguous
_FEW = 2**14  # elements whose places are looked at at once: new memory takes longer than they do
_SHARE = 12  # blocks that a thread takes at once, and
_SHARES = 4  # how many shares a thread has at least, where there are as many blocks
_THREADS = 8  # more would read no faster, and each has 4 MB of its own
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
            blocks = math.ceil(one.numel() / _BLOCK)
            size = max(1, min(_SHARE, blocks // (_SHARES * threads))) * _BLOCK
            shares = range(0, one.numel(), size)
            work = _Worker(one, other, tolerance, start, size)
            # Threads cost more than one share does.
            done = pool.map(work, shares) if len(shares) > 1 else map(work, shares)
            found += (figures for share in done for figures in share)
    return found


@contextmanager
def _one_thread_for_each_operation() -> Iterator[int]:
    """Let no operation of torch be spread over threads; yield over how many to share blocks.

    So blocks can be shared out, and a sum does not depend on the number of threads.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, _THREADS)
    finally:
        torch.set_num_threads(threads)


def worst_place(
    expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance, block: BlockFigures
) -> int:
    """Return the place of a block's element furthest beyond the tolerance, or nearest to it."""
    import torch

    for start, one, other in _pieces(expected, actual):
        if start <= block.start < start + one.numel():
            part = slice(block.start - start, block.start - start + _BLOCK)
            few = (torch.split(whole[part], _FEW) for whole in (one, other))
            found = [_Exact(a, b, tolerance).excess.max(dim=0) for a, b in zip(*few, strict=True)]
            greatest = [float(value) for value, _ in found]
            at = greatest.index(max(greatest))
            return block.start + at * _FEW + int(found[at].indices)
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
    """Measures a share of the blocks, `size` elements."""

    expected: torch.Tensor
    actual: torch.Tensor
    tolerance: Tolerance
    first: int
    size: int

    def __call__(self, begin: int) -> list[BlockFigures]:
        import torch

        end = min(begin + self.size, self.expected.numel())
        with torch.inference_mode():
            space = _Space(min(_BLOCK, end - begin))
            return [self._measure(start, space) for start in range(begin, end, _BLOCK)]

    def _measure(self, start: int, space: _Space) -> BlockFigures:
        block = slice(start, start + _BLOCK)
        expected, actual = self.expected[block].to("cpu"), self.actual[block].to("cpu")
        place = self.first + start
        if _is_narrow(expected.dtype) and _is_narrow(actual.dtype):
            found = _in_float32(expected.float(), actual.float(), self.tolerance, space, place)
            if found is not None:
                return found
        elif _are_equal_integers(expected, actual):
            return _of_equal(expected, self.tolerance, place)
        return _Exact(expected, actual, self.tolerance).figures(place)


class _Space:
    """Where a block's rows and figures are put.

    Figures are read all at once: threads hand over Python's lock at each step, which takes longer
    than the step does where a machine is slow to wake them.
    """

    def __init__(self, length: int) -> None:
        import torch

        # Whatever dtype and device a candidate has made torch's own.
        self.rows, self.figures = (
            torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((4, length), (7,))
        )
        self.greatest, self.sum_abs = self.figures[:3], self.figures[3]
        self.squares = self.figures[4:].unbind()


def _is_narrow(dtype: torch.dtype) -> bool:
    import torch

    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def _in_float32(
    expected: torch.Tensor,
    actual: torch.Tensor,
    tolerance: Tolerance,
    space: _Space,
    start: int,
) -> BlockFigures | None:
    """Return a block's figures, or None where float32 does not decide."""
    import torch

    rows = space.rows[:, : len(expected)]
    diff, relative, beyond, magnitude = rows.unbind()
    torch.sub(actual, expected, out=diff).abs_()
    torch.abs(expected, out=magnitude)
    torch.div(diff, magnitude, out=relative)
    torch.add(diff, magnitude, alpha=-tolerance.rtol, out=beyond)
    torch.amax(rows[:3], dim=1, out=space.greatest)
    torch.sum(diff, dim=0, out=space.sum_abs)
    for one, square in zip((diff, expected, actual), space.squares, strict=True):
        torch.dot(one, one, out=square)
    max_abs, max_rel, greatest, sum_abs, *squares = space.figures.tolist()
    if not (max_abs == 0 or _LEAST < max_abs < _MOST) or not all(map(math.isfinite, squares)):
        return None
    if math.isnan(max_rel):  # 0 / 0: no difference
        max_rel = float(relative.nan_to_num_(nan=0.0, posinf=math.inf).amax())
    if math.isinf(max_rel) and bool(expected[relative.isinf()].all()):  # too large for float32
        return None
    margin = _MARGIN * max_abs
    mismatched = 0
    if greatest > tolerance.atol - margin:
        mismatched = int(torch.count_nonzero(beyond > tolerance.atol + margin))
        near = beyond > tolerance.atol - margin
        if mismatched != int(torch.count_nonzero(near)):
            edge = (near & (beyond <= tolerance.atol + margin)).nonzero()[:, 0]
            mismatched += _Exact(expected[edge], actual[edge], tolerance).mismatched
    return BlockFigures(
        start,
        max_abs=max_abs,
        max_rel=max_rel,
        sum_abs=sum_abs,
        sum_squares=squares[0],
        norm_expected=squares[1],
        norm_actual=squares[2],
        mismatched=mismatched,
        worst_excess=greatest - tolerance.atol,
    )


def _are_equal_integers(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.dtype == other.dtype and not one.is_floating_point() and torch.equal(one, other)


def _of_equal(block: torch.Tensor, tolerance: Tolerance, start: int) -> BlockFigures:
    """Return the figures of a block of integers, of a mask say, that both tensors have alike."""
    numbers = block.double()
    least = float(numbers.abs().min()) if tolerance.rtol else 0.0
    norm = float(numbers @ numbers)
    excess = -tolerance.atol - tolerance.rtol * least
    return BlockFigures(start, 0.0, 0.0, 0.0, 0.0, norm, norm, 0, excess)


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
