"""Turn recipes into tensors with the checkpoint's own tokenizer and image processor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.recipes import IMAGE_TOKEN, CaseRecipe
from snapshot_tool.families.family import Family

_TILED_BATCH = 5  # dimensions: images, tiles, channels, height, width


@dataclass(frozen=True, slots=True)
class Preparation:
    """Turns prompts and images of a family into tensors.

    Args:
        processor: transformers' processor; for families without images a tokenizer, for those
            without text an image processor.
        pad_token_id: the id that pads prompts.
        token_types: the number of token types of the model.
    """

    family: Family
    processor: Any
    pad_token_id: int
    token_types: int = 1

    @staticmethod
    def load(family: Family, checkpoint: Path, *, trusts_code: bool = False) -> Any:
        """Return the processor of a checkpoint's folder."""
        kind = "AutoProcessor" if family.takes_images else "AutoTokenizer"
        if not family.takes_text:
            kind = "AutoImageProcessor"
        return getattr(transformers, kind).from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=trusts_code
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which a processor contains."""
        return getattr(self.processor, "tokenizer", self.processor)

    def chat_text(self, prompt: str) -> str:
        """Return the prompt as one user turn of the checkpoint's chat template."""
        content: list[dict[str, str]] = []
        for index, piece in enumerate(prompt.split(IMAGE_TOKEN)):
            if index:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        turn = {"role": "user", "content": content if self.family.takes_images else prompt}
        return str(
            self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        )

    def encode(self, recipe: CaseRecipe, text: str, images: Sequence[Image.Image]) -> CaseInputs:
        """Return the tensors; raise the libraries' own errors for an input that they refuse.

        text: the recipe's prompt, by the chat template if there is one.
        """
        batch = self._batch(text, recipe.second, images)
        ids = batch.get("input_ids", torch.zeros((1, 0), dtype=torch.int64))
        if self.family.takes_text and ids.shape[1] == 0:
            raise ValueError("the prompt has no tokens")
        mask = batch.get("attention_mask", torch.ones_like(ids))
        types = None
        if recipe.second and self.token_types > 1:
            types = batch.get("token_type_ids")
            if types is None:  # not returned by this tokenizer, but known to it
                types = torch.tensor([[int(text or 0) for text in batch.sequence_ids(0)]])

        def padded(row: torch.Tensor, value: int) -> torch.Tensor:
            left, right = recipe.left_padding, recipe.right_padding
            return torch.nn.functional.pad(row, (left, right), value=value)

        pixel_mask, sizes = batch.get("pixel_attention_mask"), batch.get("image_sizes")
        return CaseInputs(
            padded(ids, self.pad_token_id),
            padded(mask, 0),
            self._tiles(batch.get("pixel_values"), images),
            None if pixel_mask is None else pixel_mask[0].to(torch.bool).contiguous(),
            None if sizes is None else torch.as_tensor(sizes, dtype=torch.int64),
            None if types is None else padded(types, 0),
        )

    def image_grids(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return rows and columns of tiles, (images, 2) int64; zeros if they are not known."""
        grids = torch.zeros((len(images), 2), dtype=torch.int64)
        if not images:
            return grids
        processor = self._image_processor
        parameters = inspect.signature(processor.preprocess).parameters
        # transformers 5 declares the arguments of its image processors as a TypedDict.
        declared = getattr(getattr(processor, "valid_kwargs", None), "__annotations__", {})
        if "return_row_col_info" not in {*parameters, *declared}:
            return grids
        answer = processor(list(images), return_row_col_info=True)
        return torch.tensor([answer["rows"][0], answer["cols"][0]]).T.contiguous()

    @property
    def _image_processor(self) -> Any:
        return getattr(self.processor, "image_processor", self.processor)

    def _batch(self, text: str, second: str, images: Sequence[Image.Image]) -> Any:
        if not self.family.takes_text:
            return self.processor(list(images), return_tensors="pt")
        if not self.family.takes_images:
            return self.processor(text, second or None, return_tensors="pt")
        # An empty list of images is not "no images" to every processor.
        pictures = {"images": list(images)} if images else {}
        # Recipes have one placeholder for all families.
        own = str(getattr(self.processor, "image_token", IMAGE_TOKEN))
        return self.processor(text=text.replace(IMAGE_TOKEN, own), return_tensors="pt", **pictures)

    def _tiles(self, pixels: Any, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """Return the tiles of all images, without those that fill up a batch."""
        if pixels is None:
            return None
        if pixels.dim() == _TILED_BATCH:
            counts = [pixels.shape[1]]
            if len(pixels) > 1:
                single = [self._image_processor(i, return_tensors="pt") for i in images]
                counts = [one["pixel_values"].shape[1] for one in single]
            pixels = torch.cat([row[:n] for row, n in zip(pixels, counts, strict=True)])
        tiles: torch.Tensor = pixels.to(torch.float32).contiguous()
        return tiles
