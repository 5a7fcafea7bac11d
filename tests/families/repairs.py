"""Candidates for families that FMS cannot load as it is: other files, the model FMS's own.

A repair shows that the model is right where its adapter is not. It is no part of snap: whoever
ports such a family mends the adapter in FMS.
"""

from __future__ import annotations

import atexit
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate

_MISTRAL_NAMES = (
    (r"^lm_head\.", "output."),
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.", ""),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_EXPERT = re.compile(r"(.*block_sparse_moe)\.experts\.(\d+)\.(w[123])\.weight")


def mixtral(request: CandidateRequest) -> FmsCandidate:
    """Load Mixtral from Mistral's own names and layout, which FMS's "hf" adapter expects."""
    config = request.config
    heads = {
        "q": int(config["num_attention_heads"]),
        "k": int(config["num_key_value_heads"]),
    }
    return _load_from(_as_mistral_has_it(_weights(request), heads), request)


def gpt_oss(request: CandidateRequest) -> FmsCandidate:
    """Load GPT-OSS from experts in MXFP4, the one layout that FMS's "hf" adapter reads."""
    packed: dict[str, torch.Tensor] = {}
    for name, weight in _weights(request).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = _as_mxfp4(weight.transpose(1, 2))
        else:
            packed[name] = weight
    return _load_from(packed, request)


def _weights(request: CandidateRequest) -> dict[str, torch.Tensor]:
    return load_file(request.checkpoint / "model.safetensors")


def _load_from(weights: dict[str, torch.Tensor], request: CandidateRequest) -> FmsCandidate:
    """Load FMS's model from other files than the request's."""
    folder = Path(tempfile.mkdtemp(prefix="snap-repair-"))
    # The candidate compares its weights with these files when all else is done.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_file(weights, folder / "model.safetensors")
    shutil.copy(request.checkpoint / "config.json", folder)  # for FMS's own loading
    moved = dataclasses.replace(request, checkpoint=folder)
    return load_fms_candidate(moved, fms_path=None)


def _as_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks (…, groups, 16) and scales (…, groups), uint8, of weights (…, in), exactly.

    A group is 32 elements that share a power of two; raises ValueError for any other number.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    largest = groups.abs().amax(-1).clamp(min=2.0**-120)
    exponents = largest.log2().floor().int() - 2  # the largest number is 6
    scaled = torch.ldexp(groups, -exponents[..., None])
    places = torch.searchsorted(_FP4, scaled.abs().contiguous())
    if not torch.equal(_FP4[places.clamp(max=7)], scaled.abs()):
        raise ValueError("these weights are no numbers of MXFP4")
    codes = (places + 8 * scaled.signbit()).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


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
