"""Granite: Llama with four multipliers."""

from snapshot_tool.families.family import Config, Fields
from snapshot_tool.families.llama import (
    EVEN_HEADS,
    decoder_config,
    decoder_family,
    decoder_pairs,
    head_dim,
    rope_theta,
)


def granite_config(config: Config) -> Fields:
    """Return the fields of FMS's GraniteConfig."""
    return {
        **decoder_config(config),
        "attn_bias": config["attention_bias"],
        "mlp_bias": config.get("mlp_bias", False),
        "head_dim": head_dim(config),
        "rope_theta": rope_theta(config),
        "embedding_multiplier": config["embedding_multiplier"],
        "logits_scaling": config["logits_scaling"],
        "residual_multiplier": config["residual_multiplier"],
        "attention_multiplier": config["attention_multiplier"],
        # FMS gives its padding token no embedding, Hugging Face gives all tokens theirs.
        "pad_id": -1,
    }


GRANITE = decoder_family(
    "granite", "GraniteForCausalLM", granite_config, decoder_pairs(), absent=EVEN_HEADS
)
