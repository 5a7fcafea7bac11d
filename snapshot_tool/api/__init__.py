"""The Python API: `snap check`, `record`, `verify` and `diff` as functions. See docs/python.md.

`snapshot_tool` has these functions, and imports this module when one is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.run import CheckRun
from snapshot_tool.check.sets import Verification, open_both, verify_goldens
from snapshot_tool.check.workflow import check as run_check
from snapshot_tool.diagnose.diff import SetDiff, diff_goldens
from snapshot_tool.families import name_families
from snapshot_tool.record.request import RecordRequest
from snapshot_tool.record.workflow import RecordOutcome
from snapshot_tool.record.workflow import record as run_record

_Options = ParamSpec("_Options")
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


def _takes_options_of(
    request: Callable[_Options, _Request],
) -> Callable[[Callable[[_Request], _Result]], Callable[_Options, _Result]]:
    """Decorate a function of a request so that its arguments are the request's options."""

    def decorate(function: Callable[[_Request], _Result]) -> Callable[_Options, _Result]:
        @functools.wraps(request, assigned=(), updated=())  # for inspect.signature
        def call(*arguments: _Options.args, **options: _Options.kwargs) -> _Result:
            return function(request(*arguments, **options))

        call.__name__ = call.__qualname__ = function.__name__
        call.__doc__ = function.__doc__
        return call

    return decorate


@_takes_options_of(CheckRequest)
def check(request: CheckRequest) -> CheckRun:
    """Check a candidate against a golden set. The arguments are the options of `snap check`.

    Raises SnapError if the check cannot run. Differences do not raise: see CheckRun.verdict.
    """
    name_families(request.family)
    return CheckRun(run_check(request, Progress()), Path(request.goldens))


@_takes_options_of(RecordRequest)
def record(request: RecordRequest) -> RecordOutcome:
    """Record a golden set. The arguments are the options of `snap record`.

    Raises SnapError if nothing can be recorded. With update=True the new version is written without
    confirmation, so a reason is required.
    """
    if request.update and not request.reason:
        raise UsageError("update=True needs a reason", "give the reason of the change")
    name_families(request.family)
    return run_record(request, Progress(), lambda _changes: request.reason)


def verify(golden: str | None = None, *, goldens: str | Path = "goldens") -> Sequence[Verification]:
    """Compare every byte of golden sets with the recorded digests.

    golden: the folder of a set, a part of its path, or the checkpoint's name; None: all sets.

    Raises SnapError if there is no set. Damage does not raise: see Verification.damage.
    """
    return verify_goldens(Path(goldens), golden)


def diff(one: str, other: str, *, goldens: str | Path = "goldens") -> SetDiff:
    """Return which tensors differ between two golden sets, named as for `verify`.

    Raises SnapError if a set is missing or damaged.
    """
    return diff_goldens(*open_both(Path(goldens), one, other))
