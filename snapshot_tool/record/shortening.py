"""What a compact golden set keeps of a forward pass's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snapshot_tool.base.phases import Phase
from snapshot_tool.goldens.compact import (
    compact_tensors,
    is_large,
    make_question,
    narrowed,
    question_tensors,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Shortener:
    """Shortens the answers of one case; what the connector is asked is kept with its answer."""

    seed: int
    _question: dict[str, torch.Tensor] = field(default_factory=dict)

    def ask_connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the connector is asked about, given the encoder's own output."""
        if not is_large(features):
            return features
        self._question.update(question_tensors(features, seed=self.seed))
        return make_question(self._question, seed=self.seed)

    def shorten(self, phase: Phase, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the compact form of what is large, and the rest as it is."""
        kept = dict(self._question) if phase is Phase.CONNECTOR else {}
        for name, tensor in tensors.items():
            if is_large(tensor):
                kept |= compact_tensors(name, tensor, seed=self.seed)
            else:
                kept[name] = narrowed(tensor)
        return kept
