"""Mistral: Llama with heads of their own size."""

from snapshot_tool.families.family import Config, Fields
from snapshot_tool.families.llama import (
    EVEN_HEADS,
    decoder_config,
    decoder_family,
    decoder_pairs,
    head_dim,
    rope_scaling,
    rope_theta,
)


def mistral_config(config: Config) -> Fields:
    """Return the fields of FMS's MistralConfig."""
    return {
        **decoder_config(config),
        "head_dim": head_dim(config),
        "rope_base": rope_theta(config),
        "rope_scaling": rope_scaling(config),
        "sliding_window": config["sliding_window"],
    }


MISTRAL = decoder_family(
    "mistral",
    "MistralForCausalLM",
    mistral_config,
    decoder_pairs(),
    absent={**EVEN_HEADS, "rope_scaling": {}},
)
