"""Mistral 3: a Pixtral vision encoder, a patch merger with a projector, a Mistral decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.families.family import Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.llama import (
    activation,
    attention_twins,
    decoder_twins,
    gated_mlp_twins,
    rope_theta,
)
from snapshot_tool.families.llava_next import (
    CONNECTOR_OUTPUT,
    FEATURES,
    PROJECTOR_CAPTURES,
    image_token,
)
from snapshot_tool.families.mistral import mistral_config

if TYPE_CHECKING:
    import torch


def pixtral_config(config: Mapping[str, Any]) -> dict[str, Any]:
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


def pixtral_twins(fms: str, hf: str) -> tuple[Twin, ...]:
    """Return the twins of a Pixtral encoder; its queries and keys are ordered in two dimensions."""
    layer, hf_layer = rf"{fms}\.transformer\.layers\.(\d+)", rf"{hf}.transformer.layers.\1"
    attention = attention_twins(rf"{layer}\.attn", f"{hf_layer}.attention")
    return (
        Twin(fms, hf),
        Twin(rf"{fms}\.(patch_conv|ln_pre)", rf"{hf}.\1"),
        Twin(layer, hf_layer),
        Twin(rf"{layer}\.(attention_norm|ffn_norm)", rf"{hf_layer}.\2"),
        *(twin for twin in attention if not twin.rotary),
        *gated_mlp_twins(rf"{layer}\.ff_sub_layer", f"{hf_layer}.feed_forward"),
    )


def mistral3_twins(vision: str, projector: str, text: str, head: str) -> tuple[Twin, ...]:
    """Return the twins of the whole, below Hugging Face's names."""
    return (
        *pixtral_twins("vision_tower", vision),
        Twin(r"multi_modal_projector((?:\..+)?)", rf"{projector}\1"),
        *decoder_twins(
            "language_model.base_model", text, fms_head="language_model.head", hf_head=head
        ),
    )


MISTRAL3_TWINS = (
    *mistral3_twins(
        "model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"
    ),
    # transformers 4.51
    *mistral3_twins(
        "vision_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head"
    ),
)

MISTRAL3 = Family(
    name="mistral3",
    hf_class="Mistral3ForConditionalGeneration",
    language_model="mistral",
    phases=PHASES,
    attention="eager",  # transformers 4.51's Pixtral has no other
    captures=PROJECTOR_CAPTURES,
    compared={Phase.VISION: FEATURES, Phase.CONNECTOR: CONNECTOR_OUTPUT},
    fms=FmsPort("mistral3", mistral3_config, PixtralCalls, MISTRAL3_TWINS, encoder="vision_tower"),
)
