"""What is seen of a module during a run: a sketch of its input and one of its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from snapshot_tool.base.sketch import MAX_DIMENSIONS, Sketch, sketch

if TYPE_CHECKING:
    import torch


def without_padding(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return text activations (1, length, ...) at the positions that are no padding.

    attention_mask: (1, length), zero at padding. Tensors of another shape come back as they are.
    """
    if tensor.shape[:2] != attention_mask.shape or bool(attention_mask.all()):
        return tensor
    return tensor[:, attention_mask[0].bool().to(tensor.device)]


class Side(StrEnum):
    """Whether a tensor is what a module was given or what it returned."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class Tap:
    """One module of a run; a side that is no tensor of numbers has no sketch."""

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
        shapes: of the tensors to compare with, where they are known. A batch that comes in several
            calls is put together; one row that stands for a whole batch, such as position
            embeddings, is sketched as that batch.
    """

    seed: int
    attention_mask: torch.Tensor
    shapes: Mapping[tuple[str, Side], tuple[int, ...]] = field(default_factory=dict)
    _sketches: dict[tuple[str, Side], Sketch] = field(default_factory=dict)
    _finished: dict[str, None] = field(default_factory=dict)
    _entered: dict[str, None] = field(default_factory=dict)
    _rows: dict[tuple[str, Side], list[torch.Tensor]] = field(default_factory=dict)

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> None:
        """Sketch the first tensor seen on this side of the module."""
        if side is Side.OUTPUT:
            self._finished.setdefault(module)
        else:
            self._entered.setdefault(module)
        if (module, side) in self._sketches or not _has_numbers(tensor):
            return
        if 1 <= tensor.dim() <= MAX_DIMENSIONS and tensor.numel():
            self._take((module, side), without_padding(tensor, self.attention_mask))

    def unfinished(self) -> list[str]:
        """Return the modules that were entered and never left, in that order."""
        return [name for name in self._entered if name not in self._finished]

    def taps(self) -> list[Tap]:
        """Return what was seen, in the order in which modules finished."""
        for key, rows in self._rows.items():
            self._sketches[key] = sketch(_as_batch(rows, self.shapes[key]), seed=self.seed)
        self._rows.clear()
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

    def _take(self, key: tuple[str, Side], tensor: torch.Tensor) -> None:
        """Sketch a tensor, or keep it until its batch is whole."""
        shape = self.shapes.get(key)
        if shape and len(tensor) < shape[0] and tensor.shape[1:] == shape[1:]:
            rows = self._rows.setdefault(key, [])
            rows.append(tensor.clone())
            if sum(map(len, rows)) < shape[0]:
                return
            tensor = _joined(self._rows.pop(key))
        self._sketches[key] = sketch(tensor, seed=self.seed)


def shapes_of(taps: Sequence[Tap]) -> Mapping[tuple[str, Side], tuple[int, ...]]:
    """Return the shape of every sketch."""
    sides = ((tap.module, side, getattr(tap, side.value)) for tap in taps for side in Side)
    return {(module, side): found.shape for module, side, found in sides if found}


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers: token and position ids count, masks do not."""
    import torch

    return tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)


def _as_batch(rows: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Return rows that are all the same as the batch that they stand for, others as they are."""
    batch = _joined(rows)
    same = bool((batch == batch[:1]).all())
    return batch[:1].expand(shape) if same else batch


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return rows[0] if len(rows) == 1 else torch.cat(rows)
