"""Run one phase of one case on a candidate, and pair its outputs with the golden's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.protocol import Candidate, CaseInputs, Phase
from snapshot_tool.base.results import Agreement
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden, connector_input, recorded
from snapshot_tool.judge.generation import greedy_tokens, step_logits, with_golden_tokens
from snapshot_tool.numerics.compact import CompactTensor, compact

# Names of what servers return in place of logits.
POSITION_LOGPROBS, STEP_LOGPROBS = "position_logprobs", "step_logprobs"
_LEAST = 1e-9  # probability; sums of float32 probabilities exceed 1 by less


@dataclass(frozen=True, slots=True)
class Pair:
    """A golden tensor and the object that the candidate returned for it.

    Args:
        note: a possible cause of a mismatch that the figures do not show, or "".
        agreement: of log-probabilities.
        allowed: returns the allowed error of each element for the phase's tolerance; None: the
            tolerance itself.
    """

    tensor: str
    expected: torch.Tensor
    actual: object
    note: str = ""
    agreement: Agreement | None = None
    allowed: Callable[[Tolerance], torch.Tensor] | None = None

    def in_units(self, tolerance: Tolerance) -> tuple[Pair, Tolerance]:
        """Return the pair and its tolerance for a comparison element by element.

        If each element has its own limit, values are divided by it, and the tolerance is 1.
        """
        if self.allowed is None or not isinstance(self.actual, torch.Tensor):
            return self, tolerance
        units = self.allowed(tolerance)
        pair = Pair(self.tensor, self.expected / units, self.actual / units, self.note)
        return pair, Tolerance(1.0, 0.0)


def pairs_with(
    expected: torch.Tensor | CompactTensor, actual: object, name: str, note: str = ""
) -> list[Pair]:
    """Return the pairs to compare for a recorded output and the candidate's."""
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
        Pair(
            f"{name}.moments",
            expected.moments,
            found.moments,
            note,
            allowed=expected.allowed_of_moments,
        ),
        Pair(f"{name}.sums", expected.sums, found.sums, note, allowed=expected.allowed_of_sums),
    ]


@dataclass(frozen=True, slots=True)
class RecordedCase:
    """A case of a golden set; its inputs are read once for all phases."""

    golden: Golden
    name: str
    inputs: CaseInputs

    def tensor(self, phase: Phase, name: str) -> torch.Tensor:
        """Read a recorded tensor of the case."""
        return self.golden.tensor(self.name, phase, name)

    def copied_inputs(self) -> CaseInputs:
        """Return copies of the inputs, which a candidate may overwrite."""
        kept = {field.name: getattr(self.inputs, field.name) for field in fields(self.inputs)}
        # A candidate with gradients on cannot use tensors made in inference mode.
        with torch.inference_mode(mode=False):
            copies: dict[str, Any] = {n: t.clone() for n, t in kept.items() if t is not None}
        return CaseInputs(**copies)


def run_phase(candidate: Candidate, case: RecordedCase, phase: Phase) -> list[Pair]:
    """Run a phase on its recorded inputs; raise PhaseUnsupported if it is not supported."""
    match phase:
        case Phase.PREPROCESSING:
            return _preprocessing(candidate, case)
        case Phase.VISION:
            return _vision(candidate, case)
        case Phase.CONNECTOR:
            return _connector(candidate, case)
        case Phase.FORWARD:
            return _forward_pairs(candidate.forward(case.copied_inputs()), case)
        case Phase.GENERATE:
            actual: object = candidate.generate(
                case.copied_inputs(),
                max_new_tokens=case.golden.manifest.generation.max_new_tokens,
                eos_token_ids=case.golden.eos_token_ids(case.name),
            )
            expected = case.tensor(phase, parts.TOKEN_IDS)
            if not isinstance(actual, Mapping):
                return [Pair(parts.TOKEN_IDS, expected, actual)]
            pair = Pair(parts.TOKEN_IDS, expected, actual.get(parts.TOKEN_IDS))
            return [pair, _step_logprobs(actual, case)]


@dataclass(slots=True)
class OnePass:
    """Forward and generation of a case, verified in one pass over prompt and golden tokens.

    This is teacher forcing: every step gets the golden's tokens before it. All chosen tokens equal
    the golden's exactly if a generation without a cache would. The model is causal, so the logits
    of the prompt are those of forward.
    """

    _case: str = ""
    _steps: torch.Tensor | None = None

    def has(self, case: str) -> bool:
        """Return whether the pass was run for a case and `generate` has not used it yet."""
        return bool(case) and self._case == case

    def forward(self, candidate: Candidate, case: RecordedCase) -> list[Pair]:
        """Run the pass and return the pairs of forward."""
        answer = candidate.forward(with_golden_tokens(case.golden, case.name))
        self._case, self._steps = case.name, step_logits(answer, case.golden, case.name)
        if self._steps is not None:
            prompt = case.inputs.input_ids.shape[1]
            answer = cast("torch.Tensor", answer)[:, :prompt]
        return _forward_pairs(answer, case)

    def generate(self, candidate: Candidate, case: RecordedCase) -> list[Pair]:
        """Return the tokens that the pass chooses, running it if forward did not."""
        if not self.has(case.name):
            self.forward(candidate, case)
        steps, self._case, self._steps = self._steps, "", None
        expected = case.tensor(Phase.GENERATE, parts.TOKEN_IDS)
        if steps is None:
            note = "forward did not return logits of each token"
            return [Pair(parts.TOKEN_IDS, expected, None, note)]
        return [Pair(parts.TOKEN_IDS, expected, greedy_tokens(steps))]


def by_name(answer: object, name: str) -> Mapping[str, Any]:
    """Return a candidate's outputs by name; one that it returns alone has the name given."""
    return answer if isinstance(answer, Mapping) else {name: answer}


def _preprocessing(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    named = by_name(candidate.preprocess(case.golden.images(case.name)), "pixel_values")
    inputs, pairs = case.inputs, []
    if inputs.pixel_values is not None:
        pairs.append(Pair("pixel_values", inputs.pixel_values, named.get("pixel_values")))
    if inputs.pixel_attention_mask is not None:
        expected = inputs.pixel_attention_mask
        # No mask means that no pixel is padding, like a mask of ones.
        actual = named.get("pixel_attention_mask", expected.new_ones(expected.shape))
        pairs.append(Pair("pixel_attention_mask", expected, actual))
    return pairs


def _vision(candidate: Candidate, case: RecordedCase) -> list[Pair]:
    golden, name = case.golden, case.golden.family.compared[Phase.VISION]
    inputs = case.copied_inputs()
    if inputs.pixel_values is None:
        raise PhaseUnsupported("the case has no images")
    named = by_name(candidate.vision(inputs.pixel_values, **_sizes(inputs)), name)
    note = _odd_positions(case)
    kept = {kept.partition(".")[0] for kept in golden.tensor_names(case.name, Phase.VISION)}
    pairs = []
    for output in golden.family.judged_outputs(Phase.VISION):
        if output == name or output in kept:  # an encoder may have been built without its head
            expected = recorded(golden, case.name, Phase.VISION, output)
            pairs += pairs_with(expected, named.get(output), output, note)
    return pairs


def _odd_positions(case: RecordedCase) -> str:
    """Return a note if the reference did not number a whole tile's patches 0, 1, 2 …, else ""."""
    golden, mask = case.golden, case.inputs.pixel_attention_mask
    name = "position_ids"  # a family may capture them: see families/idefics3.py
    if name not in golden.tensor_names(case.name, Phase.VISION):
        return ""
    ids = case.tensor(Phase.VISION, name)
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
    golden, compared = case.golden, case.golden.family.compared
    features = connector_input(golden, case.name, compared[Phase.VISION])
    if features is None:
        raise PhaseUnsupported(
            "the golden set was recorded without vision, whose output is its input"
        )
    name = compared[Phase.CONNECTOR]
    answer = by_name(candidate.connector(features, **_sizes(case.copied_inputs())), name)
    return pairs_with(recorded(golden, case.name, Phase.CONNECTOR, name), answer.get(name), name)


def _sizes(inputs: CaseInputs) -> dict[str, torch.Tensor]:
    """Return the image sizes as an argument if the family has them, else nothing."""
    return {} if inputs.image_sizes is None else {"image_sizes": inputs.image_sizes}


def _forward_pairs(answer: object, case: RecordedCase) -> list[Pair]:
    named = by_name(answer, parts.LOGITS)
    pairs = _logits(named.get(parts.LOGITS), case) if case.golden.family.logits else []
    if parts.TOPK_LOGPROBS in named:
        pairs.append(_position_logprobs(named, case))
    return pairs + whole_output_pairs(named, case.golden, case.name, case.inputs)


def whole_output_pairs(
    named: Mapping[str, Any], golden: Golden, case: str, inputs: CaseInputs
) -> list[Pair]:
    """Return the pairs of a case's outputs of forward that are compared whole, not as logits.

    named: the candidate's outputs by name. inputs: what it was given; padding is not compared.
    """
    pairs = []
    for name in golden.family.whole_outputs:
        actual = named.get(name)
        if isinstance(actual, torch.Tensor):
            actual = parts.without_padding(actual, inputs)
        pairs += pairs_with(recorded(golden, case, Phase.FORWARD, name), actual, name)
    return pairs


def _logits(answer: object, case: RecordedCase) -> list[Pair]:
    last = case.tensor(Phase.FORWARD, parts.LOGITS)
    shape = (1, case.inputs.input_ids.shape[1], last.shape[0])
    if answer is None:
        return [Pair(parts.LOGITS, last, None, "no logits were returned")]
    if not isinstance(answer, torch.Tensor) or answer.shape != shape:
        # Compared as it is, so that the mismatch of type or shape is named.
        return [Pair(parts.LOGITS, last.expand(shape), answer)]
    real = parts.real_rows(parts.widened(answer)[0].to("cpu"), case.inputs)
    records = parts.position_records(
        real,
        topk_ids=case.tensor(Phase.FORWARD, "position_topk_ids"),
        sample_ids=case.tensor(Phase.FORWARD, "position_sample_ids"),
    )
    pairs = [Pair(parts.LOGITS, last, real[-1])]
    for name in parts.POSITION_RECORDS:
        pairs.append(Pair(name, case.tensor(Phase.FORWARD, name), records[name]))
    return pairs


@dataclass(frozen=True, slots=True)
class Best:
    """The best tokens of some positions.

    Args:
        ids: (rows, k) int64.
        logprobs: (rows, k) float64.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of_logits(cls, ids: torch.Tensor, logits: torch.Tensor, logsumexp: torch.Tensor) -> Best:
        """Return recorded logits (rows, k) as log-probabilities."""
        return cls(ids, logits.double() - logsumexp.double()[:, None])


def align(golden: Best, answer: Best) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expected and actual log-probabilities, (rows, golden's k + answer's k) float64.

    Both lists are cut off after k tokens. A token that only one side lists is at most as probable
    as the last token of the other list: this bound takes the place of its value if it is violated.
    """
    same = golden.ids[:, :, None] == answer.ids[:, None, :]
    listed, known = same.any(2), same.any(1)
    found = answer.logprobs.gather(1, same.int().argmax(2))
    bound = torch.minimum(golden.logprobs, answer.logprobs.amin(1, keepdim=True))
    own_bound = torch.minimum(answer.logprobs, golden.logprobs.amin(1, keepdim=True))
    expected = torch.cat([golden.logprobs, answer.logprobs.where(known, own_bound)], 1)
    actual = torch.cat([found.where(listed, bound), answer.logprobs], 1)
    return expected, actual


def measure_agreement(golden: Best, answer: Best) -> Agreement:
    """Return how far two lists of best tokens agree, over all positions."""
    size = golden.ids.shape[1]
    expected, actual = (side[:, :size] for side in align(golden, answer))
    rest, own_rest = ((1 - side.exp().sum(1)).clamp(min=_LEAST) for side in (expected, actual))
    divergence = (expected.exp() * (expected - actual)).sum(1) + rest * (rest / own_rest).log()
    best = golden.ids.gather(1, golden.logprobs.argmax(1, keepdim=True))
    own_best = answer.ids.gather(1, answer.logprobs.argmax(1, keepdim=True))
    return Agreement(
        len(best), int((best == own_best).sum()), float(divergence.clamp(min=0).mean())
    )


def _position_logprobs(named: Mapping[str, torch.Tensor], case: RecordedCase) -> Pair:
    """Return the log-probabilities after each token of the prompt except padding.

    The answer's rows are all tokens of the prompt, or only those without padding.
    """
    answer, inputs = Best(named[parts.TOPK_IDS], named[parts.TOPK_LOGPROBS].double()), case.inputs
    if len(answer.ids) == inputs.input_ids.shape[1]:
        answer = Best(*(parts.real_rows(rows, inputs) for rows in (answer.ids, answer.logprobs)))
    golden = Best.of_logits(
        case.tensor(Phase.FORWARD, "position_topk_ids"),
        case.tensor(Phase.FORWARD, "position_topk_values"),
        case.tensor(Phase.FORWARD, "position_logsumexp"),
    )
    return _logprobs_pair(POSITION_LOGPROBS, golden, answer)


def _step_logprobs(named: Mapping[str, torch.Tensor], case: RecordedCase) -> Pair:
    """Return the log-probabilities that choose the new tokens, up to the first other token.

    What follows another token has another prompt.
    """
    names = ("step_topk_ids", "step_topk_values", parts.STEP_LOGSUMEXP)
    if parts.STEP_LOGSUMEXP not in case.golden.tensor_names(case.name, Phase.GENERATE):
        note = "the golden set has no log-sum-exp of steps: it was recorded by an older snap"
        return Pair(STEP_LOGPROBS, case.tensor(Phase.GENERATE, names[1]), None, note)
    golden = Best.of_logits(*(case.tensor(Phase.GENERATE, name) for name in names))
    if parts.TOPK_LOGPROBS not in named:
        return Pair(STEP_LOGPROBS, golden.logprobs, None)
    answer = Best(named[parts.TOPK_IDS], named[parts.TOPK_LOGPROBS].double())
    tokens, expected = named[parts.TOKEN_IDS], case.tensor(Phase.GENERATE, parts.TOKEN_IDS)
    if tokens.dim() != 1 or len(answer.ids) != len(tokens):
        return Pair(STEP_LOGPROBS, golden.logprobs, answer.logprobs)
    both = min(len(tokens), len(expected))
    other = (tokens[:both] != expected[:both]).nonzero()
    rows = slice(int(other[0]) + 1 if len(other) else both)
    return _logprobs_pair(
        STEP_LOGPROBS,
        Best(golden.ids[rows], golden.logprobs[rows]),
        Best(answer.ids[rows], answer.logprobs[rows]),
    )


def _logprobs_pair(name: str, golden: Best, answer: Best) -> Pair:
    if len(golden.ids) != len(answer.ids):  # compared as it is, so that the mismatch is named
        return Pair(name, golden.logprobs, answer.logprobs)
    expected, actual = align(golden, answer)
    return Pair(name, expected, actual, agreement=measure_agreement(golden, answer))
