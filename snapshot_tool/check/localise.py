"""Putting the golden's output in one module's place, to prove that a fault is there alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Candidate
from snapshot_tool.base.report import Graft
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.base.tap import Side, TapRecorder, shapes_of
from snapshot_tool.diagnose.localise import localise, observe
from snapshot_tool.families import family_of
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import CaseEntry, Storage
from snapshot_tool.goldens.oracle import tap_limits

if TYPE_CHECKING:
    import torch


def localise_case(
    candidate: Candidate, golden: Golden, case: str, *, dtype: str
) -> Localisation | None:
    """Return what the modules say; None where the set or the candidate shows none.

    dtype: what the candidate computes in, by which the oracle's limits are chosen.
    """
    import torch

    golden_taps = golden.taps(case)
    if not golden_taps:
        return None
    limits = tap_limits(golden, case, dtype=dtype)
    inputs = golden.inputs(case)
    recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask, shapes_of(golden_taps))
    try:
        with torch.inference_mode():
            seen = observe(candidate, inputs, golden_taps, recorder)
    except Exception:  # what raises here has raised in its phase, and stands in the results
        if not callable(getattr(candidate, "observe_forward", None)):
            return None
        unfinished = recorder.unfinished()
        return localise(
            case, golden_taps, recorder.by_module(), {}, unfinished=unfinished, limits=limits
        )
    if seen is None:
        return None
    found = localise(case, golden_taps, seen.taps, seen.mapping.names, limits=limits)
    return replace(found, mapping=seen.mapping)


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
