"""The architecture idefics3: its variants, and how Hugging Face's weights are named and laid out."""

import re
from collections.abc import Mapping
from typing import Any

from fms import models
from fms.models.idefics3_components import (
    Idefics3,
    Idefics3Config,
    Idefics3Connector,
    pack_image_embeddings,
)
from fms.models.idefics3_components.preprocessing import (
    load_smolvlm_preprocessor,
    load_smolvlm_processor,
)
from fms.utils import serialization

__all__ = [
    "Idefics3",
    "Idefics3Config",
    "Idefics3Connector",
    "load_smolvlm_preprocessor",
    "load_smolvlm_processor",
    "pack_image_embeddings",
]

_architecture_name = "idefics3"


def _factory(**kwargs):
    return Idefics3(**kwargs)


models.register_model(_architecture_name, "smolvlm-256m-instruct", _factory)
models.register_model(_architecture_name, "components", _factory)

# Hugging Face's name of each part, FMS's architecture with an adapter for it, and what that
# adapter takes for the part's name.
_PARTS = (
    (r"model\.vision_model\.", "vision_tower.", "siglip_vision", "vision_model."),
    (r"model\.text_model\.", "text_model.", "llama", "model."),
    (r"(?=lm_head\.)", "text_model.", "llama", ""),
)


def _hf_to_fms(
    input_sd: Mapping[str, Any], model_config: Idefics3Config, **kwargs
) -> Mapping[str, Any]:
    """Adapt each part by the adapter that FMS has for it."""
    configs = {
        "siglip_vision": model_config.vision_config,
        "llama": model_config.text_config,
    }
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    new_sd: dict[str, Any] = {}
    for name, param in input_sd.items():
        for pattern, own, architecture, theirs in _PARTS:
            if re.match(pattern, name):
                part = parts.setdefault((own, architecture), {})
                part[re.sub(f"^{pattern}", theirs, name)] = param
                break
        else:
            name = name.removeprefix("model.")
            new_sd[name.replace("modality_projection.proj.", "proj.")] = param
    for (own, architecture), part in parts.items():
        adapted = serialization.get_adapted(
            architecture, "hf", part, {"model_config": configs[architecture]}
        )
        new_sd.update({own + name: param for name, param in adapted.items()})
    return new_sd


serialization.register_adapter_step(_architecture_name, "hf_to_fms", _hf_to_fms)
serialization.register_adapter(_architecture_name, "hf", ["hf_to_fms"])
