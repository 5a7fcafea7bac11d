"""Idefics3: FMS's SigLIP, a pixel-shuffle connector and FMS's LLaMA.

Reference: transformers.models.idefics3. The interface is the one of FMS's pull request 503 at
2603441a; the code is not.
"""

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
import torch.nn as nn

from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.models.llama import LLaMA, LLaMAConfig
from fms.models.siglip_vision import SiglipVision, SiglipVisionConfig
from fms.utils.config import ModelConfig
from fms.utils.generation import generate

from .connector import Idefics3Connector
from .pack import pack_image_embeddings

_smolvlm_256m_vision_config = SiglipVisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    nlayers=12,
    nheads=12,
    image_size=512,
    patch_size=16,
    use_navit_position_buckets=True,
)

_smolvlm_256m_text_config = LLaMAConfig(
    src_vocab_size=49280,
    emb_dim=576,
    norm_eps=1e-5,
    nheads=9,
    kvheads=3,
    nlayers=30,
    pad_id=0,
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
    image_span_len: int = 64
    connector_scale: int = 4
    max_new_tokens: int = 64


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
        self.distributed_strategy = distributed_strategy
        vision, text = self.config.vision_config, self.config.text_config
        self.vision_tower = SiglipVision(vision, distributed_strategy)
        self.connector = Idefics3Connector(
            vision.hidden_size, text.emb_dim, self.config.connector_scale
        )
        self.text_model = LLaMA(text, distributed_strategy)

    @classmethod
    def from_config(cls, config: Idefics3Config) -> "Idefics3":
        return cls(config)

    def get_config(self) -> Idefics3Config:
        return self.config

    def reset_parameters(self):
        base = self.vision_tower.base_model
        base.embeddings.reset_parameters()
        base.encoder.reset_parameters()
        base.post_layernorm.reset_parameters()
        self.vision_tower.head.reset_parameters()
        nn.init.xavier_uniform_(self.connector.proj.weight)
        self.text_model.reset_parameters()

    def post_init(self):
        self.vision_tower.post_init()
        self.text_model.post_init()

    def _patch_mask(
        self, pixel_attention_mask: Optional[torch.Tensor]
    ) -> Optional[torch.Tensor]:
        """Return which patches have a real pixel, (tiles, grid, grid) bool.

        pixel_attention_mask: (rows, tiles, H, W), or (rows, H, W) for one tile in each row.
        """
        if pixel_attention_mask is None:
            return None
        side = self.config.vision_config.patch_size
        real = pixel_attention_mask.flatten(0, -3).bool()
        return real.unfold(1, side, side).unfold(2, side, side).flatten(-2).any(-1)

    def _embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: Optional[torch.Tensor],
        pixel_attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return embeddings (rows, length, width) with image tokens in their places.

        pixel_values: (rows, tiles, 3, H, W), or (rows, 3, H, W) for one tile in each row; a row's
        tiles are in the order of their places in its prompt.
        """
        embeddings = self.text_model.base_model.embedding(input_ids)
        if pixel_values is None:
            return embeddings
        features, _ = self.vision_tower(
            pixel_values.flatten(0, -4),
            patch_attention_mask=self._patch_mask(pixel_attention_mask),
        )
        grid = math.isqrt(features.shape[1])
        tokens = self.connector(features, H=grid, W=grid)
        return pack_image_embeddings(
            input_ids,
            embeddings,
            tokens.view(len(input_ids), -1, *tokens.shape[1:]),
            image_token_id=self.config.image_token_id,
            expected_L=self.config.image_span_len,
        )

    @staticmethod
    def _attention_kwargs(attention_mask: torch.Tensor) -> MutableMapping[str, Any]:
        """Return mask (rows, length, length) and position_ids (rows, length).

        As in pad_input_ids, padding attends to padding: a row that attends to nothing would be NaN.
        """
        real = attention_mask.bool()
        mask = (real.unsqueeze(-1) == real.unsqueeze(-2)).tril()
        return {
            "mask": torch.where(mask, 0.0, -torch.inf),
            "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: Optional[torch.Tensor] = None,
        past_key_value_states: Optional[list] = None,
        use_cache: bool = False,
        pixel_values: Optional[torch.Tensor] = None,
        pixel_attention_mask: Optional[torch.Tensor] = None,
        images: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        inputs: Optional[torch.Tensor] = None,
        **attn_kwargs,
    ):
        """Return logits (rows, length, vocabulary); with use_cache (logits, cache).

        input_ids: (rows, length) int64, or embeddings (rows, length, width). images is another
        name of pixel_values, inputs are embeddings in place of those of input_ids.
        """
        pixel_values = pixel_values if images is None else images
        if inputs is not None or input_ids.dim() == 3:
            embeddings = input_ids if inputs is None else inputs
        else:
            embeddings = self._embed(input_ids, pixel_values, pixel_attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(
                embeddings.shape[:2], dtype=torch.int64, device=embeddings.device
            )
        own = self._attention_kwargs(attention_mask)
        attn_kwargs.setdefault("mask", own["mask"])
        hidden, cache = self.text_model.base_model(
            None,
            inputs_embeds=embeddings,
            position_ids=own["position_ids"] if position_ids is None else position_ids,
            past_key_value_states=past_key_value_states,
            use_cache=use_cache,
            **attn_kwargs,
        )
        logits = self.text_model.head(hidden)
        return (logits, cache) if use_cache else logits

    def prepare_inputs_for_generation(self, iteration: int, input_ids, kwargs):
        """Return the embeddings of a prompt with its images, or of new tokens."""
        names = ("pixel_values", "pixel_attention_mask")
        images = {name: kwargs.pop(name, None) for name in names}
        if iteration > 0:
            images = dict.fromkeys(names)
        return self._embed(input_ids, **images), kwargs

    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: Optional[torch.Tensor] = None,
        pixel_attention_mask: Optional[torch.Tensor] = None,
        images: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        max_new_tokens: int = 20,
        eos_token_id: Union[int, Sequence[int], None] = None,
        **unused,
    ) -> torch.Tensor:
        """Return the prompts' ids and the greedy new ones, (rows, length + new)."""
        pixel_values = pixel_values if images is None else images
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        def embed_prompt(iteration: int, ids: torch.Tensor, kwargs: Any) -> Any:
            pixels = pixel_values if iteration == 0 else None
            return self._embed(ids, pixels, pixel_attention_mask), kwargs

        ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
        # FMS's generate knows one end token, and stops a batch at the first row that ends.
        stop = ends[0] if len(ends) == 1 and len(input_ids) == 1 else None
        ids = generate(
            self,
            input_ids,
            max_seq_len=self.config.text_config.max_expected_seq_len,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop,
            prepare_model_inputs_hook=embed_prompt,
            extra_kwargs=self._attention_kwargs(attention_mask),
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
