"""Implementations under test: FMS, an installed plug-in by its name, or any `module:factory`."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import cast

from snapshot_tool.base.errors import (
    CandidateUnavailable,
    EndedProcess,
    SnapError,
    UsageError,
    describe_error,
    is_out_of_memory,
)
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.protocol import (
    CANDIDATE_METHODS,
    Candidate,
    CandidateFactory,
    CandidateRequest,
)
from snapshot_tool.candidates.distributed import joined_ranks, load_on_all_ranks

FMS = "fms"
ENTRY_POINTS = "snapshot_tool.candidates"


class PlainCandidate(Candidate):
    """A user's object that is not a Candidate: what it lacks is not supported."""

    def __init__(self, own: object) -> None:
        for name in CANDIDATE_METHODS:
            method = getattr(own, name, None)
            if callable(method):
                setattr(self, name, method)


def load_candidate(spec: str, request: CandidateRequest, *, fms_path: Path | None) -> Candidate:
    """Build the candidate that `spec` names: "fms", an entry point, or "module:factory".

    With torchrun it is built on every rank, and each of its calls is made there.
    Raises UsageError for a spec that names nothing, CandidateUnavailable if it cannot be built.
    """
    ranks = joined_ranks()
    try:
        with foreign_code(f"--candidate {spec}"):
            if ranks is None:
                return build_candidate(spec, request, fms_path)
            return load_on_all_ranks(ranks, build_candidate, spec, request, fms_path)
    except EndedProcess as ended:
        raise CandidateUnavailable(
            str(ended), 'run main() only under if __name__ == "__main__":'
        ) from ended


def build_candidate(spec: str, request: CandidateRequest, fms_path: Path | None) -> Candidate:
    """Build a candidate in this process."""
    if spec == FMS:
        from snapshot_tool.candidates.fms.candidate import load_fms_candidate

        return load_fms_candidate(request, fms_path=fms_path)
    if fms_path is not None:
        raise UsageError("--fms-path goes with --candidate fms", "leave one of the two out")
    factory = _find_factory(spec)
    try:
        built = factory(request)
        return built if isinstance(built, Candidate) else PlainCandidate(built)
    except SnapError:
        raise
    except Exception as error:
        raise CandidateUnavailable(
            f"{spec} could not build a candidate: {describe_error(error)}"
        ) from error


def _find_factory(spec: str) -> CandidateFactory:
    """Import what `spec` names; a name without a colon is an entry point's."""
    # Like `python -m`: a module in the current folder is found.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module_name, _, factory_name = spec.partition(":")
    try:
        if module_name and factory_name:
            module = importlib.import_module(module_name)
            return cast("CandidateFactory", getattr(module, factory_name))
        installed = importlib.metadata.entry_points(group=ENTRY_POINTS)
        if spec in installed.names:
            return cast("CandidateFactory", installed[spec].load())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CandidateUnavailable(
            f"--candidate {spec} cannot be imported: {describe_error(error)}",
            "check the name, and that the module is importable from here",
        ) from error
    known = ", ".join(["'fms'", *sorted(map(repr, installed.names)), "'module:factory'"])
    raise UsageError(
        f"--candidate {spec} is none of {known}",
        f"name an importable module and a function in it, or an entry point of {ENTRY_POINTS}",
    )
