"""Changes of single weights in a loaded FMS model, named as if nothing were fused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch

from tests.mutants.mutant import Change

_Operation = Callable[[torch.Tensor], torch.Tensor]
_QKV = ("query", "key", "value")
_GATE = ("wg", "w1")


def weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight, or the part of a fused one that the name stands for, to be written to."""
    module_name, _, kind = name.rpartition(".")
    parent_name, _, part = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if part in _QKV and hasattr(parent, "qkv_fused"):
        fused = getattr(parent.qkv_fused, kind).detach()
        splits: list[int] = getattr(parent, "splits")  # noqa: B009 - torch types it as a module
        return torch.split(fused, splits)[_QKV.index(part)]
    if part in _GATE and hasattr(parent, "wg1_fused"):
        fused = getattr(parent.wg1_fused, kind).detach()
        return torch.chunk(fused, 2)[_GATE.index(part)]
    whole: torch.Tensor = getattr(model.get_submodule(module_name), kind).detach()
    return whole


def changed(name: str, words: str, operation: _Operation) -> Change:
    """Put in a weight's place what an operation makes of it."""

    def apply(model: torch.nn.Module) -> None:
        target = weight(model, name)
        target.copy_(operation(target.clone()))

    return Change(f"{name}: {words}", apply)


def scaled(name: str, factor: float) -> Change:
    """Multiply a weight by a factor."""
    return changed(name, f"times {factor}", partial(torch.mul, other=torch.tensor(factor)))


def rounded(name: str) -> Change:
    """Round a weight to bfloat16."""
    return changed(name, "rounded to bfloat16", _through_bfloat16)


def _through_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def all_rounded(pattern: str) -> Change:
    """Round every weight whose name matches to bfloat16."""

    def apply(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                parameter.detach().copy_(_through_bfloat16(parameter.detach()))

    return Change(f"{pattern or 'all weights'}: rounded to bfloat16", apply)


def swapped(name: str, other: str) -> Change:
    """Let two weights of one shape change places."""

    def apply(model: torch.nn.Module) -> None:
        one, two = weight(model, name), weight(model, other)
        before = one.clone()
        one.copy_(two)
        two.copy_(before)

    return Change(f"{name} and {other} change places", apply)
