"""MPNet: an encoder with relative positions, as sentence embeddings use it, without a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.families.family import Capture, Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import EncoderCalls
from snapshot_tool.families.llama import grow_factor
from snapshot_tool.families.roberta import ENCODER_PHASES, HIDDEN

if TYPE_CHECKING:
    import torch

POOLED = "pooler_output"


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's MpnetConfig."""
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["hidden_size"],
        "nheads": config["num_attention_heads"],
        "nlayers": config["num_hidden_layers"],
        "hidden_grow_factor": grow_factor(config["intermediate_size"], config["hidden_size"]),
        "activation_fn": config["hidden_act"],
        "layer_norm_eps": config["layer_norm_eps"],
        "max_expected_seq_len": config["max_position_embeddings"],
        "relative_attention_num_buckets": config["relative_attention_num_buckets"],
        "pad_id": config["pad_token_id"],
    }


class _Calls(EncoderCalls):
    """FMS counts positions for itself in a whole prompt alone; Hugging Face leaves padding out."""

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return positions that are counted over real tokens, and a padded prompt's mask."""
        padding, pad_id = inputs.attention_mask == 0, self.model.config.pad_id
        seen = self.pad(inputs, offset=pad_id + 1)
        seen["position_ids"] = seen["position_ids"].masked_fill(padding, pad_id)
        if not bool(padding.any()):
            del seen["mask"]
        return seen

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the pooled first token, (1, width)."""
        return {POOLED: answer[1]}


_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"encoder.layer.\1"
_HF_ATTENTION = f"{_HF_LAYER}.attention"

MPNET = Family(
    name="mpnet",
    hf_class="MPNetModel",
    phases=ENCODER_PHASES,
    captures=(
        Capture(Phase.FORWARD, HIDDEN, "encoder", Side.OUTPUT),
        Capture(Phase.FORWARD, POOLED, "pooler", Side.OUTPUT),
    ),
    logits=False,
    reserved_positions=2,
    attention="eager",
    fms=FmsPort(
        "mpnet",
        _fms_config,
        _Calls,
        (
            ModulePair("base_model", "encoder"),
            ModulePair(r"base_model\.word_embedding", "embeddings.word_embeddings"),
            ModulePair(r"base_model\.position_embeddings", "embeddings.position_embeddings"),
            ModulePair(r"base_model\.enc_norm", "embeddings.LayerNorm"),
            ModulePair(r"base_model\.enc_norm", "embeddings"),
            ModulePair("den", "pooler.dense"),
            ModulePair("activation", "pooler.activation"),
            ModulePair(_LAYER, _HF_LAYER),
            ModulePair(rf"{_LAYER}\.attn", f"{_HF_ATTENTION}.attn"),
            ModulePair(rf"{_LAYER}\.attn\.in_proj", f"{_HF_ATTENTION}.attn.q", 0),
            ModulePair(rf"{_LAYER}\.attn\.in_proj", f"{_HF_ATTENTION}.attn.k", 1),
            ModulePair(rf"{_LAYER}\.attn\.in_proj", f"{_HF_ATTENTION}.attn.v", 2),
            ModulePair(rf"{_LAYER}\.attn\.dense", f"{_HF_ATTENTION}.attn.o"),
            ModulePair(rf"{_LAYER}\.ln", f"{_HF_ATTENTION}.LayerNorm"),
            ModulePair(rf"{_LAYER}\.ff_sub_layer\.w1", f"{_HF_LAYER}.intermediate.dense"),
            ModulePair(rf"{_LAYER}\.ff_sub_layer\.w2", f"{_HF_LAYER}.output.dense"),
            ModulePair(rf"{_LAYER}\.ff_ln", f"{_HF_LAYER}.output.LayerNorm"),
        ),
    ),
)
