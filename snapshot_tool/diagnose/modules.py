"""Modules by themselves: each is given the reference's own input, and its output is compared.

A probe runs one module at a time. Isolation replaces input and output of every module within one
run, so that no module sees the error of another. A graft replaces the output of one module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.localisation import (
    ERROR_LIMIT,
    ERROR_LIMIT_ULPS,
    ModuleTrial,
    ModuleTrials,
    noise_limit,
)
from snapshot_tool.base.protocol import Candidate, CaseInputs, Phase, Side
from snapshot_tool.base.report import Graft
from snapshot_tool.base.results import Judgement, Result
from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.diagnose.align import enclosing
from snapshot_tool.diagnose.localise import localise_case
from snapshot_tool.goldens.golden import Golden, tap_limits
from snapshot_tool.goldens.manifest import CaseEntry, Storage
from snapshot_tool.taps.sketches import (
    MAX_DIMENSIONS,
    Probe,
    probe_input,
    relative_error,
    sketch,
    without_padding,
)

ModuleSide = tuple[str, Side]


def probe_modules(candidate: Candidate, golden: Golden, *, dtype: str) -> ModuleTrials | None:
    """Run single modules; return None if the set has no probes or the candidate takes none."""
    probes = golden.probes() if candidate.supports("run_module") else []
    if not probes:
        return None
    dtypes = (dtype, golden.manifest.dtype)
    return run_probes(candidate, probes, dtypes=dtypes, seed=golden.manifest.taps.seed)


def run_probes(
    candidate: Candidate, probes: Sequence[Probe], *, dtypes: Sequence[str], seed: int
) -> ModuleTrials:
    """Run the candidate's counterpart of each probed module.

    One that the candidate does not have, or that does not take the input, is not tried.

    dtypes: of the candidate and of the reference; the coarser one gives the limit.
    """
    trials, not_tried = [], dict[str, None]()
    eps = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    # One block for all: entering one takes as long as running a small module.
    with foreign_code("the candidate"), torch.inference_mode():
        for probe in probes:
            found = None
            if probe.module not in not_tried:
                given = probe_input(probe.shape, probe.size, seed=seed)
                # A module that takes other inputs raises.
                with suppress(TypeError, RuntimeError, IndexError):
                    found = candidate.run_module(probe.module, given)
            if found is None or found[1].shape != probe.answer.shape:
                not_tried[probe.module] = None
                continue
            name, answer = found
            error = relative_error(probe.answer, sketch(answer, seed=seed))
            limit = noise_limit(max(probe.noise[dtype] for dtype in dtypes), eps=eps)
            trials.append(ModuleTrial(probe.module, name, str(probe), error, limit))
    return _summary(trials, not_tried)


@dataclass(slots=True)
class Isolator:
    """An observer that puts what was recorded in place of every input and output.

    Args:
        recorded: whole inputs and outputs of the reference's modules.
        seed: of the sketches that are compared.
        attention_mask: (1, length); positions of padding are not compared.
        errors: of each input and output, before it was replaced, in order of execution.
        makers: the module whose own code made that input or output; "" if none did.
    """

    recorded: Mapping[ModuleSide, torch.Tensor]
    seed: int
    attention_mask: torch.Tensor
    errors: dict[ModuleSide, float] = field(default_factory=dict)
    makers: dict[ModuleSide, str] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> torch.Tensor | None:
        """Compare a tensor and return the recorded one, or None if there is none like it."""
        key, maker = (module, side), module
        if side is Side.INPUT:
            maker = enclosing(module, self._running)
            self._running.append(module)
        elif module in self._running:
            self._running.remove(module)
        golden = self.recorded.get(key)
        if golden is None or key in self.errors or golden.shape != tensor.shape:
            return None
        one, other = (
            sketch(without_padding(value, self.attention_mask), seed=self.seed)
            for value in (golden, tensor)
        )
        self.errors[key], self.makers[key] = relative_error(one, other), maker
        # A copy: the candidate may write into it.
        return golden.to(tensor.device, tensor.dtype, copy=True)


def can_isolate(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is recorded for isolation: a sketch can be made of it."""
    has_numbers = tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)
    return has_numbers and 1 <= tensor.dim() <= MAX_DIMENSIONS and tensor.numel() > 0


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


def isolate(
    candidate: Candidate,
    inputs: CaseInputs,
    isolator: Isolator,
    limits: Mapping[ModuleSide, float],
) -> ModuleTrials:
    """Run forward, every module on the reference's own input; return those wrong by themselves.

    limits: the greatest error of each input and output.
    """
    with torch.inference_mode():
        names = candidate.observe_forward(inputs, isolator)
    trials = [
        ModuleTrial(
            isolator.makers[key],
            names.get(isolator.makers[key], ""),
            "its output" if key[1] is Side.OUTPUT else f"what it gives {key[0]}",
            error,
            limits[key],
        )
        for key, error in isolator.errors.items()
    ]
    outputs = [module for module, side in isolator.recorded if side is Side.OUTPUT]
    not_tried = (name for name in outputs if (name, Side.OUTPUT) not in isolator.errors)
    return _summary(trials, not_tried)


def _summary(trials: Sequence[ModuleTrial], not_tried: Iterable[str]) -> ModuleTrials:
    """Return the worst trial of each module that is wrong, in the order of the trials."""
    worst: dict[str, ModuleTrial] = {}
    for trial in trials:
        if not trial.error <= trial.limit:
            known = worst.setdefault(trial.module, trial)
            if trial.error / trial.limit > known.error / known.limit:
                worst[trial.module] = trial
    tried = len({trial.module for trial in trials} - {""})
    return ModuleTrials(tried=tried, wrong=tuple(worst.values()), not_tried=tuple(not_tried))


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
    """Run a case with the output of one of the reference's modules in place of the candidate's.

    The case is one for which the whole output is recorded, preferably one that fails in `results`,
    those of a check. Generation is left out, because outputs of its later steps are not recorded.
    run: runs and judges one phase of one case.

    Raises UsageError if the reference has no such module or the candidate no method `graft`, and
    GoldenNotFound if the whole output is not recorded for any case.
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
    bad = {r.case for r in results if r.verdict.is_bad}
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
    for capture in golden.family.captures:
        kept = capture.name in golden.tensor_names(case, capture.phase)
        if (capture.module, capture.side) == (module, Side.OUTPUT) and kept:
            return golden.tensor(case, capture.phase, capture.name)
    return golden.whole_output(case, module)
