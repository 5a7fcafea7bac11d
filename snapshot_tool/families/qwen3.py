"""Qwen3: Llama with normalised queries and keys."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import (
    DECODER_PHASES,
    decoder_config,
    decoder_twins,
    head_dim,
    rope_scaling,
    rope_theta,
)


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's Qwen3Config."""
    return {
        **decoder_config(config),
        "attn_bias": config["attention_bias"],
        "head_dim": head_dim(config),
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
    }


_ATTENTION, _HF_ATTENTION = r"base_model\.layers\.(\d+)\.attn", r"model.layers.\1.self_attn"

QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    phases=DECODER_PHASES,
    fms=FmsPort(
        "qwen3",
        _fms_config,
        DecoderCalls,
        (
            *decoder_twins(),
            Twin(rf"{_ATTENTION}\.in_proj\.query", f"{_HF_ATTENTION}.q_proj", rotary=True),
            Twin(rf"{_ATTENTION}\.in_proj\.key", f"{_HF_ATTENTION}.k_proj", rotary=True),
            Twin(rf"{_ATTENTION}\.in_proj\.value", f"{_HF_ATTENTION}.v_proj"),
        ),
        absent={"rope_scaling": {}},
    ),
)
