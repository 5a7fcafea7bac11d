"""Questions that a golden set answers though nobody asked them when it was recorded.

The decoder is causal and the tiles of an image are encoded each by itself, so what was recorded of
whole prompts also holds for their beginnings, however they are padded, batched or prefilled.

Each question has a text form, KIND:…, which parses back: prompts are written CASE@TOKENS, or
CASE@TOKENS+PADS, lists with commas.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.phases import Phase


@dataclass(frozen=True, slots=True)
class Subject:
    """What can be asked about one case of a golden set.

    Args:
        case: its name.
        phases: the phases that were recorded of it.
        cuts: the numbers of tokens after which its prompt may be cut, in ascending order, each with
            the number of tiles that belong to so many tokens. The last one is the whole prompt.
        generated: the number of recorded new tokens.
        paddable: whether padding changes none of its answers.
    """

    case: str
    phases: frozenset[Phase]
    cuts: Mapping[int, int]
    generated: int
    paddable: bool = True

    @property
    def length(self) -> int:
        """Tokens of the whole prompt, without padding."""
        return max(self.cuts)

    @property
    def tiles(self) -> int:
        """Tiles of all its images."""
        return self.cuts[self.length]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first `length` tokens of a case's prompt, after `pads` tokens of padding."""

    case: str
    length: int
    pads: int = 0

    def __str__(self) -> str:
        """Write it as the text form has it."""
        return f"{self.case}@{self.length}" + (f"+{self.pads}" if self.pads else "")


class Question:
    """One question; subclasses are frozen dataclasses whose fields are the rest of the text form.

    `phase` is the phase whose recorded output answers it, `method` the candidate's method asked.
    """

    __slots__ = ()

    kind: ClassVar[str]
    phase: ClassVar[Phase]
    method: ClassVar[str]

    @property
    def first_case(self) -> str:
        """The case that it is about, or the first of them."""
        subject = self._values()[0]
        first = subject[0] if isinstance(subject, tuple) else subject
        return first.case if isinstance(first, Prompt) else str(first)

    def __str__(self) -> str:
        """Return the text form."""
        return ":".join([self.kind, *map(_write, self._values())])

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Prefix(Question):
    """Logits of a prompt's first tokens: nothing that follows may change them."""

    kind: ClassVar[str] = "prefix"
    phase: ClassVar[Phase] = Phase.FORWARD
    method: ClassVar[str] = "forward"
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Padding(Question):
    """Logits of a prompt's first tokens with padding on the left."""

    kind: ClassVar[str] = "padding"
    phase: ClassVar[Phase] = Phase.FORWARD
    method: ClassVar[str] = "forward"
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Split(Question):
    """Logits of a prompt prefilled in two parts: `first` tokens (after all padding), the rest."""

    kind: ClassVar[str] = "split"
    phase: ClassVar[Phase] = Phase.FORWARD
    method: ClassVar[str] = "forward_in_parts"
    prompt: Prompt
    first: int


@dataclass(frozen=True, slots=True)
class Batch(Question):
    """Logits of several prompts in one batch, padded on the left to one length."""

    kind: ClassVar[str] = "batch"
    phase: ClassVar[Phase] = Phase.FORWARD
    method: ClassVar[str] = "forward_batch"
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class VisionTiles(Question):
    """Features of some of a case's tiles, in any order."""

    kind: ClassVar[str] = "tiles"
    phase: ClassVar[Phase] = Phase.VISION
    method: ClassVar[str] = "vision"
    case: str
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ConnectorTiles(Question):
    """Image tokens of the golden's features of some of a case's tiles, in any order."""

    kind: ClassVar[str] = "connector-tiles"
    phase: ClassVar[Phase] = Phase.CONNECTOR
    method: ClassVar[str] = "connector"
    case: str
    tiles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shorter(Question):
    """The first so many of the recorded new tokens."""

    kind: ClassVar[str] = "shorter"
    phase: ClassVar[Phase] = Phase.GENERATE
    method: ClassVar[str] = "generate"
    case: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Resumed(Question):
    """The rest of the recorded new tokens, generated from the prompt and the first `given`."""

    kind: ClassVar[str] = "resumed"
    phase: ClassVar[Phase] = Phase.GENERATE
    method: ClassVar[str] = "generate"
    case: str
    given: int


@dataclass(frozen=True, slots=True)
class GenerationBatch(Question):
    """The first so many new tokens of several cases in one batch, padded on the left."""

    kind: ClassVar[str] = "generation-batch"
    phase: ClassVar[Phase] = Phase.GENERATE
    method: ClassVar[str] = "generate_batch"
    cases: tuple[str, ...]
    tokens: int


def parse_question(text: str) -> Question:
    """Return the question of a text form; raise UsageError where it is none."""
    kind, *fields = text.split(":")
    if kind not in _READERS:
        raise UsageError(
            f"{text!r} is no question: there is no kind {kind!r}", f"there are: {', '.join(KINDS)}"
        )
    readers = _READERS[kind]
    try:
        values = [read(field) for read, field in zip(readers, fields, strict=True)]
    except ValueError as error:
        raise UsageError(
            f"{text!r} is no question of kind {kind}",
            f"write for example {_EXAMPLES[kind]}",
        ) from error
    return KINDS[kind](*values)


def _write(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_prompt(text: str) -> Prompt:
    match = re.fullmatch(r"([a-z0-9-]+)@(\d+)(?:\+(\d+))?", text)
    if match is None:
        raise ValueError(text)
    return Prompt(match[1], int(match[2]), int(match[3] or 0))


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(read(part) for part in text.split(","))


KINDS: Mapping[str, type[Question]] = {
    question.kind: question
    for question in (
        *(Prefix, Padding, Split, Batch),
        *(VisionTiles, ConnectorTiles),
        *(Shorter, Resumed, GenerationBatch),
    )
}
_READERS: Mapping[str, tuple[Callable[[str], Any], ...]] = {
    Prefix.kind: (_read_prompt,),
    Padding.kind: (_read_prompt,),
    Split.kind: (_read_prompt, int),
    Batch.kind: (_several(_read_prompt),),
    VisionTiles.kind: (str, _several(int)),
    ConnectorTiles.kind: (str, _several(int)),
    Shorter.kind: (str, int),
    Resumed.kind: (str, int),
    GenerationBatch.kind: (_several(str), int),
}
_EXAMPLES: Mapping[str, str] = {
    Prefix.kind: "prefix:one-image@12",
    Padding.kind: "padding:one-image@12+3",
    Split.kind: "split:one-image@12:5",
    Batch.kind: "batch:one-image@12,two-images@7",
    VisionTiles.kind: "tiles:one-image:0,3,2",
    ConnectorTiles.kind: "connector-tiles:one-image:0,3,2",
    Shorter.kind: "shorter:one-image:5",
    Resumed.kind: "resumed:one-image:5",
    GenerationBatch.kind: "generation-batch:one-image,two-images:5",
}
