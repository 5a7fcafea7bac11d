"""GPT-OSS: experts and attention sinks."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import DECODER_PHASES, decoder_twins, head_dim, rope_theta


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
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


GPT_OSS = Family(
    name="gpt_oss",
    hf_class="GptOssForCausalLM",
    phases=DECODER_PHASES,
    attention="eager",
    fms=FmsPort(
        "gpt_oss",
        _fms_config,
        DecoderCalls,
        (
            *decoder_twins(gated_mlp=False, rotary=False),
            Twin(r"base_model\.layers\.(\d+)\.ff_sub_layer", r"model.layers.\1.mlp"),
        ),
    ),
)
