"""Taps: a sketch of the input and one of the output of each module of a run; and probes.

A sketch is small enough to commit, and sensitive to order and sign. Norms and ranges do not change
with a permutation or a negation; a seeded sample and a seeded random projection do. The projection
is a tensor product of random signs, one vector for each dimension, and costs one small matrix
product (tensorised Johnson-Lindenstrauss).

Probes are seeded inputs of many sizes for single modules, which no recorded input has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from snapshot_tool.base.protocol import Side

SAMPLE_SIZE = 64
PROJECTION_SIZE = 16
MOMENTS = ("mean", "rms", "abs_mean", "min", "max")
MAX_DIMENSIONS = 4
_BLOCK = 2**20  # elements: float64 copies stay small however large the tensor is


@dataclass(frozen=True, slots=True)
class Sketch:
    """The compact form of a tensor.

    Args:
        shape: the tensor's shape.
        moments: (5,) float64, see MOMENTS.
        sample: (at most 64,) float32, elements at seeded places; all, in order, of a small tensor.
        projection: (16,) float64, random signed sums divided by the root of the element count.
    """

    shape: tuple[int, ...]
    moments: torch.Tensor
    sample: torch.Tensor
    projection: torch.Tensor


@functools.lru_cache(maxsize=64)
def sample_indices(numel: int, *, seed: int) -> torch.Tensor:
    """Return sorted flat indices, (at most 64,) int64, the same for the same seed."""
    if numel <= SAMPLE_SIZE:
        return torch.arange(numel)
    # RandomState: NumPy promises that its stream never changes, unlike Generator's.
    draws = np.random.RandomState(seed).randint(0, numel, size=SAMPLE_SIZE, dtype=np.int64)
    return torch.from_numpy(np.sort(draws))


@functools.lru_cache(maxsize=64)  # modules of a model have few shapes
def _signs(length: int, *, seed: int, dimension: int) -> torch.Tensor:
    """Return (length, 16) of +1 and -1, drawn for one dimension of a tensor."""
    state = np.random.RandomState((seed + 7919 * (dimension + 1)) % 2**32)
    signs = state.randint(0, 2, size=(length, PROJECTION_SIZE), dtype=np.int8)
    return torch.from_numpy(signs).to(torch.float64) * 2 - 1


def project(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Return 16 random signed sums of the tensor, divided by the root of its element count."""
    values = tensor.detach().to("cpu")
    shape = values.shape if values.dim() else torch.Size([1])
    rows = values.reshape(-1, shape[-1])
    last = _signs(shape[-1], seed=seed, dimension=len(shape) - 1)
    block = max(1, _BLOCK // max(1, shape[-1]))
    parts = [rows[i : i + block].to(torch.float64) @ last for i in range(0, len(rows), block)]
    sums = torch.cat(parts) if parts else torch.zeros(0, PROJECTION_SIZE, dtype=torch.float64)
    sums = sums.reshape(*shape[:-1], PROJECTION_SIZE)
    for dimension in reversed(range(len(shape) - 1)):
        signs = _signs(shape[dimension], seed=seed, dimension=dimension)
        sums = (sums * signs).sum(dim=dimension)
    scaled: torch.Tensor = sums / max(1, values.numel()) ** 0.5
    return scaled


def _moments(flat: torch.Tensor) -> torch.Tensor:
    """Return MOMENTS of (n,) elements, (5,) float64."""
    sums, lowest, highest = torch.zeros(3, dtype=torch.float64), [], []
    for start in range(0, flat.numel(), _BLOCK):
        wide = flat[start : start + _BLOCK].to(torch.float64)
        sums += torch.stack([wide.sum(), wide.square().sum(), wide.abs().sum()])
        lowest.append(wide.min())
        highest.append(wide.max())
    mean, square, abs_mean = sums / flat.numel()
    extremes = torch.stack(lowest).min(), torch.stack(highest).max()
    return torch.stack([mean, square.sqrt(), abs_mean, *extremes])


def sketch(tensor: torch.Tensor, *, seed: int) -> Sketch:
    """Return the sketch of a floating-point tensor of 1 to 4 dimensions."""
    values = tensor.detach().to("cpu")
    if not 1 <= values.dim() <= MAX_DIMENSIONS:
        raise ValueError(f"cannot sketch a tensor of shape {tuple(values.shape)}")
    flat = values.reshape(-1)
    sample = flat[sample_indices(flat.numel(), seed=seed)].to(torch.float32)
    return Sketch(tuple(values.shape), _moments(flat), sample, project(values, seed=seed))


def relative_error(golden: Sketch, other: Sketch) -> float:
    """Return the difference of two sketches, relative to the golden tensor's root mean square.

    It is the greater of the differences of sample and projection; infinite if the shapes differ or
    a value is not finite.
    """
    if golden.shape != other.shape:
        return float("inf")
    sample = (other.sample.double() - golden.sample.double()).square().mean().sqrt()
    projection = (other.projection - golden.projection).square().mean().sqrt()
    return _relative(torch.maximum(sample, projection), golden)


def moments_error(golden: Sketch, other: Sketch) -> float:
    """Return the greatest difference of two sketches' moments, in units of the golden's rms.

    Moments do not depend on the order of the values.
    """
    return _relative((other.moments - golden.moments).abs().max(), golden)


def _relative(difference: torch.Tensor, golden: Sketch) -> float:
    """Return a difference in units of the golden's rms; infinite if it is not finite."""
    gap, scale = float(difference), float(golden.moments[MOMENTS.index("rms")])
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale else (math.inf if gap else 0.0)


def without_padding(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return text activations (1, length, ...) at the positions that are not padding.

    attention_mask: (1, length), zero at padding. Tensors of another shape are returned as they are.
    """
    if tensor.shape[:2] != attention_mask.shape or bool(attention_mask.all()):
        return tensor
    return tensor[:, attention_mask[0].bool().to(tensor.device)]


@dataclass(frozen=True, slots=True)
class Tap:
    """One module of a run. A side that is not a tensor of numbers has no sketch."""

    module: str
    input: Sketch | None
    output: Sketch | None


_Key = tuple[str, Side]  # of a module


@dataclass(slots=True)
class TapRecorder:
    """An observer that keeps the sketch of the first tensor on each side of a module.

    Args:
        seed: of the sketches.
        attention_mask: (1, length). Positions of padding are removed from text activations (1,
            length, width), since implementations may compute anything there.
        shapes: of the tensors to compare with, if they are known. A batch that comes in several
            calls is put together. One row that stands for a whole batch, such as position
            embeddings, is sketched as that batch.
    """

    seed: int
    attention_mask: torch.Tensor
    shapes: Mapping[_Key, tuple[int, ...]] = field(default_factory=dict)
    _sketches: dict[_Key, Sketch] = field(default_factory=dict)
    _finished: dict[str, None] = field(default_factory=dict)
    _entered: dict[str, None] = field(default_factory=dict)
    _rows: dict[_Key, list[torch.Tensor]] = field(default_factory=dict)

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> None:
        """Sketch a tensor, or keep it until its batch is whole."""
        seen = self._finished if side is Side.OUTPUT else self._entered
        seen.setdefault(module)
        key = module, side
        if key in self._sketches or not _has_numbers(tensor):
            return
        if not 1 <= tensor.dim() <= MAX_DIMENSIONS or not tensor.numel():
            return
        tensor = without_padding(tensor, self.attention_mask)
        shape = self.shapes.get(key)
        if shape and len(tensor) < shape[0] and tensor.shape[1:] == shape[1:]:
            rows = self._rows.setdefault(key, [])
            rows.append(tensor.clone())
            if sum(map(len, rows)) < shape[0]:
                return
            tensor = _joined(self._rows.pop(key))
        self._sketches[key] = sketch(tensor, seed=self.seed)

    def unfinished(self) -> list[str]:
        """Return the modules that were entered and not left, in that order."""
        return [name for name in self._entered if name not in self._finished]

    def taps(self) -> list[Tap]:
        """Return the taps of all modules, in the order in which they finished."""
        for key, rows in self._rows.items():
            batch = _joined(rows)
            if bool((batch == batch[:1]).all()):  # one row that stands for the whole batch
                batch = batch[:1].expand(self.shapes[key])
            self._sketches[key] = sketch(batch, seed=self.seed)
        self._rows.clear()
        return [
            Tap(name, self._sketches.get((name, Side.INPUT)), self._sketches[name, Side.OUTPUT])
            for name in self._finished
            if (name, Side.OUTPUT) in self._sketches
        ]

    def by_module(self) -> Mapping[str, Tap]:
        """Return the taps by module."""
        return {tap.module: tap for tap in self.taps()}


def shapes_of(taps: Sequence[Tap]) -> Mapping[_Key, tuple[int, ...]]:
    """Return the shape of every sketch."""
    sides = ((tap.module, side, getattr(tap, side.value)) for tap in taps for side in Side)
    return {(module, side): found.shape for module, side, found in sides if found}


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has numbers: token and position ids count, masks do not."""
    return tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


# Small inputs show epsilons and biases, large ones the tails of activations.
SIZES = (1e-4, 1e-2, 1.0, 10.0, 1e3)
_IDS = 0.0  # the size of an input of ids, for a table
_MOST_IDS = 2**14
_ROWS = 4
_WIDTH = 256  # of the input of a module without weights


@dataclass(frozen=True, slots=True)
class Probe:
    """An input for one module, and what the reference's returned.

    Args:
        module: the reference's name.
        shape: of the input.
        size: standard deviation of the input; 0: the ids of the first rows of a table, (1, rows).
        answer: sketch of the output.
        noise: how far the reference's own output in a dtype is off the exact one, relative.
    """

    module: str
    shape: tuple[int, ...]
    size: float
    answer: Sketch
    noise: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the input in words."""
        return f"output for inputs of size {self.size:g}" if self.size else "rows"


def probe_input(shape: tuple[int, ...], size: float, *, seed: int) -> torch.Tensor:
    """Return the input of a probe, float32 of a standard deviation; int64 ids for size 0."""
    if size == _IDS:
        return torch.arange(shape[-1]).expand(shape)
    # RandomState: NumPy promises that its stream never changes.
    values = np.random.RandomState(seed).standard_normal(shape) * size
    return torch.from_numpy(values.astype(np.float32))


def probe_shapes(module: torch.nn.Module) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield shape and size of each input for a module; none for one of an unknown kind.

    Known are tables, linear layers, convolutions, norms and activations.
    """
    if isinstance(module, torch.nn.Embedding):
        yield (1, min(module.num_embeddings, _MOST_IDS)), _IDS
        return
    weight = getattr(module, "weight", None)
    state = [*module.parameters(), *module.buffers()]
    if isinstance(module, torch.nn.Linear):
        shape: tuple[int, ...] = (1, _ROWS, module.in_features)
    elif isinstance(module, torch.nn.Conv2d):
        shape = (_ROWS, module.in_channels, *module.kernel_size)
    elif isinstance(weight, torch.Tensor) and weight.dim() == 1:
        shape = (1, _ROWS, len(weight))
    elif not state and not isinstance(module, torch.nn.Dropout | torch.nn.Identity):
        shape = (1, _ROWS, _WIDTH)
    else:
        return
    yield from ((shape, size) for size in SIZES)
