"""GPTBigCode (StarCoder): GPT-2 with one head of keys and values."""

from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.llama import activation, decoder_family, grow_factor


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's GPTBigCodeConfig."""
    inner = config["n_inner"] or 4 * config["n_embd"]
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["n_embd"],
        "nheads": config["n_head"],
        "nlayers": config["n_layer"],
        "hidden_grow_factor": grow_factor(inner, config["n_embd"]),
        "activation_fn": activation(config["activation_function"]),
        "max_expected_seq_len": config["n_positions"],
        "multiquery_attn": config["multi_query"],
        "ln_eps": config["layer_norm_epsilon"],
        "tie_heads": config["tie_word_embeddings"],
        # FMS gives its padding token no position, Hugging Face gives all tokens theirs.
        "pad_id": -1,
    }


_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"transformer.h.\1"

GPT_BIGCODE = decoder_family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    _fms_config,
    (
        ModulePair("base_model", "transformer"),
        ModulePair(r"base_model\.embedding", "transformer.wte"),
        ModulePair(r"base_model\.position_embedding", "transformer.wpe"),
        ModulePair(r"base_model\.dec_norm", "transformer.ln_f"),
        ModulePair("head", "lm_head"),
        ModulePair(_LAYER, _HF_LAYER),
        ModulePair(rf"{_LAYER}\.ln", f"{_HF_LAYER}.ln_1"),
        ModulePair(rf"{_LAYER}\.ff_ln", f"{_HF_LAYER}.ln_2"),
        ModulePair(rf"{_LAYER}\.attn", f"{_HF_LAYER}.attn"),
        ModulePair(rf"{_LAYER}\.attn\.dense", f"{_HF_LAYER}.attn.c_proj"),
        ModulePair(rf"{_LAYER}\.ff_sub_layer", f"{_HF_LAYER}.mlp"),
        ModulePair(rf"{_LAYER}\.ff_sub_layer\.w1", f"{_HF_LAYER}.mlp.c_fc"),
        ModulePair(rf"{_LAYER}\.ff_sub_layer\.a", f"{_HF_LAYER}.mlp.act"),
        ModulePair(rf"{_LAYER}\.ff_sub_layer\.w2", f"{_HF_LAYER}.mlp.c_proj"),
    ),
    absent={"tie_heads": True},
    not_weights=(r"\.\d+\.attn\.(masked_)?bias$",),
)
