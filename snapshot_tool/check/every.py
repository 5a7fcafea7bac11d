"""Check all golden sets, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.environment import rank_here
from snapshot_tool.base.errors import GoldenNotFound, SnapError, UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from snapshot_tool.goldens.find import FoundSet, Selection, find_goldens, how_to_get


@dataclass(frozen=True, slots=True)
class SetCheck:
    """One golden set and its report, or the reason why it was not checked.

    Args:
        name: the set's path below the goldens folder.
        verdict: "error" if the check could not run, "skip" if the options do not apply to the set.
        report: the finished check, or None.
        reason: the reason why there is no report.
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
    own = dataclasses.replace(request, checkpoint=found.name, revision=None, golden_device=device)
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
