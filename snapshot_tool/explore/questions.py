"""Derived questions: inputs that were not recorded, whose outputs follow from the golden set.

The decoder is causal and the tiles of an image are encoded one by one. The recorded outputs of a
prompt therefore also apply to its prefixes, with any padding, batching or prefilling.

Each kind of question is one class. It has the fields of the question, draws it, and runs it on a
candidate. To add a kind, write its class and add it to KINDS.

A question has a text form, KIND:FIELD:…, which `--replay` parses. A prompt is written CASE@TOKENS
or CASE@TOKENS+PADS, a list with commas.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import CaseInputs, Phase
from snapshot_tool.explore.recorded import Answer, Capabilities, Prompt, Recorded, some_tiles
from snapshot_tool.judge.generation import with_golden_tokens
from snapshot_tool.judge.phases import Pair

if TYPE_CHECKING:
    from snapshot_tool.explore.draw import Draw

_MAX_PADS = 40
_MAX_ROWS = 4
_MAX_ORDER = 99

Cases = Sequence[Capabilities]


class Question(ABC):
    """A question. Subclasses are frozen dataclasses whose fields are the rest of the text form.

    Class attributes:
        kind: the first word of the text form.
        phase: the phase with the recorded output.
        method: the candidate's method that is called.
        example: a text form.
        pads: whether it pads prompts, so that only paddable cases can be used.
        optional: whether it is left out, not skipped, if the candidate lacks the method.
        enough: whether a case that has the phase can be used for this kind.
    """

    __slots__ = ()

    kind: ClassVar[str]
    phase: ClassVar[Phase]
    method: ClassVar[str]
    example: ClassVar[str]
    pads: ClassVar[bool] = False
    optional: ClassVar[bool] = False
    enough: ClassVar[staticmethod[[Capabilities], bool]] = staticmethod(lambda _case: True)

    @classmethod
    @abstractmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw a question about some of the cases, which are in the order of their length.

        Smaller numbers must be simpler to draw, so that hypothesis shrinks to the shortest prompt
        and the fewest tokens, pads, rows and tiles that still fail.
        """

    @abstractmethod
    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run the question on a candidate and return its output, with the recorded one.

        Raises UsageError if the golden set has no output for it, and the candidate's exceptions.
        """

    @property
    def first_case(self) -> str:
        """The case of the question, or the first of several."""
        first = self._values()[0]
        first = first[0] if isinstance(first, tuple) else first
        return first.case if isinstance(first, Prompt) else str(first)

    def __str__(self) -> str:
        """Return the text form."""
        values = [
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for value in self._values()
        ]
        return ":".join([self.kind, *values])

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]


def _draw_prompt(draw: Draw, cases: Cases, pads: tuple[int, int] = (0, 0)) -> Prompt:
    """Draw a recorded prompt up to one of its cuts, with at least and at most so many pads."""
    case = draw.one_of(cases)
    return Prompt(case.case, draw.early(list(case.cuts)), draw.integer(*pads))


@dataclass(frozen=True, slots=True)
class Prefix(Question):
    """Logits of a prompt's first tokens, which later tokens must not change."""

    kind = "prefix"
    phase = Phase.FORWARD
    method = "forward"
    example = "prefix:one-image@12"
    prompt: Prompt

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw a prompt; with padding, at least one pad."""
        return cls(_draw_prompt(draw, cases, (1, _MAX_PADS) if cls.pads else (0, 0)))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run one forward pass."""
        return recorded.logits([self.prompt], candidate.forward(recorded.inputs(self.prompt)))


@dataclass(frozen=True, slots=True)
class Padding(Prefix):
    """Logits of a prompt's first tokens, with padding."""

    kind = "padding"
    example = "padding:one-image@12+3"
    pads = True


@dataclass(frozen=True, slots=True)
class Split(Question):
    """Logits of a prompt prefilled in two parts: all padding and `first` tokens, then the rest."""

    kind = "split"
    phase = Phase.FORWARD
    method = "forward_in_parts"
    example = "split:one-image@12:5"
    enough = staticmethod(lambda case: len(case.cuts) > 1)
    prompt: Prompt
    first: int

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw a prompt of at least two cuts, and one of the earlier cuts."""
        case = draw.one_of(cases)
        cuts = list(case.cuts)
        length = draw.early(cuts[1:])
        first = draw.one_of(cuts[: cuts.index(length)])
        pads = draw.integer(0, _MAX_PADS if case.paddable else 0)
        return cls(Prompt(case.case, length, pads), first)

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run both parts with one cache. The mask of the second one covers both."""
        if not self.first < self.prompt.length:
            raise UsageError(f"{self}: nothing is left for the second part")
        whole = recorded.inputs(self.prompt)
        cut = self.prompt.pads + self.first
        tiles = recorded.tiles_within(self.prompt.case, self.first)
        first, second = (
            CaseInputs(
                whole.input_ids[:, tokens],
                whole.attention_mask[:, : tokens.stop],
                some_tiles(whole.pixel_values, images),
                some_tiles(whole.pixel_attention_mask, images),
            )
            for tokens, images in (
                (slice(cut), slice(tiles)),
                (slice(cut, None), slice(tiles, None)),
            )
        )
        return recorded.logits([self.prompt], candidate.forward_in_parts([first, second]))


@dataclass(frozen=True, slots=True)
class Batch(Question):
    """Logits of several prompts in one batch, padded to one length."""

    kind = "batch"
    phase = Phase.FORWARD
    method = "forward_batch"
    example = "batch:one-image@12,two-images@7"
    pads = True
    prompts: tuple[Prompt, ...]

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw at least two prompts."""
        rows = draw.integer(2, _MAX_ROWS)
        return cls(tuple(_draw_prompt(draw, cases) for _ in range(rows)))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run one forward pass over all prompts."""
        prompts = recorded.batch(self.prompts)
        rows = [recorded.inputs(prompt) for prompt in prompts]
        return recorded.logits(prompts, candidate.forward_batch(rows))


@dataclass(frozen=True, slots=True)
class VisionTiles(Question):
    """Features of some of a case's tiles, in any order."""

    kind = "tiles"
    phase = Phase.VISION
    method = "vision"
    example = "tiles:one-image:0,3,2"
    enough = staticmethod(lambda case: case.tiles > 0)
    case: str
    tiles: tuple[int, ...]

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw at least one tile, each at most once."""
        case = draw.one_of(cases)
        return cls(case.case, draw.different(draw.integer(1, case.tiles), below=case.tiles))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Encode the tiles."""
        output = candidate.vision(recorded.pixels(self.case, self.tiles))
        return recorded.features(self.case, self.phase, self.tiles, output)


@dataclass(frozen=True, slots=True)
class ConnectorTiles(VisionTiles):
    """Image tokens of some of a case's tiles, in any order, from the recorded features."""

    kind = "connector-tiles"
    phase = Phase.CONNECTOR
    method = "connector"
    example = "connector-tiles:one-image:0,3,2"

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run the connector on the features of the tiles."""
        output = candidate.connector(recorded.connector_input(self.case, self.tiles))
        return recorded.features(self.case, self.phase, self.tiles, output)


@dataclass(frozen=True, slots=True)
class Shorter(Question):
    """The recorded new tokens before step `cut`."""

    kind = "shorter"
    phase = Phase.GENERATE
    method = "generate"
    example = "shorter:one-image:5"
    enough = staticmethod(lambda case: case.generated > 1)
    case: str
    cut: int

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw the step before which the generation is cut."""
        case = draw.one_of(cases)
        return cls(case.case, draw.integer(1, case.generated - 1))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Generate fewer tokens."""
        expected = recorded.new_tokens(self.case, needed=self.cut)[: self.cut]
        output = candidate.generate(
            recorded.golden.inputs(self.case),
            max_new_tokens=self.cut,
            eos_token_ids=recorded.golden.manifest.generation.eos_token_ids,
        )
        return [Answer(self.case, Pair("", expected, output))]


@dataclass(frozen=True, slots=True)
class Resumed(Shorter):
    """The recorded new tokens from step `cut` on, from the prompt and the tokens before."""

    kind = "resumed"
    example = "resumed:one-image:5"

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Generate from the prompt and the tokens before the cut."""
        generation = recorded.golden.manifest.generation
        tokens = recorded.new_tokens(self.case, needed=self.cut + 1)
        output = candidate.generate(
            with_golden_tokens(recorded.golden, self.case, end=self.cut),
            max_new_tokens=generation.max_new_tokens - self.cut,
            eos_token_ids=generation.eos_token_ids,
        )
        return [Answer(self.case, Pair("", tokens[self.cut :], output), step=self.cut)]


@dataclass(frozen=True, slots=True)
class Chunks(Prefix):
    """Logits of a prompt on a paged cache, `chunk` tokens at a time, with blocks in any order."""

    kind = "chunks"
    method = "cache_layout"
    example = "chunks:one-image@12+3:5:0"
    pads = True
    optional = True
    chunk: int
    order: int

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw a prompt with any number of pads, the size of a chunk, and an order of blocks."""
        prompt = _draw_prompt(draw, cases, (0, _MAX_PADS))
        return cls(prompt, *_draw_layout(draw, prompt.length))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Run one forward pass."""
        with candidate.cache_layout(chunk=self.chunk, order=self.order):
            return Prefix.run(self, candidate, recorded)


@dataclass(frozen=True, slots=True)
class ResumedChunks(Resumed):
    """A resumed generation on a paged cache, with the prompt in chunks and blocks in any order."""

    kind = "resumed-chunks"
    method = "cache_layout"
    example = "resumed-chunks:one-image:5:7:0"
    pads = True
    optional = True
    chunk: int
    order: int

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw where the generation is resumed, the size of a chunk, and an order of blocks."""
        case = draw.one_of(cases)
        cut = draw.integer(1, case.generated - 1)
        return cls(case.case, cut, *_draw_layout(draw, case.length + cut))

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Generate from the prompt and the tokens before the cut."""
        with candidate.cache_layout(chunk=self.chunk, order=self.order):
            return Resumed.run(self, candidate, recorded)


def _draw_layout(draw: Draw, length: int) -> tuple[int, int]:
    """Return the size of a chunk and an order of blocks for a prompt."""
    return draw.early(range(1, length + 1)), draw.integer(0, _MAX_ORDER)


@dataclass(frozen=True, slots=True)
class GenerationBatch(Question):
    """The first `tokens` new tokens of several cases in one batch, padded on the left."""

    kind = "generation-batch"
    phase = Phase.GENERATE
    method = "generate_batch"
    example = "generation-batch:one-image,two-images:5"
    pads = True
    cases: tuple[str, ...]
    tokens: int

    @classmethod
    def draw(cls, draw: Draw, cases: Cases) -> Self:
        """Draw at least two cases, and up to as many tokens as the longest generation has."""
        rows = [draw.one_of(cases) for _ in range(draw.integer(2, _MAX_ROWS))]
        tokens = draw.integer(1, max(case.generated for case in rows))
        return cls(tuple(case.case for case in rows), tokens)

    def run(self, candidate: Any, recorded: Recorded) -> list[Answer]:
        """Generate for all whole prompts at once."""
        generation = recorded.golden.manifest.generation
        if not 0 < self.tokens <= generation.max_new_tokens:
            most = generation.max_new_tokens
            raise UsageError(f"{self}: at most {most} new tokens were recorded")
        expected = [recorded.new_tokens(case, needed=1)[: self.tokens] for case in self.cases]
        prompts = [Prompt(case, recorded.case(case).length) for case in self.cases]
        outputs = candidate.generate_batch(
            [recorded.inputs(prompt) for prompt in recorded.batch(prompts)],
            max_new_tokens=self.tokens,
            eos_token_ids=generation.eos_token_ids,
        )
        if not isinstance(outputs, list | tuple) or len(outputs) != len(expected):
            # The comparison reports the wrong type or shape.
            outputs = [outputs] * len(expected)
        return [
            Answer(case, Pair("", tokens, output))
            for case, tokens, output in zip(self.cases, expected, outputs, strict=True)
        ]


KINDS: Mapping[str, type[Question]] = {
    question.kind: question
    for question in (
        *(Prefix, Padding, Split, Batch),
        *(VisionTiles, ConnectorTiles),
        *(Shorter, Resumed, GenerationBatch),
        *(Chunks, ResumedChunks),
    )
}


def parse_question(text: str) -> Question:
    """Return the question with a text form; raise UsageError if there is none."""
    name, *words = text.split(":")
    if name not in KINDS:
        raise UsageError(
            f"{text!r} is not a valid question: unknown kind {name!r}",
            f"valid kinds: {', '.join(KINDS)}",
        )
    kind = KINDS[name]
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    try:
        values = [_PARSERS[f.type](word) for f, word in zip(fields, words, strict=True)]
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a valid question of kind {name}", f"for example: {kind.example}"
        ) from error
    return kind(*values)


def _parse_prompt(text: str) -> Prompt:
    match = re.fullmatch(r"([a-z0-9-]+)@(\d+)(?:\+(\d+))?", text)
    if match is None:
        raise ValueError(text)
    return Prompt(match[1], int(match[2]), int(match[3] or 0))


# By the annotation of a question's field.
_PARSERS: Mapping[Any, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "Prompt": _parse_prompt,
    "tuple[str, ...]": lambda text: tuple(text.split(",")),
    "tuple[int, ...]": lambda text: tuple(map(int, text.split(","))),
    "tuple[Prompt, ...]": lambda text: tuple(map(_parse_prompt, text.split(","))),
}
