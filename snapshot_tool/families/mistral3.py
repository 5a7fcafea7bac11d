"""Mistral 3: a Pixtral vision encoder, a patch merger with a projector, a Mistral decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.phases import PHASES
from snapshot_tool.families.family import Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.llama import (
    activation,
    attention_pairs,
    gated_mlp_pairs,
    rope_theta,
)
from snapshot_tool.families.llava_next import (
    COMPARED,
    PROJECTOR_CAPTURES,
    image_text_pairs,
    image_token,
)
from snapshot_tool.families.mistral import mistral_config

if TYPE_CHECKING:
    import torch


def pixtral_config(config: Config) -> Fields:
    """Return the fields of FMS's PixtralVisionConfig."""
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "nlayers": config["num_hidden_layers"],
        "nheads": config["num_attention_heads"],
        "nchannels": config["num_channels"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "hidden_act": activation(config["hidden_act"]),
        "rope_theta": rope_theta(config),
    }


def mistral3_config(
    config: Mapping[str, Any],
    *,
    text: Callable[[Mapping[str, Any]], dict[str, Any]] = mistral_config,
) -> dict[str, Any]:
    """Return the fields of FMS's Mistral3Config and PixtralVisionConfig, and what `text` gives."""
    return {
        "vision_config": pixtral_config(config["vision_config"]),
        "text_config": text(config["text_config"]),
        "image_token_index": image_token(config),
        "projector_hidden_act": config["projector_hidden_act"],
        "multimodal_projector_bias": config["multimodal_projector_bias"],
        "spatial_merge_size": config["spatial_merge_size"],
        "vision_feature_layer": config["vision_feature_layer"],
    }


class PixtralCalls(ImageTextCalls):
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

    def images(self, inputs: Any) -> dict[str, Any]:
        """Return pixel values and sizes as FMS splits by them: a list of pairs."""
        if inputs.pixel_values is None:
            return {}
        return {"pixel_values": inputs.pixel_values, "image_sizes": _pairs(inputs.image_sizes)}


def _pairs(image_sizes: torch.Tensor | None) -> list[tuple[int, int]]:
    return [] if image_sizes is None else [(int(h), int(w)) for h, w in image_sizes.tolist()]


def pixtral_pairs(fms: str, hf: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of a Pixtral encoder, without queries and keys.

    FMS orders these in two dimensions.
    """
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


MISTRAL3_PAIRS = image_text_pairs(lambda hf: pixtral_pairs("vision_tower", hf))

MISTRAL3 = Family(
    name="mistral3",
    hf_class="Mistral3ForConditionalGeneration",
    language_model="mistral",
    phases=PHASES,
    attention="eager",  # transformers 4.51's Pixtral has no other
    captures=PROJECTOR_CAPTURES,
    compared=COMPARED,
    fms=FmsPort("mistral3", mistral3_config, PixtralCalls, MISTRAL3_PAIRS, encoder="vision_tower"),
)
