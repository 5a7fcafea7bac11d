"""What a golden set holds of the things that questions are about; UsageError where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.questions import Prompt, Subject
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import connector_input, recorded
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.phases import Pair
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
