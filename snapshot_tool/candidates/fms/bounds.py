"""Whether a configuration can be a checkpoint's, before FMS takes the memory that it asks for.

A golden set, which may be a stranger's, says how large a model FMS is to build. Bounded here is
what that costs: the time of building many layers, and memory beyond that of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.families.config_fields import whole_numbers

# FMS's model may hold each number of a checkpoint twice (tied heads, packed weights), and tables.
_MOST_TIMES = 4
_TABLES = 2**24  # numbers
# Parts of names of fields that FMS computes tables for, and what they may be unless the
# checkpoint's own config.json says more.
_PLACES = {"position": 2**20, "image_size": 2**13}


def require_few_layers(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], checkpoint: Path
) -> None:
    """Raise CandidateUnavailable where a configuration has more layers than there are weights.

    The same for more positions, or larger images, than any checkpoint has by default.
    """
    own = dict(whole_numbers(_read_config(checkpoint)))
    for name, value in whole_numbers(config):
        field = name.rpartition(".")[2]
        most = value
        # Qwen3's max_window_layers is a bound: it may be beyond the layers that there are.
        if ("layers" in field and not field.startswith("max_")) or field == "n_layer":
            most = len(weights)
        elif any(part in field for part in _PLACES):
            usual = next(most for part, most in _PLACES.items() if part in field)
            most = max(usual, own.get(name, 0))
        if value > most:
            raise _misfit(f"{name} is {value}, {most} at most can be meant", checkpoint)


def require_no_more_numbers(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: Path
) -> None:
    """Raise CandidateUnavailable where a model, on the meta device, is larger than its weights."""
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    there = sum(tensor.numel() for tensor in weights.values())
    if needed > _MOST_TIMES * there + _TABLES:
        raise _misfit(f"its model has {needed} numbers, the weights {there}", checkpoint)


def _misfit(why: str, checkpoint: Path) -> CandidateUnavailable:
    return CandidateUnavailable(
        f"the recorded configuration is not that of {checkpoint}: {why}",
        "record the checkpoint again, or get the golden set from where it was recorded",
    )


def _read_config(checkpoint: Path) -> Any:
    """Return what config.json holds; where it cannot be read, nothing."""
    try:
        return json.loads((checkpoint / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
