"""Llama, and what other decoders built like it share: configuration and names of modules."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.families.family import (
    NOT_WEIGHTS,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
)
from snapshot_tool.families.fms_calls import DecoderCalls, FmsCalls

DECODER_PHASES = (Phase.FORWARD, Phase.GENERATE)


def head_dim(config: Config) -> int:
    """Return the elements of one attention head."""
    own = config.get("head_dim")
    return int(own or config["hidden_size"] // config["num_attention_heads"])


def rope_theta(config: Config) -> float:
    """Return the rotary base; transformers 5 keeps it among `rope_parameters`."""
    return float((config.get("rope_parameters") or config)["rope_theta"])


def rope_scaling(config: Config) -> Fields:
    """Return how rotary frequencies are scaled; empty if they are not."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kept = {name: value for name, value in scaling.items() if name != "rope_theta"}
    return {} if kept.get("rope_type") == "default" else kept


def grow_factor(inner: int, width: int) -> float:
    """Return the factor by which FMS widens a feed-forward layer, which takes int(factor * width).

    The quotient alone may be rounded down: int(123 / 60 * 60) is 122.
    """
    factor = inner / width
    return factor if int(factor * width) == inner else math.nextafter(factor, math.inf)


def activation(name: str) -> str:
    """Return FMS's name of an activation function, the one that all its releases know."""
    return {"gelu_pytorch_tanh": "gelu-tanh", "silu": "swish"}.get(name, name)


def decoder_config(config: Config) -> Fields:
    """Return the fields that all of FMS's decoders have in common."""
    return {
        "src_vocab_size": config["vocab_size"],
        "emb_dim": config["hidden_size"],
        "norm_eps": config["rms_norm_eps"],
        "nheads": config["num_attention_heads"],
        "kvheads": config["num_key_value_heads"],
        "nlayers": config["num_hidden_layers"],
        "hidden_grow_factor": grow_factor(config["intermediate_size"], config["hidden_size"]),
        "multiple_of": 1,
        "activation_fn": activation(config["hidden_act"]),
        "max_expected_seq_len": config["max_position_embeddings"],
        # PreTrainedModel.tie_weights goes by the text model's flag alone.
        "tie_heads": config["tie_word_embeddings"],
    }


def llama_config(config: Config) -> Fields:
    """Return the fields of FMS's LLaMAConfig."""
    return {
        **decoder_config(config),
        "attn_bias": config["attention_bias"],
        "mlp_bias": config["mlp_bias"],
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
    }


def even_head_dim(fields: Mapping[str, Any]) -> int | None:
    """Return the elements of a head if FMS's fields split the width evenly among the heads."""
    width, heads = fields.get("emb_dim"), fields.get("nheads")
    return width // heads if width and heads else None


# What FMS computed with before its LLaMAConfig had these fields.
LLAMA_ABSENT: Mapping[str, Any] = {
    "attn_bias": False,
    "mlp_bias": False,
    "tie_heads": False,
    "rope_theta": 10_000.0,
    "rope_scaling": {},
}
# The same before GraniteConfig and MistralConfig had it.
EVEN_HEADS: Mapping[str, Any] = {"head_dim": even_head_dim}


def decoder_pairs(
    fms: str = "base_model",
    hf: str = "model",
    *,
    fms_head: str = "head",
    hf_head: str = "lm_head",
    gated_mlp: bool = True,
    rotary: bool = True,
) -> tuple[ModulePair, ...]:
    """Return the module pairs of a decoder whose blocks are Llama's, below the names given."""
    base = fms.replace(".", r"\.")
    layer, hf_layer = rf"{base}\.layers\.(\d+)", rf"{hf}.layers.\1"
    own = (
        ModulePair(base, hf),
        ModulePair(rf"{base}\.embedding", f"{hf}.embed_tokens"),
        ModulePair(rf"{base}\.dec_norm", f"{hf}.norm"),
        ModulePair(fms_head.replace(".", r"\."), hf_head),
        ModulePair(layer, hf_layer),
        ModulePair(rf"{layer}\.ln", f"{hf_layer}.input_layernorm"),
        ModulePair(rf"{layer}\.ff_ln", f"{hf_layer}.post_attention_layernorm"),
        *attention_pairs(rf"{layer}\.attn", f"{hf_layer}.self_attn", rotary=rotary),
    )
    mlp = gated_mlp_pairs(rf"{layer}\.ff_sub_layer", f"{hf_layer}.mlp")
    return (*own, *mlp) if gated_mlp else own


def attention_pairs(
    fms: str, hf: str, *, out: str = "o_proj", rotary: bool = True
) -> tuple[ModulePair, ...]:
    """Return the module pairs of an attention: fused (a tuple of three) or not."""
    fused = rf"{fms}\.in_proj"
    return (
        ModulePair(fms, hf),
        ModulePair(fused, f"{hf}.q_proj", 0, rotary=rotary),
        ModulePair(fused, f"{hf}.k_proj", 1, rotary=rotary),
        ModulePair(fused, f"{hf}.v_proj", 2),
        ModulePair(rf"{fms}\.dense", f"{hf}.{out}"),
    )


def gated_mlp_pairs(fms: str, hf: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of a gated feed-forward layer, fused or not."""
    return (
        ModulePair(fms, hf),
        ModulePair(rf"{fms}\.wg", f"{hf}.gate_proj"),
        ModulePair(rf"{fms}\.w1", f"{hf}.up_proj"),
        ModulePair(rf"{fms}\.wg1_fused", f"{hf}.gate_proj", 0, 2),
        ModulePair(rf"{fms}\.wg1_fused", f"{hf}.up_proj", 1, 2),
        ModulePair(rf"{fms}\.a", f"{hf}.act_fn"),
        ModulePair(rf"{fms}\.w2", f"{hf}.down_proj"),
    )


def decoder_family(
    name: str,
    hf_class: str,
    config: Callable[[Config], Fields],
    module_pairs: tuple[ModulePair, ...],
    *,
    calls: type[FmsCalls] = DecoderCalls,
    absent: Mapping[str, Any] | None = None,
    not_weights: tuple[str, ...] = NOT_WEIGHTS,
    **declared: Any,
) -> Family:
    """Return a family that takes text only and has the same name in FMS's registry."""
    port = FmsPort(name, config, calls, module_pairs, absent=absent or {}, not_weights=not_weights)
    return Family(name=name, hf_class=hf_class, phases=DECODER_PHASES, fms=port, **declared)


LLAMA = decoder_family(
    "llama", "LlamaForCausalLM", llama_config, decoder_pairs(), absent=LLAMA_ABSENT
)
