"""Trying `snap` on hostile golden sets, many in one forked process that is watched and limited.

Violations are: a traceback, a fault of snap, another exit code than those of a finished run or a
refusal, more than two lines of error, control characters, a file written outside the set or by a
reader, a process started, a run that does not end, and memory that grows.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.configurations import GOLDENS, write_base, write_llama
from tests.torture.mutations import mutate as mutate_by_seed

_SECONDS = 30  # of the processor: a busy machine is no fault
_PATIENCE = 600  # seconds; what waits for something takes none of them
_MORE_MEMORY = 2**30  # bytes of address space above what the process begins with
_CODES = (0, 1, 3)
_TEMPORARY = Path(os.path.realpath(tempfile.gettempdir()))
_CHANGES = (
    "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate",
    "os.chmod",
)  # fmt: skip
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class Ground:
    """What trials begin from: a whole set, written below a folder, and how often what is run."""

    write: Callable[[Path], Path]
    commands: Mapping[str, int]


SMALL = Ground(
    write_base,
    {"list": 20, "show": 20, "json": 5, "verify": 25, "diff": 8, "check": 20, "doctor": 2},
)
# Pictures are read by what runs a candidate on them.
PICTURED = Ground(write_base, {"check": 4, "verify": 1})
# FMS builds the model that the set describes.
BUILT = Ground(write_llama, {"build": 9, "explore": 1})


@dataclass(slots=True)
class Outcome:
    """What many trials came to: counts, and one line for each thing that must not be."""

    inputs: int = 0
    runs: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    grown: int = 0  # bytes of resident memory, at most, above that of the first trials

    def add(self, other: Outcome) -> None:
        """Take in the outcome of more trials."""
        self.inputs += other.inputs
        self.runs += other.runs
        self.codes += other.codes
        self.mutations += other.mutations
        self.violations += other.violations
        self.grown = max(self.grown, other.grown)


class _Watcher:
    """An audit hook: remembers writes anywhere but in snap's temporary folders, and processes."""

    def __init__(self, cache: Path) -> None:
        self._cache = os.path.realpath(cache)
        self.listens = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.listens:
            return
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if opens or event in _CHANGES:
            self._judge(event, arguments[0])
        if event in ("os.rename", "os.link", "os.symlink"):
            self._judge(event, arguments[1])
        if event in _STARTS:
            self.seen.append(f"{event} {arguments[0]!r}")

    def _judge(self, event: str, path: Any) -> None:
        if isinstance(path, int) or str(path) == "/dev/null":
            return
        self.listens = False
        real = Path(os.path.realpath(os.fsdecode(path)))
        # Under _TEMPORARY, hypothesis gets a home; a check keeps its failures in the user's cache.
        in_home = real.parent == _TEMPORARY and real.name.startswith("snap-")
        if not (in_home or real.is_relative_to(self._cache)):
            self.seen.append(f"{event} of a reader: {real}")
        self.listens = True


Mutate = Callable[[Path, int], str]


def run_batch(
    seeds: Sequence[int],
    workplace: Path,
    *,
    mutate: Mutate = mutate_by_seed,
    ground: Ground = SMALL,
) -> Outcome:
    """Try one mutation for each seed, in a forked process."""

    def try_all() -> Outcome:
        trial = _prepare(workplace, workplace / "set", ground)
        before = _peak()
        for seed in seeds:
            shutil.rmtree(trial.place, ignore_errors=True)
            shutil.copytree(trial.base, trial.place, copy_function=os.link)
            (trial.place / "outside").mkdir()
            name = mutate(trial.folder, seed)
            trial.outcome.mutations[name] += 1
            commands, weights = list(ground.commands), list(ground.commands.values())
            chosen = random.Random(seed + 1).choices(commands, weights, k=1 + seed % 2)
            trial.run(chosen, name=f"seed {seed} {name}")
        trial.outcome.grown = _peak() - before
        return trial.outcome

    outcome = _in_child(try_all, about=f"among seeds {seeds[0]} to {seeds[-1]}")
    shutil.rmtree(workplace, ignore_errors=True)
    return outcome


def run_prepared(spoil: Callable[[Path], None], workplace: Path, *, name: str) -> Outcome:
    """Try every command on one set that is spoilt before the memory is watched."""
    (workplace / "outside").mkdir(parents=True)
    spoil(write_base(workplace))

    def try_all() -> Outcome:
        trial = _prepare(workplace, workplace, SMALL)
        before = _peak()
        trial.run(list(SMALL.commands), name=name)
        trial.outcome.grown = _peak() - before
        return trial.outcome

    outcome = _in_child(try_all, about=name)
    shutil.rmtree(workplace, ignore_errors=True)
    return outcome


def _in_child(job: Callable[[], Outcome], *, about: str) -> Outcome:
    """Return what a job in a forked process found; a process that dies is a violation as well."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        # A module that is imported here first: Python, and pytest, would keep it beside its source.
        sys.dont_write_bytecode = True
        try:
            outcome = job()
        except BaseException:
            outcome = Outcome(violations=[f"the trial itself failed: {traceback.format_exc()}"])
        with os.fdopen(theirs, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        return Outcome(violations=[f"the process died with status {status} {about}"])
    found: Outcome = pickle.loads(answer)
    return found


@dataclass(frozen=True, slots=True)
class _Trial:
    """A spoilt set at `place` beside a whole one at `base`."""

    place: Path
    base: Path
    watcher: _Watcher
    outcome: Outcome

    @property
    def folder(self) -> Path:
        """The spoilt set's folder."""
        (folder,) = (self.place / GOLDENS).glob("local--*/*/cpu-float32")
        return folder

    def run(self, commands: Sequence[str], *, name: str) -> None:
        """Run commands on the spoilt set and note what must not be."""
        secret = self.place / "outside" / "secret"
        secret.write_bytes(b"secret")
        folder = self.folder
        self.outcome.inputs += 1
        for command in dict.fromkeys(commands):
            self.watcher.seen.clear()
            arguments = _arguments(command, self.place, self.base, folder)
            code, out, err = _run(arguments, self.watcher)
            self.outcome.runs += 1
            self.outcome.codes[str(code)] += 1
            problems = [*_problems(command, code, out, err), *self.watcher.seen]
            if secret.read_bytes() != b"secret":
                problems.append("a file outside the set was changed")
            self.outcome.violations += [f"{name} {command}: {p}" for p in problems]


def _prepare(workplace: Path, place: Path, ground: Ground) -> _Trial:
    """Write the whole set, do what libraries do on first use, and limit the memory."""
    base = workplace / "base"
    folder = ground.write(base)
    os.environ["XDG_CACHE_HOME"] = str(workplace / "cache")
    watcher = _Watcher(workplace / "cache")
    for command in ground.commands:
        code, _, err = _run(_arguments(command, base, base, folder), watcher)
        assert code in _CODES, err
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return _Trial(place, base, watcher, Outcome())


def _arguments(command: str, place: Path, base: Path, folder: Path) -> list[str]:
    goldens = ["--goldens", str(place / GOLDENS)]
    match command:
        case "json":
            return ["show", "--json", *goldens]
        case "diff":
            (whole,) = (base / GOLDENS).glob("*/*/cpu-float32")
            return ["diff", str(whole), str(folder), *goldens]
        case "check":
            return ["check", "--candidate", "tests.torture.configurations:Zeros", *goldens]
        case "build":
            return ["check", "--case", "variant-02", *goldens]
        case "explore":
            return ["check", "--case", "variant-02", "--explore", "6", *goldens]
        case _:
            return [command, *goldens]


def _run(arguments: list[str], watcher: _Watcher) -> tuple[int | str, str, str]:
    """Run the command line in this process, for a limited time."""
    from snapshot_tool.cli.commands import run

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    signal.alarm(_PATIENCE)
    code: int | str = "none"
    watcher.listens = True
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else str(end.code)
    except BaseException:
        code, _ = "raised", err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        watcher.listens = False
    return code, out.getvalue(), err.getvalue()


class _TooLongError(BaseException):
    """The time of one run is over."""


def _too_long(_signal: int, _frame: Any) -> None:
    raise _TooLongError


def _problems(command: str, code: int | str, out: str, err: str) -> list[str]:
    problems = []
    several = code == 2 and "golden sets" in err  # a question of usage: which of them
    if code not in _CODES and not several:
        problems.append(f"exit {code}: {err[-600:]}")
    if "Traceback" in err or "fault of snap" in err or "not enough memory" in err:
        problems.append(err[-900:])
    if code == 3 and command not in ("list", "verify", "doctor") and not 1 <= err.count("\n") <= 2:
        problems.append(f"{err.count(chr(10))} lines of error: {err[:300]!r}")
    if any(ord(sign) < 32 and sign != "\n" for sign in out + err):
        problems.append(f"control characters: {(out + err)[:300]!r}")
    return problems


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
