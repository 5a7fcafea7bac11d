"""How FMS's tensor parallelism splits weights and outputs over the ranks of torchrun.

Shards follow from shapes, names and numbers of heads, not from FMS's own loading (fms.modules.tp
and fms.modules.linear, 1.13.1), so that a fault there shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from snapshot_tool.base.protocol import Side
from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.taps.hooks import plain_modules

# In a split module: projections that take the whole input, and those whose outputs are summed over
# the ranks. All other inputs and outputs are split along the last dimension.
_TAKE_WHOLE = ("in_proj", "query", "key", "value", "wg1_fused", "wg", "w1")
_SUMMED = ("dense", "w2")
# Weights that FMS joins from two of one size.
_DOUBLE = ("wg1_fused", "w13")


def split_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the tensor-parallel modules by name; inside of them every rank has a shard."""
    from fms.modules.tp import TPModule

    modules = plain_modules(model)
    return {name: module for name, module in modules.items() if isinstance(module, TPModule)}


class Shards:
    """This rank's parts of a model's weights and outputs; everything if there is one process."""

    def __init__(self, model: torch.nn.Module) -> None:
        ranks = joined_ranks()
        self._rank, self._size = (ranks.rank, ranks.size) if ranks else (0, 1)
        self._split = split_modules(model) if ranks else {}

    def of(self, name: str, whole: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """Return this rank's part of a weight: whole, if `own` cannot be a shard of it.

        Norms are whole on every rank. A bias that is added to a sum over the ranks is whole on
        rank 0, and zero on the others.

        name: FMS's name. whole: the checkpoint's weight. own: the model's.
        """
        split = self._module_around(name)
        if split is None or own is None or own.dim() != whole.dim():
            return whole
        module, kind = name.split(".")[-2:]
        if own.shape == whole.shape:
            is_added_once = kind == "bias" and module in _SUMMED
            return torch.zeros_like(whole) if is_added_once and self._rank else whole
        dims = [dim for dim in range(whole.dim()) if own.shape[dim] < whole.shape[dim]]
        if len(dims) != 1:
            return whole
        count = whole.shape[dims[0]] // own.shape[dims[0]]
        parts = [count, count] if {module, kind} & {*_DOUBLE} else [count]
        if module == "qkv_fused":
            parts = [split.pre_tp_nheads, split.pre_tp_kvheads, split.pre_tp_kvheads]
        return self._cut(whole, dims[0], parts)

    def _cut(self, whole: torch.Tensor, dim: int, parts: Sequence[int]) -> torch.Tensor:
        """Return this rank's shard of each part of a fused weight, joined.

        With fewer heads than ranks, neighbouring ranks have the same one.

        parts: into how many shards, at most, each part is cut; their sizes are in this proportion.
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

    def share(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a module's input; `name` is FMS's."""
        if self._module_around(name) is None or name.rpartition(".")[2] in _TAKE_WHOLE:
            return whole
        return self._cut(whole, -1, [self._size])

    def gather(self, name: str, side: Side, own: torch.Tensor, part: int | None) -> torch.Tensor:
        """Return a module's whole input or output; every rank calls this, in the same order.

        name: FMS's name. own: this rank's tensor. part: see `ModulePair`.
        """
        split, module = self._module_around(name), name.rpartition(".")[2]
        if split is None or (side is Side.INPUT and module in _TAKE_WHOLE):
            return own
        own = own.contiguous()
        if side is Side.OUTPUT and module in _SUMMED:
            own = own.clone()
            dist.all_reduce(own)
            return own
        shards = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(shards, own)
        if module in ("key", "value") or (module == "in_proj" and part):
            shards = shards[:: self._size * split.kvheads // split.pre_tp_kvheads]
        return torch.cat(shards, dim=-1)

    def _module_around(self, name: str) -> Any:
        """Return the split module that a module or weight is inside of, or None."""
        around = (module for split, module in self._split.items() if name.startswith(f"{split}."))
        return next(around, None)
