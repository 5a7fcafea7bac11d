"""Candidates for families that FMS cannot load as it is: weights renamed, the model FMS's own.

A repair shows that the model is right where its adapter is not. It is no part of snap: whoever
ports such a family mends the adapter in FMS.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.candidates.fms import FmsCandidate, load_fms_candidate
from snapshot_tool.core.interfaces import CandidateRequest

_MISTRAL_NAMES = (
    (r"^lm_head\.", "output."),
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.", ""),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
_EXPERT = re.compile(r"(.*block_sparse_moe)\.experts\.(\d+)\.(w[123])\.weight")


def mixtral(request: CandidateRequest) -> FmsCandidate:
    """Load Mixtral from Mistral's own names and layout, which FMS's "hf" adapter expects."""
    config = request.config
    heads = {
        "q": int(config["num_attention_heads"]),
        "k": int(config["num_key_value_heads"]),
    }
    weights = load_file(request.checkpoint / "model.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file(_as_mistral_has_it(weights, heads), folder / "model.safetensors")
        moved = dataclasses.replace(request, checkpoint=folder)
        return load_fms_candidate(moved, fms_path=None)


def _as_mistral_has_it(
    weights: Mapping[str, torch.Tensor], heads: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return the weights under Mistral's names, experts stacked, rotary elements interleaved."""
    renamed: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name in sorted(weights):
        weight, expert = weights[name], _EXPERT.fullmatch(name)
        if expert:
            rows = weight.T if expert[3] == "w2" else weight
            experts.setdefault(f"{expert[1]}.{expert[3]}", []).append(rows)
        elif projection := re.search(r"self_attn\.([qk])_proj", name):
            renamed[name] = _interleave(weight, heads[projection[1]])
        else:
            renamed[name] = weight
    renamed |= {name: torch.cat(rows).contiguous() for name, rows in experts.items()}
    return {_mistral_name(name): weight.contiguous() for name, weight in renamed.items()}


def _mistral_name(name: str) -> str:
    for pattern, replacement in _MISTRAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a projection (heads * size, width) with the two halves of each head interleaved."""
    halves = weight.view(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)
