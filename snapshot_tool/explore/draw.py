"""Questions that hypothesis derives from a golden set at check time, and shrinks where they fail.

Cases come in the order of their length, and all numbers from the smallest: what hypothesis shrinks
to is the shortest prompt, the fewest tokens, pads, rows and tiles that still fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

import hypothesis
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from snapshot_tool.base.hypothesis_folder import own_home
from snapshot_tool.base.questions import (
    Batch,
    ConnectorTiles,
    GenerationBatch,
    Padding,
    Prefix,
    Prompt,
    Question,
    Resumed,
    Shorter,
    Split,
    Subject,
    VisionTiles,
)

_MAX_PADS = 40
_MAX_ROWS = 4
_SHORT = 8
_NO_PADS = (0, 0)

Strategy = SearchStrategy[Question]


def questions_of(kind: type[Question], subjects: Sequence[Subject]) -> Strategy | None:
    """Return a strategy for a kind of question; None where no case has an answer to any."""
    ordered = sorted(subjects, key=lambda subject: (subject.length, subject.case))
    usable = [s for s in ordered if kind.phase in s.phases and _HAS_ANSWERS[kind](s)]
    return _STRATEGIES[kind](usable) if usable else None


def find_smallest_failure(
    questions: Strategy, fails: Callable[[Question], bool], *, count: int, seed: str
) -> Question | None:
    """Draw up to `count` questions; return the smallest that `fails`, or None where none does.

    Draws repeat for one seed as long as the installed code is the same: a question's text form is
    what repeats it for certain.
    """
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    random = Random(seed)  # noqa: S311 - for drawing, not for secrets
    with own_home():
        try:
            return hypothesis.find(questions, fails, settings=settings, random=random)
        except NoSuchExample:
            return None


@st.composite
def _prompt(
    draw: st.DrawFn, subjects: Sequence[Subject], pads: tuple[int, int] = _NO_PADS
) -> Prompt:
    subject = draw(st.sampled_from(subjects))
    return Prompt(subject.case, draw(_length(list(subject.cuts))), draw(st.integers(*pads)))


def _length(cuts: Sequence[int]) -> SearchStrategy[int]:
    """Draw where a prompt is cut; every other time in its first few tokens, where edges are."""
    return st.one_of(st.sampled_from(cuts[:_SHORT]), st.sampled_from(cuts))


@st.composite
def _split(draw: st.DrawFn, subjects: Sequence[Subject]) -> Question:
    subject = draw(st.sampled_from(subjects))
    cuts = list(subject.cuts)
    length = draw(_length(cuts[1:]))
    first = draw(st.sampled_from(cuts[: cuts.index(length)]))
    pads = draw(st.integers(0, _MAX_PADS if subject.paddable else 0))
    return Split(Prompt(subject.case, length, pads), first)


@st.composite
def _tiles(
    draw: st.DrawFn, subjects: Sequence[Subject], kind: type[VisionTiles | ConnectorTiles]
) -> Question:
    subject = draw(st.sampled_from(subjects))
    tile = st.integers(0, subject.tiles - 1)
    # All numbers of tiles alike: lists that hypothesis draws by itself are mostly short.
    size = draw(st.integers(1, subject.tiles))
    tiles = draw(st.lists(tile, min_size=size, max_size=size, unique=True))
    return kind(subject.case, tuple(tiles))


@st.composite
def _generation(
    draw: st.DrawFn, subjects: Sequence[Subject], kind: type[Shorter | Resumed]
) -> Question:
    subject = draw(st.sampled_from(subjects))
    return kind(subject.case, draw(st.integers(1, subject.generated - 1)))


@st.composite
def _generation_batch(draw: st.DrawFn, subjects: Sequence[Subject]) -> Question:
    rows = draw(st.lists(st.sampled_from(subjects), min_size=2, max_size=_MAX_ROWS))
    tokens = draw(st.integers(1, max(subject.generated for subject in rows)))
    return GenerationBatch(tuple(subject.case for subject in rows), tokens)


def _batch(subjects: Sequence[Subject]) -> Strategy:
    rows = st.lists(_prompt(subjects), min_size=2, max_size=_MAX_ROWS)
    return rows.map(lambda prompts: Batch(tuple(prompts)))


_STRATEGIES: Mapping[type[Question], Callable[[Sequence[Subject]], Strategy]] = {
    Prefix: lambda subjects: _prompt(subjects).map(Prefix),
    Padding: lambda subjects: _prompt(subjects, (1, _MAX_PADS)).map(Padding),
    Split: _split,
    Batch: _batch,
    VisionTiles: lambda subjects: _tiles(subjects, VisionTiles),
    ConnectorTiles: lambda subjects: _tiles(subjects, ConnectorTiles),
    Shorter: lambda subjects: _generation(subjects, Shorter),
    Resumed: lambda subjects: _generation(subjects, Resumed),
    GenerationBatch: _generation_batch,
}


def _always(_subject: Subject) -> bool:
    return True


def _has_tiles(subject: Subject) -> bool:
    return subject.tiles > 0


def _paddable(subject: Subject) -> bool:
    return subject.paddable


def _goes_on(subject: Subject) -> bool:
    return subject.generated > 1


_HAS_ANSWERS: Mapping[type[Question], Callable[[Subject], bool]] = {
    Prefix: _always,
    Padding: _paddable,
    Split: lambda subject: len(subject.cuts) > 1,
    Batch: _paddable,
    VisionTiles: _has_tiles,
    ConnectorTiles: _has_tiles,
    Shorter: _goes_on,
    Resumed: _goes_on,
    GenerationBatch: _paddable,
}
