"""Padding: what implementations compute there is nobody's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def without_padding(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return text activations (1, length, ...) at the positions that are no padding.

    attention_mask: (1, length), zero at padding. Tensors of another shape come back as they are.
    """
    if tensor.shape[:2] != attention_mask.shape or bool(attention_mask.all()):
        return tensor
    return tensor[:, attention_mask[0].bool().to(tensor.device)]
