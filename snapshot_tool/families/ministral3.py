"""Ministral 3: Mistral 3 with YaRN's rotary embeddings and queries scaled by position.

Its prompts are checked without images: those are Mistral 3's own, in FMS by the same code, and the
one processor that transformers has for them since 5 cannot be imported without torchvision.
"""

from snapshot_tool.families.family import Config, Fields
from snapshot_tool.families.llama import decoder_config, decoder_family, head_dim
from snapshot_tool.families.mistral3 import MISTRAL3_PAIRS, PixtralCalls, mistral3_config


def _text_config(config: Config) -> Fields:
    """Return the fields of FMS's Ministral3TextConfig."""
    return {
        **decoder_config(config),
        "head_dim": head_dim(config),
        "rope_parameters": config["rope_parameters"],
        "sliding_window": config["sliding_window"],
    }


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's Ministral3Config, PixtralVisionConfig and Ministral3TextConfig."""
    return mistral3_config(config, text=_text_config)


MINISTRAL3 = decoder_family(
    "ministral3",
    "Mistral3ForConditionalGeneration",
    _fms_config,
    MISTRAL3_PAIRS,
    calls=PixtralCalls,
    language_model="ministral3",
)
