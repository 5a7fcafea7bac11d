"""Whether a mutant is one at all: the same questions in float64, where rounding is gone.

In float32 two ways to compute the same differ by the rounding of both, and by more of it where an
angle of some hundred radians is rounded. In float64 throughout only the fault itself is left: it is
one where it changes an answer by more than float32 rounds it.
"""

from __future__ import annotations

import torch

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import load_fms_candidate
from snapshot_tool.goldens.find import open_checkpoint_of
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.reference.loading import float64_throughout
from tests.mutants.candidates import Planted
from tests.mutants.probes import Answers, answers


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
