"""The use case `snap check`: a golden set, all of them, or one on several paths."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from snapshot_tool.base import __version__
from snapshot_tool.base.environment import rank_here, require_device
from snapshot_tool.base.errors import GoldenNotFound, SnapError, UsageError
from snapshot_tool.base.protocol import EAGER, PHASES, Phase, Progress
from snapshot_tool.base.report import (
    CheckReport,
    Coverage,
    GoldenIdentity,
    PathDifference,
    name_harmful,
    unmet_requirements,
)
from snapshot_tool.base.results import Result, Verdict, first_divergence
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.check.request import (
    CheckRequest,
    matching_cases,
    require_phases,
    select_cases,
    shard_of,
)
from snapshot_tool.check.session import Outputs, Session, open_session
from snapshot_tool.diagnose.localise import name_wrong_module
from snapshot_tool.diagnose.modules import can_graft, isolate_modules, probe_modules
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.coverage import coverage
from snapshot_tool.goldens.find import FoundSet, Selection, find_goldens, how_to_get
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import environment_differences

# A case and a phase.
_Run = tuple[str, Phase]


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
    path = str(request.paths[0])
    session = open_session(request, golden, progress)
    session.outputs = outputs
    found: list[Result] = []
    ran: list[_Run] = []
    left_out: tuple[str, ...] = ()
    if not request.replay:  # a replay runs only its questions
        runs = [(c, p) for c in cases for p in PHASES if p in request.phases and p in c.phases]
        failed = _read_failed(golden.folder, path) if request.last_failed else set()
        chosen = [(case, phase) for case, phase in runs if (case.name, phase) in failed] or runs
        with progress.stage("checking", len(chosen)) as steps:
            for case, phase in chosen:
                progress.now(f"{case.name} / {phase.value}")
                found += session.run(case, phase)
                ran.append((case.name, phase))
                next(steps)
                if request.fail_fast and first_divergence(found):
                    break
        if not request.answers:
            _keep_failed(golden.folder, path, ran, found)
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
    candidate, dtype = session.candidate, session.judge.dtype
    isolated = isolate_modules(candidate, golden, dtype=dtype) if request.isolate else None
    probes = probe_modules(candidate, golden, dtype=dtype) if session.judges_model else None
    environment = session.environment()
    manifest, reached = golden.manifest, _coverage(golden, request)
    # A single tensor is skipped if others of its phase were judged.
    of_phases = tuple(r for r in results if r.verdict is not Verdict.SKIP or not r.tensor)
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
        dtype=dtype,
        rule=session.judge.rule,
        near_ties_allowed=session.allows_near_ties,
        graft=graft,
        probes=probes,
        isolated=isolated,
        results=results,
        coverage=reached,
        unmet=unmet_requirements(
            of_phases + (exploration.results if exploration else ()),
            reached,
            request.required,
        ),
        localisation=localisation,
        exploration=exploration,
        weights=weights,
        warnings=(*left_out, *manifest.reference_warnings, *candidate.warnings),
        environment_differences=environment_differences(manifest.environment, environment),
        shard=shard_of(manifest, request),
        path=path,
    )
    if localisation:
        wrong = [trial.module for trial in report.wrong_modules]
        named = name_wrong_module(localisation, wrong, candidate)
        report = replace(report, localisation=named)
    return replace(report, next_commands=_next_commands(session, report))


def _next_commands(session: Session, report: CheckReport) -> tuple[str, ...]:
    """Return commands after a failure: to test the module, and to find the commit."""
    request = session.request
    if not report.verdict.is_bad:
        return ()
    commands: list[str] = []
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


def _failed_file(golden: Path, path: str) -> Path:
    """Return the file with the runs that failed in the last check of a golden set on a path."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    # Two repositories may have a set of the same name.
    name = hashlib.sha256(os.fsencode(golden.resolve() / path)).hexdigest()[:32]
    return Path(cache, "fms-snap", "last-failed", f"{name}.json")


def _read_failed(golden: Path, path: str) -> set[_Run]:
    """Return the runs that failed in the last check; empty if unknown."""
    try:
        return msgspec.json.decode(_failed_file(golden, path).read_bytes(), type=set[_Run])
    except (OSError, RuntimeError, msgspec.DecodeError):
        return set()


def _keep_failed(golden: Path, path: str, ran: Iterable[_Run], results: Iterable[Result]) -> None:
    """Store the runs that failed now, and those that failed before and did not run again."""
    failed = {(result.case, result.phase) for result in results if result.verdict.is_bad}
    failed |= _read_failed(golden, path) - set(ran)
    # If the cache cannot be written, the next check runs everything.
    with suppress(OSError, RuntimeError):
        file = _failed_file(golden, path)
        if not failed:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.encode(sorted(failed)))


@dataclass(frozen=True, slots=True)
class SetCheck:
    """One of several checks: its report, or the reason why there is none.

    name: the golden set's path below the goldens folder, or the path that FMS ran on. verdict:
    "error" if the check could not run, "skip" if the options do not apply to the set.
    """

    name: str
    verdict: Verdict
    report: CheckReport | None = None
    reason: str = ""


def check_all(request: CheckRequest, progress: Progress) -> Iterator[SetCheck]:
    """Check the sets that --checkpoint, --revision and --golden-device select; by default all.

    Each set is checked with its own checkpoint. If a set cannot be checked, the others still are.
    """
    if request.checkpoint is not None and Path(request.checkpoint).is_dir():
        raise UsageError(
            "--all checks each golden set with its own checkpoint",
            "leave out --checkpoint, or name a golden set with it",
        )
    if rank_here() is not None:
        raise UsageError("--all runs in one process", "check one set at a time under torchrun")
    found = find_goldens(Path(request.goldens))
    selection = Selection(request.checkpoint, request.revision, request.golden_device)
    selected = selection.among(found)
    if selection == Selection():
        selected = found  # including those without a readable manifest
    if not selected:
        raise GoldenNotFound(
            f"no golden for {selection} in {request.goldens}", how_to_get(Path(request.goldens))
        )
    for one in selected:
        progress.note(f"checking {one.name}")
        yield _check_set(one, request, progress)


def _check_set(found: FoundSet, request: CheckRequest, progress: Progress) -> SetCheck:
    if found.manifest is None:
        return SetCheck(found.name, Verdict.ERROR, reason=found.problem)
    device = found.manifest.device
    if device != (request.golden_device or request.device):
        reason = f"recorded on {device}; to check it here: --golden-device {device}"
        return SetCheck(found.name, Verdict.SKIP, reason=reason)
    own = replace(request, checkpoint=found.name, revision=None, golden_device=device)
    try:
        report = check(own, progress)
    except UsageError as unfit:
        return SetCheck(found.name, Verdict.SKIP, reason=unfit.problem)
    except SnapError as error:
        return SetCheck(found.name, Verdict.ERROR, reason=error.problem)
    return SetCheck(found.name, report.verdict, report)


def exit_code_of_all(checks: Sequence[SetCheck]) -> int:
    """Return 1 if any set differs, else 3 if one could not run or none was compared, else 0."""
    codes = [one.report.exit_code for one in checks if one.report]
    codes += [3 for one in checks if one.verdict is Verdict.ERROR and not one.report]
    if 1 in codes:
        return 1
    return max(codes, default=3)


def check_paths(request: CheckRequest, progress: Progress) -> Iterator[SetCheck]:
    """Check each path of --path; the reports compare the outputs with those on the first one.

    If a path cannot be checked, the others still are.
    """
    if rank_here() is not None:
        raise UsageError("several paths need one process", "name one --path under torchrun")
    first: Outputs | None = None
    names = [str(path) for path in request.paths]
    for name in names:
        outputs: Outputs = {}
        progress.note(f"checking path {name}")
        try:
            report = check(replace(request, path=(name,)), progress, outputs=outputs)
        except UsageError:
            raise
        except SnapError as error:
            yield SetCheck(name, Verdict.ERROR, reason=error.problem)
            continue
        if name == names[0]:
            first = outputs
        elif first is not None:
            difference = _compare_outputs(names[0], first, outputs, report)
            report = replace(report, path_difference=difference)
        yield SetCheck(name, report.verdict, report)


def _compare_outputs(
    path: str, first: Outputs, outputs: Outputs, report: CheckReport
) -> PathDifference:
    """Return how outputs differ from the first path's; NaN counts as infinitely large.

    report: of the outputs, for their tolerances.
    """
    found, other_tokens = PathDifference(path), []
    for result in report.results:
        key = result.case, result.phase, result.tensor
        if key not in first or key not in outputs:
            continue
        one, other = first[key].actual, outputs[key].actual
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if result.phase is Phase.GENERATE:
            if not torch.equal(one.cpu(), other.cpu()):
                other_tokens.append(result.case)
        elif one.shape == other.shape:
            difference = (one.cpu().double() - other.cpu().double()).abs().nan_to_num(torch.inf)
            allowed = (result.atol or 0) + (result.rtol or 0) * first[key].expected.double().abs()
            share = float((difference / allowed).nan_to_num(0, posinf=torch.inf).max())
            if not found.case or share > (found.share or 0):
                found = PathDifference(path, float(difference.max()), share, result.case)
    return replace(
        found,
        share=found.share if report.rule is Rule.TABLE else None,
        other_tokens=tuple(other_tokens),
    )
