"""A port of Llama to plain PyTorch, correct and with one fault.

ids and mask are (rows, length) int64, hidden states (rows, length, width), logits (rows, length,
vocabulary).
"""
# ruff: noqa: D102 - forward is what torch.nn.Module says it is

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own habit

from snapshot_tool.base.protocol import Candidate, CandidateRequest, CaseInputs


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate both halves of each head by its positions (RoPE)."""
    one, other = x.chunk(2, dim=-1)
    steps = torch.arange(one.shape[-1], device=x.device) / one.shape[-1]
    angles = positions[:, None, :, None] * theta**-steps
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class Attention(nn.Module):
    """Attention with fewer key-value heads than query heads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.theta = config["hidden_size"], config["rope_theta"]
        self.size = config["head_dim"]
        keys = config["num_key_value_heads"] * self.size
        self.q_proj = nn.Linear(width, config["num_attention_heads"] * self.size, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(part, positions, self.theta) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """The gated MLP."""

    def __init__(self, config: Mapping[str, Any], activation: type[nn.Module]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each with its norm and residual."""

    def __init__(self, config: Mapping[str, Any], activation: type[nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config, activation)

    def forward(self, x: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), allowed, positions)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Embedding, layers and norm."""

    def __init__(self, config: Mapping[str, Any], activation: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(
            Layer(config, activation) for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        allowed = (mask[:, None, :, None] == mask[:, None, None, :]).tril()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, allowed, positions)
        return self.norm(x)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The model, with modules named as in the checkpoint."""

    def __init__(self, config: Mapping[str, Any], activation: type[nn.Module]) -> None:
        super().__init__()
        self.model = Model(config, activation)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, mask))  # type: ignore[no-any-return]


class Port(Candidate):
    """A causal model, which takes ids and mask, as a candidate."""

    model: nn.Module

    def forward(self, inputs: CaseInputs) -> Tensor:
        return self.model(inputs.input_ids, inputs.attention_mask)  # type: ignore[no-any-return]

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Tensor:
        """Generate greedily, without a cache."""
        ids, mask = inputs.input_ids, inputs.attention_mask
        new: list[Tensor] = []
        while len(new) < max_new_tokens and not (new and int(new[-1]) in eos_token_ids):
            new.append(self.model(ids, mask)[0, -1:].argmax(-1))
            ids = torch.cat([ids, new[-1][None]], dim=1)
            mask = F.pad(mask, (0, 1), value=1)
        return torch.cat(new)

    def modules(self) -> nn.Module:
        return self.model


class Right(Port):
    """The correct port."""

    activation: type[nn.Module] = nn.SiLU

    def __init__(self, request: CandidateRequest) -> None:
        self.model = Llama(request.config, self.activation).to(request.device)
        self.model.load_state_dict(load_file(request.checkpoint / "model.safetensors"))
        self.model.eval()


class Wrong(Right):
    """A port with GELU instead of SiLU in the MLP."""

    activation = nn.GELU
