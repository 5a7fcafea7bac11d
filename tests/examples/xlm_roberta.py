"""XLM-RoBERTa, which FMS computes with its roberta."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families import Capture, EncoderCalls, Family, FmsPort, ModulePair, Phase, Side


def fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's RoBERTaConfig, from Hugging Face's configuration."""
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["hidden_size"],
        "nheads": config["num_attention_heads"],
        "nlayers": config["num_hidden_layers"],
        "hidden_grow_factor": config["intermediate_size"] / config["hidden_size"],
        "activation_fn": config["hidden_act"],
        "norm_eps": config["layer_norm_eps"],
        "type_vocab_size": config["type_vocab_size"],
        "max_pos": config["max_position_embeddings"] - 2,
        "pad_id": config["pad_token_id"],
        "tie_heads": config["tie_word_embeddings"],
        "pos_emb": "roberta",
    }


LAYER, HF_LAYER = r"base_model\.layers\.(\d+)", r"roberta.encoder.layer.\1"

XLM_ROBERTA = Family(
    name="xlm_roberta",
    hf_class="XLMRobertaForMaskedLM",
    phases=(Phase.FORWARD,),
    # In addition to the logits: the whole output of the module `roberta`.
    captures=(Capture(Phase.FORWARD, "last_hidden_state", "roberta", Side.OUTPUT),),
    # Positions start after the padding token's id, so two embeddings are never used.
    reserved_positions=2,
    fms=FmsPort(
        architecture="roberta",
        config=fms_config,
        calls=EncoderCalls,
        module_pairs=(
            ModulePair(r"base_model\.enc_norm", "roberta.embeddings"),
            ModulePair(LAYER, HF_LAYER),
            # FMS has one module for query, key and value: parts 0, 1 and 2 of its output.
            ModulePair(rf"{LAYER}\.attn\.in_proj", f"{HF_LAYER}.attention.self.query", 0),
            ModulePair(rf"{LAYER}\.attn\.in_proj", f"{HF_LAYER}.attention.self.key", 1),
            ModulePair(rf"{LAYER}\.attn\.in_proj", f"{HF_LAYER}.attention.self.value", 2),
            ModulePair(rf"{LAYER}\.attn\.dense", f"{HF_LAYER}.attention.output.dense"),
            ModulePair(rf"{LAYER}\.ln", f"{HF_LAYER}.attention.output.LayerNorm"),
            ModulePair(rf"{LAYER}\.ff_sub_layer\.w1", f"{HF_LAYER}.intermediate.dense"),
            ModulePair(rf"{LAYER}\.ff_sub_layer\.w2", f"{HF_LAYER}.output.dense"),
            ModulePair(rf"{LAYER}\.ff_ln", f"{HF_LAYER}.output.LayerNorm"),
            ModulePair("classification_head", "lm_head"),
        ),
    ),
)
