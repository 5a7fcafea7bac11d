"""What a person wants to see of a case: its prompt, its images, what the reference said."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a page shows it.

    Args:
        data: a small version, as a data: address.
        width: of the image itself, in pixels.
        height: the same.
        caption: how it came about, and its mode.
    """

    data: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class CaseStory:
    """A case, told for people.

    Args:
        text: what the tokenizer was given, before image placeholders were expanded.
        generated: the reference's new tokens as text.
        tokens: length of the prompt.
        tiles: of all images.
        pictures: the images, in order.
    """

    text: str
    generated: str
    tokens: int
    tiles: int
    pictures: tuple[Picture, ...]
