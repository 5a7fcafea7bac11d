"""Scenarios that write golden sets where the system really refuses: nothing is injected here.

A disk that fills up, a file system or a folder that is read-only, too few open files, too small
ones. Whatever was written then, all of it is old or all of it is new, and going on completes it.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture import kill_points
from tests.torture.kill_points import Scenario, Survival, Undisturbed, contents
from tests.torture.namespaces import (
    call_with_mounts,
    drop_powers,
    make_read_only,
    mount_memory,
    resize_memory,
)

_ROOM = 2**28  # bytes; more than any scenario here writes
_FILES = 40
_PAGE = resource.getpagesize()


@dataclass(slots=True)
class Tried:
    """How often a surrounding was tried, refused the scenario, and let it pass; what went wrong."""

    tried: int = 0
    refused: int = 0
    completed: int = 0
    failures: list[str] = field(default_factory=list)


Surrounding = Callable[[Scenario, Undisturbed, Path, int], Iterator[Tried]]


def try_surrounding(
    name: str, scenario: Scenario, whole: Undisturbed, workplace: Path, *, count: int
) -> Tried:
    """Run a scenario in a surrounding of `SURROUNDINGS`, in `count` grades of it.

    Raises MountRefusedError where it takes a mount and the system permits none.
    """
    total = Tried()
    for one in SURROUNDINGS[name](scenario, whole, workplace, count):
        total.tried += one.tried
        total.refused += one.refused
        total.completed += one.completed
        total.failures += [f"{scenario.name}, {name}: {failure}" for failure in one.failures]
    return total


def _judge(
    scenario: Scenario, whole: Undisturbed, root: Path, relieve: Callable[[], object]
) -> Tried:
    """Run in the surrounding as it is; then look, relieve it, and go on as a user would."""
    status, error = kill_points.run_scenario(scenario, scenario.command, root, kill_points.NOTHING)
    problems = kill_points.ending_problems((0, 3), status, error)
    if status == 3 and not error.strip():
        problems.append("it said nothing")
    relieve()
    calm = dataclasses.replace(scenario, set_up=_nothing)
    problems += kill_points.look(root, whole, Survival())
    if status == 0 and contents(root) != whole.after:
        problems.append("it ended with 0 and is not complete")
    problems = problems or kill_points.finish(calm, whole, root)
    return Tried(1, int(status == 3), int(status == 0), problems)


def _nothing() -> None:
    """Leave the process as it is."""


def _copy(scenario: Scenario, workplace: Path, name: str) -> Path:
    root = workplace / name.replace(" ", "-")
    shutil.copytree(scenario.start, root)
    return root


def _on_a_small_disk(
    scenario: Scenario, whole: Undisturbed, workplace: Path, count: int
) -> Iterator[Tried]:
    """Sizes from what is there already to more than enough."""
    files = (path for path in scenario.start.rglob("*") if path.is_file())
    before = 1 + _pages(path.stat().st_size for path in files)  # no size at all is no limit
    needed = 5 * _pages(map(len, whole.after.values()))
    for step in range(count):
        size = (before + needed * step // count) * _PAGE if step < count - 1 else _ROOM

        def limit(root: Path, size: int = size) -> None:
            resize_memory(root, size=size)

        yield _mounted(scenario, whole, workplace / f"disk-{step}", limit)


def _pages(sizes: Iterable[int]) -> int:
    return sum(-(-size // _PAGE) for size in sizes)


def _on_a_read_only_disk(
    scenario: Scenario, whole: Undisturbed, workplace: Path, _count: int
) -> Iterator[Tried]:
    yield _mounted(scenario, whole, workplace / "read-only", make_read_only)


def _mounted(
    scenario: Scenario, whole: Undisturbed, root: Path, limit: Callable[[Path], object]
) -> Tried:
    """Judge a scenario on a file system of its own that is limited once it holds the start."""

    def job() -> dict[str, Any]:
        root.mkdir(parents=True)
        mount_memory(root, size=_ROOM)
        shutil.copytree(scenario.start, root, dirs_exist_ok=True)
        limit(root)
        tried = _judge(scenario, whole, root, lambda: resize_memory(root, size=_ROOM))
        return dataclasses.asdict(tried)

    return Tried(**call_with_mounts(job))


def _in_a_read_only_folder(
    scenario: Scenario, whole: Undisturbed, workplace: Path, _count: int
) -> Iterator[Tried]:
    """The goldens folder, and every folder in it: without root's powers."""
    root = _copy(scenario, workplace, "folder")
    folders = [root / "goldens", *(p for p in (root / "goldens").rglob("*") if p.is_dir())]
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(0o555)

    def relieve() -> None:
        for folder, mode in modes.items():
            folder.chmod(mode)

    def set_up() -> None:
        scenario.set_up()
        drop_powers()

    yield _judge(dataclasses.replace(scenario, set_up=set_up), whole, root, relieve)


def _with_few_open_files(
    scenario: Scenario, whole: Undisturbed, workplace: Path, count: int
) -> Iterator[Tried]:
    """From none beyond those that are open to more than enough."""
    for step in range(count):

        def limit(more: int = _FILES * step // max(count - 1, 1)) -> None:
            scenario.set_up()
            first_free = os.dup(1)
            os.close(first_free)
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + more, most))

        root = _copy(scenario, workplace, f"files-{step}")
        yield _judge(dataclasses.replace(scenario, set_up=limit), whole, root, _nothing)


def _with_small_files(
    scenario: Scenario, whole: Undisturbed, workplace: Path, count: int
) -> Iterator[Tried]:
    """A limit on the size of a file (ulimit -f), from nothing to the largest of the set."""
    largest = max(map(len, whole.after.values()))
    for step in range(count):

        def limit(size: int = largest * step // max(count - 1, 1)) -> None:
            scenario.set_up()
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

        root = _copy(scenario, workplace, f"small-{step}")
        yield _judge(dataclasses.replace(scenario, set_up=limit), whole, root, _nothing)


SURROUNDINGS: dict[str, Surrounding] = {
    "full disk": _on_a_small_disk,
    "read-only disk": _on_a_read_only_disk,
    "read-only folder": _in_a_read_only_folder,
    "few open files": _with_few_open_files,
    "small files": _with_small_files,
}
