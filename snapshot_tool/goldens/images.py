"""The images of a golden set: drawn from recipes, kept as tensors, and packed as PNG.

A compact set packs images, pixel values and their masks: the same bits in a fraction of the space.
A processor makes pixel values of bytes, by a scale and an offset for each channel: a channel has
256 values at most. Kept are these, `<name>.levels`, the bytes that choose among them, `<name>.png`,
and the tensor's shape, `<name>.shape`. Recording unpacks each again; a tensor whose bits do not
come back, such as an average over pixels, is kept whole.

A file may be a stranger's: only PNG is read, and no more than its header announces.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from snapshot_tool.base.recipes import ImageRecipe
from snapshot_tool.goldens.layout import PNG
from snapshot_tool.numerics.compare import equal_bytes

Pixels = NDArray[np.uint8]
# What an image is kept as; PIL's own name for a palette's transparent colour is the last one.
IMAGE_PARTS = ("pixels", "palette", "transparency")
_TRANSPARENT = IMAGE_PARTS[-1]
_CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "P": 1, "1": 1, "CMYK": 4}

LEVELS, SHAPE = ".levels", ".shape"
PIXEL_VALUES = "pixel_values"
MAX_PIXELS = 2**28 // 3  # what Pillow reads without a warning: 341 tiles of 512 by 512
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PLANES = 3  # the last dimensions of tiles: channels, height, width
_SMALL = 2**10  # bytes; not worth packing
_BYTE = 256

Tensors = dict[str, torch.Tensor]


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


def pack_inputs(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return a case's inputs with everything packed whose bits come back."""
    packed: Tensors = {}
    for name, tensor in tensors.items():
        parts = _pack(tensor)
        packed |= {name + part: kept for part, kept in parts.items()} if parts else {name: tensor}
    return packed


def unpack_inputs(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors that `pack_inputs` packed; ValueError if they cannot be unpacked."""
    whole = dict(tensors)
    for name in [key.removesuffix(SHAPE) for key in tensors if key.endswith(SHAPE)]:
        parts = (PNG, LEVELS, SHAPE)
        whole[name] = unpack({p: whole.pop(name + p) for p in parts if name + p in whole})
    return whole


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor from its parts by suffix; ValueError if they do not fit each other."""
    if PNG not in parts:
        raise ValueError("it has a shape and no picture")
    shape = torch.Size(parts[SHAPE].tolist())
    codes = _decode(parts[PNG])
    if len(shape) < _PLANES or min(shape) < 1 or math.prod(shape) != codes.numel():
        raise ValueError(f"it is not a picture of the shape {tuple(shape)}")
    if LEVELS not in parts:
        return codes.reshape(shape)
    levels = parts[LEVELS]
    if len(levels) != codes.shape[-1] or int(codes.max()) >= levels.shape[1]:
        raise ValueError(f"it does not have the levels of {codes.shape[-1]} channels")
    tiles = codes.reshape(-1, *shape[-2:], len(levels))
    values = levels.new_empty(len(tiles), len(levels), *shape[-2:])
    for channel, row in enumerate(levels):  # one at a time, since an index takes four bytes
        values[:, channel] = row[tiles[..., channel].int()]
    return values.reshape(shape)


def _pack(tensor: torch.Tensor) -> Tensors | None:
    """Return a tensor's parts by suffix; None if they would not give the same bits again."""
    if tensor.nbytes <= _SMALL or tensor.dim() < _PLANES:
        return None
    parts: Tensors = {SHAPE: torch.tensor(tensor.shape)}
    codes = tensor
    if tensor.dtype is not torch.uint8:
        found = _levels(tensor)
        if found is None:
            return None
        parts[LEVELS], codes = found
    if codes.shape[-1] not in _MODES or codes.shape[0] * codes.shape[1] > MAX_PIXELS:
        return None
    parts[PNG] = _encode(codes)
    back = unpack(parts)
    same = back.dtype == tensor.dtype and back.shape == tensor.shape and equal_bytes(back, tensor)
    return parts if same else None


def _levels(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return each channel's values, (channels, values), and the picture that chooses among them.

    The picture: (tiles * height, width, channels) uint8. None for more than 256 values.
    """
    # A mask has no channels: all its tiles are of one.
    channels = 1 if tensor.dtype is torch.bool else tensor.shape[-_PLANES]
    planes = tensor.reshape(-1, channels, *tensor.shape[-2:])
    rows, codes = [], []
    for channel in range(channels):
        row, code = torch.unique(planes[:, channel], return_inverse=True)
        if len(row) > _BYTE:
            return None
        rows.append(row)
        codes.append(code.to(torch.uint8))
    most = max(map(len, rows))
    levels = torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in rows])
    picture = torch.stack(codes, dim=-1)
    return levels, picture.reshape(-1, tensor.shape[-1], channels)


def _encode(picture: torch.Tensor) -> torch.Tensor:
    """Return a picture (height, width, channels) uint8 as the bytes of a PNG, (n,) uint8."""
    height, width, channels = picture.shape
    image = Image.frombytes(_MODES[channels], (width, height), picture.numpy().tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> torch.Tensor:
    """Return the picture in the bytes of a PNG, (height, width, channels) uint8."""
    bomb = Image.DecompressionBombError
    try:
        with warnings.catch_warnings():
            # No recording wrote what Pillow warns of, such as too many pixels.
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(data.numpy().tobytes()), formats=["PNG"])
            if image.width * image.height > MAX_PIXELS or image.mode not in _MODES.values():
                raise ValueError(f"it is {image.width} by {image.height} of mode {image.mode}")
            pixels = bytearray(image.tobytes())
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Warning, bomb) as error:
        raise ValueError(f"its PNG cannot be read: {error}") from error
    flat = torch.frombuffer(pixels, dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1)
