"""Checking a candidate against a golden set, case by case and phase by phase."""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from snapshot_tool.candidates import FMS, load_candidate
from snapshot_tool.case_localisation import localise_case
from snapshot_tool.core.errors import GoldenNotFound, PhaseUnsupported, SnapError, UsageError
from snapshot_tool.core.exploration import Exploration
from snapshot_tool.core.graft import Graft
from snapshot_tool.core.interfaces import (
    Candidate,
    CandidateInfo,
    CandidateRequest,
    Progress,
    Serving,
)
from snapshot_tool.core.localisation import Localisation
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.questions import Question
from snapshot_tool.core.report import CheckReport, GoldenIdentity, Transformers
from snapshot_tool.core.results import Result, Verdict, first_divergence
from snapshot_tool.core.shard import Shard, Share
from snapshot_tool.core.tolerance import Rule, Tolerance
from snapshot_tool.core.weights import WeightReport
from snapshot_tool.determinism import make_deterministic
from snapshot_tool.devices import require_device
from snapshot_tool.environment import describe_machine, device_name, is_importable, package_versions
from snapshot_tool.exploration.probe import require_worked_out
from snapshot_tool.generation import GenerationExplainer
from snapshot_tool.golden_choice import GoldenChoice, open_checkpoint_of
from snapshot_tool.grafting import graft_module
from snapshot_tool.guards.blame import require_candidates_fault
from snapshot_tool.guards.guarded import Guarded
from snapshot_tool.guards.runs import run_guarded
from snapshot_tool.guards.surroundings import differing_surroundings
from snapshot_tool.judge import Judge
from snapshot_tool.phase_runs import OnePass, Pair, run_phase
from snapshot_tool.store.golden import Golden
from snapshot_tool.store.layout import INPUTS, ORACLE, phase_file
from snapshot_tool.store.manifest import CaseEntry, Manifest
from snapshot_tool.weights import compare_weights


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """What to check. None: whatever the golden says, or anything that is there."""

    goldens: Path
    candidate: str = FMS
    fms_path: Path | None = None
    checkpoint: str | None = None
    revision: str | None = None
    device: str = "cpu"
    golden_device: str | None = None
    phases: tuple[Phase, ...] = PHASES
    case: str = "*"
    localise: bool = False
    quick: bool = False
    atol: float | None = None
    rtol: float | None = None
    dtype: str | None = None
    rule: Rule | None = None
    allow_near_ties: bool = False
    graft: str = ""
    required: tuple[Phase, ...] = ()
    repeat: int = 1
    explore: int = 0
    seed: int | None = None
    replay: tuple[Question, ...] = ()
    share: Share | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether the model as a whole is asked; a replay asks what it names and nothing else."""
        return not self.replay and self.phases != (Phase.PREPROCESSING,)

    @property
    def golden_choice(self) -> GoldenChoice:
        """Which golden set is meant."""
        return GoldenChoice(
            self.goldens,
            self.checkpoint,
            self.revision,
            self.device,
            self.golden_device,
            self.dtype,
        )


@dataclass(frozen=True, slots=True)
class Checker:
    """A loaded candidate beside its golden set: runs any phase of any case, on its own.

    Args:
        request: what was asked for.
        golden: the set to check against.
        candidate: the implementation under test.
        checkpoint: the folder of its weights; where given, tokens are told as text.
        settings: what was set for determinism.
        imported_before: whether transformers was imported before the candidate was loaded.
        reuse: what serves between the phases of a case; None: every phase computes everything.
        without_cache: the case whose forward runs without the cache that generate begins with.
        one_pass: what forward and generate share with --quick.
    """

    request: CheckRequest
    golden: Golden
    candidate: Candidate
    checkpoint: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    imported_before: bool = False
    reuse: Serving | None = None
    without_cache: str = ""
    one_pass: OnePass = field(default_factory=OnePass)

    @property
    def info(self) -> CandidateInfo:
        """What the candidate says of itself; `info` is a courtesy, not a phase."""
        info = getattr(self.candidate, "info", None)
        return info() if callable(info) else CandidateInfo(self.request.candidate)

    def run(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Return a result for every recorded tensor of one phase of one case."""
        before = self._modules_run
        results = self.run_unasked(case, phase)
        # Equal tokens are the rule where a model ran; equal numbers, to the last bit, are not.
        doubted = phase is not Phase.GENERATE or self._modules_run == before
        if not doubted or self.judge.dtype != self.golden.manifest.dtype:
            return results
        return require_worked_out(
            self.candidate, self.golden, results, phase=phase, tolerance_of=self.tolerance_of
        )

    def run_unasked(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Return the results of a phase without a doubt about those that equal the golden."""

        def once() -> list[Result]:
            return _check_phase(self, case, phase)

        if not isinstance(self.candidate, Guarded):
            return once()
        with self._serving(case):
            return run_guarded(self.candidate, phase, once, times=self.request.repeat)

    def _serving(self, case: CaseEntry) -> AbstractContextManager[None]:
        # What is asked again and again is to be computed again and again.
        if self.reuse is None or self.request.repeat > 1:
            return nullcontext()
        generates = not self.request.quick and Phase.GENERATE in self.request.phases
        return self.reuse.serving(prefill=generates and case.name != self.without_cache)

    def tolerance_of(self, case: str, phase: Phase) -> Tolerance:
        """Return what a phase of a case, by its name, may differ by."""
        return self.judge.tolerance(self.golden.case(case), phase)

    @property
    def _modules_run(self) -> int:
        return self.candidate.modules_run if isinstance(self.candidate, Guarded) else 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the candidate did so far besides answering."""
        return self.candidate.warnings if isinstance(self.candidate, Guarded) else ()

    def explore(self, cases: list[CaseEntry], progress: Progress) -> Exploration | None:
        """Ask the derived questions that the request gives, or as many as it wants drawn."""
        return _explore(self, cases, progress)

    def compare_weights(self) -> WeightReport | None:
        """Compare the candidate's weights with the checkpoint's, as they are now."""
        show = getattr(self.candidate, "weights", None)
        if not callable(show) or not self.request.needs_weights:
            return None
        return compare_weights(show())

    def localise(self, results: tuple[Result, ...]) -> Localisation | None:
        """Name the module in which the first divergence of these results arises."""
        return _localise(self, results)

    def graft(self, results: tuple[Result, ...]) -> Graft | None:
        """Put the golden's output in the place of the module that the request names."""
        if not self.request.graft:
            return None
        checker = replace(self, reuse=None)
        if ORACLE in self.golden.manifest.files:
            # On a small case a fault may stay within the table.
            checker = replace(checker, request=replace(self.request, rule=Rule.ORACLE))
        return graft_module(
            self.request.graft,
            self.candidate,
            self.golden,
            results,
            # A module that returns the golden's output is wrong on every other input.
            run=checker.run_unasked,
            dtype=self.judge.dtype,
        )

    @property
    def judge(self) -> Judge:
        """By what answers are judged."""
        dtype, rule = choose_rule(self.request, self.golden)
        return Judge(self.golden, dtype, rule, self.request.atol, self.request.rtol)

    def judge_pair(self, case: CaseEntry, phase: Phase, pair: Pair, seconds: float) -> Result:
        """Return the verdict on one tensor; a generation that differs is explained."""
        judge = self.judge
        result = judge.judge(case, phase, pair, seconds=seconds)
        if phase is not Phase.GENERATE:
            return result
        explainer = GenerationExplainer(
            self.golden,
            self.checkpoint,
            judge.dtype,
            allow_near_ties=self.request.allow_near_ties,
        )
        return explainer.explain(result, pair.actual, self.candidate)


def open_checker(request: CheckRequest, golden: Golden, progress: Progress) -> Checker:
    """Load the candidate from the checkpoint that the golden was recorded from."""
    require_device(request.device)
    dtype, _ = choose_rule(request, golden)
    checkpoint = open_checkpoint_of(golden, request.checkpoint)
    imported_before = "transformers" in sys.modules
    settings = make_deterministic(golden.manifest.seed, strict=False)
    with progress.stage("loading the candidate", 1) as steps:
        candidate = load_candidate(
            request.candidate,
            CandidateRequest(
                checkpoint.folder,
                golden.manifest.checkpoint.config,
                request.device,
                dtype,
            ),
            fms_path=request.fms_path,
        )
        next(steps)
    guarded = Guarded(candidate, dtype=dtype, settings=settings)
    reuse = getattr(candidate, "reuse", None)
    return Checker(
        request,
        golden,
        cast("Candidate", guarded),
        checkpoint.folder,
        settings,
        imported_before,
        reuse=reuse() if callable(reuse) else None,
        without_cache=_shortest_case(golden.manifest, request),
    )


def _shortest_case(manifest: Manifest, request: CheckRequest) -> str:
    """Return the case of the fewest tokens; "" where one case is all that is checked.

    A port may be right with a cache and wrong without: one case at least is to tell.
    """
    cases = select_cases(manifest, request)
    ids = manifest.files[INPUTS].tensors

    def tokens(case: CaseEntry) -> int:
        entry = ids.get(f"{case.name}/input_ids")
        return entry.shape[-1] if entry else 0

    return min(cases, key=tokens).name if len(cases) > 1 else ""


def choose_rule(request: CheckRequest, golden: Golden) -> tuple[str, Rule]:
    """Return the candidate's dtype and what judges it.

    The table of tolerances is made for float32, in the golden as in the candidate: elsewhere the
    oracle judges.
    """
    own = golden.manifest.dtype
    dtype = request.dtype or own
    if dtype != own and _asks_for_logits(request):
        raise UsageError(
            f"derived questions of all phases but generate are judged in the golden's own {own}",
            "leave out --dtype, or ask with: --phase generate",
        )
    rule = request.rule or (Rule.TABLE if dtype == own == "float32" else Rule.ORACLE)
    needed = rule is Rule.ORACLE or request.allow_near_ties
    if needed and ORACLE not in golden.manifest.files:
        use = f"judging {dtype}" if rule is Rule.ORACLE else "--allow-near-ties"
        raise GoldenNotFound(
            f"{golden.manifest.title} has no oracle, which is needed for {use}",
            "record it with: snap record ... --update --reason TEXT --oracle",
        )
    return dtype, rule


def _asks_for_logits(request: CheckRequest) -> bool:
    """Tell whether a derived question is about anything but tokens, which have no tolerance."""
    asked = {question.phase for question in request.replay}
    if request.explore and not request.replay:
        asked = set(request.phases)
    return bool(asked - {Phase.GENERATE})


def check(request: CheckRequest, progress: Progress) -> CheckReport:
    """Run the candidate on the golden's inputs and judge every recorded tensor."""
    require_device(request.device)
    golden = request.golden_choice.open()
    cases = select_cases(golden.manifest, request)
    checker = open_checker(request, golden, progress)
    # A replay asks what it names and nothing else.
    results = () if request.replay else tuple(check_cases(checker, cases, progress))
    exploration = checker.explore(cases, progress)
    localisation = checker.localise(results)
    # Last: what changes a weight while it runs is then seen as well.
    weights = checker.compare_weights()
    transformers = Transformers(
        is_importable("transformers"),
        not checker.imported_before and "transformers" in sys.modules,
    )
    environment = {
        **describe_machine(),
        **package_versions(),
        **checker.settings,
        "device": device_name(request.device),
    }
    return CheckReport(
        golden=_identity(golden),
        device=request.device,
        candidate=checker.info,
        transformers=transformers,
        quick=request.quick,
        environment=environment,
        dtype=checker.judge.dtype,
        rule=checker.judge.rule,
        near_ties_allowed=request.allow_near_ties,
        graft=checker.graft(results),
        results=results,
        unmet=_unmet(results + (exploration.results if exploration else ()), request.required),
        localisation=localisation,
        exploration=exploration,
        weights=weights,
        warnings=checker.warnings,
        surroundings=differing_surroundings(golden.manifest.environment, environment),
        shard=_shard(golden.manifest, request),
    )


def _identity(golden: Golden) -> GoldenIdentity:
    manifest = golden.manifest
    return GoldenIdentity(
        manifest.checkpoint.name,
        manifest.checkpoint.revision,
        manifest.device,
        manifest.dtype,
        manifest.golden_version,
        str(golden.folder),
    )


def select_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the share asked for of the cases that `--case` names; raise UsageError for none."""
    cases = _matching_cases(manifest, request)
    share = request.share
    if share is None:
        return cases
    if request.replay:
        raise UsageError("--replay asks what it names, of no share", "leave out --shard")
    if share.count > len(cases):
        raise UsageError(
            f"--shard {share}: there are {len(cases)} cases", f"use at most {len(cases)} shards"
        )
    return list(share.of(cases))


def _matching_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    names = [case.name for case in manifest.cases]
    chosen = set(fnmatch.filter(names, request.case))
    if not chosen:
        raise UsageError(
            f"--case {request.case} matches none of the {len(names)} cases",
            f"there are: {', '.join(names)}",
        )
    return [case for case in manifest.cases if case.name in chosen]


def _shard(manifest: Manifest, request: CheckRequest) -> Shard | None:
    """Return which share this is, with all that another one must have in common with it."""
    if request.share is None:
        return None
    asked = {
        "--case": request.case,
        "--phase": " ".join(request.phases),
        "--require": " ".join(request.required),
        "--atol": str(request.atol),
        "--rtol": str(request.rtol),
        "--repeat": str(request.repeat),
        "--explore": str(request.explore),
        "--seed": str(request.seed),
        "--graft": request.graft,
    }
    cases = tuple(case.name for case in select_cases(manifest, request))
    return Shard(request.share, cases, len(_matching_cases(manifest, request)), asked)


def check_cases(checker: Checker, cases: list[CaseEntry], progress: Progress) -> Iterator[Result]:
    """Yield a result for every tensor of the selected cases, running each phase as it comes."""
    request = checker.request
    pairs = [
        (case, phase)
        for case in cases
        for phase in PHASES
        if phase in request.phases and phase in case.phases
    ]
    with progress.stage("checking", len(pairs)) as steps:
        for case, phase in pairs:
            progress.now(f"{case.name} / {phase.value}")
            yield from checker.run(case, phase)
            next(steps)
    for phase in request.phases:
        if phase not in {compared for _, compared in pairs}:
            # An empty phase must be seen: it is no pass.
            yield Result(request.case, phase, "", Verdict.SKIP, _why_nothing(checker.golden, phase))


def _why_nothing(golden: Golden, phase: Phase) -> str:
    if phase not in golden.manifest.tolerances:
        return f"the family {golden.manifest.checkpoint.family} has no such phase"
    return "no selected case has anything to compare"


def _check_phase(checker: Checker, case: CaseEntry, phase: Phase) -> list[Result]:
    """Run one phase; whatever the candidate raises is this phase's error alone."""
    import torch

    candidate, golden = checker.candidate, checker.golden
    if phase_file(phase) not in golden.manifest.files:
        reason = "the golden set was recorded without this phase"
        return [Result(case.name, phase, "", Verdict.SKIP, reason)]
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            pairs = _run_phase(checker, case, phase)
        seconds = time.perf_counter() - began
        results = [checker.judge_pair(case, phase, pair, seconds) for pair in pairs]
    except PhaseUnsupported as unsupported:
        return [Result(case.name, phase, "", Verdict.SKIP, str(unsupported))]
    except SnapError:
        raise
    except Exception as error:  # the candidate's code may raise anything
        require_candidates_fault(candidate, error, case=case.name, phase=phase)
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        seconds = time.perf_counter() - began
        return [Result(case.name, phase, "", Verdict.ERROR, reason, seconds=seconds)]
    return results or [Result(case.name, phase, "", Verdict.FAIL, "nothing was compared")]


def _run_phase(checker: Checker, case: CaseEntry, phase: Phase) -> list[Pair]:
    """Run one phase; with --quick forward and generate share one pass."""
    candidate, golden, request = checker.candidate, checker.golden, checker.request
    if request.quick and phase is Phase.GENERATE:
        return checker.one_pass.generate(candidate, golden, case.name)
    both = Phase.GENERATE in case.phases and Phase.GENERATE in request.phases
    if request.quick and phase is Phase.FORWARD and both:
        return checker.one_pass.forward(candidate, golden, case.name)
    return run_phase(candidate, golden, case.name, phase)


def _explore(checker: Checker, cases: list[CaseEntry], progress: Progress) -> Exploration | None:
    request, golden = checker.request, checker.golden
    if not request.replay and not request.explore:
        return None
    # It brings hypothesis, which takes its time to import, and no other check needs it.
    from snapshot_tool.exploration.explore import explore, replay

    if request.replay:
        return replay(
            checker.candidate,
            golden,
            request.replay,
            tolerance_of=checker.tolerance_of,
            dtype=checker.judge.dtype,
            allow_near_ties=request.allow_near_ties,
        )
    with progress.stage("asking", request.explore) as steps:

        def on_question(question: Question) -> None:
            progress.now(str(question))
            next(steps)

        return explore(
            checker.candidate,
            golden,
            count=request.explore,
            seed=request.seed,
            cases=[case.name for case in cases],
            phases=request.phases,
            tolerance_of=checker.tolerance_of,
            dtype=checker.judge.dtype,
            allow_near_ties=request.allow_near_ties,
            on_question=on_question,
        )


def _localise(checker: Checker, results: tuple[Result, ...]) -> Localisation | None:
    """Look into the candidate on the first case that differs, or on the first one if asked to.

    A fault of preprocessing is in no module.
    """
    first = first_divergence(results)
    if not results or (first is None and not checker.request.localise):
        return None
    if first is not None and first.phase is Phase.PREPROCESSING:
        return None
    name = first.case if first else results[0].case
    return localise_case(checker.candidate, checker.golden, name, dtype=checker.judge.dtype)


def _unmet(results: tuple[Result, ...], required: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Return the required phases that were skipped somewhere, or did not pass anywhere."""
    unmet = []
    for phase in required:
        verdicts = {result.verdict for result in results if result.phase is phase}
        if Verdict.SKIP in verdicts or not verdicts:
            unmet.append(phase)
    return tuple(unmet)
