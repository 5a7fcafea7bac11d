"""Making transformers compute in float64 throughout: its code casts to float32 in some places.

RMSNorm, rotary tables and softmax are computed in float32 whatever the model's dtype, which is
right for half precision and wrong for an oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Float64Throughout(TorchDispatchMode):  # type: ignore[no-untyped-call] # untyped in torch
    """Puts float64 in float32's place in every operation."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation with float64 in float32's place."""
        wide = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **wide)


def float64_throughout() -> AbstractContextManager[Any]:
    """Return a context in which whatever asks torch for float32 gets float64."""
    context: AbstractContextManager[Any] = _Float64Throughout()  # type: ignore[no-untyped-call]
    return context


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def widen_rotary_frequencies(model: torch.nn.Module) -> None:
    """Compute rotary frequencies anew: they are float32 buffers whatever a model loads in."""
    for module in model.modules():
        initialise = getattr(module, "rope_init_fn", None)
        if callable(initialise) and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            with float64_throughout():
                module.inv_freq, _ = initialise(module.config, module.inv_freq.device)
