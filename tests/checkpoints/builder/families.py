"""Tiny checkpoints of every family: shapes small enough for seconds, weights all random.

A configuration is the least that its family needs, with what ports get wrong turned on: biases,
grouped heads, multipliers, scaled rotary embeddings. `FINDINGS` are configurations with which FMS
is known to differ from Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from builder.small_tokenizer import IMAGE, PIXTRAL, SPECIAL, VOCAB_SIZE, build_tokenizer

MAX_LENGTH = 2048
TILE, PATCH = 32, 8  # pixels

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "pad_token_id": 1}
_DECODER: dict[str, Any] = {
    **_TOKENS,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "rope_theta": 20_000.0,
    "tie_word_embeddings": False,
}
_GRANITE: dict[str, Any] = {
    **_DECODER,
    "embedding_multiplier": 0.5,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.9,
    "attention_multiplier": 0.2,
    "tie_word_embeddings": True,
}
_ROPE = {"rope_type": "default", "rope_theta": 20_000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 20_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": MAX_LENGTH,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ENCODER: dict[str, Any] = {
    **_TOKENS,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
_CLASSES = {"num_labels": 3}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
}
_PIXTRAL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8 * PATCH,
    "patch_size": PATCH,
    "rope_theta": 10_000.0,
}
_MISTRAL3: dict[str, Any] = {
    "image_token_index": SPECIAL.index(PIXTRAL[0]),
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
_MINISTRAL3: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "sliding_window": None,
    "model_type": "ministral3",
}
_BAMBA: dict[str, Any] = {
    **_DECODER,
    "attn_layer_indices": [1],
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_HYBRID: dict[str, Any] = {
    **_GRANITE,
    "layer_types": ["attention", "attention"],
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "rope",
}
_GPT_OSS: dict[str, Any] = {
    **_DECODER,
    "head_dim": 16,
    "intermediate_size": 64,  # FMS has no other than the hidden size, which the real ones have
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """One checkpoint.

    Args:
        family: the family that it is of.
        model: transformers' class of the model, and `config` that of its configuration.
        fields: of the configuration.
        text, vision: fields of the parts' configurations, of those that have parts.
        differs: what FMS is known to do otherwise with this configuration; "" where nothing.
        needs: a class that a release of transformers must have besides.
    """

    family: str
    model: str
    config: str
    fields: Mapping[str, Any]
    text: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None
    differs: str = ""
    needs: str = ""


TINY: Mapping[str, Tiny] = {
    "llama": Tiny("llama", "LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-3": Tiny(
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_DECODER,
            "rope_scaling": _LLAMA3_ROPE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Tiny("granite", "GraniteForCausalLM", "GraniteConfig", _GRANITE),
    "granite-moe-hybrid": Tiny(
        "granite_moe_hybrid", "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", _HYBRID
    ),
    "granite-swa": Tiny(
        "granite_swa", "GraniteSWAForCausalLM", "GraniteSWAConfig",
        {
            **_GRANITE, "rope_parameters": _ROPE, "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "mistral": Tiny(
        "mistral", "MistralForCausalLM", "MistralConfig",
        {**_DECODER, "head_dim": 24, "sliding_window": MAX_LENGTH},
    ),
    "mixtral": Tiny(
        "mixtral", "MixtralForCausalLM", "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3": Tiny(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config",
        {**_DECODER, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "gpt-bigcode": Tiny(
        "gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig",
        {
            **_TOKENS, "eos_token_id": 2, "n_embd": 64, "n_layer": 2, "n_head": 4,
            "n_positions": MAX_LENGTH,
        },
    ),
    "gpt-oss": Tiny("gpt_oss", "GptOssForCausalLM", "GptOssConfig", _GPT_OSS),
    "bamba": Tiny("bamba", "BambaForCausalLM", "BambaConfig", _BAMBA),
    "bamba-groups": Tiny(
        "bamba", "BambaForCausalLM", "BambaConfig", {**_BAMBA, "mamba_n_groups": 2},
        # transformers 4.51 repeats the groups in another order, which Mamba's kernels do not.
        needs="GptOssConfig",
    ),
    "roberta": Tiny("roberta", "RobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "roberta-classification": Tiny(
        "roberta_classification", "RobertaForSequenceClassification", "RobertaConfig",
        {**_ENCODER, **_CLASSES},
    ),
    "roberta-question-answering": Tiny(
        "roberta_question_answering", "RobertaForQuestionAnswering", "RobertaConfig", _ENCODER
    ),
    "bert": Tiny("bert", "BertForMaskedLM", "BertConfig", _ENCODER),
    "bert-classification": Tiny(
        "bert_classification", "BertForSequenceClassification", "BertConfig",
        {**_ENCODER, **_CLASSES},
    ),
    "mpnet": Tiny("mpnet", "MPNetModel", "MPNetConfig", _ENCODER),
    "siglip-vision": Tiny("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", _SIGLIP),
    "llava-next": Tiny(
        "llava_next", "LlavaNextForConditionalGeneration", "LlavaNextConfig",
        {
            "image_token_index": SPECIAL.index(IMAGE),
            "vision_feature_layer": [-3, -1],
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[TILE * h, TILE * w] for h in (1, 2) for w in (1, 2)],
            "tie_word_embeddings": False,
        },
        text={**_GRANITE, "tie_word_embeddings": False, "model_type": "granite"},
        vision={**_SIGLIP, "model_type": "siglip_vision_model"},
    ),
    "mistral3": Tiny(
        "mistral3", "Mistral3ForConditionalGeneration", "Mistral3Config", _MISTRAL3,
        text={**_DECODER, "head_dim": 16, "sliding_window": None, "model_type": "mistral"},
        vision={**_PIXTRAL, "model_type": "pixtral"},
    ),
    "ministral3": Tiny(
        "ministral3", "Mistral3ForConditionalGeneration", "Mistral3Config", _MISTRAL3,
        # YaRN blends over all frequencies: its range has nothing to round.
        text={**_MINISTRAL3, "rope_parameters": {**_YARN, "beta_slow": 1e-12}},
        vision={**_PIXTRAL, "model_type": "pixtral"},
        needs="Ministral3Config",
    ),
    "granite-wide-heads": Tiny(
        "granite", "GraniteForCausalLM", "GraniteConfig", {**_GRANITE, "head_dim": 24},
        differs="heads wider than hidden_size / heads",
    ),
    "mistral-window": Tiny(
        "mistral", "MistralForCausalLM", "MistralConfig",
        {**_DECODER, "head_dim": 24, "sliding_window": 8},
        differs="a sliding window of 8 tokens, shorter than the prompts",
    ),
    "ministral3-yarn": Tiny(
        "ministral3", "Mistral3ForConditionalGeneration", "Mistral3Config", _MISTRAL3,
        text={**_MINISTRAL3, "rope_parameters": _YARN},
        vision={**_PIXTRAL, "model_type": "pixtral"},
        needs="Ministral3Config",
        differs="YaRN's range of frequencies ends between two of them",
    ),
    "bert-four-heads": Tiny(
        "bert", "BertForMaskedLM", "BertConfig", {**_ENCODER, "num_attention_heads": 4},
        differs="a prompt of as many tokens as the model has heads",
    ),
}  # fmt: skip


# Those of which snap declares no family. Small, since the tests build them.
UNDECLARED: Mapping[str, Tiny] = {
    "phi3": Tiny(
        "Phi3ForCausalLM", "Phi3ForCausalLM", "Phi3Config",
        {**_DECODER, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "gemma": Tiny(
        "GemmaForCausalLM", "GemmaForCausalLM", "GemmaConfig",
        {**_DECODER, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "xlm-roberta": Tiny(
        "xlm_roberta", "XLMRobertaForMaskedLM", "XLMRobertaConfig", _ENCODER
    ),
    # Every token sees all others, as config.json leaves it.
    "xlm-roberta-decoder": Tiny(
        "XLMRobertaForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaConfig", _ENCODER
    ),
    # It takes no position ids, and has no greatest length.
    "bloom": Tiny(
        "BloomForCausalLM", "BloomForCausalLM", "BloomConfig",
        {**_TOKENS, "eos_token_id": 2, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    # Its cache is a state, which padding enters.
    "rwkv": Tiny(
        "RwkvForCausalLM", "RwkvForCausalLM", "RwkvConfig",
        {
            **_TOKENS, "eos_token_id": 2, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "context_length": MAX_LENGTH,
        },
    ),
    # Its cache has a fixed size.
    "gemma2": Tiny(
        "Gemma2ForCausalLM", "Gemma2ForCausalLM", "Gemma2Config",
        {**_DECODER, "head_dim": 24, "sliding_window": 8, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def available(name: str) -> bool:
    """Tell whether this release of transformers has a checkpoint's class."""
    tiny = {**UNDECLARED, **TINY}[name]
    return hasattr(transformers, tiny.model) and hasattr(transformers, tiny.needs or tiny.model)


def build_checkpoint(name: str, *, seed: int) -> tuple[Any, Any]:
    """Return the model, with random weights, and its processor."""
    tiny = {**UNDECLARED, **TINY}[name]
    parts = {
        f"{part}_config": dict(fields)
        for part, fields in (("text", tiny.text), ("vision", tiny.vision))
        if fields is not None
    }
    config = getattr(transformers, tiny.config)(**tiny.fields, **parts)
    model = getattr(transformers, tiny.model)(config)
    _randomise(model, seed=seed)
    return model.eval(), _processor(tiny, config)


def _processor(tiny: Tiny, config: Any) -> Any:
    if tiny.family == "siglip_vision":
        return transformers.SiglipImageProcessor(size={"height": TILE, "width": TILE})
    if tiny.family == "llava_next":
        return _llava_next_processor(config)
    if tiny.family == "mistral3":
        return _pixtral_processor()
    return build_tokenizer(max_length=MAX_LENGTH)


def _llava_next_processor(config: Any) -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tokenizer = build_tokenizer(max_length=MAX_LENGTH)
    return transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )


def _pixtral_processor() -> Any:
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 8 * PATCH}, patch_size={"height": 2 * PATCH, "width": 2 * PATCH}
    )
    token, line_break, end = PIXTRAL
    tokenizer = build_tokenizer(image_token=token, max_length=MAX_LENGTH)
    return transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
        image_token=token,
        image_break_token=line_break,
        image_end_token=end,
    )


def _draw_weight(name: str, noise: Tensor) -> Tensor:
    """Return a weight made of unit normal noise of its shape: none is zero or constant."""
    if name.endswith("A_log"):
        return torch.arange(1, len(noise) + 1).float().log() + 0.1 * noise
    if name.endswith(("bias", "sinks")):
        return 0.5 * noise
    if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
        return 0.5 * noise
    if noise.ndim == 1:
        return 1.0 + 0.2 * noise
    if noise.ndim == 3 and "experts" in name:
        # (experts, in, out) of GPT-OSS, whose real weights are numbers of MXFP4.
        scale: int = round(math.log2(math.sqrt(noise.shape[1]) / 1.5))
        return _nearest_fp4(noise) / 2.0**scale
    return noise * (1.5 / math.sqrt(noise[0].numel()))


def _nearest_fp4(noise: Tensor) -> Tensor:
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (noise.abs()[..., None] - numbers).abs().argmin(-1)
    return numbers[nearest] * noise.sign()


@torch.no_grad()
def _randomise(model: torch.nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw_weight(name, torch.randn(parameter.shape, generator=generator)))
    for name, module in model.named_modules():
        # The padding token's position is never trained: it is zero in every real checkpoint.
        if "position" in name and getattr(module, "padding_idx", None) is not None:
            module.weight[module.padding_idx] = 0.0
