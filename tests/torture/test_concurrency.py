"""Several processes at one golden set: everybody reads one whole version."""

from __future__ import annotations

from pathlib import Path

from tests.torture.concurrency import meet


def test_readers_see_one_whole_version_while_a_recorder_replaces_it(tmp_path: Path) -> None:
    """Never a mixture, never a false alarm of damage."""
    meeting = meet(tmp_path, readers=2, rounds=60)
    assert meeting.failures == []
    assert meeting.versions["1"] > 0
    assert meeting.versions["2"] > 0
