"""PNGs as a stranger might put them into a golden set: valid checksums over bad contents."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load, save

from tests.torture.mutations import HostileSet, mutate_bytes

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIDES = (0, 1, 2, 9, 2**14, 2**16, 2**31 - 1, 2**32 - 1)
_CHUNKS = (
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA",
    b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"xxxx", b"\x00\x00\x00\x00",
)  # fmt: skip


def mutate_picture(hostile: HostileSet) -> None:
    """Put a spoilt PNG in the place of a case's pixel values, and make the manifest agree."""
    chance = hostile.chance
    path = hostile.path("inputs")
    tensors = load(path.read_bytes())
    key = chance.choice(sorted(key for key in tensors if key.endswith("/pixel_values")))
    pixels = tensors.pop(key)
    picture = _spoilt(_png(pixels.shape[0] * pixels.shape[-2], pixels.shape[-1], chance), chance)
    put_picture(hostile, key, picture, shape=list(pixels.shape))


def mutate_picture_by_seed(folder: Path, seed: int) -> str:
    """Spoil the picture of a set in a folder."""
    mutate_picture(HostileSet(folder, random.Random(seed)))
    return mutate_picture.__name__


def put_picture(hostile: HostileSet, key: str, picture: bytes, *, shape: list[int]) -> None:
    """Write a PNG as what a tensor of the inputs, pixel values of three channels, is packed in."""
    path = hostile.path("inputs")
    tensors = load(path.read_bytes())
    tensors.pop(key)
    tensors[f"{key}.png"] = torch.tensor(list(picture), dtype=torch.uint8)
    tensors[f"{key}.shape"] = torch.tensor(shape)
    tensors[f"{key}.levels"] = torch.tensor([[-1.0, 0.5, 1.0]] * 3)
    hostile.replace(path, save(tensors))
    hostile.agree("inputs")


def _png(height: int, width: int, chance: random.Random) -> bytes:
    pixels = bytes(chance.choice((0, 1, 2)) for _ in range(height * width * 3))
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, format="PNG")
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _header(
    width: int, height: int, *, depth: int = 8, colour: int = 2, rest: bytes = b"\0\0\0"
) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBB", width, height, depth, colour) + rest)


def _spoilt(picture: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(6)
    if kind == 0:
        return mutate_bytes(picture, chance)
    rest = picture[len(_SIGNATURE) + 25 :]
    width, height = struct.unpack(">II", picture[16:24])
    if kind == 1:
        return _SIGNATURE + _header(chance.choice(_SIDES), chance.choice(_SIDES)) + rest
    if kind == 2:
        depth, colour = chance.choice((1, 2, 4, 8, 16, 3, 255)), chance.choice((0, 2, 3, 4, 6, 7))
        end = bytes(chance.choice((0, 1, 9)) for _ in range(3))
        return _SIGNATURE + _header(width, height, depth=depth, colour=colour, rest=end) + rest
    if kind == 3:
        name = chance.choice(_CHUNKS)
        data = chance.choice(
            (b"", b"\0" * 13, b"a\0\0" + zlib.compress(bytes(10**7)), b"\xff" * 99)
        )
        return _SIGNATURE + _header(width, height) + _chunk(name, data) + rest
    if kind == 4:
        rows = chance.choice((bytes(10**7), b"", bytes(range(256)) * 9, b"\x09" * 999))
        data = _chunk(b"IDAT", zlib.compress(rows))
        return _SIGNATURE + _header(width, height) + data + _chunk(b"IEND", b"")
    return chance.choice((b"GIF89a", b"\xff\xd8\xff\xe0", b"BM", b"P6 1 1 255\n")) + picture


def picture_bomb(width: int, height: int, *, zeros: int) -> Callable[[Path], None]:
    """Return what puts a PNG into a set's inputs that unpacks to so many zeros."""

    def write(folder: Path) -> None:
        data = _chunk(b"IDAT", _compressed(zeros)) + _chunk(b"IEND", b"")
        hostile = HostileSet(folder, random.Random(0))
        keys = load(hostile.path("inputs").read_bytes())
        key = min(key for key in keys if key.endswith("/pixel_values"))
        picture = _SIGNATURE + _header(width, height) + data
        put_picture(hostile, key, picture, shape=[1, 3, height, width])

    return write


def _compressed(zeros: int) -> bytes:
    compressor, block = zlib.compressobj(), bytes(2**20)
    data = [compressor.compress(block) for _ in range(zeros // len(block))]
    data.append(compressor.compress(bytes(zeros % len(block))))
    return b"".join([*data, compressor.flush()])
