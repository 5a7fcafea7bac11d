"""Synthetic images, each with the words that describe it: what the tiny model learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (225, 30, 35),
    "orange": (245, 140, 25),
    "yellow": (240, 225, 50),
    "green": (35, 170, 65),
    "blue": (35, 70, 215),
    "purple": (130, 45, 165),
    "pink": (250, 60, 150),
    "white": (247, 247, 247),
    "grey": (128, 130, 129),
    "black": (9, 8, 10),
}
WARM = ("red", "orange", "yellow", "pink")
COLD = ("green", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

# Square as the fixed cases are, and others: they have fewer tiles, so training is faster.
SIZES = ((128, 128),) * 3 + ((128, 64), (64, 128), (128, 32), (32, 128), (96, 128))


@dataclass(frozen=True, slots=True)
class Scene:
    """An image and three ways to speak of it: at length, in short, and by its colours."""

    image: Image.Image
    long: str
    short: str
    colours: tuple[str, ...]


def gradient(width: int, height: int) -> Pixels:
    """Red rises with x, green with y, blue is their mean: the image of the fixed cases."""
    red = np.arange(width, dtype=np.int64) * 255 // max(1, width - 1)
    green = np.arange(height, dtype=np.int64) * 255 // max(1, height - 1)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = red[None, :]
    pixels[..., 1] = green[:, None]
    pixels[..., 2] = (red[None, :] + green[:, None]) // 2
    return pixels


def temperature(colour: str) -> str:
    """Return the word for how a colour feels."""
    if colour in WARM:
        return "warm"
    return "cold" if colour in COLD else "neutral"


def _pick(state: np.random.RandomState, words: tuple[str, ...]) -> str:
    return words[state.randint(len(words))]


def _two_colours(state: np.random.RandomState) -> tuple[str, str]:
    first, second = state.permutation(len(COLOURS))[:2]
    names = tuple(COLOURS)
    return names[first], names[second]


def _shade(name: str, state: np.random.RandomState) -> Colour:
    """Return the colour, a little off: a model that saw one exact value would know no other."""
    red, green, blue = np.clip(np.array(COLOURS[name]) + state.randint(-8, 9, size=3), 0, 255)
    return int(red), int(green), int(blue)


def _flat(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    colour = _pick(state, tuple(COLOURS))
    long = (
        f" a plain {colour} field, even and empty from edge to edge, without any shape in it;"
        f" one {temperature(colour)} colour and nothing more."
    )
    image = Image.new("RGB", size, _shade(colour, state))
    return Scene(image, long, f"a plain {colour} field", (colour,))


def _outline(
    shape: str, corner: str, size: tuple[int, int], span: float
) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom) of a shape that sits towards a corner."""
    width, height = size
    side = span * min(width, height)
    margin = 0.08
    left = margin * width if "left" in corner else (1 - margin) * width - side
    top = margin * height if "top" in corner else (1 - margin) * height - side
    return left, top, left + side, top + side


def _draw_shape(
    image: Image.Image, shape: str, box: tuple[float, float, float, float], fill: Colour
) -> None:
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon(((left + right) / 2, top, right, bottom, left, bottom), fill=fill)


def _shape(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    colour, ground = _two_colours(state)
    shape, corner = _pick(state, SHAPES), _pick(state, CORNERS)
    big = bool(state.randint(2))
    image = Image.new("RGB", size, _shade(ground, state))
    box = _outline(shape, corner, size, 0.75 if big else 0.4)
    _draw_shape(image, shape, box, _shade(colour, state))
    word = "big" if big else "small"
    long = (
        f" a {word} {colour} {shape} on a {ground} background, close to the {corner} corner;"
        f" a {temperature(colour)} colour over a {temperature(ground)} one."
    )
    return Scene(image, long, f"a {word} {colour} {shape} on {ground}", (ground, colour))


def _nearest(pixel: NDArray[np.float64]) -> str:
    distances = {name: float(np.abs(pixel - value).sum()) for name, value in COLOURS.items()}
    return min(distances, key=distances.__getitem__)


def _gradient_scene(pixels: Pixels) -> Scene:
    """Name a gradient by the colours of its four corners."""
    values = pixels.astype(np.float64)
    first, second, third, last = (
        _nearest(values[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))
    )
    long = (
        f" a smooth gradient from {first} at the top left to {last} at the bottom right,"
        f" with {second} above and {third} below."
    )
    short = f"a gradient from {first} to {last}"
    return Scene(Image.fromarray(pixels), long, short, (first, second, third, last))


def _ramps(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    """The gradient of the fixed cases, as it is, inverted or mirrored."""
    pixels = gradient(*size)
    if state.randint(2):
        pixels = 255 - pixels
    if state.randint(4) == 0:
        pixels = pixels[:, ::-1]
    return _gradient_scene(np.ascontiguousarray(pixels))


def _blend(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    """Four corner colours, blended in between."""
    width, height = size
    names = tuple(COLOURS)
    corners = [np.array(_shade(_pick(state, names), state), dtype=np.float64) for _ in CORNERS]
    x = np.linspace(0.0, 1.0, width)[None, :, None]
    y = np.linspace(0.0, 1.0, height)[:, None, None]
    upper = corners[0] * (1 - x) + corners[1] * x
    lower = corners[2] * (1 - x) + corners[3] * x
    return _gradient_scene((upper * (1 - y) + lower * y).round().astype(np.uint8))


def _stripes(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    first, second = _two_colours(state)
    width, height = size
    step = (8, 16, 24)[state.randint(3)]
    across, down = bool(state.randint(2)), bool(state.randint(2))
    rows, columns = np.indices((height, width)) // step
    board = across == down
    index = rows + columns if board else (rows if across else columns)
    odd = (index % 2 == 1)[..., None]
    pixels = np.where(odd, np.array(_shade(second, state)), np.array(_shade(first, state)))
    if board:
        what = f"a board of {first} and {second} squares"
        tail = "they change place like the fields of a chess game, row after row."
    else:
        what = f"{first} and {second} stripes"
        tail = f"they run {'across' if across else 'down'} the whole picture, side by side."
    image = Image.fromarray(pixels.astype(np.uint8))
    return Scene(image, f" {what}, each as wide as the next; {tail}", what, (first, second))


def _noise(size: tuple[int, int], state: np.random.RandomState) -> Scene:
    width, height = size
    coloured = bool(state.randint(2))
    pixels = state.randint(0, 256, size=(height, width, 3 if coloured else 1)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3))))
    word = "coloured" if coloured else "grey"
    long = f" {word} noise: random dots like sand or rain, no shape, no order, grey from far away."
    return Scene(image, long, f"{word} noise", ("grey", "black", "white"))


_PAINTERS: tuple[Callable[[tuple[int, int], np.random.RandomState], Scene], ...] = (
    _shape,
    _shape,
    _shape,
    _flat,
    _ramps,
    _ramps,
    _blend,
    _stripes,
    _noise,
)


def draw_scene(state: np.random.RandomState) -> Scene:
    """Draw a scene of any kind and size."""
    size = SIZES[state.randint(len(SIZES))]
    return _PAINTERS[state.randint(len(_PAINTERS))](size, state)


def draw_pair(state: np.random.RandomState) -> tuple[Scene, Scene]:
    """Draw two scenes; one pair in three is a gradient and its inverse, in either order."""
    if state.randint(3):
        return draw_scene(state), draw_scene(state)
    pixels = gradient(*SIZES[state.randint(len(SIZES))])
    first, second = _gradient_scene(pixels), _gradient_scene(255 - pixels)
    return (first, second) if state.randint(2) else (second, first)
