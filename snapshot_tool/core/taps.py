"""What is seen of a module during a run: a sketch of its input and one of its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from snapshot_tool.core.sketch import MAX_DIMENSIONS, Sketch, sketch

if TYPE_CHECKING:
    import torch


class Side(StrEnum):
    """Whether a tensor is what a module was given or what it returned."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Tap:
    """One module of a run; a side that is no floating-point tensor has no sketch."""

    module: str
    input: Sketch | None
    output: Sketch | None


@dataclass(slots=True)
class Sketchbook:
    """An observer that keeps sketches.

    Args:
        seed: of the sketches.
        attention_mask: (1, length), by which text activations (1, length, width) are rid of
            padding: what implementations compute there is nobody's business.
    """

    seed: int
    attention_mask: torch.Tensor
    _sketches: dict[tuple[str, Side], Sketch] = field(default_factory=dict)
    _finished: dict[str, None] = field(default_factory=dict)

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> None:
        """Sketch the first tensor seen on this side of the module."""
        if side is Side.OUTPUT:
            self._finished.setdefault(module)
        if (module, side) in self._sketches or not tensor.is_floating_point():
            return
        if 1 <= tensor.dim() <= MAX_DIMENSIONS and tensor.numel():
            self._sketches[module, side] = sketch(self._without_padding(tensor), seed=self.seed)

    def taps(self) -> list[Tap]:
        """Return what was seen, in the order in which modules finished."""
        return [
            Tap(
                name,
                self._sketches.get((name, Side.INPUT)),
                self._sketches.get((name, Side.OUTPUT)),
            )
            for name in self._finished
            if (name, Side.OUTPUT) in self._sketches
        ]

    def by_module(self) -> Mapping[str, Tap]:
        """Return the same, by module."""
        return {tap.module: tap for tap in self.taps()}

    def _without_padding(self, tensor: torch.Tensor) -> torch.Tensor:
        mask = self.attention_mask
        if bool(mask.all()) or tensor.shape[:2] != mask.shape:
            return tensor
        return tensor[:, mask[0].bool().to(tensor.device)]
