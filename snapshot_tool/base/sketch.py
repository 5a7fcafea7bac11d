"""A tensor's sketch: small enough to commit, and sensitive to order and sign.

Norms and ranges do not change with a permutation or a negation. A seeded sample and a seeded random
projection do. The projection is a tensor product of random signs, one vector for each dimension. It
costs one small matrix product (tensorised Johnson-Lindenstrauss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def sample_indices(numel: int, *, seed: int, size: int = SAMPLE_SIZE) -> torch.Tensor:
    """Return `size` sorted flat indices, (at most numel,) int64, the same for the same seed."""
    import torch

    if numel <= size:
        return torch.arange(numel)
    import numpy as np

    # RandomState: NumPy promises that its stream never changes, unlike Generator's.
    draws = np.random.RandomState(seed).randint(0, numel, size=size, dtype=np.int64)
    return torch.from_numpy(np.sort(draws))


def _signs(length: int, *, seed: int, dimension: int) -> torch.Tensor:
    """Return (length, 16) of +1 and -1, drawn for one dimension of a tensor."""
    import numpy as np
    import torch

    state = np.random.RandomState((seed + 7919 * (dimension + 1)) % 2**32)
    signs = state.randint(0, 2, size=(length, PROJECTION_SIZE), dtype=np.int8)
    return torch.from_numpy(signs).to(torch.float64) * 2 - 1


def project(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Return 16 random signed sums of the tensor, divided by the root of its element count."""
    import torch

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
    import torch

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
    import torch

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
    scale = float(golden.moments[MOMENTS.index("rms")])
    differences = [
        float((other.sample.double() - golden.sample.double()).square().mean().sqrt()),
        float((other.projection - golden.projection).square().mean().sqrt()),
    ]
    if not all(map(math.isfinite, differences)):
        return float("inf")
    greatest = max(differences)
    return greatest / scale if scale else (float("inf") if greatest else 0.0)


def moments_error(golden: Sketch, other: Sketch) -> float:
    """Return the greatest difference of two sketches' moments, in units of the golden's rms.

    Moments do not depend on the order of the values.
    """
    scale = float(golden.moments[MOMENTS.index("rms")])
    gap = float((other.moments - golden.moments).abs().max())
    if not math.isfinite(gap):
        return float("inf")
    return gap / scale if scale else (float("inf") if gap else 0.0)
