"""Wrong but plausible: what a careful person gets wrong is named, whatever the numbers say."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshot_tool.base.environment import make_deterministic
from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.protocol import CaseInputs, Phase
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.candidates import PlainCandidate
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import Session
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.judge.watch import WatchedCandidate
from tests.check import wrong_candidates as wrong
from tests.conftest import GOLDENS, Snap, set_folder

FOLDER = set_folder(GOLDENS)


@pytest.fixture
def fms(candidate: FmsCandidate) -> FmsCandidate:
    """Name what the wrong candidates pass on."""
    return candidate


@pytest.fixture(autouse=True)
def torchs_switches() -> Iterator[None]:
    """Put torch's switches back: some candidates here set them."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def run(
    golden: Golden,
    candidate: object,
    *phases: Phase,
    cases: tuple[str, ...] = ("one-image",),
    repeat: int = 1,
) -> tuple[tuple[str, ...], list[Result]]:
    """Return the warnings and results of some phases."""
    settings = make_deterministic(1, strict=False)
    request = CheckRequest(GOLDENS, repeat=repeat)
    checker = Session(request, golden, PlainCandidate(candidate), settings=settings)
    results = []
    for case in cases:
        for phase in phases:
            results += checker.run(golden.case(case), phase)
    return checker.candidate.warnings, results


def verdicts(results: list[Result]) -> set[Verdict]:
    """Return the verdicts that there are."""
    return {result.verdict for result in results}


def test_a_correct_candidate_gives_no_warning(golden: Golden, fms: FmsCandidate) -> None:
    """In no phase, and not when run twice: a guard that cries wolf is no guard."""
    candidate = wrong.Passing(fms, FOLDER)
    warnings, results = run(golden, candidate, *Phase, repeat=2)
    assert (warnings, verdicts(results)) == ((), {Verdict.PASS})


@pytest.mark.parametrize(
    ("kind", "phase", "warning"),
    [
        (wrong.SwitchesTf32On, Phase.VISION, "the candidate set tf32 to true for all of torch"),
        (
            wrong.LowersMatmulPrecision,
            Phase.VISION,
            "the candidate set float32_matmul_precision to medium for all of torch",
        ),
        (
            wrong.UsesAutocast,
            Phase.CONNECTOR,
            "autocast is on: parts of the candidate ran in bfloat16",
        ),
        (wrong.IsInTrainMode, Phase.CONNECTOR, "the candidate ran in train mode"),
        (wrong.KeepsGradients, Phase.CONNECTOR, "the candidate ran with gradients on"),
        (wrong.KeepsGradients, Phase.CONNECTOR, "connector returned a tensor that requires grad"),
        (
            wrong.HasCoarseWeights,
            Phase.CONNECTOR,
            "the candidate ran with bfloat16 weights instead of float32",
        ),
        (wrong.OverwritesInputs, Phase.PREPROCESSING, "preprocess overwrote its input image 0"),
        (wrong.OverwritesInputs, Phase.FORWARD, "forward overwrote its input attention_mask"),
        (wrong.HandsInputsBack, Phase.CONNECTOR, "connector returned the memory of its input"),
        (wrong.HandsInputsBack, Phase.CONNECTOR, "connector overwrote its input features"),
    ],
)
def test_what_is_wrong_about_a_run_is_named(
    golden: Golden,
    fms: FmsCandidate,
    kind: type[wrong.Passing],
    phase: Phase,
    warning: str,
) -> None:
    """By one warning, once, with the method and the input that it is about."""
    warnings, _ = run(golden, kind(fms, FOLDER), phase)
    assert [text for text in warnings if text.startswith(warning)], warnings
    assert len(warnings) == len(set(warnings))


def test_an_input_that_is_returned_is_no_buffer(golden: Golden, fms: FmsCandidate) -> None:
    """Also if the next run gets the same memory."""
    candidate = wrong.ReturnsItsInput(fms, FOLDER)
    warnings, results = run(golden, candidate, Phase.CONNECTOR, repeat=2)
    assert warnings == ("connector returned the memory of its input features",)
    assert verdicts(results) == {Verdict.FAIL}


def test_an_input_that_becomes_a_buffer_is_named_once_it_is_one(fms: FmsCandidate) -> None:
    """However often it was an input before."""
    given = torch.zeros(1, 4, 3)
    adopting = PlainCandidate(wrong.AdoptsItsInput(fms, FOLDER))
    candidate = WatchedCandidate(adopting, dtype="float32", settings={})
    answers = [candidate.connector(one) for one in (given, given, given + 1)]
    assert list(candidate.warnings) == ["connector returned the memory of its input features"]
    answers.append(candidate.connector(given + 2))
    buffer = "connector returns views of one buffer: each call overwrites the last output"
    assert list(candidate.warnings[1:]) == [buffer]


@pytest.mark.parametrize("kind", [wrong.ReturnsOneBuffer, wrong.ReturnsOneArray])
def test_one_buffer_for_every_answer_is_named_and_spoils_nothing(
    golden: Golden, fms: FmsCandidate, kind: type[wrong.Passing]
) -> None:
    """The second case shows it; both cases pass, and so do repeated runs."""
    candidate = kind(fms, FOLDER)
    cases = ("one-image", "two-images")
    warnings, results = run(golden, candidate, Phase.CONNECTOR, cases=cases, repeat=2)
    assert warnings == (
        "connector returns views of one buffer: each call overwrites the last output",
    )
    assert verdicts(results) == {Verdict.PASS}


def test_an_answer_is_not_kept_once_it_is_judged(golden: Golden, fms: FmsCandidate) -> None:
    """Logits take hundreds of megabytes: watching for one buffer must not hold them."""
    answers: list[weakref.ref[torch.Tensor]] = []

    class Remembers(wrong.Passing):
        def forward(self, inputs: CaseInputs) -> Any:
            logits = super().forward(inputs)
            answers.append(weakref.ref(logits))
            return logits

    run(golden, Remembers(fms, FOLDER), Phase.FORWARD)
    assert [answer() for answer in answers] == [None] * len(answers) != []


def test_answers_that_drift_from_run_to_run_are_named_with_their_spread(
    golden: Golden, fms: FmsCandidate
) -> None:
    """Within the tolerance the verdict stays a pass; one run alone cannot see it."""
    warnings, results = run(
        golden, wrong.IsNotDeterministic(fms, FOLDER), Phase.CONNECTOR, repeat=2
    )
    (warning,) = warnings
    assert warning.startswith("connector is not deterministic: two runs differ in ")
    spread = float(warning.rpartition("up to ")[2])
    assert 1e-7 < spread < 1e-5
    assert verdicts(results) == {Verdict.PASS}
    once, _ = run(golden, wrong.IsNotDeterministic(fms, FOLDER), Phase.CONNECTOR)
    assert once == ()


def test_a_run_that_fails_decides_over_those_that_pass(golden: Golden, fms: FmsCandidate) -> None:
    """Right once and wrong once is wrong."""
    candidate = wrong.IsWrongTheSecondTime(fms, FOLDER)
    warnings, results = run(golden, candidate, Phase.CONNECTOR, repeat=2)
    assert verdicts(results) == {Verdict.FAIL}
    assert "by up to 1" in warnings[0]


def test_a_candidate_that_returns_the_golden_fails(golden: Golden, fms: FmsCandidate) -> None:
    """Bit for bit equal where nothing was computed: no answer at all."""
    _, results = run(golden, wrong.ReadsTheGolden(fms, FOLDER), Phase.VISION, Phase.CONNECTOR)
    assert verdicts(results) == {Verdict.FAIL}
    assert {result.reason for result in results} == {
        "equal to the golden set bit for bit, and nothing was computed: the output was copied, not "
        "computed"
    }


@pytest.mark.parametrize(
    ("phase", "question"),
    [
        (Phase.VISION, "tiles:one-image:16,0"),
        (Phase.CONNECTOR, "connector-tiles:one-image:16,0"),
        (Phase.GENERATE, "resumed:one-image:1"),
    ],
)
def test_a_candidate_that_hands_out_the_golden_fails_whatever_it_computes_besides(
    golden: Golden, fms: FmsCandidate, phase: Phase, question: str
) -> None:
    """It does not know the answer to a question that the golden set answers in other words."""
    _, results = run(golden, wrong.ComputesForShow(fms, FOLDER), phase)
    assert verdicts(results) == {Verdict.FAIL}
    (reason,) = {result.reason for result in results}
    assert reason.startswith(f"equal to the golden set bit for bit, but wrong for {question} (")
    assert reason.endswith("): the output was copied, not computed")


def test_equal_bits_that_were_computed_pass(golden: Golden, fms: FmsCandidate) -> None:
    """A connector is one product, and may round as the reference does, with or without modules."""
    for kind in (wrong.Passing, wrong.ComputesWithoutModules):
        _, results = run(golden, kind(fms, FOLDER), Phase.CONNECTOR)
        assert verdicts(results) == {Verdict.PASS}


def test_a_tensor_that_is_not_dense_is_the_candidates_error(
    golden: Golden, fms: FmsCandidate
) -> None:
    """Not snap's, and not the golden's."""
    _, (result,) = run(golden, wrong.ReturnsASparseTensor(fms, FOLDER), Phase.CONNECTOR)
    assert result.verdict is Verdict.ERROR
    assert (
        result.reason == "TypeError: connector returned a torch.sparse_coo tensor, not a dense one"
    )


def test_what_snap_stumbles_over_in_a_golden_is_not_the_candidates_error(
    golden: Golden, fms: FmsCandidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that point outside the vocabulary are damage, with the phase and the case."""
    read = Golden.tensor

    def spoilt(self: Golden, case: str, phase: Phase, name: str) -> torch.Tensor:
        tensor = read(self, case, phase, name)
        return tensor + 10**6 if name == "position_topk_ids" else tensor

    monkeypatch.setattr(Golden, "tensor", spoilt)
    with pytest.raises(
        GoldenDamaged, match="forward of case one-image: tensors of the golden set do not fit"
    ):
        run(golden, wrong.Passing(fms, FOLDER), Phase.FORWARD)


def test_a_lack_of_memory_is_no_verdict(golden: Golden, fms: FmsCandidate) -> None:
    """A candidate that got no memory has neither passed nor failed."""

    class Greedy(wrong.Passing):
        def connector(self, features: torch.Tensor) -> torch.Tensor:
            return torch.empty(2**60)

    with pytest.raises(RuntimeError, match="allocate"):
        run(golden, Greedy(fms, FOLDER), Phase.CONNECTOR)


def test_warnings_and_environment_differences_come_before_the_numbers(
    snap: Snap, goldens_copy: Path
) -> None:
    """In text above the grid, and in JSON under their own names."""
    path = set_folder(goldens_copy) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["environment"].update(processor="Another Processor", torch="2.0.0")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    options = ("--goldens", goldens_copy, "--case", "one-image", "--phase", "vision")
    spoils = ("--candidate", "tests.candidates:SpoilsItsInputs")
    text = snap("check", *spoils, *options, "--json", path.with_name("report"))
    head = text.out.partition("case        preprocessing")[0]
    assert "warning       vision overwrote its input pixel_values" in head
    assert "recorded on   processor Another Processor, here " in head
    assert "recorded on   torch 2.0.0, here " in head
    report = json.loads(path.with_name("report").read_text(encoding="utf-8"))
    own = [text for text in report["warnings"] if not text.startswith("transformers warned: ")]
    assert own == ["vision overwrote its input pixel_values"]
    assert report["recorded_elsewhere"][0].startswith("processor Another Processor, here ")
