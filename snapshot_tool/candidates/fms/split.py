"""What FMS's tensor parallelism splits of a model: some modules, and of those the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapshot_tool.base.compiled import plain_modules
from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.candidates.ranks import joined_ranks

if TYPE_CHECKING:
    import torch


def require_split(model: torch.nn.Module, *, architecture: str) -> None:
    """Raise CandidateUnavailable where several ranks would each hold the whole model."""
    if joined_ranks() and not _split_modules(model):
        raise CandidateUnavailable(
            f"FMS does not split {architecture}: every rank would hold the whole model",
            "check it in one process, without torchrun",
        )


def whole_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules whose output is whole, by name.

    Inside a tensor-parallel module every rank has a shard of it; the module itself joins them.
    """
    inside = tuple(f"{name}." for name in _split_modules(model))
    modules = plain_modules(model)
    return {name: module for name, module in modules.items() if not name.startswith(inside)}


def _split_modules(model: torch.nn.Module) -> list[str]:
    from fms.modules.tp import TPModule

    modules = plain_modules(model)
    return [name for name, module in modules.items() if isinstance(module, TPModule)]


def takes_weight(own: Sequence[int], whole: Sequence[int]) -> bool:
    """Tell by their shapes whether a parameter takes a weight, or this rank's shard of one."""
    ranks = joined_ranks()
    if ranks is None or len(own) != len(whole):
        return list(own) == list(whole)
    split = [(part, length) for part, length in zip(own, whole, strict=True) if part != length]
    # FMS cuts one dimension; heads fewer than ranks are on several of them.
    return len(split) <= 1 and all(part < length <= part * ranks.size for part, length in split)
