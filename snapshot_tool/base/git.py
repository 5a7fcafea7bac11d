"""Somebody's git repository, looked at in a worktree of our own: the checkout itself is left alone.

A worktree has its own HEAD, files and bisection; of the repository it shares the objects alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.text import printable

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
