"""Probes: seeded inputs of many sizes for single modules, which no recorded input has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from snapshot_tool.base.taps import Sketch

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
