"""The command line itself: help, exit codes, what is imported when."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import pty
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import snapshot_tool
from snapshot_tool.base.errors import GoldenNotFound
from snapshot_tool.cli import main
from snapshot_tool.cli.check import check_command
from snapshot_tool.cli.commands import cli
from tests.conftest import CHECKOUT, ROOT, Snap


def loaded_modules(arguments: list[str]) -> set[str]:
    """Return the modules that a run of `snap` imported."""
    program = (
        "import sys\n"
        "from snapshot_tool.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print('\\nMODULES', *sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return set(answer.stdout.rpartition("MODULES ")[2].split())


def help_of(*arguments: str) -> str:
    """Return the help of a command."""
    result = CliRunner().invoke(cli, [*arguments, "--help"], prog_name="snap")
    assert result.exit_code == 0
    return result.output


def test_help_explains_the_job_in_ten_lines() -> None:
    """And names every command."""
    text = help_of()
    job = text.partition("\n\n")[2].partition("\n\nOptions:")[0]
    assert 8 <= len([line for line in job.splitlines() if line.strip()]) <= 11
    assert "snap record --revision SHA" in job
    assert "snap check --fms-path" in job
    for command in cli.list_commands(click.Context(cli)):
        assert re.search(rf"^  {command}  ", text, re.MULTILINE)


def test_the_help_of_check_has_each_option_in_a_group() -> None:
    """None is lost on the way, and no group is as long as a screen."""
    sections = re.split(r"^(?=\S)", help_of("check"), flags=re.MULTILINE)
    shown = [re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE) for text in sections]
    options = {option for group in shown for option in group}
    assert {max(param.opts, key=len) for param in check_command.params} <= options
    assert max(map(len, shown)) < 10


@pytest.mark.parametrize("command", cli.list_commands(click.Context(cli)))
def test_every_command_has_an_example_and_a_row_in_the_docs(command: str) -> None:
    """A command that is not documented is not finished."""
    assert re.search(rf"^  Example: snap {command}", help_of(command), re.MULTILINE)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"| `snap {command}` |" in page


def test_the_docs_name_only_options_that_exist() -> None:
    """Of check and record."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    named = set(re.findall(r"snap (?:check|record)[^`\n]*?(--[a-z-]+)", page))
    known = set(re.findall(r"(--[a-z-]+)", help_of("check") + help_of("record")))
    assert named <= known


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["show"],
        ["verify"],
        ["check", "-h"],
        ["pull"],
    ],
)
def test_looking_at_goldens_imports_no_torch(arguments: list[str]) -> None:
    """Commands that run no model start at once."""
    loaded = loaded_modules(arguments)
    assert "snapshot_tool.cli" in loaded
    assert not loaded & {"torch", "transformers", "hypothesis", "fms", "numpy", "PIL"}


def test_every_module_but_the_reference_imports_without_transformers() -> None:
    """In the check environment nothing of the package is broken by what is missing."""
    names = [
        info.name
        for info in pkgutil.walk_packages(snapshot_tool.__path__, "snapshot_tool.")
        if info.name != "snapshot_tool.__main__"
        and not info.name.startswith("snapshot_tool.reference.")
    ]
    assert len(names) > 40
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    program += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["check", "--nonsense"], ["check", "--shard", "2/0"], ["diff", "one"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Never with the code that means a difference."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["chekc"], "did you mean check?"),
        (["check", "--fms-pth", "."], "--fms-path"),
        (["show", "local/tiny-idefix"], "did you mean local/tiny-idefics3?"),
    ],
)
def test_a_word_that_is_nearly_right_gets_a_suggestion(
    arguments: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, options and golden sets."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (2, 3)
    assert nearest in capsys.readouterr().err


def test_recording_without_hugging_face_names_the_record_environment(
    snap: Snap, tmp_path: Path
) -> None:
    """Installing transformers here would change the check environment."""
    checkpoint = ROOT / "tests" / "checkpoints" / "tiny-idefics3"
    run = snap("record", "--checkpoint", checkpoint, "--goldens", tmp_path)
    assert run.code == 3
    assert "needs transformers and accelerate" in run.err
    assert "use the record environment" in run.err
    assert "pip install" not in run.err


def test_nothing_names_the_distribution_of_somebody_else() -> None:
    """On PyPI, the package's name with a hyphen is a stranger's: a message must not install it."""
    stranger = snapshot_tool.__name__.replace("_", "-")
    found = subprocess.run(
        ["git", "grep", "--files-with-matches", stranger],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_the_version_needs_no_installed_distribution() -> None:
    """`python -m snapshot_tool --version` works in a checkout."""
    result = CliRunner().invoke(cli, ["--version"], prog_name="snap")
    assert result.output.strip() == f"snap, version {snapshot_tool.__version__}"


def test_debug_shows_the_traceback_of_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it an error has two lines."""
    arguments = ["check", "--goldens", str(tmp_path)]
    with pytest.raises(GoldenNotFound):
        main(["--debug", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3
    assert len(capsys.readouterr().err.splitlines()) == 2


def in_a_terminal(**environment: str) -> str:
    """Return what a short check prints on a terminal."""
    arguments = ["check", "--fms-path", "build/fms-checkout", "--case", "one-image"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "snapshot_tool", *arguments, "--phase", "connector"],
        cwd=ROOT, env={**os.environ, "TERM": "xterm", **environment},
        stdin=theirs, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        printed = b""
        # Linux ends a terminal whose other side is closed with an error, other systems with b"".
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                printed += data
    os.close(ours)
    assert process.returncode == 0
    return printed.decode()


def test_a_terminal_gets_colour_and_progress_unless_it_is_refused(snap: Snap) -> None:
    """NO_COLOR is respected (no-color.org), and a file gets neither."""
    coloured = in_a_terminal()
    assert "\x1b[32m" in coloured
    assert "checking: one-image / connector" in coloured
    plain = in_a_terminal(NO_COLOR="1")
    assert "\x1b[32mpass" not in plain
    assert "PASS: 1 passed" in plain
    options = ("--case", "one-image", "--phase", "connector")
    filed = snap("check", "--fms-path", "build/fms-checkout", *options)
    assert "\x1b" not in filed.out + filed.err
    assert "checking" not in filed.err


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        ("snap ch", {"check"}),
        ("snap check --fms", {"--fms-path"}),
        ("snap check --phase v", {"vision"}),
        ("snap check --phase vision,f", {"vision,forward"}),
        ("snap check --case one", {"one-image"}),
        ("snap show l", {"local/tiny-idefics3"}),
        ("snap check --goldens tests/families/goldens --checkpoint local/r", {"local/roberta"}),
    ],
)
def test_the_shell_completes_commands_options_and_names(words: str, answers: set[str]) -> None:
    """As docs/commands.md sets it up for bash; the rest of click's shells work alike."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert 'eval "$(_SNAP_COMPLETE=bash_source snap)"' in page
    last = str(len(words.split()) - 1)
    answer = subprocess.run(
        [sys.executable, "-c", "from snapshot_tool.cli import main; main([])"],
        env={**os.environ, "_SNAP_COMPLETE": "bash_complete", "COMP_WORDS": words,
             "COMP_CWORD": last},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {line.partition(",")[2] for line in answer.stdout.splitlines()} == answers


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "--json"], 0),
        (["check", "--fms-path", str(CHECKOUT), "--case", "variant-02", "--atol", "0"], 1),
        (["show", "nonsense"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_exit_code_holds_when_nobody_reads_the_output(arguments: list[str], code: int) -> None:
    """Neither standard output nor standard error has a reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "snapshot_tool", *arguments],
        cwd=ROOT, stdout=writer, stderr=writer,
    ) as process:  # fmt: skip
        os.close(writer)
    assert process.returncode == code


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    """`snap show | head -1` is what people do."""
    answer = subprocess.run(
        f"{sys.executable} -m snapshot_tool show --json | head -1",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.stdout == "{\n"
    assert answer.stderr == ""
