"""MPNet: an encoder with relative positions, as sentence embeddings use it, without a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.families.family import (
    Capture,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
    fused_pairs,
    pairs_below,
    renamed,
)
from snapshot_tool.families.fms_calls import EncoderCalls
from snapshot_tool.families.llama import layers_config

if TYPE_CHECKING:
    import torch

_POOLED = "pooler_output"


def _fms_config(config: Config) -> Fields:
    return {
        **layers_config(config),
        **renamed(
            config,
            *("layer_norm_eps", "relative_attention_num_buckets"),
            max_expected_seq_len="max_position_embeddings",
            pad_id="pad_token_id",
        ),
    }


class _Calls(EncoderCalls):
    """FMS counts positions itself only in a whole prompt; Hugging Face leaves padding out."""

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        padding, pad_id = inputs.attention_mask == 0, self.model.config.pad_id
        seen = self.pad(inputs, offset=pad_id + 1)
        seen["position_ids"] = seen["position_ids"].masked_fill(padding, pad_id)
        if not bool(padding.any()):
            del seen["mask"]
        return seen

    def head_outputs(self, answer: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {_POOLED: answer[1]}


_EMBEDDINGS = {
    "word_embedding": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "enc_norm": "LayerNorm",
}
_BLOCK = {
    "": "",
    "attn": "attention.attn",
    "attn.dense": "attention.attn.o",
    "ln": "attention.LayerNorm",
    "ff_sub_layer.w1": "intermediate.dense",
    "ff_sub_layer.w2": "output.dense",
    "ff_ln": "output.LayerNorm",
}
_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"encoder.layer.\1"

MPNET = Family(
    name="mpnet",
    hf_class="MPNetModel",
    phases=(Phase.FORWARD,),
    captures=(
        Capture(Phase.FORWARD, "last_hidden_state", "encoder", Side.OUTPUT),
        Capture(Phase.FORWARD, _POOLED, "pooler", Side.OUTPUT),
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
            *pairs_below("base_model", "embeddings", _EMBEDDINGS),
            ModulePair(r"base_model\.enc_norm", "embeddings"),
            ModulePair("den", "pooler.dense"),
            ModulePair("activation", "pooler.activation"),
            *pairs_below(_LAYER, _HF_LAYER, _BLOCK),
            *fused_pairs(rf"{_LAYER}\.attn\.in_proj", f"{_HF_LAYER}.attention.attn", "q", "k", "v"),
        ),
    ),
)
