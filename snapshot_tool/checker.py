"""A loaded candidate beside its golden set, phase by phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from snapshot_tool.candidates import import_candidate, load_candidate
from snapshot_tool.check_request import CheckRequest, choose_rule
from snapshot_tool.checkpoint import Checkpoint
from snapshot_tool.core.errors import EndedProcess, PhaseUnsupported, SnapError
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
from snapshot_tool.core.oracle import HALF_DTYPES
from snapshot_tool.core.phases import Phase
from snapshot_tool.core.questions import Question
from snapshot_tool.core.results import Result, Verdict, first_divergence
from snapshot_tool.core.tolerance import Rule
from snapshot_tool.core.weights import WeightReport, find_harmful
from snapshot_tool.determinism import make_deterministic
from snapshot_tool.devices import require_device
from snapshot_tool.exploration.probe import require_worked_out
from snapshot_tool.generation import GenerationExplainer
from snapshot_tool.guards.blame import require_candidates_fault
from snapshot_tool.guards.guarded import Guarded
from snapshot_tool.guards.runs import run_guarded
from snapshot_tool.judge import Judge
from snapshot_tool.memory import release_free_memory, without_collection
from snapshot_tool.phase_runs import OnePass, Pair, run_phase
from snapshot_tool.store.golden import Golden
from snapshot_tool.store.layout import ORACLE, phase_file
from snapshot_tool.store.manifest import CaseEntry
from snapshot_tool.weights import compare_weights


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
        cache: what is kept between the phases of a case; None: every phase computes everything.
        one_pass: what forward and generate share with --quick.
    """

    request: CheckRequest
    golden: Golden
    candidate: Candidate
    checkpoint: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    imported_before: bool = False
    cache: Serving | None = None
    one_pass: OnePass = field(default_factory=OnePass)

    @property
    def info(self) -> CandidateInfo:
        """What the candidate says of itself; `info` is a courtesy, not a phase."""
        info = getattr(self.candidate, "info", None)
        return info() if callable(info) else CandidateInfo(self.request.candidate)

    def run(self, case: CaseEntry, phase: Phase) -> list[Result]:
        """Return a result for every recorded tensor of one phase of one case."""
        release_free_memory()
        before = self._modules_run
        # Tokens of a pass that forward made: what ran for them, ran for forward.
        known = phase is Phase.GENERATE and self.one_pass.knows(case.name)
        results = self.run_unasked(case, phase)
        # Equal tokens are the rule where a model ran; equal numbers, to the last bit, are not.
        doubted = phase is not Phase.GENERATE or self._modules_run == before
        if known or not doubted or self.judge.dtype != self.golden.manifest.dtype:
            return results
        return require_worked_out(
            self.candidate, self.golden, results, phase=phase, judge=self.judge
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
        # A phase that is repeated must compute each time.
        if self.cache is None or self.request.repeat > 1:
            return nullcontext()
        return self.cache.serving(case.name)

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

    def compare_weights(
        self, results: tuple[Result, ...] = (), localisation: Localisation | None = None
    ) -> WeightReport | None:
        """Compare the candidate's weights with the checkpoint's, as they are now.

        results, localisation: what was found with them, by which a NaN is traced back.
        """
        show = getattr(self.candidate, "weights", None)
        if not callable(show) or not self.request.needs_weights:
            return None
        self.golden.forget_lent()
        unset = self.unset_weights
        return compare_weights(
            show(), unset=unset, harmful=find_harmful(unset, results, localisation)
        )

    @property
    def unset_weights(self) -> tuple[str, ...]:
        """The candidate's weights that the checkpoint leaves unset."""
        unset = getattr(self.candidate, "unset_weights", None)
        return tuple(unset()) if callable(unset) else ()

    def localise(self, results: tuple[Result, ...]) -> Localisation | None:
        """Name the module in which the first divergence of these results arises."""
        return _localise(self, results)

    def graft(self, results: tuple[Result, ...]) -> Graft | None:
        """Put the golden's output in the place of the module that the request names."""
        if not self.request.graft:
            return None
        from snapshot_tool.grafting import graft_module  # hardly ever asked for

        checker = replace(self, cache=None)
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

    @property
    def allows_near_ties(self) -> bool:
        """Whether a generation may differ where rounding could have chosen.

        In half precision it often could: a right port may choose the other token.
        """
        computed = {self.golden.manifest.dtype, self.judge.dtype}
        return self.request.allow_near_ties or not computed.isdisjoint(HALF_DTYPES)

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
            allow_near_ties=self.allows_near_ties,
        )
        return explainer.explain(result, pair.actual, self.candidate)


def load_checker(
    request: CheckRequest,
    golden: Golden,
    progress: Progress,
    *,
    open_checkpoint: Callable[[], Checkpoint],
) -> Checker:
    """Import the candidate, then load it from the checkpoint that the golden was recorded from."""
    require_device(request.device)
    dtype, _ = choose_rule(request, golden)
    imported_before = "transformers" in sys.modules
    settings = make_deterministic(golden.manifest.seed, strict=False)
    with progress.stage("loading the candidate", 1) as steps:
        with without_collection():
            import_candidate(request.candidate, request.fms_path)
        checkpoint = open_checkpoint()
        candidate = load_candidate(
            request.candidate,
            CandidateRequest(
                # Absolute: the candidate may change the working folder.
                checkpoint.folder.absolute(),
                golden.manifest.checkpoint.config,
                request.device,
                dtype,
                request.loading,
            ),
            fms_path=request.fms_path,
        )
        next(steps)
    guarded = Guarded(candidate, dtype=dtype, settings=settings)
    output_cache = getattr(candidate, "output_cache", None)
    return Checker(
        request,
        golden,
        cast("Candidate", guarded),
        checkpoint.folder,
        settings,
        imported_before,
        cache=output_cache() if callable(output_cache) else None,
    )


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
        text = (str(error).strip() or "no message").splitlines()[0]
        reason = text if isinstance(error, EndedProcess) else f"{type(error).__name__}: {text}"
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
            judge=checker.judge,
            allow_near_ties=checker.allows_near_ties,
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
            judge=checker.judge,
            allow_near_ties=checker.allows_near_ties,
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
    from snapshot_tool.case_localisation import localise_case  # not where all is well

    name = first.case if first else results[0].case
    return localise_case(checker.candidate, checker.golden, name, dtype=checker.judge.dtype)
