"""Mistral: Llama with heads of their own size."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import (
    DECODER_PHASES,
    EVEN_HEADS,
    decoder_config,
    decoder_twins,
    head_dim,
    rope_scaling,
    rope_theta,
)


def mistral_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's MistralConfig."""
    return {
        **decoder_config(config),
        "head_dim": head_dim(config),
        "rope_base": rope_theta(config),
        "rope_scaling": rope_scaling(config),
        "sliding_window": config["sliding_window"],
    }


MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    phases=DECODER_PHASES,
    fms=FmsPort(
        "mistral",
        mistral_config,
        DecoderCalls,
        decoder_twins(),
        absent={**EVEN_HEADS, "rope_scaling": {}},
    ),
)
