"""Checking a candidate against a golden set, case by case and phase by phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from snapshot_tool.base.environment import (
    describe_machine,
    device_name,
    is_importable,
    make_deterministic,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import EndedProcess, PhaseUnsupported, SnapError
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import CandidateInfo, CandidateRequest, Progress, Serving
from snapshot_tool.base.questions import Question
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
from snapshot_tool.base.tolerance import HALF_DTYPES, Rule
from snapshot_tool.candidates import load_candidate
from snapshot_tool.check.copied import require_worked_out
from snapshot_tool.check.localise import graft_module, localise_case
from snapshot_tool.check.request import (
    CheckRequest,
    choose_rule,
    matching_cases,
    select_cases,
    shard_of,
)
from snapshot_tool.explore.explore import explore, replay
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.choice import open_checkpoint_of
from snapshot_tool.goldens.coverage import coverage
from snapshot_tool.goldens.environment import differing_surroundings
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import ORACLE, phase_file
from snapshot_tool.goldens.manifest import CaseEntry
from snapshot_tool.judge.generation import GenerationExplainer
from snapshot_tool.judge.judge import Judge, compare_weights
from snapshot_tool.judge.phases import OnePass, Pair, RecordedCase, read_case, run_phase
from snapshot_tool.judge.watch import Guarded, require_candidates_fault, run_guarded


def check(request: CheckRequest, progress: Progress) -> CheckReport:
    """Run the candidate on the golden's inputs and judge every recorded tensor."""
    require_device(request.device)
    golden = request.golden_choice.open()
    cases = select_cases(golden.manifest, request)
    session = open_session(request, golden, progress)
    # A replay asks what it names and nothing else.
    results = () if request.replay else tuple(session.check_cases(cases, progress))
    exploration = session.explore(cases, progress)
    localisation = session.localise(results)
    # Last: a weight that changes while the candidate runs is seen, too.
    weights = session.compare_weights(results, localisation)
    results = name_harmful(results, (weights.harmful if weights else ()) or ())
    graft = session.graft(results) if request.graft else None
    environment = session.environment()
    reached = _coverage(golden, matching_cases(golden.manifest, request))
    return CheckReport(
        golden=_identity(golden),
        device=request.device,
        candidate=session.info,
        transformers=session.transformers(),
        quick=request.quick,
        environment=environment,
        dtype=session.judge.dtype,
        rule=session.judge.rule,
        near_ties_allowed=session.allows_near_ties,
        graft=graft,
        results=results,
        coverage=reached,
        unmet=unmet_requirements(
            results + (exploration.results if exploration else ()), reached, request.required
        ),
        localisation=localisation,
        exploration=exploration,
        weights=weights,
        warnings=(*golden.manifest.reference_warnings, *session.warnings),
        environment_differences=differing_surroundings(golden.manifest.environment, environment),
        shard=shard_of(golden.manifest, request),
    )


def open_session(request: CheckRequest, golden: Golden, progress: Progress) -> Session:
    """Load the candidate from the checkpoint that the golden was recorded from.

    The checkpoint is verified first: no code of the candidate runs before it.
    """
    require_device(request.device)
    dtype, _ = choose_rule(request, golden)
    checkpoint = open_checkpoint_of(golden, request.checkpoint)
    transformers_before = "transformers" in sys.modules
    settings = make_deterministic(golden.manifest.seed, strict=False)
    with progress.stage("loading the candidate", 1) as steps:
        candidate = load_candidate(
            request.candidate,
            CandidateRequest(
                # Absolute: the candidate may change the working folder.
                checkpoint.folder.absolute(),
                golden.manifest.checkpoint.config,
                request.device,
                dtype,
                request.loading,
                golden.manifest.checkpoint.changed_fields,
                frozenset(golden.manifest.checkpoint.unused_weights),
            ),
            fms_path=request.fms_path,
        )
        next(steps)
    output_cache = getattr(candidate, "output_cache", None)
    return Session(
        request,
        golden,
        Guarded(candidate, dtype=dtype, settings=settings),
        checkpoint=checkpoint.folder,
        settings=settings,
        transformers_before=transformers_before,
        cache=output_cache() if callable(output_cache) else None,
    )


class Session:
    """A loaded candidate beside its golden set: runs any phase of any case, on its own.

    Args:
        request: what was asked for.
        golden: the set to check against.
        candidate: the implementation under test.
        checkpoint: the folder of its weights; None: tokens are shown without their text.
        settings: what was set for determinism.
        transformers_before: whether transformers was imported before the candidate was loaded.
        cache: what is kept between the phases of a case; None: every phase computes everything.
    """

    def __init__(
        self,
        request: CheckRequest,
        golden: Golden,
        candidate: Any,
        *,
        checkpoint: Path | None = None,
        settings: Mapping[str, str] | None = None,
        transformers_before: bool = False,
        cache: Serving | None = None,
    ) -> None:
        self.request = request
        self.golden = golden
        self.candidate = candidate
        self.settings = dict(settings or {})
        dtype, rule = choose_rule(request, golden)
        self.judge = Judge(golden, dtype, rule, request.atol, request.rtol)
        # In half precision rounding could often have chosen: a right port may take another token.
        half = not {golden.manifest.dtype, dtype}.isdisjoint(HALF_DTYPES)
        self.allows_near_ties = request.allow_near_ties or half
        self._explainer = GenerationExplainer(
            golden, checkpoint, dtype, allow_near_ties=self.allows_near_ties
        )
        self._transformers_before = transformers_before
        self._cache = cache
        self._case: RecordedCase | None = None
        self._one_pass = OnePass()

    def check_cases(self, cases: Sequence[CaseEntry], progress: Progress) -> Iterator[Result]:
        """Yield a result for every tensor of the cases, running each phase as it comes."""
        wanted = self.request.phases
        pairs = [(c, p) for c in cases for p in PHASES if p in wanted and p in c.phases]
        with progress.stage("checking", len(pairs)) as steps:
            for case, phase in pairs:
                progress.now(f"{case.name} / {phase.value}")
                yield from self.run(case, phase)
                next(steps)
        for phase in wanted:
            if phase not in {compared for _, compared in pairs}:
                # An empty phase must be seen: it is no pass.
                reason = _why_nothing(self.golden, phase)
                yield Result(self.request.case, phase, "", Verdict.SKIP, reason)

    def run(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Return a result for every recorded tensor of one phase of one case."""
        before = self._modules_run
        # Tokens of a pass that forward made: what ran for them, ran for forward.
        known = phase is Phase.GENERATE and self._one_pass.knows(case.name)
        results = self.run_phase(case, phase)
        # Equal tokens are the rule if a model ran; equal numbers, to the last bit, are not.
        doubtful = phase is not Phase.GENERATE or self._modules_run == before
        if known or not doubtful or self.judge.dtype != self.golden.manifest.dtype:
            return results
        return require_worked_out(
            self.candidate, self.golden, results, phase=phase, judge=self.judge
        )

    def run_phase(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Return the results of a phase, without asking whether the outputs were copied."""

        def once() -> list[Result]:
            return self._run_once(case, phase)

        if not isinstance(self.candidate, Guarded):
            return once()
        with self._serving(case):
            return run_guarded(self.candidate, phase, once, times=self.request.repeat)

    def _serving(self, case: CaseEntry) -> AbstractContextManager[None]:
        # A phase that is repeated must compute each time.
        if self._cache is None or self.request.repeat > 1:
            return nullcontext()
        return self._cache.serving(case.name)

    def _run_once(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Run one phase; whatever the candidate raises is this phase's error alone."""
        if phase_file(phase) not in self.golden.manifest.files:
            reason = "the golden set was recorded without this phase"
            return [Result(case.name, phase, "", Verdict.SKIP, reason)]
        recorded = self._read(case.name)
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                pairs = self._pairs(case, recorded, phase)
            seconds = time.perf_counter() - began
            results = [self._judge(case, phase, pair, seconds) for pair in pairs]
        except PhaseUnsupported as unsupported:
            return [Result(case.name, phase, "", Verdict.SKIP, str(unsupported))]
        except SnapError:
            raise
        except Exception as error:  # the candidate's code may raise anything
            require_candidates_fault(self.candidate, error, case=case.name, phase=phase)
            text = (str(error).strip() or "no message").splitlines()[0]
            reason = text if isinstance(error, EndedProcess) else f"{type(error).__name__}: {text}"
            seconds = round(time.perf_counter() - began, 6)
            return [Result(case.name, phase, "", Verdict.ERROR, reason, seconds=seconds)]
        return results or [Result(case.name, phase, "", Verdict.FAIL, "nothing was compared")]

    def _pairs(self, case: CaseEntry, recorded: RecordedCase, phase: Phase) -> list[Pair]:
        """Run one phase; with --quick forward and generate share one pass."""
        if not self.request.quick:
            return run_phase(self.candidate, recorded, phase)
        if phase is Phase.GENERATE:
            return self._one_pass.generate(self.candidate, recorded)
        if phase is Phase.FORWARD and Phase.GENERATE in {*case.phases} & {*self.request.phases}:
            return self._one_pass.forward(self.candidate, recorded)
        return run_phase(self.candidate, recorded, phase)

    def _read(self, name: str) -> RecordedCase:
        """Return a case, read once for all its phases unless the candidate overwrote an input."""
        watched = self.candidate if isinstance(self.candidate, Guarded) else None
        if self._case is None or self._case.name != name or (watched and watched.overwrote):
            self._case = None  # first: there need not be room for two
            self._case = read_case(self.golden, name)
            if watched:
                watched.overwrote = False
        return self._case

    def _judge(self, case: CaseEntry, phase: Phase, pair: Pair, seconds: float) -> Result:
        """Return the verdict on one tensor; a generation that differs is explained."""
        result = self.judge.judge(case, phase, pair, seconds=seconds)
        if phase is not Phase.GENERATE:
            return result
        return self._explainer.explain(result, pair.actual, self.candidate)

    def explore(self, cases: Sequence[CaseEntry], progress: Progress) -> Exploration | None:
        """Ask the derived questions that the request gives, or as many as it wants drawn."""
        request = self.request
        if request.replay:
            return replay(
                self.candidate,
                self.golden,
                request.replay,
                judge=self.judge,
                allow_near_ties=self.allows_near_ties,
            )
        if not request.explore:
            return None
        with progress.stage("asking", request.explore) as steps:

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
        """Name the module in which the first divergence of these results arises.

        The first case is looked into if nothing differs and the request wants it. A fault of
        preprocessing is in no module.
        """
        first = first_divergence(results)
        if not results or (first is None and not self.request.localise):
            return None
        if first is not None and first.phase is Phase.PREPROCESSING:
            return None
        name = first.case if first else results[0].case
        return localise_case(self.candidate, self.golden, name, dtype=self.judge.dtype)

    def compare_weights(
        self, results: tuple[Result, ...] = (), localisation: Localisation | None = None
    ) -> WeightReport | None:
        """Compare the candidate's weights with the checkpoint's, as they are now.

        results, localisation: what was found with them, by which a NaN is traced back.
        """
        show = getattr(self.candidate, "weights", None)
        if not callable(show) or not self.request.needs_weights:
            return None
        names = getattr(self.candidate, "unset_weights", None)
        unset = tuple(names()) if callable(names) else ()
        harmful = find_harmful(unset, results, localisation)
        return compare_weights(show(), unset=unset, harmful=harmful)

    def graft(self, results: tuple[Result, ...]) -> Graft:
        """Put the golden's output in the place of the module that the request names."""
        if ORACLE in self.golden.manifest.files:
            # On a small case a fault may stay within the table.
            judge = Judge(self.golden, self.judge.dtype, Rule.ORACLE)
        else:
            judge = self.judge
        own = self.judge, self._cache
        self.judge, self._cache = judge, None
        try:
            return graft_module(
                self.request.graft,
                self.candidate,
                self.golden,
                results,
                # A module that returns the golden's output is wrong on every other input.
                run=self.run_phase,
                dtype=judge.dtype,
            )
        finally:
            self.judge, self._cache = own

    @property
    def info(self) -> CandidateInfo:
        """What the candidate says of itself; `info` is a courtesy, not a phase."""
        info = getattr(self.candidate, "info", None)
        return info() if callable(info) else CandidateInfo(self.request.candidate)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the candidate did so far besides answering."""
        return self.candidate.warnings if isinstance(self.candidate, Guarded) else ()

    @property
    def _modules_run(self) -> int:
        return self.candidate.modules_run if isinstance(self.candidate, Guarded) else 0

    def transformers(self) -> Transformers:
        """Say whether Hugging Face is in reach, and whether the candidate imported it."""
        imported = not self._transformers_before and "transformers" in sys.modules
        return Transformers(is_importable("transformers"), imported)

    def environment(self) -> dict[str, str]:
        """Return versions and settings of this process."""
        return {
            **describe_machine(),
            **package_versions(),
            **self.settings,
            **family_of(self.golden.manifest.checkpoint.family).environment,
            "device": device_name(self.request.device),
        }


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


def _why_nothing(golden: Golden, phase: Phase) -> str:
    if phase not in golden.manifest.tolerances:
        return f"the family {golden.manifest.checkpoint.family} has no such phase"
    return "no selected case has anything to compare"


def _coverage(golden: Golden, cases: Sequence[CaseEntry]) -> tuple[Coverage, ...]:
    """Return what the cases reach, by the files that are open: another set may lie there by now."""
    generated = {
        case.name: golden.tensor(case.name, Phase.GENERATE, parts.TOKEN_IDS).tolist()
        for case in cases
        if parts.TOKEN_IDS in golden.tensor_names(case.name, Phase.GENERATE)
    }
    return coverage(golden.manifest, cases, generated)
