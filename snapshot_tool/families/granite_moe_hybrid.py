"""Granite 4 as FMS has it: GraniteMoeHybrid with attention layers alone and no experts."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import decoder_family, decoder_pairs


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's GraniteConfig."""
    inner = config["shared_intermediate_size"]
    return granite_config({"mlp_bias": False, **config, "intermediate_size": inner})


_MLP, _HF_MLP = r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.shared_mlp"

GRANITE_MOE_HYBRID = decoder_family(
    "granite_moe_hybrid",
    "GraniteMoeHybridForCausalLM",
    _fms_config,
    (
        *decoder_pairs(gated_mlp=False),
        ModulePair(_MLP, _HF_MLP),
        ModulePair(rf"{_MLP}\.w2", f"{_HF_MLP}.output_linear"),
    ),
    recurrent=True,
)
