"""A new golden version is shown first; who is asked, and what the answer does."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from snapshot_tool.base.errors import UpdateDeclined
from snapshot_tool.cli import record
from snapshot_tool.diagnose.diff import SetDiff, diff_goldens
from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.goldens.manifest import load_manifest
from tests.unit.factory import write_golden, write_manifest


@pytest.fixture
def diff(tmp_path: Path) -> SetDiff:
    """Return what a second golden version of a set changes."""
    one = write_golden(tmp_path / "one")
    other = Path(shutil.copytree(tmp_path / "one", tmp_path / "other")) / one.relative_to(
        tmp_path / "one"
    )
    write_manifest(other, msgspec.structs.replace(load_manifest(other), golden_version=2))
    return diff_goldens(open_golden(one), open_golden(other))


def review(diff: SetDiff, *, typed: str, reason: str = "", yes: bool = False) -> Result:
    """Review with these keys typed; the reason is printed at the end."""

    @click.command()
    def command() -> None:
        click.echo("reason is " + record.make_review(reason, written_unasked=yes)(diff))

    return CliRunner().invoke(command, input=typed)


@pytest.fixture
def _person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "is_interactive", lambda: True)


@pytest.mark.usefixtures("_person")
@pytest.mark.parametrize(
    ("typed", "reason", "kept"),
    [("y\n", "why", "why"), ("y\nbecause\n", "", "because"), ("yes\n\nso\n", "", "so")],
)
def test_a_yes_writes_with_the_reason_given_or_typed(
    diff: SetDiff, typed: str, reason: str, kept: str
) -> None:
    """What moved stands above the question; no version is without a reason."""
    result = review(diff, typed=typed, reason=reason)
    assert result.exit_code == 0
    assert result.output.index("the same: every tensor") < result.output.index("[y/N]")
    assert "write local/tiny at 0123456789ab (cpu-float32), golden version 2?" in result.output
    assert result.output.splitlines()[-1].endswith(f"reason is {kept}")


@pytest.mark.usefixtures("_person")
@pytest.mark.parametrize("typed", ["n\n", "\n"])
def test_anything_but_a_yes_declines(diff: SetDiff, typed: str) -> None:
    """Enter alone is a no."""
    result = review(diff, typed=typed, reason="why")
    assert isinstance(result.exception, UpdateDeclined)
    assert "golden version 1 is unchanged" in result.exception.problem


def test_nobody_to_ask_declines_unless_yes_was_said(diff: SetDiff) -> None:
    """Not even a y on a pipe is an answer: --yes is."""
    declined = review(diff, typed="y\n", reason="why")
    assert isinstance(declined.exception, UpdateDeclined)
    assert "[y/N]" not in declined.output
    assert review(diff, typed="", reason="why", yes=True).output.endswith("reason is why\n")
