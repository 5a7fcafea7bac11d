"""Golden sets that are small to send and large to read: each in the memory of a few megabytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from tests.torture.pictures import picture_bomb


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
