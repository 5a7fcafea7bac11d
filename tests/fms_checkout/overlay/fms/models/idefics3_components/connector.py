"""The connector: pixel shuffle and one projection (transformers: Idefics3Connector)."""

import torch
import torch.nn as nn


class Idefics3Connector(nn.Module):
    """Each square of scale x scale patches becomes one token of the text model."""

    def __init__(self, vision_hidden: int, text_hidden: int, scale: int = 4):
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(vision_hidden * scale**2, text_hidden, bias=False)

    def pixel_unshuffle(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Turn (tiles, H * W, width) into (tiles, H * W / scale**2, width * scale**2)."""
        tiles, patches, width = x.shape
        scale = self.scale
        if patches != H * W or H % scale or W % scale:
            raise ValueError(
                f"{patches} patches are no grid of {H} x {W}, cut into squares of {scale}"
            )
        # reshape, not view: the encoder's output is not contiguous
        x = x.reshape(tiles, H // scale, scale, W // scale, scale, width)
        x = x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(tiles, (H // scale) * (W // scale), width * scale**2)

    def forward(self, patch_embeds: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Return the tokens (tiles, tokens, text width) of the patches on a grid of H x W."""
        return self.proj(self.pixel_unshuffle(patch_embeds, H, W))
