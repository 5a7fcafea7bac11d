"""SigLIP's vision encoder, by itself and inside others."""

from __future__ import annotations

from snapshot_tool.base.protocol import Phase, Side
from snapshot_tool.families.family import (
    Capture,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
    pairs_below,
    renamed,
)
from snapshot_tool.families.fms_calls import VisionCalls
from snapshot_tool.families.llama import activation, attention_pairs

VISION_OUTPUT = "last_hidden_state"


def vision_config(config: Config) -> Fields:
    """Return the fields that FMS's configurations of vision encoders have in common."""
    return {
        **renamed(
            config,
            *("hidden_size", "intermediate_size", "image_size", "patch_size"),
            nlayers="num_hidden_layers",
            nheads="num_attention_heads",
        ),
        "hidden_act": activation(config["hidden_act"]),
    }


def siglip_config(config: Config) -> Fields:
    """Return the fields of FMS's SiglipVisionConfig."""
    return {**vision_config(config), **renamed(config, "num_channels", "layer_norm_eps")}


def siglip_pairs(fms: str, hf: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of an encoder below the names given."""
    base = fms.replace(".", r"\.")
    layer, hf_layer = rf"{base}\.encoder\.layers\.(\d+)", rf"{hf}.encoder.layers.\1"
    return (
        ModulePair(base, hf),
        ModulePair(rf"{base}\.(embeddings(?:\..+)?|encoder|post_layernorm)", rf"{hf}.\1"),
        ModulePair(layer, hf_layer),
        ModulePair(rf"{layer}\.(layer_norm[12]|mlp)", rf"{hf_layer}.\2"),
        *attention_pairs(rf"{layer}\.attn", f"{hf_layer}.self_attn", out="out_proj", rotary=False),
        *pairs_below(
            rf"{layer}\.mlp", f"{hf_layer}.mlp", {"w1": "fc1", "a": "activation_fn", "w2": "fc2"}
        ),
    )


SIGLIP_VISION = Family(
    name="siglip_vision",
    hf_class="SiglipVisionModel",
    phases=(Phase.PREPROCESSING, Phase.VISION),
    captures=(
        Capture(
            Phase.VISION,
            VISION_OUTPUT,
            "post_layernorm",
            Side.OUTPUT,
            formerly="vision_model.post_layernorm",
        ),
        Capture(Phase.VISION, "pooler_output", "head", Side.OUTPUT, formerly="vision_model.head"),
    ),
    compared={Phase.VISION: VISION_OUTPUT},
    logits=False,
    fms=FmsPort(
        "siglip_vision",
        siglip_config,
        VisionCalls,
        (
            *siglip_pairs("base_model", "vision_model"),
            ModulePair("head", "vision_model.head"),
            ModulePair(r"head\.(layernorm|mlp)", r"vision_model.head.\1"),
        ),
    ),
)
