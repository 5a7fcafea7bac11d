"""Find the commit of FMS that broke a port, by git bisect and the quick check.

Every commit is checked in its own process, because a process can import only one FMS.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from snapshot_tool.base.errors import SnapError, UsageError, printable
from snapshot_tool.base.protocol import Progress

# Variables that git sets in hooks. They would select another repository.
_HOOK_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit; `day` is the author date."""

    sha: str
    author: str
    day: str
    subject: str

    def __str__(self) -> str:
        """Name it on one line."""
        return f"{self.sha[:12]} {self.subject}"


def run_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, without its hooks."""
    environment = {name: value for name, value in os.environ.items() if name not in _HOOK_VARIABLES}
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


def read_git(folder: Path, *arguments: str) -> str:
    """Return the output of git; raise SnapError with its first line if it fails."""
    answer = run_git(folder, *arguments)
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip() or "no message").splitlines()[0]
        raise SnapError(f"git {arguments[0]} failed in {folder}: {said}")
    return answer.stdout.strip()


def find_commit(repository: Path, name: str) -> Commit:
    """Return the commit of a SHA, branch or tag."""
    if not repository.is_dir() or run_git(repository, "rev-parse", "--git-dir").returncode != 0:
        raise UsageError(f"{repository} is not a git repository", "pass the root of a checkout")
    found = run_git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options",
                    f"{name}^{{commit}}")  # fmt: skip
    if found.returncode != 0:
        raise UsageError(f"{repository} has no commit {name!r}", "pass a SHA, branch or tag")
    return read_commit(repository, found.stdout.strip())


def read_commit(repository: Path, sha: str) -> Commit:
    """Return a commit by its full SHA."""
    said = read_git(repository, "show", "-s", "--format=%H%n%an%n%as%n%s", sha)
    return Commit(*(printable(line) for line in said.split("\n")))


@contextmanager
def temporary_worktree(repository: Path, commit: Commit) -> Iterator[Path]:
    """Check a commit out in a temporary folder while the block runs.

    Yields the folder that corresponds to `repository`, which may be below the repository's root.
    The worktree is removed when the block ends, also by Ctrl-C or SIGTERM.
    """
    prefix = read_git(repository, "rev-parse", "--show-prefix")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    holder = Path(tempfile.mkdtemp(prefix="snap-worktree-"))
    root = holder / "fms"
    try:
        # An unfinished worktree would remain registered and locked in the repository.
        with _interrupts_deferred():
            read_git(repository, "worktree", "add", "--quiet", "--detach", str(root), commit.sha)
        yield root / prefix
    finally:
        with _interrupts_deferred():
            run_git(repository, "worktree", "remove", "--force", str(root))
            shutil.rmtree(holder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the block, and the git that it runs, are finished."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_PASSED, _DIFFERS, _WRONG_USAGE, _CANNOT_RUN = range(4)  # exit codes of `snap check`
# A check also fails if only weights or fields of the configuration differ.
_NO_DIVERGENCE = {"phase": "weights", "case": "all", "reason": "no output differs: see snap check"}
_FOUND = re.compile(r"^# first bad commit: \[([0-9a-f]+)\]", re.MULTILINE)
_LEFT = re.compile(r"^# possible first bad commit: \[([0-9a-f]+)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Trial:
    """One commit and its mark for git bisect: "skip" if it could not be checked.

    For a bad commit, phase and case are the first that differ. `module` is the first bad module, by
    its name in the reference and the candidate; "" if none is known.
    """

    commit: Commit
    mark: Literal["good", "bad", "skip"]
    reason: str = ""
    phase: str = ""
    case: str = ""
    module: str = ""

    def __str__(self) -> str:
        """Describe it on one line."""
        place = f"{self.phase}, case {self.case}" if self.mark == "bad" else self.reason
        return f"{self.mark:<5}{self.commit}" + (f" ({place})" if place else "")


@dataclass(frozen=True, slots=True)
class BisectOutcome:
    """The first bad commit, or None and the suspects, if it is among some that cannot be checked.

    `trials` is the number of commits that were checked.
    """

    first_bad: Trial | None
    suspects: tuple[Commit, ...]
    trials: int


def bisect(
    fms_path: Path, good: str, bad: str, *, options: tuple[str, ...], progress: Progress
) -> BisectOutcome:
    """Return the first commit after `good`, up to `bad`, that fails the check.

    options: passed to every `snap check`.
    """
    first, last = find_commit(fms_path, good), find_commit(fms_path, bad)
    if first.sha == last.sha:
        raise UsageError(f"--good and --bad are both {first}", "name two commits")
    if run_git(fms_path, "merge-base", "--is-ancestor", last.sha, first.sha).returncode == 0:
        raise UsageError(f"--bad {last} comes before --good {first}", "swap them")
    trials: dict[str, Trial] = {}
    with temporary_worktree(fms_path, first) as folder:

        def check(commit: Commit) -> Trial:
            trials[commit.sha] = trial = _check(folder, commit, options)
            progress.note(str(trial))
            return trial

        for name, commit in (("good", first), ("bad", last)):
            read_git(folder, "checkout", "--quiet", "--detach", commit.sha)
            _require_end(name, check(commit))
        log = _run_bisect(folder, "start", last.sha, first.sha)
        while not (_FOUND.search(log) or _LEFT.search(log)):
            log = _run_bisect(folder, check(read_commit(folder, "HEAD")).mark)
        if found := _FOUND.search(log):
            return BisectOutcome(trials[found[1]], (), len(trials))
        suspects = tuple(read_commit(folder, sha) for sha in _LEFT.findall(log))
        return BisectOutcome(None, suspects, len(trials))


def _require_end(name: str, trial: Trial) -> None:
    """Raise unless the good commit passes or the bad one fails."""
    if trial.mark == "skip":
        raise SnapError(f"--{name} {trial.commit} cannot be checked: {trial.reason}")
    if name == "good" and trial.mark == "bad":
        raise UsageError(
            f"--good {trial.commit} fails: {trial.phase}, case {trial.case}",
            "name an older commit that passes",
        )
    if name == "bad" and trial.mark == "good":
        raise UsageError(
            f"--bad {trial.commit} passes",
            "name a commit that fails snap check with the same options",
        )


def _run_bisect(folder: Path, *words: str) -> str:
    """Run git bisect and return its log; raise SnapError if it cannot continue."""
    before = run_git(folder, "bisect", "log").stdout
    answer = run_git(folder, "bisect", *words)
    log = run_git(folder, "bisect", "log").stdout
    # git also fails if only skipped commits are left; the log then names them.
    stuck = answer.returncode != 0 and not (_FOUND.search(log) or _LEFT.search(log))
    if stuck or log == before:
        said = (answer.stdout.strip() or answer.stderr.strip() or "no message").splitlines()
        raise SnapError(
            f"git bisect cannot continue: {said[0]}", "--good must be an ancestor of --bad"
        )
    return log


def _check(folder: Path, commit: Commit, options: tuple[str, ...]) -> Trial:
    """Run `snap check --quick` on the commit that is checked out."""
    with TemporaryDirectory(prefix="snap-report-") as holder:
        path = Path(holder) / "report.json"
        own = ["--quick", "--candidate", "fms", "--fms-path", str(folder), "--json", str(path)]
        answer = subprocess.run(
            [sys.executable, "-m", "snapshot_tool", "check", *options, *own],
            # Bytecode of another commit would be used if size and second of the file are the same.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    message = answer.stderr.strip().removeprefix("snap: ").replace(str(folder), "the checkout")
    first_line = next(iter(message.splitlines()), "")
    if answer.returncode == _PASSED and report:
        return Trial(commit, "good")
    if answer.returncode == _DIFFERS and report:
        first = report["first_divergence"] or _NO_DIVERGENCE
        module = first.get("module") or ""
        if module and first.get("candidate_module"):
            module += f" ({first['candidate_module']})"
        return Trial(commit, "bad", first["reason"], first["phase"], first["case"], module)
    if answer.returncode == _CANNOT_RUN:
        return Trial(commit, "skip", first_line or "nothing was compared")
    if answer.returncode == _WRONG_USAGE:
        raise UsageError(f"snap check refuses its options: {message.splitlines()[-1]}")
    raise SnapError(f"snap check ended with {answer.returncode} on {commit}: {first_line}")
