"""Checking a candidate against a golden set, case by case and phase by phase."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from snapshot_tool.check_request import CheckRequest, select_cases, shard_of
from snapshot_tool.core.interfaces import Progress
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.report import CheckReport, GoldenIdentity, Transformers
from snapshot_tool.core.results import Result, Verdict
from snapshot_tool.core.weights import name_harmful
from snapshot_tool.devices import require_device
from snapshot_tool.environment import describe_machine, device_name, is_importable, package_versions
from snapshot_tool.guards.surroundings import differing_surroundings
from snapshot_tool.opening import open_checker
from snapshot_tool.store.golden import Golden
from snapshot_tool.store.manifest import CaseEntry

if TYPE_CHECKING:
    from snapshot_tool.checker import Checker


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
    weights = checker.compare_weights(results, localisation)
    results = name_harmful(results, (weights.harmful if weights else ()) or ())
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
        warnings=(*golden.manifest.reference_warnings, *checker.warnings),
        surroundings=differing_surroundings(golden.manifest.environment, environment),
        shard=shard_of(golden.manifest, request),
    )


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


def _unmet(results: tuple[Result, ...], required: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """Return the required phases that were skipped somewhere, or did not pass anywhere."""
    unmet = []
    for phase in required:
        verdicts = {result.verdict for result in results if result.phase is phase}
        if Verdict.SKIP in verdicts or not verdicts:
            unmet.append(phase)
    return tuple(unmet)
