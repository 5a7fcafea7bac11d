"""GPT-OSS: experts and attention sinks."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.llama import decoder_family, decoder_pairs, head_dim, rope_theta


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's GptOssConfig."""
    scaling = config.get("rope_parameters") or config["rope_scaling"]
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["hidden_size"],
        "head_dim": head_dim(config),
        "norm_eps": config["rms_norm_eps"],
        "nheads": config["num_attention_heads"],
        "kvheads": config["num_key_value_heads"],
        "nlayers": config["num_hidden_layers"],
        "num_experts": config["num_local_experts"],
        "top_k_experts": config["num_experts_per_tok"],
        "rope_base": rope_theta(config),
        "rope_scaling_factor": scaling["factor"],
        "rope_ntk_alpha": scaling["beta_slow"],
        "rope_ntk_beta": scaling["beta_fast"],
        "sliding_window": config["sliding_window"],
        # YaRN's first length: FMS takes it from this field, which its own loader fills with the
        # whole length.
        "max_expected_seq_len": scaling["original_max_position_embeddings"],
    }


GPT_OSS = decoder_family(
    "gpt_oss",
    "GptOssForCausalLM",
    _fms_config,
    (
        *decoder_pairs(gated_mlp=False, rotary=False),
        ModulePair(r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.mlp"),
    ),
    attention="eager",
)
