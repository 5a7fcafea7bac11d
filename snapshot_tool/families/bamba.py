"""Bamba: Mamba 2 layers, and attention in some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.families.family import Config, Fields, ModulePair, pairs_below, renamed
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import decoder_config, decoder_family, gated_mlp_pairs, rope_theta

if TYPE_CHECKING:
    import torch


def _fms_config(config: Config) -> Fields:
    return {
        **decoder_config(config),
        **renamed(
            config,
            *("mamba_expand", "mamba_n_heads"),
            chunk_size="mamba_chunk_size",
            use_conv_bias="mamba_conv_bias",
            conv_kernel="mamba_d_conv",
            head_dim="mamba_d_head",
            state_size="mamba_d_state",
            n_groups="mamba_n_groups",
            use_bias="mamba_proj_bias",
        ),
        "attn_layer_indices": list(config["attn_layer_indices"] or ()),
        "rope_theta": rope_theta(config),
    }


class _Calls(DecoderCalls):
    """FMS's cache of states depends on position ids, so they are always passed.

    After the prompt it takes one token at a time, so a prompt in parts gives wrong outputs.
    """

    forward_in_parts = None  # type: ignore[assignment]

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        seen = self.pad(inputs)
        if bool(inputs.attention_mask.all()):
            del seen["mask"]
        return seen


_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"model.layers.\1"
_SSM = {name: name for name in ("", "in_proj", "norm", "out_proj")}

BAMBA = decoder_family(
    "bamba",
    "BambaForCausalLM",
    _fms_config,
    (
        *pairs_below(
            "base_model",
            "model",
            {"": "", "embedding": "embed_tokens", "dec_norm": "final_layernorm"},
        ),
        ModulePair("head", "lm_head"),
        *pairs_below(
            _LAYER, _HF_LAYER, {"": "", "ln": "input_layernorm", "ff_ln": "pre_ff_layernorm"}
        ),
        # Half of each head rotates: its queries and keys have no counterpart to compare with.
        *pairs_below(rf"{_LAYER}\.attn", f"{_HF_LAYER}.self_attn", {"": "", "dense": "o_proj"}),
        *pairs_below(rf"{_LAYER}\.ssm", f"{_HF_LAYER}.mamba", _SSM),
        *gated_mlp_pairs(rf"{_LAYER}\.ff_sub_layer", f"{_HF_LAYER}.feed_forward"),
    ),
    calls=_Calls,
    recurrent=True,
)
