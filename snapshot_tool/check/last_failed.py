"""The failures of the last check of a golden set, for --last-failed.

They are stored in the user's cache, since a check writes nothing below the goldens folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.results import Result, Verdict

# A case and a phase.
Run = tuple[str, Phase]


def read_failed(golden: Path) -> set[Run]:
    """Return the runs that failed in the last check of a golden set; empty if unknown."""
    try:
        return msgspec.json.decode(_path(golden).read_bytes(), type=set[Run])
    except (OSError, RuntimeError, msgspec.DecodeError):
        return set()


def keep_failed(golden: Path, ran: Iterable[Run], results: Iterable[Result]) -> None:
    """Store the runs that failed now, and those that failed before and did not run again."""
    bad = (Verdict.FAIL, Verdict.ERROR)
    failed = {(result.case, result.phase) for result in results if result.verdict in bad}
    failed |= read_failed(golden) - set(ran)
    try:
        path = _path(golden)
        if not failed:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(sorted(failed)))
    except (OSError, RuntimeError):  # the cache cannot be written: the next check runs everything
        return


def _path(golden: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    # Two repositories may have a set of the same name.
    name = hashlib.sha256(os.fsencode(golden.resolve())).hexdigest()[:32]
    return Path(cache, "fms-snap", "last-failed", f"{name}.json")
