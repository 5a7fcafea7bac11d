"""Granite 4 as FMS has it: GraniteMoeHybrid with attention layers alone and no experts."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import DECODER_PHASES, decoder_twins


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's GraniteConfig."""
    inner = config["shared_intermediate_size"]
    return granite_config({"mlp_bias": False, **config, "intermediate_size": inner})


_MLP, _HF_MLP = r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.shared_mlp"

GRANITE_MOE_HYBRID = Family(
    name="granite_moe_hybrid",
    hf_class="GraniteMoeHybridForCausalLM",
    phases=DECODER_PHASES,
    recurrent=True,
    fms=FmsPort(
        "granite_moe_hybrid",
        _fms_config,
        DecoderCalls,
        (
            *decoder_twins(gated_mlp=False),
            Twin(_MLP, _HF_MLP),
            Twin(rf"{_MLP}\.w2", f"{_HF_MLP}.output_linear"),
        ),
    ),
)
