"""The bytes of tensors: what tells them apart, and whether they are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch


def fingerprint(data: torch.Tensor | bytes) -> str:
    """Return what tells bytes from others (XXH3, 128 bits), several times as quick as SHA-256.

    It tells what was written to by mistake; whoever wants two inputs that have it in common can
    make them.
    """
    return xxhash.xxh3_128_hexdigest(data if isinstance(data, bytes) else tensor_bytes(data))


def equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors of one shape, dtype and device have the same bytes.

    Eight at a time, where number and place of them allow it: torch compares floating-point numbers
    one by one, half as quick. What is not contiguous is copied.
    """
    import torch

    flat = [flat_bytes(t) for t in (one, other)]
    if all(t.numel() % 8 == 0 and t.storage_offset() % 8 == 0 for t in flat):
        flat = [t.view(torch.int64) for t in flat]
    return torch.equal(*flat)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension first; its own memory where it lies like that."""
    return flat_bytes(tensor.to("cpu")).numpy().data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, (bytes,) uint8, on its device; its own memory if it lies like that.

    A tensor of at most one element is contiguous with any stride, but viewed as bytes with 1 alone.
    """
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    plain = flat.as_strided(flat.shape, (1,)) if flat.numel() <= 1 else flat
    return plain.view(torch.uint8)
