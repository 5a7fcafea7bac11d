"""Looking into an FMS model: what its modules are given and return, under the reference's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapshot_tool.base.compiled import run_eagerly
from snapshot_tool.base.protocol import Observer
from snapshot_tool.base.tap import Side
from snapshot_tool.candidates.fms.split import whole_modules
from snapshot_tool.families.family import Twin, twins_of
from snapshot_tool.taps.hooks import first_tensor, watch_modules

if TYPE_CHECKING:
    import torch


@contextmanager
def observe_twins(
    model: torch.nn.Module, twins: Sequence[Twin], observe: Observer, *, head_dim: int
) -> Iterator[Mapping[str, str]]:
    """Show every module that has a twin, under the twin's name; yield FMS's name of each twin.

    head_dim: elements of one head of the text model, for undoing FMS's rotary order.
    """
    named = whole_modules(model)
    found = {name: pairs for name in named if (pairs := twins_of(name, twins))}

    def watch(name: str, side: Side, value: object) -> None:
        for hf_name, twin in found[name]:
            tensor = (
                first_tensor(value)
                if side is Side.INPUT
                else twin_output(value, twin, head_dim=head_dim)
            )
            if tensor is not None:
                observe(hf_name, side, tensor)

    with run_eagerly(), watch_modules([(name, named[name]) for name in found], watch):
        yield {hf_name: name for name, pairs in found.items() for hf_name, _ in pairs}


def twin_output(output: object, twin: Twin, *, head_dim: int) -> torch.Tensor | None:
    """Return the part of an FMS module's output that is a Hugging Face module's, as it has it."""
    tensor = _part(output, twin)
    if tensor is None or not twin.rotary:
        return tensor
    return undo_rotary_order(tensor, head_dim)


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
