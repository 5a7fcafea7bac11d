"""Golden sets by name, several in one folder, and none where a lock names some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Snap, error_lines

FAMILIES = ROOT / "tests" / "families"


@pytest.fixture
def families(tmp_path: Path) -> Path:
    """Copy the golden sets of llama and roberta, and the checkpoints that they name."""
    for name in ("goldens", "checkpoints"):
        shutil.copytree(FAMILIES / name, tmp_path / "tests" / "families" / name)
    return tmp_path / "tests" / "families" / "goldens"


@pytest.mark.parametrize(
    "name", ["local/roberta", "roberta", "local--roberta/9c2646591c17/cpu-float32"]
)
def test_a_golden_is_named_as_list_and_show_name_it(snap: Snap, name: str) -> None:
    """It is checked with the checkpoint that it was recorded from."""
    options = ("--goldens", FAMILIES / "goldens", "--case", "one-sentence", "--json", "-")
    run = snap("check", "--checkpoint", name, *options)
    assert run.code == 0
    assert run.report["golden"]["checkpoint"] == "local/roberta"


def test_several_golden_sets_say_how_to_choose_one(snap: Snap) -> None:
    """What the message shows works."""
    run = snap("check", "--goldens", FAMILIES / "goldens")
    assert run.code == 2
    name = run.err.partition("--checkpoint ")[2].partition(",")[0]
    again = snap("check", "--goldens", FAMILIES / "goldens", "--checkpoint", name)
    assert again.code == 0


def test_all_golden_sets_are_checked_and_end_with_one_verdict(
    snap: Snap, families: Path, tmp_path: Path
) -> None:
    """A set to which the options do not apply is skipped, and said to be."""
    reports = tmp_path / "reports"
    run = snap("check", "--all", "--goldens", families, "--phase", "forward", "--json", reports)
    assert run.code == 0
    verdicts = [json.loads(path.read_text("utf-8"))["verdict"] for path in reports.iterdir()]
    assert verdicts == ["pass", "pass"]
    assert run.out.splitlines()[-1] == "PASS: 2 golden sets: 2 pass"
    run = snap("check", "--all", "--goldens", families, "--phase", "generate")
    assert run.code == 0
    assert run.out.splitlines()[-1] == "PASS: 2 golden sets: 1 pass, 1 skip"
    assert "roberta has no such phase" in run.out


@pytest.mark.parametrize("name", ["local/nothing", "./nothing"])
def test_all_of_nothing_is_an_error(snap: Snap, families: Path, name: str) -> None:
    """A name that no golden set has does not pass."""
    run = snap("check", "--all", "--goldens", families, "--checkpoint", name)
    assert run.code == 3
    assert f"no golden for {name}" in error_lines(run)[0]


def test_a_set_that_cannot_be_checked_does_not_hide_the_others(snap: Snap, families: Path) -> None:
    """A failure comes first in the exit code, then what could not run."""
    (manifest,) = families.glob("local--llama/*/*/manifest.json")
    manifest.write_text("{")
    run = snap("check", "--all", "--goldens", families)
    assert run.code == 3
    assert run.out.splitlines()[-1] == "ERROR: 2 golden sets: 1 pass, 1 error"
    run = snap("check", "--all", "--goldens", families, "--atol", 0, "--rtol", 0)
    assert run.code == 1
    assert run.out.splitlines()[-1] == "FAIL: 2 golden sets: 1 fail, 1 error"


@pytest.mark.parametrize("command", ["check", "show", "verify", "list", "doctor"])
def test_goldens_that_a_lock_names_are_pulled_and_not_recorded(
    snap: Snap, tmp_path: Path, command: str
) -> None:
    """Somebody has recorded them: the lock says where they lie."""
    goldens = tmp_path / "goldens"
    (tmp_path / "goldens.lock").write_text("{}")
    run = snap(command, "--goldens", goldens)
    assert f"snap pull --goldens {goldens}" in run.out + run.err
    assert "snap record" not in run.err
    if command not in ("list", "doctor"):
        assert run.code == 3
        error_lines(run)
