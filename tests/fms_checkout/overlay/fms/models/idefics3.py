"""Idefics3 (SmolVLM): a SigLIP vision encoder, a pixel-shuffle connector and a LLaMA decoder.

Reference: transformers.models.idefics3. Only the connector and the merging of image features into
the text are new here; encoder, decoder, generation and weight adapters are FMS's own.
"""

import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
import torch.nn as nn

from fms import models
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.models import llama, siglip_vision
from fms.models.idefics3_preprocessing import load_smolvlm_preprocessor
from fms.models.llama import LLaMA, LLaMAConfig
from fms.models.siglip_vision import SiglipVisionConfig, SiglipVisionHeadless
from fms.utils import serialization
from fms.utils.config import ModelConfig
from fms.utils.generation import generate

__all__ = ["Idefics3", "Idefics3Config", "load_smolvlm_preprocessor"]

logger = logging.getLogger(__name__)

_smolvlm_256m_vision_config = SiglipVisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    nlayers=12,
    nheads=12,
    image_size=512,
    patch_size=16,
)

_smolvlm_256m_text_config = LLaMAConfig(
    src_vocab_size=49280,
    emb_dim=576,
    norm_eps=1e-5,
    nheads=9,
    kvheads=3,
    nlayers=30,
    hidden_grow_factor=1536 / 576,
    multiple_of=1,
    max_expected_seq_len=8192,
    rope_theta=100_000.0,
)


@dataclass
class Idefics3Config(ModelConfig):
    # Defaults to SmolVLM-256M-Instruct
    vision_config: SiglipVisionConfig = field(
        default_factory=lambda: _smolvlm_256m_vision_config
    )
    text_config: LLaMAConfig = field(default_factory=lambda: _smolvlm_256m_text_config)
    image_token_id: int = 49190
    scale_factor: int = 4
    fused_weights: bool = True


class TokenOrFeatureEmbedding(nn.Embedding):
    """An embedding that lets through what is embedded already.

    LLaMA's forward embeds whatever it is given; a prompt with images arrives as embeddings.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed ids (batch, length); return features (batch, length, width) as they are."""
        return x if x.is_floating_point() else super().forward(x)


class Idefics3SimpleMLP(nn.Module):
    """The connector's one projection."""

    def __init__(self, config: Idefics3Config):
        super().__init__()
        in_features = config.vision_config.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(in_features, config.text_config.emb_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Idefics3Connector(nn.Module):
    """Pixel shuffle: each square of scale x scale patches becomes one token of the text model."""

    def __init__(self, config: Idefics3Config):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.modality_projection = Idefics3SimpleMLP(config)

    def pixel_shuffle(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Turn (tiles, H * W, width) into (tiles, H * W / scale**2, width * scale**2)."""
        tiles, _, width = x.shape
        scale = self.scale_factor
        # reshape, not view: the encoder's output is not contiguous
        x = x.reshape(tiles, H // scale, scale, W // scale, scale, width)
        x = x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(tiles, (H // scale) * (W // scale), width * scale**2)

    def forward(self, features: torch.Tensor, H: int, W: int) -> torch.Tensor:
        """Return the tokens (tiles, tokens, text width) of features on a grid of H x W patches."""
        return self.modality_projection(self.pixel_shuffle(features, H, W))


class Idefics3(nn.Module):
    def __init__(
        self,
        config: Optional[Idefics3Config] = None,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
        **kwargs,
    ):
        super().__init__()
        self.config = (config if config is not None else Idefics3Config()).updated(
            **kwargs
        )
        if not self.config.fused_weights:
            self.config.text_config.fused_weights = False
            self.config.vision_config.fused_weights = False
        self.distributed_strategy = distributed_strategy

        self.vision_tower = SiglipVisionHeadless(
            self.config.vision_config, distributed_strategy
        )
        self.connector = Idefics3Connector(self.config)
        self.text_model = LLaMA(self.config.text_config, distributed_strategy)
        text = self.config.text_config
        self.text_model.base_model.embedding = TokenOrFeatureEmbedding(
            text.src_vocab_size, text.emb_dim, text.pad_id
        )

    @classmethod
    def from_config(cls, config: Idefics3Config) -> "Idefics3":
        return cls(config)

    def get_config(self) -> Idefics3Config:
        return self.config

    @property
    def grid(self) -> int:
        """Patches on a side of a tile."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def reset_parameters(self):
        self.vision_tower.embeddings.reset_parameters()
        self.vision_tower.encoder.reset_parameters()
        self.vision_tower.post_layernorm.reset_parameters()
        nn.init.xavier_uniform_(self.connector.modality_projection.proj.weight)
        self.text_model.reset_parameters()

    def post_init(self):
        self.vision_tower.post_init()
        self.text_model.post_init()

    def _embed(
        self, input_ids: torch.Tensor, pixel_values: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """Return embeddings (batch, length, width) with image tokens in their places.

        pixel_values: (tiles, 3, H, W) or (batch, tiles, 3, H, W), the tiles in the order of their
        places in the prompts.
        """
        embeddings = self.text_model.base_model.embedding(input_ids)
        if pixel_values is None:
            return embeddings
        features, _ = self.vision_tower(pixel_values.flatten(0, -4))
        tokens = self.connector(features, H=self.grid, W=self.grid).flatten(0, 1)
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != len(tokens):
            raise ValueError(
                f"the prompts have {int(places.sum())} image tokens, the images make {len(tokens)}"
            )
        merged = embeddings.clone()
        merged[places] = tokens.to(embeddings.dtype)
        return merged

    @staticmethod
    def _attention_kwargs(
        attention_mask: Optional[torch.Tensor], new: int
    ) -> MutableMapping[str, Any]:
        """Return mask (batch, new, length) and position_ids (batch, new) of the last `new` tokens.

        Empty without padding and cache: attention is then causal by itself. As in pad_input_ids,
        padding attends to padding, since a row that attends to nothing would be NaN.
        """
        if attention_mask is None:
            return {}
        if bool(attention_mask.all()) and new == attention_mask.shape[1]:
            return {}
        real = attention_mask.bool()
        mask = (real.unsqueeze(-1) == real.unsqueeze(-2)).tril()
        return {
            "mask": torch.where(mask, 0.0, -torch.inf)[:, -new:],
            "position_ids": (real.cumsum(-1) - 1).clamp(min=0)[:, -new:],
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        past_key_value_states: Optional[Sequence[Any]] = None,
        use_cache: bool = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Return {"logits": (batch, length, vocabulary)}; with use_cache past_key_value_states too.

        attention_mask: of what is in past_key_value_states and of input_ids after it.
        """
        output = self.text_model(
            self._embed(input_ids, pixel_values),
            past_key_value_states=past_key_value_states,
            use_cache=use_cache,
            **self._attention_kwargs(attention_mask, input_ids.shape[1]),
            **kwargs,
        )
        if not use_cache:
            return {"logits": output}
        logits, cache = output
        return {"logits": logits, "past_key_value_states": cache}

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        max_new_tokens: int = 256,
        eos_token_id: Union[int, Sequence[int], None] = None,
    ) -> torch.Tensor:
        """Return the prompts' ids and the greedy new ones, (batch, length + new)."""

        def embed_prompt(iteration: int, ids: torch.Tensor, kwargs: Any) -> Any:
            return (self._embed(ids, pixel_values) if iteration == 0 else ids), kwargs

        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        # FMS's generate knows one end token, and stops a batch at the first row that ends.
        stop = ends[0] if len(ends) == 1 and len(input_ids) == 1 else None
        ids = generate(
            self.text_model,
            input_ids,
            max_seq_len=self.config.text_config.max_expected_seq_len,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop,
            prepare_model_inputs_hook=embed_prompt,
            extra_kwargs=self._attention_kwargs(attention_mask, input_ids.shape[1]),
        )
        return self._end_rows(ids, input_ids.shape[1], ends)

    @staticmethod
    def _end_rows(
        ids: torch.Tensor, prompt_length: int, ends: Sequence[int]
    ) -> torch.Tensor:
        """Repeat each row's end token after its first one, and cut what no row needs."""
        if not ends:
            return ids
        new = ids[:, prompt_length:]
        ended = torch.isin(new, torch.tensor(list(ends), device=ids.device))
        after = ended.cumsum(-1) - ended.int() > 0
        new = torch.where(after, ends[0], new)
        longest = int((~after).sum(-1).max()) if new.shape[1] else 0
        return torch.cat((ids[:, :prompt_length], new[:, :longest]), dim=-1)


_architecture_name = "idefics3"


def _idefics3_factory_factory(config):
    def factory(**kwargs):
        return Idefics3(config, **kwargs)

    return factory


models.register_model(
    _architecture_name, "smolvlm_256m", _idefics3_factory_factory(Idefics3Config())
)


_HF_VISION = "model.vision_model."
_HF_TEXT = "model.text_model."
_TEXT = "text_model."


def _hf_to_fms_names(input_sd: Mapping[str, Any], **kwargs) -> Mapping[str, Any]:
    """Rename by SigLIP's and LLaMA's own rules, each in its part of the model."""
    new_sd: dict[str, Any] = {}
    for name, param in input_sd.items():
        if name.startswith(_HF_VISION):
            (renamed,) = siglip_vision._hf_to_fms_names(
                {name.removeprefix("model."): param}
            )
            renamed = "vision_tower." + renamed.removeprefix("base_model.")
        elif name.startswith(_HF_TEXT) or name.startswith("lm_head."):
            hf_llama_name = re.sub(f"^{re.escape(_HF_TEXT)}", "model.", name)
            (renamed,) = llama._hf_to_fms_names({hf_llama_name: param})
            renamed = _TEXT + renamed
        else:
            renamed = name.removeprefix("model.")
        new_sd[renamed] = param
    return new_sd


def _hf_to_fms_rope(
    input_sd: Mapping[str, Any],
    model_config: Optional[Idefics3Config] = None,
    **kwargs,
) -> Mapping[str, Any]:
    """Reorder the text model's query and key weights as LLaMA's adapter does."""
    text_sd = {
        name.removeprefix(_TEXT): param
        for name, param in input_sd.items()
        if name.startswith(_TEXT)
    }
    text_config = model_config.text_config if model_config else None
    turned = llama._hf_to_fms_rope(text_sd, text_config, **kwargs)
    return {**input_sd, **{_TEXT + name: param for name, param in turned.items()}}


def _weight_fusion(
    input_sd: Mapping[str, Any],
    model_config: Optional[Idefics3Config] = None,
    **kwargs,
) -> Mapping[str, Any]:
    if model_config is not None and not model_config.fused_weights:
        return input_sd
    return serialization._mlp_glu_unfused_to_fused_adapter_step(
        serialization._attn_unfused_to_fused_step(input_sd)
    )


serialization.register_adapter_step(
    _architecture_name, "hf_to_fms_names", _hf_to_fms_names
)
serialization.register_adapter_step(
    _architecture_name, "hf_to_fms_rope", _hf_to_fms_rope
)
serialization.register_adapter_step(_architecture_name, "weight_fusion", _weight_fusion)
serialization.register_adapter(
    _architecture_name, "hf", ["hf_to_fms_names", "hf_to_fms_rope", "weight_fusion"]
)
