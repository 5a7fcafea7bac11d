"""Check a golden set on several paths, one after the other, and compare their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from snapshot_tool.base.environment import rank_here
from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.base.report import CheckReport, PathDifference
from snapshot_tool.base.results import Verdict
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.check.every import SetCheck
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import Outputs, check


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
            report = check(dataclasses.replace(request, path=(name,)), progress, outputs=outputs)
        except UsageError:
            raise
        except SnapError as error:
            yield SetCheck(name, Verdict.ERROR, reason=error.problem)
            continue
        if name == names[0]:
            first = outputs
        elif first is not None:
            difference = compare_outputs(names[0], first, outputs, report)
            report = dataclasses.replace(report, path_difference=difference)
        yield SetCheck(name, report.verdict, report)


def compare_outputs(
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
    return dataclasses.replace(
        found,
        share=found.share if report.rule is Rule.TABLE else None,
        other_tokens=tuple(other_tokens),
    )
