"""`snap bisect` on a small history of the tests' FMS checkout, with one fault in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.check.bisect import BisectOutcome, bisect
from tests.conftest import CHECKOUT, ROOT, Snap
from tests.fms_checkout.build import IDENTITY
from tests.mutants.corpus import edit_of

FAULT = edit_of("exact-gelu")
MODEL = "fms/models/idefics3.py"
SHORT = ("--case", "variant-04", "--phase", "vision")


@dataclass(frozen=True, slots=True)
class History:
    """A repository and its commits, by subject."""

    repository: Path
    commits: dict[str, str]

    def git(self, *arguments: str) -> str:
        """Run git and return what it prints."""
        answer = subprocess.run(
            ["git", "-C", str(self.repository), *arguments],
            env={**os.environ, **IDENTITY}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return answer.stdout.strip()

    def commit(self, subject: str, file: str, old: str, new: str) -> None:
        """Change a file and commit it."""
        path = self.repository / file
        source = path.read_text(encoding="utf-8")
        assert old in source
        path.write_text(source.replace(old, new, 1), encoding="utf-8")
        self.git("commit", "--quiet", "--all", "--message", subject)
        self.commits[subject] = self.git("rev-parse", "HEAD")

    def state(self) -> tuple[str, ...]:
        """Return what a bisection must leave alone: branch, head, changes, worktrees, refs."""
        return (
            self.git("symbolic-ref", "HEAD"),
            self.git("rev-parse", "HEAD"),
            self.git("status", "--porcelain", "--untracked-files=all"),
            self.git("worktree", "list", "--porcelain"),
            self.git("for-each-ref"),
        )


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Build five commits: the third, which git tries first, does not import; the last is bad."""
    repository = tmp_path_factory.mktemp("history") / "fms"
    shutil.copytree(CHECKOUT, repository, ignore=shutil.ignore_patterns("__pycache__"))
    found = History(repository, {})
    found.commits["first"] = found.git("rev-parse", "HEAD")
    first_line = (repository / MODEL).read_text(encoding="utf-8").splitlines()[0]
    found.commit("two", MODEL, first_line, f"# 2\n{first_line}")
    found.commit("does not import", MODEL, "# 2\n", "import no_such_module\n")
    found.commit("imports again", MODEL, "import no_such_module\n", "# 4\n")
    found.commit("fault", FAULT.file, FAULT.old, FAULT.new)
    # What a person has lying around in a checkout.
    (repository / "fms" / "__init__.py").write_text("raise SystemExit('dirty')", encoding="utf-8")
    (repository / "notes.txt").write_text("untracked", encoding="utf-8")
    return found


def search(
    history: History, good: str, bad: str, options: tuple[str, ...] = SHORT
) -> BisectOutcome:
    """Search in this process; every commit is checked in one of its own."""
    return bisect(history.repository, good, bad, options=options, progress=Progress())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which temporary files of this process are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_commit_the_phase_and_the_module_are_found(
    snap: Snap, history: History, tmp_path: Path
) -> None:
    """Past a commit that does not import; the user's checkout and its changes stay as they are."""
    before = history.state()
    run = snap(
        "bisect", "--fms-path", history.repository, "--good", history.commits["first"],
        "--bad", "idefics3", "--", *SHORT, TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert run.code == 0, run.err
    assert history.commits["fault"] in run.out.splitlines()[0]
    assert run.out.splitlines()[1].startswith("    fault (fms-checkout, 2026-01-01)")
    assert "phase   vision, case variant-04: " in run.out
    assert "module  model.vision_model.encoder.layers.0.mlp.activation_fn (vision_tower." in run.out
    assert len([line for line in run.err.splitlines() if line.startswith("skip ")]) == 1
    assert history.state() == before
    assert list(tmp_path.glob("snap-*")) == []


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("first", "two", "--bad .* passes"),
        ("does not import", "fault", "cannot be checked: FMS at the checkout"),
    ],
)
def test_both_ends_must_be_checked_and_a_bad_one_must_fail(
    history: History, temporary: Path, good: str, bad: str, problem: str
) -> None:
    """Otherwise nothing is searched, and nothing is left behind."""
    before = history.state()
    with pytest.raises(SnapError, match=problem):
        search(history, history.commits[good], history.commits[bad])
    assert history.state() == before
    assert list(temporary.glob("snap-*")) == []


def test_a_good_commit_must_pass(history: History, tmp_path: Path) -> None:
    """It is refused before the bad one is checked."""
    clone = History(tmp_path / "clone", {})
    shutil.copytree(history.repository, clone.repository)
    clone.git("checkout", "--quiet", "--force")
    clone.commit("after", MODEL, "# 4\n", "# 5\n")
    with pytest.raises(SnapError, match=r"--good .* fails: vision, case variant-04"):
        search(clone, "HEAD~1", "HEAD")


def test_all_commits_that_may_be_the_one_are_named(history: History, tmp_path: Path) -> None:
    """If commits that cannot be checked hide it."""
    clone = History(tmp_path / "clone", {})
    shutil.copytree(history.repository, clone.repository)
    clone.git("reset", "--quiet", "--hard", history.commits["does not import"])
    clone.commit("fault unseen", FAULT.file, FAULT.old, FAULT.new)
    clone.commit("seen", MODEL, "import no_such_module\n", "# 5\n")
    outcome = search(clone, history.commits["two"], "HEAD")
    assert outcome.first_bad is None
    assert {commit.sha for commit in outcome.suspects} == {
        history.commits["does not import"], *clone.commits.values(),
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_leaves_no_worktree(
    history: History, tmp_path: Path, number: signal.Signals
) -> None:
    """Neither in the repository nor in the temporary folder."""
    before = history.state()
    arguments = ["--fms-path", str(history.repository), "--good", "idefics3~4", "--bad", "idefics3"]
    with subprocess.Popen(
        [sys.executable, "-m", "snapshot_tool", "bisect", *arguments, "--", *SHORT],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in its background has them ignore it.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509 - no threads
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while not list(tmp_path.glob("snap-worktree-*/fms/fms/__init__.py")):
            assert process.poll() is None
        process.send_signal(number)
        said = process.stderr.read()
    assert (process.returncode, said.strip()) == (130, "snap: interrupted")
    assert history.state() == before
    assert list(tmp_path.glob("snap-*")) == []


@pytest.mark.parametrize(
    ("repository", "good", "bad", "problem"),
    [
        ("fms", "no-such-branch", "HEAD", "has no commit 'no-such-branch'"),
        ("fms", "--all", "HEAD", "has no commit '--all'"),
        ("fms", "HEAD", "HEAD~0", "--good and --bad are both"),
        ("fms", "HEAD", "HEAD~1", "comes before"),
        ("nowhere", "HEAD~1", "HEAD", "is not a git repository"),
    ],
)
def test_commits_that_cannot_be_an_end_are_wrong_usage(
    history: History, repository: str, good: str, bad: str, problem: str
) -> None:
    """Nothing is checked, and git's own messages are not shown."""
    elsewhere = History(history.repository.parent / repository, {})
    with pytest.raises(UsageError, match=problem):
        search(elsewhere, good, bad)


def test_options_that_check_does_not_have_are_wrong_usage(history: History) -> None:
    """Options after -- are those of snap check."""
    with pytest.raises(UsageError, match="snap check refuses its options: Error: No such option"):
        search(history, "idefics3~4", "idefics3", ("--nonsense",))
