"""Granite: Llama with four multipliers."""

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
    rope_theta,
)


def granite_config(config: Mapping[str, Any]) -> dict[str, Any]:
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


GRANITE = Family(
    name="granite",
    hf_class="GraniteForCausalLM",
    phases=DECODER_PHASES,
    fms=FmsPort("granite", granite_config, DecoderCalls, decoder_twins(), absent=EVEN_HEADS),
)
