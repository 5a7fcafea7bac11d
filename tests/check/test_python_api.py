"""The Python API: the page that documents it, its options, its types."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from pathlib import Path

import click
import pytest

import snapshot_tool as snap
from snapshot_tool.base import errors
from snapshot_tool.base.options import options_of
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.cli.check import check_command
from snapshot_tool.cli.record import record_command
from snapshot_tool.pytest_plugin import OPTIONS, plugin_flag
from snapshot_tool.record.request import RecordRequest
from tests.conftest import GOLDENS, ROOT

PAGE = ROOT / "docs" / "python.md"


def a_users_script(folder: str) -> bool:
    """Use the API as a script may: mypy holds the types, and nobody runs it."""
    run = snap.check("goldens", fms_path=folder, phase=["vision"], atol=1e-6, quick=True)
    first: snap.Result | None = run.first_divergence
    try:
        snap.record("checkpoint", update=True, reason="why")
        snap.check(devise="cpu")  # type: ignore[call-arg]
    except snap.GoldenNotFound as error:
        print(error.remedy)
    print(snap.diff("one", "other").beyond, [found.damage for found in snap.verify()])
    return first is None and run.verdict is snap.Verdict.PASS


def run_page(*, recording: bool) -> None:
    """Run the blocks of the page that record, or the others, and compare what they print."""
    blocks = re.findall(r"(?ms)^```pycon\n(.*?)^```", PAGE.read_text(encoding="utf-8"))
    chosen = "".join(block for block in blocks if ("snap.record(" in block) == recording)
    test = doctest.DocTestParser().get_doctest(chosen, {}, PAGE.name, str(PAGE), 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0


def test_the_page_shows_what_checking_from_python_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs, in the root of the repository."""
    monkeypatch.chdir(ROOT)
    run_page(recording=False)


@pytest.mark.record
def test_the_page_shows_what_recording_from_python_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its code runs, where its checkpoint is."""
    folder = Path("tests", "families", "checkpoints", "llama")
    shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    run_page(recording=True)


def test_one_declaration_makes_click_pytest_and_python_options() -> None:
    """Every option of check and record has one name everywhere."""
    for request, command, function in (
        (CheckRequest, check_command, snap.check),
        (RecordRequest, record_command, snap.record),
    ):
        declared = list(options_of(request))
        assert list(inspect.signature(function).parameters) == declared
        typed = {option.opts[0]: option.name for option in command.params}
        own = [option for name, option in options_of(request).items() if name != "answers"]
        assert {typed[option.flag] for option in own} == {option.field for option in own}
    for option in OPTIONS:
        assert plugin_flag(option) in (option.flag, f"--snap-{option.flag[2:]}")
    left_out = {name for name, option in options_of(CheckRequest).items() if option not in OPTIONS}
    one_report = {"localise", "isolate", "explore", "seed", "replay", "graft", "require"}
    pytest_has = {"last_failed", "fail_fast"}
    assert left_out == one_report | pytest_has


@pytest.mark.parametrize(
    ("command", "request_type"),
    [(check_command, CheckRequest), (record_command, RecordRequest)],
    ids=["check", "record"],
)
def test_a_command_without_options_has_the_defaults_of_python(
    command: click.Command, request_type: type
) -> None:
    """Text that is not given is "" and never None, for example."""
    given = command.make_context("snap", []).params
    options = {name: given[name] for name in options_of(request_type) if name in given}
    assert request_type(**options) == request_type()


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"phase": ["sight"]},
        {"phase": "vision,sight"},
        {"family": "file.py"},
        {"case": ["one-image", "nothing"]},
        {"repeat": 0},
        {"atol": -1.0},
        {"shard": "4/3"},
        {"replay": ["nonsense:x"]},
    ],
)
def test_wrong_values_are_usage_errors(options: dict[str, object]) -> None:
    """As on the command line, where click refuses most of them."""
    with pytest.raises(snap.UsageError):
        snap.check(GOLDENS, candidate="tests.candidates:Wrapped", **options)  # type: ignore[arg-type]


def test_an_update_needs_a_reason() -> None:
    """Nobody is asked."""
    with pytest.raises(snap.UsageError):
        snap.record("checkpoint", update=True)


def test_every_error_is_exported() -> None:
    """A script catches them by name."""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.SnapError):
            assert getattr(snap, name) is value


def test_folders_of_the_package_do_not_hide_functions() -> None:
    """`snapshot_tool.check` is a folder as well as a function."""
    from snapshot_tool.check import session

    assert session.__name__ == "snapshot_tool.check.session"
    assert callable(snap.check)
    assert callable(snap.record)
