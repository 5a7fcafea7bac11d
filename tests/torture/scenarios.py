"""What is failed at every point: whatever of `snap` writes golden sets.

A new command that writes is one more entry in `RECORDING` (needs Hugging Face) or `SHARING`.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshot_tool.goldens import transaction
from tests.conftest import CHECKPOINT
from tests.torture.kill_points import Fault, Scenario, run_scenario
from tests.torture.remembered import remember_references
from tests.torture.saboteur import Kind
from tests.unit.factory import write_golden

_RECORD = ("record", "--checkpoint", str(CHECKPOINT), "--goldens", "goldens")
_SMALL = ("--variants", "1", "--max-new-tokens", "2")
_OTHER = ("--variants", "1", "--max-new-tokens", "3")
_UPDATE = (*_RECORD, "--update", "--yes", "--reason", "three tokens", *_OTHER)


def snap_here(command: tuple[str, ...], folder: Path) -> None:
    """Run the command line in this process, inside a folder; it must succeed."""
    from snapshot_tool.cli import main

    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.raises(SystemExit) as end:
            main(list(command))
    finally:
        os.chdir(before)
    assert end.value.code == 0, command


def _new(workplace: Path, name: str) -> Path:
    root = workplace / name
    (root / "goldens").mkdir(parents=True)
    return root


def _resume(command: tuple[str, ...]) -> Callable[[bool], tuple[str, ...]]:
    return lambda unfinished: (*command, "--resume") if unfinished else command


def _without_exchange() -> None:
    """As on a system that cannot exchange two folders in one step."""
    setattr(transaction, "_exchange", lambda _one, _other: False)  # noqa: B010 - mypy knows its type


def record_first(workplace: Path) -> Scenario:
    """Record into an empty folder."""
    command = (*_RECORD, *_SMALL)
    root = _new(workplace, "record")
    remember_references()
    warm = _new(workplace, "warm")
    snap_here(command, warm)  # so that every answer is remembered
    shutil.rmtree(warm)
    return Scenario("record", root, command, _resume(command))


def record_update(workplace: Path) -> Scenario:
    """Replace a set by another version."""
    root = _new(workplace, "update")
    remember_references()
    snap_here((*_RECORD, *_SMALL), root)
    warm = workplace / "warm-update"
    shutil.copytree(root, warm)
    snap_here(_UPDATE, warm)
    shutil.rmtree(warm)
    return Scenario("update", root, _UPDATE, _resume(_UPDATE))


def record_update_by_two_renames(workplace: Path) -> Scenario:
    """The same where folders cannot be exchanged."""
    update = record_update(workplace / "renames")
    return Scenario("update by two renames", update.start, _UPDATE, update.go_on, _without_exchange)


def record_resume(workplace: Path) -> Scenario:
    """Go on with a recording that was killed before its last phase was staged."""
    first = record_first(workplace / "first")
    root = workplace / "resume"
    shutil.copytree(first.start, root)
    fault = Fault(at=90, kind=Kind.KILL)
    assert run_scenario(first, first.command, root, fault) == (-signal.SIGKILL, "")
    command = (*first.command, "--resume")
    return Scenario("resume", root, command, _resume(first.command))


def _share(workplace: Path, name: str, *, there: bool) -> Path:
    """Push two sets from elsewhere; `there`: an older version of one of them lies here already."""
    elsewhere = _new(workplace, f"{name}-elsewhere")
    write_golden(elsewhere / "goldens")
    remote = f"file://{workplace / f'{name}-remote'}"
    root = _new(workplace, name)
    if there:
        snap_here(("push", remote, "--goldens", "goldens"), elsewhere)
        shutil.copy(elsewhere / "goldens.lock", root / "goldens.lock")
        snap_here(("pull", "--goldens", "goldens"), root)
    write_golden(elsewhere / "goldens", device="cuda")
    snap_here(("push", remote, "--goldens", "goldens"), elsewhere)
    shutil.copy(elsewhere / "goldens.lock", root / "goldens.lock")
    return root


def pull_first(workplace: Path) -> Scenario:
    """Pull two sets into an empty folder."""
    command = ("pull", "--goldens", "goldens")
    root = _share(workplace, "pull", there=False)
    return Scenario("pull", root, command, lambda _unfinished: command)


def pull_another(workplace: Path) -> Scenario:
    """Pull a set beside one that lies here."""
    command = ("pull", "--goldens", "goldens")
    root = _share(workplace, "pull-another", there=True)
    return Scenario("pull beside a set", root, command, lambda _unfinished: command)


RECORDING: tuple[Callable[[Path], Scenario], ...] = (
    record_first,
    record_resume,
    record_update,
    record_update_by_two_renames,
)
SHARING: tuple[Callable[[Path], Scenario], ...] = (pull_first, pull_another)
