"""The bytes of tensors: their digest, and whether they are equal."""

import torch
import xxhash


def fingerprint(data: torch.Tensor | bytes) -> str:
    """Return a digest (XXH3, 128 bits), several times as fast as SHA-256.

    It finds what was overwritten by mistake; two inputs with one digest can be made on purpose.
    """
    return xxhash.xxh3_128_hexdigest(data if isinstance(data, bytes) else tensor_bytes(data))


def equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape, dtype and device have the same bytes.

    A tensor that is not contiguous is copied.
    """
    return torch.equal(_flat_bytes(one), _flat_bytes(other))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension first; its own memory if it is contiguous."""
    return _flat_bytes(tensor.to("cpu")).numpy().data


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, (bytes,) uint8; its own memory if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    # One element is contiguous with any stride, but can be viewed as bytes only with stride 1.
    plain = flat.as_strided(flat.shape, (1,)) if flat.numel() <= 1 else flat
    return plain.view(torch.uint8)
