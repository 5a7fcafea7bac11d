"""LLaVA-NeXT as Granite Vision has it: SigLIP's hidden states, a projector, a Granite decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.tap import Side
from snapshot_tool.families.family import Capture, Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import EVEN_HEADS, decoder_twins
from snapshot_tool.families.siglip_vision import siglip_config, siglip_twins

if TYPE_CHECKING:
    import torch

FEATURES = "image_features"
CONNECTOR_OUTPUT = "image_hidden_states"


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's LlavaNextConfig, SiglipVisionConfig and GraniteConfig."""
    return {
        "vision_config": siglip_config(config["vision_config"]),
        "text_config": granite_config(config["text_config"]),
        "image_token_index": image_token(config),
        "projector_hidden_act": config["projector_hidden_act"],
        "vision_feature_layer": config["vision_feature_layer"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "multimodal_projector_bias": config["multimodal_projector_bias"],
    }


def image_token(config: Mapping[str, Any]) -> int:
    """Return the image placeholder's id, whose field transformers renamed."""
    return int(config["image_token_index" if "image_token_index" in config else "image_token_id"])


class _Calls(ImageTextCalls):
    """FMS selects hidden states inside get_image_features; here the same, piece by piece."""

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the selected hidden states side by side, (tiles, patches, width * layers)."""
        import torch

        states = self.model.vision_tower(pixel_values, output_hidden_states=True)[2]
        chosen = self.model.config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else chosen
        features = torch.cat([states[layer] for layer in layers], dim=-1)
        whole = self.model.config.vision_feature_select_strategy == "full"
        return features if whole else features[:, 1:]

    def connector(
        self, features: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the projected features, (tiles, patches, text width)."""
        projected: torch.Tensor = self.model.multi_modal_projector(features)
        return projected


def _twins(vision: str, projector: str, text: str, head: str) -> tuple[Twin, ...]:
    return (
        *siglip_twins("vision_tower.base_model", f"{vision}.vision_model"),
        Twin(r"multi_modal_projector((?:\..+)?)", rf"{projector}\1"),
        *decoder_twins(
            "language_model.base_model", text, fms_head="language_model.head", hf_head=head
        ),
    )


# What goes into the projector is what vision is compared by, what comes out is connector's.
PROJECTOR_CAPTURES = (
    Capture(
        Phase.VISION,
        FEATURES,
        "model.multi_modal_projector",
        Side.INPUT,
        formerly="multi_modal_projector",
    ),
    Capture(
        Phase.CONNECTOR,
        CONNECTOR_OUTPUT,
        "model.multi_modal_projector",
        Side.OUTPUT,
        formerly="multi_modal_projector",
    ),
)

LLAVA_NEXT = Family(
    name="llava_next",
    hf_class="LlavaNextForConditionalGeneration",
    phases=PHASES,
    captures=PROJECTOR_CAPTURES,
    compared={Phase.VISION: FEATURES, Phase.CONNECTOR: CONNECTOR_OUTPUT},
    fms=FmsPort(
        "llava_next",
        _fms_config,
        _Calls,
        (
            *_twins(
                "model.vision_tower",
                "model.multi_modal_projector",
                "model.language_model",
                "lm_head",
            ),
            # transformers 4.51
            *_twins(
                "vision_tower",
                "multi_modal_projector",
                "language_model.model",
                "language_model.lm_head",
            ),
        ),
        absent=EVEN_HEADS,
        encoder="vision_tower",
    ),
)
