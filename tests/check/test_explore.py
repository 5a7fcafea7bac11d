"""`snap check --explore`: derived questions, which the golden answers besides its own cases."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import PhaseUnsupported, UsageError
from snapshot_tool.base.protocol import Candidate, CandidateRequest, CaseInputs, Phase
from snapshot_tool.base.results import Verdict
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.explore.draw import explore, questions_of
from snapshot_tool.explore.questions import KINDS, Batch, Prefix, parse_question
from snapshot_tool.explore.recorded import Prompt, Recorded, capabilities_of
from snapshot_tool.explore.run import QueryRunner, replay
from snapshot_tool.families.idefics3 import IDEFICS3
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.judge.judge import Judge
from snapshot_tool.judge.watch import WatchedCandidate
from tests.conftest import CHECKOUT, GOLDENS, ROOT, Run, Snap
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import Edit, plant

FAMILIES = ROOT / "tests" / "families"
# Faults that no recorded case shows: the phase that they are in, and what they must shrink to.
SMALLEST = {
    "cache-off-by-one": ("forward", "split:variant-02@2:1"),
    "batch-ends-with-first-row": ("generate", "generation-batch:variant-02,variant-11:7"),
    "images-across-rows": ("forward", "batch:"),
    "single-tile-squeezed": ("vision", "tiles:variant-01:0"),
}
LEAKING_TILES = Edit(
    "fms/models/siglip_vision.py",
    "last_hidden_state = self.post_layernorm(last_hidden_state)",
    "last_hidden_state = self.post_layernorm(last_hidden_state)\n"
    "        last_hidden_state = 0.99 * last_hidden_state + 0.01 * last_hidden_state.roll(1, 0)",
)


def runner(candidate: Any, golden: Golden) -> QueryRunner:
    """Return what runs questions on a candidate in float32."""
    return QueryRunner(candidate, Recorded.of(golden), Judge(golden, "float32"))


def failures(run: Run) -> list[str]:
    """Return the smallest failure of each kind that failed."""
    kinds = run.report["exploration"]["kinds"]
    return [kind["smallest_failure"] for kind in kinds if kind["smallest_failure"]]


def recorded_results(run: Run) -> list[Any]:
    """Return the results that are of no derived question."""
    return [result for result in run.report["results"] if ":" not in result["tensor"]]


@pytest.mark.parametrize("family", ["idefics3", "llama"])
def test_a_correct_port_passes_every_kind_of_question(
    golden: Golden, candidate: FmsCandidate, family: str
) -> None:
    """With room: what rounding does to padded and batched rows is far below the tolerance.

    Llama runs on FMS's own loop and cache. It has no tiles.
    """
    if family == "llama":
        golden = open_golden(next(FAMILIES.glob("goldens/*llama/*/*/manifest.json")).parent)
        config = golden.manifest.checkpoint.config
        request = CandidateRequest(FAMILIES / "checkpoints" / "llama", config, "cpu", "float32")
        candidate = load_fms_candidate(request, fms_path=CHECKOUT)
    found = explore(runner(candidate, golden), count=90, seed=7)
    absent = "chunks|tiles" if family == "llama" else "chunks"  # chunks need a paged cache
    kinds = [kind for kind in KINDS if not re.search(absent, kind)]
    assert [kind.kind for kind in found.kinds] == kinds
    assert {kind.verdict for kind in found.kinds} == {Verdict.PASS}
    assert found.asked == len({result.tensor for result in found.results}) == 90
    assert all((result.tolerance_used or 0) < 0.5 for result in found.results)


def test_one_seed_draws_the_same_questions_again(golden: Golden, candidate: FmsCandidate) -> None:
    """And another seed draws others."""

    def drawn(seed: int) -> list[str]:
        found = explore(runner(candidate, golden), count=18, seed=seed, phases=[Phase.CONNECTOR])
        return [result.tensor for result in found.results]

    assert drawn(1) == drawn(1) != drawn(2)


def test_no_prompt_is_cut_within_a_tile(golden: Golden) -> None:
    """Every cut has whole tiles before it, and all numbers of tiles are there."""
    recorded = Recorded.of(golden)
    image_token = golden.manifest.checkpoint.config["image_token_id"]
    for case in golden.manifest.cases:
        inputs, cuts = golden.inputs(case.name), recorded.case(case.name).cuts
        ids = inputs.input_ids[inputs.attention_mask.bool()]
        assert set(cuts.values()) == set(range(case.tiles + 1))
        assert {length: int((ids[:length] == image_token).sum()) for length in cuts} == {
            length: tiles * 4 for length, tiles in cuts.items()
        }
        assert recorded.case(case.name).length == case.tokens - case.recipe["left_padding"]


def test_a_candidate_may_refuse_some_questions_and_fail_others(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """A refusal is a skip of that question; the failure is found, and shrunk, all the same."""

    class TwoRows(Candidate):
        def forward_batch(self, rows: Any) -> Any:
            if len(rows) > 2:
                raise PhaseUnsupported("two rows at most")
            logits: Any = candidate.forward_batch(rows)
            return logits if rows[0].input_ids.shape[1] < 100 else logits + 1

    found = explore(runner(TwoRows(), golden), count=120, phases=[Phase.FORWARD])
    batch = found.kinds[-1]
    assert {result.verdict for result in batch.results} == {"pass", "skip", "fail"}
    assert batch.failure is not None
    question = parse_question(batch.failure.tensor)
    assert isinstance(question, Batch)
    assert min(prompt.length for prompt in question.prompts) == 1
    assert max(prompt.length for prompt in question.prompts) >= 100
    assert len(question.prompts) == 2
    assert {"two rows at most"} == {r.reason for r in batch.results if r.verdict == "skip"}


def test_a_recurrent_family_is_never_padded(golden: Golden) -> None:
    """Padding changes its state, so only unpadded cases and kinds without padding remain."""
    recurrent = replace(IDEFICS3, recurrent=True)
    padded, unpadded = (
        capabilities_of(golden, case, recurrent) for case in ("variant-01", "variant-02")
    )
    assert Phase.FORWARD not in padded.phases
    assert {Phase.FORWARD, Phase.GENERATE} == unpadded.phases
    strategies = {name: questions_of(kind, [padded, unpadded]) for name, kind in KINDS.items()}
    assert {name for name, strategy in strategies.items() if strategy is not None} == {
        "prefix",
        "split",
        "shorter",
        "resumed",
        "tiles",
        "connector-tiles",
    }


def test_an_encoder_answers_questions_about_tiles_only(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token sees all others, so a prefix has other logits; or there are no tokens at all."""
    encoder = replace(IDEFICS3, phases=tuple(set(Phase) - {Phase.GENERATE}))
    found = capabilities_of(golden, "one-image", encoder)
    assert found.phases == {Phase.VISION, Phase.CONNECTOR}
    assert capabilities_of(golden, "variant-02", encoder).phases == set()
    nothing = golden.text("variant-04").input_ids[:, :0]
    monkeypatch.setattr(Golden, "text", lambda _golden, _case: CaseInputs(nothing, nothing))
    encoder = replace(IDEFICS3, phases=(Phase.PREPROCESSING, Phase.VISION))
    found = capabilities_of(golden, "variant-04", encoder)
    assert (found.length, found.tiles, Phase.FORWARD in found.phases) == (0, 5, False)


@pytest.mark.parametrize("fault", SMALLEST)
def test_a_fault_that_no_recorded_case_shows_is_found_and_shrunk(
    snap: Snap, tmp_path: Path, fault: str
) -> None:
    """All that was recorded passes; a derived question fails, in its smallest form."""
    phase, smallest = SMALLEST[fault]
    plant(edit_of(fault), checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--phase", phase, "--explore", 80, "--json", "-")
    run = snap("check", "--fms-path", tmp_path / "checkout", *options)
    assert run.code == 1
    assert {result["verdict"] for result in recorded_results(run)} == {"pass"}
    found = " ".join(failures(run))
    assert smallest in found


def test_padding_that_is_ignored_is_found_on_a_case_without_padding(
    snap: Snap, tmp_path: Path
) -> None:
    """One token after one pad is enough; the printed line replays just that.

    And hypothesis leaves no folder of its own.
    """
    plant(edit_of("padding-ignored"), checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--phase", "forward", "--case", "two-images", "--explore", 16, "--allow-near-ties")
    run = snap("check", "--fms-path", "checkout", "--goldens", GOLDENS, *options, cwd=tmp_path)
    assert run.code == 1
    (line,) = (line for line in run.out.splitlines() if "--replay padding:" in line)
    command = shlex.split(line.partition("smallest:")[2])
    assert command[:2] == ["snap", "check"]
    assert command[command.index("--fms-path") + 1] == "checkout"
    assert command[-2:] == ["--replay", "padding:two-images@1+1"]
    again = snap(*command[1:], "--json", "-", cwd=tmp_path)
    assert again.code == 1
    (result,) = again.report["results"]
    assert (result["case"], result["phase"]) == ("two-images", "forward")
    assert result["tensor"] == "padding:two-images@1+1"
    assert result["mismatched"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_tiles_that_depend_on_their_neighbours_shrink_to_two(snap: Snap, tmp_path: Path) -> None:
    """One tile alone is right."""
    plant(LEAKING_TILES, checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--phase", "vision", "--explore", 20, "--json", "-")
    run = snap("check", "--fms-path", tmp_path / "checkout", *options)
    assert run.code == 1
    (smallest,) = failures(run)
    assert smallest.endswith(":0,1")


def test_what_a_candidate_does_not_support_is_a_skip_and_never_a_pass(snap: Snap) -> None:
    """A missing method is a reason; PhaseUnsupported is another. --require makes it exit 3."""
    spec = ("--candidate", "tests.candidates:AsksForOneRow", "--case", "variant-02")
    options = ("--phase", "forward", "--explore", 12, "--require", "forward", "--json", "-")
    run = snap("check", *spec, *options)
    assert (run.code, run.report["verdict"]) == (3, "pass")
    verdicts = {k["kind"]: (k["verdict"], k["asked"]) for k in run.report["exploration"]["kinds"]}
    assert verdicts.pop("split") == ("skip", 1)
    assert verdicts.pop("batch") == ("skip", 0)
    assert {verdict for verdict, _ in verdicts.values()} == {"pass"}
    reasons = {r["reason"] for r in run.report["results"] if r["verdict"] == "skip"}
    assert reasons == {"the candidate has no method 'forward_batch'", "no cache yet"}


def test_a_question_that_raises_is_an_error_of_its_kind_alone(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """With its message, and shrunk like any failure."""

    class Raises(Candidate):
        def forward(self, inputs: Any) -> Any:
            return candidate.forward(inputs)

        def forward_batch(self, rows: Any) -> Any:
            raise RuntimeError(f"not {len(rows)} rows\nand a second line")

    watched = WatchedCandidate(Raises(), dtype="float32", settings={})
    found = explore(runner(watched, golden), count=12, phases=[Phase.FORWARD])
    verdicts = {kind.kind: kind.verdict for kind in found.kinds}
    assert verdicts == {"prefix": "pass", "padding": "pass", "split": "skip", "batch": "error"}
    failure = found.kinds[-1].failure
    assert failure is not None
    assert failure.tensor == "batch:variant-02@1,variant-02@1"
    assert failure.case == "variant-02"
    assert failure.reason.startswith("RuntimeError: not 2 rows, at tests/check/test_explore.py:")
    assert "raise RuntimeError" in failure.traceback


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        ("suffix:one-image@1", "unknown kind 'suffix'"),
        ("prefix:nobody@1", "unknown case nobody"),
        ("prefix:one-image@999", "cannot be cut after 999 tokens"),
        ("split:variant-02@3:3", "nothing is left for the second part"),
        ("tiles:one-image:17", "has 17 tiles, from 0, not .17."),
        ("tiles:variant-02:0", "has 0 tiles, from 0"),
        ("shorter:variant-11:7", "has 6 recorded new tokens, not 7"),
        ("resumed:variant-11:6", "has 6 recorded new tokens, not 7"),
        ("generation-batch:variant-02,variant-11:21", "at most 20 new tokens were recorded"),
    ],
)
def test_a_question_without_a_recorded_answer_is_refused(
    golden: Golden, candidate: FmsCandidate, question: str, problem: str
) -> None:
    """Nothing is compared, and nothing passes."""
    with pytest.raises(UsageError, match=problem):
        replay(runner(candidate, golden), [parse_question(question)])


def test_another_token_is_reported_with_its_step_and_the_goldens_margin(golden: Golden) -> None:
    """Steps are those of the whole generation, also where it was resumed."""
    tokens = golden.tensor("one-image", Phase.GENERATE, "token_ids")
    top = golden.tensor("one-image", Phase.GENERATE, "step_topk_ids")[9]

    class TakesSecondBest(Candidate):
        def generate(self, inputs: Any, *, max_new_tokens: int, eos_token_ids: Any) -> Any:
            rest = tokens[-max_new_tokens:].clone()
            rest[9 - (len(tokens) - max_new_tokens)] = top[1]
            return rest

    (result,) = replay(
        runner(TakesSecondBest(), golden), [parse_question("resumed:one-image:6")]
    ).results
    assert result.verdict is Verdict.FAIL
    expected = f"first other token at step 9: expected {top[0]}, actual {top[1]} ("
    assert result.reason.startswith(expected)
    assert result.divergence is not None
    assert result.divergence.margin is not None
    assert result.divergence.margin > 0


@pytest.mark.parametrize(("row", "position"), [(0, 4), (1, 0)])
def test_every_position_of_every_row_is_compared(
    golden: Golden, candidate: FmsCandidate, row: int, position: int
) -> None:
    """One logit off, at the first or the last position; and more logits than tokens."""

    class OneOff(Candidate):
        def forward(self, inputs: Any) -> Any:
            return candidate.forward(inputs).repeat(1, 2, 1)

        def forward_batch(self, rows: Any) -> Any:
            logits: Any = candidate.forward_batch(rows)
            pads = 0 if row == 0 else 2
            logits[row, pads + position] += 1e-3
            return logits

    prompts = (Prompt("one-image", 5), Prompt("variant-02", 3))
    (result,) = replay(runner(OneOff(), golden), [Batch(prompts)]).results
    assert (result.verdict, result.case) == ("fail", prompts[row].case)
    assert result.worst is not None
    assert result.worst.index[0] == position
    (result,) = replay(runner(OneOff(), golden), [Prefix(prompts[1])]).results
    assert result.reason == "shape mismatch: expected (1, 3, 480), actual (1, 6, 480)"


def test_near_ties_of_derived_generations_pass_in_half_precision(snap: Snap) -> None:
    """They are counted, as those of the recorded generations are."""
    spec = "tests.candidates:TakesTheOtherOfTwo"
    options = ("check", "--candidate", spec, "--dtype", "bfloat16")
    question = ("--replay", "resumed:variant-12:17")
    run = snap(*options, *question)
    assert run.code == 0
    assert run.out.splitlines()[-1].endswith("near-ties allowed: 1")
