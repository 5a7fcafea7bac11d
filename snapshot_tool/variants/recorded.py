"""Variants for a recording: prompts and images that hypothesis draws, reproducibly, from a seed.

Each variant has a theme, so that even a dozen of them cover what a port can get wrong: padding,
number and placement of images, chat template, unicode, lengths, sizes, modes. Within its theme
hypothesis draws freely. The recipes are stored with the golden set, which is what a re-recording
uses: hypothesis's draws may change with its version and with the code around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from snapshot_tool.core.recipes import IMAGE_KINDS, IMAGE_MODES, CaseRecipe, ImageRecipe, InputKind
from snapshot_tool.variants.home import own_home

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


def _text() -> SearchStrategy[str]:
    return _words(1, 8)


def _unicode_text() -> SearchStrategy[str]:
    pieces = st.one_of(st.sampled_from(_UNICODE), st.sampled_from(_WORDS))
    return st.tuples(
        st.sampled_from(_UNICODE), st.lists(pieces, min_size=1, max_size=6).map(" ".join)
    ).map("".join)


def _images(
    *,
    sides: SearchStrategy[tuple[int, int]] | None = None,
    modes: tuple[str, ...] = IMAGE_MODES,
) -> SearchStrategy[ImageRecipe]:
    side = st.sampled_from(_SIDES)
    return st.builds(
        lambda kind, size, mode, seed: ImageRecipe(kind, size[0], size[1], mode, seed),
        st.sampled_from(IMAGE_KINDS),
        sides if sides is not None else st.tuples(side, side),
        st.sampled_from(modes),
        st.integers(0, 2**16 - 1),
    )


def _tiny_sizes() -> SearchStrategy[tuple[int, int]]:
    tiny, long = st.sampled_from(_TINY_SIDES), st.sampled_from(_LONG_SIDES)
    return st.one_of(st.tuples(tiny, tiny), st.tuples(tiny, long), st.tuples(long, tiny))


_ANY_IMAGE = _images()
_NO_CHAT = st.just(False)


@st.composite
def _case(
    draw: st.DrawFn,
    *,
    images: tuple[int, int],
    text: SearchStrategy[str],
    image: SearchStrategy[ImageRecipe] = _ANY_IMAGE,
    chat: SearchStrategy[bool] = _NO_CHAT,
    padding: tuple[int, int] = (0, 0),
) -> CaseRecipe:
    """Draw a case: so many images, each placed somewhere between pieces of text."""
    pictures = draw(st.lists(image, min_size=images[0], max_size=images[1]))
    pieces = [draw(text)] + [draw(st.one_of(st.just(""), text)) for _ in pictures]
    order = draw(st.permutations(pieces))
    return CaseRecipe(
        prompt="<image>".join(order),
        images=tuple(pictures),
        chat=draw(chat),
        left_padding=draw(st.integers(*padding)),
    )


_RGB = ("RGB",)
_Themes = tuple[Callable[[], SearchStrategy[CaseRecipe]], ...]
_IMAGE_TEXT_THEMES: _Themes = (
    # left padding: the one theme in which an ignored attention mask shows
    lambda: _case(images=(1, 1), text=_text(), padding=(3, 24)),
    lambda: _case(images=(0, 0), text=_words(3, 12)),
    lambda: _case(images=(2, 2), text=_text()),
    lambda: _case(images=(1, 1), text=_text(), chat=st.just(True)),
    lambda: _case(images=(1, 1), text=_unicode_text()),
    lambda: _case(images=(3, 3), text=_text()),
    lambda: _case(images=(1, 1), text=_text(), image=_images(sides=_tiny_sizes(), modes=_RGB)),
    lambda: _case(images=(0, 1), text=_words(60, 120)),
    lambda: _case(images=(0, 1), text=st.just(""), chat=st.booleans()),
    lambda: _case(images=(1, 1), text=_text(), image=_images(modes=IMAGE_MODES[1:])),
    lambda: _case(images=(0, 0), text=_unicode_text(), padding=(1, 12)),
    lambda: _case(images=(2, 3), text=_text(), chat=st.just(True)),
)
_TEXT_THEMES: _Themes = (
    lambda: _case(images=(0, 0), text=_text(), padding=(3, 24)),
    lambda: _case(images=(0, 0), text=_words(3, 12)),
    lambda: _case(images=(0, 0), text=_unicode_text()),
    lambda: _case(images=(0, 0), text=_words(60, 120)),
    lambda: _case(images=(0, 0), text=_text(), chat=st.booleans()),
    lambda: _case(images=(0, 0), text=_unicode_text(), padding=(1, 12)),
    lambda: _case(images=(0, 0), text=_words(1, 1)),
)
_NO_TEXT = st.just("")
# Image processors by themselves may refuse all modes but RGB: those are drawn until one is taken.
_IMAGE_THEMES: _Themes = (
    lambda: _case(images=(1, 1), text=_NO_TEXT),
    lambda: _case(images=(1, 1), text=_NO_TEXT, image=_images(sides=_tiny_sizes(), modes=_RGB)),
    lambda: _case(images=(2, 3), text=_NO_TEXT, image=_images(modes=_RGB)),
)
_THEMES: Mapping[InputKind, _Themes] = {
    InputKind.BOTH: _IMAGE_TEXT_THEMES,
    InputKind.TEXT: _TEXT_THEMES,
    InputKind.IMAGES: _IMAGE_THEMES,
}


def draw_recipe(
    *, seed: int, index: int, attempt: int, kind: InputKind = InputKind.BOTH
) -> CaseRecipe:
    """Draw the recipe of variant `index`; another `attempt` gives another recipe of its theme."""
    themes = _THEMES[kind]
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
    @hypothesis.given(themes[index % len(themes)]())
    def collect(recipe: CaseRecipe) -> None:
        drawn.append(recipe)

    run: Callable[[], Any] = collect
    with own_home():
        run()
    return drawn[-1]
