"""Synthetic images: drawn from a recipe, and kept as plain tensors beside the goldens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snapshot_tool.base.recipes import ImageRecipe

Pixels = NDArray[np.uint8]
# What an image is kept as; PIL's own name for a palette's transparent colour is the last one.
IMAGE_PARTS = ("pixels", "palette", "transparency")
_TRANSPARENT = IMAGE_PARTS[-1]
_CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "P": 1, "1": 1, "CMYK": 4}


def _gradient(width: int, height: int) -> Pixels:
    """Red rises with x, green with y, blue is their mean. Integers are the same everywhere."""
    red = (np.arange(width)[None, :] * 255 // max(1, width - 1)).astype(np.uint16)
    green = (np.arange(height)[:, None] * 255 // max(1, height - 1)).astype(np.uint16)
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = red, green, (red + green) // 2
    return image


def _colour(state: np.random.RandomState) -> tuple[int, int, int]:
    red, green, blue = state.randint(0, 256, size=3)
    return int(red), int(green), int(blue)


def _checkerboard(width: int, height: int, state: np.random.RandomState) -> Pixels:
    side = int(state.randint(1, 17))
    rows, columns = (np.arange(length) // side for length in (height, width))
    light, dark = (np.array(_colour(state), dtype=np.uint8) for _ in range(2))
    odd = (rows[:, None] + columns[None, :]) % 2 == 1
    return np.where(odd[..., None], dark, light)


def _shapes(width: int, height: int, state: np.random.RandomState) -> Pixels:
    from PIL import ImageDraw  # it imports fonts, which no other image needs

    image = Image.new("RGB", (width, height), _colour(state))
    draw = ImageDraw.Draw(image)
    for _ in range(int(state.randint(1, 5))):
        x0, x1 = sorted(int(v) for v in state.randint(0, width, size=2))
        y0, y1 = sorted(int(v) for v in state.randint(0, height, size=2))
        if state.randint(0, 2):
            draw.rectangle((x0, y0, x1, y1), fill=_colour(state))
        else:
            draw.ellipse((x0, y0, x1, y1), fill=_colour(state))
    return np.asarray(image)


def _draw(recipe: ImageRecipe) -> Pixels:
    """Return (height, width, 3) uint8."""
    width, height = recipe.width, recipe.height
    # RandomState: NumPy promises that its stream never changes, unlike Generator's.
    state = np.random.RandomState(recipe.seed)
    match recipe.kind:
        case "gradient":
            return _gradient(width, height)
        case "inverse-gradient":
            return 255 - _gradient(width, height)
        case "flat":
            return np.full((height, width, 3), _colour(state), dtype=np.uint8)
        case "noise":
            # Row by row: the same stream as in one piece, which would take eight times the image.
            rows = (state.randint(0, 256, size=(width, 3)) for _ in range(height))
            return np.stack([row.astype(np.uint8) for row in rows])
        case "checkerboard":
            return _checkerboard(width, height, state)
        case _:
            return _shapes(width, height, state)


def render(recipe: ImageRecipe) -> Image.Image:
    """Draw the image that a recipe describes, in its PIL mode.

    Images with alpha get a ramp of transparency from left to right, which shows a candidate that
    drops the alpha channel. One colour of a palette is transparent.
    """
    image = Image.fromarray(_draw(recipe))
    if recipe.mode in ("RGBA", "LA"):
        ramp = _gradient(recipe.width, recipe.height)[..., 0]
        image = image.convert(recipe.mode)
        image.putalpha(Image.fromarray(ramp))
        return image
    if recipe.mode == "P":
        image = image.quantize(colors=16, method=Image.Quantize.MEDIANCUT)
        image.info[_TRANSPARENT] = 0
        return image
    return image.convert(recipe.mode)


def to_arrays(image: Image.Image) -> dict[str, Pixels]:
    """Return an image as uint8 arrays: "pixels" (height, width, channels) and more for P.

    That is its "palette", and the index of its transparent colour if it has one. One-bit images
    are kept as 0 and 255.
    """
    if image.mode not in _CHANNELS:
        raise ValueError(f"cannot keep an image of mode {image.mode}")
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image, dtype=np.uint8)
    arrays = {"pixels": pixels.reshape(image.height, image.width, _CHANNELS[image.mode])}
    if image.mode == "P":
        arrays["palette"] = np.array(image.getpalette(), dtype=np.uint8)
        if _TRANSPARENT in image.info:
            arrays[_TRANSPARENT] = np.array([image.info[_TRANSPARENT]], dtype=np.uint8)
    return arrays


def from_arrays(arrays: dict[str, Pixels], *, mode: str) -> Image.Image:
    """Return the image that `to_arrays` kept."""
    pixels = arrays["pixels"]
    height, width, _ = pixels.shape
    if mode == "1":
        grey = Image.frombytes("L", (width, height), pixels.tobytes())
        return grey.convert("1", dither=Image.Dither.NONE)
    image = Image.frombytes(mode, (width, height), pixels.tobytes())
    if mode == "P":
        image.putpalette(arrays["palette"].tobytes())
        if _TRANSPARENT in arrays:
            image.info[_TRANSPARENT] = int(arrays[_TRANSPARENT][0])
    return image
