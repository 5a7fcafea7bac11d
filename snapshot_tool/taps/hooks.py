"""Hooks that read the inputs and outputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

from snapshot_tool.base.protocol import Observer, Side
from snapshot_tool.families.family import Capture

T = TypeVar("T")

# torch.compile(module) returns a module that holds the original under this name.
_WRAPPED = "_orig_mod."


def plain_names(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return a model's named modules, parameters or buffers, by their names before compilation.

    A wrapper and the module inside get the same name; the module is returned.
    """
    return {f"{name}.".replace(_WRAPPED, "")[:-1]: value for name, value in named}


def plain_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every module by its name before compilation."""
    return plain_names(model.named_modules())


def run_eagerly() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs eagerly.

    Graphs that were compiled before do not call hooks.
    """
    # torch.compiler.set_stance is new in torch 2.6.
    stance = getattr(torch.compiler, "set_stance", nullcontext)
    return cast("AbstractContextManager[Any]", stance("force_eager"))


# Called with a module's name, the side, and (arguments, keywords) or the output. What it returns
# takes their place, unless it is None.
Watcher = Callable[[str, Side, Any], Any]


def named_tensors(value: object, *, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested tuples, lists and mappings, in order.

    Its name is its position: "0", "hidden_states", "0.1"; `name` is that of the value itself.
    """
    if isinstance(value, torch.Tensor):
        yield name or "0", value.detach()
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for place, item in items:
            yield from named_tensors(item, name=f"{name}.{place}" if name else str(place))


def first_tensor(value: object) -> torch.Tensor | None:
    """Return the first tensor of a module's input or output, or None."""
    return next((tensor for _, tensor in named_tensors(value)), None)


def replace_first_tensor(value: Any, tensor: torch.Tensor) -> Any:
    """Return a module's input or output with its first tensor replaced."""
    if isinstance(value, torch.Tensor):
        return tensor
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for place, (key, item) in enumerate(items):
        if first_tensor(item) is not None:
            items[place] = key, replace_first_tensor(item, tensor)
            break
    if isinstance(value, dict):
        return type(value)(items)
    replaced = [item for _, item in items]
    return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)


@contextmanager
def watch_modules(modules: Iterable[tuple[str, torch.nn.Module]], watch: Watcher) -> Iterator[None]:
    """Call `watch` with the inputs and outputs of each module, at every call.

    Nothing is copied. A later module may change a tensor in place, so `watch` must copy what it
    keeps.
    """

    def before(name: str) -> Callable[..., Any]:
        return lambda _module, *given: watch(name, Side.INPUT, given)  # arguments, keywords

    def after(name: str) -> Callable[..., Any]:
        return lambda _module, _arguments, output: watch(name, Side.OUTPUT, output)

    handles = []
    try:
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def named_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return every module but the model itself, with its name before compilation."""
    return [(name, module) for name, module in plain_modules(model).items() if name]


@contextmanager
def tap_modules(model: torch.nn.Module, observe: Observer) -> Iterator[None]:
    """Call `observe` with the first tensor of each module's first input and first output.

    A tensor that it returns takes the place of the first one.
    """
    seen: set[tuple[str, Side]] = set()

    def watch(name: str, side: Side, value: object) -> Any:
        tensor, replaced = first_tensor(value), None
        if tensor is not None and (name, side) not in seen:
            replaced = observe(name, side, tensor)
        seen.add((name, side))
        return None if replaced is None else replace_first_tensor(value, replaced)

    with run_eagerly(), watch_modules(named_modules(model), watch):
        yield


@contextmanager
def capture_tensors(
    model: torch.nn.Module, captures: tuple[Capture, ...]
) -> Iterator[dict[Capture, torch.Tensor]]:
    """Collect the tensors of a family's captures; a module that does not run leaves no entry."""
    found: dict[Capture, torch.Tensor] = {}
    named = {capture: name for capture in captures if (name := module_name(model, capture))}

    def watch(name: str, side: Side, value: object) -> None:
        tensor = first_tensor(value)
        for capture, module in named.items():
            if tensor is not None and (module, capture.side) == (name, side):
                found.setdefault(capture, tensor.clone())

    modules = [(name, model.get_submodule(name)) for name in set(named.values())]
    with watch_modules(modules, watch):
        yield found


def module_name(model: torch.nn.Module, capture: Capture) -> str:
    """Return the name that a capture's module has in this model, or ""."""
    names = {name for name, _ in model.named_modules()}
    return next((name for name in (capture.module, capture.formerly) if name in names), "")
