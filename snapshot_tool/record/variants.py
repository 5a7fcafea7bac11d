"""Variants for a recording: prompts and images that hypothesis draws, reproducibly, from a seed.

Each variant has a theme, so that even a dozen of them cover what a port can get wrong: padding,
number and placement of images, chat template, unicode, lengths, sizes. Within its theme hypothesis
draws freely, except for the images' modes: these are dealt in turn, so that six variants have them
all. Recipes are stored with the golden set and used again by a re-recording, since hypothesis's
draws may change with its version and with the code around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from snapshot_tool.base.recipes import IMAGE_KINDS, IMAGE_MODES, CaseRecipe, ImageRecipe, InputKind
from snapshot_tool.explore.draw import temporary_hypothesis_folder

_WORDS = (
    "describe", "compare", "the", "a", "red", "green", "blue", "small", "large", "circle",
    "square", "what", "is", "shown", "in", "this", "image", "and", "then", "which", "colour",
    "left", "right", "answer", "briefly", "list", "every", "shape", "you", "see", "please", "why",
)  # fmt: skip
_UNICODE = (
    "日本語", "العربية", "Ünïcödé", "e\u0301", "🙂🙃", "👩‍🔬", "\u200b", "\u202e", "Ελληνικά", "ﷺ",
    "naïve", "𝔐𝔞𝔱𝔥", "\t", "\n\n", "—", "한국어",
)  # fmt: skip
_SIDES = (5, 8, 17, 31, 32, 33, 64, 100, 127, 128, 129, 160)
# Down to one pixel. Heights of 1, 3 and 4 pixels look like channels to transformers, which then
# takes its first image's layout for all: only cases of a single image draw them.
_TINY_SIDES = (1, 2, 3, 4, 5)
_LONG_SIDES = (40, 97, 150, 256, 400)
_EXAMPLES = 6  # the first examples of a run are hypothesis's simplest; the last one is kept


def _words(minimum: int, maximum: int) -> SearchStrategy[str]:
    return st.lists(st.sampled_from(_WORDS), min_size=minimum, max_size=maximum).map(" ".join)


def _images(sizes: SearchStrategy[tuple[int, int]]) -> SearchStrategy[ImageRecipe]:
    return st.builds(
        lambda kind, size, seed: ImageRecipe(kind, size[0], size[1], seed=seed),
        st.sampled_from(IMAGE_KINDS),
        sizes,
        st.integers(0, 2**16 - 1),
    )


_NO_TEXT = st.just("")
_TEXT = _words(1, 8)
_PIECE = st.one_of(st.sampled_from(_UNICODE), st.sampled_from(_WORDS))
_UNICODE_TEXT = st.tuples(
    st.sampled_from(_UNICODE), st.lists(_PIECE, min_size=1, max_size=6).map(" ".join)
).map("".join)
_SIDE, _TINY_SIDE, _LONG_SIDE = map(st.sampled_from, (_SIDES, _TINY_SIDES, _LONG_SIDES))
_ANY_IMAGE = _images(st.tuples(_SIDE, _SIDE))
_TINY = _images(
    st.one_of(
        st.tuples(_TINY_SIDE, _TINY_SIDE),
        st.tuples(_TINY_SIDE, _LONG_SIDE),
        st.tuples(_LONG_SIDE, _TINY_SIDE),
    )
)
_CHAT, _NO_CHAT = st.just(True), st.just(False)
_RGB = ("RGB",)


@dataclass(frozen=True, slots=True)
class _Theme:
    """What a variant is about.

    Args:
        images: how many, at least and at most; each is placed between two pieces of text.
        text: the pieces of the prompt.
        modes: what the images are dealt; the first one is dealt instead of one that was refused.
    """

    images: tuple[int, int]
    text: SearchStrategy[str]
    image: SearchStrategy[ImageRecipe] = _ANY_IMAGE
    chat: SearchStrategy[bool] = _NO_CHAT
    padding: tuple[int, int] = (0, 0)
    right_padding: tuple[int, int] = (0, 0)
    second: SearchStrategy[str] = _NO_TEXT
    modes: tuple[str, ...] = IMAGE_MODES


@st.composite
def _recipes(draw: st.DrawFn, theme: _Theme) -> CaseRecipe:
    """Draw a recipe of a theme, all of whose images are RGB."""
    fewest, most = theme.images
    pictures = draw(st.lists(theme.image, min_size=fewest, max_size=most))
    pieces = [draw(theme.text)] + [draw(st.one_of(st.just(""), theme.text)) for _ in pictures]
    order = draw(st.permutations(pieces))
    return CaseRecipe(
        prompt="<image>".join(order),
        images=tuple(pictures),
        chat=draw(theme.chat),
        left_padding=draw(st.integers(*theme.padding)),
        right_padding=draw(st.integers(*theme.right_padding)),
        second=draw(theme.second),
    )


_IMAGE_TEXT_THEMES = (
    # left padding: the one theme in which an ignored attention mask shows
    _Theme((1, 1), _TEXT, padding=(3, 24)),
    _Theme((0, 0), _words(3, 12)),
    _Theme((2, 2), _TEXT),
    _Theme((1, 1), _TEXT, chat=_CHAT),
    _Theme((1, 1), _UNICODE_TEXT),
    _Theme((3, 3), _TEXT),
    _Theme((1, 1), _TEXT, image=_TINY, modes=_RGB),
    _Theme((0, 1), _words(60, 120)),
    _Theme((0, 1), _NO_TEXT, chat=st.booleans()),
    _Theme((1, 1), _TEXT, modes=IMAGE_MODES[1:]),
    _Theme((0, 0), _UNICODE_TEXT, padding=(1, 12)),
    _Theme((2, 3), _TEXT, chat=_CHAT),
)
_TEXT_THEMES = (
    _Theme((0, 0), _TEXT, padding=(3, 24)),
    _Theme((0, 0), _words(3, 12)),
    _Theme((0, 0), _UNICODE_TEXT),
    _Theme((0, 0), _words(60, 120)),
    _Theme((0, 0), _TEXT, chat=_CHAT),
    _Theme((0, 0), _UNICODE_TEXT, padding=(1, 12)),
    _Theme((0, 0), _words(1, 1)),
)
_ENCODER_THEMES = (
    _Theme((0, 0), _TEXT, padding=(3, 24)),
    _Theme((0, 0), _TEXT, second=_TEXT, right_padding=(1, 24)),
    _Theme((0, 0), _UNICODE_TEXT, right_padding=(1, 12)),
    _Theme((0, 0), _words(60, 120)),
    _Theme((0, 0), _words(3, 12)),
    _Theme((0, 0), _words(1, 3), second=_TEXT, padding=(1, 12)),
    _Theme((0, 0), _words(1, 1)),
)
_IMAGE_THEMES = (
    _Theme((1, 1), _NO_TEXT),
    _Theme((1, 1), _NO_TEXT, image=_TINY, modes=_RGB),
    # Processors of images alone stack them: they must be of one kind.
    _Theme((2, 3), _NO_TEXT, modes=_RGB),
)
_THEMES: Mapping[InputKind, tuple[_Theme, ...]] = {
    InputKind.BOTH: _IMAGE_TEXT_THEMES,
    InputKind.TEXT: _TEXT_THEMES,
    InputKind.ENCODER_TEXT: _ENCODER_THEMES,
    InputKind.IMAGES: _IMAGE_THEMES,
}


def _deal_modes(
    recipe: CaseRecipe, modes: tuple[str, ...], *, first: int, attempt: int
) -> CaseRecipe:
    """Give the images the modes that follow each other from place `first` on.

    After a refusal some have the first mode instead, in every combination. A reference that takes
    only that mode is given it at last, and one that takes others is still given those.
    """
    images = []
    for place, image in enumerate(recipe.images):
        replaced = attempt >> place & 1
        mode = modes[0 if replaced else (first + place) % len(modes)]
        images.append(replace(image, mode=mode))
    return replace(recipe, images=tuple(images))


def draw_recipe(
    *, seed: int, index: int, attempt: int, kind: InputKind = InputKind.BOTH
) -> CaseRecipe:
    """Draw the recipe of variant `index`; another `attempt` gives another recipe of its theme."""
    themes = _THEMES[kind]
    round_of_themes, place = divmod(index, len(themes))
    theme = themes[place]
    images_before = sum(earlier.images[1] for earlier in themes[:place])
    drawn: list[CaseRecipe] = []

    @hypothesis.seed((seed * 1_000_003 + index) * 1_009 + attempt)
    @hypothesis.settings(
        max_examples=_EXAMPLES,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(_recipes(theme))
    def collect(recipe: CaseRecipe) -> None:
        drawn.append(recipe)

    run: Callable[[], Any] = collect
    with temporary_hypothesis_folder():
        run()
    first = seed + round_of_themes + images_before
    return _deal_modes(drawn[-1], theme.modes, first=first, attempt=attempt)
