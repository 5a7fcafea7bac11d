"""Mixtral: Mistral with experts."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import DECODER_PHASES, decoder_twins, rope_theta


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's MixtralConfig."""
    return {
        "src_vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "nheads": config["num_attention_heads"],
        "kvheads": config["num_key_value_heads"],
        "nlayers": config["num_hidden_layers"],
        "num_experts": config["num_local_experts"],
        "top_k_experts": config["num_experts_per_tok"],
        "rope_base": rope_theta(config),
        "max_expected_seq_len": config["max_position_embeddings"],
    }


MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    phases=DECODER_PHASES,
    fms=FmsPort(
        "mixtral",
        _fms_config,
        DecoderCalls,
        (
            *decoder_twins(gated_mlp=False),
            Twin(r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.block_sparse_moe"),
        ),
    ),
)
