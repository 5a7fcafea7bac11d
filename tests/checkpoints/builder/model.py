"""Idefics3 models: their shapes, their processor, and weights of which none is zero or tiny."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
)
from transformers.image_utils import PILImageResampling

from builder.tokenizer import BOS, CHAT_TEMPLATE, END_OF_UTTERANCE, IMAGE_TOKEN, PAD

FEATURE_GAIN = 4.0


@dataclass(frozen=True)
class Shapes:
    """The shapes of an Idefics3, in the words of transformers' Idefics3Config.

    longest_edge is that of an image in pixels, before it is cut into tiles of the vision encoder's
    image_size. end_tokens are those that generation ends with.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    scale_factor: int
    longest_edge: int
    end_tokens: tuple[str, ...] = (END_OF_UTTERANCE,)

    @property
    def image_tokens(self) -> int:
        """Tokens of the text model that one tile becomes."""
        grid = self.vision["image_size"] // self.vision["patch_size"]
        return int(grid // self.scale_factor) ** 2


TINY = Shapes(
    vision={
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    text={
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 4096,
        "vocab_size": 480,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    scale_factor=4,
    longest_edge=128,
)


def build_processor(tokenizer: Any, shapes: Shapes = TINY) -> Any:
    """Return a processor that cuts a 512x512 image into 4x4 tiles and the whole image."""
    image_processor = Idefics3ImageProcessor(
        do_image_splitting=True,
        size={"longest_edge": shapes.longest_edge},
        max_image_size={"longest_edge": shapes.vision["image_size"]},
        resample=PILImageResampling.LANCZOS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(
        image_processor,
        tokenizer,
        image_seq_len=shapes.image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def _config(tokenizer: Any, shapes: Shapes) -> Idefics3Config:
    ids = {
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    return Idefics3Config(
        vision_config=dict(shapes.vision),
        text_config=LlamaConfig(**shapes.text, **ids),
        scale_factor=shapes.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=shapes.text["tie_word_embeddings"],
        torch_dtype="float32",
        **ids,
    )


def _draw_weight(name: str, noise: Tensor) -> Tensor:
    """Return the first values of a weight, made of unit normal noise of its shape.

    The vision encoder's biases, positions and attention are larger than training needs: each must
    move the features beyond the vision tolerance when it alone is 1 % off, on a smooth gradient,
    whose patches differ in little but their position.
    """
    attends = "vision_model" in name and "self_attn" in name
    if name.endswith("bias"):
        return (1.0 if "q_proj" in name else 0.5) * noise
    if "position_embedding" in name:
        return noise
    if "embed_tokens" in name:
        return 0.5 * noise
    if noise.ndim == 1:
        return 1.0 + 0.2 * noise
    fan_in = noise[0].numel()
    return noise * ((1.5 if attends else 1.0) / math.sqrt(fan_in))


@torch.no_grad()
def _randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every weight anew.

    HF's own initialisation leaves biases at 0, norms at 1 and the padding row at 0: a port that
    forgot one of them would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_draw_weight(name, torch.randn(parameter.shape, generator=generator)))


def build_model(tokenizer: Any, shapes: Shapes = TINY, *, seed: int) -> Any:
    """Return the model with random weights."""
    config = _config(tokenizer, shapes)
    model = Idefics3ForConditionalGeneration(config)
    ends = tokenizer.convert_tokens_to_ids(list(shapes.end_tokens))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=config.pad_token_id,
    )
    _randomise(model, seed=seed)
    return model


@torch.no_grad()
def amplify_features(model: Any) -> None:
    """Make the vision features larger, and the connector's weight smaller by the same factor.

    The vision tolerance is mostly absolute: small features would hide faults. The factor is a power
    of two, so nothing but the features changes, not by one bit. Training with features of this
    size is slower, therefore it comes last.
    """
    norm = model.model.vision_model.post_layernorm
    norm.weight.mul_(FEATURE_GAIN)
    norm.bias.mul_(FEATURE_GAIN)
    model.model.connector.modality_projection.proj.weight.div_(FEATURE_GAIN)
