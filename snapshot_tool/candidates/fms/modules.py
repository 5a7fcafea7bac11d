"""Observe FMS's modules under Hugging Face's names, and replace their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Observer, Side
from snapshot_tool.candidates.fms.weights import whole_modules
from snapshot_tool.families.family import ModulePair, pairs_of
from snapshot_tool.taps.hooks import (
    first_tensor,
    plain_modules,
    replace_first_tensor,
    run_eagerly,
    watch_modules,
)


@contextmanager
def observe_twins(
    model: torch.nn.Module, twins: Sequence[ModulePair], observe: Observer, *, head_dim: int
) -> Iterator[Mapping[str, str]]:
    """Observe every module that has a twin, under the twin's name; yield FMS's name of each twin.

    head_dim: elements of one head of the text model, for undoing FMS's rotary order.
    """
    named = whole_modules(model)
    found = {name: pairs for name in named if (pairs := pairs_of(name, twins))}

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


def twin_output(output: object, twin: ModulePair, *, head_dim: int) -> torch.Tensor | None:
    """Return the part of an FMS module's output that is a Hugging Face module's, as it has it."""
    tensor = first_tensor(output)
    if twin.part is not None:
        if isinstance(output, (tuple, list)):
            tensor = first_tensor(output[twin.part])
        elif tensor is not None:
            tensor = tensor.chunk(twin.parts, dim=-1)[twin.part]
    if tensor is None or not twin.rotary:
        return tensor
    return undo_rotary_order(tensor, head_dim)


def undo_rotary_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (..., heads * head_dim) with both halves of each head apart, as Hugging Face has it.

    FMS permutes the query and key weights on loading (fms.models.llama._hf_to_fms_rope), so that
    the two elements that rotate together are neighbours.
    """
    shape = tensor.shape
    pairs = tensor.reshape(*shape[:-1], -1, head_dim // 2, 2)
    return pairs.transpose(-1, -2).reshape(shape)


@contextmanager
def graft_twin(
    model: torch.nn.Module,
    twins: Sequence[ModulePair],
    module: str,
    output: torch.Tensor,
    *,
    head_dim: int,
) -> Iterator[str]:
    """Let FMS's twin of a Hugging Face module return `output`; yield FMS's name of it.

    Only the output of the first call of each run is replaced: only that was recorded.
    Raises CandidateUnavailable if FMS has no such module, or lays its output out differently.
    """
    name, twin = _find_twin(model, twins, module)
    depth, done = 0, False

    def count(_name: str, side: Side, _value: object) -> None:
        nonlocal depth, done
        depth += 1 if side is Side.INPUT else -1
        done = done and depth > 0

    def replace(_module: object, _arguments: object, answer: Any) -> Any:
        nonlocal done
        if done:
            return answer
        done = True
        own = twin_output(answer, twin, head_dim=head_dim)
        if own is None or own.shape != output.shape:
            shape = None if own is None else tuple(own.shape)
            raise CandidateUnavailable(
                f"cannot graft {module}: it is {tuple(output.shape)}, FMS's {name} returns {shape}",
                "graft the module that holds it",
            )
        return _with_part(answer, twin, output.to(own.device, own.dtype), head_dim=head_dim)

    modules = plain_modules(model)
    handle = modules[name].register_forward_hook(replace)
    try:
        with run_eagerly(), watch_modules(modules.items(), count):
            yield name
    finally:
        handle.remove()


def _find_twin(
    model: torch.nn.Module, twins: Sequence[ModulePair], module: str
) -> tuple[str, ModulePair]:
    for name in plain_modules(model):
        for hf_name, twin in pairs_of(name, twins):
            if hf_name == module:
                return name, twin
    raise CandidateUnavailable(
        f"FMS's model has no module that is {module}", "see snap check --localise for the names"
    )


def _with_part(answer: Any, twin: ModulePair, output: torch.Tensor, *, head_dim: int) -> Any:
    """Return what FMS's module returned with one Hugging Face module's part replaced."""
    part = redo_rotary_order(output, head_dim) if twin.rotary else output
    if twin.part is None:
        return replace_first_tensor(answer, part)
    if isinstance(answer, (tuple, list)):
        pieces = list(answer)
        pieces[twin.part] = replace_first_tensor(pieces[twin.part], part)
        return type(answer)(pieces)
    pieces = list(answer.chunk(twin.parts, dim=-1))
    pieces[twin.part] = part
    return torch.cat(pieces, dim=-1)


def redo_rotary_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (..., heads * head_dim) in FMS's order: the inverse of `undo_rotary_order`."""
    shape = tensor.shape
    halves = tensor.reshape(*shape[:-1], -1, 2, head_dim // 2)
    return halves.transpose(-1, -2).reshape(shape)
