"""The memory of tensors: their bytes, and giving back what is free."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def release_free_memory() -> None:
    """Return what the C library keeps for later; where it cannot, do nothing.

    glibc gives back only the end of its heap by itself. The caches of a generation, which grow
    token by token, leave hundreds of megabytes of holes there, beside which the next phase begins.
    """
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """Return glibc's malloc_trim (man 3 malloc_trim); other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension first; its own memory where it lies like that."""
    import torch

    plain = tensor.detach().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
