"""Asking a candidate one question: what it answers, beside what the golden set holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.errors import PhaseUnsupported, UsageError
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
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import connector_input, recorded
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.oracle import Rows
from snapshot_tool.judge.phases import Pair, pairs_with
from snapshot_tool.numerics.compact import CompactTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Recorded:
    """A golden set seen by prompts and their beginnings, tiles and new tokens.

    subjects: what can be asked about each case, by name.
    """

    golden: Golden
    subjects: Mapping[str, Subject]

    def subject(self, case: str) -> Subject:
        """Return what can be asked about a case."""
        if case not in self.subjects:
            raise UsageError(
                f"there is no case {case} to ask about", f"there are: {', '.join(self.subjects)}"
            )
        return self.subjects[case]

    def tiles_within(self, case: str, length: int) -> int:
        """Return how many tiles belong to the first `length` tokens of a prompt."""
        cuts = self.subject(case).cuts
        if length not in cuts:
            raise UsageError(
                f"the prompt of {case} cannot be cut after {length} tokens",
                f"it has {max(cuts)}, and no image tile can be cut in two",
            )
        return cuts[length]

    def inputs(self, prompt: Prompt) -> CaseInputs:
        """Return a prompt's tensors, its own padding and the tiles that belong to it."""
        import torch

        tiles = self.tiles_within(prompt.case, prompt.length)
        whole = self.golden.inputs(prompt.case)
        ids = whole.input_ids[:, parts.real_positions(whole)[: prompt.length]]
        pads = ids.new_full((1, prompt.pads), self.golden.manifest.generation.pad_token_id)
        mask = [torch.zeros_like(pads), torch.ones_like(ids)]
        return CaseInputs(
            torch.cat([ids, pads] if self.pads_right else [pads, ids], dim=1),
            torch.cat(mask[::-1] if self.pads_right else mask, dim=1),
            some(whole.pixel_values, slice(tiles)),
            some(whole.pixel_attention_mask, slice(tiles)),
            # Only whole prompts have sizes: what is told of images cannot be cut between tiles.
            whole.image_sizes,
        )

    @property
    def pads_right(self) -> bool:
        """Whether derived padding is on the right: an encoder counts positions from the left."""
        return not family_of(self.golden.manifest.checkpoint.family).generates

    def without_padding(self, prompt: Prompt, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (length, …) of a prompt's own tokens."""
        return rows[: prompt.length] if self.pads_right else rows[prompt.pads :]

    def padded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Pad prompts to the length of the longest."""
        longest = max(prompt.length for prompt in prompts)
        return [Prompt(p.case, p.length, longest - p.length) for p in prompts]

    def vocabulary(self, case: str) -> int:
        """Return how many logits a position has."""
        return len(self.golden.tensor(case, Phase.FORWARD, parts.LOGITS))

    def position_pairs(self, prompt: Prompt, logits: torch.Tensor) -> list[Pair]:
        """Return what is recorded of a prompt's positions beside the same of logits.

        logits: (length, vocabulary), without padding.
        """
        kept = {
            name: self.golden.tensor(prompt.case, Phase.FORWARD, name)[: prompt.length]
            for name in (*parts.POSITION_RECORDS, "position_topk_ids")
        }
        actual = parts.position_records(
            parts.widened(logits),
            topk_ids=kept["position_topk_ids"],
            sample_ids=self.golden.tensor(prompt.case, Phase.FORWARD, "position_sample_ids"),
        )
        return [Pair(name, kept[name], actual[name]) for name in parts.POSITION_RECORDS]

    def features(
        self, case: str, phase: Phase, tiles: Sequence[int]
    ) -> torch.Tensor | CompactTensor:
        """Return what vision or the connector made of some tiles, (tiles, places, width)."""
        self._require_tiles(case, tiles)
        whole = recorded(self.golden, case, phase, self.compared(phase))
        return whole.of_blocks(tiles) if isinstance(whole, CompactTensor) else whole[list(tiles)]

    def connector_input(self, case: str, tiles: Sequence[int]) -> torch.Tensor:
        """Return what the connector was given of some tiles, (tiles, patches, width)."""
        self._require_tiles(case, tiles)
        whole = connector_input(self.golden, case, self.compared(Phase.VISION))
        if whole is None:
            raise UsageError(f"what the connector was given of case {case} was not recorded")
        return whole[list(tiles)]

    def compared(self, phase: Phase) -> str:
        """Return the name of what vision or the connector is compared by."""
        return family_of(self.golden.manifest.checkpoint.family).compared[phase]

    def _require_tiles(self, case: str, tiles: Sequence[int]) -> None:
        there = self.subject(case).tiles
        if not tiles or not all(0 <= tile < there for tile in tiles):
            raise UsageError(f"case {case} has {there} tiles, from 0: {list(tiles)} are not there")

    def new_tokens(self, case: str, *, needed: int) -> torch.Tensor:
        """Return a case's recorded new tokens, (new,), of which `needed` must be there."""
        there = self.subject(case).generated
        if not 0 < needed <= there:
            raise UsageError(f"case {case} has {there} recorded new tokens, not {needed}")
        return self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)


def some(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Return some rows of what there is of an image, None where none are left."""
    if tensor is None or len(tensor[rows]) == 0:
        return None
    return tensor[rows]


@dataclass(frozen=True, slots=True)
class Answer:
    """A golden tensor of a case and what the candidate returned in its place.

    `rows` are those of the recorded tensor, by the pair's name, that the answer is about. `step` is
    the step of the recorded generation that new tokens begin with.
    """

    case: str
    pair: Pair
    rows: Rows = None
    step: int = 0

    @classmethod
    def of(cls, case: str, expected: torch.Tensor, actual: object, step: int = 0) -> Answer:
        """Return the answer that is one tensor."""
        return cls(case, Pair("", expected, actual), step=step)


@dataclass(frozen=True, slots=True)
class Examiner:
    """Asks a candidate about the cases of a golden set, under torch.inference_mode.

    candidate: anything; what it lacks makes the question unsupported.
    """

    candidate: Any
    recorded: Recorded

    def ask(self, question: Question) -> list[Answer]:
        """Ask; return one answer for each row.

        Raises PhaseUnsupported where the candidate cannot be asked this, UsageError where the
        golden has no answer, and whatever the candidate raises.
        """
        if reason := self.why_not(type(question)):
            raise PhaseUnsupported(reason)
        return _WAYS[type(question)](self, question)

    def why_not(self, kind: type[Question]) -> str:
        """Return why the candidate cannot be asked questions of a kind, or ""."""
        there = self.candidate.supports(kind.method)
        return "" if there else f"the candidate has no method {kind.method!r}"

    def ask_forward(self, question: Prefix | Padding) -> list[Answer]:
        """Run one prompt."""
        prompt = question.prompt
        answer = self.candidate.forward(self.recorded.inputs(prompt))
        if isinstance(answer, Mapping):
            answer = answer.get(parts.LOGITS)
        return self._logits([prompt], answer)

    def ask_parts(self, question: Split) -> list[Answer]:
        """Run one prompt in two parts."""
        prompt = question.prompt
        if not question.first < prompt.length:
            raise UsageError(f"{question}: nothing is left for the second part")
        tiles = self.recorded.tiles_within(prompt.case, question.first)
        inputs = _split(self.recorded.inputs(prompt), prompt.pads + question.first, tiles=tiles)
        return self._logits([prompt], self.candidate.forward_in_parts(inputs))

    def ask_batch(self, question: Batch) -> list[Answer]:
        """Run several prompts at once."""
        prompts = self.recorded.padded(question.prompts)
        rows = [self.recorded.inputs(prompt) for prompt in prompts]
        return self._logits(prompts, self.candidate.forward_batch(rows))

    def ask_vision(self, question: VisionTiles) -> list[Answer]:
        """Encode some tiles."""
        case, tiles = question.case, question.tiles
        expected = self.recorded.features(case, Phase.VISION, tiles)
        pixels = self.recorded.golden.image_input(case, "pixel_values")
        actual = self.candidate.vision(pixels[list(tiles)])  # type: ignore[index]
        if isinstance(actual, Mapping):
            actual = actual.get(self.recorded.compared(Phase.VISION))
        name = self.recorded.compared(Phase.VISION)
        return [Answer(case, pair, list(tiles)) for pair in pairs_with(expected, actual, name)]

    def ask_connector(self, question: ConnectorTiles) -> list[Answer]:
        """Connect what the golden's connector was given of some tiles."""
        case, tiles = question.case, question.tiles
        expected = self.recorded.features(case, Phase.CONNECTOR, tiles)
        actual = self.candidate.connector(self.recorded.connector_input(case, tiles))
        name = self.recorded.compared(Phase.CONNECTOR)
        return [Answer(case, pair, list(tiles)) for pair in pairs_with(expected, actual, name)]

    def ask_shorter(self, question: Shorter) -> list[Answer]:
        """Generate fewer tokens."""
        case = question.case
        expected = self.recorded.new_tokens(case, needed=question.tokens)[: question.tokens]
        inputs = self.recorded.golden.inputs(case)
        return [Answer.of(case, expected, self._generate(inputs, question.tokens))]

    def ask_resumed(self, question: Resumed) -> list[Answer]:
        """Generate from the prompt and the first of the recorded tokens."""
        case, given = question.case, question.given
        new = self.recorded.new_tokens(case, needed=given + 1)
        longer = _continued(self.recorded.golden.inputs(case), new[:given])
        left = self.recorded.golden.manifest.generation.max_new_tokens - given
        return [Answer.of(case, new[given:], self._generate(longer, left), step=given)]

    def ask_generation_batch(self, question: GenerationBatch) -> list[Answer]:
        """Generate for several whole prompts at once."""
        generation = self.recorded.golden.manifest.generation
        if not 0 < question.tokens <= generation.max_new_tokens:
            most = generation.max_new_tokens
            raise UsageError(f"{question}: {most} new tokens were recorded at most")
        expected = [self.recorded.new_tokens(case, needed=1) for case in question.cases]
        whole = [Prompt(case, self.recorded.subject(case).length) for case in question.cases]
        answers = self.candidate.generate_batch(
            [self.recorded.inputs(prompt) for prompt in self.recorded.padded(whole)],
            max_new_tokens=question.tokens,
            eos_token_ids=generation.eos_token_ids,
        )
        if not isinstance(answers, list | tuple) or len(answers) != len(expected):
            # Compared as it is, so that the mismatch of type or shape is named.
            answers = [answers] * len(expected)
        return [
            Answer.of(case, tokens[: question.tokens], answer)
            for case, tokens, answer in zip(question.cases, expected, answers, strict=True)
        ]

    def _generate(self, inputs: CaseInputs, tokens: int) -> object:
        ends = self.recorded.golden.manifest.generation.eos_token_ids
        return self.candidate.generate(inputs, max_new_tokens=tokens, eos_token_ids=ends)

    def _logits(self, prompts: Sequence[Prompt], answer: object) -> list[Answer]:
        """Return for each prompt the records of its positions."""
        import torch

        first = prompts[0]
        shape = (len(prompts), first.pads + first.length, self.recorded.vocabulary(first.case))
        if not isinstance(answer, torch.Tensor) or answer.shape != shape:
            # Compared as it is, so that the mismatch of type or shape is named.
            return [Answer.of(first.case, torch.zeros(()).expand(shape), answer)]
        return [
            Answer(prompt.case, pair, slice(prompt.length))
            for prompt, logits in zip(prompts, answer.to("cpu"), strict=True)
            for pair in self.recorded.position_pairs(
                prompt, self.recorded.without_padding(prompt, logits)
            )
        ]


def _split(inputs: CaseInputs, place: int, *, tiles: int) -> list[CaseInputs]:
    """Cut a prompt before token `place`; its first part has so many of the tiles."""
    return [
        CaseInputs(
            inputs.input_ids[:, :place],
            inputs.attention_mask[:, :place],
            some(inputs.pixel_values, slice(tiles)),
            some(inputs.pixel_attention_mask, slice(tiles)),
        ),
        CaseInputs(
            inputs.input_ids[:, place:],
            inputs.attention_mask,
            some(inputs.pixel_values, slice(tiles, None)),
            some(inputs.pixel_attention_mask, slice(tiles, None)),
        ),
    ]


def _continued(inputs: CaseInputs, tokens: torch.Tensor) -> CaseInputs:
    """Append tokens (new,) to a prompt."""
    import torch

    return replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, tokens[None]], dim=1),
        attention_mask=torch.cat([inputs.attention_mask, torch.ones_like(tokens[None])], dim=1),
    )


_WAYS: Mapping[type[Question], Callable[[Examiner, Any], list[Answer]]] = {
    Prefix: Examiner.ask_forward,
    Padding: Examiner.ask_forward,
    Split: Examiner.ask_parts,
    Batch: Examiner.ask_batch,
    VisionTiles: Examiner.ask_vision,
    ConnectorTiles: Examiner.ask_connector,
    Shorter: Examiner.ask_shorter,
    Resumed: Examiner.ask_resumed,
    GenerationBatch: Examiner.ask_generation_batch,
}
