"""Phi-3 in plain PyTorch, as a candidate that shows its modules."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own habit

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.demo.port import Port, rotate


class Attention(nn.Module):
    """Query, key and value are one weight."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.theta = config["hidden_size"], config["rope_theta"]
        self.size = width // config["num_attention_heads"]
        self.heads = [config["num_attention_heads"], *[config["num_key_value_heads"]] * 2]
        self.qkv_proj = nn.Linear(width, sum(self.heads) * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        split = self.qkv_proj(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = split.split(self.heads, dim=1)
        q, k = (rotate(part, positions, self.theta) for part in (q, k))
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(answer.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Gate and up are one weight."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(
            config["hidden_size"], 2 * config["intermediate_size"], bias=False
        )
        self.down_proj = nn.Linear(config["intermediate_size"], config["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), seen, positions)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """All but the head."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        seen = (mask[:, None, :, None] == mask[:, None, None, :]).tril()
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, seen, positions)
        return self.norm(x)  # type: ignore[no-any-return]


class Phi3(nn.Module):
    """The names of its modules are the checkpoint's, which loads without a mapping."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Model(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, mask))  # type: ignore[no-any-return]


class Candidate(Port):
    """It generates without a cache."""

    kind: type[nn.Module] = Phi3

    def __init__(self, request: CandidateRequest) -> None:
        self.model = self.kind(request.config).to(request.device)
        weights = load_file(request.checkpoint / "model.safetensors", device=request.device)
        if request.config["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.model.load_state_dict(weights)
        self.model.eval()
