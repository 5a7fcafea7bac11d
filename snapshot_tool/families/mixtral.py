"""Mixtral: Mistral with experts."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.llama import decoder_family, decoder_pairs, rope_theta


def _fms_config(config: Config) -> Fields:
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


MIXTRAL = decoder_family(
    "mixtral",
    "MixtralForCausalLM",
    _fms_config,
    (
        *decoder_pairs(gated_mlp=False),
        ModulePair(r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.block_sparse_moe"),
    ),
)
