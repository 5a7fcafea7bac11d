"""Scenarios that write golden sets, failed at any point: is everything old or everything new?

A scenario is what `snap` is asked to do in a folder; the list of them is in `scenarios.py`. Each
point is tried in a forked process, so that what loads slowly is loaded once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.verify import find_damage
from tests.torture.saboteur import Kind, Saboteur

Contents = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at which operation; at 0: nothing."""

    at: int
    kind: Kind


NOTHING = Fault(0, Kind.KILL)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to do.

    Args:
        name: as the figures name it.
        start: folder with goldens/ and what goes with it, as it is before; copied for each point.
        command: what is failed; paths are below the copy, where the process runs.
        go_on: what a user does after a crash, given whether a recording was left unfinished.
        set_up: done in the forked process first, such as taking a system's ability away.
    """

    name: str
    start: Path
    command: tuple[str, ...]
    go_on: Callable[[bool], tuple[str, ...]]
    set_up: Callable[[], None] = field(default=lambda: None)


@dataclass(slots=True)
class Survival:
    """Points tried; how the sets were found afterwards; one line for each that did not survive."""

    tried: int = 0
    found: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A scenario's run without a fault: contents before and after, and what it did to the disk."""

    before: Contents
    after: Contents
    operations: tuple[str, ...]


def contents(root: Path) -> Contents:
    """Return every file of the golden sets below a scenario's folder."""
    goldens = root / "goldens"
    return {
        path.relative_to(goldens).as_posix(): path.read_bytes()
        for path in sorted(goldens.rglob("*"))
        if path.is_file() and ".snap" not in path.parts
    }


def run_undisturbed(scenario: Scenario, workplace: Path) -> Undisturbed:
    """Run a scenario whole, and note what it does."""
    root = workplace / "undisturbed"
    shutil.copytree(scenario.start, root)
    before = contents(root)
    log = workplace / "operations"
    status, error = run_scenario(scenario, scenario.command, root, NOTHING, log=log)
    if status != 0:
        raise AssertionError(f"{scenario.name} fails without a fault: {status} {error}")
    return Undisturbed(before, contents(root), tuple(log.read_text("utf-8").split()))


def try_points(
    scenario: Scenario,
    whole: Undisturbed,
    points: Sequence[int],
    workplace: Path,
    *,
    kind: Kind = Kind.KILL,
) -> Survival:
    """Fail a scenario at each point, look at what is there, and go on as a user would."""
    survival = Survival()
    for point in points:
        root = workplace / f"{scenario.name.replace(' ', '-')}-{kind}-{point}"
        shutil.copytree(scenario.start, root)
        status, error = run_scenario(scenario, scenario.command, root, Fault(point, kind))
        operation = whole.operations[point - 1]
        problems = [
            *ending_problems(_ENDINGS.get(kind, _REFUSED), status, error),
            *look(root, whole, survival),
        ]
        problems = problems or finish(scenario, whole, root)
        survival.tried += 1
        survival.operations[operation] += 1
        survival.failures += [
            f"{scenario.name}, {kind} at {point} ({operation}): {problem}" for problem in problems
        ]
        shutil.rmtree(root, ignore_errors=True)
    return survival


_ENDINGS: dict[Kind, tuple[int, ...]] = {
    Kind.KILL: (-signal.SIGKILL,),
    Kind.TERMINATE: (-signal.SIGTERM,),
    Kind.INTERRUPT: (130,),
}
# A refused operation stops the run, or is one that the run can do without.
_REFUSED = (0, 3)


def ending_problems(wanted: Sequence[int], status: int, error: str) -> list[str]:
    """Say what is wrong with how the process ended."""
    problems = []
    if status not in wanted:
        problems.append(f"it ended with {status}: {error}")
    if "Traceback" in error or "fault of snap" in error or len(error.splitlines()) > 2:
        problems.append(f"it said: {error}")
    return problems


def look(root: Path, whole: Undisturbed, survival: Survival) -> list[str]:
    """Read as the next user does: what is there must be whole, and all old or all new."""
    problems = []
    for found in find_goldens(root / "goldens"):
        if found.manifest is None:
            problems.append(found.problem)
        else:
            problems += find_damage(found.folder, load_manifest(found.folder))
    there = contents(root)
    state = "old" if there == whole.before else "new" if there == whole.after else "a mixture"
    survival.found[state] += 1
    if state == "a mixture":
        other = [k for k in there if there[k] != whole.after.get(k)]
        problems.append(f"a mixture: {sorted(there)}, not as after: {other}")
    return problems


def finish(scenario: Scenario, whole: Undisturbed, root: Path) -> list[str]:
    """Go on as a user would; the files must be those of the undisturbed run."""
    unfinished = any(root.glob("goldens/.snap/*/*/cpu-float32"))
    if contents(root) != whole.after or unfinished:
        command = scenario.go_on(unfinished)
        status, error = run_scenario(scenario, command, root, NOTHING)
        already = "is recorded already" in error
        if status != 0 and not already:
            return [f"going on ended with {status}: {error}"]
    if contents(root) != whole.after:
        return ["the completed set is not the one of an undisturbed run"]
    return []


def run_scenario(
    scenario: Scenario, command: Sequence[str], root: Path, fault: Fault, *, log: Path | None = None
) -> tuple[int, str]:
    """Run the command line in a forked process inside `root`; return exit code and stderr.

    `log` takes the names of the operations that were done.
    """
    saboteur = Saboteur(root, at=fault.at, kind=fault.kind)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _enter(root, theirs)
            scenario.set_up()
            saboteur.arm()
            code = _call(command)
            if log is not None:
                os.write(os.open(log, os.O_WRONLY | os.O_CREAT), " ".join(saboteur.done).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, encoding="utf-8") as pipe:
        error = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), error


def _enter(root: Path, errors: int) -> None:
    """Make a forked process one of its own: folder, outputs, signals.

    errors: a pipe for stderr, which no limit on files stops.
    """
    os.chdir(root)
    os.dup2(errors, 2)
    os.close(errors)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(command: Sequence[str]) -> int:
    from snapshot_tool.cli import main

    try:
        main(list(command))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0
