"""Tiles that an image processor cut from images, made again from these images.

Noise has nothing that PNG could leave out, and scaled up to seventeen tiles it is a dozen times as
large as itself. How the tiles were made takes four numbers an image.

Source: transformers.models.idefics3.image_processing_idefics3, whose steps these are: LANCZOS to
the longest edge, again to a whole number of tiles, cut row by row, the whole image as the last
tile, transparency over white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Bytes: TypeAlias = NDArray[np.uint8]

# Of an image: width and height that it is scaled to at first, columns and rows of its tiles (0 and
# 0: it is one tile).
Cut = Sequence[int]

CHANNELS = (3, 4)  # of images that are scaled as they are; palettes, say, are not


def count_tiles(cuts: Sequence[Cut]) -> int:
    """Return how many tiles images become, the whole of each included."""
    return sum(columns * rows + 1 for _, _, columns, rows in cuts)


def most_pixels(cuts: Sequence[Cut], *, side: int) -> int:
    """Return the most pixels that an image has on the way."""
    return max(
        max(width * height, max(columns, 1) * max(rows, 1) * side * side)
        for width, height, columns, rows in cuts
    )


def cut_tiles(images: Sequence[Bytes], cuts: Sequence[Cut], *, side: int) -> Bytes:
    """Return the tiles of all images below each other, (tiles * side, side, 3).

    images: (height, width, 3 or 4) each.
    """
    import numpy as np
    from PIL import Image

    tiles = [
        tile
        for pixels, cut in zip(images, cuts, strict=True)
        for tile in _tiles(Image.fromarray(pixels), cut, side)
    ]
    return np.concatenate(tiles)


def number_values(picture: Bytes) -> Bytes:
    """Return for each byte which of its channel's values it is, counted from the least."""
    import numpy as np

    numbered = np.empty_like(picture)
    for channel in range(picture.shape[-1]):
        plane = picture[..., channel]
        there = np.bincount(plane.reshape(-1), minlength=256) > 0
        numbered[..., channel] = (np.cumsum(there) - 1).astype(np.uint8)[plane]
    return numbered


def _tiles(image: Image.Image, cut: Cut, side: int) -> Iterator[Bytes]:
    from PIL.Image import Resampling

    width, height, columns, rows = cut
    scaled = image.resize((width, height), Resampling.LANCZOS)
    scaled = scaled.resize((max(columns, 1) * side, max(rows, 1) * side), Resampling.LANCZOS)
    for row in range(rows):
        for column in range(columns):
            x, y = column * side, row * side
            yield _over_white(scaled.crop((x, y, x + side, y + side)))
    yield _over_white(scaled.resize((side, side), Resampling.LANCZOS))


def _over_white(image: Image.Image) -> Bytes:
    import numpy as np
    from PIL import Image

    white = Image.new("RGBA", image.size, (255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
