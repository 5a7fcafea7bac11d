"""Questions that hypothesis derives from a golden set at check time, and shrinks where they fail.

Cases come in the order of their length, and all numbers from the smallest: what hypothesis shrinks
to is the shortest prompt, the fewest tokens, pads, rows and tiles that still fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from tempfile import TemporaryDirectory

import hypothesis
from hypothesis import configuration
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs
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
from snapshot_tool.families import family_of
from snapshot_tool.families.family import PADDING, UNSEEN, Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import recorded_shape
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import phase_file


@contextmanager
def own_home() -> Iterator[None]:
    """Give hypothesis a temporary home: even without a database it leaves a .hypothesis folder."""
    # The user's own tests may have set one, and nothing public tells which.
    before = vars(configuration).get("__hypothesis_home_directory")
    with TemporaryDirectory(prefix="snap-") as home:
        configuration.set_hypothesis_home_dir(home)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(before)


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


def find_subjects(golden: Golden, cases: Sequence[str]) -> dict[str, Subject]:
    """Return what can be asked about each of the cases, by name."""
    family = family_of(golden.manifest.checkpoint.family)
    return {name: _subject(golden, name, family) for name in cases}


def _subject(golden: Golden, case: str, family: Family) -> Subject:
    inputs = golden.text(case)
    tiles = next(iter(golden.image_input_shape(case, "pixel_values")), 0)
    phases = set()
    padded = not bool(inputs.attention_mask.all())
    recurrent = family.recurrent and golden.manifest.environment.get(PADDING) != UNSEEN
    if family.generates and not (recurrent and padded):
        phases |= {Phase.FORWARD, Phase.GENERATE} & _recorded(golden, case)
    # An encoder's positions depend on padding before them, and its answers on token types.
    if _is_text_encoder(family) and not padded and inputs.token_type_ids is None:
        phases |= {Phase.FORWARD} & _recorded(golden, case)
    if golden.case(case).eos_token_ids is not None:
        # Questions about a generation have one set of end tokens for all cases.
        phases.discard(Phase.GENERATE)
    if tiles and _has_tiles_apart(golden, case, family, tiles):
        phases |= {Phase.VISION, Phase.CONNECTOR} & _recorded(golden, case)
    generated = 0
    if Phase.GENERATE in phases:
        generated = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    tile_id = golden.manifest.checkpoint.config.get(family.tile_id_field)
    if not _is_text_encoder(family):
        cuts = _cuts(inputs, tiles, tile_id if isinstance(tile_id, int) else -1)
    else:  # every token of an encoder sees all others: its prompts have no beginnings
        cuts = {inputs.input_ids.shape[1]: 0}
    return Subject(case, frozenset(phases), cuts, generated, paddable=not recurrent)


def _is_text_encoder(family: Family) -> bool:
    """Return whether a family takes text alone, and answers with logits of every position."""
    return family.logits and family.takes_text and not family.takes_images and not family.generates


def _recorded(golden: Golden, case: str) -> set[Phase]:
    return {p for p in golden.case(case).phases if phase_file(p) in golden.manifest.files}


def _has_tiles_apart(golden: Golden, case: str, family: Family, tiles: int) -> bool:
    """Tell whether vision and connector give each tile a row of its own, by the tile alone."""
    if golden.image_input_shape(case, "image_sizes"):
        return False
    phases = {Phase.VISION, Phase.CONNECTOR} & _recorded(golden, case)
    # The connector is fed with what was recorded of vision.
    return Phase.VISION in phases and all(
        recorded_shape(golden, case, phase, family.compared[phase])[:1] == (tiles,)
        for phase in phases
    )


def _cuts(inputs: CaseInputs, tiles: int, tile_id: int) -> dict[int, int]:
    """Return the tiles within each beginning of the prompt that does not cut a tile in two."""
    ids = inputs.input_ids[0, parts.real_positions(inputs)]
    if tiles == 0:
        return dict.fromkeys(range(1, len(ids) + 1), 0)
    before = ids.eq(tile_id).cumsum(0).tolist()
    each, left = divmod(before[-1] if before else 0, tiles)
    if each == 0 or left:
        # Not so many tokens for every tile (a vision encoder has no prompt at all): only the whole
        # of it is sure to be answered.
        return {len(ids): tiles}
    return {
        length: count // each for length, count in enumerate(before, start=1) if count % each == 0
    }
