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

Of `<tensor>` a compact golden set keeps `<tensor>.shape`, `.sample`, `.moments` and `.sums`. The
vision features are not kept, so the connector gets others of the same shape: each patch is one of
64 that the reference's encoder made of this case, at a seeded place. Kept are these, `input.rows`,
and `input.shape`; the reference's connector had the same input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.taps.sketches import MOMENTS

LARGE = 2**12  # elements; smaller tensors are kept whole
MAX_SAMPLE, MIN_SAMPLE, SAMPLED = 2048, 64, 8  # elements of a block: one in eight, within limits
MAX_SAMPLES = 2**15  # elements of all blocks, if there are many
SUMS = 16  # signed sums of a block
_DEVIATIONS = 8.0
_ROUNDING = 1e-9  # of float64 sums on another machine, in units of the rms
_COLUMNS = 2**14  # of all blocks at once, so that float64 copies stay small
PARTS = ("shape", "sample", "moments", "sums")
_MAX_SIDE = 2**20
QUESTION = "input"
QUESTION_ROWS = 64
_MAX_QUESTION = 2**28  # elements, since a file of a few bytes may name any shape

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class CompactTensor:
    """The stored form of a tensor, block by block.

    Args:
        shape: the tensor's shape.
        seed: the seed of places and signs.
        sample: (blocks, at most 2048), elements at seeded places of each block, in its dtype.
        moments: (blocks, 5) float64, see MOMENTS.
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
    moments, sums = _summaries(rows, seed=seed)
    sample = []
    for row, block in zip(rows, blocks, strict=True):
        # RandomState: NumPy promises that its stream never changes, unlike Generator's.
        state = np.random.RandomState([seed, block])
        places = np.sort(state.randint(0, len(row), size=sampled, dtype=np.int64))
        sample.append(row[torch.from_numpy(places)])
    return CompactTensor(tuple(tensor.shape), seed, torch.stack(sample), moments, sums, blocks)


def sample_size(numel: int, blocks: int) -> int:
    """Return the number of elements in a block's sample."""
    return max(MIN_SAMPLE, min(MAX_SAMPLE, MAX_SAMPLES // blocks, numel // SAMPLED))


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


def is_large(tensor: torch.Tensor) -> bool:
    """Return whether a compact golden set keeps a tensor in its compact form."""
    return (
        tensor.is_floating_point()
        and tensor.numel() > LARGE
        and tensor.dim() > 1
        and bool(tensor.isfinite().all())
    )


def compacted(tensors: Mapping[str, torch.Tensor], *, seed: int) -> Tensors:
    """Return what is kept of some tensors: large ones compact, the others as they are.

    Many integers, such as every patch's position, are kept in 16 bits if they fit.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_large(tensor):
            kept = compact(tensor, seed=seed)
            parts = (torch.tensor(kept.shape), kept.sample, kept.moments, kept.sums)
            found |= {f"{name}.{part}": value for part, value in zip(PARTS, parts, strict=True)}
            continue
        are_many = tensor.dtype is torch.int64 and tensor.numel() > LARGE
        narrow = tensor.to(torch.int16) if are_many else tensor
        found[name] = narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return found


def read_compact(parts: Mapping[str, torch.Tensor], *, seed: int) -> CompactTensor:
    """Return what `compacted` laid out, by the names of the parts; ValueError if they do not fit.

    seed: that of the golden set.
    """
    shape = tuple(parts["shape"].tolist())
    sample, moments, sums = (parts[name] for name in PARTS[1:])
    kept = CompactTensor(shape, seed, sample, moments, sums, tuple(range(len(sample))))
    if not all(0 < side < _MAX_SIDE for side in shape) or not kept.is_consistent:
        raise ValueError("its parts do not fit each other")
    return kept


def question_tensors(features: torch.Tensor, *, seed: int) -> Tensors:
    """Return what is kept of the connector's input for large features (…, width)."""
    rows = features.reshape(-1, features.shape[-1])
    places = _draw(len(rows), QUESTION_ROWS, seed=seed)
    shape = torch.tensor(features.shape)
    return {f"{QUESTION}.rows": rows[places], f"{QUESTION}.shape": shape}


def make_question(kept: Mapping[str, torch.Tensor], *, seed: int) -> torch.Tensor:
    """Return the features that `question_tensors` describes; ValueError if they do not fit."""
    rows, shape = kept[f"{QUESTION}.rows"], tuple(kept[f"{QUESTION}.shape"].tolist())
    bounded = all(0 < side <= _MAX_QUESTION for side in shape)
    bounded = bounded and len(shape) > 1 and math.prod(shape) <= _MAX_QUESTION
    if not bounded or rows.shape[1:] != shape[-1:] or not len(rows):
        raise ValueError(f"no features of {shape} can be made of {tuple(rows.shape)}")
    return rows[_draw(len(rows), math.prod(shape[:-1]), seed=seed)].reshape(shape)


def _draw(below: int, count: int, *, seed: int) -> torch.Tensor:
    """Return (count,) int64 numbers, the same for the same seed."""
    drawn = np.random.RandomState([seed, below, count]).randint(0, below, size=count)
    return torch.from_numpy(drawn.astype(np.int64))
