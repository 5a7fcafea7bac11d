"""LLaVA-NeXT as Granite Vision has it: SigLIP's hidden states, a projector, a Granite decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.protocol import PHASES, Phase, Side
from snapshot_tool.families.family import (
    Capture,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
    renamed,
)
from snapshot_tool.families.fms_calls import ImageTextCalls
from snapshot_tool.families.llama import EVEN_HEADS, decoder_pairs, granite_config
from snapshot_tool.families.siglip_vision import siglip_config, siglip_pairs

if TYPE_CHECKING:
    import torch


def projector_config(config: Config) -> Fields:
    """Return the fields that FMS's LlavaNextConfig and Mistral3Config have in common."""
    # transformers renamed the field of the image placeholder's id.
    image_token = "image_token_index" if "image_token_index" in config else "image_token_id"
    return renamed(
        config,
        *("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer"),
        image_token_index=image_token,
    )


def _fms_config(config: Config) -> Fields:
    return {
        "vision_config": siglip_config(config["vision_config"]),
        "text_config": granite_config(config["text_config"]),
        **projector_config(config),
        **renamed(config, "vision_feature_select_strategy", "image_grid_pinpoints"),
    }


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
        pairs.append(
            ModulePair(r"multi_modal_projector((?:\..+)?)", rf"{prefix}multi_modal_projector\1")
        )
        pairs += decoder_pairs(
            "language_model.base_model", text, fms_head="language_model.head", hf_head=head
        )
    return tuple(pairs)


def projector_family(name: str, hf_class: str, fms: FmsPort, **declared: Any) -> Family:
    """Return a family whose vision ends in the projector, and whose connector is the projector."""
    old = "multi_modal_projector"
    module, features, tokens = f"model.{old}", "image_features", "image_hidden_states"
    return Family(
        name=name,
        hf_class=hf_class,
        phases=PHASES,
        captures=(
            Capture(Phase.VISION, features, module, Side.INPUT, formerly=old),
            Capture(Phase.CONNECTOR, tokens, module, Side.OUTPUT, formerly=old),
        ),
        compared={Phase.VISION: features, Phase.CONNECTOR: tokens},
        fms=fms,
        **declared,
    )


LLAVA_NEXT = projector_family(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    FmsPort(
        "llava_next",
        _fms_config,
        _Calls,
        image_text_pairs(lambda hf: siglip_pairs("vision_tower.base_model", f"{hf}.vision_model")),
        absent=EVEN_HEADS,
        encoder="vision_tower",
    ),
)
