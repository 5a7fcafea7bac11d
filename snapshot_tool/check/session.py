"""Check a candidate against a golden set, case by case and phase by phase."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from snapshot_tool.base import __version__
from snapshot_tool.base.environment import (
    describe_machine,
    device_name,
    is_importable,
    make_deterministic,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import (
    PhaseUnsupported,
    SnapError,
    UsageError,
    describe_error,
    place_of_error,
    traceback_of,
)
from snapshot_tool.base.localisation import Localisation, ModuleTrials
from snapshot_tool.base.protocol import (
    EAGER,
    PHASES,
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
from snapshot_tool.base.report import (
    CheckReport,
    Coverage,
    Exploration,
    GoldenIdentity,
    Graft,
    Transformers,
    WeightReport,
    find_harmful,
    name_harmful,
    unmet_requirements,
)
from snapshot_tool.base.results import Result, Verdict, first_divergence
from snapshot_tool.base.tolerance import HALF_DTYPES, ORACLE_DTYPES, Rule
from snapshot_tool.candidates import load_candidate
from snapshot_tool.candidates.answers import Answers, open_answers
from snapshot_tool.candidates.distributed import DistributedCandidate
from snapshot_tool.check.copied import fail_if_copied
from snapshot_tool.check.last_failed import keep_failed, read_failed
from snapshot_tool.check.localise import (
    can_graft,
    graft_module,
    isolate_modules,
    localise_case,
    probe_modules,
)
from snapshot_tool.check.request import (
    CheckRequest,
    choose_judge,
    matching_cases,
    require_phases,
    select_cases,
    shard_of,
)
from snapshot_tool.explore.questions import Question
from snapshot_tool.explore.run import explore, replay
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.coverage import coverage
from snapshot_tool.goldens.find import open_checkpoint_of
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import ORACLE, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, environment_differences
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.judge import Judge
from snapshot_tool.judge.phases import OnePass, Pair, RecordedCase, run_phase
from snapshot_tool.judge.watch import WatchedCandidate, require_raised_by_candidate
from snapshot_tool.numerics.compare import compare_weights

# By case, phase and tensor.
Outputs = dict[tuple[str, Phase, str], Pair]


def check(
    request: CheckRequest, progress: Progress, *, outputs: Outputs | None = None
) -> CheckReport:
    """Run the candidate on the recorded inputs and judge every recorded tensor.

    outputs: filled with the outputs of forward and generate, beside the golden's.
    """
    require_device(request.device)
    date, began = datetime.now(UTC), time.perf_counter()
    golden = request.golden_choice.open()
    require_phases(golden.manifest, request)
    cases = select_cases(golden.manifest, request)
    session = open_session(request, golden, progress)
    session.outputs = outputs
    found: list[Result] = []
    ran: list[tuple[str, Phase]] = []
    left_out: tuple[str, ...] = ()
    if not request.replay:  # a replay runs only its questions
        runs = [(c, p) for c in cases for p in PHASES if p in request.phases and p in c.phases]
        chosen = _choose_runs(golden, request, runs)
        with progress.stage("checking", len(chosen)) as steps:
            for case, phase in chosen:
                progress.now(f"{case.name} / {phase.value}")
                found += session.run(case, phase)
                ran.append((case.name, phase))
                next(steps)
                if request.fail_fast and first_divergence(tuple(found)):
                    break
        if not request.answers:
            keep_failed(golden.folder, ran, found)
        if len(ran) < len(runs):
            why = "--fail-fast" if request.fail_fast else "--last-failed"
            left_out = (f"{len(runs) - len(ran)} of {len(runs)} runs were left out ({why})",)
        found += _skips_of_empty_phases(golden, request, {phase for _, phase in runs})
    results = tuple(found)
    exploration = session.explore(cases, progress)
    localisation = session.localise(results)
    # Last, to detect weights that change while the candidate runs.
    weights = session.compare_weights(results, localisation)
    results = name_harmful(results, (weights.harmful if weights else ()) or ())
    graft = session.graft(results) if request.graft else None
    isolated = session.isolate() if request.isolate else None
    probes = session.probe()
    environment = session.environment()
    manifest, reached = golden.manifest, _coverage(golden, request)
    report = CheckReport(
        snap=__version__,
        date=date.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began, 3),
        command=request.command,
        golden=GoldenIdentity(
            manifest.checkpoint.name,
            manifest.checkpoint.revision,
            manifest.device,
            manifest.dtype,
            manifest.golden_version,
            str(golden.folder),
        ),
        device=session.device,
        candidate=session.info,
        answered=bool(request.answers),
        transformers=session.transformers(),
        quick=request.quick,
        environment=environment,
        dtype=session.judge.dtype,
        rule=session.judge.rule,
        near_ties_allowed=session.allows_near_ties,
        graft=graft,
        probes=probes,
        isolated=isolated,
        results=results,
        coverage=reached,
        unmet=unmet_requirements(
            _of_whole_phases(results) + (exploration.results if exploration else ()),
            reached,
            request.required,
        ),
        localisation=localisation,
        exploration=exploration,
        weights=weights,
        warnings=(*left_out, *manifest.reference_warnings, *session.candidate.warnings),
        environment_differences=environment_differences(manifest.environment, environment),
        shard=shard_of(manifest, request),
        path=str(request.paths[0]),
    )
    return replace(report, next_commands=_next_commands(session, report))


def _next_commands(session: Session, report: CheckReport) -> tuple[str, ...]:
    """Return commands after a failure: to test the module, and to find the commit."""
    request = session.request
    commands: list[str] = []
    if report.verdict not in (Verdict.FAIL, Verdict.ERROR):
        return ()
    module = report.localisation.module if report.localisation else ""
    raises = report.divergence is not None and report.divergence.verdict is Verdict.ERROR
    if raises or request.graft or request.paths != (EAGER,):
        module = ""
    if module and can_graft(session.candidate, session.golden, module):
        commands.append(f"{request.command} --graft {module}")
    if request.fms_path and report.candidate.commit:
        path = shlex.quote(str(request.fms_path))
        commands.append(f"snap bisect --fms-path {path} --good COMMIT --bad HEAD")
    return tuple(commands)


def open_session(request: CheckRequest, golden: Golden, progress: Progress) -> Session:
    """Verify the checkpoint of the golden set, then load the candidate from it.

    No code of the candidate runs before the verification. Answers need no checkpoint.
    """
    require_device(request.device)
    if request.answers:
        answers = open_answers(Path(request.answers), golden)
        computed = answers.header.dtype
        judge = choose_judge(request, golden, computed if computed in ORACLE_DTYPES else None)
        keep_outputs = answers.output_cache()
        return Session(request, golden, answers, judge=judge, keep_outputs=keep_outputs)
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


class Session:
    """A loaded candidate and its golden set; runs any phase of any case.

    Args:
        request: the options of the check.
        golden: the golden set.
        candidate: the implementation under test; it is watched.
        judge: compares its outputs; None: as the request says.
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
        self.answers = candidate.header if isinstance(candidate, Answers) else None
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
        self._explainer = GenerationExplainer(
            golden,
            checkpoint,
            dtype,
            allow_near_ties=self.allows_near_ties,
            runs=self.answers is None,
        )
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
        if self.answers:
            return results
        return fail_if_copied(
            candidate,
            self.golden,
            results,
            phase=phase,
            judge=self.judge,
            ran=in_one_pass or candidate.modules_run > ran_before,
            run_again=lambda: self.run_once(case, phase),
        )

    def run_once(  # noqa: C901 - one phase, read from top to bottom
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
            self._case = RecordedCase.read(self.golden, case.name)
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
                if pair.actual is None and self.answers:
                    reason = pair.note or "not answered"
                    results.append(Result(case.name, phase, pair.tensor, Verdict.SKIP, reason))
                    continue
                result = judge.judge(case, phase, pair, seconds=seconds)
                if pair.tensor == parts.TOKEN_IDS:
                    result = self._explainer.explain(result, pair.actual, candidate)
                results.append(result)
        except PhaseUnsupported as unsupported:
            return [Result(case.name, phase, "", Verdict.SKIP, str(unsupported))]
        except SnapError:
            raise
        except Exception as error:  # the candidate's code may raise anything
            require_raised_by_candidate(error, case=case.name, phase=phase)
            return [
                Result(
                    case.name,
                    phase,
                    "",
                    Verdict.ERROR,
                    describe_error(error),
                    seconds=round(time.perf_counter() - began, 6),
                    place=place_of_error(error),
                    traceback=traceback_of(error),
                )
            ]
        return results or [Result(case.name, phase, "", Verdict.FAIL, "nothing was compared")]

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
        if request.replay:
            return replay(
                self.candidate,
                self.golden,
                request.questions,
                judge=self.judge,
                allow_near_ties=self.allows_near_ties,
            )
        if not request.explore:
            return None
        with progress.stage("derived questions", request.explore) as steps:

            def on_question(question: Question) -> None:
                progress.now(str(question))
                next(steps)

            return explore(
                self.candidate,
                self.golden,
                count=request.explore,
                seed=request.seed,
                cases=[case.name for case in cases],
                phases=request.phases,
                judge=self.judge,
                allow_near_ties=self.allows_near_ties,
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
    def _judges_model(self) -> bool:
        """Whether weights and single modules are judged: a replay runs only its questions."""
        return self.request.needs_weights and not self.request.replay

    def compare_weights(
        self, results: tuple[Result, ...] = (), localisation: Localisation | None = None
    ) -> WeightReport | None:
        """Compare the candidate's current weights with the checkpoint's.

        results, localisation: used to find the unset weights that caused NaN.
        """
        if not self._judges_model or not self.candidate.supports("weights"):
            return None
        unset = tuple(self.candidate.unset_weights())
        harmful = find_harmful(unset, results, localisation)
        if self._distributed:
            report = self._distributed.compare_weights(self.candidate.weights)
        else:
            report = compare_weights(self.candidate.weights())
        return replace(report, unset=unset, harmful=harmful)

    def probe(self) -> ModuleTrials | None:
        """Run the candidate's modules one by one on the inputs of the reference's."""
        if not self._judges_model:
            return None
        return probe_modules(self.candidate, self.golden, dtype=self.judge.dtype)

    def isolate(self) -> ModuleTrials:
        """Run every module on the reference's own input."""
        return isolate_modules(self.candidate, self.golden, dtype=self.judge.dtype)

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
    def device(self) -> str:
        """Where the candidate runs, or the answers were computed."""
        return self.answers.device if self.answers else self.request.device

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
        """Return versions and settings of this process; of answers, only their device."""
        if self.answers:
            return {"device": self.answers.device}
        return {
            **describe_machine(),
            **package_versions(),
            **self.settings,
            **family_of(self.golden.manifest.checkpoint.family).environment,
            "device": device_name(self.request.device),
        }


def _of_whole_phases(results: tuple[Result, ...]) -> tuple[Result, ...]:
    """Return results without single tensors that were skipped: others of the phase were judged."""
    return tuple(r for r in results if r.verdict is not Verdict.SKIP or not r.tensor)


def _choose_runs(
    golden: Golden, request: CheckRequest, runs: list[tuple[CaseEntry, Phase]]
) -> list[tuple[CaseEntry, Phase]]:
    """Return the runs that failed last time if --last-failed is set and there are any, else all."""
    if not request.last_failed:
        return runs
    failed = read_failed(golden.folder)
    return [(case, phase) for case, phase in runs if (case.name, phase) in failed] or runs


def _skips_of_empty_phases(
    golden: Golden, request: CheckRequest, compared: set[Phase]
) -> list[Result]:
    """Return a skip for each requested phase that no case has.

    A phase that the family does not have is skipped only if the request names it.
    """
    skips = []
    for phase in request.phases:
        lacking = phase not in golden.manifest.tolerances
        if phase in compared or (lacking and phase not in request.phase):
            continue
        reason = "no selected case has this phase"
        if lacking:
            reason = f"the family {golden.manifest.checkpoint.family} has no such phase"
        skips.append(Result(request.case_text, phase, "", Verdict.SKIP, reason))
    return skips


def _coverage(golden: Golden, request: CheckRequest) -> tuple[Coverage, ...]:
    """Return the coverage of the cases, from the open files: the set may have been replaced."""
    cases = matching_cases(golden.manifest, request)
    generated = {
        case.name: golden.tensor(case.name, Phase.GENERATE, parts.TOKEN_IDS).tolist()
        for case in cases
        if parts.TOKEN_IDS in golden.tensor_names(case.name, Phase.GENERATE)
    }
    return coverage(golden.manifest, cases, generated)
