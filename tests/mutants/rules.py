"""The rules by which other projects decide whether a port is right, on recorded cases.

Each is written from its definition, which `source` links to, with the thresholds of its project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch


class Part(StrEnum):
    """One kind of answers of a port.

    - PIXELS, VISION, CONNECTOR: of the first case's images.
    - LOGITS: of a prompt's tokens without padding, (tokens, vocabulary).
    - DOUBLE: the same in float64 throughout; only the reference has it.
    - TOKENS: the greedy new tokens, the end token included, (new,) int64.
    - STEPS: the logits that choose each of the reference's new tokens, after those before it, by
      the port's own loop with its cache, (new, vocabulary).
    - CHOSEN: the token that the loop chooses at each of these steps, (new,) int64.
    - ENDS: which of the reference's new tokens is an end token, (new,) bool.
    """

    PIXELS = "pixels"
    VISION = "vision"
    CONNECTOR = "connector"
    LOGITS = "logits"
    DOUBLE = "double"
    TOKENS = "tokens"
    STEPS = "steps"
    CHOSEN = "chosen"
    ENDS = "ends"


# By kind and by case. What a port cannot answer, since it raises, is missing.
Answers = Mapping[Part, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Rule:
    """How a project compares a port with its reference.

    Args:
        name: the project, and which of its rules.
        source: where the rule is defined.
        what: what must hold, in a few words.
        passes: whether a port's second answers pass beside the first ones, the reference's.
        own_reference: whether the project's reference is the port itself on a CPU.
    """

    name: str
    source: str
    what: str
    passes: Callable[[Answers, Answers], bool]
    own_reference: bool = False


@dataclass(frozen=True, slots=True)
class References:
    """What rules compare a port with.

    Args:
        hugging_face: the reference's answers.
        port: those of the unchanged port.
    """

    hugging_face: Answers
    port: Answers


def failing_rules(answers: Answers, references: References, *, on_cpu: Answers) -> list[str]:
    """Return the names of the rules that do not pass a port.

    on_cpu: the answers of the port itself on a CPU, run as usual, for rules that refer to it.
    """
    failing = []
    for rule in RULES:
        expected = references.hugging_face
        if rule.own_reference and _generates(on_cpu, expected):
            expected = on_cpu
        try:
            passes = rule.passes(expected, answers)
        except (KeyError, RuntimeError, IndexError):
            # The port raised, or the shape is another: the project's test would raise, too.
            passes = False
        if not passes:
            failing.append(rule.name)
    return failing


def _generates(answers: Answers, expected: Answers) -> bool:
    """Return whether a port generates tokens in each case."""
    return all(answers[p].keys() == expected[p].keys() for p in (Part.TOKENS, Part.STEPS))


def _pairs(
    expected: Answers, actual: Answers, part: Part
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for case, tensor in expected[part].items():
        yield tensor, actual[part][case]


def _is_close(expected: torch.Tensor, actual: torch.Tensor, *, atol: float, rtol: float) -> bool:
    same_shape = expected.shape == actual.shape
    return same_shape and torch.allclose(actual.float(), expected.float(), atol=atol, rtol=rtol)


# The parity suite's prompts, and its tolerance for the last token's logits of each.
_SUITE_LOGITS = {"one-image": 5e-5, "two-images": 7e-5}
_SUITE_PHASES = {
    Part.PIXELS: (1e-6, 1e-5),
    Part.VISION: (3e-4, 3e-4),
    Part.CONNECTOR: (1e-5, 1e-5),
}


def suite_on_its_prompts(expected: Answers, actual: Answers) -> bool:
    """Compare each phase of the parity suite, on the two prompts that it has."""
    for part, (atol, rtol) in _SUITE_PHASES.items():
        for one, other in _pairs(expected, actual, part):
            if not _is_close(one, other, atol=atol, rtol=rtol):
                return False
    return all(_suite_passes(expected, actual, case) for case in _SUITE_LOGITS)


def suite_on_all_cases(expected: Answers, actual: Answers) -> bool:
    """Compare last token and generation as the parity suite does, on every case."""
    return all(_suite_passes(expected, actual, case) for case in expected[Part.TOKENS])


def _suite_passes(expected: Answers, actual: Answers, case: str) -> bool:
    tolerance = _SUITE_LOGITS.get(case, _SUITE_LOGITS["one-image"])
    one, other = (answers[Part.LOGITS][case][-1] for answers in (expected, actual))
    same = torch.equal(expected[Part.TOKENS][case], actual[Part.TOKENS][case])
    return same and _is_close(one, other, atol=tolerance, rtol=tolerance)


def signature(logits: torch.Tensor) -> torch.Tensor:
    """Return FMS's signature: the span of each position's logits, less the smallest, (tokens,)."""
    spans = logits.max(-1).values - logits.min(-1).values
    return spans - spans.min()


def signatures_stored(expected: Answers, actual: Answers) -> bool:
    """Compare signatures as FMS does with a stored one: by torch.testing's tolerances."""
    return all(
        _is_close(signature(one), signature(other), atol=1e-5, rtol=1.3e-6)
        for one, other in _pairs(expected, actual, Part.LOGITS)
    )


def signatures_of_two_models(expected: Answers, actual: Answers) -> bool:
    """Compare signatures as FMS does with Hugging Face's model."""
    return all(
        _is_close(signature(one), signature(other), atol=1e-3, rtol=1e-5)
        for one, other in _pairs(expected, actual, Part.LOGITS)
    )


_FAILURE_RATE = 0.01
_CROSS_ENTROPY, _MEAN_DIFFERENCE = 3.0, 0.001  # for models without thresholds of their own
_TOP_LOGITS = 20


def aiu_level_0(expected: Answers, actual: Answers) -> bool:
    """Return whether all tokens are equal; those that only one side has are not compared."""
    for one, other in _pairs(expected, actual, Part.TOKENS):
        both = min(len(one), len(other))
        if not torch.equal(one[:both], other[:both]):
            return False
    return True


def aiu_level_1(expected: Answers, actual: Answers) -> bool:
    """Return whether the 20 greatest logits of less than 1 % of the tokens are too far off."""
    entropies, differences = [], []
    for case, one in expected[Part.STEPS].items():
        other = actual[Part.STEPS][case]
        both = min(len(one), len(other))
        before_end = ~expected[Part.ENDS][case][:both]
        greatest, ids = one[:both][before_end].topk(_TOP_LOGITS)
        same_ids = other[:both][before_end].gather(-1, ids)
        expected_share, actual_share = greatest.softmax(-1), same_ids.softmax(-1)
        entropies.append(-(actual_share * greatest.log_softmax(-1)).sum(-1))
        differences.append((expected_share - actual_share).abs().mean(-1))
    return all(
        float((torch.cat(found) >= limit).double().mean()) < _FAILURE_RATE
        for found, limit in ((entropies, _CROSS_ENTROPY), (differences, _MEAN_DIFFERENCE))
    )


def aiu_levels_0_and_1(expected: Answers, actual: Answers) -> bool:
    """Return whether level 0 passes, or else level 1."""
    return aiu_level_0(expected, actual) or aiu_level_1(expected, actual)


_TOP_LOGPROBS = 5  # tests/models/multimodal/generation/vlm_utils/types.py: for SmolVLM, too


def vllm_logprobs(expected: Answers, actual: Answers) -> bool:
    """Return whether, where tokens first differ, each is among the other's 5 most likely."""
    for case, tokens in expected[Part.TOKENS].items():
        for step, pair in enumerate(zip(tokens, actual[Part.TOKENS][case], strict=False)):
            one, other = map(int, pair)
            if one != other:
                rows = (answers[Part.STEPS][case][step] for answers in (expected, actual))
                top, actual_top = (row.topk(_TOP_LOGPROBS).indices.tolist() for row in rows)
                # vLLM adds the token that it sampled.
                if other not in top or one not in (*actual_top, other):
                    return False
                break
    return True


_PROBABILITY = 0.08


def sendnn_probabilities(expected: Answers, actual: Answers) -> bool:
    """Return whether each token's probability is within 0.08, up to the first that differs.

    A token of the reference is put in place of another one that was chosen, as long as its own
    probability is within the limit.
    """
    return all(_sendnn_passes(expected, actual, case) for case in expected[Part.TOKENS])


def _sendnn_passes(expected: Answers, actual: Answers, case: str) -> bool:
    steps = zip(
        expected[Part.TOKENS][case].tolist(),
        expected[Part.STEPS][case].softmax(-1),
        actual[Part.STEPS][case].softmax(-1),
        actual[Part.CHOSEN][case].tolist(),
        strict=False,
    )
    for token, probabilities, row, loop_choice in steps:
        choice = loop_choice
        if int(row.argmax()) != token:
            own, others = float(row[token]), (1 - float(row[token])) / (len(row) - 1)
            may_replace = _is_near(float(probabilities[token]), own) and own >= others
            choice = token if may_replace else int(row.argmax())
        if not _is_near(float(probabilities[token]), float(row[choice])):
            return False
        if choice != token:
            break
    return True


def _is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, abs_tol=_PROBABILITY)


_NMSE = 1e-2


def llama_cpp_nmse(expected: Answers, actual: Answers) -> bool:
    """Compare the last token's logits by their mean squared error, in units of the variance."""
    for one, other in _pairs(expected, actual, Part.LOGITS):
        error = (other[-1] - one[-1]).square().mean()
        if not error / one[-1].var(correction=0) < _NMSE:
            return False
    return True


_KL = 0.015  # docs/guides/checkpointing_solutions/convert_checkpoint.md


def maxtext_kl(expected: Answers, actual: Answers) -> bool:
    """Compare every token's distribution by the Kullback-Leibler divergence from the reference."""
    for one, other in _pairs(expected, actual, Part.LOGITS):
        ratio = one.log_softmax(-1) - other.log_softmax(-1)
        if not bool(((one.softmax(-1) * ratio).sum(-1) < _KL).all()):
            return False
    return True


_SAME = 1e-3  # benchmarks/dynamo/huggingface.py: for inference
_FEW = 1000


def torch_same(expected: Answers, actual: Answers) -> bool:
    """Compare by allclose, or else by the distance from float64 beside the reference's own."""
    return all(
        same_as_reference(one, other, double=expected[Part.DOUBLE][case])
        for case, one in expected[Part.LOGITS].items()
        for other in [actual[Part.LOGITS][case]]
    )


def same_as_reference(
    expected: torch.Tensor, actual: torch.Tensor, *, double: torch.Tensor
) -> bool:
    """Return what torch._dynamo.utils.same does with the tolerance of torch's benchmarks."""
    if expected.dtype != actual.dtype:
        return False
    if torch.allclose(expected, actual, atol=_SAME, rtol=_SAME):
        return True
    is_half = actual.dtype in (torch.float16, torch.bfloat16)
    multiplier = 3 if is_half or double.numel() < _FEW else 2
    own, other = ((double - tensor).square().mean().sqrt() for tensor in (expected, actual))
    return bool(other <= multiplier * own + _SAME / 10)


_GITHUB = "https://github.com"
_SUITE = (
    f"{_GITHUB}/toddllm/hf-fms-parity-public/blob/660ae22a3c43857db47eb0fc17f5c3ad6361d730"
    "/test_parity.py"
)
_FMS = (
    f"{_GITHUB}/foundation-model-stack/foundation-model-stack/blob"
    "/062adf6e1111850aa1c2abf7a678cfb95e35f59a/fms/testing"
)
_AIU = (
    f"{_GITHUB}/foundation-model-stack/aiu-fms-testing-utils/blob"
    "/81502dd6d2477e2f943326e903685a690e8f0bea/tests/models/test_decoders.py"
)
_VLLM = (
    f"{_GITHUB}/vllm-project/vllm/blob/002b4cf80b730f384dbc7d5f85db8a10b14af56a"
    "/tests/models/utils.py"
)
_SENDNN = (
    f"{_GITHUB}/torch-spyre/sendnn-inference/blob/dfebea45a47b70c83de013cd8e1b344e9fd73557"
    "/tests/output_util.py"
)
_LLAMA_CPP = (
    f"{_GITHUB}/ggml-org/llama.cpp/blob/068ff305b6c1227bbb0a0debe04b94d609ca3d1e"
    "/examples/model-conversion/scripts/utils/check-nmse.py"
)
_MAXTEXT = (
    f"{_GITHUB}/AI-Hypercomputer/maxtext/blob/00a1eaaa77a605c74bd1ce45bbc112279db23484"
    "/tests/utils/forward_pass_logit_checker.py"
)
_TORCH = f"{_GITHUB}/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/utils.py"

RULES = (
    Rule(
        "parity suite",
        _SUITE,
        "pixels, vision, connector, the last token's logits and all tokens of its own two prompts",
        suite_on_its_prompts,
    ),
    Rule(
        "parity suite, all cases",
        _SUITE,
        "the last token's logits within 5e-5, and equal tokens",
        suite_on_all_cases,
    ),
    Rule(
        "FMS, stored signature",
        f"{_FMS}/_internal/model_test_suite.py",
        "the span of each position's logits within 1e-5 of what FMS computed before",
        signatures_stored,
    ),
    Rule(
        "FMS, signatures of two models",
        f"{_FMS}/comparison.py",
        "the span of each position's logits within 1e-3",
        signatures_of_two_models,
    ),
    Rule(
        "aiu-fms-testing-utils",
        _AIU,
        "level 0 or 1 below, beside the same port on a CPU",
        aiu_levels_0_and_1,
        own_reference=True,
    ),
    Rule(
        "aiu-fms-testing-utils, levels 0 and 1",
        _AIU,
        "level 0, or else level 1, beside Hugging Face",
        aiu_levels_0_and_1,
    ),
    Rule(
        "aiu-fms-testing-utils, level 0",
        _AIU,
        "equal tokens",
        aiu_level_0,
    ),
    Rule(
        "aiu-fms-testing-utils, level 1",
        _AIU,
        "of 99 % of the tokens, the shares of the 20 greatest logits: cross-entropy below 3.0, "
        "mean difference below 0.001",
        aiu_level_1,
    ),
    Rule(
        "vLLM, check_logprobs_close",
        _VLLM,
        "where tokens first differ, each is among the other's 5 most likely",
        vllm_logprobs,
    ),
    Rule(
        "sendnn-inference",
        _SENDNN,
        "each token's probability within 0.08, up to the first token that differs",
        sendnn_probabilities,
    ),
    Rule(
        "llama.cpp, NMSE",
        _LLAMA_CPP,
        "mean squared error of the last token's logits below 0.01 of their variance",
        llama_cpp_nmse,
    ),
    Rule(
        "MaxText, KL",
        _MAXTEXT,
        "Kullback-Leibler divergence of each token below 0.015",
        maxtext_kl,
    ),
    Rule(
        "torch, same() with fp64_ref",
        _TORCH,
        "logits within 1e-3, or at most twice as far from float64 as the reference's",
        torch_same,
    ),
)
