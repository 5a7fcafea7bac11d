"""Hooks that read what modules are given and return, without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from snapshot_tool.core.interfaces import Observer
from snapshot_tool.core.taps import Side
from snapshot_tool.families.family import Capture

if TYPE_CHECKING:
    import torch


def first_tensor(value: object) -> torch.Tensor | None:
    """Return the first tensor of a module's output: itself, or the first in a tuple or mapping."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


@contextmanager
def tap_modules(model: torch.nn.Module, observe: Observer) -> Iterator[None]:
    """Show `observe` every module's first input and output but the model's own.

    Only the first call of each module counts. Tensors are shown, not copied: a later module may
    change them in place, so what is to be kept must be taken at once.
    """
    entered: set[str] = set()
    left: set[str] = set()

    def before(name: str) -> Callable[..., None]:
        def show(_module: object, arguments: Any, keywords: Mapping[str, Any]) -> None:
            tensor = first_tensor((arguments, keywords))
            if tensor is not None and name not in entered:
                observe(name, Side.INPUT, tensor.detach())
            entered.add(name)

        return show

    def after(name: str) -> Callable[..., None]:
        def show(_module: object, _arguments: object, output: object) -> None:
            tensor = first_tensor(output)
            if tensor is not None and name not in left:
                observe(name, Side.OUTPUT, tensor.detach())
            left.add(name)

        return show

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_tensors(
    model: torch.nn.Module, captures: tuple[Capture, ...]
) -> Iterator[dict[Capture, torch.Tensor]]:
    """Collect what a family wants kept; a module that does not run leaves no entry."""
    found: dict[Capture, torch.Tensor] = {}

    def keep(capture: Capture, value: object) -> None:
        tensor = first_tensor(value)
        if tensor is not None:
            found.setdefault(capture, tensor.detach().clone())

    def input_hook(capture: Capture) -> Callable[..., None]:
        def hook(_module: object, arguments: Any, keywords: Mapping[str, Any]) -> None:
            keep(capture, (arguments, keywords))

        return hook

    def output_hook(capture: Capture) -> Callable[..., None]:
        return lambda _module, _arguments, output: keep(capture, output)

    handles = []
    for capture in captures:
        module = model.get_submodule(capture.module)
        if capture.side is Side.INPUT:
            hook = input_hook(capture)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_hook(capture)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
