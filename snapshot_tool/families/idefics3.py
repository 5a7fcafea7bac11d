"""Idefics3 (SmolVLM): a SigLIP encoder, a pixel-shuffle connector and a Llama decoder.

Hugging Face: transformers.models.idefics3. FMS: fms.models.idefics3, on a branch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snapshot_tool.core.errors import PhaseUnsupported
from snapshot_tool.core.interfaces import CaseInputs
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.taps import Side
from snapshot_tool.families.family import Capture, Family, FmsPort, Twin
from snapshot_tool.families.fms_calls import (
    FmsCalls,
    LoadedFms,
    cut_after_end,
    cut_filled,
    join_rows,
)
from snapshot_tool.families.llama import decoder_twins, llama_config
from snapshot_tool.families.siglip_vision import VISION_OUTPUT, siglip_config, siglip_twins

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONNECTOR_OUTPUT = "image_hidden_states"


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's Idefics3Config, SiglipVisionConfig and LLaMAConfig."""
    return {
        "vision_config": siglip_config(config["vision_config"]),
        "text_config": llama_config(config["text_config"]),
        "image_token_id": config["image_token_id"],
        "scale_factor": config["scale_factor"],
    }


class _Calls(FmsCalls):
    """The interface of fms.models.idefics3."""

    def __init__(self, loaded: LoadedFms) -> None:
        super().__init__(loaded)
        vision = loaded.config["vision_config"]
        self.grid = vision["image_size"] // vision["patch_size"]
        self.preprocessor = loaded.module.load_smolvlm_preprocessor(str(loaded.checkpoint))

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return the tiles of all images, (tiles, channels, height, width)."""
        import torch

        batches = [self.preprocessor.preprocess(image)["pixel_values"] for image in images]
        return {"pixel_values": torch.cat([batch.flatten(0, -4) for batch in batches])}

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the encoder's last hidden state, (tiles, patches, width)."""
        features: torch.Tensor = self.model.vision_tower(pixel_values)[0]
        return features

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return the text model's image tokens, (tiles, tokens, width)."""
        tokens: torch.Tensor = self.model.connector(features, H=self.grid, W=self.grid)
        return tokens

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        logits: torch.Tensor = self.model(**self._arguments(inputs))["logits"]
        return logits

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        ids = self.model.generate(
            **self._arguments(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_ids[0] if len(eos_token_ids) == 1 else None,
        )
        new: torch.Tensor = ids[0, inputs.input_ids.shape[1] :]
        # FMS's generate knows one end token: with several it runs on, and is cut here.
        return cut_after_end(new, eos_token_ids) if len(eos_token_ids) > 1 else new

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        return self.forward(join_rows(rows))

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it."""
        import torch

        logits, cache = [], None
        for part in parts:
            answer = self.model(
                **self._arguments(part), past_key_value_states=cache, use_cache=True
            )
            if "past_key_value_states" not in answer:
                raise PhaseUnsupported("this FMS's forward gives out no key-value cache")
            cache = answer["past_key_value_states"]
            logits.append(answer["logits"])
        return torch.cat(logits, dim=1)

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        end = eos_token_ids[0] if len(eos_token_ids) == 1 else None
        ids = self.model.generate(
            **self._arguments(join_rows(rows)), max_new_tokens=max_new_tokens, eos_token_id=end
        )
        rows_new = ids[:, rows[0].input_ids.shape[1] :]
        if end is None:
            return [cut_after_end(new, eos_token_ids) for new in rows_new]
        pad = self.loaded.config.get("pad_token_id")
        filler = [] if pad is None else [pad]
        return [cut_filled(new, end, filler=filler) for new in rows_new]

    def _arguments(self, inputs: CaseInputs) -> dict[str, torch.Tensor | None]:
        pixels = inputs.pixel_values
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "pixel_values": None if pixels is None else pixels.unsqueeze(0),
        }


IDEFICS3 = Family(
    name="idefics3",
    hf_class="Idefics3ForConditionalGeneration",
    phases=PHASES,
    captures=(
        Capture(Phase.VISION, VISION_OUTPUT, "model.vision_model", Side.OUTPUT),
        # Kept since transformers changed how it computes them: 4.57 is off by one in float32.
        Capture(
            Phase.VISION,
            "position_ids",
            "model.vision_model.embeddings.position_embedding",
            Side.INPUT,
            judged=False,
        ),
        Capture(Phase.CONNECTOR, CONNECTOR_OUTPUT, "model.connector", Side.OUTPUT),
    ),
    compared={Phase.VISION: VISION_OUTPUT, Phase.CONNECTOR: CONNECTOR_OUTPUT},
    pixel_dims=5,
    tile_id_field="image_token_id",
    fms=FmsPort(
        "idefics3",
        _fms_config,
        _Calls,
        (
            *siglip_twins("vision_tower", "model.vision_model"),
            Twin(r"connector((?:\..+)?)", r"model.connector\1"),
            *decoder_twins("text_model.base_model", "model.text_model", fms_head="text_model.head"),
        ),
        aliases={
            "image_token_id": ("image_token_index",),
            "scale_factor": ("pixel_shuffle_factor",),
        },
        config_class="Idefics3Config",
        encoder="vision_tower",
        tiles_apart=True,
        decoder="text_model",
    ),
)
