"""A port of Phi-3 to FMS, as fms/models/phi3.py: LLaMA, whose weights Hugging Face keeps fused."""

from collections.abc import Mapping
from typing import Any

from fms import models
from fms.models import llama
from fms.utils import serialization


class Phi3(llama.LLaMA):  # type: ignore[misc]
    """The same layers."""


def _split_fused(
    weights: Mapping[str, Any], model_config: llama.LLaMAConfig, **_options: Any
) -> Mapping[str, Any]:
    size = model_config.emb_dim // model_config.nheads
    heads = [model_config.nheads, model_config.kvheads, model_config.kvheads]
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            parts = zip("qkv", weight.split([size * count for count in heads]), strict=True)
            found |= {name.replace("qkv", part): piece for part, piece in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), weight.chunk(2), strict=True)
            found |= {name.replace("gate_up", part): piece for part, piece in parts}
        else:
            found[name] = weight
    return found


models.register_model("phi3", "tiny", lambda **fields: Phi3(llama.LLaMAConfig(), **fields))
serialization.register_adapter_step("phi3", "split_fused", _split_fused)
for name in ("hf_to_fms_names", "hf_to_fms_rope", "weight_fusion"):
    serialization.register_adapter_step("phi3", name, getattr(llama, f"_{name}"))
serialization.register_adapter(
    "phi3", "hf", ["split_fused", "hf_to_fms_names", "hf_to_fms_rope", "weight_fusion"]
)
