"""Looking into models that are compiled, in whole or in part, by torch.compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

T = TypeVar("T")

# torch.compile(module) returns a module that holds the original under this name.
_WRAPPED = "_orig_mod."


def plain_name(name: str) -> str:
    """Return the name that a module, parameter or buffer has in the model before compilation."""
    return f"{name}.".replace(_WRAPPED, "")[:-1]


def plain_names(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return what a model names, by the names from before compilation.

    Of a wrapper and the module inside, which have one name then, the module is returned.
    """
    return {plain_name(name): value for name, value in named}


def plain_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every module by its name from before compilation."""
    return plain_names(model.named_modules())


def run_eagerly() -> AbstractContextManager[Any]:
    """Return a context in which what is compiled runs as it is written.

    Hooks are not seen by graphs that were compiled before.
    """
    import torch

    # torch.compiler.set_stance is there from torch 2.6 on.
    stance = getattr(torch.compiler, "set_stance", None)
    context: AbstractContextManager[Any] = stance("force_eager") if stance else nullcontext()
    return context
