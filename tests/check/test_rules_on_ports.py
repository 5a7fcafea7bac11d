"""What the rules of other projects read of a port, and what they find in it."""

from __future__ import annotations

import pytest
import torch

from snapshot_tool.base.protocol import Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.parts import TOKEN_IDS
from tests.history.rules import APPLICABLE, port_answers, recorded_answers
from tests.mutants.answers import read_answers
from tests.mutants.rules import RULES, Part, References, failing_rules


def failing_in_history(candidate: FmsCandidate, golden: Golden) -> set[str]:
    """Return the rules that fail a port by what a golden set keeps."""
    answers, recorded = port_answers(candidate, golden), recorded_answers(golden)
    failing = failing_rules(answers, References(recorded, recorded), on_cpu=answers)
    return set(failing).intersection(APPLICABLE)


def test_a_right_port_passes_the_rules_that_a_golden_set_can_feed(
    candidate: FmsCandidate, golden: Golden
) -> None:
    """Beside Hugging Face's recorded answers."""
    assert set(APPLICABLE) <= {rule.name for rule in RULES}
    assert failing_in_history(candidate, golden) == set()


def test_rules_of_tokens_do_not_see_larger_logits(candidate: FmsCandidate, golden: Golden) -> None:
    """Rules of logits do."""
    head = candidate.model.text_model.head.weight
    before = head.detach().clone()
    try:
        with torch.no_grad():
            head.mul_(1.5)
        failing = failing_in_history(candidate, golden)
    finally:
        with torch.no_grad():
            head.copy_(before)
    assert failing == {"parity suite, all cases", "llama.cpp, NMSE", "MaxText, KL"}


def test_a_generation_is_forced_to_the_recorded_tokens(
    candidate: FmsCandidate, golden: Golden
) -> None:
    """The logits of each step choose the recorded token, in a port that is right."""
    answers = read_answers(candidate, golden)
    for case in golden.cases:
        tokens = golden.tensor(case, Phase.GENERATE, TOKEN_IDS)
        assert torch.equal(answers[Part.STEPS][case].argmax(-1), tokens)
        assert torch.equal(answers[Part.CHOSEN][case], tokens)
        assert torch.equal(answers[Part.TOKENS][case], tokens)


def test_what_a_port_raises_in_place_of_is_left_out(
    candidate: FmsCandidate, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other answers are kept."""

    def fail(**_given: object) -> None:
        raise RuntimeError("no cache")

    monkeypatch.setattr(candidate.model, "generate", fail)
    answers = read_answers(candidate, golden)
    assert not answers[Part.TOKENS]
    assert not answers[Part.STEPS]
    assert answers[Part.LOGITS].keys() == golden.cases.keys()
