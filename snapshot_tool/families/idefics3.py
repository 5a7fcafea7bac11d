"""Idefics3 (SmolVLM): a SigLIP encoder, a pixel-shuffle connector and a Llama decoder.

Hugging Face: transformers.models.idefics3. FMS: fms.models.idefics3, on a branch of its own.
"""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.taps import Side
from snapshot_tool.families.family import Capture, Family, Twin

VISION_OUTPUT = "last_hidden_state"
CONNECTOR_OUTPUT = "image_hidden_states"


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's Idefics3Config, SiglipVisionConfig and LLaMAConfig."""
    vision, text = config["vision_config"], config["text_config"]
    activations = {"gelu_pytorch_tanh": "gelu-tanh", "silu": "swish"}
    return {
        "vision_config": {
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "nlayers": vision["num_hidden_layers"],
            "nheads": vision["num_attention_heads"],
            "num_channels": vision["num_channels"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activations.get(vision["hidden_act"], vision["hidden_act"]),
            "layer_norm_eps": vision["layer_norm_eps"],
        },
        "text_config": {
            "src_vocab_size": text["vocab_size"],
            "emb_dim": text["hidden_size"],
            "norm_eps": text["rms_norm_eps"],
            "nheads": text["num_attention_heads"],
            "kvheads": text["num_key_value_heads"],
            "nlayers": text["num_hidden_layers"],
            "hidden_grow_factor": text["intermediate_size"] / text["hidden_size"],
            "multiple_of": 1,
            "activation_fn": activations.get(text["hidden_act"], text["hidden_act"]),
            "max_expected_seq_len": text["max_position_embeddings"],
            "attn_bias": text["attention_bias"],
            "mlp_bias": text["mlp_bias"],
            # PreTrainedModel.tie_weights goes by the text model's flag alone.
            "tie_heads": text["tie_word_embeddings"],
            "rope_theta": text["rope_theta"],
            "rope_scaling": text["rope_scaling"] or {},
        },
        "image_token_id": config["image_token_id"],
        "scale_factor": config["scale_factor"],
    }


_VISION, _HF_VISION = r"vision_tower", "model.vision_model"
_VISION_LAYER = rf"{_VISION}\.encoder\.layers\.(\d+)"
_HF_VISION_LAYER = rf"{_HF_VISION}.encoder.layers.\1"
_TEXT, _HF_TEXT = r"text_model\.base_model", "model.text_model"
_TEXT_LAYER, _HF_TEXT_LAYER = rf"{_TEXT}\.layers\.(\d+)", rf"{_HF_TEXT}.layers.\1"

_TWINS = (
    Twin(_VISION, _HF_VISION),
    Twin(rf"{_VISION}\.(embeddings(?:\..+)?|encoder|post_layernorm)", rf"{_HF_VISION}.\1"),
    Twin(_VISION_LAYER, _HF_VISION_LAYER),
    Twin(rf"{_VISION_LAYER}\.(layer_norm[12]|mlp)", rf"{_HF_VISION_LAYER}.\2"),
    Twin(rf"{_VISION_LAYER}\.attn", f"{_HF_VISION_LAYER}.self_attn"),
    Twin(rf"{_VISION_LAYER}\.attn\.in_proj", f"{_HF_VISION_LAYER}.self_attn.q_proj", part=0),
    Twin(rf"{_VISION_LAYER}\.attn\.in_proj", f"{_HF_VISION_LAYER}.self_attn.k_proj", part=1),
    Twin(rf"{_VISION_LAYER}\.attn\.in_proj", f"{_HF_VISION_LAYER}.self_attn.v_proj", part=2),
    Twin(rf"{_VISION_LAYER}\.attn\.dense", f"{_HF_VISION_LAYER}.self_attn.out_proj"),
    Twin(rf"{_VISION_LAYER}\.mlp\.w1", f"{_HF_VISION_LAYER}.mlp.fc1"),
    Twin(rf"{_VISION_LAYER}\.mlp\.a", f"{_HF_VISION_LAYER}.mlp.activation_fn"),
    Twin(rf"{_VISION_LAYER}\.mlp\.w2", f"{_HF_VISION_LAYER}.mlp.fc2"),
    Twin(r"connector((?:\..+)?)", r"model.connector\1"),
    Twin(_TEXT, _HF_TEXT),
    Twin(rf"{_TEXT}\.embedding", f"{_HF_TEXT}.embed_tokens"),
    Twin(rf"{_TEXT}\.dec_norm", f"{_HF_TEXT}.norm"),
    Twin(r"text_model\.head", "lm_head"),
    Twin(_TEXT_LAYER, _HF_TEXT_LAYER),
    Twin(rf"{_TEXT_LAYER}\.ln", f"{_HF_TEXT_LAYER}.input_layernorm"),
    Twin(rf"{_TEXT_LAYER}\.ff_ln", f"{_HF_TEXT_LAYER}.post_attention_layernorm"),
    Twin(rf"{_TEXT_LAYER}\.attn", f"{_HF_TEXT_LAYER}.self_attn"),
    Twin(rf"{_TEXT_LAYER}\.attn\.in_proj", f"{_HF_TEXT_LAYER}.self_attn.q_proj", 0, rotary=True),
    Twin(rf"{_TEXT_LAYER}\.attn\.in_proj", f"{_HF_TEXT_LAYER}.self_attn.k_proj", 1, rotary=True),
    Twin(rf"{_TEXT_LAYER}\.attn\.in_proj", f"{_HF_TEXT_LAYER}.self_attn.v_proj", part=2),
    Twin(rf"{_TEXT_LAYER}\.attn\.dense", f"{_HF_TEXT_LAYER}.self_attn.o_proj"),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer", f"{_HF_TEXT_LAYER}.mlp"),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.wg", f"{_HF_TEXT_LAYER}.mlp.gate_proj"),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.w1", f"{_HF_TEXT_LAYER}.mlp.up_proj"),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.wg1_fused", f"{_HF_TEXT_LAYER}.mlp.gate_proj", 0, 2),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.wg1_fused", f"{_HF_TEXT_LAYER}.mlp.up_proj", 1, 2),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.a", f"{_HF_TEXT_LAYER}.mlp.act_fn"),
    Twin(rf"{_TEXT_LAYER}\.ff_sub_layer\.w2", f"{_HF_TEXT_LAYER}.mlp.down_proj"),
)

IDEFICS3 = Family(
    name="idefics3",
    phases=PHASES,
    auto_class="AutoModelForVision2Seq",
    captures=(
        Capture(Phase.VISION, VISION_OUTPUT, "model.vision_model", Side.OUTPUT),
        # Kept since transformers changed how it computes them: 4.57 is off by one in float32.
        Capture(
            Phase.VISION,
            "position_ids",
            "model.vision_model.embeddings.position_embedding",
            Side.INPUT,
        ),
        Capture(Phase.CONNECTOR, CONNECTOR_OUTPUT, "model.connector", Side.OUTPUT),
    ),
    compared={Phase.VISION: VISION_OUTPUT, Phase.CONNECTOR: CONNECTOR_OUTPUT},
    fms_architecture="idefics3",
    fms_config_class="Idefics3Config",
    fms_config=_fms_config,
    fms_aliases={
        "image_token_id": ("image_token_index",),
        "scale_factor": ("pixel_shuffle_factor",),
    },
    fms_twins=_TWINS,
    tile_id_field="image_token_id",
    not_weights=(r"rotary_emb\.inv_freq$", r"position_ids$"),
)
