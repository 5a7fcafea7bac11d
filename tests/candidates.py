"""Candidates for the tests: FMS's, with one change each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.protocol import (
    CandidateInfo,
    CandidateRequest,
    CaseInputs,
    KeepOutputs,
)
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate

CHECKOUT = Path(__file__).parent.parent / "build" / "fms-checkout"


class Wrapped:
    """FMS's idefics3, phase by phase."""

    def __init__(self, request: CandidateRequest) -> None:
        self.fms: FmsCandidate = load_fms_candidate(request, fms_path=CHECKOUT)

    def info(self) -> CandidateInfo:
        return CandidateInfo("wrapped", notes=("for tests",))

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        return self.fms.preprocess(images)

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fms.vision(pixel_values)
        return features

    def connector(self, features: torch.Tensor) -> Any:
        return self.fms.connector(features)

    def forward(self, inputs: CaseInputs) -> Any:
        return self.fms.forward(inputs)

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        return self.fms.generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)

    def forward_batch(self, rows: Sequence[CaseInputs]) -> Any:
        return self.fms.forward_batch(rows)

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        return self.fms.forward_in_parts(parts)

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        return self.fms.generate_batch(
            rows, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids
        )


class Unnamed(Wrapped):
    """Returns its modules under its own names, not the reference's."""

    def modules(self) -> torch.nn.Module:
        model: torch.nn.Module = self.fms.model
        return model


class UnnamedAndFaulty(Unnamed):
    """Has one weight of its encoder off by a hundredth, too."""

    def __init__(self, request: CandidateRequest) -> None:
        super().__init__(request)
        with torch.no_grad():
            self.fms.model.vision_tower.base_model.encoder.layers[1].mlp.w2.weight.mul_(1.01)


def with_another_epsilon(request: CandidateRequest) -> FmsCandidate:
    """Return FMS's idefics3 with another epsilon in one norm."""
    port = load_fms_candidate(request, fms_path=CHECKOUT)
    port.model.text_model.base_model.layers[2].ln.eps = 1e-6
    return port


class RaisesInForward(Unnamed):
    """Raises after forward has run."""

    def forward(self, inputs: CaseInputs) -> Any:
        self.fms.forward(inputs)
        raise ValueError("in the middle")


class Raises(Wrapped):
    """Raises in the connector."""

    def connector(self, features: torch.Tensor) -> Any:
        raise RuntimeError(f"no connector for {len(features)} tiles\nand a second line")


class ReturnsNan(Wrapped):
    """Returns a NaN among its logits."""

    def forward(self, inputs: CaseInputs) -> Any:
        logits = super().forward(inputs)
        logits[0, -1, 3] = torch.nan
        return logits


class WrongShape(Wrapped):
    """Returns only the last position's logits."""

    def forward(self, inputs: CaseInputs) -> Any:
        return super().forward(inputs)[:, -1]


class WrongType(Wrapped):
    """Returns float64 from the connector, and a list from forward."""

    def connector(self, features: torch.Tensor) -> Any:
        return super().connector(features).double()

    def forward(self, inputs: CaseInputs) -> Any:
        return super().forward(inputs).tolist()


class SpoilsItsInputs(Wrapped):
    """Overwrites its inputs after using them, and reshapes one in place."""

    def output_cache(self) -> KeepOutputs:
        return self.fms.output_cache()

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = super().vision(pixel_values)
        pixel_values.zero_()
        pixel_values.unsqueeze_(0)
        return features

    def connector(self, features: torch.Tensor) -> Any:
        tokens = super().connector(features)
        features.zero_()
        return tokens


class StopsEarly(Wrapped):
    """Generates half of the tokens."""

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        new = super().generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        return new[: len(new) // 2]


class TakesSecondBest(Wrapped):
    """Takes the second best token at the fifth step."""

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        new = super().generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        ids = torch.cat([inputs.input_ids, new[None, :4]], dim=1)
        longer = CaseInputs(ids, torch.ones_like(ids), inputs.pixel_values)
        new[4] = self.fms.forward(longer)[0, -1].topk(2).indices[1]
        return new


class TakesTheOtherOfTwo(Wrapped):
    """Takes token 335 in place of 338.

    In variant-12 and half precision that is a near-tie at step 17, the only step with 338.
    """

    def forward(self, inputs: CaseInputs) -> Any:
        logits = super().forward(inputs).float()
        logits[..., 335] = torch.maximum(logits[..., 335], logits[..., 338] + 1e-3)
        return logits

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        new = super().generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        return new.where(new != 338, torch.tensor(335))


class TakesAnyToken(Wrapped):
    """Takes the first token of the vocabulary at the fifth step."""

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        new = super().generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
        new[4] = 0
        return new


class HasNoGeneration:
    """Has no generate, and a forward that is not supported."""

    def __init__(self, request: CandidateRequest) -> None:
        fms = load_fms_candidate(request, fms_path=CHECKOUT)
        self.preprocess = fms.preprocess
        self.vision = fms.vision
        self.connector = fms.connector

    def forward(self, inputs: CaseInputs) -> Any:
        raise PhaseUnsupported("the decoder is not ported yet")


def refuses(request: CandidateRequest) -> Any:
    """Fail to build a candidate."""
    raise ValueError(f"cannot build on {request.device}")


class AsksForOneRow(Wrapped):
    """Has no batches, and does not support a prompt in parts."""

    forward_batch = None  # type: ignore[assignment]

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        raise PhaseUnsupported("no cache yet")


class SlightlyOff(Wrapped):
    """Has its last norm off by 3 in 100,000: within the table, beyond rounding."""

    def __init__(self, request: CandidateRequest) -> None:
        super().__init__(request)
        with torch.no_grad():
            self.fms.model.text_model.base_model.dec_norm.weight.mul_(1.00003)
        self.observe_forward = self.fms.observe_forward


class OneBadPosition(Wrapped):
    """Returns vision features with one patch off by what the table allows."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = super().vision(pixel_values)
        features[3, 17, 5] += 2.5e-4
        return features
