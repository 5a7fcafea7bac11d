"""Whether a checkpoint fills an FMS model: FMS itself is silent about missing and unused weights.

The adapter that FMS would load the weights through runs here on tensors without data (torch's meta
device), so that this costs neither time nor memory however large the checkpoint is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from snapshot_tool.candidates.fms_split import takes_weight
from snapshot_tool.core.errors import CandidateUnavailable, CheckpointUnavailable

_SHOWN = 3


def require_full_coverage(
    model: torch.nn.Module, checkpoint: Path, *, architecture: str, not_weights: tuple[str, ...]
) -> None:
    """Raise CandidateUnavailable unless model and checkpoint have the same weights.

    A head that shares its memory with the embedding needs no weight of its own.
    """
    from fms.utils import serialization

    weights = {
        name: tensor
        for name, tensor in _empty_weights(checkpoint).items()
        if not any(re.search(pattern, name) for pattern in not_weights)
    }
    adapted = dict(
        serialization.get_adapted(
            architecture, "hf", weights, {"model_config": getattr(model, "config", None)}
        )
    )
    own = dict(model.state_dict(keep_vars=True))
    missing = own.keys() - adapted.keys() - _tied(own, adapted)
    unused = adapted.keys() - own.keys()
    wrong = {
        n for n in own.keys() & adapted.keys() if not takes_weight(own[n].shape, adapted[n].shape)
    }
    problems = [
        f"leaves {len(names)} weights of FMS's model {what}: {_listed(names)}"
        for names, what in ((missing, "unset"), (wrong, "with another shape"))
        if names
    ]
    if unused:
        problems.append(f"has {len(unused)} weights that nothing takes: {_listed(unused)}")
    if problems:
        raise CandidateUnavailable(
            f"{checkpoint} {'; it '.join(problems)}",
            "compare the checkpoint's names with FMS's adapter for it",
        )


def _tied(own: Mapping[str, torch.Tensor], adapted: Mapping[str, Any]) -> set[str]:
    """Return the names whose memory another, loaded, weight fills."""
    filled = {own[name].data_ptr() for name in own.keys() & adapted.keys()}
    return {name for name in own.keys() - adapted.keys() if own[name].data_ptr() in filled}


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (" …" if len(names) > _SHOWN else "")


def _empty_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every weight of a checkpoint as a tensor of its shape without data."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise CheckpointUnavailable(f"{checkpoint} has no safetensors weights")
    weights = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    shape = file.get_slice(name).get_shape()
                    weights[name] = torch.empty(shape, device="meta")
        except (SafetensorError, OSError) as error:
            raise CheckpointUnavailable(f"{path} cannot be read: {error}") from error
    return weights
