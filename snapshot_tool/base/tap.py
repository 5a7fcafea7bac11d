"""Taps: a sketch of the input and one of the output of each module of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from snapshot_tool.base.sketch import MAX_DIMENSIONS, Sketch, sketch

if TYPE_CHECKING:
    import torch


def without_padding(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return text activations (1, length, ...) at the positions that are not padding.

    attention_mask: (1, length), zero at padding. Tensors of another shape are returned as they are.
    """
    if tensor.shape[:2] != attention_mask.shape or bool(attention_mask.all()):
        return tensor
    return tensor[:, attention_mask[0].bool().to(tensor.device)]


class Side(StrEnum):
    """Whether a tensor is an input of a module or an output."""

    INPUT = "input"
    OUTPUT = "output"


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
    import torch

    return tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return rows[0] if len(rows) == 1 else torch.cat(rows)
