"""From an image to the tiles that Idefics3 sees, with pillow and numpy alone.

Bit for bit what transformers.models.idefics3.image_processing_idefics3 computes (4.51), quirks
included: it guesses the layout of an image from its shape alone, so pictures of 1, 3 or 4 pixels'
height are read as channels first; and it resizes pictures of one channel in palette mode, that is by
nearest neighbour.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_MAX_IMAGE_SIZE = 4096  # pixels: transformers' absolute maximum of a resized side
_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class _Picture:
    """Pixels (height, width, channels), and whether transformers holds them channels first."""

    pixels: Pixels
    channels_first: bool

    def resized(self, height: int, width: int, resample: int) -> "_Picture":
        tall, wide, channels = self.pixels.shape
        # transformers looks at the last axis of the array, whichever axis that is
        as_palette = (wide if self.channels_first else channels) == 1
        image = _to_image(self.pixels, as_palette=as_palette)
        pixels = np.array(image.resize((width, height), resample=resample))
        return _Picture(pixels.reshape(height, width, channels), self.channels_first)


def _to_image(pixels: Pixels, *, as_palette: bool = False) -> Image.Image:
    height, width, channels = pixels.shape
    if as_palette:
        if channels != 1:
            raise ValueError(
                f"cannot read {channels} channels of {width}x{height} pixels as palette indices"
            )
        return Image.frombytes("P", (width, height), pixels.tobytes())
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _to_bytes(array: NDArray[Any]) -> Pixels:
    """Return an image's values as bytes; refuse values that a byte cannot hold."""
    if array.dtype == np.uint8:
        return array
    if not (0 <= array.min() and array.max() <= 255):
        raise ValueError(f"pixels from {array.min()} to {array.max()} do not fit into a byte")
    return array.astype(np.uint8)


def _read(image: Image.Image) -> _Picture:
    array = _to_bytes(np.array(image))
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[0] in _CHANNELS:
        return _Picture(array.transpose(1, 2, 0), channels_first=True)
    if array.shape[2] in _CHANNELS:
        return _Picture(array, channels_first=False)
    raise ValueError(f"cannot tell the channels of an image of mode {image.mode}")


def _fit_longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """Scale to a longest edge, the other one rounded down and made even."""
    aspect_ratio = width / height
    if width >= height:
        width, height = longest, int(longest / aspect_ratio)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect_ratio)
        width += width % 2
    return max(height, 1), max(width, 1)


def _fit_below(height: int, width: int, limit: int) -> tuple[int, int]:
    """Scale down to an edge of at most `limit` pixels."""
    aspect_ratio = width / height
    if width >= height and width > limit:
        width, height = limit, int(limit / aspect_ratio)
    elif height > width and height > limit:
        height, width = limit, int(limit * aspect_ratio)
    return max(height, 1), max(width, 1)


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _fit_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """Round both edges up to whole tiles, the longer one first."""
    aspect_ratio = width / height
    if width >= height:
        width = _round_up(width, side)
        height = _round_up(int(width / aspect_ratio), side)
    else:
        height = _round_up(height, side)
        width = _round_up(int(height * aspect_ratio), side)
    return height, width


class Idefics3ImagePreprocessor:
    """Resizes, cuts into tiles, and normalizes as preprocessor_config.json says."""

    def __init__(self, config: dict[str, Any]):
        self.do_resize = config.get("do_resize", True)
        self.do_image_splitting = config.get("do_image_splitting", True)
        self.do_convert_rgb = config.get("do_convert_rgb", True)
        self.do_rescale = config.get("do_rescale", True)
        self.do_normalize = config.get("do_normalize", True)
        self.longest_edge = config["size"]["longest_edge"]
        self.tile = config["max_image_size"]["longest_edge"]
        self.resample = config.get("resample", Image.Resampling.LANCZOS)
        self.rescale_factor = config.get("rescale_factor", 1 / 255)
        self.mean = np.array(config["image_mean"], dtype=np.float32)
        self.std = np.array(config["image_std"], dtype=np.float32)

    def preprocess(self, image: Image.Image) -> dict[str, Any]:
        """Return `pixel_values` (1, tiles, 3, tile, tile) float32, the whole image last.

        With it come `pixel_attention_mask` (1, tiles, tile, tile) int64, all ones since tiles are
        never padded, and `num_patches`, the number of tiles.
        """
        palette = image.getpalette() if image.mode == "P" else None
        picture = _read(image)
        if self.do_resize:
            size = _fit_longest_edge(*picture.pixels.shape[:2], self.longest_edge)
            picture = picture.resized(*_fit_below(*size, _MAX_IMAGE_SIZE), self.resample)
        tiles = self._tiles(picture)
        values = np.stack([self._normalize(self._to_rgb(t, palette)) for t in tiles])
        pixels = torch.from_numpy(values.transpose(0, 3, 1, 2).copy())[None]
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones_like(pixels[:, :, 0], dtype=torch.int64),
            "num_patches": pixels.shape[1],
        }

    def _tiles(self, picture: _Picture) -> list[Pixels]:
        side = self.tile
        if not self.do_image_splitting:
            return [picture.resized(side, side, self.resample).pixels]
        height, width = _fit_tiles(*picture.pixels.shape[:2], side)
        picture = picture.resized(height, width, self.resample)
        if height <= side and width <= side:
            return [picture.pixels]
        tiles = [
            picture.pixels[top : top + side, left : left + side]
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
        return [*tiles, picture.resized(side, side, self.resample).pixels]

    def _to_rgb(self, pixels: Pixels, palette: Any) -> Pixels:
        """Lay a tile on white and drop its transparency."""
        if not self.do_convert_rgb:
            return pixels
        image = _to_image(pixels, as_palette=palette is not None)
        if palette is not None:
            image.putpalette(palette)
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255))
        return np.array(Image.alpha_composite(white, opaque).convert("RGB"))

    def _normalize(self, pixels: Pixels) -> NDArray[np.float32]:
        values = pixels.astype(np.float32)
        if self.do_rescale:
            # in float64, as transformers does: the float32 product differs in the last place
            values = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        return (values - self.mean) / self.std if self.do_normalize else values


def load_own_preprocessor(
    checkpoint: Union[str, os.PathLike],
) -> Idefics3ImagePreprocessor:
    """Read a checkpoint folder's preprocessor_config.json."""
    text = (Path(checkpoint) / "preprocessor_config.json").read_text(encoding="utf-8")
    return Idefics3ImagePreprocessor(json.loads(text))
