"""Mistral 3: a Pixtral vision encoder, a patch merger with a projector, a Mistral decoder.

Ministral 3 has YaRN's rotary embeddings and queries scaled by position. Its prompts are checked
without images: those are Mistral 3's own, in FMS by the same code, and the one processor that
transformers has for them since 5 cannot be imported without torchvision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.families.family import Config, Fields, FmsPort, ModulePair, renamed
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.llama import (
    attention_pairs,
    decoder_config,
    decoder_family,
    gated_mlp_pairs,
    head_dim,
    mistral_config,
    rope_theta,
)
from snapshot_tool.families.llava_next import image_text_pairs, projector_config, projector_family
from snapshot_tool.families.siglip_vision import vision_config

if TYPE_CHECKING:
    import torch


def _image_config(config: Config) -> Fields:
    """Return the fields of FMS's Mistral3Config and PixtralVisionConfig, without a text model."""
    vision = config["vision_config"]
    return {
        "vision_config": {
            **vision_config(vision),
            "nchannels": vision["num_channels"],
            "rope_theta": rope_theta(vision),
        },
        **projector_config(config),
        "spatial_merge_size": config["spatial_merge_size"],
    }


def _mistral3_config(config: Config) -> Fields:
    return {**_image_config(config), "text_config": mistral_config(config["text_config"])}


def _ministral3_config(config: Config) -> Fields:
    text = config["text_config"]
    own = {**renamed(text, "rope_parameters", "sliding_window"), "head_dim": head_dim(text)}
    return {**_image_config(config), "text_config": {**decoder_config(text), **own}}


class _Calls(ImageTextCalls):
    """All images of a prompt are one sequence of patches; their sizes tell them apart."""

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the selected hidden state, (patches of all images, width)."""
        # Called alone, FMS's tower would attend causally.
        states = self.model.vision_tower(
            pixel_values, _pairs(image_sizes), output_hidden_states=True,
            attn_name="sdpa_bidirectional",
        )[1]  # fmt: skip
        features: torch.Tensor = states[self.model.config.vision_feature_layer]
        return features[0]

    def connector(
        self, features: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the merged and projected patches, (tokens, text width)."""
        tokens: torch.Tensor = self.model.multi_modal_projector(features, _pairs(image_sizes))
        return tokens

    def images(self, inputs: CaseInputs) -> dict[str, Any]:
        if inputs.pixel_values is None:
            return {}
        return {"pixel_values": inputs.pixel_values, "image_sizes": _pairs(inputs.image_sizes)}


def _pairs(image_sizes: torch.Tensor | None) -> list[tuple[int, int]]:
    return [] if image_sizes is None else [(int(h), int(w)) for h, w in image_sizes.tolist()]


def _pixtral_pairs(hf: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of the encoder, without queries and keys.

    FMS orders these in two dimensions.
    """
    fms = "vision_tower"
    layer, hf_layer = rf"{fms}\.transformer\.layers\.(\d+)", rf"{hf}.transformer.layers.\1"
    attention = attention_pairs(rf"{layer}\.attn", f"{hf_layer}.attention")
    return (
        ModulePair(fms, hf),
        ModulePair(rf"{fms}\.(patch_conv|ln_pre)", rf"{hf}.\1"),
        ModulePair(layer, hf_layer),
        ModulePair(rf"{layer}\.(attention_norm|ffn_norm)", rf"{hf_layer}.\2"),
        *(pair for pair in attention if not pair.rotary),
        *gated_mlp_pairs(rf"{layer}\.ff_sub_layer", f"{hf_layer}.feed_forward"),
    )


_CLASS, _PAIRS = "Mistral3ForConditionalGeneration", image_text_pairs(_pixtral_pairs)

MISTRAL3 = projector_family(
    "mistral3",
    _CLASS,
    FmsPort("mistral3", _mistral3_config, _Calls, _PAIRS, encoder="vision_tower"),
    language_model="mistral",
    attention="eager",  # transformers 4.51's Pixtral has no other
)
MINISTRAL3 = decoder_family(
    "ministral3", _CLASS, _ministral3_config, _PAIRS, calls=_Calls, language_model="ministral3"
)
