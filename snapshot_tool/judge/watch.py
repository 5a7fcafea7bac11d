"""Watching the modules that run: their mode, their weights, and torch's switches meanwhile.

One hook for all modules sees those that really run, inside whatever the candidate is made of; a
candidate that runs no torch module is not seen into.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from snapshot_tool.base.determinism import precision_settings

# Operators that multiply: without one of them no layer of a model was computed.
_PRODUCTS = ("mm", "matmul", "linear", "conv", "attention", "dot", "einsum")


class Watch:
    """Sees the modules of one candidate run, and says what is wrong about them once.

    Args:
        dtype: the dtype that the candidate should compute in.
        settings: torch's precision settings as they were made before the candidate was loaded.
        warn: takes each warning.
    """

    def __init__(
        self, dtype: torch.dtype, settings: Mapping[str, str], warn: Callable[[str], None]
    ) -> None:
        self.modules_run = 0
        self._dtype = dtype
        self._settings = settings
        self._warn = warn
        self._known: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every module that runs inside the block."""
        self.look_at_settings()
        handle = register_module_forward_pre_hook(self._see)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*global hooks on modules.*")
                yield
        finally:
            handle.remove()
        self.look_at_settings()

    def look_at_settings(self) -> None:
        """Say which of torch's precision settings are no longer as snap made them."""
        for name, value in precision_settings().items():
            if value != self._settings.get(name, value):
                self._warn(
                    f"the candidate set {name} to {value}, for all of torch: float32 products are "
                    "rounded to fewer digits"
                )

    def _see(self, module: torch.nn.Module, _arguments: Any) -> None:
        # A compiled graph runs as a module of its own, always in train mode.
        if torch.compiler.is_compiling() or isinstance(module, torch.fx.GraphModule):
            return
        self.modules_run += 1
        if torch.is_grad_enabled():
            self._warn("the candidate computed with gradients on: torch.inference_mode was left")
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                into = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
                self._warn(f"autocast is on: the candidate computed partly in {into}")
        if id(module) not in self._known:
            self._known.add(id(module))
            self._look_at(module)

    def _look_at(self, module: torch.nn.Module) -> None:
        if module.training:
            self._warn(
                "the candidate ran in train mode, where dropout is random and normalisation "
                "learns: call eval() on it"
            )
        for weight in module.parameters(recurse=False):
            if _is_coarser(weight.dtype, self._dtype):
                found, wanted = (str(d).removeprefix("torch.") for d in (weight.dtype, self._dtype))
                self._warn(f"the candidate ran with {found} weights, the golden is {wanted}")


def _is_coarser(found: torch.dtype, wanted: torch.dtype) -> bool:
    if not found.is_floating_point:
        return not found.is_complex
    return torch.finfo(found).eps > torch.finfo(wanted).eps


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products that torch computes while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, counting it if it multiplies."""
        if any(part in func.__name__ for part in _PRODUCTS):
            self.count += 1
        return func(*args, **(kwargs or {}))
