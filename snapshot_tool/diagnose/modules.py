"""Modules by themselves: each is given the reference's own input, and its output is compared.

A probe runs one module at a time. Isolation replaces input and output of every module within one
run, so that no module sees the error of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from snapshot_tool.base.localisation import ModuleTrial, ModuleTrials, noise_limit
from snapshot_tool.base.protocol import Candidate, CaseInputs, Side
from snapshot_tool.base.taps import MAX_DIMENSIONS, relative_error, sketch, without_padding
from snapshot_tool.diagnose.align import enclosing
from snapshot_tool.taps.probes import Probe, probe_input

ModuleSide = tuple[str, Side]


def run_probes(
    candidate: Candidate, probes: Sequence[Probe], *, dtypes: Sequence[str], seed: int
) -> ModuleTrials:
    """Run the candidate's counterpart of each probed module.

    One that the candidate does not have, or that does not take the input, is not tried.

    dtypes: of the candidate and of the reference; the coarser one gives the limit.
    """
    trials, not_tried = [], dict[str, None]()
    eps = max(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)
    for probe in probes:
        found = None
        if probe.module not in not_tried:
            given = probe_input(probe.shape, probe.size, seed=seed)
            try:
                with torch.inference_mode():
                    found = candidate.run_module(probe.module, given)
            except (TypeError, RuntimeError, IndexError):  # it takes other inputs
                found = None
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
