"""A candidate that answers with zeros: golden sets are read whole, and nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from snapshot_tool.base.protocol import CandidateRequest, CaseInputs


class Zeros:
    """Answers of plausible shapes."""

    def __init__(self, request: CandidateRequest) -> None:
        self.vocabulary = 12

    def preprocess(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixel_values), 4, 8)

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(features), 1, 8)

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        return torch.zeros(1, inputs.input_ids.shape[1], self.vocabulary)

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        return torch.zeros(min(max_new_tokens, 3), dtype=torch.int64)

    def observe_forward(self, inputs: CaseInputs, observe: Any) -> dict[str, str]:
        return {}
