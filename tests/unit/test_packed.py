"""Packed inputs: bit for bit what they were, and nothing else is read from a stranger's file."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from snapshot_tool.base.images import render, to_arrays
from snapshot_tool.base.recipes import ImageRecipe
from snapshot_tool.goldens import resized
from snapshot_tool.goldens.packed import LARGE_PNG, pack_inputs, unpack, unpack_inputs

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
        (".png", list(png(24, 72)), "its PNG is none"),
        (".png", list(gif()), "its PNG is none"),
        (".png", [], "its PNG is none"),
        (".shape", [3, 3, 24, 21], "is no picture of the shape"),
        (".shape", [-3, -3, 24, 20], "is no picture of the shape"),
        (".shape", [2**62, 2**62, 24, 20], "is no picture of the shape"),
        (".levels", [[0.0, 1.0]] * 3, "has not the levels"),
        (".levels", [[float(n) for n in range(256)]], "has not the levels"),
    ],
)
def test_parts_that_make_nothing_are_refused(part: str, value: object, problem: str) -> None:
    """A bomb by its announced size, before a pixel is read; and whatever does not fit."""
    kept, _ = round_trip(BYTES / 255)
    kept[f"x{part}"] = torch.tensor(value, dtype=kept[f"x{part}"].dtype)
    with pytest.raises(ValueError, match=problem):
        unpack("x", kept.__getitem__)


SIDE = 96
# Of three images: 4 by 4 tiles and the whole, 2 by 1 and the whole, the whole alone.
CUTS = torch.tensor([[384, 384, 4, 4], [190, 94, 2, 1], [40, 90, 0, 0]])


def noise_inputs(mode: str) -> dict[str, torch.Tensor]:
    """Return three images of noise and the pixel values that a processor makes of them."""
    recipes = [ImageRecipe("noise", *size, mode) for size in ((60, 60), (80, 40), (20, 45))]
    images = [to_arrays(render(recipe))["pixels"] for recipe in recipes]
    picture = torch.from_numpy(resized.cut_tiles(images, CUTS.tolist(), side=SIDE))
    tiles = picture.reshape(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
    pixels = {f"image.{n}.pixels": torch.from_numpy(i.copy()) for n, i in enumerate(images)}
    return {"pixel_values": (tiles / 255 - 0.5) / 0.5, **pixels}


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_tiles_of_noise_are_kept_as_the_way_they_were_made(mode: str) -> None:
    """Less than the images take themselves, and bit for bit the same."""
    inputs = noise_inputs(mode)
    kept = pack_inputs(inputs, CUTS)
    assert "pixel_values.png" not in kept
    own = sum(tensor.nbytes for name, tensor in kept.items() if name.startswith("pixel_values"))
    assert own < 4000
    assert torch.equal(unpack_inputs(kept)["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize("what", ["other tiles", "other cuts", "no cuts", "small"])
def test_tiles_that_cannot_be_made_again_stay_a_png(what: str) -> None:
    """Bit for bit, or not at all; nor where a PNG is small enough."""
    inputs, cuts = noise_inputs("RGB"), CUTS.clone()
    if what == "other tiles":
        inputs["pixel_values"][3] = inputs["pixel_values"][3].flip(-1)
    if what == "other cuts":
        cuts[0, 0] += 2
    if what == "small":
        inputs["pixel_values"] = (inputs["pixel_values"] > 0).float()
    kept = pack_inputs(inputs, None if what == "no cuts" else cuts)
    assert (len(kept["pixel_values.png"]) <= LARGE_PNG) == (what == "small")
    assert torch.equal(unpack_inputs(kept)["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("pixel_values.cuts", [[384, 384, 4, 4]], "is not that of tiles"),
        ("pixel_values.cuts", [[384, 384, 4, 4, 1]] * 3, "unpack"),
        ("pixel_values.cuts", [[384, 384, 4, 4], [0, 94, 2, 1], [40, 90, 0, 0]], "is not that of"),
        ("pixel_values.cuts", [[384, 384, -4, -4], [190, 94, 2, 1], [40, 90, 0, 0]], "is not that"),
        ("pixel_values.cuts", [[2**40, 2**40, 4, 4], [190, 94, 2, 1], [40, 90, 0, 0]], "larger"),
        ("pixel_values.shape", [21, 3, 2**20, 2**20], "larger than"),
        ("pixel_values.shape", [21, 3, 0, 0], "is not that of tiles"),
        ("pixel_values.shape", [], "is not that of tiles"),
        ("pixel_values.sha256", [7] * 32, "makes other tiles"),
        ("image.1.pixels", [[[1, 2]] * 9] * 9, "three or four channels"),
        ("image.1.pixels", [[1, 2, 3]] * 9, "three or four channels"),
    ],
)
def test_cuts_that_make_nothing_are_refused(part: str, value: object, problem: str) -> None:
    """By their numbers, before an image is scaled."""
    kept = pack_inputs(noise_inputs("RGB"), CUTS)
    if part in kept:
        dtype = kept[part].dtype
    else:
        dtype = torch.uint8
        kept = {name: t for name, t in kept.items() if not name.startswith(f"{part}.")}
    kept[part] = torch.tensor(value, dtype=dtype)
    with pytest.raises(ValueError, match=problem):
        unpack("pixel_values", kept.__getitem__)
