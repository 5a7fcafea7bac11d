"""Synthetic images: exact values, every mode, and sizes down to one pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from snapshot_tool.base.recipes import (
    FIXED_CASES,
    IMAGE_KINDS,
    IMAGE_MODES,
    MAX_IMAGE_SIDE,
    MAX_PADDING,
    CaseRecipe,
    ImageRecipe,
)
from snapshot_tool.goldens.images import from_arrays, render, to_arrays

SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (17, 33), (160, 5)]
CHANNELS = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "P": 1, "1": 1, "CMYK": 4}


def test_the_fixed_cases_are_the_suites() -> None:
    """One image, and two of which the second is the first one's inverse."""
    one, two = FIXED_CASES
    assert (one.name, one.recipe.prompt) == ("one-image", "Describe the image: <image>.")
    assert (two.name, two.recipe.prompt) == ("two-images", "Compare: <image> then <image>.")
    gradient, inverse = (np.asarray(render(image)).astype(int) for image in two.recipe.images)
    assert gradient.shape == (512, 512, 3)
    assert gradient[0, 0].tolist() == [0, 0, 0]
    assert gradient[0, 511].tolist() == [255, 0, 127]
    assert gradient[511, 0].tolist() == [0, 255, 127]
    assert gradient[511, 511].tolist() == [255, 255, 255]
    assert (inverse == 255 - gradient).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_image_is_kept_bit_for_bit(kind: str, mode: str, size: tuple[int, int]) -> None:
    """Kept arrays give back the same bytes, mode, size and colours, palette included."""
    image = render(ImageRecipe(kind, *size, mode, seed=11))
    assert (image.mode, image.size) == (mode, size)
    arrays = to_arrays(image)
    assert arrays["pixels"].shape == (size[1], size[0], CHANNELS[mode])
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint8)}
    assert arrays.keys() == {"pixels", *(("palette", "transparency") if mode == "P" else ())}
    again = from_arrays(arrays, mode=mode)
    assert (again.mode, again.size) == (mode, size)
    assert again.tobytes() == image.tobytes()
    assert again.getpalette() == image.getpalette()
    assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    assert again.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_inverse_gradient_is_255_minus_the_gradient(size: tuple[int, int]) -> None:
    """Of any size, in every channel of every pixel."""
    one = np.asarray(render(ImageRecipe("gradient", *size))).astype(int)
    other = np.asarray(render(ImageRecipe("inverse-gradient", *size))).astype(int)
    assert (one + other == 255).all()


def test_the_gradient_rises_with_x_in_red_and_with_y_in_green() -> None:
    """Every pixel is what the formula in integers says; blue is the mean, rounded down."""
    pixels = np.asarray(render(ImageRecipe("gradient", 4, 3)))
    assert pixels[..., 0].tolist() == [[0, 85, 170, 255]] * 3
    assert pixels[..., 1].tolist() == [[0] * 4, [127] * 4, [255] * 4]
    assert pixels[..., 2].tolist() == [[0, 42, 85, 127], [63, 106, 148, 191], [127, 170, 212, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_rises_from_left_to_right(mode: str) -> None:
    """A candidate that drops transparency sees another picture."""
    alpha = np.asarray(render(ImageRecipe("flat", 4, 2, mode)))[..., -1]
    assert alpha.tolist() == [[0, 85, 170, 255]] * 2


def test_the_stream_of_a_seed_is_pinned() -> None:
    """NumPy promises this stream for ever, so goldens can be drawn again in years."""
    noise = np.asarray(render(ImageRecipe("noise", 2, 1, seed=1)))
    assert noise.tolist() == [[[37, 235, 140], [72, 255, 137]]]
    flat = np.asarray(render(ImageRecipe("flat", 6, 5, seed=1)))
    assert (flat == [37, 235, 140]).all()


@pytest.mark.parametrize("kind", ["flat", "noise", "checkerboard", "shapes"])
def test_drawn_images_follow_their_seed(kind: str) -> None:
    """The same seed gives the same image, another one another image."""
    first, again, other = (
        render(ImageRecipe(kind, 40, 30, seed=seed)).tobytes() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_a_palette_has_sixteen_colours_and_one_of_them_is_transparent() -> None:
    """Its pixels are places in it. A candidate that ignores transparency sees another picture."""
    image = render(ImageRecipe("noise", 30, 30, "P"))
    assert np.asarray(image).max() <= 15
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    assert (alpha == np.where(np.asarray(image) == 0, 0, 255)).all()
    assert 0 < (alpha == 0).mean() < 1


def test_a_mode_that_cannot_be_kept_is_refused() -> None:
    """An image of 32-bit floats would lose its values in bytes."""
    with pytest.raises(ValueError, match="cannot keep an image of mode F"):
        to_arrays(Image.new("F", (1, 1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "photo"}, "image kind 'photo' is none of gradient, inverse-gradient, flat"),
        ({"mode": "HSV"}, "image mode 'HSV' is none of RGB, RGBA"),
        ({"width": 0}, "image size 0x4 is out of range"),
        ({"height": -1}, "image size 4x-1 is out of range"),
        ({"width": MAX_IMAGE_SIDE + 1}, "image size 8193x4 is out of range"),
        ({"seed": -1}, "image seed -1 is out of range"),
        ({"seed": 2**32}, "image seed 4294967296 is out of range"),
    ],
)
def test_an_image_recipe_out_of_range_is_refused(fields: dict[str, object], message: str) -> None:
    """The message holds the value that is wrong."""
    recipe: dict[str, object] = {"kind": "flat", "width": 4, "height": 4, **fields}
    with pytest.raises(ValueError, match=message):
        ImageRecipe(**recipe)  # type: ignore[arg-type]


def test_the_limits_of_a_recipe_are_allowed() -> None:
    """Largest side, largest seed and most padding are still valid."""
    ImageRecipe("flat", MAX_IMAGE_SIDE, 1, seed=2**32 - 1)
    assert CaseRecipe("", left_padding=MAX_PADDING).left_padding == MAX_PADDING


@pytest.mark.parametrize(
    ("prompt", "images", "padding", "message"),
    [
        ("<image>", 0, 0, "1 <image> in the prompt for 0 images"),
        ("no place", 1, 0, "0 <image> in the prompt for 1 images"),
        ("<image><image>", 3, 0, "2 <image> in the prompt for 3 images"),
        ("", 0, -1, "left padding -1 is out of range"),
        ("", 0, MAX_PADDING + 1, f"left padding {MAX_PADDING + 1} is out of range"),
    ],
)
def test_a_case_recipe_that_does_not_fit_is_refused(
    prompt: str, images: int, padding: int, message: str
) -> None:
    """The message has the numbers."""
    with pytest.raises(ValueError, match=message):
        CaseRecipe(prompt, (ImageRecipe("flat", 1, 1),) * images, left_padding=padding)
