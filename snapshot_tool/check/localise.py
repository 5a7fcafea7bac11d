"""Find the module of a fault, and prove it by replacing its output by the recorded one."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from snapshot_tool.base.errors import GoldenNotFound, UsageError, place_of_class
from snapshot_tool.base.localisation import (
    ERROR_LIMIT,
    ERROR_LIMIT_ULPS,
    Localisation,
    ModuleTrials,
)
from snapshot_tool.base.protocol import Candidate, Phase, Side
from snapshot_tool.base.report import Graft
from snapshot_tool.base.results import Judgement, Result, Verdict
from snapshot_tool.base.taps import TapRecorder, shapes_of
from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.diagnose.localise import localise, observe
from snapshot_tool.diagnose.modules import Isolator, isolate, run_probes
from snapshot_tool.families import family_of
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import CaseEntry, Storage
from snapshot_tool.goldens.oracle import tap_limits


def localise_case(
    candidate: Candidate, golden: Golden, case: str, *, dtype: str, failed: bool = False
) -> Localisation | None:
    """Compare the modules of a case; return None if the set or the candidate has none.

    Args:
        candidate: the implementation under test.
        golden: the set.
        case: the case to run.
        dtype: the candidate's dtype, which selects the oracle's limits.
        failed: whether an output of the forward pass fails; see `localise`.
    """
    golden_taps = golden.taps(case)
    if not golden_taps:
        return None
    limits = tap_limits(golden, case, dtype=dtype)
    inputs = golden.inputs(case)
    recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask, shapes_of(golden_taps))
    try:
        with torch.inference_mode():
            seen = observe(candidate, inputs, golden_taps, recorder)
    except Exception:  # the results already have it as an error of its phase
        if not candidate.supports("observe_forward"):
            return None
        unfinished = recorder.unfinished()
        return localise(
            case, golden_taps, recorder.by_module(), {}, unfinished=unfinished, limits=limits
        )
    if seen is None:
        return None
    found = localise(case, golden_taps, seen.taps, seen.mapping.names, failed=failed, limits=limits)
    mapping = seen.mapping.summary(found.not_compared)
    return _with_source(msgspec.structs.replace(found, mapping=mapping), candidate)


def _with_source(found: Localisation, candidate: Candidate) -> Localisation:
    """Add the class of the first bad module and its source line."""
    bad = found.first_bad_module
    if bad is None or not bad.candidate or not candidate.supports("modules"):
        return found
    modules = dict(candidate.modules().named_modules())
    parts = bad.candidate.partition("[")[0].split(".")  # [0:64] is a part of an output
    around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    kinds = [type(modules[name]) for name in around if name in modules]
    places = [place for kind in kinds if (place := place_of_class(kind))]
    return msgspec.structs.replace(
        found,
        module_class=kinds[0].__name__ if kinds else "",
        source=next(iter(places), None),
    )


def probe_modules(candidate: Candidate, golden: Golden, *, dtype: str) -> ModuleTrials | None:
    """Run single modules; return None if the set has no probes or the candidate takes none."""
    probes = golden.probes() if candidate.supports("run_module") else []
    if not probes:
        return None
    dtypes = (dtype, golden.manifest.dtype)
    return run_probes(candidate, probes, dtypes=dtypes, seed=golden.manifest.taps.seed)


def isolate_modules(candidate: Candidate, golden: Golden, *, dtype: str) -> ModuleTrials:
    """Run every module on the reference's own input, in the first case that keeps these.

    Raises UsageError for a candidate that cannot be observed, GoldenNotFound without such a case.
    """
    if not candidate.supports("observe_forward") or joined_ranks():
        raise UsageError(
            "--isolate: this candidate's modules cannot be run by themselves",
            "it needs a method 'observe_forward', and one process",
        )
    for case in golden.cases:
        if recorded := golden.whole_modules(case):
            break
    else:
        raise GoldenNotFound(
            f"no case of {golden.manifest.title} keeps the inputs of modules",
            "record it with: snap record ... --update --modules CASE",
        )
    inputs = golden.inputs(case)
    limits = tap_limits(golden, case, dtype=dtype, by_itself=True)
    loosest = max(ERROR_LIMIT, ERROR_LIMIT_ULPS * torch.finfo(getattr(torch, dtype)).eps)
    by_side = {
        (module, side): limits[module][side is Side.OUTPUT] if module in limits else loosest
        for module, side in recorded
    }
    isolator = Isolator(recorded, golden.manifest.taps.seed, inputs.attention_mask)
    return isolate(candidate, inputs, isolator, by_side)


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
    """Run a case with one module's output replaced by the recorded one.

    The case is one for which the whole output is recorded, preferably one that fails. Generation is
    left out, because outputs of its later steps are not recorded.

    Args:
        module: its name in the reference.
        candidate: the implementation under test.
        golden: the set.
        results: the results of a check without the graft.
        run: runs and judges one phase of one case.
        dtype: the candidate's dtype.

    Raises:
        UsageError: the reference has no such module, or the candidate has no method `graft`.
        GoldenNotFound: the whole output is not recorded for any case.
    """
    if not candidate.supports("graft"):
        raise UsageError("--graft needs a candidate with the method 'graft'", "")
    case, output = _graft_case(golden, module, results)
    phases = [phase for phase in _GRAFTED if phase in case.phases]
    if golden.manifest.storage is Storage.COMPACT:
        # In compact sets the connector has another input than the recorded whole outputs.
        phases = [phase for phase in phases if phase is not Phase.CONNECTOR]
    before = [result for phase in phases for result in run(case, phase)]
    with candidate.graft(module, output) as name:
        after = [result for phase in phases for result in run(case, phase)]
        found = localise_case(candidate, golden, case.name, dtype=dtype)
    return Graft(
        module,
        name,
        case.name,
        _judgements(before),
        _judgements(after),
        found.module or None if found else None,
    )


def can_graft(candidate: Candidate, golden: Golden, module: str) -> bool:
    """Return whether a module can be grafted: its whole output is recorded for a case."""
    if not candidate.supports("graft"):
        return False
    return any(
        _whole_output(golden, case.name, module) is not None for case in golden.manifest.cases
    )


def _judgements(results: list[Result]) -> tuple[Judgement, ...]:
    return tuple(Judgement(r.case, r.phase, r.tensor, r.verdict, r.reason) for r in results)


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
        f"{golden.manifest.title} has no whole output of {module} for any case",
        "record it with: snap record ... --update --whole-outputs CASE",
    )


def _whole_output(golden: Golden, case: str, module: str) -> torch.Tensor | None:
    """Return a module's recorded whole output, of a phase or of --whole-outputs, or None."""
    for capture in family_of(golden.manifest.checkpoint.family).captures:
        kept = capture.name in golden.tensor_names(case, capture.phase)
        if (capture.module, capture.side) == (module, Side.OUTPUT) and kept:
            return golden.tensor(case, capture.phase, capture.name)
    return golden.whole_output(case, module)
