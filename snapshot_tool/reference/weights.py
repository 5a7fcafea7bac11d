"""Which weights of a checkpoint the reference computes with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from snapshot_tool.base.checkpoint_files import weight_files
from snapshot_tool.base.errors import CheckpointUnavailable
from snapshot_tool.base.text import printable

# Some files hold these, which models compute.
_BUFFERS = ("inv_freq", "masked_bias", "position_ids")
_PROBLEMS = {
    "missing_keys": "does not have",
    "mismatched_keys": "has with another shape than its configuration",
}


def require_filled(model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointUnavailable if the model would compute with weights that are not its own.

    That is with one that the files lack or have in another shape, and without one that they have
    for a module of the model, as a bias or a layer that the configuration does not have. Weights of
    other modules, as heads of other classes, take part in no answer.
    """
    for kind, problem in _PROBLEMS.items():
        if report.get(kind):
            raise _misfit(checkpoint, problem, [str(key) for key in report[kind]], kind)
    modules = dict(model.named_modules())
    kept_from = [key for key in report.get("unexpected_keys", ()) if _belongs(key, modules)]
    if kept_from:
        problem = "has for a part of the model that does not take it"
        raise _misfit(checkpoint, problem, kept_from, "unexpected_keys")


def _misfit(checkpoint: Path, problem: str, names: list[str], kind: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(
        f"{checkpoint} {problem}: {min(names)}, first of {len(names)} {kind.replace('_', ' ')}",
        "see that config.json and the weights are of the same model",
    )


def _belongs(weight: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Tell whether a weight is for a module of the model, or for a further one of its layers."""
    owner, _, own_name = weight.rpartition(".")
    if own_name in _BUFFERS or not owner:
        return False
    if owner in modules:
        return True
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return isinstance(modules[owner], torch.nn.ModuleList)


def unused_weights(
    model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path
) -> tuple[str, ...]:
    """Return the names of the weights in the files that take part in no answer, sorted.

    These are weights that the model does not have, and those that are tied to another weight of
    the files and differ from it, as an output head beside a tied embedding.
    """
    left = set(map(str, report.get("unexpected_keys", ())))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = dict(model.state_dict(keep_vars=True))
    names = set()
    for name, weight in _stored(checkpoint, _tied(own)):
        # transformers names weights as the model does, with or without the base model's prefix.
        is_left = bool(left & {name, f"{prefix}{name}", name.removeprefix(prefix)})
        if is_left or (weight is not None and not _is_same(weight, own[name])):
            names.add(name)
    return tuple(sorted(map(printable, names)))


def _tied(own: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of weights that share their memory with another one."""
    by_place: dict[int, list[str]] = {}
    for name, weight in own.items():
        if weight.device.type != "meta" and weight.numel():
            by_place.setdefault(weight.data_ptr(), []).append(name)
    return {name for names in by_place.values() if len(names) > 1 for name in names}


def _stored(checkpoint: Path, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the name of every weight in the files, with its values if they are wanted."""
    for file in weight_files(checkpoint):
        if file.endswith(".safetensors"):
            with safe_open(checkpoint / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_tensor(name) if name in wanted else None


def _is_same(stored: torch.Tensor, used: torch.Tensor) -> bool:
    return stored.shape == used.shape and torch.equal(stored.to(used.dtype), used.detach().cpu())
