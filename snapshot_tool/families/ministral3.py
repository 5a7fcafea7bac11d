"""Ministral 3: Mistral 3 with YaRN's rotary embeddings and queries scaled by position.

Its prompts are checked without images: those are Mistral 3's own, in FMS by the same code, and the
one processor that transformers has for them since 5 cannot be imported without torchvision.
"""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort
from snapshot_tool.families.llama import DECODER_PHASES, decoder_config, head_dim
from snapshot_tool.families.mistral3 import MISTRAL3_TWINS, PixtralCalls, mistral3_config


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's Ministral3TextConfig."""
    return {
        **decoder_config(config),
        "head_dim": head_dim(config),
        "rope_parameters": config["rope_parameters"],
        "sliding_window": config["sliding_window"],
    }


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's Ministral3Config, PixtralVisionConfig and Ministral3TextConfig."""
    return mistral3_config(config, text=_text_config)


MINISTRAL3 = Family(
    name="ministral3",
    hf_class="Mistral3ForConditionalGeneration",
    language_model="ministral3",
    phases=DECODER_PHASES,
    fms=FmsPort("ministral3", _fms_config, PixtralCalls, MISTRAL3_TWINS),
)
