"""Idefics3 (SmolVLM): a SigLIP encoder, a pixel-shuffle connector and a Llama decoder.

Hugging Face: transformers.models.idefics3. FMS: fms.models.idefics3, on a branch of its own.
"""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.families.family import Capture, Family, Side

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
    not_weights=(r"rotary_emb\.inv_freq$", r"position_ids$"),
)
