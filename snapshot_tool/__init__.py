"""snap: golden references for model ports.

The names below are the Python API (docs/python.md). Importing this package imports nothing else, so
that `snap --help` and pytest start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from snapshot_tool.base import __version__ as __version__

if TYPE_CHECKING:
    from snapshot_tool.api import check, diff, record, verify
    from snapshot_tool.base.errors import (
        AnswersInvalid,
        CandidateUnavailable,
        CheckpointUnavailable,
        DeviceUnavailable,
        FamilyInvalid,
        GoldenDamaged,
        GoldenExists,
        GoldenLocked,
        GoldenNotFound,
        LockInvalid,
        ManifestInvalid,
        ReferenceUnavailable,
        ReferenceWrong,
        RemoteUnavailable,
        RevisionMismatch,
        SnapError,
        TraceInvalid,
        UpdateDeclined,
        UsageError,
    )
    from snapshot_tool.base.results import Result, Verdict
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.check.sets import Verification
    from snapshot_tool.diagnose.diff import SetDiff
    from snapshot_tool.record.workflow import RecordOutcome

__all__ = [
    "AnswersInvalid",
    "CandidateUnavailable",
    "CheckRun",
    "CheckpointUnavailable",
    "DeviceUnavailable",
    "FamilyInvalid",
    "GoldenDamaged",
    "GoldenExists",
    "GoldenLocked",
    "GoldenNotFound",
    "LockInvalid",
    "ManifestInvalid",
    "RecordOutcome",
    "ReferenceUnavailable",
    "ReferenceWrong",
    "RemoteUnavailable",
    "Result",
    "RevisionMismatch",
    "SetDiff",
    "SnapError",
    "TraceInvalid",
    "UpdateDeclined",
    "UsageError",
    "Verdict",
    "Verification",
    "check",
    "diff",
    "record",
    "verify",
]

_MODULES = {
    **dict.fromkeys(("check", "diff", "record", "verify"), "api"),
    **dict.fromkeys(("Result", "Verdict"), "base.results"),
    "CheckRun": "check.run",
    "RecordOutcome": "record.workflow",
    "SetDiff": "diagnose.diff",
    "Verification": "check.sets",
}

# Importing a folder sets its name here, but only at its first import. Afterwards `check` and
# `record` can name functions.
for _folder in ("check", "record"):
    importlib.import_module(f"{__name__}.{_folder}")
    del globals()[_folder]


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'base.errors')}")
    return globals().setdefault(name, getattr(module, name))
