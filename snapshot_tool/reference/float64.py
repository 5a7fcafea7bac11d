"""Running a model in float64 throughout, also where its code casts to float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Float64Throughout(TorchDispatchMode):  # type: ignore[no-untyped-call] # untyped in torch
    """Replaces float32 by float64 in every operation."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation with float64 instead of float32."""

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        named = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **named)


def float64_throughout() -> AbstractContextManager[Any]:
    """Return a context in which torch operations use float64 where float32 was requested."""
    context: AbstractContextManager[Any] = _Float64Throughout()  # type: ignore[no-untyped-call]
    return context


def widen_rotary_frequencies(model: torch.nn.Module) -> None:
    """Compute rotary frequencies again, which are float32 buffers whatever dtype a model has."""
    for module in model.modules():
        initialise = getattr(module, "rope_init_fn", None)
        if callable(initialise) and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            with float64_throughout():
                module.inv_freq, _ = initialise(module.config, module.inv_freq.device)
