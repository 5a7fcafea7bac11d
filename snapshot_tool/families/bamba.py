"""Bamba: Mamba 2 layers, and attention in some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.families.family import Config, Fields, ModulePair
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.llama import decoder_config, decoder_family, gated_mlp_pairs, rope_theta

if TYPE_CHECKING:
    import torch


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's BambaConfig."""
    return {
        **decoder_config(config),
        "attn_layer_indices": list(config["attn_layer_indices"] or ()),
        "rope_theta": rope_theta(config),
        "chunk_size": config["mamba_chunk_size"],
        "use_conv_bias": config["mamba_conv_bias"],
        "conv_kernel": config["mamba_d_conv"],
        "head_dim": config["mamba_d_head"],
        "state_size": config["mamba_d_state"],
        "mamba_expand": config["mamba_expand"],
        "n_groups": config["mamba_n_groups"],
        "mamba_n_heads": config["mamba_n_heads"],
        "use_bias": config["mamba_proj_bias"],
    }


class _Calls(DecoderCalls):
    """FMS's cache of states goes by position ids: they are always passed.

    After the prompt it takes one token at a time: a prompt in parts comes out wrong.
    """

    forward_in_parts = None  # type: ignore[assignment]

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return the position ids of any prompt, and a padded one's mask."""
        seen = self.pad(inputs)
        if bool(inputs.attention_mask.all()):
            del seen["mask"]
        return seen


_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"model.layers.\1"

BAMBA = decoder_family(
    "bamba",
    "BambaForCausalLM",
    _fms_config,
    (
        ModulePair("base_model", "model"),
        ModulePair(r"base_model\.embedding", "model.embed_tokens"),
        ModulePair(r"base_model\.dec_norm", "model.final_layernorm"),
        ModulePair("head", "lm_head"),
        ModulePair(_LAYER, _HF_LAYER),
        ModulePair(rf"{_LAYER}\.ln", f"{_HF_LAYER}.input_layernorm"),
        ModulePair(rf"{_LAYER}\.ff_ln", f"{_HF_LAYER}.pre_ff_layernorm"),
        # Half of each head rotates: its queries and keys have no counterpart to compare with.
        ModulePair(rf"{_LAYER}\.attn", f"{_HF_LAYER}.self_attn"),
        ModulePair(rf"{_LAYER}\.attn\.dense", f"{_HF_LAYER}.self_attn.o_proj"),
        ModulePair(rf"{_LAYER}\.ssm", f"{_HF_LAYER}.mamba"),
        ModulePair(rf"{_LAYER}\.ssm\.(in_proj|norm|out_proj)", rf"{_HF_LAYER}.mamba.\2"),
        *gated_mlp_pairs(rf"{_LAYER}\.ff_sub_layer", f"{_HF_LAYER}.feed_forward"),
    ),
    calls=_Calls,
    recurrent=True,
)
