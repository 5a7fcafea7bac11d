"""Which commit of FMS broke a port: git bisect over its repository, with the quick check.

Every commit is checked in a process of its own, since one process can import one FMS only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from snapshot_tool.base.errors import SnapError, UsageError, printable
from snapshot_tool.base.protocol import Progress

# Variables that git sets in hooks, and that would lead it to another repository than the one named.
_LEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit as people read it; `day` is that of the author."""

    sha: str
    author: str
    day: str
    subject: str

    def __str__(self) -> str:
        """Name it on one line."""
        return f"{self.sha[:12]} {self.subject}"


def run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, without its hooks."""
    environment = {name: value for name, value in os.environ.items() if name not in _LEADING}
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "-c", f"core.hooksPath={os.devnull}", *arguments],  # noqa: S607
            env={**environment, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise SnapError("git is not installed here", "install git") from error


def ask_git(folder: Path, *arguments: str) -> str:
    """Return what git prints; raise SnapError with its first line where it fails."""
    answer = run_git(folder, *arguments)
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or "no message").splitlines()[0]
        raise SnapError(f"git {arguments[0]} fails in {folder}: {said}")
    return answer.stdout.strip()


def find_commit(repository: Path, name: str) -> Commit:
    """Return the commit that a SHA, branch or tag stands for."""
    if not repository.is_dir() or run_git(repository, "rev-parse", "--git-dir").returncode != 0:
        raise UsageError(f"{repository} is no git repository", "pass the root of a checkout")
    found = run_git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options",
                    f"{name}^{{commit}}")  # fmt: skip
    if found.returncode != 0:
        raise UsageError(f"{repository} has no commit {name!r}", "pass a SHA, branch or tag of it")
    return read_commit(repository, found.stdout.strip())


def read_commit(repository: Path, sha: str) -> Commit:
    """Return a commit by its full SHA."""
    said = ask_git(repository, "show", "-s", "--format=%H%n%an%n%as%n%s", sha)
    return Commit(*(printable(line) for line in said.split("\n")))


@contextmanager
def temporary_worktree(repository: Path, commit: Commit) -> Iterator[Path]:
    """Check a commit out in a temporary folder while the block runs.

    Yields the folder that corresponds to `repository`, which may lie below the repository's root.
    However the block ends, by Ctrl-C or SIGTERM too, nothing of the worktree is left.
    """
    prefix = ask_git(repository, "rev-parse", "--show-prefix")
    with _interruptible_by_sigterm():
        holder = Path(tempfile.mkdtemp(prefix="snap-worktree-"))
        root = holder / "fms"
        try:
            # Half a worktree would stay registered, locked, in the repository.
            with _interrupts_deferred():
                ask_git(repository, "worktree", "add", "--quiet", "--detach", str(root), commit.sha)
            yield root / prefix
        finally:
            with _interrupts_deferred():
                run_git(repository, "worktree", "remove", "--force", str(root))
                shutil.rmtree(holder, ignore_errors=True)


@contextmanager
def _interruptible_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what it holds is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Finish the block, and the git that it runs, before a Ctrl-C or SIGTERM is heard."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_PASSED, _DIFFERS, _WRONG_USAGE, _CANNOT_RUN = range(4)  # exit codes of `snap check`
_FOUND = re.compile(r"^# first bad commit: \[([0-9a-f]+)\]", re.MULTILINE)
_LEFT = re.compile(r"^# possible first bad commit: \[([0-9a-f]+)\]", re.MULTILINE)

Mark = Literal["good", "bad", "skip"]


@dataclass(frozen=True, slots=True)
class BisectRequest:
    """What to search; `options` are given to every `snap check` as they are."""

    fms_path: Path
    good: str
    bad: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """One commit that was checked.

    Args:
        commit: the commit.
        mark: good, bad, or skip where it could not be checked.
        reason: why it is bad or was skipped.
        phase, case: where it differs first; empty unless it is bad.
        module: the reference's name of the module that the fault is in, with the candidate's; empty
            where none has it.
    """

    commit: Commit
    mark: Mark
    reason: str = ""
    phase: str = ""
    case: str = ""
    module: str = ""

    def __str__(self) -> str:
        """Tell it on one line."""
        place = f"{self.phase}, case {self.case}" if self.mark == "bad" else self.reason
        return f"{self.mark:<5}{self.commit}" + (f" ({place})" if place else "")


@dataclass(frozen=True, slots=True)
class BisectOutcome:
    """What was found.

    Args:
        first_bad: the commit that broke it; None where commits that cannot be checked hide it.
        suspects: the commits that it may be, where `first_bad` is None.
        trials: how many commits were checked.
    """

    first_bad: Trial | None
    suspects: tuple[Commit, ...]
    trials: int


def bisect(request: BisectRequest, progress: Progress) -> BisectOutcome:
    """Find the first commit after `good` that the check fails, up to `bad`."""
    good = find_commit(request.fms_path, request.good)
    bad = find_commit(request.fms_path, request.bad)
    if good.sha == bad.sha:
        raise UsageError(f"--good and --bad are both {good}", "name two commits")
    with temporary_worktree(request.fms_path, good) as folder:
        search = _Search(folder, request.options, progress, {})
        search.require_ends(good, bad)
        return search.run(good, bad)


@dataclass(frozen=True, slots=True)
class _Search:
    """A bisection in a worktree; `trials` by SHA, filled as it goes on."""

    folder: Path
    options: tuple[str, ...]
    progress: Progress
    trials: dict[str, Trial]

    def require_ends(self, good: Commit, bad: Commit) -> None:
        """Check both ends; raise unless the good one passes and the bad one does not."""
        ends = []
        for name, commit in (("good", good), ("bad", bad)):
            ask_git(self.folder, "checkout", "--quiet", "--detach", commit.sha)
            trial = self._try(commit)
            if trial.mark == "skip":
                raise SnapError(f"--{name} {commit} cannot be checked: {trial.reason}")
            ends.append(trial)
        match [trial.mark for trial in ends]:
            case ["bad", "good"]:
                problem = f"{good} fails and {bad} passes: --good and --bad are swapped"
                remedy = "swap them"
            case ["bad", _]:
                problem = f"--good {good} fails already: {ends[0].phase}, case {ends[0].case}"
                remedy = "name an older commit, one that passes"
            case [_, "good"]:
                problem = f"--bad {bad} passes: there is nothing to look for"
                remedy = "name a commit that snap check fails, with the same options"
            case _:
                return
        raise UsageError(problem, remedy)

    def run(self, good: Commit, bad: Commit) -> BisectOutcome:
        """Let git choose commits until it knows."""
        log = self._tell("start", bad.sha, good.sha)
        while not (_FOUND.search(log) or _LEFT.search(log)):
            trial = self._try(read_commit(self.folder, "HEAD"))
            log = self._tell(trial.mark)
        found = _FOUND.search(log)
        if found:
            return BisectOutcome(self.trials[found[1]], (), len(self.trials))
        suspects = tuple(read_commit(self.folder, sha) for sha in _LEFT.findall(log))
        return BisectOutcome(None, suspects, len(self.trials))

    def _tell(self, *words: str) -> str:
        """Tell git bisect a verdict and return its log; raise where it cannot go on."""
        before = run_git(self.folder, "bisect", "log").stdout
        answer = run_git(self.folder, "bisect", *words)
        log = run_git(self.folder, "bisect", "log").stdout
        if answer.returncode != 0 and not (_FOUND.search(log) or _LEFT.search(log)):
            said = (answer.stdout.strip() or answer.stderr.strip()).splitlines()
            raise SnapError(
                f"git bisect cannot go on: {said[0] if said else 'no message'}",
                "--good must be an ancestor of --bad",
            )
        if log == before:
            raise SnapError("git bisect does not go on", "run it again")
        return log

    def _try(self, commit: Commit) -> Trial:
        trial = _check(self.folder, commit, self.options)
        self.trials[commit.sha] = trial
        self.progress.note(str(trial))
        return trial


def _check(folder: Path, commit: Commit, options: tuple[str, ...]) -> Trial:
    """Run `snap check --quick` on the commit that is checked out."""
    with TemporaryDirectory(prefix="snap-report-") as holder:
        path = Path(holder) / "report.json"
        own = ["--quick", "--candidate", "fms", "--fms-path", str(folder), "--json", str(path)]
        answer = subprocess.run(
            [sys.executable, "-m", "snapshot_tool", "check", *options, *own],
            # A file of the same size, written within the same second, would look compiled already.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    said = answer.stderr.strip().removeprefix("snap: ").replace(str(folder), "the checkout")
    first = next(iter(said.splitlines()), "")
    match answer.returncode:
        case code if code == _PASSED and report:
            return Trial(commit, "good")
        case code if code == _DIFFERS and report:
            return _failed_trial(commit, report["first_divergence"])
        case code if code == _CANNOT_RUN:
            return Trial(commit, "skip", first or "nothing was compared")
        case code if code == _WRONG_USAGE:
            raise UsageError(f"snap check refuses its options: {said.splitlines()[-1]}")
    raise SnapError(f"snap check ended with {answer.returncode} on {commit}: {first}")


def _failed_trial(commit: Commit, first: dict[str, Any]) -> Trial:
    module = first.get("module") or ""
    if module and first.get("candidate_module"):
        module += f" ({first['candidate_module']})"
    return Trial(commit, "bad", first["reason"], first["phase"], first["case"], module)
