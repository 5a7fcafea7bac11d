"""Running one phase of one case on a candidate: what comes out, beside what the golden holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Candidate, CaseInputs
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import connector_input, recorded
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.generation import greedy_tokens, step_logits, with_golden_tokens
from snapshot_tool.numerics.compact import CompactTensor, compact

if TYPE_CHECKING:
    import torch


# What a family may capture of its vision encoder besides the output; see families/idefics3.py.
POSITION_IDS = "position_ids"


@dataclass(frozen=True, slots=True)
class Pair:
    """A golden tensor and the candidate's, which may be anything that it returned.

    `note` says something about a mismatch that the figures alone do not. `allowed` gives, for the
    phase's tolerance, how far each element may be off, where that is not the tolerance itself.
    """

    tensor: str
    expected: torch.Tensor
    actual: object
    note: str = ""
    allowed: Callable[[Tolerance], torch.Tensor] | None = None

    def in_units(self, tolerance: Tolerance) -> tuple[Pair, Tolerance]:
        """Return the pair and its tolerance as they are compared, element by element.

        What has bounds of its own is measured in units of them: 1 is allowed.
        """
        import torch

        if self.allowed is None or not isinstance(self.actual, torch.Tensor):
            return self, tolerance
        units = self.allowed(tolerance)
        pair = Pair(self.tensor, self.expected / units, self.actual / units, self.note)
        return pair, Tolerance(1.0, 0.0)


def pairs_with(
    expected: torch.Tensor | CompactTensor, actual: object, name: str, note: str = ""
) -> list[Pair]:
    """Return what of a recorded answer is compared with the candidate's, which may be anything."""
    import torch

    if not isinstance(expected, CompactTensor):
        return [Pair(name, expected, actual, note)]
    if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
        # Compared as it is, so that the mismatch of type or shape is named.
        return [Pair(name, expected.sample.new_zeros(()).expand(expected.shape), actual, note)]
    found = compact(
        actual,
        seed=expected.seed,
        blocks=expected.blocks,
        sampled=expected.sample.shape[1],
    )
    return [
        Pair(f"{name}.sample", expected.sample, found.sample, note),
        Pair(f"{name}.moments", expected.moments, found.moments, note, expected.allowed_of_moments),
        Pair(f"{name}.sums", expected.sums, found.sums, note, expected.allowed_of_sums),
    ]


@dataclass(frozen=True, slots=True)
class RecordedCase:
    """A case of a golden set, its inputs read once for all phases."""

    golden: Golden
    name: str
    kept: CaseInputs

    @property
    def inputs(self) -> CaseInputs:
        """Its inputs: a candidate may reshape what it is given in place.

        Ids and masks are copies, since answers are judged by them; pixels, which are large, views.
        """
        kept = {field.name: getattr(self.kept, field.name) for field in fields(self.kept)}
        given = {
            name: tensor.clone() if tensor.dim() <= 2 else tensor.detach()  # noqa: PLR2004
            for name, tensor in kept.items()
            if tensor is not None
        }
        return replace(self.kept, **given)


def read_case(golden: Golden, name: str) -> RecordedCase:
    """Read the inputs of a case."""
    return RecordedCase(golden, name, golden.inputs(name))


def run_phase(candidate: Candidate, case: RecordedCase, phase: Phase) -> list[Pair]:
    """Run a phase on the golden's own inputs for it; raise PhaseUnsupported if it is lacking."""
    _require_method(candidate, "preprocess" if phase is Phase.PREPROCESSING else phase.value)
    return _RUNS[phase](candidate, case)


@dataclass(slots=True)
class OnePass:
    """Forward and generation of a case, verified in one pass over prompt and golden tokens.

    Teacher forcing: at every step the candidate is given the golden's tokens so far, so all its
    choices are the golden's exactly if its own generation, without a cache, would be. No token is
    seen by those before it: the prompt's logits are those of forward.
    """

    _case: str = ""
    _steps: torch.Tensor | None = None

    def knows(self, case: str) -> bool:
        """Tell whether the pass was made for a case and its tokens were not asked for yet."""
        return bool(case) and self._case == case

    def forward(self, candidate: Candidate, case: RecordedCase) -> list[Pair]:
        """Run the pass, and return what forward compares of it."""
        _require_method(candidate, Phase.FORWARD.value)
        answer = candidate.forward(with_golden_tokens(case.golden, case.name))
        self._case, self._steps = case.name, step_logits(answer, case.golden, case.name)
        if self._steps is not None:
            prompt = case.inputs.input_ids.shape[1]
            answer = cast("torch.Tensor", answer)[:, :prompt]
        return _forward_pairs(answer, case)

    def generate(self, candidate: Candidate, case: RecordedCase) -> list[Pair]:
        """Return the tokens that the pass chooses; it is run now if forward was not."""
        if not self.knows(case.name):
            self.forward(candidate, case)
        steps, self._case, self._steps = self._steps, "", None
        expected = case.golden.tensor(case.name, Phase.GENERATE, parts.TOKEN_IDS)
        if steps is None:
            return [
                Pair(parts.TOKEN_IDS, expected, None, "forward returned no logits of each token")
            ]
        return [Pair(parts.TOKEN_IDS, expected, greedy_tokens(steps))]


def _require_method(candidate: Candidate, name: str) -> None:
    if not callable(getattr(candidate, name, None)):
        raise PhaseUnsupported(f"the candidate has no method {name!r}")


def _preprocessing(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    answer = candidate.preprocess(case.golden.images(case.name))
    if not isinstance(answer, Mapping):
        answer = {"pixel_values": answer}
    inputs, pairs = case.inputs, []
    if inputs.pixel_values is not None:
        pairs.append(Pair("pixel_values", inputs.pixel_values, answer.get("pixel_values")))
    if inputs.pixel_attention_mask is not None:
        expected = inputs.pixel_attention_mask
        # No mask says that no pixel is padding: the same as a mask of ones.
        actual = answer.get("pixel_attention_mask", expected.new_ones(expected.shape))
        pairs.append(Pair("pixel_attention_mask", expected, actual))
    return pairs


def _vision(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    golden, name = case.golden, _compared(case.golden, Phase.VISION)
    if case.inputs.pixel_values is None:
        raise PhaseUnsupported("the case has no images")
    answer = candidate.vision(case.inputs.pixel_values, **_sizes(case))
    named = answer if isinstance(answer, Mapping) else {name: answer}
    note = _odd_positions(case)
    there = golden.tensor_names(case.name, Phase.VISION)
    outputs = family_of(golden.manifest.checkpoint.family).judged_outputs(Phase.VISION)
    return [
        pair
        for output in outputs
        # An encoder may have been built without its head.
        if output == name or any(kept.partition(".")[0] == output for kept in there)
        for pair in pairs_with(
            recorded(golden, case.name, Phase.VISION, output), named.get(output), output, note
        )
    ]


def _odd_positions(case: RecordedCase) -> str:
    """Say whether the reference did not number the patches of a whole tile 0, 1, 2 …; else ""."""
    import torch

    golden, mask = case.golden, case.inputs.pixel_attention_mask
    if POSITION_IDS not in golden.tensor_names(case.name, Phase.VISION):
        return ""
    ids = golden.tensor(case.name, Phase.VISION, POSITION_IDS)
    whole = ids if mask is None else ids[mask.flatten(1).all(dim=1)]
    odd = whole[(whole != torch.arange(ids.shape[-1])).any(dim=1)]
    if not len(odd):
        return ""
    shown = ", ".join(map(str, odd[0, :4].tolist()))
    release = golden.manifest.environment.get("transformers", "")
    return (
        f"the reference's own position ids are unusual (0, 1, 2, 3 expected, transformers "
        f"{release} used {shown}): a candidate that numbers patches in order differs from it"
    )


def _connector(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    golden = case.golden
    features = connector_input(golden, case.name, _compared(golden, Phase.VISION))
    if features is None:
        raise PhaseUnsupported("the golden set was recorded without vision, which feeds it")
    name = _compared(golden, Phase.CONNECTOR)
    actual = candidate.connector(features, **_sizes(case))
    return pairs_with(recorded(golden, case.name, Phase.CONNECTOR, name), actual, name)


def _sizes(case: RecordedCase) -> dict[str, torch.Tensor]:
    """Return the images' sizes if the family has them: other candidates need not take them."""
    sizes = case.inputs.image_sizes
    return {} if sizes is None else {"image_sizes": sizes}


def _forward(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    return _forward_pairs(candidate.forward(case.inputs), case)


def _forward_pairs(answer: Any, case: RecordedCase) -> list[Pair]:
    family = family_of(case.golden.manifest.checkpoint.family)
    named = answer if isinstance(answer, Mapping) else {parts.LOGITS: answer}
    pairs = _logits(named.get(parts.LOGITS), case) if family.logits else []
    return pairs + [p for name in family.whole_outputs for p in _whole_output(name, named, case)]


def _whole_output(name: str, answer: Mapping[str, torch.Tensor], case: RecordedCase) -> list[Pair]:
    import torch

    actual = answer.get(name)
    if isinstance(actual, torch.Tensor):
        actual = parts.without_padding(actual, case.inputs)
    return pairs_with(recorded(case.golden, case.name, Phase.FORWARD, name), actual, name)


def _logits(answer: object, case: RecordedCase) -> list[Pair]:
    import torch

    def kept(name: str) -> torch.Tensor:
        return case.golden.tensor(case.name, Phase.FORWARD, name)

    inputs = case.inputs
    last = kept(parts.LOGITS)
    shape = (1, inputs.input_ids.shape[1], last.shape[0])
    if not isinstance(answer, torch.Tensor) or answer.shape != shape:
        # Compared as it is, so that the mismatch of type or shape is named.
        return [Pair(parts.LOGITS, last.expand(shape), answer)]
    real = parts.real_rows(parts.widened(answer)[0].to("cpu"), inputs)
    records = parts.position_records(
        real,
        topk_ids=kept("position_topk_ids"),
        sample_ids=kept("position_sample_ids"),
    )
    return [
        Pair(parts.LOGITS, last, real[-1]),
        *(Pair(name, kept(name), records[name]) for name in parts.POSITION_RECORDS),
    ]


def _generate(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    generation = case.golden.manifest.generation
    expected = case.golden.tensor(case.name, Phase.GENERATE, parts.TOKEN_IDS)
    actual = candidate.generate(
        case.inputs,
        max_new_tokens=generation.max_new_tokens,
        eos_token_ids=case.golden.eos_token_ids(case.name),
    )
    return [Pair(parts.TOKEN_IDS, expected, actual)]


def _compared(golden: Golden, phase: Phase) -> str:
    return family_of(golden.manifest.checkpoint.family).compared[phase]


_RUNS: Mapping[Phase, Callable[[Candidate, RecordedCase], list[Pair]]] = {
    Phase.PREPROCESSING: _preprocessing,
    Phase.VISION: _vision,
    Phase.CONNECTOR: _connector,
    Phase.FORWARD: _forward,
    Phase.GENERATE: _generate,
}
