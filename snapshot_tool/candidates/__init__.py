"""Implementations under test: FMS, or whatever `module:factory` names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from snapshot_tool.core.errors import CandidateUnavailable, SnapError, UsageError
from snapshot_tool.core.interfaces import Candidate, CandidateRequest

FMS = "fms"


def load_candidate(spec: str, request: CandidateRequest, *, fms_path: Path | None) -> Candidate:
    """Build the candidate that `spec` names: "fms", or "module:factory".

    Raises UsageError for a spec that names nothing, CandidateUnavailable where it cannot be built.
    """
    if spec == FMS:
        from snapshot_tool.candidates.fms import load_fms_candidate

        return load_fms_candidate(request, fms_path=fms_path)
    if fms_path is not None:
        raise UsageError("--fms-path goes with --candidate fms", "leave one of the two out")
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise UsageError(
            f"--candidate {spec} is neither 'fms' nor 'module:factory'",
            "name an importable module and a function in it",
        )
    # Like `python -m`: a module in the current folder is found.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise CandidateUnavailable(
            f"--candidate {spec} cannot be imported: {error}",
            "check the name, and that the module is importable from here",
        ) from error
    try:
        candidate: Candidate = factory(request)
    except SnapError:
        raise
    except Exception as error:
        raise CandidateUnavailable(
            f"{spec} could not build a candidate: {type(error).__name__}: {error}"
        ) from error
    return candidate
