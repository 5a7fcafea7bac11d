"""How FMS's tensor parallelism splits weights over the ranks of torchrun.

Shards follow from shapes and numbers of heads, not from FMS's own loading (fms.modules.tp and
fms.modules.linear, 1.13.1), so that a fault there shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.taps.hooks import plain_modules

# Weights that FMS joins from several of one size.
_PAIRS = ("wg1_fused", "w13")


def split_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of the tensor-parallel modules, inside of which every rank has a shard."""
    from fms.modules.tp import TPModule

    modules = plain_modules(model)
    return [name for name, module in modules.items() if isinstance(module, TPModule)]


class Shards:
    """The parts that this rank has of a model's weights; all of them if there is one process."""

    def __init__(self, model: torch.nn.Module) -> None:
        ranks = joined_ranks()
        self._rank, self._size = (ranks.rank, ranks.size) if ranks else (0, 1)
        self._modules = plain_modules(model)

    def of(
        self, name: str, weights: Mapping[str, torch.Tensor], own: torch.Tensor | None
    ) -> torch.Tensor:
        """Return this rank's part of a weight: whole, if `own` cannot be a shard of it.

        Norms are whole on every rank. A bias that is added to a sum over the ranks is whole on
        rank 0, and zero on the others.

        name: FMS's name. weights: those of its layer, whole. own: the model's.
        """
        whole = weights[name]
        if self._size == 1 or own is None:
            return whole
        module, _, kind = name.rpartition(".")
        if own.shape == whole.shape:
            is_added_once = kind == "bias" and self._has_split_input(module, weights)
            return torch.zeros_like(whole) if is_added_once and self._rank else whole
        split = [dim for dim in range(whole.dim()) if own.shape[dim] < whole.shape[dim]]
        if own.dim() != whole.dim() or len(split) != 1:
            return whole
        (dim,) = split
        return self._cut(whole, dim, self._parts(name, whole.shape[dim] // own.shape[dim]))

    def _has_split_input(self, module: str, weights: Mapping[str, torch.Tensor]) -> bool:
        weight = weights.get(f"{module}.weight")
        taken = getattr(self._modules.get(module), "in_features", None)
        return weight is not None and taken is not None and taken < weight.shape[-1]

    def _parts(self, name: str, count: int) -> list[int]:
        """Return into how many shards, at most, each of the fused weights is cut.

        Their sizes are in this proportion.
        """
        attention, is_fused, _ = name.partition(".in_proj.qkv_fused.")
        if is_fused:
            module: Any = self._modules[attention]
            return [module.pre_tp_nheads, module.pre_tp_kvheads, module.pre_tp_kvheads]
        return [count, count] if any(pair in name for pair in _PAIRS) else [count]

    def _cut(self, whole: torch.Tensor, dim: int, parts: list[int]) -> torch.Tensor:
        """Return this rank's shard of each part, joined.

        With fewer heads than ranks, neighbouring ranks have the same one.
        """
        unit = whole.shape[dim] // sum(parts)
        shards, start = [], 0
        for part in parts:
            count = min(part, self._size)
            length = part * unit // count
            index = self._rank * count // self._size
            shards.append(whole.narrow(dim, start + index * length, length))
            start += part * unit
        return torch.cat(shards, dim)
