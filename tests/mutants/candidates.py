"""The candidate that mutants and benign changes are checked as: `--candidate module:build`."""

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
    """What `build` builds in this process: an FMS checkout's candidate, altered.

    Args:
        checkout: FMS.
        alter: returns the candidate that is checked.
        built: FMS's own candidate, once it is loaded.
        altered: what `alter` returned for it.
        keeps: whether the one candidate serves every check.
    """

    checkout: Path
    alter: Callable[[FmsCandidate], Any] = lambda candidate: candidate
    built: FmsCandidate | None = None
    altered: Any = None
    keeps: bool = False


_planted: list[Planted] = []


def plant_candidate(planted: Planted) -> None:
    """Set what `build` builds from now on."""
    _planted[:] = [planted]


def build(request: CandidateRequest) -> Any:
    """Build what was planted, and keep it there."""
    (planted,) = _planted
    if planted.built is None or not planted.keeps:
        planted.built = load_fms_candidate(request, fms_path=planted.checkout)
        planted.altered = planted.alter(planted.built)
    return planted.altered
