"""A port of Llama, as a candidate."""

import torch
from safetensors.torch import load_file

from snapshot_tool.base.protocol import Candidate, CandidateRequest, CaseInputs
from snapshot_tool.demo.port import Llama  # your model


class Port(Candidate):
    """The model, with the checkpoint's weights."""

    def __init__(self, request: CandidateRequest) -> None:
        self.model = Llama(request.config, torch.nn.GELU).eval()
        self.model.load_state_dict(load_file(request.checkpoint / "model.safetensors"))

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs.input_ids, inputs.attention_mask)
        return logits

    def modules(self) -> torch.nn.Module:
        return self.model
