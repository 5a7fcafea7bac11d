"""A candidate that is loaded for a golden set: it runs and judges any phase of any case."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from snapshot_tool.base.environment import (
    describe_machine,
    device_name,
    is_importable,
    make_deterministic,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.protocol import (
    Candidate,
    CandidateInfo,
    CandidateRequest,
    KeepOutputs,
    Loading,
    PathKind,
    Phase,
    Progress,
    keep_nothing,
)
from snapshot_tool.base.report import Exploration, Graft, Transformers, WeightReport, find_harmful
from snapshot_tool.base.results import Result, Verdict, first_divergence
from snapshot_tool.base.tolerance import HALF_DTYPES, ORACLE_DTYPES, Rule, default_rule
from snapshot_tool.candidates import load_candidate
from snapshot_tool.candidates.answers import Answers, open_answers
from snapshot_tool.candidates.distributed import DistributedCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.diagnose.localise import localise_case
from snapshot_tool.diagnose.modules import graft_module
from snapshot_tool.explore.recorded import Recorded
from snapshot_tool.explore.run import QueryRunner, fail_if_copied, replay
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.find import open_checkpoint_of
from snapshot_tool.goldens.golden import Golden, has_coarse_oracle
from snapshot_tool.goldens.layout import ORACLE, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Storage
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.judge import Judge
from snapshot_tool.judge.phases import OnePass, Pair, RecordedCase, run_phase
from snapshot_tool.judge.watch import WatchedCandidate, result_of_exception
from snapshot_tool.numerics.compare import compare_weights

# By case, phase and tensor.
Outputs = dict[tuple[str, Phase, str], Pair]


def open_session(request: CheckRequest, golden: Golden, progress: Progress) -> Session:
    """Verify the checkpoint of the golden set, then load the candidate from it.

    No code of the candidate runs before the verification. Answers need no checkpoint.
    """
    require_device(request.device)
    if request.answers:
        return AnswersSession(request, golden, open_answers(Path(request.answers), golden))
    if len(request.paths) > 1:
        raise UsageError("this checks one path at a time", "name one path")
    judge = choose_judge(request, golden)
    weights = request.needs_weights or (request.candidate, request.loading) != ("fms", "snap")
    checkpoint = open_checkpoint_of(golden, request.checkpoint, weights=weights)
    transformers_before = "transformers" in sys.modules
    settings = make_deterministic(golden.manifest.seed, strict=False)
    entry = golden.manifest.checkpoint
    with progress.stage("loading the candidate", 1) as steps:
        candidate = load_candidate(
            request.candidate,
            CandidateRequest(
                checkpoint.folder.absolute(),  # the candidate may change the working folder
                entry.config,
                request.device,
                judge.dtype,
                Loading(request.loading),
                entry.changed_fields,
                frozenset(entry.unused_weights),
                weights,
                str(request.paths[0]),
            ),
            fms_path=Path(request.fms_path) if request.fms_path else None,
        )
        next(steps)
    return Session(
        request,
        golden,
        candidate,
        judge=judge,
        checkpoint=checkpoint.folder,
        settings=settings,
        transformers_before=transformers_before,
        # A repeated phase must compute each time.
        keep_outputs=keep_nothing if request.repeat > 1 else candidate.output_cache(),
    )


def choose_judge(request: CheckRequest, golden: Golden, computed: str | None = None) -> Judge:
    """Return what judges the candidate: the rule, and the dtype that it computes in.

    computed: that dtype; None: as the request says.

    Raises UsageError if the table would judge half precision, and GoldenNotFound if the oracle is
    missing or too coarse.
    """
    own = golden.manifest.dtype
    dtype = computed or request.dtype or own
    rule = request.rule or default_rule(own, dtype)
    own_tolerance = request.atol is not None and request.rtol is not None
    if rule is Rule.TABLE and default_rule(own, dtype) is Rule.ORACLE and not own_tolerance:
        raise UsageError(
            f"the table of tolerances is for float32 only, not for {dtype} against {own}",
            "leave out --tolerance table, or pass --atol and --rtol",
        )
    needed = rule is Rule.ORACLE or request.allow_near_ties
    if needed and ORACLE not in golden.manifest.files:
        use = f"judging {dtype}" if rule is Rule.ORACLE else "--allow-near-ties"
        compact = golden.manifest.storage is Storage.COMPACT
        storage = " --storage full" if compact else ""
        raise GoldenNotFound(
            f"{golden.manifest.title} has no oracle, which is needed for {use}",
            f"record it with: snap record ... --update --reason TEXT{storage} --oracle",
        )
    if rule is Rule.ORACLE and own != dtype == "float32" and has_coarse_oracle(golden.manifest):
        raise GoldenNotFound(
            f"the oracle of {golden.manifest.title} is too coarse to judge {dtype}",
            "record the set again: snap record ... --update --reason TEXT --oracle",
        )
    return Judge(golden, dtype, rule, request.atol, request.rtol)


class Session:
    """A loaded candidate and its golden set; runs any phase of any case.

    Args:
        judge: compares the outputs; None: as the request says.
        checkpoint: the checkpoint's folder; None: tokens are shown without their text.
        settings: the settings for determinism.
        transformers_before: whether transformers was imported before the candidate was loaded.
        keep_outputs: keeps outputs between the phases of a case; see `Candidate.output_cache`.
    """

    def __init__(
        self,
        request: CheckRequest,
        golden: Golden,
        candidate: Candidate,
        *,
        judge: Judge | None = None,
        checkpoint: Path | None = None,
        settings: Mapping[str, str] | None = None,
        transformers_before: bool = False,
        keep_outputs: KeepOutputs = keep_nothing,
    ) -> None:
        self.request = request
        self.golden = golden
        self.settings = dict(settings or {})
        self.device = request.device
        self.judge = judge or choose_judge(request, golden)
        dtype = self.judge.dtype
        self.candidate = WatchedCandidate(
            candidate,
            dtype=dtype,
            settings=self.settings,
            sees_modules=request.paths[0].kind is not PathKind.COMPILED,
        )
        # In half precision rounding often decides, so a correct port may choose another token.
        half = not {golden.manifest.dtype, dtype}.isdisjoint(HALF_DTYPES)
        self.allows_near_ties = request.allow_near_ties or half
        self._explainer = GenerationExplainer(golden, checkpoint, dtype, self.allows_near_ties)
        self._transformers_before = transformers_before
        self._keep_outputs = keep_outputs
        self._distributed = candidate if isinstance(candidate, DistributedCandidate) else None
        self._case: RecordedCase | None = None
        self._one_pass = OnePass()
        self.outputs: Outputs | None = None

    def run(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Run one phase of one case; return a result for every recorded tensor.

        If the phase is repeated, the results are those of the first run that does not pass. Outputs
        that were copied from the golden set fail.
        """
        candidate, repeat = self.candidate, self.request.repeat
        ran_before = candidate.modules_run
        # Modules that ran in the pass of forward also count for its tokens.
        in_one_pass = phase is Phase.GENERATE and self._one_pass.has(case.name)
        results: list[Result] = []
        with self._keep_outputs(case.name):
            for number in range(repeat):
                if repeat > 1:
                    candidate.start_run(number)
                again = self.run_once(case, phase)
                if all(result.verdict is Verdict.PASS for result in results):
                    results = again
        candidate.end_runs()
        return fail_if_copied(
            candidate,
            self.golden,
            results,
            phase=phase,
            judge=self.judge,
            ran=in_one_pass or candidate.modules_run > ran_before,
            run_again=lambda: self.run_once(case, phase),
        )

    def run_once(
        self, case: CaseEntry, phase: Phase, *, judge: Judge | None = None
    ) -> list[Result]:
        """Run a phase once and judge it; an exception of the candidate is an error of the phase.

        judge: used in place of the session's.
        """
        if phase_file(phase) not in self.golden.manifest.files:
            reason = "the golden set was recorded without this phase"
            return [Result(case.name, phase, "", Verdict.SKIP, reason)]
        if self._case is None or self._case.name != case.name:
            self._case = None  # first, because memory may not suffice for two cases
            self._case = RecordedCase(self.golden, case.name, self.golden.inputs(case.name))
        judge, candidate = judge or self.judge, self.candidate
        results: list[Result] = []
        one_pass = self.request.quick and Phase.GENERATE in {*case.phases} & {*self.request.phases}
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                if one_pass and phase is Phase.FORWARD:
                    pairs = self._one_pass.forward(candidate, self._case)
                elif one_pass and phase is Phase.GENERATE:
                    pairs = self._one_pass.generate(candidate, self._case)
                else:
                    pairs = run_phase(candidate, self._case, phase)
            seconds = time.perf_counter() - began
            self._keep(case, phase, pairs)
            for pair in pairs:
                results.append(self._judge(judge, case, phase, pair, seconds))
        except Exception as error:  # the candidate's code may raise anything
            seconds = time.perf_counter() - began
            return [result_of_exception(error, case=case.name, phase=phase, seconds=seconds)]
        return results or [Result(case.name, phase, "", Verdict.FAIL, "nothing was compared")]

    def _judge(
        self, judge: Judge, case: CaseEntry, phase: Phase, pair: Pair, seconds: float
    ) -> Result:
        """Return the verdict on one tensor; that on tokens names the first that differs."""
        result = judge.judge(case, phase, pair, seconds=seconds)
        if pair.tensor == parts.TOKEN_IDS:
            return self._explainer.explain(result, pair.actual, self.candidate)
        return result

    def _keep(self, case: CaseEntry, phase: Phase, pairs: Sequence[Pair]) -> None:
        """Keep the outputs of forward and generate if `outputs` is set."""
        if self.outputs is None or phase not in (Phase.FORWARD, Phase.GENERATE):
            return
        for pair in pairs:
            # Copied, because it may be a view of the logits of all positions.
            actual = pair.actual.clone() if isinstance(pair.actual, torch.Tensor) else None
            self.outputs[case.name, phase, pair.tensor] = replace(pair, actual=actual)

    def explore(self, cases: Sequence[CaseEntry], progress: Progress) -> Exploration | None:
        """Run the questions of --replay, or the number of --explore."""
        request = self.request
        if not request.replay and not request.explore:
            return None
        names = None if request.replay else [case.name for case in cases]
        recorded = Recorded.of(self.golden, names)
        runner = QueryRunner(self.candidate, recorded, self.judge, self.allows_near_ties)
        if request.replay:
            return replay(runner, request.questions)
        # Only here, because it imports hypothesis: a tenth of the time of a small check.
        from snapshot_tool.explore.draw import explore

        count = request.explore or 0
        with progress.stage("derived questions", count) as steps:

            def on_question(question: object) -> None:
                progress.now(str(question))
                next(steps)

            return explore(
                runner,
                count=count,
                seed=request.seed,
                phases=request.phases,
                on_question=on_question,
            )

    def localise(self, results: tuple[Result, ...]) -> Localisation | None:
        """Return the module in which the first divergence of the results arises, or None.

        With --localise, the modules of the first case are compared if nothing differs. A fault of
        preprocessing is not in a module.
        """
        first = first_divergence(results)
        if not results or (first is None and not self.request.localise):
            return None
        if first is not None and first.phase is Phase.PREPROCESSING:
            return None
        name = first.case if first else results[0].case
        return localise_case(
            self.candidate,
            self.golden,
            name,
            dtype=self.judge.dtype,
            # Modules run eagerly while they are compared, so none shows what a compiler did.
            failed=first is not None
            and first.phase is not Phase.GENERATE
            and self.request.paths[0].kind is not PathKind.COMPILED,
        )

    @property
    def judges_model(self) -> bool:
        """Whether weights and single modules are judged: a replay runs only its questions."""
        return self.request.needs_weights and not self.request.replay

    def compare_weights(
        self, results: tuple[Result, ...] = (), localisation: Localisation | None = None
    ) -> WeightReport | None:
        """Compare the candidate's current weights with the checkpoint's.

        results, localisation: used to find the unset weights that caused NaN.
        """
        if not self.judges_model or not self.candidate.supports("weights"):
            return None
        unset = tuple(self.candidate.unset_weights())
        harmful = find_harmful(unset, results, localisation)
        if self._distributed:
            report = self._distributed.compare_weights(self.candidate.weights)
        else:
            report = compare_weights(self.candidate.weights())
        return replace(report, unset=unset, harmful=harmful)

    def graft(self, results: tuple[Result, ...]) -> Graft:
        """Replace the output of the module of --graft by the recorded one.

        The oracle judges if there is one, because in a small case a fault may be within the table.
        """
        judge = self.judge
        if ORACLE in self.golden.manifest.files:
            judge = Judge(self.golden, judge.dtype, Rule.ORACLE)
        return graft_module(
            self.request.graft,
            self.candidate,
            self.golden,
            results,
            run=lambda case, phase: self.run_once(case, phase, judge=judge),
            dtype=judge.dtype,
        )

    @property
    def info(self) -> CandidateInfo:
        """The implementation; by default its name in the request."""
        if self.candidate.supports("info"):
            return self.candidate.info()
        return CandidateInfo(self.request.candidate)

    def transformers(self) -> Transformers:
        """Return whether transformers is installed, and whether the candidate imported it."""
        imported = not self._transformers_before and "transformers" in sys.modules
        return Transformers(is_importable("transformers"), imported)

    def environment(self) -> dict[str, str]:
        """Return versions and settings of this process."""
        return {
            **describe_machine(),
            **package_versions(),
            **self.settings,
            **self.golden.family.environment,
            "device": device_name(self.request.device),
        }


class AnswersSession(Session):
    """Answers from elsewhere in place of a candidate: nothing runs, and tensors may be missing."""

    def __init__(self, request: CheckRequest, golden: Golden, answers: Answers) -> None:
        computed = answers.header.dtype
        judge = choose_judge(request, golden, computed if computed in ORACLE_DTYPES else None)
        super().__init__(request, golden, answers, judge=judge)
        self._answers = answers
        self.device = answers.header.device
        self._explainer = replace(self._explainer, runs=False)

    def run(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Judge the answers of one phase; equal bits are no sign that they were copied."""
        self._answers.case = case.name
        return self.run_once(case, phase)

    def _judge(
        self, judge: Judge, case: CaseEntry, phase: Phase, pair: Pair, seconds: float
    ) -> Result:
        if pair.actual is None:
            reason = pair.note or "not answered"
            return Result(case.name, phase, pair.tensor, Verdict.SKIP, reason)
        return super()._judge(judge, case, phase, pair, seconds)

    def environment(self) -> dict[str, str]:
        """Return only the device."""
        return {"device": self.device}
