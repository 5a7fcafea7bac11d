"""The recorded outputs of prompts and their prefixes, of tiles, and of new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import CaseInputs, Phase
from snapshot_tool.families.family import PADDING, UNSEEN, Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden, Rows, connector_input, recorded, recorded_shape
from snapshot_tool.goldens.layout import phase_file
from snapshot_tool.judge.phases import Pair, by_name, pairs_with, whole_output_pairs
from snapshot_tool.numerics.compact import CompactTensor


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The questions for which one case of a golden set can be used.

    Args:
        case: its name.
        phases: the phases whose recorded outputs can be used.
        cuts: the lengths (tokens) to which the prompt may be cut, in ascending order, each with the
            number of tiles within it. The last one is the whole prompt.
        generated: the number of recorded new tokens.
        paddable: whether padding does not change outputs.
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
        """Tiles of all images."""
        return self.cuts[self.length]


def capabilities_of(golden: Golden, case: str, family: Family) -> Capabilities:
    """Return the questions for which a case can be used."""
    entry, inputs = golden.case(case), golden.text(case)
    kept = {phase for phase in entry.phases if phase_file(phase) in golden.manifest.files}
    tiles = next(iter(golden.image_input_shape(case, "pixel_values")), 0)
    padded = not bool(inputs.attention_mask.all())
    recurrent = family.recurrent and golden.manifest.environment.get(PADDING) != UNSEEN
    encoder = family.takes_text and not (family.takes_images or family.generates)
    phases: set[Phase] = set()
    if family.generates and not (recurrent and padded):
        phases |= {Phase.FORWARD, Phase.GENERATE} & kept
    # An encoder's positions depend on padding before them, and its outputs on token types.
    if encoder and not padded and inputs.token_type_ids is None:
        phases |= {Phase.FORWARD} & kept
    if entry.eos_token_ids is not None:
        # Questions about a generation use one set of end tokens for all cases.
        phases.discard(Phase.GENERATE)
    if tiles and _has_separate_tiles(golden, case, family, tiles, kept):
        phases |= {Phase.VISION, Phase.CONNECTOR} & kept
    generated = 0
    if Phase.GENERATE in phases:
        generated = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    if encoder:  # Every token attends to all others, so a prefix has other outputs.
        cuts = {inputs.input_ids.shape[1]: 0}
    else:
        cuts = _find_cuts(inputs, tiles, golden.manifest.checkpoint.config, family)
    return Capabilities(case, frozenset(phases), cuts, generated, paddable=not recurrent)


def _has_separate_tiles(
    golden: Golden, case: str, family: Family, tiles: int, kept: set[Phase]
) -> bool:
    """Return whether vision and connector return one row for each tile, computed from it alone."""
    if golden.image_input_shape(case, "image_sizes") or Phase.VISION not in kept:
        return False
    return all(
        recorded_shape(golden, case, phase, family.compared[phase])[:1] == (tiles,)
        for phase in {Phase.VISION, Phase.CONNECTOR} & kept
    )


def _find_cuts(
    inputs: CaseInputs, tiles: int, config: Mapping[str, object], family: Family
) -> dict[int, int]:
    """Return the number of tiles within each prefix of the prompt that has only whole tiles."""
    ids = inputs.input_ids[0, parts.real_positions(inputs)]
    if tiles == 0:
        return dict.fromkeys(range(1, len(ids) + 1), 0)
    tile_id = config.get(family.tile_id_field)
    before = ids.eq(tile_id if isinstance(tile_id, int) else -1).cumsum(0).tolist()
    tokens_each, left = divmod(before[-1] if before else 0, tiles)
    if tokens_each == 0 or left:
        # Tiles have different numbers of tokens, or none. Only the whole prompt is usable.
        return {len(ids): tiles}
    return {
        length: count // tokens_each
        for length, count in enumerate(before, start=1)
        if count % tokens_each == 0
    }


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first `length` tokens of a case's prompt, with `pads` tokens of padding."""

    case: str
    length: int
    pads: int = 0

    def __str__(self) -> str:
        """Return the text form, CASE@TOKENS or CASE@TOKENS+PADS."""
        return f"{self.case}@{self.length}" + (f"+{self.pads}" if self.pads else "")


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded tensor and the object that the candidate returned for it.

    rows: the rows of the recorded tensor in the pair; None: all. step: the step of the recorded
    generation at which the new tokens begin.
    """

    case: str
    pair: Pair
    rows: Rows = None
    step: int = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recorded outputs of a golden set, cut to the inputs of a question.

    cases: the capabilities of each case, by name.

    Methods raise UsageError if the golden set does not have the output.
    """

    golden: Golden
    cases: Mapping[str, Capabilities]

    @classmethod
    def of(cls, golden: Golden, names: Sequence[str] | None = None) -> Recorded:
        """Return the recorded outputs of the named cases, by default of all."""
        names = [case.name for case in golden.manifest.cases] if names is None else names
        return cls(golden, {name: capabilities_of(golden, name, golden.family) for name in names})

    def case(self, name: str) -> Capabilities:
        """Return the capabilities of a case."""
        if name not in self.cases:
            raise UsageError(f"unknown case {name}", f"cases: {', '.join(self.cases)}")
        return self.cases[name]

    def tiles_within(self, case: str, length: int) -> int:
        """Return the number of tiles within the first `length` tokens of a prompt."""
        cuts = self.case(case).cuts
        if length not in cuts:
            raise UsageError(
                f"the prompt of {case} cannot be cut after {length} tokens",
                f"it has {max(cuts)} tokens, and cannot be cut inside an image tile",
            )
        return cuts[length]

    def inputs(self, prompt: Prompt) -> CaseInputs:
        """Return the inputs of a prompt, with its padding and only the tiles within it."""
        tiles = self.tiles_within(prompt.case, prompt.length)
        whole = self.golden.inputs(prompt.case)
        ids = whole.input_ids[:, parts.real_positions(whole)[: prompt.length]]
        pads = ids.new_full((1, prompt.pads), self.golden.manifest.generation.pad_token_id)
        mask, no_mask = torch.ones_like(ids), torch.zeros_like(pads)
        left = self.golden.family.generates
        return CaseInputs(
            torch.cat([pads, ids] if left else [ids, pads], dim=1),
            torch.cat([no_mask, mask] if left else [mask, no_mask], dim=1),
            some_tiles(whole.pixel_values, slice(tiles)),
            some_tiles(whole.pixel_attention_mask, slice(tiles)),
            # Cases with image sizes have no separate tiles, so the prompt is a whole one.
            whole.image_sizes,
        )

    def batch(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts padded to the length of the longest."""
        longest = max(prompt.length for prompt in prompts)
        return [Prompt(p.case, p.length, longest - p.length) for p in prompts]

    def logits(self, prompts: Sequence[Prompt], actual: object) -> list[Answer]:
        """Return the recorded logits of all positions of each prompt, with the candidate's.

        actual: should be (prompts, pads + length, vocabulary), alone or among others by name.

        A family without logits is compared by its other outputs.
        """
        if not self.golden.family.logits:
            return self._whole_outputs(prompts, actual)
        actual = by_name(actual, parts.LOGITS).get(parts.LOGITS)
        case, length = prompts[0].case, prompts[0].pads + prompts[0].length
        vocabulary = len(self.golden.tensor(case, Phase.FORWARD, parts.LOGITS))
        shape = (len(prompts), length, vocabulary)
        if not isinstance(actual, torch.Tensor) or actual.shape != shape:
            # The comparison reports the wrong type or shape.
            return [Answer(case, Pair("", torch.zeros(()).expand(shape), actual))]
        answers = []
        for prompt, rows in zip(prompts, actual.to("cpu"), strict=True):
            real = rows[prompt.pads :] if self.golden.family.generates else rows[: prompt.length]
            expected = {
                name: self.golden.tensor(prompt.case, Phase.FORWARD, name)[: prompt.length]
                for name in (*parts.POSITION_RECORDS, "position_topk_ids")
            }
            found = parts.position_records(
                parts.widened(real),
                topk_ids=expected["position_topk_ids"],
                sample_ids=self.golden.tensor(prompt.case, Phase.FORWARD, "position_sample_ids"),
            )
            for name in parts.POSITION_RECORDS:
                pair = Pair(name, expected[name], found[name])
                answers.append(Answer(prompt.case, pair, slice(prompt.length)))
        return answers

    def _whole_outputs(self, prompts: Sequence[Prompt], actual: object) -> list[Answer]:
        """Return the recorded outputs of whole prompts, with the candidate's by name.

        actual: each should be (prompts, pads + length, width) or (prompts, width).
        """
        named = actual if isinstance(actual, Mapping) else {}
        answers = []
        for row, prompt in enumerate(prompts):
            own = {
                name: output[row : row + 1]
                if isinstance(output, torch.Tensor) and len(output) == len(prompts)
                else output
                for name, output in named.items()
            }
            inputs = self.inputs(prompt)
            pairs = whole_output_pairs(own, self.golden, prompt.case, inputs)
            answers += [Answer(prompt.case, pair) for pair in pairs]
        return answers

    def features(
        self, case: str, phase: Phase, tiles: Sequence[int], actual: object
    ) -> list[Answer]:
        """Return the recorded output of vision or the connector for some tiles, with `actual`.

        Both should be (tiles, places, width), `actual` alone or among others by name.
        """
        name = self.golden.family.compared[phase]
        whole = recorded(self.golden, case, phase, name)
        rows, actual = list(tiles), by_name(actual, name).get(name)
        expected = whole.of_blocks(rows) if isinstance(whole, CompactTensor) else whole[rows]
        return [Answer(case, pair, rows) for pair in pairs_with(expected, actual, name)]

    def pixels(self, case: str, tiles: Sequence[int]) -> torch.Tensor:
        """Return the pixel values of some tiles, (tiles, channels, height, width)."""
        self._require_tiles(case, tiles)
        pixels = self.golden.image_input(case, "pixel_values")
        return pixels[list(tiles)]  # type: ignore[index]

    def connector_input(self, case: str, tiles: Sequence[int]) -> torch.Tensor:
        """Return the recorded input of the connector for some tiles, (tiles, patches, width)."""
        self._require_tiles(case, tiles)
        whole = connector_input(self.golden, case, self.golden.family.compared[Phase.VISION])
        if whole is None:
            raise UsageError(f"the connector's input of case {case} was not recorded")
        return whole[list(tiles)]

    def _require_tiles(self, case: str, tiles: Sequence[int]) -> None:
        count = self.case(case).tiles
        if not tiles or not all(0 <= tile < count for tile in tiles):
            raise UsageError(f"case {case} has {count} tiles, from 0, not {list(tiles)}")

    def new_tokens(self, case: str, *, needed: int) -> torch.Tensor:
        """Return a case's recorded new tokens, (new,); at least `needed` of them."""
        count = self.case(case).generated
        if not 0 < needed <= count:
            raise UsageError(f"case {case} has {count} recorded new tokens, not {needed}")
        return self.golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)


def some_tiles(tensor: torch.Tensor | None, tiles: slice) -> torch.Tensor | None:
    """Return some tiles of an image input, or None if none are left."""
    if tensor is None or len(tensor[tiles]) == 0:
        return None
    return tensor[tiles]
