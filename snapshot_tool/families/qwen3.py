"""Qwen3: Llama with normalised queries and keys."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.llama import (
    decoder_config,
    decoder_family,
    decoder_pairs,
    head_dim,
    rope_scaling,
    rope_theta,
)


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's Qwen3Config."""
    return {
        **decoder_config(config),
        "attn_bias": config["attention_bias"],
        "head_dim": head_dim(config),
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
    }


_ATTENTION, _HF_ATTENTION = r"base_model\.layers\.(\d+)\.attn", r"model.layers.\1.self_attn"

QWEN3 = decoder_family(
    "qwen3",
    "Qwen3ForCausalLM",
    _fms_config,
    (
        *decoder_pairs(),
        ModulePair(rf"{_ATTENTION}\.in_proj\.query", f"{_HF_ATTENTION}.q_proj", rotary=True),
        ModulePair(rf"{_ATTENTION}\.in_proj\.key", f"{_HF_ATTENTION}.k_proj", rotary=True),
        ModulePair(rf"{_ATTENTION}\.in_proj\.value", f"{_HF_ATTENTION}.v_proj"),
    ),
    absent={"rope_scaling": {}},
)
