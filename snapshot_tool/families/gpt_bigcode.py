"""GPTBigCode (StarCoder): GPT-2 with one head of keys and values."""

from snapshot_tool.families.family import Config, Fields, ModulePair, pairs_below, renamed
from snapshot_tool.families.llama import activation, decoder_family, grow_factor


def _fms_config(config: Config) -> Fields:
    inner = config["n_inner"] or 4 * config["n_embd"]
    return {
        **renamed(
            config,
            src_vocab_size="vocab_size",
            emb_dim="n_embd",
            nheads="n_head",
            nlayers="n_layer",
            max_expected_seq_len="n_positions",
            multiquery_attn="multi_query",
            ln_eps="layer_norm_epsilon",
            tie_heads="tie_word_embeddings",
        ),
        "hidden_grow_factor": grow_factor(inner, config["n_embd"]),
        "activation_fn": activation(config["activation_function"]),
        # FMS gives its padding token no position, Hugging Face gives all tokens theirs.
        "pad_id": -1,
    }


_EMBEDDINGS = {"": "", "embedding": "wte", "position_embedding": "wpe", "dec_norm": "ln_f"}
_BLOCK = {"": "", "ln": "ln_1", "ff_ln": "ln_2", "attn": "attn", "attn.dense": "attn.c_proj"}
_MLP = {"": "", "w1": "c_fc", "a": "act", "w2": "c_proj"}

GPT_BIGCODE = decoder_family(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    _fms_config,
    (
        *pairs_below("base_model", "transformer", _EMBEDDINGS),
        ModulePair("head", "lm_head"),
        *pairs_below(r"base_model\.layers\.(\d+)", r"transformer.h.\1", _BLOCK),
        *pairs_below(r"base_model\.layers\.(\d+)\.ff_sub_layer", r"transformer.h.\1.mlp", _MLP),
    ),
    absent={"tie_heads": True},
    not_weights=(r"\.\d+\.attn\.(masked_)?bias$",),
)
