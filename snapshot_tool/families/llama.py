"""Llama, and the decoders in FMS that are built like it: Mistral, Qwen3, Granite, experts.

What they share is here for other families to build on. A `…ForCausalLM` without a declaration is
taken for such a decoder.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Phase
from snapshot_tool.families.family import (
    NO_PORT,
    NOT_WEIGHTS,
    PAGE,
    Config,
    Family,
    Fields,
    FmsPort,
    ModulePair,
    fused_pairs,
    pairs_below,
    renamed,
)
from snapshot_tool.families.fms_calls import DecoderCalls, FmsCalls, LoadedFms

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
    """Return FMS's name of an activation function, the one that all its releases have."""
    return {"gelu_pytorch_tanh": "gelu-tanh", "silu": "swish"}.get(name, name)


def layers_config(config: Config) -> Fields:
    """Return the fields of FMS's configurations that give the sizes of its layers."""
    return {
        **renamed(
            config,
            src_vocab_size="vocab_size",
            emb_dim="hidden_size",
            nheads="num_attention_heads",
            nlayers="num_hidden_layers",
        ),
        "hidden_grow_factor": grow_factor(config["intermediate_size"], config["hidden_size"]),
        "activation_fn": activation(config["hidden_act"]),
    }


def decoder_config(config: Config) -> Fields:
    """Return the fields that all of FMS's Llama-like decoders have in common."""
    return {
        **layers_config(config),
        **renamed(
            config,
            norm_eps="rms_norm_eps",
            kvheads="num_key_value_heads",
            max_expected_seq_len="max_position_embeddings",
            # PreTrainedModel.tie_weights reads only the text model's flag.
            tie_heads="tie_word_embeddings",
        ),
        "multiple_of": 1,
    }


def llama_config(config: Config) -> Fields:
    """Return the fields of FMS's LLaMAConfig."""
    return {
        **decoder_config(config),
        **renamed(config, "mlp_bias", attn_bias="attention_bias"),
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
    }


def mistral_config(config: Config) -> Fields:
    """Return the fields of FMS's MistralConfig."""
    return {
        **decoder_config(config),
        "head_dim": head_dim(config),
        "rope_base": rope_theta(config),
        "rope_scaling": rope_scaling(config),
        "sliding_window": config["sliding_window"],
    }


def _qwen3_config(config: Config) -> Fields:
    return {
        **decoder_config(config),
        "attn_bias": config["attention_bias"],
        "head_dim": head_dim(config),
        "rope_theta": rope_theta(config),
        "rope_scaling": rope_scaling(config),
    }


def granite_config(config: Config) -> Fields:
    """Return the fields of FMS's GraniteConfig."""
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier")
    return {
        **decoder_config(config),
        **renamed(config, *multipliers, "logits_scaling", attn_bias="attention_bias"),
        "mlp_bias": config.get("mlp_bias", False),
        "head_dim": head_dim(config),
        "rope_theta": rope_theta(config),
        # FMS gives its padding token no embedding, Hugging Face gives all tokens theirs.
        "pad_id": -1,
    }


def _granite_swa_config(config: Config) -> Fields:
    return {
        **granite_config(config),
        "window_length": config["sliding_window"],
        "is_swa_layer": [kind == "sliding_attention" for kind in config["layer_types"]],
    }


def _granite_moe_hybrid_config(config: Config) -> Fields:
    return granite_config({**config, "intermediate_size": config["shared_intermediate_size"]})


def _experts_config(config: Config) -> Fields:
    """Return the fields that FMS's MixtralConfig and GptOssConfig have in common."""
    return {
        **renamed(
            config,
            src_vocab_size="vocab_size",
            norm_eps="rms_norm_eps",
            nheads="num_attention_heads",
            kvheads="num_key_value_heads",
            nlayers="num_hidden_layers",
            num_experts="num_local_experts",
            top_k_experts="num_experts_per_tok",
            max_expected_seq_len="max_position_embeddings",
        ),
        "rope_base": rope_theta(config),
    }


def _mixtral_config(config: Config) -> Fields:
    sizes = renamed(config, dim="hidden_size", hidden_dim="intermediate_size")
    return {**_experts_config(config), **sizes}


def _gpt_oss_config(config: Config) -> Fields:
    scaling = config.get("rope_parameters") or config["rope_scaling"]
    return {
        **_experts_config(config),
        **renamed(config, "sliding_window", emb_dim="hidden_size"),
        **renamed(
            scaling,
            rope_scaling_factor="factor",
            rope_ntk_alpha="beta_slow",
            rope_ntk_beta="beta_fast",
            # YaRN's first length: FMS takes it from this field, which its own loader fills with
            # the whole length.
            max_expected_seq_len="original_max_position_embeddings",
        ),
        "head_dim": head_dim(config),
    }


def _even_head_dim(fields: Mapping[str, Any]) -> int | None:
    """Return the elements of a head if FMS's fields split the width evenly among the heads."""
    width, heads = fields.get("emb_dim"), fields.get("nheads")
    return width // heads if width and heads else None


# What FMS computed with before its LLaMAConfig had these fields.
_LLAMA_ABSENT = {
    "attn_bias": False,
    "mlp_bias": False,
    "tie_heads": False,
    "rope_theta": 10_000.0,
    "rope_scaling": {},
}
# The same before GraniteConfig and MistralConfig had it.
EVEN_HEADS: Mapping[str, Any] = {"head_dim": _even_head_dim}

_LAYER, _HF_LAYER = r"base_model\.layers\.(\d+)", r"model.layers.\1"
_MLP = rf"{_LAYER}\.ff_sub_layer"


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
    blocks = {"": "", "ln": "input_layernorm", "ff_ln": "post_attention_layernorm"}
    own = (
        *pairs_below(base, hf, {"": "", "embedding": "embed_tokens", "dec_norm": "norm"}),
        ModulePair(fms_head.replace(".", r"\."), hf_head),
        *pairs_below(layer, hf_layer, blocks),
        *attention_pairs(rf"{layer}\.attn", f"{hf_layer}.self_attn", rotary=rotary),
    )
    mlp = gated_mlp_pairs(rf"{layer}\.ff_sub_layer", f"{hf_layer}.mlp")
    return (*own, *mlp) if gated_mlp else own


def attention_pairs(
    fms: str, hf: str, *, out: str = "o_proj", rotary: bool = True
) -> tuple[ModulePair, ...]:
    """Return the module pairs of an attention whose in_proj returns a tuple of three."""
    fused = rf"{fms}\.in_proj"
    return (
        *pairs_below(fms, hf, {"": "", "dense": out}),
        ModulePair(fused, f"{hf}.q_proj", 0, rotary=rotary),
        ModulePair(fused, f"{hf}.k_proj", 1, rotary=rotary),
        ModulePair(fused, f"{hf}.v_proj", 2),
    )


def gated_mlp_pairs(fms: str, hf: str) -> tuple[ModulePair, ...]:
    """Return the module pairs of a gated feed-forward layer, fused or not."""
    names = {"": "", "wg": "gate_proj", "w1": "up_proj", "a": "act_fn", "w2": "down_proj"}
    fused = fused_pairs(rf"{fms}\.wg1_fused", hf, "gate_proj", "up_proj", parts=2)
    return (*pairs_below(fms, hf, names), *fused)


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
    "llama", "LlamaForCausalLM", llama_config, decoder_pairs(), absent=_LLAMA_ABSENT
)
# Heads have a size of their own.
MISTRAL = decoder_family(
    "mistral",
    "MistralForCausalLM",
    mistral_config,
    decoder_pairs(),
    absent={**EVEN_HEADS, "rope_scaling": {}},
)
# Queries and keys are normalised.
QWEN3 = decoder_family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3_config,
    (
        *decoder_pairs(),
        ModulePair(
            rf"{_LAYER}\.attn\.in_proj\.query", f"{_HF_LAYER}.self_attn.q_proj", rotary=True
        ),
        ModulePair(rf"{_LAYER}\.attn\.in_proj\.key", f"{_HF_LAYER}.self_attn.k_proj", rotary=True),
        ModulePair(rf"{_LAYER}\.attn\.in_proj\.value", f"{_HF_LAYER}.self_attn.v_proj"),
    ),
    absent={"rope_scaling": {}},
)
# Four multipliers.
GRANITE = decoder_family(
    "granite", "GraniteForCausalLM", granite_config, decoder_pairs(), absent=EVEN_HEADS
)
# A sliding window in some layers, and attention sinks in all.
GRANITE_SWA = decoder_family(
    "granite_swa",
    "GraniteSWAForCausalLM",
    _granite_swa_config,
    decoder_pairs(),
    attention="eager",
)
# Granite 4 as FMS has it: only attention layers, and no experts.
GRANITE_MOE_HYBRID = decoder_family(
    "granite_moe_hybrid",
    "GraniteMoeHybridForCausalLM",
    _granite_moe_hybrid_config,
    (
        *decoder_pairs(gated_mlp=False),
        *pairs_below(_MLP, f"{_HF_LAYER}.shared_mlp", {"": "", "w2": "output_linear"}),
    ),
    recurrent=True,
)
MIXTRAL = decoder_family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral_config,
    (*decoder_pairs(gated_mlp=False), ModulePair(_MLP, f"{_HF_LAYER}.block_sparse_moe")),
)
# Experts and attention sinks.
GPT_OSS = decoder_family(
    "gpt_oss",
    "GptOssForCausalLM",
    _gpt_oss_config,
    (
        *decoder_pairs(gated_mlp=False, rotary=False),
        ModulePair(_MLP, f"{_HF_LAYER}.mlp"),
    ),
    attention="eager",
)

_CLASS = re.compile(r"[A-Za-z0-9_]+ForCausalLM")
# Without them FMS builds a model of another size.
_SIZES = ("src_vocab_size", "emb_dim", "nheads", "nlayers")


def undeclared_family(hf_class: object, config: Config | None = None) -> Family | None:
    """Return the family of a class by its name; None unless it is a `…ForCausalLM`.

    The class is the family's name, so a golden set that names it needs no declaration.

    config: Hugging Face's, which names the architecture that FMS may have.
    """
    if not isinstance(hf_class, str) or not _CLASS.fullmatch(hf_class):
        return None
    return Family(
        name=hf_class,
        hf_class=hf_class,
        phases=DECODER_PHASES,
        fms=NO_PORT if config is None else _port(config),
        attention="",
        # Unless recording finds that it is not.
        recurrent=True,
    )


class _UndeclaredCalls(DecoderCalls):
    """A decoder whose configuration was filled in by names."""

    def __init__(self, loaded: LoadedFms) -> None:
        super().__init__(loaded)
        given = _undeclared_config(loaded.config)
        own = [f.name for f in dataclasses.fields(loaded.model.config) if f.name not in given]
        self.notes.setdefault(
            "no family declares it: its FMS configuration is filled in by the names of fields, and "
            f"keeps its own {', '.join(own) or 'of none'}"
        )


def _port(config: Config) -> FmsPort:
    """Return a port to the architecture that is called like the model type, Llama-like.

    FMS may lack a field and have its value built in: the outputs show if it is another. The sizes
    are required.
    """
    try:
        fields = _undeclared_config(config)
    except Exception:  # it may be a stranger's, and is refused later
        fields = {}
    return FmsPort(
        str(config.get("model_type")),
        _undeclared_config,
        _UndeclaredCalls,
        absent={name: value for name, value in fields.items() if name not in _SIZES},
    )


def _undeclared_config(config: Config) -> Fields:
    """Return the fields of a Llama-like configuration, and Hugging Face's own by their names."""
    same = {name: value for name, value in config.items() if value is not None}
    try:
        fields = {**same, **decoder_config(config), "head_dim": head_dim(config), "pad_id": -1}
        if "rope_theta" in same or "rope_parameters" in same:
            fields |= {"rope_theta": rope_theta(config), "rope_scaling": rope_scaling(config)}
    except KeyError as missing:
        raise CandidateUnavailable(
            f"the configuration of {config.get('model_type')} has no {missing.args[0]}, so FMS's "
            "cannot be filled in as Llama's is",
            f"declare the family in a file of your own: --family FILE.py ({PAGE})",
        ) from missing
    biases = {"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    return fields | {fms: config[hf] for fms, hf in biases.items() if hf in config}
