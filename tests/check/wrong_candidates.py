"""FMS's idefics3 with something wrong about how it is run, while its numbers look plausible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.candidates.fms.candidate import FmsCandidate


class Passing:
    """What it is given, phase by phase; subclasses do one thing wrong."""

    def __init__(self, fms: FmsCandidate, folder: Path) -> None:
        self.fms = fms
        self.folder = folder

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        return self.fms.preprocess(images)

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fms.vision(pixel_values)
        return features

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        return self.fms.connector(features)

    def forward(self, inputs: CaseInputs) -> Any:
        return self.fms.forward(inputs)

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        return self.fms.generate(inputs, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)


class SwitchesTf32On(Passing):
    """It asks for speed, for the whole process."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        return super().vision(pixel_values)


class LowersMatmulPrecision(Passing):
    """The other switch for the same thing."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        torch.set_float32_matmul_precision("medium")
        return super().vision(pixel_values)


class UsesAutocast(Passing):
    """It computes in bfloat16 and answers in float32."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().connector(features).float()


class IsInTrainMode(Passing):
    """Nobody called eval()."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        self.fms.model.connector.train()
        try:
            return super().connector(features)
        finally:
            self.fms.model.connector.eval()


class KeepsGradients(Passing):
    """It leaves inference mode."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(mode=False), torch.enable_grad():
            return super().connector(features.clone())


class HasCoarseWeights(Passing):
    """Its connector's weights are bfloat16, its answer is float32."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        module = self.fms.model.connector
        weights = {name: weight.clone() for name, weight in module.state_dict().items()}
        module.to(torch.bfloat16)
        try:
            return super().connector(features.bfloat16()).float()
        finally:
            module.to(torch.float32)
            module.load_state_dict(weights)


class OverwritesInputs(Passing):
    """It writes into what it was given, images included, after having used it."""

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        answer = super().preprocess(images)
        images[0].paste((9, 9, 9), (0, 0, 1, 1))
        return answer

    def forward(self, inputs: CaseInputs) -> Any:
        logits = super().forward(inputs)
        inputs.attention_mask.zero_()
        return logits


class HandsInputsBack(Passing):
    """It computes in place."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        tokens = super().connector(features)
        place = features.view(-1)[: tokens.numel()].view(tokens.shape)
        return place.copy_(tokens)


class ReturnsItsInput(Passing):
    """It computes nothing, and passes on what it was given."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        return features


class AdoptsItsInput(Passing):
    """What it was given first is its buffer from then on."""

    buffer: torch.Tensor | None = None

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        if self.buffer is None:
            self.buffer = features
        return self.buffer.copy_(features)


class ReturnsOneBuffer(Passing):
    """Every answer lies in the same memory."""

    def __init__(self, fms: FmsCandidate, folder: Path) -> None:
        super().__init__(fms, folder)
        self.buffer = torch.zeros(10**6)

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        tokens = super().connector(features)
        return self.buffer[: tokens.numel()].view(tokens.shape).copy_(tokens)


class ReturnsOneArray(ReturnsOneBuffer):
    """Every answer lies in the same memory, and it is NumPy's."""

    def __init__(self, fms: FmsCandidate, folder: Path) -> None:
        super().__init__(fms, folder)
        self.array = np.zeros(10**6, dtype=np.float32)

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        self.buffer = torch.from_numpy(self.array)
        return super().connector(features)


class IsNotDeterministic(Passing):
    """Its answer drifts from call to call, within the tolerance."""

    calls = 0

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().connector(features) + 1e-6 * self.calls


class IsWrongTheSecondTime(Passing):
    """Its second answer is beyond the tolerance."""

    calls = 0

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().connector(features) + (self.calls - 1)


class ReadsTheGolden(Passing):
    """It answers with what the golden set holds."""

    def _golden(self, phase: str, name: str) -> torch.Tensor:
        with safe_open(self.folder / f"{phase}.safetensors", framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(f"one-image/{name}")
        return tensor

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._golden("vision", "last_hidden_state")

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        return self._golden("connector", "image_hidden_states")


class ComputesForShow(ReadsTheGolden):
    """It runs its model, throws the answer away, and hands out what the golden set holds."""

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.fms.vision(pixel_values)
        return super().vision(pixel_values)

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        self.fms.connector(features)
        return super().connector(features)

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        return self._golden("generate", "token_ids")[:max_new_tokens]


class ComputesWithoutModules(Passing):
    """No torch module runs, and yet it computes: the connector is one product."""

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        (projection,) = (
            module
            for module in self.fms.model.connector.modules()
            if isinstance(module, torch.nn.Linear)
        )
        shuffled: list[torch.Tensor] = []
        handle = projection.register_forward_pre_hook(lambda _m, given: shuffled.append(given[0]))
        ran = projection.forward
        super().connector(features)
        handle.remove()
        return ran(shuffled[0])


class ReturnsASparseTensor(Passing):
    """A tensor that no comparison can take."""

    def connector(self, features: torch.Tensor) -> Any:
        return super().connector(features).to_sparse()
