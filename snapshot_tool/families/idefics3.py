"""Idefics3 (SmolVLM): a SigLIP encoder, a pixel-shuffle connector and a Llama decoder.

Hugging Face: transformers.models.idefics3. FMS: fms.models.idefics3, on a branch of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.families.family import Capture, Config, Family, Fields, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import (
    EndToken,
    FmsCalls,
    LoadedFms,
    cut_after_end,
    cut_filled,
)
from snapshot_tool.families.llama import decoder_pairs, llama_config
from snapshot_tool.families.siglip_vision import VISION_OUTPUT, siglip_config, siglip_pairs

if TYPE_CHECKING:
    import torch
    from PIL import Image

CONNECTOR_OUTPUT = "image_hidden_states"


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's Idefics3Config, SiglipVisionConfig and LLaMAConfig."""
    vision, scale = config["vision_config"], config["scale_factor"]
    grid = vision["image_size"] // vision["patch_size"]
    text = llama_config(config["text_config"])
    pad = config["text_config"].get("pad_token_id")
    return {
        "vision_config": {
            **siglip_config(vision),
            "use_navit_position_buckets": True,  # as Idefics3VisionEmbeddings numbers patches
        },
        # FMS's generate puts it in the place of every padding token: it must be in the vocabulary.
        "text_config": {**text, "pad_id": 0 if pad is None else pad},
        "image_token_id": config["image_token_id"],
        "connector_scale": scale,
        "image_span_len": (grid // scale) ** 2,
    }


class _Calls(FmsCalls):
    """The interface of fms.models.idefics3, as it was in any commit of FMS's pull request 503."""

    def __init__(self, loaded: LoadedFms) -> None:
        super().__init__(loaded)
        vision = loaded.config["vision_config"]
        self.grid = vision["image_size"] // vision["patch_size"]

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return the tiles of all images, (tiles, channels, height, width), and their mask."""
        import torch

        answers = [self._preprocessor.preprocess(image) for image in images]
        names = ("pixel_values", "pixel_attention_mask")
        joined = {
            name: torch.cat([_tiles_of(answer[name], name) for answer in answers])
            for name in names
            if all(name in answer for answer in answers)
        }
        if "pixel_attention_mask" in joined:
            joined["pixel_attention_mask"] = joined["pixel_attention_mask"].bool()
        return joined

    @functools.cached_property
    def _preprocessor(self) -> Any:
        """FMS's preprocessor, which wraps Hugging Face's processor: loaded when it is needed."""
        load = self.loaded.models.idefics3.load_smolvlm_preprocessor
        try:
            return load(str(self.loaded.checkpoint))
        except ImportError as error:
            if importlib.util.find_spec("transformers"):
                raise
            raise PhaseUnsupported(
                "FMS preprocesses with Hugging Face's processor, and transformers is not installed"
            ) from error

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the encoder's last hidden state, (tiles, patches, width)."""
        # FMS has no public method for this step. _encode_images is the one that forward calls (pull
        # request 503, 08a7f5b2 to 2603441a): it decides which patch mask the encoder is given.
        encode = getattr(self.model, "_encode_images", None)
        features: torch.Tensor = (
            encode(pixel_values) if encode else self.model.vision_tower(pixel_values)[0]
        )
        return features

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return the text model's image tokens, (tiles, tokens, width)."""
        tokens: torch.Tensor = self.model.connector(features, H=self.grid, W=self.grid)
        return tokens

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        return _logits(self.model(**self._arguments([inputs])))

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        end = self.end_token(self.model.generate, eos_token_ids)
        new = self._generate([inputs], max_new_tokens, end)[0]
        return cut_after_end(new, eos_token_ids) if end is None else new

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        return _logits(self.model(**self._arguments(rows)))

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it."""
        import torch

        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            raise PhaseUnsupported(
                "FMS's forward takes no position_ids: it cannot go on from a key-value cache"
            )
        logits, cache = [], None
        for part, seen in zip(parts, self.pad_parts(parts), strict=True):
            given = {**self._arguments([part]), **seen, "attention_mask": None}
            answer = self.model(**given, past_key_value_states=cache, use_cache=True)
            cache = _cache(answer)
            logits.append(_logits(answer))
        return torch.cat(logits, dim=1)

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        end = self.end_token(self.model.generate, eos_token_ids)
        rows_new = self._generate(rows, max_new_tokens, end)
        if end is None:
            return [cut_after_end(new, eos_token_ids) for new in rows_new]
        pad = self.loaded.config.get("pad_token_id")
        filler = [] if pad is None else [pad]
        return [cut_filled(new, eos_token_ids, filler=filler) for new in rows_new]

    def _generate(
        self, rows: Sequence[CaseInputs], max_new_tokens: int, end: EndToken
    ) -> torch.Tensor:
        """Return the new tokens of prompts of one length, (rows, new tokens)."""
        ids: torch.Tensor = self.model.generate(
            **self._arguments(rows), max_new_tokens=max_new_tokens, eos_token_id=end
        )
        return ids[:, rows[0].input_ids.shape[1] :]

    def _arguments(self, rows: Sequence[CaseInputs]) -> dict[str, torch.Tensor | None]:
        """Return prompts of one length as FMS's forward and generate take them.

        `pixel_values` are (rows, tiles, channels, height, width). A row with fewer tiles than
        others is filled up; `pixel_attention_mask` is given if it marks such tiles, or if a tile is
        padded: without one, FMS takes all pixels as real.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        given: dict[str, torch.Tensor | None] = {
            "input_ids": torch.cat([row.input_ids for row in rows]),
            "attention_mask": torch.cat([row.attention_mask for row in rows]),
            "pixel_values": None,
        }
        pixels = [row.pixel_values for row in rows]
        some = next((tiles for tiles in pixels if tiles is not None), None)
        if some is None:
            return given
        masks = [_pixel_mask(row, like=some) for row in rows]
        given["pixel_values"] = pad_sequence(
            [some[:0] if tiles is None else tiles for tiles in pixels], batch_first=True
        )
        mask = pad_sequence(masks, batch_first=True)
        taken = inspect.signature(self.model.forward).parameters
        if not bool(mask.all()) and "pixel_attention_mask" in taken:
            given["pixel_attention_mask"] = mask
        return given


def _pixel_mask(row: CaseInputs, *, like: torch.Tensor) -> torch.Tensor:
    """Return which pixels of a row's tiles are real, (tiles, height, width) int64, as HF has it."""
    if row.pixel_attention_mask is not None:
        return row.pixel_attention_mask.long()
    tiles = 0 if row.pixel_values is None else len(row.pixel_values)
    return like.new_ones((tiles, *like.shape[-2:])).long()


def _tiles_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return what a processor gives of one image without the batch that it stands in."""
    return tensor.flatten(0, -4 if name == "pixel_values" else -3)


def _logits(answer: Any) -> torch.Tensor:
    """Return the logits of what FMS's forward answers with: them, or them among others."""
    found = answer["logits"] if isinstance(answer, Mapping) else answer
    logits: torch.Tensor = found[0] if isinstance(found, tuple | list) else found
    return logits


def _cache(answer: Any) -> Any:
    """Return the key-value cache that FMS's forward answers with."""
    named = answer.get("past_key_value_states") if isinstance(answer, Mapping) else None
    cache = answer[1] if isinstance(answer, tuple | list) and len(answer) > 1 else named
    if cache is None:
        raise PhaseUnsupported("FMS's forward returns no key-value cache")
    return cache


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
            *siglip_pairs("vision_tower.base_model", "model.vision_model"),
            ModulePair("connector", "model.connector"),
            ModulePair(r"connector\.proj", "model.connector.modality_projection"),
            ModulePair(r"connector\.proj", "model.connector.modality_projection.proj"),
            *decoder_pairs("text_model.base_model", "model.text_model", fms_head="text_model.head"),
        ),
        # Before 4383c72e FMS numbered whole tiles alone, and as Hugging Face does.
        absent={"use_navit_position_buckets": True},
        encoder="vision_tower",
        tiles_apart=True,
    ),
)
