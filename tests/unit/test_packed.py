"""Packed inputs: bit for bit what they were, and nothing else is read from a stranger's file."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from snapshot_tool.goldens.images import pack_inputs, unpack_inputs

BYTES = torch.randint(0, 256, (3, 3, 24, 20), generator=torch.Generator().manual_seed(3))
MEAN = torch.tensor([0.48, 0.46, 0.41])[:, None, None]


def round_trip(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what is kept of a tensor and what becomes of it again."""
    kept = pack_inputs({"x": tensor})
    return kept, unpack_inputs(kept)["x"]


@pytest.mark.parametrize(
    "tensor",
    [
        (BYTES * (1 / 255) - 0.5) / 0.5,
        (BYTES.float() / 255 - MEAN) / MEAN,
        ((BYTES.double() - 7) * 3)[0],
        (BYTES / 255).bfloat16()[None],
        BYTES[:, 0] > 9,
        *(BYTES.reshape(-1, 40, 1)[:, :, [0] * n].to(torch.uint8) for n in (1, 2, 3, 4)),
    ],
    ids=["scaled", "by channel", "one tile", "bfloat16", "mask", "L", "LA", "RGB", "RGBA"],
)
def test_what_was_made_of_bytes_comes_back_bit_for_bit(tensor: torch.Tensor) -> None:
    """Pixel values of any scale, masks, and images of any number of channels, as PNG."""
    kept, found = round_trip(tensor.contiguous())
    assert "x.png" in kept
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nn.functional.avg_pool2d(BYTES.float(), 2),
        torch.where(BYTES == 0, -0.0, BYTES - 1.0),
        torch.arange(4000).reshape(1, 4000),
        torch.zeros(1, 1, 2, 2),
    ],
    ids=["averages", "both zeros", "ids", "small"],
)
def test_what_would_not_come_back_stays_whole(tensor: torch.Tensor) -> None:
    """More than 256 values, or two that only bits tell apart, or nothing to win."""
    kept, found = round_trip(tensor)
    assert list(kept) == ["x"]
    assert found is tensor


def png(width: int, height: int) -> bytes:
    """Return a PNG that announces a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def gif() -> bytes:
    """Return a picture that Pillow reads, and that is no PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        (".png", list(png(60_000, 60_000)), "exceeds limit"),
        (".png", list(png(10_000, 9_000)), "exceeds limit"),
        (".png", list(png(24, 72)), "its PNG cannot be read"),
        (".png", list(gif()), "its PNG cannot be read"),
        (".png", [], "its PNG cannot be read"),
        (".shape", [3, 3, 24, 21], "is not a picture of the shape"),
        (".shape", [-3, -3, 24, 20], "is not a picture of the shape"),
        (".shape", [2**62, 2**62, 24, 20], "is not a picture of the shape"),
        (".levels", [[0.0, 1.0]] * 3, "does not have the levels"),
        (".levels", [[float(n) for n in range(256)]], "does not have the levels"),
    ],
)
def test_parts_that_make_nothing_are_refused(part: str, value: object, problem: str) -> None:
    """A bomb by its announced size, before a pixel is read; and whatever does not fit."""
    kept, _ = round_trip(BYTES / 255)
    kept[f"x{part}"] = torch.tensor(value, dtype=kept[f"x{part}"].dtype)
    with pytest.raises(ValueError, match=problem):
        unpack_inputs(kept)
