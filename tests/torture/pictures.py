"""Spoilt PNGs with valid checksums, and golden sets that are small to send and large to read."""

from __future__ import annotations

import io
import json
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


def mutate_picture(folder: Path, seed: int) -> str:
    """Put a spoilt PNG in the place of a case's pixel values, and make the manifest agree."""
    chance = random.Random(seed)
    hostile = HostileSet(folder, chance)
    tensors = load(hostile.path("inputs").read_bytes())
    key = chance.choice(sorted(key for key in tensors if key.endswith("/pixel_values")))
    pixels = tensors[key]
    picture = _spoilt(_png(pixels.shape[0] * pixels.shape[-2], pixels.shape[-1], chance), chance)
    put_picture(hostile, key, picture, shape=list(pixels.shape))
    return "mutate_picture"


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


def _manifest_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "manifest.json"
        path.unlink()
        path.write_text(text, encoding="utf-8")

    return write


def _config_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "manifest.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["checkpoint"]["config"] = "HERE"
        path.unlink()
        path.write_text(json.dumps(tree).replace('"HERE"', text), encoding="utf-8")

    return write


def _header_of(text: str, *, claimed: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "vision.safetensors"
        path.unlink()
        data = struct.pack("<Q", len(text) if claimed is None else claimed) + text.encode()
        path.write_bytes(data)
        manifest = folder / "manifest.json"
        tree = json.loads(manifest.read_text(encoding="utf-8"))
        tree["files"]["vision.safetensors"]["size"] = len(data)
        manifest.unlink()
        manifest.write_text(json.dumps(tree), encoding="utf-8")

    return write


def _sparse(name: str, size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / name
        path.unlink()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", size - 8))
            file.truncate(size)

    return write


_WIDE = 4_000  # pixels
_ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BOMBS: dict[str, Callable[[Path], None]] = {
    "manifest of 60 million empty lists": _manifest_of("[" + "[]," * 60_000_000 + "[]]"),
    "manifest of a terabyte": _sparse("manifest.json", 2**40),
    "configuration of 30 million zeros": _config_of('{"a": [' + "0," * 30_000_000 + "0]}"),
    "configuration nested a million deep": _config_of('{"a":' * 10**6 + "1" + "}" * 10**6),
    "configuration of a 100 MB number": _config_of('{"a": ' + "1" * 10**8 + "}"),
    "header of a terabyte": _sparse("vision.safetensors", 2**40),
    "header that claims a terabyte": _header_of("{}", claimed=2**40),
    "header of 30 million values": _header_of('{"a":[' + "0," * 30_000_000 + "0]}"),
    "header of 400,000 tensors": _header_of(
        "{" + ",".join(f'"two-images/{i}":{_ENTRY}' for i in range(400_000)) + "}"
    ),
    "header of one 90 MB name": _header_of('{"' + "a" * 90_000_000 + f'":{_ENTRY}}}'),
    "PNG of 16 million pixels": picture_bomb(_WIDE, _WIDE, zeros=(1 + 3 * _WIDE) * _WIDE),
    "PNG that claims 2**62 pixels": picture_bomb(2**31 - 1, 2**31 - 1, zeros=0),
    "PNG of 4 by 4 pixels and a gigabyte": picture_bomb(4, 4, zeros=2**30),
    "shape of 2**62 by 2**62": _header_of(
        '{"two-images/last_hidden_state":{"dtype":"F32","shape":[' + f"{2**62},{2**62}"
        '],"data_offsets":[0,0]}}'
    ),
}
