"""Whether a mutant is one at all: the same questions in float64, where rounding is 1e-15.

In float32 two ways to compute the same differ by rounding, and by more of it than the unchanged
port does where an angle of some hundred radians is rounded. In float64 throughout, a fault keeps
its size and rounding is gone.
"""

from __future__ import annotations

import math

import torch

from snapshot_tool.candidates.fms import load_fms_candidate
from snapshot_tool.core.interfaces import CandidateRequest
from snapshot_tool.golden_choice import open_checkpoint_of
from snapshot_tool.reference.float64 import float64_throughout
from snapshot_tool.store.golden import Golden
from tests.mutants.candidates import Planted
from tests.mutants.probes import Answers, answers

# Relative to an answer's greatest element: far above float64's rounding, below that of float32.
SAME = 1e-10


def exact_answers(plan: Planted, golden: Golden) -> Answers:
    """Return what a planted port answers in float64 throughout. For a process of its own."""
    torch.set_default_dtype(torch.float64)
    request = CandidateRequest(
        open_checkpoint_of(golden, None).folder,
        golden.manifest.checkpoint.config,
        "cpu",
        "float64",
    )
    candidate = load_fms_candidate(request, fms_path=plan.checkout)
    plan.alter(candidate)
    parts = [part for module in candidate.model.modules() for part in vars(module).values()]
    for rotary in (part for part in parts if hasattr(part, "cached_freqs")):
        # FMS's tables, float32 as they were made on loading: they are made again.
        rotary.cached_freqs.clear()
        rotary.max_seq_len_cached.clear()
    return answers(candidate, golden, asked_within=float64_throughout)


def greatest_exact_change(originals: Answers, other: Answers) -> tuple[float, str]:
    """Return the greatest difference relative to the original's greatest element, and where."""
    changes = {name: _change(answer, other[name]) for name, answer in originals.items()}
    question = max(changes, key=lambda name: changes[name])
    return changes[question], question


def _change(one: torch.Tensor | str, other: torch.Tensor | str) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if isinstance(one, str) and isinstance(other, str) and one == other else math.inf
    if one.shape != other.shape:
        return math.inf
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    largest = float(one.double().abs().max())
    difference = float((one.double() - other.double()).abs().max())
    if math.isnan(difference):
        return math.inf
    return difference / largest if largest else difference
