"""The candidates that the mutants and the benign changes are run as: `--candidate module:factory`.

A forked process says in `PLANTED` what it is about; the factory builds that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate

SPEC = f"{__name__}:build"


@dataclass(slots=True)
class Planted:
    """What `build` builds: an FMS checkout, and what is then done to the candidate."""

    checkout: Path
    alter: Callable[[FmsCandidate], Any]
    built: FmsCandidate | None = None


_planted: list[Planted] = []


def plant_candidate(planted: Planted) -> None:
    """Let `build` build this from now on, in this process."""
    _planted[:] = [planted]


def build(request: CandidateRequest) -> Any:
    """Build what was planted; keep FMS's own candidate for whoever wants to look at it."""
    (planted,) = _planted
    planted.built = load_fms_candidate(request, fms_path=planted.checkout)
    return planted.alter(planted.built)
