"""Candidates for models that snap declares no family of: Gemma, and what a port gets wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own habit

from snapshot_tool.base.protocol import CandidateRequest
from tests.examples import plain_phi3
from tests.examples.plain_phi3 import Attention, Mlp, Phi3


class GemmaNorm(nn.RMSNorm):
    """Its weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class GemmaAttention(Attention):
    """Query, key and value are apart, and heads as wide as they like."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        del self.qkv_proj
        self.size = config["head_dim"]
        width, wide = config["hidden_size"], [count * self.size for count in self.heads]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, w, bias=False) for w in wide)
        self.o_proj = nn.Linear(wide[0], width, bias=False)

    def qkv_proj(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


class GemmaMlp(nn.Module):
    """A gated layer with another activation."""

    approximate = "tanh"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, wide = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate=self.approximate)
        return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


class Gemma(Phi3):
    """Phi-3's outline with Gemma's parts."""

    norm: type[nn.RMSNorm] = GemmaNorm
    mlp: type[nn.Module] = GemmaMlp

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        for block in self.model.layers:
            block.self_attn, block.mlp = GemmaAttention(config), self.mlp(config)
            block.input_layernorm = self.norm(width, eps)
            block.post_attention_layernorm = self.norm(width, eps)
        self.model.norm = self.norm(width, eps)
        embed = self.model.embed
        self.model.embed = lambda ids: embed(ids) * width**0.5  # type: ignore[method-assign]


class GemmaCandidate(plain_phi3.Candidate):
    """Gemma."""

    kind = Gemma


# What a port gets wrong.
class SwappedHalves(Mlp):
    """It takes the gate for the other half."""

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


class SwapsGate(plain_phi3.Candidate):
    """Its feed-forward layers have gate and up the other way round."""

    def __init__(self, request: CandidateRequest) -> None:
        super().__init__(request)
        for block in self.model.get_submodule("model.layers").children():
            halves = block.get_submodule("mlp")
            halves.forward = SwappedHalves.forward.__get__(halves)


class PlainNorm(Gemma):
    """Its norms are Llama's."""

    norm = nn.RMSNorm


class PlainNormCandidate(GemmaCandidate):
    """Gemma with the wrong norm."""

    kind = PlainNorm
