"""The compact form of a large tensor: enough to judge another one by the same tolerance.

The tensor is cut into blocks, one for each entry of its first dimension (in vision: each tile). A
block is stored as a seeded sample of its elements, its moments, and random signed sums. If all
elements are within `t = atol + rtol * |expected|`, these are within the following limits:

- each element of the sample, and the extremes: t;
- the mean, and the mean magnitude: mean(t), which is atol + rtol * mean(|expected|);
- the root mean square: rms(t), at most atol + rtol * rms(expected);
- a sum of n elements with independent random signs, divided by the root of n: 8 * rms(t). Errors
  are independent of the signs, so by Hoeffding's inequality the probability of more is 2.5e-14.

The sample detects widespread faults. The sums detect faults in few elements, exchanged elements and
wrong signs. NaN or Inf in any element is in every sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from snapshot_tool.base.taps import MOMENTS
from snapshot_tool.base.tolerance import Tolerance

LARGE = 2**12  # elements; smaller tensors are kept whole
MAX_SAMPLE, MIN_SAMPLE, SAMPLED = 2048, 64, 8  # elements of a block: one in eight, within limits
MAX_SAMPLES = 2**15  # elements of all blocks, if there are many
SUMS = 16  # signed sums of a block
_DEVIATIONS = 8.0
_ROUNDING = 1e-9  # of float64 sums on another machine, in units of the rms
_COLUMNS = 2**14  # of all blocks at once, so that float64 copies stay small


@dataclass(frozen=True, slots=True)
class CompactTensor:
    """The stored form of a tensor, block by block.

    Args:
        shape: the tensor's shape.
        seed: the seed of places and signs.
        sample: (blocks, at most 2048), elements at seeded places of each block, in its dtype.
        moments: (blocks, 5) float64, see sketch.MOMENTS.
        sums: (blocks, 16) float64, signed sums divided by the root of a block's element count.
        blocks: the block of each row.
    """

    shape: tuple[int, ...]
    seed: int
    sample: torch.Tensor
    moments: torch.Tensor
    sums: torch.Tensor
    blocks: tuple[int, ...]

    @property
    def is_consistent(self) -> bool:
        """Whether the sizes of all parts match the shape."""
        rows = block_count(self.shape)
        numel = math.prod(self.shape) // rows
        # Sets from before MAX_SAMPLES have a full sample of each block, also of many.
        samples = [(rows, sample_size(numel, blocks)) for blocks in (rows, 1)]
        return (
            len(self.blocks) == rows
            and self.sample.shape in samples
            and self.moments.shape == (rows, len(MOMENTS))
            and self.sums.shape == (rows, SUMS)
        )

    def of_blocks(self, rows: Sequence[int]) -> CompactTensor:
        """Return the compact form of the tensor made of some blocks, in that order."""
        chosen = list(rows)
        return replace(
            self,
            shape=(len(chosen), *self.shape[1:]),
            sample=self.sample[chosen],
            moments=self.moments[chosen],
            sums=self.sums[chosen],
            blocks=tuple(self.blocks[row] for row in chosen),
        )

    def allowed_of_moments(self, tolerance: Tolerance) -> torch.Tensor:
        """Return the allowed error of each moment, (blocks, 5) float64."""
        _, rms, abs_mean, low, high = self.moments.unbind(-1)
        scale = torch.stack([abs_mean, rms, abs_mean, low.abs(), high.abs()], dim=-1)
        return tolerance.atol + tolerance.rtol * scale + self._rounding()

    def allowed_of_sums(self, tolerance: Tolerance) -> torch.Tensor:
        """Return the allowed error of each signed sum, (blocks, 16) float64."""
        rms = self.moments[:, MOMENTS.index("rms"), None]
        allowed = _DEVIATIONS * (tolerance.atol + tolerance.rtol * rms) + self._rounding()
        return allowed.expand(self.sums.shape)

    def _rounding(self) -> torch.Tensor:
        """Return the allowed effect of another order of addition; never 0."""
        rms = self.moments[:, MOMENTS.index("rms"), None]
        return rms * _ROUNDING + math.ulp(0.0) * 2**52


def block_count(shape: Sequence[int]) -> int:
    """Return the number of blocks of a tensor; one or two dimensions are one block."""
    return shape[0] if len(shape) > 2 else 1  # noqa: PLR2004


def compact(
    tensor: torch.Tensor,
    *,
    seed: int,
    blocks: Sequence[int] | None = None,
    sampled: int | None = None,
) -> CompactTensor:
    """Return the compact form of a floating-point tensor with at least one element.

    blocks: the corresponding blocks of the golden's tensor; by default all, in order. sampled: the
    number of elements of a block in the golden's sample.
    """
    count = block_count(tensor.shape)
    rows = tensor.detach().to("cpu").reshape(count, -1)
    blocks = tuple(range(count)) if blocks is None else tuple(blocks)
    sampled = sample_size(rows.shape[1], count) if sampled is None else sampled
    places = sample_places(rows.shape[1], blocks, seed=seed, size=sampled)
    moments, sums = _summaries(rows, seed=seed)
    sample = torch.stack([row[place] for row, place in zip(rows, places, strict=True)])
    return CompactTensor(tuple(tensor.shape), seed, sample, moments, sums, blocks)


def sample_size(numel: int, blocks: int) -> int:
    """Return the number of elements in a block's sample."""
    return max(MIN_SAMPLE, min(MAX_SAMPLE, MAX_SAMPLES // blocks, numel // SAMPLED))


def sample_places(numel: int, blocks: Sequence[int], *, seed: int, size: int) -> list[torch.Tensor]:
    """Return the sorted places of each block's sample, (size,) int64."""
    places = []
    for block in blocks:
        # RandomState: NumPy promises that its stream never changes, unlike Generator's.
        state = np.random.RandomState([seed, block])
        drawn = np.sort(state.randint(0, numel, size=size, dtype=np.int64))
        places.append(torch.from_numpy(drawn))
    return places


def _summaries(rows: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return moments and signed sums of (blocks, n) elements, added up in float64."""
    count, numel = rows.shape
    powers = torch.zeros(count, 3, dtype=torch.float64)
    sums = torch.zeros(count, SUMS, dtype=torch.float64)
    lowest, highest = [], []
    for number, start in enumerate(range(0, numel, _COLUMNS)):
        wide = rows[:, start : start + _COLUMNS].to(torch.float64)
        powers += torch.stack([wide.sum(1), wide.square().sum(1), wide.abs().sum(1)], dim=-1)
        sums += wide @ _signs(wide.shape[1], seed=seed, part=number)
        lowest.append(wide.amin(1))
        highest.append(wide.amax(1))
    mean, square, abs_mean = (powers / numel).unbind(-1)
    low, high = torch.stack(lowest).amin(0), torch.stack(highest).amax(0)
    moments = torch.stack([mean, square.sqrt(), abs_mean, low, high], dim=-1)
    return moments, sums / numel**0.5


def _signs(length: int, *, seed: int, part: int) -> torch.Tensor:
    """Return (length, 16) float64 of +1 and -1, the same for every block."""
    drawn = np.random.RandomState([seed, part, SUMS]).bytes(length * SUMS // 8)
    bits = np.unpackbits(np.frombuffer(drawn, dtype=np.uint8)).reshape(length, SUMS)
    return torch.from_numpy(bits).to(torch.float64) * 2 - 1
