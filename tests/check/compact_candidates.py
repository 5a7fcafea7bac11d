"""FMS's idefics3 with a fault in one place, which a sample need not have."""

from __future__ import annotations

import torch

from tests.candidates import Wrapped


class OneBadTile(Wrapped):
    """The third tile's features are a hundredth too large."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = super().vision(pixel_values).clone()
        features[2] *= 1.01
        return features


class NanInOnePlace(Wrapped):
    """One feature of one patch is NaN."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = super().vision(pixel_values).clone()
        features[5, 17, 3] = float("nan")
        return features


class ExchangesTwoTokens(Wrapped):
    """The connector gives two tokens of one tile in each other's place."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = super().connector(features).clone()
        tokens[2, [0, 1]] = tokens[2, [1, 0]]
        return tokens
