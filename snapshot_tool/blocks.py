"""The figures of two flat tensors, block by block.

A block is measured in float32, in memory that stays in the processor's cache. What float32 does not
decide is measured in float64: elements at the very edge of the tolerance, blocks with NaN, Inf or
differences that float32 cannot square, wider dtypes; and tensors of a few elements. Blocks that are
equal, as those before them are, are only summed up.

Torch spreads each operation over its own threads: Python's would hand over its lock at each one,
which takes longer than the operation does. They wait for each other at each one, too, which takes a
hundred times as long where other processes have the cores: then one thread measures for a while.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from snapshot_tool.core.tolerance import Tolerance
from snapshot_tool.memory import equal_bytes

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# A block is rows, each summed up by one thread: no sum depends on how many threads there are.
_ROWS = 16
_BLOCK = _ROWS * 10_000  # elements; four times that of float32 stay in the processor's cache
_FIRST = 4  # blocks that a single thread measures before others are woken
_LONG = 0.01  # seconds; a block of float32 takes a thirtieth of it
_ALONE = 32  # blocks that a single thread measures for each time that one took so long
_PIECE = 2**20  # elements that are copied at once of a tensor that is not contiguous
_FEW = 2**14  # elements whose places are looked at at once: new memory takes longer than they do
# Differences whose squares float32 holds: neither 0 nor Inf, and their sum over a row neither.
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
    import torch

    space_of = functools.cache(_Space) if _is_for_float32(expected, actual) else None
    # Closed, so that torch has its threads again even while an error is being told.
    with torch.inference_mode(), closing(_shared_out(_blocks(expected, actual))) as blocks:
        figures: list[BlockFigures] = []
        for place, one, other in blocks:
            found = None
            if not figures or not figures[-1].max_abs:  # after one that differs, most do
                found = _if_equal(place, one, other, tolerance)
            figures.append(
                found or _measure(place, one, other, tolerance, space_of and space_of(one.shape))
            )
        return figures


def _blocks(
    expected: torch.Tensor, actual: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the blocks of both tensors on the CPU, with the place of their first element."""
    for start, *pair in _pieces(expected, actual):
        place = start
        for one, other in zip(*(_in_rows(part.reshape(-1)) for part in pair), strict=True):
            yield place, one.to("cpu"), other.to("cpu")
            place += one.numel()


def _in_rows(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a flat tensor's elements, in rows of one length; the few that are left are one row."""
    import torch

    left = len(flat) % _ROWS
    if left < len(flat):
        for block in torch.split(flat[: len(flat) - left], _BLOCK):
            yield block.view(_ROWS, -1)
    if left:
        yield flat[len(flat) - left :].view(1, -1)


def _shared_out(blocks: Iterable[T]) -> Generator[T, None, None]:
    """Yield blocks: the first few, and most while one takes long, to one thread of torch alone."""
    import torch

    threads, alone = torch.get_num_threads(), _FIRST
    try:
        for block in blocks:
            wanted = 1 if alone else threads
            if torch.get_num_threads() != wanted:
                torch.set_num_threads(wanted)
            began = time.perf_counter()
            yield block
            times = int((time.perf_counter() - began) / _LONG)
            alone = alone - 1 if alone else _ALONE * times
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
            few = (torch.split(whole.reshape(-1)[part], _FEW) for whole in (one, other))
            found = [_Exact(a, b, tolerance).excess.max(dim=0) for a, b in zip(*few, strict=True)]
            greatest = [float(value) for value, _ in found]
            at = greatest.index(max(greatest))
            return block.start + at * _FEW + int(found[at].indices)
    raise ValueError(f"no block begins at {block.start}")


def _pieces(
    expected: torch.Tensor, actual: torch.Tensor, start: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield parts of both tensors, with the place of their first element.

    Making them flat copies what is not contiguous: a piece of it, so that memory stays small.
    """
    plain = expected.is_contiguous() and actual.is_contiguous()
    if plain or expected.numel() <= _PIECE:
        yield start, expected, actual
        return
    size = expected[0].numel()
    rows = max(1, _PIECE // max(1, size))
    for row in range(0, len(expected), rows):
        part = slice(row, row + rows) if rows > 1 else row
        yield from _pieces(expected[part], actual[part], start + row * size)


def _measure(
    start: int,
    expected: torch.Tensor,
    actual: torch.Tensor,
    tolerance: Tolerance,
    space: _Space | None,
) -> BlockFigures:
    """Return the figures of one block: of float32's, in that space, where it decides them."""
    if space is not None:
        found = _in_float32(start, expected.float(), actual.float(), tolerance, space)
        if found is not None:
            return found
    return _Exact(expected, actual, tolerance).figures(start)


def _total(rows: torch.Tensor) -> float:
    """Return the sum of all elements, row by row."""
    return float(rows.sum(dim=1).sum())


class _Space:
    """Where the elements and the figures of a block's rows are put: memory that is there already.

    Figures of one kind lie together, so that they are taken, and read, all at once.
    """

    def __init__(self, shape: torch.Size) -> None:
        import torch

        rows, length = shape
        # Whatever dtype and device a candidate has made torch's own.
        self.compared, self.magnitude, self.greatest, self.totals = (
            torch.empty(size, dtype=torch.float32, device="cpu")
            for size in ((rows, 3, length), shape, (rows, 3), (4, rows))
        )
        self.diff, self.relative, self.beyond = self.compared.unbind(dim=1)
        self.sums, *self.norms = self.totals.unbind()


def _is_for_float32(*both: torch.Tensor) -> bool:
    """Whether float32 holds the values of both. Of a few, float64 takes no longer."""
    import torch

    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return all(tensor.dtype in narrow and tensor.numel() >= _ROWS for tensor in both)


def _in_float32(
    start: int, expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance, space: _Space
) -> BlockFigures | None:
    """Return a block's figures, or None where float32 does not decide."""
    import torch

    diff, relative, beyond = space.diff, space.relative, space.beyond
    torch.sub(actual, expected, out=diff).abs_()
    torch.abs(expected, out=space.magnitude)
    torch.div(diff, space.magnitude, out=relative)
    torch.add(diff, space.magnitude, alpha=-tolerance.rtol, out=beyond)
    torch.amax(space.compared, dim=2, out=space.greatest)
    torch.sum(diff, dim=1, out=space.sums)
    for rows, norms in zip((diff, expected, actual), space.norms, strict=True):
        torch.linalg.vector_norm(rows, dim=1, out=norms)
    max_abs, max_rel, greatest = space.greatest.amax(dim=0).tolist()  # of NaN it makes NaN
    sums, *norms_of = space.totals.tolist()
    squares = [sum(norm * norm for norm in norms) for norms in norms_of]
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
            edge = (near & (beyond <= tolerance.atol + margin)).nonzero(as_tuple=True)
            mismatched += _Exact(expected[edge], actual[edge], tolerance).mismatched
    return BlockFigures(
        start,
        max_abs=max_abs,
        max_rel=max_rel,
        sum_abs=sum(sums),
        sum_squares=squares[0],
        norm_expected=squares[1],
        norm_actual=squares[2],
        mismatched=mismatched,
        worst_excess=greatest - tolerance.atol,
    )


def _if_equal(
    start: int, expected: torch.Tensor, actual: torch.Tensor, tolerance: Tolerance
) -> BlockFigures | None:
    """Return the figures of a block that both tensors have alike, of a mask say; None else.

    Nor of one with NaN or Inf, or with numbers whose sum is.
    """
    import torch

    if expected.dtype != actual.dtype or not equal_bytes(expected, actual):
        return None
    block = expected if expected.dtype == torch.float32 else expected.double()
    norm = sum(row * row for row in torch.linalg.vector_norm(block, dim=1).tolist())
    if not math.isfinite(norm):
        return None
    least = float(block.abs().min()) if tolerance.rtol else 0.0
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
            sum_abs=_total(self._diff),
            sum_squares=_total(self._diff.square()),
            norm_expected=_total(self._expected.square()),
            norm_actual=_total(self._actual.square()),
            mismatched=self.mismatched,
            worst_excess=float(self.excess.max()),
        )
