"""The rules of other projects: each passes what its definition passes, and fails what it fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import same

from tests.mutants.rules import (
    RULES,
    Answers,
    Part,
    References,
    aiu_level_0,
    aiu_level_1,
    failing_rules,
    same_as_reference,
    signature,
)

CASES = ("one-image", "two-images", "padded")
VOCABULARY, TOKENS = 40, 6
Change = Callable[[dict[Part, dict[str, torch.Tensor]]], object]


def answers() -> dict[Part, dict[str, torch.Tensor]]:
    """Return a port's answers on three cases, the same at each call."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 3 * torch.randn(*shape, generator=random)

    found: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in Part}
    for part in (Part.PIXELS, Part.VISION, Part.CONNECTOR):
        found[part]["one-image"] = draw(2, 5)
    for case in CASES:
        logits, steps = draw(9, VOCABULARY), draw(TOKENS, VOCABULARY)
        found[Part.LOGITS][case] = logits
        found[Part.DOUBLE][case] = logits.double()
        found[Part.STEPS][case] = steps
        found[Part.TOKENS][case] = found[Part.CHOSEN][case] = steps.argmax(-1)
        found[Part.ENDS][case] = torch.arange(TOKENS) == TOKENS - 1
    return found


def failing(change: Change) -> set[str]:
    """Return the rules that fail a port with another answer somewhere."""
    right, changed = answers(), answers()
    change(changed)
    return set(failing_rules(changed, References(right, right), on_cpu=changed))


ALL = {rule.name for rule in RULES}
OWN = "aiu-fms-testing-utils"
AIU = {f"{OWN}, levels 0 and 1", f"{OWN}, level 0", f"{OWN}, level 1"}
SUITE = {"parity suite", "parity suite, all cases"}
SIGNATURES = {"FMS, stored signature", "FMS, signatures of two models"}
VLLM, SENDNN = "vLLM, check_logprobs_close", "sendnn-inference"
LLAMA_CPP, MAXTEXT, TORCH = "llama.cpp, NMSE", "MaxText, KL", "torch, same() with fp64_ref"


def add(part: Part, place: object, amount: float, case: str = "one-image") -> Change:
    """Return a change of one element of an answer."""

    def change(found: dict[Part, dict[str, torch.Tensor]]) -> None:
        found[part][case][place] += amount  # type: ignore[index]

    return change


def choose(rank: int, case: str = "padded", step: int = 2) -> Change:
    """Return a change by which another token is the most likely one of a step, and chosen."""

    def change(found: dict[Part, dict[str, torch.Tensor]]) -> None:
        row = found[Part.STEPS][case][step]
        top = row.topk(rank + 1)
        token = int(top.indices[-1])
        row[token] = float(top.values[0]) + 0.001
        found[Part.TOKENS][case] = found[Part.TOKENS][case].clone()
        found[Part.TOKENS][case][step] = token
        found[Part.CHOSEN][case] = found[Part.TOKENS][case]

    return change


def cut(part: Part) -> Change:
    """Return a change that leaves the last element of an answer out."""
    return lambda found: found[part].update(padded=found[part]["padded"][:-1])


def drop(part: Part) -> Change:
    """Return a change by which the port raises on a case."""
    return lambda found: found[part].pop("one-image")


CHANGES: dict[str, tuple[Change, set[str]]] = {
    "nothing": (lambda found: None, set()),
    "a pixel": (add(Part.PIXELS, (0, 0), 1e-3), {"parity suite"}),
    "a pixel within its tolerance": (add(Part.PIXELS, (0, 0), 5e-7), set()),
    "a feature": (add(Part.VISION, (0, 0), 0.01), {"parity suite"}),
    "a logit of the last token": (add(Part.LOGITS, (-1, 0), 9e-4), SUITE),
    "a logit of an earlier token": (add(Part.LOGITS, (0, 0), 9e-4), set()),
    "the last token of a case that the suite lacks": (
        add(Part.LOGITS, (-1, 0), 9e-4, "padded"),
        {"parity suite, all cases"},
    ),
    "all logits, slightly": (
        lambda found: found[Part.LOGITS]["padded"].mul_(1.00005),
        {"FMS, stored signature"},
    ),
    "all logits by a hundredth": (
        lambda found: found[Part.LOGITS]["padded"].mul_(1.01),
        {*SIGNATURES, "parity suite, all cases", TORCH},
    ),
    "all logits by a half": (
        lambda found: found[Part.LOGITS]["padded"].mul_(1.5),
        {*SIGNATURES, "parity suite, all cases", LLAMA_CPP, MAXTEXT, TORCH},
    ),
    "NaN": (
        add(Part.LOGITS, (-1, 0), torch.nan),
        {*SUITE, *SIGNATURES, LLAMA_CPP, MAXTEXT, TORCH},
    ),
    "a token that was nearly as likely": (
        choose(1),
        {"parity suite, all cases", *AIU, SENDNN},
    ),
    "a token that was not likely": (choose(10), {"parity suite, all cases", *AIU, VLLM, SENDNN}),
    "a token that was not among the 20 most likely": (
        choose(20),
        {"parity suite, all cases", f"{OWN}, level 0", VLLM, SENDNN},
    ),
    "one token too few": (cut(Part.TOKENS), {"parity suite, all cases"}),
    "no logits": (drop(Part.LOGITS), {*SUITE, *SIGNATURES, LLAMA_CPP, MAXTEXT, TORCH}),
    "no tokens": (drop(Part.TOKENS), {*SUITE, VLLM, OWN, *AIU} - {f"{OWN}, level 1"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_rule_fails_what_its_definition_fails(name: str) -> None:
    """No other rule fails by it, and none that compares a port with itself."""
    change, expected = CHANGES[name]
    assert failing(change) == expected


def test_a_port_that_cannot_run_fails_by_every_rule() -> None:
    """It raises in place of every answer."""
    right = answers()
    nothing: Answers = {part: {} for part in Part}
    assert set(failing_rules(nothing, References(right, right), on_cpu=nothing)) == ALL


def test_a_rule_whose_reference_is_the_same_port_finds_what_only_another_run_shows() -> None:
    """aiu-fms-testing-utils compares a port with itself on a CPU."""
    right, changed = answers(), answers()
    choose(10)(changed)
    references = References(right, right)
    assert OWN not in failing_rules(changed, references, on_cpu=changed)
    assert OWN in failing_rules(changed, references, on_cpu=right)


@pytest.mark.parametrize(("wrong", "passes"), [(1, True), (2, False)])
def test_level_1_lets_less_than_one_token_in_a_hundred_fail(wrong: int, *, passes: bool) -> None:
    """200 tokens, and one that ends the generation, which does not count."""
    steps = torch.randn(201, VOCABULARY, generator=torch.Generator().manual_seed(0))
    changed = steps.clone()
    changed[[*range(wrong), 200]] = 0
    ends = torch.arange(201) == 200

    def one_case(logits: torch.Tensor) -> Answers:
        return {Part.STEPS: {"a": logits}, Part.ENDS: {"a": ends}}

    assert aiu_level_1(one_case(steps), one_case(changed)) is passes


def test_level_0_compares_no_more_tokens_than_both_sides_have() -> None:
    """A missing end token is not noticed."""
    both = [{Part.TOKENS: {"a": torch.arange(length)}} for length in (3, 4)]
    assert aiu_level_0(*both)


@pytest.mark.parametrize("size", [0, 2e-4, 9e-4, 2e-3, 1])
@pytest.mark.parametrize("rounding", [1e-6, 1e-3])
def test_distances_from_float64_are_judged_as_torch_does(size: float, rounding: float) -> None:
    """The same verdict as torch's own function."""
    random = torch.Generator().manual_seed(0)
    double = 10 * torch.randn(50, 40, generator=random, dtype=torch.float64)
    noise, other = torch.randn(2, 50, 40, generator=random)
    expected = double.float() + rounding * noise
    actual = double.float() + rounding * noise.flip(0) + size * other
    verdict = same(expected, actual, fp64_ref=double, tol=1e-3)
    assert same_as_reference(expected, actual, double=double) is verdict


def test_a_signature_is_the_span_of_each_position_less_the_smallest() -> None:
    """As FMS's get_signature returns it."""
    logits = torch.tensor([[1.0, 4.0, 2.0], [-2.0, 0.0, 3.0], [0.5, 0.5, 1.5]])
    assert signature(logits).tolist() == [2.0, 4.0, 0.0]
