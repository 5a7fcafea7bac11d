"""Looking into an FMS model: what its modules are given and return, under the reference's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from snapshot_tool.core.interfaces import Observer
from snapshot_tool.core.taps import Side
from snapshot_tool.families.family import Twin
from snapshot_tool.taps import first_tensor

if TYPE_CHECKING:
    import torch


def observe_twins(
    model: torch.nn.Module,
    twins: Sequence[Twin],
    observe: Observer,
    *,
    head_dim: int,
    stack: ExitStack,
) -> Mapping[str, str]:
    """Hook every module that has a twin, until `stack` closes; return FMS's name of each twin.

    head_dim: elements of one head of the text model, for undoing FMS's rotary order.
    """
    names: dict[str, str] = {}
    for name, module in model.named_modules():
        for twin in twins:
            match = re.fullmatch(twin.fms, name)
            if match is None:
                continue
            hf_name = match.expand(twin.hf)
            names[hf_name] = name
            before = module.register_forward_pre_hook(
                _show_input(hf_name, observe), with_kwargs=True
            )
            after = module.register_forward_hook(_show_output(hf_name, twin, observe, head_dim))
            stack.callback(before.remove)
            stack.callback(after.remove)
    return names


def _show_input(name: str, observe: Observer) -> Callable[..., None]:
    def show(_module: object, arguments: Any, keywords: Mapping[str, Any]) -> None:
        tensor = first_tensor((arguments, keywords))
        if tensor is not None:
            observe(name, Side.INPUT, tensor.detach())

    return show


def _show_output(name: str, twin: Twin, observe: Observer, head_dim: int) -> Callable[..., None]:
    def show(_module: object, _arguments: object, output: object) -> None:
        tensor = _part(output, twin)
        if tensor is not None:
            ordered = undo_rotary_order(tensor, head_dim) if twin.rotary else tensor
            observe(name, Side.OUTPUT, ordered.detach())

    return show


def _part(output: object, twin: Twin) -> torch.Tensor | None:
    if twin.part is None:
        return first_tensor(output)
    if isinstance(output, (tuple, list)):
        return first_tensor(output[twin.part])
    tensor = first_tensor(output)
    return None if tensor is None else tensor.chunk(twin.parts, dim=-1)[twin.part]


def undo_rotary_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (..., heads * head_dim) with both halves of each head apart, as Hugging Face has it.

    FMS permutes the query and key weights on loading (fms.models.llama._hf_to_fms_rope), so that
    the two elements that rotate together are neighbours.
    """
    shape = tensor.shape
    pairs = tensor.reshape(*shape[:-1], -1, head_dim // 2, 2)
    return pairs.transpose(-1, -2).reshape(shape)
