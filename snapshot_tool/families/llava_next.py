"""LLaVA-NeXT as Granite Vision has it: SigLIP's hidden states, a projector, a Granite decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import Side
from snapshot_tool.families.family import Capture, Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import EVEN_HEADS, decoder_pairs
from snapshot_tool.families.siglip_vision import siglip_config, siglip_pairs

if TYPE_CHECKING:
    import torch

FEATURES = "image_features"
CONNECTOR_OUTPUT = "image_hidden_states"


def _fms_config(config: Config) -> Fields:
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


def image_token(config: Config) -> int:
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


def image_text_pairs(
    encoder_pairs: Callable[[str], tuple[ModulePair, ...]],
) -> tuple[ModulePair, ...]:
    """Return the module pairs of encoder, projector and decoder, in any release of transformers.

    encoder_pairs: returns those of the encoder, given Hugging Face's name of it.
    """
    releases = (
        ("model.", "model.language_model", "lm_head"),
        ("", "language_model.model", "language_model.lm_head"),  # transformers 4.51
    )
    pairs: list[ModulePair] = []
    for prefix, text, head in releases:
        pairs += encoder_pairs(f"{prefix}vision_tower")
        pairs += [
            ModulePair(r"multi_modal_projector((?:\..+)?)", rf"{prefix}multi_modal_projector\1"),
            *decoder_pairs(
                "language_model.base_model", text, fms_head="language_model.head", hf_head=head
            ),
        ]
    return tuple(pairs)


# What goes into the projector is what vision is compared by, what comes out is connector's.
_PROJECTOR = "multi_modal_projector"
PROJECTOR_CAPTURES = (
    Capture(Phase.VISION, FEATURES, f"model.{_PROJECTOR}", Side.INPUT, formerly=_PROJECTOR),
    Capture(
        Phase.CONNECTOR, CONNECTOR_OUTPUT, f"model.{_PROJECTOR}", Side.OUTPUT, formerly=_PROJECTOR
    ),
)
COMPARED = {Phase.VISION: FEATURES, Phase.CONNECTOR: CONNECTOR_OUTPUT}

LLAVA_NEXT = Family(
    name="llava_next",
    hf_class="LlavaNextForConditionalGeneration",
    phases=PHASES,
    captures=PROJECTOR_CAPTURES,
    compared=COMPARED,
    fms=FmsPort(
        "llava_next",
        _fms_config,
        _Calls,
        image_text_pairs(lambda hf: siglip_pairs("vision_tower.base_model", f"{hf}.vision_model")),
        absent=EVEN_HEADS,
        encoder="vision_tower",
    ),
)
