"""Putting the golden's output in one module's place, to prove that a fault is there alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.graft import Graft
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Candidate
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tap import Side
from snapshot_tool.check.localise_case import localise_case
from snapshot_tool.families import family_of
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import CaseEntry, Storage

if TYPE_CHECKING:
    import torch

Run = Callable[[CaseEntry, Phase], list[Result]]
_GRAFTED = (Phase.VISION, Phase.CONNECTOR, Phase.FORWARD)


def graft_module(
    module: str,
    candidate: Candidate,
    golden: Golden,
    results: tuple[Result, ...],
    *,
    run: Run,
    dtype: str,
) -> Graft:
    """Run a case with one module's output replaced by the golden's.

    The case is one that keeps that output whole, and rather one that fails. Generation is left out:
    its later steps have no recorded output to put in.

    Args:
        module: the reference's name of it.
        candidate: the implementation under test.
        golden: the set.
        results: what a check without the graft gave.
        run: judges one phase of one case.
        dtype: what the candidate computes in.

    Raises:
        UsageError: the reference has no such module, or the candidate cannot be grafted.
        GoldenNotFound: no case keeps its output whole.
    """
    graft = getattr(candidate, "graft", None)
    if not callable(graft):
        raise UsageError("this candidate cannot be grafted: it has no method 'graft'", "")
    case, output = _graft_case(golden, module, results)
    phases = [phase for phase in _GRAFTED if phase in case.phases]
    if golden.manifest.storage is Storage.COMPACT:
        # Its connector was asked something else than what the whole outputs answer.
        phases = [phase for phase in phases if phase is not Phase.CONNECTOR]
    before = [result for phase in phases for result in run(case, phase)]
    with graft(module, output) as name:
        after = [result for phase in phases for result in run(case, phase)]
        found = localise_case(candidate, golden, case.name, dtype=dtype)
    return Graft(module, name, case.name, tuple(before), tuple(after), found)


def _graft_case(
    golden: Golden, module: str, results: tuple[Result, ...]
) -> tuple[CaseEntry, torch.Tensor]:
    bad = {r.case for r in results if r.verdict in (Verdict.FAIL, Verdict.ERROR)}
    for case in sorted(golden.manifest.cases, key=lambda case: case.name not in bad):
        output = _whole_output(golden, case.name, module)
        if output is not None:
            return case, output
    if module not in golden.manifest.taps.modules:
        raise UsageError(
            f"--graft {module}: the reference has no such module", "see --localise for the names"
        )
    raise GoldenNotFound(
        f"no case of {golden.manifest.title} keeps the whole output of {module}",
        "record it with: snap record ... --update --whole-outputs CASE",
    )


def _whole_output(golden: Golden, case: str, module: str) -> torch.Tensor | None:
    """Return a module's output where it was kept, as that of a phase or since it was asked for."""
    for capture in family_of(golden.manifest.checkpoint.family).captures:
        kept = capture.name in golden.tensor_names(case, capture.phase)
        if (capture.module, capture.side) == (module, Side.OUTPUT) and kept:
            return golden.tensor(case, capture.phase, capture.name)
    return golden.whole_output(case, module)
