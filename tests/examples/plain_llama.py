"""Llama in plain PyTorch, as a candidate."""

import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812 - torch's own habit

from snapshot_tool.base.protocol import CandidateRequest, CaseInputs


class Llama:
    """A candidate with forward only; with `--quick` this also verifies the generated tokens."""

    def __init__(self, request: CandidateRequest) -> None:
        self.config = request.config
        self.weights = load_file(request.checkpoint / "model.safetensors", device=request.device)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"]
        )

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, dim=-1)
        steps = torch.arange(one.shape[-1], device=x.device) / one.shape[-1]
        angles = positions[:, None, :, None] * self.config["rope_theta"] ** -steps
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        mask, positions = inputs.attention_mask, inputs.attention_mask.cumsum(-1) - 1
        seen = (mask[:, None, :, None] == mask[:, None, None, :]).tril()
        x = F.embedding(inputs.input_ids, self.weights["model.embed_tokens.weight"])
        for layer in (f"model.layers.{i}" for i in range(self.config["num_hidden_layers"])):
            n = self.norm(x, f"{layer}.input_layernorm")
            q, k, v = (self.linear(n, f"{layer}.self_attn.{part}_proj") for part in "qkv")
            size = q.shape[-1] // self.config["num_attention_heads"]
            q, k, v = (part.view(*part.shape[:2], -1, size).transpose(1, 2) for part in (q, k, v))
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            x = x + self.linear(a.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
            n = self.norm(x, f"{layer}.post_attention_layernorm")
            gate = F.silu(self.linear(n, f"{layer}.mlp.gate_proj"))
            up = self.linear(n, f"{layer}.mlp.up_proj")
            x = x + self.linear(gate * up, f"{layer}.mlp.down_proj")
        return self.linear(self.norm(x, "model.norm"), "lm_head")
