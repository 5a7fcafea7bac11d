"""Asking a candidate one question: what it answers, beside what the golden set holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snapshot_tool.core.errors import PhaseUnsupported, UsageError
from snapshot_tool.core.interfaces import CaseInputs
from snapshot_tool.core.phases import Phase
from snapshot_tool.core.questions import (
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
from snapshot_tool.store import parts
from snapshot_tool.store.golden import Golden

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Answer:
    """A golden tensor of a case and what the candidate returned in its place."""

    case: str
    expected: torch.Tensor
    actual: object


@dataclass(frozen=True, slots=True)
class Examiner:
    """Asks a candidate about the cases of a golden set, under torch.inference_mode.

    candidate: anything; what it lacks makes the question unsupported.
    """

    candidate: Any
    golden: Golden
    subjects: Mapping[str, Subject]

    def ask(self, question: Question) -> list[Answer]:
        """Ask; return one answer for each row.

        Raises PhaseUnsupported where the candidate cannot be asked this, UsageError where the
        golden has no answer, and whatever the candidate raises.
        """
        self.require_method(type(question))
        return _WAYS[type(question)](self, question)

    def require_method(self, kind: type[Question]) -> None:
        """Raise PhaseUnsupported unless the candidate has the method that a kind needs."""
        if not callable(getattr(self.candidate, kind.method, None)):
            raise PhaseUnsupported(f"the candidate has no method {kind.method!r}")

    def ask_forward(self, question: Prefix | Padding) -> list[Answer]:
        """Run one prompt."""
        prompt = question.prompt
        return self._logits([prompt], self.candidate.forward(self._inputs(prompt)))

    def ask_parts(self, question: Split) -> list[Answer]:
        """Run one prompt in two parts."""
        prompt = question.prompt
        whole = self._inputs(prompt)
        tiles = self._tiles_within(prompt.case, question.first)
        place = prompt.pads + question.first
        if place >= whole.input_ids.shape[1]:
            raise UsageError(f"{question}: nothing is left for the second part")
        first = CaseInputs(
            whole.input_ids[:, :place],
            whole.attention_mask[:, :place],
            _some(whole.pixel_values, slice(tiles)),
            _some(whole.pixel_attention_mask, slice(tiles)),
        )
        second = CaseInputs(
            whole.input_ids[:, place:],
            whole.attention_mask,
            _some(whole.pixel_values, slice(tiles, None)),
            _some(whole.pixel_attention_mask, slice(tiles, None)),
        )
        return self._logits([prompt], self.candidate.forward_in_parts([first, second]))

    def ask_batch(self, question: Batch) -> list[Answer]:
        """Run several prompts at once."""
        prompts = self._padded(question.prompts)
        rows = [self._inputs(prompt) for prompt in prompts]
        return self._logits(prompts, self.candidate.forward_batch(rows))

    def ask_vision(self, question: VisionTiles) -> list[Answer]:
        """Encode some tiles."""
        tiles = self._tiles(question)
        pixels = self.golden.inputs(question.case).pixel_values
        if pixels is None:
            raise UsageError(f"case {question.case} has no images")
        answer = self.candidate.vision(pixels[tiles])
        return [Answer(question.case, self._recorded(question, Phase.VISION)[tiles], answer)]

    def ask_connector(self, question: ConnectorTiles) -> list[Answer]:
        """Connect the golden's features of some tiles."""
        tiles = self._tiles(question)
        answer = self.candidate.connector(self._recorded(question, Phase.VISION)[tiles])
        return [Answer(question.case, self._recorded(question, Phase.CONNECTOR)[tiles], answer)]

    def ask_shorter(self, question: Shorter) -> list[Answer]:
        """Generate fewer tokens."""
        recorded = self._new_tokens(question.case, question.tokens)
        actual = self.candidate.generate(
            self.golden.inputs(question.case),
            max_new_tokens=question.tokens,
            eos_token_ids=self.golden.manifest.generation.eos_token_ids,
        )
        return [Answer(question.case, recorded[: question.tokens], actual)]

    def ask_resumed(self, question: Resumed) -> list[Answer]:
        """Generate from the prompt and the first of the recorded tokens."""
        import torch

        generation = self.golden.manifest.generation
        recorded = self._new_tokens(question.case, question.given + 1)
        inputs = self.golden.inputs(question.case)
        given = recorded[None, : question.given]
        longer = CaseInputs(
            torch.cat([inputs.input_ids, given], dim=1),
            torch.cat([inputs.attention_mask, torch.ones_like(given)], dim=1),
            inputs.pixel_values,
            inputs.pixel_attention_mask,
        )
        actual = self.candidate.generate(
            longer,
            max_new_tokens=generation.max_new_tokens - question.given,
            eos_token_ids=generation.eos_token_ids,
        )
        return [Answer(question.case, recorded[question.given :], actual)]

    def ask_generation_batch(self, question: GenerationBatch) -> list[Answer]:
        """Generate for several whole prompts at once."""
        most = self.golden.manifest.generation.max_new_tokens
        if not 0 < question.tokens <= most:
            raise UsageError(f"{question}: {most} new tokens were recorded at most")
        expected = [self._new_tokens(case, 1)[: question.tokens] for case in question.cases]
        whole = [Prompt(case, self._subject(case).length) for case in question.cases]
        answers = self.candidate.generate_batch(
            [self._inputs(prompt) for prompt in self._padded(whole)],
            max_new_tokens=question.tokens,
            eos_token_ids=self.golden.manifest.generation.eos_token_ids,
        )
        if not isinstance(answers, list | tuple) or len(answers) != len(expected):
            # Compared as it is, so that the mismatch of type or shape is named.
            answers = [answers] * len(expected)
        return [Answer(*row) for row in zip(question.cases, expected, answers, strict=True)]

    def _subject(self, case: str) -> Subject:
        if case not in self.subjects:
            raise UsageError(
                f"there is no case {case} to ask about", f"there are: {', '.join(self.subjects)}"
            )
        return self.subjects[case]

    def _tiles_within(self, case: str, length: int) -> int:
        cuts = self._subject(case).cuts
        if length not in cuts:
            raise UsageError(
                f"the prompt of {case} cannot be cut after {length} tokens",
                f"it has {max(cuts)}, and no image tile can be cut in two",
            )
        return cuts[length]

    def _inputs(self, prompt: Prompt) -> CaseInputs:
        """Return a prompt's tensors, its own padding and the tiles that belong to it."""
        import torch

        tiles = self._tiles_within(prompt.case, prompt.length)
        inputs = self.golden.inputs(prompt.case)
        ids = inputs.input_ids[:, parts.real_positions(inputs)[: prompt.length]]
        pads = ids.new_full((1, prompt.pads), self.golden.manifest.generation.pad_token_id)
        return CaseInputs(
            torch.cat([pads, ids], dim=1),
            torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], dim=1),
            _some(inputs.pixel_values, slice(tiles)),
            _some(inputs.pixel_attention_mask, slice(tiles)),
        )

    def _padded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Pad prompts to the length of the longest."""
        longest = max(prompt.length for prompt in prompts)
        return [Prompt(p.case, p.length, longest - p.length) for p in prompts]

    def _logits(self, prompts: Sequence[Prompt], answer: object) -> list[Answer]:
        """Return for each prompt the records of its positions, (length, columns)."""
        import torch

        vocabulary = len(self.golden.tensor(prompts[0].case, Phase.FORWARD, parts.LOGITS))
        shape = (len(prompts), prompts[0].pads + prompts[0].length, vocabulary)
        if not isinstance(answer, torch.Tensor) or answer.shape != shape:
            # Compared as it is, so that the mismatch of type or shape is named.
            return [Answer(prompts[0].case, torch.zeros(()).expand(shape), answer)]
        return [
            Answer(prompt.case, *self._position_records(prompt, logits[prompt.pads :]))
            for prompt, logits in zip(prompts, answer.to("cpu"), strict=True)
        ]

    def _position_records(
        self, prompt: Prompt, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a prompt's recorded values and those of its logits, one row for each position."""
        recorded = {
            name: self.golden.tensor(prompt.case, Phase.FORWARD, name)
            for name in (*parts.POSITION_RECORDS, "position_topk_ids", "position_sample_ids")
        }
        actual = parts.position_records(
            logits,
            topk_ids=recorded["position_topk_ids"][: prompt.length],
            sample_ids=recorded["position_sample_ids"],
        )
        return _rows(recorded)[: prompt.length], _rows(actual)

    def _tiles(self, question: VisionTiles | ConnectorTiles) -> list[int]:
        there = self._subject(question.case).tiles
        if not all(0 <= tile < there for tile in question.tiles):
            raise UsageError(f"{question}: case {question.case} has {there} tiles, from 0")
        return list(question.tiles)

    def _recorded(self, question: VisionTiles | ConnectorTiles, phase: Phase) -> torch.Tensor:
        name = family_of(self.golden.manifest.checkpoint.family).compared[phase]
        return self.golden.tensor(question.case, phase, name)

    def _new_tokens(self, case: str, needed: int) -> torch.Tensor:
        """Return a case's recorded new tokens, of which `needed` must be there."""
        there = self._subject(case).generated
        if not 0 < needed <= there:
            raise UsageError(f"case {case} has {there} recorded new tokens, not {needed}")
        return self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)


def _some(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Return some rows of what there is of an image, None where none are left."""
    if tensor is None or len(tensor[rows]) == 0:
        return None
    return tensor[rows]


def _rows(records: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return POSITION_RECORDS side by side, (positions, columns)."""
    import torch

    columns = [records[name].reshape(len(records[name]), -1) for name in parts.POSITION_RECORDS]
    return torch.cat(columns, dim=-1)


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
