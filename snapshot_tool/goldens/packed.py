"""Images, pixel values and their masks as PNG: bit for bit what they were, in a fraction of it.

A processor makes pixel values of bytes, by a scale and an offset for each channel: a channel has
256 values at most. Kept are these, `<name>.levels`, the bytes that choose among them, `<name>.png`,
and what they were the values of, `<name>.shape`. Where that is a large PNG, and the bytes can be
made again from the case's images, kept are in its place `<name>.cuts`, how (see resized.py), and
their `<name>.sha256`. Whether all this gives the very same bits is seen when recording; a tensor of
which it does not, such as an average over pixels, is kept whole.

A file may be a stranger's: PNG alone is read, and no more than its header announces.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from snapshot_tool.base.memory import flat_bytes
from snapshot_tool.goldens.resized import (
    CHANNELS,
    Cut,
    count_tiles,
    cut_tiles,
    most_pixels,
    number_values,
)

if TYPE_CHECKING:
    import torch

PNG, LEVELS, SHAPE, CUTS, SHA256 = ".png", ".levels", ".shape", ".cuts", ".sha256"
LARGE_PNG = 2**18  # bytes; below, no other Pillow can make anything else of it
PIXEL_VALUES = "pixel_values"
MAX_PIXELS = 2**28 // 3  # what Pillow reads without a warning: 341 tiles of 512 by 512
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PLANES = 3  # the last dimensions of tiles: channels, height, width
_SMALL = 2**10  # bytes that are not worth it
_BYTE = 256

Tensors = dict[str, "torch.Tensor"]
Read = Callable[[str], "torch.Tensor"]


def pack_inputs(tensors: Mapping[str, torch.Tensor], cuts: torch.Tensor | None = None) -> Tensors:
    """Return a case's inputs with everything packed that comes back as it was.

    cuts: (images, 4) int64, how pixel values were made of the images, as far as that is known.
    """
    packed: Tensors = {}
    for name, tensor in tensors.items():
        packed |= _pack(name, tensor) or {name: tensor}
    picture = packed.get(PIXEL_VALUES + PNG)
    if cuts is None or picture is None or len(picture) <= LARGE_PNG:
        return packed
    shorter = {key: tensor for key, tensor in packed.items() if tensor is not picture}
    digest = hashlib.sha256(_decode(picture).numpy().data).digest()
    shorter[PIXEL_VALUES + CUTS] = cuts
    shorter[PIXEL_VALUES + SHA256] = cuts.new_tensor(list(digest), dtype=picture.dtype)
    try:
        same = _same_bits(unpack(PIXEL_VALUES, shorter.__getitem__), tensors[PIXEL_VALUES])
    except ValueError:
        return packed
    return shorter if same else packed


def unpack_inputs(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return what `pack_inputs` was given."""
    names = [key.removesuffix(SHAPE) for key in tensors if key.endswith(SHAPE)]
    rest = {name + part for name in names for part in (PNG, LEVELS, SHAPE, CUTS, SHA256)}
    whole = {key: tensor for key, tensor in tensors.items() if key not in rest}
    return {**whole, **{name: unpack(name, tensors.__getitem__) for name in names}}


def unpack(name: str, read: Read) -> torch.Tensor:
    """Return a packed tensor; raise ValueError where what is read makes none.

    read: returns a part by its name; raises KeyError where there is none.
    """
    import torch

    shape = torch.Size(read(name + SHAPE).tolist())
    try:
        cuts = read(name + CUTS).tolist()
    except KeyError:
        codes = _decode(read(name + PNG))
    else:
        codes = _made_again(name, shape, cuts, read)
    if len(shape) < _PLANES or min(shape) < 1 or math.prod(shape) != codes.numel():
        raise ValueError(f"{name} is no picture of the shape {tuple(shape)}")
    try:
        levels = read(name + LEVELS)
    except KeyError:
        return codes.reshape(shape)
    if len(levels) != codes.shape[-1] or int(codes.max()) >= levels.shape[1]:
        raise ValueError(f"{name} has not the levels of {codes.shape[-1]} channels")
    tiles = codes.reshape(-1, *shape[-2:], len(levels))
    values = levels.new_empty(len(tiles), len(levels), *shape[-2:])
    for channel, row in enumerate(levels):  # one at a time: a place takes four bytes meanwhile
        values[:, channel] = row[tiles[..., channel].int()]
    return values.reshape(shape)


def _made_again(name: str, shape: Sequence[int], cuts: list[Cut], read: Read) -> torch.Tensor:
    """Return the bytes of tiles, made of the images beside them, (tiles * side, side, 3) uint8."""
    import PIL
    import torch

    side = shape[-1] if len(shape) else 0
    known = bool(cuts) and all(min(cut) >= 0 < min(cut[:2]) for cut in cuts)
    if side < 1 or not known or tuple(shape) != (count_tiles(cuts), 3, side, side):
        raise ValueError(f"the shape {tuple(shape)} is not that of tiles cut as it says")
    if max(shape[0] * side * side, most_pixels(cuts, side=side)) > MAX_PIXELS:
        raise ValueError(f"its tiles are larger than the {MAX_PIXELS} pixels that are read")
    folder = name.removesuffix(PIXEL_VALUES)
    images = [_image(f"{folder}image.{index}.pixels", read).numpy() for index in range(len(cuts))]
    if any(image.ndim != _PLANES or image.shape[-1] not in CHANNELS for image in images):
        raise ValueError("its images are not of three or four channels")
    picture = number_values(cut_tiles(images, cuts, side=side))
    if hashlib.sha256(picture.data).digest() != bytes(read(name + SHA256).tolist()):
        raise ValueError(
            f"Pillow {PIL.__version__} makes other tiles of the images than those recorded: use "
            "the Pillow that it was recorded with, or record with --storage full"
        )
    return torch.from_numpy(picture)


def _image(name: str, read: Read) -> torch.Tensor:
    """Return an image's pixels, (height, width, channels) uint8, packed or not."""
    try:
        return read(name)
    except KeyError:
        return unpack(name, read)


def _pack(name: str, tensor: torch.Tensor) -> Tensors | None:
    """Return the parts of a packed tensor; None where they would not give the same bits again."""
    import torch

    if tensor.nbytes <= _SMALL or tensor.dim() < _PLANES:
        return None
    parts: Tensors = {name + SHAPE: torch.tensor(tensor.shape)}
    codes = tensor
    if tensor.dtype is not torch.uint8:
        found = _levels(tensor)
        if found is None:
            return None
        parts[name + LEVELS], codes = found
    if codes.shape[-1] not in _MODES or codes.shape[0] * codes.shape[1] > MAX_PIXELS:
        return None
    parts[name + PNG] = _encode(codes)
    return parts if _same_bits(unpack(name, parts.__getitem__), tensor) else None


def _levels(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return each channel's values, (channels, values), and which is where, as one picture.

    The picture: (tiles * height, width, channels) uint8. None for more than 256 values.
    """
    import torch

    # A mask has no channels, so all tiles are of one.
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


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    both = [flat_bytes(tensor) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*both)


def _encode(picture: torch.Tensor) -> torch.Tensor:
    """Return a picture (height, width, channels) uint8 as the bytes of a PNG, (n,) uint8."""
    import torch
    from PIL import Image

    height, width, channels = picture.shape
    image = Image.frombytes(_MODES[channels], (width, height), picture.numpy().tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> torch.Tensor:
    """Return the picture in the bytes of a PNG, (height, width, channels) uint8."""
    import torch
    from PIL import Image

    bomb = Image.DecompressionBombError
    try:
        with warnings.catch_warnings():
            # What Pillow warns of, too many pixels among it, no recording wrote.
            warnings.simplefilter("error")
            image = Image.open(io.BytesIO(data.numpy().tobytes()), formats=["PNG"])
            if image.width * image.height > MAX_PIXELS or image.mode not in _MODES.values():
                raise ValueError(f"it is {image.width} by {image.height} of mode {image.mode}")
            pixels = bytearray(image.tobytes())
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Warning, bomb) as error:
        raise ValueError(f"its PNG is none: {error}") from error
    flat = torch.frombuffer(pixels, dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1)
