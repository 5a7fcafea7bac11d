"""Recordings and pulls, failed at any point: is everything old or everything new?

Each point is tried in a forked process, so that what loads slowly is loaded once. A new command
that writes golden sets is one more entry in `RECORDING` (needs Hugging Face) or `SHARING`.
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
from snapshot_tool.goldens.verify import verify_set
from tests.conftest import ROOT, contents
from tests.torture.remembered import remember_references
from tests.torture.saboteur import Kind, Saboteur
from tests.unit.factory import write_golden

Contents = dict[str, bytes]

# A model of text: recording it writes in the same way, and computes less.
_CHECKPOINT = ROOT / "tests" / "families" / "checkpoints" / "llama"
_RECORD = ("record", "--checkpoint", str(_CHECKPOINT), "--goldens", "goldens")
_SMALL = ("--variants", "1", "--max-new-tokens", "2")
_OTHER = ("--variants", "1", "--max-new-tokens", "3")
_UPDATE = (*_RECORD, "--update", "--yes", "--reason", "three tokens", *_OTHER)
_PULL = ("pull", "--goldens", "goldens")
_ENDINGS: dict[Kind, tuple[int, ...]] = {
    Kind.KILL: (-signal.SIGKILL,),
    Kind.TERMINATE: (-signal.SIGTERM,),
    Kind.INTERRUPT: (130,),
}
# A refused operation stops the run, or is one that the run can do without.
_REFUSED = (0, 3)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing to do.

    Args:
        name: as the figures name it.
        start: folder with goldens/ and what goes with it, as it is before; copied for each point.
        command: what a user runs; paths are below the copy, where the process runs.
        resume: what a user adds to go on with an unfinished recording.
        resumes: whether the run that is failed goes on with an unfinished recording.
    """

    name: str
    start: Path
    command: tuple[str, ...]
    resume: tuple[str, ...] = ()
    resumes: bool = False

    @property
    def failed(self) -> tuple[str, ...]:
        """The command that is failed."""
        return (*self.command, *self.resume) if self.resumes else self.command


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A scenario's run without a fault: contents before and after, and what it did to the disk."""

    before: Contents
    after: Contents
    operations: tuple[str, ...]


@dataclass(slots=True)
class Survival:
    """Points tried; how the sets were found afterwards; one line for each that did not survive."""

    tried: int = 0
    found: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def run_undisturbed(scenario: Scenario, workplace: Path) -> Undisturbed:
    """Run a scenario whole, and note what it does."""
    root = workplace / "undisturbed"
    shutil.copytree(scenario.start, root)
    before = contents(root / "goldens")
    log = workplace / "operations"
    status, error = run_forked(scenario.failed, root, log=log)
    if status != 0:
        raise AssertionError(f"{scenario.name} fails without a fault: {status} {error}")
    return Undisturbed(before, contents(root / "goldens"), tuple(log.read_text("utf-8").split()))


def try_points(
    scenario: Scenario, whole: Undisturbed, points: Sequence[int], workplace: Path, *, kind: Kind
) -> Survival:
    """Fail a scenario at each point, look at what is there, and go on as a user would."""
    survival = Survival()
    for point in points:
        root = workplace / f"{scenario.name.replace(' ', '-')}-{kind}-{point}"
        shutil.copytree(scenario.start, root)
        status, error = run_forked(scenario.failed, root, at=point, kind=kind)
        problems = []
        if status not in _ENDINGS.get(kind, _REFUSED):
            problems.append(f"it ended with {status}: {error}")
        if (
            "Traceback" in error
            or "fault of snap" in error
            or len(list(filter(None, error.splitlines()))) > 2
        ):
            problems.append(f"it said: {error}")
        state, found = _look(root, whole)
        survival.found[state] += 1
        problems += found
        if state == "interrupted" and kind not in (Kind.KILL, Kind.TERMINATE):
            problems.append("the old set was left renamed away")
        problems = problems or _finish(scenario, whole, root)
        survival.tried += 1
        operation = whole.operations[point - 1]
        where = f"{scenario.name}, {kind} at {point} ({operation})"
        survival.failures += [f"{where}: {problem}" for problem in problems]
        shutil.rmtree(root, ignore_errors=True)
    return survival


def _look(root: Path, whole: Undisturbed) -> tuple[str, list[str]]:
    """Read as the next user does: what is there must be whole, and all old or all new.

    If the process was killed between the two renames of a commit, readers must say so.
    """
    problems = []
    for found in find_goldens(root / "goldens"):
        if found.manifest is not None:
            problems += verify_set(found.folder)[1]
        elif "a recording was interrupted" in found.problem:
            return "interrupted", []
        else:
            problems.append(found.problem)
    there = contents(root / "goldens")
    state = "old" if there == whole.before else "new" if there == whole.after else "a mixture"
    if state == "a mixture":
        problems.append(f"a mixture: {sorted(there)}")
    return state, problems


def _finish(scenario: Scenario, whole: Undisturbed, root: Path) -> list[str]:
    """Go on as a user would; the files must be those of the undisturbed run."""
    unfinished = any(root.glob("goldens/.snap/*/*/cpu-float32"))
    if contents(root / "goldens") != whole.after or unfinished:
        command = (*scenario.command, *(scenario.resume if unfinished else ()))
        status, error = run_forked(command, root)
        if status != 0 and "is recorded already" not in error:
            return [f"going on ended with {status}: {error}"]
    if contents(root / "goldens") != whole.after:
        return ["the completed set is not the one of an undisturbed run"]
    return []


def run_forked(
    command: Sequence[str],
    root: Path,
    *,
    at: int = 0,
    kind: Kind = Kind.KILL,
    log: Path | None = None,
) -> tuple[int, str]:
    """Run the command line in a forked process inside `root`; return exit code and stderr.

    at: which operation fails; 0: none. log: takes the names of the operations that were done.
    """
    saboteur = Saboteur(root, at=at, kind=kind)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(root)
            os.dup2(theirs, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            saboteur.arm()
            code = run_here(command)
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


def run_here(command: Sequence[str]) -> int:
    """Run the command line in this process; return its exit code."""
    from snapshot_tool.cli.commands import run

    try:
        run(list(command))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _set_up(command: Sequence[str], root: Path) -> None:
    with contextlib.chdir(root):
        assert run_here(command) == 0, command


def _new(workplace: Path, name: str) -> Path:
    root = workplace / name
    (root / "goldens").mkdir(parents=True)
    return root


def _warm(command: Sequence[str], root: Path) -> None:
    """Run a command on a copy, so that every answer of the reference is remembered."""
    copy = root.with_name(f"{root.name}-warm")
    shutil.copytree(root, copy)
    _set_up(command, copy)
    shutil.rmtree(copy)


def record_first(workplace: Path) -> Scenario:
    """Record into an empty folder."""
    remember_references()
    root, command = _new(workplace, "record"), (*_RECORD, *_SMALL)
    _warm(command, root)
    return Scenario("record", root, command, ("--resume",))


def record_update(workplace: Path) -> Scenario:
    """Replace a set by another version."""
    remember_references()
    root = _new(workplace, "update")
    _set_up((*_RECORD, *_SMALL), root)
    _warm(_UPDATE, root)
    return Scenario("update", root, _UPDATE, ("--resume",))


def record_resume(workplace: Path) -> Scenario:
    """Go on with a recording that was killed before its last phase was staged."""
    first = record_first(workplace / "first")
    root = workplace / "resume"
    shutil.copytree(first.start, root)
    assert run_forked(first.command, root, at=150) == (-signal.SIGKILL, "")
    return Scenario("resume", root, first.command, ("--resume",), resumes=True)


def _share(workplace: Path, name: str, *, there: bool) -> Scenario:
    """Pull two sets from elsewhere; `there`: one of them is here already."""
    elsewhere, root = _new(workplace, f"{name}-elsewhere"), _new(workplace, name)
    remote = f"file://{workplace / f'{name}-remote'}"
    push = ("push", remote, "--goldens", "goldens")
    write_golden(elsewhere / "goldens")
    if there:
        _set_up(push, elsewhere)
        shutil.copy(elsewhere / "goldens.lock", root / "goldens.lock")
        _set_up(_PULL, root)
    write_golden(elsewhere / "goldens", device="cuda")
    _set_up(push, elsewhere)
    shutil.copy(elsewhere / "goldens.lock", root / "goldens.lock")
    return Scenario(name, root, _PULL)


def pull_first(workplace: Path) -> Scenario:
    """Pull two sets into an empty folder."""
    return _share(workplace, "pull", there=False)


def pull_another(workplace: Path) -> Scenario:
    """Pull a set beside one that is here."""
    return _share(workplace, "pull beside a set", there=True)


RECORDING: tuple[Callable[[Path], Scenario], ...] = (record_first, record_resume, record_update)
SHARING: tuple[Callable[[Path], Scenario], ...] = (pull_first, pull_another)
